"""Compares the parts of an SDXL of full size with diffusers and transformers, one process and one part at a time.

    python ci/parity/random_sdxl.py --out BASE --parts all
    cargo build -p hyperlora-tools --bin full_size_parity
    python ci/parity/full_size.py --base BASE --out FOLDER [--source FILE] [--dtype f32|bf16] [PART ...]

BASE is a folder in diffusers layout, with image_encoder and feature_extractor where those are compared; FILE is the same
model as a single file, for our side to load instead. FOLDER keeps inputs and results, PART.DTYPE.safetensors: what PyTorch
computed is not computed again. Both sides widen the weights of the file to `--dtype`. Prints a line per result and fails
where one in f32 is off by more than 1e-4 (largest difference over the largest magnitude).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

PARTS = ["unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"]
TOLERANCE = 1e-4
PROGRAM = Path(__file__).parents[2] / "target/debug/full_size_parity"
# Token ids of CLIP's vocabulary.
WORDS, START, END = 49406, 49406, 49407
EXPECTED = "expected."


def prompts(part: str, draw: np.random.Generator) -> np.ndarray:
    """Prompts of 1, 36 and 75 words; the second encoder's padding is 0. [3, 77], as f32: those hold every id."""
    ids = np.full((3, 77), 0 if part == "text_encoder_2" else END)
    for row, length in enumerate((1, 36, 75)):
        ids[row, : length + 2] = [START, *draw.integers(1, WORDS, length), END]
    return ids.astype(np.float32)


def inputs(part: str) -> dict[str, np.ndarray]:
    """Always the same numbers."""
    draw = np.random.default_rng(PARTS.index(part))

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, dtype=np.float32)

    if part == "unet":
        return {
            "latents": normal(1, 4, 32, 32),
            "timesteps": np.array([431], np.float32),
            "prompt_embeds": normal(1, 77, 2048),
            "pooled": normal(1, 1280),
            "time_ids": np.array([[300, 256, 5, 0, 256, 256]], np.float32),
        }
    if part == "vae":
        return {"images": normal(1, 3, 256, 256).clip(-1, 1), "latents": normal(1, 4, 32, 32)}
    if part.startswith("text"):
        return {"ids": prompts(part, draw)}
    # Smooth, and with edges: [height, width, 3], levels 0 to 255.
    y, x = np.mgrid[0:301, 0:447].astype(np.float64)
    picture = [127 + 120 * np.sin(x / 9) * np.cos(y / 13), 255 * ((x // 17 + y // 11) % 2), (x * y / 40) % 256]
    return {"picture": np.stack(picture, -1).round().clip(0, 255).astype(np.float32)}


def with_torch(part: str, base: Path, dtype: str, path: Path) -> None:
    """Writes inputs and what diffusers or transformers computes."""
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        "image_encoder": transformers.CLIPVisionModelWithProjection,
    }
    start = time.monotonic()
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model, info = classes[part].from_pretrained(base / part, dtype=kind, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"]), info
    assert next(model.parameters()).dtype == kind
    model.eval()
    loaded = time.monotonic()
    case = inputs(part)
    given = {name: torch.from_numpy(array) for name, array in case.items()}
    with torch.no_grad():
        if part == "unet":
            floats = {name: tensor.to(kind) for name, tensor in given.items()}
            # Time ids stay f32, as the pipeline keeps sizes exact until their sinusoids.
            added = {"text_embeds": floats["pooled"], "time_ids": given["time_ids"]}
            states = floats["prompt_embeds"]
            found = {"prediction": model(floats["latents"], given["timesteps"], states, added_cond_kwargs=added).sample}
        elif part == "vae":
            posterior = model.encode(given["images"]).latent_dist
            decoded = model.decode(given["latents"] / model.config.scaling_factor).sample
            found = {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": decoded}
        elif part == "image_encoder":
            processor = transformers.CLIPImageProcessor.from_pretrained(base / "feature_extractor")
            pixels = processor(case["picture"].astype(np.uint8), return_tensors="np").pixel_values
            pixels = torch.from_numpy(np.asarray(pixels))
            states = model(pixels, output_hidden_states=True).hidden_states
            found = {"pixel_values": pixels, "penultimate": states[-2]}
        else:
            output = model(given["ids"].long(), output_hidden_states=True)
            found = {"penultimate": output.hidden_states[-2]}
            if part == "text_encoder_2":
                found["pooled"] = output.text_embeds
    print(f"load {loaded - start:.1f} s, compute {time.monotonic() - loaded:.1f} s")
    case |= {f"{EXPECTED}{name}": tensor.float().contiguous().numpy() for name, tensor in found.items()}
    save_file(case, path)


def run(who: str, part: str, command: list[str]) -> None:
    """Runs a process alone, and tells its largest resident memory and what it says."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read().strip()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{part}: {who} ended with {process.returncode}: {' '.join(command)}")
    print(f"{part}: {who}: {said}, peak {usage.ru_maxrss / (1 << 20):.2f} GiB")


def errors(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The largest difference over the largest magnitude, and the same in the Euclidean norm."""
    assert found.shape == expected.shape and np.isfinite(found).all() and np.abs(expected).max() > 0
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    difference = found - expected
    return np.abs(difference).max() / np.abs(expected).max(), np.linalg.norm(difference) / np.linalg.norm(expected)


def compare(part: str, arguments: argparse.Namespace) -> bool:
    """Whether the part agrees."""
    case, out = (arguments.out / f"{part}.{arguments.dtype}{end}.safetensors" for end in ("", ".ours"))
    common = ["--base", str(arguments.base), "--out", str(arguments.out), "--dtype", arguments.dtype]
    if not case.exists():
        run("PyTorch", part, [sys.executable, __file__, *common, "--torch", part])
    source = arguments.source or arguments.base
    run("ours", part, [str(arguments.program), str(source), part, str(case), str(out), arguments.dtype])
    expected, found = load_file(case), load_file(out)
    exact_path = arguments.out / f"{part}.f32.safetensors"
    exact = load_file(exact_path) if arguments.dtype != "f32" and exact_path.exists() else expected
    agrees = True
    for key in (key for key in expected if key.startswith(EXPECTED)):
        name = key.removeprefix(EXPECTED)
        pairs = [("ours against PyTorch", found[name], expected[key])]
        if exact is not expected:
            pairs.append(("ours against f32", found[name], exact[key]))
            pairs.append(("PyTorch against f32", expected[key], exact[key]))
        for what, one, other in pairs:
            largest, norm = errors(one, other)
            print(f"{part} {name} {list(one.shape)} {arguments.dtype}: {what}: {largest:.1e}, in the norm {norm:.1e}")
            agrees &= arguments.dtype != "f32" or largest <= TOLERANCE
    return agrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--torch", action="store_true", help="only write what PyTorch computes, for one PART")
    parser.add_argument("parts", nargs="*", choices=PARTS, metavar="PART", default=PARTS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.torch:
        (part,) = arguments.parts
        with_torch(part, arguments.base, arguments.dtype, arguments.out / f"{part}.{arguments.dtype}.safetensors")
        return
    agree = [compare(part, arguments) for part in arguments.parts]
    if not all(agree):
        raise SystemExit("not all results agree")


if __name__ == "__main__":
    main()
