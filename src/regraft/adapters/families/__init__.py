"""Families: how files parametrise ΔW. One file each, registered by itself."""

from importlib import import_module
from pkgutil import iter_modules

from regraft.adapters.families.registry import (
    Built,
    Family,
    Module,
    families,
    family_meant,
    family_of,
    get_family,
)

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")

__all__ = ["Built", "Family", "Module", "families", "family_meant", "family_of", "get_family"]
