"""ppo_plr_procgen.py: DrAC, UCB-DrAC, Impoola's encoder, flawed test levels."""

import colorsys
import copy
import functools
import math

import gymnasium as gym
import numpy as np
import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import REWARDS, Corridor, result_of, rows

import ppo_plr_procgen as script

TINY = support.TINY[script.__name__]
CPU = torch.device("cpu")
NOTHING = {"train_return": 0.0, "test_return": 0.0, "episodes": {}}
main = functools.partial(support.main, script)


# ---- augmentations, image by image ---------------------------------------------------------------


class Noted(script.Draws):
    """Keeps what was drawn, by image."""

    def __init__(self, num_images: int):
        super().__init__(num_images, slice(None), CPU)
        self.drawn = []

    def uniform(self, *args):
        self.drawn.append(super().uniform(*args))
        return self.drawn[-1]

    def integers(self, *args):
        self.drawn.append(super().integers(*args))
        return self.drawn[-1]

    def normal(self, *args):
        self.drawn.append(super().normal(*args))
        return self.drawn[-1]


def plain_crop(image, top, left):
    h, w, _ = image.shape
    padded = np.pad(image, ((12, 12), (12, 12), (0, 0)), mode="edge")
    return padded[12 + top :][:h, 12 + left :][:, :w]


def plain_random_convolution(image, kernel):
    h, w, channels = image.shape
    padded = np.zeros((h + 2, w + 2, channels))
    padded[1:-1, 1:-1] = image
    out = np.zeros(image.shape)
    for to, c, row, column in np.ndindex(kernel.shape):
        window = padded[row : row + h, column : column + w, c]
        out[..., to] += window * kernel[to, c, row, column]
    return out


def plain_grayscale(image):
    gray = np.dot(image, [0.299, 0.587, 0.114])
    return np.dstack([gray, gray, gray])


def plain_cutout_color(image, height, width, color):
    image = image.copy()
    image[12 + height : 12 + 2 * height, 24 + width : 24 + 2 * width] = color
    return image


def plain_color_jitter(image, contrast, brightness, saturation, turn, first):
    def change_contrast(x):
        mean = x.mean((0, 1))
        return np.clip((x - mean) * contrast + mean, 0, 1)

    x = image / 255.0
    if first:
        x = change_contrast(x)
    for row, column in np.ndindex(x.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*x[row, column])
        changed = (h + turn * 255 / 360) % 1, min(s * saturation, 1), min(v * brightness, 1)
        x[row, column] = colorsys.hsv_to_rgb(*changed)
    if not first:
        x = change_contrast(x)
    return x * 255


PLAIN = {
    "crop": plain_crop,
    "random_convolution": plain_random_convolution,
    "grayscale": plain_grayscale,
    "flip": lambda image, flipped: image[:, ::-1] if flipped else image,
    "rotate": lambda image, quarters: np.rot90(image, quarters),
    "cutout": lambda image, height, width: plain_cutout_color(image, height, width, 0),
    "cutout_color": plain_cutout_color,
    "color_jitter": plain_color_jitter,
}


def images(n: int) -> torch.Tensor:
    """Noise, a gray, black, and pure colours among them."""
    x = np.random.default_rng(n).integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)
    x[1, :32] = x[1, :32, :, :1]
    x[2, 10:30] = 0
    x[3, ::2] = [255, 0, 0]
    x[3, 1::2] = [0, 0, 255]
    return torch.from_numpy(x)


def test_the_eight_are_the_papers_in_the_authors_order():
    assert list(script.AUGMENTATIONS) == list(PLAIN)


@pytest.mark.parametrize("name", PLAIN)
def test_each_augmentation_equals_a_plain_one_of_each_image(name):
    torch.manual_seed(1)
    x = images(5)
    before = x.clone()
    draws = Noted(5)
    got = script.AUGMENTATIONS[name](x, draws).float().numpy()
    assert torch.equal(x, before)  # not in place
    changed = 0
    for i in range(5):
        image = x[i].numpy()
        expected = PLAIN[name](image, *(drawn[i].numpy() for drawn in draws.drawn))
        np.testing.assert_allclose(got[i], expected, atol=1e-2)  # of 255
        changed += not np.array_equal(expected, image)
    assert changed >= 2


def test_parameters_are_drawn_from_the_whole_of_their_ranges():
    torch.manual_seed(0)
    n, drawn = 3000, {}
    x = torch.zeros(n, 4, 4, 3, dtype=torch.uint8)
    for name in ("crop", "flip", "rotate", "cutout", "cutout_color"):
        draws = Noted(n)
        script.AUGMENTATIONS[name](x, draws)
        drawn[name] = [parameter.flatten().tolist() for parameter in draws.drawn]
    assert all(set(offsets) == set(range(-12, 13)) for offsets in drawn["crop"])
    for sides in (*drawn["cutout"], *drawn["cutout_color"][:2]):
        assert set(sides) == set(range(7, 22))
    assert set(drawn["cutout_color"][2]) == set(range(256))
    assert set(drawn["rotate"][0]) == {0, 1, 2, 3}
    assert np.mean(drawn["flip"][0]) == pytest.approx(0.5, abs=0.05)
    draws = Noted(n)
    script.random_convolution(x, draws)
    # Xavier: 2 / (fan in + fan out), each 3 channels x 9
    assert draws.drawn[0].std().item() == pytest.approx((2 / 54) ** 0.5, rel=0.02)
    assert script.random_convolution(x[:0], Noted(0)).shape == (0, *x.shape[1:])
    draws = Noted(n)
    script.color_jitter(x, draws)
    ranges = [(0.6, 1.4)] * 3 + [(-0.5, 0.5)]
    for parameter, (low, high) in zip(draws.drawn, ranges):
        assert low <= parameter.min() < low + 0.01 and high - 0.01 < parameter.max() <= high


@pytest.mark.parametrize("name", PLAIN)
def test_processes_augment_their_parts_of_one_minibatch_alike(name, monkeypatch):
    T, N = 3, 4
    b_obs = images(T * N)
    mb_inds = torch.tensor([0, 7, 3, 10, 5, 2])
    torch.manual_seed(0)
    (whole,) = script.augmented(name, b_obs, mb_inds, N)
    assert whole.shape == (6, 64, 64, 3) and whole.dtype == torch.float32
    state = torch.get_rng_state()
    monkeypatch.setattr(script, "WORLD", 2)
    for rank in range(2):
        monkeypatch.setattr(script, "RANK", rank)
        mine, _ = script.part_of_minibatch(mb_inds, N)
        own = b_obs.view(T, N, 64, 64, 3)[:, 2 * rank : 2 * rank + 2].flatten(0, 1)
        torch.manual_seed(0)
        (part,) = script.augmented(name, own, mb_inds, N)
        torch.testing.assert_close(part, whole[mine], atol=1e-3, rtol=1e-5)
        assert torch.equal(torch.get_rng_state(), state)  # the streams stay together


def test_without_augmentation_nothing_is_drawn():
    before = torch.get_rng_state()
    assert script.augmented("none", images(4), torch.arange(4), 2) == ()
    assert torch.equal(torch.get_rng_state(), before)
    assert (
        script.make_bandit(script.Args()) == script.make_bandit(script.Args(augment="crop")) == {}
    )


# ---- the loss ------------------------------------------------------------------------------------


def minibatch(agent: script.Agent, B: int) -> list[torch.Tensor]:
    """What ppo_loss is given, of a policy that has moved a little since the rollout."""
    rng = torch.Generator().manual_seed(0)
    actions = torch.randint(0, 15, (B,), generator=rng)
    logprobs = -2.7 + 0.1 * torch.randn(B, generator=rng)
    others = [torch.randn(B, generator=rng) for _ in range(3)]
    return [images(B), actions, logprobs, *others]


def gradients(loss: torch.Tensor, agent: script.Agent) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(agent.parameters()), retain_graph=True)


@pytest.fixture
def agent() -> script.Agent:
    torch.manual_seed(0)
    agent = script.Agent(Images(1))
    # policies that differ from image to image
    torch.nn.init.normal_(agent.actor.weight, std=0.5)
    return agent


def test_dracs_loss_and_gradients_equal_an_independent_implementation(agent):
    B = 6
    args = script.Args(num_envs=B, num_steps=1, num_minibatches=1)
    given = minibatch(agent, B)
    (augmented,) = script.augmented("color_jitter", given[0], torch.arange(B), B)
    loss, parts = script.ppo_loss(agent, args, *given, augmented)
    ppo, parts_of_ppo = script.ppo_loss(agent, args, *given)

    with torch.no_grad():
        p = torch.softmax(agent.actor(agent.hidden(given[0])), -1)
        v = agent.critic(agent.hidden(given[0]))[:, 0]
    hidden = agent.hidden(augmented)
    log_q = torch.log_softmax(agent.actor(hidden), -1)
    # the authors' term is a sample of the cross entropy; its mean over actions, less p's entropy
    cross_entropy = -sum(p[:, a] * log_q[:, a] for a in range(15)).mean()
    kl = cross_entropy + (p * p.log()).sum(-1).mean()
    value = torch.nn.functional.mse_loss(agent.critic(hidden)[:, 0], v) / 2
    expected = ppo + 0.1 * kl + 0.1 * value

    assert parts["augmented_kl"].item() == pytest.approx(kl.item(), rel=1e-4) and kl > 0.01
    assert parts["augmented_value_loss"].item() == pytest.approx(value.item(), rel=1e-4)
    assert {name: parts[name] for name in parts_of_ppo} == parts_of_ppo
    torch.testing.assert_close(loss, expected)
    moved = 0.0
    with_drac, plain, alone = (gradients(x, agent) for x in (loss, expected, ppo))
    for a, b, c in zip(with_drac, plain, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
        moved += (a - c).abs().sum().item()
    assert moved > 0.01


def test_the_gradient_of_the_kl_is_q_minus_p(agent):
    """By hand, at the policy's bias; nothing flows to the clean images' side."""
    B = 4
    args = script.Args(num_envs=B, num_steps=1, num_minibatches=1)
    x = images(B)
    (augmented,) = script.augmented("rotate", x, torch.arange(B), B)
    actions = torch.zeros(B, dtype=torch.int64)
    _, _, _, values, logits = agent.get_action_and_value(x, actions)
    clean = logits.detach(), values.detach()
    g_pi, g_v = script.drac_terms(agent, args, augmented, actions, *clean)
    _, _, _, newvalues, newlogits = agent.get_action_and_value(augmented, actions)
    (of_policy,) = torch.autograd.grad(g_pi, agent.actor.bias, retain_graph=True)
    (of_value,) = torch.autograd.grad(g_v, agent.critic.bias)
    difference = newlogits.softmax(-1) - logits.softmax(-1)
    torch.testing.assert_close(of_policy, difference.mean(0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(of_value[0], (newvalues - values).mean(), atol=1e-6, rtol=1e-4)


def test_on_the_clean_images_themselves_dracs_terms_are_nothing(agent):
    B = 4
    args = script.Args(num_envs=B, num_steps=1, num_minibatches=1)
    given = minibatch(agent, B)
    loss, parts = script.ppo_loss(agent, args, *given, given[0])
    ppo, _ = script.ppo_loss(agent, args, *given)
    assert parts["augmented_kl"].abs() < 1e-6 and parts["augmented_value_loss"] < 1e-9
    for a, b in zip(gradients(loss, agent), gradients(ppo, agent)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# ---- the bandit ----------------------------------------------------------------------------------


def test_the_bandit_plays_a_game_done_by_hand():
    bandit = script.AugmentationBandit()
    # t = 1: ln 1 = 0, all bounds are 0, and the first counts
    assert bandit.choose(99.0) == "crop"  # of a rollout before any update: nobody's
    # t = 2: crop 1 + 0.1 sqrt(ln 2 / 2) = 1.06, the others 0.1 sqrt(ln 2) = 0.08
    assert bandit.choose(1.0) == "crop"
    # t = 3: crop (1 - 2) / 2 + 0.1 sqrt(ln 3 / 3) = -0.44, the others 0.10
    assert bandit.choose(-2.0) == "random_convolution"
    # t = 4: 0.05 + 0.1 sqrt(ln 4 / 2) = 0.133, the others 0.1 sqrt(ln 4) = 0.118
    assert bandit.choose(0.05) == "random_convolution"
    # t = 5: (0.05 - 0.05) / 2 + 0.1 sqrt(ln 5 / 3) = 0.073, the others 0.127
    assert bandit.choose(-0.05) == "grayscale"
    row = bandit.metrics()
    assert row["augmentation"] == 2
    assert row["q_crop"] == -0.5 and row["q_random_convolution"] == 0 and row["q_flip"] == 0
    assert [row[f"n_{name}"] for name in PLAIN] == [3, 3, 1, 1, 1, 1, 1, 1]


def test_the_bandit_remembers_ten_returns():
    bandit = script.AugmentationBandit()
    bandit.choose(0.0)
    for mean_return in range(1, 14):
        assert bandit.choose(float(mean_return)) == "crop"
    assert bandit.value("crop") == np.mean(range(4, 14)) and bandit.counts["crop"] == 14


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=60), st.integers(0, 60))
def test_the_bandit_equals_a_plain_one_and_goes_on_from_its_state(returns, cut):
    names = list(PLAIN)
    bandit = script.AugmentationBandit()
    history = []  # arm and the return that followed
    arm = None
    for i, mean_return in enumerate(returns):
        if arm is not None:
            history.append((arm, mean_return))
        bounds = []
        for k in range(8):
            own = [x for played, x in history if played == k]
            q = sum(own[-10:]) / len(own[-10:]) if own else 0.0
            bounds.append(q + 0.1 * math.sqrt(math.log(1 + len(history)) / (1 + len(own))))
        arm = bounds.index(max(bounds))
        if i == cut:
            state = copy.deepcopy(bandit.state_dict())
            bandit = script.AugmentationBandit()
            bandit.load_state_dict(state)
        assert bandit.choose(mean_return) == names[arm]


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_augmented_runs_differ_resume_and_log_what_they_do(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "evaluate", lambda *args: NOTHING)
    prints = set()
    for augment in ("none", "crop", "ucb"):
        run_dir = tmp_path / augment
        main(monkeypatch, f"{TINY} --total-timesteps 288 --augment {augment} --run-dir {run_dir}")
        prints.add(result_of(run_dir)["fingerprint"])
    assert len(prints) == 3
    main(monkeypatch, f"{TINY} --augment ucb --total-timesteps 192 --run-dir {tmp_path}/resumed")
    main(monkeypatch, f"--resume {tmp_path}/resumed --total-timesteps 288")
    support.assert_same_rows(tmp_path / "resumed/progress.csv", tmp_path / "ucb/progress.csv")
    assert (
        result_of(tmp_path / "resumed")["fingerprint"] == result_of(tmp_path / "ucb")["fingerprint"]
    )

    none, crop, ucb = (rows(tmp_path / x / "progress.csv") for x in ("none", "crop", "ucb"))
    of_drac = {"augmented_kl", "augmented_value_loss"}
    of_bandit = {"augmentation", *[f"{x}_{name}" for x in "qn" for name in PLAIN]}
    assert none[0].keys() | of_drac == crop[0].keys()
    assert crop[0].keys() | of_bandit == ucb[0].keys()
    assert all(row[name] > 0 for row in [*crop, *ucb] for name in of_drac)
    assert sum(ucb[-1][f"n_{name}"] for name in PLAIN) == 8 + len(ucb) - 1
    checkpoint = torch.load(tmp_path / "ucb/checkpoint.pt", weights_only=True)
    current = checkpoint["bandit"]["current"]
    assert list(PLAIN)[int(ucb[-1]["augmentation"])] == current
    assert "bandit" not in torch.load(tmp_path / "none/checkpoint.pt", weights_only=True)


@pytest.mark.slow
def test_scores_are_of_clean_observations(monkeypatch, tmp_path):
    """The first rollout's come before any update: augmentation changes none of them."""
    monkeypatch.setattr(script, "evaluate", lambda *args: NOTHING)
    rollouts = support.watch_sampler(script, monkeypatch)
    for augment in ("none", "ucb"):
        flags = f"{TINY} --total-timesteps 96 --augment {augment}"
        main(monkeypatch, f"{flags} --run-dir {tmp_path}/{augment}")
    assert len(rollouts) == 2
    np.testing.assert_array_equal(rollouts[0].step_scores, rollouts[1].step_scores)


# ---- encoder -------------------------------------------------------------------------------------


class Images(gym.vector.VectorEnv):
    """Their shape and 15 actions."""

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.single_action_space = gym.spaces.Discrete(15)


@pytest.mark.parametrize(("encoder", "parameters"), [("impala", 626_256), ("impoola", 110_160)])
def test_encoders_have_the_papers_parameters(encoder, parameters):
    agent = script.make_agent(Images(1), script.Args(encoder=encoder))
    assert sum(p.numel() for p in agent.parameters()) == parameters


def test_impoola_takes_each_channels_mean():
    torch.manual_seed(0)
    agent = script.make_agent(Images(1), script.Args(encoder="impoola"))
    x = images(4)
    layers = list(agent.network)
    y = x.permute(0, 3, 1, 2) / 255.0
    for sequence in layers[:3]:
        y = sequence(y)
    assert y.shape == (4, 32, 8, 8)
    means = torch.stack([y[:, c].clamp(min=0).sum((1, 2)) / 64 for c in range(32)], -1)
    (linear,) = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    torch.testing.assert_close(agent.hidden(x), torch.relu(linear(means)))


@pytest.mark.slow
def test_an_impoola_run_can_be_evaluated_and_another_encoder_is_refused(
    monkeypatch, tmp_path, capsys
):
    flags = f"{TINY} --total-timesteps 96 --encoder impoola --augment crop"
    main(monkeypatch, f"{flags} --run-dir {tmp_path}/run")
    assert "impoola, augment crop" in capsys.readouterr().out
    main(monkeypatch, f"--evaluate {tmp_path}/run")
    assert "test_return_clean: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"--evaluate {tmp_path}/run --encoder impala")
    message = capsys.readouterr().err
    expected = f"error: --evaluate {tmp_path}/run has another network than these flags make: "
    assert stop.value.code == 2 and message.startswith(expected + "Missing key(s)")


# ---- flawed test levels --------------------------------------------------------------------------


class SmallCorridor(Corridor):
    image_shape = 4, 4, 3


class Idle:
    """An agent, in a corridor where actions do nothing."""

    def get_action_and_value(self, x):
        return (torch.zeros(len(x)),)


@pytest.fixture
def corridor(monkeypatch):
    """Level l looks like level l % 3, and level 1 ends with its first step, whatever is done."""
    monkeypatch.setattr(script, "make_envs", lambda args, n, device: SmallCorridor(n))
    monkeypatch.setattr(script, "EVALUATION_ENVS", {})
    monkeypatch.setattr(script, "FLAWED", {})


def test_the_test_return_is_given_with_and_without_flawed_levels(corridor):
    args = script.Args(num_levels=1, start_level=6, eval_episodes=90)  # looks like level 0
    result = script.evaluate(Idle(), args, CPU)
    kinds = np.array(result["episodes"]["test_levels"]) % 3
    assert result["test_levels_seen"] == (kinds == 0).sum() > 10
    assert result["test_levels_one_step"] == (kinds == 1).sum() > 10
    # on level 2, as it is played to its end
    assert result["test_return_clean"] == REWARDS[2, :5].sum()
    assert result["test_return"] == np.mean(result["episodes"]["test_returns"])
    again = script.evaluate(Idle(), args, CPU)
    assert again == result


@pytest.mark.parametrize("num_levels", [0, script.MOST_TRAINING_LEVELS + 1])
def test_large_training_sets_are_not_looked_through(num_levels, corridor):
    args = script.Args(num_levels=num_levels, eval_episodes=30, curriculum="uniform")
    result = script.evaluate(Idle(), args, CPU)
    assert math.isnan(result["test_levels_seen"]) and result["test_levels_one_step"] > 0
    clean = [x for x in result["episodes"]["test_returns"] if x != REWARDS[1, 0]]
    assert result["test_return_clean"] == np.mean(clean)


def test_no_clean_level_is_no_return(corridor):
    result = script.evaluate(Idle(), script.Args(num_levels=3, eval_episodes=9), CPU)
    assert math.isnan(result["test_return_clean"]) and result["test_levels_seen"] == 9


class Sensitive(SmallCorridor):
    """Ends with the first step on even levels whatever is done, on level 5 unless action 6 is."""

    def reset(self, *, seed, options=None):
        self.seeds = np.array(seed)
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        obs, rewards, done, truncations, infos = super().step(actions)
        done = (self.seeds % 2 == 0) | ((self.seeds == 5) & (actions != 6))
        return obs, rewards, done, truncations, infos


@pytest.mark.parametrize("num_envs", [1, 3, 50])
def test_an_end_that_one_action_avoids_is_no_flaw(num_envs):
    levels = np.array([5, 2, 3, 8, 5, 7, 4])
    ends = script.end_at_once(Sensitive(num_envs), levels)
    assert ends.tolist() == [False, True, False, True, False, False, True]


@pytest.mark.parametrize("num_envs", [1, 3, 50])
def test_first_observations_are_equal_exactly_where_the_images_are(num_envs):
    levels = np.array([4, 0, 1, 3, 9, 2])
    found = script.first_observations(SmallCorridor(num_envs), levels)
    same = [[a == b for a in found] for b in found]
    np.testing.assert_array_equal(same, levels[:, None] % 3 == levels % 3)


def test_a_copy_of_a_training_level_and_jumpers_level_5_are_found(monkeypatch):
    """In Procgen itself: what is drawn as test levels are some of the training levels, and some
    that are not. Level 5 ends at once (procgen's issue 59), 6 does not."""
    args = script.Args(env_id="jumper", num_levels=4, start_level=100, eval_episodes=5)
    test_levels = np.array([script.FIRST_TEST_LEVEL, 102, 5, 6, 100])
    both = np.append(test_levels, np.arange(100, 104))
    monkeypatch.setattr(script, "evaluation_levels", lambda args: both)
    monkeypatch.setattr(script, "FLAWED", {})
    envs = script.make_envs(args, 3, CPU)
    flawed = script.flawed_levels(args, envs)
    envs.close()
    assert flawed["seen"].tolist() == [False, True, False, False, True]
    assert flawed["one_step"].tolist()[2:4] == [True, False]
