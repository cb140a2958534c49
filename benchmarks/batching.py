"""What a batch gains, beside transformers: the same requests one at a time, and all at once.

    python benchmarks/batching.py smollm2 --batch 16 --prompt-tokens 512 --tokens 128 --rounds 3

Each round starts one process per engine, in turn, so that a drift of the machine's speed meets both. A process loads
the model, warms up, then runs one request alone and a batch. Both engines run the same bf16 weights (transformers
unpacks the GGUF file itself), prompts cut from the same text at the same places, and the same number of threads; all
requests generate greedily to the last token. Printed: medians with their extremes, and one JSON line.

`firstlight` is `firstlight bench throughput`; `transformers` is one call of `generate` with a rectangular batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any


def main() -> None:
    args = _arguments()
    if args.engine:
        print(json.dumps(ENGINES[args.engine](args)))
        return
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    for number in range(args.rounds):
        for name in ENGINES:
            print(f"round {number + 1}/{args.rounds}: {name}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--engine", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            samples[name].append(json.loads(done.stdout.splitlines()[-1]))
    _print(args, samples)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file, or a name of `firstlight models list`")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_firstlight(args: argparse.Namespace) -> dict[str, float]:
    from firstlight.evaluate.throughput import measure
    from firstlight.llm import LLM

    length = args.prompt_tokens + args.tokens
    options = {"threads": args.threads, "max_num_seqs": args.batch, "max_model_len": length, "prefix_cache": "off"}
    with LLM(args.model, **options) as llm:
        alone, batch = measure(llm, [args.batch], [args.prompt_tokens], num_new=args.tokens, repeat=1)
    return {"alone_s": alone["wall_s"]["median"], "batch_s": batch["wall_s"]["median"]}


def run_transformers(args: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from firstlight.evaluate.throughput import prompts
    from firstlight.models.weights.checkpoint import open_checkpoint
    from firstlight.models.weights.hub import resolve
    from firstlight.prompt.tokenizer import Tokenizer

    torch.set_num_threads(args.threads)
    path = resolve(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    ).eval()
    tokenizer = Tokenizer.from_source(open_checkpoint(path).tokenizer_source)
    ids = torch.tensor(prompts(tokenizer.encode, [args.prompt_tokens], args.batch))

    def seconds(batch: torch.Tensor, tokens: int) -> float:
        began = time.perf_counter()
        out = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        assert out.shape[1] == batch.shape[1] + tokens
        return time.perf_counter() - began

    result = {}
    for name, batch in (("alone_s", ids[:1]), ("batch_s", ids)):
        seconds(batch, 2)
        result[name] = seconds(batch, args.tokens)
    return result


ENGINES: dict[str, Any] = {"firstlight": run_firstlight, "transformers": run_transformers}


def _print(args: argparse.Namespace, samples: dict[str, list[dict[str, float]]]) -> None:
    """Seconds of each run; new tokens a second of a batch and of one request, and what one is to the other."""
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in samples.items()
    }
    for key, count in (("alone_s", 1), ("batch_s", args.batch)):
        for name, runs in samples.items():
            values = [run[key] for run in runs]
            rate = count * args.tokens / middle[name][key]
            spread = f"{middle[name][key]:.2f} s [{min(values):.2f}-{max(values):.2f}]"
            print(
                f"{name:12}  {count:3} x ({args.prompt_tokens} + {args.tokens})  {spread:24}  {rate:7.1f} new tokens/s"
            )
    for name, seconds in middle.items():
        print(f"{name:12}  gain of the batch: {args.batch * seconds['alone_s'] / seconds['batch_s']:.2f}x")
    ours, theirs = middle["firstlight"], middle["transformers"]
    print(f"transformers / firstlight: alone {theirs['alone_s'] / ours['alone_s']:.2f}, batch", end=" ")
    print(f"{theirs['batch_s'] / ours['batch_s']:.2f}")
    print(json.dumps({"arguments": vars(args), "samples": samples}))


if __name__ == "__main__":
    main()
