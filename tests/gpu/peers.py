"""The numbers that other servers were measured by: prompts of 1024 tokens, 32 and 288 new ones, the difference a step.

    python tests/gpu/peers.py BUILD [1 8 32 128]

Random prompts, greedy, no prefix cache, no drafts; the prompts of a batch are computed in both runs, so the difference
is 256 steps of the whole batch, host included. Then prompts of 1024 and 8192 tokens to their first token.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np

from qcn_compile import load
from qcn_compile.errors import CapacityError

PROMPT, SHORT, LONG = 1024, 32, 288


def seconds(model: Any, batch: int, length: int, tokens: int, seed: int) -> float:
    """Of `batch` requests at once, each of `tokens` new tokens after `length` random ones."""
    prompts = np.random.default_rng(seed).integers(0, 150000, (batch, length)).tolist()
    begun = time.perf_counter()
    streams = [model.generate(p, temperature=0.0, max_tokens=tokens, ignore_eos=True) for p in prompts]
    count = sum(len(output.token_ids) for stream in streams for output in stream)
    assert count == batch * tokens, f"{count} tokens of {batch} x {tokens}"
    return time.perf_counter() - begun


def steps(model: Any, batch: int) -> None:
    """One line of the table: the median of differences."""
    seconds(model, batch, PROMPT, 4, 0)
    found = [(seconds(model, batch, PROMPT, LONG, seed) - seconds(model, batch, PROMPT, SHORT, seed)) / (LONG - SHORT)
             for seed in range(3 if batch < 32 else 1)]
    step = float(np.median(found))
    print(f"batch {batch:3d}: {1e3 * step:.3f} ms a step ({1e3 * min(found):.3f} to {1e3 * max(found):.3f}), "
          f"{batch / step:.0f} tokens/s", flush=True)


def first_tokens(model: Any) -> None:
    """Prompts of 1024 and 8192 tokens, alone: milliseconds to the first token, tokens/s of the prompt."""
    for length in (1024, 8192):
        found = [seconds(model, 1, length, 1, seed) for seed in range(6)][1:]
        took = float(np.median(found))
        print(f"prompt of {length}: first token after {1e3 * took:.1f} ms ({1e3 * min(found):.1f} to "
              f"{1e3 * max(found):.1f}), {length / took:.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build")
    parser.add_argument("batches", nargs="*", type=int, default=[1, 8, 32, 128])
    args = parser.parse_args()
    for most in sorted(args.batches, reverse=True):
        try:
            with load(args.build, context_length=PROMPT + LONG + 32, max_running_requests=most) as model:
                print(model.describe(), flush=True)
                for batch in (b for b in args.batches if b <= most):
                    steps(model, batch)
            break
        except CapacityError as error:
            print(f"batch {most}: {error}", file=sys.stderr)
    with load(args.build, context_length=8192 + 32, max_running_requests=1) as model:
        first_tokens(model)


if __name__ == "__main__":
    main()
