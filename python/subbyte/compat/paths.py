"""Every import path of the originals: path -> {name: where it is defined}.

"module" means the same name in that module of subbyte.compat, "module:name" another name. The paths are those of
bitorch_engine 0.2.6 and BitLinear 0.1.0.
"""


def _same(module, *names):
    return {name: module for name in names}


_PACKING = _same(
    ".cuda_functions",
    "fp32toint4",
    "tensor_to_packed_uint8",
    "unpack_uint8_tensor",
    "q4_pack_tensor",
    "q4_unpack_tensor",
    "q4_unpack_and_scaling_tensor",
)
_PREPARE = _same(
    ".life_cycle",
    "flatten_x",
    "unflatten_x",
    "pad_embedding_dim",
    "pad_last_2_dims_to_multiple_of_128",
    "binary_matmul_forward_post_processing",
    "prepare_bie_layers",
    "pack_bie_layers",
    "save_checkpoint",
    "load_checkpoint",
    "init_weight",
)
_OPERATORS = _same(
    ".quant_operators",
    "nv_tensor_quant",
    "q8_quantization",
    "q4_quantization",
    "bit_set",
    "get_binary_row",
    "get_binary_col",
)
_REPLACE = _same(
    ".layer_replacement",
    "collect_layers",
    "replace_layers",
    "get_mpq_config",
)

BITORCH_ENGINE_PATHS = {
    "bitorch_engine": _same(".extensions", "initialize", "torch_int_gradients_support"),
    "bitorch_engine.functions": {},
    "bitorch_engine.functions.cuda": _PACKING,
    "bitorch_engine.functions.cuda.functions": _PACKING,
    "bitorch_engine.layers": {},
    "bitorch_engine.utils": {},
    "bitorch_engine.utils.convert": _REPLACE,
    "bitorch_engine.utils.model_helper": _PREPARE,
    "bitorch_engine.utils.quant_operators": _OPERATORS,
    "bitorch_engine.utils.safe_import": _same(".extensions", "import_extension"),
}

BITLINEAR_PATHS = {}
