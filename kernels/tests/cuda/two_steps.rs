//! Two steps on the device at once: samplings that are not collected before the next is enqueued, and tokens that a step takes from them.

use std::sync::Arc;

use openlora_kernels::cuda::Cuda;
use openlora_kernels::cuda::device::Element;
use openlora_kernels::cuda::emulated::{Emulated, Fault};
use openlora_kernels::cuda::pages::CudaPages;
use openlora_kernels::cuda::tensor::CudaTensor;
use openlora_kernels::{
    AttentionSpec, Backend, BlockFormat, DrawnToken, ForwardScope, KernelError, LoraRows, Numbers, SampleRow,
    SampledRow, StepRows, TensorSource,
};
use openlora_types::{SamplingParams, Token};

use crate::support::{emulated, sanitised};

const VOCAB: usize = 500;

fn backend() -> Cuda<Emulated> {
    Cuda::new(emulated(), Element::F32).expect("memory")
}

/// One number for each place, all different in a row.
fn logits(backend: &Cuda<Emulated>, rows: usize, seed: usize) -> CudaTensor<Emulated> {
    let values: Vec<f32> =
        (0..rows * VOCAB).map(|i| (i % VOCAB * 7 + i / VOCAB * 83 + seed * 31) as f32 % 499.0 / 60.0).collect();
    CudaTensor::holding(backend.device(), Element::F32, &values, VOCAB).expect("memory")
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

#[test]
fn two_samplings_in_flight_give_what_one_after_the_other_gives() {
    sanitised(|| {
        let penalised = SamplingParams {
            repetition_penalty: 1.3,
            frequency_penalty: 0.4,
            logit_bias: vec![(5, 1.0), (9, -2.0)],
            ..SamplingParams::default()
        };
        let history: Vec<Token> = (0..VOCAB as Token).collect();
        // Alternatives, and changes of logits that grow. The fourth needs more room than there is, and the sampler is made anew.
        let draw = |i: usize, top: usize| SampleRow::Draw {
            params: &penalised,
            sample_index: i as u32,
            prompt: &history[..i * 40 % VOCAB],
            generated: &history[i..2 * i],
            banned: &[3],
            top,
        };
        let rows = |count: usize, top: usize| -> Vec<_> {
            (0..count).map(|i| if i % 3 == 2 { SampleRow::Score { token: 7, top: 1 } } else { draw(i, top) }).collect()
        };
        let samplings = [rows(3, 0), rows(5, 2), rows(1, 20), rows(9, 40), rows(0, 0), rows(4, 3)];
        let alone = samplings.iter().enumerate().map(|(i, rows)| {
            let (backend, mut out) = (backend(), Vec::new());
            backend.sample(&mut logits(&backend, rows.len(), i), rows, &mut out).expect("a sound device");
            out
        });
        let alone: Vec<Vec<SampledRow>> = alone.collect();
        let backend = backend();
        let mut out = Vec::new();
        for (i, rows) in samplings.iter().enumerate() {
            let mut logits = logits(&backend, rows.len(), i);
            backend.enqueue_sample(&mut logits, rows, &mut Vec::new()).expect("a sound device");
            if i > 0 {
                backend.collect_sample(&mut out).expect("a sound device");
                assert_eq!(out, alone[i - 1], "sampling {}", i - 1);
            }
        }
        backend.collect_sample(&mut out).expect("a sound device");
        assert_eq!(&out, alone.last().expect("some"));
    });
}

fn enqueue(backend: &Cuda<Emulated>) {
    let row = SampleRow::Score { token: 7, top: 1 };
    backend.enqueue_sample(&mut logits(backend, 1, 0), &[row], &mut Vec::new()).expect("a sound device");
}

#[test]
#[should_panic(expected = "2 samplings are enqueued and not collected: collect one first")]
fn a_third_sampling_in_flight_is_refused() {
    let backend = backend();
    (0..3).for_each(|_| enqueue(&backend));
}

#[test]
#[should_panic(expected = "another sampling is enqueued and not collected: collect it first")]
fn a_sampling_that_is_waited_for_at_once_is_the_only_one() {
    let backend = backend();
    enqueue(&backend);
    let row = SampleRow::Score { token: 7, top: 1 };
    let _ = backend.sample(&mut logits(&backend, 1, 0), &[row], &mut Vec::new());
}

#[test]
#[should_panic(expected = "a sampling is enqueued and not collected")]
fn a_sampling_is_collected_once() {
    let backend = backend();
    enqueue(&backend);
    backend.collect_sample(&mut Vec::new()).expect("a sound device");
    let _ = backend.collect_sample(&mut Vec::new());
}

#[test]
fn a_device_that_is_lost_before_a_sampling_is_collected_says_so() {
    let backend = backend();
    enqueue(&backend);
    backend.device().break_after(0, Fault::Lost);
    let error = backend.collect_sample(&mut Vec::new()).expect_err("lost");
    assert!(matches!(error, KernelError::Device { .. }) && error.to_string().contains("lost"), "{error}");
}

/// An embedding table whose rows are their own number, and a pool for passes.
struct Passes {
    backend: Cuda<Emulated>,
    table: <Cuda<Emulated> as Backend>::Embedding,
    pages: CudaPages<Emulated>,
}

impl Passes {
    fn new() -> Self {
        let backend = backend();
        let values: Vec<f32> = (0..VOCAB).flat_map(|token| [token as f32; 4]).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let source = TensorSource {
            name: "table",
            format: BlockFormat::F32,
            rows: VOCAB,
            cols: 4,
            bytes: &bytes,
            row_order: None,
        };
        let table = backend.load_embedding(&source, Arc::new(Vec::new()), 0).expect("memory");
        let spec = AttentionSpec { heads: 1, kv_heads: 1, head_dim: 16, block_size: 16, scale: 0.25, norm_eps: 1e-6 };
        let pages = backend.new_pages(&spec, 1, 4).expect("memory");
        Self { backend, table, pages }
    }

    /// Enqueues greedy draws of these tokens.
    fn draw(&self, tokens: &[Token]) {
        let values: Vec<f32> =
            tokens.iter().flat_map(|best| (0..VOCAB).map(|token| f32::from(token == *best as usize))).collect();
        let mut logits = CudaTensor::holding(self.backend.device(), Element::F32, &values, VOCAB).expect("memory");
        let params = greedy();
        let draw =
            SampleRow::Draw { params: &params, sample_index: 0, prompt: &[], generated: &[], banned: &[], top: 0 };
        let draws = vec![draw; tokens.len()];
        self.backend.enqueue_sample(&mut logits, &draws, &mut Vec::new()).expect("a sound device");
    }

    fn collect(&self) -> Vec<Token> {
        let mut out = Vec::new();
        self.backend.collect_sample(&mut out).expect("a sound device");
        out.iter().map(|row| row.token).collect()
    }

    /// The tokens that a pass sees. It has rows and no sequences, as what an embedding alone writes.
    fn pass(&mut self, tokens: &[Token], drawn: &[(u32, u32)]) -> Vec<f32> {
        let drawn: Vec<_> = drawn.iter().map(|(row, sample)| DrawnToken { row: *row, sample: *sample }).collect();
        let positions = vec![0; tokens.len()];
        let (lora, rows_max) = (LoraRows { segments: &[] }, 8);
        let rows = StepRows { tokens, drawn: &drawn, positions: &positions, sequences: &[], block_tables: &[] };
        let scope = ForwardScope { tensors: 1, rows: &rows, lora: &lora, rows_max, all_wanted: true };
        let mut out = self.backend.new_tensor(Numbers::F32, rows_max, 4).expect("memory");
        let Self { backend, table, pages } = self;
        backend.forward(&scope, pages, &mut |_| backend.embed(table, tokens, &lora, &mut out)).expect("it fits");
        backend.read_tensor(&out).chunks(4).map(|row| row[0]).collect()
    }
}

#[test]
fn a_pass_takes_tokens_from_the_sampling_enqueued_last() {
    sanitised(|| {
        let mut passes = Passes::new();
        passes.draw(&[11, 12, 13]);
        // Before it is collected, each row any number of times.
        assert_eq!(passes.pass(&[0, 40, 0, 0], &[(0, 2), (2, 0), (3, 2)]), [13.0, 40.0, 11.0, 13.0]);
        passes.draw(&[21, 22]);
        assert_eq!(passes.pass(&[50, 0], &[(1, 1)]), [50.0, 22.0]);
        assert_eq!(passes.collect(), [11, 12, 13]);
        assert_eq!(passes.pass(&[0], &[(0, 0)]), [21.0]);
        assert_eq!(passes.collect(), [21, 22]);
        // Also once it is.
        assert_eq!(passes.pass(&[0, 0], &[(1, 1)]), [0.0, 22.0]);
        // What the host wrote of that step is not what is there: neither a pass nor an operation alone takes it for that.
        let embedded = |passes: &Passes| {
            let mut out = passes.backend.new_tensor(Numbers::F32, 8, 4).expect("memory");
            passes.backend.embed(&passes.table, &[0, 0], &LoraRows { segments: &[] }, &mut out).expect("it fits");
            passes.backend.read_tensor(&out)
        };
        assert_eq!(embedded(&passes), [0.0; 8]);
        assert_eq!(passes.pass(&[0, 0], &[]), [0.0; 2]);
    });
}

#[test]
#[should_panic(expected = "a sampling was enqueued, whose tokens are taken")]
fn tokens_of_no_sampling_are_refused() {
    Passes::new().pass(&[0], &[(0, 0)]);
}

#[test]
#[should_panic(expected = "Some(DrawnToken { row: 1, sample: 2 }) of a sampling of 2 rows")]
fn a_row_that_the_sampling_does_not_have_is_refused() {
    let mut passes = Passes::new();
    passes.draw(&[1, 2, 3]);
    passes.draw(&[1, 2]);
    passes.pass(&[0, 0], &[(0, 1), (1, 2)]);
}
