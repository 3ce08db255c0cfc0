"""What tests of memory share: tiny pipelines, and the bytes of weights in memory, counted."""

import re
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.model_zoo import Zoo
from torch import nn

import flux
from flux.pipeline import Pipeline


class LoadedBytes:
    """The bytes of the weights of all modules created since, and still alive.

    Modules that only a cycle of references keeps alive are in memory, and counted.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        for name in ("__init__", "__setstate__"):  # the latter by copy.deepcopy
            patch.setattr(nn.Module, name, self.recorded(getattr(nn.Module, name)))

    def recorded(self, method):
        def call(module, *args, **kwargs):
            method(module, *args, **kwargs)
            self.modules.add(module)

        return call

    def __call__(self) -> int:
        found = {}
        for module in self.modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and not tensor.is_meta:
                    found[tensor.data_ptr()] = tensor.nbytes
        return sum(found.values())


def load(zoo: Zoo, name: str, dtype: torch.dtype = torch.float32, **options) -> Pipeline:
    zoo(name)
    return flux.load(name, weights=zoo.folder, device="cpu", dtype=dtype, **options)


def file_bytes(files: Iterable[Path], dtype: torch.dtype, without: str | None = None) -> int:
    """Return the bytes of all tensors in the files after a cast, except those that match."""
    total = 0
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if without is None or not re.search(without, name):
                    total += int(np.prod(file.get_slice(name).get_shape())) * dtype.itemsize
    return total


def generate(pipe: Pipeline, **options) -> bytes:
    """Return the pixels of one small image."""
    request = dict(prompts="a cat", width=64, height=80, steps=2, seed=3)
    (image,) = pipe(**request | options)
    return image.tobytes()
