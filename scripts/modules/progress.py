"""What sample.py shows of a run beside its messages: the image so far, and the finished files."""

import argparse
from pathlib import Path
from types import TracebackType

from modules import several_processes
from modules.command_line import say, show

KEY = "flux-preview"  # names our own previews, which alone are replaced


class Progress:
    """A context manager around the steps of a run. A page in a browser has a class of its own.

    With --preview N, OUTPUT.preview.png is written every N steps, and removed at the end.
    UserError for a number below 1, for a file of another program under that name, and with filters.
    """

    def __init__(self, args: argparse.Namespace):
        from flux.errors import UserError
        from flux.runtime.checks import check_range

        self.every, self.path = args.preview, args.output.with_suffix(".preview.png")
        if self.every is None:
            return
        if several_processes.count() > 1:
            raise UserError("preview: does not work with several processes. Leave it out.")
        check_range("preview", self.every, 1, 1000)
        if args.filter:
            raise UserError("preview: shows images before `filter` judges them. Leave one out.")
        if (self.path.exists() or self.path.is_symlink()) and not is_preview(self.path):
            raise UserError(f"preview: {self.path} exists. Move it, or use another `output`.")

    def prepare(self, pipe) -> None:
        """Fit the map from latents to colours, once the model is found."""
        if self.every is None:
            return
        import flux

        self.preview = flux.Preview(pipe)
        say(f"preview: {self.path}")

    def update(self, step: int, total: int) -> None:
        """Renew the preview if this step of an image, from 1 to `total`, is one of those."""
        if self.every is None or step % self.every:
            return
        from flux.atomic_files import write_atomically
        from flux.image_io.output import metadata_options

        (image,) = self.preview()
        options = metadata_options("PNG", {"model": self.preview.pipe.spec.name}, record=False)
        options["pnginfo"].add_text(KEY, "the image so far")
        with write_atomically(self.path, wait=True) as unfinished:
            image.save(unfinished, "PNG", **options, compress_level=1)

    def finished(self, path: Path) -> None:
        """Print the name of a written image; go on if the reader of standard output has gone."""
        try:
            show(path)
        except BrokenPipeError:
            pass

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.every is not None and is_preview(self.path):
            self.path.unlink(missing_ok=True)


def is_preview(path: Path) -> bool:
    """Return whether a file is a preview of ours."""
    from flux.errors import UserError
    from flux.image_io.input import open_image

    try:
        with open_image(path) as image:
            return KEY in image.info
    except UserError:
        return False
