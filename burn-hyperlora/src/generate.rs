//! Photos to LoRA weights: a trained hypernetwork, and what it needs to look at a face.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use data_prep::face::{Detection, FaceAnalyser, mask};
use data_prep::source::DecodeConfig;
use image::RgbImage;

use crate::checkpoint::Checkpoint;
use crate::clip_vision::{ClipVisionModel, ImageProcessor};
use crate::data::crop::Square;
use crate::error::{Error, Result};
use crate::experiment::Experiment;
use crate::hypernet::{HyperLora, Stage, read_sites};
use crate::lora::{AttentionSite, LoraWeights};
use crate::train::CHECKPOINTS;
use crate::train::checkpoints::{self, SavedState, WEIGHTS};

/// One photo of one person.
pub struct Portrait {
    /// The photo as it is.
    pub photo: RgbImage,
    /// The face, x0 y0 x1 y1 in pixels.
    pub face_box: [f32; 4],
    /// 68 or 106 points in pixels.
    pub landmarks: Vec<[f32; 2]>,
    /// L2-normalised, 512 numbers.
    pub id_embedding: Vec<f32>,
}

/// A trained hypernetwork with the models that read a face; the rest of the base model is not loaded.
pub struct Generator {
    /// The run's settings.
    pub experiment: Experiment,
    checkpoint: PathBuf,
    hyper_lora: HyperLora,
    taught: Stage,
    sites: Vec<AttentionSite>,
    image_encoder: ClipVisionModel,
    image_processor: ImageProcessor,
    analyser: FaceAnalyser,
    device: Device,
}

impl Generator {
    /// Opens a checkpoint folder, or the latest checkpoint of a run folder.
    ///
    /// # Errors
    /// Input for a folder that is neither, a damaged checkpoint, or a missing model.
    pub fn open(folder: &Path, device: &Device) -> Result<Self> {
        let (run, checkpoint) = find(folder)?;
        checkpoint.verify()?;
        let saved: SavedState = checkpoint.state()?;
        let experiment = Experiment::of_run(&run)?;
        let faces = experiment.faces.as_ref().ok_or_else(|| {
            Error::input(
                format!("{}: faces", experiment.place()),
                "is missing: without face models no photo can be read",
                "add `faces: {models: FOLDER}` to it",
            )
        })?;
        let analyser = FaceAnalyser::load(faces, experiment.folder())?;
        let base = &experiment.base;
        let weights = checkpoint.path().join(WEIGHTS);
        let sites = read_sites(&weights)?;
        Ok(Self {
            hyper_lora: HyperLora::load(&weights, &experiment.hyper_lora, &sites, device)?,
            taught: saved.taught.unwrap_or(Stage::IdEmbed),
            image_encoder: ClipVisionModel::load(&base.image_encoder_folder(experiment.folder())?, device)?,
            image_processor: ImageProcessor::load(&base.feature_extractor_folder(experiment.folder())?)?,
            checkpoint: checkpoint.path().into(),
            sites,
            analyser,
            experiment,
            device: device.clone(),
        })
    }

    /// Where the LoRAs apply, in the UNet's order.
    pub fn sites(&self) -> &[AttentionSite] {
        &self.sites
    }

    /// Whether there is a Base-LoRA to go with the ID-LoRA.
    pub fn has_base(&self) -> bool {
        self.hyper_lora.has_base()
    }

    /// Finds and measures the one face of a photo.
    ///
    /// # Errors
    /// Input for a file that is no photo, or shows no face or several.
    pub fn portrait(&mut self, path: &Path) -> Result<Portrait> {
        let bytes = fs::read(path).map_err(|source| Error::read(path, source))?;
        let photo = DecodeConfig::default().decode(&bytes).map_err(|problem| {
            Error::file(
                path,
                format!("is no photo that can be decoded: {problem}"),
                "give a PNG, JPEG, WebP, BMP or PGM file",
            )
        })?;
        let found = self.analyser.detect(&photo)?;
        let [face]: [Detection; 1] = found.try_into().map_err(|found: Vec<Detection>| {
            Error::file(
                path,
                format!("shows {} faces, one is needed", found.len()),
                "give a photo of one person that shows the whole face, or cut it out first",
            )
        })?;
        let description = self.analyser.describe(&photo, &face)?;
        Ok(Portrait {
            photo,
            face_box: face.face_box,
            landmarks: description.landmarks,
            id_embedding: description.id_embedding,
        })
    }

    /// The ID-LoRA of one person, from any number of photos: their resampler outputs are averaged.
    pub fn id_lora(&self, portraits: &[Portrait]) -> LoraWeights {
        let faces = portraits
            .iter()
            .map(|portrait| mask::id_image(&portrait.photo, &portrait.landmarks, &self.experiment.data.mask));
        let states = self.states(faces);
        let embedding = (self.taught == Stage::IdEmbed).then(|| {
            let values: Vec<f32> =
                portraits.iter().flat_map(|portrait| portrait.id_embedding.iter().copied()).collect();
            let shape = [portraits.len(), values.len() / portraits.len().max(1)];
            Tensor::from_data(TensorData::new(values, shape), &self.device)
        });
        self.hyper_lora.id_lora_of(self.hyper_lora.id_coefficients(states, embedding, portraits.len()))
    }

    /// The Base-LoRA of the same photos: all but the face.
    ///
    /// # Errors
    /// Input when the checkpoint has no Base-LoRA.
    pub fn base_lora(&self, portraits: &[Portrait]) -> Result<LoraWeights> {
        let views = portraits.iter().map(|portrait| {
            let square = Square::middle(portrait.photo.dimensions(), portrait.face_box, &self.experiment.data.crop);
            let view = square.cut(&portrait.photo, square.side);
            mask::base_image(&view, &square.points(&portrait.landmarks), &self.experiment.data.mask)
        });
        let states = self.states(views);
        self.hyper_lora.base_lora_of(self.hyper_lora.base_coefficients(states, portraits.len())?)
    }

    /// Both together, each with its weight; `base_weight` 0 leaves the Base-LoRA out.
    ///
    /// # Errors
    /// Input when a LoRA is asked of a checkpoint that has none or has not learnt it.
    pub fn lora(&self, portraits: &[Portrait], id_weight: f32, base_weight: f32) -> Result<LoraWeights> {
        if id_weight != 0.0 && !self.hyper_lora.has_learnt_id() {
            return Err(Error::file(
                &self.checkpoint,
                "has learnt no ID-LoRA so far: it would be zero for everybody",
                "train on to an ID stage, or give the ID-LoRA the weight 0",
            ));
        }
        let weight = |weight: f32| Tensor::<1>::from_floats([weight], &self.device);
        let id = self.id_lora(portraits).weighted(&weight(id_weight));
        if base_weight == 0.0 {
            return Ok(id);
        }
        Ok(id.concat(self.base_lora(portraits)?.weighted(&weight(base_weight))))
    }

    /// The image encoder's states, `[N, T, D]`.
    fn states(&self, pictures: impl Iterator<Item = RgbImage>) -> Tensor<3> {
        let pictures: Vec<RgbImage> = pictures.collect();
        self.image_encoder.penultimate(self.image_processor.process(&pictures, &self.device))
    }
}

/// The run folder and the checkpoint that `folder` means.
fn find(folder: &Path) -> Result<(PathBuf, Checkpoint)> {
    if folder.join(CHECKPOINTS).is_dir() {
        let latest = checkpoints::latest(folder)?.ok_or_else(|| {
            Error::file(folder, "holds no checkpoint yet", "let `hyperlora train` reach its first checkpoint")
        })?;
        return Ok((folder.into(), latest));
    }
    let absolute = std::path::absolute(folder).map_err(|source| Error::read(folder, source))?;
    let run = absolute.ancestors().nth(2).unwrap_or(&absolute).to_path_buf();
    Ok((run, Checkpoint::at(folder)?))
}
