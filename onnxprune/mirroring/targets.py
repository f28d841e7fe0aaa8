"""Where a module keeps the tensor of an initializer: under its own name wherever torch allows that.

`layer1.0.conv1.weight` becomes a parameter `weight` of nested modules, so that the state dict has the key that the
exported network's had; a name that torch can't hold is spelled with underscores.
"""

from __future__ import annotations

import re

from torch import nn

__all__ = ["Targets", "identifier"]

_TAKEN = frozenset(dir(nn.Module())) | frozenset({"meta", "graph", "code", "onnxprune"})


def identifier(name: str) -> str:
    """A Python identifier that reads like the name."""
    text = re.sub(r"\W+", "_", name).strip("_").lower() or "tensor"
    return f"_{text}" if text[0].isdigit() else text


class Targets:
    """Registers tensors and modules in a root module; every name is used once."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.leaves: set[str] = set()
        self.inner: set[str] = set()

    def choose(self, name: str) -> str:
        """A target for this name that neither holds another one nor lies in one."""
        parts = name.split(".")
        fits = all(p and p not in _TAKEN for p in parts)
        target = name if fits else identifier(name)
        wanted, k = target, 1
        while not self.free(target):
            flat = wanted.replace(".", "_")
            target, k = f"{flat}_{k}" if k > 1 or flat == wanted else flat, k + 1
        self.leaves.add(target)
        self.inner.update(".".join(target.split(".")[:k]) for k in range(1, target.count(".") + 1))
        return target

    def free(self, target: str) -> bool:
        parts = target.split(".")
        above = {".".join(parts[:k]) for k in range(1, len(parts))}
        return target not in self.leaves | self.inner | _TAKEN and not above & self.leaves

    def owner(self, target: str) -> tuple[nn.Module, str]:
        """The module that holds the target, made where it does not exist yet, and the attribute's name."""
        *path, leaf = target.split(".")
        module = self.root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        return module, leaf
