"""Predicted against measured times: python -m tests.bench.cost_model

The measured ones are those of docs/performance.md. GPU: the steps of points.csv that have run, and kernels of one H100
80GB, FP8, 2026-11-25, commits in targets/efficiency/gpu.toml. CPU: 2 virtual cores of an AMD EPYC, with AVX-512 (commit
5a30672, 2026-11-23) and without (`qcn-bench cpu --vs llama.cpp`, 2026-11-25). The efficiencies were fitted to most of
them, so the errors tell how well one set of numbers describes all points, not how well it would foresee another card.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qcn_compile.planning.formats import schemes
from qcn_compile.planning.predict import Predictor
from qcn_compile.planning.shape import ModelShape, shape_of
from qcn_compile.planning.work import Step
from qcn_compile.targets.cost import cost
from qcn_compile.targets.layout import Layout
from qcn_compile.targets.spec import Figure, Hardware, hardware
from tests.bench.predictions import CODER, rows


@dataclass(frozen=True)
class Point:
    """A measured time and the one predicted for it, in ms."""

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def predictor(kind: str, quant: str, shape: ModelShape, chip: Hardware) -> Predictor:
    """Of one chip."""
    return Predictor(shape, next(s for s in schemes(kind) if s.name == quant), Layout(), chip)


def points() -> Iterator[Point]:
    """Whole steps, then single kernels."""
    config = json.loads(CODER.read_text())
    gpu = predictor("gpu", "fp8", shape_of(config), hardware("h100"))
    yield from (Point(row.name, row.measured, row.predicted) for row in rows() if row.measured is not None)
    yield from _kernels(gpu)
    yield from _cpus(shape_of({**config, "num_hidden_layers": 12, "num_experts": 64, "num_experts_per_tok": 8,
                               "vocab_size": 32768}))  # the model of tests/bench/cpu_vs_llama.py


def _cpus(model: ModelShape) -> Iterator[Point]:
    """Tokens a second of decode and of a prompt of 512, on one core and two, as ms."""
    host = hardware("host")
    with_vnni = [("int4", 1, 67.1, 339), ("int4", 2, 95.7, 642)]
    without = [("int4", 1, 51.4, 77), ("int4", 2, 78.1, 122), ("int8", 1, 28.1, 56), ("int8", 2, 43.2, 96)]
    for name, table, reads, rate, context in (("AVX-512", with_vnni, (36.7, 71.0), 473.5, 560),
                                             ("AVX2", without, (32.9, 54.6), 78.0, 100)):
        for quant, cores, decode, prefill in table:
            chip = replace(host, bandwidth=Figure(reads[cores - 1], "a read in the same hour"),
                           flops=Figure(118.5 * cores, "2 FMA x 8 lanes x 2 x 3.7 GHz a core"),
                           rates={"int8": Figure(rate * cores, "AVX-512: 4 x f32; AVX2: fitted to the prompts")})
            cpu = predictor("cpu", quant, model, chip)
            where = f"CPU {name} {quant}, {cores} cores"
            yield Point(f"{where}, decode", 1e3 / decode, cpu.step(Step.decode(1, context)).seconds * 1e3)
            yield Point(f"{where}, prompt of 512", 512e3 / prefill, cpu.first_token(512) * 1e3)


def _kernels(gpu: Predictor) -> Iterator[Point]:
    """Microseconds of single ops of a step of one token, as ms."""
    measured = {("in_proj", 36): 9.6, ("in_proj", 12): 8.4, ("out_proj", 36): 4.2, ("lm_head", 1): 105,
                ("router", 48): 2.2, ("route", 48): 1.7, ("delta", 36): 3.6, ("attention", 12): 7.4}
    fixed = cost([], gpu.chip, 1).seconds
    for item in gpu._work(Step.decode(1, 1024)):
        if (item.role, item.count) in measured:
            seconds = cost([replace(item, count=1)], gpu.chip, 1).seconds - fixed
            yield Point(f"H100 one {item.role} of {item.count}", measured[item.role, item.count] / 1e3,
                        seconds * 1e3)


def main() -> None:
    """A table, worst error last."""
    print(f"{'':70} {'measured ms':>12} {'predicted':>10} {'error':>7}")
    for point in sorted(points(), key=lambda p: abs(p.error)):
        print(f"{point.name:70} {point.measured:12.4f} {point.predicted:10.4f} {point.error:+7.1%}")


if __name__ == "__main__":
    main()
