"""The kernel families by name: where the function is and what its pointers are. Imports no Triton.

A signature lists the pointer arguments in order, each `name:dtype`. `{P}` stands for parameter P of the kernel,
`name?F` is given only when parameter F is true (else the function gets None), `name~` promises no 16-byte alignment.
Everything else that the function takes is a parameter of the kernel, by the name it has there, and compiled in.
`WARPS`, `STAGES` and `REGISTERS` (a cap for each thread) are compile options.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qcn_compile.targets.base import Kernel, Param
from qcn_compile.targets.files import import_file

PACKAGE = "qcn_compile.targets.triton.kernels"
OPTIONS = ("WARPS", "STAGES", "REGISTERS")
ITEMSIZE = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "i64": 8, "fp8": 1, "u8": 1}
_POINTER = re.compile(r"(\w+)(~?)(?:\?(\w+))?:(\{(\w+)\}|\w+)$")
_BATCH = "token_seq:i32 cu:i32 context_lens:i32 block_table:i32 counts:i32"
_SPANS = "cu:i32 context_lens:i32 slots:i32 counts:i32"
_MOVES = "cu:i32 context_lens:i32 slots:i32 into:i32 counts:i32"


@dataclass(frozen=True)
class Pointer:
    """A pointer argument: its name, element type (bf16, f16, f32, i32, fp8 or u8) and whether it starts at 16 bytes."""

    name: str
    dtype: str
    aligned: bool


@dataclass(frozen=True)
class Family:
    """A kernel function and its signature.

    module: of the package of kernels; or `file`: the Python file of a plugin that has the function. function: its name
    when that is not the family's. typed: its parameters that only say what a pointer is, instead of HIDDEN.
    """

    module: str
    signature: str
    file: str = ""
    function: str = ""
    typed: tuple[str, ...] = ()

    def load(self, name: str) -> Any:
        """The Triton function; imports Triton. `name`: of the family."""
        module = import_file(self.file) if self.file else import_module(f"{PACKAGE}.{self.module}")
        return getattr(module, self.function or name)

    def pointers(self, kernel: Kernel) -> tuple[list[Pointer], list[str]]:
        """The pointers a kernel of this family takes, and the names of those it is given as None."""
        params = dict(kernel.params)
        present, absent = [], []
        for word in self.signature.split():
            found = _POINTER.match(word)
            assert found is not None, word
            name, loose, flag, dtype, param = found.groups()
            if flag and not params[flag]:
                absent.append(name)
            else:
                present.append(Pointer(name, str(params[param]) if param else dtype, not loose))
        return present, absent


_LOGITS = "logits:{X} choice:i32 history:i32 bias:f32 allowed:i32"
_SORTED = "order:i32 owner:i32 found:i32 first:i32"
_TILED = f"{_SORTED} w:{{W}} s?SCALED:f32"
_FOUR = "w:u8 s:{S} g?WHOLE:f32"
_WORDS = "w:i32 s:{S} g?WHOLE:f32"
FAMILIES = {
    "embedding": Family("rows", "ids:i32 last:i32 w:bf16 y:bf16 counts:i32"),
    "gather_rows": Family("rows", "x:bf16 rows:i32 y:bf16 counts:i32"),
    "rms_norm": Family("rows", "x:bf16 r?ADD:bf16 w:f32 z?GATE:bf16 total?ADD:bf16 y:bf16 q?NARROW:fp8 "
                               "qs?NARROW:f32 counts:i32"),
    "unary": Family("rows", "x~:{X} y:{X} counts:i32"),
    "binary": Family("rows", "a~:{A} b~:{B} y:{Y} counts:i32"),
    "copy_columns": Family("rows", "x~:bf16 y:bf16 counts:i32"),
    "product": Family("single", "x:bf16 norm_w?NORM:f32 w:{W} s?SCALED:f32 r?ADDEND:{R} normed?KEEP:bf16 y:bf16"),
    "product_pair": Family("single", "x:bf16 norm_w:f32 w:{W} s?SCALED:f32 w2:bf16 y:bf16 y2:bf16"),
    "up_one": Family("single", "x:bf16 ids:i32 w:{W} s?SCALED:f32 h:bf16"),
    "down_one": Family("single", "h:bf16 ids:i32 weights:f32 w:{W} s?SCALED:f32 r?ADD:bf16 y:bf16"),
    "attention_one": Family("attention_one", "q:bf16 k:bf16 v:bf16 q_w?Q_NORM:f32 k_w?K_NORM:f32 cos:f32 sin:f32 "
                                             "part:f32 score:f32 keys:{KV} values:{KV} context_lens:i32 "
                                             "block_table:i32"),
    "matmul": Family("linear", "x:bf16 w:{W} s?SCALED:f32 r?ADDEND:{R} y:bf16 counts:i32"),
    "moe_route": Family("moe", "logits~:bf16 ids:i32 weights:f32 counts:i32"),
    "local_experts": Family("moe", "ids:i32 weights:f32 here:i32 share:f32 counts:i32"),
    "moe_up": Family("moe", "x:bf16 ids:i32 w:{W} s?SCALED:f32 h:bf16 counts:i32"),
    "moe_down": Family("moe", "h:bf16 ids:i32 weights:f32 w:{W} s?SCALED:f32 r?ADD:bf16 y:bf16 counts:i32"),
    "quantize_rows": Family("gemm", "x:bf16 q:fp8 qs:f32 counts:i32"),
    "gemm": Family("gemm", "x:{X} xs?NARROW:f32 w:{W} s?SCALED:f32 r?ADDEND:{R} y:bf16 counts:i32"),
    "gemm_few": Family("gemm", "x:{X} xs?NARROW:f32 w:{W} s?SCALED:f32 r?ADDEND:{R} y:bf16 counts:i32"),
    "moe_clear": Family("moe_tiles", "found:i32 counts:i32"),
    "moe_rank": Family("moe_tiles", "ids:i32 found:i32 rank:i32 counts:i32"),
    "moe_tile": Family("moe_tiles", "found:i32 first:i32 counts:i32"),
    "moe_order": Family("moe_tiles", "ids:i32 rank:i32 first:i32 owner:i32 order:i32 counts:i32"),
    "moe_sort": Family("moe_tiles", "ids:i32 found:i32 rank:i32 first:i32 owner:i32 order:i32 counts:i32"),
    "moe_up_tiles": Family("moe_tiles", f"x:{{X}} xs?NARROW:f32 {_TILED} h:{{X}} hs?NARROW:f32 counts:i32"),
    "moe_down_tiles": Family("moe_tiles", f"h:{{X}} hs?NARROW:f32 {_TILED} o:bf16 counts:i32"),
    "moe_combine": Family("moe_tiles", "o:bf16 weights:f32 r?ADD:bf16 y:bf16 counts:i32"),
    "four_up": Family("four", f"x:bf16 ids:i32 {_FOUR} h:bf16 counts:i32"),
    "four_down": Family("four", f"h:bf16 ids:i32 weights:f32 {_FOUR} r?ADD:bf16 y:bf16 counts:i32"),
    "four_up_one": Family("four_one", f"x:i32 ids:i32 {_WORDS} h:bf16"),
    "four_down_one": Family("four_one", f"h:i32 ids:i32 weights:f32 {_WORDS} r?ADD:bf16 y:bf16"),
    "four_up_tiles": Family("four", f"x:bf16 {_SORTED} {_FOUR} h:bf16 counts:i32"),
    "four_down_tiles": Family("four", f"h:bf16 {_SORTED} {_FOUR} o:bf16 counts:i32"),
    "delta_step": Family("delta", "x:bf16 z:bf16 b~:bf16 a~:bf16 conv_w:f32 decay:f32 dt_bias:f32 norm_w:f32 "
                                  f"ring:bf16 state:{{ST}} y:bf16 {_MOVES}"),
    "delta_batch": Family("delta_batch", "x:bf16 z:bf16 b~:bf16 a~:bf16 conv_w:f32 decay:f32 dt_bias:f32 norm_w:f32 "
                                         f"ring:bf16 state:{{ST}} y:bf16 {_MOVES}"),
    "delta_one": Family("delta", "x:bf16 z:bf16 b~:bf16 a~:bf16 conv_w:f32 decay:f32 dt_bias:f32 norm_w:f32 "
                                 "ring:bf16 state:{ST} y:bf16 context_lens:i32 slots:i32"),
    "delta_mix": Family("delta_chunk", f"x:bf16 conv_w:f32 ring:bf16 mixed:bf16 norms:f32 token_seq:i32 {_SPANS}"),
    "delta_solve": Family("delta_chunk", "x:bf16 conv_w:f32 ring:bf16 mixed:bf16 norms:f32 b~:bf16 a~:bf16 decay:f32 "
                                         f"dt_bias:f32 w:bf16 u:bf16 p:bf16 fade:f32 token_seq:i32 {_SPANS}"),
    "delta_scan": Family("delta_chunk", "x:bf16 mixed:bf16 norms:f32 w:bf16 u:bf16 p:bf16 fade:f32 ring:bf16 "
                                        f"state:{{ST}} o:bf16 {_MOVES}"),
    "delta_norm": Family("delta_chunk", "o:bf16 w:f32 z:bf16 y:{Y} ys?NARROW:f32 counts:i32"),
    "rope_table": Family("attention", "positions:i32 inv_freq:f32 cos:f32 sin:f32 counts:i32"),
    "rope_append": Family("attention", "q:bf16 k:bf16 v:bf16 q_w?Q_NORM:f32 k_w?K_NORM:f32 cos:f32 sin:f32 y:bf16 "
                                       f"keys:{{KV}} values:{{KV}} {_BATCH}"),
    "attention_split": Family("attention", f"q:bf16 part:f32 score:f32 keys:{{KV}} values:{{KV}} {_BATCH}"),
    "attention_combine": Family("attention", "part:f32 score:f32 gate?GATE:bf16 y:bf16 counts:i32"),
    "all_reduce": Family("ranks", "x:bf16 y:bf16 peers:i64 counts:i32"),
    "all_reduce_norm": Family("ranks", "x:bf16 y:bf16 peers:i64 w?NORM:f32 n?NORM:bf16 q?NARROW:fp8 qs?NARROW:f32 "
                                       "counts:i32"),
    "interleave": Family("ranks", "parts:bf16 y:bf16 counts:i32"),
    "sample_blocks": Family("sample", f"{_LOGITS} top:f32 arg:i32 mass:f32 counts:i32"),
    "sample_shortlist": Family("sample", f"{_LOGITS} top:f32 value:f32 number:i32 found:i32 counts:i32"),
    "sample_pick": Family("sample", f"{_LOGITS} top:f32 arg:i32 mass:f32 value:f32 number:i32 found:i32 chosen:i32 "
                                    "last:i32 counts:i32"),
    "rope_append_rows": Family("attention_prefill", "q:bf16 k:bf16 v:bf16 q_w?Q_NORM:f32 k_w?K_NORM:f32 cos:f32 "
                                                    f"sin:f32 y:bf16 keys:{{KV}} values:{{KV}} {_BATCH}"),
    "attention_prefill": Family("attention_prefill", "q:bf16 gate?GATE:bf16 y:bf16 keys:{KV} values:{KV} "
                                                     f"{_BATCH}"),
}
# parameters that only say what a pointer is
HIDDEN = ("W", "S", "WHOLE", "KV", "ST", "A", "B", "X", "Y", "R", "ADDEND")


def options(kernel: Kernel) -> dict[str, int]:
    """num_warps, num_stages and, when there is a cap, maxnreg of a kernel."""
    params = dict(kernel.params)
    cap = {"maxnreg": int(params["REGISTERS"])} if "REGISTERS" in params else {}
    return {"num_warps": int(params.get("WARPS", 4)), "num_stages": int(params.get("STAGES", 2)), **cap}


def constants(kernel: Kernel) -> dict[str, Param]:
    """What is compiled in: every parameter of the function that is no pointer, PDL left out."""
    family = FAMILIES[kernel.family]
    hidden = (*OPTIONS, *(family.typed if family.file else HIDDEN))
    return {name: value for name, value in kernel.params if name not in hidden}
