"""One request alone in the engine, with its logits: how every quality figure looks into a run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from firstlight.core.parts import PromptIds
from firstlight.core.request import Chooser, LogitsSink, Request, SamplingParams
from firstlight.engine.editing import Editing
from firstlight.engine.engine import Engine
from firstlight.engine.report import report

_numbers = itertools.count()


@dataclass(frozen=True)
class Asked:
    """What came of a request: its generated ids, its report, and its TTFT in seconds without our looking on."""

    token_ids: list[int]
    report: dict[str, Any]
    ttft_s: float

    def facts(self) -> dict[str, Any]:
        """What every record holds of a run."""
        told, cells = self.report, self.report["cells"]
        size = {"prompt_tokens": told["prompt_tokens"], "computed": cells["computed"] / cells["total"]}
        return {"ttft_s": self.ttft_s, "density": told["attention"]["density"], **size, "methods": told["methods"]}


def ask(
    engine: Engine,
    prompt: PromptIds,
    choose: Chooser,
    num_tokens: int,
    logits_at: Sequence[int] = (),
    sink: LogitsSink = lambda tok, logits: None,
) -> Asked:
    """Prefill a prompt and generate exactly `num_tokens` as `choose` says; the prompt rows `logits_at` go to `sink`.

    A method that edits prompts has edited it before; its time is part of TTFT.
    """
    looked_s = 0.0

    def timed(tok: Tensor, logits: Tensor) -> None:
        nonlocal looked_s
        began = time.perf_counter()
        sink(tok, logits)
        looked_s += time.perf_counter() - began

    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    edited = Editing(engine.parts, engine.machine.model).edit(prompt)
    request = Request(
        f"eval-{next(_numbers)}", edited.ids, sampling, logits_at=logits_at, logits_sink=timed, choose=choose
    )
    live = engine.add(request)
    while engine.is_live(request.rid):
        engine.step()
    facts = report(live, engine.parts)
    edited.tell(facts)
    return Asked(live.ids[live.num_prompt :], facts, facts["ttft_s"] - looked_s)


def likeliest(generated: Sequence[int], logits: Tensor) -> int:
    """The greedy chooser."""
    return int(logits.argmax())
