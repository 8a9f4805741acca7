//! JSON files of a base and its tokenizers.

use std::fs;

use clap::ValueEnum;
use hyperlora_sdxl::models::clip_text::ClipTextConfig;
use hyperlora_sdxl::models::clip_vision::{ClipVisionConfig, ImageProcessor};
use hyperlora_sdxl::models::unet::config::UNet2DConditionConfig;
use hyperlora_sdxl::models::vae::AutoencoderKlConfig;
use hyperlora_sdxl::scheduler::{NoiseSampler, NoiseSchedule, SamplerKind};
use hyperlora_sdxl::source::BaseSource;
use hyperlora_sdxl::source::key_names::KeyTable;
use hyperlora_sdxl::tokenizer::{ClipTokenizer, PROMPT_TOKENS};
use hyperlora_sdxl::weights::ConfigText;
use serde_json::{Value, json};

use crate::support::{base, device, with_file};
use hyperlora_testing::fuzz::{Case, fuzz, scratch};

const WORDS: [&str; 30] = [
    "\"block_out_channels\"",
    "\"attention_head_dim\"",
    "\"transformer_layers_per_block\"",
    "\"down_block_types\"",
    "\"DownBlock2D\"",
    "\"CrossAttnDownBlock2D\"",
    "\"norm_num_groups\"",
    "\"cross_attention_dim\"",
    "\"hidden_size\"",
    "\"num_attention_heads\"",
    "\"num_hidden_layers\"",
    "\"vocab_size\"",
    "\"scaling_factor\"",
    "\"beta_start\"",
    "\"beta_end\"",
    "\"num_train_timesteps\"",
    "\"v_prediction\"",
    "\"scaled_linear\"",
    "\"squaredcos_cap_v2\"",
    "\"trailing\"",
    "\"DPMSolverMultistepScheduler\"",
    "\"steps_offset\"",
    "\"variance_type\"",
    "[8,0]",
    "[0,0,0,0]",
    "[4294967296,4294967296]",
    "-5",
    "1e-320",
    "\"shortest_edge\"",
    "\"image_std\"",
];

/// Reads one of a base's files from its own folder, where only this file changes.
fn fuzz_json(
    target: &str,
    cases: u64,
    memory: usize,
    names: &[&str],
    read: impl Fn(&mut Case, &str, &ConfigText) -> hyperlora_core::Result<()>,
) {
    let folder = scratch();
    let seeds: Vec<Vec<u8>> = names.iter().map(|name| fs::read(base().join(name)).unwrap()).collect();
    let path = folder.path().join("config.json");
    let named = folder.path().display().to_string();
    fuzz(target, cases, memory, &named, |case| {
        let which = case.choose(names.len());
        fs::write(&path, case.text(&seeds[which], &WORDS)).unwrap();
        Ok(read(case, names[which], &ConfigText::read(&path)?)?)
    });
}

#[test]
fn model_configs() {
    let names = ["unet/config.json", "vae/config.json", "text_encoder_2/config.json", "image_encoder/config.json"];
    fuzz_json("model_configs", 1000, 128 << 20, &names, |case, name, text| {
        // The table of all names is far larger than the config.
        let table = case.unchanged || case.random.one_in(16);
        match name {
            "unet/config.json" => {
                let config = UNet2DConditionConfig::parse(text)?;
                if table {
                    KeyTable::unet(&config);
                }
            }
            "vae/config.json" => {
                let config = AutoencoderKlConfig::parse(text)?;
                if table {
                    KeyTable::vae(&config);
                }
            }
            "text_encoder_2/config.json" => {
                let config = ClipTextConfig::parse(text)?;
                if table {
                    KeyTable::text_encoder_2(&config);
                }
            }
            _ => assert!(ClipVisionConfig::parse(text)?.tokens() > 0),
        }
        Ok(())
    });
}

#[test]
fn schedules() {
    fuzz_json("schedules", 1000, 64 << 20, &["scheduler/scheduler_config.json"], |case, _, text| {
        let schedule = NoiseSchedule::parse(text)?;
        let kind = *case.random.pick(SamplerKind::value_variants());
        let steps = *case.random.pick(&[1, 2, 20, 999, 1000]);
        if let Ok(sampler) = NoiseSampler::new(&schedule, Some(kind), steps) {
            assert!(sampler.timesteps().iter().all(|timestep| timestep.is_finite()));
            assert!(sampler.init_noise_sigma().is_finite());
        }
        Ok(())
    });
}

#[test]
fn preprocessors() {
    let folder = scratch();
    let name = "preprocessor_config.json";
    let seed = fs::read(base().join("feature_extractor").join(name)).unwrap();
    let photo = image::RgbImage::new(7, 9);
    let named = folder.path().display().to_string();
    fuzz("preprocessors", 1500, 512 << 20, &named, |case| {
        case.choose(1);
        fs::write(folder.path().join(name), case.text(&seed, &WORDS)).unwrap();
        let processor = ImageProcessor::load(folder.path())?;
        // A large side is allowed, but slow.
        if processor.side() <= 64 {
            processor.process(std::slice::from_ref(&photo), &device());
        }
        Ok(())
    });
}

#[test]
fn model_index() {
    let folder = with_file(&base(), "model_index.json", b"");
    let seed = fs::read(base().join("model_index.json")).unwrap();
    let named = folder.path().display().to_string();
    fuzz("model_index", 2000, 8 << 20, &named, |case| {
        case.choose(1);
        fs::write(folder.path().join("model_index.json"), case.text(&seed, &["\"force_zeros_for_empty_prompt\""]))
            .unwrap();
        BaseSource::open(folder.path(), None, None)?.zeros_for_empty_prompt()?;
        Ok(())
    });
}

/// Returns a small vocabulary in both of transformers' layouts.
fn vocabulary() -> (Value, String) {
    let letters =
        ["a", "b", "c", "!", "a</w>", "b</w>", "c</w>", "!</w>", "ab", "abc</w>", "<|startoftext|>", "<|endoftext|>"];
    let ids = letters.into_iter().zip(0..).map(|(token, id)| (token.to_owned(), Value::from(id))).collect();
    (Value::Object(ids), "#version: 0.2\na b\nab c</w>\n".into())
}

#[test]
fn tokenizers() {
    const FILES: [&str; 5] =
        ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"];
    const TOKENS: [&str; 14] = [
        "\"<|endoftext|>\"",
        "\"<|startoftext|>\"",
        "\"pad_token\"",
        "\"content\"",
        "\"model\"",
        "\"vocab\"",
        "\"merges\"",
        "a b",
        "</w>",
        "\n",
        " ",
        "é",
        "\"a\"",
        "#version",
    ];
    let (vocabulary, merges) = vocabulary();
    let merged: Value = merges.lines().skip(1).collect();
    let seeds = [
        vocabulary.to_string(),
        merges,
        json!({"pad_token": "!", "model_max_length": 77}).to_string(),
        json!({"pad_token": {"content": "!", "lstrip": false}}).to_string(),
        json!({"model": {"vocab": vocabulary, "merges": merged}}).to_string(),
    ];
    // One folder for each file that changes; the last one has the other layout.
    let folders = FILES.map(|_| scratch());
    for (place, folder) in folders.iter().enumerate() {
        let files = if place == 4 { [2, 4, 4, 4] } else { [0, 1, 2, 3] };
        for file in files.into_iter().filter(|file| *file != 2 || place != 3) {
            fs::write(folder.path().join(FILES[file]), &seeds[file]).unwrap();
        }
    }
    fuzz("tokenizers", 300, 16 << 20, "", |case| {
        let which = case.choose(FILES.len());
        let folder = folders[which].path();
        case.named = folder.display().to_string();
        fs::write(folder.join(FILES[which]), case.text(seeds[which].as_bytes(), &TOKENS)).unwrap();
        let tokenizer = ClipTokenizer::load(folder)?;
        assert!(tokenizer.vocabulary_size() > 0);
        assert_eq!(tokenizer.encode("abc, é <|endoftext|> !!")?.len(), PROMPT_TOKENS);
        Ok(())
    });
}
