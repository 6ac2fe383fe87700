"""benchmarks/roofline.py: its counts against sums by hand, what it reads of a run, and a tiny run of it."""

import csv
import sys

import pytest
import torch
from support import ROOT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ppo_plr_procgen

sys.path.insert(0, str(ROOT / "benchmarks"))
import roofline


def counted(function) -> dict[str, tuple[int, int, int]]:
    """By operator: calls, FLOPs and bytes."""
    with roofline.Count("here") as counter:
        function()
    result = {}
    for (_, operator, flops, size, _), calls in counter.calls.items():
        before = result.get(operator, (0, 0, 0))
        result[operator] = (before[0] + calls, before[1] + calls * flops, before[2] + calls * size)
    return result


def forward_backward(layer: nn.Module, x: torch.Tensor) -> None:
    out = layer(x)
    (out[0] if isinstance(out, tuple) else out).backward(torch.ones(*x.shape[:-1], 7) if x.dim() < 4 else out.detach())


def test_convolution():
    """2 FLOPs for each weight at each output's place; backward as many for the input's gradient, and the weights'."""
    x, out, weight, bias = 2 * 3 * 8 * 9, 2 * 5 * 6 * 7, 5 * 3 * 3 * 3, 5
    ops = counted(lambda: forward_backward(nn.Conv2d(3, 5, 3), torch.zeros(2, 3, 8, 9, requires_grad=True)))
    assert ops["convolution"] == (1, 2 * weight * 2 * 6 * 7, 4 * (x + weight + bias + out))
    read, written = out + x + weight, x + weight + bias
    assert ops["convolution_backward"] == (1, 2 * 2 * weight * 2 * 6 * 7, 4 * (read + written))


def test_linear():
    ops = counted(lambda: forward_backward(nn.Linear(4, 7), torch.zeros(3, 4, requires_grad=True)))
    assert ops["addmm"] == (1, 2 * 3 * 4 * 7, 4 * (3 * 4 + 4 * 7 + 7 + 3 * 7))
    assert ops["mm"] == (2, 2 * 2 * 3 * 4 * 7, 4 * 2 * (3 * 7 + 4 * 7 + 3 * 4))  # of the input, of the weights


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_lstm():
    """Fused, PyTorch counts nothing; the same LSTM without the fused operator is made of products that it counts."""
    steps, n, inputs, hidden = 6, 3, 5, 7
    x, flops = torch.zeros(steps, n, inputs, requires_grad=True), 2 * steps * n * 4 * hidden * (inputs + hidden)
    lstm = nn.LSTM(inputs, hidden)
    with torch.backends.mkldnn.flags(enabled=False):
        unfused = counted(lambda: lstm(x))
    assert sum(x[1] for x in unfused.values()) == flops
    ops = counted(lambda: forward_backward(lstm, x))
    if "mkldnn_rnn_layer" not in ops:
        pytest.skip("this CPU's PyTorch does not fuse the LSTM")
    assert ops["mkldnn_rnn_layer"][:2] == (1, flops) and ops["mkldnn_rnn_layer_backward"][:2] == (1, 2 * flops)
    weights, state = 4 * hidden * (inputs + hidden + 2), 2 * n * hidden
    with torch.no_grad():  # without what the backward pass needs, whose size is oneDNN's
        alone = counted(lambda: lstm(x))["mkldnn_rnn_layer"][2]
    assert alone == 4 * (x.numel() + weights + 2 * state + steps * n * hidden) < ops["mkldnn_rnn_layer"][2]


def test_bytes():
    table, x = torch.zeros(100, 4), torch.zeros(10, 4)
    assert counted(lambda: table.t()[:2].reshape(200).detach()[3]) == {"clone": (1, 0, 2 * 800)}
    assert counted(lambda: table[torch.arange(3)])["index"] == (1, 0, 3 * 8 + 2 * 3 * 16)  # not the whole table
    assert counted(lambda: x.add_(1)) == {"add_": (1, 0, 2 * 160)}
    assert counted(lambda: x.zero_()) == {"zero_": (1, 0, 160)}
    assert counted(lambda: x.copy_(torch.ones(4).expand(10, 4)))["copy_"] == (1, 0, 16 + 160)
    assert counted(lambda: x.to(torch.bfloat16)) == {"_to_copy": (1, 0, 160 + 80)}


def test_procgen_agent_is_counted_as_by_hand(capsys):
    """The IMPALA network of the paper, 64 x 64 pixels: FLOPs of its layers, and their outputs for the least bytes."""
    work = roofline.count("procgen", "fp32", num_envs=4, steps=8)
    flops, activations, before, side, first = 0, 256 + 15 + 1, 3, 64, 2 * 9 * 3 * 16 * 64**2
    for channels in (16, 32, 32):
        flops += 2 * 9 * before * channels * side**2 + 4 * 2 * 9 * channels**2 * (side // 2) ** 2
        activations += channels * side**2 + 4 * channels * (side // 2) ** 2
        before, side = channels, side // 2
    flops += 2 * (2048 * 256 + 256 * 16)
    parameters = sum(x.numel() for x in ppo_plr_procgen.Agent(Envs()).parameters())
    assert work["inference"].flops == flops
    assert work["update"].flops == 3 * (3 * flops - first)  # the observation has no gradient
    assert work["inference"].fused == 12288 + 4 * parameters / 4  # weights once for the 4 environments
    minibatch = 4 * 256 / 8
    assert work["update"].fused == pytest.approx(3 * (12288 + 2 * 4 * activations + 32 * parameters / minibatch))
    assert work["update"].bytes > work["update"].fused and work["environment"].flops == 0
    assert capsys.readouterr().out == ""
    agent, x = ppo_plr_procgen.Agent(Envs()), torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as theirs:
        agent.get_value(x).sum().backward()
    ours = counted(lambda: agent.get_value(x).sum().backward())
    assert sum(flops for _, flops, _ in ours.values()) == theirs.get_total_flops()


class Envs:
    single_observation_space = ppo_plr_procgen.gym.spaces.Box(0, 255, (64, 64, 3))
    single_action_space = ppo_plr_procgen.gym.spaces.Discrete(15)


def test_profile_line():
    text = "training\nprofile to iteration 9, rank 0: update 3.555 s (55.5%), inference 1e-05 s (0.0%)\nstep 1\n"
    assert roofline.profile_line(text) == (8, {"update": 3.555, "inference": 1e-05})
    for wrong in ("", text + text, text.replace("rank 0", "rank 1")):
        with pytest.raises(ValueError, match="lines of --profile"):
            roofline.profile_line(wrong)


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}


def test_time_inside():
    """Self time: conv (100 to 160) calls fill (110 to 130); what is before the phases or after them does not count."""
    ranges = [event("user_annotation", "inference", 100, 80), event("user_annotation", "update", 200, 50)]
    ops = [event("cpu_op", "aten::conv", 100, 60), event("cpu_op", "aten::fill", 110, 20)]
    ops += [event("cpu_op", "aten::conv", 200, 10), event("cpu_op", "aten::conv", 90, 5)]
    ops += [event("cpu_op", "aten::conv", 185, 5), {"ph": "i", "name": "mark", "ts": 1}]
    kind, seconds = roofline.time_inside(ops + ranges)
    outside = roofline.OUTSIDE[kind]
    assert kind == "cpu_op"
    assert seconds["inference"] == pytest.approx({"conv": 40e-6, "fill": 20e-6, outside: 20e-6})
    assert seconds["update"] == pytest.approx({"conv": 10e-6, outside: 40e-6})
    kind, seconds = roofline.time_inside([*ops, *ranges, event("kernel", "void at::native::gemm", 205, 30, tid=7)])
    assert kind == "kernel" and seconds["update"] == pytest.approx({"gemm": 30e-6, roofline.OUTSIDE[kind]: 20e-6})


def test_bounds():
    work = {"inference": roofline.Work(roofline.Counter({("a", 8, 6): 1, ("b", 0, 10): 2}), 8.0, 26.0, 12.0, 3.0)}
    work |= dict.fromkeys(("environment", "update"), roofline.Work(roofline.Counter(), 0.0, 0.0, 0.0, 0.0))
    rates = {"fp32": 4.0, "memory": 5.0, "call": 0.1, "transfer": 12296.0}
    bound = roofline.bounds("procgen", "fp32", work, rates, alone=2.0)
    assert bound["inference"] == pytest.approx({"bound": 12 / 5, "calls": 0.3, "operators": 8 / 4 + 2 * 10 / 5})
    assert bound["environment"]["bound"] == 2 and bound["transfer"]["bound"] == 1
    assert roofline.in_sequence(bound) == pytest.approx(1 / 5.4)
    assert roofline.in_sequence(bound, overlapped=True) == pytest.approx(1 / 3.4)


def test_end_to_end(tmp_path, monkeypatch, capfd):
    flags = "--scripts mazes --precisions fp32 --mazes-envs 4 --counted-envs 32 --mazes-steps 16 --iterations 3"
    monkeypatch.setattr(sys, "argv", ["roofline.py", *flags.split(), "--seconds", "0.001", "--out", str(tmp_path)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    roofline.main()
    with open(tmp_path / "results" / "roofline" / "cpu_mazes.csv") as file:
        rows = {row["phase"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(roofline.PHASES)
    # acting: convolution as a matrix, LSTM, both heads; nothing of it is padded
    flops = 2 * (75 * 144 + (149 + 256) * 1024 + 256 * 64 + 64 * 8)
    assert float(rows["inference"]["MFLOP"]) == pytest.approx(flops / 1e6, rel=1e-4)
    assert all(float(row["measured"]) > 0 for row in rows.values())
    text = (tmp_path / "roofline.md").read_text()
    for part in (
        "ppo_robust_plr_minigrid.py, 4 environments",
        "| mazes, 32 | fp32 |",
        "150,000",
        "addmm",
        "not measured",
    ):
        assert part in text, text
    assert "nan" not in text and text.strip() in capfd.readouterr().out.strip()


@pytest.mark.parametrize("flags, expected", [("--precisions tf32 --no-cuda", "tf32"), ("--iterations 2", "at least 3")])
def test_refused(flags, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["roofline.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        roofline.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and expected in message and message.count("\n") == 1
