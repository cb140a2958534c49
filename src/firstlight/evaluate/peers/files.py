"""One model in the form that each peer reads: the file as shipped, a GGUF file of another type, or a directory.

What is made is kept in the cache, named by the model's digest. A GGUF file of another type holds the shipped file's
values, unpacked and packed anew: linears in the wanted type, the embedding of a 4-bit file in Q8_0 (as the file's own
makers do, for it is the head too), everything one-dimensional in float32.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from firstlight.core.errors import UserError
from firstlight.core.files import write_atomically
from firstlight.evaluate.peers import process
from firstlight.evaluate.peers.environments import Tell, environment, home, python_of
from firstlight.evaluate.peers.recipes import Recipe
from firstlight.models.weights.digest import digest_of

CONVERT_LIMIT_S = 1800.0
_LAYOUT = "1"  # raise it when the meaning of a made file changes
_EMBEDDING = {"Q4_0": "Q8_0"}


def file_for(form: str, model: Path, transformers: Recipe, tell: Tell) -> Path:
    """The model in a form: `shipped`, `hf` or a GGUF type; UserError where it can't be had."""
    if form == "shipped" or (form == "hf" and model.is_dir()):
        return model
    if model.is_dir():
        raise UserError("the peer reads GGUF files and this model is a directory; give its GGUF file")
    name = hashlib.sha256((digest_of([model]) + _LAYOUT).encode()).hexdigest()[:16]
    if form == "hf":
        return _directory(model, home() / "models" / f"{name}-bf16", transformers, tell)
    target = home() / "models" / f"{name}-{form}.gguf"
    if not target.exists():
        tell(f"writing the model as {form}")
        with write_atomically(target) as partial:
            repack(model, form, partial)
    return target


def repack(source: Path, form: str, target: Path) -> None:
    """Write a GGUF file with the values of another one in the type `form`."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(source)
    writer = GGUFWriter(target, arch=_text(reader, "general.architecture"))
    _copy_metadata(reader, writer, form)
    for tensor in reader.tensors:
        data, kind = _packed(tensor, form)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _text(reader: Any, key: str) -> str:
    return str(reader.fields[key].contents())


def _copy_metadata(reader: Any, writer: Any, form: str) -> None:
    """Every key but those that the writer sets; `general.file_type` names the new type."""
    from gguf import GGUFValueType, LlamaFileType

    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{form}"])


def _packed(tensor: Any, form: str) -> tuple[np.ndarray, Any]:
    """A tensor's values in the wanted type."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    values = dequantize(tensor.data, tensor.tensor_type)
    if len(tensor.shape) == 1:
        return values.astype(np.float32), GGMLQuantizationType.F32
    is_embedding = tensor.name in ("token_embd.weight", "output.weight")
    kind = GGMLQuantizationType[_EMBEDDING.get(form, form) if is_embedding else form]
    return quantize(values.astype(np.float32), kind), kind


def _directory(model: Path, target: Path, transformers: Recipe, tell: Tell) -> Path:
    """transformers' own reading of a GGUF file, saved; made beside its place and moved there when it is whole."""
    if target.exists():
        return target
    python = python_of(transformers, tell)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tell("writing the model as a directory")
    job: Mapping[str, Any] = {"gguf": str(model.resolve()), "to": str(partial)}
    command = [str(python), "-P", str(process.RUNNERS / "convert.py")]
    done = process.run(command, job, limit_s=CONVERT_LIMIT_S, env=environment(transformers))
    if done.failed:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"the model can't be written as a directory: {done.failed}")
    partial.replace(target)
    return target
