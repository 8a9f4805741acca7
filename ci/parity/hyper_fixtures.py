"""Writes crates/testing/fixtures/hypernet: a small released folder and what the reference makes of it.

    python ci/parity/hyper_fixtures.py
"""

import json
import pathlib

import torch
from safetensors.torch import save_file

from hyper_reference import HyperLora

FOLDER = pathlib.Path(__file__).parents[2] / "crates/testing/fixtures/hypernet"
# Sizes that share no factor where that can be had, so that a swapped axis cannot fit.
SIZES = {
    "id_rank": 4, "base_rank": 2, "basis": 9, "id_tokens": 3, "id_embedding_dim": 11, "clip_dim": 10,
    "resampler": {"dim": 14, "depth": 2, "heads": 3, "head_dim": 5, "ff_mult": 2},
}
PREFIX = "lora_unet_{}_transformer_blocks_0_attn{}"
SITES = {
    PREFIX.format("down_blocks_1_attentions_0", 1): {"hidden_size": 6, "cross_attention_dim": None},
    PREFIX.format("down_blocks_1_attentions_0", 2): {"hidden_size": 6, "cross_attention_dim": 7},
    PREFIX.format("mid_block_attentions_0", 2): {"hidden_size": 8, "cross_attention_dim": 7},
}


def main():
    torch.manual_seed(20250316)
    torch.set_num_threads(1)
    model = HyperLora(SITES, SIZES)
    with torch.no_grad():  # norms and biases away from 1 and 0, so that leaving one out shows
        for name, parameter in model.named_by_file():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)

    images, tokens = 2, 5
    unit = torch.nn.functional.normalize
    inputs = {
        "clip_states": torch.randn(2 * images, tokens, SIZES["clip_dim"]),
        "base_states": torch.randn(2 * images, tokens + 2, SIZES["clip_dim"]),
        "id_embedding": unit(torch.randn(2 * images, SIZES["id_embedding_dim"])),
    }
    expected = dict(inputs)

    def note(case, part, coefficients):
        """The case's coefficients and LoRA, and the gradients of a loss that weighs every number of it differently."""
        expected[f"{case}.coefficients"] = coefficients
        loss = 0
        for index, pair in enumerate(model.lora(part, coefficients)):
            for side, tensor in zip(("down", "up"), pair):
                probe = torch.randn_like(tensor)
                loss = loss + (tensor * probe).sum()
                expected[f"{case}.lora.{index}.{side}"] = tensor
                expected[f"{case}.probe.{index}.{side}"] = probe
        named = dict(model.named_by_file())
        gradients = torch.autograd.grad(loss, named.values(), allow_unused=True)
        for name, gradient in zip(named, gradients):
            if gradient is not None:
                expected[f"{case}.gradient.{name}"] = gradient

    clip, base, embedding = inputs["clip_states"], inputs["base_states"], inputs["id_embedding"]
    # One image per sample: the first two; then two images for each of two samples.
    note("id", "id", model.id_coefficients(clip[:2], embedding[:2]))
    note("id_clip_only", "id", model.id_coefficients(clip[:2]))
    note("id_two_images", "id", model.id_coefficients(clip, embedding, images))
    note("base", "base", model.base_coefficients(base[:2]))

    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "hyper_lora_modules.json").write_text(json.dumps(SITES, indent=2) + "\n")
    for stem, tensors in model.files().items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, FOLDER / f"{stem}.safetensors")
    save_file({key: value.detach().contiguous() for key, value in expected.items()}, FOLDER / "expected.safetensors")
    print(f"wrote {FOLDER}: {sum(f.stat().st_size for f in FOLDER.iterdir()) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
