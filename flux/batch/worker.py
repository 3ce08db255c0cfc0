"""One worker: claim a block, make its images, record them; until no block is open."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor

from flux.atomic_files import write_atomically
from flux.batch.claims import Claim, claim
from flux.batch.manifest import Line, Manifest, Request, file_name
from flux.batch.records import DONE, OPEN, WRONG, Records
from flux.errors import RefusedError, UserError
from flux.generation import Generation
from flux.image_io.output import RecordedImage
from flux.image_io.request import ImageInputs
from flux.progress import duration

POLL = 2.0  # seconds between two looks at the blocks that others hold
REPORT = 30.0  # seconds between two reports within a block
DECODE = 300.0  # seconds of latents at most that wait for the decoder, and a kill would lose
OWN = ("negative_prompt", "width", "height", "steps", "guidance")  # what a line may set


@dataclass
class Group:
    """Lines of a block that share a batch; by default a single line."""

    lines: list[Line]
    call: Generation | None = None  # once it is prepared
    latents: list[tuple[list[int], Tensor]] = field(default_factory=list)  # of each batch
    seconds: float = 0.0  # of all stages so far

    @property
    def requests(self) -> list[Request]:
        return [line.request for line in self.lines if line.request is not None]


class Worker:
    """Makes the images of a manifest with a pipeline, beside any number of other workers.

    By default each image is made alone: so its bytes do not depend on the other lines, or on the
    number of workers. A file is written while the next image is made. If the networks take turns
    on the device, each is loaded once for many lines. What the pipeline's filters refuse is
    recorded as refused.

    shard: (i, n): begin with every n-th block, and help with the others afterwards.
    defaults: arguments of the pipeline for what a line leaves out.
    report: called with a line of text after each block, and from time to time.
    batch_size: lines of a block that share a batch, at most. Then the bits of an image depend on
        the other lines of its block as well.
    """

    def __init__(
        self,
        pipe: Any,
        manifest: Manifest,
        records: Records,
        shard: tuple[int, int] = (0, 1),
        defaults: dict[str, Any] | None = None,
        report: Callable[[str], None] = lambda text: None,
        batch_size: int = 1,
    ):
        self.pipe, self.manifest, self.records = pipe, manifest, records
        self.shard, self.defaults, self.batch_size = shard, defaults or {}, batch_size
        self.report = report
        self.claims = records.out / "claims"
        self.claims.mkdir(exist_ok=True)
        self.began, self.done_before = time.monotonic(), records.count(DONE)
        self.reported = self.began
        self.pending: Future[dict] | None = None  # the record of the file that is being written

    def run(self) -> None:
        """Work until every line of the manifest is done, by whichever worker."""
        while True:
            self.records.update()
            blocks = [block for block in self._order() if self.records.is_open(block)]
            if not blocks:
                return
            worked = [self.work_on(block) for block in blocks]
            if not any(worked):
                time.sleep(POLL)  # others work on all that is left, or died a moment ago

    def _order(self) -> Iterator[int]:
        first, step = self.shard
        blocks = range(len(self.manifest.starts))
        return chain(blocks[first::step], (b for b in blocks if b % step != first))

    def work_on(self, block: int) -> bool:
        """Make the images of a block, unless another worker does. Return whether this one did."""
        held: Claim | None = claim(self.claims, block)
        if held is None:
            return False
        try:
            self.records.update()
            if self.records.is_open(block):
                self._work(block)
                self._report_progress()
        finally:
            held.release()
        return True

    # ---------------------------------------------------------------- one block

    def _work(self, block: int) -> None:
        residency = self.pipe.residency
        groups = [
            group
            for group in grouped(self.manifest.block(block), self.batch_size)
            if any(map(self._is_open, group.lines))
        ]
        with ThreadPoolExecutor(max_workers=1) as self.writer:
            try:
                while groups:
                    some = self._encode_ahead(groups)
                    groups = groups[len(some) :]
                    while some:
                        count = 1 if residency.keep else len(some)
                        self._make(some[:count])
                        some = some[count:]
            finally:
                self._finish()

    def _is_open(self, line: Line) -> bool:
        return self.records.states[line.number] == OPEN

    def _encode_ahead(self, groups: Sequence[Group]) -> Sequence[Group]:
        """Encode the prompts of as many groups as the cache has room for; return these groups."""
        texts: dict[str, None] = {}
        for count, group in enumerate(groups):
            longer = texts | dict.fromkeys(self._texts(group))
            if count and len(longer) > self.pipe.prompts_ahead:
                groups = groups[:count]
                break
            texts = longer
        with self.pipe.residency.hold(*self.pipe.text.networks):
            for text in texts:
                with suppress(UserError):  # a wrong prompt is named when its own turn comes
                    self.pipe.encode_ahead([text])
        return groups

    def _texts(self, group: Group) -> Iterator[str]:
        """Yield the prompts and negative prompts of a group."""
        use_cfg = self.pipe.spec.cfg or "true_cfg_scale" in self.defaults
        for request in group.requests:
            yield request.prompt
            if use_cfg:
                yield request.negative_prompt or self.defaults.get("negative_prompt") or ""

    def _make(self, groups: Sequence[Group]) -> None:
        """Make the images of groups; each network is loaded once, or once in DECODE seconds."""
        residency = self.pipe.residency
        with residency.hold(*residency.encoders):
            ready = [prepared for group in groups if (prepared := self._prepare(group))]
        ready.sort(key=size, reverse=True)  # the memory planned for the largest serves the others
        while ready:
            sampled, began = [], time.monotonic()
            with residency.hold(residency.transformer):
                while ready:
                    group = ready.pop(0)
                    if self._sample(group):
                        sampled.append(group)
                    if time.monotonic() > began + DECODE:
                        break
            with residency.hold(residency.autoencoder):
                for group in sampled:
                    self._decode(group)

    def _prepare(self, group: Group) -> Group | None:
        """Prepare the call of a group; without the lines that are wrong, which are recorded."""
        began = time.monotonic()
        try:
            group.call = self._call(group.lines)
        except UserError as error:
            if len(group.lines) == 1:
                self._fail(group.lines[0], error)
                return None
            alone = [self._prepare(Group([line])) for line in group.lines]
            sound = [line for single in alone if single for line in single.lines]
            if len(sound) == len(group.lines):  # too large for this machine: a smaller batch
                raise  # would make other images than those of other workers
            return self._prepare(Group(sound)) if sound else None
        group.seconds += time.monotonic() - began
        return group

    def _call(self, lines: Sequence[Line]) -> Generation:
        requests = Group(list(lines)).requests
        if not requests:
            raise UserError(lines[0].error)
        first = requests[0]
        images: Any = first.images
        of_line = {name: getattr(first, name) for name in OWN}
        given = self.defaults | {name: x for name, x in of_line.items() if x is not None}
        return self.pipe.prepare(
            [request.prompt for request in requests],
            seed=[request.seed for request in requests],
            images=ImageInputs(images) if images else None,
            **given,
        )

    def _sample(self, group: Group) -> bool:
        """Sample the latents of a group; False, and a record, if its line is wrong."""
        began, call = time.monotonic(), group.call
        assert call is not None
        try:
            group.latents = [(batch, call.sample(batch).cpu()) for batch in call.batches]
        except UserError as error:
            if len(group.lines) > 1:
                raise
            self._fail(group.lines[0], error)
            return False
        group.seconds += time.monotonic() - began
        return True

    def _decode(self, group: Group) -> None:
        """Decode the latents of a group, and write the images of its open lines."""
        began, call = time.monotonic(), group.call
        assert call is not None
        images = [(n, i) for batch in group.latents for n, i in zip(batch[0], call.decode(*batch))]
        group.latents = []
        group.seconds += time.monotonic() - began
        for number, image in images:
            line = group.lines[number]
            if not self._is_open(line):
                continue
            try:
                (released,) = call.release([number], [image])
            except RefusedError as refused:
                self._fail(line, refused)
                continue
            if self.pending:
                self._finish()
                if time.monotonic() - self.reported > REPORT:
                    self._report_progress()
            seconds = group.seconds / len(images)
            self.pending = self.writer.submit(self._save, line, released, seconds)

    def _fail(self, line: Line, reason: UserError) -> None:
        """Report and record why a line has no image: an error, or a filter refused something."""
        if self._is_open(line):
            kind = "refused" if isinstance(reason, RefusedError) else "error"
            self.report(f"line {line.number + 1}: {reason}")
            self.records.append({"line": line.number, kind: str(reason)})

    def _finish(self) -> None:
        """Wait for the file that is being written, and record it."""
        if self.pending is not None:
            written, self.pending = self.pending, None
            self.records.append(written.result())

    def _save(self, line: Line, image: RecordedImage, seconds: float) -> dict[str, Any]:
        """Write an image; return its record."""
        assert line.request is not None
        name = file_name(line.number, line.request)
        path = self.records.out / name
        path.parent.mkdir(exist_ok=True)
        with write_atomically(path, wait=True) as unfinished:
            image.save(unfinished, format="PNG")
            digest = hashlib.sha256(unfinished.read_bytes()).hexdigest()
        record: dict[str, Any] = {
            "line": line.number,
            "file": name,
            "sha256": digest,
            "seed": line.request.seed,
            "seconds": round(seconds, 3),
        }
        if image.verdicts:
            record["scores"] = {each.filter: round(each.score, 3) for each in image.verdicts}
        return record

    def _report_progress(self) -> None:
        """Report on all workers: what is done, the rate since the start, the time that is left."""
        self.records.update()
        self.reported = time.monotonic()
        done, left = self.records.count(DONE), self.records.count(OPEN)
        rate = (done - self.done_before) / max(1e-9, self.reported - self.began)
        text = f"{done:,} of {len(self.manifest):,} images, {rate:.3g} a second"
        if left and rate:
            text += f", {duration(left / rate)} left"
        if wrong := self.records.count(WRONG):
            text += f"; {wrong:,} wrong lines"
        self.report(text)


def grouped(lines: Iterable[Line], batch_size: int) -> list[Group]:
    """Group the lines of a block that ask for one size, steps and guidance, and for no image.

    Whichever lines are done, the groups are the same: so an image keeps its bits.
    """
    groups: list[Group] = []
    unfilled: dict[tuple, Group] = {}
    for line in lines:
        request = line.request
        if request is None or request.images or batch_size == 1:
            groups.append(Group([line]))
            continue
        key = tuple(getattr(request, name) for name in OWN)
        if key not in unfilled or len(unfilled[key].lines) == batch_size:
            unfilled[key] = Group([])
            groups.append(unfilled[key])
        unfilled[key].lines.append(line)
    return groups


def size(group: Group) -> int:
    """Return the pixels of a prepared group."""
    assert group.call is not None
    record = group.call.records[0]
    return record["width"] * record["height"] * len(group.lines)
