"""SmolLM2-135M-Instruct and the text that it learns, as the program needs them, on machines with and without PyPI and Debian.

python -m examples.finetune_smollm2 --write FOLDER puts the tokens into a file there; with it and the GGUF file (--data, --gguf) the
program needs no tokenizer and no gguf package.
"""

import contextlib
import io
import os
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import subbyte

from .. import texts
from ..demo import models

TOKENS = "smollm2_kjv_tokens.safetensors"
# The demo measures on Matthew; Mark and Luke tell much of it again, often in the same words.
MEASURED, LEFT_OUT = ("Mat",), ("Mark", "Luke")


def tokenize():
    """{"learn": token numbers of all other books, "measure": of Matthew}, int32."""
    path = models.gguf_path()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that have no switch
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    found = [verse for verse in texts.verses() if verse.book not in LEFT_OUT]
    learn, measured = texts.without_books(found, MEASURED)
    return {
        name: tokenizer(text, return_tensors="pt").input_ids[0].int() for name, text in (("learn", learn), ("measure", measured))
    }


def tokens(folder=None):
    """What tokenize() gives, from the file in `folder` where one is named."""
    if folder is None:
        return tokenize()
    path = Path(folder) / TOKENS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: write it with python -m examples.finetune_smollm2 --write {folder}")
    return load_file(path)


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tokenize(), folder / TOKENS)
    return folder / TOKENS


def config_of(metadata):
    """The configuration that a GGUF file of the Llama family tells, without the gguf package."""
    head_dim = metadata["llama.embedding_length"] // metadata["llama.attention.head_count"]
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError("config_of: rotary embedding of a part of each head is not known here")
    return transformers.LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
    )


def load(path, dtype, packed):
    """The model of the file: on its own packed weights, or on dense ones of the same values."""
    tensors = subbyte.llama_tensors(subbyte.load_gguf(path))
    model = transformers.AutoModelForCausalLM.from_config(config_of(tensors.metadata), dtype=dtype)
    model.config.use_cache = False
    if packed:
        return subbyte.load_weights_(model, tensors)
    dense = {n: t.dequantize(dtype) if isinstance(t, subbyte.PackedWeight) else t.to(dtype) for n, t in tensors.items()}
    missing, unexpected = model.load_state_dict(dense, strict=False)
    if missing != ["lm_head.weight"] or unexpected:  # tied to the embedding
        raise ValueError(f"{path}: missing {missing}, unexpected {unexpected}")
    return model
