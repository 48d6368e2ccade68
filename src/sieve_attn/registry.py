"""Explicit tables ``name -> "module:Class"``, open to other packages through an entry-point group of the table's name."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points

from sieve_attn.checks import error


class Table:
    """What a stage offers, by name. Nothing is imported before it is asked for."""

    def __init__(self, group: str, own: dict[str, str]):
        self.group = group
        self.own = own

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self.own, *(p.name for p in entry_points(group=self.group))}))

    def __getitem__(self, name: str) -> type:
        place = self.own.get(name)
        if place is None:
            foreign = [p for p in entry_points(group=self.group) if p.name == name]
            if not foreign:
                raise error("name", f"must be one of {', '.join(self)}", repr(name), f"see {self.group}")
            return foreign[0].load()
        module, _, attribute = place.partition(":")
        return getattr(import_module(module), attribute)

    def classes(self) -> dict[str, type]:
        """Every entry, loaded, under its class name."""
        return {cls.__name__: cls for cls in (self[name] for name in self)}
