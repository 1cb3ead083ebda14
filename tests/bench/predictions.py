"""Predicted beside measured times of steps on GPUs, a line for each row of points.csv: tests.bench.predictions [FILE]

Columns: target, quant, tp, ep, layers; step: decode or prompt; size: sequences, or tokens of a prompt; context: tokens
before each; measured: ms, empty when it has not run; source: date and commit. The efficiencies were fitted to the fp8
rows of one H100; the others show what they foresee.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import qcn_compile
from qcn_compile.planning.formats import scheme_of
from qcn_compile.planning.predict import Predictor
from qcn_compile.planning.shape import shape_of
from qcn_compile.planning.work import Step
from qcn_compile.targets.layout import layout_for
from qcn_compile.targets.spec import hardware

CODER = Path(qcn_compile.__file__).parent / "assets/qwen3-coder-next/config.json"
FILE = Path(__file__).with_name("points.csv")
WANTED = 0.25  # relative error


@dataclass(frozen=True)
class Row:
    """A step: what was asked, what is predicted and, if it ran, what was measured, in ms."""

    name: str
    predicted: float
    bound: str
    measured: float | None

    @property
    def error(self) -> float | None:
        return None if self.measured is None else self.predicted / self.measured - 1


def rows(file: Path = FILE) -> Iterator[Row]:
    """The rows of a file, in order. Raises KeyError for a missing column, ValueError for a cell that is no number."""
    whole = json.loads(CODER.read_text())
    with file.open(encoding="utf-8", newline="") as lines:
        for cells in csv.DictReader(line for line in lines if not line.startswith("#")):
            tp, ep, layers, size, context = (int(cells[key]) for key in ("tp", "ep", "layers", "size", "context"))
            config = {**whole, "num_hidden_layers": layers}
            chip, layout = hardware(cells["target"]), layout_for(whole, tp, ep)
            predict = Predictor(shape_of(config), scheme_of(cells["quant"], "gpu"), layout, chip)
            decode = {"decode": True, "prompt": False}[cells["step"]]
            parts = predict.step(Step.decode(size, context) if decode else Step(size, 1, 1, context))
            what = f"{size} sequences" if decode else f"prompt of {size}"
            name = f"{tp} x {chip.name} {cells['quant']}, {layout}, {layers} layers, {what} at {context}"
            yield Row(name, parts.seconds * 1e3, parts.bound, float(cells["measured"]) if cells["measured"] else None)


def main() -> None:
    """The table."""
    print(f"{'':66} {'measured ms':>12} {'predicted':>10} {'error':>7}  bound by")
    for row in rows(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE):
        measured = "" if row.measured is None else f"{row.measured:.3f}"
        error = "" if row.error is None else f"{row.error:+.0%}{' !' if abs(row.error) > WANTED else ''}"
        print(f"{row.name:66} {measured:>12} {row.predicted:10.3f} {error:>7}  {row.bound}")


if __name__ == "__main__":
    main()
