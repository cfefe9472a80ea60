"""Document 003, section by section, run as it is written against `loadstone.scratch`; and what learners get wrong."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dialects
import loadstone
import loadstone.scratch as scratch
from bundle_writer import write_bundle
from loadstone.checkpoint import hub
from loadstone.cli import main
from loadstone.errors import ConfigError, LoadstoneError, PlanError, SourceError
from loadstone.scratch import (
    GPT_CONFIG_124M,
    GPTDatasetV1,
    GPTModel,
    calc_loss_batch,
    calc_loss_loader,
    create_dataloader_v1,
    download_and_load_gpt2,
    evaluate_model,
    generate,
    generate_and_print_sample,
    load_weights_into_gpt,
    text_to_token_ids,
    token_ids_to_text,
)
from loadstone.tokenizer import Tokenizer, load_tokenizer
from loopback import Loopback, served
from small_vocabularies import byte_level, write_pair

# Document 003's code blocks, from "Save Model" on.
DOCUMENT = (
    'torch.save(model.state_dict(), "model.pth")',
    'torch.save({\n  "model_state_dict": model.state_dict(),\n  "optimizer_state_dict": optimizer.state_dict(),\n'
    '}, "model_and_optimizer.pth")',
    'checkpoint = torch.load("model_and_optimizer.pth")\nmodel.load_state_dict(checkpoint["model_state_dict"])\n'
    'optimizer.load_state_dict(checkpoint["optimizer_state_dict"])',
    'download_and_load_gpt2(model_size="124M", models_dir="gpt2")',
    "load_weights_into_gpt(gpt, params)",
    "optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)\n"
    "train_model_simple(model, train_loader, val_loader, optimizer, device,\n"
    "                   num_epochs=10, eval_freq=5, eval_iter=5,\n"
    '                   start_context="Every effort moves you", tokenizer=tokenizer)',
    'token_ids = generate(\n    model=model,\n    idx=text_to_token_ids("Every effort moves you", tokenizer),\n'
    '    max_new_tokens=25,\n    context_size=GPT_CONFIG_124M["context_length"],\n    top_k=50,\n    temperature=1.5\n)'
    "\n"
    "print(token_ids_to_text(token_ids, tokenizer))",
    'settings, params = download_and_load_gpt2("124M", "gpt2")\ngpt = GPTModel(NEW_CONFIG)\n'
    "load_weights_into_gpt(gpt, params)\ngpt.eval()",
)
SAVE, SAVE_BOTH, LOAD_BOTH, DOWNLOAD, CONVERT, TRAIN, GENERATE, PRETRAINED = DOCUMENT
TEXT = (
    "Every effort moves you forward, said the old man, and every step that you take is a step that nobody else can "
    "take for you. He looked at the hill, and at the long white road that led up to it. It was early in the morning, "
    "and the birds had begun to sing. Every effort moves you, he said again, even the one that seems to fail. "
) * 6
VOCAB, MERGES = byte_level()
SMALL = GPT_CONFIG_124M | {"vocab_size": len(VOCAB), "context_length": 24, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
GPT2 = dialects.gpt2_hf(vocab=len(VOCAB), context=40, width=32, layers=3)
HPARAMS = {"n_vocab": len(VOCAB), "n_ctx": 40, "n_embd": 32, "n_head": 4, "n_layer": 3}
RIGHT = SMALL | {"context_length": 40, "n_layers": 3, "qkv_bias": True}


class Tiktoken:
    """An encoding with tiktoken's two methods, and its refusal of special text that is not allowed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, allowed_special: set[str] | None = None) -> list[int]:
        if "<|endoftext|>" in text and "<|endoftext|>" not in (allowed_special or ()):
            raise ValueError("disallowed special token")
        return self._tokenizer.encode(text, add_special=False, parse_special=True)

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_pair(folder, VOCAB, MERGES)
    found = load_tokenizer(folder)
    assert found
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOADSTONE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def openai(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """OpenAI's storage on loopback, with a small GPT-2 in it; gives the folder that is served."""
    source = here / "source"
    write_bundle(source / "model.ckpt", dialects.gpt2_openai(GPT2))
    (source / "hparams.json").write_text(json.dumps(HPARAMS))
    (source / "model.ckpt.meta").write_bytes(b"a graph")
    write_pair(source, VOCAB, MERGES, ("encoder.json", "vocab.bpe"))
    for file in hub.OPENAI_SHA256:
        monkeypatch.setitem(hub.OPENAI_SHA256, file, hashlib.sha256((source / file).read_bytes()).hexdigest())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Loopback() as server:
        server.routes |= {f"/124M/{file}": served((source / file).read_bytes()) for file in hub.OPENAI_FILES}
        monkeypatch.setenv("LOADSTONE_OPENAI_MIRRORS", server.url)
        yield source


def run(*blocks: str, **names: Any) -> dict[str, Any]:
    """The blocks, as a reader's script that began with `from loadstone.scratch import *`."""
    space = {name: getattr(scratch, name) for name in dir(scratch)} | {"torch": torch, **names}
    for block in blocks:
        exec(block, space)
    return space


def small(**settings: Any) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(SMALL | settings)


def loaders(tokenizer: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"batch_size": 2, "max_length": 24, "stride": 24, "tokenizer": tokenizer}
    cut = int(0.8 * len(TEXT))
    torch.manual_seed(1)
    return {
        "train_loader": create_dataloader_v1(TEXT[:cut], **sizes),
        "val_loader": create_dataloader_v1(TEXT[cut:], drop_last=False, shuffle=False, **sizes),
    }


# --- the document -------------------------------------------------------------------------------------------------


def test_the_blocks_are_the_documents(shared: Path) -> None:
    (document,) = (shared / "seeds").glob("003*")
    text = document.read_text()
    blocks = [
        block.strip() for block in re.findall(r"``` python\n(.*?)```", text[text.index("### Save Model") :], re.S)
    ]
    assert tuple(blocks) == DOCUMENT
    (config,) = re.findall(r"GPT_CONFIG_124M = ({.*?})", text, re.S)
    assert eval(config) == GPT_CONFIG_124M
    for signature in re.findall(r"^(\w+)\((.*)\)$", text, re.M):
        if signature[0] in ("calc_loss_batch", "train_model_simple", "evaluate_model", "generate"):
            wanted = [name.split("=")[0].strip() for name in signature[1].split(",")]
            function = getattr(scratch, signature[0])
            assert list(function.__code__.co_varnames[: function.__code__.co_argcount]) == wanted


@pytest.mark.parametrize("kind", [lambda t: t, Tiktoken], ids=["our tokenizer", "tiktoken's"])
def test_train_generate_save_load(
    kind: Callable[[Tokenizer], Any], tokenizer: Tokenizer, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"model": small(drop_rate=0.0), "device": "cpu", "tokenizer": kind(tokenizer), "GPT_CONFIG_124M": SMALL}
    given = names | loaders(kind(tokenizer))
    before = calc_loss_loader(given["val_loader"], given["model"], "cpu")
    space = run(TRAIN.replace("lr=0.0004", "lr=0.004"), **given)
    after = calc_loss_loader(given["val_loader"], given["model"], "cpu")
    assert before == pytest.approx(np.log(len(VOCAB)), rel=0.05)
    assert after < before - 2
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Ep 1 \(Step 000000\): Train loss \d\.\d{3}, Val loss \d\.\d{3}", printed[0])
    samples = [line for line in printed if line.startswith("Every effort moves you")]
    assert len(samples) == 10  # one an epoch

    torch.manual_seed(123)
    run(GENERATE, **space)
    first = capsys.readouterr().out
    torch.manual_seed(123)
    run(GENERATE, **space)
    assert first == capsys.readouterr().out
    assert first.startswith("Every effort moves you")

    run(SAVE, SAVE_BOTH, **space)
    trained = space["model"]
    other = small()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    run(LOAD_BOTH, model=other, optimizer=optimizer)
    assert_same(other, trained)
    assert optimizer.param_groups[0]["lr"] == 0.004
    state, saved = optimizer.state_dict()["state"], space["optimizer"].state_dict()["state"]
    assert all(torch.equal(state[i][key], saved[i][key]) for i in saved for key in saved[i])
    for file in ("model.pth", "model_and_optimizer.pth"):
        loaded, _ = loadstone.load(here / file, config={"n_heads": 4})
        ids = torch.randint(0, len(VOCAB), (2, 24))
        assert torch.equal(loaded(ids), trained.eval()(ids))


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def test_inspect_recognises_a_saved_model(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(SAVE, model=small())
    monkeypatch.setattr(sys, "argv", ["loadstone", "inspect", "model.pth"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    shown = capsys.readouterr().out
    assert re.search(r"gpt2, in the dialect .*loadstone", shown)
    assert "clean: every parameter has its source" in shown


def test_import_of_openais_weights(openai: Path, here: Path) -> None:
    """Logits equal those of `loadstone.load` bit for bit, and the files are fetched once."""
    run(DOWNLOAD)
    (openai / "hparams.json").unlink()
    space = run(PRETRAINED, CONVERT, NEW_CONFIG=RIGHT)
    assert space["settings"] == HPARAMS
    assert not space["gpt"].training
    loaded, _ = loadstone.load(here / "gpt2" / "124M")
    ids = torch.randint(0, len(VOCAB), (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(space["gpt"](ids), loaded(ids))
    assert sum(p.numel() for p in space["gpt"].parameters()) == sum(p.numel() for p in loaded.parameters()) + 32 * 401
    assert (here / "gpt2" / "124M").resolve() == (here / "cache" / "openai" / "124M").resolve()


def test_params_have_the_books_shape(openai: Path) -> None:
    settings, params = download_and_load_gpt2("124M", "gpt2")
    assert set(params) == {"blocks", "wte", "wpe", "g", "b"}
    assert len(params["blocks"]) == settings["n_layer"]
    for i, block in enumerate(params["blocks"]):
        assert set(block) == {"ln_1", "ln_2", "attn", "mlp"}
        np.testing.assert_array_equal(block["attn"]["c_attn"]["w"], GPT2[f"h.{i}.attn.c_attn.weight"])  # 2-D
        np.testing.assert_array_equal(block["mlp"]["c_proj"]["b"], GPT2[f"h.{i}.mlp.c_proj.bias"])
        np.testing.assert_array_equal(block["ln_1"]["g"], GPT2[f"h.{i}.ln_1.weight"])
    np.testing.assert_array_equal(params["g"], GPT2["ln_f.weight"])
    np.testing.assert_array_equal(params["wpe"], GPT2["wpe.weight"])


def test_files_that_the_books_downloader_left_are_used(openai: Path, here: Path) -> None:
    (here / "mine").mkdir()
    openai.rename(here / "mine" / "124M")
    settings, _ = download_and_load_gpt2("124M", here / "mine")
    assert settings == HPARAMS
    assert not (here / "cache").exists()


def test_a_cache_that_was_emptied_is_filled_again(openai: Path, here: Path) -> None:
    download_and_load_gpt2("124M", "gpt2")
    (here / "cache").rename(here / "gone")
    download_and_load_gpt2("124M", "gpt2")
    assert (here / "gpt2" / "124M" / "hparams.json").is_file()


def test_a_size_that_there_is_not(here: Path) -> None:
    with pytest.raises(SourceError, match="in the sizes 124M, 355M, 774M, 1558M"):
        download_and_load_gpt2("117M", "gpt2")
    assert not (here / "gpt2" / "117M").exists()


# --- the classic mistakes -----------------------------------------------------------------------------------------


def params_of(openai_tensors: dialects.Tensors) -> dict[str, Any]:
    """The book's nested dictionary, written down apart from the code under test."""
    layers = sum(name.endswith("/ln_1/g") for name in openai_tensors)
    params: dict[str, Any] = {"blocks": [{} for _ in range(layers)]}
    for name, value in openai_tensors.items():
        if found := re.fullmatch(r"model/h(\d+)/(\w+)/(\w+)/(\w)", name):
            block = params["blocks"][int(found[1])]
            block.setdefault(found[2], {}).setdefault(found[3], {})[found[4]] = np.squeeze(value)
        elif found := re.fullmatch(r"model/h(\d+)/(ln_\d)/(\w)", name):
            params["blocks"][int(found[1])].setdefault(found[2], {})[found[3]] = value
        else:
            params[name.rpartition("/")[2]] = value
    return params


PARAMS = params_of(dialects.gpt2_openai(GPT2))


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"context_length": 24}, '"context_length": 40}'),
        ({"qkv_bias": False}, '"qkv_bias": True}'),
        ({"context_length": 24, "qkv_bias": False}, '"context_length": 40, "qkv_bias": True}'),
        ({"n_layers": 2}, '"n_layers": 3}'),
        ({"emb_dim": 48}, '"emb_dim": 32}'),
        ({"vocab_size": 500}, '"vocab_size": 401}'),
    ],
)
def test_a_model_of_other_sizes_is_refused_with_what_to_set(settings: dict[str, Any], advice: str) -> None:
    gpt = GPTModel(RIGHT | settings)
    before = {name: value.clone() for name, value in gpt.state_dict().items()}
    with pytest.raises(PlanError, match=re.escape("`GPTModel({**GPT_CONFIG_124M, ") + f".*{re.escape(advice)}"):
        load_weights_into_gpt(gpt, PARAMS)
    assert all(torch.equal(value, before[name]) for name, value in gpt.state_dict().items())


def test_a_published_model_with_the_wrong_number_of_heads_is_refused() -> None:
    """No shape shows it, and the text would be gibberish."""
    wide = dialects.gpt2_hf(vocab=50, context=16, width=768, layers=12, d_ff=64)  # (the MLP is narrow to be quick)
    sizes = {"vocab_size": 50, "context_length": 16, "qkv_bias": True, "drop_rate": 0.0}
    arrays = {name: torch.from_numpy(value) for name, value in wide.items()}
    with pytest.raises(PlanError, match=r'made with n_heads 16.*"n_heads": 12'):
        GPTModel(GPT_CONFIG_124M | sizes | {"n_heads": 16}).load_state_dict(arrays)


@pytest.mark.parametrize("damage", [lambda p: p["blocks"][1]["attn"].pop("c_proj"), lambda p: p.pop("g")])
def test_params_with_something_missing(damage: Callable[[Any], Any]) -> None:
    params = params_of(dialects.gpt2_openai(GPT2))
    damage(params)
    with pytest.raises(PlanError, match=r"params: .*(missing 2: model/h1/attn/c_proj/w|model/ln_f/g)"):
        load_weights_into_gpt(GPTModel(RIGHT), params)


def test_both_things_that_the_download_returns_instead_of_the_second() -> None:
    mistaken: Any = (HPARAMS, PARAMS)
    with pytest.raises(PlanError, match="the second of the two things"):
        load_weights_into_gpt(GPTModel(RIGHT), mistaken)


def test_transposed_params_are_refused() -> None:
    params = params_of(dialects.gpt2_openai(GPT2))
    for block in params["blocks"]:
        block["mlp"]["c_fc"]["w"] = np.ascontiguousarray(block["mlp"]["c_fc"]["w"].T)
    with pytest.raises(PlanError, match=r"model/h0/mlp/c_fc/w should be \[1, 32, 128\], is \[1, 128, 32\]"):
        load_weights_into_gpt(GPTModel(RIGHT), params)


def test_weights_are_copied_into_the_parameters_that_an_optimizer_holds() -> None:
    gpt = GPTModel(RIGHT)
    held = list(gpt.parameters())
    load_weights_into_gpt(gpt, PARAMS)
    assert all(a is b for a, b in zip(held, gpt.parameters(), strict=True))
    assert gpt.head is not None
    assert torch.equal(gpt.head.weight, gpt.tok_emb.weight)
    with torch.no_grad():
        gpt.head.weight += 1
    assert not torch.equal(gpt.head.weight, gpt.tok_emb.weight)  # a copy, as in the book
    np.testing.assert_array_equal(PARAMS["wte"], GPT2["wte.weight"])  # and nothing of the file's


@pytest.mark.parametrize("dialect", ["hf", "raschka", "lesson"])
def test_state_dicts_of_other_programs(dialect: str) -> None:
    """Document 000's second and third method: the book's own file, and HuggingFace's."""
    arrays = {"hf": lambda w: w, "raschka": dialects.gpt2_raschka, "lesson": dialects.gpt2_lesson}[dialect](GPT2)
    gpt, other = GPTModel(RIGHT), GPTModel(RIGHT)
    gpt.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    load_weights_into_gpt(other, PARAMS)
    assert_same(gpt, other)


def test_a_state_dict_of_another_function_is_refused() -> None:
    arrays = {name: torch.from_numpy(array.copy()) for name, array in dialects.gpt2_nanogpt(GPT2).items()}
    with pytest.raises(PlanError, match=r"activation 'gelu', unlike GPTModel\. Use loadstone\.load"):
        GPTModel(RIGHT).load_state_dict(arrays)


def test_another_width_inside_the_mlp_is_refused() -> None:
    arrays = dialects.gpt2_hf(vocab=len(VOCAB), context=40, width=32, layers=3, d_ff=64)
    with pytest.raises(PlanError, match="of a model with d_ff 64, unlike GPTModel"):
        GPTModel(RIGHT).load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})


def test_a_whole_checkpoint_instead_of_its_state_dict() -> None:
    with pytest.raises(LoadstoneError, match=r"Do you want its \['model_state_dict'\]\?"):
        small().load_state_dict({"model_state_dict": small().state_dict()})


def test_a_dictionary_with_other_keys() -> None:
    with pytest.raises(ConfigError, match=r"needs vocab_size, context_length, .*; see kv_heads"):
        GPTModel(SMALL | {"kv_heads": 2})
    early = {"ctx_len" if key == "context_length" else key: value for key, value in SMALL.items()}  # the draft's name
    with pytest.raises(ConfigError, match="see context_length, ctx_len"):
        GPTModel(early)


def test_a_text_that_is_too_short(tokenizer: Tokenizer) -> None:
    for text in ("", "Every effort"):
        with pytest.raises(LoadstoneError, match=r"the text has \d+ tokens, .* max_length 24 needs 25"):
            GPTDatasetV1(text, tokenizer, 24, 24)
    with pytest.raises(LoadstoneError, match="stride 0"):
        GPTDatasetV1(TEXT, tokenizer, 24, 0)
    with pytest.raises(LoadstoneError, match=r"gives \d+ windows, fewer than one batch of 400.*NaN.*drop_last=False"):
        create_dataloader_v1(TEXT, batch_size=400, max_length=24, tokenizer=tokenizer)


def test_ids_and_lengths_that_the_model_cannot_take() -> None:
    model, ids = small(), torch.zeros(2, 24, dtype=torch.int64)
    with pytest.raises(LoadstoneError, match="token 401 and 24 tokens in a row; the model has vocab_size 401"):
        calc_loss_batch(ids, torch.full_like(ids, 401), model, "cpu")
    with pytest.raises(LoadstoneError, match="context_length 24"):
        calc_loss_batch(ids.repeat(1, 2), ids.repeat(1, 2), model, "cpu")


# --- the parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "stride"), [(4, 1), (4, 4), (5, 3), (7, 20)])
def test_windows(length: int, stride: int, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT[:300], add_special=False)
    windows = GPTDatasetV1(TEXT[:300], tokenizer, length, stride)
    starts = range(0, len(ids) - length, stride)
    assert len(windows) == len(starts)
    for (x, y), start in zip((windows[i] for i in range(len(windows))), starts, strict=True):
        assert x.tolist() == ids[start : start + length]
        assert y.tolist() == ids[start + 1 : start + length + 1]


def test_the_special_token_is_one_token_in_both_kinds_of_tokenizer(tokenizer: Tokenizer) -> None:
    text = "One.<|endoftext|>Two."
    ours, theirs = (text_to_token_ids(text, kind) for kind in (tokenizer, Tiktoken(tokenizer)))
    assert torch.equal(ours, theirs)
    assert VOCAB["<|endoftext|>"] in ours
    assert token_ids_to_text(ours, tokenizer) == token_ids_to_text(theirs, Tiktoken(tokenizer)) == text


def test_the_mean_loss_is_that_of_all_targets(tokenizer: Tokenizer) -> None:
    model = small(drop_rate=0.0)
    x, y = next(iter(loaders(tokenizer)["val_loader"]))
    scores = model(x).log_softmax(-1)
    wanted = -scores.gather(2, y[..., None]).mean()
    torch.testing.assert_close(calc_loss_batch(x, y, model, "cpu"), wanted)
    loader = loaders(tokenizer)["val_loader"]
    each = [calc_loss_batch(x, y, model, "cpu").item() for x, y in loader]
    for count in (1, 2, len(each), None):
        mean = sum(each[:count]) / len(each[:count])
        assert calc_loss_loader(loader, model, "cpu", num_batches=count) == pytest.approx(mean)
    assert calc_loss_loader(loader, model, "cpu", num_batches=99) == pytest.approx(sum(each) / len(each))
    assert np.isnan(calc_loss_loader(loader, model, "cpu", num_batches=0))


def test_evaluation_is_without_dropout_and_restores_the_mode(tokenizer: Tokenizer) -> None:
    model, given = small(drop_rate=0.5), loaders(tokenizer)
    given["train_loader"] = given["val_loader"]
    for mode in (True, False):
        model.train(mode)
        first, second = evaluate_model(model, **given, device="cpu", eval_iter=3)
        assert first == second
        assert model.training is mode


def test_generation_is_without_dropout_even_in_training_mode(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Document 003 generates right after training, without model.eval()."""
    model, ids = small(drop_rate=0.5).train(), torch.tensor([[1, 2, 3]])
    results = [generate(model, ids, 10, 24).tolist() for _ in range(3)]
    assert results[0] == results[1] == results[2]
    assert model.training
    for _ in range(2):
        generate_and_print_sample(model, tokenizer, "cpu", "Every effort")
    one, two = capsys.readouterr().out.splitlines()
    assert one == two


def test_generation_goes_on_beyond_the_context_by_cropping() -> None:
    model = small().eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    found = generate(model, ids, max_new_tokens=40, context_size=24)
    assert found.shape == (2, 43)
    for end in (10, 24, 25, 42):  # each token is the likeliest after the 24 before it
        assert torch.equal(model(found[:, max(0, end - 24) : end])[:, -1].argmax(-1), found[:, end])


def test_generation_stops_at_the_end_token() -> None:
    model, ids = small().eval(), torch.tensor([[5, 6, 7]])
    free = generate(model, ids, 12, 24)
    end = int(free[0, 6])
    stopped = generate(model, ids, 12, 24, eos_id=end)
    first = free[0].tolist().index(end, 3)
    assert stopped.tolist() == [free[0, :first].tolist()]  # the end token is not appended
    assert generate(model, ids, 0, 24).tolist() == ids.tolist()
    both = generate(model, torch.tensor([[5, 6, 7], [1, 1, 1]]), 12, 24, eos_id=end)
    assert both[0, first:].eq(end).all()  # a row that has ended waits for the other


def test_sampling() -> None:
    model, ids = small().eval(), torch.zeros(400, 1, dtype=torch.int64)
    with torch.no_grad():
        model.head.weight *= 10  # type: ignore[union-attr]
    logits = model(ids[:1])[0, -1]
    assert logits.softmax(-1).max() < 0.5 * torch.softmax(logits / 0.3, -1).max()
    torch.manual_seed(0)
    found = generate(model, ids, 1, 24, temperature=0.3, top_k=5)[:, 1]
    assert set(found.tolist()) <= set(logits.topk(5).indices.tolist())
    expected = torch.softmax(logits.topk(5).values / 0.3, -1)
    counts = torch.stack([(found == token).float().mean() for token in logits.topk(5).indices])
    assert (counts - expected).abs().max() < 0.1
    assert generate(model, ids[:3], 1, 24, temperature=2.0, top_k=10_000).shape == (3, 2)
    assert set(generate(model, ids, 1, 24, top_k=5)[:, 1].tolist()) == {int(logits.argmax())}


def test_the_124m_config_is_the_books() -> None:
    with torch.device("meta"):
        model = GPTModel(GPT_CONFIG_124M)
    # 163,009,536 in the book's chapter 4 with 1024 positions less; q, k and v without biases, and a head of its own
    assert sum(p.numel() for p in model.parameters()) == 163_009_536 - 768 * 768
    assert model.dropout == 0.1
