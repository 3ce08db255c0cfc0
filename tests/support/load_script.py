"""The scripts of this project as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str) -> ModuleType:
    """A new module each time, so that a test may change it. `name`: the path below scripts/, without .py."""
    spec = importlib.util.spec_from_file_location(
        f"{Path(name).name}_script", SCRIPTS / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
