"""What apply and merge write is what other programs expect of a checkpoint: transformers, mergekit, llama.cpp, vLLM."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from graftllm.checkpoint import INDEX, Checkpoint
from graftllm.delta import Delta
from graftllm.fusion.applying import apply_packs
from graftllm.fusion.inputs import open_tuned
from graftllm.fusion.merging import merge
from graftllm.fusion.methods.table import METHODS
from graftllm.packer import compress
from tests.models import save_llama, with_vocabulary


@pytest.fixture(scope="module", params=["whole", "sharded"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A base as it is downloaded, with the index of weights in a format that nobody writes any more."""
    home = tmp_path_factory.mktemp("ordinary")
    save_llama(home / "whole")
    model = AutoModelForCausalLM.from_pretrained(home / "whole", dtype="auto")
    model.generation_config.update(do_sample=True, temperature=0.5, max_new_tokens=9)
    size = "20KB" if request.param == "sharded" else "1GB"
    model.save_pretrained(home / "base", max_shard_size=size)
    AutoTokenizer.from_pretrained(home / "whole").save_pretrained(home / "base")
    (home / "base" / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    return Checkpoint.open(home / "base")


@pytest.fixture(params=["apply", "merge"])
def written(request: pytest.FixtureRequest, base: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint with ten tokens more than its base."""
    with_vocabulary(base.path.parent / "whole", tmp_path / "grown", 80)
    shutil.copy(base.path / "generation_config.json", tmp_path / "grown")
    tuned = Checkpoint.open(tmp_path / "grown")
    if request.param == "apply":
        apply_packs(base, [(compress(Delta(base, tuned)), 1.0)], tmp_path / "out")
    else:
        merge(base, [open_tuned(base, tuned.path, name="grown")], METHODS["task-arithmetic"], tmp_path / "out")
    return tmp_path / "out"


def test_transformers_opens_all_of_it(base: Checkpoint, written: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written, dtype="auto")
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 80
    assert model.dtype == base.dtype
    assert model.lm_head.weight is model.get_input_embeddings().weight
    old, new = AutoTokenizer.from_pretrained(base.path), AutoTokenizer.from_pretrained(written)
    turn = [{"role": "user", "content": "abc"}]
    assert new("abc").input_ids == old("abc").input_ids
    assert new.apply_chat_template(turn, tokenize=False) == old.apply_chat_template(turn, tokenize=False)
    kept = GenerationConfig.from_pretrained(written)
    assert (kept.do_sample, kept.temperature, kept.max_new_tokens) == (True, 0.5, 9)


def test_shards_and_index_tell_the_same(base: Checkpoint, written: Path) -> None:
    shards = sorted(path.name for path in written.glob("*.safetensors"))
    assert shards == sorted(set(base.shards.values()))
    assert all(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) for name in shards)
    found, parameters = {}, 0
    for name in shards:
        with safe_open(written / name, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt", "made_by": "graftllm"}
            found |= dict.fromkeys(shard.keys(), name)
            parameters += sum(shard.get_tensor(key).numel() for key in shard.keys())
    assert found == base.shards
    assert [path.name for path in written.glob("*.index.json")] == ([INDEX] if len(shards) > 1 else [])
    if len(shards) > 1:
        index = json.loads((written / INDEX).read_text())
        assert index["weight_map"] == found
        assert index["metadata"]["total_parameters"] == parameters
        assert index["metadata"]["total_size"] == 2 * parameters


def test_mergekit_reads_every_tensor(written: Path) -> None:
    loader = pytest.importorskip("mergekit.io.lazy_tensor_loader", reason="mergekit is the extra [mergekit]")
    index = loader.ShardedTensorIndex.from_disk(str(written))
    opened = Checkpoint.open(written)
    assert set(index.tensor_paths) == set(opened.names())
    reader = loader.LazyTensorLoader(index)
    assert all(reader.get_tensor(name).shape == opened.specs[name].shape for name in opened.names())
