//! An opened folder as an adapter: configuration, tensors and how they fit the base model.

use std::{collections::BTreeSet, fs::File, io::Read, sync::Arc};

use openlora_types::{AdapterSizes, Generation, InvalidField, Limits, ModelShape, Module, SiteSize};

use crate::{
    config::{CONFIG_FILE, LoraConfig},
    error::AdapterError,
    folder::AdapterFolder,
    json::shown,
    matching::{self, Plan, PlannedSite},
    registry::Summary,
    safetensors_file::{Dtype, Header, TENSORS_FILE, TensorEntry},
    weights,
};

/// Rows of the base model's embedding table and output head, to compare the copies with that PEFT saves beside an
/// adapter on those layers (`save_embedding_layers`). Loading such a copy would replace the base for everybody, so it is
/// accepted only where it says what the base says already.
pub trait BaseRows: Send + Sync {
    /// Writes row `row` of `module` (`Embed` or `LmHead`; the same table where they are tied), `[hidden]`.
    fn read_row(&self, module: Module, row: usize, out: &mut [f32]);
}

/// An adapter's folder, read up to its tensors' bytes.
pub(crate) struct Parsed {
    pub(crate) config: LoraConfig,
    pub(crate) header: Header,
    pub(crate) plan: Plan,
    /// Where this is not empty, `plan` must not be used.
    pub(crate) problems: Vec<InvalidField>,
    pub(crate) file: File,
}

impl Parsed {
    /// Reads the configuration and the tensors' header of a folder.
    pub(crate) fn read(folder: &AdapterFolder, shape: &ModelShape, limits: &Limits) -> Result<Self, AdapterError> {
        let (config, length) = folder.open(CONFIG_FILE, limits)?;
        Self::read_files((config, length), folder.open(TENSORS_FILE, limits)?, shape, limits)
    }

    /// As [`Self::read`], from the two files with their lengths.
    pub(crate) fn read_files(
        (config, length): (File, u64),
        (file, bytes): (File, u64),
        shape: &ModelShape,
        limits: &Limits,
    ) -> Result<Self, AdapterError> {
        let mut text = Vec::with_capacity(length.min(limits.adapter_config_bytes_max as u64) as usize);
        // One byte more than the limit shows a file that grew since its size was checked.
        let most = limits.adapter_config_bytes_max as u64 + 1;
        config.take(most).read_to_end(&mut text).map_err(AdapterError::io(format!("read {CONFIG_FILE}")))?;
        let config = LoraConfig::parse(&text, limits)?;
        let header = Header::read(&file, bytes, limits)?;
        let (plan, problems) = matching::plan(&config, shape, &header, limits);
        Ok(Self { config, header, plan, problems, file })
    }

    /// Refuses an adapter with problems, naming the first.
    pub(crate) fn check(&self) -> Result<(), AdapterError> {
        let Some(first) = self.problems.first() else { return Ok(()) };
        let mut problem = first.clone();
        if self.problems.len() > 1 {
            let more = self.problems.len() - 1;
            problem.reason.push_str(&format!(" ({more} more problems; `openlora adapter inspect` lists them)"));
        }
        Err(problem.into())
    }

    /// Hashes the tensors.
    pub(crate) fn generation(&self) -> Result<Generation, AdapterError> {
        weights::hash(&self.file, &self.header, &self.plan)
    }

    /// What is to be known of the adapter without opening its files.
    pub(crate) fn summary(&self) -> Summary {
        let sites = &self.plan.sites;
        let modules: BTreeSet<Module> = sites.iter().map(|site| site.site.module).collect();
        let sizes = AdapterSizes { sites: sites.iter().map(|site| self.site_size(site)).collect() };
        Summary {
            sizes: Arc::new(sizes),
            rank_max: sites.iter().map(|site| site.rank as u32).max().unwrap_or(0),
            bytes: sites.iter().map(|site| self.site_bytes(site)).sum(),
            dora: self.config.dora,
            modules: modules.into_iter().map(|module| module_name(module).to_owned()).collect(),
        }
    }

    /// As `AdapterWeights::sizes` has it once the weights are read.
    fn site_size(&self, site: &PlannedSite) -> SiteSize {
        let shape = |index: usize| &self.header.tensors[index].shape;
        SiteSize {
            site: site.site,
            rank: site.rank,
            inputs: shape(site.a)[1],
            outputs: shape(site.b)[0],
            b_bias: site.b_bias.is_some(),
            dora: site.magnitude.is_some(),
        }
    }

    /// Bytes of a site's factors in memory, as `SiteWeights::byte_len` counts them.
    pub(crate) fn site_bytes(&self, site: &PlannedSite) -> u64 {
        let tensor = |index: usize| &self.header.tensors[index];
        // Vectors are held as f32.
        let vector = |index: Option<usize>| index.map_or(0, |i| tensor(i).bytes / tensor(i).dtype.size() * 4);
        tensor(site.a).bytes + tensor(site.b).bytes + vector(site.b_bias) + vector(site.magnitude)
    }

    /// Compares the copies of base weights with the base.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] naming the tensor that differs, or every such tensor where there is no base to ask.
    pub(crate) fn check_base_copies(&self, base: Option<&dyn BaseRows>) -> Result<(), AdapterError> {
        for &(module, index) in &self.plan.base_copies {
            let tensor = &self.header.tensors[index];
            let refuse =
                |reason: String| AdapterError::invalid(format!("{TENSORS_FILE}: {}", shown(&tensor.name)), reason);
            let advice = "save the adapter with save_embedding_layers=False, which leaves the copy out";
            let Some(base) = base else {
                return Err(refuse(format!(
                    "is a copy of the base model's weights that cannot be checked here; {advice}"
                )));
            };
            if let Some(row) = self.first_different_row(module, tensor, base)? {
                return Err(refuse(format!(
                    "is a copy of the base model's weights that differs from the base served here, first in row {row}; \
                     if it was trained, the adapter cannot be served; otherwise {advice}"
                )));
            }
        }
        Ok(())
    }

    fn first_different_row(
        &self,
        module: Module,
        tensor: &TensorEntry,
        base: &dyn BaseRows,
    ) -> Result<Option<usize>, AdapterError> {
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        let row_bytes = cols as u64 * tensor.dtype.size();
        let mut bytes = vec![0; row_bytes as usize];
        let mut wanted = vec![0.0; cols];
        for row in 0..rows {
            weights::read_tensor(&self.file, &self.header, tensor, row as u64 * row_bytes, &mut bytes)?;
            base.read_row(module, row, &mut wanted);
            if !equal_at_precision(tensor.dtype, &bytes, &wanted) {
                return Ok(Some(row));
            }
        }
        Ok(None)
    }
}

/// Whether every number is the wanted one, as far as its format can tell: within one unit in the last place.
fn equal_at_precision(dtype: Dtype, bytes: &[u8], wanted: &[f32]) -> bool {
    let (ulp, smallest) = match dtype {
        Dtype::F32 => (f32::EPSILON, f32::MIN_POSITIVE),
        Dtype::F16 => (1.0 / 1024.0, 6.0e-8),
        Dtype::Bf16 => (1.0 / 128.0, f32::MIN_POSITIVE),
    };
    let number = |b: &[u8]| match dtype {
        Dtype::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        Dtype::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f32(),
        Dtype::Bf16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
    };
    // A NaN fails the comparison.
    bytes
        .chunks_exact(dtype.size() as usize)
        .zip(wanted)
        .all(|(b, wanted)| (number(b) - wanted).abs() <= wanted.abs() * ulp + smallest)
}

/// A module's own name, without its path.
fn module_name(module: Module) -> &'static str {
    match module {
        Module::Q => "q_proj",
        Module::K => "k_proj",
        Module::V => "v_proj",
        Module::O => "o_proj",
        Module::Gate => "gate_proj",
        Module::Up => "up_proj",
        Module::Down => "down_proj",
        Module::Embed => "embed_tokens",
        Module::LmHead => "lm_head",
    }
}
