"""bitorch_engine.layers.qlinear.nbit: linear layers with packed weights (GPTQ, GBA, EXL2-like) and float activations."""

import weakref

import torch

from .. import _library, mpq
from ..packed_weight import PackedWeight, _draw_seed
from .integer_parameter import IntegerParameter, gradient_handle, wants_gradient
from .life_cycle import PackedLayer
from .optimizer import count
from .packing_layer import ContentVersion

_ops = _library.load()

unpack_qweight = mpq.unpack_qweight
pack_fp_weight = mpq.pack_fp_weight
make_group_map = mpq.make_group_map
gptq_style_unpacking = mpq.gptq_style_unpacking


def gptq_style_zeros_packing(zeros, w_bit, out_features, group_size=None):
    """[Gr, n] -> int32 [Gr, ceil(n b / 32)] of (z - 1) modulo 2^b, fractions rounded to nearest. group_size has no effect."""
    if zeros.shape[-1] != out_features:
        raise ValueError(f"gptq_style_zeros_packing: zeros is {list(zeros.shape)}, expected [Gr, {out_features}]")
    return mpq.pack_zeros(zeros, w_bit, wrap=True)


_OWNED = ("scales", "zeros", "g_idx", "q_perm", "q_group_map", "rows")  # one owner: the layer, where there is one


def _owned(name):
    def get(self):
        layer = self._layer()
        return getattr(layer, name, None) if layer is not None else self.__dict__.get("_own", {}).get(name)

    def set(self, value):
        layer = self._layer()
        if layer is not None:
            setattr(layer, name, value)
        else:
            self.__dict__.setdefault("_own", {})[name] = value

    return property(get, set)


class MPQWeightParameter(IntegerParameter):
    """A packed weight with its quantization data: int32 words, and the attributes below.

    privileged_grad: the dense gradient [k, n], added to by backward passes; .grad is the same.
    scales, zeros, g_idx, q_perm, q_group_map, rows: of a layer's qweight they are the layer's own tensors, read and written.
    w_bit, asym, group_size, layer_type (1 MPQLinear, 2 MBWQLinear); qscales_*, qzeros_*: second-level data, if kept.
    """

    _attributes = (
        "privileged_grad",
        "scales",
        "zeros",
        "g_idx",
        "w_bit",
        "asym",
        "group_size",
        "layer_type",
        "q_perm",
        "qscales_zeros",
        "qscales_scales",
        "qzeros_zeros",
        "qzeros_scales",
        "q_group_map",
        "rows",
    )
    _defaults = {"w_bit": -1, "asym": False, "group_size": -1, "layer_type": -1}

    scales, zeros, g_idx, q_perm, q_group_map, rows = (_owned(name) for name in _OWNED)

    def _layer(self):
        reference = self.__dict__.get("_owner")
        return reference() if reference is not None else None

    def bind(self, layer):
        """Makes the layer the owner of the quantization data."""
        self.__dict__.pop("_own", None)
        self._owner = weakref.ref(layer)

    def _state(self):
        bound = self._layer() is not None
        return {name: getattr(self, name) for name in self._attributes if not (bound and name in _OWNED)}

    @property
    def grad(self):
        return self.privileged_grad

    @grad.setter
    def grad(self, value):
        self.privileged_grad = value

    @grad.deleter
    def grad(self):
        self.privileged_grad = None

    def accumulate_grad(self, gradient):
        self.privileged_grad = gradient if self.privileged_grad is None else self.privileged_grad + gradient

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
        dtype=torch.float16,
        correct_bias=None,
        projector=None,
        grad=None,
    ):
        """One step of subbyte.mpq.mpq_update_ on words and zeros in place; m = exp_avg_l, v = exp_avg_s, like the gradient.

        The gradient is [k, n], or what the projector makes of it. Codes are rounded stochastically. step: a tensor of one
        element, counted up, or None for the first step. dtype has no effect: values are float32.
        """
        assert isinstance(qweight, MPQWeightParameter), f"update: qweight is {type(qweight).__name__}"
        grad = qweight.privileged_grad if grad is None else grad
        weight, parent = mpq.import_parameter(qweight)
        mpq.mpq_update_(
            weight,
            grad.to(exp_avg_l.dtype),
            exp_avg_l,
            exp_avg_s,
            count(step),
            lr=lr,
            weight_decay=weight_decay,
            betas=(beta1, beta2),
            eps=eps,
            correct_bias=bool(correct_bias),
            project_back=lambda r: (r if projector is None else projector.project_back(r)).t().contiguous(),
            parent=parent,
            seed=_draw_seed(),
        )
        by_input = qweight.layer_type == 1 and qweight.g_idx is not None
        exported = mpq.export(weight, asym=qweight.asym, input_order=by_input, parent=parent, groups=qweight.scales.shape[0])
        qweight.data = exported.qweight
        if weight.zeros is not None:
            qweight.zeros = mpq.pack_zeros(exported.zeros, qweight.w_bit)
        else:
            qweight.zeros = exported.zeros.to(qweight.zeros.dtype)


@torch.no_grad()
def update_zeros(qweight, w, norm_grad, step_size, z_unpacked=None):
    """Zeros of each group += mean over its rows of step_size norm_grad; whole zeros (asym): of that over the scale, rounded.

    norm_grad: [k, n], in the order of input features. z_unpacked: whole zeros [Gr, n] to start from instead of qweight.zeros. w
    has no part in it. Codes are left as they are: pack_fp_weight puts the weight onto the moved grid.
    """
    weight, parent = mpq.import_parameter(qweight)
    scales = qweight.scales
    by_input = qweight.layer_type == 1 and qweight.g_idx is not None
    exported = mpq.export(weight, asym=qweight.asym, input_order=by_input, parent=parent, groups=scales.shape[0])
    groups = exported.row_groups.long()
    rows = norm_grad if by_input or weight.perm is None else norm_grad.index_select(0, weight.perm.long())
    counts = torch.bincount(groups, minlength=scales.shape[0]).clamp_min(1).unsqueeze(1)
    total = torch.zeros(scales.shape, device=scales.device).index_add_(0, groups, rows.float())
    change = step_size * total / counts
    if weight.zeros is None:
        qweight.zeros = (qweight.zeros + change).to(qweight.zeros.dtype)
    else:
        zeros = exported.zeros if z_unpacked is None else z_unpacked
        moved = (zeros.float() + change / scales.float()).round().clamp(1, 2**qweight.w_bit)
        qweight.zeros = mpq.pack_zeros(moved, qweight.w_bit)


def qweight_update_fn(qweight, *args, **kwargs):
    """type(qweight).update(qweight, ...): the step of the parameter's class. NotImplementedError for other classes."""
    if not isinstance(qweight, IntegerParameter):
        raise NotImplementedError(f"qweight_update_fn: no rule for {type(qweight).__name__}")
    type(qweight).update(qweight, *args, **kwargs)


class MPQLinearBase(PackedLayer, torch.nn.Module):
    """y = x W + bias, W [k, n] packed in words of `w_bit` codes, groups of group_size rows (-1: all) with scales and zeros.

    use_gba_quant: scales (and zeros, when not asym) come in two levels until prepare_params; False: GPTQ, which is asym.
    dq_group_size: columns that share second-level data (-1: all); dq_mode 1: one set a column for all groups.
    """

    layer_type = 1
    _widths = (1, 2, 4, 8)

    def __init__(
        self,
        in_channels,
        out_channels,
        a_bit=16,
        w_bit=4,
        dtype=torch.half,
        group_size=-1,
        use_gba_quant=True,
        dq_group_size=-1,
        dq_mode=2,
        disable_bias=True,
        asym=False,
        requires_grad=True,
        device=None,
    ):
        super().__init__()
        name = type(self).__name__
        assert w_bit in self._widths, f"{name}: w_bit is {w_bit}, expected one of {self._widths}"
        assert a_bit == 16, f"{name}: a_bit is {a_bit}, expected 16"
        if dq_mode not in (1, 2):
            raise ValueError(f"{name}: dq_mode is {dq_mode}, expected 1 or 2")
        for what, size in (("group_size", group_size), ("dq_group_size", dq_group_size)):
            if size != -1 and size < 1:
                raise ValueError(f"{name}: {what} is {size}, expected a positive number or -1")
        self.in_channels, self.out_channels, self.a_bit, self.w_bit, self.dtype = (
            in_channels,
            out_channels,
            a_bit,
            w_bit,
            dtype,
        )
        self.maxq = 2**w_bit - 1
        self.group_size = in_channels if group_size == -1 else group_size
        self.dq_group_size = out_channels if dq_group_size == -1 else dq_group_size
        self.use_gba_quant, self.dq_mode, self.disable_bias = use_gba_quant, dq_mode, disable_bias
        self.asym = asym or not use_gba_quant
        if dq_mode == 1 and use_gba_quant and self.dq_group_size != 1:
            raise ValueError(f"{name}: dq_group_size is {dq_group_size} with dq_mode 1, which has one set a column: expected 1")
        self.requires_grad, self.device = requires_grad, device
        self._prepared = False
        self._imported = (None, None)
        self.initialize()

    # ---- construction

    @property
    def _groups(self):
        return -(-self.in_channels // max(1, self.group_size))

    def _buffer(self, name, *shape, dtype=None, fill=0):
        self.register_buffer(name, torch.full(shape, fill, dtype=dtype or self.dtype, device=self.device))

    def initialize(self):
        """qweight, g_idx, bias, wf, and what init_gptq or init_gba add."""
        k, n, b = self.in_channels, self.out_channels, self.w_bit
        words = torch.zeros(-(-k * b // 32), n, dtype=torch.int32, device=self.device)
        self._make_qweight(words)
        self.register_buffer("g_idx", torch.arange(k, dtype=torch.int32, device=self.device) // max(1, self.group_size))
        self._buffer("bias", n)
        self.register_buffer("wf", torch.arange(0, 32, b, dtype=torch.int32, device=self.device).unsqueeze(0))
        self._buffer("scales", self._groups, n, fill=1)
        (self.init_gba if self.use_gba_quant else self.init_gptq)()

    def __getattr__(self, name):
        value = super().__getattr__(name)
        if name == "qweight" and isinstance(value, MPQWeightParameter) and value._layer() is not self:
            # Put into _parameters from outside (accelerate loads so): what it belongs to is this layer's to say.
            value.w_bit, value.asym, value.group_size = self.w_bit, self.asym, self.group_size
            value.layer_type = self.layer_type
            value.bind(self)
        return value

    def _make_qweight(self, words):
        self.qweight = MPQWeightParameter(
            words,
            self.requires_grad,
            w_bit=self.w_bit,
            asym=self.asym,
            group_size=self.group_size,
            layer_type=self.layer_type,
        )
        self.qweight.bind(self)

    def init_gptq(self):
        """qzeros, packed."""
        self._buffer("qzeros", self._groups, -(-self.out_channels * self.w_bit // 32), dtype=torch.int32)

    def init_gba(self):
        """zeros, and the two levels: qstatistic (symmetric) or qscales and qzeros (asym)."""
        g, n, dq = self._groups, self.out_channels, max(1, self.dq_group_size)
        blocks = -(-n // dq)
        second = (1, n, 1) if self.dq_mode == 1 else (g, blocks, 1)
        self._buffer("zeros", g, n)
        if self.asym:
            self.init_gptq()
            self._buffer("qscales", *((g, blocks, dq) if self.w_bit == 4 else (g, n)), dtype=torch.uint8)
        else:
            self._buffer("qstatistic", g, blocks, dq, dtype=torch.uint8)
            self._buffer("qzeros_zeros", *second)
            self._buffer("qzeros_scales", *second)
        self._buffer("qscales_zeros", *second)
        self._buffer("qscales_scales", *second)

    def set_qweight_data(self, data):
        """Takes data, int32 (or int64 of such values), as the words."""
        self.qweight.data = data.detach().to(torch.int32)

    # ---- life

    def check_parameters(self):
        """ValueError where shapes and types contradict each other."""
        mpq.import_parameter(self.qweight)

    def generate_quantized_weight(self, qweight_only=False):
        """Does nothing: the weight is packed already."""

    def _drop(self, *names):
        for name in names:
            if name in self._buffers:
                del self._buffers[name]

    _SECOND_LEVEL = ("qstatistic", "qscales", "qscales_zeros", "qscales_scales", "qzeros_zeros", "qzeros_scales", "wf")

    def prepare_params(self):
        """Expands the second level (groups below 256; larger ones come expanded), frees it, and an unused bias. Idempotent."""
        if self._prepared:
            return
        if self.use_gba_quant and self.group_size < 256:
            n, dq = self.out_channels, max(1, self.dq_group_size)
            if self.asym:
                scale_codes = self.qscales
            else:
                scale_codes, zero_codes = mpq.unpack_statistic(self.qstatistic)
                self.zeros = mpq.expand_second_level(zero_codes, self.qzeros_zeros, self.qzeros_scales, n, dq)
            self.scales = mpq.expand_second_level(scale_codes, self.qscales_zeros, self.qscales_scales, n, dq)
        if self.asym:
            self._share_zeros()
        self._drop(*self._SECOND_LEVEL)
        if self.disable_bias:
            self._drop("bias")
            self.bias = None
        self._prepared = True

    def _share_zeros(self):
        """asym: `zeros` is the packed `qzeros`."""
        self._drop("zeros")
        self.register_buffer("zeros", self.qzeros, persistent=self.use_gba_quant)

    # ---- computation

    def packed_weight(self):
        """The PackedWeight [n, k] of the words, scales and zeros, made anew when one of them has changed."""
        parts = [getattr(self, name, None) for name in ("qweight", "scales", "zeros", "g_idx", "q_perm", "q_group_map")]
        version = ContentVersion(*parts)
        if self._imported[0] != version:
            weight = self._import()
            self._imported = (ContentVersion(*parts), weight)
        return self._imported[1]

    def _import(self):
        return mpq.import_parameter(self.qweight).weight

    def forward(self, x):
        """x [..., k] -> [..., n] of x's dtype."""
        if not self._prepared:
            self.prepare_params()
        if x.device != self.qweight.device:
            raise RuntimeError(f"{type(self).__name__}: x is on {x.device}, the weight on {self.qweight.device}")
        bias = self.bias
        return packed_linear(x, self.packed_weight(), self.qweight, None if bias is None else bias.to(x.dtype), self.dtype)

    # ---- copies and checkpoints

    def __getstate__(self):
        return {**self.__dict__, "_imported": (None, None)}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.qweight.bind(self)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._prepared and self.asym and "qzeros" in self._buffers:
            self.qzeros = self.zeros
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict = dict(state_dict)
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not self._prepared and "scales" in given and not set(given) & set(self._SECOND_LEVEL):
            self._drop(*self._SECOND_LEVEL, *(["g_idx"] if "g_idx" not in given else []))  # a prepared state
            if self.asym:
                self._share_zeros()
            self._prepared = True
            if self.disable_bias and "bias" not in given:
                self._drop("bias")
                self.bias = None
        for name in ("qweight", "scales", "zeros", "qzeros", "q_groups", "q_perm", "g_idx"):
            self._make_room(name, given.get(name))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._prepared and self.asym:
            source = "qzeros" if "qzeros" in given else "zeros"
            if source in given:
                self._load_zeros(given[source])

    def _load_zeros(self, packed):
        self.qzeros = packed.to(self.scales.device, torch.int32).clone()
        self._share_zeros()

    def _make_room(self, name, value):
        """Gives a buffer or the words the shape (zeros: the kind) that a checkpoint has."""
        own = self.qweight if name == "qweight" else self._buffers.get(name)
        if value is None or own is None or own.shape == value.shape:
            return
        if name == "qweight":
            own.data = torch.zeros(value.shape, dtype=torch.int32, device=own.device)
        elif name in self._resizable:
            self._buffers[name] = torch.zeros(value.shape, dtype=own.dtype, device=own.device)

    _resizable = ()

    def extra_repr(self):
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, w_bit={self.w_bit}, "
            f"group_size={self.group_size}, asym={self.asym}, prepared={self._prepared}"
        )

    @classmethod
    def from_linear(cls, linear, **options):
        """A torch.nn.Linear quantized to nearest, with its bias: a prepared layer. options: the constructor's."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            **{"disable_bias": linear.bias is None, "device": linear.weight.device, **options},
        )
        layer.prepare_params()
        weight = linear.weight.detach().float()
        packed = PackedWeight.from_float(
            weight,
            bits=layer.w_bit,
            group_size=max(1, layer.group_size),
            sym=False,
            zero_kind="zeros" if layer.asym else "offsets",
            scale_dtype=layer.dtype,
        )
        if layer.asym:  # GPTQ rows hold whole zeros from 1 on
            packed.zeros = packed.zeros.round().clamp(1, 2**layer.w_bit)
            packed.codes = _ops.encode(weight, packed.scales, packed.zeros, None, None, packed.format, packed.group_size)
        exported = mpq.export(packed, asym=layer.asym)
        layer.set_qweight_data(exported.qweight)
        layer.scales = exported.scales
        if layer.asym:
            layer._load_zeros(mpq.pack_zeros(exported.zeros, layer.w_bit))
        else:
            layer.zeros = exported.zeros
        if linear.bias is not None and layer.bias is not None:
            layer.bias = linear.bias.detach().to(layer.dtype)
        return layer


def packed_linear(x, weight, qweight, bias, grad_dtype):
    """x W + bias; the gradient of W goes to qweight.privileged_grad, [k, n]."""
    handle = None
    if wants_gradient(qweight):
        handle = gradient_handle(weight.shape, grad_dtype, x.device, lambda g: qweight.accumulate_grad(g.t()))
    return _ops.linear(x, handle, *weight.packed_args, bias)


class MPQLinearCuda(MPQLinearBase):
    """MPQLinearBase as a layer to use; on any device."""


class MPQLinearCudaFunction:
    """apply(x, qweight, a_bit, w_bit, scales, zeros, g_idx, asym, is_training, privileged_grad=None) -> x W."""

    @staticmethod
    def apply(x, qweight, a_bit, w_bit, scales, zeros, g_idx, asym, is_training=True, privileged_grad=None):
        weight = mpq.gptq_import(
            qweight.detach(),
            scales,
            bits=w_bit,
            in_features=x.shape[-1],
            qzeros=zeros if asym else None,
            zeros=None if asym else zeros,
            g_idx=g_idx,
        ).weight
        return packed_linear(x, weight, qweight if isinstance(qweight, MPQWeightParameter) else None, None, x.dtype)


class MBWQLinearCuda(MPQLinearBase):
    """Linear with rows in the order of q_perm: one width (2, 4), or with use_mbw rows of 8, 6, 5, 4, 3 and 2 bits; any device.

    w[q_perm[i], c] = code[i, c] scales[g(i), c] - zeros[g(i), c]. x is multiplied by channel_scale [1, 1, k] first.
    """

    layer_type = 2
    _widths = (1, 2, 3, 4, 5, 6, 8)
    _resizable = ("scales", "zeros", "q_groups")

    def __init__(self, *args, use_mbw=True, groups=64, rows_packed=64, **kwargs):
        self.use_mbw, self.groups, self.rows_packed = use_mbw, groups, rows_packed
        super().__init__(*args, **kwargs)

    def initialize(self):
        if self.asym:
            raise ValueError("MBWQLinearCuda: asym is True, expected False with use_gba_quant (zeros multiplied by the scale)")
        if not self.use_mbw and (self.w_bit not in (2, 4) or self.group_size < 32):
            raise ValueError(
                f"MBWQLinearCuda: w_bit is {self.w_bit} and group_size {self.group_size} without use_mbw, expected 2 or 4, and "
                "at least 32"
            )
        super().initialize()
        self.q_group_map = self.rows = None
        k, n = self.in_channels, self.out_channels
        self._buffer("q_perm", k, dtype=torch.int16 if k <= 32767 else torch.int32)
        self._buffer("channel_scale", 1, 1, k, fill=1)
        if self.use_mbw:
            self._make_qweight(torch.zeros(self.rows_packed, n, dtype=torch.int32, device=self.device))
            self._buffer("q_groups", 2 * self.groups, dtype=torch.int16)
            self._buffer("scales", self.groups, n)
            self._buffer("zeros", self.groups, n)

    def set_scales(self, scales):
        self.scales = scales.to(self.qweight.device)

    def set_zeros(self, zeros):
        self.zeros = zeros.to(self.qweight.device)

    def prepare_params(self):
        """Drops the second level, which these layers come without, and makes q_group_map and rows of q_groups. Idempotent."""
        if not self._prepared:
            self._drop(*self._SECOND_LEVEL, "g_idx")
            if self.disable_bias:
                self._drop("bias")
                self.bias = None
            self._prepared = True
        if self.use_mbw and bool(self.q_groups.any()):
            self.q_group_map = mpq.make_group_map(self.q_groups, self.qweight.shape[0])
            self.rows = mpq.rows_of_format(self._import().format, self.in_channels)

    def check_parameters(self):
        self._import()

    def _import(self):
        if not self.use_mbw:
            return mpq.import_parameter(self.qweight).weight
        words = self.qweight.detach().to(torch.int32)
        return mpq.exl2_import(words, self.q_groups, self.scales, self.zeros, self.q_perm, in_features=self.in_channels).weight

    def packed_weight(self):
        parts = [getattr(self, name, None) for name in ("qweight", "scales", "zeros", "q_perm", "q_groups")]
        version = ContentVersion(*parts)
        if self._imported[0] != version:
            weight = self._import()
            self._imported = (ContentVersion(*parts), weight)
        return self._imported[1]

    def forward(self, x):
        """x [..., k] -> [..., n] of x's dtype."""
        return super().forward(x * self.channel_scale.reshape(-1).to(x.dtype))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict = dict(state_dict)
        perm = state_dict.get(prefix + "q_perm")
        if perm is not None and perm.dtype == torch.int16 and self.q_perm.dtype != torch.int16:
            perm = perm.to(torch.int32)
            state_dict[prefix + "q_perm"] = torch.where(perm < 0, perm + 65536, perm)  # counted past 32767
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.use_mbw and prefix + "q_groups" in state_dict:
            self._prepared, again = False, self._prepared
            if again:
                self.prepare_params()

    @staticmethod
    def q42fp_weight(qweight, scales, zeros, group_size, bits, q_perm):
        """Dense [k, n] of rows of one width, in scales' dtype."""
        k = q_perm.numel()
        weight = mpq.gptq_import(
            qweight, scales, bits=bits, in_features=k, zeros=zeros, q_perm=q_perm, group_size=group_size
        ).weight
        return weight.dequantize(scales.dtype).t()

    @staticmethod
    def exl2fp_weight(qweight, scales, zeros, q_perm, q_group_map, rows):
        """Dense [k, n] of rows of mixed width, in scales' dtype."""
        parameter = MPQWeightParameter(
            qweight.to(torch.int32),
            False,
            scales=scales,
            zeros=zeros,
            q_perm=q_perm,
            q_group_map=q_group_map,
            rows=rows,
            layer_type=2,
        )
        return mpq.unpack_qweight(parameter).to(scales.dtype)


class MPQLinearMlx(MPQLinearBase):
    """MPQLinear with its tensors transposed after prepare_params: qweight (n, k b / 32), scales (n, Gr), zeros = -zeros^T.

    The words of a row are then the codes of one output feature, as packed weights have them; any device.
    """

    _widths = (2, 4, 8)

    def initialize(self):
        if self.asym:
            raise ValueError("MPQLinearMlx: asym is True, expected False")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"MPQLinearMlx: group_size is {self.group_size}, expected 32, 64 or 128")
        super().initialize()

    def prepare_params(self):
        if self._prepared:
            return
        super().prepare_params()
        self._drop("g_idx")
        self.g_idx = None
        self.qweight.data = self.qweight.detach().t().clone(memory_format=torch.contiguous_format)
        self.scales = self.scales.t().contiguous()
        self.zeros = -self.zeros.t().contiguous()

    def check_parameters(self):
        self._import()

    def _import(self):
        return PackedWeight(
            self.qweight.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8),
            self.scales,
            offsets=self.zeros,
            format="sign" if self.w_bit == 1 else f"uint{self.w_bit}",
            in_features=self.in_channels,
            group_size=max(1, self.group_size),
        )
