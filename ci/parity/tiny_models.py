"""The parts of the tiny SDXL pipeline: SDXL's own classes and topology with small numbers.

The text encoders and the image encoder stay random: they only have to tell captions, respectively faces, apart. The VAE
and the UNet are trained by tiny_base.py.
"""

import math

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from clip_vocab import END, START, vocabulary
from orl import IMAGE_SIZE

TEXT_WIDTHS = (32, 64)
POOLED_WIDTH = 64
LATENT_SIZE = IMAGE_SIZE // 4


def spread(model: torch.nn.Module, seed: int) -> None:
    """Random weights large enough that different inputs stay different through every layer.

    The usual initialisation (std 0.02) is made to be trained: without training it answers nearly the same to every input.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "norm" in name or "layrnorm" in name:
            continue
        if name.endswith("bias"):
            weight.data.zero_()
        elif "position_embedding" in name:
            weight.data.normal_(0.0, 0.3, generator=generator)
        elif "embedding" in name and weight.dim() <= 2:
            weight.data.normal_(0.0, 1.0, generator=generator)
        else:
            weight.data.normal_(0.0, 1.0 / math.sqrt(weight[0].numel()), generator=generator)


def text_encoders(seed: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both random text encoders; the second one is wider, uses exact GELU and projects its pooled state, as in SDXL."""
    vocab = vocabulary()
    common = {
        "vocab_size": len(vocab),
        "max_position_embeddings": 77,
        "num_hidden_layers": 3,
        "bos_token_id": vocab[START],
        "eos_token_id": vocab[END],
        "pad_token_id": vocab[END],
    }
    first = CLIPTextConfig(
        hidden_size=TEXT_WIDTHS[0], intermediate_size=64, num_attention_heads=2, hidden_act="quick_gelu", **common
    )
    second = CLIPTextConfig(
        hidden_size=TEXT_WIDTHS[1],
        intermediate_size=128,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=POOLED_WIDTH,
        **common,
    )
    models = CLIPTextModel(first), CLIPTextModelWithProjection(second)
    for offset, model in enumerate(models):
        spread(model, seed + offset)
        model.eval().requires_grad_(False)
    return models


def image_encoder(seed: int) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """A random CLIP vision transformer over 8 px patches and its preprocessor."""
    config = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=POOLED_WIDTH,
        hidden_act="quick_gelu",
    )
    model = CLIPVisionModelWithProjection(config)
    spread(model, seed)
    model.eval().requires_grad_(False)
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return model, processor


def vae(seed: int) -> AutoencoderKL:
    """Autoencoder with three levels: 64 px images, 16 x 16 latents of 4 channels."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def unet(seed: int) -> UNet2DConditionModel:
    """SDXL's UNet topology with 22 attention modules: 4 + 4 down, 2 mid, 6 + 6 up."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(32, 48, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 3, 4),  # SDXL's config gives the number of heads here, too
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + POOLED_WIDTH,
        norm_num_groups=8,
    )


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise schedule."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
