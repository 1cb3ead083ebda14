"""`qcn-compile --plan-only`: the verdict alone, in well under a second, on a machine that needs nothing but Python."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcn_compile.planning.choose import BUDGET, SLOTS, Ask
from qcn_compile.planning.model import find_config, has_fp8_blocks
from qcn_compile.planning.table import lines
from qcn_compile.planning.verdict import Verdict, decide_plan
from qcn_compile.targets.spec import Hardware, chip_of

DTYPES = {"fp32": "f32", "bf16": "bf16"}
WISHES = ("max_running_requests", "memory", "error_budget", "gpus", "tp", "ep", "pp")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What only planning needs to know."""
    g = parser.add_argument_group("planning")
    g.add_argument("--plan-only", action="store_true", help="print whether it fits, what it would take and how fast it "
                   "should be; build nothing")
    g.add_argument("--gpus", type=int, metavar="N", help="GPUs to lay it out on (default: the fewest that hold it)")
    g.add_argument("--pp", type=int, metavar="N", help="stages of consecutive layers, one after the other, each "
                   "on --tp ranks (default: 1)")
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
    return decide_plan(ask_of(name, config, chip, args.quant, base, args.context_length, **wishes(args)))


def wishes(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_flags`, --tp and --ep, as `ask_of` takes them."""
    return {name: getattr(args, name) for name in WISHES}


def ask_of(name: str, config: dict[str, Any], chip: Hardware, quant: str, base: str, context: int | None, *,
           max_running_requests: int | None = None, memory: float | None = None, error_budget: float | None = None,
           gpus: int | None = None, tp: int | None = None, ep: int | None = None, pp: int | None = None,
           errors: Mapping[str, float] | None = None) -> Ask:
    """What flags ask for a model. `memory` in GB; `errors`: of formats on its own weights, where measured."""
    return Ask(config.get("text_config") or config, name, chip, memory * 1e9 if memory else memory_of(chip),
               quant=quant, base=base, context=context, requests=max_running_requests or 1,
               slots=max_running_requests or SLOTS, gpus=gpus, tp=tp, ep=ep, pp=pp,
               budget=BUDGET[chip.kind] if error_budget is None else error_budget, errors=errors or {},
               fp8_blocks=has_fp8_blocks(config))


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
