//! CLIP image encoder (transformers `CLIPVisionModelWithProjection`) and its image processor (`CLIPImageProcessor`).

use std::path::Path;

use burn::nn::LayerNorm;
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Tensor};
use hyperlora_core::{Error, Result};
use image::{RgbImage, imageops};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::models::clip_encoder::{ClipEncoder, ClipEncoderConfig};
use crate::models::clip_vision::resize::bicubic;
use crate::planes::Planes;
use crate::weights::{ConfigText, Weights, parse_json, read_text};

mod resize;

/// File name of the image processor's settings.
pub const PREPROCESSOR_CONFIG: &str = "preprocessor_config.json";

const REMEDY: &str = "use the folder of a CLIP image encoder, such as ViT-L/14, in transformers layout";

/// The keys of a CLIP image encoder's `config.json` that affect the computation. Other keys are ignored.
#[derive(Debug, Clone, Deserialize)]
pub struct ClipVisionConfig {
    /// Sizes of the transformer.
    #[serde(flatten)]
    pub encoder: ClipEncoderConfig,
    /// Height and width of the input, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels; a divisor of the image size.
    pub patch_size: usize,
    /// Colour channels, 3.
    #[serde(default = "rgb")]
    pub num_channels: usize,
}

fn rgb() -> usize {
    3
}

/// Image side limit of a config; larger sides are typing errors.
const LARGEST_IMAGE: usize = 1 << 14;

impl ClipVisionConfig {
    /// Number of tokens of an image: the class token and one per patch.
    pub fn tokens(&self) -> usize {
        1 + (self.image_size / self.patch_size).pow(2)
    }

    /// Parses and checks the config of an image encoder, or of a whole CLIP model, which holds it as `vision_config`.
    ///
    /// # Errors
    /// Input: the JSON is broken, or sizes are impossible.
    pub fn parse(text: &ConfigText) -> Result<Self> {
        let keys: Map<String, Value> = text.parse()?;
        let config: Self = match keys.get("vision_config") {
            Some(vision) => text.with_text(vision.to_string()).parse()?,
            None => text.parse()?,
        };
        match config.problem() {
            None => Ok(config),
            Some((key, problem)) => Err(Error::input(format!("{}: {key}", text.origin().display()), problem, REMEDY)),
        }
    }

    fn problem(&self) -> Option<(&'static str, String)> {
        if self.patch_size == 0 || self.image_size < self.patch_size {
            return Some(("patch_size", format!("{} does not fit image_size {}", self.patch_size, self.image_size)));
        }
        if self.image_size > LARGEST_IMAGE {
            return Some(("image_size", format!("{} is above {LARGEST_IMAGE}", self.image_size)));
        }
        if self.num_channels != rgb() {
            return Some(("num_channels", format!("{} is not supported, only 3", self.num_channels)));
        }
        self.encoder.problem()
    }
}

/// Frozen CLIP image encoder up to its penultimate layer.
#[derive(Debug)]
pub struct ClipVisionModel {
    config: ClipVisionConfig,
    /// `[1, 1, C]`
    class_embedding: Tensor<3>,
    /// `[C, 3, patch, patch]`
    patch_embedding: Tensor<4>,
    /// `[1, T, C]`
    position_embedding: Tensor<3>,
    pre_layrnorm: LayerNorm,
    encoder: ClipEncoder,
}

impl ClipVisionModel {
    /// Loads a folder with `config.json` and weights (`.../image_encoder`). Layers after the penultimate one are not
    /// read.
    ///
    /// # Errors
    /// Input: the config requires something unsupported, or the weights do not fit it.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let config = ClipVisionConfig::parse(&ConfigText::read(&folder.join("config.json"))?)?;
        Self::new(config, Weights::open(folder, device)?)
    }

    /// Builds the encoder from `weights`, up to the penultimate layer.
    ///
    /// # Errors
    /// Input: the weights do not fit the config.
    pub fn new(config: ClipVisionConfig, weights: Weights) -> Result<Self> {
        let root = weights.at("");
        // Recent transformers omit the prefix if there is no projection.
        let bare = root.has("embeddings.class_embedding");
        let vision = if bare { root.clone() } else { root.at("vision_model") };
        let ClipEncoderConfig { hidden_size: width, num_hidden_layers, layer_norm_eps, .. } = config.encoder;
        let embeddings = vision.at("embeddings");
        embeddings.ignore("position_ids");
        vision.at("encoder.layers").at(num_hidden_layers - 1).ignore_all();
        vision.at("post_layernorm").ignore_all();
        root.at("visual_projection").ignore_all();
        // The text half of a whole CLIP model is unused.
        root.at("text_model").ignore_all();
        root.at("text_projection").ignore_all();
        root.ignore("logit_scale");

        let positions = embeddings.at("position_embedding").tensor("weight", [config.tokens(), width]);
        let kernel = [width, config.num_channels, config.patch_size, config.patch_size];
        let model = Self {
            class_embedding: embeddings.tensor("class_embedding", [width]).reshape([1, 1, width]),
            patch_embedding: embeddings.at("patch_embedding").tensor("weight", kernel),
            position_embedding: positions.unsqueeze(),
            pre_layrnorm: vision.at("pre_layrnorm").layer_norm(width, layer_norm_eps),
            encoder: ClipEncoder::new(&vision.at("encoder"), &config.encoder, num_hidden_layers - 1),
            config,
        };
        weights.finish()?;
        Ok(model)
    }

    /// Config of the encoder.
    pub fn config(&self) -> &ClipVisionConfig {
        &self.config
    }

    /// Computes `hidden_states[-2]`, `[B, 1 + patches, C]`, from pixel values `[B, 3, image_size, image_size]` of
    /// [`ImageProcessor`].
    pub fn penultimate(&self, pixel_values: Tensor<4>) -> Tensor<3> {
        let [batch, ..] = pixel_values.dims();
        let [_, _, width] = self.class_embedding.dims();
        // 1. One token per patch, row by row: [B, C, rows, columns] -> [B, patches, C].
        let options = ConvOptions::new([self.config.patch_size; 2], [0; 2], [1; 2], 1);
        let patches = conv2d(pixel_values, self.patch_embedding.clone(), None, options).flatten(2, 3).swap_dims(1, 2);
        // 2. Class token first, then positions added.
        let class = self.class_embedding.clone().expand([batch, 1, width]);
        let tokens = Tensor::cat(vec![class, patches], 1) + self.position_embedding.clone();
        // 3. All layers except the last.
        self.encoder.forward(self.pre_layrnorm.forward(tokens), false)
    }
}

/// A side length in any form that the processor's config allows.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Size {
    Side(u32),
    Shortest { shortest_edge: u32 },
    Both { height: u32, width: u32 },
}

#[derive(Debug, Clone, Deserialize)]
struct ProcessorConfig {
    size: Size,
    crop_size: Size,
    image_mean: [f32; 3],
    image_std: [f32; 3],
    #[serde(default = "per_level")]
    rescale_factor: f64,
    #[serde(default = "pillow_bicubic")]
    resample: u32,
    #[serde(default = "yes")]
    do_resize: bool,
    #[serde(default = "yes")]
    do_center_crop: bool,
    #[serde(default = "yes")]
    do_rescale: bool,
    #[serde(default = "yes")]
    do_normalize: bool,
}

fn per_level() -> f64 {
    1.0 / 255.0
}

/// Pillow's enum value for bicubic resampling.
fn pillow_bicubic() -> u32 {
    3
}

fn yes() -> bool {
    true
}

/// Converts pictures to pixel values: resizes the shortest edge, centre-crops, normalises.
///
/// Resizing matches Pillow's bicubic resampling bit for bit.
#[derive(Debug, Clone)]
pub struct ImageProcessor {
    shortest_edge: u32,
    crop: u32,
    rescale_factor: f32,
    mean: [f32; 3],
    std: [f32; 3],
}

impl ImageProcessor {
    /// Loads `preprocessor_config.json` of a folder (`.../feature_extractor`).
    ///
    /// # Errors
    /// Input: the file is missing or broken, or its settings are not supported.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(PREPROCESSOR_CONFIG);
        let config: ProcessorConfig =
            parse_json(&read_text(&path)?).map_err(|problem| Error::file(&path, problem, REMEDY))?;
        let refuse = |key: &str, problem: &str| Error::input(format!("{}: {key}", path.display()), problem, REMEDY);
        if !(config.do_resize && config.do_center_crop && config.do_rescale && config.do_normalize) {
            let keys = "do_resize, do_center_crop, do_rescale, do_normalize";
            return Err(refuse(keys, "all must be true"));
        }
        if config.resample != pillow_bicubic() {
            return Err(refuse("resample", "only 3 (bicubic) is supported"));
        }
        let (Size::Side(shortest_edge) | Size::Shortest { shortest_edge }) = config.size else {
            return Err(refuse("size", "only shortest_edge is supported"));
        };
        let crop = match config.crop_size {
            Size::Side(side) => side,
            Size::Both { height, width } if height == width => height,
            Size::Both { .. } | Size::Shortest { .. } => return Err(refuse("crop_size", "only a square is supported")),
        };
        if crop == 0 || crop > shortest_edge {
            return Err(refuse("crop_size", "must lie within 1 and the shortest edge"));
        }
        if shortest_edge as usize > LARGEST_IMAGE {
            return Err(refuse("size", &format!("shortest_edge {shortest_edge} is above {LARGEST_IMAGE}")));
        }
        if !config.image_std.iter().all(|&std| std > 0.0) {
            return Err(refuse("image_std", "must be positive"));
        }
        Ok(Self {
            shortest_edge,
            crop,
            rescale_factor: config.rescale_factor as f32,
            mean: config.image_mean,
            std: config.image_std,
        })
    }

    /// Side of the pixel values, in pixels.
    pub fn side(&self) -> u32 {
        self.crop
    }

    /// Computes pixel values `[B, 3, side, side]` of pictures of any nonzero sizes.
    pub fn process(&self, pictures: &[RgbImage], device: &Device) -> Tensor<4> {
        let values: Vec<Planes> = pictures.iter().map(|picture| self.pixel_values(picture)).collect();
        Planes::stack(&values.iter().collect::<Vec<_>>(), device)
    }

    /// Computes pixel values `[3, side, side]` of one picture.
    pub fn pixel_values(&self, picture: &RgbImage) -> Planes {
        // 1. Resize the shortest edge; the other in proportion, rounded down.
        let (width, height) = picture.dimensions();
        let scaled = |edge: u32| {
            (u64::from(edge) * u64::from(self.shortest_edge) / u64::from(width.min(height))).min(u64::from(u32::MAX))
                as u32
        };
        let (width, height) = (scaled(width), scaled(height));
        let resized = bicubic(picture, width, height);
        // 2. Crop the centre.
        let (left, top) = ((width - self.crop) / 2, (height - self.crop) / 2);
        let cropped = imageops::crop_imm(&resized, left, top, self.crop, self.crop).to_image();
        // 3. Rescale and normalise.
        Planes::new(&cropped, |channel, level| {
            (f32::from(level) * self.rescale_factor - self.mean[channel]) / self.std[channel]
        })
    }
}
