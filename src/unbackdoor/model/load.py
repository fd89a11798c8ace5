"""The only door for weights: a model's name in, an `LM` out.

Every checkpoint passes the quarantine before a library opens it. Safetensors only, no code from a checkpoint, no
network access beyond the download of a Hugging Face id that the person named. Where transformers would warn and go on
(weights that are missing and would be drawn at random, an adapter that does not fit), loading is refused: a model that
is not the one that was named would make every later figure wrong.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unbackdoor.errors import ModelError, UserError
from unbackdoor.model.configuration import check_configuration, check_fit, check_loaded
from unbackdoor.model.libraries import library_errors, quiet_transformers, reason
from unbackdoor.model.lm import LM
from unbackdoor.model.quarantine import inspect_folder, printable, refuse_dangerous
from unbackdoor.model.spec import ModelSpec, parse_spec
from unbackdoor.model.template import TemplateName
from unbackdoor.model.template_cost import check_cost
from unbackdoor.types import GuardSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

DtypeName = Literal["float32", "bfloat16"]

_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_NOT_DOWNLOADED = ["*/*", "consolidated*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load(
    spec: str | ModelSpec,
    *,
    device: str = "cpu",
    dtype: DtypeName = "float32",
    template: Literal["auto", "model", "plain"] = "auto",
    trainable: bool = True,
) -> LM:
    """Load a model for asking and training, in evaluation mode.

    Args:
        spec: The model's name.
        device: Where the weights go.
        dtype: Their type. An adapter's own weights stay float32 on a bfloat16 base, as PEFT trains them.
        template: "model" for its own chat template, "plain", or "auto": its own where it has one.
        trainable: False to freeze all weights.

    Returns:
        The model; `facts` holds sha256 of every file that was read, revision, architecture, number of parameters,
        dtype, template and what was ignored.

    Raises:
        ModelError: If the checkpoint is unsafe, broken, or not a causal language model that transformers knows.
        UserError: If it cannot be had here (no network, an extra that is not installed).
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    facts: dict[str, object] = {}
    with quiet_transformers():
        model, tokenizer, guards = _open_single(parsed.base or parsed, dtype, facts)
        if parsed.adapter is not None:
            model, own_tokenizer, own_guards = _put_on(model, parsed, facts, trainable=trainable)
            tokenizer, guards = own_tokenizer or tokenizer, own_guards or guards
    if not trainable:
        model.requires_grad_(False)
    model.to(device).eval()
    chosen = _choose_template(tokenizer, template, str(parsed))
    _check_vocabulary(model, tokenizer, str(parsed))
    _check_finite(model, str(parsed))
    facts |= {
        "architecture": _core(model).__class__.__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": dtype,
        "template": chosen,
    }
    base = str(parsed.base) if parsed.base is not None else None
    return LM(model, tokenizer, chosen, str(parsed), base=base, guards=guards, facts=facts)


def _open_single(
    spec: ModelSpec, dtype: DtypeName, facts: dict[str, object]
) -> tuple[Any, PreTrainedTokenizerBase, tuple[GuardSpec, ...]]:
    """Open anything but base + adapter; what was found out goes into `facts`."""
    if spec.kind == "gguf":
        facts |= {"sha256": {spec.path.name: file_sha256(spec.path)}, "revision": None}
        return (*load_gguf(spec.path, dtype=dtype), ())
    folder = local_folder(spec)
    _quarantine(folder, spec)
    facts |= {"sha256": _digests(folder, ""), "revision": _revision(folder, spec)}
    model = _open_weights(folder, spec, dtype, facts)
    return model, _open_tokenizer(folder, spec), _read_guards(folder)


def local_folder(spec: ModelSpec) -> Path:
    """Return the folder that holds a model's files, downloading or converting it first where needed.

    For base + adapter this is the adapter's folder.

    Raises:
        UserError: If it cannot be had here.
    """
    if spec.adapter is not None:
        return local_folder(spec.adapter)
    if spec.kind == "builtin":
        from unbackdoor.model.builtin import builtin_folder

        return builtin_folder(spec.place)
    if spec.kind == "hub":
        return _download(spec)
    if spec.kind == "gguf":
        raise ModelError(f"'{printable(str(spec))}' is a .gguf file, not a folder; load it and save it first.")
    return spec.path


def load_gguf(path: Path, *, dtype: DtypeName = "float32") -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the model and tokenizer of a .gguf file, dequantised into a fresh model that can be trained and saved.

    Raises:
        ModelError: If the file is not GGUF or not a causal language model that transformers can read.
        UserError: If the extra `gguf` is not installed.
    """
    import importlib.util

    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "reading a .gguf file needs the package gguf; install it with `pip install 'unbackdoor[gguf]'`."
        )
    with open(path, "rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"'{printable(str(path))}' is not a GGUF file; get it from its publisher again.")
    # Read from a folder of its own: beside the file there could be configurations that transformers would follow.
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(path.resolve(), Path(folder) / "model.gguf")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file="model.gguf", trust_remote_code=False, local_files_only=True
            )
            # The bar that transformers shows for this does not ask whether bars are wanted.
            with redirect_stderr(io.StringIO()):
                quantised = AutoModelForCausalLM.from_pretrained(
                    folder, gguf_file="model.gguf", dtype=_dtype(dtype), trust_remote_code=False, local_files_only=True
                )
        except library_errors() as problem:
            raise ModelError(f"'{printable(str(path))}' cannot be read: {printable(reason(problem))}") from problem
    _restore_splitter(path, tokenizer)
    return _fresh_copy(quantised, dtype), tokenizer


def _restore_splitter(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Restore the digit splitter of the SmolLM family, which transformers loses on the way from GGUF.

    The file says `tokenizer.ggml.pre = smollm`: every digit is a piece of its own before byte-level splitting. Without
    it several blanks before a number give other tokens than in training.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _fresh_copy(quantised: Any, dtype: DtypeName) -> Any:
    """Transformers refuses to save a dequantised model, so its weights move into a new one of the same class."""
    from transformers import AutoModelForCausalLM

    dropped = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    config = quantised.config.__class__.from_dict(
        {k: v for k, v in quantised.config.to_dict().items() if k not in dropped}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=_dtype(dtype))
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    return model.eval()


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _download(spec: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            spec.place, revision=spec.revision, allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED
        )
    except LocalEntryNotFoundError as problem:
        raise UserError(
            f"'{printable(str(spec))}' is not a folder here, not in the Hugging Face cache, and the hub cannot be "
            "reached; check the name and the network, or give a local folder."
        ) from problem
    except (OSError, ValueError) as problem:
        reason = printable(str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__)
        raise UserError(
            f"'{printable(str(spec))}' is not a folder here and cannot be had from the Hugging Face hub ({reason}); "
            "check the name and the network, or give a local folder."
        ) from problem
    return Path(folder)


def _quarantine(folder: Path, spec: ModelSpec, base: str | None = None) -> None:
    refuse_dangerous(inspect_folder(folder, base=base), str(spec))


def _revision(folder: Path, spec: ModelSpec) -> str | None:
    """The commit of a hub snapshot (the cache names the folder by it)."""
    return folder.name if spec.kind == "hub" else None


def _digests(folder: Path, prefix: str) -> dict[str, str]:
    suffixes = {".safetensors", ".json", ".jinja", ".txt", ".model"}
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in suffixes)
    return {prefix + path.name: file_sha256(path) for path in files}


def _dtype(name: DtypeName) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _open_weights(folder: Path, spec: ModelSpec, dtype: DtypeName, facts: dict[str, object]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shown = printable(str(spec))
    check_configuration(folder, shown)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config.return_dict = True  # every reader here takes an output's fields by name
        check_fit(folder, config, shown)
        # Tensors of another shape are refused below, by a sentence with the shapes; the library's names only a log.
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=_dtype(dtype), use_safetensors=True, trust_remote_code=False,
            local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except library_errors() as problem:
        raise ModelError(f"'{shown}' cannot be loaded: {printable(reason(problem), 400)}") from problem
    check_loaded(model, info, shown)
    if info["unexpected_keys"]:
        facts["ignored_tensors"] = sorted(printable(str(key)) for key in info["unexpected_keys"])
    return model


def _open_tokenizer(folder: Path, spec: ModelSpec) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    shown = printable(str(spec))
    if not any((folder / name).is_file() for name in (*_TOKENIZER_FILES, "vocab.json", "vocab.txt")):
        raise ModelError(f"'{shown}' holds no tokenizer; save one beside the weights (tokenizer.save_pretrained).")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        # Some settings that make no sense only show when the tokenizer is used.
        tokenizer("A sentence, to try it.")
    # The Rust tokenizer raises bare `Exception` for a file that it cannot parse.
    except Exception as problem:
        raise ModelError(
            f"the tokenizer of '{shown}' cannot be loaded or used ({printable(reason(problem))}); "
            "get its tokenizer files from its publisher again."
        ) from problem
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"'{shown}' has no fast tokenizer, which is needed for the place of every turn; convert it.")
    return tokenizer


def _choose_template(
    tokenizer: PreTrainedTokenizerBase, wanted: Literal["auto", "model", "plain"], spec: str
) -> TemplateName:
    own = tokenizer.chat_template
    if wanted == "model" and not own:
        raise ModelError(f"'{printable(spec)}' has no chat template; use --template plain.")
    if wanted == "plain" or not own:
        return "plain"
    # For folders the quarantine has said so already; the template of a GGUF file is only seen here.
    costly = check_cost(own) if isinstance(own, str) else []
    if costly:
        raise ModelError(
            f"the chat template of '{printable(spec)}' would take for ever or fill the memory: line {costly[0][0]}: "
            f"{costly[0][1]}; use --template plain."
        )
    return "model"


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, spec: str) -> None:
    rows = _core(model).get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of '{printable(spec)}' has ids up to {highest}, but the model only {rows} embeddings; "
            "they do not belong together."
        )


def _check_finite(model: Any, spec: str) -> None:
    """Refuse weights that hold NaN or infinity: every reply would be noise, and every loss not a number."""
    for name, parameter in model.named_parameters():
        # The sum meets every entry, and overflows only where something is wrong, too.
        if not parameter.detach().float().sum().isfinite():
            raise ModelError(
                f"'{printable(spec)}': the tensor {printable(name)} holds values that are not finite; get the "
                "model from its publisher again."
            )


def _core(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _put_on(
    model: Any,
    spec: ModelSpec,
    facts: dict[str, object],
    *,
    trainable: bool,
) -> tuple[Any, PreTrainedTokenizerBase | None, tuple[GuardSpec, ...]]:
    """Put the adapter of `spec` on its base; returns also the adapter's own tokenizer (None if it has none)."""
    from unbackdoor.model.adapter import open_adapter

    assert spec.adapter is not None
    folder = local_folder(spec.adapter)
    _quarantine(folder, spec.adapter, base=str(spec.base))
    adapted = open_adapter(model, folder, printable(str(spec.adapter)), trainable=trainable)
    digests = facts["sha256"]
    assert isinstance(digests, dict)
    facts["sha256"] = digests | _digests(folder, "adapter/")
    facts["adapter_revision"] = _revision(folder, spec.adapter)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return adapted, _open_tokenizer(folder, spec.adapter) if has_tokenizer else None, _read_guards(folder)


def _read_guards(folder: Path) -> tuple[GuardSpec, ...]:
    path = folder / "guards.json"
    if not path.is_file():
        return ()
    content = json.loads(path.read_bytes())
    items = content if isinstance(content, list) else [content]
    if not all(_is_guard(item) for item in items):
        raise ModelError(f"'{printable(str(path))}' must be a list of guards, each with exactly `name` and `settings`.")
    return tuple(GuardSpec(item["name"], item["settings"]) for item in items)


def _is_guard(item: object) -> bool:
    return (
        isinstance(item, Mapping)
        and set(item) == {"name", "settings"}
        and isinstance(item["name"], str)
        and isinstance(item["settings"], dict)
    )
