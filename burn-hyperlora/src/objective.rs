//! Training objectives: a loss for the LoRAs of a batch.

use burn::tensor::Tensor;
use hyperlora_core::{Error, Result};

use crate::conditioning::Conditions;

/// Loss of the UNet's prediction given its conditions. Implement it to train with a custom loss.
///
/// # Examples
/// ```
/// use burn::tensor::Tensor;
/// use burn_hyperlora::conditioning::Conditions;
/// use burn_hyperlora::objective::Objective;
///
/// /// Mean absolute error.
/// struct L1;
///
/// impl Objective for L1 {
///     fn loss(&self, prediction: Tensor<4>, conditions: &Conditions) -> Tensor<1> {
///         (prediction - conditions.target.clone()).abs().mean()
///     }
/// }
/// ```
pub trait Objective: Sync {
    /// Computes the loss of a batch, `[1]`.
    ///
    /// `prediction` is the UNet's output, `[B, 4, h, w]`. `conditions.input` and `conditions.target` are on the same
    /// autodiff device; `conditions.portraits` stay on the plain device. The losses of an optimiser step's batches are
    /// averaged, so the loss must be a mean over the batch. On a CPU, several threads call this at the same time.
    fn loss(&self, prediction: Tensor<4>, conditions: &Conditions) -> Tensor<1>;
}

/// Denoising loss of HyperLoRA (section 3.3) and SDXL: the mean squared error of the prediction (DDPM, arXiv
/// 2006.11239, equation 14).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Denoising;

impl Objective for Denoising {
    fn loss(&self, prediction: Tensor<4>, conditions: &Conditions) -> Tensor<1> {
        mean_squared_error(prediction, conditions.target.clone())
    }
}

/// Mean squared error over the batch and all elements, `[1]`; `prediction` and `target` are `[B, C, h, w]`.
pub fn mean_squared_error(prediction: Tensor<4>, target: Tensor<4>) -> Tensor<1> {
    (prediction - target).square().mean()
}

/// Mean squared error of each sample of `[B, C, h, w]`, on the host.
///
/// # Errors
/// Fault: the device fails to return its data.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_hyperlora::objective::per_sample;
///
/// let prediction = Tensor::ones([2, 4, 8, 8], &Device::flex());
/// let target = prediction.zeros_like();
/// assert_eq!(per_sample(prediction, target)?, [1.0, 1.0]);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn per_sample(prediction: Tensor<4>, target: Tensor<4>) -> Result<Vec<f32>> {
    let squares = (prediction - target).square().flatten::<2>(1, 3); // [B, C*h*w]
    let data = squares
        .mean_dim(1)
        .try_into_data()
        .map_err(|error| Error::Fault(format!("the loss cannot be read from the device: {error}")))?;
    Ok(data.iter::<f32>().collect())
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn the_batch_loss_is_the_mean_of_the_samples() -> Result<()> {
        let device = Device::flex();
        let prediction = Tensor::<4>::from_floats([[[[1.0, 2.0]]], [[[0.0, -1.0]]]], &device);
        let target = Tensor::<4>::from_floats([[[[0.0, 0.0]]], [[[0.0, 1.0]]]], &device);
        assert_eq!(per_sample(prediction.clone(), target.clone())?, [2.5, 2.0]);
        let batch: Vec<f32> = mean_squared_error(prediction, target).into_data().iter().collect();
        assert_eq!(batch, [2.25]);
        Ok(())
    }
}
