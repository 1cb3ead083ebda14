"""How one model lies on several GPUs, as data: what the sharding pass obeys and the manifest records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qcn_compile.errors import UsageError

FP8_BLOCK = 128  # rows and columns that share a scale in a block-FP8 checkpoint


@dataclass(frozen=True)
class Layout:
    """`replicas` copies of a model, each in `pp` stages of consecutive layers, each stage on `tp` ranks.

    tp: ranks that share attention heads, DeltaNet key-head groups, and the rows of embedding and lm_head.
    ep: groups among these tp ranks that hold whole experts each (ep divides tp). Inside a group, tp / ep ranks share
        the width of its experts. ep = 1: every rank holds a slice of all experts; ep = tp: whole experts only.
    kv_replication: ranks that hold the same key-value head; above 1 where tp exceeds the number of these heads.
    shared_expert: "split", its width over all tp ranks; or "replicated", whole on each, one of them adds it.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    replicas: int = 1
    kv_replication: int = 1
    shared_expert: str = "split"

    @property
    def ranks(self) -> int:
        """Processes of one replica."""
        return self.tp * self.pp

    @property
    def gpus(self) -> int:
        """Cards of all replicas."""
        return self.ranks * self.replicas

    @property
    def expert_tp(self) -> int:
        """Ranks that share the width of one expert."""
        return self.tp // self.ep

    def expert_group(self, rank: int) -> tuple[int, int]:
        """(which of the ep groups, which of its expert_tp slices) a rank within its stage holds."""
        return rank // self.expert_tp, rank % self.expert_tp

    def stage(self, index: int, layers: int) -> range:
        """The layers of a pipeline stage: as equal as can be, the first stages one longer."""
        size, more = divmod(layers, self.pp)
        start = index * size + min(index, more)
        return range(start, start + size + (index < more))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        return Layout(**data)

    def __str__(self) -> str:
        parts = [f"tp {self.tp}" if self.tp > 1 or self.ranks == 1 else "", f"ep {self.ep}" if self.ep > 1 else "",
                 f"pp {self.pp}" if self.pp > 1 else "", f"{self.replicas} replicas" if self.replicas > 1 else ""]
        return " x ".join(filter(None, parts))


def layout_for(config: Mapping[str, Any], tp: int = 1, ep: int = 1, pp: int = 1, replicas: int = 1,
               fp8_blocks: bool = False) -> Layout:
    """The layout of these degrees for a model's config, with what follows from them filled in.

    `fp8_blocks`: expert weights keep the 128 x 128 blocks of an FP8 checkpoint, so a rank's slice must hold whole ones.
    Raises UsageError with the number that breaks.
    """
    problem = problem_of(config, tp, ep, pp, replicas, fp8_blocks)
    if problem:
        raise UsageError(problem)
    heads = int(config["num_key_value_heads"])
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    cut = shared % tp or (fp8_blocks and shared // tp % FP8_BLOCK)
    return Layout(tp, ep, pp, replicas, max(1, tp // heads), "replicated" if ep > 1 or cut else "split")


def problem_of(config: Mapping[str, Any], tp: int, ep: int, pp: int, replicas: int, fp8_blocks: bool) -> str:
    """Why such a layout is impossible, with the number that breaks and the cure; empty when it is possible."""
    for flag, value in (("--tp", tp), ("--ep", ep), ("--pp", pp), ("replicas", replicas)):
        if value < 1:
            return f"{flag} {value}: must be at least 1"
    heads, kv = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    values = int(config.get("linear_num_value_heads") or tp)
    experts, width = int(config.get("num_experts") or ep), int(config.get("moe_intermediate_size") or tp)
    layers = int(config["num_hidden_layers"])
    for count, what in ((heads, "attention heads"), (values, "DeltaNet value heads")):
        if count % tp and tp % count:
            return (f"--tp {tp}: {count} {what} can neither be shared nor repeated evenly by {tp} ranks; "
                    f"choose a divisor or a multiple of {count}")
    if tp % kv and kv % tp:
        return f"--tp {tp}: {kv} key-value heads can neither be shared nor repeated evenly by {tp} ranks"
    if tp % ep:
        return f"--ep {ep}: the ranks that share experts are the {tp} of --tp; choose a divisor of {tp}"
    if experts % ep:
        return f"--ep {ep}: {experts} experts cannot be dealt to {ep} groups; choose a divisor of {experts}"
    if pp > layers:
        return f"--pp {pp}: the model has {layers} layers; choose at most {layers} stages"
    slice_tp = tp // ep
    if width % slice_tp:
        return f"--tp {tp}: experts {width} wide cannot be shared by {slice_tp} ranks; add --ep"
    if fp8_blocks and slice_tp > 1 and width // slice_tp % FP8_BLOCK:
        return (f"--tp {tp}: {width} / {slice_tp} = {width // slice_tp} columns of an expert a rank are no whole "
                f"{FP8_BLOCK}-blocks of FP8; add --ep {min(tp, -(-slice_tp * FP8_BLOCK // width) * ep)} or more")
    return ""
