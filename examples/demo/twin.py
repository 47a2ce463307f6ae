"""A twin of a Llama-like model: the same function, its channels in another order.

The weights of SmolLM2's Q4_1 file lie on grids of 16 levels a group of 32 neighbouring inputs, so 4-bit min/max quantization with groups
of 32 finds those grids again and loses nothing: an exactness test, and no measure of quality. In the twin every input dimension of every
matrix is permuted, consistently through the network, so that a group of 32 holds channels that never shared a grid:

  residual stream      one permutation for the whole model: embedding, norms, inputs of q k v gate up, outputs of o down
  hidden MLP channels  one a layer: outputs of gate and up, inputs of down
  heads                one a layer: key/value heads, and the query heads within the group that shares one (grouped-query attention)
  value channels       one a key/value head: outputs of v, and the matching inputs of o in every query head of its group

Rotary embedding ties channel i of a query or key head to a fixed frequency, so channels within q and k stay where they are (they are
outputs: no group runs along them).
"""

import copy

import torch


def shuffled_twin(model, seed=0):
    twin = copy.deepcopy(model)
    config = twin.config
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randperm(config.hidden_size, generator=generator)
    with torch.no_grad():
        body = twin.model
        body.embed_tokens.weight.copy_(body.embed_tokens.weight[:, residual])
        if not config.tie_word_embeddings:
            twin.lm_head.weight.copy_(twin.lm_head.weight[:, residual])
        body.norm.weight.copy_(body.norm.weight[residual])
        for layer in body.layers:
            _shuffle_layer(layer, config, residual, generator)
    return twin


def _shuffle_layer(layer, config, residual, generator):
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    group = heads // kv_heads
    kv_order = torch.randperm(kv_heads, generator=generator)
    # Query head j of the twin is query head q_order[j] of the model; its group moves with its key/value head.
    q_order = torch.cat([kv * group + torch.randperm(group, generator=generator) for kv in kv_order])
    value_order = torch.stack(
        [torch.randperm(head_dim, generator=generator) for _ in range(kv_heads)]
    )  # by the model's kv head
    mlp = torch.randperm(config.intermediate_size, generator=generator)

    channel = torch.arange(head_dim)
    q_rows = (q_order[:, None] * head_dim + channel).flatten()
    k_rows = (kv_order[:, None] * head_dim + channel).flatten()
    v_rows = (kv_order[:, None] * head_dim + value_order[kv_order]).flatten()
    o_columns = (q_order[:, None] * head_dim + value_order[q_order // group]).flatten()

    attention, feed_forward = layer.self_attn, layer.mlp
    for weight, rows, columns in [
        (attention.q_proj.weight, q_rows, residual),
        (attention.k_proj.weight, k_rows, residual),
        (attention.v_proj.weight, v_rows, residual),
        (attention.o_proj.weight, residual, o_columns),
        (feed_forward.gate_proj.weight, mlp, residual),
        (feed_forward.up_proj.weight, mlp, residual),
        (feed_forward.down_proj.weight, residual, mlp),
    ]:
        weight.copy_(weight[rows][:, columns])
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.copy_(norm.weight[residual])
