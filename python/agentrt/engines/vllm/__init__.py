"""agentrt inside vLLM: a KV connector that tells vLLM's own free queue which blocks should go first.

| module | what it owns |
|---|---|
| ``plugin`` | the entry point by which vLLM finds the connector; every vLLM process imports it, so it imports nothing |
| ``connector`` | the class vLLM instantiates: forwards each hook through a guard, carries no data |
| ``adapter`` | what vLLM reports becomes events; when vLLM is about to allocate, victims are put in place |
| ``agentrt._core.FreeQueue`` | the only code that touches vLLM's free queue |
| ``gate``, ``scheduling`` | order and holds of waiting calls; the core's policies behind them |
| ``offload``, ``callers`` | the policy of vLLM's CPU tier, and whose requests use it |
| ``identity`` | which session and agent a request belongs to, given or inferred |
| ``core`` | the policy behind the adapter: agentrt's runtime, or the queue's own order (``lru``) |
| ``guard`` | faults: counted, logged once a kind, and enough of them pause the adapter |
| ``record`` | live traffic as an agentrt trace |

Nothing here imports vLLM but ``plugin.register``, ``connector`` and ``offload``.
One thread, vLLM's scheduler, calls everything.

Words: a *key* is the low 64 bits of a block hash (the integer that vLLM publishes in its KV events); *pending* blocks
have been named as victims, stand at the head of the free queue and have not been allocated yet.
"""
