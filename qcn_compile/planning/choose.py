"""Choose how a model is stored and laid out: every candidate is checked, then scored by the cost model; each that loses
keeps the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qcn_compile.errors import UsageError
from qcn_compile.planning.errors import relative_errors
from qcn_compile.planning.formats import EXPERTS_ONLY, Scheme, scheme_of, schemes
from qcn_compile.planning.memory import Needs, elements, needs
from qcn_compile.planning.predict import Predictor
from qcn_compile.planning.shape import ModelShape, shape_of
from qcn_compile.targets.layout import Layout, layout_for, problem_of
from qcn_compile.targets.spec import Hardware

SHORT = 4096  # tokens of context that make a plan worth having when none is asked for
FILL = 8192  # tokens of context that times are predicted at, less where the context is shorter
BUDGET = {"gpu": 0.05, "cpu": 0.12}  # relative error of a weight that a choice may cost: a CPU gains most from 4 bits
SMALL = 256 << 20  # bytes in bf16 up to which a model gains nothing from quantisation that a user would notice
SLOTS = 16  # states of running requests that a server asks for by default
KERNELS = {"triton": ("bf16", "fp8", "int4-g128", "nvfp4"), "tvm": ("f32", "bf16", "int8", "int4"), "": ()}
"""Formats that kernels are written for, by backend."""


@dataclass(frozen=True)
class Ask:
    """What a user wants: None and "auto" leave the choice open. `memory`: bytes of one chip.

    `requests` must fit with a whole context each, states for `slots` requests beside them.
    """

    config: Mapping[str, Any]
    name: str
    chip: Hardware
    memory: float
    quant: str = "auto"
    base: str = "bf16"
    context: int | None = None
    requests: int = 1
    slots: int = SLOTS
    gpus: int | None = None
    tp: int | None = None
    ep: int | None = None
    pp: int | None = None
    budget: float = 0.05
    errors: Mapping[str, float] = field(default_factory=dict)
    fp8_blocks: bool = False

    @property
    def shape(self) -> ModelShape:
        return shape_of(self.config)

    def room(self, layout: Layout) -> tuple[int, int]:
        """(requests with a whole context, states) that each replica must have room for."""
        requests = -(-self.requests // layout.replicas)
        return requests, max(requests, self.slots)

    @property
    def fixed(self) -> bool:
        """Whether a degree was asked for."""
        return any(degree is not None for degree in (self.tp, self.ep, self.pp))


@dataclass(frozen=True)
class Candidate:
    """One way to store and lay out the model.

    problem: why it is out of the question, or "". over: why it is a last resort, or "": its error exceeds the budget.
    seconds: predicted for a step with the asked requests. planned: no kernels are written for it yet.
    """

    scheme: Scheme
    layout: Layout
    needs: Needs
    problem: str
    over: str
    seconds: float
    planned: bool

    @property
    def grade(self) -> tuple[bool, bool, bool, bool]:
        """Smaller is better, before any speed: possible, buildable, within the error budget, not in stages."""
        return bool(self.problem), self.planned, bool(self.over), self.layout.pp > 1

    @property
    def title(self) -> str:
        return f"{self.scheme.name}, {self.layout}"


def candidates(ask: Ask) -> list[Candidate]:
    """All candidates, the best first, those with a problem last. Raises UsageError for an ask that can't be met."""
    shape_of(ask.config)  # a config that is not understood is the first thing to say
    known = schemes(ask.chip.kind, ask.base)
    if ask.quant != "auto":
        known = [scheme_of(ask.quant, ask.chip.kind, ask.base)]
    layouts = list(_layouts(ask))
    found = [_candidate(ask, scheme, layout) for scheme in known for layout in layouts]
    return sorted(found, key=lambda c: (*c.grade, round(c.seconds * 1e5), c.needs.weights if not c.seconds else 0,
                                        c.layout.pp, c.layout.ep))


def _layouts(ask: Ask) -> Iterator[Layout]:
    """The layouts to look at: the one asked for, or all of the asked number of chips. Raises UsageError for none."""
    blocks = ask.fp8_blocks and ask.quant in ("auto", "fp8")
    if ask.fixed:
        ep, pp = (1 if n is None else n for n in (ask.ep, ask.pp))
        tp = ep if ask.tp is None else ask.tp
        ranks = max(1, tp * pp)
        if ask.gpus is not None and ask.gpus % ranks:
            raise UsageError(f"--gpus {ask.gpus}: a replica of --tp {tp} --pp {pp} takes {ranks}; "
                             f"choose a multiple of {ranks}")
        yield layout_for(ask.config, tp, ep, pp, (ask.gpus or ranks) // ranks, blocks)
        return
    gpus = 1 if ask.gpus is None else ask.gpus
    if gpus < 1:
        raise UsageError(f"--gpus {gpus}: must be at least 1")
    if gpus > 1 and ask.chip.kind == "cpu":
        raise UsageError(f"--gpus {gpus}: a CPU build is for one machine; leave it out")
    for tp, ep, pp in degrees(gpus):
        replicas = gpus // (tp * pp)
        if not problem_of(ask.config, tp, ep, pp, replicas, blocks):
            yield layout_for(ask.config, tp, ep, pp, replicas, blocks)


def degrees(gpus: int) -> Iterator[tuple[int, int, int]]:
    """(tp, ep, pp) whose product of tp and pp divides a number of chips, ep dividing tp."""
    for tp in (n for n in range(1, gpus + 1) if gpus % n == 0):
        for pp in (n for n in range(1, gpus // tp + 1) if gpus // tp % n == 0):
            for ep in (n for n in range(1, tp + 1) if tp % n == 0):
                yield tp, ep, pp


def _candidate(ask: Ask, scheme: Scheme, layout: Layout) -> Candidate:
    need = needs(ask.shape, scheme, layout, ask.chip, ask.memory)
    problem = _problem(ask, scheme, layout, need)
    context = min(FILL, ask.context or FILL)
    predict = Predictor(ask.shape, scheme, layout, ask.chip)
    seconds = predict.decode(ask.requests, context).seconds if predict.known else 0.0
    planned = not _written(scheme, ask.chip.backend)
    return Candidate(scheme, layout, need, problem, _over(ask, scheme), seconds, planned)


def _written(scheme: Scheme, backend: str) -> bool:
    """Whether there are kernels for each class of weights."""
    elsewhere = {scheme.dense, scheme.head}
    return set(scheme.formats) <= set(KERNELS[backend]) and not elsewhere & set(EXPERTS_ONLY)


def _over(ask: Ask, scheme: Scheme) -> str:
    """Why a scheme is no automatic choice while another fits: nothing to gain, or its error."""
    shape = ask.shape
    size = 2 * sum(elements(shape, Layout(), shape.delta_layers, shape.attention_layers, True, True).values())
    if ask.quant == "auto" and size <= SMALL and scheme.name != "none":
        return f"{size / 1e6:.1f} MB in bf16 is small: nothing to gain from fewer bits"
    errors = {**relative_errors(), **ask.errors}
    worst = max(scheme.formats, key=lambda f: errors.get(f, 0.0))
    if ask.quant != "auto" or errors.get(worst, 0.0) <= ask.budget:
        return ""
    return f"weights in {worst} are off by {errors[worst]:.1%}, the error budget is {ask.budget:.1%}"


def _problem(ask: Ask, scheme: Scheme, layout: Layout, need: Needs) -> str:
    """Why a candidate cannot be: a format that the chip lacks, or memory; with the number that breaks."""
    lacking = [f for f in scheme.formats if f.partition("-")[0] not in (*ask.chip.dtypes, "f32")]
    if lacking:
        return f"{ask.chip.name} has no {', '.join(lacking)}"
    requests, slots = ask.room(layout)
    context = ask.context or min(SHORT, ask.shape.longest)
    want = requests * need.kv(context) + slots * need.slot
    if need.left < 0:
        return (f"weights {need.weights / 1e9:.1f} GB a chip; {(need.weights + need.left) / 1e9:.1f} GB of "
                f"{need.available / 1e9:.1f} are free for them")
    if want > need.left:
        longest = need.longest(ask.shape.longest, requests, slots)
        return (f"{requests} x {context} tokens and {slots} states take {want / 1e9:.2f} GB a chip, the weights leave "
                f"{need.left / 1e9:.2f} GB: room for {longest} tokens each")
    return ""
