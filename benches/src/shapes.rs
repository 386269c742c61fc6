//! Models of well-known shapes with random weights, as GGUF files: what a kernel costs does not depend on the numbers, and
//! nothing should be tuned to one model.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use half::f16;
use openlora_types::ModelShape;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// Sizes of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// As on the command line.
    pub name: &'static str,
    architecture: &'static str,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    intermediate: usize,
    vocab: usize,
    context: usize,
    qkv_bias: bool,
    tied_head: bool,
}

/// Two layers of everything, for checks: heads that tensor cores take, grouped queries, a bias.
pub const SMALL: Shape = Shape {
    name: "small",
    architecture: "qwen2",
    layers: 2,
    hidden: 256,
    heads: 4,
    kv_heads: 2,
    head_dim: 64,
    intermediate: 512,
    vocab: 512,
    context: 2_048,
    qkv_bias: true,
    tied_head: false,
};

/// The shapes, from the models' `config.json`.
pub const SHAPES: [Shape; 5] = [
    Shape {
        name: "smollm2-135m",
        architecture: "llama",
        layers: 30,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        intermediate: 1_536,
        vocab: 49_152,
        context: 8_192,
        qkv_bias: false,
        tied_head: true,
    },
    Shape {
        name: "qwen2.5-0.5b",
        architecture: "qwen2",
        layers: 24,
        hidden: 896,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        intermediate: 4_864,
        vocab: 151_936,
        context: 32_768,
        qkv_bias: true,
        tied_head: true,
    },
    Shape {
        name: "llama-3.2-1b",
        architecture: "llama",
        layers: 16,
        hidden: 2_048,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        intermediate: 8_192,
        vocab: 128_256,
        context: 131_072,
        qkv_bias: false,
        tied_head: true,
    },
    Shape {
        name: "llama-3.1-8b",
        architecture: "llama",
        layers: 32,
        hidden: 4_096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        intermediate: 14_336,
        vocab: 128_256,
        context: 131_072,
        qkv_bias: false,
        tied_head: false,
    },
    Shape {
        name: "qwen2.5-7b",
        architecture: "qwen2",
        layers: 28,
        hidden: 3_584,
        heads: 28,
        kv_heads: 4,
        head_dim: 128,
        intermediate: 18_944,
        vocab: 152_064,
        context: 32_768,
        qkv_bias: true,
        tied_head: false,
    },
];

/// A tensor's format: ggml's number, elements and bytes of a block.
#[derive(Clone, Copy)]
enum Format {
    F32,
    Q4_1,
    Q8_0,
}

impl Format {
    fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
        }
    }

    fn bytes(self, elements: usize) -> usize {
        match self {
            Self::F32 => elements * 4,
            Self::Q4_1 => elements / 32 * 20,
            Self::Q8_0 => elements / 32 * 34,
        }
    }
}

struct Tensor {
    name: String,
    inputs: usize,
    outputs: usize,
    format: Format,
}

impl Shape {
    /// The shape of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> Result<Self> {
        let known = SHAPES.map(|shape| shape.name).join(", ");
        SHAPES.into_iter().find(|shape| shape.name == name).with_context(|| format!("shape {name}: known are {known}"))
    }

    /// As a model's.
    #[must_use]
    pub fn sizes(&self) -> ModelShape {
        let Self { name, layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, context, tied_head, .. } =
            *self;
        let name = name.to_owned();
        ModelShape { name, hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied_head, context }
    }

    fn tensors(&self) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        let mut add = |name: String, inputs, outputs, format| tensors.push(Tensor { name, inputs, outputs, format });
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        add("token_embd.weight".into(), self.hidden, self.vocab, Format::Q8_0);
        for layer in 0..self.layers {
            for (name, inputs, outputs) in [
                ("attn_q", self.hidden, q),
                ("attn_k", self.hidden, kv),
                ("attn_v", self.hidden, kv),
                ("attn_output", q, self.hidden),
                ("ffn_gate", self.hidden, self.intermediate),
                ("ffn_up", self.hidden, self.intermediate),
                ("ffn_down", self.intermediate, self.hidden),
            ] {
                add(format!("blk.{layer}.{name}.weight"), inputs, outputs, Format::Q4_1);
            }
            for (name, outputs) in [("attn_q", q), ("attn_k", kv), ("attn_v", kv)] {
                if self.qkv_bias {
                    add(format!("blk.{layer}.{name}.bias"), outputs, 1, Format::F32);
                }
            }
            for name in ["attn_norm", "ffn_norm"] {
                add(format!("blk.{layer}.{name}.weight"), self.hidden, 1, Format::F32);
            }
        }
        add("output_norm.weight".into(), self.hidden, 1, Format::F32);
        if !self.tied_head {
            add("output.weight".into(), self.hidden, self.vocab, Format::Q8_0);
        }
        tensors
    }

    /// Writes the model: linears Q4_1, embedding table Q8_0, norms of ones; the same bytes every time.
    ///
    /// # Errors
    /// Writing fails.
    pub fn write(&self, path: &Path) -> Result<()> {
        let tensors = self.tensors();
        let mut file = BufWriter::new(std::fs::File::create(path)?);
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let key = |name: &str, kind: u32, value: &[u8]| [&text(name), &kind.to_le_bytes()[..], value].concat();
        let mut keys = vec![key("general.architecture", 8, &text(self.architecture))];
        for (name, value) in [
            ("context_length", self.context),
            ("embedding_length", self.hidden),
            ("block_count", self.layers),
            ("feed_forward_length", self.intermediate),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
        ] {
            keys.push(key(&format!("{}.{name}", self.architecture), 4, &(value as u32).to_le_bytes()));
        }
        let epsilon = format!("{}.attention.layer_norm_rms_epsilon", self.architecture);
        keys.push(key(&epsilon, 6, &1e-5_f32.to_le_bytes()));
        keys.push(key("tokenizer.ggml.eos_token_id", 4, &0_u32.to_le_bytes()));
        let mut header = b"GGUF".to_vec();
        header.extend(3_u32.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((keys.len() as u64).to_le_bytes());
        header.extend(keys.concat());
        let mut offset = 0_usize;
        for Tensor { name, inputs, outputs, format } in &tensors {
            header.extend(text(name));
            let dims: &[usize] = if *outputs == 1 { &[*inputs] } else { &[*inputs, *outputs] };
            header.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| header.extend((*dim as u64).to_le_bytes()));
            header.extend(format.number().to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            offset += format.bytes(inputs * outputs).next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        file.write_all(&header)?;
        let mut rng = StdRng::seed_from_u64(self.hidden as u64);
        for tensor in &tensors {
            let bytes = tensor.random(&mut rng);
            file.write_all(&bytes)?;
            file.write_all(&vec![0; bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()])?;
        }
        Ok(file.flush()?)
    }
}

/// GGUF's default.
const ALIGNMENT: usize = 32;

impl Tensor {
    /// Numbers with a variance of about 1 / inputs, so that activations stay in range.
    fn random(&self, rng: &mut StdRng) -> Vec<u8> {
        let elements = self.inputs * self.outputs;
        let mut bytes = vec![0; self.format.bytes(elements)];
        rng.fill_bytes(&mut bytes);
        let deviation = (self.inputs as f32).sqrt().recip();
        let put = |to: &mut [u8], value: f32| to.copy_from_slice(&f16::from_f32(value).to_le_bytes());
        match self.format {
            Format::F32 => {
                let bias = self.name.ends_with("bias");
                for number in bytes.chunks_exact_mut(4) {
                    let value: f32 = if bias { rng.random_range(-0.1..0.1) } else { 1.0 };
                    number.copy_from_slice(&value.to_le_bytes());
                }
            }
            // Codes 0..=15 are uniform: a deviation of 4.6 around 7.5.
            Format::Q4_1 => bytes.chunks_exact_mut(20).for_each(|block| {
                let d = deviation / 4.6 * rng.random_range(0.8..1.2);
                put(&mut block[..2], d);
                put(&mut block[2..4], -7.5 * d);
            }),
            // Codes -128..=127: a deviation of 74.
            Format::Q8_0 => bytes.chunks_exact_mut(34).for_each(|block| put(&mut block[..2], deviation / 74.0)),
        }
        bytes
    }
}
