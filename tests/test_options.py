"""A wrong argument of torchsat.watch raises an error that names the allowed values."""

from typing import Any

import pytest
from torch import nn

import torchsat
from tests.models import mlp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_alert": 5}, "on_alert is 5; allowed is a function of one Alert"),
        ({"sinks": 5}, "sinks is 5; allowed is a tuple of functions"),
        ({"sinks": ("print",)}, "sinks holds 'print'; each must be a function of one Snapshot"),
        ({"log_dir": 5}, "log_dir is 5; allowed is a directory"),
        ({"log_dir": ""}, "log_dir is ''; allowed is a directory"),
    ],
)
def test_arguments_of_a_wrong_kind_are_answered_with_the_right_one(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        torchsat.watch(mlp(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": 5}, 'include is 5; allowed are a pattern of site names such as "encoder'),
        ({"exclude": [5]}, r"exclude is \[5\]"),
        ({"log_dir": "runs", "writer": "writer"}, "log_dir and writer are both given"),
        ({"every": 0}, "every is 0; allowed are whole numbers from 1 up"),
        ({"every": 2.5}, "every is 2.5"),
        ({"epsilon": 1.0}, "epsilon is 1.0; allowed are numbers between 0 and 1"),
        ({"sample": 0}, 'sample is 0; allowed are whole numbers from 1 up, None for all elements, and "auto"'),
        ({"activations": nn.Tanh}, r"activations must be a tuple of torchsat\.Activation"),
        ({"extras": "ranks"}, r"extras holds 'ranks'; allowed are \"formats\", \"logits\", \"rank\", one or several: extras="),
        ({"extras": ["rank", 5]}, r"extras holds 5; allowed are"),
        ({"rules": ("saturated",)}, r"rules must be a tuple of torchsat\.Rule"),
        ({"errors": "ignore"}, 'errors is \'ignore\'; allowed are "warn" and "raise"'),
    ],
)
def test_bad_arguments_are_answered_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchsat.watch(mlp(), **options)
