//! Measures the memory of the optimiser state on each of this many ranks (ZeRO stage 1), compared with the formula of
//! `hyperlora plan`: the buffers in use, and the growth of the process. The main rank prints one JSON object.
//!
//!     mpirun -n 4 target/release/optimizer_memory [SITES]
//!
//! `ci/bench/optimizer_memory.sh` runs it on 1, 2 and 4 ranks.

use std::process::ExitCode;
use std::time::Duration;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use burn_hyperlora::hypernet::{HyperLora, HyperLoraConfig, ParameterGroup};
use burn_hyperlora::metrics::ProcessMemory;
use burn_hyperlora::optim::{GradientMap, OptimConfig, Optimizer, Sharding, Wire};
use burn_hyperlora::parameters::ParameterVisitor;
use hyperlora_core::{Error, Result};
use hyperlora_ranks::{Collective, run_as_rank};
use hyperlora_sdxl::lora::AttentionSite;
use serde_json::json;

fn main() -> ExitCode {
    run_as_rank(Duration::from_mins(1), measure)
}

fn measure(world: &dyn Collective) -> Result<()> {
    let sites = std::env::args().nth(1).map_or(Ok(8), |text| text.parse());
    let sites: usize = sites.map_err(|error| Error::input("SITES", error, "give a number of attentions"))?;
    let mut hyper_lora = hypernetwork(sites);
    let mut trainable = Trainable(0);
    hyper_lora.visit_parameters(&mut trainable);
    // A loss that depends on nothing gives zero gradients.
    let mut nothing = Tensor::<1>::ones([1], &Device::flex().autodiff()).require_grad().sum().backward();
    let gradients = GradientMap::take(&hyper_lora, &mut nothing);
    let mut optimizer = Optimizer::new(&OptimConfig::default(), &hyper_lora, Sharding::of(world, true, Wire::F32));
    optimizer.accumulate(gradients)?;
    let reduced = optimizer.reduce(world)?;
    let before = resident();
    optimizer.step(&mut hyper_lora, reduced, 1e-4, world)?;
    let grown = resident().saturating_sub(before);
    let held = optimizer.state_bytes();
    let notes = world.exchange("the bytes of all ranks", bytemuck::bytes_of(&[held, grown]))?;
    let of_ranks = |place: usize| -> Vec<u64> {
        notes.iter().filter_map(|note| note.as_chunks().0.get(place).copied().map(u64::from_le_bytes)).collect()
    };
    if world.is_main() {
        let ranks = world.world_size() as u64;
        let planned = (2 * 4 * trainable.0).div_ceil(ranks);
        println!("{}", json!({"ranks": ranks, "planned": planned, "held": of_ranks(0), "grown": of_ranks(1)}));
    }
    Ok(())
}

/// Creates a hypernetwork with the paper's ranks for some wide attention modules. The bases of its ID-LoRA train.
fn hypernetwork(sites: usize) -> HyperLora {
    let site = |index| AttentionSite {
        path: format!("mid_block.attentions.0.transformer_blocks.{index}.attn1"),
        hidden_size: 1280,
        cross_attention_dim: None,
    };
    let config = HyperLoraConfig { basis: 16, ..HyperLoraConfig::default() };
    let sites: Vec<AttentionSite> = (0..sites).map(site).collect();
    HyperLora::new(&config, &sites, 1, &Device::flex().autodiff()).trainable(&[ParameterGroup::IdBases])
}

/// Number of trained parameters.
struct Trainable(u64);

impl ParameterVisitor for Trainable {
    fn visit<const D: usize>(&mut self, _name: &str, parameter: &Param<Tensor<D>>) {
        if parameter.is_require_grad() {
            self.0 += parameter.val().shape().num_elements() as u64;
        }
    }
}

/// ProcessMemory of this process in bytes.
fn resident() -> u64 {
    ProcessMemory::now().map_or(0, |memory| memory.resident)
}
