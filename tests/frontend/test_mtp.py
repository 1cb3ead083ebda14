"""The draft head: traced from transformers' own module, its weights from a checkpoint in the published layout."""

from __future__ import annotations

import pytest
import torch
from families import prompts, published, relative, save, save_with_draft_head, tiny

from qcn_compile.errors import ModelError
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.audit import audit
from qcn_compile.frontend.checkpoint import Checkpoint, locate
from qcn_compile.frontend.trace import build, build_mtp
from qcn_compile.frontend.weights import WeightSource
from qcn_compile.ir.interpret import default_inputs, run
from qcn_compile.ir.text import print_graph
from qcn_compile.ir.verify import verify


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """transformers' main model and draft head, and the folder of a checkpoint that holds both."""
    return save_with_draft_head(tiny("qwen3_next", num_hidden_layers=4), tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="module")
def traced(heads):
    return trace_model(locate(str(heads[2]), "cpu"))


def test_graph_equals_transformers(heads, traced):
    _, mtp, _ = heads
    assert "mtp" not in vars(traced)  # traced when first asked for: most builds have no use for it
    verify(traced.mtp)
    assert traced.mtp is traced.mtp
    assert [v.name for v in traced.mtp.inputs] == ["tokens", "positions", "hidden", "batch"]
    assert list(traced.mtp.states) == ["kv.mtp.layers.0.mtp_block.self_attn"]
    tokens = prompts([9, 4])
    hidden = torch.randn(13, 64, generator=torch.Generator().manual_seed(2))
    logits, after = run(traced.mtp, {**default_inputs(traced.mtp, tokens), "hidden": hidden}, traced.weights.get)
    start = 0
    for ids in tokens:
        rows = slice(start, start + len(ids))
        with torch.no_grad():
            want = mtp.forward_layer(0, hidden[None, rows], torch.arange(len(ids))[None], None,
                                     input_ids=torch.tensor([ids]))
            assert relative(after[rows], want[0]) <= 1e-4
            assert relative(logits[rows], mtp._project_to_logits(want)[0]) <= 1e-4
        start = rows.stop


def test_weights_resolve_to_the_checkpoint(heads, traced):
    main, mtp, _ = heads
    names = [op.attrs["name"] for op in traced.mtp.ops if op.name == "weight"]
    assert {n for n in names if not n.startswith("mtp.")} == {"model.embed_tokens.weight", "lm_head.weight"}
    for name in names:
        owner = mtp.get_parameter(name.removeprefix("mtp.")) if name.startswith("mtp.") else main.get_parameter(name)
        assert torch.equal(traced.weights.get(name), owner)
    report = audit(traced.weights)
    assert report.ignored == {} and report.used == len(traced.weights.checkpoint.stored)


def test_main_graph_is_the_same_with_and_without_a_head(case, traced):
    assert print_graph(traced.main) == print_graph(case("qwen3_next").graph)


def test_faults_are_named_as_published(heads, tmp_path):
    main, mtp, _ = heads

    def spoil(tensors):
        tensors.update(published(mtp))
        del tensors["mtp.fc.weight"], tensors["mtp.layers.0.self_attn.k_proj.weight"]
        del tensors["mtp.layers.0.mlp.experts.3.up_proj.weight"]
        tensors["mtp.norm.weight"] = torch.zeros(5)
        tensors["mtp.layers.0.unknown"] = torch.zeros(1)

    with pytest.raises(ModelError) as error:
        trace_model(locate(str(save(main, tmp_path, spoil)), "cpu"))
    text = str(error.value)
    assert "missing (3):" in text and "    mtp.fc.weight\n" in text
    assert "    mtp.layers.0.self_attn.k_proj.weight\n" in text
    assert "    mtp.layers.0.mlp.experts.3.up_proj.weight\n" in text
    assert "mtp.norm.weight is [5], the config wants [64]" in text
    assert "extra (1):\n    mtp.layers.0.unknown\n" in text


def test_copies_of_shared_tensors_and_further_layers_are_ignored(heads, tmp_path):
    main, mtp, _ = heads

    def add(tensors):
        tensors.update(published(mtp))
        tensors["mtp.embed_tokens.weight"] = torch.zeros(128, 64)
        tensors["mtp.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 64)

    model = build(main.config)
    source = WeightSource(Checkpoint(save(main, tmp_path, add)), model, build_mtp(model))
    assert audit(source).ignored == {
        "shared with the main model": ["mtp.embed_tokens.weight"],
        "of draft layers beyond the first": ["mtp.layers.1.self_attn.k_proj.weight"]}


def test_a_build_without_weights_finds_the_heads_under_their_published_names(heads, traced):
    """What qcn-run binds later from the checkpoint is what the compiler would have copied."""
    from qcn_compile.lowering.late import _step
    from qcn_compile.runtime.late_checkpoint import Checkpoint
    from qcn_compile.runtime.late_weights import Rows

    stored = Checkpoint(heads[2])
    names = traced.weights.draft_names
    used = [op for op in traced.mtp.ops if op.name == "weight" and op.attrs["name"] in names]
    assert len(used) == len(names) > 10
    for op in used:
        want = traced.weights.get(op.attrs["name"]).float().numpy()
        found = Rows([{**_step(op, names), "args": []}], stored).get(0, len(want))
        assert (found.wide() == want).all(), op.attrs["name"]
