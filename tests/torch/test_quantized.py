"""quantized_matmul, quantized_linear, quantized_conv2d against float64 transcriptions of their formulas.

The names test_X1 ... test_Q11 are the defects of the original layers that the tests hold down; docs/porting.md lists them.
"""

import math
import os

import pytest
import torch
import torch.nn.functional as F

LIBRARY = os.environ.get("SUBBYTE_TORCH_LIB")
if not LIBRARY:
    pytest.skip("SUBBYTE_TORCH_LIB does not name libsubbyte_torch.so", allow_module_level=True)
torch.ops.load_library(LIBRARY)
ops = torch.ops.subbyte


def _has_cuda():
    import ctypes

    return torch.cuda.is_available() and bool(ctypes.CDLL(LIBRARY).subbyte_torch_has_cuda())


DEVICES = ["cpu", pytest.param("cuda", marks=[] if _has_cuda() else pytest.mark.skip(reason="no CUDA device or kernels"))]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-24}


@pytest.fixture(autouse=True)
def exact_gradient_convolutions():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def draw(*shape, dtype=torch.float32, device="cpu", seed=1, grad=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(device).requires_grad_(grad)


def scalar(v, device="cpu", dtype=torch.float32, grad=False):
    return torch.tensor(v, dtype=dtype, device=device).requires_grad_(grad)


# ---- the formulas, in float64; u alone is float32, as the definition says


def bounds(bits):
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def ratio(v, step, eps=1e-5):
    s = step.detach().float().clamp_min(eps)
    return v.detach().float() / s, s.double()


def integers(v, step, bits):
    lo, hi = bounds(bits)
    return ratio(v, step)[0].round().clamp(lo, hi).double()


def on_step(v, step, bits):
    return integers(v, step, bits) * ratio(v, step)[1]


def lsq(v, step, g, bits, mask=True):
    """Gradients to v and step from the unmasked gradient g of the quantized value."""
    lo, hi = bounds(bits)
    u = ratio(v, step)[0]
    inside = (u >= lo) & (u <= hi)
    d = torch.where(u < lo, float(lo), torch.where(u > hi, float(hi), (u.round() - u).double()))
    return torch.where(inside, g, 0.0) if mask else g, (d * g).sum() / math.sqrt(max(v.numel(), 1) * hi)


def close(got, want, dtype, scale=None):
    """got, rounded to dtype, within rounding of want: a few units of the dtype, and of float32 sums of `scale`."""
    assert got.dtype == dtype and got.shape == want.shape
    if want.numel() == 0:
        return
    scale = want.abs().max() if scale is None else scale
    assert ((got.double() - want).abs() <= 2 * EPS[dtype] * want.abs() + 3e-5 * scale * 2**-3 + 1e-6).all()


def equal_product(got, sums, sx, sw, bias, dtype):
    """The integer product's promise: exact sum, (sum sx) sw + bias in float32, one rounding to dtype."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    y = sums.to(kind) * sx.to(kind) * sw.to(kind)
    y = y if bias is None else y + bias.to(kind)
    assert torch.equal(got, y.to(dtype))


# ---- quantized_matmul: section 7.3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "x_shape, z_shape, bits",
    [
        ((3, 5, 7), (3, 4, 7), 4),
        ((2, 3, 5, 33), (2, 3, 9, 33), 4),
        ((5, 65), (2, 4, 65), 8),
        ((2, 1, 3, 16), (3, 4, 16), 2),
        ((0, 5, 7), (0, 4, 7), 4),
        ((2, 0, 7), (2, 4, 7), 4),
        ((2, 5, 0), (2, 4, 0), 3),
    ],
)
def test_Q1_Q2_matmul_and_its_four_gradients(device, dtype, x_shape, z_shape, bits):
    x, z = (draw(*s, dtype=dtype, device=device, seed=i, grad=True) for i, s in enumerate((x_shape, z_shape)))
    sx, sz = scalar(0.31, device, grad=True), scalar(0.17, device, grad=True)
    y = ops.quantized_matmul(x, z, sx, sz, bits)
    qx, qz = integers(x, sx, bits), integers(z, sz, bits)
    equal_product(y, qx @ qz.mT, sx.detach(), sz.detach(), None, dtype)
    gy = draw(*y.shape, dtype=dtype, device=device, seed=5)
    y.backward(gy)
    g = gy.double()
    gx, gsx = lsq(x, sx, (g @ on_step(z, sz, bits)).sum_to_size(x.shape), bits)
    gz, gsz = lsq(z, sz, (g.mT @ on_step(x, sx, bits)).sum_to_size(z.shape), bits)
    close(x.grad, gx, dtype)
    close(z.grad, gz, dtype)
    for got, want in ((sx.grad, gsx), (sz.grad, gsz)):
        assert got.shape == () and got.dtype == torch.float32
        assert abs(got.item() - want.item()) <= 2e-4 * max(1, abs(want.item()))


@pytest.mark.parametrize("device", DEVICES)
def test_X1_X2_clip_boundaries_and_ties_elementwise(device):
    """Step 1/2, so that u is exact: the ends of the range, a hair beyond them, halves between integers."""
    u = torch.tensor([-9.0, -8.5, -8.25, -8.0, -7.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.0, 7.25, 7.5, 8.0, 0.0, 3.25], device=device)
    x = (u / 2).reshape(1, -1).requires_grad_()
    step, one = scalar(0.5, device, grad=True), scalar(1.0, device)
    z = torch.eye(16, device=device)
    y = ops.quantized_matmul(x, z, step, one, 4)
    want_q = torch.tensor([-8, -8, -8, -8, -8, 0, 0, 2, 2, 6, 7, 7, 7, 7, 0, 3.0], device=device)  # half to even
    assert torch.equal(y[0], want_q / 2)
    gy = torch.arange(1.0, 17.0, device=device).reshape(1, -1)
    y.backward(gy)
    inside = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1.0], device=device)
    assert torch.equal(x.grad, inside * gy)
    d = torch.tensor([-8, -8, -8, 0, -0.5, 0.5, -0.5, 0.5, -0.5, -0.5, 0, 7, 7, 7, 0, -0.25], device=device)
    want = (d * gy[0]).sum() / math.sqrt(16 * 7)
    assert abs(step.grad.item() - want.item()) < 1e-4 * abs(want.item())
    masked = (d * inside * gy[0]).sum() / math.sqrt(16 * 7)  # the original's: without the ends
    assert abs(step.grad.item() - masked.item()) > 1


@pytest.mark.parametrize("device", DEVICES)
def test_X3_one_step_in_value_and_gradient_when_it_is_below_eps(device):
    x, z = draw(3, 8, device=device, grad=True), draw(4, 8, device=device, seed=2)
    results = []
    for value in (-3.0, 0.0, 0.25):
        x.grad = None
        step = scalar(value, device, grad=True)
        y = ops.quantized_matmul(x, z, step, scalar(0.3, device), 4, 0.25)
        y.sum().backward()
        results.append((y.detach(), x.grad, step.grad))
    for other in results[:2]:
        for a, b in zip(other, results[2]):
            assert torch.equal(a, b)


def test_X6_steps_of_any_shape_of_one_number_get_gradients_of_that_shape():
    x, z = draw(3, 8), draw(4, 8, seed=2)
    for shape in ((), (1,), (1, 1)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            sx, sz = (torch.full(shape, 0.25, dtype=dtype, requires_grad=True) for _ in range(2))
            ops.quantized_matmul(x, z, sx, sz).sum().backward()
            assert sx.grad.shape == shape and sx.grad.dtype == dtype and sz.grad.shape == shape


@pytest.mark.parametrize("device", DEVICES)
def test_Q4_scales_come_before_the_narrow_type(device):
    k = 4096
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.full((1, k), 0.07, dtype=dtype, device=device)
        y = ops.quantized_matmul(x, x, scalar(0.01, device), scalar(0.01, device))
        assert y.item() == (torch.tensor(49.0 * k) * 0.01 * 0.01).to(dtype).item()
        y = ops.quantized_linear(x, x, None, scalar(0.01, device), scalar(0.01, device))
        assert y.item() == (torch.tensor(49.0 * k) * 0.01 * 0.01).to(dtype).item()


@pytest.mark.parametrize("device", DEVICES)
def test_X5_X9_views_and_streams(device):
    x, z = draw(2, 6, 5, 8, device=device), draw(2, 6, 8, 4, device=device, seed=3)
    sx, sz = scalar(0.3, device), scalar(0.2, device)
    views = [(x.transpose(1, 2), z.permute(0, 2, 3, 1)[:, :, :, :1].expand(2, 8, 4, 8)[:, :5])]
    views += [(x[:, ::2, ::2], z.mT[:, ::2]), (x[..., :4], z.transpose(-1, -2)[..., :4]), (x[:1].expand(2, 6, 5, 8), z.mT)]
    for a, b in views:
        got = ops.quantized_matmul(a, b, sx, sz)
        assert torch.equal(got, ops.quantized_matmul(a.contiguous(), b.contiguous(), sx, sz))
    for v in (x.transpose(1, 3), x[..., ::2].expand(2, 6, 5, 4).transpose(-1, -2)[..., :4], x[:, :, 0]):
        m = draw(3, v.shape[-1], device=device)
        assert torch.equal(ops.quantized_linear(v, m, None, sx, sz), ops.quantized_linear(v.contiguous(), m, None, sx, sz))
    w = draw(8, 5, device=device, seed=4).t()
    assert torch.equal(ops.quantized_linear(x, w, None, sx, sz), ops.quantized_linear(x, w.contiguous(), None, sx, sz))


# ---- quantized_linear: sections 7.2 and 7.4


def codes_of(w, step, bits):
    q = integers(w.flatten(1), step, bits) + 2 ** (bits - 1)
    return ops.pack(q.to(torch.uint8), f"uint{bits}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8, 3])
@pytest.mark.parametrize("shape, n", [((7, 33), 5), ((2, 3, 16), 9), ((64,), 3), ((0, 16), 4), ((2, 0, 9), 4)])
def test_Q8_Q9_Q11_linear_and_all_gradients(device, dtype, bits, shape, n):
    k = shape[-1]
    x = draw(*shape, dtype=dtype, device=device, grad=True)
    w = draw(n, k, device=device, seed=2, grad=True)  # a float32 master under any type of x
    shift = draw(k, dtype=dtype, device=device, seed=3, grad=True)
    bias = draw(n, dtype=dtype, device=device, seed=4, grad=True)
    # For 8 bits large enough steps are tiny, so that some values saturate at any width.
    sx, sw = (scalar(1.1 / (2 ** (bits - 1)), device, grad=True) for _ in range(2))
    y = ops.quantized_linear(x, w, None, sx, sw, shift, bias, bits)
    moved = (x + shift).detach()
    equal_product(y, integers(moved, sx, bits) @ integers(w, sw, bits).t(), sx.detach(), sw.detach(), bias.detach(), dtype)
    packed = ops.quantized_linear(x, None, codes_of(w, sw, bits), sx, sw, shift, bias, bits)
    assert torch.equal(packed, y)
    gy = draw(*y.shape, dtype=dtype, device=device, seed=5)
    y.backward(gy)
    g = gy.double().reshape(-1, n)
    gx, gsx = lsq(moved.reshape(-1, k), sx, g @ on_step(w, sw, bits), bits)
    gw, gsw = lsq(w, sw, g.t() @ on_step(moved.reshape(-1, k), sx, bits), bits)
    close(x.grad, gx.reshape(shape), dtype)
    close(shift.grad, gx.sum(0), dtype)
    close(bias.grad, g.sum(0), dtype)
    close(w.grad, gw, torch.float32)
    for got, want in ((sx.grad, gsx), (sw.grad, gsw)):
        assert got.shape == () and abs(got.item() - want.item()) <= 2e-4 * max(1, abs(want.item()))


@pytest.mark.parametrize("device", DEVICES)
def test_Q9_unclipped_weight_gradient_is_an_option(device):
    x, w = draw(6, 8, device=device), draw(3, 8, device=device, seed=2, grad=True)
    sx, sw = scalar(0.3, device), scalar(0.1, device)
    plain = draw(6, 3, device=device, seed=5).double().t() @ on_step(x, sx, 4)
    inside = (w.detach() / 0.1 >= -8) & (w.detach() / 0.1 <= 7)
    assert (~inside).any()
    for clip in (True, False):
        w.grad = None
        ops.quantized_linear(x, w, None, sx, sw, None, None, 4, 1e-5, clip).backward(draw(6, 3, device=device, seed=5))
        assert torch.allclose(w.grad.double(), torch.where(inside, plain, 0.0) if clip else plain, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_X11_gradients_flow_through_packed_weights(device):
    """An adapter below a deployed layer: x, shift, bias and both steps."""
    x, w = draw(6, 9, device=device, grad=True), draw(4, 9, device=device, seed=2)
    sx, sw = scalar(0.3, device, grad=True), scalar(0.1, device, grad=True)
    gy = draw(6, 4, device=device, seed=5)
    ops.quantized_linear(x, None, codes_of(w, sw, 4), sx, sw).backward(gy)
    gx, gsx = lsq(x, sx, gy.double() @ on_step(w, sw, 4), 4)
    close(x.grad, gx, torch.float32)
    assert abs(sx.grad.item() - gsx.item()) < 1e-4 * max(1, abs(gsx.item()))
    want = ((gy.double().t() @ on_step(x, sx, 4)) * integers(w, sw, 4)).sum()
    assert abs(sw.grad.item() - want.item()) < 1e-4 * max(1, abs(want.item()))


# ---- quantized_conv2d: section 10


CONVS = [
    # x, weight, stride, padding, dilation, groups
    ((2, 4, 7, 9), (6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 6, 8, 7), (4, 3, 3, 2), (2, 1), (0, 2), (1, 2), 2),
    ((1, 5, 6, 6), (5, 1, 3, 3), (1, 2), (2, 1), (2, 1), 5),
    ((3, 3, 5, 4), (2, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((0, 4, 5, 5), (2, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("x_shape, w_shape, stride, padding, dilation, groups", CONVS)
def test_C2_conv2d_is_a_convolution_and_all_gradients(
    device, dtype, channels_last, x_shape, w_shape, stride, padding, dilation, groups
):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = draw(*x_shape, dtype=dtype, device=device).to(memory_format=layout).requires_grad_()
    w = draw(*w_shape, device=device, seed=2, grad=True)
    shift = draw(x_shape[1], dtype=dtype, device=device, seed=3, grad=True)
    bias = draw(w_shape[0], dtype=dtype, device=device, seed=4, grad=True)
    sx, sw = scalar(0.2, device, grad=True), scalar(0.15, device, grad=True)
    rest = (list(w_shape[2:]), list(stride), list(padding), list(dilation), groups, 4)
    y = ops.quantized_conv2d(x, w, None, sx, sw, shift, bias, *rest)
    moved = (x + shift[:, None, None]).detach()
    conv = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    sums = F.conv2d(integers(moved, sx, 4), integers(w, sw, 4), **conv).round()
    equal_product(y, sums, sx.detach(), sw.detach(), bias.detach()[:, None, None], dtype)
    assert y.is_contiguous(memory_format=layout) or y.numel() == 0
    assert torch.equal(ops.quantized_conv2d(x, None, codes_of(w, sw, 4), sx, sw, shift, bias, *rest), y)
    gy = draw(*y.shape, dtype=dtype, device=device, seed=5)
    y.backward(gy)
    x64, w64 = on_step(moved, sx, 4).requires_grad_(), on_step(w, sw, 4).requires_grad_()
    F.conv2d(x64, w64, **conv).backward(gy.double())
    gx, gsx = lsq(moved, sx, x64.grad, 4)
    gw, gsw = lsq(w, sw, w64.grad, 4)
    close(x.grad, gx, dtype)
    close(w.grad, gw, torch.float32)
    close(shift.grad, gx.sum((0, 2, 3)), dtype)
    close(bias.grad, gy.double().sum((0, 2, 3)), dtype)
    for got, want in ((sx.grad, gsx), (sw.grad, gsw)):
        assert got.shape == () and abs(got.item() - want.item()) <= 2e-4 * max(1, abs(want.item()))


# ---- the dispatcher


def samples(device):
    x, z, w = (draw(*shape, device=device, grad=True) for shape in ((2, 3, 8), (4, 8), (5, 8)))
    s, t = scalar(0.3, device, grad=True), scalar(0.2, device, grad=True)
    image, kernel = draw(2, 4, 5, 5, device=device, grad=True), draw(6, 2, 3, 3, device=device, grad=True)
    shift, bias = draw(8, device=device, grad=True), draw(5, device=device, grad=True)
    pairs = ([3, 3], [1, 2], [1, 0], [1, 1], 2)
    return [
        (ops.quantized_matmul.default, (x, z, s, t, 4)),
        (ops.quantized_linear.default, (x, w, None, s, t, shift, bias, 4)),
        (ops.quantized_linear.default, (x, None, codes_of(w, t, 3), s, t, None, None, 3)),
        (ops.quantized_conv2d.default, (image, kernel, None, s, t, None, None, *pairs)),
        (ops.quantized_conv2d.default, (image, None, codes_of(kernel, t, 4), s, t, draw(4, device=device), None, *pairs)),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", range(5))
def test_opcheck(device, case):
    op, args = samples(device)[case]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_forward_and_backward(device, dynamic):
    w, kernel = draw(5, 8, device=device), draw(4, 5, 2, 2, device=device)
    s, t = scalar(0.3, device, grad=True), scalar(0.2, device)

    def f(x, z):
        y = ops.quantized_linear(ops.quantized_matmul(x, z, s, t), w[:, : z.shape[-2]], None, s, t)
        return ops.quantized_conv2d(y[:, None].expand(-1, 5, -1, -1), kernel, None, s, t, None, None, [2, 2]).sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 6):
        x, z = draw(2, rows, 9, device=device, grad=True), draw(8, 9, device=device, seed=2)
        got = torch.autograd.grad(compiled(x, z), (x, s))
        for a, b in zip(got, torch.autograd.grad(f(x, z), (x, s))):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_narrows_x_and_leaves_the_weight(device):
    x, w = draw(6, 8, device=device, grad=True), draw(5, 8, device=device, seed=2, grad=True)
    bias, s, t = draw(5, device=device, seed=3), scalar(0.3, device), scalar(0.2, device)
    with torch.autocast(device, torch.bfloat16):
        y = ops.quantized_linear(x, w, None, s, t, None, bias)
        m = ops.quantized_matmul(x, w, s, t)
    low = x.detach().bfloat16()
    assert torch.equal(y, ops.quantized_linear(low, w, None, s, t, None, bias.bfloat16()))
    assert torch.equal(m, ops.quantized_matmul(low, w.bfloat16(), s, t))
    (y.sum() + m.sum()).backward()
    assert x.grad.dtype == torch.float32 and w.grad.dtype == torch.float32


def test_bad_arguments_are_named():
    x, w, s, bad = draw(3, 8), draw(5, 8), scalar(0.3), scalar(math.nan)
    codes = codes_of(w, s, 4)
    cases = [
        (lambda: ops.quantized_matmul(x, w, s, s, 1), "quantized_matmul: bits is 1"),
        (lambda: ops.quantized_matmul(x, w, s, s, 4, 0.0), "quantized_matmul: eps is 0"),
        (lambda: ops.quantized_matmul(x, draw(5, 7), s, s), "x has 8 columns, z has 7"),
        (lambda: ops.quantized_matmul(x, w.double(), s, s), "expected one dtype"),
        (lambda: ops.quantized_matmul(x, w, draw(2), s), "x_step is Float"),
        (lambda: ops.quantized_matmul(x, w, s, bad), "the steps are 0.3 and nan"),
        (lambda: ops.quantized_matmul(draw(2, 3, 8), draw(3, 4, 8), s, s), "do not broadcast"),
        (lambda: ops.quantized_matmul(x.long(), w.long(), s, s), "x is Long"),
        (lambda: ops.quantized_linear(x, w, codes, s, s), "weight and codes are both given"),
        (lambda: ops.quantized_linear(x, None, None, s, s), "weight and codes are both missing"),
        (lambda: ops.quantized_linear(x, draw(5, 7), None, s, s), "weight is [5, 7]"),
        (lambda: ops.quantized_linear(x, None, codes[:, 1:], s, s), "codes is Byte [5, 3]"),
        (lambda: ops.quantized_linear(x, w, None, s, s, draw(7)), "shift is Float [7]"),
        (lambda: ops.quantized_linear(x, w, None, s, s, None, draw(5).double()), "bias is Double [5]"),
        (lambda: ops.quantized_linear(x, w, None, bad, s), "the steps are nan"),
        (lambda: ops.quantized_conv2d(x, w, None, s, s, None, None, [1, 1]), "x has 2 dimensions"),
        (lambda: ops.quantized_conv2d(draw(1, 2, 3, 3), draw(2, 2, 4, 4), None, s, s, None, None, [4, 4]), "is larger than x"),
        (lambda: ops.quantized_conv2d(draw(1, 3, 3, 3), codes, None, s, s, None, None, [1, 1], groups=2), "groups is 2"),
    ]
    for call, text in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert text in str(error.value), (text, str(error.value))


@pytest.mark.skipif(not _has_cuda(), reason="no CUDA device or kernels")
def test_a_step_that_is_no_number_makes_the_result_nan_on_the_device_and_other_devices_are_refused():
    x, s = draw(3, 8, device="cuda"), scalar(0.3, "cuda")
    assert ops.quantized_matmul(x, x, s, scalar(math.inf, "cuda")).isnan().all()
    with pytest.raises(ValueError, match="quantized_matmul: z_step is inf, expected a finite number"):
        torch.cuda.synchronize(), ops.raise_device_errors()
    with pytest.raises(ValueError, match="z_step is on cpu"):
        ops.quantized_matmul(x, x, s, scalar(0.3))
    cpu = ops.quantized_matmul(x.cpu(), x.cpu(), s.cpu(), s.cpu())
    with torch.cuda.stream(torch.cuda.Stream()):
        got = ops.quantized_matmul(x, x, s, s)
    torch.cuda.synchronize()
    assert torch.equal(got.cpu(), cpu)
