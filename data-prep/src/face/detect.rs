//! Face detection with either family of detectors.

use hyperlora_core::Result;
use image::RgbImage;

use crate::face::detection::Detection;
use crate::face::model::{Model, Runtime};
use crate::face::models::{Kind, ModelFile};
use crate::face::scrfd::Scrfd;
use crate::face::yunet::YuNet;

/// Detector with its settings.
#[derive(Debug)]
pub struct Detector {
    family: Family,
    min_score: f32,
    sides: Vec<u32>,
}

#[derive(Debug)]
enum Family {
    YuNet(YuNet),
    Scrfd(Scrfd),
}

impl Detector {
    /// Loads a detector. The default of `min_score` depends on its family.
    pub(super) fn load(runtime: &Runtime, file: &ModelFile, min_score: Option<f32>, sides: Vec<u32>) -> Result<Self> {
        let model = Model::load(runtime, &file.path)?;
        let (family, usual) = match file.kind {
            Kind::Scrfd => (Family::Scrfd(Scrfd::new(model, &file.header)), Scrfd::MIN_SCORE),
            _ => (Family::YuNet(YuNet::new(model)), YuNet::MIN_SCORE),
        };
        Ok(Self { family, min_score: min_score.unwrap_or(usual), sides })
    }

    /// Finds the faces of a photo, best score first, and returns the side at which they were found. If the first side
    /// shows none, tries smaller ones: a face that fills the photo is otherwise larger than those the model was trained
    /// on.
    ///
    /// # Errors
    /// Fault: the model cannot be run. Input: it is not the expected model.
    pub(super) fn detect(&mut self, photo: &RgbImage) -> Result<(Vec<Detection>, u32)> {
        let mut tried = 0;
        for side in self.sides.clone() {
            let side = match &self.family {
                Family::YuNet(_) => YuNet::side(side, photo),
                Family::Scrfd(scrfd) => scrfd.side(side),
            };
            if photo.is_empty() || side == tried {
                continue;
            }
            tried = side;
            let faces = self.detect_at(photo, side)?;
            if !faces.is_empty() {
                return Ok((faces, side));
            }
        }
        Ok((Vec::new(), tried))
    }

    /// Finds the faces with the photo's longest side scaled to `side` pixels of the model's input, best score first.
    ///
    /// # Errors
    /// As [`detect`](Self::detect).
    pub(super) fn detect_at(&mut self, photo: &RgbImage, side: u32) -> Result<Vec<Detection>> {
        match &mut self.family {
            Family::YuNet(yunet) => yunet.detect_at(photo, side, self.min_score),
            Family::Scrfd(scrfd) => scrfd.detect_at(photo, side, self.min_score),
        }
    }

    /// Tells whether a face with this score is certainly upright.
    pub(super) fn is_surely_upright(&self, face: &Detection) -> bool {
        match &self.family {
            Family::YuNet(_) => face.score >= YuNet::UPRIGHT_SCORE,
            Family::Scrfd(_) => false,
        }
    }
}
