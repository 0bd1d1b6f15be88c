"""Writes docs/families.md: what torchsat sees in the architectures of Hugging Face transformers. `python docs/families.py`

Every family is a small configuration with random weights, trained for one step on random input; nothing is fetched. A library draws the weights of a
model so small that the activations of a narrow one run in a range where they all are straight lines, and no measurement could tell them apart.
Matrices are therefore multiplied by SPREAD, so that pre-activations have the size that they have in a trained network.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from marks import filled, named
from torch import Tensor, nn

import torchsat

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PAGE = Path(__file__).parent / "families.md"
SPREAD = 30.0
TINY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**TINY, **IDS, "num_key_value_heads": 2}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, **IDS}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
AUDIO = {
    **TINY,
    "conv_dim": (16, 16),
    "conv_kernel": (4, 3),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
CLIP = {
    "text_config": {**TINY, **IDS, "projection_dim": 16, "max_position_embeddings": 16},
    "vision_config": {**IMAGE, "projection_dim": 16},
    "projection_dim": 16,
}


def tokens(**more: Any) -> dict[str, Any]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(3, 99, (2, 9)), "attention_mask": mask, **more}


def pixels(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def seq2seq() -> dict[str, Any]:
    return tokens(decoder_input_ids=torch.randint(3, 99, (2, 5)))


Inputs = Callable[[], dict[str, Any]]
# (family, model class, configuration class, configuration, inputs)
FAMILIES: tuple[tuple[str, str, str, dict[str, Any], Inputs], ...] = (
    ("ALBERT", "AlbertModel", "AlbertConfig", {**TINY, "embedding_size": 16}, tokens),
    ("BART", "BartModel", "BartConfig", {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}, seq2seq),
    ("BERT", "BertModel", "BertConfig", TINY, tokens),
    ("BLOOM", "BloomForCausalLM", "BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}, tokens),
    ("CLIP", "CLIPModel", "CLIPConfig", CLIP, lambda: {**tokens(), **pixels()}),
    ("ConvNeXt", "ConvNextModel", "ConvNextConfig", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, lambda: pixels(32)),
    ("DeBERTa", "DebertaModel", "DebertaConfig", {**TINY, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, tokens),
    ("DistilBERT", "DistilBertModel", "DistilBertConfig", {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, tokens),
    ("ELECTRA", "ElectraModel", "ElectraConfig", {**TINY, "embedding_size": 16}, tokens),
    ("Falcon", "FalconForCausalLM", "FalconConfig", {**TINY, **IDS}, tokens),
    ("Gemma", "GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}, tokens),
    ("Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8}, tokens),
    ("GPT-2", "GPT2LMHeadModel", "GPT2Config", GPT, tokens),
    ("GPT-J", "GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, tokens),
    ("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**TINY, **IDS}, tokens),
    ("Llama", "LlamaForCausalLM", "LlamaConfig", GROUPED, tokens),
    ("Mamba", "MambaForCausalLM", "MambaConfig", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **IDS},
        lambda: {"input_ids": tokens()["input_ids"]}),
    ("Mistral", "MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}, tokens),
    ("Mixtral", "MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}, tokens),
    ("MobileBERT", "MobileBertModel", "MobileBertConfig", {**TINY, "embedding_size": 32, "true_hidden_size": 32,
        "intra_bottleneck_size": 32}, tokens),
    ("MPNet", "MPNetModel", "MPNetConfig", TINY, tokens),
    ("OPT", "OPTForCausalLM", "OPTConfig", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "word_embed_proj_dim": 32}, tokens),
    ("Phi", "PhiForCausalLM", "PhiConfig", {**TINY, **IDS}, tokens),
    ("Qwen 2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED, tokens),
    ("Qwen 3", "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}, tokens),
    ("ResNet", "ResNetModel", "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, lambda: pixels(32)),
    ("RoBERTa", "RobertaModel", "RobertaConfig", TINY, tokens),
    ("RWKV", "RwkvForCausalLM", "RwkvConfig", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
        "context_length": 16},
        lambda: {"input_ids": tokens()["input_ids"]}),
    ("SegFormer", "SegformerForSemanticSegmentation", "SegformerConfig", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}, lambda: pixels(64)),
    ("Swin", "SwinModel", "SwinConfig", {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4},
        lambda: pixels(32)),
    ("T5", "T5Model", "T5Config", {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, seq2seq),
    ("ViT", "ViTModel", "ViTConfig", IMAGE, pixels),
    ("wav2vec 2.0", "Wav2Vec2Model", "Wav2Vec2Config", AUDIO, lambda: {"input_values": torch.randn(2, 400)}),
    ("Whisper", "WhisperModel", "WhisperConfig", {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 20, "num_mel_bins": 8, **IDS,
        "decoder_start_token_id": 1}, lambda: {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(3, 99, (2, 5))}),
    ("XLNet", "XLNetModel", "XLNetConfig", {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, tokens),
)  # fmt: skip


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small random model of a family, in training mode, and inputs for it."""
    import transformers

    transformers.logging.set_verbosity_error()
    _, model, config, given, inputs = next(row for row in FAMILIES if row[0] == name)
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**given)).train()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SPREAD)
    return made, inputs()


def loss_of(output: Any) -> Tensor:
    """Something that depends on every output."""
    leaves = [each for each in torch.utils._pytree.tree_leaves(dict(output)) if isinstance(each, Tensor) and each.requires_grad]
    return sum((each.float().square().mean() for each in leaves), torch.zeros(()))


def observe(name: str) -> tuple[torchsat.Snapshot, torchsat.Coverage]:
    """One observed step of a family."""
    model, inputs = build(name)
    with torchsat.watch(model, errors="raise") as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loss_of(model(**inputs)).backward()
        optimizer.step()
    assert monitor.latest is not None
    return monitor.latest, monitor.coverage


def table() -> str:
    lines = ["| family | sites | activations | with gradient | not seen, or in part |", "|---|---|---|---|---|"]
    for name, *_ in FAMILIES:
        snapshot, coverage = observe(name)
        kinds = Counter(record.activation for record in snapshot.records)
        with_gradient = sum(record.grad_n > 0 for record in snapshot.records)
        found = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        lines.append(f"| {name} | {coverage.described} | {found} | {with_gradient} | {named(coverage)} |")
    return "\n".join([*lines, "", versions()])


def versions() -> str:
    """With what the table was made: another version of transformers may compute otherwise."""
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE, {"families": table}))
