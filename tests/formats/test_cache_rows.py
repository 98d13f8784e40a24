# SPDX-License-Identifier: Apache-2.0
"""Cache rows: exact bytes of each format by hand, pages with any stride, round trips, and the refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.formats import fp8, mxfp4
from megamoe.formats.cache_rows import CachePool, RowFormat, decode_rows, encode_rows, page_bytes, row_bytes

FORMATS = [
    (RowFormat.FP8_ROPE_BF16, 512),
    (RowFormat.FP8_ROPE_BF16, 128),
    (RowFormat.BF16, 512),
    (RowFormat.BF16, 7),
    (RowFormat.FP32, 48),
    (RowFormat.FP32, 1),
    (RowFormat.INDEX_FP8, 128),
    (RowFormat.INDEX_FP8, 32),
    (RowFormat.INDEX_FP4, 128),
    (RowFormat.INDEX_FP4, 32),
]


def random_rows(seed, num_rows, width):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator) * 3


def write(pool, slots, rows):
    """Write rows to slots one byte run at a time, from the layout's definition and not through the pool's views."""
    data_bytes, scale_bytes = row_bytes(pool.row_format, pool.width)
    encoded = encode_rows(rows, pool.row_format)
    for i, slot in enumerate(slots):
        block, row = divmod(slot, pool.rows_per_block)
        pool.storage[block, row * data_bytes : (row + 1) * data_bytes] = encoded.data[i]
        start = pool.rows_per_block * data_bytes + row * scale_bytes
        pool.storage[block, start : start + scale_bytes] = encoded.scales[i]


def read(pool, slots):
    """Read slots through the pool's views."""
    slots = torch.tensor(slots)
    block, row = slots // pool.rows_per_block, slots % pool.rows_per_block
    return decode_rows(pool.data_rows[block, row], pool.scale_rows[block, row], pool.row_format, pool.width)


# Known answers


@pytest.mark.parametrize(
    ("row_format", "width", "expected"),
    [
        (RowFormat.FP8_ROPE_BF16, 512, (576, 8)), (RowFormat.FP8_ROPE_BF16, 128, (192, 2)),
        (RowFormat.BF16, 512, (1024, 0)), (RowFormat.FP32, 2048, (8192, 0)),
        (RowFormat.INDEX_FP8, 128, (128, 4)), (RowFormat.INDEX_FP4, 128, (64, 4)),
    ],
)  # fmt: skip
def test_bytes_per_row(row_format, width, expected):
    assert row_bytes(row_format, width) == expected
    assert page_bytes(row_format, 3, width) == 3 * sum(expected)


def test_known_page_sizes():
    assert page_bytes(RowFormat.FP8_ROPE_BF16, 1, 512) == 584
    assert page_bytes(RowFormat.INDEX_FP8, 1, 128) == 132
    assert page_bytes(RowFormat.INDEX_FP4, 1, 128) == 68
    assert page_bytes(RowFormat.FP8_ROPE_BF16, 64, 512) == 37_376
    assert page_bytes(RowFormat.FP8_ROPE_BF16, 2, 512) == 1_168
    assert page_bytes(RowFormat.INDEX_FP8, 64, 128) == 8_448


def test_kv_row_by_hand():
    x = torch.zeros(1, 512)
    x[0, 0], x[0, 1] = 448.0, -1.0  # group 0: scale 2^0
    x[0, 64] = 1.0  # group 1: scale 2^-8, code 256
    x[0, 447] = -896.0  # group 6: scale 2^1, code -448
    x[0, 448], x[0, 511] = 1.0, 1.00390625  # rotary: 0x3F80; 1 + 2^-8 is a tie, to even: 0x3F80
    x[0, 449] = -3.0  # 0xC040
    data, scales = encode_rows(x, RowFormat.FP8_ROPE_BF16)
    assert data.shape == (1, 576) and scales.tolist() == [[127, 119, 105, 105, 105, 105, 128, 0]]
    expected = {0: 0x7E, 1: 0xB8, 64: 0x78, 447: 0xFE, 448: 0x80, 449: 0x3F, 450: 0x40, 451: 0xC0, 574: 0x80, 575: 0x3F}
    assert {i: byte for i, byte in enumerate(data[0].tolist()) if byte} == expected
    decoded = decode_rows(data, scales, RowFormat.FP8_ROPE_BF16, 512)
    x[0, 511] = 1.0
    assert torch.equal(decoded, x)


def test_latent_rows_saturate_at_what_fp16_holds():
    """57344 = 448 * 2^7 in both parts; one step more would need the scale 2^8, or be a bf16 number beyond fp16."""
    for value in (57344.0, 57345.0, 65505.0, 1e30, float(torch.finfo(torch.float32).max)):
        for sign in (1.0, -1.0):
            x = torch.zeros(1, 512)
            x[0, 3], x[0, 64], x[0, 500], x[0, 501] = sign * value, 1.0, sign * value, 2.0
            data, scales = encode_rows(x, RowFormat.FP8_ROPE_BF16)
            assert scales.tolist() == [[134, 119, 105, 105, 105, 105, 105, 0]]
            decoded = decode_rows(data, scales, RowFormat.FP8_ROPE_BF16, 512)
            assert decoded[0, [3, 64, 500, 501]].tolist() == [sign * 57344.0, 1.0, sign * 57344.0, 2.0]
            assert torch.equal(decoded.half().float(), decoded)
    for value in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="x must be finite"):
            encode_rows(torch.full((1, 512), value), RowFormat.FP8_ROPE_BF16)


def test_every_value_of_a_latent_row_is_an_fp16_number():
    """All codes with all scales: exact from 2^-15 to 2^7, within 2^-25 below that, too large from 2^8 on."""
    codes = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).double()
    for exponent in range(-22, 9):  # encode_rows makes -22 .. 7
        exact = values * 2.0**exponent
        error = (exact.to(torch.float16).double() - exact).abs()
        if exponent > 7:
            assert bool(error.isinf().any())
        else:
            assert float(error.max()) == 0.0 if exponent >= -15 else float(error.max()) <= 2.0**-25
    rotary = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).double()
    rotary = rotary[rotary.abs() <= 57344.0]
    error = (rotary.to(torch.float16).double() - rotary).abs()
    assert float(error[rotary.abs() >= 2.0**-17].max()) == 0.0 and float(error.max()) <= 2.0**-25


def test_index_fp8_row_by_hand():
    x = torch.zeros(1, 128)
    x[0, 5], x[0, 6] = -1792.0, 4.0  # scale 4, codes -448 and 1
    data, scales = encode_rows(x, RowFormat.INDEX_FP8)
    assert {i: byte for i, byte in enumerate(data[0].tolist()) if byte} == {5: 0xFE, 6: 0x38}
    assert scales.tolist() == [[0x00, 0x00, 0x80, 0x40]]  # 4.0, little-endian
    assert torch.equal(decode_rows(data, scales, RowFormat.INDEX_FP8, 128), x)


def test_index_fp4_row_by_hand():
    x = torch.zeros(1, 128)
    x[0, 0], x[0, 1] = 6.0, -0.5  # group 0: scale 1, codes 7 and 9, the even column low
    x[0, 64], x[0, 67] = 1.0, 0.25  # group 2: scale 2^-2, codes of 4 and 1
    x[0, 127] = -0.0
    data, scales = encode_rows(x, RowFormat.INDEX_FP4)
    assert {i: byte for i, byte in enumerate(data[0].tolist()) if byte} == {0: 0x97, 32: 0x06, 33: 0x20, 63: 0x80}
    assert scales.tolist() == [[127, 1, 125, 1]]  # groups of zeros take the floor, 2^-126
    assert torch.equal(decode_rows(data, scales, RowFormat.INDEX_FP4, 128), x)


def test_plain_rows_by_hand():
    data, scales = encode_rows(torch.tensor([[1.0, -2.0]]), RowFormat.BF16)
    assert data.tolist() == [[0x80, 0x3F, 0x00, 0xC0]] and scales.shape == (1, 0)
    data, scales = encode_rows(torch.tensor([[1.0, -torch.inf]]), RowFormat.FP32)
    assert data.tolist() == [[0, 0, 0x80, 0x3F, 0, 0, 0x80, 0xFF]] and scales.shape == (1, 0)


def test_page_layout_by_hand():
    """Two pages of two rows: data of both rows, then scales of both rows."""
    pool = CachePool.allocate(2, 2, RowFormat.FP8_ROPE_BF16, 512)
    assert pool.storage.shape == (2, 1168) and pool.num_slots == 4 and pool.num_blocks == 2
    row = torch.full((1, 512), 448.0)
    data, scales = encode_rows(row, RowFormat.FP8_ROPE_BF16)
    pool.data_rows[1, 1] = data[0]
    pool.scale_rows[1, 1] = scales[0]
    page = pool.storage[1]
    assert page[576:1152].tolist() == [0x7E] * 448 + [0xE0, 0x43] * 64
    assert page[1160:1168].tolist() == [127] * 7 + [0]
    assert int(page[:576].sum()) == int(page[1152:1160].sum()) == int(pool.storage[0].sum()) == 0


# Properties


@pytest.mark.parametrize(("row_format", "width"), FORMATS)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 65])
def test_rows_mean_what_their_format_says(row_format, width, num_rows, seed):
    x = random_rows(seed, num_rows, width)
    decoded = decode_rows(*encode_rows(x, row_format), row_format, width)
    if row_format is RowFormat.FP32:
        expected = x
    elif row_format is RowFormat.BF16:
        expected = x.bfloat16().float()
    elif row_format is RowFormat.INDEX_FP4:
        expected = mxfp4.dequantize(mxfp4.quantize(x))
    elif row_format is RowFormat.INDEX_FP8:
        expected = fp8.dequantize(fp8.quantize_rows(x, group=width))
    else:
        latent = fp8.dequantize(fp8.quantize_rows(x[:, :-64], group=64))
        expected = torch.cat((latent, x[:, -64:].bfloat16().float()), 1)
    assert decoded.dtype == torch.float32 and torch.equal(decoded, expected)
    assert torch.equal(decode_rows(*encode_rows(decoded, row_format), row_format, width), decoded)


@pytest.mark.parametrize(("row_format", "width"), FORMATS)
def test_bf16_input_equals_fp32_input(row_format, width, seed):
    x = random_rows(seed, 3, width).bfloat16()
    for a, b in zip(encode_rows(x, row_format), encode_rows(x.float(), row_format), strict=True):
        assert torch.equal(a, b)


def test_the_index_fp8_scale_is_a_power_of_two(seed):
    _, scales = encode_rows(random_rows(seed, 50, 128), RowFormat.INDEX_FP8)
    mantissa, _ = torch.frexp(scales.view(torch.float32))
    assert bool((mantissa == 0.5).all())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(FORMATS),
    num_blocks=st.integers(1, 4),
    rows_per_block=st.sampled_from([1, 2, 3, 64]),
    gap=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_pages_inside_larger_blocks(case, num_blocks, rows_per_block, gap, seed):
    """Whatever the block stride, rows come back from their slots and no byte between the pages changes."""
    row_format, width = case
    size = page_bytes(row_format, rows_per_block, width)
    start = 4 * gap
    stride = -(-(start + size + gap) // 4) * 4
    block = torch.full((num_blocks, stride), 0xA5, dtype=torch.uint8)
    pool = CachePool(block[:, start : start + size], rows_per_block, row_format, width)
    assert pool.block_stride_bytes == stride and pool.page_bytes == size
    slots = torch.randperm(pool.num_slots, generator=torch.Generator().manual_seed(seed)).tolist()
    x = random_rows(seed, len(slots), width)
    write(pool, slots, x)
    assert torch.equal(read(pool, slots), decode_rows(*encode_rows(x, row_format), row_format, width))
    guard = block.clone()
    guard[:, start : start + size] = 0xA5
    assert bool((guard == 0xA5).all())
    # The views write where the definition writes.
    other = CachePool(torch.zeros_like(block)[:, start : start + size], rows_per_block, row_format, width)
    index = torch.tensor(slots)
    at = (index // rows_per_block, index % rows_per_block)
    encoded = encode_rows(x, row_format)
    other.data_rows[at] = encoded.data
    other.scale_rows[at] = encoded.scales
    assert torch.equal(other.storage, pool.storage)


@pytest.mark.parametrize(
    ("rows_per_block", "row_format", "width", "stride"),
    [(64, RowFormat.FP8_ROPE_BF16, 512, 37_440), (2, RowFormat.FP8_ROPE_BF16, 512, 1_728),
     (64, RowFormat.INDEX_FP8, 128, 8_640)],
)  # fmt: skip
def test_padded_strides_of_other_engines(rows_per_block, row_format, width, stride, seed):
    pool = CachePool.allocate(3, rows_per_block, row_format, width, block_stride_bytes=stride)
    assert pool.storage.stride() == (stride, 1) and pool.device == torch.device("cpu")
    x = random_rows(seed, 3, width)
    slots = [0, rows_per_block, 3 * rows_per_block - 1]
    write(pool, slots, x)
    assert torch.equal(read(pool, slots), decode_rows(*encode_rows(x, row_format), row_format, width))


def test_default_stride_is_a_multiple_of_16():
    pool = CachePool.allocate(2, 1, RowFormat.INDEX_FP4, 128)
    assert pool.page_bytes == 68 and pool.block_stride_bytes == 80
    assert CachePool.allocate(0, 4, RowFormat.BF16, 8).num_slots == 0


@pytest.mark.parametrize(("row_format", "width"), FORMATS)
def test_bytes_at_any_address_decode(row_format, width, seed):
    x = random_rows(seed, 2, width)
    data, scales = encode_rows(x, row_format)
    expected = decode_rows(data, scales, row_format, width)

    def move(part):
        buffer = torch.zeros(part.shape[0], part.shape[1] + 3, dtype=torch.uint8)
        buffer[:, 1 : 1 + part.shape[1]] = part
        return buffer[:, 1 : 1 + part.shape[1]]

    for num_rows in (1, 2):
        moved = decode_rows(move(data)[:num_rows], move(scales)[:num_rows], row_format, width)
        assert torch.equal(moved, expected[:num_rows])


def test_unwritten_rows_read_as_zero():
    for row_format, width in FORMATS:
        pool = CachePool.allocate(1, 2, row_format, width)
        assert torch.equal(read(pool, [0, 1]), torch.zeros(2, width))


@pytest.mark.parametrize("fault", ["scales before data", "interleaved", "stride is the page", "scale of the next row"])
def test_the_check_catches(fault, seed):
    """A reader with the fault gets other rows than were written."""
    pool = CachePool.allocate(2, 2, RowFormat.FP8_ROPE_BF16, 512, block_stride_bytes=1728)
    x = random_rows(seed, 4, 512) * torch.tensor([[1.0], [100.0], [10_000.0], [0.01]])
    write(pool, [0, 1, 2, 3], x)
    correct = read(pool, [0, 1, 2, 3])
    data, scales = pool.data_rows.reshape(4, 576), pool.scale_rows.reshape(4, 8)
    if fault == "scales before data":
        page = pool.storage
        data, scales = page[:, 16:].reshape(4, 576), page[:, :16].reshape(4, 8)
    elif fault == "interleaved":
        rows = pool.storage.reshape(4, 584)
        data, scales = rows[:, :576], rows[:, 576:]
    elif fault == "stride is the page":
        flat = torch.as_strided(pool.storage, (2, 1168), (1168, 1))
        data, scales = flat[:, :1152].reshape(4, 576), flat[:, 1152:].reshape(4, 8)
    else:
        scales = scales.roll(1, 0)
    data = torch.where(data & 0x7F == 0x7F, 0, data)  # a NaN byte would be refused before the values could differ
    scales = scales.clamp(max=254)
    assert not torch.equal(decode_rows(data, scales, RowFormat.FP8_ROPE_BF16, 512), correct)


# Refusals


@pytest.mark.parametrize(
    ("row_format", "width", "message"),
    [
        (RowFormat.FP8_ROPE_BF16, 64, "FP8_ROPE_BF16: width must be a multiple of 64 and at least 128"),
        (RowFormat.FP8_ROPE_BF16, 500, "FP8_ROPE_BF16: width must be a multiple of 64"),
        (RowFormat.INDEX_FP4, 48, "INDEX_FP4: width must be a multiple of 32; got 48"),
        (RowFormat.BF16, 0, "BF16: width must be positive"),
    ],
)
def test_widths_are_refused(row_format, width, message):
    for function in (
        lambda: row_bytes(row_format, width),
        lambda: CachePool.allocate(1, 1, row_format, width),
        lambda: encode_rows(torch.zeros(1, width), row_format),
    ):
        with pytest.raises(ValueError, match=message):
            function()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 100, 127])
@pytest.mark.parametrize("row_format", [RowFormat.FP8_ROPE_BF16, RowFormat.INDEX_FP8, RowFormat.INDEX_FP4])
def test_non_finite_values_are_refused(value, column, row_format):
    x = torch.zeros(2, 128)
    x[1, column] = value
    with pytest.raises(ValueError, match="encode_rows: x must be finite"):
        encode_rows(x, row_format)


def test_damaged_rows_are_refused():
    x = torch.ones(2, 128)
    for row_format in (RowFormat.FP8_ROPE_BF16, RowFormat.INDEX_FP8):
        data, scales = encode_rows(x, row_format)
        data[1, 3] = 0xFF
        with pytest.raises(ValueError, match="codes must not be NaN"):
            decode_rows(data, scales, row_format, 128)
    for row_format in (RowFormat.FP8_ROPE_BF16, RowFormat.INDEX_FP4):
        data, scales = encode_rows(x, row_format)
        scales[1, 0] = 255
        with pytest.raises(ValueError, match="scales must not be NaN; got byte 255"):
            decode_rows(data, scales, row_format, 128)
    for value in (torch.nan, torch.inf, -1.0):
        data, scales = encode_rows(x, RowFormat.INDEX_FP8)
        scales.view(torch.float32)[1] = value
        with pytest.raises(ValueError, match="INDEX_FP8 scales must be finite and not negative"):
            decode_rows(data, scales, RowFormat.INDEX_FP8, 128)


def test_shapes_and_dtypes_of_rows_are_refused():
    with pytest.raises(ValueError, match=r"encode_rows: x must be \[T, width\]; got \[128\]"):
        encode_rows(torch.zeros(128), RowFormat.BF16)
    with pytest.raises(TypeError, match="encode_rows: x must be fp32, bf16 or fp16"):
        encode_rows(torch.zeros(1, 128, dtype=torch.float64), RowFormat.FP32)
    data, scales = encode_rows(torch.zeros(2, 128), RowFormat.INDEX_FP8)
    with pytest.raises(TypeError, match="decode_rows: data, scales must be uint8"):
        decode_rows(data.view(torch.int8), scales, RowFormat.INDEX_FP8, 128)
    for bad in ((data[0], scales), (data[:, :64], scales), (data, scales[:1]), (data, scales[:, :2])):
        with pytest.raises(ValueError, match=r"INDEX_FP8 rows of 128 values are data \[T, 128\] and scales \[T, 4\]"):
            decode_rows(*bad, RowFormat.INDEX_FP8, 128)


def test_pools_that_do_not_fit_are_refused():
    storage = torch.zeros(2, 1168, dtype=torch.uint8)
    kv = (2, RowFormat.FP8_ROPE_BF16, 512)
    CachePool(storage, *kv)
    with pytest.raises(TypeError, match="CachePool: storage must be uint8; got torch.int8"):
        CachePool(storage.view(torch.int8), *kv)
    with pytest.raises(ValueError, match=r"storage must be \[num_blocks, 1168\].*got \[2, 1160\]"):
        CachePool(storage[:, 8:], *kv)
    with pytest.raises(ValueError, match=r"storage must be \[num_blocks, 1168\]"):
        CachePool(storage[0], *kv)
    with pytest.raises(ValueError, match=r"strides must be \(block stride >= 1168, 1\); got \(1168, 2\)"):
        CachePool(torch.as_strided(torch.zeros(4000, dtype=torch.uint8), (2, 1168), (1168, 2)), *kv)
    with pytest.raises(ValueError, match=r"strides must be .*got \(1000, 1\)"):
        CachePool(torch.as_strided(torch.zeros(4000, dtype=torch.uint8), (2, 1168), (1000, 1)), *kv)
    with pytest.raises(ValueError, match="must start at multiples of 2 bytes; got block stride 1169"):
        CachePool(torch.zeros(2, 1169, dtype=torch.uint8)[:, :1168], *kv)
    with pytest.raises(ValueError, match="must start at multiples of 4 bytes; got block stride 136, offset 2"):
        CachePool(torch.zeros(2, 136, dtype=torch.uint8)[:, 2:134], 1, RowFormat.INDEX_FP8, 128)
    with pytest.raises(ValueError, match="rows_per_block must be positive; got 0"):
        CachePool(storage, 0, *kv[1:])
    with pytest.raises(ValueError, match="block_stride_bytes must be at least the page's 1168 bytes; got 1024"):
        CachePool.allocate(2, *kv, block_stride_bytes=1024)
