"""FLUX 3's transformer with less time and memory, applied from outside: the same bits on a CPU.

`fast_transformer3` changes the classes of a loaded network, as `fast.fast_transformer` does. Tokens
of a mode share one modulation: no copy of it is made for each token. Norms, RoPE and activations
run in chunks on a CPU, and in fewer kernels on a GPU. Whatever a hook sees is that of the plain
network.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.runtime.fast import (
    attend,
    chunk_sizes,
    chunked,
    complex_rotations,
    norm_and_rotate,
    on_cpu,
    runs_plain,
)
from flux.transformer3 import Block, Flux3, ModulationOut, Stream


def fast_transformer3(flux: Flux3) -> Flux3:
    """Make the blocks of `flux`, loaded or on the meta device, fast. Return `flux`."""
    for module in flux.modules():
        module.__class__ = CLASSES.get(type(module), type(module))
    return flux


class Shared:
    """What the blocks of a list share, made once: the modulation of each mode, and rotations.

    modes: the number of tokens of each mode, in order, and their modulation, (B, 1, D) each.
    rope: (N, d/2, 2, 2). dtype: what norms and modulation are computed in.
    """

    def __init__(
        self, modes: Sequence[tuple[int, ModulationOut]], rope: Tensor, dtype: torch.dtype
    ):
        self.modes, self.dtype = modes, dtype
        self.rotations = complex_rotations(rope)
        # of the mode's tokens: 1 + scale, shift, gate
        self.wide = [(1 + m.scale.to(dtype), m.shift.to(dtype), m.gate) for _, m in modes]

    def pieces(self, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield tokens of x (B, N, D), a chunk of one mode at a time, with the mode's `wide`."""
        most, start = max(1, chunk_sizes(x).tokens // x[:, 0].numel()), 0
        for (count, _), parts in zip(self.modes, self.wide, strict=True):
            stop = start + count
            for first in range(start, stop, most):
                yield slice(first, min(first + most, stop)), *parts
            start = stop

    def per_token(self) -> ModulationOut:
        """Return what the plain network passes to a block: (B, N, D) each."""
        parts = [[part.expand(-1, count, -1) for part in mod] for count, mod in self.modes]
        return ModulationOut(*(torch.cat(tokens, dim=1) for tokens in zip(*parts)))


class FastFlux3(Flux3):
    def stream(self, mode: str, tokens: Tensor, rope: Tensor, vec: Tensor) -> Stream:
        blocks: Any = self.txt_mode_blocks if mode == "txt" else self.content_mode_blocks[mode]
        if not run_fast(blocks.children()) or vec.shape[1] != 1:
            return super().stream(mode, tokens, rope, vec)
        x = self.txt_in(tokens) if mode == "txt" else self.emb_in[mode](tokens)  # (B, N', D)
        active = F.silu(vec)
        mod = self.early_stream_modulations[mode](active)
        shared = Shared([(x.shape[1], mod)], rope, modulation_dtype(self, x))
        for block in blocks:
            x = block(x, rope, shared)
        return Stream(x, rope, self.single_stream_modulations[mode](active))

    def denoise(
        self, img: Tensor, rope: Tensor, vec: Tensor, text: Stream, *references: Stream
    ) -> Tensor:
        others = [text, *references]
        one_each = vec.shape[1] == 1 and all(s.mod.shift.shape[1] == 1 for s in others)
        if not one_each or not run_fast(self.single_blocks.children()):
            return super().denoise(img, rope, vec, text, *references)
        streams = [text, self.stream("image", img, rope, vec), *references]
        x = torch.cat([stream.x for stream in streams], dim=1)  # (B, N, D)
        rope = torch.cat([stream.rope for stream in streams])
        modes = [(stream.x.shape[1], stream.mod) for stream in streams]
        del streams
        shared = Shared(modes, rope, modulation_dtype(self, x))
        for block in self.single_blocks:
            x = block(x, rope, shared)
        start = text.x.shape[1]
        return self.final_layer["image"](x[:, start : start + img.shape[1]], vec)


class FastBlock(Block):
    def forward(self, x: Tensor, rope: Tensor, mod: ModulationOut | Shared) -> Tensor:
        if not isinstance(mod, Shared) or runs_plain(self, x):
            plain = mod.per_token() if isinstance(mod, Shared) else mod
            return super().forward(x, rope, plain)
        y = modulated(x, mod)
        attended = self.attn_out(self.attention(y, mod.rotations))  # (B, N, D)
        hidden = self.mlp_in(y)  # (B, N, 6 D)
        del y
        attended += self.mlp_out(gated(hidden))
        for tokens, _, _, gate in mod.pieces(x):
            piece = attended[:, tokens].mul_(gate)
            if on_cpu(x):  # while it is in the cache
                piece += x[:, tokens]
        return attended if on_cpu(x) else attended.add_(x)

    def attention(self, y: Tensor, rotations: Tensor) -> Tensor:
        """Return the attention of normed and modulated tokens, and let go of all that made it."""
        raw_q = self.q_proj(y).unflatten(-1, (self.num_heads, -1))  # (B, N, H, d), as k and v
        raw_k = self.k_proj(y).unflatten(-1, (self.num_heads, -1))
        v = self.v_proj(y).unflatten(-1, (self.num_heads, -1))
        q, k = torch.empty_like(v), torch.empty_like(v)
        norm_and_rotate(self.norm.query_norm, q, raw_q, rotations)  # type: ignore[arg-type]
        norm_and_rotate(self.norm.key_norm, k, raw_k, rotations)  # type: ignore[arg-type]
        del raw_q, raw_k
        return attend(q, k, v, None, None)


def run_fast(blocks: Iterable[nn.Module]) -> bool:
    """Return whether all blocks may get `Shared`.

    A hook sees the plain arguments; compiled blocks and those of the user need them.
    """
    return not torch.is_grad_enabled() and not any(
        type(block) is not FastBlock
        or block._forward_hooks
        or block._forward_pre_hooks
        or block._compiled_call_impl
        for block in blocks
    )


def modulation_dtype(flux: Flux3, x: Tensor) -> torch.dtype:
    first = cast(Block, next(flux.single_blocks.children()))
    return first.modulation_dtype or x.dtype


def modulated(x: Tensor, mod: Shared) -> Tensor:
    """Do what `transformer3.modulate` does: (B, N, D) -> the same."""
    if not on_cpu(x):
        norm = F.layer_norm(x.to(mod.dtype), x.shape[-1:], eps=1e-6)
        for tokens, scale, shift, _ in mod.pieces(x):
            norm[:, tokens].mul_(scale).add_(shift)
        return norm.to(x.dtype)
    y = torch.empty_like(x)
    for tokens, scale, shift, _ in mod.pieces(x):
        norm = F.layer_norm(x[:, tokens].to(mod.dtype), x.shape[-1:], eps=1e-6)
        y[:, tokens] = norm.mul_(scale).add_(shift)
    return y


def gated(hidden: Tensor) -> Tensor:
    """Return silu(gate) * up of (B, N, 2 W) -> (B, N, W)."""
    gate, up = hidden.chunk(2, dim=-1)
    if not on_cpu(hidden):
        return F.silu(gate).mul_(up)
    out = hidden.new_empty(up.shape)
    chunked(lambda gate, up: F.silu(gate).mul_(up), out, gate, up)
    return out


CLASSES: dict[type, type] = {Flux3: FastFlux3, Block: FastBlock}
