"""transformers.Trainer: a tiny BERT, not pretrained, learns to fill in masked words of Python's own help texts, watched by one callback.

    python examples/transformers_text.py

TensorBoard shows the run in runs/transformers_text with a Saturation tab: its GELUs, and attention head by head.
"""

import argparse
import re
from collections import Counter
from pydoc_data.topics import topics

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from torchsat.integrations.transformers import Torchsat

PADDING, MASK, LENGTH = 0, 1, 32


def masked_lines() -> list[dict[str, torch.Tensor]]:
    """Lines of 32 words out of the 500 most frequent, every seventh of them masked."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()))
    vocabulary = {word: number for number, (word, _) in enumerate(Counter(words).most_common(500), start=2)}
    ids = torch.tensor([vocabulary.get(word, PADDING) for word in words[: len(words) // LENGTH * LENGTH]]).view(-1, LENGTH)
    masked = (torch.arange(LENGTH) + torch.arange(len(ids))[:, None]) % 7 == 0
    inputs, labels = ids.masked_fill(masked, MASK), ids.masked_fill(~masked | (ids == PADDING), -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    sizes = BertConfig(
        vocab_size=502, max_position_embeddings=LENGTH, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertForMaskedLM(sizes)
    settings = TrainingArguments(
        "runs/transformers_text", max_steps=steps, learning_rate=1e-3, logging_steps=20, report_to="tensorboard", save_strategy="no", use_cpu=True
    )
    saturation = Torchsat()
    trainer = Trainer(model, settings, train_dataset=masked_lines(), callbacks=[saturation])
    trainer.train()

    assert saturation.monitor is not None
    for alert in saturation.monitor.alerts:
        print(alert.message)
    print(saturation.monitor.coverage)
    print("see it in TensorBoard:  tensorboard --logdir runs/transformers_text")


if __name__ == "__main__":
    main()
