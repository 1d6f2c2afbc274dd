"""Values that must render, values that must be refused, and values that render what Kubernetes must refuse."""

import copy

EVERYTHING = {
    "config": {
        "listen": {"socket_mode": "0660"},
        "device": {"memory": "4GiB", "reserve": "2GiB", "extent": "128MiB", "bandwidth": "10GB"},
        "host": {"capacity": "10 GB"},
        "disk": {"segment": "128MiB", "io": "threads", "depth": 8, "direct": False, "write_rate": "200MB"},
        "object": {
            "enabled": True,
            "url": "s3://kv-blocks",
            "endpoint": "https://s3.example.com",
            "region": "eu-1",
            "write": "all",
            "list_every": "1m",
            "capacity": "2TiB",
            "cluster_capacity": "20TiB",
            "prefix": "team-a",
            "allow_http": False,
        },
        "transport": {"order": ["ucx", "tcp"], "tcp_streams": 8, "ucx_library": "", "ucx_net_devices": "mlx5_0:1"},
        "offload": {"mode": "watermark", "high_watermark_percent": 70, "max_in_flight": 8, "max_onboards_in_flight": 8},
        "eviction": {"policy": "s3fifo", "guard": False},
        "claims": {"node_share_percent": 40, "owner_share_percent": 10, "max_ttl": "12h", "max_claims": 100, "max_blocks": 524288},
        "programs": {"prefetch": False, "prefetch_share_percent": 5, "replicate": False},
        "hints": {"trust": "all", "max_ttl": "720h", "store": "1MiB"},
        "operators": {"uids": [1000]},
        "tenants": [{"id": "team-a", "uids": [2001, 2002], "salt_digests": ["9b1c" * 16]}, {"id": "team-b", "uids": [2003]}],
        "limits": {"lookup": "2s", "lease_ttl": "30s", "reserve_ttl": "1m", "attachment_ttl": "15s", "drain": "1500ms"},
    },
    "rules": '''  # A comment to begin with, and "quotes".
[[rule]]
name = "tool results are short-lived"
when = { type = "TOOL_RESULT", tenant = "team-*" }
then = { ttl = "10m", tiers = ["host", "disk"], priority = 10 }
''',
    "saltKeySecret": {"name": "kv-salts"},
    "gpu": {"visible": True},
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
    "another scheme of a cluster": {"directory": {"kind": "external", "url": "valkey+cluster://h1:6379,h2"}},
    "a url that ends with a stroke": {"directory": {"kind": "external", "url": "redis://[::1]:6379/"}},
    "embedded directory": {"directory": {"kind": "embedded"}},
    "everything": EVERYTHING,
    "host network": {"network": {"hostNetwork": True}, "networkPolicy": {"enabled": False}},
    "no policy, open control plane": {"network": {"controlPlane": True}, "networkPolicy": {"enabled": False}},
    "rules only": {"rules": "# None: nothing is decided.\n"},
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
    "a number of a database": ({"directory": {"kind": "external", "url": "redis://host:6379/0"}}, "url"),
    "several servers that are no cluster": ({"directory": {"kind": "external", "url": "redis://a:1,b:1"}}, "url"),
    "a password of the bundled directory": ({"directory": {"passwordSecret": {"name": "valkey"}}}, "passwordSecret"),
    "a password of no directory": (
        {"directory": {"kind": "embedded", "passwordSecret": {"name": "valkey"}}}, "passwordSecret"),
    "an external directory without url": ({"directory": {"kind": "external"}}, "url"),
    "a url that is not used": ({"directory": {"kind": "bundled", "url": "redis://a:1"}}, "url"),
    "a password in the URL": ({"directory": {"kind": "external", "url": "redis://u:p@h:1"}}, "passwordSecret"),
    "capabilities without root": ({"security": {"addCapabilities": ["IPC_LOCK"]}}, "uid"),
    "a capability that is too much": ({"security": {"uid": 0, "addCapabilities": ["SYS_ADMIN"]}}, "addCapabilities"),
    "a relative path": ({"run": {"hostPath": "run/kvtier"}}, "hostPath"),
    "a port out of range": ({"network": {"ports": {"peer": 70000}}}, "peer"),
    "a policy that host networking ignores": ({"network": {"hostNetwork": True}}, "hostNetwork"),
    "users whom the sockets keep out": ({"config": {"operators": {"uids": [1000]}}}, "socket_mode"),
    "tenants whom the sockets keep out": (
        {"config": {"listen": {"socket_mode": "0711"}, "tenants": [{"id": "a", "uids": [1000]}]}}, "socket_mode"),
    "a mode that keeps the daemon out": ({"config": {"listen": {"socket_mode": "0466"}}}, "socket_mode"),
    "salts in a ConfigMap": ({"config": {"tenants": [{"id": "a", "salts": ["secret"]}]}}, "salts"),
    "digests without their key": ({"config": {"tenants": [{"id": "a", "salt_digests": ["00" * 32]}]}}, "saltKeySecret"),
    "rules named and not given": ({"config": {"rules": {"file": "/etc/rules.toml"}}}, "rules"),
    "a policy of eviction that there is not": ({"config": {"eviction": {"policy": "fifo"}}}, "policy"),
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
