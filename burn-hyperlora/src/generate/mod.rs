//! Generates LoRA weights of a person with a trained hypernetwork, from a run or a released folder.

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

/// Width of an attention head in the released weights, whose files do not contain it.
const RELEASED_HEAD_DIM: usize = 64;

/// Conditions of one person from one or several images, which the hypernetwork averages.
#[derive(Debug, Clone)]
pub struct Person {
    /// Image encoder states of the masked faces, `[N, T, clip_dim]`.
    pub clip_states: Tensor<3>,
    /// ID embeddings of the faces, of length 1: `[N, id_embedding_dim]`.
    pub id_embedding: Option<Tensor<2>>,
    /// Image encoder states of the pictures with blurred faces, `[M, T, clip_dim]`; required for a Base-LoRA.
    pub base_states: Option<Tensor<3>>,
}

/// A trained hypernetwork that generates LoRAs.
///
/// # Examples
/// ```no_run
/// use std::path::Path;
/// use burn::tensor::Device;
/// use burn_hyperlora::generate::Generator;
/// use burn_hyperlora::generate::photos::{PhotoModels, PhotoReader};
///
/// let generator = Generator::open(Path::new("runs/quickstart"), None, &Device::flex())?;
/// let mut reader = PhotoReader::open(&generator, &PhotoModels::default())?;
/// let portrait = reader.portrait(Path::new("anna.jpg"))?;
/// let person = reader.person(&[portrait], false);
/// let (id_weight, base_weight) = (1.0, 0.0);
/// let lora = generator.lora(&person, id_weight, base_weight)?;
/// println!("LoRA of {} attention modules, trigger words: {}", lora.modules.len(), generator.trigger());
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
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
    /// Opens a checkpoint folder, the latest checkpoint of a run folder, or a folder in the released layout. Files in
    /// the released layout do not contain the width of an attention head: it is `head_dim`, 64 by default.
    ///
    /// # Errors
    /// Input: the folder is none of these, files are damaged or unsuitable, or a head width is given for a run, which
    /// has its own.
    pub fn open(folder: &Path, head_dim: Option<usize>, device: &Device) -> Result<Self> {
        let source = Source::find(folder)?;
        let weights = source.weights();
        let HypernetSettings { config, experiment } = HypernetSettings::of(&source, head_dim)?;
        let taught = match &source {
            Source::Run { checkpoint, .. } => checkpoint.state::<SavedState>()?.taught.unwrap_or(Stage::IdEmbedding),
            Source::Released(_) => Stage::IdEmbedding,
        };
        let sites = read_sites(&weights)?;
        let hyper_lora = HyperLora::load(&weights, &config, &sites, device)?;
        Ok(Self { weights, experiment, config, hyper_lora, taught, sites, device: device.clone() })
    }

    /// Settings of the run; `None` for a folder in the released layout.
    pub fn experiment(&self) -> Option<&Experiment> {
        self.experiment.as_ref()
    }

    /// HypernetSettings of the hypernetwork.
    pub fn config(&self) -> &HyperLoraConfig {
        &self.config
    }

    /// Trigger words that precede a prompt if the ID-LoRA is on.
    pub fn trigger(&self) -> &str {
        self.experiment.as_ref().map_or(DEFAULT_TRIGGER, |experiment| &experiment.train.trigger)
    }

    /// Attention modules that the LoRAs update, in the hypernetwork's order.
    pub fn sites(&self) -> &[AttentionSite] {
        &self.sites
    }

    /// Reorders the LoRAs for a UNet with the attention modules `sites`.
    ///
    /// # Errors
    /// Input: the hypernetwork is for other attention modules.
    pub fn order_for(&mut self, sites: &[AttentionSite]) -> Result<()> {
        self.hyper_lora.order_for(&self.weights, sites)?;
        self.sites = sites.to_vec();
        Ok(())
    }

    /// Returns true if the hypernetwork has a Base-LoRA.
    pub fn has_base(&self) -> bool {
        self.hyper_lora.has_base()
    }

    /// Returns true if the ID-LoRA depends on the ID embedding, that is, from stage 3 on.
    pub fn reads_id_embedding(&self) -> bool {
        self.taught == Stage::IdEmbedding
    }

    /// Generates a person's LoRA from ID-LoRA and Base-LoRA, each with its weight. A `base_weight` of 0 leaves out the
    /// Base-LoRA.
    ///
    /// # Errors
    /// Input: the hypernetwork lacks a requested LoRA or has not learned it, or the person lacks its conditions.
    pub fn lora(&self, person: &Person, id_weight: f32, base_weight: f32) -> Result<LoraWeights> {
        if id_weight != 0.0 && !self.hyper_lora.has_learnt_id() {
            return Err(Error::file(
                &self.weights,
                "has learnt no ID-LoRA so far: it would be zero for everybody",
                "continue training to an ID stage, or give the ID-LoRA the weight 0",
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
            Error::input("Base-LoRA", "its input is missing", remedy)
        })?;
        let [images, ..] = states.dims();
        self.hyper_lora.base_lora_of(self.hyper_lora.base_coefficients(states, images)?)
    }
}

/// HypernetSettings of a hypernetwork on disk, and the settings of its run if it has one.
pub struct HypernetSettings {
    /// HypernetSettings of the hypernetwork.
    pub config: HyperLoraConfig,
    /// Settings of the run.
    pub experiment: Option<Experiment>,
}

impl HypernetSettings {
    /// Reads the sizes from the run's settings, or from the files of a released folder with the head width `head_dim`
    /// (64 by default).
    ///
    /// # Errors
    /// Input: settings or files are invalid, or a head width is given for a run, which has its own.
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
