//! AdamW, clipping and learning rate schedule against `torch.optim` (fixture: `ci/parity/optim_fixtures.py`), and
//! restored state.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor, TensorData};
use burn_hyperlora::optim::{Decay, GradientMap, OptimConfig, Optimizer, ReducedGradients, Schedule, Sharding, Wire};
use hyperlora_ranks::{Collective, Pending, WorldOfOne};
use safetensors::SafeTensors;

const STEPS: usize = 20;

/// Reads the fixture's tensors, flat.
fn fixture() -> BTreeMap<String, Vec<f32>> {
    let path = hyperlora_testing::fixture("adamw.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    read.tensors()
        .into_iter()
        .map(|(name, view)| (name, view.data().chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()))
        .collect()
}

fn config() -> OptimConfig {
    OptimConfig {
        learning_rate: 1e-2,
        weight_decay: 0.05,
        schedule: Schedule { warmup_steps: 5, decay: Decay::Cosine { min_factor: 0.1 } },
        ..OptimConfig::default()
    }
}

fn linear(fixture: &BTreeMap<String, Vec<f32>>) -> Linear {
    let device = Device::flex().autodiff();
    let mut linear = LinearConfig::new(3, 4).init(&device);
    let data = |name: &str| fixture[name].clone();
    linear.weight = Param::from_data(TensorData::new(data("weight.0"), [3, 4]), &device);
    linear.bias = Some(Param::from_data(TensorData::new(data("bias.0"), [4]), &device));
    linear
}

/// Returns row `step` of a recorded tensor.
fn row<'a>(fixture: &'a BTreeMap<String, Vec<f32>>, name: &str, step: usize) -> &'a [f32] {
    let all = &fixture[name];
    let width = all.len() / STEPS;
    &all[step * width..][..width]
}

fn gradients(fixture: &BTreeMap<String, Vec<f32>>, step: usize) -> GradientMap {
    let mut gradients = GradientMap::default();
    for name in ["weight", "bias"] {
        gradients.insert(name, Tensor::from_floats(row(fixture, &format!("{name}.grad"), step), &Device::flex()));
    }
    gradients
}

fn optimizer(linear: &Linear) -> Optimizer {
    Optimizer::new(&config(), linear, Sharding::WHOLE)
}

fn reduced(optimizer: &mut Optimizer, gradients: GradientMap) -> ReducedGradients {
    optimizer.accumulate(gradients).unwrap();
    optimizer.reduce(&WorldOfOne::new()).unwrap()
}

fn moments(optimizer: &Optimizer) -> BTreeMap<String, TensorData> {
    let pieces = optimizer.pieces(&WorldOfOne::new());
    pieces.into_iter().map(|(name, moment)| (name, moment.into_data())).collect()
}

/// Restores a state whose moments are all in memory.
fn restore(
    optimizer: &mut Optimizer,
    module: &Linear,
    steps: &BTreeMap<String, usize>,
    moments: &BTreeMap<String, TensorData>,
) -> hyperlora_core::Result<()> {
    let lengths = moments.iter().map(|(name, data)| (name.as_str(), data.num_elements())).collect();
    let read = |name: &str, range: Range<usize>| {
        let numbers: Vec<f32> = moments[name].iter().collect();
        Ok(TensorData::from(&numbers[range]))
    };
    optimizer.restore(module, steps, lengths, read, Path::new("step-1"))
}

fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= tolerance * expected.abs().max(1e-6), "{what}: {found} != {expected}");
    }
}

fn values(linear: &Linear) -> [Vec<f32>; 2] {
    [
        linear.weight.val().to_data().try_to_vec().unwrap(),
        linear.bias.as_ref().unwrap().val().to_data().try_to_vec().unwrap(),
    ]
}

/// Runs steps `range` of the fixture's run.
fn run(
    fixture: &BTreeMap<String, Vec<f32>>,
    mut linear: Linear,
    optimizer: &mut Optimizer,
    range: std::ops::Range<usize>,
) -> Linear {
    for step in range {
        let learning_rate = config().learning_rate_at(step as u64, STEPS as u64);
        let gradients = reduced(optimizer, gradients(fixture, step)).clip(config().clip_norm);
        optimizer.step(&mut linear, gradients, learning_rate, &WorldOfOne::new()).unwrap();
    }
    linear
}

#[test]
fn twenty_steps_are_torchs() {
    let fixture = fixture();
    let mut linear = linear(&fixture);
    let mut optimizer = optimizer(&linear);
    for step in 0..STEPS {
        let norm = reduced(&mut optimizer, gradients(&fixture, step)).norm as f32;
        assert_close("norm", &[norm], row(&fixture, "norm", step), 1e-5);
        let learning_rate = config().learning_rate_at(step as u64, STEPS as u64) as f32;
        assert_close("learning rate", &[learning_rate], row(&fixture, "learning_rate", step), 1e-6);

        linear = run(&fixture, linear, &mut optimizer, step..step + 1);
        let [weight, bias] = values(&linear);
        assert_close("weight", &weight, row(&fixture, "weight.after", step), 1e-5);
        assert_close("bias", &bias, row(&fixture, "bias.after", step), 1e-5);
        assert!(linear.weight.is_require_grad() && linear.weight.val().is_require_grad());
    }
    for (name, moment) in moments(&optimizer) {
        assert_close(&name, &moment.try_to_vec().unwrap(), &fixture[&name], 1e-4);
    }
}

#[test]
fn a_restored_optimiser_goes_on_bit_for_bit() {
    let fixture = fixture();
    let start = linear(&fixture);
    let expected = values(&run(&fixture, start.clone(), &mut optimizer(&start), 0..STEPS));

    let mut first = optimizer(&start);
    let half = run(&fixture, start, &mut first, 0..STEPS / 2);
    let mut second = optimizer(&half);
    restore(&mut second, &half, &first.steps(), &moments(&first)).unwrap();
    let resumed = values(&run(&fixture, half, &mut second, STEPS / 2..STEPS));

    for (resumed, expected) in resumed.iter().flatten().zip(expected.iter().flatten()) {
        assert_eq!(resumed.to_bits(), expected.to_bits());
    }
}

#[test]
fn frozen_parameters_keep_their_bits_and_have_no_state() {
    let fixture = fixture();
    let mut linear = linear(&fixture);
    linear.bias = linear.bias.map(|bias| bias.set_require_grad(false));
    let before = values(&linear);
    let mut optimizer = optimizer(&linear);
    let input = Tensor::<2>::ones([1, 3], &Device::flex().autodiff());
    let mut backward = linear.forward(input).sum().backward();
    let taken = GradientMap::take(&linear, &mut backward);
    let reduced = reduced(&mut optimizer, taken);
    optimizer.step(&mut linear, reduced, 1e-2, &WorldOfOne::new()).unwrap();

    let after = values(&linear);
    assert_ne!(before[0], after[0]);
    assert_eq!(before[1], after[1]);
    assert_eq!(optimizer.steps().into_keys().collect::<Vec<_>>(), ["weight"]);
}

#[test]
fn state_that_does_not_fit_is_one_error_and_changes_nothing() {
    let fixture = fixture();
    let start = linear(&fixture);
    let mut made = optimizer(&start);
    let linear = run(&fixture, start, &mut made, 0..1);
    let tensors = moments(&made);
    let message = |steps: &BTreeMap<String, usize>, tensors: BTreeMap<String, TensorData>, module: &Linear| {
        let mut optimizer = optimizer(module);
        let error = restore(&mut optimizer, module, steps, &tensors).unwrap_err();
        assert!(optimizer.steps().is_empty());
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };

    let mut missing = tensors.clone();
    missing.remove("exp_avg.bias");
    assert!(message(&made.steps(), missing, &linear).contains("`exp_avg.bias` is missing"));

    let mut short = tensors.clone();
    short.insert("exp_avg_sq.bias".into(), TensorData::new(vec![0.0_f32; 3], [3]));
    assert!(message(&made.steps(), short, &linear).contains("has 3 elements, the parameter has 4"));

    let mut stray = tensors.clone();
    stray.insert("exp_avg.other".into(), TensorData::new(vec![0.0_f32; 3], [3]));
    assert!(message(&made.steps(), stray, &linear).contains("`exp_avg.other`"));

    let frozen = linear.clone().no_grad();
    assert!(message(&made.steps(), tensors, &frozen).contains("not trained here"));
}

#[test]
fn clipping_scales_the_whole_vector_and_bad_numbers_show_in_the_norm() {
    let linear = linear(&fixture());
    let mut optimizer = optimizer(&linear);
    let mut norm_after = |bias: f32, clip: Option<f64>| {
        let mut gradients = GradientMap::default();
        gradients.insert("weight", Tensor::full([12], 3.0_f32, &Device::flex()));
        gradients.insert("bias", Tensor::full([4], bias, &Device::flex()));
        let reduced = reduced(&mut optimizer, gradients);
        let before = reduced.norm;
        let moved = optimizer_step(&linear, reduced.clip(clip));
        (before, moved)
    };
    let (before, full) = norm_after(2.0, None);
    assert!((before - (12.0_f64 * 9.0 + 4.0 * 4.0).sqrt()).abs() < 1e-5);
    // A limit above the norm changes nothing; below it, all first moments shrink by the same factor.
    assert_eq!(norm_after(2.0, Some(before * 1.01)).1, full);
    for (clipped, full) in norm_after(2.0, Some(before / 10.0)).1.iter().zip(&full) {
        assert!((clipped * 10.0 - full).abs() < 1e-6 && *full != 0.0, "{clipped} {full}");
    }
    assert!([f32::NAN, f32::INFINITY].into_iter().all(|bad| !norm_after(bad, None).0.is_finite()));
}

/// Returns the first moments after one step: a fixed fraction of the clipped gradients.
fn optimizer_step(linear: &Linear, gradients: ReducedGradients) -> Vec<f32> {
    let mut optimizer = optimizer(linear);
    optimizer.step(&mut linear.clone(), gradients, 0.0, &WorldOfOne::new()).unwrap();
    let first = moments(&optimizer).into_iter().filter(|(name, _)| name.starts_with("exp_avg."));
    first.flat_map(|(_, moment)| moment.try_to_vec::<f32>().unwrap()).collect()
}

/// Rank 1 of two with the same gradients. They were summed in another order, so the main rank found another norm.
struct SecondOfTwo {
    square_of_the_first: f64,
}

impl Collective for SecondOfTwo {
    fn rank(&self) -> usize {
        1
    }

    fn world_size(&self) -> usize {
        2
    }

    fn hosts(&self) -> &[String] {
        &[]
    }

    fn all_reduce_mean<'a>(&'a self, _what: &'a str, bucket: Tensor<1>) -> hyperlora_core::Result<Pending<'a>> {
        Ok(Box::new(|| Ok(bucket)))
    }

    fn reduce_scatter_mean<'a>(&'a self, _what: &'a str, bucket: Tensor<1>) -> hyperlora_core::Result<Pending<'a>> {
        Ok(Box::new(|| Ok(bucket)))
    }

    fn all_gather<'a>(&'a self, _what: &'a str, part: Tensor<1>) -> hyperlora_core::Result<Pending<'a>> {
        Ok(Box::new(|| Ok(Tensor::cat(vec![part; 2], 0))))
    }

    fn broadcast<'a>(&'a self, _what: &'a str, tensor: Tensor<1>) -> hyperlora_core::Result<Pending<'a>> {
        Ok(Box::new(|| Ok(tensor)))
    }

    fn exchange(&self, _what: &str, note: &[u8]) -> hyperlora_core::Result<Vec<Vec<u8>>> {
        Ok(vec![self.square_of_the_first.to_le_bytes().to_vec(), note.to_vec()])
    }

    fn barrier(&self, _what: &str, _deadline: Duration) -> hyperlora_core::Result<()> {
        Ok(())
    }
}

#[test]
fn all_ranks_clip_by_the_same_norm() {
    let linear = linear(&fixture());
    let world = SecondOfTwo { square_of_the_first: 400.0 };
    let norm = |sharded: bool| {
        let mut optimizer = Optimizer::new(&config(), &linear, Sharding::of(&world, sharded, Wire::F32));
        let mut gradients = GradientMap::default();
        gradients.insert("weight", Tensor::full([12], 3.0_f32, &Device::flex()));
        gradients.insert("bias", Tensor::full([4], 3.0_f32, &Device::flex()));
        optimizer.accumulate(gradients).unwrap();
        optimizer.reduce(&world).unwrap().norm
    };
    // With all gradients on each rank, the main rank's norm counts. With half of them (eight numbers) on each, the
    // halves add up.
    assert_eq!(norm(false), 20.0);
    assert_eq!(norm(true), (400.0_f64 + 8.0 * 9.0).sqrt());
}
