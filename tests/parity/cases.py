"""Random attention calls for the parity tests: ragged batches, views after drops, plans of every kind.

A `Spec` says what is special about a case, `build` makes the call. The pool is full of nan wherever nothing was
written, so every case also shows that nothing beyond a view's entries is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from firstlight.core.attn import DENSE, AttnPlan
from firstlight.kernels.contract import AttnCall, AttnRows, AttnStats, KVView, ProbeRows
from firstlight.kernels.kv_layout import BLOCK, Int8Layout, KVLayout

NEVER = 1 << 60
Generator = np.random.Generator


def few(n: int) -> settings:
    """Settings of a test that takes n examples where the profile's other tests take 100."""
    return settings(max_examples=max(1, n * settings().max_examples // 100))


@dataclass(frozen=True)
class Req:
    """One request of the batch: rows at ordinals from `first`, entries for all ordinals up to the last and `ahead`."""

    first: int
    num_rows: int
    decode: bool = False
    dropped: float = 0.0
    """Share of entries that each KV head lost; 0 = identity view."""
    gaps: bool = False
    """Rows were cut: the ordinals of the others are not consecutive."""
    ahead: int = 0
    """Entries past the last row's ordinal: stored already, not causal."""


MIXED = (Req(37, 50), Req(90, 1, decode=True), Req(129, 30, dropped=0.4, gaps=True, ahead=9))
LONG = (Req(2090, 70), Req(2200, 1, decode=True), Req(2150, 20, dropped=0.2, gaps=True, ahead=30))


@dataclass(frozen=True)
class Spec:
    seed: int = 0
    kv_heads: int = 2
    group: int = 3
    dim: int = 16
    dtype: torch.dtype = torch.float32
    int8: bool = False
    """Of blocks; `dtype` is the rows'."""
    reqs: tuple[Req, ...] = MIXED
    plan: str = "none"
    """none, or what the lists hold: full, empty, bands, blocks, columns, mixed, every block, every column."""
    scope: str = "head"
    """What shares a list: head, group, layer."""
    slots: int = 2
    """Slots per request."""
    q_tile: int = 64
    blk: int = 64
    model_window: int | None = None
    cap: float | None = None
    """Soft cap on scores."""
    hidden: float = 0.0
    """Share of entries that `visible` hides."""
    probe_rows: int = 0
    warped: bool = False
    """Positions of views that lost entries don't follow the ordinals (as after blending)."""
    shuffled: bool = True
    """Block numbers are random; otherwise each head's blocks lie in order."""


PLANS = ["none", "full", "empty", "bands", "blocks", "columns", "mixed"]


def reqs(max_rows: int = 70, max_first: int = 300) -> st.SearchStrategy[tuple[Req, ...]]:
    prefill = st.builds(
        Req,
        first=st.integers(0, max_first),
        num_rows=st.integers(1, max_rows),
        dropped=st.sampled_from([0, 0.4]),
        gaps=st.booleans(),
        ahead=st.sampled_from([0, 0, 70]),
    )
    decode = st.builds(Req, first=st.integers(0, max_first), num_rows=st.integers(1, 2), decode=st.just(True))
    return st.lists(prefill | decode, min_size=1, max_size=3).map(tuple)


def specs(batch: st.SearchStrategy[tuple[Req, ...]], **fixed: object) -> st.SearchStrategy[Spec]:
    free = {
        "seed": st.integers(0, 1000),
        "kv_heads": st.integers(1, 2),
        "group": st.integers(1, 4),
        "reqs": batch,
        "plan": st.sampled_from(PLANS),
        "scope": st.sampled_from(["head", "group", "layer"]),
        "q_tile": st.sampled_from([1, 16, 64, 128, 256]),
        "blk": st.sampled_from([1, 16, 32, 64, 128, 256]),
        "model_window": st.sampled_from([None, None, 1, 50]),
        "cap": st.sampled_from([None, None, None, 0.7]),
        "hidden": st.sampled_from([0, 0, 0.3]),
        "probe_rows": st.sampled_from([0, 1, 20]),
        "warped": st.booleans(),
    }
    return st.builds(Spec, **(free | {key: _drawn(value) for key, value in fixed.items()}))


def _drawn(value: object) -> st.SearchStrategy[object]:
    return value if isinstance(value, st.SearchStrategy) else st.just(value)


def build(spec: Spec) -> AttnCall:
    """The call of a spec; equal specs give equal values, whatever `shuffled` says."""
    rng = np.random.default_rng(spec.seed)
    row_tok = [_row_ordinals(rng, req) for req in spec.reqs]
    entry_tok = [_entry_ordinals(rng, spec.kv_heads, req, int(tok[-1])) for req, tok in zip(spec.reqs, row_tok)]
    views = [_view(rng, spec, req, entries) for req, entries in zip(spec.reqs, entry_tok)]
    position = [
        _positions(rng, spec, req, max(int(tok[-1]) + 1 + req.ahead, 1)) for req, tok in zip(spec.reqs, row_tok)
    ]
    views = [_with_positions(v, e, p) for v, e, p in zip(views, entry_tok, position)]
    ptr = np.cumsum([0] + [len(t) for t in row_tok]).tolist()
    heads = spec.kv_heads * spec.group
    layout = _fill(rng, spec, views)
    q = _normal(rng, (ptr[-1], heads, spec.dim), spec.dtype)
    rows = AttnRows(
        row_ptr=ptr,
        tok=torch.cat(row_tok),
        pos=torch.cat([p[t] for p, t in zip(position, row_tok)]),
        decode=[req.decode for req in spec.reqs],
    )
    plan = _plan(rng, spec, row_tok, views)
    call = AttnCall(q, rows, layout, views, torch.empty_like(q), spec.dim**-0.5, plan, spec.model_window)
    call.score_cap = spec.cap
    return fresh(replace(call, probe=_probe(spec, row_tok, views) if spec.probe_rows else None))


def fresh(call: AttnCall, dtype: torch.dtype | None = None) -> AttnCall:
    """The same call with its own, unwritten outputs (nan) and zero sums."""
    out = torch.full(call.q.shape, torch.nan, dtype=dtype or call.q.dtype)
    lse = torch.full(call.q.shape[:2], torch.nan)
    probe = call.probe
    if probe is not None:
        probe = replace(probe, colsum=[None if c is None else torch.zeros_like(c) for c in probe.colsum])
    return replace(call, out=out, lse=lse, probe=probe, stats=AttnStats())


def alone(call: AttnCall, b: int) -> AttnCall:
    """Request b of the call as a batch of its own."""
    return chunk(call, b, call.rows.row_ptr[b], call.rows.row_ptr[b + 1], call.kv[b])


def chunk(call: AttnCall, b: int, lo: int, hi: int, view: KVView) -> AttnCall:
    """Rows [lo, hi), all of request b, as a call of its own on a view."""
    rows = AttnRows([0, hi - lo], call.rows.tok[lo:hi], call.rows.pos[lo:hi], [call.rows.decode[b]])
    plan, probe = call.plan, call.probe
    if plan is not None:
        first, last = (int(rows.tok[i]) // plan.q_tile for i in (0, -1))
        base = int(plan.tile_base[b]) - int(plan.tile_first[b])
        plan = replace(
            plan,
            tile_base=torch.tensor([0, last - first + 1], dtype=torch.int32),
            tile_first=torch.tensor([first], dtype=torch.int32),
            tile_map=plan.tile_map[base + first : base + last + 1],
            skip_log=None if plan.skip_log is None else plan.skip_log[b : b + 1],
        )
    if probe is not None:
        probe = ProbeRows([probe.first_tok[b]], [probe.colsum[b]])
    return fresh(replace(call, q=call.q[lo:hi], rows=rows, kv=[view], plan=plan, probe=probe))


def up_to(view: KVView, tok: int) -> KVView:
    """The view as it was when `tok` was the last ordinal in it."""
    tok_of = [torch.arange(n) if view.tok is None else view.tok[h, :n] for h, n in enumerate(view.length)]
    length = [int((t <= tok).sum()) for t in tok_of]
    most = max(length)
    cut = {key: None if (x := getattr(view, key)) is None else x[:, :most] for key in ("tok", "pos", "visible")}
    return replace(view, table=view.table[:, : -(-most // BLOCK)], length=length, **cut)


def slots_of(view: KVView, h: int) -> torch.Tensor:
    """Places in the pool of KV head h's entries, i64 [length]."""
    entry = torch.arange(view.length[h])
    return view.table[h].long()[entry // BLOCK] * BLOCK + entry % BLOCK


def _row_ordinals(rng: Generator, req: Req) -> torch.Tensor:
    span = np.arange(req.first, req.first + req.num_rows * (2 if req.gaps else 1))
    return torch.from_numpy(np.sort(rng.choice(span, req.num_rows, replace=False)))


def _entry_ordinals(rng: Generator, heads: int, req: Req, last: int) -> list[np.ndarray]:
    every = np.arange(last + 1 + req.ahead)
    kept = [max(1, round(len(every) * (1 - req.dropped * rng.uniform(0.5, 1)))) for _ in range(heads)]
    return [np.sort(rng.choice(every, n, replace=False)) if req.dropped else every for n in kept]


def _positions(rng: Generator, spec: Spec, req: Req, n: int) -> torch.Tensor:
    """Position of each ordinal of a request, i64 [n]."""
    pos = torch.arange(n)
    if req.dropped and spec.warped:
        return pos - pos // 5 + torch.from_numpy(rng.integers(0, 9, n))
    return pos


def _view(rng: Generator, spec: Spec, req: Req, entries: list[np.ndarray]) -> KVView:
    length = [len(e) for e in entries]
    visible = torch.from_numpy(rng.random((spec.kv_heads, max(length))) >= spec.hidden) if spec.hidden else None
    return KVView(torch.zeros(0), length, visible=visible, tok=torch.zeros(0) if req.dropped else None)


def _with_positions(view: KVView, entries: list[np.ndarray], position: torch.Tensor) -> KVView:
    if view.tok is None:
        return view
    tok = torch.full((len(entries), max(view.length)), -1)
    pos = tok.clone()
    for h, entry in enumerate(entries):
        tok[h, : len(entry)] = torch.from_numpy(entry)
        pos[h, : len(entry)] = position[torch.from_numpy(entry)]
    return replace(view, tok=tok, pos=pos)


def _fill(rng: Generator, spec: Spec, views: list[KVView]) -> KVLayout:
    """Gives each view its table and writes keys and values there; the rest of the pool is nan, but for
    block 0, and for the unwritten ends of blocks: those hold some number."""
    blocks = [[-(-n // BLOCK) for n in view.length] for view in views]
    total = sum(map(sum, blocks)) + 3
    layout = (Int8Layout if spec.int8 else KVLayout)(total, spec.dim, spec.dtype)
    layout.poison(torch.arange(1, total))
    order = np.random.default_rng(spec.seed + 1).permutation(total - 1) if spec.shuffled else np.arange(total - 1)
    free = iter((order + 1).tolist())
    for i, view in enumerate(views):
        table = torch.zeros(spec.kv_heads, max(blocks[i]), dtype=torch.int32)
        for h, n in enumerate(blocks[i]):
            table[h, :n] = torch.tensor([next(free) for _ in range(n)], dtype=torch.int32)
        views[i] = view = replace(view, table=table)
        places = (table[table > 0].long()[:, None] * BLOCK + torch.arange(BLOCK)).view(-1, 1)
        layout.write(places, *torch.full((2, len(places), 1, spec.dim), 77, dtype=spec.dtype))
        for h, n in enumerate(view.length):
            layout.write(slots_of(view, h)[:, None], *(_normal(rng, (n, 1, spec.dim), spec.dtype) for _ in "kv"))
    return layout


def _normal(rng: Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(dtype)


def _probe(spec: Spec, row_tok: list[torch.Tensor], views: list[KVView]) -> ProbeRows:
    """The last `probe_rows` rows of each request but the last one, which nobody probes."""
    first = [int(tok[max(0, len(tok) - spec.probe_rows)]) for tok in row_tok[:-1]]
    sums = [torch.zeros(spec.kv_heads, max(v.length)) for v in views[:-1]]
    return ProbeRows([*first, NEVER], [*sums, None])


def _plan(rng: Generator, spec: Spec, row_tok: list[torch.Tensor], views: list[KVView]) -> AttnPlan | None:
    if spec.plan == "none":
        return None
    share = {"head": 1, "group": spec.group, "layer": spec.kv_heads * spec.group}[spec.scope]
    head_map = torch.arange(spec.kv_heads * spec.group) // share
    lists = int(head_map[-1]) + 1
    first = [int(t[0]) // spec.q_tile for t in row_tok]
    tiles = [int(t[-1]) // spec.q_tile - f + 1 for t, f in zip(row_tok, first)]
    slot = [spec.slots * b + rng.integers(0, spec.slots, n) for b, n in enumerate(tiles)]
    # A list may name only entries that each of its KV heads has.
    owners = [slice(i * share // spec.group, ((i + 1) * share - 1) // spec.group + 1) for i in range(lists)]
    limit = [min(view.length[owner]) for view in views for _ in range(spec.slots) for owner in owners]
    blocks, every = [-(-n // spec.blk) for n in limit], spec.plan.startswith("every")
    return AttnPlan(
        q_tile=spec.q_tile,
        blk=spec.blk,
        head_map=head_map.to(torch.int16),
        tile_base=torch.tensor(np.cumsum([0, *tiles]), dtype=torch.int32),
        tile_first=torch.tensor(first, dtype=torch.int32),
        tile_map=torch.tensor(np.concatenate(slot), dtype=torch.int32),
        band=torch.tensor([_band(rng, spec.plan) for _ in limit], dtype=torch.int32),
        **_csr("blk", rng, blocks if spec.plan in ("blocks", "mixed", "every block") else None, every),
        **_csr("col", rng, limit if spec.plan in ("columns", "mixed", "every column") else None, every),
    )


def _band(rng: Generator, kind: str) -> tuple[int, int]:
    sink, window = int(rng.integers(1, 80)), int(rng.integers(1, 90))
    choice = {"full": [(0, DENSE)], "bands": [(sink, window), (0, window), (sink, 0), (sink, DENSE)]}
    choice["mixed"] = [*choice["bands"], (0, 0), (0, 0)]
    options = choice.get(kind, [(0, 0)])
    return options[rng.integers(len(options))]


def _csr(name: str, rng: Generator, limits: list[int] | None, every: bool) -> dict[str, torch.Tensor]:
    """`<name>_ptr` and `<name>_idx` of rows of `every` number, or else of random subsets, some of them empty."""
    if limits is None:
        return {}
    rows = [np.flatnonzero(rng.random(n) < (1 if every else rng.choice([0, 0.1, 0.5]))) for n in limits]
    ptr = np.cumsum([0] + [len(r) for r in rows])
    idx = np.concatenate(rows)
    return {f"{name}_ptr": torch.tensor(ptr, dtype=torch.int32), f"{name}_idx": torch.tensor(idx, dtype=torch.int32)}
