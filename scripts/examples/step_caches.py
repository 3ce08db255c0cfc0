"""Skip most of the network where little changes: first-block cache (ParaAttention) and TeaCache.

    python scripts/examples/step_caches.py

Both add again what the later blocks added, until an indicator has moved by a threshold: what the
first block adds; or its modulated input, whose changes add up (Liu et al. 2024, arXiv:2411.19108).
"""

from example import SCENE, parse

args = parse(__doc__)

import time
from functools import partial
from itertools import product

import torch

import flux
from flux.transformer import modulate


def cache(threshold, tea, kept, skipped, network):
    def denoise(img, txt, rope, mods, caches=None):  # in the place of Flux.denoise
        start, y = network.img_in(img), network.txt_in(txt)
        length, (shift, scale, _) = y.shape[1], mods.double[0][0][0]
        for block in network.double_blocks[:1]:
            x, y = block(start, y, rope, *mods.double[0])
        seen = modulate(start, shift, scale) if tea else x - start
        if pipe.now.step > 1:  # each branch has its own
            old, moved, rest = kept[pipe.now.branch]
            moved = moved * tea + ((seen - old).abs().mean() / old.abs().mean()).item()
            if moved < threshold:
                skipped.append(pipe.now.step)
                kept[pipe.now.branch] = seen if tea else old, moved, rest
                return network.final_layer(x + rest, mods.vec)
        z = x
        for block, both in zip(network.double_blocks[1:], mods.double[1:]):
            z, y = block(z, y, rope, *both)
        z = torch.cat([y, z], dim=1)
        for block, mod in zip(network.single_blocks, mods.single):
            z = block(z, rope, mod)
        kept[pipe.now.branch] = seen, 0.0, (z := z[:, length:]) - x
        return network.final_layer(z, mods.vec)

    network.denoise = denoise


pipe = flux.load(args.model)
features, options = pipe.encode(SCENE), dict(seeds=[args.seed], steps=args.steps or 24)
truth = pipe.sample(features, **options)
print("| cache | threshold | passes skipped | seconds | error |\n|---|---|---|---|---|")
for tea, threshold in product((False, True), (0.0, 0.05, 0.1, 0.2)):
    end = pipe.transformer.on_load(partial(cache, threshold, tea, {}, skipped := []))
    start, x = time.perf_counter(), pipe.sample(features, **options)
    row = [["first block", "TeaCache"][tea], threshold, len(skipped)]
    row += [f"{time.perf_counter() - start:.2f}", f"{(x - truth).norm() / truth.norm():.4f}"]
    print("| " + " | ".join(map(str, row)) + " |")
    assert threshold > 0 or torch.equal(x, truth)
    end()
