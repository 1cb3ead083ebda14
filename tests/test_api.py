"""The public API: every name documented, every error told, every field explained; rows of the op table give shapes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

import qcn_compile as qcn
from qcn_compile.compile import Built
from qcn_compile.ir import ops as _rows  # noqa: F401
from qcn_compile.ir.graph import Location, Op, Value
from qcn_compile.ir.optable import TABLE, Cost, OpSpec
from qcn_compile.ir.rewrite import Fired, Match
from qcn_compile.ir.types import StateRef, StateType, Sym, TensorType
from qcn_compile.pipeline import Tracing
from qcn_compile.runtime.loaded import Model, Stream
from qcn_compile.runtime.output import Output
from qcn_compile.runtime.request import SamplingParams

PUBLIC = [getattr(qcn, name) for name in qcn.__all__]
MET = [Built, Cost, Fired, Location, Match, Model, Op, OpSpec, Output, SamplingParams, StateRef, StateType, Stream, Sym,
       TensorType, Tracing, Value]  # what the public names take and return
CLASSES = [thing for thing in [*PUBLIC, *MET] if inspect.isclass(thing)]
POINTWISE = re.compile(r"Pointwise|\*\*|^x [+*]|sum|mean|softmax|same|largest|Arithmetic|product", re.I)


def members() -> Iterator[tuple[str, Any]]:
    """Every public function, class, method and property, with its name."""
    for thing in {id(t): t for t in [*PUBLIC, *MET]}.values():
        yield thing.__name__, thing
        for name, member in vars(thing).items() if inspect.isclass(thing) else ():
            plain = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
            if not name.startswith("_") and inspect.isfunction(plain):
                yield f"{thing.__name__}.{name}", plain


def raised(function: Any) -> set[str]:
    """Our errors that its own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = {node.exc.func.id for node in ast.walk(tree)
             if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)}
    return {name for name in names if name.endswith("Error") and hasattr(__import__("qcn_compile.errors").errors, name)}


@pytest.mark.parametrize(("name", "thing"), list(members()), ids=lambda x: x if isinstance(x, str) else "")
def test_documented(name: str, thing: Any) -> None:
    text = inspect.getdoc(thing) or ""
    obvious = name.rpartition(".")[2] in ("bytes", "bits", "rank", "is_float", "copy", "sides")
    assert len(text.split()) >= 3 or obvious, f"{name} has no docstring"
    if inspect.isfunction(thing):
        assert inspect.signature(thing).return_annotation != inspect.Signature.empty, f"{name} is not typed"
        for error in raised(thing):
            assert "aise" in text and error in text, f"{name} raises {error} and does not say so"


@pytest.mark.parametrize("made", [c for c in CLASSES if dataclasses.is_dataclass(c)], ids=lambda c: c.__name__)
def test_every_field_is_explained(made: type) -> None:
    text = inspect.getdoc(made) or ""
    fields = [f.name for f in dataclasses.fields(made) if not f.name.startswith("_")]
    missing = [name for name in fields if not re.search(rf"\b{name}", text)]
    assert not missing, f"{made.__name__} does not explain {', '.join(missing)}"


PUBLISHED = {"rms_norm": "2019", "rope": "2021", "rope_table": "2023", "attention": "2017", "paged_attention": "2023",
             "gated_delta_rule": "2024", "moe_experts": "2020", "moe_route": "2017"}


def test_published_formulas_name_their_source() -> None:
    for name, year in PUBLISHED.items():
        assert re.search(rf"\(\w[^()]*\b{year}\b[^()]*\)", TABLE[name].doc), name


def test_rows_of_the_op_table_give_a_formula_and_shapes() -> None:
    ours = {name: row for name, row in TABLE.items() if row.reference.__module__.startswith("qcn_compile.ir.ops")}
    assert len(ours) > 40
    for name, row in ours.items():
        assert len(row.doc.split()) >= 2, name
        if row.operands and not POINTWISE.search(row.doc):
            assert re.search(r"(?i)\[[^\]]+\]|axis|axes|dims|shape", row.doc), f"{name}: no shapes in {row.doc!r}"
