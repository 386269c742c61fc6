//! The public workload: what many tenants ask of many adapters, as a file that any system can be given.
//!
//! A trace is JSON lines. The first is the [`Header`]: every adapter's rank, the tenants and classes; each further line is one
//! [`Request`], in order of arrival. A prompt is a seed and a length, so that a trace of a million requests stays small and
//! no two requests share a prompt: [`prompt`] says which tokens it stands for. [`generate`] makes traces from a
//! [`Workload`]; docs/workload.md describes the format for other systems' authors.

mod generate;
mod workload;

use std::io::{BufRead, Write};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

pub use generate::generate;
pub use workload::{Class, Lengths, PRESETS, Popularity, Tenant, Workload};

/// What the first line calls the format.
pub const FORMAT: &str = "openlora-trace/1";
/// Tokens below this are special in most vocabularies; prompts have none of them.
const FIRST_TOKEN: u64 = 100;
/// A longer line is not a trace.
const LINE_BYTES_MAX: usize = 16 << 20;

/// The first line of a trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`FORMAT`]
    pub format: String,
    /// What the requests were drawn from.
    pub workload: Workload,
    /// Rank of each adapter, by its number.
    pub adapter_ranks: Vec<u32>,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Arrival, microseconds after the start.
    pub at_us: u64,
    /// Index into [`Workload::tenants`].
    pub tenant: u32,
    /// Index into [`Workload::classes`].
    pub class: u32,
    /// Number of the adapter; none asks the base model.
    pub adapter: Option<u32>,
    /// Seed of the prompt, see [`prompt`].
    pub prompt_seed: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer; the end-of-sequence token does not end it.
    pub answer_tokens: u32,
}

/// A whole trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Its first line.
    pub header: Header,
    /// Its other lines.
    pub requests: Vec<Request>,
}

impl Trace {
    /// Writes the JSON lines.
    ///
    /// # Errors
    /// Writing fails.
    pub fn write(&self, mut out: impl Write) -> Result<()> {
        serde_json::to_writer(&mut out, &self.header)?;
        writeln!(out)?;
        for request in &self.requests {
            serde_json::to_writer(&mut out, request)?;
            writeln!(out)?;
        }
        out.flush()?;
        Ok(())
    }

    /// Reads the JSON lines.
    ///
    /// # Errors
    /// A line that is not what it should be, named by its number; requests that are not in order or name what is not there.
    pub fn read(mut input: impl BufRead) -> Result<Self> {
        let mut line = String::new();
        next_line(&mut input, &mut line).context("line 1")?;
        let header: Header = serde_json::from_str(&line).context("line 1")?;
        if header.format != FORMAT {
            bail!("line 1: the format is {:?}; this reads {FORMAT:?}", header.format);
        }
        let workload = &header.workload;
        let (tenants, classes, adapters) = (workload.tenants.len(), workload.classes.len(), header.adapter_ranks.len());
        let mut requests: Vec<Request> = Vec::new();
        for number in 2.. {
            if !next_line(&mut input, &mut line).with_context(|| format!("line {number}"))? {
                break;
            }
            let request: Request = serde_json::from_str(&line).with_context(|| format!("line {number}"))?;
            let there = (request.tenant as usize) < tenants
                && (request.class as usize) < classes
                && request.adapter.is_none_or(|adapter| (adapter as usize) < adapters);
            if !there {
                bail!("line {number} names a tenant, class or adapter that the first line does not have");
            }
            if request.prompt_tokens == 0 || request.answer_tokens == 0 {
                bail!("line {number}: prompt and answer need at least one token");
            }
            if requests.last().is_some_and(|last| last.at_us > request.at_us) {
                bail!("line {number} arrives before the line above it");
            }
            requests.push(request);
        }
        Ok(Self { header, requests })
    }
}

fn next_line(input: &mut impl BufRead, line: &mut String) -> Result<bool> {
    line.clear();
    let read = std::io::Read::take(&mut *input, LINE_BYTES_MAX as u64).read_line(line)?;
    if read == LINE_BYTES_MAX {
        bail!("has more than {LINE_BYTES_MAX} bytes");
    }
    Ok(read > 0)
}

/// The tokens of a prompt in a vocabulary of `vocab`: token i is 100 + splitmix64(seed + i) mod (vocab - 100), where splitmix64
/// is the finaliser of Steele, Lea and Flood 2014 on (seed + i + 1) times the golden ratio.
///
/// # Panics
/// When the vocabulary has no more than 100 tokens.
#[must_use]
pub fn prompt(seed: u64, tokens: u32, vocab: u32) -> Vec<u32> {
    let range = u64::from(vocab).checked_sub(FIRST_TOKEN).filter(|range| *range > 0).expect("more than 100 tokens");
    let token = |i: u64| {
        let mut z = seed.wrapping_add(i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (FIRST_TOKEN + (z ^ (z >> 31)) % range) as u32
    };
    (0..u64::from(tokens)).map(token).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Trace {
        generate(&Workload::preset("smoke").expect("a preset")).expect("a sound workload")
    }

    #[test]
    fn a_trace_survives_its_file() {
        let trace = small();
        let mut bytes = Vec::new();
        trace.write(&mut bytes).expect("memory");
        assert_eq!(Trace::read(bytes.as_slice()).expect("our own file"), trace);
    }

    #[test]
    fn lines_that_are_wrong_are_refused_by_number() {
        let mut bytes = Vec::new();
        small().write(&mut bytes).expect("memory");
        let text = String::from_utf8(bytes).expect("JSON");
        let (head, rest) = text.split_once('\n').expect("lines");
        let first = rest.lines().next().expect("a request");
        let with = |line: &str| format!("{head}\n{line}\n");
        let cases = [
            (String::new(), "line 1"),
            (text.replace(FORMAT, "other/1"), "line 1: the format is \"other/1\""),
            (with(&first.replace("\"tenant\":", "\"tenants\":")), "line 2"),
            (
                with(&first.replace("\"class\":0", "\"class\":9").replace("\"class\":1", "\"class\":9")),
                "line 2 names a",
            ),
            (format!("{text}{first}\n"), "arrives before"),
        ];
        for (text, message) in cases {
            let error = format!("{:#}", Trace::read(text.as_bytes()).expect_err(message));
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn prompts_are_the_same_for_ever_and_differ_by_seed() {
        // From a Python version of the definition; splitmix64 of seed 0 begins with 0xe220a8397b1dcdaf.
        assert_eq!(prompt(0, 4, 49_152), [11967, 31336, 45663, 2560]);
        assert_ne!(prompt(1, 64, 49_152), prompt(2, 64, 49_152));
        assert!(prompt(7, 1000, 101).iter().all(|token| *token == 100));
    }
}
