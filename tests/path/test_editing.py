"""Prompts that a method shortens before they are admitted: the whole way, on a tiny model with a chat template."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from firstlight import LLM, AsyncLLM, SamplingParams
from firstlight.cli.breakdown import breakdown
from firstlight.core.calibration import Calibration, write
from firstlight.core.errors import UserError
from firstlight.core.parts import PromptEdit, PromptEditor
from firstlight.core.registry import Method
from firstlight.engine.build import machine_name
from firstlight.engine.editing import Editing
from firstlight.engine.scorer import ModelScorer
from firstlight.prompt.spans import as_parts
from firstlight.train.calibrating import calibrate
from tests.tiny import save_tiny_chat, tiny_model

DOCUMENT = " ".join(f"Line {n} says {n * n % 97}." for n in range(60))
QUESTION = "What does line 9 say?"
ASKED = [{"role": "user", "content": as_parts(DOCUMENT, QUESTION)}]
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)
METHODS = ("llmlingua", "truncate", "bm25")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model"))


def open_llm(path: Path, *method: str, **options: Any) -> LLM:
    return LLM(path, precision="f32", method=method, max_model_len=1500, **options)


@pytest.fixture(scope="module")
def dense(path: Path) -> Iterator[LLM]:
    with open_llm(path) as llm:
        yield llm


@pytest.mark.parametrize("method", METHODS)
def test_a_chat_is_answered_as_the_kept_ids_would_be_and_says_what_was_done(
    path: Path, dense: LLM, method: str
) -> None:
    whole = dense.encode_chat(ASKED)
    with open_llm(path, method) as llm:
        out = llm.chat(ASKED, SHORT)[0]
        again = llm.chat(ASKED, SHORT)[0]
    (facts,) = out.report["methods"]
    assert (facts["used"], facts["origin"], facts["kept"]) == (True, len(DOCUMENT), (len(DOCUMENT) + 1) // 2)
    assert facts["rate"] == pytest.approx(0.5, abs=0.05) and facts["protected"] == len(whole) - len(DOCUMENT)
    assert len(out.prompt_ids) == out.report["prompt_tokens"] == facts["kept"] + facts["protected"]
    assert out.prompt_ids[:5] == whole[:5]
    assert dense.tokenizer.decode(out.prompt_ids).endswith(f"\n\n{QUESTION}\nassistant\n")
    assert out.token_ids == dense.generate([out.prompt_ids], SHORT)[0].token_ids
    assert not out.report["exact"] and sum_of(out) == pytest.approx(out.report["ttft_s"], abs=1e-6)
    assert out.report["timings"]["edit_s"] == facts["seconds"] > 0
    assert again.prompt_ids == out.prompt_ids and again.report["cached_tokens"] == len(out.prompt_ids) - 1


def sum_of(out: Any) -> float:
    return float(sum(seconds for key, seconds in out.report["timings"].items() if key != "load_s"))


def plain(report: dict[str, Any]) -> str:
    """The breakdown as words."""
    screen = Console(file=io.StringIO(), width=200)
    screen.print(breakdown(report))
    return screen.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_breakdown_shows_it(path: Path, dense: LLM) -> None:
    with open_llm(path, "truncate:rate=0.25") as llm:
        table = plain(llm.chat(ASKED, SHORT)[0].report)
    assert "shortening the prompt" in table and f"kept {round(len(DOCUMENT) / 4):,} of {len(DOCUMENT):,}" in table
    assert "shortening" not in plain(dense.chat(ASKED, SHORT)[0].report)


@pytest.mark.parametrize("method", METHODS)
def test_rate_one_is_dense(path: Path, dense: LLM, method: str) -> None:
    with open_llm(path, f"{method}:rate=1") as llm:
        out, want = llm.chat(ASKED, SHORT)[0], dense.chat(ASKED, SHORT)[0]
    assert (out.prompt_ids, out.token_ids) == (want.prompt_ids, want.token_ids)


def test_a_question_alone_and_ids_are_left_as_they_are(path: Path) -> None:
    with open_llm(path, "llmlingua") as llm:
        for out in llm.generate(["just a question", [1, 2, 3]], SHORT):
            (facts,) = out.report["methods"]
            assert not facts["used"] and "nothing to shorten" in facts["why"] and out.report["timings"]["edit_s"] == 0
        raw = llm.generate(as_parts(DOCUMENT, QUESTION), SHORT)[0]
        assert raw.report["methods"][0]["kept"] == (len(DOCUMENT) + 1) // 2


def test_a_prompt_that_fits_only_when_shortened_is_answered(path: Path, dense: LLM) -> None:
    long = [{"role": "user", "content": as_parts(DOCUMENT * 2, QUESTION)}]
    with pytest.raises(UserError, match="1499"):
        dense.chat(long, SHORT)
    with open_llm(path, "llmlingua:target_token=900") as llm:
        assert llm.chat(long, SHORT)[0].report["methods"][0]["kept"] == 900


def test_all_answers_to_one_prompt_share_one_edit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = []
    with open_llm(path, "llmlingua") as llm:
        edit = llm.answers.editing.edit
        monkeypatch.setattr(llm.answers.editing, "edit", lambda *given: edits.append(1) or edit(*given))
        first, second = llm.chat(ASKED, SamplingParams(max_tokens=2, n=2, temperature=1.0, ignore_eos=True))
    assert first.prompt_ids == second.prompt_ids and len(edits) == 1
    assert [out.report["methods"][0]["kept"] for out in (first, second)] == [(len(DOCUMENT) + 1) // 2] * 2


def test_documents_are_shortened_once_and_carry_it(path: Path, tmp_path: Path, dense: LLM) -> None:
    file = tmp_path / "doc"
    with open_llm(path, "llmlingua") as llm:
        document = llm.prefill(DOCUMENT)
        assert document.report["methods"][0]["kept"] == (len(DOCUMENT) + 1) // 2
        out = document.ask(QUESTION, SHORT)
        assert out.prompt_ids[: len(document.token_ids)] == document.token_ids
        assert out.report["cached_tokens"] == len(document.token_ids) and not out.report["methods"][0]["used"]
        assert out.token_ids == dense.generate([out.prompt_ids], SHORT)[0].token_ids
        document.save(file)
        assert llm.load_document(file).ask(QUESTION, SHORT).token_ids == out.token_ids
    with pytest.raises(UserError, match="llmlingua"):
        dense.load_document(file)
    with open_llm(path, "bm25") as llm, pytest.raises(UserError, match="bm25 ranks by a question"):
        llm.prefill(DOCUMENT)


def timed(file: Path, llm: LLM, shorten: float) -> str:
    """A setting with times that were not measured: a token of prompt takes 1 s, shortening one `shorten`."""
    machine = machine_name(llm.options)
    values = {"machine": machine, "prefill": [0, 1, 0], "step": [0, 0], "shorten": [0, shorten, 0, 0]}
    settings = {"layers": "6", "segment": 200}
    write(file, Calibration("llmlingua", llm.engine.limits.model_digest, settings, {}, values))
    return f"llmlingua:when=pays,calibration={file}"


def test_where_shortening_would_take_longer_the_run_is_dense_and_says_why(
    path: Path, dense: LLM, tmp_path: Path
) -> None:
    with open_llm(path, timed(tmp_path / "slow", dense, 2.0)) as llm:
        out, want = llm.chat(ASKED, SHORT)[0], dense.chat(ASKED, SHORT)[0]
        assert llm.prefill(DOCUMENT).token_ids == dense.prefill(DOCUMENT).token_ids
    assert (out.prompt_ids, out.token_ids, out.report["exact"]) == (want.prompt_ids, want.token_ids, True)
    (facts,) = out.report["methods"]
    assert not facts["used"] and "doesn't pay" in facts["why"] and "it never does on this model" in facts["why"]
    assert "doesn't pay" in plain(out.report)
    with open_llm(path, timed(tmp_path / "fast", dense, 0.1)) as llm:
        assert llm.chat(ASKED, SHORT)[0].report["methods"][0]["kept"] == (len(DOCUMENT) + 1) // 2


def test_what_the_prefix_cache_holds_is_not_shortened(path: Path, dense: LLM, tmp_path: Path) -> None:
    with open_llm(path, timed(tmp_path / "fast", dense, 0.1)) as llm:
        ids = llm.encode_chat(ASKED)
        llm.generate([ids], SHORT)
        out = llm.chat(ASKED, SHORT)[0]
    (facts,) = out.report["methods"]
    assert not facts["used"] and "tokens being known" in facts["why"]
    assert out.prompt_ids == ids and out.report["cached_tokens"] == len(ids) - 1


def test_the_answer_counts_too(path: Path, dense: LLM, tmp_path: Path) -> None:
    """A shorter context makes each generated token cheaper: enough of them pay for what the prompt alone doesn't."""
    method = timed(tmp_path / "file", dense, 0.5)
    found = json.loads((tmp_path / "file").read_text())
    (tmp_path / "file").write_text(json.dumps(found | {"values": found["values"] | {"step": [0, 0.1]}}))
    with open_llm(path, method) as llm:
        used = [
            llm.chat(ASKED, SamplingParams(max_tokens=n, ignore_eos=True))[0].report["methods"][0]["used"]
            for n in (8, 1)  # the other way round its cells would be known
        ]
    assert used == [True, False]


def test_a_calibration_is_made_and_used(path: Path, dense: LLM, tmp_path: Path) -> None:
    with LLM(path, precision="f32", max_model_len=1500) as llm:
        made = calibrate(llm, Method("llmlingua", length=512), tmp_path / "file")
        assert llm.engine.pool.reserved == 0
    assert len(made.values["prefill"]) == 3 and len(made.values["shorten"]) == 4
    assert made.values["machine"] == machine_name(dense.options)
    with open_llm(path, f"llmlingua:when=pays,calibration={tmp_path / 'file'}") as llm:
        (facts,) = llm.chat(ASKED, SHORT)[0].report["methods"]
    assert facts["used"] or "doesn't pay" in facts["why"]
    with pytest.raises(UserError, match="has room for 1491"):
        calibrate(dense, Method("llmlingua"))


class Broken(PromptEditor):
    """Fails, or takes what it may not."""

    def __init__(self, edit: Any) -> None:
        self.made = edit

    def edit(self, req: Any, score: Any) -> PromptEdit:
        if isinstance(self.made, Exception):
            raise self.made
        edit: PromptEdit = self.made(list(req.ids))
        return edit


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (RuntimeError("out of\npaper"), "RuntimeError: out of paper"),
        (lambda ids: PromptEdit(ids[1:], range(1, len(ids)), []), "protected tokens are gone"),
        (lambda ids: PromptEdit(ids[::-1], range(len(ids)), []), "the ids are not those that keep_map names"),
        (lambda ids: PromptEdit(ids, [0, *range(len(ids) - 1)], []), "keep_map is not ascending"),
    ],
)
def test_an_editor_that_fails_costs_its_request_nothing_and_is_told(
    path: Path, dense: LLM, edit: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_llm(path, "truncate") as llm:
        object.__setattr__(llm.engine.parts[0], "impl", Broken(edit))
        out = llm.chat(ASKED, SHORT)[0]
        assert llm.answers.editing.num_failed == 1
    assert out.prompt_ids == dense.encode_chat(ASKED) and out.token_ids == dense.chat(ASKED, SHORT)[0].token_ids
    assert not out.report["methods"][0]["used"] and why in out.report["methods"][0]["why"] and why in caplog.text


def test_a_cancelled_task_stops_the_edit_and_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, ended = threading.Event(), threading.Event()
    edit = Editing.edit

    def slow(self: Editing, prompt: Any, check: Any) -> Any:
        def waits() -> None:
            began.set()
            threading.Event().wait(0.01)
            check()

        try:
            while began.is_set() is False or not ended.is_set():
                edit(self, prompt, waits)
        finally:
            ended.set()

    monkeypatch.setattr(Editing, "edit", slow)

    async def leave() -> None:
        async with AsyncLLM(path, precision="f32", method=["llmlingua"]) as llm:
            task = asyncio.create_task(llm.add(ASKED, SHORT))
            await asyncio.to_thread(began.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(ended.wait, 10)
            assert not llm.llm.engine.has_work
            monkeypatch.setattr(Editing, "edit", edit)
            chunks = [chunk async for chunk in llm.stream(await llm.add(ASKED, SHORT))]
            assert chunks[-1].completion is not None and chunks[-1].completion.report["methods"][0]["used"]

    asyncio.run(leave())


def test_closing_ends_an_edit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_llm(path, "llmlingua") as llm:
        nll, calls = ModelScorer.nll, []

        def closes(self: ModelScorer, *given: Any, **named: Any) -> list[float]:
            calls.append(given)
            llm.close()
            return nll(self, *given, **named)

        monkeypatch.setattr(ModelScorer, "nll", closes)
        with pytest.raises(UserError, match="this LLM was closed"):
            llm.chat(ASKED, SHORT)
        assert len(calls) == 1


def test_the_whole_models_surprise_is_that_of_prompt_logprobs(dense: LLM) -> None:
    ids = dense.encode_chat(ASKED)[:700]
    places = dense.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    assert places is not None
    want = [0.0, *(-place[token].logprob for token, place in zip(ids[1:], places[1:]) if place is not None)]
    found = ModelScorer(dense.engine.machine.model).nll(ids)
    assert torch.allclose(torch.tensor(found), torch.tensor(want), atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_scorer_remembers_what_calls_have_in_common_and_nothing_else(family: str) -> None:
    model = tiny_model(num_layers=3, family=family)
    dice = torch.Generator().manual_seed(0)
    scorers, before = {layers: ModelScorer(model) for layers in (None, 2)}, []
    for first, thinned in ((0, 1), (90, 1), (30, 1), (260, 2), (200, 1), (300, 3)):
        start = before[:first:thinned]
        ids = start + torch.randint(320, (300,), generator=dice).tolist()
        for layers, scorer in scorers.items():
            fresh = ModelScorer(model).nll(ids, layers=layers)[len(start) :]
            assert scorer.nll(ids, first=len(start), layers=layers) == pytest.approx(fresh, abs=1e-4)
        before = ids
    assert ModelScorer(model).nll(ids) != pytest.approx(ModelScorer(model).nll(ids, layers=2), abs=1e-2)
    assert scorers[2].nll([5]) == [0.0] and scorers[2].nll([5, 6], first=2) == []
    changed = scorers[None].nll(ids, layers=2)
    assert changed == pytest.approx(ModelScorer(model).nll(ids, layers=2), abs=1e-4)


def test_among_some_tokens_their_chances_sum_to_one() -> None:
    model = tiny_model()
    ids, among = [3, 8, 8, 5, 3], [3, 5, 8]
    base = [1, 2, 3, 4]
    total = sum(torch.tensor(-ModelScorer(model).nll([*base, token], first=4, among=among)[0]).exp() for token in among)
    assert float(total) == pytest.approx(1.0, abs=1e-4)
    assert all(a <= b for a, b in zip(ModelScorer(model).nll(ids, among=among), ModelScorer(model).nll(ids)))
