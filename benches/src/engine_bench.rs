//! The engine in this process, on the work that the peers' scripts do: `n` prompts of 64 random token ids at once, 32
//! tokens each, greedy, end-of-sequence ignored, no prefix cache. Prefill is timed by the same prompts with one token each; decode is
//! what the other 31 tokens took.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use openlora_adapters::Lease;
use openlora_engine::{EngineHandle, Event, OutputStream, Submit};
use openlora_types::{Priority, SamplingParams, TenantId, Token};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

/// Work to be timed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Workload {
    /// Sequences at once.
    pub sequences: usize,
    /// Distinct adapters, dealt in turn; 0 uses the base model alone.
    pub adapters: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens of an answer.
    pub answer_tokens: usize,
}

/// What came out: the best of the repetitions (the machine's other work can only slow a run), all of them in `runs`.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The work.
    pub workload: Workload,
    /// Prompt tokens per second.
    pub prefill_tokens_per_s: f64,
    /// Generated tokens per second after each sequence's first.
    pub decode_tokens_per_s: f64,
    /// Every repetition: (prefill seconds, total seconds).
    pub runs: Vec<(f64, f64)>,
}

/// Times `workload` `repetitions` times after one run to warm up.
///
/// # Errors
/// The engine refuses or fails a request, or `leases` has fewer than `workload.adapters`.
pub fn measure(
    engine: &EngineHandle,
    leases: &[Lease],
    vocab: usize,
    workload: Workload,
    repetitions: usize,
) -> Result<Outcome> {
    if leases.len() < workload.adapters {
        bail!("{} adapters asked for, {} there", workload.adapters, leases.len());
    }
    let mut rng = StdRng::seed_from_u64(workload.sequences as u64);
    let mut prompt =
        || -> Vec<Token> { (0..workload.prompt_tokens).map(|_| rng.random_range(5..vocab as u32 - 100)).collect() };
    let prompts: Vec<_> = (0..workload.sequences).map(|_| prompt()).collect();
    let lease = |i: usize| (workload.adapters > 0).then(|| leases[i % workload.adapters].clone());
    let run = |answer_tokens: usize| -> Result<f64> {
        let began = Instant::now();
        let mut streams = Vec::new();
        for (i, prompt) in prompts.iter().enumerate() {
            streams.push(submit(engine, lease(i), prompt.clone(), answer_tokens)?);
        }
        for stream in &mut streams {
            drain(stream)?;
        }
        Ok(began.elapsed().as_secs_f64())
    };
    run(2)?;
    let mut runs = Vec::new();
    for _ in 0..repetitions {
        runs.push((run(1)?, run(workload.answer_tokens)?));
    }
    let prefill = runs.iter().map(|run| run.0).fold(f64::INFINITY, f64::min);
    let total = runs.iter().map(|run| run.1).fold(f64::INFINITY, f64::min);
    let sequences = workload.sequences as f64;
    Ok(Outcome {
        workload,
        prefill_tokens_per_s: sequences * workload.prompt_tokens as f64 / prefill,
        decode_tokens_per_s: sequences * (workload.answer_tokens - 1) as f64 / (total - prefill),
        runs,
    })
}

fn submit(engine: &EngineHandle, lease: Option<Lease>, prompt: Vec<Token>, tokens: usize) -> Result<OutputStream> {
    let sampling = SamplingParams {
        temperature: 0.0,
        max_tokens: tokens as u32,
        min_tokens: tokens as u32,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let submit = Submit {
        tenant: TenantId("bench".into()),
        lease,
        prompt,
        sampling,
        priority: Priority::Normal,
        deadline: None,
        cache_salt: String::new(),
    };
    engine.submit(submit).context("the engine refused a request of the benchmark")
}

fn drain(stream: &mut OutputStream) -> Result<()> {
    while let Some(event) = stream.blocking_next() {
        if let Event::Failed(error) = event {
            return Err(error).context("a request of the benchmark failed");
        }
    }
    Ok(())
}
