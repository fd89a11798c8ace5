"""A pretended second device, so that a machine without a GPU finds tensors that were left on the CPU.

Inside `Elsewhere()` tensors that are made on "cuda" or moved there lie on the CPU in truth, but say that they do not,
and an operation on tensors of both devices raises, as it would on a GPU. Not checked: kernels, and what autograd does
by itself.
"""

from __future__ import annotations

from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
_MARK = "_is_elsewhere"
_PLACES = (str, torch.device)
_MAY_MIX = {"to", "copy_", "type_as", "__set__", "_has_compatible_shallow_copy_type"}
_INDEXING = ("__getitem__", "__setitem__", "index_put")


class Elsewhere(TorchFunctionMode):
    """The mode; `there(model)` puts a model on the device."""

    def __enter__(self) -> Self:
        """Begin; a parameter is made without an operation, so that it is told of here."""
        new = nn.Parameter.__new__

        def marking(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
            made = new(cls, data, requires_grad)
            _mark(made, data is not None and _there(data))
            return made

        self.patch = mock.patch.object(nn.Parameter, "__new__", marking)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End; what is there stays marked, which nothing asks for any more."""
        super().__exit__(*error)
        self.patch.stop()

    def there(self, model: nn.Module) -> None:
        """Put a model's weights and buffers on the device."""
        for tensor in (*model.parameters(), *model.buffers()):
            _mark(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation on the CPU, after the devices of what it takes were compared."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return DEVICE if _there(args[0]) else func(*args, **kwargs)
        if func == Tensor.is_cuda.__get__:
            return _there(args[0])
        if name == "_parse_to":
            return func(*args, **kwargs)
        if name == "numpy" and _there(args[0]):
            raise TypeError("a tensor of another device cannot become a numpy array")
        there = _goes_there(name, args, kwargs)
        # The second argument of a copy is what was copied before, and is added to.
        given = (args, kwargs) if name == "__deepcopy__" else tree_map_only(_PLACES, _home, (args, kwargs))
        made = func(*given[0], **given[1])
        if func == Tensor.data.__set__:
            made, there = args[0], _there(args[1])
        elif isinstance(made, Tensor) and any(made is given for given in args) and _there(made) != there:
            made = made.clone()  # a move, which is none on the CPU
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                _mark(tensor, there)
        return made


def _goes_there(name: str, args: Any, kwargs: Any) -> bool:
    """Tell where the result is; raise where operands are on both devices."""
    leaves = tree_leaves(args[0] if name == "__deepcopy__" else (args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    words = [leaf for leaf in leaves if isinstance(leaf, _PLACES)]
    named = [word for word in words if str(word).partition(":")[0] in ("cpu", "cuda")]
    if name in ("cpu", "cuda"):
        return name == "cuda"
    if name == "to" and len(tensors) > 1:
        return _there(tensors[1])
    if named:
        return torch.device(named[-1]).type == "cuda"
    places = [_there(tensor) for tensor in tensors]
    if not places or name in _MAY_MIX:
        return bool(places) and places[0]
    # A number in a tensor may be on the CPU, and so may what indexes a tensor elsewhere.
    bound = [there for tensor, there in zip(tensors, places, strict=True) if tensor.dim()]
    if name.startswith(_INDEXING) and places[0]:
        indices = {id(leaf) for leaf in tree_leaves(args[1])}
        bound = [_there(tensor) for tensor in tensors if tensor.dim() and id(tensor) not in indices]
    if len(set(bound)) > 1:
        raise RuntimeError(f"{name}: tensors are on two devices: {places}")
    return any(places)


def _home(place: str | torch.device) -> str | torch.device:
    return torch.device("cpu") if isinstance(place, torch.device) else "cpu" if place.startswith("cuda") else place


def _mark(tensor: Tensor, there: bool = True) -> None:
    object.__setattr__(tensor, _MARK, there)


def _there(tensor: Tensor) -> bool:
    return bool(getattr(tensor, _MARK, False))
