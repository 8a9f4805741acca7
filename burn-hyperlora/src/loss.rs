//! The training loss: the mean squared error of the UNet's prediction (DDPM, arXiv 2006.11239, equation 14).

use burn::tensor::Tensor;

use crate::error::{Error, Result};

/// Mean over the batch and all elements, as one number `[1]`; `prediction` and `target` are `[B, C, h, w]`.
pub fn mean_squared_error(prediction: Tensor<4>, target: Tensor<4>) -> Tensor<1> {
    (prediction - target).square().mean()
}

/// The same per sample, read to the host: one number for each of `[B, C, h, w]`.
///
/// # Errors
/// Fault when the device cannot give its data back.
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
    use super::*;
    use burn::tensor::Device;

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
