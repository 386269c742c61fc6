//! Writes small GGUF files for the tests, valid ones and broken ones.

use openlora_kernels::BlockFormat;

/// A GGUF file in the making; every part can be made wrong.
#[derive(Clone)]
pub(crate) struct GgufBuilder {
    pub version: u32,
    pub keys: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<BuiltTensor>,
    /// Added to the number of tensors and of keys in the header.
    pub lie: (u64, u64),
}

/// A tensor of zeros, or of anything else in `bytes`.
#[derive(Clone)]
pub(crate) struct BuiltTensor {
    pub name: String,
    /// Fastest first, as the file has it.
    pub dims: Vec<u64>,
    pub ggml_type: u32,
    pub bytes: Vec<u8>,
    /// Instead of the next aligned offset.
    pub offset: Option<u64>,
}

impl GgufBuilder {
    /// A Llama of one layer: hidden 32, two heads of 16 over one key-value head, feed-forward 32, eight tokens.
    pub(crate) fn tiny_llama() -> Self {
        let mut file = Self { version: 3, keys: Vec::new(), tensors: Vec::new(), lie: (0, 0) };
        file.string("general.architecture", "llama");
        for (key, value) in [
            ("context_length", 64),
            ("embedding_length", 32),
            ("block_count", 1),
            ("feed_forward_length", 32),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("rope.dimension_count", 16),
        ] {
            file.u32(&format!("llama.{key}"), value);
        }
        file.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        file.u32("tokenizer.ggml.eos_token_id", 7);
        file.matrix("token_embd.weight", 8, 32);
        for (name, rows) in [("attn_q", 32), ("attn_k", 16), ("attn_v", 16), ("attn_output", 32), ("ffn_gate", 32)] {
            file.matrix(&format!("blk.0.{name}.weight"), rows, 32);
        }
        for name in ["ffn_up", "ffn_down"] {
            file.matrix(&format!("blk.0.{name}.weight"), 32, 32);
        }
        for name in ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"] {
            file.tensor(name, &[32], BlockFormat::F32);
        }
        file
    }

    pub(crate) fn key(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.keys.push((key.into(), [&kind.to_le_bytes(), value].concat()));
    }

    pub(crate) fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4, &value.to_le_bytes());
    }

    pub(crate) fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6, &value.to_le_bytes());
    }

    pub(crate) fn string(&mut self, key: &str, value: &str) {
        self.key(key, 8, &string(value));
    }

    /// Replaces a key's value.
    pub(crate) fn set(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.keys.retain(|(name, _)| name != key);
        self.key(key, kind, value);
    }

    pub(crate) fn matrix(&mut self, name: &str, rows: u64, cols: u64) {
        self.tensor(name, &[cols, rows], BlockFormat::F32);
    }

    /// A tensor of zeros.
    pub(crate) fn tensor(&mut self, name: &str, dims: &[u64], format: BlockFormat) {
        let ggml_type = match format {
            BlockFormat::F32 => 0,
            BlockFormat::F16 => 1,
            BlockFormat::Q4_0 => 2,
            BlockFormat::Q4_1 => 3,
            BlockFormat::Q5_0 => 6,
            BlockFormat::Q5_1 => 7,
            BlockFormat::Q8_0 => 8,
            BlockFormat::Q4K => 12,
            BlockFormat::Q6K => 14,
            BlockFormat::Bf16 => 30,
        };
        let elements = dims.iter().product::<u64>() as usize;
        let bytes = vec![0; elements / format.block_elements() * format.block_bytes()];
        self.tensors.push(BuiltTensor { name: name.into(), dims: dims.to_vec(), ggml_type, bytes, offset: None });
    }

    /// The tensor of that name.
    pub(crate) fn named(&mut self, name: &str) -> &mut BuiltTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("the tensor was added")
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).wrapping_add(self.lie.0).to_le_bytes());
        out.extend((self.keys.len() as u64).wrapping_add(self.lie.1).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend(string(key));
            out.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.ggml_type.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

/// Length and bytes.
pub(crate) fn string(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}
