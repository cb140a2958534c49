"""SentencePiece's way from text to tokens: join the neighbours whose joint piece scores highest, until none is left.

Of equal scores the leftmost is joined first; a character without a piece becomes its UTF-8 bytes (Kudo and Richardson
2018, the byte-pair model). Written here because the `tokenizers` library orders pairs by rank, and building ranks for a
quarter of a million scored pieces takes seconds at every start; this needs a dictionary.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Iterator, Mapping, Sequence

from firstlight.prompt.vocabulary import SPACE

_CACHED_WORDS = 1 << 16
_CACHED_LEN = 32  # characters of a word that is worth remembering


class SentencePiece:
    """An encoder: `pieces` are text by (id, score), `bytes_` the ids of the 256 bytes.

    `control` and `literal` are tokens taken as they are written: control ones only when asked for. `space_before` puts
    a space before a text, and after each of those tokens.
    """

    def __init__(
        self,
        pieces: Mapping[str, tuple[int, float]],
        bytes_: Sequence[int],
        control: Mapping[str, int],
        literal: Mapping[str, int],
        *,
        space_before: bool,
    ) -> None:
        self._pieces, self._bytes, self._prefix = pieces, bytes_, SPACE if space_before else ""
        self._literal, self._all = _Literals(literal), _Literals({**control, **literal})
        self._longest = max(map(len, pieces), default=1)
        self._words = _word_edges(pieces)
        self._remembered = functools.lru_cache(_CACHED_WORDS)(self._merged)

    def __call__(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = []
        for part in (self._all if special else self._literal).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                for word in self._words.split(self._prefix + part.replace(" ", SPACE)):
                    ids += self._remembered(word) if len(word) <= _CACHED_LEN else self._merged(word)
        return ids

    def _merged(self, word: str) -> tuple[int, ...]:
        """Ids of a word: every character starts as a piece, and the best pair of neighbours is joined each time."""
        end, before = list(range(1, len(word) + 1)), list(range(-1, len(word) - 1))  # of the piece that starts at i
        heap = [pair for i in range(len(word) - 1) for pair in self._pair(word, i, i + 2)]
        heapq.heapify(heap)
        while heap:
            _, start, stop = heapq.heappop(heap)
            middle = end[start]
            if not start < middle < stop or end[middle] != stop:
                continue  # one of the two was joined with another meanwhile
            end[start], end[middle] = stop, 0
            if stop < len(word):
                before[stop] = start
                self._push(heap, word, start, end[stop])
            if before[start] >= 0:
                self._push(heap, word, before[start], stop)
        return tuple(self._ids(word, end))

    def _pair(self, word: str, start: int, stop: int) -> Iterator[tuple[float, int, int]]:
        found = self._pieces.get(word[start:stop]) if stop - start <= self._longest else None
        if found is not None:
            yield -found[1], start, stop

    def _push(self, heap: list[tuple[float, int, int]], word: str, start: int, stop: int) -> None:
        for pair in self._pair(word, start, stop):
            heapq.heappush(heap, pair)

    def _ids(self, word: str, end: Sequence[int]) -> Iterator[int]:
        start = 0
        while start < len(word):
            piece = word[start : end[start]]
            if (found := self._pieces.get(piece)) is not None:
                yield found[0]
            else:
                yield from (self._bytes[byte] for byte in piece.encode())
            start = end[start]


def _word_edges(pieces: Mapping[str, tuple[int, float]]) -> re.Pattern[str]:
    """Where a text may be cut before merging: at a space after a character that no piece joins with a space."""
    inside = (text for text in pieces if SPACE in text[1:])
    joined = {SPACE, *(text[i - 1] for text in inside for i in range(1, len(text)) if text[i] == SPACE)}
    return re.compile(f"(?<=[^{re.escape(''.join(sorted(joined)))}])(?={SPACE})")


class _Literals:
    """Finds tokens that are taken as they are written: leftmost first, then the longest."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = {text: token for text, token in tokens.items() if text}
        self._lengths: dict[str, list[int]] = {}
        for first in {text[0] for text in self._tokens}:
            lengths = {len(text) for text in self._tokens if text[0] == first}
            self._lengths[first] = sorted(lengths, reverse=True)
        self._starts = re.compile(f"[{re.escape(''.join(self._lengths))}]") if self._lengths else None

    def split(self, text: str) -> Iterator[int | str]:
        """Token ids, and the texts between them that are not empty."""
        done = 0
        for hit in self._starts.finditer(text) if self._starts else ():
            found = self._at(text, hit.start()) if hit.start() >= done else None
            if found is not None:
                if hit.start() > done:
                    yield text[done : hit.start()]
                yield self._tokens[found]
                done = hit.start() + len(found)
        if done < len(text):
            yield text[done:]

    def _at(self, text: str, start: int) -> str | None:
        candidates = (text[start : start + length] for length in self._lengths[text[start]])
        return next((candidate for candidate in candidates if candidate in self._tokens), None)
