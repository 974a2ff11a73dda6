"""Configuration of a Mixture-of-Memories language model in the Hugging Face format, `model_type` "mom"."""

from __future__ import annotations

from transformers.configuration_utils import PretrainedConfig

from mom_layers.hf.attention_config import AttentionSpec, LatentSpec, parse_attention
from mom_layers.hf.fields import FIELDS, LARGEST, TRUTH, shown, whole
from mom_layers.hf.moe_config import MoeSpec, parse_moe
from mom_layers.settings import MixerSettings

INTERMEDIATE_MULTIPLE = 256


class MomConfig(PretrainedConfig):
    model_type = "mom"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list | None = 2,
        tie_word_embeddings: bool = False,
        **values,
    ):
        for field in FIELDS:
            setattr(self, field.name, values.pop(field.name, field.default))
        self._check()
        _check_tokens(self.vocab_size, pad_token_id, bos_token_id, eos_token_id)
        if not TRUTH.accepts(tie_word_embeddings):
            raise ValueError(f"tie_word_embeddings must be {TRUTH.words}, got {shown(tie_word_embeddings)}")
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **values,
        )

    def _check(self) -> None:
        for field in FIELDS:
            field.check_kind(getattr(self, field.name))
        self.mixer_settings()
        for field in FIELDS:
            field.check(getattr(self, field.name))
        self.attention_specs()
        self.moe_spec()
        if self.mlp_size > LARGEST:
            raise ValueError(
                f"hidden_size * hidden_ratio must be at most {LARGEST}, got {self.hidden_size} * {self.hidden_ratio}"
            )

    def mixer_settings(self) -> MixerSettings:
        """Sizes and choices of a MoM layer."""
        return MixerSettings(**{field.setting: getattr(self, field.name) for field in FIELDS if field.setting})

    def attention_specs(self) -> list[AttentionSpec | LatentSpec]:
        """The softmax attention that `attn` describes, one specification an entry; empty without softmax layers."""
        return parse_attention(self.attn, self.hidden_size, self.num_all_layers)

    def attention_of(self, layer: int) -> AttentionSpec | LatentSpec | None:
        """The softmax attention of a layer; None for a MoM layer."""
        return next((spec for spec in self.attention_specs() if layer in spec.layers), None)

    def moe_spec(self) -> MoeSpec | None:
        """The experts that `moe` describes; None in a model without experts."""
        return parse_moe(self.moe, self.num_all_layers)

    @property
    def num_all_layers(self) -> int:
        """The layers of the model, and those of multi-token prediction, which are numbered after them."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def num_mom_layers(self) -> int:
        """The layers of the model whose token mixer is MoM."""
        softmax = {layer for spec in self.attention_specs() for layer in spec.layers if layer < self.num_hidden_layers}
        return self.num_hidden_layers - len(softmax)

    @property
    def mlp_size(self) -> int:
        """Width of the MLP, from ``intermediate_size`` or ``hidden_ratio``."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        ratio = 4 if self.hidden_ratio is None else self.hidden_ratio
        return -(-int(self.hidden_size * ratio * 2 / 3) // INTERMEDIATE_MULTIPLE) * INTERMEDIATE_MULTIPLE


def _check_tokens(vocab_size: int, pad: object, bos: object, eos: object) -> None:
    """Raises ValueError for ids of special tokens that are not ids."""
    token, padding = whole(0).or_none(), whole(0, vocab_size - 1).or_none()
    if not padding.accepts(pad):
        raise ValueError(f"pad_token_id must be {padding.words}, got {shown(pad)}")
    if not token.accepts(bos):
        raise ValueError(f"bos_token_id must be {token.words}, got {shown(bos)}")
    if not all(map(token.accepts, eos if isinstance(eos, list) else [eos])):
        raise ValueError(f"eos_token_id must be {token.words}, or a list of such numbers, got {shown(eos)}")


_ROWS = "\n".join(f"        {field.name}: {field.meaning} [{field.default!r}]." for field in FIELDS)
MomConfig.__doc__ = f"""The keys and defaults of `fla.models.mom`'s configuration: one config.json serves both models.

    Args:
{_ROWS}

    Raises:
        ValueError: a value of another kind, out of its range, or that no layer here can honour.
    """
