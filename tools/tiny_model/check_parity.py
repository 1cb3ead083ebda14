"""Prove on CPU in fp32 that the training model computes what transformers computes, main model and MTP head."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .config import TinyConfig
from .export import to_checkpoint, write_configs, write_shards
from .model import TinyNext


class ReferenceMtp(nn.Module):
    """The MTP head made of transformers' own layers; parameter names are the checkpoint's under `mtp.`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        cfg = copy.deepcopy(base.config)
        cfg.layer_types, cfg.num_hidden_layers = ["full_attention"], 1
        norm, layer = type(base.model.norm), type(base.model.layers[0])
        self.fc = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            setattr(self, name, norm(cfg.hidden_size, eps=cfg.rms_norm_eps))
        self.layers = nn.ModuleList([layer(cfg, 0)])

    def forward(self, base: nn.Module, next_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        length = next_ids.shape[1]
        embedding = self.pre_fc_norm_embedding(base.model.embed_tokens(next_ids))
        x = self.fc(torch.cat([embedding, self.pre_fc_norm_hidden(hidden)], -1))
        tables = base.model.rotary_emb(x, torch.arange(length)[None])
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        return base.lm_head(self.norm(self.layers[0](x, position_embeddings=tables, attention_mask=mask)))


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def randomised(cfg: TinyConfig) -> TinyNext:
    """A model whose weights are far from their initial values, so that no term hides behind a zero or a one."""
    model = TinyNext(cfg)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.05))
    return model.eval()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    cfg = TinyConfig()
    ours = randomised(cfg)
    state = to_checkpoint(ours.state_dict(), torch.float32)
    with tempfile.TemporaryDirectory() as name:
        write_shards(state, Path(name))
        write_configs(cfg, Path(name))
        theirs, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    problems = [k for k in info["missing_keys"] | info["unexpected_keys"] if not k.startswith("mtp.")]
    assert not problems, problems
    ids = torch.randint(0, cfg.vocab_size, (2, 151))
    hidden, _ = ours.hidden(ids[:, :-1])
    reference = theirs.model(ids[:, :-1]).last_hidden_state
    main_error = relative_l2(ours.lm_head(hidden), theirs.lm_head(reference))
    head = ReferenceMtp(theirs)
    training = {k.removeprefix("mtp."): v for k, v in ours.state_dict().items() if k.startswith("mtp.")}
    head.load_state_dict(training)
    draft, _ = ours.draft(ids[:, 1:], hidden)
    draft_error = relative_l2(ours.lm_head(draft), head(theirs, ids[:, 1:], reference))
    parameters = sum(p.numel() for p in ours.parameters())
    print(f"parameters {parameters:,}; relative L2 of logits: main {main_error:.2e}, MTP {draft_error:.2e}")
    assert main_error < 1e-5 and draft_error < 1e-5


if __name__ == "__main__":
    main()
