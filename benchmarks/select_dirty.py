"""Checks that exactly the bad records of a full-size corpus are found, with their reasons.

  python benchmarks/select_dirty.py --corpus=DIR

DIR holds annotations/ and dirty.json, (file, line, kind) of 2,000 bad records among 565,149. The
image root is made up: a zip with an empty member for every reference but the planted ones.
Results: benchmarks/RESULTS.md.
"""

import collections
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile

from absl import app, flags

from bis_jax.corpus.image_root import candidates
from bis_jax.corpus.rejections import BadRecord
from bis_jax.corpus.scan import scan

_CORPUS = flags.DEFINE_string("corpus", None, "folder of the corpus", required=True)

REASONS = {
  "bad_json": "not_json",
  "truncated_json": "not_json",
  "blank_line": "blank_line",
  "no_steps": "no_steps",
  "empty_steps": "no_steps",
  "empty_step_text": "empty_step",
  "missing_score": "missing_score",
  "null_score": "missing_score",
  "string_score": "score_not_a_number",
  "nan_score": "score_not_finite",
  "score_above_one": "score_out_of_range",
  "negative_score": "score_out_of_range",
  "no_image": "no_image",
  "empty_image": "no_image",
  "missing_image_file": "missing_image",
  "path_traversal": "image_outside_root",
  "absolute_path": "image_outside_root",
  "count_mismatch": "count_mismatch",
  "not_an_object": "not_an_object",
  "invalid_utf8": "invalid_utf8",
  "duplicate_line": "duplicate_line",
}
# Odd, but right: such text is encoded as plain text, and a step too long for a sample is cut off.
ALLOWED = {"marker_in_step", "image_token_in_step", "chat_token_in_step", "huge_step"}


def write_image_root(annotations: pathlib.Path, path: pathlib.Path) -> None:
  """Writes a zip with an empty member for every image reference that leads anywhere."""
  names = set()
  for reference in {name for names in scan(annotations).image_sets for name in names}:
    try:
      names.add(candidates(reference)[0])
    except BadRecord:
      continue
  with zipfile.ZipFile(path, "w") as root:
    for name in sorted(names):
      if not name.startswith("nowhere/"):
        root.writestr(name, b"")


def main(_) -> None:
  """Prints how many records of each kind were found, and what else was rejected."""
  corpus = pathlib.Path(_CORPUS.value)
  planted = {}
  for bad in json.loads((corpus / "dirty.json").read_text()):
    second = bad["kind"] == "duplicate_line"  # its copy is the next line
    planted[bad["file"].removesuffix(".jsonl"), bad["line"] + second] = bad["kind"]
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    write_image_root(corpus / "annotations", folder / "images.zip")
    command = f"-m bis_jax.select --annotations={corpus / 'annotations'} --out={folder / 'x.jsonl'}"
    started = time.perf_counter()
    subprocess.run(
      [sys.executable, *command.split(), f"--images={folder / 'images.zip'}"],
      check=True,
      stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - started
    lines = (folder / "x.rejections.jsonl").read_text().splitlines()
  rejected = {(r["source"], r["line"]): r["reason"] for r in map(json.loads, lines)}
  found = collections.Counter()
  for record, kind in planted.items():
    reason = rejected.pop(record, None)
    found[kind, reason == REASONS.get(kind)] += 1
  for kind in sorted({kind for kind, _ in found}):
    wrong = found[kind, False]
    words = "left in, as it should be" if kind in ALLOWED else REASONS[kind]
    print(f"{kind:22}{found[kind, True]:5} {words}" + (f", {wrong} WRONG" if wrong else ""))
  print(f"{len(planted)} planted, {len(rejected)} others rejected, {seconds:.1f} s")
  for record, reason in list(rejected.items())[:10]:
    print("  ", *record, reason)


if __name__ == "__main__":
  app.run(main)
