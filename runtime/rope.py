"""Rotary frequencies under overrides of a model's config (YaRN and others), and how long a context they are good for.

Formulas as in transformers' `modeling_rope_utils`; YaRN: Peng et al. 2023, arXiv 2309.00071.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qcn_compile.artifact import Manifest
from qcn_compile.errors import ArtifactError, UsageError

FLAG = "--json-model-override-args"
_KEYS = ("rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings")
_NEEDED = {"default": (), "linear": ("factor",), "yarn": ("factor",),
           "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


@dataclass(frozen=True)
class RopeOverride:
    """`theta` and `scaling` (rope_type and its parameters) as the config has them after overriding.

    positions: tokens that the config then stands for.
    """

    theta: float
    scaling: Mapping[str, Any]
    original: int
    positions: int

    def frequencies(self, half: int) -> tuple[np.ndarray, float]:
        """f32 [half] inverse frequencies, and the factor of cos and sin."""
        base = 1.0 / self.theta ** (np.arange(half) / half)
        kind, factor = self.scaling["rope_type"], float(self.scaling.get("factor", 1.0))
        if kind == "linear":
            base, scale = base / factor, 1.0
        elif kind == "llama3":
            base, scale = self._llama3(base, factor), 1.0
        elif kind == "yarn":
            base, scale = self._yarn(base, factor)
        else:
            scale = 1.0
        return base.astype(np.float32), scale

    def _llama3(self, base: np.ndarray, factor: float) -> np.ndarray:
        low, high = float(self.scaling["low_freq_factor"]), float(self.scaling["high_freq_factor"])
        turns = self.original * base / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - smooth) * base / factor + smooth * base

    def _yarn(self, base: np.ndarray, factor: float) -> tuple[np.ndarray, float]:
        half = len(base)

        def dimension(turns: float) -> float:
            """The pair that turns so often over the original context."""
            return half * math.log(self.original / (turns * 2 * math.pi)) / math.log(self.theta)

        low = dimension(float(self.scaling.get("beta_fast") or 32))
        high = dimension(float(self.scaling.get("beta_slow") or 1))
        if self.scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        ramp = np.clip((np.arange(half) - low) / (high - low or 1e-3), 0.0, 1.0)
        return base / factor * ramp + base * (1 - ramp), self._attention(factor)

    def _attention(self, factor: float) -> float:
        """YaRN's factor of cos and sin."""
        given = self.scaling.get("attention_factor")
        if given is not None:
            return float(given)

        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        top, bottom = self.scaling.get("mscale"), self.scaling.get("mscale_all_dim")
        return mscale(float(top)) / mscale(float(bottom)) if top and bottom else mscale(1.0)


class Replaceable(Protocol):
    """Loaded weights."""

    def replace_weight(self, name: str, data: np.ndarray) -> None:
        """Other contents, of the same size, for a blob."""
        ...


def apply(override: RopeOverride, manifest: Manifest, loaded: Replaceable) -> None:
    """Put an override's tables in place of the build's. Raises ArtifactError for a build that has none to replace."""
    tables = manifest.weights.get("rope")
    if not tables:
        raise ArtifactError(f"{FLAG}: this build has its rotary tables compiled in; build it again with the "
                            "qcn-compile of this version")
    for table in tables:
        frequencies, factor = override.frequencies(table["half"])
        loaded.replace_weight(table["blob"], np.append(frequencies, np.float32(factor / table["scaling"])))


def rope_override(text: str, config: Mapping[str, Any]) -> RopeOverride | None:
    """What --json-model-override-args asks for over a model's config; None for {}.

    Raises UsageError for what is no JSON, no rope override, or lacks a parameter.
    """
    given = parse_overrides(text)
    if not given:
        return None
    merged = {**config, **given}
    scaling = _scaling(given, merged)
    inner = config.get("rope_parameters") or {}
    theta = given.get("rope_theta") or scaling.pop("rope_theta", None) or inner.get("rope_theta") or merged.get(
        "rope_theta", 10000.0)
    longest = _number(merged.get("max_position_embeddings", 32768), "max_position_embeddings")
    original = _number(scaling.get("original_max_position_embeddings") or longest, "original_max_position_embeddings")
    factor = float(scaling.get("factor", 1.0))
    stretched = longest if scaling["rope_type"] == "default" else int(original * factor)
    return RopeOverride(float(_number(theta, "rope_theta")), scaling, int(original), int(max(longest, stretched)))


def parse_overrides(text: str) -> dict[str, Any]:
    """The JSON object of the flag. Raises UsageError for what a build cannot take."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{FLAG}: is no JSON ({error})") from None
    if not isinstance(given, dict):
        raise UsageError(f"{FLAG}: must be a JSON object")
    other = [name for name in given if name not in _KEYS]
    if other:
        raise UsageError(f"{FLAG} {', '.join(other)}: a build has that compiled in; only {', '.join(_KEYS)} can "
                         "change. For others edit config.json in a copy of the checkpoint")
    return given


def _scaling(given: Mapping[str, Any], merged: Mapping[str, Any]) -> dict[str, Any]:
    """rope_type and its parameters, by any of the names they have; an override comes before the config."""
    names = ("rope_scaling", "rope_parameters")
    wanted = [given[name] for name in names if name in given] + [merged[name] for name in names if merged.get(name)]
    found: Any = next((entry for entry in wanted if entry), {})
    if not isinstance(found, dict):
        raise UsageError(f"{FLAG} rope_scaling: must be a JSON object with rope_type and its parameters")
    scaling = dict(found)
    kind = scaling["rope_type"] = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _NEEDED:
        raise UsageError(f"{FLAG} rope_type {kind!r}: use {', '.join(_NEEDED)}; tables that depend on the length of "
                         "each sequence (dynamic, longrope) are not built")
    for name in _NEEDED[kind]:
        if name not in scaling:
            raise UsageError(f"{FLAG}: rope_type {kind} needs {name}")
    for name in ("factor", *_NEEDED[kind]):
        if name in scaling:
            _number(scaling[name], name)
    return scaling


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{FLAG} {name}={value!r}: must be a number above 0")
    return value
