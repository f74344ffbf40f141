"""Canonical forms: what makes two tool calls the same call, and what of a result can be kept.

Two directions, both exact. :func:`digest` turns arguments into a key that is equal **iff** the arguments are
equal in value *and* type, with three things that do not matter taken out: the order of dict keys, the order in
which set elements come, and whether an argument was passed by position, by name or left at its default (binding
does that, see :mod:`agentrt.tools.spec`). Nothing is merged that a tool could tell apart:

=================  =======================================================================================
``1``, ``1.0``     different (``range(1.0)`` fails); ``True`` differs from ``1``; ``0.0`` differs from ``-0.0``
``nan``            equal to itself (a tool sees the same argument)
unicode            code points as they are, lone surrogates included; ``unicode="NFC"`` merges canonical equivalents
list and tuple     different
dict order         ignored, at every depth; a tool that depends on it must not be cached
other objects      paths, dates, decimals, UUIDs, enums and frozen dataclasses by type and value;
                   anything else raises :class:`NotCanonicalError`, and the call is executed without being cached
=================  =======================================================================================

:func:`encode` and :func:`decode` keep results as bytes: JSON with tags for what JSON lacks. No pickle: a file that
several processes share must not be able to run code. What cannot be encoded exactly is not cached. Decoding makes
a fresh object each time, so callers cannot change each other's results.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import decimal
import enum
import hashlib
import json
import pathlib
import unicodedata
import uuid
from collections.abc import Callable
from typing import Any

from agentrt.errors import AgentRTError

__all__ = ["NotCanonicalError", "canonical_text", "decode", "digest", "encode"]

_MAX_DEPTH = 64


class NotCanonicalError(AgentRTError, TypeError):
    """A value has no exact canonical form, so the call that carries it is not cached."""


def _tagged(tag: str, text: str) -> str:
    return f"{tag}{len(text)}:{text}"


def _canonical(value: Any, fold: Callable[[str], str] | None, depth: int) -> str:
    kind = type(value)
    if kind is str:
        text = value if fold is None else fold(value)
        return f"s{len(text)}:{text}"
    if kind is int:
        return f"i{value};"
    if value is None:
        return "n"
    if kind is bool:
        return "T" if value else "F"
    if kind is float:
        return f"d{value!r};"
    if depth >= _MAX_DEPTH:
        raise NotCanonicalError(f"nested deeper than: {_MAX_DEPTH}")
    depth += 1
    if kind is dict:
        items = sorted((_canonical(k, fold, depth), _canonical(v, fold, depth)) for k, v in value.items())
        return "{" + "".join(k + v for k, v in items) + "}"
    if kind is list:
        return "[" + "".join([_canonical(v, fold, depth) for v in value]) + "]"
    if kind is tuple:
        return "(" + "".join([_canonical(v, fold, depth) for v in value]) + ")"
    if kind is bytes:
        return _tagged("b", value.hex())
    if kind is set or kind is frozenset:
        return ("<" if kind is set else "<f") + "".join(sorted(_canonical(v, fold, depth) for v in value)) + ">"
    return _canonical_object(value, kind, fold, depth)


def _canonical_object(value: Any, kind: type, fold: Callable[[str], str] | None, depth: int) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, enum.Enum):
        return _tagged("e", name) + _canonical(value.name, None, depth)
    if isinstance(value, pathlib.PurePath):
        return _tagged("p", name) + _canonical(str(value), fold, depth)
    if kind in (dt.datetime, dt.date, dt.time, dt.timedelta, decimal.Decimal, uuid.UUID):
        return _tagged("o", name) + _canonical(repr(value), None, depth)
    if dataclasses.is_dataclass(value) and kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        fields = "".join(_canonical(getattr(value, f.name), fold, depth) for f in dataclasses.fields(value))
        return _tagged("c", name) + "(" + fields + ")"
    raise NotCanonicalError(f"no exact form for arguments of type: {name}")


def canonical_text(value: Any, unicode: str = "exact") -> str:
    """The canonical form of `value`; equal texts mean equal values.

    >>> canonical_text({"b": 1, "a": [True, None]}) == canonical_text({"a": [True, None], "b": 1})
    True
    >>> canonical_text(1) == canonical_text(1.0)
    False
    """
    if unicode == "exact":
        return _canonical(value, None, 0)
    if unicode == "NFC":
        return _canonical(value, lambda text: unicodedata.normalize("NFC", text), 0)
    raise ValueError(f"unicode must be 'exact' or 'NFC', not: {unicode!r}")


def digest(value: Any, unicode: str = "exact") -> bytes:
    """24 bytes that name `value`; the text itself is not kept anywhere."""
    text = canonical_text(value, unicode)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=24).digest()


def _is_json(value: Any, depth: int = 0) -> bool:
    kind = type(value)
    if kind is str or kind is int or kind is float or kind is bool or value is None:
        return True
    if depth >= _MAX_DEPTH:
        return False
    if kind is list:
        return all(_is_json(v, depth + 1) for v in value)
    if kind is dict:
        return all(type(k) is str and k != "\0" and _is_json(v, depth + 1) for k, v in value.items())
    return False


def _to_json(value: Any, depth: int = 0) -> Any:
    kind = type(value)
    if kind is str or kind is int or kind is float or kind is bool or value is None:
        return value
    if depth >= _MAX_DEPTH:
        raise NotCanonicalError(f"nested deeper than: {_MAX_DEPTH}")
    if kind is list:
        return [_to_json(v, depth + 1) for v in value]
    if kind is dict:
        if all(type(k) is str and k != "\0" for k in value):
            return {k: _to_json(v, depth + 1) for k, v in value.items()}
        pairs = [[_to_json(k, depth + 1), _to_json(v, depth + 1)] for k, v in value.items()]
        return {"\0": ["dict", pairs]}
    if kind is bytes:
        return {"\0": ["bytes", base64.b64encode(value).decode()]}
    if kind is tuple or kind is set or kind is frozenset:
        return {"\0": [kind.__name__, [_to_json(v, depth + 1) for v in value]]}
    raise NotCanonicalError(f"no exact form for results of type: {kind.__module__}.{kind.__qualname__}")


_REBUILD: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "bytes": base64.b64decode,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}


def _object_hook(value: dict[str, Any]) -> Any:
    tagged = value.get("\0")
    if tagged is not None and len(value) == 1:
        return _REBUILD[tagged[0]](tagged[1])
    return value


def _dumps(value: Any) -> bytes:
    # Unescaped, because two escaped lone surrogates would be read back as one character.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def encode(value: Any) -> bytes | None:
    """`value` as bytes, or None where it has no exact form.

    Cost: about 1 us for a string, about 4 us for a small dict.
    """
    if type(value) is str:
        return b"s" + value.encode("utf-8", "surrogatepass")
    try:
        if _is_json(value):
            return b"j" + _dumps(value)
        return b"t" + _dumps(_to_json(value))
    except (NotCanonicalError, ValueError, RecursionError):
        return None


def decode(data: bytes) -> Any:
    """The value that :func:`encode` took; a fresh object at each call."""
    kind = data[:1]
    if kind == b"s":
        return data[1:].decode("utf-8", "surrogatepass")
    if kind == b"j":
        return json.loads(data[1:].decode("utf-8", "surrogatepass"))
    if kind == b"t":
        return json.loads(data[1:].decode("utf-8", "surrogatepass"), object_hook=_object_hook)
    raise ValueError(f"unknown encoding: {kind!r}")
