"""How fast this machine really is at the two kinds of work, learned while it works: sizes slices of a pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch.nn.functional import pad

from firstlight.attention.grid import pairs
from firstlight.kernels.contract import AttnCall

SLICE_S = 0.02
"""No stretch of a pass between two stops takes longer, if predictions err by two at most."""
_AIM_S = SLICE_S / 2
"""What a slice is predicted to take."""
_BLOCKS = (2048, 1024, 512, 256, 128, 64)
_FIRST_GUESS = 5e10
"""Operations a second before anything was measured: slow, so that first slices are short."""
_MEMORY = 0.7


@dataclass(slots=True)
class Rate:
    """Operations a second, a moving mean over what was observed."""

    per_second: float = _FIRST_GUESS

    def observe(self, stretches: Iterable[tuple[float, float]]) -> None:
        """Operations and seconds of some stretches in a row."""
        long = [(work, seconds) for work, seconds in stretches if work > 1e8 and seconds > 0]
        if long:
            kept = _MEMORY ** len(long)
            work, seconds = map(sum, zip(*long))
            self.per_second = kept * self.per_second + (1 - kept) * work / seconds

    def rows(self, work_per_row: float) -> int:
        """The largest block of rows that fits a slice; few sizes, since each new one costs the linears set-up time."""
        allowed = _AIM_S * self.per_second / work_per_row
        return next((b for b in _BLOCKS if b <= allowed), _BLOCKS[-1])


def padded(rows: int) -> int:
    """Rows that a block really runs with: a few counts only, and enough that linears keep a row's bits."""
    return max(4, 1 << (rows - 1).bit_length()) if rows < 64 else -(-rows // 64) * 64


def attend_work(call: AttnCall, ends: Sequence[int]) -> list[tuple[int, float]]:
    """(end row, operations) of the rows up to each of `ends`, on keys that plan and model window let them read."""
    plan, window, memo, tok = call.plan, call.model_window, call.rows.memo, call.rows.tok
    key = ("work", tuple(ends), window)
    if plan is None and key in memo:
        known: list[tuple[int, float]] = memo[key]
        return known
    heads, dim = call.q.shape[1:]
    if plan is None:
        keys = heads * (tok + 1).double()
    else:
        near, far, rows = pairs(plan, tok)
        keys = (near + far).sum(1).repeat_interleave(rows.long())
    if window is not None:
        keys = keys.clamp(max=heads * window)
    upto = pad(keys.cumsum(0), (1, 0))[[0, *ends]]
    work = list(zip(ends, (4.0 * dim * upto.diff()).tolist()))
    if plan is None:
        memo[key] = work
    return work


def slices(tiles: Sequence[tuple[int, float]], rate: Rate) -> Iterator[tuple[int, int, float]]:
    """Join tiles (end row, operations) into slices (first row, end row, operations) of at most _AIM_S predicted."""
    begin, end, work = 0, 0, 0.0
    for tile_end, tile_work in tiles:
        if end > begin and (work + tile_work) / rate.per_second > _AIM_S:
            yield begin, end, work
            begin, work = end, 0.0
        end, work = tile_end, work + tile_work
    if end > begin:
        yield begin, end, work
