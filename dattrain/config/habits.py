"""Keys by the names that other tools have for them, and by their last part alone. What cannot be found here is unknown. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

KEYS = {
    "optim.lr": "learning_rate base_lr blr lr0 max_lr",
    "optim.weight_decay": "wd decay",
    "optim.betas": "opt_betas adam_betas",
    "optim.eps": "opt_eps adam_epsilon",
    "optim.clip": "clip_grad grad_clip max_grad_norm gradient_clip_val clip_norm",
    "optim.layer_decay": "layer_lr_decay llrd",
    "optim.freeze_backbone": "freeze linear_probe",
    "schedule.epochs": "epoch max_epochs num_epochs num_train_epochs n_epochs",
    "schedule.kind": "sched scheduler lr_scheduler lr_scheduler_type",
    "schedule.warmup_epochs": "warmup warmup_steps warmup_ratio",
    "schedule.min_lr": "lr_min final_lr lrf",
    "train.global_batch": "batch_size batch bs total_batch_size global_batch_size train_batch_size per_device_train_batch_size",
    "train.micro_batch": "micro_batch_size mbs batch_per_gpu batch_size_per_gpu accumulate grad_accum accum_iter grad_accum_steps gradient_accumulation_steps accumulate_grad_batches",
    "train.precision": "amp fp16 bf16 half dtype mixed_precision amp_dtype",
    "train.ema_decay": "ema model_ema model_ema_decay",
    "train.max_steps": "max_iters max_iter steps total_steps",
    "train.log_every": "log_interval print_freq log_every_n_steps logging_steps",
    "train.activation_checkpointing": "grad_checkpointing gradient_checkpointing use_checkpoint checkpointing",
    "train.compile": "torchcompile torch_compile",
    "checkpoint.every_epochs": "save_freq save_period save_every ckpt_freq checkpoint_freq",
    "checkpoint.every_steps": "save_steps save_interval",
    "checkpoint.keep_last": "save_total_limit checkpoint_hist keep",
    "checkpoint.metric": "eval_metric monitor metric_for_best_model",
    "eval.every_epochs": "eval_freq val_interval eval_steps check_val_every_n_epoch",
    "eval.batch": "eval_batch_size val_batch_size validation_batch_size per_device_eval_batch_size",
    "eval.crop_pct": "crop_ratio",
    "model.name": "model arch architecture model_name backbone",
    "model.img_size": "imgsz image_size input_size size resolution",
    "model.num_classes": "nc classes nb_classes n_classes",
    "model.drop_path": "drop_path_rate stochastic_depth",
    "data.train": "data data_dir data_path dataset train_dir train_data traindir root",
    "data.val": "val_dir val_data valdir val_split validation_data",
    "data.workers": "num_workers nw dataloader_num_workers",
    "init.from": "pretrained weights finetune initial_checkpoint init_from pretrain load_from pretrained_path",
    "augment.randaugment": "aa auto_augment",
    "augment.erase_prob": "reprob random_erasing",
    "augment.mixup": "mixup_alpha",
    "augment.cutmix": "cutmix_alpha",
    "augment.label_smoothing": "smoothing",
    "zero.stage": "zero_stage deepspeed_stage",
}
"""Key to the other names of what it sets, or of what follows from it."""
_NAMES = {name.replace("_", ""): key for key, names in KEYS.items() for name in names.split()}


def meant(word: str, keys: Iterable[str]) -> list[str]:
    """The keys among ``keys`` (dotted) that ``word`` may stand for: with or without a section, dashes, underscores or capitals.

    By the habits of other tools first, then every key whose last part it is; at most three.
    """
    plain = re.sub("[-_]", "", word).lower()
    known = {key: key.replace("_", "") for key in keys}
    if plain in known.values():
        return [key for key, spelt in known.items() if spelt == plain]
    last = plain.rpartition(".")[2]
    by_habit = [_NAMES[last]] if _NAMES.get(last) in known else []
    by_name = [key for key, spelt in known.items() if spelt.rpartition(".")[2] == last]
    return list(dict.fromkeys([*by_habit, *by_name]))[:3]
