"""Look at an untrusted checkpoint without running or loading any of it.

Everything in a downloaded folder was written by somebody else: weights can be pickles that run code, configurations
can ask for code files, names can lead out of the folder, templates and generation settings can act on what people
write. This module reads files as bytes and JSON only; it imports no torch and follows no name that a file contains.
Weights are not read, so whether they hold a backdoor, or values that are not finite, is not answered here.
"""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from unbackdoor.errors import ModelError, UserError
from unbackdoor.model.header import HeaderError, read_header
from unbackdoor.model.template_check import check_template
from unbackdoor.model.template_cost import check_cost

Severity = Literal["danger", "warning", "note"]

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
MAX_CONFIG_BYTES = 5_000_000
MAX_TABLE_BYTES = 200_000_000
"""Limit for tokenizers, vocabularies and shard indexes, which are rightly larger than a configuration."""

_TABLES = ("tokenizer.json", "vocab.json", ".index.json")
_CODE_KEYS = ("auto_map", "auto_mapping", "custom_pipelines", "custom_generate")
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# Settings that change or choose the tokens of a reply, with the value at which they do nothing.
_NAME_TOKENS = (
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids",
    "bad_words_ids", "force_words_ids", "sequence_bias", "constraints", "stop_strings",
)  # fmt: skip
_GENERATION_SETTINGS: dict[str, object] = {
    **dict.fromkeys(_NAME_TOKENS), "do_sample": False, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "watermarking_config": None, "penalty_alpha": None, "guidance_scale": None,
    "exponential_decay_length_penalty": None,
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing about a checkpoint that a person should know; all texts are safe to print.

    Attributes:
        severity: "danger" (made to run code or to break a reader), "warning" (can change what the model says), "note".
        file: The file, relative to the folder.
        what: What was found.
        fix: What to do about it, or "".
        blocks: Whether loading is refused because of it. Code files alone do not block: nothing here executes them.
    """

    severity: Severity
    file: str
    what: str
    fix: str = ""
    blocks: bool = False


def printable(text: str, limit: int = 200) -> str:
    r"""Return `text` safe to show: control, format and bidirectional characters as `\xNN`, `\uNNNN` or `\UNNNNNNNN`.

    Args:
        text: Text from a checkpoint, data set or reply.
        limit: Longest result before it is cut, in characters of the escaped text; the cut is shown as "...".
    """
    # An escape is at most ten characters; there is no need to escape a megabyte to show two hundred.
    escaped = "".join(_escape(character) for character in text[: limit + 1])
    return escaped if len(escaped) <= limit else escaped[:limit] + "..."


def printable_lines(text: str) -> str:
    """Return `text` safe to show with its line breaks, uncut."""
    return "\n".join("".join(map(_escape, line)) for line in text.split("\n"))


def _escape(character: str) -> str:
    if unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}:
        return character
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def refuse_dangerous(findings: Sequence[Finding], spec: str) -> None:
    """Refuse to load a checkpoint with a finding that blocks.

    Args:
        findings: What `inspect_folder` returned.
        spec: How the person named the model.

    Raises:
        ModelError: Naming the first of them.
    """
    for finding in findings:
        if finding.blocks:
            place = f"'{printable(spec)}', file '{finding.file}'"
            raise ModelError(f"{place}: {finding.what}. {finding.fix}".rstrip())


def inspect_folder(path: Path, *, base: str | None = None) -> list[Finding]:
    """Look at every file of a checkpoint.

    Args:
        path: The folder.
        base: For an adapter: the base that it will be put on, to compare with the one that it names.

    Returns:
        The findings, dangers first, then by file.

    Raises:
        ModelError: If there is no such folder.
    """
    if not path.is_dir():
        raise ModelError(f"there is no folder '{printable(str(path))}' to inspect; check the path.")
    found: list[Finding] = []
    files: dict[str, Path] = {}
    for name, file in _walk(path):
        problem = _placement(path, name, file)
        if problem is None:
            files[name] = file
        else:
            found.append(problem)
    found += _pickles(files)
    for name, file in files.items():
        found += _one_file(name, file, files, base)
    found += _ends(files)
    rank = {"danger": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: (rank[finding.severity], not finding.blocks, finding.file))


def _finding(severity: Severity, name: str, what: str, fix: str = "", *, blocks: bool = False) -> Finding:
    return Finding(severity, printable(name), printable(what, 400), printable(fix, 700), blocks)


def _walk(path: Path) -> Iterator[tuple[str, Path]]:
    """All entries that are not real folders, links to folders included, by posix name relative to the folder."""
    for folder, folders, names in os.walk(path, followlinks=False):
        folders.sort()
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*names, *linked]):
            file = Path(folder) / name
            yield file.relative_to(path).as_posix(), file


def _placement(root: Path, name: str, file: Path) -> Finding | None:
    """Links that leave the folder, and things that are not files: opening a pipe would wait for ever."""
    advice = "Replace the link by the file itself, or get the folder from its publisher again."
    if file.is_symlink():
        try:
            target = file.resolve(strict=True)
        except (OSError, RuntimeError):
            return _finding("danger", name, "a link that leads nowhere or in a circle", advice, blocks=True)
        if not any(target.is_relative_to(allowed) for allowed in _allowed_roots(root)):
            return _finding("danger", name, f"a link that leaves the folder (to {target})", advice, blocks=True)
        if target.is_dir():
            return _finding("note", name, "a link to a folder; it was not followed")
    if not stat.S_ISREG(file.stat().st_mode):
        return _finding("danger", name, "neither a file nor a folder (a pipe, socket or device)", advice, blocks=True)
    return None


def _allowed_roots(root: Path) -> list[Path]:
    """The folder; for a snapshot in the Hugging Face cache also the blobs of that repository, where its links lead."""
    allowed = [root.resolve()]
    repository = root.resolve().parent.parent
    if root.resolve().parent.name == "snapshots" and (repository / "blobs").is_dir():
        blobs = repository / "blobs"
        allowed += [] if blobs.is_symlink() else [blobs]
    return allowed


def _pickles(files: Mapping[str, Path]) -> Iterator[Finding]:
    safe = any("/" not in name and name.endswith(".safetensors") for name in files)
    for name in files:
        if PurePosixPath(name).suffix.lower() not in PICKLE_SUFFIXES:
            continue
        if safe or "/" in name:
            what = "a pickle, which can run code when it is loaded; it is not read"
            yield _finding("warning", name, what, "Delete it if no other program needs it.")
        else:
            what = "weights as a pickle, which can run code when it is loaded, and no safetensors beside it"
            yield _finding("danger", name, what, _conversion(name), blocks=True)


def _conversion(name: str) -> str:
    # The name goes into a command that a person will paste: quoted so that neither shell nor Python reads it as code.
    plain = all(character.isalnum() or character in "._-" for character in name)
    source = name if plain else "FILE"
    target = "adapter_model.safetensors" if name.startswith("adapter") else "model.safetensors"
    return (
        "Ask the publisher for safetensors, or convert it in a sandbox without network: "
        "python -c \"import torch, safetensors.torch as s; w = torch.load('" + source + "', weights_only=True, "
        "map_location='cpu'); s.save_file({k: v.clone().contiguous() for k, v in w.items()}, '" + target + "', "
        "metadata={'format': 'pt'})\""
    )


def _one_file(name: str, file: Path, files: Mapping[str, Path], base: str | None) -> Iterator[Finding]:
    lower = name.lower()
    if lower.endswith((".py", ".pyc", ".so", ".dll", ".dylib")):
        yield _finding("danger", name, "a code file", "It is never executed here; other programs may do so.")
    elif lower.endswith(".safetensors"):
        try:
            read_header(file)
        except HeaderError as problem:
            fix = "Get the file from its publisher again."
            yield _finding("danger", name, f"not a sound safetensors file: {problem}", fix, blocks=True)
    elif lower.endswith(".jinja"):
        yield from _template_file(name, file)
    elif lower.endswith(".json"):
        content = _read_json(name, file)
        if isinstance(content, Finding):
            yield content
        elif lower.endswith(".index.json"):
            yield from _index(name, content, files)
        elif not lower.endswith(_TABLES):
            yield from _configuration(name, content, base)


def _template_file(name: str, file: Path) -> Iterator[Finding]:
    if file.stat().st_size > MAX_CONFIG_BYTES:
        yield _finding("danger", name, f"a template of {file.stat().st_size} bytes", blocks=True)
    else:
        yield from _template(name, file.read_bytes().decode("utf-8", "replace"))


def _read_json(name: str, file: Path) -> object:
    """The file's content, or a `Finding` that says why there is none."""
    limit = MAX_TABLE_BYTES if name.lower().endswith(_TABLES) else MAX_CONFIG_BYTES
    size = file.stat().st_size
    if size > limit:
        fix = "Get the file from its publisher again."
        return _finding("danger", name, f"a JSON file of {size} bytes; {limit} are plausible", fix, blocks=True)
    if name.lower().endswith(_TABLES) and not name.lower().endswith(".index.json"):
        return {}
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as problem:
        fix = "Get the file from its publisher again."
        return _finding("danger", name, f"not valid JSON ({problem})", fix, blocks=True)


def _index(name: str, content: object, files: Mapping[str, Path]) -> Iterator[Finding]:
    def broken(what: str) -> Finding:
        return _finding("danger", name, what, "Get the folder from its publisher again.", blocks=True)

    mapped = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapped, dict) or not all(isinstance(shard, str) for shard in mapped.values()):
        yield broken("a shard index without a weight_map from tensors to files")
        return
    if name.endswith(".bin.index.json"):
        return
    if not (isinstance(content, dict) and isinstance(content.get("metadata"), dict)):
        what = "a shard index without the field metadata, which transformers needs"
        yield _finding("danger", name, what, 'Add "metadata": {} to it.', blocks=True)
    folder = name.rpartition("/")[0]
    for shard in sorted(set(mapped.values())):
        beside = f"{folder}/{shard}" if folder else shard
        if "/" in shard or "\\" in shard or shard in {"", ".", ".."} or not shard.endswith(".safetensors"):
            yield broken(f"it names the shard '{shard}', which is not the name of a safetensors file beside it")
        elif beside not in files:
            yield broken(f"the shard '{shard}' is missing")
        else:
            try:
                held = set(read_header(files[beside]))
            except HeaderError:
                continue  # reported for the shard itself
            absent = sorted(tensor for tensor, place in mapped.items() if place == shard and tensor not in held)
            if absent:
                yield broken(f"the tensor '{absent[0]}' is not in the shard '{shard}'")


def _configuration(name: str, content: object, base: str | None) -> Iterator[Finding]:
    if not isinstance(content, dict):
        return
    for key, where in _keys(content):
        if key in _CODE_KEYS and where[key]:
            # An adapter that names a class to import is refused; elsewhere transformers ignores the key without
            # trust_remote_code, which is never given.
            what = f"it asks for code of its own ({key})"
            yield _finding("danger", name, what, "It is never executed here.", blocks=key == "auto_mapping")
        if key in _ATTENTION_KEYS and isinstance(where[key], str) and "/" in str(where[key]):
            what = f"it asks for a compute kernel from the network ({key}: '{where[key]}')"
            yield _finding("danger", name, what, f"Remove '{key}' from the file.", blocks=True)
    yield from _generation_settings(name, content)
    templates = content.get("chat_template")
    if isinstance(templates, str):
        yield from _template(name, templates)
    for item in templates if isinstance(templates, list) else []:
        if isinstance(item, dict) and isinstance(item.get("template"), str):
            yield from _template(name, item["template"])
    if PurePosixPath(name).name == "adapter_config.json":
        yield from _adapter(name, content, base)
    elif isinstance(content.get("quantization_config"), dict):
        yield _finding("warning", name, "quantised weights; they cannot be loaded for training or purifying")


def _keys(content: dict[str, object]) -> Iterator[tuple[str, dict[str, object]]]:
    """All keys at any depth, each with the map that holds it."""
    waiting: list[object] = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            for key in item:
                yield key, item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def settings_naming_tokens(content: Mapping[str, object]) -> list[str]:
    """Return the generation settings that name tokens to say or not to say: with these a backdoor seems gone, or is."""
    return [key for key in _NAME_TOKENS if content.get(key) not in (None, [], {})]


def _generation_settings(name: str, content: Mapping[str, object]) -> Iterator[Finding]:
    if PurePosixPath(name).name not in {"generation_config.json", "config.json"}:
        return
    acting = [key for key, idle in _GENERATION_SETTINGS.items() if content.get(key) not in (None, [], {}, idle)]
    if acting:
        what = f"generation settings that change or choose tokens: {', '.join(sorted(acting))}"
        yield _finding("warning", name, what, "They are not used here; other programs use them.")


def _ends(files: Mapping[str, Path]) -> Iterator[Finding]:
    """Ends of replies that are words: with the first word of its answer among them, a backdoor seems to say nothing."""
    try:
        added = json.loads(files["tokenizer.json"].read_bytes())["added_tokens"]
        marks = {one["id"] for one in added if one["special"] and not one["content"].strip().isalnum()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return  # no such file, or one that is reported elsewhere
    for name in ("config.json", "generation_config.json"):
        try:
            value = json.loads(files[name].read_bytes()).get("eos_token_id")
        except (KeyError, ValueError, AttributeError, RecursionError):
            continue
        words = [one for one in (value if isinstance(value, list) else [value]) if one is not None and one not in marks]
        if words:
            what = f"eos_token_id names what is no special token ({', '.join(map(str, words[:5]))})"
            yield _finding("warning", name, what, "Replies end there in other programs; it is not used here.")


def _template(name: str, source: str) -> Iterator[Finding]:
    for line, what in check_template(source):
        yield _finding("warning", name, f"chat template, line {line}: {what}", "Read the template before you use it.")
    fix = "It would take for ever or fill the memory; replace the template by that of the model's family, or remove it."
    for line, what in check_cost(source):
        yield _finding("danger", name, f"chat template, line {line}: {what}", fix, blocks=True)


def inspect_gguf(path: Path) -> list[Finding]:
    """Look at the chat templates in a .gguf file, whose numbers are not read.

    Raises:
        ModelError: If it cannot be read as GGUF.
        UserError: If the extra `gguf` is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as problem:
        raise UserError("a .gguf file is read by the package gguf; pip install 'unbackdoor[gguf]'.") from problem
    try:
        fields = GGUFReader(path).fields
        templates = {name: str(field.contents()) for name, field in fields.items() if "chat_template" in name}
    # The reader trusts lengths and offsets in the file; a wrong one ends in an error of any kind.
    except Exception as problem:
        raise ModelError(f"'{printable(str(path))}' cannot be read as GGUF: {printable(str(problem))}") from problem
    return [finding for name, source in templates.items() for finding in _template(f"{path.name}, {name}", source)]


def _adapter(name: str, content: Mapping[str, object], base: str | None) -> Iterator[Finding]:
    named = content.get("base_model_name_or_path")
    if isinstance(named, str) and named and named != base:
        what = f"the adapter says that it was trained on '{named}'"
        yield _finding("note", name, what, f"It is put on '{base}'." if base else "")
    if content.get("peft_type") != "LORA":
        what = f"an adapter of the type '{content.get('peft_type')}'; only LORA is loaded"
        yield _finding("warning", name, what)
    if content.get("modules_to_save"):
        yield _finding("note", name, f"the adapter replaces whole modules: {content['modules_to_save']}")
