"""Published networks that hear. Their inputs are made here: tones with harmonics, and voices made of pulses and formants."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from published_networks import Network, Task, adamw, shell
from torch import Tensor, nn

RATE = 16000


def tone(frequency: float, seconds: float, harmonics: int = 1, rate: int = RATE) -> Tensor:
    """A tone whose k-th harmonic has the amplitude 1/k."""
    time = torch.arange(int(seconds * rate)) / rate
    parts = [torch.sin(2 * math.pi * k * frequency * time + k) / k for k in range(1, harmonics + 1) if k * frequency < rate / 2]
    return torch.stack(parts).sum(0) / 2


def voice(pitch: float, formants: tuple[float, ...], seconds: float, generator: torch.Generator | None = None) -> Tensor:
    """A vowel: the harmonics of a pitch that sways, each as loud as the formants near it let it be, in syllables of a quarter of a second."""
    time = torch.arange(int(seconds * RATE)) / RATE
    phase = 2 * math.pi * torch.cumsum(pitch * (1 + 0.03 * torch.sin(2 * math.pi * 5 * time)), 0) / RATE
    sound = torch.zeros_like(time)
    for k in range(1, int(RATE / 2 / pitch)):
        gain = sum(math.exp(-(((k * pitch - formant) / 120) ** 2) / 2) for formant in formants) + 0.02
        sound += gain / k**0.5 * torch.sin(k * phase)
    sound *= torch.sin(2 * math.pi * 2 * time).clamp(min=0) + 0.2
    sound += 0.003 * torch.randn(sound.shape, generator=generator)
    return 0.3 * sound / sound.abs().max()


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018) as in torchcrepe 0.0.24: six convolutions over 1024 samples of sound, and the probability of each of 360 pitches."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.features = 4 * widths[-1]
        for at, (before, after) in enumerate(zip((1, *widths), widths, strict=False), 1):
            kernel, stride = ((512, 1), (4, 1)) if at == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{at}", nn.Conv2d(before, after, kernel, stride))
            setattr(self, f"conv{at}_BN", nn.BatchNorm2d(after, eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(self.features, 360)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for at in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if at == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{at}_BN")(F.relu(getattr(self, f"conv{at}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, self.features)))


def _frames(sound: Tensor) -> Tensor:
    """Frames of 1024 samples, 10 ms apart, each centred and scaled as CREPE wants it."""
    frames = sound.unfold(0, 1024, 160)
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True).clamp(min=1e-10)


def _bin(frequency: float) -> float:
    """The pitch bin of CREPE, 20 cents each, in which a frequency lies."""
    return (1200 * math.log2(frequency / 10) - 1997.3794084376191) / 20


def crepe(folder: Path) -> Task:
    model = Crepe((128, 16, 16, 16, 32, 64))
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    model.eval()
    with torch.no_grad():
        heard = {
            hertz: float((model(_frames(tone(hertz, 0.5)))[10:-10].mean(0).argmax() - _bin(hertz)).abs() * 20) for hertz in (220.0, 440.0, 660.0)
        }
    assert max(heard.values()) < 25, heard

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        pitches = 80 * 2 ** (3 * torch.rand(4, generator=generator))
        frames = torch.cat([_frames(tone(float(pitch), 0.2, 8))[:8] for pitch in pitches])
        bins = torch.tensor([_bin(float(pitch)) for pitch in pitches]).repeat_interleave(8)
        return frames, torch.exp(-((torch.arange(360.0) - bins[:, None]) * 20).square() / (2 * 25**2))

    model.train()
    return Task(
        model,
        f"sines of 220, 440 and 660 Hz are heard within {max(heard.values()):.0f} cents",
        batch,
        lambda model, given: F.binary_cross_entropy(model(given[0]), given[1]),
        torch.optim.Adam(model.parameters(), lr=2e-4),
    )


class Silero(nn.Module):
    """Silero VAD 6 at 16 kHz: whether 512 samples of sound, with the 64 before them, are speech. The package describes the network for tinygrad."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = self.stft_conv(F.pad(x, (0, 64), "reflect").unsqueeze(1))
        x = (x[:, :129].square() + x[:, 129:].square() + 1e-12).sqrt()
        x = self.conv1(x).relu()
        x = self.conv2(x).relu()
        x = self.conv3(x).relu()
        x = self.conv4(x).relu().squeeze(-1)
        state = self.lstm_cell(x, state)
        return self.final_conv(state[0].unsqueeze(-1).relu()).sigmoid().mean((1, 2)), state


def _chunks(sound: Tensor) -> Tensor:
    """Chunks of 512 samples, each behind the last 64 of the one before: [chunks, batch, 576]."""
    return F.pad(sound, (64, 0)).unfold(-1, 576, 512).movedim(1, 0)


def _speech(model: nn.Module, sound: Tensor) -> Tensor:
    """The probability of speech in each chunk: [chunks, batch]."""
    state, found = None, []
    for chunk in _chunks(sound):
        probability, state = model(chunk, state)
        found.append(probability)
    return torch.stack(found)


def silero(folder: Path) -> Task:
    published = torch.jit.load(str(folder / "data" / "silero_vad.jit")).eval()
    kept, renamed = dict(published.named_parameters()) | dict(published.named_buffers()), {"stft_conv.weight": "stft.forward_basis_buffer"}
    for kind in ("weight", "bias"):
        renamed |= {f"conv{at}.{kind}": f"encoder.{at - 1}.reparam_conv.{kind}" for at in range(1, 5)}
        renamed |= {f"lstm_cell.{kind}_{side}": f"decoder.rnn.{kind}_{side}" for side in ("ih", "hh")}
        renamed[f"final_conv.{kind}"] = f"decoder.decoder.2.{kind}"
    model = Silero()
    model.load_state_dict({name: kept[f"_model.{theirs}"] for name, theirs in renamed.items()})
    model.stft_conv.requires_grad_(False)
    spoken = torch.stack([voice(pitch, (600, 1100, 2500), 2.0) for pitch in (110.0, 180.0)])
    noise = 0.01 * torch.randn(2, 2 * RATE)
    with torch.no_grad():
        speech, silence = _speech(model, spoken), _speech(model, noise)
        published.reset_states()
        theirs = torch.stack([published(chunk, RATE) for chunk in spoken[:, : 512 * len(speech)].unfold(-1, 512, 512).movedim(1, 0)]).squeeze(-1)
    apart = float((speech - theirs).abs().max())
    assert apart < 1e-3, f"the published network says {apart} else"

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        pitch = float(90 + 150 * torch.rand((), generator=generator))
        sounds = [voice(pitch, (500, 1500, 2500), 0.4, generator), voice(1.3 * pitch, (700, 1200, 2600), 0.4, generator)]
        sounds += [0.02 * torch.randn(len(sounds[0]), generator=generator) for _ in sounds]
        return torch.stack(sounds), torch.tensor([1.0, 1.0, 0.0, 0.0])

    return Task(
        model,
        f"as its own TorchScript says to {apart:.0e}: speech {float(speech.max()):.2f} in a made voice, {float(silence.max()):.2f} in noise",
        batch,
        lambda model, given: F.binary_cross_entropy(found := _speech(model, given[0]), given[1].expand_as(found)),
        adamw(model, 1e-4),
    )


def _mel_filters(bands: int, bins: int) -> Tensor:
    """Slaney's mel filter bank with filters of equal area, as librosa makes it: [bands, bins]."""

    def mel(hertz: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.where(hertz < 1000, 3 * hertz / 200, 15 + np.log(np.maximum(hertz, 1) / 1000) * 27 / np.log(6.4))

    def hertz(mel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(np.log(6.4) * (mel - 15) / 27))

    centres = hertz(np.linspace(mel(np.array(0.0)), mel(np.array(RATE / 2)), bands + 2))
    slopes = centres[:, None] - np.linspace(0, RATE / 2, bins)
    steps = np.diff(centres)[:, None]
    filters = np.maximum(0, np.minimum(-slopes[:-2] / steps[:-1], slopes[2:] / steps[1:])) * 2 / (centres[2:] - centres[:-2])[:, None]
    return torch.from_numpy(filters.astype(np.float32))


class VoiceEncoder(nn.Module):
    """The voice encoder of Resemblyzer 0.1.4, trained with the GE2E loss (Wan et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.relu = nn.ReLU()

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        embedding = self.relu(self.linear(hidden[-1]))
        scaled: Tensor = embedding / embedding.norm(dim=1, keepdim=True)
        return scaled


def _mels(sounds: Tensor) -> Tensor:
    """The mel spectrogram, not its logarithm, of 160 frames: [batch, 160, 40]."""
    spectrum = torch.stft(sounds, 400, 160, window=torch.hann_window(400), return_complex=True, pad_mode="constant").abs().square()
    return (_mel_filters(40, 201) @ spectrum).transpose(1, 2)[:, :160]


VOICES = ((100.0, (730, 1090, 2440)), (130.0, (270, 2290, 3010)), (200.0, (530, 1840, 2480)), (240.0, (300, 870, 2240)))
"""Pitch and formants of voices, by the vowels of Peterson and Barney (1952)."""


def resemblyzer(folder: Path) -> Task:
    model = VoiceEncoder()
    kept = torch.load(folder / "pretrained.pt", weights_only=True, map_location="cpu")["model_state"]
    model.load_state_dict({name: kept[name] for name in model.state_dict()})

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        factors = 1 + 0.05 * torch.randn(2, 4, generator=generator)
        sounds = [voice(p * float(f), formants, 1.61, generator) for row in factors for (p, formants), f in zip(VOICES, row, strict=True)]
        return _mels(torch.stack(sounds)), torch.arange(4).repeat(2)

    with torch.no_grad():
        found = model(batch(1000)[0])
    norm, alike = float(found.norm(dim=1).sub(1).abs().max()), found @ found.T
    same, others = float(alike.diagonal(4).min()), float(alike[:4, :4][~torch.eye(4, dtype=torch.bool)].mean())
    assert norm < 1e-5, norm
    assert same > others + 0.1, (same, others)

    def loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        found = model(given[0])
        return F.cross_entropy(10 * found[:4] @ found[4:].T - 5, given[1][:4])

    return Task(
        model,
        f"the embeddings have norm 1; a voice is at least {same:.2f} like itself, and on average {others:.2f} like the others",
        batch,
        loss,
        torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    )


class _Plain(pickle.Unpickler):
    """Reads the tensors of a checkpoint whose other contents need a package that is not there: each unknown class becomes an empty one."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("torch", "collections"):
            return super().find_class(module, name)
        return type(name, (), {"__setstate__": lambda self, state: None, "__init__": lambda self, *given: None})


class _Pickle:
    """What torch.load takes for the module `pickle`."""

    Unpickler = _Plain
    load = staticmethod(pickle.load)


def pesto(folder: Path) -> Task:
    kept = torch.load(folder / "weights" / "mir-1k_g7.ckpt", weights_only=False, map_location="cpu", pickle_module=_Pickle)["state_dict"]
    with shell(folder) as load:
        module, data = load(f"{folder.name}.model"), load(f"{folder.name}.data")
    cqt = {"harmonics": [1], "fmin": 27.5, "fmax": None, "bins_per_semitone": 3, "n_bins": 251, "center_bins": True, "gamma": 7, "center": True}
    encoder = module.Resnet1d(
        n_chan_layers=[40, 30, 30, 10, 3], n_prefilt_layers=3, prefilt_kernel_size=39, residual=True, n_bins_in=219, output_dim=384
    )
    model = module.PESTO(encoder, data.Preprocessor(10.0, RATE, **cqt), {"min_steps": -16, "max_steps": 16})
    missing, unexpected = model.load_state_dict(kept, strict=False)
    # The kernels of the constant-Q transform are computed, not learned.
    assert not unexpected, unexpected
    assert all("cqt_kernels" in name for name in missing), missing
    model.preprocessor.requires_grad_(False)
    model.eval()
    with torch.no_grad():
        pitches = (45, 57, 69, 81)
        sounds = torch.stack([tone(440 * 2 ** ((pitch - 69) / 12), 1.0, 8) for pitch in pitches])
        heard = float((model(sounds, RATE)[0][:, 20:-20].median(1).values - torch.tensor(pitches)).abs().max())
    assert heard < 0.3, heard

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        pitches = 40 + 45 * torch.rand(2, generator=generator)
        return torch.stack([tone(440 * 2 ** ((float(pitch) - 69) / 12), 0.2, 8) for pitch in pitches]), pitches

    def loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        _, confidence, _, found = model(given[0], RATE)
        wanted = torch.exp(-((torch.arange(384) / 3 - given[1][:, None, None]) * 3).square() / 2)
        pitch: Tensor = -(wanted * (found + 1e-8).log()).sum(-1).mean()
        return F.binary_cross_entropy(confidence, torch.ones_like(confidence)) + pitch / 10

    model.train()
    return Task(
        model,
        f"tones of MIDI pitch 45, 57, 69 and 81 are heard within {100 * heard:.0f} cents",
        batch,
        loss,
        adamw(model, 1e-4),
    )


def fcpe(folder: Path) -> Task:
    kept = torch.load(folder / "assets" / "fcpe_c_v001.pt", weights_only=True, map_location="cpu")
    with shell(folder, "local_attention") as load:
        model = load(f"{folder.name}.models").CFNaiveMelPE(128, 360, use_fa_norm=True, conv_only=True)
    model.load_state_dict(kept["model"])
    window = torch.hann_window(1024)
    filters = _mel_filters(128, 513)

    def mels(sounds: Tensor) -> Tensor:
        spectrum = torch.stft(F.pad(sounds[:, None], (432, 432), "reflect")[:, 0], 1024, 160, window=window, center=False, return_complex=True)
        return (filters @ (spectrum.abs().square() + 1e-9).sqrt()).clamp(min=1e-5).log().transpose(1, 2)

    model.eval()
    hertz = torch.tensor([110.0, 220.0, 440.0, 880.0])
    with torch.no_grad():
        heard = model.infer(mels(torch.stack([tone(float(each), 1.0, 8) for each in hertz])), threshold=0.006)[:, 20:-20, 0].median(1).values
    apart = float((1200 * torch.log2(heard / hertz)).abs().max())
    assert apart < 25, heard

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        pitches = 80 * 2 ** (3 * torch.rand(2, generator=generator))
        return mels(torch.stack([tone(float(pitch), 0.25, 8) for pitch in pitches])), pitches

    model.train()
    return Task(
        model,
        f"tones of 110, 220, 440 and 880 Hz are heard within {apart:.0f} cents",
        batch,
        lambda model, given: cast(Tensor, model.train_and_loss(given[0], given[1][:, None, None].expand(-1, given[0].shape[1], 1))),  # type: ignore[operator]
        adamw(model, 1e-4),
    )


NETWORKS = (
    Network("CREPE tiny", "torchcrepe", "torchcrepe", crepe),
    Network("Silero VAD", "silero-vad", "silero_vad", silero),
    Network("Resemblyzer", "Resemblyzer", "resemblyzer", resemblyzer),
    Network("PESTO", "pesto-pitch", "pesto", pesto, ("scipy",)),
    Network("FCPE", "torchfcpe", "torchfcpe", fcpe, ("einops",)),
)
