//! Key names of single-file checkpoints (Stability AI's `generative-models`) mapped to diffusers names and back.
//!
//! A table is a list of key prefix pairs built from the component configs; the rest of a key is the same in both
//! namings. Three layouts differ: single files store the text projection transposed, the autoencoder's attention as 1x1
//! convolutions, and OpenCLIP's queries, keys and values as one stack of rows.

use std::collections::HashMap;
use std::sync::OnceLock;

use hyperlora_core::Result;

use crate::models::clip_text::ClipTextConfig;
use crate::models::unet::config::{UNet2DConditionConfig, UpBlock};
use crate::models::vae::AutoencoderKlConfig;
use crate::source::configs;
use crate::weights::{ConfigText, Form};

/// UNet: modules outside the blocks.
const UNET: [(&str, &str); 7] = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

/// UNet: middle block. Its resnet parts are in [`UNET_RESNET`].
const UNET_MIDDLE: [(&str, &str); 2] =
    [("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.2")];

/// UNet: parts of a resnet.
const UNET_RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// Autoencoder: modules outside the encoder and decoder.
const VAE: [(&str, &str); 2] = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")];

/// Autoencoder: modules of the encoder and the decoder outside their levels.
const VAE_HALF: [(&str, &str); 4] = [
    ("conv_in", "conv_in"),
    ("conv_norm_out", "norm_out"),
    ("conv_out", "conv_out"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
];

/// Autoencoder: attention linears.
const VAE_ATTENTION: [(&str, &str); 4] = [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")];

/// Autoencoder: parts of a resnet.
const VAE_RESNET: [(&str, &str); 5] =
    [("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"), ("conv_shortcut", "nin_shortcut")];

/// First text encoder: single files use the names of transformers.
const TEXT: [(&str, &str); 1] = [("text_model", "text_model")];

/// Second text encoder: modules outside the layers.
const OPEN_CLIP: [(&str, &str); 3] = [
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
];

/// Second text encoder: parts of a layer.
const OPEN_CLIP_LAYER: [(&str, &str); 5] = [
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
];

/// Second text encoder: thirds of a layer's fused projection, in row order.
const OPEN_CLIP_FUSED: [&str; 3] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];

/// A key prefix in both namings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Prefix in diffusers.
    pub diffusers: String,
    /// Prefix in single files, after the component's own prefix such as `model.diffusion_model.`.
    pub stability: String,
    /// Transform from the single file's tensor to the diffusers tensor.
    pub form: Form,
}

/// Key names of one SDXL component in both namings.
///
/// # Examples
/// ```
/// use hyperlora_sdxl::models::unet::UNet2DConditionConfig;
/// use hyperlora_sdxl::source::configs::UNET;
/// use hyperlora_sdxl::source::key_names::KeyTable;
/// use hyperlora_sdxl::weights::{ConfigText, Form};
///
/// let table = KeyTable::unet(&UNet2DConditionConfig::parse(&ConfigText::built_in("unet/config.json", UNET))?);
/// let (diffusers, single_file) = ("down_blocks.1.attentions.0.proj_in.weight", "input_blocks.4.1.proj_in.weight");
/// assert_eq!(table.to_stability(diffusers), Some((single_file.into(), Form::Same)));
/// assert_eq!(table.to_diffusers(single_file), [(diffusers.into(), Form::Same)]);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct KeyTable {
    pairs: Vec<Pair>,
    by_diffusers: HashMap<String, usize>,
    by_stability: HashMap<String, Vec<usize>>,
    separator: char,
}

impl KeyTable {
    /// Key table of the UNet.
    pub fn unet(config: &UNet2DConditionConfig) -> Self {
        let mut pairs = Pairs::from_table(&UNET);
        for (diffusers, stability) in UNET_MIDDLE {
            pairs.module(diffusers, stability, &UNET_RESNET);
        }
        pairs.add("mid_block.attentions.0", "middle_block.1");
        let blocks = config.block_out_channels.len();
        // Single files number blocks consecutively: each resnet with its attention is one, and each downsampler is one.
        let mut input = 1;
        for block in 0..blocks {
            for layer in 0..config.layers_per_block.get(block) {
                let name = format!("down_blocks.{block}");
                pairs.module(&format!("{name}.resnets.{layer}"), &format!("input_blocks.{input}.0"), &UNET_RESNET);
                pairs.add(format!("{name}.attentions.{layer}"), format!("input_blocks.{input}.1"));
                input += 1;
            }
            pairs.add(format!("down_blocks.{block}.downsamplers.0.conv"), format!("input_blocks.{input}.0.op"));
            input += 1;
        }
        let mut output = 0;
        for (step, kind) in config.up_block_types.iter().enumerate() {
            let layers = config.layers_per_block.get(blocks - 1 - step) + 1;
            let attends = *kind == UpBlock::CrossAttnUpBlock2D;
            for layer in 0..layers {
                let (name, number) = (format!("up_blocks.{step}"), output + layer);
                pairs.module(&format!("{name}.resnets.{layer}"), &format!("output_blocks.{number}.0"), &UNET_RESNET);
                if attends {
                    pairs.add(format!("{name}.attentions.{layer}"), format!("output_blocks.{number}.1"));
                }
            }
            output += layers;
            let place = if attends { 2 } else { 1 };
            let last = format!("output_blocks.{}.{place}.conv", output - 1);
            pairs.add(format!("up_blocks.{step}.upsamplers.0.conv"), last);
        }
        pairs.table('.')
    }

    /// Key table of the SDXL-Base-1.0 UNet with underscores for dots. LoRA files and hypernetworks use it when no base
    /// is available.
    ///
    /// # Errors
    /// Fault: the built-in config does not parse.
    pub fn of_sdxl() -> Result<&'static Self> {
        static TABLE: OnceLock<KeyTable> = OnceLock::new();
        if let Some(table) = TABLE.get() {
            return Ok(table);
        }
        let config = UNet2DConditionConfig::parse(&ConfigText::built_in("unet/config.json", configs::UNET))?;
        Ok(TABLE.get_or_init(|| Self::unet(&config).underscored()))
    }

    /// Key table of the autoencoder.
    pub fn vae(config: &AutoencoderKlConfig) -> Self {
        let mut pairs = Pairs::from_table(&VAE);
        let levels = config.block_out_channels.len();
        for half in ["encoder", "decoder"] {
            pairs.module(half, half, &VAE_HALF);
            let attention = (format!("{half}.mid_block.attentions.0"), format!("{half}.mid.attn_1"));
            for (diffusers, stability) in VAE_ATTENTION {
                let names = (format!("{}.{diffusers}", attention.0), format!("{}.{stability}", attention.1));
                pairs.add_as(names.0, names.1, Form::Linear);
            }
            for resnet in 0..2 {
                let name = format!("{half}.mid_block.resnets.{resnet}");
                pairs.module(&name, &format!("{half}.mid.block_{}", resnet + 1), &VAE_RESNET);
            }
        }
        for level in 0..levels {
            let from_below = levels - 1 - level;
            for layer in 0..config.layers_per_block {
                let name = format!("encoder.down_blocks.{level}.resnets.{layer}");
                pairs.module(&name, &format!("encoder.down.{level}.block.{layer}"), &VAE_RESNET);
            }
            for layer in 0..=config.layers_per_block {
                let name = format!("decoder.up_blocks.{level}.resnets.{layer}");
                pairs.module(&name, &format!("decoder.up.{from_below}.block.{layer}"), &VAE_RESNET);
            }
            pairs.add(
                format!("encoder.down_blocks.{level}.downsamplers.0.conv"),
                format!("encoder.down.{level}.downsample.conv"),
            );
            pairs.add(
                format!("decoder.up_blocks.{level}.upsamplers.0.conv"),
                format!("decoder.up.{from_below}.upsample.conv"),
            );
        }
        pairs.table('.')
    }

    /// Key table of the first text encoder.
    pub fn text_encoder() -> Self {
        Pairs::from_table(&TEXT).table('.')
    }

    /// Key table of the second text encoder.
    pub fn text_encoder_2(config: &ClipTextConfig) -> Self {
        let mut pairs = Pairs::from_table(&OPEN_CLIP);
        pairs.add_as("text_projection.weight", "text_projection", Form::Transposed);
        // Some files store the projection as a linear layer.
        pairs.add("text_projection.weight", "text_projection.weight");
        for layer in 0..config.encoder.num_hidden_layers {
            let diffusers = format!("text_model.encoder.layers.{layer}");
            let stability = format!("transformer.resblocks.{layer}");
            pairs.module(&diffusers, &stability, &OPEN_CLIP_LAYER);
            for (third, name) in OPEN_CLIP_FUSED.into_iter().enumerate() {
                for kind in ["weight", "bias"] {
                    let fused = format!("{stability}.attn.in_proj_{kind}");
                    pairs.add_as(format!("{diffusers}.{name}.{kind}"), fused, Form::Third(third));
                }
            }
        }
        pairs.table('.')
    }

    /// Returns the same table with underscores for dots, as in the keys of kohya's LoRA files.
    #[must_use]
    pub fn underscored(&self) -> Self {
        let flat = |name: &str| name.replace(self.separator, "_");
        let pairs = self.pairs.iter().map(|pair| Pair {
            diffusers: flat(&pair.diffusers),
            stability: flat(&pair.stability),
            form: pair.form,
        });
        Pairs(pairs.collect()).table('_')
    }

    /// Maps a diffusers name to the single file's name, without the component's prefix, and the transform of its
    /// tensor.
    pub fn to_stability(&self, name: &str) -> Option<(String, Form)> {
        self.prefixes(name).find_map(|(prefix, rest)| {
            let pair = &self.pairs[*self.by_diffusers.get(prefix)?];
            Some((format!("{}{rest}", pair.stability), pair.form))
        })
    }

    /// Maps a single file's name, without the component's prefix, to diffusers names: one, three for a fused
    /// projection, none for an unknown name.
    pub fn to_diffusers(&self, name: &str) -> Vec<(String, Form)> {
        let found = self.prefixes(name).find_map(|(prefix, rest)| Some((self.by_stability.get(prefix)?, rest)));
        let Some((pairs, rest)) = found else { return Vec::new() };
        let renamed = |&index: &usize| (format!("{}{rest}", self.pairs[index].diffusers), self.pairs[index].form);
        pairs.iter().map(renamed).collect()
    }

    /// Splits `name` at each separator, longest prefix first.
    fn prefixes<'a>(&self, name: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let cuts = name.rmatch_indices(self.separator).map(|(index, _)| index);
        std::iter::once(name.len()).chain(cuts).map(|index| name.split_at(index))
    }
}

/// A key table under construction.
struct Pairs(Vec<Pair>);

impl Pairs {
    fn from_table(table: &[(&str, &str)]) -> Self {
        let mut pairs = Self(Vec::new());
        for &(diffusers, stability) in table {
            pairs.add(diffusers, stability);
        }
        pairs
    }

    fn add(&mut self, diffusers: impl Into<String>, stability: impl Into<String>) {
        self.add_as(diffusers, stability, Form::Same);
    }

    fn add_as(&mut self, diffusers: impl Into<String>, stability: impl Into<String>, form: Form) {
        self.0.push(Pair { diffusers: diffusers.into(), stability: stability.into(), form });
    }

    /// Adds the parts of a module.
    fn module(&mut self, diffusers: &str, stability: &str, parts: &[(&str, &str)]) {
        for (one, other) in parts {
            self.add(format!("{diffusers}.{one}"), format!("{stability}.{other}"));
        }
    }

    fn table(self, separator: char) -> KeyTable {
        let mut by_diffusers = HashMap::new();
        let mut by_stability: HashMap<_, Vec<_>> = HashMap::new();
        for (index, pair) in self.0.iter().enumerate() {
            by_diffusers.entry(pair.diffusers.clone()).or_insert(index);
            by_stability.entry(pair.stability.clone()).or_default().push(index);
        }
        KeyTable { pairs: self.0, by_diffusers, by_stability, separator }
    }
}
