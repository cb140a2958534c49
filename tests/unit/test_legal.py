"""The staircase law against its definition: which cells exist, and what each of them reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from firstlight.core.schedule import Segment, legal

T, L = 5, 4
Cell = tuple[int, int]


def rectangle(t0: int, t1: int, l0: int, l1: int) -> set[Cell]:
    return {(t, layer) for t in range(t0, t1) for layer in range(l0, l1)}


def lawful(done: set[Cell], new: set[Cell], barriers: tuple[int, ...]) -> bool:
    """By dependencies: a cell reads the row below it and its layer's keys so far; nothing is computed twice.

    A cut at c looks at all prompt rows of layer c: cells above it need them done, or all in the same pass.
    """
    if not new or done & new:
        return False
    for t, layer in new:
        reads = {(past, layer) for past in range(t)} | ({(t, layer - 1)} if layer else set())
        if not reads <= done | new:
            return False
        for c in (c for c in barriers if c < layer):
            whole = rectangle(0, T, c, c + 1)
            if not (whole <= done or whole <= new):
                return False
    return True


@st.composite
def staircases(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(sorted(draw(st.lists(st.integers(0, T), min_size=L, max_size=L)), reverse=True))


@given(staircases(), st.sets(st.integers(0, L - 1)))
def test_legal_is_the_definition(f: tuple[int, ...], barrier_set: set[int]) -> None:
    barriers = tuple(sorted(barrier_set))
    done = {(t, layer) for layer in range(L) for t in range(f[layer])}
    for t0 in range(T + 1):
        for t1 in range(T + 1):
            for l0 in range(L + 1):
                for l1 in range(L + 1):
                    said = legal(f, Segment("r", "prefill", (t0, t1), (l0, l1)), barriers, T)
                    assert said == lawful(done, rectangle(t0, t1, l0, l1), barriers), (t0, t1, l0, l1)


@given(st.data(), st.sets(st.integers(0, L - 1)))
def test_legal_steps_keep_a_staircase_and_never_get_stuck(data: st.DataObject, barrier_set: set[int]) -> None:
    barriers, f = tuple(barrier_set), [0] * L
    while f[-1] < T:
        choices = [
            Segment("r", "prefill", (t0, t1), (l0, l1))
            for t0 in range(T)
            for t1 in range(t0 + 1, T + 1)
            for l0 in range(L)
            for l1 in range(l0 + 1, L + 1)
        ]
        segment = data.draw(st.sampled_from([s for s in choices if legal(f, s, barriers, T)]))
        f[slice(*segment.layer)] = [segment.tok[1]] * (segment.layer[1] - segment.layer[0])
        assert f == sorted(f, reverse=True)


def test_out_of_the_grid() -> None:
    for tok, layer in [((0, 0), (0, L)), ((2, 1), (0, L)), ((-1, 1), (0, L)), ((0, 1), (0, L + 1)), ((0, 1), (1, 1))]:
        assert not legal((0,) * L, Segment("r", "prefill", tok, layer))
