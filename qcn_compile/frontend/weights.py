"""Parameters from checkpoint tensors, by transformers' own conversion mapping: no names are listed here."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_layers import MtpModel

from qcn_compile.errors import ModelError
from qcn_compile.frontend.checkpoint import Checkpoint
from qcn_compile.ir.encoding import Coded
from qcn_compile.ir.pieces import Piece, length, narrow, unit

MTP = "mtp."
"""Leads the names of the weights that only the draft head has, in a graph as in a checkpoint."""

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def parameter_names(model: PreTrainedModel) -> dict[str, str]:
    """Path of each parameter -> its name: of tied parameters, the path that comes first."""
    first = {id(p): path for path, p in model.named_parameters()}
    return {path: first[id(p)] for path, p in model.named_parameters(remove_duplicate=False)}


class Mapping:
    """Checkpoint key -> parameter, for one model."""

    def __init__(self, model: PreTrainedModel, transforms: list[WeightTransform]) -> None:
        self.model = model
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))

    def target(self, key: str) -> tuple[str | None, str | None]:
        """The parameter a key belongs to (None: none), and the pattern of the merge it takes part in (None: as is)."""
        path, pattern = rename_source_key(key, self.renamings, self.converters, self.model.base_model_prefix,
                                          self.parameters)
        if path in self.parameters:
            return path, pattern
        return (key, None) if key in self.parameters else (None, None)

    def merge(self, path: str, sources: dict[str, list[Tensor]]) -> Tensor:
        """The parameter from the tensors of each pattern."""
        converter = next(c for c in self.converters if set(sources) <= set(c.source_patterns))
        job: Any = copy.deepcopy(converter)
        job.collected_tensors.update(sources)
        merged = job.convert(path, model=self.model, config=self.model.config)[path]
        job.collected_tensors.clear()
        whole: Tensor = merged[0] if isinstance(merged, list) else merged
        return whole

    def merge_pieces(self, path: str, sources: dict[str, list[Piece]]) -> Piece:
        """As `merge`; what is stored in codes stays so when no group of a scale is cut."""
        coded = [piece for pieces in sources.values() for piece in pieces if isinstance(piece, Coded)]
        if len(coded) == sum(map(len, sources.values())) and len({c.encoding for c in coded}) == 1 and all(
                length(piece, 0) % unit(piece, 0) == 0 for piece in coded) and self._stacks(sources):
            codes, scales = (self.merge(path, {pattern: [getattr(piece, part) for piece in pieces]
                                               for pattern, pieces in sources.items()}) for part in ("codes", "scales"))
            return Coded(codes, scales, coded[0].encoding, coded[0].size)
        return self.merge(path, {pattern: [p if isinstance(p, Tensor) else p.wide() for p in pieces]
                                 for pattern, pieces in sources.items()})

    def _stacks(self, sources: Iterable[str]) -> bool:
        """Whether a merge only puts matrices beside each other."""
        converter = next(c for c in self.converters if set(sources) <= set(c.source_patterns))
        return all(isinstance(step, MergeModulelist | Concatenate) for step in converter.operations)


@dataclass
class Recipe:
    """How one parameter is made: the checkpoint keys of each merge pattern; pattern None is the tensor itself."""

    mapping: Mapping
    path: str
    keys: dict[str | None, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def parameter(self) -> Tensor:
        """The (meta) parameter: shape, and the dtype it was traced in."""
        return self.mapping.parameters[self.path]


def _draft_pattern(model: PreTrainedModel) -> re.Pattern[str]:
    """What keys of a draft head look like for this model; matches nothing when transformers knows of none."""
    try:
        return re.compile(f"(?={re.escape(MTP)})(?:{MtpModel.get_mtp_weights_regex(model).pattern})")
    except (ValueError, TypeError):
        return re.compile(r"(?!)")


def mtp_layers(model: PreTrainedModel, checkpoint: Checkpoint) -> int:
    """How many draft layers a checkpoint holds."""
    pattern = _draft_pattern(model)
    found = [_LAYER.search(f".{key}") for key in checkpoint.weights if pattern.match(key)]
    return max((int(number[1]) for number in found if number), default=-1) + 1


class WeightSource:
    """The weights of a traced model, read and merged on demand.

    recipes: weight name -> how it is made. ignored: reason -> checkpoint keys that are not used, and need not be.
    extra: keys that nothing explains.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, mtp: MtpModel | None = None) -> None:
        self.checkpoint, self.model = checkpoint, model
        self.names = parameter_names(model)
        self.main = Mapping(model, get_model_conversion_mapping(model))
        self.draft = Mapping(mtp, mtp.get_weight_conversions(model)) if mtp is not None else None
        self.draft_layers = mtp.num_mtp_layers if mtp is not None else 0
        self.recipes: dict[str, Recipe] = {}
        self.ignored: dict[str, list[str]] = defaultdict(list)
        self.extra: list[str] = []
        for key in sorted(checkpoint.weights, key=dot_natural_key):
            if self.draft is not None and self._draft_keys.match(key):
                self._place_draft(key, self.draft)
            else:
                self._place(key)

    @cached_property
    def _draft_keys(self) -> re.Pattern[str]:
        return _draft_pattern(self.model)

    def _place(self, key: str) -> None:
        """Give a key to the parameter that it makes, or to the list of those that are not used."""
        path, pattern = self.main.target(key)
        if path is None:
            known = any(re.search(p, key) for p in self.model._keys_to_ignore_on_load_unexpected or ())
            unused = self.ignored["not a part of the language model, as transformers declares"] if known else self.extra
            unused.append(key)
            return
        name = self.names[path]
        if path != name and name in self.checkpoint.weights:
            self.ignored[f"tied to {name}"].append(key)
        else:
            self.recipes.setdefault(name, Recipe(self.main, path)).keys[pattern].append(key)

    def _place_draft(self, key: str, mapping: Mapping) -> None:
        path, pattern = mapping.target(key)
        layer = _LAYER.search(f".{key}")
        if path is not None and path.startswith("layers."):
            self.recipes.setdefault(MTP + path, Recipe(mapping, path)).keys[pattern].append(key)
        elif path is not None or any(re.search(p, key) for p in MtpModel._keys_to_ignore_on_load_unexpected):
            self.ignored["shared with the main model"].append(key)
        elif layer and int(layer[1]) >= self.draft_layers:
            self.ignored["of draft layers beyond the first"].append(key)
        else:
            self.extra.append(key)

    def wanted(self) -> dict[str, Tensor]:
        """Every weight that a trace may name, with the (meta) parameter that tells its shape and dtype."""
        found: dict[str, Tensor] = dict(self.model.named_parameters())
        if self.draft is not None:
            found |= {MTP + path: p for path, p in self.draft.parameters.items() if path.startswith("layers.")}
        return found

    def get(self, name: str) -> Tensor:
        """The weight of a `weight` op, in the dtype the model was traced in. Raises ModelError for an unknown name."""
        recipe = self._recipe(name)
        if None in recipe.keys:
            whole = self.checkpoint.weights[recipe.keys[None][0]].read()
        else:
            whole = self._merged(recipe, slice(None))
        return (whole if isinstance(whole, Tensor) else whole.wide()).to(recipe.parameter.dtype)

    def rows(self, name: str, start: int, stop: int) -> Piece:
        """Rows start..stop of a weight (experts of a stack): codes and bf16 as stored, others in the traced dtype."""
        recipe = self._recipe(name)
        if None in recipe.keys:
            found = self.checkpoint.weights[recipe.keys[None][0]].read(start, stop)
        elif all(len(keys) == recipe.parameter.shape[0] for keys in recipe.keys.values()):
            found = self._merged(recipe, slice(start, stop))
        else:
            found = narrow(self._merged(recipe, slice(None)), 0, start, stop)
        if isinstance(found, Coded) or found.dtype is torch.bfloat16:
            return found
        return found.to(recipe.parameter.dtype)

    def tensors_of(self, keys: Iterable[str]) -> list[str]:
        """The tensors that weights are stored in."""
        return [tensor for key in keys for tensor in self.checkpoint.weights[key].tensors]

    @cached_property
    def linears(self) -> set[str]:
        """Checkpoint names of the modules whose weights a quantiser would convert: linear layers and experts."""
        modules = dict(self.model.named_modules())
        paths = {name for name, recipe in self.recipes.items() if recipe.parameter.ndim > 1 and (
            ".experts." in name or name.startswith(MTP) or isinstance(modules.get(name.rpartition(".")[0]), Linear))}
        keys = {key for name in paths for keys in self.recipes[name].keys.values() for key in keys}
        return {key.removesuffix(".weight") for key in keys}

    @cached_property
    def draft_names(self) -> dict[str, list[str]]:
        """Weight of the draft head -> its checkpoint key, or those of its merge with `*` for the expert."""
        found = {}
        for name, recipe in self.recipes.items():
            if name.startswith(MTP):
                found[name] = [re.sub(r"\.experts\.\d+\.", ".experts.*.", keys[0]) for keys in recipe.keys.values()]
        return found

    def fingerprint(self) -> str:
        """Whether the checkpoint is still the same."""
        return self.checkpoint.fingerprint()

    def _recipe(self, name: str) -> Recipe:
        recipe = self.recipes.get(name)
        if recipe is None:
            raise ModelError(f"{self.checkpoint.path} has no tensors for parameter {name}")
        return recipe

    def _merged(self, recipe: Recipe, part: slice) -> Piece:
        """Some of the experts of a stack that the checkpoint keeps apart."""
        pieces = {str(pattern): [self.checkpoint.weights[key].read() for key in keys[part]]
                  for pattern, keys in recipe.keys.items()}
        return recipe.mapping.merge_pieces(recipe.path, pieces)
