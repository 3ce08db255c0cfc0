"""FLUX.1 and FLUX.2 in pure PyTorch: `flux.load(name)` returns a pipeline.

`flux.MODELS` is the table of models. flux/README.md gives the order in which to read the files.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from flux.configs import MODELS
    from flux.errors import RefusedError, UserError
    from flux.image_io.request import ImageInputs
    from flux.loading import load
    from flux.pipeline import Pipeline
    from flux.preview import Preview
    from flux.text_encoder import TextEncoder, TextFeatures

__version__ = "0.1.0"
__all__ = ["MODELS", "ImageInputs", "Pipeline", "Preview", "RefusedError", "TextEncoder"]
__all__ += ["TextFeatures", "UserError", "load"]

_MODULES = {
    "MODELS": "configs",
    "ImageInputs": "image_io.request",
    "Pipeline": "pipeline",
    "Preview": "preview",
    "RefusedError": "errors",
    "TextEncoder": "text_encoder",
    "TextFeatures": "text_encoder",
    "UserError": "errors",
    "load": "loading",
}
_PUBLIC_MODULES = ("configs", "hooks", "sampling", "solvers", "transformer", "autoencoder")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PUBLIC_MODULES, "__version__"])


def __getattr__(name: str):
    """Import public names and submodules on first use, to keep `import flux` fast."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"flux.{_MODULES[name]}"), name)
    try:
        return importlib.import_module(f"flux.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"flux.{name}":
            raise
        raise AttributeError(f"module 'flux' has no attribute {name!r}") from None
