"""From records to scores: each with its interval, and with its paired difference from dense on the same samples.

Everything is a statistic of sums over clusters: windows of rows for a reading, samples for a retrieval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from firstlight.evaluate.intervals import Statistic, Sums, resampled, sign_test, wilson
from firstlight.evaluate.reading import SUMS
from firstlight.evaluate.retrieval import PLACEMENTS, SECOND

Record = dict[str, Any]
Records = Sequence[Record]
Row = dict[str, Any]
Scores = Callable[[Records, Records | None], list[Row]]
"""(records, dense's records of the same samples; None if these are dense's) -> rows of the table."""

FLOOR = 0.9
"""A retrieval score counts only where dense reaches so much: below, it would judge the model and not the method."""
GAIN_FROM = 1.05
"""Context gain is judged on texts that are so much harder to a truncated reader; elsewhere it is noise."""

DEPTHS = 5
"""Parts of a text in the table by depth."""

_FIGURES = ("recall", "rest", "error")
_ROWS, _KL, _TOP1, _NLL, _NLL_REFERENCE, _NLL_TRUNCATED = range(len(SUMS))


def agreement(records: Records, dense: Records | None) -> list[Row]:
    """Share of rows whose likeliest token is the reference's; KL from the reference, in nats, beside it."""
    return [_reading(at, _share(_TOP1), records, dense) for at in _places(records)]


def perplexity(records: Records, dense: Records | None) -> list[Row]:
    """exp of the mean surprise; beside it the reference's, each text's, and the context gain that is kept."""
    rows = [_reading(at, _perplexity(_NLL), records, dense) for at in _places(records)]
    return [row | _context(row["at"], records) for row in rows]


def context_gain(records: Records, dense: Records | None) -> list[Row]:
    """The context gain that is kept, and its difference from dense's; n/a where no text has one."""
    return [_gain_kept(at, records, dense) for at in _places(records)]


def retrieval(records: Records, dense: Records | None) -> list[Row]:
    """Share of right answers, for each place of the question; and the same by depth, where there is one."""
    places = [at for at in (*PLACEMENTS, SECOND) if any(at in record for record in records)]
    return [_answers(at, records, dense) for at in places]


def recall(records: Records, dense: Records | None) -> list[Row]:
    """Share of dense softmax mass on the keys that are read, in the mean over layers; beside it the output's error."""
    clusters = np.array([[1, *(layer[key] for key in _FIGURES)] for r in records for layer in r["layers"]], np.float64)
    estimates = {key: estimate(clusters, _share(1 + i)) for i, key in enumerate(_FIGURES)}
    score, low, high = estimates["recall"]
    error, error_low, error_high = estimates["error"]
    row = {"at": "prompt", "score": score, "low": low, "high": high, "samples": len(records), "clusters": len(clusters)}
    row |= {"kl": None, "top1": None, "against_dense": None, "recall_rest": estimates["rest"][0]}
    row |= {"error": error, "error_low": error_low, "error_high": error_high}
    layers = [{"book": r["book"], **layer} for r in records for layer in r["layers"]]
    return [row | {"planner_s": sum(r["planner_s"] for r in records) / len(records), "layers": layers}]


def together(rows: Sequence[Row]) -> list[Row]:
    """All paired samples of each setting and length: what every task and place won and lost, one line for each."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        less = row["against_dense"] or {}
        if "won" in less:
            first = {"name": row["name"], "length": row["length"], "samples": 0, "won": 0, "lost": 0, "rows": 0}
            sums = found.setdefault((row["name"], row["length"]), first)
            sums |= {key: sums[key] + less[key] for key in ("won", "lost")}
            sums |= {"samples": sums["samples"] + row["samples"], "rows": sums["rows"] + 1}
    return [sums | _verdict(sums["won"], sums["lost"], sums["samples"]) for sums in found.values()]


def estimate(clusters: Sums, statistic: Statistic) -> tuple[float, float, float]:
    """A statistic of all clusters [n, m], and its interval; NaN where there is nothing."""
    if not len(clusters):
        return math.nan, math.nan, math.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(statistic(clusters.sum(0))), *resampled(clusters, statistic)


def difference(clusters: Sums, dense: Sums, statistic: Statistic) -> Row | None:
    """The statistic minus dense's, paired by cluster; None where a method left rows out, so that there are no pairs."""
    if clusters.shape != dense.shape or (clusters[:, 0] != dense[:, 0]).any():
        return None
    width = clusters.shape[1]
    pairs = np.concatenate([clusters, dense], axis=1)
    found = estimate(pairs, lambda sums: statistic(sums[..., :width]) - statistic(sums[..., width:]))
    return dict(zip(("difference", "low", "high"), found))


def _share(column: int) -> Statistic:
    return lambda sums: sums[..., column] / sums[..., 0]


def _perplexity(column: int) -> Statistic:
    return lambda sums: np.exp(sums[..., column] / sums[..., _ROWS])


def _gain(sums: Sums) -> Any:
    truncated, own, whole = (_perplexity(column)(sums) for column in (_NLL_TRUNCATED, _NLL, _NLL_REFERENCE))
    return (truncated - own) / (truncated - whole)


def _places(records: Records) -> list[str]:
    """Where rows were looked at."""
    return [at for at in ("prompt", "probe_rows", "continuation") if any(record[at] for record in records)]


def _windows(records: Records, at: str) -> Sums:
    """The sums of all windows in which rows were seen, [n, len(SUMS)], NaN for what is None."""
    windows = [window for record in records for window in record[at] if window["rows"]]
    return np.array([[window[key] for key in SUMS] for window in windows], np.float64).reshape(-1, len(SUMS))


def _reading(at: str, statistic: Statistic, records: Records, dense: Records | None) -> Row:
    """What both tasks on readings say of one place."""
    windows = _windows(records, at)
    score, low, high = estimate(windows, statistic)
    kl, kl_low, kl_high = estimate(windows, _share(_KL))
    return {
        "at": at,
        "score": score,
        "low": low,
        "high": high,
        "samples": int(windows[:, _ROWS].sum()),
        "clusters": len(windows),
        "kl": kl,
        "kl_low": kl_low,
        "kl_high": kl_high,
        "top1": estimate(windows, _share(_TOP1))[0],
        "against_dense": None if dense is None else difference(windows, _windows(dense, at), statistic),
    }


def _context(at: str, records: Records) -> Row:
    """Each text's perplexity, and the context gain kept on the texts that have one."""
    texts = [_text(record["book"], _windows([record], at)) for record in records]
    gain, low, high = estimate(_judged_windows(at, records), _gain)
    reference = estimate(_windows(records, at), _perplexity(_NLL_REFERENCE))[0]
    facts = {
        "gain_kept": gain,
        "gain_low": low,
        "gain_high": high,
        "gain_texts": sum(_is_harder(r, at) for r in records),
    }
    return {"reference": reference, **facts, "texts": texts}


def _text(book: str, windows: Sums) -> Row:
    """One text: perplexities, and how much harder it is to a reader of the last tokens only (NaN if short)."""
    own, whole = (estimate(windows, _perplexity(column))[0] for column in (_NLL, _NLL_REFERENCE))
    cut = _with_cut(windows)
    truncated = estimate(cut, lambda s: _perplexity(_NLL_TRUNCATED)(s) / _perplexity(_NLL_REFERENCE)(s))[0]
    return {"book": book, "perplexity": own, "reference": whole, "truncated_ratio": truncated}


def _with_cut(windows: Sums) -> Sums:
    """The windows whose truncated reader lacked something."""
    return windows[~np.isnan(windows[:, _NLL_TRUNCATED])]


def _gain_kept(at: str, records: Records, dense: Records | None) -> Row:
    row = _reading(at, _perplexity(_NLL), records, None) | _context(at, records)
    kept = _judged_windows(at, records)
    score = {"score": row["gain_kept"], "low": row["gain_low"], "high": row["gain_high"], "perplexity": row["score"]}
    less = None if dense is None else difference(kept, _judged_windows(at, dense), _gain)
    note = {} if row["gain_texts"] else {"note": "n/a: no gain to keep"}
    counts = {"samples": int(kept[:, _ROWS].sum()), "clusters": len(kept)}
    return row | score | counts | {"against_dense": less} | note


def _judged_windows(at: str, records: Records) -> Sums:
    """The windows with a truncated reader, of the texts that are harder to him."""
    return _with_cut(_windows([record for record in records if _is_harder(record, at)], at))


def _is_harder(record: Record, at: str) -> bool:
    return bool(_text(record["book"], _windows([record], at))["truncated_ratio"] >= GAIN_FROM)


def _answers(at: str, records: Records, dense: Records | None) -> Row:
    """One place of the question; no score where dense itself can't do it."""
    right = _right(records, at)
    n, found = len(right), float(right[:, 1].sum())
    low, high = wilson(found, n)
    row = {
        "at": at,
        "score": found / n,
        "low": low,
        "high": high,
        "samples": n,
        "clusters": n,
        "kl": None,
        "top1": None,
    }
    row |= {"depths": _by_depth(records, at)}
    if dense is None:
        return row | {"against_dense": None}
    theirs = _right(dense, at)
    known = float(theirs[:, 1].sum())
    if known < FLOOR * n:
        nothing = dict.fromkeys(("score", "low", "high", "against_dense", "depths"))
        return row | nothing | {"note": f"n/a: dense finds {known:g} of {n}"}
    changed = right[:, 1] - theirs[:, 1]
    counts = _verdict(int((changed > 0).sum()), int((changed < 0).sum()), n)
    return row | {"against_dense": (difference(right, theirs, _share(1)) or {}) | counts}


def _verdict(won: int, lost: int, n: int) -> Row:
    """Samples of n that a setting does better than dense, and worse; `p`: how likely so uneven a split is by chance."""
    return {"won": won, "lost": lost, "net": won - lost, "equal": n - won - lost, "p": sign_test(won, lost)}


def _right(records: Records, at: str) -> Sums:
    """[n, 2]: a sample, and its share of right values."""
    return np.array([[1, record[at]] for record in records if at in record], np.float64)


def _by_depth(records: Records, at: str) -> list[Row] | None:
    """The score in each part of the text, from its beginning; None where answers lie in several places."""
    found = [(record["depth"], float(record[at])) for record in records if at in record]
    if at == SECOND or any(depth is None for depth, _ in found):
        return None
    parts: list[list[float]] = [[] for _ in range(DEPTHS)]
    for depth, right in found:
        parts[int(depth * DEPTHS)].append(right)
    return [
        {"from": i / DEPTHS, "to": (i + 1) / DEPTHS, "samples": len(p), "score": sum(p) / len(p) if p else None}
        for i, p in enumerate(parts)
    ]
