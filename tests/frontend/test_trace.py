"""The traced graph is the model: same logits as transformers, one sequence or many, every layer kind traced once."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, prompts, randomise, relative, tiny

import qcn_compile
from qcn_compile.errors import IRError, ModelError
from qcn_compile.frontend import extension_points
from qcn_compile.frontend.blocks import fingerprint
from qcn_compile.frontend.trace import build, trace, trace_main
from qcn_compile.ir.graph import Graph, count
from qcn_compile.ir.interpret import default_inputs, run
from qcn_compile.ir.optable import TABLE
from qcn_compile.ir.text import parse_graph, print_graph
from qcn_compile.ir.types import DType, StateKind
from qcn_compile.ir.verify import verify

TRACED = [f for f in FAMILIES if f != "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_is_valid_and_equals_transformers(case, family):
    subject = case(family)
    verify(subject.graph)
    assert [str(v.type) for v in subject.graph.inputs] == ["i32[T]", "i32[T]", "batch"]
    for lengths in ([1], [9], [3, 1, 20, 66]):
        tokens = prompts(lengths)
        logits, hidden = subject.interpreted(tokens)
        assert relative(logits, subject.logits(tokens)) <= 1e-4
        assert hidden.shape == (sum(lengths), 64)


def test_ragged_boundaries_matter(case):
    """Negative control: the same tokens as one sequence give other logits."""
    subject, (long,) = case("qwen3_next"), prompts([24])
    assert relative(subject.interpreted([long])[0], subject.interpreted([long[:7], long[7:]])[0]) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_text_form_round_trips(case, family):
    text = print_graph(case(family).graph)
    assert print_graph(parse_graph(text)) == text


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_sharing_layers_changes_nothing(case, family):
    subject = case(family)
    assert print_graph(trace_main(subject.model, share_layers=False)) == print_graph(subject.graph)


def test_a_layer_that_differs_is_a_kind_of_its_own(case):
    model = build(tiny("qwen3"))
    layers = model.model.layers
    assert fingerprint(layers[1]) == fingerprint(layers[2])
    layers[2].post_attention_layernorm.variance_epsilon = 1e-3
    assert fingerprint(layers[1]) != fingerprint(layers[2])
    graph = trace_main(model)
    where = {op.loc.module for op in graph.ops if op.attrs.get("value") == 1e-3}
    assert where == {"model.layers.2.post_attention_layernorm"}
    assert print_graph(graph) == print_graph(trace_main(model, share_layers=False))
    assert print_graph(graph) != print_graph(case("qwen3").graph)


def test_locations_and_states(case):
    graph = case("qwen3_next").graph
    assert {name: state.kind for name, state in graph.states.items() if ".2." in name or ".3." in name} == {
        "conv.model.layers.2.linear_attn": StateKind.conv, "delta.model.layers.2.linear_attn": StateKind.delta,
        "kv.model.layers.3.self_attn": StateKind.kv}
    assert {str(s) for s in graph.states.values()} == {"conv f32[128,3]", "delta f32[4,16,16]", "kv f32[2,16]"}
    (attention,) = [op for op in graph.ops if op.name == "attention"]
    assert attention.loc.module == "model.layers.3.self_attn"
    assert attention.loc.source.startswith("modeling_qwen3_next.py:")
    weights = [op.attrs["name"] for op in graph.ops if op.name == "weight"]
    assert len(weights) == len(set(weights)) == len(list(case("qwen3_next").model.parameters()))
    assert {op.loc.module for op in graph.ops if op.name == "constant"} == {"model.rotary_emb"}


@pytest.mark.parametrize("family", TRACED)
def test_tokens_meet_only_in_leaf_ops(case, family, monkeypatch):
    """With stand-ins for the leaf ops that keep to their token, one token changes its own row of the logits alone."""
    def local_attention(q, k, v, batch, **_):
        return q + (k * v).repeat_interleave(q.shape[1] // k.shape[1], 1)

    def local_rule(q, k, v, g, beta, batch, **_):
        return v * beta[..., None] * g[..., None].exp() * (1 + q.sum((1, 2)) + k.sum((1, 2)))[:, None, None]

    stand_ins = {"attention": local_attention, "gated_delta_rule": local_rule,
                 "causal_conv1d": lambda x, w, bias, batch, **_: torch.tanh(x * w[:, 0])}
    for name, function in stand_ins.items():
        monkeypatch.setitem(TABLE, name, dataclasses.replace(TABLE[name], reference=function))
    subject, (tokens,) = case(family), prompts([6])
    assert _influence(subject, tokens) < 1e-4
    leaky = dataclasses.replace(TABLE["silu"], reference=lambda x: x + x.roll(1, 0))
    monkeypatch.setitem(TABLE, "silu", leaky)
    assert _influence(subject, tokens) > 1e-2


def _influence(subject, tokens):
    """The greatest change of another token's logits when one token changes."""
    base, most = subject.interpreted([tokens])[0], 0.0
    for at in range(len(tokens)):
        changed = list(tokens)
        changed[at] = (changed[at] + 17) % 128
        rows = (subject.interpreted([changed])[0] - base).abs().amax(-1)
        assert rows[at] > 1e-3
        rows[at] = 0
        most = max(most, float(rows.max()))
    return most


def test_bf16_graph_equals_the_model_run_with_leaf_ops():
    """Every cast is in its place: the bf16 graph gives the bits of the eager model."""
    config = tiny("qwen3_next")
    graph = trace(config, DType.bf16)
    verify(graph)
    assert graph.outputs[0].tensor.dtype is DType.bf16
    torch.manual_seed(0)  # among equal router logits, which bf16 makes likely, torch.topk takes any
    model = build(config, DType.bf16, device="cpu")
    randomise(model)
    tokens = prompts([5, 12])
    inputs = default_inputs(graph, tokens)
    with torch.no_grad(), extension_points.leaf_ops_in(model):
        want = model(input_ids=inputs["tokens"][None], position_ids=inputs["positions"][None], use_cache=False,
                     cu_seq_lens_q=torch.tensor([0, 5, 17], dtype=torch.int32)).logits[0]
    assert torch.equal(run(graph, inputs, lambda name: model.get_parameter(name).data)[0], want)


def test_one_key_value_head():
    """A head axis of size one is not taken for the batch axis."""
    config = tiny("qwen3", num_key_value_heads=1, num_hidden_layers=2)
    graph = trace(config)
    verify(graph)
    assert {str(s) for s in graph.states.values()} == {"kv f32[1,16]"}


def test_dense_layers_between_sparse_ones():
    graph = trace(tiny("qwen3_moe", decoder_sparse_step=2))
    verify(graph)
    assert count(graph.ops)["moe_experts"] == 2


def test_yarn_scales_the_rotary_table():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e6,
            "partial_rotary_factor": 0.25}
    graph = trace(tiny("qwen3_next", rope_parameters=rope))
    verify(graph)
    assert "mul_scalar" in count(op for op in graph.ops if op.loc.module == "model.rotary_emb")


def test_sliding_window_is_refused():
    config = tiny("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.self_attn uses attention with sliding_window=8"):
        trace(config)


def test_expert_bias_and_activation_are_refused():
    model = build(tiny("qwen3_moe", num_hidden_layers=1))
    experts = model.model.layers[0].mlp.experts
    experts.has_bias = True
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts uses experts with has_bias=True"):
        trace_main(model)
    experts.has_bias, experts.act_fn = False, torch.nn.GELU()
    with pytest.raises(ModelError, match="experts with activation GELU"):
        trace_main(model)


def test_a_missing_leaf_op_is_named(monkeypatch):
    functions = {k: v for k, v in extension_points.HUB_FUNCTIONS.items() if k != "causal_conv1d_fn"}
    monkeypatch.setattr(extension_points, "HUB_FUNCTIONS", functions)
    message = r"aten\.\w+\S* in model\.layers\.0\.linear_attn \(modeling_qwen3_next\.py:\d+\): .*extension_points\.py"
    with pytest.raises(IRError, match=message):
        trace(tiny("qwen3_next", num_hidden_layers=1))


def test_an_unknown_op_is_named_with_its_place():
    model = build(tiny("qwen3", num_hidden_layers=1))
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(IRError, match=r"aten\.tanh\.default in model\.layers\.0\.mlp.*aten_rules\.py"):
        trace_main(model)


def test_a_forward_that_depends_on_the_data_is_refused():
    class Peeking(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    model = build(tiny("qwen3", num_hidden_layers=1))
    model.model.layers[0].mlp.act_fn = Peeking()
    with pytest.raises(ModelError, match="cannot be traced with a symbolic number of tokens"):
        trace_main(model)


def test_nothing_is_left_swapped(case):
    """Tracing leaves transformers' functions and the model's forwards as they were."""
    model = case("qwen3_next").model
    assert case("qwen3_next").graph.ops
    file = sys.modules[type(model).__module__]
    assert all(getattr(file, name).__module__ == file.__name__ for name in ("causal_conv1d_fn",
                                                                            "torch_chunk_gated_delta_rule"))
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


_FULL = """
import json, resource, time
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.graph import count
from qcn_compile.ir.types import DType
from qcn_compile.ir.verify import verify
start = time.process_time()
graph = trace_model(locate(None, "cuda"), DType.bf16).main
seconds = time.process_time() - start
verify(graph)
print(json.dumps(dict(seconds=seconds, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
                      ops=len(graph.ops), states=len(graph.states), names=count(graph.ops))))
"""


def test_full_size_traces_in_a_minute_and_three_gigabytes():
    """Qwen3-Coder-Next, 48 layers and 512 experts, in CPU seconds (the machine is shared)."""
    done = subprocess.run([sys.executable, "-c", _FULL], capture_output=True, text=True, check=True,
                          cwd=qcn_compile.__path__[0] + "/..")
    found = json.loads(done.stdout)
    assert found["seconds"] < 60 and found["peak"] < 3
    assert found["states"] == 36 * 2 + 12
    assert found["names"]["moe_experts"] == 48 and found["names"]["gated_delta_rule"] == 36
    assert isinstance(found["ops"], int) and found["ops"] < 6000


def test_graph_outputs_are_logits_and_hidden(case):
    graph: Graph = case("qwen3_next").graph
    assert [str(v.type) for v in graph.outputs] == ["f32[T,128]", "f32[T,64]"]
