"""A model's scores are the same from Python, from a file and after a kill."""

import base64
import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from PIL import Image

from bis_jax.errors import UserError
from bis_jax.evaluation import visual_process_bench
from bis_jax.models import backbones
from bis_jax.models.param_tree import split
from bis_jax.models.processor import make_processor
from bis_jax.models.qwen2_5_vl.prompt import load_tokenizer, special_tokens
from bis_jax.parallel import sharding
from bis_jax.scoring import server, solution_files, solutions, step_scorer
from bis_jax.scoring.solutions import Solution, SolutionError
from bis_jax.settings import locations, workdir
from bis_jax.toy import drawing
from bis_jax.training import checkpoint, train_state
from bis_jax.training.train_state import TrainState
from tests.commands import run_command

pytestmark = pytest.mark.usefixtures("programs_once")

STEP = 3


@pytest.fixture(scope="module")
def place(small_config, tmp_path_factory):
  """A workdir with a checkpoint of the untrained tiny model at step 3."""
  config = small_config
  where = locations.locate(config)
  drawing.draw(where.toy, workers=1, **config.corpus.toy)
  folder = epath.Path(tmp_path_factory.mktemp("scoring") / "run")
  workdir.claim(folder, config)
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = load_tokenizer(where.tokenizer)
  model = backbones.model_config(config, len(tokenizer))
  _, shapes = backbones.structure(model, mesh)
  params = train_state.first_params(model, shapes, None, special_tokens(tokenizer), config.seed)
  # A head that tells steps apart, so that equal scores mean something.
  head = params["reward_head.kernel"]
  drawn = np.random.default_rng(0).normal(size=head.shape) / np.sqrt(head.shape[0])
  params["reward_head.kernel"] = jax.device_put(drawn.astype(head.dtype), head.sharding)
  with checkpoint.Checkpoints(folder, every=1, keep=1) as checkpoints:
    checkpoints.save(STEP, TrainState(jnp.int32(STEP), params, {"m": jnp.zeros(2)}), {})
  return folder


@pytest.fixture(scope="module")
def scorer(place):
  return step_scorer.load(str(place))


@pytest.fixture(scope="module")
def folder(small_config):
  """The folder of the toy benchmark, where its images are."""
  return locations.locate(small_config).benchmark


@pytest.fixture(scope="module")
def some(folder):
  """Twenty solutions, some with two images, one without."""
  items = visual_process_bench.load(folder)
  read = [Solution.of(i.question, i.steps, visual_process_bench.encoded_images(i)) for i in items]
  return [*read[:19], Solution.of("Add 1 and 2.", ["1 + 2 = 3.", "Final answer: 3"])]


def assert_close(one, other):
  for a, b in zip(one, other, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def scorer_with(place, config, devices=None, batch_rows=8):
  """A scorer of the same checkpoint on other devices and with other batches."""
  mesh = sharding.make_mesh(1 if devices else -1, 1, 1, devices)
  where = locations.locate(config)
  processor = make_processor(config, where.tokenizer)
  model = backbones.model_config(config, len(processor.tokenizer))
  graph, shapes = split(nnx.eval_shape(lambda: backbones.build(model, 0)))
  places = sharding.parameter_shardings(mesh, backbones.sharding(model), shapes)
  like = {
    path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=places[path])
    for path, shape in shapes.items()
  }
  step, params = checkpoint.restore_params(place, like, {})
  assert step == STEP
  inputs = config.inputs
  return step_scorer.Scorer(processor, inputs, mesh, graph, params, batch_rows=batch_rows)


def test_scores_tell_steps_apart_and_lie_in_zero_to_one(scorer, some):
  scores = solutions.score(scorer, some)
  assert [len(s) for s in scores] == [len(solution.steps) for solution in some]
  together = np.concatenate(scores)
  assert together.dtype == np.float32 and (together > 0).all() and (together < 1).all()
  assert together.std() > 0.01


def test_scores_do_not_depend_on_how_they_are_asked(place, small_config, scorer, some):
  """Packed on 8 devices, against one device: one at a time, in batches of 8 rows, shuffled."""
  packed = solutions.score(scorer, some)
  one_device = scorer_with(place, small_config, jax.devices()[:1], batch_rows=8)
  assert_close(
    packed, [solutions.score(one_device, [solution])[0] for solution in some[:6]] + packed[6:]
  )
  assert_close(packed, solutions.score(one_device, some))
  order = np.random.default_rng(0).permutation(len(some))
  shuffled = solutions.score(scorer, [some[i] for i in order])
  assert_close([packed[i] for i in order], shuffled)


def test_solutions_of_a_question_share_its_prefix(place, small_config, some, caplog):
  """Best of 6 to 20, mixed and with one that is too long, against every solution alone."""
  shared = scorer_with(place, small_config, jax.devices()[:1])
  steps = [step for solution in some for step in solution.steps]
  asked = [
    dataclasses.replace(some[k], steps=tuple(steps[(7 * i + j) % 40] for j in range(1 + i % 4)))
    for k, count in enumerate((20, 6, 9))
    for i in range(count)
  ]
  asked.insert(5, dataclasses.replace(some[0], steps=("Add one to it. ",) * 99))
  order = np.random.default_rng(0).permutation(len(asked))
  scores = solutions.score(shared, [asked[i] for i in order])
  assert shared._layouts and shared._layouts[0].streams[0] > 1
  alone = scorer_with(place, small_config)
  alone._fixed = True
  wanted = solutions.score(alone, asked)
  assert not alone._layouts and isinstance(wanted[5], SolutionError)
  for at, i in enumerate(order):
    if i == 5:
      assert str(scores[at]) == str(wanted[5])
    else:
      np.testing.assert_allclose(scores[at], wanted[i], rtol=0, atol=1e-5)


def test_few_sizes_of_batches_hold_any_number_of_rows(place, small_config):
  one_device = scorer_with(place, small_config, jax.devices()[:1], batch_rows=8)
  assert one_device.batch_rows(13) == [8, 4, 1] and one_device.batch_rows(15) == [8, 8]
  eight_devices = scorer_with(place, small_config, batch_rows=16)
  assert eight_devices.batch_rows(13) == [16] and eight_devices.batch_rows(1) == [8]
  for rows in range(1, 40):
    batches = one_device.batch_rows(rows)
    assert batches == sorted(batches, reverse=True)
    assert 0 <= sum(batches) - rows <= batches[-1] / 4


def test_scores_depend_on_the_images_and_on_earlier_steps_alone(scorer, some):
  whole = solutions.score(scorer, some[:1])[0]
  shorter = dataclasses.replace(some[0], steps=some[0].steps[:2])
  blind = Solution.of(some[0].question, some[0].steps)
  first, unseen = solutions.score(scorer, [shorter, blind])
  np.testing.assert_allclose(first, whole[:2], atol=1e-5)
  assert np.abs(unseen - whole).max() > 1e-3


def test_what_is_too_long_is_refused_alone(scorer, small_config, some):
  limit = small_config.inputs.max_length
  long = Solution.of("Add.", ["one two three four."] * limit)
  wordy = Solution.of("Add. " * limit, ["one"])
  scores = solutions.score(scorer, [some[0], long, wordy, some[1]])
  assert "steps fit into" in str(scores[1]) and isinstance(scores[1], SolutionError)
  assert "only 0 of 1 steps" in str(scores[2])
  assert_close([scores[0], scores[3]], solutions.score(scorer, some[:2]))
  assert all(isinstance(s, SolutionError) for s in solutions.score(scorer, [long, wordy]))


def test_rows_grow_with_the_largest_solution(place, scorer, some):
  """Mutation caught: "256 patch slots, a row holds 128", with no remedy."""
  small = step_scorer.load(str(place), row_patches=64, row_markers=3)
  assert_close(solutions.score(small, some[:4]), solutions.score(scorer, some[:4]))
  fixed = step_scorer.load(str(place), adapt_rows=False, row_markers=1)
  assert "3 step markers, a row holds 1: raise row_markers" in str(
    solutions.score(fixed, some[:1])[0]
  )


@pytest.mark.parametrize("wrong", [{"row_patches": 100}, {"row_tokens": 1}, {"max_length": -5}])
def test_settings_out_of_range_are_refused_before_the_run_is_loaded(wrong):
  """Mutation caught: every request to a server with --row_patches=100 gets a 500."""
  with pytest.raises(UserError, match="it must be"):
    step_scorer.load("nowhere", **wrong)


def test_a_place_without_a_checkpoint_is_named(tmp_path, place):
  with pytest.raises(workdir.WorkdirError, match="holds no config.json"):
    step_scorer.load(str(tmp_path))
  shutil.copy(place / "config.json", tmp_path)
  with pytest.raises(workdir.WorkdirError, match="holds no checkpoint yet"):
    step_scorer.load(str(tmp_path))


@pytest.fixture
def source(folder, tmp_path, scorer, monkeypatch):
  """(input file, image root): ten good lines, and a bad one after every second.

  The checkpoint is loaded and compiled once for all tests that score a file.
  """
  monkeypatch.setattr(step_scorer, "load", lambda checkpoint, **_: scorer)
  items = visual_process_bench.load(folder)[:10]
  bad = [
    b"{",
    b"",
    b"[]",
    json.dumps({"id": "gone", "question": "q", "steps": ["s"], "image": "gone.png"}).encode(),
    json.dumps(
      {"id": "out", "question": "q", "steps": ["s"], "image": ["../digest.json"]}
    ).encode(),
  ]
  lines = []
  for item in items:
    names = ["images/" + image.name for image in item.images]
    record = {
      "id": item.index,
      "image": names if len(names) > 1 else names[0],
      "question": item.question,
      "steps": item.steps,
    }
    lines.append(json.dumps(record).encode())
    if item.index % 2:
      lines.append(bad[item.index // 2])
  (tmp_path / "solutions.jsonl").write_bytes(b"\n".join(lines) + b"\n")
  return tmp_path / "solutions.jsonl", folder


def outcome(target):
  return [json.loads(line) for line in target.read_text().splitlines()]


def test_a_file_is_scored_line_for_line_and_bad_lines_say_why(
  place, scorer, source, tmp_path, some
):
  target = tmp_path / "out/scores.jsonl"
  solution_files.score_file(str(place), source[0], target, source[1], chunk=4)
  lines = outcome(target)
  assert [line["id"] for line in lines] == [
    0, 1, None, 2, 3, None, 4, 5, None, 6, 7, "gone", 8, 9, "out",
  ]  # fmt: skip
  errors = [line["error"] for line in lines if "error" in line]
  reasons = (
    "not valid JSON",
    "not valid JSON",
    "Expected `object`, got `array`",
    "'gone.png' is not",
    "is not below",
  )
  assert len(errors) == 5
  for error, reason in zip(errors, reasons, strict=True):
    assert reason in error
  assert_close(
    [line["scores"] for line in lines if "scores" in line], solutions.score(scorer, some[:10])
  )


def test_a_killed_run_goes_on_behind_its_last_whole_line(place, source, tmp_path):
  whole, target = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
  solution_files.score_file(str(place), source[0], whole, source[1], chunk=4)
  lines = whole.read_bytes().splitlines(keepends=True)
  target.write_bytes(b"".join(lines[:5]) + lines[5][:9])
  note = tmp_path / "cut.jsonl.model.json"
  shutil.copy(tmp_path / "whole.jsonl.model.json", note)
  scored = solution_files.score_file(str(place), source[0], target, source[1], chunk=4)
  assert scored == (15, 10, 4)
  for got, want in zip(outcome(target), outcome(whole), strict=True):
    assert got.keys() == want.keys() and got["id"] == want["id"]
    assert_close([got.get("scores", [])], [want.get("scores", [])])
  scored = solution_files.score_file(str(place), source[0], target, source[1], chunk=4)
  assert scored == (15, 0, 0)

  target.write_bytes(b"".join(lines[:5]))
  note.write_text('{"checkpoint": "another step 9"}')
  with pytest.raises(
    solution_files.OutputError, match="holds scores of another step 9, not of .* step 3"
  ):
    solution_files.score_file(str(place), source[0], target, source[1], chunk=4)
  target.write_bytes(b"".join(lines[1:3]))
  with pytest.raises(solution_files.OutputError, match="line 1 has another id"):
    solution_files.score_file(str(place), source[0], target, source[1], chunk=4)
  target.write_bytes(b"".join(lines * 2))
  with pytest.raises(solution_files.OutputError, match="more lines than"):
    solution_files.score_file(str(place), source[0], target, source[1], chunk=4)
  assert target.read_bytes() == b"".join(lines * 2)


@pytest.mark.parametrize(
  ("question", "steps", "images", "message"),
  [
    (None, ["a"], [], "`question` must be a string"),
    ("q", "abc", [], "`steps` must be a list"),
    ("q", ["a", 1], [], "`steps` must be a list of strings"),
    ("q", [], [], "at least one step"),
    ("q \ud800", ["a"], [], "not Unicode"),
    ("<image 1> q", ["a"], [], "there is no image"),
    ("q", ["a"], [b"text"], "image 0: broken"),
  ],
)
def test_what_is_no_solution_is_refused(question, steps, images, message):
  with pytest.raises(SolutionError, match=message):
    Solution.of(question, steps, images)


def test_the_keys_of_a_solution_are_the_same_everywhere(tmp_path, scorer):
  """Mutation caught: `images` in a file is not read, so the answer is scored blind."""
  Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
  picture = (tmp_path / "a.png").read_bytes()
  want = Solution.of("<image>\n<image1> How many?", ["a"], [picture])
  assert want.question == "How many?" and want.images == (picture,)
  assert Solution.of("How many?", ["a"], picture) == want
  assert Solution.of("How many?", ["a"], image=[picture]) == want
  encoded = base64.b64encode(picture).decode()
  for images in ({"image": "x"}, {"image": ["x"]}, {"images": "x"}, {"images": ["x"]}):
    record = json.dumps({"id": 3, "question": "How many?", "steps": ["a"], **images})
    line = record.replace('"x"', '"a.png"').encode()
    assert solution_files.read_line(line, tmp_path) == (3, want)
    request = record.replace('"x"', f'"{encoded}"').encode()
    [asked] = server.parse(request, server.Limits()).records
    [read] = server.read([asked], scorer, server.Limits())
    assert asked.id == 3 and read == dataclasses.replace(want, images=read.images)
    assert_close(solutions.score(scorer, [read]), solutions.score(scorer, [want]))


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ({"pictures": ["a.png"]}, "unknown key `pictures`; the nearest known key is"),
    ({"Images": ["a.png"]}, "unknown key `Images`; the nearest known key is `images`"),
    ({"image": "a.png", "images": ["a.png"]}, "two names of one key"),
    ({"image": [3]}, "got `int`"),
    ({"question": "<image>"}, "there is no image"),
    ({"question": "a \ud800"}, "half of a surrogate pair"),
    ({"id": float("nan")}, "`id` must be JSON"),
  ],
)
def test_nothing_in_a_line_is_ignored(tmp_path, more, message):
  line = json.dumps({"id": 3, "question": "q", "steps": ["a"], **more}).encode()
  identity, error = solution_files.read_line(line, tmp_path)
  assert isinstance(error, SolutionError) and message in str(error)
  assert json.dumps({"id": identity}, allow_nan=False)


@pytest.mark.parametrize("command", ["score", "serve"])
def test_a_command_without_a_run_says_what_it_wants(tmp_path, command):
  flags = [f"--checkpoint={tmp_path}"]
  if command == "score":
    (tmp_path / "in.jsonl").write_text("{}\n")
    flags += [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
  assert run_command(command, *flags).startswith(f"{command}: {tmp_path} holds no config.json")
  assert not (tmp_path / "out.jsonl").exists()


def test_serve_without_its_extra_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  monkeypatch.delitem(sys.modules, "bis_jax.scoring.http_protocol", raising=False)
  monkeypatch.delattr("bis_jax.scoring.http_protocol", raising=False)
  message = run_command("serve", f"--checkpoint={tmp_path}")
  assert message == "serve: uvicorn is not installed; run: pip install 'bis_jax[serve]'"
