"""LLaMA-Factory: `finetuning_type: freeze`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from ...errors import SurgicalError
from .choice import Choice, Emission, quoted

_HEAD = ("language_model", "lm_head")
_VISUAL = ("visual.pos_embed", "visual.patch_embed", "visual.blocks")
_DEEP = (*_VISUAL, "visual.deepstack_merger_list")
_PROJECTOR = ("multi_modal_projector",)
_TOWERS: dict[str, tuple[tuple[str, ...], ...]] = {  # model types: keys of projector, vision tower, language model
    "gemma3 internvl interns1 kimi_vl llava llava_next llava_next_video paligemma video_llava": (
        *(_PROJECTOR, ("vision_tower",), _HEAD),
    ),
    "gemma3n": (_PROJECTOR, ("vision_tower", "audio_tower"), _HEAD),
    "gemma4": (("model.embed_vision", "model.embed_audio"), ("vision_tower", "audio_tower"), _HEAD),
    "glm4v glm4v_moe glm_ocr qwen2_vl qwen2_5_vl": (("visual.merger",), _VISUAL[1:], _HEAD),
    "llama4 mllama": (_PROJECTOR, ("vision_model",), _HEAD),
    "mistral3": (("model.multi_modal_projector",), ("vision_tower",), _HEAD),
    "qwen2_audio": (_PROJECTOR, ("audio_tower",), _HEAD),
    "qwen2_5_omni_thinker": (
        *(("visual.merger", "audio_tower.proj"), (*_VISUAL[1:], "audio_tower"), ("model", "lm_head")),
    ),
    "qwen3_vl qwen3_vl_moe": (("visual.merger",), _DEEP, _HEAD),
    "qwen3_omni_moe_thinker": (("visual.merger", "audio_tower.proj"), (*_DEEP, "audio_tower"), _HEAD),
    "qwen3_5 qwen3_5_moe": (("model.visual.merger",), _VISUAL, _HEAD),
    "moss_vl": (
        *(("model.visual.merger", "model.separator_token"), tuple(f"model.{key}" for key in _VISUAL)),
        ("model.language_model", "lm_head"),
    ),
    "dots_ocr": (("vision_tower.merger",), ("vision_tower",), ("model", "lm_head")),
    "Keye": (
        *(("mlp_AR",), ("visual.vision_model.patch_embedding", "visual.vision_model.encoder"), ("model", "lm_head")),
    ),
    "minicpmv": (("resampler",), ("vpm",), ("llm",)),
    "minicpmv4_6": (("model.merger",), ("model.vision_tower",), ("model.language_model", "lm_head")),
    "minicpmo": (("resampler",), ("vpm", "apm", "audio_avg_pooler", "audio_projection_layer", "tts"), ("llm",)),
}
_TOWERS_OF = {kind: keys for kinds, keys in _TOWERS.items() for kind in kinds.split()}
_FROZEN = ("freeze_multi_modal_projector", "freeze_vision_tower", "freeze_language_model")


def llama_factory(choice: Choice) -> Emission:
    """YAML for `llamafactory-cli train`: first or last layers, or evenly strided ones, and modules inside them.

    The tool looks for `.3.` and `.3.self_attn` anywhere in a name, and for extra modules too, so that `norm` is also
    every layer's norms. Of all its settings those are taken that come nearest, counted in parameters; what is left out
    counts twice.

    Source: LLaMA-Factory 0.9.6.dev0, `_setup_freeze_tuning` in src/llamafactory/model/adapter.py,
    `get_forbidden_modules` and the towers of `COMPOSITE_MODELS` in src/llamafactory/model/model_utils/visual.py,
    https://github.com/hiyouga/LLaMA-Factory at ff6d4d1.

    Raises:
        SurgicalError: the model is no language model, has LoRA besides, or its config does not tell its layers.
    """
    choice.check_weights_of_language_model("LLaMA-Factory")
    sizes = {name: parameter.numel() for name, parameter in choice.model.named_parameters()}
    names = _Names(choice)

    def distance(settings: dict[str, Any]) -> tuple[bool, int]:
        trained = names.trained(settings)
        less, more = choice.parameters - trained, trained - choice.parameters
        return not choice.parameters & trained, sum(sizes[n] for n in more) + 2 * sum(sizes[n] for n in less)

    settings = min(names.candidates(choice.parameters), key=distance)
    head = choice.header("LLaMA-Factory 0.9.6.dev0 (ff6d4d1): add it to your config")
    values = {"model_name_or_path": quoted(choice.source), "finetuning_type": "freeze"}
    written = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
    text = head + "".join(f"{key}: {value}\n" for key, value in (values | written).items())
    line = ", ".join(f"{key}: {value}" for key, value in written.items())
    return Emission(text, "llama_factory.yaml", line, names.trained(settings))


class _Names:
    """The names of a model's parameters as the tool sees them.

    Attributes:
        names: of all.
        layers: number of layers, by the config.
        towers: keys of projector, vision tower and language model, if the tool knows that the model has them.
        hidden: what it takes for modules in layers.
        outside: what it takes for modules elsewhere.
    """

    def __init__(self, choice: Choice) -> None:
        config: Any = choice.model.config
        text_config = getattr(config, "text_config", config)
        counts = [getattr(text_config, key, None) for key in ("num_hidden_layers", "num_layers", "n_layer")]
        if not any(counts):
            raise SurgicalError(f"LLaMA-Factory finds no number of layers in the config of {choice.source!r}.")
        self.layers: int = next(count for count in counts if count)
        self.names = choice.names
        marks = [next((mark for mark in (".0.", ".1.") if mark in name), None) for name in self.names]
        pairs = [(name, mark) for name, mark in zip(self.names, marks, strict=True) if mark]
        self.hidden = {name.split(mark)[-1].split(".")[0] for name, mark in pairs}
        self.outside = _outside(self.names)
        self.towers = _TOWERS_OF.get(config.model_type, ())
        self._with_key: dict[str, frozenset[str]] = {}

    def having(self, keys: Iterable[str]) -> set[str]:
        """The names that have one of the keys anywhere."""
        found: set[str] = set()
        for key in keys:
            if key not in self._with_key:
                self._with_key[key] = frozenset(name for name in self.names if key in name)
            found |= self._with_key[key]
        return found

    def candidates(self, chosen: frozenset[str]) -> Iterator[dict[str, Any]]:
        """Settings that may come near the choice, the plainest first."""
        towers = dict(zip(_FROZEN, (not self.having(keys) & chosen for keys in self.towers), strict=False))
        inside = {n.split(f".{i}.")[-1].split(".")[0] for n in chosen for i in re.findall(r"\.(\d+)\.", n)[-1:]}
        needed = _outside(chosen) & self.outside
        sure = {key for key in needed if self.having([key]) <= chosen}
        extras = {tuple(sorted(keys)) for keys in (needed, sure, ())}
        options = {("all",), tuple(sorted(inside & self.hidden)) or ("all",)}
        counts = [(count, False) for count in (0, *range(1, self.layers + 1), *range(-1, -self.layers, -1))]
        strided = [(count, True) for count in range(2, self.layers) if self.layers % count == 0]
        for (count, is_strided), modules, extra in product(counts + strided, sorted(options), sorted(extras)):
            settings = {"freeze_trainable_layers": count, "freeze_trainable_modules": ",".join(modules)}
            settings |= {"freeze_extra_modules": ",".join(extra)} if extra else {}
            yield settings | ({"use_llama_pro": True} if is_strided else {}) | towers

    def trained(self, settings: dict[str, Any]) -> frozenset[str]:
        """The names of what the tool trains."""
        count, modules = settings["freeze_trainable_layers"], settings["freeze_trainable_modules"].split(",")
        layers = range(self.layers - count, self.layers) if count > 0 else range(-count)
        if settings.get("use_llama_pro"):
            stride = self.layers // count
            layers = range(stride - 1, self.layers, stride)
        wanted = [f".{layer}.{'' if module == 'all' else module}" for layer in layers for module in modules]
        wanted += [key for key in settings.get("freeze_extra_modules", "").split(",") if key]
        if self.towers and not settings["freeze_multi_modal_projector"]:
            wanted += self.towers[0]
        frozen = [key for name, keys in zip(_FROZEN, self.towers, strict=False) if settings[name] for key in keys]
        return frozenset(self.having(wanted) - self.having(frozen))


def _outside(names: Iterable[str]) -> set[str]:
    """What the tool takes for the modules outside of layers."""
    return {name.split(".")[-2] for name in names if not re.search(r"\.\d+\.", name) and "." in name}
