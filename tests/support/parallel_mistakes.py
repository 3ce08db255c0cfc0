"""Mistakes of context parallelism, planted into its functions: wrong results, without an error."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from support.parallel_cases import Case

from flux.runtime import context_parallel
from flux.runtime.context_parallel import Split, attend
from flux.transformer import KVCache

EVEN = Case("klein", text=12, grid=(4, 8), references=((2, 4),))  # the same counts everywhere
MASKED = EVEN._replace(references=(), mask=True)


class Mistake(NamedTuple):
    change: Any  # what takes the place
    place: str = "allgather"  # of a method of attention, or of a function of `Split`
    case: Case = EVEN
    method: str = "allgather"

    def plant(self) -> AbstractContextManager:
        """Return the block in which the mistake is made."""
        if self.place in context_parallel.METHODS:
            return patch.dict(context_parallel.METHODS, {self.place: self.change})
        owner = KVCache if hasattr(KVCache, self.place) else Split
        return patch.object(owner, self.place, self.change)


def text_twice(split, q, k, v, cache, mask):
    """Each process kept the whole text, and all of them were gathered."""
    k, v = split.gather(torch.stack([k, v]), dim=2).unbind()
    k, v = (torch.cat([x[:, : split.lengths[0]], x], 1) for x in (k, v))
    return attend(q, k, v, cache, mask)


def references_twice(split, q, k, v, cache, mask):
    """References were not divided."""
    k, v = split.gather(torch.stack([k, v]), dim=2).unbind()
    k, v = (torch.cat([x, x[:, -8:]], 1) for x in (k, v))
    return attend(q, k, v, cache, mask)


def own_tokens_alone(split, q, k, v, cache, mask):
    return attend(q, k, v, cache, mask)


def own_keys_after_rope_of_others(split, q, k, v, cache, mask):
    """Keys were gathered in the order of the processes, values in the right one."""
    k_order = split.gather(k.flip(1)).flip(1)
    return attend(q, k_order, split.gather(v), cache, mask)


def mask_of_first(split, q, k, v, cache, mask):
    """The rows of the mask are those of process 0."""
    other = Split(split.lengths, split.group)
    other.rank = 0
    k, v = split.gather(torch.stack([k, v]), dim=2).unbind()
    return attend(q, k, v, cache, None if mask is None else other.local(mask, -2))


local, in_order, tokens_for_heads = Split.local, Split.in_order, Split.tokens_for_heads
update = KVCache.update


def rope_of_first(self, x, dim=1):
    if dim == 0:
        segments = x.split(self.lengths, dim)
        return torch.cat([s.tensor_split(self.size, dim)[0] for s in segments], dim)
    return local(self, x, dim)


def rope_in_one_piece(self, x, dim=1):
    return x.tensor_split(self.size, dim)[self.rank] if dim == 0 else local(self, x, dim)


def heads_exchanged(self, x, heads):
    """The heads of the processes are put together in the reversed order."""
    out = tokens_for_heads(self, x, heads)
    return torch.cat(out.tensor_split(self.size, -2)[::-1], -2)


def order_of_processes(self, parts, dim):
    """Text and image of process 0, then those of process 1: right, until there is a mask."""
    return torch.cat(list(parts), dim) if len(self.lengths) > 1 else in_order(self, parts, dim)


def image_exchanged(self, parts, dim):
    """The output is put together in the reversed order."""
    whole = in_order(self, parts, dim)
    return torch.cat(whole.chunk(2, dim)[::-1], dim) if len(self.lengths) == 1 else whole


def part_of_the_references(self, k, v):
    """Each process caches its own part of the references."""
    if self.k is None:
        self.k, self.v = k.chunk(2, 1)[0].clone(), v.chunk(2, 1)[0].clone()
        return k, v
    return update(self, k, v)


MISTAKES = {
    "text counted twice": Mistake(text_twice),
    "references not divided": Mistake(references_twice),
    "attention to own tokens alone": Mistake(own_tokens_alone),
    "keys in another order than values": Mistake(own_keys_after_rope_of_others),
    "mask of process 0": Mistake(mask_of_first, case=MASKED),
    "RoPE of process 0": Mistake(rope_of_first, "local"),
    "RoPE divided in one piece": Mistake(rope_in_one_piece, "local"),
    "heads exchanged": Mistake(heads_exchanged, "tokens_for_heads", method="ulysses"),
    "order of the processes": Mistake(order_of_processes, "in_order", case=MASKED),
    "parts of the image exchanged": Mistake(image_exchanged, "in_order"),
    "part of the cached keys": Mistake(
        part_of_the_references, "update", EVEN._replace(cached=True)
    ),
}
