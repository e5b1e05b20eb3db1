"""Reruns the paper's comparison on a toy corpus, where the truth of every step is known.

  python -m benchmarks.study --out=runs/study            # all arms
  python -m benchmarks.study --out=runs/study --quick    # a few arms on a smaller corpus
  python -m benchmarks.study --out=runs/study --page     # only the page, of the finished arms

First the backbone is trained (OUT/backbone_settle), which can see, read and check other kinds of question. Then every
part of `arms` is swept (`launch/sweep.sh`), one workdir per arm and one arm per core. The same command resumes an
interrupted study and repeats deleted arms.

OUT/index.html has figures and tables, OUT/results.json all numbers, OUT/table.md the table of
docs/study.md, OUT/theory `benchmarks.study.theory`, OUT/positions.json `benchmarks.study.positions` and
OUT/caught.json `benchmarks.study.caught`. With --quick all is in OUT/quick, without the last three and
from a backbone that is sooner made. Results and cost: docs/study.md.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from benchmarks.study import arms, caught, positions, study_page, sweeps

_OUT = flags.DEFINE_string("out", "runs/study", "folder of the arms and the page")
_SEEDS = flags.DEFINE_integer("seeds", 5, "seeds per arm at most; some have fewer", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "a few arms on a smaller corpus")
_PAGE = flags.DEFINE_bool("page", False, "only write the page of the finished arms")
_POWER = flags.DEFINE_bool("power", False, "only random and full: is the test sharp enough?")
_BACKBONE = flags.DEFINE_string(
  "backbone", "", "OUT/backbone_settle of an earlier study; default: train one"
)
_CORPUS_CACHE = flags.DEFINE_string(
  "corpus_cache", "", "config.corpus.cache; default: the recipe's"
)


def main(argv: list[str]) -> None:
  """Runs the unfinished arms and writes the page."""
  if len(argv) > 1:
    sys.exit(f"study: unexpected argument {argv[1]!r}: every argument is a flag, like --quick")
  folder = pathlib.Path(_OUT.value).absolute()
  if _QUICK.value:  # its arms have the names of others
    folder /= "quick"
  folder.mkdir(parents=True, exist_ok=True)
  parts = arms.QUICK if _QUICK.value else arms.MAIN + arms.CONFIRM + arms.WEAK + arms.ABLATIONS
  if not _PAGE.value:
    _run(folder, arms.POWER if _POWER.value else parts, whole=not (_QUICK.value or _POWER.value))
  print(study_page.write(folder, parts))


def _run(folder: pathlib.Path, parts: Sequence[arms.Part], *, whole: bool) -> None:
  """Runs the unfinished arms; of the `whole` study also what is measured on them."""
  settings = {"corpus.cache": _CORPUS_CACHE.value} if _CORPUS_CACHE.value else {}

  def start_from(place: pathlib.Path, learn: Mapping[str, Any]) -> dict[str, Any]:
    return settings | {"model.checkpoint": str(sweeps.make_backbone(place, settings, learn))}

  weak = folder / arms.WEAK_BACKBONE, arms.WEAK_LEARN
  if _BACKBONE.value:
    start = settings | {"model.checkpoint": str(pathlib.Path(_BACKBONE.value).absolute())}
  else:
    start = start_from(*weak if _QUICK.value else (folder, {}))
  if _QUICK.value:
    start |= arms.QUICK_SETTINGS
  own = [part for part in parts if part not in arms.WEAK]
  sweeps.sweep(arms.seeds_of(own, _SEEDS.value), folder, start)
  if not whole:
    return
  sweeps.sweep(arms.seeds_of(arms.WEAK, _SEEDS.value), folder, start_from(*weak))
  sweeps.sweep([(arms.START, range(1))], folder, start)
  if not (folder / "theory" / "index.html").exists():
    sweeps.measure_theory(folder)
  # Not with --page, which needs no corpus.
  positions.write(folder, [*arms.SELECTIONS, arms.SECOND, "rare"])
  caught.write(folder, parts)


if __name__ == "__main__":
  app.run(main)
