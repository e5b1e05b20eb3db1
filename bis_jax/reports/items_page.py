"""Writes items.html, which lists all benchmark items, sorts them by error and shows each of them."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from bis_jax import files
from bis_jax.console import progress_bar
from bis_jax.reports import page

_DIGITS = 4  # of the scores on the page


def write_items_page(
  folder: epath.PathLike,
  *,
  title: str,
  items: Sequence,
  runs: Mapping[str, Sequence[np.ndarray]],
  mc_scores: Sequence[Sequence[float | None] | None] | None = None,
  threshold: float = 0.5,
) -> None:
  """Writes `folder`/items.html, and the items' images as small files into `folder`/items/.

  `runs` are {name: an array of scores per item}; `mc_scores` are per item, None for a step without one.
  Steps misjudged at `threshold` are marked.
  """
  folder = epath.Path(folder)
  (folder / "items").mkdir(parents=True, exist_ok=True)
  with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow works outside Python's lock
    writing = threads.map(lambda numbered: _write_images(folder, *numbered), enumerate(items))
    images = list(progress_bar("item images", len(items), iterable=writing))
  records = [
    {
      "index": position,
      "source": item.data_source,
      "policy": item.policy_model,
      "question": item.question,
      "answer": item.answer,
      "steps": item.steps,
      "labels": item.labels,
      "images": images[position],
      "mc": _rounded(mc_scores[position]) if mc_scores is not None else None,
    }
    for position, item in enumerate(items)
  ]
  data = {
    "items": records,
    "runs": list(runs),
    "scores": {
      name: [np.round(np.asarray(s, np.float64), _DIGITS).tolist() for s in scores]
      for name, scores in runs.items()
    },
    "threshold": threshold,
  }
  page.write(folder / "items.html", "items.html", title=title, data=data)


def _rounded(mc_scores: Sequence[float | None] | None) -> list[float | None] | None:
  if mc_scores is None:
    return None
  return [None if score is None else round(score, _DIGITS) for score in mc_scores]


def _write_images(folder: epath.Path, position: int, item: Any) -> list[str]:
  """Returns the addresses of the thumbnails relative to the page."""
  names = []
  for k, image in enumerate(item.images):
    small, kind = page.thumbnail(image.read())
    names.append(f"items/{position:05d}_{k}.{kind}")
    with files.replacing(folder / names[-1]) as file:
      file.write(small)
  return names
