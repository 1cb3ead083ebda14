"""What a GPU plan does differently in a bucket: with one token, norms and rotations move into their readers.

Values are kept, ops replaced: the same weights serve every bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.optable import TABLE
from qcn_compile.targets.base import Bucket
from qcn_compile.targets.triton import ops as _ops  # noqa: F401  (registers the fused rows)

EXPERTS = ("moe_add", "moe_experts")


def specialise(ops: Sequence[Op], outputs: Sequence[Value], bucket: Bucket) -> list[Op]:
    """The ops of a bucket, in order."""
    if bucket.tokens > 1:
        return list(ops)
    fusion = Fusion(ops, outputs)
    for op in ops:
        if op.name == "rms_norm" and op.result.tensor.rank == 2:
            fusion.norm(op)
        elif op.name == "rope_append":
            fusion.rope_append(op)
    return [fusion.swapped.get(id(op), op) for op in ops if id(op) not in fusion.gone]


def choice(logits: Value) -> Op:
    """The op that chooses tokens from the logits, which stay an output for what only the host can do."""
    op = Op("sample", [logits], [])
    op.results = [Value("chosen", TABLE["sample"].infer(logits.type), op)]  # type: ignore[arg-type]
    return op


class Fusion:
    """Which ops are replaced and which vanish. A method fuses where the readers allow it, or leaves all as it is."""

    def __init__(self, ops: Sequence[Op], outputs: Sequence[Value]) -> None:
        self._outputs = outputs
        self._users: dict[Value, list[Op]] = {}
        for op in ops:
            for value in dict.fromkeys(op.inputs):
                self._users.setdefault(value, []).append(op)
        self.gone: set[int] = set()
        self.swapped: dict[int, Op] = {}

    def readers(self, value: Value) -> list[Op]:
        """Ops that read a value; none when the graph returns it."""
        return [] if value in self._outputs else self._users.get(value, [])

    def _swap(self, old: Op, name: str, operands: list[Value | None], gone: Sequence[Op],
              results: list[Value] | None = None, **attrs: object) -> None:
        self.swapped[id(old)] = Op(name, operands, results or list(old.results), attrs, old.loc)  # type: ignore[arg-type]
        self.gone |= {id(op) for op in gone}

    def norm(self, norm: Op) -> None:
        """Into one product (which may keep the normed x for experts), or into two of which the narrower is bf16."""
        readers = self.readers(norm.result)
        products = [r for r in readers if r.name == "linear" and len(r.operands) == 2 and r.operands[0] is norm.result]
        head, eps = [norm.operands[0], norm.operands[1]], norm.attrs["eps"]
        if len(products) == len(readers) == 2 and (order := _wide_first(products)):
            first, second = order
            self._swap(products[0], "norm_linear_pair", [*head, first.operands[1], second.operands[1]],
                       [norm, products[1]], [first.result, second.result], eps=eps)
        elif len(products) == 1 and all(r.name in EXPERTS for r in readers if r is not products[0]):
            kept = [norm.result] if len(readers) > 1 else []
            self._swap(products[0], "norm_linear", [*head, products[0].operands[1]], [norm],
                       [products[0].result, *kept], eps=eps, keep=bool(kept))

    def rope_append(self, append: Op) -> None:
        """Into the attention behind it."""
        readers = self.readers(append.result)
        if len(readers) != 1 or readers[0].name != "paged_attention" or readers[0].operands[0] is not append.result:
            return
        attend = readers[0]
        *rest, batch = append.operands
        self._swap(attend, "rope_attention", [*rest, attend.operands[1], batch], [append],
                   eps=append.attrs["eps"], scale=attend.attrs["scale"],
                   **{name: attend.attrs[name] for name in ("state", "stored") if name in attend.attrs})  # type: ignore[arg-type]


def _wide_first(products: list[Op]) -> list[Op] | None:
    """The two products with the bf16 one last; None when neither or only the wider one is bf16."""
    ordered = sorted(products, key=lambda p: -int(p.result.tensor.shape[1]))  # type: ignore[arg-type]
    maker = ordered[1].inputs[1].op
    return ordered if maker is not None and maker.attrs.get("format") == "bf16" else None
