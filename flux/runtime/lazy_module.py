"""A module that is checked against its files when it is created and loaded when it is called."""

import copy
import gc
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flux.errors import UserError
from flux.runtime.changes import Changes
from flux.runtime.compilation import compile_blocks
from flux.runtime.memory_plan import WeightSizes, mapped_bytes, matrix_size, measure_weights
from flux.runtime.streaming import all_tensors, pinned_budget, stream, unstream
from flux.weights.load import init_empty, load_module
from flux.weights.mapping import file_states, require_unchanged
from flux.weights.quantization import FP8_DTYPES, QuantizedLinear, enable_fp8_matmul
from flux.weights.quantization.quantize import dequantized, quantize_

CPU = torch.device("cpu")
M = TypeVar("M", bound=nn.Module)
OnLoad = Callable[[Any], Iterable[RemovableHandle] | None]


class LazyModule(Generic[M]):
    """`lazy()` returns the module and loads it if needed; `release()` frees its weights.

    `build(config)` creates the module. `block_lists`: paths of its lists of blocks, in the order of
    use. Only a module with such lists is quantized, compiled or streamed. `quantize`: a scheme of
    `quantization.quantize`. `repeated`: the module runs many times in a row, so that blocks which
    are streamed are pinned where the host has room. `adapt`: changes the loaded module, for example
    `runtime.fast.fast_transformer`. `load_options`: those of `load_module`.
    """

    def __init__(
        self,
        build: Callable[..., M],
        config: Any,
        files: Sequence[Path],
        *,
        device: torch.device,
        dtype: torch.dtype,
        block_lists: Sequence[str] = (),
        quantize: str | None = None,
        fp8_matmul: bool = False,
        compile: bool = False,
        repeated: bool = False,
        adapt: Callable[..., nn.Module] | None = None,
        check_finite: bool = False,
        **load_options: Any,
    ) -> None:
        self.build, self.config, self.files = build, config, files
        self.device, self.dtype = device, dtype
        self.block_lists, self.load_options = block_lists, load_options
        self.quantize = quantize if block_lists else None
        self.fp8_matmul, self.compile, self.adapt = fp8_matmul, compile, adapt
        self.repeated = repeated
        self.module: M | None = None
        self.transform: Callable[..., None] | None = None
        self.transformed: frozenset[str] = frozenset()  # paths of the modules it changes
        self.divide: Callable[[nn.Module], None] | None = None
        self.resident: int | None = None  # bytes of blocks on the device; None: not streamed
        self.dropped: list[str] = []  # paths of the submodules that `drop_submodules` removed
        # what is done to the module after each load, with the handles of the present module's hooks
        self.loaders: dict[object, tuple[OnLoad, list[RemovableHandle]]] = {}
        self.known: Changes | None = None  # hooks and modules that each load makes
        self.lost: Changes | None = None  # of the last module, beyond those
        self.states = file_states(files)
        # UserError if a file is wrong
        shapes = self._load(CPU if check_finite else torch.device("meta"), None, check_finite)
        has_float8 = any(tensor.dtype in FP8_DTYPES.values() for tensor in all_tensors(shapes))
        if device.type == "mps" and has_float8:
            raise UserError(
                f"{files[0]}: is in float8, which Apple's GPUs do not have. "
                'Use a GGUF file, or `device="cpu"`.'
            )
        self.shapes = shapes.to("meta")  # shapes and dtypes, quantized as in the files

    def __call__(self) -> M:
        self.require_unchanged()
        if self.module is not None and self.dropped:
            self._restore_submodules(self.module)
        if self.module is None:
            self._warn_of_lost_changes()
            # autograd cannot use tensors that were made in inference mode
            with torch.inference_mode(False), torch.no_grad():
                module = self._prepare()
            for key, (function, _) in self.loaders.items():
                self.loaders[key] = function, list(function(module) or ())
            self.module, self.known = module, Changes(module)
        return self.module

    def __getattr__(self, name: str) -> Any:
        hint = ""
        if hasattr(self.__dict__.get("shapes"), name):
            hint = f": call it first, as in `pipe.transformer().{name}`"
        raise AttributeError(f"a LazyModule has no attribute {name!r}{hint}")

    def require_unchanged(self) -> None:
        """Raise UserError if a file was changed since it was checked: the weights may be mapped."""
        require_unchanged(self.states, mapped=True)

    def release(self) -> None:
        """Free the weights."""
        if self.module is not None and self.known is not None:
            self.lost = Changes(self.module).since(self.known)
        self.module, self.dropped = None, []
        if self.compile:
            gc.collect()  # a compiled block refers to itself

    def set_transform(
        self, transform: Callable[..., None] | None, paths: Iterable[str] = ()
    ) -> None:
        """Apply `transform` to the module after each load, instead of an earlier transform.

        `paths`: of the modules whose weights it changes; quantized ones are dequantized first. With
        `quantize`, the transform receives the callback `each` that `quantize_` describes.
        """
        if transform or self.transform:
            self.transform, self.transformed = transform, frozenset(paths)
            self.release()

    def set_divide(self, divide: Callable[[nn.Module], None]) -> None:
        """Apply `divide` to the module after each load, before it comes to the device.

        It leaves a part of the weights to other processes. If it has a method `sizes`, that returns
        the sizes of the part; else it divides a module on the meta device, which is measured.
        UserError, here, if the weights cannot be divided.
        """
        if self.is_quantized:
            raise UserError(
                f"parallel: the quantized weights of {self.files[0].name} cannot be divided over "
                "processes. Divide the tokens: context; or use a file in bfloat16."
            )
        if self.compile:
            raise UserError(
                "compile: is not supported with weights that are divided over processes. Leave "
                "`compile` out, or divide the tokens: context."
            )
        self.divide = divide
        self.release()

    @property
    def is_quantized(self) -> bool:
        """Whether weights are held in fewer bits, as in the files or by `quantize`."""
        layers = self.shapes.modules()
        return bool(self.quantize) or any(isinstance(each, QuantizedLinear) for each in layers)

    def on_load(self, function: OnLoad) -> Callable[[], None]:
        """Call `function(module)` now if the module is loaded, and whenever it is loaded anew.

        That happens between stages with `offload`, and after a LoRA. The module is complete then:
        merged, quantized, on its device; with `offload="block"`, its blocks are on the host. The
        function may register hooks, replace functions or add modules. It may return the handles of
        its hooks.

        Return a function that ends this: it removes the hooks of these handles or, if there are
        none, releases the module, which then comes back without the changes.
        """
        key, handles = object(), []
        if self.module is not None and self.known is not None:
            before = Changes(self.module)
            handles = list(function(self.module) or ())
            self.known.add(Changes(self.module).since(before))
        self.loaders[key] = function, handles
        return partial(self._end_on_load, key)

    def _end_on_load(self, key: object) -> None:
        if key in self.loaders:
            _, handles = self.loaders.pop(key)
            for handle in handles:
                handle.remove()
            if not handles:
                self.release()

    def _warn_of_lost_changes(self) -> None:
        if self.lost is not None and (what := self.lost.describe()):
            warnings.warn(
                f"{self.files[0].name} was loaded anew, without {what} of before: make them "
                "in a function that `on_load` gets",
                stacklevel=3,
            )
        self.lost = None

    def stream(self, resident: int | None) -> None:
        """Stream the blocks, all but `resident` bytes of them; None: do not stream.

        Release what is loaded otherwise.
        """
        if resident != self.resident:
            self.resident = resident
            self.release()

    def drop_submodules(self, kind: type[nn.Module]) -> M:
        """Return the module without its submodules of a type; the next call brings them back."""
        paths = [path for path, part in self.shapes.named_modules() if isinstance(part, kind)]
        module = self()
        if self.resident is None:
            _remove(module, paths)
        else:  # smaller blocks: more of them fit
            _remove(unstream(module, self.block_lists), paths)
            self._stream(module)
        self.dropped = paths
        return module

    def meta_module(self) -> Any:
        """Return a new module without weights, not quantized."""
        return init_empty(lambda: self.build(self.config))

    @property
    def weight_sizes(self) -> WeightSizes:
        """Bytes of the weights in the format in which they will be held."""
        shapes = self.shapes
        measured = None if hasattr(self.divide, "sizes") else self.divide
        if self.quantize or self.transformed or measured:
            shapes = copy.deepcopy(shapes)
        if self.quantize:
            quantize_(shapes, self.quantize)
        else:
            for path in self.transformed:
                layer = shapes.get_submodule(path)
                if isinstance(layer, QuantizedLinear):
                    shapes.set_submodule(path, dequantized(layer, self.dtype))
        if measured:
            measured(shapes)
        sizes = measure_weights(shapes, self.block_lists, self.dtype, self._replaced)
        sizes = replace(sizes, merging=self._merging_bytes)
        return sizes if self.divide is measured else self.divide.sizes(sizes)  # type: ignore

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in the format in which they will be held."""
        return self.weight_sizes.total

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory in use; 0 if streamed, since no stage leaves its buffers there."""
        if self.module is None or self.resident is not None:
            return 0
        held = sum(local(tensor).nbytes for tensor in all_tensors(self.module))
        if self.device.type == "cpu":
            held -= mapped_bytes(self.shapes, self.dtype, self._replaced)
        return max(0, held)

    @property
    def _replaced(self) -> frozenset[str] | None:
        """Paths of the modules whose weights are no longer those of the files; None: all."""
        if self.quantize or self.divide or (self.transform and not self.transformed):
            return None
        return self.transformed

    @property
    def _merging_bytes(self) -> int:
        """Bytes to merge into the largest matrix: three float32 copies (DoRA) and the result."""
        sizes = [matrix_size(self.shapes.get_submodule(path)) for path in self.transformed]
        return max(sizes, default=0) * (3 * 4 + self.dtype.itemsize)

    def _prepare(self) -> Any:
        """Load, transform, quantize and compile; move to the device, or stream."""
        target = self.device if self.resident is None and self.divide is None else CPU
        if self.quantize:
            # weights stay mapped until they are quantized, and are rounded once; but a LoRA is
            # merged in the dtype of the computation
            module = self._load(CPU, self.dtype if self.transform else None)
            quantize_(module, self.quantize, device=target, transform=self.transform)
            module.to(dtype=self.dtype)
        else:
            module = self._load(target, self.dtype)
            if self.transform:
                self.transform(module)
        if self.fp8_matmul:
            enable_fp8_matmul(module, self.device)
        if self.adapt:
            self.adapt(module)
        if self.divide:
            self.divide(module)
        if self.compile:
            compile_blocks(module, self.block_lists)
        if self.resident is not None:
            return self._stream(module)
        return module.to(self.device)

    def _stream(self, module: Any) -> Any:
        pinned = pinned_budget(self.device) if self.repeated else 0
        return stream(module, self.block_lists, self.device, self.resident or 0, pinned)

    def _restore_submodules(self, module: nn.Module) -> None:
        """Load the dropped submodules alone; or release all, if a part cannot be made alone."""
        if self.transform or self.divide or self.resident is not None:
            return self.release()
        mapped = self._load(CPU, None)
        for path in self.dropped:
            module.set_submodule(path, mapped.get_submodule(path).to(self.device, self.dtype))
        self.dropped = []

    def _load(
        self, device: torch.device, dtype: torch.dtype | None, check_finite: bool = False
    ) -> M:
        require_unchanged(self.states)
        module = self.meta_module()
        options = dict(device=device, dtype=dtype, check_finite=check_finite, **self.load_options)
        load_module(module, self.files, **options)
        return module


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is sharded over processes."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _remove(module: nn.Module, paths: Sequence[str]) -> None:
    for path in paths:
        module.set_submodule(path, nn.Identity())
