"""Which experts the tokens took: counts per layer, read from the routers' results as the steps run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qcn_compile.artifact import Route
from qcn_compile.errors import UsageError


@dataclass
class Routing:
    """Counts since it was made. `layers`: i64 [experts] by the router's module path; shared experts are not counted.

    `tokens`: tokens computed, prompts and drafts included. `file`: where `write` puts them.
    """

    model: str
    file: Path | None = None
    tokens: int = 0
    layers: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, route: Route, ids: np.ndarray) -> None:
        """One router's choices in one step, i32 [T, slots]."""
        counts = np.bincount(ids[:, :route.top_k].ravel(), minlength=route.experts)
        if route.layer in self.layers:
            self.layers[route.layer] += counts
        else:
            self.layers[route.layer] = counts

    def to_json(self) -> dict[str, Any]:
        """model, tokens, layers: how often each expert was chosen, in the order of the experts."""
        return {"model": self.model, "tokens": self.tokens,
                "layers": {name: counts.tolist() for name, counts in self.layers.items()}}

    def write(self) -> None:
        """Write the file, when one was named. Raises UsageError naming it."""
        if self.file is None:
            return
        try:
            self.file.write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write expert statistics to {self.file}: {error.strerror}; name another file") \
                from None


def read(file: str | Path) -> dict[str, list[int]]:
    """Counts per layer from a file that `write` made. Raises UsageError for anything else."""
    try:
        layers = json.loads(Path(file).read_text(encoding="utf-8"))["layers"]
        return {str(name): [int(n) for n in counts] for name, counts in layers.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: no expert statistics ({error}); make them with qcn-run BUILD --expert-statistics "
                         "FILE") from None


def check(routes: Sequence[Route], build: Path) -> None:
    """Raises UsageError when a build has no routers to watch."""
    if not routes:
        raise UsageError(f"{build} names no routers in its plans: a dense model, or a build of an older qcn-compile; "
                         "build a mixture of experts again")
