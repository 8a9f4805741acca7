//! Embedding of an aligned portrait: numbers that identify the person.

use hyperlora_core::{Error, Result};
use image::RgbImage;

use crate::face::align::PORTRAIT;
use crate::face::model::{Model, Runtime};
use crate::face::models::{Kind, ModelFile};
use crate::face::pixels::Normalisation;

/// Embedder: a model with the format of its input and output.
#[derive(Debug)]
pub struct Embedder {
    model: Model,
    normalisation: Normalisation,
    output: String,
    length: usize,
}

impl Embedder {
    /// Loads an embedder of the ArcFace family, or SFace. Pixels are (x - 127.5) / 127.5, which equals CurricularFace's
    /// (x / 255 - 0.5) / 0.5, unless the model normalises them itself.
    pub(super) fn load(runtime: &Runtime, file: &ModelFile) -> Result<Self> {
        // The embedder of the free model set was trained with another scale.
        let scale = if file.path.ends_with("fr_feature.onnx") { 128.0 } else { 127.5 };
        Ok(Self {
            model: Model::load(runtime, &file.path)?,
            normalisation: Normalisation::of(&file.header, scale),
            output: file.header.outputs.iter().map(|output| output.name.clone()).collect(),
            length: if file.kind == Kind::Embedding128 { 128 } else { 512 },
        })
    }

    /// Returns the embedding of a 112 x 112 portrait, scaled to length 1.
    ///
    /// # Errors
    /// Fault: the model cannot be run, or returns only zeros. Input: it is not the expected model.
    pub(super) fn embed(&mut self, portrait: &RgbImage) -> Result<Vec<f32>> {
        let side = PORTRAIT as usize;
        let input = self.normalisation.planes(portrait, side); // [1, 3, 112, 112]
        let outputs = self.model.run([1, 3, side, side], input, &[(&self.output, self.length)])?;
        let mut embedding = outputs.concat();
        let length = embedding.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
        if length == 0.0 {
            return Err(Error::Fault(format!("{:?} gave an embedding of zeros", self.model)));
        }
        embedding.iter_mut().for_each(|x| *x /= length);
        Ok(embedding)
    }
}
