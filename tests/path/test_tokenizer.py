"""Token ids on the real model equal llama.cpp's, and opening it is cheap."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from firstlight.models.weights.checkpoint import open_checkpoint
from firstlight.models.weights.gguf import GGUFFile
from firstlight.prompt.chat import render_chat
from firstlight.prompt.detokenize import Detokenizer
from firstlight.prompt.tokenizer import Tokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tokenizer" / "smollm2.jsonl"
ROWS = [json.loads(line) for line in FIXTURE.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path) -> Tokenizer:
    return Tokenizer.from_source(open_checkpoint(smollm2_path).tokenizer_source)


@pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row['source']}" for i, row in enumerate(ROWS)])
def test_ids_equal_llama_cpp(tokenizer, row):
    assert tokenizer.encode(row["text"]) == row["ids"]


def test_every_text_comes_back(tokenizer):
    for row in ROWS:
        assert tokenizer.decode(row["ids"]) == row["text"]
        stream = Detokenizer(tokenizer)
        assert "".join(stream.push([token]) for token in row["ids"]) + stream.flush() == row["text"]


def test_what_the_file_says_about_its_tokens(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_ids, tokenizer.eos_ids) == (49152, [], {0, 2})
    assert tokenizer.special_tokens["<|im_start|>"] == 1
    assert len(tokenizer.special_tokens) == 17


def test_a_rendered_chat_is_read_with_its_special_tokens(tokenizer):
    text = render_chat(tokenizer.chat_template, [{"role": "user", "content": "hi"}])
    ids = tokenizer.encode(text, special=True)
    assert text.endswith("<|im_start|>assistant\n")
    assert [token for token in ids if token in tokenizer.special_ids] == [1, 2, 1, 2, 1]
    assert tokenizer.decode(ids).startswith("system\nYou are a helpful AI assistant")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_opening_the_file_is_cheap(smollm2_path):
    GGUFFile(smollm2_path)  # code and pages that the first call touches
    before, seconds, kept = resident_bytes(), [], []
    for _ in range(3):
        start = time.perf_counter()
        kept.append(GGUFFile(smollm2_path))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
    assert resident_bytes() - before < 3 * 50e6
