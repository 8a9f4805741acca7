"""Checks a LoRA file of ours in diffusers: its effect on a UNet must be what the Rust forward says.

    python ci/parity/check_lora.py BASE LORA FORWARD.safetensors

BASE is a pipeline folder in diffusers layout, LORA a kohya-style file for it. FORWARD holds what the Rust UNet was given,
`latents` [B,4,h,w], `timestep` [B], `prompt_embeds` [B,T,C], `pooled` [B,P], `time_ids` [B,6], and what it gave: `output`
with the LoRA and, optionally, `output_without` (else diffusers' own output without it is taken). The effect is the
difference of the two outputs; its relative error must be at most 1e-3. `cargo run -p hyperlora-tools --bin lora_forward -- BASE LORA
FORWARD.safetensors` writes FORWARD.
"""

import argparse
import sys

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

TOLERANCE = 1e-3


def forward(unet, given):
    """The UNet's noise prediction for the given inputs."""
    conditions = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    with torch.no_grad():
        return unet(given["latents"], given["timestep"], given["prompt_embeds"], added_cond_kwargs=conditions).sample


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("base")
    arguments.add_argument("lora")
    arguments.add_argument("forward")
    arguments = arguments.parse_args()
    torch.set_num_threads(1)

    given = {name: tensor.float() for name, tensor in load_file(arguments.forward).items()}
    unet = UNet2DConditionModel.from_pretrained(arguments.base, subfolder="unet", torch_dtype=torch.float32).eval()
    without = forward(unet, given)

    # Only the UNet takes part: the pipeline is there for its LoRA loader.
    others = dict.fromkeys(["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    pipeline = StableDiffusionXLPipeline(unet=unet, scheduler=EulerDiscreteScheduler(), **others)
    pipeline.load_lora_weights(arguments.lora)
    updated = [name for name, _ in unet.named_modules() if name.endswith("lora_A") and ".attn" in name]
    expected = 4 * sum(1 for name, _ in unet.named_modules() if name.endswith((".attn1", ".attn2")))
    if len(updated) != expected:
        sys.exit(f"{arguments.lora}: diffusers took {len(updated)} of the UNet's {expected} attention linears")

    effect = forward(unet, given) - without
    claimed = given["output"] - given.get("output_without", without)
    if effect.norm() == 0:
        sys.exit(f"{arguments.lora}: no effect at all: nothing is checked")
    error = ((claimed - effect).norm() / effect.norm()).item()
    share = (effect.norm() / without.norm()).item()
    print(f"effect {share:.3e} of the output over {len(updated)} linears, relative error {error:.2e}")
    if not error <= TOLERANCE:
        sys.exit(f"{arguments.lora}: relative error {error:.2e} of the effect, at most {TOLERANCE:g} is allowed")


if __name__ == "__main__":
    main()
