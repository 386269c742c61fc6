//! Random steps: sequences that start, are prefilled in chunks of any size, decode, end and break off, under adapters of mixed ranks
//! that come into pages of the same pool and go again. Every step is compared with an expectation of its own:
//!
//! - one of its sequences is computed once more alone, and must have the same bits;
//! - a sequence that ends is computed once more from its first token, in one pass, in other pages, and must end in the same bits;
//! - some of those are also computed by an exact backend, and must be near it.
//!
//! A step has at most [`ROWS_MAX`] rows: in larger ones a matrix product may join its sums in another order.

use std::time::Instant;

use openlora_kernels::Backend;
use openlora_kernels::conformance::Random;
use openlora_model::conformance::{Host, Rows, best, blocks_for};
use openlora_types::{AdapterWeights, ModelShape, Module, Token};

use crate::adapters::random_weights;

/// Rows of a step.
pub const ROWS_MAX: usize = 64;
/// Tokens of a sequence, prompt and answer.
const LENGTH_MAX: usize = 60;
const BLOCK: usize = 16;
const SEQUENCES_MAX: usize = 12;
const RESIDENT_MAX: usize = 8;
/// Ranks, each as likely as the others.
const RANKS: [usize; 8] = [1, 4, 8, 16, 33, 64, 128, 256];
/// Pages of the pool: not enough for everything at once.
pub const PAGES: usize = 384;
/// Of the sequences that end, every which one is computed exactly.
const EXACT_EVERY: usize = 16;

/// How many steps, and how far from the exact backend they may lead.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Steps.
    pub steps: usize,
    /// No step is begun after this.
    pub until: Instant,
    /// Largest ||logits - exact|| / ||exact||.
    pub distance: f64,
    /// What the randomness starts from.
    pub seed: u64,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Steps.
    pub steps: usize,
    /// Sequences of a step computed alone, and whole sequences from their first token.
    pub compared: usize,
    /// Of these, compared with the exact backend.
    pub exact: usize,
    /// Adapters that came and went.
    pub loads: usize,
    /// Largest distance from the exact backend.
    pub distance: f64,
}

struct Resident<A> {
    number: usize,
    weights: AdapterWeights,
    adapter: A,
    pages: Vec<u32>,
}

struct Sequence {
    tokens: Vec<Token>,
    computed: usize,
    length: usize,
    blocks: Vec<u32>,
    /// Number of its adapter.
    adapter: Option<usize>,
    /// After its last token so far.
    logits: Vec<f32>,
}

struct World<'a, B: Backend, E: Backend> {
    host: &'a mut Host<B>,
    exact: &'a mut Host<E>,
    shape: ModelShape,
    random: Random,
    free: Vec<u32>,
    resident: Vec<Resident<B::Adapter>>,
    sequences: Vec<Sequence>,
    next_adapter: usize,
    ended: usize,
    limits: Limits,
    outcome: Outcome,
}

/// Runs random steps on `host`, whose pool has [`PAGES`] pages; `exact` has the same model.
///
/// # Panics
/// When a step is not what is expected, with seed and step.
pub fn run<B: Backend, E: Backend>(host: &mut Host<B>, exact: &mut Host<E>, limits: Limits) -> Outcome {
    host.forget();
    let shape = host.model.shape().clone();
    let random = Random::new(limits.seed);
    let mut world = World {
        host,
        exact,
        shape,
        random,
        free: (0..PAGES as u32).collect(),
        resident: Vec::new(),
        sequences: Vec::new(),
        next_adapter: 0,
        ended: 0,
        limits,
        outcome: Outcome::default(),
    };
    while world.outcome.steps < limits.steps && Instant::now() < limits.until {
        world.change();
        world.step();
    }
    world.outcome
}

impl<B: Backend, E: Backend> World<'_, B, E> {
    fn chance(&mut self, one_in: usize) -> bool {
        self.random.below(one_in) == 0
    }

    /// Where a failure happened.
    fn place(&self, what: &str) -> String {
        format!("seed {}, step {}: {what}", self.limits.seed, self.outcome.steps)
    }

    /// A sequence's part of a step.
    fn describe(&self, sequence: usize, rows: usize) -> String {
        let Sequence { computed, adapter, blocks, .. } = &self.sequences[sequence];
        let rows = format!("{rows} rows from position {computed} in pages {blocks:?}");
        let Some(number) = adapter else { return format!("{rows}, no adapter") };
        let Resident { weights, pages, .. } = resident_of(&self.resident, *number);
        let modules: Vec<_> =
            weights.sites.iter().take_while(|site| site.site.layer == 0).map(|s| s.site.module).collect();
        format!("{rows}, adapter {number} of rank {} on {modules:?} in {} pages", weights.rank_max(), pages.len())
    }

    /// Adapters come and go; sequences start and break off.
    fn change(&mut self) {
        if self.resident.len() < 2 || (self.resident.len() < RESIDENT_MAX && self.chance(6)) {
            self.load();
        }
        if self.chance(8) {
            self.drop_one();
        }
        if self.sequences.is_empty() || (self.sequences.len() < SEQUENCES_MAX && self.chance(2)) {
            let tokens = (0..1 + self.random.below(40)).map(|_| self.random.below(self.shape.vocab) as Token).collect();
            let chosen = self.random.below(self.resident.len() + 1);
            let adapter = self.resident.get(chosen).map(|resident| resident.number);
            let length = LENGTH_MAX - self.random.below(18);
            let (blocks, logits) = (Vec::new(), Vec::new());
            self.sequences.push(Sequence { tokens, computed: 0, length, blocks, adapter, logits });
        }
        if self.chance(25) {
            let sequence = self.sequences.swap_remove(self.random.below(self.sequences.len()));
            self.give_back(sequence.blocks);
        }
    }

    fn load(&mut self) {
        let rank = RANKS[self.random.below(RANKS.len())];
        let mut modules: Vec<Module> = Module::IN_LAYER.into_iter().filter(|_| self.random.below(2) == 0).collect();
        if modules.is_empty() {
            modules.push(Module::Q);
        }
        let seed = self.limits.seed.wrapping_mul(1 << 20).wrapping_add(self.next_adapter as u64);
        let weights = random_weights(&self.shape, rank, &modules, seed);
        let needed = self.host.model.adapter_pages(&weights.sizes());
        // Some pages stay for sequences.
        if needed + PAGES / 8 > self.free.len() {
            return;
        }
        let pages = self.free.split_off(self.free.len() - needed);
        let adapter = self.host.load_into(&weights, &pages);
        self.resident.push(Resident { number: self.next_adapter, weights, adapter, pages });
        self.next_adapter += 1;
        self.outcome.loads += 1;
    }

    /// Drops an adapter that no sequence uses.
    fn drop_one(&mut self) {
        let used = |resident: &Resident<_>| self.sequences.iter().any(|s| s.adapter == Some(resident.number));
        if let Some(at) = self.resident.iter().position(|resident| !used(resident)) {
            let Resident { adapter, pages, .. } = self.resident.swap_remove(at);
            drop(adapter);
            self.give_back(pages);
        }
    }

    /// Pages that are free again, in any order among the others.
    fn give_back(&mut self, pages: Vec<u32>) {
        for page in pages {
            let at = self.random.below(self.free.len() + 1);
            self.free.push(page);
            let last = self.free.len() - 1;
            self.free.swap(at, last);
        }
    }

    /// Which sequences are in the next step, with how many rows, neighbours by adapter.
    fn choose(&mut self) -> Vec<(usize, usize)> {
        let decode = self.chance(2);
        let mut left = ROWS_MAX;
        let mut chosen: Vec<(usize, usize)> = Vec::new();
        for i in 0..self.sequences.len() {
            let waiting = self.sequences[i].tokens.len() - self.sequences[i].computed;
            let rows = waiting.min(1 + self.random.below(24)).min(left);
            if rows == 0 || (decode && waiting > 1) || self.chance(6) {
                continue;
            }
            let blocks = (self.sequences[i].computed + rows).div_ceil(BLOCK);
            let missing = blocks.saturating_sub(self.sequences[i].blocks.len());
            // One whole sequence more must have room for the comparison at its end.
            if missing + LENGTH_MAX.div_ceil(BLOCK) > self.free.len() {
                continue;
            }
            let more = self.free.split_off(self.free.len() - missing);
            self.sequences[i].blocks.extend(more);
            left -= rows;
            chosen.push((i, rows));
        }
        chosen.sort_by_key(|(i, _)| self.sequences[*i].adapter);
        chosen
    }

    /// Logits after the last row of each of `chosen`.
    fn compute(&mut self, chosen: &[(usize, usize)]) -> Vec<Vec<f32>> {
        let row = |(i, rows): &(usize, usize)| {
            let Sequence { tokens, computed, blocks, adapter, .. } = &self.sequences[*i];
            let adapter = adapter.map(|number| &resident_of(&self.resident, number).adapter);
            Rows { tokens: &tokens[*computed..computed + rows], start: *computed, blocks, adapter }
        };
        let rows: Vec<_> = chosen.iter().map(row).collect();
        let mut end = 0;
        let wanted: Vec<u32> = chosen
            .iter()
            .map(|(_, rows)| {
                end += rows;
                end as u32 - 1
            })
            .collect();
        let logits = self.host.step_wanted(&rows, &wanted);
        logits.chunks_exact(self.shape.vocab).map(<[f32]>::to_vec).collect()
    }

    fn step(&mut self) {
        let chosen = self.choose();
        if chosen.is_empty() {
            // Only decoding was asked for and everything is prefilled yet, or the pages are taken: something will change.
            return;
        }
        self.outcome.steps += 1;
        let all = self.compute(&chosen);
        for ((i, rows), logits) in chosen.iter().zip(&all) {
            let finite = logits.iter().all(|logit| logit.is_finite());
            assert!(finite, "{}: a logit is not finite", self.place(&self.describe(*i, *rows)));
        }
        let one = self.random.below(chosen.len());
        let alone = self.compute(&chosen[one..=one]).remove(0);
        let (i, rows) = chosen[one];
        let what = self.describe(i, rows);
        assert!(bits(&alone) == bits(&all[one]), "{}: other bits alone", self.place(&what));
        self.outcome.compared += 1;
        for ((i, rows), logits) in chosen.iter().zip(all) {
            let sequence = &mut self.sequences[*i];
            sequence.computed += rows;
            if sequence.computed == sequence.tokens.len() && sequence.tokens.len() < sequence.length {
                let logprobs: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
                sequence.tokens.push(best(&logprobs));
            }
            sequence.logits = logits;
        }
        while let Some(at) = self.sequences.iter().position(|s| s.computed == s.length) {
            let sequence = self.sequences.swap_remove(at);
            self.end(sequence);
        }
    }

    /// Computes a sequence that has ended once more, from its first token.
    fn end(&mut self, sequence: Sequence) {
        self.ended += 1;
        let Sequence { tokens, blocks, adapter, logits, .. } = sequence;
        let resident = adapter.map(|number| resident_of(&self.resident, number));
        let others = &self.free[self.free.len() - tokens.len().div_ceil(BLOCK)..];
        let whole = Rows { tokens: &tokens, start: 0, blocks: others, adapter: resident.map(|of| &of.adapter) };
        let found = self.host.step_wanted(&[whole], &[tokens.len() as u32 - 1]);
        let what = format!("a sequence under adapter {adapter:?} from its first token");
        assert!(bits(&found) == bits(&logits), "{}: other bits", self.place(&what));
        self.outcome.compared += 1;
        if self.ended % EXACT_EVERY == 1 {
            let loaded = resident.map(|of| self.exact.load(&of.weights));
            let exact = blocks_for(tokens.len(), 0);
            let rows = Rows { tokens: &tokens, start: 0, blocks: &exact, adapter: loaded.as_ref() };
            let expected = self.exact.step_wanted(&[rows], &[tokens.len() as u32 - 1]);
            let distance = distance(&found, &expected);
            let near = distance <= self.limits.distance;
            assert!(near, "{}", self.place(&format!("{what}: {distance} from the exact backend")));
            self.outcome.distance = self.outcome.distance.max(distance);
            self.outcome.exact += 1;
        }
        self.give_back(blocks);
    }
}

fn resident_of<A>(resident: &[Resident<A>], number: usize) -> &Resident<A> {
    resident.iter().find(|resident| resident.number == number).expect("adapters in use stay")
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// ||found - expected|| / ||expected||
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(found, expected)| found - expected));
    difference / norm(&mut expected.iter().copied())
}
