//! Reads a person from a file of features that other programs computed with CLIP and a face recognition model.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::weights::Weights;

use crate::generate::Person;
use crate::hypernet::HyperLoraConfig;

const CLIP_STATES: &str = "clip_hidden_states";
const ID_EMBEDDING: &str = "id_embedding";
const BASE_STATES: &str = "base_clip_hidden_states";

/// Tolerance of a normalised embedding's length, due to half precision.
const LENGTH_TOLERANCE: f32 = 5e-3;

/// Minimum length of an embedding with a meaningful direction.
const SHORTEST: f32 = 1e-6;

/// Reads a safetensors file with `clip_hidden_states` [N, T, clip_dim] (penultimate states of the masked faces),
/// `id_embedding` [N, E] and, for a Base-LoRA, `base_clip_hidden_states` [M, T, clip_dim]. The last two are optional.
/// ID embeddings are normalised to length 1, as in training, with a warning.
///
/// # Errors
/// Input, naming the file and the mismatch: shapes do not fit `config`, values are not finite, tensors have other
/// names, or an embedding has length 0.
pub fn read(path: &Path, config: &HyperLoraConfig, device: &Device) -> Result<Person> {
    let file = Weights::open(path, device)?;
    let count = |name: &str, axis: usize| file.shapes().get(name).and_then(|shape| shape.get(axis)).copied();
    let states = |name: &str, images: Option<usize>| {
        let images = images.or_else(|| count(name, 0)).unwrap_or(1).max(1);
        let tokens = count(name, 1).unwrap_or(1).max(1);
        file.at("").tensor(name, [images, tokens, config.clip_dim])
    };
    let clip_states: Tensor<3> = states(CLIP_STATES, None);
    let [images, ..] = clip_states.dims();
    let root = file.at("");
    let embedding = root.has(ID_EMBEDDING).then(|| root.tensor(ID_EMBEDDING, [images, config.id_embedding_dim]));
    let base_states = root.has(BASE_STATES).then(|| states(BASE_STATES, None));
    file.finish().map_err(|error| {
        let (clip, id) = (config.clip_dim, config.id_embedding_dim);
        error.with_remedy(format!(
            "give {CLIP_STATES} [N, T, {clip}], {ID_EMBEDDING} [N, {id}] and, for a Base-LoRA, {BASE_STATES} [M, T, {clip}]"
        ))
    })?;
    let id_embedding = embedding.map(|embedding| normalised(path, embedding)).transpose()?;
    Ok(Person { clip_states, id_embedding, base_states })
}

/// Normalises the rows of `[N, E]` to length 1.
fn normalised(path: &Path, embedding: Tensor<2>) -> Result<Tensor<2>> {
    let lengths = embedding.clone().square().sum_dim(1).sqrt(); // [N, 1]
    let data = lengths.to_data();
    let lengths_of_rows: Vec<f32> = data.iter().collect();
    if let Some(row) = lengths_of_rows.iter().position(|length| !(SHORTEST..f32::MAX).contains(length)) {
        return Err(Error::input(
            format!("{}: {ID_EMBEDDING}", path.display()),
            format!("row {row} has the length {}: it has no direction", lengths_of_rows[row]),
            "give the embeddings of faces",
        ));
    }
    if let Some(length) = lengths_of_rows.iter().find(|length| (*length - 1.0).abs() > LENGTH_TOLERANCE) {
        tracing::warn!("{}: {ID_EMBEDDING} has the length {length}; it is normalised to 1", path.display());
    }
    Ok(embedding / lengths)
}
