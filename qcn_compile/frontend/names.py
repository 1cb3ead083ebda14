"""Long lists of tensor names, shortened: `model.layers.{0..47}.mlp.experts.{0..511}.up_proj.weight`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from math import prod

Numbers = tuple[int, ...]
Box = tuple[tuple[int, ...], ...]


def _spans(numbers: tuple[int, ...]) -> str:
    """`5`, `{0..47}` or `{0..3,7}`."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    texts = [str(a) if a == b else f"{a}..{b}" for a, b in spans]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"


def _boxes(points: set[Numbers]) -> list[Box]:
    """Points as few products of number sets."""
    width = len(next(iter(points)))
    axes = tuple(tuple(sorted({p[i] for p in points})) for i in range(width))
    if prod(map(len, axes)) == len(points):
        return [axes]
    alike: dict[frozenset[Numbers], list[int]] = defaultdict(list)
    for first in axes[0]:
        alike[frozenset(p[1:] for p in points if p[0] == first)].append(first)
    return [(tuple(firsts), *box) for rest, firsts in alike.items() for box in _boxes(set(rest))]


def collapse(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers only, as one pattern each."""
    groups: dict[str, set[Numbers]] = defaultdict(set)
    for name in names:
        groups[re.sub(r"\d+(?=\.|$)", "\0", name)].add(tuple(map(int, re.findall(r"\d+(?=\.|$)", name))))
    result = []
    for template, points in groups.items():
        parts = template.split("\0")
        for box in _boxes(points):
            result.append(parts[0] + "".join(_spans(axis) + part for axis, part in zip(box, parts[1:], strict=True)))
    return sorted(result)


def listed(lines: list[str], most: int = 12) -> str:
    """Lines for an error message, at most so many."""
    rest = [f"... and {len(lines) - most} more patterns"] if len(lines) > most else []
    return "".join(f"\n    {line}" for line in lines[:most] + rest)
