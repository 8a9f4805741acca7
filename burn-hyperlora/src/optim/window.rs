//! Accumulation window: gradients of one optimiser step, summed over its micro-batches in the flat buckets that travel.

use burn::tensor::Tensor;
use hyperlora_core::{Error, Result};

use super::buckets::Bucket;
use super::gradients::GradientMap;

/// Gradient sums of one step, one flat tensor per bucket.
///
/// If gradients travel between ranks, the memory of the buckets is allocated once: [`take_mean`](Self::take_mean) lends
/// it out and [`give_back`](Self::give_back) returns it for the next step.
pub(super) struct Window {
    travels: bool,
    sums: Vec<Option<Tensor<1>>>,
    micro_batches: usize,
}

impl Window {
    /// Creates an empty window. Gradients that do not travel (`travels`) are not packed: each parameter is its own
    /// bucket.
    pub(super) fn new(buckets: usize, travels: bool) -> Self {
        Self { travels, sums: vec![None; buckets], micro_batches: 0 }
    }

    /// Adds the gradients of one micro-batch.
    ///
    /// # Errors
    /// Fault: a parameter of the buckets has no gradient; the window must not be used afterwards.
    pub(super) fn add(&mut self, buckets: &[Bucket], mut gradients: GradientMap) -> Result<()> {
        let first = self.micro_batches == 0;
        for (bucket, place) in buckets.iter().zip(&mut self.sums) {
            for (path, range) in bucket.places() {
                // Gradients are removed one by one, so that each needs its memory only once.
                let gradient = gradients.remove(path);
                let gradient = gradient
                    .ok_or_else(|| Error::Fault(format!("the trainable parameter `{path}` has no gradient")))?;
                *place = Some(match place.take() {
                    Some(sum) if self.travels => {
                        let gradient = if first { gradient } else { sum.clone().slice(range.clone()) + gradient };
                        sum.slice_assign(range, gradient)
                    }
                    // Copies into new memory that can be overwritten: the gradient's own memory may be shared with
                    // another parameter.
                    None if self.travels => {
                        Tensor::zeros([bucket.len()], &gradient.device()).slice_assign(range, gradient)
                    }
                    Some(sum) if !first => sum + gradient,
                    _ => gradient,
                });
            }
        }
        self.micro_batches += 1;
        Ok(())
    }

    /// Returns the mean over the micro-batches added since the last call, bucket by bucket, and empties the window.
    pub(super) fn take_mean(&mut self) -> impl Iterator<Item = Tensor<1>> {
        let factor = 1.0 / std::mem::take(&mut self.micro_batches).max(1) as f64;
        let sums = self.sums.iter_mut().filter_map(Option::take);
        sums.map(move |sum| if factor < 1.0 { sum.mul_scalar(factor) } else { sum })
    }

    /// Returns the memory of bucket `index` to the window.
    pub(super) fn give_back(&mut self, index: usize, memory: Tensor<1>) {
        self.sums[index] = self.travels.then_some(memory);
    }
}
