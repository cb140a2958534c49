"""`python -m firstlight.cli.docs`: writes the pages that would drift if people wrote them, from the program itself.

These are docs/cli.md, docs/methods.md, docs/tree.md and the tree in README.md. A test compares them with what this
prints now.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import firstlight
from firstlight.cli import methods
from firstlight.cli.main import VERBS, load
from firstlight.cli.options import panel_of
from firstlight.core import registry
from firstlight.core.config import Options

PATH_OF_A_PROMPT = [
    *(
        "llm",
        "llm_async",
        "llm_document",
        "core",
        "cli",
        "prompt",
        "reuse",
        "schedule",
        "engine",
        "models",
        "tokens",
        "attention",
        "cache",
    ),
    *("decode", "kernels", "simulate", "evaluate", "train", "integrations"),
]
"""The order of the tree: what everything is made of, then the stations of a prompt, then what stands beside them."""

_NOTICE = "<!-- Written by `make docs`. Change the program's texts, not this page. -->\n"
_CLI_LEAD = """\
A user's mistake gets one line on stderr and exit code 2; Ctrl-C gives 130. `firstlight --install-completion` teaches
the shell to complete verbs, flags and names of methods.

Every option of the engine can be said in four ways; the first that says something wins:

| | for example |
| --- | --- |
| a flag, or a keyword of `LLM` | `--max-model-len 4096`, `LLM("smollm2", max_model_len=4096)` |
| a variable | `FIRSTLIGHT_MAX_MODEL_LEN=4096`; a list is written `a;b`, an empty variable says nothing |
| a settings file in TOML | `max_model_len = 4096` |
| its default | |

The settings file is the one that `--config FILE` names, else `$FIRSTLIGHT_CONFIG`, else `~/.config/firstlight.toml` if
it is there. One in the working directory is not read unless it is named. `--config /dev/null` is no file.

```toml
threads = 2
max_model_len = 4096
method = ["band:sink=64,window=1024"]
```
"""
_PACKAGE = "src/firstlight"
_TREE = re.compile(r"(<!-- tree -->\n```\n).*?(```\n<!-- end of tree -->)", re.DOTALL)
_NAME_WIDTH = 26
_FIGURES = "benchmarks/results/methods.json"
"""{method: [{column: figure}]}, what was measured of each setting."""
Figures = Mapping[str, Sequence[Mapping[str, Any]]]


def main() -> None:
    root = checkout()
    for name, text in pages(root).items():
        (root / name).write_text(text, "utf-8")


def checkout() -> Path:
    """The folder of README.md; generated pages exist only in a checkout."""
    return Path(firstlight.__file__).parents[2]


def pages(root: Path) -> dict[str, str]:
    """Every generated file: its name and the text it should have."""
    readme = (root / "README.md").read_text("utf-8")
    return {
        "docs/cli.md": cli_page(),
        "docs/methods.md": methods_page(json.loads((root / _FIGURES).read_text("utf-8"))),
        "docs/tree.md": f"{_NOTICE}# Every file, on the path of a prompt\n\n```\n{tree(root / _PACKAGE)}```\n",
        "README.md": _TREE.sub(lambda found: found[1] + tree(root / _PACKAGE, files=False) + found[2], readme),
    }


def tree(package: Path, files: bool = True) -> str:
    """The package in the order of a prompt's path, each entry with its docstring's first sentence.

    Without `files` folders alone, and what stands beside them at the top.
    """
    return "".join(f"{line}\n" for line in ["src/firstlight/", *_folder(package, 1, files)])


def _folder(folder: Path, depth: int, files: bool) -> Iterator[str]:
    entries = [p for p in folder.iterdir() if _is_ours(p) and (files or depth == 1 or p.is_dir())]
    for path in sorted(entries, key=lambda p: (_rank(p), p.is_dir(), p.name)):
        name = f"{'  ' * depth}{path.name}{'/' * path.is_dir()}"
        yield f"{name.ljust(_NAME_WIDTH)} {_purpose(path / '__init__.py' if path.is_dir() else path)}".rstrip()
        if path.is_dir():
            yield from _folder(path, depth + 1, files)


def _is_ours(path: Path) -> bool:
    return (path.is_dir() and any(path.glob("*.py"))) or (path.suffix == ".py" and path.name != "__init__.py")


def _rank(path: Path) -> int:
    stem = path.stem if path.parent.name == "firstlight" else ""
    return PATH_OF_A_PROMPT.index(stem) if stem in PATH_OF_A_PROMPT else len(PATH_OF_A_PROMPT)


def _purpose(path: Path) -> str:
    """The first sentence of a file's docstring, without its full stop."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z`)\]])\. (?=[A-Z`])", text)[0].rstrip(".")


def cli_page() -> str:
    """docs/cli.md: every verb with its text, arguments and flags."""
    verbs = "".join(_command(f"firstlight {name}", load(name)) for name in VERBS)
    engine = load("bench").commands["ttft"].params
    common = _table(p for p in engine if _is_engine(p))
    return f"{_NOTICE}# The command line\n\n{_CLI_LEAD}{verbs}\n## Flags of the engine\n{common}"


def _command(path: str, command: Any) -> str:
    if hasattr(command, "commands"):
        return "".join(_command(f"{path} {name}", sub) for name, sub in command.commands.items())
    text = "\n\n".join(_paragraph(p) for p in (command.help or "").strip().split("\n\n"))
    arguments = " ".join(p.name.upper() for p in command.params if p.param_type_name == "argument")
    own = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    table = _table(p for p in own if not _is_engine(p))
    more = "\nAnd the [flags of the engine](#flags-of-the-engine).\n" if any(map(_is_engine, own)) else ""
    return f"\n## `{' '.join([path, arguments]).strip()}`\n\n{text}\n{table}{more}"


def _paragraph(text: str) -> str:
    """Paragraphs that hold a command become code."""
    text = " ".join(text.split())
    return f"```\n{text}\n```" if re.match(r"(\w+ .*\| )?firstlight ", text) else text


def _is_engine(option: Any) -> bool:
    return bool(getattr(option, "rich_help_panel", None) == panel_of(Options))


def _table(options: Iterable[Any]) -> str:
    rows = "".join(_row(option) for option in options)
    return f"\n| flag | takes | what it does |\n| --- | --- | --- |\n{rows}" if rows else ""


def _row(option: Any) -> str:
    every = sorted([*option.opts, *option.secondary_opts], key=lambda name: (name.startswith("--"), name))
    names = ", ".join(f"`{name}`" for name in every)
    takes = "" if option.is_flag else (option.metavar or "N")
    default = f" Default: {option.default}." if option.default and not option.is_flag else ""
    return f"| {names} | {takes.replace('|', ' or ')} | {option.help or ''}{default} |\n"


def methods_page(figures: Figures) -> str:
    """docs/methods.md: every method and schedule of this package: settings, what it breaks, what was measured."""
    lead = (
        "A method is off unless a flag switches it on. `exact` means: the logits of one dense pass. Settings are given "
        "as\n`--method NAME:key=value,key=value`. Other packages can add methods: see CONTRIBUTING.md.\n"
    )
    found = _own_methods()
    pairs = _matrix([m["name"] for m in found if m["flag"].startswith("--method")])
    sections = (_method(m) + _measured(figures.get(m["name"], ())) for m in found)
    return f"{_NOTICE}# Methods and schedules\n\n{lead}{pairs}{''.join(sections)}"


def _matrix(names: list[str]) -> str:
    """Which methods work together, and the reasons of those that don't."""
    reasons: list[str] = []

    def cell(one: str, other: str) -> str:
        if one == other or (why := registry.conflict(one, other)) is None:
            return "" if one == other else "yes"
        if why not in reasons:
            reasons.append(why)
        return f"no ({reasons.index(why) + 1})"

    head = f"| | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}\n"
    rows = "".join(f"| {one} | {' | '.join(cell(one, other) for other in names)} |\n" for one in names)
    notes = "".join(f"{number}. {why}\n" for number, why in enumerate(reasons, 1))
    return f"\n## Together\n\nEvery method works under every schedule.\n\n{head}{rows}\n{notes}"


def _own_methods() -> list[dict[str, Any]]:
    return [m for m in methods.everything() if all(part["home"].startswith("firstlight.") for part in m["parts"])]


def _method(method: dict[str, Any]) -> str:
    kind = "exact" if method["exact"] else "approximate"
    return f"\n## `{method['flag']}` ({kind})\n\n{method['about']}\n{''.join(_part(p) for p in method['parts'])}"


def _measured(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of figures, a column for each that any row has."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"\nMeasured on smollm2 ([how, and beside what](benchmarks.md)):\n\n{table}"


def _part(part: dict[str, Any]) -> str:
    rows = "".join(
        f"| `{s['name']}` | {s['type'].replace('|', 'or')} | {s['default']} | {s['doc']} |\n" for s in part["settings"]
    )
    table = f"\n| setting | type | default | what it does |\n| --- | --- | --- | --- |\n{rows}" if rows else ""
    facts = [f"{key.replace('_', ' ')}: {methods.shown(value)}" for key, value in part["capability"].items()]
    return f"{table}\nIn `{part['seam']}/` ({part['home']}). {'; '.join(facts)}.\n"


if __name__ == "__main__":
    main()
