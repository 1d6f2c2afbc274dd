#!/usr/bin/env bash
# A cluster of kvtierd nodes and real vLLM engines on this machine: see demo_cluster.py for what is shown.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

bash scripts/install-deps.sh s3 cluster
say "building kvtierd, kvtier and libkvtier.so"
cargo build --locked -p kvtierd -p kvtier-cli -p kvtier-connector-ffi
need_vllm || die "the vLLM environment could not be made: see above"
[ -f tests/vllm/env.sh ] && . tests/vllm/env.sh
KVTIER_LIBRARY=$TARGET/debug/libkvtier.so exec "$VLLM_PYTHON" scripts/demo_cluster.py \
  --target "$TARGET/debug" --model "$VLLM_DIR/tiny-llama"
