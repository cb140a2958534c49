"""`minference` against its card's formulas in loops, on planted patterns, its tables, and where tokens are missing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight.attention.grid import pairs
from firstlight.attention.minference import MInference, MInferenceConfig
from firstlight.attention.patterns import BAND, BLOCKS, LINES, Pattern, read_table
from firstlight.core.attn import PlanContext
from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import ModelFacts
from firstlight.core.registry import Method, make_parts
from firstlight.train.calibrating import Notebook, Tell
from firstlight.train.minference import CANDIDATES, Config, Layer, search, winners
from tests.tiny import tiny_model
from tests.unit.planted import DIM, GROUP, HEADS, KV_HEADS, context, density, planted, seen, some

pytestmark = pytest.mark.usefixtures("one_thread")
B = 64
FACTS = ModelFacts("a" * 64, 1, HEADS, KV_HEADS, DIM, (None,))


def planner(*heads: Pattern, **given: float) -> MInference:
    """All heads follow these patterns in turn."""
    made = MInference(MInferenceConfig(**given))
    made.patterns = [[heads[h % len(heads)] for h in range(HEADS)]]
    return made


def lines_by_the_card(ctx: PlanContext, head: int, columns: int, diagonals: int) -> tuple[set[int], set[int]]:
    """The card's step 2, one number at a time: columns, distances."""
    n, rows = int(ctx.tok[-1]) + 1, ctx.tok.tolist()
    keys, q = ctx.keys()[head // GROUP].double(), ctx.q[:, head].double()
    v, s = [0.0] * n, [0.0] * n
    for i in range(max(0, len(rows) - 64), len(rows)):
        for j, w in enumerate((q[i] @ keys[: rows[i] + 1].T * ctx.scale).softmax(0).tolist()):
            v[j] += w
            s[rows[i] - j] += w
    v[:30], s[:100] = [math.inf] * min(n, 30), [math.inf] * min(n, 100)
    best = [sorted(range(n), key=lambda j: (-x[j], j)) for x in (v, s)]
    return set(best[0][:columns]), set(best[1][:diagonals])


def reads_lines(ctx: PlanContext, columns: set[int], distances: set[int], exact: bool) -> Tensor:
    """bool [n, N]: ranges and columns of each tile; not exact: whole blocks for ranges."""
    n = int(ctx.tok[-1]) + 1
    read = torch.zeros(len(ctx.tok), n, dtype=torch.bool)
    tiles = ctx.tok // B
    for tile in tiles.unique().tolist():
        own = ctx.tok[tiles == tile]
        a, e = int(own[0]), int(own[-1]) + 1
        ranges = {j for d in distances for j in range(max(0, a - d), e - d)}
        if not exact:
            ranges = {j for b in {j // B for j in ranges} for j in range(b * B, min((b + 1) * B, n))}
        chosen = torch.tensor(sorted(ranges | {j for j in columns if j < e}))
        read[(tiles == tile).nonzero(), chosen] = True
    return read & (torch.arange(n) <= ctx.tok[:, None])


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10**6),
    lo=st.sampled_from([0, 0, 100, 192]),
    rows=st.sampled_from([200, 64, 7]),
    columns=st.integers(30, 60),
    diagonals=st.integers(50, 140),
    exact=st.booleans(),
)
def test_lines_are_the_cards(seed: int, lo: int, rows: int, columns: int, diagonals: int, exact: bool) -> None:
    ctx = some(seed, lo, lo + rows)
    plan = planner(Pattern(LINES, columns, diagonals), exact=exact).plan(ctx)
    mask = seen(plan, ctx)
    if lo + rows <= max(columns, diagonals, 64):
        assert plan is None
        return
    for head in (1, 5):
        want = reads_lines(ctx, *lines_by_the_card(ctx, head, columns, diagonals), exact)
        assert mask[:, head].equal(want)
    assert plan is not None and plan.blk_ptr is not None and plan.col_ptr is not None
    assert plan.blk_idx is not None and plan.col_idx is not None
    for row in range(len(plan.blk_ptr) - 1):  # no key twice
        blocks, entries = (
            x[int(p[row]) : int(p[row + 1])] for p, x in ((plan.blk_ptr, plan.blk_idx), (plan.col_ptr, plan.col_idx))
        )
        assert not torch.isin(entries // B, blocks).any()


@given(seed=st.integers(0, 10**6), lo=st.sampled_from([0, 100]), count=st.integers(1, 5))
@settings(max_examples=5)
def test_clusters_are_the_best_pairs_of_means(seed: int, lo: int, count: int) -> None:
    ctx = some(seed, lo, lo + 300)
    mask = seen(planner(Pattern(BLOCKS, count + 0.5)).plan(ctx), ctx)
    tiles, n = ctx.tok // B, lo + 300
    for head in range(HEADS):
        for tile in tiles.unique().tolist():
            mean = ctx.q[tiles == tile, head].mean(0)
            key = [block.mean(0) for block in ctx.keys()[head // GROUP].split(B)][: tile + 1]
            order = sorted(range(len(key)), key=lambda b: (b not in (0, tile), -float(mean @ key[b])))
            want = torch.zeros(n, dtype=torch.bool)
            for b in order[: max(count + 1, 2)]:
                want[b * B : (b + 1) * B] = True
            row = int((tiles == tile).nonzero()[-1])
            assert mask[row, head].equal(want & (torch.arange(n) <= ctx.tok[row]))


def test_kinds_side_by_side_and_shares_of_what_is_there() -> None:
    ctx = some(1, 0, 640)
    mixed = planner(Pattern(LINES, 40, 60), Pattern(BAND, 1 / 64, 0.1), Pattern(BLOCKS, 0.3), Pattern(BAND, 4, 1000))
    mask = seen(mixed.plan(ctx), ctx)
    row, key = torch.arange(640)[:, None], torch.arange(640)
    assert mask[:, 1].equal((key <= row) & ((key < 10) | (row - key < 64)))
    assert mask[639, 2].sum() == 3 * B and mask[:, 3].equal(key <= row)
    alone = planner(Pattern(LINES, 40, 60)).plan(ctx)
    assert mask[:, 0].equal(seen(alone, ctx)[:, 0]) and mask[:, 4].equal(seen(alone, ctx)[:, 4])


def test_a_planted_column_and_a_planted_diagonal_are_found_with_room_for_one_each() -> None:
    lines = planner(Pattern(LINES, 31, 101), exact=True)
    row = torch.arange(640)
    mask = seen(lines.plan(planted(column=300)), planted(column=300))
    assert bool(mask[300:, :, 300].all()) and not bool(mask[500:576, :, 310].any())
    mask = seen(lines.plan(planted(distance=333)), planted(distance=333))
    assert bool(mask[row[333:], :, row[333:] - 333].all()) and not bool(mask[639, :, 380:470].any())


def test_a_planted_block_is_found_with_room_for_one() -> None:
    """Beside the first one and the own; keys of one direction each, as far as a block goes."""
    places = torch.nn.functional.normalize(torch.randn(10, DIM, generator=torch.Generator().manual_seed(3)), dim=1)
    keys, row = places.repeat_interleave(B, 0), torch.arange(640)
    ctx = context((places[[4]] * 40)[:, None].expand(640, HEADS, -1), keys.expand(KV_HEADS, -1, -1), row)
    mask = seen(planner(Pattern(BLOCKS, 3)).plan(ctx), ctx)
    late = row[5 * B :]
    want = torch.isin(row // B, torch.tensor([0, 4])) | (row // B == late[:, None] // B)
    assert mask[late].equal((want & (row <= late[:, None]))[:, None].expand(-1, HEADS, -1))


def test_lines_of_no_diagonal_but_the_own_keep_columns_beyond_the_last_range() -> None:
    """The authors' merge loses columns after the last range where distance 0 is missing; here it never is."""
    ctx = planted(column=520)
    mask = seen(planner(Pattern(LINES, 31, 50), exact=True).plan(ctx), ctx)
    own = torch.arange(640)
    assert bool(mask[own, :, own].all()) and bool(mask[520:, :, 520].all())
    assert not bool(mask[639, :, 521:527].any()), "50 distances are the nearest 50, from a tile's first row on"


def test_a_tail_that_looks_elsewhere_hides_what_the_rest_looks_at() -> None:
    """The method's weak spot; a pass that ends before such a tail does find it."""
    ctx, lines = planted(column=300), planner(Pattern(LINES, 31, 100))
    q = ctx.q.clone()
    q[540:] = planted(distance=0).q[540:]
    whole = replace(ctx, q=q)
    assert not bool(seen(lines.plan(whole), whole)[470:, :, 300].any())
    keys = ctx.keys()[:, :540]
    before = replace(
        ctx, **{part: getattr(ctx, part)[:540] for part in ("q", "tok", "pos", "place")}, keys=lambda: keys
    )
    assert bool(seen(lines.plan(before), before)[470:, :, 300].all())


def test_planning_is_reckoned_so_that_small_chunks_stay_dense() -> None:
    """The probe of a chunk of 64 rows is all that dense attention would do for scores, of half the heads half of it."""
    ctx, scores = some(0, 576, 640), 2.0 * 64 * HEADS * DIM * 640
    assert planner(Pattern(LINES, 30, 50)).operations(ctx) == scores
    assert planner(Pattern(LINES, 30, 50), Pattern(BAND, 4, 9)).operations(ctx) == scores / 2
    assert planner(Pattern(BAND, 4, 9)).operations(ctx) == 0
    assert planner(Pattern(BLOCKS, 3)).operations(ctx) == 2.0 * 1 * 10 * HEADS * DIM


@pytest.mark.parametrize("kind", [LINES, BLOCKS, BAND])
def test_density_grows_with_the_budget_up_to_dense(kind: str) -> None:
    ctx = some(3, 0, 640)
    got = [density(planner(Pattern(kind, 0.06, 0.1), budget=b).plan(ctx), ctx) for b in (0.5, 1, 2, 4, 30)]
    assert got == sorted(got) and got[0] < 0.6 and got[-1] == 1.0
    assert planner(Pattern(kind, 0.06, 0.1), budget=30).plan(ctx) is None


def test_blocks_hold_what_single_entries_do() -> None:
    ctx = some(4, 70, 640)
    loose, exact = (seen(planner(Pattern(LINES, 0.1, 0.2), exact=e).plan(ctx), ctx) for e in (False, True))
    assert bool((loose | ~exact).all()) and loose.sum() > exact.sum()


def test_where_it_is_dense() -> None:
    ctx, lines = some(0, 0, 200), planner(Pattern(LINES, 30, 50))
    assert lines.plan(ctx) is not None
    assert lines.plan(replace(ctx, place=None)) is None
    assert planner(Pattern(BAND, 8, 9)).plan(some(0, 0, 64)) is None
    assert planner(Pattern(BAND, 8, 9)).plan(some(0, 0, 65)) is not None


def test_rows_and_entries_may_be_missing() -> None:
    tok = (torch.rand(1200, generator=torch.Generator().manual_seed(2)) < 0.4).nonzero()[:, 0]
    tok = tok[(tok < 200) | (tok > 700)]
    place, full = torch.arange(len(tok)), some(1, 0, len(tok))
    for exact in (False, True):
        made = planner(Pattern(LINES, 31, 101), Pattern(BLOCKS, 2), Pattern(BAND, 4, 9), exact=exact)
        for first in (0, 200):
            ctx = context(full.q[first:], full.keys(), tok[first:], place[first:])
            mask = seen(made.plan(ctx), ctx)
            assert bool(mask[torch.arange(len(mask)), :, place[first:]].all()) and bool(mask[:, :, 0].all())


def published(*layers: object) -> Calibration:
    return Calibration("minference", FACTS.digest, {}, {}, {"table": list(layers)}, "a.json")


def test_a_published_table_is_read_and_heads_that_it_lacks_read_lines(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    rows = {"0": [LINES, 1000, 6096, 0.9], "2": [BAND, 128, 3968, 1], "5": [BLOCKS, 100, 0, 0.3]}
    path.write_text(json.dumps([rows]))
    (part,) = make_parts([Method("minference", calibration=str(path), vertical=0.2)], FACTS)
    assert part.impl.patterns == [
        [Pattern(LINES, 1000, 6096), *[Pattern(LINES, 0.2, 1 / 20)], Pattern(BAND, 128, 3968)]
        + [Pattern(LINES, 0.2, 1 / 20)] * 2
        + [Pattern(BLOCKS, 100, 0)]
    ]
    (part,) = make_parts([Method("minference", calibration=str(path), searched=False)], FACTS)
    assert part.impl.patterns == [[Pattern(LINES, 1 / 60, 1 / 20)] * HEADS]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([{}, {}], "has 2 layers, the model has 1"),
        ([3], "has 1 layers"),
        ([{"6": [LINES, 1, 2, 0]}], "a head 6, the model has 6"),
        ([{"x": [LINES, 1, 2, 0]}], "a head x"),
        ([{"0": ["spiral", 1, 2, 0]}], "no pattern"),
        ([{"0": [LINES, 1]}], "no pattern"),
        ([{"0": [LINES, -1, 2, 0]}], "no pattern"),
        ([{"0": [[LINES], 1, 2]}], "no pattern"),
        ([{"0": None}], "no pattern"),
    ],
)
def test_another_models_table_or_a_damaged_one_is_refused(layers: list[object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_table(published(*layers), FACTS)


def test_counts() -> None:
    """By hand, over 3,000 entries in 47 blocks."""
    assert Pattern(LINES, 1000, 6096).counts(3000, 47) is None and Pattern(LINES, 0.1, 0.5).counts(3000, 47) == (
        300,
        1500,
    )
    assert Pattern(LINES, 0.001, 1e-9).counts(3000, 47) == (30, 50)
    assert Pattern(BLOCKS, 0.1).counts(3000, 47) == (5, 0) and Pattern(BLOCKS, 10).counts(3000, 47, 2.0) == (20, 0)
    assert Pattern(BLOCKS, 1e-9).counts(3000, 47) == (2, 0) and Pattern(BLOCKS, 100).counts(3000, 47) is None
    assert Pattern(BAND, 0, 0).counts(3000, 47) == (0, 1) and Pattern(BAND, 0.5, 0.6).counts(3000, 47) is None


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ("vertical=0", "slash=-1", "budget=0"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            make_parts([Method.parse(f"minference:{wrong}")])


def test_cost_counts_what_the_kernel_takes_whole_blocks_and_single_columns() -> None:
    ctx, above_diagonal = some(5, 0, 640), 10 * 64 * 63 // 2
    for pattern in (Pattern(LINES, 0.1, 0.2), Pattern(BLOCKS, 3)):
        plan = planner(pattern).plan(ctx)
        assert plan is not None
        want = seen(plan, ctx).sum((0, 2)) + above_diagonal
        blocks, columns, rows = pairs(plan, ctx.tok)
        assert (rows @ (blocks + columns)).equal(want.double())


def off(ctx: PlanContext, v: Tensor, pattern: Pattern) -> Tensor:
    """f64 [Hq]: |o - o_dense| / |o_dense| by definition, v [N, Hkv, D]."""
    scores = torch.einsum("thd,hjd->thj", ctx.q, ctx.keys().repeat_interleave(GROUP, 0)).double() * ctx.scale
    dense, made = (
        torch.einsum(
            "thj,jhd->thd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v.double().repeat_interleave(GROUP, 1)
        )
        for mask in (seen(None, ctx), seen(planner(pattern).plan(ctx), ctx))
    )
    return (made - dense).norm(dim=(0, 2)) / dense.norm(dim=(0, 2))


def test_the_search_gives_heads_the_pattern_that_loses_least_at_the_price_of_the_a_shape() -> None:
    """Rows look at their own token; in three heads at one far key, as soon as it is there."""
    ctx = planted(distance=0)
    q = ctx.q.clone()
    q[300:, :GROUP] = planted(column=300).q[300:, :GROUP]
    k = ctx.keys().transpose(0, 1)
    config, v = Config(length=640), torch.randn(640, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    layer = Layer(tiny_model(), q, k, v)
    found = layer.found(config.candidates)
    error, most = found[:, :, 2], layer.cost([config.candidates[0]] * HEADS)
    assert bool((error[0, :GROUP] > 0.5).all()) and bool((error[4, :GROUP] < 0.01).all())
    assert bool((error[0, GROUP:] < 0.01).all())
    torch.testing.assert_close(error[0], off(replace(ctx, q=q), v, config.candidates[0]), rtol=1e-3, atol=1e-4)
    kinds = [entry[0] for entry in winners(config.candidates, found).values()]
    nearest = [config.candidates[c].kind for c in error.argmin(0).tolist()]
    assert kinds == nearest and kinds[:GROUP] == [LINES] * GROUP
    for candidate, numbers in zip(CANDIDATES, found[1:, :, :2].tolist()):
        cost = layer.cost([Pattern(candidate.kind, *of_head) for of_head in numbers])
        assert bool((cost <= most).all()) and bool((cost > 0.75 * most).all())


def test_a_search_that_was_stopped_goes_on_at_the_next_layer(tmp_path: Path) -> None:
    model = tiny_model(num_layers=3, family="mistral")  # of whose layers the search may take any
    prompts = [torch.randint(300, (640,), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    candidates = Config().candidates[:2]
    told: list[float] = []

    def stop(what: str, done: float, total: float) -> None:
        told.append(done)
        if done == 3:
            raise KeyboardInterrupt

    def run(name: str, tell: Tell = lambda *_: None) -> Tensor:
        return search(model, prompts, [0, 2], candidates, Notebook(tmp_path / name, {}, tell))

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop)
    assert told == [0, 1, 2, 3]
    assert run("cut", lambda what, done, total: told.append(done)).equal(whole)
    assert told == [0, 1, 2, 3, 3, 4] and whole.shape == (2, 2, 2, HEADS, 3) and not whole[0].equal(whole[1])
