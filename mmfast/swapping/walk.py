"""Finds modules and metrics in a model, under all their paths, and those that ``only`` and ``skip`` mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# The child that these wrappers put between a path and what the user wrote.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


@dataclass
class Site:
    """An object and where it stands.

    Args:
        subject: module or metric.
        paths: all of them, with the names of wrappers.
        plain: the same without.
        around: the sites of the modules around it, on any path.
    """

    subject: Any
    paths: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    around: dict[int, Site] = field(default_factory=dict)


def sites(model: Any, metrics: tuple[type, ...] = ()) -> dict[int, Site]:
    """Every module of ``model``, by its id, and the ``metrics`` that are attributes of modules; the model first."""
    found: dict[int, Site] = {}

    def visit(subject: Any, path: str, plain: str, around: dict[int, Site]) -> None:
        if id(subject) in around:  # a cycle
            return
        site = found.setdefault(id(subject), Site(subject))
        site.paths.append(path)
        site.plain.append(plain)
        site.around.update(around)
        if not isinstance(subject, nn.Module):
            return
        inside = {**around, id(subject): site}
        wrapped = _WRAPPERS.get(type(subject).__name__)
        for name, child in subject._modules.items():
            if child is not None:
                visit(child, _join(path, name), plain if name == wrapped else _join(plain, name), inside)
        for name, value in vars(subject).items():
            if metrics and isinstance(value, metrics) and not isinstance(value, nn.Module):
                visit(value, _join(path, name), _join(plain, name), inside)

    visit(model, "", "", {})
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def selection(name: str, wanted: Any, found: dict[int, Site]) -> Callable[[Site], bool]:
    """Whether a site, or one around it, is meant by ``wanted``: glob, class, predicate, or a list of these.

    Raises:
        TypeError: something else.
        ValueError: a glob that matches no path.
    """
    tests = [_test(name, one, found) for one in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]
    meant = {key for key, site in found.items() if any(test(site) for test in tests)}
    return lambda site: id(site.subject) in meant or not meant.isdisjoint(site.around)


def _test(name: str, wanted: Any, found: dict[int, Site]) -> Callable[[Site], bool]:
    if isinstance(wanted, str):
        test = lambda site: any(fnmatchcase(path, wanted) for path in (*site.paths, *site.plain))  # noqa: E731
        if not any(test(site) for site in found.values()):
            raise ValueError(f"{name}: no module has a path like {wanted!r}")
        return test
    if inspect.isclass(wanted):
        return lambda site: isinstance(site.subject, wanted)
    if callable(wanted):
        return lambda site: any(wanted(path, site.subject) for path in site.plain)
    raise TypeError(
        f"{name} must be a glob of paths, a class, a function of (path, module), or a list of these, "
        f"got {type(wanted).__name__}"
    )
