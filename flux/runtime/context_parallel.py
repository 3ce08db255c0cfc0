"""Context parallelism: one pass of a transformer, in which each process has a part of the tokens.

    allgather  own queries attend to all keys and values, which are gathered
    ulysses    all tokens, but some of the heads; two exchanges

Ulysses: Jacobs et al. 2023, arXiv:2309.14509.

Training: a gradient of the mean loss of the processes is the mean of their gradients, as in FSDP.

Everything but attention works on each token alone, so the networks stay as they are. Text and image
are divided separately, by `tensor_split`, into parts of any size. Before it attends, a process
restores the order that one process has: all text, then all image tokens. So masks, KV caches and
the sums of attention are those of one process. Ids, times and noise are those of all tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flux import transformer, transformer3
from flux.errors import UserError
from flux.runtime import fast, fast3
from flux.transformer import KVCache, Modulations, Residuals, apply_rope
from flux.transformer3 import ModulationOut, Stream

PLAIN_ATTENTION, PLAIN_ATTENTION3 = transformer.attention, transformer3.attention
# torch 2.13 gave the function another name
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
attend = fast.attend  # (B, N, H, d) each, rotated already -> (B, N, D)


class Gather(torch.autograd.Function):
    """Concatenate x of all processes along the first axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        all_gather(gathered, x, group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        own = torch.empty_like(gradient.chunk(dist.get_world_size(ctx.group))[0])
        reduce_scatter(own, gradient.contiguous(), group=ctx.group)
        return own, None


class Exchange(torch.autograd.Function):
    """Send parts of x (n,) of the sizes `sent`; return what comes, of the sizes `received`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sizes, ctx.group = (received, sent), group
        out = x.new_empty(sum(received))
        dist.all_to_all_single(out, x, received, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        received, sent = ctx.sizes
        back = gradient.new_empty(sum(sent))
        dist.all_to_all_single(back, gradient.contiguous(), sent, received, ctx.group)
        return back, None, None, None


def part_sizes(length: int, parts: int) -> list[int]:
    """Return the sizes of the parts of `tensor_split`."""
    return [length // parts + (number < length % parts) for number in range(parts)]


class Split:
    """How a sequence is divided: each of its segments, such as text and image, by itself.

    lengths: tokens of each segment. group: the processes that share the sequence.
    """

    def __init__(self, lengths: Sequence[int], group: dist.ProcessGroup):
        self.lengths, self.group = tuple(lengths), group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sizes = [part_sizes(length, self.size) for length in lengths]  # by segment, process
        self.tokens = [sum(sizes) for sizes in zip(*self.sizes)]  # by process

    def local(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this process's tokens of the whole sequence, contiguous."""
        segments = x.split(self.lengths, dim)
        own = [segment.tensor_split(self.size, dim)[self.rank] for segment in segments]
        # a Linear with a bias rounds twice in bfloat16 if its input is strided
        return torch.cat(own, dim) if len(own) > 1 else own[0].contiguous()

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the whole sequence, of which each process has its tokens."""
        x = x.movedim(dim, 0).contiguous()  # (n, ...)
        longest = max(self.tokens)
        if len(x) < longest:  # a gather of equal sizes is one collective everywhere
            x = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
        parts = Gather.apply(x, self.group).split(longest)
        return self.in_order([part[:n] for part, n in zip(parts, self.tokens)], 0).movedim(0, dim)

    def in_order(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Concatenate the parts of all processes, segment after segment."""
        divided = [
            part.split([sizes[number] for sizes in self.sizes], dim)
            for number, part in enumerate(parts)
        ]
        return torch.cat([segment for segments in zip(*divided) for segment in segments], dim)

    def heads_for_tokens(self, x: Tensor) -> Tensor:
        """Give other heads away, and get other tokens: (..., n, H, d) -> (..., N, h, d)."""
        heads = part_sizes(x.shape[-2], self.size)
        sent = x.split(heads, -2)
        shapes = [(*x.shape[:-3], n, heads[self.rank], x.shape[-1]) for n in self.tokens]
        return self.in_order(self.exchange(sent, shapes), -3)

    def tokens_for_heads(self, x: Tensor, heads: int) -> Tensor:
        """Undo `heads_for_tokens`; `heads`: all of them."""
        segments = [s.tensor_split(self.size, -3) for s in x.split(self.lengths, -3)]
        sent = [torch.cat(parts, -3) for parts in zip(*segments)]
        own = self.tokens[self.rank]
        shapes = [(*x.shape[:-3], own, h, x.shape[-1]) for h in part_sizes(heads, self.size)]
        return torch.cat(self.exchange(sent, shapes), -2)

    def exchange(self, sent: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send one tensor to each process; return what came from each, of these shapes."""
        flat = torch.cat([x.reshape(-1) for x in sent])
        counts = [torch.Size(shape).numel() for shape in shapes]
        received = Exchange.apply(flat, counts, [x.numel() for x in sent], self.group)
        return [x.view(shape) for x, shape in zip(received.split(counts), shapes)]


# ------------------------------------------------------------------ attention


def attend_allgather(
    split: Split, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, mask: Tensor | None
) -> Tensor:
    """Attend from own queries to all keys and values: (B, n, H, d) each -> (B, n, D)."""
    k, v = split.gather(torch.stack([k, v]), dim=2).unbind()  # (B, N, H, d)
    if mask is not None:
        mask = split.local(mask, dim=-2)  # (..., n, N)
    return attend(q, k, v, cache, mask)


def attend_ulysses(
    split: Split, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, mask: Tensor | None
) -> Tensor:
    """Attend with some of the heads, from all tokens: (B, n, H, d) each -> (B, n, D)."""
    heads, channels = q.shape[2:]
    q, k, v = split.heads_for_tokens(torch.stack([q, k, v])).unbind()  # (B, N, h, d)
    out = attend(q, k, v, cache, mask) if q.shape[2] else q.flatten(2)  # (B, N, h d)
    out = out.unflatten(-1, (q.shape[2], channels))
    return split.tokens_for_heads(out, heads).flatten(2)


METHODS: dict[str, Callable[..., Tensor]] = {
    "allgather": attend_allgather,
    "ulysses": attend_ulysses,
}


def choose_method(heads: int, parts: int) -> str:
    """Return the method that sends less. With two processes, both send the same."""
    return "ulysses" if 2 < parts <= heads else "allgather"


# What runs now. Functions of the module instead of closures: compiled blocks stay valid.
_split: Split | None = None
_joint: Callable[..., Tensor] = attend_allgather


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Tensor,
    cache: KVCache | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Do what `transformer.attention` does, over the present split."""
    return _joint(_split, apply_rope(q, rope), apply_rope(k, rope), v, cache, mask)


def attention3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Do what `transformer3.attention` does, over the present split."""
    return _joint(_split, q, k, v, None, None)


def attend_jointly(
    q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, mask: Tensor | None
) -> Tensor:
    """Do what `fast.attend` does, over the present split."""
    return _joint(_split, q, k, v, cache, mask)


# All functions by which blocks attend: one that is missing here would see its own tokens alone.
PLACES: tuple[tuple[Any, str, Callable], ...] = (
    (transformer, "attention", attention),
    (transformer3, "attention", attention3),
    (fast, "attend", attend_jointly),
    (fast3, "attend", attend_jointly),
)


@contextmanager
def attending(split: Split, joint: Callable[..., Tensor]) -> Iterator[None]:
    """Let the networks attend over `split` inside the block, by a function of METHODS."""
    global _split, _joint
    before = _split, _joint, [getattr(module, name) for module, name, _ in PLACES]
    _split, _joint = split, joint
    for module, name, function in PLACES:
        setattr(module, name, function)
    try:
        yield
    finally:
        _split, _joint, functions = before
        for (module, name, _), function in zip(PLACES, functions):
            setattr(module, name, function)


def attending_again() -> AbstractContextManager:
    """Return a block in which the networks attend as now: gradient checkpointing repeats passes."""
    return nullcontext() if _split is None else attending(_split, _joint)


# ------------------------------------------------------------------ the networks


class ContextParallel:
    """Divides the tokens of each pass of a network over a group: `pipe.transformer.on_load(self)`.

    The network then takes and returns whole tensors, the same in every process. method: "allgather"
    or "ulysses"; None: the one that sends less. gradients: record them, for training.
    """

    def __init__(
        self, group: dist.ProcessGroup, method: str | None = None, gradients: bool = False
    ):
        self.group, self.method, self.gradients = group, method, gradients

    def __call__(self, network: nn.Module) -> None:
        """Change a loaded Flux or Flux3, also one with the forwards of `fast.py`."""
        plain: Any = network
        if isinstance(network, transformer3.Flux3):
            Pass3(self, plain)
        else:
            plain.denoise = partial(self.denoise, plain.denoise, plain.config.num_heads)

    def split(self, *lengths: int) -> Split:
        """Return how segments of these lengths are divided."""
        return Split(lengths, self.group)

    def attending(self, split: Split, heads: int):
        return attending(split, METHODS[self.method or choose_method(heads, split.size)])

    def check(self, tokens: Tensor) -> None:
        """Raise UserError if a pass cannot be divided."""
        size = dist.get_world_size(self.group)
        if tokens.shape[1] < size:
            raise UserError(
                f"parallel: {tokens.shape[1]} tokens cannot be divided over context={size}. Use "
                "fewer processes, or a larger image."
            )
        if torch.is_grad_enabled() and not self.gradients:
            raise UserError(
                "gradients: are not recorded over several processes. Use a single process."
            )
        if (transformer.attention, transformer3.attention) != (PLAIN_ATTENTION, PLAIN_ATTENTION3):
            raise UserError(
                "parallel: `transformer.attention` was replaced, and context parallelism has its "
                'own. Leave "context" out.'
            )

    def denoise(
        self,
        plain: Callable[..., Tensor],
        heads: int,
        img: Tensor,
        txt: Tensor,
        rope: Tensor,
        mods: Modulations,
        caches: list[KVCache] | None = None,
        mask: Tensor | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """Do what `Flux.denoise` does."""
        self.check(img)
        text, image = self.split(txt.shape[1]), self.split(img.shape[1])
        both = self.split(txt.shape[1], img.shape[1])
        if residuals is not None:
            own = [[x if x is None else image.local(x) for x in part] for part in residuals]
            residuals = Residuals(*own)
        more = {} if residuals is None else {"residuals": residuals}
        with self.attending(both, heads):
            v = plain(
                image.local(img), text.local(txt), both.local(rope, 0), mods, caches, mask, **more
            )
        return image.gather(v)


class Pass3:
    """The passes of a FLUX 3, whose modes run alone at first."""

    def __init__(self, context: ContextParallel, network: Any):
        self.context, self.heads = context, network.config.num_heads
        self.plain_stream, self.plain_denoise = network.stream, network.denoise
        self.image: Split | None = None  # the image's tokens, while `denoise` runs
        network.stream, network.denoise = self.stream, self.denoise

    def stream(self, mode: str, tokens: Tensor, rope: Tensor, vec: Tensor) -> Stream:
        """Do what `Flux3.stream` does; inside of `denoise`, with own tokens."""
        if self.image is not None:
            with self.context.attending(self.image, self.heads):
                return self.plain_stream(mode, tokens, rope, vec)
        self.context.check(tokens)
        split = self.context.split(tokens.shape[1])
        with self.context.attending(split, self.heads):
            own = per_token(split.local, vec)
            x, _, mod = self.plain_stream(mode, split.local(tokens), split.local(rope, 0), own)
        if vec.shape[1] > 1:
            mod = ModulationOut(*map(split.gather, mod))
        return Stream(split.gather(x), rope, mod)

    def denoise(
        self, img: Tensor, rope: Tensor, vec: Tensor, text: Stream, *references: Stream
    ) -> Tensor:
        """Do what `Flux3.denoise` does."""
        self.context.check(img)
        image = self.context.split(img.shape[1])
        streams = [self._own(stream) for stream in (text, *references)]
        lengths = [stream.x.shape[1] for stream in references]
        joint = self.context.split(text.x.shape[1], img.shape[1], *lengths)
        self.image = image
        try:
            with self.context.attending(joint, self.heads):
                own = per_token(image.local, vec)
                v = self.plain_denoise(image.local(img), image.local(rope, 0), own, *streams)
        finally:
            self.image = None
        return image.gather(v)

    def _own(self, stream: Stream) -> Stream:
        split = self.context.split(stream.x.shape[1])
        mod = ModulationOut(*(per_token(split.local, part) for part in stream.mod))
        return Stream(split.local(stream.x), split.local(stream.rope, 0), mod)


def per_token(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function to x (B, N, D); x (B, 1, D) is the same for all tokens, and stays."""
    return function(x) if x.shape[1] > 1 else x
