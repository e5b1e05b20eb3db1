"""The server over real sockets: correct answers, a reason for every rejection, clean shutdown.

The model is the stub of `tests/served.py`; `scoring_test.py` holds the real one against itself.
"""

import base64
import dataclasses
import http.client
import io
import json
import os
import re
import signal
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from absl import flags
from PIL import Image, ImageFile
from starlette.exceptions import HTTPException

from bis_jax.scoring import batcher, http_protocol, server
from bis_jax.scoring.server_metrics import ServerMetrics
from tests.commands import run_command
from tests.served import LIMITS, Lengths, QuickProtocol, Served, png, solution


@pytest.fixture(scope="module")
def served():
  one = Served(Lengths())
  yield one
  one.stop()


def test_steps_get_their_scores(served):
  special = "<prm> <|image_pad|> <|im_end|> \u0000 \U0001f600"
  for body in (
    solution("abc", "abcdef"),
    solution("x", images=[]),
    solution("x", images=None),
    solution("one", special, images=[png(), png()]),
    solution("one", image=png(), id={"a": [1]}),
  ):
    status, answer = served.call(body)
    assert status == 200
    want = [len(step) / 1000 for step in body["steps"]]
    np.testing.assert_allclose(answer["scores"], want, rtol=1e-6)
    assert answer.get("id") == body.get("id")


def test_health_says_what_is_served(served):
  assert served.call(None, "GET", "/healthz") == (
    200,
    {"status": "ok", "checkpoint": "lengths", "waiting": 0},
  )


# A PNG of 12,000 x 12,000 pixels without its pixels.
_IHDR = b"IHDR" + (12_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
_HUGE = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + _IHDR + zlib.crc32(_IHDR).to_bytes(4)
_HUGE += bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4)
HUGE = base64.b64encode(_HUGE).decode()
BAD = {
  "no_json": (b"{", 400, "not valid JSON"),
  "deep_json": (b"[" * 4000, 400, "not valid JSON"),
  "no_object": ([], 400, "Expected `object`, got `array`"),
  "unknown_key": (solution("a", imges=["x"]), 400, "unknown key `imges`; .*nearest.*`images`"),
  "both_names": (solution("a", image=[], images=[]), 400, "`image` and `images` are two names"),
  "placeholder": ({"question": "<image 1> x", "steps": ["a"]}, 422, "there is no image"),
  "nan_id": (b'{"id": NaN, "question": "x", "steps": ["a"]}', 400, "`id` must be JSON"),
  "url_for_image": (solution("a", images=["http://127.0.0.1/x.png"]), 400, "not base64: 'http:"),
  "path_for_image": (
    solution("a", images=[png(), "/etc/hostname"]),
    400,
    "not base64: '/etc/hostname'",
  ),
  "images_type": (solution("a", images=3), 400, r"got `int` - at `\$.images`"),
  "half_base64": (solution("a", images=[png()[:-3]]), 400, "not base64"),
  "broken_image": (solution("a", images=[png()[:60]]), 422, "image 0: broken"),
  "huge_image": (solution("a", images=[HUGE]), 422, "image 0: bomb"),
  "many_pixels": (solution("a", images=[png(1024, 800)] * 2), 422, "1,638,400 pixels in all"),
  "many_images": (solution("a", images=[png()] * 3), 413, "3 images; at most 2"),
  "many_steps": (solution(*["a"] * 100), 413, "100 steps; at most 20"),
  "many_characters": (solution("a" * 5001), 413, "5010 characters; at most 5000"),
  "long_step": (solution("a" * 1001), 422, "too long"),
  "no_steps": (solution(), 422, "at least one step"),
  "steps_type": ({"question": "x", "steps": "abc"}, 422, "`steps` must be a list"),
  "step_type": (solution("a", 3), 422, "`steps` must be a list of strings"),
  "no_question": ({"steps": ["a"]}, 422, "`question` must be a string"),
  "surrogate": (b'{"question": "x", "steps": ["\\ud800"]}', 400, "half of a surrogate pair"),
  "many_values": (b'{"id": [' + b"[]," * 9000 + b"0]}", 413, "more than 5022 JSON values"),
  "large_body": (b" " * 200_001, 413, "more than 200000 bytes"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_gets_a_reason(served, kind):
  body, status, reason = BAD[kind]
  got, answer = served.call(body)
  assert got == status
  assert re.search(reason, answer["error"]), answer


def test_other_methods_and_paths_are_refused(served):
  assert served.call(None, "GET") == (405, {"error": "Method Not Allowed"})
  assert served.call(None, "GET", "/etc/passwd") == (404, {"error": "Not Found"})


@pytest.mark.parametrize("pieces", [[], [b"POST /score HTTP/1.1\r\n", *[b"X"] * 20]])
def test_a_connection_without_a_request_is_closed(served, pieces):
  started = time.monotonic()
  try:
    assert raw(served.port, *pieces, pause=0.05) == b""
  except ConnectionError:
    pass  # closed while it was sending
  assert time.monotonic() - started < 10


def late_exif_png(width, height):
  """A PNG whose orientation is stored after the pixels, so that it must be decoded to be known."""
  encoded = io.BytesIO()
  Image.new("RGB", (width, height)).save(encoded, "PNG")
  data = encoded.getvalue()
  end = data.rindex(b"IEND") - 4
  exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
  chunk = len(exif).to_bytes(4) + b"eXIf" + exif + zlib.crc32(b"eXIf" + exif).to_bytes(4)
  return base64.b64encode(data[:end] + chunk + data[end:]).decode()


@pytest.mark.parametrize(
  ("body", "reason"),
  [
    (solution("a", images=[png(1025, 1024)]), "at most 1,048,576"),
    (solution("a", images=[late_exif_png(1025, 1024)]), "at most 1,048,576"),
    (solution("a" * 1001, images=[png()]), "too long"),
  ],
)
def test_pixels_and_tokens_are_counted_before_anything_is_decoded(
  served, monkeypatch, body, reason
):
  """Mutation caught: a bomb within the limit of one image is decoded before it is refused."""
  monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
  status, answer = served.call(body)
  assert status == 422 and reason in answer["error"]


def test_text_does_not_wait_for_the_images_of_others(served, monkeypatch):
  """Mutation caught: images are decoded in the batch, or on the thread that reads text."""
  decoding, done = threading.Event(), threading.Event()
  monkeypatch.setattr(
    Lengths, "image_patches", staticmethod(lambda data: (decoding.set(), done.wait(20)))
  )
  answers = []
  thread = threading.Thread(
    target=lambda: answers.append(served.call(solution("abc", images=[png()])))
  )
  thread.start()
  assert decoding.wait(20)
  assert served.call(solution("abc"))[0] == 200 and not answers
  done.set()
  thread.join()
  assert answers[0][0] == 200


def test_clients_take_turns():
  scorer = batcher.Batcher(None, 3, ServerMetrics())
  queue = [batcher._Waiting(client, None, i) for i, client in enumerate("aaaabc")]
  taken, rest = scorer._next_batch(queue)
  assert [one.answer for one in taken] == [0, 4, 5] and [one.answer for one in rest] == [1, 2, 3]


def test_a_client_may_hold_half(served):
  """Mutation caught: one client's slow bodies take every place, so that others get a 503."""
  shared = server._Shared(5, "requests")
  for _ in range(3):
    shared.take("a")
  for client, reason in (("a", "your address a has 3 requests waiting, of at most 3"), ("b", "")):
    for _ in range(2):
      try:
        shared.take(client)
      except HTTPException as error:
        assert error.status_code == 503 and reason in error.detail
  with pytest.raises(HTTPException, match="the server has 5 requests waiting, of at most 5"):
    shared.take("c")
  shared.give_back("a")
  shared.take("c")
  assert shared.total() == 5


def test_the_bytes_of_all_bodies_are_bounded():
  served = Served(Lengths(), dataclasses.replace(LIMITS, held_bytes=100_000, small_bytes=1000))
  length = b"Content-Length: 150000\r\n\r\n"
  answer = raw(served.port, HEAD + length, b" " * 40_000, b" " * 30_000, pause=0.1)
  assert answer.startswith(b"HTTP/1.1 503") and b"bytes waiting, of at most 50000" in answer
  assert served.call(solution("a"))[0] == 200
  served.stop()


def test_silent_connections_make_room_for_others(served):
  """Mutation caught: silent connections of one client use up the open files."""
  silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(60)]
  assert served.call(solution("a"))[0] == 200
  assert len(QuickProtocol._open) <= QuickProtocol.most
  for connection in silent:
    connection.close()


@pytest.mark.parametrize(
  ("flag", "message"),
  [("--body_seconds=nan", "--body_seconds must be"), ("--body_seconds=0", "--body_seconds must")],
)
def test_flags_that_make_no_sense_are_refused(tmp_path, flag, message):
  assert message in run_command("serve", f"--checkpoint={tmp_path}", flag)


@pytest.mark.parametrize("flag", ["--batch=0", "--waiting=0", "--rows=-1", "--port=70000"])
def test_flags_out_of_range_are_refused(tmp_path, flag):
  with pytest.raises(flags.IllegalFlagValueError):
    run_command("serve", f"--checkpoint={tmp_path}", flag)


def test_a_port_in_use_is_noticed_before_the_model_is_loaded(served, tmp_path):
  message = run_command("serve", f"--checkpoint={tmp_path}", f"--port={served.port}")
  assert f"--port={served.port}, name another: Address already in use" in message


def raw(port, *pieces, pause=0.0):
  """Sends raw bytes, and returns the answer until the server closes."""
  with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
    for piece in pieces:
      connection.sendall(piece)
      time.sleep(pause)
    answer = b""
    while part := connection.recv(65536):
      answer += part
  return answer


HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\n"


def test_a_slow_body_is_given_up(served):
  answer = raw(served.port, HEAD + b"Content-Length: 100\r\n\r\n", b"{")
  assert answer.startswith(b"HTTP/1.1 408") and b"within 0.5 s" in answer


def test_a_body_without_a_length_is_cut_at_the_limit(served):
  chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
  last = b"1000\r\n" + b" " * 0x1000 + b"\r\n"  # over the limit, and nothing is left unread by it
  answer = raw(served.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 6, last)
  assert answer.startswith(b"HTTP/1.1 413")


def test_a_client_that_goes_away_leaves_the_server_well(served):
  body = json.dumps(solution("abc")).encode()
  for sent in (b"", body[:10], body):
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
      connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + sent)
  assert served.call(solution("abc"))[0] == 200
  time.sleep(0.7)  # longer than a body may take
  assert served.call(None, "GET", "/healthz")[1]["waiting"] == 0


def test_what_waits_is_scored_in_one_batch_and_each_gets_its_own():
  served = Served(Lengths(seconds=0.2))
  answers = {}

  def ask(length):
    answers[length] = served.call(solution("a" * length))

  threads = [threading.Thread(target=ask, args=(length,)) for length in range(1, 25)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  served.stop()
  for length, (status, answer) in answers.items():
    assert status == 200 and answer["scores"] == [pytest.approx(length / 1000)]
  assert sum(served.scorer.batches) == 24 and len(served.scorer.batches) <= 4


def test_a_full_house_says_so_and_a_failed_batch_hurts_no_other():
  served = Served(Lengths(seconds=0.3), server.Limits(waiting=4))
  statuses = []
  threads = [
    threading.Thread(target=lambda: statuses.append(served.call(solution("a"))[0]))
    for _ in range(8)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  status, answer = served.call(solution("break"))
  assert status == 500 and "internal error" in answer["error"]
  assert served.call(solution("fine"))[0] == 200
  served.stop()
  assert set(statuses) == {200, 503} and statuses.count(200) >= 2


def test_sigterm_ends_it_once_all_that_have_connected_are_answered(monkeypatch):
  """Mutations caught: what waits in the listener's backlog, or is sent on an open connection, is reset.

  The loop stands still from the moment it stops until all have connected, so it accepts none before.
  """
  in_flight, stopping, go_on = threading.Event(), threading.Event(), threading.Event()
  stop = http_protocol.Server.shutdown

  async def stop_late(self, sockets=None):
    stopping.set()
    go_on.wait(20)
    await stop(self, sockets)

  class Busy(Lengths):
    def score_each(self, examples):
      if self.batches:  # all but the first
        in_flight.set()
        go_on.wait(20)
      return super().score_each(examples)

  monkeypatch.setattr(http_protocol.Server, "shutdown", stop_late)
  listener = socket.create_server(("127.0.0.1", 0))
  address = listener.getsockname()

  def connect():
    connection = http.client.HTTPConnection(*address, timeout=20)
    connection.connect()
    return connection

  def ask(connection, length):
    connection.request("POST", "/score", json.dumps(solution("a" * length)))

  def answer(connection, length):
    response = connection.getresponse()
    assert json.loads(response.read()) == {"scores": [pytest.approx(length / 1000)]}
    return response.status, response.getheader("connection")

  def clients():
    try:
      used, busy = connect(), connect()
      ask(used, 65)
      assert answer(used, 65) == (200, None)
      ask(busy, 67)
      assert in_flight.wait(20)
    finally:
      os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.wait(20)
    waiting, late = [connect() for _ in range(64)], connect()
    for length, one in enumerate([*waiting, used]):
      ask(one, length + 1)
    go_on.set()
    ask(late, 66)
    for length, one in enumerate([*waiting, used, late, busy]):
      assert answer(one, length + 1) == (200, "close")

  before = signal.getsignal(signal.SIGTERM)
  try:
    with ThreadPoolExecutor(1) as pool:
      done = pool.submit(clients)
      http_protocol.serve(server.create_app(Busy(), server.Limits()), listener, stop_seconds=20)
      done.result()
  finally:
    signal.signal(signal.SIGTERM, before)
  with pytest.raises(ConnectionRefusedError):
    connect()


def test_what_takes_too_long_at_the_end_is_told_so():
  scorer = Lengths(seconds=3.0)
  served = Served(scorer, stop_seconds=1)
  found = []
  asking = threading.Thread(target=lambda: found.append(served.call(solution("a"))))
  asking.start()
  while not scorer.batches:
    time.sleep(0.01)
  started = time.monotonic()
  served.stop()
  asking.join()
  assert time.monotonic() - started < 2.5
  assert found == [(503, {"error": "the server stops before it could answer; ask again"})]
