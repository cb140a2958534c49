"""The Python API on the real model: what people do with it, and what it says when they do it wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firstlight.core.errors import UserError
from firstlight.core.request import SamplingParams
from firstlight.engine.work import Stop, Work
from firstlight.llm import LLM

SHORT = SamplingParams(max_tokens=6)
REPORT = {
    "schema_version model exact prompt_tokens cached_tokens completion_tokens text token_ids finish_reason ttft_s "
    "tpot_s timings cells attention kv methods settings"
}
KEYS = set(" ".join(REPORT).split())


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, max_model_len=2048, max_num_seqs=4) as made:
        yield made


def is_empty(llm: LLM) -> bool:
    llm.engine.pool.check()
    return not llm.engine.has_work and llm.engine.pool.used == 0 and llm.engine.pool.reserved == 0


def test_it_answers(llm: LLM) -> None:
    (out,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(max_tokens=20))
    assert out.text == "The capital of France is Paris." and out.finish_reason == "stop"
    assert set(out.report) >= KEYS and out.report["exact"] is True
    times = out.report["timings"]
    parts = sum(times[k] for k in ("tokenize_s", "queue_s", "reuse_s", "prefill_s", "sample_s"))
    assert abs(parts - out.report["ttft_s"]) < 1e-3 and times["load_s"] > 0
    cells = out.report["cells"]
    assert cells["total"] == 30 * out.report["prompt_tokens"]
    assert cells["computed"] + cells["reused"] + cells["parked"] + cells["absent"] == cells["total"]


def test_batches_equal_single_requests(llm: LLM) -> None:
    texts = ["The sea is", "Call me", "It is a truth universally acknowledged, that"]
    together = llm.generate(texts, SHORT)
    assert [o.token_ids for o in together] == [llm.generate(t, SHORT)[0].token_ids for t in texts]
    assert llm.generate([llm.encode(t) for t in texts], [SHORT] * 3)[1].token_ids == together[1].token_ids
    assert llm.generate(llm.encode(texts[0]), SHORT)[0].token_ids == together[0].token_ids
    assert is_empty(llm)


def test_streams_join_to_the_text_and_closing_cancels(llm: LLM) -> None:
    chunks = list(llm.stream("Once upon a time, 🙂 é", SamplingParams(max_tokens=20, temperature=0.9, seed=3)))
    last = chunks[-1].completion
    assert last is not None and "".join(c.text for c in chunks) == last.text
    assert [i for c in chunks for i in c.token_ids] == last.token_ids
    stream = llm.stream("Once upon a time", SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert is_empty(llm)


def test_two_streams_side_by_side(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    alone = {p: llm.generate(p, params)[0].text for p in ("The sea is", "Call me")}
    one, two = llm.stream("The sea is", params), llm.stream("Call me", params)
    got = {"The sea is": next(one).text, "Call me": next(two).text}
    got["The sea is"] += "".join(c.text for c in one)
    got["Call me"] += "".join(c.text for c in two)
    assert got == alone


def test_same_seed_same_tokens_whatever_else_runs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=11, ignore_eos=True)
    alone = llm.generate("Once", params)[0].token_ids
    among = llm.generate(["The sea", "Once", "Call me"], [SamplingParams(max_tokens=5), params, params])
    assert among[1].token_ids == alone != llm.generate("Once", SamplingParams(max_tokens=12, temperature=1.0, seed=12))


def test_n_answers_share_one_prompt(llm: LLM) -> None:
    prompt, params = list(range(400, 530)), SamplingParams(max_tokens=5, temperature=1.0, seed=3, n=3, ignore_eos=True)
    (first, second, third), last = llm.generate(prompt, params), llm.generate(prompt, replace(params, n=1, seed=5))[0]
    assert [o.index for o in (first, second, third)] == [0, 1, 2]
    assert [o.report["cached_tokens"] for o in (first, second, third)] == [0, 128, 128]
    assert second.token_ids != third.token_ids == last.token_ids, "answer 2 draws with seed + 2"
    assert second.report["ttft_s"] > first.report["ttft_s"], "they were asked for at the same time"
    chunks = list(llm.stream(prompt, params))
    assert [c.index for c in chunks] == sorted(c.index for c in chunks)
    for i, whole in enumerate((first, second, third)):
        assert "".join(c.text for c in chunks if c.index == i) == whole.text
    assert is_empty(llm)


def test_stops_and_logprobs_reach_the_reader(llm: LLM) -> None:
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(max_tokens=20, stop=[" is P", "zebra"], logprobs=2, prompt_logprobs=0)
    (out,) = llm.chat(ask, params)
    assert (out.text, out.finish_reason, out.stop_reason) == ("The capital of France", "stop", " is P")
    assert out.logprobs is not None and len(out.logprobs) == len(out.token_ids) == out.report["completion_tokens"]
    greedy = [min(place, key=lambda t: place[t].rank) for place in out.logprobs]
    assert greedy == out.token_ids and out.logprobs[0][out.token_ids[0]].decoded_token == "The"
    assert out.prompt_logprobs is not None and out.prompt_logprobs[0] is None
    assert [next(iter(place or [i])) for i, place in zip(out.prompt_ids, out.prompt_logprobs)] == out.prompt_ids
    assert json.loads(json.dumps(out.report))["logprobs"][0][str(out.token_ids[0])]["rank"] == 1
    shown = [chunk.text for chunk in llm.stream(ask, params)]
    assert "".join(shown) == out.text


def test_json_of_a_schema(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "people": {"type": "integer"}}}
    schema |= {"required": ["city", "people"]}
    ask = [{"role": "user", "content": "The capital of France, as JSON."}]
    plain = SamplingParams(max_tokens=9)
    (out, beside) = llm.chat([ask, ask], [SamplingParams(max_tokens=80, json_schema=schema), plain])
    assert set(json.loads(out.text)) == {"city", "people"} and out.finish_reason == "stop"
    assert beside.token_ids == llm.chat(ask, plain)[0].token_ids


def test_an_interrupt_leaves_an_engine_that_works(llm: LLM) -> None:
    with interrupted(llm, at=40):  # somewhere in the layers
        llm.generate([list(range(100, 900)), list(range(50, 500))], SHORT)
    assert is_empty(llm)
    assert llm.generate("The sea is", SHORT)[0].text


def test_an_interrupt_beside_a_stream_ends_both_or_one(llm: LLM) -> None:
    """A stream that shares the interrupted pass says so; it neither hangs nor goes on from half a row."""
    stream = llm.stream("Once upon a time", SamplingParams(max_tokens=30, ignore_eos=True))
    next(stream)
    with interrupted(llm, at=1):
        llm.generate([list(range(100, 900))], SHORT)
    last = list(stream)[-1].completion
    assert last is not None and last.finish_reason == "error"
    assert is_empty(llm)


@contextmanager
def interrupted(llm: LLM, at: int) -> Iterator[None]:
    """Ctrl-C at a pass's stop of that number."""
    stops = itertools.count(1)

    def interrupt(work: Work, stop: Stop) -> None:
        if next(stops) == at:
            raise KeyboardInterrupt

    engine = llm.engine
    before, engine.on_stop = (engine.on_stop, engine.patience_s), interrupt
    engine.patience_s = 0.0
    with pytest.raises(KeyboardInterrupt):
        yield
    engine.on_stop, engine.patience_s = before


def test_two_models_in_one_process(llm: LLM, smollm2_path: Path) -> None:
    """Each keeps its own settings, cells and answers, also when they take turns."""
    want = llm.generate("The sea is", SHORT)[0].token_ids
    with LLM(smollm2_path, max_model_len=512, max_num_seqs=1, method=["band:sink=1,window=2"]) as other:
        one, two = llm.stream("The sea is", SHORT), other.stream("The sea is", SHORT)
        pairs = list(zip(one, two))
    assert [i for chunk, _ in pairs for i in chunk.token_ids] == want
    ends = [chunk.completion for chunk in pairs[-1]]
    assert [end.report["exact"] for end in ends if end is not None] == [True, False]


def test_a_closed_model_says_so(smollm2_path: Path) -> None:
    llm = LLM(smollm2_path, max_model_len=512, max_num_seqs=1)
    stream = llm.stream("The sea is", SHORT)
    next(stream)
    llm.close()
    llm.close()
    for ask in (lambda: next(stream), lambda: llm.generate("The sea is", SHORT)):
        with pytest.raises(UserError, match="closed"):
            ask()
    assert llm.engine.pool.free == llm.engine.pool.total


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda llm: llm.generate(""), "empty"),
        (lambda llm: llm.generate([[]]), "empty"),
        (lambda llm: llm.generate("x", SamplingParams(stop_token_ids=[49152])), "token id 49152"),
        (lambda llm: llm.generate("x", SamplingParams(logit_bias={10**6: 1})), "token id 1000000"),
        (lambda llm: llm.generate("x", SamplingParams(regex="(")), "regex can't be used"),
        (lambda llm: llm.generate("x", SamplingParams(json_schema="{")), "json_schema is no JSON"),
        (lambda llm: llm.generate([5] * 3000), "3000 tokens.*2047"),
        (lambda llm: llm.generate([99999999]), "vocabulary"),
        (lambda llm: llm.generate(["a", "b"], [SHORT]), "2 prompts came with 1"),
        (lambda llm: SamplingParams(temperature=-1), "temperature=-1"),
    ],
)
def test_bad_requests_get_one_line(llm: LLM, call: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        call(llm)
    assert "\n" not in str(caught.value)
    assert is_empty(llm)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"no_such": 1}, "no_such"),
        ({"method": ["nope"]}, "nope.*band"),
        ({"method": ["band:depth=3"]}, "depth.*sink"),
        ({"method": ["band:sink=many"]}, "sink"),
        ({"schedule": "nope"}, "nope.*sarathi"),
        ({"precision": "int3"}, "int3"),
        ({"kv_memory": "1KiB"}, "needs.*available"),
        ({"kv_memory": "900GiB"}, "needs 900.*available"),
        ({"kv_memory": "lots"}, "lots"),
        ({"device": "toaster"}, "toaster"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
    ],
)
def test_bad_options_get_one_line(smollm2_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        LLM(smollm2_path, **options)
    assert "\n" not in str(caught.value)


def test_a_prompt_that_the_pool_can_never_hold_is_refused_with_both_figures(smollm2_path: Path) -> None:
    with LLM(smollm2_path, kv_memory="8MiB") as llm, pytest.raises(UserError, match=r"needs .*MiB.*has .*MiB"):
        llm.generate([5] * 2000)
