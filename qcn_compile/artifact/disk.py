"""A build's files: sealing them with hashes, and the checks made before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcn_compile.artifact.schema import SCHEMA, Collective, Manifest, Plan, RankPart
from qcn_compile.errors import ArtifactError

FULL_HASH_LIMIT = 64 << 20  # larger files are checked by size at load; `verify(build, deep=True)` hashes everything


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Deterministic JSON: sorted keys, one trailing newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def seal(build: Path, manifest: Manifest, known: Mapping[str, str] | None = None) -> Manifest:
    """Hash every file of the build but those whose sha256 is known, and write the manifest, last."""
    files, known = {}, known or {}
    for path in sorted(p for p in build.rglob("*") if p.is_file() and p.name != "manifest.json"):
        name = path.relative_to(build).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or file_sha256(path)}
    body = {**manifest.to_json(), "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    write_json(build / "manifest.json", {**body, "self_sha256": digest})
    return Manifest.from_json(body)


def read_manifest(build: Path, deep: bool = False) -> Manifest:
    """Read and check a build: schema, own hash, presence, size and (small files, or all with `deep`) hash.

    Raises ArtifactError, naming the file and the cure, before anything large is mapped.
    """
    path = build / "manifest.json"
    if not path.is_file():
        raise ArtifactError(f"{build} is no build: it has no manifest.json; make one with qcn-compile -o {build}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); build it again with qcn-compile") from None
    if schema != SCHEMA:
        raise ArtifactError(f"{build} has schema {schema}, this qcn-run reads schema {SCHEMA}; "
                            "build it again with the qcn-compile of this version")
    digest = data.pop("self_sha256", "")
    if hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest() != digest:
        raise ArtifactError(f"{path} was edited after the build; build it again with qcn-compile")
    _check_files(build, data["files"], deep)
    return Manifest.from_json(data)


def _check_files(build: Path, files: dict[str, dict[str, Any]], deep: bool) -> None:
    for name, want in files.items():
        path = build / name
        if not path.is_file():
            raise ArtifactError(f"{build} lacks {name}; copy the build again or rebuild it with qcn-compile")
        size = path.stat().st_size
        if size != want["bytes"]:
            raise ArtifactError(f"{path} has {size} bytes, the manifest says {want['bytes']}: "
                                "truncated or replaced; copy the build again or rebuild it")
        if (deep or size <= FULL_HASH_LIMIT) and file_sha256(path) != want["sha256"]:
            raise ArtifactError(f"{path} was altered after the build (sha256 differs); "
                                "copy the build again or rebuild it")


def check_ranks(build: Path, parts: Sequence[RankPart], layout: Mapping[str, Any]) -> None:
    """Raises ArtifactError unless in every plan the ranks of a stage meet at the same collectives in the same order,
    and each takes what another sends."""
    tp = int(layout.get("tp", 1))
    for names in zip(*(part.plans for part in parts), strict=True):
        meetings = [_meetings(rank, tp, read_plan(build, name)) for rank, name in enumerate(names)]
        for rank, own in enumerate(meetings):
            for ranks, met in own.items():
                for other in ranks:
                    if (theirs := meetings[other].get(ranks, [])) != met:
                        raise ArtifactError(
                            f"{build}: {names[rank]} has {len(met)} collectives that differ from the {len(theirs)} of "
                            f"{names[other]}: the ranks would wait for each other for ever; build again with "
                            "qcn-compile")


def _meetings(rank: int, tp: int, plan: Plan) -> dict[tuple[int, ...], list[Collective]]:
    """What a rank does together with others, by who takes part; a transfer as its sender sees it."""
    stage = tuple(range(rank // tp * tp, rank // tp * tp + tp))
    found: dict[tuple[int, ...], list[Collective]] = {}
    for launch in plan.launches:
        if (what := launch.collective) is None:
            continue
        ranks = stage if what.peer < 0 else tuple(sorted((rank, what.peer)))
        seen = replace(what, kind="send", peer=rank) if what.kind == "recv" else what
        found.setdefault(ranks, []).append(seen)
    return found


def read_plan(build: Path, name: str) -> Plan:
    """One plan of a checked build."""
    return Plan.from_json(json.loads((build / name).read_text(encoding="utf-8")))
