"""The harness of the prefix cache's tests: a runner that notices every wrong page and state."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "prefix"))
