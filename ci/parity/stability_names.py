"""SDXL's tensors by the names of diffusers and by those of single-file checkpoints (Stability naming)."""

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

CONFIGS = Path(__file__).parents[2] / "crates/sdxl/src/source/configs"
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def meta_models(configs: Path = CONFIGS) -> dict[str, torch.nn.Module]:
    """The parts of SDXL without memory for their weights; `configs` holds the config of each part as PART.json."""
    read = {path.stem: json.loads(path.read_text()) for path in configs.glob("*.json")}
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(read["unet"]),
            "vae": AutoencoderKL.from_config(read["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**read["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**read["text_encoder_2"])),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**read["image_encoder"])),
        }


def diffusers_shapes(models: dict[str, torch.nn.Module]) -> dict[str, dict[str, list[int]]]:
    """Part -> name -> shape, under the names of published files: recent transformers leave `text_model.` out."""
    shapes = {}
    for part, model in models.items():
        named = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if "position_ids" not in name}
        if part == "text_encoder" and not any(name.startswith("text_model.") for name in named):
            named = {f"text_model.{name}": shape for name, shape in named.items()}
        shapes[part] = named
    return shapes


def renamed(name: str, table: dict[str, str]) -> str:
    """`name` with its first words replaced."""
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def unet_name(name: str, layers: int, attending: set[int]) -> str:
    """`layers` per block; `attending` are the up blocks with attention, whose upsampler comes third instead of second."""
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        way, kind, rest = match[1], match[3], match[5]
        index = int(match[2]) * (layers + 1) + int(match[4]) + (way == "down")
        stage, rest = ("0", renamed(rest, RESNET)) if kind == "resnets" else ("1", rest)
        return f"{'input' if way == 'down' else 'output'}_blocks.{index}.{stage}.{rest}"
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
        block = int(match[1])
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if block in attending else 1}.conv.{match[2]}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        kind, index, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{2 * index}.{renamed(rest, RESNET)}" if kind == "resnets" else f"middle_block.1.{rest}"
    return renamed(name, UNET_ENDS)


def vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{levels - 1 - int(match[1])}.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
        name = name.replace("to_out.0", "proj_out").replace("to_", "")
    return name


def open_clip_name(name: str) -> str:
    if match := re.match(r"text_model\.encoder\.layers\.(\d+)\.(.*)", name):
        return f"transformer.resblocks.{match[1]}.{renamed(match[2], OPEN_CLIP_LAYER)}"
    return renamed(name, OPEN_CLIP)


def stability(shapes: dict[str, dict[str, list[int]]], configs: Path = CONFIGS) -> dict[str, tuple[list[int], list]]:
    """Stability name -> (shape, sources); a source is (part, diffusers name). Three sources are stacked rows.

    Attention in the VAE is a 1x1 convolution there, and the text projection is the transpose.
    """
    unet = json.loads((configs / "unet.json").read_text())
    attending = {block for block, kind in enumerate(unet["up_block_types"]) if kind.startswith("CrossAttn")}
    levels = len(json.loads((configs / "vae.json").read_text())["block_out_channels"])
    found: dict[str, tuple[list[int], list]] = {}
    for part, prefix in PREFIXES.items():
        for name, shape in shapes[part].items():
            new, new_shape = name, list(shape)
            if part == "unet":
                new = unet_name(name, unet["layers_per_block"], attending)
            elif part == "vae":
                new = vae_name(name, levels)
                if "attn_1" in new and new.endswith("weight") and len(shape) == 2:
                    new_shape = [*shape, 1, 1]
            elif part == "text_encoder_2":
                if name == "text_projection.weight":
                    new, new_shape = "text_projection", shape[::-1]
                elif match := re.match(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
                    fused = prefix + open_clip_name(f"{match[1]}.attn.in_proj_{match[3]}")
                    rows, sources = found.get(fused, ([0], []))
                    found[fused] = ([rows[0] + shape[0], *shape[1:]], sources + [(part, match[2], name)])
                    continue
                else:
                    new = open_clip_name(name)
            found[prefix + new] = (new_shape, [(part, name)])
    for name, (shape, sources) in found.items():
        if len(sources) == 3:
            order = sorted(sources, key=lambda source: "qkv".index(source[1]))
            found[name] = (shape, [(part, source) for part, _, source in order])
    return found
