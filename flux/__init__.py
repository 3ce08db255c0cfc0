"""FLUX.1 and FLUX.2 in pure PyTorch: `flux.load(name)` makes a pipeline, `flux.MODELS` is the table of models."""

import importlib

__version__ = "0.1.0"
__all__ = ["MODELS", "ImageInputs", "Pipeline", "UserError", "load"]

_HOMES = {
    "MODELS": "configs",
    "ImageInputs": "image_io.request",
    "Pipeline": "pipeline",
    "UserError": "errors",
    "load": "loading",
}


def __getattr__(name: str):
    """Public names and submodules are imported when they are first asked for, so that `import flux` costs nothing."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"flux.{_HOMES[name]}"), name)
    try:
        return importlib.import_module(f"flux.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"flux.{name}":
            raise
        raise AttributeError(f"module 'flux' has no attribute {name!r}") from None
