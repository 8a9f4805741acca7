"""Writes random weights of SDXL's full shape, tensor by tensor: what loads them needs memory, this script does not.

    python ci/parity/random_sdxl.py --out FOLDER [--layout diffusers|single] [--parts all|PART ...] [--dtype fp16|bf16|f32]

Layout `diffusers` is a pipeline folder whose larger parts are sharded with an index; `single` is one file sdxl.safetensors
in Stability naming. A tensor's values depend on its diffusers name and the seed alone, so both layouts hold the same model.
Weights are normal with deviation 1/sqrt(fan in), so that activations stay finite at any depth; norms scatter around one
and biases around zero, so that none can stand for another. The UNet comes alone unless other parts are named; with
`--parts all` come the VAE, both text encoders, and (in the folder) CLIP ViT-L/14 with its image processor, the tokenizers
and the scheduler.
"""

import argparse
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from clip_vocab import END, write_tokenizer
from stability_names import CONFIGS, diffusers_shapes, meta_models, stability

DTYPES = {"fp16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16"), "f32": (torch.float32, "F32")}
SHARD_BYTES = 5 << 30
PARTS = ["unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"]
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
PREPROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}


def values(part: str, name: str, shape: list[int], seed: int) -> torch.Tensor:
    """The tensor of this name, f32."""
    norm = any(word in name for word in ("norm", "ln_", "layrnorm"))
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(f"{part}.{name}".encode())]))
    normal = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    if name.endswith("bias"):
        return normal.mul_(0.1)
    if norm:
        return normal.mul_(0.1).add_(1)
    if "embedding" in name and "patch" not in name and not name.startswith(("time_", "add_")):
        return normal.mul_(0.1)
    fan_in = int(np.prod(shape[1:])) or 1
    return normal.mul_(fan_in**-0.5)


def write(path: Path, entries: dict[str, tuple[list[int], list]], dtype: str, seed: int, shapes: dict) -> None:
    """A safetensors file whose tensors are made one after the other."""
    torch_type, tag = DTYPES[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, _) in entries.items():
        start, end = end, end + int(np.prod(shape)) * torch_type.itemsize
        header[name] = {"dtype": tag, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (shape, sources) in entries.items():
            rows = [values(part, source, shapes[part][source], seed) for part, source in sources]
            tensor = torch.cat(rows) if len(rows) > 1 else rows[0]
            # The only matrix whose single-file form is its transpose.
            tensor = tensor.T if name.endswith(".text_projection") else tensor
            tensor.reshape(shape).to(torch_type).contiguous().view(torch.uint8).numpy().tofile(file)


def write_folder(out: Path, parts: list[str], shapes: dict, dtype: str, seed: int) -> None:
    for part in parts:
        folder = out / part
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(CONFIGS / f"{part}.json", folder / "config.json")
        shards, size = [{}], 0
        for name, shape in shapes[part].items():
            bytes_here = int(np.prod(shape)) * DTYPES[dtype][0].itemsize
            if size and size + bytes_here > SHARD_BYTES // 4:
                shards, size = [*shards, {}], 0
            shards[-1][name] = (shape, [(part, name)])
            size += bytes_here
        stem = STEMS.get(part, "model")
        if len(shards) == 1:
            write(folder / f"{stem}.safetensors", shards[0], dtype, seed, shapes)
            continue
        index = {"metadata": {}, "weight_map": {}}
        for number, shard in enumerate(shards):
            name = f"{stem}-{number + 1:05}-of-{len(shards):05}.safetensors"
            index["weight_map"].update(dict.fromkeys(shard, name))
            write(folder / name, shard, dtype, seed, shapes)
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layout", choices=["diffusers", "single"], default="diffusers")
    parser.add_argument("--parts", nargs="+", choices=["all", *PARTS], default=["unet"])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, dtype, seed = arguments.out, arguments.dtype, arguments.seed
    out.mkdir(parents=True, exist_ok=True)
    shapes = diffusers_shapes(meta_models())
    parts = PARTS if "all" in arguments.parts else arguments.parts
    if arguments.layout == "single":
        single = {name: entry for name, entry in stability(shapes).items() if entry[1][0][0] in parts}
        write(out / "sdxl.safetensors", dict(sorted(single.items())), dtype, seed, shapes)
        return
    write_folder(out, parts, shapes, dtype, seed)
    if "image_encoder" in parts:
        write_json(out / "feature_extractor/preprocessor_config.json", PREPROCESSOR)
    if "all" not in arguments.parts:
        return
    write_json(out / "scheduler/scheduler_config.json", SCHEDULER)
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    write_json(out / "model_index.json", index)
    write_tokenizer(out / "tokenizer", END)
    write_tokenizer(out / "tokenizer_2", "!")


if __name__ == "__main__":
    main()
