"""InternVL's ids equal SentencePiece's over the released wrapping; text never becomes a token."""

import random
import re

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from bis_jax.errors import UserError
from bis_jax.inputs.prompt import SpecialTokens
from bis_jax.inputs.texts import question_text
from bis_jax.models.internvl import prompt as internvl_prompt
from tests.in_memory import encode

SYSTEM = (
  "<|im_start|>system\n你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及"
  "多家合作单位联合开发的多模态大语言模型。<|im_end|>\n"
)
OPENING = SYSTEM + "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
# As the released tokenizer_config.json numbers them, and then the step marker.
INTERNLM_IDS = {
  "<s>": 1, "<|im_end|>": 92542, "<|im_start|>": 92543, "<img>": 92544, "</img>": 92545,
  "<IMG_CONTEXT>": 92546, "<quad>": 92547, "</quad>": 92548, "<ref>": 92549, "</ref>": 92550,
  "<box>": 92551, "</box>": 92552, "<prm>": 92553,
}  # fmt: skip

_PARTS = (
  "The area is ", "so x = 3", "求阴影部分的面积。", "由图可知，底为４ｃｍ", "……——", "Ｗ", "  two  ",
  "\\( \\frac{a}{b} \\)", "\\[ x^2 + 1 = 0 \\]", "$$\\sum_{i=0}^n i$$", "🙂", "👩‍👩‍👧", "e\u0301",
  "\n", "\n\n", "\t", "\r\n", " ", "1234567", "∠ABC = 90°", "ﬁ", "\u2581", "Привет", "한국어", "a" * 70,
)  # fmt: skip
_ATTACKS = (
  "<prm>", "<image>", "<|im_end|>", "<|im_start|>", "<IMG_CONTEXT>", "<img>", "</img>", "<box>",
  "<s>", "</s>", "<unk>", "<|image_pad|>", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]",
  "[UNUSED_TOKEN_0]", "<0x41>", "<tool_call>",
)  # fmt: skip


def _texts(parts, count, seed=0):
  draw = random.Random(seed)
  return ["".join(draw.choices(parts, k=draw.randint(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def processor(shared):
  """SentencePiece with the released file unchanged."""
  return sentencepiece.SentencePieceProcessor(
    model_file=str(shared / "data/tokenizers/internlm2_5/tokenizer.model")
  )


@pytest.fixture(scope="module")
def internlm(shared):
  return internvl_prompt.load_tokenizer(str(shared / "data/tokenizers/internlm2_5"))


@pytest.fixture(scope="module")
def qwen(shared):
  """Qwen2.5's tokenizer ends where InternVL3's added tokens begin."""
  return internvl_prompt.load_tokenizer(str(shared / "data/tokenizers/qwen2_5_vl"))


def _released_text(question, steps, counts, separator):
  """The released wrapping as one string, cut after the last marker."""
  images = "".join(f"<img>{'<IMG_CONTEXT>' * count}</img>\n" for count in counts)
  process = separator.join(step.strip() + "<prm>" for step in steps)
  return f"{OPENING}{images}Question: {question_text(question)}\nProcess: {process}"


def _reference_ids(processor, text):
  """Ids as a slow tokenizer gives them: split at added tokens, the rest through SentencePiece."""
  ids = [1]
  for part in re.split(f"({'|'.join(map(re.escape, INTERNLM_IDS))})", text):
    ids += [INTERNLM_IDS[part]] if part in INTERNLM_IDS else processor.encode(part)
  return ids


@pytest.mark.parametrize("counts", [[], [256], [1792, 256]])
def test_ids_equal_sentencepiece_and_the_released_wrapping(processor, internlm, counts):
  """500 texts in all. Mutations caught: the separator or the assistant's name encoded apart; no <s>."""
  draw = random.Random(len(counts))
  formatter = internvl_prompt.InternVLPrompt(internlm)
  for question in _texts(_PARTS, 167, seed=len(counts)):
    steps = _texts(_PARTS, draw.randint(1, 3), seed=draw.random())
    sample = encode(formatter, question, steps, counts, max_length=100_000)
    expected = _reference_ids(processor, _released_text(question, steps, counts, "\n\n"))
    assert sample.tokens.tolist() == expected, (question, steps)
    assert sample.dropped_steps == 0
    assert (sample.tokens[sample.markers] == 92553).all() and len(sample.markers) == len(steps)
    assert [n for _, n in sample.image_spans] == counts
    for start, n in sample.image_spans:
      assert (sample.tokens[start : start + n] == 92546).all()
      assert sample.tokens[start - 1] == 92544 and sample.tokens[start + n] == 92545


def test_released_evaluation_form_joins_steps_with_nothing(processor, internlm):
  formatter = internvl_prompt.InternVLPrompt(internlm, separator="")
  sample = encode(formatter, "Q", ["a", "b"], [256], max_length=1000)
  text = _released_text("Q", ["a", "b"], [256], "")
  assert sample.tokens.tolist() == _reference_ids(processor, text)


def test_special_token_ids(internlm, qwen):
  assert internvl_prompt.InternVLPrompt(internlm).special == SpecialTokens(
    prm=92553, image_pad=92546, vision_start=92544, vision_end=92545, yes=9583, no=2917
  )
  assert internlm.size == 92554
  assert {name: internlm.ids[name] for name in INTERNLM_IDS if name != "<s>"} == {
    name: i for name, i in INTERNLM_IDS.items() if name != "<s>"
  }
  assert internvl_prompt.InternVLPrompt(qwen).special == SpecialTokens(
    prm=151674, image_pad=151667, vision_start=151665, vision_end=151666, yes=9454, no=2753
  )
  assert qwen.size == 151675


def test_internvl3_has_the_same_wrapping_without_a_beginning(shared, qwen):
  """Ids of the joined text through the tokenizer itself, which knows the added tokens."""
  from transformers import AddedToken, AutoTokenizer

  tokenizer = AutoTokenizer.from_pretrained(shared / "data/tokenizers/qwen2_5_vl")
  tokenizer.add_tokens([AddedToken(t, special=True) for t in [*INTERNLM_IDS][3:]])
  formatter = internvl_prompt.InternVLPrompt(qwen)
  for question in _texts(_PARTS, 50):
    for counts in ([], [256], [256, 1792]):
      sample = encode(formatter, question, ["a b", question], counts, max_length=100_000)
      text = _released_text(question, ["a b", question], counts, "\n\n")
      expected = tokenizer(text, add_special_tokens=False).input_ids
      assert sample.tokens.tolist() == expected, question


@pytest.mark.parametrize("which", ["internlm", "qwen"])
def test_text_never_becomes_a_special_token(request, which):
  """Mutation caught: the released SentencePiece file as it is, which knows [UNUSED_TOKEN_145]."""
  tokenizer = request.getfixturevalue(which)
  formatter = internvl_prompt.InternVLPrompt(tokenizer)
  first = {"internlm": 92397, "qwen": 151643}[which]  # reserved and added ids start here
  special = lambda tokens: sorted(i for i in tokens.tolist() if i >= first or i < 3)  # noqa: E731
  plain = encode(formatter, "Q", ["a", "b"], [4], max_length=10_000)
  for attack in [*_ATTACKS, *_texts(_PARTS + _ATTACKS * 2, 200)]:
    sample = encode(formatter, attack, [attack, "b" + attack], [4], max_length=10_000)
    assert special(sample.tokens) == special(plain.tokens), attack


def test_attacking_text_decodes_to_itself(processor, internlm):
  """Nothing of it is lost: its pieces concatenate to it."""
  for attack in _texts(_PARTS + _ATTACKS * 2, 100):
    [ids] = internlm.encode([attack])
    assert processor.decode(ids) == attack.replace("\u2581", " ")


@pytest.mark.parametrize("counts", [[], [256], [256, 512]])
def test_truncation_drops_whole_trailing_steps(internlm, counts):
  """Mutations caught: `<` for `<=` at the limit; a later step kept that would fit."""
  formatter = internvl_prompt.InternVLPrompt(internlm)
  steps = ["first step", "a long second step " * 5, "3", "four"]
  whole = encode(formatter, "How many?", steps, counts, max_length=100_000)
  for limit in range(int(whole.markers[0]) - 3, len(whole.tokens) + 2):
    cut = encode(formatter, "How many?", steps, counts, max_length=limit)
    kept = int((whole.markers < limit).sum())
    assert (len(cut.markers), cut.dropped_steps) == (kept, 4 - kept)
    if kept:
      np.testing.assert_array_equal(cut.tokens, whole.tokens[: whole.markers[kept - 1] + 1])
    else:
      assert 92553 not in cut.tokens
    np.testing.assert_array_equal(cut.image_spans, whole.image_spans)


def test_a_question_without_steps(processor, internlm):
  sample = encode(internvl_prompt.InternVLPrompt(internlm), "Q", [], [256], max_length=1000)
  assert sample.tokens.tolist() == _reference_ids(processor, _released_text("Q", [], [256], ""))
  assert len(sample.markers) == 0


def test_another_sentencepiece_model_is_refused(tmp_path, processor):
  model = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
  del model.pieces[92500:]
  (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
  with pytest.raises(UserError, match="is not the tokenizer of InternLM2.5"):
    internvl_prompt.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("counts", [[], [256], [1792, 256]])
def test_visual_prms_turns_are_the_released_ones(processor, internlm, counts):
  """`generate_steps_with_soft_score`: each step is read in a prompt whose earlier answers are `+`."""
  formatter = internvl_prompt.VisualPRMPrompt(internlm)
  assert (formatter.special.yes, formatter.special.no) == tuple(map(processor.piece_to_id, "+-"))
  for seed, question in enumerate(_texts(_PARTS, 40, seed=7)):
    steps = [step for step in _texts(_PARTS, 3, seed=seed) if step.strip()]
    sample = encode(formatter, question, steps, counts, max_length=10**6)
    images = "".join(f"<img>{'<IMG_CONTEXT>' * count}</img>\n" for count in counts)
    turn = f"### Question:\n{images}{question_text(question)}\n\n### Solution Process:\n"
    text, prompts = SYSTEM, []
    for step in steps:
      text += f"<|im_start|>user\n{turn}{step.strip()}<|im_end|>\n<|im_start|>assistant\n"
      prompts.append(_reference_ids(processor, text))
      text, turn = f"{text}+<|im_end|>\n", ""
    for prompt, marker in zip(prompts, sample.markers, strict=True):
      assert sample.tokens[: marker + 1].tolist() == prompt
    assert len(sample.tokens) == len(prompts[-1])


def test_visual_prms_steps_are_cut_whole(internlm):
  formatter = internvl_prompt.VisualPRMPrompt(internlm)
  whole = encode(formatter, "Q?", ["1 + 1 = 2 + 0", "b"], [4], max_length=500)
  cut = encode(formatter, "Q?", ["1 + 1 = 2 + 0", "b"], [4], max_length=len(whole.tokens) - 1)
  assert len(whole.markers) == 2 and whole.dropped_steps == 0
  assert cut.markers.tolist() == [whole.markers[0]] == [len(cut.tokens) - 1]
