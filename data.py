"""What comes in: rows, pictures and prompts; at the end, the toy world that the offline default trains on.

Your own data is a JSON list (or JSONL) in the authors' format, and this is all of it:

    {"qid": "1", "problem": "<image>How many red dots?", "answer": "3", "images": ["dots.png"], "key_words": ["red dot"]}

and for the warm-up, sharegpt rows:

    {"messages": [{"role": "user", "content": "<image>How many red dots?"},
                  {"role": "assistant", "content": "### Image Description: ..."}], "images": ["dots.png"]}

`<image>` marks a picture's place; without marks the pictures come first. Paths are relative to --image_root (default:
the data file's folder) and must stay inside it. A row may list "choices" (["3", "4"]): then answers are options.

Benchmarks come as VLMEvalKit's TSV or as their own JSON: see question_row.

Data files and pictures are untrusted: nothing here evaluates or unpickles them, and every complaint is a DataError.
"""

import ast
import base64
import csv
from dataclasses import dataclass, field
import functools
import io
import itertools
import json
import math
import os
from pathlib import Path
import random
import re
from string import ascii_uppercase
import sys

from PIL import Image, ImageDraw, ImageOps

from rewards import BENCHMARKS, option_index, parse_response

IMAGE_MARK = "<image>"
MIN_IMAGE_SIDE = 28  # pixels; the paper drops warm-up rows with smaller pictures
RETHINK = "let me rethink it"  # the paper drops warm-up rows that say so, in any case
INLINE = "data:;base64,"  # begins a picture that stands in the data file: its base64 text follows, decoded when it is opened
LINK_LENGTH = 64  # characters; a shorter image cell of a TSV is the index of the row that holds the picture (VLMEvalKit)
LITERAL_LENGTH = 20_000  # characters of a list in a TSV cell
FORMATS = "PNG JPEG WEBP GIF BMP TIFF AVIF JPEG2000 PPM".split()  # not EPS, for which Pillow runs a program
MAX_PICTURE = 2**26  # pixels, 8192 x 8192; more is refused before it is decoded

# The instruction around a question, in all stages; --prompt_file replaces it. Headings are the paper's, the wording is ours. [12]
INSTRUCTION = """{question}

Look at the image first, then reason, then answer. Write exactly these sections:
### Image Description: everything in the image that matters for the question: objects, numbers, attributes, positions.
### Rationales: what the question asks for, and how the image answers it.
### Let's think step by step.
### Step 1: the first step of the reasoning.
### Step 2: the next step, and so on, as many as needed.
### The final answer is: only the answer."""


class DataError(ValueError):
    """Bad input, with the file, the row and what to do. Shown to the user without a traceback."""


# ----------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass
class Row:
    """One question. `raw` is the row as it was read: difficulty sampling writes it back unchanged."""

    where: str  # "train.json row 12", the beginning of every message about this row
    qid: str
    problem: str
    answer: str
    images: list[str]  # absolute paths, or INLINE pictures
    key_words: list[str] = field(default_factory=list)
    choices: list[str] | None = None
    alternatives: list[str] = field(default_factory=list)  # further answers that a benchmark takes for right
    benchmark: str = "generic"  # whose rule evaluation grades by (rewards.BENCHMARKS)
    categories: dict[str, list[str]] = field(default_factory=dict)  # {column: values}, scored apart
    system: str = ""
    response: str = ""  # what the warm-up learns to write; "" in RL rows
    raw: dict = field(default_factory=dict)


def unique_keys(pairs: list[tuple]) -> dict:
    """A JSON object in which no key comes twice: json.loads would keep the last value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key comes twice in {str(pairs)[:100]}")
    return found


def read_json_rows(path: str) -> list[dict]:
    """Rows of a JSON list, of JSON lines, or of one object {pid: row} (MathVista). Raises DataError if the file is none."""
    read, line = functools.partial(json.loads, object_pairs_hook=unique_keys), ""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        try:
            rows = read(text) if text.strip() else []
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise
            rows = []
            for number, line_text in enumerate(text.split("\n"), 1):  # a text may hold other line ends
                line = f"line {number}: "
                rows += [read(line_text)] if line_text.strip() else []
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number of thousands of digits
        raise DataError(f"{path}: neither a JSON list nor one JSON object a line, in UTF-8 ({line}{error})") from None
    if isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        rows = [{"pid": pid, **row} for pid, row in rows.items()]
    return rows if isinstance(rows, list) else [rows]


def check_values(raw: dict) -> None:
    """Raises DataError for values that Python reads from JSON but that no output file can hold."""
    try:
        json.dumps(raw, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise DataError("it holds NaN, an infinite number, half of a surrogate pair or a thousand nested lists") from None


def text_field(raw: dict, name: str) -> str:
    value = raw.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'field "{name}" is missing, empty or no text')
    return value


def text_list(raw: dict, name: str) -> list[str]:
    value = raw.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise DataError(f'field "{name}" must be a list of texts')
    return value


def image_paths(raw: dict, root: str) -> list[str]:
    """Absolute paths of a row's pictures. Raises DataError for one outside `root`, links resolved, or that is no regular file:
    a pipe or a device would never end."""
    root, paths = os.path.realpath(root), []
    for name in text_list(raw, "images") if raw.get("images") is not None else []:
        path = os.path.realpath(os.path.join(root, name.replace("\0", "?")))  # no file's name has a zero byte
        if os.path.commonpath([root, path]) != root:
            raise DataError(f"picture {name[:200]} lies outside the image root {root}")
        if not os.path.isfile(path):
            raise DataError(f"picture {name[:200]} is not in {root} (--image_root), or is no regular file")
        paths.append(path)
    return paths


def rl_row(where: str, raw: dict, root: str) -> Row:
    """A row of the authors' RL format (see the top of this file)."""
    row = Row(
        where, text_field(raw, "qid"), text_field(raw, "problem"), text_field(raw, "answer"), image_paths(raw, root), raw=raw
    )
    if raw.get("key_words") is not None:
        row.key_words = text_list(raw, "key_words")
    if raw.get("choices"):
        row.choices = text_list(raw, "choices")
        index = option_index(row.answer, row.choices, gold=True)
        if index is None or index >= 26:
            raise DataError(
                f"answer {row.answer!r} is none of the choices {row.choices}: neither letter, text nor 0-based index"
            )
        row.answer = chr(ord("A") + index)  # resolved once; `raw` keeps what the file says
    return row


def sft_row(where: str, raw: dict, root: str) -> Row:
    """A sharegpt conversation: an optional system message, one question, one response. Its answer is the response's."""
    messages = raw.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError('field "messages" must be a list of {"role", "content"}')
    roles = [m.get("role") for m in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise DataError(f"messages must be (system,) user, assistant, here they are {roles}")
    *system, user, response = [text_field(m, "content") for m in messages]
    qid = where if raw.get("qid") is None else text_field(raw, "qid")
    row = Row(where, qid, user, parse_response(response).answer, image_paths(raw, root), raw=raw)
    row.system, row.response = "".join(system), response
    return row


MISSING = {  # a field that a stage needs, and what to say of a row without it
    "answer": "no answer to grade against (of a warm-up row: its response has no final answer section)",
    "key_words": 'field "key_words" is missing or empty: the perception reward needs reference keywords',
    "response": "an RL row; the warm-up needs sharegpt rows with messages",
}


def load_rows(
    path: str, image_root: str = "", need: tuple[str, ...] = (), benchmark: str = ""
) -> tuple[list[Row], list[str]]:
    """The rows of an RL, SFT or benchmark file, and what is wrong with the others ("train.json row 3: ...").

    need: what a row must have beside its question: "answer", "key_words", "response". benchmark: a key of
    rewards.BENCHMARKS; "" tells it from the file's name and columns.
    """
    if not os.path.isfile(path):
        raise DataError(f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}")
    try:
        raws, pictures = read_tsv_rows(path) if path.lower().endswith(".tsv") else (read_json_rows(path), None)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not raws:
        raise DataError(
            f"{path}: no rows (of easy.json or medium.json: no such question; warm up longer, or name a file: --stage perception --from_data FILE)"
        )
    root = image_root or os.path.dirname(os.path.abspath(path))
    benchmark = benchmark or find_benchmark(path, set(raws[0]) if isinstance(raws[0], dict) else set())
    rows, problems, seen = [], [], {}
    for i, raw in enumerate(raws):
        where = f"{os.path.basename(path)} row {i}"
        try:
            row = make_row(where, raw, root, benchmark, pictures)
            for name in need:
                if not getattr(row, name):
                    raise DataError(MISSING[name])
            if row.qid in seen:
                raise DataError(f"qid {row.qid} is already that of {seen[row.qid]}")
            seen[row.qid] = where
            rows.append(row)
        except DataError as error:
            problems.append(f"{where}: {error}")
    return rows, problems


def make_row(where: str, raw, root: str, benchmark: str, pictures) -> Row:
    """One row of any of the formats, told apart by its fields. Raises DataError."""
    if not isinstance(raw, dict):
        raise DataError("a row must be a JSON object")
    check_values(raw)
    rule = BENCHMARKS[benchmark]
    if lacking := set(rule.needs.split()) - raw.keys():
        raise DataError(f"no {', '.join(sorted(lacking))}, which the rule of {benchmark} reads (--benchmark generic)")
    for name in rule.needs.split():
        if isinstance(raw[name], (list, dict)):
            raise DataError(f'field "{name}" must be a text or a number')
    if "conversations" in raw:
        raise DataError(
            'no "messages": a warm-up row is {"messages": [{"role": ..., "content": ...}, ...], "images": [...]}'
        )
    if "messages" in raw:
        row = sft_row(where, raw, root)
    elif {"problem", "key_words"} & raw.keys() or not {"question", "query"} & raw.keys():
        row = rl_row(where, raw, root)
    else:
        row = question_row(where, raw, root, rule.gold, pictures)
    row.benchmark, row.categories = benchmark, row_categories(row)
    marks = row.problem.count(IMAGE_MARK)
    if marks and marks != len(row.images):
        raise DataError(f"{marks} {IMAGE_MARK} marks for {len(row.images)} pictures")
    return row


# ----------------------------------------------------------------------------------------------------------------------
# Benchmark files: VLMEvalKit's TSV, or a benchmark's own JSON, one question a row


def find_benchmark(path: str, columns: set[str]) -> str:
    """Which of rewards.BENCHMARKS a file is, by its name and columns; "generic" if none."""
    name = re.sub(r"[-_ ]", "", Path(path).stem.lower())
    for key, benchmark in BENCHMARKS.items():
        named = re.search(benchmark.name, name) and set(benchmark.needs.split()) <= columns
        if named or benchmark.telling and set(benchmark.telling.split()) <= columns:
            return key
    return "generic"


def read_tsv_rows(path: str) -> tuple[list[dict], dict[str, list | str]]:
    """Rows of a VLMEvalKit TSV without their image cells, and those by index: pictures, or the index of the row that has them.

    Cells stay the texts that they are: an option "None", "NA" or "nan" is an option (pandas, hence VLMEvalKit, drops it).
    """
    csv.field_size_limit(sys.maxsize)  # a picture is one cell
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t")
            header, rows = reader.fieldnames or [], list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no tab-separated table ({error})") from None
    for names in ({"index"}, {"question"}, {"answer"}, {"image", "image_path"}):
        if rows and not names & set(header):
            raise DataError(f"{path}: no {' or '.join(sorted(names))} column; its columns are {', '.join(sorted(header))}")
    if len(set(header)) < len(header):
        raise DataError(f"{path}: a column comes twice; its columns are {', '.join(sorted(header))}")
    pictures = {}
    for row in rows:
        cell = row.pop("image", "") or ""
        items = cell[1:-1].split(",") if cell.startswith("[") else [cell]  # base64 has no commas
        pictures.setdefault(
            row["index"], [INLINE + item.strip(" '\"") for item in items] if len(cell) > LINK_LENGTH else cell
        )
    return rows, pictures


def literal_list(text: str, name: str) -> list[str]:
    """The items of a list literal such as "['3', 4]" as texts. Reads literals, evaluates nothing."""
    try:
        value = ast.literal_eval(text) if len(text) <= LITERAL_LENGTH else None
        items = [str(item) for item in value] if isinstance(value, (list, tuple)) else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        items = None
    if items is None:
        raise DataError(f'field "{name}" is no list like ["a", "b"] of at most {LITERAL_LENGTH} characters: {text[:60]}')
    return items


def listed(value, name: str) -> list[str]:
    """A cell that may hold one text or several: a JSON list, or the text of a list literal."""
    if isinstance(value, str) and value.startswith("["):
        return literal_list(value, name)
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def tsv_pictures(raw: dict, root: str, pictures: dict[str, list | str]) -> list[str]:
    """Pictures of a TSV row: its own, or those of the row that its image cell names; without such a cell, from image_path."""
    found = pictures[raw["index"]]
    if not found:
        if not raw.get("image_path"):
            raise DataError("its image cell is empty, and it has no image_path")
        return image_paths({"images": listed(raw["image_path"], "image_path")}, root)
    if isinstance(found, str) and not isinstance(pictures.get(found), list):
        raise DataError(f"its image is that of index {found}, but no such row holds a picture")
    return pictures[found] if isinstance(found, str) else found


def row_choices(raw: dict) -> list[str] | None:
    """Option texts from the columns A, B, ... or from "choices" or "options" (a list, or its literal); None if there are none."""
    texts = [str(raw[letter]).strip() for letter in itertools.takewhile(raw.__contains__, ascii_uppercase)]
    while texts and not texts[-1]:
        texts.pop()
    if "" in texts:
        raise DataError(f"option {ascii_uppercase[texts.index('')]} is empty, but a later one is not")
    name = "choices" if raw.get("choices") else "options"
    if not texts and raw.get(name) and raw[name] not in ("None", "nan"):
        texts = listed(raw[name], name)
    if len(texts) > len(ascii_uppercase):
        raise DataError(f"{len(texts)} options, more than there are letters")
    return texts or None


def shown_choices(question: str) -> list[str] | None:
    """Option texts that the question lists itself, labelled A, B, ... after "Choices:", "Options:" or a line end; else None."""
    tail = re.split(r"(?:Choices|Options):|\n(?=\(?A[).:])", question)[1:][-1:]
    pieces = re.split(r"(?:^|[\s,;])\(?([A-Z])[).:]\s*", tail[0]) if tail else []
    letters, texts = pieces[1::2], [text.strip(" ,;\n") for text in pieces[2::2]]
    return texts if len(texts) > 1 and letters == list(ascii_uppercase[: len(texts)]) and all(texts) else None


def gold_letter(answer: str, choices: list[str], kind: str) -> str:
    """The right option's letter, from its letter, its text or its number from 0 (kind: see rewards.Benchmark)."""
    bare = answer.strip("(). \n")
    index = choices.index(answer) if answer in choices else None
    if kind == "index" and bare.isdecimal():
        index = int(bare[:9])
    elif len(bare) == 1 and bare in ascii_uppercase and not (kind == "text" and index is not None):
        index = ascii_uppercase.index(bare)
    if index is None or index >= len(choices):
        raise DataError(f'answer "{answer}" is none of its {len(choices)} options')
    return ascii_uppercase[index]


def place_images(question: str, images: list[str]) -> tuple[str, list[str]]:
    """MMMU's "<image 1>" as IMAGE_MARK, and the pictures in the order of their marks, those without a mark first.

    A mark beyond the pictures stays text: MathVision has one merged picture for "<image1>" and "<image2>".
    """
    order = []

    def place(match):
        if (i := int(match[1]) - 1) in order or not 0 <= i < len(images):
            return match[0]
        order.append(i)
        return IMAGE_MARK

    question = re.sub(r"<image ?(\d{1,2})>", place, question)
    unmarked = [i for i in range(len(images)) if i not in order]
    return IMAGE_MARK * len(unmarked) * bool(order) + question, [images[i] for i in unmarked + order]


def question_row(where: str, raw: dict, root: str, gold: str, pictures: dict | None) -> Row:
    """A row of a benchmark: VLMEvalKit's columns (pictures: see read_tsv_rows), or those of the benchmark's own JSON.

    The question is the prompt that the benchmark comes with (query_cot, query) or its question, a hint before it, and its
    options after it unless it shows them or they are only letters, which stand in the picture. The answer of a question
    with options is stored as a letter.
    """
    if pictures is not None and (None in raw or None in raw.values()):
        raise DataError("it has not as many cells as the header has columns")
    first = lambda *names: next((name for name in names if raw.get(name) not in (None, "", [])), names[-1])
    if pictures is None:
        names = raw.get(first("image", "image_path", "imgname", "images"))
        images = image_paths({"images": [names] if isinstance(names, str) else names}, root)
    else:
        images = tsv_pictures(raw, root, pictures)
    row = Row(where, str(raw.get(first("index", "qid", "pid", "id", "sample_index"), where)), "", "", images, raw=raw)
    question = text_field(raw, first("query_cot", "query", "question"))
    if raw.get("hint"):
        question = f"Hint: {raw['hint']}\n{question}"
    if isinstance(raw.get("option"), str):  # WeMath's own file
        question += f"\nOptions: {raw['option']}"
    answer = raw.get(first("answer_option", "answer", "label"))
    answer = "" if answer is None else answer
    row.answer, *row.alternatives = listed(answer, "answer") if gold == "any" else [str(answer)]
    row.choices, shown = row_choices(raw), shown_choices(question)
    if row.choices and row.choices[1:] == ["Other Answers"]:  # an open question of MMMU as VLMEvalKit rewrites it
        row.answer, row.choices = row.choices[0], None
    elif row.choices:
        row.answer = gold_letter(row.answer, row.choices, "letter" if raw.get("answer_option") else gold)
        if not shown and row.choices != list(ascii_uppercase[: len(row.choices)]):
            question += "\nOptions:" + "".join(f"\n{a}. {text}" for a, text in zip(ascii_uppercase, row.choices))
    elif shown and row.answer.strip("(). \n") in list(ascii_uppercase[: len(shown)]):
        row.answer, row.choices = gold_letter(row.answer, shown, "letter"), shown
    row.problem, row.images = place_images(question, images)
    return row


def write_tsv_predictions(path: str, rows: list[Row], records: list[dict]) -> None:
    """VLMEvalKit's layout for its judge: the input's columns, less the image, and the prediction: the answer that was found in
    the first response, or else the whole response."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0].raw, "prediction"], delimiter="\t")
        writer.writeheader()
        for row, record in zip(rows, records):
            writer.writerow(row.raw | {"prediction": record["extracted"][0] or record["responses"][0]})


CATEGORIES = ("category", "l2-category", "l2_category", "subject", "level", "knowledge_level", "task", "skill", "skills",
              "question_type", "answer_type", "problem_version", "split", "type", "human_or_machine", "kind")  # fmt: skip


def row_categories(row: Row) -> dict[str, list[str]]:
    """The columns that a file's scores are split by, and whether the question has options."""
    values = {name: row.raw[name] for name in CATEGORIES if row.raw.get(name) not in (None, "")}
    found = {name: listed(value, name) if name == "skills" else [str(value)] for name, value in values.items()}
    return found | {"form": ["multiple choice" if row.choices else "free form"]}


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and prompts


def open_picture(path: str) -> Image.Image:
    """A picture as people see it: RGB, EXIF-turned, transparent parts white, of an animation the first frame.

    path: of a file, or an INLINE picture. Raises DataError if it is not a readable picture, or a too large one.
    """
    inline = path.startswith(INLINE)
    name = f"{path[len(INLINE) :][:20]}... (base64)" if inline else path
    try:
        file = io.BytesIO(base64.b64decode(path.removeprefix(INLINE))) if inline else path
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PICTURE:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, the limit is {MAX_PICTURE}")
            if image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode} has no agreed white: save it with 8 or 16 bits a channel")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = image.convert("I").point(lambda value: value * (1 / 257))  # 65,535 becomes 255; Pillow would clip
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise DataError(f"picture {name} is too large ({error}): reduce it first") from None
    except Exception as error:  # over broken bytes Pillow's decoders raise whatever goes wrong in them
        raise DataError(f"picture {name} is not readable ({error or type(error).__name__})") from None


def load_image(path: str, min_pixels: int, max_pixels: int) -> Image.Image:
    """Open a picture once (see open_picture), resized (aspect kept) so that its area lies within the pixel limits."""
    image = open_picture(path)
    area = image.width * image.height
    scale = math.sqrt(min(max(area, min_pixels), max_pixels) / area)
    if scale != 1:
        rounding = math.ceil if scale > 1 else math.floor  # so that rounding does not cross the limit again
        image = image.resize((max(1, rounding(image.width * scale)), max(1, rounding(image.height * scale))), Image.BICUBIC)
    return image


def in_instruction(problem: str, instruction: str) -> str:
    """A question as every stage asks it: inside `instruction` at {question}, unless it has the instruction's headings
    (of one without headings: its words) already."""
    marks = re.findall(r"###[^:\n]*", instruction) or instruction.split("{question}")
    return problem if all(mark.strip() in problem for mark in marks) else instruction.replace("{question}", problem)


def chat_messages(row: Row, instruction: str) -> list[dict]:
    """The conversation up to the response, in the form that Hugging Face chat templates take."""
    text = in_instruction(row.problem, instruction)
    if IMAGE_MARK not in text:
        text = IMAGE_MARK * len(row.images) + text
    first, *rest = text.split(IMAGE_MARK)
    content = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        content += [{"type": "image"}] + ([{"type": "text", "text": piece}] if piece else [])
    system = [{"role": "system", "content": [{"type": "text", "text": row.system}]}] if row.system else []
    return system + [{"role": "user", "content": content}]


def filter_warmup_rows(rows: list[Row]) -> tuple[list[Row], dict[str, int]]:
    """The paper's two warm-up filters, counted: responses that say "let me rethink it"; pictures under 28 pixels a side.

    For checked rows: a missing or unreadable picture, the rest of the second filter, is a broken row, named before. [9]
    """
    kept, dropped = [], {"rethink": 0, "small_picture": 0}
    for row in rows:
        if RETHINK in row.response.lower():
            dropped["rethink"] += 1
        elif any(min(picture_size(path)) < MIN_IMAGE_SIDE for path in row.images):
            dropped["small_picture"] += 1
        else:
            kept.append(row)
    return kept, dropped


def picture_size(path: str) -> tuple[int, int]:
    """(width, height), without decoding the picture"""
    with Image.open(path) as image:
        return image.size


# ======================================================================================================================
# The toy world. A reader of the paper can stop here.
#
# Coloured shapes on a grid; count them, subtract them, add up their prices. It is written to disk once: pictures, data
# files in the format above, a Hugging Face model folder, an open_clip folder. From then on only paths matter, so the toy
# takes the same road as Qwen2.5-VL and FG-CLIP. What makes it a world in which the paper's method can show its effect:
#   - One grid cell is one image token (28 x 28 pixels).
#   - The teacher is noisy: it leaves out or misnames objects, so the warmed-up model has something to sharpen.
#   - It slips in its steps too, the more objects there are: easy and medium questions.
#   - Prices need a multiplication that the warm-up is too short to teach, and some are beyond the model's number words: hard ones.
# ======================================================================================================================

COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 215, 50)}
SHAPES = ["circle", "square", "triangle"]
PLACES = ["top left", "top middle", "top right", "bottom left", "bottom middle", "bottom right"]
CELL = 28  # pixels


@dataclass
class ToyConfig:
    """Sizes and noise of the toy world."""

    sft_rows: int = 6000
    rl_rows: int = 960
    dear_rows: int = 40  # RL questions that nobody can answer
    test_rows: int = 320
    object_noise: float = 0.22  # share of the objects that the teacher's description leaves out or misnames
    slip_per_object: float = 0.12  # chance of a slip in the teacher's steps, per object beyond the first
    hidden: int = 128
    text_layers: int = 4
    vision_layers: int = 2
    clip_steps: int = 60
    clip_batch: int = 128


def toy_scene(rng: random.Random) -> list[tuple[str, str, str]]:
    """1 to 5 objects (color, shape, place) in reading order."""
    cells = sorted(rng.sample(range(len(PLACES)), rng.choice([1, 1, 1, 2, 2, 3, 3, 4, 5, 5])))
    return [(rng.choice(list(COLORS)), rng.choice(SHAPES), PLACES[cell]) for cell in cells]


def toy_picture(scene, rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (3 * CELL, 2 * CELL), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for color, shape, place in scene:
        cell = PLACES.index(place)
        x, y = (cell % 3 + 0.5) * CELL + rng.uniform(-2, 2), (cell // 3 + 0.5) * CELL + rng.uniform(-2, 2)
        r = rng.uniform(9, 11)
        if shape == "circle":
            draw.ellipse([x - r, y - r, x + r, y + r], fill=COLORS[color])
        elif shape == "square":
            draw.rectangle([x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9], fill=COLORS[color])
        else:
            draw.polygon([(x, y - r), (x - r, y + r * 0.85), (x + r, y + r * 0.85)], fill=COLORS[color])
    return image


@dataclass
class ToyQuestion:
    kind: str  # count, subtract or price
    color: str
    prices: tuple[int, int]  # of an object of that color, and of any other


def toy_answer(scene, asked: ToyQuestion) -> tuple[str, list, str]:
    """(question, the objects that matter, answer)"""
    color = asked.color
    same = [thing for thing in scene if thing[0] == color]
    others = [thing for thing in scene if thing[0] != color]
    if asked.kind == "count":
        return f"How many {color} objects are there ?", same, str(len(same))
    if asked.kind == "subtract":
        return f"Subtract all {color} objects . How many objects are left ?", others, str(len(others))
    price, other = asked.prices
    question = f"A {color} object costs {price} coins , any other {other} . How many coins do all objects cost ?"
    return question, same, str(price * len(same) + other * len(others))


def toy_rationale(scene, asked: ToyQuestion, rng: random.Random, toy: ToyConfig) -> str:
    """The teacher's response in the paper's answer format, with the teacher's mistakes."""
    seen = []
    for thing in scene:
        if rng.random() < toy.object_noise:
            if rng.random() < 0.5:
                continue  # left out
            thing = (rng.choice(list(COLORS)), rng.choice(SHAPES), thing[2])  # misnamed
        seen.append(thing)
    tell = lambda things: " , ".join(f"{c} {s} at the {p}" for c, s, p in things) or "none"
    believed = list(seen)  # the steps follow from what was described
    if believed and rng.random() < toy.slip_per_object * (len(scene) - 1):  # one object less, or of another color
        i = rng.randrange(len(believed))
        believed[i : i + 1] = [] if rng.random() < 0.5 else [(rng.choice(list(COLORS)), *believed[i][1:])]
    _, matter, answer = toy_answer(believed, asked)
    what = {
        "count": f"count the {asked.color} objects",
        "subtract": f"leave out the {asked.color} objects , count the rest",
        "price": f"add up the coins of the {asked.color} objects and of the others",
    }[asked.kind]
    return (
        f"### Image Description: There are {len(scene)} objects . {tell(seen)} .\n### Rationales: {what} .\n"
        f"### Let's think step by step.\n### Step 1: {tell(matter)} .\n### Step 2: that makes {answer} .\n"
        f"### The final answer is: {answer}"
    )


def toy_keywords(scene) -> list[str]:
    """Objects, number, attributes, spatial relations, as the paper's teacher names them."""
    words = [f"{len(scene)} objects"]
    for color, shape, place in scene:
        words += [f"{color} {shape}", f"{shape} at the {place}"]
    return list(dict.fromkeys(words))


def toy_caption(scene, rng: random.Random) -> str:
    """What the toy CLIP learns from: whole and partial lists in any order, with and without places."""
    things = rng.sample(scene, len(scene))
    style = rng.randrange(3)
    if style == 0:
        return "a picture of " + " and ".join(f"a {c} {s}" for c, s, _ in things)
    listed = " , ".join(f"{c} {s} at the {p}" for c, s, p in (scene if style == 1 else things))
    return f"There are {len(scene)} objects . {listed} ."


def toy_row(folder: str, name: str, scene, asked: ToyQuestion, rng: random.Random, toy: ToyConfig | None) -> dict:
    """Write the picture; return the data file's row: a warm-up conversation if `toy` says how noisy the teacher is, else RL."""
    image = f"images/{name}.png"
    toy_picture(scene, rng).save(Path(folder, image))
    question, _, answer = toy_answer(scene, asked)
    if toy:
        messages = [
            {"role": "user", "content": "<image>" + question},
            {"role": "assistant", "content": toy_rationale(scene, asked, rng, toy)},
        ]
        return {"messages": messages, "images": [image]}
    row = {"qid": name, "problem": "<image>" + question, "answer": answer, "images": [image]}
    return row | {"key_words": toy_keywords(scene), "kind": asked.kind}


def build_toy_world(folder: str, seed: int, toy: ToyConfig) -> None:
    """Write the toy world under `folder`: images/, sft.json, train.json, test.json, prompt.txt, model/, clip/.

    Everything follows from `seed`. A folder that is already complete is left alone; one of another seed is a DataError.
    """
    done = Path(folder, "toy.json")
    if done.exists():
        if (old := json.loads(done.read_text())["seed"]) != seed:
            raise DataError(f"{folder} was made with --seed {old}, not {seed}: use another --run_dir")
        return
    print(f"toy world: writing pictures, rows, a tiny Qwen2.5-VL and a tiny CLIP to {folder}", flush=True)
    rng = random.Random(seed)
    Path(folder, "images").mkdir(parents=True, exist_ok=True)
    for split, count, kinds in (
        ("sft", toy.sft_rows, ["count"] * 9 + ["subtract"] * 9 + ["price"] * 2),
        ("train", toy.rl_rows, ["count"] * 8 + ["subtract"] * 6 + ["price"] * 3),
        ("test", toy.test_rows, ["count"] * 8 + ["subtract"] * 6 + ["price"] * 3),
    ):
        rows = []
        for i in range(count):
            scene = toy_scene(rng)
            asked = ToyQuestion(rng.choice(kinds), rng.choice(list(COLORS)), (rng.randint(2, 9), rng.randint(2, 9)))
            rows.append(toy_row(folder, f"{split}{i}", scene, asked, rng, toy if split == "sft" else None))
        dear = random.Random(seed + 2)  # prices beyond the numbers that the model has words for: hard for certain
        extra = toy.dear_rows if split == "train" else 0
        for i in range(count, count + extra):
            scene = (toy_scene(dear) + toy_scene(dear))[:4]
            scene = [(color, shape, place) for (color, shape, _), place in zip(scene, PLACES)]  # two objects at least
            asked = ToyQuestion("price", dear.choice(list(COLORS)), (dear.randint(30, 50), dear.randint(30, 50)))
            rows.append(toy_row(folder, f"{split}{i}", scene, asked, dear, None))
        Path(folder, f"{split}.json").write_text(json.dumps(rows, indent=1))
    Path(folder, "prompt.txt").write_text("{question}")  # the toy model has no use for an instruction
    words = "user assistant system none that makes count the leave out rest add up coins of and others There are objects . , ? at A object"
    words += " How many is Subtract all left costs any other do cost " + " ".join([*COLORS, *SHAPES, *PLACES])
    build_toy_model(Path(folder, "model"), seed, toy, words.split() + [str(n) for n in range(9 * len(PLACES) + 1)])
    build_toy_clip(Path(folder, "clip"), seed, toy)
    done.write_text(json.dumps({"seed": seed, **vars(toy)}))


SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
HEADINGS = [
    "### Image Description:",
    "### Rationales:",
    "### Let's think step by step.",
    "### The final answer is:",
    "### Step 1:",
    "### Step 2:",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_processor(words: list[str]):
    """A Qwen2.5-VL processor over a word-level vocabulary; the answer format's headings are one token each."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(SPECIAL_TOKENS + ["[UNK]"] + words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(heading, normalized=False) for heading in HEADINGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="[UNK]",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        clean_up_tokenization_spaces=False,
    )
    image_processor = Qwen2VLImageProcessor(min_pixels=CELL * CELL, max_pixels=64 * CELL * CELL)
    return Qwen2_5_VLProcessor(image_processor, fast, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def build_toy_model(folder: Path, seed: int, toy: ToyConfig, words: list[str]) -> None:
    """A Qwen2.5-VL with random weights as a complete Hugging Face folder; `words` are its vocabulary."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor = toy_processor(words)
    ids = processor.tokenizer.convert_tokens_to_ids
    head = toy.hidden // 4
    std = 1 / math.sqrt(toy.hidden)  # with transformers' default 0.02 a model this narrow does not learn to see
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(processor.tokenizer),
            hidden_size=toy.hidden,
            intermediate_size=2 * toy.hidden,
            num_hidden_layers=toy.text_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
            },
            initializer_range=std,
            bos_token_id=ids("<|endoftext|>"),
            eos_token_id=ids("<|im_end|>"),
            pad_token_id=ids("<|endoftext|>"),
        ),
        vision_config=dict(
            depth=toy.vision_layers,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=toy.hidden,
            fullatt_block_indexes=[toy.vision_layers - 1],
            window_size=112,
            initializer_range=std,
        ),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        initializer_range=std,
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids("<|im_end|>"), ids("<|endoftext|>")]  # two, as Qwen2.5-VL has
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_toy_clip(folder: Path, seed: int, toy: ToyConfig) -> None:
    """Train a tiny open_clip model on captioned toy pictures (under a minute) and write it as a "local-dir:" folder."""
    import open_clip
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file
    from torchvision.transforms.functional import pil_to_tensor
    from tqdm import tqdm

    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    size, context, steps = 64, 64, toy.clip_steps
    config = {
        "embed_dim": 96,
        "vision_cfg": {"image_size": size, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32},
        "text_cfg": {"context_length": context, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
    }
    model = open_clip.CLIP(**config)
    model.token_embedding.weight.requires_grad_(False).mul_(10)  # fixed random word codes: no gradient of 49,408 rows
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05
    )
    for step in tqdm(range(steps), desc="toy CLIP", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        scenes = [toy_scene(rng) for _ in range(toy.clip_batch)]
        pixels = torch.stack([pil_to_tensor(toy_picture(s, rng).resize((size, size), Image.BICUBIC)) for s in scenes])
        images = model.encode_image((pixels / 255 - 0.5) / 0.5, normalize=True)
        texts = model.encode_text(tokenizer([toy_caption(s, rng) for s in scenes]), normalize=True)
        logits = model.logit_scale.exp() * images @ texts.T
        target = torch.arange(len(scenes))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    preprocess = {"size": size, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1))
