"""A GGUF file as a transformers model whose weights stay as the file packs them.

GGUF files of Llama-type models keep the rows of the query and key projections in another order than transformers: within a
head the two halves of the rotary pairs are interleaved. Rows are whole byte runs of the packed form, so undoing that moves
bytes and changes no value. transformers itself is needed only here; it supplies the configuration and the modules.
"""

import re
from pathlib import Path

import torch

from .checkpoint import FormatError, TensorFile, load_weights_
from .functional import permute_rows
from .gguf import load_gguf
from .packed_weight import PackedWeight

_FIXED_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# Derived by transformers from the configuration.
_IGNORED = ("rope_freqs.weight",)


def rotary_row_order(rows, heads):
    """GGUF row that is row i of transformers' matrix: [heads, rows / heads / 2, 2] read along the last axis first."""
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"rotary_row_order: {rows} rows do not divide into {heads} heads of pairs")
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def llama_tensors(file):
    """What load_gguf read of a Llama-type file, by transformers' names, with the rows of q_proj and k_proj put back."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"llama_tensors: the file's architecture is {architecture!r}, expected 'llama'")
    heads = int(file.metadata["llama.attention.head_count"])
    kv_heads = int(file.metadata.get("llama.attention.head_count_kv", heads))
    out = TensorFile(metadata=file.metadata)
    for name, tensor in file.items():
        if name in _IGNORED:
            continue
        if name in _FIXED_NAMES:
            out[_FIXED_NAMES[name]] = tensor
            continue
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in _BLOCK_NAMES:
            raise ValueError(f"llama_tensors: tensor '{name}' has no place in a Llama model")
        if match[2] in ("attn_q", "attn_k"):
            order = rotary_row_order(tensor.shape[0], heads if match[2] == "attn_q" else kv_heads)
            tensor = permute_rows(tensor, order) if isinstance(tensor, PackedWeight) else tensor.index_select(0, order)
        out[f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"] = tensor
    return out


def model_from_gguf(path, dtype=torch.float32, device="cpu"):
    """A transformers causal language model on the packed weights of a Llama-type GGUF file, in evaluation mode.

    Only what the file holds as floats (norms) is converted to `dtype`, which is also the type of activations. Needs
    transformers and the gguf package, which read the configuration. The tokenizer:
    AutoTokenizer.from_pretrained(folder, gguf_file=name).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    tensors = llama_tensors(load_gguf(path))
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight and "lm_head.weight" not in tensors:
        raise FormatError(f"{path}: has no output.weight, and its configuration does not tie it to the embedding")
    return load_weights_(model, tensors).eval()
