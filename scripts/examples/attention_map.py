"""Where a word of the prompt draws: the attention from image tokens to the word's tokens.

    python scripts/examples/attention_map.py --word star --output star.png

Averaged over all steps, blocks and heads, as in DAAM (Tang et al. 2022, arXiv:2210.04885).
"""

from example import SCENE, parse, save

args = parse(__doc__, word="star", prompt=SCENE)

import torch
from PIL import Image

import flux

pipe = flux.load(args.model)
features = pipe.encode(args.prompt)
word = pipe.text.positions(args.prompt, args.word)
length = features.tokens.shape[1]  # text tokens stand first
query, maps = None, []


def see(tap, x):  # q, then k of each attention, after RoPE: (B, H, N, d)
    global query
    if tap.tap == "attention/q":
        query = x[:, :, length:].float()  # of image tokens
    else:
        weights = (query @ x.float().mT / x.shape[-1] ** 0.5).softmax(-1)  # (B, H, L, N)
        maps.append(weights[0, :, :, word].sum(-1).mean(0))  # (L,)


with pipe.watch(see, only=["*/conditional/*/attention/[qk]"]):
    latents = pipe.sample(features, [args.seed], steps=args.steps)
image = pipe.decode(latents)[0]
heat = torch.stack(maps).mean(0).unflatten(0, latents.shape[2:])  # (h, w)
heat = (heat - heat.min()) / (heat.max() - heat.min())
row, column = divmod(int(heat.argmax()), heat.shape[1])
print(f"{len(maps)} maps; the most attention to {args.word!r} is in row {row}, column {column}")
mask = Image.fromarray((heat * 200).byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
red = Image.new("RGB", image.size, "red")
save(args.output, [image, Image.composite(red, image, mask)])
