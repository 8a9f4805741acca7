//! Identity gap: how much better the right person's LoRA denoises a photo than somebody else's.
//!
//! The denoising loss of every judged photo is measured three times with equal noise and timesteps: with the LoRA of
//! another photo of the same person, with that of a photo of somebody else, and without a LoRA. Losses are averaged
//! over a photo's draws first, so that the statistics are over photos.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use hyperlora_core::random::{Purpose, below, for_sample, normal, unit};
use hyperlora_core::{Error, Result};

use crate::conditioning::{BaseConfig, FrozenModels};
use crate::data::dataset::Dataset;
use crate::data::loader::make_all;
use crate::data::pairs::Pair;
use crate::data::sample::{Request, Sample, SampleMaker};
use crate::data::scenario::Scenario;
use crate::data::{DataConfig, Reference};
use crate::eval::config::{GapSet, IdentityGapConfig};
use crate::eval::paired::{mean, paired_gap};
use crate::hypernet::{HyperLora, HyperLoraConfig, Stage};
use crate::metrics::{GapStatistics, IdentityGap, RunSummary};
use crate::run::saved::{self, SavedState, WEIGHTS};
use crate::train::forward::{denoising_loss, make_lora};
use crate::train::open_dataset;

/// Stage number of this evaluation's draws; no training stage has it.
const DRAWS: u64 = 2 << 32;

/// Parts of an experiment that the measurement reads.
pub struct GapSetup<'a> {
    /// Path of the YAML file, for messages.
    pub place: &'a str,
    /// Folder that the YAML's relative paths start from.
    pub folder: &'a Path,
    /// Run folder.
    pub run: &'a Path,
    /// Seed of all randomness.
    pub seed: u64,
    /// Frozen base models.
    pub base: &'a BaseConfig,
    /// Source of the samples.
    pub data: &'a DataConfig,
    /// Sizes of the hypernetwork.
    pub hyper_lora: &'a HyperLoraConfig,
    /// Trigger words of the ID-LoRA.
    pub trigger: &'a str,
    /// Settings of the measurement.
    pub config: &'a IdentityGapConfig,
}

/// Measures the identity gap of the run's latest checkpoint and writes it to its `summary.json`. A set whose split is
/// missing in the shards is reported with n = 0.
///
/// # Errors
/// Input: the run has no checkpoint, or the shards have no identities.
pub fn run(setup: &GapSetup<'_>, device: &Device) -> Result<IdentityGap> {
    let &GapSetup { place, folder, run, seed, base, data, hyper_lora, trigger, config } = setup;
    let checkpoint = saved::latest(run)?.ok_or_else(|| {
        Error::file(run, "holds no checkpoint yet", "let `hyperlora train` reach its first checkpoint")
    })?;
    let saved: SavedState = checkpoint.state()?;
    let base = FrozenModels::load(base, folder, device)?;
    base.check(place, data.image_size, hyper_lora.clip_dim)?;
    let sites = base.unet.attention_sites();
    let hyper_lora = HyperLora::load(&checkpoint.path().join(WEIGHTS), hyper_lora, sites, device)?;
    if !hyper_lora.has_learnt_id() {
        return Err(Error::file(checkpoint.path(), "has learnt no ID-LoRA so far", "continue training to an ID stage"));
    }
    let dataset = open_dataset(data, folder, run)?;
    let shape = base.sample_shape(data.image_size, true)?;
    let maker = SampleMaker::new(dataset, data, seed, shape);
    for (key, set) in [("known", &config.known), ("unseen", &config.unseen)] {
        let place = format!("{place}: eval.identity_gap.{key}.photos");
        maker.dataset.check_apart(&data.split, &set.photos, &place)?;
    }
    let judge = Judge {
        base: &base,
        hyper_lora: &hyper_lora,
        kind: saved.taught.unwrap_or(Stage::IdEmbedding),
        trigger,
        maker: &maker,
        draws: config.draws,
        batch: config.batch,
    };
    let mut gap = IdentityGap {
        known: judge.measure(&config.known)?,
        unseen: judge.measure(&config.unseen)?,
        ..IdentityGap::default()
    };
    gap.other.insert("draws".into(), config.draws.into());
    gap.other.insert("step".into(), checkpoint.step.into());
    RunSummary::update(run, |summary| summary.identity_gap = Some(gap.clone()))?;
    Ok(gap)
}

/// Inputs of a measurement.
struct Judge<'a> {
    base: &'a FrozenModels,
    hyper_lora: &'a HyperLora,
    kind: Stage,
    trigger: &'a str,
    maker: &'a SampleMaker,
    draws: usize,
    batch: usize,
}

/// One judged photo: the same crop with a reference photo of the same person, and with one of somebody else.
struct Case {
    same: Sample,
    different: Sample,
}

/// Mean losses of each photo.
struct Losses {
    same: Vec<f64>,
    different: Vec<f64>,
    none: Vec<f64>,
}

impl Judge<'_> {
    fn measure(&self, set: &GapSet) -> Result<GapStatistics> {
        let dataset = &self.maker.dataset;
        if dataset.split(&set.photos).is_empty() {
            return Ok(GapStatistics::default());
        }
        let pairs = dataset.pairs(&set.photos, &set.references, Reference::SameIdentity)?;
        let references = dataset.split(&set.references);
        let [mut same, mut different, mut none] = [const { Vec::new() }; 3];
        let photos: Vec<(u64, &Pair)> = (0..).zip(pairs.as_slice()).collect();
        for chunk in photos.chunks((self.batch / self.draws).max(1)) {
            let cases = chunk.iter().filter_map(|(index, pair)| self.case(*index, pair, &references).transpose());
            let cases = cases.collect::<Result<Vec<Case>>>()?;
            if cases.is_empty() {
                continue;
            }
            let losses = self.losses(&cases)?;
            same.extend(losses.same);
            different.extend(losses.different);
            none.extend(losses.none);
        }
        let mut statistics = paired_gap(&same, &different);
        let over_none = paired_gap(&same, &none);
        for (name, value) in [
            ("loss_same", Some(mean(&same))),
            ("loss_different", Some(mean(&different))),
            ("loss_none", Some(mean(&none))),
            ("over_none_mean", Some(over_none.mean)),
            ("over_none_t", over_none.t),
        ] {
            statistics.other.insert(name.into(), value.into());
        }
        Ok(statistics)
    }

    /// Draws both reference photos of a target; `None` if one of the three is in a quarantined row group.
    fn case(&self, index: u64, pair: &Pair, references: &[usize]) -> Result<Option<Case>> {
        let dataset = &self.maker.dataset;
        let mut generator = for_sample(self.maker.seed(), DRAWS, index, Purpose::Reference);
        let same = pair.reference(&mut generator);
        let person = dataset.identity(pair.target);
        let strangers: Vec<usize> = references
            .iter()
            .copied()
            .filter(|&row| dataset.identity(row).is_some_and(|other| Some(other) != person))
            .collect();
        let drawn = below(&mut generator, strangers.len() as u64) as usize;
        let Some(&different) = strangers.get(drawn) else { return Err(one_person(dataset)) };
        if !dataset.are_readable(&[pair.target, same, different])? {
            return Ok(None);
        }
        let request = |reference| Request {
            target: pair.target,
            reference,
            scenario: Scenario::Full,
            stage: DRAWS,
            draw: index * self.draws as u64,
        };
        let [same, different] = <[Sample; 2]>::try_from(make_all(self.maker, vec![request(same), request(different)])?)
            .map_err(|_| Error::Fault("two requests made another number of samples".into()))?;
        Ok(Some(Case { same, different }))
    }

    /// Computes the mean loss of each case with the LoRA of the same person, with that of somebody else, and without a
    /// LoRA.
    fn losses(&self, cases: &[Case]) -> Result<Losses> {
        let noisy: Vec<Sample> = cases.iter().flat_map(|case| self.noisy(&case.same)).collect();
        let (input, target) = self.base.noisy(&noisy, self.trigger)?;
        let given = |of: fn(&Case) -> &Sample| -> Result<Vec<f64>> {
            let portraits: Vec<Sample> = cases.iter().map(|case| of(case).clone()).collect();
            let lora = make_lora(self.hyper_lora, self.kind, self.base.portraits(&portraits)?)?.lora;
            let lora = lora.map(|tensor| repeat_each(tensor, self.draws));
            Ok(self.per_photo(denoising_loss(self.base, &input, target.clone(), Some(&lora))?))
        };
        let same = given(|case| &case.same)?;
        let different = given(|case| &case.different)?;
        // Without a LoRA there are no trigger words.
        let (input, target) = self.base.noisy(&noisy, "")?;
        let none = self.per_photo(denoising_loss(self.base, &input, target, None)?);
        Ok(Losses { same, different, none })
    }

    /// Iterates over copies of the sample, each with its draw's noise and a timestep from one of as many equal parts of
    /// the schedule.
    fn noisy<'s>(&'s self, sample: &'s Sample) -> impl Iterator<Item = Sample> + 's {
        let timesteps = self.base.schedule.config().num_train_timesteps as f64;
        (0..self.draws).map(move |part| {
            let draw = sample.request.draw + part as u64;
            let within = unit(&mut for_sample(self.maker.seed(), DRAWS, draw, Purpose::Timestep));
            let timestep = (part as f64 + within) / self.draws as f64 * timesteps;
            let mut generator = for_sample(self.maker.seed(), DRAWS, draw, Purpose::Noise);
            Sample { noise: normal(&mut generator, sample.noise.len()), timestep: timestep as u32, ..sample.clone() }
        })
    }

    fn per_photo(&self, losses: Vec<f32>) -> Vec<f64> {
        losses.chunks(self.draws).map(|draws| mean(&draws.iter().copied().map(f64::from).collect::<Vec<_>>())).collect()
    }
}

/// Repeats every entry `times` times in a row: `[P, a, b]` to `[P * times, a, b]`.
fn repeat_each(tensor: Tensor<3>, times: usize) -> Tensor<3> {
    let [photos, rows, columns] = tensor.dims();
    tensor.unsqueeze_dim::<4>(1).expand([photos, times, rows, columns]).reshape([photos * times, rows, columns])
}

fn one_person(dataset: &Dataset) -> Error {
    Error::file(
        dataset.path(),
        "shows a single person among the reference photos: there is no other person to compare with",
        "prepare photos of at least two people, with identity labels",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lora_stands_beside_its_own_draws() {
        let tensor = Tensor::<3>::from_floats([[[1.0, 2.0]], [[3.0, 4.0]]], &Device::flex());
        let values: Vec<f32> = repeat_each(tensor, 2).into_data().iter().collect();
        assert_eq!(values, [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]);
    }
}
