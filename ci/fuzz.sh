#!/usr/bin/env bash
# ci/fuzz.sh [CASES] [TARGET]: runs every fuzz target, or those whose name holds TARGET, on CASES cases each (10^6).
#
# What is done stands in target/fuzz-CASES.tsv and is not done again: an interrupted run goes on where it was. Remove the
# file to begin anew. Environment: HYPERLORA_FUZZ_PROFILE=dev finds sums that overflow as well, HYPERLORA_FUZZ_SEED=N takes
# other cases, HYPERLORA_FUZZ_PACKAGES='-p data-prep' leaves Burn out.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh

export HYPERLORA_FUZZ_CASES=${1:-1000000}
only=${2:-}
read -ra packages <<<"${HYPERLORA_FUZZ_PACKAGES:---workspace}"
run=(cargo test "${packages[@]}" --profile "${HYPERLORA_FUZZ_PROFILE:-release}" --test fuzz --)
results=${CARGO_TARGET_DIR:-target}/fuzz-$HYPERLORA_FUZZ_CASES.tsv
HYPERLORA_FUZZ_STATE=$(mktemp -d)
export HYPERLORA_FUZZ_STATE
trap 'rm -rf "$HYPERLORA_FUZZ_STATE"' EXIT
check_tools

tests=$("${run[@]}" targets:: --list | sed -n 's/: test$//p' | grep -F "$only") \
  || fail "no fuzz target holds '$only' in its name" "leave the name out, or look into */tests/fuzz/targets"
touch "$results"
failed=()
for test in $tests; do
  grep -q "^$test	" "$results" && continue
  say "$test"
  output=$HYPERLORA_FUZZ_STATE/output
  if "${run[@]}" --exact "$test" --nocapture >"$output" 2>&1; then
    # Name, cases, seconds, how many were accepted, failures.
    sed -n "s|^.*fuzz	[a-z_]*	|$test	|p" "$output" | tee -a "$results"
  else
    tail -n 60 "$output"
    tail -n +1 "$HYPERLORA_FUZZ_STATE"/[a-z]*_case 2>/dev/null || true
    failed+=("$test")
  fi
done

say "cases, seconds, accepted and failures of each target"
column -t -s '	' "$results"
[ ${#failed[@]} -eq 0 ] || fail "${#failed[@]} targets fail: ${failed[*]}" \
  "run one case again with HYPERLORA_FUZZ_FIRST=NUMBER HYPERLORA_FUZZ_CASES=1"
