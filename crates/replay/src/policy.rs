//! The trait that every cache policy of the replay implements.
//!
//! Order of events for one call: [`call_queued`](CachePolicy::call_queued) where it has to wait for room,
//! [`call_start`](CachePolicy::call_start) (its resident prefix is pinned already),
//! [`evict`](CachePolicy::evict) if room is needed, [`inserted`](CachePolicy::inserted), later - other calls may
//! start and finish in between - `evict` again if room is needed for the output, then
//! [`call_finish`](CachePolicy::call_finish), after which its blocks are unpinned.

use crate::host::HostTier;
use crate::pool::Pool;

/// What a policy may know of a call.
#[derive(Clone, Copy, Debug)]
pub struct CallView<'a> {
    /// Index into `Trace::calls`; for oracles and bookkeeping.
    pub call: u32,
    /// Session of the call.
    pub session: u32,
    /// Agent of the call.
    pub agent: u16,
    /// Position of the call in its session.
    pub step: u32,
    /// Time of this event in microseconds.
    pub time_us: u64,
    /// The prompt's full blocks, root first.
    pub prompt: &'a [u32],
    /// How many leading blocks of `prompt` were resident when the call started.
    pub hit: usize,
    /// Prompt length in tokens.
    pub prompt_tokens: u32,
    /// Tool that runs after this call; known at the finish only, `None` before.
    pub tool: Option<u16>,
}

/// A cache policy: hears of calls, names victims.
pub trait CachePolicy: Send {
    /// A call has arrived and waits until running calls leave room for it. Its `hit` is not known yet.
    fn call_queued(&mut self, _call: &CallView<'_>, _pool: &Pool) {}

    /// A call starts. `call.prompt[..call.hit]` is resident and pinned, the rest is about to be inserted.
    fn call_start(&mut self, call: &CallView<'_>, pool: &Pool);

    /// Evicts `n` blocks from `pool`, fewer only where nothing else is evictable.
    ///
    /// Use [`Pool::evict`]; it refuses pinned blocks and blocks with resident children.
    fn evict(&mut self, n: usize, now_us: u64, pool: &mut Pool);

    /// `blocks` (root first, a chain) entered the pool, pinned: missing prompt blocks, or the output at the finish.
    fn inserted(&mut self, call: &CallView<'_>, blocks: &[u32], pool: &Pool);

    /// A call has finished. `output` holds the blocks of its answer, now resident; `released` holds the
    /// blocks of prompt and output, root first, that no running call uses any more.
    fn call_finish(&mut self, call: &CallView<'_>, output: &[u32], released: &[u32], pool: &Pool);

    /// A call too large for the pool ran without the cache.
    fn call_bypassed(&mut self, _call: &CallView<'_>) {}

    /// The session has made its last call. Only policies that are *given* this hint use it.
    fn session_end(&mut self, _session: u32, _now_us: u64) {}

    /// Told once, before the first call: how many blocks the pool and the host tier hold.
    fn host_tier(&mut self, _pool_blocks: usize, _host_blocks: usize) {}

    /// With a host tier: `entering` has left the pool and is about to be copied to the host tier, which has too little
    /// room. The policy may drop copies, and returns those of `entering` that shall not be copied; whatever room is still
    /// missing then, the tier makes by itself, least recently used first.
    fn host_room(&mut self, _entering: &[u32], _now_us: u64, _pool: &Pool, _host: &mut HostTier) -> Vec<u32> {
        Vec::new()
    }

    /// Between calls, with a host tier: names chains of blocks (root first, each the parent of the next) to bring back,
    /// most wanted first. Those that are not in the host tier, or whose parent is not in the pool, are left out.
    fn prefetch(&mut self, _now_us: u64, _budget_blocks: usize, _pool: &Pool, _host: &HostTier) -> Vec<Vec<u32>> {
        Vec::new()
    }

    /// `blocks`, a part of the `chain`-th chain that [`prefetch`](Self::prefetch) just named, are in the pool again.
    fn prefetched(&mut self, _chain: usize, _blocks: &[u32], _now_us: u64, _pool: &Pool) {}
}
