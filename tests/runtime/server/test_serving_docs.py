"""docs/serving.md names every flag of qcn-run and every metric of the server."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from qcn_compile.runtime.bench.cli import parser as bench_parser
from qcn_compile.runtime.cli import parser

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
FLAG = re.compile(r"--[a-z][a-z0-9-]+")


def test_every_flag_is_there_and_no_other():
    flags = {name for action in parser()._actions for name in action.option_strings if name.startswith("--")}
    named = set(FLAG.findall(PAGE))
    others = {name for line in PAGE.splitlines() if "qcn-compile --" in line for name in FLAG.findall(line)}
    bench = set(FLAG.findall(PAGE.partition("## Measuring")[2])) | {"--weights"}
    assert flags <= named
    assert named - flags <= others | bench


def test_the_examples_of_qcn_bench_parse():
    lines = re.findall(r"^qcn-bench (.*)$", PAGE, re.MULTILINE)
    assert len(lines) > 3
    for line in lines:
        assert bench_parser().parse_args(line.split()).command == "serve"


def test_every_metric_is_there(serve, post):
    server = serve("x")
    post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    text = httpx.get(server.url + "/metrics").text
    for name in re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE):
        if not name.endswith("_created"):
            assert name in PAGE, name
