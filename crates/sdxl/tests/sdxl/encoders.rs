//! Parity of the frozen encoders with diffusers and transformers, on tiny random models with all SDXL components.
//! `ci/parity/encoder_fixtures.py` made the models and the numbers.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};
use hyperlora_sdxl::models::clip_text::ClipTextModel;
use hyperlora_sdxl::models::clip_vision::{ClipVisionModel, ImageProcessor};
use hyperlora_sdxl::models::vae::AutoencoderKl;
use hyperlora_sdxl::scheduler::{EulerSampler, NoiseSchedule, ScheduleConfig};
use hyperlora_sdxl::text::TextEncoders;
use hyperlora_sdxl::tokenizer::{ClipTokenizer, PROMPT_TOKENS};
use hyperlora_sdxl::weights::{SafetensorsFile, TensorEntry, save_lazily};
use safetensors::{Dtype, SafeTensors};

fn fixtures() -> PathBuf {
    hyperlora_testing::fixture("encoders")
}

fn device() -> Device {
    Device::flex()
}

/// The f32 tensors of one fixture file.
struct Expected(HashMap<String, (Vec<usize>, Vec<f32>)>);

impl Expected {
    fn open(name: &str) -> Self {
        let bytes = fs::read(fixtures().join(name).with_extension("safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
        let values = |view: &safetensors::tensor::TensorView<'_>| {
            view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
        };
        Self(tensors.into_iter().map(|(name, view)| (name, (view.shape().to_vec(), values(&view)))).collect())
    }

    fn tensor<const D: usize>(&self, name: &str) -> Tensor<D> {
        let (shape, values) = &self.0[name];
        Tensor::from_data(TensorData::new(values.clone(), shape.clone()), &device())
    }

    fn values(&self, name: &str) -> &[f32] {
        &self.0[name].1
    }
}

/// Relative error: largest difference over the largest expected magnitude.
fn relative_error(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let difference = actual.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // `f32::max` would ignore NaN, but NaN must fail.
    let worst = difference.fold(0.0, |worst: f32, d| if d <= worst { worst } else { d });
    worst / expected.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()))
}

fn assert_close<const D: usize>(what: &str, actual: Tensor<D>, expected: &Tensor<D>, tolerance: f32) {
    assert_eq!(actual.dims(), expected.dims(), "{what}");
    let [actual, expected] = [actual, expected.clone()].map(|t| t.into_data().try_to_vec::<f32>().unwrap());
    let error = relative_error(&actual, &expected);
    assert!(error <= tolerance, "{what}: relative error {error:e} above {tolerance:e}");
}

/// Copies a fixture folder's files, applying `edit` to the file `name`.
fn with_edited(folder: &str, name: &str, edit: impl Fn(String) -> String) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixtures().join(folder)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = copy.path().join(name);
    fs::write(&path, edit(fs::read_to_string(&path).unwrap())).unwrap();
    copy
}

#[test]
fn the_autoencoder_agrees_with_diffusers_at_any_size() {
    let vae = AutoencoderKl::load(&fixtures().join("vae"), &device()).unwrap();
    assert_eq!(vae.config().factor(), 4);
    let expected = Expected::open("autoencoder_kl");
    for size in ["even", "odd"] {
        let get = |name: &str| expected.tensor::<4>(&format!("{size}.{name}"));
        let (mean, logvar) = vae.encode_mean_logvar(get("images"));
        assert_close("mean", mean, &get("mean"), 1e-4);
        assert_close("logvar", logvar, &get("logvar"), 1e-4);
        assert_close("latents", vae.encode(get("images"), get("noise")), &get("latents"), 1e-4);
        assert_close("decoded", vae.decode(get("latents")), &get("decoded"), 1e-4);
    }
}

#[test]
fn the_text_encoders_agree_with_transformers() {
    let texts = TextEncoders::load(&fixtures(), &device()).unwrap();
    let prompts: Vec<String> =
        serde_json::from_str(&fs::read_to_string(fixtures().join("prompts.json")).unwrap()).unwrap();
    let states = texts.encode(&prompts).unwrap();
    let expected = Expected::open("text_encoders");
    assert_close("prompt_embeds", states.prompt_embeds, &expected.tensor("prompt_embeds"), 1e-4);
    assert_close("pooled", states.pooled, &expected.tensor("pooled"), 1e-4);
}

#[test]
fn the_tokenizers_agree_with_transformers() {
    #[derive(serde::Deserialize)]
    struct Case {
        text: String,
        first: Vec<i32>,
        second: Vec<i32>,
    }
    let cases: Vec<Case> = serde_json::from_str(&fs::read_to_string(fixtures().join("tokens.json")).unwrap()).unwrap();
    assert!(cases.len() > 20);
    let load = |name| ClipTokenizer::load(&fixtures().join(name)).unwrap();
    let (first, second) = (load("tokenizer"), load("tokenizer_2"));
    for case in cases {
        assert_eq!(first.encode(&case.text).unwrap(), case.first, "{:?}", case.text);
        assert_eq!(second.encode(&case.text).unwrap(), case.second, "{:?}", case.text);
        assert_eq!(case.first.len(), PROMPT_TOKENS);
    }
}

#[test]
fn a_tokenizer_json_serves_as_well_as_two_files() {
    let folder = fixtures().join("tokenizer");
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let vocabulary: serde_json::Value = serde_json::from_str(&read("vocab.json")).unwrap();
    let merges = read("merges.txt");
    let merges: Vec<Vec<&str>> = merges.lines().skip(1).map(|line| line.split(' ').collect()).collect();
    let whole = serde_json::json!({"model": {"vocab": vocabulary, "merges": merges}});
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("tokenizer.json"), whole.to_string()).unwrap();

    let text = "fcsks fxhks fhyks, a portrait of the man's café";
    let [one, two] =
        [folder.as_path(), other.path()].map(|path| ClipTokenizer::load(path).unwrap().encode(text).unwrap());
    assert_eq!(one, two);
}

#[test]
fn the_image_processor_and_encoder_agree_with_transformers() {
    let picture = image::open(fixtures().join("picture.png")).unwrap().to_rgb8();
    // Portrait format: rows and columns swapped.
    let upright = image::imageops::flip_horizontal(&image::imageops::rotate90(&picture));
    // Smaller than the crop.
    let small = image::imageops::crop_imm(&picture, 30, 40, 27, 21).to_image();
    let expected = Expected::open("clip_vision");
    let pixel_values = expected.tensor::<4>("pixel_values");

    let processor = ImageProcessor::load(&fixtures().join("feature_extractor")).unwrap();
    let processed = processor.process(&[picture, upright, small], &device());
    // A difference of one level of 255 would be 7e-3, so every pixel is equal.
    assert_close("pixel_values", processed, &pixel_values, 1e-6);

    let model = ClipVisionModel::load(&fixtures().join("image_encoder"), &device()).unwrap();
    assert_eq!(model.config().tokens(), 17);
    assert_close("penultimate", model.penultimate(pixel_values), &expected.tensor("penultimate"), 1e-4);
}

#[test]
fn a_whole_clip_model_serves_as_its_image_encoder() {
    let copy = with_edited("image_encoder", "config.json", |text| format!("{{\"vision_config\": {text}}}"));
    let path = copy.path().join("model.safetensors");
    let source = SafetensorsFile::open(&path).unwrap();
    let mut entries: Vec<_> = source.entries().collect();
    for name in ["logit_scale", "text_projection.weight", "text_model.embeddings.position_ids"] {
        entries.push(TensorEntry { name: name.into(), dtype: Dtype::I64, shape: vec![1] });
    }
    save_lazily(&path, Default::default(), entries, |entry| match entry.dtype {
        Dtype::I64 => Ok(vec![0; 8]),
        _ => source.read_raw(&entry.name),
    })
    .unwrap();
    let [whole, alone] = [copy.path(), &fixtures().join("image_encoder")]
        .map(|folder| ClipVisionModel::load(folder, &device()).unwrap());
    let pixel_values = || Expected::open("clip_vision").tensor::<4>("pixel_values");
    assert!(whole.penultimate(pixel_values()).into_data() == alone.penultimate(pixel_values()).into_data());
}

#[test]
fn noise_is_added_as_diffusers_does() {
    let schedule = NoiseSchedule::load(&fixtures().join("scheduler")).unwrap();
    let expected = Expected::open("scheduler");
    assert!(relative_error(schedule.alphas_cumprod(), expected.values("alphas_cumprod")) < 1e-5);
    let (latents, noise) = (expected.tensor::<4>("latents"), expected.tensor::<4>("noise"));
    let timesteps = [0, 431, 999];
    assert_close(
        "noisy",
        schedule.add_noise(latents.clone(), noise.clone(), &timesteps),
        &expected.tensor("noisy"),
        1e-5,
    );
    assert_close("target", schedule.target(latents, noise.clone(), &timesteps), &noise, 0.0);
}

#[test]
fn every_euler_step_agrees_with_diffusers() {
    let expected = Expected::open("scheduler");
    let text = fs::read_to_string(fixtures().join("scheduler/scheduler_config.json")).unwrap();
    let (latents, noise) = (expected.tensor::<4>("latents"), expected.tensor::<4>("noise"));
    for prediction in ["epsilon", "v_prediction"] {
        for spacing in ["leading", "trailing", "linspace"] {
            let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
            config["prediction_type"] = prediction.into();
            config["timestep_spacing"] = spacing.into();
            let config: ScheduleConfig = serde_json::from_value(config).unwrap();
            let schedule = NoiseSchedule::new(config).unwrap();
            if prediction == "v_prediction" {
                let velocity = schedule.target(latents.clone(), noise.clone(), &[0, 431, 999]);
                assert_close("velocity", velocity, &expected.tensor("velocity"), 1e-5);
            }

            let sampler = EulerSampler::new(&schedule, 7).unwrap();
            let key = |name: &str| format!("{prediction}.{spacing}.{name}");
            assert!(relative_error(sampler.timesteps(), expected.values(&key("timesteps"))) < 1e-6, "{spacing}");
            assert!(relative_error(sampler.sigmas(), expected.values(&key("sigmas"))) < 1e-5, "{spacing}");
            // Each step starts from diffusers' own state, so that errors do not accumulate.
            let at = |name: &str, step: usize| expected.tensor::<5>(&key(name)).narrow(0, step, 1).squeeze_dim::<4>(0);
            let outputs = expected.tensor::<5>("outputs");
            let start = latents.clone() * sampler.init_noise_sigma();
            assert_close("start", start, &at("trace", 0), 1e-5);
            for step in 0..7 {
                let before = at("trace", step);
                let input = sampler.scale_model_input(before.clone(), step);
                assert_close("input", input, &at("inputs", step), 1e-5);
                let output = outputs.clone().narrow(0, step, 1).squeeze_dim(0);
                assert_close("step", sampler.step(output, before, step), &at("trace", step + 1), 1e-5);
            }
        }
    }
}

#[test]
fn unsupported_settings_are_refused_by_name() {
    let refused = |folder: &str, name: &str, from: &str, to: &str, key: &str| {
        let copy = with_edited(folder, name, |text| {
            assert!(text.contains(from), "{from} is not in {folder}/{name}");
            text.replace(from, to)
        });
        let path = copy.path();
        let error = match folder {
            "vae" => AutoencoderKl::load(path, &device()).map(drop),
            "text_encoder_2" => ClipTextModel::load(path, &device()).map(drop),
            "image_encoder" => ClipVisionModel::load(path, &device()).map(drop),
            "feature_extractor" => ImageProcessor::load(path).map(drop),
            "scheduler" => NoiseSchedule::load(path).map(drop),
            _ => ClipTokenizer::load(path).map(drop),
        }
        .unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let message = error.to_string();
        assert!(message.contains(key) && message.contains(name), "{message}");
    };
    refused("vae", "config.json", "\"silu\"", "\"relu\"", "act_fn");
    refused("vae", "config.json", "\"shift_factor\": null", "\"shift_factor\": 0.1", "shift_factor");
    refused("vae", "config.json", "\"norm_num_groups\": 4", "\"norm_num_groups\": 3", "block_out_channels");
    refused("text_encoder_2", "config.json", "\"gelu\"", "\"swish\"", "swish");
    refused(
        "text_encoder_2",
        "config.json",
        "\"num_attention_heads\": 3",
        "\"num_attention_heads\": 5",
        "num_attention_heads",
    );
    refused("image_encoder", "config.json", "\"patch_size\": 8", "\"patch_size\": 0", "patch_size");
    refused("feature_extractor", "preprocessor_config.json", "\"resample\": 3", "\"resample\": 2", "resample");
    refused("scheduler", "scheduler_config.json", "\"epsilon\"", "\"sample\"", "sample");
    refused("tokenizer", "vocab.json", "<|startoftext|>", "<|start|>", "<|startoftext|>");
    refused("tokenizer", "vocab.json", "\"!\":0", "\"!\":2147483648", "token ! has the id 2147483648");
}

#[test]
fn schedules_of_other_samplers_are_read() {
    // Values that diffusers writes for DPM-Solver and DDPM.
    let keys = "\"lambda_min_clipped\": -Infinity,\n\"variance_type\": \"fixed_small\",\n\"prediction_type\"";
    let copy = with_edited("scheduler", "scheduler_config.json", |text| text.replace("\"prediction_type\"", keys));
    let plain = NoiseSchedule::load(&fixtures().join("scheduler")).unwrap();
    assert_eq!(NoiseSchedule::load(copy.path()).unwrap().alphas_cumprod(), plain.alphas_cumprod());
    let copy = with_edited("scheduler", "scheduler_config.json", |text| text.replace("0.012", "Infinity"));
    let message = NoiseSchedule::load(copy.path()).unwrap_err().to_string();
    assert!(message.contains("scheduler_config.json") && message.contains("Infinity"), "{message}");
}

#[test]
fn weights_that_do_not_fit_the_config_are_listed() {
    let copy =
        with_edited("vae", "config.json", |text| text.replace("\"layers_per_block\": 2", "\"layers_per_block\": 1"));
    let message = AutoencoderKl::load(copy.path(), &device()).unwrap_err().to_string();
    assert!(message.contains("decoder.up_blocks.0.resnets.2.conv1.bias"), "{message}");
}

#[test]
fn the_base_says_what_stands_for_the_empty_negative_prompt() {
    let prompt = |text: &TextEncoders| text.encode(&["a photo", "a person with a hat"]).unwrap();
    let zeros = TextEncoders::load(&fixtures(), &device()).unwrap();
    let negative = zeros.negative(&prompt(&zeros)).unwrap();
    assert_eq!((negative.prompt_embeds.dims(), negative.pooled.dims()), ([2, PROMPT_TOKENS, 40], [2, 20]));
    let values = |tensor: Tensor<3>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
    assert!(values(negative.prompt_embeds).iter().all(|value| *value == 0.0));

    let base = tempfile::tempdir().unwrap();
    for part in ["tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"] {
        std::os::unix::fs::symlink(fixtures().join(part), base.path().join(part)).unwrap();
    }
    fs::write(base.path().join("model_index.json"), r#"{"force_zeros_for_empty_prompt": false}"#).unwrap();
    let encoded = TextEncoders::load(base.path(), &device()).unwrap();
    let negative = encoded.negative(&prompt(&encoded)).unwrap();
    let empty = encoded.encode(&["", ""]).unwrap();
    assert_eq!(negative.pooled.dims(), [2, 20]);
    let (negative, empty) = (values(negative.prompt_embeds), values(empty.prompt_embeds));
    assert!(negative.iter().zip(&empty).all(|(a, b)| (a - b).abs() < 1e-5) && empty.iter().any(|value| *value != 0.0));
}
