"""Writes the UNet parity fixture: a narrow random SDXL UNet, and what diffusers computes with it.

    python ci/parity/unet_fixtures.py --out crates/testing/fixtures/unet

config.json, diffusion_pytorch_model.safetensors   the UNet, as diffusers saves it, in f16
even.safetensors, odd.safetensors                  for latents 8x8 and 7x10: inputs, per-sample LoRA weights
    (`lora.<attention>.<linear>.down|up`), predictions without and with them, the loss against `target`, and its
    gradients (`grad.<attention>.<linear>.down|up`), all in f32
"""

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

LINEARS = ("to_q", "to_k", "to_v", "to_out.0")
BATCH, TOKENS, CROSS_WIDTH, POOLED_WIDTH, TIME_ID_WIDTH, RANK = 3, 7, 24, 10, 8, 2


def build() -> UNet2DConditionModel:
    """Weights that f16 holds exactly, so that both sides compute with the same numbers."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 12, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=CROSS_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + POOLED_WIDTH,
        norm_num_groups=4,
    )
    for parameter in unet.parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide a mistake
            parameter.data += 0.2 * torch.randn_like(parameter)
        parameter.data = parameter.data.half().float()
    return unet.requires_grad_(False).eval()


def case(unet: UNet2DConditionModel, height: int, width: int) -> dict[str, torch.Tensor]:
    """Inputs, predictions, loss and gradients for one size of latents."""
    inputs = {
        "latents": torch.randn(BATCH, 4, height, width),
        "timesteps": torch.tensor([1.0, 500.0, 999.0]),
        "prompt_embeds": torch.randn(BATCH, TOKENS, CROSS_WIDTH),
        "pooled": torch.randn(BATCH, POOLED_WIDTH),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [100, 80, 5, 7, 64, 64], [1024, 768, 0, 32, 1024, 1024]]),
        "target": torch.randn(BATCH, 4, height, width),
    }

    def predict() -> torch.Tensor:
        return unet(
            inputs["latents"],
            inputs["timesteps"],
            encoder_hidden_states=inputs["prompt_embeds"],
            added_cond_kwargs={"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]},
        ).sample

    with torch.no_grad():
        plain = predict()

    lora, hooks = {}, []
    for name, attention in unet.named_modules():
        if not name.endswith((".attn1", ".attn2")):
            continue
        for linear_name in LINEARS:
            linear = attention.get_submodule(linear_name)
            down = (0.3 * torch.randn(BATCH, linear.in_features, RANK)).requires_grad_()
            up = (0.3 * torch.randn(BATCH, RANK, linear.out_features)).requires_grad_()
            lora[f"{name}.{linear_name}.down"], lora[f"{name}.{linear_name}.up"] = down, up
            hooks.append(
                linear.register_forward_hook(lambda _, args, y, down=down, up=up: y + (args[0] @ down) @ up)
            )
    prediction = predict()
    loss = (prediction - inputs["target"]).square().mean()
    loss.backward()
    for hook in hooks:
        hook.remove()

    results = {"prediction_plain": plain, "prediction_lora": prediction.detach(), "loss": loss.detach().reshape(1)}
    results |= {f"lora.{name}": tensor.detach() for name, tensor in lora.items()}
    results |= {f"grad.{name}": tensor.grad for name, tensor in lora.items()}
    return inputs | results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.manual_seed(0)
    torch.set_num_threads(1)
    unet = build()
    for name, size in {"even": (8, 8), "odd": (7, 10)}.items():
        tensors = case(unet, *size)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / f"{name}.safetensors")
    unet.half().save_pretrained(out)


if __name__ == "__main__":
    main()
