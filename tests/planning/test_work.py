"""The counts of the planner against the compiler's own: a traced graph, its plans, its weights, its caches."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qcn_compile.frontend import trace_model
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.types import DType
from qcn_compile.lowering.buckets import buckets_for
from qcn_compile.lowering.late import sizes
from qcn_compile.lowering.memory import assign, liveness
from qcn_compile.lowering.plan import blobs_of
from qcn_compile.lowering.schedule import schedule, work
from qcn_compile.passes.base import PassContext
from qcn_compile.passes.canonicalize import static_values
from qcn_compile.pipeline import Pipeline
from qcn_compile.planning.formats import Scheme, schemes
from qcn_compile.planning.memory import PAGE, needs
from qcn_compile.planning.shape import ModelShape, shape_of
from qcn_compile.planning.work import Machine, Step, expert_load, step_work
from qcn_compile.targets.base import Bucket
from qcn_compile.targets.layout import Layout
from qcn_compile.targets.registry import load_target
from qcn_compile.targets.spec import hardware

ASSETS = Path(__file__).parents[2] / "qcn_compile/assets"
LAYERS = 4  # of the full-size model: three of one kind, one of the other
COUNTED = ("embedding", "rms_norm", "linear", "linear_add", "delta_net", "moe_route", "moe_add")


def scheme_of(kind: str, name: str, base: str = "bf16") -> Scheme:
    return next(s for s in schemes(kind, base) if s.name == name)


class Case:
    """A traced and optimised model beside its sizes."""

    def __init__(self, config: dict[str, Any], target: str, quant: str) -> None:
        self.target, self.shape = load_target(target), shape_of(config)
        self.scheme = scheme_of(self.target.kind, quant)
        traced = trace_model(AutoConfig.for_model(**config), DType(self.target.dtype))
        formats = {part: self.scheme.format_of(part) for part in ("experts", "dense", "head")}
        pipeline = Pipeline.default(base="bf16", formats=formats)
        self.graph: Graph = pipeline.run(traced.main, PassContext(target=target))
        self.static = static_values(self.graph)

    def traced(self, bucket: Bucket) -> dict[str, list[float]]:
        """Bytes and FLOPs by op, as the plan counts them."""
        table: dict[str, list[float]] = defaultdict(lambda: [0, 0])
        for op in self.graph.ops:
            if op.results[0] not in self.static:
                for place, amount in enumerate(work(op, self.graph.states, bucket)):
                    table[op.name][place] += amount
        return table

    def counted(self, bucket: Bucket) -> dict[str, list[float]]:
        """The same from the sizes alone."""
        table: dict[str, list[float]] = defaultdict(lambda: [0, 0])
        step = Step(bucket.tokens, bucket.sequences, bucket.rows, 0)
        for item in step_work(self.shape, self.scheme, Layout(), Machine.of(self.target.kind, self.scheme), step):
            table[item.name][0] += item.count * item.bytes
            table[item.name][1] += item.count * item.flops
        return table


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads((ASSETS / name / "config.json").read_text()), **changes}


@pytest.fixture(scope="module", params=[("qwen3-coder-next", "h100", "fp8"), ("qwen3-coder-next", "h100", "none"),
                                        ("qwen3-coder-next", "b200", "nvfp4"),
                                        ("tiny-coder", "cpu", "int4"), ("tiny-coder", "cpu", "none")], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    name, target, quant = request.param
    return Case(config_of(name, **({"num_hidden_layers": LAYERS} if name == "qwen3-coder-next" else {})), target, quant)


def test_bytes_and_flops_are_those_of_the_traced_graph(case: Case) -> None:
    for bucket in buckets_for(case.target.kind):
        traced, counted = case.traced(bucket), case.counted(bucket)
        traced["moe_add"][0] += _experts_more(case, bucket)
        for name in COUNTED:
            assert counted[name][0] == pytest.approx(traced[name][0], rel=0.02), (bucket.name, name)
            if name not in ("embedding", "moe_route", "rms_norm"):
                assert counted[name][1] == pytest.approx(traced[name][1], rel=0.02), (bucket.name, name)


def _experts_more(case: Case, bucket: Bucket) -> float:
    """Bytes by which the table is low: it takes the shared expert for one more that is picked at random, and a token's
    picks for independent."""
    shape, all_ = case.shape, case.shape.experts + 1
    table = all_ * (1 - (1 - 1 / all_) ** (bucket.tokens * (shape.top_k + 1)))
    ours = expert_load(shape, Layout(), bucket.tokens)[0] + 1
    return shape.layers * (ours - table) * 3 * shape.hidden * shape.expert_width * case.scheme.bits("experts") / 8


def test_weights_caches_and_workspace_are_those_of_the_build(case: Case) -> None:
    chip = hardware("h100") if case.target.kind == "gpu" else hardware("host")
    need = needs(case.shape, case.scheme, Layout(), chip, 1e12)
    plans = [schedule(case.graph, bucket, case.target) for bucket in buckets_for(case.target.kind)]
    units = {s.kind.value: [] for s in case.graph.states.values()}  # type: ignore[var-annotated]
    for state in case.graph.states.values():
        units[state.kind.value].append(case.target.cache_unit(state, PAGE)[1])
    assert need.kv_token * PAGE == sum(units["kv"])
    assert need.slot == sum(units["conv"]) + sum(units["delta"])
    workspace = max(assign(liveness(plan)) for plan in plans)
    assert workspace <= need.workspace <= 1.6 * workspace
    if case.target.kind == "gpu":
        blobs = dict.fromkeys(key for plan in plans for key in blobs_of(plan))
        stored = sum(size for key in blobs for _, size in sizes(key, case.target).values())
        assert need.weights == pytest.approx(stored, rel=1e-3)


@pytest.mark.slow
def test_the_full_model_takes_the_bytes_that_the_planner_says() -> None:
    full = Case(config_of("qwen3-coder-next"), "h100", "fp8")
    plan = schedule(full.graph, Bucket("decode-1", 1, 1, 1), full.target)
    stored = sum(size for key in blobs_of(plan) for _, size in sizes(key, full.target).values())
    need = needs(full.shape, full.scheme, Layout(), hardware("h100"), 1e12)
    assert need.weights == pytest.approx(stored, rel=1e-5)


def test_distinct_experts_are_those_of_random_routing() -> None:
    """Against a simulation: distinct experts of 512, and of the busiest of four groups."""
    import numpy as np

    shape: ModelShape = shape_of(config_of("qwen3-coder-next"))
    rng = np.random.default_rng(0)
    for tokens in (1, 8, 32, 128):
        picks = [np.stack([rng.choice(512, 10, replace=False) for _ in range(tokens)]) for _ in range(40)]
        distinct = np.mean([len(np.unique(p)) for p in picks])
        assert expert_load(shape, Layout(), tokens)[0] == pytest.approx(distinct, rel=0.02)
        busiest = np.mean([max(len(np.unique(p[p // 128 == g])) for g in range(4)) for p in picks])
        assert expert_load(shape, Layout(tp=4, ep=4), tokens)[0] == pytest.approx(busiest, rel=0.15)
