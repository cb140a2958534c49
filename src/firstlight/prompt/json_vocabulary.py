"""A vocabulary from a directory with tokenizer.json, the `tokenizers` library's own file, and the configs beside it.

Read are byte-pair tokenizers whose tokens are bytes or SentencePiece pieces: there decoding is joining bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from firstlight.core.errors import UserError
from firstlight.prompt.vocabulary import (
    SPACE,
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


def vocabulary_from_directory(path: Path) -> Vocabulary:
    """From tokenizer.json, tokenizer_config.json, generation_config.json, config.json and chat_template.jinja."""
    file = path / "tokenizer.json"
    text, document = _read(file)
    decoders = _steps(document.get("decoder"), "decoders")
    piece = _piece(decoders)
    backend = guarded(lambda: _built(text), f"{file}: damaged tokenizer") if _is_plain(document, text) else None
    if piece is None or backend is None or not isinstance(backend.model, models.BPE):
        raise UserError(f"{file}: only byte-level BPE and SentencePiece tokenizers with byte fallback are supported")
    tokens = {index: text for text, index in backend.get_vocab(with_added_tokens=True).items()}
    added = backend.get_added_tokens_decoder()
    specials = {token.content: i for i, token in added.items() if token.special or is_role_text(token.content)}
    config, generation = _settings(path / "tokenizer_config.json"), _settings(path / "generation_config.json")
    named = {role: specials.get(_content(config.get(f"{role}_token"))) for role in ("bos", "eos", "unk", "pad")}
    roles = {role: token for role, token in named.items() if token is not None}
    listed = [generation.get("eos_token_id"), _settings(path / "config.json").get("eos_token_id"), roles.get("eos")]
    return Vocabulary(
        encode=LibraryEncoder(backend),
        piece=piece,
        tokens=tokens,
        specials=specials,
        added=frozenset(added),
        roles=find_roles(roles, specials),
        eos_ids=find_ends([i for value in listed for i in token_ids(value, tokens)], specials),
        bos_ids=_bos_ids(document, specials, config),
        space_before=any(decoder.get("type") == "Strip" for decoder in decoders),
        chat_template=_template(path, config),
    )


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        document = json.loads(text)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); a model directory needs it") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: damaged tokenizer (not JSON); fetch it again") from None
    return text, document if isinstance(document, dict) else {}


def _is_plain(document: Mapping[str, Any], text: str) -> bool:
    """Whether it does without what no such tokenizer has, and on which the library panics when it is damaged."""
    model = document.get("model")
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    return isinstance(model, dict) and not any(model.get(key) for key in affixes) and '"Precompiled"' not in text


def _built(text: str) -> Backend:
    """The library's tokenizer, with role tokens made control tokens."""
    backend = Backend.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    added = backend.get_added_tokens_decoder().values()
    roles = [token.content for token in added if not token.special and is_role_text(token.content)]
    backend.add_special_tokens([AddedToken(role, special=True, normalized=False) for role in roles])
    return backend


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """A decoder or post-processor of a tokenizer.json as a flat list; a sequence has its parts under `inner`."""
    if not isinstance(part, dict):
        return []
    nested = part.get(inner) if part.get("type") == "Sequence" else None
    return [step for each in nested for step in _steps(each, inner)] if isinstance(nested, list) else [part]


def _piece(decoders: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
    """The bytes of a token under a decoder; None where they aren't the token's alone."""
    kinds = [str(decoder.get("type")) for decoder in decoders]
    if kinds == ["ByteLevel"]:
        return byte_level_piece
    spaces = [d for d in decoders if d.get("type") == "Replace"]
    unescapes = all(d.get("pattern") == {"String": SPACE} and d.get("content") == " " for d in spaces)
    if "ByteFallback" in kinds and unescapes and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return sentencepiece_piece
    return None


def _settings(file: Path) -> dict[str, Any]:
    """An optional JSON file beside the tokenizer."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{file}: not readable as JSON; fetch the file again") from None
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str:
    """A special token in a config is its text or an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _bos_ids(document: Mapping[str, Any], specials: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int, ...]:
    """The BOS that the tokenizer's own post-processor, or its config, puts before a text."""
    text = _content(config.get("bos_token"))
    bos, wanted = specials.get(text), config.get("add_bos_token") or _first_special(document) == text
    return (bos,) if bos is not None and wanted else ()


def _first_special(document: Mapping[str, Any]) -> str | None:
    """The special token that a template of the post-processor begins with. It is read, not run: the library panics on
    a damaged one."""
    for step in _steps(document.get("post_processor"), "processors"):
        single = step.get("single")
        first = single[0].get("SpecialToken") if isinstance(single, list) and single[:1] else None
        if isinstance(first, dict):
            return _content(first.get("id"))
    return None


def _template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own in newer exports, a config entry (one, or several by name) in older ones."""
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
