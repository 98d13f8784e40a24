# SPDX-License-Identifier: Apache-2.0
"""y = x w^T for few tokens: a weight streamed once, tokens in registers (parts/weight_stream.py)."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from megamoe.kernels.parts.fragment import UNDO
from megamoe.kernels.parts.linear_stream import Config
from megamoe.kernels.parts.memory_device import load_global_float
from megamoe.kernels.parts.weight_stream import EARLY_SLOTS, THREADS, TOKENS_PER_TILE
from megamoe.kernels.parts.weight_stream_device import (
    Ring,
    StreamThread,
    nvfp4_tokens,
    plain_tokens,
)

OUT_DTYPES = {"bf16": BFloat16, "f32": Float32}


def matrix(dtype, num_rows, num_columns: int):
    """Return a contiguous [num_rows, num_columns] argument, 16-byte aligned."""
    return make_fake_tensor(dtype, (num_rows, num_columns), (num_columns, 1), assumed_align=16)


def program(config: Config):
    """Return the launcher and its symbolic arguments."""
    num_tokens, num_rows = cute.sym_int32(), cute.sym_int32(divisibility=16)
    num_columns = config.num_columns
    weight = (
        matrix(Uint8, num_rows, num_columns // 2),
        matrix(Uint8, num_rows, num_columns // 16),
        make_fake_tensor(Float32, (1,), (1,)),
    )
    out = rows_of(OUT_DTYPES[config.out], num_tokens, num_rows)
    last = (out, Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True))
    if config.adds:
        last = (rows_of(Float32, num_tokens, num_rows), *last)
    linear = LinearStream(config)
    if config.x == "bf16":
        launcher = linear.weight_only_more if config.adds else linear.weight_only
        return launcher, (matrix(BFloat16, num_tokens, num_columns), *weight, *last)
    x = (
        matrix(Uint8, num_tokens, num_columns // 2),
        matrix(Uint8, num_tokens, num_columns // 16),
        make_fake_tensor(Float32, (num_tokens,), (1,)),
    )
    return linear.both_nvfp4_more if config.adds else linear.both_nvfp4, (*x, *weight, *last)


def rows_of(dtype, num_rows, num_columns):
    """Return a contiguous [num_rows, num_columns] argument with symbolic columns, a multiple of 16."""
    return make_fake_tensor(dtype, (num_rows, num_columns), (cute.sym_int64(divisibility=16), 1), assumed_align=16)


class LinearStream:
    """The streaming linear."""

    def __init__(self, config: Config):
        self.config, self.plan = config, config.plan

    @cute.jit
    def weight_only(self, x, codes, scales, tensor_scale, out, num_blocks: Int32, stream):
        self.launch((x,), codes, scales, tensor_scale, None, out, num_blocks, stream)

    @cute.jit
    def weight_only_more(self, x, codes, scales, tensor_scale, earlier, out, num_blocks: Int32, stream):
        self.launch((x,), codes, scales, tensor_scale, earlier, out, num_blocks, stream)

    @cute.jit
    def both_nvfp4(
        self, x_codes, x_scales, x_tensor_scale, codes, scales, tensor_scale, out, num_blocks: Int32, stream
    ):
        x = (x_codes, x_scales, x_tensor_scale)
        self.launch(x, codes, scales, tensor_scale, None, out, num_blocks, stream)

    @cute.jit
    def both_nvfp4_more(
        self, x_codes, x_scales, x_tensor_scale, codes, scales, tensor_scale, earlier, out, num_blocks: Int32, stream
    ):
        x = (x_codes, x_scales, x_tensor_scale)
        self.launch(x, codes, scales, tensor_scale, earlier, out, num_blocks, stream)

    def launch(self, x, codes, scales, tensor_scale, earlier, out, num_blocks, stream):
        """Launch the kernel; it may start before the kernel ahead of it has finished (see the wait inside)."""
        self.kernel(x, codes, scales, tensor_scale, earlier, out, num_blocks).launch(
            grid=(num_blocks, 1, 1),
            block=(THREADS, 1, 1),
            smem=self.plan.shared_bytes,
            stream=stream,
            use_pdl=self.config.overlaps,
        )

    @cute.kernel
    def kernel(self, x, codes, scales, tensor_scale, earlier, out, num_blocks: Int32):
        plan, config = self.plan, self.config
        num_tokens, num_rows = out.shape
        self.num_tokens, self.num_row_tiles = num_tokens, num_rows // 16
        self.num_groups = plan.num_units(self.num_row_tiles)
        num_units = self.num_groups
        if cutlass.const_expr(not config.one_pass):  # passes run side by side, in step: the second finds weights in L2
            num_units = num_units * ((num_tokens + (config.tokens_per_pass - 1)) // config.tokens_per_pass)
        block, _, _ = cute.arch.block_idx()
        begin, end = block * num_units // num_blocks, (block + 1) * num_units // num_blocks

        self.thread = StreamThread(plan)
        self.codes, self.scales = codes.iterator.toint(), scales.iterator.toint()
        self.thread.init_ring()
        # The weights do not depend on the kernel before this one, the tokens do. Tokens are asked for early: behind a
        # full ring of weights they would come microseconds later.
        self.fill(begin, end, 0, EARLY_SLOTS)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if cutlass.const_expr(config.one_pass):
            self.request_tokens(x, Int32(0))
        self.fill(begin, end, EARLY_SLOTS, plan.num_slots)
        if cutlass.const_expr(config.one_pass):
            self.arrange_tokens(x, Int32(0))
        scale = load_global_float(tensor_scale.iterator.toint())

        ring_slot, ring_parity = Int32(0), Int32(0)
        if cutlass.const_expr(config.one_pass):
            for unit in cutlass.range(begin, end, unroll=1):
                ring_slot, ring_parity = self.unit(
                    ring_slot, ring_parity, unit, end, unit, Int32(0), scale, x, earlier, out
                )
        else:
            first_pass = begin // self.num_groups
            last_pass = (end + self.num_groups - 1) // self.num_groups
            for this_pass in cutlass.range(first_pass, last_pass, unroll=1):
                first_token, start = this_pass * config.tokens_per_pass, this_pass * self.num_groups
                self.request_tokens(x, first_token)
                self.arrange_tokens(x, first_token)
                until = cutlass.min(end, start + self.num_groups)
                for unit in cutlass.range(cutlass.max(begin, start), until, unroll=1):
                    ring_slot, ring_parity = self.unit(
                        ring_slot, ring_parity, unit, end, unit - start, first_token, scale, x, earlier, out
                    )

    @cute.jit
    def unit(
        self,
        slot: Int32,
        parity: Int32,
        unit: Int32,
        end: Int32,
        group: Int32,
        first_token: Int32,
        scale,
        x,
        earlier,
        out,
    ):
        """Stream a unit and store its outputs; return the ring's new place."""
        if self.thread.warp < self.plan.used_warps:
            slot, parity = self.stream_unit(slot, parity, unit, end)
        self.thread.after_partials()
        self.finish(x, scale, earlier, out, unit, group, first_token)
        return slot, parity

    def fill(self, begin, end, first_slot: int, last_slot: int):
        """Fill slots of the empty ring."""
        per_unit = len(self.plan.stage_chunks) * self.plan.streams
        for index in range(first_slot, last_slot):
            self.issue(begin + index // per_unit, end, Int32(index), index % per_unit)

    def row_tile(self, group, index):
        """Return a row tile of a unit; the last unit repeats the last one."""
        if self.plan.tiles_per_unit == 1:
            return group
        return cutlass.min(group * self.plan.tiles_per_unit + index, self.num_row_tiles - 1)

    def issue(self, unit, end, slot, position: int):
        """Fill a ring slot with a stage of a unit, if the block has that unit."""
        group = unit if self.config.one_pass else unit % self.num_groups
        stages = len(self.plan.stage_chunks)
        row_tile = self.row_tile(group, position // stages)
        chunk = Int64(row_tile) * (self.config.num_columns // 64) + self.config.first_column // 64
        code_address, scale_address = self.thread.slice_addresses(self.codes, self.scales, chunk)
        self.thread.issue(unit < end, slot, code_address, scale_address, position % stages)

    def token_access(self, x, first_token):
        """Return load_raw and arrange for the tokens of a pass."""
        config = self.config
        rows = [first_token + tile * TOKENS_PER_TILE + self.thread.row for tile in range(self.plan.num_tiles)]
        arguments = (config.num_columns, config.first_column // 64, self.thread.column, rows)
        if config.x == "bf16":
            return plain_tokens(x[0].iterator.toint(), *arguments)
        return nvfp4_tokens(x[0].iterator.toint(), x[1].iterator.toint(), *arguments)

    def request_tokens(self, x, first_token):
        """Start loading a pass's tokens."""
        load_raw, _ = self.token_access(x, first_token)
        self.thread.request_tokens(load_raw, self.num_tokens - first_token)

    def arrange_tokens(self, x, first_token):
        """Have a pass's tokens in place."""
        load_raw, arrange = self.token_access(x, first_token)
        self.thread.arrange_tokens(load_raw, arrange, self.num_tokens - first_token)

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
    def finish(self, x, scale: Float32, earlier, out: cute.Tensor, unit: Int32, group: Int32, first_token: Int32):
        """Add up the warps' sums and store the outputs of a unit."""
        num_tokens, num_rows = out.shape
        output = self.thread.output(unit)
        stream, local = output // (self.config.tokens_per_pass * 16), output // 16 % self.config.tokens_per_pass
        token = first_token + local
        if (output < self.plan.outputs_per_unit) & (token < num_tokens):
            row = self.row_tile(group, stream) * 16 + output % 16
            value = self.thread.sum_partials(unit, stream, local, output % 16) * UNDO * scale
            if cutlass.const_expr(self.config.x == "nvfp4"):
                value = value * UNDO * x[2][token]
            if cutlass.const_expr(self.config.adds):
                value = earlier[token, row] + value
            out[token, row] = value.to(out.element_type)
