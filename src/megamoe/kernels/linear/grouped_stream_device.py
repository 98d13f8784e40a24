# SPDX-License-Identifier: Apache-2.0
"""Device half of grouped_stream."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.kernels.linear.grouped_stream_config import Config
from megamoe.kernels.parts.fragment import UNDO
from megamoe.kernels.parts.memory_device import load_global_float
from megamoe.kernels.parts.weight_stream import EARLY_SLOTS, THREADS, TOKENS_PER_TILE
from megamoe.kernels.parts.weight_stream_device import Ring, StreamThread, nvfp4_tokens, plain_tokens

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}


def matrix(dtype, num_rows, num_columns, divisibility: int):
    """Return a contiguous [num_rows, num_columns] argument, 16-byte aligned, with 64-bit offsets."""
    return make_fake_tensor(
        dtype, (num_rows, num_columns), (cute.sym_int64(divisibility=divisibility), 1), assumed_align=16
    )


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows, num_groups = cute.sym_int32(), cute.sym_int32(divisibility=16), cute.sym_int32()
    columns = config.num_columns
    weight = (
        matrix(Uint8, num_rows, columns // 2, 32),
        matrix(Uint8, num_rows, columns // 16, 4),
        make_fake_tensor(Float32, (num_groups,), (1,)),
    )
    out = matrix(OUT_DTYPES[config.out], num_tokens, num_rows, 16)
    last = (out, Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True))
    stream = GroupedStream(config)
    if config.x == "bf16":
        return stream.weight_only, (matrix(BFloat16, num_tokens, cute.sym_int32(divisibility=64), 64), *weight, *last)
    x = (
        matrix(Uint8, num_tokens, cute.sym_int32(divisibility=32), 32),
        matrix(Uint8, num_tokens, cute.sym_int32(divisibility=4), 4),
        matrix(Float32, num_tokens, num_groups, 1),
    )
    return stream.both_nvfp4, (*x, *weight, *last)


class GroupedStream:
    """The streaming linear of groups."""

    def __init__(self, config: Config):
        self.config, self.plan = config, config.plan

    @cute.jit
    def weight_only(self, x, codes, scales, tensor_scale, out, num_blocks: Int32, stream):
        self.launch((x,), codes, scales, tensor_scale, out, num_blocks, stream)

    @cute.jit
    def both_nvfp4(
        self, x_codes, x_scales, x_tensor_scale, codes, scales, tensor_scale, out, num_blocks: Int32, stream
    ):
        self.launch((x_codes, x_scales, x_tensor_scale), codes, scales, tensor_scale, out, num_blocks, stream)

    def launch(self, x, codes, scales, tensor_scale, out, num_blocks, stream):
        """Launch the kernel; it may start before the kernel ahead of it has finished (see the wait inside)."""
        self.kernel(x, codes, scales, tensor_scale, out, num_blocks).launch(
            grid=(num_blocks, tensor_scale.shape[0], 1),
            block=(THREADS, 1, 1),
            smem=self.plan.shared_bytes,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, x, codes, scales, tensor_scale, out, num_blocks: Int32):
        plan = self.plan
        self.num_tokens, num_rows = out.shape
        self.num_groups = tensor_scale.shape[0]
        self.num_row_tiles = num_rows // 16 // self.num_groups  # of a group
        num_units = plan.num_units(self.num_row_tiles)
        block, self.group, _ = cute.arch.block_idx()
        begin, end = block * num_units // num_blocks, (block + 1) * num_units // num_blocks

        self.thread = StreamThread(plan)
        self.codes, self.scales = codes.iterator.toint(), scales.iterator.toint()
        self.thread.init_ring()
        # The weights do not depend on the kernel before this one, the tokens do. Tokens are asked for early: behind a
        # full ring of weights they would come microseconds later.
        self.fill(begin, end, 0, EARLY_SLOTS)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        self.request_tokens(x)
        self.fill(begin, end, EARLY_SLOTS, plan.num_slots)
        self.arrange_tokens(x)
        scale = load_global_float(tensor_scale.iterator.toint() + Int64(self.group) * 4)

        ring_slot, ring_parity = Int32(0), Int32(0)
        for unit in cutlass.range(begin, end, unroll=1):
            if self.thread.warp < plan.used_warps:
                ring_slot, ring_parity = self.stream_unit(ring_slot, ring_parity, unit, end)
            self.thread.after_partials()
            self.finish(x, scale, out, unit)

    def fill(self, begin, end, first_slot: int, last_slot: int):
        """Fill slots of the empty ring."""
        per_unit = len(self.plan.stage_chunks) * self.plan.streams
        for index in range(first_slot, last_slot):
            self.issue(begin + index // per_unit, end, Int32(index), index % per_unit)

    def row_tile(self, unit, index):
        """Return a row tile of a unit; the last unit repeats the last one."""
        if self.plan.tiles_per_unit == 1:
            return unit
        return cutlass.min(unit * self.plan.tiles_per_unit + index, self.num_row_tiles - 1)

    def issue(self, unit, end, slot, position: int):
        """Fill a ring slot with a stage of a unit, if the block has that unit."""
        stages = len(self.plan.stage_chunks)
        row_tile = self.group * self.num_row_tiles + self.row_tile(unit, position // stages)
        chunk = Int64(row_tile) * self.plan.chunks
        code_address, scale_address = self.thread.slice_addresses(self.codes, self.scales, chunk)
        self.thread.issue(unit < end, slot, code_address, scale_address, position % stages)

    def token_access(self, x):
        """Return load_raw and arrange for the group's tokens."""
        columns = self.num_groups * self.config.num_columns
        rows = [tile * TOKENS_PER_TILE + self.thread.row for tile in range(self.plan.num_tiles)]
        arguments = (columns, self.group * self.plan.chunks, self.thread.column, rows)
        if self.config.x == "bf16":
            return plain_tokens(x[0].iterator.toint(), *arguments)
        return nvfp4_tokens(x[0].iterator.toint(), x[1].iterator.toint(), *arguments)

    def request_tokens(self, x):
        """Start loading the group's tokens."""
        load_raw, _ = self.token_access(x)
        self.thread.request_tokens(load_raw, self.num_tokens)

    def arrange_tokens(self, x):
        """Have the group's tokens in place."""
        load_raw, arrange = self.token_access(x)
        self.thread.arrange_tokens(load_raw, arrange, self.num_tokens)

    def stream_unit(self, slot, parity, unit, end):
        """Stream a unit, keep the ring full, leave the partial sums; return the ring's new place."""
        plan = self.plan
        ring = Ring(plan, slot, parity)
        stages = len(plan.stage_chunks)
        per_unit = stages * plan.streams
        for stream in range(plan.streams):
            accumulators = self.thread.zero_accumulators(plan.num_tiles)
            for stage in range(stages):
                accumulators = self.thread.consume(ring, accumulators, stage)
                cute.arch.sync_warp()
                ahead = stream * stages + stage + plan.num_slots
                self.issue(unit + ahead // per_unit, end, ring.slot, ahead % per_unit)
                ring.advance()
            if stream == 0:
                self.thread.before_partials()
            self.thread.store_partials(unit, stream, accumulators)
        return ring.slot, ring.parity

    @cute.jit
    def finish(self, x, scale: Float32, out: cute.Tensor, unit: Int32):
        """Add up the warps' sums and store the outputs of a unit."""
        output, per_tile = self.thread.output(unit), self.plan.num_tiles * TOKENS_PER_TILE * 16
        stream, token = output // per_tile, output // 16 % (self.plan.num_tiles * TOKENS_PER_TILE)
        if (output < self.plan.outputs_per_unit) & (token < self.num_tokens):
            row = (self.group * self.num_row_tiles + self.row_tile(unit, stream)) * 16 + output % 16
            value = self.thread.sum_partials(unit, stream, token, output % 16) * UNDO * scale
            if cutlass.const_expr(self.config.x == "nvfp4"):
                value = value * UNDO * x[2][token, self.group]
            out[token, row] = value.to(out.element_type)
