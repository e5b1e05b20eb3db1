"""A small Google Cloud Storage: the JSON API as gcsfs and TensorStore use it, with injected faults.

Unlike the emulators on PyPI it honours preconditions (`ifGenerationMatch`), answers many requests
at once, and can fail on purpose. Objects are in memory. By hand: python -m tests.bucket_server PORT
"""

import base64
import contextlib
import dataclasses
import email
import http.server
import json
import re
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import google_crc32c


@dataclasses.dataclass
class Fault:
  """What happens to the next `times` requests with `method` and `name` in their URL.

  They wait `delay` seconds; then they get `status`, or with `cut` the connection breaks in the middle
  of the body, or with neither they succeed.
  """

  method: str = ""  # "": any
  name: str = ""
  status: int = 0
  delay: float = 0.0
  cut: bool = False
  times: float = float("inf")


@dataclasses.dataclass(frozen=True)
class Stored:
  """The content of an object; every write makes a new generation."""

  data: bytes
  generation: int
  updated: float


class BucketServer:
  """The service; buckets exist once `make_bucket` has named them.

  `log` has (method, "bucket/object", bytes of the body or answer) of every request that succeeded;
  buckets in `forbidden` answer 403. `stop` and `start` keep port and objects.
  """

  def __init__(self, port: int = 0):
    self.objects: dict[str, dict[str, Stored]] = {}
    self.faults: list[Fault] = []
    self.forbidden: set[str] = set()
    self.log: list[tuple[str, str, int]] = []
    self.lock = threading.RLock()
    self.uploads: dict[str, tuple[dict[str, str], bytearray]] = {}
    self._generation = time.time_ns() // 1000
    self.port = port
    self._server: _Server | None = None

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.port}"

  @property
  def environment(self) -> dict[str, str]:
    """Makes a process use this service: gcsfs, and TensorStore for Orbax."""
    return {
      "STORAGE_EMULATOR_HOST": self.url,
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      "NO_GCE_CHECK": "true",
    }

  def start(self) -> None:
    self._server = _Server(("127.0.0.1", self.port), self)
    self.port = self._server.server_address[1]
    threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

  def stop(self) -> None:
    """Refuses connections from now on, and breaks the open ones."""
    if self._server:
      self._server.shutdown()
      self._server.server_close()
      self._server.break_connections()
      self._server = None

  def make_bucket(self, name: str) -> str:
    self.objects.setdefault(name, {})
    return f"gs://{name}"

  def write(self, bucket: str, name: str, data: bytes) -> Stored:
    with self.lock:
      self._generation += 1
      stored = Stored(data, self._generation, time.time())
      self.objects[bucket][name] = stored
      return stored

  def names(self, prefix: str = "") -> list[str]:
    """Returns the sorted "bucket/object" names that start with `prefix`."""
    with self.lock:
      names = [f"{bucket}/{name}" for bucket, held in self.objects.items() for name in held]
    return sorted(name for name in names if name.startswith(prefix))

  @contextlib.contextmanager
  def failing(self, **fault: Any) -> Iterator[Fault]:
    """Injects a `Fault` for the block."""
    self.faults.append(made := Fault(**fault))
    try:
      yield made
    finally:
      self.faults.remove(made)

  def fault(self, method: str, url: str) -> Fault:
    with self.lock:
      for fault in self.faults:
        if fault.method in ("", method) and fault.name in url and fault.times > 0:
          fault.times -= 1
          return fault
    return Fault()


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 256

  def __init__(self, address: tuple[str, int], bucket_server: BucketServer):
    self.bucket_server = bucket_server
    self._open: set[socket.socket] = set()
    super().__init__(address, _Handler)

  def process_request(self, request: Any, client_address: Any) -> None:
    self._open.add(request)
    super().process_request(request, client_address)

  def shutdown_request(self, request: Any) -> None:
    self._open.discard(request)
    super().shutdown_request(request)

  def break_connections(self) -> None:
    for connection in list(self._open):
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)

  def handle_error(self, request: Any, client_address: Any) -> None:
    if not isinstance(sys.exc_info()[1], OSError):  # else the client has gone
      super().handle_error(request, client_address)


class _Failure(Exception):
  def __init__(self, status: int):
    self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  server: _Server

  def log_message(self, *_: Any) -> None:
    pass

  def do_GET(self) -> None:
    self._answer()

  do_POST = do_PUT = do_DELETE = do_GET

  def _answer(self) -> None:
    service = self.server.bucket_server
    url = urllib.parse.urlsplit(self.path)
    self.query = {k: v[-1] for k, v in urllib.parse.parse_qs(url.query, True).items()}
    size = int(self.headers.get("Content-Length", 0))
    self.body = self.rfile.read(min(size, 500))
    named = self.body if self.query.get("uploadType") in ("multipart", "resumable") else b""
    fault = service.fault(self.command, urllib.parse.unquote(self.path) + named.decode("latin-1"))
    if fault.delay:
      time.sleep(fault.delay)
    if fault.cut and size:
      self._break()
      return
    self.body += self.rfile.read(size - len(self.body))
    try:
      if fault.status:
        raise _Failure(fault.status)
      status, headers, content = self._route(url.path)
    except _Failure as failure:
      status, headers = failure.status, {"Content-Type": "application/json"}
      error = {"code": status, "message": f"failure {status}", "errors": []}
      content = b"" if status in (304, 308) else json.dumps({"error": error}).encode()
    if status < 300 and not fault.cut:  # before the client goes on
      service.log.append((self.command, self._target, size or len(content)))
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if fault.cut:
      self.wfile.write(content[: len(content) // 2])
      self._break()
      return
    self.wfile.write(content)

  def _break(self) -> None:
    self.close_connection = True
    self.connection.shutdown(socket.SHUT_RDWR)

  def _route(self, path: str) -> tuple[int, dict[str, str], bytes]:
    self._target = path
    if path == "/batch/storage/v1":
      return self._batch()
    found = re.fullmatch(r"(?:/(?:upload|download))?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
    if not found:
      raise _Failure(501)
    bucket, rest = found[1], found[2]
    service = self.server.bucket_server
    if bucket in service.forbidden:
      raise _Failure(403)
    if bucket not in service.objects:
      raise _Failure(404)
    with service.lock:
      if not rest:
        self._target = bucket
        if self.command in ("POST", "PUT"):
          return self._upload(bucket)
        return self._json(self._list(bucket) if path.endswith("/o") else {"name": bucket})
      name, *action = (urllib.parse.unquote(part) for part in rest.split("/"))
      self._target = f"{bucket}/{name}"
      if self.command == "DELETE":
        self._find(bucket, name)
        del service.objects[bucket][name]
        return 204, {}, b""
      if self.command == "POST":
        return self._json(self._derive(bucket, name, action))
      stored = self._find(bucket, name)
      if self.query.get("alt") == "media":
        return self._media(stored)
      return self._json(_resource(bucket, name, stored))

  def _json(self, value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

  def _find(self, bucket: str, name: str) -> Stored:
    """Returns an object that exists and meets the preconditions of the request."""
    stored = self.server.bucket_server.objects[bucket].get(name)
    self._check(stored)
    if stored is None or self.query.get("generation", str(stored.generation)) != str(
      stored.generation
    ):
      raise _Failure(404)
    return stored

  def _check(self, stored: Stored | None) -> None:
    generation = str(stored.generation) if stored else "0"
    if self.query.get("ifGenerationMatch", generation) != generation:
      raise _Failure(412)
    if self.query.get("ifGenerationNotMatch") == generation:
      raise _Failure(304 if self.command == "GET" else 412)

  def _media(self, stored: Stored) -> tuple[int, dict[str, str], bytes]:
    data, status = stored.data, 200
    headers = {
      "Content-Type": "application/octet-stream",
      "ETag": str(stored.generation),
      "X-Goog-Generation": str(stored.generation),
    }
    if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
      size = len(data)
      if wanted[1]:
        start, end = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
      else:
        start, end = max(0, size - int(wanted[2])), size - 1
      if start >= size:
        raise _Failure(416)
      data, status = data[start : end + 1], 206
      headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return status, headers, data

  def _list(self, bucket: str) -> dict[str, Any]:
    query, held = self.query, self.server.bucket_server.objects[bucket]
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    start, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
    after, most = query.get("pageToken", ""), int(query.get("maxResults", 1000))
    items, prefixes = [], []
    answer: dict[str, Any] = {"kind": "storage#objects"}
    for name in sorted(held):
      if not name.startswith(prefix) or not start <= name < end:
        continue
      entry, is_prefix = name, False
      if delimiter and delimiter in name[len(prefix) :]:
        entry = prefix + name[len(prefix) :].split(delimiter)[0] + delimiter
        is_prefix = True
      if (after and entry <= after) or entry in prefixes:
        continue
      if len(items) + len(prefixes) >= most:
        answer["nextPageToken"] = max([item["name"] for item in items] + prefixes)
        break
      if is_prefix:
        prefixes.append(entry)
      else:
        items.append(_resource(bucket, name, held[name]))
    return answer | {"items": items, "prefixes": prefixes}

  def _derive(self, bucket: str, name: str, action: list[str]) -> dict[str, Any]:
    service = self.server.bucket_server
    if action == ["compose"]:
      parts = [part["name"] for part in json.loads(self.body)["sourceObjects"]]
      self._check(service.objects[bucket].get(name))
      missing = [part for part in parts if part not in service.objects[bucket]]
      if missing:
        raise _Failure(404)
      data = b"".join(service.objects[bucket][part].data for part in parts)
      return _resource(bucket, name, service.write(bucket, name, data))
    stored = service.objects[bucket].get(name)
    if stored is None:
      raise _Failure(404)
    match action:
      case ["moveTo", "o", target]:
        self._check(service.objects[bucket].get(target))
        del service.objects[bucket][name]
        return _resource(bucket, target, service.write(bucket, target, stored.data))
      case ["rewriteTo" | "copyTo" as kind, "b", other, "o", target]:
        if other not in service.objects:
          raise _Failure(404)
        self._check(service.objects[other].get(target))
        resource = _resource(other, target, service.write(other, target, stored.data))
        return resource if kind == "copyTo" else {"done": True, "resource": resource}
    raise _Failure(501)

  def _upload(self, bucket: str) -> tuple[int, dict[str, str], bytes]:
    service, kind = self.server.bucket_server, self.query.get("uploadType")
    if "upload_id" in self.query:
      return self._continue_upload(bucket)
    if kind == "resumable":
      request = json.loads(self.body or b"{}")
      self.query.setdefault("name", request.get("name", ""))
      self._check(service.objects[bucket].get(self.query["name"]))
      number = f"upload-{len(service.uploads)}"
      service.uploads[number] = self.query, bytearray()
      at = f"{service.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
      return 200, {"Location": at}, b""
    data = self.body
    if kind == "multipart":
      mark = re.search(rb'boundary="?([^";]+)', self.headers["Content-Type"].encode())
      assert mark, self.headers["Content-Type"]
      _, about, content, _ = re.split(rb"\r?\n?--" + re.escape(mark[1]), self.body, maxsplit=3)
      head, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, content))
      self.query.setdefault("name", json.loads(head)["name"])
    return self._finish(bucket, self.query["name"], data)

  def _continue_upload(self, bucket: str) -> tuple[int, dict[str, str], bytes]:
    self.query, held = self.server.bucket_server.uploads[self.query["upload_id"]]
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
    if span and span[1]:
      if int(span[1]) > len(held):
        raise _Failure(503)
      del held[int(span[1]) :]
    held += self.body
    if span and span[2] != str(len(held)):
      return 308, {"Range": f"bytes=0-{len(held) - 1}"} if held else {}, b""
    return self._finish(bucket, self.query["name"], bytes(held))

  def _finish(self, bucket: str, name: str, data: bytes) -> tuple[int, dict[str, str], bytes]:
    service = self.server.bucket_server
    self._target = f"{bucket}/{name}"
    self._check(service.objects[bucket].get(name))
    return self._json(_resource(bucket, name, service.write(bucket, name, data)))

  def _batch(self) -> tuple[int, dict[str, str], bytes]:
    """Deletes objects, the only batch that gcsfs sends."""
    service, answers = self.server.bucket_server, []
    head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
    for part in email.message_from_bytes(head + self.body).get_payload():
      line = part.get_payload().strip().splitlines()[0]
      found = re.match(r"DELETE /storage/v1/b/([^/]+)/o/([^? ]+)", line)
      assert found, line
      bucket, name = found[1], urllib.parse.unquote(found[2])
      gone = service.objects.get(bucket, {}).pop(name, None)
      status = "HTTP/1.1 204 No Content" if gone else "HTTP/1.1 404 Not Found"
      answers.append(f"--batch\nContent-Type: application/http\n\n{status}\n\n")
    content = "".join(answers) + "--batch--"
    return 200, {"Content-Type": "multipart/mixed; boundary=batch"}, content.encode()


def _resource(bucket: str, name: str, stored: Stored) -> dict[str, Any]:
  updated = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stored.updated))
  updated += f".{int(stored.updated % 1 * 1e6):06d}Z"
  digest = google_crc32c.Checksum(stored.data).digest()
  return {
    "kind": "storage#object",
    "bucket": bucket,
    "name": name,
    "size": str(len(stored.data)),
    "generation": str(stored.generation),
    "metageneration": "1",
    "timeCreated": updated,
    "updated": updated,
    "contentType": "application/octet-stream",
    "crc32c": base64.b64encode(digest).decode(),
    "mediaLink": f"/download/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, '')}?alt=media",
  }


if __name__ == "__main__":
  service = BucketServer(int(sys.argv[1]))
  service.make_bucket("bucket")
  service.start()
  print(*(f"{key}={value}" for key, value in service.environment.items()), sep="\n", flush=True)
  threading.Event().wait()
