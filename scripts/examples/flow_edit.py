"""FlowEdit (Kulikov et al. 2024, arXiv:2412.08629): edit an image by two prompts.

    python scripts/examples/flow_edit.py --output edit.png

Nothing is inverted. At each time, the source image is noised, and the edit moves by the difference
of the velocities that the two prompts give to it and to the source.
"""

from example import parse, save

SOURCE = "a large blue square at the top left on a white background"
TARGET = "a large red circle at the top left on a white background"
args = parse(__doc__, source=SOURCE, target=TARGET, skip=2)

import torch

import flux
from flux import sampling

pipe = flux.load(args.model)
source = pipe(args.source, seed=args.seed)[0]  # or any image: PIL.Image.open("photo.png")
x0 = pipe.to_latents(source)
velocity = pipe.velocity(pipe.encode([args.source, args.target]), *source.size, guidance=3.0)
times = sampling.schedule(pipe.spec.schedule, args.steps or 24, x0[0, 0].numel()).tolist()
generator, edit = torch.Generator().manual_seed(args.seed), x0.clone()
for t, s in list(zip(times, times[1:]))[args.skip :]:  # the first steps would change the layout
    noise = torch.randn(x0.shape, generator=generator)
    noised = sampling.scale_noise(x0, noise, t)
    of_source, of_target = velocity(torch.cat([noised, edit + noised - x0]), t).chunk(2)
    edit = edit + (s - t) * (of_target - of_source)
print(f"the latents moved by {((edit - x0).norm() / x0.norm()).item():.2f} of their norm")
save(args.output, [source, pipe.decode(edit)[0]])
