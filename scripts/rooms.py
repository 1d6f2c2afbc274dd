#!/usr/bin/env python3
"""Writes the map of files in docs/ARCHITECTURE.md, section "Rooms", from the header of each file.

`rooms.py --check` writes nothing and ends with 1 when the map is out of date.
"""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"
BEGIN, END = "<!-- rooms: written by scripts/rooms.py -->\n", "<!-- end of rooms -->\n"
FOLDERS = [
    ("types/src", "`kvtier-types`: vocabulary, no I/O"),
    ("policy/src", "`kvtier-policy`: the pure core, sans I/O"),
    ("memory/src", "`kvtier-memory`: shared memory, and the walls around it"),
    ("device/src", "`kvtier-device`: GPU memory, CUDA opened at run time"),
    ("storage/src", "`kvtier-storage`: tiers that hold bytes, and the journal"),
    ("transport/src", "`kvtier-transport`: moves bytes between nodes"),
    ("proto/src", "`kvtier-proto`: the wire format and its checked conversions"),
    ("daemon/src", "`kvtierd`: the shell around the core"),
    ("connector-ffi/src", "`kvtier-connector-ffi`: `libkvtier.so`, the C library of engines"),
    ("python/kvtier", "the vLLM plugin over `libkvtier.so`"),
    ("python/kvtier_agents", "what agents use: programs, hints on their requests, signals; no dependencies"),
    ("cli/src", "`kvtier-cli`: `kvtier`, the operator's tool"),
    ("simulator/src", "`kvtier-simulator`: the same core over virtual time"),
]
PLACES = [
    ("proto/kvtier/v1/", "the protocol: `types`, `engine` (Unix socket only), `kvcache` (the KV-cache API), `programs`, `admin`, `peer` (between nodes)"),
    ("connector-ffi/include/kvtier.h", "the C header, generated"),
    ("tests/", "end to end: real processes, real vLLM, a real S3 server, a real directory"),
    ("benches/", "benchmarks"),
    ("deploy/", "Helm chart, Containerfile, and their checks"),
    ("scripts/", "what `make` runs; `test.sh` and `summarize.py` count the tests"),
    (".ci/", "what decides whether a change lands: `run`, the dependency rule, the house rules"),
]


def header(path):
    """The first sentence of a file's header."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found = re.match(r'(?:#!.*\n)?"""(.*?)(?:\n\n|""")', text, re.DOTALL)
        words = found.group(1) if found else ""
    else:
        lines = re.match(r"(?://!.+\n)+", text)
        words = lines.group(0).replace("//!", "") if lines else ""
    words = re.sub(r"\[(`[^`]+`)\](?:\([^)]*\))?", r"\1", " ".join(words.split()))
    return re.split(r"(?<=[\w)`\"])\.(?:\s|$)", words, maxsplit=1)[0].rstrip(".:").replace("|", "\\|")


def rooms():
    for folder, what in FOLDERS:
        files = sorted((ROOT / folder).rglob("*.rs")) + sorted((ROOT / folder).rglob("*.py"))
        names = [f for f in files if f.name not in ("lib.rs", "tests.rs") and "tests" not in f.parent.parts]
        if names:
            yield f"**{folder}**: {what}\n\n| file | what it is |\n|---|---|"
            yield from (f"| `{f.relative_to(ROOT / folder)}` | {header(f)} |" for f in names)
            yield ""
    yield "**Elsewhere**\n\n| place | what it is |\n|---|---|"
    # A folder counts when it holds something that git keeps.
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    kept = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    for place, what in PLACES:
        if any(name.startswith(place) for name in kept):
            yield f"| `{place}` | {what} |"


def main(argv):
    text = ARCHITECTURE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = before + BEGIN + "\n".join(rooms()) + "\n" + END + after
    if "--check" not in argv:
        ARCHITECTURE.write_text(fresh, encoding="utf-8")
    elif fresh != text:
        print("rooms: the map in docs/ARCHITECTURE.md is out of date: run python3 scripts/rooms.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
