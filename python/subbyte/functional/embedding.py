"""Packed tables: bags of look-ups, gradients of the touched rows alone, and updates of those rows.

V rows, D columns. A row is touched when an index that is not padding_idx names it. Formulas, rounding and errors of the ops:
subbyte_torch/ops/embedding.h and the headers it names. Costs grow with look-ups and touched rows, never with V.
"""

import torch

from .. import _library
from ..packed_weight import PackedWeight, _add_rows_, _draw_seed, _handle
from .packed import _expect_packed

_ops = _library.load()


def resolve_padding_idx(op, padding_idx, num_embeddings):
    """None as -1; a negative index counts from the end, as in torch.nn.functional.embedding. ValueError outside the table."""
    if padding_idx is None:
        return -1
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"{op}: padding_idx is {padding_idx}, expected None or -{num_embeddings} <= it < {num_embeddings}")
    return padding_idx + num_embeddings if padding_idx < 0 else padding_idx


def embedding_bag(
    indices, weight, offsets=None, mode="sum", per_sample_weights=None, padding_idx=None, sparse=False, dtype=None
):
    """One row a bag of look-ups in a packed table [V, D].

    Args:
        indices: int64 or int32 [bags, L], or [count] with offsets.
        weight: PackedWeight. Its gradient is dense, or with `sparse` a sparse COO tensor of the touched rows.
        offsets: int64 or int32 [bags], where each bag starts; the first is 0.
        mode: "sum"; "mean"; "majority" (tables of format sign): +1 where at least half of a bag's bits are 1, else -1, with the
            straight-through gradient A[v] = sum of the bag's gradient over the look-ups of v.
        per_sample_weights: like indices, factors of the look-ups; "sum" only. Gets a gradient.
        padding_idx: look-ups of this row are left out, as in torch.nn.functional.embedding_bag. A bag without look-ups gives 0.
        dtype: of the result; the weight's when None.

    Returns [bags, D]. IndexError for an index outside the table (on CUDA deferred, see subbyte.set_device_checks).
    """
    _expect_packed("embedding_bag", weight)
    padding_idx = resolve_padding_idx("embedding_bag", padding_idx, weight.shape[0])
    return _ops.embedding_bag(
        indices,
        offsets,
        _handle(weight),
        *weight.packed_args,
        mode,
        per_sample_weights,
        padding_idx,
        sparse,
        dtype or weight.dtype,
    )


def embedding_grad_rows(gy, indices, num_embeddings, padding_idx=None):
    """A[v] = sum of gy [..., D] over the look-ups indices [...] of v: (rows int64 [T] sorted, values [T, D] of gy's dtype).

    Sums are float32 in the order of the look-ups. torch.sparse_coo_tensor(rows[None], values, (V, D)) is the gradient of the table.
    IndexError for an index outside the table, on every device. gy is only read.
    """
    padding_idx = resolve_padding_idx("embedding_grad_rows", padding_idx, num_embeddings)
    return _ops.embedding_grad_rows(gy, indices, num_embeddings, padding_idx)


def embedding_grad_packed(gy, indices, scales, num_embeddings, padding_idx=None):
    """The signs of the gradient, one bit a weight: (rows int64 [T] sorted, sign_bits uint8 [T, ceil(D / 8)]).

    Bit d % 8 of byte d / 8 is 1 where scales[v] * A[v, d] >= 0, with A as in embedding_grad_rows; spare bits are 0.

    Args:
        scales: float [V] or [V, 1], the factor of each row, or None for 1.
    """
    padding_idx = resolve_padding_idx("embedding_grad_packed", padding_idx, num_embeddings)
    return _ops.embedding_grad_packed(gy, indices, scales, num_embeddings, padding_idx)


def embedding_update_(
    codes,
    rows,
    sign_bits,
    embedding_dim,
    mode="descent",
    *,
    mask=None,
    momentum=None,
    slots=None,
    lr=1.0,
    beta=0.99,
    seed=0,
    offset=0,
):
    """Moves the bits of the named rows of codes uint8 [V, ceil(D / 8)] against sign_bits; g is the gradient's sign bit.

        "descent"   bit := NOT g
        "xor"       bit := bit XOR g
        "momentum"  s += (1 - beta) (lr (2 g - 1) - s);  bit := 0 where s > 0, 1 where s < 0

    Args:
        rows: int64 [T], strictly increasing.
        sign_bits: uint8 [T, ceil(D / 8)], as embedding_grad_packed gives them.
        mask: uint8 like sign_bits; only bits that are 1 in it may move.
        momentum, slots: s is momentum[slots[i]] for row i: float32, or int8 with stochastic rounding (seed, offset), [S, D].
            RowMomentum keeps both.
    """
    _ops.embedding_update_(codes, rows, sign_bits, embedding_dim, mode, mask, momentum, slots, lr, beta, seed, offset)


def embedding_add_(weight, rows, values, alpha=1.0, *, rounding="stochastic", seed=None, offset=0):
    """weight[rows[i]] += alpha * values[i] for a packed table of any format; other rows are not read.

    The rows are encoded again on the scales they have, on the fine grid where there is a residual; stochastic rounding keeps
    steps below one level in the mean.

    Args:
        rows: int64 [T], distinct. IndexError when one is outside the table.
        values: float [T, D].
        seed: None draws one, as every in-place update of a PackedWeight does.
    """
    _expect_packed("embedding_add_", weight)
    seed = _draw_seed() if seed is None else seed
    _add_rows_(weight, rows, values, alpha, rounding, seed, offset)


def sparse_update_embedding_qweight(qweight, grad_weight, active_indices, mode="descent", embedding_dim=None):
    """Applies a packed sign gradient to the rows of a packed table that the last batch read.

    Args:
        qweight: uint8 [V, P], changed in place; bit 1 is +1.
        grad_weight: uint8, bit 1 where the gradient is >= 0: [V, P], or one row for each distinct active index, sorted.
        active_indices: int64 or int32 [...], duplicates allowed. IndexError when one is outside the table.
        mode: "descent", w <- -sign(gradient), or "xor", qweight ^= grad_weight where grad_weight is not 0 (which is everywhere,
            since XOR with 0 changes nothing): the rule that bitorch-engine documents. It moves bits at +1 downhill and bits at -1
            uphill, and is kept for comparison.
        embedding_dim: D; bits at and beyond it stay. None: 8 P.

    Returns qweight.
    """
    if mode not in ("descent", "xor"):
        raise ValueError(f"sparse_update_embedding_qweight: mode is {mode!r}, expected 'descent' or 'xor'")
    if qweight.dim() != 2 or grad_weight.dim() != 2:
        raise ValueError(
            f"sparse_update_embedding_qweight: qweight is {list(qweight.shape)}, grad_weight {list(grad_weight.shape)}, "
            "expected two dimensions each"
        )
    if active_indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"sparse_update_embedding_qweight: active_indices is {active_indices.dtype}, expected int64 or int32")
    rows = torch.unique(active_indices.detach().long())
    if rows.numel() and not 0 <= int(rows[0]) <= int(rows[-1]) < qweight.shape[0]:
        raise IndexError(
            f"sparse_update_embedding_qweight: active_indices reach from {int(rows[0])} to {int(rows[-1])}, expected 0 <= index "
            f"< {qweight.shape[0]}"
        )
    if grad_weight.shape[0] == qweight.shape[0]:
        grad_weight = grad_weight.index_select(0, rows)
    embedding_dim = 8 * qweight.shape[1] if embedding_dim is None else embedding_dim
    _ops.embedding_update_(qweight, rows, grad_weight, embedding_dim, mode)
    return qweight


class RowMomentum:
    """The moving averages that damp sign updates of a table: one row of state for each table row that was ever touched.

    A row that comes for the first time starts at -sign(w) * start: a bit flips only when gradients against it have outweighed
    that, after about ln(1 + start / lr) / (1 - beta) steps of one sign.

    Args:
        embedding_dim: D.
        dtype: torch.int8 (one byte a weight, stochastic rounding) or torch.float32.
        start: in units of lr = 1. 0 would flip every bit against its first gradient.
    """

    def __init__(self, embedding_dim, dtype=torch.int8, start=0.5):
        if dtype not in (torch.int8, torch.float32):
            raise ValueError(f"RowMomentum: dtype is {dtype}, expected torch.int8 or torch.float32")
        if not 0 <= start <= 1:
            raise ValueError(f"RowMomentum: start is {start}, expected 0 <= start <= 1")
        self.embedding_dim, self.start = embedding_dim, start
        self.rows = torch.empty(0, dtype=torch.int64)
        self.slots = torch.empty(0, dtype=torch.int64)
        self.momentum = torch.empty(0, embedding_dim, dtype=dtype)

    @property
    def unit(self):
        """What lr = 1 is in stored numbers: 127 for int8, 1 for float32."""
        return 127.0 if self.momentum.dtype == torch.int8 else 1.0

    def __len__(self):
        return self.rows.numel()

    def slots_of(self, rows, codes):
        """The state row of each table row in `rows` (int64, sorted, distinct); new ones are made from codes uint8 [V, P]."""
        for name in ("rows", "slots", "momentum"):
            setattr(self, name, getattr(self, name).to(codes.device))
        at = torch.searchsorted(self.rows, rows)
        known = at < len(self)
        known &= self.rows[at.clamp(max=max(0, len(self) - 1))] == rows if len(self) else known
        fresh = rows[~known]
        if fresh.numel():
            count, first = fresh.numel(), len(self)
            bits = _ops.unpack(codes.index_select(0, fresh), "sign", self.embedding_dim)
            start = (1 - 2 * bits.to(torch.float32)) * (self.start * self.unit)
            if first + count > self.momentum.shape[0]:  # room for as many again, so that growing costs a copy now and then
                grown = self.momentum.new_zeros(2 * (first + count), self.embedding_dim)
                grown[:first] = self.momentum[:first]
                self.momentum = grown
            self.momentum[first : first + count] = start.round().to(self.momentum.dtype) if self.unit != 1.0 else start
            all_rows, order = torch.sort(torch.cat([self.rows, fresh]))
            self.slots = torch.cat([self.slots, torch.arange(first, first + count, device=codes.device)])[order]
            self.rows = all_rows
            at = torch.searchsorted(self.rows, rows)
        return self.slots[at]

    def update_(self, codes, rows, sign_bits, lr=1.0, beta=0.99, mask=None, seed=None, offset=0):
        """One step of mode "momentum" on the named rows; lr in [0, 1] for int8. seed: None draws one."""
        if self.unit != 1.0 and not 0 <= lr <= 1:
            raise ValueError(f"RowMomentum.update_: lr is {lr}, expected 0 <= lr <= 1 for int8 state")
        seed = _draw_seed() if seed is None and self.unit != 1.0 else seed or 0
        slots = self.slots_of(rows, codes)
        _ops.embedding_update_(
            codes, rows, sign_bits, self.embedding_dim, "momentum", mask, self.momentum, slots, lr * self.unit, beta, seed, offset
        )

    def state_dict(self):
        """Plain tensors and numbers."""
        return {
            "rows": self.rows,
            "slots": self.slots,
            "momentum": self.momentum[: len(self)],
            "embedding_dim": self.embedding_dim,
            "start": self.start,
        }

    def load_state_dict(self, state):
        if state["embedding_dim"] != self.embedding_dim:
            raise ValueError(f"RowMomentum: the state has {state['embedding_dim']} columns, expected {self.embedding_dim}")
        self.rows, self.slots, self.momentum = (state[name].clone() for name in ("rows", "slots", "momentum"))
        self.start = state["start"]


# How many rows are touched depends on the data, so the shape rules need a size that the compiler cannot know.


@torch.library.register_fake("subbyte::embedding_grad_rows")
def _embedding_grad_rows_shape(
    gy, indices, num_embeddings, padding_idx=-1, bag_offsets=None, bag=None, per_sample_weights=None
):
    rows = torch.library.get_ctx().new_dynamic_size()
    return indices.new_empty(rows, dtype=torch.int64), gy.new_empty(rows, gy.shape[-1])


@torch.library.register_fake("subbyte::embedding_grad_packed")
def _embedding_grad_packed_shape(
    gy, indices, scales, num_embeddings, padding_idx=-1, bag_offsets=None, bag=None, per_sample_weights=None
):
    rows = torch.library.get_ctx().new_dynamic_size()
    return indices.new_empty(rows, dtype=torch.int64), gy.new_empty(rows, (gy.shape[-1] + 7) // 8, dtype=torch.uint8)
