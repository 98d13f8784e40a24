# SPDX-License-Identifier: Apache-2.0
"""The page allocator: integers only."""

from __future__ import annotations

import random

import pytest

from megamoe.cache.pages import OutOfPagesError, PageAllocator

# --- known answers ---


def test_alloc_takes_whole_pages_in_order():
    pages = PageAllocator(4, 256)
    assert pages.alloc(7, 257) == (0, 1)
    assert pages.alloc(8, 256) == (2,)
    assert pages.num_free_pages == 1
    assert pages.block_tables([8, 7]) == [[2, -1], [0, 1]]


@pytest.mark.parametrize("num_tokens, num_pages", [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2)])
def test_pages_of_edge_sizes(num_tokens, num_pages):
    pages = PageAllocator(4, 4)
    assert pages.num_pages_needed(0, num_tokens) == num_pages
    assert len(pages.alloc(0, num_tokens)) == num_pages


def test_extend_keeps_earlier_pages_and_counts_tokens():
    pages = PageAllocator(4, 4)
    pages.alloc(0, 3)
    assert pages.extend(0, 1) == (0,)  # position 3 still fits the first page
    assert pages.extend(0, 1) == (0, 1)
    assert pages.length(0) == 5
    assert pages.extend(0, 0) == (0, 1)


def test_freed_pages_come_back_last():
    pages = PageAllocator(3, 1)
    pages.alloc(0, 2)
    pages.free(0)
    assert pages.alloc(1, 3) == (2, 0, 1)


def test_order_is_the_order_of_the_first_pages():
    assert PageAllocator(3, 1, order=[2, 0, 1]).alloc(0, 3) == (2, 0, 1)


def test_empty_tables():
    pages = PageAllocator(0, 1)
    assert pages.block_tables([]) == []
    assert pages.alloc(0) == ()
    assert pages.block_tables([0]) == [[]]


# --- properties ---


def test_no_page_has_two_owners(seed):
    rng = random.Random(seed)
    pages = PageAllocator(20, 8)
    lengths: dict[int, int] = {}
    for step in range(500):
        action = rng.choice(["alloc", "extend", "free"])
        sequence, tokens = rng.randrange(6), rng.randrange(40)
        if action == "alloc" and sequence not in lengths or action == "extend" and sequence in lengths:
            grow = pages.alloc if action == "alloc" else pages.extend
            before = pages.num_free_pages
            if pages.num_pages_needed(sequence, tokens) > before:
                tables = pages.block_tables(list(lengths))
                with pytest.raises(OutOfPagesError):
                    grow(sequence, tokens)
                assert pages.num_free_pages == before and pages.block_tables(list(lengths)) == tables
            else:
                grow(sequence, tokens)
                lengths[sequence] = lengths.get(sequence, 0) + tokens
        elif action == "free" and sequence in lengths:
            pages.free(sequence)
            del lengths[sequence]
        owned = [page for one in lengths for page in pages.block_table(one)]
        assert len(owned) == len(set(owned)) == 20 - pages.num_free_pages, step
        assert all(len(pages.block_table(one)) == -(-length // 8) for one, length in lengths.items())
    assert pages.sequence_ids == tuple(lengths)


def test_returned_tables_are_the_callers_own():
    pages = PageAllocator(2, 1)
    table = pages.alloc(0, 1)
    pages.extend(0, 1)
    assert table == (0,)


# --- refusals ---


def test_refusals():
    pages = PageAllocator(2, 4)
    pages.alloc(0, 8)
    with pytest.raises(ValueError, match="has pages already"):
        pages.alloc(0)
    with pytest.raises(OutOfPagesError, match="needs 1 more pages of 4 tokens and 0 of 2 are free"):
        pages.extend(0, 1)
    with pytest.raises(OutOfPagesError):
        pages.alloc(1, 1)
    assert pages.sequence_ids == (0,)
    for call in (pages.free, pages.length, pages.block_table, lambda one: pages.extend(one, 1)):
        with pytest.raises(ValueError, match="unknown sequence 5"):
            call(5)
    with pytest.raises(ValueError, match="unknown sequence 5"):
        pages.block_tables([0, 5])
    with pytest.raises(ValueError, match="num_tokens must be >= 0"):
        pages.extend(0, -1)


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 2], [0, 1, 2]])
def test_order_must_be_a_permutation(order):
    with pytest.raises(ValueError, match="each of the pages 0 to 1 once"):
        PageAllocator(2, 4, order=order)


@pytest.mark.parametrize("num_pages, tokens_per_page", [(-1, 4), (2, 0)])
def test_counts_must_be_positive(num_pages, tokens_per_page):
    with pytest.raises(ValueError, match="num_pages must be >= 0 and tokens_per_page >= 1"):
        PageAllocator(num_pages, tokens_per_page)


# --- sharing ---


def test_a_fork_shares_whole_pages_and_grows_on_its_own():
    pages = PageAllocator(6, 4)
    pages.alloc(0, 10)
    assert pages.fork(0, 1, 8) == (0, 1)
    assert [pages.num_owners(page) for page in range(4)] == [2, 2, 1, 0]
    assert pages.extend(1, 1) == (0, 1, 3)
    pages.free(0)
    assert [pages.num_owners(page) for page in range(4)] == [1, 1, 0, 1]
    pages.free(1)
    assert pages.num_free_pages == 6


def test_rewind_lets_go_of_whole_pages():
    pages = PageAllocator(4, 4)
    pages.alloc(0, 13)
    assert pages.rewind(0, 5) == (0, 1) and pages.num_free_pages == 2
    assert pages.extend(0, 4) == (0, 1, 2)
    assert pages.rewind(0, 0) == () and pages.length(0) == 0


def test_others_can_own_a_page():
    pages = PageAllocator(2, 4)
    pages.alloc(0, 4)
    pages.retain(0)
    pages.free(0)
    assert pages.num_free_pages == 1
    assert pages.alloc(1, 5, shared=[0]) == (0, 1)
    pages.free(1)
    pages.release(0)
    assert pages.num_free_pages == 2


def test_refusals_of_sharing():
    pages = PageAllocator(4, 4)
    pages.alloc(0, 8)
    for bad in (3, 12, -4):
        with pytest.raises(ValueError, match="multiple of 4 up to the sequence's 8 tokens"):
            pages.fork(0, 1, bad)
    with pytest.raises(ValueError, match="hold 8 tokens; got num_tokens 7"):
        pages.alloc(1, 7, shared=[0, 1])
    for call in (pages.retain, pages.release, lambda page: pages.alloc(2, 4, shared=[page])):
        for page in (3, 4, -1):
            with pytest.raises(ValueError, match=f"page {page} has no owner"):
                call(page)
    pages.fork(0, 1, 8)
    pages.rewind(1, 6)
    with pytest.raises(ValueError, match="page 1 of sequence 1 is shared and would be written at token 6"):
        pages.extend(1, 1)
    assert pages.extend(1, 0) == (0, 1)
    pages.rewind(1, 4)
    assert pages.extend(1, 2) == (0, 2), "from a page boundary it grows on a page of its own"
    with pytest.raises(ValueError, match="num_tokens must be 0 to 8"):
        pages.rewind(0, 9)
    with pytest.raises(OutOfPagesError):
        pages.alloc(3, 16, shared=[0])
    assert pages.num_owners(0) == 2, "a failed alloc owns nothing"
