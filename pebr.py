"""PeBR: perception before reasoning, in one file.  (arXiv 2509.13031)

Two-stage reinforcement learning for vision-language models: first learn to see, then to reason.

    accelerate launch pebr.py --stage warmup        # supervised: image + question -> structured rationale
    accelerate launch pebr.py --stage sample        # 8 rollouts a question -> easy / medium / hard
    accelerate launch pebr.py --stage perception    # GRPO on easy questions, CLIP and keyword rewards
    accelerate launch pebr.py --stage reasoning     # GRPO on medium questions, accuracy reward
    accelerate launch pebr.py --stage evaluate      # every model that the run has, one table
    accelerate launch pebr.py --stage all           # the five in a row
    accelerate launch pebr.py --stage ablation      # two stages against one, at equal steps, on several seeds
    accelerate launch pebr.py --stage dryrun        # two GRPO steps at full length: memory, seconds, hours

Without more flags this trains a tiny model on a toy world, offline, on a CPU. Each stage fills a folder in
--run_dir and takes its model and data from the stages before it, which it makes first if they are missing.
Rewards are in rewards.py; rows, pictures and the toy world in data.py.

Where this departs from the paper's released code:
 [1] Keywords count in the description only, as whole words; theirs are substrings of the whole response.
 [2] A reward that cannot be computed is an error, never a 0; rows without a picture are left out and counted.
 [3] CLIP encodes each picture once and all descriptions in batches; theirs makes one call per response.
 [4] CLIP reads a long description in windows of whole sentences; theirs cuts it.
 [5] Sections are parsed once, in order; the last answer counts; without an answer section, no accuracy.
 [6] Every token of an update weighs the same, over all micro-batches and processes.
 [7] Difficulty sampling resumes and has exactly n scores per question; theirs appends.
 [8] A group without spread has advantage exactly 0, not rounding noise over epsilon. It keeps its KL term.
 [9] A missing or unreadable picture stops the run before training, with its row; --skip_bad_rows drops it.
[10] --max_length holds at the RL stages' pixel limit; sampling's larger pictures may exceed it.
[11] A prompt goes through the model once per group (in updates: per micro-batch); theirs repeats it.
[12] The instruction is worded anew and is the same in all stages; --prompt_file takes theirs.
[13] From a step's second update on, the sampler's log-probs are the old ones; theirs runs one more forward.
[14] The grader is our own; theirs, mathruler, contradicts a person on 80 of the tests' 175 clear pairs.
Kept as theirs, though open to doubt: log-probs ignore top-p 0.99 (and here the ban on image tokens), so
rollouts come from a slightly narrower distribution than the one that is scored.
"""

import argparse
import base64
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
import fcntl
import functools
from html import escape
import io
import itertools
import json
import logging
import math
import os
from pathlib import Path
import resource
import shutil
import statistics
import sys
import time
import zlib

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, send_to_device, tqdm
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image
import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, LogitsProcessorList
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.integrations import is_fsdp_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging as transformers_logging

from data import IMAGE_MARK, INSTRUCTION, DataError, Row, ToyConfig, build_toy_world, chat_messages
from data import filter_warmup_rows, has_instruction, load_image, load_rows, write_tsv_predictions
from rewards import HEADING, STAGE_REWARDS, ClipError, ClipScorer, evaluation_table, keyword_reward
from rewards import parse_response, score_parts, score_predictions, total_reward

# ------------------------------------------------------------------------------------------------------------
# Config: the paper's settings, what a stage changes, what the toy changes. Flags are made from the fields.

accelerator: Accelerator = None  # set by main: processes, device and precision


def option(default, help: str, training: bool = False, low: float = 0, high: float = math.inf):
    return field(default=default, metadata=dict(help=help, training=training, low=low, high=high))


@dataclass
class Config:
    stage: str = option("all", "one of the stages, all, ablation or dryrun")
    run_dir: str = option("runs/pebr", "folder that holds a folder per stage")
    seed: int = option(0, "everything random follows from it")
    overwrite: bool = option(False, "redo the stage; discards all that was made after it, too")
    checkpoint_minutes: float = option(15.0, "minutes between checkpoints to resume from; 0 = every step")

    model: str = option("toy", "base model: a Hugging Face id or folder, or toy")
    train_data: str = option("", "RL questions: the authors' JSON, or JSONL")
    sft_data: str = option("", "warm-up conversations: sharegpt JSON or JSONL")
    test_data: str = option("", "held-out questions: JSON, JSONL or VLMEvalKit's TSV")
    image_root: str = option("", "folder of the pictures; empty: the data file's folder")
    prompt_file: str = option("", "instruction, with {question} in it; empty: data.INSTRUCTION")
    skip_bad_rows: bool = option(False, "drop and count broken rows instead of stopping")
    max_pixels: int = option(802_816, "larger pictures are reduced to this area (sampling: 5.2 times it)")
    max_length: int = option(2048, "tokens of a prompt (warm-up, 4096: and response); longer is a broken row")
    trust_remote_code: bool = option(False, "run code that comes with the model folder")

    # Training: for the stage that --stage names, not for those it needs; with all (except from_*), for each.
    from_model: str = option("", "model to start from; empty: the stage before (evaluate: all of them)", True)
    from_data: str = option("", "data file; empty: what the stage before made", True)
    learning_rate: float = option(1e-6, "constant in RL; warm-up: 1e-5, 10 %% rising, then cosine", True)
    grad_clip_norm: float = option(1.0, "largest gradient norm; a non-finite one skips the update", True)
    epochs: int = option(1, "passes over the stage's data (warm-up and reasoning: 2)", True, low=1)
    max_steps: int = option(0, "train exactly so many steps; 0 = as --epochs says", True)
    freeze_vision: bool = option(False, "vision tower and projector do not train (warm-up: yes)", True)
    batch_size: int = option(512, "questions per step, in all (perception: 560; warm-up: 128)", True, low=1)
    update_batch_size: int = option(128, "questions per update in RL (perception: 112)", True, low=1)
    group_size: int = option(8, "G, rollouts per question, in sampling and in GRPO", low=1)
    temperature: float = option(1.2, "of the rollouts, and of all log-probs in GRPO", low=0.01)
    top_p: float = option(0.99, "of the rollouts", high=1)
    max_new_tokens: int = option(2048, "longest response; one not ended by then is truncated", low=1)
    kl_coef: float = option(0.01, "weight of the k3 KL to the stage's start model; 0 = no reference model")
    ratio_clip_low: float = option(0.2, "the ratio is clipped at 1 - this")
    ratio_clip_high: float = option(0.3, "the ratio is clipped at 1 + this (DAPO, arXiv 2503.14476)")
    dual_clip: float = option(3.0, "largest ratio of negative advantages, 0 = none (arXiv 1912.09729)")
    clip_model: str = option("", "open_clip name/tag, hf-hub:id, local-dir:folder, or fg-clip:folder")
    cosine_lo: float = option(0.0, "cosine that earns 0 of the CLIP reward", low=-1)
    cosine_hi: float = option(0.4, "cosine that earns all of it (paper: 0.4, for FG-CLIP)", low=-1)
    toy_shapes: float = option(0.1, "toy: share of the RL questions that ask for a shape", high=1)
    ablation_seeds: int = option(3, "the ablation runs with the seeds 0 to this - 1", low=1)
    eval_samples: int = option(1, "sampled responses per question, after the greedy one; 0 = greedy only")
    eval_temperature: float = option(0.5, "of the sampled responses")
    threads: int = option(0, "CPU threads per process; 0 = the cores, shared by the processes")
    fast: bool = option(True, "share prompts within groups (FAST_FAMILIES); off: generate, plain forwards")
    mixed_precision: str = option("bf16", "bf16 (float32 weights, bf16 compute) or no")
    micro_batch_size: int = option(8, "responses per forward; lower it first if memory runs out", low=1)
    generate_batch_size: int = option(128, "responses generated at once per process", low=1)
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass")


STAGES = {  # in order: where each's model and data come from, and the paper's settings that are no defaults
    "warmup": dict(from_model="{model}", from_data="{sft_data}", learning_rate=1e-5, epochs=2,
                   freeze_vision=True, batch_size=128, max_length=4096),
    "sample": dict(from_model="{run_dir}/warmup", from_data="{train_data}"),
    "perception": dict(from_model="{run_dir}/warmup", from_data="{run_dir}/sample/easy.json", batch_size=560,
                       update_batch_size=112),
    "reasoning": dict(from_model="{run_dir}/perception", from_data="{run_dir}/sample/medium.json", epochs=2),
    # The ablation's arms: one stage in the place of two.
    "perception_only": dict(from_model="{run_dir}/warmup", from_data="{run_dir}/sample/easy.json",
                            batch_size=560, update_batch_size=112),
    "reasoning_only": dict(from_model="{run_dir}/warmup", from_data="{run_dir}/sample/medium.json"),
    "mixed": dict(from_model="{run_dir}/warmup", from_data="{run_dir}/sample/easy_and_medium.json"),
    "evaluate": dict(from_data="{test_data}"),
    "dryrun": dict(from_model="{model}", batch_size=560, update_batch_size=112, max_steps=2),
}  # fmt: skip
TOY = {  # --model toy: a 0.9 M parameter model that starts from random weights and has minutes, not days
    "all": dict(model="{run_dir}/toy/model", train_data="{run_dir}/toy/train.json",
                sft_data="{run_dir}/toy/sft.json", test_data="{run_dir}/toy/test.json",
                clip_model="local-dir:{run_dir}/toy/clip", prompt_file="{run_dir}/toy/prompt.txt",
                cosine_hi=0.9, max_length=64, max_new_tokens=80, eval_samples=4, eval_temperature=1.0,
                mixed_precision="no", gradient_checkpointing=False, micro_batch_size=64,
                generate_batch_size=1024),
    "warmup": dict(learning_rate=2e-3, batch_size=32, max_steps=700, freeze_vision=False, max_length=256),
    "perception": dict(learning_rate=1e-4, batch_size=32, update_batch_size=16, max_steps=20),
    "reasoning": dict(learning_rate=1e-4, batch_size=32, update_batch_size=16, max_steps=50, kl_coef=0.1),
    "dryrun": dict(batch_size=32, update_batch_size=16, max_length=128),
}  # fmt: skip
ORDER = ("warmup", "sample", "perception", "reasoning", "evaluate")
ARMS = ("perception_only", "reasoning_only", "mixed")
TOY |= {"perception_only": TOY["perception"], "reasoning_only": TOY["reasoning"], "mixed": TOY["reasoning"]}


class ConfigError(ValueError):
    """A flag, or a combination of flags or folders, that cannot work; says what to change."""


def require(holds, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def resolve(stage: str, flags: dict) -> Config:
    """Config of a stage. The later wins: defaults, stage, toy, flags. Raises ConfigError."""
    settings, given = STAGES[stage], flags | {"stage": stage}
    if flags.get("stage", "all") not in (stage, "all"):  # it is made because the named stage needs it
        given = {n: v for n, v in given.items() if not Config.__dataclass_fields__[n].metadata["training"]}
    if given.get("model", "toy") == "toy":
        given.pop("model", None)
        settings = settings | TOY["all"] | TOY.get(stage, {})
    cfg = Config(**settings | given)
    cfg.run_dir = str(Path(cfg.run_dir))  # without a / at its end
    for f in fields(Config):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if f.type is str and f.name not in given:  # a table's path, made of the fields above it
            setattr(cfg, f.name, value.format(**vars(cfg)))
        require(f.type is str or low <= value <= high, f"--{f.name} {value}: must be from {low} to {high}")
    return cfg


# ------------------------------------------------------------------------------------------------------------
# Policy: a Hugging Face vision-language model, its processor, and questions as tensors

FAST_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # with get_rope_index and explicit positions (3, B, T)
MARK_IDS = "image_token_id image_token_index video_token_id vision_start_token_id vision_end_token_id".split()
SCALED_LOGITS = ["final_logit_softcapping", "logit_scale", "logits_scaling"]  # head_logprobs cannot follow
VISION = ["visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "connector."]  # in names


@dataclass
class Prompt:
    """One question, ready for the model. `inputs`: what the processor returned for it alone, on the CPU."""

    row: Row
    images: list  # PIL, for CLIP
    inputs: dict[str, torch.Tensor]
    position: int = 0  # in its step or file; its rollouts are seeded by it, on whatever process


@dataclass
class Rollout:
    """A response to a prompt, the policy's or (warm-up) the teacher's. Tensors are on the CPU."""

    prompt: Prompt
    tokens: torch.Tensor  # (C,) ids, the end token included if there is one
    text: str = ""
    truncated: bool = False  # no end token within max_new_tokens
    old_logprobs: torch.Tensor | None = None  # (C,) under the policy that sampled, at its temperature


class Policy(torch.nn.Module):
    """A vision-language model and its processor. Its forward gives log-probs: DDP and FSDP see one call."""

    def __init__(self, model, processor, fast: bool):
        super().__init__()
        self.model, self.processor, self.fast = model, processor, fast
        tokenizer, ends = processor.tokenizer, model.generation_config.eos_token_id
        ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        self.end_ids = list(dict.fromkeys(i for i in ends if i is not None))  # each of them ends a response
        self.pad_id = self.end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Picture marks are never sampled: without a picture behind it, one crashes the training forward.
        self.banned_ids = sorted({getattr(model.config, name, None) for name in MARK_IDS} - {None})
        # The folder's generation_config (repetition penalty ...) must not leak into rollouts.
        self.saved_generation_config = model.generation_config
        model.generation_config = GenerationConfig(pad_token_id=self.pad_id)

    def forward(self, rollouts: list[Rollout], temperature: float):
        """Log-probs of the responses' tokens at the temperature they were sampled with, and exact entropy.

        rollouts: B responses, those to one prompt side by side. Returns logprobs (B, C) with gradient,
        entropy (B, C) without, mask (B, C). Float32 softmax over the whole vocabulary, before ban and top-p.
        """
        ids = torch.cat([r.tokens for r in rollouts]).to(accelerator.device)
        score = functools.partial(head_logprobs, self.model.get_output_embeddings(), temperature=temperature)
        with accelerator.autocast():
            hidden = (packed_states if self.fast else plain_states)(self, rollouts)  # (tokens, D)
            # Checkpointed chunks: the (tokens, vocabulary) logits of a real model would be several GiB.
            chunks = zip(hidden.split(LOGITS_CHUNK), ids.split(LOGITS_CHUNK))
            scored = [checkpoint(score, states, chunk, use_reentrant=False) for states, chunk in chunks]
        logprobs, entropy = (torch.cat(values) for values in zip(*scored))  # (tokens,)
        if accelerator.num_processes > 1:  # the vision tower has a gradient also in a batch without pictures
            logprobs = logprobs + 0.0 * sum(p.sum() for p in vision_parameters(self.model) if p.requires_grad)
        lengths, flat = [len(r.tokens) for r in rollouts], (logprobs, entropy, torch.ones_like(entropy))
        return tuple(pad_sequence(values.split(lengths), True) for values in flat)  # (B, C)

    def generate(self, prompts: list[Prompt], n: int, max_new_tokens: int, choose, noise) -> list:
        """n responses to each prompt (see decode). A method, because FSDP has to see it as a forward."""
        return (decode if self.fast else decode_plain)(self, prompts, n, max_new_tokens, choose, noise)


def load_policy(path: str, cfg: Config) -> Policy:
    """Any AutoModelForImageTextToText folder or hub id, from safetensors. Raises ConfigError.

    In float32: at lr 1e-6 a bf16 weight is too coarse to move at all. bf16 compute comes from accelerate.
    """
    require(path.count("/") == 1 or Path(path).is_dir(), f"{path}: no such folder (a hub id has one /)")
    options = dict(trust_remote_code=cfg.trust_remote_code)
    try:
        processor = AutoProcessor.from_pretrained(path, **options)
        options |= dict(dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        model, found = AutoModelForImageTextToText.from_pretrained(path, **options)
    except Exception as error:  # transformers, tokenizers and safetensors raise whatever goes wrong in them
        if should_reduce_batch_size(error):
            raise
        raise ConfigError(f"cannot load a vision-language model from {path}: {error}") from error
    text, missing = model.config.get_text_config(), found["missing_keys"]
    require(not missing, f"{path}: its weights lack {min(missing, default='')}")  # they would be random
    chats = getattr(processor, "chat_template", None) and hasattr(processor, "tokenizer")
    require(chats, f"{path}: no processor with a chat template")
    if scaled := [name for name in SCALED_LOGITS if getattr(text, name, None) not in (None, 1)]:
        raise ConfigError(f"{path}: {scaled[0]} changes its logits, which log-probs here do not follow")
    windows = "sliding_attention" in (getattr(text, "layer_types", None) or [])
    fast = cfg.fast and model.config.model_type in FAST_FAMILIES and not windows
    if fast:
        model.config.text_config._attn_implementation = "shared_prefix"
        if accelerator.device.type == "cuda" and cfg.mixed_precision == "bf16":
            model.config.vision_config._attn_implementation = "varlen_flash"
    policy = Policy(model, processor, fast)
    if cfg.stage == "dryrun":  # every response at full length
        policy.banned_ids += policy.end_ids
    return policy


def vision_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Of the vision tower and the projector, by the names that transformers gives them."""
    return [p for name, p in model.named_parameters() if any(part in name for part in VISION)]


def encode_prompt(policy: Policy, row: Row, cfg: Config, position: int = 0) -> Prompt:
    """Open the row's pictures, render the chat template, run the processor. Raises DataError with the row."""
    processor, messages = policy.processor, chat_messages(row, read_instruction(cfg.prompt_file))
    try:
        for mark in processor.tokenizer.convert_ids_to_tokens(policy.banned_ids):
            if mark in f"{messages}{row.response}":  # the model would look for a picture behind it
                raise DataError(f"its text holds {mark}; only {IMAGE_MARK} marks a picture")
        images = [load_image(path, cfg.max_pixels) for path in row.images]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template has written the special tokens already; the tokenizer must not add a second set.
        inputs = processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)
    except Exception as error:  # templates and processors raise what they like
        raise DataError(f"{row.where}: {error}") from error
    return Prompt(row, images, dict(inputs), position)


PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # the rest is of pictures


def collate(prompts: list[Prompt], completions: list[torch.Tensor], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch [padding, prompt | completion, padding]: completions start in the same column in every row.

    completions: (C_i,) ids, or none at all. Per-token tensors become (B, T + C). Pictures are concatenated
    whole: to repeat or cut them by rows would mix their patches up.
    """
    batch = {}
    for name in dict.fromkeys(name for p in prompts for name in p.inputs):
        values = [p.inputs[name] for p in prompts if name in p.inputs]
        if name not in PER_TOKEN:
            batch[name] = torch.cat(values)
            continue
        fill = pad_id if name == "input_ids" else 0
        batch[name] = pad_sequence([value[0] for value in values], True, fill, padding_side="left")  # (B, T)
        if completions:
            tail = {"input_ids": lambda c: c, "attention_mask": torch.ones_like}.get(name, torch.zeros_like)
            tails = pad_sequence([tail(c) for c in completions], True, fill)
            batch[name] = torch.cat([batch[name], tails], 1)  # (B, T + C)
    return batch


# ------------------------------------------------------------------------------------------------------------
# Rollout

NOISE = 8  # uniform random numbers for a token: one, and one each time that top-p refuses
GOING = 7 / 8  # when no more than this share of a decoding batch is still going, the ended rows leave it


@torch.no_grad()
def generate_rollouts(policy: Policy, prompts: list[Prompt], n: int, cfg: Config, seed: str) -> list[Rollout]:
    """n responses to each prompt, those to one prompt side by side. cfg.temperature 0 is greedy.

    What is sampled follows from `seed` and the prompts' positions, not from the batch or process they are in.
    """
    policy.eval()
    how = dict(temperature=cfg.temperature, top_p=cfg.top_p, banned=policy.banned_ids)
    choose = functools.partial(sample_tokens, **how)
    rollouts = []
    with gathered(policy), accelerator.autocast():
        for chunk in in_batches(prompts, max(1, cfg.generate_batch_size // n)):
            seeds = [f"{cfg.seed} {seed} {prompt.position} {i}" for prompt in chunk for i in range(n)]
            noise = [torch.rand(cfg.max_new_tokens, NOISE, generator=seeded(seed)) for seed in seeds]
            noise = torch.stack(noise).to(accelerator.device)
            sampled = policy.generate(chunk, n, cfg.max_new_tokens, choose, noise)
            for i, (tokens, logprobs) in enumerate(sampled):
                text = policy.processor.tokenizer.decode(tokens, skip_special_tokens=True)
                truncated = tokens[-1].item() not in policy.end_ids
                rollouts.append(Rollout(chunk[i // n], tokens, text, truncated, logprobs))
    policy.train()
    return rollouts


def decode_plain(policy: Policy, prompts: list[Prompt], n: int, max_new_tokens: int, choose, noise) -> list:
    """transformers' generate, for any model, with our own choice of tokens. Returns what decode returns."""
    batch, logprobs = send_to_device(collate(prompts, [], policy.pad_id), accelerator.device), []

    def only_the_chosen(ids, logits):  # a logits processor: (rows, tokens so far), (rows, V) -> (rows, V)
        tokens, chosen = choose(logits, noise[:, len(logprobs)])
        logprobs.append(chosen)
        return torch.full_like(logits, float("-inf")).scatter(1, tokens[:, None], 0.0)

    batch |= dict(eos_token_id=policy.end_ids, pad_token_id=policy.pad_id, max_new_tokens=max_new_tokens)
    ours = dict(do_sample=True, top_k=0, logits_processor=LogitsProcessorList([only_the_chosen]))
    ids = policy.model.generate(**batch, **ours, num_return_sequences=n)[:, batch["input_ids"].shape[1] :]
    return cut_at_end(ids.cpu(), torch.stack(logprobs, 1).cpu(), policy.end_ids)


def cut_at_end(ids: torch.Tensor, logprobs: torch.Tensor, end_ids: list[int]) -> list:
    """ids, logprobs (rows, longest) -> [((C,), (C,))], up to and with the first end token. From positions:
    the padding may be an end token, too."""
    ends = torch.isin(ids, torch.tensor(end_ids))
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, ids.shape[1]).tolist()
    return [(tokens[:n], values[:n]) for tokens, values, n in zip(ids, logprobs, lengths)]


@dataclass
class GroupCache:
    """Keys and values of a decoding batch: each prompt's once for all its responses, and each response's."""

    prompts: list[tuple[torch.Tensor, torch.Tensor]]  # per layer (P, kv heads, T, dim)
    bias: torch.Tensor  # (P, 1, 1, T): 0, or -inf where a prompt is padded
    n: int  # responses to a prompt
    slot: torch.Tensor  # (rows,): row r is response slot % n to prompt slot // n
    own: list[tuple[torch.Tensor, torch.Tensor]]  # per layer (rows, kv heads, max_new_tokens, dim)
    step: int = 0  # tokens of the responses before this one

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows go on, and only their prompts. In place, so there are never two caches."""
        used, prompt = (self.slot[rows] // self.n).unique(return_inverse=True)
        self.slot = prompt * self.n + self.slot[rows] % self.n
        for i, layer in enumerate(self.own):
            for x in layer:
                x[: len(rows), :, : self.step + 1] = x[rows, :, : self.step + 1]
            self.own[i] = tuple(x[: len(rows)] for x in layer)
        if len(used) < len(self.bias):
            self.bias = self.bias[used]
            for i, (keys, values) in enumerate(self.prompts):
                self.prompts[i] = keys[used], values[used]


def prefill(policy: Policy, prompts: list[Prompt], n: int, max_new_tokens: int):
    """One forward over P prompts. Returns the next token's logits (P, V) and position (P, 1), and the cache:
    allocated whole, so what fits at a response's first token fits at its last."""
    batch, next_position = send_to_device(position_prompts(policy, prompts), accelerator.device)
    out = policy.model(**batch, use_cache=True, logits_to_keep=1)
    dtype = out.logits.dtype  # under autocast the cache is float32: its keys come from the rotary embedding
    layers = [(layer.keys.to(dtype), layer.values.to(dtype)) for layer in out.past_key_values.layers]
    rows, (_, heads, _, dim) = len(prompts) * n, layers[0][0].shape
    own = [tuple(x.new_zeros(rows, heads, max_new_tokens, dim) for x in layer) for layer in layers]
    bias = batch["attention_mask"][:, None, None].float().log()  # (P, 1, 1, T)
    cache = GroupCache(layers, bias, n, torch.arange(rows, device=accelerator.device), own)
    return out.logits[:, -1], next_position, cache


def decode(policy: Policy, prompts: list[Prompt], n: int, max_new_tokens: int, choose, noise) -> list:
    """Prefill each prompt and its pictures once [11], decode n responses to each against that one KV cache.

    choose: logits (B, V), noise (B, 8) -> tokens (B,), log-probs (B,). noise: (P * n, max_new_tokens, 8).
    Returns [((C,) tokens, (C,) log-probs)] for P * n responses. A row that has ended goes on until an eighth
    of the batch can leave together, because leaving copies the cache; cut_at_end drops its surplus.
    """
    logits, next_position, cache = prefill(policy, prompts, n, max_new_tokens)
    logits, next_position = logits.repeat_interleave(n, 0), next_position.repeat_interleave(n, 0)
    alive, ends = cache.slot, torch.tensor(policy.end_ids, device=logits.device)  # alive: rows in the batch
    ended, logprobs = torch.zeros_like(alive, dtype=torch.bool), torch.zeros_like(noise[..., 0])
    sampled = torch.zeros_like(logprobs, dtype=torch.long)  # (P * n, max_new_tokens)
    for step in range(max_new_tokens):
        tokens, chosen = choose(logits, noise[alive, step])  # (alive,)
        sampled[alive, step], logprobs[alive, step] = tokens, chosen
        ended = ended | torch.isin(tokens, ends)
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0 or step == max_new_tokens - 1:
            break
        if len(going) <= GOING * len(alive):
            alive, ended, tokens, next_position = (x[going] for x in (alive, ended, tokens, next_position))
            cache.keep(going)
        cache.step = step
        inputs = {"input_ids": tokens[:, None], "position_ids": (next_position + step).expand(3, -1, -1)}
        logits = policy.model(**inputs, group_cache=cache, use_cache=False).logits[:, -1]
    return cut_at_end(sampled.cpu(), logprobs.cpu(), policy.end_ids)


def decode_attention(query, key, value, scaling: float, cache: GroupCache, layer: int):
    """Attention of a new token to its prompt and its own response. query (rows, heads, 1, dim), key and value
    (rows, kv heads, 1, dim) -> (rows, 1, heads, dim). All rows of a prompt meet its keys in one product: they
    are neither repeated nor read n times."""
    prompt_keys, prompt_values = cache.prompts[layer]
    keys, values = cache.own[layer]
    keys[:, :, cache.step], values[:, :, cache.step] = key[:, :, 0].to(value.dtype), value[:, :, 0]
    keys, values = keys[:, :, : cache.step + 1], values[:, :, : cache.step + 1]  # (rows, kv heads, L, dim)
    query = (query * scaling).to(value.dtype)[:, :, 0]  # (rows, heads, dim)
    query = query.unflatten(1, (keys.shape[1], -1))  # (rows, kv heads, R, dim)

    def by_prompt(x):  # (rows, kv heads, R, k) -> (P, kv heads, n * R, k); 0 where a row has left
        placed = x.new_zeros(len(cache.bias) * cache.n, *x.shape[1:])
        placed[cache.slot] = x
        return placed.unflatten(0, (-1, cache.n)).transpose(1, 2).flatten(2, 3)

    def by_row(x):  # and back
        return x.unflatten(2, (cache.n, -1)).transpose(1, 2).flatten(0, 1)[cache.slot]

    to_prompt = by_row(float_scores(by_prompt(query), prompt_keys) + cache.bias)
    weights = torch.cat([to_prompt, float_scores(query, keys)], -1).softmax(-1).to(value.dtype)
    to_prompt, to_own = weights.split([prompt_keys.shape[2], keys.shape[2]], -1)
    out = by_row(by_prompt(to_prompt) @ prompt_values) + to_own @ values  # (rows, kv heads, R, dim)
    return out.flatten(1, 2)[:, None]


def float_scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """query @ keys.mT in float32, as in the training forward; in bf16 a score of 50 would be off by 3 %."""
    if query.is_cuda and query.dtype != torch.float32:  # without a float32 copy of the keys
        scores = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=torch.float32)
        return scores.unflatten(0, query.shape[:2])
    with torch.autocast("cpu", enabled=False):  # which would round them again
        return query.float() @ keys.float().mT


def sample_tokens(logits, noise, temperature: float, top_p: float, banned: list[int]):
    """One token per row of logits (B, V), chosen by noise (B, 8), and its log-prob: (B,), (B,). 0 = greedy.

    The log-prob is what the training forward computes for the token: before the ban and before top-p.
    Top-p by rejection, without sorting the vocabulary: a token is out if more likely ones hold top_p; then
    the row draws again, from those. After 8 refusals (of a small top_p only) it gets the most likely token.
    """
    logits = logits.float() / (temperature or 1.0)
    logprobs, allowed = logits.log_softmax(-1), logits.clone()
    allowed[:, banned] = float("-inf")
    tokens = allowed.argmax(-1)
    p, rows = allowed.softmax(-1), torch.arange(len(logits) if temperature else 0, device=logits.device)
    for u in noise.T:
        if not len(rows):
            break
        sums = p.cumsum(-1)
        drawn = torch.searchsorted(sums, u[rows, None] * sums[:, -1:], right=True).clamp(max=p.shape[1] - 1)
        p_drawn = p.gather(-1, drawn)  # (rows, 1)
        more_likely = torch.where(p > p_drawn, p, 0.0)
        inside = (more_likely.sum(-1) < top_p) & (p_drawn[:, 0] > 0)  # > 0: the sums are rounded
        tokens[rows[inside]] = drawn[inside, 0]
        p, rows = more_likely[~inside], rows[~inside]
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------------------
# Log-probs

LOGITS_CHUNK = 1024  # completion tokens whose logits are held at once


def head_logprobs(head, hidden: torch.Tensor, ids: torch.Tensor, temperature: float):
    """hidden (N, D), ids (N,) -> log-probs of the ids (N,), entropy (N,)"""
    logprobs = (head(hidden).float() / temperature).log_softmax(-1)  # (N, V)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, ids[:, None])[:, 0], entropy


def plain_states(policy: Policy, rollouts: list[Rollout]) -> torch.Tensor:
    """(tokens, D): for every completion token, the state that predicts it; a prompt per response."""
    lengths = [len(r.tokens) for r in rollouts]
    batch = collate([r.prompt for r in rollouts], [r.tokens for r in rollouts], policy.pad_id)
    inputs = send_to_device(batch, accelerator.device)
    hidden = policy.model.base_model(**inputs, use_cache=False).last_hidden_state  # (B, T + C, D)
    return torch.cat([row[:n] for row, n in zip(hidden[:, -max(lengths) - 1 : -1], lengths)])


def packed_states(policy: Policy, rollouts: list[Rollout]) -> torch.Tensor:
    """The same states from one row [prompt, c1 ... cG, next prompt, ...] without padding: a prompt goes
    through the model once for its completions [11]. shared_prefix_attention decides which tokens it sees."""
    groups = [list(group) for _, group in itertools.groupby(rollouts, key=lambda r: id(r.prompt))]
    batch, next_position = position_prompts(policy, [group[0].prompt for group in groups])
    row_ids, row_positions, layout = [], [], []
    for i, group in enumerate(groups):
        inputs = [r.tokens[:-1] for r in group]  # a completion's last token predicts nothing: it is no input
        T, lengths = group[0].prompt.inputs["input_ids"].shape[1], [len(c) for c in inputs]
        after = next_position[i] + torch.cat([torch.arange(n) for n in lengths])  # each follows the prompt
        row_ids += [batch["input_ids"][i, -T:], *inputs]
        row_positions += [batch["position_ids"][:, i, -T:], after.expand(3, -1)]
        layout.append((T, lengths))
    inputs = {"input_ids": torch.cat(row_ids)[None], "position_ids": torch.cat(row_positions, -1)[:, None]}
    inputs |= {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
    inputs = send_to_device(inputs, accelerator.device)
    hidden = policy.model.base_model(**inputs, groups=layout, use_cache=False).last_hidden_state[0]
    states = []
    for (T, lengths), rows in zip(layout, hidden.split([T + sum(lengths) for T, lengths in layout])):
        for tail in rows[T:].split(lengths):
            states += [rows[T - 1 : T], tail]  # the prompt's last state predicts every first token
    return torch.cat(states)


def position_prompts(policy: Policy, prompts: list[Prompt]) -> tuple[dict, torch.Tensor]:
    """The left-padded batch with positions (3, B, T) in time, height, width; the next one (B, 1); CPU."""
    batch = collate(prompts, [], policy.pad_id)
    marks = {name: batch.get(name) for name in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
    batch["position_ids"], delta = policy.model.base_model.get_rope_index(batch["input_ids"], **marks)
    del batch["mm_token_type_ids"]  # with positions given, the model has no use for them
    return batch, batch["attention_mask"].sum(-1, keepdim=True) + delta


def shared_prefix_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The language model's attention. With group_cache: a decoding step. With groups [(T, [C1 ... CG])]: a
    row of groups [prompt, c1 ... cG], where completions see their prompt and themselves. Else: sdpa."""
    groups, group_cache = kwargs.pop("groups", None), kwargs.pop("group_cache", None)
    if group_cache is not None:
        return decode_attention(query, key, value, scaling, group_cache, module.layer_idx), None
    if groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast's rotary embedding gives float32
    sizes = [T + sum(lengths) for T, lengths in groups]
    parts = zip(*(x.split(sizes, 2) for x in (query, key, value)))
    rows = [group_attention(*part, *group, scaling) for part, group in zip(parts, groups)]
    return torch.cat(rows, 2).transpose(1, 2).contiguous(), None


def group_attention(query, key, value, T: int, lengths: list[int], scaling: float) -> torch.Tensor:
    """(1, heads, T + C1 + ... + CG, dim) of one group. Completions are padded in here, and nowhere else."""
    sdpa, L = functools.partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=True), max(lengths)
    if len(lengths) == 1 or L == 0:  # nothing behind the prompt but one completion: plainly causal
        return sdpa(query, key, value, is_causal=True)

    def padded(x):  # (G, heads, L, dim); padded queries are dropped below, padded keys come after all others
        return torch.cat([F.pad(c, (0, 0, 0, L - c.shape[2])) for c in x[:, :, T:].split(lengths, 2)])

    def with_prompt(x):  # (G, heads, T + L, dim)
        return torch.cat([x[:, :, :T].expand(len(lengths), -1, -1, -1), padded(x)], 2)

    prompt = sdpa(query[:, :, :T], key[:, :, :T], value[:, :, :T], is_causal=True)  # (1, heads, T, dim)
    # Lower-right causal: its kernel on CUDA is a flash kernel; that of a dense mask would not be.
    rest = sdpa(padded(query), with_prompt(key), with_prompt(value), attn_mask=causal_lower_right(L, T + L))
    return torch.cat([prompt, *(rest[i : i + 1, :, :n] for i, n in enumerate(lengths))], 2)


def varlen_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The vision tower's attention (1, heads, patches, dim), all windows in one call. transformers' sdpa
    makes a call and a host sync for each; "flash" in the name makes it hand over the windows' ends."""
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    ends, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling)[None], None


AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)
AttentionInterface.register("varlen_flash", varlen_attention)


# ------------------------------------------------------------------------------------------------------------
# Advantages and loss


def is_tied(rewards: torch.Tensor) -> torch.Tensor:
    """rewards (P, G) -> (P,): groups without spread. A spread of float noise is none."""
    return rewards.amax(dim=1) - rewards.amin(dim=1) <= 1e-6


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """rewards (P, G) -> advantages (P, G): (r - mean) / (std + 1e-6) within the group, unbiased std.

    GRPO, arXiv 2402.03300, section 4.1.2 (outcome supervision); exactly 0 for a group without spread [8].
    """
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = centered / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return torch.where(is_tied(rewards)[:, None], 0.0, advantages)


def k3_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(policy || reference) per token: exp(d) - d - 1 with d = ref - policy. GRPO, eq. 4.
    Clamped as in the authors' code ("low_var_kl"): otherwise, at kl_coef 0.01, a token at d = 8 costs as
    much as an advantage of 30."""
    d = (ref_logprobs - logprobs).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(max=10)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, num_tokens, cfg: Config):
    """GRPO's clipped term and KL (eq. 3), plus dual clip: a sum over this micro-batch's tokens divided by the
    update's token count, in the place of eq. 3's mean per response.

    logprobs, old_logprobs, ref_logprobs (or None), mask: (B, C); advantages: (B,); num_tokens: of the update,
    all micro-batches and processes [6]. Returns (loss, metrics): sums over micro-batches and processes.
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # an infinite ratio would make the gradient NaN
    adv = advantages[:, None]
    clipped = ratio.clamp(1 - cfg.ratio_clip_low, 1 + cfg.ratio_clip_high)
    surrogate = torch.min(ratio * adv, clipped * adv)
    dual = (adv < 0) & (ratio > cfg.dual_clip) & (cfg.dual_clip > 0)
    surrogate = torch.where(dual, cfg.dual_clip * adv, surrogate)  # a huge ratio cannot make the loss huge
    kl = torch.zeros_like(ratio) if ref_logprobs is None else k3_kl(logprobs, ref_logprobs)
    token_mean = lambda values: (values * mask).sum() / num_tokens
    loss = token_mean(cfg.kl_coef * kl - surrogate)
    metrics = {
        "loss": loss,
        "kl": token_mean(kl),
        "clipped_low": token_mean((ratio < 1 - cfg.ratio_clip_low) & (adv < 0)),
        "clipped_high": token_mean((ratio > 1 + cfg.ratio_clip_high) & (adv > 0)),
        "clipped_dual": token_mean(dual),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------------------
# Update: shared by warm-up and GRPO, with most of what DDP and FSDP2 need


def prepare_training(policy: Policy, cfg: Config):
    """The policy as accelerate wraps it, in train mode, and its optimizer."""
    kind = policy.model.config.model_type
    accelerator.print(f"engine: {'fast, prompts shared within groups' if policy.fast else 'plain'} ({kind})")
    vision = vision_parameters(policy.model)
    if cfg.freeze_vision:
        require(vision, f"--freeze_vision: {kind} has no {', '.join(VISION)}; use --no-freeze_vision")
        for p in vision:
            p.requires_grad_(False)
    if cfg.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
        policy.model.disable_input_require_grads()  # else backward runs through a frozen vision tower, too
    if accelerator.is_fsdp2:  # computes in bf16, adds gradients up in float32
        plugin = accelerator.state.fsdp_plugin
        # The vision tower stays in the root, which all processes gather, with pictures or without.
        plugin.transformer_cls_names_to_wrap = [type(policy.model.get_decoder().layers[0]).__name__]
        dtype = torch.bfloat16 if cfg.mixed_precision == "bf16" else None
        plugin.mixed_precision_policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    # fused: otherwise, on a GPU, each step takes temporary memory of the size of the weights.
    trained = [p for p in policy.parameters() if p.requires_grad]
    weight_decay = 0.0 if cfg.stage == "warmup" else 0.01  # as in the paper's code
    optimizer = torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=weight_decay, fused=True)
    model, optimizer = accelerator.prepare(policy, optimizer)
    register_fsdp_forward_method(model, "generate")
    return model.train(), optimizer


def optimizer_step(model, optimizer, sums: Counter, learning_rate: float, cfg: Config) -> dict[str, float]:
    """Clip the gradients, update, reset; a non-finite norm or loss skips the update. Returns the metrics,
    added up over processes. No scheduler: a prepared one would advance once per process."""
    norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], cfg.grad_clip_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    totals = accelerator.reduce(torch.stack([value.float() for value in sums.values()]), "sum").tolist()
    metrics = dict(zip(sums, totals))
    finite = bool(torch.isfinite(norm)) and math.isfinite(metrics["loss"])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics |= {"grad_norm": float(norm), "skipped_updates": float(not finite)}
    return metrics | {"learning_rate": learning_rate}


# ------------------------------------------------------------------------------------------------------------
# Warm-up: supervised fine-tuning on structured rationales


def warmup(cfg: Config, folder: Path) -> Policy:
    """Loss on the response only (paper, section "warm-up"). Returns the trained policy."""
    policy = load_policy(cfg.from_model, cfg)
    rows, dropped = filter_warmup_rows(checked_rows(cfg.from_data, cfg, policy, ("response",)))
    own = sum(map(has_instruction, rows))
    accelerator.print(f"{len(rows)} warm-up rows, {own} with an instruction of their own; dropped: {dropped}")
    model, optimizer = prepare_training(policy, cfg)
    log = StepLog(folder, cfg, len(rows))
    encode = lambda row, _: encode_example(policy, row, cfg)
    for step in range(log.step, log.total + 1):
        batch = encode_all(local_questions(rows, step, cfg), encode)
        num_tokens = everywhere(sum(len(example.tokens) for example in batch))
        sums = Counter()
        for micro in in_batches(batch, cfg.micro_batch_size):
            with sync_at_last(model, micro[-1] is batch[-1]):
                logprobs, _, mask = model(micro, 1.0)  # (B, C)
                loss = -(logprobs * mask).sum() / num_tokens
                accelerator.backward(loss * accelerator.num_processes)  # DDP and FSDP average over processes
            sums.update({"loss": loss.detach()})
        metrics = optimizer_step(model, optimizer, sums, warmup_learning_rate(step, log.total, cfg), cfg)
        log.end_step(metrics | {"tokens": num_tokens})
    return policy


def encode_example(policy: Policy, row: Row, cfg: Config) -> Rollout:
    """A warm-up row: the teacher's response and its end token are what is learned, no more and no less."""
    tokenizer = policy.processor.tokenizer
    ids = tokenizer(row.response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Rollout(encode_prompt(policy, row, cfg), torch.tensor(ids), row.response)


def warmup_learning_rate(step: int, total: int, cfg: Config) -> float:
    """Of step 1 ... total: rising for a tenth of them, then a cosine to 0."""
    rising = math.ceil(0.1 * total)
    falling = 0.5 * (1 + math.cos(math.pi * (step - 1 - rising) / max(1, total - rising)))
    return cfg.learning_rate * (step / rising if step <= rising else falling)


# ------------------------------------------------------------------------------------------------------------
# Difficulty sampling: 8 of 8 right is easy, 0 of 8 is hard, the rest is medium


def sample(cfg: Config, folder: Path) -> None:
    """Answer every question G times with a frozen model; write easy, medium and hard.json and a summary.

    The three files have the input's rows unchanged. A group whose answers are all right or all wrong has no
    advantage and teaches reasoning nothing; a question that is always answered right is safe to describe.
    """
    policy, path = load_policy(cfg.from_model, cfg), folder / "rollouts.jsonl"
    rows = checked_rows(cfg.from_data, cfg, policy, ("answer",))
    larger = replace(cfg, max_pixels=round(4_194_304 / 802_816 * cfg.max_pixels))  # the paper's limits [10]
    records = answer_questions(policy.to(accelerator.device), rows, cfg.group_size, larger, path)
    if not accelerator.is_main_process:
        return
    scores = {record["qid"]: [part["accuracy"] for part in record["parts"]] for record in records}
    split = split_by_difficulty(rows, scores, cfg.group_size)
    for name, part in [*split.items(), ("easy_and_medium", split["easy"] + split["medium"])]:
        write_text(folder / f"{name}.json", json.dumps([row.raw for row in part], indent=1))
    right = Counter(int(sum(scores[row.qid])) for row in rows)
    summary = {"questions": len(rows), **{name: len(part) for name, part in split.items()}}
    summary["right of n"] = {k: right[k] for k in range(cfg.group_size + 1)}
    summary["image_root"] = os.path.relpath(cfg.image_root or Path(cfg.from_data).parent, folder)
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    print("\n".join(f"  {name}: {value}" for name, value in summary.items()))


def answer_questions(policy: Policy, rows: list, n: int, cfg: Config, path: Path, clip_scorer=None) -> list:
    """Answer each row n times at cfg.temperature, a JSON line per row in `path`. Resumes: each question has
    its seed, so the lines are those of an uninterrupted run, on any number of processes. Returns the records
    of the rows, on the main process."""
    earlier = read_jsonl(path)
    write_jsonl(path, earlier)  # without a torn last line
    done = set(broadcast_object_list([[record["qid"] for record in earlier]])[0])
    width = max(1, cfg.generate_batch_size // n) * accelerator.num_processes
    chunks = in_batches([(row, position) for position, row in enumerate(rows)], width)
    chunks = [chunk for chunk in chunks if any(row.qid not in done for row, _ in chunk)]
    for chunk in tqdm(chunks, desc=path.stem):
        mine = chunk[accelerator.process_index :: accelerator.num_processes]
        prompts = encode_all(mine, lambda row, i: encode_prompt(policy, row, cfg, i))
        rollouts = generate_rollouts(policy, prompts, n, cfg, path.stem)
        records = answer_records(rollouts, n, parts=score_parts(rollouts, clip_scorer))
        append_jsonl(path, [record for record in records if record["qid"] not in done])
    accelerator.wait_for_everyone()
    saved = {record["qid"]: record for record in read_jsonl(path)}
    return [saved[row.qid] for row in rows if row.qid in saved]


def split_by_difficulty(rows: list[Row], scores: dict[str, list[float]], n: int) -> dict[str, list[Row]]:
    """easy: all n right, medium: some, hard: none (paper, section "difficulty sampling"). Raises DataError
    unless each question has exactly n scores. [7]"""
    split = {"easy": [], "medium": [], "hard": []}
    for row in rows:
        if len(scores[row.qid]) != n:
            raise DataError(f"{row.where}: {len(scores[row.qid])} scores, not {n}; --overwrite samples again")
        right = sum(scores[row.qid])
        split["easy" if right == n else "hard" if right == 0 else "medium"].append(row)
    return split


# ------------------------------------------------------------------------------------------------------------
# GRPO: perception RL and reasoning RL are this loop with another reward and other questions


def train_grpo(cfg: Config, folder: Path) -> Policy:
    """GRPO (arXiv 2402.03300) with the stage's reward. Returns the trained policy."""
    policy, weights = load_policy(cfg.from_model, cfg), STAGE_REWARDS[cfg.stage]
    rows, clip_scorer = grpo_rows(cfg, policy, weights), load_clip(cfg)
    model, optimizer = prepare_training(policy, cfg)
    reference = load_reference(cfg.from_model, cfg)
    update_size = cfg.update_batch_size * cfg.group_size // accelerator.num_processes  # rollouts here
    log = StepLog(folder, cfg, len(rows))
    encode = lambda row, position: encode_prompt(policy, row, cfg, position)
    for step in range(log.step, log.total + 1):
        prompts = encode_all(local_questions(rows, step, cfg), encode)  # P
        # These rollouts serve all updates of the step: the policy that gave them is their old policy.
        rollouts = generate_rollouts(policy, prompts, cfg.group_size, cfg, f"{cfg.stage} {step} 0")
        log.lap("rollout")

        parts = score_parts(rollouts, clip_scorer)  # P * G dicts
        rewards = [total_reward(part, weights, r.prompt.row.where) for part, r in zip(parts, rollouts)]
        advantages = group_advantages(torch.tensor(rewards).view(-1, cfg.group_size)).flatten()  # (P * G,)
        log.lap("reward")

        updates = []
        for update in in_batches(range(len(rollouts)), update_size):  # whole groups
            num_tokens = everywhere(sum(len(rollouts[i].tokens) for i in update))  # of all processes [6]
            sums, first = Counter(), not updates
            for micro in in_batches(update, cfg.micro_batch_size):
                batch = [rollouts[i] for i in micro]
                with torch.no_grad():
                    ref_logprobs = reference(batch, cfg.temperature)[0] if reference else None  # (B, C)
                with sync_at_last(model, micro[-1] == update[-1]):
                    logprobs, entropy, mask = model(batch, cfg.temperature)  # (B, C)
                    sampler_logprobs = pad_sequence([r.old_logprobs for r in batch], True).to(logprobs.device)
                    old_logprobs = logprobs.detach() if first else sampler_logprobs  # ratio 1 at first [13]
                    adv = advantages[list(micro)].to(accelerator.device)  # (B,)
                    loss, terms = grpo_loss(logprobs, old_logprobs, ref_logprobs, adv, mask, num_tokens, cfg)
                    accelerator.backward(loss * accelerator.num_processes)  # DDP and FSDP average over them
                sums.update(terms | {"entropy": (entropy * mask).sum() / num_tokens})
                if first:  # how far the training forward is from the sampler, which should be the same
                    gap = (logprobs.detach() - sampler_logprobs).abs()
                    sums["sampler_gap"] += (gap * mask).sum() / num_tokens
            updates.append(optimizer_step(model, optimizer, sums, cfg.learning_rate, cfg))
        scores = dict(parts=parts, rewards=rewards, advantages=advantages.tolist())
        records = answer_records(rollouts, cfg.group_size, **scores)
        log.end_step(mean_of(updates) | rollout_metrics(records), records)
    return policy


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(cfg: Config, folder: Path) -> None:
    """Answer the held-out questions greedily and sampled, with every model of the run, and print one table.

    Writes folder/<model>/: predictions_*.jsonl, scores.json and, for a TSV, predictions_*.tsv in the
    layout of VLMEvalKit's judge. A model that has scores is not asked again.
    """
    trained = [s for s in STAGES if s != "sample" and Path(cfg.run_dir, s, "done").is_file()]
    models = {"base": cfg.model} | {stage: str(Path(cfg.run_dir, stage)) for stage in trained}
    if cfg.from_model:
        models = {cfg.from_model.strip("./").replace("/", "_"): cfg.from_model}
    rows, clip_scorer = [], load_clip(cfg)
    modes = {"greedy": (1, 0.0), "sampled": (cfg.eval_samples, cfg.eval_temperature)}
    for name, model_path in models.items():
        if (folder / name / "scores.json").is_file():
            continue
        policy, scores = load_policy(model_path, cfg).to(accelerator.device), {}
        rows = rows or checked_rows(cfg.from_data, cfg, policy, ("answer",))
        for mode, (n, temperature) in modes.items():
            path, how = folder / name / f"predictions_{mode}.jsonl", replace(cfg, temperature=temperature)
            records = answer_questions(policy, rows, n, how, path, clip_scorer) if n else []
            if records:
                scores[mode] = {"temperature": temperature, **score_predictions(rows, records)}
                write_jsonl(path, records)  # now with answers and verdicts
                if "index" in rows[0].raw:
                    write_tsv_predictions(str(path.with_suffix(".tsv")), rows, records)
        write_text(folder / name / "scores.json", json.dumps(scores, indent=1))
        policy = None  # before the next one is loaded
        accelerator.wait_for_everyone()
    found = sorted(folder.glob("*/scores.json"), key=os.path.getmtime)  # also those of earlier commands
    scores = {path.parent.name: json.loads(path.read_text()) for path in found}
    table = evaluation_table(scores, f"questions of {Path(cfg.from_data).name}, judged by rule")
    write_text(folder / "table.txt", table + "\n")
    accelerator.print("\n" + table)


# ============================================================================================================
# That was the method. Below: helpers of its loops, logs, checkpoints, report, ablation, run folder, main.
# ============================================================================================================


@functools.cache
def read_instruction(prompt_file: str) -> str:
    text = Path(prompt_file).read_text("utf-8-sig") if prompt_file else INSTRUCTION
    require("{question}" in text, f"--prompt_file {prompt_file}: no {{question}} in it, the question's place")
    return text


def checked_rows(path: str, cfg: Config, policy: Policy | None, need: tuple[str, ...]) -> list[Row]:
    """Rows of a data file that have the fields in `need`; with a policy, each is encoded as in training.
    Broken rows stop the run with the whole list; --skip_bad_rows drops and counts them [9]."""
    root, summary = cfg.image_root, Path(cfg.run_dir, "sample", "summary.json").resolve()
    # A split that this run's sampling wrote: the pictures are where they were.
    if not root and Path(path).resolve().parent == summary.parent and summary.is_file():
        root = str(summary.parent / json.loads(summary.read_text())["image_root"])
    rows, problems = load_rows(path, root, need)

    def problem(row: Row) -> str:
        try:
            example = encode_example(policy, row, cfg)
        except DataError as error:
            return str(error)
        length = example.prompt.inputs["input_ids"].shape[1] + len(example.tokens) * (cfg.stage == "warmup")
        return f"{row.where}: {length} tokens, over --max_length" if length > cfg.max_length else ""

    if policy:
        mine, texts = [(row,) for row in rows[accelerator.process_index :: accelerator.num_processes]], []
        for batch in tqdm(in_batches(mine, 64), desc=f"checking {Path(path).name}", leave=False):
            texts += encode_all(batch, problem)
        found = dict(gather_object([(row.where, text) for (row,), text in zip(mine, texts)]))
        problems += [found[row.where] for row in rows if found[row.where]]
        rows = [row for row in rows if not found[row.where]]
    if problems:
        listed = "\n  ".join([f"{path}: {len(problems)} broken rows", *problems[:50]])
        require(cfg.skip_bad_rows, f"{listed}\n--skip_bad_rows drops them")
        accelerator.print(f"dropped: {listed}")
    require(rows, f"{path}: no usable rows")
    return rows


def grpo_rows(cfg: Config, policy: Policy, weights: dict) -> list[Row]:
    """The stage's questions: with keywords and pictures, where the reward needs them."""
    need = ("answer", "key_words") if "keyword" in weights else ("answer",)
    rows = checked_rows(cfg.from_data, cfg, policy, need)
    if "clip" in weights:
        count, rows = len(rows), [row for row in rows if row.images]
        accelerator.print(f"{len(rows)} questions; {count - len(rows)} without a picture are left out")  # [2]
    if len(rows) < cfg.batch_size:
        accelerator.print(f"{len(rows)} questions for a --batch_size of {cfg.batch_size}: they repeat")
    return rows


def local_questions(rows: list[Row], step: int, cfg: Config) -> list[tuple[Row, int]]:
    """This process's part of every update of a step (from 1), as (row, position in the step): an update has
    the same questions on any number of processes. Question i of a stage is the i % n-th of epoch i // n."""
    first, n = (step - 1) * cfg.batch_size, len(rows)
    order = functools.cache(lambda epoch: torch.randperm(n, generator=seeded(f"{cfg.seed} {epoch}")).tolist())
    mine = range(accelerator.process_index, cfg.batch_size, accelerator.num_processes)
    return [(rows[order((first + i) // n)[(first + i) % n]], i) for i in mine]


def seeded(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(seed.encode()))


def in_batches(items, size: int) -> list:
    return [items[i : i + size] for i in range(0, len(items), size)]


def encode_all(items: list[tuple], encode) -> list:
    """[encode(*item)]: for a GPU in threads; on a CPU in line, since torch already uses all cores."""
    if accelerator.device.type == "cpu":
        return list(itertools.starmap(encode, items))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # this process's share of the cores
        return list(pool.map(encode, *zip(*items)))


def load_reference(model_path: str, cfg: Config) -> Policy | None:
    """The stage's start model, frozen, parameters in the compute dtype; None without a KL term."""
    if not cfg.kl_coef:
        return None
    reference = load_policy(model_path, cfg).eval().requires_grad_(False)
    if cfg.mixed_precision == "bf16":
        for p in reference.parameters():  # not .to(bfloat16): rotary frequencies, a buffer, stay float32
            p.data = p.data.bfloat16()
    if not accelerator.is_fsdp2:
        return reference.to(accelerator.device)
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    for module in (*reference.model.get_decoder().layers, reference):  # accelerate would want an optimizer
        fully_shard(module, reshard_after_forward=True, mp_policy=precision)
    return reference


def load_clip(cfg: Config) -> ClipScorer | None:
    """The CLIP model, next to the policy; None if the stage has no use for it."""
    in_use = cfg.stage == "evaluate" or "clip" in STAGE_REWARDS.get(cfg.stage, ())
    if not (cfg.clip_model and in_use):
        return None
    with accelerator.local_main_process_first():  # it downloads, the others find that done
        return ClipScorer(cfg.clip_model, accelerator.device, cfg.cosine_lo, cfg.cosine_hi)


def everywhere(number: int) -> int:
    """The sum of a number over all processes."""
    return int(accelerator.reduce(torch.tensor(number, device=accelerator.device), "sum"))


def sync_at_last(model, is_last: bool):
    """Context of a micro-batch's forward and backward. DDP exchanges gradients at an update's last one; FSDP
    at each, or it would hold them whole."""
    return nullcontext() if is_last or accelerator.is_fsdp2 else accelerator.no_sync(model)


@contextmanager
def gathered(policy: Policy):
    """Inside, FSDP holds all weights whole: decoding needs no exchange, and processes may take different
    numbers of steps. Without FSDP nothing happens."""
    sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False)
        module.unshard()
    yield
    for module in sharded:  # the policy first: what it sets for all modules, the others set for themselves
        module.reshard()
        module.set_reshard_after_forward(module is not policy)


# ------------------------------------------------------------------------------------------------------------
# Logs and checkpoints


def answer_records(rollouts: list[Rollout], n: int, **scores: list) -> list[dict]:
    """All processes' answers, in the order of the questions: a line of a JSONL file per question, with lists
    of n responses, n of each score, and so on."""
    records = []
    for i in range(0, len(rollouts), n):
        group, prompt = rollouts[i : i + n], rollouts[i].prompt
        record = {"position": prompt.position, "qid": prompt.row.qid}
        record |= {"problem": prompt.row.problem, "answer": prompt.row.answer}
        record |= {"responses": [r.text for r in group], "tokens": [len(r.tokens) for r in group]}
        record |= {"truncated": [r.truncated for r in group]}
        records.append(record | {name: values[i : i + n] for name, values in scores.items()})
    return sorted(gather_object(records), key=lambda record: record["position"])


def rollout_metrics(records: list[dict]) -> dict[str, float]:
    """Means over a step's rollouts."""
    table = lambda name: torch.tensor([record[name] for record in records]).float()  # (P, G)
    rewards, truncated, tokens = map(table, ("rewards", "truncated", "tokens"))
    metrics = {"reward": rewards.mean(), "reward_std": rewards.std(dim=1).mean()}
    metrics |= {"tied_groups": is_tied(rewards).float().mean(), "truncated": truncated.mean()}
    metrics |= {"tokens": tokens.sum(), "length_tokens": tokens.mean()}
    parts = itertools.chain(*(record["parts"] for record in records))
    return mean_of(parts) | {name: float(value) for name, value in metrics.items()}


def mean_of(dicts) -> dict[str, float]:
    """Mean of each number over the dicts that have it: a part that does not apply to a row is not there."""
    values = {}
    for name, value in itertools.chain(*(each.items() for each in dicts)):
        values.setdefault(name, []).append(value)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


SHOWN = ("reward", "clip", "keyword", "accuracy", "format", "length_tokens", "kl", "entropy", "loss")


class StepLog:
    """A training stage's position, clock, progress bar, log files and checkpoints."""

    def __init__(self, folder: Path, cfg: Config, num_rows: int):
        require(num_rows, f"{cfg.from_data}: no row is left")
        self.folder, self.cfg = folder, cfg
        self.total = cfg.max_steps or math.ceil(num_rows * cfg.epochs / cfg.batch_size)
        last = get_last_checkpoint(folder)
        done = int(last.rsplit("-")[-1]) if last else 0
        if last:
            accelerator.load_state(last)
            accelerator.print(f"resuming after step {done}")
        for path in folder.glob("*.jsonl"):  # lines newer than the checkpoint are taken back
            write_jsonl(path, [record for record in read_jsonl(path) if record["step"] <= done])
        self.step = done + 1  # the step in hand, from 1
        self.bar = tqdm(total=self.total, initial=self.step - 1, desc=cfg.stage)
        self.seconds, self.clock, self.saved = {}, time.perf_counter(), time.monotonic()

    def lap(self, name: str) -> None:
        """The time since the last lap was spent on `name`."""
        self.seconds[name], self.clock = time.perf_counter() - self.clock, time.perf_counter()

    def end_step(self, metrics: dict, records: list = ()) -> None:
        """Write metrics.jsonl (the same in each run of a seed), timing.jsonl, samples.jsonl; checkpoint."""
        self.lap("update")
        metrics = {name: float(f"{v:.6g}") if math.isfinite(v) else str(v) for name, v in metrics.items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes of this process, on Linux
        peak = torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else peak
        timing = {f"{name}_s": round(s, 3) for name, s in self.seconds.items()}
        speed = metrics["tokens"] / sum(self.seconds.values())
        timing |= {"tokens_per_s": round(speed, 1), "peak_gib": round(peak / 2**30, 2)}
        for name, lines in (("metrics", [metrics]), ("timing", [timing]), ("samples", records)):
            append_jsonl(self.folder / f"{name}.jsonl", [{"step": self.step, **line} for line in lines])
        self.bar.set_postfix({name: metrics[name] for name in SHOWN if name in metrics}, refresh=False)
        self.bar.update()
        due = time.monotonic() - self.saved >= 60 * self.cfg.checkpoint_minutes
        if everywhere(due and accelerator.is_main_process) and self.step < self.total:
            self.save_checkpoint()
        if self.step % 10 == 0:
            write_report(self.folder.parent)
        self.step, self.clock = self.step + 1, time.perf_counter()

    def save_checkpoint(self) -> None:
        """Model, optimizer and random states after this step; all else follows from the step. It gets its
        name when it is whole: a run that is killed here still has the one before it."""
        unfinished = self.folder / "unfinished"
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            unfinished.rename(self.folder / f"checkpoint-{self.step}")
            rotate_checkpoints(str(self.folder), save_total_limit=1)
        self.saved = time.monotonic()


def save_policy(policy: Policy, folder: Path) -> None:
    """A complete Hugging Face folder, in float32, so that the next stage goes on from the exact weights."""
    state = accelerator.get_state_dict(policy.model)  # collective: on every process
    for name in policy.model.all_tied_weights_keys:
        state.pop(name, None)  # FSDP gathers tied weights twice
    if accelerator.is_main_process:
        policy.model.generation_config = policy.saved_generation_config
        policy.model.save_pretrained(folder, state_dict=state)
        policy.processor.save_pretrained(folder)


def read_jsonl(path: Path, tail: int = sys.maxsize) -> list[dict]:
    """Whole lines of a file's last bytes, which may end in a torn one. Here and below: main process only."""
    if not (accelerator.is_main_process and path.is_file()):
        return []
    with open(path, "rb") as file:
        start = file.seek(max(0, path.stat().st_size - tail))
        return [json.loads(line) for line in file.read().split(b"\n")[start > 0 : -1]]


def append_jsonl(path: Path, records: list[dict]) -> None:
    if accelerator.is_main_process and records:
        with open(path, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def write_jsonl(path: Path, records: list[dict]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".tmp").write_text(text)
        path.with_name(path.name + ".tmp").replace(path)


# ------------------------------------------------------------------------------------------------------------
# Dry run: what a run will cost


def dryrun(cfg: Config, folder: Path) -> None:
    """Two GRPO steps at full length, measured: a picture of --max_pixels in a prompt of --max_length tokens,
    responses of --max_new_tokens. Prints seconds, tokens/s, peak memory, hours per epoch of --train_data."""
    side, picture, path = math.isqrt(cfg.max_pixels), folder / "noise.png", folder / "rows.json"
    if accelerator.is_main_process:
        shutil.rmtree(folder)  # an earlier dry run, and its checkpoint
        folder.mkdir()
        Image.effect_noise((side, side), 100).save(picture)
        shortest = Row("dryrun", "0", "a", "a", [str(picture)])
        inputs = encode_prompt(load_policy(cfg.from_model, cfg), shortest, cfg).inputs
        problem = "a" + " a" * (cfg.max_length - inputs["input_ids"].shape[1])
        raw = {"problem": problem, "answer": "a", "images": [picture.name], "key_words": ["a"]}
        write_text(path, json.dumps([raw | {"qid": str(i)} for i in range(cfg.batch_size)]))
    accelerator.wait_for_everyone()
    train_grpo(replace(cfg, from_data=str(path), image_root=""), folder)
    for timing in read_jsonl(folder / "timing.jsonl")[-1:]:
        seconds = timing["rollout_s"] + timing["reward_s"] + timing["update_s"]
        rows = len(load_rows(cfg.train_data, cfg.image_root)[0]) if cfg.train_data else 0
        timing["rl_hours"] = round(rows / cfg.batch_size * seconds / 3600, 4)
        print("DRYRUN " + json.dumps(timing))


# ------------------------------------------------------------------------------------------------------------
# Report. All text of models and data is escaped and between tags; the page can neither run nor load anything.

PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"><title>PeBR run</title><style>
:root { color-scheme: light dark; font: 14px/1.5 system-ui, sans-serif } pre { overflow-x: auto }
body { max-width: 1240px; margin: auto; padding: 1em; overflow-wrap: anywhere } small { color: #888 }
.grid { display: grid; gap: 1em; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)) }
article { background: #8881; border-radius: 6px; padding: .8em; max-height: 38em; overflow-y: auto }
.description { border-left: 3px solid #4c8bc0; padding-left: .6em } img { width: 96px } p { margin: .4em 0 }
.k0 { color: #c65; text-decoration: line-through } .k1 { color: #4a6 } svg { width: 100%; max-width: 320px }
.question { display: flex; gap: 1em; margin: 1em 0; white-space: pre-line }</style><h1>PeBR run</h1>"""


def write_report(run_dir: Path) -> None:
    """run_dir/report.html, anew; what is not there yet is left out."""
    if accelerator.is_main_process:
        page = [PAGE, *map(evaluation_section, sorted(run_dir.glob("evaluate/*/table.txt")))]
        page += map(difficulty_section, run_dir.glob("sample/summary.json"))
        page += [training_section(log) for s in (*ORDER, *ARMS) for log in run_dir.glob(f"{s}/metrics.jsonl")]
        write_text(run_dir / "report.html", "".join(page).encode("ascii", "xmlcharrefreplace").decode())


@functools.lru_cache(maxsize=8)
def rows_by_qid(path: str | Path, image_root: str) -> dict[str, Row]:
    with suppress(DataError):  # no rows, or moved
        return {row.qid: row for row in load_rows(str(path), image_root)[0]}
    return {}


def chart(title: str, lines: dict[str, list], left: int = 0) -> str:
    """An SVG of 320 by 250, placed `left` in a wider one. lines: {label: [(x, y), ...]}"""
    xs, ys = zip(*itertools.chain(*lines.values()))
    low, high, start, end = min(ys), max(ys), min(xs), max(xs)
    to_x = lambda x: 40 + 265 * (x - start) / (end - start or 1)
    to_y = lambda y: 185 - 155 * (y - low) / (high - low or 1)
    body = f'<svg x="{left}" width="320" viewBox="0 0 320 250" font-size="12" fill="currentColor">'
    body += f'<text y="16" font-weight="bold">{title}</text><text x="40" y="204">{start:g}</text>'
    body += f'<text x="305" y="204" text-anchor="end">{end:g}</text>'
    for y in (low + (high - low) * tick / 4 for tick in range(5)):
        body += f'<path d="M40 {to_y(y):.1f}h265" stroke="currentColor" opacity=".2"/>'
        body += f'<text y="{to_y(y) + 4:.1f}">{y:.3g}</text>'
    for i, (label, line) in enumerate(lines.items()):
        color = ("#4c8bc0", "#9a76b8", "#d0813a", "#4f9d69")[i]
        points = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in line)
        body += f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'
        body += f'<text x="{40 + 130 * (i % 2)}" y="{224 + 18 * (i // 2)}" fill="{color}">{label}</text>'
    return body + "</svg>"


def gallery(row: Row, heads: list[str] = (), responses: list[str] = ()) -> str:
    """A question, and responses with the keywords that they name or miss and their sections set apart."""
    file, cards = io.BytesIO(), ""
    with suppress(DataError, IndexError):  # moved, or none
        load_image(row.images[0], 40_000).save(file, "WEBP")
    picture = f'<img alt="" src="data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}">'
    section = lambda match: f'</p><p class="{match.lastgroup}"><small>{match[0].strip("#:. ")}</small>'
    for head, text in zip(heads, responses):
        said, body = parse_response(text).description, HEADING.sub(section, escape(text, quote=False))
        words = [f'<span class="k{keyword_reward(said, [w]):.0f}">{escape(w)}</span>' for w in row.key_words]
        cards += f"<article>{head}<p>{', '.join(words)}</p><p>{body}</p></article>"
    problem = f"<div>{escape(row.problem.replace(IMAGE_MARK, ''))} <b>{escape(row.answer)}</b></div>"
    return f'<div class="question">{picture}{problem}</div><div class="grid">{cards}</div>'


def training_section(path: Path) -> str:
    """Curves; of the last 16 questions, the two whose rollouts differ most in reward."""
    metrics, cfg = read_jsonl(path), json.loads(path.with_name("settings.json").read_text())
    curve = lambda name: [(m["step"], m[name]) for m in metrics if isinstance(m.get(name), float)]
    charts = [chart(name, {"": curve(name)}) for name in (*SHOWN, "tied_groups", "truncated") if curve(name)]
    page = f'<h2>{path.parent.name}, step {len(metrics)}</h2><div class="grid">{"".join(charts)}</div>'
    root = cfg["image_root"]
    rows = rows_by_qid(cfg["train_data"], root) | rows_by_qid(cfg["from_data"], root)
    records = read_jsonl(path.with_name("samples.jsonl"), tail=2**20)[-16:]
    spread = lambda record: min(record["rewards"]) - max(record["rewards"])
    for record in sorted((r for r in records if r["qid"] in rows), key=spread)[:2]:
        parts = [", ".join(f"{name} {value:.2f}" for name, value in part.items()) for part in record["parts"]]
        columns = zip(record["advantages"], record["rewards"], parts)
        heads = [f"advantage {a:+.2f}, reward {r:.2f}<br><small>{part}</small>" for a, r, part in columns]
        page += gallery(rows[record["qid"]], heads, record["responses"])
    return page


def difficulty_section(path: Path) -> str:
    """How many questions had 0 ... n right answers; three of each kind."""
    summary, pictures = json.loads(path.read_text()), ""
    for name in ("hard", "medium", "easy"):
        rows = rows_by_qid(path.with_name(f"{name}.json"), str(path.parent / summary["image_root"]))
        pictures += f"<div>{summary[name]} {name}{''.join(map(gallery, list(rows.values())[:3]))}</div>"
    counts, most = summary["right of n"], max(summary["right of n"].values())
    bars = "".join(f"{k:>2} right {n:>6} {'█' * (12 * n // most)}\n" for k, n in counts.items())
    return f'<h2>Difficulty</h2><div class="grid"><pre>{bars}</pre>{pictures}</div>'


def evaluation_section(path: Path) -> str:
    """The table; the three questions on which the last three models differ most in keywords and verdict."""
    cfg, table = json.loads(path.with_name("settings.json").read_text()), path.read_text()
    rows = rows_by_qid(cfg["from_data"], cfg["image_root"])
    models = dict.fromkeys(line.split("  ")[0] for line in table.splitlines()[1:-1])
    answers = zip(*[read_jsonl(path.with_name(model) / "predictions_greedy.jsonl") for model in models])
    grade = lambda record: (record["parts"][0].get("keyword", 0), record["verdicts"][0])
    spread = lambda records: sum(max(g) - min(g) for g in zip(*map(grade, records[-3:])))
    page = f"<h2>Evaluation</h2><pre>{escape(table)}</pre>"
    for records in sorted((each for each in answers if each[0]["qid"] in rows), key=spread)[-3:]:
        heads = [f"<b>{escape(m)}</b> {'right' if grade(r)[1] else 'wrong'}" for m, r in zip(models, records)]
        page += gallery(rows[records[0]["qid"]], heads, [r["responses"][0] for r in records])
    return page


# ------------------------------------------------------------------------------------------------------------
# Ablation: from one warm-up and in as many steps, two stages against perception, reasoning or both in one

LABELS = {"warmup": "warm-up", "perception": "after perception", "reasoning": "two stages"}
LABELS |= {arm: arm.replace("_", " ") for arm in ARMS}
GAP = "two - reasoning"
MISPERCEIVED = "triangle, square"  # the toy's questions that hang on what its teacher sees wrong
FIGURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} 250" font-family="sans-serif"><style>
svg {{ color: #24292f }} @media (prefers-color-scheme: dark) {{ svg {{ color: #d0d7de }} }}</style>{}</svg>"""


def ablation(flags: dict) -> None:
    """Run the arms for each seed, in run folders of their own; write their scores, a table and figures."""
    cfg, scores = resolve("evaluate", flags), {}  # {model: {measure: [its score with each seed]}}
    folder, name = Path(cfg.run_dir, "ablation"), f"shapes{cfg.toy_shapes}"
    for seed in tqdm(range(cfg.ablation_seeds), desc="ablation"):
        run_dir = folder / f"{name}_seed{seed}"
        own = flags | {"run_dir": str(run_dir), "seed": seed}
        run_stages(ORDER[:-1], own)
        logs = [run_dir / stage / "metrics.jsonl" for stage in ("perception", "reasoning")]
        seeing, reasoning = (everywhere(len(read_jsonl(log))) for log in logs)
        run_stages([*ARMS, "evaluate"], own | {"max_steps": seeing + reasoning})
        for model, label in LABELS.items():
            add_scores(scores.setdefault(label, {}), run_dir / "evaluate" / Path(cfg.test_data).stem / model)
    two, one = scores["two stages"], scores["reasoning only"]
    scores[GAP] = {measure: [round(a - b, 4) for a, b in zip(two[measure], one[measure])] for measure in two}
    table = ablation_table(scores)
    write_text(folder / f"{name}.txt", table + "\n")
    write_text(folder / f"{name}.json", json.dumps(scores, indent=1))
    if accelerator.is_main_process:
        write_figures(folder, name, scores, seeing, seeing + reasoning)
    accelerator.print(f"\n{table}\n\n{folder}/{name}.svg shows it")


def add_scores(scores: dict[str, list], folder: Path) -> None:
    """Append a model's scores in an evaluation to the lists of `scores`."""
    modes = json.loads((folder / "scores.json").read_text())
    found = {f"{mode} {name}": modes[mode][name] for name in ("accuracy", "keyword") for mode in modes}
    found[MISPERCEIVED] = modes["greedy"]["categories"].get(MISPERCEIVED, {}).get("accuracy")
    for measure, score in found.items():
        if score is not None:  # data without keywords, or without the toy's categories
            scores.setdefault(measure, []).append(score)


def ablation_table(scores: dict[str, dict]) -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = lambda values: statistics.stdev(values) if len(values) > 1 else 0.0
    lines = [" " * 19 + "".join(f"{measure:>18}" for measure in scores[GAP])]
    for model, measures in scores.items():
        cells = [f"{statistics.fmean(v):>10.3f} ± {deviation(v):.3f}" for v in measures.values()]
        lines.append(f"{model:<19}" + "".join(cells))
    return "\n".join([*lines, f"held-out questions; seeds: {len(scores[GAP]['greedy accuracy'])}"])


def write_figures(folder: Path, name: str, scores: dict[str, dict], seeing: int, end: int) -> None:
    """Greedy scores, mean over the seeds: by RL step, and the gap by --toy_shapes of all runs in `folder`."""
    steps = {"warm-up": 0, "after perception": seeing}
    arms = {"two stages": [*steps, "two stages"]} | {LABELS[arm]: ["warm-up", LABELS[arm]] for arm in ARMS}
    gaps = {float(path.stem[6:]): json.loads(path.read_text())[GAP] for path in folder.glob("shapes*.json")}
    by_step, by_share = {}, {}
    for m in (measure for measure in scores[GAP] if "sampled" not in measure):
        point = lambda model: (steps.get(model, end), statistics.fmean(scores[model][m]))
        by_step[f"{m}, by RL step"] = {arm: [*map(point, models)] for arm, models in arms.items()}
        by_share[m] = [(share, statistics.fmean(gaps[share][m])) for share in sorted(gaps)]
    for stem, panels in (name, by_step), ("shares", {f"{GAP}, by --toy_shapes": by_share}):
        charts = [chart(*panel, left=320 * i) for i, panel in enumerate(panels.items())]
        write_text(folder / f"{stem}.svg", FIGURE.format(320 * len(charts), "".join(charts)))


# ------------------------------------------------------------------------------------------------------------
# Run folder and main: a stage is done or not; redoing it discards the stages after it


def stages_to_run(names: list[str], flags: dict) -> list[Config]:
    """The named stages, and before them those that their models and data come from and that are not done."""
    todo, inputs = [], set()
    for name in reversed(STAGES):
        cfg = resolve(name, flags)
        folder, named = Path(cfg.run_dir, name), name in names
        done = (folder / "done").is_file() and not (named and cfg.overwrite)
        if named or (folder in inputs and not done):
            todo = [cfg, *todo]
            inputs |= set() if done else {Path(cfg.from_model), Path(cfg.from_data).parent}
    return todo


# What may not change once a stage has begun.
PINNED = "seed from_model from_data prompt_file batch_size group_size temperature top_p"
PINNED = dict.fromkeys(STAGES, PINNED) | {"sample": PINNED + " max_new_tokens"}
PINNED["evaluate"] = "seed model from_data prompt_file max_pixels max_length skip_bad_rows top_p clip_model"
PINNED["evaluate"] += " max_new_tokens eval_samples eval_temperature cosine_lo cosine_hi"


def run_stage(cfg: Config) -> None:
    """Fill a stage's folder, unless it is done."""
    folder = Path(cfg.run_dir, cfg.stage, Path(cfg.from_data).stem if cfg.stage == "evaluate" else "")
    if (folder / "done").is_file():
        message = f"{folder} is done, with the flags in its settings.json; --overwrite redoes it"
        return accelerator.print(message, flush=True)
    lasting = cfg.stage not in ("evaluate", "dryrun")  # these may find new models, or another machine
    begun = folder / "settings.json"
    if cfg.stage != "dryrun" and any(path.stat().st_size for path in folder.rglob("*.jsonl")):
        then, now = json.loads(begun.read_text()), asdict(cfg)
        inside = lambda cfg, name: str(cfg[name]).replace(cfg["run_dir"] + "/", "")  # the run folder may move
        for name in now:
            if inside(then, name) != inside(now, name) and name not in ("run_dir", "overwrite"):
                message = f"{folder} was begun with --{name} {then[name]}"
                anew = "--overwrite begins anew, or use another --run_dir"
                require(name not in PINNED[cfg.stage].split(), f"{message}; {anew}")
                accelerator.print(f"{message}; now it is {now[name]}")
    accelerator.print(f"\n=== {folder}", flush=True)
    write_text(begun, json.dumps(asdict(cfg), indent=1))
    work = {"warmup": warmup, "sample": sample, "evaluate": evaluate, "dryrun": dryrun}
    if policy := work.get(cfg.stage, train_grpo)(cfg, folder):
        save_policy(policy, folder)
        policy = None  # for free_memory below
    if lasting:
        write_text(folder / "done", "")
    if accelerator.is_main_process:
        for path in [*folder.glob("checkpoint-*"), folder / "unfinished"]:
            shutil.rmtree(path, ignore_errors=True)
    write_report(Path(cfg.run_dir))
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def check_config(cfg: Config) -> None:
    """Raises ConfigError for settings that cannot work together, before anything is loaded."""
    stage, batch, update = cfg.stage, cfg.batch_size, cfg.update_batch_size
    processes, weights = accelerator.num_processes, STAGE_REWARDS.get(stage, {})
    flag = STAGES[stage].get("from_data", "").strip("{}")  # sft_data, train_data or test_data
    later = "; a later stage does without, given --from_model and --from_data" * (stage != "evaluate")
    require(cfg.from_data or not flag, f"--stage {stage} needs --{flag}{later}")
    require(cfg.clip_model or "clip" not in weights, f"--stage {stage} needs --clip_model")
    require(cfg.group_size > 1 or not weights, "--group_size 1: a group of one has no spread, no advantage")
    require(cfg.cosine_lo < cfg.cosine_hi, f"--cosine_lo {cfg.cosine_lo}: must be below --cosine_hi")
    rule = f"--batch_size {batch} must be a multiple of "
    if stage == "warmup":
        require(batch % processes == 0, f"{rule}the number of processes, {processes}")
    if weights:
        rule += f"--update_batch_size {update}, and that a multiple of the number of processes, {processes}"
        require(batch % update == update % processes == 0, rule)


def start_accelerator(cfg: Config) -> Accelerator:
    """What `accelerate launch` was told, with this file's precision."""
    precision = cfg.mixed_precision
    require(precision in ("bf16", "no"), f"--mixed_precision {precision}: must be bf16 or no")
    cpu = not torch.accelerator.is_available()
    # The others wait while the main process writes a checkpoint; NCCL would give up after ten minutes.
    processes = PartialState(cpu=cpu, timeout=timedelta(hours=2)).num_processes
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    torch.set_num_threads(cfg.threads or max(1, os.cpu_count() // local))
    started = Accelerator(cpu=cpu, mixed_precision=precision)
    started.gradient_accumulation_steps = 1  # whatever the launcher says: backward would divide by it
    known = started.is_fsdp2 or started.distributed_type.value not in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    empty = is_fsdp_enabled()  # then transformers loads weights, the reference's too, on one process only
    require(known and not empty, "accelerate shards in a way that does not work here: use configs/fsdp2.yaml")
    return started


def run_stages(names: list[str], flags: dict) -> None:
    """The named stages and what they need, in their run folder, which is locked meanwhile."""
    cfg = resolve(names[0], flags)
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "run.lock", "w")  # the kernel frees it when this process ends, in whatever way
    try:
        if accelerator.is_main_process:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if flags.get("model", "toy") == "toy":
                own = (folder / "toy").exists() or not any(folder.glob("*/settings.json"))
                require(own, f"{folder} was begun with a --model: repeat it and the data flags")
                build_toy_world(str(folder / "toy"), cfg.seed, ToyConfig(asks_shapes=cfg.toy_shapes))
    except BlockingIOError:
        raise ConfigError(f"another run is using {folder}: wait for it, or use another --run_dir") from None
    accelerator.wait_for_everyone()
    todo = stages_to_run(names, flags)
    for each in todo:  # a typo must not surface after hours
        check_config(each)
        load_clip(each)
    made = [Path(each.run_dir, each.stage) for each in todo]
    for path in filter(None, (flags.get("from_data"), cfg.sft_data, cfg.train_data, cfg.test_data)):
        if Path(path).parent not in made:
            checked_rows(path, cfg, None, ())
    if cfg.overwrite:
        later = itertools.dropwhile(lambda name: name != names[0], STAGES)
        discarded = [(folder / name).resolve() for name in later]
        for path in (Path(cfg.from_model).resolve(), Path(cfg.from_data).resolve()):
            kept = not {path, *path.parents} & {*discarded}
            require(kept, f"--overwrite would delete {path}, which the stage starts from: copy it")
        if accelerator.is_main_process:
            trash = folder / "discarded"  # a rename first: a kill must not leave a part of a stage
            shutil.rmtree(trash, ignore_errors=True)
            for stage in filter(Path.is_dir, reversed(discarded)):
                shutil.rmtree(stage.rename(trash))
    accelerator.wait_for_everyone()
    for each in todo:
        run_stage(each)
    accelerator.print(f"\n{folder / 'report.html'} shows the run")


def parse_flags(argv: list[str] | None) -> dict:
    """The flags that were given, as {field: value}. Booleans are --flag / --no-flag."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.description = __doc__.split("\n\nWhere this departs")[0]
    parser.epilog = "Defaults: the paper's; settings of the stage, of the toy and flags replace them in turn."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "pebr.py --stage STAGE [--FLAG VALUE ...]    (--help lists the flags)"
    for f in fields(Config):
        kind = {"type": f.type, "metavar": f.type.__name__}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else kind
        parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} [{f.default}]", **kind)
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> None:
    """Run the stage that --stage names, or all of them; end in one line for what a user can mend."""
    global accelerator
    flags = parse_flags(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # it notes tied weights each time
    stage = flags.get("stage", "all")
    several = stage in ("all", "ablation")
    try:
        require(several or stage in STAGES, f"--stage {stage} is none of {', '.join(STAGES)}, all, ablation")
        rule = "--from_model and --from_data belong to one stage: name it with --stage"
        require(not (several and {"from_model", "from_data"} & flags.keys()), rule)
        accelerator = start_accelerator(resolve("warmup" if several else stage, flags))
        if stage == "ablation":
            ablation(flags | {"stage": "all"})
        else:
            run_stages(ORDER if stage == "all" else [stage], flags)
        accelerator.end_training()
    except KeyboardInterrupt:
        sys.exit("pebr.py: interrupted; the same command (without --overwrite) goes on from what was saved")
    except (ConfigError, DataError, ClipError) as error:
        sys.exit(f"pebr.py: {error}")
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        advice = """out of memory. Lower --micro_batch_size (update), --generate_batch_size (rollout),
--max_new_tokens or --max_pixels; several GPUs shard the model with configs/fsdp2.yaml; --kl_coef 0 needs no
reference model. The same command with the new flag (without --overwrite) goes on from the last checkpoint."""
        sys.exit(f"pebr.py: {advice}\n{error}")


if __name__ == "__main__":
    main()
