"""Writes the page of a model's results on several benchmarks; each has a page of its own, too."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from bis_jax import files
from bis_jax.reports import page


def write(
  folder: epath.PathLike,
  model: str,
  evaluations: Mapping[str, Mapping[str, Any]],
  pages: Mapping[str, str],
) -> None:
  """Writes `folder`/index.html from the evaluation and the folder of the page of each benchmark."""
  shown = {}
  for name, evaluation in evaluations.items():
    published = evaluation["published"]
    headings = list(dict.fromkeys(key for values in published.values() for key in values))
    rows = []
    for threshold, values in published.items():
      block = evaluation["thresholds"][threshold]
      first = (threshold, f"t = {block['threshold']:.4g}; {block['origin']}")
      rows.append([first, *(page.percent(values.get(key)) for key in headings)])
    table = page.Table(["threshold", *headings], rows)
    kind = pages[name].partition("-")[2]
    shown[name] = kind, table, f"{pages[name]}/index.html"
  path = files.absolute(folder) / "index.html"
  page.write(path, "benchmarks.html", title=f"{epath.Path(model).name}", benchmarks=shown)
