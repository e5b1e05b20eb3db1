"""The command that scores solutions from a file.

    python -m bis_jax.score --checkpoint=RUN --input=solutions.jsonl --output=scores.jsonl

`bis_jax.scoring.solution_files` defines the lines. If it is stopped and started again with the same
flags, it resumes after the last complete line.
"""

from absl import app, flags

from bis_jax import files
from bis_jax.console import command
from bis_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", "workdir of a run (its latest checkpoint), exported folder or hub id"
)
_BASE = flags.DEFINE_string(
  "base", None, "base checkpoint of exported adapters, if not where adapter_config.json says"
)
_INPUT = flags.DEFINE_string("input", "", "JSON lines of solutions to score")
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines of scores to write")
_IMAGE_ROOT = flags.DEFINE_string(
  "image_root", "", "folder of the images; default: the folder of --input"
)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length", 0, "tokens of a solution with its images; 0: the run's inputs.max_length", 0
)
_CHUNK = flags.DEFINE_integer("chunk", 256, "solutions packed and written at a time", lower_bound=1)


def main(argv: list[str]) -> None:
  with command("score", argv, "--input=FILE"):
    for flag in (_CHECKPOINT, _INPUT, _OUTPUT):
      if not flag.value:
        raise UserError(f"--{flag.name} is missing; give --checkpoint, --input and --output")
    files.refuse_overwriting(
      {"--output": _OUTPUT.value, "--output's note": f"{_OUTPUT.value}.model.json"},
      {"--input": _INPUT.value},
    )
    from bis_jax.scoring import solution_files  # here, so that --help does not wait for JAX

    source, target = files.absolute(_INPUT.value), files.absolute(_OUTPUT.value)
    root = files.absolute(_IMAGE_ROOT.value) if _IMAGE_ROOT.value else source.parent
    inputs = {"max_length": _MAX_LENGTH.value} if _MAX_LENGTH.value else {}
    total, written, errors = solution_files.score_file(
      _CHECKPOINT.value, source, target, root, _CHUNK.value, base=_BASE.value, **inputs
    )
  if written:
    print(f"wrote {written} of {total} lines to {target}, {errors} of them errors")
  else:
    print(f"{target} already has all {total} lines")


if __name__ == "__main__":
  app.run(main)
