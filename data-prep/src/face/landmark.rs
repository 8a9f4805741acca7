//! Landmarks of a face (outline, brows, eyes, nose and mouth): 68 or 106 points.

use hyperlora_core::{Error, Result};
use image::RgbImage;

use crate::face::align::Similarity;
use crate::face::model::{Model, Runtime};
use crate::face::models::{Kind, ModelFile};
use crate::face::pixels::Normalisation;
use crate::face::sampling::{Border, Sampling};

/// Side of the input of the model with 68 points.
const SIDE_68: u32 = 64;
/// Side of the input of the model with 106 points.
const SIDE_106: u32 = 192;
/// Size of that input's square as a multiple of the face's box (insightface `Landmark.get`).
const MARGIN_106: f32 = 1.5;

/// Landmark model.
#[derive(Debug)]
pub struct Landmarker {
    model: Model,
    output: String,
    family: Family,
}

#[derive(Debug, Clone, Copy)]
enum Family {
    /// Takes the box, stretched to 64 x 64 grey, and returns points in fractions of the box.
    Grey68,
    /// Takes a square around the box's centre at 192 x 192, and returns points in -1..1 of it (insightface `Landmark`).
    Square106(Normalisation),
}

impl Landmarker {
    pub(super) fn load(runtime: &Runtime, file: &ModelFile) -> Result<Self> {
        let family = match file.kind {
            Kind::Landmarks106 => Family::Square106(Normalisation::of(&file.header, 128.0)),
            _ => Family::Grey68,
        };
        let output = file.header.outputs.iter().map(|output| output.name.clone()).collect();
        Ok(Self { model: Model::load(runtime, &file.path)?, output, family })
    }

    /// Locates the points of the face in `face_box` (x0, y0, x1, y1), in pixels of the photo.
    ///
    /// # Errors
    /// Fault: the model cannot be run. Input: it is not the expected model, or the box is empty.
    pub(super) fn locate(&mut self, photo: &RgbImage, face_box: [f32; 4]) -> Result<Vec<[f32; 2]>> {
        let [x0, y0, x1, y1] = face_box;
        if !(x1 > x0 && y1 > y0 && face_box.iter().all(|value| value.is_finite())) {
            return Err(Error::input("face", format!("its box {face_box:?} is empty"), "detect the face again"));
        }
        match self.family {
            Family::Grey68 => self.grey_68(photo, face_box),
            Family::Square106(normalisation) => self.square_106(photo, face_box, normalisation),
        }
    }

    fn grey_68(&mut self, photo: &RgbImage, face_box: [f32; 4]) -> Result<Vec<[f32; 2]>> {
        let view = Sampling::of_box(face_box, SIDE_68, SIDE_68).read(photo, SIDE_68, SIDE_68, Border::Nearest);
        // Shape [1, 1, 64, 64], values 0..1.
        let grey = view.pixels().map(|pixel| {
            let [r, g, b] = pixel.0.map(f32::from);
            (0.299 * r + 0.587 * g + 0.114 * b) / 256.0
        });
        let side = SIDE_68 as usize;
        let [x0, y0, x1, y1] = face_box;
        let points = self.points([1, 1, side, side], grey.collect(), 68)?;
        Ok(points.iter().map(|[x, y]| [x0 + x * (x1 - x0), y0 + y * (y1 - y0)]).collect())
    }

    fn square_106(
        &mut self,
        photo: &RgbImage,
        [x0, y0, x1, y1]: [f32; 4],
        normalisation: Normalisation,
    ) -> Result<Vec<[f32; 2]>> {
        let (side, half) = (SIDE_106 as usize, SIDE_106 as f32 / 2.0);
        let scale = SIDE_106 as f32 / ((x1 - x0).max(y1 - y0) * MARGIN_106);
        let shift = [half - (x0 + x1) / 2.0 * scale, half - (y0 + y1) / 2.0 * scale];
        let to_view = Similarity { a: scale, b: 0.0, shift };
        let input = normalisation.planes(&to_view.warp(photo, SIDE_106), side); // [1, 3, 192, 192]
        let points = self.points([1, 3, side, side], input, 106)?;
        let to_photo = to_view.inverse();
        Ok(points.iter().map(|point| to_photo.apply(point.map(|place| (place + 1.0) * half))).collect())
    }

    fn points(&mut self, shape: [usize; 4], input: Vec<f32>, count: usize) -> Result<Vec<[f32; 2]>> {
        let numbers = self.model.run(shape, input, &[(&self.output, 2 * count)])?.concat();
        let (points, _) = numbers.as_chunks::<2>();
        Ok(points.to_vec())
    }
}
