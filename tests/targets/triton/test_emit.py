"""Cubins: every family compiles for every architecture, nothing hot spills, limits hold, bytes repeat."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from cases import every
from harness_gpu import BF16, DECODE_1, DECODE_8, FP8, INT4, NVFP4, Case

from qcn_compile.errors import LoweringError, UsageError
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.types import DType, StateKind
from qcn_compile.targets.base import Bucket, Kernel
from qcn_compile.targets.spec import catalogue, hardware
from qcn_compile.targets.triton.emit import _crash, check_limits, emit, fitting
from qcn_compile.targets.triton.families import FAMILIES
from qcn_compile.targets.triton.target import GpuTarget

PREFILL = Bucket("prefill-512", 512, 256, 512)
# sine and cosine of large angles keep a table in local memory; the others fill all registers and keep a few numbers
LOCAL = ("rope_table", "delta_solve", "attention_prefill")
CARDS = ("a100", "h100", "b200")
SIZES = {(chip.arch, chip.shared): chip.name for chip in catalogue().values() if chip.kind == "gpu"}  # a card of each


def full_size(bucket: Bucket, card: str = "h100") -> list[Kernel]:
    """What Qwen3-Coder-Next's layers launch in a bucket, FP8."""
    case = Case("layer", bucket)
    x = case.input("x", "bf16[T,2048]")
    case.op("embedding", [case.input("ids", "i32[T]"), case.weight("e", (512, 2048), BF16)])
    case.op("rms_norm", [x, case.weight("n", (2048,))], eps=1e-6)
    case.op("linear", [x, case.weight("in", (12288, 2048), FP8)])
    case.op("linear", [x, case.weight("router", (513, 2048), BF16)])
    case.op("linear_add", [case.input("o", "bf16[T,4096]"), case.weight("out", (2048, 4096), FP8), x])
    ids, weights = case.op("moe_route", [case.input("l", "bf16[T,513]")], top_k=10, normalize=True, shared=True)
    case.op("moe_add", [x, ids, weights, case.weight("up", (513, 1024, 2048), FP8),
                        case.weight("down", (513, 2048, 512), FP8), x], activation="silu")
    conv = case.state("conv", StateKind.conv, DType.bf16, (8192, 3))
    delta = case.state("delta", StateKind.delta, DType.f32, (32, 128, 128))
    case.op("delta_net", [case.input("qkv", "bf16[T,8192]"), case.input("z", "bf16[T,4096]"),
                          case.input("b", "bf16[T,32]"), case.input("a", "bf16[T,32]"), case.weight("c", (8192, 4)),
                          case.weight("d", (32,)), case.weight("dt", (32,)), case.weight("dn", (128,)), case.batch],
            key_heads=16, value_heads=32, key_dim=128, value_dim=128, eps=1e-6, conv=conv, delta=delta)
    kv = case.state("kv", StateKind.kv, DType.bf16, (2, 256))
    q = case.op("rope_append", [case.input("q", "bf16[T,16,256]"), case.input("k", "bf16[T,2,256]"),
                                case.input("v", "bf16[T,2,256]"), case.weight("qn", (256,)), case.weight("kn", (256,)),
                                case.input("cos", "f32[T,32]"), case.input("sin", "f32[T,32]"), case.batch],
                eps=1e-6, state=kv)
    case.op("paged_attention", [q, case.input("g", "bf16[T,4096]"), case.batch], scale=0.0625, state=kv)
    if bucket is DECODE_1:
        norm = case.weight("n2", (2048,))
        case.op("norm_linear", [x, norm, case.weight("w", (9216, 2048), FP8)], eps=1e-6, keep=False)
        gates = case.weight("w2", (64, 2048), BF16)
        case.op("norm_linear_pair", [x, norm, case.weight("w1", (12288, 2048), FP8), gates], eps=1e-6)
    return list({call.kernel: None for _, call in case.lower(GpuTarget(card))})


def check(kernels: list[Kernel], card: str, folder: Path, spills: int = 0) -> None:
    """Compile, and look at what came out; `spills` bytes of the stack are let pass."""
    names = emit(kernels, folder, hardware(card), workers=2)
    index = json.loads((folder / names[0]).read_text())
    assert len(names) == len(index) + 1 and set(index) == {k.symbol for k in kernels}
    for kernel in kernels:
        row = index[kernel.symbol]
        assert (folder / row["file"]).is_file() and (folder / row["source"]).is_file()
        assert row["stack"] <= spills or kernel.family in LOCAL, f"{kernel.symbol} spills on {card}"
        assert row["registers"] <= 255 and row["shared"] <= hardware(card).shared
        assert row["pdl"] == (card != "a100") and row["pointers"] == len(FAMILIES[kernel.family].pointers(kernel)[0])


def test_decode_on_hopper_does_not_spill(tmp_path: Path) -> None:
    check(full_size(DECODE_1), "h100", tmp_path)


@pytest.mark.parametrize(("card", "encoding"), [("b200", NVFP4), ("h100", INT4)], ids=["nvfp4", "int4"])
def test_experts_of_four_bits_compile(card: str, encoding: Encoding, tmp_path: Path) -> None:
    kernels = {kernel: None for bucket in (DECODE_1, PREFILL) for kernel in full_size_experts(bucket, card, encoding)}
    assert {kernel.family for kernel in kernels} == {"four_up_one", "four_down_one", "four_up_tiles", "four_down_tiles"}
    check(list(kernels), card, tmp_path)


@pytest.mark.parametrize(("encoding", "each"), [(FP8, 64), (INT4, 256)], ids=["fp8", "int4"])
def test_experts_ask_for_all_weights_before_they_use_one(encoding: Encoding, each: int, tmp_path: Path) -> None:
    """ptxas else puts loads off to save registers. `each`: weights of a thread, in few instructions each. Twice in the
    code: for the shared expert, known before the wait, and for those that the router chose."""
    from triton import knobs

    card = GpuTarget("h100")
    kernel = next(k for k in full_size_experts(DECODE_1, "h100", encoding) if k.family.endswith("up_one"))
    _, name = card.emit([kernel], tmp_path)
    sass = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", tmp_path / name], capture_output=True, text=True,
                          check=True).stdout
    lines = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4}\*/", line) and "NOP" not in line]
    parts = [re.findall(r"\b(LDG|ACQBULK|FFMA)\b", part) for part in "\n".join(lines).split("ACQBULK")]
    assert [("FFMA" in part) for part in parts] == [False, True, False, True]
    assert all(part.count("LDG") >= 8 for part in parts[::2])
    assert len(lines) / 2 < (10 if encoding is FP8 else 4.5) * each


def full_size_experts(bucket: Bucket, card: str, encoding: Encoding) -> list[Kernel]:
    """What the experts of Qwen3-Coder-Next launch in a bucket to read their weights."""
    case = Case("experts", bucket)
    x = case.input("x", "bf16[T,2048]")
    ids, weights = case.op("moe_route", [case.input("l", "bf16[T,513]")], top_k=10, normalize=True, shared=True)
    case.op("moe_add", [x, ids, weights, case.weight("up", (513, 1024, 2048), encoding),
                        case.weight("down", (513, 2048, 512), encoding), x], activation="silu")
    calls = [call for _, call in case.lower(GpuTarget(card))]
    made = [kernel for call in calls for kernel in (call.kernel, *(other for other, _ in call.others))]
    return [kernel for kernel in made if kernel.family.startswith(("four_", "up_one", "down_one"))]


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("bucket", [DECODE_1, DECODE_8, PREFILL], ids=lambda b: b.name)
def test_full_size(card: str, bucket: Bucket, tmp_path: Path) -> None:
    check(full_size(bucket), card, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_every_case_compiles(card: str, tmp_path: Path) -> None:
    target = GpuTarget(card)
    check(list({call.kernel: None for case, _ in every() for _, call in case.lower(target)}), card, tmp_path, spills=64)


def test_every_family_has_a_case() -> None:
    target = GpuTarget("h100")
    tried = {call.kernel.family for case, _ in every() for _, call in case.lower(target)}
    elsewhere = ("sample", "ranks")  # test_sample.py, test_exchange.py
    ours = {name for name in FAMILIES if not name.startswith("custom_") and FAMILIES[name].module not in elsewhere}
    assert tried == ours


def test_a_small_card_loads_less_far_ahead() -> None:
    """STAGES and PIPE change neither arguments nor grids: a kernel gets as many as fit, and says so."""
    kernel = next(k for k in full_size(DECODE_8) if k.family == "gemm" and dict(k.params)["STAGES"] == 4)
    family = FAMILIES["gemm"]
    _, whole = fitting(kernel, 90, family, 232448)
    _, cut = fitting(kernel, 90, family, whole["shared"] - 1)
    assert whole["config"] == dict(kernel.params)
    assert cut["shared"] < whole["shared"] and cut["config"] == {**whole["config"], "STAGES": 3}
    assert {name: cut[name] for name in ("entry", "pointers", "threads")} == {
        name: whole[name] for name in ("entry", "pointers", "threads")}


@pytest.mark.parametrize("card", ["l40s", "rtx5090"])
def test_attention_takes_what_100_kb_hold(card: str, tmp_path: Path) -> None:
    """The kernel of the largest tiles looks at fewer keys at a time on cards with 99 KiB a block."""
    kernel = next(k for k in full_size(PREFILL, card) if k.family == "attention_prefill")
    row = json.loads((tmp_path / emit([kernel], tmp_path, hardware(card), workers=1)[0]).read_text())[kernel.symbol]
    assert row["shared"] <= hardware(card).shared == 101376
    assert (row["config"]["PIPE"], row["config"]["BS"]) == (1, 32) and dict(kernel.params)["BS"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("card", SIZES.values())
@pytest.mark.parametrize("bucket", [DECODE_1, DECODE_8, PREFILL], ids=lambda b: b.name)
def test_every_hardware_file_holds_full_size(card: str, bucket: Bucket, tmp_path: Path) -> None:
    """Emitting checks each kernel against the shared memory that the card's file tells."""
    kernels = full_size(bucket, card)
    assert len(emit(kernels, tmp_path, hardware(card), workers=2)) == len(set(kernels)) + 1


def test_bytes_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = full_size(DECODE_1)[:1]
    for name in ("one", "two"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / f"cache-{name}"))
        emit(kernels, tmp_path / name, hardware("h100"), workers=1)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.is_file()} for name in ("one", "two"))
    assert one == two and len(one) == 2


def test_limits_and_failures_name_the_kernel(tmp_path: Path) -> None:
    kernel = full_size(DECODE_1)[0]
    with pytest.raises(LoweringError, match=f"{kernel.symbol} needs 300000 bytes of shared memory, a100-80 has 166912"):
        check_limits(kernel, {"shared": 300_000}, hardware("a100"))
    broken = Kernel.make("gather_rows", D=3, BD=3, SX=3)  # a block that is no power of two
    with pytest.raises(LoweringError, match="gather_rows_BD3_D3_SX3: Triton cannot compile it for h100-80"):
        emit([broken], tmp_path, hardware("h100"), workers=1)


def test_a_script_without_a_file_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("__main__.__file__", "<stdin>", raising=False)
    error = _crash(full_size(DECODE_1)[0], hardware("h100"))
    assert isinstance(error, UsageError) and "a script read from <stdin>" in str(error) and "save it" in str(error)
