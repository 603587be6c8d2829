"""Whole models: converted without a change, the same with and without a cache, in `generate`, on disk and elsewhere."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache, pipeline

import nestling as nl
from nestling import dmc
from nestling.anatomy import cache_name
from nestling.anatomy.attention import last_channel, sites
from nestling.dmc.runtime.modeling import in_halves
from nestling.dmc.runtime.slots import PAGE, TENSORS
from nestling.dmc.show import merges
from nestling.errors import CheckpointError, NestlingError, UnsupportedArchitecture
from tests.dmc.models import BOUNDED, FULL, HYBRID, merging
from tests.models import logits, tiny, token_batches

METHODS = [{}, {"method": "dms", "window": 3}]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def ids(batch=2, seq=17, seed=1):
    return token_batches(1, batch, seq, seed)[0]["input_ids"]


@torch.no_grad()
def in_pieces(model, tokens, cuts, **inputs):
    """Logits of a text given piece by piece, and the cache."""
    cache, found = DynamicCache(config=model.config), []
    for start, stop in pairwise(cuts):
        mask = {"attention_mask": inputs["attention_mask"][:, :stop]} if inputs else {}
        found.append(model(tokens[:, start:stop], use_cache=True, **{cache_name(model): cache}, **mask).logits)
    return torch.cat(found, 1), cache


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("variant", FULL)
def test_every_architecture(variant):
    stock = tiny(variant)
    before = logits(stock, ids())
    model = dmc.convert(stock)
    assert model is stock
    torch.testing.assert_close(logits(model, ids()), before, atol=1e-11, rtol=0)
    assert dmc.measure(model, [{"input_ids": ids()}]).ratio == 1
    model = merging(variant)
    whole = logits(model, ids())
    assert 1.1 < dmc.measure(model, [{"input_ids": ids()}]).ratio < 6
    pieces = [] if variant in HYBRID else [[0, 6, 7, 8, 17]]  # stock mixers in float32 differ by the split
    for cuts in ([0, 17], *pieces):
        torch.testing.assert_close(in_pieces(model, ids(), cuts)[0], whole, atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("variant", ["qwen3", "smollm3", "bamba", "nemotron_h"])
def test_tokens_are_dropped_by_other_architectures_too(variant):
    model = merging(next(name for name in FULL if name.startswith(variant)), method="dms", window=3)
    whole = logits(model, ids())
    assert 1.05 < dmc.measure(model, [{"input_ids": ids()}]).ratio < 4
    cuts = [0, 17] if variant in ("bamba", "nemotron_h") else [0, 6, 7, 8, 17]
    torch.testing.assert_close(in_pieces(model, ids(), cuts)[0], whole, atol=1e-10, rtol=0)


def test_what_is_shown_of_a_text_is_what_the_cache_holds_in_the_end():
    model, tokens = merging(method="dms", window=2), ids(1, 17)
    with torch.no_grad():
        cache = model(tokens, use_cache=True)[cache_name(model)]

    class Given(_Tokenizer):
        def __call__(self, text):
            return {"input_ids": tokens[0].tolist()}

    found = merges(model, Given(), "a text")
    for layer, held in enumerate(cache.layers):
        assert [sum(head) for head in found.opened[layer]] == held.length[0].tolist()
        assert all(all(head[-3:]) for head in found.opened[layer])


@pytest.mark.parametrize("variant", BOUNDED)
def test_models_whose_cache_is_bounded_are_refused(variant):
    with pytest.raises(UnsupportedArchitecture, match="full attention"):
        dmc.convert(tiny(variant))


def test_free_makes_the_channel_zero_and_merges_nothing():
    model = dmc.free(dmc.convert(tiny("qwen2")))
    anatomy = nl.Anatomy.of(model)
    for site in sites(anatomy):
        for name, rows in last_channel(anatomy, site).items():
            assert not model.state_dict()[name][rows].any()
    assert dmc.measure(model, [{"input_ids": ids()}]).ratio == 1
    freed = logits(model, ids())
    model.config.dmc["keep"] = 1e-200  # plain attention without the channel
    torch.testing.assert_close(freed, logits(model, ids()), atol=1e-11, rtol=0)


@pytest.mark.parametrize("gates", METHODS, ids=["dmc", "dms"])
def test_generate_is_what_the_whole_text_says(gates):
    model, tokens = merging(**gates), ids(3, 9)
    expected = tokens
    for _ in range(8):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(tokens, **GREEDY), expected)


@pytest.mark.parametrize("gates", METHODS, ids=["dmc", "dms"])
def test_left_padding_changes_nothing(gates):
    model, tokens = merging(**gates), ids(2, 9)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], 1)
    padded[1, 4:7] = 0
    mask = (torch.arange(13) >= torch.tensor([[4], [7]])).long()
    found = model.generate(padded, attention_mask=mask, **GREEDY)
    for row, start in enumerate((4, 7)):
        alone = model.generate(padded[row : row + 1, start:], **GREEDY)
        assert torch.equal(found[row, start:], alone[0])


@pytest.mark.parametrize("gates", METHODS, ids=["dmc", "dms"])
def test_beams_are_those_of_a_search_without_a_cache(gates):
    model = merging(**gates)
    found = [model.generate(ids(2, 7), num_beams=3, use_cache=cached, **GREEDY) for cached in (True, False)]
    assert torch.equal(*found)


def test_text_generation_pipeline(monkeypatch):
    model = merging(dtype=torch.float32)
    made = pipeline("text-generation", model=model, tokenizer=_Tokenizer())
    assert isinstance(made("x", max_new_tokens=3, do_sample=False)[0]["generated_text"], str)


class _Tokenizer:
    """The little of a tokenizer that a pipeline asks for."""

    pad_token_id = eos_token_id = 2
    padding_side, model_input_names, chat_template = "left", ["input_ids"], None
    is_fast = False

    def __call__(self, text, **options):
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()})

    def decode(self, tokens, **options):
        return " ".join(map(str, tokens))


@pytest.mark.parametrize("gates", METHODS, ids=["dmc", "dms"])
def test_batch_rows_can_be_chosen_and_repeated(gates):
    model, tokens = merging(**gates), ids(3, 12)
    whole = logits(model, tokens)
    _, cache = in_pieces(model, tokens[:, :11], [0, 11])
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        out = model(tokens[[2, 2, 0, 0], 11:], **{cache_name(model): cache}).logits
    torch.testing.assert_close(out[:, 0], whole[[2, 2, 0, 0], 11], atol=1e-10, rtol=0)


@pytest.mark.parametrize("gates", METHODS, ids=["dmc", "dms"])
def test_a_saved_cache_goes_on_as_if_nothing_happened(tmp_path, gates):
    model, tokens = merging("qwen3", **gates), ids(2, 12)
    whole = logits(model, tokens)
    _, cache = in_pieces(model, tokens[:, :10], [0, 10])
    dmc.save_cache(cache, tmp_path / "cache.safetensors")
    cache = dmc.load_cache(tmp_path / "cache.safetensors")
    assert cache.get_seq_length() == 10
    with torch.no_grad():
        out = [model(tokens[:, t : t + 1], **{cache_name(model): cache}).logits for t in (10, 11)]
    torch.testing.assert_close(torch.cat(out, 1), whole[:, 10:], atol=1e-10, rtol=0)
    (tmp_path / "cache.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged"):
        dmc.load_cache(tmp_path / "cache.safetensors")


DAMAGE = {  # what is done to a tensor of the first layer, and a word of the refusal
    "table, a page that is not there": ("table", lambda t: t.fill_(10**6), "pages that are not there"),
    "table, one page twice": ("table", torch.zeros_like, "one of them twice"),
    "length, beyond the table": ("length", lambda t: t + 10**6, "pages that are not there"),
    "length, negative": ("length", lambda t: t - 10**6, "pages that are not there"),
    "used, more than there are": ("used", lambda t: t + 10**6, "pages that are not there"),
    "values, of another size": ("values", lambda t: t[..., 1:].contiguous(), "values is"),
    "sums, of another type": ("sums", lambda t: t.half(), "sums is"),
    "seen, of another batch": ("seen", lambda t: t[1:], "seen is"),
    "recent, of another type": ("recent", lambda t: t.long(), "recent is"),
    "recent, beyond the slots": ("recent", lambda t: t + 10**6, "slots that are not there"),
}


@pytest.mark.parametrize("gates", METHODS, ids=["dmc", "dms"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_cache_whose_tensors_do_not_belong_together_is_refused(tmp_path, damage, gates):
    """Loops would read and write where its tables say, beyond memory."""
    if "beyond the slots" in damage and not gates:
        pytest.skip("nothing is kept of the newest tokens where tokens merge")
    model, path = merging(**gates), tmp_path / "cache.safetensors"
    _, cache = in_pieces(model, ids(2, 40), [0, 40])
    dmc.save_cache(cache, path)
    assert dmc.load_cache(path).get_seq_length() == 40  # the control
    name, change, word = DAMAGE[damage]
    setattr(cache.layers[0], name, change(getattr(cache.layers[0], name)))
    tensors = {f"{n}.{t}": getattr(layer, t).contiguous() for n, layer in enumerate(cache.layers) for t in TENSORS}
    kinds = [{"slots": True, "tokens": 40, "page": PAGE} for _ in cache.layers]
    save_file(tensors, path, metadata={"layers": json.dumps(kinds)})
    with pytest.raises(CheckpointError, match=word):
        dmc.load_cache(path)


def test_memory_follows_the_ratio():
    model, tokens = merging(dtype=torch.float32), ids(1, 1500)
    model.config.dmc["offset"] = 4.0
    _, cache = in_pieces(model, tokens, [0, 1500])
    stock = DynamicCache()
    for _ in cache.layers:
        stock.update(torch.zeros(1, 2, 1500, 8), torch.zeros(1, 2, 1500, 8), len(stock))
    slots = sum(int(layer.length.sum()) for layer in cache.layers)
    ratio = 4 * 2 * 1500 / slots
    assert ratio > 1.3
    assert dmc.cache_bytes(stock) / dmc.cache_bytes(cache) > 0.85 * ratio
    assert dmc.measure(model, [{"input_ids": tokens}]).ratio == pytest.approx(ratio)


def test_rotations_are_recognized_by_what_they_do():
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as neighbours
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves
    from transformers.models.nemotron.modeling_nemotron import apply_rotary_pos_emb as partly

    assert in_halves(halves, 8, 8)
    assert in_halves(partly, 8, 4)
    assert not in_halves(neighbours, 8, 8)


def test_a_cache_of_another_batch_or_model_is_refused():
    _, cache = in_pieces(merging(), ids(2), [0, 17])
    for model, tokens in ((merging(), ids(3, 1)), (merging(), ids(3, 4)), (merging(method="dms"), ids(2, 1))):
        with torch.no_grad(), pytest.raises(ValueError, match="another batch or model"):
            model(tokens, **{cache_name(model): cache})


def test_merged_tokens_cannot_be_taken_back():
    _, cache = in_pieces(merging(), ids(), [0, 17])
    cache.crop(0)
    with pytest.raises(ValueError, match="cannot give back"):
        cache.crop(2)
    cache.crop(17)
    assert cache.get_seq_length() == 0


def test_what_a_compressed_model_cannot_take_is_said():
    model = merging()
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids(), **{cache_name(model): StaticCache(config=model.config, max_cache_len=32)})
    with pytest.raises(ValueError, match="real tokens only"):
        model(ids(), attention_mask=torch.ones(2, 1, 17, 17))
    with pytest.raises(ValueError, match="new DynamicCache"):
        model.generate(ids(), cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="one sequence per row"):
        model(ids(), position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7]]))
    with pytest.raises(NestlingError, match="already"):
        dmc.convert(model)
    with pytest.raises(NestlingError, match="not a setting"):
        dmc.convert(tiny("llama"), gate=3)


def test_documents_do_not_merge_across_their_borders():
    model, tokens = merging(), ids(1, 12)
    tokens[0, 5] = model.config.eos_token_id
    model.config.dmc["offset"] = -1e6
    with dmc.recording(model) as decisions:
        logits(model, tokens)
    opened = ~decisions[0].quiet[0, 0]
    assert opened.nonzero().flatten().tolist() == [0, 5, 6]


def test_a_checkpoint_is_the_base_tensors_and_no_other_class_reads_it(tmp_path):
    model = merging("llama-tied")
    nl.hub.save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["model_type"] == "nestling_dmc_llama"
    loaded, _ = nl.load(tmp_path / "model")
    assert loaded.state_dict().keys() == tiny("llama-tied").state_dict().keys()
    torch.testing.assert_close(logits(loaded, ids()), logits(model, ids()), atol=1e-12, rtol=0)
    with pytest.raises(Exception, match="layer_types"):
        LlamaForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_mixture_that_was_read_under_its_published_names_is_saved_and_read(tmp_path):
    """transformers would write the experts one by one again, and not know how to put them together for this type."""
    tiny("qwen3_moe", dtype=torch.float32).save_pretrained(tmp_path / "stock")
    model = dmc.convert(nl.load(tmp_path / "stock")[0])
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(nl.load(tmp_path / "model")[0], ids()), logits(model, ids()))


def test_a_pruned_model_is_compressed_and_a_compressed_one_pruned(tmp_path):
    shape = nl.Shape(intermediate_size=[44, 30, 17, 8], num_key_value_heads=1)
    ranking = nl.rank(tiny("llama"), token_batches(1))
    small = dmc.convert(nl.prune(tiny("llama"), ranking, shape), scale=8.0, offset=0.3)
    small.config.dmc["keep"] = 0.0
    torch.testing.assert_close(in_pieces(small, ids(), [0, 9, 17])[0], logits(small, ids()), atol=1e-10, rtol=0)
    nl.hub.save(small, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(loaded, ids()), logits(small, ids()), atol=1e-12, rtol=0)
    cut = nl.prune(merging(), ranking, nl.Shape(num_hidden_layers=3, intermediate_size=30))
    assert dmc.is_converted(cut)
    assert len(cut.config.dmc_layers) == 3
    torch.testing.assert_close(in_pieces(cut, ids(), [0, 9, 17])[0], logits(cut, ids()), atol=1e-10, rtol=0)


def test_the_folder_alone_is_enough(tmp_path):
    tokens = ids(2, 9)
    for number, gates in enumerate(METHODS):
        model = merging(**gates)
        model.save_pretrained(tmp_path / f"model{number}")
        torch.save({"ids": tokens, "logits": logits(model, tokens)}, tmp_path / f"model{number}/expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
for number in range({len(METHODS)}):
    model = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/model{{number}}", trust_remote_code=True).eval()
    expected = torch.load(f"{tmp_path}/model{{number}}/expected.pt")
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], atol=1e-10, rtol=0)
    model.generate(expected["ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
assert "nestling" not in sys.modules
kernels = [module for name, module in sys.modules.items() if name.endswith(".kernel") and "nestling" not in name]
assert kernels and all(not k.usable(expected["logits"]) and k._loops().takes for k in kernels)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-S", "-c", _SITE + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The installed packages without an editable install of this one among them.
_SITE = f"import sys; sys.path += {[path for path in sys.path if path.endswith('site-packages')]!r}\n"
