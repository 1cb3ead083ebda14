"""The verdicts for the cookbook's hardware as a golden table. Rewrite it: python -m tests.planning.test_golden"""

from __future__ import annotations

from pathlib import Path

from qcn_compile.planning import catalogue
from qcn_compile.planning.catalogue import COOKBOOK, ask_for
from qcn_compile.planning.verdict import decide_plan
from qcn_compile.targets.spec import hardware

GOLDEN = Path(__file__).with_name("cookbook.txt")
COUNTS = {"h100-80": {"none": (4,), "fp8": (2, 4)}}  # of GPUs; all others run on 2, and fp8 on 1 too
OTHERS = {"none": (2,), "fp8": (1, 2)}


def table() -> str:
    """One line a verdict: memory in GB a chip, contexts in tokens, predicted times in ms."""
    lines = [f"{'target':8} {'gpus':>4} {'quant':5} {'layout':18} {'fits':4} {'weights':>7} {'kv':>5} {'state':>5} "
             f"{'free':>6} {'longest':>8} {'of 8K':>6} {'ms/token':>8} {'limit':>7}  bound by"]
    for name in COOKBOOK:
        for quant, counts in COUNTS.get(name, OTHERS).items():
            lines += [line(name, gpus, quant) for gpus in counts]
    return "\n".join(lines) + "\n"


def line(name: str, gpus: int, quant: str) -> str:
    """The verdict of one choice."""
    data = decide_plan(ask_for(hardware(name), gpus, quant, None)).to_json()
    gb = {kind: size / 1e9 for kind, size in data["memory"].items()}
    return (f"{name:8} {gpus:4} {quant:5} {data['title'].partition(', ')[2]:18} {'yes' if data['fits'] else 'no':4} "
            f"{gb['weights']:7.2f} {gb['kv']:5.2f} {gb['state']:5.2f} {gb['free']:6.2f} {data['longest_context']:8} "
            f"{data['concurrency_8k']:6} {data['speed']['ms_per_token']:8.3f} {data['speed']['limit_ms']:7.3f}  "
            f"{data['speed']['bound']}")


def test_cookbook_verdicts() -> None:
    assert table() == GOLDEN.read_text(encoding="utf-8"), "python -m tests.planning.test_golden, and look at the diff"


def test_the_pages_data_is_current() -> None:
    assert catalogue.FILE.read_text(encoding="utf-8") == catalogue.text(), "python -m qcn_compile.planning.catalogue"


if __name__ == "__main__":
    GOLDEN.write_text(table(), encoding="utf-8")
