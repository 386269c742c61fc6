use std::fmt;

use serde::Serialize;

/// The linears of a decoder layer that an adapter may target, plus the two outside the layers. Names are Hugging
/// Face's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Module {
    /// `self_attn.q_proj`
    Q,
    /// `self_attn.k_proj`
    K,
    /// `self_attn.v_proj`
    V,
    /// `self_attn.o_proj`
    O,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
    /// `model.embed_tokens`; `layer` is 0
    Embed,
    /// `lm_head`; `layer` is 0
    LmHead,
}

impl Module {
    /// The seven linears of a layer, in the order of their site index.
    pub const IN_LAYER: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];
}

/// One adapted linear of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Site {
    /// Decoder layer, from 0.
    pub layer: u32,
    /// Which linear.
    pub module: Module,
}

impl Site {
    /// A dense index: layers first (seven per layer), then `embed_tokens`, then `lm_head`.
    #[must_use]
    pub fn index(self, layers: usize) -> usize {
        match self.module {
            Module::Embed => layers * 7,
            Module::LmHead => layers * 7 + 1,
            module => self.layer as usize * 7 + module as usize,
        }
    }

    /// How many indices a model of `layers` layers has.
    #[must_use]
    pub fn count(layers: usize) -> usize {
        layers * 7 + 2
    }
}

/// The module's full name in a Hugging Face causal LM, such as `model.layers.3.self_attn.q_proj`.
impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.module {
            Module::Q => "self_attn.q_proj",
            Module::K => "self_attn.k_proj",
            Module::V => "self_attn.v_proj",
            Module::O => "self_attn.o_proj",
            Module::Gate => "mlp.gate_proj",
            Module::Up => "mlp.up_proj",
            Module::Down => "mlp.down_proj",
            Module::Embed => return f.write_str("model.embed_tokens"),
            Module::LmHead => return f.write_str("lm_head"),
        };
        write!(f, "model.layers.{}.{name}", self.layer)
    }
}

/// What an adapter must fit: the base model's sizes, in elements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelShape {
    /// The name the base model is served under; no alias may equal it.
    pub name: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Rows of the embedding table and outputs of the head.
    pub vocab: usize,
    /// Whether the output head is the embedding table.
    pub tied_head: bool,
    /// Longest sequence the model was trained for.
    pub context: usize,
}

impl ModelShape {
    /// `(inputs, outputs)` of a module. `Embed` takes a token and counts as `(vocab, hidden)`.
    #[must_use]
    pub fn dims(&self, module: Module) -> (usize, usize) {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match module {
            Module::Q => (self.hidden, q),
            Module::K | Module::V => (self.hidden, kv),
            Module::O => (q, self.hidden),
            Module::Gate | Module::Up => (self.hidden, self.intermediate),
            Module::Down => (self.intermediate, self.hidden),
            Module::Embed => (self.vocab, self.hidden),
            Module::LmHead => (self.hidden, self.vocab),
        }
    }

    /// Every site of the model: layer by layer, then `embed_tokens` and `lm_head`.
    pub fn sites(&self) -> impl Iterator<Item = Site> + use<> {
        let layer_sites =
            (0..self.layers as u32).flat_map(|layer| Module::IN_LAYER.map(|module| Site { layer, module }));
        layer_sites.chain([Module::Embed, Module::LmHead].map(|module| Site { layer: 0, module }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn site_indices_are_dense_and_in_order() {
        let shape = ModelShape {
            name: "m".into(),
            hidden: 8,
            intermediate: 16,
            layers: 3,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            vocab: 10,
            tied_head: true,
            context: 32,
        };
        let indices: Vec<_> = shape.sites().map(|site| site.index(shape.layers)).collect();
        assert_eq!(indices, (0..Site::count(shape.layers)).collect::<Vec<_>>());
    }
}
