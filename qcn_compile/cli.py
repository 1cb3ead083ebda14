"""`qcn-compile`: the command line of the compiler."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qcn_compile import __version__
from qcn_compile.commands import guarded
from qcn_compile.errors import UsageError
from qcn_compile.planning import command

if TYPE_CHECKING:
    from qcn_compile.compile import Built, Options
    from qcn_compile.pipeline import Tracing



def parser() -> argparse.ArgumentParser:
    """All flags of qcn-compile."""
    top = argparse.ArgumentParser(
        prog="qcn-compile", description="Compile a Qwen3-Next-family checkpoint into an artifact for qcn-run. "
        "With no --model, the small model that ships with the project is used.")
    top.add_argument("--version", action="version", version=f"qcn-compile {__version__}")
    top.add_argument("--model", help="checkpoint directory or Hugging Face name (default: the bundled small model)")
    top.add_argument("--target", default="cpu", help="cpu (default), a chip of `qcn-inspect targets`, "
                     "a hardware file (.toml), or null (runs nothing)")
    top.add_argument("--mcpu", help="CPU level to build for, as LLVM names it (default: this host)")
    top.add_argument("-o", "--output", default="build", help="artifact directory (default: build)")
    top.add_argument("--dtype", choices=["fp32", "bf16"], help="dtype of other weights (default: the checkpoint's)")
    top.add_argument("--quant", default="auto", choices=["auto", "none", "int8", "int4", "fp8", *command.PLANNED],
                     help="format of the big weights (default: auto); the last three, experts in 4 bits and the rest "
                     "in fp8, can be planned so far, not built")
    top.add_argument("--activations", choices=["fp32", "int8"], help="dtype quantised weights are multiplied with")
    top.add_argument("--kv-cache-dtype", choices=["auto", "bf16", "fp8", "fp8_e4m3"],
                     help="type that keys and values are cached in: fp8 (e4m3, GPU targets) halves them")
    top.add_argument("--mamba-ssm-dtype", choices=["float32", "bfloat16"],
                     help="type of DeltaNet states (default: the checkpoint's, else float32)")
    top.add_argument("--context-length", type=int, help="longest sequence (default: the model's limit)")
    top.add_argument("--weights", choices=["copied", "late", "dummy"],
                     help="copied into the build (default), bound from the checkpoint by qcn-run --model (late), or "
                     "random, for measuring (dummy); late and dummy are for GPU targets")
    top.add_argument("--tp", type=int, metavar="N", help="GPUs to split the model over (only 1 so far)")
    top.add_argument("--ep", type=int, metavar="N", help="groups of them that hold whole experts")
    top.add_argument("--mtp", action="store_true", help="also build the MTP draft head")
    top.add_argument("--force", action="store_true", help="replace an output directory that is no build of ours")
    top.add_argument("--json", action="store_true", help="print the result as one JSON object")
    top.add_argument("--emit", default="build", choices=["build", "onnx"],
                     help="build: an artifact for qcn-run (default); onnx: a folder (default: build-onnx) with the "
                     "unfused graph of one sequence, caches as inputs and outputs")
    top.add_argument("--plugin", action="append", default=[], type=Path, metavar="FILE",
                     help="Python file with passes, ops or kernels; may be repeated")
    command.add_flags(top)
    debug = top.add_argument_group("looking inside")
    debug.add_argument("--verify", action="store_true", help="run the verifier after every pass")
    debug.add_argument("--print-ir-after", default="", metavar="PASS|all", help="print the graph after a pass")
    debug.add_argument("--dump-dir", type=Path, help="write the graph after each pass as .qir files")
    debug.add_argument("--stop-after", default="", metavar="PASS", help="stop the pipeline there and print the graph")
    debug.add_argument("--disable-pass", action="append", default=[], metavar="PASS", help="leave a pass out")
    debug.add_argument("--time-passes", action="store_true", help="print seconds and op counts per pass")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("qcn-compile", lambda: command.run(args) if args.plan_only else _run(args))


def _run(args: argparse.Namespace) -> int:
    from qcn_compile.compile import Options, compile, progress_bars
    from qcn_compile.passes.base import REGISTRY
    from qcn_compile.pipeline import Tracing
    from qcn_compile.plugins import load_plugins

    if args.tp not in (None, 1):
        raise UsageError(f"--tp {args.tp}: builds are for one GPU or CPU so far; leave --tp out")
    if args.emit == "onnx":
        return _emit_onnx(args)
    load_plugins(args.plugin)  # they may bring passes that other flags name
    for name in filter(lambda n: n not in ("", "all"), [args.print_ir_after, args.stop_after, *args.disable_pass]):
        if name not in REGISTRY:
            raise UsageError(f"no pass named {name!r}; known: {', '.join(sorted(REGISTRY))}")
    tracing = Tracing(args.verify, tuple(filter(None, [args.print_ir_after])), args.dump_dir, args.stop_after)
    options = Options(dtype=args.dtype, quant=args.quant, activations=args.activations, mcpu=args.mcpu,
                      context_length=args.context_length, mtp=args.mtp, weights=args.weights, force=args.force,
                      states=args.mamba_ssm_dtype, kv=args.kv_cache_dtype, tracing=tracing,
                      disabled=tuple(args.disable_pass), plugins=tuple(args.plugin))
    if args.stop_after:
        return _stop_after(args, options)
    built = compile(args.model, args.target, args.output, options, None if args.json else progress_bars())
    _tell(args, built, tracing)
    return 0


def _emit_onnx(args: argparse.Namespace) -> int:
    from qcn_compile.onnx.emit import emit

    made = emit(args.model, Path("build-onnx" if args.output == "build" else args.output), args.force)
    size = sum(file.stat().st_size for file in made.iterdir())
    print(json.dumps({"path": str(made)}) if args.json else f"wrote {made}/model.onnx, {size / 1e6:.1f} MB in all")
    return 0


def _tell(args: argparse.Namespace, built: Built, tracing: Tracing) -> None:
    if args.json:
        print(json.dumps({"path": str(built.path), "seconds": built.seconds, "decision": built.decision.to_json(),
                          "model": built.manifest.model["name"], "note": built.note}))
        return
    print(summary(built))
    if args.time_passes:
        for name, seconds, before, after in tracing.times:
            print(f"  {name:22} {seconds * 1e3:8.1f} ms   {before:5} -> {after:5} ops")


def summary(built: Built) -> str:
    """What was built and why, in a few lines."""
    manifest, decision = built.manifest, built.decision
    size = sum(entry["bytes"] for entry in manifest.files.values())
    lines = [built.note] if built.note else []
    lines += [f"built {built.path}  {manifest.model['name']} for {manifest.target['name']}, {size / 1e6:.1f} MB, "
              f"{sum(built.seconds.values()):.1f} s"]
    lines += [f"  {key:15} {value:10} {decision.reasons.get(reason, '')}" for key, value, reason in [
        ("dtype", decision.base, "dtype"), ("quantisation", decision.format, "quant"),
        ("activations", decision.activations, "activations"), ("states", decision.states, "states"),
        ("KV cache", decision.kv, "kv"),
        ("context", str(decision.context_length), "context_length")]]
    lines += ["  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in built.seconds.items())]
    return "\n".join([*lines, f"run it: qcn-run {built.path} --prompt 'def fib(n):'"])


def _stop_after(args: argparse.Namespace, options: Options) -> int:
    """Trace and run passes up to one of them, print the graph, build nothing."""
    from qcn_compile.compile import optimised
    from qcn_compile.ir.text import print_graph

    print(print_graph(optimised(args.model, args.target, options)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
