"""What every way to ask takes: ids or words, tools, the template's own names, a priority, and threads that share it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firstlight import LLM, SamplingParams
from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.core.request import Completion
from tests.tiny import CHAT_TEMPLATE, save_tiny_chat

SHORT = SamplingParams(max_tokens=5, ignore_eos=True)
HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(
        save_tiny_chat(tmp_path_factory.mktemp("tiny")), precision="f32", deterministic=True, max_num_seqs=4
    ) as made:
        yield made


def last(chunks: Any) -> Completion:
    *_, end = chunks
    return end.completion


def test_words_and_ids_are_the_same_request(llm: LLM) -> None:
    ids = llm.encode_chat(HELLO)
    answers = [*llm.chat(HELLO, SHORT), *llm.generate(ids, SHORT), *llm.generate([np.array(ids)], SHORT)]
    answers += [last(llm.stream(HELLO, SHORT)), last(llm.stream(ids, SHORT))]
    assert all(out.prompt_ids == ids and out.token_ids == answers[0].token_ids for out in answers)
    assert all(out.report["token_ids"] == out.token_ids for out in answers)


def test_tools_and_the_templates_own_names_reach_it(llm: LLM) -> None:
    for out in (
        *llm.chat(HELLO, SHORT, tools=TOOLS, template_kwargs={"style": "brief"}),
        last(llm.stream(HELLO, SHORT, tools=TOOLS, template_kwargs={"style": "brief"})),
    ):
        text = llm.tokenizer.decode(out.prompt_ids)
        assert '"weather"' in text and text.endswith("assistant\n(brief)")
    assert "weather" not in llm.tokenizer.decode(llm.chat(HELLO, SHORT)[0].prompt_ids)


def test_the_template_counts_as_tokenising(llm: LLM) -> None:
    slow = [{"role": "user", "content": "x"}] * 60
    assert llm.chat([slow], SHORT)[0].report["timings"]["tokenize_s"] > 1e-4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda llm: llm.generate("x", priority=10**9), "priority=1000000000 is out of range"),
        (lambda llm: llm.generate("x", priority=1.5), "priority=1.5 is out of range"),
        (lambda llm: llm.generate("x", priority=True), "priority=True is out of range"),
        (lambda llm: llm.generate("x", ttft_slo_s=0), "ttft_slo_s=0 is no length"),
        (lambda llm: llm.chat(HELLO, ttft_slo_s=float("nan")), "ttft_slo_s=nan is no length"),
        (lambda llm: llm.chat(HELLO, ttft_slo_s="1"), "ttft_slo_s='1' is no length"),
        (lambda llm: next(llm.stream(HELLO, priority="high")), "priority='high' is out of range"),
        (lambda llm: llm.chat(HELLO, template_kwargs={"bos_token": "x"}), "template_kwargs can't set bos_token"),
        (lambda llm: llm.generate([["a", "b"]]), "a prompt is a text, a list of token ids"),
        (lambda llm: llm.generate([[1.5]]), "a prompt is a text, a list of token ids"),
        (lambda llm: llm.generate([[-1]]), "token id -1 is not in the vocabulary"),
        (lambda llm: llm.generate([[2**63]]), "token id 9223372036854775808 is not in the vocabulary"),
    ],
)
def test_bad_calls_get_one_line(llm: LLM, call: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        call(llm)
    assert "\n" not in str(caught.value) and not llm.engine.has_work


def test_a_template_without_tools_says_so(tmp_path: Path) -> None:
    with LLM(save_tiny_chat(tmp_path, chat_template=CHAT_TEMPLATE.replace("tools", "nothing")), precision="f32") as llm:
        assert llm.chat(HELLO, SHORT, tools=[])[0].token_ids
        with pytest.raises(UserError, match="no place for tools"):
            llm.chat(HELLO, SHORT, tools=TOOLS)


def test_the_smaller_priority_is_served_first(tmp_path: Path) -> None:
    """One seat, taken; those who wait get it in order of priority, and equal ones in order of arrival."""
    with LLM(save_tiny_chat(tmp_path), precision="f32", max_num_seqs=1, schedule="sarathi:ageing_s=60") as llm:
        seat = llm.stream("x", SamplingParams(max_tokens=30, ignore_eos=True))
        next(seat)
        order: list[str] = []
        streams = {
            name: llm.answers.add(
                lambda: PromptIds([1, 2]), SHORT, lambda _, name=name: order.append(name), priority=priority
            )
            for name, priority in [("late", 1), ("first", -3), ("second", 0), ("third", 0)]
        }
        last(seat)
        while llm.engine.has_work:
            llm.answers.turns.step()
        assert list(dict.fromkeys(order)) == ["first", "second", "third", "late"]
        assert all(llm.answers.forget(rid) for (rid,) in streams.values())
        out = llm.generate("x", SHORT, priority=2, ttft_slo_s=0.5)[0]
        assert (out.report["settings"]["priority"], out.report["settings"]["ttft_slo_s"]) == (2, 0.5)


def test_threads_share_one_model(llm: LLM) -> None:
    prompts = [[n, n + 1, n + 2] for n in range(24)]
    alone = [out.token_ids for out in llm.generate(prompts, SHORT)]

    def ask(n: int) -> list[int]:
        way = n % 3
        if way == 0:
            return llm.generate(prompts[n], SHORT)[0].token_ids
        stream = llm.stream(prompts[n], SHORT)
        if way == 1:
            return last(stream).token_ids
        next(stream)
        stream.close()
        return llm.generate([prompts[n]] * 2, SHORT)[1].token_ids

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(24))) == alone
    assert not llm.engine.has_work and llm.engine.pool.used == 0
    llm.engine.pool.check()


def test_closing_wakes_whoever_waits(tmp_path: Path) -> None:
    llm = LLM(save_tiny_chat(tmp_path), precision="f32", max_num_seqs=2)
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            llm.generate([[1, 2]] * 4, SamplingParams(max_tokens=1000, ignore_eos=True))
        except UserError as error:
            caught.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not llm.engine.has_work:
        pass
    llm.close()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert [str(error) for error in caught] == ["this LLM was closed; make another one"] * 3
    assert llm.engine.pool.free == llm.engine.pool.total


def test_a_progress_callback_can_not_ask(tmp_path: Path) -> None:
    """It would wait for itself."""
    asked: list[str] = []

    def progress(report: Any) -> None:
        if report.phase == "prefill" and not asked:
            asked.append("once")
            llm.generate("x", SHORT)

    with LLM(save_tiny_chat(tmp_path), precision="f32", progress=progress) as llm:
        with pytest.raises(UserError, match="progress callback"):
            llm.generate("y", SHORT)
        assert llm.generate("y", SHORT)[0].token_ids
