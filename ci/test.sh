#!/usr/bin/env bash
# Everything that must hold: format, lints, tests, docs, and that the CUDA code still type-checks.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh

check_tools
cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 \
  || fail "clippy or rustfmt is missing" "rustup component add clippy rustfmt"
say "assets (photos and face models, downloaded once)"
launch/assets.sh

python3 -B ci/assets_test.py
python3 -B ci/check_links.py

say "format"
cargo fmt --all --check

# Several ranks are tested with Open MPI, whose header `bindgen` reads through libclang.
command -v mpirun >/dev/null && command -v mpicc >/dev/null && compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null \
  || apt_install mpicc libopenmpi-dev openmpi-bin libclang-dev

say "lints"
cargo clippy --workspace --all-targets -- -D warnings
mpi=(-p hyperlora-ranks -p burn-hyperlora --features burn-hyperlora/mpi)
cargo clippy "${mpi[@]}" --all-targets -- -D warnings
cloud=(-p data-prep --features data-prep/cloud)
cargo clippy "${cloud[@]}" --test remote -- -D warnings

say "licences, sources and advisories of the crates"
tools=${HYPERLORA_CACHE:-$HOME/.cache/hyperlora}/tools
PATH=$PATH:$tools/bin
command -v cargo-deny >/dev/null || cargo install cargo-deny --version =0.20.2 --locked --quiet --root "$tools"
cargo deny check licenses bans sources
# The database is a repository on GitHub.
if timeout 120 cargo deny fetch db 2>/dev/null; then
  cargo deny --offline check advisories
else
  echo "the advisory database cannot be had here: advisories are not checked"
fi

say "tests"
cargo test --workspace
say "tests of 2, 3 and 4 ranks"
cargo test "${mpi[@]}" --test collectives --test ranks
say "shards behind a URL"
cargo test "${cloud[@]}" --test remote

say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# DOCS_RS keeps build scripts from fetching what only linking needs.
say "CUDA code (types only)"
DOCS_RS=1 cargo check -p hyperlora-ranks -p burn-hyperlora --features burn-hyperlora/cuda --lib --bins --tests

say "all checks passed"
