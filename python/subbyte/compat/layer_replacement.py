"""bitorch_engine.utils.convert: finds and replaces the linear layers of a model."""

import warnings

import torch

_STRATEGIES = {  # bits - group size - group size of the second level
    "2-8-32": (2, 8, 32),
    "2-32-32": (2, 32, 32),
    "2-128-32": (2, 128, 32),
    "4-128-256": (4, 128, 256),
    "8-128-256": (8, 128, 256),
}


def get_mpq_config(strategy=None):
    """The arguments of MPQLinearCuda that a strategy "bits-group-second group" stands for; None is "2-32-32"."""
    strategy = "2-32-32" if strategy is None else strategy
    assert strategy in _STRATEGIES, f"get_mpq_config: strategy is {strategy!r}, expected one of {sorted(_STRATEGIES)}"
    bits, group_size, dq_group_size = _STRATEGIES[strategy]
    return {
        "w_bit": bits,
        "group_size": group_size,
        "dq_group_size": dq_group_size,
        "dq_mode": 2,
        "use_gba_quant": True,
        "asym": False,
    }


def collect_layers(module, layer_types=None, parent_name=""):
    """{dotted name: module} of all submodules whose type is exactly one of layer_types (default: torch.nn.Linear)."""
    layer_types = [torch.nn.Linear] if layer_types is None else list(layer_types)
    found = {parent_name: module} if type(module) in layer_types else {}
    for name, child in module.named_children():
        found.update(collect_layers(child, layer_types, f"{parent_name}.{name}" if parent_name else name))
    return found


def replace_layers(module, names_to_replace, class_, replace_fn, parent_name=""):
    """Puts replace_fn(layer), which is of type class_, in place of every submodule whose dotted name is in names_to_replace,
    children of nn.Sequential included. What is of type class_ already is left alone. Returns the list of the new layers.
    """
    replaced = []
    if isinstance(module, class_):
        return replaced
    for name, child in list(module.named_children()):
        path = f"{parent_name}.{name}" if parent_name else name
        if path in names_to_replace and not isinstance(child, class_):
            layer = replace_fn(child)
            if not isinstance(layer, class_):
                raise ValueError(
                    f"replace_layers: replace_fn made a {type(layer).__name__} of {path}, expected a {class_.__name__} (class_)"
                )
            module._modules[name] = layer.train(child.training)
            replaced.append(layer)
        else:
            replaced += replace_layers(child, names_to_replace, class_, replace_fn, path)
    return replaced


def _warn_of_bias(linear, kind):
    if linear.bias is not None:
        warnings.warn(f"{kind} has no output bias: the bias of {linear} is dropped", stacklevel=4)


def quantize_linear_with_mpq_linear_cuda(
    module, names_to_replace, mpq_strategy=None, dtype=torch.bfloat16, parent_name="", requires_grad=True
):
    """Replaces the named nn.Linear by MPQLinearCuda of the strategy, quantized from their weights, with their bias.

    Returns the list of the new layers.
    """
    from .mpq import MPQLinearCuda

    config = {**get_mpq_config(mpq_strategy), "dtype": dtype, "requires_grad": requires_grad}
    return replace_layers(
        module, names_to_replace, MPQLinearCuda, lambda linear: MPQLinearCuda.from_linear(linear, **config), parent_name
    )


def quantize_linear_with_q4_linear_cutlass(module, names_to_replace, parent_name="", dtype=torch.float):
    """Replaces the named nn.Linear by Q4LinearCutlass with their weights; a bias is dropped, with a warning.

    Returns the list of the new layers.
    """
    from .nbit import Q4LinearCutlass

    def replacement(linear):
        _warn_of_bias(linear, "Q4LinearCutlass")
        layer = Q4LinearCutlass(
            in_channels=linear.in_features, out_channels=linear.out_features, device=linear.weight.device, dtype=dtype
        )
        layer.set_weight_data(linear.weight.detach().clone())
        return layer

    return replace_layers(module, names_to_replace, Q4LinearCutlass, replacement, parent_name)


def quantize_linear_with_binary_linear_cuda(module, names_to_replace, parent_name="", dtype=torch.float):
    """Replaces the named nn.Linear by BinaryLinearCuda with their weights; a bias is dropped, with a warning.

    Returns the list of the new layers.
    """
    from .binary import BinaryLinearCuda

    def replacement(linear):
        _warn_of_bias(linear, "BinaryLinearCuda")
        layer = BinaryLinearCuda(linear.in_features, linear.out_features, device=linear.weight.device, dtype=dtype)
        layer.set_weight_data(linear.weight.detach().clone())
        return layer

    return replace_layers(module, names_to_replace, BinaryLinearCuda, replacement, parent_name)
