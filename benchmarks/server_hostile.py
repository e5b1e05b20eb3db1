"""Text requests to the scoring server while another client is hostile to it.

  python -m benchmarks.server_hostile WORKDIR [--seconds=180] [--attackers=4]

Two clients of 127.0.0.1 send text and compare every answer with the one before the attack. The
attackers, of 127.0.0.2, send decompression bombs, images that are none, bodies that are huge, deep
or of many values, texts of 200,000 characters, heads and bodies byte by byte, and connections
without a request. Asked: resident memory at most 1.5 times that of the idle server, 99 % of the
text requests within 2 s. Results: benchmarks/RESULTS.md.
"""

import argparse
import base64
import collections
import http.client
import io
import json
import random
import socket
import threading
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from benchmarks.server_soak import PORT, huge_png, resident_mb, start_server

ATTACKER = ("127.0.0.2", 0)


def request(body: bytes, source: tuple[str, int] | None = None) -> tuple[int, dict]:
  """Returns (status, answer)."""
  connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60, source_address=source)
  try:
    connection.request("POST", "/score", body)
    response = connection.getresponse()
    return response.status, json.loads(response.read())
  finally:
    connection.close()


def body_of(*images: bytes, **more: object) -> bytes:
  encoded = [base64.b64encode(image).decode() for image in images]
  return json.dumps({"question": "q", "steps": ["s"], "images": encoded} | more).encode()


def image(mode: str, side: int, form: str = "PNG", **options: object) -> bytes:
  encoded = io.BytesIO()
  Image.new(mode, (side, side)).save(encoded, form, **options)
  return encoded.getvalue()


def jpeg_of_scans(count: int) -> bytes:
  data = image("L", 4000, "JPEG", progressive=True)
  scan, end = data.rindex(b"\xff\xc4"), data.rindex(b"\xff\xd9")
  return data[:end] + data[scan:end] * count + data[end:]


def late_orientation(data: bytes) -> bytes:
  """Returns a PNG with a mark that makes Pillow decode it to find its orientation."""
  end = data.rindex(b"IEND") - 4
  return data[:end] + bytes(4) + b"eXIf" + bytes(4) + data[end:]


def attacks() -> dict[str, Callable[[], int | str]]:
  """Returns what an attacker does, by name; each returns the status or what happened."""
  one_bit = image("1", 4000)
  bodies = {
    "RGBA bomb, 81 MP": body_of(image("RGBA", 9000)),
    "RGBA bomb, 81 MP, orientation last": body_of(late_orientation(image("RGBA", 9000))),
    "RGBA, 16 MP": body_of(image("RGBA", 4000)),
    "one bit, 16 MP": body_of(one_bit),
    "one bit, 16 x 1 MP": body_of(*[image("1", 1000)] * 16),
    "one bit, 16 x 16 MP": body_of(*[one_bit] * 16),
    "header of 144 MP": body_of(huge_png()),
    "JPEG of 300 scans": body_of(jpeg_of_scans(300)),
    "EPS": body_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "deep JSON": b'{"id": ' + b"[" * 100_000,
    "11 million values": b'{"id": [' + b"[]," * 11_000_000 + b"0]}",
    "body of 40 MB": b" " * 40_000_000,
    "body of 30 MB": body_of(b" " * 22_000_000),
    "one word of 190,000 letters": body_of(question="a" * 190_000),
    "190,000 marks": body_of(question="\u0301" * 190_000),
    "10,000 steps": body_of(steps=["s"] * 10_000),
    "half a surrogate": b'{"question": "\\ud800", "steps": ["s"]}',
    "NaN as id": b'{"id": NaN, "question": "q", "steps": ["s"]}',
  }

  def send(body: bytes) -> int | str:
    try:
      return request(body, ATTACKER)[0]
    except (ConnectionError, http.client.HTTPException):  # it closes while a body is being sent
      return "closed"

  def drip(data: bytes) -> str:
    with socket.create_connection(("127.0.0.1", PORT), 60, ATTACKER) as connection:
      try:
        connection.sendall(data)
        for _ in range(100):
          connection.sendall(b"x")
          time.sleep(0.3)
      except ConnectionError:
        return "closed"
    return "NOT CLOSED"

  def silent() -> str:
    connections = [socket.create_connection(("127.0.0.1", PORT), 60, ATTACKER) for _ in range(200)]
    time.sleep(5)
    for connection in connections:
      connection.close()
    return "left"

  def at_once() -> str:
    threads = [
      threading.Thread(target=send, args=(bodies[kind],))
      for kind in ("one bit, 16 x 1 MP", "one bit, 16 MP")
      for _ in range(16)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return "answered"

  head = b"POST /score HTTP/1.1\r\nHost: x\r\n"
  return {name: lambda body=body: send(body) for name, body in bodies.items()} | {
    "32 requests of one-bit images at once": at_once,
    "head byte by byte": lambda: drip(head),
    "body byte by byte": lambda: drip(head + b"Content-Length: 1000\r\n\r\n"),
    "200 silent connections": silent,
  }


class Load:
  """The text clients and the attackers, and what happened to them."""

  def __init__(self, texts: list[bytes]):
    self._texts, self._stop = texts, threading.Event()
    self._wanted = [request(text)[1]["scores"] for text in texts]
    self._attacks = attacks()
    self.outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    self.seconds: list[float] = []

  def run(self, seconds: float, attackers: int, clients: int = 2) -> None:
    threads = [threading.Thread(target=self._client, args=(i,)) for i in range(clients)]
    threads += [threading.Thread(target=self._attacker, args=(i,)) for i in range(attackers)]
    for thread in threads:
      thread.start()
    time.sleep(seconds)
    self._stop.set()
    for thread in threads:
      thread.join()

  def _client(self, seed: int) -> None:
    draw = random.Random(seed)
    while not self._stop.wait(0.05):
      i = draw.randrange(len(self._texts))
      start = time.perf_counter()
      status, answer = request(self._texts[i])
      self.seconds.append(time.perf_counter() - start)
      right = status == 200 and np.allclose(answer["scores"], self._wanted[i], rtol=0, atol=1e-5)
      self.outcomes["text", "right" if right else f"WRONG {status} {answer}"[:120]] += 1

  def _attacker(self, seed: int) -> None:
    draw = random.Random(seed)
    while not self._stop.is_set():
      order = list(self._attacks)
      draw.shuffle(order)
      for kind in order:
        if self._stop.is_set():
          return
        self.outcomes[kind, str(self._attacks[kind]())] += 1


def main() -> None:
  """Runs the attack and prints what happened."""
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir")
  parser.add_argument("--seconds", type=float, default=180)
  parser.add_argument("--attackers", type=int, default=4)
  args = parser.parse_args()
  process = start_server(args.workdir)
  try:
    texts = [
      json.dumps({"question": f"Add {i} and 2.", "steps": [f"{i} + 2 = {i + 2}."] * (1 + i % 3)})
      for i in range(20)
    ]
    load, memory = Load([text.encode() for text in texts]), []
    idle = resident_mb(process.pid)
    done = threading.Event()

    def watch() -> None:
      while not done.wait(0.1):
        memory.append(resident_mb(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    load.run(args.seconds, args.attackers)
    done.set()
    watcher.join()
  finally:
    process.terminate()
  for (kind, outcome), count in sorted(load.outcomes.items()):
    print(f"{kind:40} {outcome}: {count}")
  median, most = np.quantile(load.seconds, [0.5, 0.99])
  print(f"text requests: median {median:.3f} s, 99 % within {most:.3f} s", end=", ")
  print(f"slowest {max(load.seconds):.3f} s")
  print(f"resident MB: idle {idle:.0f}, most {max(memory):.0f}", end=", ")
  print(f"{max(memory) / idle:.2f} times; exit code {process.wait(timeout=60)}")


if __name__ == "__main__":
  main()
