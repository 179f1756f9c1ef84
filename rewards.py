"""The rewards of "Perception Before Reasoning" (arXiv 2509.13031), and the scores of evaluation.

A reward is a dict of parts. `total_reward` adds them up with the stage's weights; a part without a weight is
only logged. So a reward of your own is a function, a line in `score_parts`, and a weight in STAGE_REWARDS.

[n] is the number of a departure from the authors' code, in pebr.py's header.
"""

from contextlib import suppress
from fractions import Fraction
import functools
import math
from operator import add, mul, sub, truediv
from pathlib import Path
import random
from typing import NamedTuple
import unicodedata
import warnings

from PIL import Image
import regex
import torch
from torch.func import functional_call
import torch.nn.functional as F

STAGE_REWARDS = {
    "perception": {"clip": 0.4, "keyword": 0.4, "format": 0.1, "length": 0.1},  # paper, stage 1
    "reasoning": {"accuracy": 0.9, "format": 0.1},  # paper, stage 2
    "mixed": {"clip": 0.2, "keyword": 0.2, "accuracy": 0.45, "format": 0.1, "length": 0.05},  # ablation
}
STAGE_REWARDS["perception_only"] = STAGE_REWARDS["dryrun"] = STAGE_REWARDS["perception"]
STAGE_REWARDS["reasoning_only"] = STAGE_REWARDS["reasoning"]
LENGTH_LIMIT = 512  # tokens; a longer response earns LENGTH_LIMIT / length (paper, stage 1)


class ClipError(ValueError):
    """A CLIP model that cannot be loaded, with its name and the library's message."""


# ------------------------------------------------------------------------------------------------------------
# Sections of a response, and keywords in its description

HEADING = regex.compile(
    r"(?i)###\s*(?:(?P<description>Image\s+Description)|(?P<rationales>Rationales)|Step\s+0*(?P<step>\d+)"
    r"|(?P<think>Let['’]s\s+think\s+step\s+by\s+step)|(?P<answer>The\s+final\s+answer\s+is))[ \t]*[:：.]?"
)


class Response(NamedTuple):
    description: str  # "" if it is missing, like the answer
    answer: str
    well_formed: bool  # whether the format holds


def parse_response(text: str) -> Response:
    """Read the sections of the paper's answer format once, in order. [5]

    Well formed: every heading once and in order (steps 1, 2, ..); nothing before the first; no empty section
    but "think"; one line of answer. In any case the last answer section counts, with its first line, and the
    first description that another heading closes (an unclosed one is none, as in the authors' pattern)."""
    found = list(HEADING.finditer(text))
    names, ends = [match.lastgroup for match in found], [match.start() for match in found[1:]] + [len(text)]
    bodies = [text[match.end() : end].strip() for match, end in zip(found, ends)]
    descriptions = [body for name, body in zip(names[:-1], bodies) if name == "description"]
    answers = [body for name, body in zip(names, bodies) if name == "answer"]
    steps = [str(number) for number in range(1, len(found) - 3)] or ["1"]
    well_formed = (
        [match["step"] or match.lastgroup for match in found]
        == ["description", "rationales", "think", *steps, "answer"]
        and not text[: found[0].start()].strip()
        and all(body for name, body in zip(names, bodies) if name != "think")
        and "\n" not in answers[-1]
    )
    answer = answers[-1].split("\n")[0].strip() if answers else ""
    return Response(descriptions[0] if descriptions else "", answer, well_formed)


@functools.lru_cache(maxsize=4096)
def key_tokens(text: str) -> list[str]:
    """Words, numbers and signs in one spelling: 1,000 and 3.0 as 1000 and 3; "two" to "twelve" as numbers
    ("one" is mostly a pronoun); 3cm as 3 cm; percent as %. Case is kept."""
    text, tokens = regex.sub(r"(?i)\bper\s?cent\b", "%", text), []
    for token in regex.findall(r"(?V1)\p{Han}|\d++(?:[.,]\d++)*+[\w--\p{Han}]*|[\w--\p{Han}]+|\S", text):
        number, rest = regex.fullmatch(r"((?:\d[\d.,]*)?)(.*)", token).groups()
        number = regex.sub(r",(?=\d{3}(?!\d))|\.0+$", "", number)
        tokens += [number, rest] if number and rest in UNITS else [number + rest]
    numbers = [NUMBER_WORDS.get(token.casefold(), 0) for token in tokens]
    return [str(number) if 2 <= number <= 12 else token for number, token in zip(numbers, tokens)]


def word_forms(word: str) -> set[str]:
    """A word without case, and what may be its singular: "cherries" may be cherry, "buses" bus or buse."""
    word = word.casefold()
    is_plural = len(word) > 3 and regex.search(r"[^s]s$", word)
    return {word, word[:-1], word.removesuffix("es"), regex.sub("ies$", "y", word)} if is_plural else {word}


def keyword_reward(description: str, key_words: list[str]) -> float:
    """Share of the reference keywords, 0 to 1, that the image description names (paper, stage 1), as whole
    words, in any case, singular or plural: "3" is met by 3 and three, not by 13 or 3.5. A keyword of one
    letter (point A of a figure) is met in its own case only. [1]"""
    said = key_tokens(description)
    folded, forms = [token.casefold() for token in said], [word_forms(token) for token in said]

    def is_named(keyword: str) -> bool:
        *first, last = key_tokens(keyword)
        if not first and len(last) == 1:
            return last in said
        n, first, last = len(first), [token.casefold() for token in first], word_forms(last)
        return any(forms[i] & last and folded[i - n : i] == first for i in range(n, len(said)))

    return sum(map(is_named, key_words)) / len(key_words)


# ------------------------------------------------------------------------------------------------------------
# Accuracy: does an answer say what the gold answer says?
#
# An answer is untrusted: it never runs as code, `compute` knows few operations on bounded numbers, and no
# pattern takes exponential time.

MAX_CHARS, MAX_TOKENS, MAX_BITS, MAX_VALUE = 400, 120, 4000, 10**200
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
    (r",\\!\s*|(?<=\d)\\,(?=\d{3})|\{,\}", ","), (r"\\[!()\[\]]|`|\{\}", ""), (r"\\[,;: ]|~|\\\\", " "),
    (r"\\(?:boxed|fbox|mbox|text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|operatorname|"
     r"overline(?=\s*\{\s*\p{L}))\s*(\{((?:[^{}]++|(?1))*+)\})", r" \2 "),
    (r"\\([%#&{}])", r"\1"), (r"<=", "≤"), (r">=", "≥"), (r"!=", "≠"), (r"\binf(?:inity)?\b", "∞"),
    (r"(?<!\p{L})pi(?!\p{L})", "π"), (r"(?<!\p{L})sqrt", "√"), (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),
    (r"\^\s*(?:[°o](?!\w)|\{\s*[°o]\s*\})|\{?\bdeg(?:rees?)?\b\}?|度|掳|º", "°"),
    (r"(?<![\w)*])(\*{1,2}|__)(?=\S)([^*]+)(?<=\S)\1(?![\w(*])", r"\2"), (r"</?(?:\p{L}{2,9}|[bi])>", ""),
    # 5 (as 2 + 3 = 5)
    (r"(\d[^()]*?)\s*\((?=[^()]*\p{L}{3})(?=[^()]*\s)(?![^()]*\b(?:or|not)\b)[^()]*\)$", r"\1"),
    (r"^\s+|\s+$|(?<=.)[\s.,;:]+$|^#+\s+|^=\s*(?=\S)", ""), (r"^([\"'])(.*)\1$", r"\2"),
    (r"^(?:approximately|approx\.?|about|around|roughly|≈)(?=\W*\d)", ""),
    (r"^(?:(?:so|thus|hence|therefore)\b,?|(?:(?:the\s+)?(?:(?:final|correct|right)\s+)*"
     r"(?:answer|option|choice)\b(?:\s+is\b)?|答案|选项?)\s*[:为是]*)\s*(?=\S)", ""),
]
INFIX = [  # LaTeX from the inside out, but first of all mixed numbers, 1 1/2, and 1.2 * 10^3
    (r"(?<![\d.^/_}])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"(\1@(\2/\3))"), (r"\*\*", "^"),
    (r"(?<![\d.^/_}])(\d+)\s*\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", r"(\1@(\2\3/\4\5))"),
    (r"(?<![\w.^])(\d+\.?\d*|\.\d+)\s*\*\s*10\s*\^\s*\(?\s*([-+]?\d{1,3})\s*\)?(?![\w.^(])", r"\1e\2"),
    (r"√\s*\[(\d)\]\s*\{([^{}]*)\}", r" ((\2)^(1/\1)) "), (r"√\s*\(", " root("),
    (r"√\s*(?:\{([^{}]*)\}|(\d+(?:\.\d+)?|[a-zπ]))", r" root(\1\2) "), (r"\|([^|]*)\|", r" abs(\1) "),
    (r"\\frac\s*(?:\{([^{}]*)\}|(\d|π))\s*(?:\{([^{}]*)\}|(\d|π|[a-z]))", r" ((\1\2)/(\3\4)) "),
    (r"\\?(sin|cos|tan|ln)\s*(\d*\s*(?:\\[a-z]+|[a-zΑ-ω])|\d+)(?!\w)", r" \1(\2) "),
    (r"([\^_])\s*\{([^{}]*)\}", r"\1(\2)"),
]
# fmt: on
THOUSANDS = r"(?<![\d.,]|\d |[(\[{][^)\]}]*)[1-9]\d{0,2}([, ])\d{3}(?:\1\d{3})*(?!\1?\d)"  # (1,234): two


def rewrite(text: str, rules: list[tuple[str, str]], rounds: int = 30) -> str:
    """Apply the rules again and again until the text stays as it is."""
    before = text
    for pattern, new in rules:
        text = regex.sub(pattern, new, text, flags=regex.IGNORECASE | regex.DOTALL)
    return text if text == before or rounds == 1 else rewrite(text, rules, rounds - 1)


@functools.lru_cache(maxsize=4096)
def normalize(text: str) -> str:
    """One spelling for each sign; without markdown, LaTeX wrappers, a lead-in and final punctuation."""
    text = regex.sub(r"\\{2,}(?=\p{L}{2}|[()\[\]{}!,;:%$])", r"\\", text)  # escaped twice
    text = regex.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", r"^{\g<0>}", text)
    text = unicodedata.normalize("NFKC", regex.sub(r"(?<=\d)(?=\p{No})", " ", text))  # 1½ is "1 1/2"
    text = regex.sub(r"(\s)\s+", r"\1", text.translate(LIKE_SIGNS)).replace("\\$", "¤")
    if text.count("$") % 2:  # money, not a pair of LaTeX marks
        text = regex.sub(r"\$(?=\s*[\d.])", "¤", text, count=1)
    text = regex.sub(r"\\([A-Za-z]+)", lambda m: LATEX_SIGNS.get(m[1], m[0]), text.replace("$", ""))
    return regex.sub(THOUSANDS, lambda number: number[0].replace(number[1], ""), rewrite(text, UNWRAP))


FUNCTIONS = dict(root=math.sqrt, abs=abs, sin=math.sin, cos=math.cos, tan=math.tan, ln=math.log)
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv, "^": pow, "@": add}  # 1@(1/2): a mixed number
LEVELS = {"+": 1, "-": 1, "*": 2, "/": 2, "@": 2, "^": 4}  # the higher, the tighter; 3: a sign in front
PI = {"π": math.pi}
NOT_MATH = (ArithmeticError, LookupError, TypeError, ValueError)  # no expression, or no bearable value
TOKEN = regex.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?)|(?P<open>\()|(?P<close>\))"
    r"|\\?(?P<function>root|abs|sin|cos|tan|ln)(?=\s*\()|(?P<sign>[-+*/^@])"
    r"|(?P<name>\\?[A-Za-zΑ-ω](?:_(?:\w|\(\w{1,9}\)))?|\\[A-Za-z]+))"
)


@functools.lru_cache(maxsize=64)
def tokenize(text: str) -> list[tuple]:
    """(kind, token) of each token of an expression, LaTeX or not; numbers are Fractions. Raises NOT_MATH."""
    if len(text) > MAX_CHARS or regex.search(r"(?<![\\\p{L}])(?!sin|cos|tan)\p{L}{3,}", text):
        raise ValueError("words")
    text, tokens, before = rewrite(text, INFIX).translate(str.maketrans("{[]}", "(())")), [], ""
    if TOKEN.sub("", text).strip() or len(TOKEN.findall(text)) > MAX_TOKENS:
        raise ValueError("an unknown sign, or too long")
    for match in TOKEN.finditer(text):
        kind = match.lastgroup
        if kind == "number" and before in ("number", "name"):
            raise ValueError("5 6, or x 2")
        if before in ("number", "name", "close") and kind not in ("sign", "close"):
            tokens.append(("sign", "*"))  # 2x is 2 * x
        tokens.append((kind, Fraction(match[kind]) if kind == "number" else match[kind]))
        before = kind
    return tokens


def compute(text: str, names: dict = PI) -> tuple:
    """(value: Fraction or float, unfinished) of an expression; `names`: their values. Raises NOT_MATH.
    Unfinished: a step between two rational numbers is left to compute, as in 6*7, 3+4 and 84/2; fractions,
    powers and multiples of roots are finished."""
    tokens, unfinished = tokenize(text)[::-1], False

    def value(level: int):
        """Of the next operand with all operations behind it that bind tighter than `level`."""
        nonlocal unfinished
        kind, token = tokens.pop()
        if kind in ("number", "name"):
            result = token if kind == "number" else names[token]
        elif kind == "function":
            result = FUNCTIONS[token](value(4))
        elif kind == "open":
            result = value(0)
            tokens.pop()  # nothing but its closing bracket can follow
        else:
            result = value(3) * {"+": 1, "-": -1}[token]
        while tokens and LEVELS.get(tokens[-1][1], 0) > level:
            sign = tokens.pop()[1]
            right = value(LEVELS[sign] - (sign == "^"))  # 2^3^2 is 2^(3^2)
            if sign in "+-*/" and isinstance(result, Fraction) and isinstance(right, Fraction):
                unfinished |= sign != "/" or (result / right).denominator == 1
            if sign == "^" and isinstance(result, Fraction):
                bits = (result.numerator * result.denominator).bit_length()
                if abs(right) * bits > MAX_BITS:
                    raise ValueError("too large")
            result = OPERATIONS[sign](result, right)
        if isinstance(result, complex) or not abs(result) < MAX_VALUE:  # nan included
            raise ValueError("no real number, or too large")
        return result

    result = value(0)
    if tokens:
        raise ValueError("more than one expression")
    return result, unfinished


NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty
    ninety""".split()
NUMBER_WORDS = dict(zip(NUMBER_WORDS, [*range(20), *range(20, 100, 10)]))
NUMBER_WORD = rf"(?i)^(?:(?:twen|thir|for|fif|six|seven|eigh|nine)ty[- ])?(?:{'|'.join(NUMBER_WORDS)})\b"
MAGNITUDES = dict(hundred="e2", thousand="e3", million="e6", billion="e9", trillion="e12")
AMOUNTS = [(rf"(?<=\d)\s*{word}\b", exponent) for word, exponent in MAGNITUDES.items()]
AMOUNTS += [(r"^([-+]?)\s*([¤€£¥])\s*(-?[\d.,e]+)", r"\1\3\2"), (r"\b(?:per\s?cent|pct)$", "%")]  # $5 as 5$
AMOUNTS += [(r"^([-+]?\d+),(\d\d?|(?<=\b0,)\d+)(?![\d,])", r"\1.\2")]  # 3,5 as 3.5
UNITS = """m 0.001 mm millimeter millimetre 毫米; m 0.01 cm centimeter centimetre 厘米; m 1 m meter metre 米;
    m 1000 km kilometer kilometre 千米 公里; m 0.0254 in inch; m 0.3048 ft foot feet; m 0.9144 yd yard;
    m 1609.344 mi mile; g 0.001 mg milligram; g 1 g gram 克; g 1000 kg kilogram 千克 公斤; g 453.59237 lb pound;
    g 28.349523125 oz ounce; m^3 0.001 l liter litre 升; m^3 0.000001 ml milliliter millilitre 毫升;
    s 1 s sec second 秒; s 0.001 ms; s 60 min minute 分钟; s 3600 h hr hour 小时; day 1 day 天; year 1 year yr 年;
    % 0.01 %; ¤ 1 ¤ dollar usd 美元; € 1 € euro eur; ¥ 1 ¥ yuan rmb 元; £ 1 £ gbp"""
UNITS = [unit.split() for unit in UNITS.split(";")]
UNITS = {name: (basic, Fraction(multiple)) for basic, multiple, *names in UNITS for name in names}
UNITS = {name + end: unit for name, unit in UNITS.items() for end in ("s", "es")} | UNITS
NO_UNIT = """or and not to of but if is are was than the there that this then so with by for at on out left
    right more less maybe sin cos tan log ln""".split()
WITH_UNIT = r"(.*[\d)}π])(\s*)[{(]?((?!π)[°%¤€£¥\p{L}][\p{L} ./*°]{0,40})[})]?\s*(?:\^?\s*\{?([23])\}?)?"


class Quantity(NamedTuple):
    value: Fraction | float
    unfinished: bool  # see compute
    step: Fraction  # the weight of a decimal's last digit; 0: exact
    unit: str  # in basic units: that of km/h is m/s
    scale: Fraction  # how many basic units it is


def read_unit(text: str, apart: bool, exponent: str | None) -> tuple[str, Fraction] | None:
    """(basic unit, how many of it): "kilometers per hour" is ("m/s", 5/18). None for what may be a variable
    (2x) or a sentence. `apart`: a space stands between number and unit."""
    text = text.casefold()
    if not set(NO_UNIT).isdisjoint(regex.findall(r"\p{L}+", text)):
        return None
    names, scale = [], Fraction(1)  # a word for each side of "per": "years old" are years
    for i, part in enumerate(regex.split(r"/|\bper\b", text)):
        power_word, word = regex.match(r"[\s.*]*(square(?!s\b)|sq\b|cubic)?[\s.*]*([^\s.*]*)", part).groups()
        likely = word in UNITS or len(word) > 2 and apart or regex.match(r"[\p{Han}°]", word)
        if not likely or word in ("s", "h") and not apart:
            return None
        name, multiple = UNITS.get(word, (word.removesuffix("s"), Fraction(1)))
        n = {"square": 2, "sq": 2, "cubic": 3}.get(power_word, 1 if i else int(exponent or 1))
        scale *= multiple ** (-n if i else n)
        names.append(name.removeprefix("unit") + (f"^{n}" if n > 1 else ""))
    return "/".join(names), scale


def quantity(text: str) -> Quantity | None:
    """A number in any spelling, with its unit, as an exact value where it has one. None: no number."""
    number = lambda words: str(sum(NUMBER_WORDS[word] for word in regex.split("[- ]", words[0].casefold())))
    text = regex.sub(NUMBER_WORD, number, text)
    text, unit, scale = rewrite(text, AMOUNTS), "", Fraction(1)
    match = regex.fullmatch(WITH_UNIT, text)
    if measure := match and read_unit(match[3], bool(match[2]), match[4]):
        (unit, scale), text = measure, match[1]
    decimal = regex.fullmatch(r"[-+]?\s*\d*\.(\d+)(?:e(\d\d?))?", text)
    step = Fraction(10) ** (int(decimal[2] or 0) - len(decimal[1])) if decimal else Fraction(0)
    with suppress(*NOT_MATH):
        return Quantity(*compute(text), step, unit, scale)
    return None


def same_quantity(answer: Quantity | None, gold: Quantity, tolerance: float = 1e-12) -> bool:
    """Equal within a share `tolerance` of the gold, or as far as the coarser of the two is written. A unit
    may be missing, or another of its kind: 50 cm is 0.5 m. An unfinished answer is not the number."""
    if not answer or answer.unfinished and not gold.unfinished:
        return False
    units = {answer.unit, gold.unit}
    scales = [(answer.scale, gold.scale)] if len(units) == 1 or units == {"", "%"} else []
    scales += [(1, 1)] if "" in units else []  # 25% is 0.25, and 25
    for scale, gold_scale in scales:
        step, gold_step, expected = answer.step * scale, gold.step * gold_scale, gold.value * gold_scale
        precise = not gold_step and abs(answer.value) >= 100 * answer.step  # 0.333 for 1/3: three digits
        coarser = gold_step if step < gold_step else step * precise  # 47.58 for 47.6
        if abs(answer.value * scale - expected) <= max(tolerance * abs(expected), coarser / 2):
            return True
    return False


RELATION = regex.compile(r"\s*([=≤≥<>≠])\s*")
MIRRORED = {">": "<", "≥": "≤"}


def sequence(text: str) -> tuple[str, str, list[str]] | None:
    """(opening, closing bracket, items) of (a, b), [a, b), {a, b}, "a, b", "a and b", ±a; None: one item."""
    text = regex.sub(r"\s*,?\s*(?:\b(?:and|or)\b|[和或])\s*", ", ", text)
    if "±" in text:
        return "", "", [text.replace("±", "+"), text.replace("±", "-")]
    opening, closing, marks = "", "", "∪" if "∪" in text else ",;"
    if bracketed := regex.fullmatch(r"(?:\p{L}{1,9}\s*)?" + BALANCED, text):
        opening, *_, closing = bracketed["group"]
        text, marks = bracketed["group"][1:-1], ",;"
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
        found = [other for other in (left if any_order else left[:1]) if equivalent(other, item, depth + 1)]
        if not found:
            return False
        left.remove(found[0])
    return True


def relations(text: str) -> set[tuple[str, ...]]:
    """(sign, left - right at 8 random points, to 9 digits) of each part of a chain. Raises NOT_MATH.
    Left - right is scaled to 1 at the first point (or -1, in inequalities), so equal relations have equal
    values. A formula has no sign, is compared to 0 and keeps its values."""
    text = regex.sub(r"^\s*\p{L}\s*\(\s*\p{L}\s*\)\s*=", "y=", text)  # f(x) = ..
    sides, signs, parts = RELATION.split(text)[::2], RELATION.findall(text), set()
    for left, sign, right in zip(sides, signs or [""], sides[1:] or ["0"]):
        left, right, sign = (right, left, MIRRORED[sign]) if sign in MIRRORED else (left, right, sign)
        names, values = {token for kind, token in tokenize(left) + tokenize(right) if kind == "name"}, []
        for i in range(8):  # from the fifth point on, coordinates have either sign
            numbers = {name: random.Random(f"{name} {i}").randint(-997 * (i > 3), 997) for name in names}
            point = {name: Fraction(number, 101) for name, number in numbers.items()} | PI
            with suppress(*NOT_MATH):  # not defined there
                values.append(float(compute(left, point)[0] - compute(right, point)[0]))
        if len(values) < 3 or not all(values) or len(signs) > 3:
            raise ValueError("hardly defined, always true, or a long chain")
        scale = {"": 1, "=": values[0], "≠": values[0]}.get(sign, abs(values[0]))
        parts.add((sign, *(f"{value / scale:.9g}" for value in values)))
    return parts


YES, NO = {"yes", "true", "是", "是的", "对", "正确"}, {"no", "false", "否", "不是", "错", "错误"}
LETTER = (  # of "B", "(b)", "B. 24", and the rest, but not of "A or B"
    r"(?s)(?|\(([A-Za-z])\)|([A-Za-z])(?=$|\s*[.:)]|\s+[-–(]|(?<=[A-Z])\s+(?:is|because|since)\b))[\s.:)]*+"
    r"(?!\(?[A-Z]\)?$|.*(?:\bor\b|\band\b|[,/&])\W*[A-Z](?!\p{L}))(.*)"
)
LABEL = (
    r"(?s)(?!.*\b(?i:no|not|never|none)\b)((?:\\triangle|m?∠|△)?\s*(?:\p{Lu}{1,4}|\p{L}(?:_\w|_\{\w+\}|')?"
    r"(?:\(\w\))?|\p{L}{3,}[ \p{L}]{0,50})|\(\w,\s*\w\))\s*(?:[=:∈]|\bis\b|\bare\b|\bequals\b)\s*(\S.*)"
)
REMARK = r"\s*[,.;:(!-]|\s+(?:it|they|there|this|that|because|since)\b"
MATH_SIGN = r"[=^+*<>≤≥≠|/\\√π%°_]|[-(]\s*\d|\d\s*-"
RATIO = r"(?!(?:[01]?\d|2[0-3]):[0-5]\d(?!\d))[^:]*\d\s*(?::|\bto\b)\s*\d[^:]*"  # 3:30 is a time


def option_index(text: str, choices: list[str], gold: bool = False) -> int | None:
    """Index of the choice that a text names, by its letter ("B", "(b)", "B. 24") or by saying what it says;
    None: no choice. gold: a data file's answer may also be a 0-based index ("1") that is no choice's text."""
    if text.strip() in choices and len(text.strip()) > 1:
        return choices.index(text.strip())
    text, options = normalize(text), [normalize(choice) for choice in choices]
    alike = lambda text: [i for i, option in enumerate(options) if equivalent(text, option)]
    named = regex.fullmatch(LETTER, text)
    index = ord(named[1].upper()) - ord("A") if named else len(choices)
    if index < len(choices) and not named[2]:
        return index
    if hits := alike(text):
        return hits[0] if len({compact(options[i]) for i in hits}) == 1 else None
    if index < len(choices):  # the letter, unless the remark says another choice
        return index if index in (alike(named[2]) or [index]) else None
    return int(text) if gold and regex.fullmatch(r"\d{1,2}", text) and int(text) < len(choices) else None


def compact(text: str) -> str:
    """Without case and white space, but "1 4" stays apart."""
    return regex.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.casefold()).removeprefix("+")


def split_label(text: str) -> tuple[str, str]:
    """("x", "5") of "x = 5"; ("", text) without a label"""
    match = regex.fullmatch(LABEL, regex.sub(r"^([^=]*\d[^=]*)=\s*(\p{L})$", r"\2=\1", text))  # 5 = x
    return (compact(match[1]).removeprefix("the"), match[2]) if match else ("", text)


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
    if gold.casefold() in YES | NO:  # the same, then nothing or a remark that is not the other
        right, wrong = (YES, NO) if gold.casefold() in YES else (NO, YES)
        first = regex.split(REMARK, answer.casefold())[0]
        words = regex.findall(r"\b(?!(?:or|and)\b)\p{L}+", answer.casefold())
        return first in right and wrong.isdisjoint(words[1:2])
    (answer_label, answer_body), (gold_label, gold_body) = split_label(answer), split_label(gold)
    ours, theirs = sequence(answer) or sequence(answer_body), sequence(gold)
    if theirs or ours and ours[0] and interval(gold):
        ours, theirs = ours or interval(answer), theirs or interval(gold)
        return bool(ours) and same_sequence(ours, theirs, depth)
    shorter, longer = sorted((answer_label, gold_label), key=len)
    if longer and shorter in ("", longer, longer[:1]) and equivalent(answer_body, gold_body, depth + 1):
        return True  # V and Volume
    if regex.fullmatch(RATIO, gold):
        answer, gold = [regex.sub(r"\s*(?::|\bto\b)\s*", "/", text) for text in (answer, gold)]
    if expected := quantity(gold):
        return same_quantity(quantity(answer), expected)
    if regex.search(MATH_SIGN, answer + " " + gold):
        with suppress(*NOT_MATH):
            return relations(answer) == relations(gold)
        return False
    return word_stems(answer) == word_stems(gold) != []


def grade(answer: str, gold: str, choices: list[str] | None = None) -> bool:
    """Whether `answer` says the same as `gold` [14]; beyond 400 characters it must be the gold to the letter.

    With `choices` both are options, by letter or by text. Otherwise the gold's form decides: a letter; yes or
    no; a tuple, interval, set or list; a number, no step left to compute (finer than the gold, rounded to it;
    its unit missing or converted); a ratio; an equation, inequality, formula; a short text. Never raises."""
    if max(len(answer), len(gold)) > MAX_CHARS or not answer.strip():
        return answer.strip() == gold.strip() != ""
    if not choices:
        return equivalent(normalize(answer), normalize(gold))
    chosen = option_index(answer, choices), option_index(gold, choices, gold=True)
    return None not in chosen and len({compact(normalize(choices[i])) for i in chosen}) == 1


# ------------------------------------------------------------------------------------------------------------
# CLIP: does the description fit the picture?

CLIP_BATCH = 32  # pictures or texts that CLIP encodes at once
CHARS_PER_TOKEN = 16  # at most; real sentences have 4 or 5, and an endless word takes the tokenizer minutes


def load_open_clip(name: str):
    """(model, preprocessing of a picture, tokenizer) of a CLIP that open_clip reads; see ClipScorer."""
    import open_clip

    name, _, tag = (name, "", "") if ":" in name else name.partition("/")
    if "trust_remote_code" in str(open_clip.get_model_config(name)):
        raise ValueError("its open_clip_config.json asks for trust_remote_code, which is refused")
    settings = dict(require_pretrained=True, image_resize_mode="squash")
    model, _, preprocess = open_clip.create_model_and_transforms(name, tag or None, **settings)
    return model, preprocess, open_clip.get_tokenizer(name)


def load_fg_clip(folder: str):
    """The same of an FG-CLIP v1 folder, the paper's model; none of the code that comes with it runs. In its
    mode for long texts it is a CLIP of 248 text positions, the first 20 of them from OpenAI's CLIP, with its
    own text projection: three tensors of a CLIPModel have other names."""
    import open_clip
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel

    weights, positions = {}, "text_model.embeddings.position_embedding"
    for file in Path(folder).glob("*.safetensors"):
        weights |= load_file(file)
    names = [f"{positions}_ori.weight", f"{positions}_res.weight", "text_filip_projection.weight"]
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"no FG-CLIP v1: its safetensors lack {missing[0]}")
    short, long, weights["text_projection.weight"] = map(weights.pop, names)
    weights[f"{positions}.weight"] = torch.cat([short[:20], long[20:]])
    config = CLIPConfig.from_json_file(Path(folder, "config.json"))
    config.text_config.max_position_embeddings = len(long)
    model = CLIPModel(config)
    unused = regex.compile("logit_scale_(finegraind|hardneg)|.*position_ids")
    model.load_state_dict({name: tensor for name, tensor in weights.items() if not unused.fullmatch(name)})
    model.encode_image = lambda pixels: model.get_image_features(pixels).pooler_output  # open_clip's names
    used = lambda tokens: tokens[:, : int(tokens.argmax(-1).max()) + 1]  # up to the last end mark
    model.encode_text = lambda tokens: model.get_text_features(used(tokens)).pooler_output
    preprocess = open_clip.image_transform(config.vision_config.image_size, False, resize_mode="squash")
    return model, preprocess, open_clip.SimpleTokenizer(context_length=len(long))


class ClipScorer:
    """Cosine of image and text embeddings (the paper uses FG-CLIP), in bf16 on a GPU, else in float32.

    name: a model of open_clip "ViT-B-32/laion2b_s34b_b79k", a folder "local-dir:/path" with
    open_clip_config.json and weights, "hf-hub:org/name", or "fg-clip:/path" with an FG-CLIP v1 checkpoint.
    Weights must be there, plain tensors and finite: no pickle and no code of the folder runs; else ClipError.
    lo, hi: cosines that earn 0 and 1."""

    def __init__(self, name: str, device="cpu", lo: float = 0.0, hi: float = 0.4):
        self.device, self.lo, self.hi = device, lo, hi
        self.dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        load = load_fg_clip if name.startswith("fg-clip:") else load_open_clip
        try:
            model, self.preprocess, self.tokenizer = load(name.removeprefix("fg-clip:"))
            self.model = model.to(device, self.dtype).eval().requires_grad_(False)
            inner = getattr(self.tokenizer, "tokenizer", self.tokenizer)  # Hugging Face's, if it is one
            self.split = inner.encode
            self.marks = len(self.split(""))  # that `split` adds to any text; open_clip's own adds them later
            self.max_tokens = self.tokenizer.context_length - (2 if inner is self.tokenizer else self.marks)
            if not math.isfinite(self.cosines([[Image.new("RGB", (64, 64))]], ["a picture"])[0]):
                raise ValueError("its embeddings are not finite: its weights are broken")
        except Exception as error:  # libraries raise whatever goes wrong in a folder they do not expect
            raise ClipError(f"--clip_model {name}: {type(error).__name__}: {error}") from error

    def windows(self, text: str) -> list[str]:
        """Whole sentences packed greedily into texts that fit the text tower's context. [4]"""
        packed, used, max_chars = [], math.inf, CHARS_PER_TOKEN * self.max_tokens
        for sentence in filter(None, regex.split(r"(?<=[.!?;])\s+|\n+", text)):
            length = len(self.split(sentence[:max_chars])) - self.marks
            if length > self.max_tokens or len(sentence) > max_chars:
                warnings.warn("CLIP sees only the start of a sentence that is longer than its context")
            if used + length > self.max_tokens:
                packed.append([])
                used = 0
            packed[-1].append(sentence[:max_chars])
            used += length
        return [" ".join(sentences) for sentences in packed]

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Embeddings (B, D). CLIP's causal text tower is read at the end mark, the highest id, and never sees
        the padding behind it: without that it is twice as fast. Other towers (SigLIP's) get all of it."""
        model, tokens = self.model, self.tokenizer(texts).to(self.device)  # (B, context)
        if getattr(model, "text_pool_type", "") != "argmax":
            return model.encode_text(tokens)
        length = int(tokens.argmax(-1).max()) + 1
        mask = model.attn_mask[:length, :length]
        tower = {"positional_embedding": model.positional_embedding[:length], "attn_mask": mask}
        return functional_call(model, tower, (None, tokens[:, :length]))[1]

    @torch.inference_mode()
    def cosines(self, image_lists: list[list], texts: list[str]) -> list[float]:
        """Cosine of texts[i] to the pictures (PIL) image_lists[i], the mean over these; 0 for an empty text.
        Each picture object is encoded once however many texts it has, and each window once. [3]"""

        def embeddings(items: list, encode) -> list[torch.Tensor]:
            batches = [items[start : start + CLIP_BATCH] for start in range(0, len(items), CLIP_BATCH)]
            return [row for batch in batches for row in F.normalize(encode(batch).float().cpu(), dim=-1)]

        windows = [self.windows(text) for text in texts]
        distinct = sorted(dict.fromkeys(w for own in windows for w in own), key=len)  # a set has no order
        said = dict(zip(distinct, embeddings(distinct, self.encode_texts)))
        pixels = lambda images: torch.stack([self.preprocess(image) for image in images])
        encode = lambda images: self.model.encode_image(pixels(images).to(self.device, self.dtype))
        pictures = {id(image): image for images, own in zip(image_lists, windows) if own for image in images}
        seen = dict(zip(pictures, embeddings(list(pictures.values()), encode)))

        def cosine(images: list, own: list[str]) -> float:
            text = torch.stack([said[window] for window in own]).mean(0)  # (D,)
            return float(F.cosine_similarity(torch.stack([seen[id(image)] for image in images]), text).mean())

        return [cosine(images, own) if own else 0.0 for images, own in zip(image_lists, windows)]

    def scaled(self, cosine: float) -> float:
        """0 at lo, 1 at hi, clamped. The paper: lo = 0, hi = 0.4, so min(cosine / 0.4, 1)."""
        return min(max((cosine - self.lo) / (self.hi - self.lo), 0.0), 1.0)


# ------------------------------------------------------------------------------------------------------------
# Rewards of a batch, and scores of evaluation. No model judges.


def score_parts(rollouts: list, clip_scorer) -> list[dict]:
    """Every part of each rollout's reward, 0 to 1; "cosine", CLIP's own figure, is only logged.
    A part that does not apply (no keywords, picture or CLIP) is left out, never scored 0."""
    parsed, scores = [parse_response(r.text) for r in rollouts], []
    for r, response in zip(rollouts, parsed):
        row, length = r.prompt.row, LENGTH_LIMIT / max(len(r.tokens), LENGTH_LIMIT)
        parts = {"format": float(response.well_formed), "length": length}
        parts["accuracy"] = float(grade(response.answer, row.answer, row.choices))
        if row.key_words:
            parts["keyword"] = keyword_reward(response.description, row.key_words)
        scores.append(parts)
    seen = [i for i, r in enumerate(rollouts) if r.prompt.images]
    if clip_scorer and seen:
        images = [rollouts[i].prompt.images for i in seen]
        for i, cosine in zip(seen, clip_scorer.cosines(images, [parsed[i].description for i in seen])):
            scores[i] |= {"clip": clip_scorer.scaled(cosine), "cosine": cosine}
    return scores


def total_reward(parts: dict, weights: dict, where: str) -> float:
    """The weighted sum. Raises ValueError with `where`, the row, if a weighted part is missing or not finite:
    that is never a 0. [2]"""
    for name in weights:
        if not math.isfinite(parts.get(name, math.nan)):
            raise ValueError(f"{where}: the reward {name!r} is missing or not a finite number in {parts}")
    return sum(weight * parts[name] for name, weight in weights.items())


def extract_answer(text: str) -> str:
    """For any model: the answer section; else the last \\boxed{}; else a whole short response; else ""."""
    boxes = regex.findall(r"\\boxed(\{(?:[^{}]++|(?1))*+\})", text)
    short = text.strip() if len(text.strip()) <= 60 else ""
    return parse_response(text).answer or (boxes[-1][1:-1].strip() if boxes else short)


def is_right(answer: str, row) -> bool:
    """`grade`; in a ChartQA file (row.relaxed) also a number within 5 % of the gold, its relaxed accuracy."""
    if grade(answer, row.answer, row.choices):
        return True
    said, gold = (quantity(split_label(normalize(text[:MAX_CHARS]))[1]) for text in (answer, row.answer))
    return bool(row.relaxed and gold and same_quantity(said, gold, tolerance=0.05))


def score_predictions(rows: list, records: list[dict]) -> dict:
    """Write "extracted" and "verdicts" of each response into the records; return the scores of the file.
    records: {"responses": n texts, "parts": n dicts, "tokens": n lengths, "truncated": n bools} of rows[i].
    The 95 % interval counts questions, not responses: those to one question are not independent."""
    for row, record in zip(rows, records):
        record["extracted"] = [extract_answer(text) for text in record["responses"]]
        record["verdicts"] = [is_right(answer, row) for answer in record["extracted"]]
    mean = lambda values: round(sum(values) / len(values), 4) if values else None
    rights, each = [sum(r["verdicts"]) / len(r["verdicts"]) for r in records], len(records[0]["responses"])
    n, p, z = len(rows), sum(rights) / len(rights), 1.96  # 95 % interval of a share p of n (Wilson 1927)
    scores, groups = {"n": n, "responses_each": each, "accuracy": mean(rights)}, {}  # groups: by category
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = max(0.0, middle - spread), middle + spread
    scores["interval_95"] = [round(end / (1 + z * z / n), 4) for end in ends]
    for name in ("keyword", "clip", "format"):
        scores[name] = mean([parts[name] for r in records for parts in r["parts"] if name in parts])
    scores |= {name: mean([value for r in records for value in r[name]]) for name in ("tokens", "truncated")}
    scores["extracted"] = mean([bool(answer) for r in records for answer in r["extracted"]])
    if each > 1:
        scores[f"pass@{each}"] = mean([right > 0 for right in rights])
    for row, right in zip(rows, rights):
        groups.setdefault(row.category, []).append(right)
    categories = {name: {"n": len(group), "accuracy": mean(group)} for name, group in sorted(groups.items())}
    return scores | {"categories": categories}


def evaluation_table(scores: dict[str, dict], title: str) -> str:
    """scores: {model: {"greedy": score_predictions, "sampled": ..}}, all models evaluated on one file."""
    columns = ("accuracy", "keyword", "clip", "format", "tokens", "truncated")
    start = f"{{:<{max(map(len, scores)) + 2}}}{{:<8}}"
    lines = [start.format("model", "") + "".join(f"{name:>11}" for name in columns) + "   95 % interval"]
    for mode in ("greedy", "sampled"):
        for model, row in [(model, modes[mode]) for model, modes in scores.items() if mode in modes]:
            cells = ["-" if row[c] is None else f"{row[c]:.{1 if c == 'tokens' else 3}f}" for c in columns]
            line = start.format(model, mode) + "".join(f"{cell:>11}" for cell in cells)
            line += "   {:.3f}-{:.3f}".format(*row["interval_95"])
            lines.append(line + "".join(f"   {name} {row[name]:.3f}" for name in row if "pass@" in name))
    return "\n".join([*lines, f"{row['n']} {title}"])
