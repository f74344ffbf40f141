"""A policy that the safety tests share, and a reference that matches as a simple implementation would."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentrt.safety import AuditLog, Guard
from agentrt.tools import Memo, MemoryStore, ToolRuntime

POLICY = """
version = 1
default = "allow"
trusted = ["internal"]

[tools.read_file]
privileged = false
[tools.fetch]
privileged = false
adds = ["web"]
[tools.run]
privileged = false
[tools.lookup]
privileged = false
[tools.send_mail]
privileged = true
[tools.delete_file]
privileged = true
aliases = ["rm"]
[tools.tidy]
privileged = false
[tools.write_note]
privileged = true
accepts = ["web"]
[tools.read_note]
privileged = false
[tools.extract_number]
privileged = false
[tools.pay]
privileged = true

[[rules]]
id = "no-etc"
effect = "deny"
tools = ["read_file"]
args."*.path".path = "/etc/**"

[[rules]]
id = "data-only"
effect = "allow"
tools = ["delete_file"]
args.path.path = "/srv/data/**"

[[rules]]
id = "no-shell"
effect = "deny"
tools = ["run"]
args.command.regex = 'rm\\s+-rf'

[[rules]]
id = "no-lookup-of-secrets"
effect = "deny"
tools = ["lookup"]
args.key.one_of = ["secret", "password"]

[[rules]]
id = "mail"
effect = "allow"
tools = ["send_mail"]
args.to.glob = "*@corp.example"

[[rules]]
id = "notes"
effect = "allow"
tools = ["write_note"]

[[rules]]
id = "pay-small"
effect = "ask"
tools = ["pay"]
args.amount.max = 100

[[sanitisers]]
tool = "extract_number"
removes = ["web"]
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def guard(policy: Path, tmp_path: Path) -> Iterator[Guard]:
    log = AuditLog(tmp_path / "audit.jsonl")
    yield Guard(policy, audit=log)
    log.close()


@pytest.fixture
def runtime(guard: Guard) -> ToolRuntime:
    return ToolRuntime(guard=guard, memo=Memo(MemoryStore(), verify_rate=0.0))


def naive_decide(tool: str, arguments: dict[str, Any]) -> str:
    """The same policy as a straightforward implementation would apply it: names and strings as they stand."""
    path = str(arguments.get("path", ""))
    if tool == "read_file":
        return "deny" if fnmatch.fnmatchcase(path, "/etc/*") else "allow"
    if tool in ("delete_file", "rm"):
        return "allow" if fnmatch.fnmatchcase(path, "/srv/data/*") else "deny"
    if tool == "run":
        return "deny" if "rm -rf" in str(arguments.get("command", "")) else "allow"
    if tool == "lookup":
        return "deny" if arguments.get("key") in ("secret", "password") else "allow"
    return "allow"


Naive = Callable[[str, dict[str, Any]], str]


@pytest.fixture
def naive() -> Naive:
    return naive_decide
