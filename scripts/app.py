"""Serve a page that makes images, to a browser of this machine: previews, a queue, a gallery.

python scripts/app.py
python scripts/app.py --model flux.2-klein-4b --weights DIR --lora-folder DIR
python scripts/app.py --model flux.1-dev --filter nsfw --watermark tile

All other flags are those of sample.py; they hold for all images.
"""

import argparse
import atexit
import os
import shutil
import socket
import sys
import tempfile
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sample
from modules.command_line import Parser, exit_code, fail, show, with_flags

from flux.errors import UserError, install_command

HOST = "127.0.0.1"  # other machines cannot connect
DESCRIPTION, EPILOG = __doc__.split("\n", 1)[0], "examples:" + __doc__.split("\n", 1)[1]
# arguments of sample.py that the page chooses, or that no page needs
OWN = "prompts prompt prompt_file seed num_images image mask from_image latents preview "
OWN += "save_control no_metadata list_models inspect box boxes"


def parser() -> argparse.ArgumentParser:
    p = Parser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--port", type=int, default=7860, help="default: 7860")
    p.add_argument(
        "--output",
        type=Path,
        default=Path("outputs"),
        metavar="DIR",
        help="folder of the images and of copies of input images, which the page can read and "
        "show (default: outputs)",
    )
    p.add_argument(
        "--lora-folder", type=Path, metavar="DIR", help="folder of LoRA files to choose from"
    )
    return p


def main() -> int:
    args, flags = parser().parse_known_args()
    p = sample.parser()
    given = p.parse_args(flags)  # wrong flags end here
    chosen = [x for x in OWN.split() if getattr(given, x, None) not in (p.get_default(x), [])]
    own = sample.flags_of(p) | {"port": "--port", "lora_folder": "--lora-folder"}
    if chosen:
        return fail(with_flags(f"{chosen[0]}: is chosen in the page. Leave it out.", own), 2)
    return exit_code(lambda: run(args, flags), own, args.output, "the page is closed")


def run(args: argparse.Namespace, flags: list[str]) -> int:
    demo, options = build(args, flags)
    demo.queue(default_concurrency_limit=1, max_size=16)
    demo.launch(server_name=HOST, server_port=args.port, prevent_thread_lock=True, **options)
    show(f"http://{HOST}:{args.port}")
    try:
        threading.Event().wait()  # until Ctrl-C
    finally:
        demo.close(verbose=False)
    return 0


def build(args: argparse.Namespace, flags: list[str]):
    """Return the page, and how to launch it. UserError for wrong flags; exit without Gradio."""
    if args.lora_folder and not args.lora_folder.is_dir():
        raise UserError(f"lora_folder: {args.lora_folder} is not a folder.")
    check_port(args.port)
    from modules.studio import Studio

    private = tempfile.mkdtemp(prefix="flux-app-")  # what browsers upload, until the end
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    os.environ |= {"GRADIO_TEMP_DIR": private, "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        import gradio
    except ModuleNotFoundError as error:
        sys.exit(fail(f"the package {error.name!r} is missing. Run `{install_command('app')}`.", 2))
    from modules.app_page import CSS, Page
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    args.output.mkdir(parents=True, exist_ok=True)
    studio = Studio(flags, args.output)
    # a name of another site that leads here would make its pages ours (DNS rebinding)
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    options = dict(
        quiet=True,
        share=False,
        allowed_paths=[str(args.output.resolve())],
        max_file_size="64mb",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": [hosts]},
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
    )
    return Page(studio, args.lora_folder).demo, options


def check_port(port: int) -> None:
    """UserError unless a server can listen at a port."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except (OSError, OverflowError):
        raise UserError(
            f"port: {port} is taken or not allowed. Use another, 1024 to 65535."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
