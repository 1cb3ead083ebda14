"""Install a collected training result in the checkpoint folder that ships with the project.

usage: python -m tools.tiny_model.assemble COLLECTED_FOLDER CHECKPOINT_FOLDER
The tokenizer's files must be in the checkpoint folder already (build_tokenizer); the configs are written anew.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from .config import TinyConfig
from .export import INDEX, load, write_configs


def main(collected: Path, checkpoint: Path) -> None:
    shards = sorted(collected.glob("model-*.safetensors"))
    assert len(shards) == 2 and (collected / INDEX).exists(), f"no complete checkpoint in {collected}"
    model = load(collected)
    assert all(torch.isfinite(p).all() for p in model.parameters()), "weights are not finite"
    for old in checkpoint.glob("model*"):
        old.unlink()
    for file in [*shards, collected / INDEX]:
        shutil.copyfile(file, checkpoint / file.name)
    if (collected / "log.jsonl").exists():
        shutil.copyfile(collected / "log.jsonl", checkpoint / "training_log.jsonl")
    write_configs(TinyConfig(), checkpoint)
    size = sum(f.stat().st_size for f in checkpoint.iterdir())
    print(f"{checkpoint}: {len(list(checkpoint.iterdir()))} files, {size:,} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
