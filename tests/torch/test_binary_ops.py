"""binary_matmul, binary_linear, binary_conv2d against float64 transcriptions of SEED_API sections 9 and 10."""

import math

import pytest
import torch

import subbyte
import subbyte.functional as F

ops = torch.ops.subbyte
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and subbyte.info()["has_cuda"] else [])
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def sign(v):
    return torch.where(v >= 0, 1.0, -1.0).to(torch.float64)


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    """Numbers with zeros of both signs among them, and values at the clip boundary of 0.5."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(*shape, generator=g)
    pick = torch.randint(0, 12, shape, generator=g)
    v = torch.where(pick == 0, 0.0, v)
    v = torch.where(pick == 1, -0.0, v)
    v = torch.where(pick == 2, 0.5, v)
    v = torch.where(pick == 3, -0.5, v)
    return v.to(dtype).to(device)


def scalar(value, device="cpu", dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=device)


def scaled(sums, scale, dtype):
    """An exact integer times a float32 scale (float64 in float64), rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (sums.to(wide) * scale.to(wide)).to(dtype)


def close(got, wanted, dtype):
    eps = max(torch.finfo(dtype).eps, torch.finfo(got.dtype).eps)
    wanted = wanted.double()
    limit = 4 * eps * (wanted.abs().max().item() if wanted.numel() else 0) + 4 * eps * wanted.abs() + 1e-12
    assert got.shape == wanted.shape
    assert ((got.double() - wanted).abs() <= limit).all()


# ---- matmul: section 9, BinaryMatMul


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "x_shape, z_shape",
    [((3, 5), (4, 5)), ((2, 3, 130), (2, 7, 130)), ((2, 1, 3, 33), (4, 6, 33)), ((1, 9), (3, 2, 9)), ((0, 3, 8), (0, 2, 8)),
     ((2, 0, 8), (2, 3, 8)), ((2, 3, 0), (2, 4, 0))],
)  # fmt: skip
def test_B6_matmul_and_all_gradients_follow_the_formula(device, dtype, x_shape, z_shape):
    x = randn(*x_shape, seed=1, dtype=dtype, device=device).requires_grad_()
    z = randn(*z_shape, seed=2, dtype=dtype, device=device).requires_grad_()
    x_clip, z_clip = scalar(0.5, device).requires_grad_(), scalar(0.75, device).requires_grad_()
    y = F.binary_matmul(x, z, x_clip, z_clip)
    sx, sz = sign(x.detach()), sign(z.detach())
    sums = sx @ sz.transpose(-2, -1)
    assert torch.equal(y.detach(), scaled(sums, x_clip.detach() * z_clip.detach(), dtype))
    assert torch.equal(sums, sums.round())
    g = randn(*y.shape, seed=3, dtype=dtype, device=device)
    y.backward(g)
    # Float64 transcription; the clips enter as they are.
    ux = ((g.double() @ sz) * z_clip.item()).sum_to_size(x.shape)
    uz = ((g.double().transpose(-2, -1) @ sx) * x_clip.item()).sum_to_size(z.shape)
    close(x.grad, torch.where((x.detach().double() / 0.5).abs() <= 1, ux, 0.0), dtype)
    close(z.grad, torch.where((z.detach().double() / 0.75).abs() <= 1, uz, 0.0), dtype)
    for grad, u, s, v in ((x_clip.grad, ux, sx, x), (z_clip.grad, uz, sz, z)):
        wanted = (u * s).sum() / math.sqrt(max(v.numel(), 1))
        size = (u.abs().sum() / math.sqrt(max(v.numel(), 1))).item()
        assert grad.shape == () and abs(grad.item() - wanted.item()) <= 8 * torch.finfo(dtype).eps * size + 1e-5 * size


def test_B6_a_padded_k_is_not_counted():
    # The original padded K to 128 and subtracted from the padded length.
    x = torch.ones(2, 3, 5)
    assert torch.equal(F.binary_matmul(x, x, scalar(1.0), scalar(1.0)), torch.full((2, 3, 3), 5.0))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_at_the_clip_boundary_are_inside(device):
    clip = 0.3
    steps = torch.tensor([0.3, -0.3], dtype=torch.float32)
    up, down = torch.nextafter(steps, steps * 2), torch.nextafter(steps, steps * 0)
    x = torch.stack([steps, up, down]).to(device).requires_grad_()
    z = torch.ones(1, 2, device=device)
    F.binary_matmul(x, z, scalar(clip, device), scalar(2.0, device)).sum().backward()
    assert x.grad.tolist() == [[2.0, 2.0], [0.0, 0.0], [2.0, 2.0]]
    w = torch.ones(1, 2, device=device)
    x.grad = None
    F.binary_linear(x, w, scalar(clip, device), scalar(2.0, device)).sum().backward()
    assert x.grad.tolist() == [[2.0, 2.0], [0.0, 0.0], [2.0, 2.0]]
    # The clip is float32 whatever x is: a bfloat16 neighbour of it is compared exactly.
    b = torch.tensor([[0.30078125, 0.298828125]], dtype=torch.bfloat16, device=device).requires_grad_()
    F.binary_linear(b, w, scalar(clip, device), scalar(1.0, device)).sum().backward()
    assert b.grad.tolist() == [[0.0, 1.0]]


# ---- linear: section 9


def linear_oracle(x, w, shift, scale_a, scale_w, bias, g):
    X = x.double() + (0 if shift is None else shift.double())
    sx, sw = sign(X), sign(w)
    rows = math.prod(x.shape[:-1])
    G, X2, s2 = g.double().reshape(rows, w.shape[0]), X.reshape(rows, w.shape[1]), sx.reshape(rows, w.shape[1])
    u = (G @ sw) * scale_w
    gx = torch.where((X2 / scale_a).abs() <= 1, u, 0.0)
    v = (G.t() @ s2) * scale_a
    return {
        "y": (sx @ sw.t()) * scale_a * scale_w + (0 if bias is None else bias.double()),
        "x": gx.reshape(x.shape),
        "shift": gx.sum(0),
        "weight": v,
        "bias": G.sum(0),
        "scale_a": (u * s2).sum() / math.sqrt(max(x.numel(), 1)),
        "scale_w": (v * sw).sum() / math.sqrt(max(w.numel(), 1)),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape, n", [((7,), 3), ((2, 128), 8), ((3, 5, 77), 6), ((0, 9), 4), ((2, 0), 3), ((2, 9), 0)])
def test_linear_and_all_gradients_follow_the_formula(device, dtype, shape, n):
    k = shape[-1]
    x = randn(*shape, seed=1, dtype=dtype, device=device).requires_grad_()
    w = randn(n, k, seed=2, device=device).requires_grad_()
    shift = (randn(k, seed=3, device=device).bfloat16().to(dtype) / 4).requires_grad_()
    bias = randn(n, seed=4, dtype=dtype, device=device).requires_grad_()
    scale_a, scale_w = scalar(0.5, device).requires_grad_(), scalar(0.25, device).requires_grad_()
    y = F.binary_linear(x, w, scale_a, scale_w, shift=shift, bias=bias)
    g = randn(*y.shape, seed=5, dtype=dtype, device=device)
    rounded = (x.detach() + shift.detach()) - shift.detach().double()  # X as it is formed, in x's dtype
    wanted = linear_oracle(rounded, w.detach(), shift.detach(), 0.5, 0.25, bias.detach(), g)
    assert y.dtype == dtype and y.shape == (*shape[:-1], n)
    close(y.detach(), wanted["y"], dtype)
    y.backward(g)
    close(x.grad, wanted["x"], dtype)
    close(w.grad, wanted["weight"], dtype)
    close(bias.grad, wanted["bias"], dtype)
    size = wanted["x"].abs().reshape(math.prod(shape[:-1]), k).sum(0)
    assert ((shift.grad.double() - wanted["shift"]).abs() <= 8 * torch.finfo(dtype).eps * (size + 1)).all()
    for name, parameter in (("scale_a", scale_a), ("scale_w", scale_w)):
        assert parameter.grad.shape == ()
        assert abs(parameter.grad.item() - wanted[name].item()) <= 64 * max(torch.finfo(dtype).eps, 2.0**-23) * (1 + abs(wanted[name].item()))


@pytest.mark.parametrize("device", DEVICES)
def test_packed_codes_give_the_values_and_gradients_of_the_float_weight(device):
    x = randn(4, 6, 77, seed=1, device=device).requires_grad_()
    w = randn(9, 77, seed=2, device=device).requires_grad_()
    codes = F.pack_signs(w)
    assert codes.shape == (9, 10)
    a, s = scalar(0.5, device), scalar(0.25, device)
    y = F.binary_linear(x, w, a, s)
    y.square().sum().backward()
    gx, gw = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    packed = F.binary_linear(x, None, a, s, codes=codes)
    assert torch.equal(packed, y)
    packed.square().sum().backward()
    assert torch.equal(x.grad, gx)
    # With both, codes give the values, and the weight only receives the gradient.
    handle = torch.zeros_like(w).requires_grad_()
    both = F.binary_linear(x, handle, a, s, codes=codes)
    both.square().sum().backward()
    assert torch.equal(both, y) and torch.equal(handle.grad, gw)


def test_B1_any_leading_shape_and_any_n():
    for shape in ((8,), (3, 8), (2, 3, 8), (2, 1, 3, 8)):
        for n in (1, 3, 5, 6):
            x, w = randn(*shape, seed=1), randn(n, 8, seed=2)
            y = F.binary_linear(x, w, scalar(1.0), scalar(1.0))
            assert torch.equal(y.double(), sign(x) @ sign(w).t())


def test_B5_the_weight_gradient_keeps_its_magnitude_and_accumulates():
    x, w = randn(16, 8, seed=1), randn(4, 8, seed=2).requires_grad_()
    F.binary_linear(x, w, scalar(0.5), scalar(0.25)).sum().backward()
    once = w.grad.clone()
    assert torch.equal(once, (0.5 * torch.ones(4, 16) @ sign(x).float()))
    w.grad = None
    (3 * F.binary_linear(x, w, scalar(0.5), scalar(0.25)).sum()).backward()
    assert torch.equal(w.grad, 3 * once)
    w.grad = None
    for half in x.chunk(2):
        F.binary_linear(half, w, scalar(0.5), scalar(0.25)).sum().backward()
    assert torch.equal(w.grad, once)
    # An all-negative gradient, which made the original raise.
    w.grad = None
    F.binary_linear(torch.ones(2, 8), w, scalar(1.0), scalar(1.0)).sum().neg().backward()
    assert (w.grad == -2).all()


@pytest.mark.parametrize("device", DEVICES)
def test_B10_sums_stay_integers_until_the_scale(device):
    x = torch.ones(1, 301, dtype=torch.bfloat16, device=device)
    w = torch.ones(1, 301, device=device)
    w[0, 0] = -1
    # 299 is no bfloat16 number; half of it, 149.5, rounds once to 149 or 150 (ties to even: 150).
    assert F.binary_linear(x, w, scalar(0.5, device), scalar(1.0, device)).item() == torch.tensor(149.5).bfloat16().item()
    x = torch.ones(1, 70001, dtype=torch.float16, device=device)
    w = torch.ones(1, 70001, device=device)
    assert F.binary_linear(x, w, scalar(2.0**-6, device), scalar(1.0, device)).item() == torch.tensor(70001 / 64).half().item()


@pytest.mark.parametrize("device", DEVICES)
def test_X8_the_sign_of_zero_is_plus_one_forward_and_backward(device):
    zeros = torch.tensor([[0.0, -0.0]], device=device)
    ones = torch.ones(1, 2, device=device)
    assert F.binary_linear(zeros, ones, scalar(1.0, device), scalar(1.0, device)).item() == 2
    assert F.binary_linear(ones, zeros, scalar(1.0, device), scalar(1.0, device)).item() == 2
    w = ones.clone().requires_grad_()
    F.binary_linear(zeros, w, scalar(1.0, device), scalar(1.0, device)).sum().backward()
    assert w.grad.tolist() == [[1.0, 1.0]]
    x = ones.clone().requires_grad_()
    F.binary_linear(x, zeros, scalar(1.0, device), scalar(1.0, device)).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0]]
    assert F.binary_matmul(zeros, ones, scalar(1.0, device), scalar(1.0, device)).item() == 2
    tiny = torch.tensor([[-1e-300]], dtype=torch.float64, device=device)
    assert F.binary_linear(tiny, tiny.abs(), scalar(1.0, device), scalar(1.0, device)).item() == -1


@pytest.mark.parametrize("device", DEVICES)
def test_X9_operands_of_any_stride(device):
    a, s = scalar(0.5, device), scalar(0.25, device)
    wide = randn(6, 40, 5, seed=1, device=device)
    x, w = wide.transpose(1, 2)[::2], randn(40, 9, seed=2, device=device).t()
    assert not x.is_contiguous() and not w.is_contiguous()
    assert torch.equal(F.binary_linear(x, w, a, s), F.binary_linear(x.contiguous(), w.contiguous(), a, s))
    z = randn(6, 40, 7, seed=3, device=device).transpose(1, 2)[1::2]
    assert torch.equal(F.binary_matmul(x, z, a, s), F.binary_matmul(x.contiguous(), z.contiguous(), a, s))
    image = randn(2, 9, 8, 6, seed=4, device=device).permute(0, 3, 1, 2)
    kernel = randn(4, 6, 3, 3, seed=5, device=device)
    assert torch.equal(F.binary_conv2d(image, kernel, a, s), F.binary_conv2d(image.contiguous(), kernel, a, s))
    assert torch.equal(F.binary_conv2d(image[..., ::2], kernel, a, s), F.binary_conv2d(image[..., ::2].contiguous(), kernel, a, s))


def test_X11_gradients_follow_from_the_inputs():
    x, w = randn(3, 8, seed=1), randn(4, 8, seed=2)
    a, s = scalar(0.5), scalar(0.25)
    assert not F.binary_linear(x, w, a, s).requires_grad
    xg = x.clone().requires_grad_()
    y = F.binary_linear(xg, None, a, s, codes=F.pack_signs(w))
    y.sum().backward()
    assert xg.grad is not None and w.grad is None
    with torch.no_grad():
        assert not F.binary_linear(xg, w, a, s).requires_grad
    ag = a.clone().requires_grad_()
    F.binary_linear(x, w, ag, s).sum().backward()
    assert ag.grad.shape == ()


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_marks_the_outputs_it_reaches(device):
    x, w = torch.ones(3, 4, device=device), torch.ones(2, 4, device=device)
    x[1, 2] = float("nan")
    y = F.binary_linear(x, w, scalar(1.0, device), scalar(1.0, device))
    assert y.isnan().any(1).tolist() == [False, True, False] and y[1].isnan().all()
    image = torch.ones(1, 2, 5, 5, device=device)
    image[0, 1, 0, 0] = float("nan")
    out = F.binary_conv2d(image, torch.ones(2, 1, 3, 3, device=device), scalar(1.0, device), scalar(1.0, device), groups=2)
    assert out[0, 0].isnan().sum() == 0 and out[0, 1].isnan().nonzero().tolist() == [[0, 0]]


# ---- conv2d: section 10

CONVS = [
    dict(c=3, o=4, size=(7, 5), kernel=(3, 3), stride=1, padding=1, dilation=1, groups=1),
    dict(c=12, o=6, size=(6, 11), kernel=(2, 5), stride=(1, 3), padding=(2, 0), dilation=(2, 1), groups=3),
    dict(c=4, o=4, size=(8, 6), kernel=(3, 2), stride=(1, 2), padding=(4, 3), dilation=(3, 2), groups=4),
    dict(c=40, o=33, size=(4, 4), kernel=(1, 1), stride=2, padding=0, dilation=1, groups=1),
]


def conv_case(case, dtype=torch.float32, device="cpu", batch=2):
    x = randn(batch, case["c"], *case["size"], seed=1, dtype=dtype, device=device)
    w = randn(case["o"], case["c"] // case["groups"], *case["kernel"], seed=2, device=device)
    options = {name: case[name] for name in ("stride", "padding", "dilation", "groups")}
    return x, w, options


def pair(v):
    return (v, v) if isinstance(v, int) else v


def conv_oracle(X, w, options, pad_value):
    """Padding written out, then PyTorch's convolution of the signs; X must be float64."""
    ph, pw = pair(options["padding"])
    padded = torch.nn.functional.pad(sign(X), (pw, pw, ph, ph), value=float(pad_value))
    return torch.nn.functional.conv2d(padded, sign(w), None, options["stride"], 0, options["dilation"], options["groups"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pad_value", [-1, 0, 1])
@pytest.mark.parametrize("case", CONVS)
def test_C1_C3_C4_conv2d_is_the_convolution_of_signs(device, dtype, pad_value, case):
    x, w, options = conv_case(case, dtype, device)
    a, s = scalar(0.5, device), scalar(0.3, device)
    wanted = scaled(conv_oracle(x.double(), w, options, pad_value), a * s, dtype)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        y = F.binary_conv2d(image, w, a, s, pad_value=pad_value, **options)
        assert torch.equal(y, wanted)
        assert y.is_contiguous(memory_format=torch.channels_last) or image is x
        packed = F.binary_conv2d(
            image, None, a, s, codes=F.pack_signs(w), kernel_size=case["kernel"], pad_value=pad_value, **options
        )
        assert torch.equal(packed, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pad_value", [-1, 0])
@pytest.mark.parametrize("case", CONVS)
def test_conv2d_gradients_follow_the_formula(device, dtype, pad_value, case):
    x, w, options = conv_case(case, dtype, device)
    x.requires_grad_(), w.requires_grad_()
    shift = (randn(case["c"], seed=3, device=device).bfloat16().to(dtype) / 4).requires_grad_()
    bias = randn(case["o"], seed=4, dtype=dtype, device=device).requires_grad_()
    scale_a, scale_w = scalar(0.5, device).requires_grad_(), scalar(0.25, device).requires_grad_()
    y = F.binary_conv2d(x, w, scale_a, scale_w, shift=shift, bias=bias, pad_value=pad_value, **options)
    g = randn(*y.shape, seed=5, dtype=dtype, device=device)
    y.backward(g)
    # The border is a constant of the same formula: differentiate a float64 convolution of free variables.
    X = (x.detach() + shift.detach()[:, None, None]).double()
    ph, pw = pair(options["padding"])
    sx = torch.nn.functional.pad(sign(X), (pw, pw, ph, ph), value=float(pad_value)).requires_grad_()
    sw = sign(w.detach()).requires_grad_()
    sums = torch.nn.functional.conv2d(sx, sw, None, options["stride"], 0, options["dilation"], options["groups"])
    close(y.detach(), sums.detach() * 0.125 + bias.detach().double()[:, None, None], dtype)
    sums.backward(g.double())
    u = sx.grad * 0.25
    inner = u[:, :, ph : u.shape[2] - ph, pw : u.shape[3] - pw]
    masked = torch.where((X / 0.5).abs() <= 1, inner, 0.0)
    v = sw.grad * 0.5
    close(x.grad, masked, dtype)
    close(w.grad, v, dtype)
    close(bias.grad, g.double().sum((0, 2, 3)), dtype)
    eps = max(torch.finfo(dtype).eps, 2.0**-23)
    assert ((shift.grad.double() - masked.sum((0, 2, 3))).abs() <= 8 * eps * (1 + masked.abs().sum((0, 2, 3)))).all()
    for parameter, full, signs, count in ((scale_a, u, sx, x.numel()), (scale_w, v, sw, w.numel())):
        wanted = (full * signs.detach()).sum() / math.sqrt(count)
        assert parameter.grad.shape == ()
        assert abs(parameter.grad.item() - wanted.item()) <= 8 * eps * (1 + full.abs().sum().item() / math.sqrt(count))


def test_conv2d_of_an_empty_batch():
    w = randn(4, 3, 3, 3, seed=2).requires_grad_()
    x = torch.zeros(0, 3, 8, 8).requires_grad_()
    y = F.binary_conv2d(x, w, scalar(1.0), scalar(1.0), padding=1)
    assert y.shape == (0, 4, 8, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape and not w.grad.any()


@pytest.mark.parametrize("size", [(5, 9), (9, 5)])
def test_C3_the_output_size_knows_dilation_and_oblong_images(size):
    x = randn(1, 2, *size, seed=1)
    y = F.binary_conv2d(x, randn(3, 2, 3, 3, seed=2), scalar(1.0), scalar(1.0), dilation=2, padding=1)
    assert y.shape == (1, 3, size[0] - 2, size[1] - 2)


def test_C4_pad_value_minus_one_is_the_convention_of_the_cpp_layer():
    x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3)
    values = {p: F.binary_conv2d(x, w, scalar(1.0), scalar(1.0), padding=1, pad_value=p).unique().tolist() for p in (-1, 0, 1)}
    assert values == {-1: [-1.0], 0: [4.0], 1: [9.0]}  # four pixels, five paddings
    # "whatever zero bits mean" is -1: zeros of a float image are +1.
    assert F.binary_conv2d(torch.zeros(1, 1, 2, 2), w, scalar(1.0), scalar(1.0), padding=1, pad_value=-1).unique().item() == -1


# ---- how PyTorch uses the ops


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    a, s = scalar(0.5, device).requires_grad_(), scalar(0.25, device).requires_grad_()
    x, z = randn(2, 3, 9, seed=1, device=device).requires_grad_(), randn(2, 4, 9, seed=2, device=device).requires_grad_()
    torch.library.opcheck(ops.binary_matmul.default, (x, z, a, s))
    w = randn(5, 9, seed=3, device=device).requires_grad_()
    shift, bias = torch.zeros(9, device=device).requires_grad_(), torch.zeros(5, device=device).requires_grad_()
    torch.library.opcheck(ops.binary_linear.default, (x, w, None, shift, a, s, bias))
    torch.library.opcheck(ops.binary_linear.default, (x, None, F.pack_signs(w), None, a, s, None))
    image = randn(2, 4, 6, 5, seed=4, device=device)
    kernel = randn(6, 2, 3, 3, seed=5, device=device).requires_grad_()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = image.contiguous(memory_format=memory_format).requires_grad_()
        torch.library.opcheck(
            ops.binary_conv2d.default, (leaf, kernel, None, None, a, s, None, (3, 3), (1, 2), (1, 1), (1, 1), 2, -1)
        )


def test_compile_fullgraph_gives_the_same_values_and_gradients():
    a, s = scalar(0.5).requires_grad_(), scalar(0.25).requires_grad_()
    w, kernel = randn(12, 8, seed=2).requires_grad_(), randn(6, 2, 3, 3, seed=3).requires_grad_()

    def f(x, image):
        y = F.binary_linear(x, w, a, s)
        scores = F.binary_matmul(y, y, a, s)
        return scores.square().mean() + F.binary_conv2d(image, kernel, a, s, padding=1, pad_value=-1).square().mean()

    parameters = (a, s, w, kernel)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x, image = randn(2, rows, 8, seed=rows), randn(rows, 2, 6, 5, seed=4)
        x.requires_grad_()
        wanted = f(x, image)
        grads = torch.autograd.grad(wanted, (x, *parameters))
        got = compiled(x, image)
        assert torch.allclose(got, wanted)
        for one, other in zip(torch.autograd.grad(got, (x, *parameters)), grads):
            torch.testing.assert_close(one, other)


def test_autocast_leaves_operands_as_they_are():
    a, s = scalar(0.5), scalar(0.25)
    x, w = randn(4, 300, seed=1), randn(3, 300, seed=2)
    tiny = x * 1e-20  # float16 would lose these, and a lost negative number would turn positive
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.binary_linear(tiny, w, a, s)
        mixed = F.binary_matmul(x, w.bfloat16(), a, s)
    assert y.dtype == torch.float32 and torch.equal(y, F.binary_linear(x, w, a, s))
    assert mixed.dtype == torch.float32 and torch.equal(mixed, F.binary_linear(x, w, a, s))


def test_gradcheck_of_what_is_smooth():
    x, w = randn(3, 5, seed=1, dtype=torch.float64), randn(4, 5, seed=2, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    a, s = scalar(0.5, dtype=torch.float64), scalar(0.25, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda b: F.binary_linear(x, w, a, s, bias=b), bias)
    # In the scale y is linear; its gradient carries the factor 1/sqrt(numel), which the formula adds.
    leaf = a.clone().requires_grad_()
    g = torch.randn(3, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad(F.binary_linear(x, w, leaf, s), leaf, g)
    slope = (F.binary_linear(x, w, a + 0.5, s) - F.binary_linear(x, w, a, s)) / 0.5
    torch.testing.assert_close(grad, (g * slope).sum() / math.sqrt(x.numel()))


@pytest.mark.parametrize("device", DEVICES)
def test_errors_name_the_argument(device):
    a = scalar(1.0, device)
    x, w = torch.ones(2, 8, device=device), torch.ones(3, 8, device=device)

    def refused(match, f, *args, **options):
        with pytest.raises(ValueError, match=match):
            f(*args, **options)

    refused("weight and codes are both missing", F.binary_linear, x, None, a, a)
    refused("binary_linear: weight is", F.binary_linear, x, torch.ones(3, 9, device=device), a, a)
    refused("weight is Int", F.binary_linear, x, w.int(), a, a)
    refused("binary_linear: x is Int", F.binary_linear, x.int(), w, a, a)
    refused("scale_a is Float \\[2\\]", F.binary_linear, x, w, torch.ones(2, device=device), a)
    refused("codes is", F.binary_linear, x, None, a, a, codes=torch.zeros(3, 2, dtype=torch.uint8, device=device))
    refused("shift is", F.binary_linear, x, w, a, a, shift=torch.ones(3, device=device))
    refused("bias is", F.binary_linear, x, w, a, a, bias=torch.ones(8, device=device))
    refused("expected the same K", F.binary_matmul, x, w[:, :4], a, a)
    refused("do not broadcast", F.binary_matmul, x.expand(2, 2, 8), w.expand(3, 3, 8), a, a)
    image, kernel = torch.ones(1, 4, 5, 5, device=device), torch.ones(2, 4, 3, 3, device=device)
    refused("x has 3 dimensions", F.binary_conv2d, image[0], kernel, a, a)
    refused("groups is 3", F.binary_conv2d, image, kernel, a, a, groups=3)
    refused("pad_value is 2", F.binary_conv2d, image, kernel, a, a, pad_value=2)
    refused("stride", F.binary_conv2d, image, kernel, a, a, stride=0)
    refused("does not fit", F.binary_conv2d, image, kernel, a, a, dilation=3)
    refused("kernel_size is missing", F.binary_conv2d, image, None, a, a, codes=F.pack_signs(kernel))
    if device == "cpu":
        for bad in (0.0, -1.0, float("nan"), float("inf")):
            refused("scale_w is", F.binary_linear, x, w, a, scalar(bad))
            refused("x_clip is", F.binary_matmul, x, w, scalar(bad), a)
            refused("scale_a is", F.binary_conv2d, image, kernel, scalar(bad), a)
    else:
        refused("is on cpu", F.binary_linear, x, w, scalar(1.0), a)
