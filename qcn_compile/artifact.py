"""The artifact on disk: schema, atomic writing, and the checks made before anything is loaded.

    build/
      manifest.json    schema version, model, target, decisions, caches, buckets, sha256 and size of every file
      plan/<entry>-<bucket>.json   launches with every argument resolved to a name or an offset
      kernels/         shared libraries, each with its source beside it
      weights/*.safetensors   one 1-D tensor a blob, in the kernel's layout, a multiple of 64 bytes each
      tokenizer/       tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
      ir/NN-pass.qir   the graph after each pass
      report.json      what was decided and why
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcn_compile.errors import ArtifactError, UsageError

SCHEMA = 2
ALIGNMENT = 64
FULL_HASH_LIMIT = 64 << 20  # larger files are checked by size at load; `verify(build, deep=True)` hashes everything


@dataclass(frozen=True)
class Arg:
    """One kernel argument. `kind` says where the pointer comes from:

    workspace  `offset` bytes into the workspace             weight  blob `name` of the weights
    state      `name` of a cache, `part` (k, v or "" )       input   runtime array `name` (see INPUTS)
    output     workspace result handed to the caller: `name` and `offset`
    """

    kind: str
    name: str = ""
    offset: int = 0
    part: str = ""


INPUTS = {
    "counts": "i32[4]: tokens T, sequences S, wanted rows R, width of the block table",
    "tokens": "i32[T]: token ids, sequence after sequence",
    "positions": "i32[T]: position of each token in its sequence",
    "token_seq": "i32[T]: index of the sequence each token belongs to",
    "cu_seqlens": "i32[S+1]: first token of each sequence, then T",
    "context_lens": "i32[S]: tokens of the sequence already in the caches before this step",
    "slots": "i32[S]: state slot of each sequence (conv and delta caches), as it was before this step",
    "into": "i32[S]: the slot that each sequence's state is written to",
    "block_table": "i32[S, width]: KV pages of each sequence, row-major",
    "rows": "i32[R]: tokens whose logits are wanted",
    "choice": "i32[R, 16]: how the device chooses each wanted row's token (GPU only, like what follows)",
    "chosen": "i32[R]: the tokens it chose",
    "last": "i32[slots]: the token last chosen for each slot; token -1 - s in `tokens` stands for it",
    "history": "i32[slots, vocab]: how often a token is in the output, bit 30: it is in the prompt",
    "bias": "f32[slots, vocab]: added to the logits",
    "allowed": "i32[slots, ceil(vocab / 32)]: bits of the tokens that a grammar lets come next",
    "hidden": "f32[T, hidden]: hidden states handed to an entry other than main (the MTP head)",
}


@dataclass(frozen=True)
class Launch:
    """One kernel call: its symbol, its arguments in order, and the op of the final graph it came from.

    `grid` is the launch grid on a GPU (static in a bucket) and empty on a CPU.
    """

    kernel: str
    args: tuple[Arg, ...]
    op: str
    location: str
    bytes: int = 0
    flops: int = 0
    grid: tuple[int, ...] = ()


@dataclass(frozen=True)
class Route:
    """A router of the plan: after `launch`, i32 [T, slots] at workspace `offset` names the experts of each token, of
    `experts` that there are. Columns from `top_k` on are shared experts, which every token takes."""

    launch: int
    layer: str
    offset: int
    slots: int
    top_k: int
    experts: int


@dataclass(frozen=True)
class Plan:
    """The launches of one bucket. Capacities are upper bounds; the true sizes are in `counts` at run time.

    `outputs` maps a name (logits, hidden) to its workspace offset, dtype and row width.
    """

    entry: str
    name: str
    tokens: int
    sequences: int
    rows: int
    workspace_bytes: int
    launches: tuple[Launch, ...]
    outputs: dict[str, dict[str, Any]]
    routes: tuple[Route, ...] = ()

    @property
    def key(self) -> str:
        """Unique in a build."""
        return f"{self.entry}-{self.name}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        launches = tuple(
            Launch(**{**row, "args": tuple(Arg(**arg) for arg in row["args"]), "grid": tuple(row["grid"])})
            for row in data["launches"]
        )
        routes = tuple(Route(**row) for row in data.get("routes", ()))
        return Plan(**{**data, "launches": launches, "routes": routes})


@dataclass(frozen=True)
class CacheSpec:
    """A cache the plan names. `unit_bytes` per KV page (keys and values together) or per state slot.

    kv:    part k is [pages, heads, dim, page], part v is [pages, heads, page, dim]
    conv:  [slots, width-1, channels]         delta: [slots, value_heads, key_dim, value_dim]
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    unit_bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime needs to know before it maps a file."""

    schema: int
    model: dict[str, Any]
    target: dict[str, Any]
    decisions: dict[str, Any]
    caches: tuple[CacheSpec, ...]
    page_size: int
    context_length: int
    vocab_size: int
    hidden_size: int
    plans: tuple[str, ...]
    libraries: tuple[str, ...]
    weights: dict[str, Any]
    tools: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Manifest:
        caches = tuple(CacheSpec(**{**c, "shape": tuple(c["shape"])}) for c in data["caches"])
        return Manifest(**{**data, "caches": caches, "plans": tuple(data["plans"]),
                           "libraries": tuple(data["libraries"])})


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Deterministic JSON: sorted keys, one trailing newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def building(output: Path, force: bool) -> Iterator[Path]:
    """A scratch directory beside `output` that takes its place on success and vanishes on any failure."""
    if output.exists() and not force and not (output / "manifest.json").is_file() and any(output.iterdir()):
        raise UsageError(f"{output} exists and is no build of ours: name another folder or remove it")
    scratch = output.parent / f".{output.name}.partial-{os.getpid()}"
    for left in output.parent.glob(f".{glob.escape(output.name)}.partial-*"):
        if not alive(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        yield scratch
        _swap(scratch, output)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {output}: {error.strerror or error}; free space or name another folder with -o"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def alive(process: int) -> bool:
    """Whether a process of that number runs, whoever owns it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _swap(scratch: Path, output: Path) -> None:
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    if output.exists():
        output.rename(old)
    scratch.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def seal(build: Path, manifest: Manifest, known: Mapping[str, str] | None = None) -> Manifest:
    """Hash every file of the build but those whose sha256 is known, and write the manifest, last."""
    files, known = {}, known or {}
    for path in sorted(p for p in build.rglob("*") if p.is_file() and p.name != "manifest.json"):
        name = path.relative_to(build).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or file_sha256(path)}
    body = {**manifest.to_json(), "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    write_json(build / "manifest.json", {**body, "self_sha256": digest})
    return Manifest.from_json(body)


def read_manifest(build: Path, deep: bool = False) -> Manifest:
    """Read and check a build: schema, own hash, presence, size and (small files, or all with `deep`) hash.

    Raises ArtifactError, naming the file and the cure, before anything large is mapped.
    """
    path = build / "manifest.json"
    if not path.is_file():
        raise ArtifactError(f"{build} is no build: it has no manifest.json; make one with qcn-compile -o {build}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = data["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); build it again with qcn-compile") from None
    if schema != SCHEMA:
        raise ArtifactError(f"{build} has schema {schema}, this qcn-run reads schema {SCHEMA}; "
                            "build it again with the qcn-compile of this version")
    digest = data.pop("self_sha256", "")
    if hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest() != digest:
        raise ArtifactError(f"{path} was edited after the build; build it again with qcn-compile")
    _check_files(build, data["files"], deep)
    return Manifest.from_json(data)


def _check_files(build: Path, files: dict[str, dict[str, Any]], deep: bool) -> None:
    for name, want in files.items():
        path = build / name
        if not path.is_file():
            raise ArtifactError(f"{build} lacks {name}; copy the build again or rebuild it with qcn-compile")
        size = path.stat().st_size
        if size != want["bytes"]:
            raise ArtifactError(f"{path} has {size} bytes, the manifest says {want['bytes']}: "
                                "truncated or replaced; copy the build again or rebuild it")
        if (deep or size <= FULL_HASH_LIMIT) and file_sha256(path) != want["sha256"]:
            raise ArtifactError(f"{path} was altered after the build (sha256 differs); "
                                "copy the build again or rebuild it")


def read_plan(build: Path, name: str) -> Plan:
    """One plan of a checked build."""
    return Plan.from_json(json.loads((build / name).read_text(encoding="utf-8")))
