"""Tokenizers from both sources, without a model, and streams of their text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from firstlight.core.errors import UserError
from firstlight.prompt.detokenize import Detokenizer
from firstlight.prompt.tokenizer import Tokenizer
from firstlight.prompt.vocabulary import LibraryEncoder

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ã ©", "ð Ł", "1 2"]
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TOKENS = [*SPECIALS, *BYTES, *(merge.replace(" ", "") for merge in MERGES), "<tool>"]


def metadata(**changed: object) -> dict[str, Any]:
    kinds = [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS) - 1) + [4]
    meta = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "merges": MERGES, "eos_token_id": 1, "bos_token_id": 0}
    meta["token_type"] = np.array(kinds, np.int32)
    return {f"tokenizer.ggml.{key}": value for key, value in {**meta, **changed}.items()}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_source(metadata())


@pytest.fixture
def directory(tmp_path) -> Path:
    """The same vocabulary as a tokenizer.json that adds a BOS, beside its configs."""
    backend = Backend(models.BPE({token: i for i, token in enumerate(TOKENS)}, [tuple(m.split(" ")) for m in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    return tmp_path


def test_digits_are_single_and_merges_apply(tokenizer):
    def pieces(text: str) -> list[bytes]:
        return [tokenizer.token_bytes(token) for token in tokenizer.encode(text)]

    assert pieces("hello hello") == [b"hello", b" hello"]
    assert pieces("12") == [b"1", b"2"]
    assert pieces("é") == [b"\xc3\xa9"]


def test_control_tokens_are_text_unless_asked_for(tokenizer):
    text = "<|im_start|>hello<|im_end|><tool>"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
    tool = TOKENS.index("<tool>")
    assert special == [0, TOKENS.index("hello"), 1, tool]
    assert not {0, 1} & set(plain)
    assert plain[-1] == tool  # a user-defined token is always matched
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode(special) == "hello<tool>"
    assert tokenizer.eos_ids == {1, 2}  # the one named, and the one that every such file means
    assert tokenizer.bos_ids == []
    assert tokenizer.token_bytes(1) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == tokenizer.token_bytes(-1) == b""


def test_bos_and_further_ends_are_read():
    tokenizer = Tokenizer.from_source(metadata(add_bos_token=True, eot_token_id=7, eom_token_id=10**9))
    assert (tokenizer.bos_ids, tokenizer.eos_ids) == ([0], {1, 2, 7})


class SlowBackend:
    """Looks at its switch only after other threads had their turn."""

    encode_special_tokens = False

    def encode(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        time.sleep(0.001)
        return SimpleNamespace(ids=[int(self.encode_special_tokens)])


def test_threads_do_not_see_each_others_switch():
    encode = LibraryEncoder(SlowBackend())
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: encode("x", special=i % 2 == 0), range(40)))
    assert results == [[i % 2] for i in range(40)]


def test_both_sources_agree(tokenizer, directory):
    other = Tokenizer.from_source(directory)
    for text in ["hello 12é 🎉", "<|im_start|>hello<tool>\n\n", ""]:
        for special in (False, True):
            assert other.encode(text, special=special) == tokenizer.encode(text, special=special)
    assert [other.token_bytes(i) for i in range(len(TOKENS))] == [tokenizer.token_bytes(i) for i in range(len(TOKENS))]
    assert (other.vocab_size, other.special_tokens) == (tokenizer.vocab_size, tokenizer.special_tokens)
    assert (other.bos_ids, other.eos_ids, other.chat_template) == ([0], {1, 2, 5}, "{{ messages }}")
    assert other.roles == tokenizer.roles == {"bos": 0, "eos": 1}
    assert other.template_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "bert"}, "tokenizer model 'bert' is not supported.*gpt2 or llama"),
        ({"model": ["gpt2"]}, "is not supported"),
        ({"pre": "default"}, "pre-tokenizer 'default' is not supported.*smollm or qwen2 or llama-bpe"),
        ({"tokens": None}, "no tokenizer tokens"),
        ({"merges": [1, 2]}, "no tokenizer merges"),
        ({"merges": ["no such"]}, "damaged"),
        ({"merges": ["alone"]}, "damaged"),
        ({"token_type": np.array([1, 2], np.int32)}, "token_type doesn't match"),
        ({"token_type": "text"}, "token_type doesn't match"),
    ],
)
def test_damaged_metadata(changed: Mapping[str, object], message):
    with pytest.raises(UserError, match=message):
        Tokenizer.from_source(metadata(**changed))


def test_damaged_directories(directory, tmp_path_factory):
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_source(tmp_path_factory.mktemp("empty"))
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not readable"):
        Tokenizer.from_source(directory)
    (directory / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="damaged tokenizer"):
        Tokenizer.from_source(directory)
    Backend(models.WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    with pytest.raises(UserError, match="byte-level BPE"):
        Tokenizer.from_source(directory)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UserError, match="surrogates"):
        tokenizer.encode("a\ud800b")


ids = st.lists(st.integers(0, len(TOKENS) + 2), max_size=60)


def stream(tokenizer: Tokenizer, tokens: list[int], cuts: list[int]) -> list[str]:
    detokenizer, edges = Detokenizer(tokenizer), sorted({0, *(cut % (len(tokens) + 1) for cut in cuts), len(tokens)})
    return [detokenizer.push(tokens[a:b]) for a, b in pairwise(edges)] + [detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40), cuts=st.lists(st.integers(0, 200)))
def test_pieces_of_a_text_join_and_never_hold_half_a_character(tokenizer, text, cuts):
    tokens = tokenizer.encode(text)
    pieces = stream(tokenizer, tokens, cuts)
    assert "".join(pieces) == tokenizer.decode(tokens) == text
    assert pieces[-1] == ""
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=150, deadline=None)
@given(tokens=ids, cuts=st.lists(st.integers(0, 200)))
def test_pieces_of_any_ids_join_to_their_text(tokenizer, tokens, cuts):
    assert "".join(stream(tokenizer, tokens, cuts)) == tokenizer.decode(tokens)


def test_an_unfinished_character_waits_and_a_broken_one_does_not(tokenizer):
    first, second, third, letter = (BYTES.index(char) + len(SPECIALS) for char in "âĤ¬a")  # the bytes of the euro sign
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([token]) for token in (first, second, third)] == ["", "", "€"]
    assert detokenizer.push([first]) == ""
    assert detokenizer.push([letter]) == "\ufffda"  # no byte can complete it any more
    assert detokenizer.push([first, 1]) == ""  # a control token says nothing about it
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push([letter]) == "a"
