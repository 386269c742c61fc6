//! The operations that work row by row: RMSNorm, SwiGLU, embedding.

use std::sync::Arc;

use half::f16;
use openlora_kernels::cpu::embed::{CpuEmbedding, embed};
use openlora_kernels::cpu::lora::LoraScratch;
use openlora_kernels::cpu::norm::add_rms_norm;
use openlora_kernels::cpu::swiglu::swiglu;
use openlora_kernels::cpu::{CpuTensor, Isa, Pool};
use openlora_kernels::{BlockFormat, KernelError, LoraRows, TensorSource, reference};

use crate::{assert_close, bits, machines, poisoned, random, rng};

const ROWS: [usize; 3] = [1, 7, 133];
const WIDTHS: [usize; 5] = [1, 16, 49, 100, 576];

#[test]
fn rms_norm_matches_its_reference_at_every_width() {
    let mut rng = rng(1);
    for (rows, width) in ROWS.into_iter().flat_map(|rows| WIDTHS.map(|width| (rows, width))) {
        let (x, delta) = (random(&mut rng, rows * width, 3.0), random(&mut rng, rows * width, 3.0));
        let weight = random(&mut rng, width, 2.0);
        for delta in [None, Some(&delta)] {
            let (mut sums, mut expected) = (x.clone(), vec![0.0; x.len()]);
            reference::norm::add_rms_norm(&mut sums, delta.map(Vec::as_slice), &weight, 1e-5, &mut expected);
            for (isa, pool) in machines() {
                let mut residual = CpuTensor::from_values(&x, width).expect("memory");
                let delta = delta.map(|delta| CpuTensor::from_values(delta, width).expect("memory"));
                let mut out = poisoned(rows, width);
                add_rms_norm(&pool, isa, &mut residual, delta.as_ref(), &weight, 1e-5, &mut out);
                assert_eq!(bits(residual.values()), bits(&sums), "the residual is a plain sum");
                assert_close(out.values(), &expected, 2e-6, &format!("{} {rows} x {width}", isa.name()));
            }
        }
    }
}

#[test]
fn swiglu_matches_its_reference_at_every_width() {
    let mut rng = rng(2);
    for (rows, width) in ROWS.into_iter().flat_map(|rows| WIDTHS.map(|width| (rows, width))) {
        let mut gate_up = random(&mut rng, rows * 2 * width, 20.0);
        gate_up[0] = -200.0;
        let mut expected = vec![0.0; rows * width];
        reference::swiglu::swiglu(&gate_up, width, &mut expected);
        for (isa, pool) in machines() {
            let gate_up = CpuTensor::from_values(&gate_up, 2 * width).expect("memory");
            let mut out = poisoned(rows, width);
            swiglu(&pool, isa, &gate_up, &mut out);
            assert_close(out.values(), &expected, 1e-6, &format!("{} {rows} x {width}", isa.name()));
        }
    }
}

#[test]
fn a_row_of_norm_and_swiglu_does_not_depend_on_its_neighbours() {
    let (rows, width) = (40, 117);
    let x = random(&mut rng(3), rows * 2 * width, 4.0);
    for &isa in Isa::available() {
        let run = |x: &[f32], threads: usize| {
            let pool = Pool::new(threads).expect("threads");
            let rows = x.len() / (2 * width);
            let mut both = CpuTensor::from_values(x, 2 * width).expect("memory");
            let (mut gated, mut normed) = (poisoned(rows, width), poisoned(rows, 2 * width));
            swiglu(&pool, isa, &both, &mut gated);
            add_rms_norm(&pool, isa, &mut both, None, &vec![0.7; 2 * width], 1e-6, &mut normed);
            (bits(gated.values()), bits(normed.values()))
        };
        let together = run(&x, 1);
        assert_eq!((&run(&x, 2), &run(&x, 3)), (&together, &together));
        for row in 0..rows {
            let alone = run(&x[row * 2 * width..(row + 1) * 2 * width], 2);
            assert_eq!(alone.0, together.0[row * width..(row + 1) * width]);
            assert_eq!(alone.1, together.1[row * 2 * width..(row + 1) * 2 * width]);
        }
    }
}

struct Table {
    values: Vec<f32>,
    owner: Arc<Vec<u8>>,
    offset: usize,
    hidden: usize,
}

impl Table {
    /// A table in f16, somewhere in a larger file.
    fn new(vocab: usize, hidden: usize) -> Self {
        let halves: Vec<f16> = random(&mut rng(4), vocab * hidden, 2.0).into_iter().map(f16::from_f32).collect();
        let mut bytes = vec![0xff; 77];
        let offset = bytes.len();
        bytes.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
        bytes.extend([0xff; 5]);
        let values = halves.iter().map(|half| half.to_f32()).collect();
        Self { values, owner: Arc::new(bytes), offset, hidden }
    }

    fn load(&self, offset: usize, row_order: Option<&[u32]>) -> Result<CpuEmbedding, KernelError> {
        let len = self.values.len() * 2;
        let source = TensorSource {
            name: "token_embd.weight",
            format: BlockFormat::F16,
            rows: self.values.len() / self.hidden,
            cols: self.hidden,
            bytes: &self.owner[self.offset..self.offset + len],
            row_order,
        };
        CpuEmbedding::new(&source, self.owner.clone(), offset)
    }
}

#[test]
fn embedding_reads_the_rows_of_the_file() {
    let (vocab, hidden) = (50, 36);
    let table = Table::new(vocab, hidden);
    let order: Vec<u32> = (0..vocab as u32).rev().collect();
    for row_order in [None, Some(order.as_slice())] {
        let embedding = table.load(table.offset, row_order).expect("a good table");
        for rows in ROWS {
            let tokens: Vec<u32> = (0..rows as u32).map(|i| i * 7 % vocab as u32).collect();
            let file_rows: Vec<u32> = tokens.iter().map(|t| row_order.map_or(*t, |order| order[*t as usize])).collect();
            let mut expected = vec![0.0; rows * hidden];
            reference::embed::embed(&table.values, hidden, &file_rows, &mut expected);
            for (isa, pool) in machines() {
                let mut out = poisoned(rows, hidden);
                let none = LoraRows { segments: &[] };
                embed(&pool, isa, &embedding, &tokens, none, &mut out, &mut LoraScratch::default());
                assert_eq!(out.values(), expected);
            }
        }
    }
}

#[test]
fn a_table_that_its_file_does_not_hold_is_refused() {
    let table = Table::new(50, 36);
    for offset in [table.offset + 6, usize::MAX] {
        let error = table.load(offset, None).expect_err("past the end");
        assert!(matches!(error, KernelError::TensorSize { .. }), "{error}");
    }
}
