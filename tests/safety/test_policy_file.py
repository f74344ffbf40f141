"""Policy files: what is reported, where, and that the JSON Schema says the same as the parser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.safety.conftest import POLICY
from tests.support import Run

import agentrt.safety
from agentrt._core import check_policy
from agentrt.errors import FileAccessError
from agentrt.safety import Guard, check_file
from agentrt.tools import Scope

HEAD = "version = 1\n[tools.a]\nprivileged = false\n[tools.b]\n"


def rule(name: str, effect: str = "allow", tools: str = '["a"]', more: str = "") -> str:
    return f'[[rules]]\nid = "{name}"\neffect = "{effect}"\ntools = {tools}\n{more}\n'


def found(text: str) -> list[tuple[int, str]]:
    return [(line, code) for line, _, _, code, _ in check_policy(text)]


def test_the_shared_policy_has_nothing_to_report() -> None:
    assert check_policy(POLICY) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (1, "missing-key")),
        ("version = 2", (1, "version")),
        ("version = 1\nrules = 3", (2, "type")),
        ("version = 1\nrulez = []", (2, "unknown-key")),
        ("version = 1\ntools = [\n", (3, "toml")),
        (HEAD + rule("x", "perhaps"), (7, "type")),
        (HEAD + rule("x", tools="[]"), (8, "empty")),
        (HEAD + rule("x", tools='["c"]'), (6, "unknown-tool")),
        (HEAD + rule("x") + rule("x"), (11, "duplicate-id")),
        (HEAD + rule("x", more="args.p.regex = '(?=a)'"), (9, "regex")),
        (HEAD + rule("x", more="args.p.regex = '(a)\\1'"), (9, "regex")),
        (HEAD + rule("x", more="args.p = {min = 3, max = 2}"), (9, "unreachable")),
        (HEAD + rule("x", more="args.p = {}"), (9, "empty")),
        (HEAD + rule("x", "deny", more="strict_args = true"), (6, "strict-args")),
        (HEAD + '[tools."ａ"]\n', (5, "duplicate-tool")),
        (HEAD + '[tools."а"]\n', (5, "duplicate-tool")),
        (HEAD + '[[sanitisers]]\ntool = "zzz"\nremoves = ["x"]\n', (5, "unknown-tool")),
    ],
)
def test_errors_name_their_line(text: str, expected: tuple[int, str]) -> None:
    assert expected in found(text), found(text)


@pytest.mark.parametrize(
    ("first", "second", "shadowed"),
    [
        (rule("1"), rule("2"), True),
        (rule("1"), rule("2", "deny", more='agents = ["x"]'), True),
        (rule("1", more='agents = ["x*"]'), rule("2", "deny", more='agents = ["xy"]'), True),
        (rule("1", more='agents = ["xy"]'), rule("2", "deny", more='agents = ["x*"]'), False),
        (rule("1", tools='["*"]'), rule("2", "deny", tools='["a", "b"]'), True),
        (rule("1", tools='["a"]'), rule("2", "deny", tools='["*"]'), False),
        (rule("1", "deny", more='labels.any = ["web"]'), rule("2", more='labels.any = ["web:news"]'), True),
        (rule("1", "deny", more='labels.any = ["web:news"]'), rule("2", more='labels.any = ["web"]'), False),
        (rule("1", "deny", more="args.p.glob = 'x'"), rule("2", more="args.p.glob = 'x'"), True),
        # A permission reads strictly: the prohibition behind it still catches disguised values.
        (rule("1", more="args.p.glob = 'x'"), rule("2", "deny", more="args.p.glob = 'x'"), False),
        (rule("1", more="strict_args = true\nargs.p.glob = '*'"), rule("2", more="args.p.glob = '*'"), False),
    ],
)
def test_rules_that_never_decide_are_reported(first: str, second: str, shadowed: bool) -> None:
    assert ((11 + first.count("\n") - 5, "shadowed") in found(HEAD + first + second)) == shadowed


def test_earlier_rules_that_cover_a_rule_together_are_found() -> None:
    text = HEAD + rule("1", tools='["a"]') + rule("2", tools='["b"]') + rule("3", "deny", tools='["*"]')
    messages = [m for _, _, _, code, m in check_policy(text) if code == "shadowed"]
    assert len(messages) == 1
    assert "1 (line 6), 2 (line 11)" in messages[0]


def test_a_permission_that_taint_makes_void_is_reported() -> None:
    assert (6, "unreachable") in found(HEAD + rule("1", tools='["b"]', more='labels.any = ["web"]'))


def test_the_check_command_tells_errors_from_warnings(tmp_path: Path, agentrt_cli: Run) -> None:
    path = tmp_path / "p.toml"
    for text, code, said in [
        (HEAD + rule("1"), 0, f"usable, no warnings: {path}"),
        (HEAD + rule("1") + rule("2"), 0, f"{path}:11:1: warning: "),
        ("version = 3", 1, f"{path}:1:11: error: "),
    ]:
        path.write_text(text)
        done = agentrt_cli("policy", "check", path)
        assert done.returncode == code, done.stderr
        assert said in done.stdout
        assert check_file(path).ok == (code == 0)
    with pytest.raises(FileAccessError, match=r"none\.toml"):
        check_file(tmp_path / "none.toml")


def test_a_broken_file_leaves_the_old_policy_in_force(policy: Path) -> None:
    guard = Guard(policy)
    policy.write_text("version = 1\n[[rules]]\n")
    with pytest.raises(ValueError, match="line 2"):
        guard.reload()
    assert guard.decide("read_file", {"path": "/etc/x"}, Scope()).rule == "no-etc"


def test_the_first_rule_decides_by_agent_session_and_label(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        HEAD
        + rule("agent", "deny", more='agents = ["intern*"]')
        + rule("session", "ask", more='sessions = ["demo-*"]')
        + rule("label", "deny", more='labels.any = ["web"]')
        + rule("untainted", more='labels.none = ["mail"]\nargs.n = {min = 1, max = 10}')
        + rule("exact", more="strict_args = true\nargs.q = {present = true, max_length = 3}")
    )
    guard = Guard(path)

    def decide(scope: Scope, labels: tuple[str, ...] = (), **arguments: object) -> str | None:
        guard.taint.start(scope, labels)
        return guard.decide("a", dict(arguments), scope).rule

    assert decide(Scope("s", "Intern-7"), n=5) == "agent"
    assert decide(Scope("demo-1"), n=5) == "session"
    assert decide(Scope("s"), ("web:news",), n=5) == "label"
    assert decide(Scope("s"), n=5) == "untainted"
    assert decide(Scope("s"), n="5") == "untainted"
    assert decide(Scope("s"), n=11) is None
    assert decide(Scope("s"), n="many") is None
    assert decide(Scope("s"), ("mail",), n=5) is None
    assert decide(Scope("s"), q="abc") == "exact"
    assert decide(Scope("s"), q="abcd") is None
    assert decide(Scope("s"), q="abc", force=True) is None


def test_the_schema_accepts_and_refuses_what_the_parser_does() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema compares schema and parser")
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in the standard library from Python 3.11")
    schema = json.loads((Path(agentrt.safety.__file__).parent / "policy.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    good = [POLICY, HEAD, HEAD + rule("x", more="args.p = {equals = 3}"), 'version = 1\ndefault = "ask"\n']
    bad = [
        "",
        "version = 2",
        "version = 1\nrules = 3",
        "version = 1\nrulez = 1",
        "version = 1\ndefault = 'maybe'",
        "version = 1\n[tools.a]\nprivileged = 3",
        "version = 1\n[tools.a]\nother = 3",
        HEAD + rule("x", "perhaps"),
        HEAD + rule("x", tools="[]"),
        HEAD + "[[rules]]\nid = 'x'\n",
        HEAD + rule("x", more="args.p = {}"),
        HEAD + rule("x", more="args.p = {like = 'x'}"),
        HEAD + rule("x", more="labels = {all = ['x']}"),
        HEAD + "[[sanitisers]]\ntool = 'a'\n",
    ]
    for text in good:
        validator.validate(tomllib.loads(text))
        assert not [f for f in check_policy(text) if f[2] == "error"], text
    for text in bad:
        assert list(validator.iter_errors(tomllib.loads(text))), text
        assert [f for f in check_policy(text) if f[2] == "error"], text
