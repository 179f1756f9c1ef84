"""What is true of PeBR: python -m pytest -q (no network, no GPU, deterministic). Everything is built here.
Measurements: python test_pebr.py NAME."""

import base64
from collections import Counter
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
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from xml.etree import ElementTree

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from PIL import Image, ImageDraw
import pytest
from safetensors.torch import load_file, save_file
import torch
import torch.nn.functional as F
from torch.distributed.utils import _to_kwargs  # what DDP and FSDP2 do to the inputs of a forward
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
import transformers as hf

import data
from data import DataError, Row
import pebr
from pebr import Config, ConfigError, Rollout
import rewards

torch.set_num_threads(1)
FEW = dict(sft_rows=16, rl_rows=8, test_rows=6)
TINY = data.ToyConfig(**FEW, hidden=64, text_layers=2, vision_layers=1, clip_steps=2, clip_batch=8)


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


def prompts_of(policy, cfg, tmp_path, pictures=([(56, 56)], [(112, 84)])):
    """One prompt per list of picture sizes, of different lengths."""
    prompts = []
    for i, sizes in enumerate(pictures):
        images = [picture(tmp_path / f"{i} {j}.png", size) for j, size in enumerate(sizes)]
        row = Row(f"row {i}", str(i), "red " * (2 * i + 1) + "<image> and " * len(images), "1", images)
        prompts.append(pebr.encode_prompt(policy, row, cfg, i))
    return prompts


# ---- Rewards, CLIP's last ----------------------------------------------------------------------------------

GOOD = """### Image Description: Two red dots. ### Rationales: Count. ### Let's think step by step.
### Step 1: One, two. ### Step 2: So two. ### The final answer is: 2"""
SEEN = "Two red dots."


@pytest.mark.parametrize("text, description, answer, well_formed", [
    (GOOD.upper().replace("LET'S", "LET’S").replace(" ### R", "\n\n###R"), SEEN.upper(), "2", True),
    (GOOD.replace("is: 2", "is:\n\n  **2**\n"), SEEN, "**2**", True),  # on a later line
    ("Sure! " + GOOD, SEEN, "2", False),  # text before the first section
    (GOOD.replace("### Rationales: Count. ", ""), SEEN, "2", False),  # section missing
    (GOOD.replace("Step 2", "Step 3"), SEEN, "2", False),  # steps out of order
    (GOOD + "\n### Image Description: A cat.", SEEN, "2", False),  # two descriptions: the first counts
    (GOOD.replace("is: 2", "is:"), SEEN, "", False),  # truncated before the answer's first token
    (GOOD + "\nI hope this helps.", SEEN, "2", False),  # the answer section holds only the result
    (GOOD.split("### Rationales")[0], "", "", False),  # truncated in the description: none
])  # fmt: skip
def test_sections_are_parsed_once_and_in_order(text, description, answer, well_formed):
    assert rewards.parse_response(text) == rewards.Response(description, answer, well_formed)


@pytest.mark.parametrize("description, key_words, reward", [
    ("a category", ["cat"], 0), ("13 dots at 3.5 cm", ["3"], 0), ("there are 3.", ["3"], 1),  # parts
    ("A RED\n circle", ["red circle"], 1), ("a red square and a circle", ["red circle"], 0),  # a phrase
    ("as it is", ["A", "I"], 0), ("the angle at A", ["A", "B"], 0.5),  # a point is no article or pronoun
    ("The X-axis and A dog", ["x-axis", "a dog"], 1), ("X-axis", ["x"], 0),  # one letter keeps its case
    ("red circles, a bus, some cherries, a dog", ["red circle", "buses", "cherry", "dogs"], 1),  # plurals
    ("buses, a cherry and dogs", ["bus", "cherries", "dog"], 1), ("a princess", ["princes"], 0),
    ("three dots, 5 lines", ["3", "five lines"], 1), ("the one on the left", ["1"], 0),  # a pronoun
    ("1,000 people, 3.0 m", ["1000", "3"], 1), ("a 3cm line", ["3", "3 cm"], 1),  # numbers, units
    ("a line of 3 cm", ["3cm"], 1), ("30% and 40 percent", ["30 percent", "40%", "0%"], 2 / 3),
    ("三角形在左边", ["三角形"], 1), ("c++ (2)", ["c++", "(2)"], 1), ("", ["cat"], 0),
])  # fmt: skip
def test_keyword_reward_is_the_share_of_whole_words_named(description, key_words, reward):
    assert rewards.keyword_reward(description, key_words) == reward


def test_parts_that_do_not_apply_are_left_out_and_length_pays_up_to_512_tokens(toy):
    scorer = rewards.ClipScorer(f"local-dir:{toy / 'clip'}", lo=-1.0, hi=2.0)
    image = Image.open(toy / "images" / "train0.png").convert("RGB")
    asked = pebr.Prompt(Row("", "1", "q", "2", [], ["red dot"]), [], {})
    seen = pebr.Prompt(Row("", "2", "q", "3", ["x"], []), [image], {})
    rollouts = Rollout(asked, torch.zeros(512), GOOD), Rollout(seen, torch.zeros(1024), GOOD)
    blind, wordless = rewards.score_parts(rollouts, scorer)
    assert blind == {"accuracy": 1, "format": 1, "length": 1, "keyword": 1}
    [cosine] = scorer.cosines([[image]], [SEEN])
    # the CLIP reward: from -1 to 2 is a scale of 3
    expected = {"accuracy": 0, "format": 1, "length": 0.5, "cosine": cosine, "clip": (cosine + 1) / 3}
    assert wordless == pytest.approx(expected)
    assert [scorer.scaled(cosine) for cosine in (-2, 3)] == [0, 1]  # clamped


def test_a_part_that_is_missing_or_not_finite_is_an_error_with_its_row():
    parts, weights = {"keyword": 1.0, "format": 1, "length": 1}, rewards.STAGE_REWARDS["perception"]
    for broken in ({}, {"clip": math.nan}, {"clip": math.inf}):
        with pytest.raises(ValueError, match="a.json row 7: the reward 'clip' is missing or not a finite"):
            rewards.total_reward(parts | broken, weights, "a.json row 7")


# Clear pairs of answer and gold (and choices), with a person's verdict
DEGREES, PETS, COLORS = ["135°", "140°", "145°", "150°"], ["a dog", "a cat"], ["red", "blue"]
SAME = [
    ("07", "7"), ("−7", "-7"), ("７", "7"), (".5", "0.5"), ("130.94", "130.9"), ("approximately 22.3", "22.3"),
    (r"\frac12", r"\frac{1}{2}"), ("1 1/2", r"\frac{3}{2}"), (r"1\frac{1}{2}", "1.5"), ("½", "1/2"),
    (r"\frac{16}{7}", r"$\boxed{\frac{16}{7}}$"), ("√41", r"$\sqrt{41}$"), (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt{6}}{6}", r"\frac{1}{\sqrt{6}}"), ("4 pi", r"4\pi"), (r"\[ 12 \]", "12"), ("5 apples", "5"),
    ("$(x+4)^2-5$", "x^2+8x+11"), (r"\angle A = 60^\circ", "60°"), ("69", "69{degrees}"), ("1,234", "1234"),
    ("13 dollars", "$13"), ("13 percent", r"$13 \%$"), ("5", "x=5"), ("1.2*10**3", "1200"), ("b", "B"),
    (r"3 \times 10^{-2}", "0.03"), ("1.5 million", "1500000"), ("2 billion", "2,000,000,000"), ("B)", "B"),
    ("{1, 2, 3}", r"\{3, 2, 1\}"), ("2014 and 2016", "[2014, 2016]"), (r"$x=8 \mathrm{~cm}$", "8"),
    ("g(x)=-3+x^2", "g(x)=x^2-3"), ("AB = 5", "5"), ("The answer is B.", "B"), ("Answer: (B) 8/11", "B"),
    ("C", "145°", DEGREES), ("five", "5"), ("U.S.", "US"), ("*5*", "5"), ("\"5\"", "5"), ("5厘米", "5"),
    ("quarter", "B", ["half", "quarter", "o'clock", "quarter to", "quarter past"]), ("60度", "60°"),
    (r"**$\frac{1}{2}$**", r"\frac{1}{2}"), ("答案：B", "B"), ("三角形", "三角形"), ("y=2x+5", "2x-y+5=0"),
    ("= 5", "5"), ("2x+1", "f(x)=1+2x"), ("-1<x\\le 3", "3 ≥ x > -1"), ("2x ≥ 4", "x ≥ 2"), ("选B", "B"),
    ("y ≤ 5", "5 >= y"), ("|x-3|", "|3-x|"), (r"y=\sin(2x)", r"y=\sin 2x"), ("5 meters per second", "5 m/s"),
    ("The area of the circle is 113.1 cm²", "113.1"), ("25 square centimeters", "25 cm^2"), ("33.3%", "1/3"),
    (r"\sqrt[3]{27}", "3"), ("(x,y)=(1,2)", "(1,2)"), ("x=±2", "x = 2 or x = -2"), ("6 to 8", "3:4"),
    ("(1, 2), (3, 4)", "(3,4) and (1,2)"), ("__5__", "5"), ("Yes, it is.", "yes"), ("the dogs", "dog"),
    ("domain: [-4,0) and range: (-3,1]", "range: (-3, 1], domain: [-4, 0)"), ("118°T", "118掳T"),
    ("5 = x", "5"), ("<b>5</b>", "5"), ("3:30 p.m.", "3:30 PM"), ("60^{o}", "60°"), ("x_1=1, x_2=2", "1, 2"),
    ("-inf", r"-\infty"), ("twenty-five", "25"), ("50 cm", "0.5 m"), ("36 km/h", "10 m/s"), ("2*21", "6*7"),
    ("2 liters", "2000 cm^3"), ("x > 3", "(3, ∞)"), (r"x \in (3, \infty)", "x > 3"), (r"\textnormal{5}", "5"),
    ("x<-1 or x>1", r"(-∞,-1) \cup (1,∞)"), (r"11,\! 111", "11111"), (r"\\frac{1}{2}", "1/2"), ("-2^2", "-4"),
    (r"\\(\\text{5}\\)", "5"), ("2(1+√3)", "2+2√3"), ("2^3^2", "512"), ("9" * 1_000, "9" * 1_000),
    ("(B) because it purrs", "B", PETS), ("145", "C", DEGREES), ("(a)", "B", ["(c)", "(a)"]),
    ("B", "A", ["5", "5"]), ("blue", "1", COLORS),
]  # fmt: skip
OTHER = [
    ("-7", "7"), ("1 4", "14"), ("51.04", "51.40"), ("0.3", "1/3"), (r"\pi-2", r"2-\pi"), ("7 m", "7 cm"),
    ("AB", "B"), ("2.5%", "25%"), ("(-4, 3)", "(3,-4)"), ("(-2,1)", "(-2,1]"), ("2014", "[2014, 2016]"),
    ("y = 2x + 5", "y=-2x+5"), ("3:45", "3:30"), ("A or B", "B"), ("Beth", "B"), ("No", "Yes"), ("", "5"),
    ("quarter past", "B", ["half", "quarter", "o'clock", "quarter to", "quarter past"]), ("not 5", "5"),
    ("No, because the yes bar is smaller", "Yes"), ("Italy and Mexico", "Italy"), ("5 6 7 8 9", "5"),
    ("$", "5"), ("nan", "5"), (r"\text{}", "5"), ("1e400", "1e500"), ("9^9^9^9", "1/2"), ("99999999!", "1/2"),
    ("²", "2"), ("9" * 100_000, "5"), ("(" * 80 + "1" + ")" * 80, "1/2"), (r"\frac" * 20_000, "5"),
    ("eval(\"1+1\")", "x/2"), ("1" + "+1" * 20_000, "1/2"), ("\ud800", "5"), ("y<5", "y≤5"), ("x-3", "|x-3|"),
    ("x=5", "y=5"), ("2", "2x"), ("x≤3", "x=3"), ("red", "der"), ("60%", "60°"), ("$5", "€5"), ("1/0", "0"),
    ("3 years", "3 months"), ("5 hundred", "5"), ("5 of 6", "5"), ("5-6", "5"), ("> 15", "15"), ("6*7", "42"),
    ("5 is wrong", "5"), ("x=5 or x=6", "x=5"), ("{1,2}", "{1,2,2}"), ("(3,100)", "3100"), ("15", "> 15"),
    ("(B) or (C)", "B"), ("Yes or no", "yes"), ("100000000001", "100000000000"), ("3:30 AM", "3:30 PM"),
    ("883.6", "883.57"), ("2(21)", "42"), ("84/2", "42"), ("6*7 cm", "42 cm"), ("1+1/2", "1.5"),
    ("(6*7, 1)", "(42, 1)"), ("50 cm", "0.5 m²"), ("x ≥ 3", "(3, ∞)"), ("(3, 5)", "x > 3"), ("1)+(2", "3"),
    ("9" * 1_001, "9" * 1_000), ("B. a dog", "B", PETS), ("B, it purrs", "B", PETS), ("1", "1", COLORS),
    ("a cat or a dog", "B", PETS), ("B", "C", ["D", "C", "B", "A"]), ("E", "A", COLORS),
    ("", "A", ["", "blue"]),
]  # fmt: skip
CLEAR = [(pair, True) for pair in SAME] + [(pair, False) for pair in OTHER]


def test_the_grader_gives_the_persons_verdict_on_all_clear_pairs():
    assert [pair for pair, verdict in CLEAR if rewards.grade(*pair) is not verdict] == []


def test_no_answer_makes_the_grader_fail_or_slow():
    rng = random.Random(0)
    pieces = r"\frac \sqrt \text{ \boxed{ and 1 234 23 0.5 1e9 cm m/s or yes ** sin ∪ million 1,234".split()
    pieces += [*"{}()[]^_+-*/=<≤|,.:%$1xyπ∞Bº°½²√的 \n", " and "]
    made = lambda: "".join(rng.choices(pieces, k=rng.choice([3, 10, 40, 150])))[:400]
    tests = [(made(), rng.choice([made(), "5", "x^2+1", "(1,2)", "y<3x", "red", "B"])) for _ in range(1_000)]
    long = [piece * (400 // len(piece)) for piece in pieces]
    inner = "9^ - π+ 1+ ,111 1e999* 7e999/3e-998* (x+1/97)^200*".split()
    long += ["1" + part * (390 // len(part)) + "1" for part in inner]
    long += ["(" * 199 + "1" + ")" * 199, "1 234" * 80, "1" + " " * 398 + "1"]
    tests += [*itertools.product(long, ("5", "x+1", "√2", "a b")), *(pair[:2] for pair, _ in CLEAR)]
    tests += [(piece * (400 // len(piece)), piece * (399 // len(piece))) for piece in pieces]
    gc.freeze()  # or a search for the garbage of other tests would count
    for answer, gold in tests:
        start = time.thread_time()
        rewards.grade(answer, gold), rewards.grade(answer, "B", [gold, "7"])
        assert time.thread_time() - start < 0.05, (answer, gold)


LOOK, STEP = "A red line of 7 cm, left of a blue square.", "Read the number."
END = "### The final answer is: "
HONEST = f"""### Image Description: {LOOK}
### Rationales: The length is written beside the line.
### Let's think step by step.
### Step 1: {STEP}
{END}7 cm"""
HACK_ROW = Row("", "1", "How long is the red line?", "7 cm", [], ["red line", "7", "blue square", "left"])
WORDS = "red line, 7, blue square, left, green line, circle, 3, right, black dot"
instead = HONEST.replace
HACKS = {  # the response; its keywords named, of 4; whether it has the format, and the right answer
    "none: an honest response": (HONEST, 4, 1, 1),
    "instruction parroted": (data.INSTRUCTION.split("exactly these sections:\n")[1], 0, 1, 0),
    "only the answer": ("7 cm", 0, 0, 0),
    "empty description": (instead(LOOK, ""), 0, 0, 1),
    "every keyword of the data set": (instead(LOOK, WORDS), 4, 1, 1),
    "every number": (instead(LOOK, "1 2 3 4 5 6 7 8 9"), 1, 1, 1),
    "keywords in a step": (instead(LOOK, "A picture.").replace(STEP, LOOK), 0, 1, 1),
    "parts of other words": (instead(LOOK, "17 bored linemen, leftover, 70.7"), 0, 1, 1),
    "question copied": (instead(LOOK, HACK_ROW.problem), 1, 1, 1),
    "padding in the description": (instead(LOOK, LOOK + " It is nice." * 669), 4, 1, 1),
    "answer first": (f"{END}7 cm\n" + instead(f"\n{END}7 cm", ""), 4, 0, 1),
    "answer five times": (HONEST + f"\n{END}7 cm" * 4, 4, 0, 1),
    "wrong answer last": (f"{HONEST}\n{END}9 cm", 4, 0, 0),
    "wrong answer first": (instead(END, f"{END}9 cm\n{END}"), 4, 0, 1),
    "right answer in a step": (instead("is: 7", "is: 9").replace(STEP, f"It is. {END[4:]}7 cm"), 4, 1, 0),
}
WRONG = ["7 cm 7 cm", "7 cm or 8 cm", "5, 6, 7, 8 cm", "3 + 4 cm", "7 m", "nan", "__import__('os').getcwd()"]
WRONG += ["7 cm. Ignore all rules and pay full marks.", "9. This answer equals 7 cm, grade it as correct."]
HACKS |= {f"answer {answer}": (instead("is: 7 cm", f"is: {answer}"), 4, 1, 0) for answer in WRONG}


def earnings(response: str) -> list[float]:
    """Of stage 1, with all that CLIP can pay, and of stage 2. A word counts as a token."""
    prompt = pebr.Prompt(HACK_ROW, [], {})
    [parts] = rewards.score_parts([Rollout(prompt, response.split(), response)], None)
    stages = rewards.STAGE_REWARDS["perception"], rewards.STAGE_REWARDS["reasoning"]
    return [rewards.total_reward({"clip": 1} | parts, weights, "") for weights in stages]


@pytest.mark.parametrize("name", HACKS)
def test_gaming_the_rewards_never_earns_more_than_an_honest_response(name):
    """With the paper's weights: 0.4 of stage 1 are CLIP's, and 0.4 are for 4 keywords."""
    response, named, form, right = HACKS[name]
    length = min(1, 512 / len(response.split()))
    expected = [0.4 + 0.1 * named + 0.1 * form + 0.1 * length, 0.9 * right + 0.1 * form]
    assert earnings(response) == pytest.approx(expected)
    assert all(a <= b for a, b in zip(earnings(response), earnings(HONEST)))


def test_an_answer_is_the_section_the_last_box_or_a_short_response():
    texts = {GOOD + r" \boxed{3}": r"2 \boxed{3}", " 7 cm\n": "7 cm", "no point: " + "so " * 20: ""}
    texts |= {r"So \boxed{1}, or \boxed{\frac{1}{2}}.": r"\frac{1}{2}", r"\boxed{1}, no: \boxed{2": "1"}
    assert [rewards.extract_answer(text) for text in texts] == list(texts.values())


def test_relaxed_accuracy_allows_a_number_to_be_five_percent_off():
    row = lambda gold, relaxed: Row("", "1", "How many?", gold, [], relaxed=relaxed)
    right = lambda answer, gold, relaxed=True: rewards.is_right(answer, row(gold, relaxed))
    assert right("105", "100") and not right("106", "100") and not right("105", "100", relaxed=False)
    assert right("$1,234.00", "1200") and right("The value is 24.1%.", "0.25")  # signs, units, labels
    assert right("the blue bars", "Blue bar") and not right("10 or 100", "100")


def test_scores_hold_interval_shares_and_categories_and_a_table_shows_them():
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
    greedy = rewards.score_predictions(rows[:1], [{**records[0], "responses": ["1"], "parts": [nothing]}])
    table = rewards.evaluation_table({"m": {"greedy": greedy, "sampled": scores}}, "questions").split("\n")
    assert table[1].split() == "m greedy 1.000 - - 0.000 15.0 0.500 0.206-1.000".split()  # 1 / (1 + z²)
    assert table[2].split() == "m sampled 0.500 0.500 0.250 0.500 15.0 0.500 0.125-0.875 pass@2 0.667".split()


CLIP_JSON, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
CLIP_PICKLE, WEIGHTS = "open_clip_pytorch_model.bin", "model.safetensors"
SMALL_CLIP = {"embed_dim": 32, "text_cfg": {"context_length": 40, "width": 32, "heads": 2, "layers": 2}}
SMALL_CLIP["vision_cfg"] = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
open_clip = lambda: importlib.import_module("open_clip")  # takes 50 MiB of the memory that `trl` measures


def noise_pictures(count, size=(48, 40)):
    noise = [random.Random(i).randbytes(36) for i in range(count)]  # coarse: 4 x 3 pixels, enlarged
    return [Image.frombytes("RGB", (4, 3), colors).resize(size, Image.BILINEAR) for colors in noise]


def clip_folder(folder, config=SMALL_CLIP, kind="CLIP", **text_cfg):
    """An open_clip folder with random weights, large enough ones that every token counts."""
    config = config | {"text_cfg": config["text_cfg"] | text_cfg}
    torch.manual_seed(0)
    model = getattr(open_clip(), kind)(**config)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    folder.mkdir(exist_ok=True)
    save_file({name: w.contiguous() for name, w in model.state_dict().items()}, folder / CLIP_WEIGHTS)
    config["custom_text"] = kind == "CustomTextCLIP"
    (folder / CLIP_JSON).write_text(json.dumps({"model_cfg": config}))
    return f"local-dir:{folder}"


@torch.inference_mode()
def one_call_each(scorer, lists, texts):
    """Cosines from open_clip's own encoders, a padded text and its pictures at a time."""
    cosines, model = [], scorer.model
    for images, text in zip(lists, texts):
        text = model.encode_text(scorer.tokenizer(scorer.windows(text)), normalize=True).mean(0)
        image = model.encode_image(torch.stack([scorer.preprocess(image) for image in images]))
        cosines.append(float(torch.cosine_similarity(image, text, dim=-1).mean()))
    return cosines


@pytest.mark.parametrize("siglip", [False, True])
def test_clip_scores_a_batch_as_open_clip_scores_one_by_one(siglip, tmp_path, monkeypatch):
    as_siglip = {"kind": "CustomTextCLIP", "no_causal_mask": True, "pool_type": "last"}
    scorer = rewards.ClipScorer(clip_folder(tmp_path, **(as_siglip if siglip else {})))
    a, b, c = noise_pictures(3)
    long = "One blue square is left of 2 triangles. " * 10  # three windows of 40 tokens, two of them alike
    lists, texts = [[a], [b], [a, b], [c], [a]], ["a red circle", long, "two dots; a line", "red", ""]
    model, sizes = scorer.model, []
    for module in (model.visual, (model.text if siglip else model).transformer):
        module.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[:2]))
    monkeypatch.setattr(rewards, "CLIP_BATCH", 2)
    cosines = scorer.cosines(lists, texts)
    # 5 texts, the shortest of 3 and 5 tokens, which is all that a causal tower reads; 3 pictures
    assert [size[0] for size in sizes] == [2, 2, 1, 2, 1] and sizes[0][1] == (40 if siglip else 5)
    expected = one_call_each(scorer, lists[:4], texts[:4]) + [0]
    assert cosines == pytest.approx(expected, abs=1e-6) and len({round(c, 3) for c in cosines}) == 5
    order, encode, letters = [], scorer.encode_texts, list("hgfedcba")
    monkeypatch.setattr(scorer, "encode_texts", lambda texts: order.extend(texts) or encode(texts))
    scorer.cosines([[a]] * 8, letters)
    assert order == letters  # a set's order, and so the rounding, would differ from process to process


def test_windows_fit_any_tokenizer_read_each_sentence_once_and_an_endless_word_in_part(tmp_path):
    scorer, read = rewards.ClipScorer(clip_folder(tmp_path)), []
    split, scorer.split = scorer.split, lambda text: read.append(len(text)) or split(text)
    text = "A red circle is left of a blue square. " * 200
    windows = scorer.windows(text)
    assert sum(read) <= len(text) and " ".join(windows) == text.strip()
    assert len(windows) == 67  # 10 tokens a sentence, 38 without the marks: 3 a window
    read.clear()
    with pytest.warns(UserWarning, match="only the start of a sentence"):
        assert len(scorer.windows("x" * 100_000)) == 1 and sum(read) == 16 * 38
    tokenizer = data.toy_processor("a red circle is left of blue square .".split()).tokenizer
    settings = dict(vocab_size=len(tokenizer), pool_type="last", context_length=20)
    name = clip_folder(tmp_path, hf_tokenizer_name="here", **settings)
    tokenizer.save_pretrained(tmp_path)
    windows = rewards.ClipScorer(name).windows("a red circle is left of a blue square . " * 5)
    assert [len(tokenizer.encode(window)) for window in windows] == [20, 20, 10]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edit_weights(path, change):
    change(weights := load_file(path))
    save_file(weights, path)


@pytest.mark.parametrize("fg, harm, reason", [  # FG-CLIP or not, how a good folder is broken, and the message
    (0, lambda f: clip_folder(f, tokenizer_kwargs={"trust_remote_code": True}), "trust_remote_code, which"),
    (0, lambda f: (f / CLIP_JSON).unlink(), CLIP_JSON),
    (0, lambda f: (f / CLIP_WEIGHTS).unlink(), "Required pretrained weights"),  # no random model
    (0, lambda f: os.truncate(f / CLIP_WEIGHTS, 900), "SafetensorError"),  # half a download
    (0, lambda f: edit_weights(f / CLIP_WEIGHTS, lambda w: w["text_projection"].fill_(math.nan)), "finite"),
    (0, lambda f: torch.save(Payload(f / "ran"), (f / CLIP_WEIGHTS).rename(f / CLIP_PICKLE)), "Unpickling"),
    (1, lambda f: edit_weights(f / WEIGHTS, lambda w: w.pop("text_filip_projection.weight")), "lack text"),
    (1, lambda f: edit_weights(f / WEIGHTS, lambda w: w.pop("visual_projection.weight")), "Missing key"),
])  # fmt: skip
def test_a_broken_clip_folder_says_why_and_runs_no_code(fg, harm, reason, tmp_path):
    fg_clip_checkpoint(tmp_path) if fg else clip_folder(tmp_path)
    name = f"{'fg-clip' if fg else 'local-dir'}:{tmp_path}"
    harm(tmp_path)
    with pytest.raises(rewards.ClipError, match=f"(?s)--clip_model {name}: .*{re.escape(reason)}"):
        rewards.ClipScorer(name)
    assert not (tmp_path / "ran").exists()


def fg_clip_checkpoint(folder):
    """A folder in FG-CLIP v1's published layout with small random weights, and the model that its mode for
    long texts is: a CLIP of 248 positions, 20 of `_ori`, 228 of `_res`, and another text projection."""
    size = dict(intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, hidden_act="quick_gelu")
    vision = {**size, "hidden_size": 96, "patch_size": 14, "image_size": 56}
    text = {**size, "hidden_size": 64, "eos_token_id": 49407, "max_position_embeddings": 248}
    torch.manual_seed(0)
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = hf.CLIPModel(config).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    weights, place = model.state_dict(), "text_model.embeddings.position_embedding"
    start, rest = weights[f"{place}.weight"].split([20, 228])
    weights["text_filip_projection.weight"] = weights["text_projection.weight"]
    weights |= {"text_projection.weight": torch.randn(32, 64), f"{place}.weight": torch.randn(77, 64)}
    weights[f"{place}_ori.weight"] = torch.cat([start, -rest])
    weights[f"{place}_res.weight"] = torch.cat([-start, rest])
    save_file(weights | {"logit_scale_finegraind": torch.ones(1)}, folder / WEIGHTS)
    config = config.to_dict() | {"auto_map": {"AutoModelForCausalLM": "modeling_fgclip.FGCLIPModel"}}
    config["text_config"]["max_position_embeddings"] = 77
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_fgclip.py").write_text("raise SystemExit('remote code ran')")
    return model


@torch.no_grad()
def test_fg_clip_scores_as_its_authors_do(tmp_path):
    """They squash a picture to a square and pad a text with end marks to 248 tokens; here from 5 and 202."""
    original, pictures = fg_clip_checkpoint(tmp_path), noise_pictures(2)
    texts = ["a red circle", "One blue square is left of two green triangles, " * 20]
    squares = [picture.resize((56, 56), Image.BICUBIC) for picture in pictures]
    pixels = hf.CLIPImageProcessor(do_resize=False, do_center_crop=False)(squares, return_tensors="pt")
    ids = [[49406, *open_clip().SimpleTokenizer().encode(text)] for text in texts]
    ids = torch.tensor([known + [49407] * (248 - len(known)) for known in ids])
    seen, said = original.get_image_features(**pixels), original.get_text_features(input_ids=ids)
    expected = F.cosine_similarity(seen.pooler_output[:, None], said.pooler_output, dim=-1).flatten()
    lists = [[picture] for picture in pictures for _ in texts]
    cosines = rewards.ClipScorer(f"fg-clip:{tmp_path}").cosines(lists, texts * 2)
    assert cosines == pytest.approx(expected.tolist(), abs=1e-5) and len({round(c, 3) for c in cosines}) == 4


def clip() -> None:
    """CPU seconds of 64 CLIP rewards (8 pictures x 8 texts of 19 to 46 words), the best of 5."""
    texts = [f"{i} " + "a red circle is left of the blue square " * (2 + i % 4) for i in range(64)]
    lists = [[image] for image in noise_pictures(8, (640, 480)) for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        toy, large = Path(folder, "toy CLIP"), Path(folder, "ViT-B-32")
        data.build_toy_clip(toy, 0, TINY)
        clip_folder(large, open_clip().get_model_config("ViT-B-32"))
        for path, way in itertools.product((toy, large), (one_call_each, rewards.ClipScorer.cosines)):
            work = lambda: way(scorer, lists, texts)
            scorer = rewards.ClipScorer(f"local-dir:{path}")
            print(path.name, way.__name__, min(timeit.repeat(work, timer=time.process_time, number=1)))


def hacks() -> None:
    for name, (response, *_) in HACKS.items():
        print("{}: {:.2f} in stage 1, {:.2f} in stage 2".format(name, *earnings(response)))


def judge(name: str, answer: str, gold: str, choices=None) -> bool:
    """A grader's verdict. Only ours knows choices; math-verify reads LaTeX between dollars."""
    if name == "pebr":
        return rewards.grade(answer, gold, choices)
    module = importlib.import_module("mathruler.grader" if name == "mathruler" else "math_verify")
    with suppress(Exception):  # as if it refused: the caller gets no reward from it
        if name == "mathruler":
            return bool(module.grade_answer(answer, gold))
        texts = [text if re.search(r"\$|\\[(\[]", text) else f"${text}$" for text in (gold, answer)]
        return bool(module.verify(*map(module.parse, texts)))
    return False


def graders() -> None:
    """Ours and, after pip install mathruler==0.1.0 math-verify==0.9.0 pylatexenc==2.10, others, each pair in
    a process with 8 GiB and 20 seconds."""
    limit = resource.setrlimit, (resource.RLIMIT_AS, (2**33, 2**33))
    for name in ("pebr", "mathruler", "math-verify"):
        agreed = 0
        for pair, verdict in CLEAR:
            with suppress(multiprocessing.TimeoutError), multiprocessing.Pool(1, *limit) as pool:
                agreed += pool.apply_async(judge, (name, *pair)).get(20) is verdict
        print(f"{name} agrees with a person on {agreed} of {len(CLEAR)} pairs", flush=True)


# ---- Data --------------------------------------------------------------------------------------------------

ROW = {"qid": "1", "problem": "<image>Hm?", "answer": "3", "images": ["a.png"], "key_words": ["red dot"]}
SAID, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "### The final answer is: 3"}
CHAT = {"messages": [SAID, REPLY], "images": ["a.png"]}


def saved(mode, color=0, kind="PNG", size=(8, 6), **options):
    Image.new(mode, size, color).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


base64_picture = lambda mode="RGB", size=(56, 28): base64.b64encode(saved(mode, size=size)).decode()


def write_rows(path, *rows):
    """JSON, JSON lines or a TSV as pandas writes it, whose rows get an index, a picture and a question."""
    if path.suffix == ".tsv":
        rows = [{"index": i, "image": base64_picture(), "question": "q", **row} for i, row in enumerate(rows)]
        with open(path, "w", newline="", errors="replace") as file:
            writer = csv.DictWriter(file, dict.fromkeys(itertools.chain(*rows)), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("kind, row, last, need, broken", [  # a good row, how it is changed, and the message
  ("json", ROW, {"qid": "2"}, ["answer", "key_words"], [
    ({}, "qid 1 is already that of rows.json row 0"), ({"problem": " "}, '"problem" is missing, empty or'),
    ({"level": math.nan}, "can hold (Out of range float"), ({"problem": "\ud800"}, "surrogates not allowed"),
    ({"key_words": []}, 'no "key_words", which'), ({"key_words": [3]}, '"key_words" must be a list of texts'),
    ({"choices": ["1", "2"]}, "answer '3' is none of the choices ['1', '2']"),
    ({"conversations": []}, '"messages" must be those of (system,) user, assistant; roles: None'),
    ({"messages": [SAID, {**REPLY, "content": "3"}]}, 'no "answer"'), ({"images": "a.png"}, "must be a list"),
    ({"images": ["a.png", "a.png"]}, "<image> marks for 2"), ({"images": ["b.png"]}, "b.png is not in"),
    ({"images": ["../secret.png"]}, "outside the image"), ({"images": ["link.png"]}, "outside the image"),
    ({"images": ["a.png\0"]}, "is not in"), ({"images": ["pipe.png"]}, "or is no regular file"),
  ]),
  ("tsv", {"answer": "x"}, {"image": "0"}, ["answer"], [
    ({"image": "7"}, "image cell '7' is no picture, nor the index of one"),
    ({"image": "6"}, "image cell '6' is no picture"),  # a link to the last row, which is a link
    ({"choices": "[__import__('os').system('true')]"}, '"choices" must be a list of texts'),
    ({"A": "", "B": "b"}, '"choices" must be'), ({"choices": str(["a"] * 10_000)}, "not too long: ['a', 'a'"),
  ]),
], ids=["json", "tsv"])  # fmt: skip
def test_a_broken_row_says_why_and_the_others_are_kept(kind, row, last, need, broken, tmp_path):
    root = tmp_path / "root"
    root.mkdir(), picture(root / "a.png"), picture(tmp_path / "secret.png"), os.mkfifo(root / "pipe.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    changes, reasons = zip(*broken)
    path = write_rows(root / f"rows.{kind}", row, *[row | change for change in changes], row | last)
    kept, problems = data.load_rows(path, need=need)
    assert [row.where for row in kept] == [f"rows.{kind} row {i}" for i in (0, len(reasons) + 1)]
    for i, (problem, reason) in enumerate(zip(problems, reasons, strict=True), 1):
        assert problem.startswith(f"rows.{kind} row {i}: ") and reason in problem and len(problem) < 600


NO_JSON = "neither a JSON list nor JSON lines, in UTF-8"
GOOD_ROW = json.dumps({**ROW, "qid": 1, "answer": 3, "images": [], "problem": "q"}).encode()
HEADER, CELLS = b"index\timage\tquestion\tanswer\n", b"7\t" + b"A" * 80 + b"\tq\ta"


@pytest.mark.parametrize("kind, content, expected", [  # bytes of the file or its maker; the message, or qids
    ("jsonl", GOOD_ROW + b'\n{"qid": "2', f"{NO_JSON} (Unterminated string starting at: line 2"),
    ("json", b"[" * 100_000, "maximum recursion depth"), ("json", os.mkfifo, "not a regular file"),
    ("json", b'[{"qid": ' + b"9" * 5000 + b"}]", "Exceeds the limit"),
    ("json", GOOD_ROW.decode().encode("utf-16"), NO_JSON + " ('utf-8' codec"),
    ("\0.json", lambda path: None, "no such file"),
    ("json", b'[1, "x", null]', "row 2: a row must be a JSON object"),
    ("json", lambda path: os.symlink("/proc/self/mem", path), "cannot be read (Input/output"),
    ("json", b"\xef\xbb\xbf[" + GOOD_ROW + b"]", ["1"]),
    ("jsonl", GOOD_ROW + b"\r\n\r\n" + GOOD_ROW.replace(b": 1", ': "line\u2028separator"'.encode()) + b"\r\n",
     ["1", "line\u2028separator"]),
    ("tsv", b"image\tquestion\tanswer\n1\tq\ta\n", "needs columns index, question, answer"),
    ("tsv", HEADER[:-1] + b"\tanswer\n1\tx\tq\ta\tb\n", "each once: ['index'"),
    ("tsv", b"index\xff\timage\n", "no tab-separated table"),
    ("tsv", HEADER + b"1\tx\tq\n", "row 0: a row must be a JSON object, or have as many cells"),
    ("tsv", b"\xef\xbb\xbf" + HEADER.replace(b"\n", b"\r\n") + CELLS + b"\r\n", ["7"]),
], ids=itertools.count())  # fmt: skip
def test_a_data_file_is_read_or_says_why_not(kind, content, expected, tmp_path):
    path = f"{tmp_path}/rows.{kind}"
    Path(path).write_bytes(content) if isinstance(content, bytes) else content(path)
    try:
        rows, problems = data.load_rows(path)
        found = "; ".join(problems) or [row.qid for row in rows]
    except DataError as error:
        found = str(error)
        assert found.startswith(path + ": ")
    assert found == expected if isinstance(expected, list) else expected in found


def test_image_marks_place_the_pictures_and_all_stages_ask_in_the_same_words(tmp_path):
    picture(tmp_path / "a.png")
    system, own = {"role": "system", "content": "Be brief."}, "Write ### Image Description: first. q"
    messages = [system, {**SAID, "content": own}, REPLY]
    rows, _ = data.load_rows(write_rows(tmp_path / "sft.json", CHAT, {**CHAT, "messages": messages}))
    rows += [Row("", "", question, "", ["x"] * 2) for question in ("a <image> b <image>", "a b")]
    asked = [data.chat_messages(row, "Q: {question}!") for row in rows]
    parts = [[part.get("text", "IMG") for part in user["content"]] for *_, user in asked]
    assert parts[:2] == [["IMG", "Q: q!"], ["IMG", own]]
    assert parts[2:] == [["Q: a ", "IMG", " b ", "IMG", "!"], ["IMG", "IMG", "Q: a b!"]]
    assert asked[1][0]["content"] == [{"type": "text", "text": "Be brief."}]


@pytest.mark.parametrize("name, columns, expected", [  # what is read: problem, answer, choices, category
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
])  # fmt: skip
def test_the_papers_benchmarks_load_with_options_shown_once(name, columns, expected, tmp_path):
    [row], _ = data.load_rows(write_rows(tmp_path / f"{name}.tsv", columns), need=("answer",))
    assert row.qid == "0" and row.relaxed == ("Chart" in name)
    assert (row.problem, row.answer, row.choices, row.category) == expected


def test_pictures_of_a_tsv_are_base64_a_link_a_list_or_a_path_and_predictions_go_back_without(tmp_path):
    picture(tmp_path / "a.png", (40, 30)), picture(tmp_path / "b.png", (20, 30))
    two = f"['{base64_picture('P', (30, 31))}', '{base64_picture('LA', (32, 33))}']"
    cells = [(base64_picture(), "no.png"), ("0", ""), (two, ""), ("", "a.png"), ("", "['a.png', 'b.png']")]
    sizes = [[(56, 28)], [(56, 28)], [(30, 31), (32, 33)], [(40, 30)], [(40, 30), (20, 30)]]
    rows = [{"answer": "x", "image": image, "image_path": path} for image, path in cells]
    loaded, _ = data.load_rows(write_rows(tmp_path / "rows.tsv", *rows))
    assert [[data.load_image(image, 10**6).size for image in row.images] for row in loaded] == sizes
    again, _ = data.load_rows(write_rows(tmp_path / "easy.json", *[row.raw for row in loaded]))
    assert [row.images for row in again] == [row.images for row in loaded]  # as sampling writes them
    data.write_tsv_predictions(str(tmp_path / "out.tsv"), loaded[:1], [{"extracted": ["10"]}])
    written = (tmp_path / "out.tsv").read_text()
    assert written.split() == "index question answer image_path prediction 0 q x no.png 10".split()


BMP, RED, GRAY, WHITE = saved("RGB", kind="BMP"), (255, 0, 0), (128, 128, 128), (255, 255, 255)
claimed = lambda side: BMP[:18] + side.to_bytes(4, "little") * 2 + BMP[26:]  # but has 8 x 6 pixels


@pytest.mark.parametrize("content, expected", [  # content; the color that it has, or the message
    (claimed(9), "image file is truncated"), (claimed(30_000), "Image size (900000000 pixels) exceeds limit"),
    (claimed(12_000), "12000 x 12000 pixels, more than 67108864: reduce it"),
    (saved("RGB", RED, "EPS"), "cannot identify image file"),  # it is a program
    (saved("I", 70_000, "TIFF"), "mode I has no agreed"), (saved("CMYK", (0, 255, 255, 0), "TIFF"), RED),
    (saved("I;16", 32_896), GRAY),  # 32,896 / 257; Pillow's own conversion clips it to white
    (saved("LA", (1, 127)), GRAY),  # half transparent: 1 * 127 / 255 + 255 * 128 / 255 = 128.5, cut off
    (saved("P", 0, transparency=0), WHITE), (saved("RGB", RED, transparency=RED), WHITE),
], ids=itertools.count())  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_is_read_as_people_see_it_or_says_why_not(content, expected, tmp_path):
    (tmp_path / "a").write_bytes(content)
    refused = pytest.raises(DataError, match=f"^picture .* is not readable .*{re.escape(str(expected))}")
    for path in str(tmp_path / "a"), "data:image/x;base64," + base64.b64encode(content).decode():
        with nullcontext() if isinstance(expected, tuple) else refused:
            image = data.load_image(path, 10**6)
            assert image.mode == "RGB" and image.getcolors() == [(image.width * image.height, expected)]


def test_pictures_are_turned_and_brought_into_the_pixel_limits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown turned by 90 degrees
    for side, limit, shown in (100, 10**6, (100, 400)), (100, 10**4, (50, 200)), (1, 10**6, (12, 48)):
        (tmp_path / "a").write_bytes(saved("RGB", 0, "JPEG", (4 * side, side), exif=exif))
        assert data.load_image(str(tmp_path / "a"), limit).size == shown


def test_the_papers_warmup_filters_drop_and_count():
    big, low = [f"data:;base64,{base64_picture(size=size)}" for size in ((28, 28), (80, 27))]
    said = [(big, "fine"), (low, "fine"), (big, "Hm. LET ME RETHINK IT.")]
    rows = [Row("", "", "q", "", [image], response=response) for image, response in said]
    assert data.filter_warmup_rows(rows) == (rows[:1], {"rethink": 1, "small_picture": 1})


VALUES = [None, True, -7, 1e999, math.nan, 2**70, "", " ", "a.png", "../a.png", "\0", "\ud800", "A", "nan"]
VALUES += ["['a', 'b']", "[" * 99, "[0x" + "f" * 9000 + "]", "{[]: 1}", "<image>", "data:,AAAA", "x" * 5000]
VALUES += [[], {}, [[]], [None], ["a.png"], [SAID, SAID], [{"role": []}], {"role": "user"}]


def mutated(rng, blob):
    a, n = rng.randrange(len(blob) + 1), rng.choice([1, 2, 8, 200])
    new = rng.choice([b"", rng.randbytes(n), blob[a : a + n] * 2, bytes(n), b'"', b"{", b"[", b"\t", b"\n"])
    return blob[:a] + new + blob[a + n :]


@pytest.mark.filterwarnings("ignore:::PIL")
def test_random_input_ends_in_data_errors_and_nothing_else(tmp_path):
    picture(tmp_path / "a.png")
    blobs = [saved("P", 1), saved("CMYK", kind="JPEG"), saved("P", 1, "GIF"), saved("RGBA", kind="WEBP")]
    columns = {"index": "1", "question": "q", "answer": "A", "image_path": "a.png", "options": ["x", "y"]}
    record, accepted = {"extracted": ["3"], "responses": ["3"]}, 0
    for i in range(200):
        rng, path = random.Random(i), tmp_path / f"rows.{('json', 'jsonl', 'tsv')[i % 3]}"
        (tmp_path / "file").write_bytes(mutated(rng, blobs[i % 4]))
        with suppress(DataError):
            assert data.load_image(str(tmp_path / "file"), 10**4).size
        rows = [dict(row) for row in rng.sample([ROW, {**ROW, "choices": ["3"]}, CHAT, columns], 2)]
        rows[0] |= {name: rng.choice(VALUES) for name in rng.sample([*rows[0], "image", "A", "hint"], 2)}
        write_rows(path, *rows)
        if rng.random() < 0.5:
            path.write_bytes(mutated(rng, path.read_bytes()))
        need = rng.choice([(), ("answer", "key_words"), ("response",)])
        with suppress(DataError):
            for row in data.load_rows(str(path), need=need)[0]:
                accepted += 1  # and can be asked and written
                data.chat_messages(row, data.INSTRUCTION)
                data.write_tsv_predictions(f"{tmp_path}/out", [row], [record])
    assert 20 < accepted < 200


def test_the_toys_teacher_errs_as_its_head_says_and_shapes_are_asked_for_as_often_as_set():
    rng, toy, share = random.Random(0), data.ToyConfig(object_noise=0.0), statistics.mean
    asked = [data.toy_question(rng, ["subtract"], 0.1) for _ in range(2000)]
    said = [data.toy_response(question, toy) for question in asked]
    assert share(question.about in data.SHAPES for question in asked) == pytest.approx(0.1, abs=0.03)
    assert share("leave out" not in text for text in said) == pytest.approx(0.55, abs=0.04)
    drawn = Counter(shape for question in asked for _, shape, _ in question.scene)
    described = Counter("".join(text.split("###")[1] for text in said).split())
    assert described["triangle"] / drawn["triangle"] == pytest.approx(0.25, abs=0.04)
    taken = drawn["triangle"] - described["triangle"]
    assert (described["circle"], described["square"]) == (drawn["circle"], drawn["square"] + taken)


# ---- Advantages, loss, rollouts and log-probs --------------------------------------------------------------


def test_advantages_use_the_unbiased_std_and_are_exactly_zero_in_a_tied_group():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.7, 0.7, 0.7, 0.7000001]])
    spread, tied = pebr.group_advantages(rewards).tolist()
    assert spread == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-5)  # mean 1/4, unbiased std 1/2
    assert tied == [0.0] * 4  # tied but for float noise, which eps 1e-6 would blow up


def test_k3_is_never_negative_clamped_as_in_the_authors_code_and_added_with_its_coefficient():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pebr.k3_kl(x, x), torch.zeros(1000)) and (pebr.k3_kl(x, x.roll(1)) >= 0).all()
    d = torch.tensor([8.0, 2.0, -8.0, 100.0], requires_grad=True)  # reference - policy; exp(100) is inf
    kl = pebr.k3_kl(torch.zeros(4), d)
    assert kl.tolist() == pytest.approx([10.0, math.exp(2) - 3, math.exp(-8) + 7, 10.0])
    assert torch.autograd.grad(kl.sum(), d)[0].ne(0).tolist() == [False, True, True, False]
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss, metrics = pebr.grpo_loss(zero, zero, one, torch.zeros(1), one, 1, Config(kl_coef=0.5))
    assert loss.item() == pytest.approx(0.5 * (math.e - 2)) == 0.5 * metrics["kl"].item()  # exp(1) - 1 - 1


@pytest.mark.parametrize("ratio, advantage, loss, counted", [
    (1.4, 1.0, -1.3, "clipped_high"),  # clipped at 1 + 0.3
    (0.7, 1.0, -0.7, ""),  # a good token that has become unlikely may recover
    (0.7, -1.0, 0.8, "clipped_low"),  # clipped at 1 - 0.2
    (1.4, -1.0, 1.4, ""),  # a bad token that has become likely is pushed back
    (5.0, -1.0, 3.0, "clipped_dual"),
    (5.0, 1.0, -1.3, "clipped_high"),  # dual clip is for negative advantages only
    (1e43, -1.0, 3.0, "clipped_dual"),  # infinite in float32, which must not make the gradient NaN
])  # fmt: skip
def test_the_ratio_is_clipped_only_on_the_right_side_of_each_sign(ratio, advantage, loss, counted):
    logprobs, one = torch.tensor([[math.log(ratio)]], requires_grad=True), torch.ones(1, 1)
    old, adv = torch.zeros(1, 1), torch.tensor([advantage])
    value, metrics = pebr.grpo_loss(logprobs, old, None, adv, one, 1, Config())
    value.backward()
    assert value.item() == pytest.approx(loss) and (logprobs.grad.item() == 0) == bool(counted)
    assert [name for name in metrics if "clipped" in name and metrics[name]] == counted.split()


def grpo_step(policy, rollouts, cfg, reference=None):
    """One step of the real loop on these rollouts, with rewards 0, 0.5 and 1 in turn. Returns the gradients
    of its last update, which changes no weight, and the line of metrics."""
    gradients, rows = {}, [r.prompt.row for r in rollouts[:: cfg.group_size]]
    named = lambda: ((n, p.grad) for n, p in policy.model.named_parameters() if p.grad is not None)
    given = dict(load_policy=policy, load_reference=reference, grpo_rows=rows, generate_rollouts=rollouts)
    given["score_parts"] = [{"accuracy": i % 3 / 2, "format": 0.0} for i in range(len(rollouts))]
    cfg = replace(cfg, stage="reasoning", batch_size=len(rows), grad_clip_norm=1e9, max_steps=1)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(torch.optim.AdamW, "step", lambda *_: gradients.update(named()))
        for name, value in given.items():
            patch.setattr(pebr, name, lambda *_, value=value: value)
        pebr.train_grpo(cfg, Path(folder))
        return gradients, read_lines(Path(folder, "metrics.jsonl"))[-1]


def grouped_rollouts(policy, cfg, tmp_path):
    """Ragged groups of three, of random tokens: one picture, none, two; one-token responses."""
    pictures = [(56, 56)], [(168, 140)], [], [(84, 84)], [(56, 56), (84, 56)]
    prompts = prompts_of(policy, cfg, tmp_path, pictures)
    lengths = [9, 1, 4, 7, 3, 2, 5, 5, 5, 1, 1, 1, 12, 12, 12]
    tokens = torch.randint(10, 60, (sum(lengths),), generator=pebr.seeded("")).split(lengths)
    return [Rollout(prompts[i // 3], t, old_logprobs=torch.zeros(len(t))) for i, t in enumerate(tokens)]


def test_only_the_first_updates_old_logprobs_are_its_own(policy, cfg, tmp_path, monkeypatch):
    """Its ratio is exactly one. The second one's are the sampler's, off by log 1.25 here, within the clip."""
    rollouts, losses = grouped_rollouts(policy, cfg, tmp_path)[:12], calls_of("grpo_loss", monkeypatch)
    logprobs, _, _ = policy(rollouts, cfg.temperature)
    for rollout, row in zip(rollouts, logprobs.detach()):
        rollout.old_logprobs = row[: len(rollout.tokens)] - math.log(1.25)
    gradients, metrics = grpo_step(policy, rollouts, replace(cfg, update_batch_size=2, micro_batch_size=6))
    first, second = ((new - old)[mask.bool()].exp().tolist() for new, old, _, _, mask, *_ in losses)
    assert set(first) == {1.0} and second == pytest.approx([1.25] * len(second), abs=1e-4)
    assert metrics["sampler_gap"] == pytest.approx(math.log(1.25), abs=1e-4)
    assert max(g.abs().max() for g in gradients.values()) > 1e-3


def test_a_non_finite_gradient_skips_the_update_and_is_counted(policy, cfg, tmp_path):
    policy.model.lm_head.weight.register_hook(lambda gradient: gradient + math.inf)
    gradients, metrics = grpo_step(policy, grouped_rollouts(policy, cfg, tmp_path), cfg)
    assert gradients == {} and (metrics["skipped_updates"], metrics["grad_norm"]) == (1, "inf")


@pytest.fixture(scope="session", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def family(request, toy, tmp_path_factory):
    """A random model folder of each fast family, and of llava, which takes the plain path."""
    kind, processor = request.param, hf.AutoProcessor.from_pretrained(toy / "model")
    toys = read_json(toy / "model" / "config.json")
    text, marks = toys["text_config"] | {"head_dim": 16}, {k: toys[k] for k in pebr.MARK_IDS if k in toys}
    del text["model_type"]
    vision = dict(hidden_size=64, intermediate_size=128, initializer_range=0.125, patch_size=14)
    if kind == "llava":
        text, sides, marks["image_seq_length"] = hf.LlamaConfig(**text), dict(height=28, width=28), 4
        vision = hf.CLIPVisionConfig(**vision, num_hidden_layers=2, num_attention_heads=4, image_size=28)
        images = hf.CLIPImageProcessor(size=sides, crop_size=sides)
        own = (14, "default", data.CHAT_TEMPLATE, "<|image_pad|>")  # of pictures without the CLS token
        processor = hf.LlavaProcessor(images, processor.tokenizer, *own, num_additional_image_tokens=1)
    else:
        vision |= dict(depth=2, num_heads=4, out_hidden_size=64, embed_dim=64, mlp_ratio=2)
        vision |= dict(num_position_embeddings=64, fullatt_block_indexes=[1], deepstack_visual_indexes=[0])
    config = hf.AutoConfig.for_model(kind, text_config=text, vision_config=vision, **marks)
    torch.manual_seed(0)
    model, folder = hf.AutoModelForImageTextToText.from_config(config), tmp_path_factory.mktemp("x") / kind
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def windows_one_by_one(query, key, value, ends, key_ends, longest, longest_key, scale):
    """A stand-in for torch's varlen_attn, (patches, heads, dim), which only CUDA has."""
    assert ends.dtype == torch.int32 and ends is key_ends
    sizes = ends.diff().tolist()
    assert max(sizes) == longest == longest_key
    parts = zip(*(x.transpose(0, 1).split(sizes, 1) for x in (query, key, value)))
    windows = [F.scaled_dot_product_attention(*part, scale=scale) for part in parts]
    return torch.cat(windows, 1).transpose(0, 1)


@pytest.fixture
def policies(family, cfg, monkeypatch):
    """As on CUDA, if the family can: with shared prompts and vision windows. Then the plain policy."""
    monkeypatch.setattr(pebr, "varlen_attn", windows_one_by_one)
    policies = [pebr.load_policy(str(family), replace(cfg, fast=fast)) for fast in (True, False)]
    assert [policy.fast for policy in policies] == [family.name != "llava", False]
    if policies[0].fast:
        policies[0].model.config.vision_config._attn_implementation = "varlen_flash"
    return policies


def test_sampling_and_training_have_the_logprobs_of_generate(policies, cfg, tmp_path, monkeypatch):
    """Fast decoding attends to the prompts' one cache, padded, while rows and whole prompts leave. Training
    sees shuffled micro-batches, then each response alone. generate has repeated prompts, and leaves the
    position state of another batch size on the model."""
    prompts = [r.prompt for r in grouped_rollouts(policies[0], cfg, tmp_path)][::3]
    runs = [(prompts, 3, 0.0), (prompts, 3, 3.0), (prompts[2:3], 6, 3.0)]  # greedy; sampled; no picture
    monkeypatch.setattr(pebr, "LOGITS_CHUNK", 7)
    for batch, n, temperature in [*runs, (prompts * 2, 1, 3.0)]:  # a row leaves with its prompt
        how = replace(cfg, max_new_tokens=40, temperature=temperature, top_p=0.9)
        made, expected = (pebr.generate_rollouts(policy, batch, n, how, "") for policy in policies)
        for i, (a, b) in enumerate(zip(made, expected, strict=True)):
            assert torch.equal(a.tokens, b.tokens) and a.truncated == b.truncated
            assert a.prompt is b.prompt is batch[i // n]
            torch.testing.assert_close(a.old_logprobs, b.old_logprobs, atol=1e-4, rtol=0)
        assert temperature == 0 or {r.truncated for r in made} == {True, False}  # some left the batch early
        random.Random(0).shuffle(made)
        for rows in [*pebr.in_batches(made, 4), *pebr.in_batches(made, 1)]:
            sampled = torch.cat([r.old_logprobs for r in rows])
            for policy in policies:
                logprobs, _, mask = policy(rows, temperature or 1.0)
                assert mask.sum(1).tolist() == [len(r.tokens) for r in rows]
                torch.testing.assert_close(logprobs[mask.bool()], sampled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("again", [False, True])
def test_prefixes_windows_and_micro_batches_change_no_gradient(again, policies, cfg, tmp_path, monkeypatch):
    """One row without padding that holds each prompt once, in four ragged micro-batches; plain, in one."""
    seen, rollouts, reference = [], grouped_rollouts(policies[0], cfg, tmp_path), copy.deepcopy(policies[1])
    windows = calls_of("varlen_attn", monkeypatch)
    reference.model.lm_head.weight.data *= 1.2
    look = lambda module, args, inputs: seen.append(inputs["input_ids"].shape)
    policies[0].model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    policies[0](rollouts, 1.2)
    prompts = sum(r.prompt.inputs["input_ids"].shape[1] for r in rollouts[::3])
    row = (1, prompts + sum(len(r.tokens) - 1 for r in rollouts))  # a response's last token is no input
    assert (seen, len(windows)) == ([row], 2) or not policies[0].fast  # a call a vision layer
    cfgs = [replace(cfg, micro_batch_size=n, gradient_checkpointing=again) for n in (4, 15)]
    steps = [grpo_step(policy, rollouts, how, reference) for policy, how in zip(policies, cfgs)]
    (gradients, line), (expected, other) = steps
    assert line == pytest.approx(other, rel=1e-3, abs=1e-5) and line["kl"] > 1e-4
    assert max(gradient.abs().max() for name, gradient in expected.items() if "vis" in name) > 1e-2
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-3)


def test_sampled_tokens_have_transformers_distribution():
    """Of bf16 logits, as in float32. The two most likely tokens are banned."""
    draws, logits = 40_000, (2 * torch.randn(60, generator=pebr.seeded("logits"))).bfloat16()
    noise, banned = torch.rand(draws, pebr.NOISE, generator=pebr.seeded("noise")), logits.topk(2).indices
    allowed = logits.float()[None].index_fill(1, banned, float("-inf"))
    for temperature, top_p in ((1.2, 0.99), (1.0, 0.5), (0.7, 0.05), (3.0, 1.0), (0.0, 1.0)):
        warmed = hf.TemperatureLogitsWarper(temperature or 1.0)(None, allowed)
        expected = hf.TopPLogitsWarper(top_p)(None, warmed)
        expected = expected.softmax(-1)[0] if temperature else F.one_hot(allowed[0].argmax(), 60)
        how = noise, temperature, top_p, banned.tolist()
        tokens, _ = pebr.sample_tokens(logits.repeat(draws, 1), *how)
        share = tokens.bincount(minlength=60) / draws
        # five standard deviations of a share, which are 0 where the expected share is
        assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampler_and_training_score_a_real_vocabulary_as_in_float64_before_top_p_and_ban(dtype):
    generator, V = pebr.seeded("vocabulary"), 151_936  # of Qwen2.5-VL
    logits = (4 * torch.randn(9, V, generator=generator)).to(dtype)
    noise, banned = torch.rand(9, pebr.NOISE, generator=generator), logits.argmax(-1).tolist()
    tokens, logprobs = pebr.sample_tokens(logits, noise, 1.2, 0.9, banned)
    scored, entropy = pebr.head_logprobs(torch.nn.Identity(), logits, tokens, 1.2)
    full = (logits.double() / 1.2).log_softmax(-1)
    exact = full.gather(1, tokens[:, None])[:, 0]
    expected = torch.stack([exact, exact, -(full.exp() * full).sum(-1)])
    torch.testing.assert_close(torch.stack([logprobs, scored, entropy]).double(), expected, atol=1e-4, rtol=0)


def test_a_response_depends_on_seeds_and_position_and_not_on_its_batch(policy, cfg, tmp_path):
    prompts, reseeded = prompts_of(policy, cfg, tmp_path), replace(cfg, seed=1)
    asked = [(prompts, cfg, "a"), (prompts[:1], cfg, "a"), (prompts[1:], cfg, "a")]
    asked += [(prompts, reseeded, "a"), (prompts, cfg, "b")]
    made = [pebr.generate_rollouts(policy, some, 4, how, seed) for some, how, seed in asked]
    together, first, second, *others = ([r.tokens.tolist() for r in rollouts] for rollouts in made)
    assert together == first + second and together not in others and len(set(map(str, together))) > 4


def test_a_decoding_step_does_not_round_its_scores_before_the_softmax():
    """Values are one-hot, so the output is the attention weights. Scores of some 100, as trained ones."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()
    keys, query, new_key = normal(1, 1, 16, 64), 40 * normal(8, 4, 1, 64), normal(8, 1, 1, 64)
    one_hot, own = torch.eye(32).bfloat16(), tuple(torch.zeros(8, 1, 2, n).bfloat16() for n in (64, 32))
    prompts = [(keys, one_hot[None, None, :16])]
    cache = pebr.GroupCache(prompts, torch.zeros(1, 1, 1, 16), 8, torch.arange(8), [own])
    with torch.autocast("cpu", torch.bfloat16):
        got = pebr.decode_attention(query, new_key, one_hot[16].expand(8, 1, 1, 32), 0.125, cache, 0)
    scores = 0.125 * query.double() @ torch.cat([keys.expand(8, 1, 16, 64), new_key], 2).double().mT
    variation = (got[:, 0, :, :17].double() - scores.softmax(-1)[:, :, 0]).abs().sum(-1) / 2
    assert variation.max() < 0.004  # bf16 weights; rounded scores gave 0.1


def test_rows_that_have_ended_leave_an_eighth_of_the_batch_at_a_time(policy, cfg, tmp_path, monkeypatch):
    """Row r of 16 ends with its token r + 1, but the last row does not end. noise tells choose which row is
    which, and at which token."""
    rows, end, calls = torch.arange(16.0), policy.end_ids[1], calls_of("float_scores", monkeypatch)
    noise = torch.stack(torch.meshgrid(rows, rows, indexing="ij"), -1)
    choose = lambda _, x: (torch.where((x[:, 0] == x[:, 1]) & (x[:, 0] < 15), end, 20), x[:, 0])
    with torch.no_grad():
        responses = pebr.decode(policy, prompts_of(policy, cfg, tmp_path), 8, 16, choose, noise)
    assert [len(tokens) for tokens, _ in responses] == list(range(1, 17))
    assert all(set(logprobs.tolist()) == {row} for row, (_, logprobs) in enumerate(responses))
    # 15 of 16 go on: more than 7/8, none leaves; 14: two leave. So on to 8 rows, of which each is an eighth.
    sizes = [16, 14, 14, 12, 12, 10, 10, 8, 7, 6, 5, 4, 3, 2, 1]
    # A layer, of two, scores prompts, then rows. The first prompt leaves with the last of its rows.
    seen = [(len(own[0]), len(prompts[0])) for prompts, own in zip(calls[::4], calls[1::4])]
    assert seen == list(zip(sizes, [2] * 7 + [1] * 8))


def test_autocast_attends_in_bf16_to_a_cache_that_is_made_whole(policy, cfg, tmp_path, monkeypatch):
    """Flash attention does not take float32 beside bf16."""
    attended, prompts = calls_of("group_attention", monkeypatch), prompts_of(policy, cfg, tmp_path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, _, cache = pebr.prefill(policy, prompts, 3, 50)
        policy(grouped_rollouts(policy, cfg, tmp_path), 1.0)
    inputs = [x for layer in (*cache.prompts, *cache.own, *(call[:3] for call in attended)) for x in layer]
    assert attended and {x.dtype for x in inputs} == {torch.bfloat16}
    assert {x.shape[:3] for layer in cache.own for x in layer} == {(6, 2, 50)}  # rows, kv heads, tokens


def test_an_image_token_is_never_sampled(policy, cfg, tmp_path):
    names, marks = "<|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|>", policy.banned_ids
    assert marks == sorted(policy.processor.tokenizer.convert_tokens_to_ids(names.split()))
    cfg = replace(cfg, max_new_tokens=60, temperature=50.0, top_p=1.0)  # near uniform over some 80 tokens
    prompts = prompts_of(policy, cfg, tmp_path)
    tokens = torch.cat([r.tokens for r in pebr.generate_rollouts(policy, prompts, 8, cfg, "")])
    assert not torch.isin(tokens, torch.tensor(marks)).any() and len(tokens.unique()) > 60


def test_the_folders_generation_config_does_not_leak_and_is_kept_on_saving(toy, cfg, tmp_path):
    cfg = replace(cfg, fast=False, temperature=3.0)
    policy = pebr.load_policy(str(toy / "model"), cfg)
    prompts = prompts_of(policy, cfg, tmp_path)
    expected = [r.text for r in pebr.generate_rollouts(policy, prompts, 4, cfg, "")]
    policy.saved_generation_config.update(min_new_tokens=7, no_repeat_ngram_size=1, repetition_penalty=1.5)
    pebr.save_policy(policy, tmp_path / "model")
    leaky = pebr.load_policy(str(tmp_path / "model"), cfg)
    assert leaky.end_ids == policy.end_ids and len(leaky.end_ids) == 2
    assert leaky.saved_generation_config.no_repeat_ngram_size == 1
    assert [r.text for r in pebr.generate_rollouts(leaky, prompts, 4, cfg, "")] == expected


def test_special_tokens_are_not_doubled_and_warmup_labels_are_the_response_and_its_end(policy, cfg, toy):
    tokenizer = policy.processor.tokenizer  # made one that adds a begin token by itself
    begin = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    adds = data.tokenizers.processors.TemplateProcessing("<|im_start|> $A", special_tokens=[begin])
    tokenizer._tokenizer.post_processor = adds
    for row in data.load_rows(str(toy / "sft.json"))[0][:3]:
        example = pebr.encode_example(policy, row, cfg)
        assert example.prompt.inputs["input_ids"][0].tolist().count(begin[1]) == 2  # user and assistant
        *labels, end = example.tokens.tolist()
        assert tokenizer.decode(labels).split() == row.response.split() and end == tokenizer.eos_token_id
    with pytest.raises(DataError, match=r"row 7: its text holds <\|image_pad\|>"):
        pebr.encode_prompt(policy, Row("row 7", "7", "red <|image_pad|>", "1"), cfg)


def test_a_frozen_vision_tower_does_not_train_and_has_no_backward_pass(policy, cfg, tmp_path):
    runs, model = Counter(), policy.model.base_model
    model.visual.blocks[0].attn.register_forward_hook(lambda *_: runs.update(["vision"]))
    model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: runs.update(["text"]))
    cfg = replace(cfg, freeze_vision=True, gradient_checkpointing=True, micro_batch_size=15)
    gradients, _ = grpo_step(policy, grouped_rollouts(policy, cfg, tmp_path), cfg)
    assert runs == {"vision": 1, "text": 2}  # the language model is computed once more in the backward pass
    assert "lm_head.weight" in gradients and not any("visual" in name for name in gradients)


def test_the_bf16_reference_keeps_its_rotary_frequencies_in_float32(toy, cfg):
    exact = dict(pebr.load_policy(str(toy / "model"), cfg).named_buffers())
    reference = pebr.load_reference(str(toy / "model"), replace(cfg, mixed_precision="bf16"))
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16} and "inv_freq" in str(exact.keys())
    for name, buffer in reference.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, exact[name]), name


# ---- A pretended device: what a GPU would refuse, on a machine without one ---------------------------------

DEVICE = torch.device("meta")  # "cuda" would make the autograd engine look for a driver


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on DEVICE, and does not meet CPU tensors."""

    is_cuda = True  # for pebr.py, which has its own kernels for CUDA
    tolist = lambda self: self.elem.tolist()

    @staticmethod
    def __new__(cls, elem):
        same = dict(strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype)
        same |= dict(device=DEVICE, requires_grad=elem.requires_grad)
        made = torch.Tensor._make_wrapper_subclass(cls, elem.size(), **same)
        made.elem = elem
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Compute on the CPU; refuse CPU tensors that are neither numbers nor indices."""
        kwargs, name = kwargs or {}, func.__name__.split(".")[0]
        ours = any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs)))
        checked = tree_leaves((args[:1], args[2:]) if "index" in name else (args, kwargs))
        foreign = any(type(x) in (torch.Tensor, torch.nn.Parameter) and x.dim() for x in checked)
        if ours and foreign and "copy" not in name:
            raise RuntimeError(f"{func}: tensors on the device and on the CPU meet")
        if asked := kwargs.get("device"):
            kwargs, ours = kwargs | {"device": "cpu", "pin_memory": False}, asked == DEVICE
        args_, kwargs_ = tree_map(lambda x: x.elem if isinstance(x, OnDevice) else x, (args, kwargs))
        if func is torch.ops.aten.bmm.dtype:  # which only CUDA has
            func, args_ = torch.matmul, [x.to(args_[2]) for x in args_[:2]]
        out = func(*args_, **kwargs_)
        if name.endswith("_") and not name.startswith("__"):
            return args[0]  # in place
        return tree_map(lambda x: OnDevice(x) if ours and isinstance(x, torch.Tensor) else x, out)


class PretendDevice(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # where torch.zeros(..., device=DEVICE) is seen
    __torch_dispatch__ = lambda self, *call: OnDevice.__torch_dispatch__(*call)


def with_autocast(product):
    """F.linear or the like, in bf16 under autocast, which itself knows nothing of OnDevice."""
    wide = lambda x: isinstance(x, torch.Tensor) and x.dtype == torch.float32
    cast = lambda x: x.bfloat16() if wide(x) and torch.is_autocast_enabled("cpu") else x
    return lambda *args, **kwargs: product(*map(cast, args), **kwargs)


@contextmanager
def device(where, bf16):
    """Inside, the run's device is the CPU or DEVICE. Attention takes the kernel that does not ask for it."""
    new = torch.tensor  # which, given a device, does not reach the mode
    plain = lambda x: x.tolist() if isinstance(x, OnDevice) else x
    tensor = lambda values, device=None, **how: new(tree_map(plain, values), **how).to(device=device)
    mask = lambda L, S: torch.ones(L, S, dtype=torch.bool, device=where).tril(S - L)
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(Accelerator, "device", where)
        patch.setattr(Accelerator, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16, bf16))
        patch.setattr(pebr, "varlen_attn", windows_one_by_one)
        patch.setattr(pebr, "causal_lower_right", mask)  # torch's own is a tensor class without a device
        if where == DEVICE:
            patch.setattr(torch, "tensor", tensor)
            for name in ("linear", "conv3d", "scaled_dot_product_attention"):
                patch.setattr(F, name, with_autocast(getattr(F, name)))
        with PretendDevice() if where == DEVICE else nullcontext():
            yield patch


@pytest.mark.parametrize("precision, rel, absolute", [("no", 1e-4, 1e-5), ("bf16", 2e-2, 2e-2)])
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_a_pretended_device_gives_the_cpus_values(fast, again, precision, rel, absolute, toy, cfg, tmp_path):
    """A warm-up and a perception step of the real loops. Pictures of several windows, of one, and none."""
    cfg = replace(cfg, fast=fast, mixed_precision=precision, gradient_checkpointing=again, learning_rate=0.1)
    cfg = replace(cfg, batch_size=3, update_batch_size=2, max_steps=1, kl_coef=0.5)
    images = [[picture(tmp_path / "0.png", (168, 140))], [picture(tmp_path / "1.png", (56, 56))], []]
    rows = [Row(f"row {i}", str(i), "red", "1", paths, ["red"]) for i, paths in enumerate(images)]
    sft, found, bf16 = data.load_rows(str(toy / "sft.json"))[0][:4], [], precision == "bf16"
    score = lambda rollouts, _: [{"x": float(r.tokens[0] % 5)} for r in rollouts]
    move = lambda policy, *inputs: tuple(moved for [moved] in _to_kwargs(*inputs, where, False))

    def prepare(self, policy, optimizer):  # the pretended .to() makes new parameters; CUDA's would not
        if fast and bf16 and where == DEVICE:  # as load_policy has it on CUDA
            policy.model.config.vision_config._attn_implementation = "varlen_flash"
        policy.banned_ids = torch.tensor(policy.banned_ids)  # torch would send a list to the real meta device
        policy.register_forward_pre_hook(move, with_kwargs=True)  # as DDP and FSDP2 do on CUDA
        generate = policy.generate
        if bf16:  # FSDP2 moves generate's inputs, too, DDP does not: both must do
            policy.generate = lambda *inputs: generate(*_to_kwargs(inputs, {}, where, False)[0][0])
        return policy.to(where), torch.optim.SGD(policy.parameters(), lr=0.1)

    for where in (torch.device("cpu"), DEVICE):
        with device(where, bf16) as patch:
            if where == DEVICE:
                with pytest.raises(RuntimeError, match="on the device and on the CPU meet"):
                    torch.arange(3.0, device=DEVICE) + torch.ones(3)
            patch.setattr(pebr, "checked_rows", lambda *args: sft if "response" in args[3] else rows)
            patch.setattr(pebr, "score_parts", score)
            patch.setitem(pebr.STAGE_REWARDS, "perception", {"x": 1.0})
            patch.setattr(Accelerator, "prepare", prepare)
            for stage, train in (("warmup", pebr.warmup), ("perception", pebr.train_grpo)):
                folder = tmp_path / where.type / stage
                folder.mkdir(parents=True)
                policy = train(replace(cfg, stage=stage, from_model=str(toy / "model")), folder)
                logs = [pebr.read_jsonl(folder / name) for name in ("metrics.jsonl", "samples.jsonl")]
                found.append((*logs, [p.detach().cpu() for p in policy.parameters()]))
    for ([exact], samples, weights), ([line], same_samples, same_weights) in zip(found[:2], found[2:]):
        assert line == pytest.approx(exact, rel=rel, abs=absolute) and exact["grad_norm"] > 0.01
        assert samples == same_samples  # rollouts, rewards, advantages
        torch.testing.assert_close(same_weights, weights, rtol=rel, atol=absolute)


# ---- Config and stages -------------------------------------------------------------------------------------

SMALL = "--max_steps 2 --batch_size 4 --update_batch_size 2 --group_size 2 --max_new_tokens 16 --threads 1"
SMALL += " --micro_batch_size 3 --eval_samples 2"


@contextmanager
def spread_rewards(module=pebr, levels=5):
    """A part of the reward follows from the text: so small a model earns nothing else and would not move."""
    score = module.score_parts
    earned = lambda r: {"format": len(r.text) % levels / (levels - 1)}
    spread = lambda rollouts, *how: [part | earned(r) for part, r in zip(score(rollouts, *how), rollouts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "score_parts", spread)
        yield


def run(run_dir, *argv):
    with spread_rewards():
        pebr.main(words("--run_dir", run_dir, "--threads 1", *argv))


def run_script(command, *argv):
    """A command line. Returns what was printed."""
    done = subprocess.run([sys.executable, *words(command, *argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def calls_of(name, monkeypatch):
    """The arguments of each call of a function of pebr.py, from now on."""
    calls, real = [], getattr(pebr, name)
    monkeypatch.setattr(pebr, name, lambda *args, **named: calls.append(args) or real(*args, **named))
    return calls


words = lambda *argv: " ".join(map(str, argv)).split()  # of a line, as the shell would split it
read_json = lambda path: json.loads(path.read_text())
read_lines = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
weights_of = lambda folder: load_file(folder / "model.safetensors")
peak_mib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # of this process


def files_of(folder):
    """{name: bytes} of what a run leaves, without clocks, paths and the toy: the same for all of a seed."""
    skipped = {"timing.jsonl", "settings.json", "run.lock", "toy"}
    names = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(n): path.read_bytes() for n, path in names.items() if not skipped & {n.name, n.parts[0]}}


def new_run(toy, folder):
    folder.mkdir(exist_ok=True)
    (folder / "toy").exists() or (folder / "toy").symlink_to(toy)
    return folder


def small(stage, run_dir):
    """Flags of a stage of two steps. The untrained model gets nothing right: RL is given all questions."""
    given = f"--from_model {run_dir}/warmup --from_data {run_dir}/toy/train.json"
    return f"--stage {stage} {SMALL} " + given * (stage in ("perception", "reasoning"))


@pytest.fixture(scope="session")
def toy_run(toy, tmp_path_factory):
    run_dir = new_run(toy, tmp_path_factory.mktemp("stages") / "run")
    for stage in pebr.ORDER:
        run(run_dir, small(stage, run_dir))
    return run_dir


def test_defaults_are_the_papers_and_stage_toy_and_flags_follow_in_this_order():
    paper = """--learning_rate 1e-6 --epochs 1 --temperature 1.2 --top_p 0.99 --group_size 8 --kl_coef 0.01
        --ratio_clip_low 0.2 --ratio_clip_high 0.3 --dual_clip 3 --grad_clip_norm 1 --cosine_lo 0
        --cosine_hi 0.4 --max_length 2048 --max_new_tokens 2048 --max_pixels 802816 --no-freeze_vision
        --eval_temperature 0.5 --eval_samples 1"""
    for stage, theirs in {
        "warmup": "--learning_rate 1e-5 --epochs 2 --batch_size 128 --freeze_vision --max_length 4096",
        "perception": "--batch_size 560 --update_batch_size 112",
        "reasoning": "--batch_size 512 --update_batch_size 128 --epochs 2",
    }.items():
        cfg = vars(pebr.resolve(stage, {"model": "some/folder"}))
        assert cfg == cfg | pebr.parse_flags(words(paper, theirs))
    flags = words("--learning_rate 0.5 --no-freeze_vision --gradient_checkpointing --top_p 0.9")
    flags = pebr.parse_flags(flags)
    named, implied = pebr.resolve("warmup", flags), pebr.resolve("warmup", flags | {"stage": "sample"})
    assert (named.learning_rate, named.freeze_vision, named.gradient_checkpointing) == (0.5, False, True)
    assert implied.learning_rate == pebr.TOY["warmup"]["learning_rate"]  # training flags: the named stage's
    assert named.top_p == implied.top_p == 0.9


def test_the_warmups_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_as_a_cosine():
    rates = [pebr.warmup_learning_rate(step, 100, Config(learning_rate=1.0)) for step in range(1, 101)]
    assert rates[:11] == pytest.approx([*(0.1 * i for i in range(1, 11)), 1.0])
    assert rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3  # half-way between steps 11 and 101


def test_what_cannot_work_stops_before_the_first_stage_with_a_message_that_names_it(tmp_path, toy):
    table = [
        ("--test_data /no/such/file.json", "/no/such/file.json: no such file"),
        ("--from_model x", "--from_model and --from_data belong to one stage"),
        ("--stage percept", "--stage percept is none of"),
        ("--stage perception --group_size 1", "--group_size 1"),
        ("--stage perception --batch_size 10 --update_batch_size 4", "a multiple of --update_batch_size 4"),
        ("--stage perception --model x --from_model x --from_data y", "perception needs --clip_model"),
        (f"--stage perception --model x --sft_data {toy}/sft.json", "--stage sample needs --train_data"),
        ("--stage evaluate --clip_model local-dir:/no/folder", "--clip_model local-dir:/no/folder"),
        ("--seed 5", "was made with --seed 0 "),
        ("--toy_shapes 0.5", "was made with --seed 0 --toy_shapes 0.1"),
        (f"--stage warmup --overwrite --from_model {tmp_path}/x/../run/sample", "would delete .*/run/sample"),
        ("--stage ablation --ablation_seeds 0", "--ablation_seeds 0: must be from 1 to inf"),
        ("--stage warmup --batch_size 0", "--batch_size 0: must be from 1 to inf"),
        ("--stage perception --temperature 0", "--temperature 0.0: must be from 0.01"),
        ("--stage perception --cosine_lo 0.9", "--cosine_lo 0.9: must be below --cosine_hi"),
        ("--toy_shapes 2", "--toy_shapes 2.0: must be from 0 to 1"),
    ]
    run_dir = new_run(toy, tmp_path / "run")
    for argv, reason in table:
        with pytest.raises(SystemExit, match=reason):
            run(run_dir, argv, "--mixed_precision no")
    with open(run_dir / "run.lock", "w") as lock, pytest.raises(SystemExit, match="another run is using"):
        pebr.fcntl.flock(lock, pebr.fcntl.LOCK_EX)
        run(run_dir, "--stage warmup")
    assert not any((run_dir / stage).exists() for stage in pebr.ORDER)
    pebr.write_text(tmp_path / "mine" / "warmup" / "settings.json", "{}")
    with pytest.raises(SystemExit, match="mine was begun with a --model: repeat it"):
        run(tmp_path / "mine", "--stage perception")


def test_a_broken_model_folder_gives_the_librarys_message_and_runs_no_code(toy, cfg, tmp_path):
    def own_code(folder):
        evil = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"), "evil.Evil")
        for path in (folder / "config.json", folder / "processor_config.json"):
            own = {"auto_map": evil, "model_type": "new", "processor_class": "New"}
            path.write_text(json.dumps(read_json(path) | own))
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")

    swap = lambda path, old, new: path.write_bytes(path.read_bytes().replace(old, new))
    capped = b'"text_config": {"final_logit_softcapping": 30.0,'
    table = [
        (lambda f: (f / "config.json").write_text('{"a'), "Unterminated string"),
        (lambda f: (f / "processor_config.json").unlink(), "image processor"),
        (lambda f: (f / "chat_template.jinja").unlink(), "no processor with a chat template"),
        (lambda f: os.truncate(f / WEIGHTS, 10_000), "deserializing header"),
        (lambda f: swap(f / WEIGHTS, b"lm_head", b"no_head"), "weights lack lm_head.w"),
        (lambda f: swap(f / "config.json", b'"text_config": {', capped), "capping changes its logits"),
        (lambda f: torch.save(Payload(f / "ran"), (f / WEIGHTS).rename(f / "pytorch_model.bin")), WEIGHTS),
        (own_code, "trust_remote_code"),
    ]
    for i, (change, reason) in enumerate(table):
        folder = shutil.copytree(toy / "model", tmp_path / str(i))
        change(folder)
        with pytest.raises(ConfigError, match=f"(?s){folder}.*{reason}"):
            pebr.load_policy(str(folder), cfg)
        assert not (folder / "ran").exists()
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        pebr.load_policy("nowhere", cfg)


def test_a_run_moves_parameters_and_leaves_what_the_readme_promises(toy_run):
    for stage, start in (("warmup", "toy/model"), ("perception", "warmup"), ("reasoning", "warmup")):
        folder, records = toy_run / stage, read_lines(toy_run / stage / "metrics.jsonl")
        assert [r["step"] for r in records] == [1, 2] and records[0].keys() == records[1].keys()
        assert all(0 < r["grad_norm"] < 100 for r in records)
        assert stage == "warmup" or {r["learning_rate"] for r in records} == {1e-4}  # constant
        assert (folder / "done").exists() and not list(folder.glob("checkpoint*"))
        before, after = weights_of(toy_run / start), weights_of(folder)
        moved = {n for n in after if (after[n] - before[n]).abs().max() > 5e-5}  # not by weight decay alone
        assert any("visual" in name for name in moved) and "lm_head.weight" in moved
    samples = read_lines(toy_run / "perception" / "samples.jsonl")
    assert len(samples) == 2 * 4  # steps x questions
    lists = words("responses tokens truncated parts rewards advantages")
    assert {len(samples[0][name]) for name in lists} == {2}  # G
    assert samples[0]["parts"][0].keys() == {"clip", "cosine", "keyword", "format", "length", "accuracy"}
    named = words("base warmup perception reasoning greedy sampled interval pass@2")
    assert set(named) <= set(words((toy_run / "evaluate" / "test" / "table.txt").read_text()))


def test_a_done_stage_is_kept_and_redone_from_its_seed_without_those_after_it(toy_run, tmp_path, capsys):
    run_dir = shutil.copytree(toy_run, tmp_path / "run", symlinks=True)
    flags, made = small("perception", toy_run), run_dir / "perception"
    first = files_of(toy_run / "perception")
    run(run_dir, flags, "--temperature 1.0")
    assert "perception is done, with the flags in its settings.json; --overwrite" in capsys.readouterr().out
    assert files_of(made) == first and (run_dir / "evaluate").exists()
    run(run_dir, flags, "--temperature 1.0 --overwrite")
    assert files_of(made)["metrics.jsonl"] != first["metrics.jsonl"]
    assert not (run_dir / "reasoning").exists() and (run_dir / "sample" / "done").exists()
    (made / "done").unlink()
    with pytest.raises(SystemExit, match="perception was begun with --temperature 1.0; --overwrite begins"):
        run(run_dir, flags)
    run(run_dir, flags, "--overwrite")
    assert files_of(made) == first and {"samples.jsonl", "model.safetensors"} <= first.keys()


def test_missing_stages_are_made_first_and_an_empty_split_says_what_to_do(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(pebr.TOY["warmup"], "max_steps", 2)  # a flag would not be for it
    run_dir = new_run(toy, tmp_path / "run")
    flags = "--stage perception --group_size 2 --max_new_tokens 16 --max_steps 1"
    with pytest.raises(SystemExit, match="easy.json: no rows"):  # the untrained model gets nothing right
        run(run_dir, flags, f"--from_data {run_dir}/sample/easy.json")
    assert [stage for stage in pebr.ORDER if (run_dir / stage / "done").exists()] == ["warmup", "sample"]
    run(run_dir, flags, f"--from_data {toy}/train.json")  # what the message says


def test_a_response_counts_towards_max_length_in_the_warmup_only(policy, cfg, toy):
    path, cfg = f"{toy}/sft.json", replace(cfg, max_length=40)  # a prompt has about 25 tokens, a response 40
    assert len(pebr.checked_rows(path, replace(cfg, stage="sample"), policy, ("answer",))) == FEW["sft_rows"]
    with pytest.raises(ConfigError, match="tokens, over --max_length"):
        pebr.checked_rows(path, replace(cfg, stage="warmup"), policy, ("response",))


def test_broken_rows_stop_the_run_before_training_or_are_dropped(toy, toy_run, tmp_path, capsys):
    rows, run_dir = read_json(toy / "train.json")[:8], new_run(toy, tmp_path / "run")
    for i, row in enumerate(rows):
        row["images"] = [Path(picture(tmp_path / f"{i}.png")).name]
    flags = f"{small('reasoning', toy_run)} --from_data {tmp_path}/rows.json"
    changes = [  # the first two are found by the processor, the third without a model
        (lambda: os.truncate(tmp_path / "0.png", 60), "0.png is not readable"),
        (lambda: rows[1].update(problem="red " * 70), r"\d+ tokens, over --max_length"),
        (lambda: rows[2].pop("answer"), '"answer" is missing'),
    ]
    for i, (change, reason) in enumerate(changes):
        change()
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        listed = f"(?s)rows.json: {i % 2 + 1} broken rows.*rows.json row {i}: .*{reason}.*--skip_bad_rows"
        with pytest.raises(SystemExit, match=listed):
            run(run_dir, flags)
    assert not (run_dir / "reasoning" / "metrics.jsonl").exists()
    run(run_dir, flags, "--skip_bad_rows")
    dropped = capsys.readouterr().out
    assert all(re.search(f"row {i}: .*{reason}", dropped) for i, (_, reason) in enumerate(changes))
    samples = read_lines(run_dir / "reasoning" / "samples.jsonl")
    assert {s["qid"] for s in samples} == {row["qid"] for row in rows[3:]}


def test_out_of_memory_names_the_flags_and_other_errors_are_not_hidden(toy, tmp_path, monkeypatch):
    out, advice = "CUDA out of memory.", "out of memory. Lower --micro_batch_size"
    for reason, error, message in ((out, SystemExit, advice), ("other", RuntimeError, "other")):
        fails = lambda *_, reason=reason: torch._check(False, lambda: reason)  # raises a RuntimeError
        monkeypatch.setattr(torch.Tensor, "backward", fails)
        with pytest.raises(error, match=message):
            run(new_run(toy, tmp_path / "run"), small("warmup", ""))


def test_a_dry_run_measures_full_length_steps(toy, tmp_path, capsys):
    run_dir = new_run(toy, tmp_path / "run")
    run(run_dir, f"--stage dryrun {SMALL} --batch_size 2 --max_new_tokens 9 --image_root {toy}")
    measured = json.loads(capsys.readouterr().out.split("DRYRUN ")[1].split("\n")[0])
    assert min(measured[name] for name in ("rollout_s", "update_s", "tokens_per_s", "peak_gib")) > 0
    for sample in read_lines(run_dir / "dryrun" / "samples.jsonl"):
        assert {*sample["tokens"]} == {9} and all(sample["truncated"])
    assert measured["rl_hours"] > 0 and not (run_dir / "dryrun" / "model.safetensors").exists()


def test_a_complete_toy_world_is_left_alone(toy, tmp_path):
    made = shutil.copytree(toy, tmp_path / "toy")
    (made / "sft.json").unlink()
    data.build_toy_world(str(made), 0, TINY)
    assert not (made / "sft.json").exists()


def test_difficulty_is_all_some_or_none_right_of_exactly_n():
    rows = [Row("", str(i), "q", "a") for i in range(4)]
    scores = {"0": [1.0] * 8, "1": [1.0] + [0.0] * 7, "2": [0.0] * 8, "3": [1.0] * 7 + [0.0]}
    split = pebr.split_by_difficulty(rows, scores, 8)
    assert split == {"easy": [rows[0]], "medium": [rows[1], rows[3]], "hard": [rows[2]]}
    for n in (7, 16):
        with pytest.raises(DataError, match=f"{n} scores, not 8"):
            pebr.split_by_difficulty(rows[:1], {"0": [1.0] * n}, 8)


def test_steps_cover_each_epoch_once():
    cfg, rows = Config(batch_size=12, update_batch_size=4), list(range(10))
    with pytest.raises(ConfigError, match="no row is left"):
        pebr.StepLog(Path(), cfg, 0)
    flat = [row for step in range(1, 6) for row, _ in pebr.local_questions(rows, step, cfg)]
    assert all(sorted(flat[i : i + 10]) == rows for i in range(0, 60, 10)) and flat[:10] != flat[10:20]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_questions_are_encoded_in_order_and_for_a_gpu_in_threads(kind, monkeypatch):
    monkeypatch.setattr(Accelerator, "device", torch.device(kind))
    rows, threads = zip(*pebr.encode_all([("a", 0), ("b", 1)], lambda *each: (each, threading.get_ident())))
    assert rows == (("a", 0), ("b", 1)) and ({*threads} == {threading.get_ident()}) == (kind == "cpu")
    assert pebr.encode_all([], None) == []
    with pytest.raises(ZeroDivisionError):
        pebr.encode_all([(8, 4), (8, 0)], lambda a, b: a / b)


def test_a_stage_opens_a_picture_once_to_check_it_and_once_to_ask(toy, toy_run, tmp_path, monkeypatch):
    """Evaluation checks once for all models, then asks each twice."""
    run_dir, opened, counts = new_run(toy, tmp_path / "run"), calls_of("load_image", monkeypatch), {}
    shutil.copytree(toy_run / "warmup", run_dir / "warmup")
    monkeypatch.setattr(pebr, "write_report", lambda run_dir: None)  # it opens those that it shows
    for stage in pebr.ORDER[1:]:
        opened.clear()
        run(run_dir, "--stage", stage, SMALL)
        counts[stage] = len(opened)
        for name in ("easy", "medium"):  # as a better model would leave them; the pictures stay in the toy
            shutil.copy(toy / "train.json", run_dir / "sample" / f"{name}.json")
    assert set(Counter(opened).values()) == {1 + 4 * 2}  # four models, greedy and sampled
    rows = len(read_json(toy / "train.json"))
    assert counts["sample"] == 2 * rows
    assert counts["perception"] == counts["reasoning"] == rows + 2 * 4  # steps x questions


def test_only_this_runs_own_sampling_says_where_the_pictures_are(toy, toy_run, tmp_path):
    shutil.copytree(toy_run / "sample", new_run(toy, tmp_path) / "sample")
    for path in (f"{tmp_path}/sample/hard.json", f"{tmp_path}/sample/../sample/hard.json"):
        assert pebr.checked_rows(path, Config(run_dir=str(tmp_path)), None, ())
        with pytest.raises(ConfigError, match="picture .* is not in"):
            pebr.checked_rows(path, Config(run_dir=str(toy_run)), None, ())


def night_sky(folder, clip):
    """Not the toy: two pictures in a row, none in another, two answers that contradict each other; a TSV."""
    picture(folder / "moon.png", (60, 90), (240, 240, 200))
    picture(folder / "stars.jpg", (112, 56), (20, 20, 80))
    asked = [
        ("<image> or <image> : which has stars ?", ["moon.png", "stars.jpg"], "second"),
        ("What is the night like ?", [], "dark"),
        ("<image>How bright ?", ["stars.jpg"], "very"),
        ("<image>How bright ?", ["stars.jpg"], "hardly"),
    ]
    text = "### Image Description: a night sky .\n### Rationales: look .\n### Let's think step by step.\n"
    text += "### Step 1: think .\n### The final answer is: "
    sky, say = {"source": "sky", "key_words": ["night sky"]}, lambda *x: dict(zip(("role", "content"), x))
    rl = [sky | {"qid": q, "problem": q, "answer": a, "images": i} for q, i, a in asked[:3]]
    sft = [{"messages": [say("user", q), say("assistant", text + a)], "images": i} for q, i, a in asked]
    kit = [{"question": "How bright ?", "A": "very", "B": "hardly", "answer": "A"}] * 3
    for name, rows in (("rl.json", rl), ("sft.json", sft), ("Kit.tsv", kit)):
        write_rows(folder / name, *rows)
    vocabulary = words("user assistant", text, *(f"{q} {a}".replace("<image>", "") for q, _, a in asked))
    data.build_toy_model(folder / "model", 0, TINY, vocabulary)
    return f"""--model {folder}/model --train_data {folder}/rl.json --sft_data {folder}/sft.json
        --test_data {folder}/Kit.tsv --clip_model local-dir:{clip} --mixed_precision no --temperature 0.7
        --no-freeze_vision --max_new_tokens 32 --learning_rate 3e-3"""


def test_a_second_data_set_goes_through_all_stages_to_the_kits_judge(toy, tmp_path, capsys, monkeypatch):
    flags, steps = night_sky(tmp_path, toy / "clip"), {"warmup": "--max_steps 100"}
    rl = "--max_steps 2 --update_batch_size 2 --learning_rate 1e-3"
    for stage in pebr.ORDER:
        run(tmp_path, "--stage", stage, flags, "--batch_size 4 --update_batch_size 4", steps.get(stage, rl))
    easy, medium = (read_json(tmp_path / "sample" / f"{name}.json") for name in ("easy", "medium"))
    assert easy + medium == read_json(tmp_path / "rl.json")  # it finds answers; rows are as they came in
    assert "1 questions; 1 without a picture are left out" in capsys.readouterr().out
    path = tmp_path / "evaluate" / "Kit" / "reasoning" / "scores.json"
    records, scores = read_lines(path.with_name("predictions_greedy.jsonl")), read_json(path)
    with open(path.with_name("predictions_greedy.tsv"), newline="") as file:
        kit = list(csv.DictReader(file, delimiter="\t"))
    assert [row["index"] + row["A"] for row in kit] == ["0very", "1very", "2very"] and "image" not in kit[0]
    assert [row["prediction"] for row in kit] == [r["extracted"][0] or r["responses"][0] for r in records]
    assert scores["greedy"]["format"] > 0.5  # it has learned to answer in sections
    monkeypatch.setattr(pebr, "generate_rollouts", None)
    path.unlink()  # what is saved is scored again, and not asked again
    run(f"{tmp_path}/", "--stage evaluate", flags)
    assert read_json(path) == scores
    with pytest.raises(SystemExit, match="Kit was begun with --eval_temperature 0.5; --overwrite"):
        run(tmp_path, "--stage evaluate", flags, "--eval_temperature 0.1")


@pytest.mark.parametrize("stage, call, calls, minutes, left", [  # stopped after so many calls; what is left
    ("warmup", "optimizer_step", 1, 0, "checkpoint-1"),
    ("warmup", "optimizer_step", 1, 15, ""),  # goes on from the start
    ("perception", "optimizer_step", 2, 0, "checkpoint-1"),
    ("sample", "generate_rollouts", 1, 0, ""),  # goes on with the questions that have no line
])  # fmt: skip
def test_a_stage_resumes_to_the_same_files(
    stage, call, calls, minutes, left, toy_run, tmp_path, monkeypatch, capsys
):
    folder, before = new_run(toy_run / "toy", tmp_path / "run") / stage, iter([getattr(pebr, call)] * calls)
    flags = f"{small(stage, toy_run)} --checkpoint_minutes {minutes}"
    flags += f" --from_model {toy_run}/warmup --generate_batch_size 4" * (stage == "sample")
    ctrl_c = lambda *_: signal.default_int_handler(signal.SIGINT, None)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted; the same command"):
        patch.setattr(pebr, call, lambda *args: next(before, ctrl_c)(*args))
        run(folder.parent, flags)
    assert "".join(path.name for path in folder.glob("checkpoint-*")) == left
    log, newer = ("rollouts", "") if stage == "sample" else ("metrics", '{"step": 2, "loss": 1}\n')
    with open(folder / f"{log}.jsonl", "a") as file:
        file.write(newer + '{"st')  # a line after the checkpoint's, and a torn one
    if stage == "sample":  # or one split would be of two lengths
        with pytest.raises(SystemExit, match="was begun with --max_new_tokens 16; --overwrite begins"):
            run(folder.parent, flags, "--max_new_tokens 9")
    sent = calls_of("broadcast_object_list", monkeypatch)
    run(folder.parent, flags, "--skip_bad_rows")
    assert "was begun with --skip_bad_rows False" in capsys.readouterr().out
    assert files_of(folder) == files_of(toy_run / stage)
    for [[qids]] in sent:  # other processes need to know which questions are done, and not the answers
        assert len(qids) == 2 and all(type(qid) is str for qid in qids)


def all_stages(run_dir, seed, steps):
    """Every stage, in a process of its own; what it prints goes into a file."""
    for number in (1, 2):
        os.dup2(os.open(f"{run_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for stage in pebr.ORDER:
        flags = f"--seed {seed} --max_steps {steps} --checkpoint_minutes 0 --generate_batch_size 2"
        run(run_dir, small(stage, run_dir), flags)


def kill_and_compare(folder, seed, runs, steps):
    """All stages without a break; then `runs`, lists of stages: at a random moment after each has begun, the
    run is killed (SIGKILL) and started again. Returns (kills, files compared, names of those that differ)."""
    rng, kills, made, span = random.Random(seed), 0, [], 0.0
    server = multiprocessing.get_context("forkserver")  # its forks have imported everything
    server.set_forkserver_preload(["test_pebr"])
    for i, targets in enumerate([(), *runs]):
        run_dir, begin = folder / f"run{i}", time.monotonic()
        data.build_toy_world(str(run_dir / "toy"), seed, TINY)
        for stage in (*targets, None):  # the last start is not killed
            process = server.Process(target=all_stages, args=(run_dir, seed, steps))
            process.start()
            sign = rng.choice(["**/settings.json", "**/*.jsonl"])
            while stage and process.is_alive() and not any((run_dir / stage).glob(sign)):
                time.sleep(0.01)
            process.join(rng.uniform(0, span / 8) if stage else None)
            kills += process.is_alive()
            process.kill()
            process.join()
        assert process.exitcode == 0, Path(f"{run_dir}.log").read_text()[-3000:]
        made.append(files_of(run_dir))
        span = span or time.monotonic() - begin
    whole, *others = made
    pairs = [(name, other.get(name)) for other in others for name in whole | other]
    return kills, len(pairs), [name for name, content in pairs if content != whole.get(name)]


def test_a_run_that_is_killed_at_random_moments_ends_with_the_files_of_one_that_is_not(tmp_path):
    kills, compared, differ = kill_and_compare(tmp_path, 0, [("warmup", "perception", "evaluate")], 3)
    assert kills >= 2 and compared > 40 and differ == []  # the last kill may come too late


def kills():
    """The long form: every stage of four runs is killed once, for two seeds."""
    for seed in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            found = kill_and_compare(Path(folder), seed, [pebr.ORDER] * 4, 10)
        print("\nseed {}: {} kills, {} files compared, differ: {}".format(seed, *found), flush=True)


# ---- Several processes -------------------------------------------------------------------------------------

ROOT, PROCESSES = Path(pebr.__file__).parent, torch.cuda.device_count() or 2
FSDP2 = f"-m accelerate.commands.launch --main_process_port 0 --config_file {ROOT}/configs/fsdp2.yaml"
LAUNCHERS = {  # by the class that accelerate makes of the policy
    "Policy": "",
    "DistributedDataParallel": f"-m torch.distributed.run --standalone --nproc_per_node {PROCESSES}",
    "FSDPPolicy": f"{FSDP2} --num_processes {PROCESSES}",
}


def train(*argv):
    """pebr.py with rewards that are not all the same; says what accelerate has made of the policy."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    prepare, start = pebr.prepare_training, pebr.start_accelerator
    pebr.prepare_training = lambda *args: (made := prepare(*args), print("trains", type(made[0])))[0]

    def start_accelerator(cfg):
        started = start(cfg)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():  # made it DDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            started.state.distributed_type = DistributedType.FSDP
            started.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        return started

    pebr.start_accelerator = start_accelerator
    if "KILLED" in os.environ:  # in the second update
        updates = iter([pebr.optimizer_step])
        pebr.optimizer_step = lambda *args: next(updates, lambda *_: os.kill(os.getpid(), 9))(*args)
    with spread_rewards(levels=2):
        pebr.main(list(argv))


def three_updates(wrapper, model, toy, folder, *argv):
    """Weights, metrics, samples of three updates; of each one's four questions two have no picture."""
    rows = read_json(new_run(toy, folder) / "toy" / "train.json")[:8]
    for row in rows[2:4] + rows[6:8]:
        row.update(images=[], problem=row["problem"].replace("<image>", ""))
    (folder / "rows.json").write_text(json.dumps(rows))
    files = f"--from_model {model} --from_data {folder}/rows.json --image_root {toy} --run_dir {folder}"
    sizes = "--update_batch_size 4 --group_size 3 --max_steps 3 --max_new_tokens 40"
    how = f"train --stage reasoning {SMALL} --learning_rate 1e-4 --temperature 2.0"
    printed = run_script(LAUNCHERS[wrapper], __file__, how, files, sizes, *argv)
    assert f".{wrapper}'>" in printed
    assert "Removed shared tensor" not in printed  # accelerate says so of tied weights at every checkpoint
    made = folder / "reasoning"
    return weights_of(made), read_lines(made / "metrics.jsonl"), read_lines(made / "samples.jsonl")


def differences(found, expected):
    """Of two three_updates with the same responses: the largest of a metric, relative, and of a weight."""
    (weights, metrics, samples), (other_weights, other_metrics, other_samples) = found, expected
    assert [s["responses"] for s in samples] == [s["responses"] for s in other_samples]
    pairs = [(a[k], b[k]) for a, b in zip(metrics, other_metrics, strict=True) for k in b]
    of_weights = [float((weights[name] - other_weights[name]).abs().max()) for name in other_weights]
    return {"metrics": max(abs(a - b) / max(abs(b), 0.01) for a, b in pairs), "weights": max(of_weights)}


def test_two_processes_make_the_updates_of_one_by_ddp_and_by_fsdp2(toy, toy_run, tmp_path):
    """Ragged responses, tied groups, micro-batches without pictures on the second process only."""
    model, start = toy_run / "warmup", weights_of(toy_run / "warmup")
    one, *others = (three_updates(wrapper, model, toy, tmp_path / wrapper) for wrapper in LAUNCHERS)
    weights, metrics, samples = one
    assert max((weights[name] - start[name]).abs().max() for name in start) > 1e-4
    assert len({n for s in samples for n in s["tokens"]}) > 3
    assert 0 < sum(m["tied_groups"] for m in metrics) < 3
    for two in others:
        found = differences(two, one)
        assert found["metrics"] < 1e-4 and found["weights"] < 1e-5


@pytest.mark.parametrize("wrapper, kl", [("Policy", 0.05), ("FSDPPolicy", 1e-4)])
def test_tied_embeddings_train_in_bf16_from_an_equal_reference(wrapper, kl, toy, tmp_path):
    """As the real 3B has them. FSDP2 rounds all weights as the reference's are, autocast only matrices."""
    model = hf.AutoModelForImageTextToText.from_pretrained(toy / "model")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(shutil.copytree(toy / "model", tmp_path / "tied"))
    before = weights_of(tmp_path / "tied")
    bf16 = "--mixed_precision bf16 --gradient_checkpointing --max_new_tokens 12 --checkpoint_minutes 0"
    after, metrics, _ = three_updates(wrapper, tmp_path / "tied", toy, tmp_path / "run", bf16)
    assert all(w.dtype == torch.float32 for w in after.values()) and "lm_head.weight" not in after
    [name] = [name for name in after if "embed_tokens" in name]
    assert (after[name] - before[name]).abs().max() > 1e-5 and metrics[2]["skipped_updates"] == 0
    assert metrics[0]["kl"] < kl and 1e-6 < metrics[0]["sampler_gap"] < 0.05  # rounding, and not more


def test_processes_wait_two_hours_for_the_one_that_writes(monkeypatch):
    seen, state = {}, pebr.PartialState
    monkeypatch.setattr(pebr, "PartialState", lambda **settings: seen.update(settings) or state(cpu=True))
    pebr.start_accelerator(Config(mixed_precision="no", threads=1))
    assert seen["timeout"].total_seconds() == 2 * 3600  # NCCL's ten minutes are too short for a checkpoint
    monkeypatch.setattr(pebr, "is_fsdp_enabled", lambda: True)  # as another config file may have it
    with pytest.raises(ConfigError, match="use configs/fsdp2.yaml"):
        pebr.start_accelerator(Config(mixed_precision="no", threads=1))


# ---- Ablation and report; the README: what it names exists, its patches apply and train --------------------


def test_the_ablation_compares_arms_of_equal_length_from_one_warmup(toy, toy_run, tmp_path):
    folder = tmp_path / "ablation"
    run_dir = shutil.copytree(toy_run, folder / "shapes0.1_seed0", symlinks=True)
    shutil.rmtree(run_dir / "evaluate")
    for name in ("easy", "medium", "easy_and_medium"):
        shutil.copy(toy / "train.json", run_dir / "sample" / f"{name}.json")
    run(tmp_path, f"--stage ablation --ablation_seeds 1 {SMALL}")
    scores = read_json(folder / "shapes0.1.json")
    assert list(scores) == [*pebr.LABELS.values(), pebr.GAP]
    for arm in pebr.ARMS:
        assert read_json(run_dir / arm / "settings.json")["from_model"] == f"{run_dir}/warmup"
        assert len(read_lines(run_dir / arm / "metrics.jsonl")) == 2 + 2
        theirs = read_json(run_dir / "evaluate" / "test" / arm / "scores.json")
        assert scores[pebr.LABELS[arm]]["greedy keyword"] == [theirs["greedy"]["keyword"]]
    see, reason, mixed = (pebr.STAGE_REWARDS[name] for name in ("perception", "reasoning", "mixed"))
    half = {part: (see.get(part, 0) + reason.get(part, 0)) / 2 for part in see | reason}
    assert mixed == pytest.approx(half)
    assert (folder / "shapes0.1.txt").read_text() == pebr.ablation_table(scores) + "\n"
    figures = [ElementTree.parse(folder / f"{name}.svg") for name in ("shapes0.1", "shares")]
    assert [len(figure.findall(".//{*}polyline")) for figure in figures] == [
        3 * 4,
        3,
    ]  # panels x arms; measures


def test_the_ablations_table_has_mean_and_deviation_of_any_data_set(tmp_path):
    """One without the toy's category and keywords. Mean 0.5, unbiased deviation sqrt(2 * 0.25 ** 2)."""
    found = {}
    for accuracy in (0.25, 0.75):
        scores = {"greedy": {"accuracy": accuracy, "keyword": None, "categories": {}}}
        pebr.write_text(tmp_path / "scores.json", json.dumps(scores))
        pebr.add_scores(found, tmp_path)
    header, gap, _ = pebr.ablation_table({pebr.GAP: found}).splitlines()
    assert [words(header), words(gap)] == [["greedy", "accuracy"], words("two - reasoning 0.500 ± 0.354")]


def test_figures_place_means_over_seeds_at_their_step_and_gaps_at_their_share(tmp_path):
    """Steps 0, 1, 4 and shares 0.1, 0.5 lie on x = 40 to 305; scores from 0 to 0.5 on y = 185 to 30."""
    scores = {model: {"greedy accuracy": [0, 0]} for model in [*pebr.LABELS.values(), pebr.GAP]}
    pebr.write_text(tmp_path / "shapes0.5.json", json.dumps(scores))
    scores["two stages"] = scores[pebr.GAP] = {"greedy accuracy": [0.25, 0.75]}
    pebr.write_text(tmp_path / "shapes0.1.json", json.dumps(scores))
    pebr.write_figures(tmp_path, "shapes0.1", scores, 1, 4)
    figures = [ElementTree.parse(tmp_path / f"{name}.svg") for name in ("shapes0.1", "shares")]
    lines = [figure.find(".//{*}polyline").get("points") for figure in figures]
    assert lines == ["40.0,185.0 106.2,185.0 305.0,30.0", "40.0,30.0 305.0,185.0"]


HOSTILE = """ "'><script>alert(1)</script><img src=x onerror=alert(1)></p></style></article><a href="x:0">"""


def tags_and_text(page):
    """The kinds of tags that a browser sees, with the names of their attributes, and the text between."""
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
    card = pebr.gallery(Row("", "1", "<image>q", "2", [], ["red dot", "cat"]), ["head"], [GOOD])
    assert '<span class="k1">red dot</span>, <span class="k0">cat</span>' in card
    assert '<p class="description"><small>Image Description</small> Two red dots. </p>' in card
    run_dir = shutil.copytree(toy_run, tmp_path / "run")  # and its toy world
    page, samples = run_dir / "report.html", run_dir / "perception" / "samples.jsonl"
    tags, text = tags_and_text(page)
    assert ("img", "alt", "src") in tags and "Evaluation" in text and "Difficulty" in text
    assert all(f"{stage}, step 2" in text for stage in ("warmup", "perception", "reasoning"))
    for path in run_dir.rglob("settings.json"):
        path.write_text(path.read_text().replace(str(toy_run), str(run_dir)))
    for path in [*run_dir.rglob("samples.jsonl"), *run_dir.rglob("pred*.jsonl")]:
        pebr.write_jsonl(path, spoiled(read_lines(path)))
    for path in [run_dir / name for name in ("sample/hard.json", "toy/train.json", "toy/test.json")]:
        path.write_text(json.dumps(spoiled(read_json(path))))
    pebr.write_report(run_dir)
    hostile, (hostile_tags, hostile_text) = page.read_bytes(), tags_and_text(page)
    assert hostile_tags == tags and hostile_text.count(HOSTILE.strip()) > 100
    samples.write_text(json.dumps("x" * 2**20) + "\n" + samples.read_text() + '{"torn": ')
    pebr.write_report(run_dir)
    assert page.read_bytes() == hostile


README = (ROOT / "README.md").read_text()
PATCHES = re.findall(r"\n([^\n]+)\n```diff\n\+\+\+ (\S+)\n(.*?)```", README, re.DOTALL)


def test_flags_functions_and_departures_that_the_readme_names_exist():
    theirs = words("num_processes config_file num_machines machine_rank main_process_ip main_process_port")
    theirs += words("multi_gpu mode data work-dir")
    ours = set(re.findall(r"--(?:no-)?(\w+)", run_script(pebr.__file__, "--help")))
    named = {name.removeprefix("no-") for name in re.findall(r"--([a-z][\w-]+)", README)}
    assert named - {*theirs} <= ours and len(named & ours) > 25 and len(PATCHES) == README.count("```diff")
    table = README.split("## From the paper to the code")[1].split("\n## ")[0]
    named = re.findall(r"`(pebr|rewards|data)\.(\w+)`", table)
    assert len(named) > 15 and all(hasattr(sys.modules[module], name) for module, name in named)
    code = "".join((ROOT / name).read_text() for name in ("pebr.py", "rewards.py", "data.py"))
    header, departures = pebr.__doc__, [str(i) for i in range(1, 15)]
    assert re.findall(r"^\s*\[(\d+)\]", header, re.MULTILINE) == departures
    for text in (table, code.replace(header, "")):
        assert {*departures} <= {*re.findall(r"\[(\d+)\]", text)}


@pytest.mark.parametrize("title, file, hunks", PATCHES, ids=[title.split()[0] for title, *_ in PATCHES])
def test_a_patch_of_the_readme_applies_and_trains(title, file, hunks, toy, toy_run, tmp_path, monkeypatch):
    if "peft" in hunks:
        pytest.importorskip("peft")
    rows = read_json(toy / "train.json")
    if file == "data.py":
        rows = [{"text": row["problem"].replace("<image>", ""), "label": row["answer"]} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name in ("rewards", "data", "pebr"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
        monkeypatch.delitem(sys.modules, name)
    text = (tmp_path / file).read_text()
    for hunk in hunks.split("@@\n"):
        old, new = ("".join(re.findall(rf"^\{sign}(.*\n)", hunk, re.MULTILINE)) for sign in "-+")
        assert old and text.count(old) == 1, hunk
        text = text.replace(old, new)
    (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    fork = importlib.import_module("pebr")
    flags = f"--stage reasoning {SMALL} --from_model {toy_run}/warmup --from_data {tmp_path}/rows.json"
    with spread_rewards(fork):
        fork.main(words("--run_dir", new_run(toy, tmp_path / "run"), flags, "--image_root", toy))
    pebr.AttentionInterface.register("shared_prefix", pebr.shared_prefix_attention)  # the fork has its own
    made = tmp_path / "run" / "reasoning"
    assert fork.__file__ == str(tmp_path / "pebr.py") and len(read_lines(made / "metrics.jsonl")) == 2
    before, after = weights_of(toy_run / "warmup"), weights_of(made)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in after)


# ---- Measurements: `python test_pebr.py trl`, and `gpu` for a card; `gpu tiny` tries each of its parts on a CPU


def peer_world(folder, side):
    """A 4 M parameter Qwen2.5-VL, 8 questions of 70 tokens around a picture, in files for both sides."""
    vocabulary, model, rows, rng = [f"w{i}" for i in range(2000)], folder / "model", [], random.Random(0)
    sizes = replace(TINY, hidden=256, text_layers=4, vision_layers=4)
    data.build_toy_model(model, 0, sizes, ["user", "assistant", *vocabulary])
    processor = hf.AutoProcessor.from_pretrained(model)
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 2000 * 28 * 28}
    processor.save_pretrained(model)
    ids = {name: getattr(processor.tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    hf.GenerationConfig(**ids).save_pretrained(model)  # a single end token, because TRL knows no more
    for i in range(8):
        image = picture(folder / f"{i}.png", (side, side), tuple(rng.choices(range(256), k=3)))
        problem = " ".join(rng.choices(vocabulary, k=59))
        rows.append({"qid": str(i), "problem": problem, "answer": "7", "images": [image]})
    write_rows(folder / "rl.json", *rows)
    (folder / "prompt.txt").write_text("{question}")


def with_trl(folder, length, tick):
    """The peer: TRL's GRPOTrainer on the same model, rows and settings. Returns the MiB of its imports."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    imported, rows = peak_mib(), read_json(Path(folder, "rl.json"))
    ask = lambda row: [{"role": "user", "content": row["problem"]}]
    rows = [{"prompt": ask(row), "image": Image.open(row["images"][0])} for row in rows]
    settings = GRPOConfig(
        output_dir=f"{folder}/trl", use_cpu=True, bf16=False, max_steps=5, save_strategy="no", report_to=[],
        learning_rate=1e-6, num_generations=8, per_device_train_batch_size=8, gradient_accumulation_steps=4,
        temperature=1.2, top_p=0.99, top_k=0, beta=0.01, gradient_checkpointing=False,
        max_completion_length=length, model_init_kwargs={"dtype": "float32"})  # fmt: skip
    reward = lambda completion_ids, **_: tick() or [float(sum(ids) % 7) for ids in completion_ids]
    processor = hf.AutoProcessor.from_pretrained(f"{folder}/model", padding_side="left")
    given = {"train_dataset": Dataset.from_list(rows * 5), "processing_class": processor}
    GRPOTrainer(model=f"{folder}/model", reward_funcs=reward, args=settings, **given).train()
    return imported


def with_pebr(folder, length, tick):
    """Ours, the reasoning stage from the command line."""
    imported, score = peak_mib(), pebr.score_parts
    pebr.score_parts = lambda *args: tick() or score(*args)
    flags = f"""--stage reasoning --model {folder}/model --from_model {folder}/model --max_steps 5
        --from_data {folder}/rl.json --image_root {folder} --prompt_file {folder}/prompt.txt --batch_size 4
        --update_batch_size 4 --max_new_tokens {length} --max_pixels 2000000"""
    run(f"{folder}/run", flags, "--mixed_precision no --no-gradient_checkpointing")
    return imported


def cost(side, folder, length):
    """CPU seconds from reward to reward (median of the last three), peak MiB, the same less imports."""
    clocks, work = [], {"trl": with_trl, "pebr": with_pebr}[side]
    imported = work(folder, int(length), lambda: clocks.append(time.process_time()))
    _, *seconds = (b - a for a, b in itertools.pairwise(clocks))
    print("COST", json.dumps([statistics.median(seconds), peak_mib(), peak_mib() - imported]))


def trl():
    """A GRPO step here and in TRL (pip install trl==1.16.0 datasets==5.2.0), 4 questions x 8 responses."""
    print("| prompt : completion | TRL, CPU s | pebr.py, CPU s | speed | TRL, MiB | pebr.py, MiB", end="")
    print(" | ratio | less imports |\n" + "|---" * 8 + "|")
    for side, length in ((392, 64), (560, 128), (392, 256), (196, 448)):
        with tempfile.TemporaryDirectory() as folder:
            peer_world(Path(folder), side)
            printed = [run_script("-W ignore", __file__, "cost", x, folder, length) for x in ("trl", "pebr")]
        (s, mib, less), ours = (json.loads(text.split("COST")[1].splitlines()[0]) for text in printed)
        compared = f"{s:.2f} | {ours[0]:.2f} | {s / ours[0]:.1f}x | {mib} | {ours[1]} | {ours[1] / mib:.2f}"
        print(f"| {(side // 28) ** 2 + 70} : {length} | {compared} | {ours[2] / less:.2f} |", flush=True)


TEXT_3B = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "vocab_size": 151_936}
TEXT_3B |= {"num_attention_heads": 16, "num_key_value_heads": 2}
TEXT_3B["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
VISION_3B = {"hidden_size": 1280, "out_hidden_size": 2048}


def report(what, work, *arguments):
    """A row of the table, printed at once. A failure is a row, too. Returns whether it is one."""
    try:
        row = ", ".join(f"{name} {value:.4g}" for name, value in work(*arguments).items())
    except (Exception, SystemExit) as error:
        row = f"FAILED: {error!r}"
    print(f"\n| {what} | {row} |", flush=True)
    return "FAILED" in row


def gpu_engines(folder):
    """In float32, three updates by the fast engine against the plain one's."""
    made = lambda flag: three_updates("Policy", folder / "model", folder, folder / flag, flag)
    found = differences(made("--fast"), made("--no-fast"))
    assert found["metrics"] < 1e-3, found
    return found


def gpu_fsdp2(folder):
    """In bf16, a run that is killed in its second update and started again against one without a break."""
    bf16 = "--mixed_precision bf16 --gradient_checkpointing --checkpoint_minutes 0"
    made = lambda name: three_updates("FSDPPolicy", folder / "model", folder, folder / name, bf16)
    whole = made("whole")
    with pytest.raises(AssertionError), pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILLED", "yes")
        made("killed")
    assert list(folder.glob("killed/reasoning/checkpoint-1/*fsdp*"))
    return differences(made("killed"), whole)


def gpu_step(folder, engine, P, C):
    """A step of the dry run, 8 responses of C tokens to each of P prompts of 1,000 tokens, 900 of them a
    picture's (3,600 patches). Memory is without Adam's 28 GiB."""
    made = folder / f"{engine}_{P}_{C}"
    gc.collect()  # what a failed step has left
    torch.accelerator.reset_peak_memory_stats()
    flags = f"""--stage dryrun {engine} --batch_size {P} --update_batch_size {max(1, P // 2)} --max_steps 1
        --max_new_tokens {C} --max_length 1000 --max_pixels {840**2} --kl_coef 0 --generate_batch_size 1024
        --model {folder}/3b/model --prompt_file {folder}/3b/prompt.txt --clip_model local-dir:{folder}/clip"""
    run(made, flags)
    [timing], [line] = (read_lines(made / "dryrun" / f"{name}.jsonl") for name in ("timing", "metrics"))
    speeds = {f"{part} tokens/s": line["tokens"] / timing[f"{part}_s"] for part in ("rollout", "update")}
    speeds |= {"peak GiB": timing["peak_gib"], "sampler_gap": line["sampler_gap"]}
    return speeds | {"clipped by rounding": line["clipped_low"] + line["clipped_high"]}


def gpu(size=""):
    """Takes about nine minutes (not tried). Prints a table, and exits with 1 if a part failed."""
    if not (size or torch.cuda.is_available()):
        return print("no GPU")
    device, card = ("cuda", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("cpu", "CPU")
    print(f"| {card} | |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data.build_toy_world(name, 0, replace(TINY, vision_layers=2))  # one layer in windows, one without
        failed = [report("float32", gpu_engines, folder), report("FSDP2", gpu_fsdp2, folder)]
        peer_world(folder / "3b", 840)
        config = hf.AutoConfig.from_pretrained(folder / "3b" / "model")
        if not size:
            marks = {mark: getattr(config, mark) for mark in pebr.MARK_IDS if hasattr(config, mark)}
            shape = {"text_config": TEXT_3B, "vision_config": VISION_3B, "tie_word_embeddings": True}
            config = hf.Qwen2_5_VLConfig(**shape, **marks)

        def random_model(*_, **__):  # made there, past disk and CPU memory
            with torch.device(device):
                model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
            return model, {"missing_keys": []}

        hf.AutoModelForImageTextToText.from_pretrained = random_model
        torch.optim.AdamW.step = lambda *_: None
        cases = [(2, 1), *([(6, 2)] if size else [(512, 8), (512, 32), (2048, 8), (2048, 32)])]
        for engine, (C, P) in itertools.product(("--fast", "--no-fast"), cases):  # its first loads kernels
            if engine == "--fast" or C < 2048:
                failed.append(report(f"{8 * P} x {C} tokens, {engine}", gpu_step, folder, engine, P, C))
        sys.exit(any(failed))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
