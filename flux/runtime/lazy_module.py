"""One network and its files: found fit when it is made, loaded when it is called for, in the way that memory allows."""

import copy
import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from flux.errors import UserError
from flux.runtime.memory_plan import WeightSizes, mapped_bytes, measure_weights
from flux.runtime.streaming import stream, tensors_of, unstream
from flux.weights.load import init_empty, load_module
from flux.weights.quantization import FP8, QuantizedLinear, enable_fp8_matmul
from flux.weights.quantization.quantize import dequantized, quantize_

CPU = torch.device("cpu")
GRAPHS = 64  # of one code, by all models and dtypes of a process: the third would meet torch's limit of 8, which is an error


class LazyModule:
    """`network()` is the module, loaded if it is not there; `release` lets it go.

    `lists`: paths of its lists of blocks, in the order of their use. How it is loaded, five attributes say, before it is:
    `change`, what LoRAs do to it; `compression`, a kind of `quantization.quantize`; `native_fp8`, whether float8 layers
    multiply in float8; `compiled`, each block on its own; `resident`, if its blocks are streamed to the device, how many
    bytes of them stay there.
    """

    def __init__(
        self,
        kind: Callable[..., nn.Module],
        config,
        files: Sequence[Path],
        *,
        device: torch.device,
        dtype: torch.dtype,
        lists: Sequence[str] = (),
        check_finite: bool = False,
        **options,
    ):
        self.kind, self.config, self.files, self.lists, self.options = (
            kind,
            config,
            files,
            lists,
            options,
        )
        self.device, self.dtype, self.module = device, dtype, None
        self.change: Callable[[nn.Module], None] | None = None
        self.changed: frozenset[str] = frozenset()
        self.compression: str | None = None
        self.native_fp8 = self.compiled = False
        self.resident: int | None = None
        self.missing: list[str] = []  # paths of what `without` took away
        checked = self._load(
            CPU, None, check_finite
        )  # maps the files and refuses what is wrong with them
        if device.type == "mps" and any(
            tensor.dtype in FP8.values() for tensor in tensors_of(checked)
        ):
            raise UserError(
                f"{files[0]} is in float8, which Apple's GPUs do not have: use a GGUF file, or --device cpu"
            )
        self.shapes = checked.to("meta")  # and types, quantised as in the files

    def __call__(self) -> nn.Module:
        if self.module is not None and self.missing:
            self._bring_back()
        if self.module is None:
            self.module = self._ready()
        return self.module

    def release(self) -> None:
        self.module, self.missing = None, []
        if self.compiled:
            gc.collect()  # a compiled block refers to itself

    def alter(self, change: Callable[[nn.Module], None] | None, paths: Iterable[str] = ()) -> None:
        """Have `change` made, in place of an earlier one, to what the files hold, whenever the network is loaded.

        `paths`: of the modules whose weights it changes; those that are quantised become whole. Where the network is to be
        compressed, `change` is given the `each` that `compress` describes.
        """
        if change or self.change:
            self.change, self.changed = change, frozenset(paths)
            self.release()

    def hold(self, resident: int | None) -> None:
        """Have its blocks streamed, or not; what is loaded already, in another way, is let go."""
        if resident != self.resident:
            self.resident = resident
            self.release()

    def without(self, kind: type[nn.Module]) -> nn.Module:
        """The module, less all parts of a kind: those have done their work, until it is called for again."""
        paths = [path for path, part in self.shapes.named_modules() if isinstance(part, kind)]
        module = self()
        if self.resident is None:
            remove(module, paths)
        else:  # what is left of the blocks is laid out anew: more of it can stay
            remove(unstream(module, self.lists), paths)
            stream(module, self.lists, self.device, resident=self.resident)
        self.missing = paths
        return module

    def on_meta(self) -> nn.Module:
        """Its modules and shapes, without weights, none quantised."""
        return init_empty(lambda: self.kind(self.config))

    @property
    def weights(self) -> WeightSizes:
        """Bytes of its weights, as they will be held."""
        held = copy.deepcopy(self.shapes) if self.compression or self.changed else self.shapes
        if self.compression:
            quantize_(held, self.compression)
        else:
            for path in self.changed:
                if isinstance(layer := held.get_submodule(path), QuantizedLinear):
                    held.set_submodule(path, dequantized(layer, self.dtype))
        sizes = measure_weights(held, self.lists, self.dtype, self._anew)
        return replace(sizes, merging=self._merging)

    @property
    def bytes(self) -> int:
        return self.weights.total

    @property
    def held(self) -> int:
        """Bytes of the device's memory that its weights take now; of a streamed network, which no stage leaves there, 0."""
        if self.module is None or self.resident is not None:
            return 0
        pages = (
            mapped_bytes(self.shapes, self.dtype, self._anew) if self.device.type == "cpu" else 0
        )
        return max(0, sum(tensor.nbytes for tensor in tensors_of(self.module)) - pages)

    @property
    def _anew(self) -> frozenset[str] | None:
        """Paths of the modules whose weights are not the files' any more; None: of all."""
        return None if self.compression or (self.change and not self.changed) else self.changed

    @property
    def _merging(self) -> int:
        """Bytes that it takes to change the largest of the matrices: three like it in float32, with DoRA, and the result."""
        layers = [self.shapes.get_submodule(path) for path in self.changed]
        largest = max(
            (
                layer.in_features * layer.out_features
                for layer in layers
                if hasattr(layer, "in_features")
            ),
            default=0,
        )
        return largest * (3 * 4 + self.dtype.itemsize)

    def _ready(self) -> nn.Module:
        """As it will be used."""
        streamed = self.resident is not None
        # what is compressed stays mapped until then, and is rounded once; LoRAs are merged in the dtype
        dtype = None if self.compression and not self.change else self.dtype
        module = self._load(CPU if streamed or self.compression else self.device, dtype)
        if self.compression:
            quantize_(
                module,
                self.compression,
                device=CPU if streamed else self.device,
                change=self.change,
            )
            module.to(dtype=self.dtype)
        elif self.change:
            self.change(module)
        if self.native_fp8:
            enable_fp8_matmul(module, self.device)
        if self.compiled:
            compile_blocks(module, self.lists)
        return (
            stream(module, self.lists, self.device, resident=self.resident)
            if streamed
            else module.to(self.device)
        )

    def _bring_back(self) -> None:
        if (
            self.change or self.resident is not None
        ):  # a part of a merge, or of a ring, is not made alone
            return self.release()
        mapped = self._load(CPU, None)
        for path in self.missing:
            self.module.set_submodule(path, mapped.get_submodule(path).to(self.device, self.dtype))
        self.missing = []

    def _load(
        self, device: torch.device, dtype: torch.dtype | None, check_finite: bool = False
    ) -> nn.Module:
        module = self.on_meta()
        load_module(
            module,
            self.files,
            device=device,
            dtype=dtype,
            check_finite=check_finite,
            **self.options,
        )
        return module


def compile_blocks(module: nn.Module, lists: Sequence[str]) -> None:
    """Each on its own: blocks of a kind are one code with other weights, so one graph serves all.

    Another size or batch takes one more, which then serves all of them.
    """
    import torch._dynamo.config as limits  # not above: it takes a second

    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
    for path in lists:
        for block in module.get_submodule(path):
            block.compile(fullgraph=True)


def remove(module: nn.Module, paths: Sequence[str]) -> None:
    for path in paths:
        module.set_submodule(path, nn.Identity())  # which has no weights
