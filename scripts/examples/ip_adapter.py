"""An IP-adapter: the image tokens also attend to tokens made of another image's CLIP embedding.

    python scripts/examples/ip_adapter.py --model flux.1-dev --adapter FILE --embedding FILE

FILEs: an adapter of FLUX.1 in XLabs' layout, and a safetensors file with `image_embeds` (1, 768) of
OpenAI's CLIP ViT-L/14. Without them, random ones stand in for the toy flux.1-tiny: they show that
the pieces fit, not what a trained adapter does.
"""

from example import SCENE, parse, save

args = parse(__doc__, adapter="", embedding="", prompt=SCENE, scale=0.7)

import torch
from safetensors.torch import load_file

import flux
from flux.ip_adapter import KEY, PROJECTION, IPAdapter, load_ip_adapter

pipe = flux.load(args.model or "flux.1-tiny")
c = pipe.spec.transformer
if args.adapter:
    adapter = load_ip_adapter(args.adapter, pipe)
    embedding = load_file(args.embedding)["image_embeds"]
else:
    torch.manual_seed(args.seed)
    sizes = {f"{PROJECTION}.proj": (4 * c.context_dim, 768)}
    for number in range(c.depth):
        sizes |= {KEY.format(number, part): (c.hidden_size, c.context_dim) for part in "kv"}
    weights = {f"{PROJECTION}.norm.weight": torch.ones(c.context_dim)}
    weights[f"{PROJECTION}.norm.bias"] = torch.zeros(c.context_dim)
    for layer, size in sizes.items():
        weights[f"{layer}.weight"] = torch.randn(size) / size[1] ** 0.5
        weights[f"{layer}.bias"] = torch.zeros(size[0])
    adapter, embedding = IPAdapter(weights, pipe), torch.randn(1, 768)
features, options = pipe.encode(args.prompt), dict(seeds=[args.seed], steps=args.steps)
plain = pipe.sample(features, **options)
end = adapter.apply(embedding, args.scale)
adapted = pipe.sample(features, **options)
end()
difference = ((adapted - plain).norm() / plain.norm()).item()
print(f"the adapter moved the latents by {difference:.2f} of their norm")
save(args.output, [pipe.decode(x)[0] for x in (plain, adapted)])
