"""The text of a question and of a step, whichever file, request or call it came from."""

import re

IMAGE_PLACEHOLDER = re.compile(r"<image(?: ?\d+)?>")


def question_text(question: str) -> str:
  """Returns the question without `<image>`, `<image1>`, `<image 1>`, ... and outer white space."""
  shorter = IMAGE_PLACEHOLDER.sub("", question)
  while shorter != question:  # until none is left, so that applying it twice changes nothing
    question, shorter = shorter, IMAGE_PLACEHOLDER.sub("", shorter)
  return question.strip()


def step_text(step: str) -> str:
  return step.strip()


def has_placeholder(question: str) -> bool:
  return bool(IMAGE_PLACEHOLDER.search(question))
