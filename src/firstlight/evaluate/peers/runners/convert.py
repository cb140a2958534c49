"""Writes a GGUF file as a directory that transformers and vLLM load, in bf16. Runs where transformers is installed.

The job on stdin: {"gguf": file, "to": directory}. transformers unpacks the file, so the result is what it would run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.load(sys.stdin)
    convert(Path(job["gguf"]), Path(job["to"]))
    print("{}")


def convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    model.hf_quantizer = None  # it would refuse to save what it unpacked
    model.save_pretrained(target)
    config = json.loads((target / "config.json").read_text("utf-8"))
    config.pop("quantization_config", None)  # the tensors are plain bf16 now
    (target / "config.json").write_text(json.dumps(config), "utf-8")


if __name__ == "__main__":
    main()
