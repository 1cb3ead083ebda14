"""The audit of a checkpoint, from headers alone: every tensor used once or ignored for a reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform, revert_weight_conversion

from qcn_compile.errors import ModelError
from qcn_compile.frontend.names import collapse, listed
from qcn_compile.frontend.weights import MTP, Mapping, Recipe, WeightSource

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Audit:
    """The verdict on a checkpoint that fits: how many tensors are used, and which are not, by reason.

    exceptions: where the tensors are not what the list of unquantised modules says; the tensors are believed.
    """

    used: int
    ignored: dict[str, list[str]]
    exceptions: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.used} tensors, each used once"]
        lines += [f"{len(keys)} ignored, {reason}:{listed(collapse(keys))}" for reason, keys in self.ignored.items()]
        lines += [f"{len(keys)} {what}:{listed(collapse(keys))}" for what, keys in self.exceptions.items()]
        return "\n".join(lines)


@dataclass
class _Faults:
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def text(self) -> str:
        """All faults, grouped and shortened; empty when there are none."""
        parts = []
        for what, keys in (("missing", self.missing), ("extra", self.extra), ("given twice", self.doubled)):
            if keys:
                parts.append(f"  {what} ({len(keys)}):{listed(collapse(keys))}")
        if self.wrong:
            lines = [f"{pattern} {how}" for how, keys in self.wrong.items() for pattern in collapse(keys)]
            parts.append(f"  wrong shape ({sum(map(len, self.wrong.values()))}):{listed(lines)}")
        return "\n".join(parts)


def audit(source: WeightSource) -> Audit:
    """Check every tensor of the checkpoint against the model, reading no data.

    Raises one ModelError that names all missing, extra, doubled and mis-shaped tensors.
    """
    grouped = source.checkpoint.grouped
    faults = _Faults(list(grouped.missing), grouped.extra + source.tensors_of(source.extra))
    for how, names in grouped.wrong.items():
        faults.wrong[how] += names
    published = _published(source)
    for name in source.wanted():
        recipe = source.recipes.get(name)
        if recipe is None:
            faults.missing += published[name]
        else:
            _check(source, recipe, published[name], faults)
    if text := faults.text():
        kind = source.model.config.model_type
        raise ModelError(f"{source.checkpoint.path} does not fit its config.json ({kind}):\n{text}\n"
                         "  Check that config.json belongs to these files, or download them again")
    ignored = {reason: source.tensors_of(keys) for reason, keys in source.ignored.items()} | dict(grouped.ignored)
    return Audit(len(source.checkpoint.stored) - sum(map(len, ignored.values())), ignored, _exceptions(source))


def _exceptions(source: WeightSource) -> dict[str, list[str]]:
    """Matrices that are stored otherwise than the config's list of unquantised modules says."""
    scheme = source.checkpoint.scheme
    listed_ = [str(n) for n in scheme.get("modules_to_not_convert") or scheme.get("ignore") or ()]
    found: dict[str, list[str]] = defaultdict(list)
    for name, weight in source.checkpoint.weights.items() if scheme else ():
        named = any(_names(entry, name.removesuffix(".weight")) for entry in listed_)
        if weight.plain and not named and name.removesuffix(".weight") in source.linears:
            found["stored unquantised though the config does not exclude them"].append(name)
        if not weight.plain and named:
            found["stored quantised though the config excludes them"].append(name)
    return dict(found)


def _names(entry: str, module: str) -> bool:
    """Whether an entry of such a list means a module: by name, as a part of its path, or as `re:` pattern."""
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return module == entry or module.startswith(f"{entry}.") or f".{entry}." in f".{module}."


def _check(source: WeightSource, recipe: Recipe, published: Shapes, faults: _Faults) -> None:
    """One parameter: stored whole, or as the published parts; never both, never a part twice."""
    given = [key for keys in recipe.keys.values() for key in keys]
    if None in recipe.keys:
        expected: Shapes = {recipe.keys[None][0]: tuple(recipe.parameter.shape)}
    else:
        expected = published
    faults.missing += [key for key in expected if key not in given]
    faults.doubled += [key for key in given if key not in expected]
    for key in given:
        have = source.checkpoint.weights[key].shape
        if key in expected and have != expected[key]:
            faults.wrong[f"is {list(have)}, the config wants {list(expected[key])}"].append(key)


def _published(source: WeightSource) -> dict[str, Shapes]:
    """For each weight, the checkpoint keys and shapes that it is published as."""
    table: dict[str, Shapes] = defaultdict(dict)
    for key, tensor in revert_weight_conversion(source.model, dict(source.model.named_parameters())).items():
        path, _ = source.main.target(key)
        table[source.names[path or key]][key] = tuple(tensor.shape)
    if source.draft is not None:
        for path, parameter in source.draft.parameters.items():
            if path.startswith("layers."):
                table[MTP + path] = _published_draft(source.draft, path, parameter)
    return table


def _published_draft(mapping: Mapping, path: str, parameter: Tensor) -> Shapes:
    """The keys of a draft parameter: of the spellings that map onto it, the first (its renamings have no inverse)."""
    renamed = _reverted(mapping.model, mapping.renamings, path, parameter)
    split = _reverted(mapping.model, mapping.converters, path, parameter)
    one_up = {key[key.find(MTP):]: shape for key, shape in renamed.items() if MTP in key}
    inside = {MTP + key.replace(".mtp_block.", ".", 1): shape for key, shape in split.items()}
    for spelling in (one_up, inside):
        if spelling and all(mapping.target(key)[0] == path for key in spelling):
            return spelling
    return {f"{MTP}{path} (name in the model)": tuple(parameter.shape)}


def _reverted(model: PreTrainedModel, transforms: Iterable[WeightTransform], path: str, parameter: Tensor) -> Shapes:
    """Keys and shapes of a parameter when only some transforms are undone."""
    setattr(model, "_weight_conversions", list(transforms))  # noqa: B010  (where transformers looks for them)
    try:
        parts = revert_weight_conversion(model, {path: torch.empty_like(parameter, device="meta")})
    finally:
        delattr(model, "_weight_conversions")
    return {key: tuple(tensor.shape) for key, tensor in parts.items()}
