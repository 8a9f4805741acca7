//! What is known of a person to LoRA weights: a trained hypernetwork, of a run or of a released folder.

pub mod features;
pub mod photos;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use hyperlora_core::{Error, Result};
use hyperlora_sdxl::lora::{AttentionSite, LoraWeights};

use crate::experiment::Experiment;
use crate::hypernet::{HyperLora, HyperLoraConfig, Stage, read_sites};
use crate::run::saved::{SavedState, Source};
use crate::train::config::DEFAULT_TRIGGER;

/// Width of an attention head in the released weights; their files do not tell it.
const RELEASED_HEAD_DIM: usize = 64;

/// What a hypernetwork is given of one person, from one or several images, which it averages.
#[derive(Debug, Clone)]
pub struct Person {
    /// The image encoder's states of the masked faces, `[N, T, clip_dim]`.
    pub clip_states: Tensor<3>,
    /// The faces' ID embeddings, of length 1: `[N, id_embedding_dim]`.
    pub id_embedding: Option<Tensor<2>>,
    /// The image encoder's states of the pictures with the face blurred away, `[M, T, clip_dim]`; needed for a Base-LoRA.
    pub base_states: Option<Tensor<3>>,
}

/// A trained hypernetwork, ready to write LoRAs.
pub struct Generator {
    weights: PathBuf,
    experiment: Option<Experiment>,
    config: HyperLoraConfig,
    hyper_lora: HyperLora,
    taught: Stage,
    sites: Vec<AttentionSite>,
    device: Device,
}

impl Generator {
    /// Opens a checkpoint folder, the latest checkpoint of a run folder, or a folder of the released layout. The files
    /// of the last do not tell the width of an attention head: it is `head_dim`, 64 where left out.
    ///
    /// # Errors
    /// Input for a folder that is none of these, damaged or unfit files, and a head width for a run, which knows its own.
    pub fn open(folder: &Path, head_dim: Option<usize>, device: &Device) -> Result<Self> {
        let source = Source::find(folder)?;
        let weights = source.weights();
        let Sizes { config, experiment } = Sizes::of(&source, head_dim)?;
        let taught = match &source {
            Source::Run { checkpoint, .. } => checkpoint.state::<SavedState>()?.taught.unwrap_or(Stage::IdEmbed),
            Source::Released(_) => Stage::IdEmbed,
        };
        let sites = read_sites(&weights)?;
        let hyper_lora = HyperLora::load(&weights, &config, &sites, device)?;
        Ok(Self { weights, experiment, config, hyper_lora, taught, sites, device: device.clone() })
    }

    /// The settings of the run; `None` for a folder of the released layout.
    pub fn experiment(&self) -> Option<&Experiment> {
        self.experiment.as_ref()
    }

    /// Sizes of the hypernetwork.
    pub fn config(&self) -> &HyperLoraConfig {
        &self.config
    }

    /// What stands before a prompt where the ID-LoRA acts.
    pub fn trigger(&self) -> &str {
        self.experiment.as_ref().map_or(DEFAULT_TRIGGER, |experiment| &experiment.train.trigger)
    }

    /// Where the LoRAs apply, in the order of the hypernetwork.
    pub fn sites(&self) -> &[AttentionSite] {
        &self.sites
    }

    /// Puts the LoRAs into the order of a UNet with the attention modules `sites`.
    ///
    /// # Errors
    /// Input where the hypernetwork is for other attention modules.
    pub fn order_for(&mut self, sites: &[AttentionSite]) -> Result<()> {
        self.hyper_lora.order_for(&self.weights, sites)?;
        self.sites = sites.to_vec();
        Ok(())
    }

    /// Whether there is a Base-LoRA to go with the ID-LoRA.
    pub fn has_base(&self) -> bool {
        self.hyper_lora.has_base()
    }

    /// Whether the ID-LoRA depends on the ID embedding: not before stage 3.
    pub fn reads_id_embedding(&self) -> bool {
        self.taught == Stage::IdEmbed
    }

    /// The LoRA of a person: ID and Base, each with its weight; `base_weight` 0 leaves the Base-LoRA out.
    ///
    /// # Errors
    /// Input when a LoRA is asked of a hypernetwork that has none or has not learnt it, or what it is made from is not
    /// known of the person.
    pub fn lora(&self, person: &Person, id_weight: f32, base_weight: f32) -> Result<LoraWeights> {
        if id_weight != 0.0 && !self.hyper_lora.has_learnt_id() {
            return Err(Error::file(
                &self.weights,
                "has learnt no ID-LoRA so far: it would be zero for everybody",
                "train on to an ID stage, or give the ID-LoRA the weight 0",
            ));
        }
        let weight = |weight: f32| Tensor::<1>::from_floats([weight], &self.device);
        let id = self.id_lora(person)?.weighted(&weight(id_weight));
        if base_weight == 0.0 {
            return Ok(id);
        }
        Ok(id.concat(self.base_lora(person)?.weighted(&weight(base_weight))))
    }

    fn id_lora(&self, person: &Person) -> Result<LoraWeights> {
        let [images, ..] = person.clip_states.dims();
        let embedding = match (&person.id_embedding, self.reads_id_embedding()) {
            (None, true) => {
                let problem = "reads the ID embedding, and none is given";
                return Err(Error::file(&self.weights, problem, "give `id_embedding` [N, 512], or photos"));
            }
            (embedding, true) => embedding.clone(),
            (_, false) => None,
        };
        let coefficients = self.hyper_lora.id_coefficients(person.clip_states.clone(), embedding, images);
        Ok(self.hyper_lora.id_lora_of(coefficients))
    }

    fn base_lora(&self, person: &Person) -> Result<LoraWeights> {
        let states = person.base_states.clone().ok_or_else(|| {
            let remedy = "give the states of the pictures with the face blurred away as `base_clip_hidden_states`";
            Error::input("Base-LoRA", "nothing is given to make it from", remedy)
        })?;
        let [images, ..] = states.dims();
        self.hyper_lora.base_lora_of(self.hyper_lora.base_coefficients(states, images)?)
    }
}

/// The sizes of a hypernetwork on disk, and the settings of its run where there is one.
pub struct Sizes {
    /// Sizes of the hypernetwork.
    pub config: HyperLoraConfig,
    /// The run's settings.
    pub experiment: Option<Experiment>,
}

impl Sizes {
    /// Reads them from the run's settings, or from the files of a released folder with heads `head_dim` wide (64 where
    /// left out).
    ///
    /// # Errors
    /// Input for settings or files that do not hold, and a head width for a run, which knows its own.
    pub fn of(source: &Source, head_dim: Option<usize>) -> Result<Self> {
        match (source, head_dim) {
            (Source::Run { run, .. }, None) => {
                let experiment = Experiment::of_run(run)?;
                Ok(Self { config: experiment.hyper_lora.clone(), experiment: Some(experiment) })
            }
            (Source::Run { run, .. }, Some(_)) => {
                Err(Error::input("--head-dim", format!("{} knows its own", run.display()), "leave the option out"))
            }
            (Source::Released(folder), head_dim) => {
                let config = HyperLoraConfig::of_folder(folder, head_dim.unwrap_or(RELEASED_HEAD_DIM))?;
                Ok(Self { config, experiment: None })
            }
        }
    }
}
