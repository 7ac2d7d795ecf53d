"""The table of features by engine: which tests show that a feature works, and with which words an engine refuses it.

``tests/unit/test_features.py`` checks that the tests exist and writes the table in ``docs/reference/engines.md``.
``tests/vllm/test_refusals.py`` and ``tests/unit/engine/test_choice.py`` check the words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        both: tests of the protocol's suite, which runs on all engines.
        overfill, vllm, mock: tests of one engine.
        mixed: tests of a stack in which one stage has OverFill's engine and the other one vLLM. They use the fixture
            ``mixed``, or start such a stack.
        computed: the tests compare what a model computes, so that their runs on the mock engine show nothing.
    """

    text: str
    both: tuple[str, ...] = ()
    overfill: tuple[str, ...] = ()
    vllm: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    mock: tuple[str, ...] = ()
    computed: bool = False


@dataclass(frozen=True)
class Refusal:
    """Something that an engine refuses before it runs anything.

    Attributes:
        words: what the error says.
        options: fields of ``EngineOptions`` that ask for it.
        other_works: whether the other engine can do it.
    """

    text: str
    words: str
    options: dict[str, Any] = field(default_factory=dict)
    other_works: bool = False


FEATURES = (
    Feature(
        "greedy answers equal plain transformers' in float32",
        both=(
            "test_the_answer_continues_the_first_token_on_the_full_model_s_kv",
            "test_kv_and_first_token_are_the_full_model_s",
        ),
        mixed=("test_mixed_engines_answer_as_the_reference",),
        computed=True,
    ),
    Feature(
        "KV leaves layer by layer while later layers run",
        both=("test_kv_and_first_token_are_the_full_model_s", "test_kv_stays_as_it_is_until_the_release"),
        mixed=("test_mixed_engines_answer_as_the_reference",),
    ),
    Feature(
        "temperature, top-k, top-p, min-p; a seed draws the same token from the same logits",
        both=(
            "test_sampling_parameters_mean_the_same_on_every_engine",
            "test_the_first_token_is_sampled_as_the_request_says",
        ),
        mixed=("test_every_sampling_parameter_crosses_from_one_engine_to_the_other",),
    ),
    Feature(
        "penalties, logit bias, min_tokens, stop ids, logprobs",
        both=(
            "test_sampling_parameters_mean_the_same_on_every_engine",
            "test_a_stop_id_ends_the_answer_and_is_not_reported",
        ),
        mixed=("test_every_sampling_parameter_crosses_from_one_engine_to_the_other",),
    ),
    Feature(
        "log-probabilities of a prompt's tokens (`echo` with `logprobs`, `prompt_logprobs`)",
        overfill=("test_scores_are_the_full_model_s",),
    ),
    Feature(
        "grammars: JSON, JSON schema, regex, Lark",
        both=(
            "test_sampling_parameters_mean_the_same_on_every_engine",
            "test_a_grammar_continues_behind_emitted_tokens",
        ),
        mock=("test_a_grammar_lets_the_script_through_or_replaces_it_and_another_worker_goes_on_alike",),
        mixed=("test_every_sampling_parameter_crosses_from_one_engine_to_the_other",),
    ),
    Feature(
        "chunked prefill; several prompts in a step",
        both=("test_a_long_prompt_is_computed_in_chunks_of_the_budget", "test_several_prompts_at_once"),
        mixed=("test_mixed_engines_answer_as_the_reference",),
    ),
    Feature(
        "prefix cache of prompts, apart for each tenant; routers know its keys",
        both=(
            "test_prefixes_are_shared_within_a_namespace_only",
            "test_kv_is_found_within_its_namespace_only",
            "test_the_journal_reports_the_keys_that_a_router_computes",
        ),
        mixed=("test_a_tenant_finds_its_own_prompts_only",),
    ),
    Feature(
        "KV is the full model's in every turn of a chat",
        both=("test_the_next_turns_of_a_chat_never_find_kv_that_the_decoder_wrote",),
        vllm=("test_kv_is_the_full_model_s_in_every_turn_of_a_chat",),
        mixed=("test_kv_is_the_full_model_s_in_every_turn_of_a_chat_with_mixed_engines",),
    ),
    Feature(
        "KV of a prompt is imported instead of computed, and cached KV is lent to other workers",
        both=("test_what_is_imported_is_not_computed_and_found_later", "test_cached_blocks_are_lent"),
        vllm=("test_borrowed_kv_is_the_holders_and_the_next_token_is_the_same",),
        mixed=("test_a_chat_on_mixed_engines_goes_on_with_returned_answers",),
    ),
    Feature(
        "KV of answers is found by the next turn, where the decoder is the full model",
        both=("test_the_next_turn_finds_the_answer_of_the_turn_before",),
        vllm=("test_a_chat_on_vllm_goes_on_with_returned_answers",),
        mixed=("test_a_chat_on_mixed_engines_goes_on_with_returned_answers",),
    ),
    Feature(
        "migration: emitted tokens pass through the decoder again",
        both=("test_emitted_tokens_are_replayed_and_neither_sampled_nor_reported_again",),
        vllm=("test_a_killed_decode_worker_s_answers_continue_on_another",),
    ),
    Feature(
        "preemption: the prompt's KV is asked for again",
        both=("test_a_sequence_that_loses_its_blocks_asks_for_its_kv_again_and_goes_on_as_before",),
    ),
    Feature(
        "cancelling in any phase frees all blocks",
        both=(
            "test_release_while_the_kv_is_on_its_way",
            "test_release_of_a_running_sequence_leaves_the_others_alone",
            "test_cancel_between_two_chunks",
        ),
        vllm=("test_cancelled_requests_leave_nothing_behind",),
        mixed=("test_cancelled_requests_leave_nothing_behind_with_mixed_engines",),
    ),
    Feature(
        "refusal instead of a queue in the engine",
        both=(
            "test_a_refusal_when_blocks_are_short_names_numbers_and_changes_nothing",
            "test_a_full_house_refuses_and_names_the_number",
        ),
    ),
    Feature(
        "decoders with fewer layers",
        both=("test_the_answer_continues_the_first_token_on_the_full_model_s_kv",),
        mixed=("test_an_imported_pair_with_dropped_layers",),
        computed=True,
    ),
    Feature("a decoder in a quantised format (here int8 in compressed-tensors)", vllm=("test_an_int8_decoder",)),
    Feature(
        "KV sent as int8; sockets or shared memory",
        overfill=("test_pools_and_requests_choose_a_codec_and_share_kv_within_it_only",),
        vllm=("test_codecs_and_sockets",),
        mixed=("test_codecs_and_sockets",),
    ),
    Feature(
        "tiers: several decoders on one prefill of the full model",
        overfill=("test_every_tier_answers_as_its_own_reference",),
        vllm=("test_every_tier_on_vllm_answers_as_its_own_reference",),
        mixed=("test_the_full_model_on_vllm_and_a_decoder_on_the_other_engine_answer_as_their_references",),
    ),
    Feature(
        "adapters (LoRA): one batch mixes them; they come and go while others answer",
        both=("test_a_batch_mixes_adapters_and_none", "test_adapters_come_and_go_while_others_answer"),
        mixed=("test_tasks_of_one_prompt_answer_as_peft_s",),
        computed=True,
    ),
    Feature(
        "a tier without workers: its answers go on in the next (`fallback`), or under overload (`--brownout`)",
        overfill=(
            "test_an_answer_goes_on_in_another_tier_if_it_may",
            "test_overload_costs_quality_where_the_request_allows_it",
        ),
    ),
    Feature(
        "a step fails: its sequences go on elsewhere (on vLLM the worker ends too)",
        both=("test_a_failed_step_ends_its_own_prompts_or_the_worker",),
    ),
    Feature(
        "one sequence makes the sampling raise: it fails alone",
        both=("test_what_one_sequence_makes_the_sampling_raise_fails_it_alone",),
    ),
)

VLLM_REFUSES = (
    Refusal(
        "KV cache in int8 (`--kv-cache-dtype int8`)", "int8 needs --engine overfill", {"kv_cache_dtype": "int8"}, True
    ),
    Refusal("ranks on several hosts", "nnodes 2 is not supported in this version", {"engine_args": {"nnodes": 2}}),
    Refusal(
        "pipeline parallelism",
        "pipeline_parallel_size 2 is not supported in this version",
        {"engine_args": {"pipeline_parallel_size": 2}},
    ),
    Refusal(
        "speculative decoding",
        "speculative_config {'method': 'ngram'} is not supported in this version",
        {"engine_args": {"speculative_config": {"method": "ngram"}}},
    ),
    Refusal(
        "adapters of a rank above 512",
        "max_adapter_rank: 513 is more than 512, vLLM's maximum",
        {"max_adapters": 1, "max_adapter_rank": 513},
    ),
    Refusal("FP8 KV cache", "kv_cache_dtype is set by --kv-cache-dtype", {"engine_args": {"kv_cache_dtype": "fp8"}}),
)

OVERFILL_REFUSES = (
    Refusal(
        "weights in FP8, AWQ, GPTQ or compressed-tensors, as far as the installed vLLM runs them",
        "the engine overfill cannot run the decoder",
        other_works=True,
    ),
    Refusal("tensor parallelism", "2 ranks need vllm, but the engine overfill runs the decoder", other_works=True),
)
