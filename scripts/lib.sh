# Shared by the scripts of this folder; sourced, from any directory.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1

# Python with vLLM, and the directory of the tiny models: found by `need_vllm`.
VLLM_DIR=
VLLM_PYTHON=
# The same Python with the agents' libraries before it; empty without them.
AGENTS_PYTHON=

say() { printf '%s\n' "== $*" >&2; }
die() { printf '%s\n' "kvtier: $*" >&2; exit 1; }

# True when the user asked to do without $1: KVTIER_SKIP=s3,vllm
skipped() { case ",${KVTIER_SKIP:-}," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

# Runs a command as root, directly or through sudo; fails when neither is possible.
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo > /dev/null && sudo -n true 2> /dev/null; then sudo "$@"
  elif command -v sudo > /dev/null && [ -t 0 ]; then sudo "$@"
  else return 1
  fi
}

# The shared libraries and binaries of everyday work (dev profile).
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}

# Makes the Python environment with real vLLM and the tiny models, once: a few minutes and 6 GB, kept in KVTIER_CACHE
# (~/.cache/kvtier).
need_vllm() {
  [ -f tests/vllm/setup.sh ] || { say "tests/vllm/setup.sh is not there"; return 1; }
  VLLM_DIR=$(bash tests/vllm/setup.sh) || return 1
  VLLM_PYTHON=$VLLM_DIR/venv/bin/python
  [ -x "$VLLM_PYTHON" ]
}

# Adds LangChain, LangGraph and LlamaIndex, once, beside vLLM's environment: tests of agents skip without them.
want_agents() {
  skipped agents && { say "no libraries of agents: KVTIER_SKIP"; return 0; }
  AGENTS_PYTHON=$(bash tests/vllm/setup_agents.sh) || { AGENTS_PYTHON=; say "the agents' libraries could not be installed"; }
}
