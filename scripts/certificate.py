"""Make a key and certificates of your own, to sign images with sample.py --sign.

python scripts/certificate.py signing --name "My studio"
python scripts/sample.py "a cat" --sign signing/key.pem --certificate signing/chain.pem
python scripts/verify.py outputs/flux.png --trust signing/root.pem

They are on no trust list: only people who get root.pem from you, and trust the way by which they
got it, can tell that an image is yours. Keep key.pem secret.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from modules.command_line import Parser, exit_code, say

MAX_NAME = 59  # bytes: X.509 has room for 64, and the root is called "NAME root"
DAYS = 397  # of the signer's certificate; the root's has ten years


def parser() -> argparse.ArgumentParser:
    description, epilog = __doc__.split("\n", 1)
    p = Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="new folder for the three files")
    p.add_argument(
        "--name",
        default="flux user",
        metavar="TEXT",
        help="whose images they sign (default: flux user)",
    )
    return p


def main() -> int:
    args = parser().parse_args()
    return exit_code(lambda: run(args), {"name": "--name"}, args.folder, "stopped")


def run(args: argparse.Namespace) -> int:
    import torch  # noqa: F401  (flux needs it)

    from flux.atomic_files import check_absent, make_folder, write_atomically
    from flux.errors import UserError

    size = len(args.name.encode(errors="replace"))  # certificates limit bytes
    if not 1 <= size <= MAX_NAME or not args.name.isprintable():
        raise UserError(
            f"name: must have 1 to {MAX_NAME} printable characters, fewer if they are not ASCII "
            f"(got {args.name!r:.80}, of {size} bytes)."
        )
    check_absent(args.folder)
    files = make(args.name)
    make_folder(args.folder.parent)
    with write_atomically(args.folder, overwrite=False) as folder:
        folder.mkdir()
        for name, data in files.items():
            (folder / name).touch(mode=0o600 if name == "key.pem" else 0o666)
            (folder / name).write_bytes(data)
    say(f"{args.folder}: key.pem, chain.pem, root.pem; valid for {DAYS} days, on no trust list")
    return 0


def make(name: str, days: int = DAYS) -> dict[str, bytes]:
    """Return the files of a new key: its own certificate, and that of the root that signed it.

    `days`: how long the signer's certificate is valid; it has expired for a negative number.
    """
    from datetime import UTC, datetime, timedelta

    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError:
        from flux.errors import UserError, install_command

        raise UserError(f"needs the package cryptography: `{install_command('sign')}`.") from None

    start = datetime.now(UTC) - timedelta(days=400)

    def certificate(subject: str, public, issuer: str, secret, is_root: bool):
        names = [
            x509.Name(
                [
                    x509.NameAttribute(NameOID.COMMON_NAME, text),
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, name),
                ]
            )
            for text in (subject, issuer)
        ]
        usage = x509.KeyUsage(
            digital_signature=not is_root,
            key_cert_sign=is_root,
            crl_sign=is_root,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        end = datetime.now(UTC) + timedelta(days=3650 if is_root else days)
        builder = (
            x509.CertificateBuilder(names[1], names[0], public, x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(is_root, None), True)
            .add_extension(usage, True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(secret.public_key()), False
            )
        )
        if not is_root:  # C2PA asks for a purpose; this one needs no setting of the reader
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purpose, False)
        signed = builder.sign(secret, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root_name = f"{name} root"
    root = certificate(root_name, root_key.public_key(), root_name, root_key, True)
    own = certificate(name, key.public_key(), root_name, root_key, False)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {"key.pem": secret, "chain.pem": own + root, "root.pem": root}


if __name__ == "__main__":
    sys.exit(main())
