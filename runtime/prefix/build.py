"""The prefix cache of a loaded build."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from qcn_compile.errors import UsageError
from qcn_compile.runtime.kv_cache import PageAllocator
from qcn_compile.runtime.memory import MemoryPlan
from qcn_compile.runtime.prefix.cache import PrefixCache
from qcn_compile.runtime.prefix.files import PrefixFiles
from qcn_compile.runtime.prefix.options import PrefixOptions
from qcn_compile.runtime.prefix.policy import SnapshotPolicy
from qcn_compile.runtime.prefix.rows import Rows
from qcn_compile.runtime.tokenizer import Tokenizer

MESSAGE_START, MESSAGE_END = "<|im_start|>", "<|im_end|>"


def prefix_cache(build: Path, options: PrefixOptions | None, memory: MemoryPlan, rows: Rows,
                 tokenizer: Tokenizer | None) -> Callable[[PageAllocator], PrefixCache] | None:
    """What makes the cache once the KV pages are there; None when it is off.

    Raises UsageError for a store that cannot be used.
    """
    if options is None:
        return None
    files = None
    if options.store is not None:
        try:
            files = PrefixFiles(options.store, identity(build, memory, options.overrides), options.store_bytes)
        except OSError as error:
            raise UsageError(f"--prefix-store {options.store}: {error.strerror or error}") from None
    policy = message_policy(tokenizer, memory.page_size)
    slots = range(memory.state_slots, memory.all_slots)
    return lambda pages: PrefixCache(pages, rows, policy, slots, memory.host_bytes, files)


def message_policy(tokenizer: Tokenizer | None, page_size: int) -> SnapshotPolicy:
    """Boundaries between messages as the tokenizer names them."""
    def ids(text: str) -> frozenset[int]:
        token = None if tokenizer is None else tokenizer.backend.token_to_id(text)
        return frozenset() if token is None else frozenset({token})

    return SnapshotPolicy(page_size, ids(MESSAGE_START), ids(MESSAGE_END))


def identity(build: Path, memory: MemoryPlan, overrides: str = "") -> str:
    """What must be the same for stored pages and states to be of use: the build, which names all its files' hashes."""
    digest = hashlib.sha256((build / "manifest.json").read_bytes()).hexdigest()
    layout = json.dumps([digest, memory.page_size, overrides])
    return hashlib.sha256(layout.encode()).hexdigest()
