"""Values that must render, values that must be refused, and values that render what Kubernetes must refuse."""

import copy

EVERYTHING = {
    "config": {
        "host": {"capacity": "10 GB"},
        "disk": {"segment": "128MiB", "io": "threads", "depth": 8, "direct": False},
        "object": {
            "enabled": True,
            "url": "s3://kv-blocks",
            "endpoint": "https://s3.example.com",
            "region": "eu-1",
            "write": "all",
            "capacity": "2TiB",
            "cluster_capacity": "20TiB",
            "prefix": "team-a",
            "allow_http": False,
        },
        "transport": {"order": ["ucx", "tcp"], "tcp_streams": 8, "ucx_library": "", "ucx_net_devices": "mlx5_0:1"},
        "offload": {"mode": "watermark", "high_watermark_percent": 70, "max_in_flight": 8, "max_onboards_in_flight": 8},
        "limits": {"lookup": "2s", "lease_ttl": "30s", "reserve_ttl": "1m", "attachment_ttl": "15s", "drain": "1500ms"},
    },
    "objectStore": {"credentialsSecret": {"name": "kv-s3"}},
    "data": {"kind": "ephemeral", "ephemeral": {"storageClassName": "local-nvme", "size": "100Gi"}},
    "network": {"controlPlane": True, "bind": "[::]"},
    "networkPolicy": {
        "enabled": True,
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "controlFrom": [{"podSelector": {"matchLabels": {"app": "operator"}}}],
    },
    "podMonitor": {"mode": "always", "labels": {"release": "prometheus"}},
    "podDisruptionBudget": {"enabled": True, "minAvailable": 3},
    "connection": {"extraConfig": {"lookup_timeout_ms": 300, "async_load": True}},
    "cpu": {"limit": "4"},
    "security": {"seLinuxOptions": {"type": "spc_t"}},
    "image": {"pullSecrets": [{"name": "registry"}]},
    "podAnnotations": {"example.com/a": "b"},
    "podLabels": {"team": "a"},
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]}}},
    "updateStrategy": {"maxUnavailable": "10%"},
    "directory": {"bundled": {"maxMemory": "4GiB", "nodeSelector": {"role": "infra"},
                              "tolerations": [{"key": "infra", "operator": "Exists"}]}},
}

# Beside the profiles in files (values.yaml alone, values-gpu-rdma.yaml).
GOOD = {
    "external valkey": {"directory": {"kind": "external", "url": "valkey://valkey.infra:6379"}},
    "external cluster with a password": {
        "directory": {"kind": "external", "url": "redis+cluster://h1:6379,h2:6379", "passwordSecret": {"name": "valkey"}},
    },
    "embedded directory": {"directory": {"kind": "embedded"}, "networkPolicy": {"enabled": True}},
    "everything": EVERYTHING,
    "host network": {"network": {"hostNetwork": True}},
}

# Values, and what the refusal must name.
BAD = {
    "an unknown value": ({"imagge": {}}, "imagge"),
    "an unknown field of kvtier.toml": ({"config": {"host": {"capacty": "1GiB"}}}, "capacty"),
    "a field the chart sets": ({"config": {"run_dir": "/tmp"}}, "run_dir"),
    "a size without a unit": ({"config": {"host": {"capacity": "64"}}}, "capacity"),
    "a size as a number": ({"config": {"host": {"capacity": 64}}}, "capacity"),
    "a drain without a unit": ({"config": {"limits": {"drain": "60"}}}, "drain"),
    "an unknown transport": ({"config": {"transport": {"order": ["rdma"]}}}, "order"),
    "another scheme of the directory": ({"directory": {"kind": "external", "url": "http://valkey"}}, "url"),
    "an external directory without url": ({"directory": {"kind": "external"}}, "url"),
    "a url that is not used": ({"directory": {"kind": "bundled", "url": "redis://a:1"}}, "url"),
    "a password in the URL": ({"directory": {"kind": "external", "url": "redis://u:p@h:1"}}, "passwordSecret"),
    "capabilities without root": ({"security": {"addCapabilities": ["IPC_LOCK"]}}, "uid"),
    "a capability that is too much": ({"security": {"uid": 0, "addCapabilities": ["SYS_ADMIN"]}}, "addCapabilities"),
    "a relative path": ({"run": {"hostPath": "run/kvtier"}}, "hostPath"),
    "a port out of range": ({"network": {"ports": {"peer": 70000}}}, "peer"),
    "a policy that host networking ignores": (
        {"network": {"hostNetwork": True}, "networkPolicy": {"enabled": True}}, "hostNetwork"),
    "a second socket": ({"connection": {"extraConfig": {"socket": True}}}, "socket"),
    "an object store that is no bucket": ({"config": {"object": {"url": "/data"}}}, "url"),
}

# Values that the chart cannot judge: the schemas of Kubernetes must.
BROKEN = {
    "a toleration whose key is a number": {"tolerations": [{"key": 1}]},
    "an affinity of an unknown kind": {"affinity": {"nodeAffinityy": {}}},
    "a network peer of an unknown kind": {"networkPolicy": {"enabled": True, "metricsFrom": [{"pods": {}}]}},
}


def merged(base: dict, over: dict) -> dict:
    """`base` with the fields of `over`, map by map, as Helm merges values."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
