//! Draws a trace. Each question (when, who, which adapter, how long) has a random sequence of its own, so that changing
//! one of them leaves the others as they were: `one-r8` has the arrivals and prompts of `zipf-2k-r8`.

use anyhow::{Context, Result, bail};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::weighted::WeightedIndex;
use rand_distr::{Distribution, Gamma, LogNormal, Zipf};

use super::{FORMAT, Header, Lengths, Popularity, Request, Trace, Workload};

/// What a random sequence is for.
#[derive(Clone, Copy)]
enum Question {
    Ranks,
    Arrivals,
    Tenants,
    Classes,
    Adapters,
    Lengths,
    Prompts,
}

/// Draws all requests of `workload`.
///
/// # Errors
/// Numbers that are not a workload (a rate of 0, no tenants, negative weights), named.
pub fn generate(workload: &Workload) -> Result<Trace> {
    let random = |question: Question| {
        let mut random = ChaCha8Rng::seed_from_u64(workload.seed);
        random.set_stream(question as u64);
        random
    };
    check(workload)?;
    let weights = |of: &str, weights: Vec<f64>| WeightedIndex::new(weights).with_context(|| format!("weights of {of}"));
    let ranks = weights("ranks", workload.ranks.iter().map(|rank| rank.1).collect())?;
    let tenants = weights("tenants", workload.tenants.iter().map(|tenant| tenant.weight).collect())?;
    let classes = weights("classes", workload.classes.iter().map(|class| class.weight).collect())?;

    let mut rank = random(Question::Ranks);
    let adapter_ranks = (0..workload.adapters).map(|_| workload.ranks[ranks.sample(&mut rank)].0).collect();
    // Gamma with shape 1/cv^2 and mean 1/rate.
    let shape = workload.burstiness.powi(-2);
    let gaps = Gamma::new(shape, 1.0 / (workload.rate * shape)).context("rate and burstiness")?;
    let (mut arrival, mut tenant, mut class) =
        (random(Question::Arrivals), random(Question::Tenants), random(Question::Classes));
    let (mut length, mut prompt) = (random(Question::Lengths), random(Question::Prompts));
    let mut adapters = Adapters::new(workload, random(Question::Adapters))?;
    let mut seconds = 0.0;
    let mut requests = Vec::with_capacity(workload.requests as usize);
    for _ in 0..workload.requests {
        seconds += gaps.sample(&mut arrival);
        let class = classes.sample(&mut class);
        let lengths = &workload.classes[class];
        requests.push(Request {
            at_us: (seconds * 1e6) as u64,
            tenant: tenants.sample(&mut tenant) as u32,
            class: class as u32,
            adapter: adapters.draw(seconds),
            prompt_seed: prompt.random(),
            prompt_tokens: draw_length(&lengths.prompt, &mut length)?,
            answer_tokens: draw_length(&lengths.answer, &mut length)?,
        });
    }
    let header = Header { format: FORMAT.into(), workload: workload.clone(), adapter_ranks };
    Ok(Trace { header, requests })
}

fn check(workload: &Workload) -> Result<()> {
    let positive = |what: &str, value: f64| match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => bail!("{what} is {value}; it must be a positive number"),
    };
    let share = |what: &str, value: f64| match (0.0..=1.0).contains(&value) {
        true => Ok(()),
        false => bail!("{what} is {value}; it must be from 0 to 1"),
    };
    positive("rate", workload.rate)?;
    positive("burstiness", workload.burstiness)?;
    positive("drift_s", workload.drift_s.unwrap_or(1.0))?;
    share("drift_share", workload.drift_share)?;
    share("base_share", workload.base_share)?;
    if workload.adapters == 0 && workload.base_share < 1.0 {
        bail!("adapters is 0, so base_share must be 1");
    }
    Ok(())
}

fn draw_length(lengths: &Lengths, random: &mut ChaCha8Rng) -> Result<u32> {
    let length = LogNormal::new(lengths.median.ln(), lengths.sigma).context("lengths")?.sample(random);
    Ok((length.round() as u32).clamp(1, lengths.max.max(1)))
}

/// Draws adapters by their popularity, which drifts.
struct Adapters<'a> {
    workload: &'a Workload,
    random: ChaCha8Rng,
    /// The adapters, most popular first.
    order: Vec<u32>,
    zipf: Option<Zipf<f64>>,
    next_drift: f64,
}

impl<'a> Adapters<'a> {
    fn new(workload: &'a Workload, mut random: ChaCha8Rng) -> Result<Self> {
        let mut order: Vec<u32> = (0..workload.adapters).collect();
        order.shuffle(&mut random);
        let zipf = match workload.popularity {
            Popularity::Uniform => None,
            Popularity::Zipf(exponent) => {
                Some(Zipf::new(f64::from(workload.adapters.max(1)), exponent).context("popularity")?)
            }
        };
        Ok(Self { workload, random, order, zipf, next_drift: workload.drift_s.unwrap_or(f64::INFINITY) })
    }

    fn draw(&mut self, seconds: f64) -> Option<u32> {
        while seconds >= self.next_drift {
            self.drift();
            self.next_drift += self.workload.drift_s.unwrap_or(f64::INFINITY);
        }
        if self.workload.base_share > 0.0 && self.random.random_bool(self.workload.base_share) {
            return None;
        }
        let place = match &self.zipf {
            Some(zipf) => zipf.sample(&mut self.random) as usize - 1,
            None => self.random.random_range(0..self.order.len()),
        };
        Some(self.order[place])
    }

    fn drift(&mut self) {
        let moving = (self.order.len() as f64 * self.workload.drift_share) as usize;
        let places = rand::seq::index::sample(&mut self.random, self.order.len(), moving).into_vec();
        for pair in places.windows(2) {
            self.order.swap(pair[0], pair[1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(trace: &Trace) -> Vec<usize> {
        let mut counts = vec![0; trace.header.adapter_ranks.len()];
        for adapter in trace.requests.iter().filter_map(|request| request.adapter) {
            counts[adapter as usize] += 1;
        }
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }

    fn preset(name: &str) -> Workload {
        Workload::preset(name).expect("a preset")
    }

    #[test]
    fn the_same_workload_is_the_same_trace_and_another_seed_another() {
        let workload = preset("smoke");
        assert_eq!(generate(&workload).expect("sound"), generate(&workload).expect("sound"));
        let other = Workload { seed: 2, ..workload.clone() };
        assert_ne!(generate(&other).expect("sound").requests, generate(&workload).expect("sound").requests);
    }

    #[test]
    fn popularity_is_what_it_says() {
        let workload = Workload { requests: 100_000, drift_s: None, base_share: 0.0, ..preset("zipf-10k") };
        let zipf = counts(&generate(&workload).expect("sound"));
        // The first of 10,000 has 1 / H(10,000) = 10.2% of the requests, the tenth a tenth of that.
        let harmonic: f64 = (1..=10_000).map(|k| 1.0 / f64::from(k)).sum();
        for k in [1, 10] {
            let expected = 100_000.0 / harmonic / f64::from(k);
            assert!((zipf[k as usize - 1] as f64 / expected - 1.0).abs() < 0.15, "{k}: {}", zipf[k as usize - 1]);
        }
        let uniform = counts(&generate(&Workload { popularity: Popularity::Uniform, ..workload }).expect("sound"));
        assert!(uniform[0] < 40 && uniform[9_000] > 0, "10 each on average");
    }

    #[test]
    fn drift_moves_popularity_and_nothing_else() {
        let still = Workload { requests: 20_000, drift_s: None, ..preset("zipf-10k") };
        let moving = Workload { drift_s: Some(30.0), drift_share: 0.5, ..still.clone() };
        let (still, moving) = (generate(&still).expect("sound"), generate(&moving).expect("sound"));
        assert!(counts(&moving)[0] < counts(&still)[0], "the most popular one does not stay so");
        for (a, b) in still.requests.iter().zip(&moving.requests) {
            assert_eq!(Request { adapter: None, ..*a }, Request { adapter: None, ..*b });
        }
    }

    #[test]
    fn rate_burstiness_shares_and_lengths_are_what_they_say() {
        let workload = Workload { requests: 50_000, ..preset("zipf-10k") };
        let trace = generate(&workload).expect("sound");
        let n = trace.requests.len() as f64;
        let times: Vec<f64> = trace.requests.iter().map(|request| request.at_us as f64 / 1e6).collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((mean * workload.rate - 1.0).abs() < 0.05, "{mean} s between arrivals");
        assert!((deviation / mean / workload.burstiness - 1.0).abs() < 0.05, "coefficient {}", deviation / mean);
        let share =
            |matches: &dyn Fn(&Request) -> bool| trace.requests.iter().filter(|r| matches(r)).count() as f64 / n;
        assert!((share(&|r| r.adapter.is_none()) - 0.05).abs() < 0.01);
        assert!((share(&|r| r.class == 0) - 0.8).abs() < 0.01);
        assert!((share(&|r| r.tenant == 0) / share(&|r| r.tenant == 1) - 2.0).abs() < 0.1);
        let mut prompts: Vec<u32> = trace.requests.iter().filter(|r| r.class == 1).map(|r| r.prompt_tokens).collect();
        prompts.sort_unstable();
        assert!((f64::from(prompts[prompts.len() / 2]) / 160.0 - 1.0).abs() < 0.05);
        assert!(*prompts.last().expect("some") <= 1024 && prompts[0] >= 1);
        let mut seeds: Vec<u64> = trace.requests.iter().map(|request| request.prompt_seed).collect();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), trace.requests.len(), "prompts are distinct");
    }

    #[test]
    fn the_throughput_workloads_differ_in_adapters_alone() {
        let [one, zipf] = ["one-r8", "zipf-2k-r8"].map(|name| generate(&preset(name)).expect("sound").requests);
        for (a, b) in one.iter().zip(&zipf) {
            assert_eq!(Request { adapter: None, ..*a }, Request { adapter: None, ..*b });
        }
    }

    #[test]
    fn numbers_that_are_no_workload_are_refused_by_name() {
        let sound = preset("smoke");
        let cases = [
            (Workload { rate: 0.0, ..sound.clone() }, "rate"),
            (Workload { burstiness: f64::NAN, ..sound.clone() }, "burstiness"),
            (Workload { base_share: 1.5, ..sound.clone() }, "base_share"),
            (Workload { drift_share: -0.1, ..sound.clone() }, "drift_share"),
            (Workload { adapters: 0, ..sound.clone() }, "adapters"),
            (Workload { tenants: Vec::new(), ..sound.clone() }, "tenants"),
            (Workload { ranks: vec![(8, -1.0)], ..sound.clone() }, "ranks"),
        ];
        for (workload, name) in cases {
            let error = format!("{:#}", generate(&workload).expect_err(name));
            assert!(error.contains(name), "{error}");
        }
    }
}
