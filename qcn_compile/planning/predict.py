"""Predicted times: milliseconds a token, tokens a second at a batch, milliseconds to the first token."""

from __future__ import annotations

from dataclasses import dataclass

from qcn_compile.planning.formats import Scheme
from qcn_compile.planning.shape import ModelShape
from qcn_compile.planning.work import Machine, Step, step_work
from qcn_compile.targets.cost import Parts, Work, cost, limit
from qcn_compile.targets.layout import Layout
from qcn_compile.targets.spec import Hardware

CHUNK = {"gpu": 2048, "cpu": 512}  # tokens of the largest prefill plan


@dataclass(frozen=True)
class Predictor:
    """The times of one model stored one way in one layout on one chip."""

    shape: ModelShape
    scheme: Scheme
    layout: Layout
    chip: Hardware

    @property
    def known(self) -> bool:
        """Whether the figures that times follow from are on file."""
        links = self.layout.ranks == 1 or (self.chip.link and self.chip.latency)
        return bool(self.chip.bandwidth and self.chip.flops and links)

    def step(self, step: Step) -> Parts:
        """Seconds of a step, by what bounds them. Stages of a pipeline run one after the other."""
        return cost(self._work(step), self.chip, step.tokens, self.layout.tp)

    def floor(self, step: Step) -> Parts:
        """The least the hardware allows for it."""
        return limit(self._work(step), self.chip, self.layout.tp)

    def _work(self, step: Step) -> list[Work]:
        machine = Machine.of(self.chip.kind, self.scheme)
        return step_work(self.shape, self.scheme, self.layout, machine, step)

    def decode(self, batch: int, context: int) -> Parts:
        """A token for each of `batch` sequences, dealt to the replicas."""
        return self.step(Step.decode(-(-batch // self.layout.replicas), context))

    def rate(self, batch: int, context: int) -> float:
        """Tokens a second of all replicas together with `batch` sequences in all."""
        return batch / self.decode(batch, context).seconds

    def first_token(self, prompt: int) -> float:
        """Seconds to the first token of a prompt on an idle server: its chunks one after the other."""
        chunk, total, done = CHUNK[self.chip.kind], 0.0, 0
        while done < prompt:
            size = min(chunk, prompt - done)
            total += self.step(Step(size, 1, 1, done)).seconds
            done += size
        return total
