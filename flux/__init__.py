"""FLUX.1 and FLUX.2 in pure PyTorch: `flux.load(name)` returns a pipeline.

`flux.MODELS` is the table of models. flux/README.md gives the order in which to read the files.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["MODELS", "ImageInputs", "Pipeline", "UserError", "load"]

_MODULES = {
    "MODELS": "configs",
    "ImageInputs": "image_io.request",
    "Pipeline": "pipeline",
    "UserError": "errors",
    "load": "loading",
}


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
