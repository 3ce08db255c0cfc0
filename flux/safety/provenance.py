"""What a run writes into its images about their origin: a watermark, and a signed manifest."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flux import arguments
from flux.errors import UserError
from flux.image_io.metadata import describe_file, is_described
from flux.safety import marking
from flux.safety.signing import Ingredient, Signer

WEIGHTS = (".safetensors", ".sft", ".gguf")  # suffixes of the files whose hashes are signed


class Provenance:
    """The marks of a run.

    watermark: "tile", "bfl" or None. sign, certificate: files of a private key and its certificates
    in PEM. sign_prompt: state the prompt in the manifest, and not only its hash. UserError for
    what cannot mark or sign.
    """

    def __init__(
        self,
        watermark: str | None = None,
        sign: str | Path | None = None,
        certificate: str | Path | None = None,
        sign_prompt: bool = False,
    ):
        if watermark is not None and watermark not in marking.KINDS:
            raise UserError(
                f"watermark: {watermark!r:.40} is unknown (expected {', '.join(marking.KINDS)})."
            )
        if (sign is None) != (certificate is None):
            raise UserError("sign: needs `certificate`, and the other way round.")
        if sign_prompt and sign is None:
            raise UserError("sign_prompt: has no effect without `sign`. Add it.")
        self.watermark, self.sign_prompt = watermark, sign_prompt
        self.signer = None
        if sign is not None and certificate is not None:
            key = arguments.to_path("sign", sign)
            self.signer = Signer(key, arguments.to_path("certificate", certificate))

    def check_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Raise UserError if an image of a (width, height) is too small for the watermark."""
        for width, height in sizes:
            if self.watermark is not None:
                marking.check_size(self.watermark, width, height)

    @property
    def metadata(self) -> dict:
        """Return what the record says of the watermark."""
        return {"watermark": self.watermark} if self.watermark else {}

    def mark(self, image: Image.Image, metadata: dict) -> Image.Image:
        """Return the image with its watermark, if there is to be one."""
        return marking.mark(image, self.watermark, metadata) if self.watermark else image

    def seal(
        self, metadata: dict, ingredients: Sequence[Ingredient] = (), files: dict | None = None
    ) -> Callable[[bytes], bytes] | None:
        """Return what signs the bytes of an image file; None without a key.

        files: those of the pipeline, by part, whose weights are hashed when the first is signed.
        """
        if self.signer is None:
            return None
        signer, weights = self.signer, weight_files(files or {})
        return lambda data: signer.sign(data, metadata, ingredients, weights, self.sign_prompt)


def weight_files(files: dict[str, Any]) -> list[Path]:
    """Return the files of weights among those of a pipeline, each once."""
    listed = [paths if isinstance(paths, list | tuple) else [paths] for paths in files.values()]
    found = [path for paths in listed for path in paths if isinstance(path, Path)]
    return list(dict.fromkeys(path for path in found if path.suffix.lower() in WEIGHTS))


def recorded_ingredients(metadata: dict, paths: Iterable[Path | None] = ()) -> list[Ingredient]:
    """Return the inputs that a record names; of these `paths`, the file itself may be read."""
    images, own = metadata.get("images"), {str(path) for path in paths}
    parts = [*(images if isinstance(images, list) else []), metadata.get("mask")]
    parts.append(metadata.get("latents"))
    return [
        Ingredient(
            Path(part["file"]).name,
            part["sha256"],
            Path(part["file"]) if part["file"] in own else None,
        )
        for part in parts
        if is_described(part)
    ]


def ingredients_of(images: Sequence[Any]) -> list[Ingredient]:
    """Return the inputs of a call in Python: paths of files, or what is in memory."""
    found = []
    for number, image in enumerate(images, start=1):
        if isinstance(image, str | Path):
            described = describe_file(Path(image))
            found.append(Ingredient(Path(image).name, described["sha256"], Path(image)))
        else:
            found.append(Ingredient(f"input {number}, in memory"))
    return found
