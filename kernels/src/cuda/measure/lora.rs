//! Shrink and expand over all sites of a model, as a step has them.

use openlora_types::{AdapterWeights, Module, Site};

use super::super::device::Device;
use super::super::lora::RANK_MAX;
use super::super::lora::{CudaAdapter, LoraLimits, LoraLinear, LoraPlan};
use super::super::pages::{CudaPages, page_bytes};
use super::super::step::{StepLimits, StepMemory};
use super::super::tensor::CudaTensor;
use super::{Measure, Timing, Work};
use crate::{KernelError, LoraRows, LoraSegment, SiteSpan, StepRows};

/// Linears of a layer, as they are fused.
const FUSED: [&[Module]; 4] =
    [&[Module::Q, Module::K, Module::V], &[Module::O], &[Module::Gate, Module::Up], &[Module::Down]];

/// Which launches are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The plan, then each linear's shrink and expand.
    All,
    /// Each linear's shrink.
    Shrink,
    /// Each linear's expand.
    Expand,
}

/// Adapters in pages, a step of rows that use them, and the tensors around every linear.
#[derive(Debug)]
pub struct LoraRig<'a, D: Device> {
    measure: &'a Measure<D>,
    plan: LoraPlan<D>,
    step: StepMemory<D>,
    inputs: Vec<CudaTensor<D>>,
    outputs: Vec<CudaTensor<D>>,
    rows: usize,
    /// Of A and of B of all adapters.
    factor_bytes: [f64; 2],
    flops: [f64; 2],
    // What the step names.
    _adapters: Vec<CudaAdapter<D>>,
    _pool: CudaPages<D>,
}

impl<D: Device> Measure<D> {
    /// `rows` rows over `distinct` adapters like `weights`, each in pages of its own, as equal runs.
    ///
    /// # Errors
    /// What loading an adapter refuses, [`KernelError::OutOfMemory`] or a device failure.
    ///
    /// # Panics
    /// When there are more adapters than rows.
    pub fn lora(&self, weights: &AdapterWeights, distinct: usize, rows: usize) -> Result<LoraRig<'_, D>, KernelError> {
        assert!((1..=rows).contains(&distinct), "{distinct} adapters for {rows} rows");
        let (shape, device) = (&self.shape, &self.device);
        let layers = shape.layers;
        let linear = |layer: u32, modules: &[Module]| {
            let mut outputs = 0;
            let span = |module: &Module| {
                let site = Site { layer, module: *module };
                outputs += shape.dims(*module).1;
                SiteSpan { site, index: site.index(layers), outputs: outputs - shape.dims(*module).1..outputs }
            };
            let sites = modules.iter().map(span).collect();
            LoraLinear { sites, inputs: shape.dims(modules[0]).0, outputs, bias: false, embedding: false }
        };
        let linears: Vec<_> =
            (0..layers as u32).flat_map(|layer| FUSED.map(|modules| linear(layer, modules))).collect();
        // As the backend has it, whatever ranks there are.
        let limits = LoraLimits { rows, segments: rows, rank: RANK_MAX };
        let plan = LoraPlan::new(device, self.element, &linears, limits)?;

        let page_bytes = page_bytes(&self.spec(), layers, self.element);
        let needed = CudaAdapter::<D>::pages_needed(&weights.sizes(), page_bytes, self.element);
        let mut pool = CudaPages::new(device, distinct * needed, page_bytes)?;
        let scales = vec![None; weights.sites.len()];
        let load = |i: usize| {
            let pages: Vec<u32> = (i * needed..(i + 1) * needed).map(|page| page as u32).collect();
            CudaAdapter::load(weights, &scales, layers, self.element, pool.take(&pages)?)
        };
        let adapters = (0..distinct).map(load).collect::<Result<Vec<_>, KernelError>>()?;
        let first = |i: usize| i * rows / distinct;
        let segment =
            |(i, adapter)| LoraSegment { row: first(i), rows: first(i + 1) - first(i), adapter: Some(adapter) };
        let segments: Vec<_> = adapters.iter().enumerate().map(segment).collect();
        let segments = plan.segments(&LoraRows { segments: &segments })?;
        let mut step = StepMemory::new(device, StepLimits { rows, table_entries: 1 })?;
        let tokens = vec![0; rows];
        step.write(
            &StepRows { tokens: &tokens, drawn: &[], positions: &tokens, sequences: &[], block_tables: &[] },
            &segments,
        )?;

        let (mut factors, mut flops) = ([0.0; 2], [0.0; 2]);
        for site in &weights.sites {
            let sizes = [site.rank() * site.a.cols, site.rank() * site.b.rows].map(|numbers| numbers as f64);
            for (i, numbers) in sizes.into_iter().enumerate() {
                factors[i] += numbers * (distinct * self.element.bytes()) as f64;
                flops[i] += 2.0 * numbers * rows as f64;
            }
        }
        let inputs = FUSED.map(|modules| self.tensor(rows, shape.dims(modules[0]).0));
        let outputs = FUSED.map(|modules| self.tensor(rows, modules.iter().map(|module| shape.dims(*module).1).sum()));
        Ok(LoraRig {
            measure: self,
            plan,
            step,
            inputs: inputs.into_iter().collect::<Result<_, _>>()?,
            outputs: outputs.into_iter().collect::<Result<_, _>>()?,
            rows,
            factor_bytes: factors,
            flops,
            _adapters: adapters,
            _pool: pool,
        })
    }
}

impl<D: Device> LoraRig<'_, D> {
    /// Times the launches over all layers, once each. The floor is of the factors, the linears' inputs, and their outputs read and
    /// written; what shrink hands to expand is none of it.
    ///
    /// # Errors
    /// A device failure.
    pub fn time(&mut self, part: Part) -> Result<Timing, KernelError> {
        let Self { measure, plan, step, inputs, outputs, rows, factor_bytes, flops, .. } = self;
        let (layers, rows) = (measure.shape.layers, *rows);
        let activations = |tensors: &[CudaTensor<D>]| {
            let width: usize = tensors.iter().map(CudaTensor::width).sum();
            (layers * rows * width * measure.element.bytes()) as f64
        };
        let (shrink, expand) = (factor_bytes[0] + activations(inputs), factor_bytes[1] + 2.0 * activations(outputs));
        let work = match part {
            Part::All => Work { bytes: shrink + expand, flops: flops[0] + flops[1] },
            Part::Shrink => Work { bytes: shrink, flops: flops[0] },
            Part::Expand => Work { bytes: expand, flops: flops[1] },
        };
        let mut call = |_| {
            if part == Part::All {
                plan.plan(step.view())?;
            }
            for linear in 0..layers * FUSED.len() {
                let of = linear % FUSED.len();
                if part != Part::Expand {
                    plan.shrink(linear, &inputs[of], rows)?;
                }
                if part != Part::Shrink {
                    plan.expand(linear, &mut outputs[of], None, rows)?;
                }
            }
            Ok(())
        };
        plan.plan(step.view())?;
        // SAFETY: plan, step, adapters and tensors live as long as this.
        unsafe { measure.time(work, 1, &mut call) }
    }
}
