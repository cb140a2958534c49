"""Which tokens are context: what the rules say, on any text, and that nobody can spell his way into the template."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.prompt.encoder import Encoder
from firstlight.prompt.spans import as_parts, places, tokens_in
from firstlight.prompt.tokenizer import Tokenizer
from tests.tiny import save_tiny_chat

MARK = "<|im_end|>"
TEXTS = st.lists(st.sampled_from([*"ab \n<|>éसあ", MARK]), max_size=20).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_source(save_tiny_chat(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer, "tiny", marks=True)


def context(prompt: PromptIds) -> list[str]:
    return [prompt.text(prompt.ids[lo:hi]) for lo, hi in prompt.context]


def test_the_last_part_or_paragraph_is_the_question_and_what_comes_before_is_context(encoder: Encoder) -> None:
    parts = encoder.chat([{"role": "user", "content": as_parts("one\n\ntwo", "three\n\nfour")}])
    assert context(parts) == ["one\n\ntwo"] and parts.question == "\n\nthree\n\nfour"
    whole = encoder.chat([{"role": "user", "content": "one\n\ntwo\n\nthree\n\nfour\n"}])
    assert context(whole) == ["one\n\ntwo\n\nthree"] and whole.question == "\n\nfour\n"
    raw = encoder.text("one\r\n\r\ntwo")
    assert context(raw) == ["one\r"] and raw.question is not None and raw.question.strip() == "two"
    assert context(encoder.text("only a question")) == [] == context(encoder.prompt([1, 2, 3]))


def test_in_a_long_chat_documents_and_tools_are_context_and_the_rest_is_protected(encoder: Encoder) -> None:
    messages = [
        {"role": "system", "content": "rules\n\nmore rules"},
        {"role": "user", "content": as_parts("a document", "what?")},
        {"role": "assistant", "content": "that.\n\nI think"},
        {"role": "tool", "content": "found\n\nthis"},
        {"role": "user", "content": "and now?"},
    ]
    found = encoder.chat(messages)
    assert context(found) == ["a document", "found\n\nthis"] and found.question == "and now?"


def test_a_document_is_context_and_its_question_is_not_known(encoder: Encoder) -> None:
    found = encoder.document("some\n\ntext", "be brief", None)
    assert context(found) == ["some\n\ntext"] and found.question is None
    assert context(encoder.raw_document("some text")) == ["some text"]


@given(document=TEXTS, question=TEXTS)
def test_ids_are_the_dense_ones_and_no_text_forges_control_tokens(
    encoder: Encoder, tokenizer: Tokenizer, document: str, question: str
) -> None:
    messages = [{"role": "user", "content": as_parts(document, question)}]
    found, dense = encoder.chat(messages), Encoder(tokenizer, "tiny").chat(messages)
    assert list(found.ids) == list(dense.ids) and not dense.context
    controls = [i for i in found.ids if i in tokenizer.special_ids]
    assert controls == [tokenizer.special_tokens[name] for name in ("<|im_start|>", MARK, "<|im_start|>")]
    assert context(found) == ([document] if document else [])
    assert tokenizer.decode(found.ids) == f"user\n{document}\n\n{question}\nassistant\n"


@pytest.mark.parametrize("template", ["{{ messages[0].content | upper }}", "{{ messages[0].content * 2 }}"])
def test_a_template_that_changes_texts_leaves_no_context(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.from_source(save_tiny_chat(tmp_path, chat_template=template))
    found = Encoder(tokenizer, "tiny", marks=True).chat([{"role": "user", "content": as_parts("a", "b")}])
    assert not found.context


def test_a_template_may_trim(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_source(save_tiny_chat(tmp_path, chat_template="<{{ messages[0].content | trim }}>"))
    found = Encoder(tokenizer, "tiny", marks=True).chat([{"role": "user", "content": as_parts(" \n a", "b ")}])
    assert context(found) == ["a"] and tokenizer.decode(found.ids) == "<a\n\nb>"


def test_equal_messages_are_told_apart() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]
    found = places(lambda given: "|".join(m["content"] for m in given), messages, "x|x")
    assert [place.whole for place in found] == [(0, 1), (2, 3)]


@given(st.text("ab", max_size=12), st.data())
def test_only_tokens_that_lie_wholly_inside_are_in_a_span(text: str, data: st.DataObject) -> None:
    """A toy tokenizer that joins pairs: `ab` is one token."""

    def encode(lo: int, hi: int) -> list[int]:
        return [
            {"a": 0, "b": 1, "ab": 2}[t]
            for t in text[lo:hi].replace("ab", "|ab|").split("|")
            for t in ([t] if t == "ab" else t)
        ]

    lo = data.draw(st.integers(0, len(text)))
    hi = data.draw(st.integers(lo, len(text)))
    ids = encode(0, len(text))
    ends = [0]
    for token in ids:
        ends.append(ends[-1] + (2 if token == 2 else 1))
    first, last = tokens_in((lo, hi), ids, len(text), encode)
    inside = [i for i in range(len(ids)) if lo <= ends[i] and ends[i + 1] <= hi]
    assert list(range(first, last)) == inside


def test_a_part_that_is_no_text_is_one_line(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="a part of type 'image_url'; this version reads parts of type text"):
        encoder.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
