//! An adapter's tensors: hashed into its generation, checked for NaN and infinity, and read into [`AdapterWeights`].
//!
//! Hashing and reading are one pass over the same bytes, so what is used is what was hashed, whatever happens to the
//! file meanwhile. The encoding is described in `docs/generation.md`.

use std::{fs::File, io, os::unix::fs::FileExt};

use half::{bf16, f16};
use openlora_types::{AdapterWeights, Elements, Generation, Matrix, Module, SiteWeights};

use crate::{
    error::AdapterError,
    json::shown,
    matching::{Plan, PlannedSite},
    safetensors_file::{Dtype, Header, TENSORS_FILE, TensorEntry},
};

#[cfg(target_endian = "big")]
compile_error!("tensors are read into memory as they stand in the file, which is little-endian");

/// First bytes of the encoding; a change of the encoding changes them.
const DOMAIN: &[u8] = b"openlora adapter generation v1\0";
/// Bytes read at a time.
const PIECE: usize = 1 << 20;

/// The modules by their codes in the encoding; never renumbered.
const MODULES: [Module; 9] =
    [Module::Q, Module::K, Module::V, Module::O, Module::Gate, Module::Up, Module::Down, Module::Embed, Module::LmHead];

/// The code of a module in the encoding.
pub(crate) fn module_code(module: Module) -> u8 {
    let found = MODULES.iter().position(|&known| known == module);
    found.expect("every module has a code") as u8
}

/// The module of a code.
pub(crate) fn module_of(code: u8) -> Option<Module> {
    MODULES.get(usize::from(code)).copied()
}

fn dtype_code(dtype: Dtype) -> u8 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
    }
}

/// Hashes the tensors of `plan`, holding none of them.
///
/// # Errors
/// [`AdapterError::Invalid`] naming a tensor that holds NaN or infinity, [`AdapterError::Io`].
pub(crate) fn hash(file: &File, header: &Header, plan: &Plan) -> Result<Generation, AdapterError> {
    let mut pass = Pass::new(file, header, plan);
    let mut scratch = vec![0; PIECE];
    for site in &plan.sites {
        pass.site(site);
        for index in parts(site) {
            pass.part(index);
            let tensor = &header.tensors[index];
            let mut done = 0;
            while done < tensor.bytes {
                let piece = &mut scratch[..(tensor.bytes - done).min(PIECE as u64) as usize];
                pass.read(tensor, done, piece)?;
                done += piece.len() as u64;
            }
        }
    }
    Ok(Generation(*pass.hasher.finalize().as_bytes()))
}

/// Reads the tensors of `plan` and names what was read by its hash.
///
/// # Errors
/// As [`hash`].
pub(crate) fn load(file: &File, header: &Header, plan: &Plan) -> Result<AdapterWeights, AdapterError> {
    let mut pass = Pass::new(file, header, plan);
    let mut sites = Vec::with_capacity(plan.sites.len());
    for site in &plan.sites {
        pass.site(site);
        let a = pass.matrix(site.a)?;
        let b = pass.matrix(site.b)?;
        let b_bias = site.b_bias.map(|index| pass.vector(index)).transpose()?;
        let magnitude = site.magnitude.map(|index| pass.vector(index)).transpose()?;
        sites.push(SiteWeights { site: site.site, a, b, scale: site.scale, b_bias, magnitude });
    }
    Ok(AdapterWeights { generation: Generation(*pass.hasher.finalize().as_bytes()), sites })
}

/// The site's tensors in the order of the encoding.
fn parts(site: &PlannedSite) -> impl Iterator<Item = usize> {
    [Some(site.a), Some(site.b), site.b_bias, site.magnitude].into_iter().flatten()
}

/// One pass over an adapter's tensors in canonical order.
struct Pass<'a> {
    file: &'a File,
    header: &'a Header,
    hasher: blake3::Hasher,
}

impl<'a> Pass<'a> {
    fn new(file: &'a File, header: &'a Header, plan: &Plan) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(DOMAIN);
        hasher.update(&(plan.sites.len() as u32).to_le_bytes());
        Self { file, header, hasher }
    }

    fn site(&mut self, site: &PlannedSite) {
        let flags = u8::from(site.b_bias.is_some()) | u8::from(site.magnitude.is_some()) << 1;
        self.hasher.update(&site.site.layer.to_le_bytes());
        self.hasher.update(&[module_code(site.site.module)]);
        self.hasher.update(&(site.rank as u32).to_le_bytes());
        self.hasher.update(&site.scale.to_bits().to_le_bytes());
        self.hasher.update(&[flags]);
    }

    fn part(&mut self, index: usize) {
        let tensor = &self.header.tensors[index];
        self.hasher.update(&[dtype_code(tensor.dtype), tensor.shape.len() as u8]);
        for &dim in &tensor.shape {
            self.hasher.update(&(dim as u64).to_le_bytes());
        }
    }

    /// Fills `piece` with the tensor's bytes from `at` on, hashes and checks them.
    fn read(&mut self, tensor: &TensorEntry, at: u64, piece: &mut [u8]) -> Result<(), AdapterError> {
        read_tensor(self.file, self.header, tensor, at, piece)?;
        self.hasher.update(piece);
        if all_finite(tensor.dtype, piece) {
            return Ok(());
        }
        let why = "holds NaN or an infinity; the adapter would spread it through every answer";
        Err(AdapterError::invalid(format!("{TENSORS_FILE}: {}", shown(&tensor.name)), why))
    }

    fn elements(&mut self, index: usize) -> Result<Elements, AdapterError> {
        self.part(index);
        let header = self.header;
        let tensor = &header.tensors[index];
        let count = (tensor.bytes / tensor.dtype.size()) as usize;
        Ok(match tensor.dtype {
            Dtype::F32 => Elements::F32(self.fill(tensor, vec![0.0; count])?),
            Dtype::F16 => Elements::F16(self.fill(tensor, vec![f16::ZERO; count])?),
            Dtype::Bf16 => Elements::Bf16(self.fill(tensor, vec![bf16::ZERO; count])?),
        })
    }

    fn fill<T: bytemuck::Pod>(&mut self, tensor: &TensorEntry, mut values: Vec<T>) -> Result<Vec<T>, AdapterError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        for (i, piece) in bytes.chunks_mut(PIECE).enumerate() {
            self.read(tensor, (i * PIECE) as u64, piece)?;
        }
        Ok(values)
    }

    fn matrix(&mut self, index: usize) -> Result<Matrix, AdapterError> {
        let shape = &self.header.tensors[index].shape;
        let (rows, cols) = (shape[0], shape[1]);
        Ok(Matrix { rows, cols, elements: self.elements(index)? })
    }

    fn vector(&mut self, index: usize) -> Result<Vec<f32>, AdapterError> {
        Ok(self.elements(index)?.to_f32_vec())
    }
}

/// Fills `piece` with the tensor's bytes from `at` on.
pub(crate) fn read_tensor(
    file: &File,
    header: &Header,
    tensor: &TensorEntry,
    at: u64,
    piece: &mut [u8],
) -> Result<(), AdapterError> {
    let read = file.read_exact_at(piece, header.data_start + tensor.start + at);
    read.map_err(|error| match error.kind() {
        // The header was checked against the file's length, so the file has become shorter since.
        io::ErrorKind::UnexpectedEof => AdapterError::invalid(TENSORS_FILE, "was cut short while it was read"),
        _ => AdapterError::io(format!("read {TENSORS_FILE}"))(error),
    })
}

/// Whether no number has all exponent bits set.
fn all_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    let pairs = |mask: u16| bytes.chunks_exact(2).all(|b| u16::from_le_bytes([b[0], b[1]]) & mask != mask);
    match dtype {
        Dtype::F32 => {
            let mask = 0x7f80_0000;
            bytes.chunks_exact(4).all(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & mask != mask)
        }
        Dtype::F16 => pairs(0x7c00),
        Dtype::Bf16 => pairs(0x7f80),
    }
}
