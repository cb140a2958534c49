"""The command line without a model: flags, inputs, errors. The engine is a stand-in that records what it is asked."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from firstlight.cli import inputs, progress
from firstlight.cli.main import VERBS, call, load
from firstlight.cli.options import flags_of
from firstlight.cli.progress import Bars
from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.core.request import Completion, SamplingParams

REPORT = {
    "model": "fake",
    "exact": True,
    "prompt_tokens": 3,
    "cached_tokens": 0,
    "text": "an answer",
    "ttft_s": 0.5,
    "tpot_s": 0.01,
    "timings": dict.fromkeys(["load_s", "tokenize_s", "queue_s", "reuse_s", "prefill_s", "sample_s"], 0.1),
    "attention": {"density": 1.0},
    "kv": {"bytes_peak": 1024, "bytes_end": 0},
    "methods": [],
    "settings": {"precision": "bf16"},
}


class FakeLLM:
    """Says "an answer" in two pieces."""

    seen: ClassVar[dict[str, Any]] = {}
    report: ClassVar[dict[str, Any]] = REPORT
    fails: ClassVar[BaseException | None] = None

    def __init__(self, model: str, **settings: Any) -> None:
        type(self).seen = {"model": model, "closed": False, "stream_closed": False, **settings}

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: Any) -> None:
        self.seen["closed"] = True

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[Any]:
        self.seen |= {"prompt": prompt, "params": params}
        try:
            yield types.SimpleNamespace(text="an ", completion=None)
            if self.fails is not None:
                raise self.fails
            yield types.SimpleNamespace(text="answer", completion=Completion([1], [2], "", "stop", self.report))
        finally:
            self.seen["stream_closed"] = True


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    monkeypatch.setitem(sys.modules, "firstlight.llm", types.SimpleNamespace(LLM=FakeLLM))
    monkeypatch.setattr(FakeLLM, "fails", None)
    return FakeLLM


@pytest.fixture(autouse=True)
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Sets standard input; a terminal unless a test says otherwise."""

    def set_bytes(data: bytes) -> None:
        text = io.TextIOWrapper(io.BytesIO(data))
        monkeypatch.setattr(sys, "stdin", text)
        monkeypatch.setattr(inputs, "read_stdin", lambda: data)
        monkeypatch.setattr(inputs, "_is_piped", lambda: True)

    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(inputs, "_is_piped", lambda: False)
    return set_bytes


def test_run_streams_text_and_leaves_nothing(llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["run", "m", "-p", "hi"]) == 0
    assert capsys.readouterr() == ("an answer\n", "")
    assert llm.seen["prompt"] == [{"role": "user", "content": "hi"}]
    assert llm.seen["closed"] and llm.seen["stream_closed"]


def test_run_json_is_all_of_stdout(llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["run", "m", "-p", "hi", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == REPORT


def test_raw_prompt_and_system(llm: type[FakeLLM]) -> None:
    assert call(["run", "m", "-p", "hi", "--raw"]) == 0
    assert llm.seen["prompt"] == "hi"
    assert call(["run", "m", "-p", "hi", "--system", "be brief"]) == 0
    assert llm.seen["prompt"][0] == {"role": "system", "content": "be brief"}


def test_every_setting_has_a_flag_that_reaches_the_engine(llm: type[FakeLLM]) -> None:
    texts = {
        "precision": "f32",
        "weights": "compact",
        "prefix_cache": "off",
        "kv_memory": "2GiB",
        "device": "cpu",
        "event_log": "log",
    }
    texts["config"] = os.devnull
    wanted: dict[str, Any] = {}
    line = ["run", "m", "-p", "hi"]
    for flag in flags_of({"options": Options, "sampling": SamplingParams}):
        name = f"--{flag.name.replace('_', '-')}"
        if flag.kind == bool | None:
            line, wanted[flag.name] = [*line, name], True
        elif flag.name == "logit_bias":
            line, wanted[flag.name] = [*line, name, "7=-2.5", name, "9=1"], {7: -2.5, 9: 1.0}
        elif flag.kind == list[int]:
            line, wanted[flag.name] = [*line, name, "7", name, "9"], [7, 9]
        elif flag.kind == list[str]:
            line, wanted[flag.name] = [*line, name, "a:x=1", name, "b"], ["a:x=1", "b"]
        elif flag.name in ("regex", "grammar", "json_schema", "min_tokens"):
            wanted[flag.name] = getattr(SamplingParams(), flag.name)  # see below: they contradict one another
        else:
            text = texts.get(flag.name, "1")
            line, wanted[flag.name] = [*line, name, text], text if flag.kind == str | None else 1
    assert call(line) == 0
    assert {f.name: llm.seen[f.name] for f in fields(Options)} == {f.name: wanted[f.name] for f in fields(Options)}
    assert llm.seen["params"] == SamplingParams(**{f.name: wanted[f.name] for f in fields(SamplingParams)})


def test_flags_that_contradict_others_reach_the_engine_too(llm: type[FakeLLM]) -> None:
    for key, text in {"json_schema": "{}", "regex": "a+", "grammar": "root ::= [a]"}.items():
        assert call(["run", "m", "-p", "hi", f"--{key.replace('_', '-')}", text]) == 0
        assert llm.seen["params"] == SamplingParams(**{key: text})
    assert call(["run", "m", "-p", "hi", "--min-tokens", "3"]) == 0
    assert llm.seen["params"] == SamplingParams(min_tokens=3)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--min-tokens", "9", "--max-tokens", "3"], "min_tokens=9 is more than max_tokens=3"),
        (["--logit-bias", "cat=3"], "17=-2.5"),
        (["--regex", "a", "--grammar", "b"], "regex and grammar"),
        (["--stop", ""], "stop"),
        (["--stop-token-ids", "x"], "integer"),
    ],
)
def test_contradictory_sampling_is_one_line(
    llm: type[FakeLLM], capsys: pytest.CaptureFixture[str], line: list[str], says: str
) -> None:
    assert call(["run", "m", "-p", "hi", *line]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_several_answers_are_told_apart(llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    """Their texts one after the other; in JSON the first, and all of them under `choices`."""
    reports = [REPORT | {"text": text, "index": i, "stop_reason": None} for i, text in enumerate(("one", "two"))]

    def stream(self: FakeLLM, prompt: Any, params: SamplingParams) -> Iterator[Any]:
        for report in reports:
            yield types.SimpleNamespace(text=report["text"], completion=None)
            yield types.SimpleNamespace(text="", completion=Completion([1], [2], "", "stop", dict(report)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "stream", stream)
        assert call(["run", "m", "-p", "hi", "--n", "2", "--temperature", "1"]) == 0
        assert capsys.readouterr().out == "one\n---\ntwo\n"
        assert call(["run", "m", "-p", "hi", "--n", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["text"] == "one" and [(c["index"], c["text"]) for c in told["choices"]] == [(0, "one"), (1, "two")]


def test_what_is_not_given_keeps_the_records_default(llm: type[FakeLLM]) -> None:
    assert call(["run", "m", "-p", "hi"]) == 0
    assert {f.name: llm.seen[f.name] for f in fields(Options)} == vars(Options(config=os.devnull))
    assert llm.seen["params"] == SamplingParams()


def test_an_approximate_run_says_so(
    llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method = {"name": "band", "seam": "attention", "used": True, "why": ""}
    monkeypatch.setattr(llm, "report", {**REPORT, "exact": False, "methods": [method]})
    assert call(["run", "m", "-p", "hi", "--method", "band"]) == 0
    assert "approximate: band" in capsys.readouterr().err
    monkeypatch.setattr(llm, "report", {**REPORT, "exact": False, "settings": {"precision": "int8"}})
    assert call(["run", "m", "-p", "hi", "--precision", "int8"]) == 0
    assert "approximate: int8 linears, int8 kv; 100% of dense attention" in capsys.readouterr().err


def test_ctrl_c_is_130_and_closes_everything(llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    llm.fails = KeyboardInterrupt()
    assert call(["run", "m", "-p", "hi"]) == 130
    assert llm.seen["closed"] and llm.seen["stream_closed"]
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "code"),
    [("hit()", 130), ("__import__('swallows')", 130), ("atexit.register(hit)", 0)],
    ids=["a verb", "an import", "the end of Python"],
)
def test_ctrl_c_around_a_verb(verb: str, code: int, tmp_path: Path) -> None:
    """Without a word, also in an import that catches everything (torch's does), and when all is done already."""
    hit = "signal.raise_signal(signal.SIGINT)"
    (tmp_path / "swallows.py").write_text(f"import signal\ntry: {hit}\nexcept BaseException: pass")
    program = (
        f"import atexit, signal, sys, types; hit = lambda: {hit}; sys.path.append({str(tmp_path)!r});"
        f"sys.modules['firstlight.cli.main'] = types.SimpleNamespace(main=lambda: {verb});"
        "from firstlight.cli.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["run", "m", "--json"], "the prompt is empty"),
        (["run", "m", "-p", ""], "the prompt is empty"),
        (["run", "m", "-p", " \n"], "the prompt is empty"),
        (["run", "m", "-f", "nowhere.txt", "-p", "x"], "can't read nowhere.txt"),
        (["run", "m", "-f", ".", "-p", "x"], "can't read .: Is a directory"),
        (["run", "m", "-p", "x", "--raw", "--system", "y"], "--system has no place"),
        (["run", "m", "-p", "x", "--threads", "many"], "--threads"),
        (["run", "m", "-p", "x", "--threads", "0"], "threads=0 is out of range"),
        (["run", "m", "-p", "x", "--threads", "100000"], "threads=100000 is out of range; give 1 to 1024"),
        (["run", "m", "-p", "x", "--precision", "int3"], "precision='int3' is unknown"),
        (["run", "m", "-p", "x", "--max-tokens", "0"], "max_tokens=0 is out of range"),
        (["run", "m", "-p", "x", "--kv-memory", "lots"], "can't read the size 'lots'"),
        (["run", "m", "-p", "x", "--no-such-flag"], "--no-such-flag"),
        (["run"], "Missing argument 'model'"),
        (["jump"], "No such command 'jump'"),
        (["run", "m", "-p", "x", "--precision", "int8:kv=int4"], "can't read precision='int8:kv=int4'"),
        (["run", "m", "-p", "x", "--prefix-cache", "/kv"], "a cache on disk is not built yet; choose on or off"),
        (["run", "m", "-p", "x", "--method", "auto"], "method 'auto' is not built yet; name one of"),
        (["run", "m", "-p", "x", "--weights=small"], "weights='small' is unknown; choose default, compact"),
        (
            ["bench", "ttft", "m", "--weights=compact", "--precision=int8"],
            "weights='compact' computes linears in bf16 or f32",
        ),
        (["serve", "m"], "serve is not built yet; use `firstlight run`"),
        (["plan"], "plan is not built yet"),
        (["inspect", "m", "-p", "x"], "Missing option '-o' / '--output'"),
        (["inspect", "m", "-p", "x", "-o", "/"], "it is a folder; give the name of a file with -o"),
        (["inspect", "m", "-p", "x", "-o", "/no/such/page.html"], "there is no folder /no/such; make it first"),
        (["calibrate", "m", "band"], "'band' is no method that is calibrated; choose one of: "),
        (["bench", "serve", "m"], "bench serve is not built yet; choose ttft, decode, throughput, kernel or peak"),
        (["bench", "jump", "m"], "No such command 'jump'; see firstlight bench --help"),
        (["run", "serve", "-p", "x", "--quick-brown"], "No such option: --quick-brown; see firstlight run --help"),
        (["methods", "show", "nothing"], "no method or schedule is called 'nothing'; choose one of: band"),
        (["bench", "ttft", "m", "--prompt-tokens", "many"], "can't read the lengths 'many'"),
        (
            ["bench", "ttft", "m", "--results", "x"],
            "--results is for runs beside other engines; name some with --against",
        ),
        (["bench", "decode", "m", "--tokens", "1"], "tokens=1"),
        (["bench", "throughput", "m", "--batch", "1,two"], "can't read the batch sizes '1,two'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_line_and_exit_code_2(
    line: list[str], said: str, llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("firstlight: error: ") and said in err and err.count("\n") == 1


def test_invalid_utf8_is_named(tmp_path: Path, llm: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9")
    assert call(["run", "m", "-f", str(file), "-p", "x"]) == 2
    assert f"{file} is not UTF-8 text at byte 3" in capsys.readouterr().err


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00\ufeff"), min_size=1), max_size=3))
def test_documents_go_before_the_prompt_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("documents")
    for number, text in enumerate(texts):
        (folder / str(number)).write_bytes(text.encode())
    names = [str(folder / str(number)) for number in range(len(texts))]
    assert inputs.gather("why?", names) == [*filter(None, ["\n\n".join(texts)]), "why?"]


def test_stdin_is_the_prompt_or_one_more_document(stdin: Callable[[bytes], None]) -> None:
    stdin(b"from a pipe\n")
    assert inputs.gather(None, []) == ["from a pipe"]
    assert inputs.gather("why?", []) == ["from a pipe", "why?"]
    assert inputs.gather("why?", ["-"]) == ["from a pipe", "why?"]


def test_an_empty_pipe_is_no_prompt(stdin: Callable[[bytes], None]) -> None:
    stdin(b"")
    assert inputs.gather("why?", []) == ["why?"]
    with pytest.raises(UserError, match="the prompt is empty"):
        inputs.gather(None, [])


def test_methods_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["methods", "list", "--json"]) == 0
    found = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert found["sarathi"]["exact"] and not found["band"]["exact"]
    assert call(["methods", "show", "band"]) == 0
    assert "sink=64" in capsys.readouterr().out


def test_the_list_of_methods_can_be_read_from_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["methods", "list"]) == 0
    out = capsys.readouterr().out
    assert "--method compactattention" in out and "…" not in out and "`band`:" not in out


@pytest.mark.parametrize("verb", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verb) == 0
    assert "Usage: firstlight" in capsys.readouterr().out


def commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every verb, and every verb of a verb, by its full name."""
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(f"{path} {name}", sub)
    if not hasattr(command, "commands"):
        yield path, command


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_by_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path, command in commands(f"firstlight {verb}", load(verb)):
        paragraphs = [" ".join(text.split()) for text in (command.help or "").split("\n\n")]
        examples = [text for text in paragraphs if re.search(rf"(^|\| ){path}", text)]
        assert examples, f"no example in `{path} --help`"
        for example in examples:
            refuses_nothing(example.rpartition("| ")[2], command)


def refuses_nothing(example: str, command: Any) -> None:
    """An example's flags exist; its values are read, but nothing is run."""
    words = shlex.split(example)
    given = words[next(i for i, word in enumerate(words) if word == command.name) + 1 :]
    command.make_context(command.name, given, resilient_parsing=False)


def test_the_shell_learns_verbs_flags_and_names() -> None:
    def completed(line: str) -> list[str]:
        asked = {"_FIRSTLIGHT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        command = [sys.executable, "-m", "firstlight.cli"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **asked})
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    assert completed("firstlight ") == list(VERBS)
    assert completed("firstlight run m --prec") == ["--precision"]
    assert completed("firstlight run m --precision f") == ["f32"]
    assert "band" in completed("firstlight methods show ")


def test_help_and_errors_come_without_torch() -> None:
    code = (
        "import sys; from firstlight.cli.main import call; import firstlight;"
        "assert call(['--help']) == 0 and call(['run', 'm', '-p', '']) == 2 and call(['methods', 'list', '--x']) == 2;"
        "assert firstlight.SamplingParams(max_tokens=1); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


def test_bars_are_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars() as bars:
        for done in range(3):
            bars(types.SimpleNamespace(phase="prefill", done=done, total=2, rid="r"))
            bars.shares("fetching")(done / 2)
    assert capsys.readouterr() == ("", "")


def test_bars_show_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Bars(screen) as bars:
        fetch = bars.shares("fetching m")
        for share in (0.0, 0.5, 0.99):
            fetch(share)
        for done in range(1, 5):
            bars.tell(f"training: loss 0.{done}", done, 4)
        for done in range(3):
            bars(types.SimpleNamespace(phase="load", done=done, total=2, rid=None))
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", screen.file.getvalue())
    assert "fetching m" in shown and "99%" in shown and "preparing the model" in shown
    assert "training: loss 0.3" in shown and "75%" in shown, "news of the same work is no new work"
    assert "fetching" not in shown.rpartition("preparing")[2]
