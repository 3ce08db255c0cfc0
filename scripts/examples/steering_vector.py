"""Activations of a block, and a steering vector made of them: the difference of two prompts.

    python scripts/examples/steering_vector.py --output steered.png

The mean image token after one block is recorded for both prompts, at each step. Their difference is
added while a third prompt is drawn (activation addition, Turner et al. 2023, arXiv:2308.10248).
"""

from example import parse, save

PROMPT = "a large blue ring on a white background"
TO, FROM = "a large red ring on a white background", "a large green ring on a white background"
args = parse(__doc__, prompt=PROMPT, to=TO, away=FROM, block="single_blocks.3", strength=3.0)

import torch

import flux

pipe = flux.load(args.model)
options = dict(seeds=[args.seed], steps=args.steps, guidance=1.0)


def activations(prompt):
    """Return the mean image token after the block at each step, {step: (1, 1, D)}."""
    features, seen = pipe.encode(prompt), {}

    def see(tap, x):
        seen[tap.step] = x[:, features.tokens.shape[1] :].mean(1, keepdim=True).clone()

    with pipe.watch(see, only=[f"*/{args.block}/out"]):
        pipe.sample(features, **options)
    return seen


to, away = activations(args.to), activations(args.away)
features = pipe.encode(args.prompt)
length = features.tokens.shape[1]


def steer(network):
    def add(module, inputs, x):  # text, then image tokens: (B, N, D)
        vector = args.strength * (to[pipe.now.step] - away[pipe.now.step])
        return torch.cat([x[:, :length], x[:, length:] + vector], dim=1)

    return [network.get_submodule(args.block).register_forward_hook(add)]


plain = pipe.sample(features, **options)
end = pipe.transformer.on_load(steer)
steered = pipe.sample(features, **options)
end()
difference = ((steered - plain).norm() / plain.norm()).item()
print(f"{len(to)} steps were steered; the latents moved by {difference:.2f} of their norm")
save(args.output, [pipe.decode(x)[0] for x in (plain, steered)])
