//! A decode step allocates nothing, however long the sequences become: the step thread's own loop, driven by hand in one
//! thread so that its allocations can be counted. Small blocks make many of few tokens.

use std::path::Path;

use openlora_adapters::{Actor, AdapterStore, StoreConfig};
use openlora_kernels::Precision;
use openlora_kernels::cpu::{Cpu, Isa};
use openlora_model::{LoadOptions, ModelFiles};
use openlora_scheduler::SchedulerConfig;
use openlora_types::{Alias, Limits, Priority, TenantId};

use super::*;
use crate::{OutputStream, Submit};

/// The model's context.
const CONTEXT: usize = 256;
/// Room for the warm-up and what is measured.
const MAX_TOKENS: u32 = 230;
/// Enough for the channels to have grown, by 32 events at a time, and for every buffer that does not hold blocks.
const WARM_UP: usize = 80;
const MEASURED: usize = 140;

struct Bench {
    state: StepThread<Cpu>,
    commands: mpsc::Sender<Command>,
    readers: Vec<OutputStream>,
}

impl Bench {
    fn new(precision: Precision, threads: usize, block_size: usize) -> Self {
        let backend = Arc::new(Cpu::new(threads, precision, Isa::detect()).expect("no thread to start"));
        let limits = Limits::default();
        let files = ModelFiles::open(&fixture("models/llama3"), &limits).expect("the fixture opens");
        let options = LoadOptions { max_rows: 64, max_logit_rows: 16, max_position: CONTEXT, block_size };
        let model = Model::load(Arc::clone(&backend), Arc::new(files), &options, &mut |_, _| ()).expect("it loads");
        let config = SchedulerConfig {
            block_size,
            num_pages: 16 * CONTEXT / block_size,
            max_num_seqs: 16,
            max_num_batched_tokens: options.max_rows,
            ..SchedulerConfig::default()
        };
        let pool = backend.new_pages(model.attention_spec(), model.layers(), config.num_pages).expect("memory");
        let model = Arc::new(model);
        let loader = Loader::start(&model, config.max_loading).expect("threads");
        let (commands, incoming) = mpsc::channel(16);
        let board = Arc::new(Board::default());
        let device = Device { activations: model.new_activations().expect("memory"), pool, loader };
        let state = StepThread::new(&model, Scheduler::new(config), device, incoming, board, None);
        Self { state, commands, readers: Vec::new() }
    }

    fn submit(&mut self, params: SamplingParams, lease: Option<&Lease>) {
        let prompt = (3..12 + self.readers.len() as Token).collect();
        let (sender, events) = mpsc::channel(64);
        let control = Arc::new(Control::default());
        let submit = Submit {
            tenant: TenantId("tests".into()),
            lease: lease.cloned(),
            prompt,
            sampling: SamplingParams { max_tokens: MAX_TOKENS, ignore_eos: true, ..params },
            priority: Priority::Normal,
            deadline: None,
            cache_salt: String::new(),
        };
        let pages = lease.map_or(0, |lease| self.state.model.adapter_pages(lease.sizes()));
        let incoming = Incoming { submit, pages, events: sender, control: Arc::clone(&control) };
        assert!(self.commands.try_send(Command::Submit(Box::new(incoming))).is_ok(), "there is room");
        self.readers.push(OutputStream { events, control, complete: false });
    }

    /// One turn of [`StepThread::run`], and its readers. Returns the tokens read.
    fn turn(&mut self) -> usize {
        assert!(self.state.receive());
        self.state.attend();
        while !self.state.step().expect("the step succeeds") {
            let loaded = self.state.loader.wait(Duration::from_secs(60)).expect("what is not work waits for a load");
            self.state.settle(loaded);
        }
        self.state.send_results();
        self.state.publish();
        let mut tokens = 0;
        for reader in &mut self.readers {
            while let Some(event) = reader.try_next() {
                assert!(matches!(event, Event::Token { .. }), "{event:?}");
                tokens += 1;
            }
        }
        tokens
    }

    /// Sees to it that an adapter is on the device, so that all requests begin together.
    fn bring(&mut self, lease: &Lease) {
        let pages = self.state.model.adapter_pages(lease.sizes());
        self.state.obey(Command::Pin(vec![(lease.clone(), pages)]));
        assert!(!self.state.step().expect("the step succeeds"), "there is nothing to run yet");
        let loaded = self.state.loader.wait(Duration::from_secs(60)).expect("the load ends");
        self.state.settle(loaded);
        self.state.obey(Command::Pin(Vec::new()));
        assert!(self.state.resident.contains_key(&lease.generation()));
    }

    fn lease(&self, name: &str) -> Lease {
        let folder = tempfile::tempdir().expect("temporary folder");
        let root = fixture("adapters-tiny/llama3");
        let config = StoreConfig {
            data_dir: folder.path().to_owned(),
            allowed_roots: vec![root.clone()],
            host_cache_bytes: 1 << 30,
            ..StoreConfig::default()
        };
        let limits = Limits::default();
        let alias = Alias::parse("alias", name, &limits).expect("a plain name");
        let store = AdapterStore::open(config, self.state.model.shape().clone(), limits).expect("a fresh store opens");
        let actor = Actor { name: "tests".into(), admin: true };
        store.register_folder(&alias, &root.join(name), &actor, false).expect("the fixture is valid");
        let lease = store.resolve(name).expect("it was just registered");
        // Into the host cache: the store's folder goes with this function.
        lease.load().expect("it was just registered");
        lease
    }
}

fn fixture(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(path)
}

/// Base and two adapters of different ranks and sites; greedy, drawn with every cut, with penalties, bias and bans.
fn submit_all(bench: &mut Bench) {
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let drawn = SamplingParams { top_k: 40, top_p: 0.9, min_p: 0.01, seed: 7, n: 2, ..SamplingParams::default() };
    let penalised = SamplingParams {
        repetition_penalty: 1.1,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        logit_bias: vec![(5, 1.0), (9, -2.0)],
        stop_tokens: vec![200],
        min_tokens: MAX_TOKENS,
        ..SamplingParams::default()
    };
    let adapters = [bench.lease("all-linear"), bench.lease("embed-head")];
    for lease in &adapters {
        bench.bring(lease);
    }
    for adapter in [None, Some(&adapters[0]), Some(&adapters[1])] {
        for params in [&greedy, &drawn, &penalised] {
            bench.submit(params.clone(), adapter);
        }
    }
}

/// Two samples of one prompt: so few tiles that threads share a sequence's keys.
fn submit_two(bench: &mut Bench) {
    bench.submit(SamplingParams { n: 2, ..SamplingParams::default() }, None);
}

/// Runs `sequences` sequences, each of which lengthens by `MEASURED` tokens while allocations are counted.
fn check(mut bench: Bench, submit: fn(&mut Bench), sequences: usize) {
    submit(&mut bench);
    for _ in 0..WARM_UP {
        bench.turn();
    }
    let before = bench.state.scheduler.stats();
    let mut tokens = 0;
    let counted = allocation_counter::measure(|| {
        for _ in 0..MEASURED {
            tokens += bench.turn();
        }
    });
    assert_eq!(tokens, MEASURED * sequences);
    let after = bench.state.scheduler.stats();
    let block_size = bench.state.scheduler.config().block_size;
    assert_eq!(before.pages_free - after.pages_free, sequences * MEASURED / block_size, "blocks");
    assert_eq!(counted.count_total, 0, "{} bytes allocated in {MEASURED} steps", counted.bytes_total);
}

#[test]
fn decode_steps_allocate_nothing_in_f32() {
    // Nine requests, three of which draw two samples. One thread, so that the kernels' allocations are counted.
    check(Bench::new(Precision::F32, 1, 2), submit_all, 12);
}

#[test]
fn decode_steps_allocate_nothing_when_quantised() {
    check(Bench::new(Precision::Quantised, 1, 2), submit_all, 12);
}

#[test]
fn decode_steps_whose_keys_are_shared_by_threads_allocate_nothing() {
    check(Bench::new(Precision::F32, 2, 1), submit_two, 2);
}
