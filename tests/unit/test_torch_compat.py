"""Torch's private API that fakes use: one test for each item, so that a new torch says what to look at."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import threading
import weakref
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from i2v_lab import torch_compat as compat
from i2v_lab.profiling.fake import attention
from i2v_lab.profiling.fake.autograd_devices import asked_by_autograd, autograd_device, real_device
from i2v_lab.profiling.storages import StorageSet
from i2v_lab.thread_patches import patched_here
from i2v_lab.torch_compat import TorchDispatchMode, storage_key

aten = torch.ops.aten


@pytest.fixture(autouse=True, params=[f"torch {torch.__version__.partition('+')[0]}"])
def _version():
    """A test that fails names the version of torch that it fails with."""


def test_private_names_of_torch_are_used_in_this_module_only():
    private = re.compile(r"\btorch\.(?:\w+\.)*_[a-z]\w*|from torch\S*\._\w+|from torch\S* import .*\b_[a-zA-Z]")
    package = Path(compat.__file__).parent
    users = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if private.search(path.read_text("utf-8"))
    }
    # The profiler's snapshots: torch documents _record_memory_history and _dump_snapshot.
    assert users == {"torch_compat.py", "profiling/meters/cuda.py"}


@pytest.fixture
def mode():
    return compat.HardwareFreeFakeMode(allow_non_fake_inputs=True)


def test_a_fake_has_a_device_of_its_own_and_meta_memory(mode):
    with mode:
        fake = torch.empty(3, device="cuda")
    assert type(fake) is compat.FakeTensor
    assert fake.fake_device == torch.device("cuda:0")  # plain attribute, no dispatch
    assert fake.untyped_storage().nbytes() == 12
    made = compat.FakeTensor(mode, torch.empty(2, device="meta"), torch.device("cpu"))
    assert (made.shape, made.fake_device) == ((2,), torch.device("cpu"))
    made.fake_device = torch.device("cuda", 0)
    assert made.device == torch.device("cuda", 0)


def test_a_fake_and_its_storage_take_attributes(mode):
    with mode:
        fake = torch.empty(3)
    fake._i2v_lab_known = 1
    fake.untyped_storage()._i2v_lab_is_real = True
    assert fake._i2v_lab_known == 1
    assert fake.view(3, 1).untyped_storage()._i2v_lab_is_real is True


def test_the_mode_asks_for_no_cuda_device(mode, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("CUDA was initialised")

    assert isinstance(inspect.getattr_static(compat.FakeTensorMode, "avoid_device_init"), property)
    target, name, substitute = compat.gpu_context_patch()
    assert list(inspect.signature(getattr(target, name)).parameters) == list(inspect.signature(substitute).parameters)
    monkeypatch.setattr(torch.cuda, "_lazy_init", never)
    monkeypatch.setattr(target, name, substitute)
    with mode:
        assert torch.empty(2, device="cuda").add(1).fake_device.type == "cuda"


def test_the_converter_makes_fakes_of_real_tensors_that_share_no_storage_with_its_next(mode):
    real = torch.ones(4)
    fakes = [compat.FakeTensorConverter(copy_data=False, export=False).from_real_tensor(mode, real) for _ in range(2)]
    assert storage_key(fakes[0]) != storage_key(fakes[1])
    assert storage_key(mode.from_tensor(real)) == storage_key(mode.from_tensor(real))  # why the mode's own will not do


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.nonzero()], ids=["item", "nonzero"])
def test_values_that_are_unknown_raise_data_dependent_errors(mode, read):
    with mode, pytest.raises(compat.DATA_DEPENDENT):
        read(torch.empty(3))


def test_an_operator_without_a_fake_kernel_says_so(mode):
    @torch.library.custom_op("i2v_lab_compat::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with mode, pytest.raises((compat.UnsupportedOperatorException, RuntimeError), match="no fake impl"):
        opaque(torch.empty(3))


def test_a_kernel_invocation_runs_the_meta_kernel(mode):
    with mode:
        fake = torch.empty(2, 3, device="cuda")
    with compat.in_kernel_invocation_manager(mode):
        view = aten.view.default(fake, [6])
    assert type(view) is torch.Tensor
    assert view.device.type == "meta"
    assert storage_key(view) == storage_key(fake)


def test_no_dispatch_runs_a_real_operator_below_all_modes(mode):
    with mode, compat.no_dispatch():
        assert type(torch.ones(2)) is torch.Tensor


def test_modes_outside_are_disabled():
    seen = []

    class Mode(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        with compat.disable_current_modes():
            torch.ones(2)
        assert not seen
        torch.ones(2)
    assert seen


def test_a_dispatch_mode_can_do_without_dynamos_wrapper():
    assert "_should_skip_dynamo" in vars(torch.utils._python_dispatch.TorchDispatchMode)
    assert compat.DispatchMode._should_skip_dynamo() is False

    class Mode(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert not hasattr(Mode.__torch_dispatch__, "__wrapped__")


def test_the_active_mode_is_known(mode):
    with mode:
        assert compat.active_fake_mode() is mode


def test_trees_are_flattened_and_mapped():
    tensor = torch.ones(1)
    values = {"a": [tensor, 2], "b": (tensor,)}
    assert compat.tree_leaves(values) == [tensor, 2, tensor]
    assert compat.tree_map_only(int, lambda number: number + 1, values)["a"][1] == 3


def test_storages_have_one_key_for_all_views_and_can_be_referred_to_weakly():
    tensor, other = torch.ones(4), torch.ones(4)
    assert compat.storage_key(tensor) == compat.storage_key(tensor[1:]) != compat.storage_key(other)
    freed = []
    reference = weakref.ref(tensor.untyped_storage(), freed.append)
    view = tensor[1:]
    del tensor
    assert not freed  # the reference is to the storage, not to its Python object
    storages = StorageSet()
    storages.add([view])
    key = storage_key(view)
    assert key in storages
    del view
    assert freed == [reference]
    assert key not in storages


def test_the_descriptors_behind_data_and_numpy():
    tensor, value = torch.ones(2), torch.zeros(3)
    compat.DATA.__set__(tensor, value)
    assert compat.DATA.__get__(tensor).tolist() == [0, 0, 0]
    assert compat.NUMPY(tensor).tolist() == [0, 0, 0]
    assert torch.Tensor.data is compat.DATA  # what a forecast replaces by a property of torch.Tensor
    assert torch.Tensor.numpy is compat.NUMPY


def test_a_real_operator_of_each_name_that_is_compared_with(mode):
    dispatched = []

    class Mode(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            dispatched.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(1).item()
    assert compat.LOCAL_SCALAR in dispatched
    with mode, Mode():
        x = torch.empty(2, 2, device="cuda")
        assert x.is_cuda
    assert compat.DEVICE in dispatched
    q = torch.ones(1, 1, 2, 8)
    with Mode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert compat.SAFE_SOFTMAX in dispatched


@pytest.mark.parametrize(
    ("operator", "names"),
    [
        (compat.FLASH_ATTENTION, ["query", "key", "value", "dropout_p", "is_causal", "return_debug_mask", "scale"]),
        (
            compat.EFFICIENT_ATTENTION,
            ["query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "scale"],
        ),
        (
            compat.CUDNN_ATTENTION,
            ["query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal"]
            + ["return_debug_mask", "scale"],
        ),
        (
            compat.MATH_ATTENTION,
            ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "dropout_mask", "scale", "enable_gqa"],
        ),
    ],
    ids=["flash", "efficient", "cudnn", "math"],
)
def test_the_kernels_of_attention_take_these_arguments(operator, names):
    assert [name for name, _ in compat.alias_annotations(operator.default)] == names


def test_the_order_of_the_kernels_of_attention_is_the_codes():
    before = compat.attention_order()
    with torch.nn.attention.sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION], set_priority=True):
        assert compat.attention_order()[:2] == [SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]
    assert compat.attention_order() == before
    assert set(attention.ORDER) < set(before)


def test_tensors_that_hold_others_are_told_by_their_class():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    inner = compat.inner_tensors(nested)
    assert compat.is_wrapper(type(nested))
    assert {type(each) for each in inner} == {torch.Tensor}
    assert any(storage_key(each) == storage_key(nested.values()) for each in inner)
    plain = torch.ones(2)
    assert compat.inner_tensors(plain) == [plain]
    assert not any(map(compat.is_wrapper, (torch.Tensor, torch.nn.Parameter, compat.FakeTensor)))


def test_schemas_say_what_is_new_and_what_is_written():
    assert compat.returns_new_tensors(aten.mm.default)
    assert not compat.returns_new_tensors(aten.view.default)
    assert not compat.returns_new_tensors(aten.add_.Tensor)
    assert dict(compat.alias_annotations(aten.add_.Tensor)) == {"self": True, "other": False, "alpha": False}
    assert compat.returns_views(aten.permute.default)
    assert not compat.returns_views(aten.clone.default)
    assert not compat.returns_views(aten.add_.Tensor)
    assert compat.bool_result(aten.equal.default)
    assert not compat.bool_result(aten.any.default)
    # why operator_kinds has a list of batch norms:
    assert not any(is_written for _, is_written in compat.alias_annotations(aten.native_batch_norm.default))


def test_modules_are_converted_in_place_as_torch_does():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    net.tied = net[0].weight
    weight, checked = net[0].weight, []
    compat.convert_module(net, lambda t: t.double() if t.is_floating_point() else t, lambda *each: checked.append(each))
    assert net[0].weight is weight is net.tied
    assert {t.dtype for t in net.state_dict().values()} == {torch.float64, torch.int64}
    assert checked[0][0] is net[0]
    assert list(inspect.signature(torch.nn.Module._apply).parameters) == ["self", "fn", "recurse"]
    calls = []
    original = torch.nn.Module._apply
    try:
        torch.nn.Module._apply = lambda self, fn, recurse=True: calls.append(self) or self
        net.to(torch.float32)
    finally:
        torch.nn.Module._apply = original
    assert calls == [net]


def test_all_convolutions_fill_their_weights_in_one_place():
    for kind in (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose3d):
        assert issubclass(kind, compat.CONVOLUTION_BASE)
        assert "reset_parameters" not in vars(kind)


def test_every_call_of_a_module_passes_through_one_function():
    class Net(torch.nn.Module):
        def forward(self, x):
            frame = sys._getframe()
            while frame.f_code is not compat.CALL:
                frame = frame.f_back
            return frame.f_locals["self"]

    net = Net()
    assert net(0) is net


def test_a_threads_mode_stacks_are_read_and_exchanged():
    class Functions(torch.overrides.BaseTorchFunctionMode):
        pass

    class Dispatch(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            dispatched.append(func)
            return func(*args, **(kwargs or {}))

    dispatched, before = [], compat.ModeStacks.current()
    functions, dispatch = Functions(), Dispatch()
    with functions, dispatch:
        entered = compat.ModeStacks.current()
        assert (entered.function[-1], entered.dispatch[-1]) == (functions, dispatch)
        before.apply()
        assert compat.ModeStacks.current() == before
        torch.ones(1)
        assert not dispatched
        entered.apply()
        torch.ones(1)
        assert dispatched
    assert compat.ModeStacks.current() == before


def test_a_fake_mode_is_exchanged_too(mode):
    before = compat.ModeStacks.current()
    with mode:
        entered = compat.ModeStacks.current()
        before.apply()
        assert type(torch.ones(1)) is torch.Tensor
        entered.apply()
        assert type(torch.ones(1)) is compat.FakeTensor
    assert compat.ModeStacks.current() == before


@pytest.mark.parametrize("scope", [False, True])
def test_the_default_device_of_a_thread_is_what_torch_says(scope):
    before = compat.ModeStacks.current()
    assert before.device_context() is None
    if scope:
        with torch.device("meta"):
            context = compat.ModeStacks.current().device_context()
    else:
        torch.set_default_device("meta")
        assert compat.ModeStacks.current().default.device.type == "meta"
        context = compat.ModeStacks.current().device_context()
        torch.set_default_device(None)
    compat.ModeStacks((context, *before.function), before.dispatch, context).apply()
    assert torch.get_default_device() == torch.ones(1).device == torch.device("meta")
    torch.set_default_device(None)  # leaves it as if torch had entered it
    assert compat.ModeStacks.current() == before
    assert torch.get_default_device() == torch.device("cpu")


def test_the_compilers_home_is_asked_by_every_compiled_function_and_by_excluded_ones_for_none():
    home, name = compat.compiler_home()
    asked = []

    def none_for(callback):
        asked.append(callback)

    with patched_here(home, name, none_for):
        assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
        assert torch.compiler.disable(lambda x: x + 1)(torch.ones(2)).tolist() == [2, 2]
    assert [callback in (None, False) for callback in asked[-2:]] == [False, True]


def test_how_tensors_are_lifted_is_as_before_after_the_last_of_overlapping_fake_modes():
    before = torch._C._only_lift_cpu_tensors()
    scopes = [(compat.lifting_restored(), compat.HardwareFreeFakeMode()) for _ in range(2)]
    entered = []

    def run(index: int) -> None:
        lifting, mode = scopes[index]
        with lifting, mode:
            entered.append(torch._C._only_lift_cpu_tensors())
            steps[index].set()
            steps[index + 2].wait(60)

    steps = [threading.Event() for _ in range(4)]
    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for index in range(2):
        threads[index].start()
        steps[index].wait(60)
    for index in range(2):  # the first to begin is the first to end
        steps[index + 2].set()
        threads[index].join()
    assert entered == [True, True]
    assert torch._C._only_lift_cpu_tensors() is before


def test_a_fake_mode_can_be_entered_after_the_thread_of_the_first_one_has_ended():
    code = """
import threading, torch
from i2v_lab import torch_compat as compat

def enter():
    compat.keep_device_guard()
    with compat.HardwareFreeFakeMode():
        made.append(torch.empty(3, device="cuda") + 1)

made = []
for _ in range(3):
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
enter()
print(len(made))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("4\n", 0), done.stderr


class _Devices(compat.DispatchMode):
    """Records whether autograd asks for a device, and tells it another."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not compat.DEVICE:
            device = kwargs.get("device")
            return func(*args, **({**kwargs, "device": real_device(device)} if device is not None else kwargs))
        self.asked.append(asked_by_autograd())
        return autograd_device(args[0].fake_device) if self.asked[-1] else args[0].fake_device


class _PassingOn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_autograd_has_a_device_of_its_own_for_each_fake_card():
    for index in (0, 1):
        device = torch.device("cuda", index)
        assert autograd_device(device).type == "meta"
        assert real_device(autograd_device(device)) == device
    for device in ("cpu", "meta", "cuda:0"):
        assert real_device(torch.device(device)) == torch.device(device)


@pytest.mark.parametrize("outside", [0, 1, 3])
def test_autograd_is_told_from_kernels_that_ask_for_a_device(mode, outside):
    compat.keep_device_guard()
    with mode, _Devices() as devices, ExitStack() as scopes:
        for _ in range(outside):
            scopes.enter_context(_PassingOn())

        def asked(run):
            devices.asked.clear()
            run()
            return set(devices.asked)

        weight = torch.ones(3, device="cuda", requires_grad=True)
        other = torch.ones(3, device="cuda", requires_grad=True)
        assert asked(lambda: other + 1) == {True}  # makes nodes of the graph
        with torch.no_grad():
            assert asked(lambda: torch.nn.functional.dropout(weight)) == {False}  # chooses a kernel
            assert asked(lambda: weight.to("cuda")) == {False}
        assert asked(lambda: torch.nn.functional.dropout(weight)) == {False, True}


def test_the_engine_of_autograd_runs_without_a_driver_by_its_own_devices(mode):
    compat.keep_device_guard()
    with mode, _Devices() as devices:
        weight = torch.ones(3, device="cuda", requires_grad=True)
        loss = (weight + weight * 2).sum()
        devices.asked.clear()
        with torch.no_grad():
            loss.backward()
        assert True in devices.asked
        assert torch.autograd.grad((weight * 2).sum(), weight)[0].device == weight.device
    assert weight.grad.device == weight.device


AFTER_A_FORECAST = """
import torch
from i2v_lab import forecast

def in_a_scope():
    with torch.device("cuda"):
        return torch.ones(4)

forecast(in_a_scope, device="cuda")
with torch.device("meta"):
    made = torch.tensor([1.0]), torch.ones(1), torch.as_tensor([1.0])
print({each.device.type for each in made})
"""


def test_a_default_device_is_that_of_every_function_after_a_forecast(forked_python):
    """Torch collects the functions once in a process, which here is within a forecast."""
    said = subprocess.run([*forked_python, "-c", AFTER_A_FORECAST], capture_output=True, text=True, check=True)
    assert said.stdout == "{'meta'}\n"


def test_a_class_of_tensors_takes_storage_past_its_own_torch_function():
    target, name = compat.MAKE_SUBCLASS
    data = torch.zeros(3)
    made = getattr(target, name)(torch.nn.Parameter, data, False)
    assert storage_key(made) == storage_key(data)

    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_: object, **__: object) -> None:
            raise AssertionError("called")

    with compat.DisableTorchFunctionSubclass():
        assert aten.detach.default(data.as_subclass(Loud)).shape == (3,)
