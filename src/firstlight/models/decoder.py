"""The layer math that all families share, on blocks of rows; the executor owns the loop.

A layer is two halves around attention: `qkv` (norm, projections, rotation) and `finish` (output projection, MLP). Both
are row-local: a row's result doesn't depend on the rows beside it. The residual stream is float32 whatever the compute
type: sixty roundings to bf16 cost half of its distance to a float32 run.

A family is a class that derives from `Decoder` in a file of its own and says what is different: which tensors a layer
has, how model files state its settings, and the steps that it does in another way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from firstlight.kernels.blocks import Stored
from firstlight.kernels.rows8 import Rows8
from firstlight.kernels.tape import Own
from firstlight.models.config import ModelConfig
from firstlight.models.fields import Fields
from firstlight.models.rope import rope_table

LayerTensors = dict[str, tuple[str, tuple[int, ...]]]
"""Hugging Face name of a layer's tensor -> its GGUF name and its shape ([out, in] for a linear)."""
Settings = dict[str, Any]
"""Fields of `ModelConfig` by name."""
Rows = Tensor | Rows8
Weight = Tensor | Stored
"""A tensor, or what a file has of it, for linears that compute from that."""
Spread = Mapping[str, Tensor]
"""Name of a linear -> mean square of each channel of its input, f32 [I]."""
_NEVER_INT8 = ("head", "router")
"""Linears whose output is compared: a small error changes a choice."""
EMBEDDING, _NORM = "model.embed_tokens.weight", "model.norm.weight"


class Decoder:
    """A llama-like model: weights packed for a backend, and the halves of a layer.

    Shapes: n rows, D hidden, Hq / Hkv heads of d. Weights come under Hugging Face's names, [out, in].
    """

    activation: ClassVar[str] = "silu"
    """As config.json names it."""
    all_kernels: ClassVar[bool] = False
    """Whether a layer's halves call the backend's operators and do nothing else to what is in memory."""
    tied: ClassVar[bool] = False
    """Whether the head is the embedding where config.json doesn't say."""

    # --- what a family says about its files ---------------------------------------------------------------------------

    @classmethod
    def layer_tensors(cls, c: ModelConfig) -> LayerTensors:
        """The tensors of each layer."""
        hidden, ffn, q, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        return {
            "input_layernorm.weight": ("attn_norm.weight", (hidden,)),
            "self_attn.q_proj.weight": ("attn_q.weight", (q, hidden)),
            "self_attn.k_proj.weight": ("attn_k.weight", (kv, hidden)),
            "self_attn.v_proj.weight": ("attn_v.weight", (kv, hidden)),
            "self_attn.o_proj.weight": ("attn_output.weight", (hidden, q)),
            "post_attention_layernorm.weight": ("ffn_norm.weight", (hidden,)),
            "mlp.gate_proj.weight": ("ffn_gate.weight", (ffn, hidden)),
            "mlp.up_proj.weight": ("ffn_up.weight", (ffn, hidden)),
            "mlp.down_proj.weight": ("ffn_down.weight", (hidden, ffn)),
        }

    @classmethod
    def hf_settings(cls, f: Fields) -> Settings:
        """What config.json says beyond the common settings, or instead of them."""
        return {}

    @classmethod
    def gguf_settings(cls, f: Fields) -> Settings:
        """The same of GGUF metadata, whose keys come without the architecture's name."""
        return {}

    @classmethod
    def from_gguf(cls, c: ModelConfig, name: str, values: Tensor) -> Tensor:
        """A tensor as a GGUF file lays it out -> as Hugging Face does."""
        return values

    # --- the model ----------------------------------------------------------------------------------------------------

    @classmethod
    def prepared(
        cls, config: ModelConfig, weights: Mapping[str, Weight], backend: ModuleType, int8: Spread | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """What a model is made of, ready to be kept: small tensors by their names, linears packed for the backend.

        Each of `weights` is asked for once, layer by layer. `int8`: what linears were seen to read
        (models/calibration.py), if they are to be int8.
        """
        linears = _linears_of(backend, int8)
        yield _NORM, _plain(weights[_NORM])
        if not config.tie_head:
            yield from _embedding(linears, weights[EMBEDDING])
        yield from _parts(linears, "head", [weights[_head_name(config)]])
        names = cls.layer_tensors(config)
        for i in range(config.num_layers):
            layer = {name: weights[f"model.layers.{i}.{name}"] for name in names}
            yield from ((f"{i}.{name}", _plain(w)) for name, w in layer.items() if w.dim() == 1)
            for name, joined in cls._linears(layer).items():
                yield from _parts(linears, f"{i}.{name}", joined)

    def __init__(
        self,
        config: ModelConfig,
        pieces: Mapping[str, Tensor],
        backend: ModuleType,
        served: int | None = None,
        int8: bool = False,
        centres: Sequence[Tensor] | None = None,
    ) -> None:
        """`pieces`: as `prepared` yields them; `served`: the longest context that will be seen; None = the model's.

        `centres`: of each layer what is taken off all of its keys, [Hkv, d]: a softmax doesn't see what all keys share,
        8 bits do. A cap on scores would see it, so then nothing is taken off.
        """
        self.config, self.ops = config, backend
        self.scale = config.score_scale or 1 / math.sqrt(config.head_dim)
        self.windows = config.windows
        self.linears = _linears_of(backend, {} if int8 else None)
        for name, parts in _by_linear(pieces).items():
            self.linears.take(name, parts)
        self.dtype = self.linears.dtype
        self._embedding = pieces.get(EMBEDDING)
        self._centres = None if centres is None or config.score_cap else [-c.to(self.dtype).float() for c in centres]
        if self._embedding is not None and backend.layout(self.dtype) == "rows":
            self._embedding = self._embedding.clone()  # linears were packed anew: nothing else holds the file
        self.precision = "int8" if int8 else str(self.dtype).removeprefix("torch.")
        self.final_gain = self._gain(pieces[_NORM])
        small = [name for name, (_, shape) in self.layer_tensors(config).items() if len(shape) == 1]
        layers = [{name: pieces[f"{i}.{name}"] for name in small} for i in range(config.num_layers)]
        self._gains = [{n: self._gain(w) for n, w in layer.items() if "norm." in n} for layer in layers]
        self._head_gains = [self._joined_head_gains(gains) for gains in self._gains]
        self._bias = [_joined_biases(layer) for layer in layers]
        self.row_flops = sum(2.0 * math.prod(s) * self._used(name) for name, s in self.linears.shapes.items())
        """Operations of all linears for one row, the head apart."""
        self.can_hold = self.all_kernels and self.linears.all_kernels
        """Whether calls of a layer's halves may be noted first and made later (kernels/tape.py)."""
        self.layer_flops = self.row_flops / config.num_layers
        self.qkv_flops = 2.0 * math.prod(self.linears.shapes["0.qkv"])
        """Operations of a layer's first half for one row."""
        self._tables = _tables(config, served or config.max_context)
        local = config.local_layers if config.local_rope_theta else ()
        self._table_of = [int(layer in local) for layer in range(config.num_layers)]

    @functools.cached_property
    def own(self) -> list[Own]:
        """What calls of each layer's halves and of its attention have of its own, where they can be held."""
        linears: dict[int, list[Own]] = {}
        for name in self.linears.shapes:
            layer, _, rest = name.partition(".")
            if rest:
                linears.setdefault(int(layer), []).append(self.linears.own(name))
        forms: dict[Hashable, int] = {}
        found = []
        for layer, parts in sorted(linears.items()):
            vectors = [*self._gains[layer].values(), self._head_gains[layer], self._bias[layer]]
            vectors += [] if self._centres is None else [self._centres[layer]]
            lie = [v.data_ptr() for v in vectors if v is not None]
            form = (self.windows[layer], self._table_of[layer], len(lie), *[part.form for part in parts])
            number = forms.setdefault(form, len(forms))
            found.append(Own(number, (*lie, *[a for part in parts for a in part.addresses])))
        return found

    def embed(self, ids: Tensor) -> Tensor:
        """ids i64 [n] -> residual rows f32 [n, D]."""
        if self._embedding is not None:
            return self._embedding[ids].float()
        rows: Tensor = self.linears.head_rows(ids) if self.config.tie_head else self.linears.rows("embedding", ids)
        return rows.float()

    def rope(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """pos i64 [n] -> cos, sin f32 [bases, n, d], sin negative in the first half.

        One table for each RoPE base of the model. Angles are in float64, exact however far.
        """
        half = self.config.head_dim // 2
        cos, sin = torch.empty(2, len(self._tables), len(pos), 2, half)
        for table, (frequencies, gain) in enumerate(self._tables):
            angle = (pos[:, None] * frequencies)[:, None]
            cos[table], sin[table] = (turn if gain == 1 else turn * gain for turn in (angle.cos(), angle.sin()))
        sin[..., 0, :].neg_()
        return cos.flatten(2), sin.flatten(2)

    def turn(self, layer: int, k: Tensor, by: Tensor, again: bool) -> Tensor:
        """Keys k [n, Hkv, d] rotated by positions i64 [n]; `again`: on top of a rotation, whose gain they have."""
        table = self._table_of[layer]
        cos, sin = (t[table] / (self._tables[table][1] if again else 1.0) for t in self.rope(by))
        k = k.to(self.dtype, copy=True).contiguous()
        if again and self._centres is not None:
            self.ops.shift_rows(k, -self._centres[layer])
        return self._centred(layer, self.ops.rotate(k, cos.contiguous(), sin.contiguous()))

    def qkv(
        self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x f32 [n, D]; cos, sin [bases, n, d] -> rotated q [n, Hq, d], rotated k [n, Hkv, d], v [n, Hkv, d].

        They lie side by side, in `out` [n, (Hq + 2 Hkv) d] if that is given.
        """
        c, table = self.config, self._table_of[layer]
        heads, scale = self.linears.scaled(f"{layer}.qkv", self._add_norm(layer, "input_layernorm", "qkv", x), out)
        if (bias := self._bias[layer]) is not None:
            heads, scale = self._finished(heads, scale), None
            self.ops.shift_rows(heads, bias)
        heads = heads.view(x.shape[0], -1, c.head_dim)
        hq, turning = c.num_heads, c.num_heads + c.num_kv_heads
        how = (scale, self._head_gains[layer], c.rms_eps)
        turned = self.ops.rotate(heads[:, :turning], cos[table], sin[table], *how)
        return turned[:, :hq], self._centred(layer, turned[:, hq:]), self._finished(heads[:, turning:], scale)

    def finish(self, layer: int, x: Tensor, attended: Tensor) -> None:
        """x f32 [n, D] += output projection of attended [n, Hq, d], then += the MLP: in place."""
        o = self.linears.scaled(f"{layer}.o", attended.flatten(1))
        h = self._add_norm(layer, "post_attention_layernorm", "gate_up", x, *o)
        self.ops.add_rows(x, *self._mlp(layer, h))

    def head(self, x: Tensor) -> Tensor:
        """x f32 [n, D] -> logits f32 [n, vocabulary]."""
        return self._capped(self.linears.logits(self._final_norm(x)))

    def lens(self, x: Tensor, among: Tensor | None = None) -> Tensor:
        """Rows of any layer through the head (logit lens), not rescored: x f32 [n, D] -> logits f32 [n, vocabulary].

        With `among`, i64 [m], only those tokens' logits, [n, m].
        """
        h = self._final_norm(x)
        logits = self.linears("head", h) if among is None else self.ops.linear(h, self.linears.head_rows(among))
        return self._capped(logits.float())

    # --- steps --------------------------------------------------------------------------------------------------------

    def _final_norm(self, x: Tensor) -> Tensor:
        """x f32 [n, D] -> [n, D], as the head reads it."""
        normed: Tensor = self.ops.add_norm(x, None, self.final_gain, self.config.rms_eps, self.dtype)
        return normed

    def _capped(self, logits: Tensor) -> Tensor:
        """cap * tanh(logits / cap), in place, of operators whose vectorised and scalar forms agree."""
        if (cap := self.config.logit_cap) is None:
            return logits
        return logits.mul_(2 / cap).exp_().add_(1).reciprocal_().mul_(-2 * cap).add_(cap)

    def _gain(self, weight: Tensor) -> Tensor:
        """What a norm multiplies by, f32."""
        return weight.float().clone()

    def _joined_head_gains(self, gains: Mapping[str, Tensor]) -> Tensor | None:
        """A layer's QK norm: what each head of q and k is multiplied by, f32 [Hq + Hkv, d]; None if there is none."""
        if "self_attn.q_norm.weight" not in gains:
            return None
        counts = (("q", self.config.num_heads), ("k", self.config.num_kv_heads))
        return torch.cat([gains[f"self_attn.{name}_norm.weight"].expand(n, -1) for name, n in counts])

    def _norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        """x [.., D]."""
        normed: Tensor = self.ops.rms_norm(x, self._gains[layer][f"{name}.weight"], self.config.rms_eps)
        return normed

    def _centred(self, layer: int, k: Tensor) -> Tensor:
        """Rotated keys k [n, Hkv, d] without what all keys of the layer share: in place."""
        if self._centres is not None:
            self.ops.shift_rows(k, self._centres[layer])
        return k

    def _finished(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """x [n, ..] times its rows' scale, in place: for what follows a linear and doesn't do that itself."""
        if scale is not None:
            self.ops.scale_rows(x, scale)
        return x

    def _add_norm(
        self,
        layer: int,
        name: str,
        reader: str,
        x: Tensor,
        delta: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Rows:
        """x f32 [n, D] (+= delta times its rows' scale, in place) -> normed [n, D], as the linear `reader` takes it."""
        gain, smooth = self._gains[layer][f"{name}.weight"], self.linears.reads(f"{layer}.{reader}")
        normed: Rows = self.ops.add_norm(x, delta, gain, self.config.rms_eps, self.dtype, scale, smooth)
        return normed

    def _mlp(self, layer: int, h: Rows) -> tuple[Tensor, Tensor | None]:
        """h [n, D] -> what the MLP adds [n, D], and its rows' scale."""
        gate_up, scale = self.linears.scaled(f"{layer}.gate_up", h)
        gated = self._gated(gate_up, scale, self.linears.reads(f"{layer}.down"))
        out: tuple[Tensor, Tensor | None] = self.linears.scaled(f"{layer}.down", gated)
        return out

    def _gated(self, gate_up: Tensor, scale: Tensor | None = None, smooth: Tensor | None = None) -> Rows:
        """[n, 2F], gate first -> [n, F]."""
        out: Rows = self.ops.silu_mul(gate_up, scale, smooth)
        return out

    @classmethod
    def _linears(cls, layer: Mapping[str, Weight]) -> dict[str, list[Weight]]:
        """A layer's linears by short names, those that share an input to be joined: fewer calls, wider products."""
        gate_up = [layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]
        return attention_linears(layer) | {"gate_up": gate_up, "down": [layer["mlp.down_proj.weight"]]}

    def _used(self, name: str) -> float:
        """The share of rows that go through a linear, the head apart."""
        return float(name not in ("head", "embedding"))


def tensor_names(family: type[Decoder], c: ModelConfig) -> LayerTensors:
    """Every tensor that a model must have: Hugging Face name -> GGUF name and shape."""
    layer = family.layer_tensors(c)
    named = {"model.embed_tokens.weight": ("token_embd.weight", (c.vocab_size, c.hidden_size))}
    tensors: LayerTensors = dict(named)
    for i in range(c.num_layers):
        tensors |= {f"model.layers.{i}.{name}": (f"blk.{i}.{gguf}", shape) for name, (gguf, shape) in layer.items()}
    tensors["model.norm.weight"] = ("output_norm.weight", (c.hidden_size,))
    return tensors if c.tie_head else {**tensors, "lm_head.weight": ("output.weight", (c.vocab_size, c.hidden_size))}


def attention_linears(layer: Mapping[str, Weight]) -> dict[str, list[Weight]]:
    """The linears around attention; q, k and v share an input."""
    return {"qkv": [layer[f"self_attn.{p}_proj.weight"] for p in "qkv"], "o": [layer["self_attn.o_proj.weight"]]}


def _plain(weight: Weight) -> Tensor:
    """One that no linear reads, which comes as a tensor."""
    assert isinstance(weight, Tensor)
    return weight


def _joined_biases(layer: Mapping[str, Tensor]) -> Tensor | None:
    """q, k and v's biases as one, f32; None if there are none."""
    names = [f"self_attn.{p}_proj.bias" for p in "qkv"]
    return torch.cat([layer[name] for name in names]).float() if names[0] in layer else None


def _parts(linears: Any, name: str, joined: Sequence[Weight]) -> Iterator[tuple[str, Tensor]]:
    """A linear as it is kept: its parts, each under the linear's name and its own."""
    return ((f"{name}/{part}", tensor) for part, tensor in linears.parts(name, joined).items())


def _embedding(linears: Any, weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """One that isn't the head, too: a tensor, or a file's blocks, whose rows are read as a linear's."""
    return iter([(EMBEDDING, weight)]) if isinstance(weight, Tensor) else _parts(linears, "embedding", [weight])


def _by_linear(pieces: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The reverse for all linears."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, piece in pieces.items():
        linear, is_part, part = name.partition("/")
        if is_part:
            found.setdefault(linear, {})[part] = piece
    return found


def _tables(c: ModelConfig, served: int) -> list[tuple[Tensor, float]]:
    """RoPE tables: of the layers in general, then of local ones if they have a base of their own."""
    tables = [rope_table(c.head_dim, c.rope_theta, c.rope_scaling, c.max_context, served)]
    if c.local_rope_theta:
        tables.append(rope_table(c.head_dim, c.local_rope_theta, None, c.max_context, served))
    return tables


def _linears_of(backend: ModuleType, int8: Spread | None) -> Any:
    """The backend's linears, none yet; int8 ones if it is said what they read."""
    return backend.PackedLinears() if int8 is None else backend.Int8Linears((), int8, _NEVER_INT8, backend)


def _head_name(config: ModelConfig) -> str:
    return EMBEDDING if config.tie_head else "lm_head.weight"
