"""The stages of a curriculum as a recipe writes them: shares of prompts and a temperature, until a step or a pass rate.

    stages:
      - {until_pass_rate: 0.6, mix_env_ratio: 0.75, temperature: 1.0}
      - {until_step: 200, mix_env_ratio: 0.5, policy_strata: {check: 0.25}}
      - {temperature: 0.7}

What a stage does not name is as in the rest of the recipe.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets

from rookworld_trl.chess.mixing import mix

SETTINGS = ("mix_env_ratio", "policy_strata", "temperature")
ENDS = ("until_step", "until_pass_rate")

Stage = Mapping[str, Any]


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises:
    ValueError: one message that names the stage and the key.
    """
    last_step = 0
    for number, stage in enumerate(stages, start=1):
        where, last = f"stages: stage {number}", number == len(stages)
        unknown = sorted(set(stage) - {*SETTINGS, *ENDS})
        if unknown:
            raise ValueError(f"{where} has a key '{unknown[0]}'; the keys are {', '.join((*ENDS, *SETTINGS))}")
        if last == any(stage.get(name) is not None for name in ENDS):
            what = "is the last and lasts to the end; remove its" if last else "would never end; give it an"
            raise ValueError(f"{where} {what} `until_step` or `until_pass_rate`")
        step, rate = (stage.get(name) for name in ENDS)
        if step is not None and not (isinstance(step, int) and step > last_step):
            raise ValueError(f"{where}: `until_step` is {step!r}; write a step after {last_step}, where it may begin")
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate <= 1):
            raise ValueError(f"{where}: `until_pass_rate` is {rate!r}; write a share above 0, to 1 at most")
        temperature = stage.get("temperature", 1.0)
        if not (isinstance(temperature, int | float) and temperature > 0):
            raise ValueError(f"{where}: `temperature` is {temperature!r}; write a number above 0")
        last_step = step or last_step


def lay_out(
    dataset: Dataset,
    stages: Sequence[Stage],
    mix_env_ratio: float,
    policy_strata: Mapping[str, float] | None,
    temperature: float,
    **sizes: int,
) -> Dataset:
    """Each stage's rows for a whole run, one stage after the other; see `mix` for the arguments.

    Returns:
        The rows, with the columns `place` (in the stage) and `temperature`.
    """
    parts = []
    for number, stage in enumerate(stages, start=1):
        strata = stage.get("policy_strata", policy_strata)
        try:
            part = mix(dataset, stage.get("mix_env_ratio", mix_env_ratio), **sizes, policy_strata=strata)
        except ValueError as error:
            raise ValueError(f"stages: stage {number}: {error}") from error
        part = part.add_column("place", list(range(len(part))))
        parts.append(part.add_column("temperature", [float(stage.get("temperature", temperature))] * len(part)))
    return concatenate_datasets(parts)
