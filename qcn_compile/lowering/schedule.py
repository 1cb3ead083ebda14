"""schedule: the ops of a graph as a flat list of kernel calls for one bucket; views and static values cost nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Graph, Op, Value
from qcn_compile.ir.optable import row
from qcn_compile.ir.text import format_op
from qcn_compile.ir.types import BatchType, StateKind, StateRef, StateType, Sym, TensorType
from qcn_compile.passes.canonicalize import static_values
from qcn_compile.targets.base import Bucket, Call, Kernel, Operand, Ref, Target


@dataclass(frozen=True)
class View:
    """Where a value lies: in the buffer of `base`, from element `offset` on, rows `stride` elements apart."""

    base: Value
    offset: int
    stride: int


@dataclass(frozen=True)
class Step:
    """One kernel call together with the op it came from."""

    op: Op
    call: Call
    collective: bool = False  # the ranks' communicator runs it; its kernel, if it has parameters, is one way to


@dataclass
class Schedule:
    """Kernel calls in order, and where every value lies."""

    graph: Graph
    bucket: Bucket
    steps: list[Step] = field(default_factory=list)
    views: dict[Value, View] = field(default_factory=dict)
    static: set[Value] = field(default_factory=set)


def row_width(type_: TensorType) -> int:
    """Elements of one row: the product of all sizes but the first."""
    width = 1
    for dim in type_.shape[1:]:
        if isinstance(dim, Sym):
            raise LoweringError(f"{type_}: only the first size may be symbolic")
        width *= dim
    return width


def encoding_of(value: Value) -> Encoding | None:
    """How a weight is stored, when it passed through `encode`."""
    if value.op is None or value.op.name != "encode":
        return None
    attrs = value.op.attrs
    return Encoding(str(attrs["format"]), int(attrs["group"]), str(attrs["activations"]))  # type: ignore[arg-type]


def schedule(graph: Graph, bucket: Bucket, target: Target) -> Schedule:
    """Lower every op that is neither a view nor static. Raises LoweringError naming the op, its place and the cure."""
    result = Schedule(graph, bucket, static=static_values(graph))
    for value in graph.inputs:
        if isinstance(value.type, TensorType):
            result.views[value] = View(value, 0, row_width(value.type))
    specialise = getattr(target, "specialise", None)  # a target may fuse more in one bucket than in another
    ops = graph.ops if specialise is None else specialise(graph.ops, graph.outputs, bucket)
    for op in ops:
        if op.results[0] in result.static:
            continue
        if (view := _as_view(op, result.views)) is not None:
            result.views[op.result] = view
            continue
        for value in op.results:
            result.views[value] = View(value, 0, row_width(value.tensor))
        if op.name == "send":  # its result is its operand
            result.views[op.result] = result.views[op.inputs[0]]
        if row(op.name).collective:
            result.steps += _collective(op, result, target)
            continue
        operands = [_operand(v, result) for v in op.operands]
        for call in target.lower(op, operands, [v.tensor for v in op.results], bucket):
            result.steps.append(Step(op, call))
    return result


def _collective(op: Op, result: Schedule, target: Target) -> list[Step]:
    """The first step is the communicator's; those of the target after it put in order what came."""
    if op.name == "recv":
        y = Ref("result", index=0)
        return [Step(op, Call(Kernel.make(op.name), (y, y, Ref("input", name="counts"))), True)]
    x = op.inputs[0]
    if result.views[x].stride != row_width(x.tensor):
        raise LoweringError(f"a collective needs dense rows: {format_op(op)}")
    if target.kind == "gpu" and op.name != "send":
        operands = [_operand(v, result) for v in op.operands]
        calls = target.lower(op, operands, [v.tensor for v in op.results], result.bucket)
    else:
        calls = [Call(Kernel.make(op.name),
                      (Ref("operand", index=0), Ref("result", index=0), Ref("input", name="counts")))]
    return [Step(op, call, not place) for place, call in enumerate(calls)]


def kernels_of(schedules: Iterable[Schedule]) -> list[Kernel]:
    """Every kernel that some schedule launches, once."""
    return list(dict.fromkeys(kernel for schedule in schedules for step in schedule.steps
                              if not step.collective or step.call.kernel.params
                              for kernel in (step.call.kernel, *(other for other, _ in step.call.others))))


def _operand(value: Value | None, result: Schedule) -> Operand | None:
    if value is None or isinstance(value.type, BatchType):
        return None
    if value in result.static:
        return Operand(value.tensor, 0, encoding_of(value) or Encoding())
    return Operand(value.tensor, result.views[value].stride)


def _as_view(op: Op, views: dict[Value, View]) -> View | None:
    """A reshape that keeps rows, or a slice of columns, of a value already placed."""
    if op.name not in ("reshape", "slice"):
        return None
    source = op.inputs[0]
    view, have, want = views[source], source.tensor, op.result.tensor
    dense = view.stride == row_width(have)
    if op.name == "reshape":
        if have.shape[0] == want.shape[0] or dense:
            return View(view.base, view.offset, view.stride if have.shape[0] == want.shape[0] else row_width(want))
        raise LoweringError(f"a reshape of a strided view that changes its rows needs a copy: {format_op(op)}")
    if op.attrs["axis"] != 1 or have.rank != 2:
        raise LoweringError(f"only column slices of [rows, columns] are free: {format_op(op)}; "
                            "run fold-layout before lowering")
    return View(view.base, view.offset + int(op.attrs["start"]), view.stride)  # type: ignore[arg-type]


def work(op: Op, states: dict[str, StateType], bucket: Bucket) -> tuple[int, int]:
    """(bytes, FLOPs) of an op at the bucket's capacity: weights at their stored width, states read and written."""
    spec, types = row(op.name), [v.type if v else None for v in op.operands]
    cost = spec.cost(types, [v.type for v in op.results], dict(op.attrs), bucket.sizes)
    share = spec.touched(types, bucket.sizes) if spec.touched else {}
    bytes_ = cost.bytes
    for index, value in enumerate(op.operands):
        encoding = encoding_of(value) if value is not None else None
        if value is not None and encoding is not None:
            full = value.tensor.bytes()
            stored = stored_fraction(encoding) * full * 32 / value.tensor.dtype.bits
            bytes_ -= int((full - stored) * share.get(index, 1.0))
    return bytes_ + _state_traffic(op, states, bucket), cost.flops


def weight_bytes(op: Op, index: int, bucket: Bucket) -> int:
    """Bytes of a weight operand that an op reads at the bucket's capacity, as it is stored."""
    value, spec = op.operands[index], row(op.name)
    if value is None:
        return 0
    share = spec.touched([v.type if v else None for v in op.operands], bucket.sizes) if spec.touched else {}
    encoding, full = encoding_of(value), value.tensor.bytes()
    stored = full if encoding is None else stored_fraction(encoding) * full * 32 / value.tensor.dtype.bits
    return int(stored * share.get(index, 1.0))


def _state_traffic(op: Op, states: dict[str, StateType], bucket: Bucket) -> int:
    """Bytes of per-sequence states an op reads and writes; KV pages depend on the context and are not counted."""
    total = 0
    for attr, effect in row(op.name).effects.items():
        ref = op.attrs.get(attr)
        state = states.get(ref.name) if isinstance(ref, StateRef) else None
        if state is not None and state.kind is not StateKind.kv:
            total += len(effect) * bucket.sequences * TensorType(state.dtype, state.shape).bytes()
    return total


def stored_fraction(encoding: Encoding) -> float:
    """Stored bytes per fp32 byte, scales included."""
    return {"f32": 1.0, "bf16": 0.5, "fp8": (8 + 32 / 128**2) / 32, "int8": (8 + 16 / encoding.group) / 32,
            "int4": (4 + 16 / encoding.group) / 32, "nvfp4": (4 + 8 / 16) / 32,
            "int4-g128": (4 + 16 / 128) / 32}[encoding.format]
