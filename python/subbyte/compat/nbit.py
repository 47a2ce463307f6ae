"""bitorch_engine's layers with 4- and 8-bit weights and activations on learned steps."""

import math

import torch

from .. import _library
from .cuda_functions import q4_pack_tensor
from .integer_parameter import IntegerParameter
from .life_cycle import PackedLayer
from .operator_function import OperatorFunction
from .optimizer import adam_change
from .packing_layer import ContentVersion, LearnedScales, PackingState
from .quant_operators import q4_quantization, q8_quantization

_ops = _library.load()

_BIE_8_BIT = 11.269  # sqrt(127)
_BIE_4_BIT = 5.6345  # sqrt(127) / 2
KEPT = "kept"  # scale_w belongs to the weight as it is found next
_LSQ = {4: math.sqrt(7), 8: math.sqrt(127)}


class nBitLinearParameter(IntegerParameter):
    """An int8 weight trained by Adam: see update."""

    @staticmethod
    def update(
        qweight,
        exp_avg_s=None,
        exp_avg_l=None,
        step=None,
        lr=1e-4,
        weight_decay=0.0,
        beta1=0.99,
        beta2=0.9999,
        eps=1e-6,
        dtype=torch.half,
        correct_bias=None,
        projector=None,
        grad=None,
    ):
        """Adam on the int8 values as they are (their scale does not change), each rounded stochastically to the nearest two.

        m = exp_avg_l, v = exp_avg_s; w -= eta project_back(m / (sqrt(v) + eps)), then w -= lr weight_decay w, clamped to
        [-128, 127].
        """
        assert isinstance(qweight, nBitLinearParameter), f"update: qweight is {type(qweight).__name__}"
        grad = qweight.grad if grad is None else grad
        change = adam_change(grad, exp_avg_s, exp_avg_l, step, lr, beta1, beta2, eps, torch.float32, correct_bias, projector)
        with torch.no_grad():
            values = qweight.detach()
            w = values.float() - change
            w -= lr * weight_decay * w
            low = w.floor()
            values.copy_((low + (torch.rand_like(w) < w - low)).clamp(-128, 127))


class nBitConvParameter(nBitLinearParameter):
    """nBitLinearParameter of a convolution."""


class _QuantizedLayer(PackedLayer, LearnedScales, PackingState, torch.nn.Module):
    """The state of Q4 and Q8 layers: weight, bias_a, scale_a, scale_w, eps, qweight."""

    bits = 4

    def _init_steps(self, channels, scale_a_dtype, init):
        if init not in ("bie", "lsq"):
            raise ValueError(f"{type(self).__name__}: init is {init!r}, expected 'bie' or 'lsq'")
        self.init, self.clip_weight_gradient = init, True
        device, dtype = self._device(), self.dtype
        self.bias_a = torch.nn.Parameter(torch.zeros(channels, dtype=dtype, device=device))
        self.scale_a = torch.nn.Parameter(torch.zeros((), dtype=scale_a_dtype, device=device))
        self.register_buffer("scale_w", torch.ones((), device=device))
        self.register_buffer("eps", torch.tensor(1e-5, dtype=dtype, device=device))
        self._eps = float(torch.tensor(1e-5, dtype=dtype))
        self._scaled_from = None
        self._codes = (None, None)
        self._init_scales()

    def _weight_divisor(self):
        return _LSQ[self.bits] if self.init == "lsq" else _BIE_4_BIT if self.bits == 4 else _BIE_8_BIT

    def _activation_scale(self, x):
        divisor = _LSQ[self.bits] if self.init == "lsq" else _BIE_8_BIT
        return self._scale("scale_a", lambda: 2 * (x.detach().float().abs().mean()) / divisor)

    def _fresh_scale_w(self):
        """scale_w follows the weight while it trains."""
        version = self._weight_version()
        if self._scaled_from == KEPT:
            self._scaled_from = version
        if self.weight is not None and self._scaled_from != version:
            with torch.no_grad():
                scale = 2 * self.weight.detach().float().abs().mean() / self._weight_divisor()
                self.scale_w.copy_(scale.clamp_min(self._eps))
            self._scaled_from = version
        return self.scale_w

    def prepare_params(self):
        """scale_w = max(2 mean|W| / 5.6345, eps) (11.269 for 8 bits). Training forwards do the same when W has changed."""
        self._scaled_from = None
        self._fresh_scale_w()

    def set_weight_data(self, x):
        """Takes x as the weight; whether it trains stays as it was."""
        if x.shape != self._weight_shape():
            raise ValueError(f"set_weight_data: x is {list(x.shape)}, expected {list(self._weight_shape())}")
        trains = True if self.weight is None else self.weight.requires_grad
        self.weight = torch.nn.Parameter(x.detach(), requires_grad=trains)

    def set_quantized_weight_data(self, x):
        """Takes x as the packed weight."""
        self._set_qweight(x.detach(), qweight_only=False)

    def set_activation(self, x):
        """Initialises scale_a on the first use, in training, to 2 mean|x| / 11.269; returns x + bias_a."""
        self._activation_scale(x)
        return x + self.bias_a.to(x.dtype).reshape(self._shift_shape())

    def _shift_shape(self):
        return (-1,)

    def generate_quantized_weight(self, qweight_only=False):
        """qweight = the packed weight, by scale_w; qweight_only drops weight."""
        if self.weight is None:
            return
        scale = self._fresh_scale_w()
        weight = self.weight.detach()
        if self.bits == 8:
            packed = q8_quantization(weight, scale, self._eps).to(torch.int8)
        else:
            packed = self._q4_bytes(q4_quantization(weight, scale, self._eps).to(torch.int32))
        self._set_qweight(packed, qweight_only)

    def _canonical_codes(self, n, k, layout):
        """The stream the operators read, made once for each qweight."""
        qweight = self._ensure_packed()
        key = ContentVersion(qweight)
        if self._codes[0] != key:
            codes = qweight.detach()
            if self.bits == 8:
                codes = (codes.to(torch.int16) + 128).to(torch.uint8).reshape(n, k)
            else:
                codes = _ops.relayout(codes.contiguous().view(torch.uint8), layout, "uint4", n, k, None)
            self._codes = (key, codes)
        return self._codes[1]

    def __getstate__(self):
        current = self._scaled_from == KEPT or self._scaled_from == self._weight_version()
        return {**super().__getstate__(), "_codes": (None, None), "_scaled_from": KEPT if current else None}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._eps = float(self.eps)
        if prefix + "scale_w" in state_dict:  # it belongs to the weight that came with it
            self._scaled_from = KEPT

    def _trains_from_weight(self):
        return self.training and self.weight is not None


class nBitLinearBase(_QuantizedLayer):
    """weight [n, k] of `dtype` on `device`, kaiming-uniform; qweight None until packed."""

    def __init__(self, in_channels, out_channels, a_bit=4, w_bit=4, device=None, dtype=torch.float, init="bie"):
        super().__init__()
        self.in_channels, self.out_channels, self.a_bit, self.w_bit = in_channels, out_channels, a_bit, w_bit
        self.device, self.dtype = device, dtype
        self.weight = torch.nn.Parameter(torch.empty(out_channels, in_channels, device=device, dtype=dtype))
        self._init_packing()
        self._init_steps(in_channels, torch.float, init)
        self.reset_parameters()

    def reset_parameters(self):
        if self.weight.numel():
            torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def _weight_shape(self):
        return torch.Size((self.out_channels, self.in_channels))

    def _q4_bytes(self, values):
        return q4_pack_tensor(values)

    def _check_forward(self, x):
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"{type(self).__name__}: x has {x.shape[-1]} features, expected {self.in_channels}")

    def forward(self, x):
        """x [..., k] -> [..., n] of x's dtype: scale_a scale_w q(x + bias_a) q(W)^T."""
        self._check_forward(x)
        scale_a = self._activation_scale(x)
        weight = codes = None
        if self._trains_from_weight():
            weight, scale_w = self.weight, self._fresh_scale_w()
            self._note_training()
        else:
            codes = self._canonical_codes(self.out_channels, self.in_channels, "q4")
            scale_w = self.scale_w
        shift = self.bias_a.to(x.dtype)
        return _ops.quantized_linear(
            x, weight, codes, scale_a, scale_w, shift, None, self.bits, self._eps, self.clip_weight_gradient
        )

    def extra_repr(self):
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, bits={self.bits}, init={self.init}"


class Q4LinearCutlass(nBitLinearBase):
    """Linear with 4-bit weights and activations, on any device. qweight is int8 [n, ceil(k / 2)], the even column high."""

    bits = 4


class Q8LinearCutlass(nBitLinearBase):
    """Linear with 8-bit weights and activations, on any device. qweight is int8 [n, k]."""

    bits = 8


def _linear(bits, layout):
    def run(x, weight, scale_a, scale_w, eps, is_train=True):
        eps = float(eps)
        if weight.is_floating_point():
            return _ops.quantized_linear(x, weight, None, scale_a, scale_w, None, None, bits, eps)
        n, k = weight.shape[0], x.shape[-1]
        if bits == 8:
            codes = (weight.to(torch.int16) + 128).to(torch.uint8)
        else:
            codes = _ops.relayout(weight.contiguous().view(torch.uint8), layout, "uint4", n, k, None)
        return _ops.quantized_linear(x, None, codes, scale_a, scale_w, None, None, bits, eps)

    return staticmethod(run)


class Q4LinearFunction(OperatorFunction):
    """apply(x, weight, scale_a, scale_w, eps, is_train): scale_a scale_w q(x) q(W)^T; weight float, or int8 packed (q4)."""

    run = _linear(4, "q4")


class Q8LinearFunction(OperatorFunction):
    """Q4LinearFunction with 8 bits; weight float, or int8 values."""

    run = _linear(8, None)


class Q4MatMulFunction(OperatorFunction):
    """apply(x, y, x_clip, y_clip, eps, is_train): x_clip y_clip q(x) q(y)^T, x [..., m, k], y [..., n, k] -> [..., m, n].

    Leading dimensions broadcast. Gradients to x, y and both clips, which are step sizes.
    """

    @staticmethod
    def run(x, y, x_clip, y_clip, eps, is_train=True):
        return _ops.quantized_matmul(x, y, x_clip, y_clip, 4, float(eps))


class Q4MatMul(LearnedScales, torch.nn.Module):
    """Q4MatMulFunction with learned steps x_clip and y_clip, which start at 2 mean|x| / 11.269 and 2 mean|y| / 11.269."""

    _scales = ("x_clip", "y_clip")

    def __init__(self, dtype=torch.float, device=None, *args, init="bie", **kwargs):
        super().__init__()
        if init not in ("bie", "lsq"):
            raise ValueError(f"Q4MatMul: init is {init!r}, expected 'bie' or 'lsq'")
        self.dtype, self.init = dtype, init
        self.x_clip = torch.nn.Parameter(torch.zeros((), dtype=dtype, device=device))
        self.y_clip = torch.nn.Parameter(torch.zeros((), dtype=dtype, device=device))
        self.register_buffer("eps", torch.tensor(1e-5, dtype=dtype, device=device))
        self._eps = float(torch.tensor(1e-5, dtype=dtype))
        self._init_scales()

    def set_activation_scale(self, x, y):
        """Initialises x_clip from x and y_clip from y, in training; returns both as they are to be used."""
        divisor = _LSQ[4] if self.init == "lsq" else _BIE_8_BIT
        return tuple(
            self._scale(name, lambda t=t: 2 * t.detach().float().abs().mean() / divisor)
            for name, t in (("x_clip", x), ("y_clip", y))
        )

    def forward(self, x, y):
        return _ops.quantized_matmul(x, y, *self.set_activation_scale(x, y), 4, self._eps)


class nBitConv2dBase(_QuantizedLayer):
    """weight [O, C, ks, ks] of `dtype` on `device`, kaiming-uniform."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        a_bit=4,
        w_bit=4,
        device=None,
        dtype=torch.float,
        init="bie",
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation, self.a_bit, self.w_bit = stride, padding, dilation, a_bit, w_bit
        self.device, self.dtype = device, dtype
        self.weight = torch.nn.Parameter(torch.empty(self._weight_shape(), device=device, dtype=dtype))
        self._init_packing()
        self._init_steps(in_channels, dtype, init)
        self.reset_parameters()

    def reset_parameters(self):
        if self.weight.numel():
            torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def _weight_shape(self):
        return torch.Size((self.out_channels, self.in_channels, *_pair(self.kernel_size)))

    def _shift_shape(self):
        return (1, -1, 1, 1)

    def _q4_bytes(self, values):
        o, c, kh, kw = values.shape
        packed = q4_pack_tensor(values.reshape(1, -1)).reshape(-1)
        return packed.reshape(o, kh, kw, c // 2) if c % 2 == 0 else packed

    def _check_forward(self, x):
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"{type(self).__name__}: x is {list(x.shape)}, expected [N, {self.in_channels}, H, W]")

    def forward(self, x):
        """x [N, C, H, W] -> [N, O, OH, OW]: a true convolution of scale_a q(x + bias_a) with scale_w q(W), padded by zeros."""
        self._check_forward(x)
        scale_a = self._activation_scale(x)
        weight = codes = None
        kernel = _pair(self.kernel_size)
        if self._trains_from_weight():
            weight, scale_w = self.weight, self._fresh_scale_w()
            self._note_training()
        else:
            codes = self._canonical_codes(self.out_channels, self.in_channels * kernel[0] * kernel[1], "q4_conv")
            scale_w = self.scale_w
        return _ops.quantized_conv2d(
            x,
            weight,
            codes,
            scale_a,
            scale_w,
            self.bias_a.to(x.dtype),
            None,
            kernel,
            _pair(self.stride),
            _pair(self.padding),
            _pair(self.dilation),
            1,
            self.bits,
            self._eps,
            self.clip_weight_gradient,
        )

    def extra_repr(self):
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bits={self.bits}, init={self.init}"
        )


def _pair(value):
    return [value, value] if isinstance(value, int) else list(value)


class Q4Conv2dCutlass(nBitConv2dBase):
    """Convolution with 4-bit weights and activations, on any device.

    qweight is int8 [O, ks, ks, C / 2]: the nibbles of the weight's memory in the order [O, C, ks, ks], labelled so.
    """

    bits = 4
