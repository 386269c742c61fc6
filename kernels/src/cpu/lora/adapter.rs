//! One adapter in memory.

use std::sync::atomic::{AtomicU64, Ordering};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use openlora_types::{AdapterSizes, AdapterWeights, Elements, Module, Site, SiteWeights};

use super::super::pages::CpuPageSet;
use super::super::vector_math::Element;
use super::Rows;
use super::placement::{FactorPlace, Placement};
use crate::pages::check_site;
use crate::{KernelError, Precision};

/// One adapter generation, resident: per site the rows of A, `[rank][inputs]`, then the rows of B transposed,
/// `[rank][outputs]`, so that what belongs to one rank is contiguous, in pages of the pool ([`super::placement`]).
///
/// With [`Precision::Quantised`] the factors are f16. Each is multiplied by a power of two that brings its largest number near
/// the top of f16's range, which the site's scale takes back: f16 files stay exact, and of bf16 and f32 files small
/// numbers keep their 11 bits where plain f16 would make them subnormal.
#[derive(Debug)]
pub struct CpuAdapter {
    /// By [`Site::index`].
    sites: Vec<Option<SiteFactors>>,
    /// No other adapter has it, as long as the process runs; not 0.
    number: u64,
    /// Bit `module as u32`: some layer has a site of this module.
    modules: u32,
    /// Bit `module as u32`: the sites of this module are the same in all layers, but for their numbers.
    uniform: u32,
    pages: CpuPageSet,
    /// Bytes of the factors.
    factor_bytes: usize,
    pub(in super::super) precision: Precision,
}

/// One site's sizes, and where its factors are. Small, as [`FactorPlace`] says.
#[derive(Debug)]
pub(in super::super) struct SiteFactors {
    /// A's rows.
    a: FactorPlace,
    /// B's transposed rows.
    b: FactorPlace,
    /// alpha / r (or / sqrt r), and the inverse of the powers of two in the factors.
    scale: f32,
    vectors: Option<Box<SiteVectors>>,
}

/// What few adapters have.
#[derive(Debug)]
struct SiteVectors {
    /// `[outputs]`: alpha / r times B's bias.
    b_bias: Option<Vec<f32>>,
    /// `[outputs]`: DoRA's `m / ||W + scale B A||`.
    output_scale: Option<Vec<f32>>,
}

const _: () = assert!(size_of::<Option<SiteFactors>>() <= 72);

impl SiteFactors {
    #[inline(always)]
    pub(in super::super) fn rank(&self) -> usize {
        self.a.rows()
    }

    #[inline(always)]
    pub(in super::super) fn inputs(&self) -> usize {
        self.a.len()
    }

    #[inline(always)]
    pub(in super::super) fn outputs(&self) -> usize {
        self.b.len()
    }

    /// Multiplies `A x`.
    #[inline(always)]
    pub(in super::super) fn scale(&self) -> f32 {
        self.scale
    }

    /// `[outputs]`: alpha / r times B's bias.
    #[inline(always)]
    pub(in super::super) fn b_bias(&self) -> Option<&[f32]> {
        self.vectors.as_ref()?.b_bias.as_deref()
    }

    /// `[outputs]`: DoRA's `m / ||W + scale B A||`.
    #[inline(always)]
    pub(in super::super) fn output_scale(&self) -> Option<&[f32]> {
        self.vectors.as_ref()?.output_scale.as_deref()
    }

    /// Outputs of a strip of B; all of them for most sites.
    #[inline(always)]
    pub(super) fn output_strip(&self) -> usize {
        self.b.width()
    }
}

impl CpuAdapter {
    /// How many pages of `page_bytes` [`Self::load`] needs.
    ///
    /// # Panics
    /// When a page is less than a cache line.
    #[must_use]
    pub fn pages(sizes: &AdapterSizes, page_bytes: usize, precision: Precision) -> usize {
        Placement::new(sizes, page_bytes, precision.element_bytes()).pages
    }

    /// Writes `weights` into `pages`; see [`crate::Backend::load_adapter`].
    ///
    /// # Errors
    /// [`KernelError::AdapterShape`] for factors that do not fit each other or a layer that does not exist,
    /// [`KernelError::AdapterRange`] for numbers that f16 cannot hold, [`KernelError::AdapterPages`] when the pages are too few.
    ///
    /// # Panics
    /// When there is not one entry of `output_scales` for each site.
    pub fn load(
        weights: &AdapterWeights,
        output_scales: &[Option<Vec<f32>>],
        layers: usize,
        precision: Precision,
        mut pages: CpuPageSet,
    ) -> Result<Self, KernelError> {
        assert_eq!(output_scales.len(), weights.sites.len(), "one entry for each site");
        for (site, output_scale) in weights.sites.iter().zip(output_scales) {
            check_site(site, output_scale.as_deref(), layers)?;
        }
        let placement = Placement::new(&weights.sizes(), pages.page_bytes(), precision.element_bytes());
        if pages.len() < placement.pages {
            return Err(KernelError::AdapterPages { needed: placement.pages, given: pages.len() });
        }
        let shifts = match precision {
            Precision::Quantised => weights.sites.iter().map(site_shifts).collect::<Result<Vec<_>, _>>()?,
            Precision::F32 => vec![Shifts { a: 1.0, b: 1.0 }; weights.sites.len()],
        };
        match precision {
            Precision::Quantised => write::<f16>(weights, &shifts, &placement, &mut pages),
            Precision::F32 => write::<f32>(weights, &shifts, &placement, &mut pages),
        }
        let mut sites = Vec::new();
        sites.resize_with(Site::count(layers), || None);
        for (((site, output_scale), shifts), [a, b]) in
            weights.sites.iter().zip(output_scales).zip(shifts).zip(placement.sites)
        {
            let b_bias = site.b_bias.as_ref().map(|bias| bias.iter().map(|bias| bias * site.scale).collect());
            let vectors = SiteVectors { b_bias, output_scale: output_scale.clone() };
            sites[site.site.index(layers)] = Some(SiteFactors {
                a,
                b,
                scale: site.scale / shifts.a / shifts.b,
                vectors: (vectors.b_bias.is_some() || vectors.output_scale.is_some()).then(|| Box::new(vectors)),
            });
        }
        let (mut modules, mut uniform) = (0, 0);
        for module in Module::IN_LAYER.into_iter().chain([Module::Embed, Module::LmHead]) {
            let sizes = |layer| {
                let site = sites[Site { layer: layer as u32, module }.index(layers)].as_ref();
                site.map(|site| (site.rank(), site.inputs(), site.outputs(), site.output_strip()))
            };
            modules |= u32::from((0..layers).any(|layer| sizes(layer).is_some())) << module as u32;
            uniform |= u32::from((1..layers).all(|layer| sizes(layer) == sizes(0))) << module as u32;
        }
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        Ok(Self { sites, number, modules, uniform, pages, factor_bytes: placement.bytes, precision })
    }

    /// Whether its pages are still its own.
    ///
    /// # Errors
    /// [`KernelError::Page`] when they are not.
    #[inline]
    pub fn check(&self) -> Result<(), KernelError> {
        self.pages.check()
    }

    /// A's rows of one of this adapter's sites, `[rank][inputs]`: the strip that has input `column`. `T` is the precision's
    /// element.
    #[inline(always)]
    pub(in super::super) fn a<'a, T: Element>(&'a self, site: &'a SiteFactors, column: usize) -> Rows<'a, T> {
        Rows::new(&self.pages, &site.a, column)
    }

    /// B's transposed rows of one of this adapter's sites, `[rank][outputs]`: the strip that has output `column`. `T` is the
    /// precision's element.
    #[inline(always)]
    pub(in super::super) fn b<'a, T: Element>(&'a self, site: &'a SiteFactors, column: usize) -> Rows<'a, T> {
        Rows::new(&self.pages, &site.b, column)
    }

    /// Tells it from all others.
    #[inline(always)]
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Whether some layer has a site of one of these modules.
    #[inline(always)]
    pub(super) fn has(&self, modules: u32) -> bool {
        self.modules & modules != 0
    }

    /// Whether all layers have the same sites of these modules.
    #[inline(always)]
    pub(super) fn is_uniform(&self, modules: u32) -> bool {
        self.uniform & modules == modules
    }

    /// The factors at a site index, if the adapter targets it.
    #[inline(always)]
    pub(in super::super) fn site(&self, index: usize) -> Option<&SiteFactors> {
        self.sites.get(index)?.as_ref()
    }

    /// The factors of the embedding table, if the adapter targets it.
    #[inline(always)]
    pub(in super::super) fn embedding(&self) -> Option<&SiteFactors> {
        // `embed_tokens` is the last but one index, whatever the number of layers.
        self.sites[self.sites.len() - 2].as_ref()
    }

    /// Bytes held: the factors' in their pages, and the small vectors beside them.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        let sites = self.sites.iter().flatten();
        let vectors = sites.flat_map(|site| [site.b_bias(), site.output_scale()]);
        let vectors: usize = vectors.flatten().map(size_of_val).sum();
        self.factor_bytes + vectors + self.sites.len() * size_of::<Option<SiteFactors>>()
    }
}

/// What the factors of a site are multiplied by: powers of two.
#[derive(Clone, Copy, Debug)]
struct Shifts {
    a: f32,
    b: f32,
}

fn site_shifts(site: &SiteWeights) -> Result<Shifts, KernelError> {
    Ok(Shifts { a: shift(site.site, &site.a.elements)?, b: shift(site.site, &site.b.elements)? })
}

/// The power of two, at least 1, that brings the largest number to [2^13, 2^14): room for neither rounding nor a sum to
/// overflow.
fn shift(site: Site, elements: &Elements) -> Result<f32, KernelError> {
    let largest = match elements {
        Elements::F32(numbers) => largest(numbers),
        Elements::F16(numbers) => largest(numbers),
        Elements::Bf16(numbers) => largest(numbers),
    };
    let in_range = |value: f32| f16::from_f32(value).is_finite();
    if !in_range(largest) {
        let value = elements.iter_f32().find(|value| !in_range(*value)).unwrap_or(largest);
        return Err(KernelError::AdapterRange { site, value });
    }
    // Subnormal f32 numbers are beyond any use; 2^100 keeps the inverse in range.
    let exponent = if largest > 0.0 { (13 - largest.log2().floor() as i32).clamp(0, 100) } else { 0 };
    Ok(2.0_f32.powi(exponent))
}

/// The largest absolute value; NaN where there is one: as bits, absolute values are in order and NaN above all.
fn largest<N: Number>(numbers: &[N]) -> f32 {
    let mut wide = [0.0; PIECE];
    let largest = numbers.chunks(PIECE).fold(0, |largest: u32, piece| {
        let wide = &mut wide[..piece.len()];
        N::widen(piece, wide);
        wide.iter().fold(largest, |largest, value| largest.max(value.abs().to_bits()))
    });
    f32::from_bits(largest)
}

/// Writes the factors of all sites to their places: A as it is, B transposed.
fn write<T: Element>(weights: &AdapterWeights, shifts: &[Shifts], placement: &Placement, pages: &mut CpuPageSet) {
    for ((site, shifts), [a, b]) in weights.sites.iter().zip(shifts).zip(&placement.sites) {
        write_factor::<T>(pages, a, &site.a.elements, (site.a.cols, 1), shifts.a);
        write_factor::<T>(pages, b, &site.b.elements, (1, site.b.cols), shifts.b);
    }
}

/// Writes one factor, multiplied. `strides`: how far a row is from the next in `elements`, and an element of a row from the next.
fn write_factor<T: Element>(
    pages: &mut CpuPageSet,
    place: &FactorPlace,
    elements: &Elements,
    strides: (usize, usize),
    multiplier: f32,
) {
    match elements {
        Elements::F32(numbers) => write_numbers::<T, _>(pages, place, numbers, strides, multiplier),
        Elements::F16(numbers) => write_numbers::<T, _>(pages, place, numbers, strides, multiplier),
        Elements::Bf16(numbers) => write_numbers::<T, _>(pages, place, numbers, strides, multiplier),
    }
}

/// Elements converted at a time.
const PIECE: usize = 256;

fn write_numbers<T: Element, N: Number>(
    pages: &mut CpuPageSet,
    place: &FactorPlace,
    numbers: &[N],
    (row_stride, stride): (usize, usize),
    multiplier: f32,
) {
    if numbers.is_empty() {
        return;
    }
    let (mut piece, mut wide) = ([N::default(); PIECE], [0.0; PIECE]);
    for run in place.runs() {
        let to = pages.write::<T>(run.page, run.offset * size_of::<T>(), run.rows.len() * place.width());
        for (row, to) in run.rows.zip(to.chunks_exact_mut(place.width())) {
            let mut from = numbers[row * row_stride + run.columns.start * stride..].iter().step_by(stride);
            for to in to[..run.columns.len()].chunks_mut(PIECE) {
                let (piece, wide) = (&mut piece[..to.len()], &mut wide[..to.len()]);
                piece.iter_mut().zip(&mut from).for_each(|(to, number)| *to = *number);
                N::widen(piece, wide);
                wide.iter_mut().for_each(|value| *value *= multiplier);
                T::narrow(wide, to);
            }
        }
    }
}

/// An element of an adapter's file.
trait Number: Copy + Default {
    fn widen(from: &[Self], to: &mut [f32]);
}

impl Number for f32 {
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Number for f16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

impl Number for bf16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

#[cfg(test)]
mod tests {
    use openlora_types::{Generation, Matrix};

    use super::super::super::pages::CpuPages;
    use super::*;
    use crate::AttentionSpec;

    /// Loads with pages of 128 KiB with f16 and 256 KiB with f32, full of NaN.
    fn load(
        weights: &AdapterWeights,
        scales: &[Option<Vec<f32>>],
        precision: Precision,
    ) -> Result<CpuAdapter, KernelError> {
        let spec = AttentionSpec { heads: 8, kv_heads: 8, head_dim: 64, block_size: 16, scale: 1.0, norm_eps: 0.0 };
        let mut pool = CpuPages::new(&spec, 4, 2, precision).expect("memory");
        pool.fill(f32::NAN);
        CpuAdapter::load(weights, scales, 1, precision, pool.take(&[1, 0]).expect("free"))
    }

    fn weights(a: Elements, b: Elements) -> AdapterWeights {
        let rank = 2;
        let site = SiteWeights {
            site: Site { layer: 0, module: Module::Q },
            a: Matrix { rows: rank, cols: a.len() / rank, elements: a },
            b: Matrix { rows: b.len() / rank, cols: rank, elements: b },
            scale: 0.75,
            b_bias: None,
            magnitude: None,
        };
        AdapterWeights { generation: Generation([0; 32]), sites: vec![site] }
    }

    #[test]
    fn half_precision_files_are_held_exactly() {
        // Every finite f16, subnormals included, as A; B has its own range.
        let a: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|value| value.is_finite()).collect();
        let small: Vec<f16> = a.iter().copied().filter(|value| value.to_f32().abs() < 1e-3).collect();
        for a in [a, small] {
            let b = vec![f16::from_f32(3e-6); 6];
            let weights = weights(Elements::F16(a.clone()), Elements::F16(b.clone()));
            let adapter = load(&weights, &[None], Precision::Quantised).expect("fits");
            let site = adapter.site(0).expect("site");
            let (held_a, held_b) = (adapter.a::<f16>(site, 0).run(0).1, adapter.b::<f16>(site, 0).run(0).1);
            assert_eq!((held_a.len(), held_b.len()), (a.len(), 6));
            let shifts = site_shifts(&weights.sites[0]).expect("in range");
            assert_eq!(site.scale * shifts.a * shifts.b, 0.75);
            assert!(held_a.iter().zip(&a).all(|(held, a)| held.to_f32() / shifts.a == a.to_f32()));
            assert!(held_b.iter().zip(&b).all(|(held, b)| held.to_f32() / shifts.b == b.to_f32()));
        }
    }

    #[test]
    fn small_numbers_keep_eleven_bits() {
        let a: Vec<f32> = (0..200).map(|i| (i as f32 - 99.5) * 1.234_567e-9).collect();
        let weights = weights(Elements::F32(a.clone()), Elements::F32(vec![1.0; 6]));
        let adapter = load(&weights, &[None], Precision::Quantised).expect("fits");
        let (ranks, held) = adapter.a::<f16>(adapter.site(0).expect("site"), 0).run(0);
        assert_eq!((ranks, held.len()), (2, a.len()));
        let shift = site_shifts(&weights.sites[0]).expect("in range").a;
        for (held, a) in held.iter().zip(&a) {
            assert!((held.to_f32() / shift - a).abs() <= a.abs() / 2048.0, "{a} became {}", held.to_f32() / shift);
        }
    }

    #[test]
    fn numbers_beyond_half_precision_are_refused_by_name_and_held_in_f32() {
        let weights = weights(Elements::F32(vec![1.0, 70_000.0]), Elements::F32(vec![1.0; 2]));
        let error = load(&weights, &[None], Precision::Quantised).expect_err("out of range");
        assert!(error.to_string().contains("q_proj") && error.to_string().contains("70000"), "{error}");
        load(&weights, &[None], Precision::F32).expect("fits f32");
    }

    #[test]
    fn an_adapter_is_refused_pages_that_are_too_few() {
        let many = weights(Elements::F32(vec![1.0; 80_000]), Elements::F32(vec![1.0; 60_000]));
        let pages = CpuAdapter::pages(&many.sizes(), 256 << 10, Precision::F32);
        let error = load(&many, &[None], Precision::F32).expect_err("three pages").to_string();
        assert_eq!((pages, error.as_str()), (3, "the adapter needs 3 pages of the pool and was given 2"));
    }

    #[test]
    fn factors_that_do_not_fit_each_other_are_refused() {
        let good = || weights(Elements::F32(vec![1.0; 8]), Elements::F32(vec![1.0; 6]));
        let load = |change: &dyn Fn(&mut SiteWeights), scale: Option<Vec<f32>>| {
            let mut weights = good();
            change(&mut weights.sites[0]);
            super::tests::load(&weights, &[scale], Precision::F32)
        };
        load(&|_| (), Some(vec![1.0; 3])).expect("fits");
        let changes: [&dyn Fn(&mut SiteWeights); 5] = [
            &|site| site.a.rows = 3,
            &|site| site.b.cols = 1,
            &|site| site.b.rows = usize::MAX,
            &|site| site.b_bias = Some(vec![0.0; 2]),
            &|site| site.site.layer = 1,
        ];
        for (i, change) in changes.into_iter().enumerate() {
            let error = load(change, None).expect_err("does not fit");
            assert!(matches!(error, KernelError::AdapterShape { .. }), "{i}: {error}");
        }
        load(&|_| (), Some(vec![1.0; 2])).expect_err("two factors for three outputs");
    }
}
