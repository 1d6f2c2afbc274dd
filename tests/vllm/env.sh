# Source this before running vLLM on a machine without a GPU.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_PLUGINS=""
# GiB of KV cache; no core pinning, so that several engines can share a few cores.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_CPU_OMP_THREADS_BIND=nobind
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
