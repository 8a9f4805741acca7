"""Makes the tiny SDXL base model of the quickstart: trains VAE and UNet on the ORL faces, writes a diffusers folder.

    python ci/parity/tiny_base.py --out experiments/quickstart/base

Only photographs of the split `train` enter the training. The model knows no identities: its captions are templates, so it is
an unconditional face prior, and who is shown has to come through a LoRA. Takes about half an hour on one CPU core.
"""

import argparse
import json
import math
import platform
import time
from copy import deepcopy
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import orl
import tiny_models
from clip_vocab import END, write_tokenizer

TRIGGER = "fcsks fxhks fhyks, "
CAPTIONS = ("a photo of a person", "a portrait of a person", "a black and white photo of a person", "a photo of a face")
EMPTY_PROMPT_SHARE = 0.1
CROPS_PER_PHOTO = 24
SEED = 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--photos", type=Path, default=orl.default_photos(), help="photo folder of the asset cache")
    parser.add_argument("--split", type=Path, default=Path("experiments/quickstart/split.csv"))
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--unet-steps", type=int, default=2600)
    parser.add_argument("--keep-vae", action="store_true", help="take the trained VAE that already stands in OUT")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


class Progress:
    """Prints and keeps one line per interval: step, mean loss since the last line, seconds."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.every = name, steps, max(1, steps // 30)
        self.losses, self.lines, self.start = [], [], time.monotonic()

    def add(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            seconds = time.monotonic() - self.start
            self.lines.append({"step": step + 1, "loss": round(float(np.mean(self.losses)), 5), "seconds": round(seconds)})
            print(f"{self.name} {step + 1}/{self.steps} loss {self.lines[-1]['loss']:.5f} {seconds:.0f} s", flush=True)
            self.losses = []


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over the first 3 %, then cosine down to 2 % of the peak."""
    warm_up = max(1, steps * 3 // 100)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))))


def optimise(name, model, steps, peak, loss_of_step):
    """AdamW over `steps` steps of `loss_of_step()`; returns the average of the late weights and the loss curve."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    average = EMAModel(model.parameters(), decay=0.995)
    progress = Progress(name, steps)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of_step()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.step(model.parameters())
        progress.add(step, loss.item())
    average.copy_to(model.parameters())
    model.eval().requires_grad_(False)
    return progress.lines


def train_vae(photos, steps):
    """L1 reconstruction with a small KL term; the scaling factor makes the latents' deviation 1."""
    vae, rng = tiny_models.vae(SEED), np.random.default_rng(SEED)
    generator = torch.Generator().manual_seed(SEED)

    def loss_of_step():
        chosen = rng.integers(0, len(photos), 8)
        images = torch.from_numpy(np.stack([orl.random_crop(photos[index], rng)[0] for index in chosen]))
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        return (decoded - images).abs().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    curve = optimise("vae", vae, steps, 2e-3, loss_of_step)
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(np.stack([orl.centre_crop(photo) for photo in photos]))).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    return vae, curve


@torch.no_grad()
def encode_crops(vae, photos):
    """Random crops of every photograph as (mean, std) of scaled latents [N, 4, 16, 16] and their time ids [N, 6]."""
    rng, means, deviations, time_ids = np.random.default_rng(SEED + 1), [], [], []
    for photo in photos:
        crops, places = zip(*(orl.random_crop(photo, rng) for _ in range(CROPS_PER_PHOTO)))
        posterior = vae.encode(torch.from_numpy(np.stack(crops))).latent_dist
        means.append(posterior.mean * vae.config.scaling_factor)
        deviations.append(posterior.std * vae.config.scaling_factor)
        for left, top, _side in places:
            size = orl.IMAGE_SIZE
            # Half of the crops tell where they come from, the others name the plain frame that generation uses.
            plain = rng.random() < 0.5
            time_ids.append([size, size, 0, 0, size, size] if plain else [*photo.shape, top, left, size, size])
    return torch.cat(means), torch.cat(deviations), torch.tensor(time_ids, dtype=torch.float32)


@torch.no_grad()
def encode_prompts(pipeline):
    """Embeddings of the empty prompt, then of every caption without and with the trigger words: ([P, 77, C], [P, D])."""
    prompts = ["", *CAPTIONS, *(TRIGGER + caption for caption in CAPTIONS)]
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return embeds, pooled


def noise_schedule() -> DDPMScheduler:
    return DDPMScheduler.from_config(tiny_models.scheduler().config)


def predict(unet, noisy, timesteps, prompts, chosen, time_ids):
    """The UNet's noise prediction [B, 4, 16, 16] under the chosen prompts."""
    embeds, pooled = prompts
    conditions = {"text_embeds": pooled[chosen], "time_ids": time_ids}
    return unet(noisy, timesteps, embeds[chosen], added_cond_kwargs=conditions).sample


def train_unet(crops, prompts, steps):
    """Plain noise-prediction loss over uniform timesteps."""
    means, deviations, time_ids = crops
    unet, schedule = tiny_models.unet(SEED), noise_schedule()
    generator = torch.Generator().manual_seed(SEED + 2)
    batch = 16

    def loss_of_step():
        chosen = torch.randint(0, len(means), (batch,), generator=generator)
        latents = means[chosen] + deviations[chosen] * torch.randn(means[chosen].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (batch,), generator=generator)
        caption = torch.randint(1, len(prompts[0]), (batch,), generator=generator)
        caption[torch.rand(batch, generator=generator) < EMPTY_PROMPT_SHARE] = 0
        noisy = schedule.add_noise(latents, noise, timesteps)
        return torch.nn.functional.mse_loss(predict(unet, noisy, timesteps, prompts, caption, time_ids[chosen]), noise)

    return unet, optimise("unet", unet, steps, 1.5e-3, loss_of_step)


@torch.no_grad()
def denoising_loss(pipeline, prompts, photos, draws=16):
    """Mean noise-prediction loss of the photographs' centre crops by timestep quartile, with fixed noise."""
    vae, schedule = pipeline.vae, noise_schedule()
    generator = torch.Generator().manual_seed(SEED + 3)
    images = torch.from_numpy(np.stack([orl.centre_crop(photo) for photo in photos]))
    latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    size = float(orl.IMAGE_SIZE)
    time_ids = torch.tensor([[size, size, 0, 0, size, size]]).expand(len(photos), -1)
    caption = torch.ones(len(photos), dtype=torch.long)
    quartiles = []
    for draw in range(draws):
        quartile = draw * 4 // draws
        timesteps = torch.randint(250 * quartile, 250 * (quartile + 1), (len(photos),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = schedule.add_noise(latents, noise, timesteps)
        error = predict(pipeline.unet, noisy, timesteps, prompts, caption, time_ids) - noise
        quartiles.append(error.square().mean().item())
    by_quartile = np.asarray(quartiles).reshape(4, -1).mean(axis=1)
    return {"mean": round(float(by_quartile.mean()), 5), "by_timestep_quartile": by_quartile.round(5).tolist()}


@torch.no_grad()
def reconstruction_psnr(vae, photos) -> float:
    """Peak signal-to-noise ratio of decoded against original centre crops, in dB."""
    images = torch.from_numpy(np.stack([orl.centre_crop(photo) for photo in photos]))
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return round(10 * math.log10(4 / (decoded - images).square().mean().item()), 2)


def save_grid(path: Path, images, columns: int) -> None:
    """PIL images side by side in one PNG."""
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    grid.save(path)


def draw_samples(pipeline, path: Path) -> None:
    """32 samples with Euler in 25 steps and moderate guidance."""
    generator = torch.Generator().manual_seed(SEED + 4)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        CAPTIONS[0],
        height=orl.IMAGE_SIZE,
        width=orl.IMAGE_SIZE,
        num_inference_steps=25,
        guidance_scale=2.0,
        num_images_per_prompt=32,
        generator=generator,
    )
    save_grid(path, result.images, 8)


def assemble(out: Path, vae) -> StableDiffusionXLPipeline:
    """The whole pipeline around a trained VAE; its UNet is not trained yet."""
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        write_tokenizer(out / name, pad)
    first, second = tiny_models.text_encoders(SEED)
    encoder, processor = tiny_models.image_encoder(SEED + 5)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(out / "tokenizer_2"),
        unet=tiny_models.unet(SEED),
        scheduler=tiny_models.scheduler(),
        image_encoder=encoder,
        feature_extractor=processor,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def write_pipeline(pipeline: StableDiffusionXLPipeline, out: Path) -> None:
    """Saves f16 weights with the file and key names of SDXL's own repository, which newer transformers versions alter."""
    deepcopy(pipeline).to(torch.float16).save_pretrained(out, safe_serialization=True)
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        for file in (out / name).iterdir():
            file.unlink()
        write_tokenizer(out / name, pad)
    text_weights = out / "text_encoder" / "model.safetensors"
    renamed = {"text_model." + key.removeprefix("text_model."): value for key, value in load_file(text_weights).items()}
    save_file(renamed, text_weights, metadata={"format": "pt"})
    index = out / "model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace("CLIPImageProcessorPil", "CLIPImageProcessor") + "\n")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    start = time.monotonic()

    keys = orl.read_split(arguments.split, "train")
    held_out_keys = orl.read_split(arguments.split, "held_out")
    assert not set(keys) & set(held_out_keys) and not set(keys) & set(orl.read_split(arguments.split, "unseen"))
    photos = orl.load_photos(arguments.photos, keys)
    held_out = orl.load_photos(arguments.photos, held_out_keys)

    log_path = arguments.out / "training_log.json"
    if arguments.keep_vae:
        vae = tiny_models.AutoencoderKL.from_pretrained(arguments.out / "vae", torch_dtype=torch.float32)
        vae_curve = json.loads(log_path.read_text(encoding="utf-8"))["vae"]["curve"]
    else:
        vae, vae_curve = train_vae(photos, arguments.vae_steps)
    pipeline = assemble(arguments.out, vae)
    prompts = encode_prompts(pipeline)
    untrained = denoising_loss(pipeline, prompts, held_out)
    log = {
        "vae": {
            "curve": vae_curve,
            "scaling_factor": vae.config.scaling_factor,
            "psnr_train_db": reconstruction_psnr(vae, photos),
            "psnr_held_out_db": reconstruction_psnr(vae, held_out),
        },
    }
    print(json.dumps({key: value for key, value in log["vae"].items() if key != "curve"}), flush=True)
    write_pipeline(pipeline, arguments.out)
    log_path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")

    pipeline.unet, unet_curve = train_unet(encode_crops(vae, photos), prompts, arguments.unet_steps)
    log["unet"] = {
        "curve": unet_curve,
        "held_out_loss_untrained": untrained,
        "held_out_loss": denoising_loss(pipeline, prompts, held_out),
        "train_loss": denoising_loss(pipeline, prompts, photos),
        "parameters": sum(weight.numel() for weight in pipeline.unet.parameters()),
    }
    log["run"] = {
        "credit": "ORL database of faces, AT&T Laboratories Cambridge",
        "photographs": {"trained_on": len(keys), "held_out": len(held_out_keys)},
        "seed": SEED,
        "threads": arguments.threads,
        "seconds": round(time.monotonic() - start),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_pipeline(pipeline, arguments.out)
    log_path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    draw_samples(pipeline, arguments.out / "samples.png")
    print(json.dumps({**log["run"], **{key: log["unet"][key] for key in ("held_out_loss", "train_loss")}}, indent=1))


if __name__ == "__main__":
    main()
