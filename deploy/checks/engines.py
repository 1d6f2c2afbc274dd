"""Pods of engines: what vLLM needs beside the volumes to start as the daemon's user, and to use the plugin."""

# As args have them, and as texts tell people to write them.
ARGUMENTS = ["--prefix-caching-hash-algo=sha256_cbor", "--kv-transfer-config $(KV_TRANSFER_CONFIG)"]


def box_of(spec: dict) -> dict | None:
    """The container that attaches to a daemon: the one that is given its connection."""
    boxes = [box for box in spec["containers"] if "KV_TRANSFER_CONFIG" in environment(box)]
    return boxes[0] if boxes else None


def environment(box: dict) -> dict[str, dict]:
    """A container's variables by name."""
    return {each["name"]: each for each in box.get("env", [])}


def home_faults(spec: dict) -> list[str]:
    """A user without an entry in passwd has `/` as its home, and no name: vLLM ends at its start then."""
    box = box_of(spec)
    if box is None:
        return ["no container has KV_TRANSFER_CONFIG"]
    env = {name: each.get("value") for name, each in environment(box).items()}
    writable = {mount["mountPath"]: mount["name"] for mount in box["volumeMounts"] if not mount.get("readOnly")}
    empty = {volume["name"] for volume in spec["volumes"] if "emptyDir" in volume}
    faults = [] if env.get("USER") else ["USER is not set"]
    return faults + ([] if writable.get(env.get("HOME")) in empty else [f"HOME is {env.get('HOME')}: no directory to write"])


def connection_faults(spec: dict, name: str, keys: set[str]) -> list[str]:
    """The variable comes from the ConfigMap of the chart."""
    box = box_of(spec)
    source = environment(box)["KV_TRANSFER_CONFIG"]["valueFrom"]["configMapKeyRef"] if box else {}
    found = source.get("name") == name and source.get("key") in keys
    return [] if found else [f"KV_TRANSFER_CONFIG comes from {source}"]


def told_faults(what: str, text: str) -> list[str]:
    """Where people read what they must write: the arguments, word by word."""
    return [f"{what} does not name {each}" for each in ARGUMENTS if each not in text]


def whole_faults(spec: dict) -> list[str]:
    """A whole pod: its home, its arguments, and the time it has to load a model."""
    box = box_of(spec) or {}
    words = " ".join(map(str, box.get("args", [])))
    faults = home_faults(spec) + [f"args lack {each}" for each in ARGUMENTS if each not in words]
    start = box.get("startupProbe", {})
    patience = start.get("periodSeconds", 10) * start.get("failureThreshold", 3)
    if "livenessProbe" in box and patience < 1800:
        faults.append(f"its liveness probe ends it after {patience} s, while it loads: no startupProbe of half an hour")
    return faults
