"""The demo: one prompt, four vLLM engines, each a process of its own.

1. without kvtier: the tokens to compare with;  2. with kvtierd, cold: computes and saves;
3. a new engine: its prefix comes from host memory;  4. kvtierd is killed (-9) and started again: it comes from disk.
Ends with 1 unless every engine gave the same tokens and 3 and 4 were served by the cache.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENGINE = Path(__file__).resolve().parent.parent / "tests" / "vllm" / "engine.py"
START_SECONDS = 30
ENGINE_SECONDS = 300
PROMPT_TOKENS = 512


class Daemon:
    """kvtierd with a small cache below `home`."""

    def __init__(self, target: Path, home: Path):
        self.target, self.home, self.process = target, home, None
        self.socket = home / "kvtierd.sock"
        self.config = home / "kvtier.toml"
        self.config.write_text(
            f'run_dir = "{home}"\ndata_dir = "{home}/data"\n'
            '[host]\ncapacity = "256MiB"\nextent = "32MiB"\n[disk]\ncapacity = "1GiB"\nsegment = "64MiB"\n'
        )

    def start(self) -> None:
        log = open(self.home / "kvtierd.log", "ab")
        self.process = subprocess.Popen(
            [self.target / "kvtierd", "--config", self.config], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        deadline = time.monotonic() + START_SECONDS
        while self.kvtier("status", quiet=True) != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"kvtierd did not start:\n{(self.home / 'kvtierd.log').read_text()[-3000:]}")
            time.sleep(0.1)

    def end(self, how: signal.Signals) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(START_SECONDS)

    def kvtier(self, *words: str, quiet: bool = False) -> int:
        output = subprocess.DEVNULL if quiet else None
        command = [self.target / "kvtier", "--address", f"unix://{self.socket}", *words]
        return subprocess.run(command, stdout=output, stderr=output, check=False).returncode


def run_engine(args, home: Path, name: str, where: list) -> dict:
    prompts, out = home / "prompts.json", home / f"{name}.json"
    prompts.write_text(json.dumps([[7 + 13 * n % 500 for n in range(PROMPT_TOKENS)]]))
    command = [sys.executable, ENGINE, "--model", args.model, "--prompts", prompts, "--out", out, *where]
    with open(home / f"{name}.log", "wb") as log:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=ENGINE_SECONDS, check=False
        ).returncode
    if code != 0:
        raise SystemExit(f"the engine ended with {code}:\n{(home / f'{name}.log').read_text()[-3000:]}")
    return json.loads(out.read_text())["outputs"][0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="directory of kvtierd and kvtier")
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    # A short path: a Unix socket's has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kvtier-demo-", dir="/tmp") as folder:
        home = Path(folder)
        daemon = Daemon(args.target, home)
        steps = []

        def step(what: str, name: str, where: list) -> None:
            began = time.monotonic()
            output = run_engine(args, home, name, where)
            steps.append(output)
            same = "same tokens" if output["tokens"] == steps[0]["tokens"] else "OTHER TOKENS"
            print(f"{what:<44} {output['cached'] or 0:>4} of {PROMPT_TOKENS} tokens from the cache, {same}"
                  f"  ({time.monotonic() - began:.0f} s)", flush=True)

        try:
            step("1. vLLM alone", "alone", ["--off"])
            daemon.start()
            attached = ["--socket", daemon.socket]
            step("2. with kvtierd, nothing stored", "cold", attached)
            step("3. a new engine, the same prompt", "warm", attached)
            daemon.end(signal.SIGKILL)
            daemon.start()
            step("4. a new engine, after kill -9 of kvtierd", "recovered", attached)
            print(flush=True)
            daemon.kvtier("status")
        finally:
            daemon.end(signal.SIGTERM)
        good = all(s["tokens"] == steps[0]["tokens"] for s in steps) and all(s["cached"] for s in steps[2:])
        print("\nThe demo", "worked." if good else "FAILED.")
        return 0 if good else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
