"""AsyncLLM: many tasks on one engine thread, and none of them can hold up the loop, the engine or another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firstlight import AsyncLLM, SamplingParams
from firstlight.core.errors import UserError
from firstlight.core.request import Completion
from tests.tiny import save_tiny_chat

SHORT = SamplingParams(max_tokens=5, ignore_eos=True)
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    made = AsyncLLM(
        save_tiny_chat(tmp_path_factory.mktemp("tiny")), precision="f32", deterministic=True, max_num_seqs=4
    )
    yield made
    asyncio.run(made.close())
    assert not made._thread.is_alive()


@pytest.fixture(autouse=True)
def leaves_nothing(model: AsyncLLM) -> Iterator[None]:
    yield
    until(lambda: not model.llm.engine.has_work)
    assert model.llm.answers._answers == {} and model._streams == {}
    model.llm.generate([1], SamplingParams(max_tokens=1))
    assert model.llm.engine.pool.used == 0
    model.llm.engine.pool.check()


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def answer(model: AsyncLLM, prompt: Any, params: SamplingParams = SHORT, **terms: Any) -> Completion:
    chunks = [chunk async for chunk in model.stream(await model.add(prompt, params, **terms))]
    assert [chunk.completion for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    end = chunks[-1].completion
    assert end is not None and end.token_ids == [i for chunk in chunks for i in chunk.token_ids]
    assert end.text == "".join(chunk.text for chunk in chunks)
    return end


def test_many_tasks_get_what_they_get_alone(model: AsyncLLM) -> None:
    prompts: list[Any] = [*([n, n + 1] for n in range(20)), "Once upon", HELLO]

    async def together() -> list[Completion]:
        return await asyncio.gather(*(answer(model, prompt) for prompt in prompts))

    got = [out.token_ids for out in asyncio.run(together())]
    want = [*model.llm.generate(prompts[:-1], SHORT), *model.llm.chat(HELLO, SHORT)]
    assert got == [out.token_ids for out in want]


def test_terms_reach_the_request(model: AsyncLLM) -> None:
    out = asyncio.run(answer(model, HELLO, priority=3, ttft_slo_s=2.0, template_kwargs={"style": "brief"}))
    assert (out.report["settings"]["priority"], out.report["settings"]["ttft_slo_s"]) == (3, 2.0)
    assert model.llm.tokenizer.decode(out.prompt_ids).endswith("(brief)")


def test_questions_about_a_document(model: AsyncLLM) -> None:
    async def ask() -> None:
        with await asyncio.to_thread(model.llm.prefill, "A long text. " * 10) as document:
            questions = [answer(model, f"Question {n}?", document=document) for n in range(5)]
            for out in await asyncio.gather(*questions):
                assert out.report["cached_tokens"] >= len(document.token_ids)

    asyncio.run(ask())


def test_several_answers_come_in_one_stream(model: AsyncLLM) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, n=3, temperature=1.0, seed=1)

    async def run() -> list[Completion]:
        found = [chunk.completion async for chunk in model.stream(await model.add("Once", params))]
        return sorted((end for end in found if end is not None), key=lambda end: end.index)

    got = asyncio.run(run())
    assert [out.token_ids for out in got] == [out.token_ids for out in model.llm.generate("Once", params)]


def test_an_abort_ends_the_stream_with_what_there_is(model: AsyncLLM) -> None:
    async def run() -> Completion | None:
        rid = await model.add("Once", LONG)
        chunks = []
        async for chunk in model.stream(rid):
            chunks.append(chunk)
            model.abort(rid)
            model.abort(rid)
        return chunks[-1].completion

    out = asyncio.run(run())
    assert out is not None and out.finish_reason == "cancelled" and 0 < len(out.token_ids) < 1500
    model.abort("nobody")


def test_a_cancelled_reader_aborts(model: AsyncLLM) -> None:
    async def run() -> None:
        tasks = [asyncio.create_task(answer(model, "Once", LONG)) for _ in range(6)]
        other = asyncio.create_task(answer(model, [1, 2]))
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in found)
        assert len((await other).token_ids) == 5

    asyncio.run(run())


def test_a_task_cancelled_while_it_adds_leaves_no_request(model: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go = threading.Event(), threading.Event()
    encode = model.llm.encode

    def slow(text: str) -> list[int]:
        began.set()
        go.wait(10)
        return encode(text)

    monkeypatch.setattr(model.llm.encoder, "text", slow)

    async def run() -> None:
        task = asyncio.create_task(model.add("Once", LONG))
        while not began.is_set():
            await asyncio.sleep(0.005)  # the loop is free while the text is tokenised
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()
        until_async = asyncio.get_running_loop().time() + 10
        while model.llm.answers._answers or model.llm.engine.has_work or not began.is_set():
            assert asyncio.get_running_loop().time() < until_async
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_the_loop_stays_free_in_a_prefill(model: AsyncLLM) -> None:
    """Also at its slowest slice: the engine gives the interpreter away inside operators and between them."""

    async def run() -> int:
        ticks, work = 0, asyncio.create_task(answer(model, [7 * n % 300 for n in range(1900)]))
        while not work.done():
            await asyncio.sleep(0.001)
            ticks += 1
        await work
        return ticks

    assert asyncio.run(run()) > 5


def test_a_loop_that_ended_disturbs_nobody(model: AsyncLLM) -> None:
    """Its task was never told to stop: the answer goes nowhere."""
    loop = asyncio.new_event_loop()
    rid = loop.run_until_complete(model.add("Once", SamplingParams(max_tokens=50, ignore_eos=True)))
    loop.close()
    assert len(asyncio.run(answer(model, [1, 2])).token_ids) == 5
    model._leave(model._streams[rid])


@pytest.mark.parametrize(
    ("prompt", "terms", "says"),
    [
        ("", {}, "the prompt is empty"),
        ([10**6], {}, "vocabulary"),
        ([5] * 3000, {}, "3000 tokens, the limit is 2047"),
        ("x", {"priority": "high"}, "priority='high'"),
        (HELLO, {"template_kwargs": {"messages": 1}}, "can't set messages"),
    ],
)
def test_bad_requests_get_one_line(model: AsyncLLM, prompt: Any, terms: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        asyncio.run(model.add(prompt, **terms))


def test_each_answer_is_read_once(model: AsyncLLM) -> None:
    async def run() -> None:
        rid = await model.add("Once", SHORT)
        first = model.stream(rid)
        await anext(first)
        for name in (rid, "nobody"):
            with pytest.raises(UserError, match="no unread answer"):
                await anext(model.stream(name))
        await first.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())


def test_a_failed_pass_ends_its_own_requests(model: AsyncLLM) -> None:
    fail = iter([True])

    def stop(*_: object) -> None:
        if next(fail, False):
            raise RuntimeError("a part that fails")

    before, model.llm.engine.on_stop = model.llm.engine.on_stop, stop
    try:
        assert asyncio.run(answer(model, "Once")).finish_reason == "error"
        assert asyncio.run(answer(model, "Once")).finish_reason == "length"
    finally:
        model.llm.engine.on_stop = before


def test_an_engine_that_can_not_go_on_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with AsyncLLM(save_tiny_chat(tmp_path), precision="f32") as broken:
            rid = await broken.add("Once", LONG)

            def fail() -> Any:
                raise RuntimeError("for good")

            monkeypatch.setattr(broken.llm.engine, "step", fail)
            with pytest.raises(UserError, match="closed before the answer"):
                async for _ in broken.stream(rid):
                    pass
            with pytest.raises(UserError, match="closed"):
                await broken.add("Once")

    asyncio.run(run())


def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    async def run() -> None:
        model = AsyncLLM(save_tiny_chat(tmp_path), precision="f32")
        readers = [asyncio.create_task(answer(model, "Once", LONG)) for _ in range(3)]
        await asyncio.sleep(0.2)
        await model.close()
        for found in await asyncio.gather(*readers, return_exceptions=True):
            cancelled = isinstance(found, Completion) and found.finish_reason == "cancelled"
            assert cancelled or (isinstance(found, UserError) and "closed" in str(found)), found
        with pytest.raises(UserError, match="closed"):
            await model.add("Once")
        assert not model._thread.is_alive() and model.llm.engine.pool.free == model.llm.engine.pool.total

    asyncio.run(run())
