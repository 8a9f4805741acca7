"""Writes crates/testing/fixtures/samplers.{json,safetensors}: every step of diffusers' samplers on noise.

    python ci/parity/sampler_fixtures.py

The JSON lists the cases: sampler, steps, and what the base's scheduler_config.json says. The tensors hold, per case, the
timesteps and the latents before and after every step; `outputs` are what the UNet is made to say at each step.
"""

import json
import pathlib

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parents[2] / "crates/testing/fixtures"
SDXL = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
    timestep_spacing="leading", prediction_type="epsilon",
)
# What the pipelines set where a base's config leaves it open: latents are never clipped.
SAMPLERS = {
    "euler": (EulerDiscreteScheduler, {}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp-2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
}


def cases():
    for sampler in SAMPLERS:
        for prediction in ("epsilon", "v_prediction"):
            # 7 steps are few for DPM-Solver, which then ends in another way than with 16.
            for spacing, steps in (("leading", 7), ("trailing", 16), ("linspace", 7)):
                yield sampler, steps, {"prediction_type": prediction, "timestep_spacing": spacing}
        yield sampler, 9, {
            "prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
        }
        yield sampler, 7, {"timestep_spacing": None}
        yield sampler, 1, {}
    for sampler in ("euler", "dpmpp-2m"):
        yield sampler, 8, {"use_karras_sigmas": True}
    for sampler in ("euler", "dpmpp-2m", "dpmpp-2m-karras"):
        for steps in (7, 16):
            yield sampler, steps, {"final_sigmas_type": "sigma_min"}
    yield "dpmpp-2m-karras", 7, {"final_sigmas_type": "sigma_min", "lower_order_final": False}
    yield "dpmpp-2m-karras", 16, {"final_sigmas_type": "sigma_min", "euler_at_final": True}
    yield "ddim", 7, {"set_alpha_to_one": False, "steps_offset": 0}


def main():
    generator = torch.Generator().manual_seed(50)
    latents = torch.randn(1, 2, 3, 2, generator=generator)
    outputs = torch.randn(16, 1, 2, 3, 2, generator=generator)
    listed, tensors = [], {"latents": latents, "outputs": outputs}
    for index, (sampler, steps, changes) in enumerate(cases()):
        config = {key: value for key, value in (SDXL | changes).items() if value is not None}
        kind, forced = SAMPLERS[sampler]
        scheduler = kind(**(config | forced))
        scheduler.set_timesteps(steps)
        x = latents * scheduler.init_noise_sigma
        trace = [x]
        for t, output in zip(scheduler.timesteps, outputs):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x).prev_sample
            trace.append(x)
        listed.append({"sampler": sampler, "steps": steps, "config": config})
        tensors |= {f"{index}.timesteps": scheduler.timesteps.float(), f"{index}.trace": torch.stack(trace).float()}
    (OUT / "samplers.json").write_text(json.dumps(listed, indent=1) + "\n")
    save_file(tensors, OUT / "samplers.safetensors")


if __name__ == "__main__":
    main()
