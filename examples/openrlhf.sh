#!/usr/bin/env bash
# RL by OpenRLHF with step rewards: the reward is the least certain step of a response.
#
#   python -m bis_jax.serve --checkpoint=runs/qwen_bis10 --host=0.0.0.0 --port=8000   # on the reward host
#   REWARD=http://reward-host:8000 DATA=train.jsonl examples/openrlhf.sh              # on the trainers
#
# OpenRLHF sends texts and the label, but no images. So a line of DATA holds them in its label as well,
# as base64 or data: URIs:
#   {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find x."}]}],
#    "images": ["/path/to/image.png"],
#    "label": "{\"answer\": \"3\", \"images\": [\"data:image/png;base64,...\"]}"}
# The flags are those of OpenRLHF of August 2026; it retries a request 5 times.
set -euo pipefail

REWARD=${REWARD:-http://localhost:8000}
AGGREGATE=${AGGREGATE:-min}  # or product, last, mean
MODEL=${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct}
DATA=${DATA:?name the JSON lines of prompts with DATA=FILE}
OUT=${OUT:-checkpoints/openrlhf}

curl --fail --silent --show-error "$REWARD/healthz" >/dev/null

python3 -m openrlhf.cli.train_ppo_ray \
  --reward.remote_url "$REWARD/get_reward?aggregate=$AGGREGATE" \
  --actor.model_name_or_path "$MODEL" \
  --actor.num_nodes 1 --actor.num_gpus_per_node 4 \
  --ref.num_nodes 1 --ref.num_gpus_per_node 4 \
  --vllm.num_engines 4 --vllm.tensor_parallel_size 1 \
  --train.colocate_all --vllm.gpu_memory_utilization 0.7 \
  --vllm.sync_backend nccl --vllm.enable_sleep --ds.enable_sleep \
  --algo.advantage.estimator reinforce_baseline \
  --algo.kl.use_loss --algo.kl.estimator k2 --algo.kl.init_coef 1e-3 \
  --rollout.n_samples_per_prompt 8 --rollout.batch_size 128 --rollout.max_new_tokens 2048 \
  --train.batch_size 1024 --train.micro_batch_size 1 --rollout.micro_batch_size 1 \
  --data.prompt_dataset "$DATA" --data.input_key prompt --data.label_key label \
  --data.image_key images --data.max_images_per_prompt 1 \
  --data.apply_chat_template --data.max_len 4096 \
  --actor.freeze_visual_encoder --actor.gradient_checkpointing_enable --actor.adam.lr 1e-6 \
  --ds.zero_stage 3 --ds.param_dtype bf16 \
  --ckpt.output_dir "$OUT" --ckpt.path "$OUT/ckpt" --ckpt.save_hf "$@"
