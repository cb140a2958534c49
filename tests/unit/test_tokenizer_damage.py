"""A damaged tokenizer, in a GGUF file or a tokenizer.json: one line or no harm, at no more than its size."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firstlight.core.errors import UserError
from firstlight.prompt.tokenizer import Tokenizer
from tests.unit.test_vocabularies import SMALL, metadata, sentencepiece_json

anything = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HUGE = [-1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**400, 1e308, True, None, "x", [], {}]


def attempt(build: Callable[[], Tokenizer]) -> None:
    """Build and use it: a user's error of one line, or a tokenizer that works on anything."""
    try:
        tokenizer = build()
        for text in ("the quick <tool> brown 語 12345 <|fim_prefix|>\n\n  x", ""):
            tokenizer.decode([*tokenizer.encode(text), *tokenizer.encode(text, special=True), -1, 10**9])
        assert all(isinstance(token, int) for token in (*tokenizer.eos_ids, *tokenizer.bos_ids))
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 500


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece_json(folder, prepend=True)
    return folder, (folder / "tokenizer.json").read_bytes()


def attempt_json(directory: tuple[Path, bytes], data: bytes) -> None:
    (directory[0] / "tokenizer.json").write_bytes(data)
    attempt(lambda: Tokenizer.from_source(directory[0]))


@anything
@given(share=st.floats(0, 0.999))
def test_a_tokenizer_json_cut_anywhere_is_refused(directory, share):
    folder, data = directory
    (folder / "tokenizer.json").write_bytes(data[: int(share * (len(data) - 2))])
    with pytest.raises(UserError, match="damaged tokenizer") as caught:
        Tokenizer.from_source(folder)
    assert "\n" not in str(caught.value)


@anything
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_of_a_tokenizer_json_are_refused_or_harmless(directory, flips):
    damaged = bytearray(directory[1])
    for position, mask in flips:
        damaged[position % len(damaged)] ^= mask
    attempt_json(directory, bytes(damaged))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document are; of long lists and objects the first few."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in list(inner)[:12] for place in places(each, (*path, key)))]


@anything
@given(data=st.data())
def test_any_value_of_a_tokenizer_json_may_be_wrong(directory, data):
    document = json.loads(directory[1])
    *way, last = data.draw(st.sampled_from(places(document)[1:]))
    owner = document
    for key in way:
        owner = owner[key]
    owner[last] = data.draw(st.sampled_from(HUGE))
    attempt_json(directory, json.dumps(document).encode())


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("value", HUGE, ids=repr)
def test_settings_beside_it_may_be_wrong(tmp_path, name, value):
    sentencepiece_json(tmp_path, prepend=False)
    keys = ("eos_token_id", "bos_token", "eos_token", "add_bos_token", "chat_template")
    (tmp_path / name).write_text(json.dumps(dict.fromkeys(keys, value)))
    attempt(lambda: Tokenizer.from_source(tmp_path))
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match="not readable as JSON"):
        Tokenizer.from_source(tmp_path)


def test_a_token_with_a_huge_id_costs_no_memory(directory):
    document = json.loads(directory[1])
    document["model"]["vocab"]["giant"] = 2**32 - 2
    (directory[0] / "tokenizer.json").write_text(json.dumps(document))
    tracemalloc.start()
    attempt(lambda: Tokenizer.from_source(directory[0]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


@anything
@given(data=st.data(), kind=st.sampled_from(["gpt2", "llama"]))
def test_any_value_of_gguf_metadata_may_be_wrong(data, kind):
    meta = metadata(kind, pre="qwen2")
    for key in data.draw(st.lists(st.sampled_from(sorted(meta)), min_size=1, max_size=3)):
        wrong = [*HUGE, 0, 1.5, SMALL[kind]["tokens"][:50], ["a"] * len(SMALL[kind]["tokens"]), np.zeros(3, np.int32)]
        meta[key] = data.draw(st.sampled_from(wrong))
    attempt(lambda: Tokenizer.from_source(meta))


@anything
@given(edits=st.lists(st.tuples(st.integers(0, 5000), st.text(max_size=6)), min_size=1, max_size=8), data=st.data())
def test_any_token_or_merge_may_be_wrong(edits, data):
    kind = data.draw(st.sampled_from(["gpt2", "llama"]))
    key = data.draw(st.sampled_from(["tokens", "merges"] if kind == "gpt2" else ["tokens"]))
    strings = list(SMALL[kind][key])
    for index, text in edits:
        strings[index % len(strings)] = text
    attempt(lambda: Tokenizer.from_source(metadata(kind, pre="llama-bpe", **{key: strings})))


@anything
@given(kinds=st.lists(st.integers(-3, 9), min_size=1, max_size=60), start=st.integers(0, 1200))
def test_any_token_type_may_be_wrong(kinds, start):
    given_kinds = np.array(SMALL["llama"]["token_type"], np.int32)
    there = given_kinds[start : start + len(kinds)]
    there[:] = kinds[: len(there)]
    attempt(lambda: Tokenizer.from_source(metadata("llama", token_type=given_kinds)))
