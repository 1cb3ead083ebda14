"""Where tree nodes lie: KV pages and state slots of the device, copies in host memory, files. Moves and evictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from qcn_compile.runtime.kv_cache import PageAllocator
from qcn_compile.runtime.prefix.files import Contents, PrefixFiles, StoredFile
from qcn_compile.runtime.prefix.policy import score
from qcn_compile.runtime.prefix.rows import Rows
from qcn_compile.runtime.prefix.tree import Copy, Node, RadixTree
from qcn_compile.runtime.state_slots import SlotAllocator


class Tiers:
    """Keeps a tree's contents within the device's pages, the snapshot slots and `host_bytes` of host memory.

    What does not fit moves down: device, host, file, gone. The entry with the fewest tokens saved per byte that was not
    used lately goes first, a node's children before it. Nodes in `pinned` stay.
    """

    def __init__(self, tree: RadixTree, pages: PageAllocator, rows: Rows, slots: range, host_bytes: int,
                 files: PrefixFiles | None) -> None:
        self.tree, self.rows, self.files = tree, rows, files
        self.host_bytes = host_bytes
        self.pinned: set[Node] = set()
        self.level = 0.0  # GreedyDual: the score of what was evicted last
        self.spilled = self.dropped = 0
        self._pages, self._first_slot = pages, slots.start
        self._slots = SlotAllocator(len(slots))
        self._held = np.zeros(pages.total, np.int32)
        self._host_used = 0
        self._recent: tuple[StoredFile, Contents] | None = None

    def hold(self, pages: Sequence[int]) -> None:
        """The tree becomes one more owner of device pages."""
        self._pages.share(pages)
        np.add.at(self._held, pages, 1)

    def reclaimable(self) -> int:
        """Device pages that only the tree holds."""
        return int(np.count_nonzero(self._sole()))

    def sole(self, pages: Sequence[int]) -> int:
        """How many of these pages only the tree holds."""
        return int(np.count_nonzero(self._sole()[list(pages)]))

    def reclaim_pages(self, count: int) -> None:
        """Free `count` device pages if that many are reclaimable."""
        wanted = self._pages.free + count

        def enough() -> bool:
            return self._pages.free >= wanted

        while not enough() and self._evict(self._page_victims(), enough, self._spill):
            pass

    def keep_state(self, node: Node, slot: int) -> None:
        """Copy a running sequence's state to a node: to a snapshot slot, host memory, or not at all, by worth."""
        if not self._slots.free:
            victims = [other for other in self.tree if other.slot is not None]
            least = min([node, *victims], key=self._state_score)
            self.level = max(self.level, self._state_score(least))
            self._spill_state(least)
        if self._slots.free:
            node.slot = self._slots.acquire() + self._first_slot
            self.rows.copy_state(slot, node.slot)
        elif self.rows.state_bytes <= self.host_bytes:
            self.set_host(node.state, self.rows.read_state(slot))
            self.trim_host()

    def load_pages(self, node: Node) -> bool:
        """Bring a node's pages to the device. False when their file is gone. Raises CapacityError without pages."""
        if node.pages is not None:
            return True
        data = node.kv.host
        if data is None:
            contents = self._read(node.kv.file)
            if contents is None:
                return False
            count = len(node.page_range(self.tree.page_size))
            data = contents.pages[node.kv_start:node.kv_start + count]
        pages = self._pages.allocate(len(data))
        self._held[pages] += 1
        self.rows.write_pages(pages, data)
        node.pages = pages
        self.set_host(node.kv, None)
        return True

    def load_state(self, node: Node, slot: int) -> bool:
        """Copy a node's state to a running sequence's slot. False when its file is gone."""
        if node.slot is not None:
            self.rows.copy_state(node.slot, slot)
            return True
        data = node.state.host
        if data is None:
            contents = self._read(node.state.file)
            data = None if contents is None else contents.state
        if data is None:
            return False
        self.rows.write_state(slot, data)
        return True

    def store(self, path: Sequence[Node]) -> None:
        """Write a path's nodes to files, those that are not there yet."""
        if self.files is None:
            return
        tokens = np.concatenate([node.tokens for node in path]) if path else np.empty(0, np.int32)
        for node in path:
            if node.kv.file is not None and (node.state.file is not None or not node.has_state):
                continue
            pages = node.kv.host if node.pages is None else self.rows.read_pages(node.pages)
            state = node.state.host if node.slot is None else self.rows.read_state(node.slot)
            if pages is not None:
                stored = self.files.add(tokens[:node.end], node.start, pages, state)
                if stored is None:
                    return
                node.kv.file, node.kv_start = stored, 0
                node.state.file = stored if state is not None else node.state.file

    def drop(self, node: Node) -> None:
        """Take a node and all below it out, and parents that are then of no use."""
        parent = node.parent
        subtree = [node]
        for each in subtree:
            subtree.extend(each.children.values())
        for each in reversed(subtree):
            self._take_out(each)
        while parent is not None and self._useless(parent):
            node, parent = parent, parent.parent
            self._take_out(node)

    def prune(self, node: Node) -> None:
        """Take a node out that is of no use (any more)."""
        if self._useless(node):
            self.drop(node)

    def unpin(self) -> None:
        """The nodes in `pinned` may go again."""
        self.pinned.clear()
        self._recent = None
        self.trim_host()

    def trim_host(self) -> None:
        """Let copies in host memory go until they fit."""
        def enough() -> bool:
            return self.host_used() <= self.host_bytes

        while not enough():
            if not self._evict(self._host_victims(), enough, self._forget):
                leaves = [node for node in self.tree if not node.children and node not in self.pinned]
                if not self._evict(leaves, enough, self.drop):
                    return

    def host_used(self) -> int:
        """Bytes of copies in host memory."""
        return self._host_used + self.tree.doubled_bytes

    def set_host(self, copy: Copy, data: np.ndarray | None) -> None:
        """Put a copy into host memory, or let it go."""
        self._host_used += (0 if data is None else data.nbytes) - copy.host_bytes
        copy.host = data

    def check_integrity(self) -> None:
        """Counts of pages, slots and bytes are those of the nodes."""
        held = np.zeros_like(self._held)
        for pages in self.page_lists():
            np.add.at(held, pages, 1)
        if (held != self._held).any():
            raise AssertionError("prefix cache: held KV pages are miscounted")
        self._slots.check_integrity(node.slot - self._first_slot for node in self.tree if node.slot is not None)
        if self.host_used() != sum(node.host_bytes for node in self.tree):
            raise AssertionError("prefix cache: copies in host memory are miscounted")
        if self.host_used() > self.host_bytes:
            raise AssertionError(f"prefix cache: {self.host_used()} bytes of host memory, {self.host_bytes} allowed")

    def page_lists(self) -> list[list[int]]:
        """Device pages of every node."""
        return [node.pages for node in self.tree if node.pages is not None]

    def slots_used(self) -> int:
        return self._slots.total - self._slots.free

    def _sole(self) -> np.ndarray:
        return (self._held > 0) & (self._held == self._pages.references)

    def _evict(self, victims: Iterable[Node], enough: Callable[[], bool], evict: Callable[[Node], None]) -> bool:
        """Evict in order of worth until it is enough. Whether there was anything to evict."""
        ordered = sorted(victims, key=self._score)
        for node in ordered:
            if enough():
                break
            if node not in self.tree.nodes:  # went with a child or a parent
                continue
            self.level = max(self.level, self._score(node))
            evict(node)
        return bool(ordered)

    def _state_score(self, node: Node) -> float:
        return score(node.credit, node.chance, node.saved(), self.rows.state_bytes)

    def _score(self, node: Node) -> float:
        count = 0 if node.children else len(node.page_range(self.tree.page_size))
        return score(node.credit, node.chance, node.saved(), count * self.rows.page_bytes + self.rows.state_bytes)

    def _page_victims(self) -> list[Node]:
        """Nodes on the device with no child there, those first that running requests do not use too."""
        sole = self._sole()
        victims = [node for node in self.tree if node.pages is not None and node not in self.pinned
                   and all(child.pages is None for child in node.children.values())]
        return [node for node in victims if sole[node.pages].any()] or victims

    def _spill(self, node: Node) -> None:
        """Move a node's pages and state off the device."""
        assert node.pages is not None
        size = len(node.pages) * self.rows.page_bytes
        if node.kv.file is None and node.kv.host is None and size <= self.host_bytes:
            self.set_host(node.kv, self.rows.read_pages(node.pages))
            self.spilled += 1
        self._release_pages(node)
        if not node.kv.exists:
            self.drop(node)
            return
        if node.slot is not None:
            self._spill_state(node)
        self.trim_host()

    def _spill_state(self, node: Node) -> None:
        """Move a node's state off the device, and the node out if nothing else makes it useful."""
        if node.slot is not None and not node.state.exists and self.rows.state_bytes <= self.host_bytes:
            self.set_host(node.state, self.rows.read_state(node.slot))
        self._release_slot(node)
        self.prune(node)
        self.trim_host()

    def _host_victims(self) -> list[Node]:
        return [node for node in self.tree if node not in self.pinned and node.host_bytes and (
            not node.children or node.state.host is not None or node.kv.file is not None or node.pages is not None)]

    def _forget(self, node: Node) -> None:
        """Let a node's copies in host memory go, those of its pages only when no child needs them."""
        self.set_host(node.state, None)
        if not node.children or node.kv.file is not None or node.pages is not None:
            self.set_host(node.kv, None)
        if node.has_kv:
            self.prune(node)
        else:
            self.drop(node)

    def _read(self, stored: StoredFile | None) -> Contents | None:
        """A file's contents, once for a node's pages and its state."""
        if stored is None or self.files is None:
            return None
        if self._recent is None or self._recent[0] is not stored:
            contents = self.files.read(stored)
            if contents is None:
                return None
            self._recent = stored, contents
        return self._recent[1]

    def _useless(self, node: Node) -> bool:
        return node in self.tree.nodes and node not in self.pinned and not node.children and not node.has_state

    def _take_out(self, node: Node) -> None:
        self._release_pages(node)
        self._release_slot(node)
        self.set_host(node.kv, None)
        self.set_host(node.state, None)
        self.tree.remove(node)
        self.dropped += 1

    def _release_pages(self, node: Node) -> None:
        if node.pages is not None:
            np.subtract.at(self._held, node.pages, 1)
            self._pages.release(node.pages)
            node.pages = None

    def _release_slot(self, node: Node) -> None:
        if node.slot is not None:
            self._slots.release(node.slot - self._first_slot)
            node.slot = None
