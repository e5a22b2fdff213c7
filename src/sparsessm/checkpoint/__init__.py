"""Stock checkpoints in, stock checkpoints out: the only seam between pruning and running.

Stage 5 of the flow. `load` hands a model over in float32 together with the dtype each of its tensors is
stored in; `save` writes the same format back, each tensor in that dtype, with the record of the pruning
beside it (`docs/checkpoint.md` describes the files).

    opened.py         find a directory, read its config and decide its kind, once
    folder.py         the small files of a directory, each read once
    reading.py        the model and the tokenizer of one that is open
    known_fields.py   which fields of config.json and generation_config.json reach transformers
    tokenizing.py     the tokenizer, from its own files
    companions.py     what lies beside the weights, and what is no checkpoint
    assembly.py       check the tensors, make the model of them
    apart.py          check them, and leave them in their files
    skeleton.py       a model without the weights of its blocks
    streamed.py       which are read when a block is opened
    read_ahead.py     and before that by the system
    mapped.py         hidden states in files
    memory.py         how much memory there is
    journal.py        what a run has done: how a killed one goes on
    stock_names.py    what the tensors of a model are called in its files
    at_rest.py        a checkpoint whose values stay in its files: packed, unpacked, counted one by one
    writing.py        the way back
    values.py         the values that it writes, one by one
    atomic.py         a directory appears whole or not at all
    files.py          JSON, safetensors and .bin, one file or sharded
    tensor_file.py    one safetensors file, written tensor by tensor
    bin_file.py       one pytorch_model.bin, written likewise
    state_spaces.py   the original format in the words of transformers
    packed.py         packed directories (`docs/sparse-format.md`): what is encoded how, written and read
    unpacking.py      and back to a stock checkpoint
    exporting.py      one GGUF file, for llama.cpp
    gguf_blocks.py    its quantised matrices
    gguf_hybrids.py   the tensors and metadata of hybrids in it, and in gguf_delta.py of the delta rule
    gguf_words.py     the tokenizer in it
    packed_tensor.py  what every tensor of them is
    encoding.py       one of them: dense, bitmask, N:M, int8
    coded.py          one on a grid: codes of few bits and scales
    nested.py         codes of older files on a grid
    container.py      the file that holds them, read
    packed_file.py    and written
    shelf.py          tensors that are read one by one
    given.py          what the Python API is given
    digests.py        whether files are still what they were
    uploading.py      a result goes to the hub
"""

from . import packed
from .at_rest import AtRest, at_rest
from .atomic import refuse_room, refuse_target
from .exporting import Exported, export
from .journal import Journal, folder_of, unfinished
from .opened import Opened, local_folder, open_checkpoint, read_record
from .packed import Packed, pack, save
from .packed_tensor import PackedTensor
from .reading import Checkpoint, Streaming, load
from .unpacking import unpack
from .writing import refuse_existing, refuse_full

__all__ = [
    "AtRest",
    "Checkpoint",
    "Exported",
    "Journal",
    "Opened",
    "Packed",
    "PackedTensor",
    "Streaming",
    "at_rest",
    "export",
    "folder_of",
    "load",
    "local_folder",
    "open_checkpoint",
    "pack",
    "packed",
    "read_record",
    "refuse_existing",
    "refuse_full",
    "refuse_room",
    "refuse_target",
    "save",
    "unfinished",
    "unpack",
]
