//! Whole models on any backend, as checks that any [`Backend`] can be given: steps as an engine lays them out, compared with answers
//! of transformers and PEFT (`expected.json`, made by fixtures/make) or with themselves. A check panics with what differs.

use std::path::Path;
use std::sync::Arc;

use openlora_kernels::{Backend, DrawnToken, LoraRows, LoraSegment, SampleRow, SampledRow, SequenceRows, StepRows};
use openlora_types::{AdapterWeights, SamplingParams, Token};
use serde::Deserialize;

use crate::{Activations, LoadOptions, Model, ModelFiles};

const BLOCK: usize = 16;
const MAX_ROWS: usize = 640;
const MAX_LOGIT_ROWS: usize = 64;
const KV_BLOCKS: usize = 96;

/// How far a backend may be from recorded answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Largest difference of a log-probability.
    pub logprob: f64,
    /// A greedy token must be equal where the recorded gap between best and second best exceeds this.
    pub margin: f64,
}

impl Tolerance {
    /// Of a backend that multiplies f32 numbers.
    pub const F32: Self = Self { logprob: 2e-3, margin: 1e-2 };
}

/// One entry of an `expected.json`.
#[derive(Deserialize)]
pub struct Expected {
    /// The prompt.
    pub prompt_ids: Vec<Token>,
    /// Log-probability of each of its tokens but the first, given those before it.
    pub prompt_logprobs: Vec<f64>,
    /// The ten most probable tokens after it.
    pub top10: Vec<(Token, f64)>,
    /// What greedy decoding continues it with.
    pub greedy: Vec<Token>,
    /// By how much each of those led over the second best.
    pub greedy_margin: Vec<f64>,
}

/// One sequence's rows of a step.
pub struct Rows<'a, A> {
    /// Tokens to compute.
    pub tokens: &'a [Token],
    /// Position of the first.
    pub start: usize,
    /// KV blocks of the sequence.
    pub blocks: &'a [u32],
    /// Its adapter.
    pub adapter: Option<&'a A>,
}

impl<A> Clone for Rows<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<A> Copy for Rows<'_, A> {}

/// A loaded model with the buffers of one step thread.
pub struct Host<B: Backend> {
    /// The model.
    pub model: Model<B>,
    /// How far [`Self::check`] lets it be from recorded answers.
    pub tolerance: Tolerance,
    files: Arc<ModelFiles>,
    act: Activations<B>,
    kv: B::Pages,
    drawn: Vec<SampledRow>,
    /// Fills pages with NaN.
    poison: fn(&mut B::Pages),
}

impl<B: Backend> Host<B> {
    /// Loads a model with room for small steps. `poison` fills pages with NaN.
    ///
    /// # Panics
    /// When the backend fails.
    pub fn new(backend: Arc<B>, files: Arc<ModelFiles>, poison: fn(&mut B::Pages)) -> Self {
        Self::with_pages(backend, files, poison, KV_BLOCKS)
    }

    /// As [`Self::new`], with a pool of so many pages.
    ///
    /// # Panics
    /// When the backend fails.
    pub fn with_pages(backend: Arc<B>, files: Arc<ModelFiles>, poison: fn(&mut B::Pages), pages: usize) -> Self {
        let options = LoadOptions {
            max_rows: MAX_ROWS,
            max_logit_rows: MAX_LOGIT_ROWS,
            max_position: MAX_ROWS,
            block_size: BLOCK,
        };
        let mut last = (0, 1);
        let model =
            Model::load(backend, Arc::clone(&files), &options, &mut |done, total| last = (done, total)).expect("loads");
        assert_eq!(last.0, last.1, "progress ends at the total");
        let act = model.new_activations().expect("memory");
        let kv = model.backend().new_pages(model.attention_spec(), model.layers(), pages).expect("memory");
        Self { model, files, tolerance: Tolerance::F32, act, kv, drawn: Vec::new(), poison }
    }

    /// The model's files.
    #[must_use]
    pub fn files(&self) -> &Arc<ModelFiles> {
        &self.files
    }

    /// An adapter, loaded into pages of its own that were full of NaN.
    ///
    /// # Panics
    /// When the model or the backend refuses it.
    pub fn load(&self, weights: &AdapterWeights) -> B::Adapter {
        let needed = self.model.adapter_pages(&weights.sizes());
        let (backend, spec) = (self.model.backend(), self.model.attention_spec());
        let mut pool = backend.new_pages(spec, self.model.layers(), needed).expect("memory");
        (self.poison)(&mut pool);
        let pages: Vec<u32> = (0..needed as u32).collect();
        let pages = backend.take_pages(&mut pool, &pages).expect("free pages");
        self.model.load_adapter(weights, pages).unwrap_or_else(|error| panic!("{}: {error}", weights.generation))
    }

    /// An adapter, loaded into pages of the pool that steps have their blocks in.
    ///
    /// # Panics
    /// When a page is not free, or the model or the backend refuses the adapter.
    pub fn load_into(&mut self, weights: &AdapterWeights, pages: &[u32]) -> B::Adapter {
        let pages = self.model.backend().take_pages(&mut self.kv, pages).expect("free pages");
        self.model.load_adapter(weights, pages).unwrap_or_else(|error| panic!("{}: {error}", weights.generation))
    }

    /// As an engine does before the first request, for decode steps of up to `rows` sequences; passes recorded.
    ///
    /// # Panics
    /// When the backend fails.
    pub fn get_ready(&mut self, rows: usize) -> usize {
        self.model.warm_up(&mut self.act, 0).expect("memory");
        self.model.record(&mut self.act, rows, &mut self.kv).expect("a sound device")
    }

    /// Fills all KV with NaN: what a step reads after this has been stored after this.
    pub fn forget(&mut self) {
        (self.poison)(&mut self.kv);
    }

    /// Computes one step and returns the logits of all its rows, `[rows, vocab]` per sequence.
    ///
    /// # Panics
    /// When it does not fit or the backend fails.
    pub fn step(&mut self, sequences: &[Rows<'_, B::Adapter>]) -> Vec<Vec<f32>> {
        let counts: Vec<usize> = sequences.iter().map(|sequence| sequence.tokens.len()).collect();
        let wanted: Vec<u32> = (0..counts.iter().sum::<usize>() as u32).collect();
        let vocab = self.model.shape().vocab;
        let all = self.step_wanted(sequences, &wanted);
        let mut rest = all.as_slice();
        counts.iter().map(|rows| rest.split_off(..rows * vocab).expect("a row for each token").to_vec()).collect()
    }

    /// Computes one step and returns the logits of the wanted rows of all sequences together, `[wanted, vocab]`.
    ///
    /// # Panics
    /// When it does not fit or the backend fails.
    pub fn step_wanted(&mut self, sequences: &[Rows<'_, B::Adapter>], wanted: &[u32]) -> Vec<f32> {
        self.step_drawn(sequences, &[], wanted)
    }

    /// As [`Self::step_wanted`], with tokens that only the device knows.
    ///
    /// # Panics
    /// When it does not fit or the backend fails.
    pub fn step_drawn(&mut self, sequences: &[Rows<'_, B::Adapter>], drawn: &[DrawnToken], wanted: &[u32]) -> Vec<f32> {
        let mut tokens = Vec::new();
        let mut positions = Vec::new();
        let mut spans = Vec::new();
        let mut tables = Vec::new();
        let mut adapters = Vec::new();
        for sequence in sequences {
            let rows = sequence.tokens.len();
            spans.push(SequenceRows { row: tokens.len(), rows, table: tables.len(), blocks: sequence.blocks.len() });
            tokens.extend(sequence.tokens);
            positions.extend((sequence.start..sequence.start + rows).map(|position| position as u32));
            tables.extend(sequence.blocks);
            adapters.extend(std::iter::repeat_n(sequence.adapter, rows));
        }
        let step = StepRows { tokens: &tokens, drawn, positions: &positions, sequences: &spans, block_tables: &tables };
        let segments = segments(&adapters);
        let lora = LoraRows { segments: &segments };
        let adapters: Vec<_> = wanted.iter().map(|row| adapters[*row as usize]).collect();
        let wanted_segments = self::segments(&adapters);
        let wanted_lora = LoraRows { segments: &wanted_segments };
        self.model.forward(&mut self.act, &step, &lora, (wanted, &wanted_lora), &mut self.kv).expect("the step fits");
        let mut all = Vec::with_capacity(wanted.len() * self.model.shape().vocab);
        let rows: Vec<u32> = (0..wanted.len() as u32).collect();
        for chunk in rows.chunks(MAX_LOGIT_ROWS) {
            let first = chunk[0] as usize;
            let segments = self::segments(&adapters[first..first + chunk.len()]);
            let lora = LoraRows { segments: &segments };
            let logits = self.model.logits(&mut self.act, chunk, &lora).expect("the rows fit");
            all.extend(self.model.backend().read_tensor(logits));
        }
        assert_eq!(all.len(), wanted.len() * self.model.shape().vocab);
        all
    }

    /// Enqueues a draw from each of these among the wanted rows of the last step, in that order, with their adapters.
    ///
    /// # Panics
    /// When they do not fit or the backend fails.
    pub fn enqueue_draws(&mut self, rows: &[u32], adapters: &[Option<&B::Adapter>]) {
        let segments = segments(adapters);
        let logits = self.model.logits(&mut self.act, rows, &LoraRows { segments: &segments }).expect("the rows fit");
        let params = SamplingParams { temperature: 1.5, seed: 11, ..SamplingParams::default() };
        let draw =
            SampleRow::Draw { params: &params, sample_index: 0, prompt: &[], generated: &[], banned: &[], top: 0 };
        let draws = vec![draw; rows.len()];
        self.model.backend().enqueue_sample(logits, &draws, &mut self.drawn).expect("a sound device");
    }

    /// What [`Self::enqueue_draws`] drew that has not been collected.
    ///
    /// # Panics
    /// When nothing was enqueued or the backend fails.
    pub fn collect_draws(&mut self) -> Vec<Token> {
        self.model.backend().collect_sample(&mut self.drawn).expect("a sound device");
        self.drawn.iter().map(|row| row.token).collect()
    }

    /// Logits of a prompt alone, in one step.
    ///
    /// # Panics
    /// When it does not fit or the backend fails.
    pub fn prompt(&mut self, tokens: &[Token], adapter: Option<&B::Adapter>) -> Vec<f32> {
        let blocks = blocks_for(tokens.len(), 0);
        self.step(&[Rows { tokens, start: 0, blocks: &blocks, adapter }]).remove(0)
    }

    /// Checks prompt log-probabilities, the ten best after each prompt, and the greedy continuations, decoded token by
    /// token. As many cases as fit share each step, as they would in a server. The largest difference of a log-probability.
    ///
    /// # Panics
    /// When an answer is not within the tolerance.
    pub fn check(&mut self, cases: &[Case<'_, B::Adapter>]) -> f64 {
        assert!(!cases.is_empty());
        let mut worst = 0.0_f64;
        let mut rest = cases;
        while !rest.is_empty() {
            let fits = (1..=rest.len()).take_while(|count| Self::fits(&rest[..*count])).last().expect("one case fits");
            worst = worst.max(self.check_together(&rest[..fits]));
            rest = &rest[fits..];
        }
        worst
    }

    fn fits(cases: &[Case<'_, B::Adapter>]) -> bool {
        let rows: usize = cases.iter().map(|case| case.expected.prompt_ids.len()).sum();
        let blocks: usize = cases.iter().map(Case::blocks).sum();
        rows <= MAX_ROWS && blocks <= KV_BLOCKS
    }

    fn check_together(&mut self, cases: &[Case<'_, B::Adapter>]) -> f64 {
        let mut free: Vec<u32> = (0..KV_BLOCKS as u32).collect();
        // Taken from the end: a block table is neither ascending nor a range from 0.
        let tables: Vec<Vec<u32>> = cases.iter().map(|case| free.split_off(free.len() - case.blocks())).collect();
        let tables: Vec<Vec<u32>> = tables.into_iter().map(|table| table.into_iter().rev().collect()).collect();
        let prompts = cases.iter().zip(&tables).map(|(case, blocks)| Rows {
            tokens: &case.expected.prompt_ids,
            start: 0,
            blocks,
            adapter: case.adapter,
        });
        let logits = self.step(&prompts.collect::<Vec<_>>());
        let vocab = self.model.shape().vocab;
        let tolerance = self.tolerance;
        let mut worst = 0.0_f64;
        let mut first = |(case, logits): (&Case<'_, B::Adapter>, &Vec<f32>)| {
            let (token, difference) = case.check_prompt(logits, vocab, tolerance);
            worst = worst.max(difference);
            Some(token)
        };
        let mut next: Vec<Option<Token>> = cases.iter().zip(&logits).map(&mut first).collect();
        let mut i = 0;
        loop {
            for (case, next) in cases.iter().zip(&mut next) {
                *next = next.filter(|token| case.check_token(i, *token, tolerance));
            }
            let going: Vec<usize> = (0..cases.len()).filter(|case| next[*case].is_some()).collect();
            if going.is_empty() {
                return worst;
            }
            let tokens: Vec<[Token; 1]> = going.iter().filter_map(|case| next[*case].map(|token| [token])).collect();
            let rows = going.iter().zip(&tokens).map(|(case, token)| Rows {
                tokens: token,
                start: cases[*case].expected.prompt_ids.len() + i,
                blocks: &tables[*case],
                adapter: cases[*case].adapter,
            });
            for (case, logits) in going.iter().zip(self.step(&rows.collect::<Vec<_>>())) {
                next[*case] = Some(best(&log_softmax(&logits)));
            }
            i += 1;
        }
    }
}

/// A recorded answer and the adapter it was recorded with.
pub struct Case<'a, A> {
    /// Where it is from.
    pub name: String,
    /// The answer.
    pub expected: Expected,
    /// The adapter.
    pub adapter: Option<&'a A>,
}

impl<'a, A> Case<'a, A> {
    /// All answers of an `expected.json`.
    ///
    /// # Panics
    /// When it cannot be read or has none.
    #[must_use]
    pub fn read(answers: &Path, adapter: Option<&'a A>) -> Vec<Self> {
        let name = answers.display();
        let text = std::fs::read_to_string(answers).unwrap_or_else(|error| panic!("{name}: {error}"));
        let all: Vec<Expected> = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(!all.is_empty(), "{name} has no cases");
        let case = |(i, expected)| Case { name: format!("{name}, prompt {i}"), expected, adapter };
        all.into_iter().enumerate().map(case).collect()
    }

    fn blocks(&self) -> usize {
        (self.expected.prompt_ids.len() + self.expected.greedy.len()).div_ceil(BLOCK)
    }

    /// Checks the prompt's rows: the most probable next token, and the largest difference of a log-probability.
    fn check_prompt(&self, logits: &[f32], vocab: usize, tolerance: Tolerance) -> (Token, f64) {
        let Expected { prompt_ids: prompt, prompt_logprobs, top10, .. } = &self.expected;
        let rows: Vec<Vec<f64>> = logits.chunks_exact(vocab).map(log_softmax).collect();
        let mut worst = 0.0_f64;
        let mut close = |found: f64, recorded: f64, what: &str| {
            let (name, difference) = (&self.name, (found - recorded).abs());
            assert!(difference <= tolerance.logprob, "{name}: {what} is {found}, recorded {recorded}");
            worst = worst.max(difference);
        };
        assert_eq!(prompt_logprobs.len(), prompt.len() - 1, "{}", self.name);
        for (i, recorded) in prompt_logprobs.iter().enumerate() {
            close(rows[i][prompt[i + 1] as usize], *recorded, &format!("prompt token {}", i + 1));
        }
        let last = rows.last().expect("a prompt has tokens");
        assert_eq!(top10.len(), 10, "{}", self.name);
        for (token, recorded) in top10 {
            close(last[*token as usize], *recorded, &format!("top token {token}"));
        }
        (best(last), worst)
    }

    /// Checks generated token `i`; whether to go on.
    fn check_token(&self, i: usize, token: Token, tolerance: Tolerance) -> bool {
        let Expected { greedy, greedy_margin, .. } = &self.expected;
        assert!(!greedy.is_empty() && greedy.len() == greedy_margin.len(), "{}", self.name);
        if token != greedy[i] {
            let (name, recorded, margin) = (&self.name, greedy[i], greedy_margin[i]);
            assert!(
                margin <= tolerance.margin,
                "{name}: generated token {i} is {token}, recorded {recorded}, margin {margin}"
            );
            return false; // A tie within rounding: what follows continues another text.
        }
        i + 1 < greedy.len()
    }
}

/// That a pass which a backend recorded and replays has the bits of one it runs, whatever adapters are in it: sequences that decode,
/// under several mixes of `adapters` and none, all rows wanted (which may be replayed) and one less (which is not). How many rows
/// were compared.
///
/// # Panics
/// When a bit differs.
pub fn replayed_passes_have_the_bits_of_run_ones<B: Backend>(host: &mut Host<B>, adapters: &[B::Adapter; 2]) -> usize {
    let prompts: [&[Token]; 4] = [&[1, 2, 3, 4, 5], &[9], &[7; 20], &[30, 29, 28]];
    let tables: Vec<Vec<u32>> = (0..4).map(|i| blocks_for(32, i * 2)).collect();
    let [one, other] = adapters;
    let mixes: [[Option<&B::Adapter>; 4]; 4] =
        [[None; 4], [Some(one), Some(one), None, Some(other)], [Some(one); 4], [None, None, Some(other), Some(one)]];
    let mut compared = 0;
    for (round, mix) in mixes.iter().enumerate() {
        host.forget();
        let rows = |i: usize| Rows { tokens: prompts[i], start: 0, blocks: &tables[i], adapter: mix[i] };
        host.step(&[rows(0), rows(1), rows(2), rows(3)]);
        for count in [4, 3] {
            let next: Vec<_> = (0..count)
                .map(|i| Rows { tokens: &[11], start: prompts[i].len(), blocks: &tables[i], adapter: mix[i] })
                .collect();
            let wanted: Vec<u32> = (0..count as u32 - 1).collect();
            let run = host.step_wanted(&next, &wanted);
            let mut replayed = host.step(&next);
            // Also the row that the pass before was not asked for.
            let finite = replayed.iter().flatten().chain(&run).all(|logit| logit.is_finite());
            assert!(finite, "round {round}, {count} rows: a logit is not finite");
            replayed.truncate(wanted.len());
            let replayed = replayed.concat();
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert!(bits(&replayed) == bits(&run), "round {round}, {count} rows: a replayed pass has other bits");
            compared += wanted.len();
        }
    }
    compared
}

/// That a step which takes tokens from a sampling has the bits of one which is given them, whatever adapters are in it: where every
/// sequence decodes (which may be replayed), and where one has more rows (which is not). The backend is an
/// [asynchronous](Backend::is_asynchronous) one. How many rows were compared.
///
/// # Panics
/// When a bit differs.
pub fn drawn_tokens_give_the_bits_of_written_ones<B: Backend>(host: &mut Host<B>, adapters: &[B::Adapter; 2]) -> usize {
    let prompts: [Vec<Token>; 4] = [vec![1, 2, 3, 4, 5], vec![9], vec![7; 20], vec![30, 29, 28]];
    let tables: [Vec<u32>; 4] = [0, 2, 4, 6].map(|first| blocks_for(32, first));
    let ends = prompts.each_ref().map(Vec::len);
    let [one, other] = adapters;
    // The sequence of each row of the sampling. The second is given its next tokens all the same.
    const DRAWS: [usize; 4] = [2, 3, 1, 0];
    let mut compared = 0;
    for (mix, chunk) in [([None; 4], 1), ([None; 4], 3), ([Some(one), Some(other), None, Some(other)], 1)] {
        let draw = |host: &mut Host<B>| {
            host.forget();
            host.step_wanted(&rows_of(&prompts, [0; 4], &tables, mix), &[4, 5, 25, 28]);
            host.enqueue_draws(&DRAWS.map(|i| i as u32), &DRAWS.map(|i| mix[i]));
        };
        let next = |tokens: [Token; 4]| [vec![tokens[0]], vec![8; chunk], vec![tokens[2]], vec![tokens[3]]];
        draw(host);
        let drawn = host.collect_draws();
        let mut tokens = [0; 4];
        DRAWS.iter().zip(&drawn).for_each(|(i, token)| tokens[*i] = *token);
        let wanted: Vec<u32> = (0..chunk as u32 + 3).collect();
        let written = host.step_wanted(&rows_of(&next(tokens), ends, &tables, mix), &wanted);

        draw(host);
        let [third, last] = [1, 2].map(|row| (row + chunk) as u32);
        let taken = [(0, 3), (third, 0), (last, 1)].map(|(row, sample)| DrawnToken { row, sample });
        let found = host.step_drawn(&rows_of(&next([0; 4]), ends, &tables, mix), &taken, &wanted);
        assert_eq!(host.collect_draws(), drawn, "what is drawn twice from the same logits");
        assert!(written.iter().all(|logit| logit.is_finite()), "a logit is not finite");
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert!(bits(&found) == bits(&written), "{tokens:?}, chunks of {chunk}: drawn tokens give other bits");
        compared += wanted.len();
    }
    compared
}

/// Rows of four sequences from the positions `starts` on.
fn rows_of<'a, A>(
    tokens: &'a [Vec<Token>; 4],
    starts: [usize; 4],
    tables: &'a [Vec<u32>; 4],
    adapters: [Option<&'a A>; 4],
) -> [Rows<'a, A>; 4] {
    [0, 1, 2, 3].map(|i| Rows { tokens: &tokens[i], start: starts[i], blocks: &tables[i], adapter: adapters[i] })
}

/// Block numbers `first..` for so many tokens.
#[must_use]
pub fn blocks_for(tokens: usize, first: u32) -> Vec<u32> {
    (first..first + tokens.div_ceil(BLOCK) as u32).collect()
}

/// Runs of the same adapter; none at all when no row has one.
#[must_use]
pub fn segments<'a, A>(adapters: &[Option<&'a A>]) -> Vec<LoraSegment<'a, A>> {
    let same = |a: Option<&A>, b: Option<&A>| match (a, b) {
        (Some(a), Some(b)) => std::ptr::eq(a, b),
        (a, b) => a.is_none() && b.is_none(),
    };
    let mut segments: Vec<LoraSegment<'a, A>> = Vec::new();
    for (row, adapter) in adapters.iter().enumerate() {
        match segments.last_mut() {
            Some(last) if same(last.adapter, *adapter) => last.rows += 1,
            _ => segments.push(LoraSegment { row, rows: 1, adapter: *adapter }),
        }
    }
    if adapters.iter().all(Option::is_none) { Vec::new() } else { segments }
}

/// ln softmax of a row of logits.
#[must_use]
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    let log_sum = sum.ln() + f64::from(max);
    logits.iter().map(|logit| f64::from(*logit) - log_sum).collect()
}

/// The most probable token, the lower one of equals.
#[must_use]
pub fn best(values: &[f64]) -> Token {
    let mut best = 0;
    for (token, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = token;
        }
    }
    best as Token
}
