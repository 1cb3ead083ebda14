"""What keys and values are cached in: asked for, possible on the card, half the bytes."""

from __future__ import annotations

import pytest

from qcn_compile.errors import UsageError
from qcn_compile.ir.types import DType, StateKind, StateType
from qcn_compile.lowering.decide import kv_type
from qcn_compile.targets.registry import load_target
from qcn_compile.targets.triton.target import GpuTarget


def test_the_type_follows_the_flag_and_the_card() -> None:
    reasons: dict[str, str] = {}
    assert kv_type(None, load_target("h100"), reasons) == kv_type("auto", load_target("a100"), {}) == "bf16"
    assert reasons["kv"] == "as they are computed"
    assert kv_type("fp8", load_target("h100"), reasons) == kv_type("fp8_e4m3", load_target("b200"), {}) == "f8e4m3"
    assert "--kv-cache-dtype" in reasons["kv"]
    for asked, target, words in (("fp8", "a100", r"a100 \(sm_80\) has no e4m3"),
                                 ("fp8", "cpu", "the cpu target caches"), ("int8", "h100", "choose auto, bf16, fp8")):
        with pytest.raises(UsageError, match=words):
            kv_type(asked, load_target(target), {})


def test_pages_of_codes_take_half_the_bytes() -> None:
    target = GpuTarget("h100")
    wide, narrow = (target.cache_unit(StateType(StateKind.kv, dtype, (2, 256)), 32) for dtype in
                    (DType.bf16, DType.f8e4m3))
    assert wide[0] == narrow[0] == (2, 32, 256) and wide[1] == 2 * narrow[1] == 65536
