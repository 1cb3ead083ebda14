"""Quantised checkpoints: the values are those of the published layouts; codes are kept where our formats hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import eager, published, randomise, save, tiny
from quantised import KEPT, LAYOUTS, fp8, quantise
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from qcn_compile.errors import ModelError
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.audit import audit
from qcn_compile.frontend.checkpoint import Checkpoint, load_config, locate
from qcn_compile.frontend.trace import build
from qcn_compile.frontend.weights import WeightSource
from qcn_compile.ir.encoding import Coded, wide
from qcn_compile.ir.types import DType

CODED = {"fp8": "fp8", "ct-int4-32": "int4", "ct-int4-64": "int4", "ct-int4-128": "int4", "ct-int4-row": "int4",
         "gptq": "int4", "gptq-128": "int4", "ct-int4-zeros": "int8", "ct-int4-128-zeros": "int8",
         "gptq-v2-zeros": "int8", "awq": "int8", "awq-128": "int8"}


@pytest.fixture(scope="module")
def model():
    """One DeltaNet and one attention layer, sizes of whole and of cut blocks of 128."""
    return eager(tiny("qwen3_next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
                      hidden_size=128, moe_intermediate_size=128, shared_expert_intermediate_size=64, num_experts=4))


def source_of(folder: Path) -> WeightSource:
    config, _ = load_config(folder)
    return WeightSource(Checkpoint(folder), build(config))


def merged(values: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A parameter of the model from the published tensors."""
    if name in values:
        return values[name].float()
    stem, _, last = name.rpartition(".")
    if last == "down_proj":
        return torch.stack([values[f"{stem}.{e}.down_proj.weight"] for e in range(4)])
    return torch.stack([torch.cat([values[f"{stem}.{e}.{part}.weight"] for part in ("gate_proj", "up_proj")])
                        for e in range(4)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_of_every_layout(model, layout, tmp_path):
    values = quantise(save(model, tmp_path), *LAYOUTS[layout])
    source = source_of(tmp_path)
    report = audit(source)
    assert report.used + sum(map(len, report.ignored.values())) == len(source.checkpoint.stored)
    assert all(name.endswith("input_scale") for names in report.ignored.values() for name in names)
    assert report.exceptions == {}
    for name in source.wanted():
        want = merged(values, name)
        assert torch.equal(source.get(name), want), name
        for start, stop in ((0, len(want)), (0, len(want) // 2), (len(want) // 2, len(want)), (1, 3)):
            if start < stop <= len(want):
                assert torch.equal(wide(source.rows(name, start, stop)), want[start:stop]), (name, start, stop)
    experts = source.rows("model.layers.0.mlp.experts.gate_up_proj", 1, 3)
    assert experts.encoding.format == CODED[layout] if layout in CODED else isinstance(experts, torch.Tensor)


def test_experts_in_one_tensor_with_block_scales(model, tmp_path):
    values = quantise(save(model, tmp_path), *LAYOUTS["fp8"])
    file, generator = tmp_path / "model.safetensors", torch.Generator().manual_seed(1)
    tensors = {k: v for k, v in load_file(file).items() if ".experts." not in k}
    for layer in range(2):
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            parts, values[name] = fp8(name, model.get_parameter(name), generator)
            tensors |= parts
    save_file(tensors, file)
    source = source_of(tmp_path)
    assert audit(source).used == len(tensors)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(source.get(name), values[name])
    part = source.rows(name, 2, 3)
    assert isinstance(part, Coded) and torch.equal(part.wide(), values[name][2:3])


def test_faults_of_codes_and_scales_are_in_the_one_error(model, tmp_path):
    quantise(save(model, tmp_path), *LAYOUTS["fp8"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for e in range(4):
        del tensors[f"model.layers.0.mlp.experts.{e}.up_proj.weight_scale_inv"]
    tensors["model.layers.1.self_attn.q_proj.weight_scale_inv"] = torch.ones(7, 1)
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)
    tensors["model.layers.0.linear_attn.in_proj_ba.weight_scale_inv"] = torch.ones(1, 1)
    tensors["model.layers.5.stray.weight_scale_inv"] = torch.ones(1, 1)
    del tensors["model.layers.1.post_attention_layernorm.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError) as error:
        trace_model(locate(str(tmp_path), "cpu"))
    text = str(error.value)
    assert "missing (5):" in text and "model.layers.0.mlp.experts.{0..3}.up_proj.weight_scale_inv" in text
    assert "model.layers.1.post_attention_layernorm.weight" in text
    assert "extra (3):" in text and "in_proj_ba.weight_scale_inv" in text and "stray" in text
    assert "q_proj.weight_scale_inv is [7, 1], its weight [128, 128] wants [1, 1]" in text
    assert "wrong shape (1)" in text


def draft(folder: Path, main, changes=None) -> None:
    """Add the published draft head to a checkpoint."""
    main.config.num_mtp_layers, main.config.mtp_layer_types = 1, ["full_attention"]
    mtp = MtpModel(main, 1).eval()
    randomise(mtp.layers, seed=1)
    del main.config.num_mtp_layers, main.config.mtp_layer_types
    tensors = load_file(folder / "model.safetensors") | published(mtp)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def test_the_draft_head_of_a_quantised_checkpoint(model, tmp_path):
    """mtp.fc and the draft's shared_expert_gate have no scale; the rest of the head is quantised like the model."""
    draft(save(model, tmp_path), model)
    values = quantise(tmp_path, *LAYOUTS["fp8"])
    kept = [name for name in values if name.startswith("mtp.") and any(part in name for part in KEPT)]
    assert "mtp.fc.weight" in kept and "mtp.layers.0.mlp.shared_expert_gate.weight" in kept
    traced = trace_model(locate(str(tmp_path), "cpu"))
    assert traced.mtp is not None
    report = audit(traced.weights)
    assert report.used == len(traced.weights.checkpoint.stored) and report.exceptions == {}
    assert torch.equal(traced.weights.get("mtp.layers.0.eh_proj.weight"), values["mtp.fc.weight"].float())
    name = "mtp.layers.0.mtp_block.mlp.shared_expert.down_proj.weight"
    assert torch.equal(traced.weights.get(name), values["mtp.layers.0.mlp.shared_expert.down_proj.weight"])
    assert isinstance(traced.weights.rows("mtp.layers.0.mtp_block.mlp.experts.gate_up_proj", 0, 1), Coded)


def test_the_list_of_unquantised_modules_is_held_against_the_tensors(model, tmp_path):
    draft(save(model, tmp_path), model)
    quantise(tmp_path, *LAYOUTS["fp8"])
    config = json.loads((tmp_path / "config.json").read_text())
    names = set(config["quantization_config"]["modules_to_not_convert"])
    names -= {"mtp.fc", "model.layers.0.linear_attn.in_proj_ba"}
    config["quantization_config"]["modules_to_not_convert"] = [*names, "model.layers.1.self_attn"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = audit(trace_model(locate(str(tmp_path), "cpu")).weights)
    assert sorted(report.exceptions["stored unquantised though the config does not exclude them"]) == [
        "model.layers.0.linear_attn.in_proj_ba.weight", "mtp.fc.weight"]
    assert sorted(report.exceptions["stored quantised though the config excludes them"]) == [
        f"model.layers.1.self_attn.{part}_proj.weight" for part in "koqv"]
    assert "mtp.fc.weight" in str(report) and "self_attn.q_proj.weight" in str(report)


def test_fp8_goes_into_fp8_kernels_untouched(model, tmp_path):
    """Every code and scale of the checkpoint's experts is in the packed weights, byte for byte."""
    from qcn_compile.lowering.buckets import buckets_for
    from qcn_compile.lowering.plan import blobs_of
    from qcn_compile.lowering.schedule import schedule
    from qcn_compile.lowering.weights import name_blobs, packed
    from qcn_compile.passes.base import PassContext
    from qcn_compile.pipeline import Pipeline
    from qcn_compile.targets.triton.target import GpuTarget

    quantise(save(model, tmp_path), *LAYOUTS["fp8"])
    target, tensors = GpuTarget("h100"), load_file(tmp_path / "model.safetensors")
    traced = trace_model(locate(str(tmp_path), "gpu"), DType.bf16)
    graph = Pipeline.default(base="bf16", quant="fp8").run(traced.main, PassContext(target=target))
    names = name_blobs(blobs_of(schedule(graph, buckets_for("gpu")[0], target)))
    blobs = dict(packed(names, traced.weights, target))
    stem = "model.layers.0.mlp.experts"
    for suffix, part in (("weight", "w"), ("weight_scale_inv", "s")):
        made = next(blob for name, blob in blobs.items() if name.startswith(f"{stem}.gate_up_proj")
                    and name.endswith(f"fp8.{part}")).tobytes()
        kind = torch.uint8 if part == "w" else torch.float32
        want = [tensors[f"{stem}.{e}.{half}.{suffix}"] for e in range(4) for half in ("gate_proj", "up_proj")]
        stored = b"".join((x.view(kind) if part == "w" else x.to(kind)).numpy().tobytes() for x in want)
        assert made[:len(stored)] == stored
    line = next(b for n, b in blobs.items() if n.startswith("model.layers.1.self_attn.o_proj.weight:") and n[-1] == "w")
    assert line.tobytes() == tensors["model.layers.1.self_attn.o_proj.weight"].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("scheme", "message"), [
    ({"quant_method": "bitsandbytes"}, "quantised .bitsandbytes, 4 bits, no format., which is not supported"),
    ({"quant_method": "gptq", "bits": 3}, "quantised .gptq, 3 bits"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "quantised .awq, 4 bits, gemv."),
])
def test_what_cannot_be_read_is_named(scheme, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_next", "quantization_config": scheme}))
    with pytest.raises(ModelError, match=message):
        load_config(tmp_path)
