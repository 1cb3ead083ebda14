"""The whole story, from a checkpoint to a sealed artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcn_compile.artifact import Manifest, building, seal
from qcn_compile.errors import ModelError, UsageError
from qcn_compile.frontend import Traced, trace_model
from qcn_compile.frontend.checkpoint import Located, load_config, locate, scheme_of_checkpoint
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.types import DType
from qcn_compile.ir.verify import verify
from qcn_compile.lowering.buckets import buckets_for
from qcn_compile.lowering.calibrate import Calibrated, calibrate, read_text
from qcn_compile.lowering.decide import Decision, decide, plan_for
from qcn_compile.lowering.schedule import schedule
from qcn_compile.lowering.weight_errors import weight_errors
from qcn_compile.passes.base import PassContext
from qcn_compile.passes.shard import Shard
from qcn_compile.passes.split_stages import SplitStages
from qcn_compile.pipeline import Pipeline, Tracing
from qcn_compile.planning.command import WISHES
from qcn_compile.planning.verdict import Verdict
from qcn_compile.plugins import load_plugins
from qcn_compile.progress import Clock, Report
from qcn_compile.report import write_report
from qcn_compile.targets.base import Target
from qcn_compile.targets.layout import Layout, layout_for
from qcn_compile.targets.registry import load_target
from qcn_compile.write import write_build


@dataclass(frozen=True)
class Options:
    """What a build may be told. None or "auto" leaves the choice to the planner.

    dtype: fp32 or bf16, how unquantised weights are stored. quant: none, int8, int4 or fp8, the format of the big ones,
    or one for each class. activations: fp32 or int8, what quantised weights are multiplied with. context_length: tokens
    a sequence may have. calibrate: a text that int4 weights are chosen by. weights: copied, late or dummy. kv: how keys
    and values are kept, fp32, bf16 or fp8; states: DeltaNet's, fp32 or bf16. mcpu: CPU level as LLVM names it. mtp: the
    draft head too. gpus, tp, ep, pp, max_running_requests, memory (GB of a chip), error_budget: as of qcn-compile.
    force: replace an output folder that is no build. disabled: names of passes to
    leave out. tracing: what to show. pipeline: in place of the standard one, formats included. plugins: Python files.
    """

    dtype: str | None = None
    quant: str = "auto"
    activations: str | None = None
    context_length: int | None = None
    calibrate: str | Path | None = None
    weights: str | None = None
    kv: str | None = None
    states: str | None = None
    mcpu: str | None = None
    mtp: bool = False
    gpus: int | None = None
    tp: int | None = None
    ep: int | None = None
    pp: int | None = None
    max_running_requests: int | None = None
    memory: float | None = None
    error_budget: float | None = None
    force: bool = False
    disabled: tuple[str, ...] = ()
    tracing: Tracing = field(default_factory=Tracing)
    pipeline: Pipeline | None = None
    plugins: tuple[str | Path, ...] = ()


@dataclass(frozen=True)
class Built:
    """What `compile` returns: the artifact's path and manifest, the decision, seconds of each stage, and a note on the
    choice of the model ("" when there is nothing to say)."""

    path: Path
    manifest: Manifest
    decision: Decision
    seconds: dict[str, float]
    note: str


def compile(model: str | Path | None = None, target: str = "cpu", output: str | Path = "build",
            options: Options | None = None, report: Report | None = None,
            verdict: Callable[[Verdict], None] | None = None, **changes: Any) -> Built:
    """Build an artifact for `target` from a checkpoint directory, a Hugging Face name, or (None) the bundled model.

    Keyword arguments are fields of `Options`. `report(stage, done, total)` is called as work proceeds,
    `verdict` with the planner's before any of it.
    Raises a QcnError whose message names the thing, the place and the cure; nothing half-written is left.
    """
    options = options or Options(**changes)
    options = replace(options, tracing=replace(options.tracing, stages={}))
    plugins = load_plugins(options.plugins)
    clock, tell = Clock(), report or (lambda stage, done, total: None)
    chosen, located, traced, decision, layout = _front(model, target, options, clock, tell, verdict)
    mode = _weights_mode(options, chosen, traced, located)
    context = PassContext(target=target)
    with clock.stage("passes"):
        graphs = [_rank_graphs(traced, decision, context, options, layout, rank) for rank in range(layout.ranks)]
    calibrated = Calibrated()
    if options.calibrate is not None:
        with clock.stage("calibrate"):
            calibrated, decision = _calibrate(graphs, traced, decision, Path(options.calibrate), mode, tell)
    with clock.stage("schedule"):
        ranks = [[schedule(graph, bucket, chosen) for graph in mine for bucket in buckets_for(chosen.kind, layout.tp)]
                 for mine in graphs]
    with building(Path(output), options.force) as scratch:
        manifest, digests = write_build(Path(output), scratch, traced, chosen, decision, layout, ranks, mode,
                                        calibrated, clock, tell)
        write_report(scratch, graphs[0], context, decision, ranks[0], options.tracing, str(traced.audit or ""))
        used = {f"plugin {plugin.name}": plugin.sha256 for plugin in plugins}
        manifest = seal(scratch, replace(manifest, tools={**manifest.tools, **used}), digests)
    note = located.note + (f"; built without weights (--weights {mode})" if traced.weights is None else "")
    return Built(Path(output), manifest, decision, clock.seconds, note)


def optimised(model: str | Path | None, target: str, options: Options) -> Graph:
    """The main graph (of rank 0) after the pipeline or up to `options.tracing.stop_after`; nothing is built."""
    _, _, traced, decision, layout = _front(model, target, options, Clock(), lambda stage, done, total: None)
    return _rank_graphs(traced, decision, PassContext(target=target), replace(options, mtp=False), layout, 0)[0]


def optimise(traced: Traced, options: Options) -> Graph:
    """The main graph of a model traced in fp32 after the pipeline, as the CPU gets it."""
    decision = decide(traced, load_target("cpu", options.mcpu), None, options.dtype, options.quant, options.activations,
                      options.context_length)
    return _optimise(traced.main, decision, PassContext(), options)


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


def _front(model: str | Path | None, target: str, options: Options, clock: Clock, tell: Report,
           announce: Callable[[Verdict], None] | None = None) -> tuple[Target, Located, Traced, Decision, Layout]:
    """Target, checkpoint, traced graphs, decisions and layout: everything before the passes."""
    chosen = load_target(target, options.mcpu)
    located = locate(None if model is None else str(model), "cpu" if chosen.kind == "null" else chosen.kind)
    config = {**load_config(located.config)[1], "quantization_config": scheme_of_checkpoint(located.config)}
    errors = weight_errors(located.path) if located.path is not None and options.quant == "auto" else {}
    verdict = plan_for(located.name, config, chosen, options.dtype, options.quant, options.context_length, options.mcpu,
                       errors=errors, **{name: getattr(options, name) for name in WISHES})
    layout = verdict.chosen.layout if verdict else _asked(located, options)
    if verdict and announce:
        announce(verdict)
    with clock.stage("trace"):
        tell("trace", 0, 1)
        traced = trace_model(located, DType(chosen.dtype), options.mtp and options.weights == "dummy")
        _entries(traced, options.mtp)  # the draft head too, or why there is none
        tell("trace", 1, 1)
    decision = decide(traced, chosen, verdict, options.dtype, options.quant, options.activations,
                      options.context_length, options.kv, options.states)
    return chosen, located, traced, decision, layout


def _asked(located: Located, options: Options) -> Layout:
    """The layout asked for, where the planner has none."""
    return layout_for(load_config(located.config)[1], options.tp or options.ep or 1, options.ep or 1,
                      options.pp or 1)


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


def _calibrate(ranks: Sequence[Sequence[Graph]], traced: Traced, decision: Decision, text: Path, mode: str,
               tell: Report) -> tuple[Calibrated, Decision]:
    """int4 codes of the main graph's weights, on every rank, by a text, and the decision with what that gave."""
    if traced.weights is not None and mode != "copied":
        raise UsageError(f"--calibrate: what it chooses is written into the build, --weights {mode} writes nothing; "
                         "leave one of them out")
    if traced.weights is None or traced.path is None:
        raise UsageError("--calibrate: needs a checkpoint's weights; name one with --model")
    tell("calibrate", 0, 1)
    made = calibrate([mine[0] for mine in ranks], traced.weights, read_text(text, traced.path))
    tell("calibrate", 1, 1)
    return made, replace(decision, reasons={**decision.reasons, "calibrated": str(made)})


def _entries(traced: Traced, mtp: bool) -> list[Graph]:
    if mtp and traced.mtp is None:
        raise UsageError("--mtp: this checkpoint has no MTP head (no mtp.* tensors; Qwen3-Coder-Next ships none, "
                         "Qwen3-Next-80B-A3B has one); leave --mtp out, and speculate with ngram")
    return [traced.main, traced.mtp] if mtp and traced.mtp else [traced.main]


def _rank_graphs(traced: Traced, decision: Decision, context: PassContext, options: Options, layout: Layout,
                 rank: int) -> list[Graph]:
    """The graphs of one rank. What passes do is recorded for rank 0."""
    stage, part = divmod(rank, layout.tp)
    shard = Shard(part, layout.tp, layout.ep) if layout.tp > 1 else None
    stages = SplitStages(stage, layout.pp, part, layout.tp, options.mtp) if layout.pp > 1 else None
    if rank:
        context, options = PassContext(target=context.target), replace(options, tracing=Tracing())
    return [_optimise(graph, decision, context, options, shard, stages) for graph in _entries(traced, options.mtp)]


def _optimise(graph: Graph, decision: Decision, context: PassContext, options: Options,
              shard: Shard | None = None, stages: SplitStages | None = None) -> Graph:
    if options.pipeline is not None:
        pipeline = Pipeline(list(options.pipeline.passes))
        for item in (stages, shard):
            if item is not None:
                pipeline.insert(item, after="select-rows")
    else:
        pipeline = Pipeline.default(base=decision.base, activations=decision.activations, formats=decision.formats,
                                    kv=None if decision.kv == "bf16" else decision.kv, states=decision.states,
                                    shard=shard, stages=stages)
    for plugin in load_plugins(options.plugins):
        plugin.configure(pipeline)
    for name in options.disabled:
        pipeline.remove(name)
    result = pipeline.run(graph, context, options.tracing)
    verify(result)
    return result
