//! Time that a rank spends in its collectives.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use hyperlora_core::{Error, Result};

use super::{Collective, Pending};

/// World that measures the time this rank spends in its collectives: on the wire, and waiting for slower ranks.
///
/// Transfers that overlap with the rank's computation do not count, nor does work that a GPU still computes when a
/// collective starts.
pub struct Timed {
    world: Rc<dyn Collective>,
    spent: Cell<Duration>,
}

impl Timed {
    /// Wraps `world`, with the clock at zero.
    pub fn new(world: Rc<dyn Collective>) -> Self {
        Self { world, spent: Cell::default() }
    }

    /// Returns the time spent since the last call.
    pub fn take(&self) -> Duration {
        self.spent.take()
    }

    fn count<T>(&self, call: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = call();
        self.spent.set(self.spent.get() + start.elapsed());
        result
    }

    /// Measures a collective on `tensor`, from the moment the tensor is ready.
    fn pending<'b>(
        &'b self,
        tensor: Tensor<1>,
        begin: impl FnOnce(Tensor<1>) -> Result<Pending<'b>>,
    ) -> Result<Pending<'b>> {
        // The collective itself would wait for the tensor first.
        tensor.device().sync().map_err(|problem| Error::Fault(format!("the device failed: {problem:?}")))?;
        let pending = self.count(|| begin(tensor))?;
        Ok(Box::new(move || self.count(pending)))
    }
}

impl Collective for Timed {
    fn rank(&self) -> usize {
        self.world.rank()
    }

    fn world_size(&self) -> usize {
        self.world.world_size()
    }

    fn hosts(&self) -> &[String] {
        self.world.hosts()
    }

    fn all_reduce_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        self.pending(bucket, |bucket| self.world.all_reduce_mean(what, bucket))
    }

    fn reduce_scatter_mean<'a>(&'a self, what: &'a str, bucket: Tensor<1>) -> Result<Pending<'a>> {
        self.pending(bucket, |bucket| self.world.reduce_scatter_mean(what, bucket))
    }

    fn all_gather<'a>(&'a self, what: &'a str, part: Tensor<1>) -> Result<Pending<'a>> {
        self.pending(part, |part| self.world.all_gather(what, part))
    }

    fn broadcast<'a>(&'a self, what: &'a str, tensor: Tensor<1>) -> Result<Pending<'a>> {
        self.pending(tensor, |tensor| self.world.broadcast(what, tensor))
    }

    fn exchange(&self, what: &str, note: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.count(|| self.world.exchange(what, note))
    }

    fn barrier(&self, what: &str, deadline: Duration) -> Result<()> {
        self.count(|| self.world.barrier(what, deadline))
    }

    fn leave(&self) {
        self.world.leave();
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::WorldOfOne;

    #[test]
    fn results_pass_through_and_their_time_is_counted_once() {
        let device = Device::flex();
        let world = Timed::new(Rc::new(WorldOfOne::new()));
        assert_eq!(world.take(), Duration::ZERO);
        let bucket = Tensor::<1>::from_floats([1.0, 2.0], &device);
        let pending = world.all_reduce_mean("a test", bucket).unwrap();
        let begun = world.spent.get();
        let mean: Vec<f32> = pending().unwrap().into_data().iter().collect();
        assert_eq!(mean, [1.0, 2.0]);
        assert!(world.spent.get() > begun && begun > Duration::ZERO);
        assert_eq!(world.exchange("a test", b"note").unwrap(), [b"note"]);
        assert!(world.take() > begun);
        assert_eq!(world.take(), Duration::ZERO);
    }
}
