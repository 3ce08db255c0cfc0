"""Two prompts, each seen by one half of the image, by a mask of the attention.

python scripts/examples/regional_prompts.py --output regions.png
"""

from example import parse, save

LEFT = "a large red circle at the left on a white background"
RIGHT = "a large blue star at the right on a white background"
args = parse(__doc__, left=LEFT, right=RIGHT)

import torch

import flux
from flux import sampling

pipe = flux.load(args.model)
features = pipe.encode([args.left, args.right])
length, side = features.tokens.shape[1], pipe.spec.size // 16
owner = torch.arange(2 * length) // length  # of a text token: prompt 0 or 1
region = (
    torch.arange(side * side) % side >= side // 2
).long()  # of an image token: left 0, right 1
visible = torch.ones(2 * length + side * side, 2 * length + side * side, dtype=torch.bool)
visible[: 2 * length, : 2 * length] = owner[:, None] == owner  # prompts do not see each other
visible[2 * length :, : 2 * length] = region[:, None] == owner
visible[: 2 * length, 2 * length :] = owner[:, None] == region
ids = sampling.text_ids(length, len(pipe.spec.transformer.axes_dim))
both = features.rows([0])._replace(
    tokens=features.tokens.flatten(0, 1)[None],  # (1, 2 T, D)
    ids=torch.cat([ids, ids]),  # each prompt is counted from 0, as in training
    mask=visible,
)
plain = both._replace(mask=None)
latents = [
    pipe.sample(x, [args.seed], steps=args.steps, guidance=2.0, negative=pipe.encode(""))
    for x in (plain, both)
]
difference = (latents[0] - latents[1]).norm() / latents[0].norm()
print(f"the mask moved the latents by {difference.item():.2f} of their norm")
save(args.output, [pipe.decode(x)[0] for x in latents])
