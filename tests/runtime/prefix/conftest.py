"""Makes prefix_harness.py and agent_replay.py importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
