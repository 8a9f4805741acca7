//! SCRFD (Guo et al. 2021, arXiv 2105.04714), preprocessed, decoded and filtered like insightface's `SCRFD`.

use hyperlora_core::Result;
use image::RgbImage;

use crate::face::detection::{Detection, SameFace};
use crate::face::model::Model;
use crate::face::onnx::Header;
use crate::face::pixels::Normalisation;
use crate::face::sampling::{Border, Sampling};

const SAME_FACE: SameFace = SameFace { overlap: 0.4, edge: 1.0 };
const NORMALISATION: Normalisation = Normalisation { shift: 127.5, scale: 128.0 };
/// Strides of anchors in pixels, with two anchors per place.
const THREE_LEVELS: &[usize] = &[8, 16, 32];
/// Strides of anchors in pixels, with one anchor per place.
const FIVE_LEVELS: &[usize] = &[8, 16, 32, 64, 128];

/// SCRFD detector.
#[derive(Debug)]
pub(super) struct Scrfd {
    model: Model,
    /// Output names: scores of all strides, then boxes, then points.
    outputs: Vec<String>,
    strides: &'static [usize],
    /// Anchors per place.
    anchors: usize,
    /// Side of the input, if the model supports only one.
    fixed_side: Option<u32>,
}

impl Scrfd {
    /// Default of the lowest accepted score.
    pub(super) const MIN_SCORE: f32 = 0.5;

    pub(super) fn new(model: Model, header: &Header) -> Self {
        let outputs: Vec<_> = header.outputs.iter().map(|output| output.name.clone()).collect();
        let (strides, anchors) =
            if outputs.len() == 3 * FIVE_LEVELS.len() { (FIVE_LEVELS, 1) } else { (THREE_LEVELS, 2) };
        let side = header.inputs.first().and_then(|input| input.shape.last().copied().flatten());
        Self { model, outputs, strides, anchors, fixed_side: side.and_then(|side| u32::try_from(side).ok()) }
    }

    /// Returns the longest side of photos in the input when `side` is requested.
    pub(super) fn side(&self, side: u32) -> u32 {
        self.fixed_side.map_or(side, |fixed| side.min(fixed))
    }

    /// Finds the faces with the photo's longest side scaled to `side` pixels, best first.
    pub(super) fn detect_at(&mut self, photo: &RgbImage, side: u32, min_score: f32) -> Result<Vec<Detection>> {
        let (width, height) = fitted(photo, side);
        let whole = [0.0, 0.0, photo.width() as f32, photo.height() as f32];
        let view = Sampling::of_box(whole, width, height).read_centres(photo, width, height, Border::Nearest);

        // Shape [1, 3, canvas, canvas], where the strides divide canvas.
        let largest = self.strides.last().copied().unwrap_or(1);
        let canvas = self.fixed_side.unwrap_or(side).next_multiple_of(largest as u32) as usize;
        let input = NORMALISATION.planes(&view, canvas);
        let counts = self.strides.iter().map(|stride| self.anchors * (canvas / stride).pow(2));
        let lengths = [1, 4, 10].into_iter().flat_map(|width| counts.clone().map(move |count| width * count));
        let wanted: Vec<_> = self.outputs.iter().map(String::as_str).zip(lengths).collect();
        let outputs = self.model.run([1, 3, canvas, canvas], input, &wanted)?;

        // As in insightface, one scale applies to both axes, and boxes are compared in pixels of the photo.
        let to_photo = [photo.height() as f32 / height as f32; 2];
        let levels = self.strides.len();
        let mut found = Vec::new();
        for (level, &stride) in self.strides.iter().enumerate() {
            let level = [&outputs[level], &outputs[level + levels], &outputs[level + 2 * levels]];
            let faces = decode(level.map(Vec::as_slice), stride, canvas / stride, self.anchors, min_score);
            found.extend(faces.into_iter().map(|face| face.scaled(to_photo)));
        }
        Ok(SAME_FACE.best_of_each(found))
    }
}

/// Returns the width and height of the photo with its longest side at `side`, rounded down.
fn fitted(photo: &RgbImage, side: u32) -> (u32, u32) {
    let (longest, ratio) = (f64::from(side), f64::from(photo.height()) / f64::from(photo.width()));
    if ratio > 1.0 { (((longest / ratio) as u32).max(1), side) } else { (side, ((longest * ratio) as u32).max(1)) }
}

/// Decodes the candidates of one stride. `scores` [n], `boxes` [n, 4] (distances to left, top, right, bottom) and
/// `points` [n, 10] (offsets) are in strides from the anchors. The anchors are at the corners of the cells, `anchors`
/// at each, row by row.
fn decode(
    [scores, boxes, points]: [&[f32]; 3],
    stride: usize,
    columns: usize,
    anchors: usize,
    min_score: f32,
) -> Vec<Detection> {
    let (boxes, _) = boxes.as_chunks::<4>();
    let (points, _) = points.as_chunks::<10>();
    let step = stride as f32;
    let mut found = Vec::new();
    for (index, (&score, (to_edges, to_points))) in scores.iter().zip(boxes.iter().zip(points)).enumerate() {
        if score < min_score {
            continue;
        }
        let cell = index / anchors;
        let (x, y) = ((cell % columns) as f32 * step, (cell / columns) as f32 * step);
        let [left, top, right, bottom] = to_edges.map(|distance| distance * step);
        let points = [0, 1, 2, 3, 4].map(|at| [x + to_points[2 * at] * step, y + to_points[2 * at + 1] * step]);
        found.push(Detection { face_box: [x - left, y - top, x + right, y + bottom], points, score });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_follows_the_definitions() {
        // A 2 x 2 grid with two anchors each; the second anchor of column 1, row 1 sees a face.
        let (mut scores, mut boxes, mut points) = ([0.1; 8], [0.0; 32], [0.0; 80]);
        scores[7] = 0.5;
        boxes[28..].copy_from_slice(&[1.0, 0.5, 2.0, 3.0]);
        points[70..].copy_from_slice(&[-0.5, 0.0, 1.0, 0.0, 0.25, 0.5, -0.5, 1.0, 1.0, 1.5]);
        let found = decode([&scores, &boxes, &points], 16, 2, 2, 0.5);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].face_box, [0.0, 8.0, 48.0, 64.0]);
        assert_eq!(found[0].points, [[8.0, 16.0], [32.0, 16.0], [20.0, 24.0], [8.0, 32.0], [32.0, 40.0]]);
    }

    #[test]
    fn photos_are_fitted_with_fractions_cut_off() {
        for (size, view) in [((150, 100), (96, 64)), ((100, 151), (63, 96)), ((80, 80), (96, 96)), ((9000, 1), (96, 1))]
        {
            assert_eq!(fitted(&RgbImage::new(size.0, size.1), 96), view, "{size:?}");
        }
    }
}
