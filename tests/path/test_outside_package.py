"""A package made of CONTRIBUTING.md's own examples works, without touching the engine."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from firstlight import LLM, SamplingParams
from firstlight.cli import docs
from firstlight.cli.main import call
from firstlight.core import registry
from firstlight.core.errors import UserError
from firstlight.core.registry import Method, make_schedule
from firstlight.core.view import ViewConfig
from firstlight.simulate.executor import RowCost, SimExecutor, SimRequest, run
from tests.tiny import save_tiny

PAGE = (docs.checkout() / "CONTRIBUTING.md").read_text("utf-8")
PROMPT = [7 * n % 251 for n in range(700)]
LAYERS = 3


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's files, installed as pip would: modules, and metadata with the entry points of its pyproject.toml."""
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods" / "__init__.py").touch()
    for code in blocks("python"):
        name = code.split("\n", 1)[0].removeprefix("# ")
        (tmp_path / name).write_text(code, "utf-8")
    (project,) = (tomllib.loads(text)["project"] for text in blocks("toml"))
    metadata = tmp_path / "my_methods-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{key} = {value}" for key, value in project["entry-points"][registry.GROUP].items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines]))
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._entries.cache_clear()
    yield
    registry._entries.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "my_methods"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), LAYERS)


def answer(model: Path, *methods: str, schedule: str = "sarathi") -> dict:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with LLM(model, methods=list(methods), schedule=schedule, precision="f32", threads=1) as llm:
        return llm.generate(PROMPT, params)[0].report


def test_the_page_holds_a_package() -> None:
    assert len(blocks("toml")) == 1
    assert [code.split("\n", 1)[0] for code in blocks("python")] == [
        "# my_methods/dilated.py",
        "# my_methods/every_other.py",
        "# my_methods/thinning.py",
        "# my_methods/ends.py",
        "# my_methods/shortest.py",
    ]


def test_they_are_listed_with_their_settings(package: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["methods", "list", "--json"]) == 0
    found = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert found["dilated"]["parts"][0]["settings"][0]["name"] == "window"
    assert found["thinning"]["parts"][0]["seam"] == "tokens"


def test_the_planner_decides_what_is_read(package: None, model: Path) -> None:
    report = answer(model, "dilated:window=64")
    assert not report["exact"]
    assert report["methods"][0] | {"why": ""} == {"name": "dilated", "seam": "attention", "used": True, "why": ""}
    assert 0.2 < report["attention"]["density"] < 0.9


def test_the_row_policy_decides_what_is_computed(package: None, model: Path) -> None:
    report = answer(model, "thinning:layer=0,step=2,tail=10")
    kept = sum(n % 2 == 0 or n >= len(PROMPT) - 10 for n in range(len(PROMPT)))
    assert report["cells"]["computed"] == len(PROMPT) + (LAYERS - 1) * kept
    assert report["cells"]["absent"] == (LAYERS - 1) * (len(PROMPT) - kept)


def test_the_retention_decides_what_stays(package: None, model: Path) -> None:
    whole, report = answer(model)["kv"]["bytes_end"], answer(model, "ends:first=10,last=100")
    assert report["token_ids"][0] == answer(model)["token_ids"][0] and not report["exact"]
    assert report["kv"]["bytes_end"] == whole * 2 // 12 and report["kv"]["bytes_peak"] <= whole


def test_the_editor_decides_what_the_tokens_are(package: None, model: Path) -> None:
    with LLM(model, methods=["every_other:rate=0.25"], precision="f32", threads=1) as llm:
        out = llm.generate("0123456789ABCDEF\n\nwhy?", SamplingParams(max_tokens=1))[0]
        assert llm.tokenizer.decode(out.prompt_ids) == "048C\n\nwhy?"


def test_the_policy_decides_the_order(package: None, model: Path) -> None:
    """In the engine the answer is the same; on a clock of its own the order is the policy's, and a log replays."""
    assert answer(model, schedule="shortest")["token_ids"] == answer(model)["token_ids"]
    config = ViewConfig(LAYERS, 6, 6 * 400, 8, 2048, schedule={"name": "shortest", "settings": {}})
    prompts = [SimRequest(f"r{n}", 0.01, n, 20) for n in (900, 30, 400)]
    run(make_schedule(Method("shortest"), config), SimExecutor(config, RowCost(), prompts))
    assert sorted(prompts, key=lambda r: r.token_at[0]) == sorted(prompts, key=lambda r: r.n_tokens)
    patient = [SimRequest(f"r{n}", at / 1e4, n, 20) for at, n in enumerate((400, 900, 30))]
    run(make_schedule(Method("shortest", patience_s=0.0), config), SimExecutor(config, RowCost(), patient))
    assert sorted(patient, key=lambda r: r.token_at[0]) == patient
    with pytest.raises(UserError, match=r"patience_s=.* is no length of time"):
        answer(model, schedule="shortest:patience_s=-1")


def test_off_they_are_exactly_dense(package: None, model: Path) -> None:
    dense = answer(model)["token_ids"]
    assert answer(model, "dilated:window=100000")["token_ids"] == dense
    assert answer(model, "thinning:step=1")["token_ids"] == dense
    assert answer(model, "ends:last=1000")["token_ids"] == dense
    assert answer(model, "every_other:rate=1")["token_ids"] == dense
    assert answer(model, "dilated:window=64", "thinning:layer=0")["token_ids"] != dense


def test_together_and_in_chunks_they_give_the_same(package: None, model: Path) -> None:
    methods = "dilated:window=64", "thinning:layer=1"
    whole = answer(model, *methods)
    chunked = answer(model, *methods, schedule="sarathi:token_budget=128,lift=off")
    assert whole["token_ids"] == chunked["token_ids"]
    assert whole["cells"] == chunked["cells"]


def test_a_wrong_value_is_the_users_error(package: None, model: Path) -> None:
    with pytest.raises(UserError, match="window=0 is out of range"):
        answer(model, "dilated:window=0")
    with pytest.raises(UserError, match="thinning has no setting 'rate'; it has: layer, step, tail"):
        answer(model, "thinning:rate=2")


def test_they_keep_the_contract(package: None, capsys: pytest.CaptureFixture[str]) -> None:
    for names in (["dilated"], ["ends"], ["shortest"]):
        assert call(["methods", "check", *names]) == 0
    capsys.readouterr()
    assert call(["methods", "check", "thinning", "dilated", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["check"] for one in found if one["holds"]} >= {"any schedule gives the same", "alone as in any batch"}
