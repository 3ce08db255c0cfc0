"""One worker: claim a block, make its images, record them; until no block is open."""

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import Any

from PIL import Image

from flux.atomic_files import write_atomically
from flux.batch.claims import Claim, claim
from flux.batch.manifest import Line, Manifest, Request, file_name
from flux.batch.records import DONE, OPEN, WRONG, Records
from flux.errors import RefusedError, UserError
from flux.image_io.request import ImageInputs

REPORT = 30.0  # seconds after which a report within a block is due
POLL = 2.0  # seconds between two looks at the blocks that others hold


class Worker:
    """Makes the images of a manifest with a pipeline, beside any number of other workers.

    Each image is made alone: so its bytes do not depend on the other lines, or on the number of
    workers. A file is written while the next image is made. What the pipeline's filters refuse is
    recorded as refused.

    shard: (i, n): begin with every n-th block, and help with the others afterwards.
    defaults: arguments of the pipeline for what a line leaves out.
    report: called with a line of text after each block, and every 30 seconds within one.
    """

    def __init__(
        self,
        pipe: Any,
        manifest: Manifest,
        records: Records,
        shard: tuple[int, int] = (0, 1),
        defaults: dict[str, Any] | None = None,
        report: Callable[[str], None] = lambda text: None,
    ):
        self.pipe, self.manifest, self.records = pipe, manifest, records
        self.shard, self.defaults = shard, defaults or {}
        self.report = report
        self.claims = records.out / "claims"
        self.claims.mkdir(exist_ok=True)
        self.began, self.done_before = time.monotonic(), records.count(DONE)
        self.reported = self.began

    def run(self) -> None:
        """Work until every line of the manifest is done, by whichever worker."""
        while True:
            self.records.update()
            blocks = [block for block in self._order() if self.records.is_open(block)]
            if not blocks:
                return
            worked = [self._try(block) for block in blocks]
            if not any(worked):
                time.sleep(POLL)  # others work on all that is left, or died a moment ago

    def _order(self) -> Iterator[int]:
        first, step = self.shard
        blocks = range(len(self.manifest.starts))
        return chain(blocks[first::step], (b for b in blocks if b % step != first))

    def _try(self, block: int) -> bool:
        """Work on a block unless another worker does. Return whether this one did."""
        held: Claim | None = claim(self.claims, block)
        if held is None:
            return False
        try:
            self.records.update()
            if self.records.is_open(block):
                self._work(block)
                self.report(self._progress())
        finally:
            held.release()
        return True

    def _work(self, block: int) -> None:
        states = self.records.states
        lines = [line for line in self.manifest.block(block) if states[line.number] == OPEN]
        prompts = [line.request.prompt for line in lines if line.request]
        allowed = [prompt for prompt in prompts if not self._is_refused(prompt)]
        with suppress(UserError):  # a wrong prompt is named when its own turn comes
            self.pipe.encode_ahead(allowed[: self.pipe.prompts_ahead])
        with ThreadPoolExecutor(max_workers=1) as writer:
            pending = None
            for line in lines:
                began = time.monotonic()
                result = self._result(line)
                for problem in set(result) - {"image"}:
                    self.report(f"line {line.number + 1}: {result[problem]}")
                if pending:
                    self.records.append(pending.result())
                    if time.monotonic() - self.reported > REPORT:
                        self.report(self._progress())
                pending = writer.submit(self._save, line, result, began)
            if pending:
                self.records.append(pending.result())

    def _is_refused(self, prompt: str) -> bool:
        try:
            self.pipe.filters and self.pipe.filters.check_texts([prompt])
            return False
        except UserError:
            return True

    def _result(self, line: Line) -> dict[str, Any]:
        """Return {"image"}, or why there is none: {"error"}, or {"refused"}, by a filter."""
        if line.request is None:
            return {"error": line.error}
        try:
            return {"image": self._image(line.request)}
        except RefusedError as refusal:
            return {"refused": str(refusal)}
        except UserError as problem:
            return {"error": str(problem)}

    def _image(self, request: Request) -> Image.Image:
        names = ("negative_prompt", "width", "height", "steps", "guidance")
        said = {name: getattr(request, name) for name in names}
        given = self.defaults | {name: x for name, x in said.items() if x is not None}
        images: Any = request.images  # paths, which the pipeline reads
        images = {"images": ImageInputs(images)} if images else {}
        return self.pipe(request.prompt, seed=request.seed, **images, **given)[0]

    def _save(self, line: Line, result: dict[str, Any], began: float) -> dict[str, Any]:
        """Write the image of a result, if there is one; return the record."""
        if "image" not in result:
            return {"line": line.number} | result
        assert line.request is not None
        name = file_name(line.number, line.request)
        path = self.records.out / name
        path.parent.mkdir(exist_ok=True)
        with write_atomically(path, wait=True) as unfinished:
            result["image"].save(unfinished, format="PNG")
            digest = hashlib.sha256(unfinished.read_bytes()).hexdigest()
        seconds = round(time.monotonic() - began, 3)
        return {
            "line": line.number,
            "file": name,
            "sha256": digest,
            "seed": line.request.seed,
            "seconds": seconds,
        }

    def _progress(self) -> str:
        """Return a line about all workers: what is done, the rate, the time that is left."""
        self.reported = time.monotonic()
        self.records.update()
        done, left = self.records.count(DONE), self.records.count(OPEN)
        rate = (done - self.done_before) / max(1e-9, time.monotonic() - self.began)
        text = f"{done:,} of {len(self.manifest):,} images, {rate:.3g} a second"
        if left and rate:
            text += f", {left / rate / 60:.0f} minutes left"
        if wrong := self.records.count(WRONG):
            text += f"; {wrong:,} wrong lines"
        return text
