"""Writes crates/testing/fixtures/loras/: one LoRA in the ways that tools write it, and what diffusers draws with it.

    python ci/parity/lora_fixtures.py

All LoRA files but `second` hold the same small random updates of the quickstart's base (experiments/quickstart/base): linears
of attention, feed forward and projection, convolutions of 1x1 and 3x3, and linears of both text encoders, of different
ranks, with an alpha each.

kohya.safetensors, sgm.safetensors      sd-scripts with the UNet's modules in diffusers and in Stability naming
peft.safetensors                        diffusers' `save_lora_weights`, alphas in the metadata
diffusers_old.safetensors               diffusers before PEFT, alphas multiplied into the weights
second.safetensors                      another one, in peft's naming, without alphas
drawings.safetensors                    `initial` latents, and the final ones of StableDiffusionXLPipeline after 20 steps:
    `{sampler}`, `{sampler}.lora` (peft at weight 0.8), `two` (peft at 0.8 and second at -0.5), `conditioned` (negative
    prompt, size and crop). Not kohya: with transformers 5, diffusers 0.42 drops the queries of a kohya file's text encoders
"""

import json
import pathlib
import shutil
import tempfile

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).parents[2]
BASE = ROOT / "experiments/quickstart/base"
OUT = ROOT / "crates/testing/fixtures/loras"
PROMPT, NEGATIVE = "a photo of a smiling man", "a woman with glasses"
STEPS, GUIDANCE, HEIGHT, WIDTH = 20, 3.0, 32, 48

# Module in diffusers naming -> (module in Stability naming, rank, alpha)
UNET = {
    "conv_in": ("input_blocks.0.0", 2, 1.0),
    "time_embedding.linear_1": ("time_embed.0", 1, 1.0),
    "down_blocks.0.resnets.1.conv1": ("input_blocks.2.0.in_layers.2", 2, 2.0),
    "down_blocks.0.resnets.1.time_emb_proj": ("input_blocks.2.0.emb_layers.1", 2, 1.0),
    "down_blocks.0.downsamplers.0.conv": ("input_blocks.3.0.op", 1, 1.0),
    "down_blocks.1.resnets.0.conv_shortcut": ("input_blocks.4.0.skip_connection", 3, 1.5),
    "down_blocks.1.attentions.0.proj_in": ("input_blocks.4.1.proj_in", 2, 2.0),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q", 4, 2.0),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k", 2, 1.0),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "middle_block.1.transformer_blocks.0.ff.net.0.proj", 3, 3.0),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2": ("middle_block.1.transformer_blocks.0.ff.net.2", 1, 0.5),
    "mid_block.resnets.1.conv2": ("middle_block.2.out_layers.3", 1, 1.0),
    "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_out.0": (
        "output_blocks.2.1.transformer_blocks.0.attn1.to_out.0", 2, 2.0),
    "up_blocks.0.upsamplers.0.conv": ("output_blocks.2.2.conv", 1, 1.0),
    "up_blocks.1.attentions.1.proj_out": ("output_blocks.4.1.proj_out", 2, 1.0),
    "conv_out": ("out.2", 1, 1.0),
}
TEXT = {
    "text_encoder": {
        "text_model.encoder.layers.0.self_attn.q_proj": (2, 2.0), "text_model.encoder.layers.1.mlp.fc1": (1, 1.0),
    },
    "text_encoder_2": {
        "text_model.encoder.layers.0.self_attn.out_proj": (2, 1.0), "text_model.encoder.layers.1.mlp.fc2": (1, 1.0),
    },
}
SAMPLERS = {
    "euler": lambda config: EulerDiscreteScheduler.from_config(config),
    "dpmpp-2m-karras": lambda config: DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
    "ddim": lambda config: DDIMScheduler.from_config(config, clip_sample=False),
}


def pipeline():
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modules(pipe):
    """(part, diffusers path, Stability path, rank, alpha, the module itself) of every update."""
    for path, (stability, rank, alpha) in UNET.items():
        yield "unet", path, stability, rank, alpha, pipe.unet.get_submodule(path)
    for part, paths in TEXT.items():
        for path, (rank, alpha) in paths.items():
            # Since transformers 5 the modules' own paths lack `text_model`, which stays in files.
            model, own = getattr(pipe, part), path
            names = dict(model.named_modules())
            own = path if path in names else path.removeprefix("text_model.")
            yield part, path, path, rank, alpha, names[own]


def random_update(module, rank, generator):
    """Values that f16 holds exactly, strong enough to be seen."""
    shape = module.weight.shape
    kernel = shape[2:]
    down = torch.randn(rank, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
    up = torch.randn(shape[0], rank, *([1] * len(kernel)), generator=generator) * 0.2
    return down.half(), up.half()


def writings(updates):
    """The same updates in the ways that tools write them: name -> (tensors, metadata)."""
    kohya, sgm, peft, old = {}, {}, {}, {}
    ranks, alphas = {}, {}
    for part, path, stability, alpha, down, up in updates:
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
        for tensors, module in ((kohya, path), (sgm, stability)):
            name = prefix + module.replace(".", "_")
            tensors |= {
                f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha),
            }
        peft |= {f"{part}.{path}.lora_A.weight": down, f"{part}.{path}.lora_B.weight": up}
        # A pattern names the end of a path: that of text modules, whose beginning differs between transformers' versions.
        end = path.removeprefix("text_model.")
        ranks.setdefault(part, {})[end] = down.shape[0]
        alphas.setdefault(part, {})[end] = alpha
        # Without alphas: all scales here are powers of two, which f16 takes without rounding.
        middle = "lora" if part == "unet" else "lora_linear_layer"
        old |= {
            f"{part}.{path}.{middle}.down.weight": down, f"{part}.{path}.{middle}.up.weight": up * (alpha / down.shape[0]),
        }
    adapter = {}
    for part in ranks:
        adapter |= {
            f"{part}.r": 1, f"{part}.lora_alpha": 1, f"{part}.rank_pattern": ranks[part],
            f"{part}.alpha_pattern": alphas[part], f"{part}.target_modules": sorted(ranks[part]),
        }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter)}
    return {
        "kohya": (kohya, {"ss_network_module": "networks.lora"}), "sgm": (sgm, {"ss_network_module": "networks.lora"}),
        "peft": (peft, metadata), "diffusers_old": (old, {"format": "pt"}),
    }


def draw(sampler, loras=(), **more):
    """Final latents of a fresh pipeline."""
    pipe = pipeline()
    pipe.scheduler = SAMPLERS[sampler](pipe.scheduler.config)
    for name, _ in loras:
        pipe.load_lora_weights(OUT / f"{name}.safetensors", adapter_name=name)
    if loras:
        pipe.set_adapters([name for name, _ in loras], adapter_weights=[weight for _, weight in loras])
    initial = torch.randn(1, 4, HEIGHT // 4, WIDTH // 4, generator=torch.Generator().manual_seed(60))
    return initial, pipe(
        PROMPT, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=initial.clone(),
        output_type="latent", **more,
    ).images


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def main():
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    pipe = pipeline()
    generator = torch.Generator().manual_seed(61)
    updates = [
        (part, path, stability, alpha, *random_update(module, rank, generator))
        for part, path, stability, rank, alpha, module in modules(pipe)
    ]
    for name, (tensors, metadata) in writings(updates).items():
        save_file(tensors, OUT / f"{name}.safetensors", metadata=metadata)
    second = {}
    for path in ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.0.resnets.0.conv1"):
        down, up = random_update(pipe.unet.get_submodule(path), 2, generator)
        second |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
    save_file(second, OUT / "second.safetensors", metadata={"format": "pt"})

    drawings = {}
    for sampler in SAMPLERS:
        initial, drawings[sampler] = draw(sampler)
        _, drawings[f"{sampler}.lora"] = draw(sampler, [("peft", 0.8)])
    _, drawings["two"] = draw("euler", [("peft", 0.8), ("second", -0.5)])
    _, drawings["conditioned"] = draw(
        "euler", negative_prompt=NEGATIVE, original_size=(96, 64), crops_coords_top_left=(4, 8), target_size=(64, 72),
    )
    print("effect of the LoRA", difference(drawings["euler.lora"], drawings["euler"]))
    print("effect of the second", difference(drawings["two"], drawings["euler.lora"]))
    for name in ("kohya", "sgm", "diffusers_old"):
        _, other = draw("euler", [(name, 0.8)])
        print(name, "against peft", difference(other, drawings["euler.lora"]))
    save_file({"initial": initial} | {name: t.float().contiguous() for name, t in drawings.items()}, OUT / "drawings.safetensors")


if __name__ == "__main__":
    main()
