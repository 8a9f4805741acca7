//! Parity of every sampler step with diffusers; `ci/parity/sampler_fixtures.py` made the numbers.

use std::fs;
use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};
use hyperlora_sdxl::scheduler::{NoiseSampler, NoiseSchedule, SamplerKind, ScheduleConfig};
use safetensors::SafeTensors;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    sampler: SamplerKind,
    steps: usize,
    config: ScheduleConfig,
}

fn fixture(name: &str) -> PathBuf {
    hyperlora_testing::fixture(name)
}

fn tensor(file: &SafeTensors<'_>, name: &str) -> TensorData {
    let view = file.tensor(name).unwrap();
    let floats = view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
    TensorData::new(floats.collect::<Vec<f32>>(), view.shape().to_vec())
}

/// Relative error: largest difference over the largest expected magnitude. NaN stays NaN and fails any tolerance.
fn relative_error(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let differences = actual.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let worst = differences.fold(0.0, |worst: f32, d| if d <= worst { worst } else { d });
    worst / expected.iter().fold(f32::MIN_POSITIVE, |largest, value| largest.max(value.abs()))
}

fn schedule(changes: &[(&str, serde_json::Value)]) -> NoiseSchedule {
    let mut config = serde_json::json!({
        "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading", "steps_offset": 1,
    });
    for (key, value) in changes {
        config[key] = value.clone();
    }
    NoiseSchedule::new(serde_json::from_value(config).unwrap()).unwrap()
}

#[test]
fn every_step_agrees_with_diffusers() {
    let device = Device::flex();
    let cases: Vec<Case> = serde_json::from_slice(&fs::read(fixture("samplers.json")).unwrap()).unwrap();
    let bytes = fs::read(fixture("samplers.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let outputs = Tensor::<5>::from_data(tensor(&file, "outputs"), &device);
    let latents = Tensor::<4>::from_data(tensor(&file, "latents"), &device);
    for (index, Case { sampler: kind, steps, config }) in cases.into_iter().enumerate() {
        // When almost nothing of the image is left, diffusers' own Euler step cancels to five digits in f32.
        let tolerance = if kind == SamplerKind::Euler && config.rescale_betas_zero_snr { 1e-4 } else { 1e-5 };
        let what = format!("case {index}, {kind:?}, {steps} steps");
        let mut sampler = NoiseSampler::new(&NoiseSchedule::new(config).unwrap(), Some(kind), steps).unwrap();
        let timesteps = tensor(&file, &format!("{index}.timesteps")).try_to_vec::<f32>().unwrap();
        assert!(relative_error(sampler.timesteps(), &timesteps) < 1e-6, "{what}: {:?}", sampler.timesteps());

        // Each step starts from diffusers' own latents, so that errors do not accumulate.
        let trace = Tensor::<5>::from_data(tensor(&file, &format!("{index}.trace")), &device);
        let at = |all: &Tensor<5>, step: usize| all.clone().narrow(0, step, 1).squeeze_dim::<4>(0);
        let close = |place: &str, actual: Tensor<4>, expected: Tensor<4>| {
            let [actual, expected] = [actual, expected].map(|tensor| tensor.into_data().try_to_vec::<f32>().unwrap());
            let error = relative_error(&actual, &expected);
            assert!(error <= tolerance, "{what}, {place}: relative error {error:e}");
        };
        close("start", latents.clone() * sampler.init_noise_sigma(), at(&trace, 0));
        for step in 0..steps {
            let after = sampler.step(at(&outputs, step), at(&trace, step), step);
            close(&format!("step {step}"), after, at(&trace, step + 1));
        }
    }
}

#[test]
fn the_base_says_which_sampler_draws() {
    let of = |class: &str, karras: bool| {
        let changes = [("_class_name", class.into()), ("use_karras_sigmas", karras.into())];
        NoiseSampler::new(&schedule(&changes), None, 5).unwrap()
    };
    assert!(matches!(of("EulerDiscreteScheduler", false), NoiseSampler::Euler(_)));
    assert!(matches!(of("PNDMScheduler", false), NoiseSampler::Euler(_)));
    assert!(matches!(of("DDIMScheduler", false), NoiseSampler::Ddim(_)));
    let solver = of("DPMSolverMultistepScheduler", false);
    assert!(matches!(solver, NoiseSampler::DpmSolver(_)));
    let karras = NoiseSampler::new(&schedule(&[]), Some(SamplerKind::DpmPp2mKarras), 5).unwrap();
    assert_eq!(of("DPMSolverMultistepScheduler", true).timesteps(), karras.timesteps());
    assert_ne!(solver.timesteps(), karras.timesteps());
}

#[test]
fn a_schedule_that_ends_in_noise_leaves_nothing_of_the_image() {
    let changes = [("rescale_betas_zero_snr", true.into()), ("prediction_type", "v_prediction".into())];
    let (rescaled, plain) = (schedule(&changes), schedule(&[]));
    assert_eq!(rescaled.alphas_cumprod().last(), Some(&0.0));
    assert_eq!(rescaled.alphas_cumprod().first(), plain.alphas_cumprod().first());
    assert!(rescaled.alphas_cumprod().is_sorted_by(|a, b| a > b));
}

#[test]
fn steps_that_do_not_fit_the_schedule_are_refused() {
    let kinds = [SamplerKind::Euler, SamplerKind::DpmPp2m, SamplerKind::DpmPp2mKarras, SamplerKind::Ddim];
    for (kind, most) in kinds.into_iter().zip([1000, 999, 1000, 999]) {
        assert!(NoiseSampler::new(&schedule(&[]), Some(kind), most).is_ok(), "{kind:?}");
        for steps in [0, most + 1] {
            let error = NoiseSampler::new(&schedule(&[]), Some(kind), steps).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains("steps"), "{error}");
        }
    }
}
