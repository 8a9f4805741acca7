"""Fits the alpha-beta model to what the ranks measured, and prints predictions for them and for GPUs. Called by scaling.sh."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# GPU, and the ports of a machine of eight to the others.
CLUSTERS = [
    ("a100-80g", 8, "infiniband-hdr"),
    ("a100-80g", 4, "infiniband-hdr"),
    ("a100-80g", 1, "infiniband-hdr"),
    ("h100-80g", 8, "infiniband-ndr"),
    ("h100-80g", 1, "infiniband-ndr"),
]
GPUS = [8, 16, 64, 256]
# Name, accumulation, replaced settings.
KNOBS = [
    ("accumulation 8, as it stands", 8, {}),
    ("accumulation 16", 16, {}),
    ("accumulation 32", 32, {}),
    ("accumulation 8, wire: bf16", 8, {"wire": "bf16"}),
    ("accumulation 8, basis 64", 8, {"basis": 64}),
    ("accumulation 16, basis 64, wire: bf16", 16, {"basis": 64, "wire": "bf16"}),
]


def fit(points):
    """alpha and beta of seconds = alpha * hops + bytes / beta, and the largest relative error of the longest messages.

    beta is that of the longest messages, which are as long as the buckets of a training and leave the caches as these do; alpha
    that of the shortest, whose bytes hardly count. In between, what stays in the caches is faster than the line.
    """
    shortest, longest = min(size for _, size, _ in points), max(size for _, size, _ in points)
    # Sizes differ by the factor of the ring as well: 2 (n - 1) / n is from 1 to 2.
    long = [(size, seconds) for _, size, seconds in points if size > longest / 2.5]
    seconds_per_byte = slope(long)
    alpha = slope([(hops, seconds - size * seconds_per_byte) for hops, size, seconds in points if size < shortest * 2.5])
    return alpha, 1.0 / seconds_per_byte, max(abs(size * seconds_per_byte / seconds - 1) for size, seconds in long)


def slope(points):
    """Least squares of relative errors of y = slope * x."""
    ratios = [x / y for x, y in points]
    return sum(ratios) / sum(ratio * ratio for ratio in ratios)


def measured(path):
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    print("\nmeasured (fastest of 20, slowest rank)")
    for line in lines:
        if not is_bucket(line):
            print(f"  {line['ranks']} ranks: a 512 x 512 matrix product takes {1e3 * line['compute_seconds']:.2f} ms")
    print("  ranks      bytes   packing, ms   wire, ms")
    for line in lines:
        if is_bucket(line):
            pack, wire = 1e3 * line["pack_seconds"], 1e3 * line["wire_seconds"]
            print(f"  {line['ranks']:5} {line['bytes']:10} {pack:13.3f} {wire:10.3f}")
    points = [
        (2 * (n - 1), 2 * (n - 1) / n * line["bytes"], line["wire_seconds"])
        for line in lines
        if is_bucket(line) and (n := line["ranks"]) > 1
    ]
    alpha, beta, error = fit(points)
    print(f"fitted: alpha {1e6 * alpha:.1f} us per hop, beta {beta / 1e9:.2f} GB/s; the longest buckets within {100 * error:.0f} %")
    # A fitted alpha may be below zero, a hop may not.
    hop, link = f"{max(1e6 * alpha, 0.0):.3f}us", f"{beta / 1e9:.4f}GB/s"
    largest = {line["ranks"]: line for line in sorted(filter(is_bucket, lines), key=lambda line: line["bytes"])}
    return hop, link, {ranks: (line["bytes"], line["wire_seconds"]) for ranks, line in largest.items() if ranks > 1}


def is_bucket(line):
    return "bytes" in line


def plan(program, config, gpu, gpus, accumulation, settings, options):
    """The last stage of the plan for so many GPUs, each with the same work."""
    text = Path(config).read_text().splitlines()
    micro_batch = next(int(line.split(":")[1].split("#")[0]) for line in text if "micro_batch:" in line)
    settings = settings | {"global_batch": gpus * micro_batch * accumulation}
    for key, value in settings.items():
        at = next((i for i, line in enumerate(text) if line.strip().startswith(f"{key}:")), None)
        if at is None:  # left at its default: beside the micro-batch
            at = next(i for i, line in enumerate(text) if "micro_batch:" in line) + 1
            text.insert(at, text[at])
        text[at] = f"{text[at][:len(text[at]) - len(text[at].lstrip())]}{key}: {value}"
    # Beside the original: its paths are relative.
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=Path(config).parent) as file:
        file.write("\n".join(text))
        file.flush()
        command = [program, "plan", file.name, "--gpus", str(gpus), "--gpu", gpu, "--json", "--quiet"]
        done = subprocess.run(command + options, capture_output=True, text=True)
    if not done.stdout:
        sys.exit(done.stderr)
    return json.loads(done.stdout)["stages"][-1]


def predicted_here(program, config, hop, link, largest):
    """What plan makes of the fit, beside what its buckets would take at the time that the largest of them was measured in."""
    options = ["--link", link, "--hop", hop]
    print(f"\nthis machine, by `hyperlora plan {' '.join(options)}`: gradients and parameters of {config}")
    print("  ranks   predicted, s   of measured buckets, s")
    for ranks, (size, seconds) in largest.items():
        stage = plan(program, config, "a100-80g", ranks, 8, {}, options)
        told = stage["gradient_bytes"] / size * seconds
        print(f"  {ranks:5} {stage['all_reduce_seconds']:14.2f} {told:22.2f}")


def predicted(program, config):
    print(f"\npredicted by `hyperlora plan` for {config}: step = computing + hops + bytes / link, nothing overlapped")
    for gpu, ports, link in CLUSTERS:
        head = f"{gpu}, {ports} x {link}"
        print(f"\n{head:40} {'step of 8, s':>12} " + " ".join(f"{gpus:>7}" for gpus in GPUS[1:]))
        for name, accumulation, settings in KNOBS:
            steps = []
            for gpus in GPUS:
                options = ["--link", link, "--ports", str(ports)] if gpus > 8 else []
                steps.append(plan(program, config, gpu, gpus, accumulation, settings, options)["step_seconds"])
            # Each GPU does the same work at any number: the ratio of the step times is the scaling.
            print(f"  {name:38} {steps[0]:12.2f} " + " ".join(f"{100 * steps[0] / step:6.2f}%" for step in steps[1:]))


if __name__ == "__main__":
    fitted = measured(sys.argv[1])
    predicted_here(sys.argv[2], sys.argv[3], *fitted)
    predicted(sys.argv[2], sys.argv[3])
