"""qcn-compile --plan-only: quick, without torch, and every impossible ask names the number that breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qcn_compile.cli import main
from qcn_compile.targets.spec import catalogue

ROOT = Path(__file__).parents[2]


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    main(["--plan-only", "--json", *flags])
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["--plan-only", *flags]) == 2
    return capsys.readouterr().err


def test_a_reader_that_leaves_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "qcn_compile.cli", "--plan-only", "--target", "h100"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == ""


def test_it_needs_no_torch_and_no_time() -> None:
    code = ("import sys, time\nstart = time.perf_counter()\nfrom qcn_compile.cli import main\n"
            "main(['--plan-only', '--target', 'b200', '--gpus', '8'])\n"
            "print([m for m in ('torch', 'triton', 'tvm', 'transformers', 'numpy') if m in sys.modules])\n"
            "print(time.perf_counter() - start)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    lines = out.splitlines()
    assert lines[0].startswith("Qwen/Qwen3-Coder-Next on 8 x b200 (192.0 GB, 7700 GB/s): fits")
    assert lines[-2] == "[]" and float(lines[-1]) < 5


@pytest.mark.parametrize("name", sorted({chip.name for chip in catalogue().values()}))
def test_every_target_has_a_verdict(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    data = plan(capsys, "--target", name, "--model", "Qwen/Qwen3-Coder-Next", "--memory", "512")
    assert time.perf_counter() - start < 5
    assert data["fits"] and data["memory"]["free"] >= 0 and data["quant"] in data["title"]
    assert sum(v for k, v in data["memory"].items() if k not in ("available", "free")) <= data["memory"]["available"]
    if catalogue()[name].bandwidth:
        assert data["speed"]["ms_per_token"] > data["speed"]["limit_ms"] > 0
    else:
        assert data["speed"] == {} and data["quant"] == "int4"  # nothing but bytes to go by


def test_one_h100_holds_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    data = plan(capsys, "--target", "h100")
    assert (data["quant"], data["gpus"], data["planned_only"]) == ("fp8", 1, False)
    assert data["memory"]["weights"] == 80_064_240_832  # what a build of the full model writes
    assert data["formats"] == {"experts": "fp8", "dense": "fp8", "head": "fp8", "embedding": "bf16",
                               "sensitive": "bf16", "vectors": "f32"}
    rejected = {row["what"]: row["reason"] for row in data["rejected"]}
    assert rejected["none, tp 1"] == "weights 159.4 GB a chip; 82.5 GB of 85.0 are free for them"
    assert rejected["nvfp4, tp 1"] == "h100-80 has no nvfp4"
    assert len(data["rejected"]) == 6
    tight = plan(capsys, "--target", "h100", "--max-running-requests", "1")
    assert tight["context_length"] > data["context_length"] > 40_000


def test_a_context_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    data = plan(capsys, "--target", "h100", "--quant", "fp8", "--tp", "1", "--context-length", "262144")
    assert not data["fits"]
    assert "1 x 262144 tokens and 16 states take 7.80 GB a chip, the weights leave 2.40 GB" in data["problem"]
    data = plan(capsys, "--target", "h100", "--context-length", "262144")
    assert data["fits"] and data["gpus"] == 2  # without --tp, more chips are the cure
    assert data["reasons"]["layout"] == "the fewest chips that hold it are 2"


@pytest.mark.parametrize(("flags", "message"), [
    ("--target h100 --tp 3", "--tp 3: 16 attention heads"),
    ("--target h100 --model Qwen/Qwen3-Coder-Next-FP8 --tp 8", "512 / 8 = 64 columns"),
    ("--target h100 --gpus 6 --tp 4", "--gpus 6: a replica of --tp 4 --pp 1 takes 4; choose a multiple of 4"),
    ("--target h100 --gpus 0", "--gpus 0: must be at least 1"),
    ("--target cpu --gpus 2", "--gpus 2: a CPU build is for one machine"),
    ("--target h100 --pp 99", "the model has 48 layers"),
    ("--target cpu --quant fp8", "--quant fp8: a cpu has auto, none, int8, int4-experts, int4"),
    ("--target h300", "--target h300: unknown"),
])
def test_impossible_asks(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *flags.split())


def test_unknown_families_and_broken_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (('{"model_type": "llama"}', "model type 'llama': planning knows qwen3_next"),
                          ('{"model_type": "qwen3_next"}', "config.json has no num_hidden_layers"),
                          ("[]", "holds no JSON object"), ("{", "is no JSON")):
        (tmp_path / "config.json").write_text(text)
        assert main(["--plan-only", "--model", str(tmp_path)]) == 3
        assert message in capsys.readouterr().err


def test_an_error_budget_bounds_the_automatic_choice(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "Qwen/Qwen3-Coder-Next", "--target", "znver5", "--memory", "512")
    assert plan(capsys, *flags)["quant"] == "int4"
    precise = plan(capsys, *flags, "--error-budget", "0.01")
    assert precise["quant"] == "int8"
    reasons = {row["what"]: row["reason"] for row in precise["rejected"]}
    assert "weights in int4 are off by 8.6%, the error budget is 1.0%" in reasons["int4, tp 1"]
    last = plan(capsys, *flags[:-1], "64", "--error-budget", "0.01")  # nothing precise fits 64 GB
    assert last["quant"] == "int4" and "the error budget is 1.0%" in last["reasons"]["quant"]


def test_a_small_model_is_not_quantised(capsys: pytest.CaptureFixture[str]) -> None:
    data = plan(capsys)
    assert (data["model"], data["quant"]) == ("tiny-coder", "none")
    assert "MB in bf16 is small: nothing to gain from fewer bits" in data["reasons"]["quant"]


def test_what_cannot_be_built_yet_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plan-only", "--target", "b200", "--quant", "mxfp4"]) == 0
    assert "building              no  no kernels are written for this yet: planned only" in capsys.readouterr().out
    assert main(["--plan-only", "--target", "a100-40", "--gpus", "2", "--quant", "none"]) == 2
    out = capsys.readouterr().out
    assert "does not fit: weights 79.7 GB a chip; 39.5 GB of 42.3 are free for them" in out
