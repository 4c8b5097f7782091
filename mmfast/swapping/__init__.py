"""`mmfast.swap`: puts the fused slices into an existing model, and takes them out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmfast import _backend
from mmfast.swapping import rules, transformers
from mmfast.swapping.changes import Change, apply_all, undo_all
from mmfast.swapping.check import Check
from mmfast.swapping.report import LEFT, PLANNED, SWAPPED, UNDONE, Difference, Report, Row
from mmfast.swapping.walk import Site, selection, sites

__all__ = ["Difference", "Report", "Row", "swap"]


@dataclass
class _Unit:
    """What is swapped together or not at all: a change for each row."""

    rows: list[Row]
    changes: list[Change]


def swap(
    model: nn.Module,
    *,
    only: Any = None,
    skip: Any = None,
    dry_run: bool = False,
    check: Any = None,
    tolerance: float | None = None,
) -> Report:
    r"""Puts mmfast's kernels into ``model``, which goes on computing what it computed.

    =============================  ================================================================================
    in the model                   becomes
    =============================  ================================================================================
    torchaudio's ``Spectrogram``,  the classes of these names in `mmfast.compat.torchaudio.transforms`
    ``MelSpectrogram``, ``MFCC``,
    ``LFCC``
    ``nn.MultiheadAttention``      `mmfast.nn.MultiheadAttention`, also inside ``nn.TransformerDecoderLayer`` and others
    NeMo's ``FilterbankFeatures``  `mmfast.compat.nemo.FilterbankFeatures`, also inside
                                   ``AudioToMelSpectrogramPreprocessor``; NeMo's class is kept beneath it
    processors of diffusers        those of `mmfast.compat.diffusers`; what sets new ones later, as ``load_ip_adapter``
                                   does, brings back diffusers' own
    models of transformers         ``attn_implementation="mmfast"`` (`mmfast.compat.transformers_attention`)
    losses and metrics of          those of the module of this name in `mmfast.compat`
    geomloss, pytorch-adapt,
    tllib, TorchDrift,
    torchmetrics, ignite, DeepDA
    =============================  ================================================================================

    Modules are changed in place: each stays the same object and is given another class. Parameters, buffers, hooks,
    mode, device, dtype, ``state_dict`` keys, optimizers and second paths of a shared module are therefore what they
    were, and ``isinstance(m, torchaudio.transforms.MelSpectrogram)`` is not. Subclasses of these classes, modules with
    a ``forward`` of their own, and whatever else is not understood are left alone; the report says why. If an exception
    comes in between, nothing has been swapped.

    Wrappers: what is inside ``torch.compile``'s modules (which then compile again), ``DataParallel``,
    ``DistributedDataParallel``, ``FullyShardedDataParallel`` and modules with ``fully_shard`` around them is swapped;
    a module to which ``fully_shard`` or a parametrization was itself applied is not, nor are scripted or exported
    modules, whose code is fixed. A graph that was captured (CUDA graphs, ``torch.export``) goes on running what it
    captured. Each process swaps its own copy: call it in all of them. With ``check`` the processes of a sharded model
    keep and undo the same swaps; those of a ``DistributedDataParallel`` decide each by its own inputs.

    Args:
        model: a module; or a metric of ignite. A pipeline of diffusers is none: swap its ``unet`` or ``transformer``.
        only, skip: which modules: a glob of paths (``"encoder.*"``; ``*`` also matches dots; the names that wrappers
            add may be left out), a class, a function of (path, module), or a list of these. Each also means everything
            inside what it matches. ``skip`` wins.
        dry_run: only report.
        check: example inputs: a tensor, a tuple for ``model(*inputs)``, a dictionary for ``model(**inputs)``, or a
            function that is called with the model and returns its outputs. The model is run before and after, forward
            and backward, without dropout; a swap with which an output or gradient differs by more than the tolerance,
            or that raises, is undone and named in the report. Compiled models are run without compilation, sharded ones
            forward only. Takes the memory of a copy of the model in float64.
        tolerance: allowed max |after − before| / max |before|. Default: 16 times the error of the model before the swap
            against itself in float64, plus roundings of the dtype.

    Returns:
        A report that prints as a table, with ``undo()``.

    Raises:
        TypeError: ``model`` is neither module nor metric, or ``only`` or ``skip`` is none of these.
        ValueError: a glob that matches nothing, or a tolerance below 0.

    Example:
        >>> model = nn.TransformerDecoderLayer(64, 4)
        >>> report = mmfast.swap(model, check=(torch.randn(7, 2, 64), torch.randn(9, 2, 64)))
        >>> [row.path for row in report.swapped]
        ['self_attn', 'multihead_attn']
        >>> report.undo()
    """
    known = rules.known()
    metrics = tuple(cls for cls in known if not issubclass(cls, nn.Module))
    if not isinstance(model, (nn.Module, *metrics)):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if tolerance is not None and not tolerance >= 0:  # nor NaN
        raise ValueError(f"tolerance must be at least 0, or None, got {tolerance}")
    found = sites(model, metrics)
    wanted = _wanted(only, skip, found)
    units, rows = _plan(found, known, wanted)
    about = {key for key, site in found.items() if any(row.path == site.paths[0] for row in rows)}
    report = Report(rows, others=len(found) - len(about))
    if check is not None and not isinstance(model, nn.Module):
        raise TypeError("check needs a module to call")
    if dry_run:
        return report
    if check is None:
        apply_all([change for unit in units for change in unit.changes])
        kept = units
    else:
        kept = _checked(units, Check(model, check, tolerance), report)
    for unit in kept:
        for row in unit.rows:
            row.action = SWAPPED
    report._undo = lambda: _undo(kept)
    return report


def _wanted(only: Any, skip: Any, found: dict[int, Site]) -> Callable[[Site], str | None]:
    """Why a site is not to be swapped by the user's choice, or None."""
    inside = selection("only", only, found) if only is not None else lambda site: True
    outside = selection("skip", skip, found) if skip is not None else lambda site: False
    return lambda site: "skip=" if outside(site) else None if inside(site) else "not in only="


def _plan(found: dict[int, Site], known: dict, wanted: Callable) -> tuple[list[_Unit], list[Row]]:
    """Units to apply, and the rows of all candidates in the order of the model."""
    units: dict[int, _Unit] = {}  # by the id of the module that leads
    configs: dict[int, Site] = {}
    rows = []
    pretrained = transformers.base_class()
    for site in found.values():
        row = None
        if pretrained is not None and isinstance(site.subject, pretrained):
            row = _plan_transformer(site, configs, units, wanted)
        elif any(base in known for base in type(site.subject).__mro__):
            row = _plan_class(site, known, units, wanted)
        elif isinstance(site.subject, torch.jit.ScriptModule):
            row = _scripted(site, known)
        if row is not None:
            rows.append(row)
    return list({id(unit): unit for unit in units.values()}.values()), rows


def _plan_class(site: Site, known: dict, units: dict[int, _Unit], wanted: Callable) -> Row | None:
    subject = site.subject
    row = _row(site, _name(type(subject)))
    rule = known.get(type(subject))
    leader = _leader(site, known, units, rule)
    if rule is not None and rule.within and leader is None:
        return None  # nothing to fuse it with
    why = wanted(site) or rules.veto(subject, known, [around.subject for around in site.around.values()])
    if why is None:
        try:
            change = rule.change(subject)
        except rules.Unfit as error:
            why = str(error)
    if why is not None:
        row.why = why
        return row
    row.new, row.action = _name(change.new), PLANNED
    row.backend, row.why = _backend.choose(rule.op, _device(subject, site))
    if leader is not None:
        row.part_of = leader.rows[0].path
    elif note := _note(site, rule):
        row.why += f"; {note}"
    unit = leader or _Unit([], [])
    unit.rows.append(row)
    unit.changes.append(change)
    units[id(subject)] = unit
    return row


def _leader(site: Site, known: dict, units: dict[int, _Unit], rule: rules.Rule | None) -> _Unit | None:
    """The unit of torchaudio's chain that this module is a step of."""
    for key, around in reversed(site.around.items()):
        other = known.get(type(around.subject))
        if rule is not None and rule.op == "mel" and other is not None and other.op == "mel" and key in units:
            return units[key]
    return None


def _note(site: Site, rule: rules.Rule) -> str:
    for around in site.around.values():
        if isinstance(around.subject, nn.TransformerEncoderLayer):
            return "in training; in evaluation torch.nn.TransformerEncoderLayer reads the weights itself"
    return rule.note


def _plan_transformer(site: Site, configs: dict[int, Site], units: dict[int, _Unit], wanted: Callable) -> Row | None:
    """One row for each configuration; it stands at the first model that has it."""
    model = site.subject
    config = model.config
    if id(config) in configs:
        return None
    configs[id(config)] = site
    row = _row(site, f"{_name(type(model))} ({config._attn_implementation})")
    why = wanted(site)
    if why is None:
        try:
            change = transformers.change(model)
        except rules.Unfit as error:
            why = str(error)
    if why is not None:
        row.why = why
        return row
    row.new, row.action = f"{_name(type(model))} ({transformers.IMPLEMENTATION})", PLANNED
    row.backend, row.why = _backend.choose("fusion", _device(model, site))
    units[id(model)] = _Unit([row], [change])
    return row


def _scripted(site: Site, known: dict) -> Row | None:
    name = getattr(site.subject, "original_name", None)
    if name not in {cls.__name__ for cls in known}:
        return None
    row = _row(site, f"{name} (scripted)")
    row.why = "its code is compiled by torch.jit; swap first, then script"
    return row


def _row(site: Site, old: str) -> Row:
    return Row(site.paths[0], old, None, LEFT, None, "", tuple(site.paths[1:]))


def _name(cls: type) -> str:
    """A class as users import it."""
    home = cls.__module__
    home = home.split("._")[0]
    home = "torch.nn" if home.startswith("torch.nn.modules") else home
    home = "mmfast.nn" if home.startswith("mmfast.fusion") else home
    return f"{home}.{cls.__qualname__}"


def _device(subject: Any, site: Site) -> torch.device:
    """Of its parameters or buffers, or of those of the modules around it; else the CPU."""
    for one in (subject, *(around.subject for around in reversed(site.around.values()))):
        if isinstance(one, nn.Module):
            for tensor in (*one.parameters(), *one.buffers()):
                return tensor.device
    return torch.device("cpu")


def _checked(units: list[_Unit], check: Check, report: Report) -> list[_Unit]:
    """Applies the units that agree, by halves where all together do not; the others' rows say how they differ."""
    kept: list[_Unit] = []

    def settle(some: list[_Unit]) -> None:
        changes = [change for unit in some for change in unit.changes]
        complaint = None
        apply_all(changes)
        try:
            try:
                found = check.differences()
                if not all(d.agrees for d in found):
                    complaint = _complaint(found[0])
            except Exception as error:
                complaint = f"{type(error).__name__}: {error}".splitlines()[0]
            fine = check.agreed(complaint is None)
        except BaseException:
            undo_all(changes)
            raise
        if fine:
            kept.extend(some)
            report.differences = found
            return
        undo_all(changes)
        complaint = complaint or "it disagrees in another process of this sharded model"
        if len(some) == 1:
            for row in some[0].rows:
                row.action, row.why = UNDONE, complaint
            return
        middle = len(some) // 2
        settle(some[:middle])
        settle(some[middle:])

    try:
        if units:
            settle(units)
    except BaseException:
        undo_all([change for unit in kept for change in unit.changes])
        raise
    report.notes = check.notes
    return kept


def _complaint(d: Difference) -> str:
    return f"{d.name} differs by {d.relative:.1e}, allowed {d.tolerance:.1e}"


def _undo(units: list[_Unit]) -> None:
    for unit in units:
        for change, row in zip(unit.changes, unit.rows, strict=True):
            if not change.stands():
                raise RuntimeError(
                    f"{row.path or 'the model'} was changed since the swap and cannot be undone; nothing was undone"
                )
    undo_all([change for unit in units for change in unit.changes])
