"""A prompt through the editor that a method brings, before it is admitted: with its time, and whatever goes wrong.

Between the encoder and the engine, on the thread that asks. An editor that fails, or breaks its promise, costs its own
request nothing but time: the prompt is left as it was, and the report says why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from firstlight.core.errors import UserError
from firstlight.core.parts import PromptEdit, PromptIds
from firstlight.core.registry import Part
from firstlight.engine.scorer import ModelScorer
from firstlight.models.decoder import Decoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Edited:
    """The ids that are admitted, the seconds that editing took, and what the report says of the editor."""

    ids: list[int]
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    def tell(self, report: dict[str, Any]) -> None:
        """Put it into a request's report, whose clock began after it."""
        report["ttft_s"] += self.seconds
        report["exact"] &= not self.notes.get("used", False)
        report["timings"] = {"edit_s": self.seconds} | report["timings"]
        for facts in report["methods"]:
            facts |= self.notes if facts["seam"] == "prompt" else {}


class Editing:
    """The prompt editor among an engine's parts, if there is one."""

    def __init__(
        self, parts: Sequence[Part], model: Decoder, known: Callable[[Sequence[int]], int] = lambda ids: 0
    ) -> None:
        """`known`: how many tokens of a prompt's beginning need no row, their cells being known."""
        self._known = known
        self._part = next((part for part in parts if part.seam == "prompt"), None)
        self._model = model
        self.num_failed = 0
        """Prompts that were left as they were because the editor failed."""

    @property
    def is_on(self) -> bool:
        return self._part is not None

    def edit(self, prompt: PromptIds, check: Callable[[], None] = lambda: None) -> Edited:
        """The prompt as it will be admitted. Raises UserErrors of the editor, and of `check` while it scores."""
        ids = list(prompt.ids)
        if self._part is None:
            return Edited(ids)
        if not prompt.context:
            return Edited(ids, notes=_unused("nothing to shorten: only questions, or token ids"))
        began = time.perf_counter()
        try:
            edit = self._part.impl.edit(replace(prompt, known=self._known(ids)), ModelScorer(self._model, check))
            _verify(prompt, edit)
        except UserError:
            raise
        except Exception as error:
            self.num_failed += 1
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            log.warning("%s failed, the prompt is left as it was (%s; %d so far)", self._name, why, self.num_failed)
            return Edited(ids, time.perf_counter() - began, _unused(why))
        seconds = time.perf_counter() - began
        if edit.why:
            return Edited(ids, seconds, _unused(edit.why))
        origin = sum(hi - lo for lo, hi in prompt.context)
        kept = origin - (len(ids) - len(edit.ids))
        notes = {"used": True, "why": "", "origin": origin, "kept": kept, "protected": len(ids) - origin}
        return Edited(list(edit.ids), seconds, notes | {"rate": kept / origin, "seconds": seconds})

    @property
    def _name(self) -> str:
        return self._part.method if self._part is not None else ""


def _unused(why: str) -> dict[str, Any]:
    return {"used": False, "why": why}


def _verify(prompt: PromptIds, edit: PromptEdit) -> None:
    """Raises ValueError unless the edit is a subsequence of the prompt that has everything protected."""
    kept = list(edit.keep_map)
    if any(a >= b for a, b in pairwise([-1, *kept, len(prompt.ids)])):
        raise ValueError("keep_map is not ascending")
    if list(edit.ids) != [prompt.ids[place] for place in kept]:
        raise ValueError("the ids are not those that keep_map names")
    free = {place for lo, hi in prompt.context for place in range(lo, hi)}
    if len(free.difference(kept)) != len(prompt.ids) - len(kept):
        raise ValueError("protected tokens are gone")
