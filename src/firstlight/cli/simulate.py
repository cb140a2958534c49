"""`firstlight simulate`: what the schedule does, without a model. For now it replays the event log of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firstlight.core.registry import Method, make_schedule
from firstlight.core.schedule import Policy
from firstlight.core.view import ViewConfig
from firstlight.engine.replay import replay as run_replay


def simulate(
    replay: Annotated[Path, typer.Option(metavar="FILE", help="Event log to make every plan of again and compare.")],
) -> None:
    """Give a fresh schedule the events of a log alone: exit code 0 if it makes the same plans, else 1.

    A run writes its log with `--event-log FILE`.

    firstlight simulate --replay run.log
    """
    found = run_replay(replay, _policy)
    if found.difference is not None:
        typer.echo(found.difference)
        raise typer.Exit(1)
    typer.echo(f"{found.steps} steps, all plans identical")


def _policy(config: ViewConfig) -> Policy:
    """The schedule that the log names, with its settings."""
    schedule = config.schedule
    policy: Policy = make_schedule(Method(schedule.get("name", ""), **schedule.get("settings", {})), config)
    return policy
