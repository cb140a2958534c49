"""Text to token ids and back: the first step of a prompt, and the last of an answer.

Built from GGUF metadata or from a tokenizer.json; the merging itself is done by the `tokenizers` library. Only
byte-level BPE is read: there each token is a string of bytes, so decoding is joining bytes, which is what lets
`detokenize` stream them.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from firstlight.core.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4  # ggml's token types that are matched whole in a text
# Control tokens that end an answer whatever else the file names: many files name only one of the ends they use.
_ENDS = frozenset({"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>"})


@dataclass(frozen=True)
class _Vocabulary:
    """What both sources come down to. `specials` are the control tokens, `added` all tokens that are not byte-level."""

    backend: Backend
    tokens: Sequence[str]
    specials: dict[str, int]
    added: frozenset[int]
    eos_ids: frozenset[int]
    bos_ids: tuple[int, ...]
    chat_template: str | None


class Tokenizer:
    """Ids of a text and text of ids, for one model. Safe to use from several threads."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._backend = vocabulary.backend
        self._lock = threading.Lock()
        self.vocab_size = len(vocabulary.tokens)
        self.special_tokens: Mapping[str, int] = vocabulary.specials
        self.special_ids = frozenset(vocabulary.specials.values())
        self.eos_ids = vocabulary.eos_ids
        self.bos_ids = list(vocabulary.bos_ids)
        self.chat_template = vocabulary.chat_template

    @classmethod
    def from_source(cls, source: Mapping[str, Any] | Path) -> Tokenizer:
        """From GGUF metadata (its `tokenizer.*` keys) or from a directory with tokenizer.json."""
        return cls(_from_directory(source) if isinstance(source, Path) else _from_gguf(source))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; no BOS is added (`bos_ids` are the caller's).

        `special` reads control tokens written in the text as such, which a rendered chat template needs; otherwise they
        are ordinary text, so that a document cannot forge them. UserError if the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the text holds lone surrogates, which no UTF-8 text has; clean the input") from None
        with self._lock:  # the switch belongs to the backend, not to the call
            self._backend.encode_special_tokens = not special
            return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: control tokens are skipped, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.text_bytes, ids)).decode(errors="replace")

    def text_bytes(self, token: int) -> bytes:
        """What a token adds to the text: its bytes, or nothing for a control token."""
        return b"" if token in self.special_ids else self.token_bytes(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a control token's are its name, an id past the vocabulary has none."""
        if not 0 <= token < self.vocab_size:
            return b""  # embeddings may be padded past the vocabulary
        text = self._vocabulary.tokens[token]
        table = _byte_of_char()
        if token in self._vocabulary.added or not all(char in table for char in text):
            return text.encode()
        return bytes(table[char] for char in text)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes every byte as a printable character: itself where it is one, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit alone, then GPT-2's split into words."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


# GGUF's name of how text is cut before merging.
_PRE_TOKENIZERS = {"smollm": _smollm}


def _from_gguf(metadata: Mapping[str, Any]) -> _Vocabulary:
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    _expect("model", meta.get("model"), ["gpt2"])
    _expect("pre-tokenizer", meta.get("pre"), list(_PRE_TOKENIZERS))
    tokens, kinds = _strings(meta, "tokens"), _kinds(meta)
    backend = _backend(tokens, _strings(meta, "merges"))
    backend.pre_tokenizer = _PRE_TOKENIZERS[meta["pre"]]()
    control = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds)) if kind == _CONTROL}
    user_defined = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds)) if kind == _USER_DEFINED}
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    backend.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    ends = _ids([meta.get(f"{kind}_token_id") for kind in ("eos", "eot", "eom")], len(tokens))
    bos = _ids(meta.get("bos_token_id"), len(tokens)) if meta.get("add_bos_token") else ()
    template = metadata.get("tokenizer.chat_template")
    return _Vocabulary(
        backend=backend,
        tokens=tokens,
        specials=control,
        added=frozenset(control.values()) | frozenset(user_defined.values()),
        eos_ids=ends | {index for text, index in control.items() if text in _ENDS},
        bos_ids=tuple(bos),
        chat_template=template if isinstance(template, str) else None,
    )


def _expect(what: str, name: Any, known: list[str]) -> None:
    if name not in known:
        raise UserError(f"tokenizer {what} {str(name)[:80]!r} is not supported; use a model with {' or '.join(known)}")


def _strings(meta: Mapping[str, Any], key: str) -> list[str]:
    value = meta.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise UserError(f"the model file holds no tokenizer {key}; use another model file")
    return value


def _kinds(meta: Mapping[str, Any]) -> list[int]:
    """ggml's type of each token."""
    value = meta.get("token_type")
    if getattr(value, "dtype", None) != "int32" or len(value) != len(meta["tokens"]):  # type: ignore[arg-type]
        raise UserError("the tokenizer's token types don't match its vocabulary; fetch the model again")
    return value.tolist()  # type: ignore[union-attr, no-any-return]


def _backend(tokens: list[str], merges: list[str]) -> Backend:
    """Byte-level BPE without a pre-tokenizer. The library raises plain Exceptions about what it refuses."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        return Backend(models.BPE(vocab=dict(zip(tokens, range(len(tokens)))), merges=pairs))
    except Exception as error:
        raise UserError(f"the model file's tokenizer is damaged ({str(error)[:80]}); fetch it again") from None


def _from_directory(path: Path) -> _Vocabulary:
    file = path / "tokenizer.json"
    try:
        text = file.read_text(encoding="utf-8")
        backend = Backend.from_str(text)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); a model directory needs it") from None
    except Exception as error:  # what the library raises on a damaged file
        raise UserError(f"{file}: damaged tokenizer ({str(error)[:80]}); fetch it again") from None
    if not isinstance(backend.model, models.BPE) or not _is_byte_level(json.loads(text).get("decoder")):
        raise UserError(f"{file}: only byte-level BPE tokenizers are supported; use a model that has one")
    backend.no_truncation()
    backend.no_padding()
    added = backend.get_added_tokens_decoder()
    specials = {token.content: index for index, token in added.items() if token.special}
    config, generation = _settings(path / "tokenizer_config.json"), _settings(path / "generation_config.json")
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    named = config.get("eos_token")
    ends = {text for text in specials if text in _ENDS} | {_content(named)}
    listed = generation.get("eos_token_id", _settings(path / "config.json").get("eos_token_id"))
    return _Vocabulary(
        backend=backend,
        tokens=[backend.id_to_token(index) or "" for index in range(size)],
        specials=specials,
        added=frozenset(added),
        eos_ids=frozenset(specials[text] for text in ends if text in specials) | _ids(listed, size),
        bos_ids=_bos_ids(backend, specials, config),
        chat_template=_template(path, config),
    )


def _is_byte_level(decoder: Any) -> bool:
    """Whether the decoder of a tokenizer.json is the byte-level one, alone or as a sequence of one."""
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence" and len(decoder.get("decoders", ())) == 1:
        decoder = decoder["decoders"][0]
    return isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"


def _settings(file: Path) -> dict[str, Any]:
    """An optional JSON file beside the tokenizer."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{file}: not readable as JSON; fetch the file again") from None
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> Any:
    """A special token in a config is its text or an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(value: Any, size: int) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(index for index in values if isinstance(index, int) and 0 <= index < size)


def _bos_ids(backend: Backend, specials: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int, ...]:
    """The BOS that the tokenizer's own post-processor, or its config, puts before a text."""
    bos = specials.get(_content(config.get("bos_token")) or "")
    wanted = config.get("add_bos_token") or bos in backend.encode("", add_special_tokens=True).ids[:1]
    return (bos,) if bos is not None and wanted else ()


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
