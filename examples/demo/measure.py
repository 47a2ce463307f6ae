"""What the demo measures of a model: perplexity, speed, size, error."""

import math
import time

import torch
import torch.nn.functional as F


def device_of(model):
    return next(model.parameters()).device


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run, device, repeats):
    """Shortest of `repeats` calls, after one that is not counted."""
    best = math.inf
    for i in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        if i:
            best = min(best, time.perf_counter() - start)
    return best


@torch.inference_mode()
def logits_of(model, window):
    return model(window[None].to(device_of(model))).logits[0].float()


def perplexity(model, windows, on_window=lambda: None):
    """exp of the mean negative log likelihood of every token but the first of each window."""
    total, count = 0.0, 0
    for window in windows:
        logits = logits_of(model, window)
        total += F.cross_entropy(logits[:-1], window[1:].to(logits.device), reduction="sum").item()
        count += len(window) - 1
        on_window()
    return math.exp(total / count)


@torch.inference_mode()
def prefill_tokens_per_s(model, window, repeats=2):
    """A prompt of one window, logits of its last token."""
    ids = window[None].to(device_of(model))
    return ids.numel() / best_seconds(lambda: model(ids, logits_to_keep=1, use_cache=True), ids.device, repeats)


@torch.inference_mode()
def decode_tokens_per_s(model, window, tokens=24):
    """Greedy continuation of 32 tokens, one at a time with a key/value cache; the median over the tokens."""
    ids = window[None, :32].to(device_of(model))
    out = model(ids, use_cache=True, logits_to_keep=1)
    seconds = []
    for _ in range(tokens):
        _synchronize(ids.device)
        start = time.perf_counter()
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        _synchronize(ids.device)
        seconds.append(time.perf_counter() - start)
    return 1 / sorted(seconds[2:])[(tokens - 2) // 2]


@torch.inference_mode()
def matrices_tokens_per_s(modules, repeats=5):
    """One row of x through each matrix once, nothing else: the bound that the matrices alone put on decoding."""
    inputs = [
        torch.randn(1, m.in_features, generator=torch.Generator().manual_seed(i)).to(m.weight.device, m.weight.dtype)
        for i, m in enumerate(modules)
    ]

    def run():
        for module, x in zip(modules, inputs):
            module(x)

    return 1 / best_seconds(run, inputs[0].device, repeats)


@torch.inference_mode()
def generate(model, tokenizer, question, tokens):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device_of(model))
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def relative_error(weight, original):
    """Frobenius norm of the difference over that of the original."""
    return ((weight - original).norm() / original.norm()).item()
