//! The keys of LoRA files, as the tools write them.
//!
//! ```text
//! sd-scripts      lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha
//!                 lora_unet_input_blocks_4_1_proj_in...                in Stability naming
//!                 lora_te1_..., lora_te2_...                           the text encoders
//! diffusers       unet.down_blocks.1.attentions.0.proj_in.lora_A.weight, .lora_B.weight
//!                 text_encoder..., text_encoder_2...
//! before PEFT     unet.down_blocks.1.attentions.0.proj_in.lora.down.weight, .lora.up.weight
//!                 unet.....attn1.processor.to_out_lora.down.weight     before that
//!                 text_encoder.....self_attn.q_proj.lora_linear_layer.down.weight
//! ```

use crate::sdxl::base_source::Part;

/// What one tensor of a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// `[rank, in]`
    Down,
    /// `[out, rank]`
    Up,
    /// The update's scale, times the rank.
    Alpha,
}

const SIDES: [(&str, Side); 11] = [
    (".lora_down.weight", Side::Down),
    (".lora_up.weight", Side::Up),
    (".lora_A.weight", Side::Down),
    (".lora_B.weight", Side::Up),
    (".lora.down.weight", Side::Down),
    (".lora.up.weight", Side::Up),
    (".lora_linear_layer.down.weight", Side::Down),
    (".lora_linear_layer.up.weight", Side::Up),
    ("_lora.down.weight", Side::Down),
    ("_lora.up.weight", Side::Up),
    (".alpha", Side::Alpha),
];

const PARTS: [(&str, Part); 9] = [
    ("lora_unet_", Part::Unet),
    ("lora_te1_", Part::TextEncoder),
    ("lora_te2_", Part::TextEncoder2),
    ("lora_te_", Part::TextEncoder),
    ("unet.", Part::Unet),
    ("text_encoder.", Part::TextEncoder),
    ("text_encoder_2.", Part::TextEncoder2),
    ("diffusion_model.", Part::Unet),
    ("base_model.model.", Part::Unet),
];

/// What diffusers called the linears of attention while it had processors, and what they are: in the UNet, in the text
/// encoders.
const OF_PROCESSORS: [(&str, &str, &str); 4] = [
    ("to_q", "to_q", "q_proj"),
    ("to_k", "to_k", "k_proj"),
    ("to_v", "to_v", "v_proj"),
    ("to_out", "to_out.0", "out_proj"),
];

/// What files hold that are no plain LoRA.
const OTHER_KINDS: [(&str, &str); 9] = [
    ("dora_scale", "a DoRA"),
    ("lora_magnitude_vector", "a DoRA"),
    (".hada_", "a LoHa"),
    (".lokr_", "a LoKr"),
    ("lora_mid", "a LoCon with a core (lora_mid)"),
    (".oft_", "an OFT"),
    (".boft_", "an OFT"),
    ("lora_B.bias", "a LoRA with biases"),
    (".diff", "a full difference of weights"),
];

/// What the modules of other architectures are called.
const OTHER_ARCHITECTURES: [(&str, &str); 6] = [
    ("double_blocks", "Flux"),
    ("single_transformer_blocks", "Flux"),
    ("single_blocks", "Flux"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("transformer.transformer_blocks", "a diffusion transformer"),
    ("prior_", "Stable Cascade"),
];

/// What kind of file a key tells of, where it is no plain LoRA.
pub(super) fn other_kind(key: &str) -> Option<&'static str> {
    OTHER_KINDS.into_iter().find(|(part, _)| key.contains(part)).map(|(_, kind)| kind)
}

/// The architecture that a key tells of, where it is not SDXL's.
pub(super) fn other_architecture(key: &str) -> Option<&'static str> {
    OTHER_ARCHITECTURES.into_iter().find(|(part, _)| key.contains(part)).map(|(_, architecture)| architecture)
}

/// Cuts a key into the module's full name and what the tensor is of it.
pub(super) fn side(key: &str) -> Option<(&str, Side)> {
    SIDES.into_iter().find_map(|(end, side)| Some((key.strip_suffix(end)?, side)))
}

/// Cuts a module's full name into the part of the base and the module's path in it, with dots or with underscores.
pub(super) fn module(name: &str) -> Option<(Part, String)> {
    let (part, path) = PARTS.into_iter().find_map(|(start, part)| Some((part, name.strip_prefix(start)?)))?;
    let (parent, last) = path.rsplit_once('.').unwrap_or(("", path));
    let of_processor = OF_PROCESSORS.into_iter().find(|(old, ..)| *old == last);
    Some((
        part,
        match (part, of_processor, parent.strip_suffix(".processor")) {
            (Part::Unet, Some((_, unet, _)), Some(attention)) => format!("{attention}.{unet}"),
            (Part::TextEncoder | Part::TextEncoder2, Some((.., text)), _) => format!("{parent}.{text}"),
            _ => path.to_owned(),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_all_tools_are_told_apart() {
        let attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1";
        let text = "text_model.encoder.layers.0.self_attn";
        let cases = [
            (format!("lora_unet_{}_to_q.lora_down.weight", attention.replace('.', "_")), Part::Unet, Side::Down),
            ("lora_te1_text_model.alpha".into(), Part::TextEncoder, Side::Alpha),
            ("lora_te2_text_model.lora_up.weight".into(), Part::TextEncoder2, Side::Up),
            (format!("unet.{attention}.to_q.lora_A.weight"), Part::Unet, Side::Down),
            (format!("unet.{attention}.to_q.lora.up.weight"), Part::Unet, Side::Up),
            (format!("text_encoder_2.{text}.q_proj.lora_linear_layer.up.weight"), Part::TextEncoder2, Side::Up),
        ];
        for (key, part, expected) in cases {
            let found = side(&key).and_then(|(name, side)| Some((module(name)?.0, side)));
            assert_eq!(found, Some((part, expected)), "{key}");
        }
        let modern = [
            (format!("unet.{attention}.processor.to_out_lora.down.weight"), format!("{attention}.to_out.0")),
            (format!("unet.{attention}.processor.to_k_lora.down.weight"), format!("{attention}.to_k")),
            (format!("text_encoder.{text}.to_out_lora.up.weight"), format!("{text}.out_proj")),
            ("unet.a.proj_in.lora_B.weight".into(), "a.proj_in".into()),
        ];
        for (key, path) in modern {
            let found = side(&key).and_then(|(name, _)| module(name)).map(|(_, path)| path);
            assert_eq!(found, Some(path), "{key}");
        }
        assert_eq!(side("lora_unet_a.weight"), None);
        assert_eq!(module("vae.decoder"), None);
    }
}
