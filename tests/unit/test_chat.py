"""Chat templates: what Hugging Face templates may expect, and what no template may do."""

from __future__ import annotations

import re

import pytest

from firstlight.core.errors import UserError
from firstlight.prompt.chat import render_chat

MESSAGES = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "Grüße"}]
CHATML = """{% for m in messages %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
<|im_start|>{{ m['role'] }}
{{ m.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""


def test_blocks_leave_no_blank_lines_and_loops_can_continue():
    text = render_chat(CHATML, [*MESSAGES, {"role": "skip", "content": "x"}])
    expected = "<|im_start|>system\nBe <b>brief</b>.<|im_end|>\n<|im_start|>user\nGrüße<|im_end|>\n"
    assert text == expected + "<|im_start|>assistant\n"
    assert render_chat(CHATML, MESSAGES, add_generation_prompt=False) == expected


def test_names_and_functions_that_templates_expect():
    tools = [{"name": "f", "text": "<é>"}]
    assert render_chat("{{ tools | tojson }}", [], tools=tools) == '[{"name": "f", "text": "<é>"}]'
    assert render_chat("{{ tools[0] | tojson(indent=1) }}", [], tools=tools) == '{\n "name": "f",\n "text": "<é>"\n}'
    assert render_chat("{{ bos_token }}|{{ eos_token }}|{{ mode }}", [], bos_token="<s>", mode="x") == "<s>||x"
    assert render_chat("{% if tools is none %}no{% endif %}{% if nothing is defined %}x{% endif %}", []) == "no"
    assert re.fullmatch(r"\d{4}", render_chat("{{ strftime_now('%Y') }}", []))
    assert render_chat("a{% generation %}b{{ 1 + 1 }}{% endgeneration %}c", []) == "ab2c"
    assert (
        render_chat(
            "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% set ns.n = i * 2 %}{% endfor %}{{ ns.n }}", []
        )
        == "16"
    )
    assert render_chat("{{ '=' * 5 }}{{ 3 * 4 }}{{ 2 ** 3 }}", []) == "=====128"


def test_a_template_may_refuse_messages():
    with pytest.raises(UserError, match="refuses these messages: roles must alternate; change"):
        render_chat("{{ raise_exception('roles must\n alternate') }}", [])


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in %}",
        "{{ messages[0].content.missing.more }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{% include 'file' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ strftime_now(1) }}",
    ],
)
def test_a_failing_template_is_one_line(template):
    with pytest.raises(UserError, match="chat template fails") as caught:
        render_chat(template, MESSAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}x{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ }}{{ strftime_now.__globals__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ('%s' | format('x')).format_map.__self__.__class__.y }}",
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * [0] }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template):
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(UserError):
        render_chat(template, messages)
    assert messages == MESSAGES


def test_endless_output_is_cut_off(monkeypatch):
    monkeypatch.setattr("firstlight.prompt.chat._MAX_TEXT", 10_000)
    with pytest.raises(UserError, match="too long"):
        render_chat("{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}", [])
