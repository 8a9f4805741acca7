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
    """Least squares of relative errors of seconds = alpha * hops + bytes / beta."""
    a = b = c = d = e = 0.0
    for hops, size, seconds in points:
        x, y = hops / seconds, size / seconds
        a, b, c, d, e = a + x * x, b + x * y, c + y * y, d + x, e + y
    det = a * c - b * b
    alpha, inverse_beta = (d * c - e * b) / det, (a * e - b * d) / det
    errors = sorted(abs(alpha * h + s * inverse_beta - t) / t for h, s, t in points)
    return alpha, 1.0 / inverse_beta, errors[len(errors) // 2]


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
    print(f"fitted: alpha {1e6 * alpha:.1f} us per hop, beta {beta / 1e9:.2f} GB/s; median error {100 * error:.0f} %")
    # A least-squares alpha may be below zero, a hop may not.
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
