# SPDX-License-Identifier: Apache-2.0
"""A row of logits held by a cluster: every block has a share in shared memory, and all know what is found."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32
from cutlass.cute.arch import inline_ptx

from megamoe.kernels.parts.cluster_device import address_in_block, shared_address_of
from megamoe.kernels.parts.held_row import CLUSTER, THREADS, WARPS
from megamoe.kernels.parts.logits_device import LEAST, NO_INDEX, order_of
from megamoe.kernels.parts.memory_device import copy_16_bytes, store_global_long_if, wait_copies

VECTOR = 4


def share_of(num_columns, rank):
    """Return the first column of a block's share, and how many columns it has: a multiple of 32, or what is left."""
    width = (num_columns + (CLUSTER * 32 - 1)) // (CLUSTER * 32) * 32
    first = rank * width
    return first, cutlass.max(cutlass.min(num_columns - first, width), 0)


def meet():
    """Wait for all threads of the cluster; what they wrote before is seen."""
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


@cute.jit
def hold(source: Int64, held: cute.Tensor, first: Int32, count: Int32, thread: Int32):
    """Copy a share to shared memory; return the order of this thread's largest logit and its lowest column.

    All copies are under way together; they are of 16 bytes where the share begins at a multiple of that. A thread's
    columns are `thread` and every THREADS-th behind it.

    Args:
        source: address of the share.
        held: fp32, at least `count`.
        first: the first column.
        count: how many.
        thread: of the block.
    """
    target, vectors = shared_address_of(held), Int32(0)
    if source % 16 == 0:
        vectors = count // VECTOR
    for vector in cutlass.range(thread, vectors, THREADS, unroll=8):
        copy_16_bytes(target + vector * 16, source + Int64(vector) * 16, Int32(1))
    for place in cutlass.range(vectors * VECTOR + thread, count, THREADS, unroll=8):
        copy_word(target + place * 4, source + Int64(place) * 4)
    wait_copies()
    cute.arch.sync_threads()
    order, index = Int32(LEAST), Int32(NO_INDEX)
    for place in cutlass.range(thread, count, THREADS, unroll=8):
        own = order_of(held[place])
        if (own > order) | (index == NO_INDEX):
            order, index = own, first + place
    return order, index


@cute.jit
def best_of_warp(order: Int32, index: Int32):
    """Return the largest order in a warp and the lowest index that has it."""
    best = cute.arch.warp_redux_sync(order, "max")
    return best, cute.arch.warp_redux_sync(index if order == best else Int32(NO_INDEX), "min")


@cute.jit
def best_of_block(order: Int32, index: Int32, sums: cute.Tensor):
    """Return the largest order in a block and the lowest index that has it; `sums` is int32 [2 * WARPS]."""
    order, index = best_of_warp(order, index)
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    if lane == 0:
        sums[warp] = order
        sums[WARPS + warp] = index
    cute.arch.sync_threads()
    return best_of_warp(sums[lane % WARPS], sums[WARPS + lane % WARPS])


@cute.jit
def tell(a: Int32, b: Int32, shares: cute.Tensor, number: cutlass.Constexpr, rank: Int32, thread: Int32):
    """Tell two words to all blocks of the cluster; return those that block lane % CLUSTER told.

    Args:
        a, b: the words, the same in all threads.
        shares: int32 [numbers * CLUSTER * 2]. A number is used once, or again after another meeting.
        number: which part of it.
        rank: this block.
        thread: of the block.
    """
    if thread < CLUSTER:
        target = address_in_block(thread, shared_address_of(shares) + (number * CLUSTER + rank) * 8)
        store_cluster_pair(target, a, b)
    meet()
    place = (number * CLUSTER + cute.arch.lane_idx() % CLUSTER) * 2
    return shares[place], shares[place + 1]


def copy_word(shared_address, global_address):
    """Start copying 4 bytes to shared memory; wait_copies waits for them."""
    inline_ptx("cp.async.ca.shared.global [{$r0}], [{$r1}], 4;", read_only_args=[shared_address, global_address])


def store_cluster_pair(address, a, b):
    """Store two words to the shared memory of a block of the cluster, at an address of address_in_block."""
    inline_ptx("st.shared::cluster.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, a, b])


def store_cluster_vector(address, a, b, c, d):
    """Store four words to the shared memory of a block of the cluster, at an address of address_in_block."""
    inline_ptx("st.shared::cluster.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, a, b, c, d])


def load_cluster_word(address):
    """Return a word of the shared memory of a block of the cluster, from an address of address_in_block."""
    return inline_ptx("ld.shared::cluster.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def add_shared_word(address, word):
    """Add a word to shared memory, if it is not 0."""
    inline_ptx(
        "{ .reg .pred some; setp.ne.b32 some, {$r1}, 0; @some red.shared.add.u32 [{$r0}], {$r1}; }",
        read_only_args=[address, word],
    )


def halves(value):
    """Return the low and the high word of an int64."""
    return inline_ptx("mov.b64 {{$w0}, {$w1}}, {$r0};", write_only_types=[Int32, Int32], read_only_args=[value])


def whole(low, high):
    """Return the int64 of two words."""
    return inline_ptx("mov.b64 {$w0}, {{$r0}, {$r1}};", write_only_types=[Int64], read_only_args=[low, high])


def word_below(word, distance: int):
    """Return the word of the lane `distance` below, its own where there is none."""
    return inline_ptx(
        f"shfl.sync.up.b32 {{$w0}}, {{$r0}}, {distance}, 0, 0xffffffff;",
        write_only_types=[Int32],
        read_only_args=[word],
    )


@cute.jit
def locate(
    low: Int32,
    high: Int32,
    wanted: Int32,
    held: cute.Tensor,
    first: Int32,
    count: Int32,
    sums: cute.Tensor,
    shares: cute.Tensor,
    number: cutlass.Constexpr,
    rank: Int32,
    thread: Int32,
    target: Int64,
):
    """Store the column of the wanted one (from 0 on) of the tokens whose order is low to high, in order of columns.

    Args:
        low, high, wanted: which token; there must be more than `wanted`.
        held, first, count: the share.
        sums, shares, number: see best_of_block and tell.
        rank, thread: who this is.
        target: address of the int64.
    """
    warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
    share = (count + (THREADS - 1)) // THREADS * 32
    begin = cutlass.min(warp * share, count)
    end = cutlass.min(begin + share, count)
    own = Int32(0)
    for place in cutlass.range(begin + lane, end, 32, unroll=4):
        order = order_of(held[place])
        own = own + Int32((order >= low) & (order <= high))
    own = cute.arch.warp_redux_sync(own, "add")
    cute.arch.sync_threads()  # the sums may still be being read
    if lane == 0:
        sums[warp] = own
    cute.arch.sync_threads()
    of_warp = sums[lane % WARPS] if lane < WARPS else Int32(0)
    of_block = cute.arch.warp_redux_sync(of_warp, "add")
    before = cute.arch.warp_redux_sync(of_warp if lane < warp else Int32(0), "add")
    theirs, _ = tell(of_block, Int32(0), shares, number, rank, thread)
    before = before + cute.arch.warp_redux_sync(theirs if lane < rank else Int32(0), "add")
    below = Uint32(cute.arch.lanemask_lt())
    for start in cutlass.range(begin, end, 32, unroll=1):
        place = start + lane
        order = order_of(held[cutlass.min(place, end - 1)])
        is_one = (place < end) & (order >= low) & (order <= high)
        lanes = Uint32(cute.arch.vote_ballot_sync(is_one))
        is_wanted = is_one & (before + Int32(cute.arch.popc(lanes & below)) == wanted)
        store_global_long_if(is_wanted, target, Int64(first + place))
        before = before + Int32(cute.arch.popc(lanes))
