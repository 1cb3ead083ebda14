"""`qcn-compile --plan-only`: the verdict alone, in well under a second, on a machine that needs nothing but Python."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from qcn_compile.planning.choose import BUDGET, SLOTS, Ask
from qcn_compile.planning.model import find_config, has_fp8_blocks
from qcn_compile.planning.table import lines
from qcn_compile.planning.verdict import Verdict, decide_plan
from qcn_compile.targets.spec import Hardware, chip_of

PLANNED = ("int4-experts", "nvfp4", "mxfp4")  # schemes that --quant takes for planning alone
DTYPES = {"fp32": "f32", "bf16": "bf16"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What only planning needs to know."""
    g = parser.add_argument_group("planning")
    g.add_argument("--plan-only", action="store_true", help="print whether it fits, what it would take and how fast it "
                   "should be; build nothing")
    g.add_argument("--gpus", type=int, metavar="N", help="GPUs to lay it out on (default: the fewest that hold it)")
    g.add_argument("--pp", type=int, metavar="N", help="stages of consecutive layers, one after the other")
    g.add_argument("--max-running-requests", type=int, metavar="N", help="requests at once that must fit, each with "
                   f"the whole context (default: one with the whole context, states for {SLOTS})")
    g.add_argument("--memory", type=float, metavar="GB", help="memory of a chip (default: its data file's; for a CPU "
                   "without one, this machine's)")
    g.add_argument("--error-budget", type=float, metavar="X", help="relative error of a weight that an automatic "
                   f"choice may cost while anything else fits (default: {BUDGET['gpu']}, for a CPU {BUDGET['cpu']})")


def verdict_of(args: argparse.Namespace) -> Verdict:
    """The verdict for a command line. Raises a QcnError that names what cannot be."""
    chip = chip_of(args.target, args.mcpu)
    name, config = find_config(args.model, chip.kind)
    base = DTYPES[args.dtype] if args.dtype else "bf16"
    degrees = {"tp": args.tp, "ep": args.ep, "pp": args.pp}
    requests = args.max_running_requests
    memory = args.memory * 1e9 if args.memory else memory_of(chip)
    return decide_plan(Ask(
        config, name, chip, memory, quant=args.quant, base=base, context=args.context_length,
        requests=requests or 1, slots=requests or SLOTS, gpus=args.gpus,
        budget=BUDGET[chip.kind] if args.error_budget is None else args.error_budget,
        fp8_blocks=has_fp8_blocks(config), **degrees))


def memory_of(chip: Hardware) -> float:
    """Bytes of a chip's memory; of this machine's for a CPU whose file gives none."""
    if chip.memory is not None:
        return chip.memory.value * 1e9
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(min(machine, int(text)) if text.isdigit() else machine)


def run(args: argparse.Namespace) -> int:
    """Print the verdict; 0 when it fits, 2 when it does not."""
    verdict = verdict_of(args)
    print(json.dumps(verdict.to_json()) if args.json else "\n".join(lines(verdict)))
    return 0 if verdict.fits else 2
