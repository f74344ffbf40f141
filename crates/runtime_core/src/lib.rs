//! Learned, lock-free state and policies of agentrt: observe, score, predict, act.
//!
//! [`Runtime`] is the whole of it: one engine's pool, its sessions, and what each workload has taught. Everything is
//! allocated by [`Runtime::new`]; afterwards nothing on the hot path locks, waits or allocates. Pure Rust, no Python.
//!
//! | module | what it owns |
//! |---|---|
//! | [`runtime`] | the four calls |
//! | [`kv`] | the `kv_cache` policy: pool, estimators, decision |
//! | [`sessions`], [`successors`], [`histogram`] | bounded tables that any thread may change |
//! | [`protocol`] | the steps they are made of, model-checked |
//! | [`policy`], [`scheduling`] | policies as plug-ins, and what an engine's scheduler asks them |
//! | [`identity`] | sessions and agents of calls that do not name them, from their prompts |
//! | [`merge`] | states of replicas, added up |
//! | [`beside`] | a thread that works off what an engine need not wait for |
//! | [`ids`], [`error`] | names and errors |
//!
//! # Contract
//!
//! *Wait-free*: ends after a fixed number of own steps. *Lock-free*: a retry means that another thread succeeded.
//! *One writer*: one thread at a time; another one is told so at once ([`Error::Busy`]) and nothing has happened.
//! n is the number of blocks given or asked for, `s` the segments of a session (runs of blocks with one history).
//!
//! | operation | progress | allocates | worst case |
//! |---|---|---|---|
//! | [`Runtime::observe`], events without blocks | lock-free; never refused | no | a start 4 exchanges and, while counts are small, 14 additions (later, in one of four, by load and store, and 3 exchanges), an end 1 exchange and 2 additions (where the pool is taken, 256 loads); every 32nd gap, 4 histograms; every eighth start, a word that all share; two hash probes |
//! | [`Runtime::observe`], [`Runtime::observe_each`] and [`Runtime::observe_scoring`], events with blocks; [`Runtime::call_started`], [`Runtime::stored`], [`Runtime::call_ended`] | one writer | no | two hash probes a block (two more for the guard's shadow), one visit a segment of the agent's, there and in up to six sessions on the same task |
//! | of these: `CallQueued`; [`Runtime::call_queued`] | one writer | no | one hash probe a block, one visit a segment of the prompt |
//! | of these, while calls wait: a start, a call that gives up | | no | 1,024 calls that wait |
//! | of these: `SessionEnd` | | no | 4,096 calls in flight and 1,024 that wait |
//! | of these: a session's slot goes to another | | no | once a segment it had |
//! | of these: `Removed` | | no | 16 n probes |
//! | of these: `Reset` | | no | once the pool |
//! | of these, once anything was evicted, but for [`Scoring::ByStep`](runtime::Scoring) | | no | 64 sessions that changed and 4 that aged scored, each 5 s steps; 16 segments above the next victims |
//! | [`Runtime::settle_step`] | one writer | no | 64 sessions that changed and 4 that aged scored, each 5 s steps |
//! | [`Runtime::evict`] | one writer | no | n hash deletions; a note of what each lane loses; one scoring for each segment that loses its last child and was not prepared for; after events by step, 64 sessions that changed and 4 that aged scored |
//! | [`Runtime::evict_oldest`], and [`Runtime::evict`] while LRU has taken over | one writer | no | n hash deletions, two list steps a segment; a segment that calls in flight need is passed over once |
//! | [`Runtime::evict_blocks`] | one writer | no | a hash probe and a deletion a block |
//! | [`Runtime::expected`] | one writer | no | 64 sessions, 256 leaves; while calls wait 256 leaves |
//! | [`Runtime::worth_restoring`] | one writer | no | one hash probe a block, 1,024 calls that wait |
//! | [`Runtime::restored`] | one writer | no | two hash probes a block |
//! | [`Runtime::score_blocks`], [`Runtime::is_resident`] | wait-free | no | one hash probe a block |
//! | [`Runtime::score_agents`], [`Runtime::predict`], [`Runtime::predict_times`] | wait-free | no | 64 rows of 8 successors |
//! | [`Runtime::knows`], [`Runtime::session_calls`], [`Runtime::now_us`], [`Runtime::options`], [`Runtime::workload_name`], [`Runtime::what_was_learned`] | wait-free | no | one cache line |
//! | [`Runtime::known_sessions`] | wait-free | no | once the session table |
//! | [`Runtime::memory`], [`Runtime::resident_blocks`], [`Runtime::repairs`], [`Runtime::takeovers`] | one writer | no | |
//! | [`Runtime::survival`] | one writer | no | one scoring; for the measurement of calibration |
//! | [`Runtime::foretell`] | one writer | no | as one event; for offline studies |
//! | [`Runtime::publish`], [`Runtime::merged`], [`Runtime::absorb`] | wait-free, but for halving (lock-free) | yes, off the hot path | once the learned state |
//! | [`Runtime::new`], [`Runtime::workload`] | blocking, cold | yes | |
//!
//! A hash probe loads the entries of one home; tables are three quarters full at most. The structures below have tables
//! of their own in their modules. Which test or model notices when a line is broken: `docs/concurrency.md`; what the
//! calls cost: `docs/benchmarks.md`.
//!
//! # Memory
//!
//! [`Runtime::memory`] reports it: at most 20,000 bytes of learned state a workload (asserted when compiling), at most 32
//! bytes of index a pool block (and 180 kB for small pools), and a bounded part per session. None of it depends on what
//! happens.

pub mod beside;
pub mod error;
pub mod histogram;

pub mod identity;
pub mod ids;
pub mod kv;
pub mod merge;
pub mod policy;
pub mod protocol;
pub mod runtime;
pub mod scheduling;
pub mod sessions;
pub mod successors;
mod sync;

pub use error::{Error, Result};
pub use runtime::Runtime;
