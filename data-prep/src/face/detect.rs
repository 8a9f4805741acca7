//! Face detection: the common part of the detectors.

use hyperlora_core::Result;
use image::RgbImage;

use crate::face::model::{Model, Runtime};
use crate::face::models::{Kind, ModelFile};
use crate::face::scrfd::Scrfd;
use crate::face::yunet::YuNet;

/// Longest side of a detector's input, in pixels.
pub(super) const LARGEST_SIDE: u32 = 640;

/// Face found in a photo; coordinates in pixels of the photo.
#[derive(Debug, Clone, PartialEq)]
pub struct Detection {
    /// Box x0, y0, x1, y1; may reach beyond the photo.
    pub face_box: [f32; 4],
    /// Left eye, right eye, nose, left and right mouth corner, as the viewer sees them.
    pub points: [[f32; 2]; 5],
    /// Confidence of the detector, in 0..1.
    pub score: f32,
}

impl Detection {
    /// Scales the coordinates: one pixel becomes `sx` pixels wide and `sy` pixels high.
    pub(super) fn scaled(self, [sx, sy]: [f32; 2]) -> Self {
        let [x0, y0, x1, y1] = self.face_box;
        Self {
            face_box: [x0 * sx, y0 * sy, x1 * sx, y1 * sy],
            points: self.points.map(|[x, y]| [x * sx, y * sy]),
            score: self.score,
        }
    }
}

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

/// Criterion for two boxes that show the same face.
#[derive(Debug, Clone, Copy)]
pub(super) struct SameFace {
    /// They overlap by more than this share of their union.
    pub(super) overlap: f32,
    /// Pixels added to the distance between the two ends of a side: 1 includes the last pixel, 0 does not.
    pub(super) edge: f32,
}

impl SameFace {
    /// Non-maximum suppression: keeps the box with the best score among those of one face. Best first.
    pub(super) fn best_of_each(self, mut candidates: Vec<Detection>) -> Vec<Detection> {
        candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut kept: Vec<Detection> = Vec::new();
        for candidate in candidates {
            if kept.iter().all(|face| self.overlap(&face.face_box, &candidate.face_box) <= self.overlap) {
                kept.push(candidate);
            }
        }
        kept
    }

    /// Returns the intersection over union of two boxes.
    fn overlap(self, a: &[f32; 4], b: &[f32; 4]) -> f32 {
        let area = |[x0, y0, x1, y1]: [f32; 4]| (x1 - x0 + self.edge).max(0.0) * (y1 - y0 + self.edge).max(0.0);
        let common = area([a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])]);
        common / (area(*a) + area(*b) - common).max(f32::MIN_POSITIVE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_face_seen_twice_counts_once_and_the_best_score_stays() {
        let seen = |face_box, score| Detection { face_box, points: [[0.0; 2]; 5], score };
        let candidates = vec![
            seen([10.0, 10.0, 30.0, 30.0], 0.8),
            seen([12.0, 10.0, 32.0, 30.0], 0.9),
            seen([40.0, 40.0, 60.0, 60.0], 0.7),
        ];
        let kept = SameFace { overlap: 0.3, edge: 0.0 }.best_of_each(candidates);
        assert_eq!(kept.iter().map(|face| face.score).collect::<Vec<_>>(), [0.9, 0.7]);
    }

    #[test]
    fn overlap_is_the_common_part_of_the_union() {
        let (a, b) = ([0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]);
        let overlap = |edge| SameFace { overlap: 0.3, edge }.overlap(&a, &b);
        assert!((overlap(0.0) - 1.0 / 3.0).abs() < 1e-6);
        assert!((overlap(1.0) - 0.5).abs() < 1e-6);
    }

    #[test]
    fn scaling_back_is_per_axis() {
        let face = Detection { face_box: [1.0, 2.0, 3.0, 4.0], points: [[1.0, 1.0]; 5], score: 0.5 }.scaled([2.0, 3.0]);
        assert_eq!((face.face_box, face.points[4]), ([2.0, 6.0, 6.0, 12.0], [2.0, 3.0]));
    }
}
