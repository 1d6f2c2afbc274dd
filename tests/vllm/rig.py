"""What the demos and the end-to-end tests have in common: kvtierd, a directory, and vLLM engines run to their end."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ENGINE = Path(__file__).resolve().parent / "engine.py"
START_SECONDS = 30
ENGINE_SECONDS = 420
SYSTEM_TOKENS, TAIL_TOKENS, PROMPTS = 512, 200, 3


class Skipped(Exception):
    """A case cannot be run here: why."""


class Daemon:
    """kvtierd with a small cache below `home`."""

    # What the daemon's command begins with: `ip netns exec NAME` for one in a network namespace.
    inside: tuple = ()

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
                [*self.inside, self.target / "kvtierd", "--config", self.config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.wait("answer", lambda: self.status() is not None)

    def end(self, how: signal.Signals) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(START_SECONDS)

    def kvtier(self, *words: str):
        command = [self.target / "kvtier", "--address", f"unix://{self.socket}", "--json", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # What was answered but is not complete is an answer too; without one there is no output.
        return json.loads(done.stdout) if done.stdout.startswith("{") else None

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


class Directory:
    """Valkey or Redis, without a disk."""

    def __init__(self, home: Path, address: str = "127.0.0.1"):
        self.home, self.address, self.port, self.process = home, address, free_port(address), None

    @property
    def url(self) -> str:
        """How daemons name it."""
        return f"redis://{self.address}:{self.port}"

    def start(self) -> None:
        """Starts it, empty."""
        server = shutil.which("valkey-server") or "redis-server"
        command = [server, "--bind", self.address, "--port", str(self.port), "--save", "", "--appendonly", "no"]
        command += ["--protected-mode", "no", "--dir", str(self.home)]
        with open(self.home / "directory.log", "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while self.ask("PING") != "PONG":
            if time.monotonic() > deadline:
                raise SystemExit(f"{server} did not start:\n{(self.home / 'directory.log').read_text()[-2000:]}")
            time.sleep(0.1)

    def end(self) -> None:
        """Kills it."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def ask(self, *words: str) -> str:
        """What it answers to a command."""
        command = ["redis-cli", "-h", self.address, "-p", str(self.port), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def prompts() -> list:
    """A shared system prompt and a tail of each one's own."""
    system = [7 + 13 * n % 250 for n in range(SYSTEM_TOKENS)]
    return [system + [7 + (17 * n + 31 * p) % 250 for n in range(TAIL_TOKENS)] for p in range(PROMPTS)]


def start_engine(model: Path, home: Path, name: str, where: list, ask: list | None = None) -> subprocess.Popen:
    """Starts an engine that answers `ask`, or `prompts()`; its answers go to NAME.json, its log to NAME.log."""
    asked, out = home / "prompts.json", home / f"{name}.json"
    asked.write_text(json.dumps(ask or prompts()))
    command = [sys.executable, ENGINE, "--model", model, "--prompts", asked, "--out", out, *where]
    with open(home / f"{name}.log", "wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def end_engine(engine: subprocess.Popen, home: Path, name: str) -> list:
    """Waits for an engine and returns the tokens of each answer."""
    try:
        code = engine.wait(ENGINE_SECONDS)
    except subprocess.TimeoutExpired:
        engine.kill()
        code = "no end in time"
    if code != 0:
        raise SystemExit(f"engine {name} ended with {code}:\n{(home / f'{name}.log').read_text()[-4000:]}")
    return [row["tokens"] for row in json.loads((home / f"{name}.json").read_text())["outputs"]]


def run_engine(model: Path, home: Path, name: str, where: list, ask: list | None = None) -> list:
    """Starts an engine and waits for it."""
    return end_engine(start_engine(model, home, name, where, ask), home, name)
