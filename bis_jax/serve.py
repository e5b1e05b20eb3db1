"""The command that serves scores over HTTP, for callers such as RL or search.

    pip install 'bis_jax[serve]'
    python -m bis_jax.serve --checkpoint=RUN --port=8000
    curl localhost:8000/score -d '{"question": "2 + 2?", "steps": ["4."], "images": []}'

http://localhost:8000 is a page to try it. `bis_jax.scoring.server` defines requests and answers. On SIGTERM it answers
every connection that waits or is open, with `Connection: close`, and ends.
"""

import ctypes
import socket

from absl import app, flags

from bis_jax.console import command
from bis_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", "workdir of a run (its latest checkpoint), exported folder or hub id"
)
_BASE = flags.DEFINE_string(
  "base", None, "base checkpoint of exported adapters, if not where adapter_config.json says"
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
_PORT = flags.DEFINE_integer("port", 8000, "port to listen on", lower_bound=1, upper_bound=65535)
_BODY_SECONDS = flags.DEFINE_float("body_seconds", 20, "seconds in which a request must arrive")
_STOP_SECONDS = flags.DEFINE_integer(
  "stop_seconds", 25, "seconds after SIGTERM in which requests are answered; then a 503", 1
)
_WAITING = flags.DEFINE_integer("waiting", 256, "requests held at once; more get a 503", 1)
_BATCH = flags.DEFINE_integer("batch", 64, "solutions handed to the model at a time", 1)
_ROWS = flags.DEFINE_integer(
  "rows",
  0,
  "maximum packed rows per batch; 0: the run's evaluation.batch_rows. Fewer are faster on a CPU",
  lower_bound=0,
)
_CACHE = flags.DEFINE_integer(
  "cache_mb",
  1024,
  "memory of each device for keys and values of what was scored, which solutions of the same question "
  "and images continue; 0: none",
  lower_bound=0,
)
_INPUTS = [
  flags.DEFINE_integer(name, 0, f"replaces inputs.{name} of the run; 0: the run's", lower_bound=0)
  for name in ("max_length", "row_tokens", "row_patches", "row_markers")
]


def main(argv: list[str]) -> None:
  with command("serve", argv, "--port=8000"):
    if not _CHECKPOINT.value:
      raise UserError("name a workdir, an exported folder or a hub id with --checkpoint=RUN")
    try:
      from bis_jax.scoring import http_protocol, server, step_scorer
    except ModuleNotFoundError as error:
      if error.name not in ("prometheus_client", "starlette", "uvicorn"):
        raise
      raise UserError(
        f"{error.name} is not installed; run: pip install 'bis_jax[serve]'"
      ) from error
    if not 0 < _BODY_SECONDS.value < float("inf"):
      raise UserError("--body_seconds must be a positive number of seconds")
    _free_large_blocks()
    inputs = {flag.name: flag.value for flag in _INPUTS if flag.value}
    bound = _bind(_HOST.value, _PORT.value)  # before the model is loaded, which takes long
    # Fixed rows: a request must not make the server compile.
    scorer = step_scorer.load(
      _CHECKPOINT.value,
      base=_BASE.value,
      batch_rows=_ROWS.value or None,
      adapt_rows=False,
      workers=0,
      **inputs,
    )
    scorer.warm_up(_CACHE.value << 20)
  limits = server.Limits(
    body_seconds=_BODY_SECONDS.value, waiting=_WAITING.value, batch=_BATCH.value
  )
  http_protocol.serve(server.create_app(scorer, limits), bound, _STOP_SECONDS.value)


def _free_large_blocks() -> None:
  # glibc would keep freed images of many threads, three times the memory of the idle server.
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt:
    mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD, which else grows to 32 MB


def _bind(host: str, port: int) -> socket.socket:
  # Connections are refused until the server runs, instead of waiting for the model.
  bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind((host, port))
  except OSError as error:
    raise UserError(
      f"cannot listen on --host={host} --port={port}, name another: {error.strerror}"
    ) from error
  return bound


if __name__ == "__main__":
  app.run(main)
