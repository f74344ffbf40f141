//! `lru-session-end`: [`lru`](super::lru) that is told when a session has made its last call.
//!
//! The finished session's blocks that no other session ever used move to the head of the free queue, deepest first.
//! This is the hint of SGLang's `close_session` and of vLLM's proposals for session-aware retention; it knows nothing
//! of agents. It needs a framework that reports the end, and gains nothing where sessions are long and few end during
//! the run or the pressure comes from live sessions (`claude_code_main`, `hyperagent`): there it is `lru`.

use super::lru::Lru;
use crate::policy::{CachePolicy, CallView};
use crate::pool::Pool;
use crate::trace::Trace;

const NOBODY: u32 = u32::MAX;
const SHARED: u32 = u32::MAX - 1;

/// vLLM's free queue with the blocks of finished sessions first.
pub struct LruSessionEnd {
    lru: Lru,
    /// The only session that has used a block, [`SHARED`] once there are two.
    owner: Vec<u32>,
    /// Blocks by the session that was first to use them.
    blocks: Vec<Vec<u32>>,
}

impl LruSessionEnd {
    /// A policy for the blocks of `trace`.
    pub fn new(trace: &Trace) -> Self {
        Self {
            lru: Lru::new(trace),
            owner: vec![NOBODY; trace.n_blocks as usize],
            blocks: vec![Vec::new(); trace.sessions.len()],
        }
    }

    fn claim(&mut self, session: u32, blocks: &[u32]) {
        for &block in blocks {
            let owner = &mut self.owner[block as usize];
            if *owner == NOBODY {
                *owner = session;
                self.blocks[session as usize].push(block);
            } else if *owner != session {
                *owner = SHARED;
            }
        }
    }
}

impl CachePolicy for LruSessionEnd {
    fn call_start(&mut self, call: &CallView<'_>, pool: &Pool) {
        self.claim(call.session, call.prompt);
        self.lru.call_start(call, pool);
    }

    fn evict(&mut self, n: usize, now_us: u64, pool: &mut Pool) {
        self.lru.evict(n, now_us, pool);
    }

    fn inserted(&mut self, call: &CallView<'_>, blocks: &[u32], pool: &Pool) {
        self.lru.inserted(call, blocks, pool);
    }

    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool) {
        self.claim(call.session, output);
        self.lru.call_finish(call, output, released, pool);
    }

    fn session_end(&mut self, session: u32, _now_us: u64) {
        // In order of first use an ancestor precedes its descendants; each one pushed to the front passes those
        // before it, so that the deepest ends up at the head.
        for block in std::mem::take(&mut self.blocks[session as usize]) {
            if self.owner[block as usize] == session && self.lru.free.remove(block) {
                self.lru.free.push_front(block);
            }
        }
    }
}
