"""Where options come from: keyword or flag over variable over file over default, and who is named when one is wrong."""

from __future__ import annotations

import os
import re
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import firstlight
from firstlight.cli import docs
from firstlight.cli.main import call
from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.core.registry import Method
from firstlight.core.settings import OTHER_VARIABLES, gather_options
from firstlight.core.values import read_value

VALUES: dict[str, list[Any]] = {
    "method": [["band"], ["band:sink=16,window=64", "other:a='x,y'"]],
    "schedule": ["sarathi", "sarathi:x=1"],
    "prefix_cache": ["on", "off"],
    "precision": ["f32", "bf16"],
    "weights": ["compact", "default"],
    "threads": [1, 2, 7],
    "max_model_len": [64, 4096],
    "max_num_seqs": [1, 5],
    "max_num_batched_tokens": [128, 999],
    "kv_memory": ["1GiB", "512MB"],
    "device": ["cpu"],
    "deterministic": [True, False],
    "event_log": ["a.log", "b c.log"],
    "seed": [0, 3],
}
"""Some right values of every option, but for `config`."""


def as_text(value: Any) -> str:
    return ";".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


def as_toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(as_toml(item) for item in value)}]"
    return as_text(value) if isinstance(value, bool | int) else '"' + value.replace('"', '\\"') + '"'


def some_values() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in VALUES.items()})


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings file in the usual place of a home of its own, still empty; no variable is set."""
    for name in list(os.environ):
        if name.startswith("FIRSTLIGHT_") and name not in OTHER_VARIABLES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".config" / "firstlight.toml"
    path.parent.mkdir()
    path.write_text("")
    return path


def test_every_option_has_values_here() -> None:
    assert VALUES.keys() == {field.name for field in fields(Options)} - {"config"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_values(), some_values(), some_values())
def test_the_strongest_that_says_something_wins(
    file: Path, in_file: dict[str, Any], in_variables: dict[str, Any], as_keywords: dict[str, Any]
) -> None:
    file.write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in in_file.items()))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in in_variables.items():
            patch.setenv(f"FIRSTLIGHT_{key.upper()}", as_text(value))
        found = gather_options(as_keywords)
        assert found == Options(**{**in_file, **in_variables, **as_keywords}, config=str(file))
        assert gather_options(vars(found)) == found


def test_the_file_is_the_flags_or_the_variables_or_the_usual_one(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, path in enumerate([file, tmp_path / "a.toml", tmp_path / "b.toml", tmp_path / "firstlight.toml"]):
        path.write_text(f"seed = {number}\n")
    monkeypatch.chdir(tmp_path)  # its firstlight.toml was put there by whoever made the folder: not read
    assert gather_options({}).seed == 0
    monkeypatch.setenv("FIRSTLIGHT_CONFIG", str(tmp_path / "a.toml"))
    assert gather_options({}).seed == 1
    assert gather_options({"config": "b.toml"}).seed == 2
    assert gather_options({"config": os.devnull}) == Options(config=os.devnull)
    monkeypatch.setenv("FIRSTLIGHT_CONFIG", "")
    file.unlink()
    assert gather_options({}) == Options()


def test_keys_of_the_file_may_be_written_like_flags(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfmax-model-len = 100 # tokens\n")
    assert gather_options({}).max_model_len == 100


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"thread = 2", "no option is called 'thread'; choose one of: method, schedule"),
        (b"[engine]\nthreads = 2", "no option is called 'engine'"),
        (b"threads = 'two'", "threads='two' is not a whole number"),
        (b"threads = true", "threads=True is not a whole number"),
        (b"threads = 1.5", "threads=1.5 is not a whole number"),
        (b"threads = 0", "threads=0 is out of range; give 1 or more"),
        (b"deterministic = 1", "deterministic=1 is not on or off"),
        (b"method = 3", "method=3 is not a list"),
        (b"method = [[3]]", "method=[3] is not "),
        (b"precision = 'int3'", "precision='int3' is unknown; choose bf16, f32, int8"),
        (b"kv_memory = [1]", "kv_memory=[1] is not text"),
        (b"config = 'other.toml'", "config can't be set in a settings file"),
        (b"threads = ", "is not TOML ("),
        (b"threads = 2\nthreads = 3", "is not TOML ("),
        (b"\xff\xfe", "is not TOML (not UTF-8)"),
        (b"\x00", "is not TOML ("),
    ],
)
def test_a_wrong_file_is_named(content: bytes, said: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        gather_options({})
    assert str(file) in str(error.value) and said in str(error.value)
    assert call(["run", "m", "-p", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1


@pytest.mark.parametrize(("name", "what"), [("nowhere.toml", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(name: str, what: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"can't read the settings in {re.escape(name)}: {what}"):
        gather_options({"config": name})
    monkeypatch.setenv("FIRSTLIGHT_CONFIG", name)
    with pytest.raises(UserError, match=f"can't read the settings in {re.escape(name)}: {what}"):
        gather_options({})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("FIRSTLIGHT_THREDS", "2", "FIRSTLIGHT_THREDS: no option is called 'threds'; choose one of: method"),
        ("FIRSTLIGHT_THREADS", "two", "FIRSTLIGHT_THREADS: threads='two' is not a whole number"),
        ("FIRSTLIGHT_THREADS", "-1", "FIRSTLIGHT_THREADS: threads=-1 is out of range"),
        ("FIRSTLIGHT_DETERMINISTIC", "maybe", "FIRSTLIGHT_DETERMINISTIC: deterministic='maybe' is not on or off"),
        ("FIRSTLIGHT_METHOD", "band:sink", "FIRSTLIGHT_METHOD: can't read 'sink' in 'band:sink'"),
    ],
)
def test_a_wrong_variable_is_named(
    name: str, text: str, said: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match=re.escape(said)):
        gather_options({})


def test_other_variables_are_left_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OTHER_VARIABLES, "FIRSTLIGHT_SERVICE_HOST", "FIRSTLIGHT_SERVICE_PORT_HTTP", "FIRSTLIGHT_PORT"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:80")
    monkeypatch.setenv("FIRSTLIGHT_THREADS", "")
    assert gather_options({}) == Options(config=str(file))


def test_every_variable_that_the_package_reads_is_known() -> None:
    folders = [Path(firstlight.__file__).parent, docs.checkout() / "csrc"]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".h", ".cpp")]
    sources = [path.read_text("utf-8") for path in files]
    named = {name for text in sources for name in re.findall(r'"(FIRSTLIGHT_[A-Z_]+)"', text)}
    options = {f"FIRSTLIGHT_{field.name.upper()}" for field in fields(Options)}
    assert "FIRSTLIGHT_CACHE" in named and named <= OTHER_VARIABLES | options


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"thread": 2}, "no option is called 'thread'; choose one of: method"),
        ({"threads": "two"}, "threads='two' is not a whole number"),
        ({"threads": 2.0}, "threads=2.0 is not a whole number"),
        ({"max_num_seqs": None}, "max_num_seqs=None is not a whole number"),
        ({"methods": 3}, "method=3 is not a list"),
        (
            {"precision": "int8:attention=off"},
            "can't read precision='int8:attention=off'; choose bf16, f32, int8, int8:kv=bf16",
        ),
        ({"precision": "int4"}, "precision='int4' is unknown; choose bf16, f32, int8"),
        ({"prefix_cache": "/var/kv"}, "prefix_cache='/var/kv': a cache on disk is not built yet"),
        ({"methods": ["auto"]}, "method 'auto' is not built yet"),
    ],
)
def test_a_wrong_keyword_is_named(given: dict[str, Any], said: str, file: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        gather_options(given)


def test_keywords_may_be_python(file: Path) -> None:
    found = gather_options({"methods": [Method("band", sink=1)], "kv_memory": 2**30, "event_log": Path("log")})
    assert found.methods == [Method("band", sink=1)]
    assert (found.kv_memory, found.event_log) == (str(2**30), "log")


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()))
def test_text_and_python_are_read_alike(value: Any) -> None:
    hint = {int: int, float: float, bool: bool, type(None): int | None}[type(value)]
    for given_as in (value, str(value)):
        read = read_value("x", hint, given_as)
        assert read == value and type(read) is type(value)


def test_the_hints_of_options_are_of_kinds_that_are_read() -> None:
    plain = (int, float, bool, str, Method, type(None))
    for hint in typing.get_type_hints(Options).values():
        inner = [arg for each in typing.get_args(hint) or (hint,) for arg in typing.get_args(each) or (each,)]
        assert all(kind in plain for kind in inner)
