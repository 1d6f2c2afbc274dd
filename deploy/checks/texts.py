"""Snippets of the documents: a reader copies them, so that they must be right."""

import pathlib
import re

import helm_python
import yaml

from . import engines, manifests, settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = ["docs/CLUSTER.md", "deploy/helm/kvtier/README.md"]


def snippets(path: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S)


def faults(chart: helm_python.Chart) -> tuple[list[str], int]:
    """Faults, and how many snippets there are."""
    out, count = [], 0
    for path in DOCUMENTS:
        for text in snippets(path, "toml"):
            count += 1
            wrong = settings.unknown_fields(text) or settings.refused_by_daemon(text, {})
            out += [f"{path}: {fault}" for fault in wrong]
        for text in snippets(path, "yaml"):
            count += 1
            out += [f"{path}: {fault}" for fault in yaml_faults(text, chart)]
        for text in snippets(path, "sh"):
            for words in re.findall(r"--set (\S+)", text):
                count += 1
                values = helm_python.parse_set_string(words.strip("'\""))
                out += [f"{path}: {fault}" for fault in refused(chart, values)]
        out += [f"{path}: {link} is not there" for link in dead_links(path)]
    return out, count


def yaml_faults(text: str, chart: helm_python.Chart) -> list[str]:
    """Objects of Kubernetes, else values of the chart."""
    documents = [each for each in yaml.safe_load_all(text) if each]
    if all("kind" in each for each in documents):
        specs = [pod["spec"] for _, pod in manifests.pods(documents)]
        faults = [fault for spec in specs for fault in manifests.volume_references(spec) + engines.whole_faults(spec)]
        return faults + manifests.against_schemas(documents)
    return [fault for each in documents for fault in refused(chart, each)]


def refused(chart: helm_python.Chart, values: dict) -> list[str]:
    """Why the chart does not take values."""
    try:
        chart.validate_schema(values)
        chart.render(values, name="kvtier", namespace="kv")
    except helm_python.HelmError as error:
        return [str(error)]
    return []


def dead_links(path: str) -> list[str]:
    """Relative links whose file does not exist."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / path).read_text(encoding="utf-8"))
    return [link for link in links if not (ROOT / path).parent.joinpath(link).exists()]
