"""Lowering of the choice of tokens: three launches, of which the plain cases leave the second at once."""

from __future__ import annotations

from qcn_compile.targets.base import Call, Param, Ref
from qcn_compile.targets.triton.lowering.rows import dtype_of
from qcn_compile.targets.triton.lowering.site import COUNTS, Site, call, cdiv, power, scratch

BLOCK, GROUP = 1024, 16
BLOCKS = 128  # at least so many for small vocabularies, so that a shortlist of SHORT comes from more than that
SHORT, KEEP, CAP = 64, 32, 128  # tokens a shortlist is made for, at most; stored of a block, and of all blocks
CHUNK = 2048


def sample(site: Site) -> list[Call]:
    """sample(logits): the tokens go to the input array `chosen`, and to `last` for the next step to read."""
    logits = site.operand(0).type
    rows, vocab = site.capacity(logits.shape), int(logits.shape[1])  # type: ignore[arg-type]
    block = max(GROUP, min(BLOCK, power(cdiv(vocab, BLOCKS))))
    blocks = cdiv(cdiv(vocab, GROUP), block // GROUP)
    parts = {name: scratch(name, rows * blocks, dtype) for name, dtype in
             (("top", "f32"), ("arg", "i32"), ("mass", "f32"), ("found", "i32"))}
    lists = [scratch("value", rows * blocks * KEEP, "f32"), scratch("number", rows * blocks * KEEP, "i32")]
    head = [site.ref(0), *(Ref("input", name=name) for name in ("choice", "history", "bias", "allowed"))]
    shape: dict[str, Param] = {"V": vocab, "SX": site.stride(0), "BV": block, "BLOCKS": blocks,
                               "X": dtype_of(site, logits)}
    wide: dict[str, Param] = {"BB": power(blocks, 32), "SHORT": max(1, min(SHORT, blocks // 2)), "KEEP": KEEP}
    return [
        call("sample_blocks", [*head, parts["top"], parts["arg"], parts["mass"], COUNTS], (blocks, rows), WARPS=4,
             **shape),
        call("sample_shortlist", [*head, parts["top"], *lists, parts["found"], COUNTS], (blocks, rows), WARPS=4,
             **shape, **wide),
        call("sample_pick", [*head, parts["top"], parts["arg"], parts["mass"], *lists, parts["found"],
                             Ref("input", name="chosen"), Ref("input", name="last"), COUNTS], (rows,), CAP=CAP,
             CHUNK=min(CHUNK, power(vocab)), WARPS=8, **shape, **wide)]
