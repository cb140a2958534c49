"""`minference`: each head reads in a shape of its own; where its lines lie is seen in the prompt (arXiv 2407.02490).

A head's shape, and how much of it is read, was searched beforehand (`train/minference.py`): columns and diagonals,
clusters of blocks, or first and last tokens. What the last 64 rows of a pass look at says which columns and diagonals
(section 3.2); mean queries by mean keys say which blocks. A head that the table doesn't have reads columns and
diagonals, at the price of those that it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from firstlight.attention.grid import Grid
from firstlight.attention.patterns import BAND, BLOCKS, LINES, Pattern, read_published, read_table
from firstlight.attention.probe import probe_operations, probed
from firstlight.core.attn import DENSE, AttnPlan, PlanContext, Planner
from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, ModelFacts
from firstlight.kernels.kv_layout import BLOCK
from firstlight.kernels.ranking import best

LAST = 64
"""Rows that are probed."""
FIRST, NEAR = 30, 100
"""Columns and distances that go before all others, and count as such (the authors' code)."""

Sizes = Mapping[int, tuple[int, int]]
"""Of heads of one kind, ascending, the two numbers."""


@dataclass(frozen=True)
class MInferenceConfig:
    """Raises UserError on values that can't be."""

    vertical: float = field(
        default=1 / 60,
        metadata={
            "doc": "columns that a head without an entry reads: up to 1 a share of those there are, else so many"
        },
    )
    slash: float = field(default=1 / 20, metadata={"doc": "diagonals that it reads, likewise"})
    budget: float = field(default=1.0, metadata={"doc": "factor on what is read, of all heads"})
    searched: bool = field(default=True, metadata={"doc": "off: no head has an entry"})
    exact: bool = field(
        default=False,
        metadata={"doc": "on: the ragged ends of diagonals are read key by key; off: every block that one touches"},
    )

    def __post_init__(self) -> None:
        for key in ("vertical", "slash", "budget"):
            if not getattr(self, key) > 0:
                raise UserError(f"minference: {key}={getattr(self, key)} is too small; give more than 0")


class MInference(Planner):
    """The attention part: for each query head and tile blocks and columns, or a band."""

    name = "minference"
    seam = "attention"
    prompt_only = True
    Config = MInferenceConfig
    identity: ClassVar = {"budget": float(1 << 30)}
    trial: ClassVar = {"vertical": 40.0, "slash": 60.0}
    capability = Capability(
        exact=False, prefix_stable=False, chunk_invariant=False, digests=("mean_k",), looks=True, calibration=True
    )
    read_published = staticmethod(read_published)

    def __init__(self, config: MInferenceConfig) -> None:
        self.config = config
        self.patterns: list[list[Pattern]] = []
        """Of each layer those of the query heads."""

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        table = read_table(calibration, model) if calibration and self.config.searched else [{}] * model.num_layers
        default = Pattern(LINES, self.config.vertical, self.config.slash)
        self.patterns = [[heads.get(h, default) for h in range(model.num_heads)] for heads in table]

    @staticmethod
    def sample(model: ModelFacts) -> dict[str, Any]:
        """A table for a check on a model that has none: every kind, and heads without an entry."""
        kinds = [[LINES, 32, 70, 0.0], [BLOCKS, 3, 0, 0.0], [BAND, 8, 40, 0.0]]
        heads = range(model.num_heads)
        return {
            "table": [{str(h): kinds[(h + i) % 4] for h in heads if (h + i) % 4 < 3} for i in range(model.num_layers)]
        }

    def plan(self, ctx: PlanContext) -> AttnPlan | None:
        """None (dense) for the first 64 tokens, and where all heads would read everything."""
        if ctx.place is None:
            return None
        grid, patterns = Grid(ctx, BLOCK, BLOCK), self.patterns[ctx.layer]
        sizes = [p.counts(grid.num_entries, grid.num_blocks, self.config.budget) for p in patterns]
        if grid.num_entries <= LAST or not any(sizes):
            return None
        band = torch.tensor([_band(pattern, size) for pattern, size in zip(patterns, sizes)], dtype=torch.int32)
        blocks = torch.zeros(len(patterns), grid.tiles, grid.num_blocks, dtype=torch.bool)
        columns = torch.zeros(len(patterns), grid.tiles if self.config.exact else 1, grid.num_entries, dtype=torch.bool)
        for head, chosen in clusters(grid, _of_kind(BLOCKS, patterns, sizes)):
            blocks[head] = chosen
        if of_lines := _of_kind(LINES, patterns, sizes):
            heads = list(of_lines)
            blocks[heads], columns[heads] = lowered(grid, *lines(grid, of_lines), self.config.exact)
        return grid.plan(blocks, columns, band[:, None])

    def operations(self, ctx: PlanContext) -> float:
        """The probe, for heads of lines; of clusters mean rows by mean keys."""
        kinds, (rows, heads, dim) = [p.kind for p in self.patterns[ctx.layer]], ctx.q.shape
        pairs = rows / BLOCK * (int(ctx.tok[-1]) + 1) / BLOCK
        return probe_operations(ctx, LAST) * kinds.count(LINES) / heads + 2.0 * pairs * dim * kinds.count(BLOCKS)


def _band(pattern: Pattern, size: tuple[int, int] | None) -> tuple[int, int]:
    """(sink, window) of a head that reads everything, of an A-shape, and of others, which have none."""
    if size is None:
        return 0, DENSE
    return size if pattern.kind == BAND else (0, 0)


def _of_kind(kind: str, patterns: Sequence[Pattern], sizes: Sequence[tuple[int, int] | None]) -> Sizes:
    """Without those that read everything."""
    return {head: size for head, size in enumerate(sizes) if size and patterns[head].kind == kind}


def clusters(grid: Grid, sizes: Sizes) -> Iterator[tuple[int, Tensor]]:
    """(head, bool [tiles, nb]): the blocks with the best products of mean query and mean key.

    The first one and a tile's own are taken before all others; the authors take neither.
    """
    if not sizes:
        return
    means, rows = grid.mean_keys(), grid.pooled(grid.ctx.q[:, list(sizes)])
    group = grid.ctx.q.shape[1] // len(means)
    forced = grid.diagonal | (torch.arange(grid.num_blocks) == 0)
    for row, (head, (count, _)) in zip(rows.unbind(1), sizes.items()):
        scores = row @ means[head // group].T
        scores = scores.masked_fill(~grid.causal, -torch.inf).masked_fill_(forced, torch.inf)
        yield head, best(scores, count) | forced


def lines(grid: Grid, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """(columns, distances), bool [h, n_kv] each, of some heads: where the attention of the last rows lies."""
    probing = torch.zeros(grid.ctx.q.shape[1], dtype=torch.bool)
    probing[list(sizes)] = True
    mass, apart = map(torch.cat, zip(*probed(grid.ctx, LAST, probing)))
    columns, diagonals = torch.tensor(list(sizes.values())).unbind(1)
    return _most(mass, columns, FIRST), _most(apart, diagonals, NEAR)


def _most(mass: Tensor, count: Tensor, forced: int) -> Tensor:
    """bool [h, n]: of each head the count[h] places of most mass f32 [h, n]; the first `forced` go before others."""
    mass = mass.clone()
    mass[:, :forced] = torch.inf
    return best(mass, count)


def lowered(grid: Grid, columns: Tensor, distances: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Columns and distances, bool [h, n_kv] each, as blocks bool [h, tiles, nb] and columns bool [h, tiles or 1, n_kv].

    A diagonal over a tile is as many entries as the tile has rows, seldom a block. `exact`: those entries; else every
    block that has some of them.
    """
    columns = columns[:, None]
    if not exact:
        return crossed(grid, distances, BLOCK), columns
    read = torch.stack([crossed(grid, of_head, 1) for of_head in distances]) | columns  # one by one: they are large
    ahead = torch.arange(grid.num_entries) >= grid.end[:, None]
    whole = pad(read | ahead, (0, -grid.num_entries % BLOCK), value=True)
    return whole.view(*read.shape[:2], -1, BLOCK).all(3), read


def crossed(grid: Grid, distances: Tensor, size: int) -> Tensor:
    """bool [.., tiles, blocks of `size` entries]: those that a diagonal at one of the distances, bool [.., n_kv], goes
    through.

    Rows with own entries [a, e) and distance d read entries [a - d, e - d), so a block from x on is gone through by
    distances above a - x - size and below e - x.
    """
    below = pad(distances.cumsum(-1), (1, 0))  # how many there are below each distance
    start = torch.arange(0, grid.num_entries, size)
    most = distances.shape[-1]
    upto, beneath = grid.end[:, None] - start, grid.begin[:, None] - start - size + 1
    return below[..., upto.clamp(0, most)] > below[..., beneath.clamp(0, most)]
