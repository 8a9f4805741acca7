//! Converts a face record to a sample: target pixels, condition images and all random draws.

use std::io::Cursor;
use std::sync::Arc;

use data_prep::face::mask::{self, MaskConfig};
use data_prep::shard::FaceRecord;
use hyperlora_core::random::{Purpose, below, for_sample, normal};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::planes::Planes;
use image::{ImageFormat, ImageReader, Limits, RgbImage, imageops};

use crate::data::crop::Square;
use crate::data::dataset::Dataset;
use crate::data::scenario::Scenario;
use crate::data::{CropConfig, DataConfig, SizeConditioning};

/// Converts a condition image to the image encoder's input; called from loader threads.
pub type ImageTransform = Arc<dyn Fn(&RgbImage) -> Planes + Send + Sync>;

/// Definition of a sample, which is a pure function of this request and the shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Row of the target photo.
    pub target: usize,
    /// Row of the reference photo, the source of the ID condition.
    pub reference: usize,
    /// Trigger words and LoRAs that are on.
    pub scenario: Scenario,
    /// Stage, epoch or evaluation that numbers the draws.
    pub stage: u64,
    /// Draw that determines crop, noise and timestep.
    pub draw: u64,
}

/// A sample on the host.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Request that the sample was made from.
    pub request: Request,
    /// Key of the target photo in its source.
    pub key: String,
    /// Target image, in [-1, 1].
    pub pixels: Planes,
    /// Time ids: original height and width, crop top and left, target height and width.
    pub time_ids: [f32; 6],
    /// Caption of the target, without trigger words.
    pub caption: String,
    /// Image encoder input of the reference photo's masked face; `None` without an ID-LoRA.
    pub id_pixels: Option<Planes>,
    /// Image encoder input of the target with a blurred face.
    pub base_pixels: Planes,
    /// ID embedding of the reference photo, L2-normalised.
    pub id_embedding: Vec<f32>,
    /// Standard normal noise of the latents' size, for sampling the autoencoder's posterior.
    pub posterior_noise: Vec<f32>,
    /// Standard normal noise of the latents' size, which the UNet has to predict.
    pub noise: Vec<f32>,
    /// Timestep in `0..timesteps`.
    pub timestep: u32,
}

impl Sample {
    /// Size of the sample in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let pictures = [Some(&self.pixels), self.id_pixels.as_ref(), Some(&self.base_pixels)];
        let pictures = pictures.into_iter().flatten().map(|picture| &picture.data[..]);
        let numbers = pictures.chain([&self.id_embedding[..], &self.posterior_noise, &self.noise]);
        let texts = self.key.len() + self.caption.len();
        size_of::<Self>() + texts + numbers.map(size_of_val).sum::<usize>()
    }
}

/// Makes samples; shared by the loader's threads.
#[derive(Clone)]
pub struct SampleMaker {
    /// Source of the photos.
    pub dataset: Arc<Dataset>,
    image_size: u32,
    crop: CropConfig,
    flip: bool,
    size_conditioning: SizeConditioning,
    mask: MaskConfig,
    seed: u64,
    shape: SampleShape,
}

/// Sample sizes and preprocessing that the models require.
#[derive(Clone)]
pub struct SampleShape {
    /// Number of elements in one sample's latents.
    pub latent_len: usize,
    /// Number of timesteps of the noise schedule.
    pub timesteps: u32,
    /// Preprocessing of the image encoder.
    pub transform: ImageTransform,
    /// Samples include ID conditions.
    pub with_id: bool,
}

impl SampleMaker {
    /// Creates a maker for the models described by `shape`. All randomness derives from `seed`.
    pub fn new(dataset: Arc<Dataset>, config: &DataConfig, seed: u64, shape: SampleShape) -> Self {
        Self {
            dataset,
            image_size: config.image_size as u32,
            crop: config.crop.clone(),
            flip: config.flip,
            size_conditioning: config.size_conditioning,
            mask: config.mask,
            seed,
            shape,
        }
    }

    /// Returns the same maker, with or without ID conditions.
    #[must_use]
    pub fn with_id(mut self, with_id: bool) -> Self {
        self.shape.with_id = with_id;
        self
    }

    /// Seed of all randomness.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Makes a sample: decodes, crops, masks and draws.
    ///
    /// # Errors
    /// Input, naming the shard folder and the record: the record contradicts its columns.
    pub fn make(&self, request: Request) -> Result<Sample> {
        let Request { target, reference, stage, draw, .. } = request;
        let record = self.dataset.record(target)?;
        let photo = self.decode(&record)?;

        let mut augmentation = for_sample(self.seed, stage, draw, Purpose::Augmentation);
        let square = Square::draw(photo.dimensions(), record.face_box, &self.crop, &mut augmentation);
        let flipped = self.flip && below(&mut augmentation, 2) == 1;
        let view = square.cut(&photo, square.side);
        let base = mask::base_image(&view, &square.points(&record.landmarks), &self.mask);
        let face = square.cut(&photo, self.image_size);
        // The crop corner is reported as if the whole photo were mirrored, as in diffusers' SDXL training script.
        let told = if flipped { square.mirrored(photo.width()) } else { square };
        let turn = |image: RgbImage| if flipped { imageops::flip_horizontal(&image) } else { image };

        let (id_pixels, id_embedding) =
            if self.shape.with_id { self.id_condition(reference)? } else { Default::default() };
        let numbers = |purpose| normal(&mut for_sample(self.seed, stage, draw, purpose), self.shape.latent_len);
        let timestep = below(&mut for_sample(self.seed, stage, draw, Purpose::Timestep), self.shape.timesteps.into());
        Ok(Sample {
            request,
            key: record.key.clone(),
            pixels: to_signed_planes(&turn(face)),
            time_ids: told.time_ids(photo.dimensions(), self.image_size, self.size_conditioning),
            caption: record.caption.clone(),
            id_pixels,
            base_pixels: (self.shape.transform)(&turn(base)),
            id_embedding,
            posterior_noise: numbers(Purpose::Posterior),
            noise: numbers(Purpose::Noise),
            timestep: timestep as u32,
        })
    }

    /// Makes the masked face and ID embedding of a row from the unchanged photo, without crop or flip.
    fn id_condition(&self, row: usize) -> Result<(Option<Planes>, Vec<f32>)> {
        let record = self.dataset.record(row)?;
        let photo = self.decode(&record)?;
        let face = mask::id_image(&photo, &record.landmarks, &self.mask);
        Ok((Some((self.shape.transform)(&face)), record.id_embedding.clone()))
    }

    fn decode(&self, record: &FaceRecord) -> Result<RgbImage> {
        let bad = |problem: String| {
            Error::input(
                format!("{}: record `{}`", self.dataset.path().display(), record.key),
                problem,
                "build the shards again with `data-prep build`",
            )
        };
        let mut limits = Limits::default();
        limits.max_image_width = Some(record.width);
        limits.max_image_height = Some(record.height);
        let mut reader = ImageReader::new(Cursor::new(&record.image))
            .with_guessed_format()
            .map_err(|error| bad(format!("its image cannot be read: {error}")))?;
        if !matches!(reader.format(), Some(ImageFormat::Png | ImageFormat::Jpeg)) {
            return Err(bad("its image is neither PNG nor JPEG".into()));
        }
        reader.limits(limits);
        let photo = reader.decode().map_err(|error| bad(format!("its image cannot be decoded: {error}")))?.into_rgb8();
        if photo.dimensions() != (record.width, record.height) {
            return Err(bad(format!(
                "is {:?} large, its columns say {:?}",
                photo.dimensions(),
                (record.width, record.height)
            )));
        }
        Ok(photo)
    }
}

/// Converts an image to planes in [-1, 1].
fn to_signed_planes(image: &RgbImage) -> Planes {
    Planes::new(image, |_, level| f32::from(level) / 127.5 - 1.0)
}
