"""Parameters from checkpoint tensors, by transformers' own conversion mapping, and the audit of the whole checkpoint."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_layers import MtpModel

from qcn_compile.errors import ModelError
from qcn_compile.frontend.checkpoint import Checkpoint
from qcn_compile.frontend.names import collapse, listed

MTP = "mtp."
"""Leads the names of the weights that only the draft head has."""


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
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))

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
        job = copy.deepcopy(converter)
        job.collected_tensors.update(sources)
        merged = job.convert(path, model=self.model, config=self.model.config)[path]
        return merged[0] if isinstance(merged, list) else merged


@dataclass
class Recipe:
    """How one parameter is made: the checkpoint keys of each merge pattern; pattern None is the tensor itself."""

    mapping: Mapping
    path: str
    keys: dict[str | None, list[str]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Audit:
    """The verdict on a checkpoint that fits: how many tensors are used, and which are not, by reason."""

    used: int
    ignored: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.used} tensors, each used once"]
        lines += [f"{len(keys)} ignored, {reason}:{listed(keys)}" for reason, keys in self.ignored.items()]
        return "\n".join(lines)


def mtp_pattern(model: PreTrainedModel) -> re.Pattern[str] | None:
    """What checkpoint keys of a draft head look like for this model; None when transformers knows of none."""
    try:
        return MtpModel.get_mtp_weights_regex(model)
    except (ValueError, TypeError):
        return None


def mtp_layers(model: PreTrainedModel, checkpoint: Checkpoint) -> int:
    """How many draft layers a checkpoint holds."""
    pattern = mtp_pattern(model)
    keys = [key for key in checkpoint.tensors if pattern and key.startswith(MTP) and pattern.search(key)]
    numbers = [int(found[1]) for key in keys if (found := re.search(r"\.layers\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


class WeightSource:
    """The weights of a traced model, read and merged on demand."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, mtp: MtpModel | None = None) -> None:
        self.checkpoint, self.model, self.mtp = checkpoint, model, mtp
        self._names = parameter_names(model)
        self._main = Mapping(model, get_model_conversion_mapping(model))
        self._draft = Mapping(mtp, mtp.get_weight_conversions(model)) if mtp is not None else None
        self._recipes: dict[str, Recipe] = {}
        self._ignored: dict[str, list[str]] = defaultdict(list)
        self._extra: list[str] = []
        for key in sorted(checkpoint.tensors, key=dot_natural_key):
            self._place(key)

    def _place(self, key: str) -> None:
        """Give a key to the parameter that it makes, or to the list of those that are not used."""
        draft = mtp_pattern(self.model)
        if self._draft is not None and key.startswith(MTP) and draft and draft.search(key):
            return self._place_draft(key, self._draft)
        path, pattern = self._main.target(key)
        if path is not None:
            name = self._names[path]
            if path != name and name in self.checkpoint.tensors:
                self._ignored[f"tied to {name}"].append(key)
            else:
                self._recipes.setdefault(name, Recipe(self._main, path)).keys[pattern].append(key)
        elif any(re.search(p, key) for p in self.model._keys_to_ignore_on_load_unexpected or ()):
            self._ignored["not a part of the language model (transformers leaves them out too)"].append(key)
        else:
            self._extra.append(key)
        return None

    def _place_draft(self, key: str, mapping: Mapping) -> None:
        path, pattern = mapping.target(key)
        layer = re.search(r"\.layers\.(\d+)\.", key)
        if path is not None and path.startswith("layers."):
            self._recipes.setdefault(MTP + path, Recipe(mapping, path)).keys[pattern].append(key)
        elif path is not None or any(re.search(p, key) for p in MtpModel._keys_to_ignore_on_load_unexpected):
            self._ignored["shared with the main model"].append(key)
        elif layer and int(layer[1]) >= mapping.model.num_mtp_layers:
            self._ignored["of draft layers beyond the first"].append(key)
        else:
            self._extra.append(key)

    def names(self) -> dict[str, Tensor]:
        """Every weight that a trace may name, with the (meta) parameter that tells its shape and dtype."""
        found: dict[str, Tensor] = dict(self.model.named_parameters())
        if self.mtp is not None:
            found |= {MTP + path: p for path, p in self.mtp.named_parameters() if path.startswith("layers.")}
        return found

    def get(self, name: str) -> Tensor:
        """The weight of a `weight` op, in the dtype the model was traced in. Raises ModelError for an unknown name."""
        recipe = self._recipes.get(name)
        if recipe is None:
            raise ModelError(f"{self.checkpoint.path} has no tensors for parameter {name}")
        dtype = recipe.mapping.parameters[recipe.path].dtype
        if None in recipe.keys:
            return self.checkpoint.read(recipe.keys[None][0]).to(dtype)
        sources = {str(pattern): [self.checkpoint.read(key) for key in keys] for pattern, keys in recipe.keys.items()}
        return recipe.mapping.merge(recipe.path, sources).to(dtype)

    def audit(self) -> Audit:
        """Check every tensor of the checkpoint against the model, reading no data.

        Raises one ModelError that names all missing, extra, doubled and mis-shaped tensors.
        """
        missing, wrong, doubled = [], [], []
        expected = self._expected()
        for name in self.names():
            recipe = self._recipes.get(name)
            if recipe is None:
                missing += list(expected[name])
            elif None in recipe.keys:
                doubled += [key for keys in recipe.keys.values() for key in keys][1:]
                wrong += self._wrong(recipe.keys[None][0], tuple(recipe.mapping.parameters[recipe.path].shape))
            else:
                given = {key for keys in recipe.keys.values() for key in keys}
                missing += [key for key in expected[name] if key not in given]
                doubled += [key for key in given if key not in expected[name]]
                wrong += [w for key in given & set(expected[name]) for w in self._wrong(key, expected[name][key])]
        self._report(missing, wrong, doubled)
        ignored = sum(map(len, self._ignored.values()))
        return Audit(len(self.checkpoint.tensors) - ignored, dict(self._ignored))

    def _wrong(self, key: str, shape: tuple[int, ...]) -> list[tuple[str, str]]:
        have = self.checkpoint.tensors[key].shape
        return [] if have == shape else [(key, f"is {list(have)}, the config wants {list(shape)}")]

    def _report(self, missing: list[str], wrong: list[tuple[str, str]], doubled: list[str]) -> None:
        parts = []
        for what, keys in (("missing", missing), ("extra", self._extra), ("given twice", doubled)):
            if keys:
                parts.append(f"  {what} ({len(keys)}):{listed(keys)}")
        if wrong:
            groups: dict[str, list[str]] = defaultdict(list)
            for key, how in wrong:
                groups[how].append(key)
            lines = [f"\n    {pattern} {how}" for how, keys in groups.items() for pattern in collapse(keys)]
            parts.append(f"  wrong shape ({len(wrong)}):" + "".join(lines[:12]))
        if parts:
            raise ModelError(f"{self.checkpoint.path} does not fit its config.json ({self.model.config.model_type}):\n"
                             + "\n".join(parts) + "\n  Check that config.json belongs to these files, or download again")

    def _expected(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """For each weight, the checkpoint keys and shapes that it is published as."""
        table: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for key, tensor in revert_weight_conversion(self.model, dict(self.model.named_parameters())).items():
            path, _ = self._main.target(key)
            table[self._names[path or key]][key] = tuple(tensor.shape)
        if self._draft is not None:
            for path, parameter in self._draft.parameters.items():
                if path.startswith("layers."):
                    table[MTP + path] = _draft_keys(self._draft, path, parameter)
        return table


def _draft_keys(mapping: Mapping, path: str, parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """Published keys of a draft parameter: of the spellings that map onto it, the first."""
    mapping.model._weight_conversions = [*mapping.converters]
    split = revert_weight_conversion(mapping.model, {path: torch.empty_like(parameter)})
    mapping.model._weight_conversions = [*mapping.renamings]
    renamed = revert_weight_conversion(mapping.model, {path: torch.empty_like(parameter)})
    del mapping.model._weight_conversions
    plain = {MTP + key.replace(".mtp_block.", ".", 1): tuple(t.shape) for key, t in split.items()}
    one_up = {key.removeprefix("model."): tuple(t.shape) for key, t in renamed.items()}
    for spelling in (one_up, plain):
        if all(mapping.target(key)[0] == path for key in spelling):
            return spelling
    return {f"{MTP}{path} (parameter)": tuple(parameter.shape)}
