//! Face detection, landmarks and embeddings with ONNX models.
//!
//! Pipeline of a face: [`detect`] finds a box and five points, [`landmark`] 68 or 106 points, [`align`] makes a 112 x
//! 112 portrait, [`embed`] the numbers that identify the person, and [`mask`] the two CLIP input images.
//!
//! All coordinates are continuous pixels of the photo: (0, 0) is the outer corner of the first pixel, (0.5, 0.5) its
//! centre.

pub mod align;
mod config;
pub mod detect;
mod detection;
pub mod embed;
pub mod landmark;
mod library;
pub mod mask;
mod model;
mod models;
mod onnx;
mod pixels;
mod sampling;
mod scrfd;
mod yunet;

use std::path::Path;

use hyperlora_core::Result;
use image::RgbImage;
use image::imageops::{rotate90, rotate180, rotate270};

use crate::face::detect::Detector;
use crate::face::embed::Embedder;
use crate::face::landmark::Landmarker;
use crate::face::model::Runtime;

pub use crate::face::config::FaceConfig;
pub use crate::face::detection::Detection;
pub use crate::face::models::FaceModels;

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
///
/// # Examples
/// ```no_run
/// use std::path::Path;
/// use data_prep::face::{FaceAnalyser, FaceConfig};
/// use image::RgbImage;
///
/// # let photo = RgbImage::new(640, 480);
/// // The models that `launch/assets.sh` downloads.
/// let mut analyser = FaceAnalyser::load(&FaceConfig::default(), Path::new(""))?;
/// for face in analyser.detect(&photo)? {
///     let description = analyser.describe(&photo, &face)?;
///     println!("{:?}: {} numbers", face.face_box, description.id_embedding.len());
/// }
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
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
