"""Train the tiny model for a given time on whatever device there is.

usage: python -m tools.tiny_model.train --data FOLDER --run FOLDER --minutes 18
The schedule follows the clock, so the learning rate reaches zero when the time is up. About once a minute the run folder gets
a fresh `export/` (the checkpoint), and every line of `log.jsonl` is one measurement. `status.json` tells when it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import model as model_module
from .batches import batches, heldout_windows, load_tokens
from .config import TinyConfig
from .export import export
from .model import TinyNext
from .optimizer import Optimizer

MTP_WEIGHT, BALANCE_WEIGHT, ROUTER_Z_WEIGHT, Z_WEIGHT = 0.3, 0.005, 1e-3, 1e-4
DECAY_FROM = 0.5  # share of the time after which the rate falls linearly to zero
COMPILE_LIMIT_S = 200
SAVE_EVERY_S = 60


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (mean cross entropy, mean squared log partition)."""
    logits = logits.float().flatten(0, 1)
    partition = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets.reshape(-1, 1))[:, 0]
    return (partition - chosen).mean(), partition.square().mean()


class Objective:
    """The training loss of one batch; the layers and the output head may be compiled, each as its own region."""

    def __init__(self, model: TinyNext) -> None:
        self.model = model
        self.head: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = self._head

    def _head(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_loss(self.model.lm_head(hidden), targets)

    def compile(self) -> None:
        torch._functorch.config.backward_pass_autocast = "off"  # as in eager mode: fp32 stays fp32 in the backward pass
        for layer in [*self.model.model.layers, *self.model.mtp.layers]:
            layer.compile(dynamic=False)
        self.head = torch.compile(self._head, dynamic=False)

    def uncompile(self) -> None:
        torch._dynamo.reset()
        for layer in [*self.model.model.layers, *self.model.mtp.layers]:
            layer._compiled_call_impl = None
        self.head = self._head

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B, T + 2] -> (total loss, [main, MTP, balance, router z, mean squared log partition])."""
        hidden, routers = self.model.hidden(ids[:, :-2])
        main, z = self.head(hidden, ids[:, 1:-1])
        drafted, draft_router = self.model.draft(ids[:, 1:-1], hidden)
        mtp, _ = self.head(drafted, ids[:, 2:])
        routers = torch.cat([routers, draft_router])
        balance, router_z = routers[:, 0].mean(), routers[:, 1].mean()
        total = main + MTP_WEIGHT * mtp + BALANCE_WEIGHT * balance + ROUTER_Z_WEIGHT * router_z + Z_WEIGHT * z
        return total, torch.stack([main, mtp, balance, router_z, z]).detach()


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread when the block takes longer."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


class Trainer:
    """State of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begun = args, time.time()
        self.run = Path(args.run)
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "log.jsonl").unlink(missing_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.model = TinyNext(TinyConfig()).to(self.device)
        self.objective, self.optimizer = Objective(self.model), Optimizer(self.model)
        data = Path(args.data)
        self.facts = json.loads((data / "data.json").read_text())
        self.heldout = heldout_windows(load_tokens(data / "heldout.xz"), args.length, self.device)
        self.batches = batches(load_tokens(data / "train.xz"), args.batch, args.length, self.device)

    def elapsed(self) -> float:
        return time.time() - self.begun

    def log(self, **values: object) -> None:
        line = json.dumps({"t": round(self.elapsed(), 1), **values})
        with (self.run / "log.jsonl").open("a") as out:
            out.write(line + "\n")
        print(line, flush=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def backward(self, ids: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            total, parts = self.objective(ids)
        total.backward()
        return parts

    def _try_mode(self, mode: str, ids: torch.Tensor) -> bool:
        """One forward and backward pass in a mode; False, with the reason in the log, when it fails."""
        self.objective.uncompile()
        if mode == "compile around the delta rule":
            model_module.gated_delta_rule = torch.compiler.disable(model_module.gated_delta_rule)
        if mode != "eager":
            self.objective.compile()
        start = time.time()
        try:
            with time_limit(COMPILE_LIMIT_S):
                loss = self.backward(ids)[0].item()
        except Exception as error:  # whatever the compiler throws, training must go on
            self.log(mode=mode, failed=f"{type(error).__name__}: {str(error)[:2000]}")
            return False
        self.log(mode=mode, first_loss=round(loss, 4), seconds=round(time.time() - start, 1))
        return loss < 12

    def choose_mode(self) -> None:
        """Compile if that works here, else compile less, else nothing."""
        modes = ["compile", "compile around the delta rule", "eager"]
        ids = next(self.batches)
        for mode in modes[-1:] if self.args.eager else modes:
            works = self._try_mode(mode, ids)
            self.model.zero_grad(set_to_none=True)
            if works:
                return
        raise RuntimeError("no mode works")

    def rate(self, step: int) -> float:
        progress = self.elapsed() / (60 * self.args.minutes)
        fall = min(1.0, max(0.0, (1 - progress) / (1 - DECAY_FROM)))
        return self.args.rate * min(1.0, (step + 1) / self.args.warmup) * fall

    def heldout_loss(self) -> dict[str, float]:
        """Approximate: the last batch wraps around. Same shapes and gradient mode as training, so nothing recompiles."""
        batch, count = self.args.batch, len(self.heldout)
        wrapped = torch.arange(-(-count // batch) * batch, device=self.device) % count
        parts = []
        for start in range(0, len(wrapped), batch):
            with self.autocast():
                parts.append(self.objective(self.heldout[wrapped[start : start + batch]])[1])
        main, mtp = torch.stack(parts).mean(0)[:2].tolist()
        return {"heldout": round(main, 4), "heldout_mtp": round(mtp, 4)}

    def save(self) -> None:
        """Replace run/export at once, so that a reader never sees half of it."""
        fresh, final = self.run / "export.new", self.run / "export"
        shutil.rmtree(fresh, ignore_errors=True)
        export(self.model, fresh)
        shutil.rmtree(final, ignore_errors=True)
        fresh.rename(final)

    def train(self) -> None:
        args, step, last_log, last_save = self.args, 0, time.time(), time.time()
        limit = 60 * args.minutes
        self.choose_mode()
        tokens = 0
        for ids in self.batches:
            if self.elapsed() >= limit or step == args.steps:
                break
            parts, norm = self.backward(ids), self.optimizer.step(self.rate(step))
            step, tokens = step + 1, tokens + ids.shape[0] * args.length
            if step % args.log_every == 0:
                main, mtp, balance, router_z, z = (round(v, 4) for v in parts.tolist())
                speed = round(tokens / (time.time() - last_log))
                self.log(step=step, loss=main, mtp=mtp, balance=balance, router_z=router_z, z=z,
                         norm=round(norm.item(), 3), rate=round(self.rate(step), 6), tokens_per_s=speed)  # fmt: skip
                last_log, tokens = time.time(), 0
                if main != main:
                    raise FloatingPointError("the loss is not a number")
            if time.time() - last_save > SAVE_EVERY_S and self.elapsed() < limit - 15:
                self.log(step=step, **self.heldout_loss())
                self.save()
                last_save = time.time()
        self.save()
        self.log(step=step, **self.heldout_loss(), seen=step * args.batch * args.length)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps (for trials)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eager", action="store_true")
    return parser.parse_args()


def main() -> int:
    args = parse()
    status = Path(args.run) / "status.json"
    status.unlink(missing_ok=True)
    try:
        Trainer(args).train()
        result = {"ended": "complete"}
    except BaseException as error:
        traceback.print_exc()
        result = {"ended": f"{type(error).__name__}: {error}"}
    status.write_text(json.dumps({**result, "pid": os.getpid()}) + "\n")
    return 0 if result["ended"] == "complete" else 1


if __name__ == "__main__":
    sys.exit(main())
