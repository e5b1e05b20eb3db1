"""Prepares a corpus for training: `python -m bis_jax.prepare --annotations=... --images=... --out=...`.

Reads raw annotations (a folder of JSON lines files or annotations.zip) and images (a folder or
images.zip, not extracted), rejects bad records with a reason each, and writes TFDS datasets and the
score table. Run again with the same inputs, it reuses what is there.
"""

from absl import app, flags

from bis_jax.corpus.preparation import prepare
from bis_jax.corpus.rejections import CorpusError

_ANNOTATIONS = flags.DEFINE_string(
  "annotations", None, "folder of *.jsonl[.gz|.zst], or a zip of it"
)
_IMAGES = flags.DEFINE_string("images", None, "image root: a folder, or images.zip")
_OUT = flags.DEFINE_string("out", None, "folder of the prepared corpus")
_TAU = flags.DEFINE_float(
  "tau", 0.0, "a step is positive where its MC score > tau", lower_bound=0.0, upper_bound=1.0
)
_UNMEASURED = flags.DEFINE_enum(
  "unmeasured", "negative", ["negative", "ignore"], "steps without continuations"
)
_MAX_REJECTED = flags.DEFINE_float(
  "max_rejected_fraction",
  0.01,
  "of all records; above it: stop",
  lower_bound=0.0,
  upper_bound=1.0,
)
_WORKERS = flags.DEFINE_integer("workers", 0, "processes; 0: one a core")
_BEAM = flags.DEFINE_multi_string(
  "beam", None, "option of Apache Beam, which then does the work: --beam=--runner=DirectRunner"
)


def main(argv: list[str]) -> None:
  """Prepares; inputs that cannot be used end it with a message and exit code 1."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}: name them with --annotations=... etc.")
  try:
    prepare(
      _ANNOTATIONS.value,
      _IMAGES.value,
      _OUT.value,
      tau=_TAU.value,
      unmeasured=_UNMEASURED.value,
      max_rejected_fraction=_MAX_REJECTED.value,
      workers=_WORKERS.value,
      beam=_BEAM.value,
    )
  except CorpusError as error:
    raise SystemExit(f"prepare: {error}") from error


if __name__ == "__main__":
  flags.mark_flags_as_required(["annotations", "images", "out"])
  app.run(main)
