"""Checkpoint files: where they are, what their config says, which tensors they hold. Headers first, data on demand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

import qcn_compile
from qcn_compile import settings
from qcn_compile.errors import ModelError
from qcn_compile.frontend.formats import group
from qcn_compile.frontend.tensor_files import Stored, read_header

SUPPORTED = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_text", "qwen3_moe", "qwen3")
"""The model types that the tests compare with transformers."""

METHODS = ("fp8", "compressed-tensors", "gptq", "awq")
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
    _check_scheme(path, raw.get("quantization_config") or {})
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config(decoder=True)
    except Exception as error:  # the config classes and their validators raise errors of many types
        raise ModelError(f"{path} is not a valid {kind} config: {' '.join(str(error).split())}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # how tensors are stored is the checkpoint's matter, not the model's
    parts = {key for key in raw if key.endswith("_config")}
    return config, {**{key: value for key, value in raw.items() if key not in parts}, **raw.get("text_config", {})}


def scheme_of_checkpoint(folder: Path) -> dict[str, Any]:
    """The quantization_config of a checkpoint, or nothing. Raises ModelError for a config.json that is none."""
    path = folder / "config.json"
    return (_json(path, "download it again").get("quantization_config") or {}) if path.is_file() else {}


def _check_scheme(path: Path, scheme: dict[str, Any]) -> None:
    """Raises ModelError for a quantised checkpoint that cannot be read."""
    method = scheme.get("quant_method", "unknown")
    bits = scheme.get("bits", scheme.get("w_bit", 4)) if method in ("gptq", "awq") else 4
    if scheme and (method not in METHODS or bits != 4 or scheme.get("version") in ("gemv", "marlin")):
        raise ModelError(f"{path}: the checkpoint is quantised ({method}, {bits} bits, "
                         f"{scheme.get('version', scheme.get('format', 'no format'))}), which is not supported; known "
                         f"are {', '.join(METHODS)} (gptq and awq with 4 bits). Give such a checkpoint or the bf16 one")


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


class Checkpoint:
    """The weights of a directory of safetensors files: headers are read at once, data when asked for.

    stored: every tensor. grouped: the weights they make up, what is not needed, and what is wrong. scheme: the
    quantization_config, or nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scheme = scheme_of_checkpoint(path)
        self.stored: dict[str, Stored] = {}
        for file in self._files():
            self.stored.update(read_header(file))
        self.grouped = group(self.stored, self.scheme)
        self.weights = self.grouped.weights

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

    def fingerprint(self) -> str:
        """Names, sizes and times of the files: whether this is still the same checkpoint."""
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in {s.file for s in self.stored.values()}]
        return json.dumps([str(self.path.resolve()), *sorted(facts)])
