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


def split_steps(response: str) -> list[str]:
  """Returns the steps of a response: its paragraphs, or its lines if it is a single paragraph."""
  paragraphs = re.split(r"\n[^\S\n]*\n", response.replace("\r\n", "\n"))
  steps = [part.strip() for part in paragraphs if part.strip()]
  return (
    steps if len(steps) > 1 else [line.strip() for line in response.splitlines() if line.strip()]
  )


def has_placeholder(question: str) -> bool:
  return bool(IMAGE_PLACEHOLDER.search(question))
