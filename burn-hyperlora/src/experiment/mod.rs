//! Experiment YAML: composes the configurations of all parts, fills in their defaults and checks them once.

mod places;

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use data_prep::face::{FaceConfig, FaceModels};
use data_prep::shard::{EMBEDDING_DIM, MANIFEST_FILE, Manifest};
use hyperlora_core::files::apart;
use hyperlora_core::paths::is_plain;
use hyperlora_core::signals::StopFlag;
use hyperlora_core::{Error, Result, config};
use hyperlora_ranks::Ranks;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::conditioning::BaseConfig;
use crate::data::{DataConfig, RemoteShards};
use crate::eval::config::EvalConfig;
use crate::eval::identity_gap::{self, GapSetup};
use crate::hypernet::HyperLoraConfig;
use crate::metrics::IdentityGap;
use crate::run::{CONFIG_FILE, PATHS_FILE, Resolved};
use crate::train::config::TrainConfig;
use crate::train::{self, Outcome, Session, TrainOptions, TrainSetup};

/// Full description of a run, without cluster-specific settings.
///
/// # Examples
/// ```no_run
/// use std::path::Path;
/// use burn::tensor::Device;
/// use burn_hyperlora::experiment::Experiment;
/// use burn_hyperlora::train::TrainOptions;
///
/// let mut experiment = Experiment::load(Path::new("experiments/quickstart/train.yaml"))?;
/// experiment.train.log_every = 1;
/// let options = TrainOptions { max_steps: Some(3), ..TrainOptions::default() };
/// let outcome = experiment.train(Path::new("runs/tiny"), &Device::flex(), options)?;
/// println!("{outcome:?}");
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Training")]
pub struct Experiment {
    /// Name of the run folder: `runs/<name>` unless the command sets another. Letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Seed of all randomness: crop, flip, noise, timestep, scenario, reference, initial weights.
    pub seed: u64,
    /// Frozen base models.
    pub base: BaseConfig,
    /// Face models that find the faces in the photos given to `generate` and `sample`. The embedder must be the one
    /// that made `data.shards`. Training needs none.
    #[serde(default)]
    pub faces: Option<FaceConfig>,
    /// Source of the samples.
    pub data: DataConfig,
    /// Sizes of the hypernetwork.
    #[serde(default)]
    pub hyper_lora: HyperLoraConfig,
    /// Training settings.
    pub train: TrainConfig,
    /// Evaluation settings.
    #[serde(default)]
    pub eval: EvalConfig,
    /// File that this was read from.
    #[serde(skip)]
    origin: PathBuf,
}

impl Experiment {
    /// Reads, completes and checks a YAML that the user named. The `config.yaml` of a run is read as such.
    ///
    /// # Errors
    /// Input: names file, position and key.
    pub fn load(path: &Path) -> Result<Self> {
        match path.file_name() {
            Some(name) if name == CONFIG_FILE && path.with_file_name(PATHS_FILE).exists() => Self::load_run(path),
            _ => config::load::<Self>(path)?.complete(path),
        }
    }

    /// Reads the configuration of a run folder, which may come from an untrusted source: no variable is expanded, and
    /// nothing is written to its paths.
    ///
    /// # Errors
    /// Input: a folder that holds no run.
    pub fn of_run(run: &Path) -> Result<Self> {
        let path = run.join(CONFIG_FILE);
        if !path.is_file() {
            return Err(Error::file(
                run,
                format!("is not a run folder: it holds no {CONFIG_FILE}"),
                "give a folder that `hyperlora train` wrote",
            ));
        }
        Self::load_run(&path)
    }

    fn load_run(path: &Path) -> Result<Self> {
        let mut experiment: Self = config::load_found(path)?;
        let places = path.with_file_name(PATHS_FILE);
        if places.exists() {
            experiment.take_places(&places)?;
        }
        // A cache deletes files to make room, so its path is not taken from the configuration.
        experiment.data.remote.cache = RemoteShards::default().cache;
        experiment.complete(path)
    }

    fn complete(mut self, origin: &Path) -> Result<Self> {
        self.origin = origin.into();
        self.train.resolve();
        self.validate()?;
        Ok(self)
    }

    /// Returns the folder that the YAML's relative paths start from.
    pub fn folder(&self) -> &Path {
        // The parent of a bare file name is the empty path, which names no folder.
        self.origin.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Returns the path of the YAML file, for messages.
    pub fn origin(&self) -> String {
        self.origin.display().to_string()
    }

    /// Returns the configuration with all defaults written out and without machine-specific paths, and separately the
    /// local places of the paths that it names.
    ///
    /// # Errors
    /// Input: a path that cannot be resolved.
    pub fn resolved(&self) -> Result<Resolved> {
        Ok(Resolved { config: config::to_yaml(self)?, paths: self.places_yaml()? })
    }

    /// Checks that `faces`, whose paths start from `base_dir`, finds the embedder that made the shards. Warns about
    /// another detector or landmark model. Shards that no longer exist or that are behind a URL are not checked.
    ///
    /// # Errors
    /// Input: another embedder, or a folder without usable models.
    pub fn check_faces(&self, faces: &FaceConfig, base_dir: &Path) -> Result<()> {
        let shards = self.data.shards.resolve(self.folder()).ok();
        let Some(shards) = shards.filter(|shards| shards.join(MANIFEST_FILE).is_file()) else { return Ok(()) };
        compare_models(faces, base_dir, &Manifest::read(&shards)?, &shards)
    }

    /// Trains, or resumes from the latest checkpoint in `run`.
    ///
    /// # Errors
    /// Input: a problem with what the YAML names, or a checkpoint of other settings; Disk: a failing disk; Fault: a
    /// training that diverged.
    pub fn train(&self, run: &Path, device: &Device, options: TrainOptions) -> Result<Outcome> {
        self.train_together(&Ranks::alone(), run, device, options)
    }

    /// Trains as one of several ranks; see [`train`](Self::train).
    ///
    /// # Errors
    /// Same as [`train`](Self::train); Peer: another rank is lost; PeerFailed: another rank fails.
    pub fn train_together(&self, ranks: &Ranks, run: &Path, device: &Device, options: TrainOptions) -> Result<Outcome> {
        train::run(self.setup(ranks, run, device)?, options)
    }

    /// Opens the run in the folder `run` for a custom training loop, as one of `ranks`.
    ///
    /// # Errors
    /// Same as [`train`](Self::train).
    pub fn session(&self, ranks: &Ranks, run: &Path, device: &Device, options: TrainOptions) -> Result<Session> {
        Session::begin(self.setup(ranks, run, device)?, options)
    }

    /// Measures the [identity gap](identity_gap::run) of the latest checkpoint of `run`.
    ///
    /// # Errors
    /// Input: a folder that holds no run, or no checkpoint, or shards without identities.
    pub fn identity_gap(run: &Path, device: &Device) -> Result<IdentityGap> {
        let experiment = Self::of_run(run)?;
        let setup = GapSetup {
            place: &experiment.origin(),
            folder: experiment.folder(),
            run,
            seed: experiment.seed,
            base: &experiment.base,
            data: &experiment.data,
            hyper_lora: &experiment.hyper_lora,
            trigger: &experiment.train.trigger,
            config: &experiment.eval.identity_gap,
        };
        identity_gap::run(&setup, device)
    }

    /// Collects everything that training reads of the experiment, and checks that the face models are those that made
    /// the shards.
    fn setup(&self, ranks: &Ranks, run: &Path, device: &Device) -> Result<TrainSetup> {
        let ranks = ranks.with_deadline(self.train.long_timeout());
        let resolved = ranks.try_on_all("all ranks to resolve the configuration", || {
            // Training itself needs no face models: a machine without them trains, but one with the wrong models must
            // not start.
            if let Some(faces) = &self.faces
                && faces.models.resolve(self.folder())?.is_dir()
            {
                let shards = self.data.open_shards(self.folder())?;
                compare_models(faces, self.folder(), shards.manifest(), &self.data.shards.resolve(self.folder())?)?;
            }
            self.resolved()
        })?;
        Ok(TrainSetup {
            place: self.origin(),
            folder: self.folder().to_owned(),
            run: run.to_owned(),
            name: self.name.clone(),
            seed: self.seed,
            base: self.base.clone(),
            data: self.data.clone(),
            hyper_lora: self.hyper_lora.clone(),
            train: self.train.clone(),
            resolved,
            device: device.clone(),
            ranks,
        })
    }

    /// Lists the files, folders and URLs that are read.
    ///
    /// # Errors
    /// Input: a path with an unset variable.
    pub fn inputs(&self) -> Result<Vec<PathBuf>> {
        let base = &self.base;
        let named = [Some(&base.path), Some(&self.data.shards), base.config.as_ref(), base.image_encoder.as_ref()];
        let others = [
            base.feature_extractor.as_ref(),
            self.train.init_from.as_ref(),
            self.faces.as_ref().map(|faces| &faces.models),
        ];
        named.into_iter().chain(others).flatten().map(|path| path.resolve(self.folder())).collect()
    }

    fn validate(&self) -> Result<()> {
        let place = self.origin();
        // `.` and `..` are not valid names.
        if !is_plain(&self.name) || !self.name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
            return Err(Error::input(
                format!("{place}: name"),
                format!("`{}` cannot name a folder", self.name),
                "use letters, digits, `-`, `_` and `.`",
            ));
        }
        self.faces.as_ref().map_or(Ok(()), |faces| faces.validate(&format!("{place}: faces")))?;
        self.data.validate(&place)?;
        self.hyper_lora.validate(&format!("{place}: hyper_lora"))?;
        if self.hyper_lora.id_embedding_dim != EMBEDDING_DIM {
            return Err(Error::input(
                format!("{place}: hyper_lora.id_embedding_dim"),
                format!("is {}, the shards' ID embeddings have {EMBEDDING_DIM}", self.hyper_lora.id_embedding_dim),
                format!("give {EMBEDDING_DIM}, or leave it out"),
            ));
        }
        self.train.validate(&place, self.hyper_lora.base_rank > 0)?;
        let gap = &self.eval.identity_gap;
        gap.validate(&format!("{place}: eval.identity_gap"))?;
        let fixed_set = self.train.fixed_set.as_ref().map(|set| ("train.fixed_set.split", &set.split));
        let judged = [
            ("eval.identity_gap.known.photos", &gap.known.photos),
            ("eval.identity_gap.unseen.photos", &gap.unseen.photos),
        ];
        match fixed_set.into_iter().chain(judged).find(|(_, split)| **split == self.data.split) {
            Some((key, split)) => Err(Error::input(
                format!("{place}: {key}"),
                format!(
                    "is `{split}`, the training split (data.split): evaluating on training data would hide overfitting"
                ),
                "name a split that is not trained on",
            )),
            None => Ok(()),
        }
    }
}

impl Session {
    /// Opens the training described by the YAML file at `path`, in the run folder `runs/NAME`, as a single process.
    /// Resumes from the latest checkpoint of the run. SIGTERM, SIGINT and SIGHUP end the run with everything saved.
    ///
    /// # Errors
    /// Input: names file and key for a problem with what the YAML names, or for a checkpoint of other settings; Disk: a
    /// failing disk.
    pub fn open(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let experiment = Experiment::load(path.as_ref())?;
        let run = Path::new("runs").join(&experiment.name);
        apart(&run, experiment.inputs()?)?;
        let options = TrainOptions { stop: StopFlag::install()?, ..TrainOptions::default() };
        experiment.session(&Ranks::alone(), &run, device, options)
    }
}

/// Checks the models of `faces` against those that made the shards at `place`.
fn compare_models(faces: &FaceConfig, base_dir: &Path, manifest: &Manifest, place: &Path) -> Result<()> {
    let found = FaceModels::find(faces, base_dir)?.fingerprints()?;
    for difference in manifest.compare_models(place, &found)? {
        tracing::warn!("{difference}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use hyperlora_testing::reference::check_config;

    use super::Experiment;

    #[test]
    fn the_reference_of_the_configuration_is_up_to_date() {
        check_config::<Experiment>("train");
    }
}
