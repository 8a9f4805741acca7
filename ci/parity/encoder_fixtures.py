#!/usr/bin/env python3
"""Makes crates/testing/fixtures/encoders: tiny random models in the diffusers layout and what diffusers and
transformers compute with them.

    python ci/parity/encoder_fixtures.py --bpe bpe_simple_vocab_16e6.txt.gz

Needs torch, diffusers, transformers, safetensors, Pillow. The BPE file is the one inside PyPI open-clip-torch 3.3.0
(open_clip/bpe_simple_vocab_16e6.txt.gz, MIT licence, OpenAI's CLIP vocabulary); its first merges become a small vocabulary.
Weights are drawn at random, stored as f16, and the references are computed in f32 from exactly those stored values.
"""

import argparse
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

OUT = Path(__file__).resolve().parents[2] / "crates/testing/fixtures/encoders"
MERGES = 1500
START, END = "<|startoftext|>", "<|endoftext|>"

README = """# Fixtures of the encoders

Made by `ci/parity/encoder_fixtures.py`: tiny random models in the diffusers layout, and what diffusers and transformers
compute with them. The vocabulary is the beginning of OpenAI CLIP's (`bpe_simple_vocab_16e6.txt.gz`), as PyPI
open-clip-torch 3.3.0 carries it: MIT licence, copyright (c) 2021 OpenAI.
"""

TEXTS = [
    "",
    " ",
    "a photo of a person",
    "fcsks fxhks fhyks, ",
    "fcsks fxhks fhyks, a portrait of a woman with red hair",
    "A  Photo\tof\n a   PERSON ",
    "it's the man's hat, they're happy and we've won; I'd say I'll go, don't I'm",
    "rock'n'roll 'quoted' ''twice''",
    "naïve café, façade, jalapeño",
    "cafe\u0301 (combining accent)",
    "Größe Straße ÄÖÜ",
    "Привет, мир",
    "人物肖像、高品質",
    "こんにちは世界",
    "مرحبا بالعالم",
    "İstanbul and ΣΊΣΥΦΟΣ",
    "smile 😀👍🏽 emoji 👩‍👩‍👧",
    "1234 5678.90 3d 4k 8-bit 2x",
    "(masterpiece:1.2), [best quality], {ultra|detailed} -- #tag @me $5 & 50% <lora:x:1>",
    "...!!! ??? ,,, ;;;",
    "<|startoftext|> inside <|endoftext|> the text",
    "!",
    "snake_case_words and kebab-case-words",
    "non\u00a0breaking\u2003spaces\u200bzero width",
    "word " * 100,
    "supercalifragilisticexpialidocious" * 8,
    "ﬁligree ½ cup ² ™",
]


def randomise(model, seed):
    """Weights large enough that every part of the model matters, exact in f16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(noise / p[0].numel() ** 0.5 if "embedding.weight" not in name or p.dim() > 2 else noise * 0.5)
            elif "norm" in name or "layrnorm" in name:
                p.copy_(noise * 0.2 + (1.0 if name.endswith("weight") else 0.0))
            else:
                p.copy_(noise * 0.2)
    return model.half().float().eval()


def save_model(model, folder):
    """`model.half()` works in place: save a f16 copy, then return to f32 (exact)."""
    model.half().save_pretrained(folder)
    return model.float()


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(name, **tensors):
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, OUT / f"{name}.safetensors")


def byte_characters():
    """The printable stand-ins of the 256 bytes, in the order of OpenAI's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def tokenizers(bpe_file):
    lines = gzip.open(bpe_file).read().decode().split("\n")[1 : MERGES + 1]
    characters = byte_characters()
    tokens = characters + [c + "</w>" for c in characters] + ["".join(line.split()) for line in lines] + [START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens)
    made = []
    for folder, pad in [("tokenizer", END), ("tokenizer_2", "!")]:
        path = OUT / folder
        path.mkdir()
        (path / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")) + "\n")
        (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
        special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
        (path / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
        config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special}
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        made.append(CLIPTokenizer.from_pretrained(path))
    ids = [
        [t(text, padding="max_length", max_length=77, truncation=True)["input_ids"] for text in TEXTS] for t in made
    ]
    cases = [{"text": text, "first": a, "second": b} for text, a, b in zip(TEXTS, *ids)]
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (OUT / "tokens.json").write_text(f"[\n{lines}\n]\n")
    return made, vocabulary


def text_encoders(made, vocabulary):
    common = dict(vocab_size=len(vocabulary), num_hidden_layers=3, max_position_embeddings=77)
    ends = dict(bos_token_id=vocabulary[START], pad_token_id=1)
    one = CLIPTextModel(
        CLIPTextConfig(
            **common, **ends, hidden_size=16, intermediate_size=40, num_attention_heads=2, hidden_act="quick_gelu", eos_token_id=2,
            projection_dim=16,
        )
    )
    two = CLIPTextModelWithProjection(
        CLIPTextConfig(
            **common, **ends, hidden_size=24, intermediate_size=48, num_attention_heads=3, hidden_act="gelu",
            eos_token_id=vocabulary[END], projection_dim=20,
        )
    )
    one, two = randomise(one, 1), randomise(two, 2)
    prompts = ["a photo of a person", "fcsks fxhks fhyks, a portrait of a woman with red hair", "word " * 100]
    states, pooled = [], []
    for model, tokenizer, folder in [(one, made[0], "text_encoder"), (two, made[1], "text_encoder_2")]:
        model = save_model(model, OUT / folder)
        ids = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled.append(output[0])
    # The penultimate states of each, side by side; the pooled output of the second alone.
    save("text_encoders", prompt_embeds=torch.cat(states, -1), pooled=pooled[1])
    (OUT / "prompts.json").write_text(json.dumps(prompts) + "\n")
    return one, two


def autoencoder():
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
        scaling_factor=0.13025,
        sample_size=64,
    )
    vae = save_model(randomise(vae, 3), OUT / "vae")
    tensors = {}
    # Sizes that the factor 4 divides, and sizes that it does not.
    for name, (height, width) in {"even": (40, 56), "odd": (43, 58)}.items():
        images = noise(10, 3, 3, height, width).clamp(-1, 1)
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
            draw = noise(11, *posterior.mean.shape)
            latents = (posterior.mean + posterior.std * draw) * vae.config.scaling_factor
            decoded = vae.decode(latents / vae.config.scaling_factor).sample
        tensors |= {
            f"{name}.images": images, f"{name}.mean": posterior.mean, f"{name}.logvar": posterior.logvar,
            f"{name}.noise": draw, f"{name}.latents": latents, f"{name}.decoded": decoded,
        }
    save("autoencoder_kl", **tensors)
    return vae


def vision():
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8,
            projection_dim=16,
        )
    )
    model = save_model(randomise(model, 4), OUT / "image_encoder")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(OUT / "feature_extractor")
    # A picture with smooth areas, edges and texture, larger than the crop in both directions and not square.
    y, x = np.mgrid[0:101, 0:143].astype(np.float64)
    picture = np.stack([
        127 + 120 * np.sin(x / 9) * np.cos(y / 13),
        255 * ((x // 17 + y // 11) % 2),
        (x * y / 40) % 256,
    ], -1).round().clip(0, 255).astype(np.uint8)
    image = Image.fromarray(picture)
    image.save(OUT / "picture.png")
    upright = Image.fromarray(picture.transpose(1, 0, 2).copy())
    # Smaller than the crop in both directions: enlarged.
    small = Image.fromarray(picture[40:61, 30:57].copy())
    pixel_values = torch.cat([
        torch.as_tensor(np.array(processor(i, return_tensors="np").pixel_values)) for i in (image, upright, small)
    ])
    with torch.no_grad():
        penultimate = model(pixel_values, output_hidden_states=True).hidden_states[-2]
    save("clip_vision", pixel_values=pixel_values, penultimate=penultimate)


SCHEDULER = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    prediction_type="epsilon", timestep_spacing="leading", steps_offset=1, interpolation_type="linear",
    use_karras_sigmas=False,
)


def scheduler():
    base = EulerDiscreteScheduler(**SCHEDULER)
    base.save_pretrained(OUT / "scheduler")
    latents, draw = noise(20, 3, 4, 5, 7), noise(21, 3, 4, 5, 7)
    timesteps = torch.tensor([0, 431, 999])
    ratio = base.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    tensors = {
        "alphas_cumprod": base.alphas_cumprod, "latents": latents, "noise": draw,
        "noisy": ratio.sqrt() * latents + (1 - ratio).sqrt() * draw,
        "velocity": ratio.sqrt() * draw - (1 - ratio).sqrt() * latents,
    }
    for prediction in ("epsilon", "v_prediction"):
        for spacing in ("leading", "trailing", "linspace"):
            euler = EulerDiscreteScheduler(**{**SCHEDULER, "prediction_type": prediction, "timestep_spacing": spacing})
            euler.set_timesteps(7)
            x = latents * euler.init_noise_sigma
            trace, inputs = [x], []
            for i, t in enumerate(euler.timesteps):
                inputs.append(euler.scale_model_input(x, t))
                x = euler.step(noise(30 + i, *x.shape), t, x).prev_sample
                trace.append(x)
            key = f"{prediction}.{spacing}"
            tensors |= {
                f"{key}.timesteps": euler.timesteps.float(), f"{key}.sigmas": euler.sigmas.float(),
                f"{key}.inputs": torch.stack(inputs), f"{key}.trace": torch.stack(trace),
            }
    tensors["outputs"] = torch.stack([noise(30 + i, *latents.shape) for i in range(7)])
    save("scheduler", **tensors)


def pipeline(made, encoders, vae):
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), cross_attention_dim=40,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    unet = save_model(randomise(unet, 5), OUT / "unet")
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=made[0], tokenizer_2=made[1], unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULER), add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a photo of a person", "fcsks fxhks fhyks, a portrait of a woman with red hair"]
    initial = noise(40, 2, 4, 10, 14)
    call = dict(
        prompt=prompts, negative_prompt=["blurred"] * 2, height=40, width=56, num_inference_steps=12, guidance_scale=4.0,
    )
    latents = pipe(**call, latents=initial.clone(), output_type="latent").images
    images = pipe(**call, latents=initial.clone(), output_type="np").images
    images = torch.as_tensor((images * 255).round()).to(torch.uint8)
    save("pipeline", initial=initial, latents=latents, images=images)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bpe", required=True, help="bpe_simple_vocab_16e6.txt.gz of open-clip-torch 3.3.0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    (OUT / "README.md").write_text(README)
    made, vocabulary = tokenizers(arguments.bpe)
    encoders = text_encoders(made, vocabulary)
    vae = autoencoder()
    vision()
    scheduler()
    pipeline(made, encoders, vae)


if __name__ == "__main__":
    main()
