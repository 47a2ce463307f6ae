"""bitlinear.layers: subbyte's ternary layers with the library's defaults, attributes and state_dict keys."""

import copy

import torch

from ... import nn

__all__ = ["BitLinear", "MultiTernaryLinear", "convert_linear_to_bitlinear"]


class _OldKeys:
    """state_dict of a frozen layer: W_ternary, gamma (gammas), bias; of a trainable one subbyte's keys. Loading takes both."""

    _gamma_key = "gamma"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.state != "frozen":
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        destination[prefix + "W_ternary"] = self.W_ternary.detach()
        destination[prefix + self._gamma_key] = self.gamma.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


class BitLinear(_OldKeys, nn.BitLinear):
    """y = (x T^T) * gamma + bias with frozen ternary weights, computed from 2-bit codes: subbyte.nn.BitLinear, state "frozen".

    Attributes W_ternary [n, k], gamma [n], bias. pack_() and to_latent_() make it trainable. Options: subbyte.nn.BitLinear.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, **options):
        options = {"state": "frozen", "method": "threshold", "per_channel": True, "activation_bits": None, **options}
        super().__init__(in_features, out_features, bias, device, dtype, **options)

    @classmethod
    def from_linear(cls, linear, **options):
        """A ternary copy of a torch.nn.Linear."""
        options = {"state": "frozen", "method": "threshold", "per_channel": True, "activation_bits": None, **options}
        return super().from_linear(linear, **options)


class MultiTernaryLinear(_OldKeys, nn.MultiTernaryLinear):
    """A sum of k ternary terms, frozen: subbyte.nn.MultiTernaryLinear, state "frozen". W_ternary [k, n, in], gammas [k, n]."""

    _gamma_key = "gammas"

    def __init__(self, in_features, out_features, k=3, bias=True, device=None, dtype=None, **options):
        options = {"state": "frozen", "activation_bits": None, **options}
        super().__init__(in_features, out_features, k, bias, device, dtype, **options)

    @classmethod
    def from_linear(cls, linear, k=3, **options):
        """A copy of a torch.nn.Linear in k ternary terms."""
        return super().from_linear(linear, k, **{"state": "frozen", "activation_bits": None, **options})

    @property
    def gammas(self):
        """[k, n]."""
        return self.gamma

    @property
    def k(self):
        """The number of terms."""
        return self.gamma.shape[0]


def convert_linear_to_bitlinear(module, inplace=False, **options):
    """Every torch.nn.Linear in `module`, itself included, becomes a BitLinear. Returns the module; a copy unless inplace."""
    if not inplace:
        module = copy.deepcopy(module)
    if type(module) is torch.nn.Linear:
        return BitLinear.from_linear(module, **options)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, BitLinear.from_linear(child, **options))
    return module
