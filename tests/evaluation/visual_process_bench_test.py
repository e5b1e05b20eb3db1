"""Loads VisualProcessBench's layout: valid items, rejected items, and image names."""

import io
import json
import os
import pickle
import shutil

import pytest
from PIL import Image

from bis_jax.evaluation import visual_process_bench
from bis_jax.evaluation.json_records import EvaluationError


def test_items_are_read_as_they_stand(benchmark):
  items = visual_process_bench.load(benchmark)
  assert [item.index for item in items] == list(range(10))
  second = items[2]
  assert second.question == "What is in picture 2?"
  assert second.steps == tuple(f"step {j} of 2" for j in range(4))
  assert second.labels == (1, -1, 1, 0)
  assert (second.data_source, second.policy_model, second.answer) == (
    "MathVerse_VO",
    "model-0",
    "2",
  )
  assert [image.name for image in second.images] == ["2_0.png", "2_1.png"]
  assert second.image_sizes == ((30, 40), (30, 50))


@pytest.mark.parametrize(
  ("question", "cleaned"),
  [
    ("<image1> left, <image2> right", "left,  right"),
    ("<image>\nWhat?", "What?"),
    ("is 2 <image12>3?", "is 2 3?"),
    ("keep <imagery>, not <image 1>", "keep <imagery>, not"),
    ("<image1>", ""),
  ],
)
def test_placeholders_leave_the_question(
  tmp_path, write_benchmark, benchmark_record, question, cleaned
):
  write_benchmark(tmp_path, [benchmark_record(0) | {"question": question}])
  assert visual_process_bench.load(tmp_path)[0].question == cleaned


FAULTS = {
  "steps_and_labels": ({"process_correctness": [1]}, "2 steps but 1 labels"),
  "label_value": (
    {"process_correctness": [1, 2]},
    "Expected `int` <= 1 - at `$.response.process_correctness[1]`",
  ),
  "label_type": (
    {"process_correctness": [1, True]},
    "got `bool` - at `$.response.process_correctness[1]`",
  ),
  "no_steps": ({"steps": [], "process_correctness": []}, "length >= 1 - at `$.response.steps`"),
  "step_type": ({"steps": ["a", 3]}, "got `int` - at `$.response.steps[1]`"),
  "no_labels": ({"process_correctness": None}, "got `null` - at `$.response.process_correctness`"),
  "no_response": ({"response": "text"}, "Expected `object`, got `str` - at `$.response`"),
  "no_image": ({"image": []}, "its question has an image placeholder, but it has no `image`"),
  "image_type": ({"image": "images/0_0.png"}, "got `str` - at `$.image`"),
  "image_gone": ({"image": ["images/gone.png"]}, "missing_image: 'images/gone.png'"),
  "image_is_text": ({"image": ["images/text.png"]}, "'text.png' can't be opened"),
  "image_above": ({"image": ["../outside.png"]}, "image_outside_root: "),
  "image_absolute": ({"image": ["/etc/hostname"]}, "image_outside_root: "),
  "image_linked": ({"image": ["images/link.png"]}, "image_outside_root: "),
  "question_type": ({"question": None}, "got `null` - at `$.question`"),
  "source_type": ({"data_source": 3}, "got `int` - at `$.data_source`"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_line_and_item(
  tmp_path, write_benchmark, benchmark_record, fault
):
  changes, message = FAULTS[fault]
  bad = benchmark_record(0)
  for key, value in changes.items():
    (bad["response"] if key in bad["response"] else bad)[key] = value
  Image.new("RGB", (5, 5)).save(tmp_path / "outside.png")
  folder = write_benchmark(tmp_path / "benchmark", [benchmark_record(0), bad, benchmark_record(1)])
  (folder / "images/text.png").write_text("text")
  os.symlink(tmp_path / "outside.png", folder / "images/link.png")
  with pytest.raises(EvaluationError, match="1 bad items") as error:
    visual_process_bench.load(folder)
  assert "line 2 (item 1): " in str(error.value)
  assert message in str(error.value)


def test_all_faults_are_told_at_once_and_blank_lines_count_only_as_lines(
  tmp_path, write_benchmark, benchmark_record
):
  write_benchmark(tmp_path, [benchmark_record(0)])
  lines = ["", json.dumps(benchmark_record(0)), "{", "[1]", "", json.dumps({})]
  (tmp_path / "test.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff{}")
  with pytest.raises(EvaluationError) as error:
    visual_process_bench.load(tmp_path)
  told = [line.split(": ")[0].strip() for line in str(error.value).splitlines()[1:]]
  assert told == ["line 3 (item 1)", "line 4 (item 2)", "line 6 (item 3)", "line 7 (item 4)"]


def test_an_empty_or_missing_benchmark_says_what_is_wanted(tmp_path):
  with pytest.raises(FileNotFoundError, match="no test.jsonl in .*give the folder"):
    visual_process_bench.load(tmp_path)
  (tmp_path / "test.jsonl").write_text("\n\n")
  with pytest.raises(EvaluationError, match="holds no item"):
    visual_process_bench.load(tmp_path)


def test_images_may_lie_in_a_root_of_their_own_or_in_a_zip(
  tmp_path, write_benchmark, benchmark_record
):
  record = benchmark_record(0) | {"image": ["0_0.png", "images/0_1.png"]}
  folder = write_benchmark(tmp_path / "benchmark", [record])
  (item,) = visual_process_bench.load(folder)
  encoded = visual_process_bench.encoded_images(item)
  for root in ("folder", "zip"):
    if root == "zip":
      shutil.make_archive(folder / "images", "zip", folder, "images")
      shutil.rmtree(folder / "images")
    (found,) = visual_process_bench.load(folder)
    assert visual_process_bench.encoded_images(found) == encoded
    assert found.image_sizes == item.image_sizes
  (folder / "images.zip").rename(tmp_path / "elsewhere.zip")
  (found,) = visual_process_bench.load(folder, image_root=tmp_path / "elsewhere.zip")
  assert visual_process_bench.encoded_images(pickle.loads(pickle.dumps(found))) == encoded


def test_several_images_are_separate_first_or_on_one_canvas(benchmark):
  one, two = visual_process_bench.load(benchmark)[1:3]
  files = tuple(image.read() for image in two.images)
  assert visual_process_bench.encoded_images(two) == files
  assert visual_process_bench.encoded_images(two, "first") == files[:1]
  (sheet,) = visual_process_bench.encoded_images(two, "canvas")
  assert sheet == visual_process_bench.canvas(files)
  for mode in ("multi", "first", "canvas"):
    (only,) = visual_process_bench.encoded_images(one, mode)
    assert only == one.images[0].read()
    for item in (one, two):
      shown = []
      for encoded in visual_process_bench.encoded_images(item, mode):
        image = Image.open(io.BytesIO(encoded))
        shown.append((image.height, image.width))
      assert visual_process_bench.shown_sizes(item, mode) == shown
  with pytest.raises(ValueError, match="one of multi, canvas, first"):
    visual_process_bench.encoded_images(one, "mosaic")


def test_damaged_images_are_listed_by_item(benchmark):
  items = visual_process_bench.load(benchmark)
  visual_process_bench.check_images(items)
  for name in ("2_1.png", "7_0.png"):
    data = (benchmark / "images" / name).read_bytes()
    (benchmark / "images" / name).write_bytes(data[:-30])
  (benchmark / "images/4_0.png").unlink()
  with pytest.raises(EvaluationError, match="(?s)3 bad items.*item 2: .*item 4: .*item 7: "):
    visual_process_bench.check_images(items)


def test_a_canvas_has_three_columns_and_centred_images_on_white():
  sizes = [(10, 4), (6, 8), (2, 2), (10, 8)]  # width, height
  colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9)]
  encoded = []
  for size, colour in zip(sizes, colours, strict=True):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    encoded.append(file.getvalue())
  sheet = Image.open(io.BytesIO(visual_process_bench.canvas(encoded)))
  assert sheet.size == (30, 16)
  want = Image.new("RGB", (30, 16), "white")
  for box, colour in zip(
    [(0, 2, 10, 6), (12, 0, 18, 8), (24, 3, 26, 5), (0, 8, 10, 16)], colours, strict=True
  ):
    want.paste(colour, box)
  assert list(sheet.get_flattened_data()) == list(want.get_flattened_data())


def test_sizes_are_those_after_exif_rotation(tmp_path, write_benchmark, benchmark_record):
  folder = write_benchmark(tmp_path, [benchmark_record(0) | {"image": ["turned.jpg"] * 2}])
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.new("RGB", (40, 30)).save(folder / "images/turned.jpg", exif=exif)
  (item,) = visual_process_bench.load(folder)
  assert item.image_sizes == ((40, 30), (40, 30))
  assert visual_process_bench.shown_sizes(item, "canvas") == [(40, 60)]
  sheet = Image.open(io.BytesIO(visual_process_bench.encoded_images(item, "canvas")[0]))
  assert (sheet.height, sheet.width) == (40, 60)
