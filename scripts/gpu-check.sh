#!/usr/bin/env bash
# Checks everything that needs a GPU, on the machine that has one: `gpu-check.sh [options of tests/gpu/check.py]`.
# Builds nothing: `scripts/gpu-bundle.sh` built the programs into gpu-bundle/, which was carried along with the tree.
# Needs python3 with PyTorch. The results, benches/results/gpu.json, are committed.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bundle=${KVTIER_GPU_BUNDLE:-$root/gpu-bundle}
python=${KVTIER_GPU_PYTHON:-python3}

if [ ! -x "$bundle/kvtierd" ]; then
  echo "gpu-check: no programs in $bundle: run scripts/gpu-bundle.sh on the machine that builds, and carry that folder" >&2
  exit 1
fi
if ! "$python" -c 'import torch' 2> /dev/null; then
  echo "gpu-check: $python has no PyTorch: set KVTIER_GPU_PYTHON to one that has" >&2
  exit 1
fi
export PYTHONPATH=$root/python PYTHONDONTWRITEBYTECODE=1
exec "$python" "$root/tests/gpu/check.py" --bin "$bundle" --out "$root/benches/results/gpu.json" "$@"
