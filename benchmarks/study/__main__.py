"""Does it hold? The paper's comparison, rerun on the embedded corpus, where the truth is known.

  python -m benchmarks.study --out=runs/study            # whole
  python -m benchmarks.study --out=runs/study --quick    # its outline
  python -m benchmarks.study --out=runs/study --page     # the page again, from what has run

First the peak learning rate and the rollouts a step are chosen on `full` and `random 10 %` alone,
by their mean `overall_source_weighted` with a seed that no arm has. Then every part of `arms` is
swept (`launch/sweep.sh`, one workdir an arm), an arm a core. The same command goes on where it was
stopped, or where a finished arm was deleted. OUT/index.html has the figures and
tables, OUT/results.json every number of it, OUT/table.md what the README shows; OUT/theory says why
selection should work (`benchmarks.study.theory`), OUT/positions.json what a step's place tells of its
label (`benchmarks.study.positions`); neither with --quick.

Seeds are not batched on one device: arms abreast, a core each, use the cores fully as it is.

Last result. `overall_source_weighted` x 100, tuned on test, means of 5 seeds:

  of 24,000 rollouts, all in one pass, 6,300 steps        81.4 ± 15.2 (57.6 to 98.2)
  a tenth, by                      BIS           random        BIS against random       against all
  one pass, 630 steps              59.3 ± 3.3    56.3 ± 2.1    +5.3 % (+1.4 to +9.2)    -24.7 % (-44.6 to -4.9)
  five, 3,150                      85.3 ± 6.5    71.0 ± 14.6   +23.4 % (-3.3 to +50.1)  +7.3 % (-14.4 to +29.0)
  of 48,000, one backbone, all in one pass, 3,150 steps   90.0 ± 5.9; after 900 of them 71.8
  a tenth, three passes, 945       87.4 ± 8.8    72.6 ± 11.2   +21.9 % (+0.5 to +43.2)  -2.6 % (-17.4 to +12.2)
  likewise, 3 seeds (all: as above):
  unreliable positives             59.7 ± 2.7    57.5 ± 3.3    +4.0 % (-13.2 to +21.1)  -31.7 % (-46.3 to -17.2)
  three times the wrong notes      66.3 ± 4.2    80.1 ± 6.7    -17.1 % (-22.9 to -11.4)  -24.2 % (-40.1 to -8.3)
  R = 0 without positives          67.2 ± 5.6    as above      -9.7 % (-36.1 to +16.8)   -23.1 % (-47.3 to +1.2)

Seeds differ by when, and whether, the model learns to check a statement against its picture: until
then it is at what the text alone tells, 56 to 58. In one pass over a tenth of 24,000 the steps are the
limit, whatever they hold. Where they are enough, a tenth by BIS cannot be told from all, in 0.3 of
the steps. It owes that to the rollouts without a positive step, which R = 1 lets in: with R = 0 it
loses 26.3 % (19.4 to 33.3). With three times the wrong notes it loses, and
`benchmarks.study.positions` shows that a step's place then all but tells its label. Of --quick's 12,000
rollouts a tenth in five passes is too little for either: 68.0 ± 3.1, random 70.1 ± 5.7, all in one pass
85.4 ± 4.0.

Cost (2 cores; asked: at most 4 hours, --quick 20 minutes): --quick 18.4 minutes. The whole was run in
7.3 hours of a core (280 runs; theory 2.6 minutes more) when the larger corpus was not in it, but a tenth
in ten passes, all strategies in five, other solutions and R = 0 in five and tau 0.25 were. The larger
corpus took 2.9 hours of a core beside other work. The whole as it is now (269 runs) has not been run
in one go; its arms come to about 8 hours of a core, so to about 4 of two.
"""

import pathlib
import sys

from absl import app, flags

from benchmarks.study import arms, positions, study_page, sweeps

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
    backbones = 1 if "pretrain.seed" in settings else _SEEDS.value
    start = [(arms.DRAWN, range(1)), (arms.START, range(backbones))]
    sweeps.sweep(start[:1], folder, settings)
    settings |= sweeps.choose(folder, settings, start)
    sweeps.sweep(start + arms.seeds_of(parts, _SEEDS.value), folder, settings)
    if not _QUICK.value and not (folder / "theory" / "index.html").exists():
      sweeps.measure_theory(folder)
    if not _QUICK.value:  # here and not for --page, which needs no corpus
      larger = [part.name for part in parts if arms.LARGER in (part.name, part.like)]
      positions.write(folder, dict.fromkeys(larger))
  print(study_page.write(folder, parts))


if __name__ == "__main__":
  app.run(main)
