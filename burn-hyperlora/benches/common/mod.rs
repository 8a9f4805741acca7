//! Shared parts of the comparisons with PyTorch: orders on stdin, answers on stdout, and batches as named tensors.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::Path;

use burn::tensor::TensorData;
use burn_hyperlora::conditioning::FrozenModels;
use burn_hyperlora::data::sample::Sample;
use burn_hyperlora::experiment::Experiment;
use hyperlora_core::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const STDIN: &str = "stdin";

/// Returns the arguments of the bench, without cargo's own, which begin with two dashes.
pub(crate) fn arguments() -> Vec<String> {
    std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect()
}

/// Reports that the files are written, then answers every line on stdin; `example` is such a line.
///
/// # Errors
/// Input: a line that is not an order. Also errors of `run`.
pub(crate) fn serve<Order: DeserializeOwned>(
    example: &str,
    mut run: impl FnMut(&Order) -> Result<Value>,
) -> Result<()> {
    answer(&json!({ "ready": true }))?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|source| Error::read(Path::new(STDIN), source))?;
        let order =
            serde_json::from_str(&line).map_err(|problem| Error::input(STDIN, problem, format!("give {example}")))?;
        answer(&run(&order)?)?;
    }
    Ok(())
}

fn answer(line: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|source| Error::write(Path::new("stdout"), source))
}

/// BatchSizes of a sample's parts.
pub(crate) struct BatchSizes {
    /// Side of the target pictures, in pixels.
    pub(crate) image: usize,
    /// Side of the condition images, in pixels.
    pub(crate) condition: usize,
    /// Shape of the latents, `[C, h, w]`.
    pub(crate) latent: [usize; 3],
    /// Number of elements of an ID embedding.
    pub(crate) id_embedding: usize,
}

impl BatchSizes {
    /// Returns the sizes of an experiment.
    ///
    /// # Errors
    /// Same as [`Base::vision`].
    pub(crate) fn of(experiment: &Experiment, base: &FrozenModels) -> Result<Self> {
        let image = experiment.data.image_size;
        Ok(Self {
            image,
            condition: base.vision()?.processor.side() as usize,
            latent: base.latent_shape(image),
            id_embedding: experiment.hyper_lora.id_embedding_dim,
        })
    }

    /// Converts a batch to its tensors by name.
    pub(crate) fn tensors(&self, samples: &[Sample]) -> BTreeMap<String, TensorData> {
        let &Self { image, condition, latent, id_embedding } = self;
        let count = samples.len();
        let stack = |of: fn(&Sample) -> &[f32], shape: &[usize]| {
            let values = samples.iter().map(of).collect::<Vec<_>>().concat();
            TensorData::new(values, [&[count], shape].concat())
        };
        let weight = |of: fn(&Sample) -> bool| {
            TensorData::new(samples.iter().map(|sample| f32::from(of(sample))).collect::<Vec<_>>(), [count])
        };
        let timesteps: Vec<i64> = samples.iter().map(|sample| sample.timestep.into()).collect();
        [
            ("pixels", stack(|sample| &sample.pixels.data, &[3, image, image])),
            (
                "id_pixels",
                stack(
                    |sample| sample.id_pixels.as_ref().map_or(&[], |planes| &planes.data),
                    &[3, condition, condition],
                ),
            ),
            ("base_pixels", stack(|sample| &sample.base_pixels.data, &[3, condition, condition])),
            ("id_embedding", stack(|sample| &sample.id_embedding, &[id_embedding])),
            ("posterior_noise", stack(|sample| &sample.posterior_noise, &latent)),
            ("noise", stack(|sample| &sample.noise, &latent)),
            ("time_ids", stack(|sample| &sample.time_ids, &[6])),
            ("timesteps", TensorData::new(timesteps, [count])),
            ("id_weight", weight(|sample| sample.request.scenario.id_lora())),
            ("base_weight", weight(|sample| sample.request.scenario.base_lora())),
        ]
        .map(|(name, data)| (name.to_string(), data))
        .into()
    }
}
