# SPDX-License-Identifier: Apache-2.0
"""Memory instructions of the matrix kernels: addressed loads and stores, bulk copies, mbarriers.

Addresses are plain integers: 64 bits for global memory, 32 for shared.
"""

from cutlass import Float32, Int32, Uint32
from cutlass.cute.arch import inline_ptx


def predicated(wanted, instruction: str, *arguments) -> None:
    """Execute an instruction without results if `wanted`; its operands are {$r1}, {$r2} and so on.

    The predicate is made inside, where a condition that the compiler has folded to a constant does no harm.
    """
    inline_ptx(
        "{ .reg .pred wanted; .reg .b32 flag; mov.b32 flag, {$r0}; setp.ne.b32 wanted, flag, 0; @wanted "
        + instruction
        + " }",
        read_only_args=[Int32(wanted), *arguments],
    )


def load_shared(address, num_words: int):
    """Return 1, 2 or 4 words of shared memory."""
    vector = {1: "", 2: ".v2", 4: ".v4"}[num_words]
    targets = ", ".join(f"{{$w{index}}}" for index in range(num_words))
    targets = targets if num_words == 1 else f"{{{targets}}}"
    return inline_ptx(
        f"ld.shared{vector}.b32 {targets}, [{{$r0}}];",
        write_only_types=[Uint32] * num_words,
        read_only_args=[address],
    )


def store_shared(address, *words):
    """Store 1 or 4 words to shared memory."""
    sources = ", ".join(f"{{$r{index + 1}}}" for index in range(len(words)))
    vector, sources = ("", sources) if len(words) == 1 else (".v4", f"{{{sources}}}")
    inline_ptx(f"st.shared{vector}.b32 [{{$r0}}], {sources};", read_only_args=[address, *words])


def load_shared_float(address):
    """Return a float of shared memory."""
    return inline_ptx("ld.shared.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[address])


def store_shared_float(address, value):
    """Store a float to shared memory."""
    inline_ptx("st.shared.f32 [{$r0}], {$r1};", read_only_args=[address, value])


def load_global_if(wanted, address, bits: int = 32):
    """Return a word (or the zero-extended 8 or 16 bits) of global memory, or zero if `wanted` is 0."""
    kind = {8: "u8", 16: "u16", 32: "b32"}[bits]
    return inline_ptx(
        "{ .reg .pred p; .reg .b32 flag; mov.b32 flag, {$r0}; setp.ne.b32 p, flag, 0; mov.b32 {$w0}, 0; @p ld.global."
        + kind
        + " {$w0}, [{$r1}]; }",
        write_only_types=[Uint32],
        read_only_args=[wanted, address],
    )


def load_global_vector_if(wanted, address, num_words: int):
    """Return 2 or 4 words of global memory, or zeros if `wanted` is 0."""
    targets = ", ".join(f"{{$w{index}}}" for index in range(num_words))
    zeros = " ".join(f"mov.b32 {{$w{index}}}, 0;" for index in range(num_words))
    return inline_ptx(
        "{ .reg .pred p; .reg .b32 flag; mov.b32 flag, {$r0}; setp.ne.b32 p, flag, 0; "
        + zeros
        + f" @p ld.global.v{num_words}.b32 {{{targets}}}, [{{$r1}}]; }}",
        write_only_types=[Uint32] * num_words,
        read_only_args=[wanted, address],
    )


def load_global_int(address):
    """Return an int32 of global memory."""
    return inline_ptx("ld.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def load_global_float(address):
    """Return a float of global memory."""
    return inline_ptx("ld.global.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[address])


def init_barrier(address, count):
    """Initialize an mbarrier for `count` arrivals."""
    inline_ptx("mbarrier.init.shared::cta.b64 [{$r0}], {$r1};", read_only_args=[address, count])


def publish_barriers():
    """Make initialized barriers visible to the copy engine."""
    inline_ptx("fence.mbarrier_init.release.cluster;")


def expect_bytes_if(wanted, address, num_bytes):
    """Arrive at an mbarrier and announce bytes that copies will add."""
    predicated(wanted, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{$r1}], {$r2};", address, num_bytes)


def wait_barrier(address, parity):
    """Wait until the phase of that parity is complete."""
    inline_ptx(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [{$r0}], {$r1}; "
        "@!done bra.uni again; }",
        read_only_args=[address, parity],
    )


def bulk_copy_if(wanted, shared_address, global_address, num_bytes, barrier):
    """Start a copy from global to shared memory that completes on an mbarrier; everything a multiple of 16 bytes."""
    predicated(
        wanted,
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r1}], [{$r2}], {$r3}, [{$r4}];",
        shared_address,
        global_address,
        num_bytes,
        barrier,
    )


def load_global_vector(address, num_words: int):
    """Return 2 or 4 words of global memory that nobody writes."""
    targets = ", ".join(f"{{$w{index}}}" for index in range(num_words))
    return inline_ptx(
        f"ld.global.nc.L1::no_allocate.v{num_words}.b32 {{{targets}}}, [{{$r0}}];",
        write_only_types=[Uint32] * num_words,
        read_only_args=[address],
    )


def store_global_vector(address, a, b, c, d):
    """Store four words to global memory."""
    inline_ptx("st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, a, b, c, d])


def store_global_vector_if(wanted, address, a, b, c, d):
    """Store four words to global memory."""
    predicated(wanted, "st.global.v4.b32 [{$r1}], {{$r2}, {$r3}, {$r4}, {$r5}};", address, a, b, c, d)


def arrive_if(wanted, address):
    """Arrive at an mbarrier."""
    predicated(wanted, "mbarrier.arrive.shared::cta.b64 _, [{$r1}];", address)


def pack_bf16(low, high):
    """Return two floats rounded to bf16 in one word."""
    return inline_ptx("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high])


def store_matrices_transposed(address, a, b, c, d):
    """Store four 8 x 8 matrices of 16-bit values, transposed; lane l gives the address of row l % 8 of matrix l / 8."""
    inline_ptx(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[address, a, b, c, d],
    )


def copy_16_bytes(shared_address, global_address, wanted):
    """Start a copy of 16 bytes from global to shared memory, zeros if not `wanted`; wait_copies waits for it."""
    inline_ptx(
        "{ .reg .pred p; .reg .b32 size; setp.ne.b32 p, {$r2}, 0; selp.b32 size, 16, 0, p; "
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, size; }",
        read_only_args=[shared_address, global_address, Int32(wanted)],
    )


def wait_copies():
    """Wait for this thread's copies of 16 bytes."""
    inline_ptx("cp.async.wait_all;")


def prefetch_if(wanted, global_address, num_bytes):
    """Ask for bytes, a multiple of 16, to be brought to the L2 cache."""
    predicated(wanted, "cp.async.bulk.prefetch.L2.global [{$r1}], {$r2};", global_address, Int32(num_bytes))


def load_matrices(address):
    """Return four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8."""
    return inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


def address_in_block(address, rank):
    """Return the cluster address of a place in the shared memory of another block of the cluster."""
    return inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[address, rank]
    )


def send_float(address, value, barrier):
    """Store a float to the shared memory of a block of the cluster; its 4 bytes count on an mbarrier there.

    Both addresses are those of `address_in_block`.
    """
    inline_ptx(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [{$r0}], {$r1}, [{$r2}];",
        read_only_args=[address, value, barrier],
    )


def load_shared_vector_if(wanted, address):
    """Return 4 words of shared memory, or zeros if `wanted` is 0."""
    zeros = " ".join(f"mov.b32 {{$w{index}}}, 0;" for index in range(4))
    return inline_ptx(
        "{ .reg .pred p; .reg .b32 flag; mov.b32 flag, {$r0}; setp.ne.b32 p, flag, 0; "
        + zeros
        + " @p ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r1}]; }",
        write_only_types=[Uint32] * 4,
        read_only_args=[Int32(wanted), address],
    )


def store_shared_if(wanted, address, word):
    """Store a word to shared memory."""
    predicated(wanted, "st.shared.b32 [{$r1}], {$r2};", address, word)


def fill_slot(wanted, barrier, target, codes, code_bytes: int, scales, scale_bytes: int):
    """Start the two copies of a ring slot and announce their bytes; one lane of the warp does it, if `wanted`.

    The instruction that elects the lane tells the assembler that there is only one: it loops over lanes otherwise.
    """
    copy = "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    inline_ptx(
        "{ .reg .pred one, wanted; .reg .b32 flag; mov.b32 flag, {$r0}; setp.ne.b32 wanted, flag, 0; "
        "elect.sync _|one, 0xffffffff; and.pred one, one, wanted; "
        f"@one mbarrier.arrive.expect_tx.shared::cta.b64 _, [{{$r1}}], {code_bytes + scale_bytes}; "
        f"{copy} [{{$r2}}], [{{$r3}}], {code_bytes}, [{{$r1}}]; "
        f"{copy} [{{$r4}}], [{{$r5}}], {scale_bytes}, [{{$r1}}]; }}",
        read_only_args=[Int32(wanted), barrier, target, codes, target + code_bytes, scales],
    )


def store_shared_floats(address, a, b, c, d):
    """Store four floats to shared memory."""
    inline_ptx("st.shared.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, a, b, c, d])


def store_global_long_if(wanted, address, value):
    """Store an int64 to global memory."""
    predicated(wanted, "st.global.b64 [{$r1}], {$r2};", address, value)


def store_global_float_if(wanted, address, value):
    """Store a float to global memory."""
    predicated(wanted, "st.global.f32 [{$r1}], {$r2};", address, value)
