"""The networks of a pipeline, of which any module can be run by its name in a capture, in any precision, and in little memory.

A `Call` runs the module of a name (`step.001/double_blocks.3`; a whole network is `step.001`) on a list of tensors and gives a
list of tensors, both in the order in which a capture numbers them. `Modules` is one; a port in any language can be another.
"""

import copy
import importlib
import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flux.autoencoder import AutoEncoder
from flux.errors import UserError
from flux.pipeline import Pipeline
from flux.runtime.devices import free_memory
from flux.runtime.lazy_module import LazyModule
from flux.transformer import DoubleStreamBlock, Flux, KVCache, ModulationOut, SingleStreamBlock

Call = Callable[[str, list[Tensor]], list[Tensor]]
PLACE = re.compile(
    r"((step|references|encoder|decoder|text)(?:\.\d+)?(?:/negative)?(?:/(t5|clip|model))?)(?:/(.+))?"
)


class Modules:
    """Runs any module of these networks by its name in a capture; floats are first cast to the network's dtype.

    `networks`: "step" (the transformer), "references" (the same), "decoder", "encoder", "t5", "clip", "model" -> a function
    that gives the network. UserError for a module that there is not, or that does not take such tensors.
    """

    def __init__(self, networks: Pipeline | Mapping[str, Callable[[], nn.Module]]):
        self.networks = networks_of(networks) if isinstance(networks, Pipeline) else networks

    def network(self, name: str) -> nn.Module:
        where = PLACE.fullmatch(name)
        if where is None or (where[3] or where[2]) not in self.networks:
            raise UserError(
                f"{name} is of no network here: names begin with step.001, decoder, text/t5, and so on"
            )
        return self.networks[where[3] or where[2]]()

    def __call__(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        network, path = self.network(name), PLACE.fullmatch(name)[4] or ""
        like = next(network.parameters())

        def cast(x):
            return x.to(like.device, like.dtype if x.is_floating_point() else None)

        try:
            with torch.inference_mode():
                return tree_leaves(_run(network, name, path, inputs, cast))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
            raise UserError(
                f"{name} does not take what was recorded, {shapes} ({error!s:.120})"
            ) from error


def _run(
    network: nn.Module, name: str, path: str, inputs: list[Tensor], cast: Callable[[Tensor], Tensor]
):
    if path.endswith("/attention"):
        return F.scaled_dot_product_attention(*map(cast, inputs))
    if path == "" and isinstance(network, Flux | AutoEncoder):
        return _network(network, name, inputs, cast)
    try:
        module = network.get_submodule(path)
    except AttributeError:
        fault = f"{type(network).__name__} has no module {path!r}"
        raise UserError(f"{name}: {fault}; is the capture of another model?") from None
    remembering = name.startswith("references") and hasattr(module, "remember")
    return (module.remember if remembering else module)(*_arguments(module, inputs, cast))


def _network(network: nn.Module, name: str, inputs: list[Tensor], cast: Callable[[Tensor], Tensor]):
    """A whole transformer or autoencoder."""
    if not isinstance(network, Flux):
        (x,) = map(cast, inputs)
        return network.encode(x) if name.startswith("encoder") else network.decode(x)
    if name.startswith("references"):
        references, rope, vec, *_ = inputs  # the rest is made of vec
        return network.remember(
            cast(references), rope.to(vec.device), network.modulations(cast(vec))
        )
    img, txt, rope, vec, *rest = inputs
    memories = [KVCache(cast(k), cast(v)) for k, v in zip(rest[::2], rest[1::2], strict=True)]
    mods = network.modulations(cast(vec))
    return network.velocity(cast(img), cast(txt), rope.to(mods.vec.device), mods, memories or None)


def _arguments(module: nn.Module, inputs: list[Tensor], cast: Callable[[Tensor], Tensor]) -> list:
    """Tensors in a row -> what the module takes: the blocks of the transformer want modulations, and rope in float32."""
    if not isinstance(module, DoubleStreamBlock | SingleStreamBlock):
        return [cast(x) for x in inputs]
    double = isinstance(module, DoubleStreamBlock)
    streams = (
        2 if double and len(inputs) > 8 else 1
    )  # 1: its image stream alone remembers references
    branches = 2 * streams if double else 1
    x, rope, rest = (
        [cast(x) for x in inputs[:streams]],
        inputs[streams],
        [cast(x) for x in inputs[streams + 1 :]],
    )
    mods = [ModulationOut(*rest[i : i + 3]) for i in range(0, 3 * branches, 3)]
    memory = [KVCache(*rest[3 * branches :])] if len(rest) > 3 * branches else []
    pairs = [mods[i : i + 2] for i in range(0, branches, 2)] if double else mods
    return [*x, rope.to(x[0].device), *pairs, *memory]


def networks_of(pipe: Pipeline) -> dict[str, LazyModule]:
    text = {part: getattr(pipe.text, part) for part in pipe.spec.text.networks}
    return text | dict(
        step=pipe.transformer,
        references=pipe.transformer,
        decoder=pipe.autoencoder,
        encoder=pipe.image_encoder,
    )


def named(text: str) -> Call:
    """The function that `module:function` names, of a module that can be imported."""
    module, _, function = text.partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--call {text}: there is no such function ({error!s:.120}); write MODULE:FUNCTION"
        ) from None
    if not callable(call):
        raise UserError(
            f"--call {text} is no function; it should take a name and a list of tensors"
        )
    return call


def guarded(call: Call) -> Call:
    """The same, with UserErrors for whatever somebody else's code may raise."""

    def answer(name: str, inputs: list[Tensor]):
        try:
            return call(name, inputs)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"the adaptor failed at {name} with {type(error).__name__}: {error!s:.160}"
            ) from error

    return answer


# ---------------------------------------------------------------- in another precision


def in_dtype(
    pipe: Pipeline, dtype: torch.dtype, change: Callable[[Tensor], Tensor] | None = None
) -> Pipeline:
    """The same pipeline, loaded anew in another dtype; `change` is made to the matrices in its blocks.

    If the networks do not fit in memory together, their blocks stay mapped, and a matrix is cast when it is multiplied with.
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
    twin.text.networks = tuple(getattr(twin.text, part) for part in pipe.spec.text.networks)
    networks = twin.transformer, twin.autoencoder, *twin.text.networks
    twin.residency = copy.copy(pipe.residency)
    twin.residency.keep_loaded()  # what is in memory when, is decided here
    fits = sum(network.nbytes for network in networks) < 0.8 * free_memory(pipe.device)
    if change or not fits:
        for network in networks:
            lend(network, change or (lambda matrix: matrix))
    return twin


def lend(network: LazyModule, change: Callable[[Tensor], Tensor]) -> None:
    """Load a network but the matrices in its blocks: each stays as it is in the file, until the moment that it is used."""
    file = copy.copy(network)
    if network.transform is None:  # a LoRA is added to matrices in the dtype that they are used in
        file.device, file.dtype = torch.device("cpu"), None
    module, to = file(), dict(device=network.device, dtype=network.dtype)

    def linear(part: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(
            x, change(part.weight.to(**to)), None if part.bias is None else part.bias.to(**to)
        )

    for path, part in module.named_modules():
        if type(part) is nn.Linear and re.search(r"\.\d+\.", path):
            part.forward = lambda x, part=part: linear(part, x)
        else:
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                tensor.data = tensor.data.to(
                    network.device, network.dtype if tensor.is_floating_point() else None
                )
    network.module = module
