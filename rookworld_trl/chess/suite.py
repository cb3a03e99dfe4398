"""How suites ask a model.

A suite is a function of a way to ask (`Ask`: prompts in, completions out) and of what it measures on; it returns a
`Result`. `ModelAnswers` asks a model; what trivial players answer is a plain function.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from rookworld_trl.chess import task_of
from rookworld_trl.modeling.completions import complete, fitting_length
from rookworld_trl.settings.terminal import progress_bar

Ask = Callable[[Sequence[str], str], list[str]]  # prompts of one task, and the title of a progress bar


@dataclass(frozen=True, slots=True)
class ModelAnswers:
    """Asks a model, one completion a prompt; an `Ask`.

    Attributes:
        temperature: by task; 0 for greedy.
        max_new_tokens: at most; less where the prompts leave less of the model's context.
        batch_size: prompts decoded at a time. Equal prompts get different samples only within one batch.
    """

    model: PreTrainedModel
    tokenizer: Any
    temperature: Mapping[str, float]
    max_new_tokens: int
    batch_size: int = 64
    seed: int = 0
    progress: bool = False

    def __call__(self, prompts: Sequence[str], title: str) -> list[str]:
        """The completions' texts. Errors as in `complete`."""
        if not prompts:
            return []
        length = fitting_length(self.model, self.tokenizer, prompts, self.max_new_tokens)
        settings: dict[str, Any] = {
            "temperature": self.temperature[task_of(prompts[0])],
            "max_new_tokens": length,
            "seed": self.seed,
        }
        with progress_bar(title if self.progress else "", len(prompts), "prompt") as bar:
            settings |= {"temperature": self.temperature[task_of(prompts[0])], "told": bar.update}
            return [each.text for each in complete(self.model, self.tokenizer, prompts, **settings)]
