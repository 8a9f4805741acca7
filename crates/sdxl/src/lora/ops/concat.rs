//! Sums LoRAs exactly by concatenating their ranks.

use std::collections::BTreeMap;

use crate::lora::file::COMMENT;
use crate::lora::{LoraModule, LoraSet, Matrix};
use hyperlora_core::{Error, Result};
use safetensors::Dtype;

/// Sums LoRAs: `sum_i weight_i * lora_i`, for each module `[scale_1 up_1, scale_2 up_2, ..] @ [down_1; down_2; ..]`
/// with scale 1. Ranks may differ, modules that only one LoRA changes are kept, and a LoRA of weight 0 is dropped.
/// Values are scaled and rounded once to `dtype`. The result keeps the notes that all LoRAs share, and every comment.
///
/// # Errors
/// Input, with the module's name: module sizes differ, `dtype` cannot hold a value, or no LoRA is left.
///
/// # Examples
/// ```
/// use hyperlora_sdxl::lora::LoraSet;
/// use hyperlora_sdxl::lora::ops::concat;
/// # use hyperlora_sdxl::lora::{LoraModule, Matrix};
/// # use hyperlora_sdxl::source::Component;
/// use safetensors::Dtype;
/// # fn example(rank: usize) -> LoraSet {
/// #     let ones = |shape: [usize; 2]| Matrix {
/// #         dtype: Dtype::F32,
/// #         shape: shape.to_vec(),
/// #         bytes: 1_f32.to_le_bytes().repeat(shape[0] * shape[1]),
/// #     };
/// #     let module = LoraModule { down: ones([rank, 640]), up: ones([640, rank]), alpha: rank as f32 };
/// #     let key = (Component::Unet, "down_blocks.1.attentions.0.proj_in".to_string());
/// #     LoraSet { modules: [(key, module)].into(), ..LoraSet::default() }
/// # }
///
/// # let (style, person): (LoraSet, LoraSet) = (example(4), example(8));
/// // `LoraSet::open` reads `style` and `person` from files.
/// let sum = concat(&[(&style, 0.5), (&person, 1.0)], Dtype::F16)?;
/// assert!(sum.modules.values().all(|module| module.rank() == 4 + 8));
/// # Ok::<(), hyperlora_core::Error>(())
/// ```
pub fn concat(loras: &[(&LoraSet, f32)], dtype: Dtype) -> Result<LoraSet> {
    let used: Vec<_> = loras.iter().filter(|(_, weight)| *weight != 0.0).collect();
    let mut sum = LoraSet { notes: common_notes(&used), ..LoraSet::default() };
    for key in used.iter().flat_map(|(lora, _)| lora.modules.keys()) {
        if sum.modules.contains_key(key) {
            continue;
        }
        let parts: Vec<_> = used.iter().filter_map(|(lora, weight)| Some((lora.modules.get(key)?, *weight))).collect();
        let module = side_by_side(&parts, dtype)
            .map_err(|problem| Error::input(&key.1, problem, "combine LoRAs of one base, or write f32"))?;
        sum.modules.insert(key.clone(), module);
    }
    if sum.modules.is_empty() {
        return Err(Error::input("LoRAs", "nothing is left: every weight is 0", "give one of them a weight"));
    }
    Ok(sum)
}

/// Notes that all LoRAs share, plus all comments with their trigger words, one after another.
fn common_notes(loras: &[&(&LoraSet, f32)]) -> BTreeMap<String, String> {
    let Some((first, others)) = loras.split_first() else { return BTreeMap::new() };
    let shared = |(key, value): &(&String, &String)| others.iter().all(|(lora, _)| lora.notes.get(*key) == Some(value));
    let mut notes: BTreeMap<_, _> =
        first.0.notes.iter().filter(shared).map(|(key, value)| (key.clone(), value.clone())).collect();
    let mut comments: Vec<&str> = Vec::new();
    for comment in loras.iter().filter_map(|(lora, _)| lora.notes.get(COMMENT)) {
        if !comments.contains(&comment.as_str()) {
            comments.push(comment);
        }
    }
    if !comments.is_empty() {
        notes.insert(COMMENT.into(), comments.join(" | "));
    }
    notes
}

/// Concatenates the ranks of one module. The error reports a mismatch.
fn side_by_side(parts: &[(&LoraModule, f32)], dtype: Dtype) -> std::result::Result<LoraModule, String> {
    let Some(((first, _), others)) = parts.split_first() else { return Err("has no parts".into()) };
    let (input, output) = (&first.down.shape[1..], first.up.shape[0]);
    for (other, _) in others {
        if trimmed(&other.down.shape[1..]) != trimmed(input) || other.up.shape[0] != output {
            let sizes = |module: &LoraModule| format!("[{}, {:?}]", module.up.shape[0], &module.down.shape[1..]);
            return Err(format!("is {} in one LoRA and {} in another", sizes(first), sizes(other)));
        }
    }
    let rank: usize = parts.iter().map(|(module, _)| module.rank()).sum();
    let mut down = Vec::new();
    let mut ups = Vec::new();
    for (module, weight) in parts {
        down.extend(module.down.values()?);
        let scale = weight * module.scale();
        let values: Vec<f32> = module.up.values()?.into_iter().map(|value| value * scale).collect();
        ups.push((module.rank(), values));
    }
    let row = |row: usize| ups.iter().flat_map(move |(rank, up)| &up[row * rank..(row + 1) * rank]);
    let up: Vec<f32> = (0..output).flat_map(row).copied().collect();
    Ok(LoraModule {
        down: Matrix::of(&down, [&[rank], input].concat(), dtype)?,
        up: Matrix::of(&up, [&[output, rank], &first.up.shape[2..]].concat(), dtype)?,
        alpha: rank as f32,
    })
}

/// Strips trailing axes of length one from a shape: a linear layer may be stored as a 1x1 convolution.
fn trimmed(shape: &[usize]) -> &[usize] {
    let end = shape.iter().skip(1).rposition(|&axis| axis != 1).map_or(1, |last| last + 2);
    &shape[..end.min(shape.len())]
}
