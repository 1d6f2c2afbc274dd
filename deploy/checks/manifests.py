"""Rendered manifests: the schemas of Kubernetes, what refers to what, and what the security of the default asks for."""

import json
import pathlib

import jsonschema
import kubernetes_validate
import yaml

HERE = pathlib.Path(__file__).resolve().parent
# The oldest version that Chart.yaml allows, and the newest whose schemas there are.
VERSIONS = ["1.29", "1.37"]
POD_MONITOR = json.loads((HERE / "podmonitor.schema.json").read_text(encoding="utf-8"))


def parse(rendered: dict[str, str]) -> list[dict]:
    """All objects of a rendering, without NOTES.txt."""
    texts = (text for path, text in sorted(rendered.items()) if path.endswith(".yaml"))
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def name(item: dict) -> str:
    """`Kind/name`."""
    return f"{item.get('kind')}/{item.get('metadata', {}).get('name')}"


def against_schemas(items: list[dict]) -> list[str]:
    """What the API server's schemas refuse, unknown fields included."""
    faults = []
    for item in items:
        if item.get("kind") == "PodMonitor":
            errors = jsonschema.Draft7Validator(POD_MONITOR).iter_errors(item)
            faults += [f"{name(item)}: {error.json_path}: {error.message}" for error in errors]
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(item, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                path = ".".join(map(str, getattr(error, "path", [])))
                faults.append(f"{name(item)} in {version}: {path}: {getattr(error, 'message', error)}")
    return faults


def pods(items: list[dict]) -> list[tuple[dict, dict]]:
    """Workloads with their pod templates."""
    return [(item, item["spec"]["template"]) for item in items if item["kind"] in ("DaemonSet", "Deployment")]


def matches(selector: dict, labels: dict) -> bool:
    """Whether labels fulfil a selector of equalities."""
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def references(items: list[dict]) -> list[str]:
    """Names that lead nowhere: selectors, ports, volumes, config maps, accounts."""
    faults = []
    templates = [template for _, template in pods(items)]
    have = {name(item) for item in items}
    for item, template in pods(items):
        if not matches(item["spec"]["selector"]["matchLabels"], template["metadata"]["labels"]):
            faults.append(f"{name(item)}: its selector is not of its own pods")
        faults += [f"{name(item)}: {fault}" for fault in pod_references(template["spec"], have)]
    for item in items:
        selector = selector_of(item)
        if selector is None:
            continue
        chosen = [each for each in templates if matches(selector, each["metadata"]["labels"])]
        if len(chosen) != 1:
            faults.append(f"{name(item)}: selects {len(chosen)} workloads")
            continue
        ports = {port["name"] for box in chosen[0]["spec"]["containers"] for port in box.get("ports", [])}
        faults += [f"{name(item)}: no port is called {port}" for port in named_ports(item) - ports]
    return faults


def selector_of(item: dict) -> dict | None:
    """The pods an object is about."""
    spec = item.get("spec", {})
    if item["kind"] == "Service":
        return spec["selector"]
    if item["kind"] == "NetworkPolicy":
        return spec["podSelector"]["matchLabels"]
    if item["kind"] in ("PodMonitor", "PodDisruptionBudget"):
        return spec["selector"]["matchLabels"]
    return None


def named_ports(item: dict) -> set[str]:
    """Ports an object calls by name."""
    spec = item["spec"]
    if item["kind"] == "Service":
        return {port["targetPort"] for port in spec["ports"]}
    if item["kind"] == "NetworkPolicy":
        return {port["port"] for rule in spec.get("ingress") or [] for port in rule["ports"]}
    return {each["port"] for each in spec.get("podMetricsEndpoints", [])}


def volume_references(spec: dict) -> list[str]:
    """Volumes of one pod, and what mounts them."""
    volumes = {each["name"] for each in spec.get("volumes", [])}
    boxes = spec["containers"] + spec.get("initContainers", [])
    mounted = {mount["name"] for box in boxes for mount in box.get("volumeMounts", [])}
    faults = [f"volume {each} is mounted and not there" for each in mounted - volumes]
    return faults + [f"volume {each} is there and not mounted" for each in volumes - mounted]


def pod_references(spec: dict, have: set[str]) -> list[str]:
    """Within one pod, and from it to other objects."""
    faults = volume_references(spec)
    wanted = {f"ServiceAccount/{spec['serviceAccountName']}"}
    for volume in spec.get("volumes", []):
        wanted |= {f"ConfigMap/{volume['configMap']['name']}"} if "configMap" in volume else set()
    faults += [f"{each} is not rendered" for each in wanted - have]
    for box in spec["containers"]:
        ports = {port["name"] for port in box["ports"]}
        probes = [box[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind in box]
        used = {(probe.get("httpGet") or probe.get("tcpSocket"))["port"] for probe in probes}
        faults += [f"container {box['name']}: no port is called {port}" for port in used - ports]
    return faults


def unprotected(items: list[dict]) -> list[str]:
    """Workloads that no NetworkPolicy is about."""
    policies = [selector_of(item) for item in items if item["kind"] == "NetworkPolicy"]
    open_ones = [item for item, template in pods(items)
                 if not any(matches(each, template["metadata"]["labels"]) for each in policies)]
    return [f"{name(item)}: anybody in the cluster reaches its ports" for item in open_ones]


def confined(items: list[dict]) -> list[str]:
    """What every profile promises."""
    faults = []
    for item, template in pods(items):
        spec = template["spec"]
        if spec.get("automountServiceAccountToken") is not False:
            faults.append(f"{name(item)}: has a service account's token")
        if spec.get("hostIPC") or spec.get("hostPID"):
            faults.append(f"{name(item)}: shares namespaces with its node")
        for box in spec["containers"] + spec.get("initContainers", []):
            context = box["securityContext"]
            grows = context.get("privileged") or context["allowPrivilegeEscalation"]
            if grows or not context["readOnlyRootFilesystem"]:
                faults.append(f"{name(item)}/{box['name']}: is not confined")
            if context["capabilities"]["drop"] != ["ALL"]:
                faults.append(f"{name(item)}/{box['name']}: keeps capabilities")
            if "memory" not in box["resources"]["limits"]:
                faults.append(f"{name(item)}/{box['name']}: its memory has no limit")
    return faults
