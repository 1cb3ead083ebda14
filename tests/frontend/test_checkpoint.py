"""Checkpoints: found or not, whole or damaged, audited by name and shape, read into the traced parameters."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families import eager, relative, save, tiny
from safetensors.torch import load_file, save_file

from qcn_compile.errors import ModelError
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.audit import audit
from qcn_compile.frontend.checkpoint import Checkpoint, load_config, locate, read_header
from qcn_compile.frontend.trace import build
from qcn_compile.frontend.weights import WeightSource
from qcn_compile.ir.interpret import default_inputs, run


def source_of(folder):
    config, _ = load_config(folder)
    return WeightSource(Checkpoint(folder), build(config))


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    """A saved qwen3_next checkpoint, one tensor per expert."""
    return save(case("qwen3_next").reference, tmp_path_factory.mktemp("qwen3_next"))


@pytest.fixture
def edited(folder, tmp_path):
    """A function that copies the checkpoint and edits its tensors."""
    def edit(change):
        target = tmp_path / "edited"
        shutil.copytree(folder, target)
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors")
        return target

    return edit


def test_bundled_model_traces_audits_and_equals_transformers():
    located = locate(None, "cpu")
    traced = trace_model(located)
    assert (traced.name, traced.path) == ("tiny-coder", located.path)
    assert audit(traced.weights).ignored == {}
    from transformers import AutoModelForCausalLM
    reference = AutoModelForCausalLM.from_pretrained(located.path, dtype=torch.float32, attn_implementation="eager")
    assert all(torch.equal(traced.weights.get(name), p) for name, p in reference.named_parameters())
    tokens = [[5, 7, 11, 13, 17], [3, 2]]
    with torch.no_grad():
        want = torch.cat([reference(input_ids=torch.tensor([t]), use_cache=False).logits[0] for t in tokens])
    assert relative(run(traced.main, default_inputs(traced.main, tokens), traced.weights.get)[0], want) <= 1e-4


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3"])
def test_published_names_of_every_family(case, family, tmp_path):
    reference = case(family).reference
    source = source_of(save(reference, tmp_path))
    assert audit(source).used == len(source.checkpoint.stored)
    assert all(torch.equal(source.get(name), p) for name, p in reference.named_parameters())


def test_experts_merged_on_disk_are_accepted(case, edited):
    reference = case("qwen3_next").reference

    def merge(tensors):
        for layer in range(4):
            experts = f"model.layers.{layer}.mlp.experts."
            for key in [k for k in tensors if k.startswith(experts)]:
                del tensors[key]
            for name in ("gate_up_proj", "down_proj"):
                tensors[experts + name] = reference.get_parameter(experts + name).data.clone()

    source = source_of(edited(merge))
    audit(source)
    name = "model.layers.2.mlp.experts.gate_up_proj"
    assert torch.equal(source.get(name), reference.get_parameter(name))


def test_all_faults_in_one_error(edited):
    def spoil(tensors):
        for expert in range(8):
            del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        del tensors["model.layers.3.self_attn.q_norm.weight"]
        tensors["model.layers.9.surprise.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(63)
        tensors["model.layers.2.mlp.experts.5.down_proj.weight"] = torch.zeros(64, 31)
        tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(8, 64, 32)

    with pytest.raises(ModelError) as error:
        trace_model(locate(str(edited(spoil)), "cpu"))
    text = str(error.value)
    assert "missing (9):" in text and "model.layers.1.mlp.experts.{0..7}.up_proj.weight\n" in text
    assert "model.layers.3.self_attn.q_norm.weight\n" in text
    assert "extra (1):\n    model.layers.9.surprise.weight\n" in text
    assert "given twice (8):\n    model.layers.0.mlp.experts.{0..7}.down_proj.weight\n" in text
    assert "model.norm.weight is [63], the config wants [64]" in text
    assert "model.layers.2.mlp.experts.5.down_proj.weight is [64, 31], the config wants [64, 32]" in text


def test_tied_embeddings(tmp_path):
    model = eager(tiny("qwen3", tie_word_embeddings=True, num_hidden_layers=1))
    source = source_of(save(model, tmp_path / "one"))
    audit(source)
    assert "lm_head.weight" not in source.wanted()
    twice = save(model, tmp_path / "two",
                 lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert audit(source_of(twice)).ignored == {"tied to model.embed_tokens.weight": ["lm_head.weight"]}
    other = save(model, tmp_path / "other",
                 lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    source = source_of(other)
    audit(source)
    assert torch.equal(source.get("model.embed_tokens.weight"), model.model.embed_tokens.weight)
    traced = trace_model(locate(str(twice), "cpu"))
    names = [op.attrs["name"] for op in traced.main.ops if op.name == "weight"]
    assert "lm_head.weight" not in names and names.count("model.embed_tokens.weight") == 1


def test_parts_that_transformers_leaves_out_are_ignored_with_the_reason(tmp_path):
    model = eager(tiny("qwen3_5_text", num_hidden_layers=1))
    folder = save(model, tmp_path, lambda tensors: tensors.update({"model.visual.patch.weight": torch.zeros(1)}))
    assert audit(source_of(folder)).ignored == {
        "not a part of the language model, as transformers declares": ["model.visual.patch.weight"]}


@pytest.mark.parametrize("cut", [40, 4])
def test_truncated_file_names_both_sizes(folder, tmp_path, cut):
    data = (folder / "model.safetensors").read_bytes()
    size = len(data) - 40 if cut == 40 else cut
    (tmp_path / "model.safetensors").write_bytes(data[:size])
    wanted = len(data) if cut == 40 else 8
    with pytest.raises(ModelError, match=rf"model\.safetensors is (truncated|damaged): {size} bytes, .*{wanted}"):
        Checkpoint(tmp_path)


def test_damaged_header(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((9).to_bytes(8, "little") + b'{"a": 1}}' + b"0" * 8)
    with pytest.raises(ModelError, match="damaged: its header cannot be read"):
        read_header(file)


def test_missing_shards_are_named(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 of 2 files .*: model-00002-of-00002\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(("config", "message"), [
    (None, r"config\.json does not exist; give the directory of a Hugging Face checkpoint"),
    ("{", r"config\.json cannot be read as JSON"),
    ("[]", r"holds no JSON object"),
    ('{"model_type": "gpt2"}', r"model_type 'gpt2' is not supported; supported are qwen3_next, "),
    ('{"model_type": "qwen3", "hidden_size": "many"}', r"is not a valid qwen3 config: .*'hidden_size'"),
    ('{"model_type": "qwen3", "hidden_size": -8}', r"transformers cannot build a qwen3 model from this config"),
])
def test_bad_configs(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        trace_model(locate(str(tmp_path), "cpu"))


def test_unknown_name_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError) as error:
        locate("Nobody/Nothing", "cpu")
    text = str(error.value)
    assert "a directory 'Nobody/Nothing' (absent)" in text and f"the cache {tmp_path} (absent)" in text
    assert "HF_HUB_OFFLINE" in text
    with pytest.raises(ModelError, match="no Hugging Face name"):
        locate("./no/such/dir", "cpu")


def test_failed_download_gives_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def snapshot(name, local_files_only=False, **_):
        raise FileNotFoundError("no snapshot") if local_files_only else ConnectionError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ModelError, match=r"a download from huggingface\.co \(ConnectionError: no route to host\)"):
        locate("Nobody/Nothing", "cpu")


def test_cached_snapshot_is_used_without_the_network(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cached = tmp_path / "models--Owner--Model"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    located = locate("Owner/Model", "cpu")
    assert located.path == cached / "snapshots" / "abc" and located.name == "Owner/Model"


def test_defaults_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    located = locate(None, "cuda")
    assert located.path is None and located.name == "Qwen/Qwen3-Coder-Next" and "nowhere to be found" in located.note
    _, plain = load_config(located.config)
    assert plain["num_hidden_layers"] == 48 and plain["num_experts"] == 512
    with pytest.raises(ModelError, match="is a file; give the directory"):
        locate(str(located.config / "config.json"), "cpu")


def test_folder_with_a_config_alone_has_no_weights(tmp_path):
    tiny("qwen3", num_hidden_layers=1).save_pretrained(tmp_path)
    located = locate(str(tmp_path), "cpu")
    assert located.path is None and "holds no *.safetensors files" in located.note
    assert trace_model(located).weights is None
