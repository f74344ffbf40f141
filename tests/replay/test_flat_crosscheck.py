"""Flat single-block streams: the replay's policies against libcachesim and cachetools, hit for hit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from agentrt._core import replay_flat

Keys = NDArray[np.uint32]

# libcachesim's S3-FIFO refuses an object as large as its small queue (10 % of the cache). The replay, like an engine,
# must store every block, so the two are comparable only where the small queue holds at least two blocks.
CAPACITIES = [20, 37, 150, 800]


def zipf(rng: np.random.Generator) -> Keys:
    return (rng.zipf(1.1, 40_000) % 3_000).astype(np.uint32)


def scans(rng: np.random.Generator) -> Keys:
    """Popular keys, interrupted by scans over keys that never return."""
    keys = zipf(rng)
    for at in range(0, 40_000, 4_000):
        keys[at : at + 1_000] = 10_000 + np.arange(at, at + 1_000, dtype=np.uint32)
    return keys


def loops(rng: np.random.Generator) -> Keys:
    """Sessions that take turns, each walking through its own keys again and again."""
    session = rng.integers(0, 12, 40_000)
    step = np.zeros(40_000, dtype=np.int64)
    for s in range(12):
        mine = session == s
        step[mine] = np.arange(mine.sum()) % (1 + 3 * s)
    return (session * 1_000 + step).astype(np.uint32)


def drift(rng: np.random.Generator) -> Keys:
    """Popularity that moves on."""
    base = np.arange(40_000) // 40
    return (base + rng.geometric(0.01, 40_000)).astype(np.uint32)


STREAMS = {"zipf": zipf, "scans": scans, "loops": loops, "drift": drift}


@pytest.fixture(params=list(STREAMS))
def keys(request: pytest.FixtureRequest) -> Keys:
    return STREAMS[request.param](np.random.default_rng(20))


def hits_of_libcachesim(cache: Any, keys: Keys) -> list[bool]:
    libcachesim = pytest.importorskip("libcachesim")
    request = libcachesim.Request()
    request.obj_size = 1
    hits = []
    for key in keys.tolist():
        request.obj_id = key
        hits.append(bool(cache.get(request)))
    return hits


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize(
    ("policy", "reference"),
    [("lru", "LRU"), ("lfu", "LFU"), ("arc", "ARC"), ("s3fifo", "S3FIFO"), ("sieve", "Sieve")],
)
def test_policy_equals_libcachesim(policy: str, reference: str, capacity: int, keys: Keys) -> None:
    libcachesim = pytest.importorskip("libcachesim", reason="libcachesim is not installed")
    # A small hash table: the default one takes 128 MB for each cache.
    cache = getattr(libcachesim, reference)(cache_size=capacity, hashpower=14)
    expected = np.array(hits_of_libcachesim(cache, keys))
    got = replay_flat(policy, keys, capacity)
    first = int(np.argmax(got != expected)) if (got != expected).any() else None
    assert first is None, f"{(got != expected).sum()} of {len(keys)} accesses differ, the first at {first}"
    assert 0 < expected.sum() < len(keys)


@pytest.mark.parametrize("capacity", [1, 2, *CAPACITIES])
@pytest.mark.parametrize(("policy", "reference"), [("lru", "LRUCache"), ("lfu", "LFUCache")])
def test_policy_equals_cachetools(policy: str, reference: str, capacity: int, keys: Keys) -> None:
    cachetools = pytest.importorskip("cachetools", reason="cachetools is not installed")
    cache = getattr(cachetools, reference)(maxsize=capacity)
    expected = []
    for key in keys.tolist():
        expected.append(key in cache)
        if expected[-1]:
            cache.get(key)
        else:
            cache[key] = True
    assert replay_flat(policy, keys, capacity).tolist() == expected


def test_policies_without_agents_or_depth_fall_back_to_lru_on_flat_streams(keys: Keys) -> None:
    lru = replay_flat("lru", keys, 150)
    for policy in ["lru-session-end", "depth"]:
        assert (replay_flat(policy, keys, 150) == lru).all(), policy


def test_an_unknown_policy_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"unknown policy `belady`; known policies: lru"):
        replay_flat("belady", np.zeros(1, dtype=np.uint32), 1)
