"""Products of two operands that are integers on learned steps (LSQ): matrices, linear layers, convolutions.

q(v, s) = clamp(round(v / s), -2^(bits-1), 2^(bits-1) - 1), ties to even, s = max(step, eps), all in float32; sums are exact
integers, scaled in float32 and rounded once to the result's dtype. With u = v / s and g the gradient to s q(v, s):

    gradient to v      g where -2^(bits-1) <= u <= 2^(bits-1) - 1, else 0
    gradient to step   sum(d(u) g) / sqrt(numel(v) (2^(bits-1) - 1)),  d(u) = the end of the range outside it, else q - u

Source: Esser et al., "Learned step size quantization" (2020). A step is a tensor of one number on x's device.
"""

from .. import _library

_ops = _library.load()


def quantized_matmul(x, z, x_step, z_step, bits=4, eps=1e-5):
    """x [..., M, K] times z [..., N, K] transposed, both rounded to `bits` bits (2 to 8) on their steps: [..., M, N].

    Leading dimensions broadcast. x and z are of one floating dtype, which is the result's. Gradients to all four.
    ValueError for other shapes, dtypes or bits, and for a step that is NaN or infinite (on CUDA deferred, see
    subbyte.set_device_checks; the result is NaN).
    """
    return _ops.quantized_matmul(x, z, x_step, z_step, bits, eps)


def quantized_linear(
    x, weight, x_step, w_step, shift=None, bias=None, *, codes=None, bits=4, eps=1e-5, clip_weight_gradient=True
):
    """q(x + shift) q(weight)^T times both steps, plus bias: x [..., K] -> [..., N] of x's dtype.

    weight: floating point [N, K] of any dtype; or None with codes, uint8 [N, ceil(K bits / 8)], the "uint<bits>" stream of
    q(weight) + 2^(bits-1): the same bits. shift [K] and bias [N] are of x's dtype.
    Gradients to x, shift, bias, both steps and weight. clip_weight_gradient=False leaves the weight's unclipped. With codes,
    w_step's is the plain derivative.
    """
    return _ops.quantized_linear(x, weight, codes, x_step, w_step, shift, bias, bits, eps, clip_weight_gradient)


def quantized_conv2d(
    x,
    weight,
    x_step,
    w_step,
    shift=None,
    bias=None,
    *,
    kernel_size=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    codes=None,
    bits=4,
    eps=1e-5,
    clip_weight_gradient=True,
):
    """quantized_linear as a convolution: x [N, C, H, W], weight [O, C/groups, kh, kw] -> [N, O, OH, OW].

    Padding is zeros around x + shift. shift [C], bias [O]. codes: uint8 [O, ceil(C/groups kh kw bits / 8)] instead of weight,
    with kernel_size. The result is channels_last when x is.
    """
    if kernel_size is None:
        if weight is None:
            raise ValueError("quantized_conv2d: kernel_size is missing, it is expected with codes")
        kernel_size = weight.shape[2:]
    return _ops.quantized_conv2d(
        x,
        weight,
        codes,
        x_step,
        w_step,
        shift,
        bias,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        bits,
        eps,
        clip_weight_gradient,
    )
