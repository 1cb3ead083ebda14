"""qcn-inspect: every view as text and JSON, the page in a browser, and graph questions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qcn_compile as qcn
from qcn_compile.inspect import cli
from qcn_compile.inspect.build import Build
from qcn_compile.inspect.page import page_data
from qcn_compile.inspect.profile import Measured
from qcn_compile.inspect.show import plot
from qcn_compile.ir.text import parse_graph
from qcn_compile.ir.view import critical_path, digraph, layers
from qcn_compile.targets.spec import hardware
from tests.sharing import one_trace

COMMANDS = ["summary", "ops", "kernels", "memory", "decisions", "passes", "verify"]
TEXT = """graph @main(%x: f32[T,4], %batch: batch) {
  state @kv.a : kv f32[2,2]
  %1 : f32[T,4] = silu(%x)
  %2 : f32[T,4] = exp(%1)
  %3 : f32[T,4] = neg(%x)
  %4 : f32[T,4] = add(%2, %3)
  return %4
}
"""


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_view(build: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(command, str(build), capsys=capsys)
    data = json.loads(run(command, str(build), "--json", capsys=capsys))
    assert text.strip()
    assert data
    wanted = {"summary": "tiny-coder for cpu", "ops": "moe_add", "kernels": "kernels/source/", "memory": "lower bound",
              "decisions": "router: an error changes which experts run", "passes": "gated_rms_norm x6",
              "verify": "every hash matches"}
    assert wanted[command] in text


def test_bare_build_is_the_summary(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(build), capsys=capsys) == run("summary", str(build), capsys=capsys)


def test_instructions_are_counted(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    rows = json.loads(run("kernels", str(build), "--json", capsys=capsys))
    assert all(row["code"]["instructions"] > 20 and row["code"]["bytes"] > 100 for row in rows)
    assert any(row["code"]["fma"] > 0 for row in rows)
    assert all((build / row["source"]).is_file() for row in rows)


def test_kernels_have_source_and_predicted_and_measured_time(build: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(run("profile", str(build), "--json", capsys=capsys))
    data = json.loads(profile.read_text())
    assert data["limits"]["read"] > 0.1 and data["limits"]["flops"] > 0.1
    rows = json.loads(run("kernels", str(build), "--profile", str(profile), "--json", capsys=capsys))
    decode = {row["kernel"]: row for row in rows if "main-decode-1" in row["launches"]}
    assert all(row["measured"]["main-decode-1"] > 0 for row in decode.values())
    up = next(row for name, row in decode.items() if name.startswith("moe_up"))
    count, moved = up["launches"]["main-decode-1"], up["bytes"]["main-decode-1"]
    least = max(moved / data["limits"]["read"], up["flops"]["main-decode-1"] / data["limits"]["flops"]) / 1e9
    assert up["predicted"]["main-decode-1"] == pytest.approx(least / count)
    assert "us a launch: " in run("kernels", str(build), "--profile", str(profile), capsys=capsys)
    source = run("kernels", str(build), "--source", "moe_sort", capsys=capsys)
    assert "T.prim_func" in source
    assert cli.main(["kernels", str(build), "--source", "linear"]) == 2
    assert "several kernels begin so" in capsys.readouterr().err


def test_without_a_profile_the_planners_limits_give_roof_and_times(build: Path) -> None:
    made = page_data(Build.open(build), Measured())
    chip = hardware("host")
    assert (made["roof"]["bandwidth"], made["roof"]["flops"]) == (chip.bandwidth.value, chip.flops.value)
    assert "yours differs" in made["roof"]["source"]
    assert all(row["predicted"] and not row["measured"] for row in made["kernels"] if any(row["bytes"].values()))


def test_bytes_count_at_the_kernel_that_reads_them(build: Path) -> None:
    """The parts of an op add up to the op; up and down of the experts hold their weights 2 to 1."""
    for plan in Build.open(build).plans:
        up, down = (sum(x.bytes for x in plan.launches if x.kernel.startswith(k)) for k in ("moe_up", "moe_down"))
        work = [sum(x.flops for x in plan.launches if x.kernel.startswith(k)) for k in ("moe_up", "moe_down")]
        if up or down:
            assert up / down == pytest.approx(2, rel=0.02) and work[0] / work[1] == pytest.approx(2, rel=0.02)
        assert all(x.bytes >= 0 and x.flops >= 0 for x in plan.launches)


def test_sass_is_counted(tmp_path: Path) -> None:
    from qcn_compile.inspect.sass import counts, disassembler

    tool = tmp_path / "nvdisasm"
    lines = ("  /*0000*/ @P0 LDG.E R1, [R2] ;", "  /*0010*/ HMMA.16816.F32 R4 ;", " label:")
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    tool.chmod(0o755)
    assert counts(str(tool), tmp_path) == {"instructions": 2, "tensor": 1, "fma": 0, "memory": 1, "branches": 0}
    assert disassembler() is None or Path(disassembler()).is_file()


def test_memory_matches_the_plans(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run("memory", str(build), "--json", capsys=capsys))
    for plan in Build.open(build).plans:
        row = data[f"{plan.entry}-{plan.name}"]
        assert row["workspace_bytes"] == plan.workspace_bytes
        assert max(row["alive"]) == row["lower_bound_bytes"] <= plan.workspace_bytes
        assert all(b["offset"] + b["bytes"] <= plan.workspace_bytes for b in row["layout"])


def test_diff(build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no difference" in run("diff", str(build), str(build), capsys=capsys)
    other = tmp_path / "other"
    with one_trace():
        qcn.compile(None, "null", other, quant="none")
    text = run("diff", str(build), str(other), capsys=capsys)
    assert "format: int4 -> none" in text
    assert "only in the second: linear_actf32" in text


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert "12 channels of DDR5-4800" in run("targets", capsys=capsys)
    assert {"x86-64-v3", "znver4"} <= {row["name"] for row in json.loads(run("targets", "--json", capsys=capsys))}


def test_errors(tmp_path: Path, build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tmp_path)]) == 4
    assert "is no build" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(build, copy)
    (copy / "report.json").write_text("{}")
    assert cli.main(["verify", str(copy)]) == 4
    (tmp_path / "bad.json").write_text("{}")
    assert cli.main([str(build), "--html", str(tmp_path / "x.html"), "--profile", str(tmp_path / "bad.json")]) == 2
    assert "not a profile" in capsys.readouterr().err


def test_needs_no_torch(build: Path, tmp_path: Path) -> None:
    code = ("import sys; from qcn_compile.inspect.cli import main\n"
            f"for c in {COMMANDS!r}: main([c, {str(build)!r}])\n"
            f"main([{str(build)!r}, '--html', {str(tmp_path / 'r.html')!r}])\n"
            "assert not {'torch', 'tvm', 'transformers', 'triton'} & set(sys.modules), 'heavy'")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_page_in_a_browser(build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, page = tmp_path / "profile.json", tmp_path / "report.html"
    profile.write_text(run("profile", str(build), "--json", capsys=capsys))
    run(str(build), "--html", str(page), "--profile", str(profile), capsys=capsys)
    text = page.read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
                           f"--user-data-dir={tmp_path / 'user'}", "--dump-dom", page.as_uri()],
                          capture_output=True, text=True, check=True, timeout=60)
    dom = done.stdout.rpartition("</script>")[0].partition("<script>")[0]
    assert 'data-ready="yes"' in done.stdout
    assert 60 < dom.count('class="node"') < 120  # ten layers' ops; slices and reshapes are hidden at first
    assert dom.count("<circle") > 5
    assert "layer 7" in dom
    assert "output" in dom


def test_graph_questions() -> None:
    view = digraph(parse_graph(TEXT))
    assert layers(view) == {0: 0, 1: 1, 2: 0, 3: 2}
    assert critical_path(view, dict.fromkeys(range(4), 1.0)) == [0, 1, 3]
    assert critical_path(view, {2: 9.0, 3: 1.0}) == [2, 3]


def test_plot() -> None:
    lines = list(plot([1, 2, 4, 2], height=2))
    assert lines[0].endswith("|  █ ")
    assert lines[1].endswith("|▄███")
