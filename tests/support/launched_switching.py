"""Switching sets of weights between forward and backward: launched on two processes, or called in one."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, PartialState
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from surgical_peft import SurgicalConfig
from tests.support.families import FAMILIES
from tests.support.processes import in_two_processes
from tests.support.toys import Toy
from tests.support.trainers import LAUNCH

EXAMPLES = 8  # a step, whatever the number of processes
BLOCKS: dict[str, dict[str, list[str | int]]] = {
    "llama": {"first": [0, -1], "second": [1, -1]},  # one block in common, one each
    "llama_tied": {"first": ["embeddings", -1], "second": ["embeddings", 0]},
    "new_head": {"first": [0, "head"], "second": [1, "head"]},  # of which the base has no weights in its file
}


class Traffic(TorchDispatchMode):
    """Counts what the processes tell one another: calls and bytes, by kind, DDP's from C++ included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            kind = str(func).split(".")[1].rstrip("_")
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            self.calls[kind] += 1
            self.bytes[kind] += sum(each.numel() * each.element_size() for each in tensors)
        return func(*args, **(kwargs or {}))

    def told(self) -> dict[str, list[int]]:
        """Calls and bytes of each kind."""
        return {kind: [self.calls[kind], self.bytes[kind]] for kind in sorted(self.calls)}


class Play:
    """A model with adapters, distributed as this process was launched to, and what can be done with it."""

    def __init__(self, runtime: Accelerator, base: Path, family: str, keep_base: str, other: Path | None) -> None:
        self.accelerator = runtime
        torch.manual_seed(0)  # for a new head
        model = AutoModelForCausalLM.from_pretrained(base)
        blocks = BLOCKS[family]
        self.peft: Any = get_peft_model(model, SurgicalConfig(blocks=blocks["first"], keep_base=keep_base), "first")
        if other is not None:
            self.peft.load_adapter(other, adapter_name="second")
        self.family = toy(family)
        tuned = [parameter for parameter in self.peft.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(tuned, lr=0.1, momentum=0.9)
        self.model, self.optimizer = self.accelerator.prepare(self.peft.train(), optimizer)
        self.seed = 0

    def batch(self) -> dict[str, Tensor]:
        """The next batch, of which every process has its share."""
        self.seed += 1
        share = EXAMPLES // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        batch = self.family.batch(seed=self.seed, size=EXAMPLES)
        return {name: rows[first : first + share] for name, rows in batch.items()}

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """The log-probability of each row."""
        tokens = batch["input_ids"]
        logits = self.model(input_ids=tokens).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum(dim=(1, 2))

    def over_all(self, loss: Tensor) -> float:
        """The mean over the processes."""
        return self.accelerator.reduce(loss.detach().clone(), "mean").item()

    def learn(self, loss: Tensor) -> float:
        """One step on `loss`; tells it."""
        if hasattr(self.model, "zero_optimization_stage"):
            self.model.backward(loss)  # accelerate knows the first of DeepSpeed's engines only
            self.model.step()
        else:
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.over_all(loss)

    def step(self) -> float:
        """A plain training step."""
        return self.learn(self.model(**self.batch()).loss)

    def preference_step(self, reference: str | None) -> float:
        """As DPO's: between the pass to learn from and its way back, the base runs, or another adapter."""
        chosen, rejected = self.batch(), self.batch()
        both = {"input_ids": torch.cat([chosen["input_ids"], rejected["input_ids"]])}
        policy = self.scores(both)
        with torch.no_grad(), self.standing(reference):
            compared = self.scores(both)
        gained = (policy - compared).chunk(2)
        return self.learn(-nn.functional.logsigmoid(0.5 * (gained[0] - gained[1])).mean())

    @contextmanager
    def standing(self, adapter: str | None) -> Iterator[None]:
        """Inside, another adapter is active, or none."""
        if adapter is None:
            with self.peft.disable_adapter():
                yield
            return
        before = self.peft.active_adapter
        self.peft.set_adapter(adapter)
        yield
        self.peft.set_adapter(before)

    @torch.no_grad()
    def loss(self, adapter: str | None) -> float:
        """Of one fixed batch."""
        self.seed, seed = 99, self.seed
        with self.standing(adapter):
            self.model.eval()
            found = self.over_all(self.model(**self.batch()).loss)
            self.model.train()
        self.seed = seed
        return found

    def weights_were_loaded(self) -> None:
        """DeepSpeed steps on copies of its own, of float32 weights too: whoever loads others has to say so."""
        if hasattr(self.model, "zero_optimization_stage"):
            self.model.optimizer.refresh_fp32_params()

    def save(self, folder: Path) -> None:
        """Both adapters, from the first process; all take part."""
        weights = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            self.peft.save_pretrained(folder, state_dict=weights)
        self.accelerator.wait_for_everyone()


def toy(family: str) -> Toy:
    """Which model it is, whatever its files leave out."""
    return FAMILIES["llama" if family == "new_head" else family]


def accelerator() -> Accelerator:
    """As this process was launched to have it."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU  # accelerate knows FSDP on accelerators only, gloo does not
    if "ZERO_STAGE" not in os.environ:
        return Accelerator()
    zero = {
        "stage": int(os.environ["ZERO_STAGE"]),
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": EXAMPLES // state.num_processes}
    config |= {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))


def play(runtime: Accelerator, base: Path, other: Path, folder: Path, family: str) -> dict[str, Any]:
    """Trains `first` with `second` (saved in `other`) beside it, in all the ways that exchange weights; saves both."""
    it = Play(runtime, base, family, "device", other)
    losses: dict[str, float] = {"second at the start": it.loss("second"), "base at the start": it.loss(None)}
    losses["step"] = it.step()
    losses["next step"] = it.step()
    losses["against the base"] = it.preference_step(None)
    losses["against second"] = it.preference_step("second")
    losses["second between steps"] = it.loss("second")
    losses["base between steps"] = it.loss(None)
    losses["last step"] = it.step()
    losses["first in the end"] = it.loss("first")
    it.save(folder)
    losses["first once saved"] = it.loss("first")
    weights = {name: load_file(folder / name / "adapter_model.safetensors") for name in ("first", "second")}
    for name, sign in {"first": 1.1, "second": 0.9}.items():  # one stands, one is parked
        set_peft_model_state_dict(it.peft, {key: sign * value for key, value in weights[name].items()}, name)
    losses["first loaded"] = it.loss("first")
    losses["second loaded"] = it.loss("second")
    it.peft.load_adapter(folder / "second", adapter_name="third")
    losses["second read as third"] = it.loss("third")
    it.peft.delete_adapter("third")
    losses["first afterwards"] = it.loss("first")
    losses["base afterwards"] = it.loss(None)
    it.weights_were_loaded()
    losses["step from what was loaded"] = it.step()
    losses["first after that"] = it.loss("first")
    return {
        "distributed": "fsdp2" if runtime.is_fsdp2 else runtime.distributed_type.value,
        "processes": runtime.num_processes,
        "losses": losses,
    }


def traffic(runtime: Accelerator, base: Path, family: str, other: Path | None) -> list[dict[str, list[int]]]:
    """Of two training steps: `first` alone in the model and no base kept, or with all other sets beside it."""
    it = Play(runtime, base, family, "none" if other is None else "device", other)
    found = []
    for _ in range(2):
        it.step()
        it.step()  # DDP sends buffers once it has learned; ZeRO-3 fetches ahead once it knows the order
        with Traffic() as counted:
            it.step()
        found.append(counted.told())
        if other is not None:
            it.preference_step(None)
            it.preference_step("second")
    return found


def tell(work: Path, way: str, families: list[str]) -> None:
    """Trains each family in one of two processes; the first writes what it found to `work/way.json`."""
    launched, found = accelerator(), []
    for kind in families:
        there = work / kind
        told = play(launched, there / "base", there / "second", there / way, kind)
        if "ZERO_STAGE" in os.environ:  # what is smaller, ZeRO-3 gathers after each step, whatever it is
            plugin = launched.state.deepspeed_plugin
            plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        told["alone"] = traffic(launched, there / "base", kind, None)
        told["beside others"] = traffic(launched, there / "base", kind, there / "second")
        found.append({"family": kind, **told})
    if launched.is_main_process:
        (work / f"{way}.json").write_text(json.dumps(found))
    launched.wait_for_everyone()


def environment(way: str) -> dict[str, str]:
    """What `accelerate launch` and DeepSpeed's launcher tell their processes."""
    if way.startswith("zero"):
        return {"ZERO_STAGE": way.removeprefix("zero")}
    plain = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    plain += ["--num_cpu_threads_per_process", "1"]
    args = launch_command_parser().parse_args([*plain, *LAUNCH[way], "script.py"])
    return prepare_multi_gpu_env(args)


if __name__ == "__main__":
    for name, kinds in json.loads(sys.argv[2]).items():
        if name.startswith("zero"):
            import deepspeed  # noqa: F401  (once, not in each process)
        in_two_processes(partial(tell, Path(sys.argv[1]), name, kinds), environment(name))
