"""Holds `hyperlora sample` to diffusers: the final latents of StableDiffusionXLPipeline from the same initial ones.

    cargo build --release && python ci/parity/check_sample.py [--base DIR] [--lora FILE --lora-weight 0.8]

Prints the relative difference (the largest difference over the largest magnitude) for every sampler; ends with 1 where
one is above the limit. The base is a pipeline folder in diffusers layout.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).parents[2]
SAMPLERS = {
    "euler": lambda config: EulerDiscreteScheduler.from_config(config),
    "dpmpp-2m-karras": lambda config: DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
    "ddim": lambda config: DDIMScheduler.from_config(config, clip_sample=False),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=pathlib.Path, default=ROOT / "experiments/quickstart/base")
    parser.add_argument("--variant", help="of the base's weights, such as fp16")
    parser.add_argument("--lora", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--lora-weight", type=float, action="append", default=[])
    parser.add_argument("--prompt", default="a photo of a smiling man")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--height", type=int, help="in pixels; the base's own size where left out")
    parser.add_argument("--width", type=int, help="in pixels; the base's own size where left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", choices=SAMPLERS, action="append", help="only this one; may be given several times")
    parser.add_argument("--limit", type=float, default=1e-3, help="largest relative difference")
    parser.add_argument("--hyperlora", type=pathlib.Path, default=ROOT / "target/release/hyperlora")
    args = parser.parse_args()
    if len(args.lora_weight) > len(args.lora):
        parser.error("more weights than LoRAs")
    args.lora_weight += [1.0] * (len(args.lora) - len(args.lora_weight))
    return args


def pipeline(args):
    pipe = StableDiffusionXLPipeline.from_pretrained(
        args.base, variant=args.variant, torch_dtype=torch.float32, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    names = [f"lora{index}" for index in range(len(args.lora))]
    for name, path in zip(names, args.lora):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    if names:
        pipe.set_adapters(names, adapter_weights=args.lora_weight)
    return pipe


def expected(pipe, scheduler, args, initial):
    """The final latents of diffusers."""
    pipe.scheduler = scheduler
    result = pipe(
        args.prompt, negative_prompt=args.negative_prompt, num_inference_steps=args.steps,
        guidance_scale=args.guidance, height=args.height, width=args.width, latents=initial.clone(), output_type="latent",
    )
    return result.images


def actual(args, sampler, initial, folder):
    """The final latents of `hyperlora sample`."""
    start, end = folder / "initial.safetensors", folder / "final.safetensors"
    save_file({"latents": initial}, start)
    command = [
        args.hyperlora, "sample", "-q", "--base", args.base, "--prompt", args.prompt, "--sampler", sampler,
        "--steps", args.steps, "--guidance", args.guidance, "--height", args.height, "--width", args.width,
        "--latents", start, "--save-latents", end, "-o", folder / "picture.png",
    ]
    if args.variant:
        command += ["--variant", args.variant]
    if args.negative_prompt is not None:
        command += ["--negative-prompt", args.negative_prompt]
    for lora in args.lora:
        command += ["--lora", lora]
    # A weight may be negative, which only `=` keeps apart from an option.
    command += [f"--lora-weight={weight}" for weight in args.lora_weight]
    subprocess.run([str(part) for part in command], check=True)
    return load_file(end)["latents"]


@torch.no_grad()
def main():
    args = arguments()
    pipe = pipeline(args)
    config = pipe.scheduler.config
    own = pipe.unet.config.sample_size * pipe.vae_scale_factor
    args.height, args.width = args.height or own, args.width or own
    shape = (1, pipe.unet.config.in_channels, args.height // pipe.vae_scale_factor, args.width // pipe.vae_scale_factor)
    initial = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    print(f"{args.base}: {args.height}x{args.width}, {args.steps} steps, guidance {args.guidance}, {len(args.lora)} LoRAs")
    failed = False
    for sampler in args.sampler or SAMPLERS:
        started = time.monotonic()
        wanted = expected(pipe, SAMPLERS[sampler](config), args, initial)
        halfway = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = actual(args, sampler, initial, pathlib.Path(folder))
        ended = time.monotonic()
        difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
        # Written so that NaN fails too.
        good = difference <= args.limit
        failed |= not good
        print(f"{sampler:16} {difference:.1e}  {'ok' if good else f'ABOVE {args.limit:g}'}"
              f"  (diffusers {halfway - started:.1f} s, hyperlora {ended - halfway:.1f} s)")
    sys.exit(failed)


if __name__ == "__main__":
    main()
