"""Export: plain Transformers reads the folder, and loading it again is bit-equal."""

import dataclasses
import functools
import io
import json
import os
import sys

import jax
import numpy as np
import pytest
import torch
from etils import epath
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration

from benchmarks import export_transformers
from bis_jax.evaluation import visual_process_bench
from bis_jax.export import export_run
from bis_jax.hub import hf_folder, weights
from bis_jax.hub.card import model_card
from bis_jax.hub.hf_folder import hugging_face_config
from bis_jax.models import backbones, param_tree
from bis_jax.models.processor import make_processor
from bis_jax.parallel import sharding
from bis_jax.scoring import solutions, step_scorer
from bis_jax.scoring.solutions import Solution
from bis_jax.settings import locations, workdir
from bis_jax.toy import drawing
from bis_jax.training import checkpoint
from bis_jax.training.train_state import TrainState


@pytest.fixture(scope="module")
def processor(small_config):
  where = locations.locate(small_config)
  drawing.draw(where.toy, workers=1, **small_config.corpus.toy)
  return make_processor(small_config, where.tokenizer)


@pytest.fixture(scope="module")
def config(small_config, processor):
  return backbones.model_config(small_config, len(processor.tokenizer))


@pytest.fixture(scope="module")
def model(config, processor):
  """(graph, params) of the smallest model, changed so that its scores of steps differ.

  Markers have no embedding of their own: their states are all that they read from their context.
  """
  graph, params = param_tree.split(backbones.build(config, 0))
  rng = np.random.default_rng(0)
  embedding = rng.normal(size=(config.text.vocab_size, config.text.hidden_size))
  embedding[processor.prompt.special.prm] = 0
  params["language_model.embed_tokens.embedding"] = jax.numpy.asarray(embedding, "float32")
  return graph, params


def _shapes(config) -> dict[str, jax.ShapeDtypeStruct]:
  _, shapes = param_tree.split(nnx.eval_shape(lambda: backbones.build(config, 0)))
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return {p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one) for p, s in shapes.items()}


def _load(folder, config, processor):
  """Loads as training does; a marker that was never trained would become a mean."""
  special = processor.prompt.special
  return weights.load(
    folder,
    config,
    _shapes(config),
    yes_token=special.yes,
    no_token=special.no,
    marker_token=special.prm,
  )


MANIFEST = {"strategy": "bis", "fraction": 0.1, "scope": "per_source", "alpha": 0.2}
MANIFEST |= {"none_positive": 1.0, "seed": 0, "rollouts": 4800, "digest": "abc123"}


@pytest.fixture(scope="module")
def card(small_config, processor):
  block = {"threshold": 0.5, "overall_source_weighted": 0.8123, "roc_auc": None}
  return model_card(
    run=json.loads(small_config.to_json()),
    processor=processor,
    manifest=MANIFEST,
    evaluation={"thresholds": {"fixed_0.5": block}},
    step=12,
    other_rows="zero",
  )


@pytest.fixture(scope="module")
def folder(config, model, processor, card, tmp_path_factory):
  out = tmp_path_factory.mktemp("exported") / "folder"
  hf_folder.write(out, model[1], config, processor, base=None, dtype="float32", card=card)
  return out


def test_transformers_loads_it_whole(folder):
  model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
    folder, dtype="auto", output_loading_info=True
  )
  assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert model.dtype == torch.float32
  assert not model.config.tie_word_embeddings


@pytest.fixture(scope="module")
def scorer(small_config, model, processor):
  inputs = small_config.inputs.copy_and_resolve_references()
  inputs.row_patches = 512  # room for two larger images
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  return step_scorer.Scorer(processor, inputs, mesh, *model, batch_rows=8)


def test_the_cards_example_gives_our_scores(small_config, scorer, folder):
  """At most 1e-4 on the step probabilities, float32; the example runs as the card prints it."""
  items = visual_process_bench.load(locations.locate(small_config).benchmark)[:6]
  example = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
  differences, spread = [], []
  for item in items:
    [picture] = visual_process_bench.encoded_images(item, "first")
    [ours] = solutions.score(scorer, [Solution.of(item.question, item.steps, [picture])])
    image = folder.parent / "image.png"
    image.write_bytes(picture)
    names = {"folder": folder, "image": image, "question": item.question, "steps": item.steps}
    exec(example, names)
    theirs = names["scores"].numpy()
    differences.append(np.abs(ours - theirs).max())
    spread += theirs.tolist()
  print(f"\nlargest difference of a step probability: {max(differences):.1e}")
  assert max(differences) < 1e-4
  assert np.std(spread) > 0.01


@pytest.mark.parametrize("sizes", [((300, 420), (80, 250)), ((130, 500), (500, 130)), ()])
def test_several_images_and_none_give_transformers_scores(scorer, processor, folder, sizes):
  """The whole path from encoded images through our packed rows against Transformers' own."""
  rng = np.random.default_rng(0)
  pictures = []
  for height, width in sizes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(file, "PNG")
    pictures.append(file.getvalue())
  question, steps = "How many red circles are there?", ("Count them.", "Three.", "Final answer: 3")
  [ours] = solutions.score(scorer, [Solution.of(question, steps, pictures)])

  arrays = {}
  if pictures:
    image_processor = AutoImageProcessor.from_pretrained(folder)
    arrays = image_processor([Image.open(io.BytesIO(p)) for p in pictures], return_tensors="pt")
  content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": f"Question: {question}"}]
  process = "Process: " + "\n\n".join(step + "<prm>" for step in steps)
  messages = [{"role": "user", "content": content}, {"role": "assistant", "content": process}]
  first, *rest = processor.tokenizer.apply_chat_template(messages, tokenize=False).split(
    "<|image_pad|>"
  )
  counts = [int(grid.prod() // 4) for grid in arrays.get("image_grid_thw", ())]
  text = first + "".join("<|image_pad|>" * n + r for n, r in zip(counts, rest, strict=True))
  ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
  special = processor.prompt.special
  reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
  with torch.no_grad():
    logits = reference(
      input_ids=ids, mm_token_type_ids=(ids == special.image_pad).int(), **arrays
    ).logits[0, ids[0] == special.prm]
  theirs = logits[:, [special.yes, special.no]].softmax(dim=-1)[:, 0].numpy()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=export_transformers.RECIPES)
def exported(request, processor, small_config, tmp_path_factory):
  tokenizer = locations.locate(small_config).tokenizer
  out = tmp_path_factory.mktemp("card") / "out"
  return export_transformers.export(request.param, tokenizer, out)


@pytest.mark.parametrize("transformers", ["this", "4.57.6"])
def test_the_card_scores_every_image_as_we_do(exported, transformers, tmp_path, monkeypatch):
  """EXIF, transparency, grey, pixel limits, several images, hostile text, and a padded batch."""
  drawn = export_transformers.draw_solutions(tmp_path)
  if transformers == "this":
    run = functools.partial(in_this_process, monkeypatch, tmp_path)
  else:
    python = os.environ.get("TRANSFORMERS_4_PYTHON")
    if not python:
      pytest.skip("set TRANSFORMERS_4_PYTHON to a Python with Transformers 4.57.6 and torch")
    monkeypatch.setenv("PYTHONPATH", "")  # see tests/conftest.py: it needs torch
    run = functools.partial(export_transformers.their_scores, python)
  theirs = run(exported.folder, drawn)
  found = export_transformers.differences(exported.our_scores(drawn), theirs)
  assert max(found.values()) < export_transformers.TOLERANCE, found
  assert transformers in ("this", theirs["transformers"])


def in_this_process(monkeypatch, place, folder, drawn):
  (place / "in.json").write_text(json.dumps(drawn))
  monkeypatch.setattr(sys, "argv", ["", str(folder), str(place / "in.json"), str(place / "out")])
  exec(export_transformers.PROGRAM, {})
  return json.loads((place / "out").read_text())


def test_the_files_have_what_transformers_4_reads(exported):
  """4.57 reads neither `rope_parameters`, nor lists of extra tokens, nor pixel limits in `size`."""
  config, tokenizer, images = (
    json.loads((exported.folder / f"{name}.json").read_text())
    for name in ("config", "tokenizer_config", "preprocessor_config")
  )
  assert not isinstance(tokenizer.get("extra_special_tokens"), list)
  assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert config["transformers_version"]  # without it, a warning that the tokenizer is wrong
  text = config["text_config"]
  assert text["rope_theta"] == (5e6 if config["model_type"] == "qwen3_vl" else 1e6)
  if config["model_type"] == "qwen2_5_vl":
    sections = text["rope_parameters"]["mrope_section"]
    assert text["rope_scaling"] == {"type": "mrope", "mrope_section": sections}
    limits = {"shortest_edge": images["min_pixels"], "longest_edge": images["max_pixels"]}
    assert images["size"] == limits


def test_out_and_in_again_is_bit_equal(config, model, processor, folder):
  again = _load(folder, config, processor)
  assert again.keys() == model[1].keys()
  for path, value in model[1].items():
    np.testing.assert_array_equal(np.asarray(again[path]), np.asarray(value), err_msg=path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_in_and_out_is_bit_equal(tmp_path, config, processor, tied):
  """A bfloat16 hub checkpoint comes out tensor for tensor; a tied one gains its LM head."""
  config = dataclasses.replace(config, tie_word_embeddings=tied)
  base = tmp_path / "base"
  content = hugging_face_config(config, processor, "bfloat16") | {"tie_word_embeddings": tied}
  torch.manual_seed(0)
  torch_config = Qwen2_5_VLForConditionalGeneration.config_class(**content)
  Qwen2_5_VLForConditionalGeneration(torch_config).to(torch.bfloat16).save_pretrained(base)
  out = tmp_path / "out"
  params = _load(base, config, processor)
  hf_folder.write(out, params, config, processor, base=base, dtype="bfloat16", card="")
  before = load_file(base / "model.safetensors")
  after = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
  head = after["lm_head.weight"] if not tied else after.pop("lm_head.weight")
  assert before.keys() == after.keys()
  for key, value in before.items():
    assert value.dtype == after[key].dtype == torch.bfloat16
    assert torch.equal(value, after[key]), key
  assert torch.equal(head, before["lm_head.weight" if not tied else "model.embed_tokens.weight"])


def test_sharded_parameters_and_small_files_give_the_same_tensors(
  config, model, processor, folder, tmp_path
):
  """Eight devices, and one file per tensor."""
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
  params = {
    path: jax.device_put(
      value,
      NamedSharding(mesh, PartitionSpec(*[None] * (value.ndim - 1), "fsdp"))
      if value.shape[-1] % 8 == 0
      else NamedSharding(mesh, PartitionSpec()),
    )
    for path, value in model[1].items()
  }
  special = processor.prompt.special
  weights.save(
    tmp_path,
    params,
    config,
    yes_token=special.yes,
    no_token=special.no,
    base=None,
    dtype="float32",
    max_file_bytes=50_000,
  )
  files = sorted(tmp_path.glob("*.safetensors"))
  assert len(files) > 10
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert set(index["weight_map"].values()) == {file.name for file in files}
  ours = {key: value for file in files for key, value in load_file(file).items()}
  assert index["metadata"]["total_size"] == sum(v.numel() * 4 for v in ours.values())
  expected = load_file(next(folder.glob("*.safetensors")))
  assert ours.keys() == expected.keys()
  assert all(torch.equal(ours[key], value) for key, value in expected.items())


def test_nothing_is_written_over(config, model, processor, folder):
  with pytest.raises(FileExistsError, match="name a new or an empty folder"):
    hf_folder.write(folder, model[1], config, processor, base=None, dtype="float32", card="")


def test_a_damaged_base_is_named(config, model, processor, tmp_path):
  base = tmp_path / "base"
  base.mkdir()
  with pytest.raises(weights.WeightsError, match="missing file: config.json"):
    hugging_face_config(config, processor, "float32", base)
  (base / "config.json").write_text(json.dumps(config.to_hugging_face()))
  save_file({"lm_head.weight": torch.zeros(4, 4)}, base / "model.safetensors")
  with pytest.raises(weights.WeightsError, match=r"lm_head.weight of .* is \(4, 4\)"):
    hf_folder.write(
      tmp_path / "out", model[1], config, processor, base=base, dtype="float32", card=""
    )
  assert not (tmp_path / "out").exists()


def test_the_card_tells_recipe_digest_and_evaluation(card):
  assert (
    "bis, fraction 0.1 of each source, alpha 0.2, R = 1 without a positive step, seed 0: 4,800 rollouts"
  ) in card
  assert "| manifest digest | `abc123` |" in card
  assert "| labels | correct if the MC score is above 0 |" in card
  assert "| fixed_0.5 (0.5000) | 81.23 |  |  |  |  |" in card


def test_the_command_exports_a_workdir(small_config, model, folder, tmp_path, capsys):
  """The latest checkpoint of a run, with its recipe, manifest digest and evaluation on the card."""
  place = epath.Path(tmp_path / "run")
  workdir.claim(place, small_config)
  with checkpoint.Checkpoints(place, every=1, keep=1) as checkpoints:
    checkpoints.save(7, TrainState(jax.numpy.int32(7), model[1], {}), {})
  (place / "manifest.json").write_text(json.dumps(MANIFEST))
  out = tmp_path / "out"
  export_run(str(place), out, "float32", None)
  assert "wrote step 7" in capsys.readouterr().out
  assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # the umask's
  card = (out / "README.md").read_text()
  assert "abc123" in card and "7 steps" in card and "This run was not evaluated." in card
  [ours], [expected] = ([*at.glob("*.safetensors")] for at in (out, folder))
  assert ours.read_bytes() == expected.read_bytes()
  with pytest.raises(FileExistsError):
    export_run(str(place), out, "float32", None)


def test_a_tokenizer_that_is_gone_is_named(small_config, tmp_path):
  config = small_config.copy_and_resolve_references()
  with config.unlocked():
    config.inputs.tokenizer = str(tmp_path / "gone")
  workdir.claim(epath.Path(tmp_path / "run"), config)
  with pytest.raises(FileNotFoundError, match=r"tokenizer '.*gone' can't be loaded: put it back"):
    export_run(str(tmp_path / "run"), tmp_path / "out", "float32", None)
