"""What is good: the rewards of "Perception Before Reasoning" (arXiv 2509.13031).

    parse_response     a response's sections, read once and in order
    format, length, keyword, CLIP, accuracy      one small function (or class) each
    STAGE_REWARDS      which parts a stage adds up, with the paper's weights
    BENCHMARKS         how evaluation grades and scores a benchmark: by its own rule, without a judge

A reward is a dict of parts. The sum happens in one place, `total_reward`, with named weights; a part without a weight
is only logged. So a reward of your own is a function here, a line in `score_parts`, and a weight.

Departures from the authors' code are numbered in pebr.py's header; [n] below refers to that list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
import math
import os
from string import ascii_uppercase
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
    """Read the sections of the paper's answer format once, in order.

    Well formed means: the headings Image Description, Rationales, Let's think step by step, Step 1 .. Step k (k >= 1),
    The final answer is, each once and in this order; nothing before the first one; no empty description or step; one
    line of answer. The last answer section counts, and its first line is the answer. A description that no heading
    closes (a truncated response) is no description, as in the authors' pattern. [5]
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


def keyword_pattern(keyword: str) -> regex.Pattern:
    """A keyword as a whole word or phrase, any case, any white space, plural allowed; a number is not part of a longer one.

    A single letter (a point or an angle in geometry) is matched in its own case and has no plural: "A" is not "as".
    """
    words = [regex.escape(word) for word in keyword.split()]
    letters = regex.search(r"\p{L}*$", keyword.strip())[0]
    plural = r"(?:e?s)?" if len(letters) > 2 else ""
    case = 0 if len(keyword.strip()) == 1 else regex.IGNORECASE
    return regex.compile(r"(?<!\w)(?<!\d[.,])" + r"\s+".join(words) + plural + r"(?!\w)(?![.,]\d)", case)


def keyword_reward(description: str, key_words: list[str]) -> float:
    """Share of the reference keywords that the image description names (paper, stage 1). [1]"""
    return sum(bool(keyword_pattern(keyword).search(description)) for keyword in key_words) / len(key_words)


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy: does the answer equal the gold answer?


def unwrap(answer: str) -> str:
    """Peel what surrounds an answer: markdown, $, \\boxed{}, \\text{}, a lead-in, the final full stop."""
    answer = unicodedata.normalize("NFKC", answer).strip()
    while True:
        peeled = regex.sub(r"^(?:so\s+)?the\s+(?:final\s+)?answer\s+is\s*:?\s*", "", answer, flags=regex.IGNORECASE)
        peeled = regex.sub(r"^\\(?:boxed|text|mathrm|textbf)\s*(\{((?:[^{}]|(?1))*+)\})$", r"\2", peeled)
        peeled = regex.sub(r"^(\*\*|\$\$|\$|`|\*)(.+)\1$", r"\2", peeled)
        peeled = regex.sub(r"(?<=.)[.:;,]$", "", peeled).strip()
        if peeled == answer:
            return answer
        answer = peeled


def number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction (1/2, \\frac{1}{2}) or percentage; None if it is no number."""
    text = regex.sub(r"\\[dt]?frac\s*\{(\d{1,30})\}\s*\{(\d{1,30})\}", r"\1/\2", text)
    text = regex.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text.replace("−", "-")).strip()
    match = regex.fullmatch(r"([-+]?)\s*(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:\s*/\s*(\d{1,30}))?\s*(\\?%)?", text)
    if not match or (match[3] and int(match[3]) == 0):
        return None
    value = Fraction(match[2].rstrip(".")) / int(match[3] or 1) / (100 if match[4] else 1)
    return -value if match[1] == "-" else value


def option_index(answer: str, choices: list[str]) -> int | None:
    """Index of the choice that an answer names by its letter ("B", "(b)", "B. 24") or by its text; None if neither."""
    match = regex.fullmatch(r"\(?([A-Za-z])\)?(?:[.:)]\s*(.*))?", answer, flags=regex.DOTALL)
    if match and (index := ord(match[1].upper()) - ord("A")) < len(choices):
        if not match[2] or unwrap(match[2]).casefold() == unwrap(choices[index]).casefold():
            return index
    texts = [unwrap(choice).casefold() for choice in choices]
    return texts.index(answer.casefold()) if answer.casefold() in texts else None


def grade(answer: str, gold: str, choices: list[str] | None = None) -> bool:
    """Whether `answer` says the same as `gold`. Never evaluates text, and its work is linear in the length of it.

    With `choices` both are options, by letter or by text. Otherwise numbers are compared exactly, anything else as
    text without case and white space. Without choices, a gold of one letter is an option too ("(B)" equals "B").
    """
    answer, gold = unwrap(answer[:1000]), unwrap(gold)
    if not answer:
        return False
    if choices:
        chosen = option_index(answer, choices)
        return chosen is not None and chosen == option_index(gold, choices)
    if (value := number(gold)) is not None:
        return number(answer) == value
    if regex.fullmatch(r"[A-Za-z]", gold):
        letter = regex.fullmatch(r"\(?([A-Za-z])\)?(?:[.:)]\s.*)?", answer, flags=regex.DOTALL)
        return bool(letter) and letter[1].upper() == gold.upper()
    return "".join(answer.casefold().split()) == "".join(gold.casefold().split())


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
    rows, images: list[list], responses: list[str], num_tokens: list[int], clip: ClipScorer | None
) -> list[dict]:
    """Every part of the reward for each response.

    rows: data.Row of each response; images: its pictures (PIL); num_tokens: its completion length; clip: None leaves
    the "clip" part out. A part that does not apply to a row (no keywords, no picture) is left out, never scored 0.
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
            part["keyword"] = keyword_reward(response.description, row.key_words)
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
        groups.setdefault(key(row), []).append(right)
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
        steps, _, part = row.raw["key"].partition("_")
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
