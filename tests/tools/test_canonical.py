"""Canonical forms: equal iff the arguments are, and results come back exactly."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import math
import pathlib
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrt.tools.canonical import NotCanonicalError, canonical_text, decode, digest, encode
from agentrt.tools.resources import EVERYTHING, compile_resources, conflicts, resource
from agentrt.tools.spec import Scope, ToolSpec

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.text("ab\0:;{}[]()<>\ud800\udc00é\u0301", max_size=4)
    | st.binary(max_size=4)
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text("ab\0", max_size=2) | st.integers(0, 3), inner, max_size=3)
        | st.sets(st.integers(0, 5) | st.text("ab", max_size=1), max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Equality that tells types apart: what a tool could tell apart."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        keys = {canonical_text(k): k for k in a}, {canonical_text(k): k for k in b}
        return keys[0].keys() == keys[1].keys() and all(same(a[keys[0][k]], b[keys[1][k]]) for k in keys[0])
    return bool(a == b)


def shuffled(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict):
        items = [(k, shuffled(v, rng)) for k, v in value.items()]
        rng.shuffle(items)
        return dict(items)
    if isinstance(value, (list, tuple)):
        return type(value)(shuffled(v, rng) for v in value)
    return value


@settings(derandomize=True, deadline=None)
@given(values, values)
def test_keys_are_equal_exactly_for_equal_values(a: Any, b: Any) -> None:
    assert (canonical_text(a) == canonical_text(b)) == same(a, b)


@settings(derandomize=True, deadline=None)
@given(values, st.integers())
def test_the_order_of_dict_keys_does_not_matter(value: Any, seed: int) -> None:
    assert digest(shuffled(value, random.Random(seed))) == digest(value)


@settings(derandomize=True, deadline=None)
@given(values)
def test_results_come_back_exactly_and_fresh(value: Any) -> None:
    data = encode(value)
    assert data is not None
    back = decode(data)
    assert same(back, value)
    if isinstance(value, (list, dict, set)):
        assert back is not value


def test_numbers_that_python_calls_equal_stay_apart() -> None:
    forms = [0, 0.0, -0.0, False, 1, 1.0, True, "1", b"1", None, math.nan, math.inf]
    assert len({canonical_text(v) for v in forms}) == len(forms)
    assert canonical_text(math.nan) == canonical_text(float("nan"))


def test_unicode_is_exact_unless_asked_otherwise() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert digest(composed) != digest(decomposed)
    assert digest({"x": [composed]}, "NFC") == digest({"x": [decomposed]}, "NFC")
    with pytest.raises(ValueError, match="NFKC"):
        digest("x", "NFKC")


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Point:
    x: int


def test_plain_objects_go_by_type_and_value() -> None:
    objects: list[Any] = [
        pathlib.PurePosixPath("/a"),
        "/a",
        dt.date(2020, 1, 1),
        dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc),
        decimal.Decimal("1.0"),
        decimal.Decimal("1.00"),
        Colour.RED,
        1,
        Point(1),
        Point(2),
    ]
    assert len({digest(o) for o in objects}) == len(objects)
    assert digest(Point(1)) == digest(Point(1))


def test_what_has_no_exact_form_is_not_cached() -> None:
    class Text(str):
        pass

    loop: list[Any] = []
    loop.append(loop)
    for value in (object(), Text("x"), [object()], lambda: 1, loop):
        with pytest.raises(NotCanonicalError):
            digest(value)
        assert encode(value) is None


def test_position_name_and_default_are_one_call() -> None:
    def tool(a: int, b: int = 2, *rest: int, c: int = 3, **more: int) -> None: ...

    spec = ToolSpec.of(tool, reads=(), writes=())

    def key(*args: Any, **kwargs: Any) -> bytes | None:
        return spec.bind(args, kwargs, Scope()).key

    assert key(1) == key(1, 2) == key(a=1, c=3) == key(1, b=2, c=3)
    assert key(1, x=1, y=2) == key(1, y=2, x=1)
    assert len({key(1), key(2), key(1, 3), key(1, 2, 3), key(1, x=3), key(1, c=4)}) == 6
    assert key(object()) is None


def test_the_key_tells_domains_tools_and_versions_apart() -> None:
    def tool(a: int) -> int:
        return a

    def other(a: int) -> int:
        return a + 1

    base = ToolSpec.of(tool, writes=())
    keys = {
        base.bind((1,), {}, Scope()).key,
        base.bind((1,), {}, Scope(domain="other")).key,
        ToolSpec.of(tool, name="t", writes=()).bind((1,), {}, Scope()).key,
        ToolSpec.of(tool, version="2", writes=()).bind((1,), {}, Scope()).key,
        ToolSpec.of(other, name="tool", writes=()).bind((1,), {}, Scope()).key,
    }
    assert len(keys) == 5
    assert base.bind((1,), {}, Scope(session="x", agent="y")).key == base.bind((1,), {}, Scope()).key


def test_functions_whose_code_does_not_say_what_they_do_are_told_apart() -> None:
    class Client:
        def __init__(self, name: str) -> None:
            self.name = name

        def get(self, x: int) -> str:
            return self.name

    def make(n: int) -> Any:
        return lambda x: n

    methods = [ToolSpec.of(Client(n).get, writes=()) for n in "ab"]
    closures = [ToolSpec.of(make(n), name="f", writes=()) for n in range(2)]
    for pair in (methods, closures):
        assert len({spec.bind((1,), {}, Scope()).key for spec in pair}) == 2


# Resources ------------------------------------------------------------------------------------------------------------

segments = st.lists(st.sampled_from("abc"), max_size=3).map(tuple)


@settings(derandomize=True, deadline=None)
@given(segments, segments)
def test_resources_conflict_iff_one_contains_the_other(a: tuple[str, ...], b: tuple[str, ...]) -> None:
    assert conflicts(a, b) == (a[: len(b)] == b or b[: len(a)] == a)
    assert conflicts(a, EVERYTHING)


def resolve(template: str, **arguments: Any) -> list[tuple[str, ...]]:
    return list(compile_resources([template], arguments, False)(arguments))


def test_an_argument_cannot_break_out_of_its_place() -> None:
    assert resolve("db/{table}/{key}", table="a/b", key="*") == [("db", "a/b", "*")]
    assert resolve("user-{name}", name="x/../y") == [("user-x/../y",)]


def test_paths_fill_one_segment_per_part() -> None:
    assert resolve("file/{p:path}", p="/srv/./data//x/../y") == [("file", "srv", "data", "y")]
    assert resolve("file/{p:path}", p="../..") == [("file",)]


def test_spellings_of_one_resource_are_one() -> None:
    for a, b in [
        ("Ünits", "ünits"),
        ("ｆｕｌｌ", "full"),
        (5, "5"),
        (5, 5.0),
        ("cafe\u0301", "café"),
        (True, 1),
        (" x ", "x"),
    ]:
        assert resolve("r/{k}", k=a) == resolve("r/{k}", k=b)


def test_lists_name_one_resource_each_and_nothing_names_everything_below() -> None:
    assert resolve("f/{p}", p=["a", "b"]) == [("f", "a"), ("f", "b")]
    assert resolve("f/{p}/x", p=None) == [("f",)]
    assert resolve("f/*/x") == [("f",)]
    assert resource("*") == EVERYTHING
    assert list(compile_resources(None, [], False)({})) == [EVERYTHING]


def test_templates_are_checked_when_the_tool_is_declared() -> None:
    def tool(a: int) -> None: ...

    with pytest.raises(ValueError, match="no such argument"):
        ToolSpec.of(tool, reads=["x/{b}"])
    with pytest.raises(ValueError, match="arguments only"):
        ToolSpec.of(tool, reads=["x/{a.__class__}"])
    with pytest.raises(TypeError, match="list of templates"):
        ToolSpec.of(tool, reads="x/{a}")


def test_resources_may_depend_on_all_arguments() -> None:
    def sql(query: str) -> list[int]:
        return []

    spec = ToolSpec.of(sql, reads=["db"], writes=lambda query: () if query.startswith("select") else ["db"])
    assert spec.bind(("select 1",), {}, Scope()).writes == ()
    assert spec.bind(("drop",), {}, Scope()).writes == (("db",),)
