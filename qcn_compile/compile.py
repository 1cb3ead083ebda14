"""The whole story, from a checkpoint to a sealed artifact."""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qcn_compile.artifact import SCHEMA, CacheSpec, Manifest, building, seal, write_json
from qcn_compile.errors import ModelError, UsageError
from qcn_compile.frontend import Traced, trace_model
from qcn_compile.frontend.checkpoint import Located, locate
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.types import DType
from qcn_compile.ir.verify import verify
from qcn_compile.lowering.buckets import buckets_for
from qcn_compile.lowering.convert import convert, key_of, resumable, take
from qcn_compile.lowering.decide import Decision, decide
from qcn_compile.lowering.late import deferred
from qcn_compile.lowering.plan import blobs_of, make_plan
from qcn_compile.lowering.rope import rope_tables
from qcn_compile.lowering.schedule import Schedule, schedule
from qcn_compile.lowering.weights import BlobKey, name_blobs, plan_files
from qcn_compile.passes.base import PassContext
from qcn_compile.pipeline import Pipeline, Tracing
from qcn_compile.plugins import load_plugins
from qcn_compile.report import write_report
from qcn_compile.targets.base import Kernel, Target
from qcn_compile.targets.registry import load_target

PAGE_SIZE = 32
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """What a build may be told. None or "auto" leaves the choice to the compiler. `plugins` are Python files."""

    dtype: str | None = None
    quant: str = "auto"
    activations: str | None = None
    context_length: int | None = None
    weights: str | None = None
    kv: str | None = None
    states: str | None = None
    mcpu: str | None = None
    mtp: bool = False
    force: bool = False
    disabled: tuple[str, ...] = ()
    tracing: Tracing = field(default_factory=Tracing)
    pipeline: Pipeline | None = None
    plugins: tuple[str | Path, ...] = ()


@dataclass(frozen=True)
class Built:
    """What `compile` returns: where the artifact lies, what was decided, how long each stage took in seconds."""

    path: Path
    manifest: Manifest
    decision: Decision
    seconds: dict[str, float]
    note: str


class Clock:
    """Seconds per stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def compile(model: str | Path | None = None, target: str = "cpu", output: str | Path = "build",
            options: Options | None = None, report: Report | None = None, **changes: Any) -> Built:
    """Build an artifact for `target` from a checkpoint directory, a Hugging Face name, or (None) the bundled model.

    Keyword arguments are fields of `Options`. `report(stage, done, total)` is called as work proceeds.
    Raises a QcnError whose message names the thing, the place and the cure; nothing half-written is left.
    """
    options = options or Options(**changes)
    options = replace(options, tracing=replace(options.tracing, stages={}))
    plugins = load_plugins(options.plugins)
    clock, tell = Clock(), report or (lambda stage, done, total: None)
    chosen, located, traced, decision = _front(model, target, options, clock, tell)
    mode = _weights_mode(options, chosen, traced, located)
    context = PassContext(target=target)
    with clock.stage("passes"):
        graphs = [_optimise(graph, decision, context, options) for graph in _entries(traced, options.mtp)]
    with clock.stage("schedule"):
        schedules = [schedule(graph, bucket, chosen) for graph in graphs for bucket in buckets_for(chosen.kind)]
    with building(Path(output), options.force) as scratch:
        manifest, digests = _write(Path(output), scratch, traced, chosen, decision, schedules, mode, clock, tell)
        write_report(scratch, graphs, context, decision, schedules, options.tracing, str(traced.audit or ""))
        used = {f"plugin {plugin.name}": plugin.sha256 for plugin in plugins}
        manifest = seal(scratch, replace(manifest, tools={**manifest.tools, **used}), digests)
    note = located.note + (f"; built without weights (--weights {mode})" if traced.weights is None else "")
    return Built(Path(output), manifest, decision, clock.seconds, note)


def optimised(model: str | Path | None, target: str, options: Options) -> Graph:
    """The main graph after the pipeline (or up to `options.tracing.stop_after`); nothing is built."""
    _, _, traced, decision = _front(model, target, options, Clock(), lambda stage, done, total: None)
    return _optimise(traced.main, decision, PassContext(target=target), options)


def trace(model: str | Path | Any | None = None, dtype: str = "f32") -> Graph:
    """The main graph of a model as traced, before any pass, computed in `dtype` (f32 or bf16).

    `model`: a checkpoint directory, a Hugging Face name, None (the bundled model), a transformers config or model, or
    an .onnx file of standard ops, which keeps its own types (`qcn_compile.onnx.read` gives its tensors too).
    Raises ModelError for what cannot be found or read, IRError naming an op or node that has no row.
    """
    if isinstance(model, str | Path) and str(model).endswith(".onnx"):
        from qcn_compile.onnx.read import read

        return read(Path(model)).graph
    if model is None or isinstance(model, str | Path):
        return trace_model(locate(None if model is None else str(model), "cpu"), DType(dtype)).main
    return trace_model(getattr(model, "config", model), DType(dtype)).main


def _front(model: str | Path | None, target: str, options: Options, clock: Clock,
           tell: Report) -> tuple[Target, Located, Traced, Decision]:
    """Target, checkpoint, traced graphs and decisions: everything before the passes."""
    chosen = load_target(target, options.mcpu)
    located = locate(None if model is None else str(model), "cpu" if chosen.kind == "null" else chosen.kind)
    with clock.stage("trace"):
        tell("trace", 0, 1)
        traced = trace_model(located, DType(chosen.dtype), options.mtp and options.weights == "dummy")
        tell("trace", 1, 1)
    return chosen, located, traced, decide(traced, chosen, options.dtype, options.quant, options.activations,
                                           options.context_length, options.states, options.kv)


def _weights_mode(options: Options, target: Target, traced: Traced, located: Located) -> str:
    """copied, late or dummy. Raises ModelError when the weights to copy are not there."""
    if options.weights not in (None, "copied", "late", "dummy"):
        raise UsageError(f"--weights {options.weights}: choose copied, late or dummy")
    if target.kind == "null":
        return "dummy"
    if options.weights in ("late", "dummy") and target.kind != "gpu":
        raise UsageError(f"--weights {options.weights}: only GPU targets build without weights")
    if traced.weights is not None:
        if options.weights == "late" and traced.weights.checkpoint.scheme.get("quant_method", "fp8") != "fp8":
            raise UsageError("--weights late: qcn-run binds bf16 and block-fp8 checkpoints only; this one is stored as "
                             f"{traced.weights.checkpoint.scheme['quant_method']}; leave --weights out to convert it")
        return options.weights or "copied"
    if target.kind != "gpu" or options.weights == "copied":
        raise ModelError(f"{located.name}: {located.note or 'no weights found'}; "
                         f"a {target.kind} build needs them: name a checkpoint directory with --model")
    return options.weights or "late"


def _entries(traced: Traced, mtp: bool) -> list[Graph]:
    if mtp and traced.mtp is None:
        raise UsageError("--mtp: this checkpoint has no MTP head (no mtp.* tensors; Qwen3-Coder-Next ships none, "
                         "Qwen3-Next-80B-A3B has one); leave --mtp out, and speculate with ngram")
    return [traced.main, traced.mtp] if mtp and traced.mtp else [traced.main]


def _optimise(graph: Graph, decision: Decision, context: PassContext, options: Options) -> Graph:
    if options.pipeline is not None:
        pipeline = Pipeline(list(options.pipeline.passes))
    else:
        pipeline = Pipeline.default(base=decision.base, quant=decision.format, activations=decision.activations,
                                    states=decision.states, kv=None if decision.kv == "bf16" else decision.kv)
    for plugin in load_plugins(options.plugins):
        plugin.configure(pipeline)
    for name in options.disabled:
        pipeline.remove(name)
    result = pipeline.run(graph, context, options.tracing)
    verify(result)
    return result


def _write(output: Path, build: Path, traced: Traced, target: Target, decision: Decision,
           schedules: Sequence[Schedule], mode: str, clock: Clock, tell: Report) -> tuple[Manifest, dict[str, str]]:
    """Kernels, plans, tokenizer and weights; returns the manifest, not yet sealed, and the digests known already."""
    kernels = list(dict.fromkeys(step.call.kernel for s in schedules for step in s.steps))
    names = name_blobs(dict.fromkeys(key for s in schedules for key in blobs_of(s)))
    with clock.stage("kernels"):
        libraries = target.emit(kernels, build / "kernels", lambda done, total: tell("kernels", done, total))
    plans = []
    for item in schedules:
        plan, _ = make_plan(item, names)
        plans.append(f"plan/{plan.entry}-{plan.name}.json")
        write_json(build / plans[-1], plan.to_json())
    _copy_tokenizer(traced, build / "tokenizer")
    with clock.stage("weights"):  # last: it is the longest, and what it has done survives an interrupt
        weights, digests = _write_weights(output, build, traced, target, names, mode, tell)
    weights["rope"] = rope_tables(schedules, names)
    manifest = _manifest(traced, target, decision, schedules, plans, [f"kernels/{n}" for n in libraries],
                         weights, kernels)
    return manifest, digests


def _write_weights(output: Path, build: Path, traced: Traced, target: Target, names: dict[BlobKey, str], mode: str,
                   tell: Report) -> tuple[dict[str, Any], dict[str, str]]:
    """The weight files, or what stands in for them; returns the manifest's `weights`, and file -> sha256."""
    later, now = deferred(names, target, mode, traced.weights.draft_names if traced.weights else None)
    files = plan_files(now, target)
    source, origin = (traced.weights, traced.weights.fingerprint()) if traced.weights else (NoWeights(), "")
    with resumable(output, key_of(files, target, origin)) as folder:
        written = convert(files, source, target, folder, lambda done, total: tell("weights", done, total))
        digests = take(written, folder, build / "weights")
    found = {f"weights/{name}": digest for name, digest in digests.items()}
    return {"mode": mode, "files": list(found), **later}, found


class NoWeights:
    """The source of a build that has no checkpoint."""

    def get(self, name: str) -> Any:
        raise ModelError(f"weight {name} is wanted, but there is no checkpoint; name one with --model")

    def rows(self, name: str, start: int, stop: int) -> Any:
        self.get(name)


def _manifest(traced: Traced, target: Target, decision: Decision, schedules: Sequence[Schedule], plans: list[str],
              libraries: list[str], weights: dict[str, Any], kernels: list[Kernel]) -> Manifest:
    caches = {}
    for item in schedules:
        for name, state in item.graph.states.items():
            shape, size = target.cache_unit(state, PAGE_SIZE)
            caches[name] = CacheSpec(name, state.kind.value, state.dtype.value, shape, size)
    logits = traced.main.outputs[0].tensor
    return Manifest(
        schema=SCHEMA, model={"name": traced.name, "config": traced.config},
        target={"name": target.name, "kind": target.kind, **target.describe()},
        decisions=decision.to_json(), caches=tuple(caches.values()), page_size=PAGE_SIZE,
        context_length=decision.context_length, vocab_size=int(logits.shape[-1]),  # type: ignore[arg-type]
        hidden_size=int(traced.main.outputs[1].tensor.shape[-1]),  # type: ignore[arg-type]
        plans=tuple(plans), libraries=tuple(libraries), weights=weights,
        tools=_versions(len(kernels)))


def _versions(kernels: int) -> dict[str, str]:
    table = {"kernels": str(kernels), "python": platform.python_version()}
    for name in ("qcn-compile", "torch", "transformers", "apache-tvm", "triton"):
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


def progress_bars(stream: Any = None) -> Report:
    """A reporter that draws one tqdm bar per stage on a terminal and prints nothing elsewhere."""
    from tqdm import tqdm

    out = stream or sys.stderr
    bars: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if not out.isatty():
            return
        if stage not in bars:
            count = {"unit": "B", "unit_scale": True} if stage == "weights" else {}
            bars[stage] = tqdm(total=total, desc=stage, file=out, leave=True, **count)
        bars[stage].n = done
        bars[stage].refresh()
        if done >= total:
            bars.pop(stage).close()

    return report
