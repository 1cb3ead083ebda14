"""Muon for the weight matrices (each expert's separately), AdamW for everything else, under one learning rate.

Muon steps along the orthogonalised momentum, scaled so that its root mean square matches AdamW's (Moonlight's rule).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from .model import TinyNext

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5
MOMENTUM = 0.95
WEIGHT_DECAY = 0.1


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """Approximate U V^T of each matrix of x [n, r, c] by a quintic Newton-Schulz iteration in bf16."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = (y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(STEPS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).float()


def as_matrices(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """View a parameter as a stack of the matrices that the model multiplies by."""
    if name.endswith("gate_up_proj"):
        return tensor.view(2 * tensor.shape[0], -1, tensor.shape[-1])
    return tensor if tensor.ndim == 3 else tensor[None]


def uses_muon(name: str, parameter: nn.Parameter) -> bool:
    skipped = ("embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate", "conv1d", "in_proj_ba")
    return parameter.ndim >= 2 and not any(s in name for s in skipped)


class Muon:
    """Parameters are grouped by matrix shape, so that a step is a few batched products."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self.groups: dict[torch.Size, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in named:
            self.groups[as_matrices(name, parameter).shape[-2:]].append((name, parameter))
        self.momentum = {shape: torch.zeros_like(self._stack(group)) for shape, group in self.groups.items()}

    @staticmethod
    def _stack(group: list[tuple[str, nn.Parameter]], grad: bool = False) -> torch.Tensor:
        return torch.cat([as_matrices(n, p.grad if grad else p.detach()) for n, p in group]).float()

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            gradient, momentum = self._stack(group, grad=True), self.momentum[shape]
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalise(gradient.lerp(momentum, MOMENTUM)) * (0.2 * max(shape) ** 0.5)
            views = [as_matrices(n, p.data) for n, p in group]
            pieces = update.split([len(v) for v in views])
            torch._foreach_mul_(views, 1 - rate * WEIGHT_DECAY)
            torch._foreach_add_(views, list(pieces), alpha=-rate)


class Optimizer:
    """Clips the gradient, then steps both optimizers."""

    def __init__(self, model: TinyNext) -> None:
        named = list(model.named_parameters())
        self.parameters = [p for _, p in named]
        self.muon = Muon([(n, p) for n, p in named if uses_muon(n, p)])
        rest = [p for n, p in named if not uses_muon(n, p)]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def step(self, rate: float) -> torch.Tensor:
        """-> the gradient's norm before clipping, still on the device."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.muon.step(rate)
        for parameter in self.parameters:
            parameter.grad = None
        return norm
