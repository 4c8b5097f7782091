"""What a swap does to one object, so that it can be taken back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ABSENT = object()


class Change:
    """One reversible step; `undo` after `apply` leaves everything as it was."""

    def apply(self) -> None:
        """Does it, or raises with nothing done."""
        raise NotImplementedError

    def undo(self) -> None:
        """Takes it back."""
        raise NotImplementedError

    def stands(self) -> bool:
        """Whether what `apply` set is still there, untouched by others."""
        raise NotImplementedError


@dataclass
class ClassChange(Change):
    """Gives an object another class, in place.

    The object stays the same one: parameters, buffers, hooks, mode, and whoever else refers to it (an optimizer, a
    second path, a wrapper, a plain list) need no attention, and there is nothing to copy that could be forgotten.

    Args:
        subject: the object.
        new: its class from now on.
        attributes: what instances of ``new`` have besides; those that are `ABSENT` they lose.
    """

    subject: Any
    new: type
    attributes: dict[str, Any] = field(default_factory=dict)
    old: type = field(init=False)
    _before: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.old = type(self.subject)

    def apply(self) -> None:
        before = {name: getattr(self.subject, name, ABSENT) for name in self.attributes}
        self.subject.__class__ = self.new
        try:
            for name, value in self.attributes.items():
                self._before[name] = before[name]
                if value is not ABSENT:
                    setattr(self.subject, name, value)
                elif before[name] is not ABSENT:
                    delattr(self.subject, name)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        while self._before:
            name, value = self._before.popitem()
            if value is not ABSENT:
                setattr(self.subject, name, value)
            elif hasattr(self.subject, name):
                delattr(self.subject, name)
        self.subject.__class__ = self.old

    def stands(self) -> bool:
        return type(self.subject) is self.new


@dataclass
class ConfigChange(Change):
    """Sets the attention implementation of one configuration of transformers, and of none of those inside it."""

    config: Any
    new: str
    old: str = field(init=False)

    def __post_init__(self) -> None:
        self.old = self.config._attn_implementation

    def apply(self) -> None:
        self.config._attn_implementation_internal = self.new  # the property would set the configurations inside it too

    def undo(self) -> None:
        self.config._attn_implementation_internal = self.old

    def stands(self) -> bool:
        return self.config._attn_implementation == self.new


def apply_all(changes: list[Change]) -> None:
    """All of them, or none and an exception."""
    done: list[Change] = []
    try:
        for change in changes:
            change.apply()
            done.append(change)
    except BaseException:
        undo_all(done)
        raise


def undo_all(changes: list[Change]) -> None:
    """The last one first."""
    for change in reversed(changes):
        change.undo()
