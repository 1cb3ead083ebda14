"""Hardware files: what is known, that every figure has a source, and what a user's own file may look like."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcn_compile.errors import UsageError
from qcn_compile.inspect import show, views
from qcn_compile.targets.registry import buildable, load_target
from qcn_compile.targets.spec import FIGURES, catalogue, chip_of, hardware

GPUS = ("a100-40", "a100-80", "l40s", "rtx4090", "rtx5090", "rtx-pro-6000", "h100-80", "h200", "b200", "b300", "gb10",
        "mi300x", "mi325x", "mi355x")
CARD = """
[my-card]
kind = "gpu"
dtypes = ["bf16"]
bandwidth = { value = 1000, source = "its data sheet" }
"""


@pytest.mark.parametrize("name", GPUS)
def test_what_a_plan_needs_is_known_of_every_gpu(name: str) -> None:
    chip = hardware(name)
    assert (chip.kind, chip.name) == ("gpu", name)
    for figure in (chip.cores, chip.bandwidth, chip.memory, chip.link, chip.latency, chip.flops):
        assert figure is not None
    assert chip.arch and chip.shared and chip.vendor and "bf16" in chip.dtypes
    assert chip.rate("fp8") >= chip.rate("bf16")


def test_every_figure_of_every_chip_has_a_source() -> None:
    seen = 0
    for chip in catalogue().values():
        for figure in (*(getattr(chip, name) for name in FIGURES), *chip.rates.values()):
            if figure is not None:
                seen += 1
                assert figure.value > 0 and len(figure.source) > 10, chip.name
    assert seen > 150


def test_names_the_issue_asks_for() -> None:
    assert hardware("a100") is hardware("a100-80") and hardware("h100") is hardware("h100-80")
    assert {"host", "x86-64-v3", "znver4", "neoverse-v2", "graviton3"} <= set(catalogue())
    assert chip_of("cpu").name == "host" and chip_of("cpu", "znver4").name == "znver4"


def test_what_has_no_kernels_says_so() -> None:
    with pytest.raises(UsageError, match=r"--target apple-m4-max: no kernels are written for it yet, .*--plan-only"):
        load_target("apple-m4-max")
    with pytest.raises(UsageError, match=r"no kernels are written for arm processors yet"):
        load_target("cpu", "apple-m4-max")
    assert {"h200", "mi300x"} <= set(buildable()) and "apple-m4-max" not in buildable()
    with pytest.raises(UsageError, match=r"--target h300: unknown; choose .* hardware file \(.toml\) or one of .*h200"):
        load_target("h300")


def test_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "card.toml"
    file.write_text(CARD)
    chip = chip_of(str(file))
    assert (chip.name, chip.bandwidth.value, chip.bandwidth.source) == ("my-card", 1000, "its data sheet")  # type: ignore
    monkeypatch.setenv("QCN_TARGETS", str(tmp_path))
    catalogue.cache_clear()
    assert hardware("my-card") == chip
    monkeypatch.setenv("QCN_TARGETS", str(file))
    catalogue.cache_clear()
    with pytest.raises(UsageError, match="is no folder"):
        catalogue()
    monkeypatch.delenv("QCN_TARGETS")
    catalogue.cache_clear()


@pytest.mark.parametrize(("old", "new", "message"), [
    ('kind = "gpu"', 'kind = "tpu"', r"card.toml \[my-card\]: a chip is a table with at least kind"),
    ("bandwidth", "bandwith", r"unknown key bandwith; known: kind, vendor"),
    (', source = "its data sheet"', "", r"bandwidth: write \{ value = 1.0, source"),
    ("1000", "-1", r"bandwidth: -1 from 'its data sheet': a figure is positive"),
    ("[my-card]", "[my-card", "is no TOML"),
    ("[my-card]", "[a]\nkind = 'gpu'\ndtypes = ['bf16']\n[b]", "holds a, b: a --target file holds one"),
])
def test_a_bad_file_is_named_with_its_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "card.toml"
    file.write_text(CARD.replace(old, new))
    with pytest.raises(UsageError, match=message):
        hardware(str(file))


def test_inspect_shows_them() -> None:
    rows = {row["name"]: row for row in views.targets()}
    assert rows["h200"]["builds"] and rows["neoverse-v2"]["builds"] and not rows["apple-m4-max"]["builds"]
    text = "\n".join(show.targets(list(rows.values())))
    line = next(line for line in text.splitlines() if line.startswith("apple-m4-max"))
    assert line.endswith("; planned for, not built for yet")
    assert "  link              450 GB/s     NVIDIA H200 datasheet: NVLink 4" in text
