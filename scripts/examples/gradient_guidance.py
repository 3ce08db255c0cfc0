"""Guidance by a gradient: pull the predicted image towards what a loss asks, here a mean colour.

    python scripts/examples/gradient_guidance.py --output guided.png

At each step, the loss of the predicted image x - t v is differentiated through the decoder and the
transformer, as in universal guidance (Bansal et al. 2023, arXiv:2302.07121).
"""

from example import SCENE, parse, save

args = parse(__doc__, strength=6.0)

import torch

import flux
from flux import sampling, solvers

pipe = flux.load(args.model)
features = pipe.encode(SCENE)
wanted = torch.tensor([0.9, 0.2, 0.2])  # RGB in [-1, 1]: more red
losses = []


def guided(velocity, x, times, callback, blend):  # a solver: x is (B, L, C)
    side = pipe.spec.size // 16
    for step, (t, s) in enumerate(zip(times.tolist(), times.tolist()[1:]), start=1):
        x = x.detach().requires_grad_()
        v = velocity(x, t)
        image = pipe.to_pixels((x - t * v).mT.unflatten(2, (side, side)), gradients=True)
        loss = (image.mean((2, 3)) - wanted).square().sum()
        (gradient,) = torch.autograd.grad(loss, x)
        losses.append(loss.item())
        pull = args.strength * t * gradient / gradient.norm() * x.detach().norm() * (t - s) / 4
        x = sampling.finish_step(
            x.detach() + (s - t) * v.detach() - pull, step, times, callback, blend
        )
    return x


options = dict(features=features, seeds=[args.seed], steps=args.steps, guidance=1.0)
plain = pipe.sample(solver=solvers.euler, **options)
latents = pipe.sample(solver=guided, gradients=True, **options)
print(
    f"loss of the predicted image: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last"
)
save(args.output, [pipe.decode(x)[0] for x in (plain, latents)])
