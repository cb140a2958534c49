"""The rules of the house: who may import whom, what each file says of itself, sizes, and pages that can't drift."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from firstlight.cli import docs

ROOT = docs.checkout()
PACKAGE = ROOT / "src" / "firstlight"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up. Rooms on one line don't import one another; "firstlight" is the package's front page.
LEVELS = [
    {"core"},
    {"kernels"},
    {"prompt", "vision", "reuse", "schedule", "models", "tokens", "attention", "cache", "decode"},
    {"engine"},
    {"llm_document"},
    {"llm"},
    {"llm_async"},
    {"firstlight"},
    {"server", "cluster", "simulate", "evaluate", "train", "integrations"},
    {"cli"},
]


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(LEVELS) if room in rooms)


def room_of(module: str) -> str:
    """`firstlight.core.attn` -> `core`; the package itself is `firstlight`."""
    return module.split(".")[1] if "." in module else module


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it goes"
            modules = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from modules if node.module == "firstlight" else [node.module or ""]


def wrong_edges(module: str, tree: ast.AST) -> list[str]:
    """Imports of ours that don't go strictly down."""
    rooms = {p.stem if p.suffix == ".py" else p.name for p in PACKAGE.iterdir()}
    here, wrong = room_of(module), []
    for name in imports_of(tree):
        if name.split(".")[0] == "firstlight":
            there = room_of(name) if room_of(name) in rooms else "firstlight"
            if there != here and level_of(there) >= level_of(here):
                wrong.append(f"{module} -> {name}")
    return wrong


def lazy_torch(tree: ast.Module) -> bool:
    """Whether torch is imported for type checkers only."""
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    count = sum(name.split(".")[0] == "torch" for name in imports_of(tree))
    return count == sum(name.split(".")[0] == "torch" for n in guarded for name in imports_of(n))


def functions() -> Iterator[tuple[str, int]]:
    """Name and length of every function outside kernels/."""
    for path in FILES:
        if "kernels" not in path.parts:
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{path.name}:{node.name}", node.end_lineno - node.lineno + 1


def p90(values: list[int]) -> float:
    return statistics.quantiles(values, n=10)[-1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_of(p))
def test_imports_go_down(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert wrong_edges(module_of(path), tree) == []
    if room_of(module_of(path)) == "core":
        assert lazy_torch(tree), "core names torch for type checkers only"


@pytest.mark.parametrize(
    ("module", "line", "is_wrong"),
    [
        ("firstlight.core.attn", "from firstlight.kernels import dispatch", True),
        ("firstlight.cache.pool", "from firstlight.reuse.prefix import Hit", True),
        ("firstlight.engine.park", "def f():\n    import firstlight.llm", True),
        ("firstlight.core.parts", "from firstlight import SamplingParams", True),
        ("firstlight.reuse.prefix", "from firstlight import cache", True),
        ("firstlight.cache.pool", "from firstlight.cache.table import RequestKV", False),
        ("firstlight.cli.run", "from firstlight import LLM", False),
        ("firstlight.engine.engine", "import firstlight.core.errors", False),
    ],
)
def test_the_import_test_sees(module: str, line: str, is_wrong: bool) -> None:
    assert bool(wrong_edges(module, ast.parse(line))) == is_wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_of(p))
def test_every_file_says_what_it_is_and_imports(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), "open the file with what it is"
    importlib.import_module(module_of(path))


@pytest.mark.parametrize("name", ["README.md", "docs/cli.md", "docs/methods.md", "docs/tree.md"])
def test_generated_pages_are_fresh(name: str) -> None:
    assert (ROOT / name).read_text("utf-8") == docs.pages(ROOT)[name], "run `make docs`"


def test_the_tree_names_every_file() -> None:
    shown = re.findall(r"^ +(\S+\.py) ", docs.tree(PACKAGE), re.MULTILINE)
    assert sorted(shown) == sorted(p.name for p in FILES if p.name != "__init__.py")


def test_sizes() -> None:
    lines = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in FILES}
    lengths = dict(functions())
    assert p90(list(lines.values())) <= 300
    assert [name for name, count in lines.items() if count > 500] == []
    assert statistics.median(lengths.values()) <= 10
    assert p90(list(lengths.values())) <= 30


def test_nothing_unfinished_and_no_drawer_for_everything() -> None:
    unfinished = re.compile("TO" + "DO|FIX" + "ME|XX" + "X|NotImplemented" + "Error")
    assert [p.name for p in FILES if unfinished.search(p.read_text("utf-8"))] == []
    assert [p.name for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/path-of-a-prompt.md"])
def test_links_and_named_files_exist(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    # A file is named with its folder: `core/parts.py`.
    files = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text)
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []
    assert [file for file in files if not (PACKAGE / file).exists() and not (ROOT / file).exists()] == []
