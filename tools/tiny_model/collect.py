"""Wait for a training run that goes on in the background, then copy its newest results.

usage: python -m tools.tiny_model.collect --run FOLDER --wait SECONDS [--out FOLDER]
Prints the end of the log. Copies the weights, their index, the log and the status: six files.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

RESULTS = ("export/model*", "log.jsonl", "train.out", "status.json")


def wait(run: Path, seconds: float) -> bool:
    """True when the run has ended; False when it was still going on."""
    deadline = time.time() + seconds
    while not (run / "status.json").exists():
        if time.time() > deadline:
            return False
        time.sleep(1)
    return True


def show(run: Path, lines: int = 25) -> None:
    for name in ("log.jsonl", "train.out", "status.json"):
        if (run / name).exists():
            print(f"== {name}")
            print("\n".join(line[:400] for line in (run / name).read_text().splitlines()[-lines:]))


def copy(run: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for pattern in RESULTS:
        for file in run.glob(pattern):
            shutil.copyfile(file, out / file.name)
            print(f"{file.name}: {file.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--wait", type=float, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ended = wait(args.run, args.wait)
    show(args.run)
    print("ended" if ended else "still running")
    if args.out:
        copy(args.run, args.out)


if __name__ == "__main__":
    main()
