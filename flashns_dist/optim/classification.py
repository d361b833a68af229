"""Which parameters are matrices to orthogonalize, and which are auxiliary."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from flashns_dist.layout import Equal, Flattened, MatrixView, view_blocks
from flashns_dist.optim.binding import full_shape
from flashns_dist.optim.rules import AUXILIARY_RULES, RULES

_EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|word_embeddings|pos_emb\w*|tok_emb\w*)($|[._])")
_TOKENS = re.compile(r"_tokens?$")
_HEAD = re.compile(
    r"(^|\.)(lm_head|head|output_layer|unembed\w*|embed_out|classifier|score|logits)$"
    r"|^((?!\d+\.)[^.]+\.)*output$"  # not in a numbered layer
    r"|^(module\.)?fc$"
)
_ROUTER = re.compile(r"(^|\.)(router|gating|wg|score_gate)(\.|$)")
_GATE = re.compile(r"^((?!experts?\.)[^.]+\.)*gate(\.|$)")  # not an expert's own
_GATE_UP = re.compile(r"(^|\.)gate_up_proj$")
_FUSED = re.compile(
    r"(^|[._])(w?qkv\w*|query_key_value|c_attn|in_proj|kv_b_proj|gate_up\w*|w13)$", re.IGNORECASE
)
_WRAPPER = re.compile(r"(^|\.)_(orig_mod|checkpoint_wrapped_module)(?=\.|$)")  # torch's own
_NORM = re.compile(r"(^|[._])(\w*norm|ln|ln_\w+)$")


@dataclass(frozen=True)
class Decision:
    """Where one parameter goes and why; ``view`` says which parts of it are matrices."""

    name: str
    param: Tensor
    update_rule: str
    reason: str
    view: MatrixView | None = None


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups for FlashMuon, and the decisions that made them."""

    def __init__(self, groups: list[dict[str, Any]], decisions: list[Decision]) -> None:
        super().__init__(groups)
        self.decisions = decisions

    def table(self) -> str:
        """What goes where and why, one line per kind of parameter (layer numbers as ``*``)."""
        rows: dict[tuple[str, str, str, tuple[int, ...]], int] = {}
        for d in self.decisions:
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", d.name)
            reason = d.reason if d.view is None else f"{d.reason}: {d.view}"
            key = (d.update_rule, pattern, reason, full_shape(d.param))
            rows[key] = rows.get(key, 0) + 1
        cells = [("update rule", "parameters", "count", "shape", "numel", "reason")]
        for (rule, pattern, reason, shape), count in sorted(rows.items(), key=lambda r: r[0][0]):
            numel = count
            for size in shape:
                numel *= size
            shown = " x ".join(map(str, shape)) or "scalar"
            cells.append((rule, pattern, str(count), shown, f"{numel:,}", reason))
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        lines = [
            "  ".join([*(row[i].ljust(widths[i]) for i in range(5)), row[5]]).rstrip()
            for row in cells
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join(lines)


def parameter_groups(
    model: nn.Module,
    *,
    overrides: Mapping[str, str] | None = None,
    matrix_views: Mapping[str, MatrixView | None] | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    aux_lr: float | None = None,
    aux_weight_decay: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    aux_update_rule: str = "adamw",
    print_table: bool = False,
) -> ParameterGroups:
    """Sort a model's trainable parameters into matrices (Muon) and auxiliary ones (AdamW).

    Auxiliary are: everything below two dims or with a dim of one (norms, scalars), biases of any
    shape, embeddings and learned tokens, output heads (by name, tied to an embedding, or an
    ``nn.Linear`` with as many outputs as an embedding has rows: where that is a hidden width too,
    only the one that has them), routers (a ``gate`` outside of experts with fewer rows than columns
    is one), Mamba's ``A_log``, and convolutions. All other 2-D parameters, and 3-D stacks of expert
    matrices, are orthogonalized. Works before and after sharding (DTensors keep their global
    shape), but not on the flat parameters of ``FullyShardedDataParallel``: use ``fully_shard``.

    Which parts of a fused weight are matrices is found where it is certain: the projections of
    ``nn.MultiheadAttention``, the gates of ``nn.LSTM`` and ``nn.GRU`` (and their cells), a
    ``gate_up_proj``, and convolutions where an override makes them matrices. For others the table
    says that their names look fused: declare them.

    Args:
        model: Any module; tied parameters are counted once.
        overrides: From a name pattern (as in ``fnmatch``, over full parameter names) to ``"muon"``
            (a matrix), ``"adamw"``, another update rule or ``"frozen"`` (left out); the first that
            matches decides.
        matrix_views: From a name pattern to the view (of ``flashns_dist.layout``) of parameters
            that hold several matrices, or None for one that holds a single one; the first that
            matches decides. What has a declared view is orthogonalized, unless an override says
            otherwise.
        lr, weight_decay: For the matrices, where FlashMuon's own arguments are not to be used.
        aux_lr, aux_weight_decay, betas, eps: For the auxiliary parameters, likewise.
        aux_update_rule: Of the auxiliary parameters: ``"adamw"`` or ``"lion"``.
        print_table: Print ``table()``.

    Returns:
        One group per update rule that has parameters, with ``param_names`` and, for the views,
        ``matrix_view``; ``table()`` explains. The group of ``"muon"`` names no rule: it gets
        FlashMuon's ``update_rule``.

    Raises:
        ValueError: An override names an unknown rule, a pattern matches nothing, a view does not
            fit its parameter, or the model is sharded by ``FullyShardedDataParallel``.
    """
    if aux_update_rule not in tuple(AUXILIARY_RULES):
        raise ValueError(f"aux_update_rule={aux_update_rule!r}: use one of {list(AUXILIARY_RULES)}")
    overrides = _by_pattern("overrides", overrides)
    for pattern, rule in overrides.items():
        if rule not in (*RULES, "frozen"):
            known = ", ".join(f'"{name}"' for name in RULES)
            raise ValueError(f'overrides[{pattern!r}]={rule!r}: use {known} or "frozen"')
    views = _by_pattern("matrix_views", matrix_views)
    _refuse_flat_parameters(model)
    decisions = _decide(model, overrides, views)
    for kind, patterns in (("overrides", overrides), ("matrix_views", views)):
        unused = [p for p in patterns if not any(fnmatchcase(d.name, p) for d in decisions)]
        if unused:
            raise ValueError(f"{kind} {unused} match no trainable parameter of the model")
    of_matrices = {"lr": lr, "weight_decay": weight_decay}
    of_others = {"lr": aux_lr, "weight_decay": aux_weight_decay, "betas": betas, "eps": eps}
    groups = []
    for rule in RULES:
        chosen = [d for d in decisions if d.update_rule == rule]
        if chosen:
            given = of_others if rule in AUXILIARY_RULES else of_matrices
            named = [(d.name, d.param) for d in chosen]
            values: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
            found = {d.name: d.view for d in chosen if d.view is not None}
            if found:
                values["matrix_view"] = found
            if rule != "muon":
                values["update_rule"] = aux_update_rule if rule == "adamw" else rule
            groups.append({"params": named, **values})
    result = ParameterGroups(groups, decisions)
    if print_table:
        print(result.table())
    return result


def _by_pattern(argument: str, given: Any) -> dict[str, Any]:
    """A mapping from name patterns, as a dict of its own.

    Raises:
        ValueError: It is none.
    """
    try:
        found = dict(given or {})
    except (TypeError, ValueError):
        found = {None: given}
    if not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(
            f"{argument}={given!r} must map name patterns to values, as "
            '{"*.attention.*.weight": ...}'
        )
    return found


def _refuse_flat_parameters(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # half a second to import
    if fsdp is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"{name or 'the model'}: FullyShardedDataParallel flattens parameters, so that no "
                "matrix is left to find. Shard with torch.distributed.fsdp.fully_shard instead"
            )


def _decide(
    model: nn.Module, overrides: Mapping[str, str], views: Mapping[str, MatrixView | None]
) -> list[Decision]:
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    embedded = {
        id(param)
        for module in embeddings
        for name, param in module.named_parameters()
        if name == "weight" or name.startswith("parametrizations.weight.")
    }
    widths = _head_widths(model, embeddings)
    modules = dict(model.named_modules())
    decisions: list[Decision] = []
    for module_name in modules:
        for stored_name, param in modules[module_name].named_parameters(recurse=False):
            name = f"{module_name}.{stored_name}" if module_name else stored_name
            if not param.requires_grad or any(d.param is param for d in decisions):
                continue
            owner_name, local_name = _owner(modules, module_name, stored_name)
            module, inner = modules[owner_name], _WRAPPER.sub("", owner_name)
            rule, reason = _classify(inner, module, local_name, param, embedded, widths)
            view = _find_view(inner, module, local_name, param)
            declared = next((p for p in views if fnmatchcase(name, p)), None)
            if declared is not None:
                view = views[declared]
                if view is not None:
                    rule, reason = "muon", f"declared by {declared!r}"
            for pattern, chosen in overrides.items():
                if fnmatchcase(name, pattern):
                    rule, reason = chosen, f"override {pattern!r}"
                    break
            if rule in AUXILIARY_RULES or rule == "frozen":
                view = None
            elif view is not None:
                view_blocks(name, full_shape(param), view)
            elif declared is None and _FUSED.search(_full_name(inner, local_name)):
                reason += ", fused by its name: see matrix_views"
            decisions.append(Decision(name, param, rule, reason, view))
    return decisions


def _owner(modules: Mapping[str, nn.Module], module_name: str, local_name: str) -> tuple[str, str]:
    """The name of the module that uses a parameter, and of the parameter there.

    A parametrized ``conv.weight`` is stored as ``conv.parametrizations.weight.original0``, ...
    """
    if not isinstance(modules[module_name], ParametrizationList):
        return module_name, local_name
    parametrizations, _, local_name = module_name.rpartition(".")
    return parametrizations.rpartition(".")[0], local_name


def _head_widths(
    model: nn.Module, embeddings: Sequence[nn.Embedding | nn.EmbeddingBag]
) -> set[int]:
    """Numbers of outputs that make an nn.Linear a head: those of an embedding's rows.

    There may be as many positions as the model is wide: a hidden width makes a head only of the one
    nn.Linear that has as many outputs.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hidden = {m.in_features for m in linears} | {m.embedding_dim for m in embeddings}
    outputs = Counter(m.out_features for m in linears)
    widths = {m.num_embeddings for m in embeddings}
    return {width for width in widths if width not in hidden or outputs[width] == 1}


def _find_view(
    module_name: str, module: nn.Module, local_name: str, param: Tensor
) -> MatrixView | None:
    """The view of a parameter whose module leaves no doubt about it."""
    if isinstance(module, _ConvNd) and local_name == "weight":
        return Flattened(module.groups)
    if isinstance(module, nn.MultiheadAttention) and local_name == "in_proj_weight":
        return Equal(3)
    if local_name.startswith(("weight_ih", "weight_hh")):
        if isinstance(module, nn.LSTM | nn.LSTMCell):
            return Equal(4)
        if isinstance(module, nn.GRU | nn.GRUCell):
            return Equal(3)
    if isinstance(module, nn.Linear) and local_name == "weight" and _GATE_UP.search(module_name):
        return Equal(2)
    return None


def _full_name(module_name: str, local_name: str) -> str:
    full = f"{module_name}.{local_name}" if local_name != "weight" else module_name
    return full.lstrip(".")  # of the model itself, or where a wrapper's name was


def _classify(
    module_name: str,
    module: nn.Module,
    local_name: str,
    param: Tensor,
    embedded: set[int],
    widths: set[int],
) -> tuple[str, str]:
    """(update rule, reason) of one parameter."""
    shape = full_shape(param)
    if id(param) in embedded:
        return "adamw", "embedding"
    if local_name.endswith(("bias", "biases", "bias_table")):
        return "adamw", "bias"
    if len(shape) < 2:
        return "adamw", "norm or scalar"
    if min(shape[-2:]) == 1:
        return "adamw", "a vector in shape"
    if len(shape) > 3 or isinstance(module, _ConvNd):
        return "adamw", "convolution"
    full = _full_name(module_name, local_name)
    if _EMBEDDING.search(full) or _TOKENS.search(local_name):
        return "adamw", "embedding by name"
    if _NORM.search(module_name):
        return "adamw", "norm by name"
    if local_name == "A_log":
        return "adamw", "decay by name"
    is_low = len(shape) == 2 and shape[0] < shape[1]
    if _ROUTER.search(full) or (is_low and _GATE.search(full)):
        return "adamw", "router by name"
    if _HEAD.search(full):
        return "adamw", "output head by name"
    if len(shape) == 2 and isinstance(module, nn.Linear) and module.out_features in widths:
        return "adamw", "output head: as wide as an embedding"
    return "muon", "stack of matrices" if len(shape) == 3 else "matrix"
