"""Structured output: which tokens may come next under a JSON schema, a regular expression or a grammar.

Between logits and sampling. The `xgrammar` library compiles and walks the grammars; it is imported by the first request
that asks for structure, and by no other.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firstlight.core.errors import UserError
from firstlight.core.request import SamplingParams, Structure

_MAX_SCHEMA_DEPTH = 64
_MAX_TEXT = 1 << 16
"""Characters of a schema, regular expression or grammar: compiling takes time in the square of it."""
_CACHE_BYTES = 1 << 28
_CONTROL = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")
# First bytes of a character and those that never follow them in UTF-8 (overlong forms, surrogates, too large): the
# library lets these through, and a reader would get three characters where it counts one.
_NEVER_AFTER = {b"\xe0": (0x80, 0x9F), b"\xed": (0xA0, 0xBF), b"\xf0": (0x80, 0x8F), b"\xf4": (0x90, 0xBF)}
_NO_TEXT = re.compile(b"|".join(first + b"[%c-%c]" % never for first, never in _NEVER_AFTER.items()))
# Keywords that the library reads over: an answer would be no answer to the schema.
_UNKNOWN = {
    *("not", "if", "then", "else", "multipleOf", "uniqueItems", "contains", "minContains", "maxContains"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
}


class Grammars:
    """The grammars of one model's vocabulary, compiled once each. Safe to use from several threads."""

    def __init__(
        self, text_bytes: Callable[[int], bytes], num_tokens: int, vocab_size: int, eos_ids: frozenset[int]
    ) -> None:
        """`text_bytes` of a token is what it adds to the text, nothing for control tokens: those only end answers."""
        self._text_bytes, self._num_tokens, self._vocab_size = text_bytes, num_tokens, vocab_size
        self._eos_ids = eos_ids
        self._compilers: dict[bool, Any] = {}
        """For JSON, and for the rest."""
        self._after: dict[bytes, Tensor] = {}
        """Last byte of a text -> the tokens that may follow, as bits."""
        self._lock = threading.Lock()

    def structure(self, params: SamplingParams) -> Structure | None:
        """What one answer under these params may become; None if they ask for nothing.

        Raises UserError for what is no schema, regular expression or grammar, or allows no answer.
        """
        kinds = (("json_schema", params.json_schema), ("regex", params.regex), ("grammar", params.grammar))
        kind, text = next(((kind, text) for kind, text in kinds if text is not None), ("", ""))
        if not kind:
            return None
        if not self._eos_ids:
            raise UserError("the model names no end token, so no grammar can end; leave out " + kind)
        assert isinstance(text, str)
        if len(text) > _MAX_TEXT:
            raise UserError(f"{kind} has {len(text)} characters, the limit is {_MAX_TEXT}; make it shorter")
        if kind == "json_schema":
            _check_schema(text)
        made = Walk(self._compile(kind, text), sorted(self._eos_ids), self._text_bytes, self._after)
        if made.is_dead:
            raise UserError(f"{kind} allows no answer at all; change it")
        return made

    def _compile(self, kind: str, text: str) -> Any:
        how = {"json_schema": "compile_json_schema", "regex": "compile_regex", "grammar": "compile_grammar"}
        try:
            return getattr(self._compiler(kind == "json_schema"), how[kind])(text)
        except RuntimeError as error:  # the library's only kind of error
            raise UserError(f"{kind} can't be used: {_reason(error)}; change it") from None

    def _compiler(self, is_json: bool) -> Any:
        import xgrammar  # here, because it brings a second of imports

        with self._lock:
            if is_json not in self._compilers:
                words = [self._text_bytes(token) for token in range(self._num_tokens)]
                self._after.update(_followers(words, self._vocab_size))
                # The library lets control characters into strings of limited length; JSON has none but line ends.
                words = [b"" if is_json and _CONTROL.search(word) else word for word in words]
                words = [b"" if _NO_TEXT.search(word) else word for word in words]
                info = xgrammar.TokenizerInfo(words, vocab_size=self._vocab_size, stop_token_ids=sorted(self._eos_ids))
                made = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)
                self._compilers[is_json] = made
            return self._compilers[is_json]


class Walk:
    """One answer's way through a compiled grammar. At a dead end only the end is left."""

    def __init__(
        self,
        compiled: Any,
        eos_ids: Sequence[int],
        text_bytes: Callable[[int], bytes],
        after: Mapping[bytes, Tensor],
    ) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._eos_ids, self._text_bytes, self._after, self._last = list(eos_ids), text_bytes, after, b""
        probe = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        self._matcher.fill_next_token_bitmask(probe, 0)
        self.is_dead = not bool(probe.any())

    def fill(self, mask: Tensor, row: int) -> None:
        self._matcher.fill_next_token_bitmask(mask, row)
        if self._last in self._after:
            mask[row] &= self._after[self._last]
        if not bool(mask[row].any()):
            for token in self._eos_ids:
                mask[row, token // 32] |= _bit(token % 32)

    def accept(self, token: int) -> None:
        accepted = self._matcher.accept_token(token)
        assert accepted, f"token {token} was not allowed"
        self._last = self._text_bytes(token)[-1:]


def constrain(logits: Tensor, structures: Sequence[Structure | None]) -> None:
    """Tokens that a row's structure forbids get -inf, in place. logits f32 [n, vocabulary]."""
    rows = [row for row, structure in enumerate(structures) if structure is not None]
    if not rows:
        return
    import xgrammar

    mask = xgrammar.allocate_token_bitmask(len(structures), logits.shape[1])
    for row in rows:
        structures[row].fill(mask, row)  # type: ignore[union-attr]
    xgrammar.apply_token_bitmask_inplace(logits, mask, indices=rows)


def _followers(words: Sequence[bytes], vocab_size: int) -> dict[bytes, Tensor]:
    """First byte of a character -> a bit for each token that may follow it: i32 [ceil(vocabulary / 32)]."""
    first = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    first[: len(words)] = [word[0] if word else 0 for word in words]
    fit = {lead: (first < low) | (first > high) for lead, (low, high) in _NEVER_AFTER.items()}
    return {lead: torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32)) for lead, bits in fit.items()}


def _bit(place: int) -> int:
    """One bit of a signed 32-bit word."""
    return -(1 << 31) if place == 31 else 1 << place


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"json_schema is no JSON ({str(error)[:80]}); check its quotes and commas") from None
    if not isinstance(schema, dict):
        raise UserError('json_schema is no JSON object; give a schema such as {"type": "object"}')
    for depth, key, value in _keywords(schema, 0):
        if depth > _MAX_SCHEMA_DEPTH:
            raise UserError(f"json_schema is nested deeper than {_MAX_SCHEMA_DEPTH} levels; flatten it")
        if key in _UNKNOWN or not _is_known(key, value):
            raise UserError(f"json_schema uses {key!r} in a way that can't be enforced; leave it out")


def _is_known(key: str, value: Any) -> bool:
    """Whether the library obeys a keyword with this value: references inwards, patterns without assertions."""
    if key == "$ref":
        return str(value).startswith("#")
    if key == "pattern":
        return not re.search(r"\(\?[=!<]", str(value))
    return key != "allOf" or (isinstance(value, list) and len(value) == 1)


# Where a schema has schemas: by name, in a list, or as the value itself.
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "additionalItems")


def _keywords(schema: Any, depth: int) -> Iterator[tuple[int, str, Any]]:
    """Every keyword of a schema and the schemas in it, with its depth and its value."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        yield depth, key, value
        inner: list[Any] = [value] if key in _SINGLE else []
        if key in _NAMED and isinstance(value, dict):
            inner = list(value.values())
        elif key in _LISTED and isinstance(value, list):
            inner = value
        for schema_within in inner:
            yield from _keywords(schema_within, depth + 1)


def _reason(error: Exception) -> str:
    """The library's message without the place in its source."""
    return " ".join(str(error).split("\n")[0].split(": ", 1)[-1].split())[:160].rstrip(". ")
