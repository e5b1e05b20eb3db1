"""A search over HTTP: a server that remembers prefixes against one that does not.

  python -m benchmarks.search_cache [--model=qwen|internvl] [--expand=1] [--rounds=3]

The models of `shared_prefixes`: about 50M parameters; question and image are 350 tokens (Qwen2.5-VL)
or 1,130 (InternVL), a step 27. A beam search keeps 8 responses for 10 steps; a scripted policy
continues each by `--expand` next steps, all candidates of a step go to `/score` in one request, and
the best stay. The image is sent each time. Both servers have the same model and meet the same
requests, one search after the other in turn; every search has a question of its own, so that nothing
of it is remembered at its start. Scores of both are compared. Results: benchmarks/RESULTS.md.
"""

import base64
import http.client
import io
import json
import socket
import statistics
import tempfile
import threading
import time

import jax
import numpy as np
import uvicorn
from absl import app, flags
from ml_collections import ConfigDict
from PIL import Image

from benchmarks.shared_prefixes import Case, case_of, parameters
from bis_jax.models import backbones
from bis_jax.models.backbone import Processor
from bis_jax.parallel.sharding import make_mesh
from bis_jax.scoring import server
from bis_jax.scoring.step_scorer import Scorer
from bis_jax.settings import locations
from bis_jax.toy import drawing
from configs import toy_bis10

_MODEL = flags.DEFINE_enum("model", None, ("qwen", "internvl"), "one of the models")
_BEAMS = flags.DEFINE_integer("beams", 8, "responses that are kept")
_EXPAND = flags.DEFINE_integer("expand", 1, "next steps of each")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "searches on each server")

STEPS, STEP, QUESTION = 10, 25, 70  # steps, and digits of a step and of a question


class Served:
  """A server of this process, on a port of its own."""

  def __init__(self, scorer: Scorer):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    self.port = listener.getsockname()[1]
    config = uvicorn.Config(server.create_app(scorer, server.Limits()), log_level="warning")
    serving = uvicorn.Server(config)
    threading.Thread(target=serving.run, args=([listener],), daemon=True).start()
    while not serving.started:
      time.sleep(0.01)

  def ask(self, body: dict | None, path: str = "/score?aggregate=min") -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
    response = connection.getresponse()
    answer = json.loads(response.read())
    assert response.status == 200, answer
    return answer


def scorer_of(case: Case, tokenizer: str, cache_bytes: int) -> tuple[Scorer, Processor]:
  config, backbone = toy_bis10.get_config(), backbones.get(case.model.backbone)
  tokenizer = backbone.load_tokenizer(tokenizer)
  prompt = backbone.make_prompt(tokenizer, "\n\n", config[backbone.name])
  processor = Processor(tokenizer, prompt, case.images)
  inputs = ConfigDict(config.inputs.to_dict())
  inputs.max_length = inputs.row_tokens = case.row_tokens
  inputs.row_patches, inputs.row_markers = case.row_patches, 256
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  graph, shapes = backbones.structure(case.model, mesh)
  made = Scorer(processor, inputs, mesh, graph, parameters(shapes), batch_rows=1)
  made.warm_up(cache_bytes)
  return made, processor


def digits(rng: np.random.Generator, count: int) -> str:
  return " ".join(map(str, rng.integers(0, 10, count)))


def search(served: Served, seed: int, image: str) -> tuple[float, list[list[float]]]:
  """Returns (seconds in requests, the scores of all candidates) of one search."""
  rng, seconds, every = np.random.default_rng(seed), 0.0, []
  question, kept = digits(rng, QUESTION), [[]] * _BEAMS.value
  for _ in range(STEPS):
    candidates = [[*one, digits(rng, STEP)] for one in kept for _ in range(_EXPAND.value)]
    listed = [{"steps": steps} for steps in candidates]
    start = time.perf_counter()
    answers = served.ask({"question": question, "images": [image], "solutions": listed})[
      "solutions"
    ]
    seconds += time.perf_counter() - start
    order = np.argsort([-answer["score"] for answer in answers], kind="stable")
    kept = [candidates[i] for i in order[: _BEAMS.value]]
    every += [answer["scores"] for answer in answers]
  return seconds, every


def measure(name: str, tokenizer: str) -> str:
  case = case_of(name)
  pixels = np.random.default_rng(0).integers(0, 256, (*case.size, 3), np.uint8)
  Image.fromarray(pixels).save(encoded := io.BytesIO(), "JPEG")
  image = base64.b64encode(encoded.getvalue()).decode()
  scorers = [scorer_of(case, tokenizer, size) for size in (0, 1 << 30)]
  servers = [Served(scorer) for scorer, _ in scorers]
  rng = np.random.default_rng(0)
  counts = [[case.images.cost(*case.size)[0]]]
  text = [(digits(rng, QUESTION), [digits(rng, STEP)])]
  [(tokens, _, prefix)] = scorers[0][1].prompt.encode_batch(text, counts, max_length=4096)
  prefix += counts[0][0] - 1
  own = len(tokens) + counts[0][0] - 1 - prefix
  print(f"{name}: {prefix} tokens of prefix, {own} of the first step", flush=True)
  seconds, worst = [], 0.0
  for seed in range(_ROUNDS.value):
    found = [search(served, seed, image) for served in servers]
    for a, b in zip(found[0][1], found[1][1], strict=True):
      worst = max(worst, float(np.abs(np.subtract(a, b)).max()))
    seconds.append([one for one, _ in found])
    print(f"  {seconds[-1][0]:.2f} s without, {seconds[-1][1]:.2f} s with the cache", flush=True)
  print(servers[1].ask(None, "/healthz")["cache"])
  without, cached = (statistics.median(side) for side in zip(*seconds, strict=True))
  return (
    f"| {name} | {_BEAMS.value} beams x {_EXPAND.value} x {STEPS} steps | {without:.2f} s "
    f"| {cached:.2f} s | {without / cached:.1f} | {worst:.0e} |"
  )


def main(argv: list[str]) -> None:
  """Prints a Markdown table."""
  del argv
  with tempfile.TemporaryDirectory() as cache:
    config = toy_bis10.get_config()
    config.corpus.cache = cache
    config.corpus.toy.rollouts, config.corpus.toy.images = 200, 100
    config.corpus.toy.benchmark_items = 24
    where = locations.locate(config)
    drawing.draw(where.toy, workers=1, **config.corpus.toy)
    lines = ["| model | search | without | with the cache | times | largest difference |"]
    lines.append("|---|---|---|---|---|---|")
    for name in ("qwen", "internvl"):
      if _MODEL.value in (None, name):
        lines.append(measure(name, where.tokenizer))
  print(*lines, sep="\n")


if __name__ == "__main__":
  app.run(main)
