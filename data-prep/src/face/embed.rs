//! From an aligned portrait to numbers that identify the person.

use std::path::Path;

use image::RgbImage;

use crate::error::{Error, Result};
use crate::face::align::PORTRAIT;
use crate::face::model::{Model, Runtime};

/// An embedder: what its model wants and gives.
#[derive(Debug)]
pub struct Embedder {
    model: Model,
    /// The model sees (x - shift) / scale.
    shift: f32,
    scale: f32,
    output: &'static str,
    length: usize,
}

impl Embedder {
    /// The 512-d model whose embedding conditions the hypernetwork (ArcFace conventions).
    pub(super) fn identity(runtime: &Runtime, file: &Path) -> Result<Self> {
        let model = Model::load(runtime, file, SHAPE)?;
        Ok(Self { model, shift: 127.5, scale: 128.0, output: "output", length: 512 })
    }

    /// SFace, 128-d, which only evaluation uses. It normalises the pixels itself.
    pub(super) fn independent(runtime: &Runtime, file: &Path) -> Result<Self> {
        let model = Model::load(runtime, file, SHAPE)?;
        Ok(Self { model, shift: 0.0, scale: 1.0, output: "fc1", length: 128 })
    }

    /// The embedding of a 112 x 112 portrait, scaled to length 1.
    ///
    /// # Errors
    /// Fault: the model cannot be run, or gives nothing but zeros. Input: it is not the expected model.
    pub(super) fn embed(&mut self, portrait: &RgbImage) -> Result<Vec<f32>> {
        // [1, 3, 112, 112], RGB
        let input = (0..3)
            .flat_map(|channel| portrait.pixels().map(move |pixel| pixel.0[channel]))
            .map(|value| (f32::from(value) - self.shift) / self.scale)
            .collect();
        let [mut embedding] = self.model.run(input, [(self.output, self.length)])?;
        let length = embedding.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
        if length == 0.0 {
            return Err(Error::Fault(format!("{:?} gave an embedding of zeros", self.model)));
        }
        embedding.iter_mut().for_each(|x| *x /= length);
        Ok(embedding)
    }
}

const SHAPE: [usize; 4] = [1, 3, PORTRAIT as usize, PORTRAIT as usize];
