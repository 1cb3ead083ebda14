"""Relative error of a weight in each format: measured numbers as data, and how they are measured."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("errors.toml")


@cache
def relative_errors() -> dict[str, float]:
    """Format -> ||w - stored(w)|| / ||w||, the median over matrices."""
    return {name: float(row["error"]) for name, row in _rows().items()}


def _rows() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))
