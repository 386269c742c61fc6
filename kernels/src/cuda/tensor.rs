//! Activations on the device.

use std::sync::Arc;

use half::{bf16, f16};

use super::device::{Address, Device, Element, Memory};
use crate::KernelError;

/// Row-major `[rows, width]` numbers with room for more rows.
#[derive(Debug)]
pub struct CudaTensor<D: Device> {
    memory: Memory<D>,
    element: Element,
    rows_max: usize,
    rows: usize,
    width: usize,
}

impl<D: Device> CudaTensor<D> {
    /// Room for `rows_max` rows; no rows yet.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn new(device: &Arc<D>, element: Element, rows_max: usize, width: usize) -> Result<Self, KernelError> {
        let memory = Memory::new(device, rows_max * width * element.bytes())?;
        Ok(Self { memory, element, rows_max, rows: 0, width })
    }

    /// The rows that `memory` holds.
    ///
    /// # Panics
    /// When it is too small for them.
    #[must_use]
    pub fn of(memory: Memory<D>, element: Element, rows: usize, width: usize) -> Self {
        assert!(rows * width * element.bytes() <= memory.bytes(), "{} bytes for {rows} rows", memory.bytes());
        Self { memory, element, rows_max: rows, rows, width }
    }

    /// A tensor that holds `values`, rounded to `element`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn holding(device: &Arc<D>, element: Element, values: &[f32], width: usize) -> Result<Self, KernelError> {
        let rows = values.len() / width;
        let mut tensor = Self::new(device, element, rows, width)?;
        tensor.rows = rows;
        match element {
            Element::F32 => tensor.memory.write(0, values)?,
            Element::Bf16 => {
                let values: Vec<u16> = values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect();
                tensor.memory.write(0, &values)?;
            }
            Element::F16 => {
                let values: Vec<u16> = values.iter().map(|value| f16::from_f32(*value).to_bits()).collect();
                tensor.memory.write(0, &values)?;
            }
        }
        Ok(tensor)
    }

    /// Its first element.
    #[must_use]
    pub fn address(&self) -> Address {
        self.memory.address()
    }
    /// How its numbers are held.
    #[must_use]
    pub fn element(&self) -> Element {
        self.element
    }
    /// Rows it holds.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Rows it has room for.
    #[must_use]
    pub fn rows_max(&self) -> usize {
        self.rows_max
    }
    /// Numbers of a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Says how many rows an operation is about to write.
    ///
    /// # Panics
    /// When there is no room for them.
    pub fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.rows_max, "{rows} rows in a tensor with room for {}", self.rows_max);
        self.rows = rows;
    }

    /// All rows as f32, once the steps so far are done.
    ///
    /// # Errors
    /// A device failure.
    pub fn values(&self) -> Result<Vec<f32>, KernelError> {
        let count = self.rows * self.width;
        Ok(match self.element {
            Element::F32 => self.memory.read(0, count)?,
            Element::Bf16 => {
                self.memory.read::<u16>(0, count)?.into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect()
            }
            Element::F16 => {
                self.memory.read::<u16>(0, count)?.into_iter().map(|bits| f16::from_bits(bits).to_f32()).collect()
            }
        })
    }
}
