"""The command that serves scores over HTTP, for people who call a reward model from RL or search.

    pip install 'bis_jax[serve]'
    python -m bis_jax.serve --checkpoint=WORKDIR --port=8000
    curl localhost:8000/score -d '{"question": "2 + 2?", "steps": ["4."], "images": []}'

`bis_jax.scoring.server` says what it takes and answers. On SIGTERM it takes no new connection, answers what
it has taken in, and ends.
"""

import signal
import sys

import uvicorn
from absl import app, flags, logging

from bis_jax.errors import UserError
from bis_jax.scoring import server, step_scorer

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", "workdir of a run; its newest checkpoint counts"
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
_PORT = flags.DEFINE_integer("port", 8000, "port to listen on", lower_bound=1)
_BODY_SECONDS = flags.DEFINE_float("body_seconds", 20, "time a request's body may take")
_WAITING = flags.DEFINE_integer("waiting", 256, "requests held at once; more get a 503")
_BATCH = flags.DEFINE_integer("batch", 64, "solutions handed to the model at a time")
_ROWS = flags.DEFINE_integer(
  "rows", 0, "packed rows a batch at most; 0: as in the run. Few on a CPU, whose caches are small"
)


def main(argv: list[str]) -> None:
  """Loads the checkpoint, compiles, and serves until SIGTERM or SIGINT."""
  if len(argv) > 1:
    sys.exit(f"serve: what is {argv[1]!r}? Every argument is a flag, like --port=8000")
  if not _CHECKPOINT.value:
    sys.exit("serve: say with --checkpoint=WORKDIR what scores")
  logging.set_verbosity(logging.WARNING)
  try:
    inputs = {"row_multiple": _ROWS.value} if _ROWS.value else {}
    scorer = step_scorer.load(_CHECKPOINT.value, workers=0, **inputs)
  except (UserError, ValueError, OSError) as error:
    sys.exit(f"serve: {error}")
  scorer.warm_up()
  limits = server.Limits(
    body_seconds=_BODY_SECONDS.value, waiting=_WAITING.value, batch=_BATCH.value
  )
  # Uvicorn stops on SIGTERM and then raises it once more, which would look like a crash.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  uvicorn.run(
    server.create_app(scorer, limits), host=_HOST.value, port=_PORT.value, access_log=False
  )


if __name__ == "__main__":
  app.run(main)
