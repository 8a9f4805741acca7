//! JSON files of a base with changed, missing and mistyped values.

use std::fs;
use std::path::Path;

use burn_hyperlora::conditioning::{BaseConfig, FrozenModels};
use clap::ValueEnum;
use hyperlora_core::Result;
use hyperlora_core::config::ConfigPath;
use hyperlora_sdxl::models::clip_text::{ClipTextConfig, ClipTextModel};
use hyperlora_sdxl::models::clip_vision::{ClipVisionConfig, ClipVisionModel};
use hyperlora_sdxl::models::unet::UNet2DConditionModel;
use hyperlora_sdxl::models::unet::config::UNet2DConditionConfig;
use hyperlora_sdxl::models::vae::{AutoencoderKl, AutoencoderKlConfig};
use hyperlora_sdxl::sample::{SampleConfig, Sampler};
use hyperlora_sdxl::scheduler::{NoiseSampler, NoiseSchedule, SamplerKind};
use hyperlora_sdxl::source::key_names::KeyTable;
use hyperlora_sdxl::weights::{ConfigText, Weights};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

use crate::json::{change, changed, changes, replacements};
use crate::support::{base, bounded, device, survives, with_file};

/// All JSON files of a base except its vocabularies.
const CONFIGS: [&str; 11] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "image_encoder/config.json",
    "feature_extractor/preprocessor_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer_2/tokenizer_config.json",
];

fn document(name: &str) -> Value {
    serde_json::from_slice(&fs::read(base().join(name)).unwrap()).unwrap()
}

/// Loads a base and draws the smallest possible picture, in one step.
fn draw(folder: &Path) -> Result<()> {
    let base = FrozenModels::load(&BaseConfig::new(ConfigPath::new(folder)), Path::new(""), &device())?;
    // Their results do not matter here: the experiment checks them.
    let _side = base.image_size();
    let _fits = base.check(&folder.display().to_string(), 64, 64);
    let photo = image::RgbImage::new(30, 40);
    let states = base.vision()?;
    states.encoder.penultimate(states.processor.process(&[photo], &device()));
    let sampler = Sampler { unet: &base.unet, vae: &base.vae, schedule: &base.schedule };
    let side = 2 * base.vae.config().factor();
    let config = SampleConfig { steps: 1, height: side, width: side, ..SampleConfig::default() };
    let prompt = base.text.encode(&["a photo"])?;
    let negative = base.text.negative(&prompt)?;
    let initial = sampler.initial_latents(&config, 1, &device())?;
    sampler.draw(&config, initial, &prompt, &negative, None, |_| {}).map(drop)
}

fn outcome(name: &str, bytes: &[u8]) -> bool {
    let folder = with_file(&base(), name, bytes);
    survives(folder.path(), || draw(folder.path()))
}

#[test]
fn what_is_not_changed_draws() {
    for name in ["unet/config.json", "tokenizer/merges.txt"] {
        assert!(outcome(name, &fs::read(base().join(name)).unwrap()));
    }
}

/// Builds the model of a config without any weights. All its tensors are missing, and one error must report that.
fn build(name: &str, text: &ConfigText) -> Result<()> {
    let nothing = || Weights::without_data([]);
    let built = match name {
        "unet/config.json" => {
            let config = UNet2DConditionConfig::parse(text)?;
            KeyTable::unet(&config);
            UNet2DConditionModel::new(config, nothing()).map(drop)
        }
        "vae/config.json" => {
            let config = AutoencoderKlConfig::parse(text)?;
            KeyTable::vae(&config);
            AutoencoderKl::new(config, nothing()).map(drop)
        }
        "text_encoder_2/config.json" => {
            let config = ClipTextConfig::parse(text)?;
            KeyTable::text_encoder_2(&config);
            ClipTextModel::new(config, nothing()).map(drop)
        }
        "image_encoder/config.json" => ClipVisionModel::new(ClipVisionConfig::parse(text)?, nothing()).map(drop),
        _ => return every_sampler(&NoiseSchedule::parse(text)?),
    };
    assert!(built.unwrap_err().to_string().contains("tensors do not fit the model"));
    Ok(())
}

/// Applies every sampler to a schedule, if possible.
fn every_sampler(schedule: &NoiseSchedule) -> Result<()> {
    for sampler in SamplerKind::value_variants() {
        for steps in [1, 2, 20, 999, 1000] {
            if let Ok(sampler) = NoiseSampler::new(schedule, Some(*sampler), steps) {
                assert!(sampler.timesteps().iter().all(|timestep| timestep.is_finite()));
                assert!(sampler.init_noise_sigma().is_finite());
            }
        }
    }
    Ok(())
}

/// Configs that set sizes and schedules.
const SIZES: [&str; 5] = [
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder_2/config.json",
    "image_encoder/config.json",
];

proptest! {
    #![proptest_config(bounded(160))]

    #[test]
    fn any_value_of_a_model_can_be_anything(name in prop::sample::select(&SIZES[..]), changes in changes()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        fs::write(&path, changed(document(name), changes).to_string()).unwrap();
        survives(folder.path(), || ConfigText::read(&path).and_then(|text| build(name, &text)));
    }
}

proptest! {
    #![proptest_config(bounded(96))]

    #[test]
    fn a_base_with_a_changed_config_draws_or_says_why(
        name in prop::sample::select(&CONFIGS[..]),
        changes in changes(),
    ) {
        outcome(name, changed(document(name), changes).to_string().as_bytes());
    }

    #[test]
    fn a_config_that_is_something_else_is_survived(
        name in prop::sample::select(&CONFIGS[..]),
        value in prop::sample::select(replacements()),
    ) {
        outcome(name, value.to_string().as_bytes());
    }

    #[test]
    fn a_changed_vocabulary_is_survived(changes in changes(), whole in any::<bool>(), place in any::<Index>()) {
        let vocabulary = document("tokenizer/vocab.json");
        if !whole {
            outcome("tokenizer/vocab.json", changed(vocabulary, changes).to_string().as_bytes());
            return Ok(());
        }
        // The other layout: one file with everything.
        let merges = fs::read_to_string(base().join("tokenizer/merges.txt")).unwrap();
        let merges: Value = merges.lines().skip(1).collect();
        let mut tokenizer = json!({"model": {"vocab": vocabulary, "merges": merges}});
        let places = ["/model", "/model/vocab", "/model/merges", "/model/merges/7", "/model/vocab/a"];
        for (_, value) in changes {
            let place: &&str = place.get(&places);
            change(&mut tokenizer, place, value);
        }
        let folder = with_file(&base(), "tokenizer/vocab.json", b"");
        fs::remove_file(folder.path().join("tokenizer/vocab.json")).unwrap();
        fs::write(folder.path().join("tokenizer/tokenizer.json"), tokenizer.to_string()).unwrap();
        survives(folder.path(), || draw(folder.path()));
    }

    #[test]
    fn changed_merges_are_survived(changes in prop::collection::vec((any::<Index>(), any::<char>()), 1..5)) {
        let merges = fs::read_to_string(base().join("tokenizer/merges.txt")).unwrap();
        let mut merges: Vec<char> = merges.chars().collect();
        for (place, character) in changes {
            let place = place.index(merges.len());
            merges[place] = character;
        }
        outcome("tokenizer/merges.txt", merges.into_iter().collect::<String>().as_bytes());
    }
}
