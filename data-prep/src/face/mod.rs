//! Face detection, landmarks and embeddings with ONNX models.
//!
//! Pipeline of a face: [`detect`] finds a box and five points, [`landmark`] 68 or 106 points, [`align`] makes a 112 x
//! 112 portrait, [`embed`] the numbers that identify the person, and [`mask`] the two CLIP input images.
//!
//! All coordinates are continuous pixels of the photo: (0, 0) is the outer corner of the first pixel, (0.5, 0.5) its
//! centre.

pub mod align;
pub mod detect;
pub mod embed;
pub mod landmark;
pub mod mask;
mod model;
mod models;
mod onnx;
mod pixels;
mod sampling;
mod scrfd;
mod yunet;

use std::path::Path;
use std::sync::Once;

use hyperlora_core::config::ConfigPath;
use hyperlora_core::{Error, Result};
use image::RgbImage;
use image::imageops::{rotate90, rotate180, rotate270};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::face::detect::{Detector, LARGEST_SIDE};
use crate::face::embed::Embedder;
use crate::face::landmark::Landmarker;
use crate::face::model::Runtime;

pub use crate::face::detect::Detection;
pub use crate::face::models::FaceModels;

/// Models that find and measure faces. Everything has a default: the files that `ci/assets.sh` downloads.
///
/// The role of each model in a folder follows from its inputs and outputs. Name a file only if several fit a role.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FaceConfig {
    /// Folder of the ONNX files, such as insightface's antelopev2. Default: the files that `ci/assets.sh` downloads.
    pub models: ConfigPath,
    /// Ignored, with a warning: a file that comes with data or a run must not load a library. Only `ORT_DYLIB_PATH`
    /// names one.
    #[serde(skip_serializing)]
    #[schemars(extend("deprecated" = true))]
    pub runtime: Option<String>,
    /// File of the face detector: SCRFD with points, or YuNet (2023mar).
    pub detector: Option<String>,
    /// File of the landmark model: 106 points from 192 x 192 RGB, or 68 from 64 x 64 grey.
    pub landmarker: Option<String>,
    /// File of the ID embedder: 512 numbers from 112 x 112 RGB.
    pub embedder: Option<String>,
    /// File of the embedder that only evaluation uses: CurricularFace, SFace, or another that takes 112 x 112 RGB.
    pub independent_embedder: Option<String>,
    /// Lowest accepted score of a face, above 0 and below 1. Default: 0.5 with SCRFD, as in insightface, and 0.6 with
    /// YuNet.
    pub min_score: Option<f32>,
    /// Longest sides of the photo in the detector's input, 32 to 640 pixels, tried in this order until a face is found.
    /// The smaller ones are for faces that fill the photo.
    pub detector_sides: Vec<u32>,
}

impl Default for FaceConfig {
    fn default() -> Self {
        Self {
            models: ConfigPath::new("${HYPERLORA_CACHE:-~/.cache/hyperlora}/models"),
            runtime: None,
            detector: None,
            landmarker: None,
            embedder: None,
            independent_embedder: None,
            min_score: None,
            detector_sides: vec![640, 480, 320, 256],
        }
    }
}

impl FaceConfig {
    /// Checks the sizes and the score.
    ///
    /// # Errors
    /// Input, at `place`: a detector side or a score is out of its range.
    pub fn validate(&self, place: &str) -> Result<()> {
        let sides = &self.detector_sides;
        if sides.is_empty() || sides.iter().any(|side| !(32..=LARGEST_SIDE).contains(side)) {
            let problem = format!("{sides:?} is not a list of sides in 32..={LARGEST_SIDE}");
            return Err(Error::input(format!("{place}.detector_sides"), problem, "give e.g. [640, 480, 320, 256]"));
        }
        if let Some(score) = self.min_score
            && !(score > 0.0 && score < 1.0)
        {
            let problem = format!("{score} is not a score between 0 and 1");
            return Err(Error::input(format!("{place}.min_score"), problem, "give e.g. 0.6"));
        }
        Ok(())
    }
}

impl FaceConfig {
    /// Warns once that the library named in the YAML is not loaded.
    fn warn_of_runtime(&self) {
        static SAID: Once = Once::new();
        if let Some(library) = &self.runtime {
            SAID.call_once(|| {
                tracing::warn!(
                    "`runtime: {library}` of the face models is passed over: to load another ONNX Runtime than that of \
                     ci/assets.sh, set ORT_DYLIB_PATH to its path"
                );
            });
        }
    }
}

/// Description of a face: its landmarks and its identity.
#[derive(Debug, Clone, PartialEq)]
pub struct FaceDescription {
    /// Points in pixels of the photo: 68 in the order of the iBUG 300-W annotation, or insightface's 106.
    pub landmarks: Vec<[f32; 2]>,
    /// 512 numbers of length 1.
    pub id_embedding: Vec<f32>,
}

/// Photo with an upright face, and the faces in it.
#[derive(Debug, Clone)]
pub struct Upright {
    /// The photo.
    pub photo: RgbImage,
    /// Its faces, best score first.
    pub faces: Vec<Detection>,
    /// True if the photo was rotated.
    pub turned: bool,
}

/// Set of ONNX sessions with one thread each: make one per worker.
#[derive(Debug)]
pub struct FaceAnalyser {
    detector: Detector,
    landmarker: Landmarker,
    embedder: Embedder,
    /// Loaded on first use, because data preparation does not need it.
    independent: Option<Embedder>,
    models: FaceModels,
    runtime: Runtime,
}

impl FaceAnalyser {
    /// Loads ONNX Runtime (once per process) and the models. Relative paths of `config` start at `base_dir`.
    ///
    /// # Errors
    /// Input: the library or a model file is missing, broken, or not of the expected shape.
    pub fn load(config: &FaceConfig, base_dir: &Path) -> Result<Self> {
        config.validate("faces")?;
        config.warn_of_runtime();
        let models = FaceModels::find(config, base_dir)?;
        let runtime = Runtime::load()?;
        let sides = config.detector_sides.clone();
        Ok(Self {
            detector: Detector::load(&runtime, &models.detector, config.min_score, sides)?,
            landmarker: Landmarker::load(&runtime, &models.landmarker)?,
            embedder: Embedder::load(&runtime, &models.embedder)?,
            independent: None,
            models,
            runtime,
        })
    }

    /// Finds the faces of a photo, best score first.
    ///
    /// # Errors
    /// Fault: the model cannot be run. Input: it is not the expected model.
    pub fn detect(&mut self, photo: &RgbImage) -> Result<Vec<Detection>> {
        Ok(self.detector.detect(photo)?.0)
    }

    /// Finds the faces of a photo, and rotates it by quarter turns if that improves the score of its only face. A
    /// detector also finds faces that are sideways or upside down, but places their points as if they were upright, so
    /// the portrait would be embedded at a wrong angle. Its score reveals this, because it is highest for an upright
    /// face. With no face or several, the photo stays unchanged.
    ///
    /// # Errors
    /// As [`detect`](Self::detect).
    pub fn detect_upright(&mut self, photo: RgbImage) -> Result<Upright> {
        let (faces, side) = self.detector.detect(&photo)?;
        let [face] = &faces[..] else { return Ok(Upright { photo, faces, turned: false }) };
        if self.detector.is_surely_upright(face) {
            return Ok(Upright { photo, faces, turned: false });
        }
        let turns: [fn(&RgbImage) -> RgbImage; 3] = [rotate90, rotate180, rotate270];
        let (mut best, mut turned) = (face.score, None);
        for turn in turns {
            let view = turn(&photo);
            let score = self.detector.detect_at(&view, side)?.first().map_or(0.0, |face| face.score);
            if score > best {
                (best, turned) = (score, Some(view));
            }
        }
        Ok(match turned {
            Some(photo) => Upright { faces: self.detect(&photo)?, photo, turned: true },
            None => Upright { photo, faces, turned: false },
        })
    }

    /// Computes the landmarks and the ID embedding of one detected face.
    ///
    /// # Errors
    /// As [`detect`](Self::detect). Input also for a detection whose points all coincide.
    pub fn describe(&mut self, photo: &RgbImage, face: &Detection) -> Result<FaceDescription> {
        Ok(FaceDescription {
            landmarks: self.landmarker.locate(photo, face.face_box)?,
            id_embedding: self.embedder.embed(&align::portrait(photo, &face.points)?)?,
        })
    }

    /// Embeds a face with a model that training never uses, to measure likeness in evaluation: 512 numbers of
    /// CurricularFace or 128 of SFace, of length 1.
    ///
    /// # Errors
    /// As [`load`](Self::load) the first time, then as [`describe`](Self::describe).
    pub fn embed_independent(&mut self, photo: &RgbImage, face: &Detection) -> Result<Vec<f32>> {
        let portrait = align::portrait(photo, &face.points)?;
        let embedder = match self.independent.take() {
            Some(embedder) => embedder,
            None => Embedder::load(&self.runtime, self.models.independent()?)?,
        };
        self.independent.insert(embedder).embed(&portrait)
    }
}
