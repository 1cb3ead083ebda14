"""The prefix cache as the scheduler sees it: where a request may resume, and what is kept when it moves on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from qcn_compile.errors import CapacityError
from qcn_compile.runtime.kv_cache import PageAllocator
from qcn_compile.runtime.prefix.files import PrefixFiles, digest
from qcn_compile.runtime.prefix.policy import LIKELY, UNLIKELY, SnapshotPolicy
from qcn_compile.runtime.prefix.rows import Rows
from qcn_compile.runtime.prefix.tiers import Tiers
from qcn_compile.runtime.prefix.tree import Match, Node, RadixTree, whole_pages
from qcn_compile.runtime.request import Request


@dataclass
class PrefixCounts:
    """Since the start: requests that asked, those that hit, and their tokens."""

    requests: int = 0
    hits: int = 0
    tokens: int = 0
    cached: int = 0


class PrefixCache:
    """A radix tree of what was computed. A request resumes at the longest boundary that has a state, copying that state
    and the page the boundary lies in; whole pages are shared. No page that a sequence writes is another sequence's.

    `slots`: state slots of the device set aside for snapshots. `host_bytes`: for what the device has no room for.
    """

    def __init__(self, pages: PageAllocator, rows: Rows, policy: SnapshotPolicy, slots: range, host_bytes: int = 0,
                 files: PrefixFiles | None = None) -> None:
        self.policy, self._pages, self._files = policy, pages, files
        self.tree = RadixTree(policy.page_size, self._share)
        self.tiers = Tiers(self.tree, pages, rows, slots, host_bytes, files)
        self.counts = PrefixCounts()
        pages.spare = self.tiers
        if files is not None:
            self._adopt_files(files)

    def busy_pages(self, tokens: Sequence[int]) -> int:
        """How many pages a request with these tokens would share with running ones."""
        path = list(takewhile(lambda node: node.pages is not None, self._usable(self._match(tokens))))
        pages = whole_pages(path, self.policy.page_size)
        return len(pages) - self.tiers.sole(pages)

    def resume(self, request: Request) -> None:
        """Give a request that has a table and a slot the longest cached prefix, and plan the rest of its prompt."""
        assert request.table is not None
        found = self._match(request.tokens)
        while path := self._usable(found):
            try:
                if self._load(request, path):
                    break
            except CapacityError:  # running sequences hold the pages to load it to: compute instead
                request.table.release()
                path = []
                break
            found = self._match(request.tokens)
        request.computed = request.kept = path[-1].end if path else 0
        request.cuts = self.policy.plan(request.tokens, request.computed, found.shared)
        if request.cached is None:
            request.cached = request.computed
            self.counts.requests += 1
            self.counts.hits += bool(path)
            self.counts.tokens += len(request.tokens)
            self.counts.cached += request.computed

    def cut(self, request: Request, count: int) -> int:
        """How many of `count` tokens are to run now, so that a state can be kept where it is useful."""
        return self.policy.cut(request.cuts, request.computed, count, len(request.tokens))

    def advanced(self, request: Request) -> None:
        """A chunk of a request was computed: keep its state if the boundary is worth it."""
        if request.remaining and self.policy.keeps(request.cuts, request.computed, request.kept):
            self.keep(request, LIKELY if request.computed in request.cuts.must else UNLIKELY)

    def keep(self, request: Request, chance: float = LIKELY, store: bool = False) -> None:
        """Keep what a request has computed. `store`: also in the files, if there are any."""
        assert request.table is not None and request.state is not None
        if not request.computed:
            return
        tokens = np.array(request.tokens[:request.computed], np.int32)
        node = self.tree.insert(tokens)
        path = node.path()
        with self._pinned(path):
            for each in path:
                if each.pages is None:
                    places = each.page_range(self.policy.page_size)
                    each.pages = request.table.pages[places.start:places.stop].tolist()
                    self.tiers.set_host(each.kv, None)
                    self.tiers.hold(each.pages)
            node.credit, node.chance = self.tiers.level, max(node.chance, chance)
            if not node.has_state:
                self.tiers.keep_state(node, request.state)
        request.kept = request.computed
        self.tiers.prune(node)
        if store and node in self.tree.nodes:
            self.tiers.store(path)

    def page_lists(self) -> list[list[int]]:
        """Pages the cache holds, one list an owner."""
        return self.tiers.page_lists()

    def clear(self) -> None:
        """Forget everything; files stay."""
        for node in list(self.tree.root.children.values()):
            self.tiers.drop(node)

    def close(self) -> None:
        """Finish writing files."""
        if self._files is not None:
            self._files.close()

    def check_integrity(self) -> None:
        """Tree, pages, snapshots and their counts agree."""
        self.tree.check_integrity()
        self.tiers.check_integrity()
        if self.tiers.pinned:
            raise AssertionError("prefix cache: nodes are still pinned")

    def __str__(self) -> str:
        c, t = self.counts, self.tiers
        return (f"prefix cache: {c.hits} of {c.requests} requests hit, {c.cached} of {c.tokens} tokens; "
                f"{len(self.tree.nodes)} boundaries, {t.slots_used()} snapshots on the device, "
                f"{t.host_used() / 1e6:.1f} MB spilled, {t.dropped} dropped")

    def _share(self, pages: list[int]) -> None:
        self.tiers.hold(pages)

    def _match(self, tokens: Sequence[int]) -> Match:
        """What is known of all tokens but the last, which is always computed."""
        return self.tree.match(np.array(tokens[:-1], np.int32))

    def _usable(self, found: Match) -> list[Node]:
        """The path to the deepest boundary that has a state."""
        path = list(found.path)
        while path and not path[-1].has_state:
            path.pop()
        return path

    def _load(self, request: Request, path: list[Node]) -> bool:
        """Point a request's table at a path's pages and copy its state. False when a file was gone: so is its node."""
        assert request.table is not None and request.state is not None
        node, size = path[-1], self.policy.page_size
        with self._pinned(path):
            lost = next((each for each in path if not self.tiers.load_pages(each)), None)
            if lost is None and self.tiers.load_state(node, request.state):
                request.table.adopt(whole_pages(path, size))
                if node.end % size:
                    assert node.pages is not None
                    request.table.grow(node.end)
                    self.tiers.rows.copy_page(node.pages[-1], int(request.table.pages[-1]))
                node.credit, node.chance = self.tiers.level, LIKELY
                return True
        if lost is not None and lost in self.tree.nodes:
            self.tiers.drop(lost)
        elif lost is None:
            node.state.file = None
            self.tiers.prune(node)
        return False

    @contextmanager
    def _pinned(self, path: Sequence[Node]) -> Iterator[None]:
        """Nothing of a path is evicted meanwhile."""
        self.tiers.pinned.update(path)
        try:
            yield
        finally:
            self.tiers.unpin()

    def _adopt_files(self, files: PrefixFiles) -> None:
        """Put the nodes of stored files into the tree; their contents are read when needed."""
        known = {digest(np.empty(0, np.int32)): self.tree.root}
        for stored, tokens in files.scan():
            origin = known.get(stored.header.prefix)
            if origin is None or not len(tokens):
                continue
            node = self.tree.insert(tokens, origin)
            if not node.has_kv:
                size = self.policy.page_size
                node.kv.file = stored
                node.kv_start = node.start // size - stored.header.start // size
            if stored.header.state_bytes:
                node.state.file, node.chance = stored, LIKELY
            known[stored.header.path] = node
        for node in list(self.tree):
            self.tiers.prune(node)
