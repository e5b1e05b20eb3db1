"""The command that serves scores over HTTP, for callers such as RL or search.

    pip install 'bis_jax[serve]'
    python -m bis_jax.serve --checkpoint=WORKDIR --port=8000
    curl localhost:8000/score -d '{"question": "2 + 2?", "steps": ["4."], "images": []}'

`bis_jax.scoring.server` defines requests and answers. On SIGTERM it accepts no new connection,
answers the requests that it holds, and ends.
"""

import signal

from absl import app, flags

from bis_jax.console import command
from bis_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", "workdir of a run; its latest checkpoint is used"
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
_PORT = flags.DEFINE_integer("port", 8000, "port to listen on", lower_bound=1)
_BODY_SECONDS = flags.DEFINE_float("body_seconds", 20, "seconds in which a request must arrive")
_WAITING = flags.DEFINE_integer("waiting", 256, "requests held at once; more get a 503")
_BATCH = flags.DEFINE_integer("batch", 64, "solutions handed to the model at a time")
_ROWS = flags.DEFINE_integer(
  "rows",
  0,
  "maximum packed rows per batch; 0: the run's evaluation.batch_rows. Fewer are faster on a CPU",
)


def main(argv: list[str]) -> None:
  with command("serve", argv, "--port=8000"):
    if not _CHECKPOINT.value:
      raise UserError("name the workdir of a run with --checkpoint=WORKDIR")
    try:
      import uvicorn

      from bis_jax.scoring import server, step_scorer
    except ModuleNotFoundError as error:
      if error.name not in ("starlette", "uvicorn"):
        raise
      raise UserError(
        f"{error.name} is not installed; run: pip install 'bis_jax[serve]'"
      ) from error
    scorer = step_scorer.load(_CHECKPOINT.value, batch_rows=_ROWS.value or None, workers=0)
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
