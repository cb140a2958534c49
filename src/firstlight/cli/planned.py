"""Verbs and flags that the design has and this version has not: whoever tries one hears so, and what there is instead.

Looked at only when typer knows no such verb or flag, so a line here goes out of force when its thing is built.
"""

from __future__ import annotations

import re

_PLANNED = {
    "serve": "use `firstlight run`, or firstlight.LLM from Python",
    "plan": "`firstlight bench ttft` measures what it would predict",
    "bench serve": "choose ttft, decode, throughput, kernel or peak",
    "--quality": "name a method of `firstlight methods list` with --method",
}
_REFUSED = re.compile(r"No such (?:command '|option: )([\w-]+)")


def not_built(refusal: str, path: str) -> str | None:
    """What to say instead of typer's refusal in a command (`firstlight bench`) if what it misses is only planned."""
    found = _REFUSED.match(refusal)
    if found is None:
        return None
    name = found[1] if found[1].startswith("-") else f"{path} {found[1]}".removeprefix("firstlight ")
    return f"{name} is not built yet; {_PLANNED[name]}" if name in _PLANNED else None
