"""Holds `hyperlora generate` and `hyperlora export` to the PyTorch reference at the size of the released weights.

    python ci/parity/check_released.py FOLDER [--hyperlora target/release/hyperlora]

Writes a HyperLoRA folder of random f16 values for SDXL's 140 attention modules into FOLDER (3.1 GB; 6.2 GB while the
round trip is checked; about 13 GB of memory), lets the program generate a LoRA from random features of two images, and
compares it with the reference's: the largest error of a matrix relative to its largest value must be at most 1e-4. Then
exports the folder as f16: every tensor must keep its bits. Prints errors, times and peak memory; removes what it made.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hyper_reference import HyperLora

TOLERANCE = 1e-4
IMAGES = 2
SIZES = {
    "id_rank": 8, "base_rank": 0, "basis": 128, "id_tokens": 16, "id_embedding_dim": 512, "clip_dim": 1024,
    "resampler": {"dim": 1024, "depth": 4, "heads": 12, "head_dim": 64, "ff_mult": 4},
}
UNET_CONFIG = pathlib.Path(__file__).parents[2] / "crates/sdxl/src/source/configs/unet.json"
FILES = ("hyper_lora_modules", "resampler", "id_projector")


def attention_sites():
    """SDXL's attention modules in its module order, as the released JSON describes them."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(UNET_CONFIG.read_text()))
    sites = {}
    for name, module in unet.named_modules():
        if name.endswith((".attn1", ".attn2")):
            hidden, context = module.to_q.in_features, module.to_k.in_features
            cross = context if name.endswith(".attn2") else None
            sites[f"lora_unet_{name.replace('.', '_')}"] = {"hidden_size": hidden, "cross_attention_dim": cross}
    return sites


@torch.no_grad()
def make(folder):
    """Writes the folder, the features and what the reference makes of them."""
    torch.manual_seed(20250316)
    sites = attention_sites()
    model = HyperLora(sites, SIZES)
    for name, parameter in model.named_by_file():
        if parameter.dim() == 1:  # norms and biases away from 1 and 0, so that leaving one out shows
            parameter += 0.3 * torch.randn_like(parameter)
        parameter.copy_(parameter.half())
    bases = sum(basis.numel() for basis in model.bases.values())
    print(f"{len(sites)} modules, {bases / 1e9:.3f} B parameters in the bases")

    features = {
        "clip_hidden_states": torch.randn(IMAGES, 257, SIZES["clip_dim"]),
        "id_embedding": torch.nn.functional.normalize(torch.randn(IMAGES, SIZES["id_embedding_dim"])),
    }
    start = time.time()
    coefficients = model.id_coefficients(features["clip_hidden_states"], features["id_embedding"], IMAGES)
    pairs = model.lora("id", coefficients)
    print(f"reference: {time.time() - start:.1f} s")
    names = [f"{prefix}_{name}" for prefix in sites for name in ("to_q", "to_k", "to_v", "to_out_0")]
    expected = {}
    for name, (down, up) in zip(names, pairs):
        expected[f"{name}.lora_down.weight"] = down[0].T.contiguous()
        expected[f"{name}.lora_up.weight"] = up[0].T.contiguous()
    save_file(features, folder / "features.safetensors")
    save_file(expected, folder / "expected.safetensors")

    (folder / "released").mkdir()
    (folder / "released/hyper_lora_modules.json").write_text(json.dumps(sites, indent=2))
    for stem, tensors in model.files().items():
        halves = {key: value.half().contiguous() for key, value in tensors.items()}
        save_file(halves, folder / f"released/{stem}.safetensors")
    print(f"reference: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def run(*command):
    """Runs a command; prints its time and peak memory."""
    start = time.time()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    print(f"{command[1]}: {time.time() - start:.1f} s, peak {usage.ru_maxrss / 2**20:.2f} GiB")
    if code:
        sys.exit(f"{' '.join(map(str, command))} ended with {code}")


def compare(folder):
    """The errors of the generated LoRA."""
    expected, found = load_file(folder / "expected.safetensors"), load_file(folder / "lora.safetensors")
    if set(expected) != {name for name in found if not name.endswith(".alpha")}:
        sys.exit("the LoRA file has other tensors than the reference")
    ranks = {name: found[name.replace("lora_down.weight", "alpha")].item() / value.shape[0]
             for name, value in expected.items() if name.endswith("lora_down.weight")}
    if set(ranks.values()) != {1.0}:
        sys.exit(f"alpha / rank is {set(ranks.values())}, 1 was expected: the scale is in the weights")
    worst, name = max(((found[name] - value).abs().max().item() / value.abs().max().item(), name)
                      for name, value in expected.items())
    square = sum((found[name] - value).square().sum().item() for name, value in expected.items())
    norm = sum(value.square().sum().item() for value in expected.values())
    print(f"largest error {worst:.2e} of a matrix's largest value ({name}), overall {(square / norm) ** 0.5:.2e}")
    if not worst <= TOLERANCE:
        sys.exit(f"at most {TOLERANCE:g} is allowed")


def compare_bits(first, second):
    """Every tensor of two folders, bit for bit."""
    count = 0
    for stem in FILES:
        with safe_open(first / f"{stem}.safetensors", "pt") as a, safe_open(second / f"{stem}.safetensors", "pt") as b:
            if sorted(a.keys()) != sorted(b.keys()):
                sys.exit(f"{stem}: other keys")
            for key in a.keys():
                x, y = a.get_tensor(key), b.get_tensor(key)
                if x.dtype != y.dtype or not torch.equal(x.view(torch.int16), y.view(torch.int16)):
                    sys.exit(f"{stem}: {key} is not what it was")
                count += 1
    one, other = ((folder / "hyper_lora_modules.json").read_text() for folder in (first, second))
    if list(json.loads(one).items()) != list(json.loads(other).items()):
        sys.exit("hyper_lora_modules.json is not what it was")
    print(f"{count} tensors and the JSON came back bit for bit")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=pathlib.Path)
    arguments.add_argument("--hyperlora", default="target/release/hyperlora")
    arguments.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    folder, program = arguments.folder, arguments.hyperlora
    if arguments.make:
        make(folder)
        return
    folder.mkdir(parents=True)
    try:
        run(sys.executable, __file__, str(folder), "--make")  # its memory is free when the program runs
        released = folder / "released"
        run(program, "generate", "--checkpoint", released, "--features", folder / "features.safetensors",
            "--dtype", "f32", "-o", folder / "lora.safetensors")
        compare(folder)
        run(program, "export", "--format", "comfyui", "--checkpoint", released, "--dtype", "f16", "-o", folder / "again")
        compare_bits(released, folder / "again")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
