"""The CPU comparison: what it makes, what it prints, and the GGUF file it gives llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qcn_compile as qcn
from qcn_compile.runtime.bench.cli import main
from tests.bench.cpu_vs_llama import HERE, Workplace, compare, table
from tests.bench.random_checkpoint import make
from tests.sharing import one_trace

gguf = pytest.importorskip("gguf")
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_experts": 3, "num_experts_per_tok": 2,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "linear_key_head_dim": 32, "linear_value_head_dim": 32, "vocab_size": 96}


def test_what_fails_is_not_taken_for_made(tmp_path: Path) -> None:
    place = Workplace(tmp_path, 8, 4)
    with pytest.raises(subprocess.CalledProcessError):
        place.made("thing", "sh", "-c", "mkdir $0; exit 1")
    assert not (tmp_path / "thing").exists()
    place.made("thing", "sh", "-c", "echo once >> $0")
    assert place.made("thing", "sh", "-c", "echo twice >> $0").read_text() == "once\n"


def test_two_sides_in_turns(tmp_path: Path) -> None:
    with one_trace():
        qcn.compile(None, "cpu", tmp_path / "build-int4", quant="int4")
    place = Workplace(tmp_path, 20, 8)
    sides = [place.ours("int4"), place.ours("int4")]
    found = compare(sides, 1, 2)
    first, second = found["sides"]
    assert first["ratios"] == {"prefill": 1, "decode": 1}
    assert second["ratios"]["decode"] == pytest.approx(first["decode"] / second["decode"])
    assert first["rss"] > first["weights"] > 5e6
    assert 0 < first["of_read"] == pytest.approx(first["gb_per_second"] / found["read"])
    assert 0 < found["region"] < 1e-3 and len(found["reads"]) == 2
    lines = table(found)
    assert len(lines) == 4 and "an empty parallel region" in lines[0]


def test_the_command_is_known(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", "--help"]) == 0
    assert "--vs" in capfd.readouterr().out
    assert main(["cpu", "--vs", "nobody"]) != 0
    assert "invalid choice: 'nobody'" in capfd.readouterr().err


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A small checkpoint, and the tensors of its Q8_0 file as f32."""
    folder = tmp_path_factory.mktemp("gguf")
    make(folder / "checkpoint", {**json.loads((HERE / "bench_config.json").read_text()), **SMALL})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workplace, "python", lambda self: Path(sys.executable))  # it has gguf, which is all this needs
        tensors = gguf.GGUFReader(Workplace(folder, 8, 4).gguf("q8_0")).tensors
    return folder / "checkpoint", {t.name: gguf.dequantize(t.data, t.tensor_type) for t in tensors}


def test_gguf_has_every_value_once(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, tensors = written
    sizes = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(sizes) > len(tensors)  # experts are stacked
    stored = sum((folder / name).stat().st_size for name in set(sizes.values()))
    assert sum(t.size for t in tensors.values()) == pytest.approx(stored / 2, rel=0.1)
    assert np.all(tensors["blk.3.attn_q_norm.weight"] == 1) and np.all(tensors["blk.0.ssm_norm.weight"] == 1)
    assert np.all(tensors["blk.0.ssm_a"] < 0)


def test_gguf_rows_are_where_llama_looks_for_them(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, tensors = written
    from safetensors.torch import load_file

    weights = {k: v.float().numpy() for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    mixed = weights["model.layers.0.linear_attn.in_proj_qkvz.weight"].reshape(2, 32 + 32 + 64 + 64, 64)
    wanted = np.concatenate([mixed[:, :32].reshape(-1, 64), mixed[:, 32:64].reshape(-1, 64),
                             mixed[:, 64:128].reshape(-1, 64)])
    assert np.allclose(tensors["blk.0.attn_qkv.weight"], wanted, atol=5e-4)
    assert np.allclose(tensors["blk.0.attn_gate.weight"], mixed[:, 128:].reshape(-1, 64), atol=5e-4)
    assert np.allclose(tensors["blk.2.ffn_down_exps.weight"][1],
                       weights["model.layers.2.mlp.experts.1.down_proj.weight"], atol=5e-4)
    assert np.array_equal(tensors["blk.1.ffn_gate_inp.weight"], weights["model.layers.1.mlp.gate.weight"])
