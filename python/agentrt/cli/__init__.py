"""The ``agentrt`` command.

One module per command; each is loaded when it is asked for. Every command follows the same contract: results on
standard output, progress and errors on standard error, one line per error that ends with the remedy, exit status 0
(done), 1 (an input cannot be used), 2 (the command line cannot be used), 130 (interrupted). Output files are
complete or absent.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import rich_click as click

from agentrt.errors import AgentRTError

__all__ = ["main", "run"]

click.rich_click.TEXT_MARKUP = "rich"
click.rich_click.MAX_WIDTH = 110
click.rich_click.STYLE_HELPTEXT_FIRST_LINE = "bold"
click.rich_click.STYLE_HELPTEXT = ""

_COMMANDS = {
    "replay": ("agentrt.cli.replay", "Replay workloads under cache policies: hit rate, time to first token, optimum."),
    "explain": ("agentrt.cli.explain", "Show what agentrt learns of a workload, what it regrets, and if it is right."),
    "profile": ("agentrt.cli.traces", "Tell what a workload looks like and whether agentrt is worth it for it."),
    "generate": ("agentrt.cli.traces", "Write one of the built-in multi-agent workloads to a file."),
    "convert": ("agentrt.cli.traces", "Read a trace in any supported format, write it in the agentrt format."),
    "simulate": ("agentrt.cli.simulate", "Run a scheduling policy and its baselines in a simulated serving engine."),
    "policies": ("agentrt.cli.policies", "List the cache policies of the replay."),
    "policy": ("agentrt.cli.policies", "Work with safety policy files."),
    "serve": ("agentrt.cli.engines", "Start vLLM's server with agentrt inside."),
    "record": ("agentrt.cli.engines", "Start vLLM's server unchanged and write its traffic as a trace."),
    "doctor": ("agentrt.cli.engines", "Say which engine is found and what agentrt would do in it."),
}


class _Commands(click.RichGroup):
    """Knows the commands by name and loads one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(_COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)  # noqa: S101
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="agentrt", message="%(prog)s %(version)s")
def main() -> None:
    """agentrt: a runtime layer between agent frameworks and LLM serving engines.

    \b
    Is it worth it for your workload? Start with one of
      agentrt replay                      the five built-in multi-agent workloads
      agentrt profile my-trace.jsonl.gz   what your workload looks like, and what an optimal cache would reach
      agentrt replay my-trace.jsonl.gz    every policy on your workload
    """


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    try:
        status = main.main(list(arguments), prog_name="agentrt", standalone_mode=False)
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError):
            path = error.ctx.command_path if error.ctx else "agentrt"
            hint = f"; see `{path} --help`"
        click.echo(f"error: {error.format_message().rstrip('.')}{hint}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except AgentRTError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except BrokenPipeError:
        return 0
    return status if isinstance(status, int) else 0
