"""The verdict: whether a model fits a target, what it takes there, how fast it should be, and what else to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qcn_compile.errors import UsageError
from qcn_compile.planning.choose import FILL, SHORT, Ask, Candidate, candidates
from qcn_compile.planning.formats import Scheme
from qcn_compile.planning.predict import Predictor
from qcn_compile.planning.work import Step

BATCHES = (1, 8, 32, 128)
PROMPTS = (1024, 8192)


@dataclass(frozen=True)
class Verdict:
    """What was chosen for an ask, what it costs, and what was not chosen, as plain data (`to_json`).

    chosen: the best candidate, or the nearest when none fits. reasons: why. rejected: (candidate, reason).
    """

    ask: Ask
    chosen: Candidate
    context: int
    reasons: dict[str, str]
    rejected: tuple[tuple[str, str], ...]
    alternatives: tuple[dict[str, Any], ...]

    @property
    def fits(self) -> bool:
        return not self.chosen.problem

    @property
    def planned(self) -> bool:
        """Whether this can only be planned: no kernels are written for it yet."""
        return self.chosen.planned

    def require(self) -> None:
        """Raises UsageError with the number that breaks when nothing fits."""
        if not self.fits:
            cure = "; ".join(a["title"] for a in self.alternatives[:2])
            raise UsageError(f"{self.ask.name} does not fit {self.ask.chip.name} ({self.chosen.title}): "
                             f"{self.chosen.problem}" + (f"; what fits: {cure}" if cure else ""))

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data, seconds in ms."""
        needs, chosen = self.chosen.needs, self.chosen
        requests, slots = self.ask.room(chosen.layout)
        memory = {"weights": needs.weights, "kv": requests * needs.kv(self.context),
                  "state": slots * needs.slot, "workspace": needs.workspace, "graphs": needs.graphs,
                  "driver": needs.reserved}
        return {
            "model": self.ask.name, "target": self.ask.chip.name, "gpus": chosen.layout.gpus, "fits": self.fits,
            "problem": chosen.problem, "planned_only": self.planned, "quant": chosen.scheme.name,
            "formats": _formats(chosen.scheme), "layout": chosen.layout.to_json(), "title": chosen.title,
            "context_length": self.context, "requests": self.ask.requests,
            "memory": {**memory, "available": needs.available, "free": needs.available - sum(memory.values())},
            "kv_bytes_per_token": needs.kv_token, "state_bytes_per_request": needs.slot,
            "longest_context": needs.longest(self.ask.shape.longest),
            "concurrency": chosen.layout.replicas * needs.concurrency(self.context),
            "concurrency_8k": chosen.layout.replicas * needs.concurrency(min(FILL, self.ask.shape.longest)),
            "speed": self._speed() if self.fits else {}, "reasons": self.reasons,
            "alternatives": list(self.alternatives),
            "rejected": [{"what": what, "reason": reason} for what, reason in self.rejected]}

    def _speed(self) -> dict[str, Any]:
        """Predicted times, at `fill` tokens of context."""
        chosen, fill = self.chosen, min(FILL, self.context)
        predict = Predictor(self.ask.shape, chosen.scheme, chosen.layout, self.ask.chip)
        if not predict.known:
            return {}
        one = predict.decode(1, fill)
        most = chosen.layout.replicas * chosen.needs.concurrency(fill)
        return {"fill": fill, "ms_per_token": _ms(one.seconds), "bound": one.bound,
                "limit_ms": _ms(predict.floor(Step.decode(1, fill)).seconds),
                "tokens_per_second": {str(b): round(predict.rate(b, fill), 1) for b in BATCHES if b <= max(most, 1)},
                "first_token_ms": {str(p): _ms(predict.first_token(p)) for p in PROMPTS if p <= self.context}}


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")


def _formats(scheme: Scheme) -> dict[str, str]:
    return {kind: scheme.format_of(kind) for kind in ("experts", "dense", "head", "embedding", "sensitive", "vectors")}


def decide_plan(ask: Ask) -> Verdict:
    """The verdict for an ask. Raises UsageError for one that no layout or format could meet.

    When neither a number of GPUs nor a degree was asked for, the fewest GPUs of a machine that fit are taken.
    """
    found = candidates(ask)
    if ask.gpus is None and not ask.fixed and ask.chip.kind == "gpu" and any(found[0].grade):
        found = min([found, *(candidates(replace(ask, gpus=n)) for n in _more(ask))], key=lambda f: f[0].grade)
    chosen = found[0]
    longest = chosen.needs.longest(ask.shape.longest, *ask.room(chosen.layout))
    context = ask.context or (longest if not chosen.problem else min(SHORT, ask.shape.longest))
    return Verdict(ask, chosen, context, _reasons(ask, found, context), _rejected(found),
                   _alternatives(ask, chosen, found))


def _more(ask: Ask) -> list[int]:
    return [n for n in (2, 4, 8, 16) if n <= ask.chip.node]


def _reasons(ask: Ask, found: list[Candidate], context: int) -> dict[str, str]:
    chosen = found[0]
    rivals = [c for c in found[1:] if not c.problem and c.scheme != chosen.scheme]
    quant = "asked for with --quant"
    if ask.quant == "auto":
        rival = rivals[0] if rivals else None
        quant = "nothing else fits" if rival is None else (
            f"{chosen.seconds * 1e3:.3g} ms a step, {rival.scheme.name} takes {rival.seconds * 1e3:.3g}"
            if rival.grade == chosen.grade else _lesser(rival))
        quant += f"; {chosen.over}" if chosen.over else ""
    layout = "asked for" if ask.fixed else "one chip holds it" if chosen.layout.gpus == 1 else (
        "the fastest of those that fit")
    if ask.gpus is None and not ask.fixed and chosen.layout.gpus > 1:
        layout = f"the fewest chips that hold it are {chosen.layout.gpus}"
    limit = ask.shape.longest
    if chosen.problem:
        return {"quant": "the nearest to fitting" if ask.quant == "auto" else quant, "layout": "the nearest to fitting",
                "context_length": "asked for" if ask.context else "the least that is worth having"}
    return {"quant": quant, "layout": layout,
            "context_length": "asked for" if ask.context else "the model's own limit" if context == limit
            else f"what fits beside the weights; the model's limit is {limit}"}


def _lesser(item: Candidate) -> str:
    """Why a candidate that fits comes after the chosen one, whatever its speed."""
    reason = "no kernels are written for it yet" if item.planned else item.over or "its stages wait for each other"
    return f"{item.scheme.name} would take {item.seconds * 1e3:.3g} ms a step, but {reason}"


def _rejected(found: list[Candidate]) -> tuple[tuple[str, str], ...]:
    """Every candidate but the chosen one: out of the question, without kernels, or slower."""
    best = found[0]
    rows = []
    for item in found[1:]:
        slower = f"{item.seconds * 1e3:.3g} ms a step, the chosen takes {best.seconds * 1e3:.3g} ms"
        rows.append((item.title, item.problem or (_lesser(item) if item.grade > best.grade else slower)))
    return tuple(rows)


def _alternatives(ask: Ask, chosen: Candidate, found: list[Candidate]) -> tuple[dict[str, Any], ...]:
    """Other choices worth knowing: the best of each other scheme here, and of more chips."""
    seen, rows = {chosen.scheme.name}, []
    for item in found:
        if not item.problem and item.scheme.name not in seen:
            seen.add(item.scheme.name)
            rows.append(_alternative(ask, item))
    if not ask.fixed and ask.gpus is None:
        for count in _more(ask):
            best = candidates(replace(ask, gpus=count))[0]
            if count > chosen.layout.gpus and not best.problem:
                rows.append(_alternative(ask, best))
    return tuple(rows)


def _alternative(ask: Ask, item: Candidate) -> dict[str, Any]:
    chips = f"{item.layout.gpus} x {ask.chip.name}" if item.layout.gpus > 1 else ask.chip.name
    return {"title": f"{chips}, {item.title}", "quant": item.scheme.name, "layout": item.layout.to_json(),
            "gpus": item.layout.gpus, "ms_per_step": _ms(item.seconds), "planned_only": item.planned,
            "longest_context": item.needs.longest(ask.shape.longest)}
