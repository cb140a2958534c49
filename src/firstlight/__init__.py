"""Firstlight: an LLM engine built around prefill, the part of inference that people wait for."""

from __future__ import annotations

__version__ = "0.1.0"
