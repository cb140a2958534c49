"""Typed reads of untrusted key-values: GGUF metadata, a config.json, an object inside one. A wrong one is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from firstlight.core.errors import UserError


class Fields:
    """The settings of a model file. Every read raises UserError if the key is missing or of another type."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"the model's {key} is {_shown(value)}, a whole number is needed; use another model file")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"the model's {key} is {_shown(value)}, a number is needed; use another model file")
        return float(value)

    def reals(self, key: str) -> list[float]:
        values = self._get(key, None)
        if not isinstance(values, list | tuple):
            raise UserError(f"the model's {key} is {_shown(values)}, a list is needed; use another model file")
        return [Fields({key: value}).real(key) for value in values]

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"the model's {key} is {_shown(value)}, true or false is needed; use another model file")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"the model's {key} is {_shown(value)}, an object is needed; use another model file")
        return value

    def has(self, key: str) -> bool:
        """Whether the file says anything about it: a null says nothing."""
        return self.values.get(key) is not None

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"the model file does not say its {key}; use another model file")
        return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 40 else f"a {type(value).__name__}"
