"""What a prefill costs beside its kernels: the time to first token inside the engine, less what is native of it.

    python benchmarks/outside.py smollm2 --tokens 512,2048,8000

From `add` to the first token, one request at a time. Native are the noted calls of the layers, as the tape times them,
and the embedding and the head, as timers around them do. All else is counted: admission, policy and view, blocks and
places, angles, noting calls, stops, sampling.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from firstlight import LLM
from firstlight.core.request import Request, SamplingParams
from firstlight.engine.held import Held
from firstlight.engine.work import Stop
from firstlight.kernels.tape import Bell


class Native:
    """Seconds in native code, by kind, since it was emptied."""

    def __init__(self) -> None:
        self.seconds = {"layers": 0.0, "embedding": 0.0, "head": 0.0}

    def listen(self, model: Any) -> None:
        """To every tape of held layers, and to a model."""
        stretches = Held.stretches

        def listened(held: Held, bell: Bell) -> Iterator[list[tuple[Stop, float]]]:
            for passed in stretches(held, bell):
                self.seconds["layers"] += sum(seconds for _, seconds in passed)
                yield passed

        Held.stretches = listened  # type: ignore[method-assign]
        model.embed, model.head = self._timed("embedding", model.embed), self._timed("head", model.head)

    def _timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            before = time.perf_counter()
            made = function(*args)
            self.seconds[kind] += time.perf_counter() - before
            return made

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", default="512,2048,8000")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--repeat", type=int, default=10, help="runs of each length, after two that warm up")
    args = parser.parse_args()
    lengths = [int(n) for n in args.tokens.split(",")]
    llm = LLM(args.model, max_model_len=max(lengths) + 2, prefix_cache="off", precision=args.precision)
    native = Native()
    native.listen(llm.engine.machine.model)
    print(f"{'tokens':>7} {'ms':>8} {'layers':>8} {'embedding':>9} {'head':>6} {'outside':>8} {'share':>7}")
    for n in lengths:
        runs = [measure(llm, native, n, number) for number in range(args.repeat + 2)][2:]
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        share = statistics.median(run["outside"] / run["total"] for run in runs)
        cells = f"{row['total']:8.1f} {row['layers']:8.1f} {row['embedding']:9.2f} {row['head']:6.2f}"
        print(f"{n:7} {cells} {row['outside']:8.2f} {share:7.2%}")
        print(json.dumps({"tokens": n, **row, "share": share}))
    llm.close()


def measure(llm: LLM, native: Native, n: int, number: int) -> dict[str, float]:
    """Milliseconds of one request of n made-up tokens."""
    ids = [(7 * j * j + 13 * j + number) % 20000 + 100 for j in range(n)]
    native.seconds = dict.fromkeys(native.seconds, 0.0)
    engine = llm.engine
    began = time.perf_counter()
    live = engine.add(Request(f"{n}-{number}", ids, SamplingParams(max_tokens=2, ignore_eos=True)))
    while not live.stamps.first_token:
        engine.step()
    total = live.stamps.first_token - began
    spent = {kind: 1e3 * seconds for kind, seconds in native.seconds.items()}
    while engine.has_work:
        engine.step()
    return {"total": 1e3 * total, **spent, "outside": 1e3 * total - sum(spent.values())}


if __name__ == "__main__":
    main()
