"""The report shows what was kept, and its figures come from the selection itself."""

import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from bis_jax.reports import selection_page, selection_plots
from bis_jax.selection import bis
from bis_jax.selection.rule import Rule, select, written_rows


@pytest.fixture(scope="module")
def table(table_of):
  rng = np.random.default_rng(1)
  rollouts = [(rng.integers(0, 17, 5) * rng.integers(0, 2, 5) / 16).tolist() for _ in range(400)]
  return table_of(
    rollouts, source=[0] * 300 + [1] * 100, line=[*range(300), *range(100)], names=("a<b>", "c")
  )


@pytest.mark.parametrize(
  "rule",
  [
    Rule("bis", fraction=0.1),
    Rule("full", fraction=0.1),
    Rule("low_mc", count=20, scope="global", order="paper"),
  ],
)
def test_page_and_pictures_are_written(tmp_path, table, rule):
  selection_page.write_report(tmp_path, table, rule)
  page = (tmp_path / "index.html").read_text()
  kept = len(select(table, strategy=rule.strategy, fraction=rule.fraction, count=rule.count,
                    scope=rule.scope, order=rule.order))  # fmt: skip
  assert f'<b>{kept:,}</b><span class="quiet small">kept<' in page
  assert "a&lt;b&gt;" in page and "a<b>" not in page
  pictures = sorted(path.name for path in tmp_path.glob("*.png"))
  expected = ["change.png", "overlap.png", "plane.png", "scores.png", "sources.png"]
  if rule.strategy == "full":  # ranks nothing and never changes
    expected = ["overlap.png", "plane.png", "sources.png"]
  assert pictures == expected
  for name in pictures:
    with Image.open(tmp_path / name) as image:
      assert np.ptp(np.asarray(image.convert("L"))) > 100, f"{name} is blank"


def test_the_page_says_what_hard_labels_mean_for_the_ranking(tmp_path, table_of, table):
  hard = table_of([[1.0, 0.0], [1.0], [0.0, 0.0, 1.0], [0.0]] * 5, line=range(20))
  for name, one in (("hard", hard), ("counts", table)):
    selection_page.write_report(tmp_path / name, one, Rule("bis", fraction=0.5))
  said = [
    ("by mixture alone" in (tmp_path / name / "index.html").read_text())
    for name in ("hard", "counts")
  ]
  assert said == [True, False]


@pytest.mark.parametrize(
  ("rule", "other"),
  [
    (Rule("bis", fraction=0.1), {}),
    (Rule("bis", fraction=0.1), {"tau": 0.25, "alpha": 0.05, "fraction": 0.33}),
    (Rule("random", count=90, scope="global", reliability_if_no_positive=0.5), {"alpha": 1.0}),
  ],
)
def test_the_browser_keeps_what_python_keeps(tmp_path, table, browse, rule, other):
  """Mutation caught: a cut that is global, another order of operations in the score."""
  selection_page.write_report(tmp_path, table, rule)
  fragment = "#" + "&".join(f"{name}={value}" for name, value in other.items())
  dom, messages = browse(tmp_path / "index.html", fragment)
  assert not messages
  shown = re.search(r'id="choices-kept"><td>kept</td>(.*?)</tr>', dom)[1]
  count, mixed, reliability, steps = re.findall(r"<td>([\d.,]+)</td>", shown)
  fraction = rule.fraction or 90 / 400
  by_bis = dataclasses.replace(
    rule, **{"strategy": "bis", "count": None, "fraction": fraction} | other
  )
  s = table.statistics(by_bis.tau)
  kept = written_rows(table, by_bis)
  assert int(count) == kept.sum()
  everywhere = bis.reliability(s.n_pos, s.score_sum, rule.reliability_if_no_positive)
  # Of rollouts that tie at the cut, the page takes a share of each kind.
  assert float(mixed) == pytest.approx(100 * s.is_mixed[kept].mean(), abs=4)
  assert float(reliability) == pytest.approx(everywhere[kept].mean(), abs=0.03)
  assert float(steps) == pytest.approx(s.n[kept].mean(), abs=0.05)
  cut = float(re.search(r'id="choices-cut">([\d.e-]+)<', dom)[1])
  lowest = [by_bis.scores(table, s)[span][kept[span]].min() for span in table.spans()]
  lowest = [min(lowest)] if rule.scope == "global" else lowest
  assert cut == pytest.approx(sorted(lowest)[len(lowest) // 2], rel=1e-5)


def test_every_rollout_falls_into_one_cell_of_the_plane():
  mixture = np.array([0.0, 0.25, 0.1, 0.0, 1e-6])
  reliability = np.array([1.0, 1 / 16, 0.5, 0.0, 1.0])
  cells = selection_plots.cell_counts(mixture, reliability)
  assert cells.sum() == 5
  assert cells[0].sum() == 2, "p (1 - p) = 0 has a column of its own"
  assert cells[0, -1] == 1 and cells[-1, 0] + cells[-1, 1] == 1


def test_overlap_is_intersection_over_union():
  sets = [np.array(m, bool) for m in ([1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0])]
  overlap = selection_page._jaccard(sets)
  assert overlap[0, 1] == overlap[1, 0] == 1 / 3
  assert overlap[0, 2] == 0 and overlap[2, 3] == 1 and np.trace(overlap) == 4


def test_comparison_changes_one_parameter_at_a_time():
  assert selection_page.neighbours(Rule("bis", fraction=0.1, alpha=0.2)) == [
    Rule("bis", fraction=0.1, alpha=0.05),
    Rule("bis", fraction=0.25, alpha=0.2),
  ]
  assert selection_page.neighbours(Rule("mixed", count=10)) == [
    Rule("mixed", count=5),
    Rule("mixed", count=20),
  ]
  assert selection_page.neighbours(Rule("low_mc", fraction=0.1)) == [
    Rule("low_mc", fraction=0.05),
    Rule("low_mc", fraction=0.2),
  ]


def test_pictures_are_png_files(table):
  png = selection_plots.overlap(["a", "b"], np.eye(2))
  assert Image.open(io.BytesIO(png)).format == "PNG"
