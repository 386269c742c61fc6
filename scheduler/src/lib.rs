//! The scheduler decides, step by step, which tokens of which sequences are computed and in which KV blocks they live.
//!
//! It knows token ids, blocks and adapter generations. It knows no device, clock, thread or randomness: time is an
//! argument and every decision follows from the calls made so far, so whole days of traffic are simulated in a second
//! (`tests/simulation`) and a failure replays from its seed.
//!
//! Start reading at [`Scheduler::schedule_into`] (one step, in `step.rs`) with [`StepPlan`], what a step hands to the
//! engine. Then `queue.rs` (who is admitted next), `block_pool.rs` (who owns which block) and `prefix_cache.rs` (when two
//! sequences may share one).
//!
//! **One rule.** A sequence has tokens and a number of them whose keys and values are computed; every step brings the
//! second closer to the first. Prefill, chunked prefill, decode and recomputation after preemption are this one rule.
//!
//! **Invariants**, each checked by [`Scheduler::check_invariants`] or by the simulator's model of the KV cache:
//! - A block belongs to the sequences that list it and to nobody else; a block in two tables is full, computed and
//!   holds the same tokens under the same generation, tenant and salt.
//! - A step never exceeds `max_num_batched_tokens` rows, `max_num_seqs` sequences or `max_loras` generations.
//! - The best-ranked running sequence is never preempted, so every step brings some sequence nearer to its end; ranks
//!   age, so in the end that is every sequence.

mod active_adapters;
mod block_pool;
mod check;
mod config;
mod error;
mod plan;
mod prefix_cache;
mod queue;
mod scheduler;
mod sequence;
mod stats;
mod step;

pub use config::SchedulerConfig;
pub use error::SubmitError;
pub use plan::{ScheduledSequence, SequenceResult, StepPlan};
pub use scheduler::Scheduler;
pub use sequence::NewSequence;
pub use stats::Stats;
