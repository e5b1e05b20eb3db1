"""The scoring application on a real socket, with a stub for the model.

Its score of a step is the step's length / 1000, so that every answer can be checked.
"""

import base64
import http.client
import io
import json
import socket
import threading
import time

import numpy as np
from PIL import Image

from bis_jax import images
from bis_jax.scoring import http_protocol, server

LIMITS = server.Limits(
  body_bytes=200_000, body_seconds=0.5, steps=20, characters=5000, images=2, pixels=1 << 20
)


class Lengths:
  """Scores a step by its length; refuses steps that are too long; keeps the sizes of batches."""

  name = "lengths"
  cache = None

  def __init__(self, seconds: float = 0.0):
    self.batches, self._seconds = [], seconds

  image_patches = staticmethod(images.decode)

  def refused(self, examples):
    texts = [example.steps for example in examples]
    return {i: "too long" for i, steps in enumerate(texts) if max(map(len, steps)) > 1000}

  def score_each(self, examples):
    self.batches.append(len(examples))
    time.sleep(self._seconds)
    texts = [example.steps for example in examples]
    if any("break" in steps for steps in texts):
      raise RuntimeError("the device is gone")
    scores = [np.array([len(step) / 1000 for step in steps], np.float32) for steps in texts]
    return scores, self.refused(examples)


class QuickProtocol(http_protocol.Protocol):
  head_seconds = 0.3
  last_seconds = 0.3
  most = 40


class Served:
  """An application served on a free port by a thread of this process."""

  def __init__(self, scorer, limits=LIMITS, app=None, stop_seconds=20):
    self.scorer = scorer
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    self.port = listener.getsockname()[1]
    app = app or server.create_app(scorer, limits)
    self._server = http_protocol.Server(app, stop_seconds, QuickProtocol)
    self._thread = threading.Thread(target=self._server.run, args=([listener],))
    self._thread.start()
    while not self._server.started:
      time.sleep(0.01)

  @property
  def url(self):
    return f"http://127.0.0.1:{self.port}"

  def stop(self):
    self._server.should_exit = True
    self._thread.join()

  def call(self, body, method="POST", path="/score"):
    """Returns (status, JSON) of one request; `body` is bytes or an object."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
    encoded = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, encoded)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text.startswith(b"{") else text


def png(width=4, height=4):
  encoded = io.BytesIO()
  Image.new("RGB", (width, height)).save(encoded, "PNG")
  return base64.b64encode(encoded.getvalue()).decode()


def solution(*steps, **more):
  return {"question": "How many?", "steps": list(steps), **more}
