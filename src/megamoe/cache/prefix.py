# SPDX-License-Identifier: Apache-2.0
"""Which prefixes can be reused: integers only, no storage.

A prefix is a chain of full pages, found by the tokens on them (compared as they are, not by a hash). To continue from
the end of a page a sequence needs two things: the pages up to there, which it shares, and a snapshot of what the rings
held there, which it copies. A page can serve without a snapshot of its own, as part of a longer chain, so snapshots are
counted apart and may be fewer than pages.

A page stays as long as it leads to a snapshot. When pages run out, the least recently used ends of chains go first, if
no sequence owns them too. When snapshots run out, those inside a chain that nobody ever continued from go first, then
the least recently used: a long prompt takes a snapshot per page, and gives up its own before the ends of others.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from megamoe.cache.pages import PageAllocator


class PrefixNode:
    """One page of a chain.

    Attributes:
        parent: the page before it; None only for the root, which is no page.
        tokens: what is on the page.
        page: its number.
        depth: pages up to and including this one.
        snapshot_idx: the snapshot taken at its end, or None.
        children: the pages that follow it, by their tokens.
        was_used: whether a sequence continued from here.
        is_kept: False once the page was given up; the node is dead then.
    """

    __slots__ = ("children", "depth", "is_kept", "page", "parent", "snapshot_idx", "tokens", "was_used")

    def __init__(self, parent: PrefixNode | None, tokens: tuple[int, ...], page: int) -> None:
        """Hang a page under its predecessor."""
        self.parent = parent
        self.tokens = tokens
        self.page = page
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.snapshot_idx: int | None = None
        self.children: dict[tuple[int, ...], PrefixNode] = {}
        self.was_used = False
        self.is_kept = True


@dataclasses.dataclass(frozen=True)
class PrefixMatch:
    """From where a sequence can continue.

    Attributes:
        num_tokens: tokens that need not be computed, whole pages.
        pages: the pages they are on, in order.
        node: the last page.
    """

    num_tokens: int
    pages: tuple[int, ...]
    node: PrefixNode

    @property
    def snapshot_idx(self) -> int:
        """The snapshot to restore."""
        assert self.node.snapshot_idx is not None
        return self.node.snapshot_idx


class PrefixCache:
    """Keeps pages after their sequences have ended, and finds them again.

    Attributes:
        num_snapshots: snapshots in all.
    """

    def __init__(self, pages: PageAllocator, num_snapshots: int) -> None:
        """Start empty.

        Args:
            pages: the allocator; kept pages get one more owner there.
            num_snapshots: how many snapshots the storage has room for; 0 keeps nothing.
        """
        self.num_snapshots = num_snapshots
        self._pages = pages
        self._root = PrefixNode(None, (), -1)
        self._free_snapshots = collections.deque(range(num_snapshots))
        self._recent: collections.OrderedDict[PrefixNode, None] = (
            collections.OrderedDict()
        )  # with snapshot, oldest first
        self._num_nodes = 0

    @property
    def num_pages(self) -> int:
        """Pages kept, used by a sequence as well or not."""
        return self._num_nodes

    @property
    def num_snapshots_used(self) -> int:
        """Snapshots that some page has."""
        return len(self._recent)

    def pages(self) -> list[int]:
        """Return the numbers of all kept pages."""
        return [node.page for node in self._nodes()]

    def match(self, token_ids: Sequence[int]) -> PrefixMatch | None:
        """Return the longest reusable prefix of a sequence, or None. At least one token is left to compute."""
        size = self._pages.tokens_per_page
        node, found = self._root, None
        pages: list[int] = []
        for start in range(0, len(token_ids) - size, size):
            child = node.children.get(tuple(token_ids[start : start + size]))
            if child is None:
                break
            node = child
            pages.append(node.page)
            if node.snapshot_idx is not None:
                found = node
        if found is None:
            return None
        self._recent.move_to_end(found)
        found.was_used = True
        return PrefixMatch(found.depth * size, tuple(pages[: found.depth]), found)

    def insert(
        self, token_ids: Sequence[int], pages: Sequence[int], num_pages: int, last: PrefixNode | None = None
    ) -> tuple[PrefixNode, bool] | None:
        """Keep the first `num_pages` pages of a sequence, and reserve a snapshot at their end.

        A page whose tokens are kept already stays as it is: the sequence's own copy is not needed.

        Args:
            token_ids: the sequence, at least the tokens on those pages.
            pages: its block table.
            num_pages: how many pages, at least 1.
            last: what an earlier call for the same sequence returned; saves walking the chain.

        Returns:
            (the last page's node, whether its snapshot has to be taken now), or None when there is no snapshot.
        """
        size = self._pages.tokens_per_page
        node = last if last is not None and last.is_kept and last.depth < num_pages else self._root
        for idx in range(node.depth, num_pages):
            tokens = tuple(token_ids[idx * size : (idx + 1) * size])
            child = node.children.get(tokens)
            if child is None:
                child = PrefixNode(node, tokens, pages[idx])
                self._pages.retain(child.page)
                node.children[tokens] = child
                self._num_nodes += 1
            node = child
        if node.snapshot_idx is not None:
            self._recent.move_to_end(node)
            return node, False
        node.snapshot_idx = self._take_snapshot(node)
        if node.snapshot_idx is None:
            self._prune(node)
            return None
        self._recent[node] = None
        return node, True

    def evict(self, num_pages: int) -> bool:
        """Give up pages that nobody else owns until `num_pages` are free; return whether that many are."""
        while self._pages.num_free_pages < num_pages:
            node = next((one for one in self._recent if self._is_spare(one)), None)
            if node is None:
                return False
            self._drop_snapshot(node)
            self._prune(node)
        return True

    def clear(self) -> None:
        """Give up everything."""
        for node in list(self._recent):
            self._drop_snapshot(node)
            self._prune(node)

    def _is_spare(self, node: PrefixNode) -> bool:
        return not node.children and self._pages.num_owners(node.page) == 1

    def _take_snapshot(self, node: PrefixNode) -> int | None:
        if not self._free_snapshots:
            if not self._recent:
                return None
            unused = (one for one in self._recent if one.children and not one.was_used)
            oldest = next(unused, next(iter(self._recent)))
            self._drop_snapshot(oldest)
            self._prune(oldest, keep=node)  # the oldest may be all that `node` led to until now
        return self._free_snapshots.popleft()

    def _drop_snapshot(self, node: PrefixNode) -> None:
        assert node.snapshot_idx is not None
        self._free_snapshots.append(node.snapshot_idx)
        node.snapshot_idx = None
        del self._recent[node]

    def _prune(self, node: PrefixNode, keep: PrefixNode | None = None) -> None:
        """Give up pages, from this one upwards, that lead to no snapshot; stop at `keep`."""
        while node.parent is not None and node is not keep and node.snapshot_idx is None and not node.children:
            self._pages.release(node.page)
            node.is_kept = False
            self._num_nodes -= 1
            del node.parent.children[node.tokens]
            node = node.parent

    def _nodes(self) -> list[PrefixNode]:
        found: list[PrefixNode] = []
        todo = [self._root]
        while todo:
            node = todo.pop()
            todo.extend(node.children.values())
            found.extend(node.children.values())
        return found
