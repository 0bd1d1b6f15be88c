"""Scenarios of faults.py: agents that learn by reward, with environments of a few lines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from faults_runs import Scenario, Training
from faults_supervised import stacked
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH = 20
"""How many steps an episode of the cart has."""


def starts(count: int) -> Tensor:
    """Positions and speeds of carts at the start of an episode."""
    return torch.randn(count, 2) * torch.tensor([1.0, 0.3])


def push(state: Tensor, force: Tensor) -> tuple[Tensor, Tensor]:
    """The states of the carts a fifth of a second later, and the rewards: the nearer to the middle and the slower, the better."""
    speed = state[:, 1:] + 0.4 * force
    place = state[:, :1] + 0.2 * speed
    cost = place**2 + 0.1 * speed**2 + 0.01 * force**2
    return torch.cat([place, speed], 1).clamp(-5, 5), -cost.clamp(max=10)


@torch.no_grad()
def driven(policy: Callable[[Tensor], Tensor], unit: float = 1.0) -> float:
    """The mean reward of a policy that sees the states in this unit."""
    state = torch.cat([torch.linspace(-2, 2, 41)[:, None], torch.zeros(41, 1)], 1)
    total = torch.zeros(41, 1)
    for _ in range(LENGTH):
        state, reward = push(state, policy(state * unit))
        total += reward
    return float(total.mean()) / LENGTH


@dataclass
class Ddpg:
    """Deterministic policy gradients on the cart, with target networks and a memory of all that has happened."""

    actor: nn.Module
    critic: nn.Module
    optimizer: torch.optim.Optimizer
    rate: float = 3e-3
    unit: float = 1.0
    """What the states are multiplied with before the networks see them."""
    memory: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def training(self, steps: int) -> Training:
        """The training whose watched model is the actor."""
        self.targets = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.judge = torch.optim.Adam(self.critic.parameters(), self.rate)
        self.state, self.age = starts(16), 0
        return Training(self.actor, self.optimizer, self.step, lambda: driven(self.actor, self.unit), steps)

    def collect(self) -> None:
        """Let 16 carts drive one step, with noise."""
        if self.age % LENGTH == 0:
            self.state = starts(16)
        with torch.no_grad():
            force = (self.targets[0](self.state * self.unit) + 0.3 * torch.randn(16, 1)).clamp(-1, 1)
        after, reward = push(self.state, force)
        self.memory.append((self.state * self.unit, force, reward, after * self.unit))
        self.state, self.age = after, self.age + 1

    def step(self) -> None:
        self.collect()
        pick = torch.randint(len(self.memory), (4,))
        state, force, reward, after = (torch.cat(parts) for parts in zip(*(self.memory[k] for k in pick), strict=True))
        with torch.no_grad():
            goal = reward + 0.9 * self.targets[1](torch.cat([after, self.targets[0](after)], 1))
        self.judge.zero_grad()
        F.mse_loss(self.critic(torch.cat([state, force], 1)), goal).backward()
        self.judge.step()
        self.optimizer.zero_grad()
        (-self.critic(torch.cat([state, self.actor(state)], 1)).mean()).backward()
        self.optimizer.step()
        with torch.no_grad():
            for live, target in zip((self.actor, self.critic), self.targets, strict=True):
                for new, old in zip(live.parameters(), target.parameters(), strict=True):
                    old.lerp_(new, 0.02)


def actor_hot_rate(faulty: bool, seed: int) -> Training:
    """The actor of DDPG has a rate of 0.2, and its tanh output sticks at -1 and 1. The twin has a rate of 0.002."""
    torch.manual_seed(seed)
    actor, critic = stacked([2, 32, 32, 1], nn.ReLU, nn.Tanh()), stacked([3, 32, 32, 1], nn.ReLU)
    return Ddpg(actor, critic, torch.optim.Adam(actor.parameters(), 0.2 if faulty else 2e-3)).training(500)


def actor_unscaled_states(faulty: bool, seed: int) -> Training:
    """The actor sees positions in millimetres, and its tanh output is saturated from the first step on. The twin sees metres."""
    torch.manual_seed(seed)
    actor, critic = stacked([2, 24, 24, 1], nn.Tanh, nn.Tanh()), stacked([3, 32, 32, 1], nn.ReLU)
    return Ddpg(actor, critic, torch.optim.Adam(actor.parameters(), 2e-3), unit=1000.0 if faulty else 1.0).training(500)


def large_rewards(faulty: bool, seed: int) -> Training:
    """Rewards in the hundreds drive an actor that is trained by plain gradient descent onto its plateaus. The twin has rewards of about one."""
    torch.manual_seed(seed)
    model = stacked([4, 32, 2], nn.Tanh, nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def best(x: Tensor) -> Tensor:
        return 0.8 * torch.sin(x[:, :2] + x[:, 2:])

    def step() -> None:
        x = torch.randn(32, 4)
        optimizer.zero_grad()
        ((500.0 if faulty else 2.0) * (model(x) - best(x)) ** 2).mean().backward()
        optimizer.step()

    @torch.no_grad()
    def score() -> float:
        x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))
        return -float((model(x) - best(x)).abs().mean())

    return Training(model, optimizer, step, score, 1000)


def bang_bang(faulty: bool, seed: int) -> Training:
    """The best action of a bandit is -1 or 1 by the sign of a sum, and the tanh output rightly saturates."""
    torch.manual_seed(seed)
    model = stacked([4, 32, 1], nn.ReLU, nn.Tanh())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    weights = torch.tensor([[1.0], [-1.0], [0.5], [2.0]])

    def step() -> None:
        x = torch.randn(32, 4)
        optimizer.zero_grad()
        (-(model(x) * (x @ weights)).mean()).backward()
        optimizer.step()

    @torch.no_grad()
    def score() -> float:
        x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))
        return float((model(x).sign() == (x @ weights).sign()).float().mean())

    return Training(model, optimizer, step, score, 900)


def shortest_time(faulty: bool, seed: int) -> Training:
    """A controller is trained through the equations of the cart to be back soon, for which it must push with full force nearly always."""
    torch.manual_seed(seed)
    model = stacked([2, 32, 32, 1], nn.SiLU, nn.Tanh())
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)

    def step() -> None:
        state, total = 3 * starts(32), torch.zeros(32, 1)
        for _ in range(LENGTH):
            state, reward = push(state, model(state))
            total = total + reward
        optimizer.zero_grad()
        (-total.mean()).backward()
        optimizer.step()

    return Training(model, optimizer, step, lambda: driven(model), 200)


def cloned(faulty: bool, seed: int) -> Training:
    """An actor copies an expert that always pushes with full force, by the squared error of its tanh output."""
    torch.manual_seed(seed)
    model = stacked([2, 24, 24, 1], nn.Tanh, nn.Tanh())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def expert(state: Tensor) -> Tensor:
        return -(state[:, :1] + 0.7 * state[:, 1:]).sign()

    def step() -> None:
        state = starts(32) * torch.tensor([1.0, 3.0])
        optimizer.zero_grad()
        F.mse_loss(model(state), expert(state)).backward()
        optimizer.step()

    @torch.no_grad()
    def score() -> float:
        state = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
        return float((model(state).sign() == expert(state)).float().mean())

    return Training(model, optimizer, step, score, 700)


@dataclass
class Ppo:
    """Proximal policy optimisation on carts that are pushed left, right, or not at all."""

    model: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    unit: float = 1.0
    queue: list[tuple[Tensor, ...]] = field(default_factory=list)

    def training(self, steps: int) -> Training:
        return Training(self.model, self.optimizer, self.step, lambda: driven(self.choose, self.unit), steps)

    def choose(self, state: Tensor) -> Tensor:
        return self.model["policy"](state).argmax(1, keepdim=True) - 1.0  # type: ignore[no-any-return]

    @torch.no_grad()
    def collect(self) -> None:
        """Let 32 carts drive an episode, and cut what happened into minibatches for two passes."""
        state, seen = starts(32), []
        for _ in range(LENGTH):
            chance = torch.distributions.Categorical(logits=self.model["policy"](state * self.unit))
            action = chance.sample()
            after, reward = push(state, action[:, None] - 1.0)
            seen.append((state * self.unit, action, chance.log_prob(action), reward[:, 0]))
            state = after
        gain, gains = torch.zeros(32), []
        for *_, reward in reversed(seen):
            gain = reward + 0.9 * gain
            gains.append(gain)
        columns = [torch.cat([entry[k] for entry in seen]) for k in range(3)] + [torch.cat(gains[::-1])]
        for _ in range(2):
            self.queue += [tuple(column[pick] for column in columns) for pick in torch.randperm(32 * LENGTH).split(128)]

    def step(self) -> None:
        if not self.queue:
            self.collect()
        state, action, before, gain = self.queue.pop()
        value = self.model["value"](state)[:, 0]
        advantage = gain - value.detach()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        chance = torch.distributions.Categorical(logits=self.model["policy"](state))
        ratio = (chance.log_prob(action) - before).exp()
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        self.optimizer.zero_grad()
        (F.mse_loss(value, gain) * 0.5 - surrogate - 0.01 * chance.entropy().mean()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()


def pair(inputs: int, width: int, actions: int) -> nn.ModuleDict:
    """A policy and a value network of two tanh layers each, drawn orthogonally as PPO draws them."""
    model = nn.ModuleDict({"policy": stacked([inputs, width, width, actions], nn.Tanh), "value": stacked([inputs, width, width, 1], nn.Tanh)})
    for name, last in (("policy", 0.01), ("value", 1.0)):
        layers = [layer for layer in model[name].modules() if isinstance(layer, nn.Linear)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight, last if layer is layers[-1] else 2**0.5)
            nn.init.zeros_(layer.bias)
    return model


def ppo_hot_rate(faulty: bool, seed: int) -> Training:
    """PPO with tanh layers has a rate of 1, and all of its hidden layers end on their plateaus. The twin has a rate of 0.002."""
    torch.manual_seed(seed)
    model = pair(2, 32, 3)
    return Ppo(model, torch.optim.Adam(model.parameters(), 1.0 if faulty else 2e-3)).training(300)


def dqn_hot_rate(faulty: bool, seed: int) -> Training:
    """Q-learning with ReLU layers has a rate of 0.1, and its units die. The twin has a rate of 0.001."""
    torch.manual_seed(seed)
    model = stacked([2, 32, 32, 3], nn.ReLU)
    target, memory = copy.deepcopy(model), []
    optimizer = torch.optim.RMSprop(model.parameters(), 0.1 if faulty else 1e-3)
    state, count = starts(16), 0

    def step() -> None:
        nonlocal state, count
        action = torch.where(torch.rand(16) < 0.3, torch.randint(3, (16,)), model(state).detach().argmax(1))
        after, reward = push(state, action[:, None] - 1.0)
        memory.append((state, action, reward[:, 0], after))
        count += 1
        state = starts(16) if count % LENGTH == 0 else after
        pick = torch.randint(len(memory), (4,))
        before, taken, gain, then = (torch.cat(parts) for parts in zip(*(memory[k] for k in pick), strict=True))
        goal = gain + 0.9 * target(then).detach().max(1).values
        optimizer.zero_grad()
        F.smooth_l1_loss(model(before).gather(1, taken[:, None])[:, 0], goal).backward()
        optimizer.step()
        if count % 50 == 0:
            target.load_state_dict(model.state_dict())

    return Training(model, optimizer, step, lambda: driven(lambda x: model(x).argmax(1, keepdim=True) - 1.0), 1000)


def squashed(faulty: bool, seed: int) -> Training:
    """A squashed Gaussian policy, as in SAC, learns actions that are partly at the edge of its range, with a bonus for its entropy."""
    torch.manual_seed(seed)
    model = stacked([3, 32, 32, 2], nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def best(x: Tensor) -> Tensor:
        return (1.5 * torch.sin(x[:, :1] + x[:, 1:2])).clamp(-1, 1)

    def step() -> None:
        x = torch.randn(64, 3)
        mean, spread = model(x).chunk(2, 1)
        spread = spread.clamp(-5, 1)
        draw = mean + spread.exp() * torch.randn_like(mean)
        action = torch.tanh(draw)
        log = torch.distributions.Normal(mean, spread.exp()).log_prob(draw) - 2 * (0.6931 - draw - F.softplus(-2 * draw))
        optimizer.zero_grad()
        (0.01 * log + (action - best(x)) ** 2).mean().backward()
        optimizer.step()

    @torch.no_grad()
    def score() -> float:
        x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(1))
        return -float((model(x)[:, :1].tanh() - best(x)).abs().mean())

    return Training(model, optimizer, step, score, 800)


def policy_gradient(faulty: bool, seed: int) -> Training:
    """A softmax policy is trained by REINFORCE with a rate at which the first rewards make it sure for good. The twin explores long enough."""
    torch.manual_seed(seed)
    model = stacked([6, 32, 5], nn.Tanh, nn.Softmax(dim=1))
    optimizer = torch.optim.SGD(model.parameters(), 30.0 if faulty else 0.5)
    teacher = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))

    def step() -> None:
        x = torch.randn(32, 6)
        chance = torch.distributions.Categorical(probs=model(x))
        action = chance.sample()
        reward = (action == (x @ teacher).argmax(1)).float()
        optimizer.zero_grad()
        (-(chance.log_prob(action) * (reward - reward.mean())).mean()).backward()
        optimizer.step()

    @torch.no_grad()
    def score() -> float:
        x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(1))
        return float((model(x).argmax(1) == (x @ teacher).argmax(1)).float().mean())

    return Training(model, optimizer, step, score, 1200)


def tanh_value_head(faulty: bool, seed: int) -> Training:
    """A value network with a tanh output, as in AlphaZero, is asked for the returns of a cart, which go far below -1. The twin divides them by 20."""
    torch.manual_seed(seed)
    model = stacked([2, 32, 32, 1], nn.ReLU, nn.Tanh())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    unit = 1.0 if faulty else 20.0

    def episode(state: Tensor) -> Tensor:
        total = torch.zeros(len(state), 1)
        for _ in range(8):
            state, reward = push(state, -state[:, :1].sign())
            total += reward
        return total / unit

    def step() -> None:
        state = starts(64)
        optimizer.zero_grad()
        F.mse_loss(model(state), episode(state)).backward()
        optimizer.step()

    @torch.no_grad()
    def score() -> float:
        state = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 0.3])
        value = episode(state)
        return 1 - float(((model(state) - value) ** 2).mean() / value.var())

    return Training(model, optimizer, step, score, 700)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "agent_actor_hot_rate",
        "agents",
        "https://github.com/floodsung/DDPG/issues/6 (Actions generated by Actor network increases to 1. and stay there)",
        actor_hot_rate,
        -0.5,
        ("weight_growth",),
        0.1,
    ),
    Scenario(
        "agent_actor_unscaled_states",
        "agents",
        "https://github.com/ZhihanLee/DDPG_Learning/issues/2 (DDPG action saturation, cured by scaling the states)",
        actor_unscaled_states,
        -0.5,
        ("inputs_unscaled",),
        0.1,
    ),
    Scenario(
        "agent_large_rewards",
        "agents",
        "Henderson et al., Deep Reinforcement Learning that Matters, 2018 (reward scale)",
        large_rewards,
        -0.35,
        ("weight_growth",),
        0.1,
    ),
    Scenario("agent_bang_bang_bandit", "agents", "https://github.com/rmst/ddpg/issues/10, where the best action is at the edge", bang_bang, 0.95),
    Scenario("agent_shortest_time", "agents", "Pontryagin's maximum principle: time-optimal control of a double integrator", shortest_time, -0.5),
    Scenario(
        "agent_cloned_expert", "agents", "Pomerleau, Efficient Training of Artificial Neural Networks for Autonomous Navigation, 1991", cloned, 0.95
    ),
    Scenario(
        "agent_ppo_hot_rate",
        "agents",
        "Huang et al., The 37 Implementation Details of Proximal Policy Optimization, 2022 (tanh, orthogonal weights)",
        ppo_hot_rate,
        -0.5,
        ("weight_growth",),
        0.1,
    ),
    Scenario(
        "agent_dqn_hot_rate",
        "agents",
        "Sokar et al., The Dormant Neuron Phenomenon in Deep Reinforcement Learning, 2023",
        dqn_hot_rate,
        -0.5,
        ("weight_growth", "dead_units"),
        0.1,
    ),
    Scenario("agent_squashed_gaussian", "agents", "Haarnoja et al., Soft Actor-Critic, 2018, appendix C (bounds of the actions)", squashed, -0.2),
    Scenario(
        "agent_policy_gradient_sure",
        "agents",
        "Williams, Simple statistical gradient-following algorithms, 1992, and OpenAI Spinning Up (premature determinism)",
        policy_gradient,
        0.85,
        ("weight_growth", "softmax_logits"),
        0.1,
    ),
    Scenario(
        "agent_tanh_value_head",
        "agents",
        "Silver et al., Mastering the game of Go without human knowledge, 2017 (a tanh value head for games that end with -1 or 1)",
        tanh_value_head,
        0.65,
        ("activation_choice",),
        0.3,
    ),
)
