"""The ``vllm.general_plugins`` entry point: makes ``AgentRTConnector`` known to vLLM by name, and changes nothing."""

from __future__ import annotations

CONNECTOR = "AgentRTConnector"
MODULE = "agentrt.engines.vllm.connector"


def register() -> None:
    """Registers the connector; vLLM calls this in each of its processes, possibly twice."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(CONNECTOR, MODULE, CONNECTOR)
    except ValueError:
        # Already registered.
        return
