"""The effect of a latent's direction on the logits: the logit lens (nostalgebraist, 2020; Belrose et al., 2303.08112).

    effect = W_U (gain ⊙ d)  −  its mean over the vocabulary        d: the latent's row of W_dec

That is the direct path only, from the residual stream through the final norm's gain and the unembedding. The norm also
divides by the size of the whole stream, which differs from token to token: effects are known up to one factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from monitor.evaluation.latents.texts import Texts
from monitor.evaluation.latents.views import TokenLogit
from producer.lm.errors import ModelError
from producer.lm.model import LanguageModel
from producer.lm.unembedding import Unembedding

RESIDUAL_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "hook_embed")
"""Ends of the names of hooks whose activations are, or are added to, the residual stream."""
TOKENS_SHOWN = 12


class LogitLens:
    """The unembedding of one language model, for the hooks that it reads."""

    def __init__(self, model: LanguageModel, residual_hooks: Sequence[str] = RESIDUAL_HOOKS) -> None:
        self._widths = {hook.name: hook.width for hook in model.hooks}
        self._residual_hooks = tuple(residual_hooks)
        self._unembedding: Unembedding | None = None
        with suppress(ModelError):
            self._unembedding = model.unembedding()

    def effect(self, hook: str, decoder_row: Tensor) -> Tensor | None:
        """The change of the logits, [vocabulary]; None where `hook` is no part of the residual stream.

        Of a module path, that is told by its width: the output of a module of that width is taken to be one.
        `decoder_row` [d_out] ends with what is written at `hook`: a crosscoder's row has its other hooks before it.
        """
        width = self._widths.get(hook)
        if self._unembedding is None or width != len(self._unembedding.gain):
            return None
        is_named = ".hook_" in f".{hook}"
        if (is_named and not hook.endswith(self._residual_hooks)) or hook.endswith(":input"):
            return None
        logits = self._unembedding.logits(decoder_row[-width:].to(self._unembedding.gain.device)).cpu()
        return logits - logits.mean()


def strongest_effects(effect: Tensor, texts: Texts) -> tuple[list[TokenLogit], list[TokenLogit]]:
    """The tokens that are made most and least likely, the strongest effects first."""
    count = min(TOKENS_SHOWN, len(effect))
    promoted, suppressed = effect.topk(count).indices, effect.topk(count, largest=False).indices

    def with_logits(tokens: Tensor) -> list[TokenLogit]:
        return [TokenLogit(token=texts.of(int(token)), logit=float(effect[token])) for token in tokens]

    return with_logits(promoted), with_logits(suppressed)
