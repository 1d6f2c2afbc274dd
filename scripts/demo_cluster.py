"""The cluster's demo: what one node's engine wrote, engines on other nodes read, whatever dies in between.

  off   connector off: the tokens to compare with
  1     an engine on node 1 writes P1, P2 and P3; P2 is read once more there, so it goes to the object store too
  2, 3  engines on nodes 2 and 3 load all of P1 from their peers
  2     again while the directory is dead; before that it is flushed, after that it comes back empty: it gets whole again
  3     loads P3 over a link of a few Mbit/s that is cut in mid-transfer: it answers right and in time all the same
  4     nodes 1 to 3 are killed with -9: an engine on a new node loads P2 from what they left in the object store

Nodes live in network namespaces of their own. Without the rights for that they use separate loopback addresses, and the stage with the
cut link is left out. Ends with a table of the replicas used, counted by the daemons, and `demo-cluster: PASS`.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "vllm"))
from rig import ENGINE, ENGINE_SECONDS, Daemon, end_engine  # noqa: E402

RADOSGW = ROOT / "tests" / "s3" / "ceph-radosgw.sh"
# P3 is long: its transfer takes a few seconds over the slow link.
PROMPT_TOKENS = {"P1": 712, "P2": 712, "P3": 4000}
RATE = "2mbit"
# Longest that an engine may take beyond the one without connector, link cut or not.
GRACE_SECONDS = 30


def run(*words, check=True) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def wait(what: str, reached, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise SystemExit(f"not in {seconds:.0f} s: {what}")
        time.sleep(0.05)


class Net:
    """A bridge with a namespace for each node, or loopback addresses where that is not allowed."""

    def __init__(self):
        self.tag = f"kv{os.getpid() % 100000}"
        self.base = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self.spaces = []
        self.real = os.geteuid() == 0 and self._bridge()
        self.host = f"{self.base}.1" if self.real else "127.0.0.1"
        print("nodes in network namespaces" if self.real else "no rights for network namespaces: separate loopback addresses")

    def _bridge(self) -> bool:
        steps = (["link", "add", self.tag, "type", "bridge"], ["addr", "add", f"{self.base}.1/24", "dev", self.tag],
                 ["link", "set", self.tag, "up"], ["netns", "add", f"{self.tag}-try"], ["netns", "del", f"{self.tag}-try"])
        for step in steps:
            if subprocess.run(["ip", *step], capture_output=True, check=False).returncode != 0:
                self.close()
                return False
        return True

    def node(self, number: int):
        """Address of a node, and what to put before its command."""
        if not self.real:
            return f"127.0.0.{10 + number}", []
        space, outer = f"{self.tag}-{number}", f"{self.tag}v{number}"
        run("ip", "netns", "add", space)
        self.spaces.append(space)
        run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", outer, "master", self.tag, "up")
        inside = ["ip", "netns", "exec", space]
        address = f"{self.base}.{10 + number}"
        for words in (["link", "set", "lo", "up"], ["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            run(*inside, "ip", *words)
        return address, inside

    def received(self, number: int) -> int:
        """Bytes that arrived at a node so far."""
        path = "/sys/class/net/eth0/statistics/rx_bytes"
        return int(run("ip", "netns", "exec", f"{self.tag}-{number}", "cat", path))

    def slow(self, number: int) -> None:
        run("ip", "netns", "exec", f"{self.tag}-{number}", "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", RATE,
            "burst", "32kbit", "latency", "400ms")

    def cut(self, number: int) -> None:
        run("ip", "link", "set", f"{self.tag}v{number}", "down")

    def mend(self, number: int) -> None:
        run("ip", "link", "set", f"{self.tag}v{number}", "up")
        run("ip", "netns", "exec", f"{self.tag}-{number}", "tc", "qdisc", "del", "dev", "eth0", "root")

    def close(self) -> None:
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self.tag], capture_output=True, check=False)


def free_port(host: str) -> int:
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


class Relay:
    """Carries connections from the bridge to a server that listens on loopback only."""

    def __init__(self, host: str, target: tuple):
        self.target = target
        self.listener = socket.create_server((host, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.target, timeout=10)
            except OSError:
                return
            far.settimeout(None)
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    @staticmethod
    def _carry(a: socket.socket, b: socket.socket) -> None:
        try:
            while part := a.recv(1 << 16):
                b.sendall(part)
        except OSError:
            pass
        for end in (a, b):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Valkey:
    """A directory server without persistence."""

    def __init__(self, host: str, home: Path):
        self.host, self.home, self.port, self.process = host, home, free_port(host), None
        self.server = shutil.which("valkey-server") or shutil.which("redis-server")
        self.client = shutil.which("valkey-cli") or shutil.which("redis-cli")

    def start(self) -> None:
        words = [self.server, "--bind", self.host, "--port", self.port, "--save", "", "--protected-mode", "no", "--dir", self.home]
        with open(self.home / "valkey.log", "ab") as log:
            self.process = subprocess.Popen([str(w) for w in words], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        wait("the directory server answers", lambda: self.call("PING").strip() == "PONG")

    def call(self, *words: str) -> str:
        return run(self.client, "-h", self.host, "-p", self.port, *words, check=False)

    def keys(self) -> int:
        text = self.call("DBSIZE").strip()
        return int(text) if text.isdigit() else 0

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


class S3:
    """A real S3 server: Ceph's gateway."""

    def __init__(self, host: str):
        self.home = tempfile.mkdtemp(prefix="kvtier-s3.", dir="/tmp")
        print("starting the S3 server", flush=True)
        run("bash", RADOSGW, "start", self.home)
        env = dict(line.removeprefix("export ").split("=", 1) for line in run("bash", RADOSGW, "env", self.home).splitlines() if "=" in line)
        self.env = {k: v.strip("'\"") for k, v in env.items()}
        endpoint = self.env["KVTIER_S3_ENDPOINT"].removeprefix("http://")
        name, port = endpoint.rsplit(":", 1)
        self.relay = Relay(host, (name, int(port)))
        self.endpoint = f"http://{host}:{self.relay.port}"

    def close(self) -> None:
        run("bash", RADOSGW, "stop", self.home, check=False)
        shutil.rmtree(self.home, ignore_errors=True)


class Node(Daemon):
    """A kvtierd of the cluster, in a place of its own."""

    def __init__(self, number: int, story: "Story"):
        home = story.home / f"n{number}"
        home.mkdir()
        super().__init__(story.target, home)
        self.number, self.name = number, f"node-{number}"
        self.address, self.prefix = story.net.node(number)
        if not self.prefix:
            peer, data = free_port(self.address), free_port(self.address)
        else:
            peer, data = 7471, 7472
        with open(self.config, "r+", encoding="utf-8") as file:
            rest = file.read()
            file.seek(0)
            file.write(f'node_id = "{self.name}"\n{rest}')
            file.write(
                f'[object]\nenabled = true\nurl = "s3://{story.s3.env["KVTIER_S3_BUCKET"]}"\nendpoint = "{story.s3.endpoint}"\n'
                f'allow_http = true\nprefix = "{story.net.tag}"\ncredentials_env = ["DEMO_KEY", "DEMO_SECRET"]\n'
                f'[cluster]\ndirectory = "redis://{story.valkey.host}:{story.valkey.port}"\nprefix = "{story.net.tag}"\n'
                f'listen = "{self.address}:{peer}"\nheartbeat = "500ms"\n'
                f'[transport]\ntcp_listen = "{self.address}:{data}"\n'
            )

    def start(self) -> None:
        env = os.environ | {"DEMO_KEY": "ak", "DEMO_SECRET": "sk", "no_proxy": "*"}
        with open(self.home / "kvtierd.log", "ab") as log:
            command = [*self.prefix, str(self.target / "kvtierd"), "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        self.wait("answer", lambda: self.status() is not None)

    def loaded(self) -> dict:
        status = self.status()
        return {c["name"]: c["value"] for c in status["blocks_loaded"]} | {"corrupt": status["corrupt_blocks"]}

    def whole(self, nodes: int) -> bool:
        """Whether this node has told the directory everything, and knows so many nodes."""
        seen = self.kvtier("nodes")
        return bool(seen) and seen["unpublished"] == 0 and len(seen["nodes"]) == nodes

    def keys(self) -> set:
        return {b["key"] for b in self.kvtier("ls", "--limit", "100000")["blocks"]}

    def links(self) -> list:
        return [n for n in self.kvtier("nodes")["nodes"] if n["read_bytes"]]


class Story:
    """The stages, what went wrong, and the table."""

    def __init__(self, args: argparse.Namespace, home: Path):
        self.target, self.model, self.home = args.target, args.model, home
        self.wrong, self.rows, self.want, self.nodes = [], [], {}, []
        self.keys: dict = {}
        self.net = Net()
        self.s3 = self.valkey = None

    def expect(self, good: bool, what: str) -> None:
        if not good:
            self.wrong.append(what)
            print("  WRONG:", what, flush=True)

    def prompt(self, name: str) -> list:
        seed = int(name[1:])
        return [7 + (13 * n + 29 * seed + n // 250 * (seed + 3)) % 250 for n in range(PROMPT_TOKENS[name])]

    def engine(self, stage: str, names: list, where: list) -> subprocess.Popen:
        asked, out = self.home / "prompts.json", self.home / f"{stage}.json"
        asked.write_text(json.dumps([self.prompt(n) for n in names]))
        command = [sys.executable, ENGINE, "--model", self.model, "--prompts", asked, "--out", out, *where]
        with open(self.home / f"{stage}.log", "wb") as log:
            return subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def node(self, number: int) -> Node:
        node = Node(number, self)
        node.start()
        self.nodes.append(node)
        return node

    def read(self, stage: str, node: Node, name: str, during=lambda: None) -> dict:
        began, before = time.monotonic(), node.loaded()
        engine = self.engine(stage, [name], ["--socket", node.socket])
        try:
            during()
        finally:
            tokens = end_engine(engine, self.home, stage)
        after = node.loaded()
        row = {k: after[k] - before[k] for k in ("host", "disk", "object", "peer", "corrupt")}
        row |= {"stage": stage, "node": node.name, "prompt": name, "equal": tokens == [self.want[name]]}
        row["seconds"] = time.monotonic() - began
        self.rows.append(row)
        print(f"{stage}: {node.name} {name} {row}", flush=True)
        self.expect(row["equal"], f"{stage}: tokens differ from the connector-off run")
        self.expect(row["corrupt"] == 0, f"{stage}: corrupt blocks")
        return row

    def off(self) -> None:
        began = time.monotonic()
        names = list(PROMPT_TOKENS)
        tokens = end_engine(self.engine("off", names, ["--off"]), self.home, "off")
        self.want = dict(zip(names, tokens))
        self.off_seconds = time.monotonic() - began
        print(f"off: connector off ({self.off_seconds:.0f} s)", flush=True)
        self.expect(len({tuple(t) for t in tokens}) == 3, "the model's answers say nothing")

    def replicas(self, node: Node, name: str) -> dict:
        """Where a prompt's blocks lie: copies by (node, tier)."""
        found: dict = {}
        for block in node.kvtier("locate", *sorted(self.keys[name]))["blocks"]:
            for r in block["replicas"]:
                place = f"{r['node_id']} {r['tier']}"
                found[place] = found.get(place, 0) + 1
        return found

    def write(self, n1: Node) -> None:
        for name in PROMPT_TOKENS:
            before = n1.keys()
            self.read(f"write {name}", n1, name)
            self.keys[name] = n1.keys() - before
            self.expect(len(self.keys[name]) == PROMPT_TOKENS[name] // 128, f"{len(self.keys[name])} blocks of {name} were written")
        self.read("reread P2", n1, "P2")
        want = len(self.keys["P2"])
        wait("P2 is in the object store", lambda: self.replicas(n1, "P2").get("node-1 object", 0) == want)

    def tell(self) -> None:
        self.off()
        self.s3 = S3(self.net.host)
        self.valkey = Valkey(self.net.host, self.home)
        self.valkey.start()
        n1 = self.node(1)
        self.write(n1)
        n2, n3 = self.node(2), self.node(3)
        wait("all nodes know each other", lambda: all(n.whole(3) for n in self.nodes))
        for node in (n2, n3):
            row = self.read(f"share P1 {node.number}", node, "P1")
            self.expect(row["peer"] == len(self.keys["P1"]), f"{node.name} loaded {row['peer']} blocks of P1 from peers")
            for link in node.links():
                print(f"  {node.name} read {link['read_bytes']} bytes from {link['node_id']} over {link['transport']}", flush=True)
        places = self.replicas(n2, "P2")
        print("  P2 lies at", places, flush=True)
        self.expect({p.split()[0] for p in places} == {"node-1"} and "node-1 object" in places, f"P2 lies at {places}")
        self.lose_directory(n2)
        if self.net.real:
            self.cut_link(n3)
        else:
            print("skipped: the cut link, for want of network namespaces", flush=True)
        self.outlive()

    def lose_directory(self, n2: Node) -> None:
        entries = self.valkey.keys()
        self.valkey.call("FLUSHALL")
        print(f"directory: flushed of {entries} keys", flush=True)
        wait("the directory is whole again", lambda: self.valkey.keys() >= entries and all(n.whole(3) for n in self.nodes))
        self.valkey.kill()
        print("directory: kill -9", flush=True)
        row = self.read("no directory", n2, "P1")
        self.expect(row["host"] + row["disk"] == len(self.keys["P1"]), "node-2 did not serve its own P1 without a directory")
        self.valkey.start()
        wait("the directory is whole again", lambda: self.valkey.keys() >= entries and all(n.whole(3) for n in self.nodes))
        print(f"directory: back, {self.valkey.keys()} keys", flush=True)

    def cut_link(self, n3: Node) -> None:
        blocks = self.nodes[0].kvtier("locate", *sorted(self.keys["P3"]))["blocks"]
        total = sum(b["replicas"][0]["bytes"] for b in blocks)
        self.net.slow(1)
        start = self.net.received(3)
        cut_at = {}

        def cut() -> None:
            wait("the transfer is under way", lambda: self.net.received(3) - start > total // 8, ENGINE_SECONDS)
            self.net.cut(1)
            cut_at["bytes"] = self.net.received(3) - start

        row = self.read("cut link", n3, "P3", cut)
        print(f"  cut after {cut_at['bytes']} of {total} bytes", flush=True)
        self.expect(0 < cut_at["bytes"] < total, "the link was not cut in mid-transfer")
        self.expect(row["seconds"] < self.off_seconds + GRACE_SECONDS, f"the answer took {row['seconds']:.0f} s")
        self.net.mend(1)

    def outlive(self) -> None:
        for node in self.nodes:
            node.end(signal.SIGKILL)
        print("nodes 1 to 3: kill -9", flush=True)
        n4 = self.node(4)
        row = self.read("outlive P2", n4, "P2")
        self.expect(row["object"] == len(self.keys["P2"]), f"node-4 loaded {row['object']} blocks of P2 from the object store")
        print("  P2 lies at", self.replicas(n4, "P2"), flush=True)

    def table(self) -> None:
        head = ("stage", "node", "prompt", "tokens equal", "host", "disk", "object", "peer", "corrupt", "seconds")
        print("\nblocks loaded, by origin\n" + "".join(f"{h:<14}" for h in head))
        for r in self.rows:
            cells = (r["stage"], r["node"], r["prompt"], "yes" if r["equal"] else "NO", r["host"], r["disk"], r["object"], r["peer"],
                     r["corrupt"], f"{r['seconds']:.0f}")
            print("".join(f"{c!s:<14}" for c in cells))

    def close(self) -> None:
        for node in self.nodes:
            node.end(signal.SIGKILL)
        if self.valkey:
            self.valkey.kill()
        if self.s3:
            self.s3.close()
        self.net.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="directory of kvtierd and kvtier")
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # A short path: a Unix socket's has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kvtier-demo-", dir="/tmp") as folder:
        story = Story(args, Path(folder))
        try:
            story.tell()
        except BaseException:
            for log in sorted(Path(folder).glob("n*/kvtierd.log")):
                print(f"--- {log.parent.name}\n{log.read_text()[-2000:]}")
            raise
        finally:
            story.close()
    story.table()
    for what in story.wrong:
        print("wrong:", what)
    print("demo-cluster: FAIL" if story.wrong else "demo-cluster: PASS")
    return 1 if story.wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
