"""Sources, fetching, and the conversion of what they hold into a plain checkpoint."""

import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from prunelib.data import models, pin, sources
from prunelib.data.sources import Source, fetch, parse_source
from prunelib.errors import InputError, IntegrityError

ROOT = Path(__file__).resolve().parents[1]
MEMBER = b"a small payload\n"
DIGEST = hashlib.sha256(MEMBER).hexdigest()
WHEEL = "tiny_data-1.0-py3-none-any.whl"
SOURCE = "pypi:Tiny.Data==1.0!tiny_data/payload.txt"


def make_wheel(cache: Path, members: dict[str, bytes] | None = None) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(cache / WHEEL, "w") as archive:
        for name, content in (members or {"tiny_data/payload.txt": MEMBER}).items():
            archive.writestr(name, content)
    return cache / WHEEL


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network or a subprocess was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)


# --- spelling ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/name@unpinned", Source("hf", "org/name", "unpinned")),
        (f"hf:a-b/c.d_e@{'0a' * 20}", Source("hf", "a-b/c.d_e", "0a" * 20)),
        ("dir:some/where", Source("dir", "some/where")),
        ("pypi:gensim==4.4.0!gensim/x/y.bz2", Source("pypi", "gensim", "4.4.0", "gensim/x/y.bz2")),
    ],
)
def test_parse_source(text, expected):
    assert parse_source(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hf:org/name",
        "hf:org/name@main",
        "hf:name@unpinned",
        "hf:../name@unpinned",
        f"hf:org/name@{'0' * 39}",
        "dir:",
        "gensim==4.4.0!x",
        "pypi:gensim!x",
        "pypi:gensim==4.4.0",
        "pypi:gensim==4.4.0!",
        "pypi:gensim>=4!x",
        "pypi:--index-url==1!x",
        "pypi:gensim==4.4.0!/etc/passwd",
        "pypi:gensim==4.4.0!../outside",
        "pypi:gensim==4.4.0!a/../../outside",
        "pypi:gensim==4.4.0!a\\..\\b",
        "pypi:gensim==4.4.0!a//b",
        "https://example.org/x",
    ],
)
def test_malformed_source_is_refused(text):
    with pytest.raises(InputError, match="source ") as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)


# --- wheels -----------------------------------------------------------------------------------


def test_cached_wheel_serves_without_network_and_then_the_member_alone(tmp_path, no_network):
    wheel = make_wheel(tmp_path)
    path = fetch(parse_source(SOURCE), DIGEST, tmp_path)
    assert path.read_bytes() == MEMBER
    assert path.is_relative_to(tmp_path)
    wheel.unlink()
    assert fetch(parse_source(SOURCE), DIGEST, tmp_path) == path


def test_wrong_member_sha256_names_both_and_keeps_nothing_but_the_given_wheel(tmp_path, no_network):
    wheel = make_wheel(tmp_path)
    with pytest.raises(IntegrityError) as caught:
        fetch(parse_source(SOURCE), "0" * 64, tmp_path)
    assert DIGEST in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [wheel]


def test_tampered_cached_member_is_replaced_from_the_wheel(tmp_path, no_network):
    make_wheel(tmp_path)
    path = fetch(parse_source(SOURCE), DIGEST, tmp_path)
    path.write_bytes(b"tampered")
    assert fetch(parse_source(SOURCE), DIGEST, tmp_path).read_bytes() == MEMBER


def test_wheel_sha256_is_checked(tmp_path, no_network):
    digest = hashlib.sha256(make_wheel(tmp_path).read_bytes()).hexdigest()
    with pytest.raises(IntegrityError, match=digest):
        fetch(parse_source(SOURCE), DIGEST, tmp_path, wheel_sha256="1" * 64)
    assert fetch(parse_source(SOURCE), DIGEST, tmp_path, wheel_sha256=digest).exists()


def test_missing_member_broken_wheel_and_missing_sha256(tmp_path, no_network):
    wheel = make_wheel(tmp_path)
    with pytest.raises(InputError, match="has no member tiny_data/other"):
        fetch(parse_source("pypi:tiny-data==1.0!tiny_data/other"), DIGEST, tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:60])
    with pytest.raises(IntegrityError, match="cannot be read"):
        fetch(parse_source(SOURCE), DIGEST, tmp_path)
    with pytest.raises(InputError, match="needs the sha256"):
        fetch(parse_source(SOURCE), None, tmp_path)
    with pytest.raises(InputError, match="64 hexadecimal"):
        fetch(parse_source(SOURCE), "abc", tmp_path)


def test_hostile_member_names_of_a_wheel_are_never_written(tmp_path, no_network):
    cache = tmp_path / "cache"
    make_wheel(cache, {"../../evil.txt": b"evil", "tiny_data/payload.txt": MEMBER})
    fetch(parse_source(SOURCE), DIGEST, cache)
    assert not list(tmp_path.rglob("*evil*"))
    with pytest.raises(InputError, match="plain path"):
        parse_source("pypi:tiny-data==1.0!../../evil.txt")


def test_another_version_in_the_cache_is_not_taken(tmp_path, monkeypatch):
    make_wheel(tmp_path)

    def pip(command, **kwargs):
        return subprocess.CompletedProcess(
            command, 1, "", "noise\nERROR: No matching distribution\n"
        )

    monkeypatch.setattr(sources.subprocess, "run", pip)
    with pytest.raises(InputError, match="ERROR: No match") as caught:
        fetch(parse_source("pypi:tiny-data==1.0.1!tiny_data/payload.txt"), DIGEST, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [WHEEL]


def fake_pip(monkeypatch, content: dict[str, bytes] | None = None) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command, **kwargs):
        calls.append(command)
        make_wheel(Path(command[command.index("-d") + 1]), content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    return calls


def test_download_asks_for_one_wheel_and_builds_nothing(tmp_path, monkeypatch):
    calls = fake_pip(monkeypatch)
    assert fetch(parse_source(SOURCE), DIGEST, tmp_path).read_bytes() == MEMBER
    fetch(parse_source(SOURCE), DIGEST, tmp_path)
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"Tiny.Data==1.0", "--no-deps", "--only-binary=:all:"} <= set(calls[0])


def test_downloaded_wheel_with_the_wrong_content_is_not_kept(tmp_path, monkeypatch):
    fake_pip(monkeypatch, {"tiny_data/payload.txt": b"something else"})
    with pytest.raises(IntegrityError, match=DIGEST):
        fetch(parse_source(SOURCE), DIGEST, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_real_pip_download_from_a_local_index(tmp_path, monkeypatch):
    """The true pip command, fed from a local directory in place of the index."""
    shelf = tmp_path / "shelf"
    info = "tiny_data-1.0.dist-info"
    make_wheel(
        shelf,
        {
            "tiny_data/payload.txt": MEMBER,
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    cache = tmp_path / "cache"
    assert fetch(parse_source(SOURCE), DIGEST, cache).read_bytes() == MEMBER
    assert (cache / WHEEL).is_file()
    with pytest.raises(InputError, match="cannot be downloaded"):
        fetch(parse_source("pypi:tiny-data==2.0!x"), DIGEST, cache)


# --- directories and the hub --------------------------------------------------------------------


def test_dir_file_sha256(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_bytes(MEMBER)
    assert fetch(Source("dir", str(file)), DIGEST) == file
    with pytest.raises(IntegrityError, match=DIGEST):
        fetch(Source("dir", str(file)), "2" * 64)
    with pytest.raises(InputError, match="not one"):
        fetch(Source("dir", str(tmp_path)), DIGEST)


def test_unpinned_hub_source_says_make_pin(no_network):
    with pytest.raises(InputError, match="make pin"):
        fetch(parse_source("hf:org/name@unpinned"), None)


def test_hub_source_takes_no_sha256():
    with pytest.raises(InputError, match="pinned by its revision"):
        fetch(parse_source(f"hf:org/name@{'a' * 40}"), DIGEST)


def test_hub_errors_are_one_line_and_patterns_hold_no_code(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import errors

    seen: dict[str, object] = {}

    def snapshot(name, *, revision, allow_patterns):
        seen.update(name=name, revision=revision, patterns=allow_patterns)
        raise errors.LocalEntryNotFoundError("line one\nline two")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(InputError, match="cannot be reached") as caught:
        fetch(parse_source(f"hf:org/name@{'a' * 40}"), None, patterns=models.hub_patterns())
    assert "\n" not in str(caught.value)
    assert (seen["name"], seen["revision"]) == ("org/name", "a" * 40)
    from fnmatch import fnmatch

    names = ["modeling_x.py", "pytorch_model.bin", "model.pkl", "adapter_model.safetensors"]
    assert not [n for n in names for p in models.hub_patterns() if fnmatch(n, p)]
    for wanted in ("model-00001-of-00002.safetensors", "config.json", "tokenizer.model"):
        assert any(fnmatch(wanted, p) for p in models.hub_patterns())
    assert any(fnmatch("pytorch_model-1.bin", p) for p in models.hub_patterns("bin"))
    with pytest.raises(InputError, match="allowed: safetensors, bin"):
        models.hub_patterns("pickle")


def test_pin_replaces_only_unpinned_revisions():
    text = f"# note\na: hf:x/y@unpinned # why\nb: hf:z/w@{'1' * 40}\n"
    pinned = pin.pin(text, {"x/y": "c" * 40}.__getitem__)
    assert pinned == f"# note\na: hf:x/y@{'c' * 40} # why\nb: hf:z/w@{'1' * 40}\n"


# --- checkpoint directories ---------------------------------------------------------------------

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Return a tiny random LLaMA with a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(directory)
    words = {f"w{i}": i for i in range(63)} | {"<unk>": 63}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make(source: Path, tmp_path: Path, **options) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    models.make_checkpoint(source, out, **options)
    return out


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_directory_is_copied_without_anything_else(tiny, copy, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    marker = tmp_path / "executed"
    (copy / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    (copy / "adapter_config.json").write_text("{}")
    out = make(copy, tmp_path)
    names = {path.name for path in out.iterdir()}
    assert names <= {*models.CONFIG_FILES, *models.TOKENIZER_FILES, "model.safetensors"}
    assert not marker.exists()
    assert (out / "model.safetensors").stat().st_nlink == 2
    ours, theirs = (AutoModelForCausalLM.from_pretrained(d) for d in (out, tiny))
    ids = torch.arange(10)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    # By hand: two embeddings, two layers (q, k, v, o, three MLP matrices, two norms), last norm.
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    assert models.count_parameters(out) == 2 * 64 * 32 + 2 * layer + 32


def test_missing_directory_and_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"model directory .*/nowhere does not exist"):
        models.make_checkpoint(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        models.make_checkpoint(tmp_path / "empty", tmp_path)


def test_bin_only_directory_is_refused_and_never_unpickled(copy, tmp_path):
    marker = tmp_path / "executed"
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(InputError, match="weights: bin"):
        make(copy, tmp_path)
    assert not marker.exists()
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InputError, match="not a plain file of tensors"):
        make(copy, tmp_path, weights="bin")
    assert not marker.exists()
    pickle.loads((copy / "pytorch_model.bin").read_bytes())
    assert marker.exists(), "the pickle was not hostile, so the test proved nothing"


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_weights_are_converted_bit_for_bit(copy, tmp_path, shards):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(state)
    if shards == 1:
        torch.save(state, copy / "pytorch_model.bin")
    else:
        halves = [names[: len(names) // 2], names[len(names) // 2 :]]
        mapping = {}
        for number, half in enumerate(halves, start=1):
            file = f"pytorch_model-{number:05d}-of-00002.bin"
            torch.save({name: state[name] for name in half}, copy / file)
            mapping |= dict.fromkeys(half, file)
        index = {"metadata": {}, "weight_map": mapping}
        (copy / models.INDEX["bin"]).write_text(json.dumps(index))
    out = make(copy, tmp_path, weights="bin")
    assert not list(out.glob("*.bin*"))
    converted = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert sorted(converted) == names
    assert all(torch.equal(converted[name], state[name]) for name in names)


def test_shared_tensors_of_a_pickle():
    import torch

    base = torch.arange(6.0).reshape(2, 3)
    state = {"embed.weight": base, "lm_head.weight": base, "other": base[0]}
    tied = models._unshared(state, tied=True)
    assert sorted(tied) == ["embed.weight", "other"]
    untied = models._unshared(state, tied=False)
    assert torch.equal(untied["lm_head.weight"], base)
    assert len({tensor.data_ptr() for tensor in untied.values()}) == 3


def test_remote_code_is_refused_or_dropped(copy, tmp_path):
    edit(copy / "config.json", auto_map={"AutoConfig": "evil.Config"})
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    out = make(copy, tmp_path)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((out / name).read_text())
    shutil.rmtree(out)
    edit(copy / "config.json", model_type="my_own")
    with pytest.raises(InputError, match="'my_own' needs remote code"):
        make(copy, tmp_path)


def test_quantised_checkpoint_is_refused(copy, tmp_path):
    edit(copy / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match="quantised \\(gptq\\)"):
        make(copy, tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors"]
)
def test_index_with_a_path_is_refused(copy, tmp_path, name):
    (copy / models.INDEX["safetensors"]).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(InputError, match="plain file name"):
        make(copy, tmp_path)


def test_index_naming_a_pickle_or_a_missing_shard(copy, tmp_path):
    index = copy / models.INDEX["safetensors"]
    index.write_text(json.dumps({"weight_map": {"w": "pytorch_model.bin"}}))
    with pytest.raises(InputError, match=r"not a \.safetensors file"):
        make(copy, tmp_path)
    shutil.rmtree(tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    with pytest.raises(IntegrityError, match="is missing"):
        make(copy, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_link_out_of_the_directory_is_refused(copy, tmp_path, name):
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="outside its directory"):
        make(copy, tmp_path)


def test_snapshot_of_the_hub_cache_is_followed_to_its_blobs(tiny, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(tiny.iterdir()):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    out = make(snapshot, tmp_path)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_geometry_mismatch_names_field_and_values(tiny):
    found = models.geometry_of(tiny)
    geometry = {**TINY, "head_dim": 8, "tie_word_embeddings": False, "dtype": "float32"}
    models.check_geometry(geometry, found, "tiny")
    with pytest.raises(InputError, match=r"model tiny.*hidden_size is 32, the catalogue says 40"):
        models.check_geometry({**geometry, "hidden_size": 40}, found, "tiny")


# --- the catalogue --------------------------------------------------------------------------------


def parameters_of(g: dict) -> int:
    """Count a LLaMA's parameters by hand."""
    h, f, d = g["hidden_size"], g["intermediate_size"], g["head_dim"]
    q, k = g["num_attention_heads"] * d, g["num_key_value_heads"] * d
    layer = 2 * h * q + 2 * h * k + 3 * h * f + 2 * h
    embeddings = (1 if g["tie_word_embeddings"] else 2) * g["vocab_size"] * h
    return embeddings + g["num_hidden_layers"] * layer + h


def test_catalogue_sources_parse_and_geometries_give_the_published_counts():
    catalogue = yaml.safe_load((ROOT / "config/models.yaml").read_text())
    published = {
        "smollm2-135m": 134_515_008,
        "llama-7b": 6_738_415_616,
        "llama-3-8b": 8_030_261_248,
        "tinyllama-1.1b": 1_100_048_384,
    }
    for name, count in published.items():
        entry = catalogue[name]
        geometry = json.loads((ROOT / "config" / entry["geometry"]).read_text())
        assert parameters_of(geometry) == count == entry["parameters"]
    for file in ("models.yaml", "texts.yaml"):
        for entry in yaml.safe_load((ROOT / "config" / file).read_text()).values():
            source = parse_source(entry["source"])
            assert (source.kind == "pypi") == ("sha256" in entry)
            assert entry["licence"]
            assert entry["citation"].startswith("@")


def script(name: str):
    path = ROOT / "workflow_scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def request(name: str, params: dict, out: Path, **inputs: Path):
    from prunelib.provenance.step import StepRequest

    return StepRequest(
        step=name, key="0" * 16, params=params, inputs=inputs, out=out, entry=(), packages=()
    )


def test_fetch_model_step_on_a_directory(tiny, tmp_path):
    params = {"name": "tiny", "source": f"dir:{tiny}", "geometry": TINY, "licence": "none"}
    step = script("fetch_model")
    step.main(request("fetch_model", params, tmp_path), tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["parameters"] == models.count_parameters(tiny)
    assert meta["source"] == f"dir:{tiny}"
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    with pytest.raises(InputError, match="the catalogue says 7"):
        step.main(request("fetch_model", {**params, "parameters": 7}, wrong), wrong)
    with pytest.raises(InputError, match="geometry is missing"):
        step.main(request("fetch_model", {"name": "x", "source": "dir:x"}, wrong), wrong)


@pytest.mark.real
def test_fetch_the_embedded_model(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(ROOT)
    entry = yaml.safe_load((ROOT / "config/models.yaml").read_text())["smollm2-135m"]
    entry["geometry"] = json.loads((ROOT / "config" / entry["geometry"]).read_text())
    params = {"name": "smollm2-135m", **entry}
    script("fetch_model").main(request("fetch_model", params, tmp_path), tmp_path)
    assert json.loads((tmp_path / "meta.json").read_text())["parameters"] == 134_515_008
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    # The file's dequantised values, by another implementation (gguf's own reader).
    from gguf import GGUFReader, dequantize

    gguf = fetch(parse_source(entry["source"]), entry["sha256"])
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    down = tensors["blk.7.ffn_down.weight"]
    expected = torch.from_numpy(dequantize(down.data, down.tensor_type).copy())
    assert torch.equal(model.model.layers[7].mlp.down_proj.weight.data, expected.float())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "The capital of France is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
