//! The scheduler decides, step by step, which tokens of which sequences are computed and in which KV blocks they live.
//!
//! KV blocks and adapters share one pool of pages, and it also decides which adapters are on the device. It knows token
//! ids, pages and adapter generations. It knows no device, clock, thread or randomness: time is an
//! argument and every decision follows from the calls made so far, so whole days of traffic are simulated in a second
//! (`tests/simulation`) and a failure replays from its seed.
//!
//! Start reading at [`Scheduler::schedule_into`] (one step, in `step.rs`) with [`StepPlan`], what a step hands to the
//! engine. Then `queue.rs` (who is admitted next), `loading.rs` (which adapter is loaded next), `memory.rs` (who is evicted),
//! `page_pool.rs` and `residency.rs` (who has which page, who uses which adapter) and `prefix_cache.rs` (when two sequences
//! may share a block).
//!
//! **One rule.** A sequence has tokens and a number of them whose keys and values are computed; every step brings the
//! second closer to the first. Prefill, chunked prefill, decode and recomputation after preemption are this one rule. A plan takes
//! the plan before it as done, so that the next step can be planned while the device is at this one: the tokens that it draws are
//! counted, and learnt later.
//!
//! **Invariants**, each checked by [`Scheduler::check_invariants`] or by the simulator's model of the KV cache:
//! - A page belongs to nobody, to one adapter, or, as a KV block, to the sequences that list it; a block in two tables is full, computed and
//!   holds the same tokens under the same generation, tenant and salt.
//! - A step never exceeds `max_num_batched_tokens` rows, `max_num_seqs` sequences, `max_loras` generations or, unless
//!   one adapter alone is larger, `adapter_pages_per_step` pages of adapters.
//! - A sequence runs only while its adapter is resident; loading, leased and pinned adapters are never evicted.
//! - The best-ranked running sequence is never preempted, so every step brings some sequence nearer to its end; ranks
//!   age, so in the end that is every sequence.

mod check;
mod config;
mod error;
mod loading;
mod memory;
mod page_pool;
mod plan;
mod prefix_cache;
mod queue;
mod rate;
mod residency;
mod scheduler;
mod sequence;
mod stats;
mod step;

pub use config::SchedulerConfig;
pub use error::SubmitError;
pub use plan::{AdapterLoad, ScheduledSequence, SequenceResult, StepPlan};
pub use rate::Rate;
pub use residency::AdapterNeed;
pub use scheduler::Scheduler;
pub use sequence::NewSequence;
pub use stats::Stats;
