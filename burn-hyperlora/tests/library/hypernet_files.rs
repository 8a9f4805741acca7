//! Hypernetwork files: reading and writing the released layout, and LoRA files for other tools.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor};
use burn_hyperlora::export::save_lora;
use burn_hyperlora::hypernet::{HyperLora, HyperLoraConfig, convert, whole_files};
use hyperlora_core::files::MARKER;
use hyperlora_sdxl::lora::file::Layout;
use hyperlora_sdxl::lora::{AttentionSite, LoraWeights};
use hyperlora_sdxl::weights::Weights;

use crate::hyper_fixture::{config, fixtures, sites};

const FILES: [&str; 4] = ["hyper_lora_modules", "resampler", "id_projector", "base_resampler"];

/// Reads every tensor of a safetensors file as raw bytes.
fn tensors(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect()
}

fn clip() -> Tensor<3> {
    Weights::open(&fixtures().join("expected.safetensors"), &Device::flex())
        .unwrap()
        .at("")
        .tensor("clip_states", [4, 5, 10])
}

fn values(lora: &LoraWeights) -> Vec<f32> {
    lora.tensors().flat_map(|tensor| tensor.to_data().iter::<f32>().collect::<Vec<_>>()).collect()
}

#[test]
fn the_sizes_are_read_from_the_files() {
    assert_eq!(HyperLoraConfig::of_folder(&fixtures(), 5).unwrap(), config());
}

#[test]
fn a_released_folder_comes_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("weights");
    for device in [Device::flex(), Device::flex().autodiff()] {
        let model = HyperLora::load(&fixtures(), &config(), &sites(), &device).unwrap();
        model.save(&saved, FloatDType::F32).unwrap();
        for stem in FILES {
            let name = format!("{stem}.safetensors");
            assert_eq!(tensors(&saved.join(&name)), tensors(&fixtures().join(&name)), "{name}");
        }
        let json = |folder: &Path| fs::read_to_string(folder.join("hyper_lora_modules.json")).unwrap();
        assert_eq!(json(&saved).trim(), json(&fixtures()).trim());
    }
}

#[test]
fn a_folder_that_several_parts_wrote_holds_the_same_and_goes_back_into_whole_files() {
    let model = HyperLora::load(&fixtures(), &config(), &sites(), &Device::flex()).unwrap();
    let root = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let folder = root.path().join(name);
        fs::create_dir(&folder).unwrap();
        folder
    };
    let (saved, joined) = (root.path().join("saved"), folder("joined"));
    model.save(&saved, FloatDType::F32).unwrap();
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        entries.filter(|name| name != MARKER).collect::<BTreeSet<_>>()
    };
    for parts in [1, 2, 3] {
        let divided = folder(&format!("of-{parts}"));
        for part in 0..parts {
            for file in model.copy_part(FloatDType::F32, part, parts).unwrap() {
                let path = divided.join(&file.name);
                file.write(&path).unwrap();
            }
        }
        let shards: Vec<_> = names(&divided).into_iter().filter(|name| name.contains("-of-")).collect();
        assert_eq!(shards.len(), if parts == 1 { 0 } else { parts }, "{shards:?}");
        let bytes = shards.iter().map(|name| fs::metadata(divided.join(name)).unwrap().len());
        let (least, most) = (bytes.clone().min().unwrap_or(0), bytes.max().unwrap_or(0));
        assert!(most <= 2 * least, "shards of about the same size, not {least} to {most} bytes");

        assert_eq!(HyperLoraConfig::of_folder(&divided, 5).unwrap(), config());
        let again = HyperLora::load(&divided, &config(), &sites(), &Device::flex()).unwrap();
        again.save(&joined, FloatDType::F32).unwrap();
        let target = root.path().join(format!("converted-{parts}"));
        convert(&divided, &config(), &target, FloatDType::F32, true).unwrap();
        let whole = folder(&format!("whole-{parts}"));
        whole_files(&divided).for_each(|file| file.write(&whole.join(&file.name)).unwrap());
        for found in [&joined, &target, &whole] {
            assert_eq!(names(found), names(&saved));
            for name in names(&saved) {
                assert!(fs::read(found.join(&name)).unwrap() == fs::read(saved.join(&name)).unwrap(), "{parts} {name}");
            }
        }
    }

    fs::remove_file(root.path().join("of-3/hyper_lora_modules-00002-of-00003.safetensors")).unwrap();
    let error = HyperLora::load(&root.path().join("of-3"), &config(), &sites(), &Device::flex()).unwrap_err();
    assert!(error.to_string().contains("names the shard hyper_lora_modules-00002-of-00003.safetensors"), "{error}");
}

/// The fixture's modules in Stability naming, in another order than the UNet's.
fn stability_json() -> String {
    let json = fs::read_to_string(fixtures().join("hyper_lora_modules.json")).unwrap();
    json.replace("down_blocks_1_attentions_0", "input_blocks_4_1").replace("mid_block_attentions_0", "middle_block_1")
}

#[test]
fn a_converted_folder_keeps_every_bit_that_its_type_can_hold() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let convert =
        |source: &Path, target: &str, dtype, base| convert(source, &config(), &at(target), dtype, base).unwrap();
    let all = |folder: &Path| FILES.map(|stem| tensors(&folder.join(format!("{stem}.safetensors"))));
    let json = |folder: &Path| fs::read_to_string(folder.join("hyper_lora_modules.json")).unwrap();

    convert(&fixtures(), "same", FloatDType::F32, true);
    assert_eq!(all(&at("same")), all(&fixtures()));
    assert_eq!(json(&at("same")).trim(), json(&fixtures()).trim());
    // Conversion to f16 or bf16 loses precision once; every value of either type is exact in f32.
    for (dtype, name) in [(FloatDType::F16, "f16"), (FloatDType::BF16, "bf16")] {
        convert(&fixtures(), name, dtype, true);
        convert(&at(name), "again", dtype, true);
        assert_eq!(all(&at("again")), all(&at(name)));
        convert(&at(name), "wide", FloatDType::F32, true);
        convert(&at("wide"), "narrow", dtype, true);
        assert_eq!(all(&at("narrow")), all(&at(name)));
        assert_ne!(all(&at("wide")), all(&fixtures()));
        let loaded = HyperLora::load(&at(name), &config(), &sites(), &Device::flex()).unwrap();
        loaded.save(&at("saved"), dtype).unwrap();
        assert_eq!(all(&at("saved")), all(&at(name)));
    }

    let stability = with_modules(&stability_json());
    convert(stability.path(), "renamed", FloatDType::F32, true);
    assert_eq!(all(&at("renamed")), all(&fixtures()));
    assert_eq!(json(&at("renamed")), json(&at("same")), "diffusers naming, in the same order");

    convert(&fixtures(), "id-only", FloatDType::F32, false);
    assert!(!at("id-only/base_resampler.safetensors").exists());
    let id_only = HyperLoraConfig { base_rank: 0, ..config() };
    assert_eq!(HyperLoraConfig::of_folder(&at("id-only"), 5).unwrap(), id_only);
    let plain = HyperLora::load(&fixtures(), &config(), &sites(), &Device::flex()).unwrap();
    let loaded = HyperLora::load(&at("id-only"), &id_only, &sites(), &Device::flex()).unwrap();
    assert_eq!(values(&loaded.id_lora(clip(), None)), values(&plain.id_lora(clip(), None)));
}

#[test]
fn a_folder_that_does_not_fit_is_not_converted() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("target");
    let refusal = |source: &Path, config: &HyperLoraConfig, dtype| {
        let error = convert(source, config, &target, dtype, true).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0, "nothing is left behind");
        error.to_string()
    };
    let json = fs::read_to_string(fixtures().join("hyper_lora_modules.json")).unwrap();
    let resampler = |value: f32| {
        let folder = with_modules(&json);
        let path = folder.path().join("resampler.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 4;
        bytes[last..].copy_from_slice(&value.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        folder
    };

    let message = refusal(&fixtures(), &HyperLoraConfig { id_rank: 3, ..config() }, FloatDType::F32);
    assert!(message.contains("id_down_basis") && message.contains("hyper_lora"), "{message}");
    let message = refusal(resampler(f32::NAN).path(), &config(), FloatDType::F32);
    assert!(message.contains("resampler.safetensors: proj_out") && message.contains("not finite"), "{message}");
    let message = refusal(resampler(1e5).path(), &config(), FloatDType::F16);
    assert!(message.contains("resampler.safetensors: proj_out") && message.contains("bf16"), "{message}");
    convert(resampler(1e5).path(), &config(), &target, FloatDType::BF16, true).unwrap();
}

/// Copies the fixture with another `hyper_lora_modules.json`.
fn with_modules(json: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for stem in FILES {
        let name = format!("{stem}.safetensors");
        fs::copy(fixtures().join(&name), folder.path().join(&name)).unwrap();
    }
    fs::write(folder.path().join("hyper_lora_modules.json"), json).unwrap();
    folder
}

#[test]
fn stability_naming_and_another_module_order_are_understood() {
    let folder = with_modules(&stability_json());
    let device = Device::flex();
    let plain = HyperLora::load(&fixtures(), &config(), &sites(), &device).unwrap();
    let renamed = HyperLora::load(folder.path(), &config(), &sites(), &device).unwrap();
    assert_eq!(values(&renamed.id_lora(clip(), None)), values(&plain.id_lora(clip(), None)));

    let mut turned: Vec<_> = sites();
    turned.reverse();
    let other_unet = HyperLora::load(&fixtures(), &config(), &turned, &device).unwrap();
    assert_eq!(other_unet.sites(), turned);
    let mut expected = plain.id_lora(clip(), None);
    expected.modules.reverse();
    assert_eq!(values(&other_unet.id_lora(clip(), None)), values(&expected));
}

#[test]
fn a_folder_that_does_not_fit_is_one_clear_error() {
    let load = |folder: &Path, config: &HyperLoraConfig, sites: &[AttentionSite]| {
        let error = HyperLora::load(folder, config, sites, &Device::flex()).map(|_| ()).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    let json = fs::read_to_string(fixtures().join("hyper_lora_modules.json")).unwrap();

    let other_rank = load(&fixtures(), &HyperLoraConfig { id_rank: 3, ..config() }, &sites());
    assert!(
        other_rank.contains("hyper_lora_modules.safetensors") && other_rank.contains("id_down_basis"),
        "{other_rank}"
    );
    let fewer = load(&fixtures(), &config(), &sites()[..2]);
    assert!(fewer.contains("lists 3 attention modules, the UNet has 2"), "{fewer}");
    let mut wider = sites();
    wider[1].cross_attention_dim = Some(2048);
    let wider = load(&fixtures(), &config(), &wider);
    assert!(wider.contains("attn2") && wider.contains("2048"), "{wider}");

    let heads = HyperLoraConfig::of_folder(&fixtures(), 4).unwrap_err().to_string();
    assert!(heads.contains("width 15") && heads.contains("--head-dim"), "{heads}");
    for (from, to, part) in [
        ("\"hidden_size\": 8", "\"hidden_size\": 18446744073709551615", "lora_unet_mid_block"),
        ("\"hidden_size\": 8", "\"hidden_size\": 0", "a width of 0"),
        ("\"hidden_size\": 8", "\"hidden_size\": -8", "invalid value"),
        (
            "down_blocks_1_attentions_0_transformer_blocks_0_attn1",
            "middle_block_1_transformer_blocks_0_attn2",
            "is listed twice",
        ),
        ("lora_unet", "lora_te", "not an attention module"),
    ] {
        let lying = with_modules(&json.replace(from, to));
        let message = load(lying.path(), &config(), &sites());
        assert!(message.contains("hyper_lora_modules.json") && message.contains(part), "{message}");
    }
    assert!(load(with_modules("{}").path(), &config(), &sites()).contains("lists no attention modules"));
    let misnamed = with_modules(&json.replace("mid_block", "core"));
    assert!(load(misnamed.path(), &config(), &sites()).contains("lora_unet_core"));
    let broken = with_modules(&json[..json.len() / 2]);
    assert!(load(broken.path(), &config(), &sites()).contains("hyper_lora_modules.json"));
    let incomplete = with_modules(&json);
    fs::remove_file(incomplete.path().join("resampler.safetensors")).unwrap();
    assert!(load(incomplete.path(), &config(), &sites()).contains("resampler.safetensors"));
}

/// Computes `alpha / rank * up @ down` of one linear of a kohya file, `[out, in]`.
fn effect(file: &Weights, name: &str, rank: usize, input: usize, output: usize) -> Tensor<2> {
    let alpha = tensors(file.path())[&format!("{name}.alpha")].as_slice().try_into().map(f32::from_le_bytes).unwrap();
    let file = file.at("");
    file.ignore(&format!("{name}.alpha"));
    let down: Tensor<2> = file.tensor(&format!("{name}.lora_down.weight"), [rank, input]);
    let up: Tensor<2> = file.tensor(&format!("{name}.lora_up.weight"), [output, rank]);
    up.matmul(down) * (alpha / rank as f32)
}

#[test]
fn a_kohya_file_has_the_effect_of_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let model = HyperLora::load(&fixtures(), &config(), &sites(), &device).unwrap();
    let weight = |value: f32| Tensor::<1>::from_floats([value], &device);
    let one = clip().narrow(0, 0, 1);
    let id = model.id_lora(one.clone(), None).weighted(&weight(0.8));
    let both = id.clone().concat(model.base_lora(one).unwrap().weighted(&weight(0.4)));

    for (lora, rank, dtype, tolerance) in
        [(&id, 4, FloatDType::F32, 1e-6), (&both, 6, FloatDType::F32, 1e-6), (&both, 6, FloatDType::F16, 1e-3)]
    {
        let path = folder.path().join("lora.safetensors");
        let notes = BTreeMap::from([("note".to_owned(), "held".to_owned())]);
        save_lora(&path, &sites(), lora, dtype, Layout::Kohya, &notes).unwrap();
        let bytes = fs::read(&path).unwrap();
        save_lora(&path, &sites(), lora, dtype, Layout::Kohya, &notes).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes, "the same weights must give the same file");
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        assert_eq!(metadata.get("ss_network_dim"), Some(&rank.to_string()));
        assert_eq!(metadata.get("note").map(String::as_str), Some("held"));

        let file = Weights::open(&path, &device).unwrap();
        for (site, module) in sites().iter().zip(&lora.modules) {
            let (hidden, context) = (site.hidden_size, site.cross_attention_dim.unwrap_or(site.hidden_size));
            let linears = [("to_q", hidden), ("to_k", context), ("to_v", context), ("to_out_0", hidden)];
            for ((linear, input), pair) in linears.into_iter().zip(module.pairs()) {
                let got = effect(&file, &format!("{}_{linear}", site.lora_prefix()), rank, input, hidden);
                let eye = Tensor::<2>::eye(input, &device).reshape([1, input, input]);
                let expected = pair.apply(eye).reshape([input, hidden]).swap_dims(0, 1);
                let norm = |t: Tensor<2>| t.square().sum().sqrt().into_scalar::<f32>();
                let error = norm(got - expected.clone()) / norm(expected);
                assert!(error <= tolerance, "{} {linear}: {error:e}", site.path);
            }
        }
        file.finish().unwrap();
    }
}

#[test]
fn a_lora_of_several_samples_or_of_no_numbers_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    let model = HyperLora::load(&fixtures(), &config(), &sites(), &Device::flex()).unwrap();
    let save = |lora: &LoraWeights, sites: &[AttentionSite]| {
        save_lora(&path, sites, lora, FloatDType::F16, Layout::Kohya, &BTreeMap::new())
            .map_err(|error| error.exit_code())
    };
    let one = model.id_lora(clip().narrow(0, 0, 1), None);
    assert_eq!(save(&model.id_lora(clip(), None), &sites()), Err(1));
    assert_eq!(save(&one, &sites()[..2]), Err(1));
    assert_eq!(save(&one.clone().map(|tensor| tensor * 1e6), &sites()), Err(1));
    assert!(!path.exists());
    assert_eq!(save(&one, &sites()), Ok(()));
    assert!(path.exists());
}
