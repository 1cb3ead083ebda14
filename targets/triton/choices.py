"""How launches of plans of one token are cut, by role: what was measured on a card, or what it may choose from."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from qcn_compile.targets.base import Call

Cut = Mapping[str, int]
Cuts = Mapping[str, Sequence[Cut]]  # role -> its cuts, the default first
FILE = Path(__file__).with_name("choices.toml")


@cache
def table() -> dict[str, Any]:
    """`choices.toml`."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def cuts_for(card: str) -> Cuts:
    """The one cut of every role that was measured on the card, all candidates of the others."""
    measured = table()["measured"].get(card, {})
    return {role: [measured[role]] if role in measured else cuts for role, cuts in table()["candidates"].items()}


def varied(cuts: Cuts, role: str, make: Callable[[Cut], Call]) -> Call:
    """The launch that `make` cuts, with the other cuts of its role to choose from. All take the same arguments."""
    first, *others = [make(cut) for cut in cuts[role]]
    assert all(call.args == first.args for call in others)
    return replace(first, role=role if others else "", others=tuple((call.kernel, call.grid) for call in others))
