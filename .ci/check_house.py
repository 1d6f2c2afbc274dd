#!/usr/bin/env python3
"""Checks the house: walls around unsafe code, and texts that belong to no machine.

1. Every crate has `#![forbid(unsafe_code)]` in each of its roots, or has walled files.
2. The files that use `unsafe` are exactly those that docs/ARCHITECTURE.md lists under "Walled files".
3. A walled file, or the module it belongs to, says why: `#![expect(unsafe_code, reason = ...)]`.
4. Every test that ARCHITECTURE.md names as pinning an invariant exists.
5. docs/METRICS.md and docs/CONFIG.md name exactly the metrics, and all the fields, of the daemon's code.
6. No tracked file (lock files aside) names a package registry's host or a path of the machine it was written on.

Ends with 1 when something is wrong.
"""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"
WALL_HEADING = "## Walled files"
INVARIANTS_HEADING = "## Invariants"
# Written in pieces, so that this file passes its own check.
HOSTS = [
    "crates" + ".io",
    "pypi" + ".org",
    "python" + "hosted.org",
    "npmjs" + ".org",
    "npmjs" + ".com",
    "debian" + ".org",
    "rust-" + "lang.org",
    "rust" + "up.rs",
    "golang" + ".org",
    "hugging" + "face.co",
]
PLACES = re.compile(r"(?<![\w.\-])/(?:w" + r"ork|r" + r"oot|f" + r"arm|home)/\w")
UNSAFE = re.compile(r"\bunsafe\s*(?:\{|fn\b|impl\b|trait\b|extern\b)|#\[unsafe\(")
FORBID = "#![forbid(unsafe_code)]"
EXPECT = re.compile(r"#!\[expect\(\s*unsafe_code,\s*reason\s*=")


def tracked():
    """Files of the repository, those included that are not yet added but not ignored either."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode().split("\0")
    return sorted(ROOT / name for name in names if name and (ROOT / name).is_file())


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def code_of(text):
    """Rust source without comments and strings: good enough to look for the word `unsafe` in code."""
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', text)


def section(heading):
    """The text under a heading of ARCHITECTURE.md, up to the next one of its level."""
    text = read(ARCHITECTURE) if ARCHITECTURE.exists() else ""
    _, _, rest = text.partition(heading)
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def listed_walls():
    """File names in the first cell of each row of the table."""
    return set(re.findall(r"^\|\s*`([^`]+\.rs)`", section(WALL_HEADING), flags=re.MULTILINE))


def check_named_tests(files):
    rows = [line for line in section(INVARIANTS_HEADING).splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`([a-z_0-9]+)`", row.rstrip("| ").rpartition("|")[2])}
    sources = "\n".join(read(path) for path in files if path.suffix in (".rs", ".py", ".c", ".sh"))
    for name in sorted(named):
        if not re.search(rf"\b(?:fn|def|void|int) {name}\b", sources):
            yield f"docs/ARCHITECTURE.md names the test {name}, which does not exist"
    if not named:
        yield "docs/ARCHITECTURE.md names no test under its invariants"


def check_references():
    metrics, config = read(ROOT / "daemon/src/metrics.rs"), read(ROOT / "daemon/src/config.rs")
    in_code = set(re.findall(r'"(kvtier_[a-z_]+)"', metrics))
    in_text = set(re.findall(r"^\| `(kvtier_[a-z_]+)`", read(ROOT / "docs/METRICS.md"), flags=re.MULTILINE))
    for name in sorted(in_code ^ in_text):
        yield f"the metric {name} is only in {'the code' if name in in_code else 'docs/METRICS.md'}"
    documented = read(ROOT / "docs/CONFIG.md")
    for field in sorted(set(re.findall(r"^    pub (\w+): ", config, flags=re.MULTILINE))):
        if f"`{field}`" not in documented and f"`[{field}]`" not in documented:
            yield f"the field {field} of daemon/src/config.rs is not in docs/CONFIG.md"


def explained(path):
    """True when the file or a module above it carries the expectation."""
    folders = [parent for parent in path.parents if ROOT in parent.parents]
    above = [folder.with_suffix(".rs") for folder in folders] + [folder / "mod.rs" for folder in folders]
    # A crate that is a wall as a whole says so at its root.
    above = [*above, path.parent / "lib.rs"]
    return any(EXPECT.search(read(file)) for file in [path, *above] if file.is_file())


def crate_of(path):
    for parent in path.parents:
        if (parent / "Cargo.toml").exists():
            return parent
    return ROOT


def check_walls(sources):
    walls = {str(path.relative_to(ROOT)) for path in sources if UNSAFE.search(code_of(read(path)))}
    listed = listed_walls()
    for name in sorted(walls - listed):
        yield f'{name} uses unsafe but is not listed under "Walled files" in docs/ARCHITECTURE.md'
    for name in sorted(listed - walls):
        yield f'{name} is listed under "Walled files" in docs/ARCHITECTURE.md but uses no unsafe'
    for name in sorted(walls & listed):
        if not explained(ROOT / name):
            yield f"{name} has no #![expect(unsafe_code, reason = ...)]"
    yield from check_roots(sources, {crate_of(ROOT / name) for name in walls})


def check_roots(sources, walled_crates):
    roots = [p for p in sources if p.name in ("lib.rs", "main.rs") and p.parent.name == "src"]
    open_crates = set()
    for path in roots:
        if FORBID in read(path):
            continue
        crate = crate_of(path)
        open_crates.add(str(crate.relative_to(ROOT)))
        if crate not in walled_crates:
            yield f"{path.relative_to(ROOT)} has no {FORBID}, and its crate has no walled file"
    print("check_house: crates that may hold unsafe code:", ", ".join(sorted(open_crates)) or "none")


def check_texts(files):
    for path in files:
        if path.suffix == ".lock" or path.stat().st_size > 4 << 20:
            continue
        for number, line in enumerate(read(path).splitlines(), 1):
            where = f"{path.relative_to(ROOT)}:{number}"
            for host in HOSTS:
                if host in line:
                    yield f"{where} names the registry host {host}"
            if PLACES.search(line):
                yield f"{where} names a path of one machine: {line.strip()[:80]}"


def main():
    files = tracked()
    sources = [path for path in files if path.suffix == ".rs"]
    found = [*check_walls(sources), *check_named_tests(files), *check_references(), *check_texts(files)]
    for fault in found:
        print(f"check_house: {fault}")
    print(f"check_house: {len(files)} files, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
