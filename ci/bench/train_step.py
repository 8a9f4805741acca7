"""The same training step in Rust and in PyTorch, in turn, and how their times compare.

    python ci/bench/train_step.py -- COMMAND...    COMMAND starts burn-hyperlora's bench `train_step`

The bench writes weights and batches into a temporary folder, then takes steps on demand; both sides begin every round with
the same weights. Fails where the two do not compute the same losses.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from rust_side import RustSide, cpu

NAMES = {
    "encode": "encode (frozen)",
    "hypernet": "hypernetwork forward",
    "unet": "UNet forward, backward to the LoRA",
    "backward": "hypernetwork backward",
    "update": "clipping, AdamW",
    "total": "step",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--steps", type=int, default=6, help="steps per turn; the first is not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative difference of the losses that passes")
    parser.add_argument("command", nargs="+", help="how to start the Rust side; it is given the exchange folder")
    return parser.parse_args()


def check_losses(rust, torch, tolerance):
    """Same inputs, same arithmetic: every step's loss must agree, or the times mean nothing."""
    for step, (a, b) in enumerate(zip(rust, torch, strict=True)):
        if not abs(a - b) <= tolerance * abs(b):
            sys.exit(f"error: step {step}: loss {a:.7f} in Rust, {b:.7f} in PyTorch: the two do not compute the same")
    return max(abs(a - b) / abs(b) for a, b in zip(rust, torch))


def milliseconds(turns, phase):
    """The median over the timed steps of all turns."""
    return 1e3 * statistics.median(laps[phase] for turn in turns for laps in turn["laps"][1:])


def print_table(title, rust, torch):
    print(f"\n| {title} | Rust ms | PyTorch ms | Rust / PyTorch |\n|---|---|---|---|")
    for phase, name in NAMES.items():
        a, b = milliseconds(rust, phase), milliseconds(torch, phase)
        print(f"| {name} | {a:.1f} | {b:.1f} | {a / b:.2f} |")


def main():
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        rust = RustSide(arguments.command, Path(folder), arguments.threads)
        import torch  # after the build of the Rust side

        from torch_step import Trainer

        twin = Trainer(Path(folder))
        print(f"{cpu()}, threads: {arguments.threads}, PyTorch {torch.__version__}; {twin.plan['describe']}")
        print(f"medians of {arguments.rounds} x {arguments.steps - 1} steps")
        turns = {recompute: ([], []) for recompute in (False, True)}
        for _ in range(arguments.rounds):
            for recompute, sides in turns.items():
                for side, taken in zip((rust, twin), sides):
                    taken.append(side.run(steps=arguments.steps, recompute=recompute))
        rust.close()
    for recompute, (rust_turns, torch_turns) in turns.items():
        worst = max(
            check_losses(a["losses"], b["losses"], arguments.tolerance) for a, b in zip(rust_turns, torch_turns)
        )
        print_table(f"recomputation {'on' if recompute else 'off'}", rust_turns, torch_turns)
        print(f"\nlosses of {arguments.steps} steps differ by at most {worst:.1e} (relative)")


if __name__ == "__main__":
    main()
