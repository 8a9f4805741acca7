"""Counts floating-point operations with torch's FlopCounterMode, for the tests of `hyperlora plan`.

    python ci/parity/plan_flops.py --out crates/testing/fixtures/plan/flops.json

Models are built by diffusers and transformers from the configs in this repository on the meta device: nothing is computed
and no memory is spent. `forward` is one image or prompt. A UNet has a LoRA of `RANK` in every attention; its `backward` gives the
gradients of latents and LoRA, weights frozen. CLIP towers end before their last layer where the program does not read it. `parameters` are those of the whole model.
Of the hypernetwork (released sizes with a Base-LoRA, SDXL's 140 attention modules) each stage's forward is counted, and the
backward pass of all that its graph reaches.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from hyper_reference import HyperLora
from unet_140 import attentions

ROOT = Path(__file__).resolve().parents[2]
SDXL = ROOT / "crates/sdxl/src/source/configs"
SMALL = ROOT / "experiments/quickstart/base"
PROMPT_TOKENS = 77
RANK = 12


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class LoraLinear(torch.nn.Module):
    """A frozen linear with a trainable low-rank update."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = torch.nn.Parameter(torch.empty(linear.in_features, RANK))
        self.up = torch.nn.Parameter(torch.empty(RANK, linear.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.down @ self.up


def add_loras(model: UNet2DConditionModel) -> None:
    for name, module in model.named_modules():
        if name.endswith((".attn1", ".attn2")):
            module.to_q, module.to_k, module.to_v = map(LoraLinear, (module.to_q, module.to_k, module.to_v))
            module.to_out[0] = LoraLinear(module.to_out[0])


def unet(config: dict, height: int, width: int) -> dict[str, int]:
    model = UNet2DConditionModel.from_config(config).requires_grad_(False)
    latents = torch.empty(1, model.config.in_channels, height, width, requires_grad=True)
    time_ids = 6 * model.config.addition_time_embed_dim
    added = {
        "text_embeds": torch.empty(1, model.config.projection_class_embeddings_input_dim - time_ids),
        "time_ids": torch.empty(1, 6),
    }
    prompt = torch.empty(1, PROMPT_TOKENS, model.config.cross_attention_dim)
    made = {}

    def forward() -> None:
        made["loss"] = model(latents, torch.ones(1), prompt, added_cond_kwargs=added).sample.sum()

    count, bare = parameters(model), counted(forward)
    add_loras(model)
    return {
        "parameters": count,
        "forward": bare,
        "forward with LoRA": counted(forward),
        "backward": counted(lambda: made["loss"].backward()),
    }


def vae(config: dict, side: int) -> dict[str, int]:
    model = AutoencoderKL.from_config(config).requires_grad_(False)
    images = torch.empty(1, 3, side, side)
    return {"parameters": parameters(model), "forward": counted(lambda: model.encode(images))}


def text(config: dict, projected: bool) -> dict[str, int]:
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    whole = kind(CLIPTextConfig(**config))
    layers = config["num_hidden_layers"] - (0 if projected else 1)
    model = kind(CLIPTextConfig(**{**config, "num_hidden_layers": layers, "_attn_implementation": "eager"}))
    ids = torch.zeros(1, PROMPT_TOKENS, dtype=torch.long)
    return {"parameters": parameters(whole), "forward": counted(lambda: model(ids))}


def vision(config: dict) -> dict[str, int]:
    whole = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    layers = config["num_hidden_layers"] - 1
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**{**config, "num_hidden_layers": layers, "_attn_implementation": "eager"})
    ).vision_model
    pixels = torch.empty(1, 3, config["image_size"], config["image_size"])
    projection = parameters(whole.visual_projection)
    return {"parameters": parameters(whole) - projection, "forward": counted(lambda: model(pixels))}


def hypernetwork(unet_config: dict) -> dict[str, dict[str, int]]:
    resampler = {"dim": 1024, "depth": 4, "heads": 12, "head_dim": 64, "ff_mult": 4}
    sizes = {"id_rank": 8, "base_rank": 4, "basis": 128, "id_tokens": 16, "id_embedding_dim": 512, "clip_dim": 1024}
    model = HyperLora(attentions(UNet2DConditionModel.from_config(unet_config)), {**sizes, "resampler": resampler})
    states, embedding = torch.empty(1, 257, 1024), torch.empty(1, 512)
    coefficients = {
        "base": lambda: model.base_coefficients(states),
        "id_clip": lambda: model.id_coefficients(states),
        "id_embedding": lambda: model.id_coefficients(states, embedding),
    }
    made = {}

    def forward(stage: str) -> None:
        pairs = model.lora("base" if stage == "base" else "id", coefficients[stage]())
        made["sum"] = sum(down.sum() + up.sum() for down, up in pairs)

    return {
        stage: {"forward": counted(lambda: forward(stage)), "backward": counted(lambda: made["sum"].backward())}
        for stage in coefficients
    }


def base(config, latents: list[tuple[int, int]], side: int) -> dict[str, dict[str, int]]:
    """The models of a base, whose `config(name)` is given, for these sizes of latents and images of `side` pixels."""
    return {
        **{f"unet {height}x{width}": unet(config("unet"), height, width) for height, width in latents},
        f"vae {side}": vae(config("vae"), side),
        "text_encoder": text(config("text_encoder"), False),
        "text_encoder_2": text(config("text_encoder_2"), True),
        "image_encoder": vision(config("image_encoder")),
    }


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_default_device("meta")
    found = {
        "hypernetwork": hypernetwork(read(SDXL / "unet.json")),
        "sdxl": base(lambda name: read(SDXL / f"{name}.json"), [(128, 128), (64, 64)], 1024),
        "small": base(lambda name: read(SMALL / name / "config.json"), [(8, 8), (9, 7)], 64),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
