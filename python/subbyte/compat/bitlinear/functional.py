"""bitlinear.functional."""

from ...functional import activation_quant, bitlinear, greedy_ternary_decomposition, multi_ternary_linear

__all__ = ["activation_quant", "bitlinear_python", "greedy_ternary_decomposition", "multi_ternary_linear_python"]


def bitlinear_python(x, W, gamma, bias=None):
    """y = (x W^T) * gamma + bias, x [..., k], W [n, k] in {-1, 0, 1} (float, int8 or packed), gamma [n] or [1, n]."""
    return bitlinear(x, W, gamma, bias)


def multi_ternary_linear_python(x, W_ternary, gammas, bias=None):
    """y = sum_i (x T_i^T) * gammas[i] + bias, W_ternary [k, n, in] (float, int8 or packed), gammas [k, n]."""
    return multi_ternary_linear(x, W_ternary, gammas, bias)
