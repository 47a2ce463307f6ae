"""bitorch_engine.utils.quant_operators and bitorch_engine.functions.cuda against numpy and formulas in float64."""

import numpy
import pytest
import torch


def operators():
    import bitorch_engine.utils.quant_operators as module

    return module


def packing():
    import bitorch_engine.functions.cuda as module

    return module


# ---- nv_tensor_quant


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_nv_tensor_quant_is_its_formula(num_bits, unsigned, narrow, device):
    x = torch.randn(7, 13, device=device) * 3
    x = x.abs() if unsigned else x
    outputs, scale = operators().nv_tensor_quant(x, num_bits=num_bits, unsigned=unsigned, narrow_range=narrow)
    bound = 2 ** (num_bits - 1 + unsigned) - 1
    lower = 0 if unsigned else -bound if narrow else -bound - 1
    expected_scale = bound / x.abs().max()
    assert torch.equal(scale, expected_scale) and scale.shape == ()
    assert torch.equal(outputs, torch.clamp(torch.round(x * expected_scale), lower, bound))
    assert outputs.abs().max() == bound


def test_nv_tensor_quant_takes_the_largest_absolute_value_so_negative_tensors_work():
    outputs, scale = operators().nv_tensor_quant(torch.tensor([-4.0, -2.0, -1.0, 1.0]))
    assert scale == 127 / 4 and outputs.tolist() == [-127, -64, -32, 32]


def test_nv_tensor_quant_of_zeros_is_zero_with_scale_one():
    outputs, scale = operators().nv_tensor_quant(torch.zeros(3, 4))
    assert torch.equal(outputs, torch.zeros(3, 4)) and scale == 1
    outputs, scale = operators().nv_tensor_quant(torch.ones(2, 3), amax=torch.tensor([[2.0**-24], [1.0]]))
    assert scale.flatten().tolist() == [1, 127] and outputs.tolist() == [[0, 0, 0], [127, 127, 127]]


def test_nv_tensor_quant_keeps_the_dtype_and_computes_in_float32():
    x = torch.randn(50).half()
    outputs, scale = operators().nv_tensor_quant(x)
    assert outputs.dtype == torch.half and scale.dtype == torch.float32
    assert torch.equal(outputs.float(), operators().nv_tensor_quant(x.float())[0])


def test_nv_tensor_quant_refuses_what_it_documents():
    with pytest.raises(ValueError, match="rank 1"):
        operators().nv_tensor_quant(torch.ones(2, 3), amax=torch.ones(3))
    with pytest.raises(ValueError, match="negative"):
        operators().nv_tensor_quant(torch.ones(2, 3), amax=torch.tensor([[-1.0]]))
    with pytest.raises(TypeError, match="unsigned"):
        operators().nv_tensor_quant(torch.tensor([-1.0]), unsigned=True)


# ---- q8, q4, bits


@pytest.mark.parametrize(
    "name, low, high, divisor", [("q8_quantization", -128, 127, 11.269), ("q4_quantization", -8, 7, 5.6345)]
)
def test_qn_quantization_is_its_formula_and_eps_has_a_default(name, low, high, divisor, device):
    function = getattr(operators(), name)
    x = torch.randn(9, 5, device=device, dtype=torch.bfloat16)
    q, scale = function(x)
    expected = 2 * x.float().abs().mean() / divisor
    assert torch.equal(scale, expected) and q.dtype == torch.float32
    assert torch.equal(q, (x.float() / expected).round().clamp(low, high))
    assert torch.equal(function(x, scale_a=expected), q)
    tiny, floor = function(torch.zeros(3, device=device), eps=0.5)
    assert floor == 0.5 and torch.equal(tiny, torch.zeros(3, device=device))


def test_qn_quantization_rounds_half_to_even():
    q = operators().q8_quantization(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), scale_a=torch.tensor(1.0))
    assert q.tolist() == [0, 2, 2, 0, -2]


def test_bit_set_example():
    assert operators().bit_set(0b0010, 2, 1) == 0b0110


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", ["tensor", "numpy", "list"])
def test_get_binary_row_packs_signs_low_bit_first(bits, kind):
    values = torch.randn(4 * bits)
    values[3] = 0.0
    words = {"tensor": torch.zeros(4, dtype=torch.int64), "numpy": numpy.zeros(4, numpy.uint64), "list": [0] * 4}[kind]
    result = operators().get_binary_row(values, words, 4 * bits, bits)
    assert result is words
    expected = numpy.packbits(values.numpy() >= 0, bitorder="little").view(f"<u{bits // 8}")
    assert [int(w) % 2**bits for w in result] == expected.tolist()


def test_get_binary_col_is_the_definition_bit_by_bit():
    n, k, w = 24, 5, 8
    values = torch.randn(n, k)
    words = operators().get_binary_col(values.flatten(), torch.zeros(n * k // w, dtype=torch.uint8), n, k, w)
    for y in range(n // w):
        for x in range(k):
            expected = sum(2**j for j in range(w) if values[y * w + j, x] >= 0)
            assert words[y * k + x] == expected
    with pytest.raises(ValueError, match="dim_n is 9"):
        operators().get_binary_col(values.flatten(), words, 9, 5, 8)


# ---- functions.cuda


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (2, 3, 20), (0, 16), (7, 4096)])
def test_tensor_to_packed_uint8_equals_packbits(dtype, shape, device):
    x = torch.randint(-3, 4, shape, device=device).to(dtype)
    packed = packing().tensor_to_packed_uint8(x)
    expected = numpy.packbits(x.float().cpu().numpy() >= 0, axis=-1, bitorder="little")
    assert packed.dtype == torch.uint8 and packed.device.type == device
    assert numpy.array_equal(packed.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpack_uint8_tensor_expands_exactly(dtype, device):
    # The original's custom case: bytes 0, 16, 35, 255 and a random scale a row, which fixes the order of bits.
    packed = torch.tensor([0, 16, 35, 255], dtype=torch.uint8, device=device).repeat(2, 16, 1)
    scale = torch.rand(2, 16, 1, device=device).to(dtype)
    unpacked = packing().unpack_uint8_tensor(packed, scale)
    bits = numpy.unpackbits(packed.cpu().numpy(), axis=-1, bitorder="little").astype(numpy.float32)
    assert unpacked.shape == (2, 16, 32) and unpacked.dtype == dtype
    assert torch.equal(unpacked.cpu(), torch.from_numpy(2 * bits - 1).to(dtype) * scale.cpu())
    flat = packing().unpack_uint8_tensor(packed[0, 0], scale[0, 0])
    assert torch.equal(flat, unpacked[0, 0])


def test_unpack_uint8_tensor_refuses_other_dtypes():
    with pytest.raises(ValueError, match="int32"):
        packing().unpack_uint8_tensor(torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1))
    with pytest.raises(ValueError, match="int64"):
        packing().unpack_uint8_tensor(torch.zeros(1, 1, 1, dtype=torch.uint8), torch.ones(1, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(10, 10), (3, 7), (2, 4, 6), (0, 4), (1, 1)])
@pytest.mark.parametrize("is_transpose", [False, True])
def test_q4_pack_unpack_round_trip(shape, is_transpose, device):
    x = torch.randint(-8, 8, shape, dtype=torch.int32, device=device)
    packed = packing().q4_pack_tensor(x, is_transpose)
    columns = shape[-2] if is_transpose else shape[-1]
    assert packed.dtype == torch.int8 and packed.shape[-1] == (columns + 1) // 2
    back = packing().q4_unpack_tensor(packed, is_transpose)
    back = back[..., : shape[-2], :] if is_transpose else back[..., : shape[-1]]
    assert torch.equal(back, x) and back.dtype == torch.int32
    raw = packing().q4_unpack_tensor(packed, is_transpose, signed=False)
    assert raw.numel() == 0 or raw.min() >= 0
    assert torch.equal(raw.remainder(16), packing().q4_unpack_tensor(packed, is_transpose).remainder(16))
    scaled = packing().q4_unpack_and_scaling_tensor(packed, torch.tensor(0.25, device=device), is_transpose)
    assert torch.equal(scaled, 0.25 * packing().q4_unpack_tensor(packed, is_transpose).float())


def test_q4_pack_puts_the_even_column_high_and_an_odd_tail_is_zero():
    packed = packing().q4_pack_tensor(torch.tensor([[1, 2, -1], [-8, 7, 5]], dtype=torch.int32))
    assert packed.view(torch.uint8).tolist() == [[0x12, 0xF0], [0x87, 0x50]]
    with pytest.raises(ValueError, match="float32"):
        packing().q4_pack_tensor(torch.ones(2, 2))


def test_q4_transpose_packs_the_transposed_matrix():
    x = torch.randint(-8, 8, (4, 6), dtype=torch.int32)
    assert torch.equal(packing().q4_pack_tensor(x, is_transpose=True), packing().q4_pack_tensor(x.t().contiguous()))


@pytest.mark.parametrize("shape", [(32, 32), (3, 5), (1, 1), (0, 4), (64, 512)])
def test_fp32toint4_codes_span_the_range(shape, device):
    x = torch.randn(shape, device=device)
    words, low, high = packing().fp32toint4(x, return_range=True)
    assert words.dtype == torch.int64 and words.shape == ((x.numel() + 15) // 16,)
    assert torch.equal(packing().fp32toint4(x), words)
    if x.numel():
        nibbles = words.cpu().numpy().view(numpy.uint8)
        codes = numpy.stack([nibbles % 16, nibbles // 16], axis=-1).reshape(-1)
        back = low.cpu() + torch.from_numpy(codes[: x.numel()].astype(numpy.float32)) * (high - low).cpu() / 15
        assert (back - x.cpu().flatten()).abs().max() <= (high - low).cpu() / 30 * 1.001
        assert not codes[x.numel() :].any()
