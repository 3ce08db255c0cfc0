"""Watching networks run: every module's inputs and outputs and, inside each attention, q, k, v and what comes of them.

A name is `<where>/<module>/<tap>`: the caller's name of the network, the module's path, which is the checkpoint's key, and
`in` or `out`, numbered where there are several tensors (`in.0`, `in.1`). Attention is no module: it is seen as the call of
`F.scaled_dot_product_attention` that it is, and named by the module around it, `double_blocks.3/attention/q`. Nothing in a
network knows of this, and outputs stay the same to the bit. What is computed in stripes (`stripes.py`) is computed as a whole
while it is watched: the same arithmetic, in other calls of the same kernels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from flux.errors import UserError

See = Callable[
    [str, Tensor], None
]  # a name, and the tensor, which may be overwritten later: copy what is to be kept


@contextmanager
def watching(
    networks: Mapping[str, nn.Module], see: See, only: Sequence[str] = ()
) -> Iterator[None]:
    """Within, `see(name, tensor)` is called for each tensor that matches `only`, in the order of execution.

    `networks`: where -> network; with "" for where, names begin with the module. On leaving, all hooks are gone.
    """
    running: list[str] = []  # the modules that are at work, the innermost last

    def show(place: str, tap: str, values) -> None:
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        for number, tensor in enumerate(tensors):
            name = joined(place, tap if len(tensors) == 1 else f"{tap}.{number}")
            if matches(name, only):
                with (
                    torch._C.DisableTorchFunction()
                ):  # or each operation in `see` would be looked at, too
                    see(name, tensor)

    def enter(place: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        running.append(place)
        show(place, "in", (args, kwargs))

    def leave(place: str, module: nn.Module, args: tuple, out) -> None:
        show(place, "out", out)
        running.pop()

    def entering(place: str, method: Callable) -> Callable:
        """A method beside `forward`, which hooks do not reach: the same is done by hand."""

        def run(*args, **kwargs):
            enter(place, None, args, kwargs)
            out = method(*args, **kwargs)
            leave(place, None, args, out)
            return out

        return run

    def attended(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        for tap, tensor in zip("q k v out".split(), (q, k, v, out)):
            show(joined(running[-1] if running else "", "attention"), tap, tensor)

    with ExitStack() as stack:
        for where, network in networks.items():
            for path, module in network.named_modules():
                place = joined(where, path)
                for handle in (
                    module.register_forward_pre_hook(partial(enter, place), with_kwargs=True),
                    module.register_forward_hook(partial(leave, place)),
                ):
                    stack.callback(handle.remove)
                if hasattr(
                    module, "remember"
                ):  # how references are computed once: another way through the blocks
                    stack.enter_context(replaced(module, "remember", partial(entering, place)))
        stack.enter_context(_AttentionCalls(attended))
        yield


class _AttentionCalls(TorchFunctionMode):
    def __init__(self, attended: Callable[[Tensor, Tensor, Tensor, Tensor], None]):
        super().__init__()
        self.attended = attended

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
            self.attended(*[*args, *named][:3], out)
        return out


@contextmanager
def replaced(owner: object, name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within, the attribute `name` of `owner` is `make(what it was)`."""
    own, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original) if own else delattr(owner, name)


def joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


# ---------------------------------------------------------------- patterns


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the shell globs, if there are any, fits the name, a part of it, or what that part lies in.

    `*.img_attn` selects `step.001/double_blocks.3.img_attn.qkv/out`; so do `step.001`, `double_blocks.3`, `*.qkv`, `out`.
    """
    return not patterns or any(
        fnmatchcase(place, pattern) for place in places(name) for pattern in patterns
    )


def places(name: str) -> list[str]:
    """The name, its parts between slashes, and each part cut short at each of its dots."""
    parts = [part.split(".") for part in name.split("/")]
    return [name, *(".".join(part[:end]) for part in parts for end in range(len(part), 0, -1))]


def check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    """UserError for the first pattern that fits none of the names, with the nearest that there are."""
    known = dict.fromkeys(place for name in names for place in places(name))
    for pattern in patterns:
        if not any(fnmatchcase(place, pattern) for place in known):
            suffixes = [f"*.{place.rsplit('.')[-1]}" for place in known if "." in place]
            spelt = {place.lower(): place for place in (*known, *suffixes)}
            near = get_close_matches(pattern.lower(), spelt, n=3, cutoff=0.3) or list(spelt)[:3]
            nearest = ", ".join(spelt[place] for place in near)
            raise UserError(f"--only {pattern} matches nothing; the nearest names are {nearest}")
