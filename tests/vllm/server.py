"""A vLLM OpenAI server with the connector, as a process, and requests to it."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from rig import ENGINE_SECONDS, free_port

PYTHON = Path(__file__).resolve().parents[2] / "python"
END_SECONDS = 30
# A busy machine costs time, not blocks.
PATIENT = {"finish_grace_ms": 30_000, "call_timeout_ms": 30_000, "save_timeout_ms": 60_000}


class Server:
    """Serves a model on a free port of this machine until `end`."""

    def __init__(self, model: Path, home: Path, kvtierd: Path, *more: str):
        self.log = home / "server.log"
        self.port = free_port()
        transfer = {
            "kv_connector": "KvTierConnector",
            "kv_connector_module_path": os.environ.get("KVTIER_CONNECTOR_MODULE", "kvtier.connector"),
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"socket": str(kvtierd), **PATIENT},
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "8", "--enforce-eager"]
        command += ["--distributed-executor-backend", "uni", "--prefix-caching-hash-algo", "sha256_cbor"]
        command += ["--kv-transfer-config", json.dumps(transfer), *more]
        path = os.pathsep.join(filter(None, [str(PYTHON), os.environ.get("PYTHONPATH")]))
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + ENGINE_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start:\n{self.log.read_text()[-4000:]}") from None
            time.sleep(0.2)

    def complete(self, prompt: list, headers: dict | None = None, **body) -> dict:
        """One completion; the whole answer."""
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, **body}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.code}: {error.read().decode()[:500]}") from None

    def end(self) -> None:
        """Stops it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
