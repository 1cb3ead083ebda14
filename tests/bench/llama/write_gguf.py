"""A Qwen3-Next checkpoint as GGUF: python write_gguf.py CHECKPOINT q4_0|q8_0|bf16|f32 OUTPUT. Needs numpy and gguf.

Every matrix gets the format, the head and the embedding too; router, norms, gates and convolution stay f32, as they do
in llama.cpp's own conversion. One tensor is in memory at a time. There is no tokenizer: token ids go in and out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FORMATS = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0,
           "bf16": gguf.GGMLQuantizationType.BF16, "f32": gguf.GGMLQuantizationType.F32}
FILE_TYPES = {"q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
              "bf16": gguf.LlamaFileType.MOSTLY_BF16, "f32": gguf.LlamaFileType.ALL_F32}
PLAIN = ("gate.weight", "shared_expert_gate.weight", "conv1d.weight", "in_proj_ba.weight")
Row = tuple[str, tuple[int, ...], bool, Callable[[], np.ndarray]]  # name, shape, in the format, content


class Checkpoint:
    """bf16 tensors of a folder of safetensors files, read as f32."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.places: dict[str, tuple[Path, int, tuple[int, ...]]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as handle:
                size = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(size))
            for name, entry in header.items():
                if name != "__metadata__":
                    assert entry["dtype"] == "BF16", f"{file}: {name} is {entry['dtype']}, this script reads BF16"
                    self.places[name] = (file, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))

    def read(self, name: str) -> np.ndarray:
        file, offset, shape = self.places[name]
        raw = np.fromfile(file, np.uint16, int(np.prod(shape)), offset=offset)
        return (raw.astype(np.uint32) << 16).view(np.float32).reshape(shape)


def rows(model: Checkpoint) -> Iterator[Row]:
    """The tensors of the GGUF file in llama.cpp's form of them."""
    layers = model.config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3NEXT, layers)

    def named(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"gguf has no name for {name}"
        return str(found)

    for name, (_, _, shape) in model.places.items():
        if "experts." in name:
            if ".experts.0." in name:
                parts = [name.replace(".experts.0.", f".experts.{e}.") for e in range(model.config["num_experts"])]
                yield (named(name.replace(".experts.0.", ".experts.")), (len(parts), *shape), True,
                       lambda parts=parts: np.stack([model.read(part) for part in parts]))
        elif name.endswith("in_proj_qkvz.weight"):
            order = mixed_rows(model.config)
            layer = re.search(r"layers\.(\d+)", name).group(1)
            for part, take in zip(("attn_qkv", "attn_gate"), order, strict=True):
                yield (f"blk.{layer}.{part}.weight", (len(take), shape[1]), True,
                       lambda name=name, take=take: model.read(name)[take])
        else:
            plain = len(shape) == 1 or name.endswith(PLAIN)
            target = named(name.replace(".dt_bias", ".dt_proj.bias"))
            squeezed = tuple(d for d in shape if d != 1) if plain else shape
            yield target, squeezed, not plain, lambda name=name, shape=squeezed: value(model, name).reshape(shape)


def mixed_rows(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of in_proj_qkvz that are q, k and v of all heads, and those that are z: it holds [q k v z] a key head."""
    heads, key = config["linear_num_key_heads"], config["linear_key_head_dim"]
    value_ = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    index = np.arange(heads * (2 * key + 2 * value_)).reshape(heads, -1)
    q, k, v, z = np.split(index, np.cumsum([key, key, value_]), axis=1)
    return np.concatenate([q.ravel(), k.ravel(), v.ravel()]), z.ravel()


def value(model: Checkpoint, name: str) -> np.ndarray:
    """A tensor that keeps its form but for a constant that llama.cpp wants folded in."""
    data = model.read(name)
    if name.endswith("A_log"):
        return -np.exp(data)
    if name.endswith("norm.weight") and "linear_attn" not in name:
        return data + 1
    return data


def header(writer: gguf.GGUFWriter, config: dict[str, Any], format_: str) -> None:
    """The keys that llama.cpp reads for this architecture."""
    c = config
    writer.add_file_type(FILE_TYPES[format_])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(c["vocab_size"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_rope_dimension_count(int(c["head_dim"] * c["partial_rotary_factor"]))
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_expert_count(c["num_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
    writer.add_full_attention_interval(c["full_attention_interval"])
    writer.add_ssm_conv_kernel(c["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(c["linear_key_head_dim"])
    writer.add_ssm_group_count(c["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(c["linear_num_value_heads"])
    writer.add_ssm_inner_size(c["linear_value_head_dim"] * c["linear_num_value_heads"])


def main() -> None:
    folder, format_, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    model, kind = Checkpoint(folder), FORMATS[format_]
    writer = gguf.GGUFWriter(output, "qwen3next")
    header(writer, model.config, format_)
    table = list(rows(model))
    for name, shape, coded, _ in table:
        if coded:
            packed = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(np.prod(packed)), kind)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, coded, content in table:
        data = content()
        assert data.shape == shape
        writer.write_tensor_data(gguf.quantize(data, kind) if coded else data)
    writer.close()


if __name__ == "__main__":
    main()
