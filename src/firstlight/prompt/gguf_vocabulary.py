"""A vocabulary from GGUF metadata: byte-level BPE by merges, SentencePiece by scores.

The file names only how text is cut before merging, so those rules are written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from firstlight.core.errors import UserError
from firstlight.prompt.sentencepiece import SentencePiece
from firstlight.prompt.vocabulary import (
    Encoder,
    LibraryEncoder,
    Vocabulary,
    byte_level_piece,
    find_ends,
    find_roles,
    guarded,
    is_role_text,
    sentencepiece_piece,
    token_ids,
)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # ggml's token types
_CONTRACTIONS = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORDS = (
    rf"(?:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GGUF's key (without `_token_id`) by role.
_NAMED_ROLES = {
    "bos": ("bos",),
    "eos": ("eos",),
    "unk": ("unknown",),
    "pad": ("padding",),
    "fim_prefix": ("fim_pre", "prefix"),
    "fim_suffix": ("fim_suf", "suffix"),
    "fim_middle": ("fim_mid", "middle"),
    "fim_pad": ("fim_pad",),
    "repo_name": ("fim_rep",),
    "file_sep": ("fim_sep",),
}


@dataclass(frozen=True)
class _Tokens:
    """All texts by id, and the ids by text of those that aren't ordinary."""

    texts: list[str]
    control: dict[str, int]
    literal: dict[str, int]
    bytes_: dict[str, int]


_Built = tuple[Encoder, Callable[[str], bytes], bool, bool]
"""Encoder, bytes of a piece, and what holds unless the file says: a text begins with BOS, with a space."""


def vocabulary_from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """From the `tokenizer.*` keys; UserError where they are damaged or of a kind that isn't read here."""
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    build = _one_of("model", meta.get("model"), {"gpt2": _byte_level, "llama": _sentencepiece})
    tokens = _tokens(meta)
    encode, piece, adds_bos, space_before = build(meta, tokens)
    ids = range(len(tokens.texts))
    roles = {role: token_ids([meta.get(f"{k}_token_id") for k in keys], ids) for role, keys in _NAMED_ROLES.items()}
    ends = token_ids([meta.get(f"{kind}_token_id") for kind in ("eos", "eot", "eom")], ids)
    template = metadata.get("tokenizer.chat_template")
    return Vocabulary(
        encode=encode,
        piece=piece,
        tokens=dict(enumerate(tokens.texts)),
        specials=tokens.control,
        added=frozenset(tokens.control.values()) | frozenset(tokens.literal.values()),
        roles=find_roles({role: found[0] for role, found in roles.items() if found}, tokens.control),
        eos_ids=find_ends(ends, tokens.control),
        bos_ids=tuple(roles["bos"]) if meta.get("add_bos_token", adds_bos) else (),
        space_before=space_before,
        chat_template=template if isinstance(template, str) else None,
    )


def _tokens(meta: Mapping[str, Any]) -> _Tokens:
    """Control tokens are those that text must not be able to forge, tokens that fill holes in code among them."""
    texts = _strings(meta, "tokens")
    kinds = _numbers(meta, "token_type", "int32")
    found = _Tokens(texts, {}, {}, {})
    for i in np.flatnonzero(kinds != _NORMAL).tolist():
        text, kind = texts[i], kinds[i]
        if kind in (_CONTROL, _UNKNOWN) or (kind == _USER_DEFINED and is_role_text(text)):
            found.control[text] = i
        elif kind in (_USER_DEFINED, _BYTE):
            (found.literal if kind == _USER_DEFINED else found.bytes_)[text] = i
    return found


def _byte_level(meta: Mapping[str, Any], tokens: _Tokens) -> _Built:
    pre = _one_of("pre-tokenizer", meta.get("pre"), _PRE_TOKENIZERS)
    llama3 = meta["pre"] == "llama-bpe"  # there a word that is a token needs no merges, and a text begins with BOS
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in _strings(meta, "merges"))]

    def build() -> Backend:
        ids = dict(zip(tokens.texts, range(len(tokens.texts))))
        backend = Backend(models.BPE(vocab=ids, merges=pairs, ignore_merges=llama3))
        backend.pre_tokenizer = pre()
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in tokens.control])
        backend.add_tokens([AddedToken(text, normalized=False) for text in tokens.literal])
        return backend

    encode = LibraryEncoder(guarded(build, "the model file's tokenizer is damaged"))
    return encode, byte_level_piece, llama3, False


def _sentencepiece(meta: Mapping[str, Any], tokens: _Tokens) -> _Built:
    scores = _numbers(meta, "scores", "float32")
    if not np.isfinite(scores).all():
        raise UserError("the tokenizer's scores are not numbers; fetch the model again")
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if missing := [name for name in names if name not in tokens.bytes_]:
        raise UserError(f"the model file's tokenizer has no byte token {missing[0]}; use another model file")
    pieces = dict(zip(tokens.texts, zip(range(len(tokens.texts)), scores.tolist())))
    for text in (*tokens.control, *tokens.bytes_):
        pieces.pop(text, None)
    space = bool(meta.get("add_space_prefix", True))
    byte_ids = [tokens.bytes_[name] for name in names]
    encode = SentencePiece(pieces, byte_ids, tokens.control, tokens.literal, space_before=space)
    return encode, sentencepiece_piece, True, space


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit alone, then GPT-2's split into words."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _words(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """GPT-4's split into words, with so many digits a group."""

    def build() -> pre_tokenizers.PreTokenizer:
        split = pre_tokenizers.Split(Regex(_WORDS % digits), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


# GGUF's name of how text is cut before merging.
_PRE_TOKENIZERS = {"smollm": _smollm, "qwen2": _words(""), "llama-bpe": _words("{1,3}")}


def _one_of(what: str, name: Any, known: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"tokenizer {what} {str(name)[:80]!r} is not supported; use a model with {' or '.join(known)}")
    return known[name]


def _strings(meta: Mapping[str, Any], key: str) -> list[str]:
    value = meta.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise UserError(f"the model file holds no tokenizer {key}; use another model file")
    return value


def _numbers(meta: Mapping[str, Any], key: str, dtype: str) -> NDArray[Any]:
    """An array with one number a token."""
    value = meta.get(key)
    if not isinstance(value, np.ndarray) or value.dtype != dtype or len(value) != len(meta["tokens"]):
        raise UserError(f"the tokenizer's {key} doesn't match its vocabulary; fetch the model again")
    return value
