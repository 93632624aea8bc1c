"""The keys of an experiment's YAML, their types, ranges and defaults.

One YAML holds every stage's section. Sections that name torchtune components (``model``,
``optimizer``, ...) are open mappings with a ``_component_``; everything else is closed, so that a
mistyped key is an error.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MemoriesSeen = Literal["short", "long", "both"]
Component = dict[str, Any]


# What rows of the evaluation's table are called that are no agents; so is what begins with hybrid_.
PREDICTORS = (
    "constant", "global_mean", "user_mean", "item_mean", "user_item_bias", "matrix_factorisation",
    "ridge_prompt_numbers", "neighbours", "without_agent", "bayes_optimal",
)  # fmt: skip


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"under adapter_sets: {', '.join(known) or 'none'}"


class Section(BaseModel):
    """A part of the YAML in which unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


class RatingScale(Section):
    min: float = 1
    max: float = 5
    step: float = Field(default=1, gt=0)

    @model_validator(mode="after")
    def _steps_must_reach_max(self) -> "RatingScale":
        n_steps = (self.max - self.min) / self.step
        if n_steps < 1 or abs(n_steps - round(n_steps)) > 1e-6:
            raise ValueError(
                f"max {self.max:g} is no whole number of steps of {self.step:g} above min {self.min:g}; "
                "set min, max and step to the log's own scale"
            )
        if n_steps > 100:
            raise ValueError(f"more than 101 ratings between {self.min:g} and {self.max:g}; raise step")
        return self


class Cohort(Section):
    n_users: int | None = Field(default=None, ge=1)
    min_interactions: int = Field(default=1, ge=1)
    max_interactions: int | None = Field(default=None, ge=1)
    exclude: str | None = None  # a users.parquet whose users are left out of the log altogether

    @model_validator(mode="after")
    def _range_must_not_be_empty(self) -> "Cohort":
        if self.max_interactions is not None and self.max_interactions < self.min_interactions:
            raise ValueError(
                f"max_interactions {self.max_interactions} is below min_interactions {self.min_interactions}; "
                "raise it or set it to null"
            )
        return self


class Split(Section):
    by: Literal["user_time", "global_time"] = "user_time"
    train_fraction: float = Field(default=0.6, gt=0, lt=1)
    test_rows: int | None = Field(default=None, ge=1)


class World(Section):
    """Size of the synthetic world (``data.format: world``)."""

    n_users: int = Field(default=1000, ge=20)
    n_items: int = Field(default=400, ge=20)
    n_groups: int = Field(default=6, ge=2)
    mean_interactions: int = Field(default=80, ge=20)
    seed: int = Field(default=0, ge=0)


class Data(Section):
    format: Literal["movielens", "csv", "jsonl", "parquet", "recbole", "world"] = "movielens"
    path: str | None = None
    columns: dict[Literal["user_id", "item_id", "rating", "timestamp"], str] = Field(default_factory=dict)
    encoding: str | None = None
    timestamp_unit: Literal["s", "ms"] = "s"
    duplicates: Literal["error", "first", "last"] = "error"
    item_metadata: str | None = None
    rating_scale: RatingScale = Field(default_factory=RatingScale)
    historical_average: Literal["outside", "train", "all", "none"] = "outside"
    traits: Literal["train", "all"] = "train"
    cohort: Cohort = Field(default_factory=Cohort)
    split: Split = Field(default_factory=Split)
    world: World = Field(default_factory=World)


class Prices(Section):
    """USD per million tokens, as the server's price list has them."""

    input: float = Field(ge=0)
    cached_input: float | None = Field(default=None, ge=0)  # null: as input
    output: float = Field(default=0, ge=0)
    batch_share: float = Field(default=0.5, gt=0, le=1)  # of these prices, what the Batch API takes


class Server(Section):
    """An OpenAI-compatible server, and how hard and how dearly it may be used."""

    model: str = Field(min_length=1)
    base_url: str | None = None  # null: OpenAI's, or OPENAI_BASE_URL
    concurrency: int = Field(default=32, ge=1, le=1000)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    timeout_s: float = Field(default=120, gt=0, le=3600)
    max_retries: int = Field(default=8, ge=0)  # of one call after 408, 409, 429, 5xx and broken connections
    prices: Prices | None = None
    max_usd: float | None = Field(default=None, gt=0)
    max_tokens: int | None = Field(default=None, ge=1)  # input and output of the whole job

    @model_validator(mode="after")
    def _money_needs_prices(self) -> Self:
        if self.max_usd is not None and self.prices is None:
            raise ValueError("max_usd needs prices: {input: ..., output: ...}, in USD per million tokens")
        return self


LONGEST_PROFILE = 400  # words, where profile_words is null
TOKENS_PER_WORD = 1.4  # of English in JSON
_NOT_SAMPLING = {"model", "messages", "response_format", "max_tokens", "max_completion_tokens", "stream", "n", "tools"}


class Distill(Server):
    distiller: Literal["openai", "template", "file"] = "template"
    path: str | None = None
    memories_path: str | None = None
    batch_size: int = Field(default=10, ge=1, le=10)
    max_words: int = Field(default=2000, ge=20)
    model: str = Field(default="gpt-4o", min_length=1)
    profile_words: int | None = Field(default=None, ge=20)  # null: from tokenizer.max_seq_len
    memory_words: int = Field(default=60, ge=5)
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    # Sent as it stands with each request: temperature, seed, ...
    sampling: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    max_output_tokens: int = Field(default=4096, ge=64)
    output_limit_name: Literal["max_completion_tokens", "max_tokens"] | None = None  # null: by the server
    max_tries: int = Field(default=5, ge=1)  # answers asked for before a call is given up
    max_incomplete: int = Field(default=0, ge=0)  # users that may be left out
    batch_api: bool = False
    batch_poll_s: float = Field(default=60, gt=0, le=3600)
    dry_run: bool = False
    journal: str | None = None  # null: memory/journal.sqlite

    @field_validator("response_format", mode="before")
    @classmethod
    def _yaml_reads_null_as_none(cls, value: object) -> object:
        return "none" if value is None else value

    @field_validator("sampling")
    @classmethod
    def _sampling_must_not_change_what_is_asked(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(value.keys() & _NOT_SAMPLING)
        if taken:
            raise ValueError(f"{', '.join(taken)} can't be set here; it takes temperature, top_p, seed and the like")
        return value

    @model_validator(mode="after")
    def _answers_must_fit_their_bounds(self) -> Self:
        if self.distiller != "openai":
            return self
        profile_words = LONGEST_PROFILE if self.profile_words is None else self.profile_words
        n_words = self.batch_size * self.memory_words + profile_words
        answer = (
            f"an answer may have batch_size {self.batch_size} x memory_words {self.memory_words} + profile_words "
            f"{profile_words} = {n_words} words"
        )
        if n_words > self.max_words:
            raise ValueError(f"{answer}, more than max_words {self.max_words}; lower one of them")
        if TOKENS_PER_WORD * n_words > self.max_output_tokens:
            raise ValueError(f"{answer}, too many for max_output_tokens {self.max_output_tokens}; raise it")
        return self

    @model_validator(mode="after")
    def _answers_cost_too(self) -> Self:
        if self.prices is not None and "output" not in self.prices.model_fields_set:
            raise ValueError("prices has no output, which is most of what answers cost; add output: ...")
        return self


class Embedding(Server):
    """What embeds for ``personas.embedder`` and ``retrieval.embedder`` other than ``lsa``."""

    model: str = Field(default="text-embedding-ada-002", min_length=1)
    dimensions: int | None = Field(default=None, ge=1)  # for models that can shorten their vectors
    inputs_per_request: int = Field(default=256, ge=1, le=2048)
    path: str | None = None  # sentence-transformers: the folder of a model


class Personas(Section):
    embedder: Literal["openai", "lsa", "sentence-transformers"] = "lsa"
    dim: int = Field(default=64, ge=2)
    k: int | Literal["elbow"] = 4
    k_max: int = Field(default=10, ge=2)
    stability_seeds: int = Field(default=10, ge=0, le=1000)  # 0: not measured
    words: Literal["sklearn", "spacy"] = "sklearn"

    @model_validator(mode="after")
    def _k_must_be_positive(self) -> "Personas":
        if isinstance(self.k, int) and self.k < 1:
            raise ValueError(f"k is {self.k}; it should be at least 1, or elbow")
        return self


class Retrieval(Section):
    embedder: Literal["openai", "lsa", "sentence-transformers"] = "lsa"
    dim: int = Field(default=64, ge=2)
    k: int = Field(default=1, ge=0)
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
    before_target: bool = False
    neighbours: int = Field(default=0, ge=0)  # like-minded users whose ratings of the item the prompt sums up
    query: Literal["item", "user_and_item"] = "item"


class Prompt(Section):
    template: str = "movies"
    profile: Literal["final", "before_target"] = "final"


class Training(Section):
    prefix_sharing: Literal["auto", "off"] = "auto"
    schedule: Literal["one_by_one", "interleaved"] = "one_by_one"
    offload_waiting: bool = False
    checkpoint_every_n_steps: int | None = Field(default=None, ge=1)
    keep_last_n_checkpoints: int = Field(default=2, ge=0)  # 0: none is written

    @field_validator("prefix_sharing", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: object) -> object:
        return "off" if value is False else value


class AdapterSet(Section):
    per: Literal["persona", "all"] = "persona"
    memories: MemoriesSeen = "both"
    rows: int | Literal["largest_persona", "smallest_persona"] | None = None
    rows_from: Literal["own", "all"] = "own"  # control: as many rows as each persona has, drawn from all users
    share: float = Field(default=1, gt=0, le=1)  # of each user's rows
    start_from: str | None = None  # a set above, of one adapter or of imported ones: where these adapters begin
    shuffle_personas: bool = False  # control: the same group sizes, users dealt out at random
    peft: str | None = None  # a PEFT folder, or one with a PEFT folder per persona: imported in the place of training
    base: str | None = None

    @model_validator(mode="after")
    def _rows_and_shuffling_need_their_kind(self) -> "AdapterSet":
        if isinstance(self.rows, int) and self.rows < 1:
            raise ValueError(f"rows is {self.rows}; it should be at least 1")
        if self.per == "all" and self.shuffle_personas:
            raise ValueError("one adapter for all users has nothing to shuffle; shuffle_personas needs per: persona")
        if self.per == "persona" and self.rows is not None:
            raise ValueError("persona adapters train on all of their rows; rows needs per: all")
        return self

    @model_validator(mode="after")
    def _row_choices_must_fit_together(self) -> "AdapterSet":
        if self.per == "all" and self.rows_from == "all":
            raise ValueError("one adapter for all users takes rows of all anyway; rows_from: all needs per: persona")
        if self.shuffle_personas and self.rows_from == "all":
            raise ValueError("rows of all users make no groups to shuffle; set rows_from: all or shuffle_personas")
        if self.rows is not None and self.share != 1:
            raise ValueError(f"rows {self.rows} and share {self.share:g} both say how many rows; set one of them")
        return self

    @model_validator(mode="after")
    def _imports_are_not_trained(self) -> "AdapterSet":
        of_training = {"rows": None, "rows_from": "own", "share": 1, "start_from": None, "shuffle_personas": False}
        given = [key for key, default in of_training.items() if getattr(self, key) != default]
        if self.peft is not None and given:
            raise ValueError(f"with peft nothing is trained, so {given[0]} has no effect; leave one of them out")
        return self


class Published(Section):
    """Figures of the paper that an agent reproduces."""

    rmse: float = Field(ge=0)
    mae: float = Field(ge=0)
    urr: float = Field(ge=0, le=1)


class Agent(Section):
    adapters: str | None = None
    memories: MemoriesSeen | None = None  # defaults to what its adapter set was trained with, else both
    readout: Literal["expected", "argmax", "generate"] = "expected"
    base: str | None = None
    calibrate: bool = False  # mend its distributions by what it got wrong on train rows
    published: Published | None = None  # stands beside its own figures in the table

    @model_validator(mode="after")
    def _only_distributions_can_be_calibrated(self) -> "Agent":
        if self.calibrate and self.readout == "generate":
            raise ValueError("generated answers have no distribution to calibrate; set readout to expected or argmax")
        return self


class Evaluation(Section):
    n_resamples: int = Field(default=9999, ge=99)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    max_new_tokens: int = Field(default=4, ge=1)
    temperature: float = Field(default=0.3, ge=0)
    top_k: int | None = Field(default=50, ge=1)
    max_tokens_per_forward: int = Field(default=8192, ge=1)
    calibration_share: float = Field(default=0.2, gt=0, le=1)  # of each user's train rows, the latest
    hybrids: list[str] = Field(default_factory=list)  # agents whose distributions a regression uses
    own_versus_other: list[str] = Field(default_factory=list)  # agents whose users try every adapter of the set
    own_versus_other_rows: int | None = Field(default=None, ge=1)

    @field_validator("hybrids")
    @classmethod
    def _hybrids_must_differ(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("an agent is named twice; name each once")
        return names


class Base(Section):
    """One more base model by name."""

    model: Component
    tokenizer: Component
    checkpointer: Component


class BaseTraining(Section):
    """What ``persona_base`` trains from scratch (a tiny base for offline use)."""

    architecture: Literal["phi3", "llama3"] = "phi3"
    checkpoint_dir: str | None = None
    corpora: list[str] = Field(default_factory=list)  # finished experiments whose test rows are learnt; empty: this one
    vocab_size: int = Field(default=1024, ge=300)
    split_digits: bool = True  # each digit a token of its own
    embed_dim: int = Field(default=192, ge=8)
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=6, ge=1)
    num_kv_heads: int = Field(default=6, ge=1)
    intermediate_dim: int = Field(default=512, ge=8)
    max_seq_len: int = Field(default=2048, ge=64)
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    rows_per_step: int = Field(default=64, ge=1)
    rows_per_user: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    prompt_loss_weight: float = Field(default=0.0, ge=0)
    validation_users: int = Field(default=20, ge=1)
    validate_every_n_steps: int | None = Field(default=None, ge=1)
    tokenizer_stride: int = Field(default=5, ge=1)  # the tokenizer is trained on every so many-th prompt

    @model_validator(mode="after")
    def _heads_must_divide(self) -> "BaseTraining":
        if self.embed_dim % (2 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim}, num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads} don't "
                "fit; each head takes an even share of embed_dim, each key head an equal number of heads"
            )
        return self


class Export(Section):
    """What ``persona_export`` writes."""

    sets: list[str] | None = None  # null: every entry of adapter_sets
    adapters: list[str] | None = None  # of each set; null: all
    format: Literal["auto", "peft", "merged"] = "auto"  # auto: PEFT, but DoRA merged, since vLLM refuses it
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # null: an adapter's own fp32; merged, the base's
    max_rank: int | None = Field(default=None, ge=1)  # lossy: cuts larger ranks by SVD
    base_name: str | None = None  # as cards and servers call the base
    license: str | None = Field(default=None, min_length=1)  # null: what the base's own card says
    words: bool = True  # whether cards tell the words of personas
    push_to: str | None = None  # owner/prefix on the Hub
    private: bool = True

    @field_validator("adapters", mode="before")
    @classmethod
    def _yaml_reads_names_as_numbers(cls, value: object) -> object:
        return [str(name) if isinstance(name, int) else name for name in value] if isinstance(value, list) else value

    @field_validator("push_to")
    @classmethod
    def _repositories_have_an_owner(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w-]+/[\w-]([\w.-]*[\w-])?", value, re.ASCII):
            raise ValueError(f"{value!r} names no repositories of the Hub; write owner/prefix")
        return value

    @field_validator("base_name")
    @classmethod
    def _names_are_no_paths(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value, re.ASCII):
            raise ValueError(f"{value!r} names no model; write owner/name, or a name without '/' for one of your own")
        return value

    @model_validator(mode="after")
    def _merged_weights_have_no_rank(self) -> Self:
        if self.format == "merged" and self.max_rank is not None:
            raise ValueError("a merged checkpoint has no rank to cut; leave out max_rank, or set format: peft")
        return self


class Experiment(Section):
    """The whole YAML."""

    output_dir: str = Field(min_length=1)
    seed: int = Field(default=42, ge=0)
    device: str = "cpu"
    dtype: Literal["fp32", "bf16"] = "fp32"
    parallel: Literal["auto", "persona", "data", "fsdp"] = "auto"  # how several processes share the work

    data: Data = Field(default_factory=Data)
    distill: Distill = Field(default_factory=Distill)
    personas: Personas = Field(default_factory=Personas)
    embedding: Embedding = Field(default_factory=Embedding)
    retrieval: Retrieval = Field(default_factory=Retrieval)
    prompt: Prompt = Field(default_factory=Prompt)

    model: Component | None = None
    tokenizer: Component | None = None
    checkpointer: Component | None = None
    optimizer: Component | None = None
    lr_scheduler: Component | None = None
    loss: Component | None = None
    metric_logger: Component | None = None
    profiler: Component | None = None
    bases: dict[str, Base] = Field(default_factory=dict)
    base_training: BaseTraining = Field(default_factory=BaseTraining)

    epochs: int = Field(default=2, ge=1)
    batch_size: int = Field(default=2, ge=1)
    gradient_accumulation_steps: int = Field(default=8, ge=1)
    rows_per_user: int = Field(default=4, ge=1)
    max_steps_per_epoch: int | None = Field(default=None, ge=1)
    clip_grad_norm: float | None = Field(default=None, gt=0)
    validation_share: float | None = Field(default=None, gt=0, lt=1)
    training: Training = Field(default_factory=Training)
    compile: bool = False
    enable_activation_checkpointing: bool = False
    cudnn_deterministic_mode: Literal["default", "warn", "error"] | None = None
    resume_from_checkpoint: bool | str | None = None  # last, or a checkpoint's folder; null: if one fits
    log_every_n_steps: int = Field(default=1, ge=1)
    log_peak_memory_stats: bool = False

    adapter_sets: dict[str, AdapterSet] = Field(default_factory=dict)
    agents: dict[str, Agent] = Field(default_factory=dict)
    stages: list[str] | None = None  # what persona_pipeline runs; all of them by default
    evaluation: Evaluation = Field(default_factory=Evaluation)
    export: Export = Field(default_factory=Export)

    @model_validator(mode="after")
    def _names_must_refer_to_something(self) -> "Experiment":
        problems = []
        for kind, entries in (("adapter_sets", self.adapter_sets), ("agents", self.agents)):
            for name, entry in entries.items():
                if not name.replace("_", "").replace("-", "").isalnum():
                    problems.append(f"{kind}: {name!r} can't name a folder; use letters, digits, '_' and '-'")
                if entry.base is not None and entry.base not in self.bases:
                    problems.append(
                        f"{kind}.{name}.base: no base {entry.base!r}; under bases: {', '.join(self.bases) or 'none'}"
                    )
        for name, agent in self.agents.items():
            if name in PREDICTORS or name.startswith("hybrid_"):
                problems.append(f"agents: {name!r} is the name of a baseline; rename the agent")
            if agent.adapters is not None and agent.adapters not in self.adapter_sets:
                known = ", ".join(self.adapter_sets) or "none"
                problems.append(
                    f"agents.{name}.adapters: no adapter set {agent.adapters!r}; under adapter_sets: {known}"
                )
        problems += [
            f"evaluation.hybrids: no agent {name!r}; under agents: {', '.join(self.agents) or 'none'}"
            for name in self.evaluation.hybrids
            if name not in self.agents
        ]
        problems += [
            f"export.sets: no adapter set {name!r}; {_nearest(name, self.adapter_sets)}"
            for name in self.export.sets or []
            if name not in self.adapter_sets
        ]
        if "merged" in self.adapter_sets:
            problems.append("adapter_sets: 'merged' names the folder of merged checkpoints; rename the set")
        problems += [why for name in self.adapter_sets if (why := self._why_no_start(name))]
        problems += [why for name in self.evaluation.own_versus_other if (why := self._why_not_crosswise(name))]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _why_no_start(self, name: str) -> str:
        """Why an adapter set can't begin where its ``start_from`` ended; empty if it can, or has none."""
        start, before = self.adapter_sets[name].start_from, list(self.adapter_sets)
        if start is None:
            return ""
        fitting = [
            other
            for other in before[: before.index(name)]
            if self._can_begin_at(name, other) and self.adapter_sets[other].base == self.adapter_sets[name].base
        ]
        if start in fitting:
            return ""
        kind = "of one adapter" if self.adapter_sets[name].per == "all" else "of one adapter or of imported ones"
        known = ", ".join(fitting) or "none"
        return f"adapter_sets.{name}.start_from: no set {start!r} {kind} on that base above it; such are: {known}"

    def _can_begin_at(self, name: str, other: str) -> bool:
        """Whether each adapter of a set finds one to begin with: the only one, or an imported one of its persona."""
        mine, start = self.adapter_sets[name], self.adapter_sets[other]
        return start.per == "all" or (start.peft is not None and mine.per == "persona")

    def _why_not_crosswise(self, agent: str) -> str:
        """Why an agent can't be measured with the adapters of other personas; empty if it can."""
        key = "evaluation.own_versus_other"
        crosswise = [
            name
            for name, each in self.agents.items()
            if each.adapters in self.adapter_sets and self.adapter_sets[each.adapters].per == "persona"
        ]
        if agent in crosswise:
            return ""
        known = ", ".join(crosswise) or "none"
        if agent not in self.agents:
            return f"{key}: no agent {agent!r}; agents that have an adapter per persona: {known}"
        return f"{key}: agent {agent!r} has no adapter per persona; agents that have one: {known}"
