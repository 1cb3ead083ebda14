"""The compiler on one page: which passes run, in which order, and why."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qcn_compile.errors import IRError, PassError, QcnError, UsageError
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.text import format_op, parse_graph, print_graph
from qcn_compile.ir.verify import verify
from qcn_compile.passes.base import REGISTRY, Pass, PassContext
from qcn_compile.passes.canonicalize import Canonicalize
from qcn_compile.passes.fold_layout import FoldLayout
from qcn_compile.passes.fuse_attention import FuseAttention
from qcn_compile.passes.fuse_deltanet import FuseDeltaNet
from qcn_compile.passes.fuse_epilogue import FuseEpilogue
from qcn_compile.passes.fuse_moe import FuseMoE
from qcn_compile.passes.fuse_norm import FuseNorm
from qcn_compile.passes.merge_linears import MergeLinears
from qcn_compile.passes.select_kv import SelectKv
from qcn_compile.passes.select_quantization import SelectQuantization
from qcn_compile.passes.select_rows import SelectRows
from qcn_compile.passes.select_states import SelectStates
from qcn_compile.passes.shard import Shard
from qcn_compile.passes.split_stages import SplitStages
from qcn_compile.plugins import home, op_at
from qcn_compile.targets.registry import load_target


def default_passes(base: str = "f32", quant: str = "none", activations: str = "f32",
                   shard: Shard | None = None, formats: Mapping[str, str] | None = None,
                   kv: str | None = None, states: str = "f32", stages: SplitStages | None = None) -> list[Pass]:
    """The standard order; with `shard` or `stages`, for one rank of several; `formats` of experts, dense, head if not
    `quant`; kv: the type of cached keys and values, None: as they are computed; states: f32 or bf16."""
    own = formats or {}
    select = SelectQuantization(base, quant, own.get("experts", ""), own.get("dense", ""), own.get("head", ""),
                                activations=activations)
    return [
        # 1. one spelling: no-ops gone, equal ops shared, weights first
        Canonicalize(),
        FoldLayout(),  # before fusion: fused ops take contiguous slices, not shuffles
        Canonicalize(),
        # 2. fuse what the mission names: norms first, the others contain them
        FuseNorm(),
        FuseAttention(),
        FuseDeltaNet(),
        FuseMoE(),
        Canonicalize(),  # shares the rope tables that every attention layer made for itself
        FuseEpilogue(),  # last of the fusions: a residual add belongs to whatever produces its operand by now
        # 3. decide: rows before formats, so that the output projection is seen in its final place
        SelectRows(),
        *([shard] if shard is not None else []),  # whole heads and experts, before formats cut weights into blocks
        *([stages] if stages is not None else []),
        select,
        *([SelectKv(kv)] if kv is not None else []),
        *([SelectStates(states)] if states != "f32" else []),
        MergeLinears(),  # after the formats: only weights stored alike can be one weight
        Canonicalize(),
    ]


@dataclass
class Tracing:
    """What to show while passes run.

    verify: run the verifier after each. print_after: names of passes, or "all". dump_dir: a folder for the graph as
    traced and after each. stop_after: the last pass to run. times: filled with (pass, seconds, ops before, ops after).
    stages: when a dict, filled with the text of the graph where a pass changed it.
    """

    verify: bool = False
    print_after: tuple[str, ...] = ()
    dump_dir: Path | None = None
    stop_after: str = ""
    times: list[tuple[str, float, int, int]] = field(default_factory=list)
    stages: dict[str, str] | None = None


@dataclass
class Pipeline:
    """An ordered list of `passes` that a user may change."""

    passes: list[Pass]

    @staticmethod
    def default(target: str = "cpu", *, base: str | None = None, quant: str = "none", activations: str = "f32",
                shard: Shard | None = None, formats: Mapping[str, str] | None = None,
                kv: str | None = None, states: str = "f32", stages: SplitStages | None = None) -> Pipeline:
        """The standard pipeline of a target, as --target names it; with `shard` or `stages`, for one rank of several.

        base: f32 or bf16, how unquantised weights are stored (None: the target's own dtype); quant: none, int8, int4 or
        fp8; formats: others for experts, dense or head; activations: f32 or int8; kv, states: as
        `default_passes`. A build decides these by itself when it is given no pipeline.
        Raises UsageError for an unknown target.
        """
        return Pipeline(default_passes(base or load_target(target).dtype, quant, activations, shard, formats, kv,
                                       states, stages))

    def _index(self, name: str) -> int:
        for index, item in enumerate(self.passes):
            if item.name == name:
                return index
        raise UsageError(f"no pass named {name!r} in the pipeline; it has {', '.join(p.name for p in self.passes)}")

    def insert(self, item: Pass, after: str | None = None, before: str | None = None) -> Pipeline:
        """Add a pass after (the last) or before (the first) of a name; at the end when neither is given.

        Raises UsageError for a name that is not in the pipeline.
        """
        at = len(self.passes)
        if before is not None:
            at = self._index(before)
        elif after is not None:
            at = len(self.passes) - [p.name for p in reversed(self.passes)].index(self.passes[self._index(after)].name)
        self.passes.insert(at, item)
        return self

    def remove(self, name: str) -> Pipeline:
        """Drop every pass of that name. Raises UsageError listing the pipeline's when there is none."""
        self._index(name)
        self.passes = [p for p in self.passes if p.name != name]
        return self

    def replace(self, name: str, item: Pass | None = None, **options: object) -> Pipeline:
        """Put another pass in the place of every pass of a name, or change their options.

        Raises UsageError for a name that is not in the pipeline, and for a pass given together with options.
        """
        self._index(name)
        if item is not None and options:
            raise UsageError(f"replace({name!r}): give a pass or options, not both")
        self.passes = [p if p.name != name else item or replace(p, **options) for p in self.passes]
        return self

    def reorder(self, name: str, after: str | None = None, before: str | None = None) -> Pipeline:
        """Move a pass to after (the last) or before (the first) of a name; to the end when neither is given.

        Raises UsageError for a pass that runs more than once; what it must follow is checked when the pipeline runs.
        """
        item = self.passes[self._index(name)]
        if sum(p.name == name for p in self.passes) > 1:
            raise UsageError(f"reorder({name!r}): it runs more than once; change the list `pipeline.passes` itself")
        for other in filter(None, (after, before)):
            self._index(other)
        self.passes.remove(item)
        return self.insert(item, after, before)

    def check_order(self) -> None:
        """Raise PassError when a pass runs before one it needs to follow."""
        names = [p.name for p in self.passes]
        for index, item in enumerate(self.passes):
            late = [need for need in item.after if need in names and need not in names[:index]]
            if late:
                raise PassError(f"pass {item.name} must run after {', '.join(late)}; reorder the pipeline")

    def run(self, graph: Graph, context: PassContext, tracing: Tracing | None = None) -> Graph:
        """All passes in order, on a copy of the graph. Raises PassError naming the pass, its plugin and the op."""
        tracing = tracing or Tracing()
        self.check_order()
        graph = graph.clone()
        if tracing.stages is not None:
            tracing.stages[stage_name(graph, 0, "traced")] = print_graph(graph)
        if tracing.dump_dir:
            _dump(graph, 0, "traced", tracing.dump_dir)
        for index, item in enumerate(self.passes):
            graph = _run_one(item, index, graph, context, tracing)
            if item.name == tracing.stop_after:
                break
        return graph


def _run_one(item: Pass, index: int, graph: Graph, context: PassContext, tracing: Tracing) -> Graph:
    before, started = len(graph.ops), time.perf_counter()
    saved = print_graph(graph) if tracing.verify or tracing.dump_dir else ""
    try:
        graph = item.run(graph, context)
        if tracing.verify:
            verify(graph)
    except Exception as error:
        raise _with_repro(item, index, saved, tracing, error) from error
    tracing.times.append((item.name, time.perf_counter() - started, before, len(graph.ops)))
    if tracing.dump_dir:
        _dump(graph, index + 1, item.name, tracing.dump_dir)
    if tracing.stages is not None:
        _keep_stage(tracing.stages, stage_name(graph, index + 1, item.name), print_graph(graph))
    if item.name in tracing.print_after or "all" in tracing.print_after:
        print(f"// after {item.name}\n{print_graph(graph)}", flush=True)
    return graph


def _dump(graph: Graph, index: int, name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{graph.name}-{index:02d}-{name}.qir").write_text(print_graph(graph), encoding="utf-8")


def stage_name(graph: Graph, index: int, name: str) -> str:
    """File name of a stage, without its ending: NN-pass, and the graph's name in front of all but main."""
    return f"{'' if graph.name == 'main' else graph.name + '-'}{index:02d}-{name}"


def _keep_stage(stages: dict[str, str], name: str, text: str) -> None:
    if text != next(reversed(stages.values())):
        stages[name] = text


def _failure(item: Pass, error: Exception) -> str:
    """What failed: the pass, the plugin it is from, the error, and the op it was looking at."""
    plugin, at = home(type(item)), op_at(error)
    text = f"pass {item.name}{f' of plugin {plugin}' if plugin else ''} failed: {type(error).__name__}: {error}"
    known = at is None or (isinstance(error, QcnError) and format_op(at) in str(error))
    return text if known or at is None else f"{text}\n  at {format_op(at)}"


def _with_repro(item: Pass, index: int, saved: str, tracing: Tracing, error: Exception) -> PassError:
    """A failing pass leaves its input and the command that repeats the failure."""
    if not saved:
        return PassError(f"{_failure(item, error)}\n  run again with --verify or --dump-dir DIR to keep its input")
    folder = tracing.dump_dir or Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"failed-{index + 1:02d}-{item.name}.qir"
    path.write_text(saved, encoding="utf-8")
    plugin = home(type(item))
    return PassError(f"{_failure(item, error)}\n  its input is {path}\n  repeat with: python -m qcn_compile.opt {path} "
                     f"-p {item.name}{f' --plugin {plugin}' if plugin.endswith('.py') else ''}")


def passes_by_name(names: Iterable[str]) -> Iterator[Pass]:
    """Passes with default options, by name. Raises UsageError listing the known names."""
    for name in names:
        if name not in REGISTRY:
            raise UsageError(f"no pass named {name!r}; known: {', '.join(sorted(REGISTRY))}")
        yield REGISTRY[name]()


def run_text(text: str, names: Iterable[str], context: PassContext | None = None) -> Graph:
    """Parse `.qir`, run passes by name with verification, return the graph: what text tests call."""
    graph = parse_graph(text)
    try:
        verify(graph)
    except IRError as error:
        raise IRError(f"the input does not verify: {error}") from None
    return Pipeline(list(passes_by_name(names))).run(graph, context or PassContext(), Tracing(verify=True))
