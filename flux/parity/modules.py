"""Run any module of a pipeline by its name in a capture, in any dtype, and in little memory.

A `Call` runs the module of a name (`step.001/double_blocks.3`; a whole network is `step.001`) on a
list of tensors and returns a list of tensors, both in the order of their numbers in a capture.
`Modules` is a Call; a port in any language can be another. The tensors of modules in blocks:

    double_blocks.N  img, txt, rope, shift, scale, gate (image's two, text's two); k, v, text length
                     if reference tokens are cached -> img, txt
    single_blocks.N  x, rope, shift, scale, gate; k, v, text length if cached -> x
    *mode_blocks.N   the same, without a cache, of FLUX 3
    *_mod, *modulation*  vec -> shift, scale, gate (of each branch)
    *.norm           q, k (B, H, N, d) -> q, k
    */attention      q, k, v (B, H, N, d), after RoPE -> the output (B, H, N, d)
"""

import copy
import importlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flux import transformer3
from flux.autoencoder import AutoEncoder
from flux.errors import UserError
from flux.hooks import NORMS
from flux.loading import decode_dtype
from flux.pipeline import Pipeline
from flux.runtime.devices import free_memory
from flux.runtime.lazy_module import LazyModule
from flux.transformer import DoubleStreamBlock, Flux, KVCache, ModulationOut, SingleStreamBlock
from flux.transformer3 import Block, Flux3

Call = Callable[[str, list[Tensor]], list[Tensor]]
Cast = Callable[[Tensor], Tensor]
PLACE = re.compile(
    r"((step|references|encoder|decoder|text)(?:\.\d+)?(?:/negative)?(?:/(t5|clip|model))?)(?:/(.+))?"
)


class Modules:
    """Run any module of these networks by its name. Floats are cast to the network's dtype.

    `networks`: "step" (the transformer), "references" (the same), "decoder", "encoder", "t5",
    "clip", "model" -> a function that returns the network. UserError for an unknown module, or for
    tensors that the module does not take.
    """

    def __init__(self, networks: Pipeline | Mapping[str, Callable[[], nn.Module]]):
        self.networks = networks_of(networks) if isinstance(networks, Pipeline) else networks

    def network(self, name: str) -> nn.Module:
        where = PLACE.fullmatch(name)
        if where is None or (where[3] or where[2]) not in self.networks:
            raise UserError(
                f"{name}: is in no network of the pipeline. Names begin with step.001, decoder, "
                "text/t5, and so on."
            )
        return self.networks[where[3] or where[2]]()

    def __call__(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        network = self.network(name)  # UserError for a name that does not match
        found = PLACE.fullmatch(name)
        path = (found[4] if found else None) or ""
        like = next(network.parameters())

        def cast(x: Tensor) -> Tensor:
            return x.to(like.device, like.dtype if x.is_floating_point() else None)

        try:
            with torch.inference_mode():
                return tree_leaves(_run(network, name, path, inputs, cast))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
            raise UserError(
                f"{name}: does not take the recorded inputs of shapes {shapes} ({error!s:.120})."
            ) from error


def _run(network: nn.Module, name: str, path: str, inputs: list[Tensor], cast: Cast):
    if path.endswith("/attention"):
        q, k, v = map(cast, inputs)
        return F.scaled_dot_product_attention(q, k, v)
    if path == "" and isinstance(network, Flux):
        return _run_transformer(network, name, inputs, cast)
    if path == "" and isinstance(network, Flux3):
        return _run_transformer3(network, inputs, cast)
    if path == "" and isinstance(network, AutoEncoder):
        (x,) = map(cast, inputs)
        return network.encode(x) if name.startswith("encoder") else network.decode(x)
    try:
        module = network.get_submodule(path)
    except AttributeError:
        raise UserError(
            f"{name}: {type(network).__name__} has no module {path!r}. "
            "Is the capture of another model?"
        ) from None
    if isinstance(module, DoubleStreamBlock):
        return _run_double_block(module, inputs, cast)
    if isinstance(module, SingleStreamBlock):
        return _run_single_block(module, inputs, cast)
    if isinstance(module, Block):
        x, rope, *mod = inputs
        return module(cast(x), rope.to(x.device), transformer3.ModulationOut(*map(cast, mod)))
    if isinstance(module, NORMS):  # recorded as (B, H, N, d)
        out = module(*[cast(x).transpose(1, 2) for x in inputs])
        return [x.transpose(1, 2) for x in tree_leaves(out)]
    return module(*map(cast, inputs))


def _run_transformer(network: Flux, name: str, inputs: list[Tensor], cast: Cast):
    """Run one pass on image tokens, text features, RoPE table, vec and all blocks' cached k and v.

    References: run them alone, from tokens, RoPE table and vec, and return every block's k and v.
    """
    if name.startswith("references"):
        references, rope, vec = inputs
        blocks = len(network.double_blocks) + len(network.single_blocks)
        caches = [KVCache(text_length=0) for _ in range(blocks)]
        txt = references.new_zeros(len(references), 0, network.config.context_dim)
    else:
        references, txt, rope, vec, *cached = inputs
        caches = []
        for k, v in zip(cached[::2], cached[1::2], strict=True):
            caches.append(_cache(txt.shape[1], cast(k), cast(v)))
    vec = cast(vec)
    mods = network.modulations([vec])[0]
    out = network.denoise(cast(references), cast(txt), rope.to(vec.device), mods, caches or None)
    if name.startswith("references"):
        return [tensor for cache in caches for tensor in (cache.k, cache.v)]
    return out


def _run_transformer3(network: Flux3, inputs: list[Tensor], cast: Cast):
    """Run one pass of FLUX 3 on what `capture3.inputs_of_pass` lists."""
    *streams, vec, vec_0 = inputs
    if len(streams) not in (4, 6):
        raise ValueError(f"{len(inputs)} tensors, expected 6, or 8 with references")
    modes = dict(zip(("image", "txt", "image_cond"), zip(*_halves(streams))))

    def of_tokens(vec: Tensor, tokens: Tensor) -> Tensor:
        """Repeat vec where the pipeline does: with diffusers' numerics (`velocity3`)."""
        vec = cast(vec)
        each = final.modulation_dtype is None
        return vec.expand(-1, tokens.shape[1], -1) if each else vec

    final: Any = network.final_layer["image"]
    img, rope = modes.pop("image")
    ran = []
    for mode, (tokens, table) in modes.items():
        tokens = cast(tokens)
        vec_of = of_tokens(vec_0, tokens)
        ran.append(network.stream(mode, tokens, table.to(vec_of.device), vec_of))
    img = cast(img)
    return network.denoise(img, rope.to(img.device), of_tokens(vec, img), *ran)


def _halves(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    middle = len(tensors) // 2
    return tensors[:middle], tensors[middle:]


def _run_double_block(block: DoubleStreamBlock, inputs: list[Tensor], cast: Cast):
    img, txt, rope, *rest = inputs
    mods = [ModulationOut(*map(cast, rest[i : i + 3])) for i in range(0, 12, 3)]
    cache = _recorded_cache(rest[12:], cast)
    img, txt = cast(img), cast(txt)
    return block(img, txt, rope.to(img.device), mods[:2], mods[2:], cache)


def _run_single_block(block: SingleStreamBlock, inputs: list[Tensor], cast: Cast):
    x, rope, *rest = inputs
    x, mod = cast(x), ModulationOut(*map(cast, rest[:3]))
    return block(x, rope.to(x.device), mod, _recorded_cache(rest[3:], cast))


def _recorded_cache(recorded: list[Tensor], cast: Cast) -> KVCache | None:
    if not recorded:
        return None
    k, v, text_length = recorded
    return _cache(int(text_length), cast(k), cast(v))


def _cache(text_length: int, k: Tensor, v: Tensor) -> KVCache:
    cache = KVCache(text_length)
    cache.k, cache.v = k, v
    return cache


def networks_of(pipe: Pipeline) -> dict[str, LazyModule]:
    text = {part: getattr(pipe.text, part) for part in pipe.spec.text.networks}
    return text | dict(
        step=pipe.transformer,
        references=pipe.transformer,
        decoder=pipe.autoencoder,
        encoder=pipe.image_encoder,
    )


def named(text: str) -> Call:
    """Import the function of "module:function"."""
    module, _, function = text.partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"module_fn: there is no function {text} ({error!s:.120}). Use MODULE:FUNCTION."
        ) from None
    if not callable(call):
        raise UserError(
            f"module_fn: {text} is not a function (expected one of a name and a list of tensors)."
        )
    return call


def guarded(call: Call) -> Call:
    """Return the same call, with UserErrors for the errors of other people's code."""

    def answer(name: str, inputs: list[Tensor]):
        try:
            return call(name, inputs)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"module_fn: failed at {name} with {type(error).__name__} ({error!s:.160})."
            ) from error

    return answer


# ---------------------------------------------------------------- in another precision


def in_dtype(
    pipe: Pipeline, dtype: torch.dtype, change: Callable[[Tensor], Tensor] | None = None
) -> Pipeline:
    """Return the pipeline in another dtype; `change` is applied to the matrices in its blocks.

    If the networks do not fit in memory together, their blocks stay mapped, and each matrix is cast
    when it is used.
    """
    twin, twin.text = copy.copy(pipe), copy.copy(pipe.text)
    twin.dtype, twin.text.cache = dtype, {}
    for owner, part in [
        (twin, "transformer"),
        (twin, "autoencoder"),
        *((twin.text, part) for part in pipe.spec.text.networks),
    ]:
        network = copy.copy(getattr(owner, part))
        network.dtype, network.module = dtype, None
        setattr(owner, part, network)
    twin.autoencoder.dtype = pipe.options.decode_dtype or decode_dtype(pipe.numerics, dtype)
    twin.text.networks = tuple(getattr(twin.text, part) for part in pipe.spec.text.networks)
    networks: list[LazyModule] = [twin.transformer, twin.autoencoder, *twin.text.networks]
    twin.residency = copy.copy(pipe.residency)
    twin.residency.keep_loaded()  # what is in memory when, is decided here
    fits = sum(network.nbytes for network in networks) < 0.8 * free_memory(pipe.device)
    if change or not fits:
        for network in networks:
            lend(network, change or (lambda matrix: matrix))
    return twin


def lend(network: LazyModule, change: Callable[[Tensor], Tensor]) -> None:
    """Load a network, but leave the matrices in its blocks in the file until they are used."""
    file = copy.copy(network)
    if network.transform is None:  # a LoRA is merged into matrices in the dtype of the network
        file.device, file.dtype = torch.device("cpu"), None  # type: ignore[assignment]
    module, device, dtype = file(), network.device, network.dtype

    def linear(part: nn.Linear, x: Tensor) -> Tensor:
        bias = None if part.bias is None else part.bias.to(device, dtype)
        return F.linear(x, change(part.weight.to(device, dtype)), bias)

    for path, part in module.named_modules():
        if type(part) is nn.Linear and re.search(r"\.\d+\.", path):
            part.__dict__["forward"] = partial(linear, part)
            continue
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)
    network.module = module
