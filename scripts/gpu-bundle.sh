#!/usr/bin/env bash
# Builds what scripts/gpu-check.sh runs on a GPU machine into gpu-bundle/: `gpu-bundle.sh [dev|release]`, release by default.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

profile=${1:-release}
folder=$([ "$profile" = dev ] && echo debug || echo "$profile")
bundle=$ROOT/gpu-bundle
cargo build --locked --profile "$profile" -p kvtierd -p kvtier-cli -p kvtier-connector-ffi
cargo build --locked --profile "$profile" -p kvtier-benches --bin kvtier-gpu-bench
tests=$(cargo test --locked --profile "$profile" -p kvtier-device --lib --no-run --message-format=json |
  python3 -c 'import json, sys; print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])')
rm -rf "$bundle" && mkdir -p "$bundle"
cp "$TARGET/$folder"/{kvtierd,kvtier,kvtier-gpu-bench,libkvtier.so} "$bundle/"
cp "$tests" "$bundle/device-tests"
strip "$bundle"/*
say "$(du -sh "$bundle" | cut -f1) in gpu-bundle: carry it with the tree, then scripts/gpu-check.sh"
