# SPDX-License-Identifier: Apache-2.0
"""Blocks of a cluster writing into each other's shared memory; addresses are 32-bit integers."""

from cutlass import Int32
from cutlass.cute.arch import inline_ptx


def shared_address_of(tensor):
    """Return the address of a tensor in shared memory."""
    return tensor.iterator.toint()


def store_to_block(rank, address, value, barrier):
    """Store a float at an address of another block's shared memory, and count its 4 bytes at a barrier there.

    `address` and `barrier` are the caller's own addresses of the same variables. The store is asynchronous: it is seen
    by who waits for the barrier, whose phase must expect it.
    """
    inline_ptx(
        """{
        .reg .b32 target, counter;
        mapa.shared::cluster.u32 target, {$r1}, {$r0};
        mapa.shared::cluster.u32 counter, {$r3}, {$r0};
        st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [target], {$r2}, [counter];
        }""",
        read_only_args=[rank, address, value, barrier],
    )


def address_in_block(rank, address):
    """Return the address that another block of the cluster has for a variable, from the caller's own address of it."""
    return inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r1}, {$r0};", write_only_types=[Int32], read_only_args=[rank, address]
    )


def store_pair_to_cluster(address, low, high):
    """Store two floats at an address of address_in_block."""
    inline_ptx("st.shared::cluster.v2.f32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, low, high])
