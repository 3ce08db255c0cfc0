"""What the page of app.py does, without a browser: forms to flags of sample.py, jobs, the gallery.

A form is a dictionary of what the page's fields hold; missing and empty fields leave the default.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import sample
from modules.command_line import HEARD, exit_code, plain_words, say, show_traceback
from modules.safety_flags import REFUSED, load_filters
from PIL import Image

from flux.errors import UserError
from flux.image_io import input as inputs
from flux.image_io import output
from flux.image_io.metadata import PARTS, short, with_current_names, wrong_values
from flux.runtime import devices
from flux.safety import marking
from flux.weights.locate import get_spec

TEXTS = ("prompt", "negative_prompt", "seed", "outpaint", "filter", "watermark")  # of the form
NUMBERS = ("num_images", "width", "height", "steps", "guidance", "true_cfg_scale", "strength")
NUMBERS += ("match_image_size",)
SWITCHES = ("keep_input_size", "preprocess_control")
# what making an image again keeps of the program's own flags
HERE = ("weights", "device", "offload", "max_vram", "filter", "filter_weights", "review")
HERE += ("judge_device", "sign", "certificate", "sign_prompt")
LABELS = {  # the library's arguments -> what the page calls them
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "width": "Width",
    "height": "Height",
    "steps": "Steps",
    "guidance": "Guidance",
    "true_cfg_scale": "True CFG scale",
    "seed": "Seed",
    "num_images": "Images",
    "images": "Image",
    "mask": "Mask",
    "strength": "Strength",
    "outpaint": "Outpaint",
    "loras": "LoRA",
    "scale": "LoRA scale",
    "match_image_size": "Size of image",
}
MAX_SHOWN = 60  # images of the gallery
STOPPED = "stopped; finished images are kept"


class Update(NamedTuple):
    """What a page shows of a job. `frame`: the image so far, or the last finished file."""

    lines: tuple[str, ...]  # messages, the last one `error: ...` if it failed
    share: float  # of the steps of all images
    frame: Image.Image | Path | None
    finished: tuple[Path, ...]
    code: int | None  # exit code; None while it runs


# ------------------------------------------------------------------------------ forms


def flags_of_form(form: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the flags of sample.py; input images are copied into `folder`/inputs.

    A flag and its value are one argument, so that no text can become a flag of its own.
    UserError for files that are no images.
    """
    flags = []
    for name in (*TEXTS, *NUMBERS):
        value = form.get(name)
        if value is None or not (text := str(value).strip()):
            continue
        flags.append(f"--{name.replace('_', '-')}={text}")
    flags += [f"--{name.replace('_', '-')}" for name in SWITCHES if form.get(name)]
    if form.get("lora"):
        flags.append(f"--lora={form['lora']}:{str(form.get('lora_scale') or 1).strip()}")
    image, painted = split_painting(form.get("editor"))
    images = [] if image is None else [keep(image, folder)]
    images += [keep(Path(path), folder) for path in form.get("references") or ()]
    mask = form.get("mask") or painted
    flags += [f"--image={path}" for path in images]
    if mask is not None:
        flags.append(
            f"--mask={keep(mask if isinstance(mask, Image.Image) else Path(mask), folder)}"
        )
    return flags


def split_painting(value: Any) -> tuple[Image.Image | None, Image.Image | None]:
    """Return the image and the painted mask of an image editor; None for what is not there.

    `value`: {"background": RGBA image, "layers": [RGBA image, ...]}; paint of any colour is white.
    """
    background = (value or {}).get("background")
    if background is None or background.convert("RGBA").getextrema()[3][1] == 0:
        return None, None
    painted = Image.new("L", background.size)
    for layer in value.get("layers") or ():
        alpha = layer.convert("RGBA").getchannel("A").resize(background.size)
        painted.paste(255, mask=alpha.point(lambda level: 255 * (level > 127)))
    return background, painted if painted.getextrema()[1] else None


def keep(image: Image.Image | Path, folder: Path) -> Path:
    """Copy an input image into `folder`/inputs, where a record can name it; return its path.

    Equal images share a file. UserError if a file is no image.
    """
    kept = folder / "inputs"
    kept.mkdir(parents=True, exist_ok=True)
    if isinstance(image, Path):
        name, suffix = f"upload{image.suffix.lower()[:6]}", image.suffix.lower()[:6]
        try:
            inputs.read_image(image)
        except UserError as error:  # without the path, which the user did not choose
            raise UserError(str(error).replace(str(image), name)) from None
        if image.resolve().parent == kept.resolve():
            return kept / image.name
        digest, write = _digest(image.read_bytes()), lambda path: shutil.copyfile(image, path)
    else:
        opaque = inputs.as_image(image)
        digest, suffix = _digest(opaque.tobytes() + repr(opaque.size).encode()), ".png"
        write = opaque.save
    path = kept / f"{digest}{suffix}"
    if not path.exists():
        with output.unfinished_file(path, wait=True) as unfinished:
            write(unfinished)
            os.replace(unfinished, path)
    return path


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# ------------------------------------------------------------------------------ records


def form_of_record(path: Path, folder: Path) -> dict[str, Any]:
    """Return the form that an image's record describes. UserError if it has none.

    Files are filled in if they lie in `folder`/inputs.
    """
    record = with_current_names(output.read_metadata(path))
    types: Any = dict(prompt=str, seed=int, width=int, height=int, steps=int)
    if wrong := wrong_values(record, types):
        raise UserError(f"{path.name}: metadata are missing or wrong: {', '.join(wrong)}.")
    options = record.get("image_options")
    values = record | (options if isinstance(options, dict) else {})
    form = {name: values.get(name) for name in (*TEXTS, *NUMBERS, *SWITCHES)}
    form |= {name: None for name in TEXTS if not isinstance(form[name], str)} | {"filter": None}
    form["watermark"] = form["watermark"] if form["watermark"] in marking.KINDS else None
    form |= {"seed": str(record["seed"]), "num_images": 1}
    margins, given = values.get("outpaint"), record.get("images")
    form["outpaint"] = ",".join(map(str, margins)) if isinstance(margins, list) else ""
    for name in NUMBERS:  # a list has one value for each step, and no field here
        form[name] = str(form[name]) if isinstance(form[name], int | float) else ""
    files = [_kept(file, folder) for file in (given if isinstance(given, list) else ())]
    form["images"] = [file for file in files if file is not None]
    form["mask"] = _kept(record.get("mask"), folder)
    return form


def _kept(file: Any, folder: Path) -> Path | None:
    """Return the path of a file of a record if it is one of `keep`."""
    if not (isinstance(file, dict) and isinstance(file.get("file"), str)):
        return None
    path = folder / "inputs" / Path(file["file"]).name
    return path if path.is_file() and not path.is_symlink() else None


def gallery(folder: Path) -> list[Path]:
    """Return the images of a folder, the newest first."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in output.FORMATS]
    paths = [path for path in paths if path.is_file() and not path.is_symlink()]
    paths = [path for path in paths if not path.name.endswith(".preview.png")]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:MAX_SHOWN]


# ------------------------------------------------------------------------------ jobs


class Job:
    """One run of sample.py in a thread of its own. `updates` yields what there is to show."""

    def __init__(self, run: Callable[["Job"], int], output: object, labels: Mapping[str, str]):
        self.lines: list[str] = []
        self.finished: list[Path] = []
        self.frame: Image.Image | Path | None = None
        self.done = self.count = 0
        self.code: int | None = None
        self.cancelled, self.changed = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, args=(run, output, labels), daemon=True)

    def _work(self, run: Callable[["Job"], int], output: object, labels: Mapping[str, str]) -> None:
        HEARD.set(self._hear)
        try:
            self.code = exit_code(lambda: run(self), labels, output, STOPPED)
        except BaseException:  # a bug: its traceback is for the terminal
            show_traceback(*sys.exc_info())
            self.lines.append("error: a bug of this program. Its terminal shows more.")
            self.code = 1
        finally:
            self.changed.set()

    def _hear(self, line: str) -> None:
        self.lines.append(line)
        self.changed.set()

    def cancel(self) -> None:
        """Stop after the present step."""
        self.cancelled.set()

    def updates(self) -> Iterator[Update]:
        """Run the job. If the caller stops to listen, the job is cancelled."""
        self.thread.start()
        try:
            while self.thread.is_alive():
                if self.changed.wait(timeout=0.25):
                    self.changed.clear()
                    yield self.update
        finally:
            self.cancel()
            self.thread.join()
        yield self.update

    @property
    def update(self) -> Update:
        share = 1.0 if self.code == 0 else self.done / max(self.count, 1)
        lines, finished = tuple(self.lines[-100:]), tuple(self.finished)
        return Update(lines, min(share, 1.0), self.frame, finished, self.code)


class PageProgress:
    """What `sample.Progress` is to a terminal: the steps, previews and files of a job."""

    def __init__(self, job: Job, images: int, preview: Callable[[Any], Any] | None):
        self.job, self.images, self.preview_of = job, images, preview
        self.preview = None

    def prepare(self, pipe) -> None:
        self.preview = self.preview_of and self.preview_of(pipe)

    def update(self, step: int, total: int) -> None:
        if self.job.cancelled.is_set():
            raise KeyboardInterrupt
        self.job.count = total * self.images
        self.job.done += 1
        if self.preview is not None:
            self.job.frame = self.preview()[0]
        self.job.changed.set()

    def finished(self, path: Path) -> None:
        self.job.finished.append(path)
        self.job.frame = path
        self.job.changed.set()

    def __enter__(self) -> "PageProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Studio:
    """The model, which stays loaded between jobs, and the folder of the images.

    flags: of sample.py, for all images. UserError or SystemExit for wrong ones.
    """

    def __init__(self, flags: Sequence[str], folder: Path):
        self.flags, self.folder = list(flags), folder
        self.parser = sample.parser()
        self.defaults = self.parser.parse_args(self.flags)
        self.parser.error = self._error  # from here on, a page is told
        self.labels = sample.flags_of(self.parser) | LABELS
        self.pipe, self.key, self.loras, self.preview = None, None, None, None
        self.filters, self.filters_key = None, None
        self.lock = threading.Lock()  # one job at a time

    def _error(self, message: str) -> None:
        """Refuse a form: with the name of its field, if it has one for the flag."""
        flag, _, problem = plain_words(message).partition(": ")
        raise UserError(f"{flag.removeprefix('--').replace('-', '_')}: {problem}")

    def choices(self, name: str) -> list[str]:
        """Return the choices of a flag of sample.py."""
        action = next(x for x in self.parser._actions if x.dest == name)
        return list(action.choices or ())

    def make(self, form: Mapping[str, Any]) -> Job:
        """Return a job that makes the images of a form."""

        def run(job: Job) -> int:
            flags = flags_of_form(form, self.folder)
            if not any(flag.startswith(("--prompt=", "--image=")) for flag in flags):
                flags.append("--prompt=")  # which is refused as empty
            flags = [*self.flags, *flags]
            say(f"python scripts/sample.py {shlex.join(flags)}")
            return self._run(job, self.parser.parse_args(flags))

        return Job(run, self.folder, self.labels)

    def make_again(self, path: Path) -> Job:
        """Return a job that makes an image again from its record."""

        def run(job: Job) -> int:
            record = output.read_metadata(path)
            args = self.parser.parse_args([f"--from-image={path}"])
            for name in (*HERE, *(part for part in PARTS if record.get(part))):
                setattr(args, name, getattr(self.defaults, name))
            return self._run(job, args)

        return Job(run, self.folder, self.labels)

    def _run(self, job: Job, args: argparse.Namespace) -> int:
        args.output = self.folder / "flux.png"
        # a filter judges finished images: none may be seen before
        preview = None if args.filter else self.preview_of
        with self.lock:
            code = sample.run(
                args,
                self.load,
                lambda args: PageProgress(job, args.num_images, preview),
                self.filters_of,
            )
        if code == REFUSED:
            say("error: a filter refused an image")
        return code

    def load(self, args: argparse.Namespace):
        """Return the pipeline of `sample.load`, the present one if only LoRAs differ."""
        plain = copy(args)
        plain.lora = []
        key = loading_key(args)
        if key != self.key:
            self.pipe = self.key = self.preview = None  # frees its memory first
            self.pipe, self.loras = sample.load(plain), []
            self.key = key
        wanted = [*args.lora, args.lora_ignore_unmatched] if args.lora else []
        if self.loras != wanted:
            self.pipe.unload_loras()
            self.loras = None
            for path, scale in args.lora:
                self.pipe.load_lora(path, scale, strict=not args.lora_ignore_unmatched)
            self.loras = wanted
        return self.pipe

    def filters_of(self, args: argparse.Namespace):
        """Return the filters of a job, those of the job before if they are the same."""
        key = (args.filter, args.filter_weights, args.weights, args.judge_device)
        if key != self.filters_key:
            self.filters = self.filters_key = None  # frees the memory of a judge first
            self.filters, self.filters_key = load_filters(args), key
        return self.filters

    def preview_of(self, pipe):
        """Return the preview of a pipeline, fitted once."""
        import flux

        if self.preview is None or self.preview.pipe is not pipe:
            self.preview = flux.Preview(pipe)
        return self.preview


def loading_key(args: argparse.Namespace) -> tuple[str, ...]:
    """Return a value that is equal for arguments that load the same model; LoRAs do not count.

    A record names the model and its dtype, which flags may leave to the defaults.
    """
    spec, dtype = get_spec(args.model, args.transformer), args.dtype
    if dtype is None:
        device = devices.choose_device(args.device)
        dtype = "float32" if spec.embedded else short(devices.choose_dtype(device))
    names = "weights device decode_dtype check_finite offload max_vram quantize fp8_matmul compile "
    names += "vae_tile " + " ".join(PARTS)
    others = [str(getattr(args, name)) for name in names.split()]
    return spec.name, dtype, args.numerics or "exact", *others
