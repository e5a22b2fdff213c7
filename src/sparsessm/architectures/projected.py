"""Mamba-2 with projected states: fewer directions instead of some of the states. No stock model has them.

A head of Mamba-2 has one decay for all its states, so its recurrence keeps any linear map of the state: with
B' = T_b B and C' = T_c C of r values each the state has r directions instead of N states. In stock weights B
and C come out of a convolution and a SiLU, behind which there is no place for T_b and T_c; so a projected
model lives in packed files and in our runtime. In memory it is the stock model with other mixers, and
computes what the runtime does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from sparsessm.architectures.mamba2 import Mamba2Kind

KIND = Mamba2Kind(projected=True)
MATRICES = ("B_projection", "C_projection")
_NAME = re.compile(r"backbone\.layers\.(\d{1,9})\.mixer\.[BC]_projection", re.ASCII)


class ProjectedMixer(Mamba2Mixer):
    """A stock mixer with projections (G, r, N) of B and C behind its convolution, of each group of heads."""

    def __init__(self, config: Any, layer_idx: int, directions: int) -> None:
        super().__init__(config, layer_idx)
        shape = self.n_groups, directions, self.ssm_state_size
        self.B_projection = nn.Parameter(torch.zeros(shape))
        self.C_projection = nn.Parameter(torch.zeros(shape))

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        """As the stock mixer's, from an empty state.

        Raises:
            ValueError: a cache, or padding.
        """
        if cache_params is not None:
            raise ValueError(
                "transformers' caches cannot hold projected states; generate with sparsessm.runtime, or call "
                "the model with use_cache=False"
            )
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("a model with projected states does not support padding")
        out, _ = KIND.forward(self, hidden_states, None, {})
        assert out is not None
        return out


def attach(
    model: Any, directions: Mapping[int, int], made: Callable[[nn.Module], None] | None = None
) -> None:
    """Give layers of a stock Mamba-2 projections, which are zero until they are set.

    Args:
        model: `Mamba2ForCausalLM`, also without memory for its weights.
        directions: layer -> r. made: is called with each mixer as soon as it has its weights.
    """
    if not directions:
        return
    layers = model.backbone.layers
    for index, count in directions.items():
        stock = layers[index].mixer
        with torch.random.fork_rng([]), torch.device(stock.A_log.device):
            mixer = ProjectedMixer(model.config, index, count)
        missing = mixer.load_state_dict(stock.state_dict(), strict=False, assign=True).missing_keys
        assert set(missing) == set(MATRICES)
        if made is not None:
            made(mixer)
        mixer.requires_grad_(stock.A_log.requires_grad).train(stock.training)
        layers[index].mixer = mixer
    # What a stock model fills by itself is what these mixers refuse.
    model.config.use_cache = model.backbone.config.use_cache = False
    model.save_pretrained = refuse_to_save


def refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """In place of `save_pretrained`, which would write what stock code reads as another model."""
    raise ValueError(
        "no stock configuration can describe the shapes of this model; save it with sparsessm.save"
    )


def directions_of(model: Any) -> dict[int, int]:
    """Layer -> r, of the layers that are projected."""
    return {
        int(name.split(".")[2]): mixer.B_projection.shape[1]  # backbone.layers.0.mixer
        for name, mixer in model.named_modules()
        if isinstance(mixer, ProjectedMixer)
    }


def directions_in(shapes: Mapping[str, tuple[int, ...]], config: Any) -> dict[int, int]:
    """Layer -> r, as the tensors of a file say.

    What does not fit the configuration is left to whoever compares the tensors with the model.
    """
    if config.model_type != "mamba2":
        return {}
    found = {}
    for name in named_in(shapes):
        index, shape = int(name.split(".")[2]), shapes[name]
        if index < config.num_hidden_layers and len(shape) == 3 and 1 <= shape[1] <= config.state_size:
            found[index] = shape[1]
    return found


def named_in(names: Iterable[str]) -> list[str]:
    """Those of the names that are a projection's."""
    return [name for name in names if _NAME.fullmatch(name)]
