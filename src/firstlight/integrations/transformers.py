"""Any planner as an attention implementation of transformers, so that an unmodified model prefills with it.

    from transformers import AutoModelForCausalLM
    from firstlight.integrations import transformers as fl

    attention = fl.register("band:sink=64,window=512")
    model = AutoModelForCausalLM.from_pretrained("path/to/model", attn_implementation="firstlight")
    model.generate(**tokens)
    print(attention.report())  # how often planners served, how often not and why, and how much was read

It goes through transformers' public interfaces for attention functions and masks. Prompt rows in bf16 or float32 on a
CPU go to our kernels; all else (generated tokens, padding, sliding windows, training) goes to transformers' own `sdpa`
with the same mask, and so does a prompt for which the planner wants dense: then the bits are those of `sdpa`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from firstlight.core.config import as_method
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts
from firstlight.core.registry import Method
from firstlight.integrations.planned import DTYPES, PlannedAttention, Rows


def register(*methods: Method | str, name: str = "firstlight", model: str | Path | None = None) -> Attention:
    """Make `attn_implementation=name` mean attention under these methods; the same name again replaces it.

    Methods as `--method` takes them; of one with parts in several seams the planner works here and nothing else. Those
    that read a calibration need `model`, the files of the weights. Raises UserError on methods without a planner.

    One prompt (or one batch of them) at a time: a planner's scratch belongs to the prompt that began last.
    """
    if not methods:
        raise UserError("no method was given; name one of `firstlight methods list` that has an attention part")
    made = Attention(PlannedAttention([as_method(method) for method in methods], model))
    AttentionInterface.register(name, made)
    AttentionMaskInterface.register(name, sdpa_mask)
    return made


class Attention:
    """What is registered: transformers calls it in each layer; `report` tells what it did so far."""

    def __init__(self, planned: PlannedAttention) -> None:
        self._planned = planned
        self._config: Any = None
        self._layer = 0
        self._states: dict[int, dict[str, Any]] = {}
        self._served, self._left = 0, Counter[str]()

    def report(self) -> dict[str, Any]:
        """Counts of (sequence, layer, pass): planned, and left to sdpa by reason; density over those planned."""
        stats = self._planned.stats
        density = stats.visible / stats.dense if stats.dense else 1.0
        return {"planned": self._served, "sdpa": dict(+self._left), "density": density}

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query [B, Hq, T, D], key and value [B, Hkv, S, D] -> [B, T, Hq, D]; a mask as sdpa takes it."""
        if kwargs.get("s_aux") is not None:
            raise UserError("this model's attention has sinks of its own, which sdpa lacks; load it with another one")
        why = _unfit(module, query, key, value, kwargs)
        if why is not None:
            self._left[why] += len(query)
            return _dense(module, query, key, value, attention_mask, **kwargs), None
        self._bind(module)
        found = self._planned_ones(module, (query, key, value), attention_mask, kwargs)
        if all(out is None for out in found):
            return _dense(module, query, key, value, attention_mask, **kwargs), None
        for b in [b for b, out in enumerate(found) if out is None]:
            one = (x[b : b + 1] for x in (query, key, value))
            found[b] = _dense(module, *one, _of(attention_mask, b), **kwargs)[0]
        return torch.stack([out for out in found if out is not None]), None

    def _planned_ones(
        self, module: Any, tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, asked: dict[str, Any]
    ) -> list[Tensor | None]:
        """[T, Hq, D] of each sequence of a batch; None where sdpa has to serve it."""
        num, rows = len(tensors[0]), tensors[0].shape[2]
        firsts = [_first(mask, b, rows) for b in range(num)]
        self._begin(module.layer_idx, 0 in firsts)
        found: list[Tensor | None] = []
        for b, first in enumerate(firsts):
            out = None
            if first is None:
                self._left["its mask is not causal"] += 1
            else:
                out = self._planned.attend(_rows(module, b, first, tensors, asked), self._states.setdefault(b, {}))
                self._left["dense was planned"] += out is None
            self._served += out is not None
            found.append(out)
        return found

    def _bind(self, module: torch.nn.Module) -> None:
        """Planners are made for a model when it is first seen."""
        if module.config is not self._config:
            self._planned.bind(_facts(module.config))
            self._config = module.config

    def _begin(self, layer: int, at_start: bool) -> None:
        """Scratch is dropped where a pass over new prompts begins: the layers start again, at the first token."""
        if at_start and layer <= self._layer:
            self._states.clear()
        self._layer = layer


_SPECIAL = ("cache", "position_bias", "softcap")


def _unfit(module: Any, query: Tensor, key: Tensor, value: Tensor, asked: dict[str, Any]) -> str | None:
    """Why our kernels can't serve a call; None = they can."""
    is_causal = asked.get("is_causal")
    reasons = {
        "generated tokens": query.shape[2] == 1,
        "sliding window": asked.get("sliding_window") is not None,
        "gradients are wanted": torch.is_grad_enabled() and query.requires_grad,
        "not on a CPU": query.device.type != "cpu",
        f"computes in {query.dtype}": query.dtype not in DTYPES,
        "not causal": not (getattr(module, "is_causal", True) if is_causal is None else is_causal),
        "keys and values of different sizes": key.shape[-1] != value.shape[-1],
        "dropout": bool(asked.get("dropout")),
        "a paged cache, a bias or a soft cap": any(
            asked.get(n) is not None for n in ("cache", "position_bias", "softcap")
        ),
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _first(mask: Tensor | None, b: int, num: int) -> int | None:
    """The ordinal of the first row, if the mask of a sequence is causal and nothing else; None otherwise.

    No mask: the prompt begins here, and what a static cache holds behind it isn't there yet.
    """
    if mask is None:
        return 0
    own = mask[b % len(mask)]
    if own.dtype != torch.bool or own.shape[0] != 1:
        return None
    first = int(own[0, 0].sum()) - 1
    causal = torch.arange(own.shape[2]) <= torch.arange(first, first + num)[:, None]
    return first if first >= 0 and torch.equal(own[0], causal) else None


def _rows(module: Any, b: int, first: int, tensors: tuple[Tensor, Tensor, Tensor], asked: dict[str, Any]) -> Rows:
    """One sequence of a batch."""
    q, k, v = (x[b].transpose(0, 1) for x in tensors)
    scale = asked.get("scaling") or q.shape[2] ** -0.5
    return Rows(module.layer_idx, first, q, k[: first + len(q)], v[: first + len(q)], scale)


def _dense(*args: Any, **kwargs: Any) -> Tensor:
    """transformers' own, [B, T, Hq, D]."""
    out: Tensor = sdpa_attention_forward(*args, **kwargs)[0]
    return out


def _of(mask: Tensor | None, b: int) -> Tensor | None:
    """The mask of one sequence; one for all may come only once."""
    return None if mask is None else mask[b % len(mask)][None]


def _facts(config: Any) -> ModelFacts:
    """The shape of a model by its config."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return ModelFacts(
        digest="",
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        windows=tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds),
    )
