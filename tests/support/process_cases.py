"""What processes do together, for test_processes.py: see `support.processes`."""

import torch

from flux.errors import UserError
from flux.runtime import context_parallel, parallel
from flux.runtime.processes import by_first, rank, require_equal, world_size


def first_computes() -> list[int]:
    """Return what the first process returns: its rank, and how often it was asked."""
    calls = []

    def function() -> int:
        calls.append(rank())
        return rank() + 7

    return [by_first(function), len(calls)]


def first_fails(error: Exception) -> tuple[str, str]:
    def function() -> None:
        raise error

    try:
        by_first(function)
    except (UserError, RuntimeError) as raised:
        return type(raised).__name__, str(raised)
    return "", ""


def compare_values() -> str:
    require_equal("arguments", {"same": 1})
    try:
        require_equal("files", {"a": rank(), "b": 5, f"only {rank()}": 0})
    except UserError as error:
        return str(error)
    return ""


def decoded() -> tuple[list[int], list[int]]:
    """Return the numbers of the images that this process decodes, and of those that it gets."""
    own: list[int] = []

    def plain(latents: torch.Tensor) -> list[int]:
        own.extend(latents.flatten().int().tolist())
        return own[-1:]

    made = parallel.Parallel(parallel.Sizes(data=world_size()), "cpu")
    return own, made.decode(plain, torch.arange(3.0)[:, None, None, None])


def refusals() -> list[str]:
    """Return why a divided pass, or a mesh, is refused."""
    import torch.distributed as dist

    from flux import transformer

    context, said = context_parallel.ContextParallel(dist.group.WORLD), []
    tokens = torch.zeros(1, 8, 4)

    def refused(function, *arguments) -> None:
        try:
            function(*arguments)
        except UserError as error:
            said.append(str(error))

    with torch.no_grad():
        refused(context.check, tokens[:, :1])
        attention = transformer.attention
        transformer.attention = lambda *_: None
        refused(context.check, tokens)
        transformer.attention = attention
        context.check(tokens)
    refused(context.check, tokens)
    refused(parallel.Parallel, parallel.Sizes(context=world_size() + 1), "cpu")
    return said
