"""Trains and evaluates the process reward model that a config describes.

  python -m bis_jax.main --config=configs/toy_bis10.py --workdir=runs/toy_bis10
  python -m bis_jax.main --config=configs/qwen_bis10.py --workdir=gs://BUCKET/qwen_bis10 \\
      --config.selection.fraction=0.05

The same config and workdir resume a stopped run. On several hosts every process runs this same
command: see `bis_jax.parallel.processes` and the scripts in launch/.

Exit codes: 0, the run is complete; 75, it received a stop signal (SIGTERM, Ctrl-C), saved
everything and resumes with the same command; anything else is an error.
"""

import sys
import traceback

from absl import app, flags

from bis_jax.console import STOPPED, log, start_logging, stoppable
from bis_jax.errors import UserError
from bis_jax.parallel import processes
from bis_jax.parallel.preemption import Preempted
from bis_jax.run import stages
from bis_jax.settings import recipe

recipe.define_flags()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "folder of the run: a new or empty one, or a run to resume", required=True
)
_START_SECONDS = flags.DEFINE_integer(
  "start_seconds", processes.START_SECONDS, "that processes wait for each other", lower_bound=1
)


def main(argv: list[str]) -> None:
  """Entry point. Invalid input exits with code 1 and a message, before anything is overwritten."""
  if len(argv) > 1:
    sys.exit(
      f"main: unexpected argument {argv[1]!r}; every argument is a flag, such as --workdir=FOLDER"
    )
  start_logging()
  code = 0
  try:
    with stoppable():
      processes.start(start_seconds=_START_SECONDS.value)
      if not processes.is_first():
        log.setLevel("WARNING")
      stages.run(recipe.from_flags(), _WORKDIR.value)
  except Preempted as stopped:  # on every process of the run
    print(f"main: {stopped}", file=sys.stderr)
    code = STOPPED
  except (UserError, OSError) as error:
    # If a bucket stays away, TensorStore's threads would still wait for it for a quarter of an hour.
    processes.fail(f"main: {error}", at_once=isinstance(error, ConnectionError))
  except KeyboardInterrupt:  # before or after training
    processes.fail("main: stopped by a signal: run the same command again to resume", STOPPED)
  except BaseException:
    processes.fail(traceback.format_exc())
  processes.wait_for_all("end")
  sys.exit(code)


if __name__ == "__main__":
  app.run(main)
