use half::{bf16, f16};

use crate::{Generation, Site};

/// Numbers as they stood in the file. Backends choose how to hold them on the device.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// IEEE half precision.
    F16(Vec<f16>),
    /// bfloat16.
    Bf16(Vec<bf16>),
}

impl Elements {
    /// How many numbers.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        match self {
            Self::F32(values) => values.len() * 4,
            Self::F16(values) => values.len() * 2,
            Self::Bf16(values) => values.len() * 2,
        }
    }

    /// The numbers as `f32`; exact for all three formats.
    pub fn iter_f32(&self) -> Box<dyn Iterator<Item = f32> + '_> {
        match self {
            Self::F32(values) => Box::new(values.iter().copied()),
            Self::F16(values) => Box::new(values.iter().map(|value| value.to_f32())),
            Self::Bf16(values) => Box::new(values.iter().map(|value| value.to_f32())),
        }
    }

    /// The numbers as `f32`, collected.
    #[must_use]
    pub fn to_f32_vec(&self) -> Vec<f32> {
        self.iter_f32().collect()
    }
}

/// A row-major matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `rows * cols` numbers, row by row.
    pub elements: Elements,
}

/// The factors of one site: the adapted linear computes `W x + bias + scale * B (A x)`, or with a magnitude m (DoRA, Liu et
/// al. 2024, equation 5) `m / ||W + scale * B A|| * (W x + scale * B (A x)) + bias`, the norm taken per output row.
///
/// For `embed_tokens` the input is a token, so `A x` is column `token` of A, `[rank, vocab]`, and B is `[hidden, rank]`.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteWeights {
    /// Where it applies.
    pub site: Site,
    /// `[rank, inputs]`, in Hugging Face's column order.
    pub a: Matrix,
    /// `[outputs, rank]`, in Hugging Face's row order.
    pub b: Matrix,
    /// alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    pub scale: f32,
    /// `[outputs]`: PEFT's `lora_bias`, the bias of the B linear; multiplied by `scale` with the rest of B's output.
    pub b_bias: Option<Vec<f32>>,
    /// `[outputs]`: DoRA's magnitude vector.
    pub magnitude: Option<Vec<f32>>,
}

impl SiteWeights {
    /// The rank r.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.a.rows
    }

    /// Bytes held by the factors.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        let vector = |values: &Option<Vec<f32>>| values.as_ref().map_or(0, |values| values.len() * 4);
        self.a.elements.byte_len() + self.b.elements.byte_len() + vector(&self.b_bias) + vector(&self.magnitude)
    }
}

/// One adapter, parsed and verified: every tensor of its file is here and nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterWeights {
    /// The content hash this was verified against.
    pub generation: Generation,
    /// Sites in ascending order, each at most once.
    pub sites: Vec<SiteWeights>,
}

impl AdapterWeights {
    /// Bytes held by the factors of all sites.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.sites.iter().map(SiteWeights::byte_len).sum()
    }

    /// The largest rank of any site.
    #[must_use]
    pub fn rank_max(&self) -> usize {
        self.sites.iter().map(SiteWeights::rank).max().unwrap_or(0)
    }

    /// What the weights need of a device.
    #[must_use]
    pub fn sizes(&self) -> AdapterSizes {
        let size = |site: &SiteWeights| SiteSize {
            site: site.site,
            rank: site.rank(),
            inputs: site.a.cols,
            outputs: site.b.rows,
            b_bias: site.b_bias.is_some(),
            dora: site.magnitude.is_some(),
        };
        AdapterSizes { sites: self.sites.iter().map(size).collect() }
    }
}

/// What an adapter needs of a device, known without its weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterSizes {
    /// Sites in ascending order, each at most once.
    pub sites: Vec<SiteSize>,
}

/// The sizes of one site of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiteSize {
    /// The site.
    pub site: Site,
    /// r
    pub rank: usize,
    /// Columns of A.
    pub inputs: usize,
    /// Rows of B.
    pub outputs: usize,
    /// Whether B has a bias of `outputs` numbers.
    pub b_bias: bool,
    /// Whether there is a DoRA magnitude of `outputs` numbers.
    pub dora: bool,
}
