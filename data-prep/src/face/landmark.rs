//! The outline, brows, eyes, nose and mouth of a face: 68 points.

use std::path::Path;

use image::RgbImage;

use crate::error::Result;
use crate::face::model::{Model, Runtime};
use crate::face::sampling::{Border, Sampling};

/// Side of the model's view.
const SIDE: u32 = 64;
const POINTS: usize = 68;

/// The landmark model: the detector's box, stretched to 64 x 64 grey, gives points in fractions of that box.
#[derive(Debug)]
pub struct Landmarker {
    model: Model,
}

impl Landmarker {
    pub(super) fn load(runtime: &Runtime, file: &Path) -> Result<Self> {
        Ok(Self { model: Model::load(runtime, file, [1, 1, SIDE as usize, SIDE as usize])? })
    }

    /// The 68 points of the face in `face_box` (x0, y0, x1, y1), in pixels of the photo.
    ///
    /// # Errors
    /// Fault: the model cannot be run. Input: it is not the expected model.
    pub(super) fn locate(&mut self, photo: &RgbImage, face_box: [f32; 4]) -> Result<Vec<[f32; 2]>> {
        let view = Sampling::of_box(face_box, SIDE, SIDE).read(photo, SIDE, SIDE, Border::Nearest);
        // [1, 1, 64, 64], 0..1
        let grey = view.pixels().map(|pixel| {
            let [r, g, b] = pixel.0.map(f32::from);
            (0.299 * r + 0.587 * g + 0.114 * b) / 256.0
        });
        let [points] = self.model.run(grey.collect(), [("output", 2 * POINTS)])?;
        let [x0, y0, x1, y1] = face_box;
        let (points, _) = points.as_chunks::<2>();
        Ok(points.iter().map(|[x, y]| [x0 + x * (x1 - x0), y0 + y * (y1 - y0)]).collect())
    }
}
