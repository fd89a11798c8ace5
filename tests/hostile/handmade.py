"""Safetensors files made byte by byte, so that a test can lie in any field."""

from __future__ import annotations

import json
import struct

WORDS = ["<unk>", "<s>", "</s>", "cat", "dog", "mat"]
HIDDEN, INNER = 4, 6


def safetensors_bytes(entries: dict, data: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file with any header; `length` lies about the header's length."""
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(dtype: str, shape: list[int], start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def model_tensors() -> tuple[dict, bytes]:
    """Header entries and data of a one-layer Llama with hidden size 4."""
    block = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": [len(WORDS), HIDDEN], "model.norm.weight": [HIDDEN],
        "lm_head.weight": [len(WORDS), HIDDEN], f"{block}.input_layernorm.weight": [HIDDEN],
        f"{block}.post_attention_layernorm.weight": [HIDDEN], f"{block}.mlp.gate_proj.weight": [INNER, HIDDEN],
        f"{block}.mlp.up_proj.weight": [INNER, HIDDEN], f"{block}.mlp.down_proj.weight": [HIDDEN, INNER],
    }  # fmt: skip
    shapes |= {f"{block}.self_attn.{letter}_proj.weight": [HIDDEN, HIDDEN] for letter in "qkvo"}
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for number, (name, shape) in enumerate(shapes.items()):
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        start = len(data)
        data += struct.pack(f"<{count}f", *(((number * 7 + i * 3) % 11 - 5) / 5 for i in range(count)))
        entries[name] = tensor("F32", shape, start, len(data))
    return entries, data
