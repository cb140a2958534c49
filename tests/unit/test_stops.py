"""Stop strings: where a text ends doesn't depend on its pieces, and nothing of a stop is ever shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from firstlight.decode.stops import StopText

WORDS = st.text("ab", min_size=1, max_size=4)


def ends_at(text: str, stops: list[str], after: int = 0) -> tuple[int, str] | None:
    """By hand: read on character by character until one of the stops, the longest, stands at the end."""
    for end in range(after + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end, stop
    return None


def shown(pieces: list[str], stops: list[str], free: int = 0) -> tuple[list[str], str | None]:
    """What comes out piece by piece; in the first `free` pieces nothing stops."""
    text, out = StopText(stops), []
    for i, piece in enumerate(pieces):
        out.append(text.push(piece, may_stop=i >= free))
        if text.matched is not None:
            return out, text.matched
    return [*out, text.flush()], None


@given(pieces=st.lists(st.text("abc", max_size=4), max_size=10), stops=st.lists(WORDS, max_size=3))
def test_the_pieces_do_not_matter_and_nothing_leaks(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    out, matched = shown(pieces, stops)
    found = ends_at(whole, stops)
    want = whole if found is None else whole[: found[0] - len(found[1])]
    assert "".join(out) == want and matched == (found[1] if found else None)
    assert out == shown(pieces, stops)[0]


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=10),
    stops=st.lists(WORDS, min_size=1, max_size=3),
    free=st.integers(0, 6),
)
def test_what_ends_early_is_text_and_what_begins_early_may_stop(pieces: list[str], stops: list[str], free: int) -> None:
    whole, early = "".join(pieces), len("".join(pieces[:free]))
    out, matched = shown(pieces, stops, free)
    found = ends_at(whole, stops, early)
    want = whole if found is None else whole[: found[0] - len(found[1])]
    assert "".join(out) == want and matched == (found[1] if found else None)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    text = StopText(["<end>"])
    assert [text.push(piece) for piece in ("one <", "en", "two", " <end", "!", "<e", "nd> more")] == [
        *("one ", "", "<entwo", " ", "<end!", "", "")
    ]
    assert text.matched == "<end>"


def test_without_stops_everything_passes() -> None:
    text = StopText([])
    assert text.push("abc") == "abc" and text.flush() == ""
