"""The embedded corpus: layouts, determinism, truth that pictures bear out, measured MC scores."""

import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from bis_jax.corpus import toy, toy_policy, toy_questions
from bis_jax.corpus.toy_pictures import CELL, COLOURS, SHAPES, SIDE, Card, draw_picture

SMALL = dict(rollouts=900, images=280, benchmark_items=50, workers=2)


def read_lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
  return toy.draw(tmp_path_factory.mktemp("toy") / "corpus", **SMALL)


@pytest.fixture(scope="module")
def records(corpus) -> dict[str, list[dict]]:
  return {p.name: read_lines(p) for p in sorted((corpus / "annotations").glob("*.jsonl"))}


def test_records_have_the_layout_of_the_release(corpus, records):
  assert sum(len(lines) for lines in records.values()) == SMALL["rollouts"]
  assert len(records) == len(toy_questions.SOURCES)
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
  lines = records["card_sum.jsonl"]
  asked = [(str(r["image"]), r["question_orig"]) for r in lines]
  assert asked[0::3] == asked[1::3] == asked[2::3]
  assert len(set(asked)) > 0.9 * len(asked) / 3


def test_images_are_as_many_as_asked_for(tmp_path):
  many = toy.draw(tmp_path / "many", rollouts=900, images=300, benchmark_items=15)
  few = toy.draw(tmp_path / "few", rollouts=900, images=100, benchmark_items=15)
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


def read_card(picture: np.ndarray, row: int, column: int) -> tuple[str, bytes] | None:
  """Returns the frame's colour and the pixels of the glyph, or None for an empty cell."""
  cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
  colours = [name for name, rgb in COLOURS.items() if tuple(cell[3, 3]) == rgb]
  return (colours[0], cell[7:21, 7:21].tobytes()) if colours else None


def glyph_pixels(glyph: str) -> bytes:
  data = draw_picture([Card(0, 0, "red", glyph)], 255)
  return read_card(np.array(Image.open(io.BytesIO(data))), 0, 0)[1]


def test_truth_is_what_the_picture_shows(corpus, records):
  digits = {glyph_pixels(str(d)): d for d in range(1, 10)}
  assert len(digits) == 9
  truths = {}
  for line in read_lines(corpus / "truth.jsonl"):
    truths[line["file"], line["line"]] = line["truth"]
  checked = {0: 0, 1: 0}
  for number, record in enumerate(records["card_sum.jsonl"]):
    path = corpus / "images" / record["image"].partition("/")[2]
    picture = np.array(Image.open(path))
    cards = [read_card(picture, r, c) for r in range(SIDE) for c in range(SIDE)]
    shown = {colour: digits[glyph] for colour, glyph in filter(None, cards)}
    seen: dict[str, int] = {}
    steps = [s["step"] for s in record["steps_with_score"]]
    for step, truth in zip(steps, truths["card_sum.jsonl", number], strict=True):
      if found := re.search(r"he (\w+) card shows (\d), total (\d+)\.", step):
        colour, value, total = found[1], int(found[2]), int(found[3])
        seen[colour] = shown[colour]
        assert truth == (value == shown[colour] and total == sum(seen.values()))
        checked[truth] += 1
      elif step.startswith("Final"):
        assert truth == (step == f"Final answer: {sum(seen.values())}")
        assert record["answer"] == str(sum(seen.values()))
  assert min(checked.values()) > 5


def test_totals_never_contradict_the_notes(records):
  """Text alone must not tell a wrong step: what is written adds up, right or wrong."""
  for record in records["card_sum.jsonl"]:
    notes = {}
    for step in record["steps_with_score"][:-1]:
      if found := re.search(r"he (\w+) card shows (\d), total (\d+)\.", step["step"]):
        notes[found[1]] = int(found[2])
        assert int(found[3]) == sum(notes.values())
    assert record["steps_with_score"][-1]["step"] == f"Final answer: {sum(notes.values())}"


def test_same_settings_draw_the_same_bytes_whatever_the_workers(corpus, tmp_path):
  again = toy.draw(tmp_path / "again", **{**SMALL, "workers": 1})
  for path in sorted(corpus.rglob("*")):
    if path.is_file():
      assert (again / path.relative_to(corpus)).read_bytes() == path.read_bytes(), path


def test_another_seed_draws_another_corpus(corpus, tmp_path):
  other = toy.draw(tmp_path / "other", **{**SMALL, "seed": 1})
  file = "annotations/card_sum.jsonl"
  assert (other / file).read_bytes() != (corpus / file).read_bytes()


def test_an_equal_corpus_is_reused_and_another_is_left_alone(corpus):
  before = (corpus / "truth.jsonl").stat().st_mtime_ns
  assert toy.draw(corpus, **SMALL) == corpus
  with pytest.raises(FileExistsError, match="delete it or give another folder"):
    toy.draw(corpus, **{**SMALL, "seed": 1})
  assert (corpus / "truth.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("bad", [{"rollouts": 3}, {"slip": -0.1}, {"n_mc": 0}])
def test_settings_out_of_range_are_named(tmp_path, bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    toy.draw(tmp_path / "bad", **{**SMALL, **bad})
  assert not (tmp_path / "bad").exists()


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


def problems(n: int, things: int = 4) -> toy_policy.Problems:
  rng = np.random.default_rng(0)
  truth = rng.integers(0, 9, (n, things)).astype(np.int8)
  worth = np.tile(np.arange(1, 10), (n, 1))
  return toy_policy.Problems(
    truth, np.full(n, things), np.zeros(n, int), worth, truth, np.full(n, things)
  )


def test_mc_scores_of_right_states_follow_the_slips_that_are_left():
  about, habits = problems(3000), toy_policy.Habits(slip=0.1, lapse=0.05)
  rng = np.random.default_rng(1)
  solutions = toy_policy.solve(rng, about, habits)
  counts = toy_policy.count_successes(rng, about, solutions, habits, 16)
  for thing in range(4):
    right = solutions.right[:, 2 * thing + 1]
    expected = 0.95 * 0.9 ** (3 - thing)  # two slips that cancel add a little
    assert counts[right, 2 * thing + 1].mean() / 16 == pytest.approx(expected, abs=0.015)
  final = solutions.event[:, -1] == toy_policy.FINAL
  assert final.all()
  np.testing.assert_array_equal(counts[:, -1], 16 * solutions.right[:, -1])


def test_without_a_second_look_wrong_states_seldom_succeed_and_with_it_more():
  about = problems(3000)
  rates = []
  for again in (0.0, 0.3):
    habits, rng = toy_policy.Habits(slip=0.1, again=again), np.random.default_rng(2)
    solutions = toy_policy.solve(rng, about, habits)
    counts = toy_policy.count_successes(rng, about, solutions, habits, 16)
    looks = solutions.event == toy_policy.LOOK
    rates.append((counts[looks & ~solutions.right] > 0).mean())
  assert rates[0] < 0.25 < 0.7 < rates[1]


def test_shapes_and_digits_all_look_different():
  glyphs = [*SHAPES, *map(str, range(1, 10)), ""]
  assert len({glyph_pixels(glyph) for glyph in glyphs}) == len(glyphs)
  with pytest.raises(ValueError, match="star"):
    glyph_pixels("heart")
