"""Writes the key and shape fixture of an untrained UNet with SDXL's 140 attention modules and small widths.

    python ci/parity/unet_140.py --out crates/testing/fixtures/unet_140

config.json  the UNet's config as diffusers writes it
keys.json    every weight: name -> shape, in diffusers' order
attn.json    every attention module: kohya-style prefix -> hidden size and cross-attention width, in execution order
             (down, mid, up), as hyper_lora_modules.json lists them
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

CROSS_ATTENTION_WIDTH = 96


def build() -> UNet2DConditionModel:
    """SDXL's topology: transformer layers (1, 2, 10), here with 7.75 M parameters; no memory is spent on weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(2, 4, 4),
            cross_attention_dim=CROSS_ATTENTION_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=6 * 16 + 64,
            norm_num_groups=8,
        )


def attentions(unet: UNet2DConditionModel) -> dict[str, dict[str, int | None]]:
    """Attention modules in execution order; an attn1 attends to its own hidden states, so its cross width is null."""
    order = ("down_blocks", "mid_block", "up_blocks")
    modules = [(name, module) for name, module in unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    modules.sort(key=lambda item: order.index(item[0].split(".")[0]))  # stable: keeps the order inside each part
    return {
        "lora_unet_" + name.replace(".", "_"): {
            "hidden_size": module.to_q.in_features,
            "cross_attention_dim": module.to_k.in_features if name.endswith(".attn2") else None,
        }
        for name, module in modules
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    unet = build()
    unet.save_config(out)
    found = attentions(unet)
    assert len(found) == 140, len(found)
    keys = {name: list(weight.shape) for name, weight in unet.state_dict().items()}
    for name, content in (("keys", keys), ("attn", found)):
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        (out / f"{name}.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
