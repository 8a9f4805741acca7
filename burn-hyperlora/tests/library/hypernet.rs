//! Hypernetwork parity with `ci/parity/hyper_reference.py`; `ci/parity/hyper_fixtures.py` made the numbers.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use burn_hyperlora::hypernet::{CoefficientStatistics, HyperLora, HyperLoraConfig, ParameterGroup, Stage};
use burn_hyperlora::parameters::ParameterVisitor;
use hyperlora_sdxl::lora::LoraWeights;
use hyperlora_sdxl::weights::Weights;

use crate::hyper_fixture::{config, fixtures, sites};

const TOLERANCE: f32 = 1e-4;

fn model(device: &Device) -> HyperLora {
    HyperLora::load(&fixtures(), &config(), &sites(), device).unwrap()
}

/// Inputs and outputs of the reference, by name.
struct Expected(Weights);

impl Expected {
    fn open() -> Self {
        Self(Weights::open(&fixtures().join("expected.safetensors"), &Device::flex()).unwrap())
    }

    fn get<const D: usize>(&self, name: &str) -> Tensor<D> {
        let shapes = self.0.shapes();
        let shape = shapes.get(name).unwrap_or_else(|| panic!("no {name} in the fixture"));
        self.0.at("").tensor(name, <[usize; D]>::try_from(*shape).unwrap())
    }

    fn has(&self, name: &str) -> bool {
        self.0.shapes().contains_key(name)
    }

    fn clip(&self) -> Tensor<3> {
        self.get("clip_states")
    }

    fn id(&self) -> Tensor<2> {
        self.get("id_embedding")
    }
}

/// Relative error: norm of the difference over the norm of the expected tensor.
fn relative_error<const D: usize>(got: Tensor<D>, expected: Tensor<D>) -> f32 {
    assert_eq!(got.dims(), expected.dims());
    let norm = |t: Tensor<D>| t.square().sum().sqrt().into_scalar::<f32>();
    let (got, size) = (got.inner(), norm(expected.clone()));
    assert!(size > 0.0, "an expectation of zeros checks nothing");
    norm(got - expected) / size
}

/// Checks the coefficients and every LoRA tensor of one case.
fn check_forward(expected: &Expected, case: &str, coefficients: &Tensor<3>, lora: &LoraWeights) {
    let error = relative_error(coefficients.clone(), expected.get(&format!("{case}.coefficients")));
    assert!(error <= TOLERANCE, "{case}.coefficients: relative error {error:e}");
    for (i, tensor) in lora.tensors().enumerate() {
        let name = format!("{case}.lora.{}.{}", i / 2, ["down", "up"][i % 2]);
        let error = relative_error(tensor.clone(), expected.get(&name));
        assert!(error <= TOLERANCE, "{name}: relative error {error:e}");
    }
    assert_eq!(lora.tensors().count(), sites().len() * 8);
}

/// Checks the gradients of the probe-weighted sum of the LoRA with respect to every parameter of the hypernetwork.
fn check_gradients(expected: &Expected, case: &str, model: &HyperLora, lora: &LoraWeights) {
    struct Compare<'a> {
        gradients: burn::tensor::Gradients,
        expected: &'a Expected,
        case: &'a str,
        compared: usize,
    }
    impl ParameterVisitor for Compare<'_> {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            let gradient = parameter.val().grad(&self.gradients);
            let key = format!("{}.gradient.{name}", self.case);
            match gradient {
                Some(gradient) => {
                    let gradient = if D == 2 { gradient.swap_dims(0, 1) } else { gradient };
                    let error = relative_error(gradient, self.expected.get(&key));
                    assert!(error <= TOLERANCE, "{key}: relative error {error:e}");
                    self.compared += 1;
                }
                None => assert!(!self.expected.has(&key), "{key}: no gradient came"),
            }
        }
    }
    let mut loss = Tensor::<1>::zeros([1], &Device::flex()).autodiff();
    for (i, tensor) in lora.tensors().enumerate() {
        let probe: Tensor<3> = expected.get(&format!("{case}.probe.{}.{}", i / 2, ["down", "up"][i % 2]));
        loss = loss + (tensor.clone() * probe.autodiff()).sum();
    }
    let mut compare = Compare { gradients: loss.backward(), expected, case, compared: 0 };
    model.visit_parameters(&mut compare);
    let prefix = format!("{case}.gradient.");
    assert_eq!(compare.compared, expected.0.shapes().keys().filter(|key| key.starts_with(&prefix)).count());
}

fn check_id(case: &str, images: usize, samples: usize, with_embedding: bool) {
    let expected = Expected::open();
    let count = images * samples;
    let clip = expected.clip().narrow(0, 0, count);
    let id = || with_embedding.then(|| expected.id().narrow(0, 0, count));

    let plain = model(&Device::flex());
    let coefficients = plain.id_coefficients(clip.clone(), id(), images);
    check_forward(&expected, case, &coefficients, &plain.id_lora_of(coefficients.clone()));

    let model = model(&Device::flex().autodiff());
    let coefficients = model.id_coefficients(clip.autodiff(), id().map(Tensor::autodiff), images);
    let lora = model.id_lora_of(coefficients.clone());
    check_forward(&expected, case, &coefficients, &lora);
    check_gradients(&expected, case, &model, &lora);
}

#[test]
fn two_conditions_agree_with_the_reference() {
    check_id("id", 1, 2, true);
}

#[test]
fn without_an_id_embedding_its_path_is_off() {
    check_id("id_clip_only", 1, 2, false);
}

#[test]
fn several_images_are_averaged() {
    check_id("id_two_images", 2, 2, true);
}

#[test]
fn one_condition_agrees_with_the_reference() {
    let expected = Expected::open();
    let states = expected.get::<3>("base_states").narrow(0, 0, 2);
    let model = model(&Device::flex().autodiff());
    let coefficients = model.base_coefficients(states.autodiff(), 1).unwrap();
    let lora = model.base_lora_of(coefficients.clone()).unwrap();
    check_forward(&expected, "base", &coefficients, &lora);
    check_gradients(&expected, "base", &model, &lora);
}

fn values(tensor: &Tensor<3>) -> Vec<f32> {
    tensor.to_data().iter::<f32>().collect()
}

/// Stages follow each other without a jump.
#[test]
fn stage_3_begins_with_the_function_of_stage_2() {
    let expected = Expected::open();
    let (clip, id) = (expected.clip(), expected.id());
    let model = model(&Device::flex());
    let stage_2 = model.id_coefficients(clip.clone(), None, 1);
    assert_ne!(values(&model.id_coefficients(clip.clone(), Some(id.clone()), 1)), values(&stage_2));
    let stage_3 = model.start_id_embedding_stage().id_coefficients(clip, Some(id), 1);
    assert_eq!(values(&stage_3), values(&stage_2));
}

/// The first gradient of stage 3 must reach the parameters that it trains.
#[test]
fn stage_3_can_learn_from_where_it_starts() {
    struct Trained {
        gradients: burn::tensor::Gradients,
        moved: Vec<String>,
    }
    impl ParameterVisitor for Trained {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            let gradient = parameter.val().grad(&self.gradients);
            if gradient.is_some_and(|gradient| gradient.abs().sum().into_scalar::<f32>() > 0.0) {
                self.moved.push(name.into());
            }
        }
    }
    let expected = Expected::open();
    let groups = ParameterGroup::defaults(Stage::IdEmbedding);
    let model = model(&Device::flex().autodiff()).start_id_embedding_stage().trainable(groups);
    let coefficients = model.id_coefficients(expected.clip(), Some(expected.id()), 1);
    let probe: Tensor<3> = expected.get("id.coefficients");
    let gradients = (coefficients * probe.repeat_dim(0, 2)).sum().backward();
    let mut trained = Trained { gradients, moved: Vec::new() };
    model.visit_parameters(&mut trained);
    let silent = ["resampler.layers.0.attn2.to_out.0.weight", "resampler.layers.1.attn2.to_out.0.weight"];
    assert_eq!(trained.moved, silent);
}

#[test]
fn every_parameter_belongs_to_one_group_and_only_chosen_ones_take_gradients() {
    struct Flags(BTreeMap<String, bool>);
    impl ParameterVisitor for Flags {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            self.0.insert(name.into(), parameter.val().is_require_grad());
        }
    }
    let model = HyperLora::new(&config(), &sites(), 1, &Device::flex().autodiff());
    let names = model.parameter_names();
    assert_eq!(names.iter().find(|name| ParameterGroup::of(name).is_none()), None);
    let by_group: Vec<usize> = ParameterGroup::ALL.map(|group| model.names_in(&[group]).len()).into();
    assert_eq!(by_group.iter().sum::<usize>(), names.len());
    assert!(by_group.iter().all(|&count| count > 0), "a group without parameters: {by_group:?}");

    let stages = [Stage::Base, Stage::IdClip, Stage::IdEmbedding];
    for stage in stages {
        let groups = ParameterGroup::defaults(stage);
        let mut flags = Flags(BTreeMap::new());
        model.clone().trainable(groups).visit_parameters(&mut flags);
        let trained: Vec<_> = flags.0.into_iter().filter_map(|(name, trains)| trains.then_some(name)).collect();
        let mut expected = model.names_in(groups);
        expected.sort();
        assert_eq!(trained, expected, "{stage:?}");
    }
    let unknown = "attn4".parse::<ParameterGroup>().unwrap_err();
    assert_eq!(unknown.exit_code(), 2);
    assert!(unknown.to_string().contains("base_bases") && unknown.to_string().contains("attn4"), "{unknown}");
    assert!(ParameterGroup::ALL.into_iter().all(|group| group.name().parse::<ParameterGroup>().unwrap() == group));
}

#[test]
fn the_seed_alone_sets_the_first_values() {
    struct Values(BTreeMap<String, Vec<f32>>);
    impl ParameterVisitor for Values {
        fn visit<const D: usize>(&mut self, name: &str, parameter: &Param<Tensor<D>>) {
            self.0.insert(name.into(), parameter.val().to_data().iter::<f32>().collect());
        }
    }
    let of = |seed, device: &Device| {
        let mut values = Values(BTreeMap::new());
        HyperLora::new(&config(), &sites(), seed, device).visit_parameters(&mut values);
        values.0
    };
    let first = of(7, &Device::flex());
    Device::flex().seed(99);
    assert!(of(7, &Device::flex().autodiff()) == first, "the device or its generator took part");

    let other = of(8, &Device::flex());
    let drawn = ["resampler.latents", "id_projector.0.weight", "hyper_lora_modules.2.to_k.base_down_basis"];
    assert!(drawn.into_iter().all(|name| other[name] != first[name]));
    // Every parameter draws from its own stream, so equal shapes have different values.
    let (q, v) = ("resampler.layers.0.attn1.to_q.weight", "resampler.layers.0.attn1.to_v.weight");
    assert!(first[q].len() == first[v].len() && first[q] != first[v]);
    let std = |values: &[f32]| (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
    assert!((std(&first[q]) * 14f32.sqrt() - 1.0).abs() < 0.2, "weights of std 1 / sqrt(in)");
}

/// A new LoRA leaves the UNet unchanged, but its down side is nonzero, otherwise up would get no gradient.
#[test]
fn a_new_lora_has_no_effect_yet_but_can_learn() {
    let clip = Expected::open().clip();
    let model = HyperLora::new(&config(), &sites(), 3, &Device::flex());
    for lora in [model.id_lora(clip.clone(), None), model.base_lora(clip).unwrap()] {
        for (i, tensor) in lora.tensors().enumerate() {
            assert_eq!(values(tensor).iter().any(|&value| value != 0.0), i % 2 == 0, "tensor {i}");
        }
    }
}

#[test]
fn statistics_tell_one_base_from_all_and_one_lora_from_many() {
    let device = Device::flex();
    let one = Tensor::<3>::from_floats([[[1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, -1.0, 0.0]]], &device);
    let all = Tensor::<3>::from_floats([[[0.5, 0.5, -0.5, 0.5]], [[0.5, 0.5, -0.5, 0.5]]], &device);
    let (one, all) = (CoefficientStatistics::of(&one).unwrap(), CoefficientStatistics::of(&all).unwrap());
    let near = |a: f32, b: f32| (a - b).abs() < 1e-5;
    assert!(near(one.effective_bases, 1.0) && near(one.mean_abs, 0.25) && near(one.spread, 0.5), "{one:?}");
    assert!(near(all.effective_bases, 4.0) && near(all.mean_abs, 0.5) && near(all.spread, 0.0), "{all:?}");
}

#[test]
fn a_hypernetwork_without_a_base_lora_says_so() {
    let config = HyperLoraConfig { base_rank: 0, ..config() };
    let model = HyperLora::new(&config, &sites(), 0, &Device::flex());
    assert!(!model.has_base() && model.num_params() > 0);
    assert_eq!(model.base_lora(Expected::open().clip()).err().map(|error| error.exit_code()), Some(2));
}
