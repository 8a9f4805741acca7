#!/usr/bin/env bash
# Samples per second from shards to batches in Rust and in PyTorch: same shards and threads, in turn; prints rates and ratios.
#
#   ci/bench/loader.sh [EXPERIMENT] [--rounds N] [--epochs N] [--workers N...]
#
# EXPERIMENT names data and sizes (default: the quickstart's, whose shards launch/quickstart.sh makes).
# PYTHON names a Python with ci/parity/requirements.txt installed (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
experiment=experiments/quickstart/train.yaml
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  experiment=$1
  shift
fi

"$python" -c 'import torch, pyarrow, PIL, safetensors' || {
  printf 'error: %s lacks PyTorch, pyarrow or Pillow\n  remedy: pip install -r ci/parity/requirements.txt, or set PYTHON\n' "$python" >&2
  exit 2
}
bench=(cargo bench --quiet --package burn-hyperlora --bench loader)
"${bench[@]}" --no-run
exec "$python" ci/bench/loader.py "$@" -- "${bench[@]}" -- "$(realpath "$experiment")"
