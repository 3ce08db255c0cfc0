"""IP-adapters of FLUX.1 in XLabs' layout: an image in the place of a prompt.

    end = load_ip_adapter(path, pipe).apply(embedding, scale=0.8)

Ye et al. 2023, arXiv:2308.06721. CLIP's embedding of the image (`image_embeds` of OpenAI's
ViT-L/14, 768 numbers) becomes a few tokens. In each double block, the image's queries, before RoPE,
also attend to these tokens; the result is added to the block's output. The unconditional branch
sees no image.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from flux.configs import ModelSpec
from flux.errors import UserError
from flux.transformer import Flux
from flux.weights.files import read_header

PROJECTION = "ip_adapter_proj_model"
KEY = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj"


class IPAdapter:
    """The weights of an adapter, by their names in the file, and the pipeline that they are for."""

    def __init__(self, weights: dict[str, Tensor], pipe: Any):
        self.weights, self.pipe = weights, pipe

    def linear(self, layer: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"])

    def tokens(self, embedding: Tensor) -> Tensor:
        """(B, E) -> (B, T, D'), of the width of text tokens."""
        width = self.pipe.spec.transformer.context_dim
        x = self.linear(f"{PROJECTION}.proj", embedding).unflatten(-1, (-1, width))
        weight, bias = (self.weights[f"{PROJECTION}.norm.{name}"] for name in ("weight", "bias"))
        return F.layer_norm(x, (width,), weight, bias)

    def apply(self, embedding: Tensor, scale: float = 1.0) -> Callable[[], None]:
        """Let the pipeline see an image, by its embedding (1, E) or (B, E), from now on.

        Return the function that ends this.
        """
        now, heads = self.pipe.now, self.pipe.spec.transformer.num_heads
        with torch.no_grad():
            tokens = self.tokens(embedding.to(self.pipe.device, self.pipe.dtype))

        def on_load(network: Flux) -> list[RemovableHandle]:
            queries: dict[int, Tensor] = {}
            handles = []
            blocks: list[Any] = list(network.double_blocks.children())
            if any(block.img_attn.num_heads != heads for block in blocks):
                raise UserError(
                    "parallel: tensor divides the heads, and an IP-adapter needs all of them in "
                    "each process. Divide the tokens: context."
                )
            for number, block in enumerate(blocks):

                def keep(module, args, out, number=number):  # q, k, v of the image
                    queries[number] = out[0]

                def add(module, args, out, number=number):
                    q = queries.pop(number)  # (B, L, H, d)
                    if now.branch == "unconditional":
                        return out
                    k, v = (
                        self.linear(KEY.format(number, part), tokens).unflatten(-1, (heads, -1))
                        for part in ("k", "v")
                    )
                    k, v = (x.expand(len(q), -1, -1, -1).transpose(1, 2) for x in (k, v))
                    seen = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)  # (B, H, L, d)
                    return out[0] + scale * seen.transpose(1, 2).flatten(2), out[1]

                handles.append(block.img_attn.register_forward_hook(keep))
                handles.append(block.register_forward_hook(add))
            return handles

        return self.pipe.transformer.on_load(on_load)


def load_ip_adapter(path: str | Path, pipe: Any) -> IPAdapter:
    """Load an adapter for a FLUX.1 pipeline, on its device and in its dtype."""
    if not pipe.spec.flux1:
        raise UserError(f"path: {path} is an IP-adapter of FLUX.1, not of {pipe.spec.name}.")
    names = tensor_names(Path(path), pipe.spec)
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name).to(pipe.device, pipe.dtype) for name in names}
    return IPAdapter(weights, pipe)


def tensor_names(path: Path, spec: ModelSpec) -> tuple[str, ...]:
    """Return the names of an adapter's tensors for a row of FLUX.1; UserError if the file differs.

    Of the projection, any number of tokens is right, and any width of the embedding.
    """
    infos, _ = read_header(path)
    c = spec.flux_config
    layers = [KEY.format(n, part) for n in range(c.depth) for part in ("k", "v")]
    wanted: dict[str, tuple[int, ...]] = {}
    wanted |= {f"{layer}.weight": (c.hidden_size, c.context_dim) for layer in layers}
    wanted |= {f"{layer}.bias": (c.hidden_size,) for layer in layers}
    wanted |= {f"{PROJECTION}.norm.{name}": (c.context_dim,) for name in ("weight", "bias")}
    projection = [f"{PROJECTION}.proj.weight", f"{PROJECTION}.proj.bias"]
    for name in (*projection, *wanted):
        if name not in infos or infos[name].shape != wanted.get(name, infos[name].shape):
            raise UserError(
                f"path: {path} is no IP-adapter in XLabs' layout for {spec.name} ({name})."
            )
    return (*projection, *wanted)
