"""The front end in one call: a located model or a config in; graphs, config and weights out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from qcn_compile.frontend.audit import Audit, audit
from qcn_compile.frontend.checkpoint import Checkpoint, Located, load_config
from qcn_compile.frontend.trace import build, build_mtp, trace_main, trace_mtp
from qcn_compile.frontend.weights import WeightSource, mtp_layers
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.types import DType


@dataclass(frozen=True)
class Traced:
    """A model as the compiler sees it.

    main: tokens, positions i32 [T], batch -> logits [T, V], hidden [T, H]. head: traces the draft head, None when the
    checkpoint has none. weights: None when there are none. path: the folder of the tokenizer.
    """

    main: Graph
    head: Callable[[], Graph] | None
    config: dict[str, Any]
    weights: WeightSource | None
    name: str
    path: Path | None
    audit: Audit | None = None

    @cached_property
    def mtp(self) -> Graph | None:
        """As `main`, with an input hidden [T, H]: the draft head, traced when first asked for; None without one."""
        return None if self.head is None else self.head()


def trace_model(source: Located | PreTrainedConfig, dtype: DType = DType.f32, made_up_head: bool = False) -> Traced:
    """Trace a model and audit its checkpoint, before any other work.

    made_up_head: a config without a checkpoint gets a draft head, to be measured with dummy weights.
    Raises ModelError for a checkpoint that is missing, damaged or does not fit, IRError for an op that has no row.
    """
    if isinstance(source, PreTrainedConfig):
        graph = trace_main(build(source.get_text_config(decoder=True), dtype))
        return Traced(graph, None, source.to_dict(), None, source.model_type, None)
    config, plain = load_config(source.config)
    checkpoint = None if source.path is None else Checkpoint(source.path)
    model = build(config, dtype)
    has_head = made_up_head if checkpoint is None else bool(mtp_layers(model, checkpoint))
    mtp = build_mtp(model) if has_head else None
    weights = verdict = None
    if checkpoint is not None:
        weights = WeightSource(checkpoint, model, mtp)
        verdict = audit(weights)
    head = None if mtp is None else partial(trace_mtp, model, mtp)
    return Traced(trace_main(model), head, plain, weights, source.name, source.path, verdict)
