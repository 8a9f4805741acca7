//! Keys of LoRA files, as each tool writes them.
//!
//! ```text
//! sd-scripts      lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha
//!                 lora_unet_input_blocks_4_1_proj_in...                in Stability naming
//!                 lora_te1_..., lora_te2_...                           the text encoders
//! ComfyUI         diffusion_model.input_blocks.4.1.proj_in..., or model.diffusion_model....
//! diffusers       unet.down_blocks.1.attentions.0.proj_in.lora_A.weight, .lora_B.weight
//!                 text_encoder..., text_encoder_2...
//! PEFT            base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.weight
//!                 ....lora_A.default.weight                            with the adapter's name, as the model has it
//! before PEFT     unet.down_blocks.1.attentions.0.proj_in.lora.down.weight, .lora.up.weight
//!                 unet.....attn1.processor.to_out_lora.down.weight     before that
//!                 down_blocks.....attn1.processor.to_out_lora...       of `save_attn_procs`
//!                 text_encoder.....self_attn.q_proj.lora_linear_layer.down.weight
//! bundles         bundle_emb.{name}.clip_l, ...                        embeddings beside the LoRA
//! ```
//!
//! Keys are parsed by their dot-separated segments, never by substring.

use crate::source::Component;

/// Kind of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key<'a> {
    /// Tensor of the module with this full name.
    Of(&'a str, Side),
    /// Embedding with this name, bundled in the LoRA file.
    Embedding(&'a str),
    /// Tensor of another adapter kind, which is not a plain LoRA.
    OtherKind(&'static str),
    /// Unknown key.
    Unknown,
}

/// Role of a tensor within a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// `[rank, in]`
    Down,
    /// `[out, rank]`
    Up,
    /// LoRA scale times the rank.
    Alpha,
}

const ALPHA: &str = ".alpha";
const WEIGHT: &str = ".weight";
const BIAS: &str = ".bias";

/// Key suffixes of matrices, before `.weight`.
const SIDES: [(&str, Side); 10] = [
    (".lora_down", Side::Down),
    (".lora_up", Side::Up),
    (".lora_A", Side::Down),
    (".lora_B", Side::Up),
    (".lora.down", Side::Down),
    (".lora.up", Side::Up),
    (".lora_linear_layer.down", Side::Down),
    (".lora_linear_layer.up", Side::Up),
    ("_lora.down", Side::Down),
    ("_lora.up", Side::Up),
];

/// Entries of [`SIDES`] that a PEFT model follows with the adapter's name.
const NAMED_SIDES: [(&str, Side); 2] = [(".lora_A", Side::Down), (".lora_B", Side::Up)];

/// Key prefix of embeddings bundled in a LoRA file.
const BUNDLE: &str = "bundle_emb.";

/// Prefix that PEFT adds to the names of the wrapped model.
const WRAPPER: &str = "base_model.model.";

const PARTS: [(&str, Component); 9] = [
    ("lora_unet_", Component::Unet),
    ("lora_te1_", Component::TextEncoder),
    ("lora_te2_", Component::TextEncoder2),
    ("lora_te_", Component::TextEncoder),
    ("unet.", Component::Unet),
    ("text_encoder.", Component::TextEncoder),
    ("text_encoder_2.", Component::TextEncoder2),
    ("diffusion_model.", Component::Unet),
    ("model.diffusion_model.", Component::Unet),
];

/// First segments of UNet paths, in diffusers and Stability naming. Such a path may omit its component.
const OF_UNET: [&str; 13] = [
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_in",
    "conv_out",
    "time_embedding",
    "add_embedding",
    "input_blocks",
    "middle_block",
    "output_blocks",
    "time_embed",
    "label_emb",
    "out",
];

/// First segments of text encoder paths.
const OF_TEXT: [&str; 2] = ["text_model", "encoder"];

/// Names of attention linears in diffusers' former attention processors: processor name, UNet name, text encoder name.
const OF_PROCESSORS: [(&str, &str, &str); 4] = [
    ("to_q", "to_q", "q_proj"),
    ("to_k", "to_k", "k_proj"),
    ("to_v", "to_v", "v_proj"),
    ("to_out", "to_out.0", "out_proj"),
];

/// Key segments that mark other adapter kinds. An entry that ends in an underscore is a prefix.
const OTHER_KINDS: [(&str, &str); 22] = [
    ("dora_scale", "a DoRA"),
    ("lora_magnitude_vector", "a DoRA"),
    ("hada_", "a LoHa"),
    ("lokr_", "a LoKr"),
    ("lora_mid", "a LoCon with a core (lora_mid)"),
    ("scalar", "a LoCon with a trained scalar"),
    ("oft_", "an OFT"),
    ("boft_", "an OFT"),
    ("vera_", "a VeRA"),
    ("on_input", "an IA3"),
    ("ia3_l", "an IA3"),
    ("a1", "a GLoRA"),
    ("a2", "a GLoRA"),
    ("b1", "a GLoRA"),
    ("b2", "a GLoRA"),
    ("lora_embedding_", "a LoRA of token embeddings"),
    ("diff", "a full difference of weights"),
    ("diff_b", "a full difference of weights"),
    ("w_norm", "a full difference of weights"),
    ("b_norm", "a full difference of weights"),
    ("set_weight", "a full set of weights"),
    ("reshape_weight", "a full set of weights"),
];

/// Module name prefixes in files for other architectures.
const OTHER_FILES: [(&str, &str); 7] = [
    ("transformer", "a diffusion transformer"),
    ("lora_transformer", "a diffusion transformer"),
    ("lora_te3", "Stable Diffusion 3"),
    ("text_encoder_3", "Stable Diffusion 3"),
    ("lora_prior", "Stable Cascade"),
    ("prior", "Stable Cascade"),
    ("prior_unet", "Stable Cascade"),
];

/// Module path prefixes of denoisers of other architectures.
const OTHER_DENOISERS: [(&str, &str); 8] = [
    ("double_blocks", "Flux"),
    ("single_blocks", "Flux"),
    ("single_transformer_blocks", "Flux"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("transformer_blocks", "a diffusion transformer"),
    ("blocks", "a diffusion transformer"),
    ("layers", "a diffusion transformer"),
    ("noise_refiner", "a diffusion transformer"),
];

/// Parses a LoRA key.
pub(super) fn parse(key: &str) -> Key<'_> {
    if let Some(embedding) = key.strip_prefix(BUNDLE) {
        return Key::Embedding(embedding.split_once('.').map_or(embedding, |(name, _)| name));
    }
    let is_part = |part: &str, name: &str| part == name || (name.ends_with('_') && part.starts_with(name));
    let kind = |part: &str| OTHER_KINDS.into_iter().find(|(name, _)| is_part(part, name)).map(|(_, kind)| kind);
    if let Some(kind) = key.split('.').find_map(kind) {
        return Key::OtherKind(kind);
    }
    if let Some(module) = key.strip_suffix(ALPHA) {
        return Key::Of(module, Side::Alpha);
    }
    if let Some(matrix) = key.strip_suffix(WEIGHT) {
        return side(matrix).map_or(Key::Unknown, |(module, side)| Key::Of(module, side));
    }
    match key.strip_suffix(BIAS).and_then(side) {
        Some(_) => Key::OtherKind("a LoRA with biases"),
        None => Key::Unknown,
    }
}

/// Splits a matrix name into the module name and the side.
fn side(matrix: &str) -> Option<(&str, Side)> {
    let of = |name: &'_ str, sides: &[(&str, Side)]| {
        sides.iter().find_map(|(end, side)| Some((name.strip_suffix(end)?.len(), *side)))
    };
    let before_adapter = || matrix.rsplit_once('.').map(|(name, _adapter)| name);
    let (length, side) = of(matrix, &SIDES).or_else(|| of(before_adapter()?, &NAMED_SIDES))?;
    Some((&matrix[..length], side))
}

/// Returns the architecture that a module's full name indicates, if it is not SDXL.
pub(super) fn other_architecture(name: &str) -> Option<&'static str> {
    let named = |path: &str, names: &[(&str, &'static str)]| {
        names.iter().find(|(start, _)| begins(path, start)).map(|(_, architecture)| *architecture)
    };
    let denoiser = match part_of(name) {
        Some((Component::Unet, path)) => path,
        Some(_) => return None,
        None => unwrapped(name),
    };
    named(denoiser, &OTHER_DENOISERS).or_else(|| named(unwrapped(name), &OTHER_FILES))
}

/// Returns true if a path, with dots or underscores, begins with a name.
fn begins(path: &str, name: &str) -> bool {
    path.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '_']))
}

fn unwrapped(name: &str) -> &str {
    name.strip_prefix(WRAPPER).unwrap_or(name)
}

/// Splits a module's full name into component and path, if it names a component.
fn part_of(name: &str) -> Option<(Component, &str)> {
    let name = unwrapped(name);
    let (part, path) = PARTS.into_iter().find_map(|(start, part)| Some((part, name.strip_prefix(start)?)))?;
    Some((part, unwrapped(path)))
}

/// Splits a module's full name into component and module path, with dots or underscores. The error gives the reason.
pub(super) fn module(name: &str) -> Result<(Component, String), &'static str> {
    let bare = unwrapped(name);
    let first = bare.split('.').next().unwrap_or_default();
    let (part, path) = match part_of(name) {
        Some(found) => found,
        None if OF_UNET.contains(&first) => (Component::Unet, bare),
        None if OF_TEXT.contains(&first) => return Err("belongs to a text encoder, but does not say which one"),
        None => return Err("is not a module of SDXL"),
    };
    let (parent, last) = path.rsplit_once('.').unwrap_or(("", path));
    let of_processor = OF_PROCESSORS.into_iter().find(|(old, ..)| *old == last);
    Ok((
        part,
        match (part, of_processor, parent.strip_suffix(".processor")) {
            (Component::Unet, Some((_, unet, _)), Some(attention)) => format!("{attention}.{unet}"),
            (Component::TextEncoder | Component::TextEncoder2, Some((.., text)), _) => format!("{parent}.{text}"),
            _ => path.to_owned(),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Component, path and side of a matrix or alpha.
    fn told(key: &str) -> Option<(Component, String, Side)> {
        let Key::Of(name, side) = parse(key) else { return None };
        module(name).ok().map(|(part, path)| (part, path, side))
    }

    #[test]
    fn the_keys_of_all_tools_are_told_apart() {
        let attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1";
        let flat = attention.replace('.', "_");
        let text = "text_model.encoder.layers.0.self_attn";
        let sgm = "input_blocks.4.1.transformer_blocks.0.attn1";
        let unet = |key: String, path: String, side| (key, Component::Unet, path, side);
        let q = || format!("{attention}.to_q");
        for (key, part, path, side) in [
            unet(format!("lora_unet_{flat}_to_q.lora_down.weight"), format!("{flat}_to_q"), Side::Down),
            unet(format!("unet.{attention}.to_q.lora_A.weight"), q(), Side::Down),
            unet(format!("unet.{attention}.to_q.lora.up.weight"), q(), Side::Up),
            unet("unet.a.proj_in.lora_B.weight".into(), "a.proj_in".into(), Side::Up),
            unet(format!("base_model.model.{attention}.to_q.lora_A.weight"), q(), Side::Down),
            unet(format!("base_model.model.{attention}.to_q.lora_A.default.weight"), q(), Side::Down),
            unet(format!("unet.base_model.model.{attention}.to_q.lora_B.anna.weight"), q(), Side::Up),
            unet(format!("base_model.model.unet.{attention}.to_q.lora_B.weight"), q(), Side::Up),
            unet("base_model.model.conv_in.lora_B.weight".into(), "conv_in".into(), Side::Up),
            unet(format!("model.diffusion_model.{sgm}.to_q.lora_up.weight"), format!("{sgm}.to_q"), Side::Up),
            unet(format!("diffusion_model.{sgm}.to_q.alpha"), format!("{sgm}.to_q"), Side::Alpha),
            unet(format!("{sgm}.to_q.lora_A.weight"), format!("{sgm}.to_q"), Side::Down),
            unet(format!("unet.{attention}.processor.to_k_lora.down.weight"), format!("{attention}.to_k"), Side::Down),
            unet(format!("{attention}.processor.to_out_lora.down.weight"), format!("{attention}.to_out.0"), Side::Down),
            ("lora_te1_text_model.alpha".into(), Component::TextEncoder, "text_model".into(), Side::Alpha),
            ("lora_te2_text_model.lora_up.weight".into(), Component::TextEncoder2, "text_model".into(), Side::Up),
            (
                format!("text_encoder_2.{text}.q_proj.lora_linear_layer.up.weight"),
                Component::TextEncoder2,
                format!("{text}.q_proj"),
                Side::Up,
            ),
            (
                format!("text_encoder.{text}.to_out_lora.up.weight"),
                Component::TextEncoder,
                format!("{text}.out_proj"),
                Side::Up,
            ),
        ] {
            assert_eq!(told(&key), Some((part, path, side)), "{key}");
        }
        assert_eq!(parse("lora_unet_a.weight"), Key::Unknown);
        assert_eq!(parse("lora_unet_a.lora_down"), Key::Unknown);
        assert_eq!(parse("bundle_emb.anna.string_to_param.*"), Key::Embedding("anna"));
        assert_eq!(module("vae.decoder"), Err("is not a module of SDXL"));
        assert!(module("base_model.model.text_model.encoder.layers.0.fc1").is_err_and(|told| told.contains("which")));
    }

    #[test]
    fn kinds_are_told_by_whole_parts() {
        let kind = |key: &str| match parse(key) {
            Key::OtherKind(kind) => Some(kind),
            _ => None,
        };
        for (key, expected) in [
            ("lora_unet_a.dora_scale", Some("a DoRA")),
            ("unet.a.lora_magnitude_vector.default.weight", Some("a DoRA")),
            ("lora_unet_a.hada_w1_a", Some("a LoHa")),
            ("lora_unet_a.diff", Some("a full difference of weights")),
            ("diffusion_model.a.diff_b", Some("a full difference of weights")),
            ("unet.a.lora_B.bias", Some("a LoRA with biases")),
            ("unet.a.lora_B.default.bias", Some("a LoRA with biases")),
            ("lora_unet_a.lora_up.bias", Some("a LoRA with biases")),
            ("model.diffusion_model.a.lora_up.weight", None),
            ("unet.different.lora_up.weight", None),
            ("unet.a.lora_up.weight", None),
        ] {
            assert_eq!(kind(key), expected, "{key}");
        }
        for (name, expected) in [
            ("lora_unet_double_blocks_0_img_attn_qkv", Some("Flux")),
            ("transformer.single_transformer_blocks.0.attn.to_q", Some("a diffusion transformer")),
            ("diffusion_model.joint_blocks.0.x", Some("Stable Diffusion 3")),
            ("lora_prior_unet_down_blocks_0", Some("Stable Cascade")),
            ("base_model.model.transformer_blocks.0.attn.to_q", Some("a diffusion transformer")),
            ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", None),
            ("unet.down_blocks.1.superior_blocks", None),
            ("lora_te1_text_model_encoder_layers_0_mlp_fc1", None),
        ] {
            assert_eq!(other_architecture(name), expected, "{name}");
        }
    }
}
