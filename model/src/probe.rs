//! The probe: an adapter tried on the model that would serve it, beside an f32 reference of the same files, before
//! anybody is answered in its name.
//!
//! Reading an adapter checks its numbers, not what they do. Factors of bf16 and f32 files may be out of the range of
//! the device's format; finite factors may make keys that the KV cache cannot hold, or activations that 8 bits cannot
//! tell apart. A forward pass shows it. The serving side runs as in a step: factors in pages, KV blocks, the model's own
//! precision. The reference is loaded with whatever backend it is given, meant to be exact and made of other kernels.

use std::sync::Arc;

use openlora_kernels::{Backend, LoraRows, LoraSegment, SequenceRows, StepRows};
use openlora_types::{AdapterWeights, Token};
use serde::Serialize;

use crate::error::ModelError;
use crate::forward::Activations;
use crate::weights::{LoadOptions, Model};

/// Tokens of the prompt, fewer where the model was loaded for fewer positions.
const PROMPT_TOKENS: usize = 32;

/// The largest mean divergence, in nats, at which an adapter passes.
///
/// Measured with quantised serving (docs/registry.md): the golden, trained and configuration adapters of SmolLM2-135M
/// are at 0.0017 to 0.056 and its base alone at 0.0039; those of the tiny models at 0.002 to 0.012. An
/// adapter whose scale is raised until keys no longer fit the cache's f16 jumps from 0.0002 to 4.8. The bound lies
/// between, nine times the worst sound one: it finds what is broken and is no measure of quality.
pub const PROBE_DIVERGENCE_MAX: f64 = 0.5;

/// A serving model and its reference, ready to try adapters, one at a time.
pub struct Probe<S: Backend, R: Backend> {
    serving: Side<S>,
    reference: Side<R>,
    prompt: Vec<Token>,
    /// The reference's logits without an adapter, `[tokens, vocab]`.
    plain: Vec<f32>,
    /// How far the serving model is from the reference without an adapter.
    base: ProbeDistance,
}

/// How far the serving model is from the reference, over the rows of the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ProbeDistance {
    /// The largest difference of any logit.
    pub logit_difference_max: f32,
    /// Kullback-Leibler divergence of the served from the reference's next-token distributions in nats, mean over rows.
    pub divergence: f64,
    /// Rows with the same most probable token.
    pub same_top: usize,
}

/// What an adapter did on the probe's prompt.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ProbeReport {
    /// Rows compared.
    pub tokens: usize,
    /// Rows in which the serving model has no next token: a logit is NaN or infinite, or all are equal, which is what a
    /// norm makes of a residual stream whose squares overflow. Where there are any, the distance means nothing.
    pub lost: usize,
    /// The same of the reference.
    pub reference_lost: usize,
    /// The distance with the adapter.
    pub adapter: ProbeDistance,
    /// The distance without it: the share that the base model's precision has.
    pub base: ProbeDistance,
    /// The adapter's own effect: the largest change of any logit, in the reference. 0: it changes nothing.
    pub effect_max: f32,
}

impl ProbeReport {
    /// Whether the adapter may be served.
    ///
    /// # Errors
    /// Why not, with the figure and the bound.
    pub fn verdict(&self) -> Result<(), String> {
        if self.lost > 0 || self.reference_lost > 0 {
            return Err(format!(
                "leaves no next token in {} of {} rows, and in {} in f32 (a logit is not finite, or all are equal); its \
                 factors or its scale are too large",
                self.lost, self.tokens, self.reference_lost
            ));
        }
        // A NaN is no pass.
        if self.adapter.divergence <= PROBE_DIVERGENCE_MAX {
            return Ok(());
        }
        Err(format!(
            "is served {:.3} nats (mean KL divergence) from its f32 reference, more than {PROBE_DIVERGENCE_MAX}; the \
             base model alone is {:.3} from its own; serve with precision = \"f32\" or rescale the adapter",
            self.adapter.divergence, self.base.divergence
        ))
    }
}

impl<S: Backend, R: Backend> Probe<S, R> {
    /// Loads the reference beside `serving`, from the same files: another copy of the weights, in `reference`'s
    /// precision, for as long as the probe lives.
    ///
    /// # Errors
    /// What loading a model and a step may fail with.
    pub fn new(serving: Arc<Model<S>>, reference: Arc<R>) -> Result<Self, ModelError> {
        let tokens = PROMPT_TOKENS.min(serving.options().max_position);
        let options = LoadOptions {
            max_rows: tokens,
            max_logit_rows: tokens,
            max_position: tokens,
            block_size: serving.options().block_size,
        };
        let reference = Model::load(reference, Arc::clone(&serving.files), &options, &mut |_, _| {})?;
        let mut serving = Side::new(serving, tokens)?;
        let mut reference = Side::new(Arc::new(reference), tokens)?;
        let vocab = serving.model.shape().vocab;
        let prompt = prompt(tokens, vocab);
        let plain = reference.logits(&prompt, None)?;
        let base = distance(&plain, &serving.logits(&prompt, None)?, vocab);
        Ok(Self { serving, reference, prompt, plain, base })
    }

    /// Runs the prompt with the adapter on both sides. It may run beside the step thread of the same model, whose
    /// operations then take turns with these.
    ///
    /// # Errors
    /// As [`Model::load_adapter`] where the adapter cannot be held, and what a step may fail with.
    pub fn run(&mut self, weights: &AdapterWeights) -> Result<ProbeReport, ModelError> {
        let served = self.serving.logits(&self.prompt, Some(weights))?;
        let exact = self.reference.logits(&self.prompt, Some(weights))?;
        let vocab = self.serving.model.shape().vocab;
        Ok(ProbeReport {
            tokens: self.prompt.len(),
            lost: lost(&served, vocab),
            reference_lost: lost(&exact, vocab),
            adapter: distance(&exact, &served, vocab),
            base: self.base,
            effect_max: difference_max(&exact, &self.plain),
        })
    }
}

/// One of the two models, with the buffers of its step.
struct Side<B: Backend> {
    model: Arc<Model<B>>,
    act: Activations<B>,
}

impl<B: Backend> Side<B> {
    fn new(model: Arc<Model<B>>, tokens: usize) -> Result<Self, ModelError> {
        Ok(Self { act: model.activations(tokens, tokens)?, model })
    }

    /// Logits of all rows, `[tokens, vocab]`, in pages of their own that are gone afterwards.
    fn logits(&mut self, prompt: &[Token], weights: Option<&AdapterWeights>) -> Result<Vec<f32>, ModelError> {
        let model = &*self.model;
        let (backend, spec) = (model.backend(), model.attention_spec());
        let blocks = prompt.len().div_ceil(spec.block_size);
        let needed = weights.map_or(0, |weights| model.adapter_pages(&weights.sizes()));
        let mut pool = backend.new_pages(spec, model.layers(), blocks + needed)?;
        let (table, pages) = (numbers(0..blocks), numbers(blocks..blocks + needed));
        let load = |weights| model.load_adapter(weights, backend.take_pages(&mut pool, &pages)?);
        let adapter = weights.map(load).transpose()?;
        let rows = prompt.len();
        let all = numbers(0..rows);
        let sequence = SequenceRows { row: 0, rows, table: 0, blocks };
        let step = StepRows {
            tokens: prompt,
            drawn: &[],
            positions: &all,
            sequences: std::slice::from_ref(&sequence),
            block_tables: &table,
        };
        let segment = adapter.as_ref().map(|adapter| LoraSegment { row: 0, rows, adapter: Some(adapter) });
        let lora = LoraRows { segments: segment.as_slice() };
        model.forward(&mut self.act, &step, &lora, (&all, &lora), &mut pool)?;
        let logits = model.logits(&mut self.act, &all, &lora)?;
        Ok(backend.read_tensor(logits))
    }
}

fn numbers(range: std::ops::Range<usize>) -> Vec<u32> {
    range.map(|number| number as u32).collect()
}

/// Tokens spread over the vocabulary, always the same ones (SplitMix64 of the position: Steele et al. 2014).
fn prompt(tokens: usize, vocab: usize) -> Vec<Token> {
    let token = |position: usize| {
        let mut bits = (position as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) % vocab as u64) as Token
    };
    (0..tokens).map(token).collect()
}

/// Rows without a next token.
fn lost(logits: &[f32], vocab: usize) -> usize {
    let says_nothing =
        |row: &&[f32]| !row.iter().all(|logit| logit.is_finite()) || row.iter().all(|logit| *logit == row[0]);
    logits.chunks_exact(vocab).filter(says_nothing).count()
}

fn distance(exact: &[f32], served: &[f32], vocab: usize) -> ProbeDistance {
    let (mut divergence, mut same_top) = (0.0, 0);
    let rows = exact.len() / vocab;
    for (exact, served) in exact.chunks_exact(vocab).zip(served.chunks_exact(vocab)) {
        let (p, q) = (log_softmax(exact), log_softmax(served));
        divergence += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        same_top += usize::from(top(exact) == top(served));
    }
    let logit_difference_max = difference_max(exact, served);
    ProbeDistance { logit_difference_max, divergence: divergence / rows as f64, same_top }
}

/// NaN where any difference is.
fn difference_max(a: &[f32], b: &[f32]) -> f32 {
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |max, difference| if difference > max || difference.is_nan() { difference } else { max })
}

/// The most probable token, the lower one of equals.
fn top(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, token| if logits[token] > logits[best] { token } else { best })
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    let log_sum = sum.ln() + f64::from(max);
    logits.iter().map(|logit| f64::from(*logit) - log_sum).collect()
}
