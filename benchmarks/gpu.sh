#!/usr/bin/env bash
# Measures one CUDA GPU in one go and writes a record: benchmarks/gpu.sh [--parts NAME ...] [--minutes 25]
#
# Needs torch with CUDA and pytest. A machine without a network gets what it lacks as wheels:
#   pip download --no-deps -d wheels torchtitan==0.3.0 spmd_types==0.2.3 webdataset==1.0.2 braceexpand
#   WHEELS=wheels benchmarks/gpu.sh
# Without them everything is measured too; tests of whole runs are then recorded as errors.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -m benchmarks.bench_gpu --record "$@"
