//! Training and generation of HyperLoRA (arXiv 2503.16944) on Burn: a hypernetwork reads photos of a person and writes
//! a LoRA for Stable Diffusion XL in one forward pass.
//!
//! # Path of a photo
//!
//! `data-prep build` finds the face of a photo, measures it, and packs it into a shard ([`data_prep`]). Training then
//! runs
//!
//! ```text
//! photos -> data -> conditioning -> hypernet -> LoRA weights -> frozen SDXL
//!        -> objective -> gradients -> optim -> checkpoint -> generate, export, eval
//! ```
//!
//! [`data`] reads the shards, [`conditioning`] encodes faces and captions, [`hypernet`] makes a LoRA for each sample,
//! and the UNet of [`hyperlora_sdxl`] predicts with it. [`objective`] measures the prediction, [`optim`] moves the
//! hypernetwork, [`checkpoint`] keeps it. [`generate`] and [`export`] turn the result into LoRA files, [`eval`]
//! measures whether a LoRA of the right person helps more than one of another. Modules import only modules above them
//! in the list below; a test enforces this.
//!
//! # Where to start
//!
//! Train: [`Experiment::load`](experiment::Experiment::load) reads the YAML, and
//! [`Experiment::train`](experiment::Experiment::train) runs or resumes it.
//!
//! ```no_run
//! use std::path::Path;
//! use burn::tensor::Device;
//! use burn_hyperlora::experiment::Experiment;
//! use burn_hyperlora::train::TrainOptions;
//!
//! let experiment = Experiment::load(Path::new("experiments/quickstart/train.yaml"))?;
//! experiment.train(Path::new("runs/quickstart"), &Device::flex(), TrainOptions::default())?;
//! # Ok::<(), hyperlora_core::Error>(())
//! ```
//!
//! Generate: [`Generator::open`](generate::Generator::open) reads a run or the released weights,
//! [`PhotoReader`](generate::photos::PhotoReader) reads the photos, and [`save_lora`](export::save_lora) writes a file
//! for other tools. The page of [`Generator`](generate::Generator) shows them together.
//!
//! Train with a loop of your own: [`Session`](train::Session) takes one optimiser step at a time, with any
//! [`Objective`](objective::Objective).
//!
//! The programs `hyperlora` and `data-prep` do all of this from the command line. The tutorial in `docs/` starts there,
//! and `examples/` holds whole programs.
//!
//! # Other crates
//!
//! [`data_prep`] makes and reads shards, [`hyperlora_sdxl`] is Stable Diffusion XL with LoRA files, [`hyperlora_ranks`]
//! joins several processes to one training, and [`hyperlora_core`] holds errors, configuration and files.

pub mod data;

pub mod conditioning;

pub mod parameters;

pub mod hypernet;

pub mod objective;

pub mod optim;

pub mod checkpoint;

pub mod metrics;

pub mod run;

pub mod train;

pub mod eval;

pub mod experiment;

pub mod plan;

pub mod status;

pub mod export;

pub mod generate;
