"""The scripts of this project as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str) -> ModuleType:
    """Return scripts/`name`.py as a module. It is new each time, so a test may change it."""
    spec = importlib.util.spec_from_file_location(
        f"{Path(name).name}_script", SCRIPTS / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
