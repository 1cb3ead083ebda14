"""Training-time Qwen3-Next: the maths and parameter names of the checkpoint, arranged for large batches on one GPU.

Experts run densely (all of them on every token, masked by the routing weights): at this size one wide matrix product
beats sorting tokens by expert. There is no cache; decoding belongs to the runtime.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .config import TinyConfig
from .delta_rule import gated_delta_rule


class RMSNorm(nn.Module):
    """Zero-centred RMSNorm: x / rms(x) * (1 + weight)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight)).type_as(x)


class GatedNorm(nn.Module):
    """RMSNorm with a plain weight, then the silu gate z."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y * F.silu(z.float())


def rotary_tables(cfg: TinyConfig, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [length, rotary_dim / 2]."""
    dim = int(cfg.head_dim * cfg.partial_rotary_factor)
    frequency = 1.0 / cfg.rope_theta ** (torch.arange(0, dim, 2, device=device).float() / dim)
    angle = torch.arange(length, device=device).float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of the first 2 * tables.shape[-1] dimensions of x [B, H, T, D]."""
    cos, sin = tables
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).type_as(x), (b * cos + a * sin).type_as(x), rest], -1)


class Attention(nn.Module):
    """Grouped-query attention with q/k norms, partial rotary embedding and a sigmoid output gate."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        self.cfg, heads, kv, dim = cfg, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, heads * dim * 2, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv * dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, cfg.hidden_size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(dim, cfg.rms_norm_eps), RMSNorm(dim, cfg.rms_norm_eps)

    def forward(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        b, t, dim = x.shape[0], x.shape[1], self.cfg.head_dim
        q, gate = self.q_proj(x).view(b, t, -1, 2 * dim).chunk(2, -1)
        k, v = self.k_proj(x).view(b, t, -1, dim), self.v_proj(x).view(b, t, -1, dim).transpose(1, 2)
        q = rotate(self.q_norm(q).transpose(1, 2), tables)
        k = rotate(self.k_norm(k).transpose(1, 2), tables)
        group = self.cfg.num_attention_heads // self.cfg.num_key_value_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        return self.o_proj(out * torch.sigmoid(gate.reshape(b, t, -1)))


class GatedDeltaNet(nn.Module):
    """Linear attention; in_proj rows are grouped per key head: [q, k, v..., z...] and [b..., a...]."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.key_dim = cfg.linear_num_key_heads * cfg.linear_key_head_dim
        self.value_dim = cfg.linear_num_value_heads * cfg.linear_value_head_dim
        self.ratio = cfg.linear_num_value_heads // cfg.linear_num_key_heads
        channels = 2 * self.key_dim + self.value_dim
        self.in_proj_qkvz = nn.Linear(cfg.hidden_size, channels + self.value_dim, bias=False)
        self.in_proj_ba = nn.Linear(cfg.hidden_size, 2 * cfg.linear_num_value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, cfg.linear_conv_kernel_dim, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(cfg.linear_num_value_heads))
        self.A_log = nn.Parameter(torch.empty(cfg.linear_num_value_heads).uniform_(0.01, 16).log())
        self.norm = GatedNorm(cfg.linear_value_head_dim, cfg.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_dim, cfg.hidden_size, bias=False)

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        """Causal depthwise convolution over time of x [B, T, C], then silu; written as shifted products."""
        taps = self.conv1d.weight[:, 0]  # [C, K]
        width, length = taps.shape[1], x.shape[1]
        padded = F.pad(x.float(), (0, 0, width - 1, 0))
        return F.silu(sum(padded[:, i : i + length] * taps[:, i] for i in range(width)))

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """-> mixed [B, T, q + k + v], z [B, T, HV, E], b and a [B, T, HV]."""
        cfg, (batch, length, _) = self.cfg, x.shape
        width = self.ratio * cfg.linear_value_head_dim
        grouped = self.in_proj_qkvz(x).view(batch, length, cfg.linear_num_key_heads, -1)
        q, k, v, z = grouped.split([cfg.linear_key_head_dim, cfg.linear_key_head_dim, width, width], -1)
        b, a = self.in_proj_ba(x).view(batch, length, cfg.linear_num_key_heads, -1).split(self.ratio, -1)
        mixed = torch.cat([part.reshape(batch, length, -1) for part in (q, k, v)], -1)
        z = z.reshape(batch, length, -1, cfg.linear_value_head_dim)
        return mixed, z, b.reshape(batch, length, -1), a.reshape(batch, length, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cfg, (batch, length, _) = self.cfg, x.shape
        mixed, z, b, a = self._project(x)
        q, k, v = self._convolve(mixed).split([self.key_dim, self.key_dim, self.value_dim], -1)
        q, k = (y.reshape(batch, length, -1, cfg.linear_key_head_dim) for y in (q, k))
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        q = q / math.sqrt(cfg.linear_key_head_dim)
        q, k = (y.repeat_interleave(self.ratio, 2).transpose(1, 2) for y in (q, k))
        v = v.reshape(batch, length, -1, cfg.linear_value_head_dim).transpose(1, 2)
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)
        with torch.autocast(x.device.type, enabled=False):
            out = gated_delta_rule(q, k, v, g.transpose(1, 2), b.float().sigmoid().transpose(1, 2))
        return self.out_proj(self.norm(out.transpose(1, 2), z).type_as(x).reshape(batch, length, -1))


class Experts(nn.Module):
    """All routed experts' weights, stacked: gate_up_proj [E, 2 I, H], down_proj [E, H, I]."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        size = cfg.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(cfg.num_experts, 2 * size, cfg.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(cfg.num_experts, cfg.hidden_size, size))

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [N, H], weight [N, E] (zero where an expert is not chosen) -> [N, H]."""
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).view(len(x), weight.shape[1], -1).chunk(2, -1)
        inner = (F.silu(gate) * up * weight[..., None]).flatten(1).type_as(gate)
        return F.linear(inner, self.down_proj.permute(1, 0, 2).flatten(1))


class SharedExpert(nn.Module):
    """The expert every token passes through."""

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, size, bias=False), nn.Linear(hidden, size, bias=False)
        self.down_proj = nn.Linear(size, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMoe(nn.Module):
    """Top-k routed experts plus a gated shared expert; also returns the router's training losses and loads."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        self.top_k = cfg.num_experts_per_tok
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_experts, bias=False)
        self.experts = Experts(cfg)
        self.shared_expert = SharedExpert(cfg.hidden_size, cfg.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(cfg.hidden_size, 1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        logits = self.gate(flat).float()
        probability = logits.softmax(-1)
        value, index = probability.topk(self.top_k, -1)
        value = value / value.sum(-1, keepdim=True)
        weight = torch.zeros_like(probability).scatter(-1, index, value)
        load = (weight > 0).float().mean(0) / self.top_k  # sums to 1
        balance = logits.shape[-1] * (load.detach() * probability.mean(0)).sum()
        z_loss = logits.logsumexp(-1).square().mean()
        shared = torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        out = (self.experts(flat, weight) + shared).view_as(x)
        return out, torch.cat([balance[None], z_loss[None], load.detach()])


class DecoderLayer(nn.Module):
    """Pre-norm residual block: a token mixer of either kind, then the mixture of experts."""

    def __init__(self, cfg: TinyConfig, full_attention: bool) -> None:
        super().__init__()
        self.full_attention = full_attention
        if full_attention:
            self.self_attn = Attention(cfg)
        else:
            self.linear_attn = GatedDeltaNet(cfg)
        self.mlp = SparseMoe(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.input_layernorm(x)
        x = x + (self.self_attn(y, tables) if self.full_attention else self.linear_attn(y))
        y, router = self.mlp(self.post_attention_layernorm(x))
        return x + y, router


class Backbone(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        layers = (DecoderLayer(cfg, cfg.is_full_attention(i)) for i in range(cfg.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class MtpHead(nn.Module):
    """Multi-token prediction: one more layer over (next token's embedding, this token's hidden state)."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.layers = nn.ModuleList([DecoderLayer(cfg, full_attention=True)])
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class TinyNext(nn.Module):
    """The whole model. `hidden` gives the final hidden states, `draft` the MTP head's; `lm_head` serves both."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model, self.mtp = Backbone(cfg), MtpHead(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=0.02)
            nn.init.normal_(module.down_proj, std=0.02)

    def hidden(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B, T] -> hidden states after the final norm [B, T, H], router statistics [layers, 2 + E]."""
        tables = rotary_tables(self.cfg, ids.shape[1], ids.device)
        x, routers = self.model.embed_tokens(ids), []
        for layer in self.model.layers:
            x, router = layer(x, tables)
            routers.append(router)
        return self.model.norm(x), torch.stack(routers)

    def draft(self, next_ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """next_ids [B, T] is the token after each position; -> MTP hidden states [B, T, H], router statistics [1, .]."""
        mtp = self.mtp
        embedding = mtp.pre_fc_norm_embedding(self.model.embed_tokens(next_ids))
        x = mtp.fc(torch.cat([embedding, mtp.pre_fc_norm_hidden(hidden)], -1))
        x, router = mtp.layers[0](x, rotary_tables(self.cfg, next_ids.shape[1], next_ids.device))
        return mtp.norm(x), router[None]
