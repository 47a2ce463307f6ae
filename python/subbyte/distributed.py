"""Packed models on several processes: every rank holds the same bits, before the first step and after each.

torch.nn.parallel.DistributedDataParallel averages the dense gradients of packed weights as it does any other. Two things it
cannot know. At the start it copies the *values* of rank 0, and a packed weight that is written to keeps its own scales, so the
other ranks would hold rounded copies. And every in-place update of a packed weight draws a seed for stochastic rounding, which
must be the same on all ranks. `DistributedDataParallel` here is torch's with both taken care of.
"""

import torch
import torch.distributed as dist

from .packed_weight import PackedWeight, packed_of, rounding_generator, set_rounding_generator, sharding

__all__ = ["DistributedDataParallel", "broadcast_", "fully_shard", "gather_weight", "share_rounding"]


def _group_rank_to_global(group, rank):
    return rank if group is None else dist.get_global_rank(group, rank)


def _describe(weights):
    return [
        (
            name,
            w.format,
            tuple(w.shape),
            w.group_size,
            w.residual_bits,
            {part: (str(t.dtype), tuple(t.shape)) for part, t in w.parts.items()},
        )
        for name, w in weights
    ]


@torch.no_grad()
def broadcast_(module, src=0, group=None):
    """Gives every rank the parameters and buffers of rank `src` of `group`, packed weights part by part, bit for bit.

    ValueError on the ranks whose packed weights have other names, formats or sizes than those of rank `src`.
    """
    source = _group_rank_to_global(group, src)
    packed = [(n, p) for n, p in module.named_parameters() if isinstance(p, PackedWeight)]
    packed += [(n, b) for n, b in module.named_buffers() if isinstance(b, PackedWeight)]
    expected = [_describe(packed)]
    dist.broadcast_object_list(expected, src=source, group=group)
    agree = torch.tensor(int(expected[0] == _describe(packed)), device=_device_of(module))
    dist.all_reduce(agree, dist.ReduceOp.MIN, group=group)  # all ranks stop together, none waits for the others
    if not agree:
        difference = [
            f"here {mine}, on rank {src} {theirs}" for mine, theirs in zip(_describe(packed), expected[0]) if mine != theirs
        ]
        raise ValueError(
            f"broadcast_: the packed weights differ between ranks: "
            f"{difference[0] if difference else f'{len(packed)} here, {len(expected[0])} on rank {src}'}"
        )
    for _, weight in packed:
        for part in weight.parts.values():
            _broadcast(part, source, group)
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, PackedWeight):
            _broadcast(tensor.detach(), source, group)
    return module


def _broadcast(tensor, source, group):
    sent = tensor.contiguous()  # what backends can send; the tensor itself where it is that already
    dist.broadcast(sent, source, group=group)
    if sent.data_ptr() != tensor.data_ptr():
        tensor.copy_(sent)


def _device_of(module):
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def share_rounding(src=0, group=None, device="cpu"):
    """Makes all ranks draw the same seeds of stochastic rounding from now on.

    Rank `src` gives the state of its generator: the one of set_rounding_generator, or a new one that PyTorch's default
    generator seeds. Returns this rank's generator, whose get_state() belongs into a checkpoint; `device` is one that the group's
    backend can send from.
    """
    generator = rounding_generator() or torch.Generator().manual_seed(int(torch.randint(0, 2**62, ())))
    state = generator.get_state().to(device)
    dist.broadcast(state, _group_rank_to_global(group, src), group=group)
    generator.set_state(state.cpu())
    set_rounding_generator(generator)
    return generator


class DistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
    """torch.nn.parallel.DistributedDataParallel (same arguments) whose packed weights start and stay the same on all ranks.

    Not together with an optimizer's update_in_backward(), which uses gradients before they are averaged: it averages them
    itself when it is given the process group.
    """

    def __init__(self, module, *args, process_group=None, **kwargs):
        if any(getattr(p, "_updated_in_backward", False) for p in module.parameters()):
            raise RuntimeError(
                "DistributedDataParallel: an optimizer updates these parameters during the backward pass, before gradients are "
                "averaged; give it the process group instead: update_in_backward(average_over=...)"
            )
        broadcast_(module, group=process_group)
        share_rounding(group=process_group, device=_device_of(module))
        super().__init__(module, *args, process_group=process_group, init_sync=False, **kwargs)
        for p in module.parameters():
            p._averaged_after_backward = True


def fully_shard(module, *, mesh=None, **kwargs):
    """torch.distributed.fsdp.fully_shard (FSDP2; same arguments) that keeps packed weights packed: every rank holds N / ranks
    rows.

    Codes, scales, zeros and offsets are gathered before a layer computes and freed after; gradients are averaged and scattered
    as dense rows. Optimizers of torch.optim step the rows of their rank, and so do those of subbyte.optim, fused. Every rank
    rounds its rows with random bits of its own, so that a sharded run has not the bits of one that is not.

    ValueError where the rows of a packed weight do not divide by the number of ranks; RuntimeError from torch's own
    fully_shard, which would put a dense float copy in place of the weight.
    """
    from torch.distributed.fsdp import fully_shard as torch_fully_shard
    from torch.distributed.tensor import DTensor

    # The last dimension of a mesh is the one that shards; another in front of it replicates.
    ranks = dist.get_world_size() if mesh is None else mesh.size(mesh.ndim - 1)
    for name, p in module.named_parameters():
        if isinstance(p, PackedWeight) and p.shape[0] % ranks:
            raise ValueError(f"fully_shard: '{name}' has {p.shape[0]} rows, expected a multiple of the {ranks} ranks")
    with sharding():
        sharded = torch_fully_shard(module, mesh=mesh, **kwargs)
    for p in module.parameters():
        if isinstance(p, DTensor) and isinstance(p._local_tensor, PackedWeight):
            p._local_tensor._shard = True
    return sharded


@torch.no_grad()
def gather_weight(parameter):
    """The whole PackedWeight of a parameter that fully_shard has cut into rows, on every rank; for subbyte.save, say."""
    local = packed_of(parameter)
    if local is None or local is parameter:
        raise ValueError(f"gather_weight: parameter is a {type(parameter).__name__}, expected a shard of a PackedWeight")
    mesh = parameter.device_mesh
    group = mesh.get_group(mesh.ndim - 1)

    def whole(part):
        pieces = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, part.contiguous(), group=group)
        return torch.cat(pieces)

    return local._map_parts(lambda part: part if part is local.perm else whole(part))
