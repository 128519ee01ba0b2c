"""Questions about values that a forecast does not know: answered by rule and listed, or refused with their place."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from i2v_lab.errors import ForecastError
from i2v_lab.profiling.fake.assumptions import Assumptions
from i2v_lab.profiling.fake.forecast import forecast, forecasting
from i2v_lab.profiling.record_json import record_from_json, record_to_json


def here(offset: int = 0) -> str:
    frame = inspect.currentframe().f_back
    return f"test_forecast_assumptions.py:{frame.f_lineno + offset}"


class Checked(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0 if torch.isnan(x).any() else x


def test_conditions_on_unknown_values_are_false_and_listed_with_their_place():
    x = torch.rand(3, 8)
    with forecasting("cuda") as profiler:
        model = Checked()
        with profiler.phase("check"):
            y = x.cuda() * torch.rand(8, device="cuda")
            answers = [bool(y.min() < 0), torch.equal(y, y), torch.allclose(y, y), (y > 1).any().item(), bool(y.sum())]
            line = here(-1)
            assert 0.5 not in y
            for _ in range(3):
                model(y)
    assert answers == [False] * 5
    found = {(each.operator, each.module, each.place): (each.answer, each.count) for each in profiler.assumptions}
    assert found["torch.Tensor.__bool__", "", line] == ("False", 2)
    assert found["aten.equal.default", "", line] == found["aten.allclose.default", "", line] == ("False", 1)
    assert found["aten._local_scalar_dense.default", "", line] == ("False", 1)
    checks = [value for (_, module, _), value in found.items() if module == "Checked"]
    assert checks == [("False", 3)]
    assert {each.phase for each in profiler.assumptions} == {"check"}
    for record in profiler.assumptions:
        assert record_from_json(record_to_json(record)) == record
        assert "test_forecast_assumptions.py:" in record.place


def test_the_checks_of_a_distribution_pass():
    def draw() -> torch.Tensor:
        mean = torch.rand(8, device="cuda")
        return torch.distributions.Normal(mean, mean.exp(), validate_args=True).rsample()

    assert {each.answer for each in forecast(draw).assumptions} == {"True"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64, torch.bool])
def test_arrays_and_lists_of_unknown_values_are_zeros_of_the_same_shape_and_dtype(dtype):
    def show() -> None:
        x = torch.rand(2, 3, device="cuda").to(dtype)
        for array in (x.cpu().numpy(), np.asarray(x.cpu())):
            assert array.tolist() == np.zeros((2, 3)).tolist()
            assert array.dtype == torch.zeros((), dtype=dtype).numpy().dtype
        array += np.ones_like(array)  # as one's own
        assert x.tolist() == [[0, 0, 0]] * 2
        if dtype.is_floating_point:
            assert f"{x.mean():.2f}" == "0.00"

    found = forecast(show)
    assert len({each.place for each in found.assumptions}) == len(found.assumptions) == 2 + dtype.is_floating_point
    assert found.assumptions[0].answer == f"zeros of (2, 3), {str(dtype).removeprefix('torch.')}"


def test_an_array_that_torch_refuses_is_refused():
    def show(**kwargs: bool) -> None:
        torch.rand(3, device="cpu", **kwargs).mul(2).detach().requires_grad_().numpy()

    with pytest.raises(RuntimeError, match="requires grad"):
        forecast(show, device="cpu")
    with pytest.raises(TypeError, match="BFloat16"):
        forecast(lambda: torch.rand(3, dtype=torch.bfloat16).numpy(), device="cpu")


def test_a_decoded_video_becomes_pictures_without_the_memory_of_its_arrays():
    with forecasting("cuda"):
        video = torch.rand(97, 3, 704, 1280, device="cuda")  # 1 GB
        array = video.cpu().permute(0, 2, 3, 1).float().numpy()
    frames = (array * 255).round().clip(0, 255).astype("uint8")
    assert (frames.shape, frames.dtype) == ((97, 704, 1280, 3), np.uint8)
    for each in (array, frames, -array, array[0] + 1, array / 2 + array):
        assert sum(stride != 0 for stride in each.strides) == 0
    array *= 2
    picture = Image.fromarray(frames[0])
    assert (picture.size, picture.getextrema()) == ((1280, 704), ((0, 0),) * 3)
    assert (array[0, :2, :2] + np.arange(3)).tolist() == [[[0, 1, 2]] * 2] * 2
    assert (array[0].sum(), array[0, 0].max()) == (0, 0)


def test_a_decoded_video_takes_no_memory_whatever_a_pipeline_does_with_its_frames():
    with forecasting("cuda"):
        video = torch.rand(97, 3, 704, 1280, device="cuda").cpu().permute(0, 2, 3, 1).numpy()
        one = torch.rand(1, 704, 1280, 3, device="cuda").cpu().numpy()  # a pipeline may copy frame by frame
        pictures = [Image.fromarray((frame * 255).astype(np.uint8)) for frame in video]
    size = (97, 704, 1280, 3)
    checked = np.stack([(frame * 255).astype(np.uint8) for frame in video])  # as for a safety checker
    made = {
        "one": (one, (1, *size[1:])),
        "checked": (checked.astype(np.float32) / 255.0 * 2 - 1, size),
        "stacked": (np.stack([video, video], axis=1), (97, 2, *size[1:])),
        "joined": (np.concatenate([video[:3], video[:5], one]), (9, *size[1:])),
        "wide": (np.hstack([video, video]), (97, 1408, 1280, 3)),
        "copied": (copy.deepcopy(video.copy()), size),
        "flat": (video.ravel(), (np.prod(size),)),
        "repeated": (np.tile(video.repeat(2, axis=0), (1, 2, 1, 1)), (194, 1408, 1280, 3)),
        "chosen": (video[[0, 5, 9]], (3, *size[1:])),
        "taken": (np.take(video, [1, 2], axis=3), (*size[:3], 2)),
        "where": (np.where(video > 0, video, 1.0), size),
        "like": (np.full_like(video, 3), size),
        "turned": (np.clip(np.rot90(video, axes=(1, 2)), 0, 1), (97, 1280, 704, 3)),
    }
    for name, (array, shape) in made.items():
        assert (name, array.shape, set(array.strides)) == (name, shape, {0})
    values = {name: float(array.reshape(-1)[-1]) for name, (array, _) in made.items()}
    assert values == {**dict.fromkeys(made, 0.0), "checked": -1.0, "where": 1.0, "like": 3.0}
    assert {id(picture) for picture in pictures} == {id(pictures[0])}
    assert pictures[0].size == (1280, 704)
    assert np.stack([video[0, 0], np.ones((1280, 3), np.float32)]).mean() == 0.5  # values that differ take memory
    with pytest.raises(ValueError, match="must match"):
        np.concatenate([video, video[:, :5]])


@pytest.mark.parametrize("size", [8, 64, 200])
def test_real_inputs_keep_their_values_whatever_their_size(size):
    still = torch.linspace(0, 1, 3 * size * size).view(3, size, size)
    ids = torch.arange(size * size)
    numbers: list[float] = []

    def prepare(ids: torch.Tensor) -> torch.Tensor:
        pixels = torch.from_numpy(still.numpy())
        numbers.extend([pixels.min().item(), pixels.max().item(), pixels[0, 0, 0].item(), ids[1:].sum().item()])
        given = still.cuda()
        if still.permute(1, 2, 0).max() > 0.5:
            given = torch.cat([given, given])
        return given

    found = forecast(prepare, ids)
    assert numbers == [0.0, 1.0, 0.0, ids.sum().item()]
    assert found.assumptions == []
    assert found.peak.peak_bytes == 3 * still.nbytes + ids.nbytes


def test_a_write_to_an_argument_changes_its_copy_alone():
    few, many = torch.zeros(4, dtype=torch.int64), torch.zeros(5000, dtype=torch.int64)
    numbers: list[int] = []

    def write(few: torch.Tensor, many: torch.Tensor) -> None:
        few += 1
        numbers.append(few[0].item())
        numbers.append(many[0].item())
        many[:3].fill_(7)
        many[0].item()

    with pytest.raises(ForecastError) as caught:
        forecast(write, few, many, device="cpu")
    assert caught.value.fields["place"] == f"test_forecast_assumptions.py:{inspect.getsourcelines(write)[1] + 5}"
    assert numbers == [1, 0]
    assert (few.sum(), many.sum()) == (0, 0)


def test_a_buffer_of_a_module_keeps_its_values_and_a_parameter_does_not():
    class Counted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(3))
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)

        def forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
            return x.repeat(int(getattr(self, name).item()))

    assert forecast(Counted(), torch.ones(100), "count").peak.peak_bytes == 8 + 8 + 1600
    with pytest.raises(ForecastError):
        forecast(Counted(), torch.ones(100), "weight")


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3)])
def test_a_mask_whose_values_are_known_selects_in_any_number_of_dimensions(shape):
    mask = torch.arange(torch.Size(shape).numel()).view(shape) % 2 == 0
    data = torch.rand(*shape, 5)
    columns = torch.rand(4, *shape)
    expected = [data[mask].shape, data[mask, 1:].shape, columns[:, mask].shape, data[mask, 2].shape]

    def select() -> list[torch.Size]:
        found, kept, above = data.cuda(), mask.cuda(), columns.cuda()
        return [found[kept].shape, found[kept, 1:].shape, above[:, kept].shape, found[kept, 2].shape]

    shapes: list[torch.Size] = []
    forecast(lambda: shapes.extend(select()))
    assert shapes == expected


QUESTIONS = {
    "condition": lambda x: bool(x.sum() > 0),
    "truth": lambda x: bool(x.sum()),
    "equal": lambda x: torch.equal(x, x + 1),
    "array": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "text": lambda x: f"{x.sum():.1f}",
    "number": lambda x: x.sum().item(),
    "whole": lambda x: int(x.sum()),
    "nonzero": torch.nonzero,
    "where": torch.where,
    "unique": torch.unique,
    "selected": lambda x: torch.masked_select(x, x > 0),
    "indexed": lambda x: x[x > 0],
    "repeated": lambda x: x.repeat_interleave(x.long()),
}
REFUSED_BY_DEFAULT = ("number", "whole", "nonzero", "where", "unique", "selected", "indexed", "repeated")


@pytest.mark.parametrize("assume", ["nothing", None, Assumptions()], ids=str)
@pytest.mark.parametrize("name", QUESTIONS)
def test_what_memory_depends_on_or_nothing_at_all_is_answered(name, assume):
    def ask() -> None:
        QUESTIONS[name](torch.rand(4))

    if isinstance(assume, Assumptions) and name not in REFUSED_BY_DEFAULT:
        assert len(forecast(ask, device="cpu", assume=assume).assumptions) == 1
        return
    with pytest.raises(ForecastError) as caught:
        forecast(ask, device="cpu", assume=assume)
    fields = caught.value.fields
    assert (fields["cause"], fields["module"]) == ("data dependent", "")
    line = inspect.getsourcelines(QUESTIONS[name])[1] if inspect.isfunction(QUESTIONS[name]) else None
    if line is None or QUESTIONS[name].__module__ != __name__:
        line = inspect.getsourcelines(ask)[1] + 1
    assert fields["place"] == f"test_forecast_assumptions.py:{line}"
    assert pickle.loads(pickle.dumps(caught.value)).fields == fields


class Checker(torch.nn.Module):
    """As diffusers' safety checker: compares scores with thresholds among its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.thresholds = torch.nn.Parameter(torch.ones(17), requires_grad=False)
        self.sizes = torch.ones(3) * 2  # neither a parameter nor a buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x.mean(0).cpu().float().numpy()
        flags = [score - self.thresholds[i].item() > 0 for i, score in enumerate(scores)]
        return x[:0] if any(flags) else x.repeat(int(self.sizes[0]), 1)


def test_thresholds_among_the_weights_are_zero_and_other_numbers_refused():
    found = forecast(Checker(), torch.rand(4, 17))
    assert found.peak.peak_bytes == 4 * 17 * (1 + 4 + 8)
    assert {(each.operator.split(".")[1], each.answer, each.count) for each in found.assumptions} == {
        ("Tensor", "zeros of (17,), float32", 1),
        ("_local_scalar_dense", "0.0", 17),
    }
    with pytest.raises(ForecastError) as caught:
        forecast(Checker(), torch.rand(4, 17), assume=Assumptions(arrays=False))
    assert caught.value.fields["operator"] == "torch.Tensor.numpy"


def test_a_tensor_made_from_tensors_by_its_class_has_their_values():
    def rows() -> torch.Tensor:
        sizes = torch.Tensor([torch.tensor(float(n), device="cuda") for n in (2, 3)])
        return torch.empty(int(sizes.sum()), 100, device="cuda")

    assert forecast(rows, assume="nothing").peak.peak_bytes == 4 * 500
    with pytest.raises(ForecastError):
        forecast(lambda: torch.Tensor([torch.rand((), device="cuda")]))


def test_numbers_are_answered_where_it_is_said_how():
    def rows() -> torch.Tensor:
        x = torch.rand(4, device="cuda")
        assert x.sum().item() == 3.0
        return torch.empty(int(x.sum()), 100, device="cuda") if x.any() else x

    found = forecast(rows, assume=Assumptions(conditions=True, numbers=3))
    assert [each.answer for each in found.assumptions] == ["3.0", "True", "3.0"]
    assert found.peak.peak_bytes == 16 + 1200


@pytest.mark.parametrize(
    "assume", ["everything", 1, Assumptions(conditions=1), Assumptions(numbers="3"), Assumptions(numbers=True)]
)
def test_assumptions_of_another_kind_are_refused_before_anything_runs(assume):
    with pytest.raises(ForecastError) as caught:
        forecast(lambda: pytest.fail("it ran"), assume=assume)
    assert caught.value.fields["cause"] == "unknown setting"


def test_a_loop_that_waits_for_another_answer_ends(monkeypatch):
    monkeypatch.setattr("i2v_lab.profiling.fake.assumptions.MAX_ANSWERS", 10)

    def wait() -> None:
        x = torch.rand(4, device="cuda")
        while not (x > 0).all():
            x = x + 1

    with pytest.raises(ForecastError) as caught:
        forecast(wait)
    assert caught.value.fields["cause"] == "endless loop"
