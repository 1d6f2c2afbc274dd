"""Renders the chart with Helm's own code and checks everything below deploy/. Ends with 1 when something is wrong."""

import copy
import json
import os
import pathlib
import sys

import helm_python
import yaml

from . import cases, engines, image, manifests, settings, texts
from .report import Report

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/kvtier"


def render(chart: helm_python.Chart, values: dict) -> list[dict]:
    """Objects of a release; raises HelmError where values.schema.json or a template refuses."""
    chart.validate_schema(values)
    rendered = chart.render(values, name="kvtier", namespace="kv")
    notes = engines.told_faults("NOTES.txt", rendered["kvtier/templates/NOTES.txt"])
    if notes:
        raise helm_python.HelmRenderError("; ".join(notes))
    return manifests.parse(rendered)


def profiles() -> dict[str, dict]:
    """Values that must work."""
    gpu = yaml.safe_load((CHART / "values-gpu-rdma.yaml").read_text(encoding="utf-8"))
    return {"values.yaml": {}, "values-gpu-rdma.yaml": gpu, **cases.GOOD}


def check_lint(report: Report) -> None:
    """`helm lint --strict` for the oldest and the newest Kubernetes."""
    faults = []
    for version in manifests.VERSIONS:
        found = helm_python.lint(CHART, {}, strict=True, kube_version=f"v{version}.0")
        faults += found["errors"] + [each["error"] for each in found["messages"] if each["severity"] >= 2]
    report.group("helm lint --strict", faults, len(manifests.VERSIONS))


def check_profile(report: Report, what: str, items: list[dict]) -> None:
    """One rendering, from every side."""
    connection = next(item for item in items if item["metadata"]["name"].endswith("-connection"))["data"]
    text = settings.toml_of(items)
    faults = manifests.against_schemas(items) + manifests.references(items) + manifests.confined(items)
    faults += settings.unknown_fields(text) + settings.agreement(items)
    faults += settings.transfer_config(json.loads(connection["kv-transfer-config"]), connection["socket"])
    faults += engine_faults(connection["pod-patch.yaml"], items)
    faults += settings.refused_by_daemon(text, settings.files_of(items))
    report.group(f"renders right: {what}", faults, len(items))


def engine_faults(text: str, items: list[dict]) -> list[str]:
    """The patch for engines: a pod that Kubernetes takes, with the daemon's user and directory, and what vLLM needs."""
    spec = yaml.safe_load(text)["spec"]["template"]["spec"]
    for box in spec["containers"]:
        box["image"] = "engine"
    labels = {"app": "engine"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "engine", "labels": labels}, "spec": spec}
    daemon = next(item for item in items if item["kind"] == "DaemonSet")["spec"]["template"]["spec"]
    faults = manifests.against_schemas([pod]) + manifests.volume_references(spec)
    maps = {item["metadata"]["name"]: item["data"] for item in items if item["kind"] == "ConfigMap"}
    connection = next(name for name in maps if name.endswith("-connection"))
    faults += engines.home_faults(spec) + engines.connection_faults(spec, connection, set(maps[connection]))
    faults += engines.told_faults("pod-patch.yaml", text)
    if spec["securityContext"]["runAsUser"] != daemon["securityContext"]["runAsUser"]:
        faults.append("engines would run as another user than the daemon")
    volumes = [volume for each in (spec, daemon) for volume in each["volumes"] if volume["name"].endswith("run")]
    runs = [volume["hostPath"]["path"] for volume in volumes]
    return faults + ([] if len(set(runs)) == 1 else [f"engine and daemon share no directory: {runs}"])


def check_default_is_unprivileged(report: Report, items: list[dict]) -> None:
    """The default profile: no root but for the chown, no host network, no added capability, no port open to all."""
    faults = manifests.unprotected(items)
    for item, template in manifests.pods(items):
        spec = template["spec"]
        if spec.get("hostNetwork") or not spec["securityContext"]["runAsNonRoot"]:
            faults.append(f"{manifests.name(item)} runs as root or on the host's network")
        for kind, allowed in (("containers", None), ("initContainers", ["CHOWN"])):
            added = [box["securityContext"]["capabilities"].get("add") for box in spec.get(kind, [])]
            faults += [f"{manifests.name(item)} adds capabilities {each}" for each in added if each != allowed]
    listen = settings.tomllib.loads(settings.toml_of(items))["listen"]
    faults += ["the control plane is open by default"] if "grpc" in listen else []
    report.group("the default is unprivileged", faults)


def check_settings(report: Report) -> None:
    """Values, docs/CONFIG.md and the plugin have the same settings."""
    known, config = settings.documented(), (ROOT / "docs/CONFIG.md").read_text(encoding="utf-8")
    faults = settings.unsettable(known, settings.accepted())
    report.group("every setting can be set, or is the chart's", faults, sum(map(len, known.values())))
    report.group("the plugin's documented defaults", settings.plugin_faults(config), len(settings.plugin_defaults()))


def check_refusals(report: Report, chart: helm_python.Chart) -> None:
    """Bad values are refused, with a reason that names them."""
    faults = []
    for what, (values, reason) in cases.BAD.items():
        try:
            render(chart, values)
            faults.append(f"{what} was taken")
        except helm_python.HelmError as error:
            if reason not in str(error):
                faults.append(f"{what}: the reason does not name {reason}: {error}")
    report.group("bad values are refused", faults, len(cases.BAD))


def check_itself(report: Report, chart: helm_python.Chart) -> None:
    """These checks can fail: each kind of broken rendering is seen."""
    seen = {what: manifests.against_schemas(render(chart, values)) for what, values in cases.BROKEN.items()}
    items = render(chart, {})
    strayed = copy.deepcopy(items)
    for item in strayed:
        if item["kind"] == "Service":
            item["spec"]["selector"]["app.kubernetes.io/component"] = "nobody"
    seen["a service that selects nothing"] = manifests.references(strayed)
    rooted = copy.deepcopy(items)
    manifests.pods(rooted)[0][1]["spec"]["containers"][0]["securityContext"]["privileged"] = True
    seen["a privileged container"] = manifests.confined(rooted)
    hasty = copy.deepcopy(items)
    manifests.pods(hasty)[0][1]["spec"]["terminationGracePeriodSeconds"] = 30
    seen["a grace period shorter than the drain"] = settings.agreement(hasty)
    seen["a field that no daemon knows"] = [
        fault for fault in settings.unknown_fields("[host]\ncapacty = 1") if "capacty" in fault]
    seen["an image that copies what is not there"] = image.faults("FROM x AS y\nCOPY nowhere ./\n")
    exposed = [item for item in items if item["kind"] != "NetworkPolicy"]
    seen["a release without policies"] = manifests.unprotected(exposed)
    connection = next(item for item in items if item["metadata"]["name"].endswith("-connection"))["data"]
    patch = connection["pod-patch.yaml"]
    for what in ("{name: HOME, value: /cache}", "{name: USER, value: vllm}", "key: kv-transfer-config", engines.ARGUMENTS[1]):
        seen[f"a patch without {what}"] = engine_faults(patch.replace(what, "{name: X}" if "name" in what else "key: x"), items)
    seen["a setting that no value reaches"] = settings.unsettable(settings.documented(), settings.accepted() | {"claims": set()})
    seen["another default of the plugin"] = settings.plugin_faults("## The vLLM plugin\n| `max_inflight` | `1` | |\n")
    seen["a key that no plugin knows"] = settings.transfer_config({"kv_connector_extra_config": {"sockett": ""}}, "")
    report.group("a fault is seen", [f"{what} passed" for what, faults in seen.items() if not faults], len(seen))


def main() -> int:
    print(f"check-deploy: Helm {helm_python.helm_sdk_version()}, Kubernetes {' and '.join(manifests.VERSIONS)}")
    report = Report()
    check_lint(report)
    with helm_python.Chart.load(CHART) as chart:
        for what, values in profiles().items():
            try:
                check_profile(report, what, render(chart, values))
            except helm_python.HelmError as error:
                report.group(f"renders: {what}", [str(error)])
        check_default_is_unprivileged(report, render(chart, {}))
        check_settings(report)
        check_refusals(report, chart)
        check_itself(report, chart)
        faults, count = texts.faults(chart)
        report.group("snippets of the documents", faults, count)
    report.group("Containerfile", image.faults((ROOT / "deploy/Containerfile").read_text(encoding="utf-8")))
    if "KVTIERD" not in os.environ:
        print("check-deploy: skipped: kvtierd --check of each rendered kvtier.toml (KVTIERD names no built daemon)")
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
