//! Prometheus metrics. Ours are `openlora_*`; the few `vllm:*` gauges are what Kubernetes' inference gateway and llm-d read
//! to route requests to the server that has the adapter and room for it.
//!
//! **Invariant: bounded labels.** Calls and codes are fixed sets, adapters get a series each up to
//! [`ADAPTER_SERIES_MAX`] and share `other` beyond, and nothing a client sends becomes a label otherwise. A request
//! touches locks here when it begins, at its first token and when it ends, and never for a token.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use openlora_adapters::StoreStats;
use openlora_engine::EngineStats;
use openlora_types::{FinishReason, Usage};
use prometheus::core::Collector;
use prometheus::local::LocalHistogram;
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};
use tonic::Code;

use crate::ServerError;

/// Adapters with a series of their own.
const ADAPTER_SERIES_MAX: usize = 200;
/// Names listed in `vllm:lora_requests_info`.
const LISTED_ADAPTERS_MAX: usize = 256;
/// The label of adapters beyond [`ADAPTER_SERIES_MAX`]. No alias can be this: their segments begin with a letter or digit.
const OTHER: &str = "_other";

const LATENCY_BUCKETS: &[f64] =
    &[0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.75, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0];
const TOKEN_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 0.8, 1.6, 5.0];

/// A total kept elsewhere and shown here as a counter.
struct Mirror {
    counter: IntCounter,
    read: fn(&EngineStats, &StoreStats) -> u64,
}

/// A state kept elsewhere and shown here as a gauge.
struct Shown {
    gauge: IntGauge,
    read: fn(&EngineStats, &StoreStats) -> u64,
}

/// Everything that is measured.
pub(crate) struct Metrics {
    registry: Registry,
    mirrors: Vec<Mirror>,
    shown: Vec<Shown>,
    vllm_kv_usage: prometheus::Gauge,
    vllm_lora_info: GaugeVec,
    max_loras: usize,
    calls: IntCounterVec,
    in_flight: IntGauge,
    finished: IntCounterVec,
    cached_prompt_tokens: IntCounter,
    closed: IntCounterVec,
    adapter_requests: IntCounterVec,
    adapter_tokens: IntCounterVec,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    end_to_end: Histogram,
    preparation: Histogram,
    queue_time: Histogram,
    adapters: Mutex<AdapterTable>,
    /// One scrape at a time, so that a mirror is never advanced twice.
    scraping: Mutex<()>,
}

/// Who waits and runs now, by adapter, and who has a series.
#[derive(Default)]
struct AdapterTable {
    live: BTreeMap<Arc<str>, Live>,
    labelled: HashSet<Arc<str>>,
}

#[derive(Default)]
struct Live {
    waiting: usize,
    running: usize,
}

/// Registers metrics as they are made.
struct Maker(Registry);

impl Maker {
    fn add<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> Result<C, ServerError> {
        let start = |error: prometheus::Error| ServerError::Start(format!("metrics: {error}"));
        let metric = made.map_err(start)?;
        self.0.register(Box::new(metric.clone())).map_err(start)?;
        Ok(metric)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, ServerError> {
        self.add(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, ServerError> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, ServerError> {
        self.add(IntGauge::new(name, help))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, ServerError> {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }

    fn mirrors(&self) -> Result<Vec<Mirror>, ServerError> {
        type Read = fn(&EngineStats, &StoreStats) -> u64;
        let totals: [(&str, &str, Read); 15] = [
            ("openlora_steps_total", "Steps of the engine.", |e, _| e.steps_total),
            ("openlora_step_microseconds_total", "Time spent in steps.", |e, _| e.step_micros_total),
            ("openlora_prompt_tokens_total", "Prompt tokens computed.", |e, _| e.prompt_tokens_total),
            ("openlora_generation_tokens_total", "Tokens generated.", |e, _| e.generation_tokens_total),
            ("openlora_num_preemptions_total", "Sequences put back to waiting.", |e, _| e.preemptions_total),
            ("openlora_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", |e, _| {
                e.prefix_queries_total
            }),
            ("openlora_prefix_cache_hits_total", "Prompt tokens found there.", |e, _| e.prefix_hits_total),
            ("openlora_adapter_loads_total", "Adapters copied to the device.", |e, _| e.adapter_loads_total),
            ("openlora_adapter_load_failures_total", "Loads that failed.", |e, _| e.adapter_load_failures_total),
            ("openlora_adapter_load_microseconds_total", "Time spent in loads.", |e, _| e.adapter_load_micros_total),
            ("openlora_adapter_hits_total", "Samples whose adapter was on the device.", |e, _| e.adapter_hits_total),
            ("openlora_adapter_misses_total", "Samples whose adapter was not.", |e, _| e.adapter_misses_total),
            ("openlora_adapter_evictions_total", "Adapters dropped from the device.", |e, _| e.adapter_evictions_total),
            ("openlora_adapter_cache_hits_total", "Adapters found in the host cache.", |_, s| s.hits),
            ("openlora_adapter_cache_misses_total", "Adapters read from the store.", |_, s| s.misses),
        ];
        totals.into_iter().map(|(name, help, read)| Ok(Mirror { counter: self.counter(name, help)?, read })).collect()
    }

    fn shown(&self) -> Result<Vec<Shown>, ServerError> {
        type Read = fn(&EngineStats, &StoreStats) -> u64;
        let states: [(&str, &str, Read); 13] = [
            ("openlora_sequences_running", "Sequences that hold KV blocks.", |e, _| e.running as u64),
            ("openlora_sequences_waiting", "Sequences in the queue.", |e, _| e.waiting as u64),
            ("openlora_pages", "Pages of the pool of KV blocks and adapters.", |e, _| e.pages_total as u64),
            ("openlora_pages_free", "Pages that no sequence and no adapter has.", |e, _| e.pages_free as u64),
            ("openlora_adapters_resident", "Adapters on the device.", |e, _| e.adapters_resident as u64),
            ("openlora_adapter_pages", "Pages of adapters on the device and on their way.", |e, _| {
                e.adapter_pages as u64
            }),
            ("openlora_adapters_loading", "Adapters on their way to the device.", |e, _| e.adapters_loading as u64),
            ("openlora_adapters_pinned", "Adapters pinned to the device.", |e, _| e.adapters_pinned as u64),
            ("openlora_page_bytes", "Bytes of a page.", |e, _| e.page_bytes as u64),
            ("openlora_adapters_registered", "Aliases registered.", |_, s| s.registered),
            ("openlora_adapter_cache_bytes", "Bytes of adapters in the host cache.", |_, s| s.cached_bytes),
            ("vllm:num_requests_running", "Sequences being computed (for routers).", |e, _| e.running as u64),
            ("vllm:num_requests_waiting", "Sequences in the queue (for routers).", |e, _| e.waiting as u64),
        ];
        states.into_iter().map(|(name, help, read)| Ok(Shown { gauge: self.gauge(name, help)?, read })).collect()
    }
}

impl Metrics {
    /// `max_loras`: adapters the engine runs in one batch.
    pub(crate) fn new(max_loras: usize) -> Result<Self, ServerError> {
        let make = Maker(Registry::new());
        let usage =
            prometheus::Gauge::new("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1 (for routers).");
        let info = Opts::new(
            "vllm:lora_requests_info",
            "Adapters in use, joined by commas; the value is the time (for routers).",
        );
        let info = GaugeVec::new(info, &["max_lora", "running_lora_adapters", "waiting_lora_adapters"]);
        Ok(Self {
            mirrors: make.mirrors()?,
            shown: make.shown()?,
            vllm_kv_usage: make.add(usage)?,
            vllm_lora_info: make.add(info)?,
            max_loras,
            calls: make.counters("openlora_requests_total", "gRPC calls by their final status.", &["call", "code"])?,
            in_flight: make.gauge("openlora_requests_in_flight", "Inference calls that have not ended.")?,
            finished: make.counters("openlora_samples_finished_total", "Samples completed.", &["finished_reason"])?,
            cached_prompt_tokens: make.counter(
                "openlora_cached_prompt_tokens_total",
                "Prompt tokens of completed requests that the cache supplied.",
            )?,
            closed: make.counters(
                "openlora_charges_total",
                "Requests closed in the ledger: posted, voided, or failed, which nobody paid for.",
                &["outcome"],
            )?,
            adapter_requests: make.counters("openlora_adapter_requests_total", "Requests by adapter.", &["adapter"])?,
            adapter_tokens: make.counters(
                "openlora_adapter_generation_tokens_total",
                "Tokens generated by adapter.",
                &["adapter"],
            )?,
            time_to_first_token: make.histogram(
                "openlora_time_to_first_token_seconds",
                "From the arrival of a request to its first token.",
                LATENCY_BUCKETS,
            )?,
            inter_token: make.histogram(
                "openlora_inter_token_latency_seconds",
                "From one token of a request to its next, per sample.",
                TOKEN_BUCKETS,
            )?,
            end_to_end: make.histogram(
                "openlora_e2e_request_latency_seconds",
                "From the arrival of a request to its end.",
                LATENCY_BUCKETS,
            )?,
            preparation: make.histogram(
                "openlora_request_preparation_seconds",
                "Tokenizing, and bringing the adapter to the device.",
                LATENCY_BUCKETS,
            )?,
            queue_time: make.histogram(
                "openlora_request_queue_time_seconds",
                "From the engine's queue to the first step.",
                LATENCY_BUCKETS,
            )?,
            adapters: Mutex::default(),
            scraping: Mutex::default(),
            registry: make.0,
        })
    }

    /// One call ended.
    pub(crate) fn call(&self, call: &str, code: Code) {
        self.calls.with_label_values(&[call, code_name(code)]).inc();
    }

    /// A request was closed in the ledger, or given up.
    pub(crate) fn closed(&self, outcome: &str) {
        self.closed.with_label_values(&[outcome]).inc();
    }

    /// The text exposition format, version 0.0.4.
    pub(crate) fn render(&self, engine: &EngineStats, store: &StoreStats) -> Result<String, ServerError> {
        let _one = lock(&self.scraping);
        for mirror in &self.mirrors {
            let total = (mirror.read)(engine, store);
            mirror.counter.inc_by(total.saturating_sub(mirror.counter.get()));
        }
        for shown in &self.shown {
            shown.gauge.set(i64::try_from((shown.read)(engine, store)).unwrap_or(i64::MAX));
        }
        let used = engine.pages_total.saturating_sub(engine.pages_free);
        self.vllm_kv_usage.set(used as f64 / engine.pages_total.max(1) as f64);
        self.show_live_adapters();
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .map_err(|_| ServerError::Internal("metrics could not be encoded"))
    }

    /// Replaces the one series whose labels say which adapters run and wait.
    fn show_live_adapters(&self) {
        let joined = |names: &mut dyn Iterator<Item = &Arc<str>>| {
            let mut text = String::new();
            for name in names.take(LISTED_ADAPTERS_MAX) {
                let comma = if text.is_empty() { "" } else { "," };
                let _ = write!(text, "{comma}{name}");
            }
            text
        };
        let (running, waiting) = {
            let table = lock(&self.adapters);
            let running = joined(&mut table.live.iter().filter(|(_, live)| live.running > 0).map(|(name, _)| name));
            let waiting = joined(&mut table.live.iter().filter(|(_, live)| live.waiting > 0).map(|(name, _)| name));
            (running, waiting)
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.vllm_lora_info.reset();
        self.vllm_lora_info
            .with_label_values(&[&self.max_loras.to_string(), &running, &waiting])
            .set(now.as_secs_f64());
    }

    /// The adapter's own label while there are series left, else the one they share.
    fn label<'a>(&self, adapter: &'a Arc<str>) -> &'a str {
        let mut table = lock(&self.adapters);
        if !table.labelled.contains(adapter) {
            if table.labelled.len() == ADAPTER_SERIES_MAX {
                return OTHER;
            }
            table.labelled.insert(Arc::clone(adapter));
        }
        adapter
    }

    fn live(&self, adapter: Option<&Arc<str>>, change: impl FnOnce(&mut Live)) {
        let Some(adapter) = adapter else { return };
        let mut table = lock(&self.adapters);
        let live = table.live.entry(Arc::clone(adapter)).or_default();
        change(live);
        if live.waiting == 0 && live.running == 0 {
            table.live.remove(adapter);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Measures one inference request from its arrival to wherever it ends: what is left undone is done in `Drop`.
pub(crate) struct Meter {
    metrics: Arc<Metrics>,
    arrived: Instant,
    adapter: Option<Arc<str>>,
    stage: Stage,
    submitted: Option<Instant>,
    last_token: Vec<Option<Instant>>,
    inter_token: LocalHistogram,
    tokens: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Preparing,
    Waiting,
    Running,
}

impl Meter {
    /// A request has arrived.
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        metrics.in_flight.inc();
        Self {
            arrived: Instant::now(),
            adapter: None,
            stage: Stage::Preparing,
            submitted: None,
            last_token: Vec::new(),
            inter_token: metrics.inter_token.local(),
            tokens: 0,
            metrics,
        }
    }

    /// The request stands in the engine's queue.
    pub(crate) fn submitted(&mut self, adapter: Option<Arc<str>>, samples: u32) {
        let now = Instant::now();
        self.metrics.preparation.observe((now - self.arrived).as_secs_f64());
        self.submitted = Some(now);
        self.last_token = vec![None; samples as usize];
        if let Some(adapter) = &adapter {
            let label = self.metrics.label(adapter);
            self.metrics.adapter_requests.with_label_values(&[label]).inc();
        }
        self.adapter = adapter;
        self.stage = Stage::Waiting;
        self.metrics.live(self.adapter.as_ref(), |live| live.waiting += 1);
    }

    /// The first step of the request began `waited` after it was submitted.
    pub(crate) fn scheduled(&self, waited: Duration) {
        self.metrics.queue_time.observe(waited.as_secs_f64());
    }

    /// A token of `sample` has come.
    pub(crate) fn token(&mut self, sample: u32) {
        let now = Instant::now();
        self.tokens += 1;
        if self.stage == Stage::Waiting {
            self.stage = Stage::Running;
            self.metrics.time_to_first_token.observe((now - self.arrived).as_secs_f64());
            self.metrics.live(self.adapter.as_ref(), |live| {
                live.waiting -= 1;
                live.running += 1;
            });
        }
        if let Some(last) = self.last_token.get_mut(sample as usize)
            && let Some(last) = last.replace(now)
        {
            self.inter_token.observe((now - last).as_secs_f64());
        }
    }

    /// A sample is complete.
    pub(crate) fn finished(&self, reason: FinishReason) {
        let reason = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "abort",
            FinishReason::DeadlineExceeded => "deadline",
        };
        self.metrics.finished.with_label_values(&[reason]).inc();
    }

    /// The request is complete.
    pub(crate) fn completed(&self, usage: &Usage) {
        self.metrics.cached_prompt_tokens.inc_by(u64::from(usage.cached_prompt_tokens));
    }

    /// The call that this measures ended.
    pub(crate) fn call(&self, call: &str, code: Code) {
        self.metrics.call(call, code);
    }

    /// Time since the request arrived.
    pub(crate) fn elapsed(&self) -> Duration {
        self.arrived.elapsed()
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.inter_token.flush();
        self.metrics.in_flight.dec();
        match self.stage {
            Stage::Preparing => {}
            Stage::Waiting => self.metrics.live(self.adapter.as_ref(), |live| live.waiting -= 1),
            Stage::Running => self.metrics.live(self.adapter.as_ref(), |live| live.running -= 1),
        }
        if self.submitted.is_some() {
            self.metrics.end_to_end.observe(self.arrived.elapsed().as_secs_f64());
        }
        if let Some(adapter) = &self.adapter {
            let label = self.metrics.label(adapter);
            self.metrics.adapter_tokens.with_label_values(&[label]).inc_by(self.tokens);
        }
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Arc<Metrics> {
        Arc::new(Metrics::new(4).expect("metrics"))
    }

    fn render(metrics: &Metrics) -> String {
        metrics.render(&EngineStats::default(), &StoreStats::default()).expect("text")
    }

    fn lines<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
        text.lines().filter(|line| line.starts_with(name)).collect()
    }

    #[test]
    fn routers_see_one_live_series_of_adapters_that_run_and_wait() {
        let metrics = metrics();
        let meter = |name: &str| {
            let mut meter = Meter::new(Arc::clone(&metrics));
            meter.submitted(Some(name.into()), 1);
            meter
        };
        let waiting = [meter("acme/b"), meter("acme/c")];
        let mut running = meter("acme/a");
        running.token(0);
        for _ in 0..2 {
            let text = render(&metrics);
            let series = lines(&text, "vllm:lora_requests_info{");
            assert_eq!(series.len(), 1);
            let labels = r#"{max_lora="4",running_lora_adapters="acme/a",waiting_lora_adapters="acme/b,acme/c"}"#;
            assert!(series[0].contains(labels), "{series:?}");
        }
        drop((waiting, running));
        let text = render(&metrics);
        assert!(text.contains(r#"running_lora_adapters="",waiting_lora_adapters="""#), "{text}");
        assert!(lock(&metrics.adapters).live.is_empty());
    }

    #[test]
    fn adapters_beyond_the_cap_share_a_series() {
        let metrics = metrics();
        for i in 0..2 * ADAPTER_SERIES_MAX {
            Meter::new(Arc::clone(&metrics)).submitted(Some(format!("acme/{i}").into()), 1);
        }
        let text = render(&metrics);
        assert_eq!(lines(&text, "openlora_adapter_requests_total{").len(), ADAPTER_SERIES_MAX + 1);
        let other = format!(r#"openlora_adapter_requests_total{{adapter="_other"}} {ADAPTER_SERIES_MAX}"#);
        assert!(text.contains(&other), "{text}");
    }

    #[test]
    fn totals_of_other_rooms_are_counters_that_follow_them() {
        let metrics = metrics();
        for total in [5, 5, 9] {
            let stats =
                EngineStats { generation_tokens_total: total, pages_total: 4, pages_free: 3, ..Default::default() };
            let text = metrics.render(&stats, &StoreStats::default()).expect("text");
            assert!(text.contains(&format!("\nopenlora_generation_tokens_total {total}\n")), "{text}");
            assert!(text.contains("# TYPE openlora_generation_tokens_total counter"));
            assert!(text.contains("\nvllm:kv_cache_usage_perc 0.25\n"), "{text}");
        }
    }

    #[test]
    fn a_request_is_measured_wherever_it_ends() {
        let metrics = metrics();
        drop(Meter::new(Arc::clone(&metrics)));
        let mut meter = Meter::new(Arc::clone(&metrics));
        meter.submitted(None, 2);
        for sample in [0, 1, 0, 1] {
            meter.token(sample);
        }
        meter.finished(FinishReason::Length);
        drop(meter);
        let text = render(&metrics);
        for line in [
            "openlora_requests_in_flight 0",
            "openlora_time_to_first_token_seconds_count 1",
            "openlora_inter_token_latency_seconds_count 2",
            "openlora_e2e_request_latency_seconds_count 1",
            r#"openlora_samples_finished_total{finished_reason="length"} 1"#,
        ] {
            assert!(text.contains(&format!("\n{line}\n")), "{line} in {text}");
        }
    }
}
