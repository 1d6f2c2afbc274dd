#!/usr/bin/env bash
# Real vLLM engines against a real kvtierd: see run_e2e.py. KVTIER_VLLM_DIR is what setup.sh printed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}/debug
(cd "$root" && cargo build --locked -q -p kvtierd -p kvtier-cli -p kvtier-connector-ffi)
. "$here/env.sh"
export KVTIER_LIBRARY=$target/libkvtier.so
exec "$KVTIER_VLLM_DIR/venv/bin/python" "$here/run_e2e.py" --target "$target" --models "$KVTIER_VLLM_DIR" "$@"
