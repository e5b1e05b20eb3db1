"""A run's page: self-contained, correct, and without errors in a real browser."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from bis_jax.evaluation import step_evaluation, visual_process_bench
from bis_jax.images import ImageError
from bis_jax.reports import page as page_lib
from bis_jax.reports import run_page


@pytest.fixture
def run(benchmark):
  """(items, scores, evaluation) of ten items, the model confident and sometimes wrong."""
  items = visual_process_bench.load(benchmark)
  rng = np.random.default_rng(0)
  scores = [rng.uniform(size=len(item.steps)) for item in items]
  return items, scores, step_evaluation.evaluate(items, scores, bootstrap_draws=20)


def page(tmp_path, run, **more):
  items, scores, evaluation = run
  run_page.write_page(
    str(tmp_path / "run"),
    title="a <run>",
    items=items,
    scores=scores,
    evaluation=evaluation,
    **more,
  )
  return tmp_path / "run"


EVERYTHING = {
  "history": [{"step": s, "loss": 1 / (s + 1)} for s in range(40)] + [{"step": 40, "other": 1.0}],
  "selection": (np.array([0, 0.25, 0.2]), np.array([1, 0.5, 1.0]), np.array([0, 1, 1], bool)),
  "alpha": 0.2,
}


def test_every_plot_is_a_png_and_stands_on_the_page(tmp_path, run):
  workdir = page(tmp_path, run, **EVERYTHING)
  plots = sorted(path.name for path in (workdir / "plots").iterdir())
  assert plots == ["calibration.png", "loss.png", "selection.png", "source_f1.png"]
  html = (workdir / "index.html").read_text(encoding="utf-8")
  for name in plots:
    encoded = (workdir / "plots" / name).read_bytes()
    assert Image.open(io.BytesIO(encoded)).format == "PNG"
    assert page_lib.data_uri(encoded, "png") in html


def test_what_is_missing_is_left_out(tmp_path, run):
  workdir = page(tmp_path, run)
  assert sorted(path.name for path in (workdir / "plots").iterdir()) == [
    "calibration.png",
    "source_f1.png",
  ]
  without_intervals = step_evaluation.evaluate(*run[:2], bootstrap_draws=0)
  page(tmp_path, (*run[:2], without_intervals))
  one_class = [np.ones(len(item.steps)) for item in run[0]]
  page(tmp_path, (run[0], one_class, step_evaluation.evaluate(run[0], one_class)))


def test_the_page_reads_nothing_from_elsewhere(tmp_path, run):
  html = (page(tmp_path, run, **EVERYTHING) / "index.html").read_text(encoding="utf-8")
  for address in re.findall(r"""(?:src|href)=["']?([^"'\s>]+)|url\(([^)]*)\)""", html):
    assert "".join(address).startswith("data:image/")
  assert not re.search(r"<(script|link|iframe|object|embed)\b", html)


def test_steps_show_their_score_their_label_and_where_the_model_is_wrong(run):
  items, scores, _ = run
  item = items[3]  # labels 1, -1, 1, 0, 1
  item, steps, images = run_page.item_card(item, np.array([0.9, 0.8, 0.2, 0.1, 0.5]))
  html = page_lib.render("item.html", item=item, steps=steps, images=images, threshold=0.5)
  cards = html.split('<li class="step"')[1:]
  assert [re.search(r"--score:([\d.]+)", card)[1] for card in cards] == [
    "0.9000",
    "0.8000",
    "0.2000",
    "0.1000",
    "0.5000",
  ]
  assert ["misjudged" in card for card in cards] == [False, True, True, False, False]
  assert [re.search(r"label (\w+)", card)[1] for card in cards] == [
    "correct",
    "error",
    "correct",
    "neutral",
    "correct",
  ]


def test_examples_take_turns_over_sources_and_span_best_and_worst(run):
  items, _, _ = run
  scores = [np.full(len(item.steps), (item.index + 0.5) / 10) for item in items]
  error = [run_page.item_error(item, s) for item, s in zip(items, scores, strict=True)]
  chosen = run_page.example_items(items, scores, 10)
  for half, pick in ((chosen[:5], min), (chosen[5:], max)):
    assert len({items[i].data_source for i in half}) == 5
    for i in half:
      rivals = [j for j in range(10) if items[j].data_source == items[i].data_source]
      assert error[i] == pick(error[j] for j in rivals)
  assert len(run_page.example_items(items, scores, 3)) == 3


def test_text_of_items_is_text(tmp_path, write_benchmark, benchmark_record, browse):
  trap = '<img src=x onerror="console.error(1)"></li><script>console.error(2)</script>&amp;'
  record = benchmark_record(0) | {"question": trap, "answer": trap, "policy_model": trap}
  record["response"] = {"steps": [trap, "fine"], "process_correctness": [1, -1]}
  items = visual_process_bench.load(write_benchmark(tmp_path / "trap", [record]))
  scores = [np.array([0.3, 0.4])]
  evaluation = step_evaluation.evaluate(items, scores, bootstrap_draws=0)
  dom, console = browse(page(tmp_path, (items, scores, evaluation)) / "index.html")
  assert console == []
  assert "<script" not in dom and 'src="x"' not in dom
  assert dom.count("&lt;script&gt;") == 5  # question, answer, step, and the policy model twice


def test_the_page_opens_in_a_browser_without_a_complaint(tmp_path, run, browse):
  dom, console = browse(page(tmp_path, run, **EVERYTHING) / "index.html")
  assert console == []
  assert dom.count('class="card item"') == 10
  assert "a &lt;run&gt;" in dom


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_of_every_mode_become_thumbnails(mode):
  encoded = io.BytesIO()
  kind = {"CMYK": "JPEG", "F": "TIFF"}.get(mode, "PNG")
  Image.new(mode, (1200, 300)).save(encoded, kind)
  large = encoded.getvalue() + bytes(page_lib._AS_IS_BYTES)  # trailing zeros are ignored
  small, shown_kind = page_lib.thumbnail(large)
  image = Image.open(io.BytesIO(small))
  assert (image.size, image.format, shown_kind) == ((560, 140), "WEBP", "webp")


def test_small_pictures_are_shown_as_they_are():
  encoded = io.BytesIO()
  Image.new("RGB", (10, 10)).save(encoded, "JPEG")
  assert page_lib.thumbnail(encoded.getvalue()) == (encoded.getvalue(), "jpeg")
  with pytest.raises(ImageError):
    page_lib.thumbnail(json.dumps({}).encode())
