#!/usr/bin/env python3
"""Checks the dependencies between the crates of this workspace against the table of docs/ARCHITECTURE.md.

Reads `cargo metadata --no-deps`; prints each forbidden edge and ends with 1 when there is one. With a file name as its
argument it reads saved metadata instead.
"""
import json
import subprocess
import sys

# Crate -> crates it may use. A crate that is not here is refused: add it with its edges, and to ARCHITECTURE.md.
ALLOWED = {
    "kvtier-types": set(),
    "kvtier-proto": {"kvtier-types"},
    "kvtier-memory": {"kvtier-types"},
    "kvtier-policy": {"kvtier-types"},
    "kvtier-device": {"kvtier-types", "kvtier-memory"},
    "kvtier-storage": {"kvtier-types", "kvtier-memory", "kvtier-device"},
    "kvtier-transport": {"kvtier-types", "kvtier-memory", "kvtier-device", "kvtier-ucx-sys"},
    "kvtier-ucx-sys": set(),
    "kvtierd": {
        "kvtier-types",
        "kvtier-proto",
        "kvtier-memory",
        "kvtier-policy",
        "kvtier-device",
        "kvtier-storage",
        "kvtier-transport",
    },
    "kvtier-connector-ffi": {"kvtier-types", "kvtier-memory", "kvtier-device", "kvtier-proto"},
    "kvtier-cli": {"kvtier-types", "kvtier-proto"},
    "kvtier-simulator": {"kvtier-types", "kvtier-policy"},
}
# Crates that may use every other, in any role.
ANYTHING = {"kvtier-tests", "kvtier-benches"}
ROLES = {None: "depends on", "dev": "has as dev-dependency", "build": "has as build-dependency"}


def metadata(argv):
    if len(argv) > 1:
        with open(argv[1], encoding="utf-8") as file:
            return json.load(file)
    command = ["cargo", "metadata", "--format-version", "1", "--no-deps"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def faults(packages):
    ours = {package["name"] for package in packages}
    for package in sorted(packages, key=lambda p: p["name"]):
        name = package["name"]
        if name in ANYTHING:
            continue
        if name not in ALLOWED:
            yield f"{name} is not in the table of .ci/check_deps.py"
            continue
        for dependency in package["dependencies"]:
            used, role = dependency["name"], ROLES[dependency["kind"]]
            if used in ours and used != name and used not in ALLOWED[name]:
                allowed = ", ".join(sorted(ALLOWED[name])) or "none"
                yield f"{name} {role} {used}: allowed are {allowed}"


def main(argv):
    packages = metadata(argv)["packages"]
    found = list(faults(packages))
    for fault in found:
        print(f"check_deps: {fault}")
    if not found:
        print(f"check_deps: {len(packages)} crates, every edge allowed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
