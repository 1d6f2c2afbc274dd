#!/usr/bin/env bash
# Every test of this repository, and one closing line: N passed, N failed, N skipped.
#
#   KVTIER_SKIP=s3,vllm make test     does without the S3 server or without vLLM; what was skipped is said (also: agents)
#   scripts/test.sh rust python       only these suites, of: rust (with the C test) python device vllm
#
# A suite writes RESULTS/<suite>.log (and .xml), its exit code to .rc; scripts/summarize.py counts.
set -uo pipefail
. "$(dirname "$0")/lib.sh"

RESULTS=$TARGET/test-results
rm -rf "$RESULTS"
mkdir -p "$RESULTS"
SUITES=${*:-rust python device vllm}
S3_DIR=

cleanup() {
  if [ -n "$S3_DIR" ]; then
    bash tests/s3/ceph-radosgw.sh stop "$S3_DIR"
    rm -rf "$S3_DIR"
  fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# Runs a suite's command, shows and keeps its output.
suite() {
  local name=$1
  shift
  say "tests: $name"
  "$@" < /dev/null 2>&1 | tee "$RESULTS/$name.log"
  echo "${PIPESTATUS[0]}" > "$RESULTS/$name.rc"
}

# Notes that a whole suite was not run.
skip() { printf 'SKIPPED: %s\n' "$2" > "$RESULTS/$1.log"; echo skipped > "$RESULTS/$1.rc"; }
# Notes that a suite could not be run though it was to.
broken() { printf 'cannot run: %s\n' "$2" | tee "$RESULTS/$1.log"; echo 1 > "$RESULTS/$1.rc"; }

# A real S3 server for the object tier; without it those tests say that they were skipped.
start_s3() {
  skipped s3 && { say "no S3 server: KVTIER_SKIP"; return 0; }
  bash scripts/install-deps.sh s3 || return 1
  # A short path: the server's sockets lie below it.
  S3_DIR=$(mktemp -d /tmp/kvtier-s3.XXXXXX)
  bash tests/s3/ceph-radosgw.sh start "$S3_DIR" > "$RESULTS/s3-server.txt" 2>&1 || { tail -5 "$RESULTS/s3-server.txt"; return 1; }
  . "$S3_DIR/env"
}

# A real directory, and UCX: without them their tests say that they were skipped.
need_cluster() {
  skipped cluster && { say "no directory server: KVTIER_SKIP"; return 0; }
  bash scripts/install-deps.sh cluster
}

rust() {
  need_cluster || broken cluster "the directory server could not be installed; KVTIER_SKIP=cluster does without"
  start_s3 || broken s3-server "the S3 server did not start; KVTIER_SKIP=s3 does without"
  # Benchmarks are built by `make bench`.
  local targets=(--workspace --locked --lib --bins --tests --examples)
  # The later suites open programs and libraries that running tests alone does not make, or leaves as they were.
  cargo build "${targets[@]}" || { broken rust "it does not build: see above"; return; }
  if cargo nextest --version > /dev/null 2>&1; then
    local report=$TARGET/nextest/default/junit.xml
    rm -f "$report"
    suite rust cargo nextest run "${targets[@]}" --no-fail-fast
    [ -f "$report" ] && cp "$report" "$RESULTS/rust.xml"
  else
    suite rust cargo test "${targets[@]}" --no-fail-fast -- --show-output
  fi
}

python_() {
  skipped vllm && { skip python "KVTIER_SKIP"; return; }
  need_vllm || { broken python "the vLLM environment could not be made; KVTIER_SKIP=vllm does without"; return; }
  [ -n "$(ls python/tests/test_*.py 2> /dev/null)" ] || { skip python "python/tests holds no test"; return; }
  want_agents
  export KVTIER_LIBRARY=$TARGET/debug/libkvtier.so PYTHONPATH=$ROOT/python
  local interpreter=${AGENTS_PYTHON:-$VLLM_PYTHON}
  if "$interpreter" -c 'import pytest' 2> /dev/null; then
    suite python "$interpreter" -m pytest -q -rs -p no:cacheprovider python/tests
  else
    suite python "$interpreter" -m unittest discover -v -s python/tests -t python/tests
  fi
}

# An engine in PyTorch on the device tier, over host memory that stands for a GPU's; scripts/gpu-check.sh does it on one.
device() {
  skipped vllm && { skip device "KVTIER_SKIP"; return; }
  need_vllm || { broken device "the vLLM environment could not be made; KVTIER_SKIP=vllm does without"; return; }
  export KVTIER_LIBRARY=$TARGET/debug/libkvtier.so PYTHONPATH=$ROOT/python
  local options=(--bin "$TARGET/debug" --backend twin --small --only stories --out "$RESULTS/device.json")
  suite device "$VLLM_PYTHON" tests/gpu/check.py "${options[@]}"
}

vllm() {
  skipped vllm && { skip vllm "KVTIER_SKIP"; return; }
  [ -f tests/vllm/run_e2e.sh ] || { skip vllm "tests/vllm/run_e2e.sh is not there"; return; }
  need_vllm || { broken vllm "the vLLM environment could not be made; KVTIER_SKIP=vllm does without"; return; }
  [ "$(cat "$RESULTS/rust.rc" 2> /dev/null)" = 0 ] && export KVTIER_BUILT=1
  want_agents
  KVTIER_VLLM_DIR=$VLLM_DIR suite vllm bash tests/vllm/run_e2e.sh
}

for name in $SUITES; do
  case $name in
    # What the later suites open is built first: a failed build fails here.
    rust) rust ;;
    python) python_ ;;
    device) device ;;
    vllm) vllm ;;
    *) die "no such suite: $name (rust python device vllm)" ;;
  esac
done
python3 scripts/summarize.py "$RESULTS"
