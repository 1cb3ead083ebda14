"""The graphs of all ranks together compute what the whole graph does; impossible layouts fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qcn_compile.errors import IRError, PassError
from qcn_compile.frontend.trace import build, trace_main
from qcn_compile.ir.graph import Graph, count
from qcn_compile.ir.interpret import default_inputs, run, run_ranks
from qcn_compile.passes.base import PassContext
from qcn_compile.passes.narrow import compose, joined
from qcn_compile.passes.shard import Shard
from qcn_compile.passes.split_stages import SplitStages
from qcn_compile.pipeline import Pipeline, Tracing
from tests.frontend.families import Case, eager, relative, tiny

TOKENS = [[5, 7, 9, 11, 13], [3], [2, 4, 6]]
LAYOUTS = [("qwen3_next", 2, 1), ("qwen3_next", 4, 2), ("qwen3_next", 8, 8), ("qwen3_5_text", 4, 1), ("qwen3", 2, 1),
           *(pytest.param(*layout, marks=pytest.mark.slow) for layout in [
               ("qwen3_next", 4, 1), ("qwen3_next", 8, 1), ("qwen3_next", 2, 2), ("qwen3_next", 4, 4),
               ("qwen3_5_moe_text", 4, 4), ("qwen3_5_moe_text", 8, 1), ("qwen3_moe", 8, 4), ("qwen3_moe", 4, 1)])]
CASES: dict[str, Case] = {}


def case(family: str) -> Case:
    return CASES.setdefault(family, Case(family))


def optimised(graph: Graph, shard: Shard | None, stages: SplitStages | None = None, **options: Any) -> Graph:
    return Pipeline.default(shard=shard, stages=stages, **options).run(graph, PassContext(), Tracing(verify=True))


@pytest.mark.parametrize(("family", "tp", "ep"), LAYOUTS)
def test_ranks_compute_the_whole(family: str, tp: int, ep: int) -> None:
    """2 key heads and up to 8 ranks: heads, key heads, DeltaNet groups, experts and vocabulary all get shared."""
    model = case(family)
    whole = optimised(model.graph, None)
    graphs = [optimised(model.graph, Shard(rank, tp, ep)) for rank in range(tp)]
    want = run(whole, default_inputs(whole, TOKENS), model.weight)
    have = run_ranks(graphs, [default_inputs(graph, TOKENS) for graph in graphs], model.weight)
    for outputs in have:
        assert max(relative(a, b) for a, b in zip(outputs, want, strict=True)) < 1e-5
    layers = model.config.num_hidden_layers
    assert count(graphs[0].ops)["all_reduce"] == 2 * layers + 1
    assert count(graphs[0].ops)["all_gather"] == 1


STAGES = [("qwen3_next", 2, 1), ("qwen3_next", 3, 1), ("qwen3_next", 2, 2), ("qwen3_5_text", 4, 1),
          *(pytest.param(*layout, marks=pytest.mark.slow) for layout in [("qwen3_next", 4, 2), ("qwen3_moe", 2, 4)])]


@pytest.mark.parametrize(("family", "pp", "tp"), STAGES)
def test_stages_compute_the_whole(family: str, pp: int, tp: int) -> None:
    """Every layer, state and weight is in one stage; every rank of every stage has the logits."""
    model = case(family)
    whole = optimised(model.graph, None)
    graphs = [optimised(model.graph, Shard(part, tp), SplitStages(stage, pp, part, tp))
              for stage in range(pp) for part in range(tp)]
    want = run(whole, default_inputs(whole, TOKENS), model.weight)
    have = run_ranks(graphs, [default_inputs(graph, TOKENS) for graph in graphs], model.weight)
    assert all(relative(outputs[0], want[0]) < 1e-5 for outputs in have)
    assert all(relative(outputs[1], want[1]) < 1e-5 for outputs in have[-tp:])
    assert sorted(name for graph in graphs[::tp] for name in graph.states) == sorted(whole.states)
    if tp == 1:
        assert sum(map(_held, graphs)) == _held(whole)


def test_a_stage_needs_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the pass's input is left
    with pytest.raises(PassError, match="--pp 5: @main has 4 layers; choose at most 4 stages"):
        optimised(case("qwen3").graph, None, SplitStages(0, 5))


def test_the_head_of_a_rank_has_its_own_format() -> None:
    """Behind a gather and a send, too, what makes the logits is the head."""
    formats = {"dense": "int4", "experts": "int4", "head": "int8"}
    ranks = (Shard(1, 2), None), (None, SplitStages(1, 2)), (Shard(1, 2), SplitStages(1, 2, 1, 2))
    for shard, stages in ranks:
        graph = optimised(case("qwen3").graph, shard, stages, formats=formats)
        assert [op.attrs["format"] for op in graph.ops if op.name == "encode"].count("int8") == 1


def test_ranks_meet_for_what_only_rank_0_reads() -> None:
    """A shared expert that is no expert among others: rank 0 alone adds it to the residual, but all sum it up."""
    config = tiny("qwen3_next", shared_expert_intermediate_size=40, num_hidden_layers=2)
    graph, weight = trace_main(build(config)), eager(config).get_parameter
    whole, *ranks = (optimised(graph, shard) for shard in (None, Shard(0, 2), Shard(1, 2)))
    want = run(whole, default_inputs(whole, TOKENS), lambda name: weight(name).data)
    have = run_ranks(ranks, [default_inputs(g, TOKENS) for g in ranks], lambda name: weight(name).data)
    assert all(relative(outputs[0], want[0]) < 1e-5 for outputs in have)


def test_groups_of_whole_experts_keep_blocks_of_fp8() -> None:
    """A shared expert of which a rank's slice would be narrower than a block (512 / 8 < 128) stays whole, and so do its
    blocks: the numbers of one rank."""
    config = tiny("qwen3_next", moe_intermediate_size=128, shared_expert_intermediate_size=128, num_hidden_layers=2)
    graph, weight = trace_main(build(config)), eager(config).get_parameter
    formats = {"experts": "fp8", "dense": "f32", "head": "f32"}
    whole, *ranks = (optimised(graph, shard, formats=formats) for shard in (None, *(Shard(r, 8, 8) for r in range(8))))
    want = run(whole, default_inputs(whole, TOKENS), lambda name: weight(name).data)
    have = run_ranks(ranks, [default_inputs(g, TOKENS) for g in ranks], lambda name: weight(name).data)
    assert all(relative(outputs[0], want[0]) < 1e-5 for outputs in have)


def test_ranks_share_the_weights() -> None:
    """Four ranks hold a quarter each, but for key heads, router and norms."""
    model = case("qwen3_next")
    sizes = [_held(optimised(model.graph, shard)) for shard in (None, *(Shard(rank, 4, 2) for rank in range(4)))]
    assert sizes[1:] == [sizes[1]] * 4
    assert 0.25 * sizes[0] < sizes[1] < 0.34 * sizes[0]


def _held(graph: Graph) -> int:
    """Elements of the weights that products read."""
    return sum(v.tensor.bytes() for op in graph.ops if op.name == "encode" for v in op.results) // 4


def test_one_rank_alone_is_refused() -> None:
    graph = optimised(case("qwen3").graph, Shard(0, 2))
    with pytest.raises(IRError, match="run_ranks"):
        run(graph, default_inputs(graph, TOKENS), case("qwen3").weight)


def test_ranks_that_disagree_are_refused() -> None:
    model = case("qwen3")
    graphs = [optimised(model.graph, Shard(0, 2)), optimised(model.graph, None)]
    with pytest.raises(IRError, match="1 of 2 ranks meet"):
        run_ranks(graphs, [default_inputs(graph, TOKENS) for graph in graphs], model.weight)


@pytest.mark.parametrize(("changes", "tp", "ep", "message"), [
    ({}, 3, 1, "--tp 3: 4 DeltaNet value heads cannot be shared evenly among 3 ranks"),
    ({}, 4, 3, "--ep 3: the 4 ranks of --tp 4 cannot form 3 equal groups"),
    ({"moe_intermediate_size": 6}, 4, 1, "--tp 4 --ep 1: experts of 6 channels cannot be cut into 4 slices; "
                                         "choose a --ep of at least 2"),
    ({"num_experts": 3}, 4, 4, "--ep 4: the model has 3 experts"),
])
def test_impossible_layouts(changes: dict[str, int], tp: int, ep: int, message: str) -> None:
    graph = trace_main(build(tiny("qwen3_next", **changes))) if changes else case("qwen3_next").graph
    with pytest.raises(PassError, match=message):
        Pipeline.default(shard=Shard(0, tp, ep)).run(graph, PassContext())


def test_composed_runs_read_the_same_rows() -> None:
    """take(take(x, inner), outer) == take(x, compose(outer, inner)), run by run."""
    def take(x: torch.Tensor, runs: tuple[tuple[int, int], ...]) -> torch.Tensor:
        return torch.cat([x[a:a + n] for a, n in runs])

    x, inner = torch.arange(40), ((8, 5), (0, 7), (20, 9))
    for outer in (((0, 21),), ((3, 4), (11, 6)), ((20, 1), (0, 2), (4, 10))):
        assert torch.equal(take(take(x, inner), outer), take(x, compose(outer, inner)))
    assert joined(((0, 2), (2, 3), (6, 1))) == ((0, 5), (6, 1))
