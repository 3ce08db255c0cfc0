"""A ControlNet: residuals for the blocks, computed by a network that sees a control image.

    python scripts/examples/controlnet.py --model flux.1-dev --image edges.png --controlnet FILE

FILE is a ControlNet of FLUX.1 in InstantX's or XLabs' layout. Without FILE, an untrained one for
the toy flux.1-tiny stands in: it shows that the pieces fit, not what a trained one does.
"""

from example import SCENE, parse, save

args = parse(__doc__, controlnet="", image="", prompt=SCENE, scale=0.7, mode=-1)

from dataclasses import replace

import torch
from PIL import Image, ImageDraw

import flux
from flux.controlnet import ControlNet, LoadedControlNet, load_controlnet

pipe = flux.load(args.model or "flux.1-tiny")
size = pipe.spec.size
if args.image:
    image = Image.open(args.image).convert("RGB").resize((size, size))
else:
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse((size // 2, size // 2, size - 16, size - 16), fill="blue")
if args.controlnet:
    control = load_controlnet(args.controlnet, pipe)
else:  # the transformer's own first block, as training starts; not zero at the end, to be seen
    torch.manual_seed(args.seed)
    network = ControlNet(replace(pipe.spec.transformer, depth=1, depth_single=0))
    network.load_state_dict(pipe.transformer().state_dict(), strict=False)
    network.requires_grad_(False).to(pipe.device, pipe.dtype)
    torch.nn.init.eye_(network.controlnet_blocks[0].weight)
    control = LoadedControlNet(network, pipe)
mode = None if args.mode < 0 else args.mode  # of a Union model
residuals = control.residuals(image, args.scale, mode)
features, options = pipe.encode(args.prompt), dict(seeds=[args.seed], steps=args.steps)
plain = pipe.sample(features, **options)
controlled = pipe.sample(features, residuals=residuals, **options)
difference = ((controlled - plain).norm() / plain.norm()).item()
print(f"the residuals moved the latents by {difference:.2f} of their norm")
save(args.output, [image, pipe.decode(controlled)[0]])
