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

    def own_class(self, name: str) -> type | None:
        """The entry of this package whose class has this name."""
        entry = next((entry for entry, place in self.own.items() if place.rpartition(":")[2] == name), None)
        return None if entry is None else self[entry]

    def foreign_class(self, name: str) -> type | None:
        """The entry of another package whose class has this name: each has to be loaded to know."""
        foreign = (p.load() for p in entry_points(group=self.group) if p.name not in self.own)
        return next((cls for cls in foreign if cls.__name__ == name), None)

    def class_names(self) -> list[str]:
        return sorted({self[name].__name__ for name in self})
