"""From messages to model input: placeholders, positions, patches, settings, and text that tries to forge them."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from examples.tiny_checkpoint import write_tiny_checkpoint
from examples.tiny_tokenizer import CONTROL_TOKENS
from runtime.errors import InputError
from runtime.media_options import ImageOptions, VideoOptions
from runtime.processor import Processor, ProcessorSettings
from runtime.processor_settings import GenerationDefaults, SecondResize
from runtime.tokenizer import Tokenizer

OVERRIDES = {"num_hidden_layers": 1, "vision_config": {"num_hidden_layers": 1}}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}"
    "<|vision_start|><|{{ p.type }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), overrides=OVERRIDES)


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the small files, to damage."""
    for file in checkpoint.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def processor(checkpoint):
    return Processor(ProcessorSettings.from_hf_folder(checkpoint), Tokenizer.from_folder(checkpoint))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(words):
    return {"type": "text", "text": words}


def image(height, width, **options):
    return {"type": "image", "image": picture(height, width), **options}


def video(count, height, width, **more):
    return {"type": "video", "video": [picture(height, width, k) for k in range(count)], **more}


def edit(folder, file, **changes):
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (values | changes).items() if v is not None}))


def test_image_prompt(processor):
    prompt = processor.prepare(user(image(112, 84), text("What?")))
    shown = [name for name in CONTROL_TOKENS if name != "<|image_pad|>"]
    names = {processor.tokenizer.control_ids[name]: name for name in shown}
    pad = processor.settings.image_token_id
    line = "".join(names.get(i) or ("." if i == pad else processor.tokenizer.decode([i])) for i in prompt.token_ids)
    assert line == (
        "<|im_start|>user\n<|vision_start|>............<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert prompt.token_ids.dtype == prompt.position_ids.dtype == np.int32
    assert prompt.position_ids.shape == (3, len(prompt.token_ids))
    assert prompt.delta == 4 - 12
    assert prompt.open_think
    assert prompt.media[0].grid == (8, 6)


def test_every_frame_has_its_label_and_pads(processor):
    prompt = processor.prepare(user(video(3, 224, 224, timestamps=[0, 0.5, 12.3]), text("What?")))
    (media,) = prompt.media
    assert media.timestamps is not None
    decoded = processor.tokenizer.decode(prompt.token_ids.tolist())
    assert decoded.startswith("user\n0.00.512.3What?")
    frame, pad = processor.tokenizer.control_ids["<|frame|>"], processor.settings.video_token_id
    assert list(prompt.token_ids).count(frame) == 3
    assert list(prompt.token_ids).count(pad) == 3 * media.grid[0] * media.grid[1] // 4
    (positions,) = np.nonzero(prompt.token_ids == pad)
    assert set(prompt.position_ids[0, positions].tolist()) == {
        int(prompt.position_ids[0, k]) + 1
        for k in range(len(prompt.token_ids) - 1)
        if prompt.token_ids[k] != pad and prompt.token_ids[k + 1] == pad
    }


def test_frames_without_times_have_a_bare_label(processor):
    prompt = processor.prepare(user(video(2, 224, 224)))
    assert prompt.media[0].timestamps is None
    assert processor.tokenizer.decode(prompt.token_ids.tolist()).startswith("user\n\n")


def test_several_media_keep_their_order_and_options(processor):
    parts = [image(560, 560, max_pixels=50176), text("a"), video(2, 224, 224), image(560, 560)]
    prompt = processor.prepare(user(*parts))
    assert [media.kind for media in prompt.media] == ["image", "video", "image"]
    assert [media.grid for media in prompt.media] == [(16, 16), (16, 16), (40, 40)]


def test_options_for_all_items_yield_to_an_items_own(processor):
    parts = [image(560, 560), image(560, 560, preprocess_kwargs={"max_pixels": 200704})]
    prompt = processor.prepare(user(*parts), image_options=ImageOptions(max_pixels=50176))
    assert [media.grid for media in prompt.media] == [(16, 16), (32, 32)]


def test_bad_option_of_a_later_item_is_found_before_anything_is_read(processor):
    parts = [{"type": "image", "image": "/does/not/exist.png"}, image(56, 56, max_pixels=-1)]
    with pytest.raises(InputError, match="max_pixels is -1"):
        processor.prepare(user(*parts))


def test_media_beyond_the_context_are_refused_as_they_are_read(processor):
    small = Processor(replace(processor.settings, max_position_embeddings=150), processor.tokenizer)
    missing = {"type": "image", "image": "/does/not/exist.png"}
    with pytest.raises(InputError, match="need 200 tokens, more than the context of 150"):
        small.prepare(user(image(280, 280), image(280, 280), missing))


def test_other_patch_sizes_take_no_media(processor):
    other = Processor(replace(processor.settings, patch_size=16), processor.tokenizer)
    with pytest.raises(InputError, match="patch_size 16"):
        other.prepare(user(image(56, 56)))


def test_progress_names_what_is_read(processor, tmp_path):
    Image.fromarray(picture(56, 56)).save(tmp_path / "cat.png")
    calls = []
    parts = [{"type": "image", "image": str(tmp_path / "cat.png")}, video(2, 224, 224)]
    processor.prepare(user(*parts), progress=lambda *call: calls.append(call))
    assert calls[0] == ("reading cat.png", 0, 0)
    assert calls[-1] == ("reading 2 frames", 2, 2)


def test_patches_come_in_batches_of_whole_frames(processor):
    prompt = processor.prepare(user(image(56, 56), video(3, 224, 224), image(84, 56), image(56, 84)))
    whole = [processor_patches(prompt, media) for media in prompt.media]
    expected = np.concatenate(whole)
    frame = 16 * 16
    for limit in (1, 24, frame, 2 * frame + 20, 10_000):
        batches = list(prompt.patch_batches(limit))
        np.testing.assert_array_equal(np.concatenate([patches for patches, _ in batches]), expected)
        for patches, grids in batches:
            assert patches.dtype == np.float32
            assert grids.dtype == np.int32
            assert len(patches) == (grids[:, 1] * grids[:, 2]).sum()
            assert len(patches) <= limit or len(grids) == 1
        assert len(batches) == {1: 6, 24: 6, frame: 5, 2 * frame + 20: 2, 10_000: 1}[limit]


def processor_patches(prompt, media):
    """Normalise, then cut patch by patch, straight from the definition."""
    values = (media.frames.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    rows, columns = media.grid
    cells = [
        frame[14 * r : 14 * r + 14, 14 * c : 14 * c + 14].transpose(2, 0, 1)
        for frame in values
        for r in range(rows)
        for c in range(columns)
    ]
    return np.stack(cells)


def test_prompt_without_media_has_no_patches(processor):
    prompt = processor.prepare([{"role": "user", "content": "hi"}])
    assert list(prompt.patch_batches(100)) == []
    assert prompt.delta == 0


def test_whole_text_is_encoded_at_once(processor):
    """Our "user" line break and a user's own are one run of text, as in the official tokenisation."""
    prompt = processor.prepare([{"role": "user", "content": "\n\nA video"}])
    ids = processor.tokenizer.control_ids
    middle = processor.tokenizer.encode("user\n\n\nA video")
    assert prompt.token_ids[1 : 1 + len(middle)].tolist() == middle
    assert prompt.token_ids[1 + len(middle)] == ids["<|im_end|>"]


marks = st.sampled_from([*CONTROL_TOKENS, "<|im_", "end|>", "\n", "<", "system", "\\", '"'])
hostile = st.lists(marks, min_size=1, max_size=6).map("".join)


def hostile_conversation(draw):
    name = draw(hostile)
    return [
        {"role": "system", "content": draw(hostile)},
        {"role": "user", "content": [text(draw(hostile)), image(56, 56), text(draw(hostile))]},
        {
            "role": "assistant",
            "content": draw(hostile),
            "tool_calls": [{"function": {"name": name, "arguments": {draw(hostile): draw(hostile)}}}],
        },
        {"role": "tool", "content": draw(hostile)},
        {"role": "user", "content": draw(hostile)},
    ]


def control_counts(processor, ids, names):
    return [ids.tolist().count(processor.tokenizer.control_ids[name]) for name in names]


@given(data=st.data())
def test_no_text_forges_control_tokens(processor, data):
    turns = hostile_conversation(data.draw)
    words = data.draw(hostile)
    tools = [{"type": "function", "function": {"name": words, "parameters": {words: words}}}]
    ids = processor.prepare(turns, tools=tools).token_ids
    benign: Any = json.loads(json.dumps([{**t, "content": "x"} for t in turns]))
    benign[1]["content"] = turns[1]["content"][1:2]
    benign[2]["tool_calls"] = [{"name": "x", "arguments": {}}]
    plain = processor.prepare(benign, tools=[{"type": "function", "function": {"name": "x"}}]).token_ids
    assert control_counts(processor, ids, CONTROL_TOKENS) == control_counts(processor, plain, CONTROL_TOKENS)


@settings(max_examples=5, deadline=None)  # a process each
@given(words=st.lists(hostile, min_size=3, max_size=3))
def test_no_text_forges_control_tokens_through_a_template(processor, words):
    templated = Processor(replace(processor.settings, chat_template=TEMPLATE), processor.tokenizer)
    turns = [
        {"role": "system", "content": words[0]},
        {"role": "user", "content": [text(words[1]), image(56, 56), text(words[2])]},
    ]
    ids = templated.prepare(turns).token_ids
    expected = dict.fromkeys(CONTROL_TOKENS, 0) | {"<|im_start|>": 3, "<|im_end|>": 2, "<|image_pad|>": 4}
    expected |= {"<|vision_start|>": 1, "<|vision_end|>": 1}
    assert control_counts(processor, ids, CONTROL_TOKENS) == list(expected.values())


def test_shipped_template_is_used_and_decides_about_thinking(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    processor = Processor(ProcessorSettings.from_hf_folder(folder), Tokenizer.from_folder(folder))
    prompt = processor.prepare(user(text("hi"), image(56, 56)))
    assert not prompt.open_think
    assert prompt.warnings == ()
    assert [media.kind for media in prompt.media] == ["image"]


def test_missing_template_is_a_warning(processor):
    assert "no chat template" in processor.prepare(user(text("hi"))).warnings[0]


def test_second_resize_follows_the_checkpoints_range(processor):
    narrow = replace(processor.settings, second_resize=SecondResize(3136, 50176))
    prompts = [
        Processor(s, processor.tokenizer).prepare(user(image(560, 280)))
        for s in (processor.settings, narrow, replace(narrow, second_resize=None))
    ]
    assert [prompt.media[0].grid for prompt in prompts] == [(40, 20), (22, 10), (40, 20)]


def test_token_ids_without_tokenizer(checkpoint):
    settings_ = ProcessorSettings.from_hf_folder(checkpoint)
    processor = Processor(settings_)
    pads = [settings_.image_token_id] * 4
    prompt = processor.prepare_token_ids([1, *pads, 2], [image(56, 56)])
    assert prompt.token_ids.tolist() == [1, *pads, 2]
    assert prompt.position_ids[0].tolist() == [0, 1, 1, 1, 1, 3]
    assert prompt.delta == -2
    with pytest.raises(InputError, match=r"no tokenizer\.json.*--token-ids"):
        processor.prepare([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("ids", [[], [-1], [512], [1.5], [True], ["1"]])
def test_token_ids_outside_the_vocabulary_are_refused(processor, ids):
    with pytest.raises(InputError, match="whole numbers from 0 to 511"):
        processor.prepare_token_ids(ids)


def test_token_ids_that_do_not_fit_the_media_are_refused(processor):
    image_pad, video_pad = processor.settings.image_token_id, processor.settings.video_token_id
    with pytest.raises(InputError, match=r"has 3 .* need 4"):
        processor.prepare_token_ids([1, *[image_pad] * 3], [image(56, 56)])
    with pytest.raises(InputError, match="pad tokens are for another kind"):
        processor.prepare_token_ids([1, *[video_pad] * 4], [image(56, 56)])
    with pytest.raises(InputError, match=r"media\[0\]"):
        processor.prepare_token_ids([1], [{"type": "audio"}])


def test_settings_survive_json(folder):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    edit(folder, "generation_config.json", repetition_penalty=1.05)
    settings_ = ProcessorSettings.from_hf_folder(folder)
    assert ProcessorSettings.from_dict(json.loads(json.dumps(settings_.to_dict()))) == settings_


def test_settings_of_a_full_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    settings_ = ProcessorSettings.from_hf_folder(folder)
    assert settings_.generation == GenerationDefaults(True, 0.6, 0.95, 20)
    assert settings_.stop_ids == (config["bos_token_id"], config["eos_token_id"])
    assert settings_.second_resize == SecondResize(3136, 16_056_320, 3)
    assert settings_.template_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert (settings_.patch_size, settings_.merge_size, settings_.vocab_size) == (14, 2, 512)


def test_settings_of_a_bare_folder(folder):
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    settings_ = ProcessorSettings.from_hf_folder(folder)
    assert settings_.generation is None
    assert settings_.second_resize is None
    assert settings_.image_mean == settings_.video_std == (0.5, 0.5, 0.5)
    assert len(settings_.stop_ids) == 1


def test_stop_ids_are_the_union_of_all_files(folder):
    edit(folder, "config.json", eos_token_id=7)
    edit(folder, "generation_config.json", eos_token_id=[8, 9])
    ids = Tokenizer.from_folder(folder).control_ids
    expected = {7, 8, 9, ids["<|im_end|>"], ids["<|endoftext|>"]}
    assert set(ProcessorSettings.from_hf_folder(folder).stop_ids) == expected


def test_video_files_own_mean_is_read(folder):
    edit(folder, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    edit(folder, "video_preprocessor_config.json", image_std=[0.4, 0.4, 0.4])
    settings_ = ProcessorSettings.from_hf_folder(folder)
    assert settings_.image_mean == settings_.video_mean == (0.1, 0.2, 0.3)
    assert (settings_.image_std, settings_.video_std) == ((0.5,) * 3, (0.4,) * 3)


def test_sampling_settings_without_effect_here_are_warned_about(folder):
    edit(folder, "generation_config.json", repetition_penalty=1.05, min_p=0.0, num_beams=1)
    processor = Processor(ProcessorSettings.from_hf_folder(folder), Tokenizer.from_folder(folder))
    warnings = processor.prepare(user(text("hi"))).warnings
    assert sum("repetition_penalty" in warning for warning in warnings) == 1
    assert not any("min_p" in warning or "num_beams" in warning for warning in warnings)


def test_template_is_found_in_all_three_places(folder):
    edit(folder, "tokenizer_config.json", chat_template=[{"name": "default", "template": "c"}, {"name": "rag"}])
    assert ProcessorSettings.from_hf_folder(folder).chat_template == "c"
    edit(folder, "chat_template.json", chat_template="b")
    assert ProcessorSettings.from_hf_folder(folder).chat_template == "b"
    (folder / "chat_template.jinja").write_text("a")
    assert ProcessorSettings.from_hf_folder(folder).chat_template == "a"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"image_token_id": None}, "image_token_id is None"),
        ("config.json", {"image_token_id": 5}, r"gives '<\|image_pad\|>' the id 486 but config.json says .* 5"),
        ("config.json", {"video_token_id": 512}, "video_token_id is 512"),
        ("config.json", {"vocab_size": 500}, "ids up to 503"),
        ("config.json", {"vision_config": 3}, "vision_config is not an object"),
        ("config.json", {"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ("generation_config.json", {"eos_token_id": [1, -1]}, "eos_token_id is -1"),
        ("generation_config.json", {"temperature": "hot"}, "temperature is 'hot'"),
        ("generation_config.json", {"top_p": float("nan")}, "top_p is nan"),
        ("generation_config.json", {"do_sample": 1}, "do_sample is 1"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, "image_std"),
        ("preprocessor_config.json", {"patch_size": 16}, "patch_size is 16, but only 14"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is False"),
        ("preprocessor_config.json", {"rescale_factor": 1}, "rescale_factor is 1"),
        ("preprocessor_config.json", {"min_pixels": 10**9}, "min_pixels"),
        ("preprocessor_config.json", {"resample": 9}, "resample is 9"),
        ("tokenizer_config.json", {"chat_template": {"a": 1}}, "chat_template is a dict"),
    ],
)
def test_files_that_contradict_are_refused(folder, file, changes, message):
    edit(folder, file, **changes)
    with pytest.raises(InputError, match=message) as error:
        ProcessorSettings.from_hf_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_broken_files_are_refused(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=file):
        ProcessorSettings.from_hf_folder(folder)


def test_missing_config_and_oversized_files_are_refused(folder, monkeypatch):
    monkeypatch.setattr("runtime.processor_settings.MAX_JSON_BYTES", 10)
    with pytest.raises(InputError, match="more than the 10"):
        ProcessorSettings.from_hf_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        ProcessorSettings.from_hf_folder(folder)


@pytest.mark.parametrize(
    "changes", [{"x": 1}, {"image_token_id": "1"}, {"chat": None}, {"stop_ids": [-1]}, {"image_std": [0, 1, 1]}]
)
def test_damaged_settings_of_a_bundle_are_refused(processor, changes):
    with pytest.raises(InputError):
        ProcessorSettings.from_dict(processor.settings.to_dict() | changes)


def test_tokenizer_of_another_model_is_refused(processor):
    with pytest.raises(InputError, match="different models"):
        Processor(replace(processor.settings, image_token_id=3), processor.tokenizer)


def test_video_options_reach_the_video(processor):
    prompt = processor.prepare(user(video(6, 224, 224, fps=2)), video_options=VideoOptions(max_frames=3))
    assert len(prompt.media[0].frames) == 3
