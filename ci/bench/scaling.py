"""Fits the alpha-beta model to what the ranks measured, and prints predictions for GPUs. Called by scaling.sh."""

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
        if "compute_seconds" in line:
            print(f"  {line['ranks']} ranks: a 512 x 512 matrix product takes {1e3 * line['compute_seconds']:.2f} ms")
    print("  ranks      bytes   packing, ms   wire, ms")
    for line in lines:
        if "bytes" in line:
            pack, wire = 1e3 * line["pack_seconds"], 1e3 * line["wire_seconds"]
            print(f"  {line['ranks']:5} {line['bytes']:10} {pack:13.3f} {wire:10.3f}")
    points = [
        (2 * (n - 1), 2 * (n - 1) / n * line["bytes"], line["wire_seconds"])
        for line in lines
        if "bytes" in line and (n := line["ranks"]) > 1
    ]
    alpha, beta, error = fit(points)
    print(f"fitted: alpha {1e6 * alpha:.1f} us per hop, beta {beta / 1e9:.2f} GB/s; median error {100 * error:.0f} %")


def plan(program, config, cluster, gpus, accumulation, settings):
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
        gpu, ports, link = cluster
        command = [program, "plan", file.name, "--gpus", str(gpus), "--gpu", gpu, "--json", "--quiet"]
        if gpus > 8:
            command += ["--link", link, "--ports", str(ports)]
        done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        sys.exit(done.stderr)
    return json.loads(done.stdout)["stages"][-1]["step_seconds"]


def predicted(program, config):
    print(f"\npredicted by `hyperlora plan` for {config}: step = computing + hops + bytes / link, nothing overlapped")
    for cluster in CLUSTERS:
        gpu, ports, link = cluster
        head = f"{gpu}, {ports} x {link}"
        print(f"\n{head:40} {'step of 8, s':>12} " + " ".join(f"{gpus:>7}" for gpus in GPUS[1:]))
        for name, accumulation, settings in KNOBS:
            steps = [plan(program, config, cluster, gpus, accumulation, settings) for gpus in GPUS]
            # Each GPU does the same work at any number: the ratio of the step times is the scaling.
            print(f"  {name:38} {steps[0]:12.2f} " + " ".join(f"{100 * steps[0] / step:6.2f}%" for step in steps[1:]))


if __name__ == "__main__":
    measured(sys.argv[1])
    predicted(sys.argv[2], sys.argv[3])
