//! The base model's weights on the device: rows of the file's format, as the device's element.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::device::{Address, Device, Element, Memory};
use super::tensor::CudaTensor;
use crate::reference::dequantise::dequantise_row;
use crate::{KernelError, LinearSpec, SiteSpan, TensorSource};

/// Numbers converted before they are sent: enough that copying and converting overlap, little beside a model.
const CHUNK: usize = 8 << 20;

/// A (fused) linear: `[outputs, inputs]`, parts one below the other.
#[derive(Debug)]
pub struct CudaLinear<D: Device> {
    weights: Memory<D>,
    /// Outputs of all parts.
    pub outputs: usize,
    /// Inputs.
    pub inputs: usize,
    /// `[outputs]` f32
    pub bias: Option<Memory<D>>,
    /// Which adapter sites the outputs belong to.
    pub sites: Vec<SiteSpan>,
}

impl<D: Device> CudaLinear<D> {
    /// Converts and copies `spec`'s weights.
    ///
    /// # Errors
    /// Parts, bias or sites that do not fit together, weights that are not finite or out of the element's range, or memory.
    pub fn load(device: &Arc<D>, element: Element, spec: &LinearSpec<'_>) -> Result<Self, KernelError> {
        let inputs = spec.parts.first().map_or(0, |part| part.cols);
        let outputs: usize = spec.parts.iter().map(|part| part.rows).sum();
        for part in &spec.parts {
            part.check()?;
            if part.cols != inputs {
                let (name, found) = (part.name.to_owned(), part.cols);
                return Err(KernelError::Parts { name, what: "inputs", found, expected: inputs });
            }
        }
        let misfit = |what, found| {
            let name = spec.parts.first().map_or_else(String::new, |part| part.name.to_owned());
            KernelError::Parts { name, what, found, expected: outputs }
        };
        if let Some(bias) = &spec.bias
            && bias.len() != outputs
        {
            return Err(misfit("bias values", bias.len()));
        }
        if let Some(site) = spec.sites.iter().find(|site| site.outputs.end > outputs) {
            return Err(misfit("outputs up to its last site", site.outputs.end));
        }
        let mut weights = Memory::new(device, outputs * inputs * element.bytes())?;
        let mut offset = 0;
        for part in &spec.parts {
            write_rows(&mut weights, element, offset, part, true)?;
            offset += part.rows * inputs * element.bytes();
        }
        let bias = spec.bias.as_ref().map(|bias| Memory::holding(device, bias)).transpose()?;
        Ok(Self { weights, outputs, inputs, bias, sites: spec.sites.clone() })
    }

    /// `[outputs, inputs]`
    #[must_use]
    pub fn weights(&self) -> Address {
        self.weights.address()
    }
}

/// An embedding table, `[vocab, hidden]`.
#[derive(Debug)]
pub struct CudaEmbedding<D: Device> {
    /// Its rows.
    pub table: CudaTensor<D>,
}

impl<D: Device> CudaEmbedding<D> {
    /// Converts and copies the table. Numbers that are not finite are taken as they are, as where the table stays in its file; a head
    /// that shares it refuses them.
    ///
    /// # Errors
    /// A table that is not sound, or memory.
    pub fn load(device: &Arc<D>, element: Element, source: &TensorSource<'_>) -> Result<Self, KernelError> {
        source.check()?;
        let mut table = Memory::new(device, source.rows * source.cols * element.bytes())?;
        write_rows(&mut table, element, 0, source, false)?;
        Ok(Self { table: CudaTensor::of(table, element, source.rows, source.cols) })
    }
}

/// All rows of `source` from byte `offset` of `memory` on; with `finite`, numbers that are not are refused.
fn write_rows<D: Device>(
    memory: &mut Memory<D>,
    element: Element,
    offset: usize,
    source: &TensorSource<'_>,
    finite: bool,
) -> Result<(), KernelError> {
    let (rows, width) = (source.rows, source.cols);
    let step = (CHUNK / width.max(1)).max(1);
    for first in (0..rows).step_by(step) {
        let range = first..rows.min(first + step);
        let offset = offset + first * width * element.bytes();
        match element {
            Element::F32 => memory.write(offset, &converted(source, range, |x| (x, x.is_finite() || !finite))?)?,
            Element::Bf16 => memory.write(
                offset,
                &converted(source, range, |x| {
                    let y = bf16::from_f32(x);
                    (y.to_bits(), y.is_finite() || !finite)
                })?,
            )?,
            Element::F16 => memory.write(
                offset,
                &converted(source, range, |x| {
                    let y = f16::from_f32(x);
                    (y.to_bits(), y.is_finite() || !finite)
                })?,
            )?,
        }
    }
    Ok(())
}

/// Rows of `source`, converted by several threads. `to` gives the number and whether it may be.
fn converted<T: Copy + Default + Send>(
    source: &TensorSource<'_>,
    rows: Range<usize>,
    to: impl Fn(f32) -> (T, bool) + Sync,
) -> Result<Vec<T>, KernelError> {
    let width = source.cols;
    let mut values = vec![T::default(); rows.len() * width];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let each = rows.len().div_ceil(threads).max(1);
    let convert = |first: usize, values: &mut [T]| {
        let mut row = vec![0.0; width];
        for (number, values) in (first..).zip(values.chunks_exact_mut(width)) {
            dequantise_row(source, number, &mut row);
            for (x, value) in row.iter().zip(values) {
                let (converted, fine) = to(*x);
                if !fine {
                    return Err(KernelError::WeightRange { name: source.name.to_owned(), row: number });
                }
                *value = converted;
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let parts = (rows.start..rows.end).step_by(each).zip(values.chunks_mut((each * width).max(1)));
        let parts: Vec<_> = parts.map(|(first, part)| scope.spawn(move || convert(first, part))).collect();
        parts.into_iter().try_for_each(|part| part.join().expect("converting does not panic"))
    })?;
    Ok(values)
}
