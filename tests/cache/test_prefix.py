# SPDX-License-Identifier: Apache-2.0
"""Reusable prefixes: what is found, what is given up, and that no page is lost or shared wrongly."""

from __future__ import annotations

import random

import hypothesis
import pytest
from hypothesis import strategies
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from megamoe.cache.pages import OutOfPagesError, PageAllocator
from megamoe.cache.prefix import PrefixCache, PrefixMatch

SIZE = 4


def kept(num_pages: int = 8, num_snapshots: int = 8) -> tuple[PageAllocator, PrefixCache]:
    pages = PageAllocator(num_pages, SIZE)
    return pages, PrefixCache(pages, num_snapshots)


def publish(pages: PageAllocator, prefix: PrefixCache, sequence_id: int, tokens: list[int]) -> list[bool]:
    """Run a sequence to its end: keep every full page, then free it. Returns which snapshots were new."""
    table = pages.alloc(sequence_id, len(tokens))
    node, new = None, []
    for num_pages in range(1, len(tokens) // SIZE + 1):
        found = prefix.insert(tokens, table, num_pages, node)
        assert found is not None
        node, is_new = found
        new.append(is_new)
    pages.free(sequence_id)
    return new


def matched(prefix: PrefixCache, tokens: list[int]) -> tuple[int, tuple[int, ...]]:
    found = prefix.match(tokens)
    return (found.num_tokens, found.pages) if found else (0, ())


# --- known answers ---


def test_the_longest_chain_is_found_and_a_token_is_left():
    pages, prefix = kept()
    assert publish(pages, prefix, 0, list(range(11))) == [True, True]
    assert matched(prefix, list(range(11))) == (8, (0, 1))
    assert matched(prefix, list(range(9))) == (8, (0, 1))
    assert matched(prefix, list(range(8))) == (4, (0,)), "one token must be left: its logits are needed"
    assert matched(prefix, [*range(7), 99, 8, 9]) == (4, (0,))
    assert matched(prefix, list(range(4))) == (0, ())
    assert matched(prefix, [1, *range(10)]) == (0, ())
    assert pages.num_free_pages == 6


def test_the_same_tokens_are_kept_once():
    pages, prefix = kept()
    pages.alloc(0, 8)
    pages.alloc(1, 8)
    tokens = list(range(8))
    assert prefix.insert(tokens, pages.block_table(0), 1)[1] is True
    assert prefix.insert(tokens, pages.block_table(1), 1)[1] is False
    node, is_new = prefix.insert(tokens, pages.block_table(1), 2)
    assert is_new and node.page == 3, "the second page comes from whoever filled it first"
    assert matched(prefix, list(range(9))) == (8, (0, 3))


def test_the_least_recently_used_snapshot_goes_first():
    pages, prefix = kept(num_snapshots=2)
    publish(pages, prefix, 0, [1] * 4)
    publish(pages, prefix, 1, [2] * 4)
    assert matched(prefix, [1] * 5)[0] == 4  # now 2 is the older one
    publish(pages, prefix, 2, [3] * 4)
    assert [matched(prefix, [value] * 5)[0] for value in (1, 2, 3)] == [4, 0, 4]
    assert prefix.num_pages == 2 and pages.num_free_pages == 6


def test_a_long_prompt_gives_up_its_own_snapshots_before_the_ends_of_others():
    pages, prefix = kept(num_pages=40, num_snapshots=4)
    publish(pages, prefix, 0, [1] * 8)
    publish(pages, prefix, 1, [2] * 4)
    publish(pages, prefix, 2, list(range(100, 100 + 12 * SIZE)))
    assert matched(prefix, [1] * 9)[0] == 8 and matched(prefix, [2] * 5)[0] == 4
    assert matched(prefix, list(range(100, 101 + 12 * SIZE)))[0] == 12 * SIZE


def test_a_snapshot_that_was_continued_from_counts_like_an_end():
    pages, prefix = kept(num_snapshots=2)
    publish(pages, prefix, 0, [1] * 8)
    assert matched(prefix, [1] * 4 + [9])[0] == 4
    publish(pages, prefix, 1, [2] * 4)
    assert [matched(prefix, tokens)[0] for tokens in ([1] * 4 + [9], [2] * 5, [1] * 9)] == [4, 4, 4]


def test_a_page_without_snapshot_serves_a_longer_chain():
    pages, prefix = kept(num_snapshots=1)
    publish(pages, prefix, 0, list(range(8)))
    assert prefix.num_snapshots_used == 1 and prefix.num_pages == 2
    assert matched(prefix, list(range(9))) == (8, (0, 1))
    assert matched(prefix, list(range(8))) == (0, ()), "its first page has no snapshot to continue from"


def test_a_page_may_take_the_snapshot_of_the_page_after_it():
    pages, prefix = kept(num_snapshots=1)
    publish(pages, prefix, 0, list(range(8)))  # the only snapshot is at the end of the second page
    pages.alloc(1, 4)
    node, is_new = prefix.insert(list(range(4)), pages.block_table(1), 1)
    assert is_new and node.is_kept and matched(prefix, list(range(9))) == (4, (0,))


def test_pages_go_from_the_ends_of_chains():
    pages, prefix = kept(num_pages=4)
    publish(pages, prefix, 0, list(range(12)))
    assert prefix.evict(2)
    assert matched(prefix, list(range(13))) == (8, (0, 1))
    assert prefix.evict(4) and prefix.num_pages == 0
    assert not prefix.evict(5)


def test_pages_in_use_are_not_given_up():
    pages, prefix = kept(num_pages=3)
    publish(pages, prefix, 0, list(range(8)))
    pages.alloc(1, 4, shared=(0,))
    assert not prefix.evict(3), "page 0 belongs to sequence 1"
    assert matched(prefix, list(range(8))) == (4, (0,))
    pages.free(1)
    assert prefix.evict(3)


def test_nothing_is_kept_without_snapshots():
    pages, prefix = kept(num_snapshots=0)
    table = pages.alloc(0, 8)
    assert prefix.insert(list(range(8)), table, 2) is None
    pages.free(0)
    assert (prefix.num_pages, pages.num_free_pages) == (0, 8)


def test_clear_gives_everything_up():
    pages, prefix = kept()
    for one in range(3):
        publish(pages, prefix, one, [one] * 4 + list(range(4)))
    prefix.clear()
    assert (prefix.num_pages, prefix.num_snapshots_used, pages.num_free_pages) == (0, 0, 8)


def test_a_dead_node_is_not_continued():
    pages, prefix = kept(num_pages=8, num_snapshots=1)
    tokens = list(range(12))
    table = pages.alloc(0, 12)
    node, _ = prefix.insert(tokens, table, 1)
    publish(pages, prefix, 1, [7] * 4)  # takes the only snapshot: the first page is given up
    assert not node.is_kept
    node, is_new = prefix.insert(tokens, table, 2, node)
    assert is_new and matched(prefix, tokens) == (8, table[:2])


# --- properties: any sequence of calls ---


@hypothesis.settings(max_examples=150, stateful_step_count=60)
class Caches(RuleBasedStateMachine):
    """Sequences come, grow, fork, are cut and go, over few pages and fewer snapshots; a plain model says what is right.

    The content of a page is modelled as the tokens written to it. Two values per token make prefixes collide often.
    """

    sequences = Bundle("sequences")
    tokens = strategies.lists(strategies.integers(0, 1), min_size=1, max_size=9)

    @initialize(order=strategies.permutations(range(10)), num_snapshots=strategies.integers(0, 5))
    def start(self, order: list[int], num_snapshots: int) -> None:
        self.pages = PageAllocator(10, SIZE, order=order)
        self.prefix = PrefixCache(self.pages, num_snapshots)
        self.content: dict[int, list[int]] = {page: [] for page in range(10)}
        self.snapshots: dict[int, tuple[int, ...]] = {}
        self.held: dict[int, list[int]] = {}  # sequence → its tokens
        self.next_id = 0

    def write(self, sequence_id: int, start: int) -> None:
        """Write the tokens from `start` on to the pages of a sequence; no page that others own may be touched."""
        table, tokens = self.pages.block_table(sequence_id), self.held[sequence_id]
        for position in range(start, len(tokens)):
            page = table[position // SIZE]
            assert self.pages.num_owners(page) == 1, "a shared page is written"
            self.content[page][position % SIZE :] = [tokens[position]]

    @rule(target=sequences, tokens=tokens)
    def add(self, tokens: list[int]) -> int:
        sequence_id, self.next_id = self.next_id, self.next_id + 1
        match = self.prefix.match(tokens)
        shared = match.pages if match else ()
        if match:
            assert match.num_tokens < len(tokens)
            assert self.snapshots[match.snapshot_idx] == tuple(tokens[: match.num_tokens])
        for page in shared:
            self.pages.retain(page)
        needed = -(-len(tokens) // SIZE) - len(shared)
        if self.prefix.evict(needed):
            self.pages.alloc(sequence_id, len(tokens), shared=shared)
            self.held[sequence_id] = list(tokens)
        for page in shared:
            self.pages.release(page)
        if sequence_id in self.held:
            self.write(sequence_id, match.num_tokens if match else 0)
            self.keep(sequence_id, match.num_tokens if match else 0)
        return sequence_id

    def keep(self, sequence_id: int, start: int) -> None:
        tokens, table = self.held[sequence_id], self.pages.block_table(sequence_id)
        for num_pages in range(start // SIZE + 1, len(tokens) // SIZE + 1):
            found = self.prefix.insert(tokens, table, num_pages)
            if found and found[1]:
                self.snapshots[found[0].snapshot_idx] = tuple(tokens[: num_pages * SIZE])

    @rule(sequence_id=sequences, tokens=tokens)
    def extend(self, sequence_id: int, tokens: list[int]) -> None:
        if sequence_id not in self.held:
            return
        before = len(self.held[sequence_id])
        inside = before % SIZE and self.pages.num_owners(self.pages.block_table(sequence_id)[before // SIZE]) > 1
        try:
            self.pages.extend(sequence_id, len(tokens))
        except OutOfPagesError:
            assert self.pages.num_pages_needed(sequence_id, len(tokens)) > self.pages.num_free_pages
            return
        except ValueError:
            assert inside, "only a rewound shared page may not grow"
            return
        assert not inside
        self.held[sequence_id] += tokens
        self.write(sequence_id, before)
        self.keep(sequence_id, before)

    @rule(target=sequences, sequence_id=sequences, share=strategies.floats(0, 1))
    def fork(self, sequence_id: int, share: float) -> int:
        new_id, self.next_id = self.next_id, self.next_id + 1
        if sequence_id in self.held:
            num_tokens = int(share * len(self.held[sequence_id]) / SIZE) * SIZE
            self.pages.fork(sequence_id, new_id, num_tokens)
            self.held[new_id] = self.held[sequence_id][:num_tokens]
        return new_id

    @rule(sequence_id=sequences, share=strategies.floats(0, 1))
    def rewind(self, sequence_id: int, share: float) -> None:
        if sequence_id in self.held:
            length = int(share * len(self.held[sequence_id]))
            self.pages.rewind(sequence_id, length)
            del self.held[sequence_id][length:]

    @rule(sequence_id=consumes(sequences))
    def free(self, sequence_id: int) -> None:
        if self.held.pop(sequence_id, None) is not None:
            self.pages.free(sequence_id)

    @precondition(lambda self: self.prefix.num_pages)
    @rule(num_pages=strategies.integers(1, 10))
    def evict(self, num_pages: int) -> None:
        done = self.prefix.evict(num_pages)
        assert done == (self.pages.num_free_pages >= num_pages)

    @invariant()
    def every_page_has_exactly_its_owners(self) -> None:
        owners = dict.fromkeys(range(10), 0)
        for sequence_id in self.held:
            for page in self.pages.block_table(sequence_id):
                owners[page] += 1
        cached = self.prefix.pages()
        assert len(cached) == len(set(cached)) == self.prefix.num_pages
        for page in cached:
            owners[page] += 1
        assert owners == {page: self.pages.num_owners(page) for page in range(10)}
        assert self.pages.num_free_pages == sum(count == 0 for count in owners.values())

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for sequence_id, tokens in self.held.items():
            table = self.pages.block_table(sequence_id)
            assert len(table) == -(-len(tokens) // SIZE)
            read = [token for page in table for token in self.content[page]]
            assert read[: len(tokens)] == tokens

    @invariant()
    def every_kept_page_leads_to_a_snapshot(self) -> None:
        for node in self.prefix._nodes():
            assert node.is_kept and (node.children or node.snapshot_idx is not None)
        assert self.prefix.num_snapshots_used <= self.prefix.num_snapshots


TestCaches = Caches.TestCase


# --- injected faults: the machine above must notice ---


def fails(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, wrong: object) -> bool:
    monkeypatch.setattr(owner, name, wrong)
    settings = hypothesis.settings(max_examples=150, stateful_step_count=40, phases=[hypothesis.Phase.generate])
    try:
        hypothesis.stateful.run_state_machine_as_test(Caches, settings=settings)
    except (AssertionError, ValueError, KeyError, IndexError, OutOfPagesError, hypothesis.errors.FlakyFailure):
        return True
    return False


def test_a_page_leaked_by_free_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PageAllocator.free

    def wrong(self: PageAllocator, sequence_id: int) -> None:
        if len(self._tables[sequence_id]) > 1:
            self._tables[sequence_id].pop()
        right(self, sequence_id)

    assert fails(monkeypatch, PageAllocator, "free", wrong)


def test_sharing_without_an_owner_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PageAllocator.alloc

    def wrong(self: PageAllocator, sequence_id: int, num_tokens: int = 0, *, shared: tuple[int, ...] = ()) -> object:
        table = right(self, sequence_id, num_tokens, shared=shared)
        for page in shared:
            self._owners[page] -= 1
        return table

    assert fails(monkeypatch, PageAllocator, "alloc", wrong)


def test_a_page_given_up_while_in_use_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: PrefixCache, node: object) -> bool:
        if not node.children:
            self._pages._owners[node.page] = 1
        return not node.children

    assert fails(monkeypatch, PrefixCache, "_is_spare", wrong)


def test_f22_a_prefix_found_by_its_last_page_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: PrefixCache, token_ids: list[int]) -> PrefixMatch | None:
        for node in self._recent:
            end = node.depth * SIZE
            if end < len(token_ids) and tuple(token_ids[end - SIZE : end]) == node.tokens:
                chain, at = [], node
                while at.parent is not None:
                    chain.append(at.page)
                    at = at.parent
                return PrefixMatch(end, tuple(reversed(chain)), node)
        return None

    assert fails(monkeypatch, PrefixCache, "match", wrong)


def test_the_search_is_the_same_on_a_long_random_run(seed: int) -> None:
    """Against a plain dictionary of every prefix that has a snapshot, with room for all of them."""
    rng = random.Random(seed)
    pages, prefix = kept(num_pages=4000, num_snapshots=4000)
    known: set[tuple[int, ...]] = set()
    for sequence_id in range(300):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 40))]
        expected = max((n for n in range(0, len(tokens), SIZE) if tuple(tokens[:n]) in known), default=0)
        assert matched(prefix, tokens)[0] == expected
        publish(pages, prefix, sequence_id, tokens)
        known |= {tuple(tokens[:n]) for n in range(SIZE, len(tokens) + 1, SIZE)}
