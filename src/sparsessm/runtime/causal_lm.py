"""A `Model` in the words of transformers: for its `generate()`, and for tools that expect a stock model.

Place in the flow: beside `generation.py`, over the same engine; nothing else imports it. `causal_lm(model)`
can be given to lm-evaluation-harness (`HFLM(pretrained=causal_lm(model), tokenizer=model.tokenizer)`), which
then runs at the runtime's speed. It has no parameters, so it cannot be trained, saved or moved.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..checkpoint.given import undisturbed
from .base import Engine
from .generation import Model


class Carried:
    """What `forward` hands from call to call: the states of a batch, and how many tokens made them.

    Attributes:
        states: float32 (B, state_size), wider with attention.
        length: tokens read so far, padding included.
    """

    def __init__(self, states: Tensor, length: int = 0) -> None:
        self.states, self.length = states, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.states = self.states[beam_idx].contiguous()


@dataclass
class RuntimeOutput(ModelOutput):
    """What `RuntimeForCausalLM.forward` returns.

    Attributes:
        loss: with labels: mean cross entropy in nats.
        logits: float32 (B, L, V), or fewer tokens with `logits_to_keep`.
        cache_params: to be given to the next call, None unless `use_cache`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: Any = None


class RuntimeForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of transformers whose forward is an engine of ours."""

    main_input_name = "input_ids"
    _is_stateful = True  # a state cannot be rolled back: transformers then refuses assisted generation
    _supports_cache_class = False
    _supports_sdpa = True  # a hybrid's configuration may ask for it; attention is the engine's in any case

    def __init__(self, model: Model) -> None:
        super().__init__(copy.deepcopy(model.config))
        self._engine: Engine = model.engine
        if self.generation_config is None:  # transformers makes one of the configuration
            self.generation_config = GenerationConfig()
        if model.eos:
            self.generation_config.eos_token_id = sorted(model.eos)
        if model.bos is not None:
            self.generation_config.bos_token_id = model.bos
        self.eval()

    @property
    def device(self) -> torch.device:
        """The CPU: there are no parameters that could say it."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    @classmethod
    def can_generate(cls) -> bool:
        """Yes."""
        return True

    def _init_weights(self, module: Any) -> None:
        pass

    def _supports_default_dynamic_cache(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False  # `forward` makes what is carried itself

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the engine has the weights."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: this holds no weights.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model of the runtime cannot be saved; copy the directory that it was loaded from")

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        cache_params: Carried | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next `forward`: the tokens that were not read yet."""
        read = 0 if cache_params is None else cache_params.length
        return {
            "input_ids": input_ids[:, read:],
            "attention_mask": None if attention_mask is None else attention_mask[:, read:],
            "cache_params": cache_params,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    @torch.no_grad()
    @undisturbed()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache_params: Carried | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RuntimeOutput | tuple[Any, ...]:
        """Read tokens.

        Args:
            input_ids: int64 (B, L).
            attention_mask: (B, L) or longer, then its end counts; tokens at 0 are left out, as if their row
                were shorter, and get logits 0.
            cache_params: what an earlier call returned; it is advanced.
            use_cache: return what is carried.
            labels: (B, L), -100 where there is none; shifted here, as in stock models.
            logits_to_keep: logits of the last so many tokens only; 0: of all.
            return_dict: False returns a tuple.

        Raises:
            ValueError: inputs of other shapes, a token outside the vocabulary, states of another batch.
        """
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else ()
            raise ValueError(f"input_ids has shape {shape}; expected (B, L)")
        batch, length = input_ids.shape
        _refuse_unknown(input_ids, self._engine.vocabulary)
        if not isinstance(cache_params, Carried | None):
            raise ValueError(
                f"cache_params is of type {type(cache_params).__name__}; give what forward returned"
            )
        if cache_params is None:
            cache_params = Carried(self._engine.new_state(batch))
        if len(cache_params.states) != batch:
            raise ValueError(f"cache_params holds {len(cache_params.states)} sequences, input_ids {batch}")
        cache_params.states = self._engine.keys.room(cache_params.states, length)
        kept = torch.ones(batch, length, dtype=torch.bool)
        if attention_mask is not None:
            if (
                attention_mask.dim() != 2
                or attention_mask.shape[0] != batch
                or attention_mask.shape[1] < length
            ):
                shape = tuple(attention_mask.shape)
                raise ValueError(f"attention_mask has shape {shape}; expected ({batch}, {length})")
            kept = attention_mask[:, attention_mask.shape[1] - length :] != 0
        keep = min(int(logits_to_keep), length) or length
        logits = self._read(input_ids, kept, cache_params.states, keep if labels is None else length)
        cache_params.length += length
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            logits = logits[:, length - keep :]
        output = RuntimeOutput(loss, logits, cache_params if use_cache or use_cache is None else None)
        return output if return_dict or return_dict is None else output.to_tuple()

    def _read(self, tokens: Tensor, kept: Tensor, states: Tensor, keep: int) -> Tensor:
        """Advance the states in place; logits (B, keep, V)."""
        batch, length = tokens.shape
        if length == 1 and bool(kept.all()):
            return self._engine.step(tokens[:, 0], states)[:, None]
        logits = torch.zeros(batch, keep, self._engine.vocabulary)
        for i in range(batch):
            own = tokens[i][kept[i]].contiguous()
            if not len(own):
                continue
            if keep == 1:
                last = self._engine.prompt(own, states[i])
                if kept[i, -1]:
                    logits[i, 0] = last
            else:
                read = self._engine.prompt(own, states[i], every=True)
                wanted = kept[i, length - keep :]
                logits[i, wanted] = read[len(read) - int(wanted.sum()) :]
        return logits


def causal_lm(model: Model) -> RuntimeForCausalLM:
    """Wrap a model for code that expects a causal language model of transformers.

    Args:
        model: what `sparsessm.runtime.load` returned; the engine is shared, nothing is copied.
    """
    return RuntimeForCausalLM(model)


def _refuse_unknown(tokens: Tensor, vocabulary: int) -> None:
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if len(wrong):
        raise ValueError(f"input_ids holds token {int(wrong[0])}; the vocabulary has 0 to {vocabulary - 1}")
