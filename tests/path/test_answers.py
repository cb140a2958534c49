"""Answers of a tiny model under all sampling parameters: what ends and what can't touch them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from firstlight.core.request import Request, SamplingParams, TokenOutput
from firstlight.decode.logprobs import watch_prompt
from firstlight.decode.structured import Grammars
from firstlight.engine.engine import Engine
from firstlight.engine.live import LiveRequest
from tests.tiny import VOCABULARY, tiny_engine

COLUMN = 2 * 2 * 2 * 64 * 16 * 4
END = frozenset({VOCABULARY - 1})
PROMPT = [(i * 37) % 300 for i in range(150)]


class Letters:
    """Token i is the letter i modulo 26; the last of them comes only with the next."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, ids: Sequence[int]) -> str:
        text = self._held + "".join(letter(i) for i in ids)
        self._held = text[-1:]
        return text[:-1]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def letter(token: int) -> str:
    return chr(97 + token % 26)


def ask(rid: str, ids: list[int], after: str | None = None, structure: Any = None, **params: Any) -> Request:
    sampling = SamplingParams(**({"max_tokens": 20} | params))
    return Request(rid, ids, sampling, eos_ids=END, text=Letters(), structure=structure, after=after)


def run(engine: Engine, *requests: Request) -> tuple[list[LiveRequest], dict[str, list[TokenOutput]]]:
    got: dict[str, list[TokenOutput]] = {request.rid: [] for request in requests}
    lives = [engine.add(request) for request in requests]
    while engine.has_work:
        for output in engine.step():
            got[output.rid].append(output)
        engine.pool.check()
    assert engine.pool.used == 0
    return lives, got


def text_of(outputs: list[TokenOutput]) -> str:
    return "".join(output.text for output in outputs)


def ids_of(outputs: list[TokenOutput]) -> list[int]:
    return [i for output in outputs for i in output.new_ids]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine(deterministic=True)


@pytest.fixture(scope="module")
def plain(engine: Engine) -> list[int]:
    """The greedy answer."""
    return ids_of(run(engine, ask("plain", PROMPT, ignore_eos=True))[1]["plain"])


def test_identity_values_change_nothing(engine: Engine, plain: list[int]) -> None:
    identities = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    identities |= {
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "stop": [],
        "stop_token_ids": [],
        "min_tokens": 0,
        "n": 1,
    }
    for key, value in identities.items():
        _, got = run(engine, ask("r", PROMPT, ignore_eos=True, **{key: value}))
        assert ids_of(got["r"]) == plain


def test_a_stop_string_ends_it_and_never_shows(engine: Engine, plain: list[int]) -> None:
    whole = "".join(map(letter, plain))
    for start, length in ((0, 1), (3, 2), (5, 7), (18, 2)):
        stop = whole[start : start + length]
        lives, got = run(engine, ask("r", PROMPT, ignore_eos=True, stop=["zq!", stop]))
        want = whole[: whole.index(stop)]
        shown = [output.text for output in got["r"]]
        assert "".join(shown) == want and all(want.startswith("".join(shown[:i])) for i in range(len(shown)))
        assert lives[0].finish_reason == "stop" and lives[0].decoding.stop_reason == stop
    _, got = run(engine, ask("r", PROMPT, ignore_eos=True, stop=[whole + "x"]))
    assert text_of(got["r"]) == whole, "what was held back and never became a stop is shown at the end"


def test_stop_tokens_and_end_tokens(engine: Engine, plain: list[int]) -> None:
    at = next(i for i in range(5, 20) if plain[i] not in plain[:i])
    lives, got = run(engine, ask("r", PROMPT, ignore_eos=True, stop_token_ids=[plain[at]]))
    assert ids_of(got["r"]) == plain[: at + 1] and lives[0].decoding.stop_reason == plain[at]
    assert text_of(got["r"]) == "".join(map(letter, plain[:at])), "the token that ended it is no text"
    _, late = run(engine, ask("r", PROMPT, ignore_eos=True, stop_token_ids=[plain[at]], min_tokens=at + 3))
    assert ids_of(late["r"])[:at] == plain[:at] and len(ids_of(late["r"])) >= at + 3
    lives, got = run(engine, ask("r", PROMPT, logit_bias={VOCABULARY - 1: 100}, min_tokens=4))
    assert ids_of(got["r"])[4:] == [VOCABULARY - 1] and lives[0].finish_reason == "stop"
    assert lives[0].decoding.stop_reason is None
    lives, _ = run(engine, ask("r", PROMPT, logit_bias={VOCABULARY - 1: 100}, ignore_eos=True))
    assert lives[0].finish_reason == "length" and lives[0].num_generated == 20


def test_a_cancelled_answer_shows_what_was_certain(engine: Engine, plain: list[int]) -> None:
    whole = "".join(map(letter, plain))
    engine.add(ask("r", PROMPT, ignore_eos=True, stop=[whole + "x"]))
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += engine.step()
        if sum(len(o.new_ids) for o in outputs) == 5:
            engine.cancel("r")
    assert outputs[-1].finish_reason == "cancelled" and text_of(outputs) == whole[:5]


def test_nothing_disturbs_an_answer() -> None:
    """Company, preemption by recompute, chunks, cache: the same tokens, texts and log-probabilities, bit for bit."""
    grammars = Grammars(lambda token: letter(token).encode(), VOCABULARY - 1, VOCABULARY, END)
    rng = random.Random(4)
    prompts = [[rng.randrange(300) for _ in range(60)] for _ in range(4)]
    asked: list[dict[str, Any]] = [
        {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.3, "logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 1.5, "top_p": 0.9, "frequency_penalty": 0.4, "presence_penalty": 0.2, "min_tokens": 70},
        {"temperature": 1.0, "min_p": 0.01, "stop": ["zzz", "qx"], "logit_bias": {5: 2.0}, "ignore_eos": True},
        {"temperature": 1.0, "regex": "([a-f]{3}z){12,}", "seed": 9},
    ]

    def answers(columns: int, together: bool) -> tuple[list[Any], int]:
        engine = tiny_engine(kv_memory=str(columns * COLUMN), deterministic=True)
        requests, prompt_rows = [], []
        for i, params in enumerate(asked):
            request = ask(f"r{i}", prompts[i], max_tokens=75, **params)
            request.structure = grammars.structure(request.sampling)
            prompt_rows.append(watch_prompt(request))
            requests.append(request)
        lives, got = [], {}
        for batch in [requests] if together else [[request] for request in requests]:
            some, outputs = run(engine, *batch)
            lives, got = lives + some, got | outputs
        results = [
            (ids_of(got[live.rid]), text_of(got[live.rid]), live.finish_reason, live.decoding.logprobs, rows)
            for live, rows in zip(lives, prompt_rows)
        ]
        return results, sum(live.num_preempted for live in lives)

    alone, none = answers(40, together=False)
    scarce, some = answers(6, together=True)
    assert none == 0 < some
    assert alone == scarce
    text = alone[3][1]
    assert all(text[i : i + 4][-1:] in ("z", "") for i in range(0, len(text) - 4, 4)) and set(text) <= set("abcdefz")


@pytest.mark.parametrize("chunk", [16, 512])
def test_prompt_logprobs_are_those_of_the_logits(chunk: int) -> None:
    """Every place, though the prompt is cached and comes in chunks; no block of rows is larger than the head's."""
    engine = tiny_engine(deterministic=True, schedule=f"sarathi:token_budget={chunk},lift=false")
    rows: dict[int, Any] = {}
    plain = Request("l", PROMPT, SamplingParams(max_tokens=1), logits_at="all")
    plain.logits_sink = lambda tok, logits: rows.update(zip(tok.tolist(), logits.clone()))
    run_one = ask("again", PROMPT, max_tokens=1, prompt_logprobs=2)
    watched = watch_prompt(run_one)
    assert watched is not None
    engine.add(plain)
    while engine.has_work:
        engine.step()
    lives, _ = run(engine, run_one)
    assert lives[0].n_cached == 0 and lives[0].held == len(PROMPT), "rows are computed, cells are not written again"
    assert watched[0] is None and len(watched) == len(PROMPT)
    for place in range(1, len(PROMPT)):
        logprobs = rows[place - 1].double().log_softmax(-1)
        entry = watched[place]
        assert entry is not None and next(iter(entry)) == PROMPT[place] and len(entry) in (2, 3)
        for token, found in entry.items():
            assert abs(found.logprob - float(logprobs[token])) < 1e-4
            assert found.rank == 1 + int((rows[place - 1] > rows[place - 1][token]).sum())


def test_answers_to_one_prompt_compute_it_once(engine: Engine) -> None:
    ids = [(i * 31 + 7) % 300 for i in range(200)]
    first, *others = [ask(f"n{i}", ids, after="n0" if i else None, temperature=1.0, seed=i) for i in range(4)]
    lives, got = run(engine, first, *others)
    assert [live.n_cached for live in lives] == [0, 192, 192, 192]
    assert len({tuple(ids_of(outputs)) for outputs in got.values()}) == 4
    for i, request in enumerate([first, *others]):
        _, alone = run(engine, ask("x", ids, temperature=1.0, seed=i))
        assert ids_of(alone["x"]) == ids_of(got[request.rid])


def test_who_waits_for_a_prompt_is_never_left_behind(engine: Engine) -> None:
    """The first is cancelled at once, in the middle, or is unknown; a waiting one is cancelled itself."""
    ids = [(i * 41) % 300 for i in range(300)]
    for leave_at in range(4):
        engine.add(ask("a", ids))
        engine.add(ask("b", ids, after="a"))
        engine.add(ask("c", ids, after="a"))
        ends: dict[str, Any] = {}
        for step in range(1000):
            if step == leave_at:
                engine.cancel("a")
                engine.cancel("c")
            ends |= {o.rid: o.finish_reason for o in engine.step() if o.finish_reason}
            if not engine.has_work:
                break
        assert ends["a"] == ends["c"] == "cancelled" and ends["b"] in ("length", "stop")
        assert engine.cache is not None
        engine.cache.evict(1000)
    lives, _ = run(engine, ask("d", ids, after="nobody"))
    assert lives[0].num_generated == 20
    apart = tiny_engine(prefix_cache="off")
    lives, _ = run(apart, ask("e", ids), ask("f", ids, after="e"))
    assert [live.n_cached for live in lives] == [0, 0]


def test_a_seed_is_the_whole_of_chance(engine: Engine) -> None:
    _, got = run(engine, *[ask(f"s{i}", PROMPT, temperature=1.2, seed=7, ignore_eos=True) for i in range(3)])
    _, other = run(engine, ask("t", PROMPT, temperature=1.2, seed=8, ignore_eos=True))
    assert ids_of(got["s0"]) == ids_of(got["s1"]) == ids_of(got["s2"]) != ids_of(other["t"])
    _, unseeded = run(engine, *[ask(f"u{i}", PROMPT, temperature=1.2, ignore_eos=True) for i in range(2)])
    assert ids_of(unseeded["u0"]) != ids_of(unseeded["u1"])
