"""Work in stripes: what lies between two large tensors is never whole, and what comes out is the same.

A CPU is faster so: it finds a stripe in its cache, and asks the system for less new memory.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

STRIPE = 2**20  # elements: q and k of 170 tokens of 24 heads


def in_stripes(
    function: Callable[..., Tensor], *cut: tuple[Tensor, int], watched: Sequence[nn.Module] = ()
) -> Tensor:
    """What `function` makes of these tensors, each with the dimension of its rows: some rows after others, on a CPU.

    It is given the number of rows that went before, and of each tensor those whose turn it is; the rows of what it returns are
    where the first tensor has them, which also decides how many stripes there are. `watched`: as the `modules` of `stripes`.
    """
    first, dim = cut[0]
    count = stripes(first, STRIPE, *watched) if first.is_cpu else 1
    if count == 1:
        return function(0, *(tensor for tensor, _ in cut))
    out, before = None, 0
    for rows in zip(*(tensor.chunk(count, at) for tensor, at in cut), strict=True):
        part = function(before, *rows)
        if out is None:
            out = part.new_empty(*part.shape[:dim], first.shape[dim], *part.shape[dim + 1 :])
        out.narrow(dim, before, part.shape[dim]).copy_(part)
        before += part.shape[dim]
    return out


def stripes(x: Tensor, elements: int, *modules: nn.Module) -> int:
    """How many of so many elements to work in, between these modules.

    One, where gradients need everything that there was, where a compiler does better, and where a hook is to see a whole
    tensor; and on Apple's GPUs.
    """
    count = x.numel() // elements
    if count < 2 or torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_mps:
        return 1
    watched = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    return 1 if watched else count
