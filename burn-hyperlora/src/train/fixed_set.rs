//! A set of (photo, noise, timestep) triples whose loss is comparable between moments and stages.

use burn::module::Module;

use crate::collective::Collective;
use crate::conditioning::Base;
use crate::data::Reference;
use crate::data::loader::make_all;
use crate::data::sample::{Request, Sample, SampleMaker};
use crate::data::scenario::Scenario;
use crate::error::{Error, Result};
use crate::hypernet::{HyperLora, Stage};
use crate::random::{Purpose, for_sample};
use crate::train::config::FixedSetConfig;
use crate::train::forward::{denoising_loss, make_lora};
use crate::train::together::share;

/// Counts the draws of fixed sets: no training stage has this number.
const DRAWS: u64 = 1 << 32;

/// Names the triples; photos are decoded when they are measured.
pub struct FixedSet {
    maker: SampleMaker,
    /// With the timestep of each.
    requests: Vec<(Request, u32)>,
    micro_batch: usize,
}

impl FixedSet {
    /// Triples over the photos of `config.split`, in rounds; timesteps are spread evenly over the schedule, so that two
    /// sets differ little by chance. Equal for equal seed, shards and settings.
    ///
    /// # Errors
    /// Input for a split without usable photos.
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
        Ok(Self { requests: requests.collect(), maker, micro_batch })
    }

    /// The first `count` people of the set, one sample each.
    ///
    /// # Errors
    /// See [`SampleMaker::make`].
    pub fn first_people(&self, count: usize) -> Result<Vec<Sample>> {
        let mut people: Vec<(Option<&str>, Request)> = Vec::new();
        for (request, _) in &self.requests {
            let dataset = &self.maker.dataset;
            let person = dataset.identity(request.target);
            let wanted = people.len() < count && dataset.are_readable(&[request.target, request.reference])?;
            if wanted && (person.is_none() || people.iter().all(|(known, _)| *known != person)) {
                people.push((person, *request));
            }
        }
        make_all(&self.maker, people.into_iter().map(|(_, request)| request).collect())
    }

    /// The requests whose photos were not left out.
    fn readable(&self, requests: &[(Request, u32)]) -> Result<Vec<(Request, u32)>> {
        let dataset = &self.maker.dataset;
        let mut readable = Vec::with_capacity(requests.len());
        for entry in requests {
            if dataset.are_readable(&[entry.0.target, entry.0.reference])? {
                readable.push(*entry);
            }
        }
        Ok(readable)
    }

    /// Mean loss over what can be read of the set with the LoRAs that `hyper_lora` makes at this stage; the ranks share the
    /// work.
    ///
    /// # Errors
    /// See [`SampleMaker::make`] and [`denoising_loss`]; those of the collective.
    pub fn loss(
        &self,
        base: &Base,
        hyper_lora: &HyperLora,
        kind: Stage,
        trigger: &str,
        world: &dyn Collective,
    ) -> Result<f64> {
        let own = self.own_losses(base, hyper_lora, kind, trigger, world);
        let shares = share(world, "the losses on the fixed set", own.as_ref())?;
        own?;
        let (sum, count) = shares
            .into_iter()
            .fold((0.0, 0), |(sum, count), (bits, photos)| (sum + f64::from_bits(bits), count + photos));
        if count == 0 {
            let remedy = "restore the files that quarantine.jsonl names, or prepare the data again";
            return Err(Error::file(self.maker.dataset.path(), "not one photo of the fixed set can be read", remedy));
        }
        Ok(sum / f64::from(count))
    }

    /// The sum (its bits: JSON has no NaN) of this rank's losses, and their number.
    fn own_losses(
        &self,
        base: &Base,
        hyper_lora: &HyperLora,
        kind: Stage,
        trigger: &str,
        world: &dyn Collective,
    ) -> Result<(u64, u32)> {
        let hyper_lora = hyper_lora.valid();
        let (mut sum, mut count) = (0.0_f64, 0);
        for chunk in self.requests.chunks(self.micro_batch).skip(world.rank()).step_by(world.world_size()) {
            let chunk = self.readable(chunk)?;
            if chunk.is_empty() {
                continue;
            }
            let mut samples = make_all(&self.maker, chunk.iter().map(|(request, _)| *request).collect())?;
            for (sample, (_, timestep)) in samples.iter_mut().zip(&chunk) {
                sample.timestep = *timestep;
            }
            let conditions = base.encode(&samples, trigger)?;
            let made = make_lora(&hyper_lora, kind, conditions.portraits)?;
            let losses = denoising_loss(base, &conditions.input, conditions.target, Some(&made.lora))?;
            count += losses.len() as u32;
            sum += losses.into_iter().map(f64::from).sum::<f64>();
        }
        Ok((sum.to_bits(), count))
    }
}

/// The middle of the `index`-th of `count` equal parts of `0..timesteps`, the parts taken in a scattered order.
fn spread(index: usize, count: usize, timesteps: u32) -> u32 {
    // The golden ratio's fraction scatters neighbours as far as can be: photos and timesteps do not move in step.
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
