"""Weight updates of vLLM: sends each tensor under the name that vLLM knows, and proves that it arrived.

vLLM rounds weights to its dtype, stacks some projections in one parameter and packs layouts for its kernels. It neither
reports which tensors it ignored nor which copies it did not refresh. So every tensor is compared with the weights that
vLLM computes with afterwards, by fingerprints of the bits in vLLM's dtype. A comparison of log-probs cannot do this: in
bfloat16, rounding changes them more than a whole optimizer step with a small learning rate does.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

MAX_ELEMENTS = 1 << 26  # that are hashed at a time; the temporaries take 8 bytes each
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
LAYER = re.compile(r"(?:.*?\.\d+\.)?")  # the prefix that the parameters of a decoder layer share
EXPERT = re.compile(r"(.+\.experts)\.(?:(\d+)\.|[^.]+$)")  # as sent: experts.3.gate_proj.weight, or all experts in one
EXPERTS = re.compile(r"(.+\.experts)\.(?:routed_experts\.)?w(?:13|2)_")  # in vLLM: experts.routed_experts.w13_weight


def fingerprints(weight: torch.Tensor) -> torch.Tensor:
    """A hash of the elements' bits, summed over all dimensions but the first: [N, ...] -> [N] int64, on the CPU.

    The order of the elements does not matter, because kernels may need another layout, and zeros add nothing, because
    kernels may pad with them.
    """
    weight = torch.atleast_1d(weight.detach())
    rows, sums = weight.reshape(len(weight), -1), []
    for block in rows.split(max(1, MAX_ELEMENTS // max(1, rows.shape[1]))):
        bits = (block + 0.0).view(BITS[block.dtype]).int()  # adding 0 turns -0.0 into 0.0
        bits = bits * -1640531527  # odd constants; products are modulo 2^32
        bits ^= bits >> 15
        bits *= -2048144777
        sums.append(bits.sum(1, dtype=torch.int64))
    return torch.cat(sums).cpu()


class WeightPush:
    """One weight update: `send` the parameters to vLLM, then ask for the `faults` of what arrived.

    model: the model of vLLM. Its `packed_modules_mapping` names the projections that it stacks, in their order.
    skeleton: a Hugging Face model of the trainer's architecture; it needs no weights.
    """

    def __init__(self, model: torch.nn.Module, skeleton: PreTrainedModel) -> None:
        self.skeleton = skeleton
        self.mapper = getattr(model, "hf_to_vllm_mapper", None)
        packed = getattr(model, "packed_modules_mapping", {})
        self.stacked = {part: (whole, i) for whole, parts in packed.items() for i, part in enumerate(parts)}
        parameters, first = dict(model.named_parameters(remove_duplicate=False)), {}
        self.targets = {name: _target(first.setdefault(id(p), name)) for name, p in parameters.items()}
        self.dtypes = {self.targets[name]: p.dtype for name, p in parameters.items()}
        self.received: set[str] = set()
        self.unplaced: list[str] = []
        # target -> {index in the stack: [rows, fingerprint]}
        self.sent: dict[str, dict[int, list[int]]] = defaultdict(dict)

    def send(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parameters as `save_pretrained` would write them: for example, each expert by itself."""
        for _, layer in itertools.groupby(named_parameters, lambda item: LAYER.match(item[0])[0]):
            weights = {name: parameter.detach() for name, parameter in layer}
            self.received |= weights.keys()
            for name, weight in revert_weight_conversion(self.skeleton, weights).items():
                if self._record(name, weight):
                    yield name, weight

    def _record(self, name: str, weight: torch.Tensor) -> bool:
        """Note the fingerprint of a tensor that is about to be sent. False if vLLM has no place for it."""
        target, index = self._place(name)
        if target is None:
            self.unplaced.append(name)
            return False
        sums = fingerprints(weight.to(self.dtypes[target]))
        rows = 1 if target.endswith(".experts") else len(sums)
        totals = sums if index is None else sums.sum(0, keepdim=True)
        for i, total in enumerate(totals.tolist(), index or 0):
            part = self.sent[target].setdefault(i, [rows, 0])
            part[1] += total
        return True

    def _place(self, name: str) -> tuple[str | None, int | None]:
        """Where a tensor must arrive: target and index in its stack, which is None for a tensor of all experts."""
        mapped = self.mapper.map_name(name) if self.mapper else name
        if mapped is None:  # vLLM ignores it
            return None, 0
        expert = EXPERT.match(mapped)
        if expert and expert[1] in self.dtypes:
            return expert[1], int(expert[2]) if expert[2] else None
        return self.targets.get(self._stack(mapped)[0]), self._stack(name)[1]

    def _stack(self, name: str) -> tuple[str, int]:
        """The name of the parameter that contains a projection, and the index of the projection in it."""
        for part, (whole, index) in self.stacked.items():
            if f".{part}." in name:
                return name.replace(f".{part}.", f".{whole}."), index
        return name, 0

    def faults(self, arrived: Iterable[tuple[str, torch.Tensor]]) -> str:
        """What is wrong with the weights that vLLM computes with, with the names of some parameters; '' if nothing is.

        arrived: (name in vLLM, weight) of each parameter; several times if vLLM has several copies.
        """
        found: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, weight in arrived:
            target, sums = self.targets[name], fingerprints(weight)
            if target.endswith(".experts") and found[target]:
                found[target][0] += sums
            else:
                found[target].append(sums)
        expected = {name for name, _ in self.skeleton.named_parameters()}
        wrong = [t for t in self.sent if not found[t] or not all(_equal(self.sent[t], sums) for sums in found[t])]
        kinds = {
            "not sent": expected - self.received,
            "not a parameter of the model": self.received - expected,
            "no such parameter in vLLM": self.unplaced,
            "nothing arrived": self.dtypes.keys() - self.sent.keys(),
            "not what was sent": wrong,
        }
        return "; ".join(f"{kind}: {_listing(names)}" for kind, names in kinds.items() if names)


def _target(name: str) -> str:
    """The unit that is compared: all weights of an experts layer together, else a parameter of vLLM."""
    experts = EXPERTS.match(name)
    return experts[1] if experts else name


def _equal(parts: dict[int, list[int]], sums: torch.Tensor) -> bool:
    """Whether the fingerprints `sums` [N] of a parameter of vLLM are those of the tensors stacked in it."""
    if len(parts) == 1:  # vLLM may have transposed it
        return sums.sum().item() == next(iter(parts.values()))[1]
    rows, totals = zip(*(parts[i] for i in sorted(parts)), strict=True)
    return sum(rows) == len(sums) and [part.sum().item() for part in sums.split(rows)] == list(totals)


def _listing(names: Iterable[str], most: int = 3) -> str:
    """The first names in order, and how many others there are."""
    names = sorted(names)
    others = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + others
