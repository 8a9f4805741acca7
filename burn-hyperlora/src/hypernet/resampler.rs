//! Resampler (perceiver): learned queries attend to one or two condition sequences and yield a fixed number of tokens.

use burn::module::{Module, Param};
use burn::nn::{LayerNorm, Linear};
use burn::tensor::Tensor;
use burn::tensor::activation::gelu;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;

use super::config::ResamplerConfig;
use super::init::Init;

/// Sizes of a resampler besides its own config.
pub(super) struct ResamplerPorts {
    /// Width of the condition tokens.
    pub(super) input: usize,
    /// The resampler attends to a second condition.
    pub(super) second_condition: bool,
    /// Number of output tokens.
    pub(super) queries: usize,
    /// Width of the output tokens.
    pub(super) output: usize,
}

/// Learned latents that gather information from the conditions, layer by layer.
#[derive(Module, Debug)]
pub(super) struct Resampler {
    latents: Param<Tensor<3>>, // [1, Q, dim]
    proj_in: Linear,
    proj_in_2: Option<Linear>,
    layers: Vec<ResamplerLayer>,
    proj_out: Linear,
}

impl Resampler {
    pub(super) fn new(init: &Init, config: &ResamplerConfig, ports: &ResamplerPorts) -> Self {
        let dim = config.dim;
        Self {
            // Unit length per query; the layers normalise before reading it.
            latents: init.normal("latents", [1, ports.queries, dim], (dim as f64).sqrt().recip()),
            proj_in: init.linear("proj_in", ports.input, dim, true),
            proj_in_2: ports.second_condition.then(|| init.linear("proj_in_2", ports.input, dim, true)),
            layers: (0..config.depth)
                .map(|l| ResamplerLayer::new(&init.at("layers").at(l), config, ports.second_condition))
                .collect(),
            proj_out: init.linear("proj_out", dim, ports.output, true),
        }
    }

    /// Resamples the conditions `x` and `y`. `None` switches a condition off with all layers that read it.
    ///
    /// A resampler without a second condition ignores `y`.
    ///
    /// # Shapes
    /// `x: [B, Nx, input]`, `y: [B, Ny, input]` to `[B, Q, output]`.
    pub(super) fn forward(&self, x: Option<Tensor<3>>, y: Option<Tensor<3>>) -> Tensor<3> {
        // 1. Project the conditions to the latents' width.
        let x = x.map(|x| self.proj_in.forward(x)); // [B, Nx, dim]
        let y = self.proj_in_2.as_ref().zip(y).map(|(proj, y)| proj.forward(y)); // [B, Ny, dim]
        let batch = [&x, &y].into_iter().flatten().map(|condition| condition.dims()[0]).next().unwrap_or(1);

        // 2. Update the same queries for every sample, layer by layer.
        let latents = self.latents.val().repeat_dim(0, batch); // [B, Q, dim]
        let latents = self.layers.iter().fold(latents, |latents, layer| layer.forward(latents, x.as_ref(), y.as_ref()));

        // 3. Project to coefficients.
        self.proj_out.forward(latents)
    }
}

/// `latents += attn1(latents); += attn2(x); += attn3(y); += ff`, each after its own norms.
#[derive(Module, Debug)]
struct ResamplerLayer {
    norm_attn1: LayerNorm,
    attn1: Attention,
    norm_attn2_l: LayerNorm,
    norm_attn2_x: LayerNorm,
    attn2: Attention,
    norm_attn3_l: Option<LayerNorm>,
    norm_attn3_y: Option<LayerNorm>,
    attn3: Option<Attention>,
    norm_ff: LayerNorm,
    ff: FeedForward,
}

impl ResamplerLayer {
    fn new(init: &Init, config: &ResamplerConfig, second_condition: bool) -> Self {
        let norm = || init.layer_norm(config.dim);
        Self {
            norm_attn1: norm(),
            attn1: Attention::new(&init.at("attn1"), config),
            norm_attn2_l: norm(),
            norm_attn2_x: norm(),
            attn2: Attention::new(&init.at("attn2"), config),
            norm_attn3_l: second_condition.then(norm),
            norm_attn3_y: second_condition.then(norm),
            attn3: second_condition.then(|| Attention::new(&init.at("attn3"), config)),
            norm_ff: norm(),
            ff: FeedForward::new(&init.at("ff"), config),
        }
    }

    fn forward(&self, latents: Tensor<3>, x: Option<&Tensor<3>>, y: Option<&Tensor<3>>) -> Tensor<3> {
        let mut latents = latents; // [B, Q, dim]

        let own = self.norm_attn1.forward(latents.clone());
        latents = latents + self.attn1.forward(own.clone(), own);

        if let Some(x) = x {
            let (queries, context) = (self.norm_attn2_l.forward(latents.clone()), self.norm_attn2_x.forward(x.clone()));
            latents = latents + self.attn2.forward(queries, context);
        }
        if let (Some(norm_l), Some(norm_y), Some(attn3), Some(y)) =
            (&self.norm_attn3_l, &self.norm_attn3_y, &self.attn3, y)
        {
            let (queries, context) = (norm_l.forward(latents.clone()), norm_y.forward(y.clone()));
            latents = latents + attn3.forward(queries, context);
        }

        let normed = self.norm_ff.forward(latents.clone());
        latents + self.ff.forward(normed)
    }
}

/// Multi-head attention without biases.
#[derive(Module, Debug)]
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn new(init: &Init, config: &ResamplerConfig) -> Self {
        let inner = config.heads * config.head_dim;
        let inward = |name| init.linear(name, config.dim, inner, false);
        Self {
            to_q: inward("to_q"),
            to_k: inward("to_k"),
            to_v: inward("to_v"),
            to_out: init.linear("to_out.0", inner, config.dim, false),
            heads: config.heads,
        }
    }

    /// Maps `queries: [B, Q, dim]` and `context: [B, N, dim]` to `[B, Q, dim]`.
    fn forward(&self, queries: Tensor<3>, context: Tensor<3>) -> Tensor<3> {
        let [batch, count, _] = queries.dims();
        let q = self.split_heads(self.to_q.forward(queries)); // [B, H, Q, head]
        let k = self.split_heads(self.to_k.forward(context.clone())); // [B, H, N, head]
        let v = self.split_heads(self.to_v.forward(context)); // [B, H, N, head]
        let mixed = attention(q, k, v, None, None, AttentionModuleOptions::default()); // [B, H, Q, head]
        let inner = self.heads * mixed.dims()[3];
        self.to_out.forward(mixed.swap_dims(1, 2).reshape([batch, count, inner]))
    }

    /// Maps `[B, N, H * head]` to `[B, H, N, head]`.
    fn split_heads(&self, tokens: Tensor<3>) -> Tensor<4> {
        let [batch, count, inner] = tokens.dims();
        tokens.reshape([batch, count, self.heads, inner / self.heads]).swap_dims(1, 2)
    }
}

/// `Linear -> GELU (exact) -> Linear`.
#[derive(Module, Debug)]
struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    fn new(init: &Init, config: &ResamplerConfig) -> Self {
        let middle = config.dim * config.ff_mult;
        Self {
            proj: init.linear("net.0.proj", config.dim, middle, true),
            out: init.linear("net.2", middle, config.dim, true),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.out.forward(gelu(self.proj.forward(x)))
    }
}
