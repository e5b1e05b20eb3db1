"""The same annotations as JSON lines and as Parquet: seconds to read them, alternating.

  python -m benchmarks.read_parquet --annotations=DIR [--repeats=3]

DIR holds raw JSON lines, as of `benchmarks.select_corpus`. They are written as Parquet once, a file per
source, in the rows of `select --format=parquet`, into a temporary folder. Each is then read as
selection reads it (`scan`, all cores); the least time counts, and the statistics must be equal.
Results: benchmarks/RESULTS.md.
"""

import pathlib
import tempfile
import time

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
    least: dict[str, float] = {}
    tables = {}
    for _ in range(_REPEATS.value):
      for name, place in (("jsonl", _ANNOTATIONS.value), ("parquet", out)):
        started = time.perf_counter()
        found = scan(place)
        seconds = time.perf_counter() - started
        least[name] = min(least.get(name, seconds), seconds)
        tables[name] = found.table()
        print(f"{name:8} {seconds:6.2f} s, {found.records:,} records", flush=True)
    for column in ("line", "steps", "correct", "total"):
      strict = [table.flags & 1 != 0 for table in tables.values()]
      if all(map(all, strict)):
        one, other = (getattr(table, column) for table in tables.values())
        assert (one == other).all(), column
    print(f"Parquet takes {least['parquet'] / least['jsonl']:.2f} of the time of JSON lines")


if __name__ == "__main__":
  app.run(main)
