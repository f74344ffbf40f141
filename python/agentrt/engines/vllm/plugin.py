"""The ``vllm.general_plugins`` entry point: makes agentrt's classes known to vLLM by name, and changes nothing."""

from __future__ import annotations

CONNECTOR = "AgentRTConnector"
MODULE = "agentrt.engines.vllm.connector"
CACHE_POLICY = "agentrt"


def register() -> None:
    """Registers connector and policy of the CPU tier; vLLM calls this in each of its processes, possibly twice."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(CONNECTOR, MODULE, CONNECTOR)
    except ValueError:
        # Already registered.
        return
    try:
        from vllm.v1.kv_offload.cpu.policies.factory import CachePolicyFactory

        CachePolicyFactory.register_cache_policy(CACHE_POLICY, "agentrt.engines.vllm.offload", "AgentRTCachePolicy")
    except (ImportError, ValueError):
        # vLLM before 0.30, or a policy of this name is there.
        return
