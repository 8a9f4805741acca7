"""The training step of `burn_hyperlora::train::step` in PyTorch, as one would write it there.

diffusers' UNet with fused attention (SDPA), LoRAs of every sample by batched matrix products in forward hooks, gradient
checkpointing where recomputation is asked for, fused AdamW. The graph is cut at the LoRA, so that the phases compare.
"""

import json
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

sys.path.append(str(Path(__file__).resolve().parent.parent / "parity"))
import hyper_reference  # noqa: E402

PHASES = ("encode", "hypernet", "unet", "backward", "update")
LINEARS = ("to_q", "to_k", "to_v", "to_out.0")


def fused_attention(self, queries, context):
    """`hyper_reference.Attention.forward` without the score matrix."""

    def heads(x):
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    q, k, v = heads(self.to_q(queries)), heads(self.to_k(context)), heads(self.to_v(context))
    return self.to_out[0](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


hyper_reference.Attention.forward = fused_attention


class HyperLora(hyper_reference.HyperLora):
    """The reference, with bases mixed by one matrix product each."""

    def __init__(self, folder, sizes):
        super().__init__(json.loads((folder / "hyper_lora_modules.json").read_text()), sizes)
        self.load(folder)

    @torch.no_grad()
    def load(self, folder):
        for key, value in load_file(folder / "hyper_lora_modules.safetensors").items():
            self.bases[key].copy_(value)
        for stem in ("resampler", "base_resampler", "id_projector"):
            getattr(self, stem).load_state_dict(load_file(folder / f"{stem}.safetensors"))

    def mixed(self, part, coefficients, weight):
        """Down and up `[B, ...]` of every linear in turn; `weight` `[B]` says how strong each sample's LoRA is."""
        downs = coefficients.unbind(1)
        ups = (coefficients * (self.SCALE * weight)[:, None, None]).unbind(1)
        for site in range(len(self.sites)):
            for index, name in enumerate(self.LINEARS):
                token = 8 * site + 2 * index
                for kind, tokens, token in (("down", downs, token), ("up", ups, token + 1)):
                    basis = self.bases[f"{site}.{name}.{part}_{kind}_basis"]
                    yield (tokens[token] @ basis.flatten(1)).unflatten(1, basis.shape[1:])

    def forward(self, batch):
        """ID- and Base-LoRA of every sample, side by side along the rank."""
        id_coefficients = self.id_coefficients(batch["id_states"], batch["id_embedding"])
        with torch.no_grad():
            base_coefficients = self.base_coefficients(batch["base_states"])
            base = list(self.mixed("base", base_coefficients, batch["base_weight"]))
        both = zip(self.mixed("id", id_coefficients, batch["id_weight"]), base)
        return [torch.cat(pair, 2 if index % 2 == 0 else 1) for index, pair in enumerate(both)]


class FrozenBase:
    """The pipeline's parts, and a UNet whose attentions take per-sample LoRAs."""

    def __init__(self, folder, prefixes):
        def frozen(model, name):
            return model.from_pretrained(folder / name, dtype=torch.float32).requires_grad_(False).eval()

        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).requires_grad_(False).eval()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.unet.requires_grad_(False).eval()
        self.image_encoder = frozen(CLIPVisionModelWithProjection, "image_encoder")
        self.schedule = DDPMScheduler.from_config(DDPMScheduler.load_config(folder / "scheduler"))
        self.text = [
            (CLIPTokenizer.from_pretrained(folder / tokenizer), frozen(model, encoder))
            for tokenizer, model, encoder in (
                ("tokenizer", CLIPTextModel, "text_encoder"),
                ("tokenizer_2", CLIPTextModelWithProjection, "text_encoder_2"),
            )
        ]
        self.prompts = {}
        self.lora = []
        modules = {"lora_unet_" + name.replace(".", "_"): module for name, module in self.unet.named_modules()}
        for site, prefix in enumerate(prefixes):
            for index, name in enumerate(LINEARS):
                pair = 2 * (4 * site + index)
                modules[prefix].get_submodule(name).register_forward_hook(
                    lambda _, args, y, pair=pair: torch.baddbmm(y, args[0] @ self.lora[pair], self.lora[pair + 1])
                )

    def prompt(self, prompt):
        """Penultimate states `[1, 77, C]` and pooled output `[1, P]`; each prompt is encoded once."""
        if prompt not in self.prompts:
            states = []
            for tokenizer, encoder in self.text:
                ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
                output = encoder(ids, output_hidden_states=True)
                states.append(output.hidden_states[-2])
            self.prompts[prompt] = torch.cat(states, -1), output.text_embeds
        return self.prompts[prompt]

    def states(self, pixels):
        return self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def encode(self, batch, prompts):
        """What the UNet and the hypernetwork are given of a batch, and the target."""
        embeds, pooled = zip(*map(self.prompt, prompts))
        posterior = self.vae.encode(batch["pixels"]).latent_dist
        latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * self.vae.config.scaling_factor
        return batch | {
            "latents": self.schedule.add_noise(latents, batch["noise"], batch["timesteps"]),
            "prompt_embeds": torch.cat(embeds),
            "pooled": torch.cat(pooled),
            "id_states": self.states(batch["id_pixels"]),
            "base_states": self.states(batch["base_pixels"]),
        }

    def predict(self, batch, lora):
        self.lora = lora
        conditions = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
        return self.unet(
            batch["latents"], batch["timesteps"], batch["prompt_embeds"], added_cond_kwargs=conditions
        ).sample


class Trainer:
    """Takes steps as the Rust side's plan says; `exchange` is the folder that it wrote."""

    def __init__(self, exchange):
        self.plan = json.loads((exchange / "plan.json").read_text())
        torch.set_num_threads(self.plan["threads"])
        self.folder = exchange / "hyper_lora"
        self.hyper_lora = HyperLora(self.folder, self.plan["hyper_lora"])
        trainable = set(self.plan["trainable"])
        self.parameters = []
        for name, parameter in self.hyper_lora.named_by_file():
            parameter.requires_grad_(name in trainable)
            if name in trainable:
                self.parameters.append(parameter)
        assert len(self.parameters) == len(trainable), "the two sides name parameters differently"
        self.base = FrozenBase(Path(self.plan["base"]), list(self.hyper_lora.sites))
        self.batches = [
            (load_file(exchange / f"batch-{index}.safetensors"), prompts)
            for index, prompts in enumerate(self.plan["prompts"])
        ]

    def begin(self, recompute):
        """Back to the weights of the plan, with a new optimiser."""
        self.hyper_lora.load(self.folder)
        optim = self.plan["optim"]
        self.optimiser = torch.optim.AdamW(
            self.parameters,
            lr=optim["learning_rate"],
            betas=optim["betas"],
            eps=optim["epsilon"],
            weight_decay=optim["weight_decay"],
            fused=True,
        )
        if recompute:
            self.base.unet.enable_gradient_checkpointing()
        else:
            self.base.unet.disable_gradient_checkpointing()

    def step(self):
        """One optimiser step: `(loss, seconds by phase)`."""
        laps, losses = dict.fromkeys((*PHASES, "total"), 0.0), []
        start = clock = time.perf_counter()

        def lap(phase):
            nonlocal clock
            now = time.perf_counter()
            laps[phase] += now - clock
            clock = now

        for batch, prompts in self.batches:
            batch = self.base.encode(batch, prompts)
            lap("encode")
            lora = self.hyper_lora(batch)
            leaves = [tensor.detach().requires_grad_() for tensor in lora]
            lap("hypernet")
            prediction = self.base.predict(batch, leaves)
            mse_loss(prediction, batch["noise"]).backward()
            losses += (prediction.detach() - batch["noise"]).square().mean((1, 2, 3)).tolist()
            lap("unet")
            torch.autograd.backward(lora, [leaf.grad / len(self.batches) for leaf in leaves])
            lap("backward")
        torch.nn.utils.clip_grad_norm_(self.parameters, self.plan["optim"]["clip_norm"] or float("inf"))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        lap("update")
        laps["total"] = time.perf_counter() - start
        return sum(losses) / len(losses), laps

    def run(self, steps, recompute):
        """`steps` steps from the plan's weights."""
        self.begin(recompute)
        taken = [self.step() for _ in range(steps)]
        return {"losses": [loss for loss, _ in taken], "laps": [laps for _, laps in taken]}
