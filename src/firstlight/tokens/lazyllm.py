"""`lazyllm`: behind a few layers the tokens that the newest row hardly sees wait; a later token can bring them back.

LazyLLM (arXiv 2407.14057). At each boundary layer the tokens are ranked by the attention of the row that will predict
the next token; the lowest are parked: their hidden rows stay at that depth (the paper's Aux Cache). Every decode step
ranks all tokens anew, resumes the parked ones it wants where they stopped, and reads only what it chose. So a token is
computed at most once in each layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, Cut, Enter, ModelFacts, Obs, PartContext, Probe, RequestRows, RowPolicy
from firstlight.kernels.ranking import best

DEPTHS = (0.3, 0.6, 0.9)
"""Where the paper's figures have boundaries."""


@dataclass(frozen=True)
class LazyLLMConfig:
    """Raises UserError on values that can't be."""

    boundaries: Sequence[int] = field(
        default=(),
        metadata={"doc": "layers (from 0) behind which tokens wait, as 8;17; default: at 30, 60, 90 % of the depth"},
    )
    keep: Sequence[float] = field(
        default=(0.7,), metadata={"doc": "share of the tokens that goes on at each boundary, or one for all, in (0, 1]"}
    )
    always_first: int = field(default=4, metadata={"doc": "tokens at the start of the prompt that always go on"})
    revive: bool = field(
        default=True, metadata={"doc": "choose anew in every decode step; off: the prompt's end chose for good"}
    )
    decode_keep: Sequence[float] = field(
        default=(), metadata={"doc": "what keep is for the prompt, for decode steps; default: the same"}
    )

    def __post_init__(self) -> None:
        for name, rates in (("keep", self.keep), ("decode_keep", self.decode_keep)):
            if not all(0 < rate <= 1 for rate in rates):
                raise UserError(f"lazyllm: {name}={list(rates)} aren't shares; give more than 0, at most 1")
        if not self.keep:
            raise UserError("lazyllm: keep is empty; give one share, or one for each boundary")
        if self.always_first < 0:
            raise UserError(f"lazyllm: always_first={self.always_first} is no number of tokens; give 0 or more")


class LazyLLM(RowPolicy):
    """The tokens part: a barrier at each boundary in prefill, a choice at each boundary in every decode step."""

    Config = LazyLLMConfig
    identity: ClassVar = {"keep": (1.0,)}
    trial: ClassVar = {"boundaries": (1, 3), "keep": (0.6,)}
    capability = Capability(exact=False, prefix_stable=False)

    def __init__(self, config: LazyLLMConfig) -> None:
        self.config, self.prompt_only = config, not config.revive
        self._keep: dict[int, tuple[float, float]] = {}
        """Boundary -> shares that go on in prefill and in decode."""
        if all(rate == 1 for rate in (*config.keep, *config.decode_keep)):
            self.capability = Capability(exact=True, alters_cells=False)

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        layers = list(self.config.boundaries) or _usual(model)
        if not layers or layers != sorted(set(layers)) or not set(layers) <= set(model.full_layers):
            choices = ", ".join(map(str, model.full_layers)) or "none, since every layer has a window"
            raise UserError(f"lazyllm: boundaries={layers} aren't ascending layers that read all; choose of {choices}")
        keep, decode_keep = self.config.keep, self.config.decode_keep or self.config.keep
        shares = zip(_shares("keep", keep, len(layers)), _shares("decode_keep", decode_keep, len(layers)))
        # Behind the last layer nobody waits, and where all go on nothing is to be decided.
        last = model.num_layers - 1
        self._keep = {layer: pair for layer, pair in zip(layers, shares) if layer < last and min(pair) < 1}

    def barriers(self) -> tuple[int, ...]:
        return tuple(self._keep)

    def probe(self, layer: int) -> Probe | None:
        return Probe(1) if layer in self._keep else None

    def at_barrier(self, layer: int, tok: Tensor, obs: Obs | None, ctx: PartContext) -> Cut:
        assert obs is not None, "it was probed"
        return Cut(self._chosen(tok, obs, self._keep[layer][0], ctx), park=True)

    def before_layer(self, layer: int, rows: RequestRows, parked: Tensor, ctx: PartContext) -> Enter | None:
        """In a decode step: behind a boundary only what was chosen there is read, and what is missing comes back."""
        if layer == 0:
            ctx.state.pop("chosen", None)
        chosen: Tensor | None = ctx.state.get("chosen")
        if not ctx.decode or chosen is None:
            return None
        revive = parked[torch.isin(parked, chosen)] if len(parked) else parked
        ctx.notes["revived"] = ctx.notes.get("revived", 0) + len(revive)
        return Enter(revive=revive if len(revive) else None, visible=chosen)

    def after_attend(self, layer: int, rows: RequestRows, obs: Obs | None, ctx: PartContext) -> Cut | None:
        if not ctx.decode or layer not in self._keep:
            return None
        assert obs is not None, "it was probed"
        among = ctx.state.get("chosen", obs.tok[0])
        ctx.state["chosen"] = chosen = self._chosen(among, obs, self._keep[layer][1], ctx)
        return Cut(chosen, park=True)

    def _chosen(self, tok: Tensor, obs: Obs, share: float, ctx: PartContext) -> Tensor:
        """ceil(share n) of tokens i64 [n], ascending; the first ones, the last prompt row, generated ones always."""
        score = obs.colsum.sum(0)[torch.searchsorted(obs.tok[0], tok)]
        always = (tok < self.config.always_first) | (tok >= ctx.prompt_len - 1)
        score[always] = math.inf
        exact = Fraction(str(share)) * len(tok)  # of the decimals that were written: 0.55 * 100 is more than 55
        return tok[best(score, max(math.ceil(exact), int(always.sum())))]


def _usual(model: ModelFacts) -> list[int]:
    """Boundaries at the paper's depths, each at the nearest layer that reads all tokens."""
    wanted = [max(int(depth * model.num_layers) - 1, 0) for depth in DEPTHS] if model.full_layers else []
    return sorted({min(model.full_layers, key=lambda layer: abs(layer - want)) for want in wanted})


def _shares(name: str, given: Sequence[float], count: int) -> Sequence[float]:
    """A share for each boundary."""
    if len(given) not in (1, count):
        raise UserError(f"lazyllm: {name} has {len(given)} shares for {count} boundaries; give one, or one for each")
    return given if len(given) == count else list(given) * count
