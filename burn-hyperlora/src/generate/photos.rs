//! Reads a person from photos with face models and CLIP.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use data_prep::face::mask::{self, MaskConfig};
use data_prep::face::{Detection, FaceAnalyser, FaceConfig, Upright};
use data_prep::source::DecodeConfig;
use hyperlora_core::config::ConfigPath;
use hyperlora_core::paths::read_regular;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::models::clip_vision::{ClipVisionModel, ImageProcessor, PREPROCESSOR_CONFIG};
use image::RgbImage;

use crate::data::CropConfig;
use crate::data::crop::Square;
use crate::experiment::Experiment;
use crate::generate::{Generator, Person};

/// One photo of one person.
pub struct Portrait {
    /// Original photo.
    pub photo: RgbImage,
    /// Face box, x0 y0 x1 y1 in pixels.
    pub face_box: [f32; 4],
    /// Landmarks, 68 or 106 points in pixels.
    pub landmarks: Vec<[f32; 2]>,
    /// ID embedding, L2-normalised, 512 numbers.
    pub id_embedding: Vec<f32>,
}

/// Models for photos chosen by the user; the run's own by default.
#[derive(Debug, Clone, Default)]
pub struct PhotoModels {
    /// Folder of the CLIP image encoder.
    pub image_encoder: Option<PathBuf>,
    /// Folder of the image encoder's preprocessing; defaults to the image encoder's folder or `feature_extractor`
    /// beside it.
    pub feature_extractor: Option<PathBuf>,
    /// Folder of the face models' ONNX files.
    pub faces: Option<PathBuf>,
}

/// Models that analyse photos. The rest of a base model is not loaded.
pub struct PhotoReader {
    analyser: FaceAnalyser,
    image_encoder: ClipVisionModel,
    image_processor: ImageProcessor,
    mask: MaskConfig,
    crop: CropConfig,
    id_embedding_dim: usize,
    device: Device,
}

impl PhotoReader {
    /// Opens the models that `models` names, else those that the generator's run was trained with.
    ///
    /// # Errors
    /// Input: a model is not named, is missing or broken, or differs from the one that the hypernetwork was trained
    /// with.
    pub fn open(generator: &Generator, models: &PhotoModels) -> Result<Self> {
        let experiment = generator.experiment();
        let (faces, faces_from) = face_models(models, experiment)?;
        experiment.map_or(Ok(()), |experiment| experiment.check_faces(&faces, &faces_from))?;
        let encoder = image_encoder(models, experiment)?;
        let image_encoder = ClipVisionModel::load(&encoder, &generator.device)?;
        let (width, wanted) = (image_encoder.config().encoder.hidden_size, generator.config().clip_dim);
        if width != wanted {
            return Err(Error::file(
                &encoder,
                format!("gives states of width {width}, the hypernetwork reads {wanted}"),
                "give the image encoder that it was trained with; CLIP ViT-L/14 for the released weights",
            ));
        }
        Ok(Self {
            analyser: FaceAnalyser::load(&faces, &faces_from)?,
            image_encoder,
            image_processor: ImageProcessor::load(&feature_extractor(models, experiment, &encoder)?)?,
            mask: experiment.map(|experiment| experiment.data.mask).unwrap_or_default(),
            crop: experiment.map(|experiment| experiment.data.crop.clone()).unwrap_or_default(),
            id_embedding_dim: generator.config().id_embedding_dim,
            device: generator.device.clone(),
        })
    }

    /// Detects and measures the single face of a photo with the rules of data preparation: the whole photo is used, on
    /// white if transparent, and rotated if the face is not upright.
    ///
    /// # Errors
    /// Input: the file is not a photo, or shows no face or several.
    pub fn portrait(&mut self, path: &Path) -> Result<Portrait> {
        const REMEDY: &str = "give a whole PNG, JPEG, WebP, BMP or PGM file, or save the photo smaller";
        let limits = DecodeConfig::default();
        let bytes = read_regular(path, limits.max_bytes).map_err(|source| Error::read(path, source))?;
        let photo = limits
            .decode(&bytes)
            .map_err(|problem| Error::file(path, format!("cannot be decoded as a photo: {problem}"), REMEDY))?;
        let Upright { photo, faces, turned } = self.analyser.detect_upright(photo.pixels)?;
        if turned {
            tracing::info!("{}: rotated so that the face is upright", path.display());
        }
        let [face]: [Detection; 1] = faces.try_into().map_err(|found: Vec<Detection>| {
            Error::file(
                path,
                format!("shows {} faces, one is needed", found.len()),
                "give a photo of one person that shows the whole face, or cut it out first",
            )
        })?;
        let description = self.analyser.describe(&photo, &face)?;
        let id_embedding = description.id_embedding;
        if id_embedding.len() != self.id_embedding_dim {
            let (length, wanted) = (id_embedding.len(), self.id_embedding_dim);
            let problem = format!("gives ID embeddings of {length} numbers, the hypernetwork reads {wanted}");
            return Err(Error::input("face models", problem, "give the face models that it was trained with"));
        }
        Ok(Portrait { photo, face_box: face.face_box, landmarks: description.landmarks, id_embedding })
    }

    /// Encodes the photos to a person's conditions; `with_base` adds those of the Base-LoRA.
    pub fn person(&self, portraits: &[Portrait], with_base: bool) -> Person {
        let faces = portraits.iter().map(|portrait| mask::id_image(&portrait.photo, &portrait.landmarks, &self.mask));
        let values: Vec<f32> = portraits.iter().flat_map(|portrait| portrait.id_embedding.iter().copied()).collect();
        let shape = [portraits.len(), self.id_embedding_dim];
        let views = portraits.iter().map(|portrait| {
            let square = self.square(portrait);
            let view = square.cut(&portrait.photo, square.side);
            mask::base_image(&view, &square.points(&portrait.landmarks), &self.mask)
        });
        Person {
            clip_states: self.states(faces),
            id_embedding: Some(Tensor::from_data(TensorData::new(values, shape), &self.device)),
            base_states: with_base.then(|| self.states(views)),
        }
    }

    /// Returns the part of a photo that training would use on average.
    pub fn square(&self, portrait: &Portrait) -> Square {
        Square::middle(portrait.photo.dimensions(), portrait.face_box, &self.crop)
    }

    /// Image encoder states, `[N, T, D]`.
    fn states(&self, pictures: impl Iterator<Item = RgbImage>) -> Tensor<3> {
        let pictures: Vec<RgbImage> = pictures.collect();
        self.image_encoder.penultimate(self.image_processor.process(&pictures, &self.device))
    }
}

/// Returns the face models, and the folder that their paths are relative to.
fn face_models(models: &PhotoModels, experiment: Option<&Experiment>) -> Result<(FaceConfig, PathBuf)> {
    if let Some(folder) = &models.faces {
        let faces = FaceConfig { models: ConfigPath::new(folder), ..FaceConfig::default() };
        return Ok((faces, PathBuf::from(".")));
    }
    let Some(experiment) = experiment else {
        let problem = "is missing: the ID embedding must be that of the model that the weights were trained with";
        let remedy =
            "give the folder of the face models (antelopev2 for the released weights), or --features to `generate`";
        return Err(Error::input("--faces", problem, remedy));
    };
    let faces = experiment.faces.clone().ok_or_else(|| {
        let place = format!("{}: faces", experiment.origin());
        let remedy = "add `faces: {models: FOLDER}` to it, or give --faces";
        Error::input(place, "is missing: without face models no photo can be read", remedy)
    })?;
    Ok((faces, experiment.folder().into()))
}

fn image_encoder(models: &PhotoModels, experiment: Option<&Experiment>) -> Result<PathBuf> {
    match (&models.image_encoder, experiment) {
        (Some(folder), _) => Ok(folder.clone()),
        (None, Some(experiment)) => experiment.base.image_encoder_folder(experiment.folder()),
        (None, None) => Err(Error::input(
            "--image-encoder",
            "is missing: a HyperLoRA folder does not name its CLIP model",
            "give the folder of CLIP ViT-L/14 in transformers layout, or --features to `generate`",
        )),
    }
}

/// Locates the preprocessing that belongs to an image encoder.
fn feature_extractor(models: &PhotoModels, experiment: Option<&Experiment>, encoder: &Path) -> Result<PathBuf> {
    match (&models.feature_extractor, &models.image_encoder, experiment) {
        (Some(folder), ..) => Ok(folder.clone()),
        (None, None, Some(experiment)) => experiment.base.feature_extractor_folder(experiment.folder()),
        _ => {
            let places = [encoder.to_path_buf(), encoder.with_file_name("feature_extractor")];
            places.into_iter().find(|folder| folder.join(PREPROCESSOR_CONFIG).is_file()).ok_or_else(|| {
                let problem = format!("holds no {PREPROCESSOR_CONFIG}, nor does `feature_extractor` beside it");
                Error::file(encoder, problem, "give its folder as --feature-extractor")
            })
        }
    }
}
