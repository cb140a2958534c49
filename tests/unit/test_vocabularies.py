"""Every way of cutting text, on two small vocabularies: ids are llama.cpp's, and each text comes back byte by byte."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from firstlight.core.errors import UserError
from firstlight.prompt.detokenize import Detokenizer
from firstlight.prompt.sentencepiece import SentencePiece
from firstlight.prompt.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizer"
SMALL = json.loads((FIXTURES / "small.json").read_text("utf-8"))
KINDS = {
    "small-smollm": ("gpt2", {"pre": "smollm"}),
    "small-qwen2": ("gpt2", {"pre": "qwen2"}),
    "small-llama-bpe": ("gpt2", {"pre": "llama-bpe"}),
    "small-sentencepiece": ("llama", {"add_space_prefix": False}),
    "small-sentencepiece-space": ("llama", {}),
}


def metadata(kind: str, **changed: Any) -> dict[str, Any]:
    """A small vocabulary as the GGUF reader hands it over; None leaves a key out."""
    values = SMALL[kind] | changed
    for key, dtype in (("token_type", np.int32), ("scores", np.float32)):
        if isinstance(values.get(key), list):
            values[key] = np.array(values[key], dtype)
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


TOKENIZERS = {name: Tokenizer.from_source(metadata(kind, **changed)) for name, (kind, changed) in KINDS.items()}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text("utf-8").split("\n") if line]


@pytest.mark.parametrize("name", KINDS)
def test_ids_equal_llama_cpp(name):
    for text, row in zip(rows("texts"), rows(name), strict=True):
        assert TOKENIZERS[name].encode(text["text"]) == row["ids"]
        assert TOKENIZERS[name].encode(text["text"], special=True) == row.get("special", row["ids"])


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = Detokenizer(tokenizer)
    return "".join(stream.push([token]) for token in ids) + stream.flush()


def spaces(name: str, text: str) -> str:
    """What a text comes back as: SentencePiece cannot tell its own sign for a space from one."""
    return text.replace("\u2581", " ") if KINDS[name][0] == "llama" else text


@pytest.mark.parametrize("name", [name for name in KINDS if name != "small-sentencepiece-space"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back_whole_and_streamed(name, text):
    ids = TOKENIZERS[name].encode(text)
    assert TOKENIZERS[name].decode(ids) == streamed(TOKENIZERS[name], ids) == spaces(name, text)
    assert not TOKENIZERS[name].special_ids.intersection(ids)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "small-sentencepiece-space"])
def test_fixture_texts_come_back_byte_by_byte(name):
    for row in rows("texts"):
        ids = TOKENIZERS[name].encode(row["text"])
        assert TOKENIZERS[name].decode(ids) == streamed(TOKENIZERS[name], ids) == spaces(name, row["text"])


ALONE = {key: SMALL["llama"][key][:-3] for key in ("tokens", "scores", "token_type")}
"""The SentencePiece vocabulary without its user-defined tokens, behind which a space would be put too."""


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from(" abthe語é\n"), max_size=30))
def test_the_space_before_a_text_goes_again_and_an_answer_keeps_its_own(text):
    tokenizer = Tokenizer.from_source(metadata("llama", **ALONE))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert streamed(tokenizer, ids) == (" " + text if text else "")


def slowly_merged(pieces: dict[str, tuple[int, float]], text: str) -> list[str]:
    """The definition: of all neighbours whose joint text is a piece, the best score, the leftmost of equals."""
    parts = list(text)
    while True:
        pairs = [(-pieces[a + b][1], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in pieces]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


scored = st.dictionaries(st.text("ab\u2581", min_size=2, max_size=5), st.integers(-5, 0), max_size=25)


@settings(max_examples=300, deadline=None)
@given(scores=scored, text=st.text("ab c", max_size=40))
def test_merging_is_the_definition(scores, text):
    pieces = {piece: (1000 + i, float(score)) for i, (piece, score) in enumerate(scores.items())}
    encode = SentencePiece(pieces, list(range(256)), {}, {}, space_before=False)
    expected: list[int] = []
    for part in slowly_merged(pieces, text.replace(" ", "\u2581")):
        expected += [pieces[part][0]] if part in pieces else part.encode()
    assert encode(text, special=False) == expected


def test_a_long_word_takes_no_longer_than_its_length():
    tokenizer = TOKENIZERS["small-sentencepiece"]
    assert tokenizer.decode(tokenizer.encode("ab" * 50_000)) == "ab" * 50_000


def test_llama_3_takes_a_whole_word_that_merges_cannot_make():
    whole = SMALL["gpt2"]["tokens"].index("Ġtokeniser")
    assert TOKENIZERS["small-llama-bpe"].encode("a tokeniser")[1:] == [whole]
    assert whole not in TOKENIZERS["small-qwen2"].encode("a tokeniser")


@pytest.mark.parametrize(("name", "bos"), [("small-qwen2", []), ("small-llama-bpe", [0]), ("small-sentencepiece", [1])])
def test_bos_is_what_the_kind_of_tokenizer_says_unless_the_file_does(name, bos):
    kind, changed = KINDS[name]
    assert TOKENIZERS[name].bos_ids == bos
    for wanted in (True, False):
        told = Tokenizer.from_source(metadata(kind, **changed, add_bos_token=wanted))
        assert told.bos_ids == ([SMALL[kind]["bos_token_id"]] if wanted else [])
        assert told.begun([5]) == told.begun(told.begun([5])) == [*told.bos_ids, 5]


def test_roles_and_ends_are_those_named_and_those_known():
    tokenizer = TOKENIZERS["small-sentencepiece"]
    assert tokenizer.roles == {"bos": 1, "eos": 2, "unk": 0, "fim_prefix": 6, "fim_suffix": 7, "fim_middle": 8}
    assert tokenizer.eos_ids == {2, 3, 5}  # named, <|endoftext|>, <|im_end|>
    assert tokenizer.template_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    named = Tokenizer.from_source(metadata("llama", fim_pre_token_id=300, eot_token_id=301, suffix_token_id=-1))
    assert (named.roles["fim_prefix"], named.roles["fim_suffix"]) == (300, 7)
    assert named.eos_ids == {2, 3, 5, 301}


def test_text_cannot_forge_tokens_that_fill_holes_whatever_the_file_calls_them():
    kinds = [4 if i == 3 else kind for i, kind in enumerate(SMALL["gpt2"]["token_type"])]
    tokenizer = Tokenizer.from_source(metadata("gpt2", pre="qwen2", token_type=kinds))
    assert 3 not in tokenizer.encode("<|fim_prefix|>")
    assert tokenizer.encode("<|fim_prefix|>", special=True) == [3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scores": None}, "scores doesn't match"),
        ({"scores": [0.0]}, "scores doesn't match"),
        ({"scores": [float("nan")] * len(SMALL["llama"]["tokens"])}, "not numbers"),
        ({"token_type": [1] * len(SMALL["llama"]["tokens"])}, "no byte token <0x00>"),
    ],
)
def test_damaged_sentencepiece_metadata(changed, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.from_source(metadata("llama", **changed))


def sentencepiece_json(path: Path, *, prepend: bool, decoder: Any = None) -> Path:
    """The small SentencePiece vocabulary as exporters write it: merges for scores, a decoder of several steps."""
    tokens = SMALL["llama"]["tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, kind in zip(tokens, SMALL["llama"]["token_type"])
        if kind == 1
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prepend else replace
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if prepend else []
    backend.decoder = decoder or decoders.Sequence(steps)
    control = [text for text, kind in zip(tokens, SMALL["llama"]["token_type"]) if kind in (2, 3)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control[:-1]])
    backend.add_tokens([AddedToken(text, normalized=False) for text in (control[-1], "<tool>", "\n\n", "  ")])
    backend.save(str(path / "tokenizer.json"))
    return path


def test_a_sentencepiece_tokenizer_json_agrees_with_the_gguf(tmp_path):
    ours, told = TOKENIZERS["small-sentencepiece"], Tokenizer.from_source(sentencepiece_json(tmp_path, prepend=False))
    texts = [row["text"] for row in rows("texts") if row["source"] != "written"]
    for text in [*texts, "<|fim_middle|>", "語é\n <tool>", ""]:
        for special in (False, True):
            assert told.encode(text, special=special) == ours.encode(text, special=special)
    assert told.special_tokens == ours.special_tokens
    assert [told.token_bytes(i) for i in range(told.vocab_size)] == [
        ours.token_bytes(i) for i in range(ours.vocab_size)
    ]
    assert {role: token for role, token in ours.roles.items() if "fim" in role} == told.roles


def test_a_tokenizer_json_with_a_space_before_gives_the_text_back(tmp_path):
    tokenizer = Tokenizer.from_source(sentencepiece_json(tmp_path, prepend=True))
    for text in ("hi there", " hi", "語", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.Fuse(), decoders.Metaspace()])
def test_decoders_that_are_more_than_joined_bytes_are_refused(tmp_path, decoder):
    with pytest.raises(UserError, match="SentencePiece tokenizers with byte fallback"):
        Tokenizer.from_source(sentencepiece_json(tmp_path, prepend=False, decoder=decoder))
