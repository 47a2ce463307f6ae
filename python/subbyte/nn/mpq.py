"""MPQLinear: a packed linear layer that reads and writes the checkpoints of GPTQ, GBA ("MPQ") and EXL2 ("MBWQ") layers."""

import torch
import torch.nn.functional as F

from .. import _library
from .. import mpq as layouts
from .._formats import resolve_format, resolve_group_size
from ..packed_weight import PART_NAMES, PackedWeight
from .packed import Linear

_ops = _library.load()

_LAYOUTS = ("gba", "gptq", "mbwq", "exl2")
# Everything that a layer of the original has ever had in its state_dict.
_ORIGINAL_KEYS = (
    "qweight", "g_idx", "bias", "wf", "qzeros", "scales", "zeros", "qstatistic", "qzeros_zeros", "qzeros_scales", "qscales",
    "qscales_zeros", "qscales_scales", "q_perm", "q_groups", "channel_scale",
)  # fmt: skip


class MPQLinear(Linear):
    """y = (x * channel_scale) W^T + bias, W packed in 1 to 8 bits: 16- or 32-bit activations, integer weights.

    Args:
        in_features, out_features: K and N, any sizes.
        bits: 1 to 8, one width (layout "exl2" learns its widths from what it loads, or from `format`).
        group_size: rows of W that share a scale; -1 for all K.
        asym: integer zeros, W = scale * (code - zero); otherwise W = scale * code - zero with float zeros. "gptq" is
            always asym.
        layout: what the layer's foreign checkpoints look like.
            "gba"   MPQLinear with GBA quantization: groups by g_idx; scales (and zeros, when not asym) themselves quantized in
                    the raw form where group_size < 256.
            "gptq"  GPTQ v1: integer zeros, plain scales.
            "mbwq"  MBWQLinear of one width (use_mbw False): rows in the order of q_perm.
            "exl2"  MBWQLinear of mixed width (use_mbw True): rows in the order of q_perm, groups of any lengths.
        dq_group_size, dq_mode: of the second level in the raw form: output features that share a second-level scale (-1: all),
            dq_mode 2; or dq_mode 1, where each output feature has one for all groups.
        bias: a trained bias.
        channel_scale: True for a factor a input feature (buffer [K], ones).
        format: row layout such as "uint8*64+uint4*448" instead of bits, for "exl2".
        requires_grad: of the weight. dtype, device: of scales, zeros, bias and channel_scale.

    State: parameter `weight` (PackedWeight [N, K]), `bias` [N] or None; buffers `channel_scale` [K] or None, `parent` [G] or
    None (for groups of different lengths, see subbyte.mpq). The weight is the only owner of codes, scales and zeros. Its
    gradient is dense [N, K], exists only after backward, and accumulates. New layers hold rounded values of torch.nn.Linear's
    initialisation.

    state_dict is that of subbyte.nn.Linear. load_state_dict (of this layer or of any parent module) also takes the original's
    keys, raw (qstatistic or qscales, and their second-level tensors) or prepared (scales, zeros); export_state writes them.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bits=4,
        group_size=-1,
        *,
        asym=False,
        layout="gba",
        dq_group_size=-1,
        dq_mode=2,
        bias=False,
        channel_scale=False,
        format=None,
        requires_grad=True,
        device=None,
        dtype=None,
    ):
        torch.nn.Module.__init__(self)
        dense = torch.nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_options(in_features, out_features, bits, group_size, asym, layout, dq_group_size, dq_mode, format)
        self._set_weight(dense.weight.detach(), format, None, requires_grad)
        self.register_parameter("bias", dense.bias)
        self._set_extras(channel_scale, device, dtype)

    def _set_options(self, in_features, out_features, bits, group_size, asym, layout, dq_group_size, dq_mode, format):
        if layout not in _LAYOUTS:
            raise ValueError(f"MPQLinear: layout is {layout!r}, expected one of {', '.join(_LAYOUTS)}")
        if layout in ("mbwq", "exl2") and asym:
            raise ValueError(f"MPQLinear: asym with layout {layout!r}, whose zeros are values, expected asym=False")
        if format is not None and layout != "exl2":
            raise ValueError(f"MPQLinear: format with layout {layout!r}, which has one width: give bits")
        if dq_mode not in (1, 2):
            raise ValueError(f"MPQLinear: dq_mode is {dq_mode!r}, expected 1 or 2")
        if isinstance(dq_group_size, bool) or not isinstance(dq_group_size, int) or (dq_group_size < 1 and dq_group_size != -1):
            raise ValueError(f"MPQLinear: dq_group_size is {dq_group_size!r}, expected a positive integer, or -1 for all")
        resolve_format(bits, None)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.file_group_size = resolve_group_size(group_size, in_features)
        self.asym, self.layout = bool(asym) or layout == "gptq", layout
        self.dq_group_size = max(1, out_features) if dq_group_size == -1 else dq_group_size
        self.dq_mode, self.activation_bits = dq_mode, None

    def _set_extras(self, channel_scale, device=None, dtype=None):
        ones = torch.ones(self.in_features, device=device, dtype=dtype) if channel_scale else None
        self.register_buffer("channel_scale", ones)
        self.register_buffer("parent", None)
        self._groups = self.weight.scales.shape[1]
        self._kept = {}  # second-level zeros and scales as loaded; export returns to them where they are exact

    def _set_weight(self, dense, format, perm, requires_grad, dtype=None):
        weight = PackedWeight.from_float(
            dense,
            format=format or resolve_format(self.bits, None),
            group_size=self.file_group_size,
            sym=False,
            zero_kind="zeros" if self.asym else "offsets",
            scale_dtype=dtype,
            dtype=dtype,
            perm=perm,
        )
        if self.asym:
            _raise_zeros(weight, dense)
        self.weight = torch.nn.Parameter(weight, requires_grad=requires_grad)

    @classmethod
    def from_linear(
        cls,
        linear,
        bits=4,
        group_size=-1,
        *,
        asym=False,
        layout="gba",
        dq_group_size=-1,
        dq_mode=2,
        format=None,
        perm=None,
        dtype=None,
    ):
        """A packed copy of a torch.nn.Linear: weights rounded to nearest on the range of each group, bias shared.

        perm: int32 [K], the order in which input features are grouped (act-order). dtype: of scales and zeros; the layer's when
            None. Other arguments as in the constructor.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise ValueError(f"MPQLinear.from_linear: linear is {type(linear).__name__}, expected a torch.nn.Linear")
        if bits == 1 and (asym or layout == "gptq"):
            raise ValueError(
                "MPQLinear.from_linear: bits is 1 with asym, whose zeros 1 and 2 leave no positive value, expected asym=False"
            )
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        module._set_options(
            linear.in_features, linear.out_features, bits, group_size, asym, layout, dq_group_size, dq_mode, format
        )
        dense = linear.weight.detach()
        dense = dense.dequantize() if isinstance(dense, PackedWeight) else dense
        module._set_weight(dense, format, perm, linear.weight.requires_grad, dtype)
        module.register_parameter("bias", linear.bias)
        module._set_extras(False)
        return module.train(linear.training)

    # ---- use

    @property
    def group_size(self):
        """Rows of W that share a scale: the file's, or what a loaded layer was cut into."""
        return self.weight.group_size

    @property
    def groups(self):
        """Groups of the file."""
        return self._groups

    def forward(self, input):
        if self.channel_scale is not None:
            input = input * self.channel_scale.to(input.dtype)
        bias = self.bias if self.bias is None or self.bias.dtype == input.dtype else self.bias.to(input.dtype)
        return F.linear(input, self.weight, bias)

    def extra_repr(self):
        return (
            super().extra_repr()
            + f", layout={self.layout}, asym={self.asym}"
            + (", channel_scale" if self.channel_scale is not None else "")
            + (f", groups={self.groups}" if self.parent is not None else "")
        )

    # ---- the original's checkpoints

    def _adopt(self, imported):
        """Puts an imported weight into the parameter that is there, so that optimizers keep it."""
        new, own = imported.weight, self.weight
        if list(new.shape) != list(own.shape):
            raise ValueError(f"MPQLinear: the weight is {list(new.shape)} in the checkpoint, [N, K] is {list(own.shape)}")
        dtype, device = own.scales.dtype, own.codes.device
        for name in PART_NAMES:
            part = getattr(new, name)
            if part is not None:
                part = part.to(device, dtype if part.is_floating_point() else part.dtype)
            setattr(own, name, part)
        own.format, own.group_size = new.format, new.group_size
        self.parent = None if imported.parent is None else imported.parent.to(device)

    def load_original_(self, state):
        """Takes the tensors of an original layer, {key without prefix: tensor}, raw or prepared.

        Converted to this layer's dtype and device. ValueError names a tensor that is missing or of another shape.
        """
        own = self.weight
        device, dtype = own.codes.device, own.scales.dtype

        def value(name):
            tensor = state.get(name)
            return tensor if tensor is None else tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        def required(name):
            if state.get(name) is None:
                raise ValueError(f"MPQLinear: {name} is missing from the checkpoint of a {self.layout} layer")
            return value(name)

        kept = {}

        def second_level(codes, what):
            zeros, scales = required(f"q{what}_zeros"), required(f"q{what}_scales")
            kept[what] = (zeros, scales)
            return layouts.expand_second_level(codes, zeros, scales, self.out_features, self.dq_group_size)

        qweight = required("qweight")
        if self.layout == "exl2":
            scales = required("scales")
            imported = layouts.exl2_import(
                qweight, required("q_groups"), scales, required("zeros"), value("q_perm"),
                in_features=self.in_features,
            )  # fmt: skip
        else:
            zeros = qzeros = None
            scales = value("scales")
            double = self.layout == "gba" and self.file_group_size < 256
            if self.asym:
                qzeros = value("qzeros") if state.get("qzeros") is not None else required("zeros")
                if qzeros.is_floating_point():
                    raise ValueError(f"MPQLinear: qzeros is {qzeros.dtype}, expected packed int32")
                if double and state.get("qscales") is not None:
                    scales = second_level(value("qscales"), "scales")
            else:
                if double and state.get("qstatistic") is not None:
                    scale_codes, zero_codes = layouts.unpack_statistic(value("qstatistic"))
                    scales, zeros = second_level(scale_codes, "scales"), second_level(zero_codes, "zeros")
                else:
                    zeros = required("zeros")
            if scales is None:
                scales = required("scales")
            imported = layouts.gptq_import(
                qweight, scales, bits=self.bits, in_features=self.in_features, qzeros=qzeros, zeros=zeros,
                g_idx=None if self.layout == "mbwq" else value("g_idx"), q_perm=value("q_perm"),
                group_size=self.file_group_size,
            )  # fmt: skip
        scale = value("channel_scale")
        if scale is not None and scale.numel() != self.in_features:
            raise ValueError(f"MPQLinear: channel_scale has {scale.numel()} entries, expected K = {self.in_features}")
        bias = value("bias")
        if bias is not None and list(bias.shape) != [self.out_features]:
            raise ValueError(f"MPQLinear: bias is {list(bias.shape)}, expected [N] = [{self.out_features}]")
        if self.bias is None and bias is not None and bool(bias.any()):
            raise ValueError("MPQLinear: the checkpoint has a bias, the layer was made with bias=False")
        with torch.no_grad():
            self._adopt(imported)
            self._kept = kept
            self._groups = scales.shape[0]
            if scale is not None:
                scale = scale.reshape(-1).to(dtype).clone()
                if self.channel_scale is not None or not bool((scale == 1).all()):
                    self.channel_scale = scale
            if self.bias is not None:
                if bias is None:
                    raise ValueError("MPQLinear: bias is missing from the checkpoint")
                self.bias.copy_(bias)

    def export_state(self, raw=False):
        """The original's state_dict of this layer, {key: tensor}: as `prepare_params` left it, or `raw`, as it is distributed.

        Lossless, except that the raw form of "gba" with group_size < 256 quantizes scales (4 bits; 8 bits when asym) and float
        zeros (4 bits) again. Blocks that hold what was loaded get back the bytes they had.
        ValueError where the layout cannot say the weight: fractional zeros, groups of mixed width that do not begin on a word.
        """
        weight, n = self.weight.detach(), self.out_features
        in_order = self.layout in ("gba", "gptq")
        words, scales, zeros, row_groups = layouts.export(
            weight, asym=self.asym, input_order=in_order, parent=self.parent, groups=self.groups
        )
        out = {"qweight": words}
        if in_order:
            out["g_idx"] = row_groups
        else:
            perm = weight.perm
            if perm is None:  # all zero is the original's way to say: as they come
                perm = torch.zeros(self.in_features, device=weight.device, dtype=torch.int32)
            out["q_perm"] = perm.to(torch.int16) if self.in_features <= 32768 else perm
            scale = self.channel_scale
            scale = torch.ones(self.in_features, device=weight.device, dtype=scales.dtype) if scale is None else scale.detach()
            out["channel_scale"] = scale.view(1, 1, -1)
        if self.bias is not None:
            out["bias"] = self.bias.detach()
        if self.asym and not torch.equal(zeros, zeros.round()):
            raise ValueError("MPQLinear: zeros has fractions, the layout holds integers")
        if self.layout == "exl2":
            out["q_groups"] = _ops.q_groups_of(row_groups, weight.format)
        packed_zeros = layouts.pack_zeros(zeros, self.bits) if self.asym else None
        if self.asym:
            out["qzeros"] = packed_zeros
        if raw and in_order and 32 % self.bits == 0:
            out["wf"] = torch.arange(0, 32, self.bits, dtype=torch.int32, device=weight.device).unsqueeze(0)
        if raw and self.layout == "gba" and self.file_group_size < 256:
            out["scales"], out["zeros"] = torch.ones_like(scales), torch.zeros_like(scales)
            levels = 256 if self.asym else 16
            scale_codes, out["qscales_zeros"], out["qscales_scales"] = self._second_level(scales, levels, "scales")
            if self.asym:
                out["qscales"] = scale_codes if self.bits == 4 else scale_codes.flatten(1)[:, :n].contiguous()
            else:
                zero_codes, out["qzeros_zeros"], out["qzeros_scales"] = self._second_level(zeros, 16, "zeros")
                out["qstatistic"] = layouts.pack_statistic(scale_codes, zero_codes)
            return out
        out["scales"] = scales
        if not self.asym:
            out["zeros"] = zeros
        elif self.layout == "gba":
            out["zeros"] = torch.zeros_like(scales) if raw else packed_zeros
        return out

    def _second_level(self, values, levels, what):
        kept = self._kept.get(what)
        kept = None if kept is None else tuple(t.to(values.device, values.dtype) for t in kept)
        if self.dq_mode == 2:
            return layouts.requantize_second_level(values, levels, self.dq_group_size, kept=kept)
        codes, zeros, scales = layouts.requantize_second_level(values, levels, 1, per_column=True, kept=kept)
        codes = F.pad(codes.flatten(1), (0, -self.out_features % self.dq_group_size))
        return codes.view(codes.shape[0], -1, self.dq_group_size), zeros, scales

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        if prefix + "qweight" in state_dict:
            given = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
            unexpected_keys.extend(prefix + name for name in given if name not in _ORIGINAL_KEYS)
            try:
                self.load_original_(given)
            except ValueError as error:
                error_msgs.append(f"{prefix[:-1] or 'MPQLinear'}: {error}")
            return
        # Rows may have been permuted or cut, and widths differ, from what this layer was made with: take the structure first.
        recorded = (local_metadata.get("subbyte") or {}).get("weight")
        given = {part: state_dict[f"{prefix}weight.{part}"] for part in PART_NAMES if f"{prefix}weight.{part}" in state_dict}
        parent = state_dict.get(f"{prefix}parent")
        if recorded is not None and "codes" in given and "scales" in given:
            own = self.weight
            if list(given) != list(own.parts) or (recorded["format"], recorded["group_size"]) != (own.format, own.group_size):
                try:
                    stored = PackedWeight(**{k: v.clone() for k, v in given.items()}, **recorded)
                    self._adopt(layouts.Imported(stored, parent))
                    self._kept = {}
                except ValueError as error:
                    error_msgs.append(f"{prefix}weight: {error}")
                    return
        self.parent = None if parent is None else parent.clone().to(self.weight.codes.device)
        self._groups = self.weight.scales.shape[1] if parent is None else int(parent.max()) + 1 if parent.numel() else 0
        scale = state_dict.get(f"{prefix}channel_scale")
        if scale is not None and self.channel_scale is None:
            self.channel_scale = torch.ones_like(scale, device=self.weight.codes.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _raise_zeros(weight, dense):
    """GPTQ v1 cannot say a zero of 0, which groups without negative values get: zero 1 and a step wider by one level."""
    low, levels = weight.zeros == 0, max(3.0, 2.0**weight.bits)
    weight.scales.copy_(torch.where(low, weight.scales.float() * ((levels - 1) / (levels - 2)), weight.scales.float()))
    weight.zeros.masked_fill_(low, 1)
    _ops.encode_(weight.codes, dense, weight.scales, weight.zeros, None, weight.perm, weight.format, weight.group_size)
