"""The commands of Qwen's five launchers and of FastChat's train_lora.py, and what their flags meant."""

import shlex

FINETUNE_DS = """
    --model_name_or_path {model} \
    --data_path {data} \
    --bf16 True \
    --output_dir output_qwen \
    --num_train_epochs 5 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 1000 \
    --save_total_limit 10 \
    --learning_rate 1e-5 \
    --weight_decay 0.1 \
    --adam_beta2 0.95 \
    --warmup_ratio 0.01 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --report_to "none" \
    --model_max_length 512 \
    --gradient_checkpointing True \
    --lazy_preprocess True \
    --deepspeed finetune/ds_config_zero3.json
"""
FINETUNE_LORA_DS = """
    --model_name_or_path {model} \
    --data_path {data} \
    --bf16 True \
    --output_dir output_qwen \
    --num_train_epochs 5 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 1000 \
    --save_total_limit 10 \
    --learning_rate 3e-4 \
    --weight_decay 0.1 \
    --adam_beta2 0.95 \
    --warmup_ratio 0.01 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --report_to "none" \
    --model_max_length 512 \
    --lazy_preprocess True \
    --use_lora \
    --gradient_checkpointing \
    --deepspeed finetune/ds_config_zero2.json
"""
FINETUNE_LORA_SINGLE_GPU = """
  --model_name_or_path {model} \
  --data_path {data} \
  --bf16 True \
  --output_dir output_qwen \
  --num_train_epochs 5 \
  --per_device_train_batch_size 2 \
  --per_device_eval_batch_size 1 \
  --gradient_accumulation_steps 8 \
  --evaluation_strategy "no" \
  --save_strategy "steps" \
  --save_steps 1000 \
  --save_total_limit 10 \
  --learning_rate 3e-4 \
  --weight_decay 0.1 \
  --adam_beta2 0.95 \
  --warmup_ratio 0.01 \
  --lr_scheduler_type "cosine" \
  --logging_steps 1 \
  --report_to "none" \
  --model_max_length 512 \
  --lazy_preprocess True \
  --gradient_checkpointing \
  --use_lora
"""
FINETUNE_QLORA_DS = """
    --model_name_or_path {model} \
    --data_path {data} \
    --fp16 True \
    --output_dir output_qwen \
    --num_train_epochs 5 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 1000 \
    --save_total_limit 10 \
    --learning_rate 3e-4 \
    --weight_decay 0.1 \
    --adam_beta2 0.95 \
    --warmup_ratio 0.01 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --report_to "none" \
    --model_max_length 512 \
    --lazy_preprocess True \
    --use_lora \
    --q_lora \
    --gradient_checkpointing \
    --deepspeed finetune/ds_config_zero2.json
"""
FINETUNE_QLORA_SINGLE_GPU = """
  --model_name_or_path {model} \
  --data_path {data} \
  --fp16 True \
  --output_dir output_qwen \
  --num_train_epochs 5 \
  --per_device_train_batch_size 2 \
  --per_device_eval_batch_size 1 \
  --gradient_accumulation_steps 8 \
  --evaluation_strategy "no" \
  --save_strategy "steps" \
  --save_steps 1000 \
  --save_total_limit 10 \
  --learning_rate 3e-4 \
  --weight_decay 0.1 \
  --adam_beta2 0.95 \
  --warmup_ratio 0.01 \
  --lr_scheduler_type "cosine" \
  --logging_steps 1 \
  --report_to "none" \
  --model_max_length 512 \
  --lazy_preprocess True \
  --gradient_checkpointing \
  --use_lora \
  --q_lora \
  --deepspeed finetune/ds_config_zero2.json
"""
FASTCHAT_TRAIN_LORA = """
    --model_name_or_path {model}  \
    --lora_r 8 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --data_path {data} \
    --output_dir ./checkpoints \
    --num_train_epochs 150 \
    --fp16 True \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 2 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy "steps" \
    --eval_steps 100  \
    --save_strategy "steps" \
    --save_steps 200 \
    --save_total_limit 2 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_strategy "steps" \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --q_lora False \
    --deepspeed deepspeed_config.json \
    --gradient_checkpointing True \
    --flash_attn False
"""
FASTCHAT_QLORA = """
    --model_name_or_path {model} \
    --lora_r 8 \
    --lora_alpha 16 \
    --lora_dropout 0.05 \
    --data_path {data} \
    --bf16 True \
    --output_dir ./checkpoints \
    --num_train_epochs 3 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 1200 \
    --save_total_limit 100 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --q_lora True \
    --deepspeed playground/deepspeed_config_s2.json
"""

QWEN_FULL = {
    "output_dir": "output_qwen",
    "num_train_epochs": 5,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "eval_strategy": "no",
    "do_eval": False,
    "save_strategy": "steps",
    "save_steps": 1000,
    "save_total_limit": 10,
    "learning_rate": 1e-5,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine",
    "logging_strategy": "steps",
    "logging_steps": 1,
    "report_to": [],
    "model_max_length": 512,
    "gradient_checkpointing": True,
    "lazy_preprocess": True,
    "use_lora": False,
    "q_lora": False,
    "optim": "adamw_torch",
}
QWEN_LORA = QWEN_FULL | {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": 3e-4,
    "use_lora": True,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_bias": "none",
}
QWEN_QLORA = QWEN_LORA | {"q_lora": True}
FASTCHAT_LORA = {
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "output_dir": "./checkpoints",
    "num_train_epochs": 150,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "eval_steps": 100,
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 2,
    "learning_rate": 2e-5,
    "weight_decay": 0,
    "lr_scheduler_type": "cosine",
    "logging_strategy": "steps",
    "logging_steps": 1,
    "model_max_length": 2048,
    "gradient_checkpointing": True,
    "use_lora": True,
    "q_lora": False,
    "optim": "adamw_torch",
    "attn_implementation": "auto",  # --flash_attn False: whatever else there is
}
FASTCHAT_Q = FASTCHAT_LORA | {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "eval_strategy": "no",
    "eval_steps": None,
    "save_steps": 1200,
    "save_total_limit": 100,
    "gradient_checkpointing": None,  # not named there: by memory
    "q_lora": True,
}
COMMANDS = {  # the words of the original, what they set, and {steps of a run: steps of its warm-up}
    "finetune_ds.sh": (FINETUNE_DS, QWEN_FULL, {1000: 10, 150: 2, 1: 1}),
    "finetune_lora_ds.sh": (FINETUNE_LORA_DS, QWEN_LORA, {1000: 10, 150: 2, 1: 1}),
    "finetune_lora_single_gpu.sh": (FINETUNE_LORA_SINGLE_GPU, QWEN_LORA, {1000: 10, 150: 2, 1: 1}),
    "finetune_qlora_ds.sh": (FINETUNE_QLORA_DS, QWEN_QLORA, {1000: 10, 150: 2, 1: 1}),
    "finetune_qlora_single_gpu.sh": (FINETUNE_QLORA_SINGLE_GPU, QWEN_QLORA, {1000: 10, 150: 2, 1: 1}),
    "FastChat train_lora.sh": (FASTCHAT_TRAIN_LORA, FASTCHAT_LORA, {1000: 30, 150: 5, 1: 1}),
    "FastChat QLoRA": (FASTCHAT_QLORA, FASTCHAT_Q, {1000: 30, 150: 5, 1: 1}),
}


def original(name, launched_by_deepspeed=False):
    """The argv of an ancestor's command, as a shell and its launcher hand it over."""
    argv = shlex.split(COMMANDS[name][0].format(model="Qwen/Qwen-7B", data="path_to_data"))
    return ["--local_rank=0", *argv] if launched_by_deepspeed else argv
