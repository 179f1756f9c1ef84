"""What comes in: rows, pictures and prompts; at the end, the toy world that the offline default trains on.

Your own data is a JSON list (or JSON lines) in the authors' format, and this is all of it:

    {"qid": "1", "problem": "<image>How many red dots?", "answer": "3", "images": ["dots.png"],
     "key_words": ["red dot"]}

and for the warm-up, sharegpt rows:

    {"messages": [{"role": "user", "content": "<image>How many red dots?"},
                  {"role": "assistant", "content": "### Image Description: ..."}], "images": ["dots.png"]}

`<image>` marks the place of a picture; without marks the pictures come first. Paths are relative to
--image_root (default: the data file's folder) and must stay inside it; a picture may also be a data URI in
base64. A row may list "choices" (["3", "4"]): the prompt shows them as options A, B, ..., and the answer is a
letter, a text or an index. Benchmarks are read from VLMEvalKit's TSV files.

Data files and pictures are untrusted: nothing here evaluates or unpickles them; a complaint is a DataError.
"""

import ast
import base64
import csv
from dataclasses import dataclass, field
import io
import json
import math
import os
from pathlib import Path
import random
import re
from string import ascii_uppercase

from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import save_file
import tokenizers
import torch
import torch.nn.functional as F
from tqdm import tqdm
import transformers as hf

from rewards import option_index, parse_response

IMAGE_MARK = "<image>"
INLINE = "data:"  # begins a picture that stands in the data file itself
MIN_PIXELS = 576  # smaller pictures are enlarged to this area, and by Qwen's processors to 3,136 pixels
MAX_PIXELS = 2**26  # 8192 x 8192; a larger picture is refused before it is decoded
FORMATS = "PNG JPEG WEBP GIF BMP TIFF AVIF JPEG2000 PPM".split()  # not EPS, for which Pillow runs a program
MIN_IMAGE_SIDE = 28  # pixels; the paper drops warm-up rows with smaller pictures
RETHINK = "let me rethink it"  # the paper drops warm-up rows that say so, in any case
LINK_LENGTH = 64  # characters; a shorter image cell of a TSV is the index of another row (VLMEvalKit)
LITERAL_LENGTH = 20_000  # characters of a list in a TSV cell
CATEGORIES = "category l2-category l2_category subject task skills problem_version split kind".split()

# The instruction around a question. Its headings are the paper's, its wording is ours (--prompt_file). [12]
INSTRUCTION = """{question}

Look at the image first, then reason, then answer. Write exactly these sections:
### Image Description: everything that matters for the question: objects, numbers, attributes, positions.
### Rationales: what the question asks for, and how the image answers it.
### Let's think step by step.
### Step 1: the first step of the reasoning.
### Step 2: the next step, and so on, as many as needed.
### The final answer is: only the answer."""


class DataError(ValueError):
    """Bad input, with the file, the row and what to do. Shown to the user without a traceback."""


@dataclass
class Row:
    """One question. `raw` is the row as it was read: difficulty sampling writes it back unchanged."""

    where: str  # "train.json row 12", the beginning of every message about this row
    qid: str
    problem: str
    answer: str  # a letter, if the question has options
    images: list[str] = field(default_factory=list)  # absolute paths, or inline pictures
    key_words: list[str] = field(default_factory=list)
    choices: list[str] | None = None
    category: str = ""  # evaluation also gives the accuracy of each category
    relaxed: bool = False  # evaluation grades by ChartQA's relaxed accuracy
    system: str = ""
    response: str = ""  # what the warm-up learns to write; "" in RL rows
    raw: dict = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------
# Files and rows


def load_rows(path: str, image_root: str = "", need: tuple[str, ...] = ()) -> tuple[list[Row], list[str]]:
    """The rows of a data file, and what is wrong with its other rows ("train.json row 3: ...").

    need: what a row must have besides its question: "answer", "key_words", "response".
    """
    if not os.path.isfile(path):
        raise DataError(f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}")
    try:
        raws = read_tsv_rows(path) if path.lower().endswith(".tsv") else read_json_rows(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not raws:
        raise DataError(f"{path}: no rows; if sampling wrote it, warm up longer or name a --from_data")
    root = os.path.realpath(image_root or os.path.dirname(os.path.abspath(path)))
    rows, problems, seen = [], [], {}
    for i, raw in enumerate(raws):
        where = f"{os.path.basename(path)} row {i}"
        try:
            row = make_row(where, raw, root)
            for name in need:
                if not getattr(row, name):
                    raise DataError(f'no "{name.replace("response", "messages")}", which this stage needs')
            if row.qid in seen:
                raise DataError(f"qid {row.qid[:200]} is already that of {seen[row.qid]}")
            seen[row.qid] = where
            rows.append(row)
        except DataError as error:
            problems.append(f"{where}: {error}")
    return rows, problems


def read_json_rows(path: str) -> list:
    """The rows of a JSON list or of JSON lines. Raises DataError if the file is neither."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
        if not text.startswith("["):  # JSON lines, which end in "\n": a text may hold other line ends
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits
        raise DataError(f"{path}: neither a JSON list nor JSON lines, in UTF-8 ({error})") from None


def read_tsv_rows(path: str) -> list:
    """The rows of a VLMEvalKit TSV, with a list "images" in the place of the cell "image".

    An image cell holds a picture in base64, a list of them, or the index of the row that holds the picture.
    Cells stay the texts that they are: "None" may be an option (pandas, hence VLMEvalKit, drops it).
    """
    csv.field_size_limit(2**31 - 1)  # a picture is one cell
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *lines = [cells for cells in csv.reader(file, delimiter="\t") if cells] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no tab-separated table ({error})") from None
    if lines and (not {"index", "question", "answer"} <= set(header) or len(set(header)) < len(header)):
        raise DataError(f"{path}: needs columns index, question, answer, each once: {str(header)[:300]}")
    rows = [dict(zip(header, cells)) if len(cells) == len(header) else None for cells in lines]
    pictures = {}
    for row in filter(None, rows):
        cell = row.get("image", "")
        if len(cell) > LINK_LENGTH:
            items = cell[1:-1].split(",") if cell.startswith("[") else [cell]  # base64 has no commas
            row["images"] = [INLINE + ";base64," + item.strip(" '\"") for item in items]
            pictures[row["index"]] = row["images"]
            del row["image"]
    for row in filter(None, rows):
        if row.get("image") in pictures:
            row["images"] = pictures[row.pop("image")]
    return rows


def make_row(where: str, raw, root: str) -> Row:
    """A row of any of the formats, told apart by its fields. `root` has its links resolved."""
    if not isinstance(raw, dict):
        raise DataError("a row must be a JSON object, or have as many cells as the table has columns")
    try:
        json.dumps(raw, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(f"it holds what no output file can hold ({error})") from None
    in_kit_columns = {"index", "question"} <= raw.keys() and not {"problem", "messages"} & raw.keys()
    fields = kit_fields(raw) if in_kit_columns else raw
    row = sft_row(where, raw) if {"messages", "conversations"} & raw.keys() else question_row(where, fields)
    if fields.get("images"):
        row.images = [image_path(name, root) for name in text_list(fields, "images")]
    row.category = str(next((raw[name] for name in CATEGORIES if raw.get(name)), ""))
    row.raw, row.relaxed = raw, "chartqa" in where.lower()
    marks = row.problem.count(IMAGE_MARK)
    if marks and marks != len(row.images):
        raise DataError(f"{marks} {IMAGE_MARK} marks for {len(row.images)} pictures")
    return row


def text_field(fields: dict, name: str) -> str:
    """A text, or a number as text."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise DataError(f'field "{name}" is missing, empty or no text')
    return str(value)


def text_list(fields: dict, name: str) -> list[str]:
    """A list of texts; in a TSV cell it is written as "['a', 'b']", which is parsed, never evaluated."""
    value = fields[name]
    if isinstance(value, str) and len(value) <= LITERAL_LENGTH:
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            pass  # the next lines say so
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise DataError(f'field "{name}" must be a list of texts, not too long: {str(fields[name])[:60]}')
    return value


def image_path(name: str, root: str) -> str:
    """The absolute path of a regular file (a pipe would never end) inside `root`, or the inline picture."""
    if name.startswith(INLINE):
        return name
    path = os.path.realpath(os.path.join(root, name.replace("\0", "?")))  # no file's name has a zero byte
    if os.path.commonpath([root, path]) != root:
        raise DataError(f"picture {name[:200]} lies outside the image root {root}")
    if not os.path.isfile(path):
        raise DataError(f"picture {name[:200]} is not in {root} (--image_root), or is no regular file")
    return path


def sft_row(where: str, raw: dict) -> Row:
    """A sharegpt conversation: system message (if any), question, and a response that holds the answer."""
    messages = raw.get("messages")
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    roles = [message.get("role") for message in messages] if is_list else None
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise DataError(f'"messages" must be those of (system,) user, assistant; roles: {str(roles)[:200]}')
    *system, question, response = [text_field(message, "content") for message in messages]
    qid = where if raw.get("qid") is None else text_field(raw, "qid")
    answer = parse_response(response).answer
    return Row(where, qid, question, answer, system="".join(system), response=response)


def question_row(where: str, fields: dict) -> Row:
    """A question in our own fields. With options, the prompt lists them once and the answer is a letter."""
    row = Row(where, *[text_field(fields, name) for name in ("qid", "problem", "answer")])
    if fields.get("key_words"):
        row.key_words = text_list(fields, "key_words")
    if fields.get("choices"):
        row.choices = text_list(fields, "choices")
        index = option_index(row.answer, row.choices, gold=True)
        if index is None or index >= len(ascii_uppercase):
            raise DataError(f"answer {row.answer[:60]!r} is none of the choices {str(row.choices[:26])[:99]}")
        row.answer = ascii_uppercase[index]  # resolved once; `raw` keeps what the file says
        listed = re.search(r"(?:Choices|Options):|^\(?A[).:]", row.problem, re.MULTILINE)
        in_picture = row.choices == list(ascii_uppercase[: len(row.choices)])  # the texts are only letters
        if not listed and not in_picture:
            options = zip(ascii_uppercase, row.choices)
            row.problem += "\nOptions:" + "".join(f"\n{letter}. {text}" for letter, text in options)
    return row


def kit_fields(raw: dict) -> dict:
    """A row in VLMEvalKit's columns, in our own fields. Options are columns A, B, ... or a list."""
    given = {name: value for name, value in raw.items() if value not in (None, "", "None", "nan", "[]")}
    images = given.get("images") or given.get("image_path")
    if not images:
        raise DataError(f"image cell {str(raw.get('image'))[:64]!r} is no picture, nor the index of one")
    if isinstance(images, str) and not images.startswith("["):
        images = [images]
    question = text_field(raw, "query_cot" if "query_cot" in given else "question")
    hint = f"Hint: {raw['hint']}\n" if "hint" in given else ""
    answer = text_field(raw, "answer_option" if "answer_option" in given else "answer")
    answer = re.sub(r"^\[(['\"])([^'\"]*)\1\]$", r"\2", answer)  # ChartQA's ['14']
    fields = {"qid": raw["index"], "problem": hint + question, "answer": answer, "images": images}
    columns = [raw[letter] for letter in ascii_uppercase if letter in raw]
    while columns and columns[-1] == "":
        columns.pop()
    return fields | {"choices": columns or given.get("choices") or given.get("options")}


def write_tsv_predictions(path: str, rows: list[Row], records: list[dict]) -> None:
    """VLMEvalKit's layout for its judge: the input's columns less the picture, and the prediction: the answer
    that was found in the first response, or else the whole response."""
    columns = [name for name in rows[0].raw if name not in ("image", "images")]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, "prediction"], delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        for row, record in zip(rows, records):
            writer.writerow(row.raw | {"prediction": record["extracted"][0] or record["responses"][0]})


# ------------------------------------------------------------------------------------------------------------
# Pictures and prompts


def load_image(path: str, max_pixels: int) -> Image.Image:
    """A picture (see open_picture), resized, aspect kept, to an area between MIN_PIXELS and max_pixels."""
    image = open_picture(path)
    area = image.width * image.height
    scale = math.sqrt(min(max(area, MIN_PIXELS), max_pixels) / area)
    if scale == 1:
        return image
    rounding = math.ceil if scale > 1 else math.floor  # so that rounding does not cross the limit again
    return image.resize([max(1, rounding(side * scale)) for side in image.size], Image.BICUBIC)


def open_picture(path: str) -> Image.Image:
    """A picture as people see it: RGB, EXIF-turned, transparent parts white, an animation's first frame."""
    try:
        with undecoded(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}: reduce it")
            if image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode} has no agreed white: save it in 8 or 16 bits")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # 65,535 becomes 255; Pillow would clip
                image = image.convert("I").point(lambda value: value * (1 / 257))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # over broken bytes Pillow's decoders raise whatever goes wrong in them
        name = path[:40] + "..." if path.startswith(INLINE) else path
        raise DataError(f"picture {name} is not readable ({error or type(error).__name__})") from None


def undecoded(path: str) -> Image.Image:
    """A picture of which only the header has been read."""
    inline = path.startswith(INLINE)
    file = io.BytesIO(base64.b64decode(path.partition(",")[2])) if inline else path
    return Image.open(file, formats=FORMATS)


def filter_warmup_rows(rows: list[Row]) -> tuple[list[Row], dict[str, int]]:
    """The paper's two warm-up filters, counted: responses with "let me rethink it", small pictures. [9]"""
    kept, dropped = [], {"rethink": 0, "small_picture": 0}
    for row in rows:
        if RETHINK in row.response.lower():
            dropped["rethink"] += 1
        elif any(smaller_side(path) < MIN_IMAGE_SIDE for path in row.images):
            dropped["small_picture"] += 1
        else:
            kept.append(row)
    return kept, dropped


def smaller_side(path: str) -> int:
    with undecoded(path) as image:
        return min(image.size)


def has_instruction(row: Row) -> bool:
    """Whether the question itself asks for the answer format, as published warm-up rows often do."""
    return "### image description" in row.problem.lower()


def chat_messages(row: Row, instruction: str) -> list[dict]:
    """The conversation up to the response, in the form that Hugging Face chat templates take.

    All stages ask in the same words: a question stands in `instruction` unless it has one of its own.
    """
    text = row.problem if has_instruction(row) else instruction.replace("{question}", row.problem)
    if IMAGE_MARK not in text:
        text = IMAGE_MARK * len(row.images) + text
    parts = [part for part in re.split(f"({IMAGE_MARK})", text) if part]
    content = [{"type": "image"} if part == IMAGE_MARK else {"type": "text", "text": part} for part in parts]
    system = [{"role": "system", "content": [{"type": "text", "text": row.system}]}] if row.system else []
    return system + [{"role": "user", "content": content}]


# ============================================================================================================
# The toy world. A reader of the paper can stop here.
# Colored shapes on a grid; count them, or count the rest. It is written to disk once: pictures, data files
# as above, a Hugging Face model folder, an open_clip folder. From then on only paths matter: the toy takes
# the same road as Qwen2.5-VL and FG-CLIP. What lets the method show its effect:
#   - The teacher sees wrong, always in the same way: 3 of 4 triangles are squares to it. Its student's greedy
#     description is then wrong, but every fourth sample is right: enough for RL to find the truth.
#   - It reasons wrong in one decision: 55 times of 100 it forgets to subtract, so greedily its student always
#     forgets, and half of the samples do not: medium questions. Questions about colors only are easy.
#   - 1 RL question of 10 asks for a shape, 6 held-out questions of 10 do: the answer's reward alone is a bad
#     teacher of shapes. --toy_shapes sets this share.
#   - Prices, 1 question of 8, are not in the warm-up: hard questions. A stage asks each of the 2,000 RL
#     questions once or twice: none is learned by heart. 1,000 held-out ones: a standard error of 1.5 points.
# ============================================================================================================

COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 215, 50)}
COLOR_NAMES = list(COLORS)
SHAPES = ["circle", "square", "triangle"]
PLACES = ["top-left", "top-middle", "top-right", "bottom-left", "bottom-middle", "bottom-right"]
CELL = 28  # pixels: one cell of the grid is one image token


@dataclass
class ToyConfig:
    """Sizes of the toy world, and how often its teacher errs."""

    sft_rows: int = 6000
    rl_rows: int = 2000
    test_rows: int = 1000
    asks_shapes: float = 0.1  # share of the RL questions; elsewhere 0.6
    triangle_as_square: float = 0.75
    forgets_to_subtract: float = 0.55
    object_noise: float = 0.06  # objects that the teacher leaves out or misnames, at random
    hidden: int = 128
    text_layers: int = 4
    vision_layers: int = 2
    clip_steps: int = 60
    clip_batch: int = 64


def build_toy_world(folder: str, seed: int, toy: ToyConfig) -> None:
    """Write images/, sft.json, train.json, test.json, prompt.txt, model/ and clip/ under `folder`.

    Everything follows from `seed`. A complete folder is left alone; one of another seed is a DataError.
    """
    done = Path(folder, "toy.json")
    if done.exists():
        old = json.loads(done.read_text())
        made = old["seed"], old.get("asks_shapes")
        if made != (seed, toy.asks_shapes):
            raise DataError("{} was made with --seed {} --toy_shapes {}: new --run_dir".format(folder, *made))
        return
    print(f"toy world: writing pictures, rows, a tiny Qwen2.5-VL and a tiny CLIP to {folder}", flush=True)
    Path(folder, "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    asks = ["count"] * 7 + ["subtract"] * 7 + ["price"] * 2
    kinds = {"sft": ["count"] * 3 + ["subtract"] * 9, "train": asks, "test": asks}
    for name, count in ("sft", toy.sft_rows), ("train", toy.rl_rows), ("test", toy.test_rows):
        share = toy.asks_shapes if name == "train" else 0.6
        asked = [toy_question(rng, kinds[name], share) for _ in range(count)]
        teacher = toy if name == "sft" else None
        rows = [toy_row(folder, f"{name}{i}", question, teacher) for i, question in enumerate(asked)]
        Path(folder, f"{name}.json").write_text(json.dumps(rows, indent=1))
    Path(folder, "prompt.txt").write_text("{question}")  # the toy model has no use for an instruction
    words = WORDS.split() + [str(n) for n in range(9 * len(PLACES) + 1)]
    build_toy_model(Path(folder, "model"), seed, toy, words)
    build_toy_clip(Path(folder, "clip"), seed, toy)
    done.write_text(json.dumps({"seed": seed, **vars(toy)}))


@dataclass
class ToyQuestion:
    scene: list[tuple[str, str, str]]  # objects (color, shape, place), in reading order
    kind: str  # count, subtract or price
    about: str  # a color or a shape
    prices: tuple[int, int]  # of an object about which is asked, and of any other
    rng: random.Random  # draws the picture and the teacher's mistakes

    def text(self) -> str:
        things = f"{self.about}s" if self.about in SHAPES else f"{self.about} objects"
        if self.kind == "count":
            return f"How many {things} are there ?"
        if self.kind == "subtract":
            return f"Subtract all {things} . How many objects are left ?"
        return "{} cost {} coins , all others {} . How many coins is that ?".format(things, *self.prices)

    def solve(self, scene, kind: str) -> tuple[str, list, int]:
        """(rationale, the objects that count, answer), as if `kind` were asked of `scene`."""
        same = [thing for thing in scene if self.about in thing]
        others = [thing for thing in scene if self.about not in thing]
        if kind == "price":
            return "", [], self.prices[0] * len(same) + self.prices[1] * len(others)
        rationale = f"count {self.about}" if kind == "count" else f"leave out {self.about} , count the rest"
        counted = same if kind == "count" else others
        return rationale, counted, len(counted)


def toy_scene(rng: random.Random) -> list[tuple[str, str, str]]:
    cells = sorted(rng.sample(range(len(PLACES)), rng.choice([1, 1, 2, 2, 3, 3, 4])))
    return [(rng.choice(COLOR_NAMES), rng.choice(SHAPES), PLACES[cell]) for cell in cells]


def toy_question(rng: random.Random, kinds: list[str], asks_shapes: float) -> ToyQuestion:
    about = rng.choice(SHAPES if rng.random() < asks_shapes else COLOR_NAMES)
    return ToyQuestion(toy_scene(rng), rng.choice(kinds), about, (rng.randint(2, 9), rng.randint(2, 9)), rng)


def toy_row(folder: str, name: str, asked: ToyQuestion, teacher: ToyConfig | None) -> dict:
    """Write the picture; return an RL row, or a warm-up row with the teacher's response."""
    image = f"images/{name}.png"
    toy_picture(asked.scene, asked.rng).save(Path(folder, image))
    if teacher:
        said = {"user": "<image>" + asked.text(), "assistant": toy_response(asked, teacher)}
        messages = [{"role": role, "content": content} for role, content in said.items()]
        return {"messages": messages, "images": [image]}
    words = [f"{len(asked.scene)} objects"]  # number, objects, spatial relations, as the paper's teacher
    for color, shape, place in asked.scene:
        words += [f"{color} {shape}", f"{shape} at {place}"]
    hangs = asked.kind != "price" and asked.about in SHAPES[1:]  # on what the teacher sees wrong
    kind = "triangle, square" if hangs else asked.kind
    answer = str(asked.solve(asked.scene, asked.kind)[2])
    row = {"qid": name, "problem": "<image>" + asked.text(), "answer": answer, "images": [image]}
    return row | {"key_words": list(dict.fromkeys(words)), "kind": kind}


def toy_picture(scene, rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (3 * CELL, 2 * CELL), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for color, shape, place in scene:
        row, column = divmod(PLACES.index(place), 3)
        x, y = (column + 0.5) * CELL + rng.uniform(-2, 2), (row + 0.5) * CELL + rng.uniform(-2, 2)
        r = rng.uniform(9, 11)
        if shape == "circle":
            draw.ellipse([x - r, y - r, x + r, y + r], fill=COLORS[color])
        elif shape == "square":
            draw.rectangle([x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9], fill=COLORS[color])
        else:
            draw.polygon([(x, y - r), (x - r, y + r * 0.85), (x + r, y + r * 0.85)], fill=COLORS[color])
    return image


def told(things) -> str:
    return " , ".join(f"{color} {shape} at {place}" for color, shape, place in things) or "none"


def toy_response(asked: ToyQuestion, teacher: ToyConfig) -> str:
    """The teacher's response in the paper's answer format, with the teacher's mistakes."""
    rng, seen = asked.rng, []
    for color, shape, place in asked.scene:
        if shape == "triangle" and rng.random() < teacher.triangle_as_square:
            shape = "square"
        if rng.random() < teacher.object_noise:
            if rng.random() < 0.5:
                continue  # left out
            color, shape = rng.choice(COLOR_NAMES), rng.choice(SHAPES)  # misnamed
        seen.append((color, shape, place))
    forgets = rng.random() < teacher.forgets_to_subtract
    rationale, counted, answer = asked.solve(seen, "count" if forgets else asked.kind)
    checks = " , ".join(f"{told([thing])} {'yes' if thing in counted else 'no'}" for thing in seen) or "none"
    return (
        f"### Image Description: There are {len(asked.scene)} objects . {told(seen)} .\n"
        f"### Rationales: {rationale} .\n### Let's think step by step.\n"
        f"### Step 1: {checks} .\n### Step 2: that makes {answer} .\n### The final answer is: {answer}"
    )


WORDS = "user assistant system none that makes count the leave out rest There are objects . , ? at How many "
WORDS += "yes no is Subtract all left cost coins others circles squares triangles "
WORDS += " ".join(COLOR_NAMES + SHAPES + PLACES)
TOKENS = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
HEADINGS = ["### Image Description:", "### Rationales:", "### Let's think step by step."]
HEADINGS += ["### The final answer is:", "### Step 1:", "### Step 2:"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_processor(words: list[str]):
    """A Qwen2.5-VL processor over a word-level vocabulary; each heading of the answer format is one token."""
    special = [f"<|{name}|>" for name in TOKENS]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(special + ["[UNK]"] + words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([tokenizers.AddedToken(heading, normalized=False) for heading in HEADINGS])
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "[UNK]"}
    roles["additional_special_tokens"] = special[1:]
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)
    images = hf.Qwen2VLImageProcessor(min_pixels=CELL * CELL, max_pixels=64 * CELL * CELL)
    return hf.Qwen2_5_VLProcessor(images, fast, hf.Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def build_toy_model(folder: Path, seed: int, toy: ToyConfig, words: list[str]) -> None:
    """A Qwen2.5-VL with random weights as a complete Hugging Face folder; `words` are its vocabulary."""
    processor = toy_processor(words)
    token = {name: processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in TOKENS}
    std = 1 / math.sqrt(toy.hidden)  # with transformers' 0.02, a model this narrow does not learn to see
    pad, end = token["endoftext"], token["im_end"]
    text = {"hidden_size": toy.hidden, "intermediate_size": 2 * toy.hidden, "initializer_range": std}
    text |= {"num_hidden_layers": toy.text_layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"max_position_embeddings": 4096, "vocab_size": len(processor.tokenizer)}
    text |= {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}
    sections = [toy.hidden // 32, 3 * toy.hidden // 64, 3 * toy.hidden // 64]
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": toy.hidden}
    vision |= {"depth": toy.vision_layers, "fullatt_block_indexes": [toy.vision_layers - 1]}
    vision |= {"initializer_range": std}
    marks = {"image_token_id": token["image_pad"], "video_token_id": token["video_pad"]}
    marks |= {"vision_start_token_id": token["vision_start"], "vision_end_token_id": token["vision_end"]}
    torch.manual_seed(seed)
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, initializer_range=std, **marks)
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [end, pad]  # two, as Qwen2.5-VL has
    model.generation_config.pad_token_id = pad
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def toy_caption(scene, rng: random.Random) -> str:
    """What the toy CLIP learns from: whole and partial lists in any order, with and without places."""
    things, style = rng.sample(scene, len(scene)), rng.randrange(3)
    if style == 0:
        return "a picture of " + " and ".join(f"a {color} {shape}" for color, shape, _ in things)
    return f"There are {len(scene)} objects . {told(scene if style == 1 else things)} ."


def build_toy_clip(folder: Path, seed: int, toy: ToyConfig) -> None:
    """Train a tiny open_clip model on captioned toy pictures (under a minute), as a "local-dir:" folder."""
    import open_clip
    from torchvision.transforms.functional import pil_to_tensor

    torch.manual_seed(seed)
    rng, size = random.Random(seed + 1), 64
    vision = {"image_size": size, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32}
    text = {"context_length": 64, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2}
    config = {"embed_dim": 96, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**config)
    model.token_embedding.weight.requires_grad_(False).mul_(10)  # fixed codes: no gradient of 49,408 rows
    tokenizer = open_clip.SimpleTokenizer(context_length=64)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    for step in tqdm(range(toy.clip_steps), desc="toy CLIP", leave=False):
        decay = 0.5 * (1 + math.cos(math.pi * step / toy.clip_steps))
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20) * decay
        scenes = [toy_scene(rng) for _ in range(toy.clip_batch)]
        pictures = [toy_picture(scene, rng).resize((size, size), Image.BICUBIC) for scene in scenes]
        pixels = torch.stack([pil_to_tensor(picture) for picture in pictures])
        captions = tokenizer([toy_caption(scene, rng) for scene in scenes])
        images, texts, scale = model((pixels / 255 - 0.5) / 0.5, captions)
        logits, target = scale * images @ texts.T, torch.arange(len(scenes))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"size": size, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"model_cfg": config, "preprocess_cfg": preprocess | {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))
