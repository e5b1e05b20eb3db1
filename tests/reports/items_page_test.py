"""The page of all items: selecting, sorting and filtering in a real browser."""

import json
import re
import types

import numpy as np
import pytest
from etils import epath

from bis_jax.corpus.corpus import StoredRollout
from bis_jax.evaluation import visual_process_bench
from bis_jax.reports import items_page, run_page
from bis_jax.run.held_out import HeldOut
from configs import common


@pytest.fixture
def page(tmp_path, benchmark):
  """(file, items, runs): ten items of two runs, of which exactly one is right."""
  items = visual_process_bench.load(benchmark)
  rng = np.random.default_rng(0)
  first = [rng.uniform(size=len(item.steps)) for item in items]
  runs = {"first & best": first, "second": [1 - s for s in first]}
  mc_scores = [[0.125] * len(item.steps) if item.index == 4 else None for item in items]
  items_page.write_items_page(
    tmp_path / "out", title="<items>", items=items, runs=runs, mc_scores=mc_scores
  )
  return tmp_path / "out/items.html", items, runs


def rows(dom):
  """Item numbers in the order of the list."""
  return [int(number) for number in re.findall(r'<tr data-item="(\d+)"', dom)]


def steps(dom):
  """(score, label class, MC score or None) of every step of the chosen item."""
  cards = re.findall(r'<li class="step" style="--score: ?([\d.]+);?">(.*?)</li>', dom, re.DOTALL)
  shown = []
  for score, card in cards:
    mc = re.search(r"MC ([\d.]+)", card)
    shown.append((float(score), re.search(r"label (\w+)", card)[1], mc and float(mc[1])))
  return shown


def test_items_are_sorted_by_error_and_the_worst_is_open(page, browse):
  file, items, runs = page
  dom, console = browse(file)
  assert console == []
  errors = [run_page.item_error(i, s) for i, s in zip(items, runs["first & best"], strict=True)]
  order = np.argsort(errors)[::-1].tolist()
  assert rows(dom) == order
  worst = items[order[0]]
  assert f"item {worst.index}, {worst.data_source}, solved by {worst.policy_model}" in dom
  kinds = {1: "correct", -1: "error", 0: "neutral"}
  assert steps(dom) == [
    (round(score, 4), kinds[label], None)
    for score, label in zip(runs["first & best"][order[0]], worst.labels, strict=True)
  ]


def test_the_address_chooses_run_item_order_and_source(page, browse):
  file, items, runs = page
  dom, console = browse(file, "#run=second&sort=index&source=WeMath&item=4")
  assert console == []
  assert rows(dom) == [4, 9]
  assert "2 of 10 items" in dom
  assert [score for score, _, _ in steps(dom)] == np.round(runs["second"][4], 4).tolist()
  assert [mc for _, _, mc in steps(dom)] == [0.125] * len(items[4].steps)


def test_held_out_rollouts_show_their_mc_scores(tmp_path, benchmark, browse):
  """Rollouts of a stub corpus: an MC score of 1/3, and one unmeasured."""
  rollouts = [
    StoredRollout(
      source="geo",
      line=line,
      images=("a.png",),
      question=f"How long is side {line}?",
      steps=("Thirds.", "Nobody asked.", "So 3."),
      scores=(1 / 3, 0.0, last),
      measured=(True, False, True),
      answer="3",
      image_ids=(0,),
    )
    for line, last in ((7, 0.0), (9, 1.0))
  ]
  corpus = types.SimpleNamespace(
    rollouts=lambda indices: [rollouts[i] for i in indices],
    image=lambda image_id: (benchmark / "images/0_0.png").read_bytes(),
    image_sizes=np.array([[30, 40]]),
  )
  config = common.get_config()
  config.corpus.unmeasured = "ignore"
  dev = HeldOut(corpus, np.array([0, 1]), config)
  scores = [np.array([0.9, 0.5, 0.8]), np.array([0.25, 0.5, 0.75])]
  dev.write(epath.Path(tmp_path), dict(enumerate(scores)))
  dom, console = browse(tmp_path / "held_out/items.html", "#item=1")
  assert console == [] and "How long is side 9?" in dom and "item 1, geo" in dom
  assert steps(dom) == [(0.25, "correct", 0.3333), (0.5, "neutral", None), (0.75, "correct", 1)]
  assert "MC none" in dom and dom.count('class="wrong"') == 1
  assert steps(browse(tmp_path / "held_out/items.html")[0])[2] == (0.8, "error", 0)
  assert json.loads((tmp_path / "held_out.jsonl").read_text().splitlines()[1]) == {
    "rollout": "geo:9",
    "data_source": "geo",
    "scores": [0.25, 0.5, 0.75],
    "labels": [1, 0, 1],
    "mc_scores": [1 / 3, None, 1.0],
  }


def test_an_address_that_means_nothing_shows_the_first_item(page, browse):
  file, _, _ = page
  dom, console = browse(file, "#run=gone&item=999&sort=constructor&find=picture 7")
  assert console == []
  assert rows(dom) == [7]
  assert "What is in picture 7?" in dom


def test_images_lie_beside_the_page_and_nothing_else_is_read(page, browse):
  file, items, _ = page
  dom, _ = browse(file, "#item=2")
  shown = re.findall(r'<img src="([^"]+)"', dom)
  assert len(shown) == 2 and all((file.parent / name).is_file() for name in shown)
  assert (file.parent / shown[0]).read_bytes() == items[2].images[0].read()
  assert not re.search(r"""(?:src|href)=["']?https?:|@import|url\(""", file.read_text())


def test_text_that_looks_like_a_page_stays_text(
  tmp_path, write_benchmark, benchmark_record, browse
):
  trap = (
    '</script><script>console.error(1)</script><img src=x onerror="console.error(2)">{x} \u2028'
  )
  record = benchmark_record(0) | {"question": trap, "answer": trap, "policy_model": trap}
  record["response"] = {"steps": [trap], "process_correctness": [1]}
  items = visual_process_bench.load(write_benchmark(tmp_path / "trap", [record]))
  items_page.write_items_page(
    tmp_path, title=trap, items=items, runs={trap: [np.array([0.5])]}, threshold=0.6
  )
  dom, console = browse(tmp_path / "items.html")
  assert console == []
  assert dom.count("<img") == 1 and dom.count("<script") == 2
  assert "misjudged" in dom
