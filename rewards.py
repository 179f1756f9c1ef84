"""What is good: the rewards of "Perception Before Reasoning" (arXiv 2509.13031).

    parse_response     a response's sections, read once and in order
    format, length, keyword, CLIP, accuracy      one small function (or class) each
    STAGE_REWARDS      which parts a stage adds up, with the paper's weights

A reward is a dict of parts. The sum happens in one place, `total_reward`, with named weights; a part without a weight
is only logged. So a reward of your own is a function here, a line in `score_parts`, and a weight.

Departures from the authors' code are numbered in pebr.py's header; [n] below refers to that list.
"""

from dataclasses import dataclass
from fractions import Fraction
import os
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
