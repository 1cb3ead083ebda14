"""qcn-run on a build: python our_speed.py BUILD THREADS PROMPT NEW; prints one JSON object, as llama/speed.py does.

Tokens are sampled, so that every step routes to other experts. Decode is the rate of the median step: on a machine with
other jobs a mean holds what they took. Memory: resident in the end.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import numpy as np

from qcn_compile import load
from qcn_compile.artifact import read_plan


def main() -> None:
    build, (threads, prompt, new) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    with load(build, threads=threads, context_length=prompt + new + 64, huge_pages=True,
              max_running_requests=1) as model:
        ids = np.random.default_rng(0).integers(1, model.manifest.vocab_size, prompt).tolist()
        sampling = {"temperature": 1.0, "top_k": 40, "top_p": 1.0, "seed": 0, "ignore_eos": True}
        list(model.generate(ids[:16], max_tokens=2, **sampling))
        times = []
        for last in model.generate(ids, max_tokens=new, **sampling):
            timing = last.timing
            times.append(time.perf_counter())
        resident = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
        plan = read_plan(build, "plan/main-decode-1.json")
        print(json.dumps({"prefill": timing.prefill_rate, "decode": 1 / float(np.median(np.diff(times))),
                          "region": model.executable.region_seconds(),
                          "rss": 1024 * int(resident.group(1)) if resident else 0,
                          "weights": sum(f.stat().st_size for f in (build / "weights").iterdir()),
                          "bytes": sum(launch.bytes for launch in plan.launches)}))


if __name__ == "__main__":
    main()
