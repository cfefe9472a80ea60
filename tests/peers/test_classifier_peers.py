"""transformers as judge of classifiers (same logits, same labels, both ways) and of which tokens are answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import shared_folder
from loadstone.config import GPTConfig, Rope
from loadstone.config.families import GPT_NEOX_FIELDS, LLAMA_FIELDS
from loadstone.data.batch import Sample, collate
from loadstone.data.prompts import ChatStyle, Message
from loadstone.finetune.classifier import Classifier, classify
from loadstone.finetune.classifier_files import load_classifier, save_classifier
from loadstone.model import GPT
from loadstone.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

SIZES = GPTConfig(50_300, 60, 48, 2, 4, bos_id=50_256, eos_ids=(50_256,))
CONFIGS = {
    "gpt2": SIZES,
    "gpt2 untied": replace(SIZES, tied=False),
    "llama": replace(SIZES, n_kv_heads=2, d_ff=80, architecture="llama", **LLAMA_FIELDS, rope=Rope()),
    "neox": replace(SIZES, architecture="gpt_neox", **GPT_NEOX_FIELDS, rope=Rope(dims=4)),
}
CLASSES = {"gpt2": "GPT2", "gpt2 untied": "GPT2", "llama": "Llama", "neox": "GPTNeoX"}
LABELS = ("ham", "spam", "eggs and more")
TEXTS = ["Hello", "Free entry in 2 a wkly comp to win FA Cup final tkts!", "no", "The 12 cats' hats; é 👍🏽"]


def gpt2_tokenizer() -> Tokenizer:
    folder = shared_folder() / "gpt2-bpe"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data at {folder}")
    found = load_tokenizer(folder)
    assert found is not None
    return found


@torch.no_grad()
def hostile(config: GPTConfig) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(GPT(config), LABELS)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_transformers_reads_our_folder_and_says_the_same(name: str, tmp_path: Path) -> None:
    model, tokenizer = hostile(CONFIGS[name]), gpt2_tokenizer()
    save_classifier(model, tmp_path / "m", tokenizer)
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert type(theirs).__name__ == f"{CLASSES[name]}ForSequenceClassification"
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    # What a language model has more: its head, where it is a matrix of its own.
    assert set(info["unexpected_keys"]) <= ({"lm_head.weight", "embed_out.weight"} if name != "gpt2" else set())
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    rows = words(TEXTS, padding=True, return_tensors="pt")
    assert rows["input_ids"].shape == (4, max(len(tokenizer.encode(text)) for text in TEXTS))
    batch = collate([Sample(ids := torch.tensor(tokenizer.encode(text)).numpy(), ids[:1]) for text in TEXTS])
    ours = model(batch.inputs, batch.lengths)
    assert (theirs(**rows).logits - ours).abs().max() < 1e-4
    assert theirs.config.id2label == dict(enumerate(LABELS))
    ask = transformers.pipeline("text-classification", theirs, tokenizer=words, batch_size=2)
    assert [answer["label"] for answer in ask(TEXTS)] == [each.label for each in classify(model, tokenizer, TEXTS)]


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_we_read_what_transformers_writes(name: str, tmp_path: Path) -> None:
    save_classifier(hostile(CONFIGS[name]), tmp_path / "m", gpt2_tokenizer())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    theirs: Any = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in theirs.parameters():
        parameter.normal_(0.0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_classifier(tmp_path / "theirs")
    assert ours.labels == LABELS
    ids = torch.randint(0, 50_256, (3, 60), generator=torch.Generator().manual_seed(0))
    scores = ours(ids, torch.tensor([60, 7, 1]))
    for row, length in enumerate((60, 7, 1)):
        assert (theirs(ids[row : row + 1, :length]).logits[0] - scores[row]).abs().max() < 1e-4


MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_answers_are_where_a_marked_template_says(tmp_path: Path) -> None:
    """transformers finds them by marks that few templates have; ours are found without, in the same place."""
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    assert ids == 2
    save_classifier(
        hostile(replace(SIZES, vocab_size=50_300)), tmp_path / "m", replace(tokenizer, chat_template=MARKED)
    )
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = [
        Message("system", "Be brief."), Message("user", "Hello there"), Message("assistant", "Hi! \n\n I am here."),
        Message("user", " and \n"), Message("assistant", "  no"),
    ]  # fmt: skip
    theirs = words.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    ours = ChatStyle(replace(tokenizer, chat_template=MARKED))(messages)
    assert ours.ids == theirs["input_ids"]
    assert ours.answer == [bool(each) for each in theirs["assistant_masks"]]
