"""What a packed model may have and no stock configuration can say: projected states, layers of own widths.

In memory it is a stock model with other layers or mixers; on disk the shapes of its tensors say all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsessm.architectures import projected

WIDE = ("mamba", "falcon_mamba")  # model types whose layers may have channels of their own number
_SKIP = re.compile(r"backbone\.layers\.(\d{1,9})\.mixer\.D", re.ASCII)


@dataclass(frozen=True)
class Own:
    """Of one model.

    Attributes:
        directions: layer -> r, where B and C of a Mamba-2 are projected.
        widths: layer -> channels, where they are not as many as the configuration says.
    """

    directions: Mapping[int, int] = field(default_factory=dict)
    widths: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.directions or self.widths)

    @classmethod
    def of(cls, model: Any) -> Own:
        """What a model in memory has."""
        return cls(
            projected.directions_of(model), _widths({n: t.shape for n, t in _vectors(model)}, model.config)
        )

    @classmethod
    def told_by(cls, shapes: Mapping[str, tuple[int, ...]], config: Any) -> Own:
        """What the tensors of a file say; what does not fit is left to who compares them with the model."""
        return cls(projected.directions_in(shapes, config), _widths(shapes, config))

    def give(self, model: Any, made: Callable[[torch.nn.Module], None] | None = None) -> None:
        """Give it to a stock model, also one without memory for its weights; new weights are arbitrary.

        Args:
            made: is called with each layer or mixer as soon as it is made, to take its weights away.
        """
        projected.attach(model, self.directions, made)
        layers = model.backbone.layers if self.widths else []
        for index, width in self.widths.items():
            config, was = copy.deepcopy(model.config), layers[index]
            config.intermediate_size = width
            with torch.random.fork_rng([]), torch.device(was.mixer.D.device):
                layer = type(was)(config, layer_idx=index)
            if made is not None:
                made(layer)
            layers[index] = layer.requires_grad_(was.mixer.D.requires_grad).train(was.training)
        if self.widths:
            level(model)


def guard(model: Any) -> None:
    """Keep stock code from writing what it would read as another model."""
    model.save_pretrained = projected.refuse_to_save


def level(model: Any) -> None:
    """After layers of a Mamba-1 got other widths, or left: a stock model again where all are alike."""
    if model.config.model_type not in WIDE:
        return
    widths, own = {len(layer.mixer.D) for layer in model.backbone.layers}, vars(model)
    if len(widths) == 1:
        model.config.intermediate_size = widths.pop()
        own.pop("save_pretrained", None)
        used = own.pop("used_cache", model.config.use_cache)
    else:
        guard(model)
        own.setdefault("used_cache", model.config.use_cache)
        used = False  # older stock caches have one width for all
    model.config.use_cache = model.backbone.config.use_cache = used


def _vectors(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in model.named_parameters() if _SKIP.fullmatch(name)]


def _widths(shapes: Mapping[str, tuple[int, ...]], config: Any) -> dict[int, int]:
    if config.model_type not in WIDE:
        return {}
    found = {}
    for name, shape in shapes.items():
        match = _SKIP.fullmatch(name)
        if match and int(match[1]) < config.num_hidden_layers and len(shape) == 1 and shape[0] > 0:
            found[int(match[1])] = shape[0]
    if len(set(found.values())) < 2:  # a stock model, whose configuration says the number, or a wrong one
        return {}
    return {index: width for index, width in found.items() if width != config.intermediate_size}
