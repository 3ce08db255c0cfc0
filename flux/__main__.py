"""`python -m flux sample "a red circle"`: the commands of the folder scripts/."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# the scripts are next to this package: in a clone as `scripts`, installed as `flux_ref`
FOLDER = next(path for path in (ROOT / "flux_ref", ROOT / "scripts") if path.is_dir())
sys.path.insert(0, str(FOLDER))

from command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main("python -m flux"))
