//! Start and resume of a run: the learner and the state, the same on all ranks.

use std::sync::Arc;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use hyperlora_core::hash::hex;
use hyperlora_core::{Error, Result};
use hyperlora_ranks::agree;
use hyperlora_sdxl::scheduler::NoiseSampler;
use hyperlora_sdxl::text;
use hyperlora_sdxl::tokenizer::TEXT_TOKENS;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::conditioning::FrozenModels;
use crate::data::dataset::Dataset;
use crate::hypernet::HyperLora;
use crate::optim::{OptimConfig, Optimizer, Sharding, Wire};
use crate::parameters::ParameterVisitor;
use crate::run::moments::MomentFiles;
use crate::run::saved::{SavedState, Source, WEIGHTS, check_settings};
use crate::run::state::TrainState;
use crate::train::config::StageEntry;
use crate::train::fingerprint;
use crate::train::settings::binding_settings;
use crate::train::setup::{TrainOptions, TrainSetup, open_dataset};
use crate::train::step::Learner;

/// Returns the learner and state of `checkpoint`, or those of a new run.
///
/// # Errors
/// Input: a checkpoint of other settings, or weights that do not fit.
pub(super) fn begin_or_resume(
    setup: &TrainSetup,
    base: &FrozenModels,
    checkpoint: Option<&Checkpoint>,
    settings: &Value,
) -> Result<(Learner, TrainState)> {
    match checkpoint {
        Some(checkpoint) => resume(setup, base, checkpoint, settings),
        None => Ok((begin(setup, base)?, TrainState::default())),
    }
}

/// Checks that the communication backend supports the configured wire type.
///
/// # Errors
/// Input: bf16 with MPI.
pub(super) fn check_wire(setup: &TrainSetup) -> Result<()> {
    let over_mpi = setup.ranks.world_size() > 1 && setup.device == Device::flex();
    if over_mpi && setup.train.wire == Wire::Bf16 {
        let problem = "is bf16, which MPI cannot add up";
        return Err(Error::input(format!("{}: train.wire", setup.place), problem, "leave it out, or train on GPUs"));
    }
    Ok(())
}

/// Returns the learner at the beginning of a stage: only the stage's groups train, before the optimiser's first step.
pub(super) fn begin_learning(setup: &TrainSetup, hyper_lora: HyperLora, entry: &StageEntry) -> Learner {
    let config = entry.config();
    learner(setup, hyper_lora.trainable(&config.groups), &config.optim)
}

/// Checks that all ranks run the same program with the same settings. Runs before anything is opened, so that the
/// difference is reported rather than its consequences.
///
/// # Errors
/// Input, the same on all ranks: names the first rank that differs.
pub(super) fn check_same_settings(setup: &TrainSetup, options: &TrainOptions, common: &Value) -> Result<()> {
    let ranks = &setup.ranks;
    let program = ranks.try_on_all("all ranks to read their program", || {
        if ranks.world_size() > 1 { hyperlora_ranks::program() } else { Ok(String::new()) }
    })?;
    agree(
        &**ranks,
        &[
            ("version", env!("CARGO_PKG_VERSION").into()),
            ("program", program),
            ("configuration", short(Sha256::new_with_prefix(common.to_string()))),
            ("--max-steps", format!("{:?}", options.max_steps)),
        ],
    )
}

/// Checks that all ranks have the same data and base, wherever the files are.
///
/// # Errors
/// Same as [`check_same_settings`].
pub(super) fn check_same_files(setup: &TrainSetup, settings: &Value) -> Result<()> {
    agree(
        &*setup.ranks,
        &[
            ("data", settings["data"]["shards"].to_string()),
            ("base", short(Sha256::new_with_prefix(settings["base"].to_string()))),
        ],
    )
}

/// Checks that all ranks begin at the same step with the same parameters; `origin` identifies the initial weights.
///
/// # Errors
/// Same as [`check_same_settings`].
pub(super) fn check_same_start(
    setup: &TrainSetup,
    hyper_lora: &HyperLora,
    state: &TrainState,
    origin: &str,
) -> Result<()> {
    let mut shapes = Shapes(Sha256::new());
    hyper_lora.visit_parameters(&mut shapes);
    agree(
        &*setup.ranks,
        &[
            ("checkpoint", format!("step {}", state.global_step)),
            ("parameters", short(shapes.0)),
            ("initial weights", origin.into()),
        ],
    )
}

/// Opens this rank's base and data files. Returns the dataset and the settings that a resume must match.
///
/// # Errors
/// Input: missing or damaged files; Disk: a failing disk.
pub(super) fn open(setup: &TrainSetup, common: Value) -> Result<(Arc<Dataset>, Value)> {
    check_trigger(setup)?;
    let dataset = open_dataset(&setup.data, &setup.folder, &setup.run)?;
    if let Some(set) = &setup.train.fixed_set {
        let place = format!("{}: train.fixed_set.split", setup.place);
        dataset.check_apart(&setup.data.split, &set.split, &place)?;
    }
    let settings = binding_settings(common, fingerprint::of_base(&setup.base, &setup.folder)?, dataset.checksum());
    Ok((dataset, settings))
}

/// Checks that the trigger leaves room for words of a caption.
fn check_trigger(setup: &TrainSetup) -> Result<()> {
    // The shortest caption adds a space and a letter.
    let with_a_word = format!("{} a", setup.train.trigger);
    match text::surplus(&setup.base.source(&setup.folder)?.tokenizers()?, &with_a_word)? {
        0 => Ok(()),
        _ => Err(Error::input(
            format!("{}: train.trigger", setup.place),
            format!("fills the {TEXT_TOKENS} tokens that the text encoders take: no word of a caption would be used"),
            "give a few rare words, such as the default's three",
        )),
    }
}

/// Loads the base's models, and checks them against each other and against the YAML.
///
/// # Errors
/// Input: models that are missing, broken or incompatible; Disk: a failing disk.
pub(super) fn load_base(setup: &TrainSetup) -> Result<FrozenModels> {
    let base = FrozenModels::load(&setup.base, &setup.folder, &setup.device)?;
    base.check(&setup.place, setup.data.image_size, setup.hyper_lora.clip_dim)?;
    // Without this check, the run would end at its first pictures.
    if let Some(samples) = &setup.train.samples {
        let timesteps = base.schedule.config().num_train_timesteps;
        if samples.steps > timesteps {
            return Err(Error::input(
                format!("{}: train.samples.steps", setup.place),
                format!("is {}, the base's noise schedule has {timesteps} steps", samples.steps),
                format!("give 1 to {timesteps}; 12 shows enough"),
            ));
        }
        NoiseSampler::new(&base.schedule, samples.sampler, samples.steps)?;
    }
    Ok(base)
}

/// Identifies the initial weights of a new run. A resumed run uses its checkpoint's.
///
/// # Errors
/// Input: missing weights; Disk: a failing disk.
pub(super) fn origin(setup: &TrainSetup, checkpoint: Option<&Checkpoint>) -> Result<String> {
    match (&setup.train.init_from, checkpoint) {
        (Some(path), None) => fingerprint::of_released(&Source::find(&path.resolve(&setup.folder)?)?.weights()),
        (_, Some(_)) => Ok("the checkpoint's".into()),
        (None, None) => Ok("random".into()),
    }
}

/// Creates the learner of a new run.
fn begin(setup: &TrainSetup, base: &FrozenModels) -> Result<Learner> {
    let device = setup.device.clone().autodiff();
    let sites = base.unet.attention_sites();
    let hyper_lora = match &setup.train.init_from {
        Some(path) => {
            let weights = Source::find(&path.resolve(&setup.folder)?)?.weights();
            HyperLora::load(&weights, &setup.hyper_lora, sites, &device)?
        }
        // The layers that read the ID embedding start at zero, so the first stage that trains them begins where the
        // previous stage ended.
        None => HyperLora::new(&setup.hyper_lora, sites, setup.seed, &device).start_id_embedding_stage(),
    };
    Ok(learner(setup, hyper_lora, &OptimConfig::default()))
}

/// Restores the learner and state of the checkpoint.
fn resume(
    setup: &TrainSetup,
    base: &FrozenModels,
    checkpoint: &Checkpoint,
    settings: &Value,
) -> Result<(Learner, TrainState)> {
    let saved: SavedState = checkpoint.state()?;
    check_settings(&setup.place, &saved, settings)?;
    let device = setup.device.clone().autodiff();
    let sites = base.unet.attention_sites();
    let hyper_lora = HyperLora::load(&checkpoint.path().join(WEIGHTS), &setup.hyper_lora, sites, &device)?;
    let mut learner = match setup.train.stages.get(saved.train.stage) {
        Some(entry) => begin_learning(setup, hyper_lora, entry),
        None => learner(setup, hyper_lora, &OptimConfig::default()),
    };
    // The checkpoint at the end of a stage holds the moments of that stage, which the next one does not use. A stage
    // whose steps were all skipped has no moments yet.
    if saved.train.stage_step > 0 && !saved.optimizer_steps.is_empty() {
        let moments = MomentFiles::open(checkpoint)?;
        let read = |name: &str, range| moments.read(name, range);
        let (hyper_lora, steps) = (&learner.hyper_lora, &saved.optimizer_steps);
        learner.optimizer.restore(hyper_lora, steps, moments.lengths(), read, checkpoint.path())?;
    }
    tracing::info!("resuming from {}", checkpoint.path().display());
    Ok((learner, saved.train))
}

fn learner(setup: &TrainSetup, hyper_lora: HyperLora, config: &OptimConfig) -> Learner {
    let share = Sharding::of(&*setup.ranks, setup.train.shard_optimizer, setup.train.wire);
    let optimizer = Optimizer::new(config, &hyper_lora, share);
    Learner { hyper_lora, optimizer }
}

/// Hash over names and shapes of all parameters.
struct Shapes(Sha256);

impl ParameterVisitor for Shapes {
    fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
        self.0.update(format!("{name} {:?}\n", parameter.val().dims()));
    }
}

fn short(hasher: Sha256) -> String {
    hex(&hasher.finalize()[..6])
}
