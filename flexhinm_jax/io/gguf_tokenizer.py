"""The tokenizer inside a GGUF file as a fast tokenizer of the `tokenizers` package.

Two kinds exist: "gpt2", byte-level BPE with its merges written out, and "llama", a
SentencePiece vocabulary with scores, whose merges follow from the scores. How text is
cut before merging is a name in the file; the cuts themselves are those of the original
tokenizers.
"""

from collections.abc import Callable
from typing import Any

from flexhinm_jax import arguments

__all__ = ["PRE_TOKENIZERS", "configuration", "generation", "tokenizer"]

NORMAL, UNKNOWN, CONTROL, USER = 1, 2, 3, 4
"""Values of `tokenizer.ggml.token_type`."""

SPACE = "▁"

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _by_words(digits: str) -> Callable[[Any], Any]:
    """Cuts at the words of GPT-4's pattern, with this pattern for digits."""

    def build(tokenizers: Any) -> Any:
        pre, pattern = tokenizers.pre_tokenizers, WORDS.replace("DIGITS", digits)
        split = pre.Split(tokenizers.Regex(pattern), "isolated")
        return pre.Sequence(
            [split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    return build


def _digits_first(tokenizers: Any) -> Any:
    pre = tokenizers.pre_tokenizers
    return pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )


def _gpt2(tokenizers: Any) -> Any:
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)


PRE_TOKENIZERS: dict[str, Callable[[Any], Any]] = {
    "gpt-2": _gpt2,
    "smollm": _digits_first,
    "qwen2": _by_words(r"\p{N}"),
    "llama-bpe": _by_words(r"\p{N}{1,3}"),
}
"""How text is cut, by the name in `tokenizer.ggml.pre`."""


def tokenizer(meta: Any) -> Any:
    """The tokenizer of a file.

    Args:
      meta: `gguf.Metadata` of the file.

    Returns:
      A `tokenizers.Tokenizer`; `save` writes `tokenizer.json`.

    Raises:
      ValueError: a kind or a cut of text that is not known, or a part is missing.
      ImportError: the `hf` extra is not installed.
    """
    with arguments.extra("hf", "writing a tokenizer needs the tokenizers package"):
        import tokenizers
    kind = meta.need("tokenizer.ggml.model")
    if kind not in KINDS:
        raise ValueError(
            f"{meta.path}: a tokenizer of kind {kind!r} is not supported; supported are"
            f" {', '.join(KINDS)}"
        )
    built = KINDS[kind](meta, tokenizers)
    _add_tokens(built, meta, tokenizers)
    _add_ends(built, meta, tokenizers)
    return built


def _byte_level(meta: Any, tokenizers: Any) -> Any:
    """Byte-level BPE, as GPT-2 has it."""
    cut = meta.get("tokenizer.ggml.pre", "gpt-2")
    if cut not in PRE_TOKENIZERS:
        raise ValueError(
            f"{meta.path}: tokenizer.ggml.pre {cut!r} is not supported; supported are"
            f" {', '.join(PRE_TOKENIZERS)}"
        )
    vocabulary = {t: k for k, t in enumerate(meta.need("tokenizer.ggml.tokens"))}
    merges = [tuple(m.split(" ", 1)) for m in meta.need("tokenizer.ggml.merges")]
    model = tokenizers.models.BPE(
        vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe"
    )
    built = tokenizers.Tokenizer(model)
    if cut == "qwen2":
        built.normalizer = tokenizers.normalizers.NFC()
    built.pre_tokenizer = PRE_TOKENIZERS[cut](tokenizers)
    built.decoder = tokenizers.decoders.ByteLevel()
    return built


def _sentencepiece(meta: Any, tokenizers: Any) -> Any:
    """BPE of a SentencePiece vocabulary: bytes stand in for unknown characters."""
    tokens = meta.need("tokenizer.ggml.tokens")
    scores = meta.need("tokenizer.ggml.scores")
    types = meta.need("tokenizer.ggml.token_type")
    vocabulary = {t: k for k, t in enumerate(tokens)}
    unknown = meta.get("tokenizer.ggml.unknown_token_id")
    model = tokenizers.models.BPE(
        vocab=vocabulary,
        merges=merges_of(tokens, scores, types),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    built = tokenizers.Tokenizer(model)
    normal, decode = tokenizers.normalizers, tokenizers.decoders
    prefix = meta.get("tokenizer.ggml.add_space_prefix", meta.name != "gemma3")
    spaces = normal.Replace(" ", SPACE)
    first = [normal.Prepend(SPACE)] if prefix else []
    built.normalizer = normal.Sequence([*first, spaces])
    steps = [decode.Replace(SPACE, " "), decode.ByteFallback(), decode.Fuse()]
    built.decoder = decode.Sequence(
        steps + ([decode.Strip(" ", 1, 0)] if prefix else [])
    )
    return built


KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
"""Builders by the name in `tokenizer.ggml.model`."""


def merges_of(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies, first merge first.

    Every way to put a piece together from two others is a merge, as early as the score
    of the piece is high; SentencePiece merges the pair with the best score.

    Args:
      tokens: the pieces, by id.
      scores: log-probabilities, or minus the rank.
      types: kinds of the pieces; only normal and user-defined ones are put together.
    """
    at = {token: k for k, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind not in (NORMAL, USER):
            continue
        pairs = ((token[:k], token[k:]) for k in range(1, len(token)))
        own = [(left, right) for left, right in pairs if left in at and right in at]
        own.sort(key=lambda pair: (at[pair[0]], at[pair[1]]))
        merges += [(score, len(left), len(right), (left, right)) for left, right in own]
    merges.sort(key=lambda m: m[:3], reverse=True)
    return [pair for *_, pair in merges]


def _add_tokens(built: Any, meta: Any, tokenizers: Any) -> None:
    """Control tokens are never cut, and are left out of decoded text."""
    tokens = meta.need("tokenizer.ggml.tokens")
    types = meta.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    kept: dict[bool, list[Any]] = {True: [], False: []}
    for token, kind in zip(tokens, types, strict=True):
        if kind in (UNKNOWN, CONTROL, USER):
            special = kind != USER
            added = tokenizers.AddedToken(token, special=special, normalized=False)
            kept[special].append(added)
    built.add_special_tokens(kept[True])
    built.add_tokens(kept[False])


def _add_ends(built: Any, meta: Any, tokenizers: Any) -> None:
    """Texts begin and end with the tokens that the file asks for."""
    tokens = meta.need("tokenizer.ggml.tokens")
    begins = meta.get("tokenizer.ggml.pre") == "llama-bpe"
    begins = begins or meta.get("tokenizer.ggml.model") == "llama"
    ends = {}
    for name, default in (("bos", begins), ("eos", False)):
        at = meta.get(f"tokenizer.ggml.{name}_token_id")
        if meta.get(f"tokenizer.ggml.add_{name}_token", default) and at is not None:
            ends[name] = (tokens[at], int(at))
    if ends:
        first, last = ends.get("bos"), ends.get("eos")
        single = [*([first[0]] if first else []), "$A", *([last[0]] if last else [])]
        pair = [*single, *(piece.replace("$A", "$B") for piece in single)]
        built.post_processor = tokenizers.processors.TemplateProcessing(
            single=single,
            pair=[p if p.startswith("$A") or "$B" not in p else "$B:1" for p in pair],
            special_tokens=sorted(set(ends.values())),
        )


def configuration(meta: Any) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`."""
    tokens = meta.need("tokenizer.ggml.tokens")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in names.items():
        at = meta.get(f"tokenizer.ggml.{theirs}_token_id")
        if at is not None:
            config[f"{ours}_token"] = tokens[at]
    config["model_max_length"] = meta.size("context_length")
    config["clean_up_tokenization_spaces"] = False
    template = meta.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    return config


def generation(meta: Any) -> dict[str, Any]:
    """The contents of `generation_config.json`: which tokens begin and end a text."""
    names = ("eos_token_id", "eot_token_id")
    ends = [meta.get(f"tokenizer.ggml.{name}") for name in names]
    ends = list(dict.fromkeys(int(x) for x in ends if x is not None))
    start = meta.get("tokenizer.ggml.bos_token_id")
    return {
        "bos_token_id": start,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
