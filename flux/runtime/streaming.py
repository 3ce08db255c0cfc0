"""Streaming: a network whose blocks lie in the host's memory, and come to the device one after another, each before its turn.

`stream` puts a `Streamed` in the place of each list of blocks. To iterate over it is to be given each block with its weights on
the device, while those of the next are on their way: so a network that loops over its blocks is streamed as it stands, and
the names of its modules and weights stay what they are.

    file's pages (host) --memcpy--> staging (host, page-locked) --DMA, on a stream of its own--> slot (device)

There are as many stagings as slots, each as large as the largest block, whatever the size of the model: on the host, the
weights stay the mapped file's own pages. Two events a slot keep order: `filled`, for which computation waits, and `free`, for
which the next copy waits. On the CPU the events mean nothing and the copies are made at once; all else is the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flux.errors import UserError

ALIGNMENT = (
    256  # bytes; where CUDA's own allocator lets tensors begin, and more than any kernel asks for
)
MIN_STREAMED = (
    1 << 16
)  # bytes; what is smaller (norms, biases, T5's table of distances) stays: its copy would cost more than its room


def stream(
    module: nn.Module,
    lists: Sequence[str],
    device: torch.device | str,
    slots: int = 2,
    resident: int = 0,
) -> nn.Module:
    """Has a network's blocks streamed to `device`, where the rest of it goes at once; returns the network.

    `lists`: paths of its lists of blocks, in the order of their use ("double_blocks", "single_blocks"). `slots`: for how many
    blocks there is room at a time, 2 or more. `resident`: how many bytes of blocks stay. The network must be frozen.
    """
    if slots < 2:
        raise UserError(
            f"streaming needs at least 2 slots, not {slots}: one block is used while the next one comes"
        )
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise UserError(
            "a streamed network cannot be trained: freeze it, with requires_grad_(False), or do not stream it"
        )
    blocks = [block for path in lists for block in module.get_submodule(path)]
    stays = spread(
        [sum(tensor.nbytes for tensor in large_tensors(block)) for block in blocks], resident
    )
    away = [block for block, stay in zip(blocks, stays, strict=True) if not stay]
    ring = Ring(blocks, away, torch.device(device), slots)
    streamed = {id(tensor) for block in away for tensor in large_tensors(block)}
    ring.moved = [
        (tensor, tensor.data) for tensor in tensors_of(module) if id(tensor) not in streamed
    ]
    with torch.inference_mode():
        for tensor, host in ring.moved:
            tensor.data = host.to(device)
    for path in lists:
        module.set_submodule(path, Streamed(module.get_submodule(path), ring))
    return module


def unstream(module: nn.Module, lists: Sequence[str]) -> nn.Module:
    """Undoes `stream`: all weights are on the host, where they were, and none was copied back; returns the network."""
    for path in lists:
        streamed = module.get_submodule(path)
        module.set_submodule(path, nn.ModuleList(streamed.children()))
    streamed.ring.leave()
    return module


def spread(sizes: Sequence[int], budget: int) -> list[bool]:
    """Which blocks stay, in `budget` bytes at most: evenly spaced ones, so that each copy has computation to hide behind."""
    stays, seen, kept = [], 0, 0
    for size in sizes:
        seen += size
        stays.append((kept + size) * sum(sizes) <= budget * seen)
        kept += size * stays[-1]
    return stays


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]  # quantised weights are buffers


def large_tensors(block: nn.Module) -> list[Tensor]:
    """What of a block is streamed."""
    return [tensor for tensor in tensors_of(block) if tensor.nbytes >= MIN_STREAMED]


class Streamed(nn.ModuleList):
    """A list of blocks that can be used only one by one, as it is iterated over; elsewhere their weights are on the host."""

    def __init__(self, blocks: Sequence[nn.Module], ring: "Ring"):
        super().__init__(blocks)
        self.ring = ring

    def __iter__(self) -> Iterator[nn.Module]:
        for block in super().__iter__():
            with self.ring.holding(block):
                yield block


class Piece(NamedTuple):
    """One tensor of a block, and where it lies in a slot."""

    tensor: Tensor  # the module's own; its data are here or there
    host: Tensor
    start: int

    def within(self, memory: Tensor) -> Tensor:
        """Its place in a slot's bytes, in its own type and shape."""
        return (
            memory[self.start : self.start + self.host.nbytes]
            .view(self.host.dtype)
            .view(self.host.shape)
        )


class Slot:
    """Room on the device for one block at a time, and as much page-locked memory, which its weights pass through."""

    def __init__(self, size: int, device: torch.device, streams):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.staging = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.filled, self.free = streams.Event(), streams.Event()
        self.block: nn.Module | None = None
        self.users: set[object] = set()


class Ring:
    """The slots, shared by all lists of a network. Its blocks are used in one order, again and again: so it knows the next."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        away: Sequence[nn.Module],
        device: torch.device,
        slots: int,
    ):
        self.device, self.streams = device, device_streams(device)
        self.moved: list[
            tuple[Tensor, Tensor]
        ] = []  # what else went to the device, and what it was on the host
        with (
            torch.inference_mode()
        ):  # else blocks that were loaded in that mode could not use what is in a slot
            self.pieces = {block: lay_out(large_tensors(block)) for block in away}
            size = max((place_after(pieces) for pieces in self.pieces.values()), default=0)
            self.slots = [
                Slot(size, device, self.streams) for _ in range(slots if away else 0)
            ]  # the one that was filled first is first
        self.next: dict[
            nn.Module, nn.Module
        ] = {}  # after any block, the first one that is streamed
        following = away[0] if away else None
        for block in reversed(blocks):
            self.next[block] = following
            following = block if block in self.pieces else following
        self.copies = self.streams.Stream(device)
        for slot in self.slots:
            slot.free.record(
                self.streams.current_stream(self.device)
            )  # what had this memory before may still be in use
            if device.type == "cuda":
                slot.memory.record_stream(
                    self.copies
                )  # nor is it given away before the last copy ended

    @contextmanager
    def holding(self, block: nn.Module) -> Iterator[None]:
        """Inside, the block's weights are on the device, and the next blocks' are coming, as far as there is room."""
        user = object()
        try:
            slot = self._bring(block, user) if block in self.pieces else None
            self._bring_next(block)
            if slot:
                self.streams.current_stream(self.device).wait_event(slot.filled)
                self._point(slot)
            yield
        finally:  # also where an iterator is thrown away: by an exception, or by a `zip` that ended early
            for slot in self.slots:
                if user in slot.users:
                    slot.users.remove(user)
                    if not slot.users:
                        self._empty(slot)

    @torch.inference_mode()
    def leave(self) -> None:
        """Every tensor is what it was on the host."""
        for slot in self.slots:
            if slot.block is not None:
                self._empty(slot)
        for tensor, host in self.moved:
            tensor.data = host

    def _bring(self, block: nn.Module, user: object) -> Slot:
        """Into a free slot; else in place of a block that is only expected; else of one whose loop was left, but not let go."""
        slot = next((slot for slot in self.slots if slot.block is block), None)
        if slot is None:
            slot = min(self.slots, key=lambda slot: (len(slot.users) > 0, slot.block is not None))
            self._fill(slot, block)
        slot.users.add(user)
        return slot

    def _bring_next(self, block: nn.Module) -> None:
        idle = [slot for slot in self.slots if not slot.users]
        expected = []
        for _ in idle:
            block = self.next[block]
            expected.append(block)
        there = {slot.block for slot in self.slots}
        useless = [slot for slot in idle if slot.block not in expected]
        for block in dict.fromkeys(expected):
            if block not in there:
                self._fill(useless.pop(0), block)

    def _fill(self, slot: Slot, block: nn.Module) -> None:
        """Starts the copies, tensor by tensor: while one is on its way, the next is staged."""
        if slot.block is not None:
            self._empty(slot)
        self.slots.append(self.slots.pop(self.slots.index(slot)))
        slot.filled.synchronize()  # until then its staging is being read
        with self.streams.stream(self.copies), torch.inference_mode():
            self.copies.wait_event(slot.free)
            for piece in self.pieces[block]:
                staged = piece.within(slot.staging).copy_(piece.host)
                piece.within(slot.memory).copy_(staged, non_blocking=self.streams is not torch.cpu)
            slot.filled.record(self.copies)
        slot.block = block

    @torch.inference_mode()
    def _point(self, slot: Slot) -> None:
        for piece in self.pieces[slot.block]:
            piece.tensor.data = piece.within(slot.memory)

    def _empty(self, slot: Slot) -> None:
        """Its block has its weights on the host again. The slot is free when the device has done what it was asked so far."""
        for piece in self.pieces[slot.block]:
            piece.tensor.data = piece.host
        slot.free.record(self.streams.current_stream(self.device))
        slot.block = None
        slot.users.clear()


def lay_out(tensors: Sequence[Tensor]) -> list[Piece]:
    """One after another."""
    pieces: list[Piece] = []
    for tensor in tensors:
        pieces.append(Piece(tensor, tensor.data, place_after(pieces)))
    return pieces


def place_after(pieces: Sequence[Piece]) -> int:
    """The next aligned place."""
    if not pieces:
        return 0
    end = pieces[-1].start + pieces[-1].host.nbytes
    return -(-end // ALIGNMENT) * ALIGNMENT


def device_streams(device: torch.device):
    """The module of a device's streams and events. Those of the CPU do nothing, and Apple's GPUs have one stream, in order."""
    return torch.cuda if device.type == "cuda" else torch.cpu
