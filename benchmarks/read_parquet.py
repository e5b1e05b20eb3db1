"""The same annotations as JSON lines and as Parquet: time to read them, alternating.

  python -m benchmarks.read_parquet --annotations=DIR [--repeats=3]

DIR holds raw JSON lines, as of `benchmarks.select_corpus`. They are written as Parquet once, a file per
source, in the rows of `select --format=parquet`, into a temporary folder. Each is then read as
selection reads it (`scan`, all cores); the least time counts, of the clock and of all processes, and
the statistics must be equal.
Results: benchmarks/RESULTS.md.
"""

import pathlib
import resource
import tempfile
import time

import numpy as np
from absl import app, flags

from bis_jax.corpus.containers import sources
from bis_jax.corpus.scan import scan
from bis_jax.selection import subset
from bis_jax.selection.rule import select

_ANNOTATIONS = flags.DEFINE_string("annotations", None, "folder of *.jsonl", required=True)
_REPEATS = flags.DEFINE_integer("repeats", 3, "of which the least time counts")


def write(annotations: str, out: pathlib.Path) -> None:
  for file in sources(annotations):
    found = scan(file.path)
    table = found.table()
    manifest = select(table, strategy="full", fraction=1.0)
    lines = subset.kept_lines(found.files, table, manifest)
    subset.write_parquet(out / f"{file.source}.parquet", lines, manifest)


def main(argv: list[str]) -> None:
  del argv
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder)
    started = time.perf_counter()
    write(_ANNOTATIONS.value, out)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"written as {size / 1e6:,.0f} MB of Parquet in {time.perf_counter() - started:.1f} s")
    least: dict[str, np.ndarray] = {}
    tables = {}
    for _ in range(_REPEATS.value):
      for name, place in (("jsonl", _ANNOTATIONS.value), ("parquet", out)):
        before = times()
        found = scan(place)
        seconds = times() - before
        least[name] = np.minimum(least.get(name, seconds), seconds)
        tables[name] = found.table()
        shown = "{:.2f} s, {:.2f} s of processors".format(*seconds)
        print(f"{name:8} {shown}, {found.records:,} records", flush=True)
    for column in ("line", "steps", "correct", "total"):
      strict = [table.flags & 1 != 0 for table in tables.values()]
      if all(map(all, strict)):
        one, other = (getattr(table, column) for table in tables.values())
        assert (one == other).all(), column
    shares = least["parquet"] / least["jsonl"]
    print(
      "Parquet takes {:.2f} of the time of JSON lines, {:.2f} of the processors'".format(*shares)
    )


def times() -> np.ndarray:
  """Returns the seconds of the clock, and of this process and those that it started and that ended."""
  used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return np.array([time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)])


if __name__ == "__main__":
  app.run(main)
