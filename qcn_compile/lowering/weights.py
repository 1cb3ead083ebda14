"""Weights at build time: their names, the pieces they are packed in, and where each piece lies in its file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from qcn_compile.artifact import ALIGNMENT
from qcn_compile.errors import LoweringError
from qcn_compile.ir.encoding import Encoding
from qcn_compile.ir.graph import Op, Value
from qcn_compile.ir.pieces import Piece, reshape
from qcn_compile.lowering.rows import Rows, Source
from qcn_compile.targets.base import Target

FILE_BYTES = 256 << 20  # a file holds that much, or one larger weight
PIECE_ELEMENTS = 1 << 20  # of a matrix packed at a time: what a core's second cache holds
Parts = dict[str, np.ndarray]


@dataclass(frozen=True)
class BlobKey:
    """A weight value in one layout and encoding."""

    value: Value
    layout: str
    encoding: Encoding

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.value.tensor.shape)  # type: ignore[arg-type]


def sources(value: Value) -> list[str]:
    """Names of the checkpoint weights a static value is made from, in order."""
    names: dict[str, None] = {}

    def visit(op: Op | None) -> None:
        if op is None:
            return
        if op.name == "weight":
            names[str(op.attrs["name"])] = None
        for operand in op.inputs:
            visit(operand.op)

    visit(value.op)
    return list(names)


def name_blobs(keys: Iterable[BlobKey]) -> dict[BlobKey, str]:
    """A readable name for each blob: its first weight, how many more it holds, layout and format. Blobs of the same
    content, such as the table of tokens that a draft head shares with the model, have one name."""
    table: dict[BlobKey, str] = {}
    taken: set[str] = set()
    known: dict[tuple[object, ...], str] = {}
    for key in keys:
        made = (_content(key.value), key.layout, key.encoding)
        if made in known:
            table[key] = known[made]
            continue
        parts = sources(key.value)
        more = f"+{len(parts) - 1}" if len(parts) > 1 else ""
        stem = f"{parts[0] if parts else key.value.name}{more}:{key.layout}.{key.encoding.format}"
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}.{number}"
        taken.add(name)
        table[key] = known[made] = name
    return table


def _content(value: Value) -> object:
    """Equal for two weights of one checkpoint name as they are; otherwise the value itself."""
    op = value.op
    return (op.attrs["name"], value.tensor) if op is not None and op.name == "weight" else value


def distinct(names: Mapping[BlobKey, str]) -> list[BlobKey]:
    """The first blob of each name, in order."""
    firsts: dict[str, BlobKey] = {}
    for key, name in names.items():
        firsts.setdefault(name, key)
    return list(firsts.values())


def cuts(key: BlobKey, target: Target) -> list[tuple[int, int]]:
    """Rows start..stop of the pieces of a weight: one expert, or a block of rows, or all at once."""
    count = key.shape[0]
    block = target.row_block(key.layout, key.encoding)
    if len(key.shape) == 3:
        step = 1
    elif len(key.shape) == 2 and block:
        step = max(PIECE_ELEMENTS // key.shape[1] // block, 1) * block
    else:
        step = count
    return [(at, min(at + step, count)) for at in range(0, count, step)]


def part_bytes(key: BlobKey, rows: int, target: Target) -> dict[str, int]:
    """Bytes of each part of the first `rows` rows of a weight."""
    sizes = target.packed_sizes(key.layout, key.encoding, (rows, *key.shape[1:]))
    return {part: size for part, (_, size) in sizes.items()}


def pack_piece(key: BlobKey, rows: Rows, cut: tuple[int, int], target: Target) -> Parts:
    """Rows start..stop in the kernel's layout. Raises LoweringError when the target makes other sizes than it says."""
    piece: Piece = rows.get(*cut)
    if len(key.shape) == 3:
        piece = reshape(piece, key.shape[1:])
    parts = target.pack(key.layout, key.encoding, piece)
    start, stop = (part_bytes(key, row, target) for row in cut)
    want, made = {part: stop[part] - start[part] for part in stop}, {part: x.nbytes for part, x in parts.items()}
    if want != made:
        raise LoweringError(f"{key.value.name}: target {target.name} packs rows {cut} of {key.shape} as {key.layout} "
                            f"{key.encoding.format} into {made} bytes, its packed_sizes says {want}; make them agree")
    return parts


def packed(names: Mapping[BlobKey, str], source: Source, target: Target) -> Iterator[tuple[str, np.ndarray]]:
    """All blobs in memory, one after the other: u8, whole lines of 64 bytes."""
    for key in distinct(names):
        name, rows = names[key], Rows(key.value, source)
        pieces = [pack_piece(key, rows, cut, target) for cut in cuts(key, target)]
        for part in pieces[0]:
            line = np.concatenate([piece[part].view(np.uint8) for piece in pieces])
            yield f"{name}.{part}", np.pad(line, (0, -line.nbytes % ALIGNMENT))


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file to be written: which blobs, its header, and where the parts of each blob start."""

    name: str
    keys: tuple[BlobKey, ...]
    header: bytes
    offsets: Mapping[tuple[BlobKey, str], int]
    nbytes: int


def plan_files(names: Mapping[BlobKey, str], target: Target, stem: str = "weights") -> list[WeightFile]:
    """Files of about 256 MB for blobs in order, laid out before a weight is read."""
    groups: list[list[BlobKey]] = []
    size = FILE_BYTES + 1
    for key in distinct(names):
        whole = sum(part_bytes(key, key.shape[0], target).values())
        if size + whole > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += whole
    return [_laid_out(f"{stem}-{number:05d}.safetensors", keys, names, target)
            for number, keys in enumerate(groups, 1)]


def _laid_out(file: str, keys: list[BlobKey], names: Mapping[BlobKey, str], target: Target) -> WeightFile:
    """Every part starts at a multiple of 64 bytes; the header is padded with spaces."""
    rows, starts, at = {}, {}, 0
    for key in keys:
        for part, size in part_bytes(key, key.shape[0], target).items():
            whole = -(-size // ALIGNMENT) * ALIGNMENT
            rows[f"{names[key]}.{part}"] = {"dtype": "U8", "shape": [whole], "data_offsets": [at, at + whole]}
            starts[key, part] = at
            at += whole
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return WeightFile(file, tuple(keys), head, {k: len(head) + v for k, v in starts.items()}, len(head) + at)

