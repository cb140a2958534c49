"""`bm25`: the passages of a text that share most words with the question stay, in their order. Another control.

Passages are ranked by Okapi BM25 (Robertson and Zaragoza 2009, section 3.1; k1 = 1.2, b = 0.75, and log(1 + x) for a
word's weight, which is never negative). It reads no meaning, and costs no model: what a compressor with one must beat.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds, Range, Scorer
from firstlight.prompt.shorten import Budget, Shortener

_K1, _B = 1.2, 0.75
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Scripts that put no space between words; there each letter counts as one."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_END = re.compile(r"[.!?。！？][\"'”’)\]]*\s*$|\n\s*$")


@dataclass(frozen=True)
class BM25Config(Budget):
    """The budget, and how a text is cut."""

    passage: int = field(default=100, metadata={"doc": "tokens of a passage at most; it ends with a sentence or line"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passage < 1:
            raise UserError(f"passage={self.passage} is out of range; give 1 or more tokens")


class BM25(Shortener):
    """The prompt part. Raises UserError where there is no question to rank by."""

    Config = BM25Config
    config: BM25Config

    def keep(self, ids: Sequence[int], count: int, req: PromptIds, score: Scorer) -> Sequence[int]:
        """Passages from the best on, as many as fit; of the next one its first tokens."""
        if req.question is None:
            raise UserError("bm25 ranks by a question, and a document is prefilled before one is known; use llmlingua")
        spans = passages(ids, self.config.passage, req.text)
        found = scores([words(req.text(ids[lo:hi])) for lo, hi in spans], words(req.question))
        best = sorted(range(len(spans)), key=lambda i: (-found[i], i))
        places = [place for i in best for place in range(*spans[i])]
        return sorted(places[:count])


def passages(ids: Sequence[int], size: int, text: Callable[[Sequence[int]], str]) -> list[Range]:
    """The text in spans of at most `size` tokens, cut behind the last sentence or line that ends in the second half."""
    spans, lo = [], 0
    while lo < len(ids):
        hi = min(lo + size, len(ids))
        ends = (end for end in range(hi, lo + size // 2, -1) if _END.search(text(ids[lo:end][-8:])))
        hi = hi if hi == len(ids) else next(ends, hi)
        spans.append((lo, hi))
        lo = hi
    return spans


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def scores(documents: Sequence[Sequence[str]], question: Sequence[str]) -> list[float]:
    """BM25 of each document for the question's words; more is better, 0 without a word in common."""
    counts = [Counter(document) for document in documents]
    mean = sum(map(len, documents)) / max(len(documents), 1) or 1.0
    holding = Counter(word for count in counts for word in count)
    weight = {
        word: math.log(1 + (len(documents) - holding[word] + 0.5) / (holding[word] + 0.5)) for word in set(question)
    }
    return [_score(count, len(document) / mean, weight) for count, document in zip(counts, documents)]


def _score(count: Counter[str], length: float, weight: dict[str, float]) -> float:
    """`length` is relative to the mean."""
    damping = _K1 * (1 - _B + _B * length)
    return sum(w * count[word] * (_K1 + 1) / (count[word] + damping) for word, w in sorted(weight.items()))
