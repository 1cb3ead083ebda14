"""What a build consists of, written into its folder: kernels, plans, tokenizer, weights, manifest."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qcn_compile.artifact import SCHEMA, CacheSpec, Manifest, RankPart, check_ranks, write_json
from qcn_compile.errors import ModelError
from qcn_compile.frontend import Traced
from qcn_compile.lowering.calibrate import Calibrated
from qcn_compile.lowering.convert import convert, key_of, resumable, take
from qcn_compile.lowering.decide import Decision
from qcn_compile.lowering.late import deferred
from qcn_compile.lowering.plan import blobs_of, make_plan
from qcn_compile.lowering.rope import rope_tables
from qcn_compile.lowering.schedule import Schedule, kernels_of
from qcn_compile.lowering.weights import BlobKey, name_blobs, plan_files
from qcn_compile.progress import Clock, Report
from qcn_compile.targets.base import Target
from qcn_compile.targets.layout import Layout

PAGE_SIZE = 32
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def write_build(output: Path, build: Path, traced: Traced, target: Target, decision: Decision, layout: Layout,
                ranks: Sequence[Sequence[Schedule]], mode: str, calibrated: Calibrated, clock: Clock, tell: Report
                ) -> tuple[Manifest, dict[str, str]]:
    """Kernels, which ranks share, plans, tokenizer and weights; the manifest, not sealed, and the digests known."""
    kernels = kernels_of(item for schedules in ranks for item in schedules)
    names = [name_blobs(dict.fromkeys(key for s in schedules for key in blobs_of(s))) for schedules in ranks]
    with clock.stage("kernels"):
        libraries = target.emit(kernels, build / "kernels", lambda done, total: tell("kernels", done, total))
    folders = [f"plan/rank-{rank}" if len(ranks) > 1 else "plan" for rank in range(len(ranks))]
    plans = [_write_plans(build, folder, schedules, own)
             for folder, schedules, own in zip(folders, ranks, names, strict=True)]
    _copy_tokenizer(traced, build / "tokenizer")
    with clock.stage("weights"):  # last: it is the longest, and what it has done survives an interrupt
        weights, digests = _write_weights(output, build, traced, target, names, mode, calibrated, tell)
    for schedules, own, held in zip(ranks, names, weights, strict=True):
        held["rope"] = rope_tables(schedules, own)
    parts = tuple(RankPart(_caches(target, schedules), files, held)
                  for schedules, files, held in zip(ranks, plans, weights, strict=True))
    check_ranks(build, parts, layout.to_json())
    manifest = _manifest(traced, target, decision, parts[0], [f"kernels/{n}" for n in libraries], len(kernels))
    if len(parts) > 1:
        manifest = replace(manifest, layout=layout.to_json(), ranks=parts)
    return manifest, digests


def _write_plans(build: Path, folder: str, schedules: Sequence[Schedule], names: dict[BlobKey, str]) -> tuple[str, ...]:
    """One file a bucket; their names within the build."""
    plans = [make_plan(item, names)[0] for item in schedules]
    files = {f"{folder}/{plan.key}.json": plan for plan in plans}
    for name, plan in files.items():
        write_json(build / name, plan.to_json())
    return tuple(files)


def _write_weights(output: Path, build: Path, traced: Traced, target: Target, ranks: Sequence[dict[BlobKey, str]],
                   mode: str, calibrated: Calibrated, tell: Report) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The weight files of every rank, or what stands in for them; each rank's `weights`, and file -> sha256."""
    split = [deferred(names, target, mode, traced.weights.draft_names if traced.weights else None) for names in ranks]
    files = [plan_files(now, target, f"rank-{rank}" if len(ranks) > 1 else "weights")
             for rank, (_, now) in enumerate(split)]
    every = [file for own in files for file in own]
    source, origin = (traced.weights, traced.weights.fingerprint()) if traced.weights else (NoWeights(), "")
    with resumable(output, key_of(every, target, origin + calibrated.digest)) as folder:
        written = convert(every, source, target, folder, lambda done, total: tell("weights", done, total),
                          calibrated.codes)
        digests = take(written, folder, build / "weights")
    weights = [{"mode": mode, "files": [f"weights/{file.name}" for file in own], **later}
               for own, (later, _) in zip(files, split, strict=True)]
    return weights, {f"weights/{name}": digest for name, digest in digests.items()}


class NoWeights:
    """The source of a build that has no checkpoint."""

    def get(self, name: str) -> Any:
        raise ModelError(f"weight {name} is wanted, but there is no checkpoint; name one with --model")

    def rows(self, name: str, start: int, stop: int) -> Any:
        self.get(name)


def _caches(target: Target, schedules: Sequence[Schedule]) -> tuple[CacheSpec, ...]:
    caches = {}
    for item in schedules:
        for name, state in item.graph.states.items():
            shape, size = target.cache_unit(state, PAGE_SIZE)
            caches[name] = CacheSpec(name, state.kind.value, state.dtype.value, shape, size)
    return tuple(caches.values())


def _manifest(traced: Traced, target: Target, decision: Decision, part: RankPart, libraries: list[str],
              kernels: int) -> Manifest:
    logits = traced.main.outputs[0].tensor
    return Manifest(
        schema=SCHEMA, model={"name": traced.name, "config": traced.config},
        target={"name": target.name, "kind": target.kind, **target.describe()},
        decisions=decision.brief(), caches=part.caches, page_size=PAGE_SIZE,
        context_length=decision.context_length, vocab_size=int(logits.shape[-1]),  # type: ignore[arg-type]
        hidden_size=int(traced.main.outputs[1].tensor.shape[-1]),  # type: ignore[arg-type]
        plans=part.plans, libraries=tuple(libraries), weights=part.weights, tools=_versions(kernels))


def _versions(kernels: int) -> dict[str, str]:
    table = {"kernels": str(kernels), "python": platform.python_version()}
    for name in ("qcn-compile", "torch", "transformers", "apache-tvm", "triton", "nvidia-cuda-nvcc-cu12"):
        try:
            table[name] = version(name)
        except PackageNotFoundError:
            table[name] = "not installed"
    return table


def _copy_tokenizer(traced: Traced, folder: Path) -> None:
    folder.mkdir(parents=True)
    if traced.path is None:
        return
    for name in TOKENIZER_FILES:
        source = traced.path / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
        elif name == "tokenizer.json":
            raise ModelError(f"{traced.path} has no tokenizer.json; save the tokenizer beside the weights")
