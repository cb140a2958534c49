"""OpenVINO GenAI's own sparse prefill, Tri-shape and XAttention, and ours, each beside its dense one, in one run.

    python benchmarks/openvino_sparse.py smollm2 --prompt-tokens 8000 --rounds 2

It is the one CPU engine that ships these two methods, so this is the fair place to hold ours against. All in bf16, its
own on paged attention, whose chunks both need. Each setting is a process of its own, once a round, on the same prompt;
the first one, which is short, isn't counted. Printed: time to first token, of the engine's own dense one, how many of
32 greedy tokens are that one's, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

CHUNK, NEW, WARM = 1024, 32, 300
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "TRISHAPE 64 + 1024": {
        "mode": "TRISHAPE",
        "num_retained_start_tokens_in_cache": 64,
        "num_retained_recent_tokens_in_cache": 1024,
    },
    "XATTENTION 0.9, stride 16": {"mode": "XATTENTION", "xattention_threshold": 0.9, "xattention_stride": 16},
    "XATTENTION 0.9, stride 8": {"mode": "XATTENTION", "xattention_threshold": 0.9, "xattention_stride": 8},
}
OURS = {
    "ours, dense": [],
    "ours, trishape 64 + 1024": ["trishape:sink=64,window=1024"],
    "ours, xattention 0.9, stride 16": ["xattention:tau=0.9,stride=16"],
    "ours, xattention 0.9, stride 8": ["xattention:tau=0.9,stride=8"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    python, job, env = prepare(args)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in [*SETTINGS, *OURS]}
    for number in range(args.rounds):
        for name, runs in found.items():
            print(f"round {number + 1}/{args.rounds}: {name}", file=sys.stderr, flush=True)
            if name in SETTINGS:
                command = [python, "-P", __file__, "--measure"]
                asked = json.dumps(job | {"sparse": SETTINGS[name]})
            else:
                command = [sys.executable, __file__, "--measure-ours"]
                asked = json.dumps(job | {"name": args.model, "methods": OURS[name]})
            how = env if name in SETTINGS else None
            done = subprocess.run(command, check=True, input=asked, stdout=subprocess.PIPE, text=True, env=how)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    for name, runs in found.items():
        base = found["dense" if name in SETTINGS else "ours, dense"]
        ttft, dense = (statistics.median(run["ttft_s"] for run in each) for each in (runs, base))
        same = sum(a == b for a, b in zip(runs[0]["tokens"], base[0]["tokens"]))
        print(f"{name:31} {ttft:6.2f} s  {ttft / dense:5.2f} of dense  {same} of {NEW} tokens")
    print(json.dumps({"arguments": vars(args), "runs": found}))


def prepare(args: argparse.Namespace) -> tuple[str, dict[str, Any], dict[str, str]]:
    """OpenVINO's interpreter, what to run there, and its variables."""
    from firstlight import LLM
    from firstlight.core.config import Options
    from firstlight.evaluate.peers.environments import environment, python_of
    from firstlight.evaluate.peers.files import file_for
    from firstlight.evaluate.peers.recipes import recipes, transformers
    from firstlight.evaluate.speed import prompt_of
    from firstlight.models.weights.hub import resolve

    recipe = recipes(["openvino"], Options())[1]
    with LLM(args.model) as llm:
        prompts = [prompt_of(llm, WARM), prompt_of(llm, args.prompt_tokens)]
    path = file_for("F16", resolve(args.model), transformers(), print)
    job = {"model": str(path), "prompts": prompts, "threads": args.threads}
    return str(python_of(recipe, print)), job, dict(environment(recipe))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """In OpenVINO's environment: seconds to the long prompt's first token, and the tokens."""
    import numpy
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = CHUNK, False
    scheduler.num_kv_blocks = (len(job["prompts"][-1]) + 4 * NEW) // 16 + 1
    if job["sparse"]:
        sparse = job["sparse"] | {"mode": getattr(genai.SparseAttentionMode, job["sparse"]["mode"])}
        scheduler.use_sparse_attention = True
        scheduler.sparse_attention_config = genai.SparseAttentionConfig(**sparse)
    exact = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    pipe = genai.LLMPipeline(
        job["model"],
        "CPU",
        ATTENTION_BACKEND="PA",
        INFERENCE_NUM_THREADS=job["threads"],
        scheduler_config=scheduler,
        **exact,
    )
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample, config.apply_chat_template = NEW, True, False, False
    came: list[tuple[float, int]] = []

    class Streamer(genai.StreamerBase):  # type: ignore[misc, name-defined]
        def write(self, tokens: Any) -> Any:
            came.extend((time.perf_counter(), token) for token in (tokens if isinstance(tokens, list) else [tokens]))
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    for prompt in job["prompts"]:
        came.clear()
        began = time.perf_counter()
        pipe.generate(openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), config, Streamer())
    return {"ttft_s": came[0][0] - began, "tokens": [token for _, token in came]}


def measure_ours(job: dict[str, Any]) -> dict[str, Any]:
    """The same of this engine."""
    from firstlight import LLM, SamplingParams

    with LLM(job["name"], methods=job["methods"], threads=job["threads"], prefix_cache="off") as llm:
        for prompt in job["prompts"]:
            [answer] = llm.generate([prompt], SamplingParams(max_tokens=NEW, ignore_eos=True))
    return {"ttft_s": answer.report["ttft_s"], "tokens": answer.token_ids}


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure(json.loads(sys.stdin.read()))))
    elif sys.argv[1:] == ["--measure-ours"]:
        print(json.dumps(measure_ours(json.loads(sys.stdin.read()))))
    else:
        main()
