"""`sarathi` from prompt to token: many prompts in one unit, and ends inside the unit of another's last chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlight.core.request import Request, SamplingParams
from firstlight.core.schedule import UnitDone
from tests.path.method_runs import Seen, begin, finish, method_engine, prompt, run, same_bits

LENGTHS = [1 + 3 * i % 8 for i in range(40)] + [1500] + [1 + 5 * i % 13 for i in range(23)]
"""63 prompts of some tokens, and a long one among them."""
LONG = LENGTHS.index(1500)
EOS = 9


def packed(**others: list[int]) -> dict[str, Seen]:
    """All of them at once, whose rows fit one unit; `others` take the place of those of their names."""
    budget = {"schedule": "sarathi:token_budget=2048", "max_num_seqs": 64}
    engine = method_engine(layers=2, **budget)
    prompts = {f"r{i}": prompt(i, n) for i, n in enumerate(LENGTHS)} | others
    seen = {rid: begin(engine, ids, 3, rid) for rid, ids in prompts.items()}
    units: list[int] = []
    engine.on_stop = lambda work, stop: units.append(len(work.lives)) if not units else None
    finish(engine, *seen.values())
    assert units == [64], "one pass for all"
    return seen


def test_64_prompts_in_one_pass_are_as_each_alone() -> None:
    together, engine = packed(), method_engine(layers=2)
    for i, n in enumerate(LENGTHS):
        assert same_bits(together[f"r{i}"], run(engine, prompt(i, n), 3))


@pytest.mark.parametrize("changed", [0, LONG, 63])
def test_what_one_of_them_says_is_nothing_to_the_others(changed: int) -> None:
    name, length = f"r{changed}", LENGTHS[changed]
    before, after = packed(), packed(**{name: prompt(1000, length)})
    assert all(same_bits(after[rid], before[rid]) for rid in before.keys() - {name})
    assert not torch.equal(after[name].logits[length - 1], before[name].logits[length - 1])


@pytest.mark.parametrize("new", [1, 3])
def test_one_ends_in_the_unit_of_anothers_last_chunk(new: int) -> None:
    """With its end token; the other goes on as if it had been alone, or ends in the same unit too."""
    engine = method_engine(layers=2, schedule="sarathi:token_budget=64")
    done: list[UnitDone] = []
    decide = engine._decide

    def watched(events: list[Any]) -> None:
        done.extend(e for e in events if isinstance(e, UnitDone))
        decide(events)

    def ends(so_far: Sequence[int], _logits: Tensor) -> int:
        return EOS if len(so_far) == 3 else 1

    engine._decide = watched  # type: ignore[method-assign]
    sampling = SamplingParams(max_tokens=50)
    stream = engine.add(Request("stream", prompt(0, 20), sampling, eos_ids=frozenset({EOS}), choose=ends))
    while not stream.num_generated:
        engine.step()
    long = begin(engine, prompt(1, 3 * 63), new, "long")
    finish(engine, long)
    engine.step()  # the last news
    assert stream.finish_reason == "stop" and stream.num_generated == 4
    (last,) = [unit for unit in done if unit.sampled == {"stream": 1, "long": 1}]
    assert set(last.finished) == {"stream", *(["long"] if new == 1 else [])}
    assert same_bits(long, run(method_engine(layers=2), prompt(1, 3 * 63), new))
