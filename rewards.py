"""What is good: the rewards of "Perception Before Reasoning" (arXiv 2509.13031).

    parse_response     a response's sections, read once and in order
    format, length, keyword, CLIP, accuracy      one small function (or class) each
    STAGE_REWARDS      which parts a stage adds up, with the paper's weights

A reward is a dict of parts. The sum happens in one place, `total_reward`, with named weights; a part without a weight
is only logged. So a reward of your own is a function here, a line in `score_parts`, and a weight.

Departures from the authors' code are numbered in pebr.py's header; [n] below refers to that list.
"""

import ast
from dataclasses import dataclass
from fractions import Fraction
import functools
import math
import operator
import os
import random
import unicodedata

import regex
import torch
import torch.nn.functional as F

STAGE_REWARDS = {
    "perception": {"clip": 0.4, "keyword": 0.4, "format": 0.1, "length": 0.1},  # paper, stage 1
    "reasoning": {"accuracy": 0.9, "format": 0.1},  # paper, stage 2
}
LENGTH_LIMIT = 512  # tokens; longer responses are paid LENGTH_LIMIT / length
CLIP_BATCH = 256  # pictures or texts that CLIP encodes at once


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
    """Words, numbers and signs, in one spelling: any case, 1,000 and 3.0 as 1000 and 3, "two" to "twelve" as 2 to 12.

    "one" stays a word: in "the one on the left" it is no number. A single letter (a point in geometry) keeps its case.
    """
    tokens = regex.findall(r"\p{Han}|\d++(?:[.,]\d++)*+[\w--\p{Han}]*|[\w--\p{Han}]+|\S", text, regex.VERSION1)
    tokens = [token if len(token) == 1 else token.casefold() for token in tokens]
    tokens = [regex.sub(r",(?=\d{3}(?!\d))|\.0+$", "", token) if token[0].isdigit() else token for token in tokens]
    return [str(NUMBER_WORDS[token]) if 2 <= NUMBER_WORDS.get(token, 0) <= 12 else token for token in tokens]


def keyword_set(keywords: list[str]) -> frozenset[tuple[str, ...]]:
    """Keywords as token tuples, for `keyword_reward`'s vocabulary."""
    return frozenset(tuple(key_tokens(keyword)) for keyword in keywords)


@functools.lru_cache(maxsize=1)
def longest(vocabulary: frozenset[tuple]) -> int:
    return max(map(len, vocabulary), default=1)


def phrases(text: str, most: int) -> set[tuple[str, ...]]:
    """All runs of up to `most` tokens; the last word also without its plural ending."""
    tokens = key_tokens(text)
    runs = set()
    for end in range(1, len(tokens) + 1):
        last = tokens[end - 1]
        for start in range(max(0, end - most), end):
            for word in (last, last.removesuffix("s"), last.removesuffix("es")) if len(last) > 3 else (last,):
                runs.add((*tokens[start : end - 1], word))
    return runs


def keyword_reward(description: str, key_words: list[str], vocabulary: frozenset = frozenset()) -> float:
    """Share of the reference keywords that the image description names (paper, stage 1). [1]

    A keyword is met as a whole word or phrase, in any case, singular or plural; "3" by 3 and by three, not by 13 or 3.5.
    With a vocabulary (`keyword_set` of all rows' keywords; --keyword_precision) it is the F-score of that share and of
    precision: of the vocabulary's keywords that the description names, how many are in or part of a reference keyword.
    """
    wanted = [tuple(key_tokens(keyword)) for keyword in key_words]
    named = phrases(description, max(*map(len, wanted), longest(vocabulary)))
    right = sum(keyword in named for keyword in wanted)
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


def rules(*pairs: tuple[str, str]) -> list:
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
    (r"\\[!()\[\]]|`|\{\}", ""), (r"\\[,;: ]|~|\\\\", " "), (r"\\([%#&{}])", r"\1"), (r"\{,\}", ","),
    (r"\\(?:boxed|fbox|mbox|text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf)|operatorname|overline(?=\s*\{\s*\p{L}))\s*(\{((?:[^{}]++|(?1))*+)\})", r" \2 "),
    (r"<=", "≤"), (r">=", "≥"), (r"!=", "≠"), (r"\binf(?:inity)?\b", "∞"), (r"(?<!\p{L})pi(?!\p{L})", "π"), (r"(?<!\p{L})sqrt", "√"),
    (r"\^\s*(?:[°o](?!\w)|\{\s*[°o]\s*\})|\{?\bdeg(?:rees?)?\b\}?|度|掳|º", "°"),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),  # 1.2 x 10^3
    (r"(?<![\w)*])(\*{1,2}|__)(?=\S)([^*]+)(?<=\S)\1(?![\w(*])", r"\2"), (r"</?(?:\p{L}{2,9}|[bi])>", ""),  # *5*, **5**, <b>5</b>
    (r"(\d[^()]*?)\s*\((?=[^()]*\p{L}{3})(?=[^()]*\s)(?![^()]*\b(?:or|not)\b)[^()]*\)$", r"\1"),  # 5 (since 2 + 3 = 5)
    (r"^\s+|\s+$|(?<=.)[\s.,;:]+$|^[#>]+\s+|^=\s*(?=\S)", ""), (r"^([\"'])(.*)\1$", r"\2"),
    (r"^(?:so|thus|hence|therefore)\b,?\s+(?=\S)|^(?:approximately|approx\.?|about|around|roughly|≈)(?=\W*\d)", ""),
    (r"^(?:(?:the\s+)?(?:(?:final|correct|right)\s+)*(?:answer|option|choice)\b(?:\s+is\b)?|答案|选项?)\s*[:为是]*\s*(?=\S)", ""),
)
# fmt: on


@functools.lru_cache(maxsize=4096)
def unwrap(text: str) -> str:
    """One spelling for each sign; without markdown, LaTeX wrappers, a lead-in and final punctuation."""
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
INFIX = rules(  # LaTeX from the inside out; first of all mixed numbers, 1 1/2 and 1\frac{1}{2}
    (
        r"(?<![\d.^/_}])(\d+)(?:\s+(\d+)\s*/\s*(\d+)(?!\d)|\s*\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d)))",
        r"(\1+\2\4\5/\3\6\7)",
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


def evaluate(tree: tuple[ast.expr, list], names: dict):
    """The value where the names have these values: a Fraction, or a float after a root, π or a function. Raises NotMath."""
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
            result = OPERATIONS[type(node.op)](value(node.left, depth + 1), value(node.right, depth + 1))
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
UNITS = {name: names.split()[0] for names in (
    "cm centimeter centimetre 厘米|m meter metre 米|km kilometer kilometre 千米 公里|mm millimeter millimetre 毫米|in inch|ft foot feet"
    "|mi mile|yd yard|kg kilogram 千克 公斤|g gram 克|mg milligram|lb pound|oz ounce|l liter litre 升|ml milliliter millilitre 毫升"
    "|s sec second 秒|min minute 分钟|h hr hour 小时|day 天|year yr 年|¤ dollar usd 美元|€ euro eur|¥ yuan rmb 元|/ per|* *"
).split("|") for name in names.split()} | {"/": "/"}
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
    unit: str


def unit_name(text: str, apart: bool) -> str:
    """One spelling of a unit: "meters per second" is m/s. Raises NotMath for what may be a variable (2x) or a sentence."""
    text, square = regex.subn(r"^\s*(?:square|sq\b\.?)", "", text.casefold())
    text, cubic = regex.subn(r"^\s*cubic\b", "", text)
    names = []
    for word in regex.findall(r"[°/*]|\p{L}+", text):
        known = next((UNITS[w] for w in (word, word.removesuffix("s"), word.removesuffix("es")) if w in UNITS), "")
        likely = known or word == "°" or "°" in names or len(word) > 2 and apart or regex.match(r"\p{Han}", word)
        if word in NO_UNIT or not likely or (known in ("s", "h") and not apart):
            raise NotMath(word)
        names.append(known or word.removesuffix("s"))
    names = names if {"/", "*", "°"} & set(names) else names[:1]  # "years old" are years
    return "".join(names).removeprefix("unit") + "^2" * square + "^3" * cubic


def amount(text: str) -> tuple:
    """(value, step) of a number without a unit; see Quantity"""
    text = without_thousands(text.strip())
    text = text.replace(",", ".") if regex.fullmatch(r"[-+]?(?:\d+,\d{1,2}|0,\d+)", text) else text
    decimal = regex.fullmatch(r"[-+]?\s*\d*\.(\d+)", text)
    return evaluate(parse(text), {"π": math.pi}), Fraction(1, 10 ** len(decimal[1])) if decimal else Fraction(0)


def without_thousands(text: str) -> str:
    """1,234 and 1 234 as 1234, but (1,234) has two items"""
    groups = r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)|(?<![\d.,]|\d )[1-9]\d{0,2}(?: \d{3})+(?! ?\d)"
    return text if text[:1] in tuple("([{") else regex.sub(groups, lambda match: regex.sub("[, ]", "", match[0]), text)


def quantity(text: str) -> Quantity:
    """A number in any spelling, as an exact value where it has one. Raises NotMath."""
    unit, magnitude = "", 1
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
        value, step = amount(text)
    except NotMath:
        match = WITH_UNIT.fullmatch(text)
        if not match:
            raise
        value, step = amount(match[1])
        unit = unit_name(match[3], bool(match[2])) + (f"^{match[4]}" if match[4] else "")
    return Quantity(value * magnitude, step * magnitude, bool(percent), unit)


def same_quantity(answer: Quantity, gold: Quantity) -> bool:
    """Equal, or equal as far as the coarser of the two is written; a unit may be missing but not different."""
    if len({each.unit or "%" * each.percent for each in (answer, gold)} - {""}) > 1:
        return False
    scales = [(1, 1)]
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
        ours = sequence(answer) or sequence(label(answer)[1])
        return bool(ours) and same_sequence(ours, several, depth)
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
    """Whether `answer` says the same as `gold`; an answer of more than 400 characters has to be the gold to the letter.

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


class ClipScorer:
    """Cosine of image and text embeddings, through open_clip (the paper uses FG-CLIP).

    name: a built-in model "ViT-B-32/laion2b_s34b_b79k", a folder "local-dir:/path" with open_clip_config.json and
    weights, or "hf-hub:org/name". Raises RuntimeError if the weights are not there: without `require_pretrained`
    open_clip would go on with random ones.
    """

    def __init__(self, name: str, device="cpu", lo: float = 0.0, hi: float = 0.4):
        import open_clip

        if name.startswith("local-dir:") and not os.path.isfile(os.path.join(name[10:], "open_clip_config.json")):
            raise FileNotFoundError(f"--clip_model {name}: no open_clip_config.json in that folder")
        model, _, tag = (name, "", "") if ":" in name else name.partition("/")
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            model, pretrained=tag or None, require_pretrained=True, image_resize_mode="squash", device=device
        )
        self.model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.device, self.lo, self.hi = device, lo, hi
        self.cut_texts = 0  # sentences longer than the text tower's context, cut by the tokenizer

    def fits(self, text: str) -> bool:
        """Whether the text, with its begin and end marks, fits the text tower's context."""
        inner = getattr(self.tokenizer, "tokenizer", None)  # of open_clip's wrapper around Hugging Face tokenizers
        length = len(inner.encode(text)) if inner else len(self.tokenizer.encode(text)) + 2
        return length <= self.tokenizer.context_length

    def windows(self, text: str) -> list[str]:
        """Whole sentences packed greedily into texts that fit the text tower's context. [4]"""
        packed = []
        for sentence in regex.split(r"(?<=[.!?;])\s+|\n+", text):
            if packed and self.fits(packed[-1] + " " + sentence):
                packed[-1] += " " + sentence
            elif sentence:
                packed.append(sentence)
                self.cut_texts += not self.fits(sentence)
        return packed

    @torch.inference_mode()
    def cosines(self, image_lists: list[list], texts: list[str]) -> list[float]:
        """Cosine of texts[i] to the pictures image_lists[i] (mean over a row's pictures); an empty text has cosine 0.

        Each picture object is encoded once however many texts it has, and all windows go through as one batch. [3]
        """
        pictures = {id(image): image for images in image_lists for image in images}
        position = {key: i for i, key in enumerate(pictures)}
        pixels = torch.stack([self.preprocess(image) for image in pictures.values()])
        encode = lambda encoder, items: torch.cat(
            [encoder(part.to(self.device), normalize=True).float() for part in items.split(CLIP_BATCH)]
        )
        image_features = encode(self.model.encode_image, pixels)  # (pictures, D)
        windows = [self.windows(text) for text in texts]
        flat = list(dict.fromkeys(window for own in windows for window in own))
        if not flat:
            return [0.0] * len(texts)
        text_features = encode(self.model.encode_text, self.tokenizer(flat))  # (windows, D)
        row = {window: i for i, window in enumerate(flat)}
        cosines = []
        for images, own in zip(image_lists, windows):
            image_rows = image_features[[position[id(image)] for image in images]]  # (pictures of the row, D)
            text = F.normalize(text_features[[row[w] for w in own]].mean(0), dim=-1) if own else None  # (D,)
            cosines.append(float((image_rows @ text).mean()) if own else 0.0)
        return cosines

    def rewards(self, image_lists: list[list], texts: list[str]) -> list[float]:
        """Cosines on a scale from lo (0) to hi (1), clamped. The paper: lo = 0, hi = 0.4, min(cos / 0.4, 1)."""
        return [min(max((c - self.lo) / (self.hi - self.lo), 0.0), 1.0) for c in self.cosines(image_lists, texts)]


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
