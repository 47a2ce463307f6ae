"""bitorch_engine.utils.model_helper: prepare, pack, save and load models; shapes; the initial form of binary weights."""

import copy
import warnings

import torch
import torch.nn.functional as F

from ..checkpoint import replacing
from .integer_parameter import IntegerParameter
from .quant_operators import nv_tensor_quant

# ---- shapes


def flatten_x(x):
    """x as a matrix [product of the leading sizes, last size], and the list of the leading sizes. Any strides."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]), list(x.shape[:-1])


def unflatten_x(x, shape):
    """The inverse of flatten_x: leading sizes `shape` in place of the first one."""
    return x.reshape(*shape, x.shape[-1])


def pad_embedding_dim(weight):
    """A matrix [V, D] padded with -1 to a multiple of 8 columns, in its own dtype. More leading axes are left alone.

    uint8 holds bits that are packed already, and is returned as it is.
    """
    if weight.dim() < 2:
        raise ValueError(f"pad_embedding_dim: weight is {list(weight.shape)}, expected [V, D]")
    if weight.dtype == torch.uint8:
        return weight
    pad = -weight.shape[-1] % 8
    return F.pad(weight, (0, pad), value=-1) if pad else weight


def pad_last_2_dims_to_multiple_of_128(tensor):
    """(tensor with its last two sizes padded by zeros to multiples of 128, the padding of the last but one)."""
    rows, columns = -tensor.shape[-2] % 128, -tensor.shape[-1] % 128
    return (F.pad(tensor, (0, columns, 0, rows)) if rows or columns else tensor), rows


def binary_matmul_forward_post_processing(tensor, shape_pre, x_pad_sec_last, y_pad_sec_last, k):
    """Popcounts of a padded product to values: the padding cut off rows and columns, leading sizes shape_pre, k - 2t.

    k is the number of features before padding.
    """
    m, n = tensor.shape[-2] - x_pad_sec_last, tensor.shape[-1] - y_pad_sec_last
    if m < 0 or n < 0:
        raise ValueError(
            f"binary_matmul_forward_post_processing: cannot cut {x_pad_sec_last} rows, {y_pad_sec_last} columns off "
            f"{list(tensor.shape)}"
        )
    return k - 2 * tensor[..., :m, :n].reshape(*shape_pre, m, n)


# ---- the life of a model


class PreparedLayer:
    """Marks the layers that prepare_bie_layers calls: they have prepare_params(), which may be called again."""


class PackedLayer(PreparedLayer):
    """Marks the layers that pack_bie_layers calls too: they have generate_quantized_weight(qweight_only)."""


def prepare_bie_layers(model, layers=None):
    """Calls prepare_params() on every module of the quantized classes, the model itself included. May be called again.

    layers: classes to use instead of the default list.
    """
    for module in list(model.modules()):
        if isinstance(module, tuple(layers) if layers else PreparedLayer):
            module.prepare_params()


def pack_bie_layers(model, qweight_only=True, layers=None):
    """Calls generate_quantized_weight(qweight_only) on every module of the quantized classes but the embedding.

    qweight_only drops the master weights of the model that is given: it cannot train on. save_checkpoint works on a copy.
    """
    for module in list(model.modules()):
        if isinstance(module, tuple(layers) if layers else PackedLayer):
            module.generate_quantized_weight(qweight_only=qweight_only)


def _is_safetensors(path):
    return str(path).endswith(".safetensors")


def save_checkpoint(model, name, qweight_only=True):
    """Packs a copy of the model and saves {'state_dict': ...} of plain tensors, or for *.safetensors the tensors alone.

    The model itself is not changed. The file appears under its name when it is complete.
    """
    packed = copy.deepcopy(model)
    pack_bie_layers(packed, qweight_only)
    state = {key: value.detach().cpu().contiguous() for key, value in packed.state_dict().items()}
    with replacing(name) as unfinished:
        if _is_safetensors(name):
            from safetensors.torch import save_file

            save_file({key: value.clone() for key, value in state.items()}, unfinished)
        else:
            torch.save({"state_dict": state}, unfinished)


def load_checkpoint(model, checkpoint_path, qweight_only=True, strict=True, map_location="cpu"):
    """Packs the model (so that it has qweight) and loads a checkpoint of save_checkpoint into it. Only tensors are unpickled.

    strict: keys that the model or the file lacks raise RuntimeError; otherwise they are warned of. Returns (missing,
    unexpected) as Module.load_state_dict does.
    """
    if _is_safetensors(checkpoint_path):
        from safetensors.torch import load_file

        state = load_file(str(checkpoint_path), device=str(map_location))
    else:
        state = torch.load(checkpoint_path, map_location=map_location, weights_only=True)
        state = state.get("state_dict", state)
    pack_bie_layers(model, qweight_only)
    result = model.load_state_dict(state, strict=strict)
    if result.missing_keys or result.unexpected_keys:
        warnings.warn(
            f"load_checkpoint: {checkpoint_path} lacks {result.missing_keys} and has unknown {result.unexpected_keys}",
            stacklevel=2,
        )
    return result


# ---- weights


def init_weight(weight, cls=torch.nn.Parameter):
    """(int8 parameter, scale) of a float weight W: scale = mean|W|, int8 = W - mean(W) scaled so that max|.| becomes 127.

    No value is 0: where the rounding gives 0 the sign of W - mean(W) stands, +1 for an exact 0.
    """
    with torch.no_grad():
        w = weight.detach().float()
        centred = w - w.mean()
        rounded = nv_tensor_quant(centred)[0]
        sign = torch.where(centred >= 0, 1.0, -1.0)
        values = torch.where(rounded == 0, sign, rounded).to(torch.int8)
        scale = w.abs().mean()
    if not issubclass(cls, torch.nn.Parameter):
        return cls(values), scale
    return (cls(values) if issubclass(cls, IntegerParameter) else cls(values, requires_grad=False)), scale
