"""One vLLM engine in a process of its own; jobs on standard input, answers on standard output, a line of JSON each.

The engine runs inside this process on the CPU, with a small model of random weights that is written here. Every job
starts from an empty cache of the size it asks for and from an untaught policy. `benches/e2e/workloads.py` says in which
order calls are sent.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benches.e2e import cores
from benches.e2e.scenarios import SCENARIOS, Paced
from benches.e2e.workloads import ENGINE_BLOCK, LONGEST, Call, ClosedLoop, order_of_calls, sessions

from agentrt.frameworks.runs import Runs

# Wide and shallow, with few heads: attention has a small share of the prefill, as in models that people serve.
MODELS = {
    # hidden, layers, heads, KV heads, ffn
    "tiny": (128, 2, 2, 1, 256),
    "small": (384, 1, 2, 1, 1536),
    "medium": (1024, 1, 4, 2, 4096),
}
HEAD = 64
STOCK = "stock"


def write_model(folder: Path, size: str) -> None:
    """A Qwen3 configuration; vLLM makes up the weights."""
    hidden, layers, heads, kv_heads, ffn = MODELS[size]
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden,
        "intermediate_size": ffn, "head_dim": HEAD, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32_000, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1,
        "eos_token_id": 2, "use_sliding_window": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def make_engine(options: dict[str, Any]) -> Any:
    """An ``LLM``, with the connector unless it is to be stock vLLM."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="4",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    from vllm import LLM

    model = Path(options["model_folder"])
    write_model(model, options["model"])
    connector = {"kv_connector": "AgentRTConnector", "kv_role": "kv_producer"}
    return LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        # bfloat16 is nine times slower where the CPU has no instructions for it.
        dtype="float32",
        seed=0,
        block_size=ENGINE_BLOCK,
        max_model_len=LONGEST + 64,
        enforce_eager=True,
        enable_prefix_caching=True,
        num_gpu_blocks_override=options["blocks"] + 1,
        max_num_seqs=options["batch"],
        max_num_batched_tokens=2048,
        disable_log_stats=False,
        kv_transfer_config=None if options["stock"] else connector,
    )


def resize(manager: Any, blocks: int) -> None:
    """Leaves so many usable blocks of the memory the engine has; an engine takes many seconds to start."""
    pool = manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    pool.__init__(blocks + 1, pool.enable_caching, pool.hash_block_size, pool.enable_kv_cache_events)
    for group in manager.coordinator.single_type_managers:
        group._null_block = pool.null_block


class Keys:
    """vLLM's hashes of a prompt's blocks, as the adapter sees them."""

    def __init__(self, engine: Any) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import hash_block_tokens

        algorithm = engine.vllm_config.cache_config.prefix_caching_hash_algo
        self._hash = get_hash_fn_by_name(algorithm)
        self._chain = hash_block_tokens
        self._known: dict[int, bytes] = {}

    def of(self, call: Call) -> list[int]:
        """The keys of a call's full blocks."""
        tokens = call.tokens()
        parent: bytes | None = None
        keys = []
        for i, block in enumerate(call.engine_blocks):
            value = self._known.get(block)
            if value is None:
                value = self._chain(self._hash, parent, tokens[i * ENGINE_BLOCK : (i + 1) * ENGINE_BLOCK])
                self._known[block] = value
            parent = value
            keys.append(int.from_bytes(value[-8:], "big"))
        return keys


class Bench:
    """The engine, and what has to be set up anew for every job."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.llm = make_engine(options)
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.connector = self.scheduler.connector

    def fresh(self, job: dict[str, Any]) -> None:
        """An empty cache of the job's size, and an untaught policy."""
        manager = self.scheduler.kv_cache_manager
        resize(manager, job["pool_blocks"])
        if self.connector is None:
            assert job["core"] == STOCK
        else:
            from agentrt.engines.vllm.adapter import Settings

            self.connector.settings = Settings.read({"policy": job["core"], **job["extra"]}, {})
            guard = type(self.connector.guard)()
            self.connector.guard = self.connector.hooks.guard = guard
            self.connector.bind_gpu_block_pool(manager.block_pool)
            assert self.connector.adapter is not None
        gc.collect()

    def calls(self, job: dict[str, Any]) -> list[list[Call]]:
        """The job's sessions."""
        return sessions(job["workload"], Path(job["traces"]), job["seed"])

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """One workload, once, under one policy."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        todo = self.calls(job)
        if job["future"]:
            keys = Keys(self.engine)
            by_name = {call.name: call for session in todo for call in session}
            cores.Optimal.default_future = [keys.of(by_name[name]) for name in job["future"]]
        for call in order_of_calls(todo, job["concurrency"], job["calls"], job["seed"]):
            # Made once, not while the clock runs.
            call.tokens()
        self.fresh(job)
        loop = ClosedLoop(todo, job["concurrency"], job["calls"], job["seed"])
        runs = Runs()
        engine = self.engine
        live: dict[str, _Live] = {}
        ended: dict[str, _Live] = {}
        steps = sent = asked = pauses = 0
        if job.get("step_clock_us") and self.connector is not None:
            # Time goes by steps: what is learned of times, and with it every decision, is the same in every run.
            def now_us() -> int:
                nonlocal asked
                asked += 1
                return 1_000_000 + steps * int(job["step_clock_us"]) + asked

            self.connector.adapter.now_us = now_us
        paused_s = 0.0
        every = job.get("pause_every", 0)
        preemptions = self._preemptions()
        cpu_start = time.process_time()
        start = time.perf_counter()
        while True:
            pauses_now = bool(every) and sent // every > pauses
            if pauses_now and not live:
                # All sessions pause for as long as the engine finds something to do.
                since = time.perf_counter()
                while self.scheduler.has_requests():
                    engine.step()
                paused_s += time.perf_counter() - since
                pauses, pauses_now = sent // every, False
            for session, step in () if pauses_now else loop.due():
                call = session[step]
                run = runs.start(call.session)
                extra = run.extra_body(call.agent)["vllm_xargs"] if job["named"] else None
                params = SamplingParams(
                    max_tokens=job["max_tokens"], temperature=0.0, ignore_eos=True, detokenize=False, extra_args=extra,
                    output_kind=RequestOutputKind.CUMULATIVE,
                )  # fmt: skip
                prompt = call.tokens()
                sent += 1
                live[call.name] = _Live(session, step, sent, time.perf_counter())
                engine.add_request(call.name, {"prompt_token_ids": prompt}, params)
                if job["abort_every"] and sent % job["abort_every"] == 0:
                    # A step later: in the middle of its prompt, or still waiting.
                    live[call.name].abort = True
            if not live:
                break
            outputs = engine.step()
            steps += 1
            now = time.perf_counter()
            for output in outputs:
                entry = live[output.request_id]
                if entry.first is None and output.outputs[0].token_ids:
                    entry.first = now
                if output.finished:
                    entry.last = now
                    entry.hit = output.num_cached_tokens or 0
                    entry.prompt = len(output.prompt_token_ids)
                    entry.tokens = tuple(output.outputs[0].token_ids)
                    ended[output.request_id] = live.pop(output.request_id)
                    if job.get("told_ends") and entry.step + 1 == len(entry.session):
                        runs.start(entry.session[-1].session).end()
                    loop.ended(entry.session, entry.step)
            aborted = [name for name, entry in live.items() if entry.abort]
            if aborted:
                engine.abort_request(aborted)
                for name in aborted:
                    entry = live.pop(name)
                    loop.ended(entry.session, entry.step)
        took = time.perf_counter() - start - paused_s
        return {
            **self._result(ended, took, steps),
            "cpu_s": round(time.process_time() - cpu_start, 3),
            "preemptions": self._preemptions() - preemptions,
        }

    def run_paced(self, job: dict[str, Any]) -> dict[str, Any]:
        """A scenario: sessions by the clock, some at a time; while all pause, the engine may do what it likes.

        The clock counts this process's CPU time, and pauses, which are skipped: whatever else runs on the machine is
        left out.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        scenario = SCENARIOS[job["scenario"]]
        upcoming = scenario.sessions(random.Random(job["seed"]))[::-1]
        for session in upcoming:
            for call in session.calls:
                call.tokens()
        self.fresh({**job, "pool_blocks": scenario.pool_blocks})
        engine, scheduler, adapter = self.engine, self.scheduler, self.connector.adapter
        skipped = 0.0

        def clock() -> float:
            return time.process_time() + skipped

        adapter.now_us = lambda: int(clock() * 1e6)
        live: dict[str, tuple[_Live, Paced]] = {}
        ended: dict[str, _Live] = {}
        took: dict[str, list[float]] = {}
        begun: dict[str, float] = {}
        due: list[tuple[float, int, Paced, int]] = []
        steps = sent = 0
        start = clock()
        for _ in range(scenario.concurrency):
            if upcoming:
                session = upcoming.pop()
                due.append((start + session.pauses_s[0], len(due), session, 0))
        while due or live:
            due.sort(key=lambda entry: entry[:2])
            while due and due[0][0] <= clock():
                _, _, session, step = due.pop(0)
                call = session.calls[step]
                names = {"session_id": call.session, "agent_id": call.agent, "tenant": session.tenant}
                if session.tools:
                    names["tool"] = session.tools[step]
                params = SamplingParams(
                    max_tokens=job["max_tokens"], temperature=0.0, ignore_eos=True, detokenize=False,
                    extra_args={**names, "session_end": step + 1 == len(session.calls)},
                    output_kind=RequestOutputKind.CUMULATIVE,
                )  # fmt: skip
                sent += 1
                now = clock()
                begun.setdefault(call.session, now)
                live[call.name] = _Live(session.calls, step, sent, now), session
                engine.add_request(call.name, {"prompt_token_ids": call.tokens()}, params)
            if not live and not scheduler.has_requests():
                skipped += max(0.0, due[0][0] - clock())
                continue
            outputs = engine.step()
            steps += 1
            now = clock()
            for output in outputs:
                entry, session = live[output.request_id]
                if entry.first is None and output.outputs[0].token_ids:
                    entry.first = now
                if not output.finished:
                    continue
                del live[output.request_id]
                entry.last = now
                entry.hit = output.num_cached_tokens or 0
                entry.prompt = len(output.prompt_token_ids)
                entry.tokens = tuple(output.outputs[0].token_ids)
                ended[output.request_id] = entry
                step = entry.step + 1
                if step == len(session.calls):
                    took.setdefault(session.tenant, []).append(now - begun[session.calls[0].session])
                    if not upcoming:
                        continue
                    session, step = upcoming.pop(), 0
                due.append((now + session.pauses_s[step], sent + len(due), session, step))
        seconds = clock() - start
        while scheduler.has_requests():
            engine.step()
        gate = adapter.gate
        return {
            **self._result(ended, seconds, steps),
            "session_s": {tenant: sum(values) / len(values) for tenant, values in took.items()},
            "mean_session_s": sum(map(sum, took.values())) / sum(map(len, took.values())),
            "passed_over": gate.held + gate.passed_over if gate is not None else 0,
            "overruled": gate.overruled if gate is not None else 0,
        }

    def _preemptions(self) -> int:
        return sum(int(m.value) for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")

    def _result(self, ended: dict[str, _Live], took: float, steps: int) -> dict[str, Any]:
        pool = self.scheduler.kv_cache_manager.block_pool
        hit = sum(entry.hit for entry in ended.values())
        prompt = sum(entry.prompt for entry in ended.values())
        outputs = {name: hashlib.sha256(str(entry.tokens).encode()).hexdigest()[:8] for name, entry in ended.items()}
        result = {
            "calls": len(ended),
            "prompt_tokens": prompt,
            "hit_tokens": hit,
            "hit_rate": round(hit / max(prompt, 1), 5),
            "ttft_ms": spread([entry.first - entry.sent for entry in ended.values() if entry.first is not None]),
            "latency_ms": spread([entry.last - entry.sent for entry in ended.values()]),
            "calls_per_s": round(len(ended) / took, 3),
            "makespan_s": round(took, 3),
            "steps": steps,
            "overhead_us_per_step": 0.0,
            "outputs": outputs,
            "leaked_blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "order": sorted(ended, key=lambda name: ended[name].number),
            "faults": {},
        }
        connector = self.connector
        if connector is not None and connector.adapter is not None:
            connector.adapter.close()
            prefills = getattr(connector.adapter, "prefills", None)
            result["prefilled_tokens"] = prefills.computed_tokens if prefills is not None else 0
            result["faults"] = dict(connector.guard.faults)
            result["overhead_us_per_step"] = round(connector.guard.spent_s * 1e6 / max(steps, 1), 1)
        return result


@dataclasses.dataclass
class _Live:
    session: list[Call]
    step: int
    number: int
    sent: float
    first: float | None = None
    last: float = 0.0
    hit: int = 0
    prompt: int = 0
    tokens: tuple[int, ...] = ()
    abort: bool = False


def spread(values: list[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds."""
    values = sorted(values)
    p50, p99 = (values[min(int(len(values) * q), len(values) - 1)] for q in (0.5, 0.99))
    return {name: round(v * 1e3, 2) for name, v in (("mean", sum(values) / len(values)), ("p50", p50), ("p99", p99))}


def main() -> None:
    options = json.loads(sys.argv[1])
    # vLLM writes to standard output; answers go where nothing else does.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from agentrt.engines.vllm.plugin import register

    register()
    bench = Bench(options)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        job = json.loads(line)
        answers.write(json.dumps(bench.run_paced(job) if "scenario" in job else bench.run(job)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
