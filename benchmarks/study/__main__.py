"""Does it hold? The paper's comparison, rerun on the embedded corpus, where the truth is known.

  python -m benchmarks.study --out=runs/study            # whole
  python -m benchmarks.study --out=runs/study --quick    # its outline
  python -m benchmarks.study --out=runs/study --page     # the page again, from what has run

First the peak learning rate and the rollouts a step are chosen on `full` and `random 10 %` alone,
by their mean `overall_source_weighted` with a seed that no arm has. Then every part of `arms` is
swept (`launch/sweep.sh`, one workdir an arm), an arm a core. The same command goes on where it was
stopped, or where a finished arm was deleted. OUT/index.html has the figures and
tables, OUT/results.json every number of it, OUT/table.md what the README shows; OUT/theory says why
selection should work (`benchmarks.study.theory`; not with --quick).

Seeds are not batched on one device: arms abreast, a core each, use the cores fully as it is.
"""

import pathlib
import sys

from absl import app, flags

from benchmarks.study import arms, page, sweeps

_OUT = flags.DEFINE_string("out", "runs/study", "folder of all arms and of the page")
_SEEDS = flags.DEFINE_integer(
  "seeds", 5, "of every arm; of ablations, and with --quick, at most 3", lower_bound=1
)
_QUICK = flags.DEFINE_bool("quick", False, "few arms on a smaller corpus")
_PAGE = flags.DEFINE_bool("page", False, "train nothing, write the page of the arms that are done")
_CORPUS_CACHE = flags.DEFINE_string(
  "corpus_cache", "", "config.corpus.cache; default: the recipe's"
)


def main(argv: list[str]) -> None:
  """Runs what is left of the study and writes its page."""
  if len(argv) > 1:
    sys.exit(f"study: what is {argv[1]!r}? Every argument is a flag, like --quick")
  folder = pathlib.Path(_OUT.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  parts = arms.QUICK if _QUICK.value else arms.MAIN + arms.ABLATIONS
  if not _PAGE.value:
    settings = dict(arms.QUICK_SETTINGS) if _QUICK.value else {}
    if _CORPUS_CACHE.value:
      settings["corpus.cache"] = _CORPUS_CACHE.value
    many, few = range(_SEEDS.value), range(min(_SEEDS.value, 3))
    start = [(arms.DRAWN, [0]), (arms.START, few[:1] if "pretrain.seed" in settings else many)]
    sweeps.sweep(start[:1], folder, settings)
    settings |= sweeps.choose(folder, settings, start)
    last = sorted(parts, key=lambda part: part.fractions == (0.5,))  # which costs most
    seeds = [(part, many if part in arms.MAIN else few) for part in last]
    sweeps.sweep(start + seeds, folder, settings)
    if not _QUICK.value and not (folder / "theory" / "index.html").exists():
      sweeps.measure_theory(folder)
  print(page.write(folder, parts))


if __name__ == "__main__":
  app.run(main)
