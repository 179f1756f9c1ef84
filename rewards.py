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
import functools
import glob
import itertools
import json
import math
import os
import pickle
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
