"""The commands of parity.py that work on a random kit, of any family."""

from collections.abc import Callable


def require_commands_work(parity: Callable, kit: str, only: tuple[str, ...]) -> None:
    """Compare, replay and bisect a kit's tensors. `only`: flags that select what is replayed."""
    for command in (
        ("compare", kit, "--against", "here"),
        ("compare", kit, "--against", "diffusers"),
        ("replay", kit, *only),
        ("replay", kit, "--end-to-end", "--filter", "latents"),
        ("bisect", kit),
    ):
        code, out, err = parity(*command)
        assert code == 0, (command, out, err)
