"""llama.cpp on a GGUF file: python speed.py GGUF THREADS PROMPT NEW. Needs llama-cpp-python; prints one JSON object.

As llama-bench does it: a warm-up, a prompt of random tokens in one batch, then random tokens one by one. Nothing is
sampled, logits are made for the last token of a batch. Memory is what is resident in the end.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np


def decode(context: ctypes.c_void_p, ids: np.ndarray) -> None:
    """One batch through the model, and its logits."""
    tokens = (ctypes.c_int32 * len(ids))(*ids.tolist())
    failed = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
    assert failed == 0, f"llama_decode returned {failed}"
    llama_cpp.llama_synchronize(context)


def opened(path: str, threads: int, length: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Model and context, everything else as llama.cpp has it by default."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp cannot load {path}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = length, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, "llama.cpp makes no context"
    return model, context


def main() -> None:
    path, (threads, prompt, new) = sys.argv[1], map(int, sys.argv[2:5])
    model, context = opened(path, threads, -(-(prompt + new + 64) // 256) * 256)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    ids = np.random.default_rng(0).integers(0, vocabulary, prompt + new)
    memory = llama_cpp.llama_get_memory(context)
    decode(context, ids[:16])
    decode(context, ids[:1])
    llama_cpp.llama_memory_clear(memory, True)
    start = time.perf_counter()
    decode(context, ids[:prompt])
    middle = time.perf_counter()
    for i in range(prompt, prompt + new):
        decode(context, ids[i:i + 1])
    end = time.perf_counter()
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,))
    resident = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps({"prefill": prompt / (middle - start), "decode": new / (end - middle),
                      "rss": 1024 * int(resident.group(1)) if resident else 0, "weights": Path(path).stat().st_size,
                      "finite": bool(np.isfinite(logits).all()), "version": llama_cpp.__version__}))


if __name__ == "__main__":
    main()
