"""The log alone makes every plan again; a fold or a policy that knows more, or less, is found out."""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from mixes import NAMES, Mix, mixes
from typer.testing import CliRunner

from firstlight.cli.simulate import simulate
from firstlight.core.errors import UserError
from firstlight.core.schedule import Account, Admitted, Arrival, Event, Plan, UnitDone, UnitYielded, event_from_json
from firstlight.core.view import View, ViewConfig, _Fold
from firstlight.engine.eventlog import EventLog, canonical, read_log
from firstlight.engine.replay import Replay, replay
from firstlight.schedule.flowprefill import FlowPrefillConfig
from firstlight.schedule.sarathi import Sarathi, SarathiConfig
from firstlight.simulate.executor import SimRequest, run


def write(mix: Mix, path: Path, policy=None) -> None:
    with EventLog(path, mix.config) as log:
        run(policy or mix.policy(), mix.executor(), log)


@pytest.fixture
def busy(tmp_path: Path) -> tuple[Mix, Path]:
    """A mix in which admission, growth, preemption and a long unit all happen."""
    config = ViewConfig(2, 4, 4 * 12, 3, 512, schedule={"name": "sarathi", "settings": {"token_budget": 64}})
    requests = (
        SimRequest("a", 0.0, 500, 100),
        SimRequest("b", 0.01, 60, 150),
        SimRequest("c", 0.02, 90, 120, cancel_at=0.3),
        SimRequest("d", 0.03, 300, 10, n_hit=100, priority=-1),
    )
    mix = Mix(config, SarathiConfig(token_budget=64), requests)
    write(mix, tmp_path / "busy.log")
    return mix, tmp_path / "busy.log"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200)
@given(data=st.data())
def test_the_log_alone(name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    mix = data.draw(mixes(max_requests=6, max_output=20, schedule=name))
    path = tmp_path_factory.getbasetemp() / "mix.log"
    write(mix, path)
    found = replay(path, lambda config: replace(mix, config=config).policy())
    assert found.difference is None and found.steps == len(read_log(path)[1]) >= 1


BREAKS = {
    "free_blocks": lambda fold, event: {"free_blocks": fold.free_blocks} if isinstance(event, Account) else {},
    "grow": lambda fold, event: {"grow": {}} if isinstance(event, UnitDone) else {},
    "dur": lambda fold, event: {"dur": 0.0} if isinstance(event, UnitDone) else {},
    "priority": lambda fold, event: {"priority": 0} if isinstance(event, Arrival) else {},
    "n_cached": lambda fold, event: {"n_cached": 0} if isinstance(event, Admitted) else {},
}


@pytest.mark.parametrize("fact", BREAKS)
def test_a_fold_that_loses_a_fact_is_found(busy: tuple[Mix, Path], monkeypatch: pytest.MonkeyPatch, fact: str) -> None:
    mix, path = busy
    whole = _Fold.event
    monkeypatch.setattr(_Fold, "event", lambda self, event: whole(self, replace(event, **BREAKS[fact](self, event))))
    assert replay(path, lambda config: Sarathi(mix.schedule, config)).difference is not None


@pytest.mark.parametrize(
    ("fact", "kind", "lost"),
    [("ttft_slo_s", Arrival, None), ("n_uncached", Arrival, 0), ("dur", UnitDone, 1.0), ("dur", UnitYielded, 9.0)],
)
def test_what_flowprefill_reads_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fact: str, kind: type, lost: Any
) -> None:
    requests = [SimRequest(f"r{i}", i / 10, 3000 - 400 * i, 3, ttft_slo_s=(None, 0.4)[i % 2]) for i in range(6)]
    mix = Mix(ViewConfig(2, 4, 4 * 400, 8, 512), FlowPrefillConfig(), tuple(requests))
    write(mix, tmp_path / "flow.log")
    assert replay(tmp_path / "flow.log", lambda config: mix.policy()).difference is None
    whole = View.after

    def forgets(view: View, now: float, events: Sequence[Event]) -> View:
        return whole(view, now, [replace(e, **{fact: lost}) if isinstance(e, kind) else e for e in events])

    monkeypatch.setattr(View, "after", forgets)
    assert replay(tmp_path / "flow.log", lambda config: mix.policy()).difference is not None


def test_a_policy_with_a_clock_or_a_memory_is_found(busy: tuple[Mix, Path], tmp_path: Path) -> None:
    mix, _ = busy
    calls = iter(range(10**6))

    class Clocked(Sarathi):
        def step(self, now, events, view):
            plan = super().step(now, events, view)
            return Plan(submit=plan.submit, admit=plan.admit, memo={"tick": next(calls)})

    calm = Mix(mix.config, mix.schedule, (SimRequest("a", 0.0, 100, 5),))
    write(calm, tmp_path / "clock.log", Clocked(mix.schedule, mix.config))
    found = replay(tmp_path / "clock.log", lambda config: Clocked(mix.schedule, config))
    assert found.difference is not None and found.difference.step == 1
    assert '"tick":0' in found.difference.logged and str(found.difference).startswith("step 1 differs")


def test_another_setting_is_a_difference_and_an_exception_too(busy: tuple[Mix, Path]) -> None:
    mix, path = busy
    found = replay(path, lambda config: Sarathi(SarathiConfig(token_budget=65), config))
    assert isinstance(found, Replay) and found.difference is not None

    class Raising(Sarathi):
        def step(self, now, events, view):
            raise KeyError("x")

    found = replay(path, lambda config: Raising(mix.schedule, config))
    assert found.difference is not None and "KeyError" in found.difference.replayed


def refused(path: Path, saying: str) -> None:
    with pytest.raises(UserError, match=saying):
        replay(path, lambda config: Sarathi(SarathiConfig(), config))


def test_logs_that_cannot_be_trusted_are_refused(busy: tuple[Mix, Path], tmp_path: Path) -> None:
    whole = busy[1].read_bytes()
    lines = whole.splitlines(keepends=True)
    cases = {
        b"".join(lines[:-1]): "no end line",
        whole[: len(whole) // 2]: "no end line",
        whole[:-1]: "no end line",
        whole.replace(b'"uid":3', b'"uid":4', 1): "was changed",
        b"".join([lines[0], *lines[2:]]): "was changed",
        whole.replace(b'"version":1', b'"version":2', 1): "version 2",
        b"": "no event log",
        b"\xff\x00 nonsense\n": "no event log",
        b"[]\n": "no event log",
        sealed(b'{"config":{},"version":1}\n'): "no event log",
        sealed(lines[0] + b'{"events":[{"type":"Plan"}],"now":0.0,"plan":{}}\n'): "no event log",
    }
    for body, saying in cases.items():
        (tmp_path / "bad.log").write_bytes(body)
        refused(tmp_path / "bad.log", saying)
    refused(tmp_path / "none.log", "can't read")
    with pytest.raises(UserError, match="can't write"):
        EventLog(tmp_path / "none" / "x.log", busy[0].config)


def sealed(body: bytes) -> bytes:
    end = {"end": {"sha256": hashlib.sha256(body).hexdigest(), "steps": 1}}
    return body + canonical(end).encode() + b"\n"


def test_a_crash_leaves_whole_lines_and_no_end(busy: tuple[Mix, Path], tmp_path: Path) -> None:
    path = tmp_path / "crash.log"
    with pytest.raises(KeyboardInterrupt), EventLog(path, busy[0].config) as log:
        log.step(0.0, (), Plan())
        assert [json.loads(line) for line in path.read_text().splitlines()][1]["now"] == 0.0
        raise KeyboardInterrupt
    refused(path, "no end line")


@settings(max_examples=50)
@given(st.one_of([st.from_type(event) for event in typing.get_args(Event)]))
def test_events_survive_json(event: Event) -> None:
    again = event_from_json(json.loads(canonical(event)))
    assert type(again) is type(event) and canonical(again) == canonical(event)
    assert all(type(getattr(again, f.name)) is type(getattr(event, f.name)) for f in fields(event))


def test_command_line(busy: tuple[Mix, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(simulate)
    same = CliRunner().invoke(app, ["--replay", str(busy[1])])
    assert same.exit_code == 0 and "all plans identical" in same.output and same.output.count("\n") == 1
    monkeypatch.setattr(Sarathi, "_generated", lambda *_: None)
    other = CliRunner().invoke(app, ["--replay", str(busy[1])])
    assert other.exit_code == 1 and "differs" in other.output
