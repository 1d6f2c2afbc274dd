#!/usr/bin/env bash
# kvtierd in the foreground: `run.sh [config.toml]`. Without one, a small cache below target/run.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

cargo build --locked -p kvtierd -p kvtier-cli
config=${1:-}
if [ -z "$config" ]; then
  here=$TARGET/run
  mkdir -p "$here"
  config=$here/kvtier.toml
  cat > "$config" <<C
run_dir = "$here"
data_dir = "$here/data"
[host]
capacity = "1GiB"
extent = "64MiB"
[disk]
capacity = "4GiB"
C
  say "socket: $here/kvtierd.sock    ask it: KVTIER_ADDRESS=unix://$here/kvtierd.sock target/debug/kvtier status"
fi
exec "$TARGET/debug/kvtierd" --config "$config"
