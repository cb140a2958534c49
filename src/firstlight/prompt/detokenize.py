"""Token ids to text as they arrive: the last step before a reader sees an answer.

A character may be spread over several tokens, so text is given out only when its bytes are certain: an unfinished
character waits for the next token, and becomes U+FFFD only once no byte can complete it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from firstlight.prompt.tokenizer import Tokenizer


class Detokenizer:
    """One answer's stream: the pieces of `push` and the last of `flush` join to what its ids add to a text.

    That is `Tokenizer.decode` of them, but for a first space: an answer goes on where its prompt ends, and keeps it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The new text that is final, maybe empty; control tokens add nothing."""
        return self._decoder.decode(b"".join(map(self._tokenizer.text_bytes, ids)))

    def flush(self) -> str:
        """What an unfinished last character becomes at the end of the answer; then ready for another."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
