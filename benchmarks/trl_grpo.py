"""Trains a tiny random model for two steps by TRL's GRPO with our scoring server's rewards.

  /path/to/trl/bin/python -m benchmarks.trl_grpo http://localhost:8000 FOLDER

In an environment of its own with `pip install trl aiohttp pillow`; `bis_jax` is not imported. Prints each
step's logs as a JSON line. The test of it runs where TRL_PYTHON names that environment's Python:
`TRL_PYTHON=... pytest tests/rl_examples_test.py`.
"""

import json
import sys
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from examples.trl_reward import step_reward

TEMPLATE = (
  "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
  """Returns a tokenizer of single bytes with Qwen's special tokens."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    additional_special_tokens=["<|im_start|>"],
    chat_template=TEMPLATE,
  )


def main(url: str, folder: str) -> None:
  torch.manual_seed(0)
  tokenizer = tiny_tokenizer()
  config = Qwen2Config(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
  )
  seconds = []
  reward = step_reward(url, "mean")

  async def prm_reward(**call):
    start = time.perf_counter()
    rewards = await reward(**call)
    seconds.append(time.perf_counter() - start)
    return rewards

  rows = [
    {"prompt": [{"role": "user", "content": f"{i} + 1?"}], "question": f"{i} + 1?"}
    for i in range(8)
  ]
  trainer = GRPOTrainer(
    model=Qwen2ForCausalLM(config),
    processing_class=tokenizer,
    reward_funcs=prm_reward,
    train_dataset=Dataset.from_list(rows),
    args=GRPOConfig(
      output_dir=folder,
      per_device_train_batch_size=8,
      num_generations=4,
      max_completion_length=24,
      max_steps=2,
      logging_steps=1,
      save_strategy="no",
      report_to=[],
      use_cpu=True,
      disable_tqdm=True,
    ),
  )
  before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
  trainer.train()
  changed = any(
    not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)
  )
  assert changed, "no parameter has changed"
  for log in trainer.state.log_history:
    if "reward" in log:
      print(json.dumps({key: log[key] for key in ("step", "reward", "reward_std", "loss")}))
  print(f"seconds in the reward: {sum(seconds):.2f} in {len(seconds)} calls", file=sys.stderr)


if __name__ == "__main__":
  main(*sys.argv[1:])
