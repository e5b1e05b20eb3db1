"""The base class of errors that the user can correct: shown as a message without a traceback."""


class UserError(Exception):
  """Invalid input, setting or file; the message names it and the remedy.

  Commands catch this class and OSError only, so any other exception is a bug and keeps its
  traceback.
  """
