"""One vLLM engine under one policy, in a process of its own; jobs on standard input, answers on standard output.

The engine runs inside this process on the CPU with a small model of random weights that is written here. Calls arrive
in an order that depends on completed calls only, never on the clock: a session sends its next call when a drawn number
of other calls have ended. Hits are therefore comparable between policies, times are what this machine gives.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BLOCK_TOKENS = 32
MODELS = {
    # hidden, layers, heads, ffn
    "tiny": (128, 2, 2, 256),
    "small": (256, 4, 4, 1024),
    "medium": (512, 8, 8, 2048),
}


def write_model(folder: Path, size: str) -> None:
    """A Qwen2 configuration; vLLM makes up the weights."""
    hidden, layers, heads, ffn = MODELS[size]
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32_000,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        "use_sliding_window": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def make_engine(options: dict[str, Any]) -> Any:
    """An ``LLM`` with or without the connector."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    from vllm import LLM

    model = Path(options["model_folder"])
    write_model(model, options["model"])
    transfer = None
    if options["policy"] != "stock":
        transfer = {
            "kv_connector": "AgentRTConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"policy": options["core"], **options.get("extra", {})},
        }
    return LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        seed=0,
        block_size=BLOCK_TOKENS,
        max_model_len=options["longest"] + 64,
        enforce_eager=True,
        enable_prefix_caching=True,
        num_gpu_blocks_override=options["pool_blocks"] + 1,
        max_num_seqs=options["batch"],
        max_num_batched_tokens=2048,
        disable_log_stats=False,
        kv_transfer_config=transfer,
    )


def fresh(llm: Any, blocks: int) -> Any:
    """Empties the cache, forgets what was learned; returns the connector, if there is one."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.reset_prefix_cache()
    connector = scheduler.connector
    del blocks
    if connector is not None:
        connector.bind_gpu_block_pool(scheduler.kv_cache_manager.block_pool)
        connector.guard.faults.clear()
        connector.guard.spent_s = 0.0
    return connector


def run(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """One workload, once."""
    from benches.e2e.workloads import sessions, tokens
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    connector = fresh(llm, job["pool_blocks"])
    engine = llm.llm_engine
    todo = [s[: job["calls_per_session"]] for s in sessions(job["workload"], Path(job["traces"]))]
    todo = todo[: job["sessions"]]
    rng = random.Random(job["seed"])
    waits = {id(s): [rng.randrange(job["concurrency"]) for _ in s] for s in todo}
    upcoming = iter(todo)
    # (completed calls at which it is sent, order, session, step)
    ready: list[tuple[int, int, list[Any], int]] = []
    sent = done = 0

    def enqueue(session: list[Any] | None, step: int) -> None:
        if session is None or step == len(session):
            session, step = next(upcoming, None), 0
        if session is not None:
            wait = waits[id(session)][step] if done or step else 0
            ready.append((done + wait, len(ready) + 1_000_000 * done, session, step))

    for _ in range(job["concurrency"]):
        enqueue(None, 0)
    live: dict[str, Any] = {}
    ttft: list[float] = []
    latency: list[float] = []
    outputs = hashlib.sha256()
    hit = prompt = 0
    texts: dict[str, tuple[int, ...]] = {}
    start = time.perf_counter()
    while ready or live:
        ready.sort(key=lambda r: r[:2])
        while ready and (ready[0][0] <= done or not live):
            _, _, session, step = ready.pop(0)
            call = session[step]
            ids = tokens(call, job["tokens_per_block"], job["longest"])
            request_id = f"{call.session}/{step}"
            extra = {"session_id": call.session, "agent_id": call.agent} if job["named"] else None
            params = SamplingParams(
                max_tokens=job["max_tokens"], temperature=0.0, ignore_eos=True, detokenize=False, extra_args=extra,
                output_kind=RequestOutputKind.CUMULATIVE,
            )  # fmt: skip
            engine.add_request(request_id, {"prompt_token_ids": ids}, params)
            live[request_id] = [time.perf_counter(), None, session, step]
            sent += 1
        for output in engine.step():
            request_id = output.request_id
            now = time.perf_counter()
            entry = live[request_id]
            if entry[1] is None and output.outputs[0].token_ids:
                entry[1] = now
                ttft.append(now - entry[0])
            if output.finished:
                hit += output.num_cached_tokens or 0
                prompt += len(output.prompt_token_ids)
                texts[request_id] = tuple(output.outputs[0].token_ids)
                latency.append(now - entry[0])
                done += 1
                del live[request_id]
                enqueue(entry[2], entry[3] + 1)
    took = time.perf_counter() - start
    for request_id in sorted(texts):
        outputs.update(f"{request_id}{texts[request_id]}".encode())
    ttft.sort()
    latency.sort()

    def spread(values: list[float]) -> dict[str, float]:
        p50, p99 = (values[min(int(len(values) * q), len(values) - 1)] for q in (0.5, 0.99))
        return {
            "mean": round(sum(values) / len(values) * 1e3, 2),
            "p50": round(p50 * 1e3, 2),
            "p99": round(p99 * 1e3, 2),
        }

    result = {
        "calls": done,
        "prompt_tokens": prompt,
        "hit_tokens": hit,
        "hit_rate": round(hit / max(prompt, 1), 5),
        "ttft_ms": spread(ttft),
        "latency_ms": spread(latency),
        "calls_per_s": round(done / took, 3),
        "makespan_s": round(took, 3),
        "overhead_us_per_step": 0.0,
        "outputs": outputs.hexdigest()[:16],
    }
    if connector is not None:
        adapter = connector.adapter
        result["faults"] = dict(connector.guard.faults)
        if adapter is not None:
            result["overhead_us_per_step"] = round(connector.guard.spent_s * 1e6 / max(adapter.counters.steps, 1), 1)
            result["ranked_blocks"] = adapter.ranker.ranked_blocks
            result["stale_blocks"] = adapter.ranker.stale_blocks
    return result


def main() -> None:
    options = json.loads(sys.argv[1])
    # vLLM writes to standard output; answers go where nothing else does.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from agentrt.engines.vllm.plugin import register

    register()
    llm = make_engine(options)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(run(llm, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
