"""Soaks the scoring server: clients of mixed requests, a tenth of them broken, then SIGTERM.

  python -m benchmarks.server_soak WORKDIR --benchmark=DIR [--seconds=180] [--clients=64] [--lists]

WORKDIR is a run's, DIR a benchmark of the same kind (the toy run's is in its corpus cache). The
right answers are computed first, one at a time with the same model in this process. Then the
server's process is started. Throughput: rounds of one-at-a-time calls here and of `--burst` clients
there alternate, so that both meet the same machine. Soak: `--clients` threads for `--seconds`;
every answer is compared. Requests are of all forms: `/score` of one solution, with data: URIs and of
lists, `/pooling` and `/get_reward`. A tenth is broken: bad base64, an image of 12,000 x 12,000 pixels,
10,000 steps, a body that stops half way, an unknown key, a message without a role, prompts that are
not in their queries. Texts with special tokens are good requests. At the end a SIGTERM arrives while
requests are in flight. Lists: 16 solutions of one question and image (the benchmark's largest, then
pictures of a camera's size) in one request, in 16 requests one after the other, and in 16 at once
alternate, each time of a new question. Results: benchmarks/RESULTS.md.
"""

import argparse
import base64
import collections
import http.client
import io
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging
from PIL import Image

from bis_jax.evaluation import visual_process_bench
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.solutions import Solution

PORT = 8765
SPECIAL = "<prm> <|image_pad|> <|im_end|><image>"


def huge_png() -> bytes:
  """Returns a PNG whose header says 12,000 x 12,000 pixels."""
  head = b"IHDR" + (12_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
  chunk = (13).to_bytes(4) + head + zlib.crc32(head).to_bytes(4)
  return b"\x89PNG\r\n\x1a\n" + chunk + bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4)


BROKEN = {
  "bad base64": ("/score", {"question": "q", "steps": ["s"], "images": ["@@@"]}),
  "huge image": (
    "/score",
    {"question": "q", "steps": ["s"], "images": [base64.b64encode(huge_png()).decode()]},
  ),
  "10,000 steps": ("/score", {"question": "q", "steps": ["s"] * 10_000}),
  "unknown key": ("/score", {"question": "q", "solutions": [{"step": ["s"]}]}),
  "no role": ("/pooling", {"messages": [{"content": "q"}]}),
  "other prompt": ("/get_reward", {"query": ["a"], "prompts": ["b"]}),
  "slow body": None,
}
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def good_solutions(folder: str, count: int) -> list[Solution]:
  """Returns benchmark items, some without images, some with special tokens in their text."""
  found = []
  for item in visual_process_bench.load(folder)[:count]:
    images = visual_process_bench.encoded_images(item) if item.index % 5 else ()
    steps = list(item.steps)
    if item.index % 7 == 0:
      steps[0] += " " + SPECIAL
    found.append(Solution.of(item.question, steps, images))
  return found


Request = tuple[str, bytes, Callable[[dict], list]]  # path, body, scores of an answer


def requests_of(solution: Solution) -> dict[str, Request]:
  """Returns a request of each form, whose answer holds the same scores."""
  encoded = [base64.b64encode(image).decode() for image in solution.images]
  uris = [f"data:image/png;base64,{base64.encodebytes(i).decode()}" for i in solution.images]
  record = {"question": solution.question, "steps": solution.steps}
  listed = {"question": solution.question, "images": uris, "solutions": [record] * 3}
  parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
  parts.append({"type": "text", "text": solution.question})
  marked = "".join(step + "<prm>" for step in solution.steps)
  prompt = PROMPT.format(solution.question)
  reward = {
    "query": [prompt + "\n\n".join(solution.steps) + "<|im_end|>"],
    "prompts": [prompt],
    "labels": [{"images": encoded}],
  }
  messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": marked}]
  forms = {
    "score": ("/score", record | {"images": encoded}, lambda answer: answer["scores"]),
    "data: URIs": ("/score", record | {"images": uris}, lambda answer: answer["scores"]),
    "list": (
      "/score",
      listed,
      lambda answer: np.mean([s["scores"] for s in answer["solutions"]], 0),
    ),
    "pooling": (
      "/pooling",
      {"messages": messages},
      lambda answer: [pair[0] for pair in answer["data"][0]["data"]],
    ),
    "reward": ("/get_reward", reward, lambda answer: answer["rewards"]),
  }
  if SPECIAL in solution.steps[0]:  # markers and end tokens mean something in these texts
    del forms["pooling"], forms["reward"]
  return {
    name: (path, json.dumps(body).encode(), read) for name, (path, body, read) in forms.items()
  }


def wanted_of(form: str, scores: np.ndarray) -> np.ndarray:
  return scores.min(keepdims=True) if form == "reward" else scores


def post(body: bytes, path: str = "/score") -> tuple[int, dict]:
  """Returns (status, answer)."""
  connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
  connection.request("POST", path, body)
  response = connection.getresponse()
  answer = json.loads(response.read())
  connection.close()
  return response.status, answer


def post_half(body: bytes) -> tuple[int, dict]:
  """Sends half of the body and returns the server's answer."""
  with socket.create_connection(("127.0.0.1", PORT), timeout=60) as connection:
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body[: len(body) // 2])
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def resident_mb(pid: int) -> float:
  """Returns the resident memory of a process."""
  with open(f"/proc/{pid}/status") as file:
    return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


class Clients:
  """Threads that send requests until they are stopped, and the result of every request."""

  def __init__(
    self, requests: list[dict[str, Request]], wanted: list[np.ndarray], broken_share: float
  ):
    self._requests, self._wanted, self._broken_share = requests, wanted, broken_share
    self._stop, self._lock = threading.Event(), threading.Lock()
    self.outcomes = collections.Counter()
    self.seconds = []

  def run(self, clients: int, seconds: float, at_end=lambda: None) -> float:
    """Sends requests for some seconds; returns the wall time until the last answer."""
    threads = [threading.Thread(target=self._client, args=(seed,)) for seed in range(clients)]
    start = time.perf_counter()
    for thread in threads:
      thread.start()
    time.sleep(seconds)
    self._stop.set()
    at_end()
    for thread in threads:
      thread.join()
    return time.perf_counter() - start

  def _client(self, seed: int) -> None:
    draw = random.Random(seed)
    while not self._stop.is_set():
      start = time.perf_counter()
      good = draw.random() >= self._broken_share
      if good:
        i = draw.randrange(len(self._requests))
        kind = draw.choice(list(self._requests[i]))
        path, body, read = self._requests[i][kind]
        status, answer = post(body, path)
        wanted = wanted_of(kind, self._wanted[i])
        right = status == 200 and np.allclose(read(answer), wanted, rtol=0, atol=1e-5)
      else:
        kind = draw.choice(list(BROKEN))
        path, body = BROKEN[kind] or ("", None)
        status, answer = (
          post_half(self._requests[0]["score"][1])
          if body is None
          else post(json.dumps(body).encode(), path)
        )
        right = 400 <= status < 500 and bool(answer.get("error"))
      with self._lock:
        self.outcomes[kind, "as wanted" if right else f"WRONG {status} {answer}"[:160]] += 1
        if good:
          self.seconds.append(time.perf_counter() - start)


def photo(width: int, height: int) -> bytes:
  """Returns a JPEG with about as much detail as a photograph."""
  pixels = np.random.default_rng(0).integers(0, 255, (height // 16, width // 16, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(
    file, "JPEG", quality=90
  )
  return file.getvalue()


def lists(
  solutions_of_one: list[Solution], picture: bytes, rounds: int = 9, times: int = 3
) -> None:
  """Prints how many solutions a second are scored in one request, and in one request each.

  Every time they answer a question of their own, so that the server has seen nothing of it.
  """
  image = base64.b64encode(picture).decode()
  steps = [list(one.steps) for one in solutions_of_one]
  asked = 0

  def bodies() -> tuple[bytes, list[bytes]]:
    nonlocal asked
    asked += 1
    shared = {"question": f"{asked}. {solutions_of_one[0].question}", "images": [image]}
    one = json.dumps(shared | {"solutions": [{"steps": own} for own in steps]}).encode()
    return one, [json.dumps(shared | {"steps": own}).encode() for own in steps]

  def in_turn(_: bytes, each: list[bytes]) -> list[list[float]]:
    return [post(body)[1]["scores"] for body in each]

  def at_once(_: bytes, each: list[bytes]) -> list[list[float]]:
    with ThreadPoolExecutor(len(each)) as pool:
      return [answer["scores"] for _, answer in pool.map(post, each)]

  def together(one: bytes, _: list[bytes]) -> list[list[float]]:
    return [entry["scores"] for entry in post(one)[1]["solutions"]]

  ways = {"16 requests in turn": in_turn, "16 at once": at_once, "one request": together}
  same = bodies()
  for one, two, three in zip(*(ask(*same) for ask in ways.values()), strict=True):
    np.testing.assert_allclose(one, three, rtol=0, atol=1e-5)
    np.testing.assert_allclose(two, three, rtol=0, atol=1e-5)
  rates = []
  for _ in range(rounds):
    seconds = dict.fromkeys(ways, 0.0)
    for _ in range(times):
      for name, ask in ways.items():
        new = bodies()
        start = time.perf_counter()
        ask(*new)
        seconds[name] += time.perf_counter() - start
    rates.append([len(steps) * times / second for second in seconds.values()])
  for name, rate in zip(ways, np.transpose(rates), strict=True):
    print(f"{name}: median {np.median(rate):.1f}, at most {rate.max():.1f} solutions/s")
  in_turns, at_onces, ones = np.array(rates).T
  print(f"one request: median {np.median(ones / in_turns):.2f} times as many solutions a second as")
  print(f"in turn, {np.median(ones / at_onces):.2f} times as many as at once")


def start_server(workdir: str, *flags: str) -> subprocess.Popen:
  """Starts the server and returns its process once it answers."""
  command = [sys.executable, "-m", "bis_jax.serve", f"--checkpoint={workdir}", f"--port={PORT}"]
  process = subprocess.Popen([*command, "--body_seconds=1", "--rows=2", *flags])
  while True:
    try:
      connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
      connection.request("GET", "/healthz")
      assert connection.getresponse().status == 200
      return process
    except ConnectionError:
      assert process.poll() is None, "the server did not start"
      time.sleep(0.5)


def throughput(
  scorer: step_scorer.Scorer,
  chosen: list[Solution],
  requests: list[dict[str, Request]],
  wanted: list[np.ndarray],
  clients: int,
  rounds: int = 4,
  seconds: float = 5,
) -> None:
  """Prints the rates of one-at-a-time calls and of the server, round by round."""
  ratios = []
  for _ in range(rounds):
    start, done = time.perf_counter(), 0
    while (wall := time.perf_counter() - start) < seconds:
      solutions.score(scorer, [chosen[done % len(chosen)]])
      done += 1
    alone = done / wall
    burst = Clients([{"score": forms["score"]} for forms in requests], wanted, 0.0)
    wall = burst.run(clients, seconds)
    served = burst.outcomes["score", "as wanted"] / wall
    assert burst.outcomes.total() == burst.outcomes["score", "as wanted"], burst.outcomes
    ratios.append(served / alone)
    print(f"one at a time {alone:6.1f}/s, server with {clients} clients {served:6.1f}/s", end=", ")
    print(f"{ratios[-1]:.1f} times as many")
  print(f"median: {np.median(ratios):.1f} times")


def main() -> None:
  """Runs the soak and prints what happened."""
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir")
  parser.add_argument("--benchmark", required=True)
  parser.add_argument("--seconds", type=float, default=180)
  parser.add_argument("--clients", type=int, default=64)
  parser.add_argument("--burst", type=int, default=32)
  parser.add_argument("--cache_mb", type=int, default=1024)
  parser.add_argument("--lists", action="store_true", help="no soak and no burst")
  args = parser.parse_args()
  logging.set_verbosity(logging.WARNING)
  chosen = good_solutions(args.benchmark, 100)
  scorer = step_scorer.load(args.workdir, workers=0)
  scorer.warm_up()
  wanted = [solutions.score(scorer, [solution])[0] for solution in chosen]
  requests = [requests_of(solution) for solution in chosen]
  process = start_server(args.workdir, f"--cache_mb={args.cache_mb}")
  if args.burst and not args.lists:
    throughput(scorer, chosen, requests, wanted, args.burst)
  largest = max(range(len(chosen)), key=lambda i: sum(map(len, chosen[i].images)))
  beginnings = [
    chosen[largest].with_texts(chosen[largest].question, [f"{k}.", *chosen[largest].steps])
    for k in range(16)
  ]
  pictures = {"benchmark": chosen[largest].images[0]}
  pictures |= {f"{w} x {h}": photo(w, h) for w, h in ((640, 480), (1280, 960))}
  for name, picture in pictures.items():
    print(f"one image, {name}, {len(picture):,} bytes, and 16 solutions:")
    lists(beginnings, picture)
  if args.lists:
    process.terminate()
    return

  soak, memory = Clients(requests, wanted, 0.1), []
  watching = threading.Event()

  def watch() -> None:
    while not watching.wait(args.seconds / 12):
      memory.append(resident_mb(process.pid))

  watcher = threading.Thread(target=watch)
  watcher.start()
  soak.run(args.clients, args.seconds)
  watching.set()
  watcher.join()
  for (kind, outcome), count in sorted(soak.outcomes.items()):
    print(f"{kind:14} {outcome}: {count}")
  print(f"good requests: median {1000 * np.median(soak.seconds):.0f} ms", end=", ")
  print(f"99 % within {1000 * np.quantile(soak.seconds, 0.99):.0f} ms")
  print("resident MB:", " ".join(f"{mb:.0f}" for mb in memory))

  # Every client has connected and sent a request when the signal arrives.
  last, sent = collections.Counter(), []
  for k in range(args.clients):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    path, body, _ = requests[k % len(requests)]["score"]
    connection.request("POST", path, body)
    sent.append((connection, wanted[k % len(requests)]))
  process.send_signal(signal.SIGTERM)
  for connection, scores in sent:
    try:
      response = connection.getresponse()
      answer = json.loads(response.read())
      right = response.status == 200 and np.allclose(answer["scores"], scores, rtol=0, atol=1e-5)
      last["right" if right else f"WRONG {response.status} {answer}"] += 1
    except OSError as error:
      last[f"WRONG {error!r}"] += 1
  print("sent before SIGTERM:", dict(last), "exit code", process.wait(timeout=60))


if __name__ == "__main__":
  main()
