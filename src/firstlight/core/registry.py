"""Names to parts: the registry joins parts of equal name and reads `NAME:key=value,...`.

Every part, ours or an outside package's, is announced in the entry-point group `firstlight.methods` as
`"<method>.<seam>" = "module:Class"`. A part class has `Config` (a frozen dataclass whose fields carry a `doc` text),
`capability`, and takes its config as the only argument (a schedule: config and view config).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from firstlight.core import calibration as calibrations
from firstlight.core.calibration import Calibration
from firstlight.core.errors import UserError
from firstlight.core.parts import Capability, ModelFacts
from firstlight.core.values import read_value

GROUP = "firstlight.methods"
_ITEM = re.compile(r"""\s*([A-Za-z_]\w*)\s*=\s*("[^"]*"|'[^']*'|[^,]*)\s*(?:,|$)""")


@dataclass(frozen=True)
class Method:
    """A method's name and the settings that somebody gave."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, name: str, **settings: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "settings", settings)

    @classmethod
    def parse(cls, text: str) -> Method:
        """`NAME` or `NAME:key=value,key="a,b"`. Raises UserError on anything else."""
        name, _, rest = text.partition(":")
        settings: dict[str, Any] = {}
        at = 0
        while at < len(rest):
            item = _ITEM.match(rest, at)
            if item is None:
                raise UserError(f"can't read {rest[at:]!r} in {text!r}; write NAME:key=value,key=value")
            settings[item[1]] = item[2].strip().strip("\"'")
            at = item.end()
        return cls(name.strip(), **settings)


@dataclass(frozen=True)
class Part:
    """One part of one method, made with its config."""

    method: str
    seam: str
    impl: Any
    config: Any
    capability: Capability
    calibration: Calibration | None = None


@functools.cache
def _entries() -> dict[str, dict[str, importlib.metadata.EntryPoint]]:
    """Method -> seam -> entry point."""
    table: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        name, _, seam = entry.name.rpartition(".")
        table.setdefault(name, {})[seam] = entry
    return table


def names(schedules: bool = False) -> list[str]:
    """The known methods, or the known schedules."""
    return [name for name, seams in _entries().items() if ("schedule" in seams) == schedules]


def classes(name: str, *, schedules: bool = False) -> dict[str, Any]:
    """Seam -> class of one method. Raises UserError that lists the choices."""
    if name not in names(schedules):
        what = "schedule" if schedules else "method"
        raise UserError(f"no {what} is called {name!r}; choose one of: {', '.join(names(schedules))}")
    return {seam: entry.load() for seam, entry in _entries()[name].items()}


def configure(cls: Any, method: Method, known: set[str]) -> Any:
    """The class's config from a method's settings; values given as text are read by the field's type."""
    hints = typing.get_type_hints(cls.Config)
    for key in method.settings:
        if key not in known:
            raise UserError(f"{method.name} has no setting {key!r}; it has: {', '.join(sorted(known)) or 'none'}")
    chosen = {
        key: read_value(f"{method.name}:{key}", hints[key], value)
        for key, value in method.settings.items()
        if key in hints
    }
    return cls.Config(**chosen)


def make_parts(methods: Sequence[Method], model: ModelFacts | None = None) -> list[Part]:
    """All parts of the methods, in order of seams, ready for a model; without one they are only checked.

    Raises UserError on unknown names, keys, values and collisions, and on what can't be with this model.
    """
    parts = [part for method in methods for part in _parts(method, model)]
    _refuse_collisions(parts)
    if model is not None:
        for part in parts:
            if bind := getattr(part.impl, "bind", None):
                bind(model, part.calibration)
    return parts


def is_calibrated(found: Mapping[str, Any]) -> bool:
    """Whether any of a method's classes (seam -> class) reads a calibration file."""
    return any(getattr(cls, "capability", Capability()).calibration for cls in found.values())


def _parts(method: Method, model: ModelFacts | None) -> list[Part]:
    """One method's parts. A key that two of them have is set in both."""
    found = classes(method.name)
    known = {f.name for cls in found.values() for f in dataclasses.fields(cls.Config)}
    calibration = None
    if is_calibrated(found):
        known.add(calibrations.KEY)
        if model is not None:
            file = method.settings.get(calibrations.KEY)
            published = next((r for cls in found.values() if (r := getattr(cls, "read_published", None))), None)
            calibration = calibrations.find(method.name, model.digest, file, published)
    configs = {seam: configure(cls, method, known) for seam, cls in found.items()}
    made = {seam: cls(configs[seam]) for seam, cls in found.items()}
    return [Part(method.name, seam, impl, configs[seam], impl.capability, calibration) for seam, impl in made.items()]


def make_schedule(method: Method, view_config: Any) -> Any:
    """A fresh policy. The same call serves the engine and a replay."""
    cls: Any = classes(method.name, schedules=True)["schedule"]
    return cls(configure(cls, method, {f.name for f in dataclasses.fields(cls.Config)}), view_config)


def recipe(parts: Sequence[Part]) -> str:
    """Names what was done to the cells: empty for exact ones, else a hash of the parts that alter cells."""
    altering = [
        [p.method, p.seam, dataclasses.asdict(p.config), *([p.calibration.digest] if p.calibration else [])]
        for p in parts
        if p.capability.alters_cells
    ]
    if not altering:
        return ""
    return hashlib.sha256(json.dumps(sorted(altering, key=str), sort_keys=True, default=str).encode()).hexdigest()


def recipe_text(parts: Sequence[Part]) -> str:
    """The same for people: the parts that alter cells as `--method` takes them, or "exact"."""
    altering = sorted((p.method, dataclasses.asdict(p.config)) for p in parts if p.capability.alters_cells)
    return " ".join(f"{name}:{','.join(f'{k}={v}' for k, v in given.items())}" for name, given in altering) or "exact"


def conflict(one: str, other: str) -> str | None:
    """Why two methods can't work together, for people; None = they can. Their capabilities decide."""
    parts = [_parts(Method(name), None) for name in (one, other)]
    return next((why for a, b in itertools.product(*parts) if (why := _clash(a, b))), None)


_BOTH = {
    "prompt": "both choose the prompt's tokens",
    "reuse": "both say which K/V are known already",
    "tokens": "both decide which rows go on, and what one lets go the other may want back",
    "attention": "both decide which keys a head reads",
    "cache": "both decide which K/V stay",
}


def _clash(a: Part, b: Part) -> str | None:
    """Two parts of one seam clash, but for planners of which one leaves heads to the other."""
    if a.seam != b.seam or a.capability.some_heads != b.capability.some_heads:
        return None
    return _BOTH[a.seam]


def _refuse_collisions(parts: Sequence[Part]) -> None:
    for a, b in itertools.combinations(parts, 2):
        if a.method == b.method and a.seam == b.seam:
            raise UserError(f"{a.method} is given twice; give it once, with all its settings")
        if a.method != b.method and (why := _clash(a, b)):
            raise UserError(f"{a.method} and {b.method} can't work together: {why}; give one of the two")
