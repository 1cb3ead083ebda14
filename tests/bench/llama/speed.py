"""llama.cpp on a GGUF file: python speed.py GGUF THREADS PROMPT NEW. Needs llama-cpp-python; prints one JSON object.

A warm-up, a prompt of random tokens in one batch, then tokens one by one, sampled as on our side (temperature 1 among
the 40 most likely); decode is the rate of the median step. Memory is what is resident in the end.
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


def sampler() -> ctypes.c_void_p:
    """Temperature 1 among the 40 most likely."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for part in (llama_cpp.llama_sampler_init_top_k(40), llama_cpp.llama_sampler_init_temp(1.0),
                 llama_cpp.llama_sampler_init_dist(0)):
        llama_cpp.llama_sampler_chain_add(chain, part)
    return chain


def main() -> None:
    path, (threads, prompt, new) = sys.argv[1], map(int, sys.argv[2:5])
    model, context = opened(path, threads, -(-(prompt + new + 64) // 256) * 256)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    ids, chain = np.random.default_rng(0).integers(0, vocabulary, prompt), sampler()
    memory = llama_cpp.llama_get_memory(context)
    decode(context, ids[:16])
    decode(context, ids[:1])
    llama_cpp.llama_memory_clear(memory, True)
    start = time.perf_counter()
    decode(context, ids)
    token = llama_cpp.llama_sampler_sample(chain, context, -1)
    times = [time.perf_counter()]
    for _ in range(new):
        decode(context, np.array([token]))
        token = llama_cpp.llama_sampler_sample(chain, context, -1)
        times.append(time.perf_counter())
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,))
    resident = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps({"prefill": prompt / (times[0] - start), "decode": 1 / float(np.median(np.diff(times))),
                      "rss": 1024 * int(resident.group(1)) if resident else 0, "weights": Path(path).stat().st_size,
                      "finite": bool(np.isfinite(logits).all()), "version": llama_cpp.__version__}))


if __name__ == "__main__":
    main()
