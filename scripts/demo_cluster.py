"""A cluster on one machine: kvtierd nodes with addresses and links of their own, real vLLM engines, Valkey or Redis, S3.

  1  node 1 writes prompts P1 to P4; P2 is read there once, so that it goes to the object store
  2  engines on nodes 2 and 3 load all of P1 from a peer
  3  P2 is with node 1 and in the object store only. The directory is flushed, and whole again: node 2 finds P4. It is
     stopped: node 2 answers P1 from its own memory. It is started empty, and whole again
  4  node 3's link, of a few Mbit/s, is cut while P3 is on its way from node 1: a right answer in bounded time
  5  nodes 1 to 3 get kill -9; a new node 4 with an empty disk loads P2 from the object store

Nodes run in network namespaces joined by a bridge. Without the right to make them they get loopback addresses instead,
which is said, and stage 4 is left out. Ends with a table, counted by the daemons, and `demo-cluster: PASS`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "vllm"))
from rig import Daemon, Directory, end_engine, free_port, start_engine  # noqa: E402

BLOCK_TOKENS, ANSWER_TOKENS = 32, 24
# Four tokens more than whole blocks: the answer completes none, so that blocks of the prompt are all there are.
BLOCKS = {"P1": 22, "P2": 22, "P3": 92, "P4": 22}
LINK_RATE, LINK_BITS = "4mbit", 4_000_000
# A lookup waits at most 5 s; the rest is the engine's own recomputation on a busy machine.
LOOKUP_MS, ANSWER_SECONDS = 5_000, 20
WAIT_SECONDS = 60
S3_SECONDS = 120
RIG = ROOT / "tests" / "s3" / "ceph-radosgw.sh"
# Copies that all nodes hold, by what the directory says: entries have keys of 16 bytes and 17 bytes a copy.
COPIES = """local copies = 0
for _, bucket in ipairs(redis.call('KEYS', '*:b*')) do
  local all = redis.call('HGETALL', bucket)
  for i = 1, #all, 2 do if #all[i] == 16 then copies = copies + #all[i + 1] / 17 end end
end
return copies"""


class Failed(Exception):
    """A check that did not hold."""


def check(good: bool, expected: str, found) -> None:
    if not good:
        raise Failed(f"expected {expected}; found {found}")


def wait(expected: str, look, seconds: float = WAIT_SECONDS):
    """Polls until `look` answers with a first value that is true; fails with the second."""
    deadline = time.monotonic() + seconds
    while True:
        good, found = look()
        if good:
            return found
        check(time.monotonic() < deadline, f"{expected} within {seconds} s", found)
        time.sleep(0.2)


def sh(*words) -> None:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"{' '.join(map(str, words))} to work", done.stderr.strip())


class Net:
    """Namespaces on a bridge, or loopback addresses."""

    def __init__(self):
        self.tag, self.nodes = f"kv{os.getpid() % 100000}", []
        self.bridge, self.subnet = f"{self.tag}b", f"198.18.{os.getpid() % 250}"
        try:
            sh("ip", "netns", "add", f"{self.tag}n0")
            sh("ip", "netns", "del", f"{self.tag}n0")
            sh("ip", "link", "add", self.bridge, "type", "bridge")
            sh("ip", "address", "add", f"{self.subnet}.254/24", "dev", self.bridge)
            sh("ip", "link", "set", self.bridge, "up")
            self.real, self.root = True, f"{self.subnet}.254"
        except (Failed, OSError) as error:
            print(f"no network namespaces ({error}): nodes get loopback addresses, and stage 4 is skipped", flush=True)
            self.real, self.root = False, "127.0.0.1"

    def add(self, number: int) -> tuple:
        """A place for a node: its address, what its command begins with."""
        if not self.real:
            return f"127.0.0.{10 + number}", ()
        space, address = f"{self.tag}n{number}", f"{self.subnet}.{number}"
        sh("ip", "netns", "add", space)
        self.nodes.append(number)
        sh("ip", "link", "add", self.link(number), "type", "veth", "peer", "name", "eth0", "netns", space)
        sh("ip", "link", "set", self.link(number), "master", self.bridge, "up")
        sh("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        sh("ip", "-n", space, "link", "set", "eth0", "up")
        sh("ip", "-n", space, "link", "set", "lo", "up")
        return address, ("ip", "netns", "exec", space)

    def link(self, number: int) -> str:
        return f"{self.tag}v{number}"

    def received(self, number: int) -> int:
        """Bytes sent over the link towards a node."""
        if not self.real:
            return 0
        return int(Path(f"/sys/class/net/{self.link(number)}/statistics/tx_bytes").read_text())

    def end(self) -> None:
        for number in self.nodes:
            subprocess.run(["ip", "netns", "del", f"{self.tag}n{number}"], capture_output=True, check=False)
        if self.real:
            subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)


def copies_in(directory: Directory) -> int:
    answer = directory.ask("EVAL", COPIES, "0")
    return int(answer) if answer.isdigit() else -1


class NodeDaemon(Daemon):
    """A node of the cluster."""

    def __init__(self, story: "Story", number: int):
        self.name, self.number = f"node{number}", number
        home = story.home / f"n{number}"
        home.mkdir()
        super().__init__(story.target, home)
        address, self.inside = story.net.add(number)
        peer, tcp = free_port(story.net.root), free_port(story.net.root)
        s3 = story.s3
        with open(self.config, "r+") as file:
            alone = file.read()
            file.seek(0)
            file.write(f'node_id = "{self.name}"\n{alone}')
            file.write(
                f'[object]\nenabled = true\nurl = "s3://{s3["KVTIER_TEST_S3_BUCKET"]}"\nprefix = "{story.net.tag}"\n'
                f'endpoint = "{s3["KVTIER_TEST_S3"]}"\nallow_http = true\n'
                'credentials_env = ["KVTIER_TEST_S3_ACCESS_KEY", "KVTIER_TEST_S3_SECRET_KEY"]\n'
                f'[cluster]\ndirectory = "{story.directory.url}"\n'
                f'listen = "{address}:{peer}"\n[transport]\norder = ["tcp"]\ntcp_listen = "{address}:{tcp}"\n'
            )

    def loaded(self) -> dict:
        return {c["name"]: c["value"] for c in self.status()["blocks_loaded"]}

    def read_bytes(self) -> dict:
        """Bytes read, by peer and transport."""
        nodes = (self.kvtier("nodes") or {"nodes": []})["nodes"]
        return {(n["node_id"], n["transport"]): n["read_bytes"] for n in nodes if not n["this"]}

    def holds(self, prompt: str) -> list:
        """Keys of a prompt's blocks on this node."""
        listed = self.kvtier("ls", "--limit", "10000") or {"blocks": []}
        return [b["key"] for b in listed["blocks"] if b["program_id"] == prompt]

    def replicas(self, keys: list) -> dict:
        """How many of these blocks lie where: by node and tier, as the whole cluster says."""
        located = self.kvtier("locate", *keys) or {"blocks": []}
        places = {}
        for block in located["blocks"]:
            for place in {(r["node_id"], r["tier"]) for r in block["replicas"]}:
                places[place] = places.get(place, 0) + 1
        return places

    def published(self) -> tuple:
        nodes = self.kvtier("nodes")
        return nodes is not None and nodes["unpublished"] == 0, nodes


def prompt(name: str) -> dict:
    """A prompt that shares nothing with the others; its blocks carry its name."""
    at, tokens = list(BLOCKS).index(name), BLOCKS[name] * BLOCK_TOKENS + 4
    return {"prompt": [7 + (17 * n + 31 * at + n * n // 7) % 250 for n in range(tokens)], "params": {"program_id": name}}


def places_text(places: dict) -> str:
    return ", ".join(f"{count} {tier}@{node}" for (node, tier), count in sorted(places.items()))


class Story:
    """The cluster, the engines, and the table."""

    def __init__(self, target: Path, model: Path, home: Path):
        self.target, self.model, self.home = target, model, home
        self.net, self.nodes, self.rows, self.want, self.engine, self.s3 = Net(), {}, [], {}, None, {}
        self.directory = Directory(home, self.net.root)

    def start_s3(self) -> None:
        began = time.monotonic()
        command = ["bash", str(RIG), "start", str(self.home / "s3")]
        environment = {**os.environ, "KVTIER_S3_ADDRESS": self.net.root}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=S3_SECONDS, check=False
        )
        check(done.returncode == 0, "the S3 server to start", done.stderr[-2000:])
        lines = [line.removeprefix("export ") for line in done.stdout.splitlines() if line.startswith("export ")]
        self.s3 = {name: value.strip('"') for name, value in (line.split("=", 1) for line in lines)}
        os.environ.update(self.s3)
        print(f"S3: radosgw at {self.s3['KVTIER_TEST_S3']} ({time.monotonic() - began:.0f} s)", flush=True)

    def start(self, number: int) -> NodeDaemon:
        node = NodeDaemon(self, number)
        self.nodes[number] = node
        node.start()
        return node

    def ask(self, name: str, prompts: list, node: NodeDaemon | None) -> None:
        """Starts an engine."""
        # Without a route to elsewhere, vLLM finds no address of its own.
        os.environ["VLLM_HOST_IP"] = "127.0.0.1"
        where = ["--socket", node.socket] if node else ["--off"]
        where += ["--max-tokens", str(ANSWER_TOKENS), "--engine", json.dumps({"block_size": BLOCK_TOKENS})]
        where += ["--extra", json.dumps({"lookup_timeout_ms": LOOKUP_MS})]
        self.engine = start_engine(self.model, self.home, name, where, [prompt(p) for p in prompts])

    def answer(self, name: str) -> list:
        tokens = end_engine(self.engine, self.home, name)
        self.engine = None
        return tokens

    def row(self, stage: str, prompts: list, node: NodeDaemon, during=None) -> dict:
        """Runs an engine on a node, and counts where its blocks came from. Tokens must be right."""
        name, began = f"{stage}-{node.name}", time.monotonic()
        before, links, read = node.loaded(), self.net.received(node.number), node.read_bytes()
        self.ask(name, prompts, node)
        if during:
            during()
        tokens = self.answer(name)
        after, peers = node.loaded(), node.read_bytes()
        origins = {k: after[k] - before[k] for k in after}
        by_peer = {k: v - read.get(k, read.get((k[0], ""), 0)) for k, v in peers.items()}
        row = {"stage": stage, "node": node.name, "prompts": "+".join(prompts), **origins}
        row["peers"] = ", ".join(f"{n} by {t}: {b} B" for (n, t), b in by_peer.items() if b > 0)
        row["link"] = self.net.received(node.number) - links
        self.rows.append(row)
        print(f"stage {stage}: {row}  ({time.monotonic() - began:.0f} s)", flush=True)
        check(tokens == [self.want[p] for p in prompts], f"tokens of {prompts} as without connector", "other tokens")
        return row

    def whole(self, copies: int) -> None:
        """Waits until the directory has as many copies as it had."""
        began = time.monotonic()

        def look() -> tuple:
            found = copies_in(self.directory)
            settled = all(n.published()[0] for n in self.nodes.values())
            return found == copies and settled, f"{found} copies, all nodes settled: {settled}"

        wait(f"the directory to have {copies} copies again", look)
        print(f"the directory has {copies} copies again, after {time.monotonic() - began:.1f} s", flush=True)

    def settled_copies(self) -> int:
        """Copies in the directory once their number rests."""
        last = [-1, 0]

        def look() -> tuple:
            found = copies_in(self.directory)
            last[1] = last[1] + 1 if found == last[0] and found > 0 else 0
            last[0] = found
            return last[1] >= 5 and all(n.published()[0] for n in self.nodes.values()), found

        return wait("the directory to rest", look)

    def write(self) -> None:
        node = self.nodes[1]
        row = self.row("1-write", list(BLOCKS), node)
        check(row["peer"] + row["object"] + row["disk"] + row["host"] == 0, "nothing loaded from an empty cluster", row)
        for name, blocks in BLOCKS.items():
            wait(f"{blocks} blocks of {name} on node 1", lambda n=name, b=blocks: (len(k := node.holds(n)) == b, len(k)))
        row = self.row("1-read", ["P2"], node)
        check(row["host"] + row["disk"] == BLOCKS["P2"], f"{BLOCKS['P2']} blocks of P2 loaded from node 1 itself", row)
        keys = node.holds("P2")

        def stored() -> tuple:
            places = node.replicas(keys)
            return places.get(("node1", "object")) == BLOCKS["P2"], places

        wait("all of P2 in the object store", stored)
        p = node.replicas(node.holds("P1"))
        check(p.get(("node1", "host")) == BLOCKS["P1"] and ("node1", "object") not in p, "P1 on node 1, not in the object store", p)

    def spread(self) -> None:
        for number in (2, 3):
            node = self.nodes[number]
            row = self.row(f"2-node{number}", ["P1"], node)
            check(row["peer"] == BLOCKS["P1"], f"{BLOCKS['P1']} blocks of P1 from a peer", row)
            check("tcp" in row["peers"], "the tcp transport named", row["peers"])
            status = node.status()
            print(f"  transports of {node.name}: {json.dumps(status.get('transports', []))}", flush=True)

    def lose_directory(self) -> None:
        keys = self.nodes[1].holds("P2")
        places = self.nodes[3].replicas(keys)
        print(f"P2, by node 3's word: {places_text(places)}", flush=True)
        holders = {node for node, _ in places}
        check(holders == {"node1"} and places.get(("node1", "object")) == len(keys), "P2 on node 1 only", places)
        copies = self.settled_copies()
        print(f"directory: FLUSHALL of {copies} copies", flush=True)
        check(self.directory.ask("FLUSHALL") == "OK", "FLUSHALL to be answered OK", "something else")
        self.whole(copies)
        row = self.row("3-flushed", ["P4"], self.nodes[2])
        check(row["peer"] == BLOCKS["P4"], f"{BLOCKS['P4']} blocks of P4 from node 1", row)
        copies = self.settled_copies()
        print("directory: kill -9", flush=True)
        self.directory.end()
        wait("nodes to see the directory away", lambda: ("away" in (s := self.nodes[2].kvtier("nodes")["directory_state"]), s))
        row = self.row("3-stopped", ["P1"], self.nodes[2])
        check(row["host"] + row["disk"] == BLOCKS["P1"], f"{BLOCKS['P1']} blocks of P1 from node 2 itself", row)
        self.directory.start()
        print("directory: started empty", flush=True)
        self.whole(copies)

    def cut_link(self) -> None:
        if not self.net.real:
            print("stage 4 skipped: no network namespaces, so no links to cut", flush=True)
            return
        node, link = self.nodes[3], self.net.link(3)
        held = node.replicas(self.nodes[1].holds("P3"))
        check({n for n, _ in held} == {"node1"}, "P3 on node 1 only", held)
        size = sum(r["bytes"] for b in self.nodes[1].kvtier("ls", "--limit", "10000")["blocks"]
                   for r in b["replicas"] if b["program_id"] == "P3" and r["tier"] == "host")
        sh("tc", "qdisc", "add", "dev", link, "root", "tbf", "rate", LINK_RATE, "burst", "16kb", "latency", "400ms")
        at = []

        def cut() -> None:
            begun, before = self.net.received(3), None

            def under_way() -> tuple:
                nonlocal before, begun
                now = self.net.received(3)
                if not at:
                    # Heartbeats trickle; a transfer is more than they are in a fifth of a second.
                    if now - begun > LINK_BITS // 8 // 10:
                        at.append(begun)
                    else:
                        begun = now
                return bool(at) and now - at[0] > size // 8, now

            wait("the transfer of P3 to begin", under_way, 120)
            sh("ip", "link", "set", link, "down")
            at.append(self.net.received(3) - at[0])
            print(f"link of node 3 cut after {at[1]} of {size} bytes", flush=True)

        row = self.row("4-cut", ["P3"], node, cut)
        seconds = json.loads((self.home / "4-cut-node3.json").read_text())["seconds"]["generate"][0]
        print(f"answered in {seconds} s; {row['peer']} of {BLOCKS['P3']} blocks came by the link", flush=True)
        check(0 < at[1] < size, f"the link cut in the midst of {size} bytes", at[1])
        check(row["peer"] < BLOCKS["P3"], "less than all of P3 from the peer", row)
        check(seconds < ANSWER_SECONDS, f"an answer within {ANSWER_SECONDS} s", seconds)
        sh("tc", "qdisc", "del", "dev", link, "root")
        sh("ip", "link", "set", link, "up")

    def lose_nodes(self) -> None:
        print("nodes 1 to 3: kill -9", flush=True)
        for node in self.nodes.values():
            node.end(signal.SIGKILL)
        node = self.start(4)
        row = self.row("5-floor", ["P2"], node)
        check(row["object"] == BLOCKS["P2"], f"{BLOCKS['P2']} blocks of P2 from the object store", row)
        print(f"P2, by node 4's word: {places_text(node.replicas(node.holds('P2')))}", flush=True)

    def tell(self) -> None:
        began = time.monotonic()
        self.start_s3()
        self.directory.start()
        self.ask("off", list(BLOCKS), None)
        self.want = dict(zip(BLOCKS, self.answer("off"), strict=True))
        check(all(len(set(t)) > 2 for t in self.want.values()), "answers that say something", self.want)
        print(f"connector off: done ({time.monotonic() - began:.0f} s)", flush=True)
        for number in (1, 2, 3):
            self.start(number)
        wait("three nodes", lambda: (len(n := (self.nodes[1].kvtier("nodes") or {"nodes": []})["nodes"]) == 3, n))
        for stage in (self.write, self.spread, self.lose_directory, self.cut_link, self.lose_nodes):
            stage()

    def table(self) -> None:
        print(f"\n{'stage':<12}{'node':<7}{'prompts':<13}{'peer':>5}{'object':>7}{'disk':>5}{'host':>5}{'link B':>10}  replicas used")
        for r in self.rows:
            local = [f"{r[k]} {k}@{r['node']}" for k in ("host", "disk") if r[k]]
            packs = [f"{r['object']} in the object store"] if r["object"] else []
            used = "; ".join(filter(None, [r["peers"], *local, *packs])) or "none"
            counts = f"{r['peer']:>5}{r['object']:>7}{r['disk']:>5}{r['host']:>5}{r['link']:>10}"
            print(f"{r['stage']:<12}{r['node']:<7}{r['prompts']:<13}{counts}  {used}")

    def logs(self) -> None:
        for path in sorted([*self.home.glob("n*/kvtierd.log"), *self.home.glob("*.log")]):
            print(f"--- end of {path.name if path.parent == self.home else path.parent.name}\n{path.read_text()[-1500:]}")

    def end(self) -> None:
        if self.engine and self.engine.poll() is None:
            self.engine.kill()
            self.engine.wait()
        for node in self.nodes.values():
            node.end(signal.SIGKILL)
        self.directory.end()
        subprocess.run(["bash", str(RIG), "stop", str(self.home / "s3")], capture_output=True, check=False)
        self.net.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="directory of kvtierd and kvtier")
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A short path: a Unix socket's has at most 107 bytes.
    home, wrong = Path(tempfile.mkdtemp(prefix="kvtier-cluster-", dir="/tmp")), None
    story = Story(args.target, args.model, home)
    try:
        story.tell()
    except (Failed, SystemExit, subprocess.TimeoutExpired) as error:
        wrong = error
        story.logs()
    finally:
        story.end()
        shutil.rmtree(home, ignore_errors=True)
    story.table()
    if wrong:
        print("wrong:", wrong)
    print("demo-cluster: FAIL" if wrong else "demo-cluster: PASS")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
