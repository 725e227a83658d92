#!/usr/bin/env bash
# What has to be measured on a GPU, in less than ten minutes:
#   benchmarks/gpu.sh OUTPUT [WHEELS] [flags of benchmarks/gpu.py]
# OUTPUT gets gpu.json, gpu.md and gpu.log. The machine needs Python 3.10 or later with torch (2.11 and Python 3.12 were
# in mind) and no network: what it lacks, or has in a version that is too old, comes from the folder WHEELS and is
# installed into a temporary folder. Where something is still missing, it is named, with the command that fetches it.
set -euo pipefail
output=${1:?usage: benchmarks/gpu.sh OUTPUT [WHEELS] [flags of benchmarks/gpu.py]}
shift
wheels=
if [[ $# -gt 0 && $1 != -* ]]; then
  wheels=$1
  shift
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1

if [[ -n $wheels ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  wanted=$("$python" "$root/benchmarks/gpu_packages.py" --wheels "$wheels")
  if [[ -n $wanted ]]; then
    mapfile -t files <<<"$wanted"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${files[@]}"
    export PYTHONPATH=$PYTHONPATH:$site
  fi
fi
"$python" "$root/benchmarks/gpu_packages.py"
"$python" "$root/benchmarks/gpu.py" --output "$output" "$@"
