//! Adapters onto a loaded model: the check that every factor fits its linear, and DoRA's output scales, which need the base
//! weights.

use openlora_kernels::reference::dequantise::dequantise_row;
use openlora_kernels::{Backend, TensorSource};
use openlora_types::{AdapterSizes, AdapterWeights, InvalidField, Matrix, ModelShape, Module, SiteWeights};

use crate::error::ModelError;
use crate::files::ModelFiles;
use crate::roles::Role;
use crate::weights::Model;

impl<B: Backend> Model<B> {
    /// How many pages of this model's pool [`Self::load_adapter`] needs for an adapter of these sizes.
    #[must_use]
    pub fn adapter_pages(&self, sizes: &AdapterSizes) -> usize {
        let page_bytes = self.backend.page_bytes(&self.attention, self.layers());
        self.backend.adapter_pages(sizes, page_bytes)
    }

    /// Makes an adapter resident on the device, in `pages` of its own. Takes `&self`, so that it can run beside the step thread.
    ///
    /// For a DoRA site the per-output factor `m / ||W + scale B A||` is computed here, once, from the base weights as
    /// they stand in the file.
    ///
    /// # Errors
    /// A site this model does not have, a factor that does not fit it, or numbers the device's format cannot hold; each
    /// naming the site; or too few pages.
    pub fn load_adapter(&self, weights: &AdapterWeights, pages: B::PageSet) -> Result<B::Adapter, ModelError> {
        let shape = self.shape();
        let scales = weights
            .sites
            .iter()
            .map(|site| {
                check_site(site, shape)?;
                output_scale(&self.files, site)
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(self.backend.load_adapter(weights, &scales, shape.layers, pages)?)
    }
}

fn refuse(site: &SiteWeights, reason: String) -> ModelError {
    ModelError::Adapter(InvalidField::new(site.site.to_string(), reason))
}

fn check_site(site: &SiteWeights, shape: &ModelShape) -> Result<(), ModelError> {
    let layers = if matches!(site.site.module, Module::Embed | Module::LmHead) { 1 } else { shape.layers };
    if site.site.layer as usize >= layers {
        return Err(refuse(site, format!("does not exist; the model has {} layers", shape.layers)));
    }
    let (inputs, outputs) = shape.dims(site.site.module);
    let rank = site.rank();
    let fits = |matrix: &Matrix, rows: usize, cols: usize| {
        (matrix.rows, matrix.cols) == (rows, cols) && rows.checked_mul(cols) == Some(matrix.elements.len())
    };
    if rank == 0 || !fits(&site.a, rank, inputs) || !fits(&site.b, outputs, rank) {
        let (a, b) = ((site.a.rows, site.a.cols), (site.b.rows, site.b.cols));
        let reason = format!("has factors A {a:?} and B {b:?}; its linear takes {inputs} inputs to {outputs} outputs");
        return Err(refuse(site, reason));
    }
    for (what, vector) in [("B's bias", &site.b_bias), ("the magnitude", &site.magnitude)] {
        if let Some(values) = vector
            && values.len() != outputs
        {
            return Err(refuse(
                site,
                format!("{what} has {} elements; the linear has {outputs} outputs", values.len()),
            ));
        }
    }
    if site.magnitude.is_some() && site.b_bias.is_some() {
        // PEFT's norm would take in the bias by accident of how it computes B A, and its configuration forbids the pair.
        return Err(refuse(site, "has both DoRA and lora_bias, which PEFT forbids".into()));
    }
    Ok(())
}

fn output_scale(files: &ModelFiles, site: &SiteWeights) -> Result<Option<Vec<f32>>, ModelError> {
    let Some(magnitude) = &site.magnitude else { return Ok(None) };
    let role = files.weight_role(site.site);
    let base = files.matrix(role);
    let norms = if site.site.module == Module::Embed { column_norms(&base, site) } else { row_norms(&base, site) };
    if role != Role::Embedding {
        files.advise_unneeded(role);
    }
    let scale = |(magnitude, norm): (&f32, &f32)| {
        let scale = magnitude / norm;
        scale.is_finite().then_some(scale)
    };
    let scales: Option<Vec<f32>> = magnitude.iter().zip(&norms).map(scale).collect();
    scales
        .map(Some)
        .ok_or_else(|| refuse(site, "has an output whose magnitude or weight norm gives no finite scale".into()))
}

/// `||W + scale B A||` of each output row (DoRA, Liu et al. 2024, equation 5). B A and the sum are f32 as in PEFT; the sum of
/// squares is f64, which lies within PEFT's own rounding.
fn row_norms(base: &TensorSource<'_>, site: &SiteWeights) -> Vec<f32> {
    let (rank, inputs) = (site.a.rows, site.a.cols);
    let (a, b) = (site.a.elements.to_f32_vec(), site.b.elements.to_f32_vec());
    let mut row = vec![0.0; inputs];
    let mut update = vec![0.0; inputs];
    let norm = |output: usize| {
        dequantise_row(base, output, &mut row);
        update.fill(0.0);
        for (factor, a_row) in b[output * rank..][..rank].iter().zip(a.chunks_exact(inputs)) {
            for (sum, value) in update.iter_mut().zip(a_row) {
                *sum += factor * value;
            }
        }
        row.iter().zip(&update).map(|(weight, update)| square(weight + site.scale * update)).sum::<f64>().sqrt() as f32
    };
    (0..base.rows).map(norm).collect()
}

/// The same of an embedding, whose table is the transpose of a linear's weight: the norm of each hidden unit's column over the
/// vocabulary (PEFT's `DoraEmbeddingLayer`).
fn column_norms(table: &TensorSource<'_>, site: &SiteWeights) -> Vec<f32> {
    let (rank, vocab, hidden) = (site.a.rows, site.a.cols, site.b.rows);
    let (a, b) = (site.a.elements.to_f32_vec(), site.b.elements.to_f32_vec());
    let mut row = vec![0.0; hidden];
    let mut squares = vec![0.0; hidden];
    for token in 0..vocab {
        dequantise_row(table, token, &mut row);
        for ((sum, weight), b_row) in squares.iter_mut().zip(&row).zip(b.chunks_exact(rank)) {
            let update: f32 = b_row.iter().enumerate().map(|(r, factor)| factor * a[r * vocab + token]).sum();
            *sum += square(weight + site.scale * update);
        }
    }
    squares.iter().map(|sum: &f64| sum.sqrt() as f32).collect()
}

fn square(value: f32) -> f64 {
    f64::from(value) * f64::from(value)
}
