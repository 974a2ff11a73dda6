"""Mixture-of-Memories language model for Hugging Face's transformers (arXiv 2502.13685), `model_type` "mom".

Parameters have the names and shapes of `fla.models.mom`.
Shape legend: sequences B, tokens T, hidden size D, routed memories M, routed memories that a token goes to k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from mom_layers.hf.attention_and_mlp import RMSNorm
from mom_layers.hf.blocks import MomBlock, PredictionLayer
from mom_layers.hf.cache import CACHE_NAME, MomCache, one_cache
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.experts import ExpertRouter
from mom_layers.hf.mixer import RecurrentAttention
from mom_layers.hf.projections import MemoryLinear, MemoryProjections, ShortConvolution
from mom_layers.hf.sequence import TokenSequence, described_documents
from mom_layers.recur.rules import get_rule
from mom_layers.route.router import load_balancing_loss


@dataclass
class MomModelOutput(MoeModelOutputWithPast):
    """The output of :class:`MomModel`; ``expert_logits`` are those of the experts' routers, [B * T, E] a layer."""

    expert_logits: tuple[torch.Tensor, ...] | None = None


class MomPreTrainedModel(PreTrainedModel):
    config_class = MomConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MomBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _input_embed_layer = "embeddings"
    _is_stateful = True
    # OpenSparseLLMs' layers have this parameter, and compute nothing with it.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.D$"]

    def __init__(self, config: MomConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # transformers 4 refuses names of parameters that the model does not have: those of other rules.
        attention = {layer for spec in config.attention_specs() for layer in spec.layers}
        exact = set(get_rule(config.mom_backend).parameter_names) if len(attention) < config.num_all_layers else set()
        moe = config.moe_spec()
        exact |= {"e_score_correction_bias"} if moe is not None and moe.expert_bias else set()
        if exact:
            self._keep_in_fp32_modules_strict = sorted(exact)

    def post_init(self) -> None:
        # transformers 4 refuses names of buffers here, although it loads buffers in float32 by these names.
        exact = set(self._keep_in_fp32_modules_strict or ())
        if exact:
            names = {name.rsplit(".", 1)[-1] for name, _ in self.named_parameters()}
            self._keep_in_fp32_modules_strict = sorted(exact & names)
        super().post_init()
        if exact:
            self._keep_in_fp32_modules_strict = exact | set(self._keep_in_fp32_modules_strict)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """The memories have one implementation, and the softmax layers PyTorch's. Raises ValueError for a request of
        another one.
        """
        if attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is not supported: memories have no attention weights, "
                "and softmax layers use PyTorch's scaled_dot_product_attention; leave the argument out"
            )
        return "eager"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal projections and embeddings, uniform convolutions, and the memory rule's own parameters."""
        if isinstance(module, MemoryProjections):
            return  # the linear maps of the memories are modules of their own
        if isinstance(module, (nn.Linear, MemoryLinear, nn.Embedding, ExpertRouter)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ShortConvolution):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, RecurrentAttention):
            module.reset_rule_parameters()


class MomModel(MomPreTrainedModel):
    """Embeddings, the layers and the last norm."""

    def __init__(self, config: MomConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MomBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if config.num_nextn_predict_layers:
            further = range(config.num_hidden_layers, config.num_all_layers)
            self.mtp = nn.ModuleList([PredictionLayer(config, index) for index in further])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: MomCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: MomCache | None = None,
        **kwargs,
    ) -> MomModelOutput:
        """
        Args:
            input_ids: [B, T], or ``inputs_embeds`` [B, T, D] instead.
            attention_mask: [B, tokens in the cache + T], 0 at padding, which reaches no memory and no softmax.
            position_ids: [B, T] for the softmax layers; counted from the mask when absent.
            past_key_values: the cache of an earlier call over the same sequences, to continue from; the call changes
                the cache in place. Also taken as ``cache``, the argument's name from transformers 5.24 on.
            use_cache: return a cache. When absent, the configuration decides in evaluation; training returns none.
            output_hidden_states: return the hidden states between the layers.
            output_router_logits: return the router's logits of every MoM layer, and those of the experts' routers; when
                absent, while training only.
            cu_seqlens: [documents + 1], borders of documents packed into the rows: nothing crosses a border. Also taken
                under transformers' name, ``cu_seq_lens_q``. ``seq_idx`` [B, T], the number of every token's document,
                and ``position_ids`` that restart describe borders as well. Packed rows leave no cache.

        Raises:
            ValueError: arguments that exclude each other, or shapes that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions is not supported: a memory has no attention weights")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = one_cache(past_key_values, cache)
        cu_seqlens, seq_idx = described_documents(cu_seqlens, kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_router_logits is None:
            output_router_logits = self.training

        batch, length = inputs_embeds.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        sequence = TokenSequence(
            batch, length, past, inputs_embeds.device, attention_mask, position_ids, cu_seqlens, self.training, seq_idx
        )
        if sequence.packed and cache is not None:
            raise ValueError("packed documents leave no cache: call the model without past_key_values")
        if use_cache and cache is None and not sequence.packed:
            cache = MomCache(self.config)
        hidden_states = inputs_embeds
        all_hidden_states, all_router_logits, all_expert_logits = [], [], []
        for layer in self.layers:
            all_hidden_states.append(hidden_states)
            hidden_states, router_logits, expert_logits = layer(hidden_states, sequence=sequence, cache=cache)
            if router_logits is not None:
                all_router_logits.append(router_logits)
            if expert_logits is not None:
                all_expert_logits.append(expert_logits)
        hidden_states = self.norm(hidden_states)
        all_hidden_states.append(hidden_states)
        return MomModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            router_logits=tuple(all_router_logits) if output_router_logits else None,
            expert_logits=tuple(all_expert_logits) if output_router_logits else None,
            **{CACHE_NAME: cache},
        )


class MomForCausalLM(MomPreTrainedModel, GenerationMixin):
    """The language model: :class:`MomModel` and the output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: MomConfig):
        super().__init__(config)
        self.model = MomModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        """The arguments of the next forward pass of ``generate()``, as transformers makes them."""
        positions, columns = kwargs.get("position_ids"), kwargs.get("cache_position")
        if positions is not None and columns is not None and positions.data_ptr() == columns.data_ptr():
            # With prefill_chunk_size, transformers 4.57 takes a token's column for its position, on the left of which
            # there may be padding. Without positions, they are counted from the mask.
            kwargs["position_ids"] = None
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: MomCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cu_seqlens: torch.Tensor | None = None,
        cache: MomCache | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """
        Args:
            labels: [B, T]; logits at t are compared with the label at t + 1, and -100 is left out.
            logits_to_keep: the number of last positions that get logits, or the indices of positions. All positions get
                logits where the number is 0, and together with ``labels``.

        The other arguments are :meth:`MomModel.forward`'s. With ``output_router_logits`` (by default while training)
        the output has an ``aux_loss``, which is k when the memories are balanced, and ``loss`` contains
        ``aux_loss_scale`` times ``aux_loss``, and the balancing loss of the experts with the weight in ``moe``.

        Raises:
            ValueError: arguments that exclude each other, or shapes that do not fit.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            cu_seqlens=cu_seqlens,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept]
        logits = self.lm_head(hidden_states)

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        mask = None if attention_mask is None else attention_mask[:, -outputs.last_hidden_state.shape[1] :]
        if outputs.router_logits:
            aux_loss = self._balancing_loss(outputs.router_logits, mask)
            if loss is not None:
                share = share_of_batch(labels, kwargs)
                loss = loss + share * self.config.aux_loss_scale * aux_loss.to(loss.device)
        moe = self.config.moe_spec() if outputs.expert_logits and loss is not None else None
        if moe is not None and moe.aux_loss_scale:
            balancing = self._expert_balancing_loss(outputs.expert_logits, mask).to(loss.device)
            loss = loss + share_of_batch(labels, kwargs) * moe.aux_loss_scale * balancing
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _expert_balancing_loss(
        self, expert_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The sum over the layers with experts of a loss that is 1 when a layer's experts are balanced."""
        routers = [layer.mlp.gate for layer in self.model.layers if hasattr(layer.mlp, "experts")]
        losses = []
        for router, logits in zip(routers, expert_logits, strict=True):
            kept = logits if mask is None else logits[mask.flatten().bool().to(logits.device)]
            losses.append(router.balancing_loss(kept))
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    def _balancing_loss(self, router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> torch.Tensor:
        """Switch Transformer's loss with all k choices of a token counted: its value is k, not 1, when balanced.

        router_logits: [B * T, M] a layer; mask [B, T], 0 at padding, which is left out.
        """
        if mask is not None:
            kept = mask.flatten().bool()
            router_logits = tuple(logits[kept.to(logits.device)] for logits in router_logits)
        if not self.config.use_layer_wise_balance:
            router_logits = (torch.cat([logits.to(router_logits[0].device) for logits in router_logits]),)
        topk = self.config.topk
        losses = [topk * load_balancing_loss(logits, logits.topk(topk).indices) for logits in router_logits]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} is not supported: a memory's state has a constant size already; leave "
                "the argument out"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = MomCache(self.config)


class MomForSequenceClassification(MomPreTrainedModel):
    """:class:`MomModel` and a linear layer on the last token of a sequence that is not padding."""

    def __init__(self, config: MomConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MomModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            attention_mask: [B, T], 0 at padding on either side.
            labels: [B] classes; [B] or [B, labels] numbers where ``config.num_labels`` is 1 or
                ``config.problem_type`` is "regression"; [B, labels] zeros and ones for
                "multi_label_classification".

        The other arguments are :meth:`MomModel.forward`'s. The logits are [B, labels].

        Raises:
            ValueError: a batch of several sequences with neither ``attention_mask`` nor ``config.pad_token_id``, or
                shapes that do not fit.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            return_dict=True,
            **kwargs,
        )
        last = self._last_tokens(input_ids, attention_mask, outputs.last_hidden_state)
        rows = torch.arange(last.shape[0], device=last.device)
        logits = self.score(outputs.last_hidden_state[rows, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def _last_tokens(self, input_ids, attention_mask, hidden_states) -> torch.Tensor:
        """Index [B] of every sequence's last token that is not padding."""
        batch, length = hidden_states.shape[:2]
        positions = torch.arange(length, device=hidden_states.device)
        if attention_mask is not None:
            real = attention_mask.bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        elif batch == 1:
            real = torch.ones(1, length, dtype=torch.bool, device=hidden_states.device)
        else:
            raise ValueError("several sequences need an attention_mask, or pad_token_id in the configuration")
        return torch.where(real, positions, 0).amax(1)


def share_of_batch(labels: torch.Tensor, options: dict) -> torch.Tensor | float:
    """The share of a step's targets that these labels hold: 1 where the caller does not split a step.

    A step may be split into micro-batches and over processes. The language-model loss is then divided by the number of
    targets of the whole step (``num_items_in_batch``), and the micro-batches' losses are added up. The balancing loss,
    a mean over tokens, is weighted by the share, so that the losses add up to a mean over the step.
    """
    total = options.get("num_items_in_batch")
    if total is None:
        return 1.0
    targets = options.get("shift_labels")
    targets = labels[..., 1:] if targets is None else targets
    return (targets != options.get("ignore_index", -100)).sum() / total
