"""Every command names the damaged file and the place in it, in one sentence without a traceback."""

import json
import os
import pathlib
import re
import zipfile

import pytest
from PIL import Image

from bis_jax import files
from bis_jax.scoring import solution_files
from bis_jax.scoring.solutions import SolutionError
from bis_jax.settings import keys
from tests.commands import run_command

ITEM = {
  "image": ["a.png"],
  "question": "Add.",
  "response": {"steps": ["one", "two"], "process_correctness": [1, -1]},
  "data_source": "MMMU",
}
TEXT_ITEM = {"problem": "Add.", "steps": ["one", "two"], "label": 1}
MEASURES = {"threshold": 0.5, "overall_source_weighted": 0.5}
FILES = {
  "visual/test.jsonl": ITEM,
  "text/math.json": [TEXT_ITEM],
  "scores.jsonl": {"index": 0, "scores": [0.7, 0.2]},
  "held_out.jsonl": {"scores": [0.6], "labels": [1], "data_source": "a"},
  "candidates.jsonl": {"id": 1, "candidates": [{"scores": [1], "correct": True}]},
  "solutions.jsonl": {"id": 1, "question": "q", "steps": ["s"]},
  "run/evaluation.json": {"thresholds": {"tuned_on_test": MEASURES}},
  "run/manifest.json": {},
  "run/metrics.jsonl": {"step": 1},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with a valid file of every kind that commands read."""
  monkeypatch.chdir(tmp_path)
  for name, content in FILES.items():
    path = pathlib.Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content) + "\n")
  config = keys.nest({key: setting.default for key, setting in keys.all_settings().items()})
  pathlib.Path("run/config.json").write_text(config.to_json())
  Image.new("RGB", (28, 28)).save("visual/a.png")
  return tmp_path


VISUAL = ["evaluate", "--benchmark=visual", "--scores=scores.jsonl", "--out=out.json"]
TEXT = ["evaluate", "--benchmark=text", "--scores=scores.jsonl", "--out=out.json"]
BEST_OF_N = ["evaluate", "--candidates=candidates.jsonl", "--out=out.json"]
CHECKPOINT = ["evaluate", "--benchmark=text", "--checkpoint=run", "--out=out.json"]
SCORE = ["score", "--checkpoint=run", "--input=solutions.jsonl", "--output=out.jsonl"]
SERVE = ["serve", "--checkpoint=run", "--port=18765"]
EXPORT = ["export", "--workdir=run", "--out=out"]
REPORT = ["report", "run", "--out=out", "--benchmark=text"]

# Of any file that holds JSON.
DAMAGE = {
  "cut": b'{"a": ',
  "empty": b"\0",
  "deep": b"[" * 100_000,
  "latin_1": b'{"a": "\xe9"}',
  "surrogate": b'{"a": "\\ud800"}',
  "long_number": b'{"a": ' + b"9" * 5000 + b"}",
  "list": b"[[]]",
  "number": b"1e999",
  "null": b"null",
}
READERS = {
  "visual/test.jsonl": [VISUAL],
  "text/math.json": [TEXT, CHECKPOINT],
  "scores.jsonl": [VISUAL],
  "held_out.jsonl": [[*VISUAL, "--held_out=held_out.jsonl"]],
  "baseline.jsonl": [[*VISUAL, "--baseline=baseline.jsonl"]],
  "candidates.jsonl": [BEST_OF_N],
  "run/config.json": [CHECKPOINT, SCORE, SERVE, EXPORT, REPORT],
  "run/evaluation.json": [REPORT],
  "run/scores.jsonl": [REPORT],
}


def refusal(*command):
  message = run_command(*command)
  assert isinstance(message, str), message
  assert message.startswith(f"{command[0]}: ") and "Traceback" not in message
  assert not {"out.json", "out.jsonl"} & set(os.listdir())
  return message


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named(folder, name, damage):
  pathlib.Path(name).write_bytes(DAMAGE[damage] + b"\n")
  place = f"{re.escape(name)}( line 1\\b|:|/? )|{pathlib.Path(name).name} item 0"
  if name.endswith("test.jsonl"):
    place = r"test.jsonl: 1 bad items; correct them:\n  line 1 \(item 0\)"
  for command in READERS[name]:
    message = refusal(*command)
    assert re.search(place, message), message
    assert len(message) < 1000


SCORES = '{"index": 0, "scores": '
CANDIDATE = '{"id": 1, "candidates": [{"correct": true, "scores": '


@pytest.mark.parametrize(
  ("command", "name", "content", "reason"),
  [
    (VISUAL, "scores.jsonl", SCORES + "[NaN, 0]}", r"line 1: .*NaN|line 1: Expected"),
    (VISUAL, "scores.jsonl", SCORES + "[1e999, 0]}", "line 1: Expected `float` <= 1"),
    (VISUAL, "scores.jsonl", SCORES + '["1", 0]}', "line 1: Expected `float`, got `str`"),
    (VISUAL, "scores.jsonl", SCORES + "[1]}", "line 1: item 0 has 2 steps but 1 scores"),
    (VISUAL, "scores.jsonl", '{"index": -1, "scores": []}', "line 1: `index` is -1"),
    (VISUAL, "scores.jsonl", '{"index": 1e30, "scores": []}', "line 1: Expected `int`"),
    (VISUAL, "scores.jsonl", '{"index": true, "scores": []}', "line 1: Expected `int`"),
    (VISUAL, "scores.jsonl", "", "has no scores for 1 of 1 items"),
    (BEST_OF_N, "candidates.jsonl", CANDIDATE + "[NaN]}]}", r"line 1: "),
    (BEST_OF_N, "candidates.jsonl", CANDIDATE + "[2]}]}", "line 1: Expected `float` <= 1"),
    (BEST_OF_N, "candidates.jsonl", '{"id": 1, "candidates": []}', "holds no candidate"),
    (BEST_OF_N, "candidates.jsonl", "", "holds no candidate"),
    (
      BEST_OF_N,
      "candidates.jsonl",
      (CANDIDATE + "[1]}]}\n") * 2,
      "line 2: question 1 is on an earlier line",
    ),
    (TEXT, "text/math.json", "[]", "holds no item"),
    (TEXT, "text/math.json", '[{"problem": "a", "steps": [], "label": -1}]', "item 0: Expected"),
    (TEXT, "text/math.json", '[{"problem": "a", "steps": ["b"], "label": 1}]', "item 0: `label`"),
    (TEXT, "text/math.json", '[{"problem": "\\udc00", "steps": ["b"], "label": -1}]', "surrogate"),
    (
      VISUAL,
      "visual/test.jsonl",
      json.dumps(ITEM | {"image": ["../scores.jsonl"]}),
      "line 1 .*out",
    ),
    (VISUAL, "visual/test.jsonl", json.dumps(ITEM | {"image": ["\0"]}), "line 1 .*outside"),
    (VISUAL, "visual/test.jsonl", json.dumps(ITEM | {"image": ["x" * 9999]}), "line 1 .*missing"),
    (VISUAL, "visual/test.jsonl", json.dumps(ITEM | {"image": ["test.jsonl"]}), "can't be opened"),
    (
      VISUAL,
      "visual/test.jsonl",
      json.dumps(ITEM | {"image": [], "question": "<image>?"}),
      "line 1 .*placeholder",
    ),
    (REPORT, "run/config.json", "{}", "config.json is damaged"),
    (SCORE, "run/config.json", "{}", "config.json: seed is 'missing'"),
    (SERVE, "run/config.json", '{"seed": -5}', "config.json: seed is -5; it must be >= 0"),
    (EXPORT, "run/config.json", "{}", "config.json: seed is 'missing'"),
    (REPORT, "run/evaluation.json", '{"thresholds": {}}', "evaluation.json has no tuned_on_test"),
    (
      REPORT,
      "run/evaluation.json",
      '{"thresholds": {"tuned_on_test": {"overall_source_weighted": "x"}}}',
      "evaluation.json has no tuned_on_test",
    ),
  ],
)
def test_a_value_out_of_range_is_named(folder, command, name, content, reason):
  pathlib.Path(name).write_text(content + "\n" if content else "")
  message = refusal(*command)
  assert name.split("/")[0] in message and re.search(reason, message), message


@pytest.mark.parametrize(
  ("command", "flag"),
  [
    (VISUAL, "out"),
    ([*VISUAL, "--page=x"], "page"),
    ([*BEST_OF_N, "--plot=x"], "plot"),
    ([*CHECKPOINT, "--save_scores=x"], "save_scores"),
    (SCORE, "output"),
    (EXPORT, "out"),
    (REPORT, "out"),
    (["select", "--annotations=visual", "--out=x"], "out"),
    (["prepare", "--annotations=visual", "--images=visual", "--out=x"], "out"),
  ],
)
def test_an_output_below_a_file_is_refused_before_any_work(folder, command, flag):
  pathlib.Path("scores.jsonl").write_text("not read")
  message = refusal(*command, f"--{flag}=text/math.json/new/out")
  assert (
    f"--{flag}=" in message
    and "math.json is not a folder that can be written to: name another" in message
  )


@pytest.mark.parametrize("command", [CHECKPOINT, SCORE, SERVE, EXPORT, REPORT])
@pytest.mark.parametrize("workdir", ["file", "none", "no_folder"])
def test_what_is_no_workdir_is_named(folder, command, workdir):
  pathlib.Path("file").write_text("")
  command = [re.sub(r"\brun$", workdir, argument) for argument in command]
  assert f"{workdir} holds no config.json" in refusal(*command)


def test_a_damaged_tokenizer_is_named(folder):
  pathlib.Path("run/tokenizer").mkdir()
  for name in ("tokenizer.json", "tokenizer_config.json"):
    pathlib.Path("run/tokenizer", name).write_text("{")
  for command in (SCORE, SERVE, EXPORT, CHECKPOINT):
    assert "run/tokenizer' can't be loaded" in refusal(*command)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_solution_is_an_error_of_its_line(folder, damage):
  identity, error = solution_files.read_line(damage, folder)
  assert identity is None and isinstance(error, SolutionError)


def test_the_damaged_note_of_an_output_is_named(folder):
  note = pathlib.Path("out.jsonl.model.json")
  for damage in DAMAGE.values():
    note.write_bytes(damage)
    with pytest.raises(solution_files.OutputError, match="out.jsonl.model.json is damaged"):
      solution_files._name_model(pathlib.Path("out.jsonl"), "run step 1", fresh=False)


@pytest.mark.parametrize("command", [VISUAL, BEST_OF_N])
def test_a_folder_for_an_output_file_is_refused(folder, command):
  assert "--out=run is a folder: name a file" in refusal(*command, "--out=run")


READ = {name: commands[0] for name, commands in READERS.items()} | {
  "visual/test.jsonl": VISUAL,
  "solutions.jsonl": SCORE,
}


@pytest.mark.parametrize("name", READ)
def test_a_file_of_3_gb_is_not_read_whole(folder, monkeypatch, name):
  """Mutation caught: what a folder holds is known by all of its config.json, however long."""
  parse = files.parse_json

  def parse_short(raw):
    assert len(raw) <= 1 << 20
    return parse(raw)

  monkeypatch.setattr(files, "MAX_JSON", 1 << 20)
  monkeypatch.setattr(files, "parse_json", parse_short)
  with open(name, "wb") as file:
    file.truncate(3 << 30)
  message = refusal(*READ[name])
  assert pathlib.Path(name).name in message and "more than 1,048,576 bytes" in message


def archive(kind):
  """Writes visual/images.zip instead of the image."""
  picture = pathlib.Path("visual/a.png").read_bytes()
  pathlib.Path("visual/a.png").unlink()
  methods = {"lzma": zipfile.ZIP_LZMA, "bzip2": zipfile.ZIP_BZIP2, "deflate": zipfile.ZIP_DEFLATED}
  with zipfile.ZipFile("visual/images.zip", "w") as root:
    root.writestr("a.png", picture * 9, methods.get(kind))
  data = bytearray(pathlib.Path("visual/images.zip").read_bytes())
  entry = data.rindex(b"PK\1\2")  # of the central directory
  if kind == "encrypted":
    data[6] |= 1
    data[entry + 8] |= 1
  elif kind == "deflate64":
    data[8], data[entry + 10] = 9, 9
  elif kind == "version":
    data[entry + 6] = 255
  elif kind == "cut":
    del data[entry:]
  elif kind == "name":
    data[entry + 46] = 0xFF
    data[entry + 9] |= 8  # UTF-8
  else:
    data[50:60] = b"\xff" * 10
  pathlib.Path("visual/images.zip").write_bytes(data)


@pytest.mark.parametrize(
  "kind",
  ["lzma", "bzip2", "deflate", "stored", "encrypted", "deflate64", "version", "cut", "name"],
)
def test_a_damaged_archive_of_images_is_named(folder, kind):
  archive(kind)
  assert re.search(r"a\.png|images\.zip", refusal(*VISUAL))


@pytest.mark.parametrize("depth", [400, 600, 900, 950, 980, 990])
def test_a_deep_id_of_a_solution_is_refused(folder, depth):
  """Mutation caught: an id that can be read but not written ends in a RecursionError."""
  line = b'{"id": ' + b"[" * depth + b"]" * depth + b', "question": "q", "steps": ["s"]}'
  identity, _ = solution_files.read_line(line, folder)
  assert (identity is None) == (depth > 500)
  json.dumps({"id": identity})


def test_an_image_of_3_gb_is_not_read(folder):
  with open("visual/a.png", "r+b") as file:
    file.truncate(3 << 30)
  assert "a.png: more than" in refusal(*VISUAL)
