"""Small language models on the text of Matthew, of the parts that no image network exercises: attention whose products are 4-bit
or signs, and tables of few bits."""

import math

import pytest
import torch
import torch.nn.functional as F

import subbyte
from subbyte import PackedWeight, nn

LENGTH, WIDTH = 24, 64


class CharacterModel(torch.nn.Module):
    """Embedding, one block of attention, one hidden layer, head. Position l sees positions up to l."""

    def __init__(self, table, attention):
        super().__init__()
        self.table, self.attention = table, attention
        self.position = torch.nn.Parameter(0.3 * torch.randn(LENGTH, WIDTH))
        self.before, self.after = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.hidden = torch.nn.Sequential(torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.GELU(), torch.nn.Linear(2 * WIDTH, WIDTH))
        self.head = torch.nn.Linear(WIDTH, 128)

    def forward(self, ids):
        x = self.table(ids) + self.position
        if isinstance(self.attention, nn.BinaryAttention):
            seen = torch.ones(LENGTH, LENGTH, device=ids.device).tril()[None, None].expand(ids.shape[0], 1, -1, -1)
            y = self.attention(self.before(x), seen)[0]
        else:
            y = self.attention(self.before(x), is_causal=True)
        x = x + y
        return self.head(x + self.hidden(self.after(x)))


def attention_of(kind):
    if kind == "quantized":
        return nn.QuantizedAttention(WIDTH, 4)
    return nn.BinaryAttention(WIDTH, WIDTH, 4, dropout=0.0, binary_scores=True)


@pytest.mark.parametrize("attention,bits", [("quantized", 4), ("binary", 2)])
def test_attention_and_a_table_of_few_bits_learn_a_text(matthew, attention, bits):
    ids = torch.tensor([ord(c) % 128 for c in matthew])
    windows = ids.unfold(0, LENGTH + 1, 1)
    table = nn.Embedding.from_float(torch.nn.Embedding(128, WIDTH), bits=bits, group_size=WIDTH)
    model = CharacterModel(table, attention_of(attention))
    before = table.weight.codes.clone()
    optimizer = subbyte.optim.PackedAdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    losses = []
    for _ in range(120):
        batch = windows[torch.randint(len(windows), (32,))]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    frequencies = torch.bincount(ids, minlength=128) / len(ids)
    unigram = -(frequencies * frequencies.clamp_min(1e-9).log()).sum().item()
    last = sum(losses[-10:]) / 10
    assert losses[0] > math.log(128) - 0.5 and last < unigram - 0.3, (losses[0], last, unigram)
    # The rows of the characters that occur have moved, packed all the while; the others have not.
    assert isinstance(table.weight, PackedWeight) and table.weight.bits == bits
    occurs = frequencies > 0
    moved = (table.weight.codes != before).any(1)
    assert moved[occurs].float().mean() > 0.9 and not moved[~occurs].any()
    # Scores, context and projections as integers alone give the bits of the trained model.
    model.eval()
    with torch.no_grad():
        logits = model(windows[:4, :-1])
        for module in model.modules():
            if module is not model.attention and hasattr(module, "generate_quantized_weight"):
                module.generate_quantized_weight(qweight_only=True)
        assert torch.equal(model(windows[:4, :-1]), logits)
