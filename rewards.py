"""What is good: the rewards of "Perception Before Reasoning" (arXiv 2509.13031).

    parse_response     a response's sections, read once and in order
    format, length, keyword, CLIP, accuracy      one small function (or class) each
    STAGE_REWARDS      which parts a stage adds up, with the paper's weights
    BENCHMARKS         how evaluation grades and scores a benchmark: by its own rule, without a judge

A reward is a dict of parts. The sum happens in one place, `total_reward`, with named weights; a part without a weight
is only logged. So a reward of your own is a function here, a line in `score_parts`, and a weight.

Departures from the authors' code are numbered in pebr.py's header; [n] below refers to that list.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
import functools
import glob
import itertools
import json
import math
import operator
import os
import pickle
import random
from string import ascii_uppercase
import tempfile
import unicodedata

import regex
import torch
import torch.nn.functional as F

STAGE_REWARDS = {
    "perception": {"clip": 0.4, "keyword": 0.4, "format": 0.1, "length": 0.1},  # paper, stage 1
    "reasoning": {"accuracy": 0.9, "format": 0.1},  # paper, stage 2
}
LENGTH_LIMIT = 512  # tokens; longer responses are paid LENGTH_LIMIT / length
CLIP_BATCH = 32  # pictures or texts that CLIP encodes at once
CHARS_PER_TOKEN = 16  # of a sentence for CLIP; real ones have 4 or 5, and what exceeds this would be cut by the tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Sections of a response

HEADING = regex.compile(
    r"#{3}\s*(?:(?P<description>Image\s+Description)|(?P<rationales>Rationales)|(?P<think>Let['’]s\s+think\s+step\s+by\s+step)"
    r"|(?P<step>Step\s+(?P<number>\d+))|(?P<answer>The\s+final\s+answer\s+is))[ \t]*[:：.]?",
    regex.IGNORECASE,
)


@dataclass
class Response:
    """A response cut at its headings. A missing section is ""; `well_formed` says whether the format holds."""

    description: str = ""
    rationales: str = ""
    steps: tuple[str, ...] = ()
    answer: str = ""
    well_formed: bool = False


def parse_response(text: str) -> Response:
    """Read the sections of the paper's answer format once, in order. [5]

    Well formed means: the headings Image Description, Rationales, Let's think step by step, Step 1 .. Step k (k >= 1),
    The final answer is, each once and in this order; nothing before the first one; no empty description or step; one
    line of answer. A heading counts wherever it stands, in the middle of a section too: it ends that section. So
    - the last answer section counts, and its first line with text in it is the answer; an answer heading inside another
      section, a second set of headings or a repeated one leaves the answer of the last, and breaks the format;
    - an answer that is said without its heading is no answer: it earns nothing;
    - of repeated descriptions and rationales the first one counts, steps are all collected;
    - a description that no heading closes (a truncated response) is none, as in the authors' pattern; an answer that is
      cut off is read as it stands, since nothing marks its end.
    """
    found = list(HEADING.finditer(text))
    names, bodies = [], []
    for match, following in zip(found, found[1:] + [None]):
        names.append(match.lastgroup if match.lastgroup != "number" else "step")
        bodies.append(text[match.end() : following.start() if following else len(text)].strip())
    response = Response(steps=tuple(body for name, body in zip(names, bodies) if name == "step"))
    if "description" in names[:-1]:
        response.description = bodies[names.index("description")]
    if "rationales" in names:
        response.rationales = bodies[names.index("rationales")]
    if "answer" in names:
        last = len(names) - 1 - names[::-1].index("answer")
        response.answer = bodies[last].split("\n")[0].strip()
    numbers = [int(match["number"]) for match in found if match["number"]]
    expected = ["description", "rationales", "think"] + ["step"] * len(numbers) + ["answer"]
    response.well_formed = (
        names == expected
        and len(numbers) > 0
        and numbers == list(range(1, len(numbers) + 1))
        and not text[: found[0].start()].strip()
        and bool(response.description and response.rationales and response.answer and all(response.steps))
        and "\n" not in bodies[-1]
    )
    return response


# ----------------------------------------------------------------------------------------------------------------------
# Format, length and keyword rewards


def format_reward(response: Response) -> float:
    return float(response.well_formed)


def length_reward(num_tokens: int) -> float:
    """1 up to 512 tokens, then 512 / length (paper, stage 1)."""
    return 1.0 if num_tokens <= LENGTH_LIMIT else LENGTH_LIMIT / num_tokens


def key_tokens(text: str) -> list[str]:
    """Words, numbers and signs, in one spelling but for case: 1,000 and 3.0 as 1000 and 3, "two" to "twelve" as 2 to 12,
    "3cm" as 3 cm, "percent" as %.

    "one" stays a word: in "the one on the left" it is no number.
    """
    text = regex.sub(r"\bper\s?cent\b", "%", text, flags=regex.IGNORECASE)
    found = regex.findall(r"\p{Han}|\d++(?:[.,]\d++)*+[\w--\p{Han}]*|[\w--\p{Han}]+|\S", text, regex.VERSION1)
    tokens = []
    for token in found:
        unit = regex.sub(r"^[\d.,]+", "", token)
        apart = token[0].isdigit() and (unit in UNITS or unit.removesuffix("s") in UNITS)
        tokens += [token.removesuffix(unit), unit] if apart else [token]
    tokens = [regex.sub(r",(?=\d{3}(?!\d))|\.0+$", "", token) if token[0].isdigit() else token for token in tokens]
    return [str(NUMBER_WORDS[t.casefold()]) if 2 <= NUMBER_WORDS.get(t.casefold(), 0) <= 12 else t for t in tokens]


def ignore_case(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Without case, except a single letter that is all there is: point A of a figure is no article."""
    return tokens if len(tokens) == 1 and len(tokens[0]) == 1 else tuple(token.casefold() for token in tokens)


def singulars(tokens: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The phrase, and what may be its singular: "cherries" may be cherry, "buses" bus or buse."""
    last, words = tokens[-1], {tokens[-1]}
    if len(last) > 3 and regex.search(r"[^s]s$", last):
        words |= {last[:-1], last.removesuffix("es"), regex.sub(r"ies$", "y", last)}
    return {(*tokens[:-1], word) for word in words}


def keyword_set(keywords: list[str]) -> frozenset[tuple[str, ...]]:
    """Keywords as token tuples, for `keyword_reward`'s vocabulary."""
    return frozenset(ignore_case(tuple(key_tokens(keyword))) for keyword in keywords)


@functools.lru_cache(maxsize=1)
def longest(vocabulary: frozenset[tuple]) -> int:
    return max(map(len, vocabulary), default=1)


def phrases(text: str, most: int) -> set[tuple[str, ...]]:
    """All runs of up to `most` tokens; the last word also without its plural ending."""
    tokens, runs = key_tokens(text), set()
    for end in range(1, len(tokens) + 1):
        for start in range(max(0, end - most), end):
            runs |= singulars(ignore_case(tuple(tokens[start:end])))
    return runs


def keyword_reward(description: str, key_words: list[str], vocabulary: frozenset = frozenset()) -> float:
    """Share of the reference keywords that the image description names (paper, stage 1). [1]

    A keyword is met as a whole word or phrase, in any case, singular or plural; "3" by 3 and by three, not by 13 or 3.5.
    With a vocabulary (`keyword_set` of all rows' keywords; --keyword_precision) it is the F-score of that share and of
    precision: of the vocabulary's keywords that the description names, how many are in or part of a reference keyword.
    """
    wanted = [ignore_case(tuple(key_tokens(keyword))) for keyword in key_words]
    named = phrases(description, max(*map(len, wanted), longest(vocabulary)))
    right = sum(bool(singulars(keyword) & named) for keyword in wanted)
    if not right or not vocabulary:
        return right / len(wanted)
    allowed = set().union(*(phrases(keyword, len(tokens)) for keyword, tokens in zip(key_words, wanted)))
    wrong = len((named & vocabulary) - allowed)
    return 2 * right / (len(wanted) + right + wrong)  # F1: recall right / wanted, precision right / (right + wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy: does an answer say what the gold answer says?
#
#     unwrap, then as what the gold is: option letter | yes or no | sequence | number with unit, ratio | relation | text
#
# `same`, at the end, is that list. An answer is untrusted text: nothing is evaluated but a tree of whitelisted operations,
# with caps on its size, its depth and its numbers, and no pattern takes exponential time.

MAX_CHARS, MAX_DEPTH, MAX_BITS, MAX_EXPONENT, MAX_VALUE = 400, 30, 4000, 400, 10**300
BALANCED = r"(?P<group>[(\[{](?:[^()\[\]{}]++|(?&group))*+[)\]}])"


def rules(*pairs: tuple[str, str | Callable]) -> list:
    return [(regex.compile(pattern, regex.IGNORECASE | regex.DOTALL), replacement) for pattern, replacement in pairs]


def settle(text: str, rewrites: list) -> str:
    """The text after the rewrites, again and again until nothing changes."""
    for _ in range(MAX_DEPTH):
        before = text
        for pattern, replacement in rewrites:
            text = pattern.sub(replacement, text)
        if text == before:
            break
    return text


# fmt: off
SIGNS_ALIKE = str.maketrans("×·⋅∙÷⁄∕−–‐∶。、“”‘’⩽⩾", "****///---:.,\"\"''≤≥")
COMMANDS = {name: spelling for spelling, names in {
    "": "left right displaystyle", " ": "quad qquad", "*": "cdot times ast", "/": "div", "≤": "le leq leqslant", "≥": "ge geq geqslant",
    "≠": "ne neq", "±": "pm", "∞": "infty", "∪": "cup", "∈": "in", "|": "vert lvert rvert", "∠": "angle", "π": "pi", "√": "sqrt",
    "°": "circ", "≈": "approx sim", r"\frac": "dfrac tfrac cfrac",
}.items() for name in names.split()}
UNWRAP = rules(
    (r"\x0crac", r"\\frac"),  # a "\f" that became a form feed, in a benchmark's gold
    (r",\\!\s*", ","), (r"\\[!()\[\]]|`|\{\}", ""), (r"\\[,;: ]|~|\\\\", " "), (r"\\([%#&{}])", r"\1"), (r"\{,\}", ","),
    (r"\\(?:boxed|fbox|mbox|text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|operatorname|overline(?=\s*\{\s*\p{L}))\s*(\{((?:[^{}]++|(?1))*+)\})", r" \2 "),
    (r"<=", "≤"), (r">=", "≥"), (r"!=", "≠"), (r"\binf(?:inity)?\b", "∞"), (r"(?<!\p{L})pi(?!\p{L})", "π"), (r"(?<!\p{L})sqrt", "√"),
    (r"\^\s*(?:[°o](?!\w)|\{\s*[°o]\s*\})|\{?\bdeg(?:rees?)?\b\}?|度|掳|º", "°"),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),  # 1.2 x 10^3
    (r"(?<![\w)*])(\*{1,2}|__)(?=\S)([^*]+)(?<=\S)\1(?![\w(*])", r"\2"), (r"</?(?:\p{L}{2,9}|[bi])>", ""),  # *5*, **5**, <b>5</b>
    (r"(\d[^()]*?)\s*\((?=[^()]*\p{L}{3})(?=[^()]*\s)(?![^()]*\b(?:or|not)\b)[^()]*\)$", r"\1"),  # 5 (since 2 + 3 = 5)
    (r"^\s+|\s+$|(?<=.)[\s.,;:]+$|^#+\s+|^=\s*(?=\S)", ""), (r"^([\"'])(.*)\1$", r"\2"),
    (r"^(?:so|thus|hence|therefore)\b,?\s+(?=\S)|^(?:approximately|approx\.?|about|around|roughly|≈)(?=\W*\d)", ""),
    (r"^(?:(?:the\s+)?(?:(?:final|correct|right)\s+)*(?:answer|option|choice)\b(?:\s+is\b)?|答案|选项?)\s*[:为是]*\s*(?=\S)", ""),
)
# fmt: on


@functools.lru_cache(maxsize=4096)
def unwrap(text: str) -> str:
    """One spelling for each sign; without markdown, LaTeX wrappers, a lead-in and final punctuation."""
    text = regex.sub(r"\\{2,}(?=\p{L}{2}|[()\[\]{}!,;:%$])", r"\\", text)  # escaped twice
    text = regex.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = unicodedata.normalize("NFKC", regex.sub(r"(?<=\d)(?=\p{No})", " ", text))  # 1½ is "1 1/2"
    text = text.translate(SIGNS_ALIKE).replace("\\$", "¤")
    if text.count("$") % 2:  # money, not a pair of LaTeX marks
        text = regex.sub(r"\$(?=\s*[\d.])", "¤", text, count=1)
    text = regex.sub(r"\\([A-Za-z]+)", lambda match: COMMANDS.get(match[1], match[0]), text.replace("$", ""))
    return settle(text, UNWRAP)


# Expressions


class NotMath(ValueError):
    """The text is no expression that the grader reads, or its value is not a real number of bearable size."""


TOKEN = regex.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:e[-+]?\d{1,3}(?!\w))?|\.\d+)|\\?(?P<function>root|abs|sin|cos|tan|ln)(?=\s*\()"
    r"|(?P<name>\\[a-z]+|[a-zΑ-ω](?:_(?:\w|\(\w{1,9}\)))?)|(?P<close>\))|(?P<open>\()|(?P<operator>\*\*|[-+*/^,]))",
    regex.IGNORECASE,
)


def mixed_number(match) -> str:
    """1 1/2 as (3/2): one number, not a sum that is still to be computed"""
    whole, numerator, denominator = (int(part) for part in match.groups() if part)
    return f"({whole * denominator + numerator}/{denominator})"


INFIX = rules(  # LaTeX from the inside out; first of all mixed numbers, 1 1/2 and 1\frac{1}{2}
    (
        r"(?<![\d.^/_}])(\d+)(?:\s+(\d+)\s*/\s*(\d+)(?!\d)|\s*\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d)))",
        mixed_number,
    ),
    (r"√\s*(?:\[(\d)\])?\s*(?:\{([^{}]*)\}|(\d+(?:\.\d+)?|[a-zπ]))", r" root((\2\3),(0\1)) "),
    (r"\\frac\s*(?:\{([^{}]*)\}|(\d|π))\s*(?:\{([^{}]*)\}|(\d|π|[a-z]))", r" ((\1\2)/(\3\4)) "),
    (r"([\^_])\s*\{([^{}]*)\}", r"\1(\2)"),
    (r"\|([^|]*)\|", r" abs(\1) "),
    (r"√\s*\(", " root("),
    (r"\\?(sin|cos|tan|ln)\s*(\d*\s*(?:\\[a-z]+|[a-zΑ-ω])|\d+)(?!\w)", r" \1(\2) "),
)


def parse(text: str) -> tuple[ast.expr, list]:
    """An arithmetic or LaTeX expression as Python's syntax tree over v0, v1, ..., and what these are: Fractions and names.

    Only operators, brackets and the six functions reach Python's parser, never the text's own words. Raises NotMath.
    """
    if len(text) > MAX_CHARS or regex.search(r"(?<![\\\p{L}])(?!sin|cos|tan)\p{L}{3,}", text):
        raise NotMath("words")
    text = settle(text, INFIX).translate(str.maketrans("{}[]", "()()")).strip()
    infix, leaves, at, last = [], [], 0, ""
    while at < len(text):
        match = TOKEN.match(text, at)
        kind, token = (match.lastgroup, match[match.lastgroup]) if match else ("", "")
        if not match or (kind == "number" and last in ("number", "name")):  # an unknown sign; "5 6", "x 2"
            raise NotMath(text[at:])
        if last in ("number", "name", "close") and kind not in ("close", "operator"):
            infix.append("*")  # 2x, 3(x+1), 2√3
        if kind in ("number", "name"):
            infix.append(f"v{len(leaves)}")
            leaves.append(Fraction(token) if kind == "number" else token)
        else:
            infix.append("**" if token == "^" else token.lower())
        at, last = match.end(), kind
    try:
        return ast.parse("".join(infix), mode="eval").body, leaves
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise NotMath(text) from None


def power(base, exponent):
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) if isinstance(base, Fraction) else 0
    if abs(exponent) > MAX_EXPONENT or abs(exponent) * bits > MAX_BITS:
        raise NotMath("too large")
    return base ** int(exponent) if exponent == int(exponent) else float(base) ** float(exponent)


def root(x, degree=0):
    return -root(-x, degree) if x < 0 and degree == 3 else float(x) ** (1 / float(degree or 2))


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: power,
              ast.USub: operator.neg, ast.UAdd: operator.pos,
              "root": root, "abs": abs, "sin": math.sin, "cos": math.cos, "tan": math.tan, "ln": math.log}  # fmt: skip


def left_open(node: ast.BinOp, left, right) -> bool:
    """Whether a step of two rational numbers is still to be computed: 6*7, 3+4, 84/2. Fractions, powers and 1.2 * 10^3 are
    numbers as they stand, and so are multiples of a root or π."""
    if isinstance(node.op, ast.Pow) or not isinstance(left, Fraction) or not isinstance(right, Fraction):
        return False
    if isinstance(node.op, ast.Div):
        return right != 0 and (left / right).denominator == 1
    power_of_ten = isinstance(node.right, ast.BinOp) and isinstance(node.right.op, ast.Pow) and str(right).strip("0") in ("1", "1/1")
    return not (isinstance(node.op, ast.Mult) and power_of_ten and not isinstance(node.left, ast.BinOp))


def evaluate(tree: tuple[ast.expr, list], names: dict, open_steps: list | None = None):
    """The value where the names have these values: a Fraction, or a float after a root, π or a function. Raises NotMath.

    open_steps: takes up the steps that are `left_open`.
    """
    expression, leaves = tree

    def value(node, depth):
        if depth > 4 * MAX_DEPTH:
            raise NotMath("too deep")
        if isinstance(node, ast.Name):
            leaf = leaves[int(node.id[1:])]
            result = leaf if isinstance(leaf, Fraction) else names[leaf]
        elif isinstance(node, ast.UnaryOp):
            result = OPERATIONS[type(node.op)](value(node.operand, depth + 1))
        elif isinstance(node, ast.BinOp):
            left, right = value(node.left, depth + 1), value(node.right, depth + 1)
            result = OPERATIONS[type(node.op)](left, right)
            if open_steps is not None and left_open(node, left, right):
                open_steps.append(node)
        elif isinstance(node, ast.Call):
            result = OPERATIONS[node.func.id](*[value(part, depth + 1) for part in node.args])
        else:
            raise NotMath("not a whitelisted operation")
        if isinstance(result, complex) or not abs(result) < MAX_VALUE:  # nan included
            raise NotMath("no real number, or too large")
        return result

    try:
        return value(expression, 0)
    except (ArithmeticError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise NotMath(str(error)) from None


# Numbers with their units

# fmt: off
NUMBER_WORDS = {word: n for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split())}
NUMBER_WORDS |= {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
MAGNITUDES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = {name: (unit, Fraction(scale)) for line in (  # spelling: (basic unit, its multiple)
    "m 0.01: cm centimeter centimetre 厘米|m 1: m meter metre 米|m 1000: km kilometer kilometre 千米 公里|m 0.001: mm millimeter millimetre 毫米"
    "|m 0.0254: in inch|m 0.3048: ft foot feet|m 0.9144: yd yard|m 1609.344: mi mile|g 1000: kg kilogram 千克 公斤|g 1: g gram 克"
    "|g 0.001: mg milligram|g 453.59237: lb pound|g 28.349523125: oz ounce|m^3 0.001: l liter litre 升|m^3 0.000001: ml milliliter millilitre 毫升"
    "|s 1: s sec second 秒|s 60: min minute 分钟|s 3600: h hr hour 小时|day 1: day 天|year 1: year yr 年|¤ 1: ¤ dollar usd 美元|€ 1: € euro eur"
    "|¥ 1: ¥ yuan rmb 元|/ 1: / per|* 1: *"
).split("|") for unit, scale, *names in [line.replace(":", "").split()] for name in names}
# fmt: on
NO_UNIT = set(
    "or and not to of but if is are was than the there that this then so with by for at on out left right more less maybe".split()
)
WITH_UNIT = regex.compile(r"(.*[\d)}π])(\s*)[{(]?((?:°|(?!π)\p{L})[\p{L} ./*°]{0,40})[})]?\s*(?:\^?\s*\{?([23])\}?)?")


@dataclass
class Quantity:
    value: Fraction | float
    step: Fraction  # the weight of a decimal's last digit; 0: exact
    percent: bool
    unit: str  # in basic units: km/h is m/s
    scale: Fraction | int  # how many of these it is
    open: bool  # whether steps are left to be computed


def unit_name(text: str, apart: bool, exponent: str = "") -> tuple[str, Fraction | int]:
    """(basic unit, how many of it) of a unit: "kilometers per hour" is m/s, times 1000/3600. Raises NotMath for what may be a
    variable (2x) or a sentence."""
    text, square = regex.subn(r"^\s*(?:square|sq\b\.?)", "", text.casefold())
    text, cubic = regex.subn(r"^\s*cubic\b", "", text)
    exponent = "2" * square or "3" * cubic or exponent or ""
    names = []  # (basic unit, its multiple)
    for word in regex.findall(r"[°/*]|\p{L}+", text):
        known = next((UNITS[w] for w in (word, word.removesuffix("s"), word.removesuffix("es")) if w in UNITS), None)
        likely = known or word == "°" or ("°", 1) in names or len(word) > 2 and apart or regex.match(r"\p{Han}", word)
        if word in NO_UNIT or not likely or (known in (UNITS["s"], UNITS["h"]) and not apart):
            raise NotMath(word)
        names.append(known or (word.removesuffix("s"), 1))
    joined = {"/", "*", "°"} & {name for name, _ in names}
    names = names if joined else names[:1]  # "years old" are years
    scale = Fraction(1)
    for i, (name, multiple) in enumerate(names):
        multiple = Fraction(multiple) ** int(exponent or 1) if i == len(names) - 1 else Fraction(multiple)
        scale = scale / multiple if i and names[i - 1][0] == "/" else scale * multiple
    return "".join(name for name, _ in names).removeprefix("unit") + (f"^{exponent}" if exponent else ""), scale


def amount(text: str) -> tuple:
    """(value, step, open) of a number without a unit; see Quantity"""
    text, open_steps = without_thousands(text.strip()), []
    text = text.replace(",", ".") if regex.fullmatch(r"[-+]?(?:\d+,\d{1,2}|0,\d+)", text) else text
    decimal = regex.fullmatch(r"[-+]?\s*\d*\.(\d+)", text)
    value = evaluate(parse(text), {"π": math.pi}, open_steps)
    return value, Fraction(1, 10 ** len(decimal[1])) if decimal else Fraction(0), bool(open_steps)


def without_thousands(text: str) -> str:
    """1,234 and 1 234 as 1234, but (1,234) has two items"""
    groups = r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)|(?<![\d.,]|\d )[1-9]\d{0,2}(?: \d{3})+(?! ?\d)"
    return text if text[:1] in tuple("([{") else regex.sub(groups, lambda match: regex.sub("[, ]", "", match[0]), text)


def quantity(text: str) -> Quantity:
    """A number in any spelling, as an exact value where it has one. Raises NotMath."""
    unit, scale, magnitude = "", 1, 1
    if money := regex.match(r"([-+]?)\s*([¤€£¥])", text):
        text, unit = money[1] + text[money.end() :], money[2]
    words = regex.match(r"(\p{L}+)(?:[- ](\p{L}+))?", text.casefold())
    if words and words[1] in NUMBER_WORDS:  # five; twenty-five
        ones = NUMBER_WORDS.get(words[2], 0) if NUMBER_WORDS[words[1]] >= 20 else 0
        text = str(NUMBER_WORDS[words[1]] + ones) + text[words.end(2 if ones else 1) :]
    if scaled := regex.fullmatch(rf"(.*\d)\s*\b({'|'.join(MAGNITUDES)})\b(.*)", text, regex.IGNORECASE):
        text, magnitude = scaled[1] + scaled[3], MAGNITUDES[scaled[2].casefold()]
    text, percent = regex.subn(r"\s*(?:%|\bper\s?cent|\bpct)$", "", text)
    try:
        value, step, left_to_do = amount(text)
    except NotMath:
        match = WITH_UNIT.fullmatch(text)
        if not match:
            raise
        value, step, left_to_do = amount(match[1])
        unit, scale = unit_name(match[3], bool(match[2]), match[4])
    return Quantity(value * magnitude, step * magnitude, bool(percent), unit, scale, left_to_do)


def same_quantity(answer: Quantity, gold: Quantity) -> bool:
    """Equal, or equal as far as the coarser of the two is written. A unit may be missing, and another one of its kind (50 cm for
    0.5 m). An answer whose last step is left to be computed is not the number, unless the gold is written like that."""
    if answer.open and not gold.open or len({each.unit or "%" * each.percent for each in (answer, gold)} - {""}) > 1:
        return False
    scales = [(answer.scale, gold.scale)] if answer.unit and gold.unit else [(1, 1)]
    if answer.percent != gold.percent:  # 25% is 25, and 0.25
        scales.append((Fraction(1, 100), 1) if answer.percent else (1, Fraction(1, 100)))
    for scale, gold_scale in scales:
        a, a_step, b, b_step = answer.value * scale, answer.step * scale, gold.value * gold_scale, gold.step * gold_scale
        gap = abs(a - b)
        if gap == 0 or (float in (type(a), type(b)) and gap <= 1e-9 * abs(b)):
            return True
        if a_step < b_step and gap <= b_step / 2:
            return True  # 47.58 for 47.6: finer than the gold
        if not b_step and a_step and abs(a) >= 100 * a_step and gap <= a_step / 2:
            return True  # 0.333 for 1/3: at least three digits of an exact gold
    return False


# Sequences: (a, b), [a, b), {a, b}, "a, b", "a and b", "a or b", unions, ±a


def sequence(text: str) -> tuple[str, str, list[str]] | None:
    """(opening bracket, closing bracket, items); None if there is only one item."""
    text = regex.sub(r"\s*,?\s*(?:\b(?:and|or)\b|[和或])\s*", ", ", text)
    if "±" in text:
        return "", "", [text.replace("±", "+"), text.replace("±", "-")]
    opening, closing, marks = "", "", ",;"
    if bracketed := regex.fullmatch(r"(?:\p{L}{1,9}\s*)?" + BALANCED, text):
        group = bracketed["group"]
        opening, closing, text = group[0], group[-1], group[1:-1]
    elif "∪" in text:
        marks = "∪"
    else:
        text = without_thousands(text)
    items = [m[0].strip() for m in regex.finditer(rf"(?:[^{marks}()\[\]{{}}]++|{BALANCED})+", text)]
    return (opening, closing, items) if len(items) > 1 else None


def interval(text: str) -> tuple[str, str, list[str]] | None:
    """The same of an inequality in one name: x > 3 is (3, ∞), -1 < x ≤ 3 is (-1, 3]; None for another text."""
    sides, signs = RELATION.split(text)[::2], RELATION.findall(text)
    if signs and all(sign in MIRRORED for sign in signs):  # > and ≥
        sides, signs = sides[::-1], [MIRRORED[sign] for sign in signs[::-1]]
    at = next((i for i, side in enumerate(sides) if regex.fullmatch(r"\s*\p{L}\s*", side)), None)
    if at is None or not set(signs) <= {"<", "≤"} or (len(sides), at) not in ((2, 0), (2, 1), (3, 1)):
        return None
    below, above = ((sides[at - 1], signs[at - 1]) if at else ("-∞", "<")), ((sides[at + 1], signs[at]) if signs[at:] else ("∞", "<"))
    return "[(" [below[1] == "<"], "])"[above[1] == "<"], [below[0], above[0]]


def same_sequence(answer, gold, depth: int) -> bool:
    """Item by item; in any order in braces and without brackets."""
    if answer[0] and gold[0] and answer[:2] != gold[:2] or len(answer[2]) != len(gold[2]):
        return False
    free = answer[0] in ("", "{") and gold[0] in ("", "{")
    left = list(answer[2])
    for item in gold[2]:
        found = next((i for i, other in enumerate(left if free else left[:1]) if same(other, item, depth + 1)), None)
        if found is None:
            return False
        del left[found]
    return True


# Relations and formulas: compared by value at random rational points

RELATION = regex.compile(r"\s*([=≤≥<>≠])\s*")
MIRRORED = {">": "<", "≥": "≤"}


def relations(text: str) -> list[tuple]:
    """(sign, tree of the left side, tree of the right side) of each part of a chain; a formula is one without a sign."""
    text = regex.sub(r"^\s*\p{L}\s*\(\s*\p{L}\s*\)\s*=", "y=", text)  # f(x) = ..
    sides = RELATION.split(text)
    if len(sides) == 1:
        return [("", parse(text), parse("0"))]
    parts = []
    for left, sign, right in zip(sides[::2], sides[1::2], sides[2::2]):
        left, right = (right, left) if sign in MIRRORED else (left, right)
        parts.append((MIRRORED.get(sign, sign), parse(left), parse(right)))
    return parts


def same_relation(answer: str, gold: str) -> bool:
    """Each part of the gold's chain is met by a part of the answer's. Points of both signs; π is a name as well. Raises NotMath."""
    ours, theirs = relations(answer), relations(gold)
    names = sorted({leaf for part in ours + theirs for _, leaves in part[1:] for leaf in leaves if isinstance(leaf, str)})
    rng = random.Random(0)
    points = [{name: Fraction(rng.randint(-97 * (i > 3), 97), 7) + Fraction(1, 11) for name in names} for i in range(8)]
    for point in points:
        point["π"] = math.pi
    if len(ours) != len(theirs) or len(ours) > 3:
        return False
    return all(any(proportional(other, part, points) for other in ours) for part in theirs)


def proportional(answer: tuple, gold: tuple, points: list[dict]) -> bool:
    """Whether left - right of both differ by a constant factor: 1 in formulas, positive in inequalities."""
    ratios = []
    for point in points if answer[0] == gold[0] else ():
        values = []
        for _, left, right in (answer, gold):
            try:
                values.append(float(evaluate(left, point) - evaluate(right, point)))
            except NotMath:  # outside its domain
                values.append(None)
        if values == [None, None]:
            continue
        if not all(values):  # one is 0 or outside its domain, the other is not
            return False
        ratios.append(values[0] / values[1])
        if abs(ratios[-1] - ratios[0]) > 1e-9 * abs(ratios[0]):
            return False
    if len(ratios) < 3:
        return False
    return gold[0] in ("=", "≠") or (ratios[0] > 0 if gold[0] else abs(ratios[0] - 1) < 1e-9)


# Options, labels, yes and no, texts

YES = dict.fromkeys(("yes", "true", "是", "是的", "对", "正确"), True) | dict.fromkeys(
    ("no", "false", "否", "不是", "错", "错误"), False
)
SAID = regex.compile(  # yes or no, then nothing or a remark that is not the other one
    rf"({'|'.join(YES)})(?!\p{{L}})(?!\W*(?:or|and)?\W*(?:{'|'.join(YES)})\b)(?:\s*[,.;:(!-].*|\s+(?:it|they|there|this|that|because|since)\b.*)?",
    regex.IGNORECASE | regex.DOTALL,
)
LETTER = regex.compile(
    r"(?:\(([A-Za-z])\)|([A-Za-z])(?=$|\s*[.:)]|\s+[-–(]|(?<=[A-Z])\s+(?:is|because|since)\b))[\s.:)]*(.*)", regex.DOTALL
)
OTHER_LETTER = regex.compile(r"\(?[A-Z]\)?$|.*(?:\bor\b|\band\b|[,/&])\W*[A-Z](?!\p{L})", regex.DOTALL)
LABEL = regex.compile(
    r"((?:\\triangle|m?∠|△)?\s*(?:\p{Lu}{1,4}|\p{L}(?:_\w|_\{\w+\}|')?(?:\(\w\))?|\p{L}{3,}[ \p{L}]{0,50})|\(\w,\s*\w\))"
    r"\s*(?:[=:∈]|\bis\b|\bare\b|\bequals\b)\s*(\S.*)",
    regex.DOTALL,
)
TIME = regex.compile(r"((?:[01]?\d|2[0-3]):[0-5]\d)(?:\s*([ap])\.?m\.?)?", regex.IGNORECASE)
MATH_SIGN = regex.compile(r"[=^+*<>≤≥≠|/\\√π%°_]|[-(]\s*\d|\d\s*-")


def letter(text: str) -> tuple[str, str] | None:
    """The option letter of "B", "(b)", "B. 24", and what follows it; None without one, or with a second one ("A or B")."""
    match = LETTER.fullmatch(text)
    return ((match[1] or match[2]).upper(), match[3]) if match and not OTHER_LETTER.match(match[3]) else None


def option_index(text: str, choices: list[str], gold: bool = False) -> int | None:
    """Index of the choice that a text names: by its letter ("B", "(b)", "B. 24"), or by saying what the choice says.

    gold: a data file's answer may also be a 0-based index ("1"), if it is not the text of a choice. None: no choice.
    """
    if text.strip() in choices and len(text.strip()) > 1:
        return choices.index(text.strip())
    text, options = unwrap(text), [unwrap(choice) for choice in choices]
    named = letter(text)
    index = ord(named[0]) - ord("A") if named else len(choices)
    if index < len(choices) and not named[1]:
        return index
    hits = [i for i, option in enumerate(options) if plain(option) == plain(text)]
    hits = hits or [i for i, option in enumerate(options) if same(text, option)]
    if hits:
        return hits[0] if len({plain(options[i]) for i in hits}) == 1 else None
    if index < len(choices):  # the letter, unless what follows says another choice
        return index if same(named[1], options[index]) or not any(same(named[1], option) for option in options) else None
    return int(text) if gold and regex.fullmatch(r"\d{1,2}", text) and int(text) < len(choices) else None


def plain(text: str) -> str:
    """Without case and white space, but "1 4" stays apart."""
    return regex.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.casefold()).removeprefix("+")


def label(text: str) -> tuple[str, str]:
    """("x", "5") of "x = 5"; ("", text) without a label"""
    match = LABEL.fullmatch(regex.sub(r"^([^=]*\d[^=]*)=\s*(\p{L})$", r"\2=\1", text))  # 5 = x
    negated = match and regex.search(r"\b(?:no|not|never|none)\b", match[1].casefold())
    return (plain(match[1]).removeprefix("the"), match[2]) if match and not negated else ("", text)


def stems(text: str) -> list[str]:
    words = regex.findall(r"[\p{L}\p{N}]+", regex.sub(r"(?<=\b\p{L})\.", "", text.casefold()))
    words = [word[:-1] if len(word) > 3 and regex.search(r"[^s]s$", word) else word for word in words]
    return [str(NUMBER_WORDS.get(word, word)) for word in words if word not in ("a", "an", "the")]


def same(answer: str, gold: str, depth: int = 0) -> bool:
    """Whether two unwrapped texts say the same. The form of the gold decides what they are compared as."""
    if depth > 4 or not regex.search(r"[\p{L}\p{N}∞π]", answer) or gold.casefold() == "nan":
        return False
    if plain(answer) == plain(gold):
        return True
    if regex.fullmatch(r"\(?[A-Za-z]\)?", gold):
        named = letter(answer)
        return bool(named) and named[0] == gold.strip("()").upper()
    if gold.casefold() in YES:
        said = SAID.fullmatch(answer)
        return bool(said) and YES[said[1].casefold()] == YES[gold.casefold()]
    if several := sequence(gold):
        ours = sequence(answer) or sequence(label(answer)[1]) or interval(answer)
        return bool(ours) and same_sequence(ours, several, depth)
    bounds, ours = interval(gold), sequence(label(answer)[1])
    if bounds and ours and ours[0]:
        return same_sequence(ours, bounds, depth)
    (answer_label, answer_body), (gold_label, gold_body) = label(answer), label(gold)
    if answer_label or gold_label:
        initials = len({answer_label[:1], gold_label[:1]}) == 1 and min(len(answer_label), len(gold_label)) == 1
        if not (answer_label and gold_label) or answer_label == gold_label or initials:  # V and Volume
            if same(answer_body, gold_body, depth + 1):
                return True
    if time := TIME.fullmatch(gold):
        said = TIME.fullmatch(answer)
        return bool(said) and said[1] == time[1] and len({half.casefold() for half in (said[2], time[2]) if half}) < 2
    if regex.fullmatch(r"[^:]*\d\s*(?::|\bto\b)\s*\d[^:]*", gold):  # a ratio
        answer, gold = [regex.sub(r"\s*(?::|\bto\b)\s*", "/", text) for text in (answer, gold)]
    try:
        expected = quantity(gold)
    except NotMath:
        expected = None
    if expected or MATH_SIGN.search(answer + " " + gold):
        try:
            return same_quantity(quantity(answer), expected) if expected else same_relation(answer, gold)
        except NotMath:
            return False
    return bool(stems(gold)) and stems(answer) == stems(gold)


def grade(answer: str, gold: str, choices: list[str] | None = None) -> bool:
    """Whether `answer` says the same as `gold` [14]; an answer of more than 400 characters has to be the gold to the letter.

    With `choices` both are options, by letter or by text. Without, the gold's form decides: an option letter; yes or no; a
    tuple, interval, set or list; a number (finer than the gold, rounded to it; unit missing but not different; 25% is 0.25
    and 25); a ratio; an equation, inequality or formula; a short text without articles and plurals. Never raises.
    """
    if max(len(answer), len(gold)) > MAX_CHARS:
        return answer.strip() == gold.strip() != ""
    if not answer.strip():
        return False
    if choices:
        chosen, right = option_index(answer, choices), option_index(gold, choices, gold=True)
        return None not in (chosen, right) and plain(unwrap(choices[chosen])) == plain(unwrap(choices[right]))
    return same(unwrap(answer), unwrap(gold))


# ----------------------------------------------------------------------------------------------------------------------
# CLIP: does the description fit the picture?

# open_clip's tensor names <- Hugging Face's, of which FG-CLIP v1's are a superset; several are joined
FG_CLIP_TENSORS = {
    "logit_scale": ["logit_scale"],
    "visual.class_embedding": ["vision_model.embeddings.class_embedding"],
    "visual.conv1.weight": ["vision_model.embeddings.patch_embedding.weight"],
    "visual.positional_embedding": ["vision_model.embeddings.position_embedding.weight"],
    "visual.proj": ["visual_projection.weight"],
    "token_embedding.weight": ["text_model.embeddings.token_embedding.weight"],
    # its mode for long texts: 248 positions, the first 20 of them from OpenAI's CLIP, and a projection of its own
    "positional_embedding": [f"text_model.embeddings.position_embedding_{part}.weight" for part in ("ori", "res")],
    "text_projection": ["text_filip_projection.weight"],
}
FG_CLIP_MODULES = {"visual.ln_pre": ["vision_model.pre_layrnorm"], "visual.ln_post": ["vision_model.post_layernorm"],
                   "ln_final": ["text_model.final_layer_norm"]}  # fmt: skip
FG_CLIP_BLOCK = {"attn.in_proj_": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "attn.out_proj": ["self_attn.out_proj"],
                 "ln_1": ["layer_norm1"], "ln_2": ["layer_norm2"], "mlp.c_fc": ["mlp.fc1"], "mlp.c_proj": ["mlp.fc2"]}  # fmt: skip


def fg_clip_weights(weights: dict, vision_layers: int, text_layers: int) -> dict:
    """FG-CLIP v1's tensors under open_clip's names. Raises ValueError if tensors are missing, or layers are too many."""
    names, modules = dict(FG_CLIP_TENSORS), dict(FG_CLIP_MODULES)
    for tower, prefix, layers in (("vision", "visual.", vision_layers), ("text", "", text_layers)):
        for i, (module, theirs) in itertools.product(range(layers), FG_CLIP_BLOCK.items()):
            modules[f"{prefix}transformer.resblocks.{i}.{module}"] = [
                f"{tower}_model.encoder.layers.{i}.{name}" for name in theirs
            ]
    for (module, theirs), kind in itertools.product(modules.items(), ("weight", "bias")):
        names[module + kind if module.endswith("_") else f"{module}.{kind}"] = [f"{name}.{kind}" for name in theirs]
    used = [name for parts in names.values() for name in parts]
    missing = [name for name in used if name not in weights]
    surplus = [name for name in weights if ".encoder.layers." in name and name not in used]
    if missing or surplus:
        what = "this is FG-CLIP 2, not v1" if "longtext_head.weight" in weights else "this is not FG-CLIP v1"
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        listed = f"it lacks {listed}" if missing else f"it has layers that config.json does not know, {surplus[0]}"
        raise ValueError(f"{what}: {listed}")
    converted = {
        name: torch.cat([weights[part] for part in parts]) if parts[1:] else weights[parts[0]]
        for name, parts in names.items()
    }
    short, long = (weights[part] for part in names["positional_embedding"])
    converted["positional_embedding"] = torch.cat([short[:20], long[20:]])
    return converted | {name: converted[name].T.contiguous() for name in ("visual.proj", "text_projection")}


def convert_fg_clip(folder: str) -> str:
    """Write an FG-CLIP v1 folder (config.json, model.safetensors) once more, as an open_clip folder inside; returns its path.

    In its mode for long texts FG-CLIP is a CLIP with 248 text positions: so none of the code that comes with it has to run.
    Raises ValueError if the folder holds something else, OSError if files are missing or nothing can be written.
    """
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from safetensors.torch import load_file, save_file
    from transformers import CLIPConfig

    target = os.path.join(folder, "open_clip")
    if os.path.isdir(target):
        return target
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))
    if not files or not os.path.isfile(os.path.join(folder, "config.json")):
        raise FileNotFoundError(f"{folder} must hold FG-CLIP's config.json and model.safetensors")
    config = CLIPConfig.from_json_file(os.path.join(folder, "config.json"))
    text, vision = config.text_config, config.vision_config
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    weights = fg_clip_weights(weights, vision.num_hidden_layers, text.num_hidden_layers)
    patch, patches = weights["visual.conv1.weight"].shape[-1], len(weights["visual.positional_embedding"]) - 1
    shape = lambda c: dict(width=c.hidden_size, layers=c.num_hidden_layers, mlp_ratio=c.intermediate_size / c.hidden_size)
    config = {
        "model_cfg": {
            "embed_dim": weights["text_projection"].shape[1], "quick_gelu": text.hidden_act == "quick_gelu",
            "vision_cfg": shape(vision) | {"head_width": vision.hidden_size // vision.num_attention_heads,
                                           "patch_size": patch, "image_size": patch * math.isqrt(patches)},
            "text_cfg": shape(text) | {"heads": text.num_attention_heads, "vocab_size": len(weights["token_embedding.weight"]),
                                       "context_length": len(weights["positional_embedding"])},
        },
        "preprocess_cfg": {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic", "resize_mode": "squash"},
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix="open_clip.", dir=folder) as parent:  # whole or not at all
            made = os.path.join(parent, "made")
            os.mkdir(made)
            save_file(weights, os.path.join(made, "open_clip_model.safetensors"))
            with open(os.path.join(made, "open_clip_config.json"), "w") as file:
                json.dump(config, file, indent=1)
            os.rename(made, target)
    except OSError as error:
        if not os.path.isdir(target):  # else another process was faster
            raise OSError(f"cannot write {target} ({error}): copy the checkpoint to where you may write") from None
    return target


def load_open_clip(name: str, device):
    """(model, preprocessing, tokenizer) of a CLIP model, in bf16 on a GPU, else in float32.

    name: a built-in model "ViT-B-32/laion2b_s34b_b79k", a folder "local-dir:/path" with open_clip_config.json and
    weights, "hf-hub:org/name", or "fg-clip:/path" with an FG-CLIP v1 checkpoint. Raises RuntimeError or OSError if the
    weights are not there (without `require_pretrained` open_clip would go on with random ones), ValueError if they are
    anything but plain tensors, such as a pickle that runs code, or if the folder asks for code of its own.
    """
    import open_clip
    from safetensors import SafetensorError

    try:
        if name.startswith("fg-clip:"):
            name = "local-dir:" + convert_fg_clip(name.removeprefix("fg-clip:"))
        if name.startswith("local-dir:") and not os.path.isfile(os.path.join(name[10:], "open_clip_config.json")):
            raise FileNotFoundError("no open_clip_config.json in that folder")
        name, _, tag = (name, "", "") if ":" in name else name.partition("/")
        if "trust_remote_code" in json.dumps(open_clip.get_model_config(name)):
            raise ValueError("its open_clip_config.json asks for trust_remote_code, which is refused")
        precision = "pure_bf16" if torch.device(device).type == "cuda" else "fp32"
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=tag or None, require_pretrained=True, image_resize_mode="squash", device=device, precision=precision
        )  # fmt: skip
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(f"the weights cannot be read as plain tensors: {error}") from None
    return model.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(name)


class ClipScorer:
    """Cosine of image and text embeddings, through open_clip (the paper uses FG-CLIP). Arguments: see load_open_clip."""

    def __init__(self, name: str, device="cpu", lo: float = 0.0, hi: float = 0.4):
        self.model, self.preprocess, self.tokenizer = load_open_clip(name, device)
        self.device, self.lo, self.hi = device, lo, hi
        text = self.text = getattr(self.model, "text", self.model)  # open_clip.CLIP keeps its text tower's parts itself
        pooling = getattr(text, "pool_type", getattr(text, "text_pool_type", ""))
        self.eos_id = getattr(text, "eos_id", getattr(text, "text_eos_id", None)) if pooling == "eos" else None
        causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
        self.trims = causal and pooling in ("argmax", "eos")  # see text_features
        inner = getattr(self.tokenizer, "tokenizer", None)  # of open_clip's wrapper around Hugging Face tokenizers
        self.split = functools.partial(inner.encode, add_special_tokens=False) if inner else self.tokenizer.encode
        self.room = self.tokenizer.context_length - (len(inner.encode("")) if inner else 2)  # tokens beside the marks
        self.cut_texts = 0  # sentences longer than the text tower's context, cut by the tokenizer

    def windows(self, text: str) -> list[str]:
        """Whole sentences packed greedily into texts that fit the text tower's context. [4]"""
        packed, used, limit = [], 0, CHARS_PER_TOKEN * self.room
        for sentence in filter(None, regex.split(r"(?<=[.!?;])\s+|\n+", text)):
            sentence, whole = sentence[:limit], len(sentence) <= limit  # one endless word would take BPE minutes
            length = len(self.split(sentence))
            self.cut_texts += length > self.room or not whole
            if packed and used + length <= self.room:
                packed[-1] += " " + sentence
                used += length
            else:
                packed.append(sentence)
                used = length
        return packed

    def ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Index (B,) of the end mark in each row: eos, or the highest id."""
        return tokens.argmax(-1) if self.eos_id is None else (tokens == self.eos_id).int().argmax(-1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D) of token rows (B, T). If the tower `trims`, T may be less than the context; open_clip's own
        encode_text insists on all of it."""
        if not self.trims:
            return self.model.encode_text(tokens)
        text, length = self.text, tokens.shape[1]
        states = (text.token_embedding(tokens) + text.positional_embedding[:length]).to(text.transformer.get_cast_dtype())
        states = text.ln_final(text.transformer(states, attn_mask=text.attn_mask[:length, :length]))  # (B, T, width)
        pooled, project = states[torch.arange(len(tokens)), self.ends(tokens)], text.text_projection
        return pooled if project is None else project(pooled) if isinstance(project, torch.nn.Linear) else pooled @ project

    @torch.inference_mode()
    def text_features(self, texts: list[str]) -> torch.Tensor:
        """Normalised embeddings (len(texts), D).

        A causal tower that is read off at the end mark never sees the padding behind it: there, texts go in by length, each
        batch as short as its longest. Other towers (SigLIP, Hugging Face's) get the full context.
        """
        tokens = self.tokenizer(texts)  # (texts, context)
        lengths = self.ends(tokens) + 1 if self.trims else torch.full((len(tokens),), tokens.shape[1])
        order = lengths.argsort(stable=True)
        parts = [tokens[part, : int(lengths[part].max())].to(self.device) for part in order.split(CLIP_BATCH)]
        features = torch.cat([self.encode_text(part).float().cpu() for part in parts])
        return F.normalize(features, dim=-1)[order.argsort()]

    @torch.inference_mode()
    def image_features(self, images: list) -> torch.Tensor:
        """Normalised embeddings (len(images), D)."""
        dtype, features = next(self.model.parameters()).dtype, []
        for start in range(0, len(images), CLIP_BATCH):
            pixels = torch.stack([self.preprocess(image) for image in images[start : start + CLIP_BATCH]])
            features.append(self.model.encode_image(pixels.to(self.device, dtype)).float().cpu())
        return F.normalize(torch.cat(features), dim=-1)

    def cosines(self, image_lists: list[list], texts: list[str]) -> list[float]:
        """Cosine of texts[i] to the pictures image_lists[i] (mean over a row's pictures); an empty text has cosine 0.

        Each picture object is encoded once however many texts it has, each window once however often it is said. [3]
        """
        pictures = {id(image): image for images in image_lists for image in images}
        picture_row = {key: i for i, key in enumerate(pictures)}
        windows = [self.windows(text) for text in texts]
        window_row = {w: i for i, w in enumerate(dict.fromkeys(window for own in windows for window in own))}
        if not window_row:
            return [0.0] * len(texts)
        image_features = self.image_features(list(pictures.values()))  # (pictures, D)
        text_features = self.text_features(list(window_row))  # (windows, D)
        cosines = []
        for images, own in zip(image_lists, windows):
            image_rows = image_features[[picture_row[id(image)] for image in images]]  # (pictures of the row, D)
            text = F.normalize(text_features[[window_row[w] for w in own]].mean(0), dim=-1) if own else None  # (D,)
            cosines.append(float((image_rows @ text).mean()) if own else 0.0)
        return cosines

    def rewards(self, image_lists: list[list], texts: list[str]) -> list[float]:
        """Cosines on a scale from lo (0) to hi (1), clamped. The paper: lo = 0, hi = 0.4, min(cos / 0.4, 1)."""
        return [min(max((c - self.lo) / (self.hi - self.lo), 0.0), 1.0) for c in self.cosines(image_lists, texts)]


def calibrate(clip: ClipScorer, image_lists: list[list], texts: list[str]) -> dict:
    """How well a CLIP model tells matched from shuffled pairs, and the --cosine_lo and --cosine_hi that would suit it.

    texts[i] describes image_lists[i]; shuffled, it meets image_lists[i + 1]. At least two texts, no two of them the same.
    """
    cosines = torch.tensor(clip.cosines(image_lists + image_lists[1:] + image_lists[:1], texts + texts))
    matched, shuffled = cosines.chunk(2)  # (pairs,) each
    greater, equal = matched[:, None] > shuffled, matched[:, None] == shuffled
    auc = float((greater.float() + equal.float() / 2).mean())
    quartiles = lambda cosines: [round(q, 4) for q in cosines.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()]
    result = {"pairs": len(texts), "matched": quartiles(matched), "shuffled": quartiles(shuffled), "auc": round(auc, 4)}
    result |= {"cosine_lo": max(0.0, result["shuffled"][1]), "cosine_hi": result["matched"][1], "warnings": []}
    if auc < 0.7:
        result["warnings"].append(
            "this CLIP hardly tells matched from shuffled pairs (AUC < 0.7): its reward is mostly noise"
        )
    if result["cosine_hi"] > clip.hi:
        result["warnings"].append(f"more than half of the references earn all of the CLIP reward at --cosine_hi {clip.hi}")
    if result["cosine_hi"] < 0.6 * clip.hi:
        result["warnings"].append(f"--cosine_hi {clip.hi} is out of reach: half of the references earn less than 0.6 of it")
    return result


# ----------------------------------------------------------------------------------------------------------------------
# All parts of a batch of responses, and their sum


def score_parts(
    rows, images: list[list], responses: list[str], num_tokens: list[int], clip: ClipScorer | None, vocabulary=frozenset()
) -> list[dict]:
    """Every part of the reward for each response.

    rows: data.Row of each response; images: its pictures (PIL); num_tokens: its completion length; clip: None leaves
    the "clip" part out; vocabulary: see keyword_reward. A part that does not apply to a row (no keywords, no picture) is left out, never scored 0.
    """
    parsed = [parse_response(text) for text in responses]
    parts = []
    for row, response, tokens in zip(rows, parsed, num_tokens):
        part = {
            "accuracy": float(bool(response.answer) and grade(response.answer, row.answer, row.choices)),
            "format": format_reward(response),
            "length": length_reward(tokens),
        }
        if row.key_words:
            part["keyword"] = keyword_reward(response.description, row.key_words, vocabulary)
        parts.append(part)
    seen = [i for i, pictures in enumerate(images) if pictures]
    if clip and seen:
        for i, reward in zip(seen, clip.rewards([images[i] for i in seen], [parsed[i].description for i in seen])):
            parts[i]["clip"] = reward
    return parts


def total_reward(parts: dict, weights: dict) -> float:
    """The weighted sum, in one place. Raises KeyError if a weighted part is missing: a missing part is not a 0. [2]"""
    return sum(weight * parts[name] for name, weight in weights.items())


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation: what a response answers, whether that is right by the benchmark's own rule, and the scores of a file.
# No model judges. Where a benchmark has one cut out the answer, extract_answer does it; where one compares, `grade` does.

SHORT_ANSWER = 60  # characters up to which a response without an answer section or a box is an answer as a whole


def extract_answer(text: str) -> tuple[str, str]:
    """(answer, where it stood): the answer section; else the last \\boxed{}; else the whole response if it is short; else none.

    For evaluation of any model. The accuracy reward takes the answer section only. [5]
    """
    if answer := parse_response(text).answer:
        return answer, "section"
    depth, start = 1, text.rfind("\\boxed{") + len("\\boxed{")
    for i in range(start, len(text) if "\\boxed{" in text else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i].strip(), "boxed"
    text = text.strip()
    return (text, "whole") if 0 < len(text) <= SHORT_ANSWER else ("", "none")


def only_number(text: str) -> float | None:
    """The value of an answer that holds exactly one number ("about 7.9 years": 7.9; "2π": 6.28...); None otherwise."""
    text = regex.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text[:200].replace("−", "-"))
    found = regex.findall(r"(?<![\w.])([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?)(\s*(?:π|\\pi))?", text)
    value = float(found[0][0]) * (math.pi if found[0][1] else 1) if len(found) == 1 else math.inf
    return value if math.isfinite(value) else None


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and replacements that turn a into b."""
    above = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (char != other)))
        above = row
    return above[-1]


def golds(row) -> list[str]:
    return [row.answer, *row.alternatives]


def graded(answer: str, row) -> bool:
    """The generic rule: equal to the gold answer, or to one of its alternatives, as the accuracy reward sees it."""
    return any(grade(answer, gold, row.choices) for gold in golds(row))


def named_option(answer: str, row) -> int | None:
    """Index of the option that the answer names by letter or text."""
    letters = ascii_uppercase[: len(row.choices)]
    return next((i for i, letter in enumerate(letters) if grade(answer, letter, row.choices)), None)


def is_option(index: int | None, row) -> bool:
    """Whether that option is the right one. Options with the same text are the same."""
    gold = option_index(row.answer, row.choices)
    return None not in (index, gold) and row.choices[index] == row.choices[gold]


def mathvista(answer: str, row) -> bool:
    """MathVista's normalization: the most similar option; integers cut off, decimals rounded to the gold's places; lists as text."""
    if row.choices:
        index = named_option(answer, row)
        if index is None:
            index = min(range(len(row.choices)), key=lambda i: edit_distance(answer[:200], row.choices[i]))
        return is_option(index, row)
    value, gold, kind = only_number(answer), only_number(row.answer), row.raw["answer_type"]
    if None in (value, gold) or kind not in ("integer", "float"):
        return grade(answer, row.answer)
    places = only_number(str(row.raw.get("precision"))) or len(row.answer.partition(".")[2])
    return int(value) == int(gold) if kind == "integer" else round(value, int(places)) == round(gold, int(places))


def mathvision(answer: str, row) -> bool:
    """MATH-V's: the option's letter or its value; numbers rounded to two places."""
    gold = row.answer
    if row.choices:
        if (index := named_option(answer, row)) is not None:
            return is_option(index, row)
        right = option_index(gold, row.choices)
        gold = gold if right is None else row.choices[right]
    values = only_number(answer), only_number(gold)
    return grade(answer, gold) or None not in values and round(values[0], 2) == round(values[1], 2)


def relaxed(answer: str, row) -> bool:
    """ChartQA's relaxed accuracy, oddities included: 5 % off is right, years too; "25%" is 0.25; "1,234" is no number."""

    def number_or_none(text):
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    def right(gold):
        value, target = number_or_none(answer.strip()), number_or_none(gold)
        if value is not None and target:
            return abs(value - target) / abs(target) <= 0.05
        return answer.strip().lower() == gold.lower()

    return any(map(right, golds(row)))


def relaxed_clean(answer: str, row) -> bool:
    """Relaxed accuracy as it is meant: $, separators and units do not count, a percentage may be either figure, a year (from
    1800 to 2100, if the question says year or when) is exact, and texts are compared by the generic rule."""
    asks_year = regex.search(r"\b(?:years?|when)\b", row.problem.lower())

    def right(gold):
        value, target = only_number(answer), only_number(gold)
        if value is None or target is None:
            return grade(answer, gold)
        off = 0 if asks_year and gold.isdecimal() and 1800 <= target <= 2100 else 0.05 * abs(target)
        scales = [1] + [0.01] * ("%" in answer) + [100] * ("%" in gold)
        return any(abs(value * scale - target) <= off for scale in scales)

    return any(map(right, golds(row)))


def inferred(answer: str, row) -> bool:
    """VLMEvalKit's exact matching: the one option letter among the last words, else the one option text in the answer.

    Verbatim: the article in "A dog" counts as option A.
    """
    if not row.choices:
        return graded(answer, row)
    letters = ascii_uppercase[: len(row.choices)]
    words = regex.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return is_option(letters.index(named[0]), row)
    if said := regex.search(r"answer is ([A-Z])\b", answer):
        return said[1] in letters and is_option(letters.index(said[1]), row)
    inside = [i for i, choice in enumerate(row.choices) if choice.lower() in answer.lower()]
    short = len(answer) <= 2 * sum(map(len, row.choices))
    return short and len(inside) == 1 and is_option(inside[0], row)


def yes_or_no(answer: str, row) -> bool:
    """HallusionBench: "yes" or "no" as a word, not both."""
    words = set(regex.findall(r"\w+", answer.lower())) & {"yes", "no"}
    return words == {{"1": "yes", "0": "no"}.get(row.answer, row.answer.strip().lower())}


def dynamath(answer: str, row) -> bool:
    """DynaMath: numbers within 0.001; the only letter A-E; anything else by the generic rule."""
    if row.raw["answer_type"] == "float":
        values = only_number(answer), only_number(row.answer)
        return None not in values and abs(values[0] - values[1]) <= 0.001
    if row.raw["answer_type"] == "multiple choice":
        letters = set(regex.findall(r"\b[A-E]\b", answer.upper() if len(answer) == 1 else answer))
        return letters == {row.answer.strip().upper()}
    return graded(answer, row)


def letter_set(answer: str, row) -> bool:
    """LogicVista: the same set of option letters ("A, C" is "CA" is "C and A")."""

    def letters(text):
        text = text.strip(" .()*")
        return set(text.upper() if regex.fullmatch(r"[A-Za-z0-9]{1,5}", text) else regex.findall(r"\b[A-Z0-9]\b", text))

    return letters(answer) == letters(row.answer) != set()


def share(values: list) -> float:
    return sum(values) / len(values)


def group_mean(items: list, key: Callable, score: Callable = all) -> float:
    """Mean over groups of rows with one key of `score` of their verdicts; all: the group counts if it is right as a whole."""
    groups = {}
    for row, _, right in items:
        groups.setdefault(str(key(row)), []).append(right)
    return share([score(group) for group in groups.values()])


def hallusion_scores(items: list) -> dict[str, float | None]:
    """aAcc over questions; fAcc over figures, qAcc over questions with all their figures, right as a whole; their mean.

    An index ends in _set_figure_question; None for another form.
    """
    place = lambda row: [row.raw["l2-category"], *row.qid.split("_")[-3:]]
    a = share([right for *_, right in items])
    if min(row.qid.count("_") for row, *_ in items) < 2:
        return {"aAcc": a, "fAcc": None, "qAcc": None, "mean": None}
    f = group_mean(items, lambda row: tuple(place(row)[:3]))
    q = group_mean(items, lambda row: (*place(row)[:2], place(row)[3]))
    return {"aAcc": a, "fAcc": f, "qAcc": q, "mean": (a + f + q) / 3}


def wemath_scores(items: list) -> dict[str, float | None]:
    """Strict and loose score over the problems that are there with their 2 or 3 steps and as a whole: a whole that is right
    although a step (loose: every step) is wrong is learned by heart and earns 0; one that is wrong with all steps right, 1/2."""
    problems = {}
    for row, _, right in items:
        steps, _, part = str(row.raw["key"]).partition("_")
        problems.setdefault((row.raw["ID"], steps), {})[part] = right
    pairs = [
        (parts.pop("multi"), list(parts.values())) for parts in problems.values() if "multi" in parts and len(parts) > 1
    ]
    score = lambda known: (
        share([float(known(steps)) if whole else all(steps) / 2 for whole, steps in pairs]) if pairs else None
    )
    return {"strict": score(all), "loose": score(any), "problems": len(pairs)}


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's file is known, read and scored."""

    name: str  # pattern of the file's name, in lower case and without - and _
    rule: Callable = graded  # (answer, data.Row) -> right or not; only asked about responses that have an answer
    scores: Callable | None = None  # [(row, answer, right)] of one response each -> further scores
    needs: str = ""  # columns that rule and scores read
    telling: str = ""  # columns that give the benchmark away, whatever the file is called
    gold: str = "letter"  # of questions with options: letter, text or index (from 0); any: one text or a list, any is right


BENCHMARKS = {
    "mathvista": Benchmark("mathvista", mathvista, None, "question_type answer_type", "question_type answer_type", "text"),
    "mathvision": Benchmark("mathv(?!ista|erse)", mathvision, telling="options level subject"),
    "mathverse": Benchmark("mathverse", telling="problem_version"),
    "chartqa": Benchmark(
        "chartqa(?!pro)", relaxed, lambda items: {"relaxed_clean": share([bool(answer) and relaxed_clean(answer, row) for row, answer, _ in items])},
        telling="imgname label", gold="any"),
    "ai2d": Benchmark("ai2d", inferred, gold="index"),
    "mmstar": Benchmark("mmstar", inferred, lambda items: {
        "sub-category mean": group_mean(items, lambda row: row.raw.get("l2_category") or row.raw.get("l2-category"), share)}),
    "mmmu": Benchmark("mmmu", inferred, gold="any"),
    "hallusionbench": Benchmark("hallusion", yes_or_no, hallusion_scores, "l2-category"),
    "dynamath": Benchmark(
        "dynamath", dynamath, lambda items: {"worst case": group_mean(items, lambda row: row.raw["qid"])},
        "qid answer_type", "qid varid answer_type"),
    "wemath": Benchmark("wemath", inferred, wemath_scores, "ID key", "ID key"),
    "logicvista": Benchmark("logicvista", letter_set),
    "generic": Benchmark("$^"),  # a pattern without a match: the rule for what is left
}  # fmt: skip


def wilson(p: float, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share p seen in n trials (Wilson 1927)."""
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(max(0.0, middle + side * spread) / (1 + z * z / n), 4) for side in (-1, 1)]


def score_predictions(rows: list, records: list[dict]) -> dict:
    """Write extraction and verdict of each response into the records; return the scores of the file.

    records: {"responses": n texts, and as far as they are known "parts", "tokens", "truncated"} of rows[i]. The interval takes
    the questions for its trials, however many responses each has: responses to one question are not independent.
    """
    mean = lambda values: round(share(values), 4) if values and None not in values else None
    benchmark, each = BENCHMARKS[rows[0].benchmark], len(records[0]["responses"])
    for row, record in zip(rows, records):
        found = [extract_answer(text) for text in record["responses"]]
        record["extracted"], record["extraction"] = [answer for answer, _ in found], [where for _, where in found]
        record["verdicts"] = [bool(answer) and benchmark.rule(answer, row) for answer, _ in found]
    rights = [share(record["verdicts"]) for record in records]
    of_parts = lambda name: [part[name] for record in records for part in record.get("parts", []) if name in part]
    of_records = lambda name: [
        float(bool(value) if name == "extracted" else value) for r in records for value in r.get(name, [])
    ]
    scores = {"benchmark": rows[0].benchmark, "judge": "rule", "n": len(rows), "responses_each": each}
    scores |= {"accuracy": mean(rights), "interval_95": wilson(share(rights), len(rows))}
    scores |= {name: mean(of_records(name)) for name in ("extracted", "truncated", "tokens")}
    scores |= {name: mean(of_parts(name)) for name in ("keyword", "clip", "format")}
    scores["further"] = {f"pass@{each}": mean([right > 0 for right in rights])} if each > 1 else {}
    if benchmark.scores:  # of one response to each question at a time
        runs = [[(row, r["extracted"][i], r["verdicts"][i]) for row, r in zip(rows, records)] for i in range(each)]
        runs = [benchmark.scores(run) for run in runs]
        scores["further"] |= {name: mean([run[name] for run in runs]) for name in runs[0]}
    groups = {}
    for row, right in zip(rows, rights):
        for column, value in [(column, value) for column, values in row.categories.items() for value in values]:
            groups.setdefault(column, {}).setdefault(value, []).append(right)
    summary = lambda group: {"n": len(group), "accuracy": mean(group)}
    scores["categories"] = {
        column: {value: summary(group) for value, group in sorted(found.items())}
        for column, found in groups.items()
        if len(found) > 1
    }
    return scores
