"""Tensor parallelism: each process has some heads, and some channels of the MLP, of every block.

Megatron-LM: Shoeybi et al. 2019, arXiv:1909.08053. A block's first matrices are divided by rows,
so that each process computes its heads and channels alone. Its last matrices are divided by
columns, and their products are summed over the processes. So the weights of the blocks are divided,
and the tokens are not. Modulations, norms, embedders and the final layer are in every process.

The matrices of a checkpoint are packed: the rows [q | k | v] and [gate | up], or all of them, lie
in one, and the columns [attention | MLP] in another. Each of the packed parts is divided by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flux.errors import UserError
from flux.transformer import DoubleStreamBlock, FluxConfig, SelfAttention, SingleStreamBlock
from flux.transformer3 import Block as Block3


class SummedLinear(nn.Module):
    """A Linear whose input channels are divided over a group. Each process has the whole output."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None):
        super().__init__()
        self.group = group
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of (..., this process's channels) and all others: (..., out)."""
        if torch.is_grad_enabled():
            raise UserError("gradients: none pass between processes. Use a single process.")
        out = F.linear(x, self.weight)
        dist.all_reduce(out, group=self.group)
        return out if self.bias is None else out + self.bias


class TensorParallel:
    """Divides the blocks of a loaded Flux or Flux3: `pipe.transformer.set_divide(self)`.

    A network on the meta device is divided too, to measure its weights.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, size: int):
        self.group, self.rank, self.size = group, rank, size

    def __call__(self, network: nn.Module) -> None:
        config: Any = network.config
        check(config, self.size)
        for module in network.modules():
            if isinstance(module, DoubleStreamBlock):
                self._double_block(module, config)
            elif isinstance(module, SingleStreamBlock):
                self._single_block(module, config)
            elif isinstance(module, Block3):
                self._block3(module)

    def _double_block(self, block: DoubleStreamBlock, c: FluxConfig) -> None:
        attentions: Sequence[SelfAttention] = (block.img_attn, block.txt_attn)
        mlps: Sequence[Any] = (block.img_mlp, block.txt_mlp)
        for attn, mlp in zip(attentions, mlps):
            self._rows(attn.qkv, parts=3)
            attn.num_heads //= self.size
            attn.proj = self._columns(attn.proj)  # type: ignore[assignment]
            self._rows(mlp[0], parts=2 if c.gated_mlp else 1)
            mlp[2] = self._columns(mlp[2])

    def _single_block(self, block: SingleStreamBlock, c: FluxConfig) -> None:
        attention, inner = block.widths  # rows of q, k and v, and of the MLP
        outer = block.linear2.in_features - c.hidden_size
        mlp_rows = [inner // 2] * 2 if c.gated_mlp else [inner]
        self._rows(block.linear1, [c.hidden_size] * 3 + mlp_rows)
        block.num_heads //= self.size
        block.widths = [attention // self.size, inner // self.size]
        linear2 = self._columns(block.linear2, [c.hidden_size, outer])
        block.linear2 = linear2  # type: ignore[assignment]

    def _block3(self, block: Block3) -> None:
        for linear in (block.q_proj, block.k_proj, block.v_proj):
            self._rows(linear)
        self._rows(block.mlp_in, parts=2)
        block.num_heads //= self.size
        block.attn_out = self._columns(block.attn_out)  # type: ignore[assignment]
        block.mlp_out = self._columns(block.mlp_out)  # type: ignore[assignment]

    def _rows(self, linear: nn.Linear, sizes: Sequence[int] = (), parts: int = 1) -> None:
        """Keep this process's rows of each part of a Linear, in place."""
        sizes = sizes or [linear.out_features // parts] * parts
        linear.weight = self._own(linear.weight, sizes, 0)
        if linear.bias is not None:
            linear.bias = self._own(linear.bias, sizes, 0)
        linear.out_features = len(linear.weight)

    def _columns(self, linear: nn.Linear, sizes: Sequence[int] = ()) -> SummedLinear:
        """Return a Linear with this process's columns of each part, and the whole bias."""
        weight = self._own(linear.weight, sizes or [linear.in_features], 1)
        return SummedLinear(weight.data, linear.bias, self.group)

    def _own(self, x: Tensor, sizes: Sequence[int], dim: int) -> nn.Parameter:
        """Return a copy of this process's piece of each part, which lets go of the whole."""
        pieces = [part.chunk(self.size, dim)[self.rank] for part in x.detach().split(sizes, dim)]
        return nn.Parameter(torch.cat(pieces, dim), requires_grad=False)


def check(config: Any, size: int) -> None:
    """Raise UserError unless heads and MLP channels can be divided by `size`."""
    width = int(config.mlp_ratio * config.hidden_size)
    for what, count in (("heads", config.num_heads), ("channels of the MLP", width)):
        if count % size:
            raise UserError(
                f"parallel: tensor={size} does not divide the {count} {what} of the transformer. "
                "Use another number, or divide the tokens: context."
            )
