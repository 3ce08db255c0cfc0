"""RF inversion (Rout et al. 2024, arXiv:2410.10792): find the noise of an image, edit from there.

    python scripts/examples/rf_inversion.py --output inversion.png

The flow is followed backwards, pulled to a fixed noise by gamma. With another prompt it is followed
forwards, pulled to the source image by eta during the first steps.
"""

from example import parse, save

SOURCE = "a large blue square at the top left on a white background"
TARGET = "a large red circle at the top left on a white background"
args = parse(__doc__, source=SOURCE, target=TARGET, gamma=0.5, eta=0.6, until=0.85)

import torch

import flux
from flux import sampling

pipe = flux.load(args.model)
source = pipe(args.source, seed=args.seed)[0]
x0 = pipe.to_latents(source)
times = sampling.schedule(pipe.spec.schedule, args.steps or 24, x0[0, 0].numel()).tolist()
noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(args.seed))

velocity = pipe.velocity(pipe.encode(args.source), *source.size, guidance=1.0)
x, back = x0, times[::-1]
for t, s in zip(back, back[1:]):  # from 0 to 1
    v, to_noise = velocity(x, t), (noise - x) / (1 - t)
    x = x + (s - t) * (v + args.gamma * (to_noise - v))

velocity = pipe.velocity(pipe.encode(args.target), *source.size)
inverted = x
for t, s in zip(times, times[1:]):
    v = velocity(x, t)
    if t > args.until:
        v = v + args.eta * ((x - x0) / t - v)
    x = x + (s - t) * v
print(f"inverted to a standard deviation of {inverted.std().item():.2f}")
save(args.output, [source, pipe.decode(x)[0]])
