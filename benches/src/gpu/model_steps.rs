//! Whole steps of a model with random weights, as the engine has them: the pass (replayed where it decodes), logits of the rows that
//! end a sequence, a greedy draw, and its result read by the host. Each is enqueued before the result of the one before it is read;
//! rows that decode take the tokens that this one draws.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use openlora_kernels::cuda::Cuda;
use openlora_kernels::cuda::device::{Device, Element, Stream};
use openlora_kernels::cuda::lora::CudaAdapter;
use openlora_kernels::cuda::measure::Work;
use openlora_kernels::cuda::pages::CudaPages;
use openlora_kernels::cuda::step::BUCKETS;
use openlora_kernels::{Backend, DrawnToken, LoraRows, SampleRow, SampledRow, SequenceRows, StepRows};
use openlora_model::conformance::segments;
use openlora_model::{Activations, LoadOptions, Model, ModelFiles};
use openlora_types::{AdapterWeights, Limits, ModelShape, Module, SamplingParams};

use crate::shapes::Shape;

const BLOCK: usize = 16;

/// Steps of one size.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Sequences.
    pub sequences: usize,
    /// Rows of each: 1 decodes.
    pub rows: usize,
    /// Tokens of each, these rows included.
    pub context: usize,
}

/// What steps took, from the end of the one before.
#[derive(Clone, Copy, Debug)]
pub struct StepTiming {
    /// Median by the device's clock.
    pub milliseconds: f64,
    /// The fastest.
    pub best: f64,
    /// The slowest.
    pub worst: f64,
    /// Median by the host's, from result to result.
    pub wall_ms: f64,
}

/// The largest of what will be run.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Sequences that have keys and values.
    pub sequences: usize,
    /// Tokens of each.
    pub context: usize,
    /// Rows of a step.
    pub rows: usize,
    /// Rows with logits.
    pub logit_rows: usize,
    /// Bytes that stay free beside the pool, for plans and partial results, which the first passes take.
    pub spare_bytes: usize,
}

/// A model on the device, its pool, and adapters in it.
pub struct Rig<D: Device> {
    model: Model<Cuda<D>>,
    act: Activations<Cuda<D>>,
    pool: CudaPages<D>,
    /// Pages that are nobody's.
    next_page: usize,
    room: Room,
    sampled: Vec<SampledRow>,
}

impl<D: Device> Rig<D> {
    /// Writes random weights into `scratch`, loads them, makes a pool with room for `adapter_pages` of a page's size beside the
    /// sequences, and fills the sequences' keys and values by prefilling them.
    ///
    /// # Errors
    /// Files, memory, or a device failure.
    pub fn new(
        device: &Arc<D>,
        element: Element,
        shape: &Shape,
        scratch: &Path,
        room: Room,
        adapter_pages: &dyn Fn(&Model<Cuda<D>>) -> usize,
    ) -> Result<Self> {
        let path = scratch.join(format!("{}.gguf", shape.name));
        let began = Instant::now();
        shape.write(&path)?;
        eprintln!("{}: weights written in {:.1} s", shape.name, began.elapsed().as_secs_f64());
        let began = Instant::now();
        let files = Arc::new(ModelFiles::open(&path, &Limits::default())?);
        let options = LoadOptions {
            max_rows: room.rows,
            max_logit_rows: room.logit_rows,
            max_position: room.context,
            block_size: BLOCK,
        };
        let backend = Arc::new(Cuda::new(Arc::clone(device), element)?);
        let model = Model::load(backend, files, &options, &mut |_, _| {})?;
        // Mapped until the model goes; the name is not needed any more.
        std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        device.synchronise()?;
        eprintln!("{}: loaded in {:.1} s", shape.name, began.elapsed().as_secs_f64());
        let act = model.new_activations()?;
        let sequence_pages = (room.sequences * room.context.div_ceil(BLOCK)).max(room.logit_rows);
        let page_bytes = model.backend().page_bytes(model.attention_spec(), model.layers());
        let free = device.memory_free()?.saturating_sub(room.spare_bytes) / page_bytes;
        let pages = (sequence_pages + adapter_pages(&model)).min(free.max(sequence_pages));
        let pool = model.backend().new_pages(model.attention_spec(), model.layers(), pages)?;
        let mut rig = Self { model, act, pool, next_page: sequence_pages, room, sampled: Vec::new() };
        rig.fill()?;
        Ok(rig)
    }

    /// The model's sizes.
    pub fn shape(&self) -> &ModelShape {
        self.model.shape()
    }

    /// Keys and values of all sequences.
    fn fill(&mut self) -> Result<()> {
        let began = Instant::now();
        let Room { sequences, context, rows, logit_rows, .. } = self.room;
        let at_once = (rows / context).clamp(1, sequences).min(logit_rows);
        for first in (0..sequences).step_by(at_once) {
            let count = at_once.min(sequences - first);
            for start in (0..context).step_by(rows) {
                let rows = rows.min(context - start);
                self.enqueue(first, Size { sequences: count, rows, context: start + rows }, &vec![None; count], false)?;
                self.collect()?;
            }
        }
        eprintln!("{} sequences of {context} tokens prefilled in {:.1} s", sequences, began.elapsed().as_secs_f64());
        Ok(())
    }

    /// As many of `count` adapters like `weights` as there are pages for, each in pages of its own.
    ///
    /// # Errors
    /// What loading refuses, or a device failure.
    pub fn load(&mut self, weights: &AdapterWeights, count: usize) -> Result<Vec<CudaAdapter<D>>> {
        let needed = self.model.adapter_pages(&weights.sizes());
        let fits = (self.pool.len() - self.next_page) / needed;
        let mut loaded = Vec::with_capacity(count.min(fits));
        for i in 0..count.min(fits) {
            let first = self.next_page + i * needed;
            let pages: Vec<u32> = (first..first + needed).map(|page| page as u32).collect();
            let pages = self.model.backend().take_pages(&mut self.pool, &pages)?;
            loaded.push(self.model.load_adapter(weights, pages)?);
        }
        Ok(loaded)
    }

    /// Bytes of the weights that a step reads: all linears and the head.
    fn weight_bytes(&self, element: Element) -> f64 {
        let shape = self.shape();
        let numbers = |module: Module| {
            let (inputs, outputs) = shape.dims(module);
            (inputs * outputs) as f64
        };
        let layer: f64 = Module::IN_LAYER.into_iter().map(numbers).sum();
        (layer * shape.layers as f64 + numbers(Module::LmHead)) * element.bytes() as f64
    }

    /// What a step must move and compute: each weight once, the keys and values before and in it, each distinct adapter once.
    pub fn work(&self, element: Element, size: Size, adapters: &[(&AdapterWeights, usize)]) -> Work {
        let shape = self.shape();
        let Size { sequences, rows, context } = size;
        let token_kv = (2 * shape.layers * shape.kv_heads * shape.head_dim * element.bytes()) as f64;
        let factors = |weights: &AdapterWeights| {
            let numbers = |site: &openlora_types::SiteWeights| site.rank() * (site.a.cols + site.b.rows);
            weights.sites.iter().map(numbers).sum::<usize>() as f64
        };
        let adapter_bytes: f64 =
            adapters.iter().map(|(weights, count)| factors(weights) * (*count * element.bytes()) as f64).sum();
        let bytes = self.weight_bytes(element) + (sequences * context) as f64 * token_kv + adapter_bytes;
        let all_rows = (sequences * rows) as f64;
        let (inputs, outputs) = shape.dims(Module::LmHead);
        let head = (inputs * outputs) as f64;
        let linears = self.weight_bytes(element) / element.bytes() as f64 - head;
        let seen = (context - rows) as f64 + (rows + 1) as f64 / 2.0;
        let attention = 4.0 * (shape.layers * shape.heads * shape.head_dim) as f64 * all_rows * seen;
        let lora = adapters.first().map_or(0.0, |(weights, _)| 2.0 * factors(weights) * all_rows);
        Work { bytes, flops: 2.0 * linears * all_rows + 2.0 * head * sequences as f64 + attention + lora }
    }

    /// Enqueues one step of the sequences from `first` on, each with an adapter or none, neighbours by adapter, its tokens drawn by the
    /// step before where `drawn` says so. Where it ends on the device.
    fn enqueue(
        &mut self,
        first: usize,
        size: Size,
        adapters: &[Option<&CudaAdapter<D>>],
        drawn: bool,
    ) -> Result<D::Event> {
        let Size { sequences, rows, context } = size;
        let blocks = context.div_ceil(BLOCK);
        let stride = self.room.context.div_ceil(BLOCK);
        let vocab = self.shape().vocab;
        let known = |row: usize| if drawn { 0 } else { (row * 7919 % vocab) as u32 };
        let tokens: Vec<u32> = (0..sequences * rows).map(known).collect();
        let drawn: Vec<_> =
            (0..sequences as u32).filter(|_| drawn).map(|row| DrawnToken { row, sample: row }).collect();
        let positions: Vec<u32> = (0..sequences * rows).map(|row| (context - rows + row % rows) as u32).collect();
        let spans: Vec<_> =
            (0..sequences).map(|i| SequenceRows { row: i * rows, rows, table: i * blocks, blocks }).collect();
        let tables: Vec<u32> =
            (0..sequences * blocks).map(|i| ((first + i / blocks) * stride + i % blocks) as u32).collect();
        let step = StepRows {
            tokens: &tokens,
            drawn: &drawn,
            positions: &positions,
            sequences: &spans,
            block_tables: &tables,
        };
        let of_rows: Vec<_> = adapters.iter().flat_map(|adapter| std::iter::repeat_n(*adapter, rows)).collect();
        let (all, ends) = (segments(&of_rows), segments(adapters));
        let wanted: Vec<u32> = (0..sequences).map(|i| ((i + 1) * rows - 1) as u32).collect();
        let logit_rows: Vec<u32> = (0..sequences as u32).collect();
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let draw =
            SampleRow::Draw { params: &params, sample_index: 0, prompt: &[], generated: &[], banned: &[], top: 0 };
        let draws = vec![draw; sequences];
        let Self { model, act, pool, sampled, .. } = self;
        let ends = LoraRows { segments: &ends };
        model.forward(act, &step, &LoraRows { segments: &all }, (&wanted, &ends), pool)?;
        let logits = model.logits(act, &logit_rows, &ends)?;
        model.backend().enqueue_sample(logits, &draws, sampled)?;
        Ok(model.backend().device().record_timed(Stream::Compute)?)
    }

    /// Reads the result of the oldest step that is enqueued.
    fn collect(&mut self) -> Result<()> {
        self.model.backend().collect_sample(&mut self.sampled)?;
        ensure!(self.sampled.iter().all(|row| row.logprob.is_finite()), "a step's log-probabilities are not finite");
        Ok(())
    }

    /// The medians of `samples` steps, `adapters(i)` being those of step i.
    ///
    /// # Errors
    /// A device failure.
    pub fn time<'a>(
        &mut self,
        size: Size,
        samples: usize,
        adapters: &mut dyn FnMut(usize) -> Vec<Option<&'a CudaAdapter<D>>>,
    ) -> Result<StepTiming>
    where
        D: 'a,
    {
        const WARM: usize = 3;
        let (mut ends, mut results): (Vec<D::Event>, Vec<Instant>) = Default::default();
        for i in 0..WARM + samples {
            let drawn = i > 0 && size.rows == 1;
            ends.push(self.enqueue(0, size, &adapters(i), drawn)?);
            if i > 0 {
                self.collect()?;
                results.push(Instant::now());
            }
        }
        self.collect()?;
        results.push(Instant::now());
        let milliseconds = |(from, to): (&D::Event, &D::Event)| self.model.backend().device().elapsed(from, to);
        let device: Result<Vec<f32>, _> = ends[WARM - 1..].iter().zip(&ends[WARM..]).map(milliseconds).collect();
        let mut device: Vec<f64> = device?.into_iter().map(f64::from).collect();
        let wall = results[WARM - 1..].windows(2).map(|two| (two[1] - two[0]).as_secs_f64() * 1e3);
        let mut wall: Vec<f64> = wall.collect();
        device.sort_by(f64::total_cmp);
        wall.sort_by(f64::total_cmp);
        let (best, worst) = (device[0], device[samples - 1]);
        Ok(StepTiming { milliseconds: device[samples / 2], best, worst, wall_ms: wall[samples / 2] })
    }

    /// Seconds that it takes to record the passes of all buckets, without adapters and with one, a replay of each included, and how
    /// many were recorded.
    ///
    /// # Errors
    /// A device failure.
    pub fn record_all(&mut self, adapter: &CudaAdapter<D>) -> Result<(f64, usize)> {
        let before = self.model.backend().recorded();
        // Passes are known by their tensors: of new ones none is recorded.
        self.act = self.model.activations(self.room.rows, self.room.logit_rows)?;
        let began = Instant::now();
        let rows_max = self.room.logit_rows;
        for bucket in BUCKETS.into_iter().filter(|bucket| *bucket <= rows_max) {
            for adapter in [None, Some(adapter)] {
                self.one_token_each(bucket, adapter)?;
            }
        }
        self.model.backend().device().synchronise()?;
        Ok((began.elapsed().as_secs_f64(), self.model.backend().recorded() - before))
    }

    /// A pass of `rows` sequences, each at its first token in a page of its own.
    fn one_token_each(&mut self, rows: usize, adapter: Option<&CudaAdapter<D>>) -> Result<()> {
        let tokens: Vec<u32> = (0..rows as u32).collect();
        let positions = vec![0; rows];
        let spans: Vec<_> = (0..rows).map(|row| SequenceRows { row, rows: 1, table: row, blocks: 1 }).collect();
        let step =
            StepRows { tokens: &tokens, drawn: &[], positions: &positions, sequences: &spans, block_tables: &tokens };
        let all = segments(&vec![adapter; rows]);
        let lora = LoraRows { segments: &all };
        Ok(self.model.forward(&mut self.act, &step, &lora, (&tokens, &lora), &mut self.pool)?)
    }
}
