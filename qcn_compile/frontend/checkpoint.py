"""Checkpoint files: where they are, what their config says, which tensors they hold. Headers first, data on demand."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

import qcn_compile
from qcn_compile import settings
from qcn_compile.errors import ModelError

SUPPORTED = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_text", "qwen3_moe", "qwen3")
"""The model types that the tests compare with transformers."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
          "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
          "I64": torch.int64, "BOOL": torch.bool}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_ASSETS = Path(qcn_compile.__file__).parent / "assets"
_CODER_NEXT = "Qwen/Qwen3-Coder-Next"
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


@dataclass(frozen=True)
class Located:
    """A model that was asked for.

    path: folder of its weights and tokenizer, None when there are no weights. config: folder of its config.json.
    note: what the user should know about the choice, or "".
    """

    path: Path | None
    name: str
    note: str
    config: Path


def locate(model: str | None, target_kind: str) -> Located:
    """Find a model: a directory, a name on the Hugging Face hub (cache first), or None for the default of the target.

    Raises ModelError that names everything that was tried.
    """
    if model is None:
        return _default(target_kind)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _folder(folder, folder.resolve().name)
    if folder.exists():
        raise ModelError(f"{model} is a file; give the directory that holds config.json and the *.safetensors files")
    return _from_hub(model)


def _default(target_kind: str) -> Located:
    if target_kind == "cpu":
        folder = _ASSETS / "tiny-coder"
        return Located(folder, folder.name, "no model named: the bundled tiny-coder, a toy", folder)
    cached = _cached(_CODER_NEXT)
    if cached is not None:
        return Located(cached, _CODER_NEXT, f"no model named: {_CODER_NEXT} from the Hugging Face cache", cached)
    note = f"no model named: the configuration of {_CODER_NEXT}, whose checkpoint is nowhere to be found"
    return Located(None, _CODER_NEXT, note, _ASSETS / "qwen3-coder-next")


def _cached(name: str) -> Path | None:
    """The newest snapshot of a model in the Hugging Face cache, when it is whole."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, cache_dir=settings.hub_cache(), local_files_only=True,
                                        allow_patterns=_WANTED))
    except OSError:
        return None
    return folder if _is_whole(folder) else None


def _folder(folder: Path, name: str) -> Located:
    if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        return Located(folder, name, "", folder)
    return Located(None, name, f"{folder} holds no *.safetensors files", folder)


def _from_hub(name: str) -> Located:
    """The newest snapshot in the cache when it is whole, else a download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    cache = settings.hub_cache()
    tried = [f"a directory {name!r} (absent)"]
    try:
        folder = Path(snapshot_download(name, cache_dir=cache, local_files_only=True, allow_patterns=_WANTED))
        if _is_whole(folder):
            return _folder(folder, name)
        tried.append(f"the cache {cache} (incomplete)")
    except HFValidationError:
        raise ModelError(f"{name!r} is no directory, and no Hugging Face name of the form owner/model") from None
    except OSError:
        tried.append(f"the cache {cache} (absent)")
    if settings.offline():
        tried.append("no download, since HF_HUB_OFFLINE is set")
    else:
        try:
            return _folder(Path(snapshot_download(name, cache_dir=cache, allow_patterns=_WANTED)), name)
        except Exception as error:  # the hub client raises its own, httpx's and the system's errors
            reason = str(error).strip().partition("\n")[0]
            tried.append(f"a download from huggingface.co ({type(error).__name__}: {reason})")
    raise ModelError(f"model {name!r} was not found; tried " + "; ".join(tried)
                     + ". Give a directory, or a name such as Qwen/Qwen3-Coder-Next with network access")


def _is_whole(folder: Path) -> bool:
    if (folder / INDEX).exists():
        shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8")).get("weight_map", {}).values())
        return all((folder / shard).exists() for shard in shards)
    return (folder / SINGLE).exists()


def load_config(folder: Path) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The text model's config, and its plain JSON values. Raises ModelError for a missing, invalid or unknown one."""
    path = folder / "config.json"
    raw = _json(path, "give the directory of a Hugging Face checkpoint")
    kind = raw.get("model_type")
    if kind not in SUPPORTED:
        raise ModelError(f"{path}: model_type {kind!r} is not supported; supported are {', '.join(SUPPORTED)}")
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"{path}: the checkpoint is quantised ({method}), which is not supported; give the bf16 "
                         "checkpoint and choose the format with --quant")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config(decoder=True)
    except Exception as error:  # the config classes and their validators raise errors of many types
        raise ModelError(f"{path} is not a valid {kind} config: {' '.join(str(error).split())}") from error
    parts = {key for key in raw if key.endswith("_config")}
    return config, {**{key: value for key, value in raw.items() if key not in parts}, **raw.get("text_config", {})}


def _json(path: Path, cure: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; {cure}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); {cure}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object; {cure}")
    return value


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its file, its dtype in safetensors' spelling, its shape, where its bytes start and end."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    span: tuple[int, int]


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises ModelError naming both sizes when it is truncated or damaged."""
    again = "download it again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or 8 + length > size:
            raise ModelError(f"{file} is damaged: {size} bytes, but its header alone needs {8 + length}; {again}")
        text = stream.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = {name: _stored(file, 8 + length, name, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(f"{file} is damaged: its header cannot be read ({error}); {again}") from None
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "damaged"
        raise ModelError(f"{file} is {what}: {size} bytes, but its header describes {8 + length + end}; {again}")
    return found


def _stored(file: Path, base: int, name: str, entry: dict[str, Any]) -> Stored:
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ModelError(f"{file}: {name} is stored in {entry['dtype']}; known are {', '.join(DTYPES)}")
    if prod(shape) * DTYPES[entry["dtype"]].itemsize != last - first:
        raise ValueError(f"{name} has shape {list(shape)} in {last - first} bytes")
    return Stored(file, entry["dtype"], shape, (base + first, base + last))


class Checkpoint:
    """The tensors of a directory of safetensors files: headers are read at once, data when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        for file in self._files():
            self.tensors.update(read_header(file))

    def _files(self) -> list[Path]:
        if not (self.path / INDEX).exists():
            files = sorted(self.path.glob("*.safetensors"))
            if not files:
                raise ModelError(f"{self.path} holds no *.safetensors files; give the directory of a checkpoint")
            return files
        cure = "download the checkpoint again"
        index = _json(self.path / INDEX, cure).get("weight_map")
        if not isinstance(index, dict):
            raise ModelError(f"{self.path / INDEX} has no weight_map; {cure}")
        files = [self.path / name for name in sorted(set(index.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ModelError(f"{self.path} lacks {len(absent)} of {len(files)} files that {INDEX} lists: "
                             f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}; {cure}")
        return files

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor as stored, or its rows start..stop, into memory of its own; any thread may call it."""
        stored = self.tensors[name]
        kind, shape = DTYPES[stored.dtype], stored.shape
        if shape:
            shape = ((shape[0] if stop is None else stop) - start, *shape[1:])
        row = prod(shape[1:]) * kind.itemsize
        data = bytearray(prod(shape) * kind.itemsize)
        try:
            with stored.file.open("rb", buffering=0) as handle:
                handle.seek(stored.span[0] + start * row)
                _fill(handle, memoryview(data))
        except OSError as error:
            raise ModelError(f"{stored.file}: {name} cannot be read ({error}); download the file again") from error
        return torch.frombuffer(data, dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)

    def fingerprint(self) -> str:
        """Names, sizes and times of the files: whether this is still the same checkpoint."""
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in {s.file for s in self.tensors.values()}]
        return json.dumps([str(self.path.resolve()), *sorted(facts)])


def _fill(handle: FileIO, view: memoryview) -> None:
    while view:
        count = handle.readinto(view)
        if not count:
            raise OSError("the file ends early")
        view = view[count:]
