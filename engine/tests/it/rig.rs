//! An engine over a tiny model from fixtures/, with a store of its adapters; and a reader that checks every stream's order.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use openlora_adapters::{Actor, AdapterStore, Lease, StoreConfig};
use openlora_engine::{Engine, EngineConfig, EngineError, EngineHandle, EngineStats, Event, OutputStream, Submit};
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_kernels::{Backend, Precision};
use openlora_model::{LoadOptions, Model, ModelFiles};
use openlora_types::{
    Alias, FinishReason, Limits, Priority, SamplingParams, TenantId, Token, TokenLogprob, TokenOutput, Usage,
};
use serde_json::Value;

use crate::probe::{Controls, HANG, Probe};

pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(path)
}

/// What an engine is made of; the defaults suit most tests.
#[derive(Clone)]
pub(crate) struct Setup {
    /// A folder of fixtures/models.
    pub(crate) model: &'static str,
    /// KV blocks; they stand in place of `config.pool_bytes`.
    pub(crate) blocks: usize,
    pub(crate) block_size: usize,
    /// Rows of logits computed at once.
    pub(crate) logit_rows: usize,
    /// Rows of one step that the model is loaded for; `None` for as many as the engine may use.
    pub(crate) rows: Option<usize>,
    /// Whether the backend plays a device that works by itself.
    pub(crate) asynchronous: bool,
    pub(crate) config: EngineConfig,
}

impl Default for Setup {
    fn default() -> Self {
        let config = EngineConfig { max_num_seqs: 16, max_num_batched_tokens: 256, ..EngineConfig::default() };
        Self { model: "llama3", blocks: 64, block_size: 16, logit_rows: 32, rows: None, asynchronous: false, config }
    }
}

/// An engine, what it was made of, and adapters to lease.
pub(crate) struct Rig<B: Backend = Probe> {
    pub(crate) engine: EngineHandle,
    /// Of a backend that is a [`Probe`].
    pub(crate) controls: Arc<Controls>,
    pub(crate) store: AdapterStore,
    pub(crate) model: Arc<Model<B>>,
    name: &'static str,
    folder: tempfile::TempDir,
}

impl Setup {
    pub(crate) fn start(self) -> Rig {
        self.try_start().unwrap_or_else(|error| panic!("{error}"))
    }

    pub(crate) fn try_start(self) -> Result<Rig, EngineError> {
        let controls = Arc::new(Controls::default());
        let cpu = Cpu::new(2, Precision::F32, Isa::detect()).expect("threads start");
        let asynchronous = self.asynchronous;
        let under_way = Mutex::default();
        self.try_start_on(Arc::new(Probe { cpu, controls: Arc::clone(&controls), asynchronous, under_way }), controls)
    }

    pub(crate) fn try_start_on<B: Backend>(
        self,
        backend: Arc<B>,
        controls: Arc<Controls>,
    ) -> Result<Rig<B>, EngineError> {
        let limits = Limits::default();
        let files = ModelFiles::open(&fixture("models").join(self.model), &limits).expect("the fixture opens");
        let options = LoadOptions {
            max_rows: self.rows.unwrap_or(self.config.max_num_batched_tokens),
            max_logit_rows: self.logit_rows,
            max_position: 256,
            block_size: self.block_size,
        };
        let model = Model::load(Arc::clone(&backend), Arc::new(files), &options, &mut |_, _| ()).expect("it loads");
        let model = Arc::new(model);
        let block_bytes = backend.page_bytes(model.attention_spec(), model.layers());
        let config = EngineConfig { pool_bytes: self.blocks * block_bytes, ..self.config };
        let engine = Engine::start(Arc::clone(&model), config)?;

        let folder = tempfile::tempdir().expect("temporary folder");
        let made = folder.path().join("made");
        std::fs::create_dir(&made).expect("temporary folder");
        let config = StoreConfig {
            data_dir: folder.path().join("store"),
            allowed_roots: vec![fixture("adapters-tiny"), made],
            host_cache_bytes: 1 << 30,
            ..StoreConfig::default()
        };
        let store = AdapterStore::open(config, model.shape().clone(), limits).expect("a fresh store opens");
        Ok(Rig { engine, controls, store, model, name: self.model, folder })
    }
}

impl<B: Backend> Rig<B> {
    /// A lease on an adapter of fixtures/adapters-tiny, registered under its folder's name.
    pub(crate) fn lease(&self, name: &str) -> Lease {
        let folder = fixture("adapters-tiny").join(self.name).join(name);
        self.register(name, &folder)
    }

    /// A lease on `all-linear` with another alpha: another generation of the same size with other answers.
    pub(crate) fn lease_variant(&self, alpha: u32) -> Lease {
        let source = fixture("adapters-tiny").join(self.name).join("all-linear");
        let name = format!("alpha-{alpha}");
        let folder = self.folder.path().join("made").join(&name);
        if !folder.exists() {
            std::fs::create_dir(&folder).expect("a new folder");
            let tensors = "adapter_model.safetensors";
            std::fs::copy(source.join(tensors), folder.join(tensors)).expect("the fixture is copied");
            let mut config: Value = read_json(&source.join("adapter_config.json"));
            config["lora_alpha"] = alpha.into();
            std::fs::write(folder.join("adapter_config.json"), config.to_string()).expect("the variant is written");
        }
        self.register(&name, &folder)
    }

    fn register(&self, name: &str, folder: &Path) -> Lease {
        let alias = Alias::parse("alias", name, &Limits::default()).expect("a plain name");
        let actor = Actor { name: "tests".into(), admin: true };
        let registered = self.store.register_folder(&alias, folder, &actor, true);
        registered.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        self.store.resolve(name).expect("it was just registered")
    }

    pub(crate) fn submit(&self, request: Submit) -> OutputStream {
        self.engine.submit(request).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Submits and reads to the end, which must be a good one.
    pub(crate) fn answer(&self, request: Submit) -> Answer {
        read(self.submit(request))
    }

    /// Submits all while the first is held at its first step, so that the second step has all of them; then reads each to
    /// its end.
    pub(crate) fn answers_in_one_batch(&self, requests: Vec<Submit>) -> Vec<Answer> {
        for lease in requests.iter().filter_map(|request| request.lease.as_ref()) {
            self.bring(lease);
        }
        self.controls.close();
        let first = self.controls.steps() + 1;
        let mut streams = Vec::new();
        for request in requests {
            streams.push(self.submit(request));
            self.controls.wait_for_step(first);
        }
        self.controls.open();
        streams.into_iter().map(read).collect()
    }

    /// Sees to it that an adapter is on the device.
    pub(crate) fn bring(&self, lease: &Lease) {
        if !self.engine.is_resident(&lease.generation()) {
            self.answer(Submit { lease: Some(lease.clone()), ..ask(&prompt(7), 1) });
        }
    }

    pub(crate) fn stats(&self) -> EngineStats {
        self.engine.stats()
    }

    /// Waits until the step thread has published that nothing runs, waits or is held.
    pub(crate) fn settle(&self) {
        self.settle_but(0);
    }

    /// As [`Rig::settle`], where so many leases are out.
    pub(crate) fn settle_but(&self, leases: u32) {
        eventually("everything is free", || {
            let stats = self.stats();
            (stats.running, stats.waiting) == (0, 0) && stats.pages_free + stats.adapter_pages == stats.pages_total
        });
        assert_eq!(self.store.stats().leases, u64::from(leases), "leases out");
    }
}

/// Waits for something that another thread is about to do.
pub(crate) fn eventually(what: &str, mut reached: impl FnMut() -> bool) {
    let began = Instant::now();
    while !reached() {
        assert!(began.elapsed() < HANG, "never came: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A request by `tests` for the base model: greedy, past end-of-sequence.
pub(crate) fn ask(prompt: &[Token], max_tokens: u32) -> Submit {
    Submit {
        tenant: TenantId("tests".into()),
        lease: None,
        prompt: prompt.to_vec(),
        sampling: SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..SamplingParams::default() },
        priority: Priority::Normal,
        deadline: None,
        cache_salt: String::new(),
    }
}

/// What a request said.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) prompt_logprobs: Vec<TokenOutput>,
    pub(crate) samples: Vec<Sample>,
    pub(crate) usage: Usage,
}

/// One of its samples.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Sample {
    pub(crate) outputs: Vec<TokenOutput>,
    pub(crate) reason: Option<FinishReason>,
}

impl Sample {
    pub(crate) fn tokens(&self) -> Vec<Token> {
        self.outputs.iter().map(|output| output.chosen.token).collect()
    }
}

impl Answer {
    /// The tokens of a request's only sample.
    pub(crate) fn tokens(&self) -> Vec<Token> {
        self.only().tokens()
    }

    pub(crate) fn only(&self) -> &Sample {
        assert_eq!(self.samples.len(), 1, "samples");
        &self.samples[0]
    }

    /// Everything that was computed, for comparisons bit for bit.
    pub(crate) fn bits(&self) -> Vec<Vec<(Token, u32)>> {
        let bits = |outputs: &[TokenOutput]| -> Vec<(Token, u32)> {
            let all = outputs.iter().flat_map(|output| std::iter::once(&output.chosen).chain(&output.top));
            all.map(|TokenLogprob { token, logprob }| (*token, logprob.to_bits())).collect()
        };
        let samples = self.samples.iter().map(|sample| bits(&sample.outputs));
        std::iter::once(bits(&self.prompt_logprobs)).chain(samples).collect()
    }
}

/// The next event; a stream that hangs fails the test.
pub(crate) fn next(stream: &mut OutputStream) -> Option<Event> {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    }
    let next = async { tokio::time::timeout(HANG, stream.next()).await };
    RUNTIME.with(|runtime| runtime.block_on(next)).expect("the stream hangs")
}

/// The next event, which must be a token.
pub(crate) fn next_token(stream: &mut OutputStream) -> Token {
    match next(stream) {
        Some(Event::Token { output, .. }) => output.chosen.token,
        other => panic!("a token was due, not {other:?}"),
    }
}

/// Reads a stream to its end, which must be a good one.
pub(crate) fn read(stream: OutputStream) -> Answer {
    read_to_end(stream).unwrap_or_else(|(error, events)| panic!("{error}, after {events} events"))
}

/// Reads a stream that must fail; returns why, and how many events came before.
pub(crate) fn read_failure(stream: OutputStream) -> (EngineError, usize) {
    read_to_end(stream).map(|answer| panic!("a failure was due, not {answer:?}")).unwrap_or_else(|failure| failure)
}

/// Reads a stream to its end and checks the order of its events: prompt log-probabilities before the first sample's tokens,
/// each sample's tokens before its one end, all ends before the last event, and nothing after that.
pub(crate) fn read_to_end(mut stream: OutputStream) -> Result<Answer, (EngineError, usize)> {
    let (mut prompt_logprobs, mut samples, mut events) = (Vec::new(), Vec::<Sample>::new(), 0);
    let outcome = loop {
        match next(&mut stream).expect("the last event is Done or Failed") {
            Event::PromptLogprobs(part) => {
                assert!(!part.is_empty(), "an empty part");
                assert!(samples.first().is_none_or(|sample| sample.outputs.is_empty()), "scored after a drawn token");
                prompt_logprobs.extend(part);
            }
            Event::Token { index, output } => {
                let sample = sample(&mut samples, index);
                assert_eq!(sample.reason, None, "a token after the end of sample {index}");
                sample.outputs.push(output);
            }
            Event::Finished { index, reason } => {
                let before = sample(&mut samples, index).reason.replace(reason);
                assert_eq!(before, None, "a second end of sample {index}");
            }
            Event::Done { usage } => break Ok(usage),
            Event::Failed(error) => break Err((error, events)),
        }
        events += 1;
    };
    assert!(next(&mut stream).is_none(), "an event after the last");
    let usage = outcome?;
    assert!(samples.iter().all(|sample| sample.reason.is_some()), "Done before the end of every sample");
    Ok(Answer { prompt_logprobs, samples, usage })
}

fn sample(samples: &mut Vec<Sample>, index: u32) -> &mut Sample {
    let index = index as usize;
    samples.resize_with(samples.len().max(index + 1), Sample::default);
    &mut samples[index]
}

/// One entry of an `expected.json`.
pub(crate) struct Expected {
    pub(crate) prompt: Vec<Token>,
    pub(crate) prompt_logprobs: Vec<f64>,
    pub(crate) top10: Vec<(Token, f64)>,
    pub(crate) greedy: Vec<Token>,
    pub(crate) greedy_margin: Vec<f64>,
}

/// The recorded answers of a folder under fixtures/.
pub(crate) fn expected(folder: &str) -> Vec<Expected> {
    let numbers = |value: &Value| -> Vec<f64> {
        value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
    };
    let tokens = |value: &Value| -> Vec<Token> { numbers(value).into_iter().map(|token| token as Token).collect() };
    let entries: Value = read_json(&fixture(folder).join("expected.json"));
    let entries = entries.as_array().expect("a list").iter();
    let entries = entries.map(|entry| Expected {
        prompt: tokens(&entry["prompt_ids"]),
        prompt_logprobs: numbers(&entry["prompt_logprobs"]),
        top10: entry["top10"].as_array().expect("a list").iter().map(numbers).map(|p| (p[0] as Token, p[1])).collect(),
        greedy: tokens(&entry["greedy"]),
        greedy_margin: numbers(&entry["greedy_margin"]),
    });
    entries.collect()
}

/// The prompt of that many tokens among the recorded ones of `llama3`.
pub(crate) fn prompt(tokens: usize) -> Vec<Token> {
    let recorded = expected("models/llama3").into_iter().chain(expected("adapters-tiny/llama3/all-linear"));
    let found = recorded.map(|entry| entry.prompt).find(|prompt| prompt.len() == tokens);
    found.unwrap_or_else(|| panic!("no recorded prompt has {tokens} tokens"))
}

fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
