"""qcn-run in place of `python -m sglang.launch_server`, and with a checkpoint in place of a build."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import ASSETS
from test_process import running

from qcn_compile.errors import UsageError
from qcn_compile.runtime.checkpoint import Checkpoint, _this_gpu, find_checkpoint
from qcn_compile.runtime.cli import parser
from qcn_compile.runtime.prefix.options import prefix_options
from qcn_compile.runtime.server.launch import server_config
from qcn_compile.runtime.server.sglang import check_sglang_flags
from qcn_compile.runtime.speculation.options import speculation_options

MODEL = "Qwen/Qwen3-Coder-Next-80B-A3B"
YARN = ("--json-model-override-args '{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0,"
        "\"original_max_position_embeddings\":262144}}' --context-length 1010000")
COOKBOOK = [  # every launch line of the page
    f"--model {MODEL}-Thinking --reasoning-parser qwen3 --tp 8 --host 0.0.0.0 --port 8000",
    f"--model {MODEL}-Instruct --tp 8 --host 0.0.0.0 --port 8000",
    f"--model {MODEL}-Instruct --tool-call-parser qwen_coder --tp 8 --host 0.0.0.0 --port 8000",
    f"--model {MODEL}-Thinking --reasoning-parser qwen3 --tool-call-parser qwen_coder --tp 8 --host 0.0.0.0 "
    "--port 8000",
    f"--model {MODEL}-Instruct --tp 8 --host 0.0.0.0 --port 8000 {YARN}",
    f"--model {MODEL}-Thinking --reasoning-parser qwen3 --tp 8 --host 0.0.0.0 --port 8000 {YARN}",
]


def read(line):
    """What a launch line means. Raises UsageError where qcn-run would, before anything is compiled."""
    arguments = parser().parse_args(shlex.split(line))
    check_sglang_flags(arguments)
    checkpoint = find_checkpoint(arguments)
    prefix_options(arguments)
    speculation_options(arguments)
    return arguments, checkpoint, server_config(arguments)


def test_the_table_holds_every_line_of_the_cookbook():
    page = Path(__file__).with_name("cookbook.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"sglang\.launch_server(.*?)\n(?:\n|```)", page, re.DOTALL)
    assert {tuple(shlex.split(line)) for line in lines} == {tuple(shlex.split(line)) for line in COOKBOOK}


@pytest.mark.parametrize("line", COOKBOOK)
def test_cookbook_lines(line):
    arguments, checkpoint, config = read(line)
    assert config.model_names[0] == checkpoint.model == shlex.split(line)[1]
    assert checkpoint.flags[-2:] == ("--tp", "8")
    assert (arguments.host, arguments.port) == ("0.0.0.0", 8000)
    assert config.tool_call_parser == ("qwen_coder" if "qwen_coder" in line else "auto")
    assert config.reasoning_parser == ("qwen3" if "qwen3 " in line else "auto")


@pytest.mark.parametrize(("flags", "refusal"), [
    ("--tool-call-parser qwen3_coder", None), ("--tool-call-parser qwen", None), ("--attention-backend triton", None),
    ("--mamba-scheduler-strategy extra_buffer --page-size 64", None), ("--trust-remote-code --enable-metrics", None),
    ("--enable-cache-report --tensor-parallel-size 1", None), ("--mamba-ssm-dtype float32", None),
    ("--max-mamba-cache-size 64 --mem-fraction-static 0.8", None), ("--mamba-full-memory-ratio 0.5", None),
    ("--chunked-prefill-size 8192 --context-length 65536 --max-running-requests 32", None),
    ("--quantization fp8", None),
    ("--speculative-algorithm NGRAM --speculative-num-draft-tokens 4", None), ("--disable-radix-cache", None),
    ("--mamba-ssm-dtype bfloat16", None), ("--mamba-ssm-dtype float16", "invalid choice"), ("--pp 2", None),
    ("--dp 2", "one server for each GPU"), ("--json-model-override-args x", "no JSON"),
    ("--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
     "--speculative-num-draft-tokens 4", None), ("--speculative-eagle-topk 4", "tree of drafts"),
    ("--tool-call-parser nonsense", "unknown tool call parser"), ("--load-format dummy", "unrecognized arguments"),
])
def test_flags_of_the_command_generators(flags, refusal, capsys):
    line = f"--model Qwen/Qwen3-Coder-Next-FP8 {flags} --port 1"
    if refusal is None:
        read(line)
        return
    with pytest.raises(UsageError, match=refusal):
        read(line)


def test_what_is_a_checkpoint(toy_build, tmp_path):
    assert read(f"{toy_build} --port 1")[1] is None
    assert read(f"--model-path {toy_build} --port 1")[0].build == toy_build
    assert read(f"{toy_build} --model {tmp_path} --port 1")[0].model == tmp_path
    _, found, config = read(f"{ASSETS} --port 1 --target cpu --quant int8")
    assert found.flags == ("--target", "cpu", "--quant", "int8")
    assert config.model_names == (str(ASSETS), "tiny-coder")
    assert read(f"{ASSETS} --port 1 --served-model-name x")[2].model_names == ("x",)
    assert read("/no/where/at/all --port 1")[1] is None  # no Hugging Face name: loading says what is wrong
    for wrong in ("--port 1", f"{toy_build} --port 1 --target cpu", f"{toy_build} --port 1 --quantization fp8"):
        with pytest.raises(UsageError):
            read(wrong)


def test_the_cache_folder_follows_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    first = Checkpoint(str(model), ("--target", "cpu"))
    before = first.build
    assert before == first.build and before.parent == tmp_path / "cache" / "qcn-compile"
    assert before != Checkpoint(str(model), ("--target", "h100")).build
    os.utime(model / "config.json", (1, 1))
    assert before != first.build


def test_targets_of_gpus(tmp_path):
    assert _this_gpu(tmp_path) is None
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    assert _this_gpu(tmp_path) == "h200"


def test_without_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs torch, transformers, tvm: pip install 'qcn-compile\[compile\]'"):
        Checkpoint(str(ASSETS), ("--target", "cpu")).compile()


def test_a_checkpoint_is_compiled_once_and_served(tmp_path):
    pytest.importorskip("tvm")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "qcn_compile.runtime.cli"]
    flags = ["--prompt", "def f(", "--max-tokens", "3", "--target", "cpu", "--threads", "1"]
    first = subprocess.run([*command, str(ASSETS), *flags], env=environment, capture_output=True, text=True)
    assert first.returncode == 0 and "compiling it into" in first.stderr and "built " in first.stderr
    with running("--model", str(ASSETS), "--tp", "1", "--target", "cpu", "--tool-call-parser", "qwen_coder",
                 env=environment) as (_, url):
        names = [model["id"] for model in httpx.get(url + "/v1/models").json()["data"]]
        assert names == [str(ASSETS), "tiny-coder"]
    gone = subprocess.run([*command, "Qwen/None-Such", *flags], env=environment, capture_output=True, text=True)
    assert gone.returncode == 3 and gone.stdout == "" and "was not found" in gone.stderr
    assert gone.stderr.splitlines()[-1].startswith("qcn-run: the compiler could not build Qwen/None-Such")
