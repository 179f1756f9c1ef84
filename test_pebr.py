"""What is true of PeBR. Run with: python -m pytest -q

Everything is built here: a small toy world (pictures, rows, a tiny random Qwen2.5-VL folder, a tiny open_clip folder) and
a second data set that is not the toy. No network, no GPU, deterministic. Measurements: python test_pebr.py NAME.
"""

import base64
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
import copy
import csv
from dataclasses import replace
import gc
from html.parser import HTMLParser
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
from pathlib import Path

import random
import re
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib

from accelerate import Accelerator
from PIL import Image, ImageDraw
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.utils import _to_kwargs  # what DDP and FSDP2 do to the inputs of a forward
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import data
from data import DataError, Row
import pebr
from pebr import Config, ConfigError, Rollout
import rewards

torch.set_num_threads(1)
TINY = data.ToyConfig(
    sft_rows=16,
    rl_rows=8,
    dear_rows=0,
    test_rows=6,
    hidden=64,
    text_layers=2,
    vision_layers=1,
    clip_steps=2,
    clip_batch=8,
)


@pytest.fixture(autouse=True)
def accelerator():
    """The module's accelerator as a run on a CPU has it. A test that needs another precision replaces it."""
    pebr.accelerator = Accelerator(cpu=True, mixed_precision="no")
    return pebr.accelerator


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "toy"
    data.build_toy_world(str(folder), 0, TINY)
    return folder


@pytest.fixture
def cfg(toy):
    flags = {"run_dir": str(toy.parent), "group_size": 3, "max_new_tokens": 12, "micro_batch_size": 4}
    return pebr.resolve("perception", flags)


@pytest.fixture
def policy(toy, cfg, accelerator):
    return pebr.load_policy(str(toy / "model"), cfg)


def picture(path, size=(56, 56), color=(200, 30, 30)):
    image = Image.new("RGB", size, (255, 255, 255))
    ImageDraw.Draw(image).ellipse([5, 5, 30, 30], fill=color)
    image.save(path)
    return str(path)


def prompts_of(
    policy, cfg, tmp_path, sizes=((56, 56), (112, 84)), words=("red", "How many red objects are there ?")
):
    """One prompt per size (None: no picture), with questions of different lengths."""
    prompts = []
    for i, size in enumerate(sizes):
        images = [picture(tmp_path / f"{i}.png", size)] if size else []
        row = Row(f"row {i}", str(i), words[i % len(words)], "1", images)
        prompts.append(pebr.encode_prompt(policy, row, cfg, i))
    return prompts


def rollouts_of(prompts, lengths):
    """Rollouts of random tokens, prompts in turn."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(10, 60, (n,), generator=generator) for n in lengths]
    return [
        Rollout(prompts[i % len(prompts)], t, "", False, torch.zeros(len(t))) for i, t in enumerate(tokens)
    ]


# ------------------------------------------------------------------------------------------------------------
# Rewards

GOOD = """### Image Description: Two red dots. ### Rationales: Count. ### Let's think step by step.
### Step 1: One, two. ### Step 2: So two. ### The final answer is: 2"""
SEEN = "Two red dots."


@pytest.mark.parametrize(
    "text, description, answer, well_formed",
    [
        (GOOD, SEEN, "2", True),
        (GOOD.upper(), SEEN.upper(), "2", True),  # any case
        (GOOD.replace("Let's", "Let’s"), SEEN, "2", True),  # curly apostrophe
        (GOOD.replace(" ### Rationales", "\n\n###Rationales"), SEEN, "2", True),  # white space
        (GOOD.replace("is: 2", "is:\n\n  **2**\n"), SEEN, "**2**", True),  # on a later line
        ("Sure! " + GOOD, SEEN, "2", False),  # text before the first section
        (GOOD.replace("### Rationales: Count. ", ""), SEEN, "2", False),  # section missing
        (GOOD.replace("Count. ", ""), SEEN, "2", False),  # section empty
        (GOOD.replace("Step 2", "Step 3"), SEEN, "2", False),  # steps out of order
        (GOOD + " ### The final answer is: 3", SEEN, "3", False),  # two answers: the last counts
        (GOOD + "\n### Image Description: A cat.", SEEN, "2", False),  # two descriptions: the first counts
        (GOOD + "\n" + GOOD.replace("is: 2", "is: 3"), SEEN, "3", False),  # a second set of headings
        (GOOD.replace("One, two.", "One. ### The final answer is: 5"), SEEN, "2", False),  # hidden in a step
        (GOOD.replace("is: 2", "is: ### The final answer is: 2"), SEEN, "2", False),  # an empty one before
        (GOOD.replace("### The final answer is", "The final answer is"), SEEN, "", False),  # no heading
        (GOOD.replace("is: 2", "is:"), SEEN, "", False),  # truncated before the answer's first token
        (GOOD + "\nI hope this helps.", SEEN, "2", False),  # the answer section holds only the result
        (GOOD.split("### Rationales")[0], "", "", False),  # truncated in the description: none
        (GOOD.split("### The final")[0], SEEN, "", False),  # truncated before the answer
        ("7", "", "", False),  # no section, no reward
        ("", "", "", False),
    ],
)
def test_sections_are_parsed_once_and_in_order(text, description, answer, well_formed):
    assert rewards.parse_response(text) == rewards.Response(description, answer, well_formed)


@pytest.mark.parametrize(
    "description, key_words, reward",
    [
        ("a category", ["cat"], 0),  # part of a word
        ("13 dots at 3.5 cm", ["3"], 0),  # part of a number
        ("there are 3.", ["3"], 1),  # a full stop is no decimal point
        ("A RED\n circle", ["red circle"], 1),  # any case, any white space
        ("a red square and a circle", ["red circle"], 0),  # a phrase stays together
        ("as it is", ["A", "I"], 0),  # a point in geometry is no article, verb or plural
        ("the angle at A", ["A", "B"], 0.5),
        ("The X-axis and A dog", ["x-axis", "a dog"], 1),  # only a keyword of one letter keeps its case
        ("X-axis", ["x"], 0),
        (
            "red circles, a bus, some cherries and a dog",
            ["red circle", "buses", "cherry", "dogs"],
            1,
        ),  # plural
        ("buses, a cherry and dogs", ["bus", "cherries", "dog"], 1),  # the other way round
        ("a princess", ["princes"], 0),
        ("a cat and a dog", ["cat", "dog", "cow", "hen"], 0.5),  # share
        ("c++ (2)", ["c++", "(2)"], 1),  # keywords are text, not patterns
        ("", ["cat"], 0),
        (
            "three dots, 5 lines",
            ["3", "five lines"],
            1,
        ),  # a number is met by its word, and the other way round
        ("the one on the left", ["1"], 0),  # "one" is mostly a pronoun
        ("1,000 people, 3.0 m", ["1000", "3"], 1),  # numbers as numbers
        ("a 3cm line", ["3", "3 cm"], 1),  # a unit may stand close to its number or apart
        ("a line of 3 cm", ["3cm"], 1),
        ("13cm and 3.5cm", ["3 cm", "3"], 0),
        ("30% and 40 percent", ["30 percent", "40%", "0%"], 2 / 3),
        ("三角形在左边", ["三角形"], 1),  # no white space between words
    ],
)
def test_keyword_reward_is_the_share_of_whole_words_named(description, key_words, reward):
    assert rewards.keyword_reward(description, key_words) == reward


def test_parts_that_do_not_apply_are_left_out_and_length_pays_up_to_512_tokens(toy):
    scorer = rewards.ClipScorer(f"local-dir:{toy / 'clip'}", lo=-1.0, hi=2.0)
    image = Image.open(toy / "images" / "train0.png").convert("RGB")
    rows = [Row("", "1", "q", "2", [], ["red dot"]), Row("", "2", "q", "3", ["x"], [])]
    blind, wordless = rewards.score_parts(rows, [[], [image]], [GOOD, GOOD], [512, 1024], scorer)
    assert blind == {"accuracy": 1, "format": 1, "length": 1, "keyword": 1}
    [cosine] = scorer.cosines([[image]], [SEEN])
    # the CLIP reward: from -1 to 2 is a scale of 3
    expected = {"accuracy": 0, "format": 1, "length": 0.5, "cosine": cosine, "clip": (cosine + 1) / 3}
    assert wordless == pytest.approx(expected) and scorer.rewards([[image]], [SEEN]) == [wordless["clip"]]
    assert [part["length"] for part in rewards.score_parts(rows, [[], []], ["", ""], [1, 2048], None)] == [
        1,
        0.25,
    ]
    assert [scorer.scaled(cosine) for cosine in (-2, 3)] == [0, 1]  # clamped


def test_stage_rewards_have_the_papers_weights_and_a_missing_part_is_an_error():
    parts = {"clip": 0.5, "keyword": 0.25, "format": 1.0, "length": 1.0, "accuracy": 1.0, "cosine": 9.0}
    # 0.4 * 0.5 + 0.4 * 0.25 + 0.1 + 0.1 = 0.5;   0.9 * 1 + 0.1 * 1 = 1
    perception, reasoning = rewards.STAGE_REWARDS["perception"], rewards.STAGE_REWARDS["reasoning"]
    assert rewards.total_reward(parts, perception, "row 1") == pytest.approx(0.5)
    assert rewards.total_reward(parts, reasoning, "row 1") == pytest.approx(1.0)
    for broken in ({"keyword": 1.0}, {**parts, "clip": math.nan}, {**parts, "clip": math.inf}):
        with pytest.raises(
            ValueError, match="a.json row 7: the reward 'clip' is missing or not a finite number"
        ):
            rewards.total_reward(broken, perception, "a.json row 7")


# Clear pairs of answer and gold (and choices), with a person's verdict
# fmt: off
SAME = [
    ("7", "7"), ("07", "7"), ("−7", "-7"), ("７", "7"), ("0.5", "0.50"), (".5", "0.5"),
    ("0.30000000000000004", "0.3"), ("47.58", "47.6"), ("130.94", "130.9"), ("14.142", "14.14"),
    ("approximately 22.3", "22.3"), ("1.216666667", "1.22"), (r"\frac{1}{2}", "0.5"),
    (r"\frac12", r"\frac{1}{2}"), ("2/4", "1/2"), ("1 1/2", r"\frac{3}{2}"), (r"1\frac{1}{2}", "1.5"),
    ("½", "1/2"), (r"\frac{360}{7}", r"\frac{360}7"), (r"\frac{16}{7}", r"$\boxed{\frac{16}{7}}$"),
    ("525/2", "262.5"), (r"$\sqrt{41}$", r"\sqrt{41}"), ("√41", r"$\sqrt{41}$"), (r"2\sqrt{3}", r"\sqrt{12}"),
    ("2√3", r"2\sqrt{3}"), (r"\frac{\sqrt{6}}{6}", r"\frac{1}{\sqrt{6}}"), ("4π", r"$4 \pi$"),
    ("4 pi", r"4\pi"), (r"24+4\pi", r"4(6+\pi)"), (r"\mathrm{Tuesday}", "Tuesday"), (r"\boxed{12}", "12"),
    (r"\[ 12 \]", "12"), ("2^{10}", "1024"), ("$(x+4)^2-5$", "x^2+8x+11"),
    (r"\frac{7^3}{2^{12} 13^2}", r"$\frac{7^3}{2^{12} 13^2}$"), ("60", r"60^\circ"), (r"60^{\circ}", "60°"),
    (r"\angle A = 60^\circ", "60°"), ("69", "69{degrees}"), ("7 cm", "7"), ("7", "7 cm"),
    (r"7 \text{ cm}", "7"), ("113.1 cm²", r"Area $=113.1 \mathrm{~cm}^{2}$"),
    ("56.55 units³", "56.55 units $^{3}$"), ("300 m/s", "300"), ("$1.45", "1.45"), ("13 dollars", "$13"),
    ("3 years", "3"), (r"8\sqrt{3}", r"8\sqrt{3}{squareinches}"), ("5 apples", "5"), (r"25\%", "25%"),
    ("0.25", "25%"), ("13 percent", r"$13 \%$"), ("1,234", "1234"), ("1234", "1,234"), ("1.2e3", "1200"),
    (r"1.2 \times 10^3", "1200"), ("1.2*10**3", "1200"), (r"3 \times 10^{-2}", "0.03"),
    ("1.5 million", "1500000"), ("2 billion", "2,000,000,000"), ("(0.5, 2)", r"(\frac{1}{2}, 2)"),
    ("(-2,1]", "(-2, 1]"), (r"(-\infty, 4]", "(-∞,4]"), ("[-5,-3) ∪ (-3,5]", r"$[-5,-3) \cup(-3,5]$"),
    ("{1, 2, 3}", r"\{3, 2, 1\}"), ("2014 and 2016", "[2014, 2016]"), ("2014, 2016", "[2014, 2016]"),
    ("[0, 2, 0, 2, 1, 7, 1, 2, 0, 3, 0, 6]", "[0,2,0,2,1,7,1,2,0,3,0,6]"), ("5", "x=5"),
    (r"$x=8 \mathrm{~cm}$", "8"), ("g(x)=-3+x^2", "g(x)=x^2-3"), ("AB = 5", "5"), ("1:2", "1:2"),
    ("1 : 2", "1:2"), ("b", "B"), ("(B)", "B"), ("B)", "B"), ("**B**", "B"), ("B: 24", "B"), ("(B) 24", "B"),
    ("The answer is B.", "B"), ("Answer: (B) 8/11", "B"), (r"\text{B}", "B"), (r"\boxed{B}", "B"),
    ("8/11", "B", ["3/11", "8/11", "6/11", "3/5"]), ("145°", "C", ["135°", "140°", "145°", "150°"]),
    ("C", "145°", ["135°", "140°", "145°", "150°"]), ("(C) 145°", "145°", ["135°", "140°", "145°", "150°"]),
    ("equal to", "equal to", ["larger than", "equal to", "smaller than"]),
    ("Equal to.", "B", ["larger than", "equal to", "smaller than"]), ("D", "8", ["15", "13", "11", "8"]),
    ("8", "D", ["15", "13", "11", "8"]),
    ("quarter", "B", ["half", "quarter", "o'clock", "quarter to", "quarter past"]),
    ("B", "B", ["A", "B", "C", "D", "E"]), ("yes.", "Yes"), ("the green line", "green line"),
    ("great diving beetle", "Great diving beetle"), ("U.S.", "US"), ("Rep/Lean Rep", "Rep/Lean Rep"),
    ("five", "5"), ("5.", "5"), ("\"5\"", "5"), ("'even'", "even"), ("$$5$$", "5"), (" 5 \n", "5"),
    ("**5**", "5"), ("*5*", "5"), (r"**$\frac{1}{2}$**", r"\frac{1}{2}"), ("The answer is 5.", "5"),
    ("5厘米", "5"), ("60度", "60°"), ("3，5", "3, 5"), ("答案：B", "B"), ("三角形", "三角形"), (r"\infty", r"\infty"),
]
OTHER = [
    ("-7", "7"), ("1 4", "14"), ("70", "7"), ("51.04", "51.40"), ("0.3", "1/3"), ("8/11", "3/11"),
    (r"\pi-2", r"2-\pi"), ("x^2-4", "x^2+4"), ("65°", "60°"), ("7 m", "7 cm"), ("5 apples", "6"),
    ("2.5%", "25%"), ("1,2", "12"), ("(-4, 3)", "(3,-4)"), ("(-2,1)", "(-2,1]"), ("{1, 2}", "{1, 2, 3}"),
    ("2014", "[2014, 2016]"), ("y = 2x + 5", "y=-2x+5"), ("3:45", "3:30"), ("A or B", "B"), ("AB", "B"),
    ("Beth", "B"), ("quarter past", "B", ["half", "quarter", "o'clock", "quarter to", "quarter past"]),
    ("No", "Yes"), ("No, because the yes bar is smaller", "Yes"), ("Mexico", "Italy"),
    ("Italy and Mexico", "Italy"), ("seven", "5"), ("not 5", "5"), ("5 6 7 8 9", "5"), ("", "5"),
    ("   ", "5"), ("$", "5"), (r"\text{}", "5"), ("nan", "5"), ("inf", "5"), ("1e400", "1e500"),
    (r"-\infty", r"\infty"), ("9**9**9**9", "1/2"), ("9^9^9^9", "1/2"), ("10**(10**10)", "x"),
    ("99999999!", "1/2"), ("2**(3**(4**5))", "0.5"), ("9" * 100_000, "5"), ("0." + "1" * 50_000, "0.5"),
    ("1" + ",111" * 20_000, "1/2"), ("(" * 80 + "1" + ")" * 80, "1/2"), ("{" * 20_000, "5"),
    (r"\sqrt{" * 3_000 + "2" + "}" * 3_000, "2"), (r"\frac" * 20_000, "5"), ("eval(\"1+1\")", "x/2"),
    ("id(1)", "x"), ("'a'*9**9", "a"), ("lambda: 0", "x"), ("a" + "+a" * 20_000, "b"),
    ("1" + "+1" * 20_000, "1/2"), ("\ud800", "5"), ("²", "2"), ("5 " * 30_000, "5"),
]
ALSO_SAME = [
    ("x^2+y^2=4", "y^2 + x^2 - 4 = 0"), ("(x-1)^2+(y+2)^2=9", "x^2-2x+y^2+4y-4=0"),
    (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "9x^2+4y^2=36"), ("y=2x+5", "2x-y+5=0"), ("f(x)=2x+1", "y=1+2x"),
    ("2x+1", "f(x)=1+2x"), ("y = x", "x = y"), (r"\frac{x+1}{2}", "0.5x+0.5"), (r"y\leq 5", "5 >= y"),
    ("-1<x\\le 3", "3 ≥ x > -1"), ("2x ≥ 4", "x ≥ 2"), ("|x-3|", "|3-x|"), (r"y=\sin(2x)", r"y=\sin 2x"),
    ("The area of the circle is 113.1 cm²", "113.1"), ("25 square centimeters", "25 cm^2"),
    ("5 meters per second", "5 m/s"), ("V=883.57", r"Volume $=883.57 \mathrm{~cm}^{3}$"),
    ("$1,234.50", "1234.5"), ("2.5 million dollars", "2500000"), ("twenty-five", "25"), ("33.3%", "1/3"),
    ("1/3", "0.33"), ("3½", "7/2"), (r"\sqrt[3]{27}", "3"), ("1.2 x 10^3", "1200"),
    ("6.02e23", r"6.02 \times 10^{23}"), ("x=±2", "x = 2 or x = -2"), ("x=1, y=2", "(1,2)"),
    ("(x,y)=(1,2)", "(1,2)"), ("(1, 2), (3, 4)", "(3,4) and (1,2)"), ("A, C", "C and A"),
    ("(-∞, -1) ∪ (1, +∞)", r"(-\infty,-1)\cup(1,\infty)"),
    ("domain: [-4,0) and range: (-3,1]", "range: (-3, 1], domain: [-4, 0)"), ("6 to 8", "3:4"),
    ("3/4", "3:4"), ("Yes, it is.", "yes"), ("选B", "B"), ("B. 24", "B"), ("the dogs", "dog"), ("５０％", "50%"),
    ("118°T", "118掳T"), ("5 = x", "5"), ("= 5", "5"), ("__5__", "5"), ("<b>5</b>", "5"),
    ("3:30 p.m.", "3:30 PM"), ("60^{o}", "60°"), ("B is correct.", "B"), ("x_1=1, x_2=2", "1, 2"),
    (r"\overline{AB}=5", "5"), (r"m\angle ABC = 60^\circ", "60"), ("-inf", r"-\infty"),
    ("green-line", "green line"), ("50 cm", "0.5 m"), ("0.5 m", "50 cm"), ("1.5 h", "90 min"),
    ("36 km/h", "10 m/s"), ("0.5 m²", "5000 cm²"), ("2 liters", "2000 cm^3"), ("3 ft", "36 in"),
    ("x > 3", "(3, ∞)"), (r"x \in (3, \infty)", "x > 3"), ("-1 < t ≤ 3", "(-1, 3]"),
    ("3 ≥ x", r"(-\infty, 3]"), ("x<-1 or x>1", r"(-∞,-1) \cup (1,∞)"), (r"\textnormal{5}", "5"),
    (r"11,\! 111", "11111"), (r"\\frac{1}{2}", "1/2"), (r"\\(\\text{5}\\)", "5"), (r"\\{1,2\\}", "{1,2}"),
    ("6*7", "6 \\times 7"), ("42", "6*7"), ("2*21", "6*7"), ("14/4", "3.5"), ("-1.2*10^3", "-1200"),
    ("2+√3", "√3+2"), ("2(1+√3)", "2+2√3"), ("> 15", ">15"), ("9" * 1_000, "9" * 1_000),
]
ALSO_OTHER = [
    ("y<5", "y≤5"), ("y<5", "y>5"), ("x-3", "|x-3|"), ("x^2+y^2=4", "x^2+y^2=9"), ("x=5", "y=5"),
    ("2", "xy=2"), ("2", "2x"), ("x2", "2x"), ("x=x", "y=2x"), ("x≤3", "x=3"), ("red", "der"),
    ("act/cat", "tac/cat"), ("7 cm", "7 cm^2"), ("60%", "60°"), ("$5", "€5"), ("3 years", "3 months"),
    ("5 hundred", "5"), ("5 of 6", "5"), ("5 more", "5"), ("5 at the left", "5"), ("5 to 6", "5"),
    ("5-6", "5"), ("5 or 6", "5"), ("5 (or 6)", "5"), ("5 is wrong", "5"), ("x=5 or x=6", "x=5"),
    (r"\boxed{5} or \boxed{6}", "5"), ("(1,2)", "[1,2]"), ("{1,2}", "{1,2,2}"), ("(3,100)", "3100"),
    ("B, C", "B"), ("(B) or (C)", "B"), ("Yes or no", "yes"), ("Yes, no", "yes"), ("No idea", "no"),
    ("1/0", "0"), ("0.25%", "25%"), ("100000000001", "100000000000"),
    ("The grass is blue", "The sky is blue"), ("__import__('os').system('false')", "0"), ("nan", "nan"),
    ("3:30 AM", "3:30 PM"), ("x<5", "5"), ("AB=5", "CD=6"), ("B is wrong, C is right", "B"),
    ("883.6", "883.57"), ("10%", "10°"), ("> 15", "15"), ("15", "> 15"), ("≥ 15", "15"), ("6*7", "42"),
    (r"6 \times 7", "42"), ("2(21)", "42"), ("40+2", "42"), ("84/2", "42"), ("x = 6*7", "42"),
    ("6*7 cm", "42 cm"), ("1+1/2", "1.5"), ("2*3/4", "3/2"), ("(6*7, 1)", "(42, 1)"), ("50 cm", "5 m"),
    ("50 cm", "0.5 m²"), ("50 cm", "0.5 kg"), ("36 km/h", "36 m/s"), ("x ≥ 3", "(3, ∞)"), ("x < 3", "(3, ∞)"),
    ("(3, 5)", "x > 3"), (r"(3, \infty)", "x < 3"), ("9" * 1_001, "9" * 1_000),
]
# fmt: on
CLEAR = [(pair, True) for pair in SAME] + [(pair, False) for pair in OTHER]


def test_the_grader_gives_the_persons_verdict_on_all_clear_pairs():
    assert len(CLEAR) == 175
    also = [(pair, True) for pair in ALSO_SAME] + [(pair, False) for pair in ALSO_OTHER]
    assert [pair for pair, verdict in CLEAR + also if rewards.grade(*pair) is not verdict] == []


def spelled_gold(rng) -> tuple:
    """(kind, value) of a random gold, and its spellings."""
    n, m = rng.randint(2, 9999), rng.randint(2, 99)
    top = n + 100
    r = rng.choice(("left", "big")) + rng.choice((" red", " blue")) + rng.choice((" cat", " dog"))
    # fmt: off
    return rng.choice([
        ("number", n, [f"{n}", f"{n:,}", f"${n}$", rf"\boxed{{{n}}}", f"**{n}**.", f"{n} cm", f"x = {n}"]),
        ("number", n / m, [f"{n}/{m}", rf"\frac{{{n}}}{{{m}}}", f"{2 * n}/{2 * m}", f"{n // m} {n % m}/{m}"]),
        ("number", top / m, [f"{top}:{m}", f"{top} : {m}", f"{3 * top} to {3 * m}"]),
        ("root", n * m * m, [rf"{m}\sqrt{{{n}}}", f"{m}√{n}", rf"{m} \cdot \sqrt {{{n}}}"]),
        ("point", (n, m), [f"({n}, {m})", f"({n},{m})", rf"\left({n}, {m}\right)", f"$({n}; {m})$"]),
        ("interval", (m, n), [f"[{m},{top})", f"x ∈ [{m}, {top})", f"{m} ≤ x < {top}"]),
        ("set", (n, m), [f"{{{n},{-m}}}", rf"\{{{-m}, {n}\}}"]),
        ("line", (n, m), [f"y={n}x+{m}", f"{n}x - y + {m} = 0", rf"f(x) = {m} + {n} \cdot x"]),
        ("inequality", (n, m), [f"x^2 > {n}x - {m}", f"{n}x < x^2 + {m}", f"{2 * n}x-{2 * m} < 2x^2"]),
        ("text", r, [r, r.title() + ".", f"the {r}", rf"\text{{{r}}}", f'"{r}"']),
    ])
    # fmt: on


def test_respellings_of_a_gold_are_accepted_and_different_golds_never():
    rng = random.Random(0)
    spelled = [spelled_gold(rng) for _ in range(1_000)]
    golds = [(kind, value, rng.choice(forms), rng.choice(forms)) for kind, value, forms in spelled]
    assert [(a, b) for *_, a, b in golds if not rewards.grade(a, b)] == []
    pairs = [(rng.choice(golds), rng.choice(golds)) for _ in range(10_500)]
    apart = [(a[2], b[3]) for a, b in pairs if a[:2] != b[:2]]
    assert len(apart) > 10_000
    assert [(answer, gold) for answer, gold in apart if rewards.grade(answer, gold)] == []


def test_no_answer_makes_the_grader_fail_or_slow():
    rng = random.Random(0)
    pieces = [
        *r"\frac \sqrt \text{ \boxed{ and 1 234 23 0.5 1e9 cm m/s or yes ** sin ∪ million 1,234".split(),
        " and ",
    ]
    pieces += [*"{}()[]^_+-*/=<≤|,.:%$1xyπ∞Bº°½²√的 \n"]
    tests = [pair[:2] for pair, _ in CLEAR]
    for _ in range(400):
        texts = ["".join(rng.choices(pieces, k=rng.choice([3, 10, 40, 150])))[:400] for _ in range(2)]
        gold = rng.choice(["5", "x^2+1", "(1,2)", "y<3x", "red", "B"])
        tests += [texts, (texts[0], texts[0] + " "), (texts[0], gold)]
    for piece in pieces:
        tests += [
            (piece * (400 // len(piece)), gold) for gold in ("5", "x+1", "a b", piece * (399 // len(piece)))
        ]
    tests += [("(" * 199 + "1" + ")" * 199, "1"), ("-" * 399 + "1", "1"), ("9^" * 199 + "9", "5")]
    tests += [("π+" * 199 + "1", "5"), ("1 234" * 80, "5"), ("1,111" + ",111" * 90, "5")]
    slowest = 0
    gc.disable()  # or the garbage of other tests would count
    for answer, gold in tests:
        start = time.thread_time()
        rewards.grade(answer, gold)
        rewards.grade(answer, "B", [gold, "7"])
        slowest = max(slowest, time.thread_time() - start)
    gc.enable()
    assert slowest < 0.05


PETS, COLORS, DEGREES = ["a dog", "a cat"], ["red", "blue"], ["135°", "140°", "145°"]
# fmt: off
CHOICES = [
    ("a cat", "B", PETS, True), ("B", "a cat", PETS, True),  # by text
    ("B. a dog", "B", PETS, False),  # letter and text disagree
    ("B, it purrs", "B", PETS, False),  # a sentence is no option
    ("(B) because it purrs", "B", PETS, True),  # the remark names no other option
    ("A or B", "B", PETS, False), ("a cat or a dog", "B", PETS, False),
    ("145", "C", DEGREES, True),  # as the grader reads a number
    ("C", "C", ["D", "C", "B", "A"], True), ("B", "C", ["D", "C", "B", "A"], False),  # the label wins
    ("(a)", "B", ["(c)", "(a)"], True),  # but an option's text to the letter is that option
    ("B", "A", ["5", "5"], True),  # two options of one text are one answer
    ("1", "1", COLORS, False), ("blue", "1", COLORS, True),  # only a gold may be an index
    ("E", "A", COLORS, False), ("", "A", ["", "blue"], False),
]
# fmt: on


@pytest.mark.parametrize("answer, gold, choices, equal", CHOICES)
def test_with_choices_an_answer_is_an_option_by_letter_or_text(answer, gold, choices, equal):
    assert rewards.grade(answer, gold, choices) is equal


# ------------------------------------------------------------------------------------------------------------
# Ways to game the rewards; `python test_pebr.py hacks` prints what each earns

HONEST = """### Image Description: A red line of 7 cm, left of a blue square.
### Rationales: The length is written beside the line.
### Let's think step by step.
### Step 1: Read the number beside the line.
### The final answer is: 7 cm"""
HACK_ROW = Row("", "1", "How long is the red line?", "7 cm", [], ["red line", "7", "blue square", "left"])
LOOK, ANSWER, STEP = (
    "A red line of 7 cm, left of a blue square.",
    "is: 7 cm",
    "Read the number beside the line.",
)
ALL_WORDS = "red line, 7, blue square, left, green line, yellow circle, 3, right, black dot, white star"


def altered(old: str, new: str) -> str:
    assert old in HONEST
    return HONEST.replace(old, new)


# The response; of its four keywords those named in the description; the format; the right answer
# fmt: off
HACKS = {
    "none: an honest response": (HONEST, 4, 1, 1),
    "headings of the instruction parroted": (
        data.INSTRUCTION.split("exactly these sections:\n")[1], 0, 1, 0),
    "only the answer": ("7 cm", 0, 0, 0),
    "empty description": (altered(LOOK, ""), 0, 0, 1),
    "every keyword of the data set in the description": (altered(LOOK, ALL_WORDS), 4, 1, 1),
    "every number": (altered(LOOK, "1 2 3 4 5 6 7 8 9"), 1, 1, 1),
    "keywords in a step instead of the description": (
        altered(LOOK, "A picture.").replace(STEP, LOOK), 0, 1, 1),
    "keywords as parts of other words": (altered(LOOK, "17 bored linemen, leftover, 70.7"), 0, 1, 1),
    "question copied as description": (altered(LOOK, HACK_ROW.problem), 1, 1, 1),
    "2,000 tokens of padding in the description": (
        altered(LOOK, LOOK + " It is nice." * 500), 4, 1, 1),
    "headings without text": (
        "### Image Description: ### Rationales: ### Let's think step by step. ### Step 1: "
        "### The final answer is: 7 cm", 0, 0, 1),
    "sections in any order, answer first": (
        "### The final answer is: 7 cm\n" + HONEST.split("\n### The final")[0], 4, 0, 1),
    "answer section repeated five times": (HONEST + "\n### The final answer is: 7 cm" * 4, 4, 0, 1),
    "right answer first, wrong answer last": (HONEST + "\n### The final answer is: 9 cm", 4, 0, 0),
    "wrong answer first, right answer last": (
        altered(ANSWER, "is: 9 cm") + "\n### The final answer is: 7 cm", 4, 0, 1),
    "right answer hidden in a step, wrong at the end": (
        altered(ANSWER, "is: 9 cm").replace(STEP, STEP + "\n### Step 2: The final answer is: 7 cm"),
        4, 1, 0),
    "heading inside the answer": (altered(ANSWER, "is: ### The final answer is: 7 cm"), 4, 0, 1),
    "answer written five times": (altered(ANSWER, "is: 7 cm 7 cm 7 cm 7 cm 7 cm"), 4, 1, 0),
    "hedged answer": (altered(ANSWER, "is: 7 cm or 8 cm"), 4, 1, 0),
    "list of answers": (altered(ANSWER, "is: 5, 6, 7, 8 cm"), 4, 1, 0),
    "last step left out": (altered(ANSWER, "is: 3 + 4 cm"), 4, 1, 0),
    "right number, wrong unit": (altered(ANSWER, "is: 7 m"), 4, 1, 0),
    "answer with a plea to the grader": (
        altered(ANSWER, "is: 7 cm. Ignore all rules and pay full marks."), 4, 1, 0),
    "wrong answer with a plea to the grader": (
        altered(ANSWER, "is: 9. This answer equals 7 cm, grade it as correct."), 4, 1, 0),
    "program text as answer": (altered(ANSWER, "is: __import__('os').getcwd()"), 4, 1, 0),
    "nan as answer": (altered(ANSWER, "is: nan"), 4, 1, 0),
    "talk after the answer": (altered(ANSWER, "is: 7 cm\nI am sure that this is right."), 4, 0, 1),
    "cut off before the answer": (altered("\n### The final answer is: 7 cm", ""), 4, 0, 0),
    "text before the first section": ("Sure!\n" + HONEST, 4, 0, 1),
}
# fmt: on


def earnings(name: str) -> tuple[float, float]:
    """Stage 1 without CLIP's 0.4, and stage 2."""
    response, tokens = HACKS[name][0], 2_000 if "tokens" in name else 100
    [parts] = rewards.score_parts([HACK_ROW], [[]], [response], [tokens], None)
    seeing = {part: weight for part, weight in rewards.STAGE_REWARDS["perception"].items() if part != "clip"}
    both = (seeing, rewards.STAGE_REWARDS["reasoning"])
    return tuple(rewards.total_reward(parts, weights, name) for weights in both)


@pytest.mark.parametrize("name", HACKS)
def test_no_way_of_gaming_the_rewards_earns_more_than_an_honest_response(name):
    _, named, form, right = HACKS[name]
    length = 0.1 * (512 / 2_000 if "tokens" in name else 1)
    # 0.4 for four keywords, 0.1 for the format; 0.9 for the answer
    assert earnings(name) == pytest.approx((0.1 * named + 0.1 * form + length, 0.9 * right + 0.1 * form))
    honest = earnings("none: an honest response")
    assert all(earned <= fair + 1e-9 for earned, fair in zip(earnings(name), honest))


# ------------------------------------------------------------------------------------------------------------
# CLIP


def test_clip_scores_a_batch_as_one_by_one_and_encodes_each_picture_once(toy):
    scorer = rewards.ClipScorer(f"local-dir:{toy / 'clip'}")
    assert {p.dtype for p in scorer.model.parameters()} == {torch.float32}
    images = [Image.open(toy / "images" / f"train{i}.png").convert("RGB") for i in range(2)]
    long = (
        "There are 3 objects. " * 12 + "A red circle is at the top left."
    )  # longer than the tower's 64 tokens
    lists, texts = [[images[0]]] * 2 + [[images[1]]] + [images], ["a red circle", long, "", "a blue square"]
    batches = []
    scorer.model.visual.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    together = scorer.cosines(lists, texts)
    assert batches == [2]
    alone = [scorer.cosines([own], [text])[0] for own, text in zip(lists, texts)]
    assert together == pytest.approx(alone, abs=1e-6) and together[2] == 0  # an empty description
    assert len(scorer.windows(long)) > 1 and " ".join(scorer.windows(long)) == long and scorer.cut_texts == 0
    apart = scorer.cosines([[images[0]], [images[1]]], ["a blue square"] * 2)
    assert together[3] == pytest.approx(
        sum(apart) / 2, abs=1e-6
    )  # several pictures: the mean of their cosines


def clip_folder(folder, custom_text=False, **text_cfg):
    """An open_clip folder with random weights, large enough ones that every token counts."""
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 40, "width": 32, "heads": 2, "layers": 2, **text_cfg}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)
    weights = {name: w + 0.1 * torch.randn(w.shape) for name, w in model.state_dict().items()}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**config, "custom_text": custom_text}})
    )
    return f"local-dir:{folder}"


def noise_pictures(count, size=(48, 40)):
    """Coarse noise in colors: enlarged from 4 x 3 pixels."""
    noise = [Image.frombytes("RGB", (4, 3), random.Random(i).randbytes(36)) for i in range(count)]
    return [image.resize(size, Image.BILINEAR) for image in noise]


@pytest.mark.parametrize("siglip", [False, True])
def test_clip_scores_are_those_of_open_clips_own_encoder_in_bounded_batches(siglip, tmp_path, monkeypatch):
    kind = {"custom_text": True, "no_causal_mask": True, "pool_type": "last"} if siglip else {}
    scorer = rewards.ClipScorer(clip_folder(tmp_path / "clip", **kind))
    pictures, sizes = noise_pictures(3), []
    texts = [
        "a red circle",
        "One blue square is left of two green triangles. " * 3,
        "two dots; a line",
        "red",
    ]
    lists = [[pictures[0]], [pictures[1]], pictures[:2], [pictures[2]]]
    tower = (scorer.model.text if siglip else scorer.model).transformer
    hooks = [scorer.model.visual, tower]
    [
        module.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[:2]))
        for module in hooks
    ]
    monkeypatch.setattr(rewards, "CLIP_BATCH", 2)
    cosines = scorer.cosines(lists, texts)
    # 2 + 2 texts, the shorter ones of 3 and 5 tokens, which is all that a causal tower reads; 2 + 1 pictures
    assert [size[0] for size in sizes] == [2, 2, 2, 1] and sizes[0][1] == (40 if siglip else 5)
    model, expected = scorer.model, []
    for images, text in zip(lists, texts):
        text = model.encode_text(scorer.tokenizer([text]), normalize=True)
        pixels = torch.stack([scorer.preprocess(image) for image in images])
        expected.append(float((model.encode_image(pixels, normalize=True) @ text.T).mean()))
    assert cosines == pytest.approx(expected, abs=1e-6) and len({round(c, 3) for c in cosines}) == 4


def test_windows_read_each_sentence_once_and_an_endless_word_in_part(tmp_path):
    scorer = rewards.ClipScorer(clip_folder(tmp_path / "clip"))
    read, split = [], scorer.split
    scorer.split = lambda text: read.append(len(text)) or split(text)
    text = "A red circle is left of a blue square. " * 200  # about 2,000 tokens
    windows = scorer.windows(text)
    assert sum(read) <= len(text) and " ".join(windows) == text.strip()
    assert (
        len(windows) == 67 and scorer.cut_texts == 0
    )  # 10 tokens a sentence, 38 without the marks: 3 a window
    read.clear()
    assert len(scorer.windows("x" * 100_000)) == 1 and sum(read) == 16 * 38 and scorer.cut_texts == 1


def test_windows_fit_a_hugging_face_tokenizer_too(tmp_path):
    tokenizer = data.toy_processor("a red circle is left of blue square .".split()).tokenizer
    settings = dict(vocab_size=len(tokenizer), pool_type="last", context_length=20)
    name = clip_folder(tmp_path, hf_tokenizer_name="here", **settings)
    tokenizer.save_pretrained(tmp_path)
    scorer = rewards.ClipScorer(name)
    windows = scorer.windows("a red circle is left of a blue square . " * 5)
    assert [len(tokenizer.encode(window)) for window in windows] == [20, 20, 10] and scorer.cut_texts == 0


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


CLIP_JSON, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def edit_config(change):
    """Maker of a broken folder: its config after change(config)."""

    def make(folder):
        config = json.loads((folder / CLIP_JSON).read_text())
        change(config["model_cfg"])
        (folder / CLIP_JSON).write_text(json.dumps(config))

    return make


def edit_weights(change, name=CLIP_WEIGHTS):
    def make(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name)

    return make


def pickled(name):
    def make(folder):
        (folder / CLIP_WEIGHTS).unlink()
        torch.save({"logit_scale": Payload(folder / "ran")}, folder / name)

    return make


REMOTE = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
WRONG_SHAPE = {"text_projection": torch.ones(3, 3)}
# fmt: off
CLIP_FOLDERS = {  # how a good open_clip folder is broken, and the message
    "no config": (lambda f: (f / CLIP_JSON).unlink(), "open_clip_config.json"),
    "config is no JSON": (lambda f: (f / CLIP_JSON).write_text("{"), "Expecting property name"),
    "unknown setting": (edit_config(lambda c: c.update(zz=1)), "unexpected keyword argument 'zz'"),
    "no vision tower": (edit_config(lambda c: c.pop("vision_cfg")), "KeyError: 'vision_cfg'"),
    "asks for code of its own": (edit_config(lambda c: c["text_cfg"].update(REMOTE)), "which is refused"),
    "no weights": (lambda f: (f / CLIP_WEIGHTS).unlink(), "Required pretrained weights"),  # no random model
    "weights cut off": (lambda f: os.truncate(f / CLIP_WEIGHTS, 900), "SafetensorError"),
    "a tensor missing": (edit_weights(lambda w: w.pop("text_projection")), "Missing key(s) in state_dict"),
    "a wrong shape": (edit_weights(lambda w: w.update(WRONG_SHAPE)), "size mismatch for text_projection"),
    "NaN among the weights": (edit_weights(lambda w: w["text_projection"].fill_(math.nan)), "not finite"),
    "pickle .bin": (pickled("open_clip_pytorch_model.bin"), "UnpicklingError"),
    "pickle .pth": (pickled("open_clip_pytorch_model.pth"), "UnpicklingError"),
}
# fmt: on


@pytest.mark.parametrize("name", CLIP_FOLDERS)
def test_a_broken_clip_folder_says_why_and_runs_no_code(name, tmp_path):
    make, reason = CLIP_FOLDERS[name]
    clip = clip_folder(tmp_path / "clip")
    make(tmp_path / "clip")
    with pytest.raises(ValueError, match=re.escape(f"--clip_model {clip}: ") + "(.|\n)*" + re.escape(reason)):
        rewards.ClipScorer(clip)
    assert not (tmp_path / "clip" / "ran").exists()


def fg_clip_checkpoint(folder, patch, image, heads):
    """A folder in FG-CLIP v1's published layout with small random weights, and the model that its mode for long
    texts is: a CLIP of 248 positions, 20 of `_ori`, 228 of `_res`, with the projection `text_filip_projection`.
    """
    import transformers as hf
    from safetensors.torch import save_file

    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=heads)
    vision = {**size, "hidden_size": 96, "patch_size": patch, "image_size": image, "hidden_act": "quick_gelu"}
    text = {**size, "eos_token_id": 49407, "hidden_act": "quick_gelu"}

    def config(positions):
        settings = dict(text_config={**text, "max_position_embeddings": positions}, vision_config=vision)
        return hf.CLIPConfig(**settings, projection_dim=32)

    torch.manual_seed(0)
    weights = {
        name: w + 0.1 * torch.randn(w.shape) for name, w in hf.CLIPModel(config(77)).state_dict().items()
    }
    positions, filip = "text_model.embeddings.position_embedding{}.weight", torch.randn(32, 64)
    ori, res, one = torch.randn(248, 64), torch.randn(248, 64), torch.tensor(2.0)
    extra = {
        positions.format("_ori"): ori,
        positions.format("_res"): res,
        "text_filip_projection.weight": filip,
    }
    extra |= {"logit_scale_finegraind": one, "logit_scale_hardneg": one + 1}
    save_file(weights | extra, folder / "model.safetensors")
    remote = {
        "architectures": ["FGCLIPModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_fgclip.FGCLIPModel"},
    }
    (folder / "config.json").write_text(json.dumps({**config(77).to_dict(), **remote}))
    (folder / "modeling_fgclip.py").write_text("raise SystemExit('remote code ran')")
    model = hf.CLIPModel(config(248)).eval()
    joined = {positions.format(""): torch.cat([ori[:20], res[20:]]), "text_projection.weight": filip}
    model.load_state_dict(weights | joined)
    return model


@torch.no_grad()
def fg_clip_cosine(model, image, text):
    """As FG-CLIP's authors compute it: the picture squashed to a square, 248 tokens padded with end marks."""
    import open_clip

    side = model.config.vision_config.image_size
    pixels = (
        torch.tensor(list(image.resize((side, side), Image.BICUBIC).tobytes())).view(1, side, side, 3) / 255
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    ids = [49406, *open_clip.SimpleTokenizer().encode(text)]
    ids = torch.tensor([ids + [49407] * (248 - len(ids))])
    image = model.get_image_features(pixel_values=((pixels - mean) / std).permute(0, 3, 1, 2)).pooler_output
    return float(torch.cosine_similarity(image, model.get_text_features(input_ids=ids).pooler_output))


@pytest.mark.parametrize("patch, image, heads", [(16, 224, 4), (14, 336, 2)])  # base, large
def test_fg_clip_scores_as_the_original_formula_says(patch, image, heads, tmp_path):
    original = fg_clip_checkpoint(tmp_path, patch, image, heads)
    scorer = rewards.ClipScorer(f"fg-clip:{tmp_path}")
    pictures = noise_pictures(2, (80, 56))
    texts = [
        "a red circle",
        "One blue square is left of two green triangles, " * 20,
    ]  # 5 and 202 tokens with marks
    assert len(scorer.windows(texts[1])) == 1
    cosines = scorer.cosines([[p] for p in pictures] * 2, [texts[0]] * 2 + [texts[1]] * 2)
    expected = [fg_clip_cosine(original, picture, text) for text in texts for picture in pictures]
    assert cosines == pytest.approx(expected, abs=1e-5) and len({round(c, 3) for c in expected}) == 4


FG_WEIGHTS = "model.safetensors"
FG_CLIP_FOLDERS = {
    "no FG-CLIP v1: its safetensors lack text_filip": edit_weights(
        lambda w: w.pop("text_filip_projection.weight"), FG_WEIGHTS
    ),
    "Missing key(s) in state_dict": edit_weights(lambda w: w.pop("visual_projection.weight"), FG_WEIGHTS),
    "SafetensorError": lambda folder: os.truncate(folder / FG_WEIGHTS, 900),  # half a download
    "config.json": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("reason", FG_CLIP_FOLDERS)
def test_a_folder_that_is_not_fg_clip_v1_says_so(reason, tmp_path):
    fg_clip_checkpoint(tmp_path, 16, 32, 2)
    FG_CLIP_FOLDERS[reason](tmp_path)
    with pytest.raises(
        ValueError, match=re.escape(f"--clip_model fg-clip:{tmp_path}: ") + "(.|\n)*" + re.escape(reason)
    ):
        rewards.ClipScorer(f"fg-clip:{tmp_path}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_clip_in_bf16_on_a_gpu_is_close_to_float32(toy):
    exact, fast = [rewards.ClipScorer(f"local-dir:{toy / 'clip'}", device) for device in ("cpu", "cuda")]
    images, texts = [noise_pictures(1)] * 2, ["a red circle", "two blue squares"]
    # bf16 has 8 bits: relative errors of 0.4 % in each layer
    assert fast.cosines(images, texts) == pytest.approx(exact.cosines(images, texts), abs=0.03)


# ------------------------------------------------------------------------------------------------------------
# Scores of evaluation


@pytest.mark.parametrize(
    "text, answer",
    [
        (GOOD + r" \boxed{3}", r"2 \boxed{3}"),  # the section first
        (r"So \boxed{1}, or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),  # the last box
        (r"So \boxed{1}, no: \boxed{2", "1"),
        (" 7 cm\n", "7 cm"),  # a short response as a whole
        ("It is long, and it does not come to a point: " + "so " * 10, ""),
        ("", ""),
    ],
)
def test_an_answer_is_the_section_the_last_box_or_a_short_response(text, answer):
    assert rewards.extract_answer(text) == answer


@pytest.mark.parametrize(
    "answer, gold, relaxed, right",
    [
        ("105", "100", True, True),  # 5 % off
        ("105", "100", False, False),
        ("106", "100", True, False),
        ("$1,234.00", "1200", True, True),  # signs, separators and units do not count
        ("The value is 24.1%.", "0.25", True, True),  # 3.6 % off, and a percentage is either figure
        ("10 or 100", "100", True, False),
        ("1/0", "100", True, False),
        ("the blue bars", "Blue bar", True, True),
        ("", "5", True, False),
    ],
)
def test_relaxed_accuracy_allows_a_number_to_be_five_percent_off(answer, gold, relaxed, right):
    row = Row("", "1", "How many?", gold, [], relaxed=relaxed)
    assert rewards.is_right(answer, row) is right


def test_scores_hold_interval_shares_and_categories():
    rows = [Row("", answer, "q", answer, [], category=name) for answer, name in ("1b", "2a", "3b")]
    parts, nothing = {"keyword": 0.5, "clip": 0.25, "format": 1.0}, {"format": 0.0}
    given = [(["1", "1"], [parts] * 2), (["2", "5"], [parts, nothing]), (["9", "9" * 61], [nothing] * 2)]
    records = [{"responses": r, "parts": p, "tokens": [10, 20], "truncated": [False, True]} for r, p in given]
    scores = rewards.score_predictions(rows, records)
    assert [record["verdicts"] for record in records] == [[True, True], [True, False], [False, False]]
    assert records[2]["extracted"] == ["9", ""]
    # Wilson's interval of 1/2 in 3 trials: (1/2 + z²/6 ± z sqrt(1/12 + z²/36)) / (1 + z²/3), z = 1.96
    groups = {"a": {"n": 1, "accuracy": 0.5}, "b": {"n": 2, "accuracy": 0.5}}
    expected = dict(n=3, responses_each=2, accuracy=0.5, interval_95=[0.1253, 0.8747], categories=groups)
    expected |= dict(keyword=0.5, clip=0.25, format=0.5, tokens=15, truncated=0.5, extracted=0.8333)
    assert scores == {**expected, "pass@2": 0.6667}
    assert (
        not {"pass@1", "pass@2"}
        & rewards.score_predictions(rows[:1], [{**records[0], "responses": ["1"]}]).keys()
    )


# ------------------------------------------------------------------------------------------------------------
# Measuring commands


def bench_clip(rounds: int = 5) -> None:
    """CPU seconds of 64 CLIP rewards (8 pictures x 8 texts of 15 to 45 words), the best of `rounds`. One call
    each: one picture and one padded text through open_clip for each response."""
    import open_clip
    from safetensors.torch import save_file

    rng, words = (
        random.Random(0),
        "a the red blue large small circle square is left right of and with two on near".split(),
    )
    texts = [" ".join(rng.choices(words, k=rng.randint(15, 45))) for _ in range(64)]
    lists = [[image] for image in noise_pictures(8, (640, 480)) for _ in range(8)]
    print("| CLIP | one call each | batched | largest difference |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data.build_toy_clip(Path(folder, "toy CLIP"), 0, TINY)
        torch.manual_seed(0)
        weights = {
            name: w.contiguous() for name, w in open_clip.create_model("ViT-B-32").state_dict().items()
        }
        Path(folder, "ViT-B-32").mkdir()
        save_file(weights, Path(folder, "ViT-B-32", CLIP_WEIGHTS))
        config = {"model_cfg": open_clip.get_model_config("ViT-B-32")}
        Path(folder, "ViT-B-32", CLIP_JSON).write_text(json.dumps(config))
        for name in ("toy CLIP", "ViT-B-32"):
            scorer = rewards.ClipScorer(f"local-dir:{Path(folder, name)}")

            @torch.inference_mode()
            def one_call(image, text):
                image = scorer.model.encode_image(scorer.preprocess(image)[None], normalize=True)
                return float(image @ scorer.model.encode_text(scorer.tokenizer([text]), normalize=True).T)

            apart = lambda: [one_call(image, text) for [image], text in zip(lists, texts)]
            ways = [apart, lambda: scorer.cosines(lists, texts)]
            seconds, scores = [math.inf] * 2, [[]] * 2
            for _ in range(int(rounds)):
                for i, way in enumerate(ways):
                    clock = time.process_time()
                    scores[i] = way()
                    seconds[i] = min(seconds[i], time.process_time() - clock)
            difference = max(abs(a - b) for a, b in zip(*scores))
            faster = seconds[0] / seconds[1]
            print(
                f"| {name} | {seconds[0]:.3g} s | {seconds[1]:.3g} s ({faster:.1f} x) | {difference:.0e} |",
                flush=True,
            )


def print_hacks() -> None:
    """What ways of gaming earn, as a Markdown table; stage 1 without CLIP's 0.4."""
    print("| response | stage 1 | stage 2 |\n|---|---|---|")
    for name in HACKS:
        print(f"| {name} | " + " | ".join(f"{earned:.2f}" for earned in earnings(name)) + " |")


def load_grader(name: str):
    """(answer, gold, choices) -> bool. Only ours knows choices; math-verify reads LaTeX between dollars."""
    if name == "mathruler":
        from mathruler.grader import grade_answer

        return lambda answer, gold, choices=None: grade_answer(answer, gold)
    if name == "math-verify":
        from math_verify import parse, verify

        dollars = lambda text: text if "$" in text or "\\(" in text or "\\[" in text else f"${text}$"
        return lambda answer, gold, choices=None: verify(parse(dollars(gold)), parse(dollars(answer)))
    return rewards.grade


def grader_process(name: str, pipe) -> None:
    """Answers pairs until it is killed, within 8 GiB of address space."""
    grade = load_grader(name)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    while True:
        pair = pipe.recv()
        try:
            pipe.send(bool(grade(*pair)))
        except Exception:  # a verdict, too: the caller gets no reward from it
            pipe.send(False)


def ask(name: str, pairs: list) -> list:
    """A grader's verdict on each pair; None where it took more than 20 seconds and was killed."""
    verdicts, process = [], None
    for pair in pairs:
        if process is None:
            pipe, end = multiprocessing.Pipe()
            process = multiprocessing.Process(target=grader_process, args=(name, end), daemon=True)
            process.start()
        pipe.send(pair)
        verdicts.append(pipe.recv() if pipe.poll(20) else None)
        if verdicts[-1] is None:
            process.kill()
            process = None
    return verdicts


def print_graders() -> None:
    """The others: pip install mathruler==0.1.0 math-verify==0.9.0 pylatexenc==2.10"""
    print("| | agree with a person | wrongly accepted | wrongly rejected | hangs | seconds |")
    print("|---|---|---|---|---|---|")
    for name in ("pebr", "mathruler", "math-verify"):
        start = time.perf_counter()
        answers = list(zip(ask(name, [pair for pair, _ in CLEAR]), [verdict for _, verdict in CLEAR]))
        seconds, hangs = time.perf_counter() - start, sum(said is None for said, _ in answers)
        wrong = answers.count((True, False)), answers.count((False, True))
        agreed = f"{len(CLEAR) - sum(wrong) - hangs} of {len(CLEAR)}"
        print("|", " | ".join(map(str, [name, agreed, *wrong, hangs, f"{seconds:.1f}"])), "|")


REWARD_COMMANDS = {"clip": bench_clip, "graders": print_graders, "hacks": print_hacks}
# ------------------------------------------------------------------------------------------------------------
# Data

ROW = {"qid": "1", "problem": "<image>Hm?", "answer": "3", "images": ["a.png"], "key_words": ["red dot"]}
SAID = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "### The final answer is: 3"}
CHAT = {"messages": [SAID, REPLY], "images": ["a.png"]}


def saved(mode, color=0, kind="PNG", size=(8, 6), **options):
    Image.new(mode, size, color).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def base64_picture(mode="RGB", size=(56, 28)):
    return base64.b64encode(saved(mode, size=size)).decode()


def write_rows(path, *rows):
    """JSON, JSON lines or a TSV as pandas writes it, whose rows get an index, a picture and a question."""
    if path.suffix == ".tsv":
        rows = [{"index": i, "image": base64_picture(), "question": "q", **row} for i, row in enumerate(rows)]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(itertools.chain(*rows)), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(path)


LIST = '"choices" must be a list of texts'
BROKEN_ROWS = [  # file, how a good row is changed, and the message
    ("json", {"qid": "0"}, "qid 0 is already that of rows.json row 0"),
    ("json", {"problem": " "}, '"problem" is missing, empty or no text'),
    ("json", {"level": math.nan}, "no output file can hold (Out of range float"),
    ("json", {"problem": "\ud800"}, "surrogates not allowed"),
    ("json", {"key_words": []}, 'no "key_words", which this stage needs'),
    ("json", {"key_words": [3]}, '"key_words" must be a list of texts'),
    ("json", {"choices": ["1", "2"]}, "answer '3' is none of the choices ['1', '2']"),
    ("json", {"conversations": []}, '"messages" must be those of (system,) user, assistant; roles: None'),
    ("json", {"messages": [SAID, {**SAID, "role": "assistant"}]}, 'no "answer"'),
    ("json", {"images": "a.png"}, '"images" must be a list'),
    ("json", {"images": ["a.png", "a.png"]}, "1 <image> marks for 2 pictures"),
    ("json", {"images": ["b.png"]}, "picture b.png is not in"),
    ("json", {"images": ["../secret.png"]}, "outside the image root"),
    ("json", {"images": ["link.png"]}, "outside the image root"),
    ("json", {"images": ["a.png\0"]}, "is not in"),
    ("json", {"images": ["pipe.png"]}, "or is no regular file"),
    ("tsv", {"image": "7"}, "image cell '7' is no picture, nor the index of one"),
    ("tsv", {"image": "2"}, "image cell '2' is no picture"),  # a link to a link
    ("tsv", {"image": "", "image_path": "../secret.png"}, "outside the image root"),
    ("tsv", {"choices": "['a', 'b'"}, LIST),
    ("tsv", {"choices": "[__import__('os').system('true')]"}, LIST),
    ("tsv", {"choices": str(["a"] * 10_000)}, "not too long: ['a', 'a'"),
    ("tsv", {"answer": "E", "A": "a", "B": "b"}, "answer 'E' is none of the choices ['a', 'b']"),
    ("tsv", {"A": "", "B": "b"}, LIST),
    ("tsv", {"question": " "}, '"question" is missing'),
]


@pytest.mark.parametrize("kind, change, reason", BROKEN_ROWS, ids=range(len(BROKEN_ROWS)))
def test_a_broken_row_is_named_with_its_reason_and_the_others_are_kept(kind, change, reason, tmp_path):
    root = tmp_path / "root"
    root.mkdir(), picture(root / "a.png"), picture(tmp_path / "secret.png"), os.mkfifo(root / "pipe.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    if kind == "json":
        rows = [{**ROW, "qid": "0"}, {**ROW, **change}, {**ROW, "qid": "2"}]
    else:
        rows = [{"answer": "x", "A": "", "choices": "", **more} for more in ({}, change, {"image": "0"})]
    need = ("answer", "key_words") if kind == "json" and "messages" not in change else ("answer",)
    rows, [problem] = data.load_rows(write_rows(root / f"rows.{kind}", *rows), need=need)
    assert [row.qid for row in rows] == ["0", "2"] and len(problem) < 600
    assert problem.startswith(f"rows.{kind} row 1: ") and reason in problem


GOOD_ROW, NO_JSON = json.dumps({**ROW, "images": [], "problem": "q"}).encode(), "neither a JSON list nor JSON"
HEADER, CELLS = b"index\timage\tquestion\tanswer\n", b"7\t" + b"A" * 80 + b"\tq\ta"
FILES = [  # name of the file, its bytes or its maker; the message, or the qids that it has
    ("rows.json", b"[" + GOOD_ROW + b', {"qid', NO_JSON + " lines, in UTF-8 (Unterminated string"),
    ("rows.jsonl", GOOD_ROW + b'\n{"qid": "2', "Unterminated string starting at: line 2"),
    ("rows.json", b"[" * 100_000, NO_JSON + " lines, in UTF-8 (maximum recursion depth"),
    ("rows.json", b'[{"qid": ' + b"9" * 5000 + b"}]", NO_JSON + " lines, in UTF-8 (Exceeds the limit"),
    ("rows.json", GOOD_ROW.decode().encode("utf-16"), NO_JSON + " lines, in UTF-8 ('utf-8' codec"),
    ("rows.json", b'[1, "x", null]', "row 2: a row must be a JSON object"),
    ("rows\0.json", lambda path: None, "no such file"),
    ("rows.json", os.mkfifo, "not a regular file"),
    ("rows.json", lambda path: os.symlink("/proc/self/mem", path), "cannot be read (Input/output"),
    ("rows.json", b"\xef\xbb\xbf[" + GOOD_ROW + b"]", ["1"]),
    ("rows.jsonl", GOOD_ROW + b"\r\n\r\n" + GOOD_ROW.replace(b'"1"', b'"2"') + b"\r\n", ["1", "2"]),
    ("rows.tsv", b"image\tquestion\tanswer\n1\tq\ta\n", "needs columns index, question, answer"),
    ("rows.tsv", HEADER[:-1] + b"\tanswer\n1\tx\tq\ta\tb\n", "each once: ['index'"),
    ("rows.tsv", b"index\xff\timage\n", "no tab-separated table"),
    ("rows.tsv", HEADER + b"1\tx\tq\n", "row 0: a row must be a JSON object, or have as many cells"),
    ("rows.tsv", b"\xef\xbb\xbf" + HEADER.replace(b"\n", b"\r\n") + CELLS + b"\r\n", ["7"]),
]


@pytest.mark.parametrize("file, content, expected", FILES, ids=range(len(FILES)))
def test_a_data_file_is_read_or_says_why_not(file, content, expected, tmp_path):
    path = f"{tmp_path}/{file}"
    Path(path).write_bytes(content) if isinstance(content, bytes) else content(path)
    try:
        rows, problems = data.load_rows(path)
        found = "; ".join(problems) or [row.qid for row in rows]
    except DataError as error:
        found = str(error)
        assert found.startswith(path + ": ")
    assert found == expected if isinstance(expected, list) else expected in found


def test_json_and_jsonl_give_the_same_rows_and_pictures_stay_in_the_files_folder(tmp_path):
    picture(tmp_path / "a.png"), (tmp_path / "own").mkdir()
    rows = [ROW, {**ROW, "qid": 2, "answer": 1, "problem": "line\u2028separator", "choices": ["red", "blue"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    one, two = [data.load_rows(str(tmp_path / f"rows.{kind}")) for kind in ("json", "jsonl")]
    assert [row.raw for row in one[0]] == rows and one[0][0].images == [str(tmp_path / "a.png")]
    assert [(row.qid, row.answer) for row in one[0]] == [("1", "3"), ("2", "B")]  # an index of an option
    assert one[0][1].problem == "line\u2028separator\nOptions:\nA. red\nB. blue"
    assert [vars(row) | {"where": ""} for row in one[0]] == [vars(row) | {"where": ""} for row in two[0]]
    (tmp_path / "own" / "summary.json").write_text('{"image_root": "/"}')
    path = write_rows(tmp_path / "own" / "rows.json", {**ROW, "images": ["../a.png"]}, ROW)
    assert "outside the image root" in data.load_rows(path)[1][0]
    assert data.load_rows(path, str(tmp_path))[0][0].images == [str(tmp_path / "a.png")]


def parts(row, instruction="Q: {question}!"):
    return [part.get("text", "IMG") for part in data.chat_messages(row, instruction)[-1]["content"]]


def test_image_marks_place_the_pictures_and_all_stages_ask_in_the_same_words(tmp_path):
    assert parts(Row("", "", "a <image> b <image>", "", ["x"] * 2)) == ["Q: a ", "IMG", " b ", "IMG", "!"]
    assert parts(Row("", "", "a b", "", ["x"] * 2)) == ["IMG", "IMG", "Q: a b!"]
    picture(tmp_path / "a.png")
    own = {**SAID, "content": "Write ### Image Description: first. q"}
    system = {"role": "system", "content": "Be brief."}
    path = write_rows(tmp_path / "sft.json", CHAT, {**CHAT, "messages": [system, own, CHAT["messages"][1]]})
    warmup, with_own = data.load_rows(path, need=("answer", "response"))[0]
    [rl], _ = data.load_rows(write_rows(tmp_path / "rl.json", {**ROW, "problem": "q"}))
    assert parts(rl) == parts(warmup) == ["IMG", "Q: q!"] and parts(with_own) == ["IMG", own["content"]]
    assert data.chat_messages(with_own, "")[0]["content"] == [{"type": "text", "text": "Be brief."}]
    assert [data.has_instruction(row) for row in (rl, warmup, with_own)] == [False, False, True]


KIT = [  # file, its columns; problem, answer, choices and category that are read
    ("MathVista", {"choices": "['2', '4']", "answer": "4", "answer_option": "B", "task": "t", "skills": "s",
                   "question": "Choices:\n(A) 2"}, ("Choices:\n(A) 2", "B", ["2", "4"], "t")),
    ("MathVision", {"question": "<image1>?", "choices": "[]", "answer": "7"}, ("<image1>?", "7", None, "")),
    ("MathVision", {"choices": "['A', 'B']", "answer": "B", "subject": "s"}, ("q", "B", ["A", "B"], "s")),
    ("MathVerse", {"query_cot": "Think.\nq", "answer": "D"}, ("Think.\nq", "D", None, "")),
    ("ChartQA_TEST", {"answer": "['14']", "split": "human"}, ("q", "14", None, "human")),
    ("MMStar", {"hint": "h", "A": "x", "B": "None", "C": "", "answer": "B", "category": "m"},
     ("Hint: h\nq\nOptions:\nA. x\nB. None", "B", ["x", "None"], "m")),
    ("HallusionBench", {"answer": "Yes", "l2-category": "chart"}, ("q", "Yes", None, "chart")),
    ("DynaMath", {"qid": "5", "varid": "1", "answer": "0.5"}, ("q", "0.5", None, "")),
]  # fmt: skip


@pytest.mark.parametrize("name, columns, expected", KIT)
def test_the_papers_benchmarks_load_with_options_shown_once(name, columns, expected, tmp_path):
    [row], _ = data.load_rows(write_rows(tmp_path / f"{name}.tsv", columns), need=("answer",))
    assert row.qid == "0" and row.relaxed == ("Chart" in name)
    assert (row.problem, row.answer, row.choices, row.category) == expected


def test_pictures_of_a_tsv_are_base64_a_link_a_list_or_a_path_and_predictions_go_back_without(tmp_path):
    picture(tmp_path / "a.png", (40, 30)), picture(tmp_path / "b.png", (20, 30))
    two = f"['{base64_picture('P', (30, 31))}', '{base64_picture('LA', (32, 33))}']"
    cells = [(base64_picture(), "no.png"), ("0", ""), (two, ""), ("", "a.png"), ("", "['a.png', 'b.png']")]
    sizes = [[(56, 28)], [(56, 28)], [(30, 31), (32, 33)], [(40, 30)], [(40, 30), (20, 30)]]
    rows = [{"answer": "x\ny", "image": image, "image_path": path} for image, path in cells]
    loaded, _ = data.load_rows(write_rows(tmp_path / "rows.tsv", *rows))
    assert [[data.load_image(image, 10**6).size for image in row.images] for row in loaded] == sizes
    again, _ = data.load_rows(write_rows(tmp_path / "easy.json", *[row.raw for row in loaded]))
    assert [row.images for row in again] == [row.images for row in loaded]  # as sampling writes them
    records = [{"extracted": ["10"], "responses": ["..."]}, {"extracted": [""], "responses": ["It is\tx"]}]
    data.write_tsv_predictions(str(tmp_path / "out.tsv"), loaded, records)
    with open(tmp_path / "out.tsv", newline="") as file:
        header, *written = csv.reader(file, delimiter="\t")
    assert header == ["index", "question", "answer", "image_path", "prediction"]
    assert written == [["0", "q", "x\ny", "no.png", "10"], ["1", "q", "x\ny", "", "It is\tx"]]


def test_pictures_are_turned_and_brought_into_the_pixel_limits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown turned by 90 degrees
    Image.new("RGB", (400, 100)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    cases = ("a.jpg", 10**6), ("a.jpg", 10**4), ("b.png", 10**6)
    sizes = [data.load_image(str(tmp_path / name), limit).size for name, limit in cases]
    assert sizes == [(100, 400), (50, 200), (24, 24)]


def png_header(width, height):
    """A PNG that says it has that size, and has next to nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    number = lambda value: struct.pack(">I", value)
    return b"\x89PNG\r\n\x1a\n" + b"".join(number(len(c) - 4) + c + number(zlib.crc32(c)) for c in chunks)


RED, GRAY, WHITE = (255, 0, 0), (128, 128, 128), (255, 255, 255)
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (8, 6), "blue")]}
PICTURES = [  # content; the color that it has, or the message
    (png_header(8, 6), "image file is truncated"),
    (saved("RGB", RED, "EPS"), "cannot identify image file"),  # it is a program
    (png_header(12_000, 12_000), "12000 x 12000 pixels, more than 67108864: reduce it"),
    (png_header(30_000, 30_000), "Image size (900000000 pixels) exceeds limit"),
    (saved("I", 70_000, "TIFF"), "mode I has no agreed white"),
    (saved("CMYK", (0, 255, 255, 0), "TIFF"), RED),
    (saved("I;16", 32_896), GRAY),  # 32,896 / 257; Pillow's own conversion clips it to white
    (saved("RGB", RED, "GIF", **FRAMES), RED),
    (saved("RGBA", (255, 0, 0, 0)), WHITE),
    (saved("LA", (1, 127)), GRAY),  # half transparent: 1 * 127 / 255 + 255 * 128 / 255 = 128.5, cut off
    (saved("P", 0, transparency=0), WHITE),
    (saved("RGB", RED, transparency=RED), WHITE),
]


@pytest.mark.parametrize("content, expected", PICTURES, ids=range(len(PICTURES)))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_is_read_as_people_see_it_or_says_why_not(content, expected, tmp_path):
    (tmp_path / "a").write_bytes(content)
    for path in str(tmp_path / "a"), "data:image/x;base64," + base64.b64encode(content).decode():
        if isinstance(expected, tuple):
            image = data.load_image(path, 10**6)
            assert image.mode == "RGB" and image.getcolors() == [(image.width * image.height, expected)]
        else:
            with pytest.raises(DataError, match="^picture .* is not readable .*" + re.escape(expected)):
                data.load_image(path, 10**6)


def test_the_papers_warmup_filters_drop_and_count(tmp_path):
    big, low = picture(tmp_path / "big.png", (28, 28)), "data:;base64," + base64_picture(size=(80, 27))
    row = lambda image, response: Row("", "", "q", "", [image], response=response)
    rows = [row(big, "fine"), row(low, "fine"), row(big, "Hm. LET ME RETHINK IT.")]
    assert data.filter_warmup_rows(rows) == (rows[:1], {"rethink": 1, "small_picture": 1})


VALUES = [None, True, -7, 1e999, math.nan, 2**70, "", " ", "a.png", "../a.png", "\0", "\ud800", "A", "nan"]
VALUES += ["['a', 'b']", "[" * 99, "[0x" + "f" * 9000 + "]", "{[]: 1}", "<image>", "data:,AAAA", "x" * 5000]
VALUES += [[], {}, [[]], [None], ["a.png"], [SAID, SAID], [{"role": []}], {"role": "user"}]


def mutated(rng, blob):
    a, n = rng.randrange(len(blob) + 1), rng.choice([1, 2, 8, 200])
    new = rng.choice([b"", rng.randbytes(n), blob[a : a + n] * 2, bytes(n), b'"', b"{", b"[", b"\t", b"\n"])
    return blob[:a] + new + blob[a + n :]


def load_random_rows(rng, folder):
    columns = {"index": "1", "question": "q", "answer": "A", "image_path": "a.png", "options": ["x", "y"]}
    rows = [dict(row) for row in rng.sample([ROW, {**ROW, "choices": ["3"]}, CHAT, columns], 2)]
    rows[0] |= {name: rng.choice(VALUES) for name in rng.sample([*rows[0], "image", "A", "hint"], 2)}
    path = folder / rng.choice(["rows.json", "rows.jsonl", "rows.tsv"])
    if path.suffix == ".tsv":
        rows = [{k: str(v).encode("utf-8", "replace").decode() for k, v in row.items()} for row in rows]
    write_rows(path, *rows)
    if rng.random() < 0.5:
        path.write_bytes(mutated(rng, path.read_bytes()))
    good = []
    with suppress(DataError):
        good, _ = data.load_rows(str(path), need=rng.choice([(), ("answer", "key_words"), ("response",)]))
    for row in good:  # what is accepted can be asked and written
        data.chat_messages(row, data.INSTRUCTION)
        data.write_tsv_predictions(str(folder / "out"), [row], [{"extracted": ["3"], "responses": ["3"]}])
    return bool(good)


@pytest.mark.filterwarnings("ignore:::PIL")
def test_random_input_ends_in_data_errors_and_nothing_else(tmp_path):
    picture(tmp_path / "a.png")
    assert 20 < sum(load_random_rows(random.Random(i), tmp_path) for i in range(200)) < 180
    for i in range(200):
        rng = random.Random(i)
        content = saved(
            *rng.choice([("P", 1, "PNG"), ("CMYK", 0, "JPEG"), ("P", 1, "GIF"), ("RGBA", 0, "WEBP")])
        )
        (tmp_path / "file").write_bytes(mutated(rng, content))
        with suppress(DataError):
            assert data.load_image(str(tmp_path / "file"), 10**4).size


def test_the_toy_world_follows_from_its_seed_and_is_made_once(toy, tmp_path):
    data.build_toy_world(str(tmp_path / "toy"), 0, TINY)
    files = lambda folder: {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert files(toy) == files(tmp_path / "toy") and len(files(toy)) > 40
    assert all(data.load_rows(str(toy / f"{name}.json"))[1] == [] for name in ("sft", "train", "test"))
    (tmp_path / "toy" / "sft.json").unlink()
    data.build_toy_world(str(tmp_path / "toy"), 0, TINY)
    assert not (tmp_path / "toy" / "sft.json").exists()  # a complete folder is left alone
    with pytest.raises(DataError, match="was made with --seed 0, not 1"):
        data.build_toy_world(str(tmp_path / "toy"), 1, TINY)


# ------------------------------------------------------------------------------------------------------------
# Advantages and loss


@pytest.mark.parametrize(
    "rewards, advantages",
    [
        ([0.0, 1.0, 2.0], [-1.0, 0.0, 1.0]),  # mean 1, unbiased std 1
        ([0.0, 0.0, 0.0, 1.0], [-0.5, -0.5, -0.5, 1.5]),  # mean 1/4, std 1/2
        (
            [0.1 + 0.2 + 0.4] * 7 + [0.7000001],
            [0.0] * 8,
        ),  # tied but for float noise, which eps 1e-6 would blow up
    ],
)
def test_group_advantages_are_normalized_with_the_unbiased_std_and_exactly_zero_in_a_tied_group(
    rewards, advantages
):
    got = pebr.group_advantages(torch.tensor([rewards]))
    torch.testing.assert_close(got, torch.tensor([advantages]), atol=1e-5, rtol=0)
    assert got.ne(0).tolist() == torch.tensor([advantages]).ne(0).tolist()  # zeros are exact


def test_k3_is_zero_at_equality_never_negative_and_clamped_as_in_the_authors_code():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pebr.k3_kl(x, x), torch.zeros(1000)) and (pebr.k3_kl(x, x.roll(1)) >= 0).all()
    d = torch.tensor([8.0, 2.0, -8.0, -40.0], requires_grad=True)  # reference - policy
    kl = pebr.k3_kl(torch.zeros(4), d)
    torch.testing.assert_close(kl, torch.tensor([10.0, math.exp(2) - 3, math.exp(-8) + 7, 10.0]))
    assert torch.autograd.grad(kl.sum(), d)[0].ne(0).tolist() == [False, True, True, False]


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
def test_the_ratio_is_clipped_only_on_the_right_side_of_each_sign(ratio, advantage, loss, gradient_flows):
    logprobs, one = torch.tensor([[math.log(ratio)]], requires_grad=True), torch.ones(1, 1)
    old, adv = torch.zeros(1, 1), torch.tensor([advantage])
    value, metrics = pebr.grpo_loss(logprobs, old, None, adv, one, 1, Config(kl_coef=0))
    value.backward()
    assert value.item() == pytest.approx(loss) and (logprobs.grad.abs().item() > 0) == gradient_flows
    clipped = [name for name, share in metrics.items() if name.startswith("clipped") and share]
    sides = {
        "clipped_low": ratio < 0.8 and advantage < 0,
        "clipped_high": ratio > 1.3 and advantage > 0,
        "clipped_dual": ratio > 3 and advantage < 0,
    }
    assert clipped == [name for name, side in sides.items() if side]


def test_kl_is_added_with_its_coefficient():
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss, metrics = pebr.grpo_loss(zero, zero, one, torch.zeros(1), one, 1, Config(kl_coef=0.5))
    assert metrics["kl"].item() == pytest.approx(math.e - 2)  # exp(1) - 1 - 1
    assert loss.item() == pytest.approx(0.5 * (math.e - 2))


def grpo_step(policy, rollouts, rewards, cfg, folder, reference=None):
    """One step of the real loop on these rollouts, groups of three, with these rewards: (gradients of its last update,
    metrics line). The weights stay as they are unless the optimizer is not `Still`."""
    caught = {}

    class Still(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay, fused):
            super().__init__(params, lr)

        def step(self, closure=None):
            caught.update(
                {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
            )

    rows = [r.prompt.row for r in rollouts[::3]]
    cfg = replace(cfg, stage="reasoning", group_size=3, batch_size=len(rows), max_steps=1, grad_clip_norm=1e9)
    cfg = cfg if cfg.update_batch_size < len(rows) else replace(cfg, update_batch_size=len(rows))
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Still)
        patch.setattr(pebr, "load_policy", lambda *_: policy)
        patch.setattr(pebr, "load_reference", lambda *_: reference)
        patch.setattr(pebr, "grpo_rows", lambda *_: rows)
        patch.setattr(pebr, "generate_rollouts", lambda *_: rollouts)
        patch.setattr(
            pebr, "score_rollouts", lambda *_: [{"accuracy": float(r), "format": 0.0} for r in rewards]
        )
        pebr.train_grpo(cfg, "", "", folder)
    return caught, pebr.read_jsonl(folder / "metrics.jsonl")[-1]


def grouped_rollouts(policy, cfg, tmp_path):
    """Ragged groups of three: two picture sizes, no picture, two pictures; one-token responses, a truncated group."""
    words = ("red", "How many red objects ?", "all left", "blue")
    prompts = prompts_of(policy, cfg, tmp_path, sizes=((56, 56), (112, 84), None, (84, 84)), words=words)
    images = [picture(tmp_path / "a.png"), picture(tmp_path / "b.png", (84, 56))]
    prompts.append(pebr.encode_prompt(policy, Row("", "2", "red <image> and blue <image>", "1", images), cfg))
    generator, rollouts = torch.Generator().manual_seed(1), []
    for i, length in enumerate([9, 1, 4, 7, 3, 2, 5, 5, 5, 1, 1, 1, 12, 12, 12]):
        tokens = torch.randint(
            8, 20, (length,), generator=generator
        )  # words, in every vocabulary of these tests
        rollouts.append(Rollout(prompts[i // 3], tokens, "", length == 12, torch.zeros(length)))
    return rollouts


REWARDS = [1, 0, 0.5] * 5


def test_one_and_four_ragged_micro_batches_give_equal_gradients(policy, cfg, tmp_path):
    rollouts, reference = grouped_rollouts(policy, cfg, tmp_path), copy.deepcopy(policy)
    reference.model.lm_head.weight.data *= 1.2
    of = lambda size: grpo_step(
        policy, rollouts, REWARDS, replace(cfg, micro_batch_size=size), tmp_path / "s", reference
    )
    (whole, line), (parts, other) = of(15), of(4)
    assert max(g.abs().max() for g in whole.values()) > 1e-3 and line["kl"] > 1e-4
    assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4)


def test_the_first_update_has_ratio_one_and_later_ones_the_samplers_logprobs(
    policy, cfg, tmp_path, monkeypatch
):
    """Two updates of two and a half groups each; the sampler's log-probs are off by log 1.25, within the clip."""
    rollouts, seen, loss = grouped_rollouts(policy, cfg, tmp_path)[:12], [], pebr.grpo_loss
    with torch.no_grad():
        logprobs, _, _ = policy(rollouts, cfg.temperature)
    for rollout, row in zip(rollouts, logprobs):
        rollout.old_logprobs = row[: len(rollout.tokens)] - math.log(1.25)
    spy = lambda logprobs, old, *rest: (
        seen.append((logprobs - old)[rest[2].bool()].detach()) or loss(logprobs, old, *rest)
    )
    monkeypatch.setattr(pebr, "grpo_loss", spy)
    cfg = replace(cfg, update_batch_size=2, micro_batch_size=6)
    gradients, metrics = grpo_step(policy, rollouts, REWARDS[:12], cfg, tmp_path / "s")
    first, second = seen
    assert torch.equal(first, torch.zeros_like(first))  # exactly
    torch.testing.assert_close(second.exp(), torch.full_like(second, 1.25), atol=1e-4, rtol=0)
    assert metrics["sampler_gap"] == pytest.approx(math.log(1.25), abs=1e-4)
    assert max(g.abs().max() for g in gradients.values()) > 1e-3


def test_a_non_finite_loss_skips_the_update_and_is_counted(policy, cfg, tmp_path):
    rollouts = grouped_rollouts(policy, cfg, tmp_path)[:3]
    policy.model.lm_head.weight.data[0, 0] = float("nan")
    gradients, metrics = grpo_step(policy, rollouts, [1, 0, 0.5], replace(cfg, kl_coef=0.0), tmp_path / "s")
    assert gradients == {} and metrics["skipped_updates"] == 1 and metrics["loss"] == "nan"


# ------------------------------------------------------------------------------------------------------------
# Rollouts and log-probs

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """A tiny random model folder of each fast family, and of one that takes the plain path."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("families")
    toy = data.toy_processor("user assistant red blue and How many objects ? all left".split())
    tokenizer, images, videos = toy.tokenizer, toy.image_processor, toy.video_processor
    names = ("endoftext", "im_end", "image_pad", "video_pad", "vision_start", "vision_end")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    text = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.125,
                bos_token_id=0, eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"])  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    marks = {f"{name}_token_id": ids[token] for name, token in
             (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}  # fmt: skip
    vision = dict(hidden_size=64, num_heads=4, initializer_range=0.125, depth=2)
    wide = vision | dict(intermediate_size=128, out_hidden_size=64)
    ours = {"text_config": {**text, "rope_parameters": rope}, **marks}
    own = {
        "qwen2_vl": hf.Qwen2VLConfig(**ours, vision_config={**vision, "embed_dim": 64, "mlp_ratio": 2}),
        "qwen2_5_vl": hf.Qwen2_5_VLConfig(**ours, vision_config={**wide, "fullatt_block_indexes": [1]}),
        "qwen3_vl": hf.Qwen3VLConfig(**ours, vision_config={**wide, "deepstack_visual_indexes": [0], "patch_size": 14,
                                                            "num_position_embeddings": 64}),
        "llava": hf.LlavaConfig(
            text_config=hf.LlamaConfig(**text), image_token_id=ids["image_pad"], image_seq_length=4,
            vision_config=hf.CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                              num_attention_heads=4, image_size=28, patch_size=14)),
    }  # fmt: skip
    qwen = dict(chat_template=data.CHAT_TEMPLATE)
    square = {"height": 28, "width": 28}
    processors = {
        "qwen2_vl": hf.Qwen2VLProcessor(images, tokenizer, videos, **qwen),
        "qwen2_5_vl": hf.Qwen2_5_VLProcessor(images, tokenizer, videos, **qwen),
        "qwen3_vl": hf.Qwen3VLProcessor(images, tokenizer, hf.Qwen3VLVideoProcessor(), **qwen),
        "llava": hf.LlavaProcessor(
            hf.CLIPImageProcessor(size=square, crop_size=square), tokenizer, patch_size=14, image_token="<|image_pad|>",
            vision_feature_select_strategy="default", num_additional_image_tokens=1, **qwen),
    }  # fmt: skip
    for kind in FAMILIES:
        torch.manual_seed(0)
        model = hf.AutoModelForImageTextToText.from_config(own[kind])
        model.generation_config.eos_token_id = ids["im_end"]
        model.save_pretrained(folder / kind)
        processors[kind].save_pretrained(folder / kind)
    return folder


def generate_logprobs(policy, prompts, n, cfg):
    """Oracle: sample with transformers' generate; log-probs of the sampled tokens from its own raw logits / T."""
    batch = pebr.collate(prompts, [], policy.pad_id)
    out = policy.model.eval().generate(
        **batch, do_sample=True, temperature=cfg.temperature, top_k=0, num_return_sequences=n, max_new_tokens=8,
        min_new_tokens=8, suppress_tokens=policy.banned_ids, output_logits=True, return_dict_in_generate=True,
        pad_token_id=policy.pad_id)  # fmt: skip
    tokens = out.sequences[:, batch["input_ids"].shape[1] :]
    logits = torch.stack(out.logits, 1) / cfg.temperature  # (B, C, V)
    return tokens, logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def test_logprobs_equal_the_logits_of_generate(policy, cfg, tmp_path):
    """Left-padded, two picture sizes and none, times G; then in shuffled micro-batches, each alone, and after a
    generate of another batch size has left its position state on the model."""
    torch.manual_seed(0)
    words = ("red", "How many red objects are there ?", "all left")
    prompts = prompts_of(policy, cfg, tmp_path, sizes=((56, 56), (112, 84), None), words=words)
    tokens, expected = generate_logprobs(policy, prompts, 3, cfg)
    rollouts = [Rollout(prompts[i // 3], row) for i, row in enumerate(tokens)]
    assert len({p.inputs["input_ids"].shape[1] for p in prompts}) == 3  # so the batch really was padded
    order = torch.randperm(9).tolist()
    for rows in (order[:4], order[4:], *[[i] for i in order]):
        got, _, mask = policy([rollouts[i] for i in rows], cfg.temperature)
        assert mask.all() and torch.allclose(got, expected[rows], atol=1e-4)
        generate_logprobs(policy, prompts[:1], 1, cfg)  # leaves rope_deltas of batch size 1


def test_several_pictures_in_one_row_equal_generate_too_and_their_order_matters(policy, cfg, tmp_path):
    torch.manual_seed(0)
    images = [picture(tmp_path / "a.png", (56, 56)), picture(tmp_path / "b.png", (84, 112), (0, 0, 200))]
    problem = "red <image> and blue <image> objects"
    prompt = pebr.encode_prompt(policy, Row("", "1", problem, "1", images), cfg)
    swapped = pebr.encode_prompt(policy, Row("", "1", problem, "1", images[::-1]), cfg)
    tokens, expected = generate_logprobs(policy, [prompt], 2, cfg)
    got, _, _ = policy([Rollout(prompt, row) for row in tokens], cfg.temperature)
    other, _, _ = policy([Rollout(swapped, row) for row in tokens], cfg.temperature)
    assert torch.allclose(got, expected, atol=1e-4) and not torch.allclose(other, expected, atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", FAMILIES[:3])
def test_shared_prefix_and_plain_forwards_give_equal_logprobs_and_gradients(
    families, kind, cfg, tmp_path, checkpointing
):
    fast, plain = (pebr.load_policy(str(families / kind), replace(cfg, fast=fast)) for fast in (True, False))
    assert fast.fast and not plain.fast
    rollouts = grouped_rollouts(fast, cfg, tmp_path)
    cfg = replace(cfg, micro_batch_size=15, gradient_checkpointing=checkpointing)
    for fast_values, plain_values in zip(
        fast(rollouts, 1.2), plain(rollouts, 1.2)
    ):  # log-probs, entropy, mask
        assert torch.allclose(fast_values, plain_values, atol=1e-4)
    gradients, expected = (grpo_step(p, rollouts, REWARDS, cfg, tmp_path / "s")[0] for p in (fast, plain))
    assert gradients.keys() == expected.keys() and max(g.abs().max() for g in expected.values()) > 1e-2
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("prompts_inside", [5, 15])  # GRPO's groups; the warm-up's, of one response each
def test_a_micro_batch_is_one_row_without_padding_that_holds_each_prompt_once(
    policy, cfg, tmp_path, monkeypatch, prompts_inside
):
    rollouts, seen = grouped_rollouts(policy, cfg, tmp_path), []
    if prompts_inside == 15:
        rollouts = [replace(r, prompt=replace(r.prompt)) for r in rollouts]  # a copy is another group
    forward = policy.model.base_model.forward
    monkeypatch.setattr(
        policy.model.base_model, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs)
    )
    policy(rollouts, 1.0)
    whole = sum(r.prompt.inputs["input_ids"].shape[1] for r in rollouts[:: 15 // prompts_inside])
    completions = sum(len(r.tokens) - 1 for r in rollouts)  # the last token is no input
    assert len(seen) == 1 and seen[0]["input_ids"].shape == (1, whole + completions)


@pytest.mark.parametrize("kind", FAMILIES[:3])
def test_prefill_once_decodes_the_tokens_of_plain_generate(families, kind, cfg, tmp_path):
    fast, plain = (pebr.load_policy(str(families / kind), replace(cfg, fast=fast)) for fast in (True, False))
    prompts = [r.prompt for r in grouped_rollouts(fast, cfg, tmp_path)][::3]
    for batch in (prompts, prompts[:1], prompts[2:3]):  # padded, alone, no picture in the whole batch
        for n, temperature in ((1, 0.0), (3, 1.2)):  # greedy and sampled
            sampling = replace(cfg, max_new_tokens=40, temperature=temperature)
            made, expected = (pebr.generate_rollouts(p, batch, n, sampling, "") for p in (fast, plain))
            assert [(r.tokens.tolist(), r.truncated) for r in made] == [
                (r.tokens.tolist(), r.truncated) for r in expected
            ]
            for a, b in zip(made, expected):
                assert torch.allclose(a.old_logprobs, b.old_logprobs, atol=1e-4)


def test_another_family_takes_the_plain_path_and_trains_and_changed_logits_are_refused(
    families, cfg, tmp_path
):
    torch.manual_seed(0)
    policy = pebr.load_policy(str(families / "llava"), cfg)
    assert not policy.fast
    words = ("red", "How many red objects ?", "all left")
    prompts = prompts_of(policy, cfg, tmp_path, sizes=((56, 56), (112, 84), None), words=words)
    tokens, expected = generate_logprobs(policy, prompts, 3, cfg)
    got, _, _ = policy([Rollout(prompts[i // 3], row) for i, row in enumerate(tokens)], cfg.temperature)
    assert torch.allclose(got, expected, atol=1e-4)
    rollouts = pebr.generate_rollouts(policy, prompts, 3, cfg, "")
    gradients, _ = grpo_step(policy, rollouts, [1, 0, 0.5] * 3, cfg, tmp_path / "s")
    assert any("vision" in name and gradient.abs().max() > 0 for name, gradient in gradients.items())
    shutil.copytree(families / "llava", tmp_path / "capped")
    config = json.loads((tmp_path / "capped" / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = 30.0
    (tmp_path / "capped" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="final_logit_softcapping changes its logits"):
        pebr.load_policy(str(tmp_path / "capped"), cfg)


def test_the_samplers_logprobs_are_those_of_the_training_forward(policy, cfg, tmp_path):
    cfg = replace(cfg, max_new_tokens=40, top_p=0.5, generate_batch_size=3, temperature=3.0)
    prompts = prompts_of(policy, cfg, tmp_path)
    rollouts = pebr.generate_rollouts(policy, prompts, 4, cfg, "")
    assert [r.prompt is prompts[i // 4] for i, r in enumerate(rollouts)] == [True] * 8
    assert {r.truncated for r in rollouts} == {True, False}  # rows did leave the batch early
    logprobs, _, _ = policy(rollouts, cfg.temperature)
    for rollout, expected in zip(rollouts, logprobs):
        torch.testing.assert_close(rollout.old_logprobs, expected[: len(rollout.tokens)], atol=1e-4, rtol=0)
        ends = [t for t in rollout.tokens.tolist() if t in policy.end_ids]
        assert ends == ([] if rollout.truncated else [rollout.tokens[-1].item()])


def test_sampled_tokens_have_the_distribution_of_transformers_warpers_and_their_full_logprob():
    from transformers import SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

    generator, draws, ids = torch.Generator().manual_seed(0), 40_000, torch.zeros(1, 1, dtype=torch.long)
    logits = torch.randn(60, generator=generator) * 2
    for temperature, top_p in ((1.2, 0.99), (1.0, 0.5), (0.7, 0.05), (3.0, 1.0)):
        expected = TemperatureLogitsWarper(temperature)(
            ids, SuppressTokensLogitsProcessor([3, 7])(ids, logits[None].clone())
        )
        expected = (TopPLogitsWarper(top_p)(ids, expected) if top_p < 1 else expected).softmax(-1)[0]
        noise = torch.rand(draws, 8, generator=generator)
        tokens, logprobs = pebr.sample_tokens(logits.repeat(draws, 1), noise, temperature, top_p, [3, 7])
        share = tokens.bincount(minlength=60) / draws
        assert share[expected == 0].sum() == 0
        # five standard deviations of a share: 5 * sqrt(p (1 - p) / draws)
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()
        full = (logits / temperature).log_softmax(-1)  # before ban and top-p
        torch.testing.assert_close(logprobs, full[tokens])
    assert (
        pebr.sample_tokens(logits[None], noise[:1], 0.0, 1.0, [int(logits.argmax())])[0]
        == logits.topk(2).indices[1]
    )


def test_a_response_depends_on_seed_and_position_and_not_on_the_batch_it_is_made_in(policy, cfg, tmp_path):
    prompts = prompts_of(policy, cfg, tmp_path)
    together = [r.tokens.tolist() for r in pebr.generate_rollouts(policy, prompts, 4, cfg, "a step")]
    alone = [
        r.tokens.tolist()
        for prompt in prompts
        for r in pebr.generate_rollouts(policy, [prompt], 4, cfg, "a step")
    ]
    assert together == alone and len({tuple(tokens) for tokens in together}) > 4
    assert together != [
        r.tokens.tolist() for r in pebr.generate_rollouts(policy, prompts, 4, cfg, "another step")
    ]
    assert together != [
        r.tokens.tolist() for r in pebr.generate_rollouts(policy, prompts, 4, replace(cfg, seed=1), "a step")
    ]


def test_entropy_is_exact_and_the_mask_counts_tokens(policy, cfg, tmp_path):
    # A model with a zero head is uniform over its V tokens: entropy log V at every position, at any temperature.
    policy.model.lm_head.weight.data.zero_()
    _, entropy, mask = policy(rollouts_of(prompts_of(policy, cfg, tmp_path), [3, 5]), 1.2)
    assert torch.allclose(entropy[mask.bool()], torch.tensor(math.log(policy.model.lm_head.weight.shape[0])))
    assert mask.sum(1).tolist() == [3, 5]


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
    [(cut, logprobs)] = pebr.cut_at_end(ids, ids / 10, end_ids=[2, 5])
    assert cut.tolist() == tokens[:expected] and len(logprobs) == expected


def test_decode_attention_is_attention_to_the_repeated_prompt_and_to_the_own_tokens():
    """2 prompts (one with padding) x 3 rows, two heads for each key head; rows and a whole prompt leave on the way."""
    torch.manual_seed(0)
    shapes = ((2, 2, 5), (2, 2, 5), (6, 4, 9), (6, 2, 9), (6, 2, 9))
    prompt_keys, prompt_values, query, keys, values = (torch.randn(*shape, 8) for shape in shapes)
    prompt, bias, alive = torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(2, 1, 1, 5), torch.arange(6)
    bias[1, ..., :2] = float("-inf")
    cache = pebr.GroupCache(
        [(prompt_keys, prompt_values)], bias, 3, torch.arange(6), [(torch.zeros(6, 2, 9, 8),) * 2]
    )
    cache.own = [(torch.zeros(6, 2, 9, 8), torch.zeros(6, 2, 9, 8))]
    for t in range(9):
        if t in (3, 7):
            going = (
                torch.tensor([0, 2, 3, 5]) if t == 3 else torch.tensor([2, 3])
            )  # rows 1 and 4 leave, then 0 and 2
            cache.keep(going)
            alive = alive[going]
        cache.step, now = t, slice(t, t + 1)
        got = pebr.decode_attention(
            query[alive, :, now], keys[alive, :, now], values[alive, :, now], 0.3, cache, 0
        )
        expected = F.scaled_dot_product_attention(
            query[alive, :, now],
            torch.cat([prompt_keys[prompt], keys[:, :, : t + 1]], 2)[alive],
            torch.cat([prompt_values[prompt], values[:, :, : t + 1]], 2)[alive],
            attn_mask=F.pad(bias[prompt], (0, t + 1))[alive],
            scale=0.3,
            enable_gqa=True,
        )
        torch.testing.assert_close(got, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)
    assert alive.tolist() == [3, 5] and len(cache.bias) == len(cache.prompts[0][0]) == 1  # prompt 0 is gone


def test_a_decoding_step_does_not_round_its_scores_before_the_softmax():
    """Values are one-hot, so the output is the attention weights. Scores of up to some 100, as trained models have."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()
    keys, query, one_hot = normal(1, 1, 16, 64), 40 * normal(8, 4, 1, 64), torch.eye(32, dtype=torch.bfloat16)
    own = [(torch.zeros(8, 1, 2, 64).bfloat16(), torch.zeros(8, 1, 2, 32).bfloat16())]
    prompts = [(keys, one_hot[None, None, :16])]
    cache, new_key = (
        pebr.GroupCache(prompts, torch.zeros(1, 1, 1, 16), 8, torch.arange(8), own),
        normal(8, 1, 1, 64),
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = pebr.decode_attention(query, new_key, one_hot[16].expand(8, 1, 1, 32), 0.125, cache, 0)[
            :, 0, :, :17
        ]
    scores = 0.125 * query.double() @ torch.cat([keys.expand(8, 1, 16, 64), new_key], 2).double().mT
    assert 50 < scores.abs().max() < 300
    variation = (got.double() - scores.softmax(-1)[:, :, 0]).abs().sum(-1) / 2
    assert variation.max() < 0.004  # bf16 weights; rounded scores gave 0.1


def test_rows_that_have_ended_leave_an_eighth_of_the_batch_at_a_time(policy, cfg, tmp_path):
    """Row r of 16 ends with its token r + 1. noise tells choose which row is which."""
    noise, sizes, end = torch.zeros(16, 16, 8), [], policy.end_ids[0]
    noise[:, :, 0], noise[:, :, 1] = torch.arange(16.0)[:, None], torch.arange(16.0)

    def choose(logits, noise):
        sizes.append(len(logits))
        return torch.where(noise[:, 0] == noise[:, 1], end, 20), noise[:, 0]

    with torch.no_grad():
        responses = pebr.decode(policy, prompts_of(policy, cfg, tmp_path), 8, 16, choose, noise)
    assert [len(tokens) for tokens, _ in responses] == list(range(1, 17))
    assert all(set(logprobs.tolist()) == {float(row)} for row, (_, logprobs) in enumerate(responses))
    # 15 of 16 go on: more than 7/8, none leaves; 14: two leave. So on to 8 rows, of which each one is an eighth.
    assert sizes == [16, 16, 14, 14, 12, 12, 10, 10, 8, 7, 6, 5, 4, 3, 2, 1]


def test_under_autocast_weights_are_cast_once_a_rollout_and_caches_are_bf16_and_whole(policy, cfg, tmp_path):
    from torch.profiler import ProfilerActivity, profile

    policy.end_ids, prompts = [], prompts_of(policy, cfg, tmp_path)
    head = list(policy.model.get_output_embeddings().weight.shape)
    most_likely = lambda logits, noise: (logits.argmax(-1), logits[:, 0].float())

    def casts_of_the_head(max_new_tokens):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                pebr.decode(policy, prompts, 2, max_new_tokens, most_likely, torch.zeros(4, 9, 8))
        return sum(
            event.name == "aten::_to_copy" and event.input_shapes[0] == head for event in seen.events()
        )

    assert casts_of_the_head(9) == casts_of_the_head(3) == 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, _, cache = pebr.prefill(policy, prompts, 3, 50)
    assert {x.dtype for layer in cache.prompts + cache.own for x in layer} == {torch.bfloat16}
    assert {x.shape[:3] for layer in cache.own for x in layer} == {
        (6, 2, 50)
    }  # rows, kv heads, max_new_tokens


def test_an_image_token_is_never_sampled(policy, cfg, tmp_path):
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    banned = policy.banned_ids
    assert banned == sorted(policy.processor.tokenizer.convert_tokens_to_ids(names))
    cfg = replace(cfg, max_new_tokens=60, temperature=50.0, top_p=1.0)  # near uniform over some 80 tokens
    prompts = prompts_of(policy, cfg, tmp_path)
    marks = lambda: sum(
        t in banned for r in pebr.generate_rollouts(policy, prompts, 8, cfg, "") for t in r.tokens.tolist()
    )
    assert marks() == 0
    policy.banned_ids = []
    assert marks() > 0  # without the ban they do come


def test_the_folders_generation_config_does_not_leak_into_rollouts_and_is_kept_on_saving(toy, cfg, tmp_path):
    from transformers import GenerationConfig

    cfg = replace(cfg, fast=False, temperature=3.0)
    policy = pebr.load_policy(str(toy / "model"), cfg)
    of = lambda one: [
        r.text for r in pebr.generate_rollouts(one, prompts_of(one, cfg, tmp_path)[:1], 8, cfg, "")
    ]
    expected = of(policy)  # before the change, which the policy's own model may see, too
    policy.saved_generation_config.update(min_new_tokens=7, no_repeat_ngram_size=1, repetition_penalty=1.5)
    pebr.save_policy(policy, policy, tmp_path / "model")
    leaky = pebr.load_policy(str(tmp_path / "model"), cfg)
    assert leaky.end_ids == policy.end_ids and len(leaky.end_ids) == 2
    assert of(leaky) == expected
    assert GenerationConfig.from_pretrained(tmp_path / "model").no_repeat_ngram_size == 1


def test_special_tokens_are_not_doubled_and_a_picture_mark_in_a_text_is_refused(policy, cfg, toy, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = policy.processor.tokenizer  # made one that adds a begin token by itself
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    assert tokenizer("red")["input_ids"][0] == begin
    ids = prompts_of(policy, cfg, tmp_path)[0].inputs["input_ids"][0].tolist()
    assert ids.count(begin) == 2  # user and assistant, as in the template
    [row, *_], _ = data.load_rows(str(toy / "sft.json"))
    assert begin not in pebr.encode_example(policy, row, cfg).tokens.tolist()
    with pytest.raises(DataError, match=re.escape("row 7: its text holds <|image_pad|>")):
        pebr.encode_prompt(policy, Row("row 7", "7", "red <|image_pad|>", "1"), cfg)


def test_warmup_labels_cover_exactly_the_response_and_its_end(policy, cfg, toy):
    rows, _ = data.load_rows(str(toy / "sft.json"))
    examples = [pebr.encode_example(policy, row, cfg) for row in rows[:3]]
    batch = pebr.collate([e.prompt for e in examples], [e.tokens for e in examples], policy.pad_id)
    _, _, mask = policy(examples, 1.0)
    for ids, kept, row in zip(batch["input_ids"][:, -mask.shape[1] :], mask.bool(), rows):
        *labels, end = ids[kept].tolist()
        assert policy.processor.tokenizer.decode(labels).split() == row.response.split()
        assert end == policy.processor.tokenizer.eos_token_id


def test_a_frozen_vision_tower_does_not_train_and_has_no_backward_pass(policy, cfg, tmp_path):
    runs = Counter()
    visual, decoder = policy.model.base_model.visual, policy.model.base_model.language_model
    visual.blocks[0].attn.register_forward_hook(lambda *_: runs.update(["vision"]))
    decoder.layers[0].self_attn.register_forward_hook(lambda *_: runs.update(["text"]))
    cfg = replace(cfg, freeze_vision=True, gradient_checkpointing=True, micro_batch_size=15)
    rollouts = grouped_rollouts(policy, cfg, tmp_path)
    gradients, _ = grpo_step(policy, rollouts, REWARDS, cfg, tmp_path / "s")
    assert runs == {"vision": 1, "text": 2}  # the language model is computed once more in the backward pass
    assert any("layers.0.mlp" in name for name in gradients) and "lm_head.weight" in gradients
    assert not any("visual" in name for name in gradients)


# ------------------------------------------------------------------------------------------------------------
# What bf16, real sizes and tied embeddings add


@pytest.mark.parametrize("is_fsdp2", [False, True])
def test_the_bf16_reference_keeps_its_rotary_frequencies_in_float32(is_fsdp2, toy, cfg, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_fsdp2", is_fsdp2)
    if is_fsdp2:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    try:
        reference = pebr.load_reference(str(toy / "model"), replace(cfg, mixed_precision="bf16"))
    finally:
        if is_fsdp2:
            torch.distributed.destroy_process_group()
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    exact = dict(pebr.load_policy(str(toy / "model"), cfg).named_buffers())
    for name, buffer in reference.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, exact[name]), name
    assert any("inv_freq" in name for name in exact)


def windows_one_by_one(query, key, value, ends, key_ends, longest, longest_key, scale):
    """A stand-in for torch's varlen_attn, (patches, heads, dim), which checks what its flash kernel would refuse."""
    assert ends.dtype == torch.int32 and ends is key_ends
    bounds = ends.tolist()
    assert max(b - a for a, b in itertools.pairwise(bounds)) == longest == longest_key
    parts = zip(
        *([x[a:b].transpose(0, 1) for a, b in itertools.pairwise(bounds)] for x in (query, key, value))
    )
    return torch.cat([F.scaled_dot_product_attention(*part, scale=scale).transpose(0, 1) for part in parts])


@pytest.mark.parametrize("kind", FAMILIES[:3])
def test_the_vision_tower_attends_in_one_call_a_layer_with_the_values_of_sdpa(
    families, kind, cfg, tmp_path, monkeypatch
):
    """Several windows: a call and three host syncs for each would keep a GPU waiting."""
    policy, grads, calls = pebr.load_policy(str(families / kind), cfg), {}, []
    prompts = prompts_of(policy, cfg, tmp_path, sizes=((308, 196), (56, 56), (140, 84)))
    batch, visual = pebr.collate(prompts, [], policy.pad_id), policy.model.base_model.visual
    monkeypatch.setattr(
        pebr, "varlen_attn", lambda *args, **kw: calls.append(args) or windows_one_by_one(*args, **kw)
    )
    for implementation in ("sdpa", "varlen_flash"):
        visual.config._attn_implementation = implementation
        out = visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
        policy.zero_grad()
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads[implementation] = [out, *(p.grad.clone() for p in visual.parameters() if p.grad is not None)]
    assert len(calls) == len(visual.blocks) == 2 and len(grads["sdpa"]) > 10
    for expected, got in zip(grads["sdpa"], grads["varlen_flash"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


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
    return folder


def test_tied_embeddings_train_as_one_and_are_saved_once(tied, cfg, tmp_path):
    policy = pebr.load_policy(str(tied), cfg)
    head, embedding = policy.model.get_output_embeddings().weight, policy.model.get_input_embeddings().weight
    gradients, _ = grpo_step(policy, grouped_rollouts(policy, cfg, tmp_path), REWARDS, cfg, tmp_path / "s")
    assert head is embedding and sum(p.shape == head.shape for p in policy.parameters()) == 1
    embedding.data += 0.1
    pebr.save_policy(policy, policy, tmp_path / "saved")
    assert "lm_head.weight" not in weights_of(tmp_path / "saved")
    again = pebr.load_policy(str(tmp_path / "saved"), cfg)
    assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight
    for (name, p), q in zip(policy.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


VOCABULARY = 151_936  # of Qwen2.5-VL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_and_entropy_over_a_real_vocabulary(dtype, policy, cfg, tmp_path, monkeypatch):
    """In chunks of 4 of 9 tokens, against float64."""
    torch.manual_seed(0)
    policy.model.lm_head = torch.nn.Linear(64, VOCABULARY, bias=False)
    torch.nn.init.normal_(policy.model.lm_head.weight, std=0.5)
    prompt = prompts_of(policy, cfg, tmp_path)[0]  # a response's last token is no input, so it may be any
    rollouts = [Rollout(prompt, torch.tensor([10, 11, last])) for last in (0, 75_000, VOCABULARY - 1)]
    monkeypatch.setattr(pebr, "LOGITS_CHUNK", 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logprobs, entropy, mask = policy(rollouts, 1.2)
        logits = policy.model.lm_head(pebr.packed_states(policy, rollouts))
    assert logits.dtype == dtype and mask.sum() == 9
    expected = (logits.double() / 1.2).log_softmax(-1)  # (9, V)
    of_the_ids = expected.gather(1, torch.cat([r.tokens for r in rollouts])[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double().flatten(), of_the_ids, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        entropy.double().flatten(), -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-4
    )
    assert logprobs.std() > 0.5 and entropy.std() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_chosen_from_a_real_vocabulary_as_float64_would(dtype):
    generator, rows = torch.Generator().manual_seed(0), torch.arange(6)
    hidden, head = torch.randn(6, 16, generator=generator), torch.randn(16, VOCABULARY, generator=generator)
    logits, noise, banned = (
        (hidden @ head).to(dtype),
        torch.rand(6, 8, generator=generator),
        [5, VOCABULARY - 1],
    )
    logits[:, banned] = logits.amax(-1, keepdim=True) + 1  # the two that the model likes best
    for temperature, top_p in ((0.0, 1.0), (1.2, 1.0), (1.2, 0.9)):
        tokens, logprobs = pebr.sample_tokens(logits, noise, temperature, top_p, banned)
        full = (logits.double() / (temperature or 1.0)).log_softmax(-1)
        torch.testing.assert_close(logprobs.double(), full[rows, tokens], rtol=0, atol=1e-4)
        p = full.exp().index_fill(1, torch.tensor(banned), 0.0)
        p = p / p.sum(-1, keepdim=True)
        more_likely = torch.where(p > p[rows, tokens, None], p, 0.0).sum(-1)
        assert (p[rows, tokens] > 0).all() and (more_likely < (top_p if temperature else 0) + 1e-4).all()
        if (
            temperature and top_p == 1.0
        ):  # nothing is refused: the first number of the noise falls on the token
            cumulated = p.cumsum(-1)[rows, tokens]
            assert (cumulated > noise[:, 0] - 1e-5).all() and (
                cumulated - p[rows, tokens] < noise[:, 0] + 1e-5
            ).all()


# ------------------------------------------------------------------------------------------------------------
# A pretended device: what a GPU would refuse, on a machine without one

DEVICE = torch.device("meta")  # "cuda" would make the autograd engine look for a driver
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default)  # fmt: skip
ON_CPU = {aten.bmm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype)}  # what only CUDA has


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on DEVICE, and does not meet CPU tensors."""

    @staticmethod
    def __new__(cls, elem):
        same = dict(strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype)
        make = torch.Tensor._make_wrapper_subclass
        return make(cls, elem.size(), **same, device=DEVICE, requires_grad=elem.requires_grad)

    def __init__(self, elem):
        self.elem = elem

    def __setitem__(self, key, value):  # torch would send a list of indices to the real meta device
        key = key if isinstance(key, tuple) else (key,)
        super().__setitem__(tuple(torch.tensor(k) if isinstance(k, list) else k for k in key), value)

    is_cuda = True  # for pebr.py, which has its own kernels for CUDA
    tolist = lambda self: self.elem.tolist()
    item = lambda self: self.elem.item()
    __bool__ = lambda self: bool(self.elem)
    __int__ = lambda self: int(self.elem)
    __float__ = lambda self: float(self.elem)
    __index__ = lambda self: self.elem.__index__()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_device(func, args, kwargs or {})


def on_device(func, args, kwargs):
    """Compute on the CPU what belongs on the device. Refuse CPU tensors that are neither numbers nor indices."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = any(isinstance(x, OnDevice) for x in tensors)
    must_be_ours = tree_leaves((args[:1], args[2:], kwargs)) if func in INDEXING else tensors
    foreign = [
        x for x in must_be_ours if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) and x.dim() > 0
    ]
    if ours and foreign and func not in COPIES:
        raise RuntimeError(f"{func}: tensors on the device and on the CPU meet")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"} | {"device": "cpu"}
    args_, kwargs_ = tree_map(lambda x: x.elem if isinstance(x, OnDevice) else x, (args, kwargs))
    out, name = ON_CPU.get(func, func)(*args_, **kwargs_), func.__name__.split(".")[0]
    if name.endswith("_") and not name.startswith("__"):
        return args[0]  # in place
    if func is aten._local_scalar_dense.default or not (
        ours if asked is None else torch.device(asked) == DEVICE
    ):
        return out
    return tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, out)


class PretendDevice(TorchDispatchMode):
    _mode_key = (
        torch._C._TorchDispatchModeKey.FAKE
    )  # the slot in which torch.zeros(..., device=DEVICE) reaches it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_device(func, args, kwargs or {})


def with_autocast(product):
    """F.linear or the like, in bf16 under autocast, which itself knows nothing of OnDevice."""
    cast = lambda x: x.bfloat16() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x

    def in_bf16(*args, **kwargs):
        args, kwargs = tree_map(cast, (args, kwargs)) if torch.is_autocast_enabled("cpu") else (args, kwargs)
        return product(*args, **kwargs)

    return in_bf16


@contextmanager
def device(where, bf16):
    """Inside, the run's device is the CPU or DEVICE. Attention takes the kernel that does not ask which device it is."""
    made_by_torch = torch.tensor

    def tensor(data, *args, device=None, **kwargs):  # torch.tensor(device=...) does not reach the mode
        data = (
            [x.tolist() if isinstance(x, torch.Tensor) else x for x in data]
            if isinstance(data, list)
            else data
        )
        made = made_by_torch(data, *args, **kwargs)
        return made if device is None else made.to(device)

    mask = lambda rows, columns: torch.ones(rows, columns, dtype=torch.bool, device=where).tril(
        columns - rows
    )
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(Accelerator, "device", where)
        patch.setattr(
            Accelerator, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        )
        patch.setattr(pebr, "varlen_attn", windows_one_by_one)
        patch.setattr(pebr, "causal_lower_right", mask)  # torch's own is a tensor class without a device
        if where == DEVICE:
            patch.setattr(torch, "tensor", tensor)
            for name in ("linear", "conv3d", "scaled_dot_product_attention"):
                patch.setattr(F, name, with_autocast(getattr(F, name)))
        with PretendDevice() if where == DEVICE else nullcontext():
            yield


def move_inputs(policy, launcher):
    """What DDP and FSDP2's root do on CUDA before a forward: tensors inside of lists go to the device, objects stay."""
    for name in {"": (), "DDP": ("forward",), "FSDP2": ("forward", "generate")}[launcher]:
        method = getattr(policy, name)

        def moved(*args, method=method, **kwargs):
            (args,), (kwargs,) = _to_kwargs(args, kwargs, DEVICE, False)
            return method(*args, **kwargs)

        setattr(policy, name, moved)


def one_of_each(folder, toy, rows, cfg, where, launcher=""):
    """A warm-up step and a perception step of the real loops on a device: metrics, samples and weights."""
    sft = data.load_rows(str(toy / "sft.json"))[0][:4]
    folder.mkdir()
    with device(where, cfg.mixed_precision == "bf16"), pytest.MonkeyPatch.context() as patch:
        load = pebr.load_policy
        patch.setattr(
            pebr, "checked_rows", lambda path, cfg, policy, need: sft if "response" in need else rows
        )
        patch.setattr(pebr, "load_policy", lambda *args: windowed(load(*args), where, cfg))
        patch.setattr(
            pebr, "prepare_training", lambda policy, cfg: move_inputs(policy, launcher) or sgd(policy, cfg)
        )
        policies = []
        for stage, train in (("warmup", pebr.warmup), ("perception", pebr.train_grpo)):
            (folder / stage).mkdir()
            policies.append(train(replace(cfg, stage=stage), str(toy / "model"), "", folder / stage)[0])
        lines = [pebr.read_jsonl(folder / stage / "metrics.jsonl")[0] for stage in ("warmup", "perception")]
        weights = torch.cat([p.detach().cpu().flatten() for policy in policies for p in policy.parameters()])
    return lines, pebr.read_jsonl(folder / "perception" / "samples.jsonl"), weights


def sgd(policy, cfg):
    if cfg.gradient_checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.to(pebr.accelerator.device)
    return policy.train(), torch.optim.SGD(policy.parameters(), lr=0.1)


def windowed(policy, where, cfg):
    """The vision attention that load_policy takes on CUDA with bf16; the CPU's own is the oracle."""
    if policy.fast and where == DEVICE and cfg.mixed_precision == "bf16":
        policy.model.config.vision_config._attn_implementation = "varlen_flash"
    return policy


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("launcher, checkpointing", [("DDP", False), ("FSDP2", True)])
@pytest.mark.parametrize("fast", [True, False])
def test_on_a_pretended_device_everything_is_as_on_the_cpu(
    fast, launcher, checkpointing, mixed_precision, toy, tmp_path
):
    """Inputs are moved as each launcher moves them on CUDA. Pictures of several windows, of one, and none."""
    flags = dict(run_dir=str(toy.parent), fast=fast, max_new_tokens=8, group_size=3, micro_batch_size=6, batch_size=2,
                 update_batch_size=1, max_steps=1, gradient_checkpointing=checkpointing, kl_coef=0.5,
                 mixed_precision=mixed_precision, learning_rate=0.1)  # fmt: skip
    cfg = replace(pebr.resolve("perception", flags), clip_model="")
    paths = [picture(tmp_path / "0.png", (168, 140)), picture(tmp_path / "1.png", (56, 56))]
    rows = [
        Row(f"row {i}", str(i), "How many red objects are there ?", "1", [path], ["red"])
        for i, path in enumerate(paths)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pebr.STAGE_REWARDS, "perception", {"length_tokens": 1.0})
        patch.setattr(
            pebr,
            "score_rollouts",
            lambda rollouts, _: [{"length_tokens": float(r.tokens[0] % 5)} for r in rollouts],
        )
        expected = one_of_each(tmp_path / "cpu", toy, rows, cfg, torch.device("cpu"))
        got = one_of_each(tmp_path / "device", toy, rows, cfg, DEVICE, launcher)
    assert got[1] == expected[1]  # rollouts, rewards, advantages
    rel, absolute = (1e-4, 1e-5) if mixed_precision == "no" else (2e-2, 2e-2)
    for a, b in zip(got[0], expected[0]):
        assert a == pytest.approx(b, rel=rel, abs=absolute) and b["grad_norm"] > 0.01
    torch.testing.assert_close(got[2], expected[2], rtol=rel, atol=absolute)


def test_the_pretended_device_refuses_what_a_device_would_and_is_gone_afterwards():
    here, before = torch.ones(3), (torch.tensor, F.linear, pebr.varlen_attn)
    with device(DEVICE, False):
        there, zero = torch.arange(3.0, device=DEVICE), torch.tensor([0])
        assert (there + 1).tolist() == [1, 2, 3] and there[torch.tensor([2])].tolist() == [
            2
        ]  # numbers, indices
        for meet in (
            lambda: there + here,
            lambda: torch.cat([here, there]),
            lambda: there.index_put((zero,), here[:1]),
        ):
            with pytest.raises(RuntimeError, match="on the device and on the CPU meet"):
                meet()
    assert (torch.tensor, F.linear, pebr.varlen_attn) == before


# ------------------------------------------------------------------------------------------------------------
# Config and stages

SMALL = "--max_steps 2 --batch_size 4 --update_batch_size 2 --group_size 2 --max_new_tokens 16"
SMALL += " --micro_batch_size 3 --eval_samples 2"


def words(*argv):
    """Flags written in a row, as the shell would split them."""
    return " ".join(map(str, argv)).split()


def run(run_dir, *argv):
    pebr.main(words("--run_dir", run_dir, "--threads 1", *argv))


def run_script(command, *argv):
    """The same from the command line. Returns what was printed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, *words(command, *argv)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_json(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def new_run(toy, folder):
    folder.mkdir(exist_ok=True)
    (folder / "toy").symlink_to(toy)
    return folder


def small(stage, toy_run):
    """Flags of a stage of two steps. The untrained model gets nothing right: RL is given all questions."""
    given = f"--from_model {toy_run}/warmup --from_data {toy_run}/toy/train.json"
    return f"--stage {stage} {SMALL} " + given * (stage in ("perception", "reasoning"))


@contextmanager
def spread_rewards():
    """Every second response earns 1. So small a model earns the same with all of them: nothing would move."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pebr, "total_reward", lambda *_, count=itertools.count(): float(next(count) % 2))
        yield


@pytest.fixture(scope="session")
def toy_run(toy, tmp_path_factory):
    run_dir = new_run(toy, tmp_path_factory.mktemp("stages") / "run")
    with spread_rewards():
        for stage in pebr.ORDER:
            run(run_dir, small(stage, run_dir))
    return run_dir


def test_defaults_are_the_papers_and_stage_toy_and_flags_follow_in_this_order():
    table = {  # their settings
        "warmup": dict(learning_rate=1e-5, epochs=2, batch_size=128, freeze_vision=True, max_length=4096),
        "sample": dict(sample_max_pixels=4_194_304, temperature=1.2, top_p=0.99, group_size=8),
        "perception": dict(learning_rate=1e-6, epochs=1, batch_size=560, update_batch_size=112, kl_coef=0.01,
                           ratio_clip_low=0.2, ratio_clip_high=0.3, dual_clip=3.0, grad_clip_norm=1.0,
                           max_length=2048, max_new_tokens=2048, max_pixels=802_816, freeze_vision=False,
                           cosine_lo=0.0, cosine_hi=0.4, temperature=1.2, top_p=0.99, group_size=8),
        "reasoning": dict(learning_rate=1e-6, epochs=2, batch_size=512, update_batch_size=128, kl_coef=0.01),
        "evaluate": dict(eval_temperature=0.5, eval_samples=1),
    }  # fmt: skip
    for stage, settings in table.items():
        cfg = pebr.resolve(stage, {"model": "some/folder"})
        assert {name: getattr(cfg, name) for name in settings} == settings, stage
    assert len(pebr.fields(Config)) <= 45
    flags = "--learning_rate 0.5 --no-freeze_vision --gradient_checkpointing --temperature 0.9"
    flags = pebr.parse_flags(words(flags))
    named, implied = pebr.resolve("warmup", flags), pebr.resolve("warmup", flags, named=False)
    assert (named.learning_rate, named.freeze_vision, named.gradient_checkpointing) == (0.5, False, True)
    assert implied.learning_rate == pebr.TOY["warmup"]["learning_rate"]  # training flags: the named stage's
    assert named.temperature == implied.temperature == 0.9


def test_the_warmups_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_as_a_cosine():
    rates = [pebr.warmup_learning_rate(step, 100, Config(learning_rate=1.0)) for step in range(1, 101)]
    assert rates[:11] == pytest.approx([*(0.1 * i for i in range(1, 11)), 1.0])
    assert rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3  # half-way between steps 11 and 101


def test_wrong_flags_stop_before_the_first_stage_with_a_message_that_names_them(tmp_path, toy):
    table = [
        ("--test_data /no/such/file.json", "/no/such/file.json: no such file"),
        ("--from_model x", "--from_model and --from_data belong to one stage"),
        ("--stage percept", "--stage percept: must be one of"),
        ("--stage perception --group_size 1", "--group_size 1"),
        ("--stage perception --batch_size 10 --update_batch_size 4", "a multiple of --update_batch_size 4"),
        (
            "--stage perception --model x --from_model x --from_data y",
            "--stage perception needs --clip_model",
        ),
        (f"--stage perception --model x --sft_data {toy}/sft.json", "--stage sample needs --train_data"),
        ("--stage warmup --model x", "--stage warmup needs --sft_data"),
        ("--stage evaluate --clip_model local-dir:/no/folder", "--clip_model local-dir:/no/folder"),
        ("--seed 5", "was made with --seed 0, not 5"),
    ]
    run_dir = new_run(toy, tmp_path / "run")
    for argv, reason in table:
        with pytest.raises(SystemExit, match=reason):
            run(run_dir, argv, "--mixed_precision no")
    assert not any((run_dir / stage).exists() for stage in pebr.ORDER)


def own_code(folder):
    """The folder names code of its own for everything."""
    evil = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"), "evil.Evil")
    for path in (folder / "config.json", folder / "processor_config.json"):
        evil_config = {"auto_map": evil, "model_type": "new", "processor_class": "New"}
        path.write_text(json.dumps(read_json(path) | evil_config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def pickled_model(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(folder / "ran")}, folder / "pytorch_model.bin")


def change_bytes(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


def test_a_broken_model_folder_gives_the_librarys_message_and_runs_no_code(toy, cfg, tmp_path):
    table = [
        (shutil.rmtree, "Repo id must be"),
        (lambda f: (f / "config.json").write_text('{"a'), "Unterminated string"),
        (lambda f: (f / "processor_config.json").unlink(), "image processor"),
        (lambda f: (f / "chat_template.jinja").unlink(), "no processor with a chat template"),
        (lambda f: os.truncate(f / "model.safetensors", 10_000), "deserializing header"),
        (lambda f: change_bytes(f / "model.safetensors", b"lm_head", b"no_head"), "weights lack lm_head.w"),
        (pickled_model, "model.safetensors"),
        (own_code, "trust_remote_code"),
    ]
    for i, (change, reason) in enumerate(table):
        folder = shutil.copytree(toy / "model", tmp_path / str(i))
        change(folder)
        with pytest.raises(ConfigError, match=f"(?s){folder}.*{reason}"):
            pebr.load_policy(str(folder), cfg)
        assert not (folder / "ran").exists()


def test_two_steps_of_each_training_stage_move_parameters_and_the_folder_reloads(toy_run):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    for stage, start in (("warmup", "toy/model"), ("perception", "warmup"), ("reasoning", "warmup")):
        folder, records = toy_run / stage, read_lines(toy_run / stage / "metrics.jsonl")
        assert [r["step"] for r in records] == [1, 2] and records[0].keys() == records[1].keys()
        assert all(0 < r["grad_norm"] < 100 for r in records)
        assert stage == "warmup" or {r["learning_rate"] for r in records} == {1e-4}  # constant
        assert {"peak_gib", "update_s", "tokens_per_s"} <= read_lines(folder / "timing.jsonl")[0].keys()
        assert read_json(folder / "settings.json")["max_steps"] == 2
        assert (folder / "done").exists() and not list(folder.glob("checkpoint*"))
        before, after = weights_of(toy_run / start), weights_of(folder)
        moved = {n for n in after if (after[n] - before[n]).abs().max() > 5e-5}  # not by weight decay alone
        assert any("visual" in name for name in moved) and "lm_head.weight" in moved
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert torch.equal(model.lm_head.weight, after["lm_head.weight"]) and after.keys() == before.keys()
        assert AutoProcessor.from_pretrained(folder).chat_template


def test_samples_split_and_table_are_what_the_readme_promises(toy_run):
    samples = read_lines(toy_run / "perception" / "samples.jsonl")
    assert len(samples) == 2 * 4 * 2  # steps x questions x G
    assert {"qid", "completion", "truncated", "reward", "parts", "advantage"} <= samples[0].keys()
    assert samples[0]["parts"].keys() == {"clip", "cosine", "keyword", "format", "length", "accuracy"}
    split = sum((read_json(toy_run / "sample" / f"{name}.json") for name in ("easy", "medium", "hard")), [])
    assert sorted(split, key=str) == sorted(read_json(toy_run / "toy" / "train.json"), key=str)  # unchanged
    table = (toy_run / "evaluate" / "test" / "table.txt").read_text()
    named = ("base", "warmup", "perception", "reasoning", "greedy", "sampled", "95 %", "pass@2")
    assert all(word in table for word in named)
    scores = read_json(toy_run / "evaluate" / "test" / "base" / "scores.json")
    assert scores["greedy"]["n"] == TINY.test_rows and len(scores["sampled"]["interval_95"]) == 2
    assert set(scores["greedy"]["categories"]) <= {"count", "subtract", "price"}


HOSTILE = """ "'><script>alert(1)</script><img src=x onerror=alert(1)></p></style></article><a href="javascript:0">"""


def tags_and_text(page):
    """The kinds of tags that a browser sees, with the names of their attributes, and the text between them."""
    parser, tags, text = HTMLParser(), set(), []
    parser.handle_starttag = lambda tag, attributes: tags.add((tag, *(name for name, _ in attributes)))
    parser.handle_data = text.append
    parser.feed(page.read_text())
    return tags, "".join(text)


def spoiled(value):
    if isinstance(value, dict):
        return {name: item if name == "images" else spoiled(item) for name, item in value.items()}
    return [*map(spoiled, value)] if type(value) is list else value + HOSTILE if type(value) is str else value


def test_the_report_shows_all_stages_and_no_text_of_models_and_data_becomes_a_tag(toy_run, tmp_path):
    run_dir = shutil.copytree(toy_run, tmp_path / "run", symlinks=True)
    tags, text = tags_and_text(run_dir / "report.html")
    assert ("img", "alt", "src") in tags and "Evaluation" in text and "Difficulty" in text
    assert all(f"{stage}, step 2" in text for stage in ("warmup", "perception", "reasoning"))
    for path in [
        run_dir / "sample/hard.json",
        *run_dir.rglob("samples.jsonl"),
        *run_dir.rglob("pred*.jsonl"),
    ]:
        lines = [read_json(path)] if path.suffix == ".json" else read_lines(path)
        path.write_text("".join(json.dumps(spoiled(line)) + "\n" for line in lines))
    for name, folders in (("train", ("perception", "reasoning")), ("test", ("evaluate", "evaluate/test"))):
        path = run_dir / f"{name}.json"
        path.write_text(json.dumps(spoiled(read_json(toy_run / "toy" / path.name))))
        moved = {"from_data": str(path), "data": str(path), "image_root": f"{toy_run}/toy"}
        for settings in (run_dir / folder / "settings.json" for folder in folders):
            settings.write_text(json.dumps(read_json(settings) | moved))
    pebr.write_report(run_dir)
    hostile_tags, hostile_text = tags_and_text(run_dir / "report.html")
    assert hostile_tags == tags and hostile_text.count(HOSTILE.strip()) > 100


def test_the_report_marks_keywords_and_sections_and_reads_the_end_of_a_long_torn_file(toy_run, tmp_path):
    page = pebr.gallery(Row("", "1", "<image>q", "2", [], ["red dot", "cat"]), ["head"], [GOOD])
    assert '<span class="k1">red dot</span>, <span class="k0">cat</span>' in page
    assert '<p class="description"><small>Image Description</small> Two red dots. </p>' in page
    run_dir = shutil.copytree(toy_run, tmp_path / "run", symlinks=True)
    samples, report = run_dir / "perception" / "samples.jsonl", (run_dir / "report.html").read_bytes()
    samples.write_text(json.dumps("x" * 2**20) + "\n" + samples.read_text() + '{"torn": ')
    pebr.write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == report


def test_a_done_stage_is_kept_and_redone_from_its_seed_without_those_after_it(toy_run, tmp_path, capsys):
    run_dir = shutil.copytree(toy_run, tmp_path / "run", symlinks=True)
    flags, names = small("perception", toy_run), ("metrics.jsonl", "samples.jsonl", "model.safetensors")
    contents = lambda folder: [(folder / "perception" / name).read_bytes() for name in names]
    with spread_rewards():
        run(run_dir, flags, "--temperature 1.0")
        assert "perception is done; --overwrite makes it again" in capsys.readouterr().out
        assert contents(run_dir) == contents(toy_run) and (run_dir / "evaluate").exists()
        run(run_dir, flags, "--temperature 1.0 --overwrite")
        assert contents(run_dir)[0] != contents(toy_run)[0]
        assert not (run_dir / "reasoning").exists() and (run_dir / "sample" / "done").exists()
        run(run_dir, flags, "--overwrite")
        assert contents(run_dir) == contents(toy_run)  # line by line


def test_missing_stages_are_made_first_and_an_empty_split_says_what_to_do(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(pebr.TOY["warmup"], "max_steps", 2)  # a flag would not be for it
    run_dir = new_run(toy, tmp_path / "run")
    with pytest.raises(SystemExit, match="easy.json: no rows"):  # the untrained model gets nothing right
        run(run_dir, "--stage perception --group_size 2 --max_new_tokens 16 --max_steps 1")
    assert len(read_lines(run_dir / "warmup" / "metrics.jsonl")) == 2
    assert [stage for stage in pebr.ORDER if (run_dir / stage / "done").exists()] == ["warmup", "sample"]


STOPPING_ROWS = [
    (lambda row, folder: row.update(images=["none.png"]), "picture none.png is not in"),
    (lambda row, folder: os.truncate(folder / "0.png", 60), "0.png is not readable"),
    (lambda row, folder: row.update(problem="red " * 70), r"\d+ tokens, over --max_length"),
    (lambda row, folder: row.pop("answer"), '"answer" is missing'),
]


@pytest.mark.parametrize("change, reason", STOPPING_ROWS)
def test_a_broken_row_stops_the_run_or_is_dropped(change, reason, toy, toy_run, tmp_path, capsys):
    rows = read_json(toy / "train.json")[:4]
    for i, row in enumerate(rows):
        row["images"] = [Path(picture(tmp_path / f"{i}.png")).name]
    change(rows[0], tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = f"{small('reasoning', toy_run)} --from_data {tmp_path}/rows.json"
    with pytest.raises(SystemExit, match=f"(?s)1 broken rows.*rows.json row 0: .*{reason}.*--skip_bad_rows"):
        run(new_run(toy, tmp_path / "run"), flags)
    assert not (tmp_path / "run" / "reasoning" / "metrics.jsonl").exists()
    run(tmp_path / "run", flags, "--skip_bad_rows")
    assert re.search(f"(?s)dropped: .*rows.json row 0: .*{reason}", capsys.readouterr().out)
    samples = read_lines(tmp_path / "run" / "reasoning" / "samples.jsonl")
    assert {s["qid"] for s in samples} == {row["qid"] for row in rows[1:]}


def test_a_run_folder_that_is_in_use_is_refused(toy, tmp_path):
    with open(new_run(toy, tmp_path / "run") / "run.lock", "w") as lock:
        pebr.fcntl.flock(lock, pebr.fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another run is using"):
            run(tmp_path / "run", "--stage warmup")


def test_out_of_memory_names_the_flags_and_other_errors_are_not_hidden(toy, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError(reason)

    monkeypatch.setattr(pebr, "warmup", fails)
    run_dir, reason = new_run(toy, tmp_path / "run"), "CUDA out of memory."
    with pytest.raises(SystemExit, match="out of memory. Lower --micro_batch_size"):
        run(run_dir, "--stage warmup")
    reason = "something else"
    with pytest.raises(RuntimeError, match=reason):
        run(run_dir, "--stage warmup")


def test_a_reward_that_is_missing_or_not_finite_stops_with_its_row(toy, toy_run, tmp_path, monkeypatch):
    run_dir = new_run(toy, tmp_path / "run")
    for parts in ({"format": 1.0}, {"accuracy": math.nan, "format": 1.0}):
        monkeypatch.setattr(pebr, "score_parts", lambda rows, *_: [dict(parts) for _ in rows])
        with pytest.raises(ValueError, match=r"train.json row \d+.*accuracy"):
            run(run_dir, small("reasoning", toy_run))


def test_a_dry_run_measures_full_length_steps(toy, tmp_path, capsys):
    run_dir, sizes = new_run(toy, tmp_path / "run"), "--batch_size 2 --update_batch_size 2 --group_size 2"
    run(run_dir, f"--stage dryrun {sizes} --max_new_tokens 9")
    measured = json.loads(capsys.readouterr().out.split("DRYRUN ")[1])
    assert min(measured[name] for name in ("rollout_s", "update_s", "tokens_per_s", "peak_gib")) > 0
    samples = read_lines(run_dir / "dryrun" / "samples.jsonl")
    assert {s["tokens"] for s in samples} == {9} and all(s["truncated"] for s in samples)
    assert measured["rl_hours"] >= 0 and not (run_dir / "dryrun" / "model.safetensors").exists()


def test_difficulty_is_all_some_or_none_right_of_exactly_n():
    rows = [Row("", str(i), "q", "a") for i in range(4)]
    scores = {"0": [1.0] * 8, "1": [1.0] + [0.0] * 7, "2": [0.0] * 8, "3": [1.0] * 7 + [0.0]}
    split = {name: [r.qid for r in part] for name, part in pebr.split_by_difficulty(rows, scores, 8).items()}
    assert split == {"easy": ["0"], "medium": ["1", "3"], "hard": ["2"]}
    for n in (7, 16):
        with pytest.raises(DataError, match=f"{n} scores, not 8"):
            pebr.split_by_difficulty(rows[:1], {"0": [1.0] * n}, 8)


def test_steps_cover_each_epoch_once_and_do_not_depend_on_the_number_of_processes(monkeypatch):
    cfg, rows = Config(batch_size=12, update_batch_size=4), list(range(10))
    alone = [pebr.local_questions(rows, step, cfg) for step in range(5)]
    flat = [row for step in alone for _, row in step]
    assert all(sorted(flat[i : i + 10]) == rows for i in range(0, 60, 10)) and flat[:10] != flat[10:20]
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    for step in range(5):
        parts = []
        for process in range(2):
            monkeypatch.setattr(Accelerator, "process_index", process)
            parts.append(pebr.in_batches(pebr.local_questions(rows, step, cfg), 2))
        assert [a + b for a, b in zip(*parts)] == pebr.in_batches(alone[step], 4)


def calls_of(name, monkeypatch):
    """The arguments of each call of a function of pebr.py, from now on."""
    calls, real = [], getattr(pebr, name)
    monkeypatch.setattr(pebr, name, lambda *args: calls.append(args) or real(*args))
    return calls


def test_for_a_gpu_threads_make_the_prompts_while_the_batch_before_is_used(policy, cfg, toy, monkeypatch):
    rows, _ = data.load_rows(str(toy / "train.json"))
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda"))
    opened = calls_of("load_image", monkeypatch)
    broken = replace(rows[0], where="train.json row 9", images=["/none.png"])
    batches = [list(enumerate(rows * 10)), [(7, rows[0])], [], [(8, broken)]]  # enough for threads to meet
    ahead = pebr.encoded_ahead(iter(batches), lambda item: pebr.encode_prompt(policy, item[1], cfg, item[0]))
    prompts, end = next(ahead), time.monotonic() + 20
    while len(opened) < len(batches[0]) + 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(opened) == len(batches[0]) + 1  # the second batch's, too, though nobody has asked for it
    for prompt, (position, row) in zip(prompts, batches[0], strict=True):
        alone = pebr.encode_prompt(policy, row, cfg).inputs
        assert prompt.position == position and prompt.row is row and prompt.inputs.keys() == alone.keys()
        assert all(torch.equal(prompt.inputs[name], alone[name]) for name in alone)
    assert [prompt.position for prompt in next(ahead)] == [7] and next(ahead) == []
    with pytest.raises(DataError, match="train.json row 9: "):
        next(ahead)


def test_a_picture_is_opened_for_checking_once_in_a_run_folder(toy, toy_run, tmp_path, monkeypatch):
    """Sampling checks and asks; RL only asks; evaluation checks once for all models, then asks each twice."""
    run_dir, opened, counts = new_run(toy, tmp_path / "run"), calls_of("load_image", monkeypatch), {}
    shutil.copytree(toy_run / "warmup", run_dir / "warmup")
    for stage in pebr.ORDER[1:]:
        opened.clear()
        run(run_dir, "--stage", stage, SMALL)
        counts[stage] = len(opened)
        for name in ("easy", "medium"):  # as a better model would leave them; the pictures stay in the toy
            shutil.copy(toy / "train.json", run_dir / "sample" / f"{name}.json")
    assert set(Counter(opened).values()) == {1 + 4 * 2}  # four models, greedy and sampled
    assert counts["sample"] == 2 * TINY.rl_rows
    assert counts["perception"] == counts["reasoning"] == 2 * 4  # steps x questions


def test_only_this_runs_own_sampling_says_where_the_pictures_are(tmp_path, monkeypatch):
    row = {"qid": "0", "problem": "q", "answer": "a", "images": [Path(picture(tmp_path / "secret.png")).name]}
    for folder in (tmp_path / "run" / "sample", tmp_path / "other"):
        folder.mkdir(parents=True)
        (folder / "hard.json").write_text(json.dumps([row]))
        (folder / "summary.json").write_text(json.dumps({"image_root": os.path.relpath(tmp_path, folder)}))
    cfg = Config(run_dir=str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    for path in (
        f"{tmp_path}/run/sample/hard.json",
        "run/sample/hard.json",
        "run/sample/../sample/hard.json",
    ):
        [found] = pebr.checked_rows(path, cfg, None, ())
        assert found.images == [str(tmp_path / "secret.png")]
    with pytest.raises(DataError, match="picture secret.png is not in"):
        pebr.checked_rows(str(tmp_path / "other/hard.json"), cfg, None, ())


def night_sky(folder):
    """Not the toy: other pictures and questions, several pictures in a row, none in another, JSON and JSONL.
    Clear questions have one answer in the warm-up, the others two that contradict each other."""
    picture(folder / "moon.png", (60, 90), (240, 240, 200))
    picture(folder / "stars.jpg", (112, 56), (20, 20, 80))
    questions = [
        ("<image>What shines here ?", ["moon.png"], ["moon"]),
        ("<image> or <image> : which has stars ?", ["moon.png", "stars.jpg"], ["second"]),
        ("What is the night like ?", [], ["dark"]),
        ("<image>How bright ?", ["stars.jpg"], ["very", "hardly"]),
        ("<image>Which color ?", ["moon.png"], ["pale", "blue"]),
        ("Is it late ?", [], ["yes", "no"]),
    ]
    rl, sft, vocabulary = [], [], "user assistant".split()
    for i, (question, images, answers) in enumerate(questions):
        problem = question.removeprefix("<image>" * (len(images) == 1))
        row = {"qid": f"q{i}", "problem": problem, "images": images, "source": "sky"}
        rl.append(row | {"answer": answers[0], "key_words": ["night sky"]})
        for answer in answers:
            text = "### Image Description: a night sky .\n### Rationales: look ."
            text += f"\n### Let's think step by step.\n### Step 1: think .\n### The final answer is: {answer}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            sft.append({"messages": messages, "images": images})
            vocabulary += f"{question.replace('<image>', ' ')} {text}".split()
    (folder / "rl.json").write_text(json.dumps(rl))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rl)))
    (folder / "sft.json").write_text(json.dumps(sft * 2))
    data.build_toy_model(folder / "model", 0, TINY, vocabulary)


def test_a_second_data_set_goes_through_all_stages_in_one_form_of_a_prompt(toy, tmp_path, capsys):
    night_sky(tmp_path)
    files = f"--model {tmp_path}/model --train_data {tmp_path}/rl.json --sft_data {tmp_path}/sft.json"
    files += f" --test_data {tmp_path}/test.jsonl --clip_model local-dir:{toy}/clip"
    how = "--mixed_precision no --no-gradient_checkpointing --no-freeze_vision --temperature 0.7"
    how += " --max_new_tokens 32 --max_pixels 9000 --sample_max_pixels 9000 --learning_rate 3e-3"
    flags = f"{files} {how}"
    steps = "--max_steps 2 --batch_size 4 --update_batch_size 2 --learning_rate 1e-3"
    steps = dict.fromkeys(("perception", "reasoning"), steps)
    steps["warmup"], run_dir = "--max_steps 60 --batch_size 9 --update_batch_size 9", tmp_path / "run"
    for stage in pebr.ORDER:
        run(run_dir, "--stage", stage, flags, steps.get(stage, ""))
    easy, medium = (read_json(run_dir / "sample" / f"{name}.json") for name in ("easy", "medium"))
    assert {"q0", "q1"} <= {row["qid"] for row in easy} and len(medium) >= 2  # it finds answers
    assert easy[0]["source"] == "sky"  # rows as they came in, other fields included
    blind, printed = sum(not row["images"] for row in easy), capsys.readouterr().out
    assert blind and f"{blind} without a picture are left out" in printed
    assert "18 warm-up rows, 0 with an instruction of their own" in printed
    scores = read_json(run_dir / "evaluate" / "test" / "reasoning" / "scores.json")
    assert scores["greedy"]["n"] == 6 and scores["greedy"]["keyword"] > 0.5
    cfg = pebr.resolve("sample", pebr.parse_flags(words(flags)))
    policy = pebr.load_policy(cfg.model, cfg)
    ids = lambda row: tuple(pebr.encode_prompt(policy, row, cfg).inputs["input_ids"][0].tolist())
    sft, rl = ({ids(row) for row in data.load_rows(path)[0]} for path in (cfg.sft_data, cfg.train_data))
    assert sft == rl and len(rl) == 6  # token by token


def test_a_tsv_comes_out_for_the_kits_judge_and_nothing_is_asked_twice(toy, toy_run, tmp_path, monkeypatch):
    kinds, cell = ("shape", "shape", "color"), base64_picture()
    lines = [f"{i}\tWhich color ?\tred\tblue\tA\t{kind}\t{cell}" for i, kind in enumerate(kinds)]
    header = "index question A B answer category image".replace(" ", "\t")
    (tmp_path / "Kit_MINI.tsv").write_text("\n".join([header, *lines]))
    flags = f"--stage evaluate {SMALL} --from_model {toy_run}/warmup --test_data {tmp_path}/Kit_MINI.tsv"
    run(new_run(toy, tmp_path / "run"), flags, "--max_length 128")
    [path] = (tmp_path / "run" / "evaluate" / "Kit_MINI").glob("*/scores.json")
    with open(path.with_name("predictions_greedy.tsv"), newline="") as file:
        kit = list(csv.DictReader(file, delimiter="\t"))
    records = read_lines(path.with_name("predictions_greedy.jsonl"))
    assert [row["index"] for row in kit] == ["0", "1", "2"] and "image" not in kit[0] and kit[0]["A"] == "red"
    assert [row["prediction"] for row in kit] == [r["extracted"][0] or r["responses"][0] for r in records]
    scores = read_json(path)
    kinds = scores["greedy"]["categories"]
    assert kinds["color"]["n"] == 1 and kinds["shape"]["n"] == 2
    monkeypatch.setattr(pebr, "generate_rollouts", None)
    path.unlink()  # what is saved is scored again, and not asked again
    run(tmp_path / "run", flags, "--max_length 128")
    assert read_json(path) == scores
    with pytest.raises(SystemExit, match="is of another file or other settings"):
        run(tmp_path / "run", flags, "--max_length 128 --eval_temperature 0.1")


def test_interrupted_sampling_goes_on_to_the_lines_of_a_whole_run(toy_run, tmp_path, monkeypatch):
    path = shutil.copytree(toy_run, tmp_path / "run", symlinks=True) / "sample" / "rollouts.jsonl"
    sent, whole = calls_of("broadcast_object_list", monkeypatch), path.read_bytes()
    path.with_name("done").unlink()
    path.write_bytes(whole[: len(whole) // 2])  # with a torn last line
    run(tmp_path / "run", "--stage sample --generate_batch_size 4", SMALL)
    assert path.read_bytes() == whole and {len(record["scores"]) for record in read_lines(path)} == {2}
    [[[qids]]] = sent  # other processes need to know which questions are done, and not the answers
    assert 0 < len(qids) < TINY.rl_rows and all(qid.startswith("train") for qid in qids)


INTERRUPTED = [("warmup", 1, 0, "checkpoint-1"), ("perception", 2, 0, "checkpoint-1"), ("warmup", 1, 15, "")]


@pytest.mark.parametrize("stage, updates, minutes, left", INTERRUPTED)
def test_a_stage_resumes_to_the_same_files(stage, updates, minutes, left, toy_run, tmp_path, monkeypatch):
    """From the first step's checkpoint or, when fifteen minutes have not passed, from the start."""
    folder = new_run(toy_run / "toy", tmp_path / "run") / stage
    made, real = itertools.count(), pebr.optimizer_step
    flags = f"{small(stage, toy_run)} --checkpoint_minutes {minutes}"

    def dies_in_step_two(*args):
        if next(made) == updates:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, spread_rewards(), pytest.raises(KeyboardInterrupt):
        patch.setattr(pebr, "optimizer_step", dies_in_step_two)
        run(folder.parent, flags)
    assert "".join(path.name for path in folder.glob("checkpoint-*")) == left
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 1}\n{"step": 3, "lo')  # newer than the checkpoint, and torn
    with spread_rewards():
        run(folder.parent, flags)
    assert same_weights(folder, toy_run / stage)
    assert (folder / "metrics.jsonl").read_bytes() == (toy_run / stage / "metrics.jsonl").read_bytes()


def test_a_checkpoint_of_tied_weights_says_nothing(tied, toy, toy_run, tmp_path, caplog):
    flags = f"{small('reasoning', toy_run)} --from_model {tied} --checkpoint_minutes 0"
    run(new_run(toy, tmp_path / "run"), flags)
    assert "Removed shared tensor" not in caplog.text  # accelerate's line


def in_child(commands, log):
    """Command lines in a row in this process, as fresh ones; what they print goes into the file log."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    with spread_rewards():
        for argv in commands:
            pebr.main(argv)


def start(log, run_dir, seed, steps):
    """A process that makes all stages: a fork of one that has imported everything, so kills cost no start."""
    flags = f"--run_dir {run_dir} --seed {seed} --max_steps {steps} --checkpoint_minutes 0 --threads 1"
    commands = [words(small(stage, run_dir), flags, "--generate_batch_size 2") for stage in pebr.ORDER]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_pebr"])
    process = server.Process(target=in_child, args=(commands, str(log)))
    process.start()
    return process


def contents(run_dir):
    """{name: bytes} of what a run leaves, without clocks, paths and the toy: the same for all of a seed."""
    skipped = ("timing.jsonl", "settings.json", "run.lock")
    files = [p for p in run_dir.rglob("*") if p.is_file() and p.name not in skipped]
    names = {str(p.relative_to(run_dir)): p for p in files}
    return {name: p.read_bytes() for name, p in names.items() if not name.startswith("toy/")}


def kill_and_compare(folder, seed, runs, steps, rng):
    """All stages without a break; then `runs`, lists of stages to be killed (SIGKILL) in at a random moment,
    each time started again. Returns (what the kills hit, number of files compared, names that differ)."""
    log, hit, compared, differ, span = folder / "log.txt", Counter(), 0, [], 0.0
    for i, targets in enumerate([(), *runs]):
        run_dir, clock = folder / f"run{i}", time.monotonic()
        data.build_toy_world(str(run_dir / "toy"), seed, TINY)
        for stage in targets:
            process = start(log, run_dir, seed, steps)
            begun = rng.choice([f"{stage}/settings.json", f"{stage}/**/*.jsonl"])
            while process.is_alive() and not any(run_dir.glob(begun)):
                time.sleep(0.01)
            process.join(rng.uniform(0, span / 8))
            if process.is_alive():
                process.kill()
                process.join()
                at = next((s for s in pebr.ORDER[:4] if not (run_dir / s / "done").exists()), "evaluate")
                hit[at + " while a checkpoint was written" * (run_dir / at / "unfinished").exists()] += 1
        process = start(log, run_dir, seed, steps)
        process.join()
        assert process.exitcode == 0, log.read_text()[-3000:]
        found = contents(run_dir)
        if not targets:
            span, expected = time.monotonic() - clock, found
        compared += len(found) if targets else 0
        differ += [f"{i}/{name}" for name in expected | found if found.get(name) != expected.get(name)]
    return hit, compared, differ


def test_a_run_that_is_killed_at_random_moments_ends_with_the_files_of_one_that_is_not(tmp_path):
    targets = ("warmup", "perception", "evaluate")
    hit, compared, differ = kill_and_compare(tmp_path, 0, [targets], 3, random.Random(5))
    assert hit.total() >= 2 and compared > 40 and differ == []  # the last kill may come too late


def kills(runs="4", steps="10"):
    """The long form: every stage of so many runs is killed once, for two seeds. Prints a summary."""
    total = Counter()
    for seed in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            stages, rng, clock = [pebr.ORDER] * int(runs), random.Random(seed), time.monotonic()
            hit, compared, differ = kill_and_compare(Path(folder), seed, stages, int(steps), rng)
        print(f"\nseed {seed}: {hit.total()} kills, {time.monotonic() - clock:.0f} s;", end=" ")
        print(f"{compared} files compared, {len(differ)} differ {differ}")
        total += hit
    print(f"{total.total()} kills:", ", ".join(f"{count} in {name}" for name, count in total.most_common()))


# ------------------------------------------------------------------------------------------------------------
# Several processes

DRIVER = """
import sys
sys.path.insert(0, {folder!r})
import pebr
pebr.STAGE_REWARDS["reasoning"] = {{"length": 1.0}}  # accuracy is 0 in so small a model
score, save = pebr.score_rollouts, pebr.save_policy
pebr.score_rollouts = lambda rollouts, clip: [part | {{"length": float(len(r.tokens) % 5 > 2)}}
                                              for r, part in zip(rollouts, score(rollouts, clip))]
pebr.save_policy = lambda policy, model, folder: print("saves", type(model)) or save(policy, model, folder)
pebr.main(sys.argv[1:])
"""
FSDP2 = f"{Path(pebr.__file__).parent}/configs/fsdp2.yaml --num_processes 2 --main_process_port 29612"
LAUNCHERS = {
    "Policy": "",
    "DistributedDataParallel": "-m torch.distributed.run --nproc_per_node 2 --master_port 29611",
    "FSDPPolicy": f"-m accelerate.commands.launch --config_file {FSDP2}",
}


def three_updates(wrapper, model, toy, folder, *argv):
    """Weights, metrics, samples of three updates; of each one's four questions two have no picture."""
    new_run(toy, folder)
    rows = read_json(toy / "train.json")[:8]
    for row in rows[2:4] + rows[6:8]:
        row.update(images=[], problem=row["problem"].replace("<image>", ""))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "driver.py").write_text(DRIVER.format(folder=str(Path(pebr.__file__).parent)))
    files = f"--from_model {model} --from_data {folder}/rows.json --image_root {toy} --run_dir {folder}"
    sizes = "--update_batch_size 4 --group_size 3 --max_steps 3 --max_new_tokens 40 --threads 1"
    how = f"--stage reasoning {SMALL} --learning_rate 1e-4 --temperature 2.0"
    printed = run_script(LAUNCHERS[wrapper], f"{folder}/driver.py", how, files, sizes, *argv)
    assert f".{wrapper}'>" in printed and "Removed shared tensor" not in printed
    folder = folder / "reasoning"
    return weights_of(folder), read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl")


def test_two_processes_make_the_updates_of_one_by_ddp_and_by_fsdp2(toy, toy_run, tmp_path):
    """Ragged responses, tied groups, micro-batches without pictures on the second process only."""
    model, start = toy_run / "warmup", weights_of(toy_run / "warmup")
    (expected, metrics, samples), *others = (three_updates(w, model, toy, tmp_path / w) for w in LAUNCHERS)
    assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-4
    assert len({s["tokens"] for s in samples}) > 3 and 0 < metrics[0]["tied_groups"] < 1
    for weights, *logs in others:
        assert max((weights[name] - expected[name]).abs().max() for name in expected) < 1e-5
        assert [s["completion"] for s in logs[1]] == [s["completion"] for s in samples]
        for a, b in zip(logs[0], metrics, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_fsdp2_trains_tied_embeddings_in_bf16_from_an_equal_reference(tied, toy, tmp_path):
    bf16 = "--mixed_precision bf16 --gradient_checkpointing --max_new_tokens 12 --checkpoint_minutes 0"
    weights, metrics, _ = three_updates("FSDPPolicy", tied, toy, tmp_path / "run", bf16)
    assert all(w.dtype == torch.float32 for w in weights.values()) and "lm_head.weight" not in weights
    embedding = lambda weights: next(w for name, w in weights.items() if "embed_tokens" in name)
    before, after = embedding(weights_of(tied)), embedding(weights)
    assert (after - before).abs().max() > 1e-5 and metrics[2]["skipped_updates"] == 0
    assert metrics[0]["kl"] < 1e-4 and metrics[0]["sampler_gap"] < 0.05


def test_processes_wait_two_hours_for_the_one_that_writes(monkeypatch):
    seen, state = {}, pebr.PartialState
    monkeypatch.setattr(pebr, "PartialState", lambda **settings: seen.update(settings) or state(cpu=True))
    pebr.start_accelerator(Config(mixed_precision="no", threads=1))
    assert seen["timeout"].total_seconds() == 2 * 3600  # NCCL's ten minutes are too short for a checkpoint


def test_accelerate_launch_runs_the_papers_bf16_path_from_the_command_line(toy, toy_run, tmp_path):
    run_dir = new_run(toy, tmp_path / "run")
    bf16 = f"--run_dir {run_dir} --threads 1 --max_steps 1 --mixed_precision bf16 --gradient_checkpointing"
    run_script("-m accelerate.commands.launch", pebr.__file__, small("perception", toy_run), bf16)
    [metrics] = read_lines(run_dir / "perception" / "metrics.jsonl")
    assert 1e-6 < metrics["sampler_gap"] < 0.05 and metrics["kl"] < 0.05  # rounding, and not more


# ------------------------------------------------------------------------------------------------------------
# Measurements for the README, by hand: python test_pebr.py NAME


def peer_world(folder, image_side):
    """A 4 M parameter Qwen2.5-VL, 8 questions of 70 tokens around a picture, in files for both sides."""
    from transformers import AutoProcessor, GenerationConfig

    vocabulary, model, rl, rng = [f"w{i}" for i in range(2000)], folder / "model", [], random.Random(0)
    sizes = data.ToyConfig(hidden=256, vision_layers=4)
    data.build_toy_model(model, 0, sizes, ["user", "assistant", *vocabulary])
    processor = AutoProcessor.from_pretrained(model)
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 2000 * 28 * 28}
    processor.save_pretrained(model)
    ids = {name: getattr(processor.tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(model)  # a single end token, because TRL knows no more
    for i in range(8):
        picture(folder / f"{i}.png", (image_side, image_side), tuple(rng.choices(range(256), k=3)))
        problem = " ".join(rng.choices(vocabulary, k=59))
        rl.append({"qid": str(i), "problem": problem, "answer": "7", "images": [f"{i}.png"]})
    (folder / "rl.json").write_text(json.dumps(rl))
    (folder / "prompt.txt").write_text("{question}")


def train_with_trl(folder, steps, max_new_tokens):
    """The peer: TRL's GRPOTrainer on the same model, rows and settings."""
    from datasets import Dataset
    from transformers import AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    rows = read_json(Path(folder, "rl.json"))
    ask = lambda row: [{"role": "user", "content": row["problem"]}]
    rows = [{"prompt": ask(row), "image": Image.open(f"{folder}/{row['images'][0]}")} for row in rows]
    settings = GRPOConfig(
        output_dir=f"{folder}/trl", use_cpu=True, bf16=False, max_steps=int(steps), save_strategy="no",
        report_to=[], disable_tqdm=True, logging_steps=1000, learning_rate=1e-6, num_generations=8,
        per_device_train_batch_size=8, gradient_accumulation_steps=4, temperature=1.2, top_p=0.99, top_k=0,
        beta=0.01, gradient_checkpointing=False, max_completion_length=int(max_new_tokens),
        model_init_kwargs={"dtype": "float32"})  # fmt: skip
    clocks = []  # at each call of the reward, which is one a step

    def reward(completion_ids, **_):
        clocks.append(time.process_time())
        return [float(sum(ids) % 7) for ids in completion_ids]

    processor = AutoProcessor.from_pretrained(f"{folder}/model", padding_side="left")
    train = dict(train_dataset=Dataset.from_list(rows * int(steps)), processing_class=processor)
    GRPOTrainer(model=f"{folder}/model", reward_funcs=reward, args=settings, **train).train()
    print_cost(clocks)


def train_with_pebr(folder, steps, max_new_tokens):
    """Ours, the reasoning stage from the command line."""
    score, clocks = pebr.score_rollouts, []
    pebr.score_rollouts = lambda *args: clocks.append(time.process_time()) or score(*args)
    files = f"--model {folder}/model --from_model {folder}/model --from_data {folder}/rl.json"
    sizes = f"--batch_size 4 --update_batch_size 4 --max_new_tokens {max_new_tokens} --max_pixels 2000000"
    how = f"--max_steps {steps} --mixed_precision no --no-gradient_checkpointing"
    run(f"{folder}/run", f"--stage reasoning --prompt_file {folder}/prompt.txt", files, sizes, how)
    print_cost(clocks)


def print_cost(clocks=()):
    """Peak MiB; median of the CPU seconds from reward to reward, without the first: it wakes libraries."""
    seconds = [after - before for before, after in itertools.pairwise(clocks)][1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print("COST", peak, statistics.median(seconds or [0]))


def imports(module="json"):
    """What a side needs before it has a model."""
    importlib.import_module(module)
    print_cost()


def bench_trl(steps="3"):
    """One GRPO step here and in TRL (pip install trl==1.16.0 datasets==5.2.0), 4 questions x 8 responses."""

    def measure(name, *arguments):
        printed = run_script("-W ignore", __file__, name, *arguments)
        return tuple(map(float, printed.split("COST")[1].split()[:2]))

    (theirs, _), (ours, _) = measure("imports", "trl.trainer.grpo_trainer"), measure("imports")
    print(f"imports alone: TRL {theirs:.0f} MiB, pebr.py {ours:.0f} MiB\n")
    print("| prompt : completion | TRL, CPU s | pebr.py, CPU s | speed | TRL, MiB | pebr.py, MiB", end="")
    print(" | ratio | less imports |\n" + "|---" * 8 + "|")
    for side, length in ((392, 64), (560, 128), (392, 256), (196, 448)):
        with tempfile.TemporaryDirectory() as folder:
            peer_world(Path(folder), side)
            names = ("train_with_trl", "train_with_pebr")
            (trl, trl_s), (own, own_s) = (measure(name, folder, 2 + int(steps), length) for name in names)
        seconds = f"{trl_s:.2f} | {own_s:.2f} | {trl_s / own_s:.1f}x | {trl:.0f} | {own:.0f}"
        ratios = f"{own / trl:.2f} | {(own - ours) / (trl - theirs):.2f}"
        print(f"| {(side // 28) ** 2 + 70} : {length} | {seconds} | {ratios} |", flush=True)


STAGE_COMMANDS = {"trl": bench_trl, "train_with_trl": train_with_trl, "train_with_pebr": train_with_pebr,
                  "imports": imports, "kills": kills}  # fmt: skip
# ------------------------------------------------------------------------------------------------------------
# The README: its flags exist, its patches apply and train

ROOT = Path(pebr.__file__).parent
README = (ROOT / "README.md").read_text()
PATCHES = re.findall(r"\n([^\n]+)\n```diff\n(.*?)```", README, re.DOTALL)


def patched(name, text, patch):
    """The file's text after those hunks of a README patch that are for it. Each has to fit exactly once."""
    file, hunks = re.fullmatch(r"\+\+\+ (\S+)\n(.*)", patch, re.DOTALL).groups()
    for hunk in hunks.split("@@\n") if file == name else ():
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        assert old and text.count(old) == 1, hunk
        text = text.replace(old, new)
    return text


def test_flags_that_the_readme_names_exist():
    ours = {f.name for f in pebr.fields(Config)}
    theirs = {"num_processes", "config_file", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
              "multi_gpu", "help", "mode", "data", "work-dir"}  # fmt: skip
    named = {name.removeprefix("no-") for name in re.findall(r"--([a-z][\w-]+)", README)}
    assert named - theirs <= ours and len(named & ours) > 25


@pytest.mark.parametrize("title, patch", PATCHES, ids=[title.split()[0] for title, _ in PATCHES])
def test_a_patch_of_the_readme_applies_and_takes_two_steps(title, patch, toy, toy_run, tmp_path):
    if "peft" in patch:
        pytest.importorskip("peft")
    names, rows = ("rewards", "data", "pebr"), json.loads((toy / "train.json").read_text())
    if "data.py" in patch:
        rows = [{"text": row["problem"].replace("<image>", ""), "label": row["answer"]} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name in names:
        text = (ROOT / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(patched(f"{name}.py", text, patch))
    files = f"--from_model {toy_run}/warmup --from_data {tmp_path}/rows.json --image_root {toy}"
    argv = words("--run_dir", new_run(toy, tmp_path / "run"), "--stage reasoning --threads 1", SMALL, files)
    with pytest.MonkeyPatch.context() as patch_modules:
        patch_modules.syspath_prepend(str(tmp_path))
        for name in names:
            patch_modules.delitem(sys.modules, name)
        fork = importlib.import_module("pebr")
        assert fork.__file__.startswith(str(tmp_path))
        fork.STAGE_REWARDS["reasoning"] |= {"length": 1e-3}  # with accuracy 0 all groups are tied
        fork.score_rollouts = spread(fork.score_rollouts)
        fork.main(argv)
    pebr.AttentionInterface.register("shared_prefix", pebr.shared_prefix_attention)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "reasoning" / "metrics.jsonl")] == [1, 2]
    assert not same_weights(tmp_path / "run" / "reasoning", toy_run / "warmup")


def spread(score):
    """A reward that is not the same for all responses of so small a model."""
    return lambda rollouts, clip: [
        part | {"length": float(i % 2)} for i, part in enumerate(score(rollouts, clip))
    ]


def test_departures_are_numbered_in_the_header_and_cited_in_the_code():
    header = set(map(int, re.findall(r"^\s*\[(\d+)\]", pebr.__doc__, re.MULTILINE)))
    code = "".join((ROOT / name).read_text() for name in ("pebr.py", "rewards.py", "data.py")).replace(
        pebr.__doc__, ""
    )
    assert header == set(range(1, 15)) and header <= set(map(int, re.findall(r"\[(\d+)\]", code)))


# ------------------------------------------------------------------------------------------------------------
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
    vision = dict(
        vision, num_heads=16 if shape == "3B" else 4, out_hidden_size=text["hidden_size"], window_size=112
    )
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
    """As load_policy does for --fast and --no-fast."""
    policy.fast = engine == "fast"
    varlen = policy.fast and torch.cuda.is_available() and pebr.accelerator.mixed_precision == "bf16"
    policy.model.config.text_config._attn_implementation = "shared_prefix" if policy.fast else "sdpa"
    policy.model.config.vision_config._attn_implementation = "varlen_flash" if varlen else "sdpa"


def make_prompts(policy: pebr.Policy, cfg, count: int, length: int) -> list:
    """Prompts of `length` tokens, each with a picture of cfg.max_pixels; 28 x 28 pixels are a token."""
    policy.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": cfg.max_pixels}
    side = round(cfg.max_pixels**0.5)
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        Image.effect_noise((side, side), 100).convert("RGB").save(file.name)

        def prompt(i, words):
            row = Row("", str(i), " ".join(f"w{(i + k) % 100}" for k in range(words)), "1", [file.name])
            return pebr.encode_prompt(policy, row, cfg, i)

        words = 1 + length - prompt(0, 1).inputs["input_ids"].shape[1]
        return [prompt(i, words) for i in range(count)]


def gpu_setup(precision: str, **settings) -> Config:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pebr.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    settings = dict(kl_coef=0.0, group_size=8, temperature=1.0, generate_batch_size=1024) | settings
    pebr.read_instruction = lambda _: "{question}"  # prompts of an exact length
    return Config("reasoning", mixed_precision=precision, **settings)


def timed(work):
    """(result, seconds, peak GiB); without a GPU the peak is 0."""
    cuda = torch.cuda if torch.cuda.is_available() else None
    cuda and (cuda.synchronize(), cuda.reset_peak_memory_stats())
    start, result = time.perf_counter(), work()
    cuda and cuda.synchronize()
    return result, time.perf_counter() - start, cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def time_rollout(policy: pebr.Policy, prompts: list, C: int, cfg):
    """(seconds, GiB, bytes to read, figures): G rollouts to each prompt, all of C tokens."""
    policy.banned_ids = sorted({*policy.banned_ids, *policy.end_ids})
    work = lambda: pebr.generate_rollouts(
        policy, prompts, cfg.group_size, replace(cfg, max_new_tokens=C), "gpu"
    )
    rollouts, seconds, gib = timed(work)
    assert {len(r.tokens) for r in rollouts} == {C}
    text, T = policy.model.config.text_config, prompts[0].inputs["input_ids"].shape[1]
    # Bytes in bf16, of a token's keys and values and of the weights; the embedding is the head, too.
    kv = 4 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    weights = 2 * sum(p.numel() for p in policy.model.get_decoder().parameters())
    # Each step must read the weights, every prompt's keys and values once, and those of every response.
    must_read = sum(weights + kv * (len(prompts) * T + len(rollouts) * step) for step in range(1, C))
    with torch.no_grad(), pebr.accelerator.autocast():
        forward = [policy(batch, cfg.temperature)[0] for batch in pebr.in_batches(rollouts[:16], 8)]
    gap = (torch.cat(forward).cpu() - torch.stack([r.old_logprobs for r in rollouts[:16]])).abs()
    return seconds, gib, must_read, {"sampler_gap": float(gap.mean()), "largest log ratio": float(gap.max())}


def one_update(policy: pebr.Policy, rollouts: list, optimizer, cfg) -> None:
    """As train_grpo has it, without a reference. Plain SGD: Adam's states would take 28 GiB more for the 3B."""
    policy.train()
    for batch in pebr.in_batches(rollouts, cfg.micro_batch_size):
        with pebr.accelerator.autocast():
            logprobs, _, mask = policy(batch, cfg.temperature)
        adv = torch.arange(len(batch), device=mask.device) % 3 - 1.0
        loss, _ = pebr.grpo_loss(logprobs, logprobs.detach(), None, adv, mask, mask.sum(), cfg)
        pebr.accelerator.backward(loss)
    pebr.optimizer_step(policy, optimizer, Counter(loss=loss.detach()), 1e-6, cfg)


def time_update(policy: pebr.Policy, prompts: list, C: int, cfg):
    """(seconds, GiB, FLOPs, figures): one update on G random responses of C tokens to each prompt."""
    rollouts = rollouts_of(
        [p for p in prompts for _ in range(cfg.group_size)], [C] * cfg.group_size * len(prompts)
    )
    model, seen, optimizer = policy.model, Counter(), torch.optim.SGD(policy.parameters(), lr=1e-6)
    count = lambda _, args, x: seen.update(tokens=x["input_ids"].numel(), patches=len(x["pixel_values"]))
    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    _, seconds, gib = timed(lambda: one_update(policy, rollouts, optimizer, cfg))
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
    cfg = gpu_setup("no", max_pixels=56 * 56, group_size=1, temperature=0.0, max_new_tokens=64)
    policy, results = build_policy("toy", pebr.accelerator.device), {}
    prompts = [prompt for length in (20, 33, 50) for prompt in make_prompts(policy, cfg, 2, length)]
    lengths = [9, 1, 4, 7, 3, 2, 5, 5, 12, 12, 8, 1, 30, 30, 30, 2, 2, 1]
    rollouts = rollouts_of([p for p in prompts for _ in range(3)], lengths)
    for engine in ("fast", "plain"):
        choose_engine(policy, engine)
        greedy = [r.tokens.tolist() for r in pebr.generate_rollouts(policy, prompts, 1, cfg, "gpu")]
        policy.train().zero_grad()
        logprobs, _, mask = policy(rollouts, 1.2)
        advantages = torch.arange(18, device=mask.device) % 3 - 1.0
        (logprobs * mask * advantages[:, None]).sum().backward()
        results[engine] = greedy, [logprobs.detach()], [p.grad for p in policy.parameters()]
    (tokens, *fast), (expected, *plain) = results.values()
    show("greedy responses", lambda: {"equal": sum(map(list.__eq__, tokens, expected)), "of": len(expected)})
    for what, ours, theirs in zip(("log-probs", "gradients"), fast, plain):
        largest = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        scale = max(float(b.abs().max()) for b in theirs)
        show(what, lambda: {"largest difference": largest, "over the largest value": largest / scale})


FSDP_FLAGS = """--stage reasoning --max_steps 8 --checkpoint_minutes 0 --batch_size 4
    --update_batch_size 2 --group_size 2 --max_new_tokens 40 --learning_rate 1e-5 --threads 1""".split()
FSDP_DRIVER = """
import sys, torch
sys.path.insert(0, {folder!r})
import pebr, rewards
torch.use_deterministic_algorithms(True, warn_only=True)
rewards.STAGE_REWARDS["reasoning"] = {{"length": 1.0}}
pebr.score_rollouts = lambda rollouts, _: [{{"length": len(r.tokens) % 5 / 4}} for r in rollouts]  # accuracy is 0
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
        launch = [
            "accelerate.commands.launch",
            "--config_file",
            f"{root}/configs/fsdp2.yaml",
            "--num_processes",
            "1",
        ]
        command = [
            sys.executable,
            "-m",
            *launch,
            "--main_process_port",
            "0",
            f"{folder}/driver.py",
            *FSDP_FLAGS,
        ]
        paths = (
            f"--run_dir {folder}/{name} --from_model {folder}/toy/model --from_data {folder}/toy/train.json"
        )
        return subprocess.Popen([*command, *paths.split()], env=environment)

    def kill_and_resume(folder):
        data.build_toy_world(f"{folder}/toy", 0, data.ToyConfig(8, 8, 0, 4, clip_steps=1, clip_batch=4))
        Path(folder, "driver.py").write_text(FSDP_DRIVER.format(folder=str(root)))
        whole, killed, stage = run(folder, "whole"), run(folder, "killed"), Path(folder, "killed/reasoning")
        while not any(stage.glob("checkpoint-[2-6]")):
            assert killed.poll() is None, "the run ended before it was killed"
            time.sleep(0.005)
        sharded = any("fsdp" in path.name for path in stage.glob("checkpoint-*/*"))
        kill_tree(killed)
        steps = len((stage / "metrics.jsonl").read_text().splitlines())
        assert (whole.wait(), run(folder, "killed").wait()) == (0, 0), "a run failed"
        a, b = (read_lines(Path(folder, name, "reasoning/metrics.jsonl")) for name in ("whole", "killed"))
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
    cfg = gpu_setup("bf16", max_pixels=(56 if tiny else 840) ** 2)
    flops, bandwidth = ceilings(tiny, pebr.accelerator.device)
    show("ceilings", lambda: {"TFLOP/s": flops / 1e12, "TB/s": bandwidth / 1e12})
    policy, seconds_of = build_policy("toy" if tiny else "3B", pebr.accelerator.device), {}
    policy.model.activation_checkpointing_enable()
    few, many, short, long = (2, 4, 6, 12) if tiny else (8, 32, 512, 2048)
    prompts = make_prompts(policy, cfg, many, 40 if tiny else 1000)

    def measure(work, engine, P, C, ceiling):
        choose_engine(policy, engine)
        work(policy, prompts[:1], 2 if work is time_rollout else C, cfg)  # loads kernels
        seconds, gib, needed, figures = work(policy, prompts[:P], C, cfg)
        fast = seconds_of.setdefault((work, P, C), seconds)  # the fast engine comes first
        rates = {
            "tokens/s": P * cfg.group_size * C / seconds,
            "share of the ceiling": needed / ceiling / seconds,
        }
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


GPU_COMMANDS = {"gpu": gpu}


COMMANDS = {**REWARD_COMMANDS, **STAGE_COMMANDS, **GPU_COMMANDS}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
