//! UNet parity with diffusers 0.42 (`ci/parity/unet_fixtures.py`, `ci/parity/unet_140.py`).

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use hyperlora_sdxl::lora::{AttentionLora, AttentionSite, LoraPair, LoraWeights};
use hyperlora_sdxl::models::unet::{UNet2DConditionModel, UnetInput};
use hyperlora_sdxl::weights::{Weights, save};

/// Both sides compute in f32, so they differ by rounding only.
const TOLERANCE: f32 = 1e-4;

/// bf16 keeps 8 bits. PyTorch's own bf16 errors here are 1.1e-2 (predictions) and 3.2e-2 (gradients).
const BF16_TOLERANCE: f32 = 4e-2;

fn fixtures(name: &str) -> PathBuf {
    hyperlora_testing::fixture(name)
}

/// Inputs and outputs of diffusers for one size of latents.
struct Case {
    weights: Weights,
}

impl Case {
    fn open(name: &str) -> Self {
        let path = fixtures("unet").join(format!("{name}.safetensors"));
        Self { weights: Weights::open(&path, &Device::flex()).unwrap() }
    }

    fn tensor<const D: usize>(&self, name: &str) -> Tensor<D> {
        let shape = self.weights.shapes()[name].try_into().unwrap();
        self.weights.at("").tensor(name, shape)
    }

    fn input(&self) -> UnetInput {
        UnetInput {
            latents: self.tensor("latents"),
            timesteps: self.tensor("timesteps"),
            prompt_embeds: self.tensor("prompt_embeds"),
            pooled: self.tensor("pooled"),
            time_ids: self.tensor("time_ids"),
        }
    }

    /// Reads `lora` or `grad` of every attention site.
    fn lora(&self, kind: &str, sites: &[AttentionSite]) -> LoraWeights {
        let modules = sites
            .iter()
            .map(|site| {
                let pair = |linear: &str| LoraPair {
                    down: self.tensor(&format!("{kind}.{}.{linear}.down", site.path)),
                    up: self.tensor(&format!("{kind}.{}.{linear}.up", site.path)),
                };
                AttentionLora { q: pair("to_q"), k: pair("to_k"), v: pair("to_v"), out: pair("to_out.0") }
            })
            .collect();
        LoraWeights { modules }
    }

    fn loss(&self) -> impl FnOnce(Tensor<4>) -> Tensor<1> {
        let target = self.tensor::<4>("target");
        move |prediction| (prediction - target).square().mean()
    }
}

fn unet() -> UNet2DConditionModel {
    UNet2DConditionModel::load(&fixtures("unet"), &Device::flex()).unwrap()
}

/// Relative error `|a - b| / |b|` in the Euclidean norm.
fn relative_error<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let scale = b.clone().square().sum().into_scalar::<f32>();
    ((a - b).square().sum().into_scalar::<f32>() / scale).sqrt()
}

/// Concatenates all tensors.
fn flat(lora: &LoraWeights) -> Tensor<1> {
    Tensor::cat(lora.tensors().map(|tensor| tensor.clone().flatten(0, 2)).collect(), 0)
}

fn bits(lora: &LoraWeights) -> Vec<TensorData> {
    lora.tensors().map(Tensor::to_data).collect()
}

#[test]
fn predictions_agree_with_diffusers() {
    let unet = unet();
    for name in ["even", "odd"] {
        let case = Case::open(name);
        let lora = case.lora("lora", unet.attention_sites());
        let plain = unet.forward(&case.input(), None);
        let updated = unet.forward(&case.input(), Some(&lora));
        assert!(relative_error(updated.clone(), plain.clone()) > 0.01, "the LoRA of {name} has no effect to test");
        let plain = relative_error(plain, case.tensor("prediction_plain"));
        let updated = relative_error(updated, case.tensor("prediction_lora"));
        println!("{name}: plain {plain:e}, with LoRA {updated:e}");
        assert!(plain < TOLERANCE && updated < TOLERANCE, "{name}: {plain:e} {updated:e}");
    }
}

#[test]
fn gradients_agree_with_torch_with_and_without_recomputation() {
    let unet = unet();
    for name in ["even", "odd"] {
        let case = Case::open(name);
        let lora = case.lora("lora", unet.attention_sites());
        let expected = case.lora("grad", unet.attention_sites());
        for recompute in [false, true] {
            let (loss, gradients, prediction) =
                unet.loss_and_lora_gradients(&case.input(), lora.clone(), recompute, case.loss());
            assert!(relative_error(loss, case.tensor("loss")) < TOLERANCE);
            assert!(relative_error(prediction, case.tensor("prediction_lora")) < TOLERANCE);
            assert_eq!(gradients.modules.len(), unet.attention_sites().len());
            let mut worst = 0.0f32;
            for (index, (found, wanted)) in gradients.tensors().zip(expected.tensors()).enumerate() {
                let site = &unet.attention_sites()[index / 8].path;
                let error = relative_error(found.clone(), wanted.clone());
                worst = worst.max(error);
                assert!(error < TOLERANCE, "{name}, recompute {recompute}, {site}, tensor {}: {error:e}", index % 8);
            }
            println!("{name}, recompute {recompute}: worst relative error {worst:e}");
        }
    }
}

#[test]
fn recomputation_changes_nothing_but_rounding_and_repeats_exactly() {
    let unet = unet();
    let case = Case::open("even");
    let lora = case.lora("lora", unet.attention_sites());
    let run = |recompute| unet.loss_and_lora_gradients(&case.input(), lora.clone(), recompute, case.loss());
    let (loss_on, on, prediction_on) = run(true);
    let (loss_off, off, prediction_off) = run(false);
    assert!(relative_error(loss_on, loss_off) < 1e-5);
    assert!(relative_error(prediction_on, prediction_off) < 1e-5);
    for (a, b) in on.tensors().zip(off.tensors()) {
        assert!(relative_error(a.clone(), b.clone()) < 1e-5);
    }
    assert_eq!(bits(&on), bits(&run(true).1));
    assert_eq!(bits(&off), bits(&run(false).1));
}

/// bf16 results stay close to f32, and callers see f32 only.
#[test]
fn bf16_stays_near_f32_with_and_without_recomputation() {
    let exact = unet();
    let unet = UNet2DConditionModel::load_as(&fixtures("unet"), FloatDType::BF16, &Device::flex()).unwrap();
    for name in ["even", "odd"] {
        let case = Case::open(name);
        let lora = case.lora("lora", unet.attention_sites());
        let plain = relative_error(unet.forward(&case.input(), None), case.tensor("prediction_plain"));
        let wanted = exact.loss_and_lora_gradients(&case.input(), lora.clone(), true, case.loss());
        for recompute in [false, true] {
            let (loss, gradients, prediction) =
                unet.loss_and_lora_gradients(&case.input(), lora.clone(), recompute, case.loss());
            assert!(gradients.tensors().all(|gradient| gradient.dtype() == DType::F32));
            let loss = relative_error(loss, wanted.0.clone());
            let prediction = relative_error(prediction, wanted.2.clone());
            let all = relative_error(flat(&gradients), flat(&wanted.1));
            let pairs = gradients.tensors().zip(wanted.1.tensors());
            let worst = pairs.map(|(found, wanted)| relative_error(found.clone(), wanted.clone())).fold(0.0, f32::max);
            println!(
                "{name}, recompute {recompute}: plain {plain:e}, loss {loss:e}, prediction {prediction:e}, \
                 gradients {all:e}, worst of one tensor {worst:e}"
            );
            let largest = [plain, loss, prediction, all].into_iter().fold(0.0, f32::max);
            assert!(largest < BF16_TOLERANCE, "{name}, recompute {recompute}");
            // Weights rounded to 8 bits must change the result; otherwise the bf16 path did not run.
            assert!(all > 1e-4, "{name}, recompute {recompute}: the gradients are those of f32");
        }
    }
}

#[test]
fn samples_do_not_touch_each_other() {
    let unet = unet();
    let case = Case::open("even");
    let lora = case.lora("lora", unet.attention_sites());
    let whole = unet.forward(&case.input(), Some(&lora));
    let input = case.input();
    let second = UnetInput {
        latents: input.latents.narrow(0, 1, 1),
        timesteps: input.timesteps.narrow(0, 1, 1),
        prompt_embeds: input.prompt_embeds.narrow(0, 1, 1),
        pooled: input.pooled.narrow(0, 1, 1),
        time_ids: input.time_ids.narrow(0, 1, 1),
    };
    let alone = unet.forward(&second, Some(&lora.map(|tensor| tensor.narrow(0, 1, 1))));
    assert!(relative_error(alone, whole.narrow(0, 1, 1)) < 1e-5);
}

/// All tensors of diffusers' 140-attention UNet are requested, none is left over, and the attention sites match.
#[test]
fn keys_and_sites_of_sdxls_topology_are_those_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str| fs::read_to_string(fixtures("unet_140").join(name)).unwrap();
    let shapes: BTreeMap<String, Vec<usize>> = serde_json::from_str(&read("keys.json")).unwrap();
    fs::write(folder.path().join("config.json"), read("config.json")).unwrap();
    let zeros = shapes.into_iter().map(|(name, shape)| (name, TensorData::zeros::<f32, _>(shape)));
    save(&folder.path().join("diffusion_pytorch_model.safetensors"), zeros).unwrap();
    let unet = UNet2DConditionModel::load(folder.path(), &Device::flex()).unwrap();

    let sites: Vec<(String, serde_json::Value)> = unet
        .attention_sites()
        .iter()
        .map(|site| {
            let name = format!("lora_unet_{}", site.path.replace('.', "_"));
            let sizes = serde_json::json!({
                "hidden_size": site.hidden_size, "cross_attention_dim": site.cross_attention_dim,
            });
            (name, sizes)
        })
        .collect();
    let expected: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&read("attn.json")).unwrap();
    assert_eq!(sites.len(), 140);
    assert_eq!(sites, expected.into_iter().collect::<Vec<_>>());
}

#[test]
fn configs_of_other_models_are_refused_by_key() {
    let text = fs::read_to_string(fixtures("unet").join("config.json")).unwrap();
    let original: serde_json::Value = serde_json::from_str(&text).unwrap();
    let refusal = |key: &str, value: serde_json::Value| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = original.clone();
        config[key] = value;
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let error = UNet2DConditionModel::load(folder.path(), &Device::flex()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    };
    use serde_json::json;
    for (key, value) in [
        ("class_embed_type", json!("timestep")),
        ("use_linear_projection", json!(false)),
        ("addition_embed_type", json!(null)),
        ("act_fn", json!("gelu")),
        ("layers_per_block", json!([2, 2])),
        ("block_out_channels", json!([8, 12])),
        ("attention_head_dim", json!([2, 5, 4])),
        ("cross_attention_dim", json!(0)),
        ("norm_num_groups", json!(0)),
        ("norm_num_groups", json!(5)),
        ("projection_class_embeddings_input_dim", json!(48)),
        ("block_out_channels", json!([8, 12, 1u64 << 40])),
    ] {
        let message = refusal(key, value);
        assert!(message.contains(key) && message.contains("config.json"), "{key}: {message}");
    }
    assert!(refusal("down_block_types", json!(["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"])).contains("line 1"));
}

#[test]
fn weights_of_another_size_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixtures("unet_140").join("config.json"), folder.path().join("config.json")).unwrap();
    let name = "diffusion_pytorch_model.safetensors";
    fs::copy(fixtures("unet").join(name), folder.path().join(name)).unwrap();
    let error = UNet2DConditionModel::load(folder.path(), &Device::flex()).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("more"), "{error}");
    assert!(error.to_string().contains("time_embedding.linear_1.weight: shape [32, 8], expected [128, 32]"), "{error}");
}
