"""The radix tree over tokens. A node is a boundary; what it holds of pages, copies and files is named here only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from qcn_compile.runtime.prefix.files import StoredFile
from qcn_compile.runtime.prefix.policy import UNLIKELY


@dataclass
class Copy:
    """Where one thing (a node's pages, or its state) lies outside the device: host memory, a file, both, nowhere."""

    host: np.ndarray | None = None
    file: StoredFile | None = None

    @property
    def host_bytes(self) -> int:
        return 0 if self.host is None else self.host.nbytes

    @property
    def exists(self) -> bool:
        return self.host is not None or self.file is not None


@dataclass(eq=False)
class Node:
    """The tokens from the parent's boundary to `end`. It holds the KV pages that these tokens lie in, the first and the
    last perhaps in part: two nodes may hold one page. `pages` and `slot` are on the device."""

    tokens: np.ndarray
    end: int
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    pages: list[int] | None = None
    kv: Copy = field(default_factory=Copy)
    kv_start: int = 0  # of the node's first page among the pages of the file
    slot: int | None = None
    state: Copy = field(default_factory=Copy)
    credit: float = 0.0
    chance: float = UNLIKELY

    @property
    def start(self) -> int:
        return self.end - len(self.tokens)

    @property
    def has_state(self) -> bool:
        return self.slot is not None or self.state.exists

    @property
    def has_kv(self) -> bool:
        return self.pages is not None or self.kv.exists

    @property
    def host_bytes(self) -> int:
        return self.kv.host_bytes + self.state.host_bytes

    def path(self) -> list[Node]:
        """From the first node below the root to this one."""
        path = []
        node: Node = self
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]

    def page_range(self, page_size: int) -> range:
        """Places in the sequence of the pages this node's tokens lie in."""
        return range(self.start // page_size, -(-self.end // page_size))

    def saved(self) -> int:
        """Tokens computed again for a hit here if its state were gone."""
        node = self.parent
        while node is not None and node.parent is not None and not node.has_state:
            node = node.parent
        return self.end - (0 if node is None else node.end)


@dataclass(frozen=True)
class Match:
    """How far the tree knows some tokens: the nodes matched whole, and the tokens matched in all."""

    path: list[Node]
    shared: int


class RadixTree:
    """Paths of tokens; children differ in their first one. `share` hears of pages that a split lets two nodes hold."""

    def __init__(self, page_size: int, share: Callable[[list[int]], None]) -> None:
        self.page_size, self._share = page_size, share
        self.doubled_bytes = 0  # of host copies, since the start: pages that a split copied for both halves
        self.root = Node(np.empty(0, np.int32), 0, None)
        self.nodes: dict[Node, None] = {}

    def match(self, tokens: np.ndarray, origin: Node | None = None) -> Match:
        """Follow i32 tokens from the root, or from what ends at `origin`."""
        node = self.root if origin is None else origin
        path, place = [], 0
        while place < len(tokens) and (child := node.children.get(int(tokens[place]))) is not None:
            common = _common(child.tokens, tokens[place:])
            place += common
            if common < len(child.tokens):
                break
            path.append(child)
            node = child
        return Match(path, place)

    def insert(self, tokens: np.ndarray, origin: Node | None = None) -> Node:
        """The node that ends with these tokens, made (and then holding nothing) or split off when there is none."""
        origin = self.root if origin is None else origin
        found = self.match(tokens, origin)
        node = found.path[-1] if found.path else origin
        matched = node.end - origin.end
        if found.shared > matched:
            node = self._split(node.children[int(tokens[matched])], found.shared - matched)
        if found.shared == len(tokens):
            return node
        fresh = Node(tokens[found.shared:].copy(), origin.end + len(tokens), node, credit=node.credit)
        node.children[int(fresh.tokens[0])] = fresh
        self.nodes[fresh] = None
        return fresh

    def remove(self, node: Node) -> None:
        """Take a leaf out."""
        assert not node.children and node.parent is not None
        del node.parent.children[int(node.tokens[0])]
        del self.nodes[node]

    def _split(self, node: Node, at: int) -> Node:
        """Put a new node in front of one: it gets the first `at` tokens, the old one keeps its end and its state."""
        assert node.parent is not None
        size, start = self.page_size, node.start
        middle = start + at
        upper = Node(node.tokens[:at].copy(), middle, node.parent, credit=node.credit)
        first = start // size
        stop, resume = -(-middle // size) - first, middle // size - first
        upper.kv_start = node.kv_start
        node.kv_start += resume
        upper.kv.file = node.kv.file
        if node.kv.host is not None:
            whole = node.kv.host
            upper.kv.host, node.kv.host = whole[:stop].copy(), whole[resume:].copy()
            self.doubled_bytes += upper.kv.host.nbytes + node.kv.host.nbytes - whole.nbytes
        if node.pages is not None:
            self._share(node.pages[resume:stop])
            upper.pages, node.pages = node.pages[:stop], node.pages[resume:]
        node.parent.children[int(upper.tokens[0])] = upper
        node.tokens, node.parent = node.tokens[at:].copy(), upper
        upper.children[int(node.tokens[0])] = node
        self.nodes[upper] = None
        return upper

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def check_integrity(self) -> None:
        """Children are found by their first token, boundaries and page counts add up, every leaf is of use."""
        reached: list[Node] = []
        stack = [self.root]
        while stack:
            node = stack.pop()
            for first, child in node.children.items():
                if child.parent is not node or child.end != node.end + len(child.tokens):
                    raise AssertionError(f"prefix tree: a node at {child.end} does not follow its parent at {node.end}")
                if int(child.tokens[0]) != first:
                    raise AssertionError(f"prefix tree: token {first} leads to a node of token {child.tokens[0]}")
                self._check_node(child)
                reached.append(child)
                stack.append(child)
        if len(reached) != len(self.nodes) or any(node not in self.nodes for node in reached):
            raise AssertionError("prefix tree: nodes and links disagree")

    def _check_node(self, node: Node) -> None:
        count = len(node.page_range(self.page_size))
        if not node.has_kv or not (node.children or node.has_state):
            raise AssertionError(f"prefix tree: the node at {node.end} holds nothing that can be used")
        if node.pages is not None and len(node.pages) != count:
            raise AssertionError(f"prefix tree: the node at {node.end} has {len(node.pages)} pages of {count}")
        if node.kv.host is not None and len(node.kv.host) != count:
            raise AssertionError(f"prefix tree: the node at {node.end} has {len(node.kv.host)} page copies of {count}")


def whole_pages(path: Sequence[Node], page_size: int) -> list[int]:
    """Device pages that hold a path's tokens, the last only when full: per place, of the deepest node that has it.

    All nodes of the path must be on the device.
    """
    places: dict[int, int] = {}
    for node in path:
        assert node.pages is not None
        places.update(zip(node.page_range(page_size), node.pages, strict=True))
    full = path[-1].end // page_size if path else 0
    return [places[place] for place in range(full)]


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """Length of the common prefix."""
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    return int(differs.argmax()) if differs.any() else length
