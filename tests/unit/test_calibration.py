"""Calibration files: found where they should be, refused when they are another's, and notebooks that survive a stop."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from firstlight.core import calibration, registry
from firstlight.core.calibration import Calibration, default_path, find, write
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, ModelFacts
from firstlight.core.registry import Method, make_parts, recipe
from firstlight.evaluate import books
from firstlight.train import calibrating, texts
from firstlight.train.calibrating import Notebook

MODEL = "a" * 64
MADE = Calibration("knob", MODEL, {"prompts": 3}, {"a text": "b" * 64}, {"at": 3, "curve": [0.5, 1.0]})
FACTS = ModelFacts(MODEL, 4, 6, 2, 16, (None,) * 4)


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing but one key."""

    width: int = dataclasses.field(default=1, metadata={"doc": "how wide"})


class Knob:
    """A part that must be told where."""

    Config = Config
    capability = Capability(calibration=True)

    def __init__(self, config: Config) -> None:
        self.at = -1

    def bind(self, model: ModelFacts, found: Calibration | None) -> None:
        if found is not None:
            self.at = found.value("at", int)
        if self.at >= model.num_layers:
            raise UserError(f"layer {self.at} is beyond the model")


class Other(Knob):
    """Its second part."""


class Entry:
    def __init__(self, cls: type) -> None:
        self.cls = cls

    def load(self) -> type:
        return self.cls


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIRSTLIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(registry, "_entries", lambda: {"knob": {"tokens": Entry(Knob), "cache": Entry(Other)}})
    return tmp_path


def test_what_was_written_is_found_at_its_place_or_where_it_is_named(tmp_path: Path) -> None:
    assert find("knob", MODEL, None) is None
    path = tmp_path / "mine.json"
    write(path, MADE)
    assert find("knob", MODEL, str(path)) == dataclasses.replace(MADE, path=str(path))
    assert find("knob", MODEL, None) is None
    write(default_path("knob", MODEL), MADE)
    assert default_path("knob", MODEL) == tmp_path / MODEL / "knob"
    assert find("knob", MODEL, None) == dataclasses.replace(MADE, path=str(tmp_path / MODEL / "knob"))


def damaged(body: dict[str, object], **change: object) -> str:
    return json.dumps(body | change)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lambda body: damaged(body, model="c" * 64), "is of another model"),
        (lambda body: damaged(body, method="spoon"), "is for spoon, not for knob"),
        (lambda body: damaged(body, format=2), "is of a newer Firstlight"),
        (lambda body: damaged(body, values=[1]), "damaged"),
        (lambda body: json.dumps(body)[:-9], "damaged"),
        (lambda body: "[]", "damaged"),
        (lambda body: "", "damaged"),
        (lambda body: b"\xff\x00", "damaged"),
        (lambda body: damaged(body, values={"at": True}), "has no at that knob can use"),
        (lambda body: damaged(body, values={}), "has no at that knob can use"),
        (lambda body: damaged(body, values={"at": 4}), "beyond the model"),
    ],
)
def test_a_wrong_file_gets_one_clear_line(text, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "mine.json"
    write(path, MADE)
    content = text(json.loads(path.read_text()))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as refusal:
        make_parts([Method("knob", calibration=path)], FACTS)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        make_parts([Method("knob", calibration=str(tmp_path / "none.json"))], FACTS)


def test_both_parts_get_the_file_and_the_recipe_carries_its_values(tmp_path: Path) -> None:
    plain = make_parts([Method("knob", width=3)], FACTS)
    write(tmp_path / "mine.json", MADE)
    told = make_parts([Method("knob", width=3, calibration=str(tmp_path / "mine.json"))], FACTS)
    assert [part.impl.at for part in plain] == [-1, -1] and [part.impl.at for part in told] == [3, 3]
    assert [part.config.width for part in told] == [3, 3]
    assert recipe(plain) != recipe(told)
    with pytest.raises(UserError, match="it has: calibration, width"):
        make_parts([Method("knob", depth=3)])
    assert [part.impl.at for part in make_parts([Method("knob")])] == [-1, -1], "checked without a model, not bound"


def test_what_ships_is_whole_and_was_made_on_no_judged_text() -> None:
    folder = Path(calibration.__file__).parents[1] / "calibrations"
    judged = {books.digest_of(book) for book in books.BOOKS}
    for path in folder.glob("*.json"):
        body = json.loads(path.read_text())
        found = find(body["method"], body["model"], None)
        assert found is not None and path.name.endswith(f"-{found.method}.json")
        assert found.texts and not judged & set(found.texts.values())


def test_a_notebook_goes_on_only_for_an_equal_run(tmp_path: Path) -> None:
    path = tmp_path / "knob.unfinished"
    done = {"sums": torch.arange(6).view(2, 3)[:, 1:], "step": torch.tensor(4)}
    Notebook(path, {"settings": {"prompts": 3}}).write(done)
    again = Notebook(path, {"settings": {"prompts": 3}}).read()
    assert set(again) == {"sums", "step"} and torch.equal(again["sums"], done["sums"])
    assert Notebook(path, {"settings": {"prompts": 4}}).read() == {}
    path.write_bytes(path.read_bytes()[:20])
    assert Notebook(path, {"settings": {"prompts": 3}}).read() == {}
    Notebook(path, {}).close()
    assert not path.exists()


def test_a_method_without_a_procedure_is_refused() -> None:
    with pytest.raises(UserError, match="no method that is calibrated; choose one of: knob"):
        calibrating.procedure_of(Method("band"))
    with pytest.raises(UserError, match="another package"):
        calibrating.procedure_of(Method("knob"))


def test_the_calibration_text_is_not_judged_on() -> None:
    assert texts.NAME not in books.BOOKS and len(texts.calibration_text()) > 20_000
