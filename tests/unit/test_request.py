"""What people may ask for: one form for each value, one line for what can't be."""

from __future__ import annotations

from typing import Any

import pytest

from firstlight.core.errors import UserError
from firstlight.core.request import SamplingParams


def test_values_have_one_form() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3], logit_bias={"7": -2, 9: 1.5}, json_schema={"type": "null"})
    assert (params.stop, params.stop_token_ids) == (("end",), (3,))
    assert params.logit_bias == {7: -2.0, 9: 1.5} == SamplingParams(logit_bias=["7=-2", "9=1.5"]).logit_bias  # type: ignore[arg-type]
    assert params.json_schema == '{"type": "null"}'
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()  # type: ignore[arg-type]
    assert hash(params) != hash(SamplingParams())


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 9, "max_tokens": 8}, "more than max_tokens=8"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {3: 101}}, "logit_bias 3=101"),
        ({"logit_bias": {-3: 1}}, "logit_bias -3=1"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias 3=nan"),
        ({"logit_bias": {"cat": 1}}, "17=-2.5"),
        ({"logit_bias": ["17"]}, "17=-2.5"),
        ({"logit_bias": 17}, "no list"),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n=0"),
        ({"n": 129}, "n=129"),
        ({"stop": [""]}, "empty text"),
        ({"stop": ""}, "empty text"),
        ({"stop": ["a", 5]}, "empty text"),
        ({"stop": 5}, "no list"),
        ({"stop_token_ids": [-1]}, "no token ids"),
        ({"stop_token_ids": ["a"]}, "no token ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex"),
        ({"regex": " "}, "regex is empty"),
        ({"grammar": 5}, "grammar is empty or no text"),
        ({"json_schema": {"a": {1, 2}}}, "JSON can't say"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos and regex"),
        ({"json_schema": "{}", "min_tokens": 1}, "min_tokens and json_schema"),
    ],
)
def test_what_can_not_be_is_one_line(params: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        SamplingParams(**params)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
