"""``agentrt policies`` and ``agentrt policy``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import rich_click as click
from rich.console import Console
from rich.table import Table

from agentrt import replay as engine
from agentrt.errors import AgentRTError

__all__ = ["policies", "policy"]


@click.command()
def policies() -> None:
    """List the cache policies of the replay.

    \b
    Example:
      agentrt policies
    """
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, about in engine.policies().items():
        table.add_row(name, about)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@click.group()
def policy() -> None:
    """Work with safety policy files."""


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Check a safety policy file and say what is wrong with it, line by line.

    \b
    Example:
      agentrt policy check safety.toml
    """
    safety = importlib.import_module("agentrt.safety")
    report = safety.check_file(file)
    for line in report.lines():
        click.echo(line)
    if not report.ok:
        raise AgentRTError(f"the policy cannot be used, correct the lines above: {file}")
    warnings = len(report.findings)
    click.echo(f"usable, {warnings or 'no'} warning{'' if warnings == 1 else 's'}: {file}")
