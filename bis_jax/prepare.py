"""Prepares a corpus for training: `python -m bis_jax.prepare --annotations=... --images=... --out=...`.

Reads annotations in any format of docs/data_formats.md and images (a folder or images.zip, not
extracted; none for rollouts of text alone), rejects bad records with a reason each, and writes TFDS datasets and the
score table. If it is run again and no input file has changed, it reuses the prepared corpus.
"""

from absl import app, flags

from bis_jax import files
from bis_jax.console import command
from bis_jax.corpus import formats
from bis_jax.corpus.preparation import prepare
from bis_jax.errors import UserError

_ANNOTATIONS = flags.DEFINE_string(
  "annotations", "", "folder, zip or file of records, or a dataset id of the hub"
)
_ANNOTATIONS_FORMAT = flags.DEFINE_enum(
  "annotations_format",
  formats.AUTO,
  formats.NAMES,
  "of the records; auto: recognized by their keys",
)
_AGREEMENT = flags.DEFINE_string(
  "agreement", "", "key of a second MC score: steps of which one alone is positive are unmeasured"
)
_IMAGES = flags.DEFINE_string(
  "images", "", "image root: a folder, or images.zip; none for text alone"
)
_OUT = flags.DEFINE_string("out", "", "folder of the prepared corpus")
_MAX_REJECTED = flags.DEFINE_float(
  "max_rejected_fraction",
  0.01,
  "stop if more than this fraction of the records is rejected",
  lower_bound=0.0,
  upper_bound=1.0,
)
_WORKERS = flags.DEFINE_integer("workers", 0, "number of processes; 0: one per core")
_BEAM = flags.DEFINE_multi_string(
  "beam",
  None,
  "run on Apache Beam with this option (repeatable), e.g. --beam=--runner=DirectRunner",
)


def main(argv: list[str]) -> None:
  with command("prepare", argv, "--out=DIR"):
    if not (_ANNOTATIONS.value and _OUT.value):
      raise UserError(
        "set --annotations and --out, and --images unless all rollouts are text alone"
      )
    files.refuse_overwriting(
      {"--out": _OUT.value},
      {},
      {"--annotations": _ANNOTATIONS.value, "--images": _IMAGES.value},
    )
    prepare(
      _ANNOTATIONS.value,
      _IMAGES.value,
      _OUT.value,
      format=_ANNOTATIONS_FORMAT.value,
      agreement=_AGREEMENT.value,
      max_rejected_fraction=_MAX_REJECTED.value,
      workers=_WORKERS.value,
      beam=_BEAM.value,
    )


if __name__ == "__main__":
  app.run(main)
