"""An exported program becomes Graph IR: flat, the batch axis gone, layer kinds expanded, caches named."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, fx
from torch.export import ExportedProgram

from qcn_compile.errors import IRError
from qcn_compile.frontend import view_rules as _view_rules  # noqa: F401  (fills RULES)
from qcn_compile.frontend.aten_rules import RULES, Call, Result, dims, settle, stripped
from qcn_compile.frontend.builder import DTYPES, Builder, drop_unused
from qcn_compile.frontend.leaf_rules import LEAVES
from qcn_compile.ir.graph import Graph, Location, Value
from qcn_compile.ir.types import BatchType, TensorType

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_OUTSIDE = re.compile(r"/(torch|qcn_compile/frontend)/")
_BATCH_INPUT = "cu_seqlens"


@dataclass(frozen=True)
class Program:
    """What the importer needs: the export, and names and values of what it reads.

    root: path of the model inside the exported wrapper, with its dot; dropped from all paths.
    weights: parameter path -> weight name. constants: buffer path -> value.
    """

    name: str
    exported: ExportedProgram
    root: str
    weights: dict[str, str]
    constants: dict[str, Tensor]


@dataclass
class _Body:
    """The nodes of one layer kind, as traced for its first item."""

    begin: fx.Node
    path: str
    nodes: list[fx.Node] = field(default_factory=list)
    end: fx.Node | None = None


@dataclass
class _Scope:
    """Values of nodes while a body (or the whole program) is walked, and how paths read there."""

    values: dict[fx.Node, Result]
    path: tuple[str, str] = ("", "")

    def rename(self, path: str) -> str:
        """A path of the traced item as the path of the item that is being expanded."""
        old, new = self.path
        return new + path[len(old):] if old and (path == old or path.startswith(old + ".")) else path


class _Importer:
    def __init__(self, program: Program) -> None:
        self.program = program
        signature = program.exported.graph_signature
        self.sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.bodies: dict[int, _Body] = {}
        self.read: dict[str, Value] = {}
        self.graph = Graph(program.name)
        self.outer = _Scope({})
        for node in program.exported.graph.nodes:
            if node.name in signature.user_inputs:
                self.outer.values[node] = self._input(node)
        self.build = Builder(self.graph)

    def _input(self, node: fx.Node) -> Value:
        traced = node.meta["val"]
        if node.name == _BATCH_INPUT:
            value = Value("batch", BatchType())
        else:
            value = Value(node.name, TensorType(DTYPES[traced.dtype], stripped(dims(traced))))
        self.graph.inputs.append(value)
        return value

    def run(self) -> Graph:
        """Walk the program; the graph."""
        nodes = list(self.program.exported.graph.nodes)
        self._walk(self._gather(nodes), self.outer)
        for node in _nodes(nodes[-1].args[0]):
            value = self._look(node, self.outer)
            if not isinstance(value, Value):
                raise IRError(f"output {node} is no tensor")
            self.graph.outputs.append(value)
        drop_unused(self.graph)
        return self.graph

    def _gather(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Set the bodies of layer kinds apart; the nodes that remain."""
        rest: list[fx.Node] = []
        body: _Body | None = None
        for node in nodes:
            kind = str(node.target)
            if kind == "qcn.block_begin.default":
                body = self.bodies[node.args[1]] = _Body(node, str(node.args[2]))
            elif kind == "qcn.block_end.default" and body is not None:
                body.end, body = node, None
                rest.append(node)
            else:
                (rest if body is None else body.nodes).append(node)
        return rest

    def _walk(self, nodes: Iterable[fx.Node], scope: _Scope) -> None:
        for node in nodes:
            if node.op != "call_function":
                continue
            kind = str(node.target)
            if kind == "qcn.block_end.default":
                body = self.bodies[node.args[1]]
                scope.values[node] = self._expand(body, body.begin.args[0], body.path, scope)
            elif kind == "qcn.block_call.default":
                body = self.bodies[node.args[1]]
                scope.values[node] = self._expand(body, node.args[0], str(node.args[2]), scope)
            elif node.target is operator.getitem and node.args[0] in scope.values:
                scope.values[node] = scope.values[node.args[0]][node.args[1]]  # type: ignore[index]
            elif isinstance(node.meta.get("val"), (Tensor, list, tuple)):
                self._call(node, scope)

    def _expand(self, body: _Body, operands: object, path: str, scope: _Scope) -> list[Result]:
        """The body of a layer kind once more, for the item at `path`."""
        inner = _Scope({body.begin: [self._look(node, scope) for node in _nodes(operands)]}, (body.path, path))
        self._walk(body.nodes, inner)
        assert body.end is not None
        return [self._look(node, inner) for node in _nodes(body.end.args[0])]

    def _call(self, node: fx.Node, scope: _Scope) -> None:
        place = Location(self._strip(scope.rename(_module(node))), _source(node))
        call = Call(node, self.build, lambda argument: self._look(argument, scope))
        self.build.at = place
        try:
            scope.values[node] = settle(call, self._apply(call, scope))
        except IRError as error:
            raise IRError(f"{node.target} in {place}: {error}") from None

    def _apply(self, call: Call, scope: _Scope) -> Result:
        space, _, name = str(call.node.target).removesuffix(".default").partition(".")
        if space == "qcn":
            path = self._strip(scope.rename(str(call.args.get("handle", ""))))
            return LEAVES[name](call, path)
        if space != "aten" or name not in RULES:
            raise IRError("no row of the op table stands for it. If the model marks the function that calls it with a "
                          "hub kernel name, give that name a leaf op in frontend/extension_points.py; otherwise add a "
                          "rule in frontend/aten_rules.py")
        return RULES[name](call)

    def _look(self, node: fx.Node, scope: _Scope) -> Result:
        if node in scope.values:
            return scope.values[node]
        if node.name in self.sources:
            return self._source(scope.rename(self.sources[node.name]))
        raise IRError(f"it reads %{node.name}, which is neither computed in this layer, nor its argument or parameter")

    def _source(self, full: str) -> Value:
        """The weight or constant op of a parameter or buffer; made at its first use."""
        path = self._strip(full)
        name = self.program.weights.get(path, path)
        if name not in self.read:
            place = self.build.at
            if path in self.program.weights:
                self.read[name] = self.build.weight(name, self.program.exported.state_dict[full])
            else:
                self.read[name] = self.build.constant(name, self.program.constants[path])
            self.build.at = place
        return self.read[name]

    def _strip(self, path: str) -> str:
        return path.removeprefix(self.program.root)


def _nodes(argument: object) -> list[fx.Node]:
    """A list argument of a call."""
    if not isinstance(argument, (list, tuple)):
        raise IRError(f"{argument!r} is no list of traced tensors")
    return list(argument)


def _module(node: fx.Node) -> str:
    """Path of the module that made the call."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def _source(node: fx.Node) -> str:
    """`file:line` of the innermost modelling code."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    inside = [(file, line) for file, line in frames if not _OUTSIDE.search(file)]
    return f"{Path(inside[-1][0]).name}:{inside[-1][1]}" if inside else ""


def import_program(program: Program) -> Graph:
    """Graph IR of an exported program. Raises IRError naming the ATen op, its module and source line, and the cure."""
    return _Importer(program).run()
