"""A model directory in lm-evaluation-harness (extra `eval`).

The harness asks for log-likelihoods of continuations, of whole texts and for text up to
a stop; `adapter` answers with a model that `fh.models.load` read, dense or packed.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flexhinm_jax import arguments
from flexhinm_jax.models import batches, decoder, generation
from flexhinm_jax.models.load import Model
from flexhinm_jax.tracing.sparsify import sparsify

__all__ = ["adapter", "continuations", "likelihoods"]

LENGTH = 2048
"""Longest text of a model that has no limit of its own."""

NEW_TOKENS = 256
"""New tokens where a task says nothing."""


def adapter(model: Model, batch: int = 8) -> Any:
    """The model as `lm_eval` wants it: `lm_eval.simple_evaluate(model=adapter(m))`.

    Args:
      model: a decoder with its tokenizer, dense or packed.
      batch: texts in one step.

    Returns:
      An `lm_eval.api.model.TemplateLM`.

    Raises:
      ValueError: an encoder.
      ImportError: the `eval` extra is not installed.
    """
    if not model.is_decoder:
        raise ValueError(
            f"{model.directory} is an encoder; lm_eval scores continuations, so give a"
            " decoder"
        )
    with arguments.extra("eval", "lm-evaluation-harness is not installed"):
        from lm_eval import utils
        from lm_eval.api.model import TemplateLM
    longest = model.config.max_position_embeddings or LENGTH

    class Adapter(TemplateLM):
        """Answers the requests of the harness."""

        @property
        def eot_token_id(self) -> int:
            """What stands before a text without context."""
            return model.ends[0] if model.ends else model.pad

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **options: Any
        ) -> list[int]:
            """Tokens of a text, with its first token unless that is not wanted."""
            del options
            special = add_special_tokens is not False
            return model.tokenizer.encode(string, add_special_tokens=special).ids

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **options: Any
        ) -> list[tuple[float, bool]]:
            del options
            pairs = [(context, text) for _, context, text in requests]
            return likelihoods(model, pairs, batch)

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            """Of whole texts, every token once, with as much before it as fits."""
            del disable_tqdm
            totals = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.eot_token_id,
                    max_seq_len=longest,
                    context_len=1,
                )
                pairs = [utils.make_disjoint_window(window) for window in windows]
                totals.append(sum(x for x, _ in likelihoods(model, pairs, batch)))
            return totals

        def generate_until(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[str]:
            """Text up to the first stop, greedily."""
            del disable_tqdm
            return [
                continuations(model, self.tok_encode(context), options)
                for context, options in (request.args for request in requests)
            ]

    return Adapter()


def likelihoods(
    model: Model, pairs: Iterable[tuple[Sequence[int], Sequence[int]]], batch: int = 8
) -> list[tuple[float, bool]]:
    """Log-likelihood of texts behind their contexts.

    Args:
      model: a decoder, dense or packed.
      pairs: tokens of the context, at least one, and of the text, at least one. A
        context that does not fit is cut at its beginning.
      batch: pairs in one step.

    Returns:
      (nats, whether every token was the likeliest) of every pair.
    """
    longest = model.config.max_position_embeddings or LENGTH
    lists, counts = [], []
    for context, text in pairs:
        whole = [*context, *text][-(longest + 1) :]
        lists.append(whole)
        counts.append(min(len(text), len(whole) - 1))
    scores: dict[int, tuple[float, bool]] = {}
    score = _scorer(model.config, model.packed)
    # One more than the model reads: the last token is only a target.
    for part in batches.batches(lists, batch, longest + 1, model.pad):
        nats, best = map(np.asarray, score(model.params, part.tokens))
        for k, row in enumerate(part.rows):
            last = len(lists[row]) - 1
            own = slice(last - counts[row], last)
            scores[int(row)] = float(nats[k, own].sum()), bool(best[k, own].all())
    return [scores[row] for row in range(len(lists))]


def continuations(
    model: Model, tokens: Sequence[int], options: dict[str, Any] | None = None
) -> str:
    """The greedy continuation of a text, up to the first stop.

    Args:
      model: a decoder with its tokenizer.
      tokens: of the text; cut at its beginning where it does not fit.
      options: of the harness: "until" (texts that stop), "max_gen_toks"; sampling is
        refused.

    Returns:
      The text before the first stop.

    Raises:
      ValueError: options that ask for sampling.
    """
    options = dict(options or {})
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise ValueError(
            f"the task samples ({options}); the adapter continues greedily: set"
            " do_sample: false"
        )
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    longest = model.config.max_position_embeddings or LENGTH
    steps = min(options.get("max_gen_toks") or NEW_TOKENS, longest - 1)
    kept = list(tokens)[-(longest - steps) :]
    # Few lengths, so that few programs are compiled; shorter ones are padded in front.
    sizes = [n for n in batches.BUCKETS if n < longest - steps]
    length = next((n for n in sizes if n >= len(kept)), longest - steps)
    prompt = np.full((1, length), model.pad, np.int32)
    prompt[0, length - len(kept) :] = kept
    run = _generator(model.config, model.packed, steps, model.ends)
    generated = run(model.params, prompt, jnp.asarray([len(kept)], jnp.int32))
    new = [int(x) for x in generated.tokens[0, : int(generated.lengths[0])]]
    if new and new[-1] in model.ends:
        new.pop()
    whole, before = model.tokenizer.decode([*kept, *new]), model.tokenizer.decode(kept)
    text = whole.removeprefix(before)
    for stop in until:
        text = text.partition(stop)[0] if stop else text
    return text


@functools.cache
def _scorer(config: Any, packed: bool) -> Callable[..., tuple[Array, Array]]:
    """Log-probability of every next token, and whether it is the likeliest."""

    def score(params: Any, tokens: Array) -> tuple[Array, Array]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = decoder.apply(params, inputs, config).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        nats = chosen - jax.nn.logsumexp(logits, axis=-1)
        return nats, jnp.argmax(logits, -1) == targets

    return jax.jit(sparsify(score) if packed else score)


@functools.cache
def _generator(
    config: Any, packed: bool, steps: int, ends: tuple[int, ...]
) -> Callable[..., generation.Generated]:
    """Continues a padded prompt."""

    def go_on(params: Any, prompt: Array, lengths: Array) -> generation.Generated:
        return generation.generate(
            params, prompt, config, steps=steps, lengths=lengths, ends=ends
        )

    return jax.jit(sparsify(go_on) if packed else go_on)
