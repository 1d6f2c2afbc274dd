#!/bin/bash
# Makes, once, a Python environment with LangChain, LangGraph and LlamaIndex on top of vLLM's, which it leaves as it is:
# a minute and about 150 MB, in the directory that setup.sh printed, as `agents`. Says where its Python is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
home=$(bash "$here/setup.sh")
marker="$home/agents/complete-$(cat "$here/setup_agents.sh" | sha256sum | cut -c1-16)"
exec 9>"$home/lock-agents"
flock 9
if [ ! -e "$marker" ]; then
    rm -rf "$home/agents"
    "$home/venv/bin/python" -m venv "$home/agents"
    site=$("$home/agents/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # What vLLM's environment has is found there; what is installed here comes before it.
    "$home/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/vllm.pth"
    # LlamaIndex's client needs an `openai` below 3.
    "$home/agents/bin/python" -m pip install -q --disable-pip-version-check \
        langchain==1.5.0 langchain-core==1.8.3 langchain-openai==1.7.4 langgraph==1.2.22 openai==2.54.0 \
        llama-index-core==0.14.25 llama-index-llms-openai==0.8.3 llama-index-llms-openai-like==0.8.1 >&2
    touch "$marker"
fi
echo "$home/agents/bin/python"
