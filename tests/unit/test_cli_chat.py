"""The chat on a terminal, with a model that repeats what it hears."""

from __future__ import annotations

import builtins
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firstlight.cli.chat import Chat, stats
from firstlight.cli.main import call
from firstlight.cli.progress import Bars
from firstlight.core.errors import UserError
from firstlight.core.request import Completion, SamplingParams
from firstlight.prompt.spans import flat
from tests.terminal import Terminal
from tests.unit.test_cli import REPORT

STDIN_IS_A_TERMINAL = types.SimpleNamespace(isatty=lambda: True)


class Parrot:
    """Says the last message back, word by word. `fails` is raised before word `fails_at`."""

    model_name = "parrot"
    engine = types.SimpleNamespace(limits=types.SimpleNamespace(max_model_len=100))

    def __init__(self, fails: BaseException | None = None, fails_at: int = 0) -> None:
        self.fails, self.fails_at = fails, fails_at
        self.heard: list[list[dict[str, str]]] = []
        self.num_open = 0

    def stream(self, given: list[dict[str, Any]], params: SamplingParams) -> Iterator[Any]:
        messages = flat(given)
        self.heard.append(messages)
        self.num_open += 1
        try:
            for number, word in enumerate(messages[-1]["content"].split(" ")):
                if self.fails is not None and number == self.fails_at:
                    raise self.fails
                yield types.SimpleNamespace(text=f"{word} ", completion=None)
            counts = {"prompt_tokens": 10 * len(self.heard), "cached_tokens": 10 * (len(self.heard) - 1)}
            report = {**REPORT, **counts, "completion_tokens": 4, "finish_reason": "stop"}
            yield types.SimpleNamespace(text="", completion=Completion([], [], "", "stop", report))
        finally:
            self.num_open -= 1


Talk = Callable[..., str]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Types some lines, then Ctrl-D; gives what stderr said. A line may be an exception: what `input` raises."""

    def typed(llm: Parrot, *lines: str | BaseException, system: str | None = None, documents: Any = ()) -> str:
        said: list[str | BaseException] = [*lines, EOFError()]

        def answer(prompt: str) -> str:
            line = said.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "input", answer)
            Chat(llm, Bars(), SamplingParams(max_tokens=4), system, documents).talk()  # type: ignore[arg-type]
        return capsys.readouterr().err

    return typed


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def parrot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_each_turn_hears_the_whole_conversation(talk: Talk) -> None:
    llm = Parrot()
    talk(llm, "one", "", "two", "/exit", "never said", system="be brief", documents=["A.", "B."])
    lead = [{"role": "system", "content": "be brief"}, user("A.\n\nB.\n\none")]
    assert llm.heard == [lead, [*lead, parrot("A.\n\nB.\n\none "), user("two")]]


def test_reset_forgets_all_but_the_system_message(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a document")
    llm = Parrot()
    err = talk(llm, "one", f"/file {tmp_path / 'a.txt'}", "/reset", "/stats", "two", system="be brief")
    assert llm.heard[1] == [{"role": "system", "content": "be brief"}, user("two")]
    assert "nothing was answered yet" in err


def test_a_file_goes_before_one_message(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my notes.txt").write_text("a document")
    llm = Parrot()
    err = talk(llm, "/file nowhere.txt", "/file", "/file -", '/file "~/my notes.txt"', "why?", "and?")
    assert [heard[-1] for heard in llm.heard] == [user("a document\n\nwhy?"), user("and?")]
    assert "nowhere.txt: No such file or directory" in err and "/file needs the path" in err
    assert "/-: No such file or directory" in err and "10 characters go before your next message" in err


def test_a_mistake_is_one_line_and_changes_nothing(talk: Talk) -> None:
    llm = Parrot(UserError("the prompt has 900 tokens, the limit is 99; shorten it"))
    err = talk(llm, "one", "/jump", "/etc/passwd is a file", documents=["a long one"])
    assert "firstlight: the prompt has 900 tokens, the limit is 99; shorten it. Nothing was added; /reset" in err
    assert "firstlight: no command is called /jump; /help lists them\n" in err
    assert llm.heard == [[user("a long one\n\none")], [user("/etc/passwd is a file")]]


def test_bytes_that_are_no_text(talk: Talk) -> None:
    llm = Parrot()
    err = talk(llm, UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no"), "caf\udce9", "café")
    assert llm.heard == [[user("café")]] and err.count("that was not UTF-8 text") == 2


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(talk: Talk) -> None:
    llm = Parrot(KeyboardInterrupt(), fails_at=2)
    err = talk(llm, "one two three four", "go on")
    assert llm.heard[1] == [user("one two three four"), parrot("one two "), user("go on")]
    assert "stopped; what was said stays" in err and llm.num_open == 0


def test_ctrl_c_before_the_first_token_adds_nothing(talk: Talk) -> None:
    llm = Parrot(KeyboardInterrupt())
    err = talk(llm, "one", KeyboardInterrupt(), "two", documents=["a document"])
    assert llm.heard == [[user("a document\n\none")], [user("a document\n\ntwo")]]
    assert "stopped before the first token" in err and "Ctrl-D or /exit leaves" in err


def test_stats_say_what_came_from_the_cache(talk: Talk) -> None:
    err = talk(Parrot(), "one", "two", "/stats")
    assert "20 tokens, 10 from the cache (50%)" in err and "30 tokens, 10 from the cache (33%)" in err
    assert "24 of 100 tokens" in err and "2, 8 tokens" in err


@pytest.mark.parametrize(
    ("tokens", "why"),
    [(4, "cut after 4 tokens; --max-tokens allows more"), (3, "cut after 3 tokens; the context is full: /reset")],
)
def test_an_answer_that_was_cut_says_why(tokens: int, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(Parrot(), Bars(), SamplingParams(max_tokens=4), None, [])  # type: ignore[arg-type]
    chat._finish({**REPORT, "finish_reason": "length", "completion_tokens": tokens})
    assert why in capsys.readouterr().err


def test_stats_of_one_token() -> None:
    report = {**REPORT, "completion_tokens": 1, "tpot_s": 0.0}
    assert dict(stats([report], 100))["first token"] == "500.0 ms, one token"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["/reset", "/stats", "/help", "/file x", "/file", "/nothing", "", " ", "/"]),
            st.text(st.characters(exclude_characters="\n\r", codec="utf-8"), max_size=8).filter(lambda t: t != "/exit"),
            st.builds(KeyboardInterrupt),
        )
    ),
    st.sampled_from([None, UserError("no"), KeyboardInterrupt()]),
    st.integers(0, 2),
)
def test_no_line_ends_the_chat_and_roles_alternate(
    talk: Talk, lines: list[Any], fails: BaseException | None, fails_at: int
) -> None:
    llm = Parrot(fails, fails_at)
    talk(llm, *lines, "last")
    for heard in llm.heard:
        assert [message["role"] for message in heard] == (["user", "assistant"] * len(heard))[: len(heard)]
    assert llm.heard[-1][-1] == user("last") and llm.num_open == 0


@pytest.mark.parametrize("flag", ["--json", "--raw"])
def test_only_a_person_can_chat(flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", STDIN_IS_A_TERMINAL)
    assert call(["run", "m", flag]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_a_chat_has_one_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", STDIN_IS_A_TERMINAL)
    assert call(["run", "m", "--n", "2"]) == 2
    assert "n=2: a chat goes on from one answer" in capsys.readouterr().err


def test_a_missing_document_is_said_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", STDIN_IS_A_TERMINAL)
    assert call(["run", "m", "-f", "nowhere.txt"]) == 2
    assert "can't read nowhere.txt" in capsys.readouterr().err


SESSION = """
import contextlib, sys
from pathlib import Path
from firstlight.cli.chat import Chat, line_editing
from firstlight.cli.progress import Bars
from firstlight.core.request import SamplingParams
from tests.unit.test_cli_chat import Parrot
with line_editing(Path(sys.argv[1])):
    Chat(Parrot(), Bars(), SamplingParams(), None, []).talk()
"""


def test_lines_are_remembered_across_sessions(tmp_path: Path) -> None:
    history = tmp_path / "new" / "history"
    with Terminal(["-c", SESSION, str(history)]) as terminal:
        terminal.expect("> ")
        terminal.type("first words\r")
        terminal.expect("tokens/s after the first")  # the breakdown: stderr is a terminal
        terminal.expect("> ")
        terminal.interrupt("Ctrl-D or /exit leaves\n> ")
        terminal.type("\x04")
        assert terminal.leave() == 0
    assert history.stat().st_mode & 0o777 == 0o600
    with Terminal(["-c", SESSION, str(history)]) as terminal:
        terminal.expect("> ")
        terminal.type("\x1b[A and more\r")
        terminal.expect("\nfirst words and more ")  # the parrot's answer to the remembered line
        terminal.type("/exit\r")
        assert terminal.leave() == 0


def test_without_readline_there_is_still_a_chat(tmp_path: Path) -> None:
    code = f"import sys; sys.modules['readline'] = None\n{SESSION}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "h")], input="hello\n", capture_output=True, text=True
    )
    assert done.returncode == 0 and "hello" in done.stdout
