//! A trace against a running server: every request at its time (or as fast as the server takes them), every token timed,
//! the report by class and by tenant.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use openlora_proto::v1::{GenerateRequest, Priority};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::load::{Timed, greedy, one};
use crate::stats::Percentiles;
use crate::trace::{self, Request, Trace, Workload};

/// Different messages of failed requests that a report keeps.
const ERRORS_MAX: usize = 20;
/// Bytes of a metrics page that are read.
const METRICS_BYTES_MAX: u64 = 4 << 20;

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pace {
    /// At the trace's times, so many times as fast. Waiting for the server delays nothing: times count from when a request
    /// was due (no coordinated omission).
    Timed(f64),
    /// So many at once, in the trace's order, whatever its times.
    Closed(usize),
}

/// Where a trace goes.
#[derive(Clone, Debug)]
pub struct Target {
    /// The server's gRPC address.
    pub url: String,
    /// Its metrics page, such as `127.0.0.1:8080`; none leaves the server's counters out of the report.
    pub metrics: Option<String>,
    /// API key of each tenant, by the tenant's number; empty strings send none.
    pub keys: Vec<String>,
    /// Alias of an adapter is this and its five-digit number.
    pub prefix: String,
    /// Size of the vocabulary that prompts are made for.
    pub vocab: u32,
}

/// What came back.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was asked.
    pub workload: Workload,
    /// How.
    pub pace: Pace,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Answer tokens per second over the whole run.
    pub tokens_per_s: f64,
    /// Requests per second over the whole run.
    pub requests_per_s: f64,
    /// All requests together, then each class.
    pub classes: Vec<Group>,
    /// Each tenant.
    pub tenants: Vec<Group>,
    /// Jain's index (Jain, Chiu and Hawe 1984) of the tenants' `service_tokens_per_s`: 1 when all were served alike while
    /// they asked, 1/n when one was served alone. Tenants without an answer are left out.
    pub jain: f64,
    /// How much each of the server's counters rose.
    pub server: BTreeMap<String, f64>,
    /// Failed requests by message.
    pub errors: BTreeMap<String, usize>,
}

/// Requests with something in common.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// The class or tenant.
    pub name: String,
    /// Requests answered.
    pub answered: usize,
    /// Requests that failed.
    pub failed: usize,
    /// Answer tokens.
    pub tokens: usize,
    /// Answer tokens per second of the time in which it had a request open.
    pub service_tokens_per_s: f64,
    /// Time to the first token, milliseconds.
    pub ttft_ms: Percentiles,
    /// Time between messages of one answer, milliseconds.
    pub inter_token_ms: Percentiles,
    /// Time of whole requests, milliseconds.
    pub e2e_ms: Percentiles,
}

/// One request's fate.
struct Outcome {
    request: Request,
    /// Since the start of the run.
    began: Duration,
    result: Result<Timed, String>,
}

/// Sends all requests of `trace` and waits for their ends; `progress` is told how many have ended.
///
/// # Errors
/// The server or its metrics page cannot be reached, or keys are missing. Requests that fail are counted in the report.
pub async fn run(trace: &Trace, target: &Target, pace: Pace, mut progress: impl FnMut(usize)) -> Result<Report> {
    let workload = &trace.header.workload;
    if target.keys.len() != workload.tenants.len() {
        bail!("{} keys for {} tenants", target.keys.len(), workload.tenants.len());
    }
    let endpoint = Endpoint::from_shared(target.url.clone()).context("server address")?;
    let mut channels = Vec::new();
    for _ in &workload.tenants {
        channels.push(endpoint.connect().await.with_context(|| format!("no server answers at {}", target.url))?);
    }
    let before = counters(target).await?;
    let start = Instant::now();
    let mut running = JoinSet::new();
    let mut outcomes = Vec::with_capacity(trace.requests.len());
    for request in &trace.requests {
        let due = match pace {
            Pace::Timed(speed) => {
                let due = start + Duration::from_secs_f64(request.at_us as f64 / 1e6 / speed);
                tokio::time::sleep_until(due.into()).await;
                due
            }
            Pace::Closed(concurrency) => {
                while running.len() >= concurrency {
                    outcomes.extend(running.join_next().await.transpose().context("a request's task")?);
                }
                Instant::now()
            }
        };
        while let Some(ended) = running.try_join_next() {
            outcomes.push(ended.context("a request's task")?);
        }
        progress(outcomes.len());
        let channel: Channel = channels[request.tenant as usize].clone();
        let (key, message, request) =
            (target.keys[request.tenant as usize].clone(), message(target, workload, request), *request);
        running.spawn(async move {
            let result = one(channel, key, message, due).await.map_err(|error| format!("{error:#}"));
            Outcome { request, began: due - start, result }
        });
    }
    while let Some(ended) = running.join_next().await {
        outcomes.push(ended.context("a request's task")?);
        progress(outcomes.len());
    }
    let seconds = start.elapsed().as_secs_f64();
    let after = counters(target).await?;
    Ok(report(workload, pace, seconds, &outcomes, &before, &after))
}

fn message(target: &Target, workload: &Workload, request: &Request) -> GenerateRequest {
    let adapter = request.adapter.map_or_else(String::new, |number| format!("{}{number:05}", target.prefix));
    let prompt = trace::prompt(request.prompt_seed, request.prompt_tokens, target.vocab);
    let priority = match workload.classes[request.class as usize].priority {
        ..0 => Priority::Low,
        0 => Priority::Normal,
        1.. => Priority::High,
    };
    GenerateRequest { priority: priority.into(), ..greedy(adapter, prompt, request.answer_tokens) }
}

fn report(
    workload: &Workload,
    pace: Pace,
    seconds: f64,
    outcomes: &[Outcome],
    before: &BTreeMap<String, f64>,
    after: &BTreeMap<String, f64>,
) -> Report {
    let all = group("all", outcomes.iter());
    let (tokens_per_s, requests_per_s) = (all.tokens as f64 / seconds, all.answered as f64 / seconds);
    let mut classes = vec![all];
    for (number, class) in workload.classes.iter().enumerate() {
        classes.push(group(&class.name, outcomes.iter().filter(|one| one.request.class as usize == number)));
    }
    let mut tenants = Vec::with_capacity(workload.tenants.len());
    for (number, tenant) in workload.tenants.iter().enumerate() {
        tenants.push(group(&tenant.name, outcomes.iter().filter(|one| one.request.tenant as usize == number)));
    }
    let rates: Vec<f64> = tenants.iter().map(|tenant| tenant.service_tokens_per_s).filter(|rate| *rate > 0.0).collect();
    let mut errors = BTreeMap::new();
    for error in outcomes.iter().filter_map(|one| one.result.as_ref().err()) {
        if errors.len() < ERRORS_MAX || errors.contains_key(error) {
            *errors.entry(error.clone()).or_insert(0) += 1;
        }
    }
    let rose = |(name, value): (&String, &f64)| (name.clone(), value - before.get(name).copied().unwrap_or(0.0));
    Report {
        workload: workload.clone(),
        pace,
        seconds,
        tokens_per_s,
        requests_per_s,
        classes,
        tenants,
        jain: jain(&rates),
        server: after.iter().map(rose).filter(|(_, by)| *by != 0.0).collect(),
        errors,
    }
}

fn group<'a>(name: &str, outcomes: impl Iterator<Item = &'a Outcome> + Clone) -> Group {
    let timed = || outcomes.clone().filter_map(|one| one.result.as_ref().ok());
    let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
    let tokens = timed().map(|one| one.tokens).sum();
    let open = outcomes.clone().filter_map(|one| Some((one.began, one.began + one.result.as_ref().ok()?.e2e)));
    let open = covered(open.collect()).as_secs_f64();
    Group {
        name: name.into(),
        answered: timed().count(),
        failed: outcomes.clone().filter(|one| one.result.is_err()).count(),
        tokens,
        service_tokens_per_s: if open > 0.0 { tokens as f64 / open } else { 0.0 },
        ttft_ms: Percentiles::of(timed().map(|one| millis(one.ttft)).collect()),
        inter_token_ms: Percentiles::of(timed().flat_map(|one| &one.gaps).copied().map(millis).collect()),
        e2e_ms: Percentiles::of(timed().map(|one| millis(one.e2e)).collect()),
    }
}

/// How much time intervals cover together.
fn covered(mut intervals: Vec<(Duration, Duration)>) -> Duration {
    intervals.sort_unstable();
    let (mut total, mut end) = (Duration::ZERO, Duration::ZERO);
    for (from, to) in intervals {
        total += to.saturating_sub(from.max(end));
        end = end.max(to);
    }
    total
}

/// (sum x)^2 / (n sum x^2); 1 for no numbers.
fn jain(values: &[f64]) -> f64 {
    let (sum, squares) = values.iter().fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
    if squares == 0.0 { 1.0 } else { sum * sum / (values.len() as f64 * squares) }
}

/// The unlabelled counters on the server's metrics page.
async fn counters(target: &Target) -> Result<BTreeMap<String, f64>> {
    let Some(address) = &target.metrics else { return Ok(BTreeMap::new()) };
    let mut stream = TcpStream::connect(address).await.with_context(|| format!("metrics at {address}"))?;
    let authorization = match target.keys.first().map(String::as_str) {
        None | Some("") => String::new(),
        Some(key) => format!("Authorization: Bearer {key}\r\n"),
    };
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\n{authorization}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut page = String::new();
    stream.take(METRICS_BYTES_MAX).read_to_string(&mut page).await?;
    let status = page.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        bail!("metrics at {address}: {status}");
    }
    Ok(parse_counters(&page))
}

fn parse_counters(page: &str) -> BTreeMap<String, f64> {
    let counters = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"));
    let counters: std::collections::BTreeSet<_> = counters.collect();
    let values = page.lines().filter_map(|line| line.split_once(' '));
    let values = values.filter(|(name, _)| counters.contains(name));
    values.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(tenant: u32, began_ms: u64, e2e_ms: u64, tokens: usize) -> Outcome {
        let request = Request {
            at_us: 0,
            tenant,
            class: 0,
            adapter: None,
            prompt_seed: 0,
            prompt_tokens: 1,
            answer_tokens: tokens as u32,
        };
        let ms = Duration::from_millis;
        let timed = Timed { tokens, ttft: ms(e2e_ms / 2), gaps: vec![ms(1); tokens - 1], e2e: ms(e2e_ms) };
        Outcome { request, began: ms(began_ms), result: Ok(timed) }
    }

    #[test]
    fn a_tenant_s_service_counts_only_while_it_asks() {
        let workload = Workload::preset("two-tenants").expect("a preset");
        // Tenant 0 asks for 1 s in all (two requests overlap), tenant 1 for 2 s.
        let mut outcomes = vec![
            outcome(0, 0, 600, 40),
            outcome(0, 400, 400, 40),
            outcome(0, 5_000, 200, 20),
            outcome(1, 0, 2_000, 50),
        ];
        outcomes.push(Outcome { result: Err("full".into()), ..outcome(1, 0, 1, 1) });
        let counter = |value| BTreeMap::from([("a_total".to_owned(), value)]);
        let report = report(&workload, Pace::Closed(4), 10.0, &outcomes, &counter(3.0), &counter(10.0));
        let rates: Vec<f64> = report.tenants.iter().map(|tenant| tenant.service_tokens_per_s).collect();
        assert_eq!(rates, [100.0, 25.0]);
        assert!((report.jain - 125.0_f64.powi(2) / (2.0 * (100.0_f64.powi(2) + 25.0_f64.powi(2)))).abs() < 1e-12);
        assert_eq!((report.tokens_per_s, report.classes[0].answered, report.classes[0].failed), (15.0, 4, 1));
        assert_eq!(report.tenants[1].failed, 1);
        assert_eq!((report.server["a_total"], report.errors["full"]), (7.0, 1));
    }

    #[test]
    fn counters_without_labels_are_read_from_a_metrics_page() {
        let page = "HTTP/1.1 200 OK\r\n\r\n# TYPE a_total counter\na_total 7\n# TYPE b gauge\nb 3\n# TYPE c_total counter\n\
                    c_total{code=\"OK\"} 2\n";
        assert_eq!(parse_counters(page), BTreeMap::from([("a_total".to_owned(), 7.0)]));
    }
}
