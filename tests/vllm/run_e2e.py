"""End to end with real vLLM: modes of loading and saving, tensor parallelism, cache groups, a daemon that is away, verbs.

Each case is one kvtierd and some engines, each a process of its own. A case passes only when the daemon counted what
was expected: equal tokens alone prove nothing, since recomputing gives them too.
usage: run_e2e.py --target DIR --models DIR [case..]
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from case_agents import AGENTS, SLOW_AGENTS
from case_hints import hints
from programs import PROGRAMS
from rig import Daemon, Skipped, end_engine, run_engine, start_engine
from semantics import PRECISE, SEMANTICS


class Bench:
    """What a case works with."""

    def __init__(self, args, home: Path):
        self.models, self.home = args.models, home
        self.daemon = Daemon(args.target, home)
        self.socket = ["--socket", self.daemon.socket]

    def run(self, name: str, where: list, model: str = "tiny-llama") -> list:
        return run_engine(self.models / model, self.home, name, where)


def check(good: bool, what: str) -> None:
    if not good:
        raise AssertionError(what)


def sync_load_and_save(bench: Bench, want: list) -> None:
    """Loads and saves within the step, and the failure policy that must not load."""
    modes = ["--async-load", "false", "--async-save", "false"]
    bench.daemon.start()
    check(bench.run("sync-a", bench.socket + modes) == want, "A's tokens differ")
    check(bench.daemon.counted()["host"] == 0, "A loaded from an empty cache")
    check(bench.run("sync-b", bench.socket + modes) == want, "B's tokens differ")
    loaded = bench.daemon.counted()
    check(loaded["host"] >= 5, f"B loaded too little: {loaded}")
    check(loaded["corrupt"] == 0, f"something was corrupt: {loaded}")
    check(bench.run("sync-fail", bench.socket + modes + ["--policy", "fail"]) == want, "tokens differ under policy fail")
    check(bench.daemon.counted()["host"] == loaded["host"], "an engine under policy fail loaded")


def daemon_dies_under_an_engine(bench: Bench, want: list) -> None:
    """kill -9 of the daemon once an engine has attached: the engine goes on as if nothing were cached."""
    bench.daemon.start()
    engine = start_engine(bench.models / "tiny-llama", bench.home, "dies", bench.socket)
    deadline = time.monotonic() + 300
    while not bench.daemon.status()["attachments"]:
        check(engine.poll() is None and time.monotonic() < deadline, "the engine did not attach")
        time.sleep(0.05)
    bench.daemon.end(signal.SIGKILL)
    check(end_engine(engine, bench.home, "dies") == want, "tokens differ")


def daemon_absent(bench: Bench, want: list) -> None:
    """No daemon at all."""
    check(bench.run("absent", bench.socket) == want, "tokens differ")


def tensor_parallel(bench: Bench, _want: list) -> None:
    """Two ranks, two shards of each block; a hit needs both."""
    bench.daemon.start()
    first = bench.run("tp-a", bench.socket + ["--tp", "2"])
    bench.daemon.settle()
    bench.daemon.end(signal.SIGKILL)
    bench.daemon.start()
    check(bench.run("tp-b", bench.socket + ["--tp", "2"]) == first, "B's tokens differ from A's")
    loaded = bench.daemon.counted()
    check(loaded["disk"] >= 10 and loaded["disk"] % 2 == 0, f"B should have loaded both shards from disk: {loaded}")
    check(loaded["corrupt"] == 0, f"something was corrupt: {loaded}")


def cache_groups(bench: Bench, _want: list) -> None:
    """A hybrid model: sliding windows beside full attention, each group with blocks of its own."""
    off = bench.run("hybrid-off", ["--off", *PRECISE], "tiny-hybrid")
    check(len({t for answer in off for t in answer}) > 4, "the hybrid model's answers say nothing")
    bench.daemon.start()
    check(bench.run("hybrid-a", bench.socket + PRECISE, "tiny-hybrid") == off, "A's tokens differ")
    check(bench.run("hybrid-b", bench.socket + PRECISE, "tiny-hybrid") == off, "B's tokens differ")
    loaded = bench.daemon.counted()
    check(loaded["host"] >= 3, f"B loaded too little: {loaded}")
    check(loaded["corrupt"] == 0, f"something was corrupt: {loaded}")


def demo(bench: Bench, _want: list) -> None:
    """The whole demo: kill -9, a flipped byte on disk, weights changed in place."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"
    command = [sys.executable, script, "--target", bench.daemon.target, "--model", bench.models / "tiny-llama"]
    check(subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 0, "the demo failed")


CASES = [demo, sync_load_and_save, daemon_dies_under_an_engine, daemon_absent, tensor_parallel, cache_groups]
CASES += [hints, *SEMANTICS, *PROGRAMS, *AGENTS]
SLOW = SLOW_AGENTS


def run_case(case, args, want: list) -> str:
    """Runs a case; says how it went: `passed`, `failed` or `skipped`."""
    began = time.monotonic()
    # A short path: a Unix socket's has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kvtier-e2e-", dir="/tmp") as folder:
        bench = Bench(args, Path(folder))
        try:
            case(bench, want)
            good = True
        except Skipped as why:
            print(f"SKIPPED: {case.__name__}: {why}", flush=True)
            return "skipped"
        except (AssertionError, SystemExit) as error:
            good = False
            print(f"{case.__name__}: {error}", flush=True)
        except Exception:
            good = False
            traceback.print_exc()
        finally:
            bench.daemon.end(signal.SIGTERM)
        if not good and (log := Path(folder) / "kvtierd.log").exists():
            print(log.read_text()[-3000:], flush=True)
    print(f"{'PASS' if good else 'FAIL'} {case.__name__} ({time.monotonic() - began:.0f} s)", flush=True)
    return "passed" if good else "failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="directory of kvtierd and kvtier")
    parser.add_argument("--models", type=Path, required=True, help="directory of the tiny models")
    parser.add_argument("cases", nargs="*", help="only these: " + ", ".join(c.__name__ for c in CASES + SLOW))
    args = parser.parse_args()
    chosen = [c for c in CASES + SLOW if c.__name__ in args.cases] if args.cases else CASES
    with tempfile.TemporaryDirectory(prefix="kvtier-e2e-", dir="/tmp") as folder:
        want = run_engine(args.models / "tiny-llama", Path(folder), "off", ["--off"])
    ends = [run_case(case, args, want) for case in chosen]
    print(", ".join(f"{ends.count(how)} {how}" for how in ("passed", "failed", "skipped")))
    return 0 if chosen and "failed" not in ends else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
