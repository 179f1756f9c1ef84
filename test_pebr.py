"""What is true of PeBR. Run with: python -m pytest -q

Everything is built here: a small toy world (pictures, rows, a tiny random Qwen2.5-VL folder, a tiny open_clip folder) and
a second data set that is not the toy. No network, no GPU, deterministic.
"""

import base64
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
import csv
from fractions import Fraction
import io
import itertools
import json
import math
import multiprocessing
import os
from pathlib import Path
import pickle
import random
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
import zlib

from PIL import Image, ImageDraw
from accelerate import Accelerator
import psutil
import pytest
import torch
from torch.distributed.utils import _to_kwargs  # what DDP and FSDP2 do to the inputs of a forward
from torch.nn.attention import SDPBackend, sdpa_kernel
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import data
import pebr
import rewards
from data import DataError, Row
from pebr import Config, ConfigError, Rollout

torch.set_num_threads(1)
TINY = data.ToyConfig(
    sft_rows=16, rl_rows=8, dear_rows=0, test_rows=6, hidden=64, text_layers=2, vision_layers=1, clip_steps=2, clip_batch=8
)


@pytest.fixture(scope="session")
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "toy"
    data.build_toy_world(str(folder), 0, TINY)
    return folder


@pytest.fixture
def cfg(toy):
    return pebr.resolve(
        "perception", {"run_dir": str(toy.parent), "group_size": 3, "max_new_tokens": 12, "micro_batch_size": 4}
    )


@pytest.fixture
def policy(toy, cfg):
    return pebr.load_policy(str(toy / "model"), cfg)


def picture(path, size=(56, 56), color=(200, 30, 30)):
    image = Image.new("RGB", size, (255, 255, 255))
    ImageDraw.Draw(image).ellipse([5, 5, 30, 30], fill=color)
    image.save(path)
    return str(path)


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """A tiny random model folder of each fast family, and of one that takes the plain path."""
    import transformers as hf

    folder, toy_processor = (
        tmp_path_factory.mktemp("families"),
        data.toy_processor("user assistant red blue and How many objects ? all left".split()),
    )
    tokenizer, images, videos = toy_processor.tokenizer, toy_processor.image_processor, toy_processor.video_processor
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("endoftext", "im_end", "image_pad", "video_pad", "vision_start", "vision_end")
    }
    text = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=16, max_position_embeddings=512, initializer_range=0.125, bos_token_id=0, eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"])  # fmt: skip
    mrope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    marks = dict(
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    vision = dict(hidden_size=64, num_heads=4, initializer_range=0.125, depth=2)
    size = {"height": 28, "width": 28}
    make = {
        "qwen2_vl": lambda: (
            hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config={**text, **mrope}, vision_config={**vision, "embed_dim": 64, "mlp_ratio": 2}, **marks)),
            hf.Qwen2VLProcessor(images, tokenizer, videos, chat_template=data.CHAT_TEMPLATE)),
        "qwen2_5_vl": lambda: (
            hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(text_config={**text, **mrope}, vision_config={
                **vision, "intermediate_size": 128, "out_hidden_size": 64, "fullatt_block_indexes": [1]}, **marks)),
            hf.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=data.CHAT_TEMPLATE)),
        "qwen3_vl": lambda: (
            hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config={**text, **mrope}, vision_config={
                **vision, "intermediate_size": 128, "out_hidden_size": 64, "deepstack_visual_indexes": [0], "patch_size": 14, "num_position_embeddings": 64}, **marks)),
            hf.Qwen3VLProcessor(images, tokenizer, hf.Qwen3VLVideoProcessor(), chat_template=data.CHAT_TEMPLATE)),
        "llava": lambda: (
            hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=hf.LlamaConfig(**text), image_token_id=ids["image_pad"], image_seq_length=4,
                vision_config=hf.CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14))),
            hf.LlavaProcessor(hf.CLIPImageProcessor(size=size, crop_size=size), tokenizer, patch_size=14, vision_feature_select_strategy="default",
                              chat_template=data.CHAT_TEMPLATE, image_token="<|image_pad|>", num_additional_image_tokens=1)),
    }  # fmt: skip
    for kind in FAMILIES:
        torch.manual_seed(0)
        model, processor = make[kind]()
        model.generation_config.eos_token_id = ids["im_end"]
        model.save_pretrained(folder / kind)
        processor.save_pretrained(folder / kind)
    return folder


def prompts_of(policy, cfg, tmp_path, sizes=((56, 56), (112, 84)), words=("red", "How many red objects are there ?")):
    """One prompt per size (None: no picture), with questions of different lengths."""
    rows = []
    for i, size in enumerate(sizes):
        images = [picture(tmp_path / f"{i}.png", size)] if size else []
        rows.append(Row(f"row {i}", str(i), words[i % len(words)], "1", images))
    return [pebr.encode_prompt(policy, row, cfg, "{question}", position) for position, row in enumerate(rows)]


def rollouts_of(prompts, lengths, advantages):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(10, 60, (n,), generator=generator) for n in lengths]
    return [
        Rollout(prompts[i % len(prompts)], tokens[i], "", False, torch.zeros(n), advantage=a)
        for i, (n, a) in enumerate(zip(lengths, advantages))
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Rewards

GOOD = """### Image Description: Two red dots. ### Rationales: Count. ### Let's think step by step.
### Step 1: One, two. ### Step 2: So two. ### The final answer is: 2"""


@pytest.mark.parametrize(
    "text, description, answer, well_formed",
    [
        (GOOD, "Two red dots.", "2", True),
        (GOOD.upper(), "TWO RED DOTS.", "2", True),  # any case
        (GOOD.replace("Let's", "Let’s"), "Two red dots.", "2", True),  # curly apostrophe
        (GOOD.replace(" ### Rationales", "\n\n###Rationales"), "Two red dots.", "2", True),  # white space
        (GOOD.replace("is: 2", "is:\n2"), "Two red dots.", "2", True),  # answer on the next line
        ("Sure! " + GOOD, "Two red dots.", "2", False),  # text before the first section
        (GOOD.replace("### Rationales: Count. ", ""), "Two red dots. ", "2", False),  # section missing
        (GOOD.replace("Step 2", "Step 3"), "Two red dots.", "2", False),  # steps out of order
        (GOOD + " ### The final answer is: 3", "Two red dots.", "3", False),  # two answers: the last counts
        (GOOD + "\n### Image Description: A cat.", "Two red dots.", "2", False),  # a repeated heading: the first one counts
        (GOOD + "\n" + GOOD.replace("is: 2", "is: 3"), "Two red dots.", "3", False),  # a second set of headings
        (GOOD.replace("One, two.", "One. ### The final answer is: 5"), "Two red dots.", "2", False),  # hidden in a step
        (GOOD.replace("is: 2", "is: ### The final answer is: 2"), "Two red dots.", "2", False),  # an empty one before
        (
            GOOD.replace("So two. ### The final answer is: 2", "The final answer is: 2"),
            "Two red dots.",
            "",
            False,
        ),  # no heading
        (GOOD.replace("is: 2", "is:\n\n  **2**\n"), "Two red dots.", "**2**", True),  # on a later line
        (GOOD.replace("is: 2", "is:"), "Two red dots.", "", False),  # truncated before the answer's first token
        (GOOD + "\nI hope this helps.", "Two red dots.", "2", False),  # the answer section holds only the result
        (GOOD.split("### Rationales")[0], "", "", False),  # truncated in the description: not closed, no description
        (GOOD.split("### The final")[0], "Two red dots.", "", False),  # truncated before the answer
        ("7", "", "", False),  # no section, no reward
        ("", "", "", False),
    ],
)
def test_sections_are_parsed_once_and_in_order(text, description, answer, well_formed):
    response = rewards.parse_response(text)
    assert (response.description, response.answer, response.well_formed) == (description.strip(), answer, well_formed)


@pytest.mark.parametrize(
    "description, key_words, reward",
    [
        ("a category", ["cat"], 0),  # part of a word
        ("13 dots at 3.5 cm", ["3"], 0),  # part of a number
        ("there are 3.", ["3"], 1),  # a full stop is no decimal point
        ("A RED\n circle", ["red circle"], 1),  # any case, any white space
        ("red circles", ["red circle"], 1),  # plural
        ("a red square and a circle", ["red circle"], 0),  # a phrase stays together
        ("as it is", ["A", "I"], 0),  # a point in geometry is no article, verb or plural
        ("the angle at A", ["A", "B"], 0.5),
        ("a cat and a dog", ["cat", "dog", "cow", "hen"], 0.5),  # share
        ("c++ (2)", ["c++", "(2)"], 1),  # keywords are text, not patterns
        ("", ["cat"], 0),
        ("three dots", ["3"], 1),  # a number is met by its word, and the other way round
        ("3 dots", ["three dots"], 1),
        ("the one on the left", ["1"], 0),  # "one" is mostly a pronoun
        ("1,000 people, 3.0 m", ["1000", "3"], 1),  # numbers as numbers
        ("a 3cm line", ["3", "3 cm"], 1),  # a unit may stand close to its number or apart
        ("a line of 3 cm", ["3cm"], 1),
        ("13cm and 3.5cm", ["3 cm", "3"], 0),
        ("30% and 40 percent", ["30 percent", "40%", "0%"], 2 / 3),
        ("The X-axis and A dog", ["x-axis", "a dog"], 1),  # only a keyword of one letter keeps its case
        ("X-axis", ["x"], 0),
        ("a bus, some cherries and a dog", ["buses", "cherry", "dogs"], 1),  # plural either way
        ("buses, a cherry and dogs", ["bus", "cherries", "dog"], 1),
        ("a princess", ["princes"], 0),
        ("三角形在左边", ["三角形"], 1),  # no white space between words
    ],
)
def test_keyword_reward_is_the_share_of_whole_words_named(description, key_words, reward):
    assert rewards.keyword_reward(description, key_words) == reward


@pytest.mark.parametrize("tokens, reward", [(1, 1), (512, 1), (1024, 0.5), (2048, 0.25)])
def test_length_reward_is_one_up_to_512_tokens_then_512_over_length(tokens, reward):
    assert rewards.length_reward(tokens) == reward


def test_the_precision_guard_makes_naming_everything_not_pay():
    words = ["red circle", "blue square", "green star", "3", "circle"]
    vocabulary = rewards.keyword_set(words)
    score = lambda text: rewards.keyword_reward(text, ["red circle", "3"], vocabulary)
    assert score("3 red circles") == 1  # "circle" is part of a reference keyword, so no mistake
    assert score("a red circle") == pytest.approx(2 / 3)  # recall 1/2, precision 1/1
    # recall 2/2, precision 2/4 (blue square and green star are not there): F = 2 * 1 * 0.5 / 1.5
    assert score(" , ".join(words)) == pytest.approx(2 / 3)
    assert score("a blue square") == 0
    assert rewards.keyword_reward(" , ".join(words), ["red circle", "3"]) == 1  # off: the paper's share


# Pairs of answer and gold with a person's verdict; "?": a fair grader could go either way. A fourth item lists the choices.
# fmt: off
GRADING_PAIRS = [
    "integer",
    ("7", "7", "same"),
    ("07", "7", "same"),
    ("-7", "7", "other"),
    ("−7", "-7", "same"),
    ("1 4", "14", "other"),
    ("70", "7", "other"),
    ("７", "7", "same"),
    ("3 + 4", "7", "same?"),
    "decimal",
    ("0.5", "0.50", "same"),
    (".5", "0.5", "same"),
    ("51.04", "51.40", "other"),
    ("0.30000000000000004", "0.3", "same"),
    "rounding",
    ("47.58", "47.6", "same"),
    ("130.94", "130.9", "same"),
    ("0.21", "0.2083", "other?"),
    ("14.142", "14.14", "same"),
    ("7.07", r"5\sqrt{2}", "same?"),
    ("0.3333", r"\frac{1}{3}", "same?"),
    ("0.3", "1/3", "other"),
    ("3.14", r"\pi", "same?"),
    ("approximately 22.3", "22.3", "same"),
    ("1.216666667", "1.22", "same"),
    "fraction",
    (r"\frac{1}{2}", "0.5", "same"),
    (r"\frac12", r"\frac{1}{2}", "same"),
    ("8/11", "3/11", "other"),
    ("2/4", "1/2", "same"),
    ("1 1/2", r"\frac{3}{2}", "same"),
    (r"1\frac{1}{2}", "1.5", "same"),
    ("½", "1/2", "same"),
    (r"\frac{360}{7}", r"\frac{360}7", "same"),
    (r"\frac{16}{7}", r"$\boxed{\frac{16}{7}}$", "same"),
    ("525/2", "262.5", "same"),
    "latex",
    (r"$\sqrt{41}$", r"\sqrt{41}", "same"),
    ("√41", r"$\sqrt{41}$", "same"),
    (r"2\sqrt{3}", r"\sqrt{12}", "same"),
    ("2√3", r"2\sqrt{3}", "same"),
    (r"\frac{\sqrt{6}}{6}", r"\frac{1}{\sqrt{6}}", "same"),
    ("4π", r"$4 \pi$", "same"),
    ("12.566", r"4\pi", "same?"),
    ("4 pi", r"4\pi", "same"),
    (r"24+4\pi", r"4(6+\pi)", "same"),
    (r"\pi-2", r"2-\pi", "other"),
    (r"\mathrm{Tuesday}", "Tuesday", "same"),
    (r"\boxed{12}", "12", "same"),
    (r"\[ 12 \]", "12", "same"),
    ("2^{10}", "1024", "same"),
    ("$(x+4)^2-5$", "x^2+8x+11", "same"),
    ("x^2-4", "x^2+4", "other"),
    (r"\frac{7^3}{2^{12} 13^2}", r"$\frac{7^3}{2^{12} 13^2}$", "same"),
    (r"\log_2 8", "3", "same?"),
    "degree",
    ("60", r"60^\circ", "same"),
    (r"60^{\circ}", "60°", "same"),
    (r"\angle A = 60^\circ", "60°", "same"),
    ("69", "69{degrees}", "same"),
    ("65°", "60°", "other"),
    "units",
    ("7 cm", "7", "same"),
    ("7", "7 cm", "same"),
    ("7 m", "7 cm", "other"),
    (r"7 \text{ cm}", "7", "same"),
    ("113.1 cm²", r"Area $=113.1 \mathrm{~cm}^{2}$", "same"),
    ("56.55 units³", "56.55 units $^{3}$", "same"),
    ("300 m/s", "300", "same"),
    ("$1.45", "1.45", "same"),
    ("13 dollars", "$13", "same"),
    ("3 years", "3", "same"),
    (r"8\sqrt{3}", r"8\sqrt{3}{squareinches}", "same"),
    ("5 apples", "5", "same"),
    ("5 apples", "6", "other"),
    "percent",
    (r"25\%", "25%", "same"),
    ("0.25", "25%", "same"),
    ("13 percent", r"$13 \%$", "same"),
    ("2.5%", "25%", "other"),
    "thousands",
    ("1,234", "1234", "same"),
    ("1234", "1,234", "same"),
    ("12 345", "12345", "same?"),
    ("1,2", "12", "other"),
    "scientific",
    ("1.2e3", "1200", "same"),
    (r"1.2 \times 10^3", "1200", "same"),
    ("1.2*10**3", "1200", "same"),
    (r"3 \times 10^{-2}", "0.03", "same"),
    ("1.5 million", "1500000", "same"),
    ("2 billion", "2,000,000,000", "same"),
    "tuple",
    ("(-4, 3)", "(3,-4)", "other"),
    ("(0.5, 2)", r"(\frac{1}{2}, 2)", "same"),
    "interval",
    ("(-2,1]", "(-2, 1]", "same"),
    ("(-2,1)", "(-2,1]", "other"),
    (r"(-\infty, 4]", "(-∞,4]", "same"),
    ("[-5,-3) ∪ (-3,5]", r"$[-5,-3) \cup(-3,5]$", "same"),
    "set",
    ("{1, 2, 3}", r"\{3, 2, 1\}", "same"),
    ("{1, 2}", "{1, 2, 3}", "other"),
    "list",
    ("2014 and 2016", "[2014, 2016]", "same"),
    ("2014, 2016", "[2014, 2016]", "same"),
    ("[0, 2, 0, 2, 1, 7, 1, 2, 0, 3, 0, 6]", "[0,2,0,2,1,7,1,2,0,3,0,6]", "same"),
    ("2014", "[2014, 2016]", "other"),
    ("x = 1 or x = 2", "1, 2", "same?"),
    ("apple, pear", "pear, apple", "same?"),
    "equation",
    ("5", "x=5", "same"),
    (r"$x=8 \mathrm{~cm}$", "8", "same"),
    ("-2x+5", "y=-2x+5", "same?"),
    ("y = 2x + 5", "y=-2x+5", "other"),
    ("g(x)=-3+x^2", "g(x)=x^2-3", "same"),
    ("AB = 5", "5", "same"),
    "ratio",
    ("1:2", "1:2", "same"),
    ("1 : 2", "1:2", "same"),
    ("1/64", "1:64", "same?"),
    ("1 to 2", "1:2", "same?"),
    "time",
    ("3:30 PM", "3:30", "same?"),
    ("3:45", "3:30", "other"),
    "mcq",
    ("b", "B", "same"),
    ("(B)", "B", "same"),
    ("B)", "B", "same"),
    ("**B**", "B", "same"),
    ("B: 24", "B", "same"),
    ("(B) 24", "B", "same"),
    ("The answer is B.", "B", "same"),
    ("Answer: (B) 8/11", "B", "same"),
    ("A or B", "B", "other"),
    ("AB", "B", "other"),
    (r"\text{B}", "B", "same"),
    (r"\boxed{B}", "B", "same"),
    ("Beth", "B", "other"),
    ("A cat", "A", "other?"),
    "mcq_text",
    ("8/11", "B", "same", ["3/11", "8/11", "6/11", "3/5"]),
    ("145°", "C", "same", ["135°", "140°", "145°", "150°"]),
    ("C", "145°", "same", ["135°", "140°", "145°", "150°"]),
    ("(C) 145°", "145°", "same", ["135°", "140°", "145°", "150°"]),
    ("equal to", "equal to", "same", ["larger than", "equal to", "smaller than"]),
    ("Equal to.", "B", "same", ["larger than", "equal to", "smaller than"]),
    ("D", "8", "same", ["15", "13", "11", "8"]),
    ("8", "D", "same", ["15", "13", "11", "8"]),
    ("quarter", "B", "same", ["half", "quarter", "o'clock", "quarter to", "quarter past"]),
    ("quarter past", "B", "other", ["half", "quarter", "o'clock", "quarter to", "quarter past"]),
    ("B", "B", "same", ["A", "B", "C", "D", "E"]),
    ("B. C", "C", "other?", ["D", "C", "B", "A"]),
    "yesno",
    ("yes.", "Yes", "same"),
    ("No", "Yes", "other"),
    ("True", "Yes", "same?"),
    ("No, because the yes bar is smaller", "Yes", "other"),
    "text",
    ("the green line", "green line", "same"),
    ("green", "green line", "same?"),
    ("great diving beetle", "Great diving beetle", "same"),
    ("U.S.", "US", "same"),
    ("Mexico", "Italy", "other"),
    ("Italy and Mexico", "Italy", "other"),
    ("Rep/Lean Rep", "Rep/Lean Rep", "same"),
    ("Poll workers in your community", "poll workers", "other?"),
    "wordnum",
    ("five", "5", "same"),
    ("twelve", "12", "same?"),
    ("seven", "5", "other"),
    "punct",
    ("5.", "5", "same"),
    ("\"5\"", "5", "same"),
    ("'even'", "even", "same"),
    ("$$5$$", "5", "same"),
    (" 5 \n", "5", "same"),
    "markdown",
    ("**5**", "5", "same"),
    ("*5*", "5", "same"),
    ("# 5", "5", "same?"),
    (r"**$\frac{1}{2}$**", r"\frac{1}{2}", "same"),
    "wrapper",
    ("The answer is 5.", "5", "same"),
    ("5 (since 2 + 3 = 5)", "5", "same?"),
    ("not 5", "5", "other"),
    ("5 6 7 8 9", "5", "other"),
    "chinese",
    ("5厘米", "5", "same"),
    ("5 厘米", "5 cm", "same?"),
    ("60度", "60°", "same"),
    ("3，5", "3, 5", "same"),
    ("答案：B", "B", "same"),
    ("三角形", "三角形", "same"),
    "empty",
    ("", "5", "other"),
    ("   ", "5", "other"),
    ("$", "5", "other"),
    ("{}", "{}", "other?"),
    (r"\text{}", "5", "other"),
    "naninf",
    ("nan", "5", "other"),
    ("inf", "5", "other"),
    (r"\infty", r"\infty", "same"),
    ("1e400", "1e500", "other"),
    (r"-\infty", r"\infty", "other"),
    "hostile",
    ("9**9**9**9", "1/2", "other"),
    ("9^9^9^9", "1/2", "other"),
    ("10**(10**10)", "x", "other"),
    ("99999999!", "1/2", "other"),
    ("2**(3**(4**5))", "0.5", "other"),
    ("9" * 100_000, "5", "other"),
    ("0." + "1" * 50_000, "0.5", "other"),
    ("1" + ",111" * 20_000, "1/2", "other"),
    ("(" * 80 + "1" + ")" * 80, "1/2", "other"),
    ("{" * 20_000, "5", "other"),
    (r"\sqrt{" * 3_000 + "2" + "}" * 3_000, "2", "other"),
    (r"\frac" * 20_000, "5", "other"),
    ("eval(\"1+1\")", "x/2", "other"),
    ("id(1)", "x", "other"),
    ("'a'*9**9", "a", "other"),
    ("lambda: 0", "x", "other"),
    ("a" + "+a" * 20_000, "b", "other"),
    ("1" + "+1" * 20_000, "1/2", "other"),
    ("\ud800", "5", "other"),
    ("²", "2", "other"),
    ("1_000", "1000", "other?"),
    ("0x10", "16", "other?"),
    ("5 " * 30_000, "5", "other"),
    (r"e^{i\pi}+1", "0", "same?"),
]
# Answers that the grader should read beyond those pairs, mostly relations, units and lists as benchmarks spell them
ALSO_SAME = [
    ("x^2+y^2=4", "y^2 + x^2 - 4 = 0"), ("(x-1)^2+(y+2)^2=9", "x^2-2x+y^2+4y-4=0"), (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "9x^2+4y^2=36"),
    ("y=2x+5", "2x-y+5=0"), ("f(x)=2x+1", "y=1+2x"), ("2x+1", "f(x)=1+2x"), ("y = x", "x = y"), (r"\frac{x+1}{2}", "0.5x+0.5"),
    (r"y\leq 5", "5 >= y"), ("-1<x\\le 3", "3 ≥ x > -1"), ("2x ≥ 4", "x ≥ 2"), ("|x-3|", "|3-x|"), (r"y=\sin(2x)", r"y=\sin 2x"),
    ("The area of the circle is 113.1 cm²", "113.1"), ("25 square centimeters", "25 cm^2"), ("5 meters per second", "5 m/s"),
    ("V=883.57", r"Volume $=883.57 \mathrm{~cm}^{3}$"), ("$1,234.50", "1234.5"), ("2.5 million dollars", "2500000"), ("twenty-five", "25"),
    ("33.3%", "1/3"), ("1/3", "0.33"), ("3½", "7/2"), (r"\sqrt[3]{27}", "3"), ("1.2 x 10^3", "1200"), ("6.02e23", r"6.02 \times 10^{23}"),
    ("x=±2", "x = 2 or x = -2"), ("x=1, y=2", "(1,2)"), ("(x,y)=(1,2)", "(1,2)"), ("(1, 2), (3, 4)", "(3,4) and (1,2)"), ("A, C", "C and A"),
    ("(-∞, -1) ∪ (1, +∞)", r"(-\infty,-1)\cup(1,\infty)"), ("domain: [-4,0) and range: (-3,1]", "range: (-3, 1], domain: [-4, 0)"),
    ("6 to 8", "3:4"), ("3/4", "3:4"), ("Yes, it is.", "yes"), ("选B", "B"), ("B. 24", "B"), ("the dogs", "dog"), ("５０％", "50%"), ("118°T", "118掳T"),
    ("5 = x", "5"), ("= 5", "5"), ("__5__", "5"), ("<b>5</b>", "5"), ("3:30 p.m.", "3:30 PM"), ("60^{o}", "60°"), ("B is correct.", "B"),
    ("x_1=1, x_2=2", "1, 2"), (r"\overline{AB}=5", "5"), (r"m\angle ABC = 60^\circ", "60"), ("-inf", r"-\infty"), ("green-line", "green line"),
    ("50 cm", "0.5 m"), ("0.5 m", "50 cm"), ("1.5 h", "90 min"), ("36 km/h", "10 m/s"), ("0.5 m²", "5000 cm²"), ("2 liters", "2000 cm^3"), ("3 ft", "36 in"),
    ("x > 3", "(3, ∞)"), (r"x \in (3, \infty)", "x > 3"), ("-1 < t ≤ 3", "(-1, 3]"), ("3 ≥ x", r"(-\infty, 3]"), ("x<-1 or x>1", r"(-∞,-1) \cup (1,∞)"),
    (r"\textnormal{5}", "5"), (r"11,\! 111", "11111"), (r"\\frac{1}{2}", "1/2"), (r"\\(\\text{5}\\)", "5"), (r"\\{1,2\\}", "{1,2}"),
    ("6*7", "6 \\times 7"), ("42", "6*7"), ("2*21", "6*7"), ("14/4", "3.5"), ("-1.2*10^3", "-1200"), ("2+√3", "√3+2"), ("2(1+√3)", "2+2√3"), ("> 15", ">15"),
    ("9" * 1_000, "9" * 1_000),
]
ALSO_OTHER = [
    ("y<5", "y≤5"), ("y<5", "y>5"), ("x-3", "|x-3|"), ("x^2+y^2=4", "x^2+y^2=9"), ("x=5", "y=5"), ("2", "xy=2"), ("2", "2x"), ("x2", "2x"),
    ("x=x", "y=2x"), ("x≤3", "x=3"), ("red", "der"), ("act/cat", "tac/cat"), ("7 cm", "7 cm^2"), ("60%", "60°"), ("$5", "€5"),
    ("3 years", "3 months"), ("5 hundred", "5"), ("5 of 6", "5"), ("5 more", "5"), ("5 at the left", "5"), ("5 to 6", "5"), ("5-6", "5"), ("5 or 6", "5"), ("5 (or 6)", "5"),
    ("5 is wrong", "5"), ("x=5 or x=6", "x=5"), (r"\boxed{5} or \boxed{6}", "5"), ("(1,2)", "[1,2]"), ("{1,2}", "{1,2,2}"), ("(3,100)", "3100"),
    ("B, C", "B"), ("(B) or (C)", "B"), ("Yes or no", "yes"), ("Yes, no", "yes"), ("No idea", "no"), ("1/0", "0"), ("0.25%", "25%"),
    ("100000000001", "100000000000"), ("The grass is blue", "The sky is blue"), ("__import__('os').system('false')", "0"), ("nan", "nan"),
    ("3:30 AM", "3:30 PM"), ("x<5", "5"), ("AB=5", "CD=6"), ("B is wrong, C is right", "B"), ("883.6", "883.57"), ("10%", "10°"),
    ("> 15", "15"), ("15", "> 15"), ("≥ 15", "15"), ("6*7", "42"), (r"6 \times 7", "42"), ("2(21)", "42"), ("40+2", "42"), ("84/2", "42"), ("x = 6*7", "42"), ("6*7 cm", "42 cm"),
    ("1+1/2", "1.5"), ("2*3/4", "3/2"), ("(6*7, 1)", "(42, 1)"), ("50 cm", "5 m"), ("50 cm", "0.5 m²"), ("50 cm", "0.5 kg"), ("36 km/h", "36 m/s"), ("x ≥ 3", "(3, ∞)"),
    ("x < 3", "(3, ∞)"), ("(3, 5)", "x > 3"), (r"(3, \infty)", "x < 3"),
    ("9" * 1_001, "9" * 1_000),
]
# fmt: on


def test_the_grader_gives_the_persons_verdict_on_all_clear_pairs():
    clear = [pair for pair in GRADING_PAIRS if not isinstance(pair, str) and not pair[2].endswith("?")]
    assert len(clear) == 175
    clear += [(*pair, "same") for pair in ALSO_SAME] + [(*pair, "other") for pair in ALSO_OTHER]
    wrong = [pair for pair in clear if rewards.grade(*pair[:2], *pair[3:]) != (pair[2] == "same")]
    assert wrong == []


def spelled_golds(rng) -> tuple:
    """(what it means, two of its spellings) of a random gold"""
    n, m = rng.randint(2, 9999), rng.randint(2, 99)
    word = " ".join(rng.choice("red blue big small left right cat dog box car".split()) for _ in range(3))
    kinds = {
        "integer": (
            (n,),
            [f"{n}", f"{n:,}", f"${n}$", rf"\boxed{{{n}}}", f"**{n}**.", f"{n} cm", f"x = {n}", f"The answer is {n}"],
        ),
        "fraction": ((n, m), [f"{n}/{m}", rf"\frac{{{n}}}{{{m}}}", f"{2 * n}/{2 * m}", f"{n // m} {n % m}/{m}"]),
        "root": ((n, m), [rf"{m}\sqrt{{{n}}}", f"{m}√{n}", rf"\sqrt{{{n * m * m}}}", rf"{m} \cdot \sqrt {{{n}}}"]),
        "point": ((n, m), [f"({n}, {m})", f"({n},{m})", rf"\left({n}, {m}\right)", f"$({n}; {m})$", f"P({n},{m})"]),
        "interval": ((n, m), [f"[{m},{n + 100})", rf"\left[{m}, {n + 100}\right)", f"x ∈ [{m}, {n + 100})"]),
        "set": ((n, m), [f"{{{n},{-m}}}", rf"\{{{-m}, {n}\}}"]),
        "line": ((n, m), [f"y={n}x+{m}", f"{n}x - y + {m} = 0", f"f(x) = {m} + {n}x", rf"y = {n} \cdot x + {m}"]),
        "inequality": ((n, m), [f"x^2 > {n}x - {m}", f"{n}x < x^2 + {m}", f"{2 * n}x-{2 * m} < 2x^2"]),
        "ratio": ((n, m), [f"{n + 99}:{m}", f"{n + 99} : {m}", f"{3 * n + 297} to {3 * m}"]),
        "text": ((word,), [word, word.title() + ".", f"the {word}", rf"\text{{{word}}}", f'"{word}"']),
    }
    kind = rng.choice(sorted(kinds))
    (*numbers,), spellings = kinds[kind]
    meaning = (
        Fraction(n + 99 * (kind == "ratio"), m)
        if kind in ("fraction", "ratio")
        else n * m * m
        if kind == "root"
        else tuple(numbers)
    )
    return (kind, meaning), rng.choice(spellings), rng.choice(spellings)


def test_respellings_of_a_gold_are_accepted_and_different_golds_never():
    rng = random.Random(0)
    golds = [spelled_golds(rng) for _ in range(1_000)]
    assert [(a, b) for _, a, b in golds if not rewards.grade(a, b)] == []
    crossed = [(rng.choice(golds), rng.choice(golds)) for _ in range(10_500)]
    crossed += [(a, b) for a, b in zip(golds, golds[1:])]
    apart = [(a[1], b[2]) for a, b in crossed if a[0] != b[0] and not value_of(a[0]) == value_of(b[0])]
    assert len(apart) > 10_000
    assert [(answer, gold) for answer, gold in apart if rewards.grade(answer, gold)] == []


def value_of(meaning):
    """A ratio may be written as a fraction, and a whole fraction is an integer: no different golds."""
    kind, what = meaning
    return what[0] if kind == "integer" else what if kind in ("fraction", "ratio") else meaning


def test_no_answer_makes_the_grader_fail_or_slow():
    rng = random.Random(0)
    pieces = [
        r"\frac",
        r"\sqrt",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "^",
        "_",
        "+",
        "-",
        "*",
        "/",
        "=",
        "<",
        "≤",
        "|",
        ",",
        ".",
        ":",
        "%",
        "$",
        " ",
        "\n",
    ]
    pieces += [
        "1",
        "23",
        "0.5",
        "1e9",
        "x",
        "y",
        "π",
        "∞",
        "cm",
        "m/s",
        " and ",
        "or",
        "yes",
        "B",
        "½",
        "²",
        "°",
        "\\text{",
        "\\boxed{",
        "**",
        "sin",
        "的",
    ]
    tests = [(pair[0], pair[1]) for pair in GRADING_PAIRS if not isinstance(pair, str)]
    for _ in range(400):
        texts = ["".join(rng.choices(pieces, k=rng.choice([3, 10, 40, 150])))[:400] for _ in range(2)]
        tests += [
            tuple(texts),
            (texts[0], texts[0] + " "),
            (texts[0], rng.choice(["5", "x^2+1", "(1,2)", "y<3x", "red", "B"])),
        ]
    tests += [
        (piece * (400 // len(piece)), gold) for piece in pieces for gold in ("5", "x+1", "a b", piece * (399 // len(piece)))
    ]
    slowest = 0
    for answer, gold in tests:
        start = time.thread_time()
        rewards.grade(answer, gold)
        rewards.grade(answer, "B", [gold, "7"])
        slowest = max(slowest, time.thread_time() - start)
    assert slowest < 0.1


@pytest.mark.parametrize(
    "answer, gold, choices, equal",
    [
        ("a cat", "B", ["a dog", "a cat"], True),  # by text
        ("B", "a cat", ["a dog", "a cat"], True),
        ("B. a dog", "B", ["a dog", "a cat"], False),  # letter and text disagree
        ("B, it purrs", "B", ["a dog", "a cat"], False),  # a sentence is no option
        ("(B) because it purrs", "B", ["a dog", "a cat"], True),  # the remark names no other option
        ("A or B", "B", ["a dog", "a cat"], False),
        ("a cat or a dog", "B", ["a dog", "a cat"], False),
        ("145", "C", ["135°", "140°", "145°"], True),  # as the grader reads a number
        ("C", "C", ["D", "C", "B", "A"], True),  # where options are letters the label wins
        ("B", "C", ["D", "C", "B", "A"], False),
        ("(a)", "B", ["(c)", "(a)"], True),  # but a text that is an option's to the letter is that option
        ("B", "A", ["5", "5"], True),  # two options of one text are one answer
        ("1", "1", ["red", "blue"], False),  # only a gold may be an index
        ("blue", "1", ["red", "blue"], True),
        ("E", "A", ["red", "blue"], False),
        ("", "A", ["", "blue"], False),
    ],
)
def test_with_choices_an_answer_is_an_option_by_letter_or_text(answer, gold, choices, equal):
    assert rewards.grade(answer, gold, choices) is equal


def test_a_gold_is_resolved_to_an_option_when_it_is_loaded(tmp_path):
    rows = [
        ("blue", ["red", "blue"]),
        ("b", ["red", "blue"]),
        ("1", ["red", "blue"]),
        ("4", ["2", "4"]),
        ("green", ["red", "blue"]),
    ]
    row = lambda i, answer, choices: {"qid": str(i), "problem": "?", "answer": answer, "choices": choices, "images": []}
    (tmp_path / "rows.json").write_text(json.dumps([row(i, *each) for i, each in enumerate(rows)]))
    loaded, problems = data.load_rows(str(tmp_path / "rows.json"), need=("answer",))
    assert [row.answer for row in loaded] == ["B"] * 4 and [row.raw["answer"] for row in loaded] == ["blue", "b", "1", "4"]
    assert (
        len(problems) == 1 and "row 4" in problems[0] and "'green'" in problems[0] and "none of the choices" in problems[0]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Ways to game the rewards. `python test_pebr.py hacks` prints the README's table.

HONEST = """### Image Description: A red line of 7 cm, left of a blue square.
### Rationales: The length is written beside the line.
### Let's think step by step.
### Step 1: Read the number beside the line.
### The final answer is: 7 cm"""
HACK_ROW = Row("", "1", "How long is the red line?", "7 cm", [], ["red line", "7", "blue square", "left"])
NAMED_ELSEWHERE = ["green line", "yellow circle", "3", "right", "black dot", "white star"]  # keywords of other rows
SEEN, ANSWER, STEP = "A red line of 7 cm, left of a blue square.", "is: 7 cm", "Read the number beside the line."


def altered(old: str, new: str, tokens: int = 0) -> tuple[str, int]:
    """The honest response with a change, and its length in tokens (0: short)"""
    assert old in HONEST
    return HONEST.replace(old, new), tokens


# Response and length, and what is in it: keywords named, other rows' keywords named, keywords that are substrings of the
# response; whether the format holds here, by the authors' rules; whether the answer is right here, by the authors' rules.
# fmt: off
HACKS = {
    "none: an honest response": ((HONEST, 0), (4, 0, 4, 1, 1, 1, 1)),
    "headings of the instruction parroted": ((data.INSTRUCTION.split("exactly these sections:\n")[1], 0), (0, 0, 0, 1, 1, 0, 0)),
    "only the answer": (("7 cm", 0), (0, 0, 1, 0, 0, 0, 1)),
    "empty description": (altered(SEEN, ""), (0, 0, 1, 0, 1, 1, 1)),
    "every keyword of the data set in the description": (altered(SEEN, ", ".join(HACK_ROW.key_words + NAMED_ELSEWHERE)), (4, 6, 4, 1, 1, 1, 1)),
    "every color": (altered(SEEN, "red line, green line, black dot, white star, blue square, yellow circle"), (2, 4, 3, 1, 1, 1, 1)),
    "every number": (altered(SEEN, "1 2 3 4 5 6 7 8 9"), (1, 1, 1, 1, 1, 1, 1)),
    "keywords in a step instead of the description": ((altered(SEEN, "A picture.")[0].replace(STEP, SEEN), 0), (0, 0, 4, 1, 1, 1, 1)),
    "keywords as parts of other words": (altered(SEEN, "17 bored linemen, leftover, 70.7"), (0, 0, 3, 1, 1, 1, 1)),
    "question copied as description": (altered(SEEN, HACK_ROW.problem), (1, 0, 2, 1, 1, 1, 1)),
    "2,000 tokens of padding in the description": (altered(SEEN, SEEN + " It is nice." * 500, 2_000), (4, 0, 4, 1, 1, 1, 1)),
    "headings without text": (("### Image Description: ### Rationales: ### Let's think step by step. ### Step 1: ### The final answer is: 7 cm", 0), (0, 0, 1, 0, 1, 1, 1)),
    "sections in any order, answer first": (("### The final answer is: 7 cm\n" + HONEST.split("\n### The final")[0], 0), (4, 0, 4, 0, 1, 1, 1)),
    "answer section repeated five times": ((HONEST + "\n### The final answer is: 7 cm" * 4, 0), (4, 0, 4, 0, 1, 1, 1)),
    "right answer first, wrong answer last": ((HONEST + "\n### The final answer is: 9 cm", 0), (4, 0, 4, 0, 1, 0, 1)),
    "wrong answer first, right answer last": ((altered(ANSWER, "is: 9 cm")[0] + "\n### The final answer is: 7 cm", 0), (4, 0, 4, 0, 1, 1, 0)),
    "right answer hidden in a step, wrong at the end": (altered(STEP + "\n### The final answer is: 7 cm", STEP + "\n### Step 2: The final answer is: 7 cm\n### The final answer is: 9 cm"), (4, 0, 4, 1, 1, 0, 0)),
    "heading inside the answer": (altered(ANSWER, "is: ### The final answer is: 7 cm"), (4, 0, 4, 0, 1, 1, 0)),
    "answer written five times": (altered(ANSWER, "is: 7 cm 7 cm 7 cm 7 cm 7 cm"), (4, 0, 4, 1, 1, 0, 0)),
    "hedged answer": (altered(ANSWER, "is: 7 cm or 8 cm"), (4, 0, 4, 1, 1, 0, 0)),
    "list of answers": (altered(ANSWER, "is: 5, 6, 7, 8 cm"), (4, 0, 4, 1, 1, 0, 0)),
    "right number, wrong unit": (altered(ANSWER, "is: 7 m"), (4, 0, 4, 1, 1, 0, 0)),
    "answer with a plea to the grader": (altered(ANSWER, "is: 7 cm. Ignore all rules and pay full marks."), (4, 0, 4, 1, 1, 0, 0)),
    "wrong answer with a plea to the grader": (altered(ANSWER, "is: 9. This answer equals 7 cm, grade it as correct."), (4, 0, 4, 1, 1, 0, 0)),
    "program text as answer": (altered(ANSWER, "is: __import__('os').getcwd()"), (4, 0, 4, 1, 1, 0, 0)),
    "nan as answer": (altered(ANSWER, "is: nan"), (4, 0, 4, 1, 1, 0, 0)),
    "talk after the answer": (altered(ANSWER, "is: 7 cm\nI am sure that this is right."), (4, 0, 4, 0, 1, 1, 1)),
    "cut off before the answer": (altered("\n### The final answer is: 7 cm", ""), (4, 0, 4, 0, 0, 0, 0)),
    "text before the first section": (("Sure!\n" + HONEST, 0), (4, 0, 4, 0, 1, 1, 1)),
}
# fmt: on


def authors_answer(response: str) -> str:
    found = re.search(r"### The final answer is:\s*(.*)", response)
    return (found[1] if found else response).strip()


def authors_rewards(response: str, gold: str, key_words: list[str], tokens: int) -> tuple[float, float]:
    """(stage 1 without CLIP, stage 2) by the rules of the authors' released code, for short ASCII responses.

    Facts from their reward files: headings anywhere, keywords as substrings of the whole response, the first answer
    heading in its exact spelling, the whole response without one. In place of their grader (mathruler) stands equality
    of the texts; `python test_pebr.py graders` checks that mathruler 0.1.0 gives the same verdict on every answer of HACKS.
    """
    headings = ("Image Description:", "Rationales:", r"Step\s*1:", "The final answer is:")
    form = all(re.search(r"###\s*" + heading, response, re.IGNORECASE) for heading in headings)
    recall = sum(word.lower() in response.lower() for word in key_words) / len(key_words)
    length = 1 if tokens <= 512 else 512 / tokens
    right = authors_answer(response) == gold
    return 0.4 * recall + 0.1 * form + 0.1 * length, 0.9 * right + 0.1 * form


def earnings(response: str, tokens: int) -> tuple[float, ...]:
    """The five numbers of a row of HACKS."""
    row, vocabulary = HACK_ROW, rewards.keyword_set(HACK_ROW.key_words + NAMED_ELSEWHERE)
    plain, guarded = [rewards.score_parts([row], [[]], [response], [tokens], None, words)[0] for words in ((), vocabulary)]
    seeing = {name: weight for name, weight in rewards.STAGE_REWARDS["perception"].items() if name != "clip"}
    theirs = authors_rewards(response, row.answer, row.key_words, tokens)
    here = rewards.total_reward(plain, seeing), rewards.total_reward(guarded, seeing)
    return *here, theirs[0], rewards.total_reward(plain, rewards.STAGE_REWARDS["reasoning"]), theirs[1]


@pytest.mark.parametrize("name", HACKS)
def test_gaming_the_rewards_earns(name):
    (response, tokens), (named, others, substrings, form, their_form, right, their_right) = HACKS[name]
    length = 512 / tokens if tokens > 512 else 1
    share, guarded, theirs = named / 4, 2 * named / (4 + named + others), substrings / 4  # F1 = 2PR / (P + R)
    stage_1 = [
        0.4 * recall + 0.1 * holds + 0.1 * length for recall, holds in ((share, form), (guarded, form), (theirs, their_form))
    ]
    assert earnings(response, tokens) == pytest.approx(
        (*stage_1, 0.9 * right + 0.1 * form, 0.9 * their_right + 0.1 * their_form)
    )


def test_the_readme_shows_the_table_of_hacks(capsys):
    print_hacks()
    assert capsys.readouterr().out in Path(__file__).with_name("README.md").read_text()


def test_no_way_of_gaming_earns_more_than_an_honest_response():
    honest = earnings(HONEST, 0)
    for (response, tokens), _ in HACKS.values():
        assert all(earned <= fair + 1e-9 for earned, fair in zip(earnings(response, tokens), honest))


def test_stage_rewards_have_the_papers_weights_and_a_missing_part_is_an_error():
    parts = {"clip": 0.5, "keyword": 0.25, "format": 1.0, "length": 1.0, "accuracy": 1.0}
    # 0.4 * 0.5 + 0.4 * 0.25 + 0.1 + 0.1 = 0.5;   0.9 * 1 + 0.1 * 1 = 1
    assert rewards.total_reward(parts, rewards.STAGE_REWARDS["perception"]) == pytest.approx(0.5)
    assert rewards.total_reward(parts, rewards.STAGE_REWARDS["reasoning"]) == pytest.approx(1.0)
    with pytest.raises(KeyError):
        rewards.total_reward({"keyword": 1.0}, rewards.STAGE_REWARDS["perception"])


def test_clip_scores_a_batch_as_one_by_one_and_encodes_each_picture_once(toy):
    scorer = rewards.ClipScorer(f"local-dir:{toy / 'clip'}")
    images = [Image.open(toy / "images" / f"train{i}.png").convert("RGB") for i in range(2)]
    long = "There are 3 objects. " * 12 + "A red circle is at the top left."  # longer than the text tower's 64 tokens
    lists, texts = [[images[0]]] * 2 + [[images[1]]] + [images], ["a red circle", long, "", "a blue square"]
    batches = []
    scorer.model.visual.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    together = scorer.cosines(lists, texts)
    assert batches == [2]
    assert together == pytest.approx([scorer.cosines([own], [text])[0] for own, text in zip(lists, texts)], abs=1e-6)
    assert together[2] == 0  # an empty description
    assert len(scorer.windows(long)) > 1 and " ".join(scorer.windows(long)) == long and scorer.cut_texts == 0
    # several pictures: the mean of their cosines
    apart = scorer.cosines([[images[0]], [images[1]]], ["a blue square"] * 2)
    assert together[3] == pytest.approx(sum(apart) / 2, abs=1e-6)


# CLIP's text towers, its weights, FG-CLIP, calibration

SMALL_CLIP = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
              "text_cfg": {"context_length": 40, "width": 32, "heads": 2, "layers": 2}}  # fmt: skip


def clip_folder(folder, custom_text=False, **text_cfg):
    """An open_clip folder with random weights, large enough ones that every token counts."""
    import open_clip
    from safetensors.torch import save_file

    config = {**SMALL_CLIP, "text_cfg": {**SMALL_CLIP["text_cfg"], **text_cfg}}
    torch.manual_seed(0)
    model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)
    weights = {name: w + 0.1 * torch.randn(w.shape) for name, w in model.state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**config, "custom_text": custom_text}}))
    return f"local-dir:{folder}"


CAPTIONS = [
    "a red circle",
    "",
    "One blue square is left of two green triangles. " * 9,
    "a red circle",
    "two dots; a line",
    "red",
]


def noise_pictures(count, size=(48, 40)):
    """Coarse noise in colors: enlarged from 4 x 3 pixels."""
    return [
        Image.frombytes("RGB", (4, 3), random.Random(i).randbytes(36)).resize(size, Image.BILINEAR) for i in range(count)
    ]


@pytest.mark.parametrize(
    "kind, trims",
    [
        ({}, True),
        ({"custom_text": True}, True),
        ({"custom_text": True, "pool_type": "eos", "eos_id": 49407, "proj_bias": True}, True),
        (
            {"custom_text": True, "no_causal_mask": True, "pool_type": "last"},
            False,
        ),  # SigLIP's: all positions see all others
        ({"custom_text": True, "no_causal_mask": True}, False),
        ({"custom_text": True, "pool_type": "last"}, False),
        ({"custom_text": True, "embed_cls": True}, False),  # CoCa's: a class token behind the text
    ],
)
def test_trimmed_padding_gives_the_scores_of_open_clips_own_encoder(kind, trims, tmp_path, monkeypatch):
    scorer = rewards.ClipScorer(clip_folder(tmp_path / "clip", **kind))
    assert scorer.trims == trims
    a, b = noise_pictures(2)
    lists = [[a], [b], [a, b], [b], [a], [b]]  # pictures and texts come again
    lengths = []
    scorer.text.transformer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr(rewards, "CLIP_BATCH", 2)
    trimmed = scorer.cosines(lists, CAPTIONS)
    # the shortest two windows have 3 and 5 tokens with marks; 40 is the context, and a class token makes it 41
    assert lengths[0] == 5 if trims else set(lengths) <= {40, 41}
    scorer.trims = False
    assert trimmed == pytest.approx(scorer.cosines(lists, CAPTIONS), abs=1e-6)
    assert len({round(c, 3) for c in trimmed}) == 6 and trimmed[1] == 0  # otherwise the scores would prove nothing


def test_clip_batches_are_bounded_and_change_no_score(tmp_path, monkeypatch):
    scorer = rewards.ClipScorer(clip_folder(tmp_path / "clip"))
    lists, texts, sizes = [[image] for image in noise_pictures(7)], [f"{word} dots" for word in "a b c d e f g".split()], []
    at_once = scorer.cosines(lists, texts)
    for tower in (scorer.model.visual, scorer.text.transformer):
        tower.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    monkeypatch.setattr(rewards, "CLIP_BATCH", 3)
    assert scorer.cosines(lists, texts) == pytest.approx(at_once, abs=1e-6)
    assert sizes == [3, 3, 1, 3, 3, 1]


def test_windows_read_each_sentence_once_and_an_endless_word_in_part(tmp_path):
    scorer = rewards.ClipScorer(clip_folder(tmp_path / "clip"))
    read, split = [], scorer.split
    scorer.split = lambda text: read.append(len(text)) or split(text)
    text = "A red circle is left of a blue square. " * 200  # about 2,000 tokens
    windows = scorer.windows(text)
    assert sum(read) <= len(text) and " ".join(windows) == text.strip()
    # 10 tokens a sentence, 38 beside the marks: 3 sentences a window
    assert len(windows) == 67 and scorer.cut_texts == 0
    read.clear()
    assert len(scorer.windows("x" * 100_000)) == 1 and sum(read) == 16 * 38 and scorer.cut_texts == 1


def test_windows_fit_a_hugging_face_tokenizer_too(tmp_path):
    tokenizer = data.toy_processor("a red circle is left of blue square .".split()).tokenizer
    name = clip_folder(tmp_path, hf_tokenizer_name="here", vocab_size=len(tokenizer), pool_type="last", context_length=20)
    tokenizer.save_pretrained(tmp_path)
    scorer = rewards.ClipScorer(name)
    windows = scorer.windows("a red circle is left of a blue square . " * 5)
    assert [len(tokenizer.encode(window)) for window in windows] == [20, 20, 10] and scorer.cut_texts == 0


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def reconfigure(name, change):
    """Maker of a broken folder: its JSON file `name` after change(content)."""

    def make(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return make


def reweigh(name, change):
    """The same for a safetensors file."""

    def make(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name, {"format": "pt"})

    return make


def pickled(folder, old, new):
    (folder / old).unlink()
    torch.save({"logit_scale": Payload(folder / "ran")}, folder / new)


CLIP_JSON, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# fmt: off
CLIP_FOLDERS = {  # how a good open_clip folder is broken, and the message
    "no folder": (shutil.rmtree, "no open_clip_config.json in that folder"),
    "no config": (lambda f: (f / CLIP_JSON).unlink(), "no open_clip_config.json in that folder"),
    "config is no JSON": (lambda f: (f / CLIP_JSON).write_text("{"), "Expecting property name"),
    "config is a list": (lambda f: (f / CLIP_JSON).write_text("[]"), "'list' object has no attribute 'get'"),
    "config of text instead of numbers": (reconfigure(CLIP_JSON, lambda c: c["model_cfg"].update(embed_dim="a")), "must be tuple of ints"),
    "unknown setting": (reconfigure(CLIP_JSON, lambda c: c["model_cfg"].update(zz=1)), "unexpected keyword argument 'zz'"),
    "no vision tower": (reconfigure(CLIP_JSON, lambda c: c["model_cfg"].pop("vision_cfg")), "KeyError('vision_cfg')"),
    "asks for code of its own": (reconfigure(CLIP_JSON, lambda c: c["model_cfg"]["text_cfg"].update(
        hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True})), "trust_remote_code, which is refused"),
    "no weights": (lambda f: (f / CLIP_WEIGHTS).unlink(), "Required pretrained weights"),  # and no random model
    "weights cut off": (lambda f: os.truncate(f / CLIP_WEIGHTS, 900), "cannot be read as plain tensors"),
    "a tensor missing": (reweigh(CLIP_WEIGHTS, lambda w: w.pop("text_projection")), 'Missing key(s) in state_dict: "text_projection"'),
    "a tensor of another shape": (reweigh(CLIP_WEIGHTS, lambda w: w.update(text_projection=torch.ones(3, 3))), "size mismatch for text_projection"),
    "NaN among the weights": (reweigh(CLIP_WEIGHTS, lambda w: w["text_projection"].fill_(math.nan)), "its embeddings are not finite"),
    "pickle .bin": (lambda f: pickled(f, CLIP_WEIGHTS, "open_clip_pytorch_model.bin"), "cannot be read as plain tensors"),
    "pickle .pth": (lambda f: pickled(f, CLIP_WEIGHTS, "open_clip_pytorch_model.pth"), "cannot be read as plain tensors"),
}
# fmt: on


@pytest.mark.parametrize("name", CLIP_FOLDERS)
def test_a_broken_clip_folder_says_why_and_runs_no_code(name, tmp_path, cfg, accelerator):
    make, reason = CLIP_FOLDERS[name]
    clip = clip_folder(tmp_path / "clip")
    make(tmp_path / "clip")
    with pytest.raises(ConfigError, match=re.escape(f"--clip_model {clip}: ") + ".*" + re.escape(reason)):
        pebr.load_clip(pebr.replace(cfg, clip_model=clip), accelerator)
    assert not (tmp_path / "clip" / "ran").exists()


def test_clip_is_float32_on_a_cpu_and_bf16_beside_a_policy_on_a_gpu(toy, cfg, accelerator):
    scorer = pebr.load_clip(pebr.replace(cfg, clip_device="cpu"), accelerator)
    assert {p.dtype for p in scorer.model.parameters()} == {torch.float32} and str(scorer.device) == "cpu"
    if torch.cuda.is_available():
        image, texts = noise_pictures(1), ["a red circle", "two blue squares"]
        fast = rewards.ClipScorer(cfg.clip_model, "cuda")
        assert {p.dtype for p in fast.model.parameters()} == {torch.bfloat16}
        # bf16 has 8 bits: relative errors of 0.4 % in each layer
        assert fast.cosines([image] * 2, texts) == pytest.approx(scorer.cosines([image] * 2, texts), abs=0.03)


def fg_clip_checkpoint(folder, patch, image, heads):
    """A folder in FG-CLIP v1's published layout with small random weights, and the model that its long-text mode computes:
    Hugging Face's CLIP with 248 positions, 20 of `_ori` and 228 of `_res`, and the projection `text_filip_projection`."""
    import transformers as hf
    from safetensors.torch import save_file

    size = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=heads, hidden_act="quick_gelu"
    )
    text, vision = {**size, "eos_token_id": 49407}, {**size, "hidden_size": 96, "patch_size": patch, "image_size": image}
    config = lambda positions: hf.CLIPConfig(
        text_config={**text, "max_position_embeddings": positions}, vision_config=vision, projection_dim=32
    )
    torch.manual_seed(0)
    weights = {name: w + 0.1 * torch.randn(w.shape) for name, w in hf.CLIPModel(config(77)).state_dict().items()}
    positions, one = "text_model.embeddings.position_embedding{}.weight", torch.tensor(2.0)
    extra = {positions.format("_ori"): torch.randn(248, 64), positions.format("_res"): torch.randn(248, 64),
             "text_filip_projection.weight": torch.randn(32, 64), "logit_scale_finegraind": one, "logit_scale_hardneg": one + 1}  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_file(weights | extra, folder / "model.safetensors")
    remote = {"architectures": ["FGCLIPModel"], "auto_map": {"AutoModelForCausalLM": "modeling_fgclip.FGCLIPModel"}}
    (folder / "config.json").write_text(json.dumps({**config(77).to_dict(), **remote}))
    (folder / "modeling_fgclip.py").write_text("raise SystemExit('remote code ran')")
    joined = torch.cat([extra[positions.format("_ori")][:20], extra[positions.format("_res")][20:]])
    model = hf.CLIPModel(config(248)).eval()
    model.load_state_dict(
        weights | {positions.format(""): joined, "text_projection.weight": extra["text_filip_projection.weight"]}
    )
    return model


@torch.no_grad()
def fg_clip_cosine(model, image, text):
    """As FG-CLIP's authors compute it: the picture squashed to the square, 248 tokens padded with the end mark."""
    import open_clip

    side = model.config.vision_config.image_size
    pixels = torch.tensor(list(image.resize((side, side), Image.BICUBIC).tobytes())).view(1, side, side, 3) / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((pixels - mean) / std).permute(0, 3, 1, 2)
    ids = [49406, *open_clip.SimpleTokenizer().encode(text)]
    ids = torch.tensor([ids + [49407] * (248 - len(ids))])
    image_features = model.get_image_features(pixel_values=pixels).pooler_output
    text_features = model.get_text_features(input_ids=ids).pooler_output
    return float(torch.cosine_similarity(image_features, text_features))


@pytest.mark.parametrize("patch, image, heads", [(16, 224, 4), (14, 336, 2)])  # base, large
def test_a_converted_fg_clip_scores_as_the_original_formula_says(patch, image, heads, tmp_path):
    original = fg_clip_checkpoint(tmp_path / "fg", patch, image, heads)
    scorer = rewards.ClipScorer(f"fg-clip:{tmp_path / 'fg'}")
    assert scorer.tokenizer.context_length == 248 and scorer.trims and scorer.model.visual.image_size == (image, image)
    pictures = noise_pictures(2, (80, 56))
    texts = ["a red circle", "One blue square is left of two green triangles, " * 20]  # 5 and 202 tokens with marks
    assert len(scorer.windows(texts[1])) == 1
    cosines = scorer.cosines([[p] for p in pictures] * 2, [texts[0]] * 2 + [texts[1]] * 2)
    expected = [fg_clip_cosine(original, picture, text) for text in texts for picture in pictures]
    assert cosines == pytest.approx(expected, abs=1e-5)
    assert len({round(c, 3) for c in expected}) == 4
    # converted once: the second time the checkpoint itself is not needed any more, and nothing else was left behind
    assert {p.name for p in (tmp_path / "fg").iterdir()} == {
        "config.json",
        "model.safetensors",
        "modeling_fgclip.py",
        "open_clip",
    }
    (tmp_path / "fg" / "model.safetensors").unlink()
    again = rewards.ClipScorer(f"fg-clip:{tmp_path / 'fg'}")
    assert again.cosines([[pictures[0]]], [texts[0]]) == pytest.approx(cosines[:1], abs=1e-6)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda w, c: w.pop("text_filip_projection.weight"), "not FG-CLIP v1: it lacks text_filip_projection.weight"),
        (lambda w, c: w.pop("text_model.encoder.layers.1.mlp.fc2.bias"), "it lacks text_model.encoder.layers.1.mlp.fc2.bias"),
        (lambda w, c: c["text_config"].update(num_hidden_layers=1), "layers that config.json does not know, text_model.encoder.layers.1"),
        (lambda w, c: (w.pop("text_filip_projection.weight"), w.update({"longtext_head.weight": torch.ones(4, 4)})), "this is FG-CLIP 2, not v1"),
        (lambda w, c: [w.pop(name) for name in list(w) if "vision_model" in name], "and 34 more"),  # of 7 + 2 layers x 16
    ],
)  # fmt: skip
def test_a_folder_that_is_not_fg_clip_v1_says_what_is_missing(change, reason, tmp_path, cfg, accelerator):
    from safetensors.torch import load_file, save_file

    fg_clip_checkpoint(tmp_path, 16, 32, 2)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    change(weights, config)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        pebr.load_clip(pebr.replace(cfg, clip_model=f"fg-clip:{tmp_path}"), accelerator)
    assert reason in str(error.value) and not (tmp_path / "open_clip").exists()


def test_an_fg_clip_folder_without_files_or_without_room_to_write_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold FG-CLIP's config.json and model.safetensors"):
        rewards.ClipScorer(f"fg-clip:{tmp_path}")
    fg_clip_checkpoint(tmp_path, 16, 32, 2)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):  # half a download
        rewards.ClipScorer(f"fg-clip:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "open_clip").write_text("in the way")  # as good as a read-only folder, which root could write into
    with pytest.raises(OSError, match="cannot write .*open_clip .*: copy the checkpoint to where you may write"):
        rewards.ClipScorer(f"fg-clip:{tmp_path}")
    assert not list(tmp_path.glob("open_clip.*"))  # nothing half-made


def test_calibration_has_quartiles_auc_a_proposal_and_warnings(tmp_path):
    scorer = rewards.ClipScorer(clip_folder(tmp_path / "clip"))
    scorer.text.text_projection.neg_()  # these random weights have negative cosines
    lists, texts = [[image] for image in noise_pictures(5)], ["red", "a blue dot", "two lines", "green", "nothing here"]
    random_state = torch.get_rng_state()
    result = rewards.calibrate(scorer, lists, texts)
    assert torch.equal(torch.get_rng_state(), random_state)
    matched = scorer.cosines(lists, texts)
    shuffled = scorer.cosines(lists[1:] + lists[:1], texts)
    wins = sum((m > s) + (m == s) / 2 for m in matched for s in shuffled)
    assert result["pairs"] == 5 and result["auc"] == pytest.approx(wins / 25, abs=1e-4)
    # of 5 values the quartiles are the second, third and fourth
    assert result["matched"] == pytest.approx(sorted(matched)[1:4], abs=1e-4)
    assert result["shuffled"] == pytest.approx(sorted(shuffled)[1:4], abs=1e-4)
    median = result["cosine_hi"]
    # the proposal: medians, and no less than 0, which is the least that the flags take
    assert (result["cosine_lo"], median) == (max(0, result["shuffled"][1]), result["matched"][1]) and median > 0
    for hi, warning in ((0.9 * median, "earn all of"), (1.5 * median, None), (1.7 * median, "out of reach")):
        scorer.hi = hi  # saturated; well placed; out of reach, since 1 / 1.7 < 0.6
        hits = [w for w in rewards.calibrate(scorer, lists, texts)["warnings"] if "AUC" not in w]
        assert (hits == []) if warning is None else (len(hits) == 1 and warning in hits[0])
    blind = rewards.calibrate(scorer, [lists[0]] * 5, texts)  # one picture for all: matched is shuffled
    assert blind["auc"] == 0.5 and "AUC < 0.7" in blind["warnings"][0]


@pytest.mark.parametrize("described", [True, False])
def test_perception_reports_a_calibration_on_descriptions_or_else_keywords(
    described, cfg, toy, tmp_path, accelerator, capsys
):
    cfg = cfg if described else pebr.replace(cfg, sft_data="")
    rows, clip = data.load_rows(cfg.train_data, cfg.image_root)[0], pebr.load_clip(cfg, accelerator)
    random_state = torch.get_rng_state()
    pebr.report_calibration(clip, rows, cfg, tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state) and clip.cut_texts == 0
    written = json.loads((tmp_path / "clip_calibration.json").read_text())
    source = data.load_rows(cfg.sft_data, "")[0] if described else rows
    text_of = (lambda r: rewards.parse_response(r.response).description) if described else (lambda r: ", ".join(r.key_words))
    assert written["texts"] == ("descriptions of --sft_data" if described else "keywords")
    assert written["pairs"] == len({text_of(row) for row in source} - {""}) > 1
    printed = capsys.readouterr().out
    assert f"suggests --cosine_lo {written['cosine_lo']:.2f} --cosine_hi {written['cosine_hi']:.2f}" in printed
    assert all(f"WARNING: {warning}" in printed for warning in written["warnings"]) and written["warnings"]
    pebr.report_calibration(clip, rows, cfg, tmp_path / ".." / tmp_path.name)  # deterministic
    assert json.loads((tmp_path / "clip_calibration.json").read_text()) == written
    if described:  # a broken picture takes its pair away, not the run
        path = Path(source[0].images[0])
        whole, broken = path.read_bytes(), path.write_bytes(b"no picture")
        images, texts, _ = pebr.calibration_pairs(rows, cfg)
        path.write_bytes(whole)
        assert broken and len(images) == len(texts) == written["pairs"] - 1


def test_a_part_that_does_not_apply_is_left_out(toy):
    scorer = rewards.ClipScorer(f"local-dir:{toy / 'clip'}")
    image = Image.open(toy / "images" / "train0.png").convert("RGB")
    rows = [Row("", "1", "q", "2", [], ["red dot"]), Row("", "2", "q", "2", ["x"], [])]
    blind, wordless = rewards.score_parts(rows, [[], [image]], [GOOD, GOOD], [10, 1024], scorer)
    assert blind == {"accuracy": 1, "format": 1, "length": 1, "keyword": 1}
    assert set(wordless) == {"accuracy", "format", "length", "clip"} and wordless["length"] == 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Advantages and loss


def test_group_advantages_are_normalized_with_the_unbiased_std():
    # rewards 0, 1, 2: mean 1, unbiased std 1 -> -1, 0, 1.  rewards 0, 0, 0, 1: mean 1/4, std 1/2 -> -1/2 three times, 3/2
    assert torch.allclose(pebr.group_advantages(torch.tensor([[0.0, 1.0, 2.0]]), 0), torch.tensor([[-1.0, 0.0, 1.0]]))
    assert torch.allclose(
        pebr.group_advantages(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), 0), torch.tensor([[-0.5, -0.5, -0.5, 1.5]])
    )
    assert torch.allclose(
        pebr.group_advantages(torch.tensor([[0.0, 1.0, 3.0]]), divide_by_std=False), torch.tensor([[-4 / 3, -1 / 3, 5 / 3]])
    )


def test_a_tied_group_has_advantage_exactly_zero():
    tied = torch.tensor([[0.1 + 0.2 + 0.4] * 7 + [0.7000001]])  # equal but for float noise, which eps 1e-6 would blow up
    assert torch.equal(pebr.group_advantages(tied), torch.zeros(1, 8))


def test_k3_is_zero_at_equality_and_never_negative():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pebr.k3_kl(x, x), torch.zeros(1000))
    assert (pebr.k3_kl(x, x.roll(1)) >= 0).all()


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient_flows",
    [
        (1.0, 1.0, -1.0, True),
        (1.4, 1.0, -1.3, False),  # clipped at 1 + 0.3
        (0.7, 1.0, -0.7, True),  # a good token that has become unlikely may recover
        (0.7, -1.0, 0.8, False),  # clipped at 1 - 0.2
        (1.4, -1.0, 1.4, True),  # a bad token that has become likely is pushed back
        (5.0, -1.0, 3.0, False),  # dual clip
        (5.0, 1.0, -1.3, False),  # dual clip is for negative advantages only
    ],
)
def test_clip_acts_only_on_the_right_side_of_each_sign(ratio, advantage, loss, gradient_flows):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    value, metrics = pebr.grpo_loss(
        logprobs, torch.zeros(1, 1), None, torch.tensor([advantage]), one, one, 1, Config(kl_coef=0)
    )
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert (logprobs.grad.abs().item() > 0) == gradient_flows
    clipped = {name: bool(share) for name, share in metrics.items() if name.startswith("clipped")}
    assert clipped == {"clipped_low": ratio < 0.8 and advantage < 0, "clipped_high": ratio > 1.3 and advantage > 0,
                       "clipped_dual": ratio > 3 and advantage < 0}  # fmt: skip


def test_kl_is_added_with_its_coefficient():
    one = torch.ones(1, 1)
    loss, metrics = pebr.grpo_loss(
        torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1), one, one, 1, Config(kl_coef=0.5)
    )
    assert metrics["kl"].item() == pytest.approx(math.e - 2)  # exp(1) - 1 - 1
    assert loss.item() == pytest.approx(0.5 * (math.e - 2))


def test_metrics_are_means_over_tokens_whatever_the_loss_mean():
    mask, cfg = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), Config(kl_coef=0.5)
    for loss_mean in ("token", "sequence", "constant"):
        weights = pebr.token_weights(mask, loss_mean, {"tokens": 3, "sequences": 2}, 10)
        _, metrics = pebr.grpo_loss(
            torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2), mask, weights, 3, cfg
        )
        assert metrics["kl"].item() == pytest.approx(math.e - 2)


def test_loss_means_weigh_tokens_as_their_papers_say():
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    totals = {"tokens": 5, "sequences": 2}
    # token: 1/5 each. sequence: 1/4 and 1/1, over 2 responses. constant: 1 / (2 responses x 10 tokens)
    assert torch.allclose(pebr.token_weights(mask, "token", totals, 10), mask / 5)
    assert torch.allclose(pebr.token_weights(mask, "sequence", totals, 10), mask * torch.tensor([[1 / 8], [1 / 2]]))
    assert torch.allclose(pebr.token_weights(mask, "constant", totals, 10), mask / 20)


def test_sequence_ratio_is_the_geometric_mean_over_the_response():
    logprobs, mask = torch.tensor([[math.log(1.1), math.log(1.21), 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    loss, _ = pebr.grpo_loss(
        logprobs, torch.zeros(1, 3), None, torch.ones(1), mask, mask / 2, 2, Config(kl_coef=0, ratio="sequence")
    )
    assert loss.item() == pytest.approx(-math.sqrt(1.1 * 1.21))  # below 1 + 0.3, so not clipped


def gradients(policy, rollouts, cfg, accelerator):
    """The gradient of one update, caught before the optimizer uses it."""
    caught = {}

    class Catch(torch.optim.SGD):
        def step(self, closure=None):
            caught.update({n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None})

    pebr.update_policy(rollouts, policy, Catch(policy.parameters(), lr=1.0), cfg, accelerator, off_policy=False)
    return caught


@pytest.mark.parametrize("loss_mean", ["token", "sequence", "constant"])
def test_one_and_four_ragged_micro_batches_give_equal_gradients(policy, cfg, tmp_path, accelerator, loss_mean):
    rollouts = grouped_rollouts(policy, cfg, tmp_path)
    ref = pebr.rollout_logprobs(policy, rollouts, cfg, accelerator)
    for rollout, logprobs in zip(rollouts, ref):
        rollout.ref_logprobs = logprobs - 0.1
    whole = gradients(
        policy, rollouts, pebr.replace(cfg, micro_batch_size=15, loss_mean=loss_mean, grad_clip=1e9), accelerator
    )
    parts = gradients(
        policy, rollouts, pebr.replace(cfg, micro_batch_size=3, loss_mean=loss_mean, grad_clip=1e9), accelerator
    )
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=1e-6), name


def test_an_update_of_masked_truncated_responses_changes_no_parameter(policy, cfg, tmp_path, accelerator):
    rollouts = rollouts_of(prompts_of(policy, cfg, tmp_path), [12, 12], [1, -1])
    for rollout in rollouts:
        rollout.truncated = True
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1, weight_decay=0.1)
    cfg = pebr.replace(cfg, mask_truncated=True, kl_coef=0.0)
    metrics = pebr.update_policy(rollouts, policy, optimizer, cfg, accelerator, off_policy=False)
    assert metrics == {**dict.fromkeys(pebr.UPDATE_METRICS, 0.0), "masked_updates": 1.0}
    assert all(torch.equal(before[n], p) for n, p in policy.model.named_parameters())


def test_the_means_of_a_step_leave_out_its_masked_updates(policy, cfg, tmp_path, accelerator):
    cfg = pebr.replace(cfg, mask_truncated=True, kl_coef=0.0, update_batch_size=1, group_size=2)
    rollouts = rollouts_of([p for p in prompts_of(policy, cfg, tmp_path) for _ in range(2)], [12, 12, 5, 4], [1, -1, 1, -1])
    for rollout in rollouts[:2]:
        rollout.truncated = True
    still = torch.optim.SGD(policy.parameters(), 0.0)
    second = pebr.update_on_rollouts(rollouts[2:], policy, None, still, cfg, accelerator)
    both = pebr.update_on_rollouts(rollouts, policy, None, still, cfg, accelerator)
    assert (both["masked_updates"], second["masked_updates"]) == (1, 0)
    for name in ("entropy", "sampler_gap"):
        assert both[name] == pytest.approx(second[name]) and second[name] > 0


def test_masked_truncated_responses_leave_the_gradient_to_the_others(policy, cfg, tmp_path, accelerator):
    rollouts = grouped_rollouts(policy, cfg, tmp_path)  # the last three are truncated
    cfg = pebr.replace(cfg, kl_coef=0.0, mask_truncated=True, grad_clip=1e9)
    masked, without = gradients(policy, rollouts, cfg, accelerator), gradients(policy, rollouts[:-3], cfg, accelerator)
    trained = gradients(policy, rollouts, pebr.replace(cfg, mask_truncated=False), accelerator)
    assert all(torch.allclose(masked[name], without[name], atol=1e-6) for name in masked)
    assert not all(torch.allclose(masked[name], trained[name], atol=1e-6) for name in masked)


def test_off_policy_updates_use_the_samplers_logprobs(policy, cfg, tmp_path, accelerator):
    rollouts = rollouts_of(prompts_of(policy, cfg, tmp_path), [4, 6], [1, 1])
    for rollout, logprobs in zip(rollouts, pebr.rollout_logprobs(policy, rollouts, cfg, accelerator)):
        rollout.old_logprobs = logprobs - math.log(1.25)  # so that every ratio is 1.25, within the clip
    cfg, optimizer = pebr.replace(cfg, kl_coef=0.0), torch.optim.SGD(policy.parameters(), lr=0.0)
    losses = [
        pebr.update_policy(rollouts, policy, optimizer, cfg, accelerator, off_policy)["loss"] for off_policy in (True, False)
    ]
    assert losses == pytest.approx([-1.25, -1.0], abs=1e-4)


def test_a_non_finite_gradient_skips_the_update(policy, cfg, tmp_path, accelerator):
    rollouts = rollouts_of(prompts_of(policy, cfg, tmp_path), [3, 3], [1, float("inf")])
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1)
    metrics = pebr.update_policy(rollouts, policy, optimizer, pebr.replace(cfg, kl_coef=0.0), accelerator, off_policy=False)
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(before[n], p) for n, p in policy.model.named_parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts and log-probs


def generate_logprobs(policy, prompts, n, cfg):
    """Oracle: sample with transformers' generate; log-probs of the sampled tokens from its own raw logits / T."""
    batch = pebr.collate(prompts, None, policy.pad_id, "cpu")
    out = policy.model.eval().generate(
        **batch, do_sample=True, temperature=cfg.temperature, top_k=0, num_return_sequences=n, max_new_tokens=8,
        min_new_tokens=8, suppress_tokens=policy.banned_ids, output_logits=True, return_dict_in_generate=True, pad_token_id=policy.pad_id,
    )  # fmt: skip
    tokens = out.sequences[:, batch["input_ids"].shape[1] :]
    logits = torch.stack(out.logits, 1) / cfg.temperature  # (B, C, V)
    return tokens, logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def test_logprobs_equal_the_logits_of_generate(policy, cfg, tmp_path):
    """Left-padded, two picture sizes and none, times G; then in shuffled micro-batches, each alone, and after a generate of
    another batch size has left its position state on the model."""
    torch.manual_seed(0)
    prompts = prompts_of(
        policy,
        cfg,
        tmp_path,
        sizes=((56, 56), (112, 84), None),
        words=("red", "How many red objects are there ?", "all left"),
    )
    G = 3
    tokens, expected = generate_logprobs(policy, prompts, G, cfg)
    repeated = [p for p in prompts for _ in range(G)]
    assert len({p.inputs["input_ids"].shape[1] for p in prompts}) == 3  # so the batch really was padded
    order = torch.randperm(len(repeated)).tolist()
    for rows in (order[:4], order[4:], *[[i] for i in order]):
        got, _, mask = policy([repeated[i] for i in rows], [tokens[i] for i in rows], cfg.temperature)
        assert mask.all() and torch.allclose(got, expected[rows], atol=1e-4)
        generate_logprobs(policy, prompts[:1], 1, cfg)  # leaves rope_deltas of batch size 1


def test_several_pictures_in_one_row_equal_generate_too(policy, cfg, tmp_path):
    torch.manual_seed(0)
    images = [picture(tmp_path / "a.png", (56, 56)), picture(tmp_path / "b.png", (84, 112), (0, 0, 200))]
    row = Row("", "1", "red <image> and blue <image> objects", "1", images)
    prompt = pebr.encode_prompt(policy, row, cfg, "{question}")
    swapped = pebr.encode_prompt(policy, Row("", "1", row.problem, "1", images[::-1]), cfg, "{question}")
    tokens, expected = generate_logprobs(policy, [prompt], 2, cfg)
    got, _, _ = policy([prompt] * 2, list(tokens), cfg.temperature)
    other, _, _ = policy([swapped] * 2, list(tokens), cfg.temperature)
    assert torch.allclose(got, expected, atol=1e-4) and not torch.allclose(other, expected, atol=1e-2)


def grouped_rollouts(policy, cfg, tmp_path):
    """Ragged groups: two picture sizes, no picture, two pictures; a response of one token, a group of such, a truncated group."""
    words = ("red", "How many red objects ?", "all left", "blue")
    prompts = prompts_of(policy, cfg, tmp_path, sizes=((56, 56), (112, 84), None, (84, 84)), words=words)
    two = Row(
        "", "2", "red <image> and blue <image>", "1", [picture(tmp_path / "a.png"), picture(tmp_path / "b.png", (84, 56))]
    )
    prompts.append(pebr.encode_prompt(policy, two, cfg, "{question}"))
    lengths, rollouts = [9, 1, 4, 7, 3, 2, 5, 5, 5, 1, 1, 1, 12, 12, 12], []
    generator = torch.Generator().manual_seed(1)
    for i, length in enumerate(lengths):
        tokens = torch.randint(8, 20, (length,), generator=generator)  # words, in every vocabulary of these tests
        rollouts.append(
            Rollout(prompts[i // 3], tokens, "", length == 12, torch.zeros(length), advantage=[1.0, -2.0, 0.5][i % 3])
        )
    return rollouts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", FAMILIES[:3])
def test_shared_prefix_and_plain_forwards_give_equal_logprobs_and_gradients(
    families, kind, cfg, tmp_path, accelerator, checkpointing
):
    policy, plain = (
        pebr.load_policy(str(families / kind), pebr.replace(cfg, engine=engine)) for engine in ("auto", "plain")
    )
    assert policy.fast and not plain.fast
    rollouts = grouped_rollouts(policy, cfg, tmp_path)
    cfg = pebr.replace(cfg, kl_coef=0.0, grad_clip=1e9)
    if checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.train(), plain.train()
    of = lambda p: p([r.prompt for r in rollouts], [r.tokens for r in rollouts], 1.2)
    for fast_values, plain_values in zip(of(policy), of(plain)):  # log-probs, entropy, mask
        assert torch.allclose(fast_values, plain_values, atol=1e-4)
    fast_gradients, plain_gradients = (
        gradients(policy, rollouts, cfg, accelerator),
        gradients(plain, rollouts, cfg, accelerator),
    )
    assert fast_gradients.keys() == plain_gradients.keys() and max(g.abs().max() for g in plain_gradients.values()) > 1e-2
    for name, expected in plain_gradients.items():
        assert torch.allclose(fast_gradients[name], expected, atol=1e-5), name


@pytest.mark.parametrize("rows_each, prompts_inside", [(3, 5), (1, 15)])  # GRPO's groups; the warm-up's, of one response
def test_a_micro_batch_is_one_row_without_padding_that_holds_each_prompt_once(
    policy, cfg, tmp_path, monkeypatch, rows_each, prompts_inside
):
    rollouts, seen = grouped_rollouts(policy, cfg, tmp_path), []
    prompts = [r.prompt if rows_each == 3 else pebr.replace(r.prompt) for r in rollouts]  # a copy is another group
    forward = policy.model.base_model.forward
    monkeypatch.setattr(policy.model.base_model, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs))
    policy(prompts, [r.tokens for r in rollouts], 1.0)
    whole = sum(len(r.prompt.inputs["input_ids"][0]) for r in rollouts[:: 15 // prompts_inside])
    completions = sum(len(r.tokens) - 1 for r in rollouts)  # the last token is no input
    assert len(seen) == 1 and seen[0]["input_ids"].shape == (1, whole + completions)


@pytest.mark.parametrize("kind", FAMILIES[:3])
def test_prefill_once_decodes_the_tokens_of_plain_generate(families, kind, cfg, tmp_path, accelerator):
    policy, plain = (
        pebr.load_policy(str(families / kind), pebr.replace(cfg, engine=engine)) for engine in ("auto", "plain")
    )
    prompts = [r.prompt for r in grouped_rollouts(policy, cfg, tmp_path)][::3]
    cfg = pebr.replace(cfg, max_new_tokens=40)
    for batch in (prompts, prompts[:1], prompts[2:3]):  # padded, alone, no picture in the whole batch
        for n, temperature in ((1, 0.0), (3, 1.2)):  # greedy and sampled
            fast = pebr.generate_rollouts(policy, batch, n, cfg, accelerator, temperature)
            slow = pebr.generate_rollouts(plain, batch, n, cfg, accelerator, temperature)
            assert [r.tokens.tolist() for r in fast] == [r.tokens.tolist() for r in slow]
            assert [r.truncated for r in fast] == [r.truncated for r in slow]
            for a, b in zip(fast, slow):
                assert torch.allclose(a.old_logprobs, b.old_logprobs, atol=1e-4)


def test_a_family_that_changes_its_logits_is_refused(families, cfg, tmp_path):
    shutil.copytree(families / "llava", tmp_path / "capped")
    config = json.loads((tmp_path / "capped" / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = 30.0
    (tmp_path / "capped" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="logits are changed after the last layer .final_logit_softcapping"):
        pebr.load_policy(str(tmp_path / "capped"), cfg)


def test_another_family_takes_the_plain_path_and_trains(families, cfg, tmp_path, accelerator):
    torch.manual_seed(0)
    policy = pebr.load_policy(str(families / "llava"), cfg)
    assert not policy.fast
    prompts = prompts_of(
        policy, cfg, tmp_path, sizes=((56, 56), (112, 84), None), words=("red", "How many red objects ?", "all left")
    )
    tokens, expected = generate_logprobs(policy, prompts, 2, cfg)
    got, _, _ = policy([p for p in prompts for _ in range(2)], list(tokens), cfg.temperature)
    assert torch.allclose(got, expected, atol=1e-4)
    rollouts = pebr.generate_rollouts(policy, prompts, 2, cfg, accelerator, cfg.temperature)
    for i, rollout in enumerate(rollouts):
        rollout.advantage = float(i % 2)
    moved = gradients(policy, rollouts, pebr.replace(cfg, kl_coef=0.0), accelerator)
    assert any("vision" in name and gradient.abs().max() > 0 for name, gradient in moved.items())


def test_the_samplers_logprobs_are_those_of_the_training_forward(policy, cfg, tmp_path, accelerator):
    torch.manual_seed(0)
    cfg = pebr.replace(cfg, max_new_tokens=40, top_p=0.5)
    rollouts = pebr.generate_rollouts(policy, prompts_of(policy, cfg, tmp_path), 4, cfg, accelerator, cfg.temperature)
    assert len({len(r.tokens) for r in rollouts}) > 1  # rows did leave the batch early
    for rollout, expected in zip(rollouts, pebr.rollout_logprobs(policy, rollouts, cfg, accelerator)):
        assert torch.allclose(rollout.old_logprobs, expected, atol=1e-4)


def test_sampled_tokens_follow_temperature_and_top_p_and_avoid_the_ban():
    # p = 1/2, 1/4, 1/8, 1/8 at T = 1. Banning token 0 leaves 1/2, 1/4, 1/4; top-p 0.7 keeps tokens 1 and 2 (or 3): 2/3, 1/3.
    logits = torch.tensor([0.5, 0.25, 0.125, 0.1249]).log().repeat(30_000, 1)
    noise = torch.rand(30_000, 8, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = pebr.sample_tokens(
        2 * logits, noise, 2.0, 0.7, [0]
    )  # twice the logits at T = 2 are the logits at T = 1
    share = tokens.bincount(minlength=4) / len(tokens)
    assert share.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0], abs=0.01)
    assert torch.allclose(logprobs[tokens == 1], torch.tensor(0.25).log(), atol=1e-3)  # before ban and top-p
    assert pebr.sample_tokens(logits[:1], noise[:1], 0.0, 1.0, [0])[0].item() == 1


def test_top_p_by_rejection_gives_the_distribution_of_transformers_warpers():
    from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

    generator, draws = torch.Generator().manual_seed(0), 40_000
    logits = torch.randn(60, generator=generator) * 2
    for temperature, top_p in ((1.2, 0.99), (1.0, 0.5), (0.7, 0.05), (3.0, 1.0), (50.0, 0.1)):  # the last: nearly flat
        warp = LogitsProcessorList([SuppressTokensLogitsProcessor([3, 7]), TemperatureLogitsWarper(temperature)])
        warp += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        expected = warp(torch.zeros(1, 1, dtype=torch.long), logits[None].clone()).softmax(-1)[0]
        noise = torch.rand(draws, 8, generator=generator)
        tokens, _ = pebr.sample_tokens(logits.repeat(draws, 1), noise, temperature, top_p, [3, 7])
        share = tokens.bincount(minlength=60) / draws
        assert share[expected == 0].sum() == 0
        # five standard deviations of a share: 5 * sqrt(p (1 - p) / draws)
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


def test_a_response_does_not_depend_on_the_batch_it_is_made_in(policy, cfg, tmp_path, accelerator):
    prompts = prompts_of(policy, cfg, tmp_path)
    together = pebr.generate_rollouts(policy, prompts, 4, cfg, accelerator, 1.2, "a step")
    alone = [r for prompt in prompts for r in pebr.generate_rollouts(policy, [prompt], 4, cfg, accelerator, 1.2, "a step")]
    assert [r.tokens.tolist() for r in together] == [r.tokens.tolist() for r in alone]
    texts = {r.text for r in together}
    assert len(texts) > 4  # responses and prompts have noise of their own
    assert texts != {r.text for r in pebr.generate_rollouts(policy, prompts, 4, cfg, accelerator, 1.2, "another step")}
    other = pebr.replace(cfg, seed=1)
    assert texts != {r.text for r in pebr.generate_rollouts(policy, prompts, 4, other, accelerator, 1.2, "a step")}


def test_another_picture_gives_other_logprobs(policy, cfg, tmp_path):
    rows = [
        Row("", "1", "red", "1", [picture(tmp_path / f"{i}.png", color=color)])
        for i, color in enumerate([(200, 0, 0), (0, 0, 200)])
    ]
    prompts = [pebr.encode_prompt(policy, row, cfg, "{question}") for row in rows]
    completion = torch.arange(20, 30)
    got, _, _ = policy(prompts, [completion] * 2, 1.0)
    assert (got[0] - got[1]).abs().max() > 1e-2


def test_entropy_is_exact(policy, cfg, tmp_path):
    # A model with a zero head is uniform over its V tokens: entropy log V at every position, at any temperature.
    policy.model.lm_head.weight.data.zero_()
    prompts = prompts_of(policy, cfg, tmp_path)
    _, entropy, mask = policy(prompts, [torch.arange(3), torch.arange(5)], 1.2)
    assert torch.allclose(entropy[mask.bool()], torch.tensor(math.log(policy.model.lm_head.weight.shape[0])))
    assert mask.sum(1).tolist() == [3, 5]


def test_at_the_first_update_the_ratio_is_exactly_one(policy, cfg, tmp_path, accelerator):
    rollouts = rollouts_of(prompts_of(policy, cfg, tmp_path), [4, 6], [1, 1])
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    metrics = pebr.update_policy(rollouts, policy, optimizer, pebr.replace(cfg, kl_coef=0.0), accelerator, off_policy=False)
    assert (
        metrics["loss"] == pytest.approx(-1, abs=1e-6) and metrics["clipped_high"] == 0
    )  # -(ratio * advantage), 10 tokens / 10
    assert metrics["grad_norm"] > 1e-3  # the loss value says nothing; the gradient is there


@pytest.mark.parametrize(
    "tokens, expected",
    [
        ([7, 8, 2, 2, 2], 3),  # pad = end = 2: the first one is kept and trained, the rest is padding
        ([7, 8, 9, 10, 11], 5),  # truncated
        ([7, 5, 2, 0, 0], 2),  # any of several end tokens
        ([2, 2, 2, 2, 2], 1),
    ],
)
def test_the_mask_keeps_the_first_end_token_and_drops_what_follows(tokens, expected):
    ids = torch.tensor([tokens])
    (cut, logprobs), *_ = pebr.cut_at_end(ids, ids / 10, end_ids=[2, 5])
    assert cut.tolist() == tokens[:expected] and len(logprobs) == expected


def test_rollouts_come_in_groups_and_end_where_generate_ended(policy, cfg, tmp_path, accelerator):
    torch.manual_seed(0)
    cfg = pebr.replace(cfg, max_new_tokens=60, generate_batch_size=3, temperature=3.0)
    prompts = prompts_of(policy, cfg, tmp_path)
    rollouts = pebr.generate_rollouts(policy, prompts, 3, cfg, accelerator, cfg.temperature)
    assert [r.prompt is prompts[i // 3] for i, r in enumerate(rollouts)] == [True] * 6
    assert len({r.text for r in rollouts}) > 1
    for r in rollouts:
        ends = [t for t in r.tokens.tolist() if t in policy.end_ids]
        assert len(ends) == (0 if r.truncated else 1) and (r.truncated or r.tokens[-1].item() == ends[0])
    assert {r.truncated for r in rollouts} == {True, False}


def test_decode_attention_is_attention_to_the_repeated_prompt_and_to_the_own_tokens():
    """2 prompts (one with padding) x 3 rows, two heads for each key head, 70 tokens (more than the first room of 64); rows, and
    in the end a whole prompt, leave on the way."""
    torch.manual_seed(0)
    prompt_keys, prompt_values, query, keys, values = (
        torch.randn(*shape, 8) for shape in ((2, 2, 5), (2, 2, 5), (6, 4, 70), (6, 2, 70), (6, 2, 70))
    )
    prompt, bias, alive = torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(2, 1, 1, 5), torch.arange(6)
    bias[1, ..., :2] = float("-inf")
    cache = pebr.GroupCache([(prompt_keys, prompt_values)], bias, 3, torch.arange(6))
    for t in range(70):
        if t in (3, 66):
            going = torch.tensor([0, 2, 3, 5]) if t == 3 else torch.tensor([2, 3])  # rows 1 and 4 leave, then 0 and 2
            cache.keep(going)
            alive = alive[going]
        now = slice(t, t + 1)
        got = pebr.decode_attention(query[alive, :, now], keys[alive, :, now], values[alive, :, now], 0.3, cache, 0, t)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[alive, :, now], torch.cat([prompt_keys[prompt], keys[:, :, : t + 1]], 2)[alive],
            torch.cat([prompt_values[prompt], values[:, :, : t + 1]], 2)[alive],
            attn_mask=torch.nn.functional.pad(bias[prompt], (0, t + 1))[alive], scale=0.3, enable_gqa=True,
        )  # fmt: skip
        torch.testing.assert_close(got, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)
    assert alive.tolist() == [3, 5] and len(cache.bias) == len(cache.prompts[0][0]) == 1  # prompt 0 is gone


def test_rows_that_have_ended_leave_an_eighth_of_the_batch_at_a_time(policy, cfg, tmp_path):
    """Row r of 16 ends with its token r + 1. noise tells choose which row is which."""
    noise, sizes, end = torch.zeros(16, 16, 8), [], policy.end_ids[0]
    noise[:, :, 0], noise[:, :, 1] = torch.arange(16.0)[:, None], torch.arange(16.0)

    def choose(logits, noise):
        sizes.append(len(logits))
        return torch.where(noise[:, 0] == noise[:, 1], end, 20), noise[:, 0]

    with torch.no_grad():
        responses = pebr.decode(
            policy, prompts_of(policy, cfg, tmp_path), 8, pebr.replace(cfg, max_new_tokens=16), choose, noise
        )
    assert [len(tokens) for tokens, _ in responses] == list(range(1, 17))
    assert all(set(logprobs.tolist()) == {float(row)} for row, (_, logprobs) in enumerate(responses))
    # 15 of 16 go on: more than 7/8, none leaves; 14: two leave. So on to 8 rows, of which each one is an eighth.
    assert sizes == [16, 16, 14, 14, 12, 12, 10, 10, 8, 7, 6, 5, 4, 3, 2, 1]


def test_autocast_casts_the_weights_once_a_rollout_and_not_once_a_token(policy, cfg, tmp_path):
    from torch.profiler import ProfilerActivity, profile

    policy.end_ids, prompts = [], prompts_of(policy, cfg, tmp_path)
    head = list(policy.model.get_output_embeddings().weight.shape)

    def casts_of_the_head(max_new_tokens):
        with (
            profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen,
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16),
        ):
            most_likely = lambda logits, noise: (logits.argmax(-1), logits[:, 0].float())
            pebr.decode(
                policy, prompts, 2, pebr.replace(cfg, max_new_tokens=max_new_tokens), most_likely, torch.zeros(4, 9, 8)
            )
        return sum(event.name == "aten::_to_copy" and event.input_shapes[0] == head for event in seen.events())

    assert casts_of_the_head(9) == casts_of_the_head(3) == 1


def test_under_autocast_the_prompts_cache_is_bf16_as_the_memory_plan_counts_it(policy, cfg, tmp_path):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, _, cache = pebr.prefill(policy, prompts_of(policy, cfg, tmp_path), 3)
    T = max(prompt.inputs["input_ids"].shape[1] for prompt in prompts_of(policy, cfg, tmp_path))
    assert {x.dtype for layer in cache.prompts for x in layer} == {torch.bfloat16}
    cfg = pebr.replace(cfg, max_prompt_length=3 * T, max_new_tokens=0, mixed_precision="bf16")  # 3 T: a third of it each
    assert sum(x.nbytes for layer in cache.prompts for x in layer) == 2 * pebr.kv_bytes(policy, cfg, 3)  # 2 prompts of T


def test_an_image_token_is_never_sampled(policy, cfg, tmp_path, accelerator):
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    assert policy.banned_ids == sorted(policy.processor.tokenizer.convert_tokens_to_ids(names))
    cfg = pebr.replace(cfg, max_new_tokens=60, temperature=50.0, top_p=1.0)  # near uniform over some 80 tokens
    prompts = prompts_of(policy, cfg, tmp_path)

    def sampled_marks():
        torch.manual_seed(0)
        rollouts = pebr.generate_rollouts(policy, prompts, 8, cfg, accelerator, cfg.temperature)
        return sum(t in banned for r in rollouts for t in r.tokens.tolist())

    banned = list(policy.banned_ids)
    assert sampled_marks() == 0
    policy.banned_ids = []
    assert sampled_marks() > 0  # without the ban they do come


def test_the_folders_generation_config_does_not_leak_into_rollouts_and_is_kept_on_saving(toy, cfg, tmp_path, accelerator):
    from transformers import GenerationConfig

    plain = pebr.replace(cfg, engine="plain")
    policy = pebr.load_policy(str(toy / "model"), plain)
    policy.saved_generation_config.update(min_new_tokens=7, no_repeat_ngram_size=1, repetition_penalty=1.5)
    pebr.save_policy(policy, accelerator, policy, tmp_path / "model")
    leaky = pebr.load_policy(str(tmp_path / "model"), plain)
    assert leaky.end_ids == policy.end_ids and len(leaky.end_ids) == 2
    both = []
    for one in (policy, leaky):
        torch.manual_seed(0)
        both.append(
            [r.text for r in pebr.generate_rollouts(one, prompts_of(one, cfg, tmp_path)[:1], 8, plain, accelerator, 3.0)]
        )
    assert both[0] == both[1]
    assert GenerationConfig.from_pretrained(tmp_path / "model").no_repeat_ngram_size == 1


def test_special_tokens_are_not_doubled(policy, cfg, tmp_path):
    from tokenizers.processors import TemplateProcessing

    begin = policy.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")  # a tokenizer that adds a begin token by itself
    policy.processor.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    assert policy.processor.tokenizer("red")["input_ids"][0] == begin
    ids = prompts_of(policy, cfg, tmp_path)[0].inputs["input_ids"][0].tolist()
    assert ids.count(begin) == 2  # user and assistant, as in the template
    assert begin not in pebr.encode_response(policy, "red circle").tolist()


def test_warmup_labels_cover_exactly_the_response_and_its_end(policy, cfg, toy):
    rows, _ = data.load_rows(str(toy / "sft.json"))
    prompts = [pebr.encode_prompt(policy, row, cfg, "{question}") for row in rows[:3]]
    responses = [pebr.encode_response(policy, row.response) for row in rows[:3]]
    batch = pebr.collate(prompts, responses, policy.pad_id, "cpu")
    _, _, mask = policy(prompts, responses, 1.0)
    for ids, kept, row in zip(batch["input_ids"][:, -mask.shape[1] :], mask.bool(), rows):
        *labels, end = ids[kept].tolist()
        assert policy.processor.tokenizer.decode(labels).split() == row.response.split()
        assert end == policy.processor.tokenizer.eos_token_id


def test_freezing_vision_leaves_only_the_language_model_to_train(policy):
    pebr.freeze_vision(policy.model)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and not any("visual" in name for name in trained)
    assert any("layers.0.mlp" in name for name in trained) and "lm_head.weight" in trained


# ----------------------------------------------------------------------------------------------------------------------
# Data

ROW = {"qid": "1", "problem": "<image>How many?", "answer": "3", "images": ["a.png"], "key_words": ["red dot"]}


SAID = {"role": "user", "content": "q"}
# fmt: off
BROKEN_ROWS = {  # how a good row is changed, and the message
    "qid missing": ({"qid": None}, '"qid" is missing'),
    "qid of the wrong type": ({"qid": True}, '"qid" is missing, empty or no text'),
    "qid twice": ({"qid": "0"}, "qid 0 is already that of rows.json row 0"),
    "problem empty": ({"problem": " "}, '"problem" is missing'),
    "answer a list": ({"answer": ["3"]}, '"answer" is missing, empty or no text'),
    "answer NaN": ({"answer": math.nan}, "it holds NaN"),
    "infinite number in a field nobody reads": ({"level": math.inf}, "an infinite number"),
    "half a surrogate pair": ({"problem": "\ud800"}, "half of a surrogate pair"),
    "key words empty": ({"key_words": []}, '"key_words" is missing or empty'),
    "key words no texts": ({"key_words": [3]}, '"key_words" must be a list of texts'),
    "a million characters": ({"problem": "How many? " * 100_000}, "--max_prompt_length is 64"),
    "the model's own mark in a question": ({"problem": "<image>What is <|image_pad|>?"}, "its text holds <|image_pad|>"),
    "the model's own mark in a response": ({"messages": [SAID, {**SAID, "role": "assistant", "content": "### The final answer is: <|image_pad|>"}]}, "its text holds <|image_pad|>"),
    "conversation of another kind": ({"conversations": [{"from": "human", "value": "q"}]}, 'no "messages"'),
    "conversation without response": ({"messages": [SAID]}, "messages must be (system,) user, assistant"),
    "response without answer": ({"messages": [SAID, {**SAID, "role": "assistant"}]}, "no answer to grade against"),
    "images a text": ({"images": "a.png"}, '"images" must be a list'),
    "more pictures than marks": ({"images": ["a.png", "a.png"]}, "1 <image> marks for 2 pictures"),
    "picture missing": ({"images": ["b.png"]}, "picture b.png is not in"),
    "picture above the root": ({"images": ["../secret.png"]}, "outside the image root"),
    "absolute path": ({"images": ["/etc/hostname"]}, "outside the image root"),
    "link out of the root": ({"images": ["link.png"]}, "outside the image root"),
    "link to itself": ({"images": ["loop.png"]}, "picture loop.png is not in"),
    "zero byte in a path": ({"images": ["a.png\0"]}, "is not in"),
    "path of 100,000 characters": ({"images": ["a" * 100_000]}, "is not in"),
    "picture is a directory": ({"images": ["folder"]}, "or is no regular file"),
    "picture is a pipe": ({"images": ["pipe.png"]}, "or is no regular file"),
    "picture broken": ({"images": ["broken.png"]}, "is not readable"),
    "picture of 1 x 300 pixels": ({"images": ["line.png"]}, "the processor refuses it"),
}
# fmt: on


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_a_broken_row_is_named_with_its_reason_and_stops_the_run(policy, cfg, tmp_path, accelerator, name, capsys):
    change, reason = BROKEN_ROWS[name]
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    picture(root / "a.png")
    picture(tmp_path / "secret.png")
    Image.new("RGB", (300, 1)).save(root / "line.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:60])
    path = root / "rows.json"
    path.write_text(json.dumps([{**ROW, "qid": "0"}, {**ROW, **change}, {**ROW, "qid": "2"}]))
    need = ("answer",) if "messages" in change else ("answer", "key_words")
    with pytest.raises(DataError) as error:
        pebr.checked_rows(str(path), cfg, policy, accelerator, need)
    assert "rows.json row 1: " in str(error.value) and reason in str(error.value) and "1 broken rows" in str(error.value)
    assert len(str(error.value)) < 1000
    kept = pebr.checked_rows(str(path), pebr.replace(cfg, skip_bad_rows=True), policy, accelerator, need)
    assert [row.qid for row in kept] == ["0", "2"]
    assert "dropped 1 broken rows" in capsys.readouterr().out


# fmt: off
GOOD_ROW, TSV_HEADER = json.dumps({**ROW, "images": []}).encode().replace(b"<image>", b""), b"index\timage\tquestion\tanswer\n"
NO_JSON = "neither a JSON list nor one JSON object a line, in UTF-8 "
FILES = {  # name of the file, its bytes or its maker; the message, or the qids (of a --prompt_file: the text) that it has
    "empty": ("rows.json", b"", "no rows"),
    "empty list": ("rows.json", b"[]", "no rows"),
    "no JSON": ("rows.json", b"{oops", NO_JSON + "(Expecting property name"),
    "list cut off": ("rows.json", b"[" + GOOD_ROW + b', {"qid', NO_JSON + "(Unterminated string"),
    "last line cut off": ("rows.jsonl", GOOD_ROW + b'\n{"qid": "2', NO_JSON + "(line 2: Unterminated string"),
    "deeply nested": ("rows.json", b"[" * 100_000, NO_JSON + "(maximum recursion depth"),
    "nested in a row": ("rows.json", b'[{"a": ' + b"[" * 900 + b"]" * 900 + b"}]", "rows.json row 0: "),
    "a number of 5,000 digits": ("rows.json", b'[{"qid": ' + b"9" * 5000 + b"}]", NO_JSON + "(Exceeds the limit"),
    "a key twice": ("rows.json", b'[{"answer": "3", "answer": "4"}]', NO_JSON + "(a key comes twice in [('answer', '3')"),
    "UTF-16": ("rows.json", GOOD_ROW.decode().encode("utf-16"), NO_JSON + "('utf-8' codec"),
    "a pickle": ("rows.json", pickle.dumps(Payload("ran")), NO_JSON + "('utf-8' codec"),
    "no objects": ("rows.json", b'[1, "x", null]', "row 2: a row must be a JSON object"),
    "missing": ("rows.json", lambda path: None, "no such file"),
    "zero byte in its name": ("rows\0.json", lambda path: None, "no such file"),
    "a directory": ("rows.json", os.mkdir, "not a regular file"),
    "a pipe": ("rows.json", os.mkfifo, "not a regular file"),
    "cannot be read": ("rows.json", lambda path: os.symlink("/proc/self/mem", path), "cannot be read (Input/output error)"),
    "byte order mark": ("rows.json", b"\xef\xbb\xbf[" + GOOD_ROW + b"]", ["1"]),
    "CRLF": ("rows.jsonl", GOOD_ROW + b"\r\n\r\n" + GOOD_ROW.replace(b'"1"', b'"2"') + b"\r\n", ["1", "2"]),
    "a text of 10 MB": ("rows.json", GOOD_ROW.replace(b"How many?", b"?" * 10**7), ["1"]),
    "a summary.json that names another image root beside it": ("rows.json", lambda path: (
        Path(path).write_text(json.dumps({**ROW, "images": [pebr.__file__[1:]]})),
        Path(path).with_name("summary.json").write_text('{"image_root": "/"}')), "(--image_root), or is no regular file"),
    "prompt: no UTF-8": ("prompt.txt", b"\xff{question}", "no text in UTF-8"),
    "prompt: no mark": ("prompt.txt", b"Look first.", "or it lacks the mark {question}"),
    "prompt: a directory": ("prompt.txt", os.mkdir, "no such file, or it lacks"),
    "prompt: byte order mark": ("prompt.txt", b"\xef\xbb\xbfLook. {question}", ["Look. {question}"]),
    "TSV: empty": ("rows.tsv", b"", "no rows"),
    "TSV: header only": ("rows.tsv", TSV_HEADER, "no rows"),
    "TSV: no picture column": ("rows.tsv", b"index\tquestion\tanswer\n1\tq\ta\n", "no image or image_path column; its columns are answer, index, question"),
    "TSV: no index": ("rows.tsv", b"image\tquestion\tanswer\n1\tq\ta\n", "no index column"),
    "TSV: a column twice": ("rows.tsv", TSV_HEADER[:-1] + b"\tanswer\n1\tx\tq\ta\tb\n", "a column comes twice"),
    "TSV: no UTF-8": ("rows.tsv", b"index\xff\timage\n", "no tab-separated table"),
    "TSV: a cell too few": ("rows.tsv", TSV_HEADER + b"1\tx\tq\n", "row 0: it has not as many cells as the header has columns"),
    "TSV: a cell too many": ("rows.tsv", TSV_HEADER + b"1\tx\tq\ta\tb\n", "row 0: it has not as many cells as the header has columns"),
    "TSV: CRLF and byte order mark": ("rows.tsv", b"\xef\xbb\xbf" + TSV_HEADER.replace(b"\n", b"\r\n") + b"7\t" + b"A" * 80 + b"\tq\ta\r\n", ["7"]),
}
# fmt: on


@pytest.mark.parametrize("name", FILES)
def test_a_data_file_is_read_or_says_why_not(name, tmp_path):
    file, content, expected = FILES[name]
    path = f"{tmp_path}/{file}"
    Path(path).write_bytes(content) if isinstance(content, bytes) else content(path)
    try:
        rows, problems = ([], []) if "prompt" in name else data.load_rows(path)
        found = "; ".join(problems) or [row.qid for row in rows] or [pebr.read_instruction(Config(prompt_file=path))]
    except (DataError, ConfigError) as error:
        found = str(error)
        assert found.removeprefix("--prompt_file ").startswith(path + ": ")
    assert found == expected if isinstance(expected, list) else expected in found


def test_json_and_jsonl_give_the_same_rows(tmp_path):
    picture(tmp_path / "a.png")
    rows = [{**ROW, "qid": "1"}, {**ROW, "qid": "2", "answer": 4}]
    rows[1]["problem"] = "line\u2028separator"  # no end of a JSON line
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps(rows, ensure_ascii=False))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    read = [data.load_rows(str(tmp_path / name)) for name in ("rows.json", "rows.jsonl")]
    assert [(r.qid, r.answer, r.images, r.raw) for r in read[0][0]] == [
        (r.qid, r.answer, r.images, r.raw) for r in read[1][0]
    ]
    assert read[0][1] == read[1][1] == [] and read[0][0][1].answer == "4"


def test_image_marks_place_the_pictures_and_without_marks_they_come_first():
    content = lambda problem, n: [
        c.get("text", "IMG")
        for c in data.chat_messages(Row("", "", problem, "", ["x"] * n), "Q: {question}!")[-1]["content"]
    ]
    assert content("a <image> b <image>", 2) == ["Q: a ", "IMG", " b ", "IMG", "!"]
    assert content("a b", 2) == ["IMG", "IMG", "Q: a b!"]
    assert content("a b", 0) == ["Q: a b!"]


def test_pictures_are_turned_and_brought_into_the_pixel_limits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown turned by 90 degrees
    Image.new("RGB", (400, 100)).save(tmp_path / "a.jpg", exif=exif)
    assert data.load_image(str(tmp_path / "a.jpg"), 1, 10**6).size == (100, 400)
    small = data.load_image(str(tmp_path / "a.jpg"), 1, 10_000)
    assert small.width * small.height <= 10_000 and small.size == (50, 200)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert data.load_image(str(tmp_path / "b.png"), 576, 10_000).size == (24, 24)


def saved(mode, color, size=(8, 6), palette=None, **options):
    """Maker of a picture in one color."""

    def make(path):
        image = Image.new(mode, size, color)
        if palette:
            image.putpalette(palette)
        image.save(path, **options)

    return make


def png_header(width, height):
    """A PNG that says it has that size, and has next to nothing."""
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


RED, BLUE, GRAY, WHITE = (255, 0, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255)
FRAMES = dict(save_all=True, append_images=[Image.new("RGB", (8, 6), BLUE)])
# fmt: off
PICTURES = {  # name of the file, its maker or its bytes; the color that it has, or the message
    "cut off": ("a.png", png_header(8, 6), "image file is truncated"),
    "zero bytes": ("a.png", b"", "not readable (cannot identify image file"),
    "a text": ("a.png", b"hello", "not readable (cannot identify image file"),
    "an EPS, which is a program": ("a.eps", saved("RGB", RED), "not readable (cannot identify image file"),
    "12,000 x 12,000": ("a.png", png_header(12_000, 12_000), "too large (12000 x 12000 pixels, the limit is 67108864): reduce it first"),
    "30,000 x 30,000": ("a.png", png_header(30_000, 30_000), "too large (Image size (900000000 pixels) exceeds limit"),
    "32 bits": ("a.tif", saved("I", 70_000), "mode I has no agreed white"),
    "floating point": ("a.tif", saved("F", 0.5), "mode F has no agreed white"),
    "1 x 1": ("a.png", saved("RGB", RED, (1, 1)), RED),
    "CMYK": ("a.tif", saved("CMYK", (0, 255, 255, 0)), RED),
    "16 bits": ("a.png", saved("I;16", 32_896), GRAY),  # 32,896 / 257; Pillow's own conversion clips it to white
    "gray": ("a.png", saved("L", 128), GRAY),
    "black and white": ("a.png", saved("1", 1), WHITE),
    "animated": ("a.gif", saved("RGB", RED, **FRAMES), RED),
    "animated PNG": ("a.png", saved("RGB", RED, **FRAMES), RED),
    "wrong extension": ("a.jpg", saved("RGB", RED, format="PNG"), RED),
    "transparent": ("a.png", saved("RGBA", (255, 0, 0, 0)), WHITE),
    "half transparent": ("a.png", saved("LA", (1, 127)), GRAY),  # 1 * 127 / 255 + 255 * 128 / 255 = 128.5, cut off
    "transparent palette": ("a.png", saved("P", 1, palette=[255, 0, 0, 0, 0, 255], transparency=1), WHITE),
    "opaque palette": ("a.png", saved("P", 1, palette=[255, 0, 0, 0, 0, 255], transparency=0), BLUE),
    "a transparent color": ("a.png", saved("RGB", RED, transparency=RED), WHITE),
}
# fmt: on


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_is_read_as_people_see_it_or_says_why_not(name, tmp_path):
    file, content, expected = PICTURES[name]
    path = tmp_path / file
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    if isinstance(expected, tuple):
        image = data.load_image(str(path), 1, 10**6)
        assert image.mode == "RGB" and image.getcolors() == [(image.width * image.height, expected)]
    else:
        with pytest.raises(DataError, match=re.escape(f"picture {path} is ") + ".*" + re.escape(expected)):
            data.load_image(str(path), 1, 10**6)


def test_prompts_are_made_in_threads_while_the_batch_before_is_used(policy, cfg, toy, tmp_path, monkeypatch):
    rows, _ = data.load_rows(str(toy / "train.json"))
    opened, load = [], pebr.load_image
    monkeypatch.setattr(pebr, "load_image", lambda path, *limits: opened.append(path) or load(path, *limits))
    batches = [list(enumerate(rows * 20)), [(7, rows[0])], []]  # enough of them for two threads to meet in the tokenizer
    ahead = pebr.prompts_ahead(policy, iter(batches), cfg)
    prompts, end = next(ahead), time.monotonic() + 20
    while len(opened) < len(batches[0]) + 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(opened) == len(batches[0]) + 1  # the second batch's picture, too, though nobody has asked for it
    for prompt, (position, row) in zip(prompts, batches[0], strict=True):
        alone = pebr.encode_prompt(policy, row, cfg, "{question}")
        assert prompt.position == position and prompt.row is row and prompt.inputs.keys() == alone.inputs.keys()
        assert all(torch.equal(prompt.inputs[name], alone.inputs[name]) for name in alone.inputs)
    assert [[prompt.position for prompt in batch] for batch in ahead] == [[7], []]


def test_a_picture_that_breaks_after_the_check_stops_the_run_with_its_row(toy, toy_run, tmp_path):
    rows = json.loads((toy / "train.json").read_text())
    (tmp_path / "toy").symlink_to(toy)
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "images": ["a.png"]} for row in rows]))
    picture(tmp_path / "a.png")
    argv = ["--stage", "reasoning", *SMALL, "--from_model", str(toy_run / "warmup"), "--from_data", str(tmp_path / "rows.json")]
    run(tmp_path, *argv)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(SystemExit, match=r"rows.json row \d: picture .*a.png is not readable"):
        run(tmp_path, *argv, "--overwrite")


def test_a_row_is_checked_once_in_a_run_folder(policy, cfg, toy, tmp_path, accelerator, monkeypatch):
    opened, load = [], pebr.load_image
    monkeypatch.setattr(pebr, "load_image", lambda path, *limits: opened.append(path) or load(path, *limits))
    picture(tmp_path / "a.png"), picture(tmp_path / "b.png", (112, 112))
    rows = [{**ROW, "qid": name, "images": [f"{name}.png"]} for name in "ab"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def opens(stage, path="rows.json", **limits):  # names of the pictures that a stage's check opens
        opened.clear()
        stage_cfg = pebr.resolve(stage, {"run_dir": str(tmp_path), "prompt_file": cfg.prompt_file, **limits})
        assert len(pebr.checked_rows(str(tmp_path / path), stage_cfg, policy, accelerator, ("answer",))) == len(rows)
        return "".join(sorted(Path(name).stem for name in opened))

    assert opens("sample") == "ab" and opens("evaluate") == opens("perception") == opens("sample") == ""
    long = len(pebr.encode_prompt(policy, data.load_rows(str(tmp_path / "rows.json"))[0][1], cfg, "{question}").inputs["input_ids"][0])
    assert opens("reasoning", max_prompt_length=long - 1, max_pixels=3136) == "b"  # with sampling's larger picture too long
    assert opens("sample", max_pixels=5_000_000) == "ab" and opens("sample", min_pixels=577) == "ab"
    rows.append({**ROW, "qid": "c", "images": ["a.png"], "problem": "<image>How few?"})
    (tmp_path / "more.json").write_text(json.dumps(rows))
    assert opens("sample", "more.json") == "a"


def test_the_papers_warmup_filters_drop_and_count(tmp_path):
    picture(tmp_path / "big.png", (28, 28)), picture(tmp_path / "low.png", (80, 27))
    row = lambda image, response: Row("", "", "q", "", [str(tmp_path / image)], response=response)
    rows = [row("big.png", "fine"), row("low.png", "fine"), row("big.png", "Hm. LET ME RETHINK IT.")]
    kept, dropped = data.filter_warmup_rows(rows)
    assert kept == rows[:1] and dropped == {"rethink": 1, "small_picture": 1}


def test_difficulty_is_all_some_or_none_right():
    rows = [Row("", q, "", "", []) for q in "abc"]
    split = pebr.split_by_difficulty(rows, {"a": [1.0] * 8, "b": [0.0] * 8, "c": [1, 0, 0, 1, 1, 0, 0, 0]}, 8)
    assert {name: [row.qid for row in part] for name, part in split.items()} == {
        "easy": ["a"],
        "hard": ["b"],
        "medium": ["c"],
    }


@pytest.mark.parametrize("n", [7, 16])
def test_a_question_without_exactly_n_scores_fails(n):
    with pytest.raises(DataError, match=f"has {n} scores instead of 8"):
        pebr.split_by_difficulty([Row("", "a", "", "", [])], {"a": [1.0] * n}, 8)


def test_shuffled_batches_cover_each_epoch_once():
    batches = [pebr.shuffled_batch(list(range(10)), step, 4, seed=0) for step in range(5)]
    stream = sum(batches, [])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10)) and stream[:10] != stream[10:]
    assert batches == [pebr.shuffled_batch(list(range(10)), step, 4, seed=0) for step in range(5)]


# ----------------------------------------------------------------------------------------------------------------------
# Survival: kills, signals, faults, run folders


def in_child(commands, log):
    """Command lines in a row in this process, as fresh ones; what they print goes into the file log."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    for argv in commands:
        pebr.main([str(word) for word in argv])


def start(log, *commands):
    """A process that runs them: a fork of one that has imported everything, so that a kill costs no start."""
    log.touch()
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_pebr"])
    process = server.Process(target=in_child, args=(commands, str(log)))
    process.start()
    return process


def wait_for(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.01)


def contents(run_dir):
    """{name: bytes} of what a run leaves, without clocks, paths and the toy world: the same for two runs with one seed."""
    skipped = ("timing.jsonl", "stage.json", "run_config.json", "checked.json", "run.lock", "log.txt")
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.name not in skipped]
    return {name: path.read_bytes() for path in files if not (name := str(path.relative_to(run_dir))).startswith("toy/")}


LONGER = ["--rollout_batch_size", "4", "--update_batch_size", "2", "--group_size", "2", "--max_new_tokens", "16", "--sft_batch_size", "4",
          "--eval_samples", "2", "--print_every", "0", "--generate_batch_size", "2", "--threads", "1"]  # fmt: skip


ALL = ("warmup", "sample", "perception", "reasoning", "evaluate")


def stage_by_stage(run_dir, seed, steps):
    """Command lines of all stages. The untrained model gets nothing right, hence --from_data."""
    base = ["--run_dir", run_dir, "--seed", seed, "--max_steps", steps, "--checkpoint_minutes", 0, *LONGER]
    questions = ["--from_data", run_dir / "toy" / "train.json"]
    return [[*base, "--stage", stage, *(questions if stage in ("perception", "reasoning") else [])] for stage in ALL]


def kill_and_compare(folder, seed, runs, steps, rng):
    """All stages without a break; then `runs`, lists of stages to be killed (SIGKILL) in at a random moment, each time started
    again. Returns (where the kills fell, names of all files compared, names of those that differ)."""
    whole, log, where, compared, differ = folder / "whole", folder / "log.txt", Counter(), [], []
    start(log).join()  # the imports, once
    data.build_toy_world(str(whole / "toy"), seed, TINY)
    clock, process = time.monotonic(), start(log, *stage_by_stage(whole, seed, steps))
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    span, expected = time.monotonic() - clock, contents(whole)
    for i, targets in enumerate(runs):
        run_dir = folder / f"killed{i}"
        data.build_toy_world(str(run_dir / "toy"), seed, TINY)
        for target in (*targets, "end"):
            process = start(log, *stage_by_stage(run_dir, seed, steps))
            begun = rng.choice([f"{target}/run_config.json", f"{target}/*.jsonl", f"{target}/**/*.jsonl"])
            while process.is_alive() and not any(run_dir.glob(begun)):
                time.sleep(0.01)
            process.join(rng.uniform(0, span / 8) if target != "end" else None)
            if process.is_alive():
                process.kill()
                process.join()
                at = next((stage for stage in ALL[:4] if not pebr.is_finished(run_dir / stage)), "evaluate")
                where[at + " while a checkpoint was written" * (run_dir / at / "writing").exists()] += 1
            else:
                assert process.exitcode == 0, log.read_text()[-3000:]
        found = contents(run_dir)
        compared += expected.keys() | found.keys()
        differ += [f"{run_dir}/{name}" for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
        for path in run_dir.rglob("*.jsonl"):
            assert [json.loads(line) for line in lines(path)], path
    return where, compared, differ


def kills(runs="4", steps="10"):
    """The long form of the kill test: every stage of so many runs is killed once, for two seeds. Prints a summary."""
    total = Counter()
    for seed in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            clock = time.monotonic()
            where, compared, differ = kill_and_compare(
                Path(folder), seed, [ALL] * int(runs), int(steps), random.Random(seed)
            )
        total += where
        print(f"\nseed {seed}: {where.total()} kills in {runs} runs, {time.monotonic() - clock:.0f} s; "
              f"{len(compared)} files compared, {len(differ)} differ {differ}", flush=True)  # fmt: skip
    print(f"{total.total()} kills:", ", ".join(f"{count} in {name}" for name, count in total.most_common()))


def test_a_run_that_is_killed_at_random_moments_ends_with_the_files_of_one_that_is_not(tmp_path):
    where, compared, differ = kill_and_compare(
        tmp_path, 0, [("warmup", "sample", "perception", "evaluate")], 3, random.Random(5)
    )
    assert where.total() >= 2 and differ == []  # the last one may come too late
    assert {"warmup/model.safetensors", "sample/rollouts.jsonl", "perception/samples.jsonl", "evaluate/table.txt"} <= set(
        compared
    )


@pytest.mark.parametrize(
    "stage, number", [("warmup", signal.SIGTERM), ("perception", signal.SIGINT), ("sample", signal.SIGTERM)]
)
def test_a_signal_ends_the_step_in_hand_and_the_same_command_goes_on_to_the_same_files(
    stage, number, toy, toy_run, tmp_path
):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "toy").symlink_to(toy)
    common = ["--stage", stage, *LONGER, "--max_steps", "12"]
    common += ["--from_model", str(toy_run / "warmup" if stage != "warmup" else toy / "model")]
    common += ["--from_data", str(toy / "train.json")] if stage == "perception" else []
    pebr.main(["--run_dir", str(tmp_path / "whole"), *common])
    command = ["--run_dir", str(tmp_path / "stopped"), *common]
    written = tmp_path / "stopped" / stage / ("rollouts.jsonl" if stage == "sample" else "metrics.jsonl")
    process = start(tmp_path / "log.txt", command)
    wait_for(lambda: written.is_file() and lines(written), process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert f"stopped by {number.name}; the same command goes on" in (tmp_path / "log.txt").read_text()
    done = len(lines(written))
    assert 0 < done < (TINY.rl_rows if stage == "sample" else 12)
    assert stage == "sample" or [path.name for path in pebr.checkpoints(written.parent)] == [f"checkpoint-{done}"]
    pebr.main(command)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_second_signal_stops_at_once(toy, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    command = [
        "--run_dir",
        tmp_path,
        "--stage",
        "dryrun",
        *LONGER,
        "--max_new_tokens",
        "50000",
        "--max_prompt_length",
        "99",
    ]  # no response ends early
    process = start(tmp_path / "log.txt", command)
    wait_for(lambda: "needed on each process" in (tmp_path / "log.txt").read_text(), process)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)  # within a second: a launcher that passes on what the terminal has sent already
    process.join(1.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 130


def test_handlers_are_those_from_before_when_main_is_done(toy_run):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run(toy_run, "--stage", "warmup", *SMALL)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def interrupted(toy, toy_run, run_dir, *argv):
    """Perception, stopped after its fourth step as by a signal, with a checkpoint after each. Returns the command line."""
    (run_dir / "toy").symlink_to(toy)
    command = ["--stage", "perception", *LONGER, "--max_steps", "6", "--checkpoint_minutes", "0", *argv,
               "--from_model", str(toy_run / "warmup"), "--from_data", str(toy / "train.json")]  # fmt: skip
    whole_step = pebr.log_step

    def log_step(folder, cfg, step, *rest):
        whole_step(folder, cfg, step, *rest)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(pebr, "log_step", log_step)
        run(run_dir, *command)
    assert stopped.value.code == 128 + signal.SIGTERM
    return command


@pytest.mark.parametrize(
    "tear, message",
    [
        (lambda path: (path / "complete.json").unlink(), "complete.json is missing or broken"),
        (lambda path: (path / "complete.json").write_text('{"step"'), "complete.json is missing or broken"),
        (lambda path: (path / "optimizer.bin").unlink(), "optimizer.bin has 0 bytes of"),
        (lambda path: os.truncate(path / "model.safetensors", 1000), "model.safetensors has 1000 bytes of"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_and_the_one_before_it_gives_the_same_end(
    tear, message, toy, toy_run, tmp_path, capsys
):
    command = interrupted(toy, toy_run, tmp_path)
    assert [path.name for path in pebr.checkpoints(tmp_path / "perception")] == [
        "checkpoint-3",
        "checkpoint-4",
    ]  # 2 are kept
    before = lines(tmp_path / "perception" / "samples.jsonl")
    tear(tmp_path / "perception" / "checkpoint-4")
    run(tmp_path, *command)
    printed = capsys.readouterr().out
    assert f"checkpoint-4 is torn ({message}" in printed and "resuming after step 3" in printed
    after = lines(tmp_path / "perception" / "samples.jsonl")
    assert after[: len(before)] == before and len(after) == 6 * 4 * 2  # steps x questions x G


def test_a_checkpoint_holds_the_random_states_and_loads_no_foreign_pickle(tmp_path, policy, cfg, accelerator):
    import numpy

    model, optimizer = pebr.prepare_training(policy, cfg, accelerator)
    draw = lambda: (torch.rand(1).item(), random.random(), numpy.random.rand())
    pebr.save_checkpoint(tmp_path, 7, cfg, accelerator)
    drawn = draw()
    assert pebr.load_checkpoint(tmp_path, accelerator) == 7 and draw() == drawn
    torch.save({"state": Payload(tmp_path / "ran"), "param_groups": []}, tmp_path / "checkpoint-7" / "optimizer.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        accelerator.load_state(str(tmp_path / "checkpoint-7"))
    assert not (tmp_path / "ran").exists()
    accelerator.free_memory()


def test_checkpoints_are_due_by_the_clock(tmp_path, accelerator):
    def due(name, minutes_old, minutes=15.0):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 60 * minutes_old,) * 2)
        return pebr.checkpoint_due(tmp_path, Config(checkpoint_minutes=minutes), accelerator)

    assert not due("stage.json", 14) and due("stage.json", 16) and due("stage.json", 0, minutes=0.0)
    due("stage.json", 99)
    assert not due("checkpoint-3", 14) and due("checkpoint-3", 16)  # the last checkpoint counts
    assert not due("stage.json", 1)  # or the start, where that was later


@pytest.mark.parametrize("launcher", ["DDP", "FSDP2"])
def test_two_processes_stop_together_and_the_run_goes_on_with_the_same_counts(launcher, toy, toy_run, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    argv = ["--run_dir", str(tmp_path), "--stage", "reasoning", *LONGER, "--max_steps", "16",
            "--from_model", str(toy_run / "warmup"), "--from_data", str(toy / "train.json")]  # fmt: skip
    command, env = (
        [*LAUNCHERS[launcher], pebr.__file__, *argv],
        {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    metrics, samples = tmp_path / "reasoning" / "metrics.jsonl", tmp_path / "reasoning" / "samples.jsonl"
    with open(tmp_path / "log.txt", "w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as started:
        end = time.monotonic() + 120
        while not (metrics.is_file() and lines(metrics)):
            assert started.poll() is None and time.monotonic() < end, (tmp_path / "log.txt").read_text()[-3000:]
            time.sleep(0.05)
        psutil.Process(started.pid).children()[-1].send_signal(signal.SIGTERM)  # to one of them only
        started.wait(60)
    assert started.returncode and f"exitcode  : {128 + signal.SIGTERM}" in (tmp_path / "log.txt").read_text()
    done, before = len(lines(metrics)), lines(samples)
    assert 0 < done < 16 and len(before) == done * 4 * 2  # steps x questions x G
    [checkpoint] = pebr.checkpoints(tmp_path / "reasoning")
    assert checkpoint.name == f"checkpoint-{done}" and len(list(checkpoint.glob("random_states_*"))) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout := io.StringIO())
        if launcher == "DDP":
            pebr.main(argv)  # on one process
            assert "made by 2 processes, now 1: the same data and counts, but not bit-identical" in stdout.getvalue()
        else:
            with pytest.raises(SystemExit, match="was made with FSDP: start in the same way"):
                pebr.main(argv)
            subprocess.run(command, env=env, check=True, capture_output=True, timeout=120)
    after = pebr.read_jsonl(samples)
    assert lines(samples)[: len(before)] == before and pebr.is_finished(tmp_path / "reasoning")
    # 16 steps of 4 questions are 8 epochs of the 8; 2 rollouts each
    assert Counter(sample["qid"] for sample in after) == {f"train{i}": 8 * 2 for i in range(TINY.rl_rows)}


@pytest.mark.parametrize("stage", ["warmup", "reasoning"])
def test_too_many_skipped_updates_in_a_row_stop_the_run_and_save_the_samples(stage, toy, toy_run, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    argv = ["--stage", stage, *LONGER, "--learning_rate", "1e30", "--max_steps", "9", "--from_model", str(toy / "model"),
            "--lr_warmup", "0", "--from_data", str(toy / ("sft.json" if stage == "warmup" else "train.json"))]  # fmt: skip
    with pytest.raises(
        SystemExit, match=r"had a non-finite loss or gradient and were skipped. The step's samples are in .*non_finite.json"
    ):
        run(tmp_path, *argv, "--max_skipped_updates", "4")
    skipped = [json.loads(line)["skipped_updates"] for line in lines(tmp_path / stage / "metrics.jsonl")]
    # the first update makes the weights huge. warm-up: then one skip a step. reasoning: its first step has a second update
    assert skipped == ([0, 1, 1, 1, 1] if stage == "warmup" else [1, 2, 2])
    samples = json.loads((tmp_path / stage / "non_finite.json").read_text())
    assert len(samples) == (4 if stage == "warmup" else 4 * 2) and all(sample["row"] for sample in samples)


def run_out_of_memory_in_the_rollout(policy, cfg, tmp_path, accelerator):
    endless = pebr.replace(cfg, max_new_tokens=10**13)
    pebr.generate_rollouts(policy, prompts_of(policy, cfg, tmp_path), 2, endless, accelerator, 1.0)


def run_out_of_memory_in_the_update(policy, cfg, tmp_path, accelerator):
    rollouts = rollouts_of(prompts_of(policy, cfg, tmp_path), [3, 3], [1, -1])
    rollouts[0].tokens = torch.zeros(1, dtype=torch.long).expand(10**13)
    optimizer = torch.optim.AdamW(policy.model.parameters())
    pebr.update_policy(rollouts, policy, optimizer, pebr.replace(cfg, kl_coef=0.0), accelerator, off_policy=False)


def run_out_of_memory_in_the_reference(policy, cfg, tmp_path, accelerator):
    rollouts = rollouts_of(prompts_of(policy, cfg, tmp_path), [3, 3], [1, -1])
    rollouts[0].tokens = torch.zeros(1, dtype=torch.long).expand(10**13)
    pebr.add_reference(rollouts, policy, cfg, accelerator)


def run_out_of_memory_while_loading(policy, cfg, tmp_path, accelerator):
    policy.processor.save_pretrained(tmp_path)
    config = policy.model.config.to_dict()
    config["text_config"]["vocab_size"] = 10**12
    (tmp_path / "config.json").write_text(json.dumps(config))
    pebr.load_policy(str(tmp_path), pebr.replace(cfg, random_init=True))


def run_out_of_memory_in_the_reward(policy, cfg, tmp_path, accelerator):
    rollouts = rollouts_of(prompts_of(policy, cfg, tmp_path), [3, 3], [1, -1])
    with pytest.MonkeyPatch.context() as patch:  # somebody's own reward
        patch.setattr(rewards, "length_reward", lambda tokens: bytes(10**15))
        pebr.score_rollouts(rollouts, None)


@pytest.mark.parametrize(
    "work, advice",
    [
        (run_out_of_memory_in_the_rollout, "the rollout: lower --generate_batch_size"),
        (run_out_of_memory_in_the_update, "the update: lower --micro_batch_size"),
        (run_out_of_memory_in_the_reference, "the reference's log-probs: lower --micro_batch_size"),
        (run_out_of_memory_while_loading, "loading a model: take a smaller --model"),
        (run_out_of_memory_in_the_reward, "the reward: --clip_device cpu"),
    ],
)
def test_out_of_memory_says_which_flag_to_lower(work, advice, policy, cfg, tmp_path, accelerator):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        work(policy, cfg, tmp_path, accelerator)
    assert f"out of memory in {advice}" in pebr.out_of_memory(error.value)
    assert all(callable(getattr(pebr, name)) for name in pebr.OUT_OF_MEMORY)
    named = {word.strip(".,:;()") for text in pebr.OUT_OF_MEMORY.values() for word in text.split() if word.startswith("--")}
    assert {name.removeprefix("--") for name in named} <= {f.name for f in pebr.fields(Config)}


def test_out_of_memory_stops_the_script_with_the_advice(toy, toy_run, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    with pytest.raises(SystemExit, match="pebr.py: out of memory in the rollout: lower --generate_batch_size"):
        run(tmp_path, "--stage", "sample", *LONGER, "--from_model", str(toy_run / "warmup"), "--max_new_tokens", str(10**13))
    assert not pebr.out_of_memory(RuntimeError("another error")) and not pebr.out_of_memory(KeyError("x"))


def test_a_full_disk_names_the_path_and_leaves_the_checkpoints_usable(toy, toy_run, tmp_path):
    command = interrupted(toy, toy_run, tmp_path)
    folder = tmp_path / "perception"
    before = lines(folder / "samples.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the next checkpoint's files are longer
    try:
        with pytest.raises(SystemExit, match=rf"cannot write {folder}/checkpoint-5: .*\nMake room, or make it writable"):
            run(tmp_path, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in pebr.checkpoints(folder)] == ["checkpoint-3", "checkpoint-4"]
    (folder / "timing.jsonl").unlink()
    (folder / "timing.jsonl").symlink_to("/dev/full")  # a device that is always full
    with pytest.raises(SystemExit, match=rf"cannot write {folder}/timing.jsonl: .*No space left on device"):
        run(tmp_path, *command, "--keep_checkpoints", "3")
    (folder / "timing.jsonl").unlink()
    run(tmp_path, *command)
    assert lines(folder / "samples.jsonl")[: len(before)] == before and pebr.is_finished(folder)


@pytest.mark.parametrize("broken", ["raises", "is not a number"])
def test_a_reward_that_fails_stops_the_run_and_saves_the_sample(broken, toy, toy_run, tmp_path, monkeypatch):
    (tmp_path / "toy").symlink_to(toy)
    # somebody's own reward, which cannot do with a response of 16 tokens
    monkeypatch.setattr(
        rewards, "length_reward", lambda tokens: 1.0 / (tokens - 16) if broken == "raises" or tokens != 16 else math.nan
    )
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--stage", "sample", *LONGER, "--from_model", str(toy_run / "warmup"))
    sample = json.loads((tmp_path / "reward_error_0.json").read_text())
    assert f"the reward failed on question {sample['qid']}" in str(stopped.value)
    assert sample["response"] in str(stopped.value) and "reward_error_0.json" in str(stopped.value)
    assert ("ZeroDivisionError" if broken == "raises" else "not a finite number") in sample["error"]
    answered = pebr.read_jsonl(tmp_path / "sample" / "rollouts.jsonl")  # what came before stays; no 0 in this one's place
    assert sample["qid"] not in [record["qid"] for record in answered]


def test_final_folders_have_the_layout_that_transformers_and_vllm_load(toy_run):
    from safetensors import safe_open
    import transformers

    for stage in ("warmup", "perception", "reasoning"):
        folder = toy_run / stage
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                "chat_template.jinja"} <= names  # fmt: skip
        assert names & {"preprocessor_config.json", "processor_config.json"}  # the processor's, by transformers' version
        assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl", ".tmp"))} and not any(
            "checkpoint" in n for n in names
        )
        config = json.loads((folder / "config.json").read_text())
        assert hasattr(transformers, config["architectures"][0]) and config["model_type"] == "qwen2_5_vl"
        with (
            safe_open(folder / "model.safetensors", "pt") as weights,
            safe_open(toy_run / "toy/model/model.safetensors", "pt") as hub,
        ):
            assert weights.metadata() == {"format": "pt"} and set(weights.keys()) == set(
                hub.keys()
            )  # the base model's names


def locked_by_a_live_process(run_dir, toy_run):
    code = "import pebr, sys, time; accelerator = pebr.Accelerator(cpu=True)\n"
    code += "with pebr.run_lock(pebr.Path(sys.argv[1]), accelerator): print('locked', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, run_dir], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def no_folder_but_a_file(run_dir, toy_run):
    (run_dir / "toy").unlink()
    run_dir.rmdir()
    run_dir.write_text("")


def a_stage_that_is_a_file(run_dir, toy_run):
    (run_dir / "warmup").write_text("")


def read_only(run_dir, toy_run):
    run_dir.chmod(0o555)


def damaged(text):
    def stage_json(run_dir, toy_run):
        (run_dir / "warmup").mkdir()
        (run_dir / "warmup" / "stage.json").write_text(text)

    return stage_json


def of_another_config(run_dir, toy_run):
    damaged((toy_run / "warmup" / "stage.json").read_text().replace('"learning_rate": 0.002', '"learning_rate": 0.5'))(
        run_dir, toy_run
    )


def half_a_stage(run_dir, toy_run):
    record = json.loads((toy_run / "warmup" / "stage.json").read_text())
    damaged(json.dumps({**record, "finished": ""}))(run_dir, toy_run)
    (run_dir / "warmup" / "metrics.jsonl").write_text('{"step": 1, "loss": 9.9, "skipped_updates": 0.0}\n{"st')
    (run_dir / "warmup" / "checkpoint-1").mkdir()
    (run_dir / "warmup" / "writing").mkdir()


def killed_while_it_removed_a_stage(run_dir, toy_run):
    half_a_stage(run_dir, toy_run)
    (run_dir / "warmup").rename(run_dir / ".warmup.removed")


RUN_FOLDERS = [  # what the folder is like, and the message; none: the run goes through
    (locked_by_a_live_process, r"is in use by process \d+ on .*, started .*: wait for it, or use another --run_dir"),
    (no_folder_but_a_file, "--run_dir .*run: is a file"),
    (a_stage_that_is_a_file, "cannot write .*warmup: .*File exists"),
    (read_only, "cannot write .*Permission denied"),
    (damaged(""), "warmup/stage.json is damaged: delete the folder"),
    (damaged("[1]"), "warmup/stage.json is damaged: delete the folder"),
    (damaged('{"finished": "1"}'), "warmup/stage.json is damaged: delete the folder"),
    (damaged('{"stage": "warm'), "warmup/stage.json is damaged: delete the folder"),
    (of_another_config, "learning_rate was 0.5, now 0.002"),
    (half_a_stage, None),
    (killed_while_it_removed_a_stage, None),
]


@pytest.mark.parametrize("change, message", RUN_FOLDERS)
def test_run_folders(change, message, toy, toy_run):
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only its owner may enter
        os.chmod(folder, 0o755)
        run_dir = Path(folder, "run")
        run_dir.mkdir()
        (run_dir / "toy").symlink_to(toy)
        process = change(run_dir, toy_run)
        user = os.geteuid()
        if user == 0 and change is read_only:
            os.seteuid(65534)  # root may write everywhere
        try:
            with pytest.raises(SystemExit, match=message) if message else nullcontext():
                run(run_dir, "--stage", "warmup", *SMALL)
        finally:
            os.seteuid(user)
        if process:  # killed, it holds nothing any more: the kernel has freed the lock
            process.kill()
            process.communicate()
            run(run_dir, "--stage", "warmup", *SMALL)
        if process or not message:
            assert contents(run_dir).keys() == {n for n in contents(toy_run) if n.startswith("warmup/")}
            assert lines(run_dir / "warmup" / "metrics.jsonl") == lines(toy_run / "warmup" / "metrics.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# Benchmarks: files in the layouts that people have, scored to figures computed by hand


def base64_picture(mode="RGB", size=(56, 28)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def tsv(path, *rows):
    """A TSV as pandas writes it. Rows get an index, a picture and a question unless they have them."""
    rows = [{"index": i, "image": base64_picture(), "question": "q", **row} for i, row in enumerate(rows)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


NO_MODEL = ["--model", "none", "--mixed_precision", "no"]


def regrade(run_dir, path, responses, *argv):
    """scores.json of saved predictions: {qid: [response, ...]}, all of one length. No model is there to be loaded."""
    folder = run_dir / "evaluate" / "base"
    folder.mkdir(parents=True, exist_ok=True)
    mode = "greedy" if len(next(iter(responses.values()))) == 1 else "sampled"
    pebr.write_jsonl(
        folder / f"predictions_{mode}.jsonl", [{"qid": q, "responses": texts} for q, texts in responses.items()]
    )
    run(run_dir, "--stage", "evaluate", "--regrade", *NO_MODEL, "--test_data", path, *argv)
    return json.loads((folder / "scores.json").read_text())[mode]


def answered(*answers):
    return {str(i): [f"### The final answer is: {answer}"] for i, answer in enumerate(answers)}


VISTA = {"question_type": "free_form", "answer_type": "text", "choices": "[]", "answer_option": "", "skills": "['a']"}
PICK = {**VISTA, "question_type": "multi_choice"}
CASES = {  # file name: (rows with the answer given to each, accuracy, further scores)
    "MathVista_MINI.tsv": (
        [
            ({**PICK, "choices": "['(c)', '(a)', '(e)']", "answer": "(a)", "answer_option": "B"}, "B", 1),  # out of order: the label wins
            ({**PICK, "choices": "['Yes', 'No']", "answer": "No", "answer_option": "B"}, "Nope", 1),  # the most similar option
            ({**PICK, "choices": "['5', '5', '6']", "answer": "5", "answer_option": "A"}, "(B)", 1),  # the same text twice
            ({**PICK, "choices": "['B', 'A']", "answer": "A", "answer_option": "B"}, "B", 1),  # answer_option is a letter, never a text
            ({**VISTA, "answer_type": "integer", "answer": "7", "skills": "['a', 'b']"}, "7.9 years", 1),  # cut off, without the unit
            ({**VISTA, "answer_type": "float", "answer": "1.2", "precision": "1.0"}, "1.24", 1),  # rounded to the gold's places
            ({**VISTA, "answer_type": "float", "answer": "1.21", "precision": "2.0"}, "1.24", 0),
            ({**VISTA, "answer_type": "list", "answer": "[2014, 2016]", "skills": "['b']"}, "[2014,2016]", 1),
            ({**VISTA, "answer": "blue"}, "", 0),
        ],
        {},
    ),
    "MathVision.tsv": (
        [
            ({"choices": "['A', 'B', 'C', 'D', 'E']", "answer": "C"}, "(C)", 1),
            ({"choices": "['1/2', '3/4', '1', '2', '3']", "answer": "A"}, "0.5", 1),  # the option's value
            ({"choices": "[]", "answer": "2.333"}, "2.33", 1),  # two places
            ({"choices": "[]", "answer": "12"}, "13", 0),
            ({"choices": "[]", "answer": "C"}, "C", 1),  # a free form gold that is a letter
        ],
        {},
    ),
    "MathVerse_MINI.tsv": (
        [
            ({"question": "q\nChoices:\nA:40°\nB:60°", "answer": "B", "problem_version": "Vision Only"}, "60°", 1),
            ({"question": "q\nChoices:\nA:40°\nB:60°", "answer": "(A)", "problem_version": "Vision Only"}, "B", 0),
            ({"question": "q\nChoices:\nA:40°\nB:60°", "answer": "False", "problem_version": "Text Lite"}, "false", 1),
            ({"answer": "5", "problem_version": "Text Lite"}, "5.0", 1),
        ],
        {},
    ),
    "ChartQA_TEST.tsv": (  # relaxed as everyone has it; clean is 1, 1, 0, 1, 1, 1, 0, 1 of 8
        [
            ({"answer": "25", "split": "test_human"}, "25%", 0),
            ({"answer": "1234", "split": "test_human"}, "1,234", 0),
            ({"answer": "2015", "question": "In which year?", "split": "test_human"}, "1915", 1),  # 5 % off
            ({"answer": "['Blue', 'Red']", "split": "test_human"}, "red", 1),  # either
            ({"answer": "10", "split": "test_augmented"}, "10.5", 1),
            ({"answer": "0", "split": "test_augmented"}, "0.0", 0),
            ({"answer": "10", "split": "test_augmented"}, "10.6", 0),
            ({"answer": "0.25", "split": "test_augmented"}, "25%", 1),
        ],
        {"relaxed_clean": 0.75},
    ),
    "AI2D_TEST.tsv": (
        [
            ({"A": "ant", "B": "bee", "C": "NA", "D": "None", "answer": "B"}, "**B**", 1),
            ({"A": "ant", "B": "bee", "C": "NA", "D": "None", "answer": "D"}, "none", 1),  # option texts that pandas drops
            ({"A": "ant", "B": "bee", "C": "NA", "D": "None", "answer": "B"}, "A bee", 0),  # an article counts as option A
            ({"A": "ant", "B": "bee", "C": "nan", "D": "N/A", "answer": "C"}, "nan of these", 1),
            ({"A": "ant", "B": "bee", "answer": "B"}, "B is what I see in this one", 0),  # not among the last words, no text
        ],
        {},
    ),
    "MMStar.tsv": (
        [  # mean over sub-categories: (1/2 + 1) / 2
            ({"A": "1", "B": "2", "answer": "A", "category": "math", "l2_category": "x"}, "A", 1),
            ({"A": "1", "B": "2", "answer": "A", "category": "math", "l2_category": "x"}, "B", 0),
            ({"A": "1", "B": "2", "answer": "B", "category": "logic", "l2_category": "y"}, "2", 1),
        ],
        {"sub-category mean": 0.75},
    ),
    "MMMU_DEV_VAL.tsv": (
        [
            ({"A": "x", "B": "y", "answer": "B", "split": "dev"}, "The answer is B", 1),
            ({"A": "", "B": "", "answer": "['0.5', '1/2']", "split": "dev"}, "1/2", 1),  # open
            ({"A": "24", "B": "Other Answers", "answer": "A", "split": "validation"}, "24", 1),  # open, as VLMEvalKit rewrites it
            ({"A": "24", "B": "Other Answers", "answer": "A", "split": "validation"}, "A", 0),
        ],
        {},
    ),
    "HallusionBench.tsv": (
        [  # figures 1 and 3 have a wrong answer, figure 2 none: fAcc 1/3; question 0 has none, question 1 two: qAcc 1/2
            ({"index": "VD_chart_0_0_1_0", "answer": "Yes", "category": "VD", "l2-category": "chart"}, "Yes, it is.", 1),
            ({"index": "VD_chart_0_0_1_1", "answer": "No", "category": "VD", "l2-category": "chart"}, "yes and no", 0),
            ({"index": "VD_chart_0_0_2_0", "answer": "No", "category": "VD", "l2-category": "chart"}, "no", 1),
            ({"index": "VD_chart_0_0_2_1", "answer": "Yes", "category": "VD", "l2-category": "chart"}, "YES", 1),
            ({"index": "VD_chart_0_0_3_1", "answer": "Yes", "category": "VD", "l2-category": "chart"}, "no", 0),
        ],
        {"aAcc": 0.6, "fAcc": 0.3333, "qAcc": 0.5, "mean": 0.4778},  # the mean of 3/5, 1/3, 1/2
    ),
    "DynaMath.tsv": (
        [  # question 7 is right in one of its two variants, question 8 in both: worst case 1/2
            ({"qid": "7", "varid": "1", "answer_type": "float", "answer": "3.142"}, "3.1412", 1),  # off by 0.0008
            ({"qid": "7", "varid": "2", "answer_type": "float", "answer": "3.142"}, "3.1409", 0),  # by 0.0011
            ({"qid": "8", "varid": "1", "answer_type": "float", "answer": "6.283"}, "2π", 1),
            ({"qid": "8", "varid": "2", "answer_type": "multiple choice", "answer": "B"}, "B. Even", 1),
        ],
        {"worst case": 0.5},
    ),
    "WeMath.tsv": (
        [  # known and right: 1; half known and right: 0 strict, 1 loose; all steps known but wrong: 1/2
            *(({"ID": "1", "key": f"2steps_{part}", "A": "x", "B": "y", "answer": "A"}, "A", 1) for part in ("1", "2", "multi")),
            ({"ID": "2", "key": "2steps_1", "A": "x", "B": "y", "answer": "A"}, "A", 1),
            ({"ID": "2", "key": "2steps_2", "A": "x", "B": "y", "answer": "A"}, "B", 0),
            ({"ID": "2", "key": "2steps_multi", "A": "x", "B": "y", "answer": "B"}, "B", 1),
            *(({"ID": "1", "key": f"3steps_{part}", "A": "x", "B": "y", "answer": "A"}, "A", 1) for part in "123"),
            ({"ID": "1", "key": "3steps_multi", "A": "x", "B": "y", "answer": "A"}, "B", 0),
            ({"ID": "9", "key": "3steps_multi", "A": "x", "B": "y", "answer": "A"}, "A", 1),
        ],
        {"strict": 0.5, "loose": 0.8333, "problems": 3},  # the fourth has no steps
    ),
    "LogicVista.tsv": (
        [
            ({"answer": "A, C", "skill": "inductive"}, "C and A", 1),
            ({"answer": "B", "skill": "inductive"}, "b", 1),
            ({"answer": "D", "skill": "spatial"}, "A, D", 0),
            ({"answer": "BC", "skill": "spatial", "question": "Which two?\nA. x\nB. y\nC. z"}, "B, C", 1),
        ],
        {},
    ),
    "my_exam.tsv": (
        [({"A": "1", "B": "2", "answer": "B"}, "2", 1), ({"A": "", "B": "", "answer": "1/2"}, "0.5", 1), ({"A": "", "B": "", "answer": "x"}, "y", 0)],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_is_scored_by_its_own_rule(name, tmp_path):
    cases, further = CASES[name]
    path = tsv(tmp_path / name, *(row for row, _, _ in cases))
    qids = [str(row.get("index", i)) for i, (row, _, _) in enumerate(cases)]
    responses = dict(zip(qids, answered(*(answer for _, answer, _ in cases)).values()))
    scores = regrade(tmp_path, path, responses)
    saved = [json.loads(line) for line in lines(tmp_path / "evaluate" / "base" / "predictions_greedy.jsonl")]
    assert [record["verdicts"] for record in saved] == [[bool(right)] for *_, right in cases]
    rights = [right for *_, right in cases]
    assert scores["accuracy"] == round(sum(rights) / len(rights), 4) and scores["n"] == len(rights)
    assert scores["further"] == further and scores["judge"] == "rule"
    expected = next((key for key in rewards.BENCHMARKS if name.lower().startswith(key)), "generic")
    assert scores["benchmark"] == expected
    line = (tmp_path / "evaluate" / "table.txt").read_text()
    assert f"{len(rights)} questions of {name}, judged by rule: {expected}" in line and all(key in line for key in further)


def test_scores_hold_interval_shares_and_categories(tmp_path):
    rows = [
        {"answer": "3", "category": name, "skills": skills}
        for name, skills in zip("xxyy", ["['a', 'b']", "['b']", "[]", ""])
    ]
    texts = [
        ["### The final answer is: 3", r"so \boxed{\text{3}}"],  # twice right
        [r"\boxed{4} or \boxed{3}", "3 " * 40],  # the last box; a long text without an answer
        ["3", ""],  # a short text is an answer
        [r"\boxed{3", "### The final answer is: 4"],  # short and wrong; wrong
    ]
    scores = regrade(tmp_path, tsv(tmp_path / "exam.tsv", *rows), {str(i): pair for i, pair in enumerate(texts)})
    saved = [json.loads(line) for line in lines(tmp_path / "evaluate" / "base" / "predictions_sampled.jsonl")]
    assert [r["extraction"] for r in saved] == [
        ["section", "boxed"],
        ["boxed", "none"],
        ["whole", "none"],
        ["whole", "section"],
    ]
    assert saved[0]["extracted"] == ["3", r"\text{3}"] and saved[1]["extracted"] == ["3", ""]
    assert scores["accuracy"] == 0.5 and scores["further"] == {"pass@2": 0.75}  # (2/2 + 1/2 + 1/2 + 0/2) / 4; 3 of 4
    assert scores["extracted"] == 0.75 and scores["responses_each"] == 2  # 6 of 8
    # Wilson for 2 of 4, z = 1.96: (0.5 + 3.8416 / 8 -+ 1.96 sqrt(0.25 / 4 + 3.8416 / 64)) / (1 + 3.8416 / 4) = (0.9802 -+ 0.6862) / 1.9604
    assert scores["interval_95"] == [0.15, 0.85]
    assert scores["categories"] == {
        "category": {"x": {"n": 2, "accuracy": 0.75}, "y": {"n": 2, "accuracy": 0.25}},
        "skills": {"a": {"n": 1, "accuracy": 1.0}, "b": {"n": 2, "accuracy": 0.75}},
    }


def test_another_benchmark_regrades_the_same_predictions_and_a_tsv_goes_to_vlmevalkits_judge(tmp_path):
    path = tsv(tmp_path / "charts.tsv", {"answer": "10", "question": "two\nlines"}, {"answer": "['a', 'b']"})
    responses = answered("10.4", "b")
    assert regrade(tmp_path, path, responses)["accuracy"] == 0.0  # the generic rule: 10.4 is not 10
    assert regrade(tmp_path, path, responses, "--benchmark", "chartqa")["accuracy"] == 1.0
    with open(tmp_path / "evaluate" / "base" / "predictions_greedy.tsv", newline="") as file:
        written = list(csv.DictReader(file, delimiter="\t"))
    assert [list(row) for row in written] == [["index", "question", "answer", "prediction"]] * 2  # no picture
    assert written[0] == {"index": "0", "question": "two\nlines", "answer": "10", "prediction": "10.4"}


def test_several_files_are_scored_each_in_its_folder(tmp_path):
    paths = [tsv(tmp_path / f"{name}.tsv", {"answer": "3"}) for name in ("one", "two")]
    for name, answer in (("one", "3"), ("two", "4")):
        (tmp_path / "evaluate" / "base" / name).mkdir(parents=True)
        record = [{"qid": "0", "responses": [answer]}]
        pebr.write_jsonl(tmp_path / "evaluate" / "base" / name / "predictions_greedy.jsonl", record)
    run(tmp_path, "--stage", "evaluate", "--regrade", *NO_MODEL, "--test_data", ",".join(paths))
    scores = [json.loads((tmp_path / "evaluate" / "base" / name / "scores.json").read_text()) for name in ("one", "two")]
    assert [score["greedy"]["accuracy"] for score in scores] == [1.0, 0.0]
    table = (tmp_path / "evaluate" / "table.txt").read_text()
    assert "1 questions of one.tsv" in table and "1 questions of two.tsv" in table


def test_prompts_show_hint_options_and_marks_once(tmp_path):
    one, other = base64_picture(), base64_picture("L")
    two = f"['{one}', '{other}']"
    path = tsv(
        tmp_path / "MMMU_DEV_VAL.tsv",
        {"question": "Which?", "A": "one", "B": "None", "answer": "B", "hint": "Look.", "C": ""},
        {
            "question": "See <image 2>, <image 1>, <image 2>.",
            "image": two,
            "answer": "x",
            "A": "",
            "B": "",
            "hint": "",
            "C": "",
        },
        {"question": "Which is it?", "image": two, "A": "<image 1>", "B": "<image 3>", "answer": "A", "hint": "", "C": ""},
        {"question": "Which?\n(A) one\n(B) two", "A": "one", "B": "two", "answer": "B", "hint": "", "C": ""},
    )
    rows, problems = data.load_rows(path)
    assert problems == [] and [row.problem for row in rows] == [
        "Hint: Look.\nWhich?\nOptions:\nA. one\nB. None",
        "See <image>, <image>, <image 2>.",  # the second picture first, and a repeated mark stays text
        "<image>Which is it?\nOptions:\nA. <image>\nB. <image 3>",  # a picture without a mark comes before the question
        "Which?\n(A) one\n(B) two",  # options are not shown twice
    ]
    assert [row.images for row in rows[:3]] == [
        [data.INLINE + one],
        [data.INLINE + other, data.INLINE + one],
        [data.INLINE + other, data.INLINE + one],
    ]
    vision = tsv(
        tmp_path / "MathVision.tsv", {"question": "<image1> or <image2>?", "choices": "['A', 'B', 'C']", "answer": "B"}
    )
    assert [row.problem for row in data.load_rows(vision)[0]] == [
        "<image> or <image2>?"
    ]  # one merged picture; options that are only letters are in it


def test_pictures_of_a_tsv_are_base64_a_link_a_list_or_a_path(tmp_path):
    picture(tmp_path / "a.png", (40, 30)), picture(tmp_path / "b.png", (20, 30))
    path = tsv(
        tmp_path / "rows.tsv",
        {"answer": "x", "image": base64_picture("RGBA", (56, 28)), "image_path": "unused.png"},
        {"answer": "x", "image": "0", "image_path": ""},
        {
            "answer": "x",
            "image": f"['{base64_picture('P', (30, 31))}', '{base64_picture('LA', (32, 33))}']",
            "image_path": "",
        },
        {"answer": "x", "image": "", "image_path": "a.png"},
        {"answer": "x", "image": "", "image_path": "['a.png', 'b.png']"},
    )
    rows, problems = data.load_rows(path)
    loaded = [[data.load_image(image, 1, 10**6) for image in row.images] for row in rows]
    assert problems == [] and all(image.mode == "RGB" for images in loaded for image in images)
    assert [[image.size for image in images] for images in loaded] == [
        [(56, 28)], [(56, 28)], [(30, 31), (32, 33)], [(40, 30)], [(40, 30), (20, 30)]
    ]  # fmt: skip


def test_the_benchmarks_own_json_is_read_too(tmp_path):
    picture(tmp_path / "a.png")
    vista = {"question": "q", "image": "a.png", "choices": ["Yes", "No"], "answer": "No", "unit": None, "precision": None,
             "question_type": "multi_choice", "answer_type": "text", "query": "Hint: pick.\nQuestion: q\nChoices:\n(A) Yes\n(B) No"}  # fmt: skip
    files = {
        "testmini.json": {"1": vista, "2": {**vista, "choices": None, "answer_type": "integer", "answer": "4", "query": "Hint: n\nq"}},
        "ai2d.json": [{"question": "q", "options": ["3", "2", "1"], "answer": "2", "image": "a.png"}],  # an index, not a text
        "test.jsonl": [{"id": "5", "question": "q <image1>", "options": [], "answer": "7", "image": "a.png", "level": 2, "subject": "algebra"}],
        "test_human.json": [{"imgname": "a.png", "query": "q", "label": ["5", "five"]}],
        "MathVerse.json": [{"sample_index": "9", "question": "q", "query_cot": "Think.\nq", "image": "a.png", "answer": "D", "problem_version": "Text Lite"}],
        "We_Math.json": [{"ID": "3", "key": "2steps_1", "question": "q", "option": "A. 1; B. 2; C. none", "answer": "B", "image_path": "a.png"}],
        "MMMU.json": [{"id": "m", "question": "q", "options": "['x', 'y']", "answer": "B", "image": "a.png", "question_type": "multiple-choice"}],
    }  # fmt: skip
    read = {}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content, indent=1 if name == "testmini.json" else None))
        read[name], problems = data.load_rows(str(tmp_path / name))
        assert problems == [] and all(row.images == [str(tmp_path / "a.png")] for row in read[name])
    of = {name: [(row.benchmark, row.qid, row.answer, row.choices) for row in rows] for name, rows in read.items()}
    assert of["testmini.json"] == [("mathvista", "1", "B", ["Yes", "No"]), ("mathvista", "2", "4", None)]
    assert of["ai2d.json"] == [("ai2d", "ai2d.json row 0", "C", ["3", "2", "1"])]
    assert of["test.jsonl"] == [("mathvision", "5", "7", None)] and read["test.jsonl"][0].problem == "q <image>"
    assert of["test_human.json"] == [("chartqa", "test_human.json row 0", "5", None)]
    assert read["test_human.json"][0].alternatives == ["five"]
    assert of["MathVerse.json"] == [("mathverse", "9", "D", None)] and read["MathVerse.json"][0].problem == "Think.\nq"
    assert of["We_Math.json"] == [("wemath", "We_Math.json row 0", "B", ["1", "2", "none"])]
    assert read["We_Math.json"][0].problem == "q\nOptions: A. 1; B. 2; C. none"
    assert of["MMMU.json"] == [("mmmu", "m", "B", ["x", "y"])] and read["MMMU.json"][0].problem == "q\nOptions:\nA. x\nB. y"
    assert read["testmini.json"][0].problem == vista["query"]  # its options are in it already


def test_a_benchmark_is_told_by_name_and_columns(tmp_path):
    columns = {"question", "answer"}
    names = {"ChartQA_TEST": "chartqa", "ChartQAPro": "generic", "MATH-V": "mathvision", "MathVerse_MINI_Vision_Only": "mathverse",
             "AI2D_TEST_NO_MASK": "ai2d", "train": "generic", "MathVista_MINI": "generic", "WeMath": "generic"}  # fmt: skip
    assert {
        name: data.find_benchmark(f"{name}.tsv", columns) for name in names
    } == names  # the last two lack what their rules read
    assert data.find_benchmark("x.tsv", columns | {"ID", "key"}) == "wemath"
    rows, _ = data.load_rows(tsv(tmp_path / "MathVista.tsv", {"answer": "x"}), benchmark="mmstar")
    assert rows[0].benchmark == "mmstar"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"image": "7"}, "its image is that of index 7, but no such row holds a picture"),
        ({"image": "2"}, "its image is that of index 2, but no such row holds a picture"),  # a link to a link
        ({"image": ""}, "its image cell is empty, and it has no image_path"),
        ({"image": "AAAA" * 20}, "picture AAAAAAAAAAAAAAAAAAAA... (base64) is not readable"),
        ({"image": base64_picture()[:-9]}, "(base64) is not readable"),
        ({"choices": "['a', 'b'"}, 'field "choices" is no list'),
        ({"choices": "[__import__('os').system('true')]"}, 'field "choices" is no list'),
        ({"choices": "[" * 10_000}, 'field "choices" is no list'),
        ({"choices": str(["a"] * 10_000)}, "of at most 20000 characters"),
        ({"answer": "E", "choices": "['a', 'b']"}, 'answer "E" is none of its 2 options'),
        ({"answer": "E", "A": "a", "B": "b", "choices": ""}, 'answer "E" is none of its 2 options'),
        ({"A": "", "B": "b"}, "option A is empty, but a later one is not"),
        ({"index": "0"}, "qid 0 is already that of rows.tsv row 0"),
        ({"answer": ""}, "no answer to grade against"),
        ({"question": " "}, '"question" is missing'),
    ],
)  # fmt: skip
def test_a_broken_tsv_row_is_named_with_its_reason(policy, cfg, tmp_path, accelerator, change, reason):
    good = {"answer": "x", "A": "", "B": "", "choices": ""}
    path = tsv(tmp_path / "rows.tsv", good, {**good, **change}, {**good, "image": "0"})
    with pytest.raises(DataError) as error:
        pebr.checked_rows(path, cfg, policy, accelerator, ("answer",))
    assert "rows.tsv row 1: " in str(error.value) and reason in str(error.value) and "1 broken rows" in str(error.value)


def test_an_evaluation_that_cannot_be_scored_says_so(tmp_path):
    path = tsv(tmp_path / "rows.tsv", {"answer": "x"}, {"answer": "y"})
    for argv, reason in (
        (["--benchmark", "imagenet"], "--benchmark imagenet: must be one of mathvista, "),
        (["--benchmark", "dynamath"], "rows.tsv row 0: no answer_type, qid, which the rule of dynamath reads"),
        (["--test_data", f"{path},{path}"], "each file needs a name of its own"),
        ([], "has no predictions; evaluate first"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / "run", "--stage", "evaluate", "--regrade", *NO_MODEL, "--test_data", path, *argv)
        assert reason in str(stopped.value)
    with pytest.raises(SystemExit, match="has 1 to 2 responses to a question"):
        regrade(tmp_path, path, {"0": ["x"], "1": ["x", "y"]})
    with pytest.raises(SystemExit, match="has no prediction for 1 questions, the first is rows.tsv row 1: evaluate first"):
        regrade(tmp_path, path, answered("x"))
    folder = tmp_path / "evaluate" / "base"
    pebr.write_jsonl(
        folder / "predictions_greedy.jsonl", [{"qid": q, "responses": ["x"], "problem": "Another ?"} for q in "01"]
    )
    with pytest.raises(SystemExit, match="answers other questions than .*rows.tsv, first at rows.tsv row 0"):
        run(tmp_path, "--stage", "evaluate", "--regrade", *NO_MODEL, "--test_data", path)
    assert (
        regrade(tmp_path, path, answered("x"), "--skip_bad_rows")["n"] == 1
    )  # a row that was dropped when its picture was opened


def test_hostile_responses_are_extracted_and_judged_in_no_time():
    clock = time.perf_counter()
    for text in (
        r"\boxed{" * 20_000,
        "\\boxed{" + "{" * 100_000,
        "### The final answer is: " + "9" * 50_000,
        "### The final answer is: " + "A" * 10**5,
    ):
        answer, _ = rewards.extract_answer(text)
        for name, benchmark in rewards.BENCHMARKS.items():
            raw = {"answer_type": "float", "question_type": "x"}
            row = Row(
                "", "", "", "3", [], choices=["3", "4"] if name in ("mathvista", "mathvision", "ai2d") else None, raw=raw
            )
            assert not (answer and benchmark.rule(answer, row) and name != "mathvista")
    assert time.perf_counter() - clock < 2  # mathvista takes the most similar option, whatever it is


def test_evaluation_on_a_tsv_resumes_regrades_and_splits_over_processes_to_the_same_scores(night_sky, tmp_path, monkeypatch):
    rows = [{"question": "Which color ?", "A": "pale", "B": "blue", "answer": "B", "category": "sky"} for _ in range(3)]
    path = tsv(
        tmp_path / "sky.tsv",
        *rows,
        {"question": "Is it late ?", "image": "0", "A": "", "B": "", "answer": "yes", "category": "time"},
    )
    argv = ["--stage", "evaluate", "--model", str(night_sky / "model"), "--test_data", path, "--mixed_precision", "no",
            "--max_new_tokens", "8", "--max_pixels", "10000", "--prompt_file", str(night_sky / "prompt.txt"), "--eval_samples", "2",
            "--generate_batch_size", "2"]  # fmt: skip
    generate, calls = pebr.generate_rollouts, []

    def killed_at_the_third_chunk(*args, **seed):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return generate(*args, **seed)

    run(tmp_path / "whole", *argv)
    with monkeypatch.context() as other, pytest.raises(Killed):
        other.setattr(pebr, "generate_rollouts", killed_at_the_third_chunk)
        run(tmp_path / "parts", *argv)
    run(tmp_path / "parts", *argv)
    whole, parts = (tmp_path / name / "evaluate" / "base" for name in ("whole", "parts"))
    names = ("predictions_greedy.jsonl", "predictions_sampled.jsonl", "predictions_greedy.tsv", "scores.json")
    texts = [(whole / name).read_text() for name in names]
    assert [(parts / name).read_text() for name in names] == texts
    assert not (tmp_path / "whole" / "toy").exists()  # nothing of the toy is asked for
    scores = json.loads(texts[-1])
    assert (
        scores["sampled"]["n"] == 4 and scores["sampled"]["temperature"] == 0.5 and "pass@2" in scores["sampled"]["further"]
    )
    assert set(scores["greedy"]["categories"]) == {"category", "form"} and 0 <= scores["greedy"]["truncated"] <= 1
    assert scores["greedy"]["keyword"] is None and scores["greedy"]["tokens"] > 0
    run(tmp_path / "parts", *argv, "--regrade", "--eval_temperature", "0.9")  # what was sampled was sampled at 0.5
    assert [(parts / name).read_text() for name in names] == texts
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_script(tmp_path / "two", launcher, *argv, "--eval_samples", "0")  # two processes share the questions; greedy only
    two = tmp_path / "two" / "evaluate" / "base"
    assert (two / names[0]).read_text() == texts[0] and json.loads((two / "scores.json").read_text()) == {
        "greedy": scores["greedy"]
    }


# ----------------------------------------------------------------------------------------------------------------------
# Config and stages


def test_defaults_are_the_papers_and_presets_and_flags_follow():
    real = {"model": "some/folder"}
    assert (
        pebr.resolve("perception", real).rollout_batch_size == 560
        and pebr.resolve("reasoning", real).rollout_batch_size == 512
    )
    assert pebr.resolve("perception", real).update_batch_size == 112 and pebr.resolve("reasoning", real).epochs == 2
    assert pebr.resolve("warmup", real).learning_rate == 1e-5 and pebr.resolve("warmup", real).freeze_vision
    assert not pebr.resolve("warmup", {}).freeze_vision  # the toy starts from random weights
    flags = pebr.parse_flags(
        ["--learning_rate", "0.5", "--no-freeze_vision", "--gradient_checkpointing", "--temperature", "0.9"]
    )
    asked, implied = pebr.resolve("warmup", flags), pebr.resolve("warmup", flags, asked=False)
    assert (asked.learning_rate, asked.freeze_vision, asked.gradient_checkpointing, asked.temperature) == (
        0.5,
        False,
        True,
        0.9,
    )
    assert implied.learning_rate == pebr.TOY["warmup"]["learning_rate"] and implied.temperature == 0.9


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["--random_init"], "--random_init is for --stage dryrun"),
        (
            ["--test_data", "/no/such/file.json"],
            "/no/such/file.json: no such file",
        ),  # before the first stage, not after hours
        (["--from_model", "x"], "--from_model and --from_data belong to one stage"),
        (["--stage", "perception", "--clip_dual", "0.5"], "--clip_dual 0.5"),
        (["--stage", "perception", "--clip_device", "tpu"], "--clip_device tpu: must be one of cpu"),
        (["--stage", "percept"], "--stage percept: must be one of"),
        (["--stage", "perception", "--group_size", "1"], "--group_size 1"),
        (
            ["--stage", "perception", "--rollout_batch_size", "10", "--update_batch_size", "4"],
            "is not a multiple of --update_batch_size 4",
        ),
        (["--loss_mean", "median"], "must be one of token, sequence, constant"),
        (["--top_p", "0"], "--top_p 0.0"),
        (["--learning_rate", "-1"], "--learning_rate -1.0: must be a number, not negative"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be a number, not negative"),
        (["--temperature", "inf"], "--temperature inf: must be a number, not negative"),
        (["--run_dir", __file__], f"--run_dir {__file__}: is a file"),
        (["--min_pixels", "900000"], "is more than --max_pixels"),
        (["--stage", "perception", "--model", "x", "--train_data", "rows.json"], "needs --clip_model"),
        (["--stage", "warmup", "--model", "x", "--train_data", "rows.json"], "needs --sft_data"),
        (
            ["--stage", "warmup", "--model", "/no/such/folder", "--train_data", "toy", "--mixed_precision", "no"],
            "there is no such folder, and from the hub it could not be had",
        ),
        (
            ["--model", "x", "--sft_data", "rows.json"],
            "--stage sample needs --train_data",
        ),  # x does not train on the toy's rows
        (["--log_with", "notatracker"], "--log_with notatracker: not installed"),
        (["--seed", "5"], "was made with --seed 0, not 5"),
        (
            ["--stage", "evaluate", "--clip_model", "local-dir:/no/such/folder"],
            "--clip_model local-dir:/no/such/folder: no open_clip_config.json",
        ),
        (
            ["--clip_model", "fg-clip:/no/such/folder"],
            "fg-clip:/no/such/folder: /no/such/folder must hold FG-CLIP's config.json",
        ),
    ],
)
def test_wrong_flags_stop_with_a_message_that_names_them(argv, reason, tmp_path, toy):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "toy").symlink_to(toy)
    with pytest.raises(SystemExit) as stopped:
        pebr.main(["--run_dir", str(run_dir), *argv])
    assert reason in str(stopped.value)
    assert "--clip_model" not in argv or not (run_dir / "warmup").exists()  # found before the first stage


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_what_accelerate_is_set_to_and_we_cannot_do_stops_the_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(SystemExit, match=f"accelerate is set to use {name}, which is not supported"):
        run(tmp_path, "--stage", "warmup")


def reshard(folder):
    """The weights in several files, one of which is missing."""
    from transformers import AutoModelForImageTextToText

    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(folder, max_shard_size="300KB")
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00005.safetensors").unlink()


def own_code(folder, name, **settings):
    """A folder that names code of its own for everything."""
    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")
    reconfigure(name, lambda c: c.update(settings, auto_map={key: "evil.Evil" for key in names}))(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def text_model(folder):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=100, **size)).save_pretrained(folder)


def more_words(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(500)])
    tokenizer.save_pretrained(folder)


def respell(folder, old, new):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((folder / file).read_text().replace(old, new))


MODEL, HEAD = "model.safetensors", "lm_head.weight"
WHOLE, UNFIT = (
    "it must be a vision-language model's whole folder",
    "1 tensors are missing, of another shape or not finite, first " + HEAD,
)
NO_PROMPT = "its processor cannot write a prompt with one picture "
# fmt: off
MODEL_FOLDERS = {  # how a good model folder is broken, and the message
    "no folder": (shutil.rmtree, "there is no such folder, and from the hub it could not be had"),
    "no config": (lambda f: (f / "config.json").unlink(), WHOLE),
    "config is no JSON": (lambda f: (f / "config.json").write_text('{"a'), "(Unterminated string"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "must be a mapping, not list"),
    "config deeply nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "maximum recursion depth"),
    "config of the wrong types": (reconfigure("config.json", lambda c: c.update(text_config="x")), "Validation error for field 'text_config'"),
    "unknown architecture": (reconfigure("config.json", lambda c: c.update(model_type="nosuch")), "has model type `nosuch`"),
    "a text model": (text_model, "Unrecognized configuration class"),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "Can't load image processor"),
    "processor of an unknown class": (reconfigure("processor_config.json", lambda c: c.update(processor_class="New")), "it has no processor for pictures and text"),
    "processor is no JSON": (lambda f: (f / "processor_config.json").write_text("{"), "is not a valid JSON file"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], NO_PROMPT),
    "tokenizer of another kind": (lambda f: (f / "tokenizer.json").write_text("{}"), WHOLE),
    "tokenizer without image token": (lambda f: respell(f, "<|image_pad|>", "<|other|>"), NO_PROMPT),
    "tokenizer with more words than the model": (more_words, "tokens, the model only"),
    "image token of another model": (reconfigure("config.json", lambda c: c.update(image_token_id=60)), "marks no picture with the image token 60"),
    "image token out of range": (reconfigure("config.json", lambda c: c.update(image_token_id=2**70)), "is none of the model's"),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template: add chat_template.jinja"),
    "chat template broken": (lambda f: (f / "chat_template.jinja").write_text("{% for m in %}"), NO_PROMPT + "(Expected an expression"),
    "chat template without picture": (lambda f: (f / "chat_template.jinja").write_text("hello"), NO_PROMPT),
    "no weights": (lambda f: (f / MODEL).unlink(), "no file named model.safetensors"),
    "weights cut off": (lambda f: os.truncate(f / MODEL, 10_000), "Error while deserializing header"),
    "a shard missing": (reshard, "model-00002-of-00005.safetensors"),
    "a tensor missing": (reweigh(MODEL, lambda w: w.pop(HEAD)), UNFIT),
    "a tensor of another shape": (reweigh(MODEL, lambda w: w.update({HEAD: torch.ones(3)})), UNFIT),
    "NaN among the weights": (reweigh(MODEL, lambda w: w[HEAD].fill_(math.nan)), UNFIT),
    "pickled weights": (lambda f: pickled(f, MODEL, "pytorch_model.bin"), "pytorch_model.bin is a pickle, which is never opened: save the model again as safetensors"),
    "code of its own, unknown architecture": (lambda f: own_code(f, "config.json", model_type="new"), "the code in it runs with --trust_remote_code only"),
    "code of its own for the processor": (lambda f: own_code(f, "processor_config.json", processor_class="New"), "the code in it runs with --trust_remote_code only"),
    "code of its own beside a known architecture": (lambda f: own_code(f, "config.json"), None),  # transformers' own code will do
}
# fmt: on


@pytest.mark.parametrize("name", MODEL_FOLDERS)
def test_a_broken_model_folder_says_why_and_runs_no_code(name, toy, cfg, tmp_path):
    make, reason = MODEL_FOLDERS[name]
    folder = shutil.copytree(toy / "model", tmp_path / "model")
    make(folder)
    if reason:
        with pytest.raises(ConfigError) as error:
            pebr.load_policy(str(folder), cfg)
        assert reason in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
    else:
        pebr.load_policy(str(folder), cfg)
    assert not (folder / "ran").exists()


SMALL = ["--max_steps", "2", "--rollout_batch_size", "4", "--update_batch_size", "2", "--group_size", "2", "--max_new_tokens", "16",
         "--sft_batch_size", "4", "--eval_samples", "2", "--print_every", "0"]  # fmt: skip


def run(run_dir, *argv):
    pebr.main(["--run_dir", str(run_dir), "--threads", "1", *argv])


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def lines(path):
    return path.read_text().splitlines()


@pytest.fixture(scope="session")
def toy_run(toy, tmp_path_factory):
    """Every stage on the small toy world, two steps each. The untrained model gets nothing right, so that no question is easy
    or medium: the RL stages are given all of them."""
    run_dir = tmp_path_factory.mktemp("stages")
    (run_dir / "toy").symlink_to(toy)
    data_file = ["--from_data", str(toy / "train.json")]
    run(run_dir, "--stage", "warmup", *SMALL)
    run(run_dir, "--stage", "sample", *SMALL)
    for stage in ("perception", "reasoning"):
        run(run_dir, "--stage", stage, *SMALL, *data_file)
    run(run_dir, "--stage", "evaluate", *SMALL)
    return run_dir


def test_two_steps_of_each_training_stage_move_parameters_and_the_folder_reloads(toy_run, toy):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    before = weights_of(toy / "model")
    for stage in ("warmup", "perception", "reasoning"):
        after = weights_of(toy_run / stage)
        assert set(after) == set(before)
        assert all(torch.isfinite(value).all() for value in after.values())
        moved = [name for name in after if not torch.equal(after[name], before[name])]
        assert any("visual" in name for name in moved) and any("lm_head" in name for name in moved)
        model = AutoModelForImageTextToText.from_pretrained(toy_run / stage)
        assert torch.equal(model.lm_head.weight, after["lm_head.weight"])
        assert AutoProcessor.from_pretrained(toy_run / stage).chat_template
        before = after


def test_each_stage_leaves_what_the_readme_promises(toy_run):
    for stage in ("warmup", "perception", "reasoning"):
        records = [json.loads(line) for line in lines(toy_run / stage / "metrics.jsonl")]
        assert [r["step"] for r in records] == [1, 2] and len({tuple(r) for r in records}) == 1  # the same keys every step
        assert json.loads((toy_run / stage / "run_config.json").read_text())["max_steps"] == 2
        assert not (toy_run / stage / "checkpoint").exists()
    calibration = json.loads((toy_run / "perception" / "clip_calibration.json").read_text())
    assert 0 <= calibration["auc"] <= 1 and not (toy_run / "reasoning" / "clip_calibration.json").exists()
    sample = json.loads(lines(toy_run / "perception" / "samples.jsonl")[0])
    assert set(sample) == {"step", "qid", "prompt", "completion", "truncated", "reward", "parts", "advantage"}
    assert set(sample["parts"]) == {"clip", "keyword", "format", "length", "accuracy"}
    assert len(lines(toy_run / "perception" / "samples.jsonl")) == 2 * 4 * 2  # steps x questions x G
    rows = json.loads((toy_run / "toy" / "train.json").read_text())
    split = [json.loads((toy_run / "sample" / f"{name}.json").read_text()) for name in ("easy", "medium", "hard")]
    assert sorted(r["qid"] for r in sum(split, [])) == sorted(r["qid"] for r in rows) and all(
        r in rows for r in sum(split, [])
    )
    summary = json.loads((toy_run / "sample" / "summary.json").read_text())
    assert summary["questions"] == len(rows) == sum(summary["histogram"].values())
    table = (toy_run / "evaluate" / "table.txt").read_text()
    assert all(name in table for name in ("base", "warmup", "perception", "reasoning", "greedy", "sampled"))
    for model in ("base", "reasoning"):
        assert len(lines(toy_run / "evaluate" / model / "predictions_sampled.jsonl")) == TINY.test_rows


def test_a_finished_stage_is_kept_and_changed_settings_stop_with_what_changed(toy_run, capsys, monkeypatch):
    stamp = (toy_run / "warmup" / "stage.json").read_text()
    run(toy_run, "--stage", "warmup", *SMALL)
    assert (toy_run / "warmup" / "stage.json").read_text() == stamp and "finished earlier, kept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="learning_rate was 0.00.*, now 0.5"):
        run(toy_run, "--stage", "warmup", *SMALL, "--learning_rate", "0.5")
    with monkeypatch.context() as other, pytest.raises(SystemExit, match="reward was"):  # another reward is another stage
        other.setitem(rewards.STAGE_REWARDS, "perception", {"keyword": 1.0})
        run(toy_run, "--stage", "perception", *SMALL, "--from_data", str(toy_run / "toy" / "train.json"))
    with pytest.raises(SystemExit, match="its data has changed since"):
        run(toy_run, "--stage", "sample", *SMALL, "--train_data", str(toy_run / "toy" / "test.json"))
    with pytest.raises(
        SystemExit, match="warmup was made otherwise:\n  its data has changed since"
    ):  # nor as an earlier stage
        run(toy_run, "--stage", "sample", *SMALL, "--sft_data", str(toy_run / "toy" / "test.json"))
    run(
        toy_run, "--stage", "warmup", *SMALL, "--test_data", "other.json", "--group_size", "3"
    )  # what it does not read may change


def test_a_stage_that_stopped_before_its_first_step_begins_anew_with_the_mended_flags(toy, toy_run, tmp_path):
    rows = json.loads((toy / "train.json").read_text())
    (tmp_path / "rl.json").write_text(json.dumps([{**rows[0], "problem": "red " * 80}, *rows[1:]]))
    (tmp_path / "toy").symlink_to(toy)
    argv = ["--stage", "reasoning", *SMALL, "--from_model", str(toy_run / "warmup"), "--from_data", str(tmp_path / "rl.json"),
            "--image_root", str(toy), "--max_steps", "2"]  # fmt: skip
    with pytest.raises(SystemExit, match="1 broken rows .--skip_bad_rows drops them"):
        run(tmp_path, *argv)
    run(tmp_path, *argv, "--skip_bad_rows", "--max_steps", "1")
    with pytest.raises(SystemExit, match="max_steps was 1, now 2"):  # what has been trained is not thrown away
        run(tmp_path, *argv, "--skip_bad_rows")
    assert len(lines(tmp_path / "reasoning" / "metrics.jsonl")) == 1
    several = tmp_path / "evaluate" / "base" / "exam"  # predictions of one of several files
    several.mkdir(parents=True)
    assert not pebr.resumable(tmp_path / "evaluate" / "base")
    (several / "predictions_greedy.jsonl").touch()
    assert pebr.resumable(tmp_path / "evaluate" / "base")


def test_a_run_of_another_model_wants_its_model_named_again(toy, tmp_path):
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "run_config.json").write_text(json.dumps({"model": "Qwen/Qwen2.5-VL-3B-Instruct"}))
    with pytest.raises(
        SystemExit, match="was made with --model Qwen/Qwen2.5-VL-3B-Instruct: repeat it, and the flags for data"
    ):
        run(tmp_path, "--stage", "evaluate", "--test_data", str(toy / "test.json"))
    (tmp_path / "warmup" / "run_config.json").write_text("{")
    with pytest.raises(SystemExit, match="no such file"):
        run(tmp_path, "--stage", "evaluate", "--test_data", "none.json", "--regrade")
    assert not (tmp_path / "toy").exists()  # to score saved predictions of another file takes no toy world


def test_a_weighed_part_that_score_parts_does_not_give_stops_the_run_with_its_name(toy, toy_run, tmp_path, monkeypatch):
    (tmp_path / "toy").symlink_to(toy)
    monkeypatch.setitem(rewards.STAGE_REWARDS, "reasoning", {"accuracy": 0.9, "brevity": 0.1})
    with pytest.raises(SystemExit, match="score_parts gave no brevity, which STAGE_REWARDS weighs"):
        run(tmp_path, "--stage", "reasoning", *SMALL, "--from_model", str(toy_run / "warmup"), "--from_data", str(toy / "train.json"))  # fmt: skip
    assert (tmp_path / "reward_error_0.json").is_file()


def test_the_toys_dry_run_needs_no_flag(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(pebr.TOY, "dryrun", {**pebr.TOY["dryrun"], "rollout_batch_size": 2, "update_batch_size": 2})
    monkeypatch.setattr(data.ToyConfig, "__init__", lambda self: vars(self).update(vars(TINY)))
    step, steps = pebr.optimizer_step, []
    monkeypatch.setattr(pebr, "optimizer_step", lambda *args: steps.append(step(*args)) or steps[-1])
    run(tmp_path, "--stage", "dryrun", "--max_new_tokens", "8", "--mask_truncated")
    assert json.loads(capsys.readouterr().out.split("DRYRUN ")[1])["prompt_tokens"] == 128
    assert len(steps) == 1 and steps[0]["grad_norm"] > 0  # no response ends, and yet there is an update


def test_missing_stages_are_made_first_and_a_redone_stage_makes_later_ones_stale(toy, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    small_warmup = ["--max_new_tokens", "8", "--group_size", "2"]
    original = pebr.TOY["warmup"]
    pebr.TOY["warmup"] = {**original, "max_steps": 1, "sft_batch_size": 2}
    try:
        run(tmp_path, "--stage", "sample", *small_warmup)  # makes the warm-up first
        assert pebr.is_finished(tmp_path / "warmup") and pebr.is_finished(tmp_path / "sample")
        run(tmp_path, "--stage", "warmup", *small_warmup, "--overwrite")
        with pytest.raises(SystemExit, match="its model has changed since"):
            run(tmp_path, "--stage", "sample", *small_warmup)
        with pytest.raises(SystemExit, match="sample was made otherwise:\n  its model has changed since"):
            run(tmp_path, "--stage", "perception", *small_warmup)  # also if the stale stage is not the one asked for
        run(tmp_path, "--stage", "sample", *small_warmup, "--overwrite")
    finally:
        pebr.TOY["warmup"] = original


def test_two_runs_with_one_seed_give_the_same_metrics_line_by_line(toy_run, toy, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    run(tmp_path, "--stage", "warmup", *SMALL)
    run(tmp_path, "--stage", "perception", *SMALL, "--from_data", str(toy / "train.json"))
    for name in ("warmup/metrics.jsonl", "perception/metrics.jsonl", "perception/samples.jsonl"):
        assert lines(tmp_path / name) == lines(toy_run / name)
    run(
        tmp_path,
        "--stage",
        "perception",
        *SMALL,
        "--from_data",
        str(toy / "train.json"),
        "--temperature",
        "1.1",
        "--overwrite",
    )
    assert lines(tmp_path / "perception" / "samples.jsonl") != lines(toy_run / "perception" / "samples.jsonl")


def test_a_step_makes_its_updates_from_the_start_model_of_the_stage(toy, toy_run, tmp_path, monkeypatch):
    (tmp_path / "toy").symlink_to(toy)
    argv = [
        "--stage",
        "reasoning",
        *SMALL,
        "--from_model",
        str(toy_run / "warmup"),
        "--from_data",
        str(toy / "train.json"),
        "--learning_rate",
        "0.001",
    ]
    updates, update_policy = [], pebr.update_policy

    def counted(rollouts, model, optimizer, cfg, accelerator, off_policy):
        updates.append(
            (len(rollouts), off_policy, optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"])
        )
        return update_policy(rollouts, model, optimizer, cfg, accelerator, off_policy)

    monkeypatch.setattr(pebr, "update_policy", counted)
    run(tmp_path, *argv, "--weight_decay", "0.3")
    # 2 steps of 4 questions x 2 rollouts, 2 questions an update
    assert updates == [(4, False, 0.001, 0.3), (4, True, 0.001, 0.3)] * 2
    metrics = [json.loads(line) for line in lines(tmp_path / "reasoning" / "metrics.jsonl")]
    assert abs(metrics[0]["kl"]) < 1e-5 < metrics[1]["kl"]  # the reference is the model that the stage starts from
    drawn = [set(json.loads(line)["qid"] for line in lines(tmp_path / "reasoning" / "samples.jsonl")[:8])]
    run(tmp_path, *argv, "--resample_rounds", "1", "--overwrite")  # an untrained model is never right: every group is tied
    drawn += [set(json.loads(line)["qid"] for line in lines(tmp_path / "reasoning" / "samples.jsonl")[:8])]
    assert drawn[1] - drawn[0]


def test_keyword_precision_hands_all_keywords_of_the_stage_to_the_reward(toy, toy_run, tmp_path, monkeypatch):
    (tmp_path / "toy").symlink_to(toy)
    files = ["--from_model", str(toy_run / "warmup"), "--from_data", str(toy / "train.json")]
    handed, score_parts = [], pebr.score_parts
    monkeypatch.setattr(pebr, "score_parts", lambda *args: handed.append(args[-1]) or score_parts(*args))
    run(tmp_path, "--stage", "perception", *SMALL, *files, "--keyword_precision", "--max_steps", "1")
    words = [word for row in data.load_rows(str(toy / "train.json"))[0] for word in row.key_words]
    assert handed and all(vocabulary == rewards.keyword_set(words) for vocabulary in handed)
    assert json.loads((tmp_path / "perception" / "stage.json").read_text())["settings"]["keyword_precision"] is True


def test_the_learning_rate_rises_over_the_warm_up_and_falls_as_a_cosine():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=7.0)
    cfg = Config(learning_rate=1.0, lr_schedule="cosine", lr_warmup=0.1)
    rates = [pebr.set_learning_rate(optimizer, cfg, step, 20) for step in range(20)]
    # 2 of 20 steps rise: 1/2, 1. Then half a cosine over 18 steps: 1 at its start, 1/2 in its middle (step 2 + 9)
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[11] == pytest.approx(0.5) and 0 < rates[19] < 0.01
    assert optimizer.param_groups[0]["lr"] == rates[19]
    assert pebr.set_learning_rate(optimizer, Config(learning_rate=1.0), 0, 20) == 1.0


def test_training_flags_reach_the_model_and_the_optimizer(policy, cfg, tmp_path, accelerator):
    cfg = pebr.replace(cfg, freeze_vision=True, gradient_checkpointing=True, weight_decay=0.2, kl_coef=0.0, grad_clip=1e-3)
    model, optimizer = pebr.prepare_training(policy, cfg, accelerator)
    assert model.training and policy.model.is_activation_checkpointing and optimizer.param_groups[0]["weight_decay"] == 0.2
    assert (
        sum(len(g["params"]) for g in optimizer.param_groups)
        == sum(p.requires_grad for p in policy.parameters())
        < len(list(policy.parameters()))
    )
    norms = []
    monitored = optimizer.step
    optimizer.step = lambda: (
        norms.append(torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm().item())
        or monitored()
    )
    pebr.update_policy(
        rollouts_of(prompts_of(policy, cfg, tmp_path), [4, 6], [1, -1]), model, optimizer, cfg, accelerator, off_policy=False
    )
    assert norms == [pytest.approx(1e-3, rel=1e-2)]  # clipped


def run_script(tmp_path, launcher, *argv):
    """pebr.py in processes of its own, as a user starts it."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        *launcher,
        str(Path(pebr.__file__)),
        "--run_dir",
        str(tmp_path),
        "--threads",
        "1",
        *argv,
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


DRIVER = """
import os
import sys
import torch
from torch.distributed.tensor import DTensor
sys.path.insert(0, {folder!r})
import pebr, rewards
rewards.length_reward = lambda num_tokens: float(num_tokens % 5 > 2)  # a reward of our own: accuracy is 0 in so small a model
rewards.STAGE_REWARDS["reasoning"] = {{"length": 1.0}}
save = pebr.save_policy
def save_on_every_process(policy, accelerator, model, folder):
    whole = {{n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in policy.named_parameters()}}
    torch.save((type(model).__name__, whole), f"{{folder}}/process{{accelerator.process_index}}.pt")
    if torch.distributed.is_initialized():
        group = torch.distributed.distributed_c10d._get_default_group()
        hours = group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 3600
        open(f"{{folder}}/hours_to_wait", "w").write(str(hours))
    save(policy, accelerator, model, folder)
pebr.save_policy = save_on_every_process
minutes = "9" if os.environ.get("RANK") == "1" else "0"  # of another clock: the first process decides for both
pebr.main([*sys.argv[1:], "--checkpoint_minutes", minutes])
"""
LAUNCHERS = {
    "one": [sys.executable],
    "DDP": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"],
    "FSDP2": [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(Path(pebr.__file__).parent / "configs/fsdp2.yaml"),
              "--num_processes", "2", "--main_process_port", "29612"],
}  # fmt: skip


def three_updates(launcher, toy, toy_run, folder, *argv):
    """(class of the wrapped model, parameters) of every process after three GRPO updates, the metrics, the samples. Of each
    update's four questions the second process has the last two, which have no picture."""
    folder.mkdir()
    (folder / "toy").symlink_to(toy)
    rows = json.loads((toy / "train.json").read_text())[:8]
    for row in rows[2:4] + rows[6:8]:
        row.update(images=[], problem=row["problem"].replace("<image>", ""))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "driver.py").write_text(DRIVER.format(folder=str(Path(pebr.__file__).parent)))
    command = [*LAUNCHERS[launcher], str(folder / "driver.py"), "--stage", "reasoning", "--run_dir", str(folder), *SMALL, "--threads", "1",
               "--from_model", str(toy_run / "warmup"), "--from_data", str(folder / "rows.json"), "--image_root", str(toy), "--overwrite",
               "--rollout_batch_size", "4", "--update_batch_size", "4", "--max_steps", "3", "--group_size", "3", "--micro_batch_size", "3",
               "--learning_rate", "1e-4", "--max_new_tokens", "40", "--temperature", "2.0", *argv]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    saved = [torch.load(path) for path in sorted((folder / "reasoning").glob("process*.pt"))]
    return saved, *(pebr.read_jsonl(folder / "reasoning" / f"{name}.jsonl") for name in ("metrics", "samples"))


@pytest.fixture(scope="session")
def three_updates_of_one_process(toy, toy_run, tmp_path_factory):
    return three_updates("one", toy, toy_run, tmp_path_factory.mktemp("one") / "run", "--resample_rounds", "1")


@pytest.mark.parametrize("launcher, wrapper", [("DDP", "DistributedDataParallel"), ("FSDP2", "FSDPPolicy")])
def test_two_processes_make_the_updates_of_one(launcher, wrapper, toy, toy_run, tmp_path, three_updates_of_one_process):
    """Ragged responses, tied groups that are replaced, micro-batches without pictures on the second process only."""
    [(_, expected)], metrics, samples = three_updates_of_one_process
    saved, *logs = three_updates(launcher, toy, toy_run, tmp_path / "run", "--resample_rounds", "1")
    assert [name for name, _ in saved] == [wrapper] * 2
    assert float((tmp_path / "run" / "reasoning" / "hours_to_wait").read_text()) == 2  # while one writes a checkpoint
    start = weights_of(toy_run / "warmup")
    assert any((expected[f"model.{n}"] - w).abs().max() > 1e-4 for n, w in start.items() if f"model.{n}" in expected)
    for _, got in saved:
        assert got.keys() == expected.keys()
        assert max((got[name] - expected[name]).abs().max() for name in expected) < 1e-5
    assert [s["completion"] for s in logs[1]] == [s["completion"] for s in samples]
    assert len({len(s["completion"].split()) for s in samples}) > 3 and 0 < metrics[0]["tied_groups"] < 1
    for a, b in zip(logs[0], metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_accelerate_launch_runs_the_papers_bf16_path(toy, toy_run, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    argv = ["--stage", "perception", *SMALL, "--from_model", str(toy_run / "warmup"), "--from_data", str(toy / "train.json")]
    run_script(tmp_path, ["accelerate.commands.launch"], *argv, "--mixed_precision", "bf16", "--gradient_checkpointing")
    before, after = weights_of(toy_run / "warmup"), weights_of(tmp_path / "perception")
    assert all(value.dtype == torch.float32 for value in after.values())  # float32 weights, whatever the compute
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_two_processes_train_also_when_one_of_them_has_no_picture(night_sky, toy, tmp_path):
    argv = ["--model", str(night_sky / "model"), "--train_data", str(night_sky / "rl.json"), "--sft_data", str(night_sky / "sft.jsonl"),
            "--mixed_precision", "no", "--max_new_tokens", "12", "--no-freeze_vision", "--micro_batch_size", "2", "--group_size", "2"]  # fmt: skip
    argv += ["--max_steps", "3", "--sft_batch_size", "4", "--rollout_batch_size", "4", "--update_batch_size", "2"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_script(tmp_path, launcher, *argv, "--stage", "warmup")
    run_script(
        tmp_path,
        launcher,
        *argv,
        "--stage",
        "reasoning",
        "--from_model",
        str(tmp_path / "warmup"),
        "--from_data",
        str(night_sky / "rl.json"),
    )
    samples = [json.loads(line) for line in lines(tmp_path / "reasoning" / "samples.jsonl")]
    assert len(samples) == 3 * 4 * 2  # steps x questions x G: both processes' rollouts, none twice
    assert Counter(sample["qid"] for sample in samples) == {f"q{i}": 2 * 2 for i in range(6)}  # two epochs of six questions


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage", ["warmup", "perception"])
def test_an_interrupted_stage_resumes_to_the_same_weights_and_log(stage, toy, toy_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "toy").symlink_to(toy)
    argv = [
        "--stage",
        stage,
        *SMALL,
        "--checkpoint_minutes",
        "0",
        "--from_model",
        str(toy_run / "warmup" if stage == "perception" else toy / "model"),
    ]
    argv += ["--from_data", str(toy / ("train.json" if stage == "perception" else "sft.json"))]
    run(tmp_path, *argv)
    expected = weights_of(tmp_path / stage), lines(tmp_path / stage / "metrics.jsonl")
    log_step = pebr.log_step

    def killed_in_step_2(folder, cfg, step, *rest):
        log_step(folder, cfg, step, *rest)
        if step == 2:  # its line is written, the model is not
            raise Killed

    monkeypatch.setattr(pebr, "log_step", killed_in_step_2)
    with pytest.raises(Killed):
        run(tmp_path, *argv, "--overwrite")
    monkeypatch.undo()
    capsys.readouterr()
    run(tmp_path, *argv)
    assert "resuming after step 1" in capsys.readouterr().out
    assert lines(tmp_path / stage / "metrics.jsonl") == expected[1]
    resumed = weights_of(tmp_path / stage)
    assert all(torch.equal(resumed[name], expected[0][name]) for name in resumed)


def test_interrupted_sampling_goes_on_where_it_stopped_with_exactly_n_scores(toy, toy_run, tmp_path, monkeypatch):
    (tmp_path / "toy").symlink_to(toy)
    argv = ["--stage", "sample", *SMALL, "--generate_batch_size", "4", "--from_model", str(toy_run / "warmup")]
    run(tmp_path, *argv)
    expected = lines(tmp_path / "sample" / "rollouts.jsonl")
    assert len(expected) == TINY.rl_rows and all(len(json.loads(line)["scores"]) == 2 for line in expected)
    generate, calls = pebr.generate_rollouts, []

    def killed_at_the_third_chunk(*args, **seed):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return generate(*args, **seed)

    monkeypatch.setattr(pebr, "generate_rollouts", killed_at_the_third_chunk)
    with pytest.raises(Killed):
        run(tmp_path, *argv, "--overwrite")
    monkeypatch.undo()
    path = tmp_path / "sample" / "rollouts.jsonl"
    assert lines(path) == expected[:4]
    path.write_text("\n".join(expected[:3]) + "\n" + expected[3][:20])  # and the last line torn
    calls.clear()
    monkeypatch.setattr(pebr, "generate_rollouts", lambda *args, **seed: calls.append(1) or generate(*args, **seed))
    run(tmp_path, *argv)
    assert lines(path) == expected and len(calls) == 3  # 8 questions in chunks of 2; only the first chunk was whole
    run(tmp_path, *argv, "--overwrite")
    unfinished = json.loads((tmp_path / "sample" / "stage.json").read_text()) | {"finished": ""}
    (tmp_path / "sample" / "stage.json").write_text(json.dumps(unfinished))
    path.write_text(expected[0][:20])  # the very first line torn
    run(tmp_path, *argv)
    assert lines(path) == expected


def test_resampling_replaces_groups_without_spread(policy, cfg, toy, accelerator, monkeypatch):
    cfg = pebr.replace(cfg, resample_rounds=1)
    rows, _ = data.load_rows(str(toy / "train.json"))

    def score(rollouts, clip, vocabulary):  # a reward by question: 0 and 1 are tied, the others have spread
        for i, rollout in enumerate(rollouts):
            tied = rollout.prompt.row.qid in ("train0", "train1")
            rollout.parts = {"accuracy": 0.0 if tied else float(i % cfg.group_size == 0), "format": 0.0}

    monkeypatch.setattr(pebr, "score_rollouts", score)
    cfg = pebr.replace(cfg, stage="reasoning")
    [prompts] = pebr.prompts_ahead(policy, [enumerate(rows[:3])], cfg)
    rollouts, _ = pebr.collect_rollouts(policy, prompts, rows[3:5], "", cfg, None, accelerator)
    assert [r.prompt.row.qid for r in rollouts[:: cfg.group_size]] == ["train3", "train4", "train2"]
    assert all(r.advantage != 0 for r in rollouts)
    rollouts, _ = pebr.collect_rollouts(
        policy, prompts, rows[3:5], "", pebr.replace(cfg, resample_rounds=0), None, accelerator
    )
    assert [r.prompt.row.qid for r in rollouts[:: cfg.group_size]] == ["train0", "train1", "train2"]
    assert all(r.advantage == 0 for r in rollouts[: 2 * cfg.group_size])


def test_a_dry_run_measures_one_full_length_step_of_a_shape_without_weights(families, toy, tmp_path, capsys):
    shape = tmp_path / "shape"
    shape.mkdir()
    for file in (families / "qwen2_5_vl").iterdir():
        if file.name != "model.safetensors":  # config and processor are enough
            (shape / file.name).write_bytes(file.read_bytes())
    argv = [
        "--stage",
        "dryrun",
        "--model",
        str(shape),
        "--random_init",
        "--mixed_precision",
        "no",
        "--train_data",
        str(toy / "train.json"),
    ]
    argv += [
        "--rollout_batch_size",
        "2",
        "--update_batch_size",
        "1",
        "--group_size",
        "2",
        "--max_prompt_length",
        "50",
        "--max_new_tokens",
        "9",
    ]
    results = {}
    for engine in ("auto", "plain"):
        run(
            tmp_path, *argv, "--max_pixels", "12544", "--engine", engine, "--clip_model", f"local-dir:{toy / 'clip'}"
        )  # 16 image tokens
        printed = capsys.readouterr().out
        results[engine] = json.loads(printed.split("DRYRUN ")[1])
        assert "KV cache of a rollout" in printed and "hours at the most" in printed and "DOES NOT FIT" not in printed
    for engine, result in results.items():
        assert (result["prompt_tokens"], result["completion_tokens"], result["responses"]) == (
            50,
            9,
            4,
        )  # nothing ends early
        assert set(result["wall_s"]) == {"rollout", "reward", "reference", "update"} and all(
            v > 0 for v in result["wall_s"].values()
        )
        assert result["hours"] == round(4 * result["step_wall_s"] / 3600, 2)  # 8 questions, 2 a step
    assert (results["auto"]["engine"], results["plain"]["engine"]) == ("fast", "plain")


def test_the_memory_plan_names_what_to_lower(policy, toy, cfg, accelerator, monkeypatch, capsys):
    cfg = pebr.replace(
        cfg, max_prompt_length=1000, max_new_tokens=500, generate_batch_size=0, rollout_batch_size=8, kl_coef=0.0
    )
    # float32: keys and values of 2 layers x 2 heads x 16 dims x 4 bytes, a third of the prompt that 3 responses share
    assert pebr.kv_bytes(policy, cfg, 3) == 2 * 2 * 2 * 16 * 4 * (333 + 500)
    policy.fast = False
    assert pebr.kv_bytes(policy, cfg, 3) == 2 * 2 * 2 * 16 * 4 * 1500
    weights = sum(p.numel() for p in policy.parameters())
    plan = pebr.memory_plan(policy, None, cfg, accelerator)
    assert plan["weights, gradients, Adam"] * 2**30 == 16 * weights and plan["reference model"] == plan["CLIP"] == 0
    clip = rewards.ClipScorer(f"local-dir:{toy / 'clip'}")
    beside = pebr.memory_plan(policy, clip, cfg, accelerator)["CLIP"] * 2**30
    assert beside == 4 * sum(p.numel() for p in clip.model.parameters())
    text = policy.model.config.get_text_config()  # float32: 1000 prompt tokens through an MLP, six rows of logits
    prefill = 1000 * 4 * (4 * text.hidden_size + 3 * text.intermediate_size)
    assert pebr.prefill_bytes(policy, cfg, 3) == prefill + 6 * 4 * text.vocab_size
    response = pebr.kv_bytes(policy, cfg, 3) + pebr.prefill_bytes(policy, cfg, 3)
    monkeypatch.setattr(pebr, "device_bytes", lambda accelerator: 16 * weights + 2 * 7 * response)
    assert pebr.generate_batch_size(policy, cfg, accelerator, 3) == 6  # room for 7 in half of what is left, groups of 3
    monkeypatch.setattr(pebr, "device_bytes", lambda accelerator: 2**40)
    assert pebr.generate_batch_size(policy, cfg, accelerator, 3) == 8 * 3  # the questions of a step
    assert pebr.generate_batch_size(policy, pebr.replace(cfg, stage="sample"), accelerator, 3) == 1023  # there are no steps
    monkeypatch.setattr(pebr, "device_bytes", lambda accelerator: 16 * weights)
    assert pebr.generate_batch_size(policy, pebr.replace(cfg, generate_batch_size=7), accelerator, 3) == 6
    monkeypatch.setattr(pebr, "device_bytes", lambda accelerator: 2 * 16 * weights)
    for changes, flag in (
        (dict(generate_batch_size=900), "--generate_batch_size"),
        (dict(micro_batch_size=900), "--micro_batch_size"),
    ):
        pebr.print_memory_plan(policy, None, pebr.replace(cfg, **changes), accelerator)
        assert f"DOES NOT FIT: it takes to lower {flag}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# A pretended device: what a GPU would refuse, on a machine without one

DEVICE = torch.device("meta")  # "cuda" would make the autograd engine look for a driver
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten._unsafe_index.Tensor,
            aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)  # fmt: skip
ON_CPU = {aten.bmm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype)}  # what only CUDA has


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on DEVICE, and does not meet CPU tensors."""

    @staticmethod
    def __new__(cls, elem):
        return torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            device=DEVICE, requires_grad=elem.requires_grad,
        )  # fmt: skip

    def __init__(self, elem):
        self.elem = elem

    def __setitem__(self, key, value):  # torch would send a list of indices to the real meta device, where it has no values
        key = key if isinstance(key, tuple) else (key,)
        super().__setitem__(tuple(torch.tensor(k) if isinstance(k, list) else k for k in key), value)

    is_cuda = True  # for pebr.py, which has its own kernels for CUDA
    tolist = lambda self: self.elem.tolist()
    item = lambda self: self.elem.item()
    __bool__ = lambda self: bool(self.elem)
    __int__ = lambda self: int(self.elem)
    __float__ = lambda self: float(self.elem)
    __index__ = lambda self: self.elem.__index__()
    __repr__ = lambda self: f"OnDevice({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_device(func, args, kwargs or {})


def on_device(func, args, kwargs):
    """Compute on the CPU what belongs on the device. As CUDA does, refuse CPU tensors that are neither numbers nor indices."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = any(isinstance(x, OnDevice) for x in tensors)
    must_be_ours = tree_leaves((args[:1], args[2:], kwargs)) if func in INDEXING else tensors
    foreign = [x for x in must_be_ours if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) and x.dim() > 0]
    if ours and foreign and func not in COPIES:
        raise RuntimeError(f"{func}: tensors on the device and on the CPU meet")
    assert all(isinstance(x, OnDevice) or x.device != DEVICE for x in tensors), f"{func}: a tensor without values"
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"} | {"device": "cpu"}
    on_cpu = tree_map(lambda x: x.elem if isinstance(x, OnDevice) else x, (args, kwargs))
    out = ON_CPU.get(func, func)(*on_cpu[0], **on_cpu[1])
    name = func.__name__.split(".")[0]
    if name.endswith("_") and not name.startswith("__"):
        return args[0]  # in place
    if func is aten._local_scalar_dense.default or not (torch.device(asked) == DEVICE if asked is not None else ours):
        return out
    return tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, out)


class PretendDevice(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # the slot in which torch.zeros(..., device=DEVICE) reaches it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_device(func, args, kwargs or {})


def varlen_attn(query, key, value, bounds, key_bounds, longest, longest_key, scale):
    """torch's, window by window: (tokens, heads, dim) in bf16. What its flash kernel would refuse fails here, too."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16 and bounds.dtype == torch.int32 and bounds is key_bounds
    ends = bounds.tolist()
    assert max(b - a for a, b in itertools.pairwise(ends)) == longest == longest_key
    windows = zip(*([x[a:b].transpose(0, 1) for a, b in itertools.pairwise(ends)] for x in (query, key, value)))
    return torch.cat([F.scaled_dot_product_attention(*window, scale=scale).transpose(0, 1) for window in windows])


def with_autocast(product):
    """F.linear or the like, in bf16 under autocast, which itself knows nothing of OnDevice."""

    def cast(x):
        return x.bfloat16() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x

    def in_bf16(*args, **kwargs):
        args, kwargs = tree_map(cast, (args, kwargs)) if torch.is_autocast_enabled("cpu") else (args, kwargs)
        return product(*args, **kwargs)

    return in_bf16


class DeviceAccelerator(Accelerator):
    """accelerate, on DEVICE or the CPU, with or without bf16, whatever the process's other Accelerators have."""

    def __init__(self, device, bf16):
        super().__init__(cpu=True)
        self.own_device, self.bf16 = device, bf16

    device = property(lambda self: self.own_device)
    autocast = lambda self: torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)


@contextmanager
def pretended_device():
    """Inside, DEVICE is a device. Attention takes the plain kernel, because the others ask which device it is."""
    made_by_torch = torch.tensor

    def tensor(data, *args, device=None, **kwargs):  # with a list of tensors, torch.tensor(device=...) does not reach the mode
        data = [x.tolist() if isinstance(x, torch.Tensor) else x for x in data] if isinstance(data, (list, tuple)) else data
        made = made_by_torch(data, *args, **kwargs)
        return made if device is None else made.to(device)

    mask = lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool, device=DEVICE).tril(columns - rows)
    with pytest.MonkeyPatch.context() as patch, PretendDevice(), sdpa_kernel(SDPBackend.MATH):
        patch.setattr(torch, "tensor", tensor)
        for name in ("linear", "conv3d", "scaled_dot_product_attention"):
            patch.setattr(F, name, with_autocast(getattr(F, name)))
        patch.setattr(pebr, "varlen_attn", varlen_attn)
        patch.setattr(pebr, "causal_lower_right", mask)  # torch's own is a tensor class without a device
        yield


def move_inputs(policy, launcher):
    """What DDP and FSDP2's root do on CUDA before a forward (generate is one for FSDP2): tensors inside of lists go to the device,
    other objects stay as they are."""
    for name in {"": (), "DDP": ("forward",), "FSDP2": ("forward", "generate")}[launcher]:
        method = getattr(policy, name)

        def moved(*args, method=method, **kwargs):
            (args,), (kwargs,) = _to_kwargs(args, kwargs, DEVICE, False)
            return method(*args, **kwargs)

        setattr(policy, name, moved)


def one_of_each(model_folder, clip, rows, cfg, device, launcher=""):
    """Rollout, reward, reference log-probs, a GRPO update and a warm-up update of one model on a device. Returns all that
    comes out of them as plain numbers and CPU tensors."""
    accelerator = DeviceAccelerator(device, cfg.mixed_precision == "bf16")
    policy, reference = pebr.load_policy(model_folder, cfg), pebr.load_reference(model_folder, cfg, accelerator)
    move_inputs(policy.to(device), launcher)
    move_inputs(reference, launcher if launcher == "FSDP2" else "")  # DDP does not wrap the reference
    if cfg.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
    prompts = [pebr.encode_prompt(policy, row, cfg, "{question}", i) for i, row in enumerate(rows)]
    rollouts = pebr.generate_rollouts(policy, prompts, cfg.group_size, cfg, accelerator, cfg.temperature, "seed")
    pebr.score_rollouts(rollouts, clip)
    for i, rollout in enumerate(rollouts):
        rollout.advantage = float(i % 3 - 1)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    pebr.add_reference(rollouts, reference, cfg, accelerator)
    grpo = pebr.update_policy(rollouts, policy, optimizer, cfg, accelerator, off_policy=True)
    answers = [pebr.encode_response(policy, "red blue") for _ in prompts]

    def loss_of(examples):
        loss = -policy([p for p, _ in examples], [c for _, c in examples], 1.0)[0].sum() / 6
        return loss, {"loss": loss.detach()}

    warmup = pebr.optimizer_step(accelerator, policy, optimizer, cfg, [list(zip(prompts, answers))], loss_of)
    return {
        "tokens": [r.tokens.tolist() for r in rollouts], "parts": [r.parts for r in rollouts],
        "old": torch.cat([r.old_logprobs for r in rollouts]), "ref": torch.cat([r.ref_logprobs for r in rollouts]),
        "grpo": grpo, "warmup": warmup, "weights": torch.cat([p.detach().cpu().flatten() for p in policy.parameters()]),
    }  # fmt: skip


def pictured_rows(tmp_path, sizes):
    """One row per picture size; None: no picture."""
    images = [[picture(tmp_path / f"row{i}.png", size)] if size else [] for i, size in enumerate(sizes)]
    return [Row(f"row {i}", str(i), "How many red objects are there ?", "1", paths, ["red"]) for i, paths in enumerate(images)]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("launcher, checkpointing", [("DDP", False), ("FSDP2", True)])
@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_on_a_pretended_device_everything_is_as_on_the_cpu(engine, launcher, checkpointing, mixed_precision, toy, tmp_path):
    """Inputs are moved as each launcher moves them on CUDA. Pictures of several windows, of one, and none."""
    flags = dict(run_dir=str(toy.parent), engine=engine, max_new_tokens=8, group_size=3, micro_batch_size=6, generate_batch_size=6,
                 gradient_checkpointing=checkpointing, mixed_precision=mixed_precision, kl_coef=0.5)  # fmt: skip
    cfg, clip = pebr.resolve("perception", flags), rewards.ClipScorer(f"local-dir:{toy / 'clip'}", "cpu")
    rows = pictured_rows(tmp_path, [(168, 140), (56, 56), None])
    with sdpa_kernel(SDPBackend.MATH):
        expected = one_of_each(str(toy / "model"), clip, rows, cfg, torch.device("cpu"))
    with pretended_device():
        got = one_of_each(str(toy / "model"), clip, rows, cfg, DEVICE, launcher)
    assert got["tokens"] == expected["tokens"] and got["parts"] == expected["parts"]
    tolerance = dict(rtol=1e-4, atol=1e-5) if mixed_precision == "no" else dict(rtol=2e-2, atol=2e-2)
    for name in ("old", "ref", "weights"):
        torch.testing.assert_close(got[name], expected[name], **tolerance)
    for name in ("grpo", "warmup"):
        assert got[name] == pytest.approx(expected[name], rel=tolerance["rtol"], abs=tolerance["atol"])
    assert expected["grpo"]["grad_norm"] > 0.1 and expected["warmup"]["grad_norm"] > 0.1


def test_the_pretended_device_refuses_what_a_device_would_and_is_gone_afterwards():
    here, before = torch.ones(3), (torch.tensor, F.linear, pebr.varlen_attn)
    with pretended_device():
        there = torch.arange(3.0, device=DEVICE)
        assert (there + 1).tolist() == [1, 2, 3] and there[torch.tensor([2])].tolist() == [2]  # numbers and indices may mix
        zero = torch.tensor([0])
        meetings = lambda: there + here, lambda: torch.cat([here, there]), lambda: there.index_put((zero,), here[:1])
        for meet in meetings:
            with pytest.raises(RuntimeError, match="on the device and on the CPU meet"):
                meet()
    assert (torch.tensor, F.linear, pebr.varlen_attn) == before


# ----------------------------------------------------------------------------------------------------------------------
# What bf16, real sizes and several processes add


@pytest.mark.parametrize("is_fsdp2", [False, True])
def test_the_bf16_reference_keeps_its_rotary_frequencies_in_float32(is_fsdp2, toy, cfg):
    if is_fsdp2:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        accelerator = SimpleNamespace(device=torch.device("cpu"), is_fsdp2=is_fsdp2)
        reference = pebr.load_reference(str(toy / "model"), pebr.replace(cfg, mixed_precision="bf16"), accelerator)
    finally:
        if is_fsdp2:
            torch.distributed.destroy_process_group()
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    exact = dict(pebr.load_policy(str(toy / "model"), cfg).named_buffers())
    for name, buffer in reference.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, exact[name]), name
    assert any("inv_freq" in name for name in exact)


def test_a_decoding_step_does_not_round_its_scores_before_the_softmax():
    """Values are one-hot, so that the output is the attention weights. Scores of up to some 100, as trained models have them."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()
    keys, query, one_hot = normal(1, 1, 16, 64), 40 * normal(8, 4, 1, 64), torch.eye(32, dtype=torch.bfloat16)
    prompt_values, value = one_hot[None, None, :16], one_hot[16].expand(8, 1, 1, 32)
    new_key = normal(8, 1, 1, 64)
    cache = pebr.GroupCache([(keys, prompt_values)], torch.zeros(1, 1, 1, 16), 8, torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        got = pebr.decode_attention(query, new_key, value, 0.125, cache, 0, 0)[:, 0, :, :17]  # (8, 4, 17)
    everything = torch.cat([keys.expand(8, 1, 16, 64), new_key], 2).double()
    scores = 0.125 * query.double() @ everything.mT
    assert 50 < scores.abs().max() < 300
    variation = (got.double() - scores.softmax(-1)[:, :, 0]).abs().sum(-1) / 2
    assert variation.max() < 0.004  # bf16 weights; rounded scores gave 0.1


def test_a_frozen_vision_tower_has_no_backward_pass(policy, cfg, tmp_path, accelerator):
    cfg = pebr.replace(cfg, freeze_vision=True, gradient_checkpointing=True, kl_coef=0.0)
    model, optimizer = pebr.prepare_training(policy, cfg, accelerator)
    runs = {"vision": 0, "text": 0}
    visual, decoder = policy.model.base_model.visual, policy.model.base_model.language_model
    visual.blocks[0].attn.register_forward_hook(lambda *_: runs.update(vision=runs["vision"] + 1))
    decoder.layers[0].self_attn.register_forward_hook(lambda *_: runs.update(text=runs["text"] + 1))
    rollouts = rollouts_of(prompts_of(policy, cfg, tmp_path), [4, 6], [1, -1])
    pebr.update_policy(rollouts, model, optimizer, cfg, accelerator, off_policy=False)
    assert runs == {"vision": 1, "text": 2}  # the language model is computed once more in the backward pass


@pytest.mark.parametrize("kind", FAMILIES[:3])
def test_window_attention_is_sdpa_on_each_window(families, kind, cfg, tmp_path):
    policy, grads = pebr.load_policy(str(families / kind), cfg), {}
    prompts = prompts_of(policy, pebr.replace(cfg, max_prompt_length=500), tmp_path, sizes=((308, 196), (56, 56), (140, 84)))
    batch, visual = pebr.collate(prompts, None, policy.pad_id, "cpu"), policy.model.base_model.visual
    for implementation in ("sdpa", "flash_windows"):
        visual.config._attn_implementation = implementation
        out = visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
        policy.zero_grad()
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads[implementation] = [out, *(p.grad.clone() for p in visual.parameters() if p.grad is not None)]
    assert len(grads["sdpa"]) > 10
    for expected, got in zip(grads["sdpa"], grads["flash_windows"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_vision_tower_attends_in_one_call_a_layer_and_waits_for_nothing(families, cfg, tmp_path, monkeypatch):
    """6 windows: one call for each, and the three .tolist() of a layer, would keep a GPU waiting."""
    policy, calls = pebr.load_policy(str(families / "qwen2_5_vl"), cfg), Counter()
    prompts = prompts_of(policy, pebr.replace(cfg, max_prompt_length=500), tmp_path, sizes=((308, 196),))
    counted = lambda name, work: lambda *args, **kwargs: calls.update([name]) or work(*args, **kwargs)
    blocks = policy.model.base_model.visual.blocks
    blocks[0].register_forward_pre_hook(lambda *_: calls.clear())  # what comes before is once a forward
    blocks[-1].register_forward_hook(lambda *_: calls.update(layers=len(blocks)) or monkeypatch.undo())
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted("attention", F.scaled_dot_product_attention))
    for name in ("tolist", "item"):
        monkeypatch.setattr(torch.Tensor, name, counted("waits", getattr(torch.Tensor, name)))
    policy(prompts, [torch.tensor([10, 11])], 1.0)
    assert calls == {"layers": 2, "attention": 2}


def test_k3_is_clamped_as_in_the_authors_code():
    d = torch.tensor([8.0, 2.0, -8.0, -40.0], requires_grad=True)  # reference - policy
    kl = pebr.k3_kl(torch.zeros(4), d)
    torch.testing.assert_close(kl, torch.tensor([10.0, math.exp(2) - 3, math.exp(-8) + 7, 10.0]))
    assert torch.autograd.grad(kl.sum(), d)[0].ne(0).tolist() == [False, True, True, False]


def test_the_room_of_the_kv_cache_doubles():
    cache, rooms = pebr.GroupCache([], torch.zeros(1, 1, 1, 1), 1, torch.arange(1)), []
    for step in range(2048):
        keys, values = cache.append(0, step, torch.full((1, 1, 1, 1), float(step)), torch.full((1, 1, 1, 1), -float(step)))
        rooms.append(cache.own[0][0].shape[2])
    assert keys.flatten().tolist() == [-x for x in values.flatten().tolist()] == list(range(2048))
    assert len(set(rooms)) <= 6  # each growth is two allocations a layer, and leaves two holes


def test_only_scores_are_sent_to_other_processes_when_sampling_resumes(policy, cfg, toy, tmp_path, accelerator, monkeypatch):
    rows, sent = data.load_rows(str(toy / "train.json"))[0][:3], []
    args = policy, rows, 2, 1.0, pebr.replace(cfg, stage="sample"), None, tmp_path / "rollouts.jsonl", accelerator
    scores = pebr.answer_questions(*args)
    saved = (tmp_path / "rollouts.jsonl").read_text()
    assert scores == {record["qid"]: record["scores"] for record in map(json.loads, saved.splitlines())}
    broadcast = pebr.broadcast_object_list
    monkeypatch.setattr(pebr, "broadcast_object_list", lambda objects: sent.extend(objects) or broadcast(objects))
    assert pebr.answer_questions(*args) == scores and (tmp_path / "rollouts.jsonl").read_text() == saved
    assert sent == [scores]


@pytest.fixture(scope="session")
def tied(toy, tmp_path_factory):
    """The toy's model with tied embeddings, as the real 3B has them."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(toy / "model", folder)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = type(model.generation_config).from_pretrained(folder)
    model.save_pretrained(folder)
    assert "lm_head.weight" not in weights_of(folder)
    return folder


def test_tied_embeddings_train_as_one_and_are_saved_once(tied, cfg, tmp_path, accelerator):
    policy = pebr.load_policy(str(tied), cfg)
    head, embedding = policy.model.get_output_embeddings().weight, policy.model.get_input_embeddings().weight
    assert head is embedding
    before, rollouts = embedding.detach().clone(), rollouts_of(prompts_of(policy, cfg, tmp_path), [4, 6], [1, -1])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    pebr.update_policy(rollouts, policy, optimizer, pebr.replace(cfg, kl_coef=0.0), accelerator, off_policy=False)
    assert (embedding - before).abs().max() > 1e-4
    pebr.save_policy(policy, accelerator, policy, tmp_path / "saved")
    assert "lm_head.weight" not in weights_of(tmp_path / "saved")
    again = pebr.load_policy(str(tmp_path / "saved"), cfg)
    assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight
    for (name, p), q in zip(policy.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_run_with_tied_embeddings_resumes_exactly_and_says_nothing_of_shared_tensors(tied, toy, tmp_path, monkeypatch, caplog):
    (tmp_path / "toy").symlink_to(toy)
    argv = ["--stage", "perception", *SMALL, "--checkpoint_minutes", "0"]
    argv += ["--from_model", str(tied), "--from_data", str(toy / "train.json")]
    run(tmp_path, *argv)
    expected, load_checkpoint = weights_of(tmp_path / "perception"), pebr.load_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(pebr, "save_policy", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(tmp_path, *argv, "--overwrite")
    started = []
    monkeypatch.setattr(pebr, "load_checkpoint", lambda *args: started.append(load_checkpoint(*args)) or started[-1])
    run(tmp_path, *argv)
    resumed = weights_of(tmp_path / "perception")
    assert started == [1] and resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in resumed)
    assert "Removed shared tensor" not in caplog.text


VOCABULARY = 151_936  # of Qwen2.5-VL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_and_entropy_over_a_real_vocabulary(dtype, policy, cfg, tmp_path, monkeypatch):
    """In chunks of 4 of 9 tokens, against float64."""
    torch.manual_seed(0)
    policy.model.lm_head, completions = torch.nn.Linear(64, VOCABULARY, bias=False), []
    torch.nn.init.normal_(policy.model.lm_head.weight, std=0.5)
    for last in (0, 75_000, VOCABULARY - 1):  # a response's last token is no input, so that it may be any
        completions.append(torch.tensor([10, 11, last]))
    prompts = prompts_of(policy, cfg, tmp_path)[:1] * 3
    monkeypatch.setattr(pebr, "LOGITS_CHUNK", 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logprobs, entropy, mask = policy(prompts, completions, 1.2)
        logits = policy.model.lm_head(pebr.packed_states(policy, prompts, completions))
    assert logits.dtype == dtype and mask.sum() == 9
    expected = (logits.double() / 1.2).log_softmax(-1)  # (9, V)
    of_the_ids = expected.gather(1, torch.cat(completions)[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double().flatten(), of_the_ids, rtol=0, atol=1e-4)
    torch.testing.assert_close(entropy.double().flatten(), -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-4)
    assert logprobs.std() > 0.5 and entropy.std() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_chosen_from_a_real_vocabulary_as_float64_would(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 16, generator=generator), torch.randn(16, VOCABULARY, generator=generator)
    logits, noise, banned = (hidden @ head).to(dtype), torch.rand(6, 8, generator=generator), [5, VOCABULARY - 1]
    logits[:, banned] = logits.amax(-1, keepdim=True) + 1  # the two that the model likes best
    expected, rows = (logits.double() / 1.2).log_softmax(-1), torch.arange(6)
    for temperature, top_p in ((0.0, 1.0), (1.2, 1.0), (1.2, 0.9), (1.2, 0.01)):
        tokens, logprobs = pebr.sample_tokens(logits, noise, temperature, top_p, banned)
        scaled = expected if temperature else logits.double().log_softmax(-1)
        torch.testing.assert_close(logprobs.double(), scaled[rows, tokens], rtol=0, atol=1e-4)
        p = scaled.exp().index_fill(1, torch.tensor(banned), 0.0)
        p = p / p.sum(-1, keepdim=True)
        more_likely = torch.where(p > p[rows, tokens, None], p, 0.0).sum(-1)
        assert (p[rows, tokens] > 0).all() and (more_likely < top_p + 1e-4).all()
        if not temperature:
            assert (more_likely == 0).all()
        elif top_p == 1.0:  # nothing is refused: the first number of the noise falls on the token
            cumulated = p.cumsum(-1)[rows, tokens]
            assert (cumulated > noise[:, 0] - 1e-5).all() and (cumulated - p[rows, tokens] < noise[:, 0] + 1e-5).all()


def test_two_processes_train_in_bf16_with_fsdp2_as_one_does(toy, toy_run, cfg, tmp_path):
    """Both shard the same weights, which stay float32; what bf16 rounds differs, so that only the direction is alike."""
    bf16 = ("--mixed_precision", "bf16", "--gradient_checkpointing", "--max_new_tokens", "12")
    [(_, one)], metrics, _ = three_updates("one", toy, toy_run, tmp_path / "one", *bf16)
    [(name, first), (_, second)], sharded_metrics, _ = three_updates("FSDP2", toy, toy_run, tmp_path / "two", *bf16)
    start = dict(pebr.load_policy(str(toy_run / "warmup"), cfg).named_parameters())
    flat = lambda weights: torch.cat([(weights[name] - start[name]).flatten() for name in start])
    assert name == "FSDPPolicy" and first.keys() == second.keys() == one.keys() == start.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == torch.float32 for name in first)
    with torch.no_grad():
        assert flat(first).norm() > 1e-2 and F.cosine_similarity(flat(first), flat(one), dim=0) > 0.7
    assert sharded_metrics[0]["kl"] < 1e-6 and sharded_metrics[0]["sampler_gap"] < 0.05
    for name in ("loss", "entropy", "grad_norm", "reward"):
        assert sharded_metrics[0][name] == pytest.approx(metrics[0][name], rel=0.1, abs=0.02), name


# ----------------------------------------------------------------------------------------------------------------------
# A second data set, not the toy: other pictures, other questions, several pictures in a row, none in another, JSONL


@pytest.fixture(scope="session")
def night_sky(tmp_path_factory):
    """Stars and moons. Clear questions have one answer in the warm-up, the others two that contradict each other."""
    folder = tmp_path_factory.mktemp("sky")
    picture(folder / "moon.png", (60, 90), (240, 240, 200))
    picture(folder / "stars.jpg", (112, 56), (20, 20, 80))
    questions = [
        ("What shines here ?", ["moon.png"], ["moon"]),
        ("<image> or <image> : which has stars ?", ["moon.png", "stars.jpg"], ["second"]),
        ("What is the night like ?", [], ["dark"]),
        ("How bright ?", ["stars.jpg"], ["very", "hardly"]),
        ("Which color ?", ["moon.png"], ["pale", "blue"]),
        ("Is it late ?", [], ["yes", "no"]),
    ]
    rl, sft, words = [], [], "user assistant look think say".split()
    for i, (question, images, answers) in enumerate(questions):
        rl.append(
            {
                "qid": f"q{i}",
                "problem": question,
                "answer": answers[0],
                "images": images,
                "key_words": ["night sky"],
                "source": "sky",
            }
        )
        for answer in answers:
            text = (f"### Image Description: a night sky .\n### Rationales: look .\n### Let's think step by step.\n### Step 1: think .\n"
                    f"### Step 2: say {answer} .\n### The final answer is: {answer}")  # fmt: skip
            content = question if "<image>" in question or not images else "<image>" + question
            sft.append(
                {
                    "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": text}],
                    "images": images,
                }
            )
            words += (question.replace("<image>", " ") + " " + text).split()
    (folder / "rl.json").write_text(json.dumps(rl))
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rl))
    (folder / "sft.json").write_text(json.dumps(sft * 2))
    (folder / "prompt.txt").write_text("{question} think")
    for row in sft:
        row["messages"][0]["content"] += " think"
    (folder / "sft.jsonl").write_text("\n".join(json.dumps(row) for row in sft))
    data.build_toy_model(folder / "model", 0, TINY, words)
    return folder


def test_a_second_data_set_goes_through_all_stages_from_files(night_sky, toy, tmp_path, capsys):
    argv = ["--model", str(night_sky / "model"), "--train_data", str(night_sky / "rl.json"), "--sft_data", str(night_sky / "sft.jsonl"),
            "--test_data", str(night_sky / "test.jsonl"), "--prompt_file", str(night_sky / "prompt.txt"), "--clip_model", f"local-dir:{toy / 'clip'}",
            "--mixed_precision", "no", "--max_new_tokens", "32", "--max_pixels", "10000", "--learning_rate", "1e-3", "--no-freeze_vision"]  # fmt: skip
    argv += [
        "--rollout_batch_size",
        "4",
        "--update_batch_size",
        "2",
        "--sft_batch_size",
        "9",
        "--micro_batch_size",
        "9",
        "--temperature",
        "0.7",
    ]
    run(tmp_path, "--stage", "warmup", *argv, "--max_steps", "60", "--learning_rate", "3e-3")
    run(tmp_path, "--stage", "sample", *argv)
    split = {name: json.loads((tmp_path / "sample" / f"{name}.json").read_text()) for name in ("easy", "medium")}
    assert {"q0", "q1"} <= {row["qid"] for row in split["easy"]} and len(split["medium"]) >= 2
    assert split["easy"][0]["source"] == "sky"  # rows as they came in, other fields included
    run(tmp_path, "--stage", "perception", *argv, "--max_steps", "2")
    blind = sum(not row["images"] for row in split["easy"])
    assert f"{blind} without a picture are left out of perception RL" in capsys.readouterr().out and blind >= 1
    run(tmp_path, "--stage", "reasoning", *argv, "--max_steps", "2")
    run(tmp_path, "--stage", "evaluate", *argv)
    scores = json.loads((tmp_path / "evaluate" / "reasoning" / "scores.json").read_text())
    assert scores["greedy"]["n"] == 6 and scores["greedy"]["keyword"] > 0.5
    assert weights_of(tmp_path / "perception").keys() == weights_of(tmp_path / "reasoning").keys()


@pytest.mark.parametrize("prompt_file", ["", "prompt.txt"])
def test_warmup_and_sampling_ask_in_one_form_without_a_flag_for_it(prompt_file, night_sky, tmp_path, capsys):
    prompt_file = str(night_sky / prompt_file) if prompt_file else ""
    argv = ["--model", str(night_sky / "model"), "--train_data", str(night_sky / "rl.json"), "--sft_data", str(night_sky / "sft.json"),
            "--mixed_precision", "no", "--max_new_tokens", "32", "--max_pixels", "3136", "--no-freeze_vision", "--no-gradient_checkpointing",
            "--temperature", "0.7", "--prompt_file", prompt_file]  # fmt: skip
    run(tmp_path, "--stage", "warmup", *argv, "--max_steps", "40", "--learning_rate", "3e-3", "--sft_batch_size", "9")
    assert "  18 questions are put into the instruction, 0 have it already" in capsys.readouterr().out
    run(tmp_path, "--stage", "sample", *argv)
    assert json.loads((tmp_path / "sample" / "summary.json").read_text())["accuracy"] > 0.3
    cfg = pebr.resolve("sample", pebr.parse_flags(argv))
    policy, instruction = pebr.load_policy(cfg.model, cfg), pebr.read_instruction(cfg)
    ids = lambda row: pebr.encode_prompt(policy, row, cfg, instruction).inputs["input_ids"][0].tolist()
    prompts = [[ids(row) for row in data.load_rows(str(night_sky / name))[0]] for name in ("sft.json", "rl.json")]
    assert {tuple(p) for p in prompts[0]} == {tuple(p) for p in prompts[1]}  # token by token


def test_a_question_that_holds_the_instruction_is_not_put_into_it_again():
    asked = data.INSTRUCTION.replace("{question}", "How many?")
    assert data.in_instruction("How many?", data.INSTRUCTION) == data.in_instruction(asked, data.INSTRUCTION) == asked
    other = "How many? " + " ".join(re.findall("###[^:\n]*", data.INSTRUCTION))  # in other words, under the same headings
    assert data.in_instruction(other, data.INSTRUCTION) == other
    assert data.in_instruction("Why?", "{question} Be brief.\n") == "Why? Be brief.\n"
    assert data.in_instruction("Why? Be brief.", "{question} Be brief.\n") == "Why? Be brief."
    assert data.in_instruction("Why?", "{question}") == "Why?"


def test_warmup_on_hard_cases_keeps_what_the_base_model_gets_wrong(night_sky, tmp_path, accelerator):
    argv = ["--model", str(night_sky / "model"), "--train_data", str(night_sky / "rl.json"), "--sft_data", str(night_sky / "sft.json"),
            "--mixed_precision", "no", "--max_new_tokens", "8", "--group_size", "2", "--max_pixels", "10000", "--no-freeze_vision"]  # fmt: skip
    run(tmp_path, "--stage", "warmup", *argv, "--warmup_cases", "hard", "--max_steps", "1", "--sft_batch_size", "2")
    hard = json.loads((tmp_path / "sample_base" / "hard.json").read_text())
    assert hard == json.loads((night_sky / "sft.json").read_text())  # a random model gets all of them wrong
    cfg = pebr.resolve("sample", pebr.parse_flags([*argv, "--run_dir", str(tmp_path)]))
    policy = pebr.load_policy(cfg.model, cfg)
    rows = pebr.checked_rows(str(night_sky / "sft.json"), cfg, policy, accelerator, need=("answer",))
    asked = data.chat_messages(rows[0], "In this form: {question}")  # it cannot know the form otherwise
    assert "In this form: " in [part.get("text") for part in asked[-1]["content"]]
    assert json.loads((tmp_path / "warmup" / "summary.json").read_text())["rows"] == len(hard)


# ----------------------------------------------------------------------------------------------------------------------
# Random input; longer, with other seeds: python test_pebr.py fuzz /tmp/folder 1 100000


def random_value(rng, depth=0):
    """A JSON value of any kind, hostile in one of the places where it may stand."""
    if depth < 3 and rng.random() < 0.25:
        values = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return values if rng.random() < 0.5 else dict(zip(("role", "content", "0", "a"), values))
    texts = ["", " ", "a.png", "../a.png", "a\0.png", "\ud800", "A", "['a', 'b']", "[" * 99, "[0x" + "f" * 9000 + "]", "{[]: 1}", "<image>",
             "<image 1>", "nan", "9" * 400, "system", "user", "### The final answer is: 3", data.INLINE + "AAAA", "x" * 5000]  # fmt: skip
    return rng.choice([None, True, 0, -7, 0.5, 1e999, math.nan, 2**70, *texts])


def mutated(rng, blob: bytes) -> bytes:
    """The bytes cut, doubled or overwritten in up to four places."""
    for _ in range(rng.randint(1, 4)):
        a, n = rng.randrange(len(blob) + 1), rng.choice([1, 2, 8, 200])
        new = rng.choice([b"", rng.randbytes(n), blob[a : a + n] * 2, bytes(n), *b'"{[\t\n\xff'])
        blob = blob[:a] + (bytes([new]) if isinstance(new, int) else new) + blob[a + n :]
    return blob


CHAT = [SAID, {"role": "assistant", "content": "### The final answer is: 3"}]
QUESTION = {"question": "q", "answer": "A", "image": "a.png", "options": ["x", "y"], "hint": "h", "level": 1, "subject": "s", "precision": 1,
            "question_type": "free_form", "answer_type": "float", "ID": "1", "key": "2steps_1", "varid": 0, "qid": "1", "l2-category": "c",
            "skills": "['a']", "label": ["3"], "imgname": "a.png"}  # fmt: skip


def fuzz_rows(rng, folder) -> bool:
    """A file of two rows, one of them with random values, at times with random bytes. What is accepted must stand scoring and
    writing too."""
    bases = [ROW, {**ROW, "choices": ["3", "4"]}, {"messages": CHAT, "images": ["a.png"], "qid": "s"}, QUESTION, QUESTION]
    rows = [dict(rng.choice(bases)) for _ in range(2)]
    rows[0] |= {name: random_value(rng) for name in rng.sample([*rows[0], "zz"], 2)}
    rows[0].pop(rng.choice([*rows[0], *["none"] * 40]), None)
    path = folder / rng.choice(["rows.json", "rows.jsonl", "rows.tsv", "mathvista.json"])
    if path.suffix == ".tsv":
        tsv(path, *[{k: str(v).encode("utf-8", "replace").decode() for k, v in row.items()} for row in rows])
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    if rng.random() < 0.5:
        path.write_bytes(mutated(rng, path.read_bytes()))
    need = rng.choice([(), ("answer",), ("answer", "key_words"), ("response",)])
    good, _ = data.load_rows(str(path), "", need, rng.choice(["", *rewards.BENCHMARKS]))
    for row in good:
        rewards.score_predictions([row], [{"responses": ["### The final answer is: 3", "A"]}])
        pebr.write_jsonl(folder / "out.jsonl", [row.raw])
        data.write_tsv_predictions(folder / "out.tsv", [row], [{"extracted": ["3"], "responses": ["3"]}])
    return bool(good)


def fuzz_picture(rng, folder) -> bool:
    mode, kind = rng.choice(["P PNG", "I;16 PNG", "CMYK JPEG", "P GIF", "RGBA WEBP", "RGB TIFF", "RGB BMP"]).split()
    Image.new(mode, (9, 7)).save(file := io.BytesIO(), kind)
    (folder / "file").write_bytes(mutated(rng, file.getvalue()))
    return bool(data.load_image(str(folder / "file"), 1, 10**4))


def fuzz_prompt_file(rng, folder) -> bool:
    (folder / "file").write_bytes(mutated(rng, b"Look: {question}"))
    return bool(pebr.read_instruction(Config(prompt_file=str(folder / "file"))))


def fuzz(folder: str, seed="0", rounds="200") -> Counter:
    """How many random inputs of each kind were accepted and refused. Nothing but our own errors is caught."""
    counts, folder = Counter(), Path(folder)
    picture(folder / "a.png")
    for i, work in itertools.product(range(int(rounds)), (fuzz_rows, fuzz_picture, fuzz_prompt_file)):
        try:
            counts[work.__name__, work(random.Random(f"{seed} {i} {work.__name__}"), folder)] += 1
        except (DataError, ConfigError):
            counts[work.__name__, False] += 1
        except Exception as error:
            error.add_note(f"{work.__name__}, seed {seed}, round {i}")
            raise
    print(counts)
    return counts


@pytest.mark.filterwarnings("ignore:::PIL")
def test_random_input_ends_in_our_own_errors(tmp_path):
    counts = fuzz(tmp_path)
    assert len(counts) == 6 and min(counts.values()) > 5, counts  # of each kind some are accepted and some refused


# ----------------------------------------------------------------------------------------------------------------------
# Measurements for the README, by hand: python test_pebr.py NAME


def peer_world(folder, image_side, rows=8):
    """A 4 M parameter Qwen2.5-VL, questions of 70 tokens around a picture, and TRL's reward-free view of the same files."""
    from transformers import AutoProcessor, GenerationConfig

    words = [f"w{i}" for i in range(2000)]
    data.build_toy_model(
        Path(folder, "model"), 0, data.ToyConfig(hidden=256, vision_layers=4), ["user", "assistant", *words]
    )
    processor = AutoProcessor.from_pretrained(Path(folder, "model"))
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 2000 * 28 * 28}
    processor.save_pretrained(Path(folder, "model"))
    end = processor.tokenizer.eos_token_id  # a single one, because TRL knows no more
    GenerationConfig(eos_token_id=end, pad_token_id=processor.tokenizer.pad_token_id).save_pretrained(Path(folder, "model"))
    rng, rl = random.Random(0), []
    for i in range(rows):
        picture(Path(folder, f"{i}.png"), (image_side, image_side), tuple(rng.choices(range(256), k=3)))
        problem = " ".join(rng.choices(words, k=59))
        rl.append({"qid": str(i), "problem": problem, "answer": "7", "images": [f"{i}.png"]})
    Path(folder, "rl.json").write_text(json.dumps(rl))
    Path(folder, "prompt.txt").write_text("{question}")


def train_with_trl(folder, steps, max_new_tokens):
    """The peer: TRL's GRPOTrainer on the same model, rows and settings."""
    from datasets import Dataset
    from transformers import AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": [{"role": "user", "content": row["problem"]}], "image": Image.open(Path(folder, row["images"][0]))}
            for row in json.loads(Path(folder, "rl.json").read_text())]  # fmt: skip
    settings = GRPOConfig(
        output_dir=f"{folder}/trl", use_cpu=True, bf16=False, max_steps=int(steps), save_strategy="no", report_to=[], disable_tqdm=True,
        logging_steps=1000, learning_rate=1e-6, per_device_train_batch_size=8, gradient_accumulation_steps=4, num_generations=8, temperature=1.2,
        top_p=0.99, top_k=0, beta=0.01, max_completion_length=int(max_new_tokens), gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    clocks = []  # at each call of the reward, which is one a step

    def reward(completion_ids, **_):
        clocks.append(time.process_time())
        return [float(sum(ids) % 7) for ids in completion_ids]

    GRPOTrainer(
        model=f"{folder}/model", reward_funcs=reward, args=settings,
        train_dataset=Dataset.from_list(rows * int(steps)), processing_class=AutoProcessor.from_pretrained(f"{folder}/model", padding_side="left"),
    ).train()  # fmt: skip
    print_cost(clocks)


def train_with_pebr(folder, steps, max_new_tokens):
    """Ours, the reasoning stage from the command line."""
    score, clocks = pebr.score_rollouts, []
    pebr.score_rollouts = lambda *args: clocks.append(time.process_time()) or score(*args)
    pebr.main(["--stage", "reasoning", "--run_dir", f"{folder}/run{steps}", "--model", f"{folder}/model", "--from_model", f"{folder}/model",
               "--train_data", f"{folder}/rl.json", "--from_data", f"{folder}/rl.json", "--prompt_file", f"{folder}/prompt.txt", "--max_steps", steps,
               "--threads", "1", "--mixed_precision", "no", "--no-gradient_checkpointing", "--rollout_batch_size", "4", "--update_batch_size", "4",
               "--micro_batch_size", "8", "--max_new_tokens", max_new_tokens, "--max_pixels", "2000000", "--overwrite"])  # fmt: skip
    print_cost(clocks)


def print_cost(clocks=()):
    """Peak memory in MiB; CPU seconds from one reward to the next, the median, without the first, which wakes libraries."""
    seconds = [after - before for before, after in itertools.pairwise(clocks)][1:]
    print("COST", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, statistics.median(seconds or [0]))


def bench_trl(steps="3"):
    """One GRPO step here and in TRL (pip install trl==1.16.0 datasets==5.2.0), 4 questions x 8 responses, one thread."""

    def measure(name, *arguments):
        command = [sys.executable, "-W", "ignore", __file__, name, *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert "COST" in result.stdout, result.stdout + result.stderr
        peak, seconds = result.stdout.split("COST")[1].split()
        return int(peak), float(seconds)

    (theirs, _), (ours, _) = measure("imports", "trl"), measure("imports")
    print(f"imports alone: TRL {theirs} MiB, pebr.py {ours} MiB")
    print(
        "| prompt : completion | TRL, CPU s | pebr.py, CPU s | speed | TRL, peak MiB | pebr.py, peak MiB | ratio | less imports |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for side, max_new_tokens in ((392, 64), (560, 128), (392, 256), (196, 448)):
        with tempfile.TemporaryDirectory() as folder:
            peer_world(folder, side)
            trl, pebr_ = (
                measure(name, folder, 2 + int(steps), max_new_tokens) for name in ("train_with_trl", "train_with_pebr")
            )
        print(f"| {(side // 28) ** 2 + 70} : {max_new_tokens} | {trl[1]:.2f} | {pebr_[1]:.2f} | {trl[1] / pebr_[1]:.1f}x | {trl[0]} | {pebr_[0]} | "
              f"{pebr_[0] / trl[0]:.2f} | {(pebr_[0] - ours) / (trl[0] - theirs):.2f} |", flush=True)  # fmt: skip


def imports(peer=""):
    """What a side needs before it has a model."""
    if peer:
        from trl import GRPOTrainer  # noqa: F401
    print_cost()


def bench_clip(rounds: int = 5) -> None:
    """CPU seconds of 64 CLIP rewards (8 pictures x 8 texts of 15 to 45 words), as a Markdown table: best of `rounds`, the three
    ways in turn. One call each = one picture and one padded text through open_clip, for each response."""
    import open_clip
    from safetensors.torch import save_file

    rng = random.Random(0)
    words = "a the red blue large small circle square is left right of and with two three on white near corner".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(15, 45))) for _ in range(64)]
    lists = [[image] for image in noise_pictures(8, (640, 480)) for _ in range(8)]
    print("| CLIP | one call each | batched | batched, padding trimmed | largest difference |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data.build_toy_clip(Path(folder, "toy CLIP"), 0, TINY)
        torch.manual_seed(0)
        model = {name: w.contiguous() for name, w in open_clip.create_model("ViT-B-32").state_dict().items()}
        Path(folder, "ViT-B-32").mkdir()
        save_file(model, Path(folder, "ViT-B-32", "open_clip_model.safetensors"))
        config = json.dumps({"model_cfg": open_clip.get_model_config("ViT-B-32")})
        Path(folder, "ViT-B-32", "open_clip_config.json").write_text(config)
        for name in ("toy CLIP", "ViT-B-32"):
            scorer = rewards.ClipScorer(f"local-dir:{Path(folder, name)}")

            @torch.inference_mode()
            def one_call(image, text):
                image = scorer.model.encode_image(scorer.preprocess(image)[None], normalize=True)
                return float(image @ scorer.model.encode_text(scorer.tokenizer([text]), normalize=True).T)

            def batched(trims):
                scorer.trims = trims
                return scorer.cosines(lists, texts)

            ways = [lambda: [one_call(image, text) for [image], text in zip(lists, texts)], lambda: batched(False), lambda: batched(True)]  # fmt: skip
            seconds, scores = [math.inf] * 3, [None] * 3
            for _ in range(rounds):
                for i, way in enumerate(ways):
                    clock = time.process_time()
                    scores[i] = way()
                    seconds[i] = min(seconds[i], time.process_time() - clock)
            difference = max(abs(a - b) for score in scores[1:] for a, b in zip(scores[0], score))
            cells = [f"{s:.3g} s ({seconds[0] / s:.1f} x)" for s in seconds[1:]]
            print(f"| {name} | {seconds[0]:.3g} s | {cells[0]} | {cells[1]} | {difference:.0e} |", flush=True)


def print_hacks():
    print(
        "| response | stage 1 | with `--keyword_precision` | authors' rules | stage 2 | authors' rules |\n|---|---|---|---|---|---|"
    )
    for name, ((response, tokens), _) in HACKS.items():
        print("|", " | ".join([name] + [f"{earned:.2f}" for earned in earnings(response, tokens)]), "|")


def load_grader(name: str):
    """(answer, gold, choices) -> bool; the others know no choices. math-verify reads LaTeX only between dollars."""
    if name == "pebr":
        return rewards.grade
    if name == "mathruler":
        from mathruler.grader import grade_answer

        return lambda answer, gold, choices=None: grade_answer(answer, gold)
    from math_verify import parse, verify

    dollars = lambda text: text if "$" in text or "\\(" in text or "\\[" in text else f"${text}$"
    return lambda answer, gold, choices=None: verify(parse(dollars(gold)), parse(dollars(answer)))


def grader_process(name: str, pipe):
    """Answers pairs until it is killed, with 3 GB of address space beside what it starts with."""
    grade = load_grader(name)
    cap = psutil.Process().memory_info().vms + 3 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
    while True:
        pair = pipe.recv()
        try:
            pipe.send(bool(grade(*pair)))
        except Exception:  # a verdict too: the caller gets no reward from it
            pipe.send(False)


def ask(name: str, pairs: list) -> list:
    """A grader's verdict on each pair; None where it took more than 20 seconds and was killed."""
    verdicts, process = [], None
    for pair in pairs:
        if process is None:
            pipe, end = multiprocessing.get_context("fork").Pipe()
            process = multiprocessing.get_context("fork").Process(target=grader_process, args=(name, end), daemon=True)
            process.start()
            pipe.send(("1", "1"))  # wakes libraries
            pipe.recv()
        pipe.send(pair)
        verdicts.append(pipe.recv() if pipe.poll(20) else None)
        if verdicts[-1] is None:
            process.kill()
            process = None
    return verdicts


def print_graders():
    clear = [pair for pair in GRADING_PAIRS if not isinstance(pair, str) and not pair[2].endswith("?")]
    hacks = [(authors_answer(response), HACK_ROW.answer) for (response, _), _ in HACKS.values()]
    print(
        "| | agree with a person | wrongly accepted | wrongly rejected | hangs | seconds | runs code |\n|---|---|---|---|---|---|---|"
    )
    for name, version in (("pebr", ""), ("mathruler", "0.1.0"), ("math-verify", "0.9.0")):
        start = time.perf_counter()
        verdicts = ask(name, [(answer, gold, *choices) for answer, gold, _, *choices in clear])
        seconds = time.perf_counter() - start
        wrong = Counter(
            pair[2] for pair, verdict in zip(clear, verdicts) if verdict != (pair[2] == "same") and verdict is not None
        )
        hangs = verdicts.count(None)
        agreed = len(clear) - wrong.total() - hangs
        with tempfile.TemporaryDirectory() as folder:  # an answer whose text, escaped, is a program that makes a file
            program = "".join(f"\\backslash{{}}{ord(letter):03o}" for letter in f"open('{folder}/made','w')")
            ask(name, [(f"re('{program}')", "1/2"), (f"open('{folder}/made','w')", "1/2")])
            ran = "yes" if os.listdir(folder) else "no"
        row = [f"{agreed} of {len(clear)}", wrong["other"], wrong["same"], hangs, f"{seconds:.1f}", ran]
        print("|", " | ".join(map(str, [f"{name} {version}".strip()] + row)), "|")
        if name == "mathruler" and ask(name, hacks) != [answer == gold for answer, gold in hacks]:
            print("mathruler's verdicts on the answers of HACKS are not those of authors_rewards")


# ----------------------------------------------------------------------------------------------------------------------
# What a GPU must show: `python test_pebr.py gpu`; `gpu tiny` takes every part through at tiny size on a CPU

SHAPES = {  # text, vision, sections of the rotary embedding, standard deviation of the weights, tokens
    "3B": (dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
           dict(hidden_size=1280, intermediate_size=3420, depth=32, fullatt_block_indexes=[7, 15, 23, 31]),
           [16, 24, 24], 0.02, 151_936),
    "toy": (dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4),
            dict(hidden_size=64, intermediate_size=128, depth=2, fullatt_block_indexes=[1]),
            [2, 3, 3], 0.1, 1000),
}  # fmt: skip


def build_policy(shape: str, device) -> pebr.Policy:
    """Qwen2.5-VL of this shape with random weights, made on the device, past disk and CPU memory."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    processor = data.toy_processor(["user", "assistant", *(f"w{i}" for i in range(100))])
    text, vision, sections, std, words = SHAPES[shape]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text = dict(text, vocab_size=words, num_key_value_heads=2, rope_parameters=rope, initializer_range=std)
    vision = dict(vision, num_heads=16 if shape == "3B" else 4, out_hidden_size=text["hidden_size"], window_size=112)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    marks = dict(zip(names, processor.tokenizer.convert_tokens_to_ids(marks)))
    text |= dict(bos_token_id=processor.tokenizer.pad_token_id, eos_token_id=processor.tokenizer.eos_token_id)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **marks)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return pebr.Policy(model, processor, fast=True)


def choose_engine(policy: pebr.Policy, engine: str) -> None:
    """As load_policy does for --engine auto and --engine plain."""
    policy.fast = engine == "fast"
    policy.model.config.text_config._attn_implementation = "shared_prefix" if policy.fast else "sdpa"


def make_prompts(policy: pebr.Policy, cfg, count: int, length: int) -> list:
    """Prompts of `length` tokens, each with a picture of cfg.max_pixels; 28 x 28 pixels are a token."""
    policy.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": cfg.max_pixels}
    side = round(cfg.max_pixels**0.5)
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        Image.effect_noise((side, side), 100).convert("RGB").save(file.name)

        def prompt(i, words):
            row = Row("", str(i), " ".join(f"w{(i + k) % 100}" for k in range(words)), "1", [file.name])
            return pebr.encode_prompt(policy, row, cfg, "{question}", i)

        words = 1 + length - prompt(0, 1).inputs["input_ids"].shape[1]
        return [prompt(i, words) for i in range(count)]


def random_rollouts(prompts: list, lengths: list[int]) -> list:
    """Responses of random tokens, to each prompt the same number."""
    torch.manual_seed(1)
    tokens, n = [torch.randint(100, 1000, (length,)) for length in lengths], len(lengths) // len(prompts)
    make = lambda i, t: Rollout(prompts[i // n], t, "", False, torch.zeros(len(t)), advantage=i % 3 - 1.0)
    return [make(i, t) for i, t in enumerate(tokens)]


def gpu_setup(precision: str, **settings):
    from accelerate import Accelerator

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    settings = dict(kl_coef=0.0, group_size=8, temperature=1.0, generate_batch_size=1024) | settings
    cfg = pebr.Config("reasoning", mixed_precision=precision, **settings)
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision), cfg


def timed(work):
    """(result, seconds, peak GiB); without a GPU the peak is 0."""
    cuda = torch.cuda if torch.cuda.is_available() else None
    cuda and (cuda.synchronize(), cuda.reset_peak_memory_stats())
    start, result = time.perf_counter(), work()
    cuda and cuda.synchronize()
    return result, time.perf_counter() - start, cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def rollout(policy: pebr.Policy, prompts: list, C: int, cfg, accelerator) -> list:
    cfg = pebr.replace(cfg, max_new_tokens=C)
    return pebr.generate_rollouts(policy, prompts, cfg.group_size, cfg, accelerator, cfg.temperature, "gpu")


def time_rollout(policy: pebr.Policy, prompts: list, C: int, cfg, accelerator):
    """(seconds, GiB, bytes to read, figures): G rollouts to each prompt, all of C tokens."""
    policy.banned_ids = sorted({*policy.banned_ids, *policy.end_ids})
    rollouts, seconds, gib = timed(lambda: rollout(policy, prompts, C, cfg, accelerator))
    assert {len(r.tokens) for r in rollouts} == {C}
    text, T = policy.model.config.text_config, prompts[0].inputs["input_ids"].shape[1]
    # Bytes in bf16, of a token's keys and values and of the weights; the embedding is the head, too.
    kv = 4 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    weights = 2 * sum(p.numel() for p in policy.model.get_decoder().parameters())
    # Each step must read the weights, every prompt's keys and values once, and those of every response.
    must_read = sum(weights + kv * (len(prompts) * T + len(rollouts) * step) for step in range(1, C))
    forward = torch.cat(pebr.rollout_logprobs(policy, rollouts[:16], cfg, accelerator))
    gap = (forward - torch.cat([r.old_logprobs for r in rollouts[:16]])).abs()
    return seconds, gib, must_read, {"sampler_gap": float(gap.mean()), "largest log ratio": float(gap.max())}


def time_update(policy: pebr.Policy, prompts: list, C: int, cfg, accelerator):
    """(seconds, GiB, FLOPs, figures): one update on G random responses of C tokens to each prompt. It is plain SGD's:
    Adam's two states would take 28 GiB more for the 3B."""
    rollouts = random_rollouts(prompts, [C] * cfg.group_size * len(prompts))
    model, seen = policy.model, Counter()
    optimizer = accelerator.prepare(torch.optim.SGD(policy.parameters(), lr=1e-6))
    count = lambda _, args, x: seen.update(tokens=x["input_ids"].numel(), patches=len(x["pixel_values"]))
    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    policy.train()
    _, seconds, gib = timed(lambda: pebr.update_policy(rollouts, policy, optimizer, cfg, accelerator, False))
    hook.remove()
    parts = model.get_decoder().layers, model.base_model.visual, model.get_output_embeddings()
    layers, vision, head = (sum(p.numel() for p in part.parameters()) for part in parts)
    # Per weight and token: 2 FLOPs forward, 2 to recompute it, 4 backward. Attention's own are left out.
    flops = 8 * (layers * seen["tokens"] + vision * seen["patches"] + head * C * len(rollouts))
    return seconds, gib, flops, {"processed tokens": seen["tokens"], "patches": seen["patches"]}


def show(what: str, work, *arguments) -> None:
    """A row of the table, printed at once: a part that is stopped keeps it. A failure is a row, too."""
    try:
        values = work(*arguments)
    except Exception as error:
        values = {"FAILED": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    print("ROW " + json.dumps({"what": what, **values}), flush=True)


def gpu_float32(tiny: bool) -> None:
    """The two engines on the toy's shape: greedy tokens, and log-probs and gradients of ragged groups."""
    accelerator, cfg = gpu_setup("no", max_pixels=56 * 56, group_size=1, temperature=0.0)
    policy, results = build_policy("toy", accelerator.device), {}
    prompts = [prompt for length in (20, 33, 50) for prompt in make_prompts(policy, cfg, 2, length)]
    rollouts = random_rollouts(prompts, [9, 1, 4, 7, 3, 2, 5, 5, 12, 12, 8, 1, 30, 30, 30, 2, 2, 1])
    for engine in ("fast", "plain"):
        choose_engine(policy, engine)
        greedy = [r.tokens.tolist() for r in rollout(policy, prompts, 64, cfg, accelerator)]
        policy.train().zero_grad()
        logprobs, _, mask = policy([r.prompt for r in rollouts], [r.tokens for r in rollouts], 1.2)
        advantages = torch.tensor([r.advantage for r in rollouts], device=mask.device)
        (logprobs * mask * advantages[:, None]).sum().backward()
        results[engine] = greedy, [logprobs.detach()], [p.grad for p in policy.parameters()]
    (tokens, *fast), (expected, *plain) = results.values()
    show("greedy responses", lambda: {"equal": sum(map(list.__eq__, tokens, expected)), "of": len(expected)})
    for what, ours, theirs in zip(("log-probs", "gradients"), fast, plain):
        largest = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        scale = max(float(b.abs().max()) for b in theirs)
        show(what, lambda: {"largest difference": largest, "over the largest value": largest / scale})


FSDP_FLAGS = """--stage reasoning --max_steps 8 --checkpoint_minutes 0 --rollout_batch_size 4
    --update_batch_size 2 --group_size 2 --max_new_tokens 40 --learning_rate 1e-5 --print_every 0 --threads 1""".split()
FSDP_DRIVER = """
import sys, torch
sys.path.insert(0, {folder!r})
import pebr, rewards
torch.use_deterministic_algorithms(True, warn_only=True)
rewards.length_reward = lambda num_tokens: num_tokens % 5 / 4  # without training accuracy is 0
rewards.STAGE_REWARDS["reasoning"] = {{"length": 1.0}}
pebr.main(sys.argv[1:])
"""


def kill_tree(process: subprocess.Popen) -> None:
    for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
        each.kill()


def gpu_fsdp2(tiny: bool) -> None:
    """FSDP2 with one process: one run without a break, one that is killed after two steps and started again."""
    root = Path(pebr.__file__).parent
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # for deterministic algorithms

    def run(folder, name):
        Path(folder, name).mkdir(exist_ok=True)
        with suppress(FileExistsError):  # the second start
            Path(folder, name, "toy").symlink_to(f"{folder}/toy")
        launch = ["accelerate.commands.launch", "--config_file", f"{root}/configs/fsdp2.yaml", "--num_processes", "1"]
        command = [sys.executable, "-m", *launch, "--main_process_port", "0", f"{folder}/driver.py", *FSDP_FLAGS]
        paths = f"--run_dir {folder}/{name} --from_model {folder}/toy/model --from_data {folder}/toy/train.json"
        return subprocess.Popen([*command, *paths.split()], env=environment)

    def kill_and_resume(folder):
        data.build_toy_world(f"{folder}/toy", 0, data.ToyConfig(8, 8, 0, 4, clip_steps=1, clip_batch=4))
        Path(folder, "driver.py").write_text(FSDP_DRIVER.format(folder=str(root)))
        whole, killed, stage = run(folder, "whole"), run(folder, "killed"), Path(folder, "killed/reasoning")
        while not (stage / "checkpoint-2").exists():
            assert killed.poll() is None, "the run ended before it was killed"
            time.sleep(0.005)
        sharded = any("fsdp" in path.name for path in stage.glob("checkpoint-*/*"))
        kill_tree(killed)
        steps = len(pebr.read_jsonl(stage / "metrics.jsonl"))
        assert (whole.wait(), run(folder, "killed").wait()) == (0, 0), "a run failed"
        a, b = (pebr.read_jsonl(Path(folder, name, "reasoning/metrics.jsonl")) for name in ("whole", "killed"))
        gap = max(abs(x[k] - y[k]) / max(abs(x[k]), 1e-6) for x, y in zip(a, b, strict=True) for k in x)
        counts = {"steps": len(a), "killed after": steps, "sharded": sharded}
        return {**counts, "equal": a == b, "largest relative difference": gap}

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        show("metrics of the killed run against the other's", kill_and_resume, folder)


def ceilings(tiny: bool, device) -> tuple[float, float]:
    """FLOP/s of a large bf16 matrix product, bytes/s (read and written) of a large copy."""
    n, size = (256, 2**20) if tiny else (8192, 2**32)
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    best = lambda work: min(timed(lambda: [work() for _ in range(20)])[1] for _ in range(3)) / 20
    return 2 * n**3 / best(lambda: a @ b), 2 * size / best(lambda: target.copy_(source))


def gpu_3b(tiny: bool) -> None:
    """Random float32 weights, bf16 compute, gradient checkpointing, G = 8, 1,000 prompt tokens (900 a picture's)."""
    accelerator, cfg = gpu_setup("bf16", max_pixels=(56 if tiny else 840) ** 2)
    flops, bandwidth = ceilings(tiny, accelerator.device)
    show("ceilings", lambda: {"TFLOP/s": flops / 1e12, "TB/s": bandwidth / 1e12})
    policy, seconds_of = build_policy("toy" if tiny else "3B", accelerator.device), {}
    policy.model.activation_checkpointing_enable()
    few, many, short, long = (2, 4, 6, 12) if tiny else (8, 32, 512, 2048)
    prompts = make_prompts(policy, cfg, many, 40 if tiny else 1000)

    def measure(work, engine, P, C, ceiling):
        choose_engine(policy, engine)
        work(policy, prompts[:1], 2 if work is time_rollout else C, cfg, accelerator)  # loads kernels
        seconds, gib, needed, figures = work(policy, prompts[:P], C, cfg, accelerator)
        fast = seconds_of.setdefault((work, P, C), seconds)  # the fast engine comes first
        rates = {"tokens/s": P * cfg.group_size * C / seconds, "share of the ceiling": needed / ceiling / seconds}
        return {"seconds": seconds, "over fast": seconds / fast, **rates, "peak GiB": gib, **figures}

    for C, engine in itertools.product((short, long), ("fast", "plain")):
        show(f"update, 16 rows of {C} tokens, {engine}", measure, time_update, engine, 2, C, flops)
    for engine, P, C in (("fast", few, short), ("fast", many, short), ("fast", many, long),
                         ("plain", few, short), ("fast", few, long), ("plain", many, short)):  # fmt: skip
        show(f"rollout, {8 * P} rows of {C} tokens, {engine}", measure, time_rollout, engine, P, C, bandwidth)


GPU_PARTS = {"float32": gpu_float32, "fsdp2": gpu_fsdp2, "3B": gpu_3b}


def run_part(name: str, size: str, end: float) -> dict:
    """A part in a process of its own, until `end` on the clock: its seconds and the rows that it has shown."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if size == "tiny" else {})
    command, start = [sys.executable, "-W", "ignore", sys.argv[0], "gpu", size, name], time.monotonic()
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    child = subprocess.Popen(command, env=environment, **pipe)
    try:
        output, _ = child.communicate(timeout=max(1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        kill_tree(child)
        output = child.communicate()[0] + "\nstopped: out of time"
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    rows += [{"what": "the rest", "FAILED": output.splitlines()[-1][:200]}] if child.returncode else []
    if any("FAILED" in row for row in rows):
        print(output[-3000:], file=sys.stderr)
    return {"seconds": round(time.monotonic() - start), "rows": rows}


def gpu(size: str = "", part: str = "") -> None:
    """510 seconds at most; the two parts that measure no time run side by side. Writes gpu.json and gpu.md to $OUT,
    or to the current folder. Exits with 1 if something failed."""
    if part:
        return GPU_PARTS[part](size == "tiny")
    if size != "tiny" and not torch.cuda.is_available():
        return print("no GPU")
    device = "CPU, tiny sizes" if size == "tiny" else torch.cuda.get_device_name()
    report, begin = {"device": device, "torch": torch.__version__}, time.monotonic()
    out = os.environ.get("OUT", ".")
    for names, limit in ((["float32", "fsdp2"], 180), (["3B"], 510)):
        with ThreadPoolExecutor() as pool:
            report |= zip(names, pool.map(lambda name: run_part(name, size, begin + limit), names))
        Path(out, "gpu.json").write_text(json.dumps(report, indent=1))
        Path(out, "gpu.md").write_text(gpu_table(report))
    print(gpu_table(report))
    sys.exit("FAILED" in gpu_table(report))


def gpu_table(report: dict) -> str:
    text = f"{report['device']}, torch {report['torch']}\n"
    for name in filter(report.get, GPU_PARTS):
        rows = report[name]["rows"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        words = lambda value: f"{value:.4g}" if type(value) is float else str(value)
        cells = [[words(row.get(key, "")) for key in columns] for row in rows]
        text += f"\n{name}, {report[name]['seconds']} s\n\n"
        text += "".join(f"| {' | '.join(line)} |\n" for line in [columns, ["---"] * len(columns), *cells])
    return text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_command_says_so(capsys):
    gpu()
    assert capsys.readouterr().out == "no GPU\n"


COMMANDS = {"hacks": print_hacks, "graders": print_graders, "trl": bench_trl, "train_with_trl": train_with_trl,
            "train_with_pebr": train_with_pebr, "imports": imports, "clip": bench_clip, "fuzz": fuzz, "kills": kills,
            "gpu": gpu}  # fmt: skip

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
