"""kvtier.toml and kv_connector_extra_config as rendered, against docs/CONFIG.md, the plugin and the daemon itself."""

import ast
import json
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
# Fields of docs/CONFIG.md that values.yaml does not have under `config`: all others can be set there.
OWNED = {
    # Node, directories and addresses follow from the pod, the directory's from `directory`, files from what is mounted.
    "": {"node_id", "run_dir", "data_dir"},
    "listen": {"grpc", "http"},
    "disk": {"dir"},
    "object": {"credentials_env"},
    "cluster": {"directory", "password_env", "listen", "advertise"},
    "transport": {"tcp_listen"},
    "rules": {"file"},
    # A ConfigMap is no place for secrets.
    "tenants": {"salt_key_file", "salts"},
    # For tests.
    "device": {"backend"},
}
SPANS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
SIZES = {f"{prefix}B": 1000**power for power, prefix in enumerate(["", "K", "M", "G", "T"])} | {
    f"{prefix}iB": 1024**power for power, prefix in enumerate(["K", "M", "G", "T"], 1)
}


def documented() -> dict[str, set[str]]:
    """Fields by table as docs/CONFIG.md lists them; top-level ones under the empty name. A row may name its table."""
    tables: dict[str, set[str]] = {}
    table = None
    for line in (ROOT / "docs/CONFIG.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = re.match(r"## `\[(\w+)\]`", line)
            table = heading[1] if heading else "" if line.startswith("## Top level") else None
        elif table is not None and (row := re.match(r"\| `(?:(\w+)\.)?(\w+)`", line)):
            tables.setdefault(row[1] or table, set()).add(row[2])
    return tables


def accepted() -> dict[str, set[str]]:
    """Fields by table as values.schema.json takes them below `config`."""
    schema = json.loads((ROOT / "deploy/helm/kvtier/values.schema.json").read_text(encoding="utf-8"))
    tables = schema["properties"]["config"]["properties"]
    return {name: set(table.get("items", table)["properties"]) for name, table in tables.items()}


def unsettable(known: dict[str, set[str]], taken: dict[str, set[str]]) -> list[str]:
    """Fields of the daemon that the chart neither takes nor owns, and those of the chart that the daemon does not have."""
    faults = []
    for table in sorted(known.keys() | taken.keys() | OWNED.keys()):
        has, takes, owns = (each.get(table, set()) for each in (known, taken, OWNED))
        faults += [f"[{table}] {field}: values.schema.json does not take it" for field in sorted(has - takes - owns)]
        faults += [f"[{table}] {field} is taken and owned" for field in sorted(takes & owns)]
        faults += [f"[{table}] {field} is not in docs/CONFIG.md" for field in sorted((takes | owns) - has)]
    return faults


def unknown_fields(text: str) -> list[str]:
    """Fields of a kvtier.toml that docs/CONFIG.md does not list."""
    try:
        config = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return [f"no TOML: {error}"]
    known = documented()
    faults = []
    for key, value in config.items():
        tables = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
        if not tables:
            faults += [] if key in known.get("", set()) else [f"{key} is not in docs/CONFIG.md"]
            continue
        for field in sorted({field for table in tables for field in table}):
            if field not in known.get(key, set()):
                faults.append(f"[{key}] {field} is not in docs/CONFIG.md")
    return faults


def config_map(items: list[dict]) -> dict[str, str]:
    """What the daemon finds in /etc/kvtier."""
    item = next(item for item in items if item["metadata"]["name"].endswith("-config"))
    return item.get("data") or item["stringData"]


def toml_of(items: list[dict]) -> str:
    """The rendered kvtier.toml."""
    return config_map(items)["kvtier.toml"]


def files_of(items: list[dict]) -> dict[str, str]:
    """Files of the pod that kvtier.toml names, by path; a key of salts is in a Secret, and any will do."""
    config = tomllib.loads(toml_of(items))
    keys = {tenant["salt_key_file"] for tenant in config.get("tenants", []) if "salt_key_file" in tenant}
    rules = {f"/etc/kvtier/{name}": text for name, text in config_map(items).items() if name != "kvtier.toml"}
    return dict.fromkeys(keys, "a key of some length") | rules


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
    named = {tenant["salt_key_file"] for tenant in config.get("tenants", []) if "salt_key_file" in tenant}
    faults += [f"{each} is not mounted" for each in sorted(named) if str(pathlib.PurePath(each).parent) not in mounts]
    rules = config.get("rules", {}).get("file")
    if {rules} - {None} != {f"/etc/kvtier/{name}" for name in config_map(items)} - {"/etc/kvtier/kvtier.toml"}:
        faults.append(f"rules.file is {rules}, /etc/kvtier has {sorted(config_map(items))}")
    env = {each["name"] for each in box["env"]}
    if ("NVIDIA_VISIBLE_DEVICES" in env) != (size(config.get("device", {}).get("memory", "0B")) > 0):
        faults.append("GPUs are visible and none is opened, or the other way round")
    wanted = {"KVTIER_NODE_ID", "KVTIER_ADVERTISE", *config.get("object", {}).get("credentials_env", [])}
    faults += [f"the environment lacks {each}" for each in sorted(wanted - env)]
    return faults


def plugin_defaults() -> dict[str, object]:
    """Keys of kv_connector_extra_config with their defaults: the annotated fields of the plugin's class Config."""
    tree = ast.parse((ROOT / "python/kvtier/config.py").read_text(encoding="utf-8"))
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    return {node.target.id: ast.literal_eval(node.value) for node in config.body if isinstance(node, ast.AnnAssign)}


def plugin_faults(text: str) -> list[str]:
    """Where docs/CONFIG.md has other keys or defaults than the plugin."""
    _, _, section = text.partition("## The vLLM plugin")
    told = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section.partition("\n## ")[0], flags=re.M))
    have = plugin_defaults()
    faults = [f"docs/CONFIG.md and the plugin do not both have {key}" for key in sorted(told.keys() ^ have.keys())]
    for key in sorted(told.keys() & have.keys()):
        # An empty text stands for what is looked up elsewhere, which no literal could say.
        if have[key] != "" and told[key] != f"`{json.dumps(have[key])}`":
            faults.append(f"docs/CONFIG.md says {told[key]} of {key}, the plugin {json.dumps(have[key])}")
    return faults


def transfer_config(value: dict, socket: str) -> list[str]:
    """vLLM's --kv-transfer-config, against the plugin."""
    extra = value.get("kv_connector_extra_config", {})
    faults = [f"the plugin knows no {key}" for key in sorted(extra.keys() - plugin_defaults().keys())]
    faults += [] if extra.get("socket") == socket else [f"socket is {extra.get('socket')}, the daemon's {socket}"]
    faults += [] if value.get("kv_connector") == "KvTierConnector" else ["kv_connector"]
    faults += [] if value.get("kv_load_failure_policy") == "recompute" else ["a lost block would fail requests"]
    module = value.get("kv_connector_module_path", "").replace(".", "/")
    faults += [] if (ROOT / "python" / f"{module}.py").is_file() else [f"no module {module}"]
    return faults


def refused_by_daemon(text: str, files: dict[str, str]) -> list[str]:
    """What `kvtierd --check` says, where KVTIERD names a built one. It finds `files` elsewhere than in their pod."""
    if "KVTIERD" not in os.environ:
        return []
    with tempfile.TemporaryDirectory() as folder:
        for number, (path, content) in enumerate(files.items()):
            place = pathlib.Path(folder) / str(number)
            place.write_text(content, encoding="utf-8")
            text = text.replace(json.dumps(path), json.dumps(str(place)))
        file = pathlib.Path(folder) / "kvtier.toml"
        file.write_text(text, encoding="utf-8")
        env = {"PATH": os.environ["PATH"], "KVTIER_NODE_ID": "node-1", "KVTIER_ADVERTISE": "10.0.0.5",
               "S3_ACCESS_KEY": "a", "S3_SECRET_KEY": "b"}
        command = [os.environ["KVTIERD"], "--config", str(file), "--check"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    return [] if done.returncode == 0 else [done.stderr.strip()]
