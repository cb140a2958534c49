"""What methods save, in one run: time to first token, decode step and KV bytes beside dense, and each one's bound.

    python benchmarks/methods.py smollm2 --prompt-tokens 4096,8000 --rounds 3 \
        --method fastkv:tsp_idx=14,tsp_rate=0.2,retain_rate=0.1 --method lazyllm

Each round runs every setting once, dense first, each in a process of its own that warms up with a short prompt; a drift
of the machine's speed meets all. The bound of a setting is what its prefill takes if nothing but its cells cost
anything: linears by rows, attention by the pairs that are read (docs/metrics.md). `over` is attention's time by density
times dense's, `calls` its stretches between two stops. `--baseline CHECKOUT` adds dense runs of another checkout of the
project, for what a change costs where nothing is switched on. Printed: a table of medians and extremes, and one JSON
line. `--out` keeps each run as a line of its own as soon as it is there, and a call takes from that file what it has:
one that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DENSE, BASELINE = "dense", "baseline"
NEW = 33


def main() -> None:
    args = _arguments()
    if args.setting is not None:
        print(json.dumps(measure(args)))
        return
    from firstlight.evaluate.records import Records  # here: a baseline's processes have another checkout's

    settings = [DENSE, *([BASELINE] if args.baseline else []), *args.method]
    lengths = [int(n) for n in args.prompt_tokens.split(",")]
    samples: dict[str, list[dict[str, Any]]] = {f"{s} {n}": [] for n in lengths for s in settings}
    records = Records(args.out)
    for number in range(args.rounds):
        for length in lengths:
            for setting in settings:
                print(f"round {number + 1}/{args.rounds}: {length} tokens, {setting}", file=sys.stderr, flush=True)
                run = {"model": args.model, "precision": args.precision, "setting": setting}
                run |= {"length": length, "round": number}
                found = records.find(run)
                if found is None:
                    records.add(run, found := _run(args, setting, length))
                samples[f"{setting} {length}"].append(found)
    _print(settings, lengths, samples)
    print(json.dumps({"arguments": vars(args), "samples": samples}, default=str))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", action="append", default=[], metavar="NAME:key=value")
    parser.add_argument("--prompt-tokens", default="4096,8000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--baseline", type=Path, help="another checkout, whose engine runs dense beside this one's")
    parser.add_argument("--out", type=Path, help="JSON lines of finished runs, kept and used")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(args: argparse.Namespace, setting: str, length: int) -> dict[str, Any]:
    command = [sys.executable, __file__, args.model, "--precision", args.precision]
    env = dict(os.environ)
    if setting == BASELINE:
        env["PYTHONPATH"] = str(args.baseline / "src")
    done = subprocess.run(
        [*command, "--setting", setting, "--length", str(length)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One setting once, in this process."""
    from firstlight import LLM, SamplingParams
    from firstlight.evaluate.speed import prompt_of

    methods = [] if args.setting in (DENSE, BASELINE) else args.setting.split(" + ")
    with LLM(args.model, methods=methods, precision=args.precision, prefix_cache="off", max_num_seqs=1) as llm:
        llm.generate([prompt_of(llm, 300)], SamplingParams(max_tokens=3, ignore_eos=True))
        machine: Any = llm.engine.machine
        machine.holds = False  # a call that is noted only has no time
        machine.planning = Timed(machine.planning, "plan", lambda model, layer, member, *_: not member.decode)
        machine.ops = Timed(machine.ops, "attend", lambda call, *_: not call.rows.decode[0])
        report = llm.generate([prompt_of(llm, args.length)], SamplingParams(max_tokens=NEW, ignore_eos=True))[0].report
        c = llm.config
        return {
            "ttft_s": report["ttft_s"],
            "tpot_s": report["tpot_s"],
            "kv": report["kv"],
            "cells": report["cells"],
            "density": report["attention"]["density"],
            "methods": report["methods"],
            "planning_s": machine.planning.seconds,
            "attention_s": machine.ops.seconds,
            "calls": machine.ops.calls,
            "digest_bytes": machine.planning.digests.nbytes,
            "linear_flops": 2.0
            * sum(s[0] * s[1] for n, s in llm.engine.machine.model.linears.shapes.items() if n != "head"),
            "pair_flops": 4.0 * c.num_heads * c.head_dim * c.num_layers,
        }


class Timed:
    """Something whose calls of one name are timed, those that `counts` says."""

    def __init__(self, inner: Any, name: str, counts: Callable[..., bool]) -> None:
        self._inner, self._name, self._counts, self.seconds = inner, name, counts, 0.0
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(self._timed, found) if name == self._name else found

    def _timed(self, call: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        result = call(*args)
        if self._counts(*args):
            self.seconds += time.perf_counter() - began
            self.calls += 1
        return result


def bound(run: dict[str, Any], dense: dict[str, Any], length: int) -> float:
    """The share of dense's operations, of which windows of the model's own leave fewer, that a setting's cells take."""
    linear, attention = run["linear_flops"] * length, run["pair_flops"] * length * (length + 1) / 2
    rows = run["cells"]["computed"] / run["cells"]["total"]
    return (linear * rows + attention * run["density"]) / (linear + attention * dense["density"])


def _print(settings: list[str], lengths: list[int], samples: dict[str, list[dict[str, Any]]]) -> None:
    width = max(len(s) for s in settings)
    heading = "tokens  TTFT s                of dense  bound  ms/token  of dense  KV MB, end  of dense, peak"
    heading += "  density  planning s  attention s  over  calls  both of dense  digests MB"
    print(f"{'setting':{width}}  {heading}")
    for length in lengths:
        dense = samples[f"{DENSE} {length}"]
        for setting in settings:
            print(f"{setting:{width}}  {length:6}  {_figures(setting, samples[f'{setting} {length}'], dense, length)}")


def _figures(setting: str, runs: list[dict[str, Any]], dense: list[dict[str, Any]], length: int) -> str:
    """Medians, each beside what it is of dense's."""
    ttft, tpot, ttft_0, tpot_0 = (
        statistics.median(run[key] for run in of) for of in (runs, dense) for key in ("ttft_s", "tpot_s")
    )
    spread = f"{min(r['ttft_s'] for r in runs):.2f}-{max(r['ttft_s'] for r in runs):.2f}"
    least = "" if setting == BASELINE else f"{bound(runs[0], dense[0], length):.2f}"
    kv, whole, whole_density = runs[0]["kv"], dense[0]["kv"], dense[0]["density"]
    shares = f"{kv['bytes_end'] / whole['bytes_end']:8.2f}  {kv['bytes_peak'] / whole['bytes_peak']:4.2f}"
    planning, attention, attention_0 = (
        statistics.median(run[key] for run in of)
        for of, key in ((runs, "planning_s"), (runs, "attention_s"), (dense, "attention_s"))
    )
    over = attention / attention_0 / (runs[0]["density"] / whole_density)
    planned = f"{runs[0]['density']:7.3f}  {planning:10.2f}  {attention:11.2f}  {over:4.2f}  {runs[0]['calls']:5}"
    planned += f"  {(planning + attention) / attention_0:13.2f}"
    planned += f"  {runs[0]['digest_bytes'] / 1e6:10.2f}"
    return (
        f"{ttft:6.2f} [{spread:11}]  {ttft / ttft_0:8.2f}  {least:5}  {tpot * 1e3:8.1f}  {tpot / tpot_0:8.2f}"
        f"  {kv['bytes_end'] / 1e6:10.1f}  {shares}  {planned}"
    )


if __name__ == "__main__":
    main()
