//! One adapter on the device.

use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use openlora_types::{AdapterSizes, AdapterWeights, Elements, Site};

use super::super::device::{Address, Device, Element, Memory};
use super::super::pages::CudaPageSet;
use super::placement::{Factor, Place, Placement, pages_needed};
use crate::KernelError;
use crate::pages::check_site;

/// One adapter generation, resident: the rows of A, `[rank][inputs]`, and of B transposed, `[rank][outputs]`, in pages of the
/// pool ([`super::placement`]), rounded to the device's element; and beside them the set's table, that kernels find them by:
///
/// ```text
/// sites [Site::count(layers)]   rank, scale, widths of strips, addresses of the first two pieces, of the two lists below and of
///                               the vectors; rank 0 where the adapter has nothing
/// addresses of pieces           of each factor, [strips][groups of 8 ranks]
/// vectors                       f32 [outputs]: B's bias, DoRA's m / ||W + scale B A||
/// ```
///
/// Numbers are not rescaled: of f16, what is below 6e-5 loses bits; bf16 keeps the range of f32.
#[derive(Debug)]
pub struct CudaAdapter<D: Device> {
    /// `(rank, inputs, outputs)` by [`Site::index`]; rank 0 where there is none.
    sizes: Vec<[usize; 3]>,
    element: Element,
    bytes: usize,
    /// No other adapter of this process has it, which cannot be said of addresses.
    number: u64,
    /// The number of the plan that its sizes were found to fit; 0 for none.
    fits: AtomicU64,
    pages: CudaPageSet<D>,
}

/// `LoraSite` in `csrc/lora.cu`.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct SiteEntry {
    rank: u32,
    scale: f32,
    a_width: u32,
    b_width: u32,
    a_pieces: Address,
    b_pieces: Address,
    a: [Address; 2],
    b: [Address; 2],
    b_bias: Address,
    output_scale: Address,
}

/// Where a list of 8 or 4-byte numbers lies in the table.
type Offset = usize;

impl<D: Device> CudaAdapter<D> {
    /// How many pages of `page_bytes` [`Self::load`] needs.
    ///
    /// # Panics
    /// When a page is less than 256 bytes.
    #[must_use]
    pub fn pages_needed(sizes: &AdapterSizes, page_bytes: usize, element: Element) -> usize {
        pages_needed(sizes, page_bytes, element.bytes())
    }

    /// Copies `weights` into `pages`, beside the steps that run; see [`crate::Backend::load_adapter`]. Steps with the adapter
    /// wait for it on the device ([`super::LoraPlan::segments`]).
    ///
    /// # Errors
    /// [`KernelError::AdapterShape`] for factors that do not fit each other or a layer that does not exist,
    /// [`KernelError::AdapterRange`] for numbers that the element cannot hold, [`KernelError::AdapterPages`] when the pages are too
    /// few, [`KernelError::OutOfMemory`], or a device failure.
    ///
    /// # Panics
    /// When there is not one entry of `output_scales` for each site.
    pub fn load(
        weights: &AdapterWeights,
        output_scales: &[Option<Vec<f32>>],
        layers: usize,
        element: Element,
        mut pages: CudaPageSet<D>,
    ) -> Result<Self, KernelError> {
        assert_eq!(output_scales.len(), weights.sites.len(), "one entry for each site");
        for (site, output_scale) in weights.sites.iter().zip(output_scales) {
            check_site(site, output_scale.as_deref(), layers)?;
        }
        let placement = Placement::new(&weights.sizes(), pages.page_bytes(), element.bytes());
        let placement =
            placement.filter(|placement| placement.pages <= pages.len()).ok_or_else(|| KernelError::AdapterPages {
                needed: pages_needed(&weights.sizes(), pages.page_bytes(), element.bytes()),
                given: pages.len(),
            })?;
        let table_bytes = table_bytes(weights, output_scales, layers, &placement);
        pages.begin(table_bytes)?;
        let written = match element {
            Element::F32 => write_factors::<D, f32>(weights, &placement, &mut pages),
            Element::Bf16 => write_factors::<D, bf16>(weights, &placement, &mut pages),
            Element::F16 => write_factors::<D, f16>(weights, &placement, &mut pages),
        };
        let written = written.and_then(|()| {
            let table = table_of(weights, output_scales, layers, &placement, &pages);
            assert_eq!(table.len(), table_bytes, "bytes of a table");
            pages.write_table(&table)
        });
        // Also of what failed half-way: who gets the pages next must wait for it.
        pages.finish()?;
        written?;
        let mut sizes = vec![[0; 3]; Site::count(layers)];
        for site in &weights.sites {
            sizes[site.site.index(layers)] = [site.rank(), site.a.cols, site.b.rows];
        }
        let bytes = placement.bytes + table_bytes;
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        Ok(Self { sizes, element, bytes, number, fits: AtomicU64::new(0), pages })
    }

    /// Unlike any other adapter's, now or before; not 0.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether its pages are still its own.
    ///
    /// # Errors
    /// [`KernelError::Page`] when they are not.
    pub fn check(&self) -> Result<(), KernelError> {
        self.pages.check()
    }

    /// Lets the steps enqueued from now on wait until it is loaded.
    ///
    /// # Errors
    /// A device failure.
    pub fn settle(&self) -> Result<(), KernelError> {
        self.pages.settle()
    }

    /// Of its sites: what a step's segments name.
    #[must_use]
    pub fn address(&self) -> Address {
        self.pages.table().address()
    }

    /// How its numbers are held.
    #[must_use]
    pub fn element(&self) -> Element {
        self.element
    }

    /// Bytes used: the factors' in their pages, and the table's.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.bytes
    }

    /// Rank, inputs and outputs at a site index; `None` where it has nothing.
    pub(super) fn size(&self, index: usize) -> Option<[usize; 3]> {
        self.sizes.get(index).copied().filter(|size| size[0] > 0)
    }

    /// Remembers that the sizes fit, so that they are compared once.
    pub(super) fn fits(&self, plan: u64, compare: impl FnOnce()) {
        if self.fits.load(Ordering::Relaxed) != plan {
            compare();
            self.fits.store(plan, Ordering::Relaxed);
        }
    }
}

/// Bytes of the table of an adapter's sites.
fn table_bytes(
    weights: &AdapterWeights,
    output_scales: &[Option<Vec<f32>>],
    layers: usize,
    placement: &Placement,
) -> usize {
    let pieces = placement.sites.iter().flatten().map(|(_, places)| places.len()).sum::<usize>();
    let vectors = weights.sites.iter().zip(output_scales);
    let vectors = vectors.flat_map(|(site, scale)| [site.b_bias.as_deref(), scale.as_deref()]);
    let vector_bytes: usize = vectors.flatten().map(size_of_val).sum();
    Site::count(layers) * size_of::<SiteEntry>() + pieces * 8 + vector_bytes
}

/// The table of an adapter's sites, for where the set's is.
fn table_of<D: Device>(
    weights: &AdapterWeights,
    output_scales: &[Option<Vec<f32>>],
    layers: usize,
    placement: &Placement,
    pages: &CudaPageSet<D>,
) -> Vec<u8> {
    let (memory, start) = (pages.table(), Site::count(layers) * size_of::<SiteEntry>());
    let mut table = vec![0; start];
    // Appends, and says where.
    fn put<D: Device>(memory: &Memory<D>, table: &mut Vec<u8>, bytes: &[u8]) -> Address {
        let offset: Offset = table.len();
        table.extend_from_slice(bytes);
        memory.address().plus(offset)
    }
    let address = |place: &Place| pages.address(place.page).plus(place.offset);
    let mut entries = vec![SiteEntry::default(); Site::count(layers)];
    for (site, factors) in weights.sites.iter().zip(&placement.sites) {
        let [a, b] = factors.each_ref().map(|(factor, places)| {
            let addresses: Vec<Address> = places.iter().map(address).collect();
            let first = [0, 1].map(|group| if group < factor.groups() { addresses[group] } else { Address::default() });
            (factor.width as u32, put(memory, &mut table, bytemuck::cast_slice(&addresses)), first)
        });
        entries[site.site.index(layers)] = SiteEntry {
            rank: site.rank() as u32,
            scale: site.scale,
            a_width: a.0,
            b_width: b.0,
            a_pieces: a.1,
            b_pieces: b.1,
            a: a.2,
            b: b.2,
            ..SiteEntry::default()
        };
    }
    // After all addresses, so that those are aligned.
    for (site, output_scale) in weights.sites.iter().zip(output_scales) {
        let mut vector = |values: Option<&[f32]>| {
            values.map_or(Address::default(), |values| put(memory, &mut table, bytemuck::cast_slice(values)))
        };
        let entry = &mut entries[site.site.index(layers)];
        entry.b_bias = vector(site.b_bias.as_deref());
        entry.output_scale = vector(output_scale.as_deref());
    }
    table[..start].copy_from_slice(bytemuck::cast_slice(&entries));
    table
}

/// Copies the factors of all sites to their places, A as it is, B transposed: page by page, each made up here first.
fn write_factors<D: Device, T: Held>(
    weights: &AdapterWeights,
    placement: &Placement,
    pages: &mut CudaPageSet<D>,
) -> Result<(), KernelError> {
    let mut image = Image { numbers: vec![T::zeroed(); pages.page_bytes() / size_of::<T>()], page: 0, used: 0 };
    for (site, [a, b]) in weights.sites.iter().zip(&placement.sites) {
        write_factor(site.site, &site.a.elements, (site.a.cols, (site.a.cols, 1)), a, &mut image, pages)?;
        write_factor(site.site, &site.b.elements, (site.b.rows, (1, site.b.cols)), b, &mut image, pages)?;
    }
    image.flush(pages)
}

/// A page that is being made up.
struct Image<T> {
    numbers: Vec<T>,
    page: usize,
    used: usize,
}

impl<T: Held> Image<T> {
    fn flush<D: Device>(&mut self, pages: &mut CudaPageSet<D>) -> Result<(), KernelError> {
        if self.used > 0 {
            pages.write(self.page, bytemuck::cast_slice(&self.numbers[..self.used]))?;
        }
        self.used = 0;
        Ok(())
    }

    /// The numbers of a piece. What the last page held before them is zero or copied already.
    fn piece<D: Device>(
        &mut self,
        place: Place,
        len: usize,
        pages: &mut CudaPageSet<D>,
    ) -> Result<&mut [T], KernelError> {
        if place.page != self.page {
            self.flush(pages)?;
            self.page = place.page;
        }
        let start = place.offset / size_of::<T>();
        self.used = start + len;
        Ok(&mut self.numbers[start..start + len])
    }
}

/// How a factor lies in a file: numbers of a row, and how far a row is from the next and a number of a row from the next.
type Layout = (usize, (usize, usize));

fn write_factor<D: Device, T: Held>(
    site: Site,
    elements: &Elements,
    layout: Layout,
    factor: &(Factor, Vec<Place>),
    image: &mut Image<T>,
    pages: &mut CudaPageSet<D>,
) -> Result<(), KernelError> {
    match elements {
        Elements::F32(numbers) => write_numbers(site, numbers, layout, factor, image, pages),
        Elements::F16(numbers) => write_numbers(site, numbers, layout, factor, image, pages),
        Elements::Bf16(numbers) => write_numbers(site, numbers, layout, factor, image, pages),
    }
}

fn write_numbers<D: Device, T: Held, N: Number>(
    site: Site,
    numbers: &[N],
    (length, (row_stride, stride)): Layout,
    (factor, places): &(Factor, Vec<Place>),
    image: &mut Image<T>,
    pages: &mut CudaPageSet<D>,
) -> Result<(), KernelError> {
    for ((ranks, columns), place) in factor.pieces().zip(places) {
        let width = columns.len();
        let to = image.piece(*place, ranks.len() * width, pages)?;
        let end = columns.end.min(length).max(columns.start);
        let mut held = true;
        for (rank, to) in ranks.zip(to.chunks_exact_mut(width)) {
            let (to, padding) = to.split_at_mut(end - columns.start);
            padding.fill(T::zeroed());
            let from = numbers.get(rank * row_stride + columns.start * stride..).unwrap_or(&[]);
            for (to, from) in to.iter_mut().zip(from.iter().step_by(stride)) {
                *to = T::round(from.widened());
                held &= T::holds(*to);
            }
        }
        if !held {
            let values = numbers.iter().map(|number| number.widened());
            let value = values.into_iter().find(|value| !T::holds(T::round(*value))).unwrap_or(f32::NAN);
            return Err(KernelError::AdapterRange { site, value });
        }
    }
    Ok(())
}

/// An element of the device's.
trait Held: Pod {
    fn round(value: f32) -> Self;
    /// Whether a rounded number is one.
    fn holds(rounded: Self) -> bool;
}

impl Held for f32 {
    fn round(value: f32) -> Self {
        value
    }
    fn holds(_: Self) -> bool {
        true
    }
}

impl Held for bf16 {
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn holds(rounded: Self) -> bool {
        rounded.to_bits() & 0x7f80 != 0x7f80
    }
}

impl Held for f16 {
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn holds(rounded: Self) -> bool {
        rounded.to_bits() & 0x7c00 != 0x7c00
    }
}

/// An element of an adapter's file.
trait Number: Copy {
    fn widened(self) -> f32;
}

impl Number for f32 {
    fn widened(self) -> f32 {
        self
    }
}

impl Number for f16 {
    fn widened(self) -> f32 {
        self.to_f32()
    }
}

impl Number for bf16 {
    fn widened(self) -> f32 {
        self.to_f32()
    }
}
