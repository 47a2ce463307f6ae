"""bitorch_engine.layers.qembedding.binary: tables of signs, one bit an element, or one bool."""

import torch

from .. import _library, functional
from .cuda_functions import tensor_to_packed_uint8
from .integer_parameter import IntegerParameter, wants_gradient
from .life_cycle import PreparedLayer
from .optimizer import sign_state

_ops = _library.load()


class BinaryEmbeddingParameter(IntegerParameter):
    """A table of signs: uint8 [V, P] (pack8) or bool [V, D].

    active_indices: the indices of the last backward pass, as they were given.
    grad: None, or a sparse tensor like the table with the signs of the gradient (1 where it is >= 0) in the rows that were
        looked up. Several backward passes add their gradients in float before the sign is taken. grad.to_dense() has 0 in all
        other rows.
    """

    _attributes = ("active_indices", "embedding_dim", "padding_idx")

    def accumulate_rows(self, rows, values):
        """Adds a gradient: values [T, D] of the distinct rows [T]."""
        if self._row_gradient is not None:
            rows, inverse = torch.unique(torch.cat([self._row_gradient[0], rows]), return_inverse=True)
            both = torch.cat([self._row_gradient[1], values])
            values = both.new_zeros(len(rows), both.shape[1]).index_add_(0, inverse, both)
        self._row_gradient, self._held_grad = (rows, values), None

    _row_gradient = None

    @property
    def grad(self):
        if self._held_grad is None and self._row_gradient is not None:
            rows, values = self._row_gradient
            signs = values >= 0 if self.dtype == torch.bool else tensor_to_packed_uint8(values)
            self._held_grad = torch.sparse_coo_tensor(
                rows.unsqueeze(0), signs, self.shape, is_coalesced=True, check_invariants=False
            )
        return self._held_grad

    @grad.setter
    def grad(self, value):
        if value is not None and value.shape != self.shape:
            raise ValueError(f"BinaryEmbeddingParameter: grad is {list(value.shape)}, expected {list(self.shape)}")
        self._held_grad, self._row_gradient = value, None

    @grad.deleter
    def grad(self):
        self._held_grad = self._row_gradient = None

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
        """s += (1 - beta2) (lr sign(g) - s) in the active rows; a weight becomes -1 where s > 0, +1 where s < 0.

        exp_avg_s: s, floating point [V, D], or None for plain descent (weight := -sign(g)). grad: like qweight.grad; the
        active rows are those a sparse grad has, or those of qweight.active_indices. exp_avg_l, beta1, eps, weight_decay,
        correct_bias and projector have no part in the rule.
        """
        assert isinstance(qweight, BinaryEmbeddingParameter), f"update: qweight is {type(qweight).__name__}"
        grad = qweight.grad if grad is None else grad
        if step is not None:
            step += 1
        if grad is None:
            return
        rows, bits = _active(grad, qweight.active_indices)
        if rows.numel() == 0:
            return
        table = qweight.detach()
        columns = qweight.embedding_dim or (table.shape[1] * (1 if table.dtype == torch.bool else 8))
        of_table = table.dtype == torch.bool
        packed = tensor_to_packed_uint8(table.index_select(0, rows).float() - 0.5) if of_table else table
        signs = tensor_to_packed_uint8(bits.float() - 0.5) if of_table else bits
        momentum = slots = None
        if exp_avg_s is not None:  # only the active rows of the state are read and written
            momentum = exp_avg_s.index_select(0, rows).float()
            slots = torch.arange(len(rows), device=rows.device)
        active = torch.arange(len(rows), device=rows.device) if of_table else rows
        mode = "descent" if momentum is None else "momentum"
        _ops.embedding_update_(packed, active, signs, columns, mode, None, momentum, slots, lr, beta2)
        if of_table:
            table.index_copy_(0, rows, _ops.unpack(packed, "sign", columns).bool())
        if momentum is not None:
            exp_avg_s.index_copy_(0, rows, momentum.to(exp_avg_s.dtype))

    @staticmethod
    def initial_state(qweight, grad, dtype):
        """Of DiodeMix: exp_avg_s alone, [V, D]."""
        table = qweight.detach()
        if table.dtype != torch.bool:
            table = _ops.unpack(table, "sign", qweight.embedding_dim or 8 * table.shape[1])
        return {"exp_avg_s": sign_state(2 * table.to(dtype) - 1)}


def _active(grad, active_indices):
    """(sorted distinct rows, their gradient bits)."""
    if grad.is_sparse:
        grad = grad if grad.is_coalesced() else grad.coalesce()
        return grad.indices()[0], grad.values()
    if active_indices is None:
        raise ValueError("update: a dense gradient needs qweight.active_indices to tell the active rows")
    rows = torch.unique(active_indices.reshape(-1)).long()
    return rows, grad.index_select(0, rows)


def _handle_for(qweight):
    """What makes an output require a gradient although the table cannot."""
    return torch.zeros((), requires_grad=True) if wants_gradient(qweight) else None


class BinaryEmbeddingForward(torch.autograd.Function):
    """apply(input, qweight, embed_scale, ori_embedding_dim, is_train) -> scale[t] * (2 bit - 1), [..., D], in its dtype.

    input: int64 or int32 of any shape. qweight: uint8 [V, ceil(D / 8)]. embed_scale: [V, 1]; if it requires a gradient it gets
    sum over look-ups and columns of G * sign. The backward pass gives the packed signs of the weight's gradient to
    qweight.grad. is_train has no effect: what is kept for the backward pass is decided by what needs a gradient.
    """

    @classmethod
    def apply(cls, input, qweight, embed_scale, ori_embedding_dim, is_train=True):
        return super().apply(input, qweight, embed_scale, ori_embedding_dim, is_train, _handle_for(qweight))

    @staticmethod
    def forward(ctx, input, qweight, embed_scale, ori_embedding_dim, is_train=True, handle=None):
        ctx.qweight, ctx.dim = qweight, ori_embedding_dim
        table = qweight.detach()
        ctx.save_for_backward(input, embed_scale)
        return _ops.embedding(
            input, None, table, 2 * embed_scale.detach(), None, None, None, "sign", ori_embedding_dim, max(1, ori_embedding_dim)
        )

    @staticmethod
    def backward(ctx, output_gradient):
        input, embed_scale = ctx.saved_tensors
        qweight = ctx.qweight
        padding_idx = getattr(qweight, "padding_idx", None)
        padding_idx = -1 if padding_idx is None else padding_idx
        rows, values = _ops.embedding_grad_rows(output_gradient, input, qweight.shape[0], padding_idx)
        grad_weight = grad_scale = None
        if isinstance(qweight, BinaryEmbeddingParameter) and qweight.requires_grad:
            qweight.accumulate_rows(rows, values * embed_scale.detach().index_select(0, rows))
            qweight.active_indices = input
            grad_weight = qweight.grad
        if ctx.needs_input_grad[2]:
            signs = _ops.unpack(qweight.detach().index_select(0, rows), "sign", ctx.dim).to(values.dtype) * 2 - 1
            grad_scale = torch.zeros_like(embed_scale).index_copy_(
                0, rows, (values * signs).sum(1, keepdim=True).to(embed_scale.dtype)
            )
        return None, grad_weight, grad_scale, None, None, None


class BinaryEmbeddingBagForward(torch.autograd.Function):
    """apply(input, weight, is_train): [..., L] indices into a bool table [V, D] -> float32 [..., D], the majority of each bag.

    +1 where at least ceil(L / 2) of the bits are set, else -1. Backward: straight-through, A[v] = sum of G over the bags that
    v is in, its sign to weight.grad.
    """

    @classmethod
    def apply(cls, input, weight, is_train=True, dtype=torch.float32):
        return super().apply(input, weight, is_train, dtype, _handle_for(weight))

    @staticmethod
    def forward(ctx, input, weight, is_train=True, dtype=torch.float32, handle=None):
        ctx.weight = weight
        bags = input.reshape(input.shape[:-1].numel(), input.shape[-1])
        ctx.save_for_backward(bags)
        ctx.shape, ctx.given = input.shape, input
        table = weight.detach().view(torch.uint8)
        ones = torch.ones(table.shape[0], 1, device=table.device)
        dim = table.shape[1]
        count = _ops.embedding_bag(
            bags, None, None, table, ones, None, torch.zeros_like(ones), None, "uint8", dim, max(1, dim), "sum"
        )
        majority = torch.where(count >= (input.shape[-1] + 1) // 2, 1.0, -1.0)
        return majority.to(dtype).reshape(*input.shape[:-1], dim)

    @staticmethod
    def backward(ctx, output_gradient):
        (bags,) = ctx.saved_tensors
        weight, grad_weight = ctx.weight, None
        if isinstance(weight, BinaryEmbeddingParameter) and weight.requires_grad:
            gradient = output_gradient.reshape(bags.shape[0], weight.shape[1])
            padding_idx = -1 if weight.padding_idx is None else weight.padding_idx
            rows, values = _ops.embedding_grad_rows(gradient, bags, weight.shape[0], padding_idx, None, "majority")
            weight.accumulate_rows(rows, values)
            weight.active_indices = ctx.given
            grad_weight = weight.grad
        return None, grad_weight, None, None, None


def _checked_padding(name, padding_idx, num_embeddings):
    if padding_idx is None:
        return None
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"{name}: padding_idx is {padding_idx}, expected -{num_embeddings} to {num_embeddings - 1}")
    return padding_idx % num_embeddings


class BinaryEmbeddingCuda(PreparedLayer, torch.nn.Module):
    """A table [V, D] of signs with a scale a row; runs on any device.

    weight (float, until prepare_params), qweight uint8 [V, ceil(D / 8)], buffer scale_w [V, 1] of `dtype`.
    forward: indices of any shape -> [..., D].
    """

    def __init__(self, *args, num_embeddings, embedding_dim, padding_idx=None, dtype=torch.float, device=None, **kwargs):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.padding_idx = _checked_padding("BinaryEmbeddingCuda", padding_idx, num_embeddings)
        self.init_weight(device)

    def init_weight(self, device=None):
        """weight ~ N(0, 1), qweight and scale_w zero."""
        v, d = self.num_embeddings, self.embedding_dim
        self.weight = torch.nn.Parameter(torch.randn(v, d, device=device), requires_grad=False)
        self.qweight = BinaryEmbeddingParameter(
            torch.zeros(v, (d + 7) // 8, dtype=torch.uint8, device=device),
            embedding_dim=d,
            padding_idx=self.padding_idx,
        )
        self.register_buffer("scale_w", torch.zeros(v, 1, dtype=self.dtype, device=device))

    def reset_parameters(self, weight):
        """Takes a float table [V, D], to be packed by the next prepare_params."""
        if weight.shape != (self.num_embeddings, self.embedding_dim):
            raise ValueError(f"reset_parameters: weight is {list(weight.shape)}, expected the table's shape")
        self.weight = torch.nn.Parameter(weight.detach().float(), requires_grad=False)
        self.qweight.detach().zero_()
        self.scale_w.zero_()

    def prepare_params(self):
        """Packs W - mean(W): signs, and mean|.| of each row as its scale; the padding row has scale 0. Then drops weight.

        A table and scales that were loaded are kept. A second call does nothing.
        """
        if getattr(self, "weight", None) is None:
            return
        if not self.qweight.detach().any() or not self.scale_w.any():
            with torch.no_grad():
                centred = self.weight.float() - self.weight.float().mean()
                if self.padding_idx is not None:
                    centred[self.padding_idx] = 0
                self.qweight.data = tensor_to_packed_uint8(centred)
                self.scale_w.copy_(centred.abs().mean(1, keepdim=True))
        self.qweight.requires_grad = self.training
        self.weight = None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        given = state_dict.get(prefix + "weight")
        if given is None and prefix + "qweight" in state_dict:
            self.weight = None
        elif given is not None and self.weight is None:
            self.weight = torch.nn.Parameter(torch.empty_like(given, device=self.scale_w.device), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input):
        if self.weight is not None:
            self.prepare_params()
        return BinaryEmbeddingForward.apply(input, self.qweight, self.scale_w, self.embedding_dim, self.training)

    def extra_repr(self):
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, padding_idx={self.padding_idx}"


class BinaryEmbeddingBag(torch.nn.Module):
    """The majority of the rows of a bag, from a bool table [V, D]: indices [..., L] -> [..., D] of `dtype`, +1 or -1."""

    def __init__(self, *args, num_embeddings, embedding_dim, padding_idx=None, dtype=torch.float, device=None, **kwargs):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.padding_idx = _checked_padding("BinaryEmbeddingBag", padding_idx, num_embeddings)
        table = torch.rand(num_embeddings, embedding_dim, device=device) < 0.5
        if self.padding_idx is not None:
            table[self.padding_idx] = False
        self.weight = BinaryEmbeddingParameter(table, embedding_dim=embedding_dim, padding_idx=self.padding_idx)

    def forward(self, input):
        return BinaryEmbeddingBagForward.apply(input, self.weight, self.training, self.dtype)

    def extra_repr(self):
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, padding_idx={self.padding_idx}"


def sparse_update_embedding_qweight(qweight, grad_weight, active_indices, mode="descent"):
    """Moves the active rows of a packed table in place: "descent" sets bit := NOT gradient bit, "xor" bit ^= gradient bit.

    qweight: uint8 [V, P]; grad_weight: its packed gradient, dense or sparse; active_indices: any shape.
    """
    if grad_weight.is_sparse:
        rows, grad_weight = _active(grad_weight, None)
        if active_indices is not None:
            wanted = torch.isin(rows, active_indices)
            rows, grad_weight = rows[wanted], grad_weight[wanted]
        active_indices = rows
    columns = getattr(qweight, "embedding_dim", None)
    functional.sparse_update_embedding_qweight(qweight.detach(), grad_weight, active_indices, mode, columns)
    return qweight
