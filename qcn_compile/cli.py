"""`qcn-compile`: the command line of the compiler."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qcn_compile import __version__
from qcn_compile.commands import guarded
from qcn_compile.errors import UsageError
from qcn_compile.flags import check
from qcn_compile.planning import command
from qcn_compile.planning.table import lines

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
    top.add_argument("--mcpu", help="CPU level to build for, as LLVM names it; portable: AVX2, with VNNI kernels "
                     "taken where the processor has it; arm64: any, with dot product kernels likewise "
                     "(default: this host)")
    top.add_argument("-o", "--output", default="build", help="artifact directory (default: build)")
    top.add_argument("--dtype", choices=["fp32", "bf16"], help="dtype of other weights (default: the checkpoint's)")
    top.add_argument("--quant", default="auto", metavar="NAME", help="format of the big weights: none, int8, int4, "
                     "int4-experts (the rest in 8 bits), fp8, nvfp4 (experts, the rest fp8); mxfp4 can be planned, not "
                     "built; or one for each class, as in experts=int4,dense=int8,head=none (default: auto, the "
                     "planner chooses)")
    top.add_argument("--activations", choices=["fp32", "int8"], help="dtype quantised weights are multiplied with")
    top.add_argument("--calibrate", type=Path, metavar="TEXT", help="a text, or a .jsonl file of lines with a key "
                     "text, like what the model will read: int4 codes are chosen by what they do to it (GPTQ)")
    top.add_argument("--kv-cache-dtype", choices=["auto", "bf16", "fp8", "fp8_e4m3"],
                     help="type that keys and values are cached in: fp8 (e4m3, GPU targets) halves them")
    top.add_argument("--mamba-ssm-dtype", choices=["float32", "bfloat16"],
                     help="type of DeltaNet states (default: the checkpoint's, else float32)")
    top.add_argument("--context-length", type=int, help="longest sequence (default: the model's limit)")
    top.add_argument("--weights", choices=["copied", "late", "dummy"],
                     help="copied into the build (default), bound from the checkpoint by qcn-run --model (late), or "
                     "random, for measuring (dummy); late and dummy are for GPU targets")
    top.add_argument("--tp", type=int, metavar="N", help="ranks to split the model over (default: 1, or --ep)")
    top.add_argument("--ep", type=int, metavar="M", help="groups among them that hold whole experts (default: 1)")
    top.add_argument("--mtp", action="store_true", help="also build the MTP draft head")
    top.add_argument("--force", action="store_true", help="replace an output directory that is no build of ours")
    top.add_argument("--json", action="store_true", help="print the result as one JSON object")
    top.add_argument("--emit", default="build", choices=["build", "onnx", "onnx-fused"],
                     help="build: an artifact for qcn-run (default); onnx: a folder (default: build-onnx) with the "
                     "graph of one sequence as traced, caches as inputs and outputs; onnx-fused: the same after the "
                     "passes, up to --stop-after")
    top.add_argument("--plugin", action="append", default=[], type=Path, metavar="FILE",
                     help="Python file with passes, ops or kernels; may be repeated")
    command.add_flags(top)
    debug = top.add_argument_group("looking inside")
    debug.add_argument("--verify", action="store_true", help="run the verifier after every pass")
    debug.add_argument("--print-ir-after", default="", metavar="PASS|all", help="print the graph after a pass")
    debug.add_argument("--dump-dir", type=Path, help="write the graph as traced and after each pass as .qir files")
    debug.add_argument("--stop-after", default="", metavar="PASS", help="stop the pipeline there and print the graph")
    debug.add_argument("--disable-pass", action="append", default=[], metavar="PASS", help="leave a pass out")
    debug.add_argument("--time-passes", action="store_true", help="print seconds and op counts per pass")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("qcn-compile", lambda: command.run(args) if args.plan_only else _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.emit == "onnx" and (args.stop_after or args.disable_pass or args.quant != "auto"):
        raise UsageError("--emit onnx writes the graph before any pass; with --stop-after, --disable-pass or --quant, "
                         "use --emit onnx-fused")
    check(args, _output(args))
    from qcn_compile.compile import Options, compile
    from qcn_compile.passes.base import REGISTRY
    from qcn_compile.pipeline import Tracing
    from qcn_compile.plugins import load_plugins
    from qcn_compile.progress import progress_bars

    load_plugins(args.plugin)  # they may bring passes that other flags name
    for name in filter(lambda n: n not in ("", "all"), [args.print_ir_after, args.stop_after, *args.disable_pass]):
        if name not in REGISTRY:
            raise UsageError(f"no pass named {name!r}; known: {', '.join(sorted(REGISTRY))}")
    tracing = Tracing(args.verify, tuple(filter(None, [args.print_ir_after])), args.dump_dir, args.stop_after)
    options = Options(dtype=args.dtype, quant=args.quant, activations=args.activations, mcpu=args.mcpu,
                      context_length=args.context_length, mtp=args.mtp, weights=args.weights, force=args.force,
                      calibrate=args.calibrate, kv=args.kv_cache_dtype, states=args.mamba_ssm_dtype,
                      tracing=tracing,
                      disabled=tuple(args.disable_pass), plugins=tuple(args.plugin), **command.wishes(args))
    if args.emit != "build":
        return _emit_onnx(args, options)
    if args.stop_after:
        return _stop_after(args, options)
    quiet = args.json
    built = compile(args.model, args.target, args.output, options, None if quiet else progress_bars(),
                    None if quiet else lambda verdict: print("\n".join(lines(verdict)), flush=True))
    _tell(args, built, tracing)
    return 0


def _output(args: argparse.Namespace) -> Path:
    return Path("build-onnx" if args.emit != "build" and args.output == "build" else args.output)


def _emit_onnx(args: argparse.Namespace, options: Options) -> int:
    from qcn_compile.onnx.emit import emit

    fused = args.emit == "onnx-fused"
    plain = args.quant in ("auto", "none")
    options = replace(options, dtype=args.dtype or "fp32", quant="none" if plain else args.quant,
                      activations=None if plain else args.activations or "fp32")
    made = emit(args.model, _output(args), options if fused else None, args.force)
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
    text = [built.note] if built.note else []
    text += [f"built {built.path}  {manifest.model['name']} for {manifest.target['name']}, {size / 1e6:.1f} MB, "
              f"{sum(built.seconds.values()):.1f} s"]
    text += [f"  {key:15} {value:10} {decision.reasons.get(reason, '')}" for key, value, reason in [
        ("dtype", decision.base, "dtype"), ("quantisation", decision.format, "quant"),
        *([("calibrated", "GPTQ", "calibrated")] if "calibrated" in decision.reasons else []),
        ("layout", str(decision.layout), "layout"), ("activations", decision.activations, "activations"),
        ("KV cache", decision.kv, "kv"),
        ("states", decision.states, "states"),
        ("context", str(decision.context_length), "context_length")]]
    text += ["  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in built.seconds.items())]
    return "\n".join([*text, f"run it: qcn-run {built.path} --prompt 'def fib(n):'"])


def _stop_after(args: argparse.Namespace, options: Options) -> int:
    """Trace and run passes up to one of them, print the graph, build nothing."""
    from qcn_compile.compile import optimised
    from qcn_compile.ir.text import print_graph

    print(print_graph(optimised(args.model, args.target, options)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
