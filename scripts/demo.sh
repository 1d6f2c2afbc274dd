#!/usr/bin/env bash
# kvtierd and real vLLM engines (CPU, a tiny model) on this machine: see demo.py for what is shown.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

say "building kvtierd, kvtier and libkvtier.so"
cargo build --locked -p kvtierd -p kvtier-cli -p kvtier-connector-ffi
need_vllm || die "the vLLM environment could not be made: see above"
[ -f tests/vllm/env.sh ] && . tests/vllm/env.sh
KVTIER_LIBRARY=$TARGET/debug/libkvtier.so exec "$VLLM_PYTHON" scripts/demo.py --target "$TARGET/debug" --model "$VLLM_DIR/tiny-llama"
