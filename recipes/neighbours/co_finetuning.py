"""Co-finetuning: old and new data in every epoch, and only the chosen blocks are tuned.

Arnab et al. 2022, "Beyond Transfer Learning: Co-finetuning for Action Localisation" (arXiv 2207.03807), train one
model on "upstream" and "downstream" tasks at once. Here both have the same classes and share the head; tasks with
classes of their own need a head each, see `auxiliary_head.py`.

    python recipes/neighbours/co_finetuning.py
    python recipes/neighbours/co_finetuning.py --max-steps 2
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.utils.data import ConcatDataset
from transformers import Trainer

from surgical_peft import SurgicalCallback, SurgicalConfig, get_surgical_model, surgical_optimizer
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.tasks import load_task

RECIPES = Path(__file__).parents[1]
SPLITS = ("train", "validation")


def co_finetune(recipe: Recipe, upstream: Recipe) -> tuple[nn.Module, dict[str, float]]:
    """Tune the blocks of `recipe` on its data and those of `upstream` together; the accuracy on each, too."""
    tasks = {"downstream": load_task(recipe, SPLITS), "upstream": load_task(upstream, SPLITS)}
    args = recipe.arguments()
    model = get_surgical_model(tasks["downstream"].load_model(), SurgicalConfig(blocks=recipe.blocks))
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=ConcatDataset([task.splits["train"] for task in tasks.values()]),
        data_collator=tasks["downstream"].collate,
        optimizer_cls_and_kwargs=surgical_optimizer(args, recipe.make_policy()),
        callbacks=[SurgicalCallback()],
    )
    trainer.train()
    return model, {name: task.measure(model, task.splits["validation"]) for name, task in tasks.items()}


def main(arguments: list[str] | None = None) -> tuple[nn.Module, dict[str, float]]:
    """Noisy images, and clean ones of the kind that the model was trained on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-steps", type=int, default=-1)
    steps = parser.parse_args(arguments).max_steps
    recipe = load_recipe(RECIPES / "noise.yaml")
    recipe = replace(recipe, training={**recipe.training, "max_steps": steps, "output_dir": "runs/co_finetuning"})
    clean = replace(recipe, data=str(RECIPES / "fashion_mnist" / "target-1"), corruption=None)
    model, accuracies = co_finetune(recipe, clean)
    for name, accuracy in accuracies.items():
        print(f"{name}: {accuracy:.1%}")
    return model, accuracies


if __name__ == "__main__":
    main()
