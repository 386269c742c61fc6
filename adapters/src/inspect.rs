//! `openlora adapter inspect`: what a folder holds and whether this server would take it, without a server.

use std::{collections::BTreeSet, path::Path};

use openlora_types::{Limits, ModelShape, Site};
use serde::Serialize;

use crate::{error::AdapterError, folder::AdapterFolder, parse::Parsed};

/// A site the adapter changes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MatchedModule {
    /// Full name, such as `model.layers.3.self_attn.q_proj`.
    pub module: String,
    /// Rank r.
    pub rank: usize,
    /// What the product of the factors is multiplied with.
    pub scale: f32,
    /// Bytes of its factors in memory.
    pub bytes: u64,
    /// Number format of its factors.
    pub dtype: &'static str,
}

/// What [`inspect_folder`] found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// The identity the adapter would be registered under; absent where it would be refused.
    pub generation: Option<String>,
    /// Sites with factors, in ascending order.
    pub matched: Vec<MatchedModule>,
    /// Modules of the base model that stay as they are.
    pub unmatched_modules: Vec<String>,
    /// Tensors of the file that belong to no site of this adapter.
    pub unmatched_tensors: Vec<String>,
    /// Full copies of base weights, accepted only by a server whose base they equal.
    pub base_copies: Vec<String>,
    /// Largest rank of any site.
    pub rank_max: usize,
    /// Bytes of all factors in memory.
    pub bytes: u64,
    /// Whether it has DoRA magnitudes.
    pub dora: bool,
    /// Whether scales are alpha / sqrt(r).
    pub rslora: bool,
    /// Why it would be refused, field by field; empty where it would be accepted.
    pub problems: Vec<String>,
}

/// Reads the adapter in `path` as registering it would, and lists what does not fit instead of stopping at the first
/// thing.
///
/// # Errors
/// Where there is nothing to list: the folder, the configuration or the tensors' header cannot be read.
pub fn inspect_folder(path: &Path, shape: &ModelShape, limits: &Limits) -> Result<Inspection, AdapterError> {
    let folder = AdapterFolder::open_own(path)?;
    folder.check_entries(limits)?;
    let parsed = Parsed::read(&folder, shape, limits)?;
    let mut problems: Vec<String> = parsed.problems.iter().map(ToString::to_string).collect();
    let generation = match parsed.check().and_then(|()| parsed.generation()) {
        Ok(generation) => Some(generation.to_string()),
        Err(error) if problems.is_empty() => {
            problems.push(error.to_string());
            None
        }
        Err(_) => None,
    };
    let tensor = |index: usize| &parsed.header.tensors[index];
    let matched = parsed.plan.sites.iter().map(|site| MatchedModule {
        module: site.site.to_string(),
        rank: site.rank,
        scale: site.scale,
        bytes: parsed.site_bytes(site),
        dtype: tensor(site.a).dtype.name(),
    });
    let matched: Vec<_> = matched.collect();
    let adapted: BTreeSet<Site> = parsed.plan.sites.iter().map(|site| site.site).collect();
    let parts = parsed.plan.sites.iter().flat_map(|site| [Some(site.a), Some(site.b), site.b_bias, site.magnitude]);
    let copies = parsed.plan.base_copies.iter().map(|&(_, index)| index);
    let used: BTreeSet<usize> = parts.flatten().chain(copies).collect();
    let unused = (0..parsed.header.tensors.len()).filter(|index| !used.contains(index));
    Ok(Inspection {
        generation,
        rank_max: parsed.plan.sites.iter().map(|site| site.rank).max().unwrap_or(0),
        bytes: matched.iter().map(|module| module.bytes).sum(),
        unmatched_modules: shape.sites().filter(|site| !adapted.contains(site)).map(|site| site.to_string()).collect(),
        unmatched_tensors: unused.map(|index| tensor(index).name.clone()).collect(),
        base_copies: parsed.plan.base_copies.iter().map(|&(_, index)| tensor(index).name.clone()).collect(),
        dora: parsed.config.dora,
        rslora: parsed.config.rslora,
        matched,
        problems,
    })
}
