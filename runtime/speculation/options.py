"""The flags of speculation, and what they mean."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from qcn_compile.errors import UsageError

NGRAM, MTP = "ngram", "mtp"
ALGORITHMS = {"ngram": NGRAM, "mtp": MTP, "eagle": MTP, "nextn": MTP}
DRAFTS = {NGRAM: 4, MTP: 3}
MOST_DRAFTS = 32


@dataclass(frozen=True)
class SpeculationOptions:
    """`drafts`: tokens guessed a step, None: the algorithm's default. `algorithm`: ngram, or the MTP head."""

    drafts: int | None = None
    algorithm: str = NGRAM

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_DRAFTS:
            raise UsageError(f"{self.count} drafts a step: must be from 1 to {MOST_DRAFTS}; change "
                             "--speculative-num-steps or --speculative-num-draft-tokens")

    @property
    def count(self) -> int:
        return DRAFTS[self.algorithm] if self.drafts is None else self.drafts


def add_speculation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of speculation, named as in SGLang."""
    g = parser.add_argument_group("speculation")
    g.add_argument("--speculative-algorithm", metavar="NAME",
                   help="mtp (EAGLE, NEXTN): draft with the checkpoint's MTP head; ngram: draft what followed the last "
                        "time (off by default)")
    g.add_argument("--speculative-num-steps", type=int, metavar="N",
                   help=f"tokens drafted a step (default {DRAFTS[MTP]} with mtp, {DRAFTS[NGRAM]} with ngram)")
    g.add_argument("--speculative-num-draft-tokens", type=int, metavar="N",
                   help="tokens verified a step when --speculative-num-steps is not given: with mtp one more than are "
                        "drafted, with ngram the drafts")


def speculative_algorithm(name: str | None) -> str | None:
    """ngram or mtp from any of their names; None when off. Raises UsageError for an unknown one."""
    if name is None:
        return None
    if name.lower() not in ALGORITHMS:
        raise UsageError(f"--speculative-algorithm {name}: unknown; use mtp (EAGLE, NEXTN) or ngram")
    return ALGORITHMS[name.lower()]


def speculation_options(arguments: argparse.Namespace) -> SpeculationOptions | None:
    """The flags as options; None when off. Raises UsageError for what is not there.

    With mtp, N draft tokens are N - 1 drafts and the token before them, as SGLang counts a chain.
    """
    algorithm = speculative_algorithm(arguments.speculative_algorithm)
    steps, tokens = arguments.speculative_num_steps, arguments.speculative_num_draft_tokens
    if algorithm is None:
        if tokens is not None or steps is not None:
            raise UsageError("--speculative-num-steps and --speculative-num-draft-tokens need --speculative-algorithm")
        return None
    if steps is None and tokens is not None:
        steps = tokens - 1 if algorithm == MTP else tokens
    return SpeculationOptions(steps, algorithm)
