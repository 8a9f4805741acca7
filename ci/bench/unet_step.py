"""Writes a random UNet of the quickstart's size and times what benches/unet_step.rs times, in PyTorch.

    python ci/bench/unet_step.py --folder /tmp/unet [--threads 2]
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

BATCH, LATENT, TOKENS, CROSS_WIDTH, POOLED_WIDTH, TIME_ID_WIDTH, RANK, REPEATS = 16, 16, 77, 96, 64, 16, 8, 5


def build() -> UNet2DConditionModel:
    """SDXL's topology with 22 attention modules."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=CROSS_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + POOLED_WIDTH,
        norm_num_groups=8,
    ).requires_grad_(False)


def best(name: str, run) -> None:
    """Prints the shortest of a few runs after a warm-up."""
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    print(f"{name}: {min(seconds) * 1e3:.1f} ms (best of {REPEATS})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    unet = build()
    unet.save_pretrained(args.folder)

    lora = []
    for name, attention in unet.named_modules():
        if name.endswith((".attn1", ".attn2")):
            for linear in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
                down = (0.1 * torch.randn(BATCH, linear.in_features, RANK)).requires_grad_()
                up = (0.1 * torch.randn(BATCH, RANK, linear.out_features)).requires_grad_()
                lora += [down, up]
                linear.register_forward_hook(lambda _, x, y, down=down, up=up: y + (x[0] @ down) @ up)

    latents = torch.randn(BATCH, 4, LATENT, LATENT)
    timesteps = torch.full((BATCH,), 500.0)
    prompt = torch.randn(BATCH, TOKENS, CROSS_WIDTH)
    added = {"text_embeds": torch.randn(BATCH, POOLED_WIDTH), "time_ids": torch.full((BATCH, 6), 64.0)}

    def predict() -> torch.Tensor:
        return unet(latents, timesteps, encoder_hidden_states=prompt, added_cond_kwargs=added).sample

    def gradients() -> None:
        torch.autograd.grad(predict().square().mean(), lora)

    with torch.no_grad():
        best("forward", predict)
    best("gradients", gradients)


if __name__ == "__main__":
    main()
