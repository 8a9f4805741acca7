//! Training configuration: `train:` of an experiment.

use std::time::Duration;

use hyperlora_core::config::ConfigPath;
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::scheduler::SamplerKind;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::Reference;
use crate::data::scenario::{Scenario, Scenarios};
use crate::hypernet::{ParameterGroup, Stage};
use crate::optim::spikes::SpikeConfig;
use crate::optim::{LrScaling, OptimConfig, Wire};

/// Training settings: batches, stages, checkpoints and pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Samples per micro-batch, which pass through the models at once; at least 1. On a CPU the passes of a step run
    /// side by side, one per core (`RAYON_NUM_THREADS`), with the same bits at any number of cores.
    pub micro_batch: usize,
    /// Samples per optimiser step, a multiple of `micro_batch` up to 1048576; gradients are accumulated over
    /// `global_batch / micro_batch` passes.
    pub global_batch: usize,
    /// Keeps only the inputs of the UNet's layers and computes each layer again in the backward pass: less memory, more
    /// time.
    #[serde(default = "yes")]
    pub recompute: bool,
    /// Prefix of the caption whenever the ID-LoRA is active. The text encoders read 75 tokens of both; longer captions
    /// lose their end, with one warning and the curve `data/cut_captions`. A trigger that fills all 75 is refused.
    #[serde(default = "default_trigger")]
    pub trigger: String,
    /// Initial weights instead of random ones, with the sizes under `hyper_lora`: a run folder (its latest checkpoint),
    /// a checkpoint, or a HyperLoRA folder in the released layout.
    #[serde(default)]
    pub init_from: Option<ConfigPath>,
    /// Checkpoint interval and retention.
    #[serde(default)]
    pub checkpoints: CheckpointPolicy,
    /// Pictures drawn during training, of people of the fixed set; `null` for none.
    #[serde(default)]
    pub samples: Option<SamplesConfig>,
    /// Steps between two points of the curves, at least 1.
    #[serde(default = "default_log_every")]
    pub log_every: u64,
    /// Fixed set whose loss is measured before and after each stage; `null` for none.
    #[serde(default)]
    pub fixed_set: Option<FixedSetConfig>,
    /// Seconds that a rank waits for the others in one collective, at least 1. The wait is ten times as long while one
    /// rank works alone, such as during a save.
    #[serde(default = "default_collective_timeout")]
    pub collective_timeout_s: u64,
    /// Shards the optimiser state over the ranks instead of keeping all of it on each.
    #[serde(default = "yes")]
    pub shard_optimizer: bool,
    /// Type in which gradients travel between ranks.
    #[serde(default)]
    pub wire: Wire,
    /// Rule for skipping steps that would do harm.
    #[serde(default)]
    pub spikes: SpikeConfig,
    /// Scaling of the learning rate with the number of ranks. The batch does not scale: `global_batch` is fixed, so
    /// `none` keeps a run the same at any world size.
    #[serde(default)]
    pub lr_scaling: LrScaling,
    /// Stages in the order in which they run, at least one.
    pub stages: Vec<StageEntry>,
}

fn yes() -> bool {
    true
}

/// Trigger words of the released weights.
pub const DEFAULT_TRIGGER: &str = "fcsks fxhks fhyks, ";

fn default_trigger() -> String {
    DEFAULT_TRIGGER.into()
}

fn default_log_every() -> u64 {
    10
}

/// Longest wait for the other ranks if no YAML sets it.
pub const COLLECTIVE_TIMEOUT: Duration = Duration::from_mins(1);

fn default_collective_timeout() -> u64 {
    COLLECTIVE_TIMEOUT.as_secs()
}

/// Returns the longest wait for a rank that works alone, and for all ranks at the start, given that in a collective.
pub fn long(timeout: Duration) -> Duration {
    timeout.saturating_mul(10)
}

/// Checkpoint interval and the number of checkpoints kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointPolicy {
    /// Steps between two checkpoints, at least 1; the end of a stage always gets one.
    pub every: u64,
    /// Number of newest checkpoints to keep, at least 1.
    pub keep: usize,
    /// Keeps the first checkpoint of every such number of steps permanently, at least 1; `null` for none.
    #[serde(default)]
    pub keep_every: Option<u64>,
}

impl CheckpointPolicy {
    /// Returns the maximum number of checkpoints on disk at once in `steps` steps, including the one being written. A
    /// run that is interrupted repeatedly may keep one more, for a rollback.
    pub fn most(&self, steps: u64) -> u64 {
        let for_good = self.keep_every.and_then(|every| steps.checked_div(every)).unwrap_or(0);
        (self.keep as u64 + 1).saturating_add(for_good)
    }
}

impl Default for CheckpointPolicy {
    fn default() -> Self {
        Self { every: 500, keep: 3, keep_every: None }
    }
}

/// Pictures drawn during training: reference, without LoRA, with LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SamplesConfig {
    /// Steps between two grids, at least 1; the end of a stage always gets one.
    pub every: u64,
    /// Number of people in a grid, the first of the fixed set; at least 1.
    #[serde(default = "default_sample_count")]
    pub count: usize,
    /// Sampling steps from noise to picture, at least 1.
    #[serde(default = "default_sample_steps")]
    pub steps: usize,
    /// Sampler, with options of the base's `scheduler_config.json`. Default: the base's own.
    #[serde(default)]
    pub sampler: Option<SamplerKind>,
    /// Scale of the classifier-free guidance.
    #[serde(default = "default_guidance")]
    pub guidance: f64,
}

fn default_sample_count() -> usize {
    4
}

fn default_sample_steps() -> usize {
    12
}

fn default_guidance() -> f64 {
    3.0
}

/// Fixed set of (photo, noise, timestep) triples, the same at every measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FixedSetConfig {
    /// Split of the photos; must not be the training split, because evaluating on training data would hide overfitting.
    pub split: String,
    /// Split of the reference photos, for `reference: same_identity`.
    pub references: String,
    /// Number of triples, at least 1.
    pub triples: usize,
}

impl Default for FixedSetConfig {
    fn default() -> Self {
        Self { split: "held_out".into(), references: "train".into(), triples: 256 }
    }
}

/// Training stage, named by what it trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StageEntry {
    /// Base-LoRA, on crops with the face blurred.
    Base(StageConfig),
    /// ID-LoRA from the image encoder's view of the face; the Base-LoRA is frozen.
    IdClip(StageConfig),
    /// ID-LoRA with the ID embedding; the attention to the image encoder's states is frozen.
    IdEmbedding(StageConfig),
}

/// Settings of one stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StageConfig {
    /// Optimiser steps, 1 to 4294967296.
    pub steps: u64,
    /// Optimiser settings; the optimiser restarts with each stage.
    #[serde(default)]
    pub optim: OptimConfig,
    /// Parameter groups to train, of those that the stage uses. Default, also if empty: the stage's own.
    #[serde(default)]
    pub groups: Vec<ParameterGroup>,
    /// Weights of the scenarios. Default: `full` 0.9, `id_only` 0.05, `base_only` 0.05 in the ID stages; `base_only`
    /// alone in `base`, which has no ID-LoRA.
    #[serde(default)]
    pub scenarios: Option<Scenarios>,
    /// Choice of the reference photo: the photo of the target's person that the hypernetwork sees.
    #[serde(default)]
    pub reference: Reference,
}

/// Maximum steps of a stage and maximum global batch; these limits keep the sample count of a stage within 64 bits.
const MOST_STEPS: u64 = 1 << 32;
const LARGEST_BATCH: usize = 1 << 20;

impl StageEntry {
    /// Returns the stage's kind.
    pub fn kind(&self) -> Stage {
        match self {
            Self::Base(_) => Stage::Base,
            Self::IdClip(_) => Stage::IdClip,
            Self::IdEmbedding(_) => Stage::IdEmbedding,
        }
    }

    /// Returns the stage's settings.
    pub fn config(&self) -> &StageConfig {
        match self {
            Self::Base(config) | Self::IdClip(config) | Self::IdEmbedding(config) => config,
        }
    }

    /// Returns the stage's name in the YAML, the curves and the summary.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Base(_) => "base",
            Self::IdClip(_) => "id_clip",
            Self::IdEmbedding(_) => "id_embedding",
        }
    }

    /// Returns the frequency of each scenario.
    pub fn scenarios(&self) -> Scenarios {
        self.config().scenarios.unwrap_or(match self {
            Self::Base(_) => Scenarios::BASE,
            Self::IdClip(_) | Self::IdEmbedding(_) => Scenarios::ID,
        })
    }

    /// Fills in the stage's defaults for omitted settings.
    fn resolve(&mut self) {
        let (kind, scenarios) = (self.kind(), self.scenarios());
        let (Self::Base(config) | Self::IdClip(config) | Self::IdEmbedding(config)) = self;
        config.scenarios = Some(scenarios);
        if config.groups.is_empty() {
            config.groups = ParameterGroup::defaults(kind).to_vec();
        }
    }

    fn validate(&self, place: &str, has_base: bool) -> Result<()> {
        let config = self.config();
        if config.steps == 0 {
            return Err(Error::input(format!("{place}.steps"), "is 0", "give at least 1, or leave the stage out"));
        }
        if config.steps > MOST_STEPS {
            let remedy = format!("give at most {MOST_STEPS}");
            return Err(Error::input(format!("{place}.steps"), format!("is {}", config.steps), remedy));
        }
        config.optim.validate(&format!("{place}.optim"))?;
        let scenarios = self.scenarios();
        scenarios.validate(&format!("{place}.scenarios"))?;
        let refuse = |problem: &str, remedy: &str| Err(Error::input(format!("{place}.scenarios"), problem, remedy));
        if self.kind() == Stage::Base && (scenarios.has(Scenario::Full) || scenarios.has(Scenario::IdOnly)) {
            return refuse("the base stage has no ID-LoRA", "give `base_only: 1` alone, or leave `scenarios` out");
        }
        if self.kind() != Stage::Base && !scenarios.has(Scenario::Full) && !scenarios.has(Scenario::IdOnly) {
            return refuse("the ID-LoRA is never on", "give `full` or `id_only` a weight above 0");
        }
        if !has_base && (scenarios.has(Scenario::Full) || scenarios.has(Scenario::BaseOnly)) {
            return refuse(
                "the scenarios `full` and `base_only` use the Base-LoRA, and hyper_lora.base_rank is 0",
                "give `id_only: 1` alone, or a base_rank of at least 1",
            );
        }
        self.validate_groups(place, has_base)
    }

    /// Checks the parameter groups. A group that the loss does not use gets no gradient, so weight decay alone would
    /// shrink it.
    fn validate_groups(&self, place: &str, has_base: bool) -> Result<()> {
        let scenarios = self.scenarios();
        let base_lora = has_base && (scenarios.has(Scenario::Full) || scenarios.has(Scenario::BaseOnly));
        let is_used = |group: &ParameterGroup| group.is_used(self.kind(), base_lora);
        let Some(unused) = self.config().groups.iter().find(|group| !is_used(group)) else { return Ok(()) };
        let why = match unused {
            ParameterGroup::BaseResampler | ParameterGroup::BaseBases if !has_base => "hyper_lora.base_rank is 0",
            ParameterGroup::BaseResampler | ParameterGroup::BaseBases => "none of its scenarios has the Base-LoRA",
            _ => "it would get no gradient",
        };
        let fitting: Vec<&str> = ParameterGroup::ALL.into_iter().filter(is_used).map(ParameterGroup::name).collect();
        Err(Error::input(
            format!("{place}.groups"),
            format!("this stage does not use `{}`: {why}", unused.name()),
            format!("use some of: {}; or leave `groups` out", fitting.join(", ")),
        ))
    }
}

impl TrainConfig {
    /// Returns the longest wait for the other ranks in one collective.
    pub fn collective_timeout(&self) -> Duration {
        Duration::from_secs(self.collective_timeout_s)
    }

    /// Returns the longest wait for a rank that works alone, and for all ranks at the start.
    pub fn long_timeout(&self) -> Duration {
        long(self.collective_timeout())
    }

    /// Returns the number of passes, over all ranks, whose gradients make one step.
    pub fn accumulation(&self) -> usize {
        self.global_batch / self.micro_batch.max(1)
    }

    /// Returns the optimiser steps of all stages.
    pub fn total_steps(&self) -> u64 {
        self.stages.iter().map(|stage| stage.config().steps).sum()
    }

    /// Fills in the stages' defaults for omitted settings.
    pub fn resolve(&mut self) {
        self.stages.iter_mut().for_each(StageEntry::resolve);
    }

    /// Checks the batch sizes and every stage. `place` names the file; `has_base` is true if there is a Base-LoRA.
    ///
    /// # Errors
    /// Input: names the key.
    pub fn validate(&self, place: &str, has_base: bool) -> Result<()> {
        let Self { micro_batch, global_batch, .. } = *self;
        if micro_batch == 0 || global_batch == 0 || !global_batch.is_multiple_of(micro_batch) {
            return Err(Error::input(
                format!("{place}: train.global_batch"),
                format!("{global_batch} samples cannot be made of micro-batches of {micro_batch}"),
                "make global_batch a multiple of micro_batch, both at least 1",
            ));
        }
        if global_batch > LARGEST_BATCH {
            let remedy = format!("give at most {LARGEST_BATCH}");
            return Err(Error::input(format!("{place}: train.global_batch"), format!("is {global_batch}"), remedy));
        }
        let intervals = [
            ("checkpoints.every", self.checkpoints.every),
            ("checkpoints.keep", self.checkpoints.keep as u64),
            ("checkpoints.keep_every", self.checkpoints.keep_every.unwrap_or(1)),
            ("log_every", self.log_every),
            ("collective_timeout_s", self.collective_timeout_s),
            ("samples.every", self.samples.as_ref().map_or(1, |samples| samples.every)),
            ("samples.count", self.samples.as_ref().map_or(1, |samples| samples.count as u64)),
            ("samples.steps", self.samples.as_ref().map_or(1, |samples| samples.steps as u64)),
            ("fixed_set.triples", self.fixed_set.as_ref().map_or(1, |set| set.triples as u64)),
            ("stages", self.stages.len() as u64),
        ];
        if let Some((key, _)) = intervals.into_iter().find(|(_, value)| *value == 0) {
            return Err(Error::input(format!("{place}: train.{key}"), "is 0 or empty", "give at least 1"));
        }
        if self.samples.as_ref().is_some_and(|samples| !samples.guidance.is_finite()) {
            return Err(Error::input(
                format!("{place}: train.samples.guidance"),
                "is not finite",
                "give 3, for example",
            ));
        }
        if self.samples.is_some() && self.fixed_set.is_none() {
            return Err(Error::input(
                format!("{place}: train.samples"),
                "the pictures show people of the fixed set, and there is none",
                "add `fixed_set: {}` under train, or take `samples` out",
            ));
        }
        self.spikes.validate(&format!("{place}: train.spikes"))?;
        for (index, stage) in self.stages.iter().enumerate() {
            stage.validate(&format!("{place}: train.stages[{index}].{}", stage.name()), has_base)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(text: &str) -> Result<TrainConfig> {
        let mut config: TrainConfig = hyperlora_core::config::parse(text, Path::new("train.yaml"))?;
        config.resolve();
        config.validate("train.yaml", true)?;
        Ok(config)
    }

    const STAGES: &str = "stages: [{base: {steps: 2}}, {id_clip: {steps: 3, reference: same_identity}}]";

    #[test]
    fn defaults_are_resolved_per_stage() {
        let config = parse(&format!("micro_batch: 2\nglobal_batch: 6\n{STAGES}")).unwrap();
        assert_eq!((config.accumulation(), config.total_steps()), (3, 5));
        assert_eq!(config.stages[0].config().scenarios, Some(Scenarios::BASE));
        assert_eq!(config.stages[1].config().scenarios, Some(Scenarios::ID));
        assert_eq!(config.stages[1].config().groups, ParameterGroup::defaults(Stage::IdClip));
        assert_eq!(config.stages[1].config().reference, Reference::SameIdentity);
    }

    #[test]
    fn a_resolved_config_reads_back_as_itself() {
        let config = parse(&format!("micro_batch: 2\nglobal_batch: 6\nfixed_set: {{}}\n{STAGES}")).unwrap();
        let yaml = hyperlora_core::config::to_yaml(&config).unwrap();
        assert_eq!(parse(&yaml).unwrap(), config);
    }

    #[test]
    fn impossible_settings_name_their_key() {
        for (text, key) in [
            (format!("micro_batch: 4\nglobal_batch: 6\n{STAGES}"), "train.global_batch"),
            (format!("micro_batch: 0\nglobal_batch: 6\n{STAGES}"), "train.global_batch"),
            ("micro_batch: 1\nglobal_batch: 1\nstages: []".into(), "train.stages"),
            ("micro_batch: 1\nglobal_batch: 1\nstages: [{base: {steps: 0}}]".into(), "stages[0].base.steps"),
            (
                "micro_batch: 1\nglobal_batch: 1\nstages: [{base: {steps: 1, scenarios: {full: 1}}}]".into(),
                "stages[0].base.scenarios",
            ),
            (
                "micro_batch: 1\nglobal_batch: 1\nstages: [{id_clip: {steps: 1, scenarios: {base_only: 1}}}]".into(),
                "stages[0].id_clip.scenarios",
            ),
            (format!("micro_batch: 1\nglobal_batch: 1\nsamples: {{every: 1}}\n{STAGES}"), "train.samples"),
        ] {
            let message = parse(&text).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
    }

    #[test]
    fn a_group_that_the_stage_does_not_use_is_refused_with_those_that_fit() {
        let parse = |stage: &str, has_base| {
            let text = format!("micro_batch: 1\nglobal_batch: 1\nstages: [{{{stage}}}]");
            let mut config: TrainConfig = hyperlora_core::config::parse(&text, Path::new("train.yaml")).unwrap();
            config.resolve();
            config.validate("train.yaml", has_base).map_err(|error| error.to_string())
        };
        for (stage, has_base, named) in [
            (
                "base: {steps: 1, groups: [id_bases]}",
                true,
                ["base.groups", "`id_bases`", "base_resampler, base_bases;"],
            ),
            (
                "id_clip: {steps: 1, groups: [id_projector, id_bases]}",
                true,
                ["id_clip.groups", "`id_projector`", "attn3"],
            ),
            (
                "id_clip: {steps: 1, groups: [id_bases, base_bases], scenarios: {id_only: 1}}",
                true,
                ["id_clip.groups", "`base_bases`", "none of its scenarios"],
            ),
            (
                "id_embedding: {steps: 1, groups: [base_resampler], scenarios: {id_only: 1}}",
                false,
                ["id_embedding.groups", "`base_resampler`", "base_rank is 0"],
            ),
        ] {
            let message = parse(stage, has_base).unwrap_err();
            assert!(named.iter().all(|words| message.contains(words)), "{message}");
        }
        for stage in [
            "base: {steps: 1, groups: [base_bases]}",
            "id_clip: {steps: 1, groups: [id_bases, base_bases]}",
            "id_embedding: {steps: 1, groups: [id_projector, proj_in, attn2, attn3, proj_in_2, latents]}",
        ] {
            assert_eq!(parse(stage, true), Ok(()));
        }
    }

    #[test]
    fn scenarios_with_a_base_lora_need_one() {
        let config = parse(&format!("micro_batch: 1\nglobal_batch: 1\n{STAGES}")).unwrap();
        assert!(config.validate("train.yaml", false).unwrap_err().to_string().contains("base_rank"));
    }
}
