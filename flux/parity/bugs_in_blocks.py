"""Known bugs in weights, in precision, and in how blocks are wired; `known_bugs.py` has the others.

A row may try a bug in several ways: its function then returns a tensor for each, by a text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux import language_model, sampling, t5, transformer
from flux.hooks import replaced
from flux.parity.modules import Modules
from flux.parity.replay import module_runs
from flux.parity.rerun import KnownBug, Rerun, patched
from flux.transformer import DoubleStreamBlock, Flux, GatedSiLU, ModulationOut, SingleStreamBlock

Compute = Callable[[Rerun], "Tensor | Mapping[str, Tensor]"]


def variants(ways: Mapping[str, Compute]) -> Compute:
    """Try several functions; those for which the capture lacks an input are left out."""

    def compute(rerun: Rerun) -> dict[str, Tensor]:
        found = {}
        for text, way in ways.items():
            try:
                found[text] = way(rerun)
            except LookupError:
                continue
        return found  # type: ignore[return-value]

    return compute


def patched_in(owner: object, attribute: str, ways: Mapping[str, Callable]) -> Compute:
    """Replace one function in several ways."""
    return variants({text: patched(owner, attribute, way) for text, way in ways.items()})


# ---------------------------------------------------------------- weights


def weights_of(name_of_other: Callable[[str], Sequence[str]]) -> Compute:
    """The module that computes the tensor, with the weights of another module of its shapes."""

    def compute(rerun: Rerun) -> dict[str, Tensor]:
        tap = re.fullmatch(rf"{re.escape(rerun.place)}/(.+)/out(?:\.\d+)?", rerun.name)
        if tap is None:
            raise LookupError(rerun.name)
        state, found = rerun.network.state_dict(), {}
        ours = {key: x for key, x in state.items() if key.startswith(f"{tap[1]}.")}
        for other in name_of_other(tap[1]):
            theirs = {key: state.get(other + key.removeprefix(tap[1])) for key in ours}
            fits = all(x is not None and x.shape == ours[key].shape for key, x in theirs.items())
            if ours and fits and other != tap[1]:
                found[other] = with_weights(rerun, theirs)
        return found

    return compute


def with_weights(rerun: Rerun, weights: Mapping[str, Tensor]) -> Tensor:
    """Compute the tensor while the network's parameters have other values."""
    network = rerun.network
    originals = {key: network.get_parameter(key).data for key in weights}
    try:
        for key, value in weights.items():
            network.get_parameter(key).data = value
        return rerun.compute()
    finally:
        for key, value in originals.items():
            network.get_parameter(key).data = value


def other_stream(path: str) -> list[str]:
    swap = {"img": "txt", "txt": "img"}
    return [re.sub(r"(?<![a-z])(img|txt)(?![a-z])", lambda found: swap[found[0]], path)]


def other_blocks(path: str) -> list[str]:
    """The same module in every other block: numbers sorted as texts give 0, 1, 10, 11, ..., 2."""
    found = re.fullmatch(r"(double_blocks|single_blocks|layers)\.(\d+)(.*)", path)
    if found is None:
        return []
    return [f"{found[1]}.{number}{found[3]}" for number in range(64) if number != int(found[2])]


def shared_streams(rerun: Rerun) -> dict[str, Tensor]:
    """A double-stream block in which one stream has a layer of the other one."""
    found = re.search(r"double_blocks\.\d+", rerun.name)
    if found is None:
        raise LookupError(rerun.name)
    state, out = rerun.network.state_dict(), {}
    for ours, theirs in (("txt", "img"), ("img", "txt")):
        for part in ("attn.qkv", "attn.norm", "attn.proj", "mlp", "mlp.0", "mlp.2", "mod"):
            mine, other = (f"{found[0]}.{stream}_{part}." for stream in (ours, theirs))
            keys = [key for key in state if key.startswith(mine)]
            weights = {key: state[other + key.removeprefix(mine)] for key in keys}
            if weights:
                out[f"{other[:-1]} for those of {mine[:-1]}"] = with_weights(rerun, weights)
    return out


def other_norm(path: str) -> list[str]:
    swap = {"query": "key", "key": "query"}
    return [re.sub("(query|key)(?=_norm)", lambda found: swap[found[0]], path)]


def transposed(f: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return f(x, weight.mT if weight.shape[0] == weight.shape[1] else weight, bias)


# ---------------------------------------------------------------- precision


def rounded(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).to(x.dtype)


def linear_in(dtype: torch.dtype, inputs: bool) -> Callable:
    def linear(f: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weight, bias = rounded(weight, dtype), rounded(bias, dtype)  # type: ignore[assignment]
        return f(rounded(x, dtype), weight, bias).to(dtype).to(x) if inputs else f(x, weight, bias)

    return linear


def norm_in(dtype: torch.dtype) -> Callable:
    def norm(f: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        args = tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args)
        return f(x.to(dtype), *args, **kwargs).to(x.dtype)

    return norm


def norm_by_steps_in(dtype: torch.dtype) -> Callable:
    """LayerNorm whose mean, variance and quotient are each rounded."""

    def norm(f: Callable, x: Tensor, shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
        h = x.to(dtype)
        h = h - h.mean(-1, keepdim=True)
        return (h / (h.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)

    return norm


def attention_in(dtype: torch.dtype) -> Callable:
    def attend(f: Callable, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
        return f(q.to(dtype), k.to(dtype), v.to(dtype), *args, **kwargs).to(q.dtype)

    return attend


HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LATENTS_IN = {
    name: lambda rerun, dtype=dtype: rerun.expected.to(dtype).to(rerun.expected.dtype)
    for name, dtype in HALVES.items()
}


def step_in(dtype: torch.dtype) -> Callable[[Rerun], Tensor]:
    """An Euler step on rounded latents, whose result is rounded."""

    def compute(rerun: Rerun) -> Tensor:
        x, times = rerun.latents(rerun.step - 1).to(dtype), rerun.times.tolist()
        velocity = rerun.recorded(rerun.in_step("velocity")).to(dtype)
        dt = times[rerun.step] - times[rerun.step - 1]
        return (x + dt * velocity.mT.reshape(x.shape)).float()

    return compute


# ---------------------------------------------------------------- conditioning


def vec_from(change: Callable) -> Callable[[Rerun], Tensor]:
    """vec + change(network, embedding of t, embedding of guidance, pooled text)."""

    def vec(f: Callable, self: Flux, t: Tensor, guidance=None, vector=None) -> Tensor:
        def embedded(x: Tensor) -> Tensor:
            return transformer.timestep_embedding(1000 * x.float())

        strength = None if guidance is None else embedded(guidance)
        try:
            return f(self, t, guidance, vector) + change(self, embedded(t), strength, vector)
        except (AttributeError, TypeError):  # this model has no guidance, or no pooled text
            raise LookupError from None

    return patched(Flux, "vec", vec)


CONDITIONING = {
    "pooled text is not added": vec_from(lambda net, t, g, pooled: -net.vector_in(pooled)),
    "pooled text is zero": vec_from(
        lambda net, t, g, pooled: net.vector_in(0 * pooled) - net.vector_in(pooled)
    ),
    "guidance is not added": vec_from(lambda net, t, g, pooled: -net.guidance_in(g)),
    "guidance goes through time_in": vec_from(
        lambda net, t, g, pooled: net.time_in(g) - net.guidance_in(g)
    ),
    "time goes through guidance_in": vec_from(
        lambda net, t, g, pooled: net.guidance_in(t) - net.time_in(t)
    ),
    "time is not added": vec_from(lambda net, t, g, pooled: -net.time_in(t)),
}


def other_times(rerun: Rerun, tokens: float = 1.0, text: bool = False) -> Tensor:
    """The times for another number of tokens."""
    count = round(tokens * rerun.image_tokens) + (len(rerun.ids[0]) if text else 0)
    return sampling.schedule(rerun.pipe.spec.schedule, len(rerun.times) - 1, count)


def reversed_times(rerun: Rerun) -> Tensor:
    return 1 - rerun.times


def rows_of_times(name: str, description: str, ways: Mapping[str, Callable]) -> list[KnownBug]:
    """Wrong times show in the schedule, or in the time's embedding of a step."""

    def in_step(times: Callable[[Rerun], Tensor]) -> Callable[[Rerun], Tensor]:
        def compute(rerun: Rerun) -> Tensor:
            t = times(rerun)[rerun.step - 1 : rerun.step]
            return rerun.compute((Flux, "vec", lambda f, self, _, *args: f(self, t, *args)))

        return compute

    in_steps = {text: in_step(times) for text, times in ways.items()}
    return [
        KnownBug(name, description, r"^schedule$", variants(ways)),
        KnownBug(name, description, r"^step.*(/time_in|/vec$|/in(\.1)?$)", variants(in_steps)),
    ]


# ---------------------------------------------------------------- positions


def with_table(table: Callable[[Rerun], Tensor]) -> Callable[[Rerun], Tensor]:
    """Another RoPE table: the table itself, or q and k rotated by it."""

    def compute(rerun: Rerun) -> Tensor:
        rope = table(rerun)
        if rerun.name.endswith("rope"):
            return rope
        return rerun.compute((transformer, "apply_rope", lambda f, x, _: f(x, rope)))

    return compute


def table_with(
    rerun: Rerun,
    axes: Callable = lambda ids: ids,
    dims: Callable = lambda dims: dims,
    theta: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    config, ids = rerun.pipe.spec.transformer, torch.cat(rerun.ids)
    return transformer.rope_table(axes(ids), dims(config.axes_dim), theta * config.theta, dtype)  # type: ignore[arg-type]


def rounded_table(dtype: torch.dtype, rerun: Rerun) -> Tensor:
    return table_with(rerun).to(dtype).float()


def orders_of_axes(rerun: Rerun) -> dict[str, Tensor]:
    """The positions on other axes, or the axes' channels in another order."""
    found = {}
    for order in permutations(range(len(rerun.pipe.spec.transformer.axes_dim))):
        if list(order) == sorted(order):
            continue
        text = ", ".join(map(str, order))
        moved = with_table(partial(table_with, axes=lambda ids, o=order: ids[:, list(o)]))
        found[f"positions {text}"] = moved(rerun)
        sizes = with_table(
            partial(table_with, dims=lambda dims, o=order: tuple(dims[i] for i in o))
        )
        found[f"channels {text}"] = sizes(rerun)
    return found


def text_from(*axes: int) -> Callable[[Rerun], Tensor]:
    """Text tokens that count from 1 on their last axis, or on these axes."""

    def moved(rerun: Rerun) -> tuple[Tensor, Tensor]:
        txt, img = rerun.ids
        shift = torch.zeros_like(txt)
        shift[:, list(axes)] = 1
        return txt + shift, img

    def compute(rerun: Rerun) -> Tensor:
        txt, img = moved(rerun)
        if "ids/" in rerun.name:
            return txt if rerun.name.endswith("txt") else img
        return with_table(lambda _: rerun.network.rope(txt, img))(rerun)

    return compute


def counted(rerun: Rerun) -> Tensor:
    """Text tokens that are counted on the last axis, which FLUX.1 does not."""
    txt, img = rerun.ids
    last = torch.arange(len(txt), device=txt.device)[:, None].to(txt)
    txt = torch.cat([txt[:, :-1], last], dim=1)
    if "ids/" in rerun.name:
        return txt if rerun.name.endswith("txt") else img
    return with_table(lambda _: rerun.network.rope(txt, img))(rerun)


# ---------------------------------------------------------------- attention


def attention_with(
    q: Callable = lambda x, rope: x,
    k: Callable = lambda x, rope: x,
    v: Callable = lambda x, rope: x,
) -> Callable[[Rerun], Tensor]:
    def attention(f: Callable, q_, k_, v_, rope, *rest) -> Tensor:
        return f(q(q_, rope), k(k_, rope), v(v_, rope), rope, *rest)

    return patched(transformer, "attention", attention)


def unrotated(x: Tensor, rope: Tensor) -> Tensor:
    """Undo the rotation that follows."""
    return transformer.apply_rope(x, rope.mT)


def masked(visible: Callable[[int, int], Tensor]) -> Callable[[Rerun], Tensor]:
    """Attention with a mask, made from the numbers of text tokens and of all tokens."""

    def compute(rerun: Rerun) -> Tensor:
        text = len(rerun.ids[0])

        def attend(f: Callable, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
            return f(q, k, v, attn_mask=visible(text, k.shape[2])[-q.shape[2] :])

        return rerun.compute((F, "scaled_dot_product_attention", attend))

    return compute


def sees(*, text_image: bool, image_text: bool) -> Callable[[int, int], Tensor]:
    def visible(text: int, tokens: int) -> Tensor:
        is_text = torch.arange(tokens) < text
        of_text, of_image = is_text[:, None], ~is_text[:, None]
        hidden = torch.zeros(tokens, tokens, dtype=torch.bool)
        if not text_image:
            hidden |= of_text & ~is_text
        if not image_text:
            hidden |= of_image & is_text
        return ~hidden

    return visible


def scaled(factor: Callable[[int, int], float]) -> Callable[[Rerun], Tensor]:
    """q·k divided by another number: factor(width of a head, number of heads)."""
    return attention_with(q=lambda x, rope: x * factor(x.shape[-1], x.shape[-2]))


def merge_heads(f: Callable, q: Tensor, *args) -> Tensor:
    """(head width, head) for (head, head width) in the output's channels."""
    return f(q, *args).unflatten(-1, q.shape[2:]).mT.flatten(-2)


def order_of_qkv(rerun: Rerun) -> dict[str, Tensor]:
    found = {}
    for order in permutations(range(3)):
        if order == (0, 1, 2):
            continue

        def unbind(f: Callable, x: Tensor, dim: int = 0, order=order):
            parts = torch.unbind(x, dim)
            return tuple(parts[i] for i in order) if dim == 2 and len(parts) == 3 else parts

        found["".join("qkv"[order.index(i)] for i in range(3))] = rerun.compute(
            (Tensor, "unbind", unbind)
        )
    return found


# ---------------------------------------------------------------- blocks


def with_mods(change: Callable[[list[ModulationOut]], list[ModulationOut]]) -> Compute:
    """Run blocks whose modulations are changed: one of a single-stream block, two of a stream."""

    def double(f: Callable, self, img, txt, rope, img_mod, txt_mod, cache=None):
        return f(self, img, txt, rope, change(list(img_mod)), change(list(txt_mod)), cache)

    def single(f: Callable, self, x, rope, mod, cache=None):
        return f(self, x, rope, change([mod])[0], cache)

    return lambda rerun: rerun.compute(
        (DoubleStreamBlock, "forward", double), (SingleStreamBlock, "forward", single)
    )


def with_gates(gate: Callable[[Tensor], Tensor]) -> Compute:
    return with_mods(lambda mods: [mod._replace(gate=gate(mod.gate)) for mod in mods])


def take_first(mods: list[ModulationOut]) -> list[ModulationOut]:
    return [mods[0]] * len(mods)


def first_gate(mods: list[ModulationOut]) -> list[ModulationOut]:
    return [mod._replace(gate=mods[0].gate) for mod in mods]


def other_gates(mods: list[ModulationOut]) -> list[ModulationOut]:
    gates = [mod.gate for mod in mods][::-1]
    return [mod._replace(gate=gate) for mod, gate in zip(mods, gates)]


def exchange_streams(f: Callable, self, img, txt, rope, img_mod, txt_mod, cache=None):
    return f(self, img, txt, rope, txt_mod, img_mod, cache)


def stale_mlp(rerun: Rerun) -> Tensor:
    """The MLP reads the block's input, as in a parallel block; modulate runs four times a block."""
    seen: list[Tensor] = []

    def modulate(f: Callable, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        seen.append(x)
        number = (len(seen) - 1) % 4
        return f(seen[number - 2] if number >= 2 else x, shift, scale)

    return rerun.compute((transformer, "modulate", modulate))


def mlp_first(f: Callable, x: Tensor, sizes, dim: int = 0):
    """linear1's columns as (MLP, q k v); only a list of two sizes is a single-stream block's."""
    if not isinstance(sizes, list) or len(sizes) != 2:
        return f(x, sizes, dim=dim)
    return x.narrow(dim, sizes[1], sizes[0]), x.narrow(dim, 0, sizes[1])


def joined_backwards(f: Callable, tensors, dim: int = 0, **kwargs) -> Tensor:
    """linear2 reads (MLP, attention): blocks join tensors on the last axis there alone."""
    tensors = list(tensors)
    return f(tensors[::-1] if dim == -1 else tensors, dim=dim, **kwargs)


def without_residual(rerun: Rerun) -> Tensor:
    """The output of a block without its input."""
    found = re.fullmatch(r"(.+)/out(?:\.(\d))?", rerun.name)
    assert found is not None
    return rerun.expected - rerun.recorded(f"{found[1]}/in.{found[2] or 0}")


def block_skipped(rerun: Rerun) -> Tensor:
    """The input of a block as that of the block before, whose output is not used."""
    if re.search(r"/final_layer/in(\.0)?$", rerun.name):
        last = len(rerun.network.single_blocks) - 1
        joint = rerun.recorded(f"{rerun.place}/single_blocks.{last}/in.0")
        return joint[:, len(rerun.ids[0]) :]
    found = re.fullmatch(r"(.+_blocks)\.(\d+)/in\.(\d)", rerun.name)
    if found is None:
        raise LookupError(rerun.name)
    if int(found[2]):
        return rerun.recorded(f"{found[1]}.{int(found[2]) - 1}/in.{found[3]}")
    last = len(rerun.network.double_blocks) - 1
    streams = [rerun.recorded(f"{rerun.place}/double_blocks.{last}/in.{i}") for i in (1, 0)]
    return torch.cat(streams, dim=1)


def other_block_before(rerun: Rerun) -> dict[str, Tensor]:
    """The input of a block, if another block of its kind ran between the one before and it."""
    found = re.fullmatch(r"((.+/(?:double|single)_blocks)\.\d+)/in\.(\d)", rerun.name)
    if found is None:
        raise LookupError(rerun.name)
    runs = {each.name: each for each in module_runs(rerun.reference)}
    out = {}
    for name, run in runs.items():
        if name == found[1] or not re.fullmatch(rf"{re.escape(found[2])}\.\d+", name):
            continue
        inputs = [rerun.recorded(each) for each in run.inputs]
        tokens = 2 if "double_blocks" in name else 1
        inputs[:tokens] = [rerun.recorded(f"{found[1]}/in.{i}") for i in range(tokens)]
        out[name.rpartition("/")[2]] = Modules(rerun.pipe)(name, inputs)[int(found[3])]
    return out


# ---------------------------------------------------------------- norms and activations


def layer_norm(formula: Callable[[Tensor, float], Tensor]) -> Callable:
    def norm(f: Callable, x: Tensor, shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
        out = formula(x.float(), eps)
        out = out if weight is None else out * weight
        return (out if bias is None else out + bias).to(x.dtype)

    return norm


def standardise(x: Tensor, eps: float, correction: int = 0, centred: bool = True) -> Tensor:
    mean = x.mean(-1, keepdim=True) if centred else 0
    square = (x - mean).square().sum(-1, keepdim=True) / (x.shape[-1] - correction)
    return (x - mean) * torch.rsqrt(square + eps)


def eps_outside(x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


ACTIVATIONS = {
    "SiLU": F.silu,
    "quick GELU": lambda x: x * torch.sigmoid(1.702 * x),
    "ReLU": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "the identity": lambda x: x,
}


def silu_twice(f: Callable, x: Tensor, inplace: bool = False) -> Tensor:
    once = x * torch.sigmoid(x)
    return once * torch.sigmoid(once)


def gelu_as(activation: Callable) -> Callable:
    return lambda f, x, approximate="none": activation(x)


def gated_as(activation: Callable) -> Callable:
    def forward(f: Callable, self: GatedSiLU, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    return forward


def group_norm_of(change: Callable[[int], int]) -> Callable:
    def norm(f: Callable, x: Tensor, groups: int, *args, **kwargs) -> Tensor:
        other = change(groups)
        if other < 1 or x.shape[1] % other:
            raise LookupError  # impossible here
        return torch.group_norm(x, other, *args, **kwargs)

    return norm


def without_bias_of_positions(f: Callable, self: t5.SelfAttention, x: Tensor, bias: Tensor):
    return f(self, x, torch.zeros_like(bias))


def scale_t5(f: Callable, self: t5.SelfAttention, x: Tensor, bias: Tensor):
    def attend(g: Callable, q, k, v, attn_mask=None, scale=None):
        return g(q, k, v, attn_mask=attn_mask)

    with replaced(F, "scaled_dot_product_attention", lambda g: partial(attend, g)):
        return f(self, x, bias)


def not_causal(f: Callable, q, k, v, **kwargs):
    return f(q, k, v, **{key: x for key, x in kwargs.items() if key != "is_causal"})


def heads_repeated(f: Callable, x: Tensor, repeats: int, dim: int = 0, **kwargs) -> Tensor:
    """Key and value heads as (0, 1, 0, 1) for (0, 0, 1, 1)."""
    return torch.cat([x] * repeats, dim) if dim == 1 else f(x, repeats, dim=dim, **kwargs)


# ---------------------------------------------------------------- the table

STEP = r"^(step|references)"
IDS = r"^(negative/)?(ids|rope)|^step"
LATENTS = r"^noise$|^step.*/latents$|^step\.\d+(/negative)?/(in|img_in/in)$"
CODER = r"^(decoder|pixels|encoder)"
TEXT = r"^text"
BLOCK = r"^step.*_blocks\."
WRONG_WEIGHTS = "weights of another module"
GATE = ("gate of a residual", "{}")
ATTENTION = r"/attention/|_blocks|final_layer|/out"

# fmt: off
BUGS_IN_BLOCKS: tuple[KnownBug, ...] = (
    # weights
    KnownBug(WRONG_WEIGHTS, "the weights of {} are used: those of the other stream",
        STEP, weights_of(other_stream)),
    KnownBug(WRONG_WEIGHTS, "the weights of {} are used",
        r"/double_blocks\.\d+[./]", shared_streams),
    KnownBug(WRONG_WEIGHTS,
        "the weights of {} are used: those of another block (numbers sorted as texts?)",
        "", weights_of(other_blocks)),
    KnownBug(WRONG_WEIGHTS, "the weights of {} are used", STEP, weights_of(other_norm)),
    KnownBug("bias left out", "the bias of a linear layer is not added",
        "", patched(F, "linear", lambda f, x, weight, bias=None: f(x, weight))),
    KnownBug("weights transposed", "a square weight matrix is transposed: y = x W, expected x W^T",
        "", patched(F, "linear", transposed)),

    # precision
    KnownBug("weights rounded", "the weights of linear layers are rounded to {}",
        "", patched_in(F, "linear", {n: linear_in(d, False) for n, d in HALVES.items()})),
    KnownBug("linear layers in low precision", "linear layers compute in {}",
        "", patched_in(F, "linear", {n: linear_in(d, True) for n, d in HALVES.items()})),
    KnownBug("norm in low precision", "LayerNorm computes in {}",
        "", patched_in(F, "layer_norm", {n: norm_in(d) for n, d in HALVES.items()}
            | {f"{n}, rounded at each step": norm_by_steps_in(d) for n, d in HALVES.items()})),
    KnownBug("norm in low precision", "RMSNorm of queries and keys computes in {}",
        STEP, patched_in(F, "rms_norm", {n: norm_in(d) for n, d in HALVES.items()})),
    KnownBug("attention in low precision", "attention computes in {}",
        "", patched_in(F, "scaled_dot_product_attention", {
            n: attention_in(d) for n, d in HALVES.items()})),
    KnownBug("latents rounded", "latents or noise are rounded to {}",
        LATENTS, variants(LATENTS_IN)),
    KnownBug("latents rounded", "the Euler step computes in {}",
        r"^step.*/latents$", variants({n: step_in(d) for n, d in HALVES.items()})),

    # conditioning
    KnownBug("conditioning vector", "{}",
        r"^step.*(/vec$|/in(\.1)?$|/out|arg)", variants(CONDITIONING)),
    KnownBug("SiLU twice", "SiLU is applied twice; a modulation applies it once to vec",
        STEP, patched(F, "silu", silu_twice)),
    *rows_of_times("schedule's number of tokens", "mu is computed from {}", {
        "four times the image tokens (latents before packing)": partial(other_times, tokens=4),
        "a quarter of the image tokens": partial(other_times, tokens=0.25),
        "image and text tokens": partial(other_times, text=True)}),
    *rows_of_times("time reversed", "{}, expected t from 1 (noise) to 0 (image)", {
        "t is 1 - t": reversed_times}),

    # positions
    KnownBug("order of RoPE's axes", "the axes are taken in another order: {}",
        IDS, orders_of_axes),
    KnownBug("RoPE's theta", "theta is {} times FLUX's",
        IDS, variants({f"{x:g}": with_table(partial(table_with, theta=x))
            for x in (5, 0.2, 50, 0.5, 2, 10, 0.1, 100)} | {
            "1 / the square root of theta": with_table(lambda rerun: table_with(
                rerun, theta=rerun.pipe.spec.transformer.theta**-0.5)),
            "theta": with_table(lambda rerun: table_with(
                rerun, theta=rerun.pipe.spec.transformer.theta))})),
    KnownBug("RoPE in low precision", "{}",
        IDS, variants({
            f"the table is rounded to {n}": with_table(partial(rounded_table, d))
            for n, d in HALVES.items()}
            | {"angles are computed in bfloat16": with_table(
                partial(table_with, dtype=torch.bfloat16))})),
    KnownBug("text positions off by one", "text tokens count from 1 {}, expected from 0",
        IDS, variants({"on the last axis": text_from(-1), "on the first axis": text_from(0),
            "on all axes": text_from(0, 1, 2)})),
    KnownBug("text positions counted", "text tokens are counted on the last axis",
        IDS, counted),
    KnownBug("RoPE of the wrong tensors", "{}",
        STEP, variants({
            "values are rotated": attention_with(v=transformer.apply_rope),
            "keys are not rotated": attention_with(k=unrotated),
            "queries are not rotated": attention_with(q=unrotated),
            "queries and keys are rotated twice": attention_with(
                q=transformer.apply_rope, k=transformer.apply_rope)})),

    # attention
    KnownBug("order of q, k and v",
        "the linear layer's columns are read as {}, expected as qkv", STEP, order_of_qkv),
    KnownBug("heads merged the wrong way",
        "the channels of attention's output are (channel, head), expected (head, channel)",
        STEP, patched(transformer, "attention", merge_heads)),
    KnownBug("scale of attention", "q·k is divided by {}",
        STEP, variants({
            "the square root of all channels": scaled(lambda d, heads: heads**-0.5),
            "the head's width, not its square root": scaled(lambda d, heads: d**-0.5),
            "the square root of the number of heads": scaled(lambda d, h: (d / h) ** 0.5),
            "the square root twice over": scaled(lambda d, heads: d**-0.5)})),
    KnownBug("attention masked", "{}; every token attends to every other in FLUX",
        STEP, variants({
            "attention is causal": masked(lambda text, n: torch.ones(n, n).tril().bool()),
            "text does not see the image": masked(sees(text_image=False, image_text=True)),
            "the image does not see the text": masked(sees(text_image=True, image_text=False)),
            "text and image do not see each other": masked(
                sees(text_image=False, image_text=False))})),

    # blocks
    KnownBug(*GATE, BLOCK, variants({
        "the MLP has the gate of attention": with_mods(first_gate),
        "the gates of attention and MLP are exchanged": with_mods(other_gates),
        "the gate is left out": with_gates(torch.ones_like),
        "the gate is 1 + gate": with_gates(lambda gate: 1 + gate),
        "the gate goes through tanh": with_gates(torch.tanh),
        "the gate goes through a sigmoid": with_gates(torch.sigmoid)})),
    KnownBug("modulation of another branch", "{}",
        BLOCK, variants({
            "the MLP has the modulation of attention": with_mods(take_first),
            "attention and MLP have each other's modulation": with_mods(lambda mods: mods[::-1]),
            "text and image have each other's modulation": patched(
                DoubleStreamBlock, "forward", exchange_streams)})),
    KnownBug("modulation left out", "{} is not applied after a norm",
        STEP, patched_in(transformer, "modulate", {
            "shift": lambda f, x, shift, scale: f(x, 0 * shift, scale),
            "scale": lambda f, x, shift, scale: f(x, shift, 0 * scale),
            "modulation": lambda f, x, shift, scale: f(x, 0 * shift, 0 * scale)})),
    KnownBug("MLP on the block's input",
        "a double-stream block's MLP reads the block's input, expected the sum after attention",
        r"/double_blocks\.", stale_mlp),
    KnownBug("order in linear1",
        "linear1's columns are read as MLP, q, k, v; expected q, k, v, MLP",
        r"/single_blocks\.", patched(Tensor, "split", mlp_first)),
    KnownBug("order in linear2", "linear2 reads MLP, then attention; expected attention, then MLP",
        r"/single_blocks\.", patched(torch, "cat", joined_backwards)),
    KnownBug("residual left out", "a block's input is not added to its output",
        r"_blocks\.\d+/out(\.\d)?$", without_residual),
    KnownBug("block skipped", "the block before this tensor is not run, or its output is not used",
        r"/in(\.\d)?$", block_skipped),

    KnownBug("order of blocks", "{} ran before this block (numbers sorted as texts?)",
        r"_blocks\.\d+/in\.\d$", other_block_before),

    # norms and activations
    KnownBug("norm by another formula", "LayerNorm {}",
        "", patched_in(F, "layer_norm", {
            "divides by the unbiased variance (n - 1)": layer_norm(
                partial(standardise, correction=1)),
            "does not subtract the mean": layer_norm(partial(standardise, centred=False)),
            "adds epsilon to the standard deviation": layer_norm(eps_outside),
            "is left out": layer_norm(lambda x, eps: x)})),
    KnownBug("another activation", "{} is used, expected GELU in its tanh approximation",
        "", patched_in(F, "gelu", {n: gelu_as(a) for n, a in ACTIVATIONS.items()})),
    KnownBug("another activation", "the gate goes through {}, expected SiLU",
        STEP, patched_in(GatedSiLU, "forward", {
            n: gated_as(a) for n, a in (ACTIVATIONS | {
                "GELU": F.gelu, "tanh GELU": partial(F.gelu, approximate="tanh")}).items()
            if n != "SiLU"})),

    # autoencoder
    KnownBug("activation of the autoencoder", "{}, expected SiLU after each group norm",
        CODER, patched_in(F, "silu", {
            "it is left out": lambda f, x, inplace=False: x,
            "it is GELU": lambda f, x, inplace=False: F.gelu(x),
            "it is ReLU": lambda f, x, inplace=False: F.relu(x)})),
    KnownBug("groups of the autoencoder's norms", "group norms have {} the groups",
        CODER, patched_in(F, "group_norm", {
            "half": group_norm_of(lambda n: n // 2), "twice": group_norm_of(lambda n: 2 * n),
            "a quarter of": group_norm_of(lambda n: n // 4),
            "1, whatever": group_norm_of(lambda n: 1)})),

    # text encoders
    KnownBug("T5's position bias left out", "T5's attention has no relative position bias",
        TEXT, patched(t5.SelfAttention, "forward", without_bias_of_positions)),
    KnownBug("T5's attention scaled", "T5's q·k is divided by the square root of the head's width",
        TEXT, patched(t5.SelfAttention, "forward", scale_t5)),
    KnownBug("CLIP not causal", "CLIP's attention sees later tokens, expected a causal mask",
        r"/clip/|pooled", patched(F, "scaled_dot_product_attention", not_causal)),
    KnownBug("CLIP's last norm left out", "the pooled vector is taken before the last norm",
        r"/clip/|pooled", patched(nn.LayerNorm, "forward", lambda f, self, x: x)),
    KnownBug("language model's heads",
        "key and value heads are repeated as 0, 1, 0, 1; expected 0, 0, 1, 1",
        r"/model/", patched(Tensor, "repeat_interleave", heads_repeated)),
    KnownBug("language model's QK-norm left out", "queries and keys are not normalised",
        r"/model/", patched(language_model.RMSNorm, "forward",
            lambda f, self, x: x if x.ndim == 4 else f(self, x))),
)
# fmt: on
