"""The rewards of "Perception Before Reasoning" (arXiv 2509.13031), and the scores of evaluation.

A reward is a dict of parts. `total_reward` adds them up with the stage's weights; a part without a weight is
only logged. So a reward of your own is a function, a line in `score_parts`, and a weight in STAGE_REWARDS.

[n] is the number of a departure from the authors' code, in pebr.py's header.
"""

import ast
from dataclasses import dataclass
from fractions import Fraction
import functools
import glob
import math
from operator import add, mul, sub, truediv
import os
import random
import unicodedata

from PIL import Image
import regex
import torch
import torch.nn.functional as F

STAGE_REWARDS = {
    "perception": {"clip": 0.4, "keyword": 0.4, "format": 0.1, "length": 0.1},  # paper, stage 1
    "reasoning": {"accuracy": 0.9, "format": 0.1},  # paper, stage 2
}
class ClipError(ValueError):
    """A CLIP model that cannot be loaded, with its name and the library's message."""


LENGTH_LIMIT = 512  # tokens; a longer response earns LENGTH_LIMIT / length (paper, stage 1)


# ------------------------------------------------------------------------------------------------------------
# Sections of a response

HEADING = regex.compile(
    r"###\s*(?:(?P<description>Image\s+Description)|(?P<rationales>Rationales)"
    r"|(?P<think>Let['’]s\s+think\s+step\s+by\s+step)|(?P<step>Step\s+(?P<number>\d+))"
    r"|(?P<answer>The\s+final\s+answer\s+is))[ \t]*[:：.]?",
    regex.IGNORECASE,
)


@dataclass
class Response:
    description: str  # "" if it is missing, like the answer
    answer: str
    well_formed: bool  # whether the format holds


def parse_response(text: str) -> Response:
    """Read the sections of the paper's answer format once, in order. [5]

    Well formed: the headings Image Description, Rationales, Let's think step by step, Step 1, 2, .. and The
    final answer is, each once and in this order; nothing before the first; no empty section but "think"; one
    line of answer. A heading ends the section before it wherever it stands. Otherwise the last answer section
    counts, with its first line, and the first description that another heading closes (an unclosed one is
    none, as in the authors' pattern). An answer without its heading is no answer.
    """
    found = list(HEADING.finditer(text))
    names = ["step" if match["step"] else match.lastgroup for match in found]
    ends = [match.start() for match in found[1:]] + [len(text)]
    sections = [(name, text[match.end() : end].strip()) for name, match, end in zip(names, found, ends)]
    descriptions = [body for name, body in sections[:-1] if name == "description"]
    answers = [body for name, body in sections if name == "answer"]
    numbers = [int(match["number"]) for match in found if match["number"]]
    well_formed = (
        names == ["description", "rationales", "think"] + ["step"] * len(numbers) + ["answer"]
        and numbers == list(range(1, len(numbers) + 1)) != []
        and not text[: found[0].start()].strip()
        and all(body for name, body in sections if name != "think")
        and "\n" not in answers[-1]
    )
    answer = answers[-1].split("\n")[0].strip() if answers else ""
    return Response(descriptions[0] if descriptions else "", answer, well_formed)


# ------------------------------------------------------------------------------------------------------------
# Keyword reward


def key_tokens(text: str) -> list[str]:
    """Words, numbers and signs in one spelling: 1,000 and 3.0 as 1000 and 3; "two" to "twelve" as numbers
    ("one" is mostly a pronoun); 3cm as 3 cm; percent as %. Case is kept."""
    text = regex.sub(r"\bper\s?cent\b", "%", text, flags=regex.IGNORECASE)
    tokens = []
    for token in regex.findall(r"(?V1)\p{Han}|\d++(?:[.,]\d++)*+[\w--\p{Han}]*|[\w--\p{Han}]+|\S", text):
        number, rest = regex.fullmatch(r"((?:\d[\d.,]*)?)(.*)", token).groups()
        number = regex.sub(r",(?=\d{3}(?!\d))|\.0+$", "", number)
        is_unit = not UNITS.keys().isdisjoint((rest, rest.removesuffix("s")))
        tokens += [number, rest] if number and is_unit else [number + rest]
    numbers = [NUMBER_WORDS.get(token.casefold(), 0) for token in tokens]
    return [str(number) if 2 <= number <= 12 else token for number, token in zip(numbers, tokens)]


def word_forms(word: str) -> set[str]:
    """A word without case, and what may be its singular: "cherries" may be cherry, "buses" bus or buse."""
    word = word.casefold()
    is_plural = len(word) > 3 and regex.search(r"[^s]s$", word)
    return {word, word[:-1], word.removesuffix("es"), regex.sub("ies$", "y", word)} if is_plural else {word}


def keyword_reward(description: str, key_words: list[str]) -> float:
    """Share of the reference keywords, 0 to 1, that the image description names (paper, stage 1). [1]

    As a whole word or phrase, in any case, singular or plural: "3" is met by 3 and three, not by 13 or 3.5. A
    keyword of one letter (point A of a figure) is met in its own case only.
    """
    said = key_tokens(description)
    folded, forms = [token.casefold() for token in said], [word_forms(token) for token in said]

    def is_named(keyword: str) -> bool:
        *first, last = key_tokens(keyword)
        if not first and len(last) == 1:
            return last in said
        first, last = [token.casefold() for token in first], word_forms(last)
        ends = [i for i in range(len(first), len(said)) if forms[i] & last]
        return any(folded[i - len(first) : i] == first for i in ends)

    return sum(map(is_named, key_words)) / len(key_words)


# ------------------------------------------------------------------------------------------------------------
# Accuracy: does an answer say what the gold answer says?
#
# `grade` normalizes both texts and compares them as what the gold is. An answer is untrusted: it never runs
# as code, `evaluate` computes few operations on bounded numbers, and no pattern takes exponential time.

MAX_CHARS, MAX_TERMS, MAX_BITS, MAX_EXPONENT, MAX_VALUE = 400, 60, 4000, 400, 10**300
BALANCED = r"(?P<group>[(\[{](?:[^()\[\]{}]++|(?&group))*+[)\]}])"


# fmt: off
LIKE_SIGNS = str.maketrans("×·⋅∙÷⁄∕−–‐∶。、“”‘’⩽⩾", "****///---:.,\"\"''≤≥")
LATEX_SIGNS = {name: sign for sign, names in {
    "": "left right displaystyle", " ": "quad qquad", "*": "cdot times ast", "/": "div", "≠": "ne neq",
    "≤": "le leq leqslant", "≥": "ge geq geqslant", "±": "pm", "∞": "infty", "∪": "cup", "∈": "in",
    "∠": "angle", "|": "vert lvert rvert", "π": "pi", "√": "sqrt", "°": "circ", "≈": "approx sim",
    r"\frac": "dfrac tfrac cfrac",
}.items() for name in names.split()}
UNWRAP = [
    (r"\x0crac", r"\\frac"),  # a "\f" that became a form feed, in a benchmark's gold
    (r",\\!\s*", ","), (r"\\[!()\[\]]|`|\{\}", ""), (r"\\[,;: ]|~|\\\\", " "), (r"\\([%#&{}])", r"\1"),
    (r"\\(?:boxed|fbox|mbox|text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|operatorname|"
     r"overline(?=\s*\{\s*\p{L}))\s*(\{((?:[^{}]++|(?1))*+)\})", r" \2 "),
    (r"\{,\}", ","), (r"<=", "≤"), (r">=", "≥"), (r"!=", "≠"), (r"\binf(?:inity)?\b", "∞"),
    (r"(?<!\p{L})pi(?!\p{L})", "π"), (r"(?<!\p{L})sqrt", "√"), (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),
    (r"\^\s*(?:[°o](?!\w)|\{\s*[°o]\s*\})|\{?\bdeg(?:rees?)?\b\}?|度|掳|º", "°"),
    (r"(?<![\w)*])(\*{1,2}|__)(?=\S)([^*]+)(?<=\S)\1(?![\w(*])", r"\2"), (r"</?(?:\p{L}{2,9}|[bi])>", ""),
    # 5 (as 2 + 3 = 5)
    (r"(\d[^()]*?)\s*\((?=[^()]*\p{L}{3})(?=[^()]*\s)(?![^()]*\b(?:or|not)\b)[^()]*\)$", r"\1"),
    (r"^\s+|\s+$|(?<=.)[\s.,;:]+$|^#+\s+|^=\s*(?=\S)", ""), (r"^([\"'])(.*)\1$", r"\2"),
    (r"^(?:so|thus|hence|therefore)\b,?\s+(?=\S)", ""),
    (r"^(?:approximately|approx\.?|about|around|roughly|≈)(?=\W*\d)", ""),
    (r"^(?:(?:the\s+)?(?:(?:final|correct|right)\s+)*(?:answer|option|choice)\b(?:\s+is\b)?|答案|选项?)"
     r"\s*[:为是]*\s*(?=\S)", ""),
]
# fmt: on


def rewrite(text: str, rules: list[tuple[str, str]]) -> str:
    """Apply the rules again and again until the text stays as it is."""
    for _ in range(30):
        before = text
        for pattern, new in rules:
            text = regex.sub(pattern, new, text, flags=regex.IGNORECASE | regex.DOTALL)
        if text == before:
            break
    return text


@functools.lru_cache(maxsize=4096)
def normalize(text: str) -> str:
    """One spelling for each sign; without markdown, LaTeX wrappers, a lead-in and final punctuation."""
    text = regex.sub(r"\\{2,}(?=\p{L}{2}|[()\[\]{}!,;:%$])", r"\\", text)  # escaped twice
    text = regex.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", r"^{\g<0>}", text)
    text = unicodedata.normalize("NFKC", regex.sub(r"(?<=\d)(?=\p{No})", " ", text))  # 1½ is "1 1/2"
    text = text.translate(LIKE_SIGNS).replace("\\$", "¤")
    if text.count("$") % 2:  # money, not a pair of LaTeX marks
        text = regex.sub(r"\$(?=\s*[\d.])", "¤", text, count=1)
    text = regex.sub(r"\\([A-Za-z]+)", lambda m: LATEX_SIGNS.get(m[1], m[0]), text.replace("$", ""))
    return rewrite(text, UNWRAP)


# fmt: off
INFIX = [  # LaTeX from the inside out, but first of all mixed numbers, 1 1/2, and 1.2 * 10^3
    (r"(?<![\d.^/_}])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"(\1@(\2/\3))"), (r"\*\*", "^"),
    (r"(?<![\d.^/_}])(\d+)\s*\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", r"(\1@(\2\3/\4\5))"),
    (r"(?<![\w.^])(\d+\.?\d*|\.\d+)\s*\*\s*10\s*\^\s*\(?\s*([-+]?\d{1,3})\s*\)?(?![\w.^(])", r"\1e\2"),
    (r"√\s*\[(\d)\]\s*\{([^{}]*)\}", r" ((\2)^(1/\1)) "), (r"√\s*\(", " root("),
    (r"√\s*(?:\{([^{}]*)\}|(\d+(?:\.\d+)?|[a-zπ]))", r" root(\1\2) "), (r"\|([^|]*)\|", r" abs(\1) "),
    (r"\\frac\s*(?:\{([^{}]*)\}|(\d|π))\s*(?:\{([^{}]*)\}|(\d|π|[a-z]))", r" ((\1\2)/(\3\4)) "),
    (r"\\?(sin|cos|tan|ln)\s*(\d*\s*(?:\\[a-z]+|[a-zΑ-ω])|\d+)(?!\w)", r" \1(\2) "),
    (r"([\^_])\s*\{([^{}]*)\}", r"\1(\2)"), (r"[{\[]", "("), (r"[}\]]", ")"),
]
# fmt: on
TOKEN = regex.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?)|(?P<open>\()|(?P<close>\))"
    r"|\\?(?P<function>root|abs|sin|cos|tan|ln)(?=\s*\()|(?P<sign>[-+*/^@])"
    r"|(?P<name>\\?[A-Za-zΑ-ω](?:_(?:\w|\(\w{1,9}\)))?|\\[A-Za-z]+))"
)


class NotMath(ValueError):
    """The text is no expression that the grader reads, or has no real value of bearable size."""


@functools.lru_cache(maxsize=64)
def parse(text: str) -> tuple[ast.expr, list]:
    """An expression, LaTeX or not, as Python's syntax tree over v0, v1, .., and what these are: Fractions and
    names. Only operators, brackets and functions of the text reach Python's parser. Raises NotMath."""
    if len(text) > MAX_CHARS or regex.search(r"(?<![\\\p{L}])(?!sin|cos|tan)\p{L}{3,}", text):
        raise NotMath("words")
    text = rewrite(text, INFIX)
    if TOKEN.sub("", text).strip():
        raise NotMath("an unknown sign")
    source, leaves, before = "", [], ""
    for match in TOKEN.finditer(text):
        kind, token = match.lastgroup, match[match.lastgroup]
        if kind == "number" and before in ("number", "name"):
            raise NotMath("5 6, or x 2")
        if before in ("number", "name", "close") and kind not in ("sign", "close"):
            source += "*"  # 2x is 2 * x
        if kind in ("number", "name"):
            leaves.append(Fraction(token) if kind == "number" else token)
        source += f"v{len(leaves) - 1}" if kind in ("number", "name") else token.replace("^", "**")
        before = kind
    if len(leaves) > MAX_TERMS:
        raise NotMath("too long")
    try:
        return ast.parse(source, mode="eval").body, leaves
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise NotMath(source) from None


def power(base, exponent):
    parts = (base.numerator, base.denominator) if isinstance(base, Fraction) else ()
    bits = max((part.bit_length() for part in parts), default=0)
    if abs(exponent) > MAX_EXPONENT or abs(exponent) * bits > MAX_BITS:
        raise NotMath("too large")
    return base ** int(exponent) if exponent == int(exponent) else float(base) ** float(exponent)


FUNCTIONS = dict(root=math.sqrt, abs=abs, sin=math.sin, cos=math.cos, tan=math.tan, ln=math.log)
STEPS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}
OPERATIONS = STEPS | {ast.Pow: power, ast.MatMult: add}  # @ joins the parts of a mixed number
PI = {"π": math.pi}


def evaluate(text: str, names: dict = PI) -> tuple:
    """(value, unfinished) of an expression where its names have these values. Raises NotMath.

    The value is a Fraction, or a float after a root, π or a function. Unfinished: a step between two rational
    numbers is left to compute, as in 6*7, 3+4 and 84/2; fractions, powers, multiples of roots are finished.
    """
    tree, leaves = parse(text)
    unfinished = False

    def value(node):
        nonlocal unfinished
        if isinstance(node, ast.Name):
            leaf = leaves[int(node.id[1:])]
            result = leaf if isinstance(leaf, Fraction) else names[leaf]
        elif isinstance(node, ast.UnaryOp):
            result = value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        elif isinstance(node, ast.Call):
            result = FUNCTIONS[node.func.id](value(node.args[0]))
        else:
            left, right, operation = value(node.left), value(node.right), OPERATIONS[type(node.op)]
            if type(node.op) in STEPS and isinstance(left, Fraction) and isinstance(right, Fraction):
                unfinished |= operation is not truediv or (left / right).denominator == 1
            result = operation(left, right)
        if isinstance(result, complex) or not abs(result) < MAX_VALUE:  # nan included
            raise NotMath("no real number, or too large")
        return result

    try:
        result = value(tree)
        return result, unfinished
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise NotMath(str(error)) from None


# Numbers with their units

# fmt: off
NUMBER_WORDS = {word: n for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen".split())}
NUMBER_WORDS |= {word: 10 * n for n, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
MAGNITUDES = [(rf"(?<=\d)\s*{word}\b", exponent) for word, exponent in (
    ("hundred", "e2"), ("thousand", "e3"), ("million", "e6"), ("billion", "e9"), ("trillion", "e12"))]
UNITS = {name: (basic, Fraction(multiple)) for basic, multiple, names in (
    ("m", "0.001", "mm millimeter millimetre 毫米"), ("m", "0.01", "cm centimeter centimetre 厘米"),
    ("m", "1", "m meter metre 米"), ("m", "1000", "km kilometer kilometre 千米 公里"), ("m", "0.0254", "in inch"),
    ("m", "0.3048", "ft foot feet"), ("m", "0.9144", "yd yard"), ("m", "1609.344", "mi mile"),
    ("g", "0.001", "mg milligram"), ("g", "1", "g gram 克"), ("g", "1000", "kg kilogram 千克 公斤"),
    ("g", "453.59237", "lb pound"), ("g", "28.349523125", "oz ounce"), ("m^3", "0.001", "l liter litre 升"),
    ("m^3", "0.000001", "ml milliliter millilitre 毫升"), ("s", "1", "s sec second 秒"), ("s", "0.001", "ms"),
    ("s", "60", "min minute 分钟"), ("s", "3600", "h hr hour 小时"), ("day", "1", "day 天"),
    ("year", "1", "year yr 年"), ("¤", "1", "¤ dollar usd 美元"),
    ("€", "1", "€ euro eur"), ("¥", "1", "¥ yuan rmb 元"),
) for name in names.split()}
NO_UNIT = set("or and not to of but if is are was than the there that this then so with by for at on out "
              "left right more less maybe".split())
# fmt: on
THOUSANDS = (  # the separators in 1,234 and 1 234; (1,234) has two items
    r"(?<=(?<![\d.,(\[{])[1-9]\d{0,2}(?:,\d{3})*),(?=\d{3}(?:,\d{3})*(?!,?\d))"
    r"|(?<=(?<![\d.,(\[{]|\d )[1-9]\d{0,2}(?: \d{3})*) (?=\d{3}(?: \d{3})*(?! ?\d))"
)
WITH_UNIT = r"(.*[\d)}π])(\s*)[{(]?((?:°|(?!π)\p{L})[\p{L} ./*°]{0,40})[})]?\s*(?:\^?\s*\{?([23])\}?)?"


@dataclass
class Quantity:
    value: Fraction | float
    unfinished: bool  # see evaluate
    step: Fraction  # the weight of a decimal's last digit; 0: exact
    unit: str = ""  # in basic units: that of km/h is m/s
    scale: Fraction = Fraction(1)  # how many basic units it is


def read_unit(text: str, apart: bool, exponent: str | None) -> tuple[str, Fraction]:
    """(basic unit, how many of it): "kilometers per hour" is ("m/s", 5/18). Raises NotMath for what may be a
    variable (2x) or a sentence. `apart`: a space stands between number and unit."""
    text = text.casefold()
    if NO_UNIT.intersection(regex.findall(r"\p{L}+", text)):
        raise NotMath(text)
    if "°" in text:
        return compact(text), Fraction(1)  # 60°, 118°T
    names, scale = [], Fraction(1)  # a word for each side of "per": "years old" are years
    for part in regex.split(r"/|\bper\b", text):
        power_word, word = regex.match(r"\W*(square(?!s\b)|sq\b|cubic)?\W*(\p{L}*)", part).groups()
        known = [w for w in (word, word.removesuffix("s"), word.removesuffix("es")) if w in UNITS]
        likely = known or len(word) > 2 and apart or regex.match(r"\p{Han}", word)
        if not likely or word in ("s", "h") and not apart:
            raise NotMath(word)
        name, multiple = UNITS[known[0]] if known else (word.removesuffix("s"), Fraction(1))
        n = {"square": 2, "sq": 2, "cubic": 3}.get(power_word, int(exponent or 1))
        scale = scale / multiple**n if names else multiple**n
        names.append(name.removeprefix("unit") + (f"^{n}" if n > 1 else ""))
        exponent = None
    return "/".join(names), scale


def plain_number(text: str) -> Quantity:
    """A number without a unit. Raises NotMath."""
    text = regex.sub(THOUSANDS, "", text.strip())
    if regex.fullmatch(r"[-+]?(?:\d+,\d{1,2}|0,\d+)", text):
        text = text.replace(",", ".")
    decimal = regex.fullmatch(r"[-+]?\s*\d*\.(\d+)(?:e(\d\d?))?", text)
    step = Fraction(10) ** (int(decimal[2] or 0) - len(decimal[1])) if decimal else Fraction(0)
    return Quantity(*evaluate(text), step)


def quantity(text: str) -> Quantity:
    """A number in any spelling, with its unit, as an exact value where it has one. Raises NotMath."""
    money = regex.match(r"([-+]?)\s*([¤€£¥])", text)
    text = money[1] + text[money.end() :] if money else text
    words = regex.match(r"(\p{L}+)(?:[- ](\p{L}+))?", text.casefold())
    if words and words[1] in NUMBER_WORDS:  # five; twenty-five
        ones = NUMBER_WORDS.get(words[2], 0) if NUMBER_WORDS[words[1]] >= 20 else 0
        text = str(NUMBER_WORDS[words[1]] + ones) + text[words.end(2 if ones else 1) :]
    text, percent = regex.subn(r"\s*(?:%|\bper\s?cent|\bpct)$", "", rewrite(text, MAGNITUDES))
    unit = money[2] if money else "%" * percent
    try:
        number = plain_number(text)
    except NotMath:
        match = regex.fullmatch(WITH_UNIT, text)
        if not match:
            raise
        number = plain_number(match[1])
        unit, number.scale = read_unit(match[3], bool(match[2]), match[4])
    number.unit = unit
    return number


def same_quantity(answer: Quantity, gold: Quantity, tolerance: float = 0) -> bool:
    """Equal, or equal as far as the coarser of the two is written, or within a share `tolerance` of the gold.

    The unit may be missing, or another one of its kind (50 cm for 0.5 m). An unfinished answer is not the
    number, unless the gold is written like that.
    """
    if answer.unit and gold.unit and answer.unit != gold.unit or answer.unfinished and not gold.unfinished:
        return False
    scales = [(answer.scale, gold.scale) if answer.unit and gold.unit else (1, 1)]
    if answer.unit != gold.unit and "%" in (answer.unit, gold.unit):  # 25% is 25, and 0.25
        scales.append((Fraction(1, 100), 1) if answer.unit else (1, Fraction(1, 100)))
    if float in (type(answer.value), type(gold.value)):
        tolerance = max(tolerance, 1e-9)
    for scale, gold_scale in scales:
        gap = abs(answer.value * scale - gold.value * gold_scale)
        step, gold_step = answer.step * scale, gold.step * gold_scale
        if gap <= tolerance * abs(gold.value * gold_scale):
            return True
        if step < gold_step and gap <= gold_step / 2:
            return True  # 47.58 for 47.6
        if step and not gold_step and gap <= step / 2 and abs(answer.value) >= 100 * answer.step:
            return True  # 0.333 for 1/3: at least three digits of an exact gold
    return False


# Sequences: (opening bracket, closing bracket, items) of (a, b), [a, b), {a, b}, "a, b", "a and b", ±a

RELATION = regex.compile(r"\s*([=≤≥<>≠])\s*")
MIRRORED = {">": "<", "≥": "≤"}


def sequence(text: str) -> tuple[str, str, list[str]] | None:
    """None if there is only one item."""
    text = regex.sub(r"\s*,?\s*(?:\b(?:and|or)\b|[和或])\s*", ", ", text)
    if "±" in text:
        return "", "", [text.replace("±", "+"), text.replace("±", "-")]
    opening, closing, marks = "", "", "∪" if "∪" in text else ",;"
    if bracketed := regex.fullmatch(r"(?:\p{L}{1,9}\s*)?" + BALANCED, text):
        opening, *_, closing = bracketed["group"]
        text, marks = bracketed["group"][1:-1], ",;"
    elif marks == ",;":
        text = regex.sub(THOUSANDS, "", text)
    items = [m[0].strip() for m in regex.finditer(rf"(?:[^{marks}()\[\]{{}}]++|{BALANCED})+", text)]
    return (opening, closing, items) if len(items) > 1 else None


def interval(text: str) -> tuple[str, str, list[str]] | None:
    """Of an inequality in one name: x > 3 is (3, ∞), -1 < x ≤ 3 is (-1, 3]. None for another text."""
    if not regex.search("[<≤]", text):
        text = "".join(RELATION.split(text)[::-1]).translate(str.maketrans(MIRRORED))
    match = regex.fullmatch(r"(?:([^<≤>≥]+)([<≤]))?\s*\p{L}\s*(?:([<≤])([^<≤>≥]+))?", text)
    if not match or not (match[2] or match[3]):
        return None
    opening, closing = "[" if match[2] == "≤" else "(", "]" if match[3] == "≤" else ")"
    return opening, closing, [match[1] or "-∞", match[4] or "∞"]


def same_sequence(answer: tuple, gold: tuple, depth: int) -> bool:
    """Item by item; in any order in braces and without brackets."""
    if answer[0] and gold[0] and answer[:2] != gold[:2] or len(answer[2]) != len(gold[2]):
        return False
    left, any_order = list(answer[2]), answer[0] in ("", "{") and gold[0] in ("", "{")
    for item in gold[2]:
        candidates = left if any_order else left[:1]
        found = next((i for i, other in enumerate(candidates) if equivalent(other, item, depth + 1)), None)
        if found is None:
            return False
        del left[found]
    return True


def relations(text: str) -> set[tuple[str, ...]]:
    """(sign, left - right at 8 random points, to 9 digits) of each part of a chain. Raises NotMath.

    Left - right is scaled to 1 at the first point (or -1, in inequalities), so equal relations have equal
    values. A formula has no sign, is compared to 0 and keeps its values.
    """
    text = regex.sub(r"^\s*\p{L}\s*\(\s*\p{L}\s*\)\s*=", "y=", text)  # f(x) = ..
    sides, signs = RELATION.split(text)[::2], RELATION.findall(text)
    parts = set()
    for left, sign, right in zip(sides, signs or [""], sides[1:] or ["0"]):
        left, right, sign = (right, left, MIRRORED[sign]) if sign in MIRRORED else (left, right, sign)
        names, values = {leaf for leaf in parse(left)[1] + parse(right)[1] if isinstance(leaf, str)}, []
        for i in range(8):  # from the fifth point on, coordinates have either sign
            point = {name: random.Random(f"{name} {i}").randint(-97 * (i > 3), 97) for name in names}
            point = {name: Fraction(value, 7) + Fraction(1, 11) for name, value in point.items()}
            try:
                values.append(float(evaluate(left, point | PI)[0] - evaluate(right, point | PI)[0]))
            except NotMath:
                values.append(math.nan)
        known = [value for value in values if not math.isnan(value)]
        if len(known) < 3 or not all(known) or len(signs) > 3:
            raise NotMath("hardly defined, always true, or a long chain")
        scale = {"": 1, "=": known[0], "≠": known[0]}.get(sign, abs(known[0]))
        parts.add((sign, *(f"{value / scale:.9g}" for value in values)))
    return parts


# Options, labels, yes and no, texts

YES, NO = {"yes", "true", "是", "是的", "对", "正确"}, {"no", "false", "否", "不是", "错", "错误"}
SAID = (  # yes or no, then nothing or a remark that is not the other one
    rf"(?i)({'|'.join(YES | NO)})(?!\p{{L}})(?!\W*(?:or|and)?\W*(?:{'|'.join(YES | NO)})\b)"
    r"(?s:\s*[,.;:(!-].*|\s+(?:it|they|there|this|that|because|since)\b.*)?"
)
LETTER = (  # of "B", "(b)", "B. 24", and the rest, but not of "A or B"
    r"(?s)(?|\(([A-Za-z])\)|([A-Za-z])(?=$|\s*[.:)]|\s+[-–(]|(?<=[A-Z])\s+(?:is|because|since)\b))[\s.:)]*+"
    r"(?!\(?[A-Z]\)?$|.*(?:\bor\b|\band\b|[,/&])\W*[A-Z](?!\p{L}))(.*)"
)
LABEL = (
    r"(?s)((?:\\triangle|m?∠|△)?\s*(?:\p{Lu}{1,4}|\p{L}(?:_\w|_\{\w+\}|')?(?:\(\w\))?|\p{L}{3,}[ \p{L}]{0,50}"
    r")|\(\w,\s*\w\))\s*(?:[=:∈]|\bis\b|\bare\b|\bequals\b)\s*(\S.*)"
)
TIME = r"(?i)((?:[01]?\d|2[0-3]):[0-5]\d)(?:\s*([ap])\.?m\.?)?"
MATH_SIGN = r"[=^+*<>≤≥≠|/\\√π%°_]|[-(]\s*\d|\d\s*-"


def option_index(text: str, choices: list[str], gold: bool = False) -> int | None:
    """Index of the choice that a text names, by its letter ("B", "(b)", "B. 24") or by saying what it says;
    None: no choice. gold: a data file's answer may also be a 0-based index ("1") that is no choice's text."""
    if text.strip() in choices and len(text.strip()) > 1:
        return choices.index(text.strip())
    text, options = normalize(text), [normalize(choice) for choice in choices]
    named = regex.fullmatch(LETTER, text)
    index = ord(named[1].upper()) - ord("A") if named else len(choices)
    if index < len(choices) and not named[2]:
        return index
    hits = [i for i, option in enumerate(options) if compact(option) == compact(text)]
    hits = hits or [i for i, option in enumerate(options) if equivalent(text, option)]
    if hits:
        return hits[0] if len({compact(options[i]) for i in hits}) == 1 else None
    if index < len(choices):  # the letter, unless the remark says another choice
        said = [i for i, option in enumerate(options) if equivalent(named[2], option)]
        return index if index in said or not said else None
    return int(text) if gold and regex.fullmatch(r"\d{1,2}", text) and int(text) < len(choices) else None


def compact(text: str) -> str:
    """Without case and white space, but "1 4" stays apart."""
    return regex.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.casefold()).removeprefix("+")


def split_label(text: str) -> tuple[str, str]:
    """("x", "5") of "x = 5"; ("", text) without a label"""
    match = regex.fullmatch(LABEL, regex.sub(r"^([^=]*\d[^=]*)=\s*(\p{L})$", r"\2=\1", text))  # 5 = x
    if not match or regex.search(r"\b(?:no|not|never|none)\b", match[1].casefold()):
        return "", text
    return compact(match[1]).removeprefix("the"), match[2]


def word_stems(text: str) -> list[str]:
    words = regex.findall(r"[\p{L}\p{N}]+", regex.sub(r"(?<=\b\p{L})\.", "", text.casefold()))
    words = [regex.sub(r"(?<=..[^s])s$", "", word) for word in words if word not in ("a", "an", "the")]
    return [str(NUMBER_WORDS.get(word, word)) for word in words]


def equivalent(answer: str, gold: str, depth: int = 0) -> bool:
    """Whether two normalized texts say the same. The form of the gold decides what they are compared as."""
    if depth > 4 or not regex.search(r"[\p{L}\p{N}∞π]", answer) or gold.casefold() == "nan":
        return False
    if compact(answer) == compact(gold):
        return True
    if regex.fullmatch(r"\(?[A-Za-z]\)?", gold):
        named = regex.fullmatch(LETTER, answer)
        return bool(named) and named[1].upper() == gold.strip("()").upper()
    if gold.casefold() in YES | NO:
        said = regex.fullmatch(SAID, answer)
        return bool(said) and (said[1].casefold() in YES) == (gold.casefold() in YES)
    (answer_label, answer_body), (gold_label, gold_body) = split_label(answer), split_label(gold)
    ours, theirs = sequence(answer) or sequence(answer_body), sequence(gold)
    if theirs or ours and ours[0] and interval(gold):
        ours, theirs = ours or interval(answer), theirs or interval(gold)
        return bool(ours) and same_sequence(ours, theirs, depth)
    if answer_label or gold_label:
        shorter, longer = sorted((answer_label, gold_label), key=len)
        if not shorter or shorter == longer or shorter == longer[:1]:  # V and Volume
            if equivalent(answer_body, gold_body, depth + 1):
                return True
    if time := regex.fullmatch(TIME, gold):
        said = regex.fullmatch(TIME, answer)
        halves = [found[2].casefold() for found in (said, time) if found and found[2]]
        return bool(said) and said[1] == time[1] and len(set(halves)) < 2
    if regex.fullmatch(r"[^:]*\d\s*(?::|\bto\b)\s*\d[^:]*", gold):  # a ratio
        answer, gold = [regex.sub(r"\s*(?::|\bto\b)\s*", "/", text) for text in (answer, gold)]
    try:
        expected = quantity(gold)
    except NotMath:
        expected = None
    try:
        if expected:
            return same_quantity(quantity(answer), expected)
        if regex.search(MATH_SIGN, answer + " " + gold):
            return relations(answer) == relations(gold)
    except NotMath:
        return False
    return word_stems(answer) == word_stems(gold) != []


def grade(answer: str, gold: str, choices: list[str] | None = None) -> bool:
    """Whether `answer` says the same as `gold` [14]; beyond 400 characters it must be the gold to the letter.

    With `choices` both are options, by letter or by text. Otherwise the gold's form decides: an option
    letter; yes or no; a tuple, interval, set or list; a number (finer than the gold, rounded to it; its unit
    missing or converted; 25% as 0.25 and 25; no step left to compute); a ratio; an equation, inequality or
    formula; a short text without articles and plurals. Never raises.
    """
    if max(len(answer), len(gold)) > MAX_CHARS or not answer.strip():
        return answer.strip() == gold.strip() != ""
    if not choices:
        return equivalent(normalize(answer), normalize(gold))
    chosen, right = option_index(answer, choices), option_index(gold, choices, gold=True)
    if chosen is None or right is None:
        return False
    said, true = (compact(normalize(choices[index])) for index in (chosen, right))
    return said == true  # two options of one text are one answer


# ------------------------------------------------------------------------------------------------------------
# CLIP: does the description fit the picture?

CLIP_BATCH = 32  # pictures or texts that CLIP encodes at once
CHARS_PER_TOKEN = 16  # at most; real sentences have 4 or 5, and an endless word takes the tokenizer minutes


def load_open_clip(name: str, device, dtype: torch.dtype):
    """(model, preprocessing of a picture, tokenizer) of a CLIP that open_clip reads; see ClipScorer."""
    import open_clip

    name, _, tag = (name, "", "") if ":" in name else name.partition("/")
    if "trust_remote_code" in str(open_clip.get_model_config(name)):
        raise ValueError("its open_clip_config.json asks for trust_remote_code, which is refused")
    precision = {torch.float32: "fp32", torch.bfloat16: "pure_bf16"}[dtype]
    settings = dict(require_pretrained=True, image_resize_mode="squash", device=device, precision=precision)
    model, _, preprocess = open_clip.create_model_and_transforms(name, tag or None, **settings)
    return model, preprocess, open_clip.get_tokenizer(name)


def load_fg_clip(folder: str, device, dtype: torch.dtype):
    """The same of an FG-CLIP v1 folder, the paper's model; none of the code that comes with it runs.

    In its mode for long texts it is a CLIP of 248 text positions, the first 20 of them from OpenAI's CLIP,
    with its own text projection: three tensors of a CLIPModel have other names.
    """
    import open_clip
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel

    weights = {}
    for file in glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
        weights |= load_file(file)
    positions, projection = "text_model.embeddings.position_embedding", "text_filip_projection.weight"
    names = [f"{positions}_ori.weight", f"{positions}_res.weight", projection]
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"no FG-CLIP v1: its safetensors lack {missing[0]}")
    short, long, weights["text_projection.weight"] = (weights.pop(name) for name in names)
    weights[f"{positions}.weight"] = torch.cat([short[:20], long[20:]])
    config = CLIPConfig.from_json_file(os.path.join(folder, "config.json"))
    config.text_config.max_position_embeddings = len(long)
    model = CLIPModel(config)
    unused = regex.compile("logit_scale_(finegraind|hardneg)|.*position_ids")
    model.load_state_dict({name: tensor for name, tensor in weights.items() if not unused.fullmatch(name)})
    model.encode_image = lambda pixels: model.get_image_features(pixels).pooler_output  # open_clip's name
    size = config.vision_config.image_size
    preprocess = open_clip.image_transform(size, is_train=False, resize_mode="squash")
    return model.to(device, dtype), preprocess, open_clip.SimpleTokenizer(context_length=len(long))


class ClipScorer:
    """Cosine of image and text embeddings (the paper uses FG-CLIP), in bf16 on a GPU, else in float32.

    name: a model of open_clip "ViT-B-32/laion2b_s34b_b79k", a folder "local-dir:/path" with
    open_clip_config.json and weights, "hf-hub:org/name", or "fg-clip:/path" with an FG-CLIP v1 checkpoint.
    lo, hi: cosines that earn 0 and 1. Raises ValueError with the name and the library's message if it cannot
    be loaded: the weights must be there, plain tensors and finite; no pickle and no code of the folder runs.
    """

    def __init__(self, name: str, device="cpu", lo: float = 0.0, hi: float = 0.4):
        self.device, self.lo, self.hi = device, lo, hi
        self.dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.cut_texts = 0  # sentences cut off because they are longer than the text tower's context
        self.is_fg_clip = name.startswith("fg-clip:")
        load, path = load_fg_clip if self.is_fg_clip else load_open_clip, name.removeprefix("fg-clip:")
        try:
            self.model, self.preprocess, self.tokenizer = load(path, device, self.dtype)
            self.model.eval().requires_grad_(False)
            wrapped = getattr(self.tokenizer, "tokenizer", None)  # Hugging Face's, in open_clip's wrapper
            self.split = wrapped.encode if wrapped else self.tokenizer.encode
            self.marks = len(self.split(""))  # that `split` adds to any text; open_clip's own adds them later
            self.max_tokens = self.tokenizer.context_length - (self.marks if wrapped else 2)
            if not math.isfinite(self.cosines([[Image.new("RGB", (64, 64))]], ["a picture"])[0]):
                raise ValueError("its embeddings are not finite: its weights are broken")
        except Exception as error:  # libraries raise whatever goes wrong in a folder they do not expect
            raise ClipError(f"--clip_model {name}: {type(error).__name__}: {error}") from error

    def windows(self, text: str) -> list[str]:
        """Whole sentences packed greedily into texts that fit the text tower's context. [4]"""
        packed, used, max_chars = [], 0, CHARS_PER_TOKEN * self.max_tokens
        for sentence in filter(None, regex.split(r"(?<=[.!?;])\s+|\n+", text)):
            length = len(self.split(sentence[:max_chars])) - self.marks
            self.cut_texts += length > self.max_tokens or len(sentence) > max_chars
            if packed and used + length <= self.max_tokens:
                packed[-1] += " " + sentence
                used += length
            else:
                packed.append(sentence[:max_chars])
                used = length
        return packed

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Embeddings (B, D). CLIP's causal text tower is read at the end mark, the highest id, and never sees
        the padding behind it: without that it is twice as fast. Other towers (SigLIP's) get all of it."""
        model, tokens = self.model, self.tokenizer(texts).to(self.device)  # (B, context)
        ends = tokens.argmax(-1)
        length = int(ends.max()) + 1
        if self.is_fg_clip:
            return model.get_text_features(tokens[:, :length]).pooler_output
        if getattr(model, "text_pool_type", "") != "argmax":
            return model.encode_text(tokens)
        states = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
        states = model.transformer(states, attn_mask=model.attn_mask[:length, :length])  # (B, T, width)
        return model.ln_final(states)[torch.arange(len(tokens)), ends] @ model.text_projection

    def encode_images(self, images: list) -> torch.Tensor:
        """Embeddings (B, D)."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device, self.dtype)
        return self.model.encode_image(pixels)

    @torch.inference_mode()
    def cosines(self, image_lists: list[list], texts: list[str]) -> list[float]:
        """Cosine of texts[i] to the pictures (PIL) image_lists[i], the mean over these; 0 for an empty text.

        Each picture object is encoded once however many texts it has, each window once however often it
        comes. [3]
        """

        def embeddings(keys, items: list, encode) -> dict:
            batches = [items[start : start + CLIP_BATCH] for start in range(0, len(items), CLIP_BATCH)]
            rows = [row for batch in batches for row in F.normalize(encode(batch).float().cpu(), dim=-1)]
            return dict(zip(keys, rows))

        windows = [self.windows(text) for text in texts]
        distinct = sorted({window for own in windows for window in own}, key=len)  # batches of like length
        text_rows = embeddings(distinct, distinct, self.encode_texts)
        pictures = {id(image): image for images, own in zip(image_lists, windows) if own for image in images}
        image_rows = embeddings(pictures, list(pictures.values()), self.encode_images)
        cosines = [0.0] * len(texts)
        for i, (images, own) in enumerate(zip(image_lists, windows)):
            if own:
                text = torch.stack([text_rows[window] for window in own]).mean(0)  # (D,)
                seen = torch.stack([image_rows[id(image)] for image in images])  # (pictures, D)
                cosines[i] = float(F.cosine_similarity(seen, text, dim=-1).mean())
        return cosines

    def scaled(self, cosine: float) -> float:
        """0 at lo, 1 at hi, clamped. The paper: lo = 0, hi = 0.4, so min(cosine / 0.4, 1)."""
        return min(max((cosine - self.lo) / (self.hi - self.lo), 0.0), 1.0)

    def rewards(self, image_lists: list[list], texts: list[str]) -> list[float]:
        """The CLIP reward of each text, 0 to 1; arguments: see cosines."""
        return [self.scaled(cosine) for cosine in self.cosines(image_lists, texts)]


# ------------------------------------------------------------------------------------------------------------
# All parts of a batch of responses, and their sum


def score_parts(rows, images: list[list], responses: list[str], num_tokens: list, clip_scorer) -> list[dict]:
    """Every part of the reward for each response, 0 to 1; "cosine", CLIP's own figure, is only logged.

    rows: the data.Row of each response; images: its pictures (PIL); num_tokens: the length of its completion;
    clip_scorer: a ClipScorer, or None. A part that does not apply (no keywords, picture or CLIP) is left out,
    never scored 0.
    """
    parsed, scores = [parse_response(text) for text in responses], []
    for row, response, tokens in zip(rows, parsed, num_tokens):
        parts = {
            "accuracy": float(bool(response.answer) and grade(response.answer, row.answer, row.choices)),
            "format": float(response.well_formed),
            "length": LENGTH_LIMIT / max(tokens, LENGTH_LIMIT),
        }
        if row.key_words:
            parts["keyword"] = keyword_reward(response.description, row.key_words)
        scores.append(parts)
    seen = [i for i, pictures in enumerate(images) if pictures]
    if clip_scorer and seen:
        cosines = clip_scorer.cosines([images[i] for i in seen], [parsed[i].description for i in seen])
        for i, cosine in zip(seen, cosines):
            scores[i] |= {"clip": clip_scorer.scaled(cosine), "cosine": cosine}
    return scores


def total_reward(parts: dict, weights: dict, where: str) -> float:
    """The weighted sum. Raises ValueError with `where`, the row, if a weighted part is missing or not finite:
    that is never a 0. [2]"""
    for name in weights:
        if not math.isfinite(parts.get(name, math.nan)):
            raise ValueError(f"{where}: the reward {name!r} is missing or not a finite number in {parts}")
    return sum(weight * parts[name] for name, weight in weights.items())


# ------------------------------------------------------------------------------------------------------------
# Evaluation: what a response answers, whether that is right, and the scores of a file. No model judges.

SHORT_ANSWER = 60  # characters up to which a response without section and box is an answer as a whole


def extract_answer(text: str) -> str:
    """The answer section; else the last \\boxed{}; else the whole response if it is short; else "".

    For evaluation of any model. The accuracy reward takes the answer section only. [5]
    """
    if answer := parse_response(text).answer:
        return answer
    if boxes := regex.findall(r"\\boxed(\{(?:[^{}]++|(?1))*+\})", text):
        return boxes[-1][1:-1].strip()
    return text.strip() if len(text.strip()) <= SHORT_ANSWER else ""


def is_right(answer: str, row) -> bool:
    """`grade`; in a ChartQA file (row.relaxed) also a number within 5 % of the gold, its relaxed accuracy."""
    if grade(answer, row.answer, row.choices):
        return True
    if not row.relaxed:
        return False
    try:
        said, gold = (quantity(split_label(normalize(text[:MAX_CHARS]))[1]) for text in (answer, row.answer))
        return same_quantity(said, gold, tolerance=0.05)
    except NotMath:
        return False


def wilson(p: float, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share p seen in n trials (Wilson 1927)."""
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(max(0.0, middle + side * spread) / (1 + z * z / n), 4) for side in (-1, 1)]


def score_predictions(rows: list, records: list[dict]) -> dict:
    """Write "extracted" and "verdicts" of each response into the records; return the scores of the file.

    records: {"responses": n texts, "parts": n dicts, "tokens": n lengths, "truncated": n bools} of rows[i].
    The 95 % interval counts questions, not responses: those to one question are not independent.
    """
    for row, record in zip(rows, records):
        record["extracted"] = [extract_answer(text) for text in record["responses"]]
        record["verdicts"] = [is_right(answer, row) for answer in record["extracted"]]
    mean = lambda values: round(sum(values) / len(values), 4) if values else None
    of_all = lambda name: [value for record in records for value in record[name]]
    rights, each = [sum(r["verdicts"]) / len(r["verdicts"]) for r in records], len(records[0]["responses"])
    scores = {"n": len(rows), "responses_each": each, "accuracy": mean(rights)}
    scores["interval_95"] = wilson(sum(rights) / len(rights), len(rows))
    for name in ("keyword", "clip", "format"):
        scores[name] = mean([parts[name] for parts in of_all("parts") if name in parts])
    scores |= {name: mean(of_all(name)) for name in ("tokens", "truncated")}
    scores["extracted"] = mean([bool(answer) for answer in of_all("extracted")])
    if each > 1:
        scores[f"pass@{each}"] = mean([right > 0 for right in rights])
    scores["categories"] = {}
    for category in sorted({row.category for row in rows}):
        group = [right for row, right in zip(rows, rights) if row.category == category]
        scores["categories"][category] = {"n": len(group), "accuracy": mean(group)}
    return scores
COLUMNS = ("accuracy", "keyword", "clip", "format", "tokens", "truncated")


def evaluation_table(scores: dict[str, dict], title: str) -> str:
    """scores: {model: {"greedy": score_predictions, "sampled": ...}}. All models evaluated on one file."""
    width, lines = max(map(len, scores)) + 2, []
    in_columns = lambda model, mode, cells: f"{model:<{width}}{mode:<10}" + "".join(f"{c:>11}" for c in cells)
    header = in_columns("model", "decoding", COLUMNS) + "   95 % interval"
    for mode in ("greedy", "sampled"):
        for model, row in ((model, each[mode]) for model, each in scores.items() if mode in each):
            cells = ["-" if row[c] is None else f"{row[c]:.{1 if c == 'tokens' else 3}f}" for c in COLUMNS]
            passed = "".join(f"   {name} {row[name]:.3f}" for name in row if name.startswith("pass@"))
            interval = "   {:.3f}-{:.3f}".format(*row["interval_95"])
            lines.append(in_columns(model, mode, cells) + interval + passed)
    return "\n".join([header, *lines, f"{row['n']} {title}"])
