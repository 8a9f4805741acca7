//! Conversion and sums of LoRA files: nothing is lost, or the loss is reported.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use hyperlora_sdxl::lora::file::{ADAPTER_METADATA, Layout};
use hyperlora_sdxl::lora::ops::{concat, reduce};
use hyperlora_sdxl::lora::{LoraModule, LoraSet, Matrix};
use hyperlora_sdxl::source::Component;
use hyperlora_sdxl::weights::SafetensorsFile;
use safetensors::Dtype;

fn fixture(name: &str) -> PathBuf {
    hyperlora_testing::fixture("loras").join(name)
}

fn matrix(values: &[f32], shape: [usize; 2]) -> Matrix {
    assert_eq!(values.len(), shape[0] * shape[1]);
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Matrix { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
}

fn values(matrix: &Matrix) -> Vec<f32> {
    assert_eq!(matrix.dtype, Dtype::F32);
    matrix.bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// Returns numbers without a pattern.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * i * 11 + seed * 29) as f32 * 0.61).sin()).collect()
}

/// Creates a LoRA of modules with 5 inputs and 4 outputs, given name, rank, alpha.
fn lora(modules: &[(&str, usize, f32)]) -> LoraSet {
    let module = |&(name, rank, alpha): &(&str, usize, f32)| {
        let down = matrix(&numbers(rank * 5, rank + name.len()), [rank, 5]);
        let up = matrix(&numbers(4 * rank, 2 * rank + name.len()), [4, rank]);
        ((Component::Unet, name.to_owned()), LoraModule { down, up, alpha })
    };
    LoraSet { modules: modules.iter().map(module).collect(), notes: BTreeMap::new() }
}

/// Computes `alpha / rank * up @ down`, `[4, 5]`; zeros if the LoRA does not change the module.
fn delta(lora: &LoraSet, name: &str) -> Vec<f64> {
    let Some(module) = lora.modules.get(&(Component::Unet, name.to_owned())) else { return vec![0.0; 20] };
    let (down, up, rank) = (values(&module.down), values(&module.up), module.rank());
    let scale = f64::from(module.alpha) / rank as f64;
    let product = |row: usize, column: usize| -> f64 {
        (0..rank).map(|r| f64::from(up[row * rank + r]) * f64::from(down[r * 5 + column])).sum()
    };
    (0..4).flat_map(|row| (0..5).map(move |column| (row, column))).map(|(r, c)| scale * product(r, c)).collect()
}

fn norm(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(|value| value * value).sum::<f64>().sqrt()
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    norm(a.iter().zip(b).map(|(a, b)| a - b))
}

#[test]
fn every_layout_becomes_every_other_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["kohya", "sgm", "peft", "diffusers_old"] {
        let source = LoraSet::open(&fixture(&format!("{name}.safetensors"))).unwrap();
        assert!(source.modules.len() > 3, "{name}");
        for (layout, other) in [(Layout::Kohya, Layout::Diffusers), (Layout::Diffusers, Layout::Kohya)] {
            source.save(&path("once"), layout).unwrap();
            let once = LoraSet::open(&path("once")).unwrap();
            assert_eq!(once.modules, source.modules, "{name} as {layout:?}");
            once.save(&path("other"), other).unwrap();
            let back = LoraSet::open(&path("other")).unwrap();
            assert_eq!(back.modules, source.modules, "{name} as {layout:?}, then {other:?}");
            back.save(&path("again"), layout).unwrap();
            LoraSet::open(&path("again")).unwrap().save(&path("and again"), layout).unwrap();
            assert!(fs::read(path("again")).unwrap() == fs::read(path("and again")).unwrap());
        }
    }
    // Stability and diffusers names refer to the same modules.
    let [kohya, sgm] = ["kohya", "sgm"].map(|name| LoraSet::open(&fixture(&format!("{name}.safetensors"))).unwrap());
    let unet =
        |lora: &LoraSet| lora.modules.keys().filter(|(part, _)| *part == Component::Unet).cloned().collect::<Vec<_>>();
    assert!(unet(&sgm).iter().all(|(_, path)| !path.contains("input_blocks")));
    assert!(unet(&sgm).iter().any(|key| unet(&kohya).contains(key)));
}

#[test]
fn ranks_and_alphas_of_their_own_survive_in_both_layouts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora");
    let names = ["mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out", "conv_in"];
    let mut set = lora(&[(names[0], 2, 1.0), (names[1], 3, 0.7), (names[2], 2, 7.0)]);
    set.notes.insert("ss_training_comment".into(), "trigger words: abc".into());
    for layout in [Layout::Kohya, Layout::Diffusers] {
        set.save(&path, layout).unwrap();
        let read = LoraSet::open(&path).unwrap();
        assert_eq!(read.modules, set.modules, "{layout:?}");
        assert_eq!(read.notes.get("ss_training_comment"), set.notes.get("ss_training_comment"));
    }
    // PEFT takes deviations from the first module from these patterns.
    let file = SafetensorsFile::open(&path).unwrap();
    let metadata: serde_json::Value = serde_json::from_str(&file.metadata()[ADAPTER_METADATA]).unwrap();
    let patterns = serde_json::json!({
        "unet.r": 2,
        "unet.lora_alpha": 7,
        "unet.rank_pattern": {names[1]: 3},
        "unet.alpha_pattern": {names[0]: 1, names[1]: 0.7_f32},
        "unet.target_modules": [names[2], names[0], names[1]],
    });
    assert_eq!(metadata, patterns);
}

#[test]
fn a_sum_is_exact_and_keeps_what_only_one_changes() {
    let a = lora(&[("both", 2, 1.0), ("only.a", 3, 3.0)]);
    let b = lora(&[("both", 3, 1.2), ("other.b", 1, 2.0)]);
    for (x, y) in [(1.0, -1.0), (1.0, 0.25), (-0.3, 2.0)] {
        let sum = concat(&[(&a, x), (&b, y)], Dtype::F32).unwrap();
        assert_eq!(sum.modules.len(), 3);
        assert_eq!(sum.modules[&(Component::Unet, "both".to_owned())].rank(), 5);
        for name in ["both", "only.a", "other.b"] {
            let (x, y) = (f64::from(x), f64::from(y));
            let expected: Vec<f64> = delta(&a, name).iter().zip(delta(&b, name)).map(|(a, b)| x * a + y * b).collect();
            let error = difference(&delta(&sum, name), &expected) / norm(expected);
            assert!(error < 1e-6, "{name}: {error}");
        }
    }
    let alone = concat(&[(&a, 1.0), (&b, 0.0)], Dtype::F32).unwrap();
    assert_eq!(alone.modules.len(), 2, "weight 0 leaves a LoRA out");
    assert!(concat(&[(&a, 0.0)], Dtype::F32).unwrap_err().to_string().contains("nothing is left"));

    let mut wide = lora(&[("both", 1, 1.0)]);
    let module = wide.modules.get_mut(&(Component::Unet, "both".to_owned())).unwrap();
    module.down = matrix(&numbers(6, 1), [1, 6]);
    let message = concat(&[(&a, 1.0), (&wide, 1.0)], Dtype::F32).unwrap_err().to_string();
    assert!(message.contains("both") && message.contains("[4, [5]]") && message.contains("[4, [6]]"), "{message}");
    let mut large = lora(&[("both", 1, 1e6)]);
    assert!(concat(&[(&large, 1.0)], Dtype::F16).unwrap_err().to_string().contains("both"));
    large = concat(&[(&large, 1.0)], Dtype::BF16).unwrap();
    assert_eq!(large.wider(&large), Dtype::BF16);
}

#[test]
fn fewer_ranks_are_the_closest_and_the_error_is_told() {
    // Singular values 4, 3, 2, 1 between two bases: unit vectors, and the halved rows of a Hadamard matrix.
    let half = |signs: [f32; 4]| signs.map(|sign| sign / 2.0);
    let rows = [half([1., 1., 1., 1.]), half([1., -1., 1., -1.]), half([1., 1., -1., -1.]), half([1., -1., -1., 1.])];
    let down = [[4., 0., 0., 0., 0.], [0., 3., 0., 0., 0.], [0., 0., 0., 2., 0.], [0., 0., 0., 0., 1.]].concat();
    let module = LoraModule { down: matrix(&down, [4, 5]), up: matrix(&rows.concat(), [4, 4]), alpha: 2.0 };
    let known = LoraSet { modules: [((Component::Unet, "known".to_owned()), module)].into(), notes: BTreeMap::new() };
    for (rank, lost) in [(1, 14.0), (2, 5.0), (3, 1.0), (4, 0.0), (9, 0.0)] {
        let mut cut = known.clone();
        let told = reduce(&mut cut, rank).unwrap();
        let expected = f64::sqrt(lost / 30.0);
        assert!((told.worst - expected).abs() < 1e-6 && (told.mean - expected).abs() < 1e-6, "{rank}: {told:?}");
        let full = delta(&known, "known");
        let real = difference(&delta(&cut, "known"), &full) / norm(full);
        assert!((real - expected).abs() < 1e-6, "{rank}: {real} instead of {expected}");
        assert_eq!(cut.modules.values().next().unwrap().rank(), rank.min(4));
    }

    // Concatenated ranks may exceed the true rank of a sum, which is limited by its matrices.
    let mut sum =
        concat(&[(&lora(&[("a", 3, 1.0), ("b", 1, 1.0)]), 1.0), (&lora(&[("a", 4, 2.0)]), 0.5)], Dtype::F32).unwrap();
    let whole = sum.clone();
    let told = reduce(&mut sum, 4).unwrap();
    assert!(told.worst < 1e-6, "{told:?}");
    assert!(difference(&delta(&sum, "a"), &delta(&whole, "a")) < 1e-5);
    let told = reduce(&mut sum, 2).unwrap();
    assert_eq!(told.worst_module, "a");
    assert!(told.worst > 1e-3 && (told.mean - told.worst / 2.0).abs() < 1e-12, "{told:?}");
    assert!(reduce(&mut sum, 0).unwrap_err().to_string().contains("--rank"));
}

#[test]
fn what_is_no_lora_of_an_sdxl_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    let refusal = |set: &LoraSet| {
        set.save(&path, Layout::Kohya).unwrap();
        let error = LoraSet::open(&path).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    assert!(refusal(&lora(&[("core.to_q", 1, 1.0)])).contains("lora_unet_core_to_q: is not a module of SDXL"));
    let mut broken = lora(&[("conv_in", 2, 1.0)]);
    let key = (Component::Unet, "conv_in".to_owned());
    broken.modules.get_mut(&key).unwrap().up = matrix(&numbers(12, 1), [4, 3]);
    assert!(refusal(&broken).contains("do not make an update"));
    // Empty matrices are rejected: their SVD once never ended, or failed.
    for (down, up) in [([2, 0], [4, 2]), ([2, 5], [0, 2]), ([0, 5], [4, 0]), ([0, 0], [0, 0])] {
        let [down, up] = [down, up].map(|shape: [usize; 2]| matrix(&numbers(shape[0] * shape[1], 1), shape));
        let module = LoraModule { down, up, alpha: 1.0 };
        let empty = LoraSet { modules: [(key.clone(), module)].into(), notes: BTreeMap::new() };
        assert!(refusal(&empty).contains("conv_in: down ["), "{}", refusal(&empty));
    }
    broken.modules.get_mut(&key).unwrap().up = matrix(&[f32::NAN; 8], [4, 2]);
    assert!(refusal(&broken).contains("conv_in: holds values that are not finite"));
}

#[test]
fn notes_are_carried_over_only_where_they_stay_true() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    let with_notes = |notes: &[(&str, &str)]| {
        let mut set = lora(&[("conv_in", 2, 1.0)]);
        set.notes = notes.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        set
    };
    let stale = [
        ("sshs_model_hash", "00"),
        ("sshs_legacy_hash", "00"),
        ("modelspec.hash_sha256", "0x00"),
        ("modelspec.title", "é 写真"),
        ("ss_output_name", "old"),
        ("ss_network_args", "{}"),
    ];
    let kept = [("modelspec.license", "CC0"), ("ss_training_comment", "trigger words: abc"), ("ss_epoch", "3")];
    let source = with_notes(&[&stale[..], &kept].concat());
    for layout in [Layout::Kohya, Layout::Diffusers] {
        source.save(&path, layout).unwrap();
        let read = LoraSet::open(&path).unwrap();
        read.save(&path, layout).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        for (key, value) in kept {
            assert_eq!(file.metadata().get(key).map(String::as_str), Some(value), "{key}");
        }
        for (key, _) in stale {
            assert_eq!(file.metadata().get(key), None, "{key}");
        }
    }

    // Notes about one LoRA are not valid for a sum.
    let other = with_notes(&[("modelspec.license", "CC0"), ("ss_training_comment", "blue"), ("ss_epoch", "4")]);
    let notes = concat(&[(&with_notes(&kept), 1.0), (&other, -1.0)], Dtype::F32).unwrap().notes;
    let told = [("modelspec.license", "CC0"), ("ss_training_comment", "trigger words: abc | blue")];
    assert_eq!(notes, told.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
    assert_eq!(concat(&[(&other, 1.0), (&with_notes(&kept), 0.0)], Dtype::F32).unwrap().notes, other.notes);
}

#[test]
fn eight_bits_become_sixteen_without_loss() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    let mut set = lora(&[("conv_in", 2, 1.0)]);
    let module = set.modules.get_mut(&(Component::Unet, "conv_in".to_owned())).unwrap();
    // 1 and -1.5 in E4M3.
    let eight = |shape: [usize; 2]| Matrix {
        dtype: Dtype::F8_E4M3,
        shape: shape.to_vec(),
        bytes: [0x38, 0xbc].into_iter().cycle().take(shape[0] * shape[1]).collect(),
    };
    (module.down, module.up) = (eight([2, 5]), eight([4, 2]));
    set.save(&path, Layout::Kohya).unwrap();
    let read = LoraSet::open(&path).unwrap();
    let module = &read.modules[&(Component::Unet, "conv_in".to_owned())];
    assert_eq!((module.down.dtype, &module.down.bytes[..4]), (Dtype::F16, &[0x00, 0x3c, 0x00, 0xbe][..]));
    assert_eq!(read.wider(&read), Dtype::F16);
    let mut folded = concat(&[(&read, 1.0), (&read, 0.5)], read.wider(&read)).unwrap();
    assert!(reduce(&mut folded, 1).is_ok());
}
