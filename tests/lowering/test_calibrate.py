"""GPTQ: int4 codes by inputs lose less than codes rounded to nearest. A whole build: tests/e2e/test_parity.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcn_compile as qcn
from qcn_compile.compile import Options, optimised
from qcn_compile.errors import UsageError
from qcn_compile.frontend import trace_model
from qcn_compile.frontend.checkpoint import locate
from qcn_compile.ir.encoding import Coded, Encoding, encode
from qcn_compile.ir.gptq import hessian, quantize
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.int4 import dequantize
from qcn_compile.ir.types import DType
from qcn_compile.lowering.calibrate import calibrate, read_text, walk
from qcn_compile.lowering.schedule import encoding_of
from qcn_compile.targets.triton.packing import pack
from qcn_compile.targets.triton.packing import sizes as packed_sizes

BUNDLED = str(Path(qcn.__file__).parent / "assets/tiny-coder")
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
    nearest = torch.from_numpy(encode(w.numpy(), Encoding("int4-g128", 128)))
    off = [float(((w - q) @ x.T).norm() / (w @ x.T).norm())
           for q in (quantize(w, hessian(x)).wide(), made.wide(), nearest)]
    assert off[0] < off[1] < 0.75 * off[2]


def test_no_input_and_dead_columns() -> None:
    w = torch.randn(4, 64)
    h = torch.zeros(64, 64, dtype=torch.float64)
    assert float((quantize(w, h).wide() - w).norm() / w.norm()) < 0.12
    x = torch.randn(3, 64)
    x[:, ::2] = 0
    assert quantize(w, hessian(x)).wide().isfinite().all()
    assert not quantize(torch.zeros(4, 64), hessian(x)).wide().any()


@pytest.mark.parametrize("columns", [256, 96, 200])
def test_codes_of_128_are_kept(columns: int) -> None:
    """What GPTQ chose is what the kernels of a GPU's experts read; groups of 32 with other scales are rounded anew."""
    w = torch.randn(8, columns, generator=torch.Generator().manual_seed(5))
    h, encoding = torch.eye(columns, dtype=torch.float64), Encoding("int4-g128", 128)
    made = quantize(w, h, 128)
    parts = pack("matrix", encoding, made)
    sizes = {part: size for part, (_, size) in packed_sizes("matrix", encoding, (8, columns)).items()}
    assert {part: x.nbytes for part, x in parts.items()} == sizes
    back = dequantize(parts["w"].reshape(8, -1), parts["s"].reshape(8, -1), columns)
    assert np.array_equal(back, made.wide().numpy()) and np.array_equal(back, encode(made, encoding))
    finer = quantize(w, h)
    assert np.array_equal(encode(finer, encoding), encode(finer.wide(), encoding))


@pytest.mark.slow
def test_experts_of_a_gpu_build() -> None:
    """--quant int4-experts --calibrate: on text that did not calibrate, logits are closer to those of bf16 weights."""
    graph = optimised(BUNDLED, "h100", Options(quant="int4-experts"))
    source = trace_model(locate(BUNDLED, "gpu"), DType.bf16).weights
    located = locate(None, "cpu").path
    assert source is not None and located is not None
    pieces = read_text(HELDOUT, located)
    made = calibrate([graph], source, pieces[2:])
    assert len(made.codes) == 16 and made.error < 0.8 * made.rounded

    def logits(format_: str, codes: Mapping[Value, Coded]) -> torch.Tensor:
        def store(op: Op, value: Value, w: torch.Tensor, _: list[Any]) -> torch.Tensor:
            encoding = encoding_of(value)
            assert encoding is not None and value.op is not None
            coded = codes.get(value.op.inputs[0])
            return coded.wide() if coded else w if encoding.format != format_ else torch.from_numpy(
                encode(w.numpy(), encoding))
        return torch.cat([walk(graph, source, [piece], store)[0] for piece in pieces[:2]]).log_softmax(-1)

    exact = logits("", {})
    kl = {name: float((exact.exp() * (exact - logits(format_, codes))).sum(-1).mean())
          for name, format_, codes in (("rounded", "int4-g128", {}), ("chosen", "", made.codes))}
    assert 0 < kl["chosen"] < 0.8 * kl["rounded"]


def test_a_build_without_weights_takes_no_codes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--weights late writes nothing; leave one of them out"):
        qcn.compile(BUNDLED, "h100", tmp_path / "build", quant="int4-experts", calibrate=HELDOUT, weights="late")


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
