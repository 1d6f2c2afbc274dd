#!/usr/bin/env bash
# Builds the vLLM plugin as a wheel, with a release build of libkvtier.so inside.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

cargo build --release --locked -p kvtier-connector-ffi
venv=$TARGET/wheel-venv
[ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
KVTIER_LIBRARY=$TARGET/release/libkvtier.so "$venv/bin/pip" wheel --quiet --no-deps --wheel-dir python/dist ./python
ls -l python/dist/*.whl
