//! Advice on settings to change if a training does not fit: each one alone, with the resulting peak.

use burn::tensor::FloatDType;

use crate::plan::memory::gib;
use crate::plan::setup::Setup;

/// Step between tried values of K, from the grid of the released nodes.
const BASIS_STEP: usize = 32;

impl Setup {
    /// Peak of the stage that needs the most memory.
    fn peak(&self) -> u64 {
        self.stages().iter().map(|stage| stage.memory.peak()).max().unwrap_or(0)
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut changed = self.clone();
        change(&mut changed);
        changed
    }

    /// Returns a setup with passes of one sample and the same number of samples per step.
    fn with_single_samples(&self) -> Self {
        self.with(|setup| setup.train.micro_batch = 1)
    }
}

/// Returns one line per setting that helps; the last lines give values that fit.
pub(super) fn advice(setup: &Setup) -> Vec<String> {
    let (now, room) = (setup.peak(), setup.cluster.memory);
    let mut lines = Vec::new();
    let mut knob = |name: String, peak: u64| {
        if peak < now {
            let verdict = if peak <= room { "fits" } else { "not enough alone" };
            lines.push(format!("{name}: {} GiB instead of {} GiB, {verdict}", gib(peak), gib(now)));
        }
    };
    let bf16 = |setup: &mut Setup| setup.architecture.unet_dtype = FloatDType::BF16;
    let recompute = |setup: &mut Setup| setup.train.recompute = true;
    let mut leanest = setup.with_single_samples();
    bf16(&mut leanest);
    recompute(&mut leanest);

    knob("base.dtype: bf16".into(), setup.with(bf16).peak());
    knob("train.recompute: true".into(), setup.with(recompute).peak());
    knob("train.micro_batch: 1".into(), setup.with_single_samples().peak());
    let sharded = setup.stages().iter().map(|stage| stage.memory.peak_sharded()).max().unwrap_or(0);
    knob(format!("sharding the optimiser state over {} GPUs", setup.cluster.gpus), sharded);
    let of_basis = |setup: &Setup, basis: usize| setup.with(|setup| setup.hyper_lora.basis = basis).peak();
    let largest = |setup: &Setup| {
        let below = (1..=setup.hyper_lora.basis.div_ceil(BASIS_STEP)).rev().map(|steps| steps * BASIS_STEP);
        below.into_iter().find(|basis| of_basis(setup, *basis) <= room)
    };
    match (largest(setup), largest(&leanest)) {
        (Some(basis), _) => knob(format!("hyper_lora.basis: {basis}"), of_basis(setup, basis)),
        (None, Some(basis)) => {
            let name = format!("hyper_lora.basis: {basis} with bf16, recompute and micro_batch 1");
            knob(name, of_basis(&leanest, basis));
        }
        (None, None) => {
            lines.push(format!("no basis of {BASIS_STEP} or more fits: take smaller ranks, or a larger GPU"));
        }
    }
    lines
}
