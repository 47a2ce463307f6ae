"""Embedding tables of one bit a weight, and bags of them. Gradients and updates cost what the batch touches, not the table."""

import torch
import torch.nn.functional as F

from .. import _library, functional
from ..functional.embedding import RowMomentum, resolve_padding_idx
from ..packed_weight import PackedWeight
from .packed import _PackedState, refuse_embedding_options

_ops = _library.load()

_GRADIENTS = ("sparse", "packed", "dense")
_INIT_ROWS = 1 << 14  # rows that exist as floats at a time while a table is made


def _binary_parts(w, padding_idx, padding_bit):
    """Codes uint8 [V, P] and scales [V, 1] of a float matrix: bit 1 where w >= 0, scale = mean |w| over the D columns."""
    scale = w.abs().mean(1, keepdim=True) if w.shape[1] else w.new_zeros(w.shape[0], 1)
    bits = (w >= 0).to(torch.uint8)
    if padding_idx is not None:
        scale[padding_idx] = 0
        bits[padding_idx] = padding_bit
    return _ops.pack(bits, "sign"), scale


class _BinaryTable(_PackedState, torch.nn.Module):
    _padding_bit = 1

    def _build(self, num_embeddings, embedding_dim, padding_idx, gradient, train_scale):
        name = type(self).__name__
        if num_embeddings < 0 or embedding_dim < 0:
            raise ValueError(f"{name}: the table is [{num_embeddings}, {embedding_dim}], expected no negative size")
        if gradient not in _GRADIENTS:
            raise ValueError(f"{name}: gradient is {gradient!r}, expected one of {', '.join(_GRADIENTS)}")
        if train_scale and gradient == "packed":
            raise ValueError(f"{name}: train_scale needs gradient 'sparse' or 'dense'")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        padding_idx = resolve_padding_idx(name, padding_idx, num_embeddings)
        self.padding_idx = None if padding_idx < 0 else padding_idx
        self.gradient = gradient
        self.active_indices = self.packed_grad = self.momentum = None

    def _pack(self, codes, scale, dtype, train_scale=False):
        """Around codes uint8 [V, P] and scale [V, 1]: value = scale (2 bit - 1) = (2 scale) (code - 1/2)."""
        scale = scale.to(torch.float32 if dtype == torch.float64 else dtype)
        weight = PackedWeight(
            codes,
            torch.full_like(scale, 2) if train_scale else 2 * scale,
            format="sign",
            in_features=self.embedding_dim,
            group_size=max(1, self.embedding_dim),
            dtype=dtype,
        )
        self.weight = torch.nn.Parameter(weight)
        self.register_parameter("scale", torch.nn.Parameter(scale.to(dtype)) if train_scale else None)

    def _initial_parts(self, device, dtype):
        codes, scales = [], []
        for first in range(0, self.num_embeddings, _INIT_ROWS):
            count = min(_INIT_ROWS, self.num_embeddings - first)
            w = torch.randn(count, self.embedding_dim, device=device, dtype=torch.float32)
            padding = None if self.padding_idx is None else self.padding_idx - first
            parts = _binary_parts(w, padding if padding is not None and 0 <= padding < count else None, self._padding_bit)
            codes.append(parts[0])
            scales.append(parts[1])
        if not codes:
            return _binary_parts(torch.empty(0, self.embedding_dim, device=device), None, self._padding_bit)
        return torch.cat(codes), torch.cat(scales)

    @torch.no_grad()
    def reset_parameters(self, weight=None):
        """Packs float values [V, D], or fresh normal ones: W' = W - mean(W), row padding_idx 0, bit = W' >= 0, and a row's scale the
        mean of |W'| over its D columns."""
        table = self.weight
        if weight is None:
            codes, scale = self._initial_parts(table.device, table.dtype)
        else:
            if tuple(weight.shape) != (self.num_embeddings, self.embedding_dim) or not weight.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__}.reset_parameters: weight is {weight.dtype} {list(weight.shape)}, expected floating "
                    f"point [{self.num_embeddings}, {self.embedding_dim}]"
                )
            w = weight.detach().to(table.device, torch.float32)
            if not bool(w.isfinite().all()):
                row, column = (~w.isfinite()).nonzero()[0].tolist()
                raise ValueError(
                    f"{type(self).__name__}.reset_parameters: weight[{row}, {column}] is {float(w[row, column])}, expected finite "
                    "numbers"
                )
            w = w - w.mean() if w.numel() else w
            codes, scale = _binary_parts(w, self.padding_idx, self._padding_bit)
        table.codes.copy_(codes)
        if self.scale is None:
            table.scales.copy_(2 * scale)
        else:
            self.scale.copy_(scale)
        self.momentum = None

    @torch.no_grad()
    def prepare_params(self):
        """Makes a table that holds nothing (all codes or all scales 0) ready; one that was initialised or loaded stays as it is.

        May be called any number of times.
        """
        if self.weight.numel() and not (self.weight.codes.any() and self.scale_w.any()):
            self.reset_parameters()

    @property
    def qweight(self):
        """The packed rows, uint8 [V, ceil(D / 8)]: bit d % 8 of byte d / 8 is 1 for +1."""
        return self.weight.codes

    @property
    def scale_w(self):
        """The factor of each row, [V, 1]; a copy unless scales are trained."""
        return self.weight.scales / 2 if self.scale is None else self.scale

    @classmethod
    def from_float(cls, embedding, **options):
        """A packed copy of a torch.nn.Embedding or EmbeddingBag, by the rule of reset_parameters. options: as the constructor."""
        refuse_embedding_options(embedding)
        w = embedding.weight
        module = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            device=w.device,
            dtype=w.dtype,
            **options,
        )
        module.reset_parameters(w)
        return module.train(embedding.training)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self.packed_grad = None

    def _note(self, indices):
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self.active_indices = indices.detach()
            return True
        return False

    def _keep_packed_grad(self, rows, sign_bits):
        if self.packed_grad is not None:
            raise RuntimeError(
                f"{type(self).__name__}: packed_grad of an earlier backward pass is still there, and signs do not add up; call "
                "update_() or zero_grad() after each backward pass, or use gradient='sparse'"
            )
        self.packed_grad = (rows, sign_bits)

    @torch.no_grad()
    def update_(self, mode="momentum", *, lr=1.0, beta=0.99, start=0.5, momentum_dtype=torch.int8, seed=None):
        """Moves the bits of the rows that the last backward pass touched, and drops the gradient. No optimizer is needed.

        Args:
            mode: "momentum", damped by a moving average of the gradient's signs (functional.RowMomentum, one row of state for each
                row ever touched, made on first use with start and momentum_dtype); "descent", every bit against its gradient;
                "xor".
            lr, beta: of the average. With a constant lr only start / lr matters.
            seed: of the rounding of int8 averages; None draws one.

        Elements whose gradient is exactly 0, NaN or infinite stay. With gradient="packed", where signs are all that is known, 0
        counts as positive, and on the CPU the backward pass refuses a gradient that is not finite; on a GPU, which would have
        to be waited for, NaN counts as negative.
        """
        mask = None
        if self.packed_grad is not None:
            rows, sign_bits = self.packed_grad
        elif self.weight.grad is not None:
            gradient = self.weight.grad
            if gradient.layout == torch.sparse_coo:
                gradient = gradient.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
            else:
                rows = gradient.ne(0).any(1).nonzero()[:, 0]
                values = gradient.index_select(0, rows)
            sign_bits = _ops.pack((values >= 0).to(torch.uint8), "sign")
            mask = _ops.pack(((values != 0) & values.isfinite()).to(torch.uint8), "sign")
        else:
            return
        codes = self.weight.codes
        if mode == "momentum":
            if self.momentum is None:
                self.momentum = RowMomentum(self.embedding_dim, momentum_dtype, start)
            self.momentum.update_(codes, rows, sign_bits, lr, beta, mask, seed)
        else:
            functional.embedding_update_(codes, rows, sign_bits, self.embedding_dim, mode, mask=mask)
        self.weight.grad = self.packed_grad = None

    def extra_repr(self):
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        scale = ", train_scale=True" if self.scale is not None else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, gradient={self.gradient!r}{scale}"


class BinaryEmbedding(_BinaryTable):
    """y[..., d] = scale[t] (2 bit[t, d] - 1), t = indices[...]: a table [V, D] of one bit a weight and one scale a row.

    Args:
        num_embeddings, embedding_dim: V and D, any; D need not divide by 8.
        padding_idx: a row of value 0 that gets no gradient; negative counts from the end.
        gradient: what backward gives the weight. "sparse": weight.grad, a sparse COO tensor [V, D] of the touched rows; gradients
            add up over backward passes, torch.optim.SGD and SparseAdam take it. "packed": packed_grad = (rows int64 [T], sign
            bits uint8 [T, ceil(D / 8)]) of the last backward pass, one bit a weight. "dense": weight.grad [V, D]; compiles.
        train_scale: scale [V, 1] is a parameter, dL/dscale[t] = sum of G (2 bit - 1).
        device, dtype: of the output; scales have it too (float32 for float64).

    indices are int64 or int32 of any shape; IndexError outside the table (on CUDA deferred, see
    subbyte.set_device_checks).
    weight is a PackedWeight; update_() moves bits without an optimizer, and any of torch.optim steps with stochastic rounding.
    active_indices holds the indices of the last forward pass that wanted a gradient, in this instance alone.
    """

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        padding_idx=None,
        *,
        gradient="sparse",
        train_scale=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self._build(num_embeddings, embedding_dim, padding_idx, gradient, train_scale)
        dtype = dtype or torch.get_default_dtype()
        self._pack(*self._initial_parts(device, dtype), dtype, train_scale)

    def forward(self, indices):
        weight, padding_idx = self.weight, -1 if self.padding_idx is None else self.padding_idx
        if not self._note(indices):
            y = _ops.embedding(indices, None, *weight.packed_args, -1, False, weight.dtype)
        elif self.gradient == "packed":
            y = _PackedLookUp.apply(indices, weight, self)
        else:
            y = _ops.embedding(
                indices, weight, *weight.packed_args, padding_idx, self.gradient == "sparse", weight.dtype
            )
        if self.scale is None:
            return y
        return y * F.embedding(indices, self.scale, self.padding_idx, sparse=self.gradient == "sparse")


def _refuse_broken(module, gy):
    if gy.device.type == "cpu" and not gy.isfinite().all():
        raise RuntimeError(f"{type(module).__name__}: the gradient is not finite, and the signs of such elements mean nothing")


class _PackedLookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, weight, module):
        ctx.save_for_backward(indices)
        ctx.module, ctx.scales = module, weight.scales
        return _ops.embedding(indices, None, *weight.packed_args, -1, False, weight.dtype)

    @staticmethod
    def backward(ctx, gy):
        module = ctx.module
        _refuse_broken(module, gy)
        padding_idx = -1 if module.padding_idx is None else module.padding_idx
        module._keep_packed_grad(
            *_ops.embedding_grad_packed(gy, ctx.saved_tensors[0], ctx.scales, module.num_embeddings, padding_idx)
        )
        return None, None, None


class BinaryEmbeddingBag(_BinaryTable):
    """One row a bag of look-ups in a table [V, D] of one bit a weight; float output.

    Args:
        num_embeddings, embedding_dim, gradient, device, dtype: as in BinaryEmbedding.
        padding_idx: look-ups of this row are left out of their bag, as in torch.nn.EmbeddingBag.
        mode: "majority": +1 where at least half of the bag's bits are 1, else -1 (ties +1), with the straight-through gradient
            A[v] = sum of G over the look-ups of v; "sum" and "mean" of scale (2 bit - 1).

    forward(indices, offsets=None, per_sample_weights=None): indices [bags, L], or [count] with offsets [bags]; per_sample_weights
    with "sum" only. A bag without look-ups gives 0. Formula: functional.embedding_bag.
    """

    _padding_bit = 0

    def __init__(
        self, num_embeddings, embedding_dim, padding_idx=None, *, mode="majority", gradient="sparse", device=None, dtype=None
    ):
        super().__init__()
        if mode not in ("majority", "sum", "mean"):
            raise ValueError(f"BinaryEmbeddingBag: mode is {mode!r}, expected majority, sum or mean")
        self._build(num_embeddings, embedding_dim, padding_idx, gradient, False)
        self.mode = mode
        dtype = dtype or torch.get_default_dtype()
        self._pack(*self._initial_parts(device, dtype), dtype)

    def forward(self, indices, offsets=None, per_sample_weights=None):
        weight, padding_idx = self.weight, -1 if self.padding_idx is None else self.padding_idx
        wanted = self._note(indices)
        if wanted and self.gradient == "packed":
            return _PackedBag.apply(indices, offsets, per_sample_weights, weight, self)
        return _ops.embedding_bag(
            indices,
            offsets,
            weight if wanted else None,
            *weight.packed_args,
            self.mode,
            per_sample_weights,
            padding_idx,
            self.gradient == "sparse",
            weight.dtype,
        )

    def extra_repr(self):
        return f"{super().extra_repr()}, mode={self.mode!r}"


class _PackedBag(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, offsets, per_sample_weights, weight, module):
        if per_sample_weights is not None and per_sample_weights.requires_grad:
            raise ValueError("BinaryEmbeddingBag: per_sample_weights get a gradient with gradient 'sparse' or 'dense' only")
        ctx.save_for_backward(indices, offsets, per_sample_weights)
        ctx.module, ctx.scales = module, None if module.mode == "majority" else weight.scales
        padding_idx = -1 if module.padding_idx is None else module.padding_idx
        return _ops.embedding_bag(
            indices, offsets, None, *weight.packed_args, module.mode, per_sample_weights, padding_idx, False, weight.dtype
        )

    @staticmethod
    def backward(ctx, gy):
        indices, offsets, per_sample_weights = ctx.saved_tensors
        module = ctx.module
        _refuse_broken(module, gy)
        padding_idx = -1 if module.padding_idx is None else module.padding_idx
        module._keep_packed_grad(
            *_ops.embedding_grad_packed(
                gy, indices, ctx.scales, module.num_embeddings, padding_idx, offsets, module.mode, per_sample_weights
            )
        )
        return None, None, None, None, None
