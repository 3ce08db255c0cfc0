"""Say what images carry about their origin, and whether what they carry holds.

python scripts/verify.py outputs/flux.png
python scripts/verify.py --json downloads/*.jpg

Exit codes: 0: all images carry something, and everything they carry holds. 1: something does not
hold. 2: wrong arguments. 3: the rest holds, but an image carries nothing.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from modules.command_line import Parser, exit_code, show

DESCRIPTION, EPILOG = __doc__.split("\n", 1)


def parser() -> argparse.ArgumentParser:
    p = Parser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG, JPEG, WebP, ...")
    p.add_argument("--json", action="store_true", help="print one JSON text, with all values")
    p.add_argument("--trust", type=Path, metavar="PEM",
                   help="certificates that a signature must lead to, such as root.pem")  # fmt: skip
    return p


def main() -> int:
    args = parser().parse_args()
    return exit_code(lambda: run(args), {"trust": "--trust"}, args.images[0], "stopped")


def run(args: argparse.Namespace) -> int:
    from flux.plain_files import read_plain_file, require_plain_file
    from flux.safety.signing import check_roots
    from flux.safety.verification import as_json, verify

    for path in args.images:
        require_plain_file(path, "an image file")
    files = []
    roots = read_plain_file(args.trust, 2**20, "certificates in PEM") if args.trust else None
    if roots is not None:
        check_roots(roots, args.trust)
    for path in args.images:
        findings = verify(path, roots)
        files.append(as_json(path, findings))
        if not args.json:
            for finding in findings:
                state = "holds" if finding.holds else "DOES NOT HOLD"
                show(f"{path}: {finding.kind}: {state}: {finding.text}")
            if not findings:
                show(f"{path}: carries nothing")
    if args.json:
        show(json.dumps(files))
    if not all(file["holds"] for file in files):
        return 1
    return 0 if all(file["carries"] for file in files) else 3


if __name__ == "__main__":
    sys.exit(main())
