"""Count what a GPU would run for a function: kernels, bytes, FLOPs, and the time they would take.

The function runs on the meta device: no GPU is needed, and the counts are the same on every
machine. An operation that is composed of others on the meta device, but is one kernel in CUDA, is
counted as that kernel. Times are products of counts and of rates: their ratios mean more than
their sums, which leave out small matrices and the gaps between kernels.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import peak_bytes

Kind = Literal["matmul", "float8", "attention", "convolution", "elementwise"]
LAUNCH = 4e-6  # seconds from launch to launch, by PyTorch without a compiler
SHORTEST = 2e-6  # seconds of the shortest kernel
ROW = 0.7e-9  # seconds of a row of `rms_norm`: a block of threads each, however few its channels
PACKAGES = ("flux", "diffusers", "transformers")  # whose functions are named


@dataclass(frozen=True)
class GPU:
    """Rates that real kernels reach: FLOPs a second in bfloat16 where nothing else is said, B/s."""

    matmul: float
    float8: float
    float32: float  # products and convolutions, without TF32
    attention: float
    convolution: float
    bandwidth: float


# Shares of the dense peaks in NVIDIA's data sheets (H100 and H200 SXM: 989 TFLOP/s in bfloat16, 67
# in float32, 3.35 and 4.8 TB/s) and architecture papers (Ada, RTX Blackwell, with float32 sums:
# RTX 4090 165 TFLOP/s, 83, 1.01 TB/s; RTX 5090 210 TFLOP/s, 105, 1.79 TB/s): 80 % of a product,
# half of a convolution, 70 % of float32, 83 % of the bandwidth. Attention reaches 550 TFLOP/s on
# Hopper (FlashAttention-3, arXiv:2407.08608), and 85 % is assumed elsewhere.
GPUS = {
    "H200": GPU(790e12, 1500e12, 47e12, 550e12, 500e12, 4.0e12),
    "H100": GPU(790e12, 1500e12, 47e12, 550e12, 500e12, 2.8e12),
    "RTX 4090": GPU(132e12, 264e12, 58e12, 140e12, 83e12, 0.84e12),
    "RTX 5090": GPU(168e12, 335e12, 73e12, 178e12, 105e12, 1.49e12),
}


class Access(NamedTuple):
    """A part of memory that a kernel reads or writes."""

    storage: int  # the number of the allocation
    part: tuple  # offset, shape and strides
    nbytes: int
    size: int  # bytes of the allocation


@dataclass(frozen=True)
class Kernel:
    name: str
    site: str  # file and function of the call
    kind: Kind
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    flops: float = 0.0
    rows: int = 0  # of `rms_norm`
    float32: bool = False

    @property
    def nbytes(self) -> int:
        return sum(access.nbytes for access in (*self.reads, *self.writes))

    def seconds(self, gpu: GPU) -> float:
        if self.kind == "elementwise":
            return max(self.nbytes / gpu.bandwidth, ROW * self.rows, SHORTEST)
        rate = gpu.float32 if self.float32 else getattr(gpu, self.kind)
        return max(self.flops / rate, self.nbytes / gpu.bandwidth, SHORTEST)


# ------------------------------------------------------------------ totals


class Count(NamedTuple):
    """What is stored for a stage. Lower is better."""

    kernels: int
    elementwise: int  # bytes that kernels other than products read and write
    fused: int  # the same bytes if each chain of such kernels were one
    flops: float  # of products, attentions and convolutions
    peak: int  # bytes of activations at one time
    floor: float  # seconds of products, attentions and convolutions alone
    eager: float  # seconds of all kernels, or of their launches where these take longer
    compiled: float  # seconds if each chain of elementwise kernels were one


class Counted(NamedTuple):
    kernels: list[Kernel]
    peak: int

    def totals(self, gpu: GPU) -> Count:
        heavy = [kernel for kernel in self.kernels if kernel.kind != "elementwise"]
        elementwise = sum(k.nbytes for k in self.kernels if k.kind == "elementwise")
        fused, floor = fused_bytes(self.kernels), sum(k.seconds(gpu) for k in heavy)
        seconds = sum(kernel.seconds(gpu) for kernel in self.kernels)
        return Count(
            len(self.kernels),
            elementwise,
            fused,
            sum(kernel.flops for kernel in heavy),
            self.peak,
            floor,
            max(seconds, LAUNCH * len(self.kernels)),
            floor + fused / gpu.bandwidth,
        )

    def dearest_sites(self, gpu: GPU, count: int = 10) -> list[tuple[str, int, int, float]]:
        """Return site, kernels, bytes and seconds of the functions of the dearest light work."""
        sites: dict[str, list[Kernel]] = defaultdict(list)
        for kernel in self.kernels:
            if kernel.kind != "elementwise":
                continue
            sites[kernel.site].append(kernel)
        rows = [
            (site, len(found), sum(k.nbytes for k in found), sum(k.seconds(gpu) for k in found))
            for site, found in sites.items()
        ]
        return sorted(rows, key=lambda row: -row[3])[:count]


def fused_bytes(kernels: Iterable[Kernel]) -> int:
    """Return the bytes of elementwise work if every chain between two products were one kernel.

    It reads what it has not made, once, and writes what a later kernel reads.
    """
    kernels = list(kernels)
    last_read = {access.storage: i for i, k in enumerate(kernels) for access in k.reads}
    total, start = 0, 0
    ends = [i for i, kernel in enumerate(kernels) if kernel.kind != "elementwise"]
    for end in [*ends, len(kernels)]:
        chain = kernels[start:end]
        made = {access.storage for kernel in chain for access in kernel.writes}
        reads = {access for k in chain for access in k.reads if access.storage not in made}
        writes = {access for k in chain for access in k.writes}
        kept = [w for w in writes if last_read.get(w.storage, len(kernels)) >= end]
        total += distinct_bytes(reads) + distinct_bytes(kept)
        start = end + 1
    return total


def distinct_bytes(accesses: Iterable[Access]) -> int:
    """Return the bytes of the parts; those of one allocation may overlap."""
    parts: dict[int, list[Access]] = defaultdict(list)
    for access in accesses:
        parts[access.storage].append(access)
    return sum(min(sum(a.nbytes for a in found), found[0].size) for found in parts.values())


# ------------------------------------------------------------------ counting

FREE = {  # no kernel
    "_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "alias",
    "new_empty_strided", "detach", "_reshape_alias", "resize_", "set_",
}  # fmt: skip
WRITE_ONLY = {
    "arange", "zeros", "ones", "full", "zeros_like", "ones_like", "new_zeros", "new_ones", "fill_",
    "full_like", "scalar_tensor", "zero_", "new_full",
}  # fmt: skip
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "_scaled_mm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
GATHERS = {"embedding", "index", "gather", "index_select"}


def counted(function: Callable[[], object]) -> Counted:
    """Run `function`, whose tensors are on the meta device, without gradients."""
    watch = Watch()

    def run() -> None:
        with watch, OneKernelEach(watch):
            function()

    peak = peak_bytes(run)
    return Counted(watch.kernels, peak)


class Watch(TorchDispatchMode):
    """Record each operation that reaches the device as a kernel."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}  # address -> its number
        self.created = 0
        self.paused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.name().removeprefix("aten::").split(".")[0]
        if name == "convolution" and any(channels_last(x) for x in args[:2]):
            b, c, h, w = out.shape  # as cuDNN returns it
            out = out.as_strided(out.shape, (c * h * w, 1, w * c, c))
        if not (self.paused or function.is_view or name in FREE or name.startswith("prim")):
            self.record(name, args, kwargs, out)
        return out

    def record(self, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        reads = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        writes = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in reads + writes):
            return  # on the host
        if name in PRODUCTS:
            a, b = (args[i] for i in PRODUCTS[name])
            for matrix in (a, b):
                if not ordered(matrix):
                    self.hidden_copy(matrix)
            kind: Kind = "float8" if name == "_scaled_mm" else "matmul"
            self.add(name, kind, reads, writes, 2.0 * a.numel() * b.shape[-1])
        elif name == "convolution":
            x, weight, transposed = args[0], args[1], args[6]
            pixels = x.numel() if transposed else writes[0].numel()
            flops = 2.0 * pixels * weight.shape[1] * weight[0, 0].numel()
            for tensor in (x, weight):
                if channels_last(writes[0]) and not tensor.is_contiguous(
                    memory_format=torch.channels_last
                ):
                    self.hidden_copy(tensor)
            self.add(name, "convolution", reads, writes, flops)
        elif name == "native_layer_norm":
            self.copy_unless_contiguous(args[0])
            self.add(name, "elementwise", reads, writes)
        elif name == "native_group_norm":
            self.add("group_norm, moments", "elementwise", reads[:1], writes[1:])
            self.add("group_norm, parameters", "elementwise", reads[1:], writes[1:])
            self.add("group_norm", "elementwise", reads[:1], writes[:1])
        elif name in GATHERS:  # the indices, and of the values what is gathered
            indices = [x for x in reads if not x.is_floating_point()]
            self.add(name, "elementwise", [*indices, *writes], writes)
        elif name in WRITE_ONLY:
            self.add(name, "elementwise", [], writes)
        elif name == "copy_":
            self.add(name, "elementwise", [args[1]], [args[0]])
        else:
            written = kwargs.get("out")
            self.add(name, "elementwise", [x for x in reads if x is not written], writes)

    def add(
        self,
        name: str,
        kind: Kind,
        reads: Iterable[Tensor],
        writes: Iterable[Tensor],
        flops: float = 0.0,
        rows: int = 0,
    ) -> None:
        read, written = (tuple(map(self.access, tensors)) for tensors in (reads, writes))
        float32 = kind != "float8" and any(x.dtype == torch.float32 for x in writes)
        kernel = Kernel(name, site(), kind, read, written, flops, rows, float32)
        self.kernels.append(kernel)

    def access(self, x: Tensor) -> Access:
        """Return the memory of a tensor; a dimension of stride 0 is one element."""
        storage = x.untyped_storage()
        known = self.storages.get(storage._cdata)
        if known is None or known[0].expired():
            self.created += 1
            known = self.storages[storage._cdata] = StorageWeakRef(storage), self.created
        elements = 0 if x.numel() == 0 else 1
        for size, stride in zip(x.shape, x.stride()):
            elements *= 1 if stride == 0 else size
        part = x.storage_offset(), tuple(x.shape), x.stride()
        return Access(known[1], part, elements * x.element_size(), storage.nbytes())

    def hidden_copy(self, x: Tensor) -> None:
        """Count the copy that a kernel makes of an input in an order that it cannot read."""
        with self.pause():
            copy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.add("hidden copy", "elementwise", [x], [copy])

    def copy_unless_contiguous(self, x: Tensor) -> None:
        if not x.is_contiguous():
            self.hidden_copy(x)

    @contextmanager
    def pause(self):
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


class OneKernelEach(TorchFunctionMode):
    """Count functions as CUDA computes them where the meta device composes them of others."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        count = {
            F.scaled_dot_product_attention: self.attention,
            F.rms_norm: self.rms_norm,
            torch.rms_norm: self.rms_norm,
            F.batch_norm: self.batch_norm,
        }.get(function)
        return function(*args, **kwargs) if count is None else count(*args, **kwargs)

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
    ) -> Tensor:
        """One fused kernel. Its result has the order of the queries in memory."""
        with self.watch.pause():
            out = torch.empty_like(query)
        inputs = [query, key, value]
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:  # becomes what is added to the scores
                with self.watch.pause():
                    added = torch.empty_like(attn_mask, dtype=query.dtype)
                self.watch.add("mask", "elementwise", [attn_mask], [added])
                attn_mask = added
            inputs.append(attn_mask)
        flops = 4.0 * query.numel() * key.shape[-2] * (0.5 if is_causal else 1)
        self.watch.add("attention", "attention", inputs, [out], flops)
        return out

    def rms_norm(self, input, normalized_shape, weight=None, eps=None) -> Tensor:
        if weight is not None and weight.dtype != input.dtype:  # CUDA composes these too
            return torch.rms_norm(input, normalized_shape, weight, eps)
        self.watch.copy_unless_contiguous(input)
        with self.watch.pause():
            out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
        rows = input.numel() // normalized_shape[-1] if normalized_shape[-1] <= 256 else 0
        weights = [] if weight is None else [weight]
        self.watch.add("rms_norm", "elementwise", [input, *weights], [out], rows=rows)
        return out

    def batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, *_, **__
    ) -> Tensor:
        with self.watch.pause():
            out = torch.empty_like(input)
        given = [running_mean, running_var]
        if training:
            self.watch.add("batch_norm, moments", "elementwise", [input], given)
            self.watch.add("batch_norm, averages", "elementwise", given, given)
        else:
            self.watch.add("batch_norm, deviation", "elementwise", [running_var], [running_var])
        weights = [x for x in (weight, bias) if x is not None]
        self.watch.add("batch_norm", "elementwise", [input, *given, *weights], [out])
        return out


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def ordered(matrix: Tensor) -> bool:
    """Return whether cuBLAS reads the matrix as it is: rows or columns without gaps."""
    rows, columns = matrix.shape[-2:]
    over_rows, over_columns = matrix.stride()[-2:]
    if 1 in (rows, columns):
        return True
    by_row = over_columns == 1 and over_rows >= columns
    return by_row or (over_rows == 1 and over_columns >= rows)


def site() -> str:
    """Return the file and function of the nearest caller in a package that is compared."""
    frame = sys._getframe(1)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for package in PACKAGES:
            if package in parts[:-1] and "benchmarks" not in parts:
                start = len(parts) - 1 - parts[::-1].index(package)
                function = frame.f_code.co_qualname.replace(".<locals>", "")
                return f"{'/'.join(parts[start:])}: {function}"
        frame = frame.f_back
    return "?"
