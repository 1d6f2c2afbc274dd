"""kvtier.toml and kv_connector_extra_config as rendered, against docs/CONFIG.md, the plugin and the daemon itself."""

import ast
import os
import pathlib
import re
import subprocess
import tempfile

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPANS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
SIZES = {f"{prefix}B": 1000**power for power, prefix in enumerate(["", "K", "M", "G", "T"])} | {
    f"{prefix}iB": 1024**power for power, prefix in enumerate(["K", "M", "G", "T"], 1)
}


def documented() -> dict[str, set[str]]:
    """Fields by table as docs/CONFIG.md lists them; top-level ones under the empty name."""
    tables: dict[str, set[str]] = {}
    table = None
    for line in (ROOT / "docs/CONFIG.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = re.match(r"## `\[(\w+)\]`", line)
            table = heading[1] if heading else "" if line.startswith("## Top level") else None
        elif table is not None and (row := re.match(r"\| `(\w+)`", line)):
            tables.setdefault(table, set()).add(row[1])
    return tables


def unknown_fields(text: str) -> list[str]:
    """Fields of a kvtier.toml that docs/CONFIG.md does not list."""
    try:
        config = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return [f"no TOML: {error}"]
    known = documented()
    faults = []
    for key, value in config.items():
        if not isinstance(value, dict):
            faults += [] if key in known.get("", set()) else [f"{key} is not in docs/CONFIG.md"]
            continue
        for field in value:
            if field not in known.get(key, set()):
                faults.append(f"[{key}] {field} is not in docs/CONFIG.md")
    return faults


def toml_of(items: list[dict]) -> str:
    """The rendered kvtier.toml."""
    kinds = (item for item in items if item["metadata"]["name"].endswith("-config"))
    item = next(kinds)
    return (item.get("data") or item["stringData"])["kvtier.toml"]


def seconds(text: str) -> float:
    """Of a duration as kvtier.toml writes it."""
    number, unit = re.fullmatch(r"(\d+) ?(\w+)", text).groups()
    return int(number) * SPANS[unit]


def size(text: str) -> int:
    """Bytes of a size of kvtier.toml or a quantity of Kubernetes."""
    number, unit = re.fullmatch(r"(\d+) ?(\w+)", text).groups()
    return int(number) * SIZES[unit + "B" if unit in ("Ki", "Mi", "Gi", "Ti") else unit]


def agreement(items: list[dict]) -> list[str]:
    """Where the pod and its kvtier.toml must fit together."""
    config = tomllib.loads(toml_of(items))
    spec = next(item for item in items if item["kind"] == "DaemonSet")["spec"]["template"]["spec"]
    box = spec["containers"][0]
    faults = []
    if spec["terminationGracePeriodSeconds"] <= seconds(config["limits"]["drain"]) + 5:
        faults.append("the grace period does not outlast limits.drain")
    limits = box["resources"]["limits"]
    room = size(limits["memory"])
    capacity = size(config["host"]["capacity"])
    if "hugepages-2Mi" in limits:
        faults += [] if size(limits["hugepages-2Mi"]) >= capacity else ["huge pages do not hold host.capacity"]
        faults += [] if config["host"]["pages"] == "huge" else ["huge pages are asked for and not used"]
    elif room < capacity + (256 << 20):
        faults.append("the memory limit leaves nothing beside host.capacity")
    ports = {port["name"]: port["containerPort"] for port in box["ports"]}
    told = {"grpc": config["listen"].get("grpc"), "http": config["listen"].get("http"),
            "peer": config["cluster"].get("listen"), "data": config.get("transport", {}).get("tcp_listen")}
    for name, address in told.items():
        if (int(address.rpartition(":")[2]) if address else None) != ports.get(name):
            faults.append(f"port {name} of the pod is {ports.get(name)}, of kvtier.toml {address}")
    mounts = {mount["mountPath"] for mount in box["volumeMounts"]}
    faults += [f"{each} is not mounted" for each in (config["run_dir"], config["data_dir"]) if each not in mounts]
    env = {each["name"] for each in box["env"]}
    wanted = {"KVTIER_NODE_ID", "KVTIER_ADVERTISE", *config.get("object", {}).get("credentials_env", [])}
    faults += [f"the environment lacks {each}" for each in sorted(wanted - env)]
    return faults


def plugin_keys() -> set[str]:
    """Keys of kv_connector_extra_config: the annotated fields of the plugin's class Config."""
    tree = ast.parse((ROOT / "python/kvtier/config.py").read_text(encoding="utf-8"))
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    return {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}


def transfer_config(value: dict, socket: str) -> list[str]:
    """vLLM's --kv-transfer-config, against the plugin."""
    extra = value.get("kv_connector_extra_config", {})
    faults = [f"the plugin knows no {key}" for key in sorted(set(extra) - plugin_keys())]
    faults += [] if extra.get("socket") == socket else [f"socket is {extra.get('socket')}, the daemon's {socket}"]
    faults += [] if value.get("kv_connector") == "KvTierConnector" else ["kv_connector"]
    faults += [] if value.get("kv_load_failure_policy") == "recompute" else ["a lost block would fail requests"]
    module = value.get("kv_connector_module_path", "").replace(".", "/")
    faults += [] if (ROOT / "python" / f"{module}.py").is_file() else [f"no module {module}"]
    return faults


def refused_by_daemon(text: str) -> list[str]:
    """What `kvtierd --check` says, where KVTIERD names a built one."""
    if "KVTIERD" not in os.environ:
        return []
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        env = {"PATH": os.environ["PATH"], "KVTIER_NODE_ID": "node-1", "KVTIER_ADVERTISE": "10.0.0.5",
               "S3_ACCESS_KEY": "a", "S3_SECRET_KEY": "b"}
        command = [os.environ["KVTIERD"], "--config", file.name, "--check"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    return [] if done.returncode == 0 else [done.stderr.strip()]
