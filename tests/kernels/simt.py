# SPDX-License-Identifier: Apache-2.0
"""Runs the PTX of small kernels on the CPU, all threads of a block in step: enough of PTX for work on rows.

Results of fp32 instructions are worked out in fp64 and rounded once. Approximate ones (ex2, rsqrt, rcp) are exact here:
a GPU may differ in the last bits.

At any moment the threads that are furthest behind execute their instruction, so that threads which part ways meet again
where their ways join. An instruction of the whole warp that only some of its lanes reach is an error, as is an access
outside a buffer: on a GPU the one hangs, and the other may go unnoticed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
STEP_LIMIT = 200_000
COMPARE = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
NUMPY = {"s": np.int64, "u": np.uint64, "b": np.uint64}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard name operands`."""

    guard: str
    negated: bool
    name: str
    operands: tuple[str, ...]


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of a PTX file's kernel, and where its labels are."""
    body = re.sub(r"//.*", "", text[text.index("\n{") + 2 : text.rindex("}")])
    body = re.sub(r"\.pragma[^;]*;", "", re.sub(r"\.reg[^;]*;", "", body))
    body = re.sub(r";\s*\}", ";", re.sub(r"\{(?=\s*(?:[a-z@]|$))", "", body))  # blocks of inline assembly
    body = re.sub(r"(\$L\w+):", r"\1:;", body)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in (one.strip() for one in body.split(";")):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif statement:
            found = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL)
            assert found is not None, statement
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[4])
            instructions.append(Instruction(found[2] or "", bool(found[1]), found[3], tuple(operands)))
    return instructions, labels


class Block:
    """One block of a kernel.

    Args:
        text: its PTX.
        num_threads: threads of the block, whole warps.
        params: bytes of every parameter.
        buffers: global memory; buffer i begins at address (i + 1) << 32.
        block: its index in x and y.
    """

    def __init__(
        self,
        text: str,
        num_threads: int,
        params: Sequence[bytes],
        buffers: Sequence[torch.Tensor],
        block: tuple[int, int] = (0, 0),
    ) -> None:
        self.instructions, self.labels = parse(text)
        self.size, self.params = num_threads, params
        self.memories = [np.zeros(1 << 18, np.uint8)]  # shared memory, at 0
        self.memories += [one.view(-1).view(torch.uint8).numpy() for one in buffers]
        self.threads = np.arange(num_threads)
        lanes, everywhere = self.threads % 32, np.ones(num_threads, np.uint64)
        self.registers: dict[str, Words] = {
            "%tid.x": self.threads.astype(np.uint64),
            "%laneid": lanes.astype(np.uint64),
            "%lanemask_lt": (2**lanes - 1).astype(np.uint64),
            "%ctaid.x": everywhere * np.uint64(block[0]),
            "%ctaid.y": everywhere * np.uint64(block[1]),
        }

    def run(self) -> None:
        """Execute all threads to their end."""
        places = np.zeros(self.size, np.int64)
        waiting, done = np.zeros(self.size, bool), np.zeros(self.size, bool)
        for _ in range(STEP_LIMIT):
            able = ~done & ~waiting
            if not able.any():
                if done.all():
                    return
                waiting[:] = False
                continue
            place = places[able].min()
            mask = able & (places == place)
            one = self.instructions[place]
            places[mask] = place + 1
            if one.guard:
                wanted = self.value(one.guard, "pred") != one.negated
                mask = mask & wanted
            if one.name.startswith("bra"):
                places[mask] = self.labels[one.operands[0]]
            elif one.name == "ret":
                done |= mask
            elif one.name.startswith(("bar.sync", "barrier.sync")):
                waiting |= mask
            elif mask.any():
                self.execute(one, mask)
        raise AssertionError("the kernel does not end")

    def value(self, operand: str, kind: str) -> npt.NDArray[np.generic]:
        """Return an operand of every thread as kind: "s32", "u64", "f32", "pred" and so on."""
        if operand.startswith("%") or operand in self.registers:
            raw = self.registers[operand]
        elif operand.startswith("0f"):
            raw = np.full(self.size, int(operand[2:], 16), np.uint64)
        else:
            number = 0 if operand.startswith("__dynamic") else int(operand, 0)
            raw = np.full(self.size, number & (2**64 - 1), np.uint64)
        if kind == "pred":
            return raw.astype(bool)
        bits = int(kind.lstrip("subf"))
        raw = raw & np.uint64(2**bits - 1)
        if kind == "f32":
            return raw.astype(np.uint32).view(np.float32)
        if kind[0] == "s":
            return raw.view(np.int64) if bits == 64 else raw.astype(np.uint32).view(np.int32).astype(np.int64)
        return raw

    def store(self, register: str, values: npt.NDArray[np.generic], mask: Mask) -> None:
        """Set a register of some threads."""
        if values.dtype == np.float32:
            values = values.view(np.uint32)
        raw = values.view(np.uint64) if values.dtype == np.int64 else values.astype(np.uint64)
        old = self.registers.get(register, np.zeros(self.size, np.uint64))
        self.registers[register] = np.where(mask, raw, old)

    def whole_warps(self, mask: Mask, one: Instruction) -> None:
        """Refuse an instruction of the warp that only some lanes execute."""
        lanes = mask.reshape(-1, 32)
        assert (lanes.all(1) | ~lanes.any(1)).all(), f"only some lanes reach {one}"

    def access(self, operand: str, num_bytes: int, mask: Mask) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return which memory every thread's address is in, and where in it the bytes begin."""
        base, _, offset = operand.strip("[]").partition("+")
        addresses = self.value(base, "u64").view(np.int64) + int(offset or 0)
        which, places = addresses >> 32, addresses & 0xFFFFFFFF
        for number in np.unique(which[mask]):
            assert 0 <= number < len(self.memories), f"an access outside all buffers: {operand}"
            inside = places[mask & (which == number)] + num_bytes <= self.memories[number].size
            assert inside.all(), f"an access outside its buffer: {operand}"
        assert (places[mask] % num_bytes == 0).all(), f"an access that is not aligned: {operand}"
        return which, places

    def execute(self, one: Instruction, mask: Mask) -> None:
        """Execute an instruction for some threads."""
        name, *rest = one.name.split(".")
        kind = rest[-1] if rest else ""
        operands = one.operands
        if one.name.startswith("ld.param.v"):
            number, _, offset = re.search(r"_param_(\d+)(\+(\d+))?", operands[1]).group(1, 2, 3)  # type: ignore[union-attr]
            start, size = int(offset or 0), int(kind[1:]) // 8
            for register in re.findall(r"[^{},\s]+", operands[0]):
                found = int.from_bytes(self.params[int(number)][start : start + size], "little")
                self.store(register, np.full(self.size, found, np.uint64), mask)
                start += size
            return
        if one.name == "mov.b32" and "{" in operands[0] + operands[1]:
            self.move_halves(operands[0], operands[1], mask)
            return
        if name == "griddepcontrol" or (name == "bar" and rest[0] == "warp"):
            self.whole_warps(mask, one)
        elif name in ("ld", "st") and rest[0] != "param":
            self.move(name, rest, operands, mask)
        elif name == "ld":
            number, _, offset = re.search(r"_param_(\d+)(\+(\d+))?", operands[1]).group(1, 2, 3)  # type: ignore[union-attr]
            start, size = int(offset or 0), int(kind[1:]) // 8
            found = int.from_bytes(self.params[int(number)][start : start + size], "little", signed=kind[0] == "s")
            self.store(operands[0], np.full(self.size, found & (2**64 - 1), np.uint64), mask)
        elif name == "match":
            self.whole_warps(mask, one)
            lanes = self.value(operands[1], "u32").reshape(-1, 32)
            bits = np.uint64(1) << np.arange(32, dtype=np.uint64)
            masks = ((lanes[:, :, None] == lanes[:, None, :]) * bits).sum(-1).astype(np.uint64)
            self.store(operands[0], masks.reshape(-1), mask)
        elif name == "shfl":
            self.whole_warps(mask, one)
            target, _, flag = operands[0].partition("|")
            lanes, lane, by = self.value(operands[1], "u32"), self.threads % 32, int(operands[2])
            source = {"idx": lane * 0 + by, "up": lane - by, "bfly": lane ^ by}[rest[1]]
            inside = source >= 0
            self.store(target, lanes[self.threads - lane + np.where(inside, source, lane)], mask)
            if flag:
                self.store(flag, inside, mask)
        else:
            self.store(operands[0], self.result(name, rest, kind, operands[1:]), mask)

    def move(self, name: str, rest: list[str], operands: tuple[str, ...], mask: Mask) -> None:
        """Load or store one value or a vector of them."""
        size = int(rest[-1].lstrip("subf")) // 8
        registers = re.findall(r"[^{},\s]+", operands[0 if name == "ld" else 1])
        which, places = self.access(operands[1 if name == "ld" else 0], size * len(registers), mask)
        for index, register in enumerate(registers):
            loaded = np.zeros((self.size, 8), np.uint8)
            for number in np.unique(which[mask]):
                here, memory = mask & (which == number), self.memories[number]
                bytes_of = (places[:, None] + index * size + np.arange(size))[here]
                if name == "ld":
                    loaded[here, :size] = memory[bytes_of]
                else:
                    raw = np.ascontiguousarray(self.value(register, "u64")).view(np.uint8).reshape(self.size, 8)
                    memory[bytes_of] = raw[here, :size]
            if name == "ld":
                self.store(register, loaded.view(np.uint64)[:, 0], mask)

    def move_halves(self, target: str, source: str, mask: Mask) -> None:
        """Take a word apart into two halves, or make one of them."""
        if target.startswith("{"):
            word = self.value(source, "u32")
            for shift, register in zip((0, 16), re.findall(r"[^{},\s]+", target), strict=True):
                self.store(register, word >> np.uint64(shift) & np.uint64(0xFFFF), mask)
        else:
            low, high = (self.value(one, "u16") for one in re.findall(r"[^{},\s]+", source))
            self.store(target, low | high << np.uint64(16), mask)

    def result(self, name: str, rest: list[str], kind: str, sources: tuple[str, ...]) -> npt.NDArray[np.generic]:
        """Return what an arithmetic instruction gives."""
        if "f32" in rest:
            return self.float_result(name, rest, sources)
        if name in ("div", "rem") or "wide" in rest:
            a, b, *c = (self.value(one, kind).astype(np.int64) for one in sources)
            if "wide" in rest:
                added: npt.NDArray[np.generic] = a * b + (self.value(sources[2], "s64") if c else 0)
                return added
            quotient = np.where(b == 0, 0, np.abs(a) // np.maximum(np.abs(b), 1) * np.sign(a) * np.sign(b))
            return quotient if name == "div" else a - quotient * b
        if name == "setp":
            a, b = (self.value(one, kind) for one in sources)
            compared: npt.NDArray[np.generic] = getattr(np, COMPARE[rest[0]])(a, b)
            return compared
        if name in ("mov", "cvt"):
            return self.value(sources[0], "b64" if kind == "pred" else kind)
        if name == "popc":
            return np.bitwise_count(self.value(sources[0], "u32"))
        if name == "selp":
            return np.where(self.value(sources[2], "pred"), *(self.value(one, kind) for one in sources[:2]))
        values = [self.value(one, kind) for one in sources]
        if name in ("shl", "shr"):
            count = self.value(sources[1], "u32")
            return values[0] << count if name == "shl" else values[0] >> count.astype(values[0].dtype)
        if kind == "pred":
            values = [one.astype(np.uint64) for one in values]
        operations = {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul": lambda a, b: a * b,
            "mad": lambda a, b, c: a * b + c,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "not": lambda a: 1 - a if kind == "pred" else ~a,
            "neg": lambda a: -a,
        }
        found: npt.NDArray[np.generic] = operations[name](*values)
        return found

    def float_result(self, name: str, rest: list[str], sources: tuple[str, ...]) -> npt.NDArray[np.generic]:
        """Return what an instruction on fp32 values gives, or one that makes or takes them."""
        if name == "cvt":
            return self.converted(rest, sources)
        if name == "selp":
            return np.where(self.value(sources[2], "pred"), *(self.value(one, "f32") for one in sources[:2]))
        with np.errstate(all="ignore"):
            values = [self.value(one, "f32") for one in sources]
            if name == "setp":
                unordered = np.isnan(values[0]) | np.isnan(values[1])
                if rest[0] in ("nan", "num"):
                    return unordered if rest[0] == "nan" else ~unordered
                or_nan = rest[0].endswith("u")  # equ, neu, ltu, leu, gtu, geu
                compared = getattr(np, COMPARE[rest[0][:-1] if or_nan else rest[0]])(*values)
                return np.where(unordered, or_nan, compared)
            if name in ("mov", "abs", "neg"):
                bits = values[0].view(np.uint32)
                return {"mov": bits, "abs": bits & np.uint32(2**31 - 1), "neg": bits ^ np.uint32(2**31)}[name]
            if name in ("min", "max"):
                functions = (np.minimum, np.maximum) if "NaN" in rest else (np.fmin, np.fmax)
                larger: npt.NDArray[np.generic] = functions[name == "max"](*values)
                return larger
            a, *b = (one.astype(np.float64) for one in values)
            exact: npt.NDArray[np.float64] = {
                "add": lambda: a + b[0],
                "sub": lambda: a - b[0],
                "mul": lambda: a * b[0],
                "div": lambda: a / b[0],
                "fma": lambda: a * b[0] + b[1],
                "ex2": lambda: np.exp2(a),
                "rsqrt": lambda: 1.0 / np.sqrt(a),
                "rcp": lambda: 1.0 / a,
                "sqrt": lambda: np.sqrt(a),
            }[name]()
            rounded = exact.astype(np.float32)
            if "rm" in rest:  # towards minus infinity
                rounded = np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)
            return rounded

    def converted(self, rest: list[str], sources: tuple[str, ...]) -> npt.NDArray[np.generic]:
        """Return what a conversion from or to fp32 gives."""
        *how, target, source = rest
        if target == "f32":
            if source == "bf16":
                return self.value(sources[0], "u16") << np.uint64(16)
            numbers = self.value(sources[0], source)
            if "sat" in how:
                return np.clip(np.nan_to_num(numbers, nan=0.0), 0.0, 1.0).astype(np.float32)
            return numbers.astype(np.float32)
        values = [torch.from_numpy(self.value(one, "f32").copy()) for one in sources]
        if target.startswith("s"):
            assert "rni" in how, rest
            return values[0].double().round().long().numpy()
        if target == "e4m3x2":
            codes = [one.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8).numpy() for one in values]
            return codes[0].astype(np.uint64) << np.uint64(8) | codes[1]
        halves = [one.bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint64) for one in values]
        return halves[0] << np.uint64(16) | halves[1]
