"""Hierarchical trace: of the items of a module list, each distinct kind is traced once.

The first item of a kind runs between `qcn::block_begin` and `qcn::block_end` markers; a later item of the same kind
becomes one `qcn::block_call`, which the importer expands with that item's own parameters and states. Two items are of
the same kind when nothing that can change their trace differs: module classes, scalar attributes (but for the layer
number), parameters' shapes and dtypes, and the arguments they are called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcn_compile.errors import ModelError

torch.library.define("qcn::block_begin", "(Tensor[] xs, int kind, str path) -> Tensor[]")
torch.library.define("qcn::block_end", "(Tensor[] xs, int kind) -> Tensor[]")
torch.library.define("qcn::block_call", "(Tensor[] xs, int kind, str path, int[] like) -> Tensor[]")

_SCALARS = (int, float, str, bool, type(None), torch.dtype, tuple, list)
_POSITION = {"layer_idx", "training"}


def _begin(xs: list[Tensor], kind: int, path: str) -> list[Tensor]:
    return [torch.empty_like(x) for x in xs]


def _end(xs: list[Tensor], kind: int) -> list[Tensor]:
    return [torch.empty_like(x) for x in xs]


def _call(xs: list[Tensor], kind: int, path: str, like: list[int]) -> list[Tensor]:
    return [torch.empty_like(xs[i]) for i in like]


torch.library.register_fake("qcn::block_begin", _begin)
torch.library.register_fake("qcn::block_end", _end)
torch.library.register_fake("qcn::block_call", _call)


@dataclass
class _Kind:
    """A traced kind: its number, and for each output the operand whose type it has."""

    number: int
    like: list[int]
    outputs: pytree.TreeSpec


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Everything of a module that can change its trace, but for its position among its siblings."""
    entries: list[Any] = []
    for path, part in module.named_modules():
        values = {k: v for k, v in vars(part).items() if not k.startswith("_") and k not in _POSITION}
        scalars = tuple(sorted((k, repr(v)) for k, v in values.items() if isinstance(v, _SCALARS)))
        configs = tuple(sorted((k, id(v)) for k, v in values.items() if hasattr(v, "model_type")))
        tensors = tuple((k, tuple(t.shape), t.dtype) for table in (part._parameters, part._buffers)
                        for k, t in table.items() if t is not None)
        entries.append((path, type(part), scalars, configs, tensors))
    return tuple(entries)


def _signature(leaves: list[Any], spec: pytree.TreeSpec) -> tuple[Any, ...]:
    return (str(spec), *((str(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves))


def _type_of(x: Tensor) -> tuple[str, torch.dtype]:
    return str(x.shape), x.dtype


class _Memo:
    """The kinds seen so far in one trace."""

    def __init__(self) -> None:
        self.kinds: dict[Any, _Kind] = {}
        self.count = 0

    def shared(self, shape: Any, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that is traced when its item is the first of its kind, and called otherwise."""
        return lambda *args, **kwargs: self._run(shape, path, forward, args, kwargs)

    def _run(self, shape: Any, path: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = (shape, _signature(leaves, spec))
        at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        tensors = [leaves[i] for i in at]
        if kind := self.kinds.get(key):
            return pytree.tree_unflatten(torch.ops.qcn.block_call(tensors, kind.number, path, kind.like), kind.outputs)
        number, self.count = self.count, self.count + 1
        for i, x in zip(at, torch.ops.qcn.block_begin(tensors, number, path), strict=True):
            leaves[i] = x
        inner_args, inner_kwargs = pytree.tree_unflatten(leaves, spec)
        results, outputs = pytree.tree_flatten(forward(*inner_args, **inner_kwargs))
        if not all(isinstance(x, Tensor) for x in results):
            raise ModelError(f"{path} returns something other than tensors, so its trace cannot be shared; use "
                             "share_layers=False")
        like = self._like(results, tensors)
        if like is not None:
            self.kinds[key] = _Kind(number, like, outputs)
        return pytree.tree_unflatten(torch.ops.qcn.block_end(results, number), outputs)

    @staticmethod
    def _like(results: list[Tensor], tensors: list[Tensor]) -> list[int] | None:
        """For each result an operand of its type; None when one has none: then the kind is traced anew each time."""
        types = [_type_of(x) for x in tensors]
        if not all(_type_of(x) in types for x in results):
            return None
        return [types.index(_type_of(x)) for x in results]


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost module lists of a model, by path."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(outer + ".") for outer in lists):
            lists[path] = module
    return lists


@contextmanager
def shared_blocks(model: nn.Module) -> Iterator[None]:
    """While it holds, items of the outermost module lists of `model` are traced once a kind."""
    memo = _Memo()
    changed: list[nn.Module] = []
    for path, items in layer_lists(model).items():
        for i, item in enumerate(items):
            item.forward = memo.shared(fingerprint(item), f"{path}.{i}", item.forward)
            changed.append(item)
    try:
        yield
    finally:
        for item in changed:
            del item.forward
