"""Build everything that the tests on a card need, on a machine without one: see README.md."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "targets" / "triton"), str(HERE), str(HERE.parent / "e2e")]
OUT = Path(".gpu")
PROMPTS = ["def fib(n):", "import os\n", "class Stack:\n    def __init__(self):", "for i in range(10):\n    print(",
           "# sort a list\n", "def add(a, b):\n    return", "while True:", "x = [1, 2, 3]\ny =", "try:\n    open(",
           "Write a function that adds two numbers.", "if __name__ ==", "from typing import"]
TOKENS = 64


def cases(target: str) -> None:
    """Kernels of every case of tests/targets/triton."""
    from cases import every

    from qcn_compile.targets.triton.target import GpuTarget

    card = GpuTarget(target)
    kernels = {call.kernel: None for case, _ in every() for _, call in case.lower(card)}
    card.emit(list(kernels), OUT / "kernels")
    (OUT / "kernels" / "target").write_text(target)


def reference(model: Path) -> None:
    """The CPU's logits and greedy tokens on the same weights (stored bf16, computed in fp32)."""
    from qcn_compile import compile, load

    compile(model, "cpu", OUT / "cpu", dtype="bf16", force=True)
    with load(OUT / "cpu") as cpu:
        rows = []
        for prompt in PROMPTS:
            ids = cpu.encode(prompt)
            stream = cpu.generate(ids, temperature=0.0, max_tokens=TOKENS)
            new = [token for output in stream for token in output.token_ids]
            rows.append((ids, new, cpu.logits([*ids, *new])))
    arrays = {f"logits{i}": logits.astype(np.float16) for i, (_, _, logits) in enumerate(rows)}
    np.savez_compressed(OUT / "reference.npz", **arrays)  # type: ignore[arg-type]
    (OUT / "reference.json").write_text(json.dumps([{"prompt": ids, "new": new} for ids, new, _ in rows]))


def long(model: Path) -> None:
    """Twenty prompts and 256 greedy tokens each of the CPU's fp32 build, which are transformers' own."""
    import torch
    from test_parity import PROMPTS as LONG
    from transformers import AutoModelForCausalLM

    from qcn_compile import compile, load

    compile(model, "cpu", OUT / "cpu-fp32", dtype="fp32", quant="none", force=True)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    rows = []
    with load(OUT / "cpu-fp32") as cpu, torch.no_grad():
        for prompt in LONG:
            ids = cpu.encode(prompt)
            stream = cpu.generate(ids, temperature=0.0, max_tokens=256, ignore_eos=True)
            new = [token for output in stream for token in output.token_ids]
            logits = original(torch.tensor([ids + new]), use_cache=False).logits[0, len(ids) - 1:-1]
            assert logits.argmax(-1).tolist() == new, prompt
            rows.append({"prompt": ids, "new": new})
    (OUT / "long.json").write_text(json.dumps(rows))


def several(target: str, model: Path) -> None:
    """Builds for two cards, and their twins for one: the bundled model, and the full one with random weights."""
    from qcn_compile import compile

    layouts: dict[str, dict[str, int]] = {"": {}, "-tp2": {"tp": 2}, "-ep2": {"tp": 2, "ep": 2}, "-pp2": {"pp": 2}}
    for name, layout in layouts.items():
        compile(model, target, OUT / "several" / f"tiny{name}", quant="none", weights="late", force=True, **layout)
        compile(None, target, OUT / "several" / f"full{name}", quant="fp8", weights="dummy", force=True, **layout)


def _unfused(target: str) -> None:
    """The full build again, with norms in launches of their own: what fusing them is worth."""
    from unittest import mock

    from qcn_compile import compile
    from qcn_compile.targets.triton.target import GpuTarget

    with mock.patch.object(GpuTarget, "specialise", lambda self, ops, outputs, bucket: list(ops)):
        compile(None, target, OUT / "full-plain", weights="dummy", quant="fp8", force=True)


def main() -> None:
    """Everything, or the parts that are named."""
    from qcn_compile import compile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["reference", "long", "tiny", "full", "cases"])
    parser.add_argument("--target", default="h200")
    parser.add_argument("--model", type=Path, default=Path("qcn_compile/assets/tiny-coder"))
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    if "reference" in args.parts:
        reference(args.model)
    if "long" in args.parts:
        long(args.model)
    if "tiny" in args.parts:
        compile(args.model, args.target, OUT / "tiny-mtp", quant="none", weights="late", mtp=True, force=True)
        compile(args.model, args.target, OUT / "tiny-kv8", quant="none", weights="late", kv="fp8", force=True)
        compile(args.model, args.target, OUT / "tiny-states", quant="none", weights="late", states="bfloat16",
                force=True)
        for quant in ("none", "fp8", "int4-experts"):
            compile(args.model, args.target, OUT / f"tiny-{quant}", quant=quant, weights="late", force=True)
    if "full" in args.parts:
        compile(None, args.target, OUT / "full", weights="dummy", quant="fp8", force=True)
        compile(None, args.target, OUT / "full-mtp", weights="dummy", quant="fp8", mtp=True, force=True)
        compile(None, args.target, OUT / "full-int4", weights="dummy", quant="int4-experts", force=True)
        _unfused(args.target)
    if "several" in args.parts:
        several(args.target, args.model)
    if "cases" in args.parts:
        cases(args.target)


if __name__ == "__main__":
    main()
