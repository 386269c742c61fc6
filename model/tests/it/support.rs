//! Runs a model on a backend as the engine would, and compares with recorded answers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use openlora_adapters::{Actor, AdapterStore, BaseRows, StoreConfig};
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::{Backend, LoraRows, LoraSegment, Precision, SequenceRows, StepRows};
use openlora_model::{Activations, LoadOptions, Model, ModelFiles};
use openlora_types::{AdapterWeights, Alias, Limits, Module, Site, Token};
use serde::Deserialize;

pub(crate) type Adapter = <Cpu as Backend>::Adapter;

const BLOCK: usize = 16;
const MAX_ROWS: usize = 640;
const MAX_LOGIT_ROWS: usize = 64;
const KV_BLOCKS: usize = 96;

/// Largest difference of a log-probability in f32 mode.
pub(crate) const LOGPROB_TOLERANCE: f64 = 2e-3;
/// A greedy token must be equal where the recorded gap between best and second best exceeds this.
pub(crate) const MARGIN: f64 = 1e-2;

pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(path)
}

/// SmolLM2-135M-Instruct.
pub(crate) fn real_model() -> PathBuf {
    let path = std::env::var_os("OPENLORA_TEST_MODEL").map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            Path::new(&home).join(".cache/openlora/models/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    assert!(path.is_file(), "{} is missing: run scripts/fetch-model.sh or set OPENLORA_TEST_MODEL", path.display());
    path
}

/// One entry of an `expected.json`.
#[derive(Deserialize)]
pub(crate) struct Expected {
    pub(crate) prompt_ids: Vec<Token>,
    pub(crate) prompt_logprobs: Vec<f64>,
    pub(crate) top10: Vec<(Token, f64)>,
    pub(crate) greedy: Vec<Token>,
    pub(crate) greedy_margin: Vec<f64>,
}

pub(crate) fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> T {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The subfolders of a fixture folder, by name.
pub(crate) fn folders(path: &str) -> Vec<String> {
    let entries = std::fs::read_dir(fixture(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("readable"))
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

/// Gives the adapters room the base rows it compares copies with.
struct Base(Arc<ModelFiles>);

impl BaseRows for Base {
    fn read_row(&self, module: Module, row: usize, out: &mut [f32]) {
        self.0.read_row(Site { layer: 0, module }, row, out);
    }
}

/// Parses a PEFT folder as a server would: registered in a store, then resolved.
pub(crate) fn read_adapter(path: &Path, files: &Arc<ModelFiles>) -> Arc<AdapterWeights> {
    let data = tempfile::tempdir().expect("temporary folder");
    let root = path.parent().expect("a folder beside others").canonicalize().expect("exists");
    let config = StoreConfig {
        data_dir: data.path().to_owned(),
        allowed_roots: vec![root.clone()],
        host_cache_bytes: 1 << 30,
        ..StoreConfig::default()
    };
    let limits = Limits::default();
    let store = AdapterStore::open(config, files.shape(), limits.clone()).expect("a fresh store opens");
    let store = store.with_base(Arc::new(Base(Arc::clone(files))));
    let alias = Alias::parse("alias", "adapter", &limits).expect("a plain name");
    let folder = root.join(path.file_name().expect("a named folder"));
    let actor = Actor { name: "tests".into(), admin: true };
    store.register_folder(&alias, &folder, &actor, false).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    store.resolve("adapter").expect("just registered").load().expect("just written")
}

/// One sequence's rows of a step.
pub(crate) struct Rows<'a, A = Adapter> {
    /// Tokens to compute.
    pub(crate) tokens: &'a [Token],
    /// Position of the first.
    pub(crate) start: usize,
    /// KV blocks of the sequence.
    pub(crate) blocks: &'a [u32],
    /// Its adapter.
    pub(crate) adapter: Option<&'a A>,
}

impl<A> Clone for Rows<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<A> Copy for Rows<'_, A> {}

/// A loaded model with the buffers of one step thread.
pub(crate) struct Host<B: Backend = Cpu> {
    pub(crate) model: Model<B>,
    files: Arc<ModelFiles>,
    act: Activations<B>,
    kv: B::Pages,
    /// Fills pages with NaN.
    poison: fn(&mut B::Pages),
}

impl Host {
    pub(crate) fn open(path: &Path, precision: Precision) -> Self {
        let backend = Arc::new(Cpu::new(2, precision, Isa::detect()).expect("threads start"));
        Self::on(backend, path, |pages| pages.fill(f32::NAN))
    }
}

impl<B: Backend> Host<B> {
    pub(crate) fn on(backend: Arc<B>, path: &Path, poison: fn(&mut B::Pages)) -> Self {
        let files =
            ModelFiles::open(path, &Limits::default()).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let options = LoadOptions {
            max_rows: MAX_ROWS,
            max_logit_rows: MAX_LOGIT_ROWS,
            max_position: MAX_ROWS,
            block_size: BLOCK,
        };
        let mut last = (0, 1);
        let files = Arc::new(files);
        let model =
            Model::load(backend, Arc::clone(&files), &options, &mut |done, total| last = (done, total)).expect("loads");
        assert_eq!(last.0, last.1, "progress ends at the total");
        let act = model.new_activations().expect("memory");
        let kv = model.backend().new_pages(model.attention_spec(), model.layers(), KV_BLOCKS).expect("memory");
        Self { model, files, act, kv, poison }
    }

    /// As an engine does before the first request, for steps of up to `rows` sequences; passes recorded.
    pub(crate) fn get_ready(&mut self, rows: usize) -> usize {
        self.model.warm_up(&mut self.act, 0).expect("memory");
        self.model.record(&mut self.act, rows, &mut self.kv).expect("a sound device")
    }

    /// The PEFT adapter in a fixture folder, loaded.
    pub(crate) fn adapter(&self, folder: &str) -> B::Adapter {
        let weights = read_adapter(&fixture(folder), &self.files);
        let needed = self.model.adapter_pages(&weights.sizes());
        let (backend, spec) = (self.model.backend(), self.model.attention_spec());
        let mut pool = backend.new_pages(spec, self.model.layers(), needed).expect("memory");
        (self.poison)(&mut pool);
        let pages: Vec<u32> = (0..needed as u32).collect();
        let pages = backend.take_pages(&mut pool, &pages).expect("free pages");
        self.model.load_adapter(&weights, pages).unwrap_or_else(|error| panic!("{folder}: {error}"))
    }

    /// Fills all KV with NaN: what a step reads after this has been stored after this.
    pub(crate) fn forget(&mut self) {
        (self.poison)(&mut self.kv);
    }

    /// Computes one step and returns the logits of all its rows, `[rows, vocab]` per sequence.
    pub(crate) fn step(&mut self, sequences: &[Rows<'_, B::Adapter>]) -> Vec<Vec<f32>> {
        let counts: Vec<usize> = sequences.iter().map(|sequence| sequence.tokens.len()).collect();
        let wanted: Vec<u32> = (0..counts.iter().sum::<usize>() as u32).collect();
        let vocab = self.model.shape().vocab;
        let all = self.step_wanted(sequences, &wanted);
        let mut rest = all.as_slice();
        counts.iter().map(|rows| rest.split_off(..rows * vocab).expect("a row for each token").to_vec()).collect()
    }

    /// Computes one step and returns the logits of the wanted rows of all sequences together, `[wanted, vocab]`.
    pub(crate) fn step_wanted(&mut self, sequences: &[Rows<'_, B::Adapter>], wanted: &[u32]) -> Vec<f32> {
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
        let step = StepRows { tokens: &tokens, positions: &positions, sequences: &spans, block_tables: &tables };
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

    /// Logits of a prompt alone, in one step.
    pub(crate) fn prompt(&mut self, tokens: &[Token], adapter: Option<&B::Adapter>) -> Vec<f32> {
        let blocks = blocks_for(tokens.len(), 0);
        self.step(&[Rows { tokens, start: 0, blocks: &blocks, adapter }]).remove(0)
    }

    /// Checks prompt log-probabilities, the ten best after each prompt, and the greedy continuations, decoded token by
    /// token. As many cases as fit share each step, as they would in a server.
    pub(crate) fn check(&mut self, cases: &[Case<'_, B::Adapter>]) {
        assert!(!cases.is_empty());
        let mut rest = cases;
        while !rest.is_empty() {
            let fits = (1..=rest.len()).take_while(|count| Self::fits(&rest[..*count])).last().expect("one case fits");
            self.check_together(&rest[..fits]);
            rest = &rest[fits..];
        }
    }

    fn fits(cases: &[Case<'_, B::Adapter>]) -> bool {
        let rows: usize = cases.iter().map(|case| case.expected.prompt_ids.len()).sum();
        let blocks: usize = cases.iter().map(Case::blocks).sum();
        rows <= MAX_ROWS && blocks <= KV_BLOCKS
    }

    fn check_together(&mut self, cases: &[Case<'_, B::Adapter>]) {
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
        let mut next: Vec<Option<Token>> =
            cases.iter().zip(&logits).map(|(case, logits)| Some(case.check_prompt(logits, vocab))).collect();
        for i in 0.. {
            for (case, next) in cases.iter().zip(&mut next) {
                *next = next.filter(|token| case.check_token(i, *token));
            }
            let going: Vec<usize> = (0..cases.len()).filter(|case| next[*case].is_some()).collect();
            if going.is_empty() {
                return;
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
        }
    }
}

/// A recorded answer and the adapter it was recorded with.
pub(crate) struct Case<'a, A = Adapter> {
    pub(crate) name: String,
    pub(crate) expected: Expected,
    pub(crate) adapter: Option<&'a A>,
}

impl<'a, A> Case<'a, A> {
    /// All answers of an `expected.json`.
    pub(crate) fn read(answers: &str, adapter: Option<&'a A>) -> Vec<Self> {
        let all: Vec<Expected> = read_json(&fixture(answers));
        assert!(!all.is_empty(), "{answers} has no cases");
        let case = |(i, expected)| Case { name: format!("{answers}, prompt {i}"), expected, adapter };
        all.into_iter().enumerate().map(case).collect()
    }

    fn blocks(&self) -> usize {
        (self.expected.prompt_ids.len() + self.expected.greedy.len()).div_ceil(BLOCK)
    }

    /// Checks the prompt's rows and returns the most probable next token.
    fn check_prompt(&self, logits: &[f32], vocab: usize) -> Token {
        let Expected { prompt_ids: prompt, prompt_logprobs, top10, .. } = &self.expected;
        let rows: Vec<Vec<f64>> = logits.chunks_exact(vocab).map(log_softmax).collect();
        let close = |found: f64, recorded: f64, what: &str| {
            let name = &self.name;
            assert!((found - recorded).abs() <= LOGPROB_TOLERANCE, "{name}: {what} is {found}, recorded {recorded}");
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
        best(last)
    }

    /// Checks generated token `i`; whether to go on.
    fn check_token(&self, i: usize, token: Token) -> bool {
        let Expected { greedy, greedy_margin, .. } = &self.expected;
        assert!(!greedy.is_empty() && greedy.len() == greedy_margin.len(), "{}", self.name);
        if token != greedy[i] {
            let (name, recorded, margin) = (&self.name, greedy[i], greedy_margin[i]);
            assert!(margin <= MARGIN, "{name}: generated token {i} is {token}, recorded {recorded}, margin {margin}");
            return false; // A tie within rounding: what follows continues another text.
        }
        i + 1 < greedy.len()
    }
}

/// Block numbers `first..` for so many tokens.
pub(crate) fn blocks_for(tokens: usize, first: u32) -> Vec<u32> {
    (first..first + tokens.div_ceil(BLOCK) as u32).collect()
}

/// Runs of the same adapter; none at all when no row has one.
fn segments<'a, A>(adapters: &[Option<&'a A>]) -> Vec<LoraSegment<'a, A>> {
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

pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    let log_sum = sum.ln() + f64::from(max);
    logits.iter().map(|logit| f64::from(*logit) - log_sum).collect()
}

/// The most probable token, the lower one of equals.
pub(crate) fn best(values: &[f64]) -> Token {
    let mut best = 0;
    for (token, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = token;
        }
    }
    best as Token
}
