//! The rows of a step as kernels take them: tokens, positions, adapters, and which rows get logits and draws.

use std::collections::HashMap;
use std::time::Instant;

use openlora_kernels::{Backend, DrawnToken, LoraRows, LoraSegment, SampleRow, SampledRow, SequenceRows};
use openlora_model::ModelError;
use openlora_scheduler::{ScheduledSequence, SequenceResult, StepPlan};
use openlora_types::{Generation, SequenceId, Token};

use super::{RequestKey, StepThread};
use crate::request::Scheduled;

/// Reused between steps.
#[derive(Default)]
pub(super) struct Buffers {
    pub(super) tokens: Vec<Token>,
    pub(super) drawn: Vec<DrawnToken>,
    pub(super) positions: Vec<u32>,
    pub(super) rows: Vec<SequenceRows>,
    pub(super) logits: Vec<LogitRow>,
    pub(super) part: Vec<LogitRow>,
    /// The step's rows that get logits, ascending, as `logits` lists them.
    pub(super) wanted: Vec<u32>,
    pub(super) logit_rows: Vec<u32>,
    pub(super) sampled: Vec<SampledRow>,
    pub(super) results: Vec<SequenceResult>,
    pub(super) gone: Vec<RequestKey>,
    pub(super) segments: Vec<LoraSegment<'static, ()>>,
    pub(super) wanted_segments: Vec<LoraSegment<'static, ()>>,
    pub(super) draws: Vec<SampleRow<'static>>,
}

impl Buffers {
    /// Asks for the logits of `row` of the step.
    pub(super) fn want(&mut self, row: usize, (planned, id): (usize, SequenceId), score: Option<Token>) {
        self.logits.push(LogitRow { row: self.wanted.len() as u32, planned, id, score });
        self.wanted.push(row as u32);
    }
}

/// A row whose logits are wanted.
#[derive(Clone, Copy)]
pub(super) struct LogitRow {
    /// Place among the step's wanted rows.
    pub(super) row: u32,
    /// Index into the plan's sequences, and which one that is.
    pub(super) planned: usize,
    pub(super) id: SequenceId,
    /// The prompt token to score; `None` draws.
    pub(super) score: Option<Token>,
}

impl<B: Backend> StepThread<B> {
    /// Fills the rows of the step and lists those whose logits are wanted.
    pub(super) fn lay_out(&mut self, plan: &StepPlan, buffers: &mut Buffers) {
        buffers.tokens.clear();
        buffers.drawn.clear();
        buffers.positions.clear();
        buffers.rows.clear();
        buffers.logits.clear();
        buffers.wanted.clear();
        for (planned_index, planned) in plan.sequences.iter().enumerate() {
            let sequence = self.sequences.get_mut(&planned.id).expect("a planned sequence is known");
            let first_time = !std::mem::replace(&mut sequence.started, true);
            let request = self.requests.get_mut(&sequence.request).expect("a sequence's request lives");
            let cached_prompt_tokens = planned.cached_tokens as u32;
            // Of several samples the first runs first; the others find its prompt in the cache.
            request.control.scheduled.get_or_init(|| Scheduled { at: Instant::now(), cached_prompt_tokens });
            let tokens = self.scheduler.tokens(planned.id).expect("a planned sequence is known");
            let (start, end, of) = (planned.start, planned.start + planned.rows, (planned_index, planned.id));
            let first_row = buffers.tokens.len();
            buffers.tokens.extend_from_slice(&tokens[start..end]);
            buffers.positions.extend(start as u32..end as u32);
            if planned.drawn {
                let row = (first_row + planned.rows - 1) as u32;
                buffers.drawn.push(DrawnToken { row, sample: sequence.sample_row });
            }
            let rows =
                SequenceRows { row: first_row, rows: planned.rows, table: planned.table, blocks: planned.blocks };
            buffers.rows.push(rows);
            if sequence.index == 0 {
                if first_time {
                    request.usage.cached_prompt_tokens = cached_prompt_tokens;
                }
                if request.params.prompt_logprobs.is_some() {
                    // The row at position p scores the token at p + 1.
                    let scorable = end.min(request.prompt_tokens - 1);
                    for position in start.max(request.scored)..scorable {
                        buffers.want(first_row + position - start, of, Some(tokens[position + 1]));
                    }
                    request.scored = request.scored.max(scorable);
                }
            }
            if planned.samples {
                sequence.sample_row = buffers.logits.len() as u32;
                buffers.want(first_row + planned.rows - 1, of, None);
            }
            self.totals.prompt_tokens += end.min(request.prompt_tokens).saturating_sub(start) as u64;
        }
    }

    /// Enqueues the head and the sampler over up to `logit_rows_max` rows.
    pub(super) fn sample(
        &mut self,
        plan: &StepPlan,
        part: &[LogitRow],
        buffers: &mut Buffers,
    ) -> Result<(), ModelError> {
        buffers.logit_rows.clear();
        buffers.logit_rows.extend(part.iter().map(|wanted| wanted.row));
        let mut segments = recycle(std::mem::take(&mut buffers.segments));
        let of = |planned: usize| adapter(&self.resident, &plan.sequences[planned]);
        row_segments(part, of, &mut segments);
        let lora = LoraRows { segments: &segments };
        let logits = self.model.logits(&mut self.activations, &buffers.logit_rows, &lora)?;
        let mut draws = recycle_draws(std::mem::take(&mut buffers.draws));
        for wanted in part {
            let sequence = &self.sequences[&wanted.id];
            let request = &self.requests[&sequence.request];
            draws.push(match wanted.score {
                Some(token) => SampleRow::Score { token, top: request.params.prompt_logprobs.unwrap_or(0) as usize },
                None => {
                    // Without the one that is drawn here.
                    let ScheduledSequence { start, rows, .. } = plan.sequences[wanted.planned];
                    let tokens = self.scheduler.tokens(wanted.id).expect("a planned sequence is known");
                    let tokens = &tokens[..start + rows];
                    let (prompt, generated) = tokens.split_at(request.prompt_tokens);
                    let early = generated.len() < request.params.min_tokens as usize;
                    SampleRow::Draw {
                        params: &request.params,
                        sample_index: sequence.index,
                        prompt,
                        generated,
                        banned: if early { &request.stops } else { &[] },
                        top: request.params.logprobs.unwrap_or(0) as usize,
                    }
                }
            });
        }
        self.model.backend().enqueue_sample(logits, &draws, &mut buffers.sampled)?;
        buffers.draws = recycle_draws(draws);
        buffers.segments = recycle(segments);
        Ok(())
    }
}

/// The adapter of a planned sequence. Not a method: activations and pages are borrowed for writing at the same time.
///
/// # Panics
/// When it is not there: nothing is ever served in an adapter's name that the adapter did not produce.
pub(super) fn adapter<'a, A>(resident: &'a HashMap<Generation, A>, planned: &ScheduledSequence) -> Option<&'a A> {
    planned.generation.map(|generation| &resident[&generation])
}

/// The adapters of rows that get logits, one row after the other; `adapter` knows them by their place in the plan.
pub(super) fn row_segments<'a, A>(
    rows: &[LogitRow],
    adapter: impl Fn(usize) -> Option<&'a A>,
    out: &mut Vec<LoraSegment<'a, A>>,
) {
    out.extend(rows.iter().enumerate().map(|(row, wanted)| LoraSegment {
        row,
        rows: 1,
        adapter: adapter(wanted.planned),
    }));
    merge(out);
}

/// Joins neighbouring runs of the same adapter; empties the list when no row has one.
pub(super) fn merge<A>(segments: &mut Vec<LoraSegment<'_, A>>) {
    if segments.iter().all(|segment| segment.adapter.is_none()) {
        segments.clear();
        return;
    }
    segments.dedup_by(|next, run| {
        let same = match (next.adapter, run.adapter) {
            (None, None) => true,
            (Some(a), Some(b)) => std::ptr::eq(a, b),
            _ => false,
        };
        if same {
            run.rows += next.rows;
        }
        same
    });
}

/// The same allocation for segments of another lifetime: collecting a drained vector in place keeps its capacity.
pub(super) fn recycle<'to, From, To>(mut segments: Vec<LoraSegment<'_, From>>) -> Vec<LoraSegment<'to, To>> {
    segments.clear();
    segments.into_iter().map(|_| unreachable!("the vector was cleared")).collect()
}

/// The same for the sampler's rows.
pub(super) fn recycle_draws<'to>(mut draws: Vec<SampleRow<'_>>) -> Vec<SampleRow<'to>> {
    draws.clear();
    draws.into_iter().map(|_| unreachable!("the vector was cleared")).collect()
}
