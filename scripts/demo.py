"""The demo: real vLLM engines, each a process of its own, share KV blocks through kvtierd, whatever dies in between.

  off   connector off: the tokens to compare with
  A     generates and exits; kvtierd gets kill -9 and is started again
  B     a fresh engine loads A's blocks from disk; kvtierd gets kill -9, one byte of a stored block is flipped
  C     detects the flipped byte, recomputes, and still answers right; then the model's weights are changed in place
  off'  connector off, changed weights
  D     gets no hit from blocks of the old weights

Ends with a table, counted by the daemon, and `demo: PASS`; any difference ends in `demo: FAIL` and exit code 1.
"""

import argparse
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENGINE = Path(__file__).resolve().parent.parent / "tests" / "vllm" / "engine.py"
START_SECONDS = 30
ENGINE_SECONDS = 420
PAGE = 4096
SYSTEM_TOKENS, TAIL_TOKENS, PROMPTS = 512, 200, 3


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
        with open(self.home / "kvtierd.log", "ab") as log:
            self.process = subprocess.Popen(
                [self.target / "kvtierd", "--config", self.config], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.wait("answer", lambda: self.status() is not None)

    def end(self, how: signal.Signals) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(START_SECONDS)

    def kvtier(self, *words: str):
        command = [self.target / "kvtier", "--address", f"unix://{self.socket}", "--json", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def status(self):
        return self.kvtier("status")

    def wait(self, what: str, reached) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"kvtierd did not {what}:\n{(self.home / 'kvtierd.log').read_text()[-3000:]}")
            time.sleep(0.1)

    def settle(self) -> None:
        """Waits until every sealed block is on disk."""

        def settled() -> bool:
            tiers = {t["tier"]: t for t in self.status()["tiers"]}
            return tiers["disk"]["pending_writes"] == 0 and tiers["disk"]["blocks"] >= tiers["host"]["blocks"] > 0

        self.wait("bring its blocks to disk", settled)

    def counted(self) -> dict:
        status = self.status()
        loaded = {c["name"]: c["value"] for c in status["blocks_loaded"]}
        served = {p["name"]: p["value"] for p in status["ledger"]["parts"]}
        return {"host": loaded["host"], "disk": loaded["disk"], "corrupt": status["corrupt_blocks"], "tokens": served}


def prompts() -> list:
    """A shared system prompt and a tail of each one's own."""
    system = [7 + 13 * n % 250 for n in range(SYSTEM_TOKENS)]
    return [system + [7 + (17 * n + 31 * p) % 250 for n in range(TAIL_TOKENS)] for p in range(PROMPTS)]


def run_engine(model: Path, home: Path, name: str, where: list) -> list:
    asked, out = home / "prompts.json", home / f"{name}.json"
    asked.write_text(json.dumps(prompts()))
    command = [sys.executable, ENGINE, "--model", model, "--prompts", asked, "--out", out, *where]
    with open(home / f"{name}.log", "wb") as log:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=ENGINE_SECONDS, check=False
        ).returncode
    if code != 0:
        raise SystemExit(f"engine {name} ended with {code}:\n{(home / f'{name}.log').read_text()[-4000:]}")
    return [row["tokens"] for row in json.loads(out.read_text())["outputs"]]


def flip_byte(daemon: Daemon) -> str:
    """Flips one byte in the payload of the first block of the shared prefix, behind the stopped daemon's back."""
    listed = daemon.kvtier("ls", "--tier", "disk", "--limit", "1000")["blocks"]
    block = min(listed, key=lambda b: b["depth_blocks"])
    copy = next(r for r in block["replicas"] if r["tier"] == "disk")
    _, _, segment, _, page = copy["place"].split()
    daemon.end(signal.SIGKILL)
    files = sorted((daemon.home / "data" / "disk").glob("segment-*.kvt"))
    path = next(f for f in files if int(f.stem.split("-")[-1], 10) == int(segment))
    at = (int(page) + 1) * PAGE + copy["bytes"] // 2
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x01]))
    return f"bit 0 of byte {at} of {path.name}"


def change_weights(model: Path) -> None:
    """Changes some numbers of one tensor in place: name, size and header of the file stay as they are."""
    path = model / "model.safetensors"
    with open(path, "r+b") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
        first = min((t for n, t in header.items() if n != "__metadata__"), key=lambda t: t["data_offsets"][0])
        begin, end = first["data_offsets"]
        at = 8 + header_bytes + begin
        file.seek(at)
        half = file.read(min(end - begin, 1 << 16))
        file.seek(at)
        file.write(half[::-1])


class Story:
    """Runs the engines in turn and keeps the table."""

    def __init__(self, model: Path, home: Path, daemon: Daemon):
        self.model, self.home, self.daemon, self.rows = model, home, daemon, []

    def off(self, name: str) -> list:
        began = time.monotonic()
        tokens = run_engine(self.model, self.home, name, ["--off"])
        print(f"engine {name:<5} connector off  ({time.monotonic() - began:.0f} s)", flush=True)
        return tokens

    def on(self, name: str, want: list) -> dict:
        began, before = time.monotonic(), self.daemon.counted()
        tokens = run_engine(self.model, self.home, name, ["--socket", self.daemon.socket])
        after = self.daemon.counted()
        row = {k: after[k] - before[k] for k in ("host", "disk", "corrupt")}
        row |= {"engine": name, "equal": tokens == want}
        self.rows.append(row)
        print(f"engine {name:<5} {row}  ({time.monotonic() - began:.0f} s)", flush=True)
        return row

    def table(self) -> None:
        print(f"\n{'engine':<8}{'tokens equal':<14}{'loaded from host':>18}{'from disk':>11}{'corrupt':>9}")
        for r in self.rows:
            print(f"{r['engine']:<8}{'yes' if r['equal'] else 'NO':<14}{r['host']:>18}{r['disk']:>11}{r['corrupt']:>9}")


def tell(story: Story, daemon: Daemon) -> list:
    """The whole story. Returns what went wrong."""
    wrong = []

    def expect(good: bool, what: str) -> None:
        if not good:
            wrong.append(what)

    want = story.off("off")
    expect(len({tuple(t) for t in want}) > 1 and all(len(set(t)) > 2 for t in want), "the model's answers say nothing")
    daemon.start()
    a = story.on("A", want)
    daemon.settle()
    daemon.end(signal.SIGKILL)
    print("kvtierd: kill -9, start", flush=True)
    daemon.start()
    b = story.on("B", want)
    expect(b["disk"] > 0, "B loaded nothing from disk")
    daemon.settle()
    print("kvtierd: kill -9, flip", flip_byte(daemon) + ", start", flush=True)
    daemon.start()
    c = story.on("C", want)
    expect(c["corrupt"] >= 1, "the flipped byte was not detected")
    change_weights(story.model)
    changed = story.off("off'")
    expect(changed != want, "the changed weights change no answer")
    d = story.on("D", changed)
    expect(a["host"] + a["disk"] == 0, "A loaded blocks from an empty cache")
    expect(d["host"] + d["disk"] == 0, "D loaded blocks of the old weights")
    for row in (a, b, c, d):
        expect(row["equal"], f"{row['engine']}'s tokens differ from the connector-off run")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="directory of kvtierd and kvtier")
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    # A short path: a Unix socket's has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kvtier-demo-", dir="/tmp") as folder:
        home = Path(folder)
        model = home / "model"
        shutil.copytree(args.model, model)
        daemon = Daemon(args.target, home)
        story = Story(model, home, daemon)
        try:
            wrong = tell(story, daemon)
        finally:
            daemon.end(signal.SIGTERM)
    story.table()
    for what in wrong:
        print("wrong:", what)
    print("demo: FAIL" if wrong else "demo: PASS")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
