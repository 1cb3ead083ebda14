"""From a config to Graph IR: transformers' own model on the meta device, exported once, functionalised, imported."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import MtpModel

from qcn_compile.errors import ModelError, QcnError
from qcn_compile.frontend.blocks import layer_lists, shared_blocks
from qcn_compile.frontend.extension_points import IMPLEMENTATION, leaf_ops_in
from qcn_compile.frontend.import_fx import Program, import_program
from qcn_compile.ir.batch import TORCH
from qcn_compile.ir.graph import Graph
from qcn_compile.ir.types import DType, StateRef

_EXAMPLE_TOKENS = 7  # any number above one: T stays symbolic


class _Main(nn.Module):
    """The exported signature of the whole model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, positions i32 [1, T], cu_seqlens i32 [S+1] -> logits [1, T, V], hidden [1, T, H]."""
        torch._check(tokens.shape[1] == positions.shape[1])  # one symbol T before the first layer
        hidden = self.model.base_model(input_ids=tokens, position_ids=positions, use_cache=False,
                                       cu_seq_lens_q=cu_seqlens).last_hidden_state
        return self.model.get_output_embeddings()(hidden), hidden


class _Mtp(nn.Module):
    """The exported signature of the first multi-token-prediction layer."""

    def __init__(self, mtp: MtpModel) -> None:
        super().__init__()
        self.mtp = mtp

    def forward(self, tokens: Tensor, positions: Tensor, hidden: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """As `_Main`, with hidden [1, T, H]: the main model's, or this head's own for the next draft."""
        torch._check(tokens.shape[1] == positions.shape[1])
        torch._check(tokens.shape[1] == hidden.shape[1])
        hidden = self.mtp.forward_layer(0, hidden, positions, None, input_ids=tokens, cu_seq_lens_q=cu_seqlens)
        return self.mtp._project_to_logits(hidden), hidden


def build(config: PreTrainedConfig, dtype: DType = DType.f32, device: str = "meta") -> PreTrainedModel:
    """transformers' model of `config` with the leaf ops chosen and every parameter in `dtype`."""
    config = copy.deepcopy(config)
    config._attn_implementation = IMPLEMENTATION
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=TORCH[dtype.value])
    except Exception as error:  # inconsistent sizes fail anywhere in the constructors
        raise ModelError(f"transformers cannot build a {config.model_type} model from this config "
                         f"({type(error).__name__}: {error}); compare config.json with the published one") from error
    if model._can_set_experts_implementation():
        model.set_experts_implementation(IMPLEMENTATION)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(TORCH[dtype.value])
    return model.eval()


def build_mtp(model: PreTrainedModel, layers: int = 1) -> MtpModel:
    """transformers' generic MTP head over `model`, whose embedding, head and rotary tables it shares."""
    parameter = next(model.parameters())
    model.config.num_mtp_layers = layers
    model.config.mtp_layer_types = ["full_attention"] * layers
    before = torch.get_default_dtype()
    torch.set_default_dtype(parameter.dtype)
    try:
        with parameter.device:
            return MtpModel(model, layers).eval()
    finally:
        torch.set_default_dtype(before)


def trace(config: PreTrainedConfig, dtype: DType = DType.f32, *, share_layers: bool = True) -> Graph:
    """Graph `main` of a config: tokens, positions i32 [T], batch -> logits [T, V], hidden [T, H], all in `dtype`."""
    return trace_main(build(config, dtype), share_layers=share_layers)


def trace_main(model: PreTrainedModel, *, share_layers: bool = True) -> Graph:
    """As `trace`, for a model from `build`. `share_layers=False` traces every layer anew (for tests)."""
    wrapper = _Main(model)
    exported = _export(wrapper, _examples(model), share_layers)
    return _imported("main", wrapper, exported, "model.", _names(model))


def trace_mtp(model: PreTrainedModel, mtp: MtpModel) -> Graph:
    """Graph `mtp`: tokens, positions i32 [T], hidden [T, H], batch -> logits [T, V], hidden [T, H].

    Weights that the head shares with `model` keep the main model's names; its own are named `mtp.<path>`.
    """
    wrapper = _Mtp(mtp)
    exported = _export(wrapper, _examples(model, hidden=True), False)
    return _imported("mtp", wrapper, exported, "", _names(model))


def _examples(model: PreTrainedModel, hidden: bool = False) -> dict[str, tuple[Tensor, dict[int, Dim]]]:
    """Example inputs and their symbolic axes, in the order of the wrapper's signature."""
    device, tokens = next(model.parameters()).device, Dim("T", min=1)
    ids = torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int32, device=device)
    examples = {"tokens": (ids, {1: tokens}), "positions": (ids.clone(), {1: tokens})}
    if hidden:
        width = model.get_input_embeddings().weight
        state = torch.zeros(1, _EXAMPLE_TOKENS, width.shape[1], dtype=width.dtype, device=device)
        examples["hidden"] = (state, {1: tokens})
    bounds = torch.tensor([0, 3, _EXAMPLE_TOKENS], dtype=torch.int32, device=device)
    return {**examples, "cu_seqlens": (bounds, {0: Dim("bounds", min=2)})}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's and transformers' warnings about their own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _export(wrapper: nn.Module, examples: dict[str, tuple[Tensor, dict[int, Dim]]], share: bool) -> ExportedProgram:
    inputs = tuple(tensor for tensor, _ in examples.values())
    shapes = {name: axes for name, (_, axes) in examples.items()}
    try:
        with torch.no_grad(), _quiet(), leaf_ops_in(wrapper), shared_blocks(wrapper) if share else nullcontext():
            exported = torch.export.export(wrapper, inputs, dynamic_shapes=shapes, strict=False)
            return exported.run_decompositions({})  # in-place ops become pure ones, nothing is decomposed
    except Exception as error:
        for cause in _chain(error):
            if isinstance(cause, QcnError):
                raise cause from None
        first = str(error).strip().splitlines()[:1]
        raise ModelError(f"the model cannot be traced with a symbolic number of tokens: {''.join(first)}. Its forward "
                         "depends on the data or the length; give that part a leaf op in "
                         "qcn_compile/frontend/extension_points.py") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _imported(name: str, wrapper: nn.Module, exported: ExportedProgram, root: str, shared: dict[int, str]) -> Graph:
    weights = {path.removeprefix(root): shared.get(id(p), path.removeprefix(root))
               for path, p in wrapper.named_parameters(remove_duplicate=False)}
    constants = {path.removeprefix(root): value for path, value in _buffers(wrapper).items()}
    graph = import_program(Program(name, exported, root, weights, constants))
    _check_leaves(graph, wrapper, root)
    return graph


def _names(model: PreTrainedModel) -> dict[int, str]:
    """Name of each parameter by identity: of tied parameters the first counts."""
    return {id(p): path for path, p in model.named_parameters()}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Values of the buffers that no checkpoint holds: their module is made once more, on the CPU."""
    values: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        names = module._non_persistent_buffers_set
        if not names:
            continue
        if not hasattr(module, "config"):
            raise ModelError(f"{path} ({type(module).__name__}) has buffers {sorted(names)} that no checkpoint holds, "
                             "and no config to compute them from")
        with torch.device("cpu"):
            twin = type(module)(module.config)
        values.update({f"{path}.{name}": getattr(twin, name) for name in names})
    return values


def _check_leaves(graph: Graph, wrapper: nn.Module, root: str) -> None:
    """Every layer must mix tokens through a cache; one that does not has lost its leaf op."""
    owners = {a.name.partition(".")[2] for op in graph.ops for a in op.attrs.values() if isinstance(a, StateRef)}
    for path, items in layer_lists(wrapper).items():
        for i in range(len(items)):
            layer = f"{path}.{i}".removeprefix(root)
            used = any(op.loc.module.startswith(layer + ".") for op in graph.ops)
            if used and not any(owner.startswith(layer + ".") for owner in owners):
                raise ModelError(f"{layer} has no leaf op (attention, causal_conv1d, gated_delta_rule): its token mixer"
                                 " was traced away; register it in qcn_compile/frontend/extension_points.py")
