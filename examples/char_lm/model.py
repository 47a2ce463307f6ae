"""A small causal transformer over characters: pre-norm blocks, learnt positions, a head of its own.

Every matrix, tables included, is a Linear or an Embedding, so that subbyte.quantize_ packs all of them; biases and norms stay float.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, length, width = x.shape
        qkv = self.query_key_value(self.before_attention(x))
        q, k, v = qkv.view(b, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(b, length, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class CharacterModel(nn.Module):
    def __init__(self, characters, width=128, layers=4, heads=4, length=128):
        super().__init__()
        self.length = length
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        with torch.no_grad():
            for table in (self.token.weight, self.position.weight):
                table.normal_(std=width**-0.5)

    def forward(self, ids):
        """Logits [B, L, characters] of the character after each of ids [B, L]."""
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


@torch.inference_mode()
def sample(model, ids, count, temperature=0.7, seed=0):
    """ids [L] continued by `count` characters, drawn on the CPU: the same text for the same logits on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = model(ids[None, -model.length :])[0, -1].float().cpu() / temperature
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn.to(ids.device)])
    return ids
