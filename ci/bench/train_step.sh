#!/usr/bin/env bash
# One training step in Rust and in PyTorch: same weights, batch and threads, in turn; prints times and ratios by phase.
#
#   ci/bench/train_step.sh [--rounds N] [--steps N] [--threads N]
#
# PYTHON names a Python with ci/parity/requirements.txt installed (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}

"$python" -c 'import torch, diffusers, transformers, safetensors' || {
  printf 'error: %s lacks PyTorch or diffusers\n  remedy: pip install -r ci/parity/requirements.txt, or set PYTHON\n' "$python" >&2
  exit 2
}
bench=(cargo bench --quiet --package burn-hyperlora --bench train_step)
"${bench[@]}" --no-run
exec "$python" ci/bench/train_step.py "$@" -- "${bench[@]}" --
