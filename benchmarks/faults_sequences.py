"""Scenarios of faults.py: recurrent networks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from faults_runs import Scenario, Training
from faults_tasks import adding, automaton, characters, fit, latch, polarity, rows_of_digits, vocabulary, waves
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop


class Reader(nn.Module):
    """A recurrent network, an optional embedding before it and a linear layer after it, on its last output or on all."""

    def __init__(self, rnn: nn.RNNBase, outputs: int, *, symbols: int | None = None, every: bool = False) -> None:
        super().__init__()
        self.embedding = None if symbols is None else nn.Embedding(symbols, rnn.input_size)
        self.rnn, self.every = rnn, every
        self.head = nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        out, _ = self.rnn(x)
        result: Tensor = self.head(out if self.every else out[:, -1])
        return result


class ChunkedLSTM(nn.Module):
    """An LSTM as tutorials write it: one linear layer makes the four gates, which are cut apart."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Linear(inputs + hidden, 4 * hidden)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.hidden)
        for x_t in x.unbind(1):
            i, f, g, o = self.gates(torch.cat((x_t, h), 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        out: Tensor = self.head(h)
        return out


class HandGRU(nn.Module):
    """A GRU from parameters of its own, drawn from a normal distribution with the given standard deviation."""

    def __init__(self, inputs: int, hidden: int, outputs: int, std: float) -> None:
        super().__init__()
        self.update, self.reset, self.new = (nn.Parameter(std * torch.randn(inputs + hidden, hidden)) for _ in range(3))
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.update.shape[1])
        for x_t in x.unbind(1):
            both = torch.cat((x_t, h), 1)
            z, r = (both @ self.update).sigmoid(), (both @ self.reset).sigmoid()
            h = (1 - z) * h + z * (torch.cat((x_t, r * h), 1) @ self.new).tanh()
        out: Tensor = self.head(h)
        return out


class CellLoop(nn.Module):
    """A cell of torch that a loop calls for each time step."""

    def __init__(self, cell: nn.LSTMCell | nn.GRUCell, outputs: int) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(cell.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
        out: Tensor = self.head(state[0] if isinstance(state, tuple) else state)
        return out


def forget_bias(rnn: nn.LSTM, bias: float) -> None:
    """Give the forget gates of an LSTM this bias. Each gate has two bias vectors; the second one becomes 0."""
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            if "bias" in name:
                parameter[rnn.hidden_size : 2 * rnn.hidden_size] = bias if "bias_ih" in name else 0


def recurrent(rnn: nn.RNNBase) -> Iterable[nn.Parameter]:
    """The recurrent weights of a network."""
    return (parameter for name, parameter in rnn.named_parameters() if "weight_hh" in name)


def digits_unscaled(faulty: bool, seed: int) -> Training:
    """An LSTM reads the rows of a digit, whose pixels are left in 0..255; nearly all gates stand on a plateau from the first step."""
    torch.manual_seed(seed)
    model = Reader(nn.LSTM(8, 32, batch_first=True), 10)
    return fit(model, rows_of_digits(scale=255 / 16 if faulty else 1 / 16), Adam(model.parameters(), 3e-3), 500)


def prices_unscaled(faulty: bool, seed: int) -> Training:
    """An LSTM gets a series around 3000 with swings of 300, as prices come, and its gates are on a plateau whatever the series does."""
    torch.manual_seed(seed)
    model = Reader(nn.LSTM(1, 24, batch_first=True), 1)
    task = waves(20, scale=300, mean=3000) if faulty else waves(20)
    return fit(model, task, Adam(model.parameters(), 5e-3), 500, size=16)


def sensors_unscaled(faulty: bool, seed: int) -> Training:
    """Three sensors in units of their own, with swings of 200, feed a bidirectional GRU of two layers."""
    torch.manual_seed(seed)
    model = Reader(nn.GRU(3, 12, num_layers=2, bidirectional=True, batch_first=True), 3)
    return fit(model, waves(12, scale=200 if faulty else 1, channels=3), Adam(model.parameters(), 5e-3), 250, size=16)


def clock_uncentred(faulty: bool, seed: int) -> Training:
    """A series swings by 1 around 60 and is not centred, so that each gate of a GRU cell gets a constant far on its plateau."""
    torch.manual_seed(seed)
    model = CellLoop(nn.GRUCell(1, 20), 1)
    return fit(model, waves(16, mean=60 if faulty else 0), Adam(model.parameters(), 3e-3), 500)


def gru_rate(faulty: bool, seed: int) -> Training:
    """A GRU learns the adding problem with 50 times the rate of Adam; its gates are driven to their plateaus within a few steps."""
    torch.manual_seed(seed)
    model = Reader(nn.GRU(2, 32, batch_first=True), 1)
    return fit(model, adding(20), Adam(model.parameters(), 0.5 if faulty else 0.01), 600)


def characters_rate(faulty: bool, seed: int) -> Training:
    """A character model with an LSTM is trained by RMSprop at 30 times the rate that serves it."""
    torch.manual_seed(seed)
    model = Reader(nn.LSTM(16, 64, batch_first=True), vocabulary(), symbols=vocabulary(), every=True)
    return fit(model, characters(24), RMSprop(model.parameters(), 0.15 if faulty else 0.005), 400, size=16)


def cell_momentum(faulty: bool, seed: int) -> Training:
    """An LSTM cell in a loop is trained by SGD whose momentum of 0.99 makes its rate 100 times as large; without it, it learns."""
    torch.manual_seed(seed)
    model = CellLoop(nn.LSTMCell(8, 32), 10)
    return fit(model, rows_of_digits(1 / 4), SGD(model.parameters(), 0.3, momentum=0.995 if faulty else 0.5), 600)


def elman_drawn_large(faulty: bool, seed: int) -> Training:
    """The recurrent weights of a tanh network are drawn from N(0, 1), eight times too large for 64 units."""
    torch.manual_seed(seed)
    rnn = nn.RNN(4, 64, batch_first=True)
    for weight in recurrent(rnn):
        nn.init.normal_(weight) if faulty else nn.init.orthogonal_(weight)
    model = Reader(rnn, 4)
    return fit(model, latch(20), Adam(model.parameters(), 1e-3), 600)


def elman_explodes(faulty: bool, seed: int) -> Training:
    """A tanh network over 30 steps is trained by SGD without clipping; single steps of its exploding gradient throw its weights far out."""
    torch.manual_seed(seed)
    model = Reader(nn.RNN(1, 32, batch_first=True), 1)
    return fit(model, waves(30), SGD(model.parameters(), 1.0 if faulty else 0.02, momentum=0.9), 500, clip=None if faulty else 1.0)


def hand_gru_drawn_large(faulty: bool, seed: int) -> Training:
    """The parameters of a GRU written by hand are drawn by randn and not scaled."""
    torch.manual_seed(seed)
    model = HandGRU(8, 64, 10, std=1.0 if faulty else 72**-0.5)
    return fit(model, rows_of_digits(1 / 8), Adam(model.parameters(), 1e-3), 500)


def forget_bias_negative(faulty: bool, seed: int) -> Training:
    """The forget gates of an LSTM get a bias of -5 instead of 2: what it should remember is gone after one step."""
    torch.manual_seed(seed)
    rnn = nn.LSTM(4, 32, batch_first=True)
    forget_bias(rnn, -5.0 if faulty else 2.0)
    model = Reader(rnn, 4)
    return fit(model, latch(10, noise=0.1), Adam(model.parameters(), 1e-2), 400)


def chunked_gates_closed(faulty: bool, seed: int) -> Training:
    """An LSTM written by hand fills the bias of all gates with 6 where only the forget gates should get 1; the output gates stay open."""
    torch.manual_seed(seed)
    model = ChunkedLSTM(2, 24, 1)
    with torch.no_grad():
        model.gates.bias.fill_(-6.0) if faulty else model.gates.bias[24:48].fill_(1.0)
    return fit(model, adding(16), Adam(model.parameters(), 5e-3), 600)


def decay_shrinks(faulty: bool, seed: int) -> Training:
    """An LSTM gets a decoupled weight decay of 10 per unit of rate; its weights shrink faster than it learns."""
    torch.manual_seed(seed)
    model = Reader(nn.LSTM(2, 32, batch_first=True), 1)
    return fit(model, adding(16), AdamW(model.parameters(), 5e-3, weight_decay=10 if faulty else 0.01), 600)


class Closed(nn.Module):
    """A network behind an output function."""

    def __init__(self, body: nn.Module, function: nn.Module) -> None:
        super().__init__()
        self.body, self.function = body, function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(self.body(x))
        return out


def relu_output(faulty: bool, seed: int) -> Training:
    """The output of an LSTM for a series with both signs goes through a ReLU, which cannot give the negative half."""
    torch.manual_seed(seed)
    body = Reader(nn.LSTM(1, 24, batch_first=True), 1)
    model = Closed(body, nn.ReLU() if faulty else nn.Identity())
    return fit(model, waves(12), Adam(model.parameters(), 5e-3), 500)


def characters_healthy(faulty: bool, seed: int) -> Training:
    """A character model with an LSTM learns; many of its gates are rightly open or closed in the end."""
    torch.manual_seed(seed)
    model = Reader(nn.LSTM(24, 96, batch_first=True), vocabulary(), symbols=vocabulary(), every=True)
    return fit(model, characters(32), Adam(model.parameters(), 1e-2), 500, size=16, clip=5.0)


def latch_healthy(faulty: bool, seed: int) -> Training:
    """A GRU stores one of four symbols over 8 steps of noise: its update gates shut, and its state stands in the tails of tanh."""
    torch.manual_seed(seed)
    model = Reader(nn.GRU(4, 24, batch_first=True), 4)
    return fit(model, latch(9, noise=0.2), Adam(model.parameters(), 1e-2), 500)


def chrono_healthy(faulty: bool, seed: int) -> Training:
    """Forget gates with a bias of 5 are saturated from the start, so that an LSTM remembers the adding problem's numbers."""
    torch.manual_seed(seed)
    rnn = nn.LSTM(2, 32, batch_first=True)
    forget_bias(rnn, 5.0)
    model = Reader(rnn, 1)
    return fit(model, adding(20), Adam(model.parameters(), 1e-2), 600)


def automaton_healthy(faulty: bool, seed: int) -> Training:
    """A tanh network learns a machine with three states, which it holds as corners of its cube: nearly all units are in their tails."""
    torch.manual_seed(seed)
    model = Reader(nn.RNN(2, 24, batch_first=True), 3, every=True)
    return fit(model, automaton(12), Adam(model.parameters(), 1e-2), 500, clip=1.0)


def polarity_healthy(faulty: bool, seed: int) -> Training:
    """An LSTM counts good and bad words; it becomes sure of each text."""
    torch.manual_seed(seed)
    model = Reader(nn.LSTM(8, 16, batch_first=True), 2, symbols=50)
    return fit(model, polarity(), Adam(model.parameters(), 1e-2), 700)


def identity_relu_healthy(faulty: bool, seed: int) -> Training:
    """A ReLU network whose recurrent weights start as the identity reads digits by rows; half of its units are at 0 at any time."""
    torch.manual_seed(seed)
    rnn = nn.RNN(8, 48, nonlinearity="relu", batch_first=True)
    for weight in recurrent(rnn):
        nn.init.eye_(weight)
    model = Reader(rnn, 10)
    return fit(model, rows_of_digits(), Adam(model.parameters(), 3e-3), 600, clip=1.0)


KARPATHY = "Karpathy, Johnson, Fei-Fei: Visualizing and Understanding Recurrent Networks, 2015, arxiv.org/abs/1506.02078"
PASCANU = "Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, 2013, arxiv.org/abs/1211.5063"
JOZEFOWICZ = "Jozefowicz, Zaremba, Sutskever: An Empirical Exploration of Recurrent Network Architectures, 2015"
STRAIGHT = "https://discuss.pytorch.org/t/time-series-the-prediction-result-of-lstm-is-approximately-straight-line/98896"

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "lstm_digits_255", "inputs", "https://taourl.com/read-1933873.html", digits_unscaled, 0.9, ("inputs_unscaled", "inputs_uncentred"), 0.05
    ),
    Scenario("lstm_prices_in_thousands", "inputs", STRAIGHT, prices_unscaled, 0.9, ("inputs_uncentred", "inputs_unscaled"), 0.3),
    Scenario(
        "gru_sensors_x200", "inputs", "https://datascience.stackexchange.com/questions/54551", sensors_unscaled, 0.85, ("inputs_unscaled",), 0.1
    ),
    Scenario("grucell_series_around_60", "inputs", STRAIGHT, clock_uncentred, 0.8, ("inputs_uncentred",), 0.2),
    Scenario("gru_adding_rate_50", "rate", "https://stats.stackexchange.com/posts/487195/revisions", gru_rate, 0.8, ("weight_growth",), 0.3),
    Scenario(
        "lstm_characters_rmsprop_rate_30",
        "rate",
        "https://github.com/karpathy/char-rnn (options of train.lua)",
        characters_rate,
        0.4,
        ("weight_growth",),
        0.1,
    ),
    Scenario(
        "lstmcell_momentum_0995",
        "rate",
        "https://www.codegenes.net/blog/loss-not-decreasing-lstm-pytorch",
        cell_momentum,
        0.85,
        ("weight_growth",),
        0.1,
    ),
    Scenario("elman_drawn_from_n01", "initialisation", PASCANU, elman_drawn_large, 0.9, ("init_too_large",), 0.1),
    Scenario("elman_no_clipping", "rate", PASCANU, elman_explodes, 0.85, ("weight_growth",), 0.3),
    Scenario(
        "hand_gru_randn",
        "initialisation",
        "https://github.com/CarterMcClellan/Machine-Learning-Basics",
        hand_gru_drawn_large,
        0.9,
        ("init_too_large",),
        0.05,
    ),
    Scenario("lstm_forget_bias_minus_5", "initialisation", JOZEFOWICZ, forget_bias_negative, 0.9, ("init_too_large",), 0.2),
    Scenario(
        "chunked_lstm_bias_minus_6",
        "initialisation",
        "https://github.com/craffel/nntools/issues/19",
        chunked_gates_closed,
        0.8,
        ("init_too_large",),
        0.2,
    ),
    Scenario(
        "lstm_decay_10", "weight decay", "Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2019", decay_shrinks, 0.8, ("weight_decay",), 0.2
    ),
    Scenario("lstm_relu_output", "outputs", "https://stackguides.com/questions/51432661", relu_output, 0.9, ("activation_choice", "dead_units"), 0.2),
    Scenario("lstm_characters_healthy", "healthy", KARPATHY, characters_healthy, 0.45),
    Scenario("gru_latch_healthy", "healthy", "Hochreiter, Schmidhuber: Long Short-Term Memory, 1997", latch_healthy, 0.95),
    Scenario("lstm_forget_bias_5_healthy", "healthy", "Tallec, Ollivier: Can recurrent neural networks warp time?, 2018", chrono_healthy, 0.8),
    Scenario(
        "elman_automaton_healthy",
        "healthy",
        "Weiss, Goldberg, Yahav: Extracting Automata from Recurrent Neural Networks, 2018",
        automaton_healthy,
        0.97,
    ),
    Scenario(
        "lstm_polarity_healthy",
        "healthy",
        "Maheswaranathan et al.: Reverse engineering recurrent networks for sentiment classification, 2019",
        polarity_healthy,
        0.95,
    ),
    Scenario(
        "identity_relu_digits_healthy",
        "healthy",
        "Le, Jaitly, Hinton: A Simple Way to Initialize Recurrent Networks, 2015, ar5iv.labs.arxiv.org/html/1504.00941",
        identity_relu_healthy,
        0.8,
    ),
)
