"""What the scripts share: flags for the library's argument names, and hidden aliases of renamed flags.

The library speaks of its own arguments. An error starts with the argument's name and a colon; any other
argument stands in backticks: "width: must be a multiple of 16 (got 100). Or leave `height` out." A script
passes such a message through `with_flags` before it prints the message.
"""

import argparse
import re
from collections.abc import Mapping


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Replace the library's argument names in `message` by a script's flags.

    `flags` maps an argument ("width") or an argument with its value ("composite=False") to a flag.
    An argument that is not in `flags` keeps its name.
    """

    def flag(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        if value is None:
            return flags.get(name, match[0])
        if f"{name}={value}" in flags:
            return flags[f"{name}={value}"]
        bare = value.strip("\"'")
        return f"{flags[name]} {bare}" if name in flags else match[0]

    message = re.sub(r"`(?P<name>\w+)(?:=(?P<value>[^`]+))?`", flag, message)
    return re.sub(r"^(?P<name>\w+)(?:=(?P<value>[^\s:]+))?(?=:)", flag, message)


def add_hidden_alias(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """Let `parser` accept the old name of the flag `new`, without a line in its help."""
    action = parser._option_string_actions[new]
    parser._option_string_actions[old] = action
