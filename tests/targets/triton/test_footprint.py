"""The full-size FP8 model on one 80 GB H100: two sequences of 32 thousand tokens beside the weights, to the byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qcn_compile import compile
from qcn_compile.inspect import views
from qcn_compile.inspect.build import Build

FREE = 84.29e9  # bytes that a process without torch could allocate on an H100 of 85.02 GB (measured 2026-11-23)


@pytest.mark.slow
def test_fp8_fits_one_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcn_compile.targets.triton.emit.emit", lambda kernels, folder, *rest: _nothing(folder))
    compile(None, "h100", tmp_path / "full", quant="fp8", weights="dummy")
    found = views.device(Build.open(tmp_path / "full"), 32768, 2)
    assert found["bytes"]["KV pages"] >= 2 * 32768 * 24576  # 12 layers, 2 heads of 256, keys and values in bf16
    assert found["bytes"]["states"] >= 2 * 36 * 32 * 128 * 128 * 4
    assert 79e9 < found["bytes"]["weights"] < 80.5e9
    assert sum(found["bytes"].values()) + found["reserve"] < FREE


def _nothing(folder: Path) -> list[str]:
    """Kernels take no part in the plan."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text("{}")
    return ["kernels.json"]


def test_a_script_that_builds_when_imported_is_told(tmp_path: Path) -> None:
    """Worker processes import it again; the message says what to do instead of blaming the compiler."""
    script = tmp_path / "mine.py"
    script.write_text("from pathlib import Path\nfrom qcn_compile.targets.base import Kernel\n"
                      "from qcn_compile.targets.spec import hardware\n"
                      "from qcn_compile.targets.triton.emit import emit\n"
                      "emit([Kernel.make('gather_rows', D=16, BD=16, SX=16)], Path('out'), hardware('h100'))\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode and "mine.py builds while it is imported" in done.stderr
