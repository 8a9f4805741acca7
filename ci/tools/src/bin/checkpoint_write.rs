//! Measures a checkpoint's cost for training: how long a step waits for it, and how fast it is written, compared with
//! plain `dd` of as many bytes with an fsync in the same folder.
//!
//! cargo run -p hyperlora-tools --bin checkpoint_write -- FOLDER SITES ROUNDS

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, thread};

use burn::tensor::{Device, Tensor};
use burn_hyperlora::checkpoint::{CheckpointStore, CheckpointWriter, RankPart};
use burn_hyperlora::hypernet::{HyperLora, HyperLoraConfig, ParameterGroup};
use burn_hyperlora::optim::{GradientMap, OptimConfig, Optimizer, Sharding};
use burn_hyperlora::run::saved::{SavedState, Snapshot};
use burn_hyperlora::run::state::TrainState;
use burn_hyperlora::train::step::Learner;
use hyperlora_ranks::WorldOfOne;
use hyperlora_sdxl::lora::AttentionSite;

const MEGA: f64 = 1e6;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("give a folder on the disk to measure")?);
    let sites = arguments.next().map_or(Ok(40), |text| text.parse())?;
    let rounds: u64 = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let learner = learner(sites)?;
    let store = CheckpointStore::open(&folder.join("checkpoints"))?;
    let world = WorldOfOne::new();
    let mut writer = CheckpointWriter::new(store.clone(), Duration::from_mins(10));
    println!("{:>5}  {:>8}  {:>9}  {:>9}  {:>9}", "round", "MB", "stall", "written", "dd");
    for round in 1..=rounds {
        let state = SavedState {
            train: TrainState { global_step: round, ..TrainState::default() },
            taught: None,
            optimizer_steps: learner.optimizer.steps(),
            settings: serde_json::Value::Null,
        };
        let clock = Instant::now();
        let copy = || {
            let snapshot = Snapshot::take(&state, &learner.hyper_lora, &learner.optimizer, &world)?;
            Ok(move |part: &mut RankPart<'_>| snapshot.write(part))
        };
        writer.begin(&world, round, copy, || Ok(()))?;
        let stall = clock.elapsed().as_secs_f64();
        let mut in_steps = Duration::ZERO;
        let checkpoint = loop {
            let step = Instant::now();
            let placed = writer.advance(&world)?;
            in_steps = in_steps.max(step.elapsed());
            match placed {
                Some(checkpoint) => break checkpoint,
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        let written = clock.elapsed().as_secs_f64() - stall;
        let bytes: u64 = checkpoint.files()?.iter().map(|(_, bytes)| bytes).sum();
        store.prune(1, None, None)?;
        let dd = dd(&folder.join("dd"), bytes)?;
        let rate = |seconds: f64| format!("{:.0} MB/s", bytes as f64 / MEGA / seconds);
        let (megabytes, own, plain) = (bytes as f64 / MEGA, rate(written), rate(dd));
        println!("{round:>5}  {megabytes:>8.1}  {stall:>7.3} s  {own:>9}  {plain:>9}");
        println!("       longest look between steps: {:.1} ms", in_steps.as_secs_f64() * 1e3);
    }
    Ok(())
}

/// Creates a hypernetwork with the paper's ranks for `sites` wide attention modules, its ID-LoRA trained by one step.
fn learner(sites: usize) -> Result<Learner, Box<dyn Error>> {
    let device = Device::flex().autodiff();
    let sites: Vec<AttentionSite> = (0..sites)
        .map(|index| AttentionSite {
            path: format!("mid_block.attentions.0.transformer_blocks.{index}.attn1"),
            hidden_size: 1280,
            cross_attention_dim: None,
        })
        .collect();
    let hyper_lora = HyperLora::new(&HyperLoraConfig { basis: 16, ..HyperLoraConfig::default() }, &sites, 1, &device);
    let mut hyper_lora = hyper_lora.trainable(&[ParameterGroup::IdBases]);
    let mut nothing = Tensor::<1>::ones([1], &device).require_grad().sum().backward();
    let gradients = GradientMap::take(&hyper_lora, &mut nothing);
    let world = WorldOfOne::new();
    let mut optimizer = Optimizer::new(&OptimConfig::default(), &hyper_lora, Sharding::WHOLE);
    optimizer.accumulate(gradients)?;
    let reduced = optimizer.reduce(&world)?;
    optimizer.step(&mut hyper_lora, reduced, 1e-4, &world)?;
    Ok(Learner { hyper_lora, optimizer })
}

/// Measures the seconds that `dd` takes for `bytes`.
fn dd(path: &Path, bytes: u64) -> Result<f64, Box<dyn Error>> {
    let clock = Instant::now();
    let target = format!("of={}", path.display());
    let count = format!("count={}", bytes.div_ceil(1 << 20));
    let ended =
        Command::new("dd").args(["if=/dev/zero", &target, "bs=1M", &count, "conv=fsync", "status=none"]).status()?;
    let seconds = clock.elapsed().as_secs_f64();
    fs::remove_file(path)?;
    if ended.success() { Ok(seconds) } else { Err("dd failed".into()) }
}
