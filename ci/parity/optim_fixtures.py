#!/usr/bin/env python3
"""Twenty steps of torch.optim.AdamW with clipping, warm-up and cosine decay, for `tests/optim.rs` to follow.

Writes one safetensors file: `weight.0` and `bias.0` the first values, `{name}.grad` [20, ...] the raw gradients,
`{name}.after` [20, ...] the values after each step, `norm` [20] before clipping, `learning_rate` [20], and the
moments after the last step.
"""

import argparse
import warnings

import torch
from safetensors.torch import save_file

STEPS, WARMUP, PEAK, FLOOR = 20, 5, 1e-2, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="where to write, as crates/testing/fixtures/adamw.safetensors")
    out = parser.parse_args().out

    torch.manual_seed(1)
    torch.set_num_threads(1)
    params = {"weight": torch.nn.Parameter(torch.randn(3, 4)), "bias": torch.nn.Parameter(torch.randn(4))}
    optimizer = torch.optim.AdamW(params.values(), lr=PEAK, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / WARMUP, total_iters=WARMUP - 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - WARMUP, eta_min=PEAK * FLOOR)
    with warnings.catch_warnings():
        # SequentialLR calls its parts' step with an epoch, which torch itself warns about.
        warnings.simplefilter("ignore")
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[WARMUP])

        tensors = {f"{name}.0": param.detach().clone() for name, param in params.items()}
        record: dict[str, list[torch.Tensor]] = {}
        for step in range(STEPS):
            # Magnitudes over four decades, so that clipping bites on some steps and eps matters on others.
            size = 10.0 ** ((step % 5) - 3)
            for name, param in params.items():
                param.grad = torch.randn(param.shape) * size
                record.setdefault(f"{name}.grad", []).append(param.grad.clone())
            norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            record.setdefault("norm", []).append(norm)
            record.setdefault("learning_rate", []).append(torch.tensor(schedule.get_last_lr()[0]))
            optimizer.step()
            schedule.step()
            for name, param in params.items():
                record.setdefault(f"{name}.after", []).append(param.detach().clone())

    tensors |= {name: torch.stack(values) for name, values in record.items()}
    for name, param in params.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[param][moment].clone()
    save_file(tensors, out, {"made_by": f"ci/parity/optim_fixtures.py, torch {torch.__version__}"})


if __name__ == "__main__":
    main()
