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
) | _same(".mpq", "update_zeros", "qweight_update_fn")
_OPERATORS = {
    **_same(
        ".quant_operators",
        "nv_tensor_quant",
        "q8_quantization",
        "q4_quantization",
        "bit_set",
        "get_binary_row",
        "get_binary_col",
    ),
    **_same(".mpq", "gptq_style_unpacking", "gptq_style_zeros_packing"),
    "gptq_stype_unpacking": ".mpq:gptq_style_unpacking",  # its name until 0.2.5
}
_REPLACE = _same(
    ".layer_replacement",
    "quantize_linear_with_mpq_linear_cuda",
    "quantize_linear_with_q4_linear_cutlass",
    "quantize_linear_with_binary_linear_cuda",
    "collect_layers",
    "replace_layers",
    "get_mpq_config",
)

_EMBEDDING = _same(".embedding", "BinaryEmbeddingBag", "BinaryEmbeddingParameter", "BinaryEmbeddingCuda")

_NBIT_FUNCTIONS = _same(".nbit", "Q4LinearFunction", "Q4MatMulFunction")
_NBIT_LINEAR = {
    **_same(".nbit", "nBitLinearBase", "nBitLinearParameter"),
    **_same(".mpq", "MPQLinearBase", "MPQWeightParameter"),
}
_NBIT_CONV = _same(".nbit", "nBitConv2dBase", "nBitConvParameter")
_BINARY_LINEAR = _same(".binary", "BinaryLinear", "BinaryLinearBase", "BinaryLinearParameter")
_BINARY_CONV = _same(".binary", "BinaryConv2dBase", "BinaryConvParameter")
_MPQ_PACKING = _same(".mpq", "unpack_qweight", "pack_fp_weight", "make_group_map")

BITORCH_ENGINE_PATHS = {
    "bitorch_engine": _same(".extensions", "initialize", "torch_int_gradients_support"),
    "bitorch_engine.extensions": _same(".extensions", "EXTENSION_PREFIX"),
    "bitorch_engine.functions": {},
    "bitorch_engine.functions.cuda": _PACKING,
    "bitorch_engine.functions.cuda.functions": _PACKING,
    "bitorch_engine.layers": {},
    "bitorch_engine.layers.qembedding": {},
    "bitorch_engine.layers.qembedding.binary": _EMBEDDING,
    "bitorch_engine.layers.qembedding.binary.layer": {
        **_EMBEDDING,
        **_same(".embedding", "BinaryEmbeddingForward", "BinaryEmbeddingBagForward", "sparse_update_embedding_qweight"),
        "pad_embedding_dim": ".life_cycle",
    },
    "bitorch_engine.layers.qconv": {},
    "bitorch_engine.layers.qconv.binary": _BINARY_CONV,
    "bitorch_engine.layers.qconv.binary.cpp": _same(".binary", "BinaryConv2dCPP"),
    "bitorch_engine.layers.qconv.binary.cpp.layer": _same(".binary", "BinaryConv2dCPP"),
    "bitorch_engine.layers.qconv.binary.cutlass": _same(".binary", "BinaryConv2dCutlass"),
    "bitorch_engine.layers.qconv.binary.cutlass.layer": _same(".binary", "BinaryConv2dCutlass"),
    "bitorch_engine.layers.qconv.binary.layer": _BINARY_CONV,
    "bitorch_engine.layers.qconv.nbit": _NBIT_CONV,
    "bitorch_engine.layers.qconv.nbit.cutlass": _same(".nbit", "Q4Conv2dCutlass"),
    "bitorch_engine.layers.qconv.nbit.cutlass.layer": _same(".nbit", "Q4Conv2dCutlass"),
    "bitorch_engine.layers.qconv.nbit.layer": _NBIT_CONV,
    "bitorch_engine.layers.qlinear": _same(".binary", "QLinearInf"),
    "bitorch_engine.layers.qlinear.layer": _same(".binary", "QLinearInf"),
    "bitorch_engine.layers.qlinear.binary": _BINARY_LINEAR,
    "bitorch_engine.layers.qlinear.binary.cpp": _same(".binary", "BinaryLinearCPP"),
    "bitorch_engine.layers.qlinear.binary.cpp.layer": _same(".binary", "BinaryLinearCPP"),
    "bitorch_engine.layers.qlinear.binary.cuda": _same(".binary", "BinaryLinearCuda", "BMM"),
    "bitorch_engine.layers.qlinear.binary.cuda.bmm": _same(".binary", "BMM"),
    "bitorch_engine.layers.qlinear.binary.cuda.layer": _same(".binary", "BinaryLinearCuda", "BMM"),
    "bitorch_engine.layers.qlinear.binary.cutlass": _same(".binary", "BinaryLinearCutlass", "BinaryMatMul"),
    "bitorch_engine.layers.qlinear.binary.cutlass.layer": _same(
        ".binary", "BinaryLinearCutlass", "BinaryMatMul", "BinaryMatMulFunction"
    ),
    "bitorch_engine.layers.qlinear.binary.layer": _BINARY_LINEAR,
    "bitorch_engine.layers.qlinear.nbit": _NBIT_LINEAR,
    "bitorch_engine.layers.qlinear.nbit.cuda": _same(".mpq", "MPQLinearCuda", "MBWQLinearCuda"),
    "bitorch_engine.layers.qlinear.nbit.cuda.mbwq_layer": _same(".mpq", "MBWQLinearCuda"),
    "bitorch_engine.layers.qlinear.nbit.cuda.mpq_layer": _same(".mpq", "MPQLinearCuda", "MPQLinearCudaFunction"),
    "bitorch_engine.layers.qlinear.nbit.cuda.utils": _MPQ_PACKING,
    "bitorch_engine.layers.qlinear.nbit.cutlass": _same(".nbit", "Q4LinearCutlass", "Q4MatMul", "Q8LinearCutlass"),
    "bitorch_engine.layers.qlinear.nbit.cutlass.q4_layer": {
        **_same(".nbit", "Q4LinearCutlass", "Q4MatMul"),
        **_NBIT_FUNCTIONS,
    },
    "bitorch_engine.layers.qlinear.nbit.cutlass.q8_layer": _same(".nbit", "Q8LinearCutlass", "Q8LinearFunction"),
    "bitorch_engine.layers.qlinear.nbit.layer": _NBIT_LINEAR,
    "bitorch_engine.layers.qlinear.nbit.mps": _same(".mpq", "MPQLinearMlx"),
    "bitorch_engine.layers.qlinear.nbit.mps.mpq_layer": _same(".mpq", "MPQLinearMlx"),
    "bitorch_engine.layers.qmha": {},
    "bitorch_engine.layers.qmha.binary": _same(".binary", "BMHA"),
    "bitorch_engine.layers.qmha.binary.layer": _same(".binary", "BMHA", "LearnableBias"),
    "bitorch_engine.optim": _same("..optim", "DiodeMix", "GaLoreProjector"),
    "bitorch_engine.optim.diode_beta": _same("..optim", "DiodeMix"),
    "bitorch_engine.optim.galore_projector": _same("..optim", "GaLoreProjector"),
    "bitorch_engine.utils": {},
    "bitorch_engine.utils.convert": _REPLACE,
    "bitorch_engine.utils.model_helper": _PREPARE,
    "bitorch_engine.utils.quant_operators": _OPERATORS,
    "bitorch_engine.utils.safe_import": _same(".extensions", "import_extension"),
}

_TERNARY_FUNCTIONS = (
    "activation_quant",
    "bitlinear_python",
    "greedy_ternary_decomposition",
    "multi_ternary_linear_python",
)
_TERNARY_LAYERS = ("BitLinear", "MultiTernaryLinear", "convert_linear_to_bitlinear")
_TERNARY_QUANTIZERS = ("absmax_scale", "activation_quant", "ternary_quantize", "weight_to_ternary")
_TERNARY_PACKING = ("estimate_memory_savings", "pack_ternary_base3", "unpack_ternary_base3")

BITLINEAR_PATHS = {
    "bitlinear": _same(
        ".bitlinear", *_TERNARY_FUNCTIONS, *_TERNARY_LAYERS, *_TERNARY_QUANTIZERS[::2], "weight_to_ternary", *_TERNARY_PACKING
    ),
    "bitlinear.functional": _same(".bitlinear.functional", *_TERNARY_FUNCTIONS),
    "bitlinear.layers": _same(".bitlinear.layers", *_TERNARY_LAYERS),
    "bitlinear.packing": _same(".bitlinear.packing", *_TERNARY_PACKING),
    "bitlinear.quantization": _same(".bitlinear.quantization", *_TERNARY_QUANTIZERS),
}
