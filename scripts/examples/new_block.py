"""A block variant, trained for two minutes on the toy's world: linear attention for softmax.

    python scripts/examples/new_block.py --output linear.png

Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) in one block, which alone is trained.
"""

from example import SCENE, parse, save

args = parse(__doc__, seconds=120.0, block=4, lr=3e-4, scenes=40)

from itertools import islice
from time import monotonic as now

import numpy as np
import torch

import flux
from flux import toy, transformer
from flux.hooks import replaced
from flux.training.loss import Batch, predict_velocity, rectified_flow_loss


def linear_attention(q, k, v, rope, *_):  # (B, N, H, d) each -> (B, N, D)
    q, k = (torch.nn.functional.elu(transformer.apply_rope(x, rope)) + 1 for x in (q, k))
    out = torch.einsum("bnhd,bhde->bnhe", q, torch.einsum("bmhd,bmhe->bhde", k, v))
    return (out / torch.einsum("bnhd,bhd->bnh", q, k.sum(1))[..., None]).flatten(2)


class LinearBlock(transformer.SingleStreamBlock):
    def forward(self, *inputs):
        with replaced(transformer, "attention", lambda softmax: linear_attention):
            return super().forward(*inputs)


def loss(rows):
    x0, batch = latents[rows], Batch(latents[rows], features.rows(rows))
    t, noise = torch.rand(len(rows)), torch.randn(x0.shape)
    return rectified_flow_loss(lambda *at: predict_velocity(network, batch, 1.0, *at), x0, t, noise)


pipe, rng = flux.load(args.model, fast=False), np.random.default_rng(args.seed)
scenes = list(islice(toy.scenes(args.seed, held=False, complete=True), args.scenes))
latents = torch.cat([pipe.to_latents(toy.draw(scene, 128, 128, rng)) for scene in scenes])
features, network, images = pipe.encode(list(map(str, scenes))), pipe.transformer(), []
block, last = network.single_blocks[args.block], list(range(args.scenes - 8, args.scenes))
block.load_state_dict({name: x.clone() for name, x in block.state_dict().items()}, assign=True)
optimizer = torch.optim.AdamW(block.requires_grad_().parameters(), lr=args.lr)
for name, seconds in (("softmax", 0), ("linear, untrained", 0), ("linear, trained", args.seconds)):
    block.__class__ = transformer.SingleStreamBlock if name == "softmax" else LinearBlock
    end = now() + seconds
    while now() < end:
        optimizer.zero_grad()
        loss(rng.choice(args.scenes - 8, 8)).backward()
        optimizer.step()
    with torch.random.fork_rng(), torch.no_grad():  # the same times and noise each time
        torch.manual_seed(0)
        print(f"{name}: loss {sum(loss(last).item() for _ in range(4)) / 4:.4f} on other scenes")
    images += pipe(SCENE, seed=args.seed, steps=args.steps)
save(args.output, images)
