//! Memory of the CPU backend: [`Aligned`] buffers and the activations [`CpuTensor`].

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytemuck::{Pod, Zeroable};
use memmap2::{MmapMut, MmapRaw};

use crate::KernelError;

/// A huge page.
const HUGE: usize = 2 << 20;
/// Buffers from this size on lie in huge pages: what a step reads of smaller ones needs few translations.
const REGION_FROM: usize = 64 << 10;
/// Of a region that buffers share. The matrices of a small model are smaller than a huge page each.
const REGION_BYTES: usize = 16 * HUGE;
/// Buffers from this size on have a region of their own.
const REGION_OF_ITS_OWN: usize = REGION_BYTES / 4;

/// `bytes` zeros in a mapping of their own, and where they start in it. They start on a huge page and, when there is enough
/// of them, ask for huge pages: weights are read once a step from end to end, and with 4 KiB pages the translation misses
/// cost several percent of the bandwidth. They take no memory before they are first touched, by whoever writes them.
///
/// # Errors
/// [`KernelError::OutOfMemory`], naming `what`.
pub(super) fn mapped(bytes: usize, what: &'static str) -> Result<(MmapMut, usize), KernelError> {
    let out_of_memory = || KernelError::OutOfMemory { what, bytes };
    let length = bytes.checked_add(HUGE).ok_or_else(out_of_memory)?;
    let map = MmapMut::map_anon(length).map_err(|_| out_of_memory())?;
    #[cfg(target_os = "linux")]
    if bytes >= HUGE {
        // A hint: with small pages everything works, a little slower.
        let _ = map.advise(memmap2::Advice::HugePage);
    }
    let offset = map.as_ptr().addr().next_multiple_of(HUGE) - map.as_ptr().addr();
    Ok((map, offset))
}

/// A cache line, which is also the widest vector.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A zero-initialised slice of plain numbers that starts on a cache line.
pub struct Aligned<T: Pod> {
    memory: Memory,
    len: usize,
    element: PhantomData<T>,
}

enum Memory {
    Heap(Box<[Line]>),
    Region { region: Arc<Region>, start: usize },
}

/// Huge pages, of which every byte belongs to one buffer at most. Their memory is given back when the last of the buffers is.
struct Region {
    memory: MmapRaw,
}

/// The region that takes the next buffers, and how far it is taken.
static OPEN: Mutex<(Weak<Region>, usize)> = Mutex::new((Weak::new(), 0));

impl Region {
    /// A part of `bytes` zeros that nobody else has: the region and where the part starts in it.
    fn part(bytes: usize, what: &'static str) -> Result<(Arc<Self>, usize), KernelError> {
        if bytes >= REGION_OF_ITS_OWN {
            let (memory, start) = mapped(bytes, what)?;
            return Ok((Arc::new(Self { memory: memory.into() }), start));
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let (region, taken) = &mut *open;
        if let Some(region) = region.upgrade()
            && region.memory.len() - *taken >= bytes
        {
            let start = *taken;
            *taken = (start + bytes).next_multiple_of(size_of::<Line>());
            return Ok((region, start));
        }
        let (memory, start) = mapped(REGION_BYTES, what)?;
        let new = Arc::new(Self { memory: memory.into() });
        (*region, *taken) = (Arc::downgrade(&new), (start + bytes).next_multiple_of(size_of::<Line>()));
        Ok((new, start))
    }
}

impl<T: Pod> Aligned<T> {
    /// `len` zeros. `what` names the buffer in the error.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn zeroed(len: usize, what: &'static str) -> Result<Self, KernelError> {
        let out_of_memory = || KernelError::OutOfMemory { what, bytes: len.saturating_mul(size_of::<T>()) };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(out_of_memory)?;
        let memory = if bytes < REGION_FROM {
            Memory::Heap(vec![Line::zeroed(); bytes.div_ceil(size_of::<Line>())].into_boxed_slice())
        } else {
            let (region, start) = Region::part(bytes, what)?;
            Memory::Region { region, start }
        };
        Ok(Self { memory, len, element: PhantomData })
    }

    /// Bytes held.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T: Pod> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let bytes: &[u8] = match &self.memory {
            Memory::Heap(lines) => &bytemuck::cast_slice(lines)[..self.byte_len()],
            // SAFETY: the part is within its region, initialised since it was mapped, and this buffer's alone.
            Memory::Region { region, start } => unsafe {
                std::slice::from_raw_parts(region.memory.as_ptr().add(*start), self.byte_len())
            },
        };
        bytemuck::cast_slice(bytes)
    }
}

impl<T: Pod> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let length = self.byte_len();
        let bytes: &mut [u8] = match &mut self.memory {
            Memory::Heap(lines) => &mut bytemuck::cast_slice_mut(lines)[..length],
            // SAFETY: as above, and self is borrowed mutably.
            Memory::Region { region, start } => unsafe {
                std::slice::from_raw_parts_mut(region.memory.as_mut_ptr().add(*start), length)
            },
        };
        bytemuck::cast_slice_mut(bytes)
    }
}

impl<T: Pod> std::fmt::Debug for Aligned<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Aligned<{}>[{}]", std::any::type_name::<T>(), self.len)
    }
}

/// Activations `[rows, width]`, row-major without padding, in a buffer for `rows_max` rows.
#[derive(Debug)]
pub struct CpuTensor {
    rows: usize,
    rows_max: usize,
    width: usize,
    data: Aligned<f32>,
}

impl CpuTensor {
    /// A tensor of 0 rows with room for `rows_max`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    pub fn new(rows_max: usize, width: usize) -> Result<Self, KernelError> {
        let len =
            rows_max.checked_mul(width).ok_or(KernelError::OutOfMemory { what: "activations", bytes: usize::MAX })?;
        Ok(Self { rows: 0, rows_max, width, data: Aligned::zeroed(len, "activations")? })
    }

    /// A tensor holding `values`, `[rows, width]`: for tests and benchmarks.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]
    ///
    /// # Panics
    /// When `width` is 0 or does not divide the number of values.
    pub fn from_values(values: &[f32], width: usize) -> Result<Self, KernelError> {
        assert!(width > 0 && values.len().is_multiple_of(width), "{} values in rows of {width}", values.len());
        let mut tensor = Self::new(values.len() / width, width)?;
        tensor.set_rows(values.len() / width);
        tensor.values_mut().copy_from_slice(values);
        Ok(tensor)
    }

    /// Rows in use.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows there is room for.
    #[must_use]
    pub fn rows_max(&self) -> usize {
        self.rows_max
    }

    /// Elements of a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Sets the number of rows in use. Their contents are what was there before.
    ///
    /// # Panics
    /// When there is no room: the caller allocated for the largest step.
    pub fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.rows_max, "{rows} rows in a tensor for {}", self.rows_max);
        self.rows = rows;
    }

    /// The rows in use, `[rows, width]`.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }

    /// The rows in use, `[rows, width]`.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.rows * self.width]
    }

    /// One row.
    #[must_use]
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values()[row * self.width..(row + 1) * self.width]
    }

    /// One row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let width = self.width;
        &mut self.values_mut()[row * width..(row + 1) * width]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_and_aligned_whatever_their_size() {
        let mut kept = Vec::new();
        for len in [0, 1, 100, REGION_FROM / 4, HUGE / 4, HUGE / 4 + 1, REGION_OF_ITS_OWN / 4, REGION_BYTES] {
            let mut buffer = Aligned::<f32>::zeroed(len, "test").expect("memory");
            assert_eq!((buffer.len(), buffer.byte_len()), (len, len * 4));
            assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(64));
            assert!(buffer.iter().all(|value| *value == 0.0));
            buffer.fill(len as f32);
            kept.push(buffer);
        }
        assert!(kept.iter().all(|buffer| buffer.iter().all(|value| *value == buffer.len() as f32)), "none overlap");
    }

    #[test]
    fn a_region_is_filled_and_outlived_by_its_buffers() {
        let buffers: Vec<_> = (0..200_u32)
            .map(|i| {
                let mut buffer = Aligned::<u32>::zeroed(60_000 + i as usize, "test").expect("memory");
                assert!(buffer.iter().all(|value| *value == 0));
                buffer.fill(i);
                buffer
            })
            .collect();
        let odd = buffers.into_iter().enumerate().filter(|(i, _)| i % 2 == 1).collect::<Vec<_>>();
        assert!(odd.iter().all(|(i, buffer)| buffer.iter().all(|value| *value as usize == *i)));
    }

    #[test]
    fn a_buffer_that_cannot_exist_is_an_error_naming_it() {
        for len in [usize::MAX / 2, isize::MAX as usize / 4] {
            let error = Aligned::<f32>::zeroed(len, "the test's buffer").expect_err("too large");
            assert!(error.to_string().starts_with("the test's buffer: "), "{error}");
        }
    }

    #[test]
    fn rows_in_use_follow_set_rows() {
        let mut tensor = CpuTensor::new(3, 4).expect("memory");
        assert!(tensor.values().is_empty());
        tensor.set_rows(2);
        tensor.row_mut(1).fill(7.0);
        assert_eq!(tensor.values(), [0.0, 0.0, 0.0, 0.0, 7.0, 7.0, 7.0, 7.0]);
        assert_eq!((tensor.rows(), tensor.rows_max(), tensor.width(), tensor.row(1).len()), (2, 3, 4, 4));
    }
}
