"""The toy corpus: layouts, determinism, truth that agrees with the pictures, measured MC scores."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from bis_jax.errors import UserError
from bis_jax.settings import locations
from bis_jax.toy import drawing, policies, questions
from bis_jax.toy.pictures import INKS, MOST_STRIPES, SIDE, TILE, Panel, draw_picture
from bis_jax.toy.questions import SCORES
from bis_jax.toy.records import Knobs
from configs import common

SMALL = dict(rollouts=900, images=280, benchmark_items=50, workers=2)


def read_lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def _draw(folder, **knobs):
  return pathlib.Path(drawing.draw(folder, **knobs))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
  return _draw(tmp_path_factory.mktemp("toy") / "corpus", **SMALL)


@pytest.fixture(scope="module")
def records(corpus) -> dict[str, list[dict]]:
  return {p.name: read_lines(p) for p in sorted((corpus / "annotations").glob("*.jsonl"))}


def test_records_have_the_layout_of_the_release(corpus, records):
  assert sum(len(lines) for lines in records.values()) == SMALL["rollouts"]
  assert len(records) == len(questions.SOURCES)
  for record in (r for lines in records.values() for r in lines):
    images = record["image"] if isinstance(record["image"], list) else [record["image"]]
    assert record["question"].count("<image>") == len(images)
    assert record["question"].endswith(record["question_orig"])
    for image in images:
      prefix, _, rest = image.partition("/")
      assert prefix == "VisualPRM400K-v1.1-Raw"
      assert Image.open(corpus / "images" / rest).size == (112, 112)
    steps = record["steps_with_score"]
    assert record["response"] == "\n\n".join(s["step"] for s in steps)
    assert steps[-1]["step"].startswith("Final answer: ")
    for step in steps:
      assert step["num_mc_total"] == record["num_mc_sequences"] == 16
      assert step["score"] == step["num_mc_correct"] / 16


def test_a_group_is_three_rollouts_of_one_picture_and_question(records):
  lines = records["bars_sum.jsonl"]
  asked = [(str(r["image"]), r["question_orig"]) for r in lines]
  assert asked[0::3] == asked[1::3] == asked[2::3]
  assert len(set(asked)) > 0.9 * len(asked) / 3


def test_images_are_as_many_as_asked_for(tmp_path):
  many = _draw(tmp_path / "many", rollouts=900, images=300, benchmark_items=18)
  few = _draw(tmp_path / "few", rollouts=900, images=100, benchmark_items=18)
  assert 295 <= len(list((many / "images").rglob("*.png"))) <= 300
  assert 90 <= len(list((few / "images").rglob("*.png"))) <= 100


def test_benchmark_has_the_layout_of_visual_process_bench(corpus):
  items = read_lines(corpus / "benchmark" / "test.jsonl")
  assert len(items) == SMALL["benchmark_items"]
  sources = {item["data_source"] for item in items}
  assert sources == {"MMMU", "MathVision", "MathVerse_VO", "DynaMath", "WeMath"}
  assert len({item["policy_model"] for item in items}) == 3
  labels = [label for item in items for label in item["response"]["process_correctness"]]
  assert {-1, 0, 1} == set(labels)
  assert 0.2 < labels.count(-1) / len(labels) < 0.5
  for item in items:
    assert len(item["response"]["steps"]) == len(item["response"]["process_correctness"])
    for image in item["image"]:
      assert (corpus / "benchmark" / image).is_file()


STEP = re.compile(r"he (\w+) bar scores (\w+), total (\d+)\.")


def read_tile(picture: np.ndarray, row: int, column: int) -> tuple[str, int] | None:
  """Returns a tile's ink and how many stripes it has, or None for bare paper."""
  tile = picture[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
  assert (tile == tile[:1]).all()
  inked = tile[0].any(axis=1)
  if inked.all():
    return None
  [ink] = [name for name, rgb in INKS.items() if (tile[0][inked] == rgb).all()]
  return ink, int(np.count_nonzero(np.diff(np.r_[0, inked]) == 1))


def read_bars(path: pathlib.Path) -> dict[str, int]:
  """Returns {ink: stripes} of a picture."""
  picture = np.array(Image.open(path))
  tiles = [read_tile(picture, row, column) for row in range(SIDE) for column in range(SIDE)]
  return dict(filter(None, tiles))


def test_truth_is_what_the_picture_shows(corpus, records):
  truths = {}
  for line in read_lines(corpus / "truth.jsonl"):
    truths[line["file"], line["line"]] = line["truth"]
  checked = {0: 0, 1: 0}
  for number, record in enumerate(records["bars_sum.jsonl"]):
    shown = read_bars(corpus / "images" / record["image"].partition("/")[2])
    seen: dict[str, int] = {}
    steps = [s["step"] for s in record["steps_with_score"]]
    for step, truth in zip(steps, truths["bars_sum.jsonl", number], strict=True):
      if found := STEP.search(step):
        ink, score, total = found[1], SCORES.index(found[2]) + 1, int(found[3])
        seen[ink] = shown[ink]
        assert truth == (score == shown[ink] and total == sum(seen.values()))
        checked[truth] += 1
      elif step.startswith("Final"):
        assert truth == (step == f"Final answer: {sum(seen.values())}")
        assert record["answer"] == str(sum(seen.values()))
  assert min(checked.values()) > 5


def test_totals_never_contradict_the_notes(records):
  """Text alone must not reveal a wrong step: the written sums are correct in both cases."""
  for record in records["bars_sum.jsonl"]:
    notes = {}
    for step in record["steps_with_score"][:-1]:
      if found := STEP.search(step["step"]):
        notes[found[1]] = SCORES.index(found[2]) + 1
        assert int(found[3]) == sum(notes.values())
    assert record["steps_with_score"][-1]["step"] == f"Final answer: {sum(notes.values())}"


def test_wrong_notes_are_as_varied_as_right_ones(tmp_path):
  """No score predicts wrong steps: a table of scores has no information."""
  corpus = _draw(tmp_path / "slips", **SMALL, slip=6.0)
  records = {p.name: read_lines(p) for p in (corpus / "annotations").glob("*.jsonl")}
  truths = {(t["file"], t["line"]): t["truth"] for t in read_lines(corpus / "truth.jsonl")}
  wrong, right = np.zeros(MOST_STRIPES), np.zeros(MOST_STRIPES)
  for source in questions.SOURCES:
    for number, record in enumerate(records[f"{source.name}.jsonl"]):
      steps = [s["step"] for s in record["steps_with_score"]]
      truth = truths[f"{source.name}.jsonl", number]
      first_wrong = truth.index(0) if 0 in truth else len(truth)
      for i, step in enumerate(steps[: first_wrong + 1]):
        if found := re.search(r" scores (\w+),", step):
          (right if truth[i] else wrong)[SCORES.index(found[1])] += 1
  assert wrong.sum() > 300
  expected = right / right.sum() * wrong.sum()
  assert ((wrong - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees, p = 0.001


def test_captions_say_what_the_pictures_show(corpus):
  captions = read_lines(corpus / "captions.jsonl")
  paths = [path for caption in captions for path in caption["image"]]
  on_disk = {str(p.relative_to(corpus / "images")) for p in (corpus / "images").rglob("*.png")}
  assert sorted(paths) == sorted(on_disk)  # each once, and none of the benchmark's
  bars = [caption for caption in captions if caption["image"][0].startswith("bars_sum/")]
  assert bars
  for caption in bars:
    shown = read_bars(corpus / "images" / caption["image"][0])
    said = dict(
      re.fullmatch(r"The (\w+) bar scores (\w+)\.", s).groups() for s in caption["sentences"]
    )
    assert {ink: SCORES.index(score) + 1 for ink, score in said.items()} == shown


def test_same_settings_draw_the_same_bytes_whatever_the_workers(corpus, tmp_path):
  again = _draw(tmp_path / "again", **{**SMALL, "workers": 1})
  for path in sorted(corpus.rglob("*")):
    if path.is_file():
      assert (again / path.relative_to(corpus)).read_bytes() == path.read_bytes(), path


def test_the_bytes_are_those_of_this_version(tmp_path):
  """Change VERSION with what is drawn: users' cached corpora and backbones depend on it."""
  knobs = dict(rollouts=240, images=60, benchmark_items=24, seed=3, slip=1.5, recovery=2.0)
  drawn = _draw(tmp_path / "drawn", workers=1, **knobs, stop_at_zero=True, rollouts_per_group=2)
  state = hashlib.sha256()
  for path in sorted(drawn.rglob("*")):
    if path.suffix == ".jsonl":
      state.update(path.read_bytes())
    elif path.suffix == ".png":  # pixels: the bytes depend on Pillow's zlib
      state.update(np.asarray(Image.open(path)).tobytes())
    elif path.name == "tokenizer.json":
      state.update(repr(sorted(json.loads(path.read_text())["model"]["vocab"].items())).encode())
  assert (drawing.VERSION, state.hexdigest()[:16]) == (1, "33312e8d717ea86b")


def test_a_damaged_corpus_is_drawn_again(tmp_path, caplog):
  drawn = _draw(tmp_path / "drawn", **TINY)
  file = drawn / "annotations/bars_sum.jsonl"
  whole = file.read_bytes()
  file.write_bytes(whole.replace(b"three", b"eight", 1))
  _draw(drawn, **TINY)
  assert file.read_bytes() == whole
  assert f"{file} is damaged: making the toy corpus again" in caplog.text


def test_a_folder_of_something_else_is_left_alone(tmp_path):
  (tmp_path / "thesis.txt").write_text("...")
  with pytest.raises(UserError, match="holds something else than the toy corpus"):
    _draw(tmp_path, **TINY)


def test_several_starts_on_an_empty_cache_leave_one_corpus(tmp_path):
  alone = _draw(tmp_path / "alone", **TINY)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    starts = [pool.submit(drawing.draw, tmp_path / "shared", **TINY) for _ in range(3)]
  assert {start.result() for start in starts} == {tmp_path / "shared"}
  for path in alone.rglob("*"):
    if path.is_file():
      assert (tmp_path / "shared" / path.relative_to(alone)).read_bytes() == path.read_bytes()
  assert {path.name for path in tmp_path.iterdir()} == {"alone", "shared"}


def test_another_seed_draws_another_corpus(corpus, tmp_path):
  other = _draw(tmp_path / "other", **{**SMALL, "seed": 1})
  file = "annotations/bars_sum.jsonl"
  assert (other / file).read_bytes() != (corpus / file).read_bytes()


def test_an_equal_corpus_is_reused_and_another_is_left_alone(corpus):
  before = (corpus / "truth.jsonl").stat().st_mtime_ns
  assert _draw(corpus, **SMALL) == corpus
  with pytest.raises(UserError, match="delete it or name another folder"):
    _draw(corpus, **{**SMALL, "seed": 1})
  assert (corpus / "truth.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
  "bad",
  [
    {"rollouts": 3},
    {"slip": -0.1},
    {"n_mc": 0},
    {"rollouts_per_group": 0},
    {"continuation_slip": -1},
    {"kinds": 8},
    {"first_kind": -6},
    {"kind_exponent": -1.0},
  ],
)
def test_settings_out_of_range_are_named(tmp_path, bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    _draw(tmp_path / "bad", **{**SMALL, **bad})
  assert not (tmp_path / "bad").exists()


TINY = dict(rollouts=360, images=60, benchmark_items=18, workers=1)


def draw_records(folder: pathlib.Path, **knobs) -> tuple[list[dict], list[list[int]]]:
  """Returns the records of all sources, concatenated, and the truth of their steps."""
  corpus = _draw(folder, **TINY, **knobs)
  truth = drawing.read_truth(corpus)
  records, truths = [], []
  for path in sorted((corpus / "annotations").glob("*.jsonl")):
    for line, record in enumerate(read_lines(path)):
      records.append(record)
      truths.append(truth[path.stem, line])
  return records, truths


def scores_of(record: dict) -> list[float]:
  return [step["score"] for step in record["steps_with_score"]]


def mean_of_right_steps(records: list[dict], truths: list[list[int]]) -> float:
  scores = np.concatenate([scores_of(record) for record in records])
  return scores[np.concatenate(truths) == 1].mean()


def test_knobs_of_the_continuations_leave_the_solutions_as_they_are(tmp_path):
  records, truths = draw_records(tmp_path / "plain")
  mean = mean_of_right_steps(records, truths)
  for name, value, low, high in (
    ("n_mc", 64, 0.98, 1.02),
    ("lapse", 4.0, 0.7, 0.9),
    ("continuation_slip", 6.0, 0.6, 0.9),
    ("continuation_slip", 0.0, 1.02, 1.1),
  ):
    others, other_truths = draw_records(tmp_path / f"{name} {value}", **{name: value})
    assert other_truths == truths
    assert [r["response"] for r in others] == [r["response"] for r in records]
    assert low < mean_of_right_steps(others, truths) / mean < high, name
    totals = {s["num_mc_total"] for r in others for s in r["steps_with_score"]}
    assert totals == {value if name == "n_mc" else 16}


def test_annotation_can_stop_at_the_first_zero(tmp_path):
  records, _ = draw_records(tmp_path / "plain")
  stopped, _ = draw_records(tmp_path / "stopped", stop_at_zero=True)
  unmeasured = 0
  for record, other in zip(records, stopped, strict=True):
    scores, steps = scores_of(record), other["steps_with_score"]
    end = scores.index(0.0) + 1 if 0.0 in scores else len(scores)
    assert steps[:end] == record["steps_with_score"][:end]
    assert [step["step"] for step in steps] == [s["step"] for s in record["steps_with_score"]]
    for step in steps[end:]:
      assert (step["score"], step["num_mc_correct"], step["num_mc_total"]) == (0.0, 0, 0)
      unmeasured += 1
  assert unmeasured > 20


def read_kinds(path: pathlib.Path) -> dict[str, bytes]:
  """Returns {ink: pattern of its tiles} of a picture of bars."""
  picture = np.array(Image.open(path))
  found: dict[str, bytes] = {}
  for row in range(SIDE):
    for column in range(SIDE):
      tile = picture[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
      inked = tile.any(axis=2)
      if not inked.all():
        [ink] = [name for name, rgb in INKS.items() if (tile[inked] == rgb).all()]
        assert found.setdefault(ink, inked.tobytes()) == inked.tobytes()
  return found


def test_a_tile_scores_by_its_kind(tmp_path):
  """Mutations caught: kinds that are drawn alike, kinds of one score apart from another's."""
  knobs = SMALL | dict(rollouts=6000, images=2000, benchmark_items=600)
  corpus = _draw(tmp_path / "kinds", **knobs, kinds=12, first_kind=6, kind_exponent=1.0)
  scores: dict[bytes, str] = {}  # of a pattern
  seen = collections.Counter()
  for caption in read_lines(corpus / "captions.jsonl"):
    if caption["image"][0].startswith("bars_sum/"):
      shown = read_kinds(corpus / "images" / caption["image"][0])
      for sentence in caption["sentences"]:
        ink, score = re.fullmatch(r"The (\w+) bar scores (\w+)\.", sentence).groups()
        assert scores.setdefault(shown[ink], score) == score
        seen[shown[ink]] += 1
  assert len(scores) == 12
  frequent = []
  for score in SCORES:  # two kinds each, the i-th of all with weight 1 / i
    both = sorted(count for pattern, count in seen.items() if scores[pattern] == score)
    frequent.append(both[1] / sum(both))
  assert all(6 / 12 < share < 0.97 for share in frequent)
  assert 0.6 < np.mean(frequent) < 0.85
  truths = drawing.read_truth(corpus)
  checked = {0: 0, 1: 0}
  for line, record in enumerate(read_lines(corpus / "annotations" / "bars_sum.jsonl")):
    shown = read_kinds(corpus / "images" / record["image"].partition("/")[2])
    wrong: set[str] = set()  # the notes so far
    for step, truth in zip(record["steps_with_score"], truths["bars_sum", line], strict=True):
      if found := STEP.search(step["step"]):
        wrong.discard(found[1])
        if found[2] != scores[shown[found[1]]]:
          wrong.add(found[1])
        assert truth == (not wrong)
        checked[truth] += 1
  assert min(checked.values()) > 30
  judged = collections.Counter(
    kind
    for path in (corpus / "benchmark" / "images" / "MathVerse_VO").rglob("*.png")
    for kind in read_kinds(path).values()
  )
  assert judged.keys() == seen.keys() and min(judged.values()) > 600 / 6 * 4.5 / 12 / 2


def test_corpora_of_other_kinds_have_one_tokenizer(tmp_path):
  """A backbone that knows some kinds is trained on others."""
  few = SMALL | dict(benchmark_items=18)
  folders = [_draw(tmp_path / str(i), **few, kinds=6, first_kind=i, slip=i) for i in (0, 6)]
  first, second = ((folder / "tokenizer" / "tokenizer.json").read_bytes() for folder in folders)
  assert first == second


def test_a_group_has_as_many_rollouts_as_asked_for(tmp_path):
  records, _ = draw_records(tmp_path / "five", rollouts_per_group=5)
  bars = [r for r in records if str(r["image"]).split("/")[1] == "bars_sum"]
  asked = [(r["image"], r["question_orig"]) for r in bars]
  assert len(bars) == 72
  for i in range(0, 72, 5):
    assert len(set(asked[i : i + 5])) == 1
    assert asked[i : i + 1] != asked[i + 5 : i + 6]


def test_every_knob_is_a_setting_and_has_a_folder_of_its_own():
  c = common.in_form(common.get_config(), "toy")
  assert c.corpus.toy.to_dict() == dataclasses.asdict(Knobs())
  folders = {locations.locate(c).toy}
  for name, value in dataclasses.asdict(Knobs()).items():
    other = c.copy_and_resolve_references()
    other.corpus.toy[name] = True if value is False else 2 * value + 1
    folders.add(locations.locate(other).toy)
  assert len(folders) == 1 + len(dataclasses.fields(Knobs))


def test_tokenizer_is_short_on_its_text_and_encodes_any(corpus, records):
  tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
  assert len(tokenizer) < 600
  steps = [s["step"] for lines in records.values() for r in lines for s in r["steps_with_score"]]
  assert np.mean([len(tokenizer.encode(step)) for step in steps]) < 12
  assert [tokenizer.decode(i) for i in tokenizer.encode(" 27")] == [" 2", "7"]
  for text in ("Zwölf Boxkämpfer\n\n\t jagen 42 ☃", " ".join(steps[:50])):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  for name in ("<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"):
    assert tokenizer.encode(name) == [tokenizer.convert_tokens_to_ids(name)]
  assert tokenizer.pad_token == "<|endoftext|>"
  chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
  assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n")


def problems(n: int, things: int = 4) -> policies.Problems:
  rng = np.random.default_rng(0)
  truth = rng.integers(0, 9, (n, things)).astype(np.int8)
  worth = np.tile(np.arange(1, 10), (n, 1))
  absent = np.ones((n, 9), bool)
  np.put_along_axis(absent, truth.astype(int), False, axis=1)
  return policies.Problems(truth, np.full(n, things), np.zeros(n, int), worth, absent)


def test_mc_scores_of_right_states_follow_the_slips_that_are_left():
  about, habits = problems(3000), policies.Habits(slip=0.1, lapse=0.05)
  rng = np.random.default_rng(1)
  solutions = policies.solve(rng, about, habits)
  counts = policies.count_successes(rng, about, solutions, habits, 16)
  for thing in range(4):
    right = solutions.right[:, 2 * thing + 1]
    expected = 0.95 * 0.9 ** (3 - thing)  # two slips that cancel add a little
    assert counts[right, 2 * thing + 1].mean() / 16 == pytest.approx(expected, abs=0.015)
  final = solutions.event[:, -1] == policies.FINAL
  assert final.all()
  np.testing.assert_array_equal(counts[:, -1], 16 * solutions.right[:, -1])


def test_without_a_second_look_wrong_states_seldom_succeed_and_with_it_more():
  about = problems(3000)
  rates = []
  for again in (0.0, 0.3):
    habits, rng = policies.Habits(slip=0.1, again=again), np.random.default_rng(2)
    solutions = policies.solve(rng, about, habits)
    counts = policies.count_successes(rng, about, solutions, habits, 16)
    looks = solutions.event == policies.LOOK
    rates.append((counts[looks & ~solutions.right] > 0).mean())
  assert rates[0] < 0.25 < 0.7 < rates[1]


def test_panels_are_drawn_where_and_as_they_say():
  panel = Panel("a bar", 3, "red", row=1, column=2, rows=2, columns=1)
  picture = np.array(Image.open(io.BytesIO(draw_picture((panel,)))))
  drawn = {
    (row, column): read_tile(picture, row, column) for row in range(4) for column in range(4)
  }
  assert drawn == dict.fromkeys(drawn) | {(1, 2): ("red", 3), (2, 2): ("red", 3)}
  for stripes in range(1, MOST_STRIPES + 1):
    picture = np.array(Image.open(io.BytesIO(draw_picture((panel._replace(score=stripes),)))))
    assert read_tile(picture, 1, 2) == ("red", stripes)
