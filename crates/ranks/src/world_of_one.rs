//! Run of a single process: no data to send, no rank to wait for.

use std::time::Duration;

use burn::tensor::Tensor;
use hyperlora_core::Result;

use super::{Collective, Pending};

/// World of one rank. Every collective returns its input.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use hyperlora_ranks::{Collective, WorldOfOne};
///
/// let world = WorldOfOne::new();
/// assert!(world.is_main() && world.world_size() == 1);
/// let gradients = Tensor::<1>::from_floats([1.0, 2.0], &Device::flex());
/// let pending = world.all_reduce_mean("the gradients", gradients)?;
/// // Other work runs here, while the data travel.
/// let mean = pending()?;
/// assert_eq!(mean.dims(), [2]);
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug)]
pub struct WorldOfOne {
    hosts: [String; 1],
}

impl WorldOfOne {
    /// Makes the world of this process alone.
    pub fn new() -> Self {
        Self { hosts: ["this machine".into()] }
    }
}

impl Default for WorldOfOne {
    fn default() -> Self {
        Self::new()
    }
}

fn unchanged<'a>(tensor: Tensor<1>) -> Result<Pending<'a>> {
    Ok(Box::new(|| Ok(tensor)))
}

impl Collective for WorldOfOne {
    fn hosts(&self) -> &[String] {
        &self.hosts
    }

    fn all_reduce_mean<'a>(&'a self, _what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        unchanged(bucket)
    }

    fn reduce_scatter_mean<'a>(&'a self, _what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        unchanged(bucket)
    }

    fn all_gather<'a>(&'a self, _what: &'a str, part: Tensor<1>) -> Result<Pending<'a>> {
        unchanged(part)
    }

    fn broadcast<'a>(&'a self, _what: &'a str, tensor: Tensor<1>) -> Result<Pending<'a>> {
        unchanged(tensor)
    }

    fn exchange(&self, _what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![note.to_vec()])
    }

    fn barrier(&self, _what: &str, _deadline: Duration) -> Result<()> {
        Ok(())
    }
}
