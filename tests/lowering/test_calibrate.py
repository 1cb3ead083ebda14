"""GPTQ: int4 codes by inputs lose less than codes rounded to nearest. A whole build: tests/e2e/test_parity.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qcn_compile as qcn
from qcn_compile.errors import UsageError
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.encoding import Encoding, encode
from qcn_compile.ir.gptq import hessian, quantize
from qcn_compile.lowering.calibrate import read_text
from tests.bench.format_errors import int4

HELDOUT = Path(__file__).parent.parent / "data/heldout.jsonl"


def test_outputs_are_closer_than_rounded() -> None:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(72, 72, generator=generator)
    x, w = torch.randn(500, 72, generator=generator) @ mix, torch.randn(24, 72, generator=generator)
    made = quantize(w, hessian(x))
    rounded = torch.from_numpy(encode(w.numpy(), Encoding("int4")))
    off = [float(((w - q) @ x.T).norm() / (w @ x.T).norm()) for q in (made.wide(), rounded)]
    assert off[0] < 0.75 * off[1]
    assert made.codes.shape == (24, 96) and made.scales.shape == (24, 3) and made.scales.dtype == torch.float16
    assert int(made.codes.min()) >= -8 and int(made.codes.max()) <= 7


def test_groups_of_128() -> None:
    """One scale for each 128 columns, the last group cut; closer than rounding in the same groups, 32 closer still."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(600, 200, generator=generator) @ torch.randn(200, 200, generator=generator)
    w = torch.randn(24, 200, generator=generator)
    made = quantize(w, hessian(x), 128)
    assert made.codes.shape == (24, 224) and made.scales.shape == (24, 7)
    assert torch.equal(made.scales[:, :4], made.scales[:, :1].expand(-1, 4))
    assert torch.equal(made.scales[:, 4:], made.scales[:, 4:5].expand(-1, 3))
    off = [float(((w - q) @ x.T).norm() / (w @ x.T).norm())
           for q in (quantize(w, hessian(x)).wide(), made.wide(), int4(w, 128))]
    assert off[0] < off[1] < 0.75 * off[2]


def test_no_input_and_dead_columns() -> None:
    w = torch.randn(4, 64)
    h = torch.zeros(64, 64, dtype=torch.float64)
    assert float((quantize(w, h).wide() - w).norm() / w.norm()) < 0.12
    x = torch.randn(3, 64)
    x[:, ::2] = 0
    assert quantize(w, hessian(x)).wide().isfinite().all()
    assert not quantize(torch.zeros(4, 64), hessian(x)).wide().any()


def test_texts_that_cannot_calibrate(tmp_path: Path) -> None:
    tokenizer = locate(None, "cpu").path
    assert tokenizer is not None
    (tmp_path / "short.txt").write_text("def fib(n):")
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}')
    for name, words in (("none.txt", "No such file"), ("short.txt", "give at least 512"), ("other.jsonl", "'text'")):
        with pytest.raises(UsageError, match=words):
            read_text(tmp_path / name, tokenizer)
    with pytest.raises(UsageError, match="nothing to calibrate; add --quant int4"):
        qcn.compile(None, "cpu", tmp_path / "build", quant="int8", calibrate=HELDOUT)
    assert not (tmp_path / "build").exists()
