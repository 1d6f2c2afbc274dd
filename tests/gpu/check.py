"""Everything that is checked on a GPU, and what of it can be seen without one: run by scripts/gpu-check.sh.

Prints a table and writes `{device, tests: [{name, status}], ratios: [{name, ratio, floor}]}`. Ends with 1 when a test
failed, with 2 when only floors were missed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
START_SECONDS, ENGINE_SECONDS, BENCH_SECONDS = 60, 180, 240
# Below this a device test has run into something it waits for.
TEST_SECONDS = 120


class Failed(Exception):
    """A case failed: why."""


class Daemon:
    """kvtierd with a device tier."""

    def __init__(self, args: argparse.Namespace, home: Path) -> None:
        self.args, self.home, self.process = args, home, None
        self.socket = home / "kvtierd.sock"
        (home / "kvtier.toml").write_text(
            f'run_dir = "{home}"\ndata_dir = "{home}/data"\n[host]\ncapacity = "1GiB"\nextent = "128MiB"\n'
            '[disk]\ncapacity = "2GiB"\nsegment = "64MiB"\n'
            f'[device]\nbackend = "{args.backend}"\nmemory = "512MiB"\nextent = "64MiB"\n'
        )

    def start(self) -> None:
        with open(self.home / "kvtierd.log", "ab") as log:
            command = [self.args.bin / "kvtierd", "--config", self.home / "kvtier.toml"]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait("kvtierd answers", START_SECONDS, lambda: self.ask("status") is not None)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(START_SECONDS)

    def ask(self, *words: str) -> dict | None:
        command = [self.args.bin / "kvtier", "--address", f"unix://{self.socket}", "--json", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ENGINE_SECONDS)
        self.said = done.stdout + done.stderr
        return json.loads(done.stdout) if done.stdout.startswith("{") else None

    def keys(self) -> Path:
        """A file with the keys of all blocks."""
        file = self.home / "keys.json"
        file.write_text(json.dumps(self.ask("ls", "--limit", "100000")))
        return file

    def move(self, tier: str) -> None:
        if self.ask("move", "--to", tier, "--keys-file", str(self.keys())) is None:
            raise Failed(f"kvtier move --to {tier}: {self.said}")

    def evict(self, *tiers: str) -> None:
        words = [word for tier in tiers for word in ("--tier", tier)]
        if self.ask("evict", *words, "--keys-file", str(self.keys())) is None:
            raise Failed(f"kvtier evict {tiers}: {self.said}")


def wait(what: str, seconds: float, condition) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.1)


class Check:
    """All cases of one machine."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tests: list[dict] = []
        self.ratios: list[dict] = []
        self.facts: dict = {}
        self.device = "none"

    def note(self, name: str, status: str, why: str = "") -> None:
        self.tests.append({"name": name, "status": status, **({"why": why} if why else {})})
        print(f"{status:8} {name}{'   ' + why if why else ''}", flush=True)

    def case(self, name: str, run) -> None:
        try:
            found = run()
            skipped = found.get("skipped") if isinstance(found, dict) else None
            self.note(name, "skipped" if skipped else "passed", skipped or (json.dumps(found) if found else ""))
        except (Failed, subprocess.TimeoutExpired) as failure:
            self.note(name, "failed", str(failure))

    def engine(self, daemon: Daemon, role: str, *words: str) -> list[str]:
        small = ["--blocks", "8", "--layers", "4"] if self.args.small else []
        command = [sys.executable, HERE / "engine.py", role, "--socket", daemon.socket, "--backend", self.args.backend]
        return [str(word) for word in (*command, *small, *words)]

    def run_engine(self, daemon: Daemon, role: str, *words: str) -> dict:
        done = subprocess.run(
            self.engine(daemon, role, *words), capture_output=True, text=True, check=False, timeout=ENGINE_SECONDS
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode != 0 or not lines:
            raise Failed(f"engine {role}: {(lines or done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return json.loads(lines[-1])

    # The device's own promises, and benchmarks.

    def device_tests(self) -> None:
        binary = self.args.bin / "device-tests"
        listed = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True).stdout
        for name in re.findall(r"^(\S+): test$", listed, re.M):
            try:
                done = subprocess.run(
                    [binary, "--exact", name, "--nocapture"],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=TEST_SECONDS,
                )
            except subprocess.TimeoutExpired:
                self.note(f"device {name}", "failed", f"not over within {TEST_SECONDS} s")
                continue
            text = done.stdout + done.stderr
            skipped = re.search(r"SKIPPED.*", text)
            status = "failed" if done.returncode else "skipped" if skipped else "passed"
            why = skipped[0] if skipped else text.strip().splitlines()[-1] if done.returncode else ""
            self.note(f"device {name}", status, why)

    def bench(self) -> None:
        out = Path(tempfile.mkdtemp(prefix="kvtier-bench-")) / "bench.json"
        command = [self.args.bin / "kvtier-gpu-bench", "--backend", self.args.backend, "--out", out]
        try:
            done = subprocess.run(
                [*map(str, command), *(["--quick"] if self.args.small else [])],
                capture_output=True,
                text=True,
                check=False,
                timeout=BENCH_SECONDS,
            )
        except subprocess.TimeoutExpired:
            self.note("benchmarks", "failed", f"not over within {BENCH_SECONDS} s")
            return
        print(done.stdout, flush=True)
        if not out.exists():
            self.note("benchmarks", "failed", (done.stderr.strip().splitlines() or ["no output"])[-1])
            return
        results = json.loads(out.read_text())
        self.ratios = results["ratios"]
        self.device = results["device"]
        self.facts = {key: results[key] for key in ("driver", "methods", "notes")}
        self.note("benchmarks ran", "passed")

    # A process in the role of an engine, and the daemon.

    def stories(self) -> None:
        for layout in ("apart", "together"):
            self.with_daemon(lambda daemon, layout=layout: self.tiers(daemon, layout))
        self.with_daemon(self.deaths)
        self.with_daemon(self.beside)

    def with_daemon(self, story) -> None:
        home = Path(tempfile.mkdtemp(prefix="kvtier-gpu-"))
        daemon = Daemon(self.args, home)
        try:
            self.case("kvtierd starts with a device tier", daemon.start)
            story(daemon)
        finally:
            daemon.stop(signal.SIGKILL)
            if any(test["status"] == "failed" for test in self.tests):
                print(f"kvtierd's log: {home / 'kvtierd.log'}", flush=True)
            else:
                shutil.rmtree(home, ignore_errors=True)

    def tiers(self, daemon: Daemon, layout: str) -> None:
        """Written by one process, read back by others from each tier."""
        words = ("--seed", "7", "--layout", layout)
        self.case(f"{layout}: one process writes and ends", lambda: self.run_engine(daemon, "write", *words))
        self.case(f"{layout}: the blocks are moved to the device", lambda: daemon.move("device"))
        read = lambda tier: self.run_engine(daemon, "read", *words, "--expect", tier)
        self.case(f"{layout}: another reads them from the device, bit by bit", lambda: read("device"))
        self.case(f"{layout}: they leave the device", lambda: daemon.evict("device"))
        self.case(f"{layout}: another reads them from host memory", lambda: read("host"))
        self.case(f"{layout}: they leave host memory", lambda: self.to_disk(daemon))
        self.case(f"{layout}: another reads them from disk", lambda: read("disk"))
        self.case(f"{layout}: moved to the device again", lambda: daemon.move("device"))
        self.case(f"{layout}: read from the device again", lambda: read("device"))

    @staticmethod
    def to_disk(daemon: Daemon) -> None:
        daemon.move("disk")

    def deaths(self, daemon: Daemon) -> None:
        """An engine killed in mid-copy leaves nothing behind; a daemon killed in mid-load harms no engine."""
        self.case("an engine is killed in mid-copy", lambda: self.kill_in_mid_copy(daemon))
        self.case("what it held is given back", lambda: wait("all is given back", 60, lambda: self.is_idle(daemon)))
        self.case("another writes and reads after it", lambda: self.write_and_read(daemon))
        self.case("kvtierd is killed in mid-load: no wrong byte, no hang", lambda: self.outlive(daemon))
        self.case("kvtierd starts again", daemon.start)
        self.case("an engine works with the new one", lambda: self.write_and_read(daemon))

    def kill_in_mid_copy(self, daemon: Daemon) -> None:
        engine = subprocess.Popen(
            self.engine(daemon, "churn", "--seed", "21"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            line = engine.stdout.readline()
            if "churning" not in line:
                raise Failed(f"the engine did not begin: {line}{engine.stderr.read()[-500:]}")
            time.sleep(1.0)
        finally:
            engine.kill()
            engine.wait(START_SECONDS)

    def is_idle(self, daemon: Daemon) -> bool:
        """Nobody is attached, nothing is written, and all taken memory is that of blocks."""
        status = daemon.ask("status")
        if status is None or status["attachments"] or any(tier["pending_writes"] for tier in status["tiers"]):
            return False
        block_bytes = (4 if self.args.small else 32) * 2 * 16 * 8 * 128 * 2
        memory = [tier for tier in status["tiers"] if tier["tier"] in ("device", "host")]
        return all(tier["used_bytes"] == tier["blocks"] * block_bytes for tier in memory)

    def write_and_read(self, daemon: Daemon) -> dict:
        self.run_engine(daemon, "write", "--seed", "33")
        daemon.move("device")
        return self.run_engine(daemon, "read", "--seed", "33", "--expect", "device")

    def outlive(self, daemon: Daemon) -> dict:
        found = self.run_engine(daemon, "outlive", "--seed", "33", "--pid", str(daemon.process.pid))
        daemon.process.wait(START_SECONDS)
        if "miss" not in found["outcomes"]:
            raise Failed(f"the daemon's death went unnoticed: {found}")
        return found

    def beside(self, daemon: Daemon) -> None:
        """What loads cost a matrix product: stated, without a floor."""
        self.case("a matrix product beside loads", lambda: self.run_engine(daemon, "matmul", "--seed", "5"))

    def write(self) -> int:
        results = {"device": self.device, **self.facts, "tests": self.tests, "ratios": self.ratios}
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        self.args.out.write_text(json.dumps(results, indent=1) + "\n")
        count = lambda status: sum(test["status"] == status for test in self.tests)
        missed = [ratio for ratio in self.ratios if ratio["ratio"] < ratio["floor"]]
        print(f"\n{self.device}: {count('passed')} passed, {count('failed')} failed, {count('skipped')} skipped")
        for ratio in self.ratios:
            verdict = "pass" if ratio["ratio"] >= ratio["floor"] else "MISS"
            print(f"  {verdict} {ratio['ratio']:.2f} of {ratio['floor']}  {ratio['name']}  {ratio.get('reached', '')}")
        print(f"written to {self.args.out}")
        return 1 if count("failed") else 2 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", type=Path, required=True, help="where the carried programs lie")
    parser.add_argument("--backend", choices=["cuda", "twin"], default="cuda")
    parser.add_argument("--small", action="store_true", help="few blocks, short benchmarks: shows that everything runs")
    parser.add_argument("--only", choices=["device", "stories", "bench"], help="only these")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ.setdefault("KVTIER_LIBRARY", str(args.bin / "libkvtier.so"))
    check = Check(args)
    for part, run in (("device", check.device_tests), ("stories", check.stories), ("bench", check.bench)):
        if args.only in (None, part):
            run()
    return check.write()


if __name__ == "__main__":
    sys.exit(main())
