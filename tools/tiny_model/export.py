"""Checkpoint files in the published Qwen3-Next layout: two bf16 safetensors shards, an index and the configs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .config import END_OF_TEXT, IM_END, TinyConfig
from .model import TinyNext

INDEX = "model.safetensors.index.json"
_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


def to_checkpoint(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Training names and stacked experts -> checkpoint names, one tensor per expert and projection."""
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        value, match = value.detach().to("cpu", dtype), _STACKED.match(name)
        if not match:
            out[name] = value.contiguous()
            continue
        for expert, weight in enumerate(value):
            prefix = f"{match[1]}.{expert}"
            if match[2] == "down_proj":
                out[f"{prefix}.down_proj.weight"] = weight.clone()
            else:
                gate, up = weight.chunk(2, 0)
                out[f"{prefix}.gate_proj.weight"], out[f"{prefix}.up_proj.weight"] = gate.clone(), up.clone()
    return out


def from_checkpoint(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `to_checkpoint`, in fp32."""
    out: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, value in tensors.items():
        match = _EXPERT.match(name)
        if match:
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = value.float()
        else:
            out[name] = value.float()
    for prefix, experts in stacks.items():
        ordered = [experts[i] for i in range(len(experts))]
        out[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([e["gate_proj"], e["up_proj"]]) for e in ordered])
        out[f"{prefix}.down_proj"] = torch.stack([e["down_proj"] for e in ordered])
    return out


def write_shards(tensors: dict[str, torch.Tensor], folder: Path, shards: int = 2) -> None:
    """Fill shards in name order up to an equal share of the bytes, then write the index."""
    total = sum(t.nbytes for t in tensors.values())
    groups: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    done = 0
    for name in tensors:
        groups[min(shards - 1, done * shards // total)][name] = tensors[name]
        done += tensors[name].nbytes
    places = {}
    for i, group in enumerate(groups, 1):
        filename = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file(group, folder / filename, metadata={"format": "pt"})
        places.update(dict.fromkeys(group, filename))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_configs(cfg: TinyConfig, folder: Path) -> None:
    """config.json and generation_config.json."""
    generation = {
        "bos_token_id": END_OF_TEXT,
        "do_sample": True,
        "eos_token_id": [IM_END, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.95,
    }
    (folder / "config.json").write_text(json.dumps(cfg.to_checkpoint(), indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def export(model: TinyNext, folder: Path) -> None:
    """Write weights and configs of a trained model; the tokenizer's files are written by build_tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(to_checkpoint(model.state_dict(), torch.bfloat16), folder)
    write_configs(model.cfg, folder)


def load(folder: Path) -> TinyNext:
    """Read an exported checkpoint back into the training model."""
    files = sorted(folder.glob("model-*.safetensors"))
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    model = TinyNext(TinyConfig())
    model.load_state_dict(from_checkpoint(tensors))
    return model
