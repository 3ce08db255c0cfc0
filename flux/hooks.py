"""Observe running networks: the inputs and outputs of modules, and q, k, v and output of attention.

A name is `<where>/<module>/<tap>`. `where` is the caller's name of the network, the module's path
is the checkpoint's key, and the tap is `in` or `out`, with a number if there are several tensors
(`in.0`, `in.1`).
Attention is not a module: each call of `F.scaled_dot_product_attention` is observed and
named after the module around it, `double_blocks.3/attention/q`. Outputs stay the same to the bit.

Tensors have the names and shapes that hooks on the modules of BFL's code give them:

    blocks  image and text tokens are `in`; what BFL's blocks take in another form (RoPE table,
            modulation, cached keys and values) is `arg`, numbered after `in`
    norms   of q and k: (B, H, N, d)
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from flux import transformer3
from flux.errors import UserError
from flux.runtime.lazy_module import LazyModule
from flux.transformer import DoubleStreamBlock, KVCache, QKNorm, RMSNorm, SingleStreamBlock

# Called with a name and a tensor, which may be overwritten later: copy it to keep it.
Observer = Callable[[str, Tensor], object]
# type -> inputs that are tokens
BLOCKS = {DoubleStreamBlock: 2, SingleStreamBlock: 1, transformer3.Block: 1}
NORMS = QKNorm | RMSNorm | transformer3.QKNorm | transformer3.RMSNorm  # of queries and keys
ATTENTION = F.scaled_dot_product_attention  # also where a bug's function takes its place


class Tap(NamedTuple):
    """Where a tensor of the transformer was seen, and when; `str` gives the whole name."""

    step: int  # from 1; 0 outside of `sample`
    t: float | None  # the time of the velocity
    branch: str  # "conditional", "unconditional" or "references"
    module: str  # path, such as double_blocks.0.img_attn.qkv; around attention: the block's
    tap: str  # "in", "out", "in.0"; "attention/q", "/k", "/v", "/out"

    def __str__(self) -> str:
        return joined(f"step.{self.step:03}" * bool(self.step), self.branch, self.module, self.tap)


@contextmanager
def watching(
    networks: Mapping[str, nn.Module],
    observer: Observer,
    only: Sequence[str] = (),
    places: Container[str] | None = None,
) -> Iterator[None]:
    """Call `observer(name, tensor)` for each tensor that matches `only`, in the order of execution.

    `networks`: where -> network; with "" for where, names begin with the module. `places`: names of
    the modules that get hooks, by default all. All hooks are removed when the block ends.
    """
    hooks = _Hooks(observer, only, places)
    with ExitStack() as stack:
        for where, network in networks.items():
            for handle in hooks.register(where, network):
                stack.callback(handle.remove)
        stack.enter_context(_AttentionCalls(hooks.after_attention))
        yield


@contextmanager
def watching_network(
    network: LazyModule, now: Any, see: Callable[[Tap, Tensor], object], only: Sequence[str] = ()
) -> Iterator[None]:
    """Call `see(tap, tensor)` inside of the block, also if the network is loaded anew in it.

    `now`: what runs at the moment, a `flux.velocity.Now`. Attention outside of a pass of the
    network is not seen.
    """

    def observer(name: str, tensor: Tensor) -> None:
        if not now.branch:
            return
        module, _, tap = name.partition("/")
        found = Tap(now.step, now.t, now.branch, module, tap)
        if matches(str(found), only):
            see(found, tensor)

    hooks = _Hooks(observer)
    end = network.on_load(lambda module: hooks.register("", module))
    try:
        with _AttentionCalls(hooks.after_attention):
            yield
    finally:
        end()


class _Hooks:
    """Hooks that name the tensors they see after the modules that are running."""

    def __init__(
        self, observer: Observer, only: Sequence[str] = (), places: Container[str] | None = None
    ):
        self.observer, self.only, self.places = observer, only, places
        self.running: list[str] = []  # names of the modules that are running, the innermost last

    def register(self, where: str, network: nn.Module) -> list[RemovableHandle]:
        handles = []
        for path, module in network.named_modules():
            place = joined(where, path)
            if self.places is not None and place not in self.places:
                continue
            before, after = partial(self.before, place), partial(self.after, place)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        return handles

    def observe(
        self, place: str, tap: str, tensors: list[Tensor], first: int | None = None
    ) -> None:
        """`first`: the number of the first tensor; None: a single tensor has no number."""
        for number, tensor in enumerate(tensors, start=first or 0):
            single = first is None and len(tensors) == 1
            name = joined(place, tap if single else f"{tap}.{number}")
            if matches(name, self.only):
                with torch._C.DisableTorchFunction():  # operations of the observer are not observed
                    self.observer(name, tensor)

    def before(self, place: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.running.append(place)
        tensors = _tensors(module, (args, kwargs))
        tokens = next((count for kind, count in BLOCKS.items() if isinstance(module, kind)), None)
        if tokens is not None:
            self.observe(place, "in", tensors[:tokens], first=0)
            self.observe(place, "arg", tensors[tokens:], first=tokens)
        else:
            self.observe(place, "in", tensors)

    def after(self, place: str, module: nn.Module, args: tuple, out) -> None:
        self.observe(place, "out", _tensors(module, out))
        self.running.pop()

    def after_attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        place = joined(self.running[-1] if self.running else "", "attention")
        for tap, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
            self.observe(place, tap, [tensor])


def _tensors(module: nn.Module, values) -> list[Tensor]:
    """Return the tensors in a module's arguments or outputs, with the shapes of BFL's code."""
    tensors: list[Tensor] = []
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, KVCache) and value.k is not None and value.v is not None:
            tensors += [value.k, value.v, torch.tensor(value.text_length)]
    if isinstance(module, NORMS):  # (B, N, H, d) here
        tensors = [x.transpose(1, 2) for x in tensors]
    return tensors


class _AttentionCalls(TorchFunctionMode):
    """Call `after_attention(q, k, v, out)` after each call of the attention function."""

    def __init__(self, after_attention: Callable[[Tensor, Tensor, Tensor, Tensor], None]):
        super().__init__()
        self.after_attention = after_attention

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function is ATTENTION:
            named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
            self.after_attention(*[*args, *named][:3], out)
        return out


@contextmanager
def replaced(owner: object, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Set the attribute `name` of `owner` to `make(its value)` inside the block."""
    is_own, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def joined(*parts: str) -> str:
    return "/".join(filter(None, parts))


# ---------------------------------------------------------------- patterns


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether there are no patterns, or a shell pattern matches one of `places(name)`.

    `*.img_attn` selects `step.001/double_blocks.3.img_attn.qkv/out`; so do `step.001`,
    `double_blocks.3`, `*.qkv` and `out`. A pattern after `!` leaves out what it matches.
    """
    if not patterns:
        return True
    found = places(name)

    def match_any(chosen: Sequence[str]) -> bool:
        return any(fnmatchcase(place, pattern) for place in found for pattern in chosen)

    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return (not wanted or match_any(wanted)) and not match_any(unwanted)


def places(name: str) -> list[str]:
    """Return the name, its parts between slashes, and each part cut short at each of its dots."""
    out = [name]
    for part in name.split("/"):
        modules = part.split(".")
        for end in range(len(modules), 0, -1):
            out.append(".".join(modules[:end]))
    return out


def check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise UserError for the first pattern that matches no name, with the nearest names."""
    known = dict.fromkeys(place for name in names for place in places(name))
    for pattern in patterns:
        argument = "exclude" if pattern.startswith("!") else "only"
        pattern = pattern.removeprefix("!")
        if any(fnmatchcase(place, pattern) for place in known):
            continue
        suffixes = [f"*.{place.rsplit('.')[-1]}" for place in known if "." in place]
        spelled = {place.lower(): place for place in (*known, *suffixes)}
        near = get_close_matches(pattern.lower(), spelled, n=3, cutoff=0.3) or list(spelled)[:3]
        nearest = ", ".join(spelled[place] for place in near)
        raise UserError(f"{argument}: {pattern} matches no name. The nearest names are {nearest}.")
