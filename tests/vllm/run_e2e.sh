#!/usr/bin/env bash
# Real vLLM engines against a real kvtierd: see run_e2e.py. KVTIER_VLLM_DIR is what setup.sh printed. With KVTIER_BUILT
# the binaries are taken as they are: a build of these packages alone has other features than one of the workspace, and
# would compile most of it again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}/debug
[ -n "${KVTIER_BUILT:-}" ] || (cd "$root" && cargo build --locked -q -p kvtierd -p kvtier-cli -p kvtier-connector-ffi)
. "$here/env.sh"
export KVTIER_LIBRARY=$target/libkvtier.so
exec "$KVTIER_VLLM_DIR/venv/bin/python" "$here/run_e2e.py" --target "$target" --models "$KVTIER_VLLM_DIR" "$@"
