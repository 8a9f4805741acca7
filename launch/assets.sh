#!/usr/bin/env bash
# Brings photos, face models and ONNX Runtime into ${HYPERLORA_CACHE:-~/.cache/hyperlora}: about 113 MB of packages, once.
#
#   launch/assets.sh            bring what is missing, verify everything (offline and under a second when all is there)
#   launch/assets.sh --check    verify only, bring nothing
#
# Needs Python 3.9 or newer. pip and npm are not needed; where they are there, they say which registries to ask.
# Exit codes: 0 all there and as pinned, 2 what you can mend (the message says how), 1 a fault.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if ! command -v python3 >/dev/null; then
    printf 'assets: python3 is missing\n  remedy: apt-get install python3\n' >&2
    exit 2
fi
exec python3 -B "$here/assets.py" "$@"
