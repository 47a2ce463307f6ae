"""Every operator of torch.ops.subbyte, found by introspection: opchecks, shape rule, compilation in one graph, autocast.

A new operator fails here until it has a case in CASES, or a reason in LOOKS_AT_VALUES.
"""

import pytest
import torch

import subbyte
from subbyte import PackedWeight, mpq
from subbyte import functional as F

ops = torch.ops.subbyte
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and subbyte.info()["has_cuda"] else [])
NAMES = sorted(
    {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("subbyte::")}
)
# What comes out depends on what index tensors or files hold: no fake tensors, no compilation.
LOOKS_AT_VALUES = {
    "checkpoint_load": "reads a file",
    "gguf_index": "reads a file",
    "gguf_tensor": "reads a file",
    "gptq_import": "g_idx and q_perm say how rows are cut into groups",
    "exl2_import": "q_groups say the widths",
    "exl2_import_map": "q_group_map says the widths",
    "export_columns": "perm and parent say where a group's words stand",
    "q_groups_of": "row_groups say the groups",
    "make_group_map": "q_groups say the rows",
    "rows_of_format": "takes no tensor",
    "raise_device_errors": "takes no tensor",
    "set_device_checks_wait": "takes no tensor",
    "gptq_pack_zeros": "refuses zeros that the layout cannot say",
    "pack_statistic": "refuses codes of more than four bits",
    "requantize_second_level": "keeps blocks that are exact",
}
HALF = "half"  # under autocast to bfloat16 the result is bfloat16
WIDEST = "widest"  # operands of two types: the wider one's
KEPT = "kept"  # types as without autocast


def randn(*shape, device, grad=False, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_(grad)


def cases(device):
    """name -> (arguments, keyword arguments, what autocast does)."""
    one = lambda v, grad=False: torch.tensor(v, device=device, requires_grad=grad)  # noqa: E731
    x, w = randn(2, 3, 13, device=device, grad=True), randn(5, 13, device=device)
    handle = torch.zeros((), device=device).expand(5, 13).detach().requires_grad_()
    weight = PackedWeight.from_float(w, bits=4, group_size=4)
    args = weight.packed_args
    fine = PackedWeight.from_float(w, format="ternary", group_size=4, residual_bits=6)
    signs = PackedWeight.from_float(w, bits=1, group_size=13)
    trits = torch.tensor([-1.0, 0.0, 1.0, 1.0, -1.0, 0.0, 1.0, 0.0, 1.0, -1.0, 1.0, 1.0, 0.0], device=device).repeat(4, 1)
    ternary = F.pack_ternary(trits, randn(4, device=device).abs())
    indices = torch.tensor([[0, 4], [4, 2]], device=device)
    rows, gy = torch.tensor([1, 3], device=device), randn(2, 2, 13, device=device)
    words = mpq.export(PackedWeight.from_float(randn(6, 32, device=device), bits=4, group_size=8), asym=False).qweight
    image, kernel = randn(2, 4, 5, 6, device=device, grad=True), randn(6, 2, 3, 2, device=device, grad=True)
    blocks = torch.ones(2, 3, 4, dtype=torch.uint8, device=device)
    conv = ([3, 2], [1, 2], [1, 0], [1, 1], 2)
    moment = lambda: torch.zeros(5, 13, device=device)  # noqa: E731
    grad = randn(5, 13, device=device)
    trained, wide = (args[0].clone(), args[1].clone(), None, args[3].clone(), *args[4:]), ops.widen(*args)
    return {
        "activation_quant": ((x,), {}, KEPT),
        "affine_adamw_": ((*trained, grad, ops.affine_state(*args), 0.1), {}, KEPT),
        "affine_state": (args, {}, KEPT),
        "binary_conv2d": ((image, kernel, None, None, one(0.5, True), one(0.2), None, *conv, -1), {}, KEPT),
        "binary_linear": ((x, w.requires_grad_(), None, None, one(0.5, True), one(0.2)), {}, KEPT),
        "binary_matmul": ((x, randn(2, 4, 13, device=device), one(0.5), one(0.2)), {}, WIDEST),
        "bitlinear": ((x, trits, randn(4, device=device)), {}, HALF),
        "codes_to_columns": ((args[0], "uint4", 13), {}, KEPT),
        "columns_to_codes": ((words, "uint4", 32), {}, KEPT),
        "dequantize": (args, {}, KEPT),
        "dequantize_fine": ((*fine.packed_args, fine.residual, 6), {}, KEPT),
        "embedding": ((indices, handle, *args), {}, KEPT),
        "embedding_add_": ((args[0].clone(), *args[1:], rows, randn(2, 13, device=device)), {}, KEPT),
        "embedding_bag": ((indices, None, handle, *args), {}, KEPT),
        "embedding_grad_packed": ((gy, indices, signs.scales, 5), {}, KEPT),
        "embedding_grad_rows": ((gy, indices, 5), {}, KEPT),
        "embedding_grad_weight": ((gy, indices, 5), {}, KEPT),
        "embedding_update_": ((signs.codes.clone(), rows, signs.codes[:2].clone(), 13), {}, KEPT),
        "encode": ((w.detach(), *args[1:6], 4), {}, KEPT),
        "encode_": ((args[0].clone(), w.detach(), *args[1:6], 4), {}, KEPT),
        "encode_fine_": ((fine.codes.clone(), *fine.packed_args[1:], fine.residual.clone(), 6, w.detach()), {}, KEPT),
        "expand_second_level": ((blocks, randn(2, 3, 1, device=device), randn(2, 3, 1, device=device), 10, 4), {}, KEPT),
        "gptq_unpack_zeros": ((torch.tensor([[7, -9]], dtype=torch.int32, device=device), 4, 11), {}, KEPT),
        "linear": ((x, handle, *args, None), {}, HALF),
        "linear_a8": ((x, handle, *args, None), {}, HALF),
        "linear_grad_input": ((randn(2, 5, device=device), *args), {}, KEPT),
        "linear_grad_weight": ((randn(2, 5, device=device), randn(2, 13, device=device)), {}, KEPT),
        "mpq_apply_": ((args[0].clone(), args[1], None, args[3].clone(), *args[4:], None, grad * 0.1, 0.01, True), {}, KEPT),
        "mpq_moments_": ((moment(), moment(), grad, 0.9, 0.99, 1e-6), {}, KEPT),
        "multi_ternary_linear": ((x, None, *ternary.packed_args, 2), {}, HALF),
        "pack": ((torch.ones(3, 13, dtype=torch.uint8, device=device), "uint3"), {}, KEPT),
        "pack_base3": ((trits,), {}, KEPT),
        "packed_adamw_": ((args[0].clone(), *args[1:], grad, moment(), None, moment(), None, 0.1), {}, KEPT),
        "packed_sgd_": ((args[0].clone(), *args[1:], grad, moment(), None, 0.1, 0.9), {}, KEPT),
        "packed_sign_": ((args[0].clone(), *args[1:], grad, moment(), None, 0.1), {}, KEPT),
        "quantize": ((w.detach(), "uint4", 4), {}, KEPT),
        "quantized_conv2d": ((image, kernel, None, one(0.5, True), one(0.2, True), None, None, *conv), {}, HALF),
        "quantized_linear": ((x, w, None, one(0.5, True), one(0.2, True)), {}, HALF),
        "quantized_matmul": ((x, randn(2, 4, 13, device=device, grad=True), one(0.5, True), one(0.2)), {}, HALF),
        "regrid_": ((*trained, *wide[:2]), {}, KEPT),
        "relayout": ((signs.codes, "sign", "bstc", 5, 13), {}, KEPT),
        "ternarize": ((w,), {}, KEPT),
        "ternary_decompose": ((w.detach(), 2), {}, KEPT),
        "unpack": ((args[0], "uint4", 13), {}, KEPT),
        "unpack_base3": ((F.pack_ternary_base3(trits)[0], [4, 13]), {}, KEPT),
        "unpack_statistic": ((torch.ones(2, 3, dtype=torch.uint8, device=device),), {}, KEPT),
        "widen": (args, {}, KEPT),
    }


CASES = sorted(cases("cpu"))


def tensors(result):
    return [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)]


def fresh(args, requires_grad=None):
    """The same arguments in storage of their own, since in-place operators write to theirs."""

    def copied(t):
        if not isinstance(t, torch.Tensor):
            return t
        return t.detach().clone().requires_grad_(t.requires_grad if requires_grad is None else requires_grad)

    return [copied(a) for a in args]


def test_every_operator_has_a_case_or_a_reason():
    assert sorted(CASES + list(LOOKS_AT_VALUES)) == NAMES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, device):
    args, kwargs, _ = cases(device)[name]
    torch.library.opcheck(getattr(ops, name).default, args, kwargs)


@pytest.mark.parametrize("name", CASES)
def test_the_shape_rule_needs_no_data(name):
    args, kwargs, _ = cases("cpu")[name]
    real = tensors(getattr(ops, name)(*fresh(args), **kwargs))
    if name in ("embedding_grad_rows", "embedding_grad_packed"):
        return  # how many rows are touched is in the data; opcheck sees the fake tensors of unknown size
    fake = tensors(getattr(ops, name)(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in fresh(args)], **kwargs))
    describe = lambda t: (t.dtype, t.shape, t.stride())  # noqa: E731
    assert all(t.device.type == "meta" for t in fake)
    assert [describe(t) for t in real] == [describe(t) for t in fake]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_compiles_in_one_graph(name, device):
    args, kwargs, _ = cases(device)[name]
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]

    def function(*values):
        result = getattr(ops, name)(*values, **kwargs)
        return result, [v for v in values if isinstance(v, torch.Tensor)]

    torch._dynamo.reset()
    eager, compiled = function(*fresh(args)), torch.compile(function, fullgraph=True, backend="aot_eager")(*fresh(args))
    for a, b in zip(tensors(eager[0]) + eager[1], tensors(compiled[0]) + compiled[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_autocast(name, device):
    args, kwargs, kind = cases(device)[name]
    plain = tensors(getattr(ops, name)(*fresh(args, False), **kwargs))
    with torch.autocast(device, torch.bfloat16):
        cast = tensors(getattr(ops, name)(*fresh(args, False), **kwargs))
    if kind == HALF:
        assert [t.dtype for t in cast] == [torch.bfloat16] and cast[0].isfinite().all()
        spread = plain[0].double().std()
        assert ((cast[0].double() - plain[0].double()).abs() <= 0.3 * spread).all()
    else:
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    if kind == WIDEST:
        args = [args[0].detach().to(torch.bfloat16), *args[1:]]
        with torch.autocast(device, torch.bfloat16):
            assert getattr(ops, name)(*args, **kwargs).dtype == torch.float32
