//! Optimiser step of a module of 4 and 16 MB, in f32 on the CPU:
//!
//! ```text
//! cargo bench --bench window
//! ```
//!
//! `step` accumulates the gradients of micro-batches, reduces them over the ranks, clips them and moves the weights.
#![expect(clippy::unwrap_used, reason = "a bench fails by panicking")]

use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor};
use burn_hyperlora::optim::{GradientMap, OptimConfig, Optimizer, Sharding};
use divan::Bencher;
use divan::counter::BytesCount;
use hyperlora_core::Result;
use hyperlora_ranks::WorldOfOne;

/// Sides of the module's matrix: 4 and 16 MB.
const SIDES: [usize; 2] = [1024, 2048];

fn main() {
    divan::main();
}

#[divan::bench(args = SIDES, consts = [1, 4])]
fn step<const MICRO_BATCHES: usize>(bencher: Bencher<'_, '_>, side: usize) {
    let mut bench = Bench::new(side);
    bencher.counter(BytesCount::of_many::<f32>(side * side)).bench_local(|| bench.step(MICRO_BATCHES).unwrap());
}

struct Bench {
    module: Linear,
    optimizer: Optimizer,
    config: OptimConfig,
    gradient: Tensor<1>,
}

impl Bench {
    fn new(side: usize) -> Self {
        let module = LinearConfig::new(side, side).with_bias(false).init(&Device::flex().autodiff());
        let config = OptimConfig::default();
        let optimizer = Optimizer::new(&config, &module, Sharding::WHOLE);
        Self { module, optimizer, config, gradient: Tensor::ones([side * side], &Device::flex()) }
    }

    fn step(&mut self, micro_batches: usize) -> Result<()> {
        let world = WorldOfOne::new();
        for _ in 0..micro_batches {
            let mut gradients = GradientMap::default();
            gradients.insert("weight", self.gradient.clone());
            self.optimizer.accumulate(gradients)?;
        }
        let gradients = self.optimizer.reduce(&world)?.clip(self.config.clip_norm);
        self.optimizer.step(&mut self.module, gradients, self.config.learning_rate, &world)
    }
}
