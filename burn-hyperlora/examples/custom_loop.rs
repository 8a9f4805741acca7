//! Trains with a custom objective and a custom loop.
//!
//!     cargo run --release --example custom_loop -- experiments/quickstart/train.yaml
//!
//! The session reads the YAML, the shards and the frozen models, resumes from the latest checkpoint of `runs/NAME`, and
//! writes checkpoints, curves and pictures like `hyperlora train`.

use burn::tensor::{Device, Tensor};
use burn_hyperlora::conditioning::Conditions;
use burn_hyperlora::objective::Objective;
use burn_hyperlora::train::Session;
use hyperlora_core::{Error, Result};

/// Huber loss: quadratic up to an error of `delta`, linear beyond. Outliers weigh less than in the squared error.
struct Huber {
    delta: f32,
}

impl Objective for Huber {
    fn loss(&self, prediction: Tensor<4>, conditions: &Conditions) -> Tensor<1> {
        let error = (prediction - conditions.target.clone()).abs(); // [B, 4, h, w]
        let quadratic = error.clone().clamp_max(self.delta);
        let linear = error - quadratic.clone();
        (quadratic.square() * 0.5 + linear * self.delta).mean()
    }
}

fn main() -> Result<()> {
    let yaml = std::env::args().nth(1).ok_or_else(|| {
        Error::input("custom_loop", "takes the YAML of an experiment", "give experiments/quickstart/train.yaml")
    })?;
    let objective = Huber { delta: 0.5 };
    let mut session = Session::open(yaml, &Device::flex())?;
    while let Some(window) = session.next_window()? {
        let gradients = session.gradients(&window, &objective)?;
        println!(
            "step {}: loss {:.5}, gradient norm {:.3}",
            window.global_step,
            gradients.mean_loss(),
            gradients.norm()
        );
        // The YAML's schedule, at half the learning rate.
        session.apply(gradients, 0.5 * window.learning_rate)?;
    }
    println!("{:?}", session.outcome()?);
    Ok(())
}
