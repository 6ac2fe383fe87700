"""The scripts' training loops on a GPU that is not there: every tensor is a fake one, which has a shape, a dtype and a
device but no numbers. An operation on tensors of two devices raises, as does reading one that is not on the CPU."""

import contextlib

import numpy as np
import pytest
import torch
from support import SCRIPTS, main, rows
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

import ppo_plr_procgen
import ppo_robust_plr_minigrid

pytestmark = [
    pytest.mark.skipif(
        torch.backends.cuda.is_built(), reason="PyTorch with CUDA asks the driver even for a fake tensor"
    ),
    pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN"),
]
FLAGS = {
    ppo_plr_procgen: "--env-id fruitbot --num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 1"
    " --total-timesteps 96 --num-levels 3 --eval-episodes 1",
    ppo_robust_plr_minigrid: "--num-envs 4 --num-steps 8 --update-epochs 1 --maze-size 7 --num-walls 3 --max-steps 6"
    " --buffer-size 8 --rho 0.3 --replay-prob 1 --total-timesteps 160 --eval-episodes 1",
}
MORE = {
    ppo_plr_procgen: "--precision bf16 --score min_margin --target-kl 1 --profile",
    ppo_robust_plr_minigrid: "--precision bf16 --score policy_entropy --bootstrap-timeouts --target-kl 1 --profile",
}


def part(x, key):
    """x[key] of a fake tensor by PyTorch's own operators: its indexing would ask CUDA for the device first."""
    key, dim = key if isinstance(key, tuple) else (key,), 0
    for i, index in enumerate(key):
        if isinstance(index, int):
            x = x.select(dim, index)
        elif index is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif index is Ellipsis:
            dim = x.dim() - sum(following is not None for following in key[i + 1 :])
        elif isinstance(index, slice):
            x, dim = torch.ops.aten.slice(x, dim, index.start, index.stop, index.step or 1), dim + 1
        else:
            if index.dtype == torch.bool:  # as if it were true everywhere
                index = torch.arange(len(index), device=index.device)
            x, dim = torch.ops.aten.index(x, [None] * dim + [index]), dim + index.dim()
    return x


class Reading(TorchFunctionMode):
    """What leaves a fake tensor for Python or NumPy is random zeros and ones; NumPy reads from the CPU only."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.tensor and kwargs and "device" in kwargs:
            return torch.tensor(*args).to(kwargs["device"])
        if args and isinstance(args[0], FakeTensor):
            x = args[0]
            if func is torch.Tensor.numpy:
                assert x.device.type == "cpu", "NumPy reads a tensor on the GPU"
                dtype = str(x.dtype).removeprefix("torch.")
                return self.rng.integers(2, size=tuple(x.shape)).astype(dtype)
            if func is torch.Tensor.__invert__:  # this and the next three ask CUDA which device is the current one
                return torch.logical_not(x)
            if func is torch.Tensor.contiguous:
                return x.clone(memory_format=torch.contiguous_format)
            if func is torch.Tensor.__getitem__:
                return part(*args)
            if func is torch.Tensor.__setitem__:
                target, value = part(*args[:2]), args[2]  # a copy between devices is allowed here
                return torch.broadcast_to(value, target.shape) if torch.is_tensor(value) else None
            if func is torch.Tensor.any:  # there are timeouts, and ranks do not differ
                answer = torch.empty((), dtype=torch.bool)
                answer.value = x.device.type == "cuda"
                return answer
            if func is torch.Tensor.__bool__:
                return getattr(x, "value", True)
            if func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.__int__):
                value = self.rng.integers(2, size=tuple(x.shape)).tolist()
                return {torch.Tensor.__float__: float, torch.Tensor.__int__: int}.get(func, lambda y: y)(value)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_gpu(monkeypatch):
    for name, value in {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "get_device_name": "fake GPU",
        "synchronize": None, "is_bf16_supported": True, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)

    parameters = []

    def backward(loss):  # autograd would ask CUDA for its streams: forward passes only
        assert loss.device.type == "cuda" and loss.dim() == 0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def to(self, device, **kwargs):  # torch's own exchanges the tensors inside the parameters, which fake ones refuse
        for module in self.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                parameter = parameter.detach().to(device, **(kwargs if parameter.dim() == 4 else {}))
                setattr(module, key, torch.nn.Parameter(parameter, requires_grad=False))
                parameters.append(getattr(module, key))
        return self

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch, "from_numpy", lambda x: torch.empty(x.shape, dtype=getattr(torch, x.dtype.name)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.random, "fork_rng", lambda *args, **kwargs: contextlib.nullcontext())


def train_on_it(script, monkeypatch, tmp_path, flags=""):
    written = []
    monkeypatch.setattr(script, "fingerprint", lambda state: "0" * 64)  # of no numbers
    monkeypatch.setattr(script, "write_file", lambda path, content: written.append(path.name))
    with FakeTensorMode(allow_non_fake_inputs=True), Reading():
        main(script, monkeypatch, f"{FLAGS[script]} {flags} --run-dir {tmp_path}")
    return written


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_run_on_a_gpu_mixes_no_devices(more, script, fake_gpu, monkeypatch, tmp_path, capsys):
    if not more:
        result = {"train_return": 0.0, "test_return": 0.0, "solved_mean": 0.0, "episodes": {}}
        monkeypatch.setattr(script, "evaluate", lambda *args: result)  # Procgen's takes ten seconds
    written = train_on_it(script, monkeypatch, tmp_path, MORE[script] if more else "")
    assert "training on fake GPU" in capsys.readouterr().out and written[-1] == "result.json"
    assert sum(row["learning_rate"] for row in rows(tmp_path / "progress.csv")) > 0 and rows(
        tmp_path / "evaluations.csv"
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_what_mixes_devices_is_seen(script, fake_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: x)  # a copy to the CPU left out
    with pytest.raises(SystemExit):
        train_on_it(script, monkeypatch, tmp_path)
    assert "reads a tensor on the GPU" in capsys.readouterr().err
    monkeypatch.undo()


def test_an_observation_left_on_the_cpu_is_seen(fake_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ppo_plr_procgen, "to_device", lambda x, device: torch.from_numpy(x))
    with pytest.raises(SystemExit):
        train_on_it(ppo_plr_procgen, monkeypatch, tmp_path)
    assert "device" in capsys.readouterr().err
