"""Writes the page on which a person opens any benchmark item and sorts all of them by error."""

import html
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from tqdm import tqdm

from bis_jax.reports import page_style

_SCRIPT = pathlib.Path(__file__).with_name("items_page.js")
_DIGITS = 4  # of the scores on the page


def write_items_page(
  folder: str,
  *,
  title: str,
  items: Sequence,
  runs: Mapping[str, Sequence[np.ndarray]],
  mc_scores: Sequence[Sequence[float | None] | None] | None = None,
  threshold: float = 0.5,
) -> None:
  """Writes `folder`/items.html, and the items' images as small files into `folder`/items/.

  `items` are `BenchmarkItem`s, `runs` holds one array of scores an item for each run by its name,
  and `mc_scores`, where there are any, an item's MC scores, None for a step that has none. A step is
  called misjudged at `threshold`. `folder` may be a local path or gs://. The page and its images
  open from file:// and need nothing else.
  """
  folder = epath.Path(folder)
  (folder / "items").mkdir(parents=True, exist_ok=True)
  with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow works outside Python's lock
    writing = threads.map(lambda place: _write_images(folder, *place), enumerate(items))
    images = list(tqdm(writing, "item images", len(items), disable=None, leave=False))
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
  # "<" would let a step's text end the script element it stands in.
  encoded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
  body = _BODY.format(
    title=html.escape(title), data=encoded, script=_SCRIPT.read_text(encoding="utf-8")
  )
  page = page_style.document(title, body, body_class="browser")
  (folder / "items.html").write_text(page, encoding="utf-8")


def _rounded(mc_scores: Sequence[float | None] | None) -> list[float | None] | None:
  if mc_scores is None:
    return None
  return [None if score is None else round(score, _DIGITS) for score in mc_scores]


def _write_images(folder: epath.Path, position: int, item) -> list[str]:
  """Writes an item's images as thumbnails and returns their addresses relative to the page."""
  names = []
  for k, image in enumerate(item.images):
    small, kind = page_style.thumbnail(image.read())
    names.append(f"items/{position:05d}_{k}.{kind}")
    (folder / names[-1]).write_bytes(small)
  return names


_BODY = """<header>
<h1>{title}</h1>
<label>run <select id="run"></select></label>
<select id="source" aria-label="source"></select>
<select id="policy" aria-label="policy model"></select>
<input id="find" type="search" placeholder="words in question or steps" aria-label="find">
<span class="quiet small" id="count"></span>
<span class="quiet small">score <span class="key"></span> erroneous to correct</span>
</header>
<div class="card list"><table>
<thead id="heads"><tr><th data-sort="index">item</th><th data-sort="source">source</th>
<th data-sort="policy">policy model</th><th data-sort="wrong" title="misjudged steps">wrong</th>
<th data-sort="error" title="mean squared error of the labelled steps">error</th></tr></thead>
<tbody id="rows"></tbody></table></div>
<main id="item"></main>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>"""
