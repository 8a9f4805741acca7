//! Fixed set of (photo, noise, timestep) triples, whose loss is comparable over time and between stages.

use std::ops::ControlFlow;

use burn::module::Module;
use hyperlora_core::random::{Purpose, for_sample};
use hyperlora_core::signals::StopFlag;
use hyperlora_core::{Error, Result};
use hyperlora_ranks::Ranks;

use crate::conditioning::FrozenModels;
use crate::data::Reference;
use crate::data::loader::{Aside, Stop, make_all};
use crate::data::sample::{Request, Sample, SampleMaker};
use crate::data::scenario::Scenario;
use crate::hypernet::{HyperLora, Stage};
use crate::train::config::FixedSetConfig;
use crate::train::forward::{denoising_loss, make_lora};

/// Stage number for the draws of fixed sets; no training stage has it.
const DRAWS: u64 = 1 << 32;

/// Fixed set of triples. Photos are decoded at each measurement.
pub struct FixedSet {
    maker: SampleMaker,
    /// Requests, each with its timestep.
    requests: Vec<(Request, u32)>,
    kind: Stage,
    micro_batch: usize,
    aside: Aside,
}

impl FixedSet {
    /// Creates triples over the photos of `config.split`, round robin. Timesteps are spread evenly over the schedule,
    /// so that two sets differ little by chance. Equal seed, shards and settings give equal sets.
    ///
    /// # Errors
    /// Input: a split without usable photos; Fault: the system cannot create threads.
    pub fn new(
        maker: SampleMaker,
        config: &FixedSetConfig,
        kind: Stage,
        reference: Reference,
        timesteps: u32,
        micro_batch: usize,
    ) -> Result<Self> {
        let pairs = maker.dataset.pairs(&config.split, &config.references, reference)?;
        let scenario = if kind == Stage::Base { Scenario::BaseOnly } else { Scenario::Full };
        let draws = pairs.as_slice().iter().cycle().zip(0..config.triples);
        let requests = draws.map(|(pair, index)| {
            let draw = index as u64;
            let reference = pair.reference(&mut for_sample(maker.seed(), DRAWS, draw, Purpose::Reference));
            let request = Request { target: pair.target, reference, scenario, stage: DRAWS, draw };
            (request, spread(index, config.triples, timesteps))
        });
        Ok(Self { requests: requests.collect(), maker, kind, micro_batch, aside: Aside::start()? })
    }

    /// Returns the first `count` people of the set, one sample each, or the signal if the run is stopped before they
    /// are read.
    ///
    /// # Errors
    /// Same as [`SampleMaker::make`].
    pub fn first_people(&self, count: usize, stop: Stop<'_>) -> Result<ControlFlow<&'static str, Vec<Sample>>> {
        let (maker, requests) = (self.maker.clone(), self.requests.clone());
        self.aside.read(stop, move || {
            let mut people: Vec<(Option<&str>, Request)> = Vec::new();
            for (request, _) in &requests {
                let dataset = &maker.dataset;
                let person = dataset.identity(request.target);
                let wanted = people.len() < count && dataset.are_readable(&[request.target, request.reference])?;
                if wanted && (person.is_none() || people.iter().all(|(known, _)| *known != person)) {
                    people.push((person, *request));
                }
            }
            make_all(&maker, people.into_iter().map(|(_, request)| request).collect())
        })
    }

    /// Computes the mean loss over the readable part of the set, with the LoRAs that `hyper_lora` makes at the set's
    /// stage. The ranks share the work and synchronise after every micro-batch. Breaks with the signal if one of them
    /// was asked to `stop`.
    ///
    /// # Errors
    /// Same as [`SampleMaker::make`] and [`denoising_loss`]; also errors of the collective.
    pub fn loss(
        &self,
        base: &FrozenModels,
        hyper_lora: &HyperLora,
        trigger: &str,
        ranks: &Ranks,
        stop: &StopFlag,
    ) -> Result<ControlFlow<&'static str, f64>> {
        let hyper_lora = hyper_lora.valid();
        let (mut sum, mut count) = (0.0, 0);
        let micro_batches: Vec<&[(Request, u32)]> = self.requests.chunks(self.micro_batch).collect();
        for round in micro_batches.chunks(ranks.world_size()) {
            if let Some(signal) = ranks.asked_to_stop(stop.raised_by())? {
                return Ok(ControlFlow::Break(signal));
            }
            let own = round.get(ranks.rank()).copied().unwrap_or_default();
            let own = self.losses(base, &hyper_lora, trigger, own, &|| stop.raised_by());
            let told = match &own {
                Ok(ControlFlow::Continue(sum)) => Ok(ControlFlow::Continue(sum)),
                Ok(ControlFlow::Break(signal)) => Ok(ControlFlow::Break(*signal)),
                Err(error) => Err(error),
            };
            let what = "the losses on the fixed set";
            let heard = ranks.barrier(what, ranks.deadline()).and_then(|()| ranks.share_unless_stopped(what, told));
            own.map(drop)?;
            let heard = match heard? {
                ControlFlow::Continue(heard) => heard,
                ControlFlow::Break(signal) => return Ok(ControlFlow::Break(signal)),
            };
            for (bits, photos) in heard {
                sum += f64::from_bits(bits);
                count += photos;
            }
        }
        if count == 0 {
            let remedy = "restore the files that quarantine.jsonl names, or prepare the data again";
            return Err(Error::file(self.maker.dataset.path(), "not one photo of the fixed set can be read", remedy));
        }
        Ok(ControlFlow::Continue(sum / f64::from(count)))
    }

    /// Returns the sum of the losses of at most one micro-batch, as bits because JSON has no NaN, and their number; or
    /// the signal that arrived before its photos were read.
    fn losses(
        &self,
        base: &FrozenModels,
        hyper_lora: &HyperLora,
        trigger: &str,
        requests: &[(Request, u32)],
        stop: Stop<'_>,
    ) -> Result<ControlFlow<&'static str, (u64, u32)>> {
        let (maker, requests) = (self.maker.clone(), requests.to_vec());
        let samples = match self.aside.read(stop, move || readable_samples(&maker, &requests))? {
            ControlFlow::Continue(samples) => samples,
            ControlFlow::Break(signal) => return Ok(ControlFlow::Break(signal)),
        };
        if samples.is_empty() {
            return Ok(ControlFlow::Continue((0.0_f64.to_bits(), 0)));
        }
        let conditions = base.encode(&samples, trigger)?;
        let made = make_lora(hyper_lora, self.kind, conditions.portraits)?;
        let losses = denoising_loss(base, &conditions.input, conditions.target, Some(&made.lora))?;
        let sum: f64 = losses.iter().copied().map(f64::from).sum();
        Ok(ControlFlow::Continue((sum.to_bits(), losses.len() as u32)))
    }
}

/// Makes the samples of the requests whose photos are readable, at their timesteps.
fn readable_samples(maker: &SampleMaker, requests: &[(Request, u32)]) -> Result<Vec<Sample>> {
    let mut readable = Vec::with_capacity(requests.len());
    for entry in requests {
        if maker.dataset.are_readable(&[entry.0.target, entry.0.reference])? {
            readable.push(*entry);
        }
    }
    let mut samples = make_all(maker, readable.iter().map(|(request, _)| *request).collect())?;
    for (sample, (_, timestep)) in samples.iter_mut().zip(&readable) {
        sample.timestep = *timestep;
    }
    Ok(samples)
}

/// Returns the middle of the `index`-th of `count` equal parts of `0..timesteps`, with the parts in scattered order.
fn spread(index: usize, count: usize, timesteps: u32) -> u32 {
    // The fractional part of the golden ratio scatters neighbours as far apart as possible, so timesteps do not
    // correlate with photos.
    let place = (index as f64 * 0.618_033_988_749_895 + 0.5 / count.max(1) as f64).fract();
    ((place * f64::from(timesteps)) as u32).min(timesteps.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timesteps_cover_the_schedule_evenly() {
        let mut quarters = [0; 4];
        for index in 0..256 {
            quarters[(spread(index, 256, 1000) / 250) as usize] += 1;
        }
        assert!(quarters.iter().all(|&count: &i32| (62..=66).contains(&count)), "{quarters:?}");
    }
}
