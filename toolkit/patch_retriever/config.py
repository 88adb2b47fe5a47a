"""The settings of a build: a YAML file, the command line over it, written out resolved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from patch_retriever.adapters.settings import AdapterSettings
from patch_retriever.backbones.readout import PROMPTS, PoolingMode, Prompt
from patch_retriever.errors import UserError
from patch_retriever.sae.settings import SAESettings

MOST_ITEMS = 20_000
"""Calibration items of each modality: some for every dimension of the widest backbones, so that
more hardly move a mean or a covariance, while time grows with their number."""


class ScenesSettings(BaseModel):
    """How many scenes are asked about in each split (galleries are three times as large)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calibration: int = Field(default=350, ge=20)
    validation: int = Field(default=200, ge=20)
    test: int = Field(default=500, ge=20)


class BuildConfig(BaseModel):
    """Everything that decides what a build gives."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "tiny-mllm"
    """A folder, a hub id, or tiny-mllm (built in)."""
    revision: str | None = None
    """Of a hub id: a branch, a tag or a commit; None for the newest."""
    pairs: str = "scenes"
    """A file, folder, pattern or dataset of pictures with texts, or scenes (built in)."""
    image_column: str | None = None
    """The pairs' column of pictures, where it has none of the names that are known."""
    text_column: str | None = None
    """The pairs' column of texts, likewise."""
    allow_urls: bool = False
    """Download pictures that the pairs name by an address."""
    preset: Literal["auto", "paper"] = "auto"
    """auto tries readouts on validation; paper pins the paper's."""
    prompt: Prompt | None = None
    """The only prompt to try: a name (plain, paper, one-word, e5v, system), or what is said after a
    text, an image and both, and whether the assistant's turn is opened."""
    pooling: PoolingMode | None = None
    """The only pooling to try."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The longest input in tokens; None for the model's own limit."""
    seed: int = Field(default=0, ge=0)
    skip_bad: bool = False
    """Leave bad rows and pictures out instead of stopping."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of the model; auto is that of its files."""
    device: str = "cpu"
    device_map: str | dict[str, str | int] | None = None
    """In place of a device: auto spreads the model over all there are."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Of a picture, where the model makes more tokens of a larger one."""
    attention: str | None = None
    """transformers' implementation: sdpa, eager, flash_attention_2; None for its choice."""
    batch_size: int = Field(default=64, ge=1)
    folds: int = Field(default=5, ge=1)
    """Of the cross-validation by which choices are made where validation has fewer than 1,000
    queries, at most (a fold has 25 documents, if that leaves three folds); 1 for validation
    alone."""
    scenes: ScenesSettings = ScenesSettings()
    sae: SAESettings = SAESettings()
    sae_from: str | None = None
    """An SAE to use instead of training one: a folder or a hub id, in a format that is read."""
    patch_at: str | None = Field(default=None, pattern=r"^layers\.\d+$")
    """The decoder layer after which concepts are subtracted; None for at the readout."""
    max_calibration_items: int = Field(default=MOST_ITEMS, ge=100)
    """Items of each modality that methods are fitted on; of more, a random sample."""
    adapter: AdapterSettings | None = None
    """How an adapter is trained through the selected patch; None for none."""
    adapter_from: str | None = None
    """An adapter to use instead of training one: a folder in peft's layout."""
    method: str | None = None
    """The id of the table's row to export instead of the one that held-out queries choose, or
    concepts for the best that subtracts concepts."""
    codes: Literal["tokens", "pooled"] = "tokens"
    """What concepts are scored on: codes of tokens, pooled like the embedding (an SAE is trained on
    tokens), or codes of pooled vectors (what the paper scores)."""

    @property
    def with_adapter(self) -> bool:
        """Whether an adapter is trained, or a given one taken."""
        return self.adapter is not None or self.adapter_from is not None

    @property
    def folds_of_choice(self) -> int:
        """Folds by which methods are chosen: one, validation, where an adapter was trained on the
        calibration pairs, or concepts were scored on them in a layer."""
        return 1 if self.with_adapter or self.patch_at else self.folds

    @property
    def adapter_settings(self) -> AdapterSettings:
        """How an adapter is trained and exported."""
        return self.adapter or AdapterSettings()

    @field_validator("prompt", mode="before")
    @classmethod
    def _named(cls, prompt: Any) -> Any:
        if not isinstance(prompt, str):
            return prompt
        if prompt not in PROMPTS:
            raise ValueError(f"no prompt {prompt!r}; there are {', '.join(PROMPTS)}")
        return PROMPTS[prompt]

    @classmethod
    def read(cls, path: Path | None, **overrides: Any) -> BuildConfig:
        """Settings from a YAML file (or none), `overrides` that are not None over it.

        Raises:
            UserError: the file is missing, is not YAML, or has an unknown key or a wrong value.
        """
        values = {} if path is None else read_yaml(path)
        overrides = {k: v for k, v in overrides.items() if v is not None}
        if isinstance(values.get("adapter"), dict) and "adapter" in overrides:
            overrides["adapter"] = values["adapter"] | overrides["adapter"]
        values |= overrides
        prompt = values.get("prompt")
        if isinstance(prompt, str) and prompt.endswith((".yaml", ".yml")):
            values["prompt"] = read_yaml(Path(prompt))
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            section = problem["loc"][0] if len(problem["loc"]) > 1 else None
            sections: dict[str, Iterable[str]] = {
                "scenes": ScenesSettings.model_fields,
                "sae": SAESettings.__dataclass_fields__,
                "adapter": AdapterSettings.__dataclass_fields__,
                "prompt": Prompt.__dataclass_fields__,
            }
            known = ", ".join(sections.get(str(section), cls.model_fields))
            overridden = overrides.get(key.partition(".")[0]) is not None
            where = "settings" if path is None or overridden else path
            if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                raise UserError(f"{where}: unknown key {key!r}; known keys: {known}") from None
            said = problem["msg"].removeprefix("Value error, ")
            raise UserError(f"{where}: {key}: {said}") from None
        if config.preset == "paper" and (config.prompt or config.pooling):
            raise UserError("settings: preset paper pins prompt and pooling; leave those out")
        return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        UserError: it cannot be read, or is no YAML mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: settings expected (key: value), found {type(values).__name__}")
    return values
