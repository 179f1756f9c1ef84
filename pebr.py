"""PeBR: perception before reasoning, in one file.  (arXiv 2509.13031)

Two-stage reinforcement learning for vision-language models: first learn to see, then to reason.

    accelerate launch pebr.py --stage warmup        # supervised: image + question -> structured rationale
    accelerate launch pebr.py --stage sample        # 8 rollouts a question -> easy / medium / hard
    accelerate launch pebr.py --stage perception    # GRPO on easy questions, CLIP + keyword rewards
    accelerate launch pebr.py --stage reasoning     # GRPO on medium questions, accuracy reward
    accelerate launch pebr.py --stage evaluate      # every model of the run, one table
    accelerate launch pebr.py --stage all           # the five in a row
    accelerate launch pebr.py --stage dryrun        # one worst-case GRPO step: memory, speed, hours of the whole run

Without more flags this trains a tiny model on a toy world, offline, on a CPU. Each stage fills a folder of --run_dir and takes
its model and data from the stages before it, which are made first if they are missing (evaluate scores what there is). The
file reads in running order: config, policy, rollout, log-probs, advantages and loss, update, what the stages share, warm-up,
sampling, GRPO, evaluation. That is the method; what keeps a run alive comes after it: memory plan, dry run, survival, checks,
stage folders, main. Rewards are in rewards.py; rows, pictures and the toy world in data.py.

Where this departs from the paper's released code, and why:
 [1] Keywords are looked for in the image description only, as whole words or phrases, plural allowed, 3 or three alike.
     Theirs searches the whole response for substrings: "cat" is paid in "category", "3" in "13", and a keyword in step 4
     counts as perception. --keyword_precision makes naming everything not pay.
 [2] A reward that cannot be computed is an error. Theirs pays 0 for any CLIP failure. Rows without a picture are left out of
     perception RL, and counted. A negative cosine earns 0, not less.
 [3] CLIP sees each picture once and all descriptions of a batch together. Theirs makes one call per response.
 [4] A description longer than CLIP's context is scored in windows of whole sentences. Theirs is cut without a word.
 [5] Sections are parsed once, and the format holds only if they are all there, in order, with nothing before them; the last
     answer counts; no answer section, no accuracy. Theirs wants four headings anywhere, takes the first answer, and without
     one grades the whole response.
 [6] Every completion token of an update weighs the same, over all micro-batches and processes (--loss_mean token). Theirs
     averages micro-batch means, so that tokens of short responses weigh more.
 [7] Difficulty sampling resumes, and has exactly n scores per question. Theirs appends, so that a re-run leaves 16.
 [8] A group without spread has advantage exactly 0, not rounding noise divided by epsilon. It keeps its KL term.
 [9] A missing or unreadable picture stops the run before training, with its row; --skip_bad_rows drops and counts such rows.
[10] Sampling allows prompts of 8192 tokens: its own pixel limit (4,194,304) is up to 5,350 image tokens, more than 2048.
[11] A prompt and its pictures go through the model once per group (FAST_FAMILIES), in rollouts and in updates. Theirs repeat them.
[12] The instruction around a question is worded anew, with the same headings; --prompt_file takes theirs.
[13] From a step's second update on, old log-probs are those that the sampler computed; theirs are of one more forward. The
     difference is logged: sampler_gap. At the first update the old policy is the policy itself.
[14] Answers are graded by a grader of our own. Theirs, mathruler, disagrees with a person on a third of clear pairs (README).
Kept as theirs, though open to doubt: log-probs ignore top-p 0.99 (and here the ban on image tokens), so rollouts come from a
slightly narrower distribution than the one that is scored.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import os
from pathlib import Path
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import zlib

from PIL import Image
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, GradientAccumulationPlugin
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from jinja2 import TemplateError
import psutil
from safetensors import SafetensorError
import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessorList,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from data import (
    IMAGE_MARK,
    INSTRUCTION,
    DataError,
    Row,
    ToyConfig,
    build_toy_world,
    chat_messages,
    filter_warmup_rows,
    in_instruction,
    load_image,
    load_rows,
    write_tsv_predictions,
)
from rewards import (
    BENCHMARKS,
    STAGE_REWARDS,
    ClipScorer,
    calibrate,
    keyword_set,
    parse_response,
    score_parts,
    score_predictions,
    total_reward,
)

# ----------------------------------------------------------------------------------------------------------------------
# Config: the paper's settings, what a stage changes, what the toy changes. Flags come last and are made from the fields.


def option(default, help, group):
    return field(default=default, metadata={"help": help, "group": group})


RUN, DATA, TRAIN, ROLLOUT, GRPO, REWARD, EVAL, MEMORY = (
    "run", "model and data", "training (of the stage that --stage names; with all, of each)", "rollout", "GRPO", "reward", "evaluation", "memory and speed",
)  # fmt: skip


@dataclass
class Config:
    # fmt: off
    stage: str = option("all", "warmup, sample, perception, reasoning, evaluate, all; or dryrun", RUN)
    run_dir: str = option("runs/pebr", "folder that holds a folder per stage", RUN)
    seed: int = option(0, "everything random follows from it", RUN)
    overwrite: bool = option(False, "redo the stage although its folder is there", RUN)
    log_with: str = option("", "an accelerate tracker beside metrics.jsonl: tensorboard, wandb, trackio, ...", RUN)
    print_every: int = option(10, "steps between two printed sample rollouts (warm-up: between two lines), 0 = never", RUN)
    checkpoint_minutes: float = option(15.0, "between checkpoints to resume from, 0 = one after every step", RUN)
    keep_checkpoints: int = option(2, "how many of the last checkpoints stay until the stage is done", RUN)
    max_skipped_updates: int = option(3, "stop after so many skipped updates, without a step free of them in between; 0 = never", RUN)

    model: str = option("toy", "base model: a Hugging Face id or folder, or toy", DATA)
    train_data: str = option("toy", "RL questions: the authors' JSON, or JSONL, or toy", DATA)
    sft_data: str = option("", "warm-up conversations: sharegpt JSON or JSONL (default: toy's with --train_data toy)", DATA)
    test_data: str = option("", "held-out questions, rows as in --train_data, or benchmarks (VLMEvalKit TSV, JSON); several with commas "
                            "(default: toy's with --train_data toy)", DATA)
    image_root: str = option("", "folder of the pictures (default: the data file's folder)", DATA)
    prompt_file: str = option("", "instruction around each question, {question} marks its place (default: data.INSTRUCTION)", DATA)
    warmup_cases: str = option("all", "all, or hard: warm up on the rows that the base model gets wrong 8 times of 8", DATA)
    skip_bad_rows: bool = option(False, "drop and count broken rows instead of stopping", DATA)
    min_pixels: int = option(576, "smaller pictures are enlarged to this area (no effect below a processor's own floor: Qwen's is 3136)", DATA)
    max_pixels: int = option(802_816, "larger pictures are reduced to this area (sampling: 4194304)", DATA)
    max_prompt_length: int = option(2048, "tokens, image tokens included; a longer prompt is a broken row, never cut (sampling: 8192)", DATA)
    max_sft_length: int = option(4096, "tokens of prompt and response in the warm-up", DATA)
    trust_remote_code: bool = option(False, "run code that comes with the model folder", DATA)
    random_init: bool = option(False, "dryrun: the model's shape with random weights, for which config and processor files are enough", DATA)

    from_model: str = option("", "start from this model instead of the previous stage's (evaluate: score this one only)", TRAIN)
    from_data: str = option("", "use this file instead of the previous stage's (one of another run's sample/ needs --image_root)", TRAIN)
    learning_rate: float = option(1e-6, "warm-up: 1e-5", TRAIN)
    lr_schedule: str = option("constant", "constant or cosine (warm-up: cosine)", TRAIN)
    lr_warmup: float = option(0.0, "share of the steps with a rising learning rate (warm-up: 0.1)", TRAIN)
    weight_decay: float = option(0.01, "AdamW (warm-up: 0)", TRAIN)
    grad_clip: float = option(1.0, "gradient norm limit; a non-finite norm skips the update", TRAIN)
    epochs: int = option(1, "passes over the stage's data (warm-up 2, reasoning 2)", TRAIN)
    max_steps: int = option(0, "train so many steps, whatever --epochs says; 0 = as many as the epochs have", TRAIN)
    freeze_vision: bool = option(False, "vision tower and projector stay as they are (warm-up: yes)", TRAIN)
    sft_batch_size: int = option(128, "warm-up rows per update, over all processes", TRAIN)
    rollout_batch_size: int = option(512, "questions per step, over all processes (perception: 560)", TRAIN)
    update_batch_size: int = option(128, "questions per optimizer update (perception: 112); updates per step = the ratio of the two", TRAIN)

    group_size: int = option(8, "G, rollouts per question, in sampling and in GRPO", ROLLOUT)
    temperature: float = option(1.2, "of the rollouts, and of all log-probs in GRPO", ROLLOUT)
    top_p: float = option(0.99, "of the rollouts", ROLLOUT)
    max_new_tokens: int = option(2048, "longest response; what reaches it counts as truncated", ROLLOUT)

    kl_coef: float = option(0.01, "weight of the k3 KL to the stage's start model; 0 = no reference model is loaded", GRPO)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - this", GRPO)
    clip_high: float = option(0.3, "the ratio is clipped at 1 + this (DAPO, arXiv 2503.14476)", GRPO)
    clip_dual: float = option(3.0, "bound on the loss of negative advantages, 0 = off (dual clip, arXiv 1912.09729)", GRPO)
    advantage_eps: float = option(1e-6, "advantage = (reward - mean) / (std + this)", GRPO)
    advantage_std: bool = option(True, "divide by the group's std; off: Dr. GRPO (arXiv 2503.20783)", GRPO)
    loss_mean: str = option("token", "token; sequence (GRPO, arXiv 2402.03300); constant (Dr. GRPO, arXiv 2503.20783)", GRPO)
    ratio: str = option("token", "token, or sequence (GSPO, arXiv 2507.18071)", GRPO)
    mask_truncated: bool = option(False, "truncated responses do not train, but stay in the group mean (DAPO)", GRPO)
    resample_rounds: int = option(0, "replace groups without spread by new questions, at most so often (DAPO)", GRPO)

    clip_model: str = option("", "open_clip name/tag, hf-hub:id, local-dir:folder, fg-clip:folder, or toy (default with --train_data toy)", REWARD)
    clip_device: str = option("", "cpu keeps CLIP off the GPU (default: beside the policy)", REWARD)
    cosine_lo: float = option(0.0, "cosine that earns 0 of the CLIP reward", REWARD)
    cosine_hi: float = option(0.4, "cosine that earns all of it (paper: 0.4, for FG-CLIP)", REWARD)
    keyword_precision: bool = option(False, "perception: the keyword reward is an F-score, so naming everything does not pay", REWARD)

    eval_samples: int = option(1, "sampled responses per question, beside the greedy one; 0 = greedy only", EVAL)
    eval_temperature: float = option(0.5, "of the sampled responses", EVAL)
    benchmark: str = option("", f"rule to score by: {', '.join(BENCHMARKS)} (default: told from each file's name and columns)", EVAL)
    regrade: bool = option(False, "score saved predictions again, without the model", EVAL)

    threads: int = option(0, "CPU threads per process, 0 = the cores divided by the processes", MEMORY)
    engine: str = option("auto", "auto: prefill once and shared prefixes for the families that can; plain: generate and ordinary forwards", MEMORY)
    mixed_precision: str = option("bf16", "bf16 (float32 weights, bf16 compute) or no", MEMORY)
    micro_batch_size: int = option(8, "responses per forward and backward, best a multiple of --group_size; lower this first when memory runs out", MEMORY)
    generate_batch_size: int = option(0, "responses generated at once per process, 0 = as many as memory has room for", MEMORY)
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass", MEMORY)
    # fmt: on


STAGES = {  # the paper's settings where a stage departs from the defaults above
    "warmup": dict(learning_rate=1e-5, lr_schedule="cosine", lr_warmup=0.1, weight_decay=0.0, epochs=2, freeze_vision=True),
    "sample": dict(max_pixels=4_194_304, max_prompt_length=8192),  # [10]
    "perception": dict(rollout_batch_size=560, update_batch_size=112),
    "reasoning": dict(epochs=2),
    "evaluate": dict(),
    "dryrun": dict(rollout_batch_size=560, update_batch_size=112),  # as perception
}
TOY = {  # --model toy: a 0.9 M parameter model that starts from random weights and has minutes, not days
    "": dict(mixed_precision="no", gradient_checkpointing=False, micro_batch_size=64, generate_batch_size=1024, max_prompt_length=64,
             max_new_tokens=128, prompt_file="toy", cosine_hi=0.9, eval_samples=4, eval_temperature=1.0),
    "dryrun": dict(max_prompt_length=128, rollout_batch_size=32, update_batch_size=16),
    "warmup": dict(learning_rate=2e-3, sft_batch_size=32, max_steps=1000, freeze_vision=False),
    "perception": dict(learning_rate=1e-4, rollout_batch_size=32, update_batch_size=16, max_steps=30),
    "reasoning": dict(learning_rate=1e-4, rollout_batch_size=32, update_batch_size=16, max_steps=100, kl_coef=0.03),
}  # fmt: skip
TOY_PATHS = {  # what "toy" stands for in these fields
    "model": "{}/model", "train_data": "{}/train.json", "sft_data": "{}/sft.json", "test_data": "{}/test.json",
    "clip_model": "local-dir:{}/clip", "prompt_file": "{}/prompt.txt",
}  # fmt: skip
ALWAYS = "seed image_root min_pixels max_pixels max_prompt_length skip_bad_rows trust_remote_code mixed_precision engine"
SAMPLING = ALWAYS + " group_size temperature top_p max_new_tokens"
TRAINING = " learning_rate lr_schedule lr_warmup weight_decay grad_clip epochs max_steps freeze_vision"
GRPO_ONLY = " rollout_batch_size update_batch_size " + " ".join(
    f.name for f in fields(Config) if f.metadata["group"] == GRPO
)
SETTINGS = {  # what a stage reads, and what must not change between its start and its end (its inputs: see fingerprint)
    "warmup": ALWAYS + TRAINING + " sft_batch_size max_sft_length warmup_cases",
    "sample": SAMPLING,
    "perception": SAMPLING + TRAINING + GRPO_ONLY + " clip_model cosine_lo cosine_hi keyword_precision",
    "reasoning": SAMPLING + TRAINING + GRPO_ONLY,
    "dryrun": "",
    "evaluate": ALWAYS + " top_p max_new_tokens clip_model cosine_lo cosine_hi eval_samples eval_temperature benchmark",
}
FAST_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # models with get_rope_index and explicit (3, B, T) positions
PLAIN_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
MARK_IDS = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id")
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # families that head_logprobs cannot follow
LEAVE = 7 / 8  # so many or fewer rows of a decoding batch still going: the others leave it
ROOM = 64  # tokens that a response's part of the KV cache has room for at first; full, the room doubles
PICTURE_THREADS = 4  # open and process pictures; most of that work releases the interpreter's lock
LOGITS_CHUNK = 1024  # completion tokens whose logits are held at once
VISION = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "connector.")  # in names of parameters


class ConfigError(ValueError):
    """A flag, or a combination of flags or of folders, that cannot work; says what to change."""


def parse_flags(argv: list[str]) -> dict:
    """The flags that were given, as {field: value}. Booleans are --flag / --no-flag."""
    parser = argparse.ArgumentParser(
        usage="accelerate launch pebr.py --stage STAGE [--flag value ...]",
        description=__doc__.split("\n\nWhere this departs")[0],
        epilog="Defaults are the paper's; a stage's own settings and the toy's (--model toy) replace them, flags replace those.\n"
        "Stages that have to be made first get the flags too, except the group 'training'.",
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(f.metadata["group"] for f in fields(Config))}
    for f in fields(Config):
        text = f"{f.metadata['help']} [{f.default}]" if f.default != "" else f.metadata["help"]
        kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else kind
        groups[f.metadata["group"]].add_argument(f"--{f.name}", help=text.replace("%", "%%"), **kind)
    return vars(parser.parse_args(argv))


def resolve(stage: str, flags: dict, asked: bool = True) -> Config:
    """Config of one stage: paper < stage < toy < flags. A stage nobody asked for does not get the `training` flags."""
    cfg = replace(Config(), **STAGES[stage])
    if flags.get("model", cfg.model) == "toy":
        cfg = replace(cfg, **{**TOY[""], **TOY.get(stage, {})})
    group = {f.name: f.metadata["group"] for f in fields(Config)}
    cfg = replace(cfg, **{name: value for name, value in flags.items() if asked or group[name] != TRAIN})
    if cfg.model != "toy" and "train_data" not in flags:
        cfg = replace(cfg, train_data="")  # the toy's questions are for its own model, unless they are asked for
    toy_data = {
        name: "toy" for name in ("sft_data", "test_data", "clip_model") if not getattr(cfg, name) and cfg.train_data == "toy"
    }
    cfg = replace(cfg, stage=stage, **toy_data)
    return replace(
        cfg,
        **{name: path.format(Path(cfg.run_dir, "toy")) for name, path in TOY_PATHS.items() if getattr(cfg, name) == "toy"},
    )


# ----------------------------------------------------------------------------------------------------------------------
# Policy: a Hugging Face vision-language model, its processor, and prompts as tensors


@dataclass
class Prompt:
    """One question, ready for the model. `inputs`: what the processor returned for it alone, batch dimension 1."""

    row: Row
    images: list  # PIL, for CLIP
    inputs: dict[str, torch.Tensor]
    position: int = 0  # of the question in the step or the file: what its rollouts are seeded by, on whatever process


class Policy(torch.nn.Module):
    """A vision-language model with its processor. Called like a function, it gives the log-probs of completions: because
    that is its forward, DDP and FSDP see one ordinary module call."""

    def __init__(self, model, processor, fast: bool):
        super().__init__()
        self.model, self.processor, self.fast = model, processor, fast
        tokenizer, ends = processor.tokenizer, model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        ends = ends if isinstance(ends, list) else [ends]
        self.end_ids = list(dict.fromkeys([*ends, tokenizer.eos_token_id]))  # every one of them ends a response
        self.pad_id = self.end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Image, video and vision marks are never sampled: without a picture behind it, one crashes the training forward.
        self.banned_ids = sorted({getattr(model.config, name, None) for name in MARK_IDS} - {None})
        # The folder's generation_config.json (repetition penalty, top-k ...) must not leak into rollouts; it is kept for saving.
        self.saved_generation_config = model.generation_config
        model.generation_config = GenerationConfig(pad_token_id=self.pad_id)

    @property
    def device(self):
        return self.model.device

    def forward(self, prompts: list[Prompt], completions: list[torch.Tensor], temperature: float):
        """Log-probs of the completion tokens at the temperature they were sampled with, and the exact entropy there.

        completions: (C_i,) ids, those of one prompt next to each other. Returns logprobs (B, C) with gradient, entropy (B, C)
        without, mask (B, C). Softmax over the whole vocabulary in float32, before the ban and before top-p.
        """
        completions = [c.cpu() for c in completions]  # DDP and FSDP move them to the GPU, but not the prompts
        lengths = torch.tensor([len(c) for c in completions], device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]  # (B, C)
        hidden = (packed_states if self.fast else plain_states)(self, prompts, completions)  # (tokens, D)
        ids, head = torch.cat(completions).to(self.device), self.model.get_output_embeddings()
        # Checkpointed chunks: the (tokens, vocabulary) logits of a real model would be several GiB in float32.
        chunks = [checkpoint(head_logprobs, head, h, i, temperature, use_reentrant=False)
                  for h, i in zip(hidden.split(LOGITS_CHUNK), ids.split(LOGITS_CHUNK))]  # fmt: skip
        logprobs, entropy = (torch.cat(values) for values in zip(*chunks))  # (tokens,)
        if torch.distributed.is_initialized():
            # Processes exchange the vision tower's gradient, whether their batch had pictures or not.
            logprobs = logprobs + 0.0 * sum(p.sum() for p in vision_parameters(self.model) if p.requires_grad)
        zeros = torch.zeros(mask.shape, device=self.device)
        return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy), mask.float()

    def generate(self, prompts: list[Prompt], n: int, cfg: Config, choose, noise: torch.Tensor) -> list:
        """n responses to each prompt (see decode). A method, because FSDP has to see it as a forward of this module."""
        return (decode if self.fast else decode_plain)(self, prompts, n, cfg, choose, noise)


def load_policy(path: str, cfg: Config) -> Policy:
    """Any AutoModelForImageTextToText folder or hub id, in float32; safetensors only, and no code from the folder unless
    --trust_remote_code. Raises ConfigError for anything else.

    Never bf16 weights: at lr 1e-6 a bf16 weight is too coarse to move at all; bf16 compute comes from accelerate.
    """
    kwargs, found = dict(trust_remote_code=cfg.trust_remote_code), {}
    try:
        processor = AutoProcessor.from_pretrained(path, **kwargs)
        if not hasattr(processor, "tokenizer"):  # where transformers finds no processor, it takes the tokenizer for one
            raise ValueError("it has no processor for pictures and text")
        if cfg.random_init:
            config = AutoConfig.from_pretrained(path, **kwargs)
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        else:
            kwargs |= dict(use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)  # see check_policy
            model, found = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, **kwargs)
    except Exception as error:  # transformers, tokenizers and safetensors raise whatever goes wrong in them
        if out_of_memory(error):
            raise
        message = f"cannot load a vision-language model from {path} ({told(error)}): {folder_advice(path, error)}"
        raise ConfigError(message) from None
    mismatched = [name for name, *_ in found.get("mismatched_keys", [])]
    check_policy(path, model, processor, sorted(found.get("missing_keys", [])) + mismatched)
    scaled = [name for name in SCALED_LOGITS if getattr(model.config.get_text_config(), name, None) not in (None, 1)]
    if scaled:
        raise ConfigError(
            f"{path}: its logits are changed after the last layer ({', '.join(scaled)}), which log-probs here do not follow"
        )
    windows = "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or [])
    fast = cfg.engine == "auto" and model.config.model_type in FAST_FAMILIES and not windows
    if fast:
        model.config.text_config._attn_implementation = "shared_prefix"
        model.config.vision_config._attn_implementation = "flash_windows"
    return Policy(model, processor, fast)


def save_policy(policy: Policy, accelerator: Accelerator, model, folder: Path) -> None:
    """A complete Hugging Face folder, in float32 so that the next stage goes on from the exact weights."""
    state = accelerator.get_state_dict(model)  # collective: on every process
    state = {name.removeprefix("model."): value for name, value in state.items()}  # of the Hugging Face model inside
    if accelerator.is_main_process:
        clean, policy.model.generation_config = policy.model.generation_config, policy.saved_generation_config
        policy.model.save_pretrained(folder, state_dict=state)
        policy.processor.save_pretrained(folder)
        policy.model.generation_config = clean


def vision_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Of the vision tower and the projector, by the names that transformers gives them."""
    return [p for name, p in model.named_parameters() if any(part in name for part in VISION)]


def freeze_vision(model: torch.nn.Module) -> None:
    frozen = vision_parameters(model)
    if not frozen:
        raise ConfigError(f"--freeze_vision: no {', '.join(VISION)} in {type(model).__name__}; use --no-freeze_vision")
    for p in frozen:
        p.requires_grad_(False)


def processor_inputs(processor, row: Row, images: list, instruction: str) -> dict[str, torch.Tensor]:
    """Render the chat template, run the processor: what the model's forward takes, batch dimension 1."""
    text = processor.apply_chat_template(chat_messages(row, instruction), tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens already; the tokenizer must not add a second set.
    return dict(processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False))


def encode_prompt(policy: Policy, row: Row, cfg: Config, instruction: str, position: int = 0) -> Prompt:
    """Open the row's pictures, make the processor's inputs.

    Raises DataError for what the processor or the chat template refuses, for a text that holds the model's own mark of a
    picture, and for a prompt that is too long (RL rows; the warm-up limits prompt and response together).
    """
    texts = [row.response] + [part.get("text", "") for m in chat_messages(row, instruction) for part in m["content"]]
    for mark in filter(None, policy.processor.tokenizer.convert_ids_to_tokens(policy.banned_ids)):
        if any(mark in text for text in texts):
            raise DataError(f"its text holds {mark}, which the model takes for a picture: only {IMAGE_MARK} marks one")
    images = [load_image(path, cfg.min_pixels, cfg.max_pixels) for path in row.images]
    try:
        inputs = processor_inputs(policy.processor, row, images, instruction)
    except (ValueError, TemplateError) as error:
        raise DataError(f"the processor refuses it ({error})") from None
    length = inputs["input_ids"].shape[1]
    if not row.response and length > cfg.max_prompt_length:
        raise DataError(
            f"prompt has {length} tokens, --max_prompt_length is {cfg.max_prompt_length}: raise it or lower --max_pixels"
        )
    return Prompt(row, images, inputs, position)


def encode_response(policy: Policy, text: str) -> torch.Tensor:
    """(C,) token ids of a response and its end token: what the warm-up learns, no more and no less."""
    return torch.tensor(
        policy.processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [policy.processor.tokenizer.eos_token_id]
    )


def collate(prompts: list[Prompt], completions: list[torch.Tensor] | None, pad_id: int, device) -> dict[str, torch.Tensor]:
    """One batch [padding, prompt | completion, padding], so that completions start in the same column in every row.

    completions: (C_i,) ids or None. Per-token tensors get shape (B, T + C); pictures are concatenated whole, one run of
    patches per image, because repeating or cutting them by rows would mix pictures up.
    """
    batch = {}
    for name in dict.fromkeys(name for p in prompts for name in p.inputs):
        values = [p.inputs[name] for p in prompts if name in p.inputs]
        if all(p.inputs[name].shape == p.inputs["input_ids"].shape for p in prompts if name in p.inputs):  # ids, mask, types
            fill = pad_id if name == "input_ids" else 0
            batch[name] = pad_sequence([value[0] for value in values], True, fill, padding_side="left")  # (B, T)
            if completions:
                tails = {"input_ids": completions, "attention_mask": [torch.ones_like(c) for c in completions]}
                tails = tails.get(name, [torch.zeros_like(c) for c in completions])
                batch[name] = torch.cat([batch[name], pad_sequence(tails, True, fill)], 1)  # (B, T + C)
        else:
            batch[name] = torch.cat(values)
    return {name: value.to(device) for name, value in batch.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Rollout


@dataclass
class Rollout:
    """One response of the policy to one prompt, and what became of it."""

    prompt: Prompt
    tokens: torch.Tensor  # (C,) sampled ids, the end token included if there is one
    text: str
    truncated: bool  # no end token within max_new_tokens
    old_logprobs: torch.Tensor  # (C,) under the policy that sampled, full softmax at the rollout temperature
    parts: dict = field(default_factory=dict)  # of the reward
    reward: float = 0.0
    advantage: float = 0.0
    ref_logprobs: torch.Tensor | None = None  # (C,) under the stage's start model


@torch.no_grad()
def generate_rollouts(
    policy: Policy, prompts: list[Prompt], n: int, cfg: Config, accelerator, temperature: float, seed: str = ""
) -> list[Rollout]:
    """n responses to each prompt, those of a prompt next to each other. temperature 0 is greedy.

    What is sampled follows from `seed` and the prompts' positions, not from the batch or the process that they are in.
    """
    policy.eval()
    rollouts, size = [], generate_batch_size(policy, cfg, accelerator, n) // n
    with gathered(policy):
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            noise = torch.stack([row_noise(f"{seed} {prompt.position} {i}", cfg) for prompt in chunk for i in range(n)])
            choose = functools.partial(sample_tokens, temperature=temperature, top_p=cfg.top_p, banned=policy.banned_ids)
            with accelerator.autocast():
                sampled = policy.generate(chunk, n, cfg, choose, noise.to(policy.device))
            for i, (tokens, logprobs) in enumerate(sampled):
                text = policy.processor.tokenizer.decode(tokens, skip_special_tokens=True)
                rollouts.append(Rollout(chunk[i // n], tokens, text, tokens[-1].item() not in policy.end_ids, logprobs))
    policy.train()
    return rollouts


def row_noise(seed: str, cfg: Config) -> torch.Tensor:
    """(max_new_tokens, 8) uniform random numbers of one response: a token takes one, and another for each time top-p refuses."""
    return torch.rand(
        cfg.max_new_tokens, 8, generator=torch.Generator().manual_seed(zlib.crc32(f"{cfg.seed} {seed}".encode()))
    )


def decode_plain(policy: Policy, prompts: list[Prompt], n: int, cfg: Config, choose, noise: torch.Tensor) -> list:
    """transformers' generate, for any model, with our own choice of tokens. Returns what decode returns."""
    batch, logprobs = collate(prompts, None, policy.pad_id, policy.device), []

    def only_the_chosen(ids, logits):  # a logits processor: (rows, tokens so far), (rows, V) -> (rows, V)
        tokens, chosen = choose(logits, noise[:, len(logprobs)])
        logprobs.append(chosen)
        return torch.full_like(logits, float("-inf")).scatter(1, tokens[:, None], 0.0)

    ids = policy.model.generate(
        **batch, do_sample=True, top_k=0, num_return_sequences=n, max_new_tokens=cfg.max_new_tokens,
        logits_processor=LogitsProcessorList([only_the_chosen]), eos_token_id=policy.end_ids, pad_token_id=policy.pad_id,
    )[:, batch["input_ids"].shape[1] :].cpu()  # fmt: skip
    return cut_at_end(ids, torch.stack(logprobs, 1).cpu(), policy.end_ids)


def cut_at_end(ids: torch.Tensor, logprobs: torch.Tensor, end_ids: list[int]) -> list:
    """ids, logprobs (rows, longest) -> [((C,), (C,))], up to and with the first end token. From positions, not from padding,
    which may be an end token too."""
    ends = torch.isin(ids, torch.tensor(end_ids))
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, ids.shape[1]).tolist()
    return [(tokens[:n], values[:n]) for tokens, values, n in zip(ids, logprobs, lengths)]


@dataclass
class GroupCache:
    """Keys and values of a decoding batch: those of each prompt once, however many responses follow it, and each response's own."""

    prompts: list[tuple[torch.Tensor, torch.Tensor]]  # of each layer (P, kv heads, T, dim)
    bias: torch.Tensor  # (P, 1, 1, T): 0, or -inf where a prompt is padded
    n: int  # responses to a prompt
    slot: torch.Tensor  # (rows,): row r is response slot % n to prompt slot // n
    own: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # of each layer (rows, kv heads, room, dim)

    def append(self, layer: int, step: int, key: torch.Tensor, value: torch.Tensor):
        """Takes the new token's key and value (rows, kv heads, 1, dim), gives those of the response so far."""
        if layer == len(self.own):
            self.own.append(tuple(x.new_zeros(*x.shape[:2], ROOM, x.shape[3]) for x in (key, value)))
        if step == self.own[layer][0].shape[2]:  # doubled: growing by a constant fragments a GPU's memory
            self.own[layer] = tuple(torch.cat([x, torch.zeros_like(x)], 2) for x in self.own[layer])
        keys, values = self.own[layer]
        keys[:, :, step], values[:, :, step] = key[:, :, 0], value[:, :, 0]
        return keys[:, :, : step + 1], values[:, :, : step + 1]

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows go on, and only the prompts that they follow. Layer by layer, so that there are never two caches."""
        used, prompt = (self.slot[rows] // self.n).unique(return_inverse=True)
        self.slot = prompt * self.n + self.slot[rows] % self.n
        for i, (keys, values) in enumerate(self.own):
            self.own[i] = keys[rows], values[rows]
        if len(used) < len(self.bias):
            self.bias = self.bias[used]
            for i, (keys, values) in enumerate(self.prompts):
                self.prompts[i] = keys[used], values[used]


def prefill(policy: Policy, prompts: list[Prompt], n: int) -> tuple[torch.Tensor, torch.Tensor, GroupCache]:
    """One forward over P prompts. Returns the logits (P, V) and the position (P, 1) of what comes next, and the cache."""
    batch, rows = collate(prompts, None, policy.pad_id, policy.device), len(prompts) * n
    positions, next_position = rope_positions(policy, batch)
    padding = batch["attention_mask"][:, None, None] == 0
    batch.pop("mm_token_type_ids", None)  # positions are given, so the model has no use for them
    out = policy.model(**batch, position_ids=positions, use_cache=True, logits_to_keep=1)
    dtype = out.logits.dtype  # under autocast the cache is float32: its keys come from the rotary embedding
    layers = [(layer.keys.to(dtype), layer.values.to(dtype)) for layer in out.past_key_values.layers]
    bias = torch.zeros(padding.shape, device=policy.device).masked_fill(padding, float("-inf"))
    return out.logits[:, -1], next_position, GroupCache(layers, bias, n, torch.arange(rows, device=policy.device))


def decode(policy: Policy, prompts: list[Prompt], n: int, cfg: Config, choose, noise: torch.Tensor) -> list:
    """Prefill each prompt and its pictures once [11], decode n responses to each against that one KV cache. Rows that have ended
    leave together, an eighth of the batch at a time: each leaving copies the cache.

    choose: logits (B, V), noise (B, 8) -> tokens (B,), log-probs (B,). noise: (P * n, max_new_tokens, 8).
    Returns [((C,) tokens, (C,) log-probs)] for P * n responses. Positions are explicit, so nothing stays on the model.
    """
    logits, next_position, cache = prefill(policy, prompts, n)
    logits, next_position = logits.repeat_interleave(n, 0), next_position.repeat_interleave(n, 0)  # (P * n, V), (P * n, 1)
    # tokens, ended, next_position and the cache have an entry for each row in alive. A row that has ended but not yet left
    # goes on sampling; cut_at_end drops that.
    alive, ends = cache.slot, torch.tensor(policy.end_ids, device=policy.device)
    ended, logprobs = torch.zeros_like(alive, dtype=torch.bool), torch.zeros_like(noise[..., 0])
    sampled = torch.zeros_like(logprobs, dtype=torch.long)  # (P * n, max_new_tokens)
    for step in range(cfg.max_new_tokens):
        tokens, chosen = choose(logits, noise[alive, step])  # (alive,)
        sampled[alive, step], logprobs[alive, step] = tokens, chosen
        ended = ended | torch.isin(tokens, ends)
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0 or step == cfg.max_new_tokens - 1:
            break
        if len(going) <= LEAVE * len(alive):
            alive, ended, tokens, next_position = alive[going], ended[going], tokens[going], next_position[going]
            cache.keep(going)
        logits = policy.model(
            input_ids=tokens[:, None], position_ids=(next_position + step).expand(3, -1, -1), group_cache=cache, decode_step=step,
            use_cache=False, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
    return cut_at_end(sampled.cpu(), logprobs.cpu(), policy.end_ids)


def decode_attention(query, key, value, scaling, cache: GroupCache, layer: int, step: int):
    """Attention of one new token a row to its prompt and to its own response. query (rows, heads, 1, dim), key and value
    (rows, kv heads, 1, dim) -> (rows, 1, heads, dim). All rows of a prompt meet its keys in one matrix product: the keys are
    neither repeated nor read n times."""
    prompt_keys, prompt_values = cache.prompts[layer]
    keys, values = cache.append(layer, step, key.to(value.dtype), value)  # (rows, kv heads, L, dim)
    query = query.to(value.dtype)[:, :, 0].unflatten(1, (keys.shape[1], -1))  # (rows, kv heads, R, dim)

    def by_prompt(x):  # (rows, kv heads, R, k) -> (P, kv heads, n * R, k); places of rows that have left are 0
        placed = x.new_zeros(len(cache.bias) * cache.n, *x.shape[1:])
        placed[cache.slot] = x
        return placed.unflatten(0, (-1, cache.n)).transpose(1, 2).flatten(2, 3)

    def by_row(x):  # and back
        return x.unflatten(2, (cache.n, -1)).transpose(1, 2).flatten(0, 1)[cache.slot]

    prompt_scores = by_row(float32_scores(by_prompt(query), prompt_keys) + cache.bias)
    scores = torch.cat([prompt_scores, float32_scores(query, keys)], -1)
    weights = (scores * scaling).softmax(-1).to(value.dtype)
    to_prompt, to_own = weights.split([prompt_keys.shape[2], keys.shape[2]], -1)
    out = by_row(by_prompt(to_prompt) @ prompt_values) + to_own @ values  # (rows, kv heads, R, dim)
    return out.flatten(1, 2)[:, None]


def float32_scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """query (B, kv heads, R, dim), keys (B, kv heads, L, dim) -> (B, kv heads, R, L) in float32, as the attention
    of the training forward keeps them: rounding scores to bf16 moves a twentieth of the softmax at a score of 100.
    On a GPU this takes no float32 copy of the cache."""
    if query.is_cuda and query.dtype == torch.bfloat16:
        product = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=torch.float32)
        return product.unflatten(0, keys.shape[:2])
    with torch.autocast("cpu", enabled=False):  # which would round them again
        return query.float() @ keys.float().mT


def sample_tokens(
    logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float, banned: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row of logits (B, V), chosen by noise (B, 8), and its log-prob under the full softmax at the temperature.

    That log-prob is what the training forward computes for the token: it is taken before the ban and before top-p.
    temperature 0: the most likely token. Top-p by rejection, without sorting the vocabulary: a token is outside if more likely
    ones hold top_p; then the row draws again, from those. After seven refusals, which takes a small top_p, it sorts what is left.
    """
    logits = logits.float() / (temperature or 1.0)
    logprobs, allowed = logits.log_softmax(-1), logits.clone()
    allowed[:, banned] = float("-inf")
    tokens = allowed.argmax(-1)
    if temperature:
        p, rows = allowed.softmax(-1), torch.arange(len(logits), device=logits.device)
        for u in noise.T[:-1]:
            sums = p.cumsum(-1)
            drawn = torch.searchsorted(sums, u[rows, None] * sums[:, -1:], right=True).clamp(max=p.shape[1] - 1)  # (B, 1)
            p_drawn = p.gather(-1, drawn)
            more_likely = torch.where(p > p_drawn, p, 0.0)
            # p_drawn > 0, because of rounding in the sum over the vocabulary
            inside = (more_likely.sum(-1) < top_p) & (p_drawn[:, 0] > 0)
            tokens[rows[inside]] = drawn[inside, 0]
            p, rows = more_likely[~inside], rows[~inside]
            if not len(rows):
                break
        else:  # some rows are left
            ranked, order = p.sort(-1, descending=True)
            sums = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0).cumsum(-1)
            drawn = torch.searchsorted(sums, noise[rows, -1:] * sums[:, -1:], right=True).clamp(max=p.shape[1] - 1)
            tokens[rows] = order.gather(-1, drawn)[:, 0]
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def load_clip(cfg: Config, accelerator: Accelerator) -> ClipScorer:
    try:
        with accelerator.local_main_process_first():  # it downloads and converts, the others find that done
            clip = ClipScorer(cfg.clip_model, cfg.clip_device or accelerator.device, cfg.cosine_lo, cfg.cosine_hi)
        if not math.isfinite(clip.cosines([[Image.new("RGB", (112, 112))]], ["a picture"])[0]):
            raise ValueError("its embeddings are not finite: its weights are broken")
    except Exception as error:  # open_clip raises whatever goes wrong in it
        if out_of_memory(error):
            raise
        raise ConfigError(f"--clip_model {cfg.clip_model}: {told(error)}") from None
    return clip


def score_rollouts(rollouts: list[Rollout], clip: ClipScorer | None, vocabulary: frozenset = frozenset()) -> None:
    """Fill in the reward parts (rewards.py). vocabulary: the stage's keywords, with --keyword_precision

    Raises RewardError with the sample if a reward raises or is not a finite number: it is never a 0. [2]
    """

    def score(some):
        parts = score_parts([r.prompt.row for r in some], [r.prompt.images for r in some], [r.text for r in some],
                            [len(r.tokens) for r in some], clip, vocabulary)  # fmt: skip
        for rollout, part in zip(some, parts):
            rollout.parts = part
            if not all(map(math.isfinite, rollout.parts.values())):
                raise RewardError(rollout, f"not a finite number in {rollout.parts}")

    try:
        score(rollouts)
    except Exception as error:
        for rollout in [] if isinstance(error, RewardError) or out_of_memory(error) else rollouts:  # which one was it?
            try:
                score([rollout])
            except Exception as alone:
                raise RewardError(rollout, "".join(traceback.format_exception(alone)[-2:])) from alone
        raise


# ----------------------------------------------------------------------------------------------------------------------
# Log-probs


def head_logprobs(head, hidden: torch.Tensor, ids: torch.Tensor, temperature: float):
    """hidden (N, D), ids (N,) -> log-probs of the ids (N,), entropy (N,)"""
    logprobs = (head(hidden).float() / temperature).log_softmax(-1)  # (N, V)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, ids[:, None])[:, 0], entropy


def plain_states(policy: Policy, prompts: list[Prompt], completions: list[torch.Tensor]) -> torch.Tensor:
    """(tokens, D): for every completion token, the state that predicts it. Any model; each response carries its prompt."""
    batch = collate(prompts, completions, policy.pad_id, policy.device)
    C = max(len(c) for c in completions)
    hidden = policy.model.base_model(**batch, use_cache=False).last_hidden_state  # (B, T + C, D)
    return torch.cat([row[: len(c)] for row, c in zip(hidden[:, -C - 1 : -1], completions)])


def packed_states(policy: Policy, prompts: list[Prompt], completions: list[torch.Tensor]) -> torch.Tensor:
    """The same states from one row [prompt, c1 ... cG, next prompt, ...] without padding: a prompt and its pictures go through
    the model once, however many completions follow it. [11] Which tokens see each other is shared_prefix_attention's business."""
    groups = [list(group) for _, group in itertools.groupby(zip(prompts, completions), key=lambda pair: id(pair[0]))]
    batch = collate([group[0][0] for group in groups], None, policy.pad_id, "cpu")  # left-padded, (P, T)
    positions, next_position = rope_positions(policy, batch)  # (3, P, T), (P, 1)
    row_ids, row_positions, layout = [], [], []
    for i, group in enumerate(groups):
        inputs = [c[:-1] for _, c in group]  # a completion's last token predicts nothing: it is no input
        T, lengths = group[0][0].inputs["input_ids"].shape[1], [len(c) for c in inputs]
        after = next_position[i] + torch.cat([torch.arange(n) for n in lengths])  # each directly follows the prompt
        row_ids += [batch["input_ids"][i, -T:], *inputs]
        row_positions += [positions[:, i, -T:], after.expand(3, -1)]
        layout.append((T, lengths))
    pictures = {name: batch[name].to(policy.device) for name in ("pixel_values", "image_grid_thw") if name in batch}
    hidden = policy.model.base_model(
        input_ids=torch.cat(row_ids)[None].to(policy.device), use_cache=False, groups=layout, **pictures,
        position_ids=torch.cat(row_positions, -1)[:, None].to(policy.device),
    ).last_hidden_state[0]  # fmt: skip
    states = []
    for (T, lengths), rows in zip(layout, hidden.split([T + sum(lengths) for T, lengths in layout])):
        for tail in rows[T:].split(lengths):
            states += [rows[T - 1 : T], tail]  # the prompt's last state predicts every first token
    return torch.cat(states)


def shared_prefix_attention(
    module, query, key, value, attention_mask, scaling=None, groups=None, group_cache=None, decode_step=0, **kwargs
):
    """Attention within one row of groups [prompt, c1 ... cG], `groups` = [(T, [C1 ... CG])]: the prompt attends to itself, a
    completion to the prompt and itself. With group_cache: of a decoding step. With neither (prefill): transformers' sdpa."""
    if group_cache is not None:
        return decode_attention(query, key, value, scaling, group_cache, module.layer_idx, decode_step), None
    if groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the rotary embedding leaves them in float32
    sizes = [T + sum(lengths) for T, lengths in groups]
    parts = zip(*(x.split(sizes, 2) for x in (query, key, value)))
    rows = [group_attention(*part, *group, scaling) for part, group in zip(parts, groups)]
    return torch.cat(rows, 2).transpose(1, 2).contiguous(), None


def group_attention(query, key, value, T: int, lengths: list[int], scaling: float) -> torch.Tensor:
    """(1, heads, T + C1 + ... + CG, dim) of one group. Completions are padded in here, and nowhere else."""
    sdpa, L = functools.partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=True), max(lengths)
    if len(lengths) == 1 or L == 0:  # nothing behind the prompt but one completion: plainly causal
        return sdpa(query, key, value, is_causal=True)
    # (G, heads, L, dim) and (G, heads, T + L, dim); a padded query's output is dropped below, a padded key comes after all others
    padded = lambda x: torch.cat([F.pad(c, (0, 0, 0, L - c.shape[2])) for c in x[:, :, T:].split(lengths, 2)])
    with_prompt = lambda x: torch.cat([x[:, :, :T].expand(len(lengths), -1, -1, -1), padded(x)], 2)
    prompt = sdpa(query[:, :, :T], key[:, :, :T], value[:, :, :T], is_causal=True)  # (1, heads, T, dim)
    # Lower-right causal: the kernel for it is a flash kernel on CUDA; a dense mask would not be.
    rest = sdpa(padded(query), with_prompt(key), with_prompt(value), attn_mask=causal_lower_right(L, T + L))
    return torch.cat([prompt, *(rest[i : i + 1, :, :n] for i, n in enumerate(lengths))], 2)


def window_attention(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **kwargs
):
    """Attention of the vision tower, (1, heads, tokens, dim), within each window or picture. Window i is the tokens
    from cu_seq_lens_q[i] to cu_seq_lens_q[i + 1]. One call does what transformers' sdpa does in a call per window,
    after waiting for the GPU to tell where each window ends."""
    bounds, longest = cu_seq_lens_q, max_length_q
    if value.is_cuda and value.dtype in (torch.bfloat16, torch.float16):  # what the kernel takes
        query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling)[None], None
    places = bounds[:-1, None] + torch.arange(longest, device=bounds.device)  # (windows, longest)
    inside, last = places < bounds[1:, None], value.shape[2] - 1
    # (1, heads, tokens, dim) -> (windows, heads, longest, dim)
    padded = lambda x: x[0].transpose(0, 1)[places.clamp(max=last)].transpose(1, 2)
    query, key, value, mask = padded(query), padded(key), padded(value), inside[:, None, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2)[inside][None], None


AttentionInterface.register("flash_windows", window_attention)  # "flash" makes transformers pass the bounds
AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)


def rope_positions(policy: Policy, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (3, B, T) of left-padded prompts by time, height and width, and the next position (B, 1) of each."""
    positions, delta = policy.model.base_model.get_rope_index(
        batch["input_ids"], mm_token_type_ids=batch["mm_token_type_ids"], image_grid_thw=batch.get("image_grid_thw"),
        attention_mask=batch["attention_mask"],
    )  # fmt: skip
    return positions, batch["attention_mask"].sum(-1, keepdim=True) + delta


@torch.no_grad()
def rollout_logprobs(model, rollouts: list[Rollout], cfg: Config, accelerator) -> list[torch.Tensor]:
    """(C_i,) log-probs of each rollout under `model`, in micro-batches."""
    result = []
    for start in range(0, len(rollouts), cfg.micro_batch_size):
        chunk = rollouts[start : start + cfg.micro_batch_size]
        with accelerator.autocast():
            logprobs, _, _ = model([r.prompt for r in chunk], [r.tokens for r in chunk], cfg.temperature)
        result += [row[: len(r.tokens)].cpu() for row, r in zip(logprobs, chunk)]
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Advantages and loss


def is_tied(rewards: torch.Tensor) -> torch.Tensor:
    """rewards (P, G) -> (P,): groups without spread. A spread of float noise is none."""
    return rewards.amax(dim=1) - rewards.amin(dim=1) <= 1e-6


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6, divide_by_std: bool = True) -> torch.Tensor:
    """rewards (P, G) -> advantages (P, G): (r - mean) / (std + eps) within the group, unbiased std.

    GRPO, arXiv 2402.03300, section 4.1.2 (outcome supervision); exactly 0 for a group without spread [8].
    """
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = centered / (rewards.std(dim=1, keepdim=True) + eps) if divide_by_std else centered
    return torch.where(is_tied(rewards)[:, None], 0.0, advantages)


def k3_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(policy || reference) per token, >= 0: exp(d) - d - 1 with d = ref - policy. GRPO, eq. 4 ("low_var_kl").

    Clamped twice, as in the authors' code: at --kl_coef 0.01 a token at d = 8 would weigh 30, an advantage about 1."""
    d = (ref_logprobs - logprobs).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def token_weights(mask: torch.Tensor, loss_mean: str, totals: dict, max_new_tokens: int) -> torch.Tensor:
    """(B, C) weight of each token; `totals` are of the whole update, over all micro-batches and processes. [6]

    token: every token the same (the paper). sequence: every response the same (GRPO). constant: tokens over the largest
    possible count, so that no length is favored (Dr. GRPO).
    """
    if loss_mean == "token":
        return mask / totals["tokens"]
    if loss_mean == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / totals["sequences"]
    return mask / (totals["sequences"] * max_new_tokens)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, weights, num_tokens, cfg: Config):
    """Clipped surrogate with dual clip, plus k3 KL (GRPO, eq. 3): a weighted sum over this micro-batch's tokens.

    logprobs, old_logprobs, ref_logprobs (or None), mask, weights: (B, C); advantages: (B,); num_tokens: of the whole update.
    Returns (loss, metrics): both add up over micro-batches and processes, metrics to means over tokens.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)  # an infinite ratio would make a NaN of the gradient
    if cfg.ratio == "sequence":  # GSPO: the geometric mean over the response, the same for each of its tokens
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(log_ratio)
    ratio = log_ratio.exp()
    adv = advantages[:, None]
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    surrogate = torch.min(ratio * adv, clipped * adv)
    dual = (adv < 0) & (ratio > cfg.clip_dual) if cfg.clip_dual else torch.zeros_like(ratio, dtype=torch.bool)
    surrogate = torch.where(dual, cfg.clip_dual * adv, surrogate)  # a huge ratio cannot make the loss huge
    loss = -(surrogate * weights).sum()
    share = lambda tokens: (tokens * mask).sum() / num_tokens
    metrics = {
        "clipped_low": share((ratio < 1 - cfg.clip_low) & (adv < 0)),
        "clipped_high": share((ratio > 1 + cfg.clip_high) & (adv > 0)),
        "clipped_dual": share(dual),
    }
    if ref_logprobs is not None:
        kl = k3_kl(logprobs, ref_logprobs)
        loss = loss + cfg.kl_coef * (kl * weights).sum()
        metrics["kl"] = share(kl)
    return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in metrics.items()}}


# ----------------------------------------------------------------------------------------------------------------------
# Update


def optimizer_step(accelerator, model, optimizer, cfg: Config, batches: list, loss_of) -> dict[str, float]:
    """One update: gradients of all micro-batches and processes, clipped; a non-finite norm or loss skips it. Returns summed metrics.

    loss_of(micro-batch) -> (loss, metrics), already divided by the counts of the whole update. DDP averages gradients over
    processes, hence the factor. Every process must come with the same number of micro-batches.
    """
    sums, trained = {}, [p for p in model.parameters() if p.requires_grad]
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        # DDP exchanges gradients once. The forward belongs inside, too. FSDP does so each time, or it would hold them whole.
        with nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(model):
            with accelerator.autocast():
                loss, metrics = loss_of(batch)
            accelerator.backward(loss * accelerator.num_processes)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.float()
    norm = accelerator.clip_grad_norm_(trained, cfg.grad_clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    sums = {name: float(value) for name, value in zip(sums, accelerator.reduce(torch.stack(list(sums.values())), "sum"))}
    finite = bool(torch.isfinite(norm)) and math.isfinite(sums["loss"])
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**sums, "grad_norm": float(norm), "skipped_updates": 0.0 if finite else 1.0}


def prepare_training(policy: Policy, cfg: Config, accelerator: Accelerator):
    """The policy's model as accelerate wraps it, in train mode, and its optimizer."""
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    kind = policy.model.config.model_type
    accelerator.print(f"engine: fast, prompts shared within groups ({kind})" if policy.fast else f"engine: plain ({kind})")
    if cfg.freeze_vision:
        freeze_vision(policy.model)
    if cfg.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
        policy.model.disable_input_require_grads()  # else backward runs through a frozen vision tower, too
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = [type(text_layers(policy)[0]).__name__]
        plugin.mixed_precision_policy = fsdp_precision(cfg)
        plugin.cpu_ram_efficient_loading = False  # else only the first process has weights for its reference model
    trained = [p for p in policy.parameters() if p.requires_grad]
    # fused: else, on a GPU, each step takes temporary memory of the size of the weights.
    adam = torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(policy, adam)
    register_fsdp_forward_method(model, "generate")
    return model.train(), optimizer


def text_layers(policy: Policy) -> torch.nn.ModuleList:
    """The decoder layers, which FSDP shards one by one. The vision tower stays with the embeddings in the root, which every
    process gathers at every forward: one by one, processes with and without pictures would wait for each other."""
    return policy.model.get_decoder().layers


def fsdp_precision(cfg: Config) -> MixedPrecisionPolicy:
    """bf16 compute on float32 shards, and gradients added up in float32 (accelerate would do that in bf16)."""
    compute = torch.bfloat16 if cfg.mixed_precision == "bf16" else None
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)


@contextmanager
def gathered(policy: Policy):
    """Inside, FSDP holds all weights whole, so that decoding needs no exchange and processes may take different numbers of
    steps. Nothing happens without FSDP."""
    sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not policy, recurse=False)


def set_learning_rate(optimizer, cfg: Config, step: int, total: int) -> float:
    """By hand, from the step: a prepared scheduler would advance once per process. Returns the learning rate."""
    warmup = math.ceil(cfg.lr_warmup * total)
    scale = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if cfg.lr_schedule == "cosine" and step >= warmup:
        scale = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = cfg.learning_rate * scale
    return cfg.learning_rate * scale


# ----------------------------------------------------------------------------------------------------------------------
# What the stages share: checked rows, a shuffled stream of them, log lines


def read_instruction(cfg: Config) -> str:
    if not cfg.prompt_file:
        return INSTRUCTION
    try:
        text = Path(cfg.prompt_file).read_text("utf-8-sig") if os.path.isfile(cfg.prompt_file) else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt_file {cfg.prompt_file}: no text in UTF-8 ({error})") from None
    if "{question}" not in text:
        raise ConfigError(f"--prompt_file {cfg.prompt_file}: no such file, or it lacks the mark {{question}}")
    return text


def read_rows(path: str, cfg: Config, need: tuple[str, ...] = ()) -> tuple[list[Row], list[str]]:
    """load_rows with this run's settings. Files of the run's own sampling have the image root of the file they were split
    from; any other file's summary.json counts for nothing."""
    root, summary = cfg.image_root, Path(path).resolve().with_name("summary.json")
    ours = [Path(cfg.run_dir, name).resolve() for name in ("sample", "sample_base")]
    if not root and summary.parent in ours and summary.is_file():
        root = os.path.join(summary.parent, json.loads(summary.read_text())["image_root"])
    return load_rows(path, root, need, cfg.benchmark if cfg.stage == "evaluate" else "")


def stop_for_broken_rows(path: str, problems: list[str], cfg: Config, accelerator: Accelerator) -> None:
    """Raise DataError with the list of broken rows; with --skip_bad_rows print it."""
    if problems:
        listed = "\n  ".join(problems[:50]) + (f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else "")
        if not cfg.skip_bad_rows:
            raise DataError(f"{path} has {len(problems)} broken rows (--skip_bad_rows drops them):\n  {listed}")
        accelerator.print(f"{path}: dropped {len(problems)} broken rows:\n  {listed}")


def check_files(cfg: Config, accelerator: Accelerator) -> None:
    """Read a stage's own data file before any stage starts: a typo must not surface after hours. Pictures are opened later."""
    if cfg.stage == "evaluate":
        for path in test_files(cfg).values():
            stop_for_broken_rows(path, read_rows(path, cfg, ("answer",))[1], cfg, accelerator)
    elif not is_finished(Path(cfg.run_dir, cfg.stage)):
        own = {"warmup": (cfg.sft_data, ("response",)), "sample": (cfg.train_data, ("answer", "key_words"))}
        path, need = own.get(cfg.stage, ("", ()))
        if path := cfg.from_data or path:
            stop_for_broken_rows(path, read_rows(path, cfg, need)[1], cfg, accelerator)
        if cfg.stage == "perception":
            load_clip(cfg, accelerator)  # the same goes for its weights


def prompts_ahead(policy: Policy, batches, cfg: Config):
    """The prompts of each batch of (position, row), made by threads while the caller works on the batch before: no GPU
    waits for pictures. Raises DataError, with the row, where a picture has become unreadable since it was checked.

    Fast tokenizers allow threads as long as none changes padding or truncation; check_policy's prompt has set both.
    """
    instruction = read_instruction(cfg)

    def prompt_of(position: int, row: Row) -> Prompt:
        try:
            return encode_prompt(policy, row, cfg, instruction, position)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None

    with ThreadPoolExecutor(PICTURE_THREADS) as pool:
        begun = ([pool.submit(prompt_of, *item) for item in batch] for batch in batches)
        for batch, _ in itertools.pairwise(itertools.chain(begun, [None])):  # the next one has begun, too
            yield [future.result() for future in batch]


def row_key(policy: Policy, row: Row, cfg: Config, instruction: str) -> str:
    """Of all that a prompt is made from, --max_pixels excepted."""
    model = policy.model.config.model_type, len(policy.processor.tokenizer)
    parts = (*model, cfg.min_pixels, chat_messages(row, instruction), row.images, row.response)
    return hashlib.sha1(str(parts).encode()).hexdigest()


def count_tokens(policy: Policy, row: Row, cfg: Config, instruction: str) -> int | str:
    """Tokens of a row, encoded the way training will; or what is wrong with it."""
    try:
        length = encode_prompt(policy, row, cfg, instruction).inputs["input_ids"].shape[1]
        if row.response:
            length += len(encode_response(policy, row.response))
            if length > cfg.max_sft_length:
                raise DataError(f"prompt and response have {length} tokens, --max_sft_length is {cfg.max_sft_length}")
        return length
    except DataError as error:
        return f"{row.where}: {error}"


def checked_rows(path: str, cfg: Config, policy: Policy, accelerator, need: tuple[str, ...]) -> list[Row]:
    """Rows of a data file, each one encoded once. Broken rows, and rows that lack a field in `need`, stop the run with a
    list of all, or are dropped and counted with --skip_bad_rows.

    Pictures take long to open, so the run folder's checked.json holds the tokens of rows that were good in another stage or
    for another model. They are good here if the limits are no tighter: smaller pictures make no prompt longer.
    """
    rows, problems = read_rows(path, cfg, need)
    if cfg.stage == "sample":  # warm-up rows too, with --warmup_cases hard, are questions here
        rows = [replace(row, response="") for row in rows]
    instruction, record = read_instruction(cfg), Path(cfg.run_dir, "checked.json")
    keys = [row_key(policy, row, cfg, instruction) for row in rows]
    known = json.loads(record.read_text()) if record.is_file() else {}  # {key: (max_pixels, tokens)}

    def is_good(i: int) -> bool:
        max_pixels, tokens = known.get(keys[i], (0, 0))
        limit = cfg.max_sft_length if rows[i].response else cfg.max_prompt_length
        return max_pixels >= cfg.max_pixels and tokens <= limit

    share = range(accelerator.process_index, len(rows), accelerator.num_processes)
    mine = [i for i in share if not is_good(i)]
    with ThreadPoolExecutor(PICTURE_THREADS) as pool:
        found = pool.map(lambda i: count_tokens(policy, rows[i], cfg, instruction), mine)
        title, quiet = f"checking {os.path.basename(path)}", not accelerator.is_main_process
        found = tqdm(found, title, len(mine), leave=False, disable=quiet)
        found = dict(gather_object(list(zip(mine, found))))
    broken = {i: message for i, message in sorted(found.items()) if isinstance(message, str)}
    if accelerator.is_main_process and len(found) > len(broken):
        known |= {keys[i]: (cfg.max_pixels, tokens) for i, tokens in found.items() if i not in broken}
        write_json(record, known)
    stop_for_broken_rows(path, problems + list(broken.values()), cfg, accelerator)
    good = [row for i, row in enumerate(rows) if i not in broken]
    if not good:
        raise DataError(f"{path}: no usable rows")
    return good


def shuffled_batch(rows: list, step: int, batch_size: int, seed) -> list:
    """Batch number `step` of an endless stream of shuffled epochs. The last batch of a run reaches into further epochs."""
    batch = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, len(rows))
        if not batch or i == 0:
            order = torch.randperm(
                len(rows), generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))
            )
        batch.append(rows[order[i]])
    return batch


def number_of_steps(num_rows: int, batch_size: int, cfg: Config) -> int:
    return cfg.max_steps or math.ceil(num_rows * cfg.epochs / batch_size)


def local_share(items: list, accelerator) -> list:
    """This process's contiguous part of a global batch."""
    size = len(items) // accelerator.num_processes
    return items[accelerator.process_index * size : (accelerator.process_index + 1) * size]


def micro_batches(items: list, cfg: Config) -> list[list]:
    return [items[i : i + cfg.micro_batch_size] for i in range(0, len(items), cfg.micro_batch_size)]


SHOWN = ("reward", "clip", "keyword", "format", "length", "accuracy", "kl", "entropy", "tied_groups", "length_tokens", "truncated",
         "loss", "grad_norm")  # fmt: skip


def log_step(folder: Path, cfg: Config, step: int, total: int, metrics: dict, seconds: dict, bar: tqdm, accelerator) -> None:
    """metrics.jsonl (the same on every run with one seed), timing.jsonl (not so), a line on the screen, trackers."""
    metrics = {name: float(f"{value:.6g}") if math.isfinite(value) else str(value) for name, value in metrics.items()}
    timing = {f"{name}_s": round(value, 3) for name, value in seconds.items()}
    timing |= {f"{name}_tokens_per_s": round(metrics["tokens"] / value, 1) for name, value in seconds.items()}
    timing["peak_gib"] = peak_gib(accelerator)
    accelerator.log({**metrics, **timing}, step=step)
    if accelerator.is_main_process:
        append_jsonl(folder / "metrics.jsonl", [{"step": step, **metrics}])
        append_jsonl(folder / "timing.jsonl", [{"step": step, **timing}])
        if cfg.stage != "warmup" or (cfg.print_every and step % cfg.print_every == 0):  # warm-up steps are many and short
            line = "  ".join(f"{name} {float(metrics[name]):.3g}" for name in SHOWN if name in metrics)
            bar.write(f"{cfg.stage} {step}/{total}  {line}  {sum(seconds.values()):.1f} s")
        bar.set_postfix({name: f"{float(metrics[name]):.3f}" for name in ("loss", "reward", "accuracy") if name in metrics})
    bar.update()


# ----------------------------------------------------------------------------------------------------------------------
# Warm-up: supervised fine-tuning on structured rationales


def warmup(cfg: Config, model_path: str, data_path: str, folder: Path, accelerator: Accelerator) -> None:
    """Loss on the response only (paper, section "warm-up"). Writes a model folder and metrics.jsonl."""
    policy, instruction = load_policy(model_path, cfg), read_instruction(cfg)
    rows = checked_rows(data_path, cfg, policy, accelerator, need=("response",))
    rows, dropped = filter_warmup_rows(rows)
    put = sum(in_instruction(row.problem, instruction) != row.problem for row in rows)
    accelerator.print(f"warm-up rows: {len(rows)}; dropped {dropped}")
    accelerator.print(f"  {put} questions are put into the instruction, {len(rows) - put} have it already")
    if not rows:
        raise DataError(f"{data_path}: the warm-up filters dropped every row")
    if accelerator.is_main_process:
        write_json(folder / "summary.json", {"rows": len(rows), "dropped": dropped})
    model, optimizer = prepare_training(policy, cfg, accelerator)
    total = number_of_steps(len(rows), cfg.sft_batch_size, cfg)
    start = load_checkpoint(folder, accelerator)
    bar = tqdm(total=total, initial=start, desc="warmup", disable=not accelerator.is_main_process)
    batches = (shuffled_batch(rows, step, cfg.sft_batch_size, cfg.seed) for step in range(start, total))
    batches = (local_share(list(enumerate(batch)), accelerator) for batch in batches)
    clock = time.perf_counter()
    for step, prompts in enumerate(prompts_ahead(policy, batches, cfg), start + 1):
        examples = [(prompt, encode_response(policy, prompt.row.response)) for prompt in prompts]
        tokens = accelerator.reduce(torch.tensor(sum(len(c) for _, c in examples), device=accelerator.device), "sum")

        def loss_of(examples):
            logprobs, _, _ = model([p for p, _ in examples], [c for _, c in examples], 1.0)
            loss = -logprobs.sum() / tokens
            return loss, {"loss": loss.detach()}

        lr = set_learning_rate(optimizer, cfg, step - 1, total)
        metrics = optimizer_step(accelerator, model, optimizer, cfg, micro_batches(examples, cfg), loss_of)
        metrics |= {"learning_rate": lr, "tokens": float(tokens)}
        log_step(folder, cfg, step, total, metrics, {"update": time.perf_counter() - clock}, bar, accelerator)
        samples = lambda: [{"row": p.row.where, "problem": p.row.problem, "response": p.row.response} for p, _ in examples]
        end_step(folder, cfg, step, total, metrics, samples, accelerator)
        clock = time.perf_counter()
    bar.close()
    with writing(folder):
        save_policy(policy, accelerator, model, folder)


# ----------------------------------------------------------------------------------------------------------------------
# Difficulty sampling: 8 of 8 right is easy, 0 of 8 is hard, the rest is medium


def answer_questions(
    policy: Policy, rows: list[Row], n: int, temperature: float, cfg: Config, clip, path: Path, accelerator
) -> dict[str, list[float]]:
    """Answer each row n times; one JSON line a row in `path`, written as it goes. Resumes where an earlier run stopped.
    Returns the scores of each question, which is all that a process keeps of the answers.

    Each question has its seed, so that an interrupted run, or one on more processes, gives the lines of a whole one.
    """
    earlier = [None]
    if accelerator.is_main_process:
        records = read_jsonl(path)
        write_jsonl(path, records)  # without a torn last line
        earlier = [{record["qid"]: record["scores"] for record in records}]
    broadcast_object_list(earlier)
    done = earlier[0]
    width = generate_batch_size(policy, cfg, accelerator, n) // n * accelerator.num_processes
    starts = range(0, len(rows), width)
    missing = [start for start in starts if any(row.qid not in done for row in rows[start : start + width])]

    def share(start: int) -> list[tuple[int, Row]]:  # this process's part of a chunk
        return list(enumerate(rows[start : start + width], start))[accelerator.process_index :: accelerator.num_processes]

    ahead = prompts_ahead(policy, map(share, missing), cfg)
    bar, right = tqdm(total=len(rows), desc=path.stem, disable=not accelerator.is_main_process), 0.0
    for start in starts:
        chunk = rows[start : start + width]
        if start in missing:
            mine, prompts = share(start), next(ahead)
            rollouts = generate_rollouts(policy, prompts, n, cfg, accelerator, temperature, seed=path.stem)
            score_rollouts(rollouts, clip)
            groups = [rollouts[i * n : (i + 1) * n] for i in range(len(mine))]
            records = [
                {"qid": row.qid, "problem": row.problem, "answer": row.answer, "scores": [r.parts["accuracy"] for r in group], "responses": [r.text for r in group],
                 "parts": [r.parts for r in group], "tokens": [len(r.tokens) for r in group], "truncated": [r.truncated for r in group]}
                for (_, row), group in zip(mine, groups)
            ]  # fmt: skip
            made = {record["qid"]: record for record in gather_object(records)}
            new = [made[row.qid] for row in chunk if row.qid not in done]
            done.update({record["qid"]: record["scores"] for record in new})
            if accelerator.is_main_process:
                append_jsonl(path, new)
            stop_if_asked(accelerator)
        bar.update(len(chunk))
        right += sum(sum(done[row.qid]) for row in chunk)
        bar.set_postfix(accuracy=f"{right / n / (start + len(chunk)):.3f}")
    bar.close()
    return {row.qid: done[row.qid] for row in rows}


def split_by_difficulty(rows: list[Row], scores: dict[str, list[float]], n: int) -> dict[str, list[Row]]:
    """easy: all n right, medium: some, hard: none (paper, section "difficulty sampling"). Raises DataError unless each
    question has exactly n scores. [7]"""
    split = {"easy": [], "medium": [], "hard": []}
    for row in rows:
        if len(scores[row.qid]) != n:
            raise DataError(
                f"question {row.qid} has {len(scores[row.qid])} scores instead of {n}: delete rollouts.jsonl and sample again"
            )
        right = sum(scores[row.qid])
        split["easy" if right == n else "hard" if right == 0 else "medium"].append(row)
    return split


def sample(
    cfg: Config, model_path: str, data_path: str, folder: Path, accelerator: Accelerator, need=("answer", "key_words")
) -> None:
    """Answer every question G times with a frozen model; write easy.json, medium.json, hard.json and summary.json.

    The three files have the input's rows unchanged. A group whose answers are all right or all wrong has no advantage and
    teaches reasoning nothing; a question that is always answered right is safe to describe.
    """
    policy = load_policy(model_path, cfg)
    rows = checked_rows(data_path, cfg, policy, accelerator, need)
    policy.to(accelerator.device)
    path = folder / "rollouts.jsonl"
    scores = answer_questions(policy, rows, cfg.group_size, cfg.temperature, cfg, None, path, accelerator)
    split = split_by_difficulty(rows, scores, cfg.group_size)
    if accelerator.is_main_process:
        right = [int(sum(scores[row.qid])) for row in rows]
        truncated = {record["qid"]: sum(record["truncated"]) for record in read_jsonl(path)}
        root = cfg.image_root or os.path.dirname(os.path.abspath(data_path))
        summary = {
            "questions": len(rows),
            **{name: len(part) for name, part in split.items()},
            "accuracy": round(sum(right) / len(right) / cfg.group_size, 4),
            "histogram": {f"{k}/{cfg.group_size}": right.count(k) for k in range(cfg.group_size + 1)},
            "truncated": round(sum(truncated[row.qid] for row in rows) / len(rows) / cfg.group_size, 4),
            "image_root": os.path.relpath(os.path.abspath(root), os.path.abspath(folder)),  # of the three files
        }
        for name, part in split.items():
            write_json(folder / f"{name}.json", [row.raw for row in part])
        write_json(folder / "summary.json", summary)
        print("\n".join(f"  {name}: {value}" for name, value in summary.items()))
    if "key_words" in need and not (split["easy"] and split["medium"]):
        accelerator.print(
            "  An RL stage without questions cannot run: warm up longer, or name a file: --stage perception --from_data FILE"
        )


# ----------------------------------------------------------------------------------------------------------------------
# GRPO: perception RL and reasoning RL are this loop with another reward and other questions


def collect_rollouts(
    policy, prompts: list[Prompt], spare: list[Row], seed: str, cfg: Config, clip, accelerator, vocabulary=frozenset()
):
    """Rollouts, rewards and advantages for this process's questions. `spare` questions, the same on all processes, replace
    groups without spread.

    Returns (rollouts, whole groups in order of position; seconds).
    """
    G, instruction, groups = cfg.group_size, read_instruction(cfg), {}
    seconds = {"rollout": 0.0, "reward": 0.0}
    for attempt in range(cfg.resample_rounds + 1):
        clock = time.perf_counter()
        rollouts = generate_rollouts(policy, prompts, G, cfg, accelerator, cfg.temperature, f"{seed} {attempt}")
        seconds["rollout"] += time.perf_counter() - clock
        clock = time.perf_counter()
        score_rollouts(rollouts, clip, vocabulary)
        seconds["reward"] += time.perf_counter() - clock
        for rollout in rollouts:
            if missing := STAGE_REWARDS[cfg.stage].keys() - rollout.parts.keys():
                raise RewardError(rollout, f"score_parts gave no {', '.join(missing)}, which STAGE_REWARDS weighs")
            rollout.reward = total_reward(rollout.parts, STAGE_REWARDS[cfg.stage])
        groups |= {prompt.position: rollouts[i * G : (i + 1) * G] for i, prompt in enumerate(prompts)}
        if attempt == cfg.resample_rounds:
            break
        tied = [position for position, group in groups.items() if is_tied(torch.tensor([[r.reward for r in group]]))]
        everywhere = sorted(gather_object(tied))  # so that it does not matter how questions are split over processes
        again = [(position, row) for position, row in zip(everywhere, spare) if position in tied]
        prompts = [encode_prompt(policy, row, cfg, instruction, position) for position, row in again]
        spare = spare[len(everywhere) :]
    groups = [groups[position] for position in sorted(groups)]
    rewards = torch.tensor([[r.reward for r in group] for group in groups])  # (P, G)
    for group, advantages in zip(groups, group_advantages(rewards, cfg.advantage_eps, cfg.advantage_std).tolist()):
        for rollout, advantage in zip(group, advantages):
            rollout.advantage = advantage
    return [r for group in groups for r in group], seconds


UPDATE_METRICS = (
    "loss", "kl", "entropy", "clipped_low", "clipped_high", "clipped_dual", "grad_norm", "sampler_gap", "skipped_updates", "masked_updates",
)  # fmt: skip


def update_policy(rollouts: list[Rollout], model, optimizer, cfg: Config, accelerator, off_policy: bool) -> dict[str, float]:
    """One optimizer update on whole groups; this process holds `rollouts` of them. off_policy: the policy has been updated
    since it sampled them."""
    device = accelerator.device
    trains = lambda r: not (cfg.mask_truncated and r.truncated)
    counts = torch.tensor(
        [sum(len(r.tokens) for r in rollouts if trains(r)), sum(trains(r) for r in rollouts)], device=device
    )
    tokens, sequences = accelerator.reduce(counts, "sum").tolist()
    if tokens == 0:  # the whole update is truncated and masked: nothing to learn, and weight decay alone must not act
        return dict.fromkeys(UPDATE_METRICS, 0.0) | {"masked_updates": 1.0}
    totals = {"tokens": tokens, "sequences": sequences}

    padded = lambda rows: pad_sequence(rows, batch_first=True).to(device)  # (C_i,) each -> (B, C)

    def loss_of(batch: list[Rollout]):
        logprobs, entropy, mask = model([r.prompt for r in batch], [r.tokens for r in batch], cfg.temperature)
        sampled = padded([r.old_logprobs for r in batch])
        old = sampled if off_policy else logprobs.detach()  # on-policy: ratio exactly 1 [13]
        ref = padded([r.ref_logprobs for r in batch]) if cfg.kl_coef else None
        mask = mask * torch.tensor([trains(r) for r in batch], device=device)[:, None]
        weights = token_weights(mask, cfg.loss_mean, totals, cfg.max_new_tokens)
        loss, metrics = grpo_loss(
            logprobs, old, ref, torch.tensor([r.advantage for r in batch], device=device), mask, weights, tokens, cfg
        )
        means = {"entropy": entropy, "sampler_gap": (logprobs.detach() - sampled).abs()}
        return loss, {**metrics, **{name: (values * mask).sum() / tokens for name, values in means.items()}}

    metrics = optimizer_step(accelerator, model, optimizer, cfg, micro_batches(rollouts, cfg), loss_of)
    return dict.fromkeys(UPDATE_METRICS, 0.0) | metrics


def add_reference(rollouts: list[Rollout], reference: Policy | None, cfg: Config, accelerator) -> None:
    if reference is not None:
        for rollout, logprobs in zip(rollouts, rollout_logprobs(reference, rollouts, cfg, accelerator)):
            rollout.ref_logprobs = logprobs


def update_on_rollouts(rollouts: list[Rollout], model, reference, optimizer, cfg: Config, accelerator) -> dict[str, float]:
    """One epoch over this process's rollouts: as many updates as the step has update batches. Returns their mean metrics."""
    add_reference(rollouts, reference, cfg, accelerator)
    size = cfg.update_batch_size // accelerator.num_processes * cfg.group_size
    updates = []
    for start in range(0, len(rollouts), size):
        off_policy = start > 0  # at the first update the policy is still the one that sampled
        updates.append(update_policy(rollouts[start : start + size], model, optimizer, cfg, accelerator, off_policy))
    trained = [update for update in updates if not update["masked_updates"]] or updates
    metrics = {name: sum(update[name] for update in trained) / len(trained) for name in UPDATE_METRICS}
    counts = {name: sum(update[name] for update in updates) for name in ("skipped_updates", "masked_updates")}
    return {**metrics, **counts, "sampler_gap": trained[0]["sampler_gap"]}  # later updates have moved away from the sampler


def gather_in_order(rollouts: list[Rollout], records: list[dict]) -> list[dict]:
    """A record per rollout, from all processes, in the order of the step's questions."""
    tagged = gather_object([(r.prompt.position, i, record) for i, (r, record) in enumerate(zip(rollouts, records))])
    return [record for _, _, record in sorted(tagged, key=lambda item: item[:2])]


def rollout_metrics(rollouts: list[Rollout], clip, cfg: Config, accelerator) -> dict[str, float]:
    """Means over all processes: reward and its parts, their spread within groups, groups without spread, lengths."""
    mine = [
        {"reward": r.reward, **r.parts, "length_tokens": len(r.tokens), "truncated": float(r.truncated)} for r in rollouts
    ]
    everyone, metrics = gather_in_order(rollouts, mine), {}
    for name in sorted({name for record in everyone for name in record}):
        values = [record[name] for record in everyone if name in record]  # a part that does not apply to a row is not there
        metrics[name] = sum(values) / len(values)
    rewards = torch.tensor([record["reward"] for record in everyone]).view(-1, cfg.group_size)  # (P, G)
    metrics |= {"reward_std": float(rewards.std(dim=1).mean()), "tied_groups": float(is_tied(rewards).float().mean())}
    metrics["tokens"] = sum(record["length_tokens"] for record in everyone)
    if clip:
        metrics["clip_cut_texts"], clip.cut_texts = sum(gather_object([clip.cut_texts])), 0
    return metrics


CALIBRATION_PAIRS = 256


def calibration_pairs(rows: list[Row], cfg: Config) -> tuple[list[list], list[str], str]:
    """Pictures, a text for each, and what the texts are: descriptions of --sft_data if it is there, else the rows' keywords.

    A broken row is no pair: the stage that trains on it has reported it.
    """
    source, text_of = "keywords", lambda row: ", ".join(row.key_words)
    if os.path.isfile(cfg.sft_data):
        source, text_of = "descriptions of --sft_data", lambda row: parse_response(row.response).description
        rows = [row for row in read_rows(cfg.sft_data, cfg)[0] if row.images]
    drawn = shuffled_batch(rows, 0, min(len(rows), 4 * CALIBRATION_PAIRS), f"{cfg.seed} calibration")
    images = {}  # by text: each text once
    for row in drawn:
        if (text := text_of(row)) and text not in images and len(images) < CALIBRATION_PAIRS:
            with suppress(DataError):
                images[text] = [load_image(path, cfg.min_pixels, cfg.max_pixels) for path in row.images]
    return list(images.values()), list(images), source


def report_calibration(clip: ClipScorer, rows: list[Row], cfg: Config, folder: Path) -> None:
    """Print, and write to clip_calibration.json, what --cosine_lo and --cosine_hi would suit this CLIP model. Changes nothing."""
    images, texts, source = calibration_pairs(rows, cfg)
    if len(texts) < 2:
        return print("CLIP is not calibrated: fewer than two different texts")
    result = {"texts": source, **calibrate(clip, images, texts), "cut_texts": clip.cut_texts}
    clip.cut_texts = 0
    write_json(folder / "clip_calibration.json", result)
    print(f"CLIP on {result['pairs']} pictures and {source}: AUC {result['auc']:.3f}; quartiles of the cosine")
    for name in ("matched", "shuffled"):
        print(f"  {name:<9}" + "".join(f"{q:8.3f}" for q in result[name]))
    print(f"  that suggests --cosine_lo {result['cosine_lo']:.2f} --cosine_hi {result['cosine_hi']:.2f}; "
          f"set are {cfg.cosine_lo} and {cfg.cosine_hi}")  # fmt: skip
    for warning in result["warnings"]:
        print(f"  WARNING: {warning}")


def load_reference(model_path: str, cfg: Config, accelerator: Accelerator) -> Policy | None:
    """The stage's start model, frozen, in the compute dtype; None without a KL term."""
    if not cfg.kl_coef:
        return None
    dtype = torch.bfloat16 if cfg.mixed_precision == "bf16" else torch.float32
    reference = load_policy(model_path, cfg).eval().requires_grad_(False)
    for p in reference.parameters():  # and not the buffers: rounded rotary frequencies are other positions
        p.data = p.data.to(dtype)
    if not accelerator.is_fsdp2:
        return reference.to(accelerator.device)
    # Sharded by torch, because accelerate shards only what has an optimizer.
    for module in (*text_layers(reference), reference):
        fully_shard(module, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return reference


def step_questions(rows: list[Row], step: int, cfg: Config, accelerator) -> tuple[dict[int, Row], list[Row]]:
    """This process's part of every update of the step, as {position in the step: row}, so that an update has the same
    questions on any number of processes; and the questions that may replace those whose groups have no spread."""
    batch = shuffled_batch(rows, step - 1, cfg.rollout_batch_size, cfg.seed)
    spare = shuffled_batch(rows, step - 1, cfg.rollout_batch_size * cfg.resample_rounds, f"{cfg.seed} spare")
    updates = [range(i, i + cfg.update_batch_size) for i in range(0, len(batch), cfg.update_batch_size)]
    mine = [position for update in updates for position in local_share(update, accelerator)]
    taken = {row.qid for row in batch}
    return {position: batch[position] for position in mine}, [row for row in spare if row.qid not in taken]


def train_grpo(cfg: Config, model_path: str, data_path: str, folder: Path, accelerator: Accelerator) -> None:
    """GRPO (arXiv 2402.03300) with the stage's reward. Writes a model folder, metrics.jsonl and samples.jsonl."""
    reward_weights = STAGE_REWARDS[cfg.stage]
    policy = load_policy(model_path, cfg)
    need = ("answer", "key_words") if "keyword" in reward_weights else ("answer",)
    rows = checked_rows(data_path, cfg, policy, accelerator, need)
    if "clip" in reward_weights:
        blind = sum(not row.images for row in rows)
        rows = [row for row in rows if row.images]
        accelerator.print(f"{len(rows)} questions; {blind} without a picture are left out of perception RL")
        if not rows:
            raise DataError(f"{data_path}: no question with a picture")
    clip = load_clip(cfg, accelerator) if "clip" in reward_weights else None
    print_memory_plan(policy, clip, cfg, accelerator)
    model, optimizer = prepare_training(policy, cfg, accelerator)
    reference = load_reference(model_path, cfg, accelerator)
    precision = cfg.keyword_precision and "keyword" in reward_weights
    vocabulary = keyword_set([word for row in rows if precision for word in row.key_words])
    if clip and accelerator.is_main_process and not (folder / "clip_calibration.json").is_file():
        report_calibration(clip, rows, cfg, folder)
    accelerator.wait_for_everyone()
    total = number_of_steps(len(rows), cfg.rollout_batch_size, cfg)
    if len(rows) < (size := cfg.rollout_batch_size):
        accelerator.print(f"{len(rows)} questions for steps of {size}: each repeats some; lower --rollout_batch_size")
    start = load_checkpoint(folder, accelerator)
    bar = tqdm(total=total, initial=start, desc=cfg.stage, disable=not accelerator.is_main_process)
    steps = range(start + 1, total + 1)
    questions = (step_questions(rows, step, cfg, accelerator)[0].items() for step in steps)
    clock = time.perf_counter()
    for step, prompts in zip(steps, prompts_ahead(policy, questions, cfg)):
        waited = time.perf_counter() - clock
        _, spare = step_questions(rows, step, cfg, accelerator)
        seed = f"{cfg.stage} {step}"
        rollouts, seconds = collect_rollouts(policy, prompts, spare, seed, cfg, clip, accelerator, vocabulary)
        seconds["rollout"] += waited
        metrics = rollout_metrics(rollouts, clip, cfg, accelerator)
        clock = time.perf_counter()
        metrics["learning_rate"] = set_learning_rate(optimizer, cfg, step - 1, total)
        metrics |= update_on_rollouts(rollouts, model, reference, optimizer, cfg, accelerator)
        seconds["update"] = time.perf_counter() - clock
        report_rollouts(folder, cfg, step, rollouts, bar, accelerator)
        log_step(folder, cfg, step, total, metrics, seconds, bar, accelerator)
        samples = lambda: [{"row": r.prompt.row.where, "problem": r.prompt.row.problem, "response": r.text, "reward": str(r.reward)}
                   for r in rollouts]  # fmt: skip
        end_step(folder, cfg, step, total, metrics, samples, accelerator)
        clock = time.perf_counter()
    bar.close()
    with writing(folder):
        save_policy(policy, accelerator, model, folder)


def report_rollouts(folder: Path, cfg: Config, step: int, rollouts: list[Rollout], bar, accelerator) -> None:
    """All rollouts of this step into samples.jsonl; now and then the best and the worst of a group on the screen."""
    records = [{"step": step, "qid": r.prompt.row.qid, "prompt": r.prompt.row.problem, "completion": r.text, "truncated": r.truncated,
                "reward": r.reward, "parts": r.parts, "advantage": r.advantage} for r in rollouts]  # fmt: skip
    records = gather_in_order(rollouts, records)
    if not accelerator.is_main_process:
        return
    append_jsonl(folder / "samples.jsonl", records)
    if cfg.print_every and (step == 1 or step % cfg.print_every == 0):
        group = sorted(rollouts[: cfg.group_size], key=lambda r: r.reward)
        for rollout in (group[-1], group[0]):
            parts = "  ".join(f"{name} {value:.2f}" for name, value in rollout.parts.items())
            bar.write(f"--- {rollout.prompt.row.problem} (gold: {rollout.prompt.row.answer})\n{rollout.text}\n"
                      f"--- reward {rollout.reward:.3f}  advantage {rollout.advantage:+.2f}  {parts}")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


COLUMNS = ("accuracy", "keyword", "clip", "format", "tokens", "truncated")
MODES = ("greedy", "sampled")


def test_files(cfg: Config) -> dict[str, str]:
    """{name: path} of the files to evaluate on."""
    paths = (cfg.from_data or cfg.test_data).split(",")
    files = {Path(path).stem: path for path in paths}
    if len(files) < len(paths):
        raise ConfigError(f"--test_data {','.join(paths)}: each file needs a name of its own")
    return files


def evaluate(cfg: Config, policy: Policy, data_path: str, folder: Path, accelerator: Accelerator) -> None:
    """Answer held-out questions greedily and sampled; write predictions and scores.json."""
    rows = checked_rows(data_path, cfg, policy, accelerator, need=("answer",))
    clip = load_clip(cfg, accelerator) if cfg.clip_model else None
    policy.to(accelerator.device)
    for mode, n, temperature in zip(MODES, (1, cfg.eval_samples), (0.0, cfg.eval_temperature)):
        if n:
            answer_questions(policy, rows, n, temperature, cfg, clip, folder / f"predictions_{mode}.jsonl", accelerator)
    if clip and (cut := sum(gather_object([clip.cut_texts]))):
        accelerator.print(f"{cut} sentences were longer than CLIP's text window; it saw the beginning of them")
    if accelerator.is_main_process:
        score_folder(cfg, rows, data_path, folder)


def score_folder(cfg: Config, rows: list[Row], data_path: str, folder: Path) -> None:
    """Grade the predictions saved in a folder: verdicts go into the predictions, totals into scores.json.

    Predictions for a TSV are written in VLMEvalKit's layout too: the input's columns, less the image, and the prediction.
    Raises DataError for a question without a prediction.
    """
    scores, earlier = {}, folder / "scores.json"
    earlier = json.loads(earlier.read_text()) if earlier.is_file() else {}  # a regraded file keeps its temperature
    for mode, temperature in zip(MODES, (0.0, cfg.eval_temperature)):
        path = folder / f"predictions_{mode}.jsonl"
        if saved := {record["qid"]: record for record in read_jsonl(path)}:
            if missing := [row.where for row in rows if row.qid not in saved]:
                raise DataError(
                    f"{path} has no prediction for {len(missing)} questions, the first is {missing[0]}: evaluate first"
                )
            records = [saved[row.qid] for row in rows]
            if other := [
                row.where for row, record in zip(rows, records) if record.get("problem", row.problem) != row.problem
            ]:
                raise DataError(f"{path} answers other questions than {data_path}, first at {other[0]}")
            if len(counts := {len(record["responses"]) for record in records}) > 1:
                raise DataError(
                    f"{path} has {min(counts)} to {max(counts)} responses to a question: it takes the same number for each"
                )
            scores[mode] = {
                "temperature": earlier.get(mode, {}).get("temperature", temperature),
                **score_predictions(rows, records),
            }
            write_jsonl(path, records)
            if data_path.lower().endswith(".tsv"):
                with writing(path):
                    write_tsv_predictions(str(path.with_suffix(".tsv")), rows, records)
    if not scores:
        raise DataError(f"{folder} has no predictions to score")
    write_json(folder / "scores.json", scores)


def regrade(cfg: Config, data_path: str, folder: Path, accelerator: Accelerator) -> None:
    """Score the saved predictions again: after a change of the rules, the gold answers or --benchmark. Needs no model."""
    rows, problems = read_rows(data_path, cfg, ("answer",))
    stop_for_broken_rows(data_path, problems, cfg, accelerator)
    if accelerator.is_main_process:
        if cfg.skip_bad_rows:  # rows that were dropped when their pictures were opened
            saved = {record["qid"] for mode in MODES for record in read_jsonl(folder / f"predictions_{mode}.jsonl")}
            rows = [row for row in rows if row.qid in saved]
        score_folder(cfg, rows, data_path, folder)
    accelerator.wait_for_everyone()


def evaluation_table(title: str, folders: dict[str, Path]) -> str:
    """One table over all models evaluated on a file; at the end of a line the 95 % interval and what the benchmark adds."""
    width, lines = max(map(len, folders)) + 2, []
    scores = {name: json.loads((folder / "scores.json").read_text()) for name, folder in folders.items()}
    for mode, name in itertools.product(MODES, folders):
        if row := scores[name].get(mode):
            cells = ["-" if row[c] is None else f"{row[c]:.{1 if c == 'tokens' else 3}f}" for c in COLUMNS]
            more = {"extracted": row["extracted"]} | {
                key: value for key, value in row["further"].items() if value is not None
            }
            lines.append(f"{name:<{width}}{mode:<10}" + "".join(f"{cell:>11}" for cell in cells)
                         + "   {:.3f}-{:.3f}".format(*row["interval_95"]) + "".join(f"   {key} {more[key]:.4g}" for key in more))  # fmt: skip
            last = row
    header = f"{'model':<{width}}{'decoding':<10}" + "".join(f"{name:>11}" for name in COLUMNS) + "   95 % interval"
    sampled = f"; sampled: {last['responses_each']} responses each, T = {last['temperature']}" if last["temperature"] else ""
    return "\n".join([header, *lines, f"{last['n']} questions of {title}, judged by rule: {last['benchmark']}{sampled}"])


# ----------------------------------------------------------------------------------------------------------------------
# Memory: what a step will need, before it needs it


def kv_bytes(policy: Policy, cfg: Config, n: int) -> int:
    """Bytes of KV cache for one response of n to a prompt, at full length. The fast engine holds the prompt once."""
    text = policy.model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * (2 if cfg.mixed_precision == "bf16" else 4)
    return per_token * (cfg.max_prompt_length // (n if policy.fast else 1) + cfg.max_new_tokens)


def device_bytes(accelerator: Accelerator) -> int:
    """Of this process's GPU; of the machine's memory its share."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_properties(accelerator.device).total_memory
    return psutil.virtual_memory().total // local_processes()


def peak_gib(accelerator: Accelerator) -> float:
    """Of this process so far: GPU memory, on a CPU all of its memory."""
    on_gpu = accelerator.device.type == "cuda"
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    used = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(used / 2**30, 2)


def local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def held_bytes(policy: Policy, cfg: Config, accelerator: Accelerator) -> dict[str, int]:
    """What a process holds all the time, and the copy of the weights that it computes with (gathered, or autocast's)."""
    weights, computes = sum(p.numel() for p in policy.parameters()), 2 if cfg.mixed_precision == "bf16" else 4
    if cfg.stage not in (*STAGE_REWARDS, "dryrun"):  # sampling, evaluation
        return {"weights": 4 * weights, "copy of the weights": 2 * weights if computes == 2 else 0}
    states = 16 if accelerator.is_fsdp2 or accelerator.num_processes == 1 else 20  # DDP has gradient buckets, too
    shards = accelerator.num_processes if accelerator.is_fsdp2 else 1
    return {
        "weights, gradients, Adam": states * weights // shards,
        "copy of the weights": computes * weights if accelerator.is_fsdp2 or computes == 2 else 0,
        "reference model": computes * weights // shards if cfg.kl_coef else 0,
    }


def generate_batch_size(policy: Policy, cfg: Config, accelerator: Accelerator, n: int) -> int:
    """--generate_batch_size, or as many responses (n to a prompt) as fit into half of the memory that the models leave; a
    multiple of n. Computed from the device's whole memory, not from what happens to be free, so that a resumed run has the
    same batches."""
    size = cfg.generate_batch_size
    if not size:
        room = max(0, device_bytes(accelerator) - sum(held_bytes(policy, cfg, accelerator).values())) // 2
        step = cfg.rollout_batch_size // accelerator.num_processes * cfg.group_size
        most = step if cfg.stage in (*STAGE_REWARDS, "dryrun") else 1024  # sampling, evaluation: results come chunk by chunk
        size = min(room // (kv_bytes(policy, cfg, n) + prefill_bytes(policy, cfg, n)), most)
    return max(n, size // n * n)


def prefill_bytes(policy: Policy, cfg: Config, n: int) -> int:
    """Bytes for one response of n to a prompt, beside its KV cache: the widest activations of a prefill, and sample_tokens."""
    text, bytes_ = policy.model.config.get_text_config(), 2 if cfg.mixed_precision == "bf16" else 4
    prompt = cfg.max_prompt_length * (4 * text.hidden_size + 3 * text.intermediate_size) * bytes_
    return prompt // (n if policy.fast else 1) + 6 * text.vocab_size * 4


def memory_plan(policy: Policy, clip: ClipScorer | None, cfg: Config, accelerator: Accelerator) -> dict[str, float]:
    """GiB per process that a GRPO step needs at the configured maximum lengths. Activations are an estimate."""
    text, bytes_ = policy.model.config.get_text_config(), 2 if cfg.mixed_precision == "bf16" else 4
    T, C, B = cfg.max_prompt_length, cfg.max_new_tokens, cfg.micro_batch_size
    tokens = math.ceil(B / cfg.group_size) * T + B * C if policy.fast else B * (T + C)
    layers, layer = text.num_hidden_layers, tokens * (12 * text.hidden_size + 4 * text.intermediate_size) * bytes_
    kept = layer + layers * tokens * text.hidden_size * bytes_ if cfg.gradient_checkpointing else layers * layer
    beside = clip and torch.device(clip.device).type == accelerator.device.type
    plan = {
        **held_bytes(policy, cfg, accelerator),
        "CLIP": sum(p.nbytes for p in clip.model.parameters()) if beside else 0,
        "KV cache of a rollout": kv_bytes(policy, cfg, cfg.group_size)
        * generate_batch_size(policy, cfg, accelerator, cfg.group_size),
        "activations of an update": kept,
        "logits of an update": 4 * min(LOGITS_CHUNK, B * C) * text.vocab_size * 4,
    }
    return {name: value / 2**30 for name, value in plan.items()}


def print_memory_plan(policy: Policy, clip: ClipScorer | None, cfg: Config, accelerator: Accelerator) -> float:
    """The plan beside what there is, and what to lower if it does not fit. Returns the GiB needed at the worst moment."""
    plan, there = memory_plan(policy, clip, cfg, accelerator), device_bytes(accelerator) / 2**30
    *held, rollout, activations, logits = plan.values()
    held, update = sum(held), activations + logits
    needed = held + max(rollout, update)  # they take turns
    for name, value in plan.items():
        accelerator.print(f"  {value:8.2f} GiB  {name}")
    accelerator.print(f"  {needed:8.2f} GiB  needed on each process, {there:.1f} GiB there")
    if needed > there:
        takes = "to lower --micro_batch_size, then --max_new_tokens and --max_pixels"
        takes = "to lower --generate_batch_size" if rollout > update else takes
        sharding = "" if accelerator.is_fsdp2 else ", sharding over several GPUs (configs/fsdp2.yaml)"
        takes = f"more memory{sharding}, or --kl_coef 0 (no reference model)" if held > there else takes
        accelerator.print(f"  THIS DOES NOT FIT: it takes {takes}")
    return needed


# ----------------------------------------------------------------------------------------------------------------------
# Dry run: one GRPO step in the worst case, to know before a run what it will cost


def worst_case_prompts(policy: Policy, count: int, folder: str, cfg: Config) -> list[Prompt]:
    """Prompts of --max_prompt_length tokens with a noise picture of --max_pixels each."""
    side, prompts = math.isqrt(cfg.max_pixels), []
    for i in range(count):
        path, pixels = os.path.join(folder, f"{i}.png"), torch.randint(0, 256, (side, side, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
        prompt = encode_prompt(policy, Row("dryrun", str(i), "a", "1", [path]), cfg, "{question}")
        filler = prompt.inputs["input_ids"][:, :1].expand(1, cfg.max_prompt_length)  # the first token, again and again
        missing = cfg.max_prompt_length - prompt.inputs["input_ids"].shape[1]
        for name, value in prompt.inputs.items():
            if value.shape == prompt.inputs["attention_mask"].shape and name != "attention_mask":
                front = filler if name == "input_ids" else torch.zeros_like(filler)
                prompt.inputs[name] = torch.cat([front[:, :missing], value], 1)
        prompt.inputs["attention_mask"] = torch.ones_like(prompt.inputs["input_ids"])
        prompts.append(prompt)
    return prompts


def allocate_adam(model, optimizer, cfg: Config) -> None:
    """Adam takes its memory at its first step: an empty one, before anything is measured."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    set_learning_rate(optimizer, replace(cfg, learning_rate=0.0), 0, 1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def print_projection(wall: dict, result: dict, cfg: Config, accelerator: Accelerator) -> None:
    """Hours of GRPO over all of --train_data, if it is there, into `result` and on the screen."""
    if os.path.isfile(cfg.train_data):
        rows, problems = read_rows(cfg.train_data, cfg)
        stop_for_broken_rows(cfg.train_data, problems, cfg, accelerator)
        steps = number_of_steps(len(rows), cfg.rollout_batch_size, cfg)
        result["hours"] = round(steps * sum(wall.values()) / 3600, 2)
        hours = f"{steps} such steps, {result['hours']} hours at the most"
        accelerator.print(f"  GRPO on all {len(rows)} questions of {cfg.train_data}: {hours}")


def dryrun(cfg: Config, accelerator: Accelerator) -> None:
    """One full-size GRPO step at the maximum lengths: memory plan and peak, seconds and tokens/s, hours of the whole run.

    No response ends early, rewards are random. Prints a table, and the same as one line "DRYRUN {json}".
    """
    cfg = replace(cfg, mask_truncated=False)  # else there would be no update: no response here ends
    torch.manual_seed(cfg.seed)  # weights (--random_init), pictures and rewards
    policy = load_policy(cfg.from_model or cfg.model, cfg)
    accelerator.print(f"memory plan ({sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters)")
    clip = load_clip(cfg, accelerator) if cfg.clip_model else None
    planned = print_memory_plan(policy, clip, cfg, accelerator)
    model, optimizer = prepare_training(policy, cfg, accelerator)
    reference = load_reference(cfg.from_model or cfg.model, cfg, accelerator)
    policy.banned_ids = sorted({*policy.banned_ids, *policy.end_ids})
    allocate_adam(model, optimizer, cfg)
    with tempfile.TemporaryDirectory() as folder:
        prompts = worst_case_prompts(policy, cfg.rollout_batch_size // accelerator.num_processes, folder, cfg)
    wall, cpu = {}, {}

    def timed(name, work):
        clocks = time.perf_counter(), time.process_time()
        result = work()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        wall[name], cpu[name] = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
        return result

    generate = lambda prompts, cfg: generate_rollouts(policy, prompts, cfg.group_size, cfg, accelerator, cfg.temperature)
    generate(prompts[:1], replace(cfg, max_new_tokens=2))  # wakes libraries
    rollouts = timed("rollout", lambda: generate(prompts, cfg))
    for rollout in rollouts:  # CLIP's worst case: every token describes the picture
        rollout.text = f"### Image Description: {rollout.text}\n### Rationales:"
    timed("reward", lambda: score_rollouts(rollouts, clip))
    rewards = torch.rand(len(prompts), cfg.group_size)
    for rollout, advantage in zip(rollouts, group_advantages(rewards).flatten().tolist()):
        rollout.advantage = advantage
    timed("reference", lambda: add_reference(rollouts, reference, cfg, accelerator))
    timed("update", lambda: update_on_rollouts(rollouts, model, None, optimizer, cfg, accelerator))
    tokens = sum(len(r.tokens) for r in rollouts) * accelerator.num_processes
    result = {
        "engine": "fast" if policy.fast else "plain", "parameters": sum(p.numel() for p in policy.parameters()),
        "prompt_tokens": prompts[0].inputs["input_ids"].shape[1], "completion_tokens": len(rollouts[0].tokens),
        "responses": len(rollouts) * accelerator.num_processes,
        "wall_s": {name: round(value, 3) for name, value in wall.items()}, "cpu_s": {name: round(value, 3) for name, value in cpu.items()},
        "step_wall_s": round(sum(wall.values()), 3), "step_cpu_s": round(sum(cpu.values()), 3),
        "tokens_per_s": {name: round(tokens / value, 1) for name, value in wall.items() if value},
        "planned_gib": round(planned, 2), "there_gib": round(device_bytes(accelerator) / 2**30, 1),
        "peak_gib": peak_gib(accelerator),
    }  # fmt: skip
    for name in wall:
        accelerator.print(f"  {name:<10}{wall[name]:9.2f} s   {tokens / wall[name]:10.0f} completion tokens/s")
    accelerator.print(f"  peak {result['peak_gib']} GiB, planned {planned:.2f} GiB")
    print_projection(wall, result, cfg, accelerator)
    accelerator.print("DRYRUN " + json.dumps(result))


# ----------------------------------------------------------------------------------------------------------------------
# Survival: signals, a lock on the run folder, files that are whole or not there, faults that say what to do


class RunError(Exception):
    """The world failed in the middle of a run (memory, disk, a reward, numbers): says what, and how to go on."""


class RewardError(RunError):
    """A reward failed on one response."""

    def __init__(self, rollout: Rollout, reason: str):
        row = rollout.prompt.row
        self.sample = {"qid": row.qid, "row": row.where, "problem": row.problem, "answer": row.answer, "response": rollout.text, "error": reason}  # fmt: skip
        super().__init__(f"the reward failed on question {row.qid} ({row.where}): {reason}\nThe response: {rollout.text[:2000]}")  # fmt: skip


class Interrupted(Exception):
    """A signal (args[0]) has stopped the run; what it had in hand is finished and saved."""


class Signals:
    """Inside, SIGTERM and Ctrl-C are only noted, and the run stops where it can go on later: at the end of a step or a chunk.
    A second one, a second or more later (launchers pass on what the terminal has sent to all), stops it at once."""

    number = noted = 0

    def __enter__(self):
        self.number, self.before = 0, {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        if self.number and time.monotonic() - self.noted >= 1:
            os._exit(128 + number)
        if not self.number:
            self.number, self.noted = number, time.monotonic()
            name = signal.Signals(number).name  # os.write: print must not be used inside a signal
            os.write(2, f"\npebr.py: {name}: stops after the step in hand; once more stops at once\n".encode())

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


SIGNALS = Signals()


def stop_if_asked(accelerator: Accelerator, save=lambda: None) -> None:
    """If some process has noted a signal, save and raise Interrupted: on all processes, so that none waits for another."""
    if number := int(accelerator.gather(torch.tensor([SIGNALS.number], device=accelerator.device)).max()):
        save()
        raise Interrupted(number)


@contextmanager
def run_lock(folder: Path, accelerator: Accelerator):
    """One run at a time in a run folder: inside, the main process has run.lock, which the kernel frees if the process is killed.

    Raises ConfigError, on all processes, if the folder is in use or cannot be written."""
    problem, lock = [""], nullcontext()
    if accelerator.is_main_process:
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock = open(folder / "run.lock", "a+")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}, started {time.ctime()}", file=lock, flush=True)
        except RunError as error:
            problem = [str(error)]
        except BlockingIOError:
            lock.seek(0)
            problem = [f"{folder} is in use by {lock.read().strip()}: wait for it, or use another --run_dir"]
        except OSError as error:
            print(f"{folder} cannot be locked here ({error}): take care that no two runs use it at once", flush=True)
    broadcast_object_list(problem)
    if problem[0]:
        raise ConfigError(problem[0])
    with lock:
        yield


@contextmanager
def writing(path: Path):
    """Inside, a full disk or a folder that cannot be written raises RunError, which names the path."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # which is how torch.save says it
            raise
        raise RunError(f"cannot write {path}: {error}\nMake room, or make it writable. Nothing finished is lost: the same command "
                       "then goes on from the last checkpoint.") from error  # fmt: skip


def sync(path: Path) -> None:
    """Returns once the file, or what the folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError) if path.is_dir() else writing(path):  # some filesystems cannot sync a folder
        os.fsync(handle)
    os.close(handle)


OUT_OF_MEMORY = {  # what to lower, by the function that memory ran out in
    "load_policy": "loading a model: take a smaller --model, more processes that shard it, or (GRPO) --kl_coef 0, which needs no reference model",
    "load_clip": "loading CLIP: --clip_device cpu keeps it off the GPU, or take a smaller --clip_model",
    "generate_rollouts": "the rollout: lower --generate_batch_size, then --max_new_tokens",
    "score_rollouts": "the reward: --clip_device cpu keeps CLIP off the GPU",
    "rollout_logprobs": "the reference's log-probs: lower --micro_batch_size, then --max_new_tokens and --max_pixels",
    "optimizer_step": "the update: lower --micro_batch_size, then --max_new_tokens (warm-up: --max_sft_length) and --max_pixels",
    "save_checkpoint": "writing a checkpoint: raise --checkpoint_minutes, or free memory of the machine",
}  # fmt: skip


def out_of_memory(error: BaseException) -> str:
    """Which flag to lower, told from the function that was at work; "" if the error is another one."""
    if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
        return ""
    at_work = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    phases = [text for name, text in OUT_OF_MEMORY.items() if name in at_work]
    phase = phases[0] if phases else "none of the known phases: lower --micro_batch_size or --max_pixels"
    return (f"out of memory in {phase}. The same command with that flag goes on from the last checkpoint (with another length, picture "
            f"size, --kl_coef or model it begins the stage anew, and wants --overwrite).\n{error}")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Checks: settings that cannot work, model folders that are not what they seem


def check_config(cfg: Config, num_processes: int) -> None:
    """Raises ConfigError for settings that cannot work, before anything is loaded."""

    def need(condition, message):
        if not condition:
            raise ConfigError(message)

    for name, allowed in dict(lr_schedule=["constant", "cosine"], loss_mean=["token", "sequence", "constant"], ratio=["token", "sequence"],
                              warmup_cases=["all", "hard"], engine=["auto", "plain"], mixed_precision=["no", "bf16"], clip_device=["", "cpu"]).items():  # fmt: skip
        need(
            getattr(cfg, name) in allowed,
            f"--{name} {getattr(cfg, name)}: must be one of {', '.join(filter(None, allowed))}",
        )
    for f in fields(Config):
        if f.type in (int, float):
            need(0 <= getattr(cfg, f.name) < math.inf, f"--{f.name} {getattr(cfg, f.name)}: must be a number, not negative")
    for name in ("epochs", "max_new_tokens", "micro_batch_size", "min_pixels", "temperature", "sft_batch_size",
                 "rollout_batch_size", "update_batch_size", "grad_clip", "eval_temperature", "keep_checkpoints"):  # fmt: skip
        need(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: must be greater than 0")
    for name in ("DEEPSPEED", "MEGATRON_LM"):  # what accelerate's launcher and its saved config say
        need(os.environ.get(f"ACCELERATE_USE_{name}", "false") == "false",
             f"accelerate is set to use {name}, which is not supported: launch with --multi_gpu, or run `accelerate config` anew")  # fmt: skip
    need(not os.path.isfile(cfg.run_dir), f"--run_dir {cfg.run_dir}: is a file")
    trackers = [str(tracker.value) for tracker in get_available_trackers()]
    need(
        not cfg.log_with or cfg.log_with in trackers,
        f"--log_with {cfg.log_with}: not installed; installed are {', '.join(trackers) or 'none'}",
    )
    need(
        cfg.group_size > 1, f"--group_size {cfg.group_size}: a group of one has no spread, hence no advantage; use 2 or more"
    )
    need(
        cfg.clip_dual == 0 or cfg.clip_dual > 1,
        f"--clip_dual {cfg.clip_dual}: 0 (off) or more than 1, else no bad token has a gradient",
    )
    need(
        not cfg.random_init or cfg.stage == "dryrun",
        "--random_init is for --stage dryrun: nothing trains from random weights",
    )
    need(0 < cfg.top_p <= 1, f"--top_p {cfg.top_p}: must be in (0, 1]")
    need(cfg.min_pixels <= cfg.max_pixels, f"--min_pixels {cfg.min_pixels} is more than --max_pixels {cfg.max_pixels}")
    need(cfg.cosine_lo < cfg.cosine_hi, f"--cosine_lo {cfg.cosine_lo} must be less than --cosine_hi {cfg.cosine_hi}")
    if cfg.stage in (*STAGE_REWARDS, "dryrun"):
        need(cfg.rollout_batch_size % cfg.update_batch_size == 0,
             f"--rollout_batch_size {cfg.rollout_batch_size} is not a multiple of --update_batch_size {cfg.update_batch_size}")  # fmt: skip
        need(cfg.update_batch_size % num_processes == 0,
             f"--update_batch_size {cfg.update_batch_size} does not divide over {num_processes} processes (whole groups stay together)")  # fmt: skip
    need(cfg.stage != "warmup" or cfg.sft_batch_size % num_processes == 0,
         f"--sft_batch_size {cfg.sft_batch_size} does not divide over {num_processes} processes")  # fmt: skip
    need(not cfg.benchmark or cfg.benchmark in BENCHMARKS,
         f"--benchmark {cfg.benchmark}: must be one of {', '.join(BENCHMARKS)}")  # fmt: skip
    need(not cfg.regrade or cfg.stage == "evaluate", "--regrade is for --stage evaluate")
    advice = {"sft_data": ", or (no warm-up) --stage sample --from_model MODEL", "train_data": "", "test_data": ""}
    for stage, name in (("warmup", "sft_data"), ("sample", "train_data"), ("evaluate", "test_data")):
        need(cfg.stage != stage or getattr(cfg, name) or cfg.from_data, f"--stage {stage} needs --{name}{advice[name]}")
    need(cfg.stage != "perception" or cfg.clip_model,
         "--stage perception needs --clip_model, for example ViT-L-14-336-quickgelu/openai or fg-clip:my_fg_clip_folder")  # fmt: skip


def check_model_flag(flags: dict, cfg: Config) -> None:
    """Raises ConfigError where --model was left out in a run folder of a real model: the toy's settings would apply."""
    for path in [] if "model" in flags else Path(cfg.run_dir).glob("*/run_config.json"):
        model = ""
        with suppress(ValueError, KeyError, TypeError):
            model = json.loads(path.read_text())["model"]
        if model and Path(model).parts[-2:] != ("toy", "model"):
            raise ConfigError(f"{cfg.run_dir} was made with --model {model}: repeat it, and the flags for data")


def told(error: Exception) -> str:
    """A library's error in one line of bearable length, with its type where the message alone says too little."""
    text = str(error) if " " in str(error) else repr(error)
    return " ".join(text.split())[:600]


def folder_advice(path: str, error: Exception) -> str:
    """What to do about a model folder that cannot be loaded."""
    pickles = [file.name for file in sorted(Path(path).glob("*")) if file.suffix in (".bin", ".pt", ".pth")]
    if pickles and not any(Path(path).glob("*.safetensors")):
        return (
            f"{pickles[0]} is a pickle, which is never opened: save the model again as safetensors, as save_pretrained does"
        )
    if not Path(path).exists():
        return (
            "there is no such folder, and from the hub it could not be had: check the name, the network and HF_HUB_OFFLINE"
        )
    if "trust_remote_code" in str(error):
        return "the code in it runs with --trust_remote_code only"
    return "it must be a vision-language model's whole folder: config, safetensors, tokenizer, processor, chat template"


def check_policy(path: str, model, processor, broken: list[str]) -> None:
    """Raises ConfigError for a folder that loads, but not to the model that was meant. broken: tensors that did not fit."""
    broken += [name for name, p in model.named_parameters() if not p.isfinite().all()]
    rows, words = model.get_input_embeddings().num_embeddings, len(processor.tokenizer)
    if broken:
        raise ConfigError(f"{path}: {len(broken)} tensors are missing, of another shape or not finite, first {broken[0]}: "
                          "its weights belong to another config.json, or are incomplete")  # fmt: skip
    if words > rows:
        raise ConfigError(f"{path}: its tokenizer has {words} tokens, the model only {rows}: it belongs to another model")
    ids = {name: getattr(model.config, name, None) for name in MARK_IDS}
    if wrong := [name for name, i in ids.items() if i is not None and not 0 <= i < rows]:
        raise ConfigError(f"{path}: {wrong[0]} {ids[wrong[0]]} of its config.json is none of the model's {rows} tokens")
    if not getattr(processor, "chat_template", None):
        raise ConfigError(f"{path} has no chat template: add chat_template.jinja to the folder")
    row = Row("", "", "q", "", ["a picture"])
    try:
        prompt = processor_inputs(processor, row, [Image.new("RGB", (112, 112))], "{question}")["input_ids"]
    except Exception as error:  # templates and processors raise what they like
        raise ConfigError(f"{path}: its processor cannot write a prompt with one picture ({told(error)}): "
                          "chat template, tokenizer and processor must come from one model")  # fmt: skip
    marks = [mark for mark in (ids["image_token_id"], ids["image_token_index"]) if mark is not None]
    if marks and not set(marks) & set(prompt[0].tolist()):
        raise ConfigError(f"{path}: its processor marks no picture with the image token {marks[0]} of config.json: "
                          "tokenizer and model must belong together")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Stage folders: what is done, with which settings, and what it was made from


def read_record(folder: Path) -> dict | None:
    """The stage.json of a folder, None without one. Raises ConfigError if it is not what begin_stage has written."""
    if not Path(folder, "stage.json").is_file():
        return None
    with suppress(ValueError):
        record = json.loads(Path(folder, "stage.json").read_text())
        if isinstance(record, dict) and {"finished", "settings", "inputs", "from"} <= record.keys():
            return record
    raise ConfigError(f"{folder}/stage.json is damaged: delete the folder {folder} to make the stage again")


def fingerprint(path: str) -> str:
    """Of a stage's folder: the moment it was finished. Of a file: its content. Of anything else: its name."""
    if os.path.isfile(path):
        return hashlib.sha1(Path(path).read_bytes()).hexdigest()
    if record := read_record(path):
        return record["finished"]
    return os.path.realpath(path) if os.path.isdir(path) else path


def is_finished(folder: Path) -> bool:
    return bool((read_record(folder) or {}).get("finished"))


def replace_file(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_text(text)
        sync(temporary)
        temporary.replace(path)


def write_json(path: Path, value) -> None:
    replace_file(path, json.dumps(value, indent=1))


def begin_stage(folder: Path, cfg: Config, inputs: dict[str, str], asked: bool, accelerator: Accelerator) -> bool:
    """Make or find the stage's folder. True: run it (from its start or its checkpoint); False: it is finished.

    Raises ConfigError if the folder was made from other inputs, or (unless it is finished and nobody asked for it) with
    other settings. One that stopped before it had done anything, at a broken row for example, begins anew.
    """
    settings = {name: getattr(cfg, name) for name in SETTINGS[cfg.stage].split()}
    settings |= {"reward": STAGE_REWARDS.get(cfg.stage), "instruction": read_instruction(cfg)}
    inputs = {name: fingerprint(path) for name, path in inputs.items() if path}
    stop_if_asked(accelerator)
    old = read_record(folder)
    run, changed = not (old and old["finished"]), []
    if old:
        changed = [f"its {name} has changed since" for name in inputs if old["inputs"].get(name) != inputs[name]]
        if asked or run:
            was = old["settings"]
            changed += [
                f"{name} was {was.get(name)!r}, now {value!r}" for name, value in settings.items() if was.get(name) != value
            ]
    anew = bool(old and (cfg.overwrite and asked or run and changed and not resumable(folder)))
    if changed and not anew:
        raise ConfigError(f"{folder} was made otherwise:\n  " + "\n  ".join(changed)
                          + "\nUse another --run_dir, or name the stage with --overwrite to redo it.")  # fmt: skip
    run, removed = run or anew, folder.with_name(f".{folder.name}.removed")
    accelerator.wait_for_everyone()  # all have read what follows may remove
    if accelerator.is_main_process:
        shutil.rmtree(removed, ignore_errors=True)
        with writing(folder):
            if anew:  # renamed first: if this is killed, half of it must not pass for a stage
                shutil.rmtree(folder.rename(removed))
            folder.mkdir(parents=True, exist_ok=True)
        if run:
            write_json(folder / "stage.json", {"stage": cfg.stage, "finished": "", "settings": settings, "inputs": inputs,
                                               "from": {"from_model": cfg.from_model, "from_data": cfg.from_data}})  # fmt: skip
            write_json(folder / "run_config.json", asdict(cfg))  # the whole of it; config.json is the model's
        else:
            remove_leftovers(folder)  # of a run that was killed at the very end
    accelerator.wait_for_everyone()
    if run or asked:
        accelerator.print(f"\n=== {folder}: {'running' if run else 'finished earlier, kept'}", flush=True)
    return run


def resumable(folder: Path) -> bool:
    """Whether there is work in it that a stage would go on from."""
    return any(itertools.chain(*map(folder.rglob, ("checkpoint-*", "rollouts.jsonl", "predictions_*.jsonl"))))


def finish_stage(folder: Path, accelerator: Accelerator) -> None:
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in [*filter(Path.is_file, folder.iterdir()), folder]:
            sync(path)
        write_json(folder / "stage.json", {**read_record(folder), "finished": str(time.time_ns())})
        remove_leftovers(folder)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def remove_leftovers(folder: Path) -> None:
    """Of a finished stage: its checkpoints, and what a kill has left half written (.tmp*: safetensors)."""
    for path in [*checkpoints(folder), folder / "writing"]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".tmp*"):
        path.unlink()


def read_jsonl(path: Path) -> list[dict]:
    """The whole lines of a file that may end in a torn one."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def write_jsonl(path: Path, records: list[dict]) -> None:
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))


def append_jsonl(path: Path, records: list[dict]) -> None:
    with writing(path), open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def torn(checkpoint: Path) -> str:
    """What a checkpoint lacks of what its complete.json lists; "" for a whole one."""
    try:
        files = json.loads((checkpoint / "complete.json").read_text())["files"]
    except (OSError, ValueError, TypeError, KeyError):
        return "complete.json is missing or broken"
    sizes = {name: (checkpoint / name).stat().st_size for name in files if (checkpoint / name).is_file()}
    wrong = [name for name in files if sizes.get(name) != files[name]]
    return f"{wrong[0]} has {sizes.get(wrong[0], 0)} bytes of {files[wrong[0]]}" if wrong else ""


def save_checkpoint(folder: Path, step: int, cfg: Config, accelerator: Accelerator) -> None:
    """Model, optimizer and the random states of every process after `step` steps. The learning rate, the position in the data
    and the seeds of the rollouts follow from the step. Older ones go only when the new one is whole and on the disk."""
    unfinished, target = folder / "writing", folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    accelerator.wait_for_everyone()
    with writing(target):
        accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {str(path.relative_to(unfinished)): path.stat().st_size for path in unfinished.rglob("*") if path.is_file()}
        with writing(target):
            for path in [*unfinished.rglob("*"), *folder.glob("*.jsonl")]:
                sync(path)
            record = {"step": step, "processes": accelerator.num_processes, "sharded": accelerator.is_fsdp2, "files": files}
            write_json(unfinished / "complete.json", record)
            sync(unfinished)
            shutil.rmtree(target, ignore_errors=True)  # a torn one
            unfinished.rename(target)
            sync(folder)
        whole = [checkpoint for checkpoint in checkpoints(folder) if not torn(checkpoint)]
        for checkpoint in set(checkpoints(folder)) - set(whole[-cfg.keep_checkpoints :]):
            shutil.rmtree(checkpoint)
    accelerator.wait_for_everyone()


def load_checkpoint(folder: Path, accelerator: Accelerator) -> int:
    """Steps already done (0 without a whole checkpoint). Log lines that are newer than the checkpoint are taken back."""
    step, found = 0, checkpoints(folder)
    while found and (problem := torn(found[-1])):
        accelerator.print(f"{found[-1]} is torn ({problem}): going back to the one before it")
        found.pop()
    if found:
        record = json.loads((found[-1] / "complete.json").read_text())
        step, processes = record["step"], record["processes"]
        if record["sharded"] != accelerator.is_fsdp2:
            raise ConfigError(
                f"{found[-1]} was made {'with' if record['sharded'] else 'without'} FSDP: start in the same way, or --overwrite"
            )
        accelerator.load_state(str(found[-1]))
        accelerator.print(f"resuming after step {step}")
        if processes != accelerator.num_processes:
            accelerator.print(f"  made by {processes} processes, now {accelerator.num_processes}: the same data and counts, but not bit-identical, "
                              "because sums are added up in another order")  # fmt: skip
    if accelerator.is_main_process:
        for path in map(folder.joinpath, ("metrics.jsonl", "samples.jsonl", "timing.jsonl")):
            if path.is_file():
                write_jsonl(path, [record for record in read_jsonl(path) if record["step"] <= step])
    accelerator.wait_for_everyone()
    return step


def checkpoint_due(folder: Path, cfg: Config, accelerator: Accelerator) -> bool:
    """Whether --checkpoint_minutes have passed since the start or the last checkpoint; the first process decides for all."""
    last = max(path.stat().st_mtime for path in (folder / "stage.json", *checkpoints(folder)))
    due = not cfg.checkpoint_minutes or time.time() - last >= 60 * cfg.checkpoint_minutes
    return bool(broadcast(torch.tensor(int(due), device=accelerator.device)))


def end_step(folder: Path, cfg: Config, step: int, total: int, metrics: dict, samples, accelerator) -> None:
    """After each step, on all processes: stop if too many updates were skipped without a step free of them in between; a
    checkpoint if one is due, or if a signal has come, which then stops the run. samples(): what this process trained on."""
    if metrics["skipped_updates"] and cfg.max_skipped_updates:
        accelerator.wait_for_everyone()
        last = itertools.takewhile(lambda record: record["skipped_updates"], reversed(read_jsonl(folder / "metrics.jsonl")))
        skipped, samples = sum(record["skipped_updates"] for record in last), gather_object(samples())
        if skipped >= cfg.max_skipped_updates:
            if accelerator.is_main_process:
                write_json(folder / "non_finite.json", samples)
            raise RunError(f"step {step}: {skipped:.0f} updates in this and the steps just before had a non-finite loss or gradient and were skipped. The step's "
                           f"samples are in {folder / 'non_finite.json'}; lower --learning_rate (and --overwrite the stage), or raise --max_skipped_updates.")  # fmt: skip
    save = functools.partial(save_checkpoint, folder, step, cfg, accelerator)
    stop_if_asked(accelerator, save)
    if step < total and checkpoint_due(folder, cfg, accelerator):
        save()


# ----------------------------------------------------------------------------------------------------------------------
# Main: which stages have to run, and from what


def run_stage(stage: str, flags: dict, asked: bool, accelerator: Accelerator) -> str:
    """Run one stage, after those it needs. Returns its folder.

    A stage that is finished is not run again; if nobody asked for it, it keeps the start and the data it was made with.
    """
    cfg = resolve(stage, flags, asked)
    folder = Path(cfg.run_dir, stage)
    if not is_finished(folder):
        check_config(cfg, accelerator.num_processes)
    if stage == "dryrun":
        return dryrun(cfg, accelerator)
    if stage == "evaluate":
        return run_evaluation(cfg, folder, accelerator)
    if not asked and (record := read_record(folder)):
        cfg = replace(cfg, **record["from"])
    made = lambda needed: run_stage(needed, flags, False, accelerator)
    if stage == "warmup":
        model, data = cfg.from_model or cfg.model, cfg.from_data or cfg.sft_data
        if cfg.warmup_cases == "hard":
            data = hard_cases(resolve("sample", flags, False), model, data, asked, accelerator)
    elif stage == "sample":
        model, data = cfg.from_model or made("warmup"), cfg.from_data or cfg.train_data
    elif stage == "perception":
        model, data = cfg.from_model or made("warmup"), cfg.from_data or made("sample") + "/easy.json"
    else:
        model, data = cfg.from_model or made("perception"), cfg.from_data or made("sample") + "/medium.json"
    work = {"warmup": warmup, "sample": sample, "perception": train_grpo, "reasoning": train_grpo}[stage]
    if begin_stage(folder, cfg, {"model": model, "data": data}, asked, accelerator):
        if cfg.log_with and stage != "sample":
            accelerator.init_trackers(f"pebr_{stage}", config=asdict(cfg))
        clock = time.perf_counter()
        work(cfg, model, data, folder, accelerator)
        finish_stage(folder, accelerator)
        accelerator.print(f"{folder}: done in {time.perf_counter() - clock:.0f} s")
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []  # else the next stage would log into this run
    return str(folder)


def hard_cases(cfg: Config, model: str, data: str, asked: bool, accelerator: Accelerator) -> str:
    """Warm-up rows that the base model gets wrong every time (the paper's overview figure), by sampling it on them first."""
    folder = Path(cfg.run_dir, "sample_base")
    if begin_stage(folder, cfg, {"model": model, "data": data}, asked, accelerator):
        sample(cfg, model, data, folder, accelerator, need=("answer",))  # warm-up rows have no keywords
        finish_stage(folder, accelerator)
    return str(folder / "hard.json")


def run_evaluation(cfg: Config, folder: Path, accelerator: Accelerator) -> str:
    """Score the base model and every model that the run folder has, or --from_model alone; each once on each file.

    A model's folder holds its predictions and scores; with several files in --test_data, a folder for each.
    """
    stages = [stage for stage in ("warmup", "perception", "reasoning") if is_finished(Path(cfg.run_dir, stage))]
    models = {"base": cfg.model, **{stage: str(Path(cfg.run_dir, stage)) for stage in stages}}
    if cfg.from_model:
        models = {cfg.from_model.strip("./").replace("/", "_"): cfg.from_model}
    files = test_files(cfg)
    target = lambda name, title: folder / name / (title if len(files) > 1 else "")
    if cfg.regrade:  # those that have been evaluated
        models = {name: model for name, model in models.items() if any((folder / name).rglob("predictions_*.jsonl"))}
        if not models:
            raise ConfigError(f"--regrade: {folder} has no predictions; evaluate first")
    for name, model in models.items():
        policy = None
        for title, data in files.items():
            if cfg.regrade:
                regrade(cfg, data, target(name, title), accelerator)
            elif begin_stage(target(name, title), cfg, {"model": model, "data": data}, True, accelerator):
                policy = policy or load_policy(model, cfg)
                evaluate(cfg, policy, data, target(name, title), accelerator)
                finish_stage(target(name, title), accelerator)
    accelerator.wait_for_everyone()
    tables = [
        evaluation_table(Path(data).name, {name: target(name, title) for name in models}) for title, data in files.items()
    ]
    if accelerator.is_main_process and not cfg.from_model:
        replace_file(folder / "table.txt", "\n\n".join(tables) + "\n")
    accelerator.print("\n" + "\n\n".join(tables))
    return str(folder)


def start_accelerator(cfg: Config, cpu: bool) -> Accelerator:
    """What `accelerate launch` was told, with this file's precision. Raises ConfigError for what cannot work."""
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=cfg.mixed_precision, log_with=cfg.log_with or None, project_dir=cfg.run_dir,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else backward divides by what the launcher says
    )  # fmt: skip
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Left alone, accelerate would train with DDP on a CPU, without a word.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("FSDP version 1 cannot gather the weights once a rollout: use configs/fsdp2.yaml")
    if accelerator.distributed_type not in (*PLAIN_TYPES, DistributedType.FSDP):
        raise ConfigError(f"accelerate was told {accelerator.distributed_type}: use configs/fsdp2.yaml, or --multi_gpu")
    return accelerator


def run_stages(flags: dict) -> None:
    stage = flags.get("stage", "all")
    if stage not in STAGES and stage != "all":
        raise ConfigError(f"--stage {stage}: must be one of {', '.join(STAGES)}, all")
    if stage == "all" and {"from_model", "from_data"} & flags.keys():
        raise ConfigError("--from_model and --from_data belong to one stage: name it with --stage")
    stages = [name for name in STAGES if name != "dryrun"] if stage == "all" else [stage]
    configs = [resolve(name, flags) for name in stages]
    cpu = not torch.accelerator.is_available()  # said aloud, or processes that torchrun starts on a CPU stay strangers
    # The others wait while the main process writes a checkpoint; NCCL would give up after ten minutes.
    num_processes = PartialState(cpu=cpu, timeout=timedelta(hours=2)).num_processes
    for cfg in configs:  # all of them before the first one starts
        check_config(cfg, num_processes)
    torch.set_num_threads(configs[0].threads or max(1, os.cpu_count() // local_processes()))
    accelerator = start_accelerator(configs[0], cpu)
    check_model_flag(flags, configs[0])
    with run_lock(Path(configs[0].run_dir), accelerator):
        used = ("test_data", "from_data") if configs[0].regrade else TOY_PATHS
        toy, paths = str(Path(configs[0].run_dir, "toy")), [getattr(configs[0], name) for name in used]
        if any(path.removeprefix("local-dir:").startswith(toy + os.sep) for path in paths) and accelerator.is_main_process:
            with writing(toy):
                build_toy_world(toy, configs[0].seed, ToyConfig())
        accelerator.wait_for_everyone()
        for cfg in configs:
            check_files(cfg, accelerator)
        for name in stages:
            run_stage(name, flags, True, accelerator)
        accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    """Exits with 0; 1 and a message for what can be put right; 2 for a flag that is none; 128 + its number after a signal."""
    flags = parse_flags(sys.argv[1:] if argv is None else argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Else "Removed shared tensor" with each checkpoint of a model with tied embeddings, where nothing is wrong.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    try:
        with SIGNALS:
            run_stages(flags)
    except RewardError as error:
        path = Path(flags.get("run_dir", Config.run_dir), f"reward_error_{PartialState().process_index}.json")
        write_json(path, error.sample)
        sys.exit(f"pebr.py: {error}\nIt is saved in {path}.")
    except (ConfigError, DataError, RunError) as error:
        sys.exit(f"pebr.py: {error}")
    except (MemoryError, RuntimeError) as error:
        if advice := out_of_memory(error):
            sys.exit(f"pebr.py: {advice}")
        raise
    except Interrupted as error:
        again = "the same command, without --overwrite," if flags.get("overwrite") else "the same command"
        PartialState().print(f"pebr.py: stopped by {signal.Signals(error.args[0]).name}; {again} goes on from here")
        sys.exit(128 + error.args[0])


if __name__ == "__main__":
    main()
