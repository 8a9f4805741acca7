//! Names and shapes of SDXL's tensors as a contract. The lists were made with diffusers and transformers from the real
//! configs (`ci/parity/key_lists.py`), so that models and key tables are tested without weights.

use std::collections::BTreeMap;

use flate2::read::GzDecoder;
use hyperlora_sdxl::models::clip_text::{ClipTextConfig, ClipTextModel};
use hyperlora_sdxl::models::clip_vision::{ClipVisionConfig, ClipVisionModel};
use hyperlora_sdxl::models::unet::{UNet2DConditionConfig, UNet2DConditionModel};
use hyperlora_sdxl::models::vae::{AutoencoderKl, AutoencoderKlConfig};
use hyperlora_sdxl::source::configs;
use hyperlora_sdxl::source::key_names::KeyTable;
use hyperlora_sdxl::weights::{ConfigText, Form, Weights};
use serde::Deserialize;

type Shapes = BTreeMap<String, Vec<usize>>;

#[derive(Deserialize)]
struct Lists {
    /// Component -> name -> shape.
    diffusers: BTreeMap<String, Shapes>,
    stability: BTreeMap<String, Single>,
}

/// A tensor of a single file.
#[derive(Debug, Default, PartialEq, Deserialize)]
struct Single {
    shape: Vec<usize>,
    /// Diffusers name, or the names of the thirds of its rows.
    from: Vec<String>,
}

fn lists() -> Lists {
    let path = hyperlora_testing::fixture("key_lists.json.gz");
    serde_json::from_reader(GzDecoder::new(std::fs::File::open(path).unwrap())).unwrap()
}

fn text(config: &str) -> ConfigText {
    ConfigText::built_in("config.json", config)
}

fn unet_config() -> UNet2DConditionConfig {
    UNet2DConditionConfig::parse(&text(configs::UNET)).unwrap()
}

fn vae_config() -> AutoencoderKlConfig {
    AutoencoderKlConfig::parse(&text(configs::VAE)).unwrap()
}

fn text_config(config: &str) -> ClipTextConfig {
    ClipTextConfig::parse(&text(config)).unwrap()
}

/// Components with their prefix in single files and their key table.
fn tables() -> [(&'static str, &'static str, KeyTable); 4] {
    [
        ("unet", "model.diffusion_model.", KeyTable::unet(&unet_config())),
        ("vae", "first_stage_model.", KeyTable::vae(&vae_config())),
        ("text_encoder", "conditioner.embedders.0.transformer.", KeyTable::text_encoder()),
        (
            "text_encoder_2",
            "conditioner.embedders.1.model.",
            KeyTable::text_encoder_2(&text_config(configs::TEXT_ENCODER_2)),
        ),
    ]
}

#[test]
fn models_ask_for_exactly_the_tensors_of_diffusers() {
    let lists = lists();
    let part = |name: &str| Weights::without_data(lists.diffusers[name].clone());
    let unet = UNet2DConditionModel::new(unet_config(), part("unet")).unwrap();
    assert_eq!(unet.attention_sites().len(), 140);
    AutoencoderKl::new(vae_config(), part("vae")).unwrap();
    ClipTextModel::new(text_config(configs::TEXT_ENCODER), part("text_encoder")).unwrap();
    ClipTextModel::new(text_config(configs::TEXT_ENCODER_2), part("text_encoder_2")).unwrap();
    let vision = ClipVisionConfig::parse(&text(configs::IMAGE_ENCODER)).unwrap();
    ClipVisionModel::new(vision, part("image_encoder")).unwrap();
}

#[test]
fn a_tensor_more_less_or_other_is_found() {
    let shapes = &lists().diffusers["unet"];
    let problem = |change: &dyn Fn(&mut Shapes)| {
        let mut changed = shapes.clone();
        change(&mut changed);
        UNet2DConditionModel::new(unet_config(), Weights::without_data(changed)).unwrap_err().to_string()
    };
    assert!(problem(&|shapes| drop(shapes.remove("conv_in.bias"))).contains("conv_in.bias: missing, expected [320]"));
    assert!(problem(&|shapes| drop(shapes.insert("more".into(), vec![1]))).contains("more: not a part of this model"));
    let other = problem(&|shapes| drop(shapes.insert("conv_in.weight".into(), vec![320, 9, 3, 3])));
    assert!(other.contains("1 tensors") && other.contains("shape [320, 9, 3, 3], expected [320, 4, 3, 3]"), "{other}");
}

#[test]
fn tables_lead_from_diffusers_to_exactly_the_single_file() {
    let lists = lists();
    let mut made: BTreeMap<String, Single> = BTreeMap::new();
    for (part, prefix, table) in tables() {
        for (name, shape) in &lists.diffusers[part] {
            let (stability, form) = table.to_stability(name).unwrap();
            let single = made.entry(format!("{prefix}{stability}")).or_default();
            let third = if let Form::Third(third) = form { third } else { 0 };
            single.from.resize(single.from.len().max(third + 1), String::new());
            assert_eq!(single.from[third], "", "{prefix}{stability} stands for {name} too");
            single.from[third].clone_from(name);
            single.shape = match (form, shape.as_slice()) {
                (Form::Transposed, &[rows, columns]) => vec![columns, rows],
                (Form::Linear, &[output, input]) => vec![output, input, 1, 1],
                (Form::Third(_), rows) => [&[3 * rows[0]], &rows[1..]].concat(),
                (_, shape) => shape.to_vec(),
            };
        }
    }
    assert!(
        made == lists.stability,
        "{:?}",
        made.iter().find(|(name, single)| lists.stability.get(*name) != Some(single))
    );
}

#[test]
fn tables_lead_back() {
    let lists = lists();
    for (part, prefix, table) in tables() {
        let mut made: BTreeMap<String, Form> = BTreeMap::new();
        for name in lists.stability.keys().filter_map(|name| name.strip_prefix(prefix)) {
            made.extend(table.to_diffusers(name));
        }
        assert!(made.keys().eq(lists.diffusers[part].keys()), "{part}");
        assert!(made.iter().all(|(name, form)| table.to_stability(name).unwrap().1 == *form), "{part}");
    }
}

#[test]
fn names_of_lora_files_are_translated_too() {
    let table = KeyTable::unet(&unet_config()).underscored();
    for (stability, diffusers) in [
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        ),
        (
            "middle_block_1_transformer_blocks_9_attn2_to_out_0",
            "mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0",
        ),
        ("output_blocks_5_1_proj_in", "up_blocks_1_attentions_2_proj_in"),
        ("output_blocks_5_2_conv", "up_blocks_1_upsamplers_0_conv"),
        ("input_blocks_7_0_in_layers_2", "down_blocks_2_resnets_0_conv1"),
    ] {
        assert_eq!(table.to_diffusers(stability), [(diffusers.to_owned(), Form::Same)]);
        assert_eq!(table.to_stability(diffusers), Some((stability.to_owned(), Form::Same)));
    }
    assert!(table.to_diffusers("input_blocks_44_1_proj_in").is_empty());
    assert!(table.to_diffusers("down_blocks_1_attentions_0_proj_in").is_empty());
}
