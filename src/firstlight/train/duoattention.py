"""The gates of DuoAttention: which KV heads need far context, found by optimisation (arXiv 2410.10819, section 3.2).

Each KV head has a gate in [0, 1] that blends what it reads of all tokens with what it reads of the first and the last
ones. The gates are trained, and nothing else: the last hidden rows of passkey answers must stay those of the model
itself, while a penalty pushes every gate towards 0. What stays up needs far context.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from firstlight.core.errors import UserError
from firstlight.core.streaming import check_model
from firstlight.engine.build import DTYPES
from firstlight.llm import LLM
from firstlight.models.weights.checkpoint import open_checkpoint
from firstlight.models.weights.hub import resolve
from firstlight.models.weights.values import Weights
from firstlight.train.calibrating import Found, Notebook
from firstlight.train.passkeys import MOST, Passkeys, Sample
from firstlight.train.texts import NAME, calibration_text
from firstlight.train.trunk import Attention, Trunk

_INTERVALS = 50
"""Sample lengths are drawn from so many between the shortest and the longest."""
_RAMP, _LOWEST = 0.2, 0.1
"""The learning rate climbs from a tenth over the first fifth of the steps, and falls back over the last."""
_ROWS = 128
"""Rows that read the sink and their window together."""
_SAVED_EVERY_S = 30.0


def _opt(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Config:
    """Raises UserError on values that no training can have. Defaults fit a model of 135M on two cores in an hour."""

    steps: int = _opt(200, "samples that are trained on")
    min_len: int = _opt(704, "tokens of the shortest sample")
    max_len: int = _opt(1152, "tokens of the longest sample")
    passkeys: int = _opt(10, "passkeys of a sample")
    words: int = _opt(8, "words of a passkey")
    sink: int = _opt(128, "first tokens that a streaming head reads in training")
    recent: int = _opt(256, "last tokens that it reads, its own included")
    lr: float = _opt(0.02, "learning rate at its highest")
    reg: float = _opt(0.05, "weight of the mean gate in the loss")
    minutes: float = _opt(0.0, "stop after so many and keep what was found; 0: when the steps are done")
    seed: int = _opt(0, "of the samples")

    def __post_init__(self) -> None:
        least = {"steps": 1, "passkeys": 1, "words": 1, "sink": 0, "recent": 1, "min_len": 1, "lr": 0, "reg": 0}
        for key, value in least.items():
            if not getattr(self, key) >= value:
                raise UserError(f"duoattention: {key}={getattr(self, key)} is too small; give {value} or more")
        if self.passkeys > MOST:
            raise UserError(f"duoattention: passkeys={self.passkeys} is too many; give {MOST} or fewer")
        if self.max_len < self.min_len:
            raise UserError(f"duoattention: max_len={self.max_len} is below min_len={self.min_len}; raise it")

    def length(self, number: int) -> int:
        """Tokens of sample `number`: the intervals in an order that covers them all before it repeats one."""
        place = number * 31 % _INTERVALS / max(_INTERVALS - 1, 1)
        return self.min_len + round(place * (self.max_len - self.min_len))

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0 on)."""
        ramp = max(self.steps * _RAMP, 1.0)
        return self.lr * min(1.0, *(_LOWEST + (1 - _LOWEST) * (n / ramp) for n in (step, self.steps - 1 - step)))


class Gates:
    """The gates of one model under training: `alpha` f32 [layers, Hkv]."""

    def __init__(self, trunk: Trunk, config: Config) -> None:
        self.trunk, self.config = trunk, config
        self.alpha = torch.ones(trunk.config.num_layers, trunk.config.num_kv_heads, requires_grad=True)
        self._adam = torch.optim.AdamW([self.alpha], weight_decay=0.0)
        self.losses: list[float] = []
        """Of each step, without the penalty."""

    def step(self, sample: Sample) -> float:
        """Train on a sample; returns how far its answers' hidden rows were from the model's own."""
        for group in self._adam.param_groups:
            group["lr"] = self.config.rate(len(self.losses))
        far = self.distance(sample)
        (far + self.config.reg * self.alpha.abs().mean()).backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        self._adam.zero_grad()
        with torch.no_grad():
            self.alpha.clamp_(0, 1)
        self.losses.append(float(far.detach()))
        return self.losses[-1]

    def distance(self, sample: Sample) -> Tensor:
        """Mean squared difference of the answers' last hidden rows, gated and not."""
        with torch.no_grad():
            own = self.trunk.hidden(sample.ids, self.trunk.dense)[sample.answer_rows]
        gated = self.trunk.hidden(sample.ids, gated_attention(self.trunk, self.alpha, self.config))
        return (gated[sample.answer_rows] - own).square().mean()

    def state(self) -> dict[str, Tensor]:
        """All that a later run needs to go on as if there had been no stop."""
        adam = self._adam.state[self.alpha] if self.losses else {}
        return {"alpha": self.alpha.detach(), "losses": torch.tensor(self.losses, dtype=torch.float64), **adam}

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.alpha.copy_(state["alpha"])
        self.losses = state["losses"].tolist()
        adam = {key: state[key] for key in ("step", "exp_avg", "exp_avg_sq") if key in state}
        self._adam.state[self.alpha].update(adam)


def gated_attention(trunk: Trunk, alpha: Tensor, config: Config) -> Attention:
    """Of each KV head `alpha` times what it reads of all tokens, and the rest of what streaming would."""
    first = config.sink + config.recent
    group = trunk.config.num_heads // trunk.config.num_kv_heads

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        full = trunk.dense(layer, q, k, v)
        if q.shape[2] <= first:  # so short a sample is read whole by either
            return full
        gate = alpha[layer].repeat_interleave(group)[None, :, None, None]
        near = streaming(q, k, v, config.sink, config.recent, trunk.scale)
        mixed = gate * full[:, :, first:] + (1 - gate) * near
        return torch.cat([full[:, :, :first], mixed.to(full.dtype)], 2)

    return attend


def streaming(q: Tensor, k: Tensor, v: Tensor, sink: int, recent: int, scale: float) -> Tensor:
    """Rows from sink + recent on, each over the first `sink` and its last `recent` keys: [1, Hq, N - sink - recent, d].

    Earlier rows read all there is. Some rows at a time: no mask of N x N is made.
    """
    parts = []
    for lo in range(sink + recent, q.shape[2], _ROWS):
        hi, near = min(lo + _ROWS, q.shape[2]), lo - recent + 1
        row = torch.arange(lo, hi)[:, None]
        key = torch.cat([torch.arange(sink), torch.arange(near, hi)])
        see = (key <= row) & ((key < sink) | (row - key < recent))
        keys, values = (torch.cat([t[:, :, :sink], t[:, :, near:hi]], 2) for t in (k, v))
        part = scaled_dot_product_attention(q[:, :, lo:hi], keys, values, see, scale=scale, enable_gqa=True)
        parts.append(part)
    return torch.cat(parts, 2)


def calibrate(llm: LLM, config: Config, notebook: Notebook) -> Found:
    """Train the gates of a model, or go on where a run was stopped. Values: `gates` [layers][Hkv], `steps`, `loss`."""
    checkpoint = open_checkpoint(resolve(llm.model_name))
    check_model(checkpoint.config.facts(checkpoint.digest))
    gates = Gates(Trunk(checkpoint.config, dict(Weights(checkpoint, DTYPES[llm.options.compute]))), config)
    text = calibration_text()
    passkeys = Passkeys(llm.tokenizer, text, count=config.passkeys, words=config.words, seed=config.seed)
    if done := notebook.read():
        gates.load(done)
    _train(gates, passkeys, notebook)
    return Found(_values(gates), {NAME: text})


def _values(gates: Gates) -> dict[str, Any]:
    """What the method needs, and what tells how far the training came."""
    last = gates.losses[-_INTERVALS:]
    loss = sum(last) / len(last) if last else 0.0
    rows = [[round(gate, 4) for gate in row] for row in gates.alpha.tolist()]
    return {"gates": rows, "steps": len(gates.losses), "loss": round(loss, 6)}


def _train(gates: Gates, passkeys: Passkeys, notebook: Notebook) -> None:
    """Steps until they or the minutes are over; what is done is saved twice a minute."""
    config, began = gates.config, time.monotonic()
    saved = began
    while len(gates.losses) < config.steps and not 0 < config.minutes * 60 < time.monotonic() - began:
        number = len(gates.losses)
        loss = gates.step(passkeys.draw(number, config.length(number)))
        notebook.tell(f"training gates: loss {loss:.4f}", number + 1, config.steps)
        if time.monotonic() - saved > _SAVED_EVERY_S:
            notebook.write(gates.state())
            saved = time.monotonic()
    notebook.write(gates.state())
