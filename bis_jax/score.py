"""The command that scores solutions from a file.

    python -m bis_jax.score --checkpoint=WORKDIR --input=solutions.jsonl --output=scores.jsonl

`bis_jax.scoring.solution_files` says what the lines are. Stopped and started again with the same flags, it
goes on behind the last whole line.
"""

import pathlib
import sys

from absl import app, flags, logging

from bis_jax.errors import UserError
from bis_jax.scoring import solution_files

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", "workdir of a run; its newest checkpoint counts"
)
_INPUT = flags.DEFINE_string("input", "", "JSON lines to score")
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines to write")
_IMAGE_ROOT = flags.DEFINE_string("image_root", "", "folder of the images; default: the input's")
_CHUNK = flags.DEFINE_integer("chunk", 256, "solutions packed and written at a time", lower_bound=1)


def main(argv: list[str]) -> None:
  """Scores the file; bad flags end it with a message and exit code 1."""
  if len(argv) > 1:
    sys.exit(f"score: what is {argv[1]!r}? Every argument is a flag, like --input=FILE")
  for flag in (_CHECKPOINT, _INPUT, _OUTPUT):
    if not flag.value:
      sys.exit(f"score: say with --{flag.name}=... {flag.help}")
  logging.set_verbosity(logging.WARNING)
  source, target = pathlib.Path(_INPUT.value), pathlib.Path(_OUTPUT.value)
  root = pathlib.Path(_IMAGE_ROOT.value) if _IMAGE_ROOT.value else source.parent
  try:
    solution_files.score_file(_CHECKPOINT.value, source, target, root, _CHUNK.value)
  except (UserError, ValueError, OSError) as error:
    sys.exit(f"score: {error}")


if __name__ == "__main__":
  app.run(main)
