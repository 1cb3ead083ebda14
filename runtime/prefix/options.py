"""The prefix cache's flags, and what they mean."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from qcn_compile.errors import UsageError

RATIO = 0.9


@dataclass(frozen=True)
class PrefixOptions:
    """Bytes of host memory for what the device has no room for (None: a tenth of the memory), and a folder for files.

    overrides: of the model's config, which stored prefixes depend on.
    states: state slots in all, running sequences' and snapshots'. None: by `ratio`, state memory to KV memory.
    """

    host_bytes: int | None = None
    store: Path | None = None
    store_bytes: int = 32_000_000_000
    states: int | None = None
    ratio: float = RATIO
    overrides: str = ""

    def __post_init__(self) -> None:
        if self.states is not None and self.states < 1:
            raise UsageError(f"--max-mamba-cache-size {self.states}: must be at least 1; leave it out to let "
                             "--mamba-full-memory-ratio decide")
        if not self.ratio > 0:
            raise UsageError(f"--mamba-full-memory-ratio {self.ratio:g}: must be more than 0")
        if self.host_bytes is not None and self.host_bytes < 0:
            raise UsageError(f"--prefix-cache-memory {self.host_bytes / 1e9:g}: must be at least 0")


def add_prefix_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the prefix cache; names as in SGLang where it has them."""
    g = parser.add_argument_group("prefix cache")
    g.add_argument("--disable-radix-cache", action="store_true", help="compute every prompt from its first token")
    g.add_argument("--prefix-cache-memory", type=float, metavar="GB",
                   help="host memory for prefixes that KV pages and state slots have no room for "
                        "(default: a tenth of the memory)")
    g.add_argument("--prefix-store", type=Path, metavar="DIR", help="also keep prefixes in files there, for restarts")
    g.add_argument("--max-mamba-cache-size", type=int, metavar="N",
                   help="state slots, of running sequences and cached prefixes together (default: by the ratio)")
    g.add_argument("--mamba-full-memory-ratio", type=float, default=RATIO, metavar="X",
                   help=f"memory of state slots : memory of KV pages (default {RATIO})")


def prefix_options(arguments: argparse.Namespace) -> PrefixOptions | None:
    """The flags as options; None when the cache is off. Raises UsageError for values that cannot work."""
    memory = arguments.prefix_cache_memory
    options = PrefixOptions(None if memory is None else int(memory * 1e9), arguments.prefix_store,
                            states=arguments.max_mamba_cache_size, ratio=arguments.mamba_full_memory_ratio)
    if not arguments.disable_radix_cache:
        return options
    if arguments.prefix_store is not None:
        raise UsageError("--prefix-store and --disable-radix-cache exclude each other")
    return None
