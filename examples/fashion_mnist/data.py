"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017) from Debian's package dataset-fashion-mnist."""

import gzip
from pathlib import Path

import numpy
import torch

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def read_idx(path, folder=FOLDER):
    """A file of unsigned bytes in the IDX format: four magic bytes (0, 0, 8, dimensions), the sizes, the values."""
    path = folder / path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: apt-get install dataset-fashion-mnist")
    data = gzip.open(path).read()
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: starts with {data[:4].hex()}, expected an IDX file of bytes")
    shape = numpy.frombuffer(data, ">u4", data[3], 4)
    return torch.from_numpy(numpy.frombuffer(data, numpy.uint8, offset=4 + 4 * data[3]).reshape(shape).copy())


def load(device="cpu", folder=FOLDER):
    """{"train": (images, labels), "test": (images, labels)}: float32 [n, 1, 28, 28] of mean 0 and deviation 1, int64 [n]."""
    out = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        images = read_idx(f"{name}-images-idx3-ubyte.gz", folder).to(torch.float32).div_(255).sub_(0.2860).div_(0.3530)
        labels = read_idx(f"{name}-labels-idx1-ubyte.gz", folder).long()
        out[split] = (images.unsqueeze(1).to(device), labels.to(device))
    return out
