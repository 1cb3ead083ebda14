"""Small random models whose heads, experts and vocabulary lie oddly on ranks: the logits and the text of one rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcn_compile.compile import compile as build
from qcn_compile.runtime.loaded import load
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.speculation.options import SpeculationOptions
from tests.e2e.test_drafting import PROMPTS, tokens_of
from tests.frontend.families import save_with_draft_head, tiny
from tests.frontend.quantised import LAYOUTS, quantise

SMALL: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 48, "eos_token_id": 4081, "bos_token_id": None,
                         "pad_token_id": None, "max_position_embeddings": 1024, "num_hidden_layers": 2,
                         "layer_types": ["linear_attention", "full_attention"]}
CONFIGS: dict[str, dict[str, Any]] = {
    # 2 key heads, then 2 DeltaNet key heads too, at up to 8 ranks: copies of both
    "2 key heads": {"num_attention_heads": 8, "linear_num_value_heads": 8},
    # more ranks than DeltaNet value heads and query heads: parts of one head
    "parts of a head": {"num_attention_heads": 4, "linear_num_value_heads": 4},
    # 12 query heads a key head, 6 value heads a DeltaNet key head: 3 of each a rank at TP 8
    "odd groups": {"num_attention_heads": 24, "linear_num_key_heads": 4, "linear_num_value_heads": 24, "head_dim": 8,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    # neither embedding nor head can be cut; experts in groups of 5 and 5, or 3 and 2
    "odd vocabulary": {"vocab_size": 4099, "num_experts": 10, "num_experts_per_tok": 3, "num_attention_heads": 8,
                       "linear_num_value_heads": 8},
    # not one more expert, but a dense one beside them: 40 / 8 = 5 channels a rank
    "wider shared expert": {"shared_expert_intermediate_size": 40, "num_attention_heads": 8,
                            "linear_num_value_heads": 8},
    # a block-FP8 checkpoint whose blocks of 128 end inside every slice: shared expert 128 / 8 = 16 as 512 / 8 = 64
    "fp8 blocks": {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
                   "num_experts": 4, "num_attention_heads": 8, "linear_num_value_heads": 8},
}
LAYOUTS_OF = {"2 key heads": [(4, 1), (4, 2), (8, 1), (8, 4)], "parts of a head": [(8, 1), (8, 2)],
              "odd groups": [(2, 1), (4, 4), (8, 1)], "odd vocabulary": [(2, 2), (4, 1), (4, 2), (8, 2)],
              "wider shared expert": [(2, 2), (4, 4), (8, 1), (8, 4)], "fp8 blocks": [(2, 1), (8, 1), (8, 4)]}
QUICK = {("2 key heads", 4, 2)}
EVERY = [pytest.param(name, tp, ep, marks=() if (name, tp, ep) in QUICK else pytest.mark.slow)
         for name, layouts in LAYOUTS_OF.items() for tp, ep in layouts]
TOKENS, NEW = list(range(40, 140)), 30


@dataclass
class One:
    """A checkpoint, and what one rank makes of it."""

    folder: Path
    logits: np.ndarray
    texts: list[list[int]]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, bundled: Path) -> Callable[[str], One]:
    made: dict[str, One] = {}

    def get(name: str) -> One:
        if name not in made:
            folder = tmp_path_factory.mktemp("odd")
            checkpoint = save_with_draft_head(tiny("qwen3_next", **{**SMALL, **CONFIGS[name]}), folder / "model")[2]
            if name == "fp8 blocks":
                quantise(checkpoint, *LAYOUTS["fp8"])
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(bundled / file, checkpoint / file)
            build(checkpoint, "cpu", folder / "build", dtype="fp32", quant="none")
            with load(folder / "build", threads=2) as model:
                logits = model.logits(TOKENS)
                texts = tokens_of(model.generate(p, temperature=0, max_tokens=NEW, ignore_eos=True) for p in PROMPTS)
            made[name] = One(checkpoint, logits, texts)
        return made[name]

    return get


@pytest.mark.parametrize(("name", "tp", "ep"), EVERY)
def test_equals_one_rank(name: str, tp: int, ep: int, one_rank: Callable[[str], One], tmp_path: Path) -> None:
    """In batches, prompts in chunks, from cached prefixes, with drafts of an MTP head (which are mostly wrong)."""
    one = one_rank(name)
    build(one.folder, "cpu", tmp_path / "build", dtype="fp32", quant="none", tp=tp, ep=ep, mtp=True)
    with load(tmp_path / "build", threads=2, max_running_requests=3, prefill_chunk=48, prefix=PrefixOptions(),
              speculation=SpeculationOptions(2, "mtp")) as many:
        assert np.linalg.norm(many.logits(TOKENS) - one.logits) <= 1e-5 * np.linalg.norm(one.logits)
        many.engine.speculation.times.ratio = lambda sequences: 1.0  # draft as long as anything is gained
        for _ in range(2):  # the second time from cached prefixes
            streams = [many.generate(p, temperature=0, max_tokens=NEW, ignore_eos=True) for p in PROMPTS]
            assert tokens_of(streams) == one.texts
            many.check_integrity()
        assert many.engine.prefixes.counts.hits > 0 and many.engine.speculation.drafted > 0
