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
import functools
import glob
import itertools
import json
import math
import os
import pickle
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
