//! Compares the counts with torch's (`ci/parity/plan_flops.py`) and with the real modules.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use hyperlora_core::config::ConfigPath;
use hyperlora_ranks::WorldOfOne;
use hyperlora_sdxl::lora::AttentionSite;
use hyperlora_sdxl::source::configs;
use serde_json::Value;

use super::*;
use crate::checkpoint::CheckpointStore;
use crate::conditioning::{BaseConfig, FrozenModels};
use crate::hypernet::{HyperLora, ParameterGroup, Stage};
use crate::optim::{GradientMap, Optimizer, Sharding, Wire};
use crate::parameters::ParameterVisitor;
use crate::plan::architecture::Architecture;
use crate::plan::hardware::{Hops, between_machines};
use crate::run::saved::{SavedState, Snapshot};
use crate::run::state::TrainState;
use crate::train::config::StageEntry;
use crate::train::step::Learner;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Looks up torch's count: `counted("sdxl", "vae 1024", "forward")`.
fn counted(base: &str, part: &str, what: &str) -> u128 {
    let text = std::fs::read_to_string(root().join("crates/testing/fixtures/plan/flops.json")).unwrap();
    let found: Value = serde_json::from_str(&text).unwrap();
    found[base][part][what].as_u64().unwrap().into()
}

fn architecture(path: &str) -> Architecture {
    let base = BaseConfig::new(ConfigPath::new(path));
    Architecture::read(&base, &root()).unwrap()
}

const SMALL: &str = "experiments/quickstart/base";

fn cluster(gpus: u64) -> Cluster {
    let gpu: Gpu = "a100-80g".parse().unwrap();
    let link = between_machines(&gpu, &"25GB/s".parse().unwrap(), 8).unwrap();
    let hops = Hops::of_nccl(&gpu);
    Cluster { gpu, gpus, memory: gpu.memory_mib << 20, link, hops, utilisation: gpu.utilisation }
}

fn setup(yaml: &str, gpus: u64) -> Setup {
    let experiment = Experiment::load(&root().join("experiments").join(yaml)).unwrap();
    Setup::read(&experiment, cluster(gpus), None).unwrap()
}

#[test]
fn parameters_are_those_of_diffusers_and_transformers() {
    for (base, architecture) in [("sdxl", architecture("no/such/folder")), ("small", architecture(SMALL))] {
        let Architecture { unet, vae, text, vision, .. } = &architecture;
        let whole = |encoder: encoders::Encoder| u128::from(encoder.held + encoder.left_out);
        let unet_at = if base == "sdxl" { "unet 128x128" } else { "unet 8x8" };
        let vae_at = if base == "sdxl" { "vae 1024" } else { "vae 64" };
        for (name, parameters) in [
            (unet_at, u128::from(unet::parameters(unet))),
            (vae_at, whole(encoders::autoencoder(vae, 64))),
            ("text_encoder", whole(encoders::text(&text[0], false))),
            ("text_encoder_2", whole(encoders::text(&text[1], true))),
            ("image_encoder", whole(encoders::vision(vision))),
        ] {
            assert_eq!(parameters, counted(base, name, "parameters"), "{base} {name}");
        }
    }
}

#[test]
fn operations_are_those_of_torch() {
    for (base, architecture) in [("sdxl", architecture("no/such/folder")), ("small", architecture(SMALL))] {
        let Architecture { unet, vae, text, vision, .. } = &architecture;
        let sizes = if base == "sdxl" { [[128, 128], [64, 64]] } else { [[8, 8], [9, 7]] };
        for size in sizes {
            let name = format!("unet {}x{}", size[0], size[1]);
            assert_eq!(unet::forward(unet, size, 0).forward(), counted(base, &name, "forward"), "{base} {name}");
            let flops = unet::forward(unet, size, 12);
            assert_eq!(flops.forward(), counted(base, &name, "forward with LoRA"), "{base} {name}");
            assert_eq!(flops.backward(), counted(base, &name, "backward"), "{base} {name}");
        }
        let side = if base == "sdxl" { 1024 } else { 64 };
        for (name, flops) in [
            (format!("vae {side}"), encoders::autoencoder(vae, side).flops),
            ("text_encoder".into(), encoders::text(&text[0], false).flops),
            ("text_encoder_2".into(), encoders::text(&text[1], true).flops),
            ("image_encoder".into(), encoders::vision(vision).flops),
        ] {
            assert_eq!(flops, counted(base, &name, "forward"), "{base} {name}");
        }
    }
}

#[test]
fn operations_of_the_hypernetwork_are_those_of_torch() {
    let setup = setup("sdxl/id-embedding.yaml", 16);
    let sites = setup.sites();
    let sizes = setup.sizes(&sites);
    let base = counted("hypernetwork", "base", "forward");
    for (stage, name) in [(Stage::Base, "base"), (Stage::IdClip, "id_clip"), (Stage::IdEmbedding, "id_embedding")] {
        let flops = sizes.flops(stage);
        assert_eq!(flops.trained, counted("hypernetwork", name, "forward"), "{name}");
        assert_eq!(flops.resting, if stage == Stage::Base { 0 } else { base }, "{name}");
        // The backward pass costs twice the forward pass, minus the gradients of the inputs.
        let backward = counted("hypernetwork", name, "backward") as f64 / flops.trained as f64;
        assert!((1.9..=2.0).contains(&backward), "{name}: {backward}");
    }
}

#[test]
fn a_lora_costs_its_ranks_and_recomputation_what_follows_the_first_of_them() {
    let config = architecture("no/such/folder").unet;
    let size = [128, 128];
    let bare = unet::forward(&config, size, 0).forward();
    let per_rank = unet::forward(&config, size, 1).forward() - bare;
    assert_eq!(unet::forward(&config, size, 12).forward(), bare + 12 * per_rank);
    let kept = unet::training(&config, size, 12, false);
    let recomputed = unet::training(&config, size, 12, true);
    assert_eq!(kept.recompute, 0);
    assert_eq!((kept.forward, kept.backward), (recomputed.forward, recomputed.backward));
    // down_blocks.0 and the layers around it precede the first LoRA.
    let share = recomputed.recompute as f64 / recomputed.forward as f64;
    assert!((0.95..1.0).contains(&share), "{share}");
}

/// Counts the parameters of a real hypernetwork, by group.
fn counted_by_group(hyper_lora: &HyperLora) -> BTreeMap<ParameterGroup, u64> {
    struct Count(BTreeMap<ParameterGroup, u64>);
    impl ParameterVisitor for Count {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            let group = ParameterGroup::of(name).unwrap();
            *self.0.entry(group).or_default() += parameter.shape().num_elements() as u64;
        }
    }
    let mut count = Count(BTreeMap::new());
    hyper_lora.visit_parameters(&mut count);
    count.0
}

#[test]
fn the_quickstart_is_what_was_planned() {
    let setup = setup("quickstart/train.yaml", 1);
    let plan = setup.plan();
    let base = BaseConfig::new(ConfigPath::new(root().join(SMALL)));
    let device = Device::flex().autodiff();
    let base = FrozenModels::load(&base, Path::new(""), &Device::flex()).unwrap();
    let real = base.unet.attention_sites();
    let sizes = |site: &AttentionSite| (site.hidden_size, site.cross_attention_dim);
    assert_eq!(setup.sites().iter().map(sizes).collect::<Vec<_>>(), real.iter().map(sizes).collect::<Vec<_>>());

    let hyper_lora = HyperLora::new(&setup.hyper_lora, real, 1, &device);
    let groups = counted_by_group(&hyper_lora);
    assert_eq!(groups.len(), ParameterGroup::ALL.len());
    for part in &plan.trainable {
        assert_eq!(part.parameters, groups[&part.name.parse().unwrap()], "{}", part.name);
    }
    assert_eq!(plan.trainable.iter().map(|part| part.parameters).sum::<u64>(), hyper_lora.num_params() as u64);

    for (entry, stage) in setup.train.stages.iter().zip(&plan.stages) {
        let (gradient_bytes, file_bytes) = trained(hyper_lora.clone(), entry, &device);
        assert_eq!(stage.gradient_bytes, gradient_bytes, "{}", stage.name);
        // Headers and state.json are not counted; at this size their share is largest.
        let excess = file_bytes as f64 / stage.checkpoint_bytes as f64 - 1.0;
        assert!((0.0..0.01).contains(&excess), "{}: {excess}", stage.name);
    }
}

/// Measures a stage's gradients and the files of a checkpoint written after a step, in bytes.
fn trained(hyper_lora: HyperLora, entry: &StageEntry, device: &Device) -> (u64, u64) {
    let mut hyper_lora = hyper_lora.trainable(&entry.config().groups);
    // A loss that depends on nothing gives zero gradients for all trained parameters.
    let mut nothing = Tensor::<1>::ones([1], device).require_grad().sum().backward();
    let gradients = GradientMap::take(&hyper_lora, &mut nothing);
    let gradient_bytes = gradients.iter().map(|(_, gradient)| 4 * gradient.shape().num_elements() as u64).sum();
    let world = WorldOfOne::new();
    let mut optimizer = Optimizer::new(&entry.config().optim, &hyper_lora, Sharding::WHOLE);
    optimizer.accumulate(gradients).unwrap();
    let reduced = optimizer.reduce(&world).unwrap();
    optimizer.step(&mut hyper_lora, reduced, 1e-4, &world).unwrap();
    let learner = Learner { hyper_lora, optimizer };

    let folder = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(folder.path()).unwrap();
    let state = SavedState {
        train: TrainState::default(),
        taught: Some(entry.kind()),
        optimizer_steps: learner.optimizer.steps(),
        settings: Value::Null,
    };
    let snapshot = Snapshot::take(&state, &learner.hyper_lora, &learner.optimizer, &world).unwrap();
    let written = store.write(0, |part| snapshot.write(part)).unwrap();
    (gradient_bytes, bytes_below(written.path()))
}

fn bytes_below(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap().map(std::io::Result::unwrap);
    let size = |entry: std::fs::DirEntry| match entry.metadata().unwrap() {
        metadata if metadata.is_dir() => bytes_below(&entry.path()),
        metadata => metadata.len(),
    };
    entries.map(size).sum()
}

#[test]
fn the_papers_setting_has_the_papers_sizes_and_days() {
    let plans = ["base", "id-clip", "id-embedding"].map(|name| setup(&format!("sdxl/{name}.yaml"), 16).plan());
    for plan in &plans {
        assert_eq!((plan.global_batch, plan.micro_batch, plan.accumulation), (512, 4, 8), "{}", plan.experiment);
        assert_eq!(plan.attention_modules, 140);
        assert!(plan.fits, "{plan}");
        let part = |name| plan.trainable.iter().find(|part| part.name == name).unwrap().parameters;
        assert_eq!((part("id_bases"), part("base_bases")), (1_486_356_480, 743_178_240));
    }
    let steps = plans.each_ref().map(|plan| plan.stages.iter().map(|stage| stage.steps).sum::<u64>());
    assert_eq!(steps, [20_000, 15_000, 55_000]);
    let days: f64 = plans.iter().map(|plan| plan.days).sum();
    assert!((6.0..16.0).contains(&days), "{days}");
}

#[test]
fn traffic_is_that_of_a_ring() {
    let stage = &setup("sdxl/id-clip.yaml", 16).plan().stages[0];
    assert_eq!(stage.gradient_bytes, 4 * stage.trainable);
    assert_eq!(stage.sent_bytes, 2.0 * 15.0 / 16.0 * stage.gradient_bytes as f64);
    let hops = stage.gradient_bytes.div_ceil(16 << 20) as f64 * (28.0 * 3.4e-6 + 2.0 * 14e-6);
    assert!(((stage.all_reduce_seconds - hops) * 200e9 - stage.sent_bytes).abs() < 1e3);
    assert_eq!(stage.memory.moments_sharded, stage.memory.moments / 16);
    let mut halved = setup("sdxl/id-clip.yaml", 16);
    halved.train.wire = Wire::Bf16;
    assert_eq!(halved.plan().stages[0].sent_bytes, 0.75 * stage.sent_bytes);
    let alone = &setup("sdxl/id-clip.yaml", 1).plan().stages[0];
    assert_eq!((alone.sent_bytes, alone.all_reduce_seconds), (0.0, 0.0));
    assert_eq!(alone.memory.peak_sharded(), alone.memory.peak());
}

#[test]
fn one_card_of_24_gb_holds_a_smaller_basis_alone() {
    for yaml in ["sdxl/one-gpu-24g.yaml", "sdxl/one-step-24g.yaml"] {
        let mut setup = setup(yaml, 1);
        for name in ["rtx-4090", "rtx-3090"] {
            setup.cluster.gpu = name.parse().unwrap();
            setup.cluster.memory = setup.cluster.gpu.memory_mib << 20;
            let plan = setup.plan();
            assert!(plan.fits && plan.advice.is_empty(), "{plan}");
        }
        setup.hyper_lora.basis = 128;
        let plan = setup.plan();
        assert!(!plan.fits);
        assert!(plan.advice.iter().any(|line| line.starts_with("hyper_lora.basis: 32")), "{:?}", plan.advice);
        assert!(plan.to_string().contains("DOES NOT FIT"));
    }
}

#[test]
fn every_knob_is_named_where_it_helps() {
    let mut setup = setup("sdxl/id-clip.yaml", 16);
    setup.cluster.memory = 16 << 30;
    setup.train.recompute = false;
    setup.architecture.unet_dtype = burn::tensor::FloatDType::F32;
    let advice = setup.plan().advice.join("\n");
    for knob in ["base.dtype: bf16", "recompute: true", "micro_batch: 1", "over 16 GPUs", "basis"] {
        assert!(advice.contains(knob), "{knob} in {advice}");
    }
}

#[test]
fn samples_and_epochs_follow_from_steps_and_images() {
    let mut setup = setup("sdxl/base.yaml", 16);
    setup.images = Some(4_400_000);
    let stage = &setup.plan().stages[0];
    assert_eq!(stage.samples, 20_000 * 512);
    assert!((stage.epochs.unwrap() - 10_240_000.0 / 4_400_000.0).abs() < 1e-9);
}

#[test]
fn gpus_that_cannot_share_a_batch_are_refused() {
    let experiment = Experiment::load(&root().join("experiments/sdxl/base.yaml")).unwrap();
    let error = Setup::read(&experiment, cluster(3), None).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("train.global_batch"), "{error}");
}

#[test]
fn the_built_in_configs_read() {
    assert!(architecture("no/such/folder").assumed[0].contains("SDXL-Base-1.0"));
    assert_eq!(architecture(SMALL).assumed, Vec::<String>::new());
    assert!(configs::UNET.contains("CrossAttnDownBlock2D"));
}
