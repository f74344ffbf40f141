"""Resources: the state that tools read and write, and when two of them touch.

A resource is a path of segments, ``("db", "orders", "17")``, and contains everything below it. Two resources
*conflict* iff one is a prefix of the other: a write to ``db`` conflicts with a read of ``db/orders/17``, a write
to ``db/orders/17`` with a read of ``db/orders`` (the list), but not with ``db/orders/18``. The empty resource is
all there is; it stands for "unknown".

Templates name them from arguments: ``"db/orders/{order_id}"``. An argument fills one segment whatever it
contains, so a value cannot break out of its place; ``{path:path}`` fills several, one per part of a normalised
POSIX path. A list fills one resource per element. ``*`` ends a template: everything from there on.

Segments are compared after NFKC and case folding, with integral numbers written alike. That may join two
resources that are distinct (then a write invalidates too much, which costs a re-execution) and never separates
two names of one resource by spelling alone. It does not know symbolic links or other aliases: give tools that
have them a function instead of templates.
"""

from __future__ import annotations

import itertools
import posixpath
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["EVERYTHING", "Resource", "ResourceSpec", "compile_resources", "conflicts", "resource"]

Resource = tuple[str, ...]
ResourceSpec = Iterable[str] | Callable[..., Iterable[str | Resource]] | None
Resolver = Callable[[Mapping[str, Any]], tuple[Resource, ...]]

EVERYTHING: Resource = ()


def _segment(value: Any) -> str:
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    if text.isascii():
        return text.strip().lower()
    return unicodedata.normalize("NFKC", text).casefold().strip()


def _path_segments(value: Any) -> Resource:
    normal = posixpath.normpath("/" + str(value).replace("\\", "/"))
    return tuple(_segment(part) for part in normal.split("/") if part)


def resource(text: str | Resource) -> Resource:
    """The resource that a literal path names; ``"*"`` is everything.

    >>> resource("db/Orders/17")
    ('db', 'orders', '17')
    """
    parts = text.split("/") if isinstance(text, str) else list(text)
    segments: list[str] = []
    for part in parts:
        if part == "*":
            break
        if part:
            segments.append(_segment(part))
    return tuple(segments)


def conflicts(a: Resource, b: Resource) -> bool:
    """Whether a change of `a` can be seen by a reader of `b`.

    >>> conflicts(("db",), ("db", "orders")), conflicts(("db", "a"), ("db", "b"))
    (True, False)
    """
    n = min(len(a), len(b))
    return a[:n] == b[:n]


class _Template:
    """One compiled template: per segment a literal, or pieces around arguments."""

    __slots__ = ("fields", "parts", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.parts: list[str | list[tuple[str, str | None, bool]]] = []
        self.fields: set[str] = set()
        for part in text.split("/"):
            if part == "*":
                break
            if not part:
                continue
            pieces = [(lit, name, spec == "path") for lit, name, spec, _ in string.Formatter().parse(part)]
            if all(name is None for _, name, _ in pieces):
                self.parts.append(_segment("".join(lit for lit, _, _ in pieces)))
                continue
            for _, name, is_path in pieces:
                if name is not None and not name.isidentifier():
                    raise ValueError(f"a resource template names arguments only, not: {name!r} in {text!r}")
                if is_path and len(pieces) != 1:
                    raise ValueError(f"a path argument fills whole segments in: {text!r}")
            self.fields.update(name for _, name, _ in pieces if name is not None)
            self.parts.append(pieces)

    def resolve(self, arguments: Mapping[str, Any]) -> Iterable[Resource]:
        many = [name for name in self.fields if isinstance(arguments.get(name), (list, tuple, set, frozenset))]
        if not many:
            yield self._one(arguments)
            return
        for values in itertools.product(*(arguments[name] for name in many)):
            yield self._one({**arguments, **dict(zip(many, values, strict=True))})

    def _one(self, arguments: Mapping[str, Any]) -> Resource:
        segments: list[str] = []
        for part in self.parts:
            if isinstance(part, str):
                segments.append(part)
                continue
            text = ""
            for literal, name, is_path in part:
                text += literal
                if name is None:
                    continue
                value = arguments.get(name)
                if value is None:
                    # An argument left out may stand for anything: everything from here on.
                    return tuple(segments)
                if is_path:
                    segments.extend(_path_segments(value))
                    break
                text += _segment(value)
            else:
                segments.append(_segment(text))
        return tuple(segments)


def compile_resources(spec: ResourceSpec, arguments: Iterable[str], accepts_any: bool) -> Resolver:
    """A function from bound arguments to resources; `None` means unknown, that is everything."""
    if spec is None:
        everything = (EVERYTHING,)
        return lambda _arguments: everything
    if callable(spec):
        chosen = spec
        return lambda bound: tuple(resource(r) for r in chosen(**bound))
    if isinstance(spec, str):
        raise TypeError(f"reads= and writes= take a list of templates; write [{spec!r}]")
    templates = [_Template(text) for text in spec]
    known = set(arguments)
    for template in templates:
        missing = template.fields - known
        if missing and not accepts_any:
            raise ValueError(f"no such argument in resource template {template.text!r}: {min(missing)}")
    if all(isinstance(part, str) for t in templates for part in t.parts):
        fixed = tuple(t._one({}) for t in templates)
        return lambda _arguments: fixed
    return lambda bound: tuple(r for t in templates for r in t.resolve(bound))
