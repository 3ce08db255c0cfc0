"""Stream blocks: their weights stay in host memory and come to the device one block at a time.

`stream` replaces each list of blocks by a `StreamedModuleList`. Iterating over the list yields each
block with its weights on the device, while the next block's weights are copied. So a network that
loops over its blocks is streamed unchanged, and module and weight names stay the same.

    file's pages (host) --memcpy--> pinned memory (host) --copy stream--> buffer (device)

There are two buffers, each as large as the largest block, whatever the size of the model. On the
host, the weights stay the pages of the mapped file. Blocks that are used again can keep their
pinned memory: their later copies need no memcpy, during which the device would wait. Two events per
buffer keep the order: `filled`, for which the computation waits, and `free`, for which the next
copy waits. On the CPU the events do nothing, the copies are immediate and no memory is pinned; all
else is the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flux.errors import UserError
from flux.runtime.devices import free_memory

NUM_BUFFERS = 2  # one block is used while the next is copied
ALIGNMENT = 256  # bytes; that of CUDA's allocator, and more than any kernel needs
MIN_STREAMED = 1 << 16  # bytes; norms, biases and T5's position table stay: too small to copy


def stream(
    module: nn.Module,
    lists: Sequence[str],
    device: torch.device | str,
    resident: int = 0,
    pinned: int = 0,
) -> nn.Module:
    """Stream the blocks of a frozen network to `device`, move the rest there; return the network.

    `lists`: paths of the lists of blocks, in the order of use ("double_blocks", "single_blocks").
    `resident`: bytes of blocks that stay on the device. `pinned`: bytes of the host's memory for
    blocks that keep their pinned copies from their first use on.
    """
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise UserError(
            "offload: a streamed network cannot be trained. "
            "Freeze it with requires_grad_(False), or do not stream it."
        )
    blocks = [block for path in lists for block in module.get_submodule(path).children()]
    sizes = [sum(tensor.nbytes for tensor in large_tensors(block)) for block in blocks]
    stays = choose_resident(sizes, resident)
    streamed = [block for block, stay in zip(blocks, stays, strict=True) if not stay]
    ends = [list(module.get_submodule(path).children())[-1:] for path in lists]
    ring = PrefetchRing(blocks, streamed, torch.device(device), pinned, sum(ends, []))
    ring.move_rest(module)
    for path in lists:
        blocks = list(module.get_submodule(path).children())
        module.set_submodule(path, StreamedModuleList(blocks, ring))
    return module


def unstream(module: nn.Module, lists: Sequence[str]) -> nn.Module:
    """Undo `stream`: all weights are on the host again, without a copy back; return the network."""
    for path in lists:
        streamed = module.get_submodule(path)
        assert isinstance(streamed, StreamedModuleList)
        streamed.ring.close()
        module.set_submodule(path, nn.ModuleList(streamed.children()))
    return module


def choose_resident(sizes: Sequence[int], budget: int) -> list[bool]:
    """Choose which blocks stay on the device, within `budget` bytes.

    The blocks that stay are evenly spaced: each copy runs during the computation of others.
    """
    stays: list[bool] = []
    total, seen, kept = sum(sizes), 0, 0
    for size in sizes:
        seen += size
        stays.append((kept + size) * total <= budget * seen)
        if stays[-1]:
            kept += size
    return stays


def pinned_budget(device: torch.device) -> int:
    """Return the bytes that may be pinned for repeated use: half of what the host has free."""
    return int(free_memory(torch.device("cpu")) // 2) if device.type == "cuda" else 0


def all_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers; quantized weights are buffers."""
    return [*module.parameters(), *module.buffers()]


def large_tensors(block: nn.Module) -> list[Tensor]:
    """Return the tensors of a block that are streamed."""
    return [tensor for tensor in all_tensors(block) if tensor.nbytes >= MIN_STREAMED]


class StreamedModuleList(nn.ModuleList):
    """A list of blocks to iterate over: each block is on the device only until the next one."""

    def __init__(self, blocks: Sequence[nn.Module], ring: "PrefetchRing") -> None:
        super().__init__(blocks)
        self.ring = ring

    def __iter__(self) -> Iterator[nn.Module]:
        for block in super().__iter__():
            with self.ring.using(block):
                yield block

    def __getitem__(self, index: int | slice) -> Any:
        """Return a list of some blocks, streamed too; or one block, whose weights are on the host.

        One block is there to register hooks on. To run it, iterate over a slice of one.
        """
        if isinstance(index, slice):
            return StreamedModuleList(list(self.children())[index], self.ring)
        return super().__getitem__(index)


class TensorSlice(NamedTuple):
    """One tensor of a block and its place in a buffer."""

    tensor: Tensor  # the module's; its data is `host`, or a view of a buffer
    host: Tensor
    start: int  # bytes

    def view(self, memory: Tensor) -> Tensor:
        """Return the slice of a buffer's bytes, in the tensor's dtype and shape."""
        part = memory[self.start : self.start + self.host.nbytes]
        return part.view(self.host.dtype).view(self.host.shape)


class Buffer:
    """Device memory for one block, and as much pinned memory that the weights pass through."""

    def __init__(self, size: int, device: torch.device, streams: Any) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.pinned = pinned_memory(size, device)
        self.filled, self.free = streams.Event(), streams.Event()
        self.block: nn.Module | None = None


class PrefetchRing:
    """The buffers that all lists of a network share.

    The blocks are used in one order, again and again, and one at a time. What followed the end of
    a list the last time is expected again: FLUX 3 runs some lists once an image. A loop that starts
    while an earlier loop is unfinished takes over from the earlier one.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        streamed: Sequence[nn.Module],
        device: torch.device,
        pinned: int = 0,
        ends: Sequence[nn.Module] = (),  # the last blocks of the lists
    ) -> None:
        self.device, self.ends = device, set(ends)
        # The events of torch.cpu do nothing; Apple's GPUs run everything in one stream, in order.
        self.streams: Any = torch.cuda if device.type == "cuda" else torch.cpu
        order = list(blocks)
        self.next = dict(zip(order, order[1:] + order[:1]))  # of each block, as far as is known
        self.last: nn.Module | None = None
        self.current: Buffer | None = None
        self.user: object | None = None
        self.rest: list[tuple[Tensor, Tensor]] = []  # (tensor, its host data)
        with torch.inference_mode():  # so that blocks loaded in that mode can use the buffers
            self.slices = {block: lay_out(large_tensors(block)) for block in streamed}
            sizes = [end_of(slices) for slices in self.slices.values()]
            count = NUM_BUFFERS if streamed else 0
            self.buffers = [
                Buffer(max(sizes, default=0), device, self.streams) for _ in range(count)
            ]
        # torch allocates pinned memory in powers of two
        keeps = choose_resident([1 << (size - 1).bit_length() for size in sizes], pinned)
        self.kept: dict[nn.Module, Tensor | None] = {  # pinned copies, from the first use on
            block: None for block, keep in zip(self.slices, keeps, strict=True) if keep
        }
        self.copy_stream = self.streams.Stream(device)
        for buffer in self.buffers:
            # The memory's earlier user may still run. The last copy may run when it is freed.
            buffer.free.record(self.streams.current_stream(device))
            if device.type == "cuda":
                buffer.memory.record_stream(self.copy_stream)

    @torch.inference_mode()
    def move_rest(self, module: nn.Module) -> None:
        """Move the tensors of `module` that are not streamed to the device."""
        streamed = {id(part.tensor) for slices in self.slices.values() for part in slices}
        for tensor in all_tensors(module):
            if id(tensor) not in streamed:
                self.rest.append((tensor, tensor.data))
                tensor.data = tensor.data.to(self.device)

    @contextmanager
    def using(self, block: nn.Module) -> Iterator[None]:
        """Hold the weights of `block` on the device, and start to copy those of the next blocks."""
        self._release()  # of a loop that was left, but not closed: a traceback may keep it
        user = self.user = object()
        if self.last in self.ends:
            self.next[self.last] = block
        self.last = block
        try:
            if block in self.slices:
                self.current = self._fetch(block)
            self._prefetch(block)
            if self.current is not None:
                self.streams.current_stream(self.device).wait_event(self.current.filled)
                self._point(block, self.current)
            yield
        finally:  # also after an exception, or a `zip` that ended early
            if self.user is user:
                self._release()

    @torch.inference_mode()
    def close(self) -> None:
        """Give every tensor its host data again."""
        self._release()
        for tensor, host in self.rest:
            tensor.data = host

    def _fetch(self, block: nn.Module) -> Buffer:
        """Return the buffer with `block`, which is there already unless the order was broken."""
        for buffer in self.buffers:
            if buffer.block is block:
                return buffer
        self._fill(self.buffers[0], block)
        return self.buffers[0]

    def _prefetch(self, block: nn.Module) -> None:
        """Fill the buffers that are not in use with the blocks that follow `block`."""
        idle = [buffer for buffer in self.buffers if buffer is not self.current]
        following = self._following(block)[: len(idle)]
        spare = [buffer for buffer in idle if buffer.block not in following]
        loaded = [buffer.block for buffer in self.buffers]
        for block in following:
            if block not in loaded:
                self._fill(spare.pop(0), block)

    def _following(self, block: nn.Module) -> list[nn.Module]:
        """Return the streamed blocks that are expected after `block`, for all buffers."""
        seen = [block]
        found: list[nn.Module] = []
        while len(found) < len(self.buffers) and (following := self.next[seen[-1]]) not in seen:
            seen.append(following)
            if following in self.slices:
                found.append(following)
        return found

    def _fill(self, buffer: Buffer, block: nn.Module) -> None:
        """Start the copies: while one tensor is copied to the device, the next is pinned."""
        buffer.block = None
        asynchronous = self.streams is not torch.cpu
        with self.streams.stream(self.copy_stream), torch.inference_mode():
            memory = self.kept.get(block)
            pin = memory is None
            if block in self.kept and memory is None:
                memory = self._pin(block)
            if memory is None:
                buffer.filled.synchronize()  # until then its pinned memory is being read
                memory = buffer.pinned
            self.copy_stream.wait_event(buffer.free)
            for part in self.slices[block]:
                pinned = part.view(memory)
                if pin:
                    pinned.copy_(part.host)
                part.view(buffer.memory).copy_(pinned, non_blocking=asynchronous)
            buffer.filled.record(self.copy_stream)
        if block in self.kept:
            self.kept[block] = memory
        buffer.block = block

    def _pin(self, block: nn.Module) -> Tensor | None:
        """Return pinned memory for `block` alone; None if the system pins no more."""
        try:
            return pinned_memory(end_of(self.slices[block]), self.device)
        except RuntimeError:
            self.kept = {block: memory for block, memory in self.kept.items() if memory is not None}
            return None

    @torch.inference_mode()
    def _point(self, block: nn.Module, buffer: Buffer) -> None:
        """Let the tensors of `block` use the buffer."""
        for part in self.slices[block]:
            part.tensor.data = part.view(buffer.memory)

    def _release(self) -> None:
        """Give the current block its host data; its buffer is free after the queued computation."""
        if self.current is None:
            return
        if self.current.block is not None:
            for part in self.slices[self.current.block]:
                part.tensor.data = part.host
        self.current.free.record(self.streams.current_stream(self.device))
        self.current.block = None
        self.current = None


def pinned_memory(size: int, device: torch.device) -> Tensor:
    """Return bytes of the host that a GPU can read while the host goes on."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def lay_out(tensors: Sequence[Tensor]) -> list[TensorSlice]:
    """Place tensors one after another in a buffer."""
    slices: list[TensorSlice] = []
    for tensor in tensors:
        slices.append(TensorSlice(tensor, tensor.data, end_of(slices)))
    return slices


def end_of(slices: Sequence[TensorSlice]) -> int:
    """Return the aligned end of the last slice, in bytes."""
    if not slices:
        return 0
    end = slices[-1].start + slices[-1].host.nbytes
    return -(-end // ALIGNMENT) * ALIGNMENT
