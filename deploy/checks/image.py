"""deploy/Containerfile without building it: what it copies exists, and what it copied is enough for cargo."""

import json
import pathlib
import re
import shutil
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def instructions(text: str) -> list[list[str]]:
    """Words of each instruction; continued lines are one."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [line.split() for line in joined.splitlines() if line.strip()]


def faults(text: str) -> list[str]:
    """What would fail in a build, as far as it can be told here."""
    out = []
    stages, copied = set(), []
    for words in instructions(text):
        match words:
            case ["FROM", _, "AS", stage]:
                stages.add(stage)
            case ["COPY", *rest]:
                options = [word for word in rest if word.startswith("--")]
                *sources, target = [word for word in rest if not word.startswith("--")]
                stage = next((word.removeprefix("--from=") for word in options if word.startswith("--from=")), None)
                if stage is not None:
                    out += [] if stage in stages else [f"COPY from {stage}, which is no stage"]
                else:
                    out += [f"COPY {each}, which is not there" for each in sources if not (ROOT / each).exists()]
                    copied += [(each, target) for each in sources]
    # One way: what a stage copies from the one before must have been made there.
    made = set(re.findall(r"/src/target/release/([\w.]+)", text))
    return out + cargo_faults(copied, made, text)


def cargo_faults(copied: list[tuple[str, str]], made: set[str], text: str) -> list[str]:
    """Lays out what was copied, and asks cargo for the packages that are built and what they make."""
    packages = set(re.findall(r"-p ([\w-]+)", text))
    with tempfile.TemporaryDirectory() as folder:
        for source, target in copied:
            place = pathlib.Path(folder) / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("target"))
            elif (ROOT / source).is_file():
                place = place / pathlib.Path(source).name if target.endswith("/") else place
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)
        command = ["cargo", "metadata", "--no-deps", "--offline", "--format-version=1"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        return [f"cargo does not take what was copied: {done.stderr.strip()[-300:]}"]
    known = {package["name"]: package["targets"] for package in json.loads(done.stdout)["packages"]}
    out = [f"cargo build -p {each}, which is no package" for each in sorted(packages - set(known))]
    files = set()
    for target in (target for each in packages & set(known) for target in known[each]):
        files |= {target["name"]} if "bin" in target["kind"] else set()
        files |= {f"lib{target['name']}.so"} if "cdylib" in target["kind"] else set()
    return out + [f"no built package makes {each}" for each in sorted(made - files)]
