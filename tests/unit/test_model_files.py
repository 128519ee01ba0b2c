"""The files of diffusers' models: published numbers of parameters, no unknown key, tiny models of the same classes."""

from __future__ import annotations

import inspect
import json
import random

import pytest
import torch
import transformers
from typer.testing import CliRunner

from i2v_lab.cli.app import app
from i2v_lab.errors import InvalidRequest
from i2v_lab.memory_settings import MemorySettings
from i2v_lab.paths import data_dir
from i2v_lab.pipeline.contract.architectures import TINY, architecture_names, load_architecture
from i2v_lab.pipeline.diffusers.components import CLASS, build, default_dtype, find_class
from i2v_lab.pipeline.diffusers.settings import check_tiles
from i2v_lab.pipeline.registry import runner_of
from i2v_lab.profiling.records import PhaseRecord
from i2v_lab.request import I2VRequest
from i2v_lab.runs.execute import Mode, execute
from i2v_lab.runs.spec import RunSpec, make_request
from i2v_lab.runs.store import read_run
from i2v_lab.units import GIB

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of torch, for NumPy
STILL = str(data_dir() / "stills" / "lighthouse.png")
MODELS = [name for name in architecture_names() if load_architecture(name).pipeline and not name.endswith(TINY)]

# Billions of parameters, as the models' authors give them or as many digits as the sum of their checkpoints' tensors.
T5_XXL, UMT5_XXL, CLIP_H, CLIP_L, SIGLIP, LLAMA_3 = "4.76", "5.68", "0.63", "0.123", "0.43", "7.5"
PUBLISHED = {
    "cogvideox-1.5-5b-i2v": {"transformer": "5.57", "text_encoder": T5_XXL, "vae": "0.216"},
    "cogvideox-5b-i2v": {"transformer": "5.57", "text_encoder": T5_XXL, "vae": "0.216"},
    "cosmos-predict2-2b-video2world": {"transformer": "1.96", "text_encoder": "4.9", "vae": "0.127"},
    "framepack-i2v": {
        "transformer": "12.9",
        "text_encoder": LLAMA_3,
        "text_encoder_2": CLIP_L,
        "image_encoder": SIGLIP,
        "vae": "0.246",
    },
    "hunyuanvideo-1.5-i2v": {
        "transformer": "8.3",
        "text_encoder": "7.07",
        "text_encoder_2": "0.219",
        "image_encoder": SIGLIP,
        "vae": "1.26",
    },
    "hunyuanvideo-i2v": {"transformer": "12.8", "text_encoder": "8.36", "text_encoder_2": CLIP_L, "vae": "0.246"},
    "kandinsky-5-i2v": {"transformer": "19.3", "text_encoder": "8.29", "text_encoder_2": CLIP_L, "vae": "0.246"},
    "ltx-2-19b-diffusers": {
        "transformer": "18.9",
        "connectors": "1.43",
        "text_encoder": "12.2",
        "vae": "1.22",
        "audio_vae": "0.053",
        "vocoder": "0.056",
    },
    "ltx-video-13b": {"transformer": "13.04", "text_encoder": T5_XXL, "vae": "1.25"},
    "ltx-video-2b": {"transformer": "1.92", "text_encoder": T5_XXL, "vae": "0.42"},
    "skyreels-v2-i2v-14b": {"transformer": "16.4", "text_encoder": UMT5_XXL, "image_encoder": CLIP_H, "vae": "0.127"},
    "svd-xt": {"unet": "1.52", "image_encoder": CLIP_H, "vae": "0.098"},
    "wan-2.1-i2v-14b": {"transformer": "16.4", "text_encoder": UMT5_XXL, "image_encoder": CLIP_H, "vae": "0.127"},
    "wan-2.2-i2v-a14b": {
        "transformer": "14.3",
        "transformer_2": "14.3",
        "text_encoder": UMT5_XXL,
        "vae": "0.127",
    },
    "wan-2.2-ti2v-5b": {"transformer": "5.0", "text_encoder": UMT5_XXL, "vae": "0.705"},
}


def _modules(model: str) -> dict[str, type[torch.nn.Module]]:
    architecture = load_architecture(model)
    kinds = {name: find_class(architecture, config[CLASS]) for name, config in architecture.config.items()}
    return {name: kind for name, kind in kinds.items() if issubclass(kind, torch.nn.Module)}


def _counted(model: str) -> dict[str, int]:
    architecture = load_architecture(model)
    with torch.device("meta"):
        return {
            name: sum(weight.numel() for weight in build(architecture, name).parameters()) for name in _modules(model)
        }


@pytest.mark.parametrize("model", MODELS)
def test_components_have_the_published_numbers_of_parameters(model):
    counted = _counted(model)
    assert counted == load_architecture(model).parameters
    assert _counted(model + TINY) == load_architecture(model + TINY).parameters
    published = PUBLISHED.get(model, dict.fromkeys(counted, ""))  # a model that is added is a file of data alone
    assert set(published) == set(counted)
    for name, text in published.items():
        assert not text or f"{counted[name] / 1e9:.{len(text.partition('.')[2])}f}" == text


def _weight_bytes(model: str, *names: str) -> int:
    """Of components in bfloat16, the buffers of positions included."""
    architecture = load_architecture(model)
    with torch.device("meta"), default_dtype(torch.bfloat16):
        parts = [build(architecture, name) for name in names]
    return sum(each.nbytes for part in parts for each in (*part.parameters(), *part.buffers()))


def test_weights_are_those_of_the_measured_runs():
    """``torch.cuda.memory_allocated`` on an H200 had up to 0.07 GiB more, of blocks that are not split."""
    hunyuan_bytes = _weight_bytes("framepack-i2v", "vae", "text_encoder", "text_encoder_2")
    for weights_bytes, loaded_gib in (
        (_weight_bytes("wan-2.2-ti2v-5b", "vae", "text_encoder", "transformer"), 21.254),
        (_weight_bytes("cogvideox-5b-i2v", "vae", "text_encoder", "transformer"), 19.796),
        (hunyuan_bytes + _weight_bytes("hunyuanvideo-i2v", "transformer"), 38.617),
    ):
        assert loaded_gib - 0.07 < weights_bytes / GIB < loaded_gib


# Whose place in the configurations of transformers has changed between versions.
MOVED = {"rope_theta", "pad_token_id", "vision_use_head"}


def _unknown_keys(kind: type, config: dict[str, object]) -> set[str]:
    """The keys of a component's section that its class would drop without a word."""
    given = {key: value for key, value in config.items() if key not in (CLASS, "model_type")}
    if not issubclass(kind, transformers.PreTrainedModel):
        known = inspect.signature(kind.__init__).parameters
        return {key for key in given if key not in known and not hasattr(kind, key)}
    return _unknown_keys_of_transformers(kind.config_class, given)


def _unknown_keys_of_transformers(kind: type, given: dict[str, object]) -> set[str]:
    default = kind()
    unknown = set()
    for key, value in given.items():
        if isinstance(value, dict) and key in kind.sub_configs:
            inner = kind.sub_configs[key]
            if inner is transformers.AutoConfig:
                inner = transformers.CONFIG_MAPPING[value["model_type"]]
            rest = {name: each for name, each in value.items() if name != "model_type"}
            unknown |= {f"{key}.{name}" for name in _unknown_keys_of_transformers(inner, rest)}
        elif key not in MOVED and not hasattr(default, key):
            unknown.add(key)
    return unknown


@pytest.mark.parametrize("model", MODELS)
def test_classes_know_every_key_and_the_pipeline_every_argument(model):
    for name in (model, model + TINY):
        architecture = load_architecture(name)
        for part, config in architecture.config.items():
            assert _unknown_keys(find_class(architecture, config[CLASS]), config) == set(), part
        pipeline = find_class(architecture, architecture.pipeline)
        constructor = inspect.signature(pipeline.__init__).parameters
        needed = {key for key, each in constructor.items() if each.default is each.empty} - {"self"}
        assert needed <= {*architecture.config, *architecture.arguments} <= set(constructor)
        assert set(architecture.sampling) <= set(inspect.signature(pipeline.__call__).parameters)
        assert set(architecture.dtypes) <= {*_modules(name), "default"}


def test_a_key_that_a_class_does_not_know_is_found():
    wan = load_architecture("wan-2.2-ti2v-5b")
    for part in ("transformer", "text_encoder", "scheduler", "tokenizer"):
        config = {**wan.config[part], "num_layer": 3}
        assert _unknown_keys(find_class(wan, config[CLASS]), config) == {"num_layer"}
    llava = load_architecture("hunyuanvideo-i2v").config["text_encoder"]
    config = {**llava, "vision_config": {**llava["vision_config"], "hidden": 1}}
    assert _unknown_keys(transformers.LlavaForConditionalGeneration, config) == {"vision_config.hidden"}


@pytest.mark.parametrize("model", MODELS)
def test_the_tiny_model_differs_in_sizes_alone(model):
    full, tiny = load_architecture(model), load_architecture(model + TINY)
    assert (tiny.pipeline, tiny.arguments, tiny.model_version) == (full.pipeline, full.arguments, full.model_version)
    assert {name: config[CLASS] for name, config in tiny.config.items()} == {
        name: config[CLASS] for name, config in full.config.items()
    }
    assert set(tiny.sampling) == set(full.sampling)
    assert set(tiny.parameters) == set(full.parameters)
    assert sum(tiny.parameters.values()) < 6e6
    for name in (model, model + TINY):  # its own request is one that it takes
        architecture = load_architecture(name)
        prompt = "a" if "tokenizer" in architecture.config else ""
        runner_of(architecture).check_request(architecture, make_request(name, image="still.png", prompt=prompt))
    text = (data_dir() / "architectures" / f"{model}.json").read_text(encoding="utf-8")
    values = json.loads(text)
    assert values["source"]
    assert values["repository"]
    assert set(values["tiny"]) <= {"config", "parameters", "dtypes", "sampling", "sizes", "request"}


@pytest.mark.parametrize(
    ("model", "wrong", "right"),
    [
        ("framepack-i2v", {"frames": 1}, 37),  # it makes a section more than none
        ("framepack-i2v", {"frames": 38}, 37),
        ("cogvideox-1.5-5b-i2v", {"width": 2416}, 2400),  # tables of rotary positions end here
        ("kandinsky-5-i2v", {"height": 2064}, 2048),
        ("kandinsky-5-i2v", {"frames": 513}, 509),
        ("kandinsky-5-i2v", {"frames": 13}, 17),  # it normalizes the first frames by later ones
        ("svd-xt", {"frames": 1}, 2),  # its guidance rises from frame to frame
        ("wan-2.1-i2v-14b", {"frames": 4097}, 4093),
        ("cosmos-predict2-2b-video2world", {"width": 2064}, 2048),
        ("cosmos-predict2-2b-video2world", {"frames": 513}, 509),
        ("ltx-2-19b-diffusers", {"height": 32}, 64),  # its decoder pads by reflection
    ],
)
def test_sizes_that_a_model_has_no_positions_for_are_refused(model, wrong, right):
    architecture = load_architecture(model)
    runner = runner_of(architecture)
    ((name, value),) = wrong.items()
    with pytest.raises(InvalidRequest) as refused:
        runner.check_request(architecture, make_request(model, image=STILL, **wrong))
    assert refused.value.fields == {name: value}
    assert str(right) in str(refused.value)
    runner.check_request(architecture, make_request(model, image=STILL, **{name: right}))


def test_a_last_tile_that_a_decoder_cannot_pad_is_refused():
    model = "ltx-2-19b-diffusers" + TINY  # tiles of 512 px, every 448
    vae = build(load_architecture(model), "vae")
    check_tiles(vae, 928, 512)  # not tiled
    vae.enable_tiling()
    for width, height, refused in (
        (928, 512, {"width": 928}),
        (1024, 480, {"height": 480}),
        (512, 1376, {"height": 1376}),
    ):
        with pytest.raises(InvalidRequest) as error:
            check_tiles(vae, width, height)
        assert error.value.fields == refused
    for width, height in ((480, 64), (512, 512), (896, 512), (960, 512), (1024, 512)):
        check_tiles(vae, width, height)

    settings = MemorySettings(vae_tiling=True)
    request = make_request(model, image=STILL, width=928, height=64, frames=9, settings=settings)
    with pytest.raises(InvalidRequest) as error:
        execute(RunSpec(request=request, model=model), Mode.FAKE, "cuda")
    assert error.value.fields == {"width": 928}


def test_models_are_listed_with_the_bounds_of_their_sizes():
    described = json.loads(CliRunner().invoke(app, ["models", "kandinsky-5-i2v", "--json"]).stdout)
    assert described["sizes"] == {
        "only": [],
        "pixel_multiple": 16,
        "min_pixels": 16,
        "max_pixels": 2048,
        "frame_step": 4,
        "min_frames": 17,
        "max_frames": 509,
    }
    printed = CliRunner().invoke(app, ["models", "kandinsky-5-i2v"]).stdout
    assert "16 to 2048; frames: 4k+1, 17 to 509" in printed


def _some_request(model: str, draw: random.Random) -> I2VRequest:
    """A small one that the model takes."""
    architecture = load_architecture(model)
    rule = runner_of(architecture).size_rule(architecture)
    most = rule.min_pixels // rule.pixel_multiple + 3
    width, height = (
        draw.choice(rule.only)
        if rule.only
        else (rule.pixel_multiple * draw.randrange(rule.min_pixels // rule.pixel_multiple, most) for _ in range(2))
    )
    frames = rule.min_frames + rule.frame_step * draw.randrange(3)
    asked = {"width": width, "height": height, "frames": frames, "steps": draw.randrange(2, 4)}
    if "tokenizer" in architecture.config:
        asked["prompt"] = "A wave breaks at night. " * draw.choice((0, 1, 5, 40))
        asked["negative_prompt"] = draw.choice(("", "blurred"))
    return make_request(model, image=STILL, **asked)


@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_model_generates_what_was_asked_for_in_the_phases_of_its_forecast(model, tmp_path):
    model += TINY
    architecture = load_architecture(model)
    assert find_class(architecture, architecture.pipeline)  # imported before anything is counted: tables are tensors
    draw = random.Random(model)
    for request in (make_request(model, image=STILL, steps=2), _some_request(model, draw)):
        spec = RunSpec(request=request, model=model, write_video=False)
        run_dir = tmp_path / f"{request.width}x{request.height}x{request.frames}-{request.steps}"
        execute(spec, Mode.REAL, "cpu", run_dir=run_dir)
        real = sorted(read_run(run_dir).of(PhaseRecord), key=lambda phase: phase.start_s)
        fake = execute(spec, Mode.FAKE, "cpu").phases
        assert [phase.phase for phase in fake] == [phase.phase for phase in real]
        assert [phase.peak_bytes for phase in fake] == [phase.peak_bytes for phase in real]
    listed = json.loads(CliRunner().invoke(app, ["models", model, "--json"]).stdout)["phases"]
    assert listed == list(dict.fromkeys(phase.phase for phase in fake))
