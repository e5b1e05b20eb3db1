"""A question and its steps have the same ids through every entry point, also for hostile text."""

import base64
import functools
import json
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bis_jax.corpus.records import parse_rollout
from bis_jax.evaluation import benchmarks, visual_process_bench
from bis_jax.inputs.texts import question_text
from bis_jax.models.internvl import prompt as internvl_prompt
from bis_jax.scoring import server, solution_files
from bis_jax.scoring.benchmark_examples import benchmark_examples
from bis_jax.scoring.solutions import Solution
from tests.in_memory import encode

PARTS = (
  "<prm>", "<image>", "<image1>", "<image 2>", "<image", "1>", "<image <image>", "<|im_end|>",
  "<|image_pad|>", "<IMG_CONTEXT>", "<img>", "</s>", "<tool_call>", " ", "\n", "\r\n", "\r", "\t",
  "\v", "\f", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\u200b", "\ufeff", "\0",
  "e\u0301", "求", "🙂", "x = 3", "Final answer: 7",
)  # fmt: skip
TEXT = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=6).map("".join)
SOLUTIONS = st.lists(
  st.tuples(
    TEXT.filter(lambda text: question_text(text)),
    st.lists(TEXT.filter(str.strip), min_size=1, max_size=4),
  ),
  min_size=8,
  max_size=8,
)


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer_folder, tiny_prompt):
  internvl = internvl_prompt.load_tokenizer(tiny_tokenizer_folder)
  return tiny_prompt, internvl_prompt.InternVLPrompt(internvl)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with one picture."""
  folder = tmp_path_factory.mktemp("ways")
  Image.new("RGB", (28, 28)).save(folder / "a.png")
  return folder


UNLIMITED = types.SimpleNamespace(  # a scorer
  refused=lambda examples: {}, image_patches=lambda encoded: encoded
)


def texts_by_way(folder, solutions):
  """{way: [(question, steps)]} as each entry point passes them to the prompt."""
  picture = (folder / "a.png").read_bytes()
  lines, records, items = [], [], []
  for question, steps in solutions:
    lines.append({"question": question, "steps": steps, "image": "a.png"})
    scored = [{"step": step, "score": 1.0} for step in steps]
    records.append({"image": "a.png", "question_orig": question, "steps_with_score": scored})
    response = {"steps": steps, "process_correctness": [1] * len(steps)}
    items.append(
      {"image": ["a.png"], "question": question, "response": response, "data_source": "MMMU"}
    )
  (folder / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
  (folder / "text").mkdir(exist_ok=True)
  (folder / "text" / "math.json").write_text(
    json.dumps([{"problem": q, "steps": steps, "label": -1} for q, steps in solutions])
  )
  request = {"images": [base64.b64encode(picture).decode()]}
  ways = {
    "annotations": [parse_rollout(record, "a", 0) for record in records],
    "annotations without question_orig": [
      parse_rollout({**record, "question_orig": "", "question": record["question_orig"]}, "a", 0)
      for record in records
    ],
    "benchmark": benchmark_examples(visual_process_bench.load(folder), "multi"),
    "ProcessBench": benchmark_examples(benchmarks.load(str(folder / "text")), "multi"),
    "file": [solution_files.read_line(json.dumps(line).encode(), folder)[1] for line in lines],
    "HTTP": [
      server.read(
        server.parse(
          json.dumps({"question": q, "steps": steps, **request}).encode(), server.Limits()
        ).records,
        UNLIMITED,
        server.Limits(),
      )[0]
      for q, steps in solutions
    ],
    "Python": [Solution.of(q, steps, [picture]) for q, steps in solutions],
  }
  return {name: [(one.question, one.steps) for one in found] for name, found in ways.items()}


# 90 x 8 questions with 1 to 4 steps each: above 2,000 texts, through seven ways and two backbones.
@settings(max_examples=90)
@given(SOLUTIONS)
def test_the_ids_are_the_same_by_every_way(prompts, folder, solutions):
  ways = texts_by_way(folder, solutions)
  for prompt in prompts:
    ids = functools.cache(functools.partial(_ids, prompt))  # most ways give the same text
    want = [ids(q.strip(), tuple(map(str.strip, s))) for q, s in solutions]
    for way, texts in ways.items():
      for wanted, (question, steps) in zip(want, texts, strict=True):
        tokens, markers = ids(question, tuple(steps))
        assert tokens == wanted[0], way
        assert markers == len(steps)


def _ids(prompt, question, steps):
  """Returns the tokens and the number of markers."""
  sample = encode(prompt, question, steps, [4], max_length=9999)
  return sample.tokens.tolist(), len(sample.markers)


def test_outer_white_space_and_placeholders_are_no_text(prompts):
  for prompt in prompts:
    plain = encode(prompt, "How many?", ["One.", "Two."], [4], max_length=999)
    padded = encode(
      prompt, "<image 1>\n How <image>many? ", [" One.\n", "\u3000Two.\r\n"], [4], max_length=999
    )
    assert padded.tokens.tolist() == plain.tokens.tolist()
