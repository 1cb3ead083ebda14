"""transformers, eager, bf16: python eager_speed.py CHECKPOINT THREADS PROMPT NEW; prints one JSON object.

A prompt in one pass and then tokens one by one, 1/8 as many as asked for, since they take seconds.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen3NextForCausalLM


@torch.inference_mode()
def main() -> None:
    folder, (threads, prompt, new) = sys.argv[1], map(int, sys.argv[2:5])
    torch.set_num_threads(threads)
    model = Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    ids = torch.randint(0, model.config.vocab_size, (1, prompt + new), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    cache = model(ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    middle, steps = time.perf_counter(), max(1, new // 8)
    for i in range(prompt, prompt + steps):
        cache = model(ids[:, i:i + 1], past_key_values=cache, use_cache=True).past_key_values
    end = time.perf_counter()
    resident = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps({"prefill": prompt / (middle - start), "decode": steps / (end - middle),
                      "rss": 1024 * int(resident.group(1)) if resident else 0,
                      "weights": sum(2 * p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
