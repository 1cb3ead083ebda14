"""The soak of tests/bench/soak.py for 20 seconds: what it looks for is there to be found at any length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "soak.py"


def test_everything_is_given_back(build):
    flags = ["--minutes", "0.33", "--cases", "12", "--health-ms", "1500"]  # a test machine is busy with other tests
    command = [sys.executable, str(SCRIPT), str(build), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    result = json.loads(done.stdout)
    assert done.returncode == 0 and not result["faults"], result
    assert result["clients_killed"] and all(result["ended"][kind] for kind in ("plain", "cancelled", "slow"))
