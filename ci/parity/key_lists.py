"""Writes the names and shapes of every tensor of SDXL-Base-1.0 and CLIP ViT-L/14, in both namings.

    python ci/parity/key_lists.py --out crates/testing/fixtures/key_lists.json.gz

The lists come from diffusers and transformers with the real configs; the Stability naming is proven by running diffusers'
own conversions on it with tensors that carry a number of their own: every tensor must arrive under its name. With each
Stability name comes `from`, what diffusers calls the tensor, or the thirds of its rows.
"""

import argparse
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from stability_names import CONFIGS, PREFIXES, diffusers_shapes, meta_models, stability


def marked(shape: list[int], numbers: list[int]) -> torch.Tensor:
    """A tensor that takes next to no memory: equal parts of its rows hold one number each."""
    rows = torch.tensor(numbers, dtype=torch.int16).repeat_interleave(shape[0] // len(numbers))
    return rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def prove(shapes: dict[str, dict[str, list[int]]], single: dict[str, tuple[list[int], list]]) -> None:
    """diffusers' conversion of the Stability list gives the diffusers list."""
    number = {(part, name): index for index, (part, name) in enumerate((p, n) for p in PREFIXES for n in shapes[p])}
    checkpoint = {name: marked(shape, [number[source] for source in sources]) for name, (shape, sources) in single.items()}
    read = {part: json.loads((CONFIGS / f"{part}.json").read_text()) for part in ("unet", "vae")}
    text_2 = {name: tensor for name, tensor in checkpoint.items() if name.startswith(PREFIXES["text_encoder_2"])}
    width = SimpleNamespace(config=SimpleNamespace(hidden_size=1280))
    converted = {
        "unet": convert_ldm_unet_checkpoint(dict(checkpoint), read["unet"]),
        "vae": convert_ldm_vae_checkpoint(dict(checkpoint), read["vae"]),
        "text_encoder": convert_ldm_clip_checkpoint(dict(checkpoint)),
        "text_encoder_2": convert_open_clip_checkpoint(width, text_2, prefix=PREFIXES["text_encoder_2"]),
    }
    for part, tensors in converted.items():
        assert set(tensors) == set(shapes[part]), (part, sorted(set(tensors) ^ set(shapes[part]))[:5])
        for name, tensor in tensors.items():
            assert list(tensor.shape) == shapes[part][name], (part, name, tensor.shape, shapes[part][name])
            values = set(tensor.reshape(tensor.shape[0], -1)[:, 0].tolist())
            assert values == {number[part, name]}, (part, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    shapes = diffusers_shapes(meta_models())
    single = stability(shapes)
    prove(shapes, single)
    named = {
        name: {"shape": shape, "from": [source for _, source in sources]} for name, (shape, sources) in single.items()
    }
    lists = {"diffusers": shapes, "stability": named}
    text = json.dumps(lists, separators=(",", ":"), sort_keys=True)
    out.write_bytes(gzip.compress(text.encode(), mtime=0))
    print({part: len(names) for part, names in shapes.items()}, len(single), out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
