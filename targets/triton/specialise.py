"""What a GPU plan does differently in a bucket: with one token, norms become prologues of the products that read them.

Values are kept, ops replaced: the same weights serve every bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.optable import TABLE
from qcn_compile.targets.base import Bucket
from qcn_compile.targets.triton import ops as _ops  # noqa: F401  (registers the fused rows)

READERS = ("moe_add", "moe_experts")


def specialise(ops: Sequence[Op], outputs: Sequence[Value], bucket: Bucket) -> list[Op]:
    """The ops of a bucket, in order."""
    if bucket.tokens > 1:
        return list(ops)
    users: dict[Value, list[Op]] = {}
    for op in ops:
        for value in op.inputs:
            users.setdefault(value, []).append(op)
    gone: set[int] = set()
    swapped: dict[int, Op] = {}
    for op in ops:
        if op.name == "rms_norm" and op.result.tensor.rank == 2 and op.result not in outputs:
            _fuse(op, users.get(op.result, []), gone, swapped)
    return [swapped.get(id(op), op) for op in ops if id(op) not in gone]


def choice(logits: Value) -> Op:
    """The op that chooses tokens from the logits, which stay an output for what only the host can do."""
    op = Op("sample", [logits], [])
    op.results = [Value("chosen", TABLE["sample"].infer(logits.type), op)]  # type: ignore[arg-type]
    return op


def _fuse(norm: Op, readers: list[Op], gone: set[int], swapped: dict[int, Op]) -> None:
    """Put a norm into its readers where they allow it; else leave both as they are."""
    products = [r for r in readers if r.name == "linear" and len(r.operands) == 2 and r.operands[0] is norm.result]
    rest = [r for r in readers if r not in products]
    head = [norm.operands[0], norm.operands[1]]
    eps = {"eps": norm.attrs["eps"]}
    if len(products) == 2 and not rest and (order := _wide_first(products)):
        first, second = order
        swapped[id(products[0])] = Op("norm_linear_pair", [*head, first.operands[1], second.operands[1]],
                                      [first.result, second.result], eps, first.loc)
        gone |= {id(norm), id(products[1])}
    elif len(products) == 1 and all(r.name in READERS for r in rest):
        kept = [norm.result] if rest else []
        swapped[id(products[0])] = Op("norm_linear", [*head, products[0].operands[1]], [products[0].result, *kept],
                                      {**eps, "keep": bool(rest)}, products[0].loc)
        gone.add(id(norm))


def _wide_first(products: list[Op]) -> list[Op] | None:
    """The two products with the bf16 one last; None when neither or only the wider one is bf16."""
    ordered = sorted(products, key=lambda p: -int(p.result.tensor.shape[1]))  # type: ignore[arg-type]
    maker = ordered[1].inputs[1].op
    return ordered if maker is not None and maker.attrs.get("format") == "bf16" else None
