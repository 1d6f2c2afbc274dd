"""One offline vLLM engine that answers one question at a time, so that a test can do something in between.

usage: talk.py --model DIR (--socket PATH | --off) [options of engine.py]
Reads JSON lines from standard input, {"prompt": [token ids], "salt": str, "xargs": {..}, "params": {..}}, and answers
each with a line that begins `answer: `, {"tokens": [..], "params": the response's kv_transfer_params}. The engine's own
prefix cache is emptied before each question: what is not computed comes from kvtierd. Ends at the end of its input.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import engine

ANSWER = "answer: "


def serve(args) -> None:
    """Answers until the input ends."""
    from vllm import LLM, SamplingParams

    llm = LLM(**engine.engine_arguments(args))
    print(ANSWER + json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        llm.reset_prefix_cache()
        prompt = {"prompt_token_ids": asked["prompt"]}
        if asked.get("salt"):
            prompt["cache_salt"] = asked["salt"]
        extra = dict(asked.get("xargs") or {})
        if asked.get("params"):
            extra["kv_transfer_params"] = asked["params"]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True, extra_args=extra or None
        )
        (output,) = llm.generate([prompt], [sampling], use_tqdm=False)
        answer = {"tokens": list(output.outputs[0].token_ids), "params": getattr(output, "kv_transfer_params", None)}
        print(ANSWER + json.dumps(answer), flush=True)
    llm.llm_engine.engine_core.shutdown()


class Talk:
    """The other end: starts such an engine and asks it."""

    def __init__(self, model: Path, log: Path, where: list, seconds: float = 300):
        command = [sys.executable, Path(__file__).resolve(), "--model", model, "--prompts", "-", "--out", "-", *where]
        self.seconds, self.log = seconds, log
        self.errors = open(log, "wb")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self._answer()

    def _answer(self):
        # A silent engine is ended, which ends the read.
        timer = threading.Timer(self.seconds, self.process.kill)
        timer.start()
        try:
            for line in self.process.stdout:
                if line.startswith(ANSWER):
                    return json.loads(line[len(ANSWER) :])
        finally:
            timer.cancel()
        raise SystemExit(f"the engine said nothing more:\n{self.log.read_text()[-4000:]}")

    def ask(self, prompt: list, **more) -> dict:
        """The answer to a prompt of token ids."""
        self.process.stdin.write(json.dumps({"prompt": prompt, **more}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Ends the engine."""
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


def main() -> None:
    """Serves standard input."""
    args = engine.parse()
    folder = tempfile.mkdtemp(prefix="kvtier-counters-")
    try:
        engine.environment(args, folder)
        serve(args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
