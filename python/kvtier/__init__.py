"""vLLM plugin of kvtier: a KV connector over the C ABI of `libkvtier.so`.

Use it with `--kv-transfer-config '{"kv_connector": "KvTierConnector", "kv_connector_module_path": "kvtier.connector",
"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'`.
"""

__version__ = "0.1.0"
