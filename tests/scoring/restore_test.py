"""A workdir's tokenizer equals the run's, and is complete or absent."""

import pytest
from etils import epath

from bis_jax.models.internvl import prompt as internvl_prompt
from bis_jax.models.qwen2_5_vl.prompt import QwenPrompt, load_tokenizer, special_tokens
from bis_jax.scoring import restore
from bis_jax.settings import locations
from bis_jax.toy import drawing
from tests.in_memory import encode


@pytest.fixture
def real(shared):
  return load_tokenizer(str(shared / "data/tokenizers/qwen2_5_vl"))


@pytest.fixture
def drawn(small_config):
  where = locations.locate(small_config)
  drawing.draw(where.toy, workers=1, **small_config.corpus.toy)
  return load_tokenizer(where.tokenizer)


def test_internlms_tokenizer_needs_nothing_but_the_workdir(shared, tmp_path):
  tokenizer = internvl_prompt.load_tokenizer(str(shared / "data/tokenizers/internlm2_5"))
  restore.save_tokenizer(tokenizer, epath.Path(tmp_path))
  kept = restore.load_tokenizer(epath.Path(tmp_path), internvl_prompt.load_tokenizer)
  assert len(kept) == len(tokenizer) and kept.ids == tokenizer.ids
  text = ("How many <prm> 三角形?\n\n", ["One  two.", "x = 3 <|im_end|>", "é"])
  one, other = (
    encode(internvl_prompt.InternVLPrompt(t), *text, [4], max_length=500) for t in (tokenizer, kept)
  )
  assert one.tokens.tolist() == other.tokens.tolist() and len(one.markers) == 3


@pytest.mark.parametrize("name", ["drawn", "real"])
def test_what_is_kept_encodes_alike(name, request, tmp_path):
  tokenizer = request.getfixturevalue(name)
  restore.save_tokenizer(tokenizer, epath.Path(tmp_path))
  kept = restore.load_tokenizer(epath.Path(tmp_path), load_tokenizer)
  assert len(kept) == len(tokenizer) and special_tokens(kept) == special_tokens(tokenizer)
  text = ("How many <prm> 三角形?\n\n", ["One  two.", "x = 3 <|im_end|>", "é"])
  one, other = (encode(QwenPrompt(t), *text, [4], max_length=500) for t in (tokenizer, kept))
  assert one.tokens.tolist() == other.tokens.tolist()
  assert one.markers.tolist() == other.markers.tolist() and len(one.markers) == 3


def test_what_was_not_written_to_its_end_is_not_used(drawn, tmp_path):
  folder = epath.Path(tmp_path)
  assert restore.load_tokenizer(folder, load_tokenizer) is None
  restore.save_tokenizer(drawn, folder)
  (folder / "tokenizer" / "tokenizer_config.json").unlink()
  assert restore.load_tokenizer(folder, load_tokenizer) is None
  restore.save_tokenizer(drawn, folder)
  assert len(restore.load_tokenizer(folder, load_tokenizer)) == len(drawn)
