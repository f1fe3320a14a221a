"""The two architectures and the files that lie beside the weights."""

import json
from pathlib import Path

from build_tokenizer import VOCAB_SIZE
from fastpath import CELL, IMAGE_MEAN, IMAGE_STD, MERGE, PATCH
from generate import FPS, FRAMES, PAIR, SIZE
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig

# theta is far below Qwen's 1e6: the grid has 16 x 8 x 8 places, too few for slow rotations
ROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 12, 12]}
ARCHITECTURES = {
    "target": {
        "text": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "vision": {
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "fullatt_block_indexes": [2],
        },
    },
    "draft": {
        "text": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "vision": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
        },
    },
}


def build_config(name: str, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """The configuration of "target" or "draft"."""
    token = tokenizer.convert_tokens_to_ids
    part = ARCHITECTURES[name]
    return Qwen2_5_VLConfig(
        text_config={
            **part["text"],
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": dict(ROPE),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            **part["vision"],
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": PAIR,
            "tokens_per_second": 1,  # one frame pair lasts one second, so positions advance by one
            "window_size": 4 * CELL,
            "out_hidden_size": part["text"]["hidden_size"],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    return GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def save_processors(*folders: Path) -> None:
    """The image and video processors' settings, such that a clip keeps its size and all of its frames."""
    common = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "size": {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE},
        "min_pixels": SIZE * SIZE,
        "max_pixels": SIZE * SIZE,
        "patch_size": PATCH,
        "temporal_patch_size": PAIR,
        "merge_size": MERGE,
    }
    image = {**common, "image_processor_type": "Qwen2VLImageProcessor"}
    video = {
        **common,
        "video_processor_type": "Qwen2VLVideoProcessor",
        "do_sample_frames": True,
        "fps": FPS,
        "min_frames": PAIR,
        "max_frames": FRAMES,
    }
    for folder in folders:
        for file, content in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
            content = {**content, "processor_class": "Qwen2_5_VLProcessor"}
            (folder / file).write_text(json.dumps(content, indent=2) + "\n")
