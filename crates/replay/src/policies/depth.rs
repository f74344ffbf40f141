//! `depth`: the deepest block goes first, the least recently used on ties.
//!
//! The control of the TensorRT-LLM replication of CacheSage (eopXD/TensorRT-LLM,
//! `examples/kv_cache_agent_aware`), where chain depth alone carried the gain attributed to agents: shallow blocks are
//! instructions and tool descriptions that many calls share.
//!
//! Does badly with few concurrent sessions or long histories: the tail of the session that will be continued is the
//! deepest of all (the replication measured -27 points at concurrency 1; `whowhen_magentic` at 25 %: 44 points below
//! `lru`, `claude_code_sub` at 10 %: 24).

use std::cmp::Reverse;

use super::leaves::RankedLeaves;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::Trace;

/// Deepest first, then least recently used.
pub struct Depth {
    last_use: Vec<u64>,
    accesses: u64,
    leaves: RankedLeaves<(Reverse<u32>, u64)>,
}

impl Depth {
    /// A policy for the blocks of `trace`.
    pub fn new(trace: &Trace) -> Self {
        Self { last_use: vec![0; trace.n_blocks as usize], accesses: 0, leaves: RankedLeaves::new() }
    }

    fn touch(&mut self, blocks: &[u32]) {
        for &block in blocks.iter().rev() {
            self.accesses += 1;
            self.last_use[block as usize] = self.accesses;
        }
    }
}

impl CachePolicy for Depth {
    fn call_start(&mut self, call: &CallView<'_>, _pool: &Pool) {
        self.touch(&call.prompt[..call.hit]);
    }

    fn evict(&mut self, n: usize, _now_us: u64, pool: &mut Pool) {
        self.leaves.evict(n, pool, |pool, b| (Reverse(pool.depth(b)), self.last_use[b as usize]));
    }

    fn inserted(&mut self, _call: &CallView<'_>, blocks: &[u32], _pool: &Pool) {
        self.touch(blocks);
    }

    fn call_finish(&mut self, _call: &CallView<'_>, _output: &[u32], released: &[u32], pool: &Pool) {
        self.leaves.offer(released, pool, |pool, b| (Reverse(pool.depth(b)), self.last_use[b as usize]));
    }
}
