//! What a trace is drawn from.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// A workload. Two traces of one workload are equal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// What it is called.
    pub name: String,
    /// Start of all random sequences.
    pub seed: u64,
    /// Requests in all.
    pub requests: u32,
    /// Adapters there are.
    pub adapters: u32,
    /// Ranks and how often each is found among the adapters (any positive weights).
    pub ranks: Vec<(u32, f64)>,
    /// How requests are spread over the adapters.
    pub popularity: Popularity,
    /// Every so many seconds of the trace...
    pub drift_s: Option<f64>,
    /// ...this share of the adapters exchange their places in the order of popularity.
    pub drift_share: f64,
    /// Share of the requests that ask the base model.
    pub base_share: f64,
    /// Mean arrivals a second.
    pub rate: f64,
    /// Coefficient of variation of the times between arrivals, which are Gamma distributed: 1 is a Poisson process, more is
    /// burstier (Sheng et al. 2024, S-LoRA, section 7).
    pub burstiness: f64,
    /// Who asks.
    pub tenants: Vec<Tenant>,
    /// What for.
    pub classes: Vec<Class>,
}

/// How often each adapter is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Popularity {
    /// All alike.
    Uniform,
    /// The k-th most popular in proportion to 1 / k^exponent.
    Zipf(f64),
}

/// A tenant: a key of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenant {
    /// Its name.
    pub name: String,
    /// Its share of the requests, in proportion to all tenants' weights.
    pub weight: f64,
}

/// Requests of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Its name.
    pub name: String,
    /// Its share of the requests.
    pub weight: f64,
    /// -1 low, 0 normal, 1 high.
    pub priority: i8,
    /// Tokens of prompts.
    pub prompt: Lengths,
    /// Tokens of answers.
    pub answer: Lengths,
}

/// A distribution of lengths: log-normal with this median and sigma, rounded and held between 1 and `max`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lengths {
    /// Half are shorter.
    pub median: f64,
    /// Standard deviation of the logarithm; 0 makes all alike.
    pub sigma: f64,
    /// None is longer.
    pub max: u32,
}

impl Lengths {
    const fn fixed(tokens: u32) -> Self {
        Self { median: tokens as f64, sigma: 0.0, max: tokens }
    }
}

/// Presets by name, and what they are for.
pub const PRESETS: [(&str, &str); 7] = [
    ("zipf-10k", "10,000 adapters of ranks 4 to 128, Zipf(1.0) with drift, 8 tenants, two classes"),
    ("uniform-10k", "the same, every adapter alike popular"),
    ("zipf-2k-r8", "2,000 adapters of rank 8, Zipf(1.0), equal lengths: throughput against one-r8"),
    ("uniform-2k-r8", "the same, every adapter alike popular"),
    ("one-r8", "the same requests, all for one adapter"),
    ("two-tenants", "one tenant sends ten times as much as the other"),
    ("smoke", "a few requests for 20 adapters"),
];

impl Workload {
    /// One of [`PRESETS`].
    ///
    /// # Errors
    /// An unknown name.
    pub fn preset(name: &str) -> Result<Self> {
        let throughput = |adapters, popularity| Self {
            name: name.into(),
            seed: 1,
            requests: 2_000,
            adapters,
            ranks: vec![(8, 1.0)],
            popularity,
            drift_s: None,
            drift_share: 0.0,
            base_share: 0.0,
            rate: 25.0,
            burstiness: 1.0,
            tenants: vec![Tenant { name: "only".into(), weight: 1.0 }],
            classes: vec![class("equal", 1.0, 0, Lengths::fixed(64), Lengths::fixed(32))],
        };
        let mixed = |adapters, popularity| Self {
            requests: 10_000,
            ranks: vec![(4, 0.15), (8, 0.3), (16, 0.3), (32, 0.15), (64, 0.07), (128, 0.03)],
            drift_s: Some(60.0),
            drift_share: 0.05,
            base_share: 0.05,
            rate: 8.0,
            burstiness: 2.0,
            tenants: (0..8).map(|i| Tenant { name: format!("tenant-{i}"), weight: 1.0 / f64::from(i + 1) }).collect(),
            classes: vec![
                class("interactive", 0.8, 1, lengths(48.0, 0.8, 512), lengths(32.0, 0.6, 256)),
                class("bulk", 0.2, -1, lengths(160.0, 0.7, 1024), lengths(64.0, 0.5, 512)),
            ],
            ..throughput(adapters, popularity)
        };
        Ok(match name {
            "zipf-10k" => mixed(10_000, Popularity::Zipf(1.0)),
            "uniform-10k" => mixed(10_000, Popularity::Uniform),
            "zipf-2k-r8" => throughput(2_000, Popularity::Zipf(1.0)),
            "uniform-2k-r8" => throughput(2_000, Popularity::Uniform),
            "one-r8" => throughput(1, Popularity::Uniform),
            "two-tenants" => Self {
                requests: 600,
                rate: 20.0,
                tenants: vec![
                    Tenant { name: "quiet".into(), weight: 1.0 },
                    Tenant { name: "loud".into(), weight: 10.0 },
                ],
                ..throughput(16, Popularity::Uniform)
            },
            "smoke" => Self { requests: 60, rate: 40.0, ..mixed(20, Popularity::Zipf(1.0)) },
            other => {
                let names: Vec<_> = PRESETS.iter().map(|(name, _)| *name).collect();
                bail!("there is no workload {other:?}; there are {}, or give a trace file", names.join(", "));
            }
        })
    }
}

fn class(name: &str, weight: f64, priority: i8, prompt: Lengths, answer: Lengths) -> Class {
    Class { name: name.into(), weight, priority, prompt, answer }
}

const fn lengths(median: f64, sigma: f64, max: u32) -> Lengths {
    Lengths { median, sigma, max }
}
