"""What a swap did, as a table, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

SWAPPED, PLANNED, LEFT, UNDONE = "swapped", "would be swapped", "left alone", "undone"


@dataclass
class Row:
    """One module.

    Attributes:
        path: of the module in the model; ``""`` is the model itself. A shared module names its other paths in ``also``.
        old, new: class names; of transformers' models the attention implementation stands in parentheses.
        action: ``"swapped"``, ``"would be swapped"`` (dry run), ``"left alone"`` or ``"undone"`` (the check failed).
        backend: who computes on the device that the module is on now, or None.
        why: of the backend, or of what was not done.
        part_of: path of the module that it is swapped together with, as a step of its chain, or None.
    """

    path: str
    old: str
    new: str | None
    action: str
    backend: str | None
    why: str
    also: tuple[str, ...] = ()
    part_of: str | None = None


@dataclass(frozen=True)
class Difference:
    """How far one tensor of the model moved.

    Attributes:
        name: ``output…`` or ``grad of …``.
        largest: max |after − before|.
        relative: the same over max |before|.
        tolerance: what ``relative`` may be.
        dtype: of the tensor.
        gold_before, gold_after: relative errors against the model in float64, where that could be computed.
    """

    name: str
    largest: float
    relative: float
    tolerance: float
    dtype: str
    gold_before: float | None = None
    gold_after: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether it is within the tolerance."""
        return self.relative <= self.tolerance


@dataclass
class Report:
    """What `mmfast.swap` did. Printed, it is a table.

    Attributes:
        rows: every module that swap knows, or that derives from one that it knows. The table leaves out those that are
            part of another one.
        others: number of modules that are none of its business.
        differences: of the check, the largest first in units of its tolerance; empty without a check.
        notes: how the check was made.
    """

    rows: list[Row]
    others: int = 0
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _undo: Callable[[], None] | None = None

    @property
    def swapped(self) -> list[Row]:
        """Rows of what was swapped, or in a dry run would be."""
        return [row for row in self.rows if row.action in (SWAPPED, PLANNED)]

    @property
    def left_alone(self) -> list[Row]:
        """Rows of what was not."""
        return [row for row in self.rows if row.action == LEFT]

    @property
    def undone(self) -> list[Row]:
        """Rows of swaps that disagreed with the model before them, and were taken back."""
        return [row for row in self.rows if row.action == UNDONE]

    def undo(self) -> None:
        """Gives every module its old class and attributes back; a second call does nothing.

        Raises:
            RuntimeError: a module was changed by others since, by a parametrization or another swap, say. Nothing is
                undone then.
        """
        if self._undo is not None:
            self._undo()
            self._undo = None
            for row in self.rows:
                if row.action == SWAPPED:
                    row.action, row.why = UNDONE, "report.undo()"

    def __str__(self) -> str:
        from tabulate import tabulate

        whole = [row for row in self.rows if row.part_of is None]
        steps = Counter(row.part_of for row in self.rows)
        cells = [
            [_path(row), row.old, row.new or "", row.action, row.backend or "", _why(row, steps[row.path])]
            for row in whole
        ]
        lines = []
        if cells:
            headers = ["module", "class", "new class", "", "backend", "why"]
            lines.append(tabulate(cells, headers, maxcolwidths=[44, None, None, None, None, 52], disable_numparse=True))
        counts = Counter(row.action for row in whole)
        verb = PLANNED if counts[PLANNED] else SWAPPED
        parts = [f"{counts[verb]} {verb}", f"{counts[LEFT]} left alone"]
        if counts[UNDONE]:
            parts.append(f"{counts[UNDONE]} undone")
        lines.append(f"{', '.join(parts)}; {self.others} other modules")
        if self.differences:
            lines += ["", _differences(self.differences)]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def _path(row: Row) -> str:
    path = row.path or "(the model)"
    if len(row.also) > 2:
        return f"{path} and {len(row.also)} more"
    return " = ".join((path, *row.also))


def _why(row: Row, steps: int) -> str:
    return row.why if not steps else f"{row.why}; with {steps} step{'s' if steps > 1 else ''} inside it"


def _differences(differences: list[Difference]) -> str:
    from tabulate import tabulate

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.1e}"

    cells = [
        [d.name, d.dtype, *map(number, (d.largest, d.relative, d.tolerance, d.gold_before, d.gold_after))]
        for d in differences[:8]
    ]
    headers = ["largest differences", "dtype", "max", "relative", "allowed", "error before", "error after"]
    table = tabulate(cells, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 5))
    hidden = len(differences) - len(cells)
    return table if hidden <= 0 else f"{table}\n… and {hidden} smaller ones"
