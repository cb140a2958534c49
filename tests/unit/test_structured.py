"""Structured output: whatever the logits say, what comes out obeys; what can't be enforced is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlight.core.errors import UserError
from firstlight.core.request import Request, SamplingParams
from firstlight.decode.sampling import sample
from firstlight.decode.state import Decoding
from firstlight.decode.structured import Grammars

PIECES = ['{"', '":', '": "', '", "', '"}', '"}]', "true", "false", "null", "[]", "12", "e", "é", "🙂", "\n", "  "]
WORDS = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in PIECES] + [b"\xed\xa0", b"a\xe0\x80"]
END, CONTROL = len(WORDS), len(WORDS) + 1
VOCABULARY = 300
CLOSERS = {token: 6.0 for token, word in enumerate(WORDS) if word.strip(b' ,:"}]') == b"" and word.strip()} | {END: 6.0}


def bytes_of(token: int) -> bytes:
    return WORDS[token] if token < len(WORDS) else b""


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(bytes_of, len(WORDS) + 2, VOCABULARY, frozenset({END}))


def decoding(grammars: Grammars, rid: str = "r", **params: Any) -> Decoding:
    asked = SamplingParams(**({"max_tokens": 600, "temperature": 1.0} | params))
    return Decoding(Request(rid, [1], asked, eos_ids=frozenset({END}), structure=grammars.structure(asked)), 0)


def run(states: list[Decoding], seed: int) -> list[str]:
    """All answers under random logits, each with what its reader would get."""
    generator = torch.Generator().manual_seed(seed)
    going = list(states)
    while going:
        logits = torch.randn(600, VOCABULARY, generator=generator)[: len(going)] * 3
        logits[:, CONTROL] = 50.0  # a control token is never text
        tokens = sample(logits, going)
        going = [state for state, token in zip(going, tokens) if state.take(token) is None]
    return [b"".join(map(bytes_of, state.token_ids)).decode() for state in states]


def schemas(depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    names = st.text('abcé 🙂"\\_$', min_size=1, max_size=5)
    values = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text('ab\n"\\é', max_size=4))
    leaves = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": "integer"}]),
        st.builds(
            lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-60, 60), st.integers(0, 60)
        ),
        st.builds(
            lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 3), st.integers(0, 3)
        ),
        st.sampled_from([{"type": "string", "pattern": p} for p in ("^[a-c]{2,4}$", "^.\\d$", r"^[^a]\s\D$", "b+")]),
        st.builds(lambda v: {"enum": v}, st.lists(values, min_size=1, max_size=4)),
        st.builds(lambda v: {"const": v}, values),
    )
    if depth == 0:
        return leaves
    inner = schemas(depth - 1)
    arrays = st.builds(
        lambda items, a, b: {"type": "array", "items": items, "minItems": a, "maxItems": a + b},
        *(inner, st.integers(0, 2), st.integers(0, 2)),
    )
    objects = st.dictionaries(names, inner, max_size=3).flatmap(
        lambda fields: st.builds(
            lambda required: {"type": "object", "properties": fields, "required": sorted(required)},
            st.sets(st.sampled_from(sorted(fields))) if fields else st.just(set()),
        )
    )
    return st.one_of(
        leaves, arrays, objects, st.builds(lambda v: {"anyOf": v}, st.lists(inner, min_size=1, max_size=3))
    )


KINDS: dict[str, Any] = {"null": type(None), "boolean": bool, "string": str, "array": list, "object": dict}


def obeys(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is one of the schema, for the keywords above."""
    if "anyOf" in schema:
        return any(obeys(value, one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return any(type(value) is type(one) and value == one for one in allowed)
    kind = schema["type"]
    if kind in ("integer", "number"):
        fine = isinstance(value, int if kind == "integer" else int | float) and not isinstance(value, bool)
        return fine and schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if not isinstance(value, KINDS[kind]):
        return False
    if kind == "string":
        fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 99)
        pattern = schema.get("pattern", "").replace(r"\d", "[0-9]").replace(r"\D", "[^0-9]")  # ECMA's, not Python's
        return fits and re.search(pattern, value.replace("\ufeff", " ")) is not None
    if kind == "array":
        return schema["minItems"] <= len(value) <= schema["maxItems"] and all(obeys(v, schema["items"]) for v in value)
    if kind == "object":
        fields = schema["properties"]
        return set(schema["required"]) <= set(value) <= set(fields) and all(
            obeys(v, fields[k]) for k, v in value.items()
        )
    return True


@settings(max_examples=200)
@given(schema=schemas(), seed=st.integers(0, 10**6))
def test_any_schema_gives_valid_json(grammars: Grammars, schema: dict[str, Any], seed: int) -> None:
    states = [decoding(grammars, f"r{i}", json_schema=schema, logit_bias=CLOSERS, seed=seed + i) for i in range(2)]
    for text, state in zip(run(states, seed), states):
        assert state.token_ids[-1] == END, f"no end: {text[:200]}"
        assert obeys(json.loads(text), schema), text


@pytest.mark.parametrize(
    "params", [{"json_schema": {"type": "string", "minLength": 2, "maxLength": 3}}, {"regex": r"[^\n]{2,3}"}]
)
def test_a_character_that_was_begun_becomes_one(grammars: Grammars, params: dict[str, Any]) -> None:
    """UTF-8 has no way on with some bytes, though they look like the rest of a character."""
    firsts = dict.fromkeys((0xE0, 0xED, 0xF0, 0xF4), 12.0)
    texts = run([decoding(grammars, f"r{i}", **params, logit_bias=firsts, seed=i) for i in range(40)], 3)
    assert all(2 <= len(json.loads(text) if "json_schema" in params else text) <= 3 for text in texts)
    assert sum(max(map(ord, text)) >= 0x800 for text in texts) > 20


@pytest.mark.parametrize("pattern", [r"\d{3}-\d{4}", "(yes|no)", "[a-f]+z", "é{2}🙂?", r"[^\n]{5}"])
def test_a_regex_is_matched(grammars: Grammars, pattern: str) -> None:
    for text in run([decoding(grammars, f"r{i}", regex=pattern, logit_bias={END: 3.0}) for i in range(20)], 5):
        assert re.fullmatch(pattern, text), text


def test_a_grammar_is_followed_and_a_dead_end_ends(grammars: Grammars) -> None:
    balanced = 'root ::= "(" root ")" | "x"'
    for text in run([decoding(grammars, f"r{i}", grammar=balanced) for i in range(20)], 1):
        depth = len(text) // 2
        assert text == "(" * depth + "x" + ")" * depth
    assert run([decoding(grammars, grammar='root ::= "a" b\nb ::= b')], 1) in (["a"], [""])


def test_rows_without_structure_keep_their_bits(grammars: Grammars) -> None:
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    free = [decoding(grammars, f"r{i}") for i in range(3)]
    want = sample(logits.clone(), free)
    mixed = [free[0], decoding(grammars, "r1", regex="[0-9]"), free[2]]
    got = sample(logits.clone(), mixed)
    assert (got[0], got[2]) == (want[0], want[2]) and bytes_of(got[1]).isdigit()


def deep(levels: int) -> str:
    return '{"type":"array","items":' * levels + "{}" + "}" * levels


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"json_schema": "{"}, "no JSON"),
        ({"json_schema": "[1]"}, "no JSON object"),
        ({"json_schema": "true"}, "no JSON object"),
        ({"json_schema": {"type": "nonsense"}}, "nonsense"),
        ({"json_schema": {"enum": []}}, "enum"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json_schema": {"$ref": "other.json"}}, "'\\$ref' in a way that can't be enforced"),
        ({"json_schema": {"properties": {"a": {"items": {"not": {}}}}}}, "'not'"),
        ({"json_schema": {"type": "integer", "multipleOf": 3}}, "'multipleOf'"),
        ({"json_schema": {"type": "string", "pattern": "(?=a)b"}}, "'pattern'"),
        ({"json_schema": {"allOf": [{}, {}]}}, "'allOf'"),
        ({"json_schema": deep(70)}, "nested deeper than 64"),
        ({"json_schema": deep(100_000 // 25)}, "characters|no JSON|nested"),
        ({"json_schema": {"enum": ["x" * 70_000]}}, "the limit is 65536"),
        ({"regex": "("}, "parenthesis"),
        ({"regex": "a{5,3}"}, "5 > 3"),
        ({"regex": r"(a)\1"}, "Backreference"),
        ({"grammar": "root ::= other"}, "other"),
        ({"grammar": 'other ::= "a"'}, "root"),
        ({"grammar": "root ::= root"}, "allows no answer"),
        ({"grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000}, "[Nn]est"),
    ],
)
def test_what_is_no_grammar_is_one_line(grammars: Grammars, params: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        grammars.structure(SamplingParams(**params))
    assert "\n" not in str(caught.value) and ".cc" not in str(caught.value) and len(str(caught.value)) < 300


def test_names_that_are_keywords_elsewhere_are_only_names(grammars: Grammars) -> None:
    schema = {
        "type": "object",
        "properties": {"not": {"const": 1}, "if": {"enum": ["$ref"]}},
        "required": ["not", "if"],
    }
    assert grammars.structure(SamplingParams(json_schema=schema)) is not None


def test_a_model_without_an_end_token_says_so() -> None:
    with pytest.raises(UserError, match="no end token"):
        Grammars(bytes_of, len(WORDS), VOCABULARY, frozenset()).structure(SamplingParams(regex="a"))


def test_only_structure_pays_for_its_library() -> None:
    script = "import firstlight.llm, sys; sys.exit('xgrammar' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
