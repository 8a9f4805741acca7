//! A single-file checkpoint in Stability naming equals the pipeline folder that it was made from, and any other file is
//! one clear error.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_hyperlora::conditioning::{BaseConfig, FrozenModels, UnetDtype};
use hyperlora_core::config::ConfigPath;
use hyperlora_sdxl::lora::file::{BaseNames, LoraFile, sum};
use hyperlora_sdxl::lora::ops::merge;
use hyperlora_sdxl::models::unet::UnetInput;
use hyperlora_sdxl::scheduler::Prediction;
use hyperlora_sdxl::source::BaseSource;
use hyperlora_sdxl::tokenizer::ClipTokenizer;
use hyperlora_sdxl::weights::{SafetensorsFile, save, save_with_metadata};
use tempfile::TempDir;

use hyperlora_testing::stability::{quickstart_base, stability};

fn device() -> Device {
    Device::flex()
}

fn written(tensors: BTreeMap<String, TensorData>) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("base.safetensors");
    save(&path, tensors).unwrap();
    (folder, path)
}

fn load(path: &Path, config: Option<&Path>) -> hyperlora_core::Result<FrozenModels> {
    let config = BaseConfig { config: config.map(ConfigPath::new), ..BaseConfig::new(ConfigPath::new(path)) };
    FrozenModels::load_for_drawing(&config, Path::new(""), &device())
}

/// Computes the outputs of UNet, text encoders and autoencoder for the same input.
fn outputs(base: &FrozenModels) -> Vec<TensorData> {
    let numbers = |count: usize| (0..count).map(|index| (index as f32 * 0.7).sin()).collect::<Vec<_>>();
    let latents = Tensor::<4>::from_data(TensorData::new(numbers(4 * 64), [1, 4, 8, 8]), &device());
    let prompt = base.text.encode(&["a photo of a person"]).unwrap();
    let input = UnetInput {
        latents: latents.clone(),
        timesteps: Tensor::from_floats([321.0], &device()),
        prompt_embeds: prompt.prompt_embeds.clone(),
        pooled: prompt.pooled.clone(),
        time_ids: Tensor::from_floats([[64.0, 64.0, 0.0, 8.0, 64.0, 64.0]], &device()),
    };
    let images = base.vae.decode(latents);
    let (mean, logvar) = base.vae.encode_mean_logvar(images.clone());
    vec![
        base.unet.forward(&input, None).into_data(),
        prompt.prompt_embeds.into_data(),
        prompt.pooled.into_data(),
        images.into_data(),
        mean.into_data(),
        logvar.into_data(),
    ]
}

#[test]
fn both_layouts_are_the_same_base() {
    let (_folder, path) = written(stability());
    let single = load(&path, Some(&quickstart_base())).unwrap();
    assert!(outputs(&load(&quickstart_base(), None).unwrap()) == outputs(&single));
    assert!(single.vision().is_err(), "drawing needs no image encoder");
}

#[test]
fn a_text_projection_may_be_a_linear_layer() {
    let mut tensors = stability();
    let key = "conditioner.embedders.1.model.text_projection";
    let transposed = Tensor::<2>::from_data(tensors.remove(key).unwrap(), &device()).swap_dims(0, 1).into_data();
    tensors.insert(format!("{key}.weight"), transposed);
    let (_folder, path) = written(tensors);
    assert!(
        outputs(&load(&path, Some(&quickstart_base())).unwrap()) == outputs(&load(&quickstart_base(), None).unwrap())
    );
}

#[test]
fn what_nothing_needs_is_passed_over() {
    let mut tensors = stability();
    for key in [
        "conditioner.embedders.0.transformer.text_projection.weight",
        "conditioner.embedders.0.logit_scale",
        "conditioner.embedders.1.model.attn_mask",
        "conditioner.embedders.1.model.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.visual.conv1.weight",
        "first_stage_model.loss.discriminator.main.0.weight",
        "first_stage_model.loss.logvar",
        "first_stage_model.model_ema.decay",
        "model_ema.diffusion_modelinput_blocks00weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "lora_unet_mid_block_attentions_0_proj_in.alpha",
        "embedding_manager.weight",
    ] {
        tensors.insert(key.into(), TensorData::from([1.0f32]));
    }
    let (_folder, path) = written(tensors.clone());
    let single = load(&path, Some(&quickstart_base())).unwrap();
    assert!(outputs(&load(&quickstart_base(), None).unwrap()) == outputs(&single));

    // Names that only resemble the unused keys.
    for key in [
        "first_stage_model.losses.weight",
        "conditioner.embedders.1.model.attn_masks",
        "model.diffusion_model.model_ema.decay",
        "first_stage_model.position_ids",
    ] {
        let mut tensors = stability();
        tensors.insert(key.into(), TensorData::from([1.0f32]));
        let (_folder, path) = written(tensors);
        let message = load(&path, Some(&quickstart_base())).map(drop).unwrap_err().to_string();
        assert!(message.contains(&format!("{key}: not a part of this model")), "{message}");
    }
}

#[test]
fn keys_that_do_not_fit_are_one_error() {
    let mut tensors = stability();
    tensors.insert("model.diffusion_model.control.weight".into(), TensorData::from([1.0f32]));
    tensors.remove("model.diffusion_model.out.2.bias");
    let (_folder, path) = written(tensors);
    let error = load(&path, Some(&quickstart_base())).map(drop).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let message = error.to_string();
    assert!(message.contains("2 tensors") && message.contains("conv_out.bias: missing, expected [4]"), "{message}");
    assert!(message.contains("model.diffusion_model.control.weight: not a part of this model"), "{message}");
}

#[test]
fn without_a_config_a_single_file_must_have_the_size_of_sdxl() {
    let (_folder, path) = written(stability());
    let message = load(&path, None).map(drop).unwrap_err().to_string();
    assert!(message.contains("time_embedding.linear_1.weight: shape [128, 32], expected [1280, 320]"), "{message}");
}

#[test]
fn the_prediction_is_told_by_the_file() {
    let prediction = |tensors: BTreeMap<String, TensorData>| {
        let (_folder, path) = written(tensors);
        let source = BaseSource::open(&path, None, Some(&quickstart_base())).unwrap();
        let config = source.schedule().unwrap().config().clone();
        (config.prediction_type, config.rescale_betas_zero_snr)
    };
    let mut tensors = stability();
    assert_eq!(prediction(tensors.clone()), (Prediction::Epsilon, false));
    tensors.insert("v_pred".into(), TensorData::from([1.0f32]));
    assert_eq!(prediction(tensors.clone()), (Prediction::VPrediction, false));
    tensors.insert("ztsnr".into(), TensorData::from([1.0f32]));
    assert_eq!(prediction(tensors), (Prediction::VPrediction, true));
}

#[test]
fn files_of_other_kinds_are_named() {
    let one = |key: &str| BTreeMap::from([(key.to_owned(), TensorData::from([1.0f32]))]);
    let unet = "model.diffusion_model.input_blocks.0.0.weight";
    for (key, kind) in [
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "Stable Diffusion 1 or 2"),
        ("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias", "SDXL refiner"),
        ("lora_unet_mid_block_attentions_0_proj_in.alpha", "a LoRA"),
        ("edm_mean", "Playground"),
        ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("some.thing", "no keys model.diffusion_model.* (unet)"),
        (unet, "no keys first_stage_model.* (vae)"),
    ] {
        let mut tensors = one(unet);
        if key != unet && key.contains('.') {
            tensors = one(key);
        }
        tensors.extend(one(key));
        let (_folder, path) = written(tensors);
        let error = BaseSource::open(&path, None, None).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(kind), "{error}");
    }
}

#[test]
fn broken_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("base.safetensors");
    let mut whole = stability();
    whole.retain(|name, _| name.contains("out"));
    save(&path, whole).unwrap();
    let bytes = fs::read(&path).unwrap();
    let lying = |from: &str, to: &str| {
        let text = String::from_utf8_lossy(&bytes[8..]);
        let place = 8 + text.find(from).unwrap();
        [&bytes[..place], to.as_bytes(), &bytes[place + from.len()..]].concat()
    };
    for (content, problem) in [
        (b"\x80\x02ccollections".to_vec(), "a Python pickle"),
        (b"PK\x03\x04archive/data.pkl".to_vec(), "a PyTorch pickle"),
        (b"<!DOCTYPE html><html>Sign in".to_vec(), "a web page"),
        (bytes[..bytes.len() - 5].to_vec(), "its header describes"),
        (lying("\"data_offsets\":[0,", "\"data_offsets\":[4,"), "invalid header"),
        (bytes[..6].to_vec(), "ends after 6 bytes"),
    ] {
        fs::write(&path, content).unwrap();
        let error = load(&path, None).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(problem), "{problem}: {error}");
    }
    assert_eq!(load(&folder.path().join("absent.safetensors"), None).map(drop).unwrap_err().exit_code(), 2);
}

#[test]
fn options_that_do_not_go_with_the_layout_are_refused() {
    let (_folder, path) = written(stability());
    let folder = quickstart_base();
    let problem = |path: &Path, variant: Option<&str>, config: Option<&Path>| {
        BaseSource::open(path, variant, config).unwrap_err().to_string()
    };
    assert!(problem(&path, Some("fp16"), None).contains("is a single file"));
    assert!(problem(&folder, Some("fp16"), None).contains("no weights of the variant fp16"));
    assert!(problem(&folder, None, Some(&folder)).contains("its own configs"));
    assert!(problem(path.parent().unwrap(), None, None).contains("no folder `unet`"));
    let config = BaseConfig::new(ConfigPath::new(&path));
    let message = config.image_encoder_folder(Path::new("")).unwrap_err().to_string();
    assert!(message.contains("holds no CLIP image encoder") && message.contains("base.image_encoder"), "{message}");
}

#[test]
fn halves_are_widened_without_loss() {
    let mut tensors = stability();
    for (name, data) in &mut tensors {
        if !name.ends_with("position_ids") {
            *data = data.clone().convert_dtype(DType::F16);
        }
    }
    // The quickstart's base is stored in f16.
    let (_folder, path) = written(tensors);
    let [single, folder] = [load(&path, Some(&quickstart_base())), load(&quickstart_base(), None)];
    assert!(outputs(&single.unwrap()) == outputs(&folder.unwrap()));
}

#[test]
fn the_built_in_tokenizer_is_clips() {
    let tokenizer = ClipTokenizer::built_in("<|endoftext|>").unwrap();
    assert_eq!(tokenizer.vocabulary_size(), 49408);
    let ids = tokenizer.encode("A photo of an astronaut riding a horse on Mars, café 2!").unwrap();
    let known = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 267, 15304, 273, 256, 49407, 49407];
    assert_eq!(ids[..known.len()], known);
    assert_eq!(ClipTokenizer::built_in("!").unwrap().encode("").unwrap()[..3], [49406, 49407, 0]);
}

#[test]
fn loras_are_merged_into_a_single_file() {
    let (folder, path) = written(stability());
    let source = || BaseSource::open(&path, None, Some(&quickstart_base())).unwrap();
    let lora = hyperlora_testing::fixture("loras/sgm.safetensors");
    let loras = [(LoraFile::open(&lora).unwrap(), 0.8)];
    let updates = sum(&loras, &BaseNames::of(&source()).unwrap()).unwrap();
    let merged = folder.path().join("merged.safetensors");
    merge(&source(), &updates, &merged).unwrap();

    let expected =
        FrozenModels::from_source(&source().with_updates(updates.clone()), UnetDtype::F32, &device()).unwrap();
    let plain = outputs(&load(&path, Some(&quickstart_base())).unwrap());
    let actual = outputs(&load(&merged, Some(&quickstart_base())).unwrap());
    assert!(actual == outputs(&expected) && actual != plain);

    let [before, after] = [&path, &merged].map(|path| SafetensorsFile::open(path).unwrap());
    assert!(before.entries().eq(after.entries()) && before.metadata() == after.metadata());
    let changed =
        before.entries().filter(|entry| before.read_raw(&entry.name).unwrap() != after.read_raw(&entry.name).unwrap());
    assert_eq!(changed.count(), 20);

    let message = merge(&source(), &updates, &path).unwrap_err().to_string();
    assert!(message.contains("is the input"), "{message}");

    // Hashes of the old tensors are dropped; all other metadata stays.
    let notes = [("modelspec.hash_sha256", "0x00"), ("modelspec.title", "a base"), ("sshs_model_hash", "00")];
    let notes = notes.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    save_with_metadata(&path, notes, stability()).unwrap();
    fs::remove_file(&merged).unwrap();
    merge(&source(), &updates, &merged).unwrap();
    assert!(outputs(&load(&merged, Some(&quickstart_base())).unwrap()) == actual);
    let told = SafetensorsFile::open(&merged).unwrap().metadata().clone();
    assert_eq!(told.keys().collect::<Vec<_>>(), ["format", "modelspec.title"]);
}
