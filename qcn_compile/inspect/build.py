"""A build as qcn-inspect reads it: manifest, report, plans and graphs, each loaded on first use."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qcn_compile.artifact import Manifest, Plan, read_manifest, read_plan
from qcn_compile.errors import ArtifactError
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.text import parse_graph


@dataclass(frozen=True)
class Build:
    """One artifact directory, checked when opened."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: Path, deep: bool = False) -> Build:
        """Raises ArtifactError naming what is missing or altered."""
        return Build(path, read_manifest(path, deep))

    @cached_property
    def report(self) -> dict[str, Any]:
        """report.json: decision, memory, events, ops, passes."""
        try:
            found: dict[str, Any] = json.loads((self.path / "report.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(f"{self.path} has no report.json ({error.strerror}); build it again") from None
        return found

    @cached_property
    def plans(self) -> list[Plan]:
        """All plans, in the order of the manifest."""
        return [read_plan(self.path, name) for name in self.manifest.plans]

    def stages(self) -> dict[str, Path]:
        """File of every kept stage of the graphs, in order: 00-traced, 01-canonicalize, ..., main."""
        return {p.name.partition(".")[0]: p for p in sorted((self.path / "ir").glob("*.qir*"))}

    def graph(self, stage: str = "main") -> Graph:
        """The graph of a stage. Raises ArtifactError listing the stages there are."""
        file = self.stages().get(stage)
        if file is None:
            raise ArtifactError(f"{self.path} has no stage {stage!r}; it has {', '.join(self.stages())}")
        data = file.read_bytes()
        return parse_graph((gzip.decompress(data) if file.suffix == ".gz" else data).decode())

    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(entry["bytes"] for name, entry in self.manifest.files.items() if name.startswith("weights/"))
