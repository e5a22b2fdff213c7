"""The values of a checkpoint's tensors, one by one, as they are stored: the one place that takes them.

What writes a checkpoint takes shapes from the model and every value from here, so that it need not be in the
model.
"""

from __future__ import annotations

from torch import Tensor

from .assembly import untied
from .reading import Checkpoint
from .tensor_file import Form


def stored_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor in the dtype it is stored in; it may be the model's own.

    Args:
        name: in `checkpoint.model.state_dict()`.
    """
    owner, _, own = name.rpartition(".")
    tensor: Tensor = getattr(checkpoint.model.get_submodule(owner), own)
    return checkpoint.residence.value(tensor).to(checkpoint.stored.get(name, tensor.dtype))


def stored_forms(checkpoint: Checkpoint) -> dict[str, Form]:
    """The form that each tensor is stored in, by name as for `stored_tensor`, tied ones once."""
    return {
        name: Form(checkpoint.stored.get(name, tensor.dtype), tuple(tensor.shape))
        for name, tensor in untied(checkpoint.model)[0].items()
    }
