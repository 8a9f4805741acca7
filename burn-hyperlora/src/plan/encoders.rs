//! Cost of the frozen encoders: autoencoder, text encoders, image encoder.

use hyperlora_sdxl::models::clip_encoder::ClipEncoderConfig;
use hyperlora_sdxl::models::clip_text::ClipTextConfig;
use hyperlora_sdxl::models::clip_vision::ClipVisionConfig;
use hyperlora_sdxl::models::vae::AutoencoderKlConfig;
use hyperlora_sdxl::tokenizer::PROMPT_TOKENS;

/// Cost of a frozen encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Encoder {
    /// Number of parameters in memory.
    pub(super) held: u64,
    /// Number of parameters in the file that are not read: those after the penultimate layer.
    pub(super) left_out: u64,
    /// Operations per image or prompt.
    pub(super) flops: u128,
}

fn wide(size: usize) -> u128 {
    size as u128
}

fn narrow(count: u128) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

/// Number of parameters of one CLIP transformer layer.
fn clip_layer(config: &ClipEncoderConfig) -> u128 {
    let (width, inner) = (wide(config.hidden_size), wide(config.intermediate_size));
    let (norms, attention) = (2 * 2 * width, 4 * (width * width + width));
    norms + attention + width * inner + inner + inner * width + width
}

/// Operations of one layer on `tokens`. A causal mask hides scores but does not save their computation.
fn clip_layer_flops(config: &ClipEncoderConfig, tokens: u128) -> u128 {
    let (width, inner) = (wide(config.hidden_size), wide(config.intermediate_size));
    2 * tokens * (4 * width * width + 2 * width * inner) + 4 * tokens * tokens * width
}

/// Cost of a text encoder on one prompt. `projected` marks the second one, whose pooled output needs every layer.
pub(super) fn text(config: &ClipTextConfig, projected: bool) -> Encoder {
    let (width, layers) = (wide(config.encoder.hidden_size), wide(config.encoder.num_hidden_layers));
    let embeddings = (wide(config.vocab_size) + wide(config.max_position_embeddings)) * width;
    let layer = clip_layer(&config.encoder);
    let final_norm = 2 * width;
    let projection = width * wide(config.projection_dim);
    let per_layer = clip_layer_flops(&config.encoder, wide(PROMPT_TOKENS));
    let body = embeddings + (layers - 1) * layer;
    if projected {
        let held = narrow(body + layer + final_norm + projection);
        Encoder { held, left_out: 0, flops: layers * per_layer + 2 * projection }
    } else {
        Encoder { held: narrow(body), left_out: narrow(layer + final_norm), flops: (layers - 1) * per_layer }
    }
}

/// Cost of the image encoder on one condition image.
pub(super) fn vision(config: &ClipVisionConfig) -> Encoder {
    let (width, layers) = (wide(config.encoder.hidden_size), wide(config.encoder.num_hidden_layers));
    let tokens = wide(config.tokens());
    let patch = wide(config.num_channels) * wide(config.patch_size).pow(2) * width;
    let layer = clip_layer(&config.encoder);
    let norm = 2 * width;
    Encoder {
        held: narrow(width + patch + tokens * width + norm + (layers - 1) * layer),
        left_out: narrow(layer + norm),
        flops: 2 * (tokens - 1) * patch + (layers - 1) * clip_layer_flops(&config.encoder, tokens),
    }
}

/// Cost of the autoencoder on one image of `side` pixels. All of it is in memory, but only the encoder runs.
pub(super) fn autoencoder(config: &AutoencoderKlConfig, side: usize) -> Encoder {
    let encoder = encoder_layers(config);
    let decoder = decoder_layers(config);
    let latent = wide(config.latent_channels);
    let quant = if config.use_quant_conv { 2 * latent * 2 * latent + 2 * latent } else { 0 };
    let post_quant = if config.use_post_quant_conv { latent * latent + latent } else { 0 };
    let held = encoder.iter().chain(&decoder).map(Layer::parameters).sum::<u128>() + quant + post_quant;
    let smallest = wide(side >> (config.block_out_channels.len() - 1)).pow(2);
    let quant_flops = if config.use_quant_conv { 2 * smallest * 4 * latent * latent } else { 0 };
    let flops = encoder.iter().map(|layer| layer.flops(side)).sum::<u128>() + quant_flops;
    Encoder { held: narrow(held), left_out: 0, flops }
}

/// Number of elements of the encoder's largest feature map for an image of `side` pixels.
pub(super) fn largest_map(config: &AutoencoderKlConfig, side: usize) -> u128 {
    encoder_layers(config).iter().map(|layer| layer.pixels(side) * layer.widest()).max().unwrap_or(0)
}

/// Layer of the autoencoder. `level` is the number of times its output's sides are halved.
struct Layer {
    kind: Kind,
    level: usize,
}

enum Kind {
    Conv {
        input: usize,
        output: usize,
    },
    /// Two norms, two convolutions, and a shortcut if the widths differ.
    Resnet {
        input: usize,
        output: usize,
    },
    /// Self-attention over all pixels with one head.
    Attention {
        width: usize,
    },
    /// Norm and convolution.
    Out {
        input: usize,
        output: usize,
    },
}

impl Layer {
    fn parameters(&self) -> u128 {
        let conv = |input: usize, output: usize| 9 * wide(input) * wide(output) + wide(output);
        match self.kind {
            Kind::Conv { input, output } => conv(input, output),
            Kind::Resnet { input, output } => {
                let shortcut = if input == output { 0 } else { wide(input) * wide(output) + wide(output) };
                2 * wide(input) + conv(input, output) + 2 * wide(output) + conv(output, output) + shortcut
            }
            Kind::Attention { width } => 2 * wide(width) + 4 * (wide(width).pow(2) + wide(width)),
            Kind::Out { input, output } => 2 * wide(input) + conv(input, output),
        }
    }

    fn pixels(&self, side: usize) -> u128 {
        wide(side >> self.level).pow(2)
    }

    fn widest(&self) -> u128 {
        match self.kind {
            Kind::Conv { input, output } | Kind::Resnet { input, output } | Kind::Out { input, output } => {
                wide(input.max(output))
            }
            Kind::Attention { width } => wide(width),
        }
    }

    fn flops(&self, side: usize) -> u128 {
        let pixels = self.pixels(side);
        let matmul = |input: usize, output: usize| 2 * pixels * wide(input) * wide(output);
        match self.kind {
            Kind::Conv { input, output } | Kind::Out { input, output } => 9 * matmul(input, output),
            Kind::Resnet { input, output } => {
                let shortcut = if input == output { 0 } else { matmul(input, output) };
                9 * (matmul(input, output) + matmul(output, output)) + shortcut
            }
            Kind::Attention { width } => 4 * matmul(width, width) + 4 * pixels * pixels * wide(width),
        }
    }
}

/// Layers of diffusers' `UNetMidBlock2D`.
fn middle(config: &AutoencoderKlConfig, width: usize, level: usize) -> Vec<Layer> {
    let resnet = || Layer { kind: Kind::Resnet { input: width, output: width }, level };
    let attention = config.mid_block_add_attention.then_some(Layer { kind: Kind::Attention { width }, level });
    [resnet()].into_iter().chain(attention).chain([resnet()]).collect()
}

fn encoder_layers(config: &AutoencoderKlConfig) -> Vec<Layer> {
    let widths = &config.block_out_channels;
    let last = widths.len() - 1;
    let mut layers = vec![Layer { kind: Kind::Conv { input: config.in_channels, output: widths[0] }, level: 0 }];
    let mut input = widths[0];
    for (level, &width) in widths.iter().enumerate() {
        for _ in 0..config.layers_per_block {
            layers.push(Layer { kind: Kind::Resnet { input, output: width }, level });
            input = width;
        }
        if level < last {
            layers.push(Layer { kind: Kind::Conv { input: width, output: width }, level: level + 1 });
        }
    }
    layers.extend(middle(config, widths[last], last));
    layers.push(Layer { kind: Kind::Out { input: widths[last], output: 2 * config.latent_channels }, level: last });
    layers
}

fn decoder_layers(config: &AutoencoderKlConfig) -> Vec<Layer> {
    let widths = &config.block_out_channels;
    let last = widths.len() - 1;
    let mut layers =
        vec![Layer { kind: Kind::Conv { input: config.latent_channels, output: widths[last] }, level: last }];
    layers.extend(middle(config, widths[last], last));
    let mut input = widths[last];
    for (level, &width) in widths.iter().enumerate().rev() {
        for _ in 0..=config.layers_per_block {
            layers.push(Layer { kind: Kind::Resnet { input, output: width }, level });
            input = width;
        }
        if level > 0 {
            layers.push(Layer { kind: Kind::Conv { input: width, output: width }, level: level - 1 });
        }
    }
    layers.push(Layer { kind: Kind::Out { input: widths[0], output: config.out_channels }, level: 0 });
    layers
}
