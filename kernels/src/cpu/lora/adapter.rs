//! One adapter in memory.

use half::f16;
use openlora_types::{AdapterWeights, Elements, Matrix, Module, Site, SiteWeights};

use super::super::tensor::Aligned;
use super::super::vector_math::{Element, LANES};
use crate::{KernelError, Precision};

/// One adapter generation, resident: per site the rows of A, `[rank][inputs]`, then the rows of B transposed,
/// `[rank][outputs]`, so that what belongs to one rank is contiguous and ranks can be cut into pages.
///
/// With [`Precision::Quantised`] the factors are f16. Each is multiplied by a power of two that brings its largest number near
/// the top of f16's range, which the site's scale takes back: f16 files stay exact, and of bf16 and f32 files small
/// numbers keep their 11 bits where plain f16 would make them subnormal.
#[derive(Debug)]
pub struct CpuAdapter {
    /// By [`Site::index`].
    sites: Vec<Option<SiteFactors>>,
    pub(in super::super) factors: Factors,
}

/// The factors of all sites, in order of the sites.
#[derive(Debug)]
pub(in super::super) enum Factors {
    F16(Aligned<f16>),
    F32(Aligned<f32>),
}

/// One site's sizes, and where its factors are.
#[derive(Debug)]
pub(in super::super) struct SiteFactors {
    pub(in super::super) rank: usize,
    pub(in super::super) inputs: usize,
    pub(in super::super) outputs: usize,
    /// alpha / r (or / sqrt r), and the inverse of the powers of two in the factors.
    pub(in super::super) scale: f32,
    /// First element of A's rows.
    pub(in super::super) a: usize,
    /// First element of B's transposed rows.
    pub(in super::super) b: usize,
    /// `[outputs]`: alpha / r times B's bias.
    pub(in super::super) b_bias: Option<Vec<f32>>,
    /// `[outputs]`: DoRA's `m / ||W + scale B A||`.
    pub(in super::super) output_scale: Option<Vec<f32>>,
}

impl CpuAdapter {
    /// Makes `weights` resident; see [`crate::Backend::load_adapter`].
    ///
    /// # Errors
    /// [`KernelError::AdapterShape`] for factors that do not fit each other or a layer that does not exist,
    /// [`KernelError::AdapterRange`] for numbers that f16 cannot hold, [`KernelError::OutOfMemory`].
    ///
    /// # Panics
    /// When there is not one entry of `output_scales` for each site.
    pub fn load(
        weights: &AdapterWeights,
        output_scales: &[Option<Vec<f32>>],
        layers: usize,
        precision: Precision,
    ) -> Result<Self, KernelError> {
        assert_eq!(output_scales.len(), weights.sites.len(), "one entry for each site");
        for (site, output_scale) in weights.sites.iter().zip(output_scales) {
            check(site, output_scale.as_deref(), layers)?;
        }
        let len = weights.sites.iter().map(|site| padded(site.a.elements.len()) + padded(site.b.elements.len())).sum();
        let (plans, factors) = match precision {
            Precision::Quantised => {
                let mut factors = Aligned::<f16>::zeroed(len, "an adapter")?;
                let plans = weights.sites.iter().map(site_shifts).collect::<Result<Vec<_>, _>>()?;
                place(weights, &plans, &mut factors, f16::from_f32);
                (plans, Factors::F16(factors))
            }
            Precision::F32 => {
                let mut factors = Aligned::<f32>::zeroed(len, "an adapter")?;
                let plans = vec![Shifts { a: 1.0, b: 1.0 }; weights.sites.len()];
                place(weights, &plans, &mut factors, |value| value);
                (plans, Factors::F32(factors))
            }
        };
        let mut sites = Vec::new();
        sites.resize_with(Site::count(layers), || None);
        let mut offset = 0;
        for ((site, output_scale), shifts) in weights.sites.iter().zip(output_scales).zip(plans) {
            let (a, b) = (offset, offset + padded(site.a.elements.len()));
            offset = b + padded(site.b.elements.len());
            let b_bias = site.b_bias.as_ref().map(|bias| bias.iter().map(|bias| bias * site.scale).collect());
            sites[site.site.index(layers)] = Some(SiteFactors {
                rank: site.rank(),
                inputs: site.a.cols,
                outputs: site.b.rows,
                scale: site.scale / shifts.a / shifts.b,
                a,
                b,
                b_bias,
                output_scale: output_scale.clone(),
            });
        }
        Ok(Self { sites, factors })
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

    /// Bytes held.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        let factors = match &self.factors {
            Factors::F16(factors) => factors.byte_len(),
            Factors::F32(factors) => factors.byte_len(),
        };
        let vector = |values: &Option<Vec<f32>>| values.as_ref().map_or(0, |values| values.len() * size_of::<f32>());
        let vectors: usize =
            self.sites.iter().flatten().map(|site| vector(&site.b_bias) + vector(&site.output_scale)).sum();
        factors + vectors + self.sites.len() * size_of::<Option<SiteFactors>>()
    }
}

/// Every factor starts on a cache line.
fn padded(len: usize) -> usize {
    len.next_multiple_of(2 * LANES)
}

/// What the factors of a site are multiplied by: powers of two.
#[derive(Clone, Copy, Debug)]
struct Shifts {
    a: f32,
    b: f32,
}

/// Whether the site's parts fit each other; that they fit the model was checked where the model is known.
fn check(site: &SiteWeights, output_scale: Option<&[f32]>, layers: usize) -> Result<(), KernelError> {
    let (inputs, outputs, rank) = (site.a.cols, site.b.rows, site.rank());
    let error = |matrix: &Matrix| KernelError::AdapterShape {
        site: site.site,
        rows: matrix.rows,
        cols: matrix.cols,
        inputs,
        outputs,
    };
    let whole = |matrix: &Matrix| matrix.rows.checked_mul(matrix.cols) == Some(matrix.elements.len());
    let in_layer = !matches!(site.site.module, Module::Embed | Module::LmHead);
    if rank == 0 || !whole(&site.a) || in_layer && site.site.layer as usize >= layers {
        return Err(error(&site.a));
    }
    let vector_fits = |vector: Option<&[f32]>| vector.is_none_or(|vector| vector.len() == outputs);
    if site.b.cols != rank || !whole(&site.b) || !vector_fits(site.b_bias.as_deref()) || !vector_fits(output_scale) {
        return Err(error(&site.b));
    }
    Ok(())
}

fn site_shifts(site: &SiteWeights) -> Result<Shifts, KernelError> {
    Ok(Shifts { a: shift(site.site, &site.a.elements)?, b: shift(site.site, &site.b.elements)? })
}

/// The power of two, at least 1, that brings the largest number to [2^13, 2^14): room for neither rounding nor a sum to
/// overflow.
fn shift(site: Site, elements: &Elements) -> Result<f32, KernelError> {
    let largest = elements.iter_f32().fold(0.0, |largest: f32, value| largest.max(value.abs()));
    if let Some(value) = elements.iter_f32().find(|value| !f16::from_f32(*value).is_finite()) {
        return Err(KernelError::AdapterRange { site, value });
    }
    // Subnormal f32 numbers are beyond any use; 2^100 keeps the inverse in range.
    let exponent = if largest > 0.0 { (13 - largest.log2().floor() as i32).clamp(0, 100) } else { 0 };
    Ok(2.0_f32.powi(exponent))
}

/// Copies the factors of all sites: A as it is, B transposed.
fn place<T: Element>(weights: &AdapterWeights, shifts: &[Shifts], to: &mut [T], convert: impl Fn(f32) -> T) {
    let mut rest = to;
    for (site, shifts) in weights.sites.iter().zip(shifts) {
        let (a, after) = rest.split_at_mut(padded(site.a.elements.len()));
        let (b, after) = after.split_at_mut(padded(site.b.elements.len()));
        rest = after;
        for (to, value) in a.iter_mut().zip(site.a.elements.iter_f32()) {
            *to = convert(value * shifts.a);
        }
        let (outputs, rank) = (site.b.rows, site.b.cols);
        for (i, value) in site.b.elements.iter_f32().enumerate() {
            b[i % rank * outputs + i / rank] = convert(value * shifts.b);
        }
    }
}

#[cfg(test)]
mod tests {
    use openlora_types::Generation;

    use super::*;

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
            let adapter = CpuAdapter::load(&weights, &[None], 1, Precision::Quantised).expect("fits");
            let site = adapter.site(0).expect("site");
            let Factors::F16(factors) = &adapter.factors else { panic!("f16") };
            let shifts = site_shifts(&weights.sites[0]).expect("in range");
            assert_eq!(site.scale * shifts.a * shifts.b, 0.75);
            assert!(factors[site.a..].iter().zip(&a).all(|(held, a)| held.to_f32() / shifts.a == a.to_f32()));
            assert!(factors[site.b..][..6].iter().zip(&b).all(|(held, b)| held.to_f32() / shifts.b == b.to_f32()));
        }
    }

    #[test]
    fn small_numbers_keep_eleven_bits() {
        let a: Vec<f32> = (0..200).map(|i| (i as f32 - 99.5) * 1.234_567e-9).collect();
        let weights = weights(Elements::F32(a.clone()), Elements::F32(vec![1.0; 6]));
        let adapter = CpuAdapter::load(&weights, &[None], 1, Precision::Quantised).expect("fits");
        let Factors::F16(factors) = &adapter.factors else { panic!("f16") };
        let shift = site_shifts(&weights.sites[0]).expect("in range").a;
        for (held, a) in factors.iter().zip(&a) {
            assert!((held.to_f32() / shift - a).abs() <= a.abs() / 2048.0, "{a} became {}", held.to_f32() / shift);
        }
    }

    #[test]
    fn numbers_beyond_half_precision_are_refused_by_name_and_held_in_f32() {
        let weights = weights(Elements::F32(vec![1.0, 70_000.0]), Elements::F32(vec![1.0; 2]));
        let error = CpuAdapter::load(&weights, &[None], 1, Precision::Quantised).expect_err("out of range");
        assert!(error.to_string().contains("q_proj") && error.to_string().contains("70000"), "{error}");
        CpuAdapter::load(&weights, &[None], 1, Precision::F32).expect("fits f32");
    }

    #[test]
    fn factors_that_do_not_fit_each_other_are_refused() {
        let good = || weights(Elements::F32(vec![1.0; 8]), Elements::F32(vec![1.0; 6]));
        let load = |change: &dyn Fn(&mut SiteWeights), scale: Option<Vec<f32>>| {
            let mut weights = good();
            change(&mut weights.sites[0]);
            CpuAdapter::load(&weights, &[scale], 1, Precision::F32)
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
