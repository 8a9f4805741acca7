"""Samples loaded in Rust and in PyTorch, in turn, and how their rates compare.

    python ci/bench/loader.py -- COMMAND...    COMMAND starts burn-hyperlora's bench `loader`

Both sides load the same epochs of the same shards: decoded, cropped, masked and resized as the training does. Fails where the
two do not make the same pictures of the same draws.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from rust_side import RustSide, cpu

# Mean absolute differences that pass: the two blur and round differently.
LIMITS = {"pixels": 0.01, "id_pixels": 0.05, "base_pixels": 0.05, "id_embedding": 1e-6}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--epochs", type=int, default=8, help="epochs per turn")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of threads, or processes")
    parser.add_argument("command", nargs="+", help="how to start the Rust side; it is given the exchange folder")
    return parser.parse_args()


def rate(turns):
    return statistics.median(turn["samples"] / turn["seconds"] for turn in turns)


def main():
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        exchange = Path(folder)
        rust = RustSide(arguments.command, exchange, 1)
        import torch  # after the build of the Rust side

        import torch_loader

        differences = torch_loader.differences(exchange)
        for name, difference in differences.items():
            if not difference <= LIMITS[name]:
                sys.exit(f"error: {name} differs by {difference:.4f} in the mean: the two do not make the same")
        turns = {workers: ([], []) for workers in arguments.workers}
        for _ in range(arguments.rounds):
            for workers, (own, other) in turns.items():
                own.append(rust.run(workers=workers, epochs=arguments.epochs))
                other.append(torch_loader.run(exchange, workers, arguments.epochs))
                if own[-1]["samples"] != other[-1]["samples"]:
                    sys.exit(f"error: {own[-1]['samples']} samples in Rust, {other[-1]['samples']} in PyTorch")
        rust.close()
    print(f"{cpu()}, PyTorch {torch.__version__}; medians of {arguments.rounds} x {own[-1]['samples']} samples")
    print("mean differences: " + ", ".join(f"{name} {value:.4f}" for name, value in differences.items()))
    print("\n| workers | Rust samples/s | PyTorch samples/s | Rust / PyTorch |\n|---|---|---|---|")
    for workers, sides in turns.items():
        own, other = map(rate, sides)
        print(f"| {workers} | {own:.0f} | {other:.0f} | {own / other:.2f} |")


if __name__ == "__main__":
    main()
