"""Scenarios of faults.py: attention, embeddings, and routers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from faults_runs import Scenario, Training
from faults_scores import explained
from faults_tasks import Task, adding, characters, fit, likelihood, polarity, recall, repeated, rows_of_digits, vocabulary
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop


class SelfAttention(nn.Module):
    """Causal attention as small GPTs have it, by torch's own function or written out."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            mixed = logits.masked_fill(hidden, -math.inf).softmax(-1) @ v
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """A pre-norm block of a GPT."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, fused)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class GPT(nn.Module):
    """A small GPT. `last`: only its last output is given."""

    def __init__(self, symbols: int, outputs: int, length: int, *, width: int = 32, layers: int = 2, fused: bool = False, last: bool = False) -> None:
        super().__init__()
        self.symbols, self.places, self.last = nn.Embedding(symbols, width), nn.Parameter(0.02 * torch.randn(length, width)), last
        nn.init.normal_(self.symbols.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, 4, fused) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.blocks(self.symbols(x) + self.places[: x.shape[1]]))
        result: Tensor = self.head(h[:, -1] if self.last else h)
        return result


class Pooled(nn.Module):
    """A classifier of word bags: a learned query attends to the words, and their mean goes to a small network."""

    def __init__(self, words: int, width: int, outputs: int, *, std: float = 0.1, scale: float | None = None, cosine: bool = False) -> None:
        super().__init__()
        self.words, self.query = nn.Embedding(words, width), nn.Parameter(torch.randn(width) * (1 if cosine else 0.1))
        nn.init.normal_(self.words.weight, std=std)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
        self.scale, self.cosine = width**-0.5 if scale is None else scale, cosine

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        logits = F.cosine_similarity(self.key(h), self.query, dim=-1) if self.cosine else self.key(h) @ self.query
        weights = F.softmax(logits * self.scale, dim=-1)
        result: Tensor = self.head((weights[:, None] @ self.value(h))[:, 0])
        return result


class Lookup(nn.Module):
    """A memory of pairs, where a key is looked up by one head of attention."""

    def __init__(self, keys: int, values: int, width: int, *, std: float = 1.0, scale: float | None = None, sharp: bool = False) -> None:
        super().__init__()
        self.keys, self.symbols, self.values = keys, nn.Embedding(keys, width), nn.Embedding(values, width)
        nn.init.normal_(self.symbols.weight, std=std)
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        for layer in (self.q, self.k):
            nn.init.normal_(layer.weight, std=width**-0.5)
        self.head = nn.Linear(width, values)
        self.scale = width**-0.5 if scale is None else scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if sharp else None

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(self.symbols(x[:, -1:])), self.k(self.symbols(x[:, :-1:2]))
        if self.log_scale is None:
            logits = torch.einsum("bqd,bkd->bqk", q, k) * self.scale
        else:
            logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.log_scale.exp()
        result: Tensor = self.head((torch.softmax(logits, -1) @ self.values(x[:, 1::2] - self.keys))[:, 0])
        return result


class Additive(nn.Module):
    """Additive attention over a sequence: a tanh network scores each element, and the weighted mean of the elements is told."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 1))
        self.head = nn.Linear(inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.energy(x).softmax(1)
        result: Tensor = self.head((weights * x).sum(1))
        return result


class Encoder(nn.Module):
    """torch's encoder over the rows of digits, or over symbols, with the mean of its outputs classified."""

    def __init__(self, inputs: nn.Module, width: int, outputs: int, *, layers: int, norm_first: bool, heads: int = 2) -> None:
        super().__init__()
        self.inputs, self.places = inputs, nn.Parameter(0.1 * torch.randn(32, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inputs(x)
        result: Tensor = self.head(self.encoder(h + self.places[: h.shape[1]]).mean(1))
        return result


class Experts(nn.Module):
    """A mixture of linear experts behind a softmax router."""

    def __init__(self, inputs: int, experts: int, spread: float) -> None:
        super().__init__()
        self.router = nn.Linear(inputs, experts)
        nn.init.normal_(self.router.weight, std=spread)
        self.experts = nn.Linear(inputs, experts)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (self.router(x).softmax(-1) * self.experts(x)).sum(-1, keepdim=True)
        return result


class Namer(nn.Module):
    """Bengio's character model: the embeddings of three characters, a tanh layer and the next character."""

    def __init__(self, gain: float = 5 / 3, last: float = 0.1, width: int = 100) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocabulary(), 10))
        self.w1, self.b1 = nn.Parameter(torch.randn(30, width) * gain / 30**0.5), nn.Parameter(0.01 * torch.randn(width))
        self.w2, self.b2 = nn.Parameter(torch.randn(width, vocabulary()) * last), nn.Parameter(torch.zeros(vocabulary()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.table[x].flatten(1) @ self.w1 + self.b1) @ self.w2 + self.b2


NEXT = Task(characters(3, last=True).batch, score=likelihood)


def pieces() -> Task:
    """A number that depends linearly on 8 inputs, by one of four rules that the first two inputs' signs choose."""
    rules = torch.randn(4, 8)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 8)
        x[:, :2] += x[:, :2].sign()
        rule = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        return x, (rules[rule] * x).sum(1, keepdim=True)

    return Task(batch, F.mse_loss, explained)


def largest() -> Task:
    """The class of the element whose first feature is the largest, in a set of 10. Inputs: [size, 10, 5]."""

    def batch(size: int) -> tuple[Tensor, Tensor]:
        numbers, kinds = torch.rand(size, 10, 1), torch.randint(4, (size, 10))
        winner = numbers[..., 0].argmax(1, keepdim=True)
        return torch.cat((numbers, F.one_hot(kinds, 4)), -1), kinds.gather(1, winner)[:, 0]

    return Task(batch)


def gpt_rate(faulty: bool, seed: int) -> Training:
    """A small GPT is trained with 30 times the rate of AdamW that serves it."""
    torch.manual_seed(seed)
    model = GPT(vocabulary(), vocabulary(), 16)
    return fit(model, characters(16), AdamW(model.parameters(), 0.1 if faulty else 3e-3), 250, size=16)


def gpt_rate_jumps(faulty: bool, seed: int) -> Training:
    """The rate of a small GPT rises to its 60-fold at step 150, as when a schedule counts epochs as steps."""
    torch.manual_seed(seed)
    model = GPT(vocabulary(), vocabulary(), 16, fused=True)
    optimizer = Adam(model.parameters(), 2e-3)
    return fit(model, characters(16), optimizer, 350, size=16, rate=lambda step: 60.0 if faulty and step >= 150 else 1.0)


def post_norm_no_warmup(faulty: bool, seed: int) -> Training:
    """A post-norm encoder of three layers gets ten times its rate, and that at once instead of after 60 steps."""
    torch.manual_seed(seed)
    model = Encoder(nn.Embedding(50, 32), 32, 2, layers=3, norm_first=False)
    optimizer = Adam(model.parameters(), 1e-2 if faulty else 1e-3, betas=(0.9, 0.98))
    return fit(model, polarity(), optimizer, 300, size=24, rate=None if faulty else lambda step: min(1.0, (step + 1) / 60))


def pool_rate(faulty: bool, seed: int) -> Training:
    """Attention that pools words is trained by RMSprop at 100 times its rate; it ends up looking at single words."""
    torch.manual_seed(seed)
    model = Pooled(50, 24, 2)
    return fit(model, polarity(), RMSprop(model.parameters(), 0.2 if faulty else 2e-3), 400)


def pool_embeddings_large(faulty: bool, seed: int) -> Training:
    """Embeddings from N(0, 1) are multiplied by 8 as if they were small; the words' logits are so far apart that each text is one word."""
    torch.manual_seed(seed)
    model = Pooled(50, 64, 2, std=8.0 if faulty else 0.1)
    with torch.no_grad():
        model.query.normal_()
    return fit(model, polarity(), Adam(model.parameters(), 2e-3), 400)


def pool_cold(faulty: bool, seed: int) -> Training:
    """Cosines are divided by a temperature of 0.002 where 1 is right, so that one word gets all of the weight."""
    torch.manual_seed(seed)
    model = Pooled(50, 24, 2, std=1.0, scale=500.0 if faulty else 1.0, cosine=True)
    return fit(model, polarity(), Adam(model.parameters(), 3e-3), 400)


def lookup_unscaled(faulty: bool, seed: int) -> Training:
    """The dot products of 256 features are not divided by 16; the softmax is one-hot, and wrong, from the start."""
    torch.manual_seed(seed)
    model = Lookup(16, 8, 256, scale=1.0 if faulty else None)
    return fit(model, recall(8), Adam(model.parameters(), 1e-3), 300)


def lookup_keys_x8(faulty: bool, seed: int) -> Training:
    """The weights of queries and keys are drawn 8 times too large, which makes the logits 64 times too large."""
    torch.manual_seed(seed)
    model = Lookup(24, 8, 32)
    with torch.no_grad():
        for layer in (model.q, model.k):
            layer.weight.mul_(8 if faulty else 1)
    return fit(model, recall(8, keys=24), Adam(model.parameters(), 2e-3), 400)


def encoder_projections_large(faulty: bool, seed: int) -> Training:
    """The projections of torch's attention are drawn from N(0, 1) by a loop over all parameters that means well."""
    torch.manual_seed(seed)
    model = Encoder(nn.Embedding(50, 32), 32, 2, layers=2, norm_first=True)
    if faulty:
        for parameter in model.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter)
    return fit(model, polarity(), Adam(model.parameters(), 1e-3), 400)


def encoder_digits_255(faulty: bool, seed: int) -> Training:
    """A post-norm encoder gets rows of pixels in 0..255, and the first attention looks at single rows."""
    torch.manual_seed(seed)
    model = Encoder(nn.Linear(8, 32), 32, 10, layers=1, norm_first=False)
    return fit(model, rows_of_digits(255 / 16 if faulty else 1 / 16), SGD(model.parameters(), 0.05, momentum=0.9), 400)


def experts_router_large(faulty: bool, seed: int) -> Training:
    """The router of a mixture of experts is drawn 30 times too large: it is sure of its choices before it knows anything."""
    torch.manual_seed(seed)
    model = Experts(8, 4, 30.0 if faulty else 0.1)
    return fit(model, pieces(), Adam(model.parameters(), 1e-2), 800)


def namer_hockey_stick(faulty: bool, seed: int) -> Training:
    """The last layer of a character model is drawn by randn and multiplied by 3, so that the loss starts far above that of guessing."""
    torch.manual_seed(seed)
    model = Namer(last=3.0 if faulty else 0.1)
    return fit(model, NEXT, SGD(model.parameters(), 0.1), 1200)


def namer_gain(faulty: bool, seed: int) -> Training:
    """The first layer of a character model is drawn 30 times too large, and its tanh units stand at -1 and 1."""
    torch.manual_seed(seed)
    model = Namer(gain=50.0 if faulty else 5 / 3)
    return fit(model, NEXT, SGD(model.parameters(), 0.1), 1200)


def namer_healthy(faulty: bool, seed: int) -> Training:
    """A character model with good initialization learns at a rate of 0.1."""
    torch.manual_seed(seed)
    model = Namer()
    return fit(model, NEXT, SGD(model.parameters(), 0.1), 1200)


def namer_fast_healthy(faulty: bool, seed: int) -> Training:
    """Ten times the usual rate serves the character model as well."""
    torch.manual_seed(seed)
    model = Namer()
    return fit(model, NEXT, SGD(model.parameters(), 1.0), 1200)


def gpt_healthy(faulty: bool, seed: int) -> Training:
    """A small GPT learns characters; some of its heads look at the character before, and some rest on the first one."""
    torch.manual_seed(seed)
    model = GPT(vocabulary(), vocabulary(), 24, layers=3, width=24)
    return fit(model, characters(24), AdamW(model.parameters(), 3e-3), 300, size=16, clip=1.0)


def repeat_healthy(faulty: bool, seed: int) -> Training:
    """A GPT learns to repeat a random sequence; its heads become one-hot, each on the symbol that is due."""
    torch.manual_seed(seed)
    model = GPT(16, 16, 16, fused=True)
    return fit(model, repeated(8), Adam(model.parameters(), 3e-3), 400)


def lookup_healthy(faulty: bool, seed: int) -> Training:
    """One head looks up a key among eight: at convergence its weights are one-hot, and rightly so."""
    torch.manual_seed(seed)
    model = Lookup(16, 8, 32)
    return fit(model, recall(8), Adam(model.parameters(), 1e-2), 700)


def lookup_sharp_healthy(faulty: bool, seed: int) -> Training:
    """Cosines with a learned temperature that starts at 0.07 look up a key; the temperature falls, and the head is one-hot."""
    torch.manual_seed(seed)
    model = Lookup(16, 8, 24, sharp=True)
    return fit(model, recall(6), Adam(model.parameters(), 1e-2), 600)


def largest_healthy(faulty: bool, seed: int) -> Training:
    """Attention picks the largest of ten elements, for which its logits must be large."""
    torch.manual_seed(seed)

    class Picker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.head = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1)), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head((F.softmax(self.score(x), dim=1) * x).sum(1))
            return result

    model = Picker()
    return fit(model, largest(), Adam(model.parameters(), 2e-2), 900)


def experts_healthy(faulty: bool, seed: int) -> Training:
    """A router learns which of its experts has the rule for which inputs, and becomes sure of it."""
    torch.manual_seed(seed)
    model = Experts(8, 4, 0.1)
    return fit(model, pieces(), Adam(model.parameters(), 2e-2), 1000)


def encoder_digits_healthy(faulty: bool, seed: int) -> Training:
    """A pre-norm encoder reads the rows of digits and becomes sure of nearly all."""
    torch.manual_seed(seed)
    model = Encoder(nn.Linear(8, 32), 32, 10, layers=2, norm_first=True, heads=4)
    return fit(model, rows_of_digits(), AdamW(model.parameters(), 2e-3), 400)


def additive_healthy(faulty: bool, seed: int) -> Training:
    """Additive attention finds the two marked numbers: its tanh units tell marked from unmarked by standing at -1 or 1."""
    torch.manual_seed(seed)
    model = Additive(2, 16)
    return fit(model, adding(12), Adam(model.parameters(), 2e-2), 900)


VASWANI = "Vaswani et al.: Attention Is All You Need, 2017, section 3.2.1"
ENTROPY = "Zhai et al.: Stabilizing Transformer Training by Preventing Attention Entropy Collapse, 2023"
WORTSMAN = "Wortsman et al.: Small-scale proxies for large-scale Transformer training instabilities, 2023"
MAKEMORE = "https://www.youtube.com/watch?v=P6sfmUTpUmc (Karpathy: Building makemore Part 3)"

BOTH = ("weight_growth", "softmax_logits")
LARGE = ("init_too_large", "softmax_logits")

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("gpt_rate_30", "rate", WORTSMAN, gpt_rate, 0.4, BOTH, 0.1),
    Scenario("gpt_rate_jumps", "rate", "https://github.com/YunYang1994/TensorFlow2.0-Examples/issues/8", gpt_rate_jumps, 0.4, BOTH, 0.1),
    Scenario(
        "post_norm_no_warmup",
        "rate",
        "Xiong et al.: On Layer Normalization in the Transformer Architecture, 2020",
        post_norm_no_warmup,
        0.8,
        BOTH,
        0.1,
    ),
    Scenario("pooling_rate_100", "rate", ENTROPY, pool_rate, 0.93, BOTH, 0.05),
    Scenario(
        "pooling_embeddings_x8",
        "initialisation",
        "https://blog.csdn.net/qq_41568188/article/details/107282319",
        pool_embeddings_large,
        0.93,
        LARGE,
        0.1,
    ),
    Scenario(
        "pooling_temperature_0002",
        "attention",
        "Hong, Lee: Variance Sensitivity Induces Attention Entropy Collapse, 2025",
        pool_cold,
        0.93,
        ("softmax_logits",),
        0.1,
    ),
    Scenario("lookup_without_sqrt_d", "attention", VASWANI, lookup_unscaled, 0.9, LARGE, 0.1),
    Scenario(
        "lookup_keys_x8",
        "initialisation",
        "https://bnaskrecki.faculty.wmi.amu.edu.pl/nnets/applets/scaled-attention-lab.html",
        lookup_keys_x8,
        0.9,
        LARGE,
        0.1,
    ),
    Scenario(
        "encoder_drawn_from_n01",
        "initialisation",
        "https://www.codegenes.net/blog/loss-not-decreasing-lstm-pytorch",
        encoder_projections_large,
        0.9,
        LARGE,
        0.1,
    ),
    Scenario(
        "encoder_digits_255", "inputs", "Dosovitskiy et al.: An Image is Worth 16x16 Words, 2021", encoder_digits_255, 0.8, ("inputs_unscaled",), 0.05
    ),
    Scenario(
        "router_x300",
        "initialisation",
        "Zoph et al.: ST-MoE: Designing Stable and Transferable Sparse Expert Models, 2022",
        experts_router_large,
        0.85,
        LARGE,
        0.1,
    ),
    Scenario("makemore_hockey_stick", "initialisation", MAKEMORE, namer_hockey_stick, -2.2, ("init_too_large",), 0.05),
    Scenario("makemore_tanh_gain", "initialisation", MAKEMORE, namer_gain, -2.2, ("init_too_large",), 0.03),
    Scenario("makemore_healthy", "healthy", MAKEMORE, namer_healthy, -2.3),
    Scenario("makemore_fast_healthy", "healthy", MAKEMORE, namer_fast_healthy, -2.3),
    Scenario("gpt_healthy", "healthy", "Xiao et al.: Efficient Streaming Language Models with Attention Sinks, 2023", gpt_healthy, 0.4),
    Scenario("gpt_repeat_healthy", "healthy", "Olsson et al.: In-context Learning and Induction Heads, 2022", repeat_healthy, 0.9),
    Scenario("lookup_healthy", "healthy", "Graves, Wayne, Danihelka: Neural Turing Machines, 2014, section 3.3.1", lookup_healthy, 0.97),
    Scenario("lookup_sharp_healthy", "healthy", "Radford et al.: Learning Transferable Visual Models, 2021, section 2.5", lookup_sharp_healthy, 0.97),
    Scenario("largest_of_set_healthy", "healthy", "Vinyals, Fortunato, Jaitly: Pointer Networks, 2015", largest_healthy, 0.85),
    Scenario("experts_healthy", "healthy", "Jacobs et al.: Adaptive Mixtures of Local Experts, 1991", experts_healthy, 0.85),
    Scenario("encoder_digits_healthy", "healthy", "Dosovitskiy et al.: An Image is Worth 16x16 Words, 2021", encoder_digits_healthy, 0.9),
    Scenario(
        "additive_healthy",
        "healthy",
        "Luong, Pham, Manning: Effective Approaches to Attention-based Neural Machine Translation, 2015",
        additive_healthy,
        0.85,
    ),
)
