//! The linear: `x W^T` over weight panels ([`super::pack`]), 8-bit activations ([`activations`]) against 4- or 8-bit
//! weights, or f32 against f32.
//!
//! The unit of work is a tile: one panel of 16 outputs times a group of up to eight rows. A worker owns a range of panels,
//! the same at every step, and walks through all groups of rows while a panel is in its nearest cache. Per output the
//! arithmetic is: for each block of 32 inputs in order, the exact integer dot products with one or two digits of the
//! activations, times the two scales, added to the f32 sum; then minimum times activation sum, added. Nothing of that depends on the other rows of the tile.

pub mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::ops::Range;

use super::ahead::Ahead;
use super::pack::{BLOCK, PANEL, PanelFormat, Panels, Part};
use super::pool::{Disjoint, Pool, Work};
use super::{CpuTensor, Isa};
use crate::{KernelError, LinearSpec, Precision, SiteSpan};
use activations::{ActivationBlock, Activations, GROUP, Group};

/// One panel's outputs for one group of rows.
pub type Tile = [[f32; PANEL]; GROUP];

/// Activations of one pass over the panels: more rows than fit beside a panel in a typical second-level cache are taken in
/// several passes.
const PASS_BYTES: usize = 1 << 20;
/// Runs of neighbouring panels that a worker's share is taken in: what other workers can take over when it is late.
const RUNS: usize = 8;
/// Up to this many rows a linear costs what reading its weights costs, above it what multiplying costs.
const BANDWIDTH_BOUND_ROWS: usize = 4;
/// How far ahead of the multiplication a panel is asked for that one group of rows reads once: time for it to come, and little
/// enough to stay in the nearest cache.
const AHEAD_BYTES: usize = 8 << 10;

/// Work that is done by the same threads beside a multiplication.
pub(super) trait Beside: Sync {
    /// `worker`'s pieces, disjoint from others'.
    fn share(&self, worker: usize) -> Range<usize>;
    /// Does these pieces, each of which one thread does once.
    fn run(&self, pieces: Range<usize>);
}

/// Perhaps nothing.
impl<B: Beside> Beside for Option<B> {
    fn share(&self, worker: usize) -> Range<usize> {
        self.as_ref().map_or(0..0, |beside| beside.share(worker))
    }
    fn run(&self, pieces: Range<usize>) {
        if let Some(beside) = self {
            beside.run(pieces);
        }
    }
}

/// Pieces of other work that are taken at a time.
const BESIDE_RUN: usize = 8;

/// A loaded (fused) linear.
#[derive(Debug)]
pub struct CpuLinear {
    /// The weights.
    pub panels: Panels,
    /// `[outputs]`
    pub bias: Option<Vec<f32>>,
    /// Which adapter sites the outputs belong to.
    pub sites: Vec<SiteSpan>,
}

impl CpuLinear {
    /// Checks `spec` and repacks its weights.
    ///
    /// # Errors
    /// Parts, bias or sites that do not fit together, weights that are not finite, or memory.
    pub fn load(pool: &Pool, spec: &LinearSpec<'_>, precision: Precision) -> Result<Self, KernelError> {
        let panels = Panels::pack(pool, spec, precision)?;
        let misfit = |what, found| {
            let name = spec.parts.first().map_or_else(String::new, |part| part.name.to_owned());
            KernelError::Parts { name, what, found, expected: panels.outputs }
        };
        if let Some(bias) = &spec.bias
            && bias.len() != panels.outputs
        {
            return Err(misfit("bias values", bias.len()));
        }
        if let Some(site) = spec.sites.iter().find(|site| site.outputs.end > panels.outputs) {
            return Err(misfit("outputs up to its last site", site.outputs.end));
        }
        Ok(Self { panels, bias: spec.bias.clone(), sites: spec.sites.clone() })
    }
}

/// `out = x W^T`, without bias: `x: [rows, inputs]`, `out: [rows, outputs]`. `beside` has been done as well when it returns.
///
/// # Errors
/// [`KernelError::OutOfMemory`] when `scratch` had not room for the rows and cannot get it.
///
/// # Panics
/// When the widths of `x` or `out` are not the linear's.
pub(super) fn multiply(
    pool: &Pool,
    isa: Isa,
    linear: &CpuLinear,
    x: &CpuTensor,
    out: &mut CpuTensor,
    scratch: &mut Activations,
    beside: &impl Beside,
) -> Result<(), KernelError> {
    let panels = &linear.panels;
    assert_eq!((x.width(), out.width()), (panels.inputs, panels.outputs), "[inputs, outputs] of a linear");
    let rows = x.rows();
    out.set_rows(rows);
    if panels.parts.iter().any(|part| part.format != PanelFormat::F32) {
        scratch.quantise(pool, isa, x)?;
    }
    let operands = Operands { isa, panels, x, activations: scratch };
    let out = Disjoint::new(out.values_mut());
    let groups = rows.div_ceil(GROUP);
    let passes = groups.div_ceil((PASS_BYTES / operands.group_bytes()).max(1));
    let all = panels.parts.last().map_or(0, |part| part.panels.end);
    let run = (all / pool.threads() / RUNS).max(1);
    let share = |worker| worker_panels(&panels.parts, rows, worker, pool.threads());
    for pass in 0..passes {
        let groups = groups * pass / passes..groups * (pass + 1) / passes;
        let is_last = pass + 1 == passes;
        // SAFETY: every panel is in one range.
        let task = |_, range| unsafe { operands.multiply_panels(range, groups.clone(), &out) };
        let multiply = Work { share: &share, run, task: &task };
        if is_last {
            let beside =
                Work { share: &|worker| beside.share(worker), run: BESIDE_RUN, task: &|_, pieces| beside.run(pieces) };
            pool.run_shares(&[multiply, beside]);
        } else {
            pool.run_shares(&[multiply]);
        }
    }
    Ok(())
}

/// Adds `bias`, `[width]`, to every row of `out`.
pub fn add_bias(pool: &Pool, bias: &[f32], out: &mut CpuTensor) {
    let width = out.width();
    pool.for_each_row(out.values_mut(), width, &|_, row| {
        for (out, bias) in row.iter_mut().zip(bias) {
            *out += bias;
        }
    });
}

/// `worker`'s panels: neighbours, so that they are one stream of memory, and about as much work as every other worker's.
fn worker_panels(parts: &[Part], rows: usize, worker: usize, threads: usize) -> Range<usize> {
    let cost = |part: &Part| match part.format {
        _ if rows <= BANDWIDTH_BOUND_ROWS => part.panel_bytes,
        // Vector instructions of a block and eight rows, counted in docs/cpu.md.
        PanelFormat::Q4 => 112,
        PanelFormat::Q8 => 90,
        PanelFormat::F32 => 64,
    };
    let total: usize = parts.iter().map(|part| cost(part) * part.panels.len()).sum();
    let boundary = |worker: usize| {
        let mut share = total * worker / threads;
        for part in parts {
            let all = cost(part) * part.panels.len();
            if share < all {
                return part.panels.start + (share + cost(part) / 2) / cost(part);
            }
            share -= all;
        }
        parts.last().map_or(0, |part| part.panels.end)
    };
    boundary(worker)..boundary(worker + 1)
}

struct Operands<'a> {
    isa: Isa,
    panels: &'a Panels,
    x: &'a CpuTensor,
    activations: &'a Activations,
}

impl Operands<'_> {
    /// Bytes of one group of rows as the kernels read it.
    fn group_bytes(&self) -> usize {
        match self.panels.parts.first().map(|part| part.format) {
            Some(PanelFormat::Q4 | PanelFormat::Q8) => {
                self.panels.inputs.div_ceil(BLOCK) * size_of::<ActivationBlock>()
            }
            _ => (self.panels.inputs * GROUP * size_of::<f32>()).max(1),
        }
    }

    /// # Safety
    /// No other thread writes the columns of `range`'s panels in `out` at the same time.
    unsafe fn multiply_panels(&self, range: Range<usize>, groups: Range<usize>, out: &Disjoint<'_, f32>) {
        let (rows, outputs) = (self.x.rows(), self.panels.outputs);
        let mut tile: Tile = [[0.0; PANEL]; GROUP];
        let blocks = self.panels.inputs.div_ceil(BLOCK);
        for part in &self.panels.parts {
            for number in range.start.max(part.panels.start)..range.end.min(part.panels.end) {
                let panel = self.panels.panel(part, number);
                let column = part.outputs.start + (number - part.panels.start) * PANEL;
                let columns = PANEL.min(part.outputs.end - column);
                // Several groups read the panel from a cache, and meanwhile the next one comes.
                let distance = if groups.len() == 1 { AHEAD_BYTES.min(part.panel_bytes) } else { part.panel_bytes };
                let after = self.panels.ahead(part, number, distance);
                for group in groups.clone() {
                    let (done, all) = (group - groups.start, groups.len());
                    let next = &after[after.len() * done / all..after.len() * (done + 1) / all];
                    let ahead = Ahead::new(next, blocks);
                    let first = group * GROUP;
                    let in_group = GROUP.min(rows - first);
                    self.multiply_tile(part.format, panel, first..first + in_group, ahead, &mut tile);
                    for (row, values) in (first..).zip(&tile[..in_group]) {
                        let start = row * outputs + column;
                        // SAFETY: these columns are this worker's alone, as the caller promises.
                        unsafe { out.slice(start..start + columns) }.copy_from_slice(&values[..columns]);
                    }
                }
            }
        }
    }

    /// One panel times rows `rows` of one group.
    fn multiply_tile(&self, format: PanelFormat, panel: &[u8], rows: Range<usize>, ahead: Ahead, tile: &mut Tile) {
        match format {
            PanelFormat::Q4 => q4(self.isa, panel, self.activations.group(rows.start / GROUP), rows.len(), ahead, tile),
            PanelFormat::Q8 => q8(self.isa, panel, self.activations.group(rows.start / GROUP), rows.len(), ahead, tile),
            PanelFormat::F32 => {
                ahead.ask_all();
                let inputs = self.panels.inputs;
                let x = &self.x.values()[rows.start * inputs..rows.end * inputs];
                f32(self.isa, bytemuck::cast_slice(panel), x, inputs, tile);
            }
        }
    }
}

fn q4(isa: Isa, panel: &[u8], activations: Group<'_>, rows: usize, ahead: Ahead, tile: &mut Tile) {
    if isa != Isa::Avx512Vnni {
        ahead.ask_all();
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an Isa above portable exists only where the processor has it.
        Isa::Avx512Vnni => unsafe { avx512::q4(panel, activations, rows, ahead, tile) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::q4(panel, activations, rows, tile) },
        _ => portable::q4(panel, activations, rows, tile),
    }
}

fn q8(isa: Isa, panel: &[u8], activations: Group<'_>, rows: usize, ahead: Ahead, tile: &mut Tile) {
    if isa != Isa::Avx512Vnni {
        ahead.ask_all();
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an Isa above portable exists only where the processor has it.
        Isa::Avx512Vnni => unsafe { avx512::q8(panel, activations, rows, ahead, tile) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::q8(panel, activations, rows, tile) },
        _ => portable::q8(panel, activations, rows, tile),
    }
}

fn f32(isa: Isa, panel: &[f32], x: &[f32], inputs: usize, tile: &mut Tile) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an Isa above portable exists only where the processor has it.
        Isa::Avx512Vnni => unsafe { avx512::f32(panel, x, inputs, tile) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::f32(panel, x, inputs, tile) },
        _ => portable::f32(panel, x, inputs, tile),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_share_all_panels_of_mixed_parts_evenly() {
        let part = |format: PanelFormat, panels: Range<usize>| Part {
            format,
            outputs: panels.start * PANEL..panels.end * PANEL,
            panel_bytes: format.panel_bytes(64),
            panels,
            offset: 0,
        };
        let parts = [part(PanelFormat::Q4, 0..9), part(PanelFormat::Q8, 9..12), part(PanelFormat::Q4, 12..13)];
        for rows in [1, 100] {
            for threads in 1..20 {
                let ranges: Vec<_> = (0..threads).map(|worker| worker_panels(&parts, rows, worker, threads)).collect();
                assert_eq!((ranges[0].start, ranges[threads - 1].end), (0, 13));
                assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
                let most = ranges.iter().map(Range::len).max().expect("some");
                assert!(most <= 13_usize.div_ceil(threads) + 1, "{threads} threads: {ranges:?}");
            }
        }
    }
}
