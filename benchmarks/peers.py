"""Firstlight beside transformers on the same weights, in one run on one machine.

    python benchmarks/peers.py smollm2 --prompt-tokens 512,2048,8000 --context 512,8000 --rounds 3

Each round starts one process per engine, in turn, so that a drift of the machine's speed meets both. A process loads
the model, warms up with one short prompt, then times the first token of each prompt length and the decode steps after
it. Printed: a table of medians with the ratio, and one JSON line. Both engines run the same bf16 weights (ours from the
file, transformers' from our float32 export of it), the same token ids, the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DECODE_TOKENS = 33


def main() -> None:
    args = _arguments()
    if args.engine:
        print(json.dumps(ENGINES[args.engine](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        export(args.model, Path(folder))
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in args.engines.split(",")}
        for number in range(args.rounds):
            for name in samples:
                print(f"round {number + 1}/{args.rounds}: {name}", file=sys.stderr, flush=True)
                samples[name].append(_child(name, args, folder))
    _print(samples)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", default="512,2048,8000")
    parser.add_argument("--context", default="512,8000", help="prompt lengths after which decode steps are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engines", default="firstlight,transformers", help=", ".join(ENGINES))
    parser.add_argument(
        "--text", type=Path, default=Path(__file__), help="a file whose tokens, repeated, are the prompt"
    )
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(name: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, args.model, "--engine", name, "--folder", folder]
    for key in ("prompt_tokens", "context", "threads", "text"):
        command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def export(model: str, folder: Path) -> None:
    """The model's float32 tensors as a directory that transformers loads; the token ids of the text beside them."""
    from safetensors.torch import save_file

    from firstlight.models.weights.checkpoint import open_checkpoint
    from firstlight.models.weights.hub import resolve

    checkpoint = open_checkpoint(resolve(model))
    config = checkpoint.config
    tensors = {name: checkpoint.tensor(name).contiguous() for name in checkpoint.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tie_head,
    }
    (folder / "config.json").write_text(json.dumps(facts))


def prompt_ids(args: argparse.Namespace, length: int) -> list[int]:
    """Real text, repeated to the length; every length begins differently, so that no cache helps."""
    from firstlight.models.weights.checkpoint import open_checkpoint
    from firstlight.models.weights.hub import resolve
    from firstlight.prompt.tokenizer import Tokenizer

    ids = Tokenizer.from_source(open_checkpoint(resolve(args.model)).tokenizer_source).encode(args.text.read_text())
    return (ids * (length // len(ids) + 2))[length % len(ids) :][:length]


def _times(step: Any) -> list[float]:
    """Seconds of each call of `step` until it says that it was the last."""
    seconds, more = [], True
    while more:
        began = time.perf_counter()
        more = step()
        seconds.append(time.perf_counter() - began)
    return seconds


def run_firstlight(args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    began = time.perf_counter()
    from firstlight.core.request import SamplingParams
    from firstlight.llm import LLM

    llm = LLM(args.model, threads=args.threads, prefix_cache="off", **options)
    load_s = time.perf_counter() - began

    def measure(length: int, new: int) -> list[float]:
        ids = prompt_ids(args, length)
        stream = llm.stream(ids, SamplingParams(max_tokens=new, ignore_eos=True))
        return _times(lambda: next(stream).completion is None)

    return _measure(args, measure, load_s)


def run_transformers(args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16).eval()
    load_s = time.perf_counter() - began

    @torch.inference_mode()
    def measure(length: int, new: int) -> list[float]:
        state: dict[str, Any] = {"ids": torch.tensor([prompt_ids(args, length)]), "past": None, "left": new}

        def step() -> bool:
            out = model(state["ids"], past_key_values=state["past"], use_cache=True, logits_to_keep=1)
            state["ids"] = out.logits[:, -1].argmax(-1, keepdim=True)
            state["past"], state["left"] = out.past_key_values, state["left"] - 1
            int(state["ids"])
            return bool(state["left"])

        return _times(step)

    return _measure(args, measure, load_s)


def _measure(args: argparse.Namespace, measure: Any, load_s: float) -> dict[str, Any]:
    measure(64, 3)
    result: dict[str, Any] = {"load_s": load_s, "ttft_s": {}, "decode_ms": {}}
    contexts = [int(n) for n in args.context.split(",") if n]
    for length in sorted({int(n) for n in args.prompt_tokens.split(",")} | set(contexts)):
        seconds = measure(length, DECODE_TOKENS if length in contexts else 1)
        result["ttft_s"][str(length)] = seconds[0]
        if length in contexts:
            result["decode_ms"][str(length)] = statistics.median(seconds[1:]) * 1e3
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return result


ENGINES: dict[str, Any] = {
    "firstlight": run_firstlight,
    "firstlight-deterministic": lambda args: run_firstlight(args, deterministic=True),
    "firstlight-f32": lambda args: run_firstlight(args, precision="f32"),
    "transformers": run_transformers,
}


def _print(samples: dict[str, list[dict[str, Any]]]) -> None:
    base, *others = samples
    rows = []
    for metric in ("ttft_s", "decode_ms"):
        for length in samples[base][0][metric]:
            rows.append((metric, length, {n: [s[metric][length] for s in runs] for n, runs in samples.items()}))
    for metric in ("load_s", "peak_rss_mb"):
        rows.append((metric, "", {n: [s[metric] for s in runs] for n, runs in samples.items()}))
    for metric, length, values in rows:
        middle = {n: statistics.median(v) for n, v in values.items()}
        ratios = "  ".join(f"{o}/{base} {middle[o] / middle[base]:.2f}" for o in others)
        shown = "  ".join(f"{n} {m:.3f} [{min(values[n]):.3f}-{max(values[n]):.3f}]" for n, m in middle.items())
        print(f"{metric:12} {length:>6}  {shown}  {ratios}")
    print(json.dumps(samples))


if __name__ == "__main__":
    main()
