"""What somebody did to a loaded module: its hooks, replaced forwards and added modules."""

from collections.abc import Mapping

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Changes:
    """The hooks, replaced forwards and modules of a network, as they are now.

    Hooks are looked up again by `describe`: one that was removed in the meantime is not lost.
    """

    def __init__(self, module: nn.Module):
        self.hooks: dict[int, Mapping] = {}  # number of a hook, unique in a process -> its registry
        self.forwards: set[str] = set()  # paths of modules with a forward of their own
        self.modules: set[str] = set()  # paths
        for path, part in module.named_modules():
            self.modules.add(path)
            if "forward" in vars(part):
                self.forwards.add(path)
            for name in HOOKS:
                registry = getattr(part, name)
                self.hooks |= dict.fromkeys(registry, registry)

    def since(self, before: "Changes") -> "Changes":
        """Return what is here beyond `before`."""
        new = object.__new__(Changes)
        new.hooks = {number: self.hooks[number] for number in self.hooks.keys() - before.hooks}
        new.forwards = self.forwards - before.forwards
        new.modules = self.modules - before.modules
        return new

    def add(self, other: "Changes") -> None:
        self.hooks |= other.hooks
        self.forwards |= other.forwards
        self.modules |= other.modules

    def describe(self) -> str:
        """Return "2 hooks and 1 added module", or "" if nothing is left."""
        hooks = sum(number in registry for number, registry in self.hooks.items())
        counts = {
            "hook": hooks,
            "replaced forward": len(self.forwards),
            "added module": len(self.modules),
        }
        parts = [f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items() if n]
        return " and ".join(parts)
