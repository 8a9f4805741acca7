#!/usr/bin/env bash
# ci/wheel.sh [OUT]: builds a Python wheel with both programs, in dist/ or OUT. Its installation brings ONNX Runtime along.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh

out=${1:-dist}
check_tools
command -v maturin >/dev/null || fail "maturin is missing" "pip install maturin==1.16.0"

cargo build --release -p data-prep -p burn-hyperlora --bins
install -D -t target/burn_hyperlora.data/scripts "${CARGO_TARGET_DIR:-target}/release/data-prep"
maturin build --release --out "$out"
