//! YuNet (Wu et al. 2023, "YuNet: A Tiny Millisecond-level Face Detector"). The decoding follows the definitions of
//! OpenCV's `FaceDetectorYN`.

use hyperlora_core::Result;
use image::RgbImage;
use image::imageops::{self, FilterType};

use crate::face::detection::{Detection, SameFace};
use crate::face::model::Model;

/// Side of the model's square input.
const CANVAS: u32 = 640;
/// Largest scale of small photos: beyond that the detector sees only blur.
const MAX_ENLARGEMENT: f32 = 3.0;
const SAME_FACE: SameFace = SameFace { overlap: 0.3, edge: 0.0 };
/// Strides of the three anchor grids in pixels.
const STRIDES: [usize; 3] = [8, 16, 32];

/// YuNet detector.
#[derive(Debug)]
pub(super) struct YuNet {
    model: Model,
}

impl YuNet {
    /// Default of the lowest accepted score.
    pub(super) const MIN_SCORE: f32 = 0.6;
    /// Score from which a face is upright. Twenty faces of the ORL database and of portraits scored 0.92 to 0.95, and
    /// at most 0.90 after a turn of 90, 180 or 270 degrees.
    pub(super) const UPRIGHT_SCORE: f32 = 0.91;

    pub(super) fn new(model: Model) -> Self {
        Self { model }
    }

    /// Returns the longest side of this photo in the input when `side` is requested.
    pub(super) fn side(side: u32, photo: &RgbImage) -> u32 {
        let longest = photo.width().max(photo.height()) as f32;
        side.min((longest * MAX_ENLARGEMENT) as u32).clamp(1, CANVAS)
    }

    /// Finds the faces with the photo's longest side scaled to `side` pixels of the canvas, best first.
    pub(super) fn detect_at(&mut self, photo: &RgbImage, side: u32, min_score: f32) -> Result<Vec<Detection>> {
        let scale = side as f32 / photo.width().max(photo.height()) as f32;
        let fitted = |length: u32| ((length as f32 * scale).round() as u32).clamp(1, CANVAS);
        let (width, height) = (fitted(photo.width()), fitted(photo.height()));
        let view = imageops::resize(photo, width, height, FilterType::Triangle);

        // Shape [1, 3, 640, 640], BGR 0..255, black outside the photo.
        let canvas = CANVAS as usize;
        let mut input = vec![0.0; 3 * canvas * canvas];
        for (x, y, pixel) in view.enumerate_pixels() {
            let at = y as usize * canvas + x as usize;
            for (plane, value) in pixel.0.into_iter().rev().enumerate() {
                input[plane * canvas * canvas + at] = f32::from(value);
            }
        }
        let cells = STRIDES.map(|stride| (canvas / stride).pow(2));
        let outputs = self.model.run(
            [1, 3, canvas, canvas],
            input,
            &[
                ("cls_8", cells[0]),
                ("obj_8", cells[0]),
                ("bbox_8", 4 * cells[0]),
                ("kps_8", 10 * cells[0]),
                ("cls_16", cells[1]),
                ("obj_16", cells[1]),
                ("bbox_16", 4 * cells[1]),
                ("kps_16", 10 * cells[1]),
                ("cls_32", cells[2]),
                ("obj_32", cells[2]),
                ("bbox_32", 4 * cells[2]),
                ("kps_32", 10 * cells[2]),
            ],
        )?;
        let (levels, _) = outputs.as_chunks::<4>();
        let found = levels.iter().zip(STRIDES).flat_map(|(level, stride)| decode(level, stride, canvas, min_score));

        let to_photo = [photo.width() as f32 / width as f32, photo.height() as f32 / height as f32];
        let faces = SAME_FACE.best_of_each(found.collect()).into_iter().map(|face| face.scaled(to_photo));
        Ok(faces.collect())
    }
}

/// Decodes the candidates of one grid. `level` contains class score and objectness [n], box [n, 4] and points [n, 10]
/// of the n cells of a canvas with this stride, row by row. Offsets are in strides from the cell, sizes are logarithms
/// in strides.
fn decode(
    [class, object, boxes, points]: &[Vec<f32>; 4],
    stride: usize,
    canvas: usize,
    min_score: f32,
) -> Vec<Detection> {
    let (boxes, _) = boxes.as_chunks::<4>();
    let (points, _) = points.as_chunks::<10>();
    let (columns, step) = (canvas / stride, stride as f32);
    let mut found = Vec::new();
    for (cell, (class, object)) in class.iter().zip(object).enumerate() {
        let score = (class.clamp(0.0, 1.0) * object.clamp(0.0, 1.0)).sqrt();
        if score < min_score {
            continue;
        }
        let (column, row) = ((cell % columns) as f32, (cell / columns) as f32);
        let [dx, dy, log_width, log_height] = boxes[cell];
        let (x, y) = ((column + dx) * step, (row + dy) * step);
        let (half_width, half_height) = (log_width.exp() * step / 2.0, log_height.exp() * step / 2.0);
        let face_box = [x - half_width, y - half_height, x + half_width, y + half_height];
        let points = [0, 1, 2, 3, 4]
            .map(|point| [(column + points[cell][2 * point]) * step, (row + points[cell][2 * point + 1]) * step]);
        if face_box.iter().all(|value| value.is_finite()) {
            found.push(Detection { face_box, points, score });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a level of a 32-pixel canvas with stride 8 (4 x 4 cells), where two neighbouring cells see the same face.
    fn level() -> [Vec<f32>; 4] {
        let (mut class, mut object) = (vec![0.1; 16], vec![0.2; 16]);
        let (mut boxes, mut points) = (vec![0.0; 64], vec![0.0; 160]);
        for (cell, sure, dx) in [(6, 0.81, 0.25), (5, 0.64, 1.25)] {
            class[cell] = sure;
            object[cell] = 1.0;
            boxes[4 * cell..4 * cell + 4].copy_from_slice(&[dx, 0.5, 2.0_f32.ln(), 3.0_f32.ln()]);
            points[10 * cell..10 * cell + 10].copy_from_slice(&[-0.5, 0.0, 1.0, 0.0, 0.25, 0.5, -0.5, 1.0, 1.0, 1.5]);
        }
        [class, object, boxes, points]
    }

    #[test]
    fn decoding_follows_the_definitions() {
        let found = decode(&level(), 8, 32, 0.5);
        assert_eq!(found.len(), 2);
        // Cell 6 is column 2, row 1: centre ((2 + 0.25) * 8, (1 + 0.5) * 8) = (18, 12), size 16 x 24.
        let face = &found[1];
        assert!((face.score - 0.9).abs() < 1e-6);
        for (got, want) in face.face_box.iter().zip([10.0, 0.0, 26.0, 24.0]) {
            assert!((got - want).abs() < 1e-4, "{:?}", face.face_box);
        }
        assert_eq!(face.points, [[12.0, 8.0], [24.0, 8.0], [18.0, 12.0], [12.0, 16.0], [24.0, 20.0]]);
        assert_eq!(decode(&level(), 8, 32, 0.85).len(), 1);
    }
}
