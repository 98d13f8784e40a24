# SPDX-License-Identifier: Apache-2.0
"""Which pages belong to which sequence: integers only, no storage.

A page is `tokens_per_page` consecutive positions of one sequence. All layers share the page numbers: a layer that keeps
one row per `ratio` tokens stores `tokens_per_page / ratio` rows of a page, so one block table serves every layer.

A page may have several owners: sequences that begin with the same tokens, and whoever keeps it for later (see
prefix.py). Only whole pages are shared, and a shared page is never written again: a sequence grows on pages that it
owns alone. A page is free when its last owner has let go of it.

The allocator is deterministic: free pages are handed out in the order they were given at the start, and pages that come
back go to the end of that order. Nothing that is computed may depend on the numbers, which tests check by handing pages
out in shuffled order.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence


class OutOfPagesError(RuntimeError):
    """There are not enough free pages; nothing was changed. A scheduler waits or preempts."""


class PageAllocator:
    """Owns the page numbers and the block table of every sequence.

    Attributes:
        num_pages: pages in all.
        tokens_per_page: positions that one page covers.
    """

    def __init__(self, num_pages: int, tokens_per_page: int, *, order: Sequence[int] | None = None) -> None:
        """Start with every page free.

        Args:
            num_pages: pages in all; 0 is allowed.
            tokens_per_page: positions that one page covers.
            order: the order in which pages are handed out, a permutation of 0 .. num_pages - 1; ascending by default.

        Raises:
            ValueError: a count is not positive, or `order` is not a permutation of the page numbers.
        """
        if num_pages < 0 or tokens_per_page < 1:
            raise ValueError(
                f"PageAllocator: num_pages must be >= 0 and tokens_per_page >= 1; got {num_pages} and "
                f"{tokens_per_page}."
            )
        pages = list(range(num_pages)) if order is None else list(order)
        if sorted(pages) != list(range(num_pages)):
            raise ValueError(
                f"PageAllocator: order must name each of the pages 0 to {num_pages - 1} once; got {pages[:8]}"
                f"{' ...' if len(pages) > 8 else ''}. Pass a permutation, or leave it out."
            )
        self.num_pages = num_pages
        self.tokens_per_page = tokens_per_page
        self._free: collections.deque[int] = collections.deque(pages)
        self._owners = [0] * num_pages
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def sequence_ids(self) -> tuple[int, ...]:
        """The sequences that own a table, oldest first."""
        return tuple(self._tables)

    def alloc(self, sequence_id: int, num_tokens: int = 0, *, shared: Sequence[int] = ()) -> tuple[int, ...]:
        """Register a sequence with room for `num_tokens` and return its block table.

        Args:
            sequence_id: not registered yet.
            num_tokens: tokens in all, those on shared pages included.
            shared: pages that hold its first tokens already, whole pages; they get one more owner.

        Raises:
            ValueError: the sequence is registered already, num_tokens is less than shared pages hold, or a shared
                page is free.
            OutOfPagesError: too few free pages; the sequence is not registered.
        """
        if sequence_id in self._tables:
            raise ValueError(f"alloc: sequence {sequence_id} has pages already. Use extend, or free it first.")
        if shared and num_tokens < len(shared) * self.tokens_per_page:
            raise ValueError(
                f"alloc: {len(shared)} shared pages hold {len(shared) * self.tokens_per_page} tokens; got num_tokens "
                f"{num_tokens}. Share fewer pages: only whole ones can be shared."
            )
        for page in shared:
            self._refuse_free("alloc", page)
        self._take(list(shared), sequence_id, 0, num_tokens)
        for page in shared:
            self._owners[page] += 1
        return tuple(self._tables[sequence_id])

    def extend(self, sequence_id: int, num_tokens: int) -> tuple[int, ...]:
        """Make room for `num_tokens` more tokens and return the whole block table; earlier pages stay.

        Raises:
            ValueError: the sequence is unknown, num_tokens is negative, or the tokens would go to a page that others
                own too (the sequence was rewound into it).
            OutOfPagesError: too few free pages; nothing is changed.
        """
        self._known("extend", sequence_id)
        table, length = self._tables[sequence_id], self._lengths[sequence_id]
        used, inside = divmod(length, self.tokens_per_page)
        if num_tokens > 0 and inside and self._owners[table[used]] > 1:
            raise ValueError(
                f"extend: page {table[used]} of sequence {sequence_id} is shared and would be written at token "
                f"{length}. Rewind to a page boundary, or free the sequence and compute it again."
            )
        self._take(table, sequence_id, length, num_tokens)
        return tuple(self._tables[sequence_id])

    def fork(self, sequence_id: int, new_id: int, num_tokens: int) -> tuple[int, ...]:
        """Register a sequence that begins with the first `num_tokens` tokens of another, on the same pages.

        Raises:
            ValueError: the sequence is unknown, the new one is registered, or num_tokens is not a multiple of
                tokens_per_page within the sequence.
        """
        self._known("fork", sequence_id)
        if num_tokens % self.tokens_per_page or not 0 <= num_tokens <= self._lengths[sequence_id]:
            raise ValueError(
                f"fork: num_tokens must be a multiple of {self.tokens_per_page} up to the sequence's "
                f"{self._lengths[sequence_id]} tokens; got {num_tokens}. Only whole pages can be shared."
            )
        pages = self._tables[sequence_id][: num_tokens // self.tokens_per_page]
        return self.alloc(new_id, num_tokens, shared=pages)

    def rewind(self, sequence_id: int, num_tokens: int) -> tuple[int, ...]:
        """Shorten a sequence to its first `num_tokens` tokens, let go of the pages beyond, and return its block table.

        Raises:
            ValueError: the sequence is unknown, or num_tokens is not in 0 .. its length.
        """
        self._known("rewind", sequence_id)
        if not 0 <= num_tokens <= self._lengths[sequence_id]:
            raise ValueError(
                f"rewind: num_tokens must be 0 to {self._lengths[sequence_id]}, the length of sequence {sequence_id}; "
                f"got {num_tokens}."
            )
        table = self._tables[sequence_id]
        num_kept = self._pages_of(num_tokens)
        for page in table[num_kept:]:
            self.release(page)
        del table[num_kept:]
        self._lengths[sequence_id] = num_tokens
        return tuple(table)

    def free(self, sequence_id: int) -> None:
        """Let go of all pages of a sequence and forget it.

        Raises:
            ValueError: the sequence is unknown.
        """
        self._known("free", sequence_id)
        for page in self._tables.pop(sequence_id):
            self.release(page)
        del self._lengths[sequence_id]

    def retain(self, page: int) -> None:
        """Give a page one more owner, which is no sequence.

        Raises:
            ValueError: the page is free: what it holds may be gone already.
        """
        self._refuse_free("retain", page)
        self._owners[page] += 1

    def release(self, page: int) -> None:
        """Take one owner from a page; the last one frees it.

        Raises:
            ValueError: the page is free.
        """
        self._refuse_free("release", page)
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)

    def num_owners(self, page: int) -> int:
        """Return how many sequences and others own a page; 0 for a free one."""
        return self._owners[page]

    def num_pages_needed(self, sequence_id: int, num_tokens: int) -> int:
        """Return how many pages `extend` (or `alloc`, for an unknown sequence) by num_tokens would take."""
        length = self._lengths.get(sequence_id, 0)
        return self._pages_of(length + num_tokens) - len(self._tables.get(sequence_id, ()))

    def length(self, sequence_id: int) -> int:
        """Return the tokens a sequence has room for by its calls, not rounded up to pages.

        Raises:
            ValueError: the sequence is unknown.
        """
        self._known("length", sequence_id)
        return self._lengths[sequence_id]

    def block_table(self, sequence_id: int) -> tuple[int, ...]:
        """Return the pages of a sequence in position order.

        Raises:
            ValueError: the sequence is unknown.
        """
        self._known("block_table", sequence_id)
        return tuple(self._tables[sequence_id])

    def block_tables(self, sequence_ids: Sequence[int]) -> list[list[int]]:
        """Return one row per sequence, padded to a common length with -1, which no operation accepts as a page.

        Raises:
            ValueError: a sequence is unknown.
        """
        tables = [self.block_table(sequence_id) for sequence_id in sequence_ids]
        width = max(map(len, tables), default=0)
        return [[*table, *([-1] * (width - len(table)))] for table in tables]

    def _pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_page)

    def _known(self, caller: str, sequence_id: int) -> None:
        if sequence_id not in self._tables:
            raise ValueError(
                f"{caller}: unknown sequence {sequence_id}; known are {list(self._tables)}. alloc it first."
            )

    def _refuse_free(self, caller: str, page: int) -> None:
        if not 0 <= page < self.num_pages or not self._owners[page]:
            raise ValueError(f"{caller}: page {page} has no owner; only pages in use can be shared or let go of.")

    def _take(self, table: list[int], sequence_id: int, length: int, num_tokens: int) -> None:
        if num_tokens < 0:
            raise ValueError(f"pages: num_tokens must be >= 0; got {num_tokens}.")
        needed = self._pages_of(length + num_tokens) - len(table)
        if needed > len(self._free):
            raise OutOfPagesError(
                f"pages: sequence {sequence_id} needs {needed} more pages of {self.tokens_per_page} tokens and "
                f"{len(self._free)} of {self.num_pages} are free. Free a sequence, or start with more pages."
            )
        fresh = [self._free.popleft() for _ in range(needed)]
        for page in fresh:
            self._owners[page] = 1
        self._tables[sequence_id] = table + fresh
        self._lengths[sequence_id] = length + num_tokens
