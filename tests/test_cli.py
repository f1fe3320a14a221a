"""The command line on a shipped clip, and every kind of bad input: one sentence, exit code 2, nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import CLIPS, DRAFT, TARGET

from specvlm_kernels import cli
from specvlm_kernels.integrations.processing import pair_frames
from specvlm_kernels.overlay import STAGE1, STAGE2, draw, stage_one
from specvlm_kernels.video import VideoError, read_video

CLIP = str(CLIPS / "clip_0.mp4")
QUESTION = "What happens in the video?"
PAIR = ["--model", str(TARGET), "--draft", str(DRAFT)]


def run(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_streams_the_answer_and_writes_files(capsys, tmp_path):
    files = tmp_path / "out.json", tmp_path / "out.png"
    code, out, err = run(capsys, "generate", CLIP, QUESTION, *PAIR, f"--json={files[0]}", "--overlay", files[1])
    assert code == 0
    record = json.loads(files[0].read_text())
    assert out.strip() == record["text"].strip() and len(out.split()) > 20
    assert "tau" in err and record["stats"]["kept_tokens"] < record["stats"]["visual_tokens"]
    assert Image.open(files[1]).width > 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.png"]


def test_generate_as_json_with_sampling(capsys):
    argv = ("generate", CLIP, QUESTION, *PAIR, "--temperature", 0.8, "--seed", 5, "--max-new-tokens", 12,
            "--method", "uniform", "--prune", 0.5, "--tree", "chain:3", "--json")  # fmt: skip
    first, second = run(capsys, *argv), run(capsys, *argv)
    assert first[0] == 0 and json.loads(first[1])["tokens"] == json.loads(second[1])["tokens"]
    assert json.loads(first[1])["tree_nodes"] == 4


def test_trees():
    assert cli.parse_tree("paper").num_nodes == 26 and cli.parse_tree("chain:3").num_nodes == 4
    tree = cli.parse_tree("dynamic:5,10,60")
    assert (tree.depth, tree.width, tree.nodes) == (5, 10, 60)
    for text in ("", "paper:1", "chain", "chain:", "chain:x", "chain:1,2", "chain:0", "chain:-1", "dynamic:5,10",
                 "dynamic:5,10,60,1", "dynamic:5,,60", "dynamic:0,10,60", "dynamic:1,2,9", "other:1"):  # fmt: skip
        with pytest.raises(cli.UserError, match="--tree: "):
            cli.parse_tree(text)


def test_every_way_to_decode_says_the_same(capsys):
    argv = ("generate", CLIP, QUESTION, *PAIR, "--max-new-tokens", 20, "--json")
    outputs = []
    dynamic = "--tree", "dynamic:4,6,20"
    for options in ((), ("--no-graphs",), ("--passes", "fused"), dynamic):
        code, out, _ = run(capsys, *argv, *options)
        assert code == 0
        outputs.append(json.loads(out)["tokens"])
    assert all(tokens == outputs[0] for tokens in outputs)


def test_compare_says_identical_four_times(capsys, tmp_path):
    path = tmp_path / "demo.json"
    code, out, _ = run(capsys, "compare", CLIP, QUESTION, *PAIR, "--json", path, "--overlay", tmp_path / "demo.png")
    assert code == 0
    record = json.loads(path.read_text())
    assert record["identical"] is True and len(record["runs"]) == 4
    for row in record["runs"]:
        assert row["run"] in out.replace("\n", " ") and row["text"] == record["runs"][0]["text"]
    assert record["runs"][3]["target_passes"] < record["runs"][0]["target_passes"] / 2


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0 and "torch" in out and "cuda" in out and "triton" in out
    code, out, _ = run(capsys, "info", "--json")
    tiers = json.loads(out)["tiers"]
    assert tiers["torch"]["available"] and (tiers["cuda"]["available"] or tiers["cuda"]["why_not"])


def written(path, frames=16, codec="libx264", options=None):
    import av
    import numpy as np

    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            image = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def audio_only(path):
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def bad_videos(folder):
    """name -> (path, what the message must say)"""
    empty = folder / "empty.mp4"
    empty.touch()
    noise = folder / "noise.mp4"
    noise.write_bytes(bytes(range(256)) * 40)
    cut = folder / "cut.mp4"
    clip = Path(CLIP).read_bytes()
    cut.write_bytes(clip[: len(clip) // 2])
    whole = written(folder / "whole.mp4", options={"movflags": "faststart"})
    front = folder / "front.mp4"
    front.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    return {
        "missing": (folder / "missing.mp4", "no such file"),
        "a folder": (folder, "no such file"),
        "empty": (empty, "empty"),
        "noise": (noise, "damaged or truncated"),
        "cut off": (cut, "damaged or truncated"),
        "cut off after its index": (front, "truncated"),
        "audio only": (audio_only(folder / "audio.mp4"), "no video stream"),
    }


@pytest.mark.parametrize("kind", ["missing", "a folder", "empty", "noise", "cut off", "cut off after its index",
                                  "audio only"])  # fmt: skip
def test_bad_videos(kind, capsys, tmp_path):
    path, said = bad_videos(tmp_path)[kind]
    before = sorted(tmp_path.iterdir())
    outputs = ["--json", tmp_path / "out.json", "--overlay", tmp_path / "out.png"]
    code, out, err = run(capsys, "generate", path, QUESTION, *PAIR, *outputs)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1 and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(VideoError):
        read_video(path)


def other_tokenizer(folder):
    """The draft with two entries of its vocabulary exchanged."""
    import shutil

    shutil.copytree(DRAFT, folder / "draft")
    path = folder / "draft" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    return folder / "draft"


@pytest.mark.parametrize(
    "argv,said",
    [
        ((CLIP, ""), "question"),
        ((CLIP, "   "), "question"),
        ((CLIP, QUESTION, "--prune", "1.0"), "ratio"),
        ((CLIP, QUESTION, "--prune", "-0.1"), "ratio"),
        ((CLIP, QUESTION, "--top-p", "1.5"), "top_p"),
        ((CLIP, QUESTION, "--temperature", "-1"), "temperature"),
        ((CLIP, QUESTION, "--max-cache-tokens", "100"), "cache is too small"),
        ((CLIP, QUESTION, "--max-new-tokens", "0"), "max_new_tokens"),
        ((CLIP, QUESTION, "--tree", "bush"), "--tree"),
        ((CLIP, QUESTION, "--fps", "-3"), "fps"),
        ((CLIP, QUESTION, "--max-frames", "1"), "max_frames"),
        ((CLIP, QUESTION, "--json", "/nowhere/out.json"), "no folder"),
        ((CLIP, QUESTION, "--model", "./nowhere", "--draft", "./nowhere"), "no such checkpoint"),
    ],
    ids=lambda v: " ".join(v[1:]) if isinstance(v, tuple) else "",
)
def test_bad_arguments(argv, said, capsys):
    pair = [] if "--model" in argv else PAIR
    code, out, err = run(capsys, "generate", *argv, *pair)
    assert code == 2 and said in err and err.count("\n") == 1 and out == ""


def test_a_draft_with_another_tokenizer(capsys, tmp_path):
    draft = other_tokenizer(tmp_path)
    code, _, err = run(capsys, "generate", CLIP, QUESTION, "--model", TARGET, "--draft", draft)
    assert code == 2 and "tokenizer" in err
    code, _, err = run(capsys, "generate", CLIP, QUESTION, "--model", TARGET)
    assert code == 2 and "--draft" in err


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")
    monkeypatch.setattr(cli.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cli.write_whole(str(path), b"new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_sampling_of_frames(tmp_path):
    path = written(tmp_path / "clip.mp4", frames=33)
    assert len(read_video(path, fps=4).frames) == 32  # a multiple of two
    half = read_video(path, fps=2)
    assert len(half.frames) == 16 and half.fps == 2
    assert len(read_video(path, fps=30).frames) == 32 and read_video(path, fps=30).fps == 4
    few = read_video(path, fps=4, max_frames=8)
    assert len(few.frames) == 8 and few.frames.shape[1:] == (64, 64, 3)


def test_pair_frames_interleaves_two_frames_per_patch():
    frames, patches, p = 4, 3, 2
    single = torch.arange(frames)[:, None, None].expand(frames, patches, 3 * 2 * p * p).float().clone()
    paired = pair_frames(single.reshape(frames * patches, -1), frames, p).view(2, patches, 3, 2, p * p)
    for t in range(2):
        assert bool((paired[t, :, :, 0] == 2 * t).all()) and bool((paired[t, :, :, 1] == 2 * t + 1).all())


def test_patches_by_hand_equal_the_video_processors():
    """Where torchvision is installed, transformers' own video processor is the judge."""
    pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=(ImportError, RuntimeError))
    from tiny import asker

    video, ours = read_video(CLIP, asker().fps), asker()
    assert ours.processor is not None
    text = ours.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    theirs, by_hand = ours._with_processor(video, text), ours._by_hand(video, text)
    for name in ("input_ids", "video_grid_thw"):
        assert torch.equal(theirs[name], by_hand[name]), name
    assert torch.allclose(theirs["pixel_values_videos"], by_hand["pixel_values_videos"], atol=1e-3)
    assert torch.allclose(torch.as_tensor(theirs["second_per_grid_ts"]).float(), by_hand["second_per_grid_ts"])


def test_overlay_lights_kept_tokens_in_two_colours():
    kept = torch.tensor([0, 5, 9])
    first = stage_one(kept, torch.tensor([0.5, 0, 0, 0, 0, 0.1, 0, 0, 0, 0.5]), 2)
    assert first.tolist() == [True, False, True]
    import numpy as np

    picture = draw(np.full((4, 32, 32, 3), 200, np.uint8), (2, 2, 3), kept, first, cell=10)
    pixels = picture.load()
    assert pixels[6, 6] == STAGE1  # token 0: corner of the first tile
    assert pixels[6 + 20, 6 + 10] == STAGE2  # token 5: second row, third column
    assert pixels[6 + 15, 6 + 5] == (60, 60, 60)  # token 1 is dimmed
    assert pixels[6 + 5, 6 + 5] == (200, 200, 200)  # token 0 is lit
