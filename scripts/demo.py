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
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "vllm"))
from rig import Daemon, run_engine  # noqa: E402

PAGE = 4096


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
