"""Make the images of a manifest in actors of Ray Data, one for each GPU of a cluster.

    python scripts/examples/ray_data.py --manifest requests.jsonl --out images --actors 2

Each actor loads the model once. The folder is that of scripts/batch.py, which may go on with it, or
work on it at the same time. `pip install -e ".[ray]"`.
"""

from example import parse

args = parse(__doc__, manifest="requests.jsonl", out="images", actors=1)

from pathlib import Path

import torch

import flux
from flux.batch.manifest import Manifest
from flux.batch.records import Records
from flux.batch.worker import Worker

MANIFEST, OUT, MODEL = Path(args.manifest).resolve(), Path(args.out).resolve(), args.model


def records_of(manifest):
    return Records(OUT, manifest, {"model": MODEL} if MODEL else {})


class Actor:
    def __init__(self):
        torch.set_flush_denormal(True)  # as scripts/batch.py does: a CPU is ten times faster
        self.pipe, self.manifest = flux.load(MODEL), Manifest(MANIFEST)

    def __call__(self, blocks):
        worker = Worker(self.pipe, self.manifest, records_of(self.manifest), report=print)
        return {"worked": [worker.work_on(block) for block in blocks["item"].tolist()]}


manifest = Manifest(MANIFEST)
records_of(manifest)  # of another manifest, or another model, the folder is refused here

import ray

blocks = ray.data.from_items([*range(len(manifest.starts))])  # of 64 lines each
pool = ray.data.ActorPoolStrategy(size=args.actors)
gpus = 1 if torch.cuda.is_available() else 0
made = blocks.map_batches(Actor, batch_size=1, compute=pool, num_gpus=gpus)
worked = sum(row["worked"] for row in made.iter_rows())
print(f"{worked} of {len(manifest.starts)} blocks were worked on")
done, wrong, _, left, _ = records_of(manifest).summary()
print(f"{done} images, {wrong} wrong lines, {left} images left")
