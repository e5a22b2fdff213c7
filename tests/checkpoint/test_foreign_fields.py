"""Fields of foreign JSON files: none is a command, and no value costs a traceback, time or memory."""

from __future__ import annotations

import json
import resource
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command import new_python
from directories import changed, edit, logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2, pico_tokenizer
from pico_hybrids import NEW, pico_hybrid

from sparsessm import checkpoint, runtime
from sparsessm.checkpoint import known_fields, opened, tokenizing

MAKERS = {"mamba": pico_mamba, "falcon_mamba": pico_falcon_mamba, "mamba2": pico_mamba2}
HYBRIDS = ("bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h", "zamba2")
DELTA = ("qwen3_5_moe_text", "qwen3_next", "kimi_linear")
KINDS = (*MAKERS, *((*HYBRIDS, *DELTA) if NEW else ()))
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([64, 4096, 2**16, 2**24, 10**9, 2**31, 10**12, -(10**12), 2**63, 10**40]),
    st.sampled_from([0.5, -1.0, 1e30, 1e308, float("inf"), float("-inf"), float("nan")]),
)
WORDS = st.sampled_from(
    ["", "x", "auto", "1", "silu", "mamba", "owner/repo", "load", "M*E-", "linear_attention"]
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
LISTS = st.one_of(st.lists(PLAIN, max_size=4), st.just(["mamba"] * 5000), st.just([[1], [2]]))
ROPE = st.dictionaries(
    st.sampled_from(
        [
            "rope_type",
            "type",
            "rope_theta",
            "factor",
            "partial_rotary_factor",
            "long_factor",
            "full_attention",
            "mrope_section",
        ]
    ),
    st.one_of(PLAIN, st.sampled_from(["default", "linear", "yarn", "longrope", "dynamic", "llama3"])),
    max_size=3,
)
VALUES = st.one_of(PLAIN, LISTS, ROPE, st.just({"": {"": {}}}))
FUZZ = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each type that this release of transformers has."""
    root = tmp_path_factory.mktemp("shelf")
    for kind in KINDS:
        model = MAKERS[kind]() if kind in MAKERS else pico_hybrid(kind)
        model.save_pretrained(root / kind)
        pico_tokenizer().save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


def within_bounds(work: Any) -> Any:
    """The result of `work`, or the ValueError it ends in; in few seconds and little memory."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        return work()
    except ValueError as error:
        assert str(error) and len(str(error)) < 3000
        return error
    finally:
        assert time.process_time() - begun < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


# -------------------------------------------------------------------------------------------- config.json


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_any_value_in_any_field_of_a_config_ends_in_a_model_or_a_refusal(
    kind: str, shelf: dict[str, Path], data: st.DataObject
) -> None:
    names = sorted(known_fields._known(kind)[0] | {"num_labels", "id2label", "per_layer_config", "foo"})
    fields = data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2))
    with changed(shelf[kind] / "config.json", fields):
        within_bounds(lambda: checkpoint.load(shelf[kind]))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000; allowed: a whole number from 0 to"),
        ({"hidden_size": 10**40}, "hidden_size is 10000000000000000000000000000000000000000; allowed"),
        ({"vocab_size": True}, "vocab_size is True; allowed: a whole number"),
        ({"state_size": [[8]]}, "state_size is [[8]]; allowed: a list of numbers or of names"),
        ({"initializer_range": float("nan")}, "initializer_range is nan; allowed: a finite number"),
        ({"hidden_act": "x" * 5000}, "hidden_act has 5000 characters"),
        ({"per_layer_config": {"0": {"state_size": 4}}}, "per_layer_config is not supported"),
    ],
)
def test_an_absurd_value_is_named(folder: Path, fields: dict[str, object], told: str) -> None:
    edit(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=r"config\.json: ") as refused:
        checkpoint.load(folder)
    assert told in str(refused.value)


@pytest.mark.parametrize("count", [10**9, -1, "x", [1]])
def test_labels_of_other_tasks_cost_nothing(folder: Path, count: object) -> None:
    edit(folder / "config.json", num_labels=count)
    found = within_bounds(lambda: checkpoint.load(folder))
    assert torch.equal(logits(found.model), logits(pico_mamba()))


def test_only_known_fields_reach_the_library_and_all_are_written_back(folder: Path, tmp_path: Path) -> None:
    strange = {
        "foo": 1,
        "auto_map": {"AutoConfig": "owner/repo--m.C"},
        "return_dict": False,
        "output_hidden_states": True,
        "dtype": "load",
        "use_mambapy": True,
        "kernel_config": {"x": "owner/repo"},
        "_experts_implementation": "owner/repo",
    }
    edit(folder / "config.json", **strange)
    came = checkpoint.load(folder)
    for name in ("foo", "auto_map", "kernel_config"):
        assert not hasattr(came.model.config, name)
    assert came.model.config.return_dict and not came.model.config.use_mambapy
    checkpoint.save(came, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert any("_experts_implementation 'owner/repo'" in note for note in came.notes)


NAMES = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")


@pytest.mark.skipif(not NEW, reason="hybrids need transformers 5")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["flash_attention_2", "owner/repo", "paged|eager", {"": "flex_attention"}])
def test_an_attention_of_another_machine_is_replaced_with_a_word(
    shelf: dict[str, Path], name: str, value: object
) -> None:
    with changed(shelf["bamba"] / "config.json", {name: value}):
        came = checkpoint.load(shelf["bamba"])
    assert came.model.config._attn_implementation in ("sdpa", "eager")
    assert [note for note in came.notes if f"config.json asks for {name}" in note]


STAND_IN = """
__version__ = "0.18.2"
ASKED = []
class Kind(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Some
    def __or__(cls, other):
        return cls
class Some(metaclass=Kind):
    def __init__(self, *a, **k): pass
    def __call__(self, *a, **k): return a[0] if a else self
def get_kernel(*a, **k):
    ASKED.append(a)
    raise RuntimeError("asked")
load_kernel = get_kernel
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Some
"""


@pytest.mark.skipif(not NEW, reason="older releases ask for other kernels")
def test_no_field_makes_the_library_fetch_a_kernel(shelf: dict[str, Path], tmp_path: Path) -> None:
    """With a stand-in for the package that fetches them."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text(STAND_IN)
    about = tmp_path / "kernels-0.18.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    program = f"""
        import json, sys
        sys.path.insert(0, {str(tmp_path)!r})
        import kernels
        from pathlib import Path
        from sparsessm import checkpoint
        folder = Path({str(shelf["bamba"])!r})
        before = (folder / "config.json").read_text()
        names = {NAMES!r} + ("experts_implementation", "_experts_implementation", "use_kernels")
        told = dict.fromkeys(names, "owner/repo") | {{"auto_map": {{"AutoConfig": "owner/repo--a.B"}}}}
        (folder / "config.json").write_text(json.dumps(json.loads(before) | told))
        try:
            checkpoint.load(folder)
        finally:
            (folder / "config.json").write_text(before)
        print(len(kernels.ASKED))
    """
    done = new_python("-c", textwrap.dedent(program))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0"]


# ----------------------------------------------------------------------------------- generation_config.json

GENERATION = sorted(known_fields._GENERATION | {"custom_generate", "cache_implementation", "self", "foo"})


@settings(FUZZ, max_examples=10)
@given(fields=st.dictionaries(st.sampled_from(GENERATION), VALUES, min_size=1, max_size=3))
def test_any_generation_config_ends_in_a_model_that_generates(shelf: dict[str, Path], fields: Any) -> None:
    with changed(shelf["mamba"] / "generation_config.json", fields):
        came = checkpoint.load(shelf["mamba"])
        loaded = runtime.load(shelf["mamba"])
    assert set(loaded.eos) <= set(range(64))
    assert loaded.generate([1, 2], 1).ids == runtime.of(came).generate([1, 2], 1).ids


def test_what_of_a_generation_config_is_not_followed_is_said(folder: Path, tmp_path: Path) -> None:
    edit(
        folder / "generation_config.json",
        eos_token_id="</s>",
        temperature=0.5,
        do_sample=True,
        custom_generate="owner/repo",
    )
    came = checkpoint.load(folder)
    assert came.model.generation_config is not None and came.model.generation_config.temperature == 0.5
    assert [n for n in came.notes if "eos_token_id '</s>'" in n] and [
        n for n in came.notes if "custom_gen" in n
    ]
    checkpoint.save(came, tmp_path / "out")
    written = (tmp_path / "out/generation_config.json").read_bytes()
    assert written == (folder / "generation_config.json").read_bytes()


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{"])
def test_a_generation_config_that_is_no_object_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    checkpoint.pack(folder, tmp_path / "packed")
    for place in (folder, tmp_path / "packed"):
        (place / "generation_config.json").write_text(text)
        for read in (checkpoint.load, runtime.load):
            with pytest.raises(ValueError, match=r"generation_config\.json: (expected a JSON|not readable)"):
                read(place)


# ------------------------------------------------------------------------------------------------ tokenizer

CLASSES = [name for name in dir(transformers) if "Tokenizer" in name or name.startswith("AutoM")]
TOKENIZER = sorted(tokenizing._KNOWN) + [
    *(
        "auto_map",
        "tokenizer_class",
        "vocab_file",
        "tokenizer_file",
        "fast_tokenizer_files",
        "tokenizer_object",
    ),
    *("gguf_file", "init_inputs", "cache_dir", "sp_model_kwargs", "foo_token", "vocab", "backend_tokenizer"),
]
TOLD = st.one_of(
    VALUES,
    st.sampled_from(CLASSES),
    st.sampled_from(["/etc/passwd", "owner/repo--m.C", "<|endoftext|>", {"content": "<z>"}, {"9999999": {}}]),
)


@FUZZ
@given(fields=st.dictionaries(st.sampled_from(TOKENIZER), TOLD, min_size=1, max_size=2))
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_any_field_of_a_tokenizer_ends_in_one_that_splits_or_a_refusal(
    shelf: dict[str, Path], file: str, fields: Any
) -> None:
    place = shelf["mamba"] / file
    if there := place.exists():
        ended = changed(place, fields)
    else:
        place.write_text("{}")
        ended = changed(place, fields)
    with ended:
        within_bounds(lambda: tokenizing.encode(checkpoint.load(shelf["mamba"]).tokenizer, "the state"))
    if not there:
        place.unlink()


NO_LIMIT = (float("inf"), -1, 0, 1e30, 10**30, True, "512", [512], None, {}, float("nan"), 10**6)
LENGTHS = [*((value, None) for value in NO_LIMIT), (512, 512), (512.0, 512), (1, 1), (999_999, 999_999)]


@pytest.mark.parametrize(("value", "length"), LENGTHS)
def test_model_max_length_is_a_length_or_no_limit(folder: Path, value: object, length: int | None) -> None:
    edit(folder / "tokenizer_config.json", model_max_length=value)
    assert checkpoint.load(folder).trained_length == length


def test_no_file_outside_the_directory_and_no_code_is_opened(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    pico_tokenizer(40).save_pretrained(outside)
    (folder / "evil.py").write_text("raise SystemExit('imported')\n")
    edit(
        folder / "tokenizer_config.json",
        tokenizer_file=str(outside / "tokenizer.json"),
        vocab_file=str(outside / "tokenizer.json"),
        fast_tokenizer_files=["tokenizer.../outside/tokenizer.json"],
        auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        tokenizer_class="AutoModelForCausalLM",
    )
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config"}, _attn_implementation="owner/repo")
    assert checkpoint.load(folder).tokenizer.get_vocab() == pico_tokenizer().get_vocab()


BROKEN = {
    "an empty pattern": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a token that is not there": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "q", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "a broken map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_tokenizer_whose_library_stops_is_one_line(
    folder: Path, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "tokenizer.json", **BROKEN[fault])
    capfd.readouterr()
    for given_ in (None, folder / "tokenizer.json"):
        try:
            checkpoint.load(folder, tokenizer=given_)
        except ValueError as error:
            assert "tokenizer" in str(error) and "\n" not in str(error)
    assert "panicked" not in capfd.readouterr().err


def test_a_text_that_a_tokenizer_cannot_split_is_refused(folder: Path, tmp_path: Path) -> None:
    edit(folder / "tokenizer.json", model={"type": "WordLevel", "unk_token": "?", "vocab": {"a": 1}})
    with pytest.raises(ValueError, match="the tokenizer cannot split the text: "):
        runtime.load(folder).generate("b c d")


def test_older_nemotron_files_say_their_layers_by_a_pattern() -> None:
    fields = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*", "num_hidden_layers": 4}
    config = opened.stock_config("x", fields, False)
    assert config.layers_block_type == transformers.NemotronHConfig.from_dict(fields).layers_block_type
    assert len(config.layers_block_type) == 4


@pytest.mark.parametrize("base", [10**11, 1e11, 10000])
def test_a_rotary_base_is_no_size(base: float) -> None:
    assert known_fields.config_fields("falcon_h1", {"rope_theta": base})["rope_theta"] == base


@pytest.mark.parametrize("kind", [["mamba"], {"a": 1}, None, 3])
def test_a_model_type_that_is_no_text_is_refused_by_loading_and_running(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for load in (checkpoint.load, runtime.load):
        with pytest.raises(ValueError, match="no adapter for model_type"):
            load(tmp_path)
