"""The config of a model by name, found without torch and without reading weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import qcn_compile
from qcn_compile import settings
from qcn_compile.errors import ModelError

ASSETS = Path(qcn_compile.__file__).parent / "assets"
CODER_NEXT = "Qwen/Qwen3-Coder-Next"
FP8 = "-FP8"
BUNDLED = {"Qwen3-Coder-Next": "qwen3-coder-next"}  # configs that ship with the project, by the last part of a name


def find_config(model: str | None, kind: str) -> tuple[str, dict[str, Any]]:
    """(name, config.json) of a folder, a Hugging Face name or, for None, the default of a kind of target.

    Looks into the folder, the Hugging Face cache, the configs that ship with the project, then asks the hub.
    Raises ModelError naming what was tried.
    """
    if model is None:
        folder = "tiny-coder" if kind == "cpu" else "qwen3-coder-next"
        return ("tiny-coder" if kind == "cpu" else CODER_NEXT), _read(ASSETS / folder / "config.json")
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve().name, _read(path / "config.json")
    cached = sorted((settings.hub_cache() / f"models--{model.replace('/', '--')}").glob("snapshots/*/config.json"))
    if cached:
        return model, _read(cached[-1])
    last = model.rpartition("/")[2]
    if (known := BUNDLED.get(last.removesuffix(FP8))) is not None:
        return model, {**_read(ASSETS / known / "config.json"), **(_blocks() if last.endswith(FP8) else {})}
    return model, _read(_from_hub(model))


def has_fp8_blocks(config: dict[str, Any]) -> bool:
    """Whether a checkpoint of this config is stored in FP8 with one scale a block."""
    stored = config.get("quantization_config") or {}
    return stored.get("quant_method") == "fp8" and bool(stored.get("weight_block_size"))


def _blocks() -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); a model is a folder with a config.json") from None
    except ValueError as error:
        raise ModelError(f"{path} is no JSON ({error}); take the file from the model's repository") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object; take the file from the model's repository")
    return data


def _from_hub(name: str) -> Path:
    tried = f"model {name!r} was not found: no folder, not in the cache {settings.hub_cache()}"
    if settings.offline():
        raise ModelError(f"{tried}; HF_HUB_OFFLINE forbids to ask the hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", cache_dir=settings.hub_cache()))
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{tried}, no download ({type(error).__name__}: {reason})") from None
