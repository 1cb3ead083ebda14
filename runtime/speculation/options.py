"""The flags of speculation, and what they mean."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from qcn_compile.errors import UsageError

DRAFTS, MOST_DRAFTS = 4, 32
_HEADS = ("mtp", "eagle", "eagle3", "nextn")


@dataclass(frozen=True)
class SpeculationOptions:
    """`drafts`: tokens guessed a step. The only algorithm is n-gram lookup."""

    drafts: int = DRAFTS

    def __post_init__(self) -> None:
        if not 1 <= self.drafts <= MOST_DRAFTS:
            raise UsageError(f"--speculative-num-draft-tokens {self.drafts}: must be from 1 to {MOST_DRAFTS}")


def add_speculation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of speculation, named as in SGLang."""
    g = parser.add_argument_group("speculation")
    g.add_argument("--speculative-algorithm", metavar="NAME",
                   help="ngram: draft what followed the last time (off by default)")
    g.add_argument("--speculative-num-draft-tokens", type=int, metavar="N",
                   help=f"tokens drafted a step (default {DRAFTS})")
    g.add_argument("--speculative-num-steps", type=int, metavar="N", help="the same, when that is not given")


def speculation_options(arguments: argparse.Namespace) -> SpeculationOptions | None:
    """The flags as options; None when off. Raises UsageError for what is not there."""
    name, drafts = arguments.speculative_algorithm, arguments.speculative_num_draft_tokens
    drafts = arguments.speculative_num_steps if drafts is None else drafts
    if name is None:
        if drafts is not None:
            raise UsageError("--speculative-num-draft-tokens needs --speculative-algorithm ngram")
        return None
    if name.lower() in _HEADS:
        raise UsageError(f"--speculative-algorithm {name}: drafting with the checkpoint's MTP head is not built yet "
                         "(Qwen3-Coder-Next ships none); use ngram")
    if name.lower() != "ngram":
        raise UsageError(f"--speculative-algorithm {name}: unknown; use ngram")
    return SpeculationOptions(DRAFTS if drafts is None else drafts)
