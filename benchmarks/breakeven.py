"""Is the profiler right about when shortening a prompt pays? 50 requests that it wasn't measured on, timed both ways.

    firstlight calibrate smollm2 llmlingua
    python benchmarks/breakeven.py smollm2 --requests 50

Each request is a stretch of a book of its own length, rate and number of generated tokens, drawn by seed. It runs as it
is and shortened by `llmlingua`, in turns, the faster of two each. *Right*: the curves of `firstlight calibrate` said
which of the two takes longer. `--layers all` scores with the whole model (calibrate with `llmlingua:layers=all`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from firstlight import LLM, SamplingParams
from firstlight.core.calibration import find
from firstlight.core.parts import PromptIds
from firstlight.engine.scorer import ModelScorer
from firstlight.evaluate.books import BOOKS, text_of
from firstlight.models.weights.checkpoint import open_checkpoint
from firstlight.models.weights.hub import resolve
from firstlight.prompt.breakeven import Curves
from firstlight.prompt.llmlingua import LLMLingua, LLMLinguaConfig
from firstlight.train.llmlingua import RATES

GENERATED = 1, 33
SHORTEST = 128


def main() -> None:
    args = _arguments()
    digest = open_checkpoint(resolve(args.model)).digest
    found = find("llmlingua", digest, None)
    assert found is not None, f"run first: firstlight calibrate {args.model} llmlingua:layers={args.layers}"
    curves = Curves(**{key: found.value(key, list) for key in ("prefill", "step", "shorten")})
    with LLM(args.model, threads=args.threads, prefix_cache="off", max_num_seqs=1) as llm:
        rows = list(measure(llm, curves, args))
    right = sum(row["right"] for row in rows)
    off = sorted(abs(row["predicted_s"] / row["shortened_s"] - 1) for row in rows)
    print(f"{right} of {len(rows)} decisions are right")
    print(f"what shortened requests take: off by {off[len(off) // 2]:.1%} in the median")
    for row in rows:
        if not row["right"]:
            print(f"wrong: {row['tokens']} tokens at {row['rate']}, {row['generated']} new: "
                  f"{row['whole_s']:.3f} s as it is, {row['shortened_s']:.3f} s shortened")  # fmt: skip
    print(json.dumps({"arguments": vars(args), "rows": rows}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--layers", default=LLMLinguaConfig.layers)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args()


def measure(llm: LLM, curves: Curves, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each request."""
    draw = random.Random(args.seed)
    books = [llm.encode(text_of(book)) for book in BOOKS]
    for n in range(-1, args.requests):
        length, rate = draw.randint(SHORTEST, args.longest), draw.choice(RATES)
        generated, ids = draw.choice(GENERATED), draw.choice(books)
        first = draw.randrange(len(ids) - length)
        row = _request(llm, curves, args.layers, ids[first : first + length], rate, generated)
        if n >= 0:  # the one before them warms up
            print(f"{n + 1}/{args.requests}: {row}", file=sys.stderr, flush=True)
            yield row


def _request(llm: LLM, curves: Curves, layers: str, ids: list[int], rate: float, generated: int) -> dict[str, Any]:
    params = SamplingParams(max_tokens=generated, temperature=0.0, ignore_eos=True)
    editor = LLMLingua(LLMLinguaConfig(rate=rate, layers=layers))
    editor.bind(llm.config.facts(""), None)

    def whole() -> None:
        llm.generate([ids], params)

    def shortened() -> None:
        prompt = PromptIds(ids, [(0, len(ids))], "", llm.tokenizer.decode)
        llm.generate([list(editor.edit(prompt, ModelScorer(llm.engine.machine.model)).ids)], params)

    seconds: dict[str, list[float]] = {"whole_s": [], "shortened_s": []}
    for _ in range(2):
        for name, run in (("whole_s", whole), ("shortened_s", shortened)):
            seconds[name].append(_timed(run))
    row: dict[str, Any] = {"tokens": len(ids), "rate": rate, "generated": generated}
    row |= {name: min(times) for name, times in seconds.items()}
    said = partial(curves.shortened, len(ids), len(ids), rate, generated)
    row |= {"predicted_s": said(), "predicted_whole_s": curves.whole(len(ids), generated)}
    row["right"] = (row["predicted_s"] < row["predicted_whole_s"]) == (row["shortened_s"] < row["whole_s"])
    return row


def _timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
