"""The table of methods: what a recipe names, and what an adapter directory is of."""

from collections.abc import Mapping
from typing import Annotated

from puna.config import Kinds
from puna.peft.adalora import AdaLoRAConfig
from puna.peft.bitfit import BitFitConfig
from puna.peft.bottleneck import BottleneckConfig
from puna.peft.ia3 import IA3Config
from puna.peft.lora import LoRAConfig
from puna.peft.method import Method
from puna.peft.partial import PartialConfig
from puna.peft.prefix import PrefixConfig
from puna.peft.prompt import PromptConfig

METHODS: Mapping[str, type[Method]] = {
    method.kind: method
    for method in (
        LoRAConfig,
        AdaLoRAConfig,
        IA3Config,
        BitFitConfig,
        BottleneckConfig,
        PrefixConfig,
        PromptConfig,
        PartialConfig,
    )
}
"""Name in a recipe -> its settings."""

METHOD_KINDS = Kinds("method", {kind: f"{method.__module__}:{method.__name__}" for kind, method in METHODS.items()})

AnyMethod = Annotated[Method | None, METHOD_KINDS]
"""The type of a setting such as `peft = { kind = "lora", rank = 8 }` of a recipe; with None as its default, the table
may be absent."""
