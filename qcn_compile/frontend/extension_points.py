"""Puts the leaf ops in place at transformers' own extension points; no modelling code is changed.

Attention and experts are registered by name ("qcn"). Short convolution and delta rule are module-level functions that
transformers marks with the name of a hub kernel: while a trace runs, every function so marked is swapped by that name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qcn_compile.errors import ModelError
from qcn_compile.frontend import leaf_ops as _leaf_ops  # noqa: F401  (defines torch.ops.qcn)

IMPLEMENTATION = "qcn"
_PATH: ContextVar[str] = ContextVar("module_path", default="")
_EXPERT_LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True,
                  "has_post_expert_norm": False}


def _refuse(what: str, cure: str) -> ModelError:
    return ModelError(f"{_PATH.get() or 'the model'} uses {what}, which qcn-compile cannot compile; {cure}")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
               **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D], key, value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    if attention_mask is not None:
        raise _refuse("an explicit attention mask", "only causal attention over whole sequences is known")
    for feature in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise _refuse(f"attention with {feature}={kwargs[feature]}", "choose a model with plain causal attention")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.ops.qcn.attention(query, key, value, scale, causal, _PATH.get(), kwargs.get("cu_seq_lens_q"))
    return out, None


def _experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts interface: hidden_states [T, H], top_k_* [T, k] -> [T, H]."""
    for flag, wanted in _EXPERT_LAYOUT.items():
        if getattr(module, flag) is not wanted:
            raise _refuse(f"experts with {flag}={not wanted}", "only bias-free [gate; up], down experts are known")
    if type(module)._apply_gate is not _default_apply_gate:
        raise _refuse("experts with a gate of their own", "only silu(gate) * up is known")
    if not isinstance(module.act_fn, (SiLUActivation, nn.SiLU)):
        raise _refuse(f"experts with activation {type(module.act_fn).__name__}", "only silu is known")
    return torch.ops.qcn.moe_experts(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj,
                                     "silu")


def _causal_conv1d(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
                   **kwargs: Any) -> Tensor:
    if activation not in (None, "silu", "swish"):
        raise _refuse(f"a short convolution with activation {activation!r}", "only silu is known")
    name = activation and "silu"
    return torch.ops.qcn.causal_conv1d(hidden_states, weight, bias, name, _PATH.get(), kwargs.get("cu_seq_lens_q"))


def _gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
                      initial_state: Tensor | None = None, output_final_state: bool = False,
                      use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
                      **_: Any) -> tuple[Tensor, None]:
    if initial_state is not None or output_final_state:
        raise _refuse("a delta rule with a cache inside the trace", "trace with use_cache=False")
    return torch.ops.qcn.gated_delta_rule(query, key, value, g, beta, use_qk_l2norm_in_kernel, _PATH.get(),
                                          cu_seqlens), None


HUB_FUNCTIONS: dict[str, Callable[..., Any]] = {"causal_conv1d_fn": _causal_conv1d,
                                                "chunk_gated_delta_rule": _gated_delta_rule}

ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)  # no mask function of this name: no mask is built
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)


def hub_name(function: object) -> str | None:
    """The hub kernel name a function was decorated with, read off the decorator's closure; None if it was not."""
    while isinstance(function, FunctionType):
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if "func_name" in cells:
            return str(cells["func_name"].cell_contents)
        function = getattr(function, "__wrapped__", None)
    return None


def _modelling_files(model: nn.Module) -> list[ModuleType]:
    names = {type(m).__module__ for m in model.modules()}
    return [sys.modules[name] for name in sorted(names) if name.startswith("transformers.")]


@contextmanager
def _swapped_functions(model: nn.Module) -> Iterator[None]:
    undo: list[tuple[ModuleType, str, object]] = []
    for file in _modelling_files(model):
        for attribute, value in list(vars(file).items()):
            if inspect.isfunction(value) and (name := hub_name(value)) in HUB_FUNCTIONS:
                undo.append((file, attribute, value))
                setattr(file, attribute, HUB_FUNCTIONS[name])
    try:
        yield
    finally:
        for file, attribute, value in undo:
            setattr(file, attribute, value)


@contextmanager
def _tracked_paths(model: nn.Module) -> Iterator[None]:
    """While it holds, `_PATH` is the path of the innermost module of `model` that is executing."""
    entered: list[Any] = []
    hooks = []
    for path, module in model.named_modules():
        def enter(_m: nn.Module, _a: Any, path: str = path) -> None:
            entered.append(_PATH.set(path))

        def leave(_m: nn.Module, _a: Any, _out: Any) -> None:
            _PATH.reset(entered.pop())

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def leaf_ops_in(model: nn.Module) -> Iterator[None]:
    """Run `model` with the leaf ops in place; everything is put back on exit."""
    with _swapped_functions(model), _tracked_paths(model):
        yield
